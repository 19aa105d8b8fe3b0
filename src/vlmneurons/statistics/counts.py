"""How often each neuron fired for each group: the integers that every selector reads.

Counts are kept, not probabilities, because counts merge exactly: recording two halves and adding them equals
recording the whole. 28 layers x 18,944 neurons x 25 groups are 13.3 million counts, 101 MiB as int64.
"""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, SupportsFloat

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from vlmneurons.checks import JSONMapping, as_names, check_kind
from vlmneurons.errors import MismatchError, SelectionError
from vlmneurons.files import tables as _files
from vlmneurons.neurons.sets import check_same_space
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.statistics.evidence import refuse_uncounted, rows_of
from vlmneurons.statistics.tables import TableEvidence, merged_provenance

if TYPE_CHECKING:
    import pandas

Numbers = Iterable[SupportsFloat | Iterable[SupportsFloat]]
"""A table in any form: tensors, NumPy arrays, lists."""


@dataclass(frozen=True, eq=False, repr=False)
class ActivationStatistics(TableEvidence, _files.Shareable):
    """Counts of firing neurons per group, over a space.

    The tables belong to the object: do not write to them. Use `from_counts` for tables of your own, which copies.

    Attributes:
        space: the space that numbers the neurons.
        groups: names of the groups, each once.
        positive: for how many counted tokens each neuron's activation was > 0, at most the number of tokens.
        tokens: number of counted tokens of each group.
        items: number of counted items of each group; 0 where it is not known.
        routed: number of tokens that reached each site, for a mixture of experts; None if every token reaches every
            site. A neuron's probability is then over the tokens that reached its site.
        total: sum of each neuron's activation over the counted tokens, if it was recorded.
        provenance: where the counts come from, as plain values: model, revision, token rule, condition, …

    Examples:
        >>> space = NeuronSpace.from_widths("language", "gate", [2, 2])
        >>> stats = ActivationStatistics.from_counts(
        ...     space, groups=["EGY", "SGP"], positive=[[4, 0, 1, 2], [1, 0, 3, 3]], tokens=[4, 6]
        ... )
        >>> stats.probability[1]
        tensor([0.1667, 0.0000, 0.5000, 0.5000], dtype=torch.float64)
        >>> (stats + stats).tokens
        tensor([ 8, 12])
    """

    space: NeuronSpace
    groups: tuple[str, ...]
    positive: Int64[Tensor, "group neuron"]
    tokens: Int64[Tensor, " group"]
    items: Int64[Tensor, " group"]
    routed: Int64[Tensor, "group site"] | None = None
    total: Float64[Tensor, "group neuron"] | None = None
    provenance: JSONMapping = field(default_factory=dict)
    _kind, _noun = "ActivationStatistics", "statistics"
    _required, _optional = ("positive", "tokens", "items"), ("routed", "total")

    def __post_init__(self) -> None:
        check_kind("space", self.space, NeuronSpace, MismatchError)
        self._check_head()
        groups, neurons, sites = len(self.groups), len(self.space), len(self.space.sites)
        shapes = {
            "positive": ("[group, neuron]", (groups, neurons)),
            "tokens": ("[group]", (groups,)),
            "items": ("[group]", (groups,)),
            "routed": ("[group, site]", (groups, sites)),
            "total": ("[group, neuron]", (groups, neurons)),
        }
        for name, (axes, shape) in shapes.items():
            table = getattr(self, name)
            if table is None and name in self._optional:
                continue
            dtype = torch.float64 if name == "total" else torch.int64
            if not isinstance(table, Tensor) or table.dtype != dtype or table.device.type != "cpu":
                got = f"{table.dtype} on {table.device}" if isinstance(table, Tensor) else type(table).__name__
                raise MismatchError(
                    f"{name} must be a {dtype} tensor in main memory; got {got}: from_counts converts other tables"
                )
            if tuple(table.shape) != shape:
                raise MismatchError(
                    f"{name} must be {axes} = {list(shape)} for {groups} groups over {self.space!r}; "
                    f"got {list(table.shape)}"
                )
            if name != "total" and (table < 0).any():
                raise MismatchError(f"{name} has negative counts; a count is at least 0")
            if name == "total" and not torch.isfinite(table).all():
                raise MismatchError("total has NaN or infinite values; a sum of activations is finite")
        self._check_at_most_tokens()

    def _check_at_most_tokens(self) -> None:
        """Refuse a neuron that fired more often than tokens were counted, which a wrong table would show."""
        reach, offsets = self.reached, self.space.offsets
        for row, group in enumerate(self.groups):
            if self.routed is None and int(self.positive[row].max()) <= int(self.tokens[row]):
                continue
            most = torch.stack([part.max() for part in self.positive[row].split(self.space.widths)])
            for position in (most > reach[row]).nonzero().flatten().tolist():
                start = offsets[position]
                neuron = int(self.positive[row, start : offsets[position + 1]].argmax())
                raise MismatchError(
                    f"group {group!r}: neuron {neuron} of {self.space.sites[position]} fired for {int(most[position])} "
                    f"tokens, but only {int(reach[row, position])} were counted there"
                )

    @classmethod
    def from_counts(
        cls,
        space: NeuronSpace,
        groups: Iterable[str],
        positive: Numbers,
        tokens: Numbers,
        items: Numbers | None = None,
        *,
        routed: Numbers | None = None,
        total: Numbers | None = None,
        provenance: Mapping[str, object] | None = None,
    ) -> "ActivationStatistics":
        """Statistics from tables in any form: tensors, NumPy arrays, lists. They are checked and copied.

        Args:
            space: the space that numbers the neurons.
            groups: names of the groups.
            positive: ``[group, neuron]``, for how many tokens each neuron fired.
            tokens: ``[group]``, number of counted tokens.
            items: ``[group]``, number of counted items; 0 if not given.
            routed: ``[group, site]``, tokens that reached each site, for a mixture of experts.
            total: ``[group, neuron]``, sum of each neuron's activation over the tokens.
            provenance: plain values that say where the counts come from.

        Raises:
            MismatchError: shapes that do not fit, counts that are not whole or negative, NaN, a group twice, no group,
                or a neuron that fired for more tokens than were counted.
        """
        groups = as_names("groups", groups, MismatchError)
        return cls(
            space,
            groups,
            _counts("positive", positive),
            _counts("tokens", tokens),
            torch.zeros(len(groups), dtype=torch.int64) if items is None else _counts("items", items),
            None if routed is None else _counts("routed", routed),
            None if total is None else _table("total", total).to(torch.float64, copy=True),
            {} if provenance is None else provenance,
        )

    @property
    def probability(self) -> Float64[Tensor, "group neuron"]:
        """``P[c, n]``: share of the counted tokens of group ``c`` for which neuron ``n`` fired, from 0 to 1.

        That is ``positive / tokens`` (Tang et al. 2024, arXiv 2402.16438, section 3.1). In a mixture of experts it is
        over the tokens that reached the neuron's site, and 0 where none did. Computed anew each time.

        Raises:
            SelectionError: a group has no counted token.
        """
        return self._per_token(self.positive)

    @property
    def mean(self) -> Float64[Tensor, "group neuron"]:
        """Mean activation over the counted tokens (that reached the neuron's site), in units of the activation.

        Raises:
            SelectionError: a group has no counted token, or the sums were not recorded.
        """
        if self.total is None:
            raise SelectionError("these statistics hold no sums of activations (total), only counts: record them too")
        return self._per_token(self.total)

    def _per_token(self, table: Tensor) -> Tensor:
        self.check_counted()
        result = table.to(torch.float64, copy=True)
        if self.routed is None:
            return result.div_(self.tokens.to(torch.float64)[:, None])
        # Row by row, so that the divisors never need a table of their own. A site that no token reached has count 0.
        reached = self.routed.clamp(min=1).to(torch.float64)
        widths = torch.tensor(self.space.widths)
        for row, divisor in zip(result, reached, strict=True):
            row.div_(torch.repeat_interleave(divisor, widths))
        return result

    def check_counted(self) -> None:
        """Make sure that every group has counted tokens.

        Raises:
            SelectionError: some have none; the message names them.
        """
        condition = self.provenance.get("condition")
        refuse_uncounted(self.groups, self.tokens, "with select_groups, or record more items", condition=condition)

    def index(self, group: str) -> int:
        """Row of a group in the tables.

        Args:
            group: its name.

        Raises:
            GroupError: no such group.
        """
        return rows_of([group], self.groups, "in these statistics")[0]

    def __add__(self, other: "ActivationStatistics") -> "ActivationStatistics":
        """Statistics of both recordings together: counts of shared groups add up exactly, other groups are appended.

        The inputs must not share items; that cannot be seen from counts. Sums of activations add up as float64.

        Raises:
            MismatchError: another space; another setting (weights, adapters, dtype, processor, prompt, …; see
                `vlmneurons.statistics.identity.Setting`) or condition; or only one of the two has sums of activations.
        """
        if not isinstance(other, ActivationStatistics):
            return NotImplemented
        check_same_space(self.space, other.space)
        provenance = merged_provenance(self.provenance, other.provenance)
        if (self.total is None) != (other.total is None):
            raise MismatchError("only one of the statistics holds sums of activations (total); they cannot be added")
        parts = [self, other]
        if self.routed is not None or other.routed is not None:
            parts = [replace(part, routed=part.reached) if part.routed is None else part for part in parts]
        return parts[0]._added(parts[1], provenance)

    def __radd__(self, other: object) -> "ActivationStatistics":
        # sum() starts from 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    @property
    def reached(self) -> Int64[Tensor, "group site"]:
        """Number of counted tokens that reached each site: ``routed``, or, where that is None, all of them."""
        return self.tokens[:, None].expand(-1, len(self.space.sites)) if self.routed is None else self.routed

    def with_provenance(self, provenance: Mapping[str, object]) -> "ActivationStatistics":
        """The same counts, with another note of where they come from.

        Args:
            provenance: plain values.
        """
        return replace(self, provenance=provenance)

    def merge_groups(self, merged: Mapping[str, Iterable[str]]) -> "ActivationStatistics":
        """The statistics with some groups pooled: ``merge_groups({"Asia": ["Japan", "China"]})``.

        Counts add up, so a group weighs by its tokens. A pooled group stands where its first member stood; groups
        that are not mentioned stay as they are.

        Args:
            merged: for each new group the names of those that it pools.

        Raises:
            GroupError: no such group.
            MismatchError: a group in two pools, an empty pool, or a new name that another group already has.
        """
        check_kind("merged", merged, Mapping, MismatchError, "a dictionary, such as {'Asia': ['Japan', 'China']}")
        pool_of: dict[str, str] = {}
        for name, members in merged.items():
            if isinstance(members, (str, Set)):  # a pool has no order
                members = [members] if isinstance(members, str) else list(members)
            members = as_names(f"merged[{name!r}]", members, MismatchError)
            if not members:
                raise MismatchError(f"merged group {name!r} has no members")
            for group in members:
                self.index(group)
                if group in pool_of:
                    raise MismatchError(f"group {group!r} is merged twice, into {pool_of[group]!r} and {name!r}")
                pool_of[group] = name
        for name in merged:
            if name in self.groups and pool_of.get(name) != name:
                raise MismatchError(f"merged group {name!r} would have the name of another group")
        targets = [pool_of.get(group, group) for group in self.groups]
        kept = tuple(dict.fromkeys(targets))
        rows = torch.tensor([kept.index(target) for target in targets])
        return self._with_rows(
            kept, lambda table: table.new_zeros((len(kept), *table.shape[1:])).index_add_(0, rows, table)
        )

    def table(self) -> "pandas.DataFrame":
        """One row for each ``group``.

        Columns: ``items``, ``tokens``, ``active neurons`` (those that fired at least once) and ``mean probability``
        (over neurons; NaN for a group with no counted token).
        """
        import pandas as pd

        index = pd.Index(self.groups, name="group")
        tokens = self.reached.clamp(min=1).to(torch.float64)
        widths = torch.tensor(self.space.widths)
        mean = [
            float((row / torch.repeat_interleave(reach, widths)).mean()) if counted else float("nan")
            for row, reach, counted in zip(self.positive, tokens, self.tokens.tolist(), strict=True)
        ]
        return pd.DataFrame(
            {
                "items": self.items.tolist(),
                "tokens": self.tokens.tolist(),
                "active neurons": [int((row > 0).sum()) for row in self.positive],
                "mean probability": mean,
            },
            index=index,
        )

    def __repr__(self) -> str:
        width = max(map(len, self.groups))
        lines = [f"ActivationStatistics: {len(self.groups)} groups, {self.space!r}"]
        for group, items, tokens in zip(self.groups, self.items.tolist(), self.tokens.tolist(), strict=True):
            lines.append(f"  {group:<{width}}  {items:,} items, {tokens:,} tokens")
        if len(lines) > 41:
            lines[21:-20] = [f"  … {len(lines) - 41} more"]
        return "\n".join(lines)


