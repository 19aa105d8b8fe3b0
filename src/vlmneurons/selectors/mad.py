"""MAD, the neurons whose firing for a group is far from the mean over groups (arXiv 2510.24942).

``score[c, n] = abs(P[c, n] - mean over all groups of P[:, n])``, where ``P`` is the probability of firing.
"""

from jaxtyping import Float64
from torch import Tensor
from typing_extensions import Unpack

from vlmneurons.errors import SelectionError
from vlmneurons.selectors._base import Selector, Shared, check_flags
from vlmneurons.selectors._exact import deviations, sum_over_groups
from vlmneurons.statistics.counts import ActivationStatistics


class MAD(Selector[ActivationStatistics]):
    """Mean absolute deviation: neurons that fire much more, or much less, for a group than for the groups on average.

    ``score[c, n] = abs(P[c, n] - mean over all groups of P[:, n])``, a difference of probabilities from 0 to 1; the
    mean includes ``c`` and counts every group the same. Zhao et al. 2025, arXiv 2510.24942 (MAD). The paper gives
    the rule in words: that both directions count, and that the mean includes the group itself, is our reading. So is
    that probabilities are meant: the abstract of arXiv 2601.03115, which has the same four rules, calls one of them
    magnitude-based, and it may mean this one. ``MAD(on="mean")`` is of magnitudes; where it matters, report both.

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
        **shared: Unpack[Shared],
    ) -> None:
        """Settings.

        Args:
            fraction: share of the neurons that each group gets.
            signed: rank by the signed deviation, so that only neurons firing *more* for the group come first.
            others: compare with the mean over the *other* groups. Deviations then grow by ``G / (G - 1)`` for all
                neurons alike, so sets are the same; scores read as "more than elsewhere".
            on: ``"probability"`` of firing, or ``"mean"`` for mean activations, in units of the activation, for which
                statistics need sums (``record(…, magnitudes=True)``).
            shared: ``count``, ``layers``, ``exclude`` and ``per_layer``, as every selector has them; see `Selector`.

        Raises:
            SelectionError: a setting that is not allowed.
        """
        super().__init__(fraction, **shared)
        if on not in ("probability", "mean"):
            raise SelectionError(f"MAD: on is 'probability' or 'mean'; got {on!r}")
        check_flags(self, signed=signed, others=others)
        self.signed, self.others, self.on = signed, others, on

    def score(self, stats: ActivationStatistics) -> Float64[Tensor, "group neuron"]:
        """The deviation: of probabilities, from 0 to 1 (-1 to 1 if signed), or of mean activations."""
        self.check_statistics(stats)
        groups = len(stats.groups)
        # The mean over all groups contains the group itself, one part in `groups`: the mean over the others is so much
        # farther away.
        scale = groups / (groups - 1) if self.others else 1.0
        if self.on == "probability":
            return deviations(stats, scale=scale, signed=self.signed)
        table = stats.mean
        table -= sum_over_groups(table) / groups
        table *= scale
        return table if self.signed else table.abs_()
