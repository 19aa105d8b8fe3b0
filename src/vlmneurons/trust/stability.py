"""Would other questions have given the same neurons? Selections from halves, resamples and fewer questions."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vlmneurons.checks import as_fraction, as_whole, check_choice, check_kind
from vlmneurons.errors import SelectionError
from vlmneurons.neurons.selection import Selection, jaccards
from vlmneurons.selectors import Selector
from vlmneurons.statistics.items import GroupedItems, Grouping, ItemStatistics
from vlmneurons.trust.agreement import score_ranks
from vlmneurons.trust.resampling import check_selector, drawn_items
from vlmneurons.trust.units import AS_RECORDED, Units, units_of

if TYPE_CHECKING:
    import pandas as pd

METHODS = ("bootstrap", "halves", "pools")
"""Pictures drawn with replacement; two disjoint halves; two pools of one size with seeds of their own."""


class _Chosen(NamedTuple):
    """A selection, and the standardised ranks of the scores behind it, ``[group, neuron]``."""

    selection: Selection
    ranks: np.ndarray | None


def stability(
    items: ItemStatistics | GroupedItems,
    selector: Selector,
    *,
    by: Grouping = AS_RECORDED,
    condition: str = "correct",
    balanced: bool | int = False,
    minimum: int = 2,
    method: str = "bootstrap",
    size: int | None = None,
    resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
    unit: str = "picture",
) -> "pd.DataFrame":
    """Would other questions have given the same neurons?

    Questions about one picture are not independent, so pictures are drawn, each with all its questions; one that
    several groups share is drawn for all of them. For other prompts, other checkpoints or other seeds of the recording
    itself, select from each and use `agreement`.

    Args:
        items: counts of every question.
        selector: what selects.
        by: the grouping; see `ItemStatistics.grouped`.
        condition: which questions enter.
        balanced: cut the pool to the same number of questions of every group; see `ItemStatistics.grouped`.
        minimum: least number of questions of every group, at least 2.
        method: ``"bootstrap"`` compares the selection with that from pictures drawn with replacement within each
            group; ``"halves"`` compares the selections from two disjoint random halves of each group; ``"pools"`` those
            from two random pools of ``size`` questions a group, taken picture by picture.
        size: questions a group of each of the ``"pools"``; half of the smallest group unless given.
        resamples: how many times.
        confidence: level of the percentile interval of the overlap.
        seed: of the draws, and of the balanced pool.
        unit: ``"question"`` draws single questions, as if each had a picture of its own.

    Returns:
        A row for each ``group``, and their mean as ``"all"``, with ``questions`` and ``pictures`` in the pool,
        ``jaccard`` (mean overlap), ``jaccard_low``, ``jaccard_high``, ``between_groups`` (mean overlap of the group's
        set from the one half with the *other* groups' sets from the other half), ``chance`` (expected overlap of two
        random sets of these sizes), ``spearman`` (mean rank correlation of the scores of all neurons; NaN for selectors
        without scores) and ``spearman_between_groups``. Neurons that fire at everything are in every group's set, again
        and again: of halves, what is particular to a group is what ``jaccard`` has above ``between_groups``, to which
        it is equal, on average, where groups do not differ. Bootstraps and pools share questions with what they are
        compared with, so that they overlap more than that in any case. Halves are smaller than the pool, so they
        understate how stable a selection from the whole pool is; a bootstrap overstates.

    Raises:
        SelectionError: a group has fewer questions than are needed, or fewer than two pictures (the message names it);
            no such method; or a recording of an earlier release, which keeps no pictures.
    """
    check_choice("method", method, METHODS, SelectionError)
    if size is not None and method != "pools":
        raise SelectionError(f"size belongs to method='pools'; {method!r} takes none")
    check_selector(selector)
    resamples = as_whole("resamples", resamples, SelectionError, least=1)
    confidence = as_fraction("confidence", confidence, SelectionError)
    units = units_of(items, by, condition, balanced, max(2, as_whole("minimum", minimum, SelectionError)), seed, unit)
    units.check_pictures(2)
    if method == "pools":
        size = int(units.pool.items.min()) // 2 if size is None else as_whole("size", size, SelectionError, least=1)
        units.pool.check_size(size)
    compared = _compared(units, selector, method, resamples, size, np.random.default_rng(seed))
    return _table(units, list(compared), 50 * (1 - confidence))


def _table(units: Units, compared: Sequence[tuple["_Chosen", "_Chosen"]], tail: float) -> "pd.DataFrame":
    """What `stability` returns, of the pairs of selections that are compared."""
    import pandas as pd

    overlap = np.stack([jaccards(one.selection, other.selection) for one, other in compared])
    chance = np.array(
        [[one.selection[g].expected_jaccard(other.selection[g]) for g in one.selection] for one, other in compared]
    )
    ranks, unknown = [(one.ranks, other.ranks) for one, other in compared], np.full(overlap.shape[1:], np.nan)
    spearman = np.stack([unknown if a is None or b is None else a @ b.T for a, b in ranks])
    groups = range(len(units.pool.groups))
    rows = []
    for name, own in [*zip(units.pool.groups, ([n] for n in groups), strict=True), ("all", list(groups))]:
        others = [(n, m) for n in own for m in groups if m != n]
        within = overlap[:, own, own].mean(1)
        low, high = np.percentile(within, [tail, 100 - tail])
        rows.append(
            {
                "group": name,
                "questions": int(units.questions[:, own].sum()),
                "pictures": int((units.questions[:, own] > 0).any(1).sum()),
                "jaccard": within.mean(),
                "jaccard_low": low,
                "jaccard_high": high,
                "between_groups": _mean(overlap, others),
                "chance": chance[:, own].mean(),
                "spearman": spearman[:, own, own].mean(),
                "spearman_between_groups": _mean(spearman, others),
            }
        )
    return pd.DataFrame(rows)


def _compared(
    units: Units, selector: Selector, method: str, resamples: int, size: int | None, generator: np.random.Generator
) -> Iterator[tuple[_Chosen, _Chosen]]:
    """The two selections that are compared, draw by draw."""

    def chosen(weights: np.ndarray) -> Iterator[_Chosen]:
        for draw in drawn_items(units.pool, None, weights):
            yield _Chosen(selector.select(draw), score_ranks(selector, draw))

    if method == "bootstrap":
        of_all = _Chosen(selector.select(units.pool), score_ranks(selector, units.pool))
        return ((of_all, one) for one in chosen(units.resampled(resamples, generator)))
    if method == "halves":
        first, second = units.halves(resamples, generator)
    else:
        assert size is not None
        first, second = (units.first(size, resamples, generator) for _ in range(2))
    return zip(chosen(first), chosen(second), strict=True)


def _mean(tables: np.ndarray, places: Sequence[tuple[int, int]]) -> float:
    """The mean of some places of tables ``[draw, group, group]``; NaN where there is none."""
    return float(np.mean([tables[:, n, m].mean() for n, m in places])) if places else float("nan")


def sample_sizes(
    items: ItemStatistics | GroupedItems,
    selector: Selector,
    sizes: Sequence[int],
    *,
    by: Grouping = AS_RECORDED,
    condition: str = "correct",
    repeats: int = 20,
    seed: int = 0,
    unit: str = "picture",
) -> "pd.DataFrame":
    """How many questions a group are enough? The selection from few questions against that from all.

    Args:
        items: counts of every question.
        selector: what selects.
        sizes: numbers of questions a group, taken picture by picture without replacement.
        by: the grouping.
        condition: which questions enter.
        repeats: draws of each size.
        seed: of the draws.
        unit: ``"question"`` takes single questions, as if each had a picture of its own.

    Returns:
        A row for each size and group with ``size``, ``group``, ``pictures`` (mean number that so many questions are
        about), ``jaccard`` (overlap with the selection from all questions, mean over draws), ``jaccard_low`` and
        ``jaccard_high`` (smallest and largest), ``chance``, and ``between``, the mean overlap of two draws of this
        size. All questions contain the few, so ``jaccard`` is 1 at the size of the group; ``between`` is not flattered
        in this way as long as the size is well below it.

    Raises:
        SelectionError: no size, one below 1 or twice, or a group that has fewer questions than a size, or fewer than
            two pictures; the message names it.
    """
    import pandas as pd

    check_selector(selector)
    repeats = as_whole("repeats", repeats, SelectionError, least=1)
    check_kind("sizes", sizes, Iterable, SelectionError, "a list of numbers of questions")
    sizes = [as_whole("each of sizes", size, SelectionError) for size in sizes]
    if not len(sizes) or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise SelectionError(f"sizes are numbers of questions, at least 1 and each once; got {list(sizes)}")
    units = units_of(items, by, condition, False, max(sizes), seed, unit)
    units.check_pictures(2)
    generator = np.random.default_rng(seed)
    reference = selector.select(units.pool)
    rows = []
    for size in sizes:
        weights = units.first(size, repeats, generator)
        selections = [selector.select(draw) for draw in drawn_items(units.pool, None, weights)]
        for n, group in enumerate(units.pool.groups):
            overlap = [one[group].jaccard(reference[group]) for one in selections]
            chance = [one[group].expected_jaccard(reference[group]) for one in selections]
            between = [a[group].jaccard(b[group]) for a, b in itertools.pairwise(selections)]
            shown = [len(set(units.unit[(weight > 0) & (units.pool.owner == n)].tolist())) for weight in weights]
            rows.append(
                {
                    "size": size,
                    "group": group,
                    "pictures": np.mean(shown),
                    "jaccard": np.mean(overlap),
                    "jaccard_low": np.min(overlap),
                    "jaccard_high": np.max(overlap),
                    "between": np.mean(between) if between else float("nan"),
                    "chance": np.mean(chance),
                }
            )
    return pd.DataFrame(rows)
