"""Sets of neurons: what an ablation switches off.

A set is immutable, knows the `NeuronSpace` that numbers its neurons, and refuses to be mixed with another numbering.
"""

import hashlib
import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex, cast

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from vlmneurons.checks import check_kind
from vlmneurons.errors import FileFormatError, MismatchError, SiteError
from vlmneurons.files import tables as _files
from vlmneurons.neurons.sites import NeuronSpace, Site


class Immutable:
    """Refuses that attributes are set or deleted; ``object.__setattr__`` sets them once."""

    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a {type(self).__name__} is immutable: {name!r} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a {type(self).__name__} is immutable: {name!r} cannot be deleted")


class NeuronSet(Immutable, _files.Shareable):
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

    def __init__(self, space: NeuronSpace, indices: Iterable[SupportsIndex] = ()) -> None:
        """The set of the given flat indices.

        Args:
            space: the space that numbers the neurons.
            indices: flat indices: an iterable of ints, or a one-dimensional integer tensor or array. They are copied;
                order and repetition do not matter.

        Raises:
            SiteError: an index is no integer or not in the space.
        """
        check_space(space)
        flat = _flat_indices(indices)
        if flat.numel():
            lowest, highest = int(flat.min()), int(flat.max())
            if lowest < 0 or highest >= len(space):
                bad = lowest if lowest < 0 else highest
                raise SiteError(f"neuron {bad} is not in this space (0–{len(space) - 1}): {space!r}")
        object.__setattr__(self, "_space", space)
        object.__setattr__(self, "_indices", torch.unique(flat))

    def __reduce__(self) -> tuple[object, ...]:
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
        check_space(space)
        return cls._of(space, torch.empty(0, dtype=torch.int64))

    @classmethod
    def full(cls, space: NeuronSpace) -> "NeuronSet":
        """The set of all neurons of a space.

        Args:
            space: the space that numbers the neurons.

        Raises:
            SiteError: it is no space.
        """
        check_space(space)
        return cls._of(space, torch.arange(len(space)))

    @classmethod
    def from_indices(
        cls,
        space: NeuronSpace,
        indices: Iterable[SupportsIndex] | Mapping[SupportsIndex | Site | str, Iterable[SupportsIndex]],
    ) -> "NeuronSet":
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
        check_space(space)
        if not isinstance(indices, Mapping):
            return cls(space, indices)
        parts = []
        for key, numbers in indices.items():
            position = space.position(key) if isinstance(key, (Site, str)) else layer_position(space, key)
            parts.append(_within(space, position, _flat_indices(numbers)))
        return cls(space, torch.cat(parts) if parts else ())

    @classmethod
    def from_pairs(
        cls, space: NeuronSpace, pairs: Iterable[tuple[SupportsIndex | Site | str, SupportsIndex]]
    ) -> "NeuronSet":
        """The set of (layer, neuron) pairs; a `Site` or a site's name may stand for the layer.

        Args:
            space: the space that numbers the neurons.
            pairs: pairs of a layer (or site) and a neuron's number within it.

        Raises:
            SiteError: a layer, site or neuron that the space does not have, or a layer with several sites.
        """
        grouped: dict[SupportsIndex | Site | str, list[SupportsIndex]] = {}
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
    def from_mask(cls, space: NeuronSpace, mask: Tensor | np.ndarray | Sequence[bool]) -> "NeuronSet":
        """The set of the neurons where a boolean mask ``[neuron]`` over the whole space is true.

        Args:
            space: the space that numbers the neurons.
            mask: a tensor, array or list of bools, one a neuron.

        Raises:
            MismatchError: the mask is not boolean or not as long as the space.
            SiteError: the space is none.
        """
        check_space(space)
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
                index = operator.index(cast(SupportsIndex, neuron))
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
        check_kind("other", other, NeuronSet, MismatchError, "a NeuronSet, such as selection['Japan']")
        check_same_space(self._space, other._space)

    def _combined(self, other: object, combine: Callable[[Tensor, Tensor], Tensor]) -> "NeuronSet":
        if not isinstance(other, NeuronSet):
            return NotImplemented
        self._check_same_space(other)
        return self._of(self._space, combine(self._indices, other._indices))

    def __and__(self, other: "NeuronSet") -> "NeuronSet":
        return self._combined(other, lambda own, their: own[torch.isin(own, their, assume_unique=True)])

    def __or__(self, other: "NeuronSet") -> "NeuronSet":
        return self._combined(other, lambda own, their: torch.unique(torch.cat([own, their])))

    def __sub__(self, other: "NeuronSet") -> "NeuronSet":
        return self._combined(other, lambda own, their: own[torch.isin(own, their, assume_unique=True, invert=True)])

    def __xor__(self, other: "NeuronSet") -> "NeuronSet":
        def in_one(own: Tensor, their: Tensor) -> Tensor:
            values, times = torch.unique(torch.cat([own, their]), return_counts=True)
            return values[times == 1]

        return self._combined(other, in_one)

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
        return len(self & other) == len(self) if isinstance(other, NeuronSet) else NotImplemented

    def __lt__(self, other: "NeuronSet") -> bool:
        return self <= other and len(self) < len(other) if isinstance(other, NeuronSet) else NotImplemented

    def __ge__(self, other: "NeuronSet") -> bool:
        return len(self & other) == len(other) if isinstance(other, NeuronSet) else NotImplemented

    def __gt__(self, other: "NeuronSet") -> bool:
        return self >= other and len(self) > len(other) if isinstance(other, NeuronSet) else NotImplemented

    def at(self, kind: str) -> "NeuronSet":
        """The same neurons, read at another point of their MLPs: ``"pre"``, ``"gate"``, ``"up"`` or ``"post"``.

        Args:
            kind: ``"pre"``, ``"gate"``, ``"up"`` or ``"post"``.
        """
        return self._of(self._space.at(kind), self._indices)

    def on(self, space: NeuronSpace) -> "NeuronSet":
        """The neurons of the same layers and numbers in another model, such as a VLM's text-only backbone.

        Layers and widths of the towers that have neurons must be the same; whether the weights have anything to do with
        each other is not known from a space. Towers go by their names, or, where both spaces have only one, by that.

        Args:
            space: the space of a model of the same layers and widths.

        Raises:
            MismatchError: the space is of other towers, layers, widths or kinds of site.
            SiteError: it is no space.

        Examples:
            >>> vlm, text = (NeuronSpace.from_widths(tower, "gate", [8, 8]) for tower in ("language", "decoder"))
            >>> NeuronSet(vlm, [3, 9]).on(text).to_pairs()
            [(0, 3), (1, 1)]
        """
        check_space(space)
        parts = self.by_site()
        single = len(self._space.towers) == len(space.towers) == 1
        for tower in dict.fromkeys(site.tower for site in parts):
            there = space.towers[0] if single else tower
            ours, theirs = (
                {(s.layer, s.mlp, s.kind): n for s, n in zip(one.sites, one.widths, strict=True) if s.tower == name}
                for one, name in ((self._space, tower), (space, there))
            )
            if ours != theirs:
                raise MismatchError(
                    f"the neurons are of {self._space!r} and cannot be those of {space!r}: tower {there!r} has "
                    + _difference(ours, theirs)
                )
        moved = [
            _within(space, space.position(Site(space.towers[0] if single else s.tower, s.layer, s.mlp, s.kind)), part)
            for s, part in parts.items()
        ]
        return NeuronSet(space, torch.cat(moved) if moved else ())

    def per_site(self) -> Int64[Tensor, " site"]:
        """Number of neurons in each site of the space, zeros included."""
        return torch.bincount(self._space.site_of[self._indices], minlength=len(self._space.sites))

    def per_layer(self, tower: str | None = None) -> dict[int, int]:
        """Number of neurons in each layer of a tower, zeros included; all MLPs of a layer together.

        Args:
            tower: which tower; may be left out if the space has only one.

        Raises:
            SiteError: no such tower, or none given for a space with several.
        """
        tower, counts = _one_tower(self._space, tower), self.per_site()
        layers = {layer: at for (where, layer), at in self._space.tower_layers.items() if where == tower}
        return {layer: int(counts[list(layers[layer])].sum()) for layer in sorted(layers)}

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
        check_one_site_per_layer(self._space, "use by_site()")
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
        check_sorted(path, tensors["indices"], len(space))
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


