"""Tests of changes, and corrections for several of them."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats as scipy_stats

from vlmneurons.trust.resampling import Members


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
        changes: ``[row, question]``; rows share their flips. NaN where a question has no change; it is left out.
        members: questions of each group; a question of none is left out.
        permutations: number of flips; all there are, where these are fewer.
        generator: where they come from.
        clusters: for every question the number of its cluster, whose questions get one sign; None for questions that
            stand alone.

    Returns:
        ``[row, group]`` p of each group's mean, and ``[row]`` p of the mean of the groups' means; NaN of nothing.
    """
    known = ~np.isnan(changes)
    cluster = np.arange(changes.shape[1]) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    single, whole = np.full((len(changes), len(members)), np.nan), np.zeros((len(changes), cluster.max(initial=-1) + 1))
    there = np.zeros(len(changes), dtype=np.int64)
    for n, own in enumerate(members):
        size = known[:, own].sum(1)
        here, totals = size > 0, np.zeros_like(whole)
        np.add.at(totals.T, cluster[own], np.where(known, changes, 0.0)[:, own].T)
        totals = totals / np.maximum(size, 1)[:, None]
        single[here, n] = flip_pvalues(totals[:, np.unique(cluster[own])], permutations, generator)[here]
        whole, there = whole + totals, there + here
    return single, np.where(there > 0, flip_pvalues(whole, permutations, generator), np.nan)


def flip_pvalues(totals: np.ndarray, permutations: int, generator: np.random.Generator) -> np.ndarray:
    """``[row]`` two-sided p of each row's sum, if each of its terms might have had either sign.

    Where there are no more flips than asked for (2 to the number of terms that are not 0), all are made, and p is the
    share of them that is at least as far from zero. Else p is ``(1 + flips at least as far) / (1 + flips)``, never 0
    (Phipson & Smyth 2010). Sums that are equal on paper, but differ by rounding, count as equal.

    Args:
        totals: ``[row, unit]`` what each unit adds to a sum; rows share their flips.
        permutations: number of flips.
        generator: where they come from.
    """
    size = np.abs(totals).sum(1)
    least = np.abs(totals.sum(1)) - 1e-10 * size  # a flip's sum that counts as at least as far
    n_terms = (totals != 0).sum(1)
    exact = n_terms <= np.log2(max(permutations, 1))
    p = np.ones(len(totals))
    for row in np.flatnonzero(exact & (n_terms > 0)):
        sums = np.zeros(1)
        for term in totals[row, totals[row] != 0]:
            sums = np.concatenate([sums + term, sums - term])
        p[row] = (np.abs(sums) >= least[row]).mean()
    drawn = np.flatnonzero(~exact)
    if len(drawn):
        further = np.zeros(len(drawn))
        for start in range(0, permutations, 512):
            shape = (min(512, permutations - start), totals.shape[1])
            signs = generator.integers(0, 2, shape, dtype=np.int8) * 2.0 - 1.0
            further += (np.abs(signs @ totals[drawn].T) >= least[drawn]).sum(0)
        p[drawn] = (1 + further) / (1 + permutations)
    return p


def holm(pvalues: Sequence[float]) -> np.ndarray:
    """P-values corrected by Holm's step-down method, which bounds the chance of any false finding; NaN stay NaN.

    Args:
        pvalues: ``[test]``; NaN where there is no test.
    """

    def stepped(values: np.ndarray) -> np.ndarray:
        order = np.argsort(values, kind="stable")
        steps = values[order] * np.arange(len(order), 0, -1)
        corrected = np.empty_like(values)
        corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
        return corrected

    return _corrected(pvalues, stepped)


def benjamini_hochberg(pvalues: Sequence[float]) -> np.ndarray:
    """P-values corrected by Benjamini & Hochberg's method, which bounds the share of false findings; NaN stay NaN.

    Args:
        pvalues: ``[test]``; NaN where there is no test.
    """
    return _corrected(pvalues, scipy_stats.false_discovery_control)


def _corrected(pvalues: Sequence[float], correct: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """P-values with those that are known corrected together."""
    corrected = np.array(pvalues, dtype=float)
    known = ~np.isnan(corrected)
    if known.any():
        corrected[known] = correct(corrected[known])
    return corrected
