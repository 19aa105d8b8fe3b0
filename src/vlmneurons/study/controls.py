"""What a study is compared with, and what is varied in it: small functions that give masks or questions to `knockout`.

Those that give masks give them by name, so that they are put together with ``|``:

    chosen = {"CAS": CAS().select(stats)}
    masks = chosen | random_controls(stats, chosen) | fraction_sweep("CAS", CAS(), stats, [0.001, 0.01])

A name with a setting (``"CAS [r=0.01]"``) is found again by `KnockoutResult.curve`.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlmneurons.errors import SelectionError
from vlmneurons.neurons.sets import Selection
from vlmneurons.questions.sets import QuestionSet, hash_of
from vlmneurons.selectors import LayerMatchedRandom, RandomNeurons, Selector
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.items import Grouping, ItemStatistics
from vlmneurons.study.masks import Intervention, setting_name

# -- questions ---------------------------------------------------------------------------------------------------------


_NOTHING: Mapping[str, Any] = {"image": None, "audio": None, "video": None}


def blind(questions: QuestionSet) -> QuestionSet:
    """The same questions without their pictures, sounds and videos: what can be answered without looking.

    Questions keep their ids, and so the order in which their options are shown.

    Args:
        questions: any questions.
    """
    return questions.with_items(
        replace(item, image=None, audio=None, video=None, image_id=item.image_id or item.id) for item in questions
    )


def options_only(questions: QuestionSet) -> QuestionSet:
    """The options alone, without the question's text or picture: what the options give away by themselves.

    Args:
        questions: any questions.
    """
    return questions.with_items(
        replace(item, **_NOTHING, question="", image_id=item.image_id or item.id) for item in questions
    )


# -- identification ----------------------------------------------------------------------------------------------------


def balanced_statistics(
    items: ItemStatistics,
    size: int | None = None,
    *,
    by: Grouping = "group",
    condition: str = "correct",
    seed: int = 0,
) -> ActivationStatistics:
    """Statistics of the same number of questions of every group, chosen by a seeded hash of their ids.

    Identification pools of one size keep a group's score from depending on how many of its questions the model answers
    (arXiv 2601.03115). The questions of a smaller size are among those of a larger.

    Args:
        items: counts of every question.
        size: questions a group; by default as many as the smallest group has that meet the condition.
        by: the grouping; see `ItemStatistics.group_by`.
        condition: which questions enter: ``"correct"``, ``"wrong"`` or ``"all"``.
        seed: of the choice.

    Raises:
        SelectionError: a group has fewer; the message names the thin groups.
    """
    labels = items.labels(by)
    kept = items.kept(condition).tolist()
    pools: dict[str, list[int]] = {label: [] for label in sorted({label for label in labels if label is not None})}
    for row, (label, meets) in enumerate(zip(labels, kept, strict=True)):
        if label is not None and meets:
            pools[label].append(row)
    size = min((len(pool) for pool in pools.values()), default=0) if size is None else size
    thin = [f"{group} ({len(pool)})" for group, pool in pools.items() if len(pool) < max(size, 1)]
    if thin:
        raise SelectionError(
            f"{max(size, 1)} questions a group with condition {condition!r} are needed; fewer are in {', '.join(thin)}"
        )
    chosen = {
        row
        for pool in pools.values()
        for row in sorted(pool, key=lambda row: hash_of(seed, items.items[row].id))[:size]
    }
    drawn = [label if row in chosen else None for row, label in enumerate(labels)]
    return items.group_by(drawn, condition=condition)


# -- masks -------------------------------------------------------------------------------------------------------------


def random_controls(
    stats: ActivationStatistics, like: Mapping[str, Selection], *, repeats: int = 5, seed: int = 0
) -> dict[str, list[Selection]]:
    """Random neurons of the same number: uniform ones, and for each selection ones that match it layer by layer.

    Uniform neurons are spread over layers that a selection may not touch, and flatter it (arXiv 2406.14144); the
    layer-matched ones are the fairer control. The neurons of the selection itself are left out of neither.

    Args:
        stats: the statistics that the selections were made from.
        like: selections by name; their sizes must be equal for the uniform control, which takes the largest.
        repeats: seeds of each control.
        seed: the first of them.

    Returns:
        ``"random"`` and ``"layer-matched NAME"``, each a list of ``repeats`` selections.
    """
    size = max(len(neurons) for selection in like.values() for neurons in selection.values())
    seeds = range(seed, seed + repeats)
    controls = {"random": [RandomNeurons(count=size, seed=number).select(stats) for number in seeds]}
    for name, selection in like.items():
        controls[f"layer-matched {name}"] = [LayerMatchedRandom(selection, number).select(stats) for number in seeds]
    return controls


def with_fraction(selector: Selector, fraction: float) -> Selector:
    """The same rule with another budget.

    Args:
        selector: a rule, or a combination of rules.
        fraction: share of the neurons that each group gets, in (0, 1].
    """
    other = copy.copy(selector)
    other.fraction, other.count = fraction, None
    return other


def fraction_sweep(
    name: str, selector: Selector, stats: ActivationStatistics, fractions: Sequence[float]
) -> dict[str, Selection]:
    """Selections of different sizes, named ``"NAME [r=…]"``: how much must be switched off?

    Args:
        name: what the selections are called.
        selector: what selects; its own budget does not matter.
        stats: statistics that it reads.
        fractions: shares of the neurons, in (0, 1].
    """
    return {setting_name(name, "r", r): with_fraction(selector, r).select(stats) for r in fractions}


def strength_sweep(name: str, selection: Selection, alphas: Sequence[float]) -> dict[str, Intervention]:
    """One selection scaled by ``1 + alpha``, named ``"NAME [alpha=…]"``: from zero (-1) over none (0) to steering.

    Source: Zhao et al. 2026 (arXiv 2601.03115), who steer with alpha 0.5.

    Args:
        name: what the interventions are called.
        selection: the neurons of each group.
        alphas: -1 switches off, 0 changes nothing, 0.5 is half as much again.
    """
    return {
        setting_name(name, "alpha", alpha): Intervention(selection, mode="scale", factor=1 + alpha) for alpha in alphas
    }


def item_sweep(
    name: str,
    selector: Selector,
    items: ItemStatistics,
    sizes: Sequence[int],
    *,
    by: Grouping = "group",
    condition: str = "correct",
    seed: int = 0,
) -> dict[str, Selection]:
    """Selections from different numbers of identification questions a group, named ``"NAME [items=…]"``.

    Effects level off at about 50 (arXiv 2608.08772). Smaller samples lie within larger ones.

    Args:
        name: what the selections are called.
        selector: what selects.
        items: counts of every question.
        sizes: numbers of questions of each group.
        by: the grouping; see `ItemStatistics.labels`.
        condition: which questions enter.
        seed: of the samples.

    Raises:
        SelectionError: a group has fewer questions than a size.
    """
    return {
        setting_name(name, "items", size): selector.select(
            balanced_statistics(items, size, by=by, condition=condition, seed=seed)
        )
        for size in sizes
    }


def condition_masks(
    name: str,
    selector: Selector,
    items: ItemStatistics,
    conditions: Sequence[str] = ("all", "wrong"),
    *,
    by: Grouping = "group",
    seed: int = 0,
) -> dict[str, Selection]:
    """Selections from questions that meet other conditions than "correct", named ``"NAME (all)"``, ``"NAME (wrong)"``.

    A condition that some group has no question for is left out.

    Args:
        name: what the selections are called.
        selector: what selects.
        items: counts of every question.
        conditions: of ``"correct"``, ``"all"`` and ``"wrong"``.
        by: the grouping; see `ItemStatistics.labels`.
        seed: of the balanced samples.
    """
    masks = {}
    for condition in conditions:
        try:
            stats = balanced_statistics(items, by=by, condition=condition, seed=seed)
        except SelectionError:
            continue
        masks[f"{name} ({condition})"] = selector.select(stats)
    return masks
