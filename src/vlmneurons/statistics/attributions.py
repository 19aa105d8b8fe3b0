"""How much neurons moved the answers of each group's questions: what selectors by gradients read."""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from vlmneurons.checks import JSONMapping
from vlmneurons.errors import MismatchError, SelectionError
from vlmneurons.neurons.sets import check_same_space
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.statistics.evidence import refuse_uncounted
from vlmneurons.statistics.tables import TableEvidence, merged_provenance


@dataclass(frozen=True, eq=False, repr=False)
class AttributionStatistics(TableEvidence):
    """How much neurons moved the answers of each group's questions, by gradients; made by `vlmneurons.attribute`.

    What was differentiated is a question's margin, in nats, and so are attributions. One says by how much the neuron's
    activity raises the log-probability of the right option over that of the best other one: if the neuron is removed,
    the margin is expected to fall by that much.

    Attributes:
        space: the space that numbers the neurons.
        groups: names of the groups, each once.
        total: sum over the group's questions of the attribution of each neuron.
        strong: for how many of the group's questions the attribution of a neuron was more than a share
            (``provenance["threshold"]``) of that question's highest one.
        items: number of questions of each group.
        provenance: model, method, steps, rules, versions.
    """

    space: NeuronSpace
    groups: tuple[str, ...]
    total: Float64[Tensor, "group neuron"]
    strong: Int64[Tensor, "group neuron"]
    items: Int64[Tensor, " group"]
    provenance: JSONMapping = field(default_factory=dict)
    _kind, _noun = "AttributionStatistics", "attributions"
    _required = ("total", "strong", "items")

    def __post_init__(self) -> None:
        self._check_head()
        shape = (len(self.groups), len(self.space))
        for name in ("total", "strong"):
            if tuple(getattr(self, name).shape) != shape:
                raise MismatchError(
                    f"{name} must be [group, neuron] = {list(shape)}; got {list(getattr(self, name).shape)}"
                )
        if tuple(self.items.shape) != shape[:1]:
            raise MismatchError(f"items must be [group] = [{shape[0]}]; got {list(self.items.shape)}")
        if not torch.isfinite(self.total).all():
            raise MismatchError("total has NaN or infinite values; a sum of attributions is finite")
        if (self.strong < 0).any() or (self.strong > self.items[:, None]).any():
            raise MismatchError("strong counts questions: from 0 to the group's number of questions")

    @property
    def tokens(self) -> None:
        """None: attributions are of questions, and count no tokens."""
        return None

    @property
    def mean(self) -> Float64[Tensor, "group neuron"]:
        """Mean attribution over the group's questions, in nats.

        Raises:
            SelectionError: a group has no question.
        """
        self.check_counted()
        return self.total / self.items[:, None]

    @property
    def share(self) -> Float64[Tensor, "group neuron"]:
        """Share of the group's questions to which the neuron matters much (see ``strong``), from 0 to 1.

        Raises:
            SelectionError: a group has no question; or these are differences, which are of means.
        """
        self.check_counted()
        if "less" in self.provenance:
            raise SelectionError("differences of attributions are of means: select with on='mean'")
        return self.strong.to(torch.float64) / self.items[:, None]

    def check_counted(self) -> None:
        """Make sure that every group has questions.

        Raises:
            SelectionError: some have none; the message names them.
        """
        condition, lacking = self.provenance.get("condition"), "question was attributed"
        refuse_uncounted(self.groups, self.items, "with select_groups, or attribute more", lacking, condition)

    def __add__(self, other: "AttributionStatistics") -> "AttributionStatistics":
        """Attributions of both sets of questions together; groups of either.

        Raises:
            MismatchError: another space, or attributions under other rules (everything but versions and skipped
                questions must agree).
        """
        if not isinstance(other, AttributionStatistics):
            return NotImplemented
        check_same_space(self.space, other.space)
        for key in sorted({*self.provenance, *other.provenance} - {"versions", "skipped", "device", "setting"}):
            if self.provenance.get(key) != other.provenance.get(key):
                raise MismatchError(
                    f"attributions with different {key!r} cannot be added: {self.provenance.get(key)!r} and "
                    f"{other.provenance.get(key)!r}"
                )
        return self._added(other, merged_provenance(self.provenance, other.provenance))

    def __sub__(self, other: "AttributionStatistics") -> "AttributionStatistics":
        """Mean attributions less those of other questions: a country's less those of a control data set.

        ``(a - b).mean == a.mean - b.mean``, group by group; a single group of ``b`` is taken from each of ``a``'s. The
        provenance keeps that of ``b`` under ``less``.

        Raises:
            MismatchError: another space, other groups, or attributions by another method or reduction.
            SelectionError: a group has no question.
        """
        if not isinstance(other, AttributionStatistics):
            return NotImplemented
        check_same_space(self.space, other.space)
        for key in ("method", "steps", "reduce", "tokens"):
            if self.provenance.get(key) != other.provenance.get(key):
                raise MismatchError(
                    f"attributions with different {key!r} cannot be compared: {self.provenance.get(key)!r} and "
                    f"{other.provenance.get(key)!r}"
                )
        if len(other.groups) > 1 and set(other.groups) != set(self.groups):
            raise MismatchError(
                f"attributions of {', '.join(other.groups)} are taken from those of {', '.join(self.groups)}: give the "
                "same groups, or one"
            )
        control = other if len(other.groups) == 1 else other.select_groups(self.groups)
        total = (self.mean - control.mean) * self.items[:, None]
        provenance = {**self.provenance, "less": dict(other.provenance)}
        return replace(self, total=total, strong=torch.zeros_like(self.strong), provenance=provenance)

    def __repr__(self) -> str:
        counts = ", ".join(f"{group} {n}" for group, n in zip(self.groups, self.items.tolist(), strict=True))
        method = self.provenance.get("method", "unknown method")
        return f"AttributionStatistics({method}; questions: {counts}; {self.space!r})"
