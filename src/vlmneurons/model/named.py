"""The named sites of a model: what ``model.language.layers[3].mlp.gate`` is made of."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.eproperty import eproperty
from nnsight.intervention.interleaver import Mediator
from nnsight.intervention.util import first_input, replace_first_input
from torch import Tensor, nn

from vlmneurons.errors import SiteError
from vlmneurons.model.architectures.hooks import ComputedGate
from vlmneurons.model.architectures.layout import MLP, SitePlace, Tower
from vlmneurons.model.travel import PART
from vlmneurons.neurons.sites import KINDS, ranges_of

if TYPE_CHECKING:
    from vlmneurons.model.vlm import VLM


class _Value(eproperty):
    """The values of one site inside a trace; where nnsight finds them depends on the MLP's layout.

    Reading waits until the model computes the site and gives the model's own tensor (or a view of it), so editing it
    in place reaches the model; assigning replaces it.
    """

    def __init__(self, kind: str, description: str) -> None:
        super().__init__(key=kind, description=description)
        self.kind = kind
        self.__doc__ = f"{description}: ``[..., neuron]``, readable and writable inside a trace."

    def __get__(self, obj: "NamedMLP | None", owner: object = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  (of named MLPs alone)
        if obj is None:
            return self
        place = obj.place(self.kind)
        values = obj.values_at(place)
        if not place.computed:
            return values
        return ComputedGate.of(obj.module, obj.mlp.layout).serve(values, *_rows(obj))

    def __set__(self, obj: "NamedMLP", value: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  (of named MLPs alone)
        place = obj.place(self.kind)
        location = obj.location(place)
        if place.computed:
            ComputedGate.of(obj.module, obj.mlp.layout).assign(value, obj.values_at(place), *_rows(obj))
        elif place.end == "input":
            args, kwargs = Mediator.value(location)
            Mediator.swap(location, replace_first_input(args, kwargs, value))
        elif place.columns is not None:
            whole = Mediator.value(location).clone()
            place.part(whole).copy_(value)
            Mediator.swap(location, whole)
        else:
            Mediator.swap(location, value)


def _rows(mlp: "NamedMLP") -> tuple:
    """nnsight's batcher, and the rows of it that the asking part of a trace sees; (None, None) for all."""
    batcher, rows = mlp.envoy.interleaver.batcher, Mediator.current(mlp.path).batch_group
    return (batcher, rows) if batcher is not None and batcher.batching else (None, None)


class _View:
    """A part of a model under its name. It cannot be copied without its model, so a plain copy is the same view."""

    _noun: ClassVar[str]
    """What it is to the model."""

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: object) -> Any:
        raise SiteError(f"{self!r} is a view of its model: copy the model, and take the same {self._noun} of the copy")


class _EnvoyView(_View):
    """A view of one module: all that it does not have itself is that of nnsight's envoy of the module."""

    envoy: Envoy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the module to values of your own, as nnsight's envoys do: what a trace reads does not see this call."""
        return self.envoy(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "envoy" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.envoy, name)

    def __setattr__(self, name: str, value: object) -> None:
        # One of nnsight's values of a module, such as ``output``, or a module. Anything else would be lost.
        if not isinstance(value, nn.Module) and not isinstance(getattr(type(self.envoy), name, None), eproperty):
            raise AttributeError(f"{self!r} has no value {name!r} that could be assigned")
        setattr(self.envoy, name, value)


