"""How far a selection can be trusted: would other questions have given the same neurons, and would chance?

Everything here works on `ItemStatistics`, so no model is run: questions are resampled, labels are shuffled, and the
whole pipeline from counts to selection is gone through again each time.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats as scipy_stats

from vlmneurons.checks import of_kind, share, whole
from vlmneurons.errors import MismatchError, SelectionError
from vlmneurons.neurons.selection import Selection
from vlmneurons.neurons.sets import NeuronSet, check_same_space
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.selectors import CombinedSelector, Selector
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.items import GroupedItems, Grouping, ItemStatistics

if TYPE_CHECKING:
    import pandas as pd

_BLOCK = 256 * 2**20
"""Bytes of sums held at once."""

_AS_RECORDED = "group"

METHODS = ("bootstrap", "halves", "pools")
"""Questions drawn with replacement; two disjoint halves; two pools of one size with seeds of their own."""


def _pool(
    items: ItemStatistics | GroupedItems,
    by: Grouping,
    condition: str,
    balanced: bool | int,
    minimum: int,
    seed: int,
) -> GroupedItems:
    """The questions to draw from: those of a recording under a grouping, or the pool that is already there."""
    whole("seed", seed, SelectionError, least=0)
    minimum = whole("minimum", minimum, SelectionError)
    if isinstance(items, ItemStatistics):
        return items.grouped(by, condition=condition, balanced=balanced, minimum=minimum, seed=seed)
    if not isinstance(items, GroupedItems):
        raise SelectionError(f"questions are drawn from ItemStatistics or GroupedItems; got {type(items).__name__}")
    if by != _AS_RECORDED or condition != "correct":
        raise SelectionError("these questions are grouped already: leave by and condition out")
    items.check_size(minimum)
    return items if balanced is False else items.balanced(None if balanced is True else balanced, seed=seed)


def _check_selector(selector: Any) -> None:
    of_kind("selector", selector, Selector, SelectionError, "a Selector, such as CAS(0.01)")


def _drawn(pool: GroupedItems, owners: np.ndarray, weights: np.ndarray) -> Iterator[GroupedItems]:
    """Weighted questions, draw by draw, with their statistics at hand.

    Args:
        pool: the questions.
        owners: ``[draw, question]`` group of each question in each draw.
        weights: ``[draw, question]`` how often each question counts, whole numbers.
    """
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


def _draw_weights(pool: GroupedItems, method: str, resamples: int, size: int | None, seed: int) -> Iterator[np.ndarray]:
    """For each resample how often each question counts: one set of weights, or the two that are compared."""
    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(pool.owner == group) for group in range(len(pool.groups))]
    first = np.zeros((resamples, len(pool.rows)))
    second = np.zeros_like(first)
    for draw in range(resamples):
        for own in members:
            if method == "bootstrap":
                first[draw, own] = generator.multinomial(len(own), np.full(len(own), 1 / len(own)))
            elif method == "halves":
                order = generator.permutation(own)
                first[draw, order[: len(own) // 2]] = 1
                second[draw, order[len(own) // 2 :]] = 1
            else:
                assert size is not None
                first[draw, generator.permutation(own)[:size]] = 1
                second[draw, generator.permutation(own)[:size]] = 1
    yield first
    if method != "bootstrap":
        yield second


def resampled_selections(
    items: ItemStatistics | GroupedItems,
    selector: Selector,
    *,
    by: Grouping = _AS_RECORDED,
    condition: str = "correct",
    balanced: bool | int = False,
    minimum: int = 2,
    resamples: int = 200,
    seed: int = 0,
) -> Iterator[Selection]:
    """The selection from questions drawn with replacement within each group, again and again.

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

    Raises:
        SelectionError: a group has fewer questions than ``minimum``; the message names it.
    """
    _check_selector(selector)
    resamples = whole("resamples", resamples, SelectionError, least=1)
    pool = _pool(items, by, condition, balanced, minimum, seed)
    (weights,) = _draw_weights(pool, "bootstrap", resamples, None, seed)
    return (selector.select(one) for one in _drawn(pool, np.broadcast_to(pool.owner, weights.shape), weights))


def stability(
    items: ItemStatistics | GroupedItems,
    selector: Selector,
    *,
    by: Grouping = _AS_RECORDED,
    condition: str = "correct",
    balanced: bool | int = False,
    minimum: int = 2,
    method: str = "bootstrap",
    size: int | None = None,
    resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> "pd.DataFrame":
    """Would other questions have given the same neurons?

    For other prompts, other checkpoints or other seeds of the recording itself, select from each and use `agreement`.

    Args:
        items: counts of every question.
        selector: what selects.
        by: the grouping; see `ItemStatistics.grouped`.
        condition: which questions enter.
        balanced: cut the pool to the same number of questions of every group; see `ItemStatistics.grouped`.
        minimum: least number of questions of every group, at least 2.
        method: ``"bootstrap"`` compares the selection with that from questions drawn with replacement within each
            group; ``"halves"`` compares the selections from two disjoint random halves of each group; ``"pools"`` those
            from two random pools of ``size`` questions a group, as two seeds of a balanced pool would give.
        size: questions a group of each of the ``"pools"``; half of the smallest group unless given.
        resamples: how many times.
        confidence: level of the percentile interval of the overlap.
        seed: of the draws, and of the balanced pool.

    Returns:
        A row for each ``group``, and their mean as ``"all"``, with ``questions`` in the pool, ``jaccard`` (mean
        overlap), ``jaccard_low``, ``jaccard_high``, ``chance`` (expected overlap of two random sets of these sizes),
        ``spearman`` (mean rank correlation of the scores of all neurons; NaN for selectors without scores). Halves are
        smaller than the pool, so they understate how stable a selection from the whole pool is; a bootstrap shares
        questions with it, so it overstates.

    Raises:
        SelectionError: a group has fewer questions than are needed (the message names it), or no such method.
    """
    import pandas as pd

    if method not in METHODS:
        raise SelectionError(f"method={method!r} does not exist; choose from {', '.join(METHODS)}")
    if size is not None and method != "pools":
        raise SelectionError(f"size belongs to method='pools'; {method!r} takes none")
    _check_selector(selector)
    resamples = whole("resamples", resamples, SelectionError, least=1)
    confidence = share("confidence", confidence, SelectionError)
    pool = _pool(items, by, condition, balanced, max(2, whole("minimum", minimum, SelectionError)), seed)
    if method == "pools":
        size = int(pool.items.min()) // 2 if size is None else whole("size", size, SelectionError, least=1)
        pool.check_size(size)
    owners = np.broadcast_to(pool.owner, (resamples, len(pool.rows)))
    sides = [_drawn(pool, owners, weights) for weights in _draw_weights(pool, method, resamples, size, seed)]
    of_all = (selector.select(pool), _ranks(selector, pool)) if len(sides) == 1 else None
    overlaps, chances, correlations = [], [], []
    for draws in zip(*sides, strict=True):
        chosen = [(selector.select(one), _ranks(selector, one)) for one in draws]
        (first, first_ranks), (second, second_ranks) = (of_all, chosen[0]) if of_all is not None else chosen
        overlaps.append([first[group].jaccard(second[group]) for group in pool.groups])
        chances.append([first[group].expected_jaccard(second[group]) for group in pool.groups])
        correlations.append(_correlations(first_ranks, second_ranks, len(pool.groups)))
    overlap, chance, correlation = np.array(overlaps), np.array(chances), np.array(correlations)
    tail = 50 * (1 - confidence)
    rows = []
    for n, group in enumerate([*pool.groups, "all"]):
        values = overlap.mean(1) if n == len(pool.groups) else overlap[:, n]
        low, high = np.percentile(values, [tail, 100 - tail])
        rows.append(
            {
                "group": group,
                "questions": len(pool.rows) if n == len(pool.groups) else int(pool.items[n]),
                "jaccard": values.mean(),
                "jaccard_low": low,
                "jaccard_high": high,
                "chance": chance.mean() if n == len(pool.groups) else chance[:, n].mean(),
                "spearman": correlation.mean() if n == len(pool.groups) else correlation[:, n].mean(),
            }
        )
    return pd.DataFrame(rows)


def _ranks(selector: Selector, evidence: Any) -> np.ndarray | None:
    """Standardised ranks of all neurons, ``[group, neuron]``; None for combinations of sets, which have no scores."""
    if isinstance(selector, CombinedSelector):
        return None
    scores = selector.score(selector.read(evidence)).numpy()
    ranks = scipy_stats.rankdata(scores, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    length = np.sqrt((ranks**2).sum(1, keepdims=True))
    return np.divide(ranks, length, out=np.zeros_like(ranks), where=length > 0)


def _correlations(first: np.ndarray | None, second: np.ndarray | None, n_groups: int) -> list[float]:
    if first is None or second is None:
        return [float("nan")] * n_groups
    return (first * second).sum(1).tolist()


Measure = Callable[[Any, Selector], Mapping[str, float]]


def selection_strength(evidence: Any, selector: Selector) -> dict[str, float]:
    """Mean score of each group's selected neurons: what `null_distribution` compares unless told otherwise.

    A group for which nothing is selected has ``-inf``, less than any selection.

    Args:
        evidence: statistics, or counts of single questions, that the selector reads.
        selector: what selects.
    """
    _check_selector(selector)
    stats = selector.read(evidence)
    scores, selection = selector.score(stats), selector.select(stats)
    return {
        group: float(scores[row, selection[group].indices].mean()) if len(selection[group]) else -np.inf
        for row, group in enumerate(stats.groups)
    }


def null_distribution(
    items: ItemStatistics | GroupedItems,
    selector: Selector,
    *,
    by: Grouping = _AS_RECORDED,
    condition: str = "correct",
    balanced: bool | int = False,
    minimum: int = 1,
    permutations: int = 200,
    measure: Measure = selection_strength,
    seed: int = 0,
) -> "pd.DataFrame":
    """Would shuffled labels have given neurons as strong? The whole pipeline is run on each shuffle.

    A best-of-many selection always finds something; only its strength under shuffled labels says what that is worth.
    The p-value of a group is ``(1 + shuffles at least as strong) / (1 + shuffles)``, exact under exchangeability of the
    questions (Phipson & Smyth 2010), and never 0. The hypothesis is that *no* group differs: where one group does, the
    shuffles of the others contain its questions too.

    Args:
        items: counts of every question.
        selector: what selects.
        by: the grouping; its labels are shuffled among the questions that meet the condition.
        condition: which questions enter.
        balanced: cut the pool to the same number of questions of every group; see `ItemStatistics.grouped`.
        minimum: least number of questions of every group.
        permutations: how many shuffles.
        measure: strength of each group's selection, higher is stronger; gets the (grouped) questions and the selector.
        seed: of the shuffles, and of the balanced pool.

    Returns:
        A row for each ``group`` with ``questions``, ``strength``, ``null_mean``, ``null_high`` (95th percentile of the
        shuffles), ``p``, ``p_holm`` (Holm: any false finding) and ``p_bh`` (Benjamini & Hochberg: share of false
        findings).

    Raises:
        SelectionError: a single group, or one with fewer questions than ``minimum``; the message names it.
    """
    import pandas as pd

    from vlmneurons.trust.pvalues import holm

    _check_selector(selector)
    permutations = whole("permutations", permutations, SelectionError, least=1)
    of_kind("measure", measure, Callable, SelectionError, "a function")  # type: ignore[arg-type]
    pool = _pool(items, by, condition, balanced, max(1, whole("minimum", minimum, SelectionError)), seed)
    if len(pool.groups) < 2:
        raise SelectionError(f"labels of one group cannot be shuffled; got only {pool.groups[0]}")
    generator = np.random.default_rng(seed)
    observed = measure(pool, selector)
    owners = np.stack([generator.permutation(pool.owner) for _ in range(permutations)])
    drawn = [measure(one, selector) for one in _drawn(pool, owners, np.ones(owners.shape))]
    null = np.array([[one[group] for group in pool.groups] for one in drawn])
    strength = np.array([observed[group] for group in pool.groups])
    p = (1 + (null >= strength).sum(0)) / (1 + permutations)
    return pd.DataFrame(
        {
            "group": pool.groups,
            "questions": pool.items.numpy(),
            "strength": strength,
            "null_mean": null.mean(0),
            "null_high": np.percentile(null, 95, axis=0, method="higher"),
            "p": p,
            "p_holm": holm(p.tolist()),
            "p_bh": scipy_stats.false_discovery_control(p),
        }
    )


def sample_sizes(
    items: ItemStatistics | GroupedItems,
    selector: Selector,
    sizes: Sequence[int],
    *,
    by: Grouping = _AS_RECORDED,
    condition: str = "correct",
    repeats: int = 20,
    seed: int = 0,
) -> "pd.DataFrame":
    """How many questions a group are enough? The selection from few questions against that from all.

    Args:
        items: counts of every question.
        selector: what selects.
        sizes: numbers of questions a group, drawn without replacement.
        by: the grouping.
        condition: which questions enter.
        repeats: draws of each size.
        seed: of the draws.

    Returns:
        A row for each size and group with ``size``, ``group``, ``jaccard`` (overlap with the selection from all
        questions, mean over draws), ``jaccard_low`` and ``jaccard_high`` (smallest and largest), ``chance``, and
        ``between``, the mean overlap of two draws of this size. All questions contain the few, so ``jaccard`` is 1 at
        the size of the group; ``between`` is not flattered in this way as long as the size is well below it.

    Raises:
        SelectionError: no size, one below 1 or twice, or a group that has fewer questions than a size; the message
            names it.
    """
    import pandas as pd

    _check_selector(selector)
    repeats = whole("repeats", repeats, SelectionError, least=1)
    of_kind("sizes", sizes, Iterable, SelectionError, "a list of numbers of questions")
    sizes = [whole("each of sizes", size, SelectionError) for size in sizes]
    if not len(sizes) or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise SelectionError(f"sizes are numbers of questions, at least 1 and each once; got {list(sizes)}")
    pool = _pool(items, by, condition, False, max(sizes), seed)
    generator = np.random.default_rng(seed)
    reference = selector.select(pool)
    members = [np.flatnonzero(pool.owner == group) for group in range(len(pool.groups))]
    rows = []
    for size in sizes:
        weights = np.zeros((repeats, len(pool.rows)))
        for draw in range(repeats):
            for own in members:
                weights[draw, generator.choice(own, size, replace=False)] = 1
        owners = np.broadcast_to(pool.owner, weights.shape)
        selections = [selector.select(one) for one in _drawn(pool, owners, weights)]
        for group in pool.groups:
            overlap = [one[group].jaccard(reference[group]) for one in selections]
            chance = [one[group].expected_jaccard(reference[group]) for one in selections]
            between = [a[group].jaccard(b[group]) for a, b in itertools.pairwise(selections)]
            rows.append(
                {
                    "size": size,
                    "group": group,
                    "jaccard": np.mean(overlap),
                    "jaccard_low": np.min(overlap),
                    "jaccard_high": np.max(overlap),
                    "between": np.mean(between) if between else float("nan"),
                    "chance": np.mean(chance),
                }
            )
    return pd.DataFrame(rows)


def agreement(selections: Mapping[str, Selection]) -> "pd.DataFrame":
    """How far selectors agree: for each pair and group the Jaccard overlap, and what chance would give.

    Columns: ``first``, ``second``, ``group``, ``jaccard``, ``chance``.

    Args:
        selections: selections of the same groups and space, by name.

    Raises:
        MismatchError: the selections are of different groups or spaces.
    """
    import pandas as pd

    of_kind("selections", selections, Mapping, MismatchError, "a dictionary of selections by name")
    for name, one in selections.items():
        of_kind(f"selections[{name!r}]", one, Selection, MismatchError)
    names = list(selections)
    rows: list[dict[str, Any]] = []
    for n, first in enumerate(names):
        for second in names[n + 1 :]:
            a, b = selections[first], selections[second]
            if set(a) != set(b):
                raise MismatchError(f"{first!r} and {second!r} are of different groups")
            for group in a:
                rows.append(
                    {
                        "first": first,
                        "second": second,
                        "group": group,
                        "jaccard": a[group].jaccard(b[group]),
                        "chance": a[group].expected_jaccard(b[group]),
                    }
                )
    return pd.DataFrame(rows, columns=["first", "second", "group", "jaccard", "chance"])


def relatedness(evidence: Any, selector: Selector) -> "pd.DataFrame":
    """Whose neurons resemble whose? For each pair of groups, how alike their sets and their scores are.

    Args:
        evidence: what the selector selects from.
        selector: what selects. Rules that give a neuron to one group only (`CAS`, `LAPE`) have disjoint sets and
            scores that exclude each other; `MAD` or `LAP` show relations.

    Returns:
        A row for each pair with ``first``, ``second``, ``jaccard`` of their sets, ``chance`` (of two random sets of
        these sizes), ``spearman`` (rank correlation of the scores of all neurons; NaN for selectors without scores) and
        ``profile`` (correlation, over neurons, of the groups' activation probabilities less the mean over groups; NaN
        where there are no counts). With ``n`` unrelated groups the profiles correlate by ``-1 / (n - 1)``, not by 0.
    """
    import pandas as pd

    _check_selector(selector)
    selection = selector.select(evidence)
    ranks = _ranks(selector, evidence)
    stats = evidence.grouped() if isinstance(evidence, ItemStatistics) else evidence
    stats = stats.statistics if isinstance(stats, GroupedItems) else stats
    profile = None
    if isinstance(stats, ActivationStatistics):
        profile = stats.probability.numpy()
        profile -= profile.mean(0)
        profile -= profile.mean(1, keepdims=True)
        length = np.linalg.norm(profile, axis=1, keepdims=True)
        profile = np.divide(profile, length, out=np.zeros_like(profile), where=length > 0)
    rows = []
    for n, first in enumerate(selection.groups):
        for m, second in enumerate(selection.groups[n + 1 :], start=n + 1):
            rows.append(
                {
                    "first": first,
                    "second": second,
                    "jaccard": selection[first].jaccard(selection[second]),
                    "chance": selection[first].expected_jaccard(selection[second]),
                    "spearman": float("nan") if ranks is None else float(ranks[n] @ ranks[m]),
                    "profile": float("nan") if profile is None else float(profile[n] @ profile[m]),
                }
            )
    return pd.DataFrame(rows, columns=["first", "second", "jaccard", "chance", "spearman", "profile"])


def _layers(space: NeuronSpace) -> tuple[list[tuple[str, int]], np.ndarray, np.ndarray]:
    """The layers (of two towers, two layers), each neuron's, and their numbers of neurons."""
    labels = list(dict.fromkeys((site.tower, site.layer) for site in space.sites))
    of_site = np.array([labels.index((site.tower, site.layer)) for site in space.sites])
    layer_of = of_site[space.site_of.numpy()]
    return labels, layer_of, np.bincount(layer_of, minlength=len(labels))


