"""LAP, the neurons that fire most often for a group: ``score[c, n] = P[c, n]`` (arXiv 2510.24942).

``P[c, n]`` is the probability that neuron ``n`` fires (is above zero) at a counted token of group ``c``. The control
`MostActive` takes its mean over groups.
"""

from jaxtyping import Float64
from torch import Tensor

from vlmneurons.selectors._base import Selector
from vlmneurons.selectors._exact import mean_probability
from vlmneurons.statistics.counts import ActivationStatistics


class LAP(Selector[ActivationStatistics]):
    """Activation probability: the neurons that fire most often for a group, whether or not they do so for others.

    ``score[c, n] = P[c, n]``, a probability. Zhao et al. 2025, arXiv 2510.24942 (LAP); Tang et al. 2024, arXiv
    2402.16438, compare with it. Sets of different groups overlap a lot.

    Examples:
        >>> from vlmneurons.neurons.sites import NeuronSpace
        >>> space = NeuronSpace.from_widths("language", "gate", [4])
        >>> stats = ActivationStatistics.from_counts(space, ["EGY", "SGP"], [[9, 8, 1, 0], [9, 1, 7, 0]], [10, 10])
        >>> {group: neurons.indices.tolist() for group, neurons in LAP(0.5).select(stats).items()}
        {'EGY': [0, 1], 'SGP': [0, 2]}
    """

    def score(self, stats: ActivationStatistics) -> Float64[Tensor, "group neuron"]:
        """The activation probability, from 0 to 1."""
        self.check_statistics(stats)
        return stats.probability


class MostActive(Selector[ActivationStatistics]):
    """A control: the neurons that fire most often over all groups, the same set for every group.

    ``score[c, n]`` is the mean of ``P[:, n]`` over groups, each group counting the same. A selection whose ablation
    does no more than this one's has found busy neurons, not particular ones. This control is ours, of no paper.

    Examples:
        >>> from vlmneurons.neurons.sites import NeuronSpace
        >>> space = NeuronSpace.from_widths("language", "gate", [4])
        >>> stats = ActivationStatistics.from_counts(space, ["EGY", "SGP"], [[9, 8, 1, 0], [9, 1, 7, 0]], [10, 10])
        >>> {group: neurons.indices.tolist() for group, neurons in MostActive(0.5).select(stats).items()}
        {'EGY': [0, 1], 'SGP': [0, 1]}
    """

    def score(self, stats: ActivationStatistics) -> Float64[Tensor, "group neuron"]:
        """The mean activation probability over groups, from 0 to 1; all rows are equal."""
        self.check_statistics(stats)
        return mean_probability(stats).expand(len(stats.groups), -1)