def check_space(space: object) -> None:
    """Refuse what is no space."""
    if not isinstance(space, NeuronSpace):
        raise SiteError(f"a NeuronSet needs a NeuronSpace; got {type(space).__name__}")


def check_same_space(first: NeuronSpace, second: NeuronSpace) -> None:
    """Refuse neurons that are numbered otherwise.

    Raises:
        MismatchError: the spaces differ; the message says how they can be made to agree.
    """
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


def layer_position(space: NeuronSpace, layer: object) -> int:
    """Position of the one site of a layer."""
    try:
        number = _index(layer)
    except TypeError as error:
        raise SiteError(f"{layer!r} is no layer's number, no Site and no site's name") from error
    found = [position for position, site in enumerate(space.sites) if site.layer == number]
    if not found:
        first = space.sites[0]
        if number < 0:
            raise SiteError(f"layer {number} does not exist; layers are numbered from 0")
        return space.position(Site(first.tower, number, first.mlp, first.kind))
    if len(found) > 1:
        names = ", ".join(str(space.sites[position]) for position in found[:4])
        raise SiteError(f"layer {number} has {len(found)} sites ({names}, …): name the site instead of the layer")
    return found[0]


def _within(space: NeuronSpace, position: int, numbers: Tensor) -> Tensor:
    """Flat indices of neurons given by their numbers within one site."""
    outside = numbers[(numbers < 0) | (numbers >= space.widths[position])]
    if outside.numel():
        raise SiteError(
            f"neuron {int(outside[0])} is not in site {space.sites[position]} (0–{space.widths[position] - 1})"
        )
    return numbers + space.offsets[position]