def layer_counts(selection: Selection, *, confidence: float = 0.95) -> "pd.DataFrame":
    """How many of each group's neurons lie in each layer, against a uniform choice of as many neurons.

    Args:
        selection: the neurons.
        confidence: level of the interval of a uniform choice.

    Returns:
        A row for each group and layer with ``group``, ``tower``, ``layer``, ``neurons``, ``expected`` under uniform
        choice, ``low`` and ``high`` (the interval that a uniform choice falls into; hypergeometric, exact for one
        layer, not for all of them at once) and ``ratio``, neurons over expected.
    """
    import pandas as pd

    of_kind("selection", selection, Selection, MismatchError)
    confidence = share("confidence", confidence, SelectionError)
    labels, layer_of, sizes = _layers(selection.space)
    tail = (1 - confidence) / 2
    rows = []
    for group, neurons in selection.items():
        counts = np.bincount(layer_of[neurons.indices.numpy()], minlength=len(labels))
        low, high = scipy_stats.hypergeom.ppf([[tail], [1 - tail]], sizes.sum(), sizes, len(neurons))
        expected = len(neurons) * sizes / sizes.sum()
        for n, (tower, layer) in enumerate(labels):
            rows.append(
                {
                    "group": group,
                    "tower": tower,
                    "layer": layer,
                    "neurons": int(counts[n]),
                    "expected": expected[n],
                    "low": int(low[n]),
                    "high": int(high[n]),
                    "ratio": counts[n] / expected[n] if len(neurons) else float("nan"),
                }
            )
    return pd.DataFrame(rows)


