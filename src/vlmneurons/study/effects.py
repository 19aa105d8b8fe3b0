"""The arithmetic of a study: effects of masks, their intervals, and tests, on arrays of changes.

Nothing here knows models or files. A *change* is what a mask does to one question: 1 where a wrong answer turns right,
-1 where a right one turns wrong, 0 else (or a difference of margins). Repeats of a control are averaged before.
Questions that belong together, such as those about one picture, are a *cluster*, and are resampled and flipped as one.
"""

from collections.abc import Sequence

import numpy as np


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