def _difference(ours: Mapping[tuple[int, str, str], int], theirs: Mapping[tuple[int, str, str], int]) -> str:
    """In what the sites of a tower differ, for an error."""
    if not theirs:
        return "no site there"
    if {kind for *_, kind in ours} != {kind for *_, kind in theirs}:
        kinds = [sorted({kind for *_, kind in sites}) for sites in (theirs, ours)]
        return f"sites of kind {', '.join(kinds[0])}, not {', '.join(kinds[1])}: .at({kinds[0][0]!r}) comes first"
    place = min(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    layer, mlp, _ = place
    there, here = (f"{sites[place]:,} neurons" if place in sites else "none" for sites in (theirs, ours))
    return f"{there} in {mlp} of layer {layer}, not {here}"


def _one_tower(space: NeuronSpace, tower: str | None) -> str:
    towers = space.towers
    if tower is None and len(towers) == 1:
        return towers[0]
    if tower is None:
        raise SiteError(f"the space has the towers {', '.join(towers)}: say which, or use per_site()")
    if tower not in towers:
        raise SiteError(f"tower {tower!r} is not in this space; it has {', '.join(towers)}")
    return tower


def check_one_site_per_layer(space: NeuronSpace, advice: str) -> None:
    """Refuse a space in which a layer's number does not name one site."""
    seen: dict[int, Site] = {}
    for site in space:
        if site.layer in seen:
            raise SiteError(f"layer {site.layer} has several sites ({seen[site.layer]}, {site}, …): {advice}")
        seen[site.layer] = site


def space_of_file(path: "str | os.PathLike[str]", data: object) -> NeuronSpace:
    if not isinstance(data, dict):
        raise FileFormatError(f"{path}: the description is no dictionary; the file is damaged")
    try:
        return NeuronSpace.from_json(data.get("space"))
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error


def check_sorted(path: "str | os.PathLike[str]", indices: Tensor, size: int) -> None:
    """Refuse indices of a file that are not what a NeuronSet holds."""
    if indices.ndim != 1 or (indices.numel() and (int(indices[0]) < 0 or int(indices[-1]) >= size)):
        raise FileFormatError(f"{path}: indices outside the space of {size} neurons")
    if not bool((indices[1:] > indices[:-1]).all()):
        raise FileFormatError(f"{path}: indices that are not sorted, or that stand twice")
