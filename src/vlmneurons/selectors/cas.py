"""CAS, the neurons that fire for one group more than for any other: ``score[c, n] = P1 - P2`` (arXiv 2510.24942).

``P1`` and ``P2`` are the neuron's two highest probabilities of firing among the groups, and ``c`` is the group of
``P1``; for every other group the score is 0, and a neuron without a margin is never selected.
"""

from jaxtyping import Bool, Float, Float64
from torch import Tensor

from vlmneurons.selectors._base import Selector
from vlmneurons.selectors._exact import margins
from vlmneurons.statistics.counts import ActivationStatistics


class CAS(Selector[ActivationStatistics]):
    """Contrastive activation selection: the margin between a neuron's strongest and second-strongest group.

    ``score[c, n] = P1 - P2`` if ``c`` is the group with the highest probability, else 0, where ``P1 >= P2`` are the
    two highest of ``P[:, n]``: a difference of probabilities from 0 to 1. A neuron belongs to one group at most. A
    neuron without a margin (it ties for the first place, or never fires) is never selected, so a group that leads in
    few neurons gets fewer than the budget.

    Zhao et al. 2025, arXiv 2510.24942: CAS (Contrastive Activation Selection) in version 1, ConAct (Contrastive
    Activation Margin) in version 2; defined in more detail in arXiv 2601.03115. Never selecting a margin of 0 is ours:
    the papers do not say what fills a budget beyond the neurons with a margin.

    Examples:
        >>> from vlmneurons.neurons.sites import NeuronSpace
        >>> space = NeuronSpace.from_widths("language", "gate", [4])
        >>> stats = ActivationStatistics.from_counts(space, ["EGY", "SGP"], [[9, 8, 1, 0], [9, 1, 7, 0]], [10, 10])
        >>> CAS(0.5).score(stats)
        tensor([[0.0000, 0.7000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.6000, 0.0000]], dtype=torch.float64)
        >>> {group: neurons.indices.tolist() for group, neurons in CAS(0.5).select(stats).items()}
        {'EGY': [1], 'SGP': [2]}
    """

    contrastive = True

    def score(self, stats: ActivationStatistics) -> Float64[Tensor, "group neuron"]:
        """The margin of each neuron for its strongest group, from 0 to 1; 0 for the other groups."""
        self.check_statistics(stats)
        return margins(stats)

    def eligible(
        self, stats: ActivationStatistics, scores: Float[Tensor, "group neuron"]
    ) -> Bool[Tensor, "group neuron"]:
        """Only neurons with a margin."""
        return scores > 0


ConAct = CAS
"""The name of `CAS` in version 2 of its paper."""
