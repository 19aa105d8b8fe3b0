"""Sets of neurons, and one set per group.

A `NeuronSet` is what an ablation switches off; a `Selection` is what a selector gives: a `NeuronSet` for each group.
Both are immutable, know the `NeuronSpace` that numbers their neurons, and refuse to be mixed with another numbering.
"""

import hashlib
import math
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from vlmneurons.checks import names, of_kind, path_of
from vlmneurons.errors import FileFormatError, GroupError, MismatchError, SelectionError, SiteError
from vlmneurons.files import tables as _files
from vlmneurons.neurons.sites import NeuronSpace, Site

if TYPE_CHECKING:
    import pandas


class NeuronSet(_files.Shareable):
    """An immutable set of neurons of one `NeuronSpace`.

    Two sets combine with ``& | - ^`` and compare with ``== <= < >= >`` if their spaces are equal; ``~`` gives the rest
    of the space. A set read at another kind of site is made with `at`.

    Examples:
        >>> space = NeuronSpace.from_widths("language", "gate", [8, 8])
        >>> neurons = NeuronSet(space, [3, 9, 12])
        >>> neurons.per_layer(), len(~neurons), (1, 4) in neurons.to_pairs()
        ({0: 1, 1: 2}, 13, True)
    """

    __slots__ = ("_indices", "_space")
    _space: NeuronSpace
    _indices: Int64[Tensor, " member"]

    def __init__(self, space: NeuronSpace, indices: Any = ()) -> None:
        """The set of the given flat indices.

        Args:
            space: the space that numbers the neurons.
            indices: flat indices: an iterable of ints, or a one-dimensional integer tensor or array. They are copied;
                order and repetition do not matter.

        Raises:
            SiteError: an index is no integer or not in the space.
        """
        _check_space(space)
        flat = _flat_indices(indices)
        if flat.numel():
            lowest, highest = int(flat.min()), int(flat.max())
            if lowest < 0 or highest >= len(space):
                bad = lowest if lowest < 0 else highest
                raise SiteError(f"neuron {bad} is not in this space (0–{len(space) - 1}): {space!r}")
        object.__setattr__(self, "_space", space)
        object.__setattr__(self, "_indices", torch.unique(flat))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a NeuronSet is immutable: {name!r} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a NeuronSet is immutable: {name!r} cannot be deleted")

    def __reduce__(self) -> tuple[Any, ...]:
        return NeuronSet, (self._space, self._indices)

    @classmethod
    def _of(cls, space: NeuronSpace, indices: Tensor) -> "NeuronSet":
        """A set from indices that are known to be sorted, unique, in the space, and nobody else's."""
        made = object.__new__(cls)
        object.__setattr__(made, "_space", space)
        object.__setattr__(made, "_indices", indices)
        return made

    @classmethod
    def empty(cls, space: NeuronSpace) -> "NeuronSet":
        """The set of no neuron.

        Args:
            space: the space that numbers the neurons.

        Raises:
            SiteError: it is no space.
        """
        _check_space(space)
        return cls._of(space, torch.empty(0, dtype=torch.int64))

    @classmethod
    def full(cls, space: NeuronSpace) -> "NeuronSet":
        """The set of all neurons of a space.

        Args:
            space: the space that numbers the neurons.

        Raises:
            SiteError: it is no space.
        """
        _check_space(space)
        return cls._of(space, torch.arange(len(space)))

    @classmethod
    def from_indices(cls, space: NeuronSpace, indices: Any) -> "NeuronSet":
        """The set of some neurons, given per layer, per site, or as flat indices.

        Args:
            space: the space that numbers the neurons.
            indices: a mapping from a layer number, a `Site` or a site's name to neuron numbers within it; or flat
                indices, as for ``NeuronSet(space, indices)``.

        Raises:
            SiteError: a layer, site or neuron that the space does not have, or a layer with several sites.

        Examples:
            >>> space = NeuronSpace.from_widths("language", "gate", [8, 8])
            >>> NeuronSet.from_indices(space, {0: [7, 5], "language.layers.1.mlp.gate": [2]}).indices
            tensor([ 5,  7, 10])
        """
        _check_space(space)
        if not isinstance(indices, Mapping):
            return cls(space, indices)
        parts = []
        for key, numbers in indices.items():
            position = space.position(key) if isinstance(key, (Site, str)) else _layer_position(space, key)
            parts.append(_within(space, position, _flat_indices(numbers)))
        return cls(space, torch.cat(parts) if parts else ())

    @classmethod
    def from_pairs(cls, space: NeuronSpace, pairs: Iterable[Any]) -> "NeuronSet":
        """The set of (layer, neuron) pairs; a `Site` or a site's name may stand for the layer.

        Args:
            space: the space that numbers the neurons.
            pairs: pairs of a layer (or site) and a neuron's number within it.

        Raises:
            SiteError: a layer, site or neuron that the space does not have, or a layer with several sites.
        """
        grouped: dict[Any, list[int]] = {}
        if not isinstance(pairs, Iterable):
            raise SiteError(f"from_pairs takes pairs of a layer and a neuron's number; got {type(pairs).__name__}")
        for pair in pairs:
            try:
                place, neuron = pair
                grouped.setdefault(place, []).append(neuron)
            except (TypeError, ValueError) as error:
                raise SiteError(f"{pair!r} is not a pair of a layer and a neuron's number") from error
        return cls.from_indices(space, grouped)

    @classmethod
    def from_mask(cls, space: NeuronSpace, mask: Any) -> "NeuronSet":
        """The set of the neurons where a boolean mask ``[neuron]`` over the whole space is true.

        Args:
            space: the space that numbers the neurons.
            mask: a tensor, array or list of bools, one a neuron.

        Raises:
            MismatchError: the mask is not boolean or not as long as the space.
            SiteError: the space is none.
        """
        _check_space(space)
        try:
            tensor = torch.as_tensor(mask).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise MismatchError(
                f"a mask is boolean, one value for each of the {len(space)} neurons of the space; got "
                f"{type(mask).__name__}: {error}"
            ) from error
        if tensor.dtype != torch.bool or tensor.shape != (len(space),):
            raise MismatchError(
                f"a mask is boolean, one value per neuron of the space ({len(space)}); got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}"
            )
        return cls._of(space, tensor.nonzero().flatten())

    @property
    def space(self) -> NeuronSpace:
        """The space that numbers the neurons."""
        return self._space

    @property
    def indices(self) -> Int64[Tensor, " member"]:
        """The flat indices, sorted, each once. A new tensor each time: writing to it does not change the set."""
        return self._indices.clone()

    def mask(self) -> Bool[Tensor, " neuron"]:
        """For every neuron of the space whether it is in the set."""
        mask = torch.zeros(len(self._space), dtype=torch.bool)
        mask[self._indices] = True
        return mask

    def __len__(self) -> int:
        return self._indices.numel()

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices.tolist())

    def __contains__(self, neuron: object) -> bool:
        """Whether a flat index, or a pair of a `Site` (or its name) and a neuron's number in it, is in the set.

        Raises:
            SiteError: a pair names a site or a neuron that the space does not have.
        """
        if isinstance(neuron, tuple) and len(neuron) == 2 and isinstance(neuron[0], (Site, str)):
            index = self._space.flat(*neuron)
        else:
            try:
                index = operator.index(neuron)  # type: ignore[arg-type]
            except TypeError:
                return False
            if isinstance(neuron, bool) or not 0 <= index < len(self._space):
                return False
        place = int(torch.searchsorted(self._indices, index))
        return place < len(self) and int(self._indices[place]) == index

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NeuronSet):
            return NotImplemented
        return self._space == other._space and torch.equal(self._indices, other._indices)

    def __hash__(self) -> int:
        return hash((self._space.fingerprint, self._indices.numpy().tobytes()))

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that are equal for equal sets, on every machine."""
        little_endian = self._indices.numpy().astype("<i8")
        return hashlib.sha256(self._space.fingerprint.encode() + little_endian.tobytes()).hexdigest()[:16]

    def _check_same_space(self, other: "NeuronSet") -> None:
        of_kind("other", other, NeuronSet, MismatchError, "a NeuronSet, such as selection['Japan']")
        check_same_space(self._space, other._space)

    def __and__(self, other: "NeuronSet") -> "NeuronSet":
        if not isinstance(other, NeuronSet):
            return NotImplemented
        self._check_same_space(other)
        return self._of(self._space, self._indices[torch.isin(self._indices, other._indices, assume_unique=True)])

    def __or__(self, other: "NeuronSet") -> "NeuronSet":
        if not isinstance(other, NeuronSet):
            return NotImplemented
        self._check_same_space(other)
        return self._of(self._space, torch.unique(torch.cat([self._indices, other._indices])))

    def __sub__(self, other: "NeuronSet") -> "NeuronSet":
        if not isinstance(other, NeuronSet):
            return NotImplemented
        self._check_same_space(other)
        shared = torch.isin(self._indices, other._indices, assume_unique=True)
        return self._of(self._space, self._indices[~shared])

    def __xor__(self, other: "NeuronSet") -> "NeuronSet":
        if not isinstance(other, NeuronSet):
            return NotImplemented
        self._check_same_space(other)
        values, times = torch.unique(torch.cat([self._indices, other._indices]), return_counts=True)
        return self._of(self._space, values[times == 1])

    def __invert__(self) -> "NeuronSet":
        return self._of(self._space, (~self.mask()).nonzero().flatten())

    def isdisjoint(self, other: "NeuronSet") -> bool:
        """Whether no neuron is in both sets.

        Args:
            other: another set.

        Raises:
            MismatchError: the sets are of different spaces.
        """
        self._check_same_space(other)
        return not len(self & other)

    def __le__(self, other: "NeuronSet") -> bool:
        if not isinstance(other, NeuronSet):
            return NotImplemented
        return len(self & other) == len(self)

    def __lt__(self, other: "NeuronSet") -> bool:
        if not isinstance(other, NeuronSet):
            return NotImplemented
        return self <= other and len(self) < len(other)

    def __ge__(self, other: "NeuronSet") -> bool:
        if not isinstance(other, NeuronSet):
            return NotImplemented
        return len(self & other) == len(other)

    def __gt__(self, other: "NeuronSet") -> bool:
        if not isinstance(other, NeuronSet):
            return NotImplemented
        return self >= other and len(self) > len(other)

    def at(self, kind: str) -> "NeuronSet":
        """The same neurons, read at another point of their MLPs: ``"pre"``, ``"gate"``, ``"up"`` or ``"post"``.

        Args:
            kind: ``"pre"``, ``"gate"``, ``"up"`` or ``"post"``.
        """
        return self._of(self._space.at(kind), self._indices)

    def per_site(self) -> Int64[Tensor, " site"]:
        """Number of neurons in each site of the space, zeros included."""
        return torch.bincount(_positions(self._space, self._indices), minlength=len(self._space.sites))

    def per_layer(self, tower: str | None = None) -> dict[int, int]:
        """Number of neurons in each layer of a tower, zeros included; all MLPs of a layer together.

        Args:
            tower: which tower; may be left out if the space has only one.

        Raises:
            SiteError: no such tower, or none given for a space with several.
        """
        tower = _one_tower(self._space, tower)
        counts = dict.fromkeys(sorted({site.layer for site in self._space if site.tower == tower}), 0)
        for site, count in zip(self._space.sites, self.per_site().tolist(), strict=True):
            if site.tower == tower:
                counts[site.layer] += count
        return counts

    def by_site(self) -> dict[Site, Int64[Tensor, " part"]]:
        """For each site that has any, the numbers of its neurons within the site, sorted."""
        counts = self.per_site()
        parts = self._indices.split(counts.tolist())
        return {
            site: part - offset
            for site, offset, part in zip(self._space.sites, self._space.offsets[:-1], parts, strict=True)
            if part.numel()
        }

    def by_layer(self) -> dict[int, Int64[Tensor, " part"]]:
        """For each layer that has any, the numbers of its neurons within the layer's one site, sorted.

        Raises:
            SiteError: a layer of the space has several sites (towers, experts): use `by_site`.
        """
        _check_one_site_per_layer(self._space, "use by_site()")
        by_layer = {site.layer: part for site, part in self.by_site().items()}
        return {layer: by_layer[layer] for layer in sorted(by_layer)}

    def to_pairs(self) -> list[tuple[int, int]]:
        """The set as sorted (layer, neuron) pairs; the inverse of `from_pairs`.

        Raises:
            SiteError: a layer of the space has several sites (towers, experts): use `by_site`.
        """
        return [(layer, neuron) for layer, part in self.by_layer().items() for neuron in part.tolist()]

    def jaccard(self, other: "NeuronSet") -> float:
        """Size of the intersection over size of the union, from 0 to 1; two empty sets are equal, so 1.

        Args:
            other: another set.

        Raises:
            MismatchError: the sets are of different spaces.
        """
        self._check_same_space(other)
        shared = len(self & other)
        union = len(self) + len(other) - shared
        return shared / union if union else 1.0

    def expected_jaccard(self, other: "NeuronSet") -> float:
        """The Jaccard index to expect of two random sets of these sizes: the chance level of `jaccard`.

        Args:
            other: another set.

        Raises:
            MismatchError: the sets are of different spaces.
        """
        self._check_same_space(other)
        return expected_jaccard(len(self), len(other), len(self._space))

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Write the set and its space to a safetensors file.

        Args:
            path: the file, such as ``"neurons.safetensors"``.

        Raises:
            OSError: the file cannot be written; what was there before stays.
        """
        _files.write(path, "NeuronSet", {"indices": self._indices}, {"space": self._space.to_json()})

    @classmethod
    def load(cls, path: "str | os.PathLike[str]") -> "NeuronSet":
        """The set that `save` wrote.

        Args:
            path: the file.

        Raises:
            FileFormatError: the file is damaged, of another kind, or from a newer version.
        """
        tensors, data = _files.read(path, "NeuronSet", {"indices": "I64"})
        space = space_of_file(path, data)
        _check_sorted(path, tensors["indices"], len(space))
        return cls._of(space, tensors["indices"])

    def __repr__(self) -> str:
        share = len(self) / len(self._space)
        return f"NeuronSet({len(self):,} of {len(self._space):,} neurons, {share:.3g} of {self._space!r})"


