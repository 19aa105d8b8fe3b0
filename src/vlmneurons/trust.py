"""How far a selection can be trusted: would other questions have given the same neurons, and would chance?

Everything here works on `ItemStatistics`, so no model is run: questions are resampled, labels are shuffled, and the
whole pipeline from counts to selection is gone through again each time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats as scipy_stats

from vlmneurons.errors import MismatchError, SelectionError
from vlmneurons.items import Grouping, ItemStatistics
from vlmneurons.neurons import NeuronSet, Selection
from vlmneurons.selectors import Selector
from vlmneurons.statistics import ActivationStatistics

if TYPE_CHECKING:
    import pandas as pd

_BLOCK = 256 * 2**20
"""Bytes of sums held at once."""


@dataclass(frozen=True)
class _Sample:
    """Questions that can be drawn from: their rows on disk and their groups."""

    items: ItemStatistics
    rows: np.ndarray
    owner: np.ndarray
    groups: tuple[str, ...]
    condition: str

    @classmethod
    def of(cls, items: ItemStatistics, by: Grouping, condition: str, minimum: int = 1) -> "_Sample":
        labels = items.labels(by)
        kept = items.kept(condition).tolist()
        rows = np.array([n for n, label in enumerate(labels) if label is not None and kept[n]], dtype=np.int64)
        groups = tuple(sorted({label for label in labels if label is not None}))
        owner = np.array([groups.index(labels[row]) for row in rows], dtype=np.int64)  # type: ignore[arg-type]
        counts = np.bincount(owner, minlength=len(groups))
        thin = [f"{group} ({n})" for group, n in zip(groups, counts, strict=True) if n < minimum]
        if thin:
            raise SelectionError(f"at least {minimum} questions a group are needed; fewer are in {', '.join(thin)}")
        return cls(items, rows, owner, groups, condition)

    def drawn(self, owners: np.ndarray, weights: np.ndarray) -> Iterator[ActivationStatistics]:
        """Statistics of weighted questions, draw by draw.

        Args:
            owners: ``[draw, question]`` group of each question in each draw.
            weights: ``[draw, question]`` how often each question counts, whole numbers.
        """
        items, n_groups = self.items, len(self.groups)
        width = len(items.space)
        step = max(1, _BLOCK // (8 * n_groups * width))
        own_tokens = items.tokens.numpy()[self.rows]
        for start in range(0, len(weights), step):
            owner, weight = owners[start : start + step], weights[start : start + step]
            n_draws = len(owner)
            spread = np.zeros((n_draws, n_groups, len(self.rows)), dtype=np.float64)
            np.put_along_axis(spread, owner[:, None], weight[:, None], 1)
            sums = {
                name: self._summed(name, torch.from_numpy(spread), fixed=bool((owner == owner[0]).all()))
                for name in items.tables
                if name != "maximum"
            }
            tokens = spread @ own_tokens
            counts = spread.sum(-1)
            for draw in range(n_draws):
                yield ActivationStatistics(
                    space=items.space,
                    groups=self.groups,
                    positive=sums["positive"][draw].to(torch.int64),
                    tokens=torch.from_numpy(tokens[draw].astype(np.int64)),
                    items=torch.from_numpy(counts[draw].astype(np.int64)),
                    routed=sums["reached"][draw].to(torch.int64) if "reached" in sums else None,
                    total=sums["total"][draw] if "total" in sums else None,
                    provenance={**items.provenance, "condition": self.condition},
                )

    def _summed(self, table: str, spread: torch.Tensor, *, fixed: bool) -> torch.Tensor:
        """``[draw, group, column]`` weighted sums of a table's rows, as matrix products, a chunk of rows at a time."""
        n_draws, n_groups, _ = spread.shape
        columns = self.items._columns(table)
        sums = torch.zeros((n_draws, n_groups, columns), dtype=torch.float64)
        # Questions that stay in their groups: each group's sums need its own rows alone.
        parts = [np.flatnonzero(self.owner == g) for g in range(n_groups)] if fixed else [np.arange(len(self.rows))]
        for number, part in enumerate(parts):
            where = slice(number, number + 1) if fixed else slice(0, n_groups)
            for place, values in self.items.chunks(self.rows[part], table, size=256):
                chosen = spread[:, where][:, :, torch.from_numpy(part[place])].flatten(0, 1)
                numbers = torch.from_numpy(values.astype(np.float32))
                # float32 is twice as fast, and exact as long as no sum can reach 2^24.
                bound = float(chosen.sum(1).max()) * float(numbers.max()) if len(numbers) else 0.0
                if table == "total" or bound >= 2**24:
                    product = chosen @ numbers.double()
                else:
                    product = (chosen.float() @ numbers).double()
                sums[:, where] += product.view(n_draws, -1, columns)
        return sums


