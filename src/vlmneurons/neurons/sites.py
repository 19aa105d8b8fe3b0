"""Which neurons exist, and how they are numbered.

A *site* is one vector inside one MLP: the neurons of that MLP, read at one of four points of its computation

    post = gate * up,    gate = act(pre),    output = down_proj(post)

(an MLP without an ``up`` branch has ``post = gate``). A `NeuronSpace` puts some sites in a row and numbers all their
neurons from 0. Every table of the library is ``[group, neuron]`` over such a space, so MLPs of different widths,
vision towers, and experts need no special case anywhere: only the space knows where a site begins.
"""

import bisect
import hashlib
import itertools
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import Any, SupportsIndex, cast

import torch
from jaxtyping import Int64
from torch import Tensor

from vlmneurons.checks import JSON, abridged, as_whole, check_kind, check_ordered
from vlmneurons.errors import FileFormatError, SiteError

KINDS = ("pre", "gate", "up", "post")
"""The points of an MLP's computation that a site can be at, in the order in which they are computed."""

_NAME = re.compile(r"(?P<tower>\w+)\.layers\.(?P<layer>[0-9]+)\.(?P<mlp>\w+(?:\.\w+)*)\.(?P<kind>pre|gate|up|post)")


@dataclass(frozen=True, order=True)
class Site:
    """One vector of neurons: ``str(site)`` is its name, such as ``"language.layers.3.mlp.gate"``.

    Attributes:
        tower: which part of the model, ``"language"`` or ``"vision"`` (some models have more).
        layer: number of the transformer block within the tower, from 0.
        mlp: which MLP of the block: ``"mlp"``, or ``"mlp.experts.7"``, ``"mlp.shared_expert"`` in a mixture of experts.
        kind: where in the MLP: ``"pre"`` (input of the activation function), ``"gate"`` (its output), ``"up"`` (the
            other factor of a gated MLP) or ``"post"`` (the product, input of the down projection).
    """

    tower: str
    layer: int
    mlp: str = "mlp"
    kind: str = "gate"

    def __post_init__(self) -> None:
        # The text "3" would make the right name, but a site that is not equal to the real one.
        object.__setattr__(self, "layer", as_whole("a layer's number", self.layer, SiteError))
        if self.kind not in KINDS:
            raise SiteError(f"site kind {self.kind!r} does not exist; the kinds are {', '.join(KINDS)}")
        if not isinstance(self.tower, str) or not isinstance(self.mlp, str) or not _NAME.fullmatch(str(self)):
            raise SiteError(f"{self.tower!r}, {self.layer!r}, {self.mlp!r} do not make a site name")

    def __str__(self) -> str:
        return f"{self.tower}.layers.{self.layer}.{self.mlp}.{self.kind}"

    @classmethod
    def parse(cls, name: str) -> "Site":
        """The site that a name such as ``"language.layers.3.mlp.gate"`` stands for.

        Args:
            name: ``TOWER.layers.LAYER.MLP.KIND``.

        Raises:
            SiteError: the name is not of that form.
        """
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None or len(match["layer"]) > 9:
            raise SiteError(
                f"{name!r} is not the name of a site; a name looks like 'language.layers.3.mlp.gate', "
                f"and ends in one of {', '.join(KINDS)}"
            )
        return cls(match["tower"], int(match["layer"]), match["mlp"], match["kind"])

    def at(self, kind: str) -> "Site":
        """The site of the same MLP at another point of its computation.

        Args:
            kind: ``"pre"``, ``"gate"``, ``"up"`` or ``"post"``.
        """
        return Site(self.tower, self.layer, self.mlp, kind)


