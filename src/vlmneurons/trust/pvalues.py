"""Tests of changes, and corrections for several of them."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats as scipy_stats


def mcnemar(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Two-sided exact p of McNemar's test, over the last axis: did as many answers turn right as turned wrong?

    Where no answer changed, p is 1.

    Args:
        before: ``[..., question]`` whether the answer was right.
        after: the same, under the mask.
    """
    worse, better = (before & ~after).sum(-1), (~before & after).sum(-1)
    tail = scipy_stats.binom.cdf(np.minimum(worse, better), worse + better, 0.5)
    return np.asarray(np.minimum(1.0, 2 * tail))


def flip_pvalues(totals: np.ndarray, permutations: int, generator: np.random.Generator) -> np.ndarray:
    """``[row]`` two-sided p of each row's sum: is zero its centre, if each of its terms might have had either sign?

    With one term for each question, 1, 0 or -1, this is McNemar's test; unlike it, it also takes averages over repeats,
    gaps, margins, and the sums of questions about one picture.

    There are 2 to the number of terms that are not 0 different flips. Where these are no more than ``permutations``,
    all are made, and p is the share of them whose sum is at least as far from zero. Otherwise they are drawn, and p is
    ``(1 + flips at least as far) / (1 + flips)``, which is never 0 (Phipson & Smyth 2010). Sums that are equal on
    paper, but differ by rounding, count as equal.

    Args:
        totals: ``[row, unit]`` what each unit adds to a sum; rows share their flips.
        permutations: number of flips.
        generator: draws the flips.
    """
    rounding = 1e-10 * np.abs(totals).sum(1)
    least = np.abs(totals.sum(1)) - rounding  # a flip's sum of this size counts as at least as far
    n_terms = (totals != 0).sum(1)
    exact = n_terms <= np.log2(max(permutations, 1))
    p = np.ones(len(totals))
    for row in np.flatnonzero(exact & (n_terms > 0)):
        sums = np.zeros(1)  # of all flips of the terms so far: each further term doubles them
        for term in totals[row, totals[row] != 0]:
            sums = np.concatenate([sums + term, sums - term])
        p[row] = (np.abs(sums) >= least[row]).mean()
    drawn = np.flatnonzero(~exact)
    if len(drawn):
        as_far = np.zeros(len(drawn))
        for start in range(0, permutations, 512):
            shape = (min(512, permutations - start), totals.shape[1])
            signs = generator.integers(0, 2, shape, dtype=np.int8) * 2.0 - 1.0
            as_far += (np.abs(signs @ totals[drawn].T) >= least[drawn]).sum(0)
        p[drawn] = (1 + as_far) / (1 + permutations)
    return p


def holm(pvalues: Sequence[float]) -> np.ndarray:
    """P-values corrected by Holm's step-down method, which bounds the chance of any false finding; NaN stay NaN.

    Args:
        pvalues: ``[test]``; NaN where there is no test.
    """
    return _corrected(pvalues, _stepped_down)


def _stepped_down(pvalues: np.ndarray) -> np.ndarray:
    """The smallest p times the number of tests, the next times one less, and so on; never less than one before it."""
    order = np.argsort(pvalues, kind="stable")
    steps = pvalues[order] * np.arange(len(order), 0, -1)
    corrected = np.empty_like(pvalues)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


def benjamini_hochberg(pvalues: Sequence[float]) -> np.ndarray:
    """P-values corrected by Benjamini & Hochberg's method, which bounds the share of false findings; NaN stay NaN.

    Args:
        pvalues: ``[test]``; NaN where there is no test.
    """
    return _corrected(pvalues, scipy_stats.false_discovery_control)


def _corrected(pvalues: Sequence[float], correct: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """P-values corrected together; those that are NaN are not among the tests."""
    corrected = np.array(pvalues, dtype=float)
    tested = ~np.isnan(corrected)
    if tested.any():
        corrected[tested] = correct(corrected[tested])
    return corrected