class NamedMLP(_EnvoyView):
    """One MLP, or one expert, with its sites as values: ``.pre``, ``.gate``, ``.up`` and ``.post``.

    Every other attribute is that of nnsight's envoy of the same module (``.output``, ``.down_proj.input`` …).
    """

    _noun = "site"
    pre = _Value("pre", "Input of the activation function")
    gate = _Value("gate", "Output of the activation function")
    up = _Value("up", "The other factor of a gated MLP")
    post = _Value("post", "Input of the down projection, gate times up")

    module: nn.Module
    mlp: MLP

    def __init__(self, envoy: Envoy, module: nn.Module, mlp: MLP) -> None:
        vars(self).update(envoy=envoy, module=module, mlp=mlp)

    @property
    def path(self) -> str:
        """Location of the module in nnsight's tree."""
        return self.envoy.path

    @property
    def interleaver(self) -> Any:
        """nnsight's interleaver, which serves the values."""
        return self.envoy.interleaver

    @property
    def width(self) -> int:
        """Number of neurons."""
        return self.mlp.width

    def place(self, kind: str) -> SitePlace:
        """Where a trace finds a site.

        Args:
            kind: ``"pre"``, ``"gate"``, ``"up"`` or ``"post"``.

        Raises:
            SiteError: there is no such site, or no trace can stop at it.
        """
        place = self.mlp.place(kind)
        if self.mlp.expert is not None:
            raise SiteError(
                f"{self.mlp.site(kind)}: experts kept in one tensor have no module that a trace could stop at; "
                "record and ablate them with vn.Recorder and vn.Ablation"
            )
        return place

    def location(self, place: SitePlace) -> str:
        """nnsight's name of that place.

        Args:
            place: a place of this MLP.
        """
        return f"{self.path}.{place.module}.{place.end}"

    def values_at(self, place: SitePlace) -> Float[Tensor, "*any neuron"]:
        """The value that the model has at a place, inside a trace: its own tensor, or a view of it.

        Args:
            place: a place of this MLP.
        """
        values = Mediator.value(self.location(place))
        return place.part(first_input(*values) if place.end == "input" else values)

    def __setattr__(self, name: str, value: object) -> None:
        if name in KINDS:
            getattr(type(self), name).__set__(self, value)
        else:
            super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return PART, (self.envoy, {}, {kind: self._remote_place(kind) for kind in self.mlp.layout.kinds})

    def _remote_place(self, kind: str) -> tuple[str | None, Any]:
        """nnsight's name of a site's place and its columns; or None, and why a remote trace cannot stop there."""
        place, name = self.mlp.place(kind), self.mlp.site(kind)
        if self.mlp.expert is not None:
            return None, f"{name}: experts kept in one tensor have no module that a trace could stop at"
        if place.computed:
            return None, f"{name} has no module of its own that a remote trace could stop at; use 'pre' or 'post'"
        return self.location(place), place.columns

    def __repr__(self) -> str:
        where = f"{self.mlp.tower}.layers.{self.mlp.layer}.{self.mlp.name}"
        return f"<{where}: {', '.join(self.mlp.layout.kinds)} of {self.width:,} neurons>"


class _Branch(_EnvoyView):
    """A step of a path within a layer that is not itself an MLP, such as ``.experts`` of ``mlp.experts[7]``."""

    _noun = "branch"
    _layer: "NamedLayer"
    _path: str

    def __init__(self, layer: "NamedLayer", path: str) -> None:
        name, inner = next(item for item in layer.mlps.items() if item[0].startswith(f"{path}."))
        # An expert in one tensor has a number and no module.
        steps = name.count(".") - path.count(".") - (inner.mlp.expert is not None)
        module = inner.mlp.path.rsplit(".", steps)[0] if steps else inner.mlp.path
        vars(self).update(_layer=layer, _path=path, envoy=layer._tower.envoy(module))

    def __getitem__(self, index: int) -> Any:
        return self._layer._part(f"{self._path}.{index}")

    @property
    def _steps(self) -> list[str]:
        """The next step of each path that leads through this one."""
        inside = [name for name in self._layer.mlps if name.startswith(f"{self._path}.")]
        return list(dict.fromkeys(name.removeprefix(f"{self._path}.").split(".")[0] for name in inside))

    def __len__(self) -> int:
        return len(self._steps)

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        parts = {step: self._layer._part(f"{self._path}.{step}") for step in self._steps}
        return PART, (self.envoy, parts, {})

    def __getattr__(self, name: str) -> Any:
        if name in KINDS or self._layer._has(f"{self._path}.{name}"):
            return self._layer._part(f"{self._path}.{name}")
        return super().__getattr__(name)

    def __repr__(self) -> str:
        return f"<{self._layer!r} {self._path}: {len(self)} parts>"


