"""Which questions meet which masks: all of them, or an incomplete crossing that costs a fraction of it.

Each question is asked clean, under its own group's mask, and under *k* others instead of all. What is drawn are
*units*, the questions of one group about one picture, so that questions that share a picture share its masks too. k
masks of others answer self effect, cross effect and gap; whose mask harms whom needs all of them, or many pictures.

For each group, units are sorted by (number of questions, hash of the seed and their ids) and dealt k masks each from
shuffled decks of the other groups; a mask that a unit has already goes back for the next unit. So each mask meets each
unit with probability k / others exactly, and two cells of a group differ by one or two units.

The plan is over names of groups: it is the same for all selectors of the same groups and for their repeats, and comes
from the whole set of questions, whatever their order, before anything is split, skipped or gone on with.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmneurons.checks import as_whole
from vlmneurons.errors import MismatchError
from vlmneurons.questions.question import hash_of
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.study.effects import NO_GROUP
from vlmneurons.study.masks import Mask


@dataclass(frozen=True, eq=False)
class Design:
    """Which questions meet which masks.

    Attributes:
        meets: ``[mask, question]`` whether a question is asked under a mask.
        others: masks of other groups that each question meets; None for all.
        seed: of the draw.
        digest: what identifies the plan, whatever the order of questions and masks; ``"full"`` for a full crossing.
    """

    meets: np.ndarray
    others: int | None
    seed: int
    digest: str


def crossing(
    questions: QuestionSet,
    masks: Sequence[Mask],
    *,
    others: int | None = None,
    seed: int = 0,
    controls: Sequence[str] = (),
) -> Design:
    """Which questions meet which masks, drawn as the head of this module says.

    A set that is of no group meets every question. Selections of other groups than the questions', and control
    questions, meet k of their masks; a selection with fewer masks than that meets all.

    Args:
        questions: all questions of the study, those of the control groups included.
        masks: all masks, in the order of the table.
        others: masks of other groups that each question meets; None for all of them.
        seed: of the draw.
        controls: control groups, for which a group of questions that a mask never meets is no loss.

    Raises:
        MismatchError: more others than there are; a mask that no question of a group would meet, for want of pictures.
    """
    if others is None:
        return Design(np.ones((len(masks), len(questions)), dtype=bool), None, int(seed), "full")
    others, seed = as_whole("others", others, MismatchError, least=1), as_whole("seed", seed, MismatchError, least=0)
    decks = _decks(masks)
    own_groups = sorted(set(questions.groups) - set(controls))
    most = max((len(set(deck) - {group}) for deck in decks.values() for group in own_groups), default=0)
    if others > most:
        raise MismatchError(
            f"others={others}, but a question has at most {most} masks of other groups; give as many or fewer, or "
            "others=None for all of them"
        )
    units = _units(questions)
    for group in own_groups:
        for deck in sorted(set(decks.values())):
            n_others, n_units = len(set(deck) - {group}), len(units[group])
            if others < n_others and n_units * others < n_others:
                raise MismatchError(
                    f"others={others} masks for each of the {n_units} pictures of {group!r} reach {n_units * others} "
                    f"of its {n_others} other masks, and the rest would meet no question of it: give "
                    f"others={-(-n_others // n_units)} or more, at least {-(-n_others // others)} pictures, or leave "
                    "the group out"
                )
    place = {item.id: number for number, item in enumerate(questions)}
    meets = np.zeros((len(masks), len(questions)), dtype=bool)
    plan: dict[str, dict[str, list[str]]] = {}
    for deck in sorted(set(decks.values())):
        rows: dict[str, list[int]] = {}
        for row, mask in enumerate(masks):
            if mask.group != NO_GROUP and decks[mask.selector] == deck:
                rows.setdefault(mask.group, []).append(row)
        for group, of_group in units.items():
            hands = _dealt(of_group, [name for name in deck if name != group], others, f"{seed} {group} {deck}")
            for unit, hand in zip(of_group, hands, strict=True):
                met = [*hand, group] if group in deck else hand
                own = [place[name] for name in unit]
                for name in met:
                    meets[np.ix_(rows[name], own)] = True
                plan.setdefault("\t".join(deck), {}).update(dict.fromkeys(unit, sorted(met)))
    meets[[row for row, mask in enumerate(masks) if mask.group == NO_GROUP]] = True
    text = json.dumps(plan, sort_keys=True)
    return Design(meets, others, seed, hashlib.sha256(text.encode()).hexdigest()[:16])


def _decks(masks: Sequence[Mask]) -> dict[str, tuple[str, ...]]:
    """For each selector the groups that it has masks of, sorted: selectors with equal ones share a plan."""
    found: dict[str, set[str]] = {}
    for mask in masks:
        if mask.group != NO_GROUP:
            found.setdefault(mask.selector, set()).add(mask.group)
    return {selector: tuple(sorted(groups)) for selector, groups in found.items()}


def _units(questions: QuestionSet) -> dict[str, list[tuple[str, ...]]]:
    """For each group, sorted, the ids of each unit: its questions about one picture, directly or through others."""
    found = {}
    for group in sorted(questions.groups):
        own = questions.filter(group=group)
        units: dict[str, list[str]] = {}
        for item, name in zip(own, own.pictures(), strict=True):
            units.setdefault(name, []).append(item.id)
        found[group] = [tuple(sorted(ids)) for ids in units.values()]
    return found


def _dealt(units: list[tuple[str, ...]], deck: Sequence[str], k: int, seed: str) -> list[list[str]]:
    """The hand of each unit, in the order of the units: k different masks, or all where there are no more."""
    if k >= len(deck):
        return [list(deck) for _ in units]
    hands: dict[tuple[str, ...], list[str]] = {}
    stack: list[str] = []
    shuffles = 0
    for unit in sorted(units, key=lambda ids: (len(ids), hash_of(seed, *ids))):
        hand: list[str] = []
        back: list[str] = []
        while len(hand) < k:
            if not stack:
                # By hashes, so that every machine and version shuffles alike.
                stack = sorted(deck, key=lambda name: hash_of(seed, "deck", shuffles, name))
                shuffles += 1
            card = stack.pop(0)
            (back if card in hand else hand).append(card)
        hands[unit] = hand
        stack = back + stack
    return [hands[unit] for unit in units]