def expected_jaccard(first: int, second: int, total: int) -> float:
    """The mean Jaccard index of two independent uniform random sets of the given sizes.

    The intersection ``X`` of sets of sizes ``a`` and ``b`` out of ``n`` is hypergeometric; this is the exact
    ``E[X / (a + b - X)]``, not the ratio of expectations. Two empty sets count as equal (1).

    Args:
        first: size of one set.
        second: size of the other.
        total: number of neurons that both are drawn from.

    Raises:
        MismatchError: a size is negative or larger than ``total``.

    Examples:
        >>> expected_jaccard(1, 1, 4)  # equal with probability 1/4, else disjoint
        0.25
    """
    if not (0 <= first <= total and 0 <= second <= total):
        raise MismatchError(f"sets of {first} and {second} neurons cannot be drawn from {total}")
    if first == 0 and second == 0:
        return 1.0
    low, high = max(0, first + second - total), min(first, second)
    mode = min(high, max(low, (first + 1) * (second + 1) // (total + 2)))
    # Log ratios of neighbouring probabilities, added up outwards from the mode: near the mode, where the mass is,
    # only few terms are added, so rounding stays tiny at any size (differences of log-gammas would lose digits).
    x = np.arange(low, high, dtype=np.float64)
    steps = np.log(first - x) + np.log(second - x) - np.log(x + 1) - np.log(total - first - second + x + 1)
    middle = mode - low
    up = np.cumsum(steps[middle:])
    down = -np.cumsum(steps[:middle][::-1])[::-1]
    weights = np.exp(np.concatenate([down, [0.0], up]))
    shared = np.arange(low, high + 1, dtype=np.float64)
    return math.fsum(weights * (shared / (first + second - shared))) / math.fsum(weights)


class Selection(_files.Shareable, Mapping[str, NeuronSet]):
    """What a selector chose: a `NeuronSet` for each group, over one space. Immutable, in the order of the groups.

    Selections combine group by group with ``& | - ^``.

    Attributes:
        selector: says exactly how the sets were chosen, such as ``"CAS(fraction=0.005)"``.
        budget: number of neurons that each group was to get, or None if the rule has no such number. A set is never
            larger than the budget; it is smaller where fewer neurons were eligible.

    Examples:
        >>> space = NeuronSpace.from_widths("language", "gate", [8, 8])
        >>> Selection({"EGY": NeuronSet(space, [3, 9]), "SGP": NeuronSet(space, [4])}, selector="by hand", budget=2)
        Selection by hand: 2 groups, NeuronSpace(language.gate: 2 layers x 8 = 16 neurons)
          EGY  2 neurons
          SGP  1 neuron (of 2 asked for: no more were eligible)
    """

    __slots__ = ("_budget", "_provenance", "_selector", "_sets")

    def __init__(
        self,
        sets: Mapping[str, NeuronSet],
        *,
        selector: str = "",
        budget: SupportsIndex | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """A selection from its sets.

        Args:
            sets: the neurons of each group.
            selector: what made it, such as ``"CAS(fraction=0.005)"``.
            budget: the largest number of neurons a set may have; None if nothing limits it.
            provenance: where it comes from: plain values that JSON can hold.

        Raises:
            SelectionError: no group, a group twice or whose name is no text, or a set larger than the budget.
            MismatchError: the sets are not all of one space.
        """
        try:
            given = sets if isinstance(sets, Mapping) else list(sets)
            sets = dict(given)
            if len(sets) < len(given):
                raise ValueError("a group stands in it twice")
            budget = None if budget is None else operator.index(budget)
        except (TypeError, ValueError) as error:
            raise SelectionError(f"a selection is a NeuronSet for each group, and a whole budget: {error}") from error
        if budget is not None and budget < 0:
            raise SelectionError(f"a budget is a number of neurons; got {budget}")
        if not sets:
            raise SelectionError("a selection needs at least one group; none was given")
        first = next(iter(sets.values()))
        for group, neurons in sets.items():
            if not isinstance(group, str) or not group:
                raise SelectionError(f"a group's name is a text that is not empty; got {group!r}")
            if not isinstance(neurons, NeuronSet):
                raise SelectionError(f"group {group!r} must have a NeuronSet; got {type(neurons).__name__}")
            check_same_space(first.space, neurons.space)
            if budget is not None and len(neurons) > budget:
                raise SelectionError(f"group {group!r} has {len(neurons)} neurons, more than the budget of {budget}")
        object.__setattr__(self, "_sets", sets)
        object.__setattr__(self, "_selector", str(selector))
        object.__setattr__(self, "_budget", budget)
        object.__setattr__(self, "_provenance", _files.plain(dict(provenance or {}), "provenance"))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Selection is immutable: {name!r} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Selection is immutable: {name!r} cannot be deleted")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_selection, (self._sets, self._selector, self._budget, self._provenance)

    @property
    def selector(self) -> str:
        """How the sets were chosen."""
        return self._selector

    @property
    def budget(self) -> int | None:
        """Number of neurons that each group was to get, if the rule has such a number."""
        return self._budget

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the selection comes from, as plain values; a copy."""
        return _files.plain(self._provenance, "provenance")

    @property
    def space(self) -> NeuronSpace:
        """The space that numbers the neurons of all groups."""
        return next(iter(self._sets.values())).space

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups, in order."""
        return tuple(self._sets)

    def __getitem__(self, group: str) -> NeuronSet:
        try:
            return self._sets[group]
        except (KeyError, TypeError):
            raise GroupError(f"group {group!r} is not in this selection; it has {', '.join(self._sets)}") from None

    def __contains__(self, group: object) -> bool:
        return isinstance(group, str) and group in self._sets

    def __iter__(self) -> Iterator[str]:
        return iter(self._sets)

    def __len__(self) -> int:
        return len(self._sets)

    def _combine(self, other: "Selection", symbol: str, combine: Callable[[NeuronSet, NeuronSet], NeuronSet]) -> Any:
        if not isinstance(other, Selection):
            return NotImplemented
        if set(self._sets) != set(other._sets):
            alone = [group for group in (*self, *other) if (group in self) != (group in other)]
            raise MismatchError(
                f"selections of different groups cannot be combined: {', '.join(alone)} "
                f"{'is' if len(alone) == 1 else 'are'} only in one of them"
            )
        sets = {group: combine(neurons, other[group]) for group, neurons in self._sets.items()}
        provenance = {"combined": [self._provenance, other._provenance]}
        if self._provenance == other._provenance:
            provenance = self._provenance
        selector = f"{in_parentheses(self._selector)} {symbol} {in_parentheses(other._selector)}"
        return Selection(sets, selector=selector, provenance=provenance)

    def __and__(self, other: "Selection") -> "Selection":
        return self._combine(other, "&", operator.and_)

    def __or__(self, other: "Selection") -> "Selection":
        return self._combine(other, "|", operator.or_)

    def __sub__(self, other: "Selection") -> "Selection":
        return self._combine(other, "-", operator.sub)

    def __xor__(self, other: "Selection") -> "Selection":
        return self._combine(other, "^", operator.xor)

    def at(self, kind: str) -> "Selection":
        """The same neurons, read at another point of their MLPs.

        Args:
            kind: ``"pre"``, ``"gate"``, ``"up"`` or ``"post"``.
        """
        return self._with({group: neurons.at(kind) for group, neurons in self._sets.items()})

    def _with(self, sets: Mapping[str, NeuronSet]) -> "Selection":
        return Selection(sets, selector=self._selector, budget=self._budget, provenance=self._provenance)

    def table(self) -> "pandas.DataFrame":
        """Number of neurons per group (rows) and layer (columns), zeros included.

        Columns are layer numbers, or (tower, layer) if the space has several towers.
        """
        import pandas as pd

        towers = _towers(self.space)
        rows = []
        for neurons in self._sets.values():
            counts = {(tower, layer): n for tower in towers for layer, n in neurons.per_layer(tower).items()}
            rows.append(counts if len(towers) > 1 else {layer: n for (_, layer), n in counts.items()})
        table = pd.DataFrame(rows, index=pd.Index(self.groups, name="group"))
        if len(towers) > 1:
            table.columns = pd.MultiIndex.from_tuples(list(table.columns), names=["tower", "layer"])
        else:
            table.columns.name = "layer"
        return table

    def overlap(self) -> "pandas.DataFrame":
        """How much the groups' sets overlap: ``["jaccard"]`` and ``["chance"]`` are tables of group x group.

        ``chance`` is the mean Jaccard index of random sets of the same sizes (see `expected_jaccard`).
        """
        import pandas as pd
        from scipy.sparse import csr_array

        sets = list(self._sets.values())
        # The product of groups by neurons with itself counts what they share; sparse, as sets are small and spaces not.
        ends = np.cumsum([0, *map(len, sets)])
        places = np.concatenate([one._indices.numpy() for one in sets])
        table = csr_array((np.ones(len(places), dtype=np.int64), places, ends), shape=(len(sets), len(self.space)))
        shared = (table @ table.T).toarray()
        sizes = np.array([len(one) for one in sets])
        union = sizes[:, None] + sizes - shared
        jaccard = np.divide(shared, union, out=np.ones(union.shape), where=union > 0)
        pairs = {tuple(sorted((first, second))) for first in set(sizes.tolist()) for second in set(sizes.tolist())}
        levels = {pair: expected_jaccard(*pair, len(self.space)) for pair in pairs}
        chance = [[levels[min(first, second), max(first, second)] for second in sizes] for first in sizes]
        index = pd.Index(self.groups, name="group")
        tables = [pd.DataFrame(values, index=index, columns=list(self.groups)) for values in (jaccard, chance)]
        return pd.concat(tables, axis=1, keys=["jaccard", "chance"], names=["measure", "other"])

    def to_lape(self, path: "str | os.PathLike[str] | None" = None) -> list[list[Tensor]]:
        """The format of the LAPE authors' released files: ``result[group][layer]`` is a LongTensor of neuron numbers.

        Args:
            path: where to write it with ``torch.save``, if given. The format has no room for the groups' names, the
                space or the selector: use `save` to keep them.

        Raises:
            SiteError: a layer of the space has several sites (towers, experts), which the format cannot tell apart.
        """
        _check_one_site_per_layer(self.space, "the LAPE format has one list per layer")
        none = torch.empty(0, dtype=torch.int64)
        nested = []
        for neurons in self._sets.values():
            by_layer = neurons.by_layer()
            nested.append([by_layer.get(layer, none.clone()) for layer in range(max(self.space.layers) + 1)])
        if path is not None:
            torch.save(nested, path_of("path", path, FileFormatError))
        return nested

    @classmethod
    def from_lape(cls, nested: Any, space: NeuronSpace, groups: Sequence[str]) -> "Selection":
        """A selection in the format of the LAPE authors' released files.

        Args:
            nested: the nested list, or the path of a file that holds one. A file is read with
                ``torch.load(..., weights_only=True)``, which does not run code that a file may carry.
            space: the space that the layers and neurons belong to; the format does not say.
            groups: the groups' names, in the order of the list; the format does not say.

        Raises:
            FileFormatError: not of that form, or not of this space or number of groups.
            SiteError: a layer of the space has several sites (towers, experts).
        """
        _check_space(space)
        _check_one_site_per_layer(space, "the LAPE format has one list per layer")
        source = "LAPE selection"
        if isinstance(nested, (str, os.PathLike)):
            source = os.fspath(nested)
            _files.check_regular(source)
            _files.check_uncompressed(source)
            try:
                # torch warns about pickles of other programs; they are refused below, or were read as plain lists.
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    nested = torch.load(source, weights_only=True, map_location="cpu")
            except OSError:
                raise
            except Exception as error:  # PyTorch's own reader fails in many ways on bytes that it did not write
                raise FileFormatError(f"{source}: not a file of neuron lists: {error}") from error
        groups = names("groups", (groups,) if isinstance(groups, str) else groups, MismatchError)
        if not isinstance(nested, (list, tuple)) or len(nested) != len(groups):
            got = f"{len(nested)} lists" if isinstance(nested, (list, tuple)) else f"a {type(nested).__name__}"
            raise FileFormatError(f"{source}: expected one list for each of {len(groups)} groups; got {got}")
        if len(set(groups)) != len(groups):
            raise FileFormatError(f"{source}: a group is named twice in {', '.join(map(str, groups))}")
        depth = max(space.layers) + 1
        sets = {}
        for group, layers in zip(groups, nested, strict=True):
            if not isinstance(layers, (list, tuple)) or len(layers) != depth:
                got = f"{len(layers)} layers" if isinstance(layers, (list, tuple)) else f"a {type(layers).__name__}"
                raise FileFormatError(f"{source}: group {group!r} needs {depth} layers as the space has; got {got}")
            try:
                for layer, numbers in enumerate(layers):
                    # A tensor of one stored number can claim a billion: look at the length before the numbers.
                    most = space.widths[_layer_position(space, layer)] if len(numbers) else 0
                    if len(numbers) > most:
                        raise SiteError(f"layer {layer} has {most} neurons, not the {len(numbers)} that are listed")
                sets[group] = NeuronSet.from_indices(
                    space, {layer: numbers for layer, numbers in enumerate(layers) if len(numbers)}
                )
            except (SiteError, TypeError, RuntimeError) as error:
                raise FileFormatError(f"{source}: group {group!r}: {error}") from error
        return cls(sets, selector=f"from_lape({source})")

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Write the selection, with its space, selector and provenance, to a safetensors file.

        Args:
            path: the file, such as ``"neurons.safetensors"``.

        Raises:
            OSError: the file cannot be written; what was there before stays.
        """
        tensors = {
            "indices": torch.cat([neurons._indices for neurons in self._sets.values()]),
            "sizes": torch.tensor([len(neurons) for neurons in self._sets.values()], dtype=torch.int64),
        }
        data = {
            "space": self.space.to_json(),
            "groups": list(self._sets),
            "selector": self._selector,
            "budget": self._budget,
            "provenance": self._provenance,
        }
        _files.write(path, "Selection", tensors, data)

    @classmethod
    def load(cls, path: "str | os.PathLike[str]") -> "Selection":
        """The selection that `save` wrote.

        Args:
            path: the file.

        Raises:
            FileFormatError: the file is damaged, of another kind, or from a newer version.
        """
        tensors, data = _files.read(path, "Selection", {"indices": "I64", "sizes": "I64"})
        space = space_of_file(path, data)
        groups, budget = data.get("groups"), data.get("budget")
        sizes, indices = tensors["sizes"], tensors["indices"]
        if (
            not isinstance(groups, list)
            or not all(isinstance(group, str) for group in groups)
            or len(set(groups)) != len(groups)
            or not isinstance(data.get("selector"), str)
            or not isinstance(data.get("provenance"), dict)
            or not (budget is None or (isinstance(budget, int) and not isinstance(budget, bool)))
        ):
            raise FileFormatError(f"{path}: the groups, selector, budget or provenance are not what a Selection has")
        if sizes.ndim != 1 or sizes.shape[0] != len(groups) or (sizes < 0).any() or int(sizes.sum()) != indices.numel():
            raise FileFormatError(f"{path}: the sizes of the sets do not agree with the indices")
        sets = {}
        for group, part in zip(groups, indices.flatten().split(sizes.tolist()), strict=True):
            _check_sorted(path, part, len(space))
            sets[group] = NeuronSet._of(space, part)
        try:
            return cls(sets, selector=data["selector"], budget=budget, provenance=data["provenance"])
        except (SelectionError, MismatchError) as error:
            raise FileFormatError(f"{path}: {error}") from error

    def __repr__(self) -> str:
        title = f"Selection {self._selector}: " if self._selector else "Selection: "
        groups = f"{len(self)} group" + ("s" if len(self) != 1 else "")
        width = max(map(len, self._sets))
        lines = [f"{title}{groups}, {self.space!r}"]
        for group, neurons in self._sets.items():
            line = f"  {group:<{width}}  {len(neurons):,} neuron" + ("s" if len(neurons) != 1 else "")
            if self._budget is not None and len(neurons) < self._budget:
                line += f" (of {self._budget:,} asked for: no more were eligible)"
            lines.append(line)
        return "\n".join(lines)


def in_parentheses(expression: str) -> str:
    """A selector's expression, in parentheses if it is made of several."""
    depth = 0
    for place, character in enumerate(expression):
        depth += character in "([{<"
        depth -= character in ")]}>"
        if depth == 0 and expression[place : place + 3] in (" & ", " | ", " - ", " ^ "):
            return f"({expression})"
    return expression


def _rebuild_selection(sets: Any, selector: str, budget: int | None, provenance: Any) -> Selection:
    return Selection(sets, selector=selector, budget=budget, provenance=provenance)


def _check_space(space: Any) -> None:
    if not isinstance(space, NeuronSpace):
        raise SiteError(f"a NeuronSet needs a NeuronSpace; got {type(space).__name__}")


def check_same_space(first: NeuronSpace, second: NeuronSpace) -> None:
    if first is second or first == second:
        return
    advice = ""
    if first.same_neurons(second):
        kinds = sorted({site.kind for site in first})
        advice = f"; they number the same neurons, so .at({kinds[0]!r}) makes them agree"
        if len(kinds) > 1:
            advice = "; they number the same neurons at different kinds of site"
    raise MismatchError(f"the neurons are of different spaces: {first!r} and {second!r}{advice}")


def _flat_indices(indices: Any) -> Int64[Tensor, " index"]:
    """Any way of giving indices as a new int64 tensor; the range is not checked."""
    if isinstance(indices, NeuronSet):
        raise SiteError("indices are numbers; got a NeuronSet, which is already a set of neurons")
    try:
        if isinstance(indices, np.ndarray):
            indices = torch.from_numpy(np.array(indices))
        if isinstance(indices, Tensor):
            tensor = indices.detach().cpu()
        else:
            tensor = torch.tensor([_index(index) for index in indices], dtype=torch.int64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise SiteError(f"indices must be whole numbers: {error}") from error
    if tensor.ndim != 1:
        raise SiteError(f"indices must be one-dimensional; got the shape {tuple(tensor.shape)}")
    if tensor.dtype == torch.bool:
        raise SiteError("indices must be numbers; got booleans: NeuronSet.from_mask makes a set of a mask")
    if tensor.is_floating_point() or tensor.is_complex():
        if tensor.numel():
            raise SiteError(f"indices must be whole numbers; got {tensor.dtype}")
        tensor = tensor.new_empty(0, dtype=torch.int64)
    return tensor.to(torch.int64, copy=True)


def _index(value: Any) -> int:
    if isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) == torch.bool:
        raise TypeError(f"{value!r} is a boolean; NeuronSet.from_mask makes a set of a mask")
    return operator.index(value)


def _layer_position(space: NeuronSpace, layer: Any) -> int:
    """Position of the one site of a layer."""
    try:
        number = _index(layer)
    except TypeError as error:
        raise SiteError(f"{layer!r} is no layer's number, no Site and no site's name") from error
    found = [position for position, site in enumerate(space.sites) if site.layer == number]
    if not found:
        first = space.sites[0]
        return space.position(Site(first.tower, number, first.mlp, first.kind)) if number >= 0 else _no_layer(number)
    if len(found) > 1:
        names = ", ".join(str(space.sites[position]) for position in found[:4])
        raise SiteError(f"layer {number} has {len(found)} sites ({names}, …): name the site instead of the layer")
    return found[0]


def _no_layer(number: int) -> int:
    raise SiteError(f"layer {number} does not exist; layers are numbered from 0")


def _within(space: NeuronSpace, position: int, numbers: Tensor) -> Tensor:
    """Flat indices of neurons given by their numbers within one site."""
    outside = numbers[(numbers < 0) | (numbers >= space.widths[position])]
    if outside.numel():
        raise SiteError(
            f"neuron {int(outside[0])} is not in site {space.sites[position]} (0–{space.widths[position] - 1})"
        )
    return numbers + space.offsets[position]


def _positions(space: NeuronSpace, indices: Tensor) -> Tensor:
    """For each flat index the position of its site."""
    return torch.searchsorted(torch.tensor(space.offsets[1:]), indices, right=True)


def _towers(space: NeuronSpace) -> list[str]:
    return list(dict.fromkeys(site.tower for site in space))


def _one_tower(space: NeuronSpace, tower: str | None) -> str:
    towers = _towers(space)
    if tower is None:
        if len(towers) > 1:
            raise SiteError(f"the space has the towers {', '.join(towers)}: say which, or use per_site()")
        return towers[0]
    if tower not in towers:
        raise SiteError(f"tower {tower!r} is not in this space; it has {', '.join(towers)}")
    return tower


def _check_one_site_per_layer(space: NeuronSpace, advice: str) -> None:
    seen: dict[int, Site] = {}
    for site in space:
        if site.layer in seen:
            raise SiteError(f"layer {site.layer} has several sites ({seen[site.layer]}, {site}, …): {advice}")
        seen[site.layer] = site


def space_of_file(path: "str | os.PathLike[str]", data: Any) -> NeuronSpace:
    if not isinstance(data, dict):
        raise FileFormatError(f"{path}: the description is no dictionary; the file is damaged")
    try:
        return NeuronSpace.from_json(data.get("space"))
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error


def _check_sorted(path: "str | os.PathLike[str]", indices: Tensor, size: int) -> None:
    """Refuse indices of a file that are not what a NeuronSet holds."""
    if indices.ndim != 1 or (indices.numel() and (int(indices[0]) < 0 or int(indices[-1]) >= size)):
        raise FileFormatError(f"{path}: indices outside the space of {size} neurons")
    if not bool((indices[1:] > indices[:-1]).all()):
        raise FileFormatError(f"{path}: indices that are not sorted, or that stand twice")
