"""What selectors select from, and which of several tables a rule reads."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from jaxtyping import Int64
from torch import Tensor

from vlmneurons.checks import JSONMapping, check_kind
from vlmneurons.errors import MismatchError, SelectionError
from vlmneurons.neurons.selection import Selection
from vlmneurons.neurons.sets import check_same_space
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.statistics.conditions import Conditions, Countable
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.evidence import Evidence
from vlmneurons.statistics.items import GroupedItems, ItemStatistics

Readable = Evidence | ItemStatistics | Mapping[str, Countable]
"""What `Selector.select` takes: evidence, or what becomes evidence (recorded questions; statistics by condition)."""


class Bundle:
    """Several tables of the same groups and neurons, of which each rule of an expression reads its own."""

    def __init__(self, tables: Sequence[Evidence]) -> None:
        """The tables together.

        Args:
            tables: at least one.

        Raises:
            MismatchError: tables of other neurons or other groups than the first.
        """
        self.tables = tuple(tables)
        first = self.tables[0]
        for table in self.tables[1:]:
            check_same_space(first.space, table.space)
            if tuple(table.groups) != tuple(first.groups):
                raise MismatchError(
                    f"the tables to select from have different groups: {', '.join(first.groups)} and "
                    f"{', '.join(table.groups)}"
                )

    @classmethod
    def of(cls, evidence: Sequence[Readable]) -> "Bundle":
        """The evidence that a selector gets, as a bundle; a single bundle stays as it is.

        Args:
            evidence: see `Selector.select`.

        Raises:
            SelectionError: nothing was given, or what cannot be selected from.
        """
        if len(evidence) == 1 and isinstance(evidence[0], Bundle):
            return evidence[0]
        if not evidence:
            raise SelectionError("there is nothing to select from: give statistics")
        tables = [_as_evidence(table) for table in evidence]
        for table in tables:
            check_kind("what to select from", table, Evidence, SelectionError, "statistics, questions or attributions")
        return cls(tables)

    @property
    def space(self) -> NeuronSpace:
        """The neurons."""
        return self.tables[0].space

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups."""
        return self.tables[0].groups

    @property
    def tokens(self) -> Int64[Tensor, " group"] | None:
        """Number of counted tokens of each group, if the first table has it."""
        return self.tables[0].tokens

    @property
    def items(self) -> Int64[Tensor, " group"]:
        """Number of items of each group, of the first table."""
        return self.tables[0].items

    @property
    def provenance(self) -> JSONMapping:
        """The table's provenance; of several tables, that of each by its kind."""
        if len(self.tables) == 1:
            return dict(self.tables[0].provenance)
        return {type(table).__name__: dict(table.provenance) for table in self.tables}

    def check_counted(self) -> None:
        """Make sure that every group has counts in every table.

        Raises:
            SelectionError: some groups have none; the message names them.
        """
        for table in self.tables:
            table.check_counted()

    def select_groups(self, groups: Sequence[str]) -> "Bundle":
        """The tables with some groups, in the given order.

        Args:
            groups: names of groups.

        Raises:
            GroupError: no such group.
        """
        return Bundle([table.select_groups(groups) for table in self.tables])


def table_read(name: str, kind: type, evidence: Sequence[Readable]) -> Any:
    """The table of a kind among a selector's evidence; per-question counts stand for their statistics too.

    Raises:
        SelectionError: there is none, or there are several.
    """
    tables = evidence[0].tables if len(evidence) == 1 and isinstance(evidence[0], Bundle) else evidence
    tables = [_as_evidence(table) for table in tables]
    of_kind: list[Evidence] = [table for table in tables if isinstance(table, kind)]
    if not of_kind and issubclass(ActivationStatistics, kind):
        of_kind = [table.statistics for table in tables if isinstance(table, GroupedItems)]
    if len(of_kind) == 1:
        return of_kind[0]
    got = ", ".join(type(table).__name__ for table in evidence) or "nothing"
    if of_kind:
        raise SelectionError(f"{name} selects from one {kind.__name__}; several were given: {got}")
    raise SelectionError(f"{name} selects from {kind.__name__}; got {got}")


def _as_evidence(table: Readable) -> Evidence:
    """Item statistics as questions in the groups that were recorded; a dictionary as conditions."""
    if isinstance(table, ItemStatistics):
        return table.grouped()
    if isinstance(table, Mapping) and not isinstance(table, Selection):
        return Conditions(table)
    return cast(Evidence, table)  # anything else is refused by what reads it
