"""The arithmetic of a study: effects of masks, their intervals, and tests, on arrays of changes.

Nothing here knows models or files. A *change* is what a mask does to one question: 1 where a wrong answer turns right,
-1 where a right one turns wrong, 0 else (or a difference of margins). Repeats of a control are averaged before.
Questions that belong together, such as those about one picture, are a *cluster*, and are resampled and flipped as one.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats as scipy_stats

Members = Sequence[np.ndarray]
"""For each group the places of its questions."""


def mean_over(values: np.ndarray, members: Members) -> np.ndarray:
    """``[..., group]`` means of ``values[..., question]`` over each group's questions."""
    return np.stack([values[..., own].mean(-1) for own in members], -1)


def mask_effects(delta: np.ndarray, column: Sequence[int]) -> dict[str, np.ndarray]:
    """Effects of each mask from ``delta[..., mask, group]``; mask ``i`` is of the group in column ``column[i]``.

    Args:
        delta: ``[..., mask, group]`` changes, such as of accuracy (a share of 1) or margin (nats).
        column: the column of each mask's own group.

    Returns:
        ``self_effect`` = ``delta[c, c]``; ``cross_effect``, mean of ``delta[m, c]`` over ``m != c`` (the average cross
        effect of arXiv 2608.08772); ``cross_caused``, mean of ``delta[c, e]`` over ``e != c`` (that of arXiv
        2510.24942); ``gap``, self less cross effect. Each is ``[..., mask]``, in the unit of ``delta``; NaN where there
        is no other mask or group.
    """
    n_masks, n_groups = delta.shape[-2:]
    own = delta[..., range(n_masks), column]
    received = np.full(own.shape, np.nan)
    if n_masks > 1:
        received = (delta[..., :, column].sum(-2) - own) / (n_masks - 1)
    caused = np.full(own.shape, np.nan)
    if n_groups > 1:
        caused = (delta.sum(-1) - own) / (n_groups - 1)
    return {"self_effect": own, "cross_effect": received, "cross_caused": caused, "gap": own - received}


def clusters_of(members: Members, clusters: np.ndarray | None) -> tuple[list[np.ndarray], np.ndarray, int]:
    """Clusters (such as pictures) by the groups that they have questions in.

    Args:
        members: questions of each group.
        clusters: for every question the number of its cluster; None for questions that stand alone.

    Returns:
        for each group the clusters that are its alone, as numbers from 0 in the order of its questions; for every
        question that number, less than 0 for a cluster that several groups share: -1 for the first, -2 for the second;
        and the number of these.
    """
    n_questions = 1 + max((int(own.max()) for own in members if len(own)), default=-1)
    place = np.zeros(n_questions, dtype=np.int64)
    if clusters is None:
        for own in members:
            place[own] = np.arange(len(own))
        return [np.arange(len(own)) for own in members], place, 0
    seen: dict[int, set[int]] = {}
    for group, own in enumerate(members):
        for cluster in clusters[own].tolist():
            seen.setdefault(cluster, set()).add(group)
    shared = {cluster: -1 - n for n, cluster in enumerate(c for c, groups in seen.items() if len(groups) > 1)}
    alone = []
    for own in members:
        number: dict[int, int] = {}
        for question, cluster in zip(own.tolist(), clusters[own].tolist(), strict=True):
            place[question] = shared[cluster] if cluster in shared else number.setdefault(cluster, len(number))
        alone.append(np.arange(len(number)))
    return alone, place, len(shared)


def resample_weights(
    members: Members, resamples: int, generator: np.random.Generator, clusters: np.ndarray | None = None
) -> list[np.ndarray]:
    """For each group ``[resample, question]``, how much each question weighs in a bootstrap resample of the group.

    Whole clusters are drawn: questions about one picture are not independent, and are in a resample together. Those of
    one group are drawn among themselves, those that several groups share among themselves, the same for all groups.
    Weights of a resample add up to 1, or are NaN where nothing of a group was drawn.

    Args:
        members: questions of each group.
        resamples: how many.
        generator: where they come from.
        clusters: for every question the number of its cluster; None for questions that stand alone.
    """

    def drawn(n: int) -> np.ndarray:
        return generator.multinomial(n, np.full(n, 1 / n), resamples)

    alone, place, n_shared = clusters_of(members, clusters)
    shared = drawn(n_shared) if n_shared else None
    weights = []
    for own, single in zip(members, alone, strict=True):
        times = np.zeros((resamples, len(own)), dtype=np.int64)
        here = place[own]
        if len(single):
            times[:, here >= 0] = drawn(len(single))[:, here[here >= 0]]
        if shared is not None:
            times[:, here < 0] = shared[:, -1 - here[here < 0]]
        with np.errstate(invalid="ignore"):
            weights.append(times / times.sum(1, keepdims=True))
    return weights


def resampled_means(values: np.ndarray, members: Members, weights: Sequence[np.ndarray]) -> np.ndarray:
    """``[resample, row, group]`` means of ``values[row, question]`` in each resample; all rows share the resample."""
    return np.stack([weight @ values[:, own].T for own, weight in zip(members, weights, strict=True)], 2)


def bounds(draws: np.ndarray, tail: float) -> np.ndarray:
    """The percentiles ``tail`` and ``100 - tail`` over the first axis, of what was drawn at all."""
    percentile = np.nanpercentile if np.isnan(draws).any() and not np.isnan(draws).all(0).any() else np.percentile
    return percentile(draws, [tail, 100 - tail], axis=0)


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


def excess(delta: np.ndarray, column: Sequence[int]) -> np.ndarray:
    """What is left of each cross effect when the mask's and the group's own average are taken out.

    A mask that harms every group, and a group that every mask harms, say nothing about a relation between two. A model
    ``delta[m, e] = mask m + group e`` is fitted by least squares to all but the self effects; the residuals are
    returned, negative where a mask harms a group more than expected. NaN at the self effects.

    Args:
        delta: ``[mask, group]`` changes; the result is in the unit of these.
        column: the column of each mask's own group.
    """
    n_masks, n_groups = delta.shape
    cross = np.ones(delta.shape, dtype=bool)
    cross[range(n_masks), column] = False
    rows, columns = np.nonzero(cross)
    design = np.zeros((len(rows), n_masks + n_groups))
    design[range(len(rows)), rows] = 1
    design[range(len(rows)), n_masks + columns] = 1
    left = np.full(delta.shape, np.nan)
    if len(rows):
        fitted = design @ np.linalg.lstsq(design, delta[rows, columns], rcond=None)[0]
        left[rows, columns] = delta[rows, columns] - fitted
    return left