def site_of(name: str, value: Any) -> Site:
    """A site that a caller gave, itself or by its name.

    Args:
        name: of the argument, for the error.
        value: what was given.

    Raises:
        SiteError: it is neither, or the text is no site's name.
    """
    check_kind(name, value, (str, Site), SiteError, "a Site, or the name of one")
    return Site.parse(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class NeuronSpace:
    """An ordered tuple of sites with their widths: the numbering of neurons that all tables follow.

    Neuron ``i`` of site ``s`` has the flat index ``offsets[s] + i``. Spaces are equal if their sites and widths are.

    Attributes:
        sites: the sites, in the order in which they are numbered; each at most once.
        widths: number of neurons of each site, at least 1.
    """

    sites: tuple[Site, ...]
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        check_ordered("sites", self.sites, SiteError, "a sequence of sites")
        check_ordered("widths", self.widths, SiteError, "a sequence of numbers")
        object.__setattr__(self, "sites", tuple(self.sites))
        try:
            object.__setattr__(self, "widths", tuple(operator.index(width) for width in self.widths))
        except TypeError as error:
            raise SiteError(f"widths are whole numbers: {error}") from error
        if len(self.sites) != len(self.widths):
            raise SiteError(f"{len(self.sites)} sites were given with {len(self.widths)} widths; one width per site")
        if not self.sites:
            raise SiteError("a neuron space needs at least one site; none was given")
        if len(set(self.sites)) != len(self.sites):
            raise SiteError("a site stands twice in the space; each site may stand once")
        for site, width in zip(self.sites, self.widths, strict=True):
            if width < 1:
                raise SiteError(f"site {site} has width {width}; a width is at least 1")
        if sum(self.widths) >= 2**62:
            raise SiteError(f"{sum(self.widths)} neurons are more than can be numbered")

    @classmethod
    def from_widths(cls, tower: str, kind: str, widths: Sequence[int]) -> "NeuronSpace":
        """The space of a tower with one MLP per layer, from its widths alone; no model is needed.

        Args:
            tower: name of the tower.
            kind: ``"pre"``, ``"gate"``, ``"up"`` or ``"post"``.
            widths: number of neurons of each layer, from layer 0.

        Examples:
            >>> NeuronSpace.from_widths("language", "gate", [14336] * 32)
            NeuronSpace(language.gate: 32 layers x 14,336 = 458,752 neurons)
        """
        check_kind("widths", widths, Sized, SiteError, "a list with the width of each layer")
        check_ordered("widths", widths, SiteError, "a list with the width of each layer")
        return cls(tuple(Site(tower, layer, "mlp", kind) for layer in range(len(widths))), tuple(widths))

    @classmethod
    def join(cls, *spaces: "NeuronSpace") -> "NeuronSpace":
        """The neurons of several spaces, such as those of two towers, numbered one space after the other.

        Statistics, sets and masks of it are of all its towers at once; `NeuronSet.on` carries sets of one tower to it.

        Args:
            spaces: one or more, without a site in common.

        Raises:
            SiteError: no space, or a site in two of them.

        Examples:
            >>> towers = [NeuronSpace.from_widths(tower, "post", [8, 8]) for tower in ("language", "vision")]
            >>> NeuronSpace.join(*towers).towers
            ('language', 'vision')
        """
        for number, space in enumerate(spaces):
            check_kind(f"space {number}", space, NeuronSpace, SiteError)
        sites = [site for space in spaces for site in space.sites]
        return cls(tuple(sites), tuple(width for space in spaces for width in space.widths))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Flat index of each site's neuron 0, and the size of the space at the end: ``len(sites) + 1`` numbers."""
        return tuple(itertools.accumulate(self.widths, initial=0))

    def __len__(self) -> int:
        return self.offsets[-1]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    @cached_property
    def _position(self) -> Mapping[Site, int]:
        return {site: position for position, site in enumerate(self.sites)}

    def __contains__(self, site: object) -> bool:
        return site in self._position

    def position(self, site: "Site | str") -> int:
        """Place of a site within `sites`.

        Args:
            site: a `Site`, or its name.

        Raises:
            SiteError: the site is not in this space; the message names what is.
        """
        wanted = Site.parse(site) if isinstance(site, str) else site
        if not isinstance(wanted, Site):
            raise SiteError(f"a site is a Site or its name; got {site!r}")
        if wanted in self._position:
            return self._position[wanted]
        towers = {other.tower for other in self.sites}
        if wanted.tower not in towers:
            raise SiteError(f"tower {wanted.tower!r} is not in this space; it has {', '.join(sorted(towers))}")
        layers = sorted({other.layer for other in self.sites if other.tower == wanted.tower})
        if wanted.layer not in layers:
            raise SiteError(f"layer {wanted.layer} is not in tower {wanted.tower!r} ({ranges_of(layers)})")
        here = [str(other) for other in self.sites if (other.tower, other.layer) == (wanted.tower, wanted.layer)]
        raise SiteError(f"site {wanted} is not in this space; layer {wanted.layer} has {abridged(here, 6)}")

    def slice(self, site: "Site | str") -> slice:
        """The flat indices of one site's neurons: ``table[..., space.slice(site)]`` is that site's part of a table.

        Args:
            site: a `Site`, or its name.
        """
        position = self.position(site)
        return slice(self.offsets[position], self.offsets[position + 1])

    def flat(self, site: "Site | str", neuron: SupportsIndex) -> int:
        """Flat index of one neuron of a site; the inverse of `locate`.

        Args:
            site: a `Site`, or its name.
            neuron: the neuron's number within the site, from 0.

        Raises:
            SiteError: no such site, or the site has no neuron of that number.
        """
        position = self.position(site)
        number = as_whole("a neuron's number", neuron, SiteError)
        if not 0 <= number < self.widths[position]:
            raise SiteError(f"neuron {number} is not in site {self.sites[position]} (0–{self.widths[position] - 1})")
        return self.offsets[position] + number

    def locate(self, index: SupportsIndex) -> tuple[Site, int]:
        """The site of a flat index, and the neuron's number within that site.

        Args:
            index: a flat index, from 0.

        Raises:
            SiteError: the index is not in the space.
        """
        number = as_whole("a neuron's number", index, SiteError)
        if not 0 <= number < len(self):
            raise SiteError(f"neuron {number} is not in this space (0–{len(self) - 1})")
        position = bisect.bisect_right(self.offsets, number) - 1
        return self.sites[position], number - self.offsets[position]

    @cached_property
    def site_of(self) -> Int64[Tensor, " neuron"]:
        """For every neuron the position of its site within `sites`. Shared by all callers: do not write to it."""
        return torch.repeat_interleave(torch.arange(len(self.sites)), torch.tensor(self.widths))

    @cached_property
    def layer_of(self) -> Int64[Tensor, " neuron"]:
        """For every neuron the number of its layer. Shared by all callers: do not write to it."""
        return torch.tensor([site.layer for site in self.sites])[self.site_of]

    @property
    def towers(self) -> tuple[str, ...]:
        """The towers that occur, in order."""
        return tuple(dict.fromkeys(site.tower for site in self.sites))

    @cached_property
    def tower_layers(self) -> Mapping[tuple[str, int], tuple[int, ...]]:
        """For each tower and layer, in order, the places of its sites within `sites`; layers of two towers are two.

        Shared by all callers: do not write to it.
        """
        places: dict[tuple[str, int], list[int]] = {}
        for position, site in enumerate(self.sites):
            places.setdefault((site.tower, site.layer), []).append(position)
        return {layer: tuple(positions) for layer, positions in places.items()}

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer numbers that occur, sorted."""
        return tuple(sorted({site.layer for site in self.sites}))

    def count_by_layer(self, indices: Int64[Tensor, " part"] | None = None) -> Int64[Tensor, " layer"]:
        """How many neurons lie in each of `tower_layers`.

        Args:
            indices: flat indices of the neurons; None for all of the space.
        """
        place = {layer: number for number, layer in enumerate(self.tower_layers)}
        of_site = torch.tensor([place[site.tower, site.layer] for site in self.sites])
        sites = self.site_of if indices is None else self.site_of[indices]
        return torch.bincount(of_site[sites], minlength=len(place))

    @property
    def kind(self) -> str:
        """The kind that all sites share.

        Raises:
            SiteError: the space mixes kinds.
        """
        kinds = sorted({site.kind for site in self.sites})
        if len(kinds) > 1:
            raise SiteError(f"this space mixes the kinds {', '.join(kinds)}: ask each site for its own")
        return kinds[0]

    def at(self, kind: str) -> "NeuronSpace":
        """The same neurons, numbered the same, read at another point of their MLPs.

        Args:
            kind: ``"pre"``, ``"gate"``, ``"up"`` or ``"post"``.
        """
        return NeuronSpace(tuple(site.at(kind) for site in self.sites), self.widths)

    def same_neurons(self, other: "NeuronSpace") -> bool:
        """Whether both number the same neurons the same way, at whatever kind of site.

        Args:
            other: another space.
        """
        check_kind("other", other, NeuronSpace, SiteError)
        return self.widths == other.widths and all(
            (a.tower, a.layer, a.mlp) == (b.tower, b.layer, b.mlp) for a, b in zip(self.sites, other.sites, strict=True)
        )

    def restrict(
        self, *, towers: Iterable[str] | None = None, layers: Iterable[SupportsIndex] | None = None
    ) -> Int64[Tensor, " part"]:
        """Flat indices of the neurons in the given towers and layers, sorted (all, where None).

        Args:
            towers: names of towers; None for all.
            layers: numbers of layers, of whichever of these towers has them; None for all.

        Raises:
            SiteError: a tower or layer that the space does not have.
        """
        kept = torch.ones(len(self), dtype=torch.bool)
        if towers is not None:
            check_kind("towers", towers, Iterable, SiteError, "a list of names")
            wanted_towers = {towers} if isinstance(towers, str) else set(towers)
            missing = wanted_towers - {site.tower for site in self.sites}
            if missing:
                have = ", ".join(sorted({site.tower for site in self.sites}))
                raise SiteError(f"tower {min(missing)!r} is not in this space; it has {have}")
            kept &= torch.tensor([site.tower in wanted_towers for site in self.sites])[self.site_of]
        if layers is not None:
            check_kind("layers", layers, Iterable, SiteError, "a list of numbers")
            wanted_layers = {as_whole("a layer's number", layer, SiteError) for layer in layers}
            unknown = wanted_layers - set(self.layers)
            if unknown:
                raise SiteError(f"layer {min(unknown)} is not in this space ({ranges_of(list(self.layers))})")
            kept &= torch.isin(self.layer_of, torch.tensor(sorted(wanted_layers), dtype=torch.int64))
        return kept.nonzero().flatten()

    def to_json(self) -> JSON:
        """A dictionary of plain values that `from_json` reads back, for files."""
        return {"sites": [str(site) for site in self.sites], "widths": list(self.widths)}

    @classmethod
    def from_json(cls, data: object) -> "NeuronSpace":
        """The space that `to_json` wrote.

        Args:
            data: what `to_json` gave, or JSON that was read from a file.

        Raises:
            FileFormatError: the data is not of that form.
        """
        try:
            sites, widths = (cast(JSON, data)[name] for name in ("sites", "widths"))
            if not all(isinstance(width, int) and not isinstance(width, bool) for width in widths):
                raise TypeError("widths must be integers")
            return cls(tuple(Site.parse(name) for name in sites), tuple(widths))
        except (KeyError, TypeError, ValueError, AttributeError, SiteError) as error:
            raise FileFormatError(f"not a neuron space: {error}") from error

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that are equal for equal spaces, on every machine."""
        text = ";".join(f"{site}:{width}" for site, width in zip(self.sites, self.widths, strict=True))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        towers = list(dict.fromkeys(f"{site.tower}.{site.kind}" for site in self.sites))
        widths = set(self.widths)
        width = f"{self.widths[0]:,}" if len(widths) == 1 else f"{min(widths):,}–{max(widths):,}"
        layers = len({(site.tower, site.layer) for site in self.sites})
        parts = f"{layers} layers" if layers == len(self.sites) else f"{layers} layers, {len(self.sites)} sites"
        return f"NeuronSpace({', '.join(towers)}: {parts} x {width} = {len(self):,} neurons)"


def ranges_of(numbers: Sequence[int]) -> str:
    """``0–3, 7`` for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)