def layer_profile(
    selection: Selection,
    *,
    resampled: Iterable[Selection] = (),
    uniform: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> "pd.DataFrame":
    """How concentrated each group's neurons are in a few layers, against a uniform choice of as many neurons.

    Args:
        selection: the neurons.
        resampled: selections from resampled questions, for intervals of the concentration; see `resampled_selections`.
        uniform: number of uniform choices that their interval is estimated from.
        confidence: level of the intervals.
        seed: of the uniform choices.

    Returns:
        A row for each ``group`` with ``neurons``; ``gini`` (0 if spread evenly over layers, towards 1 if in one layer)
        and ``entropy`` (nats, of the shares of the layers), each with ``_uniform_low`` and ``_uniform_high``, the
        interval that a uniform choice of as many neurons falls into, and, if there are resampled selections, ``_low``
        and ``_high``; and ``top_tower`` and ``top_layer``, where most neurons are, with ``top_share`` of the neurons
        and ``top_expected``, that layer's share of all neurons. Resampled selections are less concentrated the less
        stable they are, so their interval need not contain the value.

    Raises:
        MismatchError: something else than selections, or selections of different spaces.
        SelectionError: a confidence, number of choices or seed that is none.
    """
    import pandas as pd

    of_kind("selection", selection, Selection, MismatchError)
    if isinstance(resampled, Selection):
        raise MismatchError("resampled is several selections, such as resampled_selections gives; got a single one")
    of_kind("resampled", resampled, Iterable, MismatchError, "several selections, such as resampled_selections gives")
    confidence = share("confidence", confidence, SelectionError)
    uniform = whole("uniform", uniform, SelectionError, least=1)
    labels, layer_of, sizes = _layers(selection.space)
    generator = np.random.default_rng(whole("seed", seed, SelectionError, least=0))
    tails = [50 * (1 - confidence), 100 - 50 * (1 - confidence)]

    def counted(neurons: NeuronSet) -> np.ndarray:
        return np.bincount(layer_of[neurons.indices.numpy()], minlength=len(labels))

    again: dict[str, list[np.ndarray]] = {group: [] for group in selection}
    for other in resampled:
        of_kind("each of resampled", other, Selection, MismatchError)
        check_same_space(selection.space, other.space)
        for group in selection:
            if len(other[group]):
                again[group].append(counted(other[group]))
    known: dict[int, np.ndarray] = {}
    rows = []
    for group, neurons in selection.items():
        counts, size = counted(neurons), len(neurons)
        row: dict[str, Any] = {"group": group, "neurons": size}
        if size:
            if size not in known:
                known[size] = generator.multivariate_hypergeometric(sizes, size, uniform, method="marginals")
            for name, measure in (("gini", _gini), ("entropy", _entropy)):
                row[name] = float(measure(counts))
                row[f"{name}_uniform_low"], row[f"{name}_uniform_high"] = np.percentile(measure(known[size]), tails)
                if again[group]:
                    row[f"{name}_low"], row[f"{name}_high"] = np.percentile(measure(np.stack(again[group])), tails)
            top = int(counts.argmax())
            row |= {
                "top_tower": labels[top][0],
                "top_layer": labels[top][1],
                "top_share": counts[top] / size,
                "top_expected": sizes[top] / sizes.sum(),
            }
        rows.append(row)
    return pd.DataFrame(rows)


def _gini(counts: np.ndarray) -> Any:
    """Gini coefficient of non-negative counts along the last axis."""
    ordered = np.sort(counts, -1)
    n = ordered.shape[-1]
    weight = 2 * np.arange(1, n + 1) - n - 1
    return (ordered * weight).sum(-1) / (n * ordered.sum(-1))


def _entropy(counts: np.ndarray) -> Any:
    """Entropy, in nats, of the shares along the last axis."""
    return scipy_stats.entropy(counts, axis=-1)


def overlap_by_layer(first: NeuronSet, second: NeuronSet) -> "pd.DataFrame":
    """Where two sets overlap: a row for each layer with the size of either set, of both, and what chance would share.

    Columns: ``tower``, ``layer``, ``first``, ``second``, ``both``, ``expected`` (of two random sets of these sizes in
    the layer).

    Args:
        first: a set of neurons.
        second: another one of the same space.

    Raises:
        MismatchError: the sets are of different spaces.
    """
    import pandas as pd

    for name, one in (("first", first), ("second", second)):
        of_kind(name, one, NeuronSet, MismatchError, "a NeuronSet, such as selection['Japan']")
    both = first & second
    labels, layer_of, sizes = _layers(first.space)
    ours, theirs, shared = (
        np.bincount(layer_of[neurons.indices.numpy()], minlength=len(labels)) for neurons in (first, second, both)
    )
    return pd.DataFrame(
        {
            "tower": [tower for tower, _ in labels],
            "layer": [layer for _, layer in labels],
            "first": ours,
            "second": theirs,
            "both": shared,
            "expected": ours * theirs / sizes,
        }
    )
