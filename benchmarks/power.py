"""Does `difference` find what `detectable` says it will, and nothing else? By simulation.

    python benchmarks/power.py [--studies 100]

Two selectors are compared in studies of eight groups. In the first half of the groups the own mask of the first one
harms more than that of the second, by the effect that `detectable` says a power of 50, 80 or 95 % is had for (at alpha
0.05, one group); in the other half they harm alike. Changes of margins are normal; of right answers the second selector
loses 30 %. Questions about a picture depend on each other, and so do margins under two masks.

A row is a design; its columns are the power asked for, the planted effect (nats, or a share of answers), the share of
the planted differences that have p <= 0.05, with its standard error, and the same share of those differences of self
effects and of cross effects where nothing is planted: it should be 0.05, or less where few answers change. The last two
columns are the share of studies with any of these below 0.05 after Holm's correction over the groups: 0.05 at most.
"""

import argparse
from collections.abc import Iterator
from itertools import product

import numpy as np

import vlmneurons as vn
from vlmneurons.study.effects import detectable
from vlmneurons.study.masks import Mask
from vlmneurons.study.result import KnockoutResult

GROUPS, WITHIN, LOST = 8, 0.3, 0.3
DESIGNS = [
    ("margin", 15, 1, 0.5),
    ("margin", 30, 1, 0.0),
    ("margin", 30, 2, 0.5),
    ("margin", 60, 4, 0.5),
    ("correct", 60, 1, 0.0),
    ("correct", 120, 2, 0.0),
    ("correct", 30, 4, 0.0),
]
"""Value, pictures of each group, questions a picture, correlation between two masks."""


def planted(
    seed: int, effect: float, groups: int, pictures: int, questions: int, between: float, value: str = "margin"
) -> KnockoutResult:
    """Two selectors' answers to the same questions: in the first half of the groups the first does more harm.

    A question's change of margin has standard deviation 1 and correlates with its picture's others by 0.3, and between
    selectors. An answer is lost with a probability of 0.3, or more by the effect; answers do not depend on each other
    but for those of a picture.
    """
    random = np.random.default_rng(seed)
    n = groups * pictures * questions
    picture = np.repeat(np.arange(groups * pictures), questions)
    names = [f"g{number}" for number in range(groups)]
    group = np.repeat(np.arange(groups), pictures * questions)

    def noise() -> np.ndarray:
        return np.sqrt(WITHIN) * random.normal(size=groups * pictures)[picture] + np.sqrt(1 - WITHIN) * random.normal(
            size=n
        )

    def lost(share: np.ndarray) -> np.ndarray:
        alike = random.random(n) < WITHIN
        return np.where(alike, random.random(groups * pictures)[picture], random.random(n)) < share

    common = noise()
    masks = [Mask(selector, 0, name, 5) for selector in ("CAS", "MAD") for name in names]
    margins, chosen = [np.zeros(n)], [np.zeros(n, dtype=np.int64)]
    for mask in masks:
        own = group == names.index(mask.group)
        more = effect * (mask.selector == "CAS") * (group < groups // 2)
        small = np.where(own, 1.0, 0.3)  # others' masks do the same for both selectors
        margins.append(small * (np.sqrt(between) * common + np.sqrt(1 - between) * noise()) - np.where(own, more, 0))
        chosen.append(lost(np.where(own, LOST + more, 0.1)).astype(np.int64))
    if value == "correct":
        margins = [np.full(n, np.nan)] * len(margins)
    return KnockoutResult(
        tuple(f"q{number}" for number in range(n)),
        tuple(names[number] for number in group),
        np.zeros(n, dtype=np.int64),
        tuple(masks),
        np.stack(chosen) if value == "correct" else np.zeros((len(chosen), n), dtype=np.int64),
        np.stack(margins),
        pictures=tuple(map(str, picture)),
    )


def effect_of(value: str, pictures: int, questions: int, between: float, power: float) -> float:
    """The difference of self effects that `detectable` says is found with some power in one group."""
    spread = effect = 1.0 if value == "margin" else 0.0
    for _ in range(20 if value == "correct" else 1):  # what is lost more also varies more
        if value == "correct":
            share = LOST + effect
            spread = np.sqrt((share * (1 - share) + LOST * (1 - LOST)) / 2)
        table = detectable(
            pictures,
            questions=questions,
            groups=GROUPS,
            spread=spread,
            within=WITHIN if value == "margin" else WITHIN**2,  # both of two questions follow their picture
            between=between,
            power=power,
            value=value,
        )
        effect = float(table.set_index("effect").loc["difference", "one_group"])
    return effect


def found(
    value: str, pictures: int, questions: int, between: float, effect: float, studies: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Whether p <= 0.05, by study and group: of planted differences, of self and cross effects elsewhere, of any."""
    hits = []
    for number in range(studies):
        result = planted(seed + number, effect, GROUPS, pictures, questions, between, value)
        table = result.difference("CAS", "MAD", value=value, permutations=400)
        table = table[table["group"] != "all"].set_index("effect")
        low = table[["p", "p_holm"]] <= 0.05
        hits.append([low.loc[name].to_numpy().T for name in ("self_effect", "cross_effect")])
    (selves, selves_holm), (cross, cross_holm) = np.array(hits).transpose(1, 2, 0, 3)
    half = GROUPS // 2
    found = {"planted": selves[:, :half], "self": selves[:, half:], "cross": cross}
    return found | {"any self": selves_holm[:, half:].any(1), "any cross": cross_holm.any(1)}


def rows(studies: int) -> Iterator[str]:
    """The table in Markdown, row by row."""
    yield (
        "| value | pictures | questions | between | power | effect | found | error | "
        "self elsewhere | cross | any self | any cross |"
    )
    yield "|" + "---|" * 12
    for number, ((value, pictures, questions, between), power) in enumerate(product(DESIGNS, (0.5, 0.8, 0.95))):
        effect = effect_of(value, pictures, questions, between, power)
        one = found(value, pictures, questions, between, effect, studies, 10_000 * number)
        error = np.sqrt(power * (1 - power) / one["planted"].size)
        yield (
            f"| {value} | {pictures} | {questions} | {between:g} | {power:g} | {effect:.3f} | "
            f"{one['planted'].mean():.3f} | {error:.3f} | "
            + " | ".join(f"{one[name].mean():.3f}" for name in ("self", "cross", "any self", "any cross"))
            + " |"
        )


def main() -> None:
    """Command line: see the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--studies", type=int, default=100, help="simulated studies a row, of four planted differences")
    given = parser.parse_args()
    print(f"vlmneurons {vn.__version__}, {given.studies} studies a row")
    for row in rows(given.studies):
        print(row, flush=True)


if __name__ == "__main__":
    main()
