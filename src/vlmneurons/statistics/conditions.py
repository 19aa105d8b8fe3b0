"""Counts of the same questions under several conditions, such as languages."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int64
from torch import Tensor

from vlmneurons.checks import JSON, check_kind
from vlmneurons.errors import MismatchError, SelectionError
from vlmneurons.neurons.sets import check_same_space
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.items import GroupedItems, ItemStatistics, added_up

Countable = ActivationStatistics | ItemStatistics | GroupedItems
"""What has counts of groups, or can be added up to them."""


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

    def __init__(self, statistics: Mapping[str, Countable]) -> None:
        check_kind("statistics", statistics, Mapping, SelectionError, "a dictionary of statistics by condition")
        if len(statistics) < 2:
            raise SelectionError(f"conditions are compared, so at least two are needed; got {len(statistics)}")
        made: dict[str, ActivationStatistics] = {}
        for name, given in statistics.items():
            if not isinstance(name, str) or not name:
                raise SelectionError(f"a condition's name is a text that is not empty; got {name!r}")
            stats = added_up(given)
            if not isinstance(stats, ActivationStatistics):
                raise SelectionError(f"condition {name!r} must be ActivationStatistics; got {type(given).__name__}")
            first = next(iter(made.values()), stats)
            check_same_space(first.space, stats.space)
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
        return torch.stack([stats.tokens for stats in self.statistics.values()]).sum(0)

    @property
    def items(self) -> Int64[Tensor, " group"]:
        """Number of counted items of each group, over all conditions."""
        return torch.stack([stats.items for stats in self.statistics.values()]).sum(0)

    @property
    def provenance(self) -> JSON:
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