class NamedLayer(_EnvoyView):
    """One transformer block: its MLPs under their site names (``.mlp``), all else nnsight's envoy of the block."""

    _noun = "layer"

    mlps: dict[str, NamedMLP]
    _tower: "NamedTower"
    _index: int

    def __init__(self, tower: "NamedTower", index: int, envoy: Envoy, mlps: Mapping[str, NamedMLP]) -> None:
        vars(self).update(_tower=tower, _index=index, envoy=envoy, mlps=dict(mlps))

    def _has(self, path: str) -> bool:
        return any(f"{name}.".startswith(f"{path}.") for name in self.mlps)

    def _part(self, name: str) -> Any:
        """An MLP by its name, or what holds several, such as ``mlp.experts``."""
        if name in self.mlps:
            return self.mlps[name]
        if self._has(name):
            return _Branch(self, name)
        has = ", ".join(self.mlps) or "no MLP"
        raise SiteError(f"layer {self._index} of tower {self._tower.name!r} has no {name!r}; it has {has}")

    def __getattr__(self, name: str) -> Any:
        return self._part(name) if name == "mlp" or self._has(name) else super().__getattr__(name)

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        steps = dict.fromkeys(name.split(".")[0] for name in self.mlps)
        return PART, (self.envoy, {step: self._part(step) for step in steps}, {})

    def __repr__(self) -> str:
        return f"<{self._tower.name}.layers.{self._index}: {', '.join(self.mlps) or 'no MLP'}>"


class NamedTower(_View):
    """A stack of transformer blocks: ``tower.layers[i].mlp``."""

    _noun = "tower"

    def __init__(self, model: "VLM", tower: Tower) -> None:
        self.name, self.tower, self.envoy = tower.name, tower, model.envoy
        self.layers: Sequence[NamedLayer] = _Layers(self, model)

    def __len__(self) -> int:
        return len(self.layers)

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        layers = PART(None, {str(number): layer for number, layer in enumerate(self.layers)}, {})
        return PART, (None, {"layers": layers}, {})

    def __repr__(self) -> str:
        return describe(self.tower)


class _Layers(Sequence[NamedLayer]):
    """The layers of a tower; an index that does not exist says which do."""

    def __init__(self, owner: NamedTower, model: "VLM") -> None:
        self._owner = owner
        by_layer: dict[int, dict[str, NamedMLP]] = {index: {} for index in range(len(owner.tower.layer_paths))}
        for mlp in owner.tower.mlps:
            by_layer[mlp.layer][mlp.name] = NamedMLP(model.envoy(mlp.path), model.hf.get_submodule(mlp.path), mlp)
        self._layers = [
            NamedLayer(owner, index, model.envoy(path), by_layer[index])
            for index, path in enumerate(owner.tower.layer_paths)
        ]

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self._layers[index])
        if not -len(self) <= index < len(self):
            raise SiteError(f"layer {index} is not in tower {self._owner.name!r} (0–{len(self) - 1})")
        return self._layers[index]

    def __iter__(self) -> Iterator[NamedLayer]:
        return iter(self._layers)  # Sequence's own would go on until an IndexError

    def __repr__(self) -> str:
        return f"<{len(self)} layers of {self._owner.name}>"


def describe(tower: Tower) -> str:
    """One line: layers, widths, kinds of sites."""
    names = list(dict.fromkeys(mlp.name.split(".experts.")[0] for mlp in tower.mlps))
    experts = sum(mlp.name.count(".experts.") for mlp in tower.mlps)
    widths = sorted(set(tower.widths))
    width = f"{widths[0]:,}" if len(widths) == 1 else f"{widths[0]:,}–{widths[-1]:,}" if widths else "0"
    kinds = [kind for kind in KINDS if any(kind in mlp.layout.kinds for mlp in tower.mlps)]
    bare = sorted(set(range(len(tower))) - {mlp.layer for mlp in tower.mlps})
    text = f"{tower.name}: {len(tower)} layers"
    text += f", {experts} experts" if experts else ""
    text += f" x {width} = {sum(tower.widths):,} neurons; {', '.join(names)}.{{{','.join(kinds)}}} at {tower.path}"
    return text + (f"; no MLP in layers {ranges_of(bare)}" if bare else "")
