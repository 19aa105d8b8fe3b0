"""Neurons whose activation for a group is far from the mean over groups."""

from collections.abc import Iterable
from typing import SupportsIndex

from jaxtyping import Float64
from torch import Tensor

from vlmneurons.errors import SelectionError
from vlmneurons.neurons.sets import NeuronSet, Selection
from vlmneurons.selectors._base import Selector, check_on
from vlmneurons.selectors._exact import deviations, sum_over_groups
from vlmneurons.statistics.counts import ActivationStatistics


class MAD(Selector):
    """Mean absolute deviation: neurons that fire much more, or much less, for a group than for the groups on average.

    ``score[c, n] = abs(P[c, n] - mean over all classes of P[:, n])``, a difference of probabilities from 0 to 1; the
    mean includes ``c`` and counts every group the same. Zhao et al. 2025, arXiv 2510.24942 (MAD). The paper gives
    the rule in words; that both directions count and that the mean includes the group itself is our reading.

    Examples:
        >>> from vlmneurons.neurons.sites import NeuronSpace
        >>> space = NeuronSpace.from_widths("language", "gate", [4])
        >>> stats = ActivationStatistics.from_counts(space, ["EGY", "SGP"], [[9, 8, 1, 5], [9, 1, 7, 4]], [10, 10])
        >>> {group: neurons.indices.tolist() for group, neurons in MAD(0.5).select(stats).items()}
        {'EGY': [1, 2], 'SGP': [1, 2]}
        >>> {group: neurons.indices.tolist() for group, neurons in MAD(0.5, signed=True).select(stats).items()}
        {'EGY': [1, 3], 'SGP': [0, 2]}
    """

    contrastive = True

    def __init__(
        self,
        fraction: float | int | None = None,
        *,
        signed: bool = False,
        others: bool = False,
        on: str = "probability",
        count: SupportsIndex | None = None,
        layers: Iterable[SupportsIndex] | SupportsIndex | None = None,
        exclude: NeuronSet | Selection | None = None,
        per_layer: bool = False,
    ) -> None:
        """Settings.

        Args:
            fraction: share of the neurons that each group gets.
            signed: rank by the signed deviation, so that only neurons firing *more* for the group come first.
            others: compare with the mean over the *other* groups. Deviations then grow by ``G / (G - 1)`` for all
                neurons alike, so sets are the same but for rounding; scores read as "more than elsewhere".
            on: ``"probability"``, or ``"mean"`` for mean activations (needs statistics with sums).
            count: number of neurons per group, instead of a fraction.
            layers: layers to choose from; None for all.
            exclude: neurons never to choose.
            per_layer: take the share of each layer's neurons, layer by layer.

        Raises:
            SelectionError: a setting that is not allowed.
        """
        super().__init__(fraction, count=count, layers=layers, exclude=exclude, per_layer=per_layer)
        check_on("MAD", on)
        for name, value in (("signed", signed), ("others", others)):
            if not isinstance(value, bool):
                raise SelectionError(f"MAD: {name} is True or False; got {value!r}")
        self.signed, self.others, self.on = signed, others, on

    def score(self, stats: ActivationStatistics) -> Float64[Tensor, "group neuron"]:
        """The deviation: of probabilities, from 0 to 1 (-1 to 1 if signed), or of mean activations."""
        self.check_statistics(stats)
        groups = len(stats.groups)
        # The mean of the others is as much farther away as the group's own share in the mean of all.
        scale = groups / (groups - 1) if self.others else 1.0
        if self.on == "probability":
            return deviations(stats, scale=scale, signed=self.signed)
        table = stats.mean
        table -= sum_over_groups(table) / groups
        table *= scale
        return table if self.signed else table.abs_()
