"""Do intervals hold the truth as often as they say, and tests find nothing where there is nothing? By simulation.

    python benchmarks/coverage.py [--studies 600] [--null 300] [--groups 8] [--only margin 2 1 12]

Studies are drawn whose true effects are known: groups of pictures with some questions each, answered clean and under
every mask, or under the masks that `vlmneurons.study.design.crossing` deals. Questions about one picture, and answers
under two masks, depend on each other. A row of the table is a design; its columns are

- the share of studies whose 95 % interval holds the true self effect, cross effect, gap (of single groups, and of the
  mean over groups: "all") and the true effects of single masks on single other groups (cells);
- in parentheses the share that has an interval at all (12 pictures, 20 changed answers). Where less than 95 % have,
  chance decides whether twenty answers changed, and with that how large an effect looks: these are not held against
  the method (they hold the truth too seldom where few have one, and too often where most have);
- ``*`` where the share is outside .93–.97 by more than two of its simulation errors, which are over studies;
- bias: the largest of the errors' means (self, cross, gap; single groups and all), in its own standard errors;
- p: the share of studies with p <= 0.05 for self effect and gap of single groups, where there is none.
"""

import argparse
import itertools
import re
from collections import defaultdict

import numpy as np
from scipy import special

import vlmneurons as vn
from vlmneurons.study.design import crossing
from vlmneurons.study.effects import estimates, question_effects
from vlmneurons.study.masks import Mask

EFFECTS = ("self", "cross", "gap")
LEAST, MOST, JUDGED = 0.93, 0.97, 0.95
"""Coverage that is right for 95 % intervals, and the share of studies that must have one to be judged by it."""
_GRID = np.linspace(0, 40, 400_001)
_GAMMA = 1 - (1 + _GRID) * np.exp(-_GRID)
"""The distribution of a gamma variable of shape 2, to invert by interpolation: SciPy's inverse is slow."""


class Design:
    """Groups, pictures and questions, and which questions meet which masks."""

    def __init__(self, groups: int, pictures: int, questions: str, others: int | None, seed: int = 0) -> None:
        random = np.random.default_rng([seed, pictures])
        least, _, most = questions.partition("–")
        sizes = random.integers(int(least), int(most or least) + 1, (groups, pictures))
        self.names = [f"g{n}" for n in range(groups)]
        self.group = np.repeat(np.arange(groups), sizes.sum(1))
        self.picture = np.repeat(np.arange(groups * pictures), sizes.reshape(-1))
        self.members = [np.flatnonzero(self.group == n) for n in range(groups)]
        self.groups = [self.names[n] for n in self.group]
        self.own = np.arange(groups)[:, None] == self.group
        asked = vn.QuestionSet(
            [
                vn.Question(None, "?", ("a", "b"), 0, self.names[g], id=f"q{n}", image_id=f"p{p}")
                for n, (g, p) in enumerate(zip(self.group, self.picture, strict=True))
            ]
        )
        masks = [Mask("CAS", 0, name, 1) for name in self.names]
        self.plans = [crossing(asked, masks, others=others, seed=n).meets for n in range(20 if others else 1)]

    def uniform(self, random: np.random.Generator, rows: int, within: float) -> np.ndarray:
        """Uniform numbers, alike for the questions of a picture with a probability."""
        shape = (rows, len(self.group))
        of_picture = random.random((rows, int(self.picture.max()) + 1))[:, self.picture]
        return np.where(random.random(shape) < within, of_picture, random.random(shape))

    def draw(self, random: np.random.Generator, value: str, null: bool) -> tuple[np.ndarray, float, float]:
        """The changes of one study, and the true effects of a group's own mask and of another's."""
        within, between = 0.4, 0.3
        shared = self.uniform(random, 1, within)  # what a question is like under every mask
        u = self.uniform(random, len(self.names), within)
        u = np.where(random.random(u.shape) < between, shared, u)
        if value == "correct":
            clean = self.uniform(random, 1, within) < (0.5 if null else 0.75)
            harm, gain = np.where(self.own, 0.3, 0.08), np.where(self.own, 0.3, 0.08) if null else 0.03
            change = np.where(clean, -(u < harm).astype(float), (u < gain).astype(float))
            truth = (0.0, 0.0) if null else (-0.75 * 0.3 + 0.25 * 0.03, -0.75 * 0.08 + 0.25 * 0.03)
        else:
            truth = (0.0, 0.0) if null else (-0.5, -0.05)
            noise = special.ndtri(u) if null else np.interp(1 - u, _GAMMA, _GRID) - 2  # skewed, but for the null
            change = np.where(self.own, truth[0] + 0.6 * noise, truth[1] + 0.2 * noise)
        change[~self.plans[random.integers(len(self.plans))]] = np.nan
        return change, *truth


def null_p(design: Design, value: str, studies: int, seed: int = 0) -> np.ndarray:
    """``[study, effect, group]`` p of self effect and gap of two groups where there is neither."""
    random = np.random.default_rng([seed, 1, len(design.group)])
    found = []
    for study in range(studies):
        change, *_ = design.draw(random, value, null=True)
        rows = question_effects(change, design.names, design.groups)[[0, 2]]
        found.append(estimates(rows, design.members, design.picture).pvalues(400, [study], places=range(2))[:, :2])
    return np.array(found).reshape(studies, 2, 2)


