"""Resampling what belongs together: clusters, such as the questions about one picture, are drawn as one."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from vlmneurons.checks import as_whole, check_kind
from vlmneurons.errors import SelectionError
from vlmneurons.neurons.selection import Selection
from vlmneurons.selectors import Selector
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.items import GroupedItems, Grouping, ItemStatistics
from vlmneurons.trust.units import AS_RECORDED, units_of

_BLOCK = 256 * 2**20
"""Bytes of sums held at once."""

Members = Sequence[np.ndarray]
"""For each group the places of its questions."""


# -- questions drawn again and again, and what is selected from them -----------------------------------------------


def drawn_items(
    pool: GroupedItems, owners: np.ndarray | None = None, weights: np.ndarray | None = None
) -> Iterator[GroupedItems]:
    """Weighted questions, draw by draw, with their statistics at hand.

    The counts of all draws are sums over the same rows, so they are matrix products, several draws at a time.

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
    own_tokens = recording.tokens.numpy()[pool.rows]
    for start in range(0, len(weights), step):
        owner, weight = owners[start : start + step], weights[start : start + step]
        n_draws = len(owner)
        spread = np.zeros((n_draws, n_groups, len(pool.rows)), dtype=np.float64)
        np.put_along_axis(spread, owner[:, None], weight[:, None], 1)
        sums = {
            name: _summed(pool, name, torch.from_numpy(spread), fixed=bool((owner == pool.owner).all()))
            for name in recording.tables
            if name != "maximum"
        }
        tokens = spread @ own_tokens
        counts = spread.sum(-1)
        for draw in range(n_draws):
            one = pool.taken(
                np.repeat(np.arange(len(pool.rows)), weight[draw].astype(np.int64)),
                np.repeat(owner[draw], weight[draw].astype(np.int64)),
            )
            # As the cached property would have it, had it read the questions one by one.
            one.__dict__["statistics"] = ActivationStatistics(
                space=pool.space,
                groups=pool.groups,
                positive=sums["positive"][draw].to(torch.int64),
                tokens=torch.from_numpy(tokens[draw].astype(np.int64)),
                items=torch.from_numpy(counts[draw].astype(np.int64)),
                routed=sums["reached"][draw].to(torch.int64) if "reached" in sums else None,
                total=sums["total"][draw].double() if "total" in sums else None,
                provenance=pool.provenance,
            )
            yield one


def _summed(pool: GroupedItems, table: str, spread: torch.Tensor, *, fixed: bool) -> torch.Tensor:
    """``[draw, group, column]`` weighted sums of a table's rows, as matrix products, a chunk of rows at a time."""
    n_draws, n_groups, _ = spread.shape
    columns = pool.recording._columns(table)
    sums = torch.zeros((n_draws, n_groups, columns), dtype=torch.float64)
    # Questions that stay in their groups: each group's sums need its own rows alone.
    parts = [np.flatnonzero(pool.owner == g) for g in range(n_groups)] if fixed else [np.arange(len(pool.rows))]
    for number, part in enumerate(parts):
        where = slice(number, number + 1) if fixed else slice(0, n_groups)
        for place, values in pool.recording.chunks(pool.rows[part], table, size=256):
            chosen = spread[:, where][:, :, torch.from_numpy(part[place])].flatten(0, 1)
            numbers = torch.from_numpy(values.astype(np.float32))
            # float32 is twice as fast, and exact as long as no sum can reach 2^24.
            bound = float(chosen.sum(1).max()) * float(numbers.max()) if len(numbers) else 0.0
            if table == "total" or bound >= 2**24:
                product = chosen @ numbers.double()
            else:
                product = chosen.float() @ numbers
            sums[:, where] += product.view(n_draws, -1, columns)
    return sums


def check_selector(selector: object) -> None:
    """Refuse what is no selector, such as a selector's class.

    Raises:
        SelectionError: it is none.
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

    For intervals of whatever is computed from a selection: `layer_profile` takes them.

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
    units = units_of(items, by, condition, balanced, minimum, seed, unit)
    units.check_pictures(2)
    weights = units.resampled(resamples, np.random.default_rng(seed))
    return (selector.select(draw) for draw in drawn_items(units.pool, None, weights))
