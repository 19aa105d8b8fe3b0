"""Where the MLPs are in a model: the lists of blocks, the towers that they make up, and what users know better."""

import collections
import dataclasses
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vlmneurons.checks import of_kind
from vlmneurons.errors import ArchitectureError
from vlmneurons.model.architectures.flow import Flow, features, follow, follow_gating, probe
from vlmneurons.model.architectures.layout import MLP, MLPLayout, Tower


@dataclass(frozen=True)
class Architecture:
    """What a user knows about a model that its structure does not tell. Whatever is not given is found.

    Attributes:
        towers: name of each tower, and the path of its list of blocks (several paths, for stages). If given, there are
            no others.
        mlps: path of each MLP relative to its block (``""`` for the block itself), and its layout. If given, no others
            are looked for; blocks that lack a path have no such MLP. Where towers differ, for each tower's name such a
            mapping: those of a tower without one are found.
        names: what an MLP at such a path is to be called in the names of sites; chosen by itself if not given.

    Examples:
        >>> from torch.nn.functional import silu
        >>> from vlmneurons.model.architectures import Architecture, MLPLayout, register_architecture
        >>> register_architecture(
        ...     "MyVLMForConditionalGeneration",
        ...     Architecture(
        ...         towers={"language": "model.text.blocks", "vision": "model.eye.blocks"},
        ...         mlps={"language": {"ff": MLPLayout(gate="w1", up="w3", down="w2", function=silu)}},
        ...     ),
        ... )
    """

    towers: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    mlps: Mapping[str, MLPLayout | Mapping[str, MLPLayout]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        by_tower = [name for name, value in self.mlps.items() if not isinstance(value, MLPLayout)]
        if by_tower and len(by_tower) < len(self.mlps):
            raise ArchitectureError("mlps= has either a layout for each path, or such a mapping for each tower's name")
        for name in by_tower:
            of_tower = self.mlps[name]
            if not isinstance(of_tower, Mapping) or not all(isinstance(one, MLPLayout) for one in of_tower.values()):
                raise ArchitectureError(
                    "mlps= has an MLPLayout for each path, or a mapping from paths to layouts for each tower's name; "
                    f"got {of_tower!r} for {name!r}"
                )
        strange = [name for name in by_tower if name not in self.towers]
        if strange:
            raise ArchitectureError(
                f"mlps= is of {', '.join(map(repr, strange))}, and towers= gives no path to such a tower; it has "
                f"{', '.join(map(repr, self.towers)) or 'none'}"
            )

    def layouts(self, tower: str | None = None) -> Mapping[str, MLPLayout]:
        """The layouts that are known of a tower's MLPs, by their paths in a block; none if they are to be found.

        Args:
            tower: its name; None where towers are not known by name.
        """
        if any(isinstance(value, MLPLayout) for value in self.mlps.values()):
            return self.mlps  # type: ignore[return-value]
        return self.mlps.get(tower, {})  # type: ignore[arg-type, return-value]


_REGISTERED: list[tuple[str | Callable[[nn.Module], bool], Architecture]] = []


def register_architecture(which: str | Callable[[nn.Module], bool], architecture: Architecture) -> None:
    """Makes `find_towers` follow an `Architecture` instead of finding everything itself.

    Args:
        which: name of the model's class, or a function that tells of a model whether the architecture is meant for it.
        architecture: what is known about such models. What was registered last is asked first.

    Raises:
        ArchitectureError: neither a name nor a function, or no `Architecture`.
    """
    if not isinstance(which, str) and (not callable(which) or isinstance(which, type)):
        raise ArchitectureError(f"an architecture is registered for a class's name or a function; got {which!r}")
    of_kind("architecture", architecture, Architecture, ArchitectureError)
    _REGISTERED.insert(0, (which, architecture))


def find_towers(hf_model: nn.Module) -> dict[str, Tower]:
    """The towers of a model, ``"language"`` first, with every MLP in them.

    Args:
        hf_model: a transformers model, on any device, meta included. It is only looked at.

    Returns:
        The towers by name, of which ``"language"`` is the text decoder and ``"vision"`` the first image tower; a text
        encoder is ``"encoder"``, an audio tower ``"audio"``, and what else there is goes by its own name in the model.
        The order and every number in it depend on nothing but the model's class and configuration.

    Raises:
        ArchitectureError: the MLPs cannot be told for certain; says what was seen, and how to register what is known.
            Also for a compiled model.
    """
    of_kind("hf_model", hf_model, nn.Module, ArchitectureError, "a loaded transformers model")
    if hasattr(hf_model, "_orig_mod"):
        raise ArchitectureError(
            f"{type(hf_model._orig_mod).__name__} was given wrapped by torch.compile, whose code does not see hooks "
            "that come later; give the model itself (compiled._orig_mod)"
        )
    if getattr(hf_model, "_compiled_call_impl", None) is not None:
        raise ArchitectureError(
            f"{type(hf_model).__name__} is compiled (model.compile()), and its code sees no hooks that come later; "
            "give the model as it was before torch.compile"
        )
    known = next(
        (
            architecture
            for which, architecture in _REGISTERED
            if (type(hf_model).__name__ == which if isinstance(which, str) else which(hf_model))
        ),
        Architecture(),
    )
    search = _Search(hf_model, known)
    stacks = search.given() if known.towers else _named(hf_model, search.stacks())
    for path, blocks in {} if known.towers else search.passed_over.items():
        doubts = [doubt for block in blocks for doubt in search.doubts(block)]
        if doubts:
            raise ArchitectureError(search.explain(f"the list {path} holds what may be MLPs", doubts))
    if not any(block.mlps for tower in stacks.values() for block in tower[1]):
        raise ArchitectureError(search.explain("no MLP was found in any list of blocks", []))
    stacks = {name: (path, search.settled(blocks)) for name, (path, blocks) in stacks.items()}
    towers = {}
    for name, (path, blocks) in stacks.items():
        doubts = [doubt for block in blocks for doubt in search.doubts(block)]
        if doubts:
            raise ArchitectureError(search.explain(f"the blocks of tower {name!r} hold what may be an MLP", doubts))
        mlps = tuple(mlp for layer, block in enumerate(blocks) for mlp in search.mlps(name, layer, block))
        towers[name] = Tower(name, path, tuple(block.path for block in blocks), mlps)
    if "language" not in towers:
        raise ArchitectureError(search.explain(f"no language model was told among {', '.join(towers)}", []))
    return towers


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """One MLP below a block: where its module is, relative to the block, and what it is."""

    inner: str
    module: nn.Module
    layout: MLPLayout
    width: int
    experts: int | None = None


@dataclass(frozen=True)
class _Block:
    path: str
    module: nn.Module
    mlps: tuple[_Found, ...]
    registered: bool = False
    """Whether somebody has said what its MLPs are."""


_MIXER = re.compile(r"attention|attn|mamba|deltanet|ssm|retention|recurrent|rotary|indexer|router", re.IGNORECASE)
_FEED = re.compile(r"mlp|ffn|feedforward|feed_forward|expert|moe", re.IGNORECASE)
_PROJECTION = re.compile(r"(to_|w|c_)?(q|k|v|qkv|query|key|value|in_proj|attn)(_|$)", re.IGNORECASE)
_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def _is_mixer(module: nn.Module) -> bool:
    """Whether a module mixes tokens or routes them, by the name of its class: its inner layers are no MLP."""
    linears = [(name, features(child)) for name, child in module.named_children()]
    linears = [(name, size) for name, size in linears if size is not None]
    if isinstance(module, _LISTS) or (not linears and not _matrices(module) and any(True for _ in module.children())):
        return False  # it holds others, and is looked into
    fitting = {(wide, narrow) for _, (narrow, wide) in linears if narrow != wide} & {size for _, size in linears}
    if fitting and not any(_PROJECTION.match(name) for name, _ in linears):
        return False
    last = [
        max((match.start() for match in kind.finditer(type(module).__name__)), default=-1) for kind in (_MIXER, _FEED)
    ]
    return last[0] > last[1]  # the last word says what it is: MoeAttention attends, AttentionMLP is an MLP


def _matrices(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))


