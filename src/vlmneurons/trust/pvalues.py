"""Tests of changes, and corrections for several of them."""

from collections.abc import Sequence

import numpy as np
from scipy import stats as scipy_stats

from vlmneurons.trust.resampling import Members, clusters_of


def mcnemar(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Two-sided exact p of McNemar's test, over the last axis: did as many answers turn right as turned wrong?

    1 where no answer changed.

    Args:
        before: ``[..., question]`` whether the answer was right.
        after: the same, under the mask.
    """
    worse, better = (before & ~after).sum(-1), (~before & after).sum(-1)
    tail = scipy_stats.binom.cdf(np.minimum(worse, better), worse + better, 0.5)
    return np.asarray(np.minimum(1.0, 2 * tail))


def sign_flips(
    changes: np.ndarray,
    members: Members,
    permutations: int,
    generator: np.random.Generator,
    clusters: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Permutation test of mean changes: is zero their centre, if each question's change might have had either sign?

    With a single mask this is McNemar's test by Monte Carlo; unlike it, it also takes averages over repeats, gaps and
    margins. The p-value is ``(1 + flips at least as far from zero) / (1 + flips)``, never 0 (Phipson & Smyth 2010).

    Args:
        changes: ``[row, question]``; rows share their flips. A row with NaN has NaN as its p.
        members: questions of each group; a question of none is left out.
        permutations: number of flips.
        generator: where they come from.
        clusters: for every question the number of its cluster, whose questions get one sign; None for questions that
            stand alone.

    Returns:
        ``[row, group]`` p of each group's mean, and ``[row]`` p of the mean of the groups' means.
    """
    n_rows = len(changes)
    single = np.ones((n_rows, len(members)))
    overall = np.zeros((permutations, n_rows))
    observed = np.zeros(n_rows)
    alone, place, n_shared = clusters_of(members, clusters)

    def drawn(n: int) -> np.ndarray:
        return generator.integers(0, 2, (permutations, n), dtype=np.int8) * 2.0 - 1.0

    shared = drawn(n_shared)
    for n, (own, separate) in enumerate(zip(members, alone, strict=True)):
        values = changes[:, own].T / max(len(own), 1)
        # A negative place counts from the end, where the shared signs stand in reverse.
        signs = np.concatenate([drawn(len(separate)), shared[:, ::-1]], 1)[:, place[own]]
        flipped = signs @ values
        actual = values.sum(0)
        # Sums that are equal on paper differ by rounding: count them as equal.
        single[:, n] = (1 + (np.abs(flipped) >= np.abs(actual) - 1e-12).sum(0)) / (1 + permutations)
        single[np.isnan(actual), n] = np.nan
        overall += flipped
        observed += actual
    p = (1 + (np.abs(overall) >= np.abs(observed) - 1e-12).sum(0)) / (1 + permutations)
    p[np.isnan(observed)] = np.nan
    return single, p


def holm(pvalues: Sequence[float]) -> np.ndarray:
    """P-values corrected by Holm's step-down method, which bounds the chance of any false finding; NaN stay NaN.

    Args:
        pvalues: ``[test]``; NaN where there is no test.
    """
    values = np.asarray(pvalues, dtype=float)
    corrected = np.full(values.shape, np.nan)
    known = np.flatnonzero(~np.isnan(values))
    ordered = known[np.argsort(values[known], kind="stable")]
    steps = values[ordered] * np.arange(len(ordered), 0, -1)
    corrected[ordered] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


def benjamini_hochberg(pvalues: Sequence[float]) -> np.ndarray:
    """P-values corrected by Benjamini & Hochberg's method, which bounds the share of false findings; NaN stay NaN.

    Args:
        pvalues: ``[test]``; NaN where there is no test.
    """
    values = np.asarray(pvalues, dtype=float)
    corrected = np.full(values.shape, np.nan)
    known = ~np.isnan(values)
    if known.any():
        corrected[known] = scipy_stats.false_discovery_control(values[known])
    return corrected