def _table(name: str, values: object) -> Tensor:
    try:
        if isinstance(values, Tensor):
            return values.detach().cpu()
        if isinstance(values, (list, tuple)) and values and all(isinstance(row, Tensor) for row in values):
            return torch.stack([row.detach().cpu() for row in values])
        array = np.asarray(values)
        if array.dtype.kind not in "iuf":
            raise TypeError(f"it has the type {array.dtype}")
        if array.dtype.kind == "u" and array.size and int(array.max()) >= 2**63:
            raise ValueError("it has values that do not fit in int64")
        # A copy: NumPy arrays may be read-only, of foreign byte order, or have strides that torch does not know.
        return torch.from_numpy(array.astype(np.int64 if array.dtype.kind in "iu" else np.float64, order="C"))
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise MismatchError(f"{name} is no table of numbers: {error}") from error


def _counts(name: str, values: object) -> Tensor:
    """A new int64 tensor of the same numbers.

    Raises:
        MismatchError: they are not whole numbers, or floats too large to have been counted exactly.
    """
    single = isinstance(values, (Tensor, np.ndarray)) and str(values.dtype).endswith(("float32", "float16"))
    table = _table(name, values)
    if table.dtype == torch.bool or table.is_complex():
        raise MismatchError(f"{name} must be whole numbers; got {table.dtype}")
    if table.is_floating_point():
        if not torch.isfinite(table).all():
            raise MismatchError(f"{name} has NaN or infinite values; counts are whole numbers")
        if (table != table.round()).any():
            raise MismatchError(f"{name} has fractions; counts are whole numbers (probabilities cannot be merged)")
        # 2^24 (2^53) is where a float32 (float64) counter stops growing: such a count may be any larger number.
        exact = 2**11 if "float16" in str(table.dtype) else 2**24 if single or table.dtype == torch.float32 else 2**53
        if table.numel() and float(table.abs().max()) >= exact:
            raise MismatchError(f"{name} has floats of {exact} or more, which do not count exactly; count in int64")
    return table.to(torch.int64, copy=True)