@functools.cache
def _names_used(kind: type) -> frozenset[str]:
    """Every name that the code of a class mentions, but for where it is made: what its forward may depend on."""
    names: set[str] = set()
    codes = [
        inspect.unwrap(value).__code__
        for base in kind.__mro__
        if base.__module__ != "torch.nn.modules.module"
        for name, value in vars(base).items()
        if name != "__init__" and hasattr(inspect.unwrap(value) if callable(value) else value, "__code__")
    ]
    while codes:
        code = codes.pop()
        names |= {*code.co_names, *(text for text in code.co_consts if isinstance(text, str))}
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
    return frozenset(names)


def _identity(value: Any) -> Any:
    """Equal for settings that mean the same to a forward; objects that we do not know are each their own."""
    if isinstance(value, int | float | str | bool | type(None)):
        return value
    if isinstance(value, tuple | list):
        return tuple(map(_identity, value))
    if isinstance(value, functools.partial):
        keywords = tuple((name, _identity(inner)) for name, inner in sorted(value.keywords.items()))
        return _identity(value.func), tuple(map(_identity, value.args)), keywords
    return id(getattr(value, "__func__", value))


class _Search:
    """Looks through one model, and remembers what it has seen of each kind of module."""

    def __init__(self, model: nn.Module, known: Architecture) -> None:
        self.model = model
        self.known = known
        self._flows: dict[Any, list[Flow]] = {}
        self._own: dict[Any, tuple[MLPLayout, ...]] = {}
        self._experts: dict[Any, _Found | None] = {}
        self._doubts: dict[Any, list[str]] = {}
        self._uses: collections.Counter[int] | None = None
        self._places: dict[tuple[int, str], str] = {}
        self.passed_over: dict[str, list[_Block]] = {}
        self._prints: dict[nn.Module, Any] = {}
        self._mixers: dict[nn.Module, bool] = {}
        self._sizes: dict[nn.Module, tuple[int, int] | None] = {}

    # --- MLPs ---

    def is_mixer(self, module: nn.Module) -> bool:
        """`_is_mixer`, which is asked often."""
        if module not in self._mixers:
            self._mixers[module] = _is_mixer(module)
        return self._mixers[module]

    def size(self, module: nn.Module) -> tuple[int, int] | None:
        """`features`, which are asked for even more often."""
        if module not in self._sizes:
            self._sizes[module] = features(module)
        return self._sizes[module]

    def fingerprint(self, module: nn.Module) -> Any:
        """Equal for modules that compute alike: their classes, settings and sizes, all the way down."""
        if module not in self._prints:
            if self.is_mixer(module):  # it is not looked into
                self._prints[module] = hash((type(module), "mixer"))
                return self._prints[module]
            used = _names_used(type(module))
            settings = tuple(
                (name, _identity(value))
                for name, value in sorted(vars(module).items())
                if name in used and name != "forward" and not isinstance(value, torch.Tensor)
            )
            shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters(recurse=False))
            children = tuple((name, self.fingerprint(child)) for name, child in module.named_children())
            self._prints[module] = hash((type(module), settings, shapes, self.size(module), module.training, children))
        return self._prints[module]

    def flows(self, module: nn.Module, everywhere: bool = False) -> list[Flow]:
        """The flows of a module, in which mixers, MLPs and modules that cannot be followed are single steps."""
        key = self.fingerprint(module), everywhere
        if key not in self._flows:
            # settled before the trace: while it runs, parameters of modules are symbols
            steps = {child for child in module.modules() if child is not module and self._is_step(child)}

            def explained(child: nn.Module) -> bool:
                return self.is_mixer(child) or self.experts(child) is not None or bool(self.own(child))

            flows = follow(module, steps.__contains__, explained, everywhere=everywhere)
            self._flows[key] = [flow.analyse() for flow in flows]
        return self._flows[key]

    def _is_step(self, module: nn.Module) -> bool:
        """Whether a module is to be one step in the flow of those around it."""
        if self.size(module) is not None or isinstance(module, _LISTS) or not any(True for _ in module.children()):
            return False
        return (
            self.is_mixer(module)
            or self.experts(module) is not None
            or not self.flows(module)
            or bool(self.own(module))
        )

    def own(self, module: nn.Module) -> tuple[MLPLayout, ...]:
        """The MLPs that a module's own forward computes, those of modules inside apart.

        Raises:
            ArchitectureError: it computes with the same projections in two ways.
        """
        key = self.fingerprint(module)
        if key not in self._own:
            found = {layout.down: layout for flow in self.flows(module) for layout in flow.layouts}
            if not found:
                found = {layout.down: layout for layout in filter(None, [probe(module)])}
            pairs = self._pairs(module, [_Found("", module, layout, 0) for layout in found.values()])
            if any(not self._rejected(module, *pair) for pair in pairs):
                for layout in (layout for flow in self.flows(module, True) for layout in flow.layouts):
                    if found.setdefault(layout.down, layout) != layout:
                        what = f"{type(module).__name__} uses {layout.down} in two ways"
                        raise ArchitectureError(self.explain(what, [str(found[layout.down]), str(layout)]))
            self._own[key] = tuple(found.values())
        return self._own[key]

    def experts(self, module: nn.Module) -> _Found | None:
        """The experts that a module holds as 3-D parameters, in the way of `use_experts_implementation`."""
        key = self.fingerprint(module)
        if key not in self._experts:
            self._experts[key] = self._find_experts(module)
        found = self._experts[key]
        return None if found is None else _Found("", module, found.layout, found.width, found.experts)

    def _find_experts(self, module: nn.Module) -> _Found | None:
        down = getattr(module, "down_proj", None)
        if not isinstance(down, nn.Parameter) or down.ndim != 3 or not hasattr(type(module), "_apply_gate"):
            return None
        transposed, gated = getattr(module, "is_transposed", False), getattr(module, "has_gate", True)
        name = "gate_up_proj" if gated else "up_proj"
        first = getattr(module, name, None)
        width = down.shape[1 if transposed else 2]
        if not isinstance(first, nn.Parameter) or first.shape[2 if transposed else 1] != width * (2 if gated else 1):
            return None
        if gated:
            layout = follow_gating(module, name, "down_proj", width)
        else:
            layout = MLPLayout(down="down_proj", gate=name, activation="act_fn", parameters=True)
        return None if layout is None else _Found("", module, layout, width, down.shape[0])

    def below(self, module: nn.Module, path: str = "") -> Iterator[_Found]:
        """The MLPs below a module, its own before those of its children."""
        if self.size(module) is not None or self.is_mixer(module) or not self._may_hold_mlp(module):
            return
        experts = self.experts(module)
        if experts is not None:
            yield _Found(path, module, experts.layout, experts.width, experts.experts)
            return
        deeper = [
            found
            for name, child in module.named_children()
            for found in self.below(child, f"{path}.{name}" if path else name)
        ]
        held = sum(parameter.ndim == 3 for parameter in module.parameters(recurse=False)) >= 2
        if not isinstance(module, nn.ModuleList | nn.ModuleDict) and (held or self._pairs(module, deeper, not deeper)):
            for layout in self.own(module):
                yield self._measured(path, module, layout)
        yield from deeper

    def _may_hold_mlp(self, module: nn.Module) -> bool:
        """Whether there are two linear layers below, or parameters in the place of such."""
        count = 0
        for child in module.modules():
            if self.size(child) is not None:
                count += 1
            count += sum(parameter.ndim == 3 for parameter in child.parameters(recurse=False))
            if count >= 2:
                return True
        return False

    def _measured(self, path: str, module: nn.Module, layout: MLPLayout) -> _Found:
        """An MLP with its width, taken from every projection that tells it."""
        first = layout.fused or layout.gate
        if layout.parameters:
            down, into = module.get_parameter(layout.down), module.get_parameter(first)
            return _Found(path, module, layout, _parameter_width(into, down, 2 if layout.fused else 1), down.shape[0])
        sizes = [(layout.down, 0, 1), (first, 1, 2 if layout.fused else 1)]
        if layout.up is not None:
            sizes.append((layout.up, 1, 1))
        widths = []
        for name, side, parts in sizes:
            projection = module.get_submodule(name)
            size = self.size(projection)
            if size is not None:
                widths.append((name, size[side] // parts))
            elif not [*projection.parameters(), *projection.buffers()]:
                what = (
                    f"{name!r} of the MLP at {path or 'the block'} is a {type(projection).__name__}, and no projection"
                )
                raise ArchitectureError(self.explain(what, []))
        if len({width for _, width in widths}) != 1:
            sizes_seen = ", ".join(f"{name}: {width}" for name, width in widths) or "no size at all"
            raise ArchitectureError(
                self.explain(
                    f"the projections of the MLP at {path or 'the block'} do not agree on its width", [sizes_seen]
                )
            )
        return _Found(path, module, layout, widths[0][1])

    def _pairs(self, block: nn.Module, found: Sequence[_Found], square: bool = False) -> list[tuple[str, str]]:
        """Linear layers that fit together like the two ends of an MLP, and are in none that was found.

        With ``square``, also those between vectors of one size, which are more often something else.
        """
        used = set()
        for mlp in found:
            if mlp.layout.parameters or mlp.experts is not None:
                used.add(mlp.module)
                continue
            names = (mlp.layout.down, mlp.layout.gate, mlp.layout.up, mlp.layout.fused)
            used |= {mlp.module.get_submodule(name) for name in names if name is not None}
        places: list[tuple[str, tuple[int, int]]] = []

        def visit(module: nn.Module, path: str) -> None:
            if module in used or self.is_mixer(module):
                return
            size = self.size(module)
            if size is not None:
                places.append((path, size))
                return
            for name, child in module.named_children():
                visit(child, f"{path}.{name}" if path else name)

        visit(block, "")
        return [
            (first, second)
            for first, (narrow, wide) in places
            for second, (inside, outside) in places
            if first != second and narrow == outside and inside in (wide, wide // 2) and (square or narrow != wide)
        ]

    def doubts(self, block: _Block) -> list[str]:
        """What a block has that may be an MLP, and is neither named as one nor known to be none."""
        if block.registered:
            return []
        key = self.fingerprint(block.module), tuple((found.inner, found.layout) for found in block.mlps)
        if key not in self._doubts:
            self._doubts[key] = self._find_doubts(block)
        return [f"{block.path}{doubt}" for doubt in self._doubts[key]]

    def _find_doubts(self, block: _Block) -> list[str]:
        doubts = []
        for first, second in self._pairs(block.module, block.mlps):
            if not self._rejected(block.module, first, second):
                doubts.append(f": {first} and {second} fit together like an MLP's projections")
        named = {found.module for found in block.mlps}
        for name, module in block.module.named_modules():
            if module in named or self.is_mixer(module):
                continue
            large = [
                f"{inner}.{key}" if inner else key
                for inner, child in [("", module), *module.named_children()]
                if child not in named and not self.is_mixer(child) and not _is_convolution(child)
                for key, parameter in child.named_parameters(recurse=False)
                if parameter.ndim == 3 and min(parameter.shape) > 1
            ]
            if len(large) >= 2:
                where = f".{name}" if name else ""
                doubts.append(f"{where} ({type(module).__name__}) holds 3-D parameters {', '.join(large)}")
        return doubts

    def _rejected(self, block: nn.Module, first: str, second: str) -> bool:
        """Whether a flow passes through both layers of a pair, and shows that the second takes no MLP's neurons."""
        parts = second.split(".")
        for cut in range(len(parts)):
            module, head = block.get_submodule(".".join(parts[:cut])), ".".join(parts[:cut])
            if isinstance(module, nn.ModuleList | nn.ModuleDict) or (head and not first.startswith(f"{head}.")):
                continue
            down, up = ".".join(parts[cut:]), first[len(head) + 1 :] if head else first
            if any(flow.refutes(up, down) for flow in self.flows(module)):
                return True
        return False

    # --- lists of blocks ---

    def block(self, path: str, module: nn.Module, tower: str | None = None) -> _Block:
        layouts = self.known.layouts(tower)
        if not layouts:
            return _Block(path, module, tuple(self.below(module)))
        found = []
        for inner, layout in layouts.items():
            try:
                place = module.get_submodule(inner)
            except AttributeError:
                continue
            for name in filter(None, (layout.down, layout.gate, layout.up, layout.fused, layout.activation)):
                held = place.get_parameter if layout.parameters and name != layout.activation else place.get_submodule
                try:
                    held(name)
                except AttributeError:
                    has = ", ".join(child for child, _ in place.named_children())
                    what = f"the Architecture names {name!r} in {path}.{inner}, which has {has or 'no modules'}"
                    raise ArchitectureError(self.explain(what, [])) from None
            found.append(self._measured(inner, place, layout))
        return _Block(path, module, tuple(found), registered=True)

    def given(self) -> dict[str, tuple[str, list[_Block]]]:
        """The towers of a registered architecture."""
        towers = {}
        for name, paths in self.known.towers.items():
            paths = (paths,) if isinstance(paths, str) else tuple(paths)
            blocks = []
            for path in paths:
                try:
                    module = self.model.get_submodule(path)
                except AttributeError:
                    what = f"the Architecture has tower {name!r} at {path!r}, which does not exist"
                    raise ArchitectureError(self.explain(what, [])) from None
                blocks += [self.block(f"{path}.{key}", child, name) for key, child in module._modules.items()]
            towers[name] = (_common(paths), blocks)
        tower_of: dict[str, str] = {}
        for name, (_, blocks) in towers.items():
            for block in blocks:
                if block.path in tower_of:
                    what = (
                        f"the Architecture has {block.path} in tower {name!r}, and in {tower_of[block.path]!r} already"
                    )
                    raise ArchitectureError(self.explain(what, []))
                tower_of[block.path] = name
        of_all = any(isinstance(value, MLPLayout) for value in self.known.mlps.values())
        for names in [list(towers)] if of_all else [[name] for name in towers]:
            held = {found.inner for name in names for block in towers[name][1] for found in block.mlps}
            absent = set(self.known.layouts(names[0])) - held
            if absent:
                where = ", ".join(map(repr, names))
                what = f"the Architecture names an MLP at {min(absent)!r}, which no block of {where} has"
                raise ArchitectureError(self.explain(what, []))
        return towers

    def stacks(self) -> dict[str, list[_Block]]:
        """Every outermost list of blocks, by path; lists of lists, such as stages, are laid out in a row."""
        found: dict[str, list[_Block]] = {}
        for name, child in self.model.named_children():
            found |= self._scan(child, name)
        return found

    def _scan(self, module: nn.Module, path: str) -> dict[str, list[_Block]]:
        if isinstance(module, _LISTS):
            blocks = self._blocks(module, path)
            if _is_stack(blocks):
                return {path: blocks}
            if not any(block.mlps for block in blocks) and any(_mixes(block) for block in blocks):
                self.passed_over[path] = [block for block in blocks if any(True for _ in block.module.children())]
        found: dict[str, list[_Block]] = {}
        for name, child in module.named_children():
            found |= self._scan(child, f"{path}.{name}")
        return found

    def _blocks(self, module: nn.Module, path: str) -> list[_Block]:
        blocks = []
        for name, element in module._modules.items():  # named_children would leave out a block that is used twice
            inner = [block for stack in self._scan(element, f"{path}.{name}").values() for block in stack]
            blocks += inner or [self.block(f"{path}.{name}", element)]
        return blocks

    def settled(self, blocks: list[_Block]) -> list[_Block]:
        """The blocks, with activation modules that serve several MLPs left to be repeated instead of hooked.

        Raises:
            ArchitectureError: one MLP serves several layers.
        """
        if self._uses is None:
            self._uses = collections.Counter(
                id(module) for _, module in self.model.named_modules(remove_duplicate=False)
            )
        settled = []
        for block in blocks:
            found = []
            for mlp in block.mlps:
                place = f"{block.path}.{mlp.inner}" if mlp.inner else block.path
                before = self._places.setdefault((id(mlp.module), mlp.layout.down), place)
                if before != place:
                    what = f"{before} and {place} are one module, whose neurons cannot be told apart by layer"
                    raise ArchitectureError(self.explain(what, []))
                self._refuse_strange(place, mlp, block.registered)
                name = mlp.layout.activation
                if (
                    name is not None
                    and not mlp.layout.parameters
                    and self._uses[id(mlp.module.get_submodule(name))] > 1
                ):
                    mlp = dataclasses.replace(mlp, layout=dataclasses.replace(mlp.layout, activation=None))
                found.append(mlp)
            settled.append(dataclasses.replace(block, mlps=tuple(found)))
        return settled

    def _refuse_strange(self, place: str, mlp: _Found, registered: bool) -> None:
        """Raises where hooks on an MLP's modules would tell of something else than its class's ``forward``."""
        if _is_replaced(mlp.module) and not registered:
            what = (
                f"the forward of {place} was replaced on this one object, so its class does not tell what it computes"
            )
            raise ArchitectureError(self.explain(what, []))
        layout = mlp.layout
        for name in () if layout.parameters else filter(None, (layout.down, layout.gate, layout.up, layout.fused)):
            before = self._places.setdefault((id(mlp.module.get_submodule(name)), ""), place)
            if before != place:
                what = f"{before} and {place} share {name!r}, one module, whose values cannot be told apart by layer"
                raise ArchitectureError(self.explain(what, []))

    # --- MLPs of a tower ---

    def mlps(self, tower: str, layer: int, block: _Block) -> Iterator[MLP]:
        """The MLPs of one block, under the names that their sites get."""
        heads = {found.inner.split(".")[0] for found in block.mlps}
        many = {found.inner for found in block.mlps if sum(other.inner == found.inner for other in block.mlps) > 1}
        for found in block.mlps:
            path = f"{block.path}.{found.inner}" if found.inner else block.path
            if found.inner in self.known.names:
                name = self.known.names[found.inner]
            elif len(block.mlps) == 1 and found.experts is None:
                name = "mlp"
            else:
                head, *tail = found.inner.split(".")
                name = ".".join(["mlp" if len(heads) == 1 else head, *tail]) if head else "mlp"
            if found.inner in many:
                name = f"{name}.{found.layout.down.replace('.', '_')}"
            routed = _is_routed(found, block)
            if found.experts is None:
                yield MLP(tower, layer, name, path, found.layout, found.width, None, routed)
                continue
            for expert in range(found.experts):
                yield MLP(tower, layer, f"{name}.{expert}", path, found.layout, found.width, expert, True)

    # --- what was seen ---

    def explain(self, what: str, doubts: Sequence[str]) -> str:
        """The text of an error: what is wrong, what was seen, and how a user can say what is known."""
        name = type(self.model).__name__
        lists = _lists(self.model)
        seen = "\n".join(f"  {line}" for line in [*doubts[:6], *lists[:12]]) or "  no list of blocks"
        more = f"\n  and {len(doubts) - 6} more" if len(doubts) > 6 else ""
        return (
            f"{name}: {what}. Seen:\n{seen}{more}\n"
            "If you know how it computes, say so once, before the model is wrapped:\n"
            "  from vlmneurons.model.architectures import Architecture, MLPLayout, register_architecture\n"
            f"  register_architecture({name!r}, Architecture(\n"
            "      towers={'language': '<path of the list of blocks>', 'vision': '<path>'},\n"
            "      mlps={'<tower>': {'<path of the MLP in a block>': MLPLayout(\n"
            "          gate='<projection before the activation>', up='<the other, or None>', "
            "down='<last projection>',\n"
            "          activation='<module>',  # or function=torch.nn.functional.silu\n"
            "      )}},  # a tower that is left out here is found\n"
            "  ))"
        )


def _is_replaced(module: nn.Module) -> bool:
    """Whether a module has a ``forward`` of its own, other than accelerate's or nnsight's around that of its class."""
    forward = vars(module).get("_old_forward") if "_hf_hook" in vars(module) else vars(module).get("forward")
    if forward is None or type(forward).__module__.partition(".")[0] == "nnsight":
        return False
    if getattr(forward, "_torchdynamo_orig_callable", None) is not None:
        return True
    inner = inspect.unwrap(forward)
    return getattr(inner, "__func__", inner) is not inspect.unwrap(type(module).forward)


def _parameter_width(first: nn.Parameter, down: nn.Parameter, parts: int) -> int:
    """Number of neurons of experts held as ``[expert, in, out]`` or ``[expert, out, in]`` parameters."""
    if first.shape[2] == parts * down.shape[1] and first.shape[1] == down.shape[2]:
        return down.shape[1]
    if first.shape[1] == parts * down.shape[2] and first.shape[2] == down.shape[1]:
        return down.shape[2]
    raise ArchitectureError(f"parameters of shapes {tuple(first.shape)} and {tuple(down.shape)} do not fit together")


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def _is_routed(found: _Found, block: _Block) -> bool:
    """Whether an MLP with its own module is one of a list of experts."""
    *above, last = found.inner.split(".")
    listed = last.isdigit() and isinstance(block.module.get_submodule(".".join(above)), nn.ModuleList)
    return listed and any("expert" in name and "shared" not in name for name in above)


def _mixes(block: _Block) -> bool:
    """Whether a block has weights beside its MLPs: a transformer block does, a projector does not."""
    inside: set[nn.Module] = set()
    for found in block.mlps:
        if found.module is block.module or not isinstance(found.module, nn.Module):
            names = (found.layout.down, found.layout.gate, found.layout.up, found.layout.fused)
            parts = [] if found.layout.parameters else [found.module.get_submodule(name) for name in names if name]
            inside |= {found.module, *(child for part in parts for child in part.modules())}
        else:
            inside |= set(found.module.modules())
    outside = [child for child in block.module.modules() if child not in inside]
    return any(_matrices(child) or features(child) is not None for child in outside)


def _is_stack(blocks: list[_Block]) -> bool:
    """Whether these are transformer blocks: some hold an MLP, and also what mixes tokens.

    In hybrid models one block does this and the next that; then they are at least of one class. The sublayers of one
    T5 block also do this and that, and are not.
    """
    with_mlp = [block for block in blocks if block.mlps]
    if any(_mixes(block) for block in with_mlp):
        return True
    kinds = {type(block.module) for block in with_mlp}
    return any(type(block.module) in kinds and _mixes(block) for block in blocks if not block.mlps)


def _common(paths: Sequence[str]) -> str:
    """The path of what holds all these."""
    if len(paths) == 1:
        return paths[0]
    split = [path.split(".") for path in paths]
    same = 0
    while all(len(parts) > same and parts[same] == split[0][same] for parts in split):
        same += 1
    return ".".join(split[0][:same])


# --- names of towers ---

_VISION = re.compile(r"vision|visual|image|img|(^|_)vit($|_)|siglip|clip|davit|pixel", re.IGNORECASE)
_VISION_CLASS = re.compile(r"Vision|Visual|Image|ViT|Siglip|Clip|CLIP|Swin|Pixel|Timm")
_AUDIO = re.compile(r"audio|speech|sound|whisper", re.IGNORECASE)
_PLAIN = {
    "layers",
    "layer",
    "blocks",
    "block",
    "h",
    "decoder",
    "encoder",
    "model",
    "transformer",
    "base_model",
    "module",
}


def _named(model: nn.Module, stacks: dict[str, list[_Block]]) -> dict[str, tuple[str, list[_Block]]]:
    """Towers from lists of blocks: which is the language model, which sees, and what the others are called."""
    decoder = _path(model, _asked(model, "get_decoder"))
    embedding = _path(model, _asked(model, "get_input_embeddings"))
    home = embedding.rpartition(".")[0] if embedding is not None else None

    def senses(path: str) -> str | None:
        """``"vision"`` or ``"audio"``, by the names on the way down to a list, and those of the classes."""
        at, parts = model, path.split(".")
        for depth, part in enumerate(parts):
            here = ".".join(parts[: depth + 1])
            at = at.get_submodule(part)
            if decoder is not None and (decoder == here or decoder.startswith(f"{here}.")):
                continue  # the language model is in here as well
            for sense, name, kind in (("audio", _AUDIO, _AUDIO), ("vision", _VISION, _VISION_CLASS)):
                if name.search(part) or (depth < len(parts) - 1 and kind.search(type(at).__name__)):
                    return sense
        return None

    sensed = {path: senses(path) for path in stacks}
    texts = [path for path, sense in sensed.items() if sense is None]
    main = _language(texts, decoder, home, model)
    groups: dict[tuple[str, str], list[str]] = {}
    for path in stacks:
        kind = "language" if path == main else sensed[path] or _role(path, main)
        groups.setdefault((kind, _component(path)), []).append(path)
    towers: dict[str, tuple[str, list[_Block]]] = {}
    order = {"language": 0, "vision": 1, "encoder": 2, "audio": 3}
    named = sorted(groups, key=lambda key: (order.get(key[0], 4), not _VISION.search(key[1]), len(key[1])))
    for kind, component in named:
        paths = groups[kind, component]
        name = kind if kind not in towers else component
        if name in towers:
            name = paths[0].replace(".", "_")
        towers[name] = (_common(paths), [block for path in paths for block in stacks[path]])
    return towers


def _asked(model: nn.Module, method: str) -> Any:
    try:
        return getattr(model, method)()
    except Exception:  # not every model knows
        return None


def _path(model: nn.Module, module: Any) -> str | None:
    return next((path for path, other in model.named_modules() if other is module), None)


def _language(texts: list[str], decoder: str | None, home: str | None, model: nn.Module) -> str | None:
    """The list of blocks of the text decoder, among those that neither see nor hear."""

    def inside(path: str, prefix: str | None) -> bool:
        return prefix is not None and (not prefix or path.startswith(f"{prefix}."))

    chosen = texts
    for narrow in (
        lambda path: inside(path, decoder),
        lambda path: inside(path, home),
        lambda path: "decoder" in path.split("."),
        lambda path: path.rpartition(".")[2] in _PLAIN,
        lambda path: path.rpartition(".")[0] == home,
    ):
        kept = [path for path in chosen if narrow(path)]
        chosen = kept or chosen
        if len(chosen) == 1:
            return chosen[0]
    if chosen:
        raise ArchitectureError(
            f"{type(model).__name__}: {', '.join(chosen)} could each be the language model; say which is, with "
            "register_architecture(..., Architecture(towers={'language': '<path>', ...}))"
        )
    return None


def _role(path: str, main: str | None) -> str:
    """Name of a tower that is neither the language model nor a sense: ``"encoder"`` beside a decoder, or its own."""
    component = _component(path)
    beside = path.removeprefix(f"{_common([main, path])}.") if main is not None else path
    if main is not None and beside.split(".")[0] == "encoder" and "decoder" in main.split("."):
        return "encoder"
    if main is not None and main.rpartition(".")[0] == path.rpartition(".")[0]:
        return path.rpartition(".")[2]
    return component


def _component(path: str) -> str:
    """The part of the model that a list belongs to, by its name: ``vision_tower`` in ``model.vision_tower.layers``."""
    parts = path.split(".")
    return next(
        (part for part in parts if part not in _PLAIN and not part.isdigit() and part != "_orig_mod"), parts[-1]
    )


def _lists(model: nn.Module) -> list[str]:
    """A line for every list of several modules: where it is, and what its first block is made of."""
    lines, inside = [], []
    for path, module in model.named_modules():
        if isinstance(module, _LISTS) and len(module) > 1 and not any(path.startswith(f"{outer}.") for outer in inside):
            inside.append(path)
            block = next(iter(module.children()))
            parts = [
                f"{key}: {size[0]}->{size[1]}" if size is not None else f"{key}: {type(child).__name__}"
                for key, child in block.named_children()
                for size in [features(child)]
            ]
            lines.append(f"{path}: {len(module)} x {type(block).__name__}({', '.join(parts[:10])})")
    return lines