def stability(
    items: ItemStatistics,
    selector: Selector,
    *,
    by: Grouping = "group",
    condition: str = "correct",
    method: str = "bootstrap",
    resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> "pd.DataFrame":
    """Would other questions have given the same neurons?

    Args:
        items: counts of every question.
        selector: what selects.
        by: the grouping; see `ItemStatistics.group_by`.
        condition: which questions enter.
        method: ``"bootstrap"`` compares the selection with that from questions drawn with replacement within each
            group; ``"halves"`` compares the selections from two disjoint random halves of each group.
        resamples: how many times.
        confidence: level of the percentile interval of the overlap.
        seed: of the draws.

    Returns:
        A row for each group, and their mean as ``"all"``: ``jaccard`` (mean overlap), ``jaccard_low``,
        ``jaccard_high``, ``chance`` (expected overlap of two random sets of these sizes), ``spearman`` (mean rank
        correlation of the scores of all neurons; NaN for selectors without scores).

    Raises:
        SelectionError: fewer than two questions in a group, or no such method.
    """
    import pandas as pd

    if method not in ("bootstrap", "halves"):
        raise SelectionError(f"method={method!r} does not exist; choose from bootstrap, halves")
    sample = _Sample.of(items, by, condition, minimum=2)
    generator = np.random.default_rng(seed)
    full = items.group_by(by, condition=condition)
    reference = selector.select(full)
    members = [np.flatnonzero(sample.owner == group) for group in range(len(sample.groups))]
    weights = np.zeros((resamples, len(sample.rows)))
    for draw in range(resamples):
        for own in members:
            if method == "bootstrap":
                weights[draw, own] = generator.multinomial(len(own), np.full(len(own), 1 / len(own)))
            else:
                weights[draw, generator.permutation(own)[: len(own) // 2]] = 1
    owners = np.broadcast_to(sample.owner, weights.shape)
    pairs: Iterator[tuple[Selection, np.ndarray | None, Selection, np.ndarray | None]]
    if method == "bootstrap":
        ranks = _ranks(selector, full)
        pairs = (
            (reference, ranks, selector.select(one), _ranks(selector, one)) for one in sample.drawn(owners, weights)
        )
    else:
        halves = zip(sample.drawn(owners, weights), sample.drawn(owners, 1 - weights), strict=True)
        pairs = ((selector.select(a), _ranks(selector, a), selector.select(b), _ranks(selector, b)) for a, b in halves)
    overlaps, chances, correlations = [], [], []
    for first, first_ranks, second, second_ranks in pairs:
        overlaps.append([first[group].jaccard(second[group]) for group in sample.groups])
        chances.append([first[group].expected_jaccard(second[group]) for group in sample.groups])
        correlations.append(_correlations(first_ranks, second_ranks, len(sample.groups)))
    overlap, chance, correlation = np.array(overlaps), np.array(chances), np.array(correlations)
    tail = 50 * (1 - confidence)
    rows = []
    for n, group in enumerate([*sample.groups, "all"]):
        values = overlap.mean(1) if group == "all" else overlap[:, n]
        low, high = np.percentile(values, [tail, 100 - tail])
        rows.append(
            {
                "group": group,
                "questions": len(sample.rows) if group == "all" else len(members[n]),
                "jaccard": values.mean(),
                "jaccard_low": low,
                "jaccard_high": high,
                "chance": chance.mean() if group == "all" else chance[:, n].mean(),
                "spearman": correlation.mean() if group == "all" else correlation[:, n].mean(),
            }
        )
    return pd.DataFrame(rows)


def _ranks(selector: Selector, stats: ActivationStatistics) -> np.ndarray | None:
    """Standardised ranks of all neurons, ``[group, neuron]``; None for combinations of sets, which have no scores."""
    try:
        scores = selector.score(stats).numpy()
    except SelectionError:
        return None
    ranks = scipy_stats.rankdata(scores, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    length = np.sqrt((ranks**2).sum(1, keepdims=True))
    return np.divide(ranks, length, out=np.zeros_like(ranks), where=length > 0)


def _correlations(first: np.ndarray | None, second: np.ndarray | None, n_groups: int) -> list[float]:
    if first is None or second is None:
        return [float("nan")] * n_groups
    return (first * second).sum(1).tolist()


Measure = Callable[[ActivationStatistics, Selector], Mapping[str, float]]


def selection_strength(stats: ActivationStatistics, selector: Selector) -> dict[str, float]:
    """Mean score of each group's selected neurons: what `null_distribution` compares unless told otherwise.

    A group for which nothing is selected has 0, less than any selected neuron of a contrastive selector.
    """
    scores, selection = selector.score(stats), selector.select(stats)
    return {
        group: float(scores[row, selection[group].indices].mean()) if len(selection[group]) else 0.0
        for row, group in enumerate(stats.groups)
    }


def null_distribution(
    items: ItemStatistics,
    selector: Selector,
    *,
    by: Grouping = "group",
    condition: str = "correct",
    permutations: int = 200,
    measure: Measure = selection_strength,
    seed: int = 0,
) -> "pd.DataFrame":
    """Would shuffled labels have given neurons as strong? The whole pipeline is run on each shuffle.

    A best-of-many selection always finds something; only its strength under shuffled labels says what that is worth.
    The p-value of a group is ``(1 + shuffles at least as strong) / (1 + shuffles)``, exact under exchangeability of the
    questions (Phipson & Smyth 2010), and never 0.

    Args:
        items: counts of every question.
        selector: what selects.
        by: the grouping; its labels are shuffled among the questions that meet the condition.
        condition: which questions enter.
        permutations: how many shuffles.
        measure: strength of each group's selection, higher is stronger.
        seed: of the shuffles.

    Returns:
        A row for each group: ``strength``, ``null_mean``, ``null_high`` (95th percentile of the shuffles), ``p``,
        ``p_holm`` (Holm: any false finding) and ``p_bh`` (Benjamini & Hochberg: share of false findings).
    """
    import pandas as pd

    from vlmneurons.study import holm

    sample = _Sample.of(items, by, condition)
    if len(sample.groups) < 2:
        raise SelectionError(f"labels of one group cannot be shuffled; got only {sample.groups[0]}")
    generator = np.random.default_rng(seed)
    observed = measure(items.group_by(by, condition=condition), selector)
    owners = np.stack([generator.permutation(sample.owner) for _ in range(permutations)])
    drawn = [measure(stats, selector) for stats in sample.drawn(owners, np.ones(owners.shape))]
    null = np.array([[one[group] for group in sample.groups] for one in drawn])
    strength = np.array([observed[group] for group in sample.groups])
    p = (1 + (null >= strength).sum(0)) / (1 + permutations)
    return pd.DataFrame(
        {
            "group": sample.groups,
            "questions": np.bincount(sample.owner, minlength=len(sample.groups)),
            "strength": strength,
            "null_mean": null.mean(0),
            "null_high": np.percentile(null, 95, axis=0),
            "p": p,
            "p_holm": holm(p.tolist()),
            "p_bh": scipy_stats.false_discovery_control(p),
        }
    )


def sample_sizes(
    items: ItemStatistics,
    selector: Selector,
    sizes: Sequence[int],
    *,
    by: Grouping = "group",
    condition: str = "correct",
    repeats: int = 20,
    seed: int = 0,
) -> "pd.DataFrame":
    """How many questions a group are enough? Overlap of the selection from few questions with that from all.

    Args:
        items: counts of every question.
        selector: what selects.
        sizes: numbers of questions a group, drawn without replacement.
        by: the grouping.
        condition: which questions enter.
        repeats: draws of each size.
        seed: of the draws.

    Returns:
        A row for each size and group: ``size``, ``group``, ``jaccard`` (mean over draws), ``jaccard_low`` and
        ``jaccard_high`` (smallest and largest), ``chance``.

    Raises:
        SelectionError: a group has fewer questions than a size; the message names it.
    """
    import pandas as pd

    sample = _Sample.of(items, by, condition, minimum=max(sizes))
    generator = np.random.default_rng(seed)
    reference = selector.select(items.group_by(by, condition=condition))
    members = [np.flatnonzero(sample.owner == group) for group in range(len(sample.groups))]
    rows = []
    for size in sizes:
        weights = np.zeros((repeats, len(sample.rows)))
        for draw in range(repeats):
            for own in members:
                weights[draw, generator.choice(own, size, replace=False)] = 1
        owners = np.broadcast_to(sample.owner, weights.shape)
        selections = [selector.select(stats) for stats in sample.drawn(owners, weights)]
        for group in sample.groups:
            overlap = [one[group].jaccard(reference[group]) for one in selections]
            chance = [one[group].expected_jaccard(reference[group]) for one in selections]
            rows.append(
                {
                    "size": size,
                    "group": group,
                    "jaccard": np.mean(overlap),
                    "jaccard_low": np.min(overlap),
                    "jaccard_high": np.max(overlap),
                    "chance": np.mean(chance),
                }
            )
    return pd.DataFrame(rows)


def agreement(selections: Mapping[str, Selection]) -> "pd.DataFrame":
    """How far selectors agree: for each pair and group the Jaccard overlap, and what chance would give.

    Columns: ``first``, ``second``, ``group``, ``jaccard``, ``chance``.

    Raises:
        MismatchError: the selections are of different groups or spaces.
    """
    import pandas as pd

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


def layer_profile(
    selection: Selection, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> "pd.DataFrame":
    """Where in the model each group's neurons lie, against a uniform choice of as many neurons.

    Args:
        selection: the neurons.
        resamples: uniform choices that the expectation and its interval are estimated from.
        confidence: level of that interval.
        seed: of the uniform choices.

    Returns:
        A row for each group: ``neurons``, ``gini`` (0: spread evenly over layers, towards 1: in one layer) and
        ``entropy`` (nats, of the shares of the layers), each with ``_low`` and ``_high``: the interval that a uniform
        choice of as many neurons falls into; and ``top_layer``, the layer with most neurons, with ``top_share`` and
        ``top_expected``, that layer's share of all neurons.
    """
    import pandas as pd

    space = selection.space
    layers = list(space.layers)
    layer_of = np.searchsorted(layers, space.layer_of.numpy())
    sizes = np.bincount(layer_of, minlength=len(layers))
    generator = np.random.default_rng(seed)
    tail = 50 * (1 - confidence)
    known: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    rows = []
    for group, neurons in selection.items():
        counts = np.bincount(layer_of[neurons.indices.numpy()], minlength=len(layers))
        size = len(neurons)
        row: dict[str, Any] = {"group": group, "neurons": size}
        if size:
            if size not in known:
                uniform = generator.multivariate_hypergeometric(sizes, size, resamples, method="marginals")
                known[size] = (_gini(uniform), _entropy(uniform))
            for name, value, null in zip(
                ("gini", "entropy"), (_gini(counts), _entropy(counts)), known[size], strict=True
            ):
                row[name] = float(value)
                row[f"{name}_low"], row[f"{name}_high"] = np.percentile(null, [tail, 100 - tail])
            top = int(counts.argmax())
            row |= {
                "top_layer": layers[top],
                "top_share": counts[top] / size,
                "top_expected": sizes[top] / sizes.sum(),
            }
        rows.append(row)
    return pd.DataFrame(rows)


def _gini(counts: np.ndarray) -> np.ndarray:
    """Gini coefficient of non-negative counts along the last axis."""
    ordered = np.sort(counts, -1)
    n = ordered.shape[-1]
    weight = 2 * np.arange(1, n + 1) - n - 1
    return (ordered * weight).sum(-1) / (n * ordered.sum(-1))


def _entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy, in nats, of the shares along the last axis."""
    return scipy_stats.entropy(counts, axis=-1)


def overlap_by_layer(first: NeuronSet, second: NeuronSet) -> "pd.DataFrame":
    """Where two sets overlap: a row for each layer with the size of either set, of both, and what chance would share.

    Columns: ``layer``, ``first``, ``second``, ``both``, ``expected`` (of two random sets of these sizes in the layer).
    """
    import pandas as pd

    both = first & second
    layer_of = first.space.layer_of.numpy()
    layers = np.array(first.space.layers)

    def counts(neurons: np.ndarray) -> np.ndarray:
        return np.bincount(np.searchsorted(layers, layer_of[neurons]), minlength=len(layers))

    sizes = counts(np.arange(len(first.space)))
    ours, theirs = counts(first.indices.numpy()), counts(second.indices.numpy())
    return pd.DataFrame(
        {
            "layer": layers,
            "first": ours,
            "second": theirs,
            "both": counts(both.indices.numpy()),
            "expected": ours * theirs / sizes,
        }
    )
