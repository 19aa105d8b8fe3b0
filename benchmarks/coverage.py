"""Do intervals hold the truth as often as they say, and tests find nothing where there is nothing? By simulation.

    python benchmarks/coverage.py [--studies 600] [--null 1000] [--groups 8] [--only margin 2 1 12]
    python benchmarks/coverage.py --skewness

Studies are drawn whose true effects are known: groups of pictures with some questions each, answered clean and under
every mask, or under the masks that `vlmneurons.study.design.crossing` deals. Questions about one picture, and answers
under two masks, depend on each other. A row of the table is a design; its columns are

- the share of studies whose 95 % interval holds the true self effect, cross effect, gap (of single groups, and of the
  mean over groups: "all") and the true effects of single masks on single other groups (cells), in designs that have 12
  units and, for right and wrong, 20 changed answers on average; "–" in others;
- in parentheses, where chance decides whether twenty answers changed, the share of studies that have an interval, and
  how many of these hold the truth: how many answers changed tells how large an effect looks;
- ``*`` where the first number is outside .93–.97 by more than two of its simulation errors, which are over studies;
- bias: the largest of the errors' means (self, cross, gap; single groups and all: six), in its own standard errors;
- p: the share of studies with p <= 0.05 for self effect and gap of single groups, where there is none.

The self effects on margins are skewed by 1.2, cross effects as well, which is as much as on the margins of the demo's
organism, whose neurons were made necessary; "margin 1.4" is a row that is skewed more, and not held to .93. With
``--skewness`` it is measured: of units' mean changes of margin, on both halves of the demo's questions.
"""

import argparse
import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from scipy import special
from scipy import stats as scipy_stats

import vlmneurons as vn
from vlmneurons.study.design import crossing
from vlmneurons.study.effects import LEAST_CHANGED, Estimates, estimates, question_effects
from vlmneurons.study.masks import Mask
from vlmneurons.study.tables import values_by_mask

EFFECTS = ("self", "cross", "gap")
LEAST, MOST = 0.93, 0.97
"""Coverage that is right for 95 % intervals."""
SKEWNESS = 1.2
"""Of changes of margins, unless a value says another one (``"margin 1.4"``)."""
_GRID = np.linspace(0, 40, 400_001)


@functools.cache
def _gamma(skewness: float) -> np.ndarray:
    """The distribution of a gamma variable of a skewness, to invert by interpolation: SciPy's inverse is slow."""
    return special.gammainc(4 / skewness**2, _GRID)


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
            skewness = float(value.removeprefix("margin") or SKEWNESS)
            noise = special.ndtri(u)  # skewed, but for the null
            if not null:
                noise = (np.interp(1 - u, _gamma(skewness), _GRID) - 4 / skewness**2) * skewness / 2
            change = np.where(self.own, truth[0] + 0.85 * noise, truth[1] + 0.28 * noise)
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


class Column(NamedTuple):
    """What a column of the table says.

    Attributes:
        number: coverage where the design has 12 units and 20 changed answers; NaN in others. Or bias, or p.
        share: of studies that have an interval.
        error: of the number, over studies.
        shown: the coverage of those that have one.
    """

    number: float
    share: float = 1.0
    error: float = 1.0
    shown: float = np.nan


def simulated(design: Design, value: str, studies: int, null: int, seed: int = 0) -> dict[str, Column]:
    """The columns of the table."""
    random = np.random.default_rng([seed, len(design.group)])
    held, errors = defaultdict(list), defaultdict(list)
    single = len(design.names)
    for _ in range(studies):
        change, own, other = design.draw(random, value, null=False)
        found = estimates(question_effects(change, design.names, design.groups), design.members, design.picture)
        truths = np.array([[own], [other], [own - other]])
        inside = _inside(found, truths, value)
        for row, name in enumerate(EFFECTS):
            for column, places in ((name, slice(single)), (f"{name} all", slice(single, None))):
                held[column].append([table[row, places].sum() for table in inside])
                errors[column].append((found.value - truths)[row, places].mean())
        cells = estimates(change, design.members, design.picture)
        others = np.pad(~np.eye(single, dtype=bool), ((0, 0), (0, 1)))
        held["cells"].append([table[others].sum() for table in _inside(cells, other, value)])
    table = {name: _column(np.array(rows, dtype=float)) for name, rows in held.items()}
    scores = [abs(np.mean(one)) / (np.std(one, ddof=1) / np.sqrt(len(one))) for one in errors.values()]
    table["bias"] = Column(float(max(scores)))
    small = (null_p(design, value, null, seed) <= 0.05).reshape(null, -1).mean(1) if null else np.full(2, np.nan)
    table["p"] = Column(float(small.mean()), error=float(small.std(ddof=1) / np.sqrt(len(small))))
    return table


def _inside(found: Estimates, truth: np.ndarray | float, value: str) -> tuple[np.ndarray, ...]:
    """Of each estimate: whether it has 12 units, its interval then holds, it is shown, holds then; what has changed."""
    low, high, _ = found.bounds(0.95, "margin")  # as if no answers needed to change
    few = found.bounds(0.95, value.split()[0])[2]
    there, hold = np.isfinite(low), (low <= truth) & (truth <= high)
    changed = np.where(there, found.changed if value == "correct" else LEAST_CHANGED, 0)
    return there, hold, ~few & there, hold & ~few, changed, found.n > 0


def _column(of_study: np.ndarray) -> Column:
    """A column of ``[study, what _inside says, summed]``."""
    there, _, shown, held, changed, known = of_study.sum(0)
    share = shown / known if known else 0.0
    of_shown = held / shown if shown else np.nan
    if not there or changed < LEAST_CHANGED * there or there < known / 2:
        return Column(np.nan, share, np.nan, of_shown)
    number, error = _share(of_study[:, [1, 0]])
    return Column(number, share, error, of_shown)


