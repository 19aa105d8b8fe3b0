"""The statistics of questions drawn again and again, and what is selected from them."""

from collections.abc import Iterator

import numpy as np
import torch

from vlmneurons.checks import as_whole, check_kind
from vlmneurons.errors import SelectionError
from vlmneurons.neurons.selection import Selection
from vlmneurons.selectors import Selector
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.items import GroupedItems, Grouping, ItemStatistics
from vlmneurons.trust.units import AS_RECORDED, units_to_draw

_BLOCK = 256 * 2**20
"""Bytes of sums held at once."""


def drawn_items(
    pool: GroupedItems, owners: np.ndarray | None = None, weights: np.ndarray | None = None
) -> Iterator[GroupedItems]:
    """Weighted questions, draw by draw, with their statistics computed.

    The counts of every draw are sums over the same rows, so they are made by matrix products, several draws at a time.

    Args:
        pool: the questions.
        owners: ``[draw, question]`` group of each question in each draw; None where all stay in theirs.
        weights: ``[draw, question]`` how often each question counts, whole numbers; None where each counts once.
    """
    if weights is None:
        weights = np.ones((1 if owners is None else len(owners), len(pool.rows)), dtype=np.int64)
    owners = np.broadcast_to(pool.owner, weights.shape) if owners is None else owners
    recording, n_groups = pool.recording, len(pool.groups)
    step = max(1, _BLOCK // (8 * n_groups * len(pool.space)))
    question_tokens = recording.tokens.numpy()[pool.rows]
    for start in range(0, len(weights), step):
        owner, weight = owners[start : start + step], weights[start : start + step]
        n_draws = len(owner)
        spread = np.zeros((n_draws, n_groups, len(pool.rows)), dtype=np.float64)  # the weights, by group
        np.put_along_axis(spread, owner[:, None], weight[:, None], 1)
        sums = {
            name: _summed(pool, name, torch.from_numpy(spread), fixed=bool((owner == pool.owner).all()))
            for name in recording.tables
            if name != "maximum"
        }
        tokens = spread @ question_tokens
        counts = spread.sum(-1)
        for draw in range(n_draws):
            times = weight[draw].astype(np.int64)
            drawn = pool.taken(np.repeat(np.arange(len(pool.rows)), times), np.repeat(owner[draw], times))
            # As the cached property would have it, had it read the questions one by one.
            drawn.__dict__["statistics"] = ActivationStatistics(
                space=pool.space,
                groups=pool.groups,
                positive=sums["positive"][draw].to(torch.int64),
                tokens=torch.from_numpy(tokens[draw].astype(np.int64)),
                items=torch.from_numpy(counts[draw].astype(np.int64)),
                routed=sums["reached"][draw].to(torch.int64) if "reached" in sums else None,
                total=sums["total"][draw].double() if "total" in sums else None,
                provenance=pool.provenance,
            )
            yield drawn


def _summed(pool: GroupedItems, table: str, spread: torch.Tensor, *, fixed: bool) -> torch.Tensor:
    """``[draw, group, column]`` weighted sums of a table's rows, as matrix products, a chunk of rows at a time."""
    n_draws, n_groups, _ = spread.shape
    columns = len(pool.space.sites if table == "reached" else pool.space)
    sums = torch.zeros((n_draws, n_groups, columns), dtype=torch.float64)
    # Where questions stay in their groups, the sums of a group need its rows alone; else those of all groups need all.
    parts = [(slice(group, group + 1), np.flatnonzero(pool.owner == group)) for group in range(n_groups)]
    for groups, part in parts if fixed else [(slice(0, n_groups), np.arange(len(pool.rows)))]:
        for places, values in pool.recording.chunks(pool.rows[part], table, size=256):
            weights = spread[:, groups][:, :, torch.from_numpy(part[places])].flatten(0, 1)
            numbers = torch.from_numpy(values.astype(np.float32))
            # float32 is twice as fast, and exact as long as no sum can reach 2^24.
            bound = float(weights.sum(1).max()) * float(numbers.max()) if len(numbers) else 0.0
            exact = table != "total" and bound < 2**24
            product = weights.float() @ numbers if exact else weights @ numbers.double()
            sums[:, groups] += product.view(n_draws, -1, columns)
    return sums


def check_selector(selector: object) -> None:
    """Refuse what is not a selector, such as a selector's class.

    Raises:
        SelectionError: it is not one.
    """
    check_kind("selector", selector, Selector, SelectionError, "a Selector, such as CAS(0.01)")


def resampled_selections(
    items: ItemStatistics | GroupedItems,
    selector: Selector,
    *,
    by: Grouping = AS_RECORDED,
    condition: str = "correct",
    balanced: bool | int = False,
    minimum: int = 2,
    resamples: int = 200,
    seed: int = 0,
    unit: str = "picture",
) -> Iterator[Selection]:
    """The selection from pictures drawn with replacement within each group, with all their questions, again and again.

    They give intervals of whatever is computed from a selection: `layer_profile` takes them.

    Args:
        items: counts of every question.
        selector: what selects.
        by: the grouping; see `ItemStatistics.grouped`.
        condition: which questions enter.
        balanced: cut the pool to the same number of questions of every group; see `ItemStatistics.grouped`.
        minimum: least number of questions of every group.
        resamples: how many times.
        seed: of the draws, and of the balanced pool.
        unit: ``"question"`` draws single questions, as if each had a picture of its own.

    Raises:
        SelectionError: a group has fewer questions than ``minimum``, or fewer than two pictures (the message names it);
            or a recording of an earlier release, which does not keep pictures.
    """
    check_selector(selector)
    resamples = as_whole("resamples", resamples, SelectionError, least=1)
    units = units_to_draw(items, by, condition, balanced, minimum, seed, unit)
    weights = units.resampled(resamples, np.random.default_rng(seed))
    return (selector.select(draw) for draw in drawn_items(units.pool, None, weights))
