"""Comparing groups exactly: ties stay ties, and neither the order nor the names of groups decide anything.

Floating-point sums of the same fractions in another order of groups differ in their last bit, and so do equal
differences of different fractions, such as .9 - .2 and .8 - .1: a rule that ranks such numbers breaks ties by chance.
Here sums over groups are added in an order that the values decide, and a probability is a whole number and an exact
remainder. The work goes a block of neurons at a time: a block stays in a CPU's cache, which whole tables do not.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from vlmneurons.statistics.counts import ActivationStatistics

_BLOCK = 2**17
"""Cells of a block: three tables of so many are 3 MiB."""
_HIGH, _LOW = 2.0**24, 2.0**16
"""A probability is q / 2^24 with a whole q, and a remainder that is kept in units of 2^-40."""
UNIT = 1 / (_HIGH * _LOW)
"""Differences of probabilities (times the number of groups) that are less than this, 9e-13, count as equal."""


def canonical_order(
    rows: Float64[np.ndarray, "group neuron"] | Int64[np.ndarray, "group neuron"], among: Sequence[int] | None = None
) -> list[int]:
    """The numbers of the rows, sorted by the first value that differs; equal rows stay in order (that of ``among``)."""

    def compare(first: int, second: int) -> int:
        for start in range(0, rows.shape[1], 4096):
            left, right = rows[first, start : start + 4096], rows[second, start : start + 4096]
            different = np.flatnonzero(left != right)
            if len(different):
                return -1 if left[different[0]] < right[different[0]] else 1
        return 0

    return sorted(range(len(rows)) if among is None else among, key=functools.cmp_to_key(compare))


def sum_over_groups(table: Float64[Tensor, "group neuron"]) -> Float64[Tensor, " neuron"]:
    """The sum over groups: the same bits on every machine, unlike a vectorised sum, and for every order of groups."""
    rows = table.numpy()
    return torch.from_numpy(added(rows, canonical_order(rows)))


def counted(stats: ActivationStatistics, columns: slice) -> Float64[np.ndarray, "group column"]:
    """Tokens that the probabilities are shares of: one column for all neurons, or one for each; at least 1."""
    tokens = stats.tokens[:, None] if stats.routed is None else stats.routed[:, stats.space.site_of[columns]]
    return tokens.numpy().astype(np.float64).clip(min=1)


def blocks(stats: ActivationStatistics) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Neurons a block at a time: their columns, counts ``[group, column]`` and tokens (see `counted`), as floats."""
    step = max(256, _BLOCK // len(stats.groups))
    positive, everywhere = stats.positive.numpy(), counted(stats, slice(0, 1))
    for start in range(0, len(stats.space), step):
        columns = slice(start, min(start + step, len(stats.space)))
        tokens = everywhere if stats.routed is None else counted(stats, columns)
        yield columns, positive[:, columns].astype(np.float64), tokens


def order_of_groups(stats: ActivationStatistics) -> list[int]:
    """`canonical_order` of the groups' counts; of equal counts, those of fewer tokens first."""
    by_tokens = sorted(range(len(stats.groups)), key=lambda row: stats.reached[row].tolist())
    return canonical_order(stats.positive.numpy(), by_tokens)


def _parts(
    counts: np.ndarray, tokens: np.ndarray, order: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities as whole numbers of 2^-24, their remainders in units of 2^-40, and the sums of both over groups."""
    high = counts * (_HIGH / tokens)
    np.rint(high, out=high)
    # The product is exact (of a whole number of at most 24 bits and tokens of at most 29), and so is its difference
    # from the counts, whichever of the neighbouring whole numbers the rounding above took.
    low = high * (tokens / -_HIGH)
    low += counts
    low *= _HIGH * _LOW / tokens
    return high, low, high.sum(0), added(low, order)


def added(rows: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """The sum of rows, added in the given order."""
    total = rows[order[0]].copy()
    for row in order[1:]:
        total += rows[row]
    return total


def deviations(
    stats: ActivationStatistics, *, scale: float = 1.0, signed: bool = True
) -> Float64[Tensor, "group neuron"]:
    """Each probability less the mean over groups, times ``scale``; without its sign unless ``signed``."""
    result = np.empty((len(stats.groups), len(stats.space)))
    n_groups, order = len(stats.groups), order_of_groups(stats)
    for columns, counts, tokens in blocks(stats):
        high, low, all_high, all_low = _parts(counts, tokens, order)
        low *= n_groups
        low -= all_low
        np.rint(low, out=low)
        # Whole numbers from here on: n_groups * probability - sum of probabilities, in units of 2^-40.
        high *= n_groups * _LOW
        high -= all_high * _LOW
        high += low
        if not signed:
            np.abs(high, out=high)
        np.multiply(high, scale * UNIT / n_groups, out=result[:, columns])
    return torch.from_numpy(result)


def mean_probability(stats: ActivationStatistics) -> Float64[Tensor, " neuron"]:
    """The mean over groups of each neuron's probability, each group counting the same."""
    result = np.empty(len(stats.space))
    n_groups, order = len(stats.groups), order_of_groups(stats)
    for columns, counts, tokens in blocks(stats):
        _, _, high, low = _parts(counts, tokens, order)
        result[columns] = (high * _LOW + np.rint(low)) * (UNIT / n_groups)
    return torch.from_numpy(result)


def margins(stats: ActivationStatistics) -> Float64[Tensor, "group neuron"]:
    """For the strongest group its probability less that of the runner-up, for the others 0; correctly rounded."""
    result = np.zeros((len(stats.groups), len(stats.space)))
    for columns, counts, tokens in blocks(stats):
        probability = counts / tokens
        neurons = np.arange(counts.shape[1])
        place = np.zeros_like(neurons) if tokens.shape[1] == 1 else neurons
        first = probability.argmax(0)
        probability[first, neurons] = -1
        second = probability.argmax(0)
        # Cross-multiplied, K1 / T1 - K2 / T2 is one division of whole numbers, and so correctly rounded.
        tokens1, tokens2 = tokens[first, place], tokens[second, place]
        margin = counts[first, neurons] * tokens2 - counts[second, neurons] * tokens1
        result[first, columns.start + neurons] = margin / (tokens1 * tokens2)
    return torch.from_numpy(result)