def _share(of_study: np.ndarray) -> tuple[float, float]:
    """The share of all studies' intervals that hold, of ``[study, (hold, there are)]``, and its error by study."""
    hold, there = of_study.T
    share = hold.sum() / there.sum()
    error = np.sqrt(((hold - share * there) ** 2).sum()) / there.sum()
    return float(share), float(max(error, np.sqrt(0.05 * 0.95 / there.sum())))


def outside(found: Mapping[str, Column], errors: float = 2) -> dict[str, Column]:
    """The columns whose coverage is not right, by more than some simulation errors."""
    judged = {name: found[name] for name in (*EFFECTS, *(f"{name} all" for name in EFFECTS), "cells")}
    return {
        name: one
        for name, one in judged.items()
        if not np.isnan(one.number) and not LEAST - errors * one.error <= one.number <= MOST + errors * one.error
    }


COLUMNS = [*EFFECTS, *(f"{name} all" for name in EFFECTS), "cells", "bias", "p"]


DESIGNS = [
    *itertools.product(("correct", "margin"), (None, 2), ("1", "2", "4", "1–7"), (12, 33, 100)),
    ("margin 1.4", None, "1", 12),
    ("margin 1.4", 2, "1", 12),
]
"""Value, others, questions a picture, pictures of a group."""
HEAD = ["| value | others | questions | pictures | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (4 + len(COLUMNS))]


def row(value: str, others: int | None, questions: str, pictures: int, found: Mapping[str, Column]) -> str:
    """A row of the table in Markdown."""
    wrong = outside(found)
    cells = []
    for name in COLUMNS:
        number, share, _, shown = found[name]
        text = "–" if np.isnan(number) else f"{number:.1f}" if name == "bias" else f"{number:.3f}"
        chance = f" ({share:.2f}: {shown:.3f})" if 0.005 <= share < 0.995 else ""
        cells.append(text + "*" * (name in wrong) + chance)
    head = f"| {value} | {others or 'all'} | {questions} | {pictures} | "
    return head + re.sub(r"(?<!\d)0\.", ".", " | ".join(cells)) + " |"


def skewness(model: vn.VLM, questions: vn.QuestionSet) -> Iterator[str]:
    """How skewed the units' mean changes of margin are, for each selector and effect, and how often t would hold.

    Third cumulants and variances are estimated without bias in each group (k-statistics), and are means over groups.
    Coverage is that of t intervals of 12 of the units, drawn with replacement from those of all groups, each less its
    group's mean and by its group's deviation.
    """
    halves, random = questions.split(0.5, seed=0), np.random.default_rng(0)
    of = defaultdict(list)
    for first, second in (halves, halves[::-1]):
        stats = vn.record(model, first, batch_size=64, progress=False)
        masks = {rule.__name__: rule(0.02).select(stats) for rule in (vn.CAS, vn.MAD, vn.LAP)}
        result = vn.knockout(model, second, masks, batch_size=64, progress=False)
        for name in masks:
            names, change = values_by_mask(result.margins - result.margins[0], result, name)
            for effect, values in zip(EFFECTS, question_effects(change, names, result.groups), strict=True):
                for group in result.group_names:
                    units = defaultdict(list)
                    for value, own, picture in zip(values, result.groups, result.pictures or (), strict=True):
                        if own == group:
                            units[picture].append(value)
                    of[name, effect, "all"].append(np.array([np.mean(one) for one in units.values()]))
                    of[name, effect, "one"].append(np.array([one[0] for one in units.values()]))
    for (name, effect, kept), groups in of.items():
        third, second_ = (np.array([scipy_stats.kstat(one, n) for one in groups]) for n in (3, 2))
        drawn = np.concatenate([(one - one.mean()) / one.std(ddof=1) for one in groups])
        means = random.choice(drawn, (20_000, 12))
        reach = scipy_stats.t.ppf(0.975, 11) * means.std(1, ddof=1) / np.sqrt(12)
        held = np.mean(np.abs(means.mean(1) - drawn.mean()) <= reach)
        yield (
            f"{name:<5}{effect:<6}{kept:<5}{sum(map(len, groups)):>5} units, skewness "
            f"{third.mean() / (second_**1.5).mean():>5.2f}, coverage of t at 12 {held:.3f}"
        )


def main() -> None:
    """Command line: see the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--studies", type=int, default=600, help="simulated studies a row")
    parser.add_argument("--null", type=int, default=1000, help="simulated studies without effects a row")
    parser.add_argument("--groups", type=int, default=8, help="groups of a study")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], help="value, others, questions, pictures; _ for any")
    parser.add_argument("--skewness", action="store_true", help="measure it on the demo's models instead")
    given = parser.parse_args()
    if given.skewness:
        for name in ("natural", "organism"):
            print(name, "(questions of a picture: all, or one)")
            print("\n".join(skewness(*vn.load_demo(name))), flush=True)
        return
    print("\n".join(HEAD), flush=True)
    biases = []
    for value, others, questions, pictures in DESIGNS:
        head = [value, str(others or "all"), questions, str(pictures)]
        if given.only and any(wanted != "_" and wanted != one for wanted, one in zip(given.only, head, strict=False)):
            continue
        found = simulated(
            Design(given.groups, pictures, questions, others), value, given.studies, given.null, given.seed
        )
        print(row(value, others, questions, pictures, found), flush=True)
        biases.append(found["bias"].number)
    print(f"largest bias: {max(biases):.1f} standard errors, of {6 * len(biases)}")


if __name__ == "__main__":
    main()
