"""AveragePrecision, the neurons whose activation tells a group's questions from all others (arXiv 2404.02431).

``score[c, n]`` is the average precision of neuron ``n``'s value as a detector of the questions of group ``c``: the
mean, over these questions, of the share of group ``c`` among all questions with a value at least as high.
"""

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from typing_extensions import Unpack

from vlmneurons.errors import SelectionError
from vlmneurons.selectors._base import Selector, Shared
from vlmneurons.statistics.items import VALUES, GroupedItems

_BLOCK = 48 * 2**20
"""Bytes of values that are held at once."""
_FEW = 192
"""Up to this many items are compared two by two; with more, sorting is faster."""
_CACHED = 4096
"""How many neurons' values stay in a CPU's cache while items are compared."""


class AveragePrecision(Selector[GroupedItems]):
    """Average precision of a neuron's activation as a detector of the group's questions.

    ``score[c, n]`` is the area under the precision-recall curve when questions are ranked by the neuron's value and
    those of group ``c`` are to be found: 1 if they all come first, and near the group's share of the questions by
    chance. Equal values have no order: precision is taken where all of them are counted, as scikit-learn does.

    Kojima et al. 2024, arXiv 2404.02431, after Cuadros et al. 2022. They take the value to be the mean activation over
    a text's tokens, and select the neurons with the highest *and* with the lowest average precision; the lowest are
    ``-AveragePrecision(…)``, both together ``AveragePrecision(r) | -AveragePrecision(r)``. Deviations: neurons are
    those of the space (MLP neurons), not the outputs of all linear layers; the mean is over the counted tokens.

    It needs single questions, so it selects from `ItemStatistics`, recorded with ``magnitudes=True`` for the mean.

    Example:
        ``AveragePrecision(0.005).select(items.grouped("group"))``
    """

    contrastive = True

    def __init__(
        self,
        fraction: float | int | None = None,
        *,
        on: str = "mean",
        **shared: Unpack[Shared],
    ) -> None:
        """Settings.

        Args:
            fraction: share of the neurons that each group gets.
            on: value of a neuron for a question: ``"mean"`` activation, ``"probability"`` of firing (which every
                recording has), ``"maximum"`` activation, or the name of a statistic of your own that was recorded.
            shared: ``count``, ``layers``, ``exclude`` and ``per_layer``, as every selector has them; see `Selector`.

        Raises:
            SelectionError: a setting that is not allowed.
        """
        super().__init__(fraction, **shared)
        if not isinstance(on, str) or not on.isidentifier():
            raise SelectionError(f"AveragePrecision: on is one of {', '.join(VALUES)}, or a statistic; got {on!r}")
        self.on = on

    def score(self, stats: GroupedItems) -> Float64[Tensor, "group neuron"]:
        """The average precision, from 0 to 1."""
        self.check_statistics(stats)
        scores = np.empty((len(stats.groups), len(stats.space)))
        step = max(64, _BLOCK // (8 * max(1, len(stats.rows))))
        for start in range(0, len(stats.space), step):
            columns = slice(start, min(start + step, len(stats.space)))
            values = np.ascontiguousarray(stats.values(self.on, columns).T)
            scores[:, columns] = average_precision(values, stats.owner, len(stats.groups))
        return torch.from_numpy(scores)


def average_precision(
    values: Float64[np.ndarray, "neuron item"], owner: Int64[np.ndarray, " item"], n_groups: int
) -> Float64[np.ndarray, "group neuron"]:
    """Average precision of each neuron's values for finding each group's items.

    For an item with value ``v``, precision is the number of the group's items with values of at least ``v`` over that
    of all items; the average is over the group's items.

    Args:
        values: of each neuron and item.
        owner: number of each item's group; every group has at least one.
        n_groups: how many groups.
    """
    # For every item how many items have at least its value: among all items, and among its group's items alone.
    among_all = _at_least(values)
    result = np.empty((n_groups, len(values)))
    for group in range(n_groups):
        members = np.flatnonzero(owner == group)
        result[group] = (_at_least(values[:, members]) / among_all[:, members]).mean(1)
    return result


def _at_least(values: Float64[np.ndarray, "neuron item"]) -> Int64[np.ndarray, "neuron item"]:
    """For each value the number of values of its neuron that are at least as high, itself among them."""
    n_items = values.shape[1]
    if n_items <= _FEW:
        return _at_least_by_pairs(values)
    order = np.argsort(values, axis=1)
    ordered = np.take_along_axis(values, order, 1)
    # In ascending order, the place where the run of values equal to this one begins: all from there on are at least it.
    starts = np.zeros(values.shape, dtype=np.int64)
    starts[:, 1:] = np.where(ordered[:, 1:] != ordered[:, :-1], np.arange(1, n_items), 0)
    np.maximum.accumulate(starts, axis=1, out=starts)
    counts = np.empty_like(starts)
    np.put_along_axis(counts, order, n_items - starts, 1)
    return counts


def _at_least_by_pairs(values: Float64[np.ndarray, "neuron item"]) -> Int64[np.ndarray, "neuron item"]:
    """The same by comparing every two items, for many neurons at once: faster than sorting as long as items are few."""
    by_item = np.ascontiguousarray(values.T)
    counts = np.empty(by_item.shape, dtype=np.int64)
    for start in range(0, by_item.shape[1], _CACHED):
        part = slice(start, start + _CACHED)
        block = by_item[:, part]
        for item, item_values in enumerate(block):
            counts[item, part] = (block >= item_values).sum(0, dtype=np.int16)
    return counts.T
