"""Do intervals hold the truth as often as they say, and tests find nothing where there is nothing? By simulation.

    python benchmarks/coverage.py [--studies 600] [--null 300] [--groups 8]

Studies are drawn whose true effects are known: groups of pictures with some questions each, answered clean and under
every mask, or under the masks that `vlmneurons.study.design.crossing` deals. Questions about one picture, and answers
under two masks, depend on each other. A row of the table is a design; its columns are

- the share of studies whose 95 % interval holds the true self effect, cross effect, gap (of single groups, and of the
  mean over groups: "all") and the true effects of single masks on single other groups (cells);
- in parentheses the share that has an interval at all (12 pictures, 20 changed answers). Where only a few have, these
  are those in which chance changed the most answers, and they are not held against the method;
- bias: the largest of the errors' means (self, cross, gap; single groups and all), in its own standard errors;
- p: the share of studies with p <= 0.05 for self effect and gap of single groups, where there is none.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from scipy import stats as scipy_stats

import vlmneurons as vn
from vlmneurons.study.design import crossing
from vlmneurons.study.effects import estimates, question_effects
from vlmneurons.study.masks import Mask

EFFECTS = ("self", "cross", "gap")


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
            noise = scipy_stats.norm.ppf(u) if null else scipy_stats.gamma(2).ppf(1 - u) - 2  # skewed, but for the null
            change = np.where(self.own, truth[0] + 0.6 * noise, truth[1] + 0.2 * noise)
        change[~self.plans[random.integers(len(self.plans))]] = np.nan
        return change, *truth


def simulated(design: Design, value: str, studies: int, null: int, seed: int = 0) -> dict[str, tuple[float, float]]:
    """For each column of the table its number, and the share of studies that have it."""
    random = np.random.default_rng([seed, len(design.group)])
    held, given, errors = defaultdict(list), defaultdict(list), defaultdict(list)
    single = len(design.names)
    for _ in range(studies):
        change, own, other = design.draw(random, value, null=False)
        found = estimates(question_effects(change, design.names, design.groups), design.members, design.picture)
        low, high, few = found.bounds(0.95, value == "correct")
        for row, (name, truth) in enumerate(zip(EFFECTS, (own, other, own - other), strict=True)):
            for column, places in ((name, slice(single)), (f"{name} all", slice(single, None))):
                kept = ~few[row, places]
                inside = (low[row, places] <= truth) & (truth <= high[row, places])
                held[column].extend(inside[kept])
                given[column].extend(kept)
                errors[column].append((found.value[row, places] - truth).mean())
        cells = estimates(change, design.members, design.picture)
        low, high, few = (
            table[:, :-1][~np.eye(single, dtype=bool)] for table in cells.bounds(0.95, value == "correct")
        )
        kept = ~few & np.isfinite(low)
        held["cells"].extend(((low <= other) & (other <= high))[kept])
        given["cells"].extend(kept)
    table = {name: (float(np.mean(held[name])) if held[name] else np.nan, float(np.mean(given[name]))) for name in held}
    scores = [abs(np.mean(one)) / (np.std(one, ddof=1) / np.sqrt(len(one))) for one in errors.values()]
    found_p = []
    for study in range(null):
        change, *_ = design.draw(random, value, null=True)
        rows = question_effects(change, design.names, design.groups)[[0, 2]]
        found_p.append(estimates(rows, design.members, design.picture).pvalues(400, [study], places=range(2))[:, :2])
    table["bias"] = (float(max(scores)), 1.0)
    table["p"] = (float((np.array(found_p) <= 0.05).mean()) if found_p else np.nan, 1.0)
    return table


COLUMNS = [*EFFECTS, *(f"{name} all" for name in EFFECTS), "cells", "bias", "p"]


def rows(groups: int, studies: int, null: int) -> Iterator[str]:
    """The table in Markdown, row by row."""
    yield "| value | others | questions | pictures | " + " | ".join(COLUMNS) + " |"
    yield "|" + "---|" * (4 + len(COLUMNS))
    for value in ("correct", "margin"):
        for others in (None, 2):
            for questions in ("1", "2", "4", "1–7"):
                for pictures in (12, 33, 100):
                    found = simulated(Design(groups, pictures, questions, others), value, studies, null)
                    cells = []
                    for name in COLUMNS:
                        number, share = found[name]
                        text = "–" if np.isnan(number) else f"{number:.1f}" if name == "bias" else f"{number:.3f}"
                        cells.append(text + (f" ({share:.2f})" if 0 < share < 0.995 else ""))
                    head = f"| {value} | {others or 'all'} | {questions} | {pictures} | "
                    yield head + re.sub(r"(?<!\d)0\.", ".", " | ".join(cells)) + " |"


def main() -> None:
    """Command line: see the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--studies", type=int, default=600, help="simulated studies a row")
    parser.add_argument("--null", type=int, default=300, help="simulated studies without effects a row")
    parser.add_argument("--groups", type=int, default=8, help="groups of a study")
    given = parser.parse_args()
    for row in rows(given.groups, given.studies, given.null):
        print(row, flush=True)


if __name__ == "__main__":
    main()