def simulated(
    design: Design, value: str, studies: int, null: int, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """For each column of the table its number, the share of studies that have it, and its simulation error."""
    random = np.random.default_rng([seed, len(design.group)])
    held, given, errors = defaultdict(list), defaultdict(list), defaultdict(list)
    single = len(design.names)
    for _ in range(studies):
        change, own, other = design.draw(random, value, null=False)
        found = estimates(question_effects(change, design.names, design.groups), design.members, design.picture)
        low, high, few = found.bounds(0.95, value)
        for row, (name, truth) in enumerate(zip(EFFECTS, (own, other, own - other), strict=True)):
            for column, places in ((name, slice(single)), (f"{name} all", slice(single, None))):
                kept = ~few[row, places]
                inside = (low[row, places] <= truth) & (truth <= high[row, places])
                held[column].append((inside[kept].sum(), kept.sum()))
                given[column].extend(kept)
                errors[column].append((found.value[row, places] - truth).mean())
        cells = estimates(change, design.members, design.picture)
        low, high, few = (table[:, :-1][~np.eye(single, dtype=bool)] for table in cells.bounds(0.95, value))
        kept = ~few & np.isfinite(low)
        held["cells"].append((((low <= other) & (other <= high))[kept].sum(), kept.sum()))
        given["cells"].extend(kept)
    table = {name: (*_share(np.array(held[name], dtype=float)), float(np.mean(given[name]))) for name in held}
    table = {name: (share, had, error) for name, (share, error, had) in table.items()}
    scores = [abs(np.mean(one)) / (np.std(one, ddof=1) / np.sqrt(len(one))) for one in errors.values()]
    table["bias"] = (float(max(scores)), 1.0, 1.0)
    small = (null_p(design, value, null, seed) <= 0.05).reshape(null, -1).mean(1) if null else np.full(2, np.nan)
    table["p"] = (float(small.mean()), 1.0, float(small.std(ddof=1) / np.sqrt(len(small))))
    return table


def _share(of_study: np.ndarray) -> tuple[float, float]:
    """The share of all studies' intervals that hold, of ``[study, (hold, there are)]``, and its error by study."""
    hold, there = of_study.T
    if not there.sum():
        return np.nan, np.nan
    share = hold.sum() / there.sum()
    error = np.sqrt(((hold - share * there) ** 2).sum()) / there.sum()
    return float(share), float(max(error, np.sqrt(0.05 * 0.95 / there.sum())))


def outside(found: dict[str, tuple[float, float, float]], errors: float = 2) -> dict[str, tuple[float, float]]:
    """The columns whose coverage is judged and not right, by more than some simulation errors, with these."""
    judged = {name: found[name] for name in (*EFFECTS, *(f"{name} all" for name in EFFECTS), "cells")}
    return {
        name: (number, error)
        for name, (number, share, error) in judged.items()
        if share >= JUDGED and not LEAST - errors * error <= number <= MOST + errors * error
    }


COLUMNS = [*EFFECTS, *(f"{name} all" for name in EFFECTS), "cells", "bias", "p"]


DESIGNS = list(itertools.product(("correct", "margin"), (None, 2), ("1", "2", "4", "1–7"), (12, 33, 100)))
"""Value, others, questions a picture, pictures of a group."""
HEAD = ["| value | others | questions | pictures | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (4 + len(COLUMNS))]


def row(
    value: str, others: int | None, questions: str, pictures: int, found: dict[str, tuple[float, float, float]]
) -> str:
    """A row of the table in Markdown."""
    wrong = outside(found)
    cells = []
    for name in COLUMNS:
        number, share, _ = found[name]
        text = "–" if np.isnan(number) else f"{number:.1f}" if name == "bias" else f"{number:.3f}"
        cells.append(text + "*" * (name in wrong) + (f" ({share:.2f})" if 0 < share < 0.995 else ""))
    head = f"| {value} | {others or 'all'} | {questions} | {pictures} | "
    return head + re.sub(r"(?<!\d)0\.", ".", " | ".join(cells)) + " |"


def main() -> None:
    """Command line: see the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--studies", type=int, default=600, help="simulated studies a row")
    parser.add_argument("--null", type=int, default=300, help="simulated studies without effects a row")
    parser.add_argument("--groups", type=int, default=8, help="groups of a study")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], help="value, others, questions, pictures; _ for any")
    given = parser.parse_args()
    print("\n".join(HEAD), flush=True)
    for value, others, questions, pictures in DESIGNS:
        head = [value, str(others or "all"), questions, str(pictures)]
        if given.only and any(wanted != "_" and wanted != one for wanted, one in zip(given.only, head, strict=False)):
            continue
        found = simulated(
            Design(given.groups, pictures, questions, others), value, given.studies, given.null, given.seed
        )
        print(row(value, others, questions, pictures, found), flush=True)


if __name__ == "__main__":
    main()
