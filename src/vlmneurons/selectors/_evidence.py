"""What selectors select from, and which table of several a rule reads."""

from collections.abc import Sequence
from typing import Any

from vlmneurons.errors import MismatchError, SelectionError
from vlmneurons.neurons.sets import check_same_space
from vlmneurons.statistics.conditions import Conditions
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.items import GroupedItems, ItemStatistics


class Bundle:
    """Several tables of the same groups and neurons, of which each rule of an expression reads its own."""

    def __init__(self, tables: Sequence[Any]) -> None:
        self.tables = tuple(tables)
        first = self.tables[0]
        self.space, self.groups = first.space, first.groups
        for other in self.tables[1:]:
            check_same_space(first.space, other.space)
            if tuple(other.groups) != tuple(first.groups):
                raise MismatchError(
                    f"the tables to select from have different groups: {', '.join(first.groups)} and "
                    f"{', '.join(other.groups)}"
                )

    @classmethod
    def of(cls, evidence: Sequence[Any]) -> "Bundle":
        """What a selector was given, as a bundle; one bundle stays as it is."""
        if len(evidence) == 1 and isinstance(evidence[0], Bundle):
            return evidence[0]
        if not evidence:
            raise SelectionError("there is nothing to select from: give statistics")
        return cls([_opened(table) for table in evidence])

    @property
    def tokens(self) -> Any:
        """Number of counted tokens of each group, if the first table knows it."""
        return getattr(self.tables[0], "tokens", None)

    @property
    def items(self) -> Any:
        """Number of items of each group, as the first table knows it."""
        return getattr(self.tables[0], "items", None)

    @property
    def provenance(self) -> dict[str, Any]:
        """What the table says; of several tables, by their kinds."""
        if len(self.tables) == 1:
            return dict(self.tables[0].provenance)
        return {type(table).__name__: dict(table.provenance) for table in self.tables}

    def check_counted(self) -> None:
        """Make sure that every group has something to go by in every table."""
        for table in self.tables:
            table.check_counted()

    def select_groups(self, groups: Sequence[str]) -> "Bundle":
        """The tables with some groups, in the given order."""
        return Bundle([table.select_groups(groups) for table in self.tables])


def the_one_read(name: str, kind: type, evidence: Sequence[Any]) -> Any:
    """The table of a kind among what a selector was given; per-question counts stand for their statistics too.

    Raises:
        SelectionError: there is none, or there are several.
    """
    tables = evidence[0].tables if len(evidence) == 1 and isinstance(evidence[0], Bundle) else evidence
    tables = [_opened(table) for table in tables]
    found = [table for table in tables if isinstance(table, kind)]
    if not found and issubclass(ActivationStatistics, kind):
        found = [table.statistics for table in tables if isinstance(table, GroupedItems)]
    if len(found) == 1:
        return found[0]
    got = ", ".join(type(table).__name__ for table in evidence) or "nothing"
    if found:
        raise SelectionError(f"{name} selects from one {kind.__name__}; several were given: {got}")
    raise SelectionError(f"{name} selects from {kind.__name__}; got {got}")


def _opened(table: Any) -> Any:
    """Item statistics as questions grouped as they were recorded; a dictionary as conditions."""
    if isinstance(table, ItemStatistics):
        return table.grouped()
    if type(table) is dict:
        return Conditions(table)
    return table
