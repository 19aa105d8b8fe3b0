"""What a study is compared with, and what is varied in it: small functions that give masks or questions to `knockout`.

Those that give masks give them by name, so that they are put together with ``|``:

    chosen = {"CAS": CAS().select(stats)}
    masks = chosen | random_controls(stats, chosen) | fraction_sweep("CAS", CAS(), stats, [0.001, 0.01])

A name with a setting (``"CAS [r=0.01]"``) is found again by `KnockoutResult.curve`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from vlmneurons.checks import as_whole, check_kind
from vlmneurons.errors import SelectionError
from vlmneurons.neurons.selection import Selection
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.run.intervention import Intervention
from vlmneurons.selectors import LayerMatchedRandom, RandomNeurons, Selector
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.items import Grouping, ItemStatistics
from vlmneurons.study.masks import setting_name

# -- questions ---------------------------------------------------------------------------------------------------------


_NOTHING: Mapping[str, None] = {"image": None, "audio": None, "video": None}


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


# -- masks -------------------------------------------------------------------------------------------------------------


def random_controls(
    stats: ActivationStatistics, like: Mapping[str, Selection], *, repeats: int = 5, seed: int = 0
) -> dict[str, list[Selection]]:
    """Random neurons of the same number: uniform ones, and for each selection ones that match it layer by layer.

    Uniform neurons are spread over layers that a selection may not touch, and flatter it (arXiv 2406.14144); the
    layer-matched ones are the fairer control. The neurons of the selection itself are left out of neither.

    Uniform sets are exchangeable over groups, whose layers and counts they know nothing of: one set a seed serves all
    groups, so that a question is asked once a seed whatever masks it meets (their self and cross effects are those of
    one set, and the gap is zero). Layer-matched sets stay each group's own.

    Args:
        stats: the statistics that the selections were made from.
        like: selections by name; their sizes must be equal for the uniform control, which takes the largest.
        repeats: seeds of each control.
        seed: the first of them.

    Returns:
        ``"random"`` and ``"layer-matched NAME"``, each a list of ``repeats`` selections.

    Raises:
        SelectionError: no selection by name, one that is called as a control is, or fewer than one repeat.
    """
    if isinstance(like, Selection) or not isinstance(like, Mapping) or not like:
        raise SelectionError('like is a dictionary of one selection or more by name, such as {"CAS": selection}')
    for name, selection in like.items():
        check_kind(f"like[{name!r}]", selection, Selection, SelectionError)
        if name == "random" or str(name).startswith("layer-matched "):
            raise SelectionError(f"a selection is called {name!r}, as its control would be: give it another name")
    size = max(len(neurons) for selection in like.values() for neurons in selection.values())
    seed = as_whole("seed", seed, SelectionError)
    seeds = range(seed, seed + as_whole("repeats", repeats, SelectionError, least=1))
    blank = torch.zeros((1, len(stats.space)), dtype=torch.int64)  # a uniform rule reads no counts
    nobody = ActivationStatistics.from_counts(stats.space, ["all"], blank, [1])
    uniform = [RandomNeurons(count=size, seed=number).select(nobody) for number in seeds]
    controls = {
        "random": [
            Selection(dict.fromkeys(stats.groups, one["all"]), selector=f"{one.selector}, one set for all", budget=size)
            for one in uniform
        ]
    }
    for name, selection in like.items():
        controls[f"layer-matched {name}"] = [LayerMatchedRandom(selection, number).select(stats) for number in seeds]
    return controls


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
    return {setting_name(name, "r", r): selector.take(r).select(stats) for r in fractions}


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
            items.group_by(by, condition=condition, balanced=size, seed=seed)
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
            stats = items.group_by(by, condition=condition, balanced=True, seed=seed)
        except SelectionError:
            continue
        masks[f"{name} ({condition})"] = selector.select(stats)
    return masks
