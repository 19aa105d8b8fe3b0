"""What selectors select from, and which table of several a rule reads."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from vlmneurons._arguments import of_kind
from vlmneurons.errors import MismatchError, SelectionError
from vlmneurons.items import GroupedItems, ItemStatistics
from vlmneurons.neurons import _check_same_space
from vlmneurons.sites import NeuronSpace
from vlmneurons.statistics import ActivationStatistics


class Conditions:
    """Statistics of the same groups and neurons under several conditions, such as languages, prompts or modalities.

    What `CRFusion`, `Overlap` and `Joint` select from; a plain dictionary of statistics is made into one.

    Attributes:
        statistics: those of each condition, groups in the order of the first condition's.

    Raises:
        SelectionError: fewer than two conditions.
        MismatchError: conditions of other neurons or other groups.

    Example:
        ``Conditions({"English": english, "Hindi": hindi})``
    """

    def __init__(self, statistics: Mapping[str, ActivationStatistics]) -> None:
        of_kind("statistics", statistics, Mapping, SelectionError, "a dictionary of statistics by condition")
        if len(statistics) < 2:
            raise SelectionError(f"conditions are compared, so at least two are needed; got {len(statistics)}")
        made: dict[str, ActivationStatistics] = {}
        for name, given in statistics.items():
            if not isinstance(name, str) or not name:
                raise SelectionError(f"a condition's name is a text that is not empty; got {name!r}")
            stats = given.group_by() if isinstance(given, ItemStatistics) else given
            stats = stats.statistics if isinstance(stats, GroupedItems) else stats
            if not isinstance(stats, ActivationStatistics):
                raise SelectionError(f"condition {name!r} must be ActivationStatistics; got {type(given).__name__}")
            first = next(iter(made.values()), stats)
            _check_same_space(first.space, stats.space)
            if set(first.groups) != set(stats.groups):
                raise MismatchError(
                    f"condition {name!r} has the groups {', '.join(stats.groups)}; the first has "
                    f"{', '.join(first.groups)}"
                )
            made[name] = stats if stats.groups == first.groups else stats.select_groups(first.groups)
        self.statistics: Mapping[str, ActivationStatistics] = made
        self._first = next(iter(made.values()))

    def __repr__(self) -> str:
        return f"Conditions({', '.join(self.statistics)}; {len(self.groups)} groups, {self.space!r})"

    @property
    def space(self) -> NeuronSpace:
        """The neurons."""
        return self._first.space

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups."""
        return self._first.groups

    @property
    def tokens(self) -> Int64[Tensor, " group"]:
        """Number of counted tokens of each group, over all conditions."""
        return sum(stats.tokens for stats in self.statistics.values())  # type: ignore[return-value]

    @property
    def items(self) -> Int64[Tensor, " group"]:
        """Number of counted items of each group, over all conditions."""
        return sum(stats.items for stats in self.statistics.values())  # type: ignore[return-value]

    @property
    def provenance(self) -> dict[str, Any]:
        """What each condition says."""
        return {"conditions": {name: dict(stats.provenance) for name, stats in self.statistics.items()}}

    def check_counted(self) -> None:
        """Make sure that every group has counted tokens under every condition.

        Raises:
            SelectionError: some have none; the message names them and the condition.
        """
        for name, stats in self.statistics.items():
            try:
                stats.check_counted()
            except SelectionError as error:
                raise SelectionError(f"condition {name!r}: {error}") from error

    def pooled(self) -> ActivationStatistics:
        """The counts of all conditions added up.

        Rules that differ between conditions (prompt, model) are no reason not to: the provenance lists the conditions.
        """
        bare = [replace(stats, provenance={}) for stats in self.statistics.values()]
        return replace(sum(bare[1:], bare[0]), provenance=self.provenance)

    def select_groups(self, groups: Sequence[str]) -> "Conditions":
        """The conditions with some groups, in the given order.

        Args:
            groups: names of groups.

        Raises:
            GroupError: no such group.
        """
        return Conditions({name: stats.select_groups(groups) for name, stats in self.statistics.items()})


class Bundle:
    """Several tables of the same groups and neurons, of which each rule of an expression reads its own."""

    def __init__(self, tables: Sequence[Any]) -> None:
        self.tables = tuple(tables)
        first = self.tables[0]
        self.space, self.groups = first.space, first.groups
        for other in self.tables[1:]:
            _check_same_space(first.space, other.space)
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
