"""How often do p-values of `vlmneurons.null_distribution` lie at or below 0.05 where there is nothing to find?

Run: ``python benchmarks/null_calibration.py`` (minutes on one core). Each simulated study has pictures that are dealt
to groups at random, questions about them, and counts of neurons that hang on the picture and the question, never on the
group. So every p at or below 0.05 is a false one, and a share of 0.05 of them is right. The pool is the questions that
were answered right, as in a real study. With 99 shuffles a p is at most 0.05 with probability 0.05 exactly.

The shuffles are the library's. The strengths of all of them are computed at once, with NumPy; for the first studies of
each row they are compared with those of `vlmneurons.null_distribution`, whose p must be the same.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.selectors import CAS, LAP, MAD, Selector
from vlmneurons.statistics.items import Item, ItemStatistics
from vlmneurons.trust.nulls import null_distribution
from vlmneurons.trust.stability import stability
from vlmneurons.trust.units import Units, units_to_draw

GROUPS, NEURONS, BUDGET, SHUFFLES = "ABCD", 80, 8, 99
SELECTORS: dict[str, Selector] = {"CAS": CAS(count=BUDGET), "MAD": MAD(count=BUDGET), "LAP": LAP(count=BUDGET)}


@dataclass
class Design:
    """Which questions there are: for each its group and its pictures."""

    groups: list[str]
    pictures: list[tuple[int, ...]]
    balanced: bool = False


def dealt(rng: np.random.Generator, pictures: int) -> list[str]:
    """A group for every picture, as many of each, at random."""
    return [GROUPS[n] for n in rng.permutation(np.arange(pictures) % len(GROUPS))]


def alone(rng: np.random.Generator, sizes: Callable[[str], int], pictures: int = 80, balanced: bool = False) -> Design:
    """Every picture of one group, with as many questions as its group gives it."""
    design = Design([], [], balanced)
    for picture, group in enumerate(dealt(rng, pictures)):
        n = sizes(group)
        design.groups += [group] * n
        design.pictures += [(picture,)] * n
    return design


def thin(rng: np.random.Generator) -> Design:
    """Groups of 50, 30, 15 and 5 pictures, four questions each."""
    owner = rng.permutation(list("A" * 50 + "B" * 30 + "C" * 15 + "D" * 5))
    return Design(np.repeat(owner, 4).tolist(), [(int(picture),) for picture in np.repeat(np.arange(100), 4)])


def shared(rng: np.random.Generator, share: float, least: int, most: int) -> Design:
    """A share of the pictures belongs to several groups: each of their questions has a group of its own."""
    design = Design([], [])
    for picture, group in enumerate(dealt(rng, 60)):
        n = 4
        if rng.random() < share:
            several = rng.permutation(list(GROUPS))[: rng.integers(least, most + 1)].tolist()
            design.groups += [several[k % len(several)] for k in range(n)]
        else:
            design.groups += [group] * n
        design.pictures += [(picture,)] * n
    return design


def pairs(rng: np.random.Generator) -> Design:
    """Questions that show two pictures: of three pictures each, the three pairs, and one question about the first."""
    design = Design([], [])
    for number, group in enumerate(dealt(rng, 60)):
        a, b, c = 3 * number, 3 * number + 1, 3 * number + 2
        design.groups += [group] * 4
        design.pictures += [(a, b), (b, c), (c, a), (a,)]
    return design


DESIGNS: dict[str, Callable[[np.random.Generator], Design]] = {
    "1 question a picture": lambda rng: alone(rng, lambda group: 1, 120),
    "4 questions a picture": lambda rng: alone(rng, lambda group: 4),
    "10 questions a picture": lambda rng: alone(rng, lambda group: 10),
    "10, 4 or 1 a picture, in all groups": lambda rng: alone(rng, lambda group: int(rng.choice([10, 4, 1])), 120),
    "10, 4, 1, 1 a picture by group, balanced": lambda rng: alone(
        rng, lambda group: {"A": 10, "B": 4}.get(group, 1), 120, balanced=True
    ),
    "5, 4, 4, 3 a picture by group": lambda rng: alone(rng, lambda group: {"A": 5, "D": 3}.get(group, 4), 120),
    "groups of 50, 30, 15, 5 pictures": thin,
    "every picture of all four groups": lambda rng: shared(rng, 1.0, 4, 4),
    "every picture of two or three groups": lambda rng: shared(rng, 1.0, 2, 3),
    "half of the pictures of several groups": lambda rng: shared(rng, 0.5, 2, 4),
    "two pictures a question": pairs,
}


def simulated(design: Design, rng: np.random.Generator, folder: Path) -> ItemStatistics:
    """A recording of counts in which a question hangs together with its pictures, and not with its group."""
    n = len(design.groups)
    shown = np.zeros((n, 1 + max(max(own) for own in design.pictures)))
    for row, own in enumerate(design.pictures):
        shown[row, list(own)] = 1 / len(own)
    effect = rng.normal(0, 0.7, (shown.shape[1], NEURONS))
    logit = rng.normal(-1, 1, NEURONS) + shown @ effect + rng.normal(0, 0.3, (n, NEURONS))
    tokens = rng.integers(40, 80, n)
    counts = rng.binomial(tokens[:, None], 1 / (1 + np.exp(-logit)))
    # Some pictures are harder than others, and harder where a neuron fires more.
    ease = 1.0 + 0.7 * (shown @ (rng.normal(0, 1, shown.shape[1]) + effect[:, 0]))
    wrong = rng.random(n) > 1 / (1 + np.exp(-ease))
    items = [
        Item(f"q{row}", group, 0, {}, tuple(f"p{one}" for one in own))
        for row, (group, own) in enumerate(zip(design.groups, design.pictures, strict=True))
    ]
    space = NeuronSpace.from_widths("language", "gate", [NEURONS // 2] * 2)
    made = ItemStatistics.create(folder, space, items, {}, ["positive"])
    made.write(range(n), wrong.astype(int).tolist(), tokens, np.zeros(n), {"positive": counts})
    return made


def studies(name: str, number: int, seed: int = 0) -> Iterator[tuple[ItemStatistics, bool, int]]:
    """Simulated studies of a design: their recordings, whether groups are cut to one size, and a seed."""
    for study in range(number):
        rng = np.random.default_rng([seed, list(DESIGNS).index(name), study])
        with tempfile.TemporaryDirectory() as folder:
            design = DESIGNS[name](rng)
            yield simulated(design, rng, Path(folder) / "items"), design.balanced, int(rng.integers(2**31))


def strengths(counts: np.ndarray, tokens: np.ndarray, owners: np.ndarray) -> dict[str, np.ndarray]:
    """For each selector ``[draw, group]`` mean scores of the selected neurons, where questions have these groups."""
    member = (owners[:, None] == np.arange(len(GROUPS))[:, None]).astype(np.float32)  # [draw, group, question]
    rate = (member @ counts.astype(np.float32)).astype(float) / (member @ tokens.astype(np.float32))[..., None]
    ordered = np.sort(rate, 1)
    leads = rate == ordered[:, -1:]
    margin = np.where(leads, (ordered[:, -1] - ordered[:, -2])[:, None], np.nan)
    scores = {
        "CAS": np.where(margin > 0, margin, np.nan),
        "MAD": np.abs(rate - rate.mean(1, keepdims=True)),
        "LAP": rate,
    }
    # NaN is last in the order of NumPy, so that of the negative scores the lowest come first.
    return {name: -np.nanmean(np.sort(-table, 2)[..., :BUDGET], 2) for name, table in scores.items()}


def false_ones(units: Units, seed: int) -> dict[str, np.ndarray]:
    """For each selector ``[group]`` whether p is at most 0.05."""
    items = units.pool.recording
    counts = np.fromfile(items.folder / "positive.bin", dtype="<u2").reshape(len(items), -1)[units.pool.rows]
    owners = units.shuffled(SHUFFLES, np.random.default_rng(seed))
    every = strengths(counts, items.tokens.numpy()[units.pool.rows], np.concatenate([units.pool.owner[None], owners]))
    found = {}
    for name, table in every.items():
        found[name] = (1 + (table[1:] >= table[0] - 1e-12).sum(0)) / (1 + SHUFFLES) <= 0.05
    return found


def false_shares(name: str, number: int, checked: int = 2) -> dict[str, float]:
    """For each selector the share of groups, over all studies, whose p is at most 0.05, and what stands beside it.

    Args:
        name: of the design.
        number: of studies.
        checked: of how many of them the library's own p must be the same.
    """
    found: dict[str, list[float]] = {}
    for study, (items, balanced, seed) in enumerate(studies(name, number)):
        units = units_to_draw(items, balanced=balanced, seed=seed)
        ours = {**false_ones(units, seed), "movable": units.movable[0]}
        ours["by question"] = false_ones(Units.of(units.pool, "question"), seed)["MAD"]
        for label, values in ours.items():
            found.setdefault(label, []).extend(values.tolist())
        for label, selector in SELECTORS.items() if study < checked else ():
            table = null_distribution(items, selector, balanced=balanced, permutations=SHUFFLES, seed=seed)
            assert (table["p"] <= 0.05).tolist() == ours[label].tolist(), f"{name}, {label}: another p than the library"
    return {label: float(np.mean(values)) for label, values in found.items()}


def overlaps(name: str, number: int) -> tuple[float, float, float]:
    """Of LAP's halves the mean overlap within a group, between groups, and by chance."""
    rows = []
    for items, balanced, seed in studies(name, number):
        table = stability(items, SELECTORS["LAP"], balanced=balanced, method="halves", resamples=4, seed=seed)
        rows.append(table.set_index("group").loc["all", ["jaccard", "between_groups", "chance"]].astype(float))
    within, between, chance = np.mean(rows, 0)
    return float(within), float(between), float(chance)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=400)
    parser.add_argument("--halved", type=int, default=40, help="studies of the overlap of halves")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    print(f"{options.studies} studies a row, 4 groups, {NEURONS} neurons, {BUDGET} a group, {SHUFFLES} shuffles")
    print("share of p <= 0.05 where nothing is to be found (0.05 is right); overlap of the halves of LAP")
    print(f"{'':42}{'CAS':>6}{'MAD':>6}{'LAP':>6}  movable  by question  within  between  chance")
    for name in DESIGNS:
        ours = false_shares(name, options.studies)
        within, between, chance = overlaps(name, options.halved)
        shares = "".join(f"{ours[selector]:6.3f}" for selector in SELECTORS)
        beside = f"{ours['movable']:9.2f}{ours['by question']:13.2f}"
        print(f"{name:42}{shares}{beside}{within:8.2f}{between:9.2f}{chance:8.2f}", flush=True)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
