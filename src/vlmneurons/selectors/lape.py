"""LAPE, the neurons whose firing is concentrated on few groups: those with the lowest entropy (arXiv 2402.16438).

``score[c, n] = sum over c' of s[c'] * log(s[c'])`` with ``s = P[:, n] / sum over c' of P[c', n]``, minus the entropy of
a neuron's probabilities of firing, for the group ``c`` where the neuron fires most; ``-inf`` for the others.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor
from typing_extensions import Unpack

from vlmneurons.checks import is_share
from vlmneurons.errors import SelectionError
from vlmneurons.neurons.selection import Selection
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.selectors._base import Selector, Shared, highest, provenance_of
from vlmneurons.selectors._evidence import Readable
from vlmneurons.selectors._exact import added, blocks, order_of_groups
from vlmneurons.statistics.counts import ActivationStatistics

_DECIMALS = 12
"""Entropies that agree to so many decimals are equal: less is rounding, which differs between machines."""


class LAPE(Selector[ActivationStatistics]):
    """Activation probability entropy: neurons that fire for few groups, with a low entropy over groups.

    The entropy of ``P[:, n] / sum over c of P[c, n]``, in nats, is 0 for a neuron that fires for one group only and
    ``log(G)`` for one that fires for all ``G`` alike. Tang et al. 2024, arXiv 2402.16438, equations 4 and 5.

    Two variants:

    - ``"class"`` (default): ``score[c, n]`` is minus the entropy for the group ``c`` with the highest probability (for
      all of them, where several have it), ``-inf`` for the others and for neurons that never fire; each group gets the
      same number of neurons. This is how Zhao et al. 2025, arXiv 2510.24942, compare LAPE with selectors of one budget.
    - ``"tang"``: the procedure of the paper's released code (``identify.py``). Neurons whose probability exceeds the
      ``filter_rate`` quantile of all probabilities for no group are dropped; the ``top_rate`` share of all neurons
      with the lowest entropies are kept; each of them goes to *every* group whose probability exceeds the
      ``activation_bar_ratio`` quantile. Sets overlap, differ in size, and may be empty: there is no budget.

    Deviations from the authors' code: probabilities are float64, not float32, so that neurons are told apart that
    float32 cannot tell apart; equal entropies are ranked by index, where ``topk`` leaves the order open (entropies that
    agree to 12 decimals count as equal, so that rounding in the logarithm, which differs between machines, decides
    nothing); a group without neurons keeps its place, where the authors' list drops it if it is the last.

    Examples:
        >>> from vlmneurons.neurons.sites import NeuronSpace
        >>> space = NeuronSpace.from_widths("language", "gate", [4])
        >>> stats = ActivationStatistics.from_counts(space, ["EGY", "SGP"], [[9, 8, 1, 0], [9, 1, 7, 0]], [10, 10])
        >>> LAPE().score(stats).round(decimals=3)
        tensor([[-0.6930, -0.3490,    -inf,    -inf],
                [-0.6930,    -inf, -0.3770,    -inf]], dtype=torch.float64)
    """

    contrastive = True

    def __init__(
        self,
        fraction: float | int | None = None,
        *,
        variant: str = "class",
        top_rate: float | int = 0.01,
        filter_rate: float | int = 0.95,
        activation_bar_ratio: float | int = 0.95,
        **shared: Unpack[Shared],
    ) -> None:
        """Settings; the three rates are those of the authors' code and belong to ``variant="tang"`` only.

        Args:
            fraction: share of the neurons that each group gets (variant ``"class"``).
            variant: ``"class"`` or ``"tang"``.
            top_rate: share of the neurons to keep, for all groups together.
            filter_rate: quantile of all probabilities that a neuron must exceed for some group.
            activation_bar_ratio: quantile of all probabilities above which a neuron is given to a group.
            shared: ``count``, ``layers``, ``exclude`` and ``per_layer``, as every selector has them; see `Selector`.

        Raises:
            SelectionError: a setting that is not allowed.
        """
        if variant not in ("class", "tang"):
            raise SelectionError(f"LAPE: variant is 'class' or 'tang'; got {variant!r}")
        rates = {"top_rate": top_rate, "filter_rate": filter_rate, "activation_bar_ratio": activation_bar_ratio}
        for name, rate in rates.items():
            if not is_share(rate):
                raise SelectionError(f"LAPE: {name} is in (0, 1]; got {rate!r}")
        if variant == "class" and tuple(rates.values()) != (0.01, 0.95, 0.95):
            raise SelectionError(f"LAPE: {', '.join(rates)} belong to variant='tang'; set fraction or count")
        self.variant = variant
        if variant == "tang":
            self.fraction = None
        super().__init__(fraction, **shared)
        self.top_rate, self.filter_rate, self.activation_bar_ratio = top_rate, filter_rate, activation_bar_ratio

    def _check_settings(self) -> None:
        super()._check_settings()
        names = self._explicit_settings("fraction", "count", "per_layer") if self.variant == "tang" else ()
        if "per_layer" in names:
            raise SelectionError("LAPE: variant='tang' has no budget per group, so none per layer; use layers instead")
        if names:
            raise SelectionError(
                "LAPE: variant='tang' has no budget per group; set top_rate instead of fraction, count"
            )

    def score(self, stats: ActivationStatistics) -> Float64[Tensor, "group neuron"]:
        """Minus the entropy in nats, from ``-log(G)`` to 0, where the neuron can be the group's; else ``-inf``.

        With ``variant="tang"``, a neuron can be a group's where it passes the two quantiles.

        Raises:
            SelectionError: a quantile that is less than one of so few probabilities.
        """
        self.check_statistics(stats)
        scores = torch.full(stats.positive.shape, -math.inf, dtype=torch.float64)
        if self.variant == "tang":
            probability = stats.probability
            bar, filter_bar = self._bars(probability, self._layer_mask(stats))
            ranking = self._ranking(stats, probability, filter_bar)
            return torch.where(probability > bar, ranking, scores)
        table = scores.numpy()
        for columns, values, negative_entropy in _entropies(stats):
            highest_value = values.max(0)
            np.copyto(table[:, columns], negative_entropy, where=(values == highest_value) & (highest_value > 0))
        return scores

    def select(self, *evidence: Readable) -> Selection:
        """The neurons of each group.

        Raises:
            SelectionError: see `Selector.select`; also a ``top_rate`` or quantile too small for so few neurons.
            MismatchError: excluded neurons of another space or without one of the groups.
        """
        if self.variant != "tang":
            return super().select(*evidence)
        stats = self._checked_table(evidence)
        part = self._layer_mask(stats)
        probability = stats.probability
        size = len(stats.space) if part is None else int(part.sum())
        # Python's round, as in the authors' code: halves go to the even neighbour.
        keep = round(size * self.top_rate)
        if keep < 1:
            raise SelectionError(
                f"top_rate={self.top_rate:g} of {size} neurons yields no neuron; use a larger top_rate"
            )
        bar, filter_bar = self._bars(probability, part)
        # Neurons that pass the filter for no group come last. As in the authors' code they can still be kept if too few
        # others are left; they then reach a group only if activation_bar_ratio is lower than filter_rate.
        ranking = self._ranking(stats, probability, filter_bar)
        excluded = self._excluded_masks(stats)
        sets = {}
        kept: Tensor | None = None
        for row, group in enumerate(stats.groups):
            if kept is None or isinstance(self.exclude, Selection):  # else the same neurons are kept for every group
                allowed = torch.ones(len(ranking), dtype=torch.bool) if part is None else part.clone()
                if group in excluded:
                    allowed &= ~excluded[group]
                kept = highest(ranking, keep, allowed)
            sets[group] = NeuronSet._of(stats.space, kept[probability[row, kept] > bar])
        return Selection(sets, selector=repr(self), provenance=provenance_of(stats))

    def _layer_mask(self, stats: ActivationStatistics) -> Tensor | None:
        """The neurons of the given layers; None for all."""
        if self.layers is None:
            return None
        return NeuronSet._of(stats.space, stats.space.restrict(layers=self.layers)).mask()

    def _ranking(self, stats: ActivationStatistics, probability: Tensor, filter_bar: float) -> Tensor:
        """Minus the entropy of each neuron; ``-inf`` where its probability exceeds the bar for no group."""
        ranking = torch.empty(len(stats.space), dtype=torch.float64)
        for columns, _, negative_entropy in _entropies(stats):
            ranking.numpy()[columns] = negative_entropy
        ranking[~(probability > filter_bar).any(dim=0)] = -math.inf
        return ranking

    def _bars(self, probability: Tensor, part: Tensor | None) -> tuple[float, float]:
        """The two quantiles of the probabilities of all groups and neurons (of the part)."""
        values = (probability if part is None else probability[:, part]).numpy().reshape(-1)
        places = []
        for name in ("activation_bar_ratio", "filter_rate"):
            place = round(len(values) * getattr(self, name))
            if place < 1:
                raise SelectionError(f"{name}={getattr(self, name):g} is less than one of {len(values)} probabilities")
            places.append(place - 1)
        partitioned = np.partition(values, sorted(set(places)))
        return float(partitioned[places[0]]), float(partitioned[places[1]])


def _entropies(stats: ActivationStatistics) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """For each block of neurons: its columns; values ``[group, column]`` whose shares are those of the probabilities;
    and minus the entropy of these shares in nats, rounded to 12 decimals (0 for a neuron that never fires).
    """
    order = order_of_groups(stats)
    for columns, counts, tokens in blocks(stats):
        # Of equally many tokens, shares of counts are shares of probabilities, and exact.
        values = counts if (tokens == tokens[:1]).all() else counts / tokens
        total = added(values, order)
        total[total == 0] = 1.0
        share = torch.from_numpy(values / total)
        # Each term is made a whole number of 2^-50, so that their sum is the same in every order.
        terms = torch.xlogy(share, share).mul_(2.0**50).round_().sum(0)
        yield columns, values, (terms / 2.0**50).round_(decimals=_DECIMALS).numpy()
