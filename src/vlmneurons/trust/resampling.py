"""Resampling what belongs together: clusters, such as the questions about one picture, are drawn as one."""

from collections.abc import Sequence

import numpy as np

Members = Sequence[np.ndarray]


"""For each group the places of its questions."""


def mean_over(values: np.ndarray, members: Members) -> np.ndarray:
    """``[..., group]`` means of ``values[..., question]`` over each group's questions."""
    return np.stack([values[..., own].mean(-1) for own in members], -1)


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
