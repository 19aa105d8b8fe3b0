"""`Evidence`: what every table that selectors read has in common, whatever was counted.

Five kinds of table are evidence: `ActivationStatistics` (counts of groups), `AttributionStatistics` (gradients),
`GroupedItems` (single questions), `Conditions` (counts under several conditions), and the collection of tables from
which each rule of an expression takes the one that it reads. A further kind needs these names; it need not inherit.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Int64
from torch import Tensor

from vlmneurons.checks import JSONMapping, as_names
from vlmneurons.errors import GroupError, MismatchError, SelectionError
from vlmneurons.neurons.sites import NeuronSpace


@runtime_checkable
class Evidence(Protocol):
    """A table over the neurons of a space, with a row for each group or with what rows are made of."""

    @property
    def space(self) -> NeuronSpace:
        """The space that numbers the neurons."""
        ...

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups, in order, each once."""
        ...

    @property
    def items(self) -> Int64[Tensor, " group"]:
        """Number of questions of each group."""
        ...

    @property
    def tokens(self) -> Int64[Tensor, " group"] | None:
        """Number of counted tokens of each group; None where tokens were not counted."""
        ...

    @property
    def provenance(self) -> JSONMapping:
        """Where it comes from, as plain values that JSON can hold."""
        ...

    def check_counted(self) -> None:
        """Make sure that every group has something to go by.

        Raises:
            SelectionError: some have nothing; the message names them.
        """
        ...

    def select_groups(self, groups: Sequence[str]) -> "Evidence":
        """The same for some groups, in the given order.

        Args:
            groups: names of groups.

        Raises:
            GroupError: no such group.
        """
        ...


def rows_of(groups: Iterable[str], table_groups: Sequence[str], where: str) -> list[int]:
    """The rows of some groups in a table.

    Args:
        groups: names of groups.
        table_groups: the groups of the table, in order.
        where: how the error calls the table: ``"in these statistics"``.

    Raises:
        GroupError: no such group.
        MismatchError: no list of names, a group twice, or none.
    """
    chosen = checked_groups(as_names("groups", groups, MismatchError))
    for group in chosen:
        if group not in table_groups:
            raise GroupError(f"group {group!r} is not {where}; they have {', '.join(table_groups)}")
    return [table_groups.index(group) for group in chosen]


def checked_groups(groups: object) -> tuple[str, ...]:
    """The names of a table's groups.

    Raises:
        MismatchError: no list of names, an empty name, a group twice, or none.
    """
    if isinstance(groups, str) or not isinstance(groups, Iterable):
        raise MismatchError(f"groups must be a list of names; got {groups!r}")
    groups = tuple(groups)
    if not groups:
        raise MismatchError("statistics need at least one group; none was given")
    for group in groups:
        if not isinstance(group, str) or not group:
            raise MismatchError(f"a group's name is a text that is not empty; got {group!r}")
    twice = sorted(group for group, count in Counter(groups).items() if count > 1)
    if twice:
        raise MismatchError(f"a group's name may stand once; {', '.join(twice)} stands twice")
    return groups


def refuse_uncounted(
    groups: Iterable[str],
    counts: Int64[Tensor, " group"],
    advice: str,
    lacking: str = "token was counted",
    condition: object = None,
) -> None:
    """Make sure that every group has something to go by.

    Args:
        groups: names of the groups.
        counts: how much each has.
        advice: how a group is left out, and what else helps, for the error.
        lacking: what a group has none of, in the words of the error.
        condition: of the questions that were counted, where it is known.

    Raises:
        SelectionError: some have nothing; the message names them.
    """
    missing = [group for group, count in zip(groups, counts.tolist(), strict=True) if count == 0]
    if missing:
        reason = "perhaps none met the condition"
        if condition in ("correct", "wrong"):
            reason = f"perhaps the model's answers there are never {condition}; condition='all' counts every question"
        pronoun = "it" if len(missing) == 1 else "them"
        raise SelectionError(f"no {lacking} for {', '.join(missing)}: leave {pronoun} out {advice} ({reason})")
