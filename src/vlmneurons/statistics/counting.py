"""Counting, as functions from tensors to tensors: every engine calls them, whether the model runs here or elsewhere.

They are given a site's activations (``values``) and which of them count, and give a dictionary of tables with a row for
each row of the batch: ``fired`` ``[row, neuron]``, the number of counted tokens at which a neuron is above zero;
``tokens`` ``[row]``, the number of counted tokens; ``bad`` ``[row]``, whether a counted token has values that are not
finite; and, where they are wanted, ``total`` and ``maximum`` ``[row, neuron]``. Counts are int64, totals float64, and
maxima float32 (``-inf`` in a row without a counted token).

A remote job sends these functions by their source (see `vlmneurons.run.remote`), so they use PyTorch and each other,
and nothing else; ``no_type_check`` keeps the tests' checks of shapes, which do not travel, off them.
"""

from typing import no_type_check

import torch

CPU_BLOCK = 2**20
"""How many values are compared at once on a CPU, as float32: as many as its cache holds."""

DEVICE_BLOCK = 2**26
"""The same on a GPU: few beside what it holds."""


@no_type_check
def count_tokens(values, mask, totals=False, maxima=False, scratch=None, strict=True):
    """Counts of the tokens of rows.

    Args:
        values: ``[row, token, neuron]``, or ``[row * token, neuron]``.
        mask: ``[row, token]`` which tokens count.
        totals: whether sums of the values are wanted.
        maxima: whether their maxima are.
        scratch: a dictionary that keeps memory, and what the sites of a device share, from call to call; empty it
            where the mask changes.
        strict: whether to look for values that are not finite.
    """
    scratch = {} if scratch is None else scratch
    if ("mask", values.device) not in scratch:
        counted = mask.to(values.device)
        scratch["mask", values.device] = counted, counted.to(torch.float32), counted.sum(1)
    counted, weights, tokens = scratch["mask", values.device]
    values = values.reshape(*counted.shape, values.shape[-1])
    counts = {"fired": fired_by_row(values, weights, scratch), "tokens": tokens, "total": None, "maximum": None}
    counts["bad"] = rows_not_finite(values, counted) if strict else None
    if totals:
        counts["total"] = torch.where(counted[..., None], values, 0).sum(1, dtype=torch.float64)
    if maxima:
        counts["maximum"] = torch.where(counted[..., None], values, -torch.inf).amax(1).float()
    return counts


@no_type_check
def count_patches(values, real, owner, n_rows, totals=False, maxima=False, scratch=None, strict=True):
    """Counts of the patches of pictures, of which each row of a batch has some.

    Args:
        values: ``[part, patch, neuron]``: tiles, pictures, or patches of length 1.
        real: ``[part, patch]`` which patches are no padding.
        owner: ``[part]`` the row that each part is of.
        n_rows: how many rows the batch has.
        totals: see `count_tokens`.
        maxima: see `count_tokens`.
        scratch: see `count_tokens`.
        strict: see `count_tokens`.
    """
    scratch = {} if scratch is None else scratch
    real, owner = real.to(values.device), owner.to(values.device)
    rows = torch.arange(n_rows, device=values.device)[:, None]
    weights = ((rows == owner)[..., None] & real).flatten(1).to(torch.float32)
    counts = {"fired": fired_by_owner(values.flatten(0, 1), weights, scratch), "total": None, "maximum": None}
    counts["tokens"] = weights.sum(1).to(torch.int64)
    counts["bad"] = None
    if strict:
        parts = rows_not_finite(values, real).to(torch.int64)
        counts["bad"] = torch.zeros(n_rows, dtype=torch.int64, device=values.device).index_add_(0, owner, parts) > 0
    if totals:
        by_part = torch.where(real[..., None], values, 0).sum(1, dtype=torch.float64)
        counts["total"] = by_part.new_zeros((n_rows, values.shape[-1])).index_add_(0, owner, by_part)
    if maxima:
        counts["maximum"] = maxima_of(torch.where(real[..., None], values, -torch.inf).amax(1), owner, n_rows)
    return counts


