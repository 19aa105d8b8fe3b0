"""Attribution, the neurons that move a group's answers, by gradients.

``score[c, n] = mean over the questions of c of sum over tokens of a * dM / da``, where ``a`` is the neuron's value and
``M`` the log-probability margin of the right option: input times gradient (arXiv 1704.02685), or the gradient
integrated over the neuron's value (arXiv 2104.08696). `vlmneurons.attribute` computes both; the rules here rank what it
gives.
"""

from typing import ClassVar

from jaxtyping import Float64
from torch import Tensor
from typing_extensions import Unpack

from vlmneurons.errors import SelectionError
from vlmneurons.selectors._base import Selector, Shared, check_flags
from vlmneurons.selectors._exact import sum_over_groups
from vlmneurons.statistics.attributions import AttributionStatistics


class _ByGradient(Selector[AttributionStatistics]):
    """What both rules share: all but the way in which the attributions were computed."""

    method: ClassVar[str]
    """What `vlmneurons.attribute` must have computed."""

    def __init__(
        self,
        fraction: float | int | None = None,
        *,
        others: bool = False,
        on: str = "mean",
        **shared: Unpack[Shared],
    ) -> None:
        """Settings.

        Args:
            fraction: share of the neurons that each group gets.
            others: rank by how much more a neuron matters to the group than, on average, to the other groups.
            on: ``"mean"`` attribution over the group's questions, or ``"share"`` of the questions in which the neuron
                matters much (its attribution is above a given share of the question's highest).
            shared: ``count``, ``layers``, ``exclude`` and ``per_layer``, as every selector has them; see `Selector`.

        Raises:
            SelectionError: a setting that is not allowed.
        """
        super().__init__(fraction, **shared)
        name = type(self).__name__
        if on not in ("mean", "share"):
            raise SelectionError(f"{name}: on is 'mean' or 'share'; got {on!r}")
        check_flags(self, others=others)
        self.others, self.on = others, on
        self.contrastive = others

    def check_statistics(self, stats: AttributionStatistics) -> None:
        """Make sure that the attributions are by this rule's method.

        Raises:
            SelectionError: they are not, or see `Selector.check_statistics`.
        """
        super().check_statistics(stats)
        method = stats.provenance.get("method", self.method)
        if method != self.method:
            raise SelectionError(
                f"{type(self).__name__} selects from attributions by method={self.method!r}; these are by {method!r}"
            )

    def score(self, stats: AttributionStatistics) -> Float64[Tensor, "group neuron"]:
        """How much a neuron moves the group's answers: mean nats, or a share of questions; less that of the others."""
        self.check_statistics(stats)
        table = stats.mean if self.on == "mean" else stats.share
        if self.others:
            total = sum_over_groups(table)
            for row in table:
                row -= (total - row) / (len(stats.groups) - 1)
        return table


class Attribution(_ByGradient):
    """Activation times gradient: to first order, what removing a neuron does to the answers of a group's questions.

    ``score[c, n]`` is the mean over the questions of ``c`` of ``sum over tokens of a[t, n] * dM / da[t, n]``, in nats,
    where ``a`` is the neuron's value and ``M`` the log-probability margin of the right option over the best other one.
    Select from what ``vlmneurons.attribute(model, questions, method="gradient")`` gives.

    This is input times gradient (Shrikumar et al. 2017, arXiv 1704.02685), used here to find culture neurons by their
    effect on answers. That the margin is over the best *other option*, and that all tokens count, is ours.

    Example:
        ``Attribution(0.005, others=True).select(attribute(model, identify))``
    """

    method = "gradient"


class IntegratedGradients(_ByGradient):
    """Knowledge neurons: attributions integrated while a layer's neurons grow from zero to what they are.

    ``score[c, n]`` is the mean over the questions of ``c`` of ``w * integral from 0 to 1 of dM(s * w) / dw ds``, where
    ``w`` are the values of all neurons of the neuron's layer; in nats. Select from what
    ``vlmneurons.attribute(model, questions, method="integrated")`` gives.

    Dai et al. 2022, arXiv 2104.08696. They differentiate the probability of the one right token and read neurons at the
    masked token; here it is the margin of the right option over the best other one, and all tokens count. They keep the
    neurons above a share of 0.2 of the highest attribution on enough prompts: ``on="share"`` ranks by how many. The
    integral is computed by the midpoint rule, theirs by the right-hand rule.

    Example:
        ``IntegratedGradients(0.005).select(attribute(model, identify, method="integrated"))``
    """

    method = "integrated"
