"""`TableEvidence`: tables with a row for each group, whatever was counted; they add up, and are kept in a file."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor

from vlmneurons.checks import JSON, JSONMapping
from vlmneurons.errors import FileFormatError, MismatchError, VLMNeuronsError
from vlmneurons.files import tables as _files
from vlmneurons.neurons.sets import space_of_file
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.statistics.evidence import checked_groups, rows_of
from vlmneurons.statistics.identity import check_addable

MUST_AGREE = ("model", "revision", "kind", "tokens", "token_rule", "condition", "prompt", "answer", "dtype")
"""Provenance entries that statistics must share to be added, beside the setting: other rules count other things."""


SameClass = TypeVar("SameClass", bound="TableEvidence")
"""The class of the statistics themselves, and so of what is made of them: a choice of groups, a sum, a copy."""


class TableEvidence:
    """What dataclasses of such tables have in common; each names its own: ``total`` is float64, the others int64.

    Attributes:
        space: the space that numbers the neurons.
        groups: names of the groups, each once.
        provenance: where the tables come from, as plain values.
    """

    space: NeuronSpace
    groups: tuple[str, ...]
    provenance: JSONMapping
    _kind: ClassVar[str]
    _noun: ClassVar[str]
    """How files and errors call them."""
    _required: ClassVar[tuple[str, ...]]
    _optional: ClassVar[tuple[str, ...]] = ()

    def _check_head(self) -> None:
        object.__setattr__(self, "groups", checked_groups(self.groups))
        if not isinstance(self.provenance, Mapping):
            raise MismatchError(f"provenance is a dictionary; got {type(self.provenance).__name__}")
        object.__setattr__(self, "provenance", _files.plain(dict(self.provenance), "provenance"))

    def _tables(self) -> dict[str, Tensor]:
        """The tables that are there, by name."""
        named = {name: getattr(self, name) for name in (*self._required, *self._optional)}
        return {name: table for name, table in named.items() if table is not None}

    def _changed(self: SameClass, **changes: object) -> SameClass:
        return replace(cast(Any, self), **changes)

    def _with_rows(self: SameClass, groups: tuple[str, ...], change: Callable[[Tensor], Tensor]) -> SameClass:
        return self._changed(groups=groups, **{name: change(table) for name, table in self._tables().items()})

    def _added(self: SameClass, other: "TableEvidence", provenance: JSONMapping) -> SameClass:
        """The rows of shared groups added up, those of other groups appended; both have the same tables."""
        groups, summands = tuple(dict.fromkeys(self.groups + other.groups)), other._tables()
        rows, rows_of_other = (torch.tensor([groups.index(group) for group in part.groups]) for part in (self, other))
        sums = {
            name: table.new_zeros((len(groups), *table.shape[1:]))
            .index_add_(0, rows, table)
            .index_add_(0, rows_of_other, summands[name])
            for name, table in self._tables().items()
        }
        return self._changed(groups=groups, provenance=provenance, **sums)

    def select_groups(self: SameClass, groups: Iterable[str]) -> SameClass:
        """The rows of some groups, in the given order.

        Args:
            groups: names of groups.

        Raises:
            GroupError: no such group.
            MismatchError: a group twice, or none.
        """
        rows = torch.tensor(rows_of(groups, self.groups, f"in these {self._noun}"))
        return self._with_rows(tuple(self.groups[row] for row in rows), lambda table: table.index_select(0, rows))

    def __eq__(self, other: object) -> bool:
        """Whether space, groups (in order) and all tables are equal; provenance is not compared."""
        if not isinstance(other, type(self)):
            return NotImplemented
        tables, tables_of_other = self._tables(), other._tables()
        return (self.space, self.groups, tables.keys()) == (other.space, other.groups, tables_of_other.keys()) and all(
            torch.equal(table, tables_of_other[name]) for name, table in tables.items()
        )

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Write everything to a safetensors file.

        Args:
            path: the file, such as ``"statistics.safetensors"``.

        Raises:
            OSError: the file cannot be written; what was there before stays.
        """
        data = {"space": self.space.to_json(), "groups": list(self.groups), "provenance": self.provenance}
        _files.write(path, self._kind, self._tables(), data)

    @classmethod
    def load(cls: type[SameClass], path: "str | os.PathLike[str]") -> SameClass:
        """What `save` wrote.

        Args:
            path: the file.

        Raises:
            FileFormatError: the file is damaged, of another kind, or from a newer version.
        """
        required, optional = (
            {name: "F64" if name == "total" else "I64" for name in names} for names in (cls._required, cls._optional)
        )
        tensors, data = _files.read(path, cls._kind, required, optional)
        space = space_of_file(path, data)
        groups, provenance = data.get("groups"), data.get("provenance")
        if not isinstance(groups, list) or not isinstance(provenance, dict):
            raise FileFormatError(f"{path}: the groups or the provenance are not what {cls._noun} have")
        try:
            return cast(Any, cls)(space=space, groups=tuple(groups), **tensors, provenance=provenance)
        except VLMNeuronsError as error:
            raise FileFormatError(f"{path}: {error}") from error


def merged_provenance(first: Mapping[str, object], second: Mapping[str, object]) -> JSON:
    """What two recordings that are added say together.

    Where they differ in something that no number depends on, such as a device, ``{"several": [...]}`` lists both.

    Raises:
        MismatchError: they differ in what makes numbers comparable.
    """
    check_addable(first, second)
    for key in MUST_AGREE:
        if first.get(key) != second.get(key):
            raise MismatchError(
                f"statistics with different {key!r} cannot be added: {first.get(key)!r} and {second.get(key)!r}"
            )
    merged: JSON = {}
    for key in [*first, *(key for key in second if key not in first)]:
        values: list[object] = []
        for part in (first, second):
            if key in part:
                value = part[key]
                several = value["several"] if isinstance(value, dict) and set(value) == {"several"} else [value]
                values += [entry for entry in several if entry not in values]
        merged[key] = values[0] if len(values) == 1 else {"several": values}
    return merged