@no_type_check
def count_routed(values, places, mask, totals=False, maxima=False, strict=True):
    """Counts of an expert, which sees only the tokens that a router sends to it.

    Args:
        values: ``[token, neuron]``, of the tokens that it sees.
        places: ``[token]`` their places in the flattened batch.
        mask: ``[row, token]`` which tokens of the batch count.
        totals: see `count_tokens`.
        maxima: see `count_tokens`.
        strict: see `count_tokens`.
    """
    # A token that does not count is weighed with zero and not left out: the host would have to wait to know the rest.
    n_rows, length = mask.shape
    counted = mask.to(values.device).reshape(-1)[places]
    row = torch.div(places, length, rounding_mode="floor")

    def by_row(of_tokens):
        return of_tokens.new_zeros((n_rows, *of_tokens.shape[1:])).index_add_(0, row, of_tokens)

    counts = {"fired": by_row(((values > 0) & counted[:, None]).to(torch.int64)), "total": None, "maximum": None}
    counts["tokens"], counts["bad"] = by_row(counted.to(torch.int64)), None
    if strict:
        counts["bad"] = by_row((~torch.isfinite(values).all(-1) & counted).to(torch.int64)) > 0
    if totals:
        counts["total"] = by_row(torch.where(counted[:, None], values, 0).to(torch.float64))
    if maxima:
        counts["maximum"] = maxima_of(torch.where(counted[:, None], values, -torch.inf), row, n_rows)
    return counts


# -- values above zero -------------------------------------------------------------------------------------------------
#
# ``values > 0`` is written as 0.0 and 1.0 into memory that is used again and again, and multiplied by the weights of
# the tokens (1 if counted) while it is still in the cache: that masks and sums in one pass, several times faster than
# making a new table of booleans and summing it. float32 holds the sums exactly, as no row has 2^24 tokens; so does
# TF32, whose inputs 0 and 1 are exact and whose sums are float32. Under autocast the products would be bfloat16, which
# counts to 256 only: so it is off here, whatever is around.


@no_type_check
def fired_by_row(values, weights, scratch):
    """For each row how many counted tokens a neuron fires at: ``[row, token, neuron]`` and ``[row, token]``."""
    rows = _block(values) // max(1, values.shape[1] * values.shape[2])
    if rows == 0:  # one row is more than is compared at once
        return torch.cat([fired_by_owner(part, weights[row, None], scratch) for row, part in enumerate(values)])
    with torch.autocast(values.device.type, enabled=False):
        fired = [
            torch.bmm(weights[start : start + rows, None], _fires(values[start : start + rows], scratch)).squeeze(1)
            for start in range(0, len(values), rows)
        ]
    return torch.cat(fired).to(torch.int64)


@no_type_check
def fired_by_owner(values, weights, scratch):
    """The same for values ``[token, neuron]``, where ``weights[row, token]`` is 1 if the token is the row's."""
    step = max(1, _block(values) // values.shape[-1])
    fired = torch.zeros((len(weights), values.shape[-1]), dtype=torch.float32, device=values.device)
    with torch.autocast(values.device.type, enabled=False):
        for start in range(0, len(values), step):
            fired.addmm_(weights[:, start : start + step], _fires(values[start : start + step], scratch))
    return fired.to(torch.int64)


@no_type_check
def _block(values):
    """How many values are compared at once; never more than take the memory of the values themselves."""
    most = CPU_BLOCK if values.device.type == "cpu" else DEVICE_BLOCK
    return min(most, values.numel() * values.element_size() // 4)


@no_type_check
def _fires(values, scratch):
    """1.0 where a value is above zero, else 0.0; overwritten by the next call."""
    with torch.inference_mode(False), torch.no_grad():  # what inference mode made, no run outside of it could write to
        buffer = scratch.get(values.device)
        if buffer is None or buffer.numel() < values.numel():
            buffer = torch.empty(values.numel(), dtype=torch.float32, device=values.device)
            scratch[values.device] = buffer
        return torch.gt(values, 0, out=buffer[: values.numel()].view(values.shape))


@no_type_check
def rows_not_finite(values, mask):
    """``[row]`` whether a counted token of a row has NaN or infinite values."""
    if values.device.type == "cpu":
        # One sum tells that all is well, or calls for a closer look: it may overflow, or be of a token not counted.
        if torch.isfinite(values.sum(dtype=torch.float32)):
            return torch.zeros(len(mask), dtype=torch.bool)
        return (~torch.isfinite(values).all(-1) & mask).any(-1)
    # Elsewhere the host is not to wait for the device: what is not finite is the lowest value, the highest, or both.
    lowest, highest = torch.aminmax(values, dim=-1)
    return (~(torch.isfinite(lowest) & torch.isfinite(highest)) & mask).any(-1)


@no_type_check
def maxima_of(values, owner, n_rows):
    """``[row, neuron]`` the highest of the values ``[part, neuron]`` of each row's parts; -inf for one without any."""
    highest = torch.full((n_rows, values.shape[-1]), -torch.inf, dtype=torch.float32, device=values.device)
    for row in owner.unique().tolist():  # a batch has few rows, and index_reduce_ warns that it may change
        highest[row] = values[owner == row].amax(0)
    return highest
