"""How much neurons moved the answers of each group's questions: what selectors by gradients read."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from vlmneurons.checks import JSONMapping
from vlmneurons.errors import FileFormatError, MismatchError, SelectionError, VLMNeuronsError
from vlmneurons.files import tables as _files
from vlmneurons.neurons.sets import check_same_space, space_of_file
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.statistics.counts import merged_provenance
from vlmneurons.statistics.evidence import checked_groups, refuse_uncounted, rows_of

_TABLES = ("total", "strong", "items")


@dataclass(frozen=True, eq=False, repr=False)
class AttributionStatistics:
    """How much neurons moved the answers of each group's questions, by gradients; made by `vlmneurons.attribute`.

    A question's attribution to a neuron is in the unit of the margin that was differentiated: nats. It says by how much
    the neuron's activity raises the log-probability of the right option over that of the best other one, so removing
    the neuron is expected to lower the margin by that much.

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", checked_groups(self.groups))
        object.__setattr__(self, "provenance", _files.plain(dict(self.provenance), "provenance"))
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
        refuse_uncounted(self.groups, self.items, "with select_groups, or attribute more", "question was attributed")

    def select_groups(self, groups: Iterable[str]) -> "AttributionStatistics":
        """The attributions of some groups, in the given order.

        Args:
            groups: names of groups.

        Raises:
            GroupError: no such group.
        """
        rows = torch.tensor(rows_of(groups, self.groups, "in these attributions"))
        return self._with_tables(tuple(self.groups[row] for row in rows), lambda name: getattr(self, name)[rows])

    def _with_tables(self, groups: tuple[str, ...], table: Callable[[str], Tensor]) -> "AttributionStatistics":
        return replace(self, groups=groups, **{name: table(name) for name in _TABLES})

    def __add__(self, other: "AttributionStatistics") -> "AttributionStatistics":
        """Attributions of both sets of questions together; groups of either.

        Raises:
            MismatchError: another space, or attributions under other rules (everything but versions and skipped
                questions must agree).
        """
        if not isinstance(other, AttributionStatistics):
            return NotImplemented
        check_same_space(self.space, other.space)
        for key in {*self.provenance, *other.provenance} - {"versions", "skipped", "device", "setting"}:
            if self.provenance.get(key) != other.provenance.get(key):
                raise MismatchError(
                    f"attributions with different {key!r} cannot be added: {self.provenance.get(key)!r} and "
                    f"{other.provenance.get(key)!r}"
                )
        groups = tuple(dict.fromkeys(self.groups + other.groups))

        def added(name: str) -> Tensor:
            table = getattr(self, name).new_zeros((len(groups), *getattr(self, name).shape[1:]))
            for part in (self, other):
                rows = torch.tensor([groups.index(group) for group in part.groups])
                table.index_add_(0, rows, getattr(part, name))
            return table

        merged = replace(self, provenance=merged_provenance(self.provenance, other.provenance))
        return merged._with_tables(groups, added)

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
        less = other if len(other.groups) == 1 else other.select_groups(self.groups)
        total = (self.mean - less.mean) * self.items[:, None]
        provenance = {**self.provenance, "less": dict(other.provenance)}
        return replace(self, total=total, strong=torch.zeros_like(self.strong), provenance=provenance)

    def __eq__(self, other: object) -> bool:
        """Whether space, groups (in order) and all tables are equal; provenance is not compared."""
        if not isinstance(other, AttributionStatistics):
            return NotImplemented
        return (self.space, self.groups) == (other.space, other.groups) and all(
            torch.equal(getattr(self, name), getattr(other, name)) for name in _TABLES
        )

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Write everything to a safetensors file.

        Args:
            path: the file, such as ``"attributions.safetensors"``.

        Raises:
            OSError: the file cannot be written; what was there before stays.
        """
        data = {"space": self.space.to_json(), "groups": list(self.groups), "provenance": self.provenance}
        tensors = {name: getattr(self, name) for name in _TABLES}
        _files.write(path, "AttributionStatistics", tensors, data)

    @classmethod
    def load(cls, path: "str | os.PathLike[str]") -> "AttributionStatistics":
        """The attributions that `save` wrote.

        Args:
            path: the file.

        Raises:
            FileFormatError: the file is damaged, of another kind, or from a newer version.
        """
        required = {"total": "F64", "strong": "I64", "items": "I64"}
        tensors, data = _files.read(path, "AttributionStatistics", required)
        space = space_of_file(path, data)
        try:
            return cls(space, tuple(data["groups"]), **tensors, provenance=data["provenance"])
        except (VLMNeuronsError, KeyError, TypeError) as error:
            raise FileFormatError(f"{path}: {error}") from error

    def __repr__(self) -> str:
        counts = ", ".join(f"{group} {n}" for group, n in zip(self.groups, self.items.tolist(), strict=True))
        method = self.provenance.get("method", "unknown method")
        return f"AttributionStatistics({method}; questions: {counts}; {self.space!r})"
