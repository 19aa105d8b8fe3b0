"""Would chance have given neurons as strong? The whole pipeline, run on shuffled labels."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

import numpy as np

from vlmneurons.checks import as_whole, check_kind
from vlmneurons.errors import SelectionError
from vlmneurons.selectors import Readable, Selector
from vlmneurons.statistics.items import GroupedItems, Grouping, ItemStatistics
from vlmneurons.trust.pvalues import benjamini_hochberg, holm
from vlmneurons.trust.resampling import check_selector, drawn_items
from vlmneurons.trust.units import AS_RECORDED, Units, units_of

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.05
"""What a p is usually held against."""

MOVABLE = 0.5
"""Least share of the pictures that a shuffle must be able to give to other groups."""

Measure = Callable[[GroupedItems, Selector], Mapping[str, float]]
"""The strength of each group's selection, from (grouped) questions and a selector; higher is stronger."""


def selection_strength(evidence: Readable, selector: Selector) -> dict[str, float]:
    """Mean score of each group's selected neurons: what `null_distribution` compares unless told otherwise.

    A group for which nothing is selected has ``-inf``, less than any selection.

    Args:
        evidence: statistics, or counts of single questions, that the selector reads.
        selector: what selects.
    """
    check_selector(selector)
    stats = selector.read(evidence)
    scores, selection = selector.score(stats), selector.select(stats)
    return {
        group: float(scores[row, selection[group].indices].mean()) if len(selection[group]) else -np.inf
        for row, group in enumerate(stats.groups)
    }


def null_distribution(
    items: ItemStatistics | GroupedItems,
    selector: Selector,
    *,
    by: Grouping = AS_RECORDED,
    condition: str = "correct",
    balanced: bool | int = False,
    minimum: int = 1,
    permutations: int | None = None,
    measure: Measure = selection_strength,
    seed: int = 0,
    unit: str = "picture",
) -> "pd.DataFrame":
    """Would shuffled labels have given neurons as strong? The whole pipeline is run on each shuffle.

    A best-of-many selection always finds something; only its strength under shuffled labels says what that is worth.
    Pictures are shuffled, each with all its questions, which are not independent: those of a single group among those
    that have equally many questions in the pool (a picture with more weighs more in its group's counts); a picture of
    several groups has the labels of its questions shuffled. The p-value of a group is ``(1 + shuffles at least as
    strong) / (1 + shuffles)``, exact under exchangeability of such pictures (Phipson & Smyth 2010), and never 0. The
    hypothesis is that *no* group differs: where one does, the shuffles of the others contain its questions too.

    Args:
        items: counts of every question.
        selector: what selects.
        by: the grouping; its labels are shuffled among the questions that meet the condition.
        condition: which questions enter.
        balanced: cut the pool, once, to the same number of questions of every group; see `ItemStatistics.grouped`.
        minimum: least number of questions of every group.
        permutations: how many shuffles; by default 200, or 40 a group where that is more. Of fewer than 20 a group no
            ``p_holm`` can be below 0.05: see ``p_holm_least``.
        measure: strength of each group's selection, higher is stronger; gets the (grouped) questions and the selector.
        seed: of the shuffles, and of the balanced pool.
        unit: ``"question"`` shuffles single questions, as if each had a picture of its own. Where they share pictures,
            almost every p is then small, whether there is anything to find or not.

    Returns:
        A row for each ``group`` with ``questions`` and ``pictures`` in the pool, ``movable`` (share of the pictures
        that a shuffle can give to other groups at once, of those that it could if all had equally many questions),
        ``strength``, ``null_mean``, ``null_high`` (95th percentile of the shuffles), ``p``, ``p_holm`` (Holm: any false
        finding), ``p_bh`` (Benjamini & Hochberg: share of false findings) and ``p_holm_least``, the least that
        ``p_holm`` could have been with so many shuffles and pictures: where it is above 0.05, no effect is strong
        enough. Nothing hangs on the order of the questions, nor on the groups' names.

    Raises:
        SelectionError: a single group, or one with fewer questions than ``minimum`` or fewer than two pictures (the
            message names it); fewer than half of the pictures can be given to other groups; so few pictures that no p
            can reach 0.05; a recording of an earlier release, which keeps no pictures; or a measure that leaves a group
            out, or is NaN.
    """
    import pandas as pd

    check_selector(selector)
    permutations = None if permutations is None else as_whole("permutations", permutations, SelectionError, least=1)
    check_kind("measure", measure, cast(type, Callable), SelectionError, "a function")
    units = units_of(items, by, condition, balanced, max(1, as_whole("minimum", minimum, SelectionError)), seed, unit)
    _check_shuffles(units)
    pool, n_groups = units.pool, len(units.pool.groups)
    permutations = max(200, 40 * n_groups) if permutations is None else permutations
    owners = units.shuffled(permutations, np.random.default_rng(seed))
    strength = _measured(measure, pool, selector)
    null = np.stack([_measured(measure, shuffle, selector) for shuffle in drawn_items(pool, owners)])
    # Strengths that are equal on paper may differ by rounding: count them as equal.
    p = (1 + (null >= strength - 1e-12 * np.abs(np.where(np.isinf(strength), 1, strength))).sum(0)) / (1 + permutations)
    least = np.maximum(1 / (1 + permutations), [1 / many for many in units.arrangements])
    return pd.DataFrame(
        {
            "group": pool.groups,
            "questions": pool.items.numpy(),
            "pictures": units.pictures,
            "movable": units.movable[0],
            "strength": strength,
            "null_mean": null.mean(0),
            "null_high": np.percentile(null, 95, axis=0, method="higher"),
            "p": p,
            "p_holm": holm(p.tolist()),
            "p_bh": benjamini_hochberg(p.tolist()),
            "p_holm_least": np.minimum(1.0, n_groups * least),
        }
    )


def _check_shuffles(units: Units) -> None:
    """Make sure that shuffled labels say something: there are groups, and pictures that they can exchange.

    Args:
        units: the questions, and which of them share pictures.

    Raises:
        SelectionError: they say nothing; the message says why.
    """
    groups = units.pool.groups
    if len(groups) < 2:
        raise SelectionError(f"labels of one group cannot be shuffled; got only {', '.join(groups)}")
    units.check_pictures(2)
    movable, overall = units.movable
    if overall < MOVABLE:
        shares = ", ".join(f"{group} {share:.0%}" for group, share in zip(groups, movable.tolist(), strict=True))
        raise SelectionError(
            f"labels are shuffled among {units.kind}s of equally many questions, and only {overall:.0%} can change "
            f"theirs ({shares}); a null needs half. Give every group as many questions a {units.kind}, by "
            "balanced=True or a number, or leave out the groups that differ"
        )
    if min(least := [1 / many for many in units.arrangements]) > LEVEL:
        raise SelectionError(
            f"the groups have so few {units.kind}s ({', '.join(map(str, units.pictures))}) that no p can be below "
            f"{min(least):.2g}: record more"
        )


def _measured(measure: Measure, questions: GroupedItems, selector: Selector) -> np.ndarray:
    """The strength of each group, in the order of the groups."""
    found = measure(questions, selector)
    check_kind("what the measure gives", found, Mapping, SelectionError, "a dictionary of numbers by group")
    missing = [group for group in questions.groups if group not in found or np.isnan(found[group])]
    if missing:
        raise SelectionError(f"the measure gives no number for {', '.join(missing)}")
    return np.array([found[group] for group in questions.groups], dtype=float)
