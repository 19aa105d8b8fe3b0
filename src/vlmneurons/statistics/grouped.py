"""Questions of a recording in groups: what rules that look at single questions select from, and what is resampled."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from vlmneurons.checks import JSON, as_names, as_whole, check_choice
from vlmneurons.errors import GroupError, MismatchError, SelectionError
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.questions.question import hash_of
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.evidence import refuse_uncounted

if TYPE_CHECKING:
    from vlmneurons.statistics.items import ItemStatistics

VALUES = ("mean", "probability", "maximum")
"""What can be said of a neuron for one question; see `GroupedItems.values`."""


@dataclass(frozen=True, eq=False)
class GroupedItems:
    """Questions of a recording, each in a group; made by `ItemStatistics.grouped`.

    What rules that look at single questions select from (`vlmneurons.AveragePrecision`), and what the functions of
    `vlmneurons.trust` resample and shuffle. Rules that need only the groups' counts select from its `statistics`.

    Attributes:
        recording: where the counts are.
        rows: rows of the recording; one may stand several times, as in a bootstrap.
        owner: for each of the rows the number of its group.
        groups: names of the groups.
        condition: which questions entered.
    """

    recording: "ItemStatistics"
    rows: np.ndarray
    owner: np.ndarray
    groups: tuple[str, ...]
    condition: str = "correct"

    @property
    def space(self) -> NeuronSpace:
        """The neurons."""
        return self.recording.space

    @property
    def provenance(self) -> JSON:
        """What the recording says, and the condition."""
        return {**self.recording.provenance, "condition": self.condition}

    @property
    def items(self) -> Int64[Tensor, " group"]:
        """Number of questions of each group."""
        return torch.from_numpy(np.bincount(self.owner, minlength=len(self.groups)).astype(np.int64))

    @property
    def tokens(self) -> Int64[Tensor, " group"]:
        """Number of counted tokens of each group."""
        tokens = np.zeros(len(self.groups), dtype=np.int64)
        np.add.at(tokens, self.owner, self.recording.tokens.numpy()[self.rows])
        return torch.from_numpy(tokens)

    def check_size(self, minimum: int) -> None:
        """Make sure that every group has questions enough.

        Args:
            minimum: least number of questions of every group.

        Raises:
            SelectionError: some have fewer; the message names them and says how many they have.
        """
        minimum = as_whole("minimum", minimum, SelectionError)
        thin = [f"{group} ({n})" for group, n in zip(self.groups, self.items.tolist(), strict=True) if n < minimum]
        if thin:
            answered = {"correct": "right"}.get(self.condition, self.condition)
            condition = "" if self.condition == "all" else f" that were answered {answered}"
            raise SelectionError(
                f"at least {minimum} questions a group{condition} are needed; fewer are in {', '.join(thin)}: leave "
                "them out, or record more"
            )

    def check_counted(self) -> None:
        """Make sure that every group has counted tokens.

        Raises:
            SelectionError: some have none; the message names them.
        """
        advice = "of the grouping, or record more questions"
        refuse_uncounted(self.groups, self.tokens, advice, condition=self.condition)

    def balanced(self, size: int | None = None, *, seed: int = 0) -> "GroupedItems":
        """The same number of questions of every group, chosen by a seeded hash of their ids.

        Args:
            size: questions per group; by default as many as the smallest group has.
            seed: of the choice.

        Raises:
            SelectionError: a group has fewer, or none; the message names the thin groups.
        """
        seed = as_whole("seed", seed, SelectionError)
        if size is not None and (size := as_whole("size", size, SelectionError)) < 1:
            raise SelectionError(f"{size} questions per group were asked for; the least is 1")
        self.check_size(1 if size is None else size)
        size = int(self.items.min()) if size is None else size
        items = self.recording.items
        rank = np.argsort([hash_of(seed, items[row].id) for row in self.rows], kind="stable")
        kept = np.concatenate([rank[self.owner[rank] == group][:size] for group in range(len(self.groups))])
        return self.taken(np.sort(kept))

    def taken(self, places: np.ndarray, owner: np.ndarray | None = None) -> "GroupedItems":
        """Some of the questions, by their places in `rows`, in the groups they have or in others.

        Args:
            places: places within ``rows``, repeated where a question counts twice.
            owner: row of the group of each of them; as they are, unless given.
        """
        owner = self.owner[places] if owner is None else owner
        return GroupedItems(self.recording, self.rows[places], owner, self.groups, self.condition)

    def select_groups(self, groups: Sequence[str]) -> "GroupedItems":
        """The questions of some groups, in the given order of groups.

        Args:
            groups: names of groups.

        Raises:
            GroupError: no such group.
            MismatchError: a group twice, or none.
        """
        groups = as_names("groups", groups, MismatchError)
        if not groups or len(set(groups)) < len(groups):
            raise MismatchError(
                f"groups are some of {', '.join(self.groups)}, each once; got {', '.join(groups) or 'none'}"
            )
        unknown = [group for group in groups if group not in self.groups]
        if unknown:
            raise GroupError(f"group {unknown[0]!r} is not among these questions; they have {', '.join(self.groups)}")
        place = np.array([groups.index(g) if g in groups else -1 for g in self.groups], dtype=np.int64)
        owner = place[self.owner]
        kept = owner >= 0
        return GroupedItems(self.recording, self.rows[kept], owner[kept], tuple(groups), self.condition)

    @cached_property
    def statistics(self) -> ActivationStatistics:
        """The questions' counts added up by group, exactly."""
        recording, n_groups = self.recording, len(self.groups)
        sums: dict[str, np.ndarray] = {}
        for name in recording.tables:
            if name == "maximum" or name in recording.statistics:
                continue
            dtype = np.float64 if name == "total" else np.int64
            sums[name] = np.zeros((n_groups, recording._files.columns[name]), dtype=dtype)
            for group in range(n_groups):
                for _, values in recording.chunks(self.rows[self.owner == group], name):
                    sums[name][group] += values.sum(0, dtype=dtype)
        return ActivationStatistics(
            space=self.space,
            groups=self.groups,
            positive=torch.from_numpy(sums["positive"]),
            tokens=self.tokens,
            items=self.items,
            routed=torch.from_numpy(sums["reached"]) if "reached" in sums else None,
            total=torch.from_numpy(sums["total"]) if "total" in sums else None,
            provenance=self.provenance,
        )

    def values(self, on: str, columns: slice) -> Float64[np.ndarray, "item neuron"]:
        """One value for each question and neuron of a range.

        Args:
            on: ``"mean"`` (mean activation over the question's counted tokens; 0 if none reached the neuron),
                ``"probability"`` (share of those tokens at which the neuron fired), or ``"maximum"`` (highest
                activation among them; ``-inf`` if none reached the neuron), or the name of a statistic of your own.
            columns: range of flat indices.

        Raises:
            SelectionError: no such value, or it was not recorded.
        """
        recording = self.recording
        table = {"mean": "total", "probability": "positive", "maximum": "maximum"}.get(on)
        if table is None:
            check_choice("on", on, (*VALUES, *recording.statistics), SelectionError)
        table = table or on
        if table not in recording.tables:
            option = "magnitudes" if on == "mean" else "maxima"
            raise SelectionError(f"this recording holds no {on} of each question: record_items(…, {option}=True)")
        values = recording._files.table(table)[self.rows, columns].astype(np.float64)
        if on == "maximum" or table == on:
            return values
        if "reached" in recording.tables:
            site = self.space.site_of[columns].numpy()
            reached = recording._files.table("reached")[self.rows][:, site].astype(np.float64)
        else:
            reached = recording.tokens.numpy()[self.rows].astype(np.float64)[:, None]
        return np.divide(values, reached, out=np.zeros_like(values), where=np.broadcast_to(reached > 0, values.shape))

    def __repr__(self) -> str:
        counts = ", ".join(f"{group} {n}" for group, n in zip(self.groups, self.items.tolist(), strict=True))
        return f"GroupedItems({len(self.rows)} questions: {counts}; {self.condition}, over {self.space!r})"
