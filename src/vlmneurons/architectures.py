"""Where the MLP neurons are in a transformers model: found by structure, overridable by registration.

Nothing here is a list of models. Every block of a model is looked at once as a data flow (its ``forward`` is followed
symbolically, no weight is touched and nothing is computed, so models on the meta device, sharded, quantised or
adapted ones are the same to us), and an MLP is what computes like one:

    pre = gate(x)    gate = activation(pre)    post = gate * up(x)    output = down(post)

or, without an ``up`` branch, ``post = gate``. Names of modules are read only to name towers, never to guess roles.
What cannot be told for certain raises `ArchitectureError`, which shows what was seen and how to `register_architecture`.
"""

import functools
import inspect
import operator
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, fx, nn

from vlmneurons.errors import ArchitectureError, SiteError
from vlmneurons.sites import KINDS, Site

# ---------------------------------------------------------------------------------------------------------------------
# What an MLP is made of
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One operation of an `Expression`: ``target`` applied to earlier values.

    Attributes:
        how: ``"function"``, ``"method"`` or ``"module"``.
        target: the function, the name of the method, or the name of the module relative to the MLP.
        arguments: each a constant, or a `Value`.
        keywords: pairs of a name and such an argument.
    """

    how: str
    target: Callable | str
    arguments: tuple = ()
    keywords: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Value:
    """A value that an `Expression` computes with: an input (``"gate"``) or the result of an earlier step (a number)."""

    of: str | int


@dataclass(frozen=True)
class Expression:
    """An elementwise computation of the MLP, kept so that it can be repeated on other values, bit for bit.

    Equal for MLPs that compute alike, and hashable: it names modules, and looks them up in the MLP it is called with.
    """

    steps: tuple[Step, ...]

    def __call__(self, module: nn.Module, **inputs: Tensor) -> Tensor:
        results: list[Any] = []

        def value(argument: Any) -> Any:
            if isinstance(argument, Value):
                return inputs[argument.of] if isinstance(argument.of, str) else results[argument.of]
            return tuple(map(value, argument)) if isinstance(argument, tuple) else argument

        for step in self.steps:
            arguments = [value(argument) for argument in step.arguments]
            keywords = {name: value(argument) for name, argument in step.keywords}
            if step.how == "function":
                results.append(step.target(*arguments, **keywords))
            elif step.how == "method":
                results.append(getattr(arguments[0], step.target)(*arguments[1:], **keywords))
            else:  # forward, not a call: nobody else's hooks should see a repetition
                results.append(module.get_submodule(step.target).forward(*arguments, **keywords))
        return results[-1]

    def __str__(self) -> str:
        names: list[str] = []
        for step in self.steps:
            if isinstance(step.target, str):
                name = step.target
            else:
                name = getattr(step.target, "__name__", str(step.target))
            given = [
                argument.of if isinstance(argument.of, str) else names[argument.of]
                for argument in step.arguments
                if isinstance(argument, Value)
            ]
            given += [str(argument) for argument in step.arguments if not isinstance(argument, Value)]
            names.append(f"{name}({', '.join(map(str, given))})")
        return names[-1]


_SPLITS = {
    ("first", "second"): "gate_up",
    ("second", "first"): "up_gate",
    ("even", "odd"): "interleaved",
    ("odd", "even"): "interleaved_up",
}


@dataclass(frozen=True)
class MLPLayout:
    """How one MLP computes. Names are those of modules relative to the MLP module; equal for MLPs built alike.

    Attributes:
        down: the projection whose *input* is the site ``post``.
        activation: the activation module, whose input is ``pre`` and whose output is ``gate``. None if there is none of
            this MLP's own that is called once per forward: then ``gate`` is ``gate_of(module, pre)``, bit for bit.
        function: what computes ``gate`` from ``pre`` (see `gate_of`); also where `activation` is given. A plain function
            of one tensor may be given, and is kept as an `Expression`.
        gate: the projection whose output is ``pre``; None where it is fused.
        up: the projection whose output is ``up``; None for an MLP without one (there ``post == gate``), or fused.
        fused: a projection whose output holds ``pre`` and ``up`` both, as `split` says.
        split: ``"gate_up"`` or ``"up_gate"`` (two halves, in this order), ``"interleaved"`` (gate at even places),
            ``"interleaved_up"`` (up at even places); None where nothing is fused.
        product: computes ``post`` from ``gate`` and ``up`` (from ``gate`` alone in an ungated MLP); None if it is
            ``gate * up``, or ``gate``, and nothing else.
    """

    down: str
    activation: str | None = None
    function: Callable | None = None
    gate: str | None = None
    up: str | None = None
    fused: str | None = None
    split: str | None = None
    product: Expression | None = None

    def __post_init__(self) -> None:
        if self.function is None and self.activation is not None:
            object.__setattr__(self, "function", Expression((Step("module", self.activation, (Value("pre"),)),)))
        elif self.function is not None and not isinstance(self.function, Expression):
            object.__setattr__(self, "function", Expression((Step("function", self.function, (Value("pre"),)),)))
        if (self.gate is None) == (self.fused is None):
            raise ArchitectureError("an MLPLayout names the projection before its activation: give gate=, or fused=")
        if (self.fused is None) != (self.split is None) or self.split not in (None, *_SPLITS.values()):
            raise ArchitectureError(f"fused= goes with split=, one of {', '.join(_SPLITS.values())}")
        if self.function is None:
            raise ArchitectureError("an MLPLayout needs activation= (name of a module), or function= (such as F.silu)")

    @property
    def gated(self) -> bool:
        """Whether there is an ``up`` branch."""
        return self.up is not None or self.fused is not None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of site that such an MLP has."""
        return KINDS if self.gated else ("pre", "gate", "post")

    def gate_of(self, module: nn.Module, pre: Float[Tensor, "... neuron"]) -> Float[Tensor, "... neuron"]:
        """``gate`` computed from ``pre`` by the model's own operations: equal to the model's bit for bit."""
        return self.function(module, pre=pre)

    def post_of(
        self, module: nn.Module, gate: Float[Tensor, "... neuron"], up: Float[Tensor, "... neuron"] | None = None
    ) -> Float[Tensor, "... neuron"]:
        """``post`` computed from ``gate`` (and ``up``, where there is one) by the model's own operations."""
        if self.product is not None:
            return self.product(module, gate=gate, up=up) if self.gated else self.product(module, gate=gate)
        return gate * up if self.gated else gate

    def part(self, fused: Float[Tensor, "... both"], kind: str) -> Float[Tensor, "... neuron"]:
        """The view of a fused projection's output that is ``pre`` or ``up``."""
        width = fused.shape[-1] // 2
        first = (kind == "pre") == (self.split in ("gate_up", "interleaved"))
        if self.split in ("gate_up", "up_gate"):
            return fused[..., :width] if first else fused[..., width:]
        return fused[..., 0::2] if first else fused[..., 1::2]


@dataclass(frozen=True)
class MLP:
    """One MLP, or one expert, of one layer.

    Attributes:
        tower: name of the tower.
        layer: number of the block within the tower.
        name: which MLP of the block: ``"mlp"``, ``"mlp.experts.7"``, ``"mlp.shared_expert"``.
        path: path of its module within the model.
        layout: how it computes.
        width: number of neurons.
        expert: index within a module that holds all experts as 3-D parameters; None for an MLP with a module of its own.
    """

    tower: str
    layer: int
    name: str
    path: str
    layout: MLPLayout
    width: int
    expert: int | None = None

    def site(self, kind: str) -> Site:
        """The site of this MLP at a point of its computation.

        Raises:
            SiteError: this MLP has no such point.
        """
        if kind not in self.layout.kinds:
            raise SiteError(
                f"{self.tower}.layers.{self.layer}.{self.name} has no {kind!r}; it has {', '.join(self.layout.kinds)}"
            )
        return Site(self.tower, self.layer, self.name, kind)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Its sites, in the order in which they are computed."""
        return tuple(Site(self.tower, self.layer, self.name, kind) for kind in self.layout.kinds)


@dataclass(frozen=True)
class Tower:
    """A stack of transformer blocks.

    Attributes:
        name: ``"language"``, ``"vision"`` …
        path: path of the list of blocks within the model; of the part that holds them all, if there are several lists.
        layer_paths: path of every block, those without an MLP included.
        mlps: the MLPs, by layer.
    """

    name: str
    path: str
    layer_paths: tuple[str, ...]
    mlps: tuple[MLP, ...]

    def __len__(self) -> int:
        return len(self.layer_paths)

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of every MLP, in the order of `mlps`."""
        return tuple(mlp.width for mlp in self.mlps)


# ---------------------------------------------------------------------------------------------------------------------
# Reading a module's forward as a data flow
# ---------------------------------------------------------------------------------------------------------------------


def features(module: nn.Module) -> tuple[int, int] | None:
    """Input and output size of a module that acts as a linear layer on the last axis; None for any other.

    Quantised and adapted layers are told by what they declare, or by the one linear layer that they wrap.
    """
    if isinstance(module, nn.Embedding | nn.Bilinear):
        return None
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures"), ("nx", "nf")):
        sizes = [getattr(module, name, None) for name in names]
        if all(isinstance(size, int) for size in sizes):
            return sizes[0], sizes[1]
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module):
        return features(base)
    children = [child for child in module.children() if not _is_passive(child)]
    if len(children) == 1 and not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return features(children[0])
    return None


def _is_passive(module: nn.Module) -> bool:
    """Whether the module hands its input on unchanged when the model is evaluated."""
    return isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd) or type(module).__name__ in (
        "DropPath",
        "StochasticDepth",
    )


class _Tracer(fx.Tracer):
    """Follows ``forward`` as the class defines it; modules that are linear, or have no children, are not entered."""

    def __init__(self, opaque: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return features(m) is not None or not any(True for _ in m.children()) or self.opaque(m)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if self.is_leaf_module(m, ""):
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
        return type(m).forward(m, *args, **kwargs)  # of the class: what others put on the instance is not ours

    def keys(self, obj: fx.Proxy) -> Any:
        return iter(())  # `**kwargs` that are not known are none

    def to_bool(self, obj: fx.Proxy) -> bool:
        return False  # checks such as "is anything infinite"; what is found must hold without them


def _graph(module: nn.Module, opaque: Callable[[nn.Module], bool]) -> fx.Graph | None:
    """Data flow of one module's forward; None if it cannot be followed."""
    tracer = _Tracer(opaque)
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        constants = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        return tracer.trace(module, concrete_args=constants or None)
    except Exception:  # whatever a forward may do with a symbol: then its flow is not known
        return None


_LINEAR_OPERATIONS = {operator.mul, torch.mul, operator.add, torch.add, operator.sub, operator.neg, operator.truediv}
_FUNCTIONS = _LINEAR_OPERATIONS | {
    operator.pow,
    torch.pow,
    torch.sigmoid,
    torch.tanh,
    torch.relu,
    torch.clamp,
    torch.square,
    torch.exp,
    torch.erf,
    F.silu,
    F.gelu,
    F.relu,
    F.relu6,
    F.leaky_relu,
    F.elu,
    F.selu,
    F.celu,
    F.mish,
    F.hardswish,
    F.hardtanh,
    F.softplus,
    F.sigmoid,
    F.tanh,
    F.logsigmoid,
    F.dropout,
}
_PASSIVE_METHODS = {"to", "type", "type_as", "float", "half", "bfloat16", "contiguous", "clone"}
_METHODS = _PASSIVE_METHODS | {"sigmoid", "tanh", "relu", "clamp", "clamp_", "pow", "square", "mul", "add", "exp"}


@dataclass(frozen=True)
class _Source:
    """Output of a linear module, or a part of it."""

    module: str
    part: str | None = None  # "first", "second", "even", "odd"


class _Flow:
    """The data flow of one module, asked for MLPs."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root = root
        self.nodes = list(graph.nodes)
        self.calls: dict[str, int] = {}
        for node in self.nodes:
            if node.op == "call_module":
                self.calls[node.target] = self.calls.get(node.target, 0) + 1

    def module(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(node.target)

    def source(self, node: fx.Node) -> _Source | None:
        """The part of a linear module's output that a node is, if it is one."""
        if node.op == "call_module" and features(self.module(node)) is not None:
            return _Source(node.target)
        if node.op != "call_function" or node.target is not operator.getitem:
            return None
        base, index = node.args
        if not isinstance(base, fx.Node):
            return None
        if base.op in ("call_function", "call_method") and isinstance(index, int):
            name = base.target if isinstance(base.target, str) else getattr(base.target, "__name__", "")
            arguments = dict(enumerate(base.args)) | dict(base.kwargs)
            axis = arguments.get("dim", arguments.get(2, 0))
            inner = base.args[0] if base.args else None
            if not isinstance(inner, fx.Node) or axis != -1 or index not in (0, 1, -1, -2):
                return None
            linear = self.source(inner)
            if linear is None or linear.part is not None:
                return None
            width = features(self.root.get_submodule(linear.module))[1]
            size = arguments.get("chunks", arguments.get("split_size", arguments.get("split_size_or_sections")))
            size = arguments.get(1) if size is None else size
            halves = (name == "chunk" and size == 2) or (
                name == "split" and (size == width // 2 or list(_sequence(size)) == [width // 2] * 2)
            )
            return _Source(linear.module, "first" if index in (0, -2) else "second") if halves else None
        linear = self.source(base)
        if linear is None or linear.part is not None or not isinstance(index, tuple) or index[0] is not Ellipsis:
            return None
        if len(index) != 2 or not isinstance(index[1], slice):
            return None
        half = features(self.root.get_submodule(linear.module))[1] // 2
        where = (index[1].start or 0, index[1].stop, index[1].step)
        parts = {
            (0, half, None): "first",
            (half, None, None): "second",
            (half, 2 * half, None): "second",
            (0, None, 2): "even",
            (1, None, 2): "odd",
        }
        return _Source(linear.module, parts[where]) if where in parts else None

    def is_elementwise(self, node: fx.Node) -> bool:
        if node.op == "call_function":
            return node.target in _FUNCTIONS
        if node.op == "call_method":
            return node.target in _METHODS
        return node.op == "call_module" and (_is_passive(self.module(node)) or _is_activation(self.module(node)))

    def is_passive(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return _is_passive(self.module(node))
        return node.target is F.dropout if node.op == "call_function" else node.target in _PASSIVE_METHODS

    def sources(self, node: Any) -> "frozenset[_Source] | None":
        """The linear outputs that a node is an elementwise function of; None if it is anything else."""
        if not isinstance(node, fx.Node):
            return frozenset()
        found = self.source(node)
        if found is not None:
            return frozenset([found])
        if not self.is_elementwise(node):
            return None
        union: frozenset[_Source] = frozenset()
        for argument in node.all_input_nodes:
            part = self.sources(argument)
            if part is None:
                return None
            union |= part
        return union

    def bends(self, node: Any) -> bool:
        """Whether an elementwise expression is anything but a multiple of its source."""
        if not isinstance(node, fx.Node) or self.source(node) is not None:
            return False
        if not self.is_passive(node):
            linear = node.op == "call_function" and node.target in _LINEAR_OPERATIONS
            if not linear or len(node.all_input_nodes) > 1:
                return True
        return any(self.bends(argument) for argument in node.all_input_nodes)

    def expression(self, node: fx.Node, inputs: Mapping[fx.Node, str]) -> Expression:
        """The computation of a node from the given nodes."""
        steps: list[Step] = []
        places: dict[fx.Node, Value] = {given: Value(name) for given, name in inputs.items()}

        def visit(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                if argument not in places:
                    arguments = tuple(visit(value) for value in argument.args)
                    keywords = tuple((name, visit(value)) for name, value in argument.kwargs.items())
                    how = argument.op.removeprefix("call_")
                    steps.append(Step(how, argument.target, arguments, keywords))
                    places[argument] = Value(len(steps) - 1)
                return places[argument]
            return tuple(visit(value) for value in argument) if isinstance(argument, list | tuple) else argument

        visit(node)
        return Expression(tuple(steps))

    def source_nodes(self, node: fx.Node) -> list[fx.Node]:
        """The nodes at which `sources` stopped."""
        if self.source(node) is not None:
            return [node]
        return list(dict.fromkeys(found for argument in node.all_input_nodes for found in self.source_nodes(argument)))

    def layouts(self) -> list[MLPLayout]:
        """Every MLP in this flow, by its down projection."""
        found = []
        for node in self.nodes:
            if node.op != "call_module" or features(self.module(node)) is None:
                continue
            operands = [*node.args, *node.kwargs.values()]
            if not operands or not isinstance(operands[0], fx.Node):
                continue
            layout = self._layout(node.target, operands[0])
            if layout is not None:
                found.append(layout)
        return found

    def _layout(self, down: str, value: fx.Node) -> MLPLayout | None:
        sources = self.sources(value)
        if not sources or not self.bends(value):
            return None
        nodes = self.source_nodes(value)
        if len(nodes) == 1:
            source = self.source(nodes[0])
            if source.part is not None:
                return None
            gate = value  # what follows the last bend (dropout, a cast) is part of the way to post
            while self.is_passive(gate):
                gate = gate.all_input_nodes[0]
            return MLPLayout(
                down=down,
                activation=self._activation(gate, nodes[0]),
                function=self.expression(gate, {nodes[0]: "pre"}),
                gate=source.module,
                product=None if gate is value else self.expression(value, {gate: "gate"}),
            )
        if len(nodes) != 2:
            return None
        product = value
        while product.op == "call_module" or len(product.all_input_nodes) == 1:
            if self.source(product) is not None:
                return None
            product = product.all_input_nodes[0]
        if product.target not in (operator.mul, torch.mul, "mul") or len(product.all_input_nodes) != 2:
            return None
        sides = product.all_input_nodes
        if any(len(self.source_nodes(side)) != 1 for side in sides):
            return None
        bent = [side for side in sides if self.bends(side)]
        if len(bent) != 1:
            return None
        gate, other = bent[0], next(side for side in sides if side is not bent[0])
        pre_node, up_node = self.source_nodes(gate)[0], self.source_nodes(other)[0]
        pre, up = self.source(pre_node), self.source(up_node)
        plain = product is value and other is up_node and product.args == (gate, other)
        common = {
            "down": down,
            "activation": self._activation(gate, pre_node),
            "function": self.expression(gate, {pre_node: "pre"}),
            "product": None if plain else self.expression(value, {gate: "gate", up_node: "up"}),
        }
        if pre.part is None and up.part is None:
            return MLPLayout(gate=pre.module, up=up.module, **common)
        if pre.module != up.module or (pre.part, up.part) not in _SPLITS:
            return None
        return MLPLayout(fused=pre.module, split=_SPLITS[pre.part, up.part], **common)

    def _activation(self, gate: fx.Node, pre: fx.Node) -> str | None:
        """Name of the module that alone makes gate of pre, if it is called once."""
        alone = gate.op == "call_module" and list(gate.args) == [pre] and not gate.kwargs
        return gate.target if alone and self.calls[gate.target] == 1 else None


def _is_activation(module: nn.Module) -> bool:
    """Whether a module without children acts on each number alone, as far as its kind tells."""
    if any(True for _ in module.children()):
        return False
    kind = type(module)
    return kind.__module__ in ("torch.nn.modules.activation", "transformers.activations")


def _sequence(value: Any) -> Sequence:
    return value if isinstance(value, list | tuple) else ()


# ---------------------------------------------------------------------------------------------------------------------
# Finding them in a model
# ---------------------------------------------------------------------------------------------------------------------


def _fingerprint(module: nn.Module) -> Any:
    """Equal for modules that compute alike: their classes, settings and sizes, all the way down."""
    settings = tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and isinstance(value, int | float | str | bool | type(None))
    )
    children = tuple((name, _fingerprint(child)) for name, child in module.named_children())
    return type(module), settings, children


class _Finder:
    """Finds the MLPs below a module, and remembers what it has seen of each kind of module."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[bool, tuple[MLPLayout, ...]]] = {}

    def look(self, module: nn.Module) -> tuple[bool, tuple[MLPLayout, ...]]:
        """Whether a module's flow can be followed, and the MLPs in its own flow (those of its children apart)."""
        key = _fingerprint(module)
        if key not in self._known:
            flow = _graph(module, lambda child: not self.look(child)[0] or bool(self.look(child)[1]))
            self._known[key] = (False, ()) if flow is None else (True, tuple(_Flow(module, flow).layouts()))
        return self._known[key]

    def below(self, module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, MLPLayout]]:
        """Path, module and layout of each MLP, a module's before those of its children."""
        if features(module) is not None or not any(True for _ in module.children()):
            return
        deeper = [
            found
            for name, child in module.named_children()
            for found in self.below(child, f"{path}.{name}" if path else name)
        ]
        if not isinstance(module, nn.ModuleList | nn.ModuleDict):
            if not deeper:
                for layout in self.look(module)[1]:
                    yield path, module, layout
        yield from deeper


def _width(module: nn.Module, layout: MLPLayout) -> int:
    return features(module.get_submodule(layout.down))[0]


@dataclass(frozen=True)
class Architecture:
    """What a user knows about a model that its structure does not tell. Whatever is not given is found.

    Attributes:
        towers: name of each tower, and the path of its list of blocks (several paths, for stages).
        mlps: path of each MLP relative to its block, and its layout. Blocks that lack a path have no such MLP.
        names: what an MLP at such a path is to be called in the names of sites; the path itself by default.

    Example:
        >>> from vlmneurons.architectures import Architecture, MLPLayout, register_architecture
        >>> register_architecture(
        ...     "MyVLMForConditionalGeneration",
        ...     Architecture(
        ...         towers={"language": "model.text.blocks", "vision": "model.eye.blocks"},
        ...         mlps={"ff": MLPLayout(gate="w1", up="w3", down="w2", function=torch.nn.functional.silu)},
        ...         names={"ff": "mlp"},
        ...     ),
        ... )
    """

    towers: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    mlps: Mapping[str, MLPLayout] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)


_REGISTERED: list[tuple[str | Callable[[nn.Module], bool], Architecture]] = []


def register_architecture(which: str | Callable[[nn.Module], bool], architecture: Architecture) -> None:
    """Makes `find_towers` follow an `Architecture` instead of finding everything itself.

    Args:
        which: name of the model's class, or a function that tells of a model whether the architecture is meant for it.
        architecture: what is known about such models. What was registered last is asked first.
    """
    _REGISTERED.insert(0, (which, architecture))


_VISION = re.compile(r"vision|visual|image|vit|siglip|clip|davit|pixel", re.IGNORECASE)


def find_towers(hf_model: nn.Module) -> dict[str, Tower]:
    """The towers of a model, ``"language"`` first, with every MLP in them.

    Args:
        hf_model: a transformers model, on any device, meta included. It is only looked at.

    Raises:
        ArchitectureError: the MLPs cannot be told for certain.
    """
    finder = _Finder()
    stacks: dict[str, list[tuple[str, list[tuple[str, nn.Module, MLPLayout]]]]] = {}
    language = _language_path(hf_model)

    def scan(module: nn.Module, path: str) -> None:
        if isinstance(module, nn.ModuleList) and len(module):
            blocks = [(f"{path}.{name}", block) for name, block in module.named_children()]
            found = [(block_path, list(finder.below(block))) for block_path, block in blocks]
            if any(mlps and _mixes(block, mlps) for (_, block), (_, mlps) in zip(blocks, found, strict=True)):
                stacks[path] = found
                return
        for name, child in module.named_children():
            scan(child, f"{path}.{name}" if path else name)

    scan(hf_model, "")
    towers: dict[str, Tower] = {}
    for path, found in stacks.items():
        if language is not None and path.startswith(language):
            name = "language"
        elif _VISION.search(path):
            name = "vision"
        else:
            name = "language" if language is None else path.split(".")[-2]
        mlps = tuple(
            MLP(name, layer, _mlp_name(inner), f"{block}.{inner}" if inner else block, layout, _width(module, layout))
            for layer, (block, all_mlps) in enumerate(found)
            for inner, module, layout in all_mlps
        )
        towers[name] = Tower(name, path, tuple(block for block, _ in found), mlps)
    if "language" not in towers:
        raise ArchitectureError(f"no MLP was found in the language model of {type(hf_model).__name__}")
    return dict(sorted(towers.items(), key=lambda item: (item[0] != "language", item[0] != "vision")))


def _mixes(block: nn.Module, mlps: list[tuple[str, nn.Module, MLPLayout]]) -> bool:
    """Whether a block has linear layers beside its MLPs: a transformer block does, a projector does not."""
    inside = {id(child) for _, module, _ in mlps if module is not block for child in module.modules()}
    outside = [child for child in block.modules() if features(child) is not None and id(child) not in inside]
    own = 3 * sum(module is block for _, module, _ in mlps)
    return len(outside) > own


def _mlp_name(inner: str) -> str:
    return "mlp" if inner in ("mlp", "", "feed_forward", "ffn") else inner


def _language_path(hf_model: nn.Module) -> str | None:
    """Path of the text decoder, as transformers names it."""
    decoder = hf_model.get_decoder() if hasattr(hf_model, "get_decoder") else None
    return next((path for path, module in hf_model.named_modules() if module is decoder and path), None)


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing
# ---------------------------------------------------------------------------------------------------------------------


class Handle:
    """Hooks that belong together; `remove` takes them off, and nobody else's. Removing twice does nothing."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = list(handles)

    def remove(self) -> None:
        """Takes the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


def read(hf_model: nn.Module, mlp: MLP, kind: str, callback: Callable[[Tensor], Any]) -> Handle:
    """Calls ``callback(values)`` whenever the model computes a site, with the values it computes: ``[..., neuron]``.

    The tensor is the model's own, or a view of it: a callback must not change it, and copies what it keeps.

    Args:
        hf_model: the model in which the MLP was found.
        mlp: one of its MLPs.
        kind: ``"pre"``, ``"gate"``, ``"up"`` or ``"post"``.
        callback: what it returns is ignored. What it raises stops the forward.

    Raises:
        SiteError: the MLP has no such site.
    """
    mlp.site(kind)
    layout, module = mlp.layout, hf_model.get_submodule(mlp.path)
    if kind == "post" or (kind == "gate" and _gate_is_post(layout)):
        down = module.get_submodule(layout.down)
        return Handle(
            [
                down.register_forward_pre_hook(
                    lambda _, args, kwargs: _drop(callback(_first(args, kwargs))), with_kwargs=True
                )
            ]
        )
    if kind == "gate" and layout.activation is not None:
        activation = module.get_submodule(layout.activation)
        return Handle([activation.register_forward_hook(lambda _, args, output: _drop(callback(output)))])
    name, value = _linear_output(layout, module, kind)
    return Handle([module.get_submodule(name).register_forward_hook(lambda _, args, out: _drop(callback(value(out))))])


def write(hf_model: nn.Module, mlp: MLP, kind: str, edit: Callable[[Tensor], Tensor | None]) -> Handle:
    """Lets ``edit(values)`` replace what the model goes on with, whenever it computes a site.

    Edits of one site act in the order in which they were put on, each on what the one before gave. An edit of ``pre``,
    ``gate`` or ``up`` is seen at every later point of the MLP.

    Args:
        hf_model: the model in which the MLP was found.
        mlp: one of its MLPs.
        kind: ``"pre"``, ``"gate"``, ``"up"`` or ``"post"``.
        edit: gets ``[..., neuron]`` and returns new values of that shape; None leaves everything as it is, bit for bit.
            The values it gets are the model's own: it must not change them in place.

    Raises:
        SiteError: the MLP has no such site.
    """
    mlp.site(kind)
    layout, module = mlp.layout, hf_model.get_submodule(mlp.path)
    if kind == "post" or (kind == "gate" and _gate_is_post(layout)):
        down = module.get_submodule(layout.down)

        def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            new = edit(_first(args, kwargs))
            return None if new is None else _with_first(args, kwargs, new)

        return Handle([down.register_forward_pre_hook(before, with_kwargs=True)])
    if kind == "gate" and layout.activation is not None:
        activation = module.get_submodule(layout.activation)
        return Handle([activation.register_forward_hook(lambda _, args, output: edit(output))])
    if kind == "gate":
        return _Recomputed.of(module, layout).add(edit)
    name = layout.fused or (layout.gate if kind == "pre" else layout.up)

    def after(_: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if layout.fused is None:
            return edit(output)
        part = layout.part(output, kind)
        new = edit(part)
        if new is None:
            return None
        whole = output.clone()
        layout.part(whole, kind).copy_(new)
        return whole

    return Handle([module.get_submodule(name).register_forward_hook(after)])


def _gate_is_post(layout: MLPLayout) -> bool:
    return not layout.gated and layout.product is None


def _linear_output(layout: MLPLayout, module: nn.Module, kind: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The linear module whose output holds a site's values, and how to get them from it."""
    name = layout.fused or (layout.up if kind == "up" else layout.gate)

    def value(output: Tensor) -> Tensor:
        if layout.fused is not None:
            output = layout.part(output, "up" if kind == "up" else "pre")
        return layout.gate_of(module, output) if kind == "gate" else output

    return name, value


class _Recomputed:
    """Edits of a ``gate`` that no module of its own computes: ``post`` is computed again from the edited gate.

    One for each MLP, so that several edits follow each other. Its hooks put themselves where they belong at every
    forward: last on the projections (they must see what others made of ``pre`` and ``up``) and first on the down
    projection (others must see what it makes of ``post``).
    """

    _all: "weakref.WeakKeyDictionary[nn.Module, dict[MLPLayout, _Recomputed]]" = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, module: nn.Module, layout: MLPLayout) -> "_Recomputed":
        return cls._all.setdefault(module, {}).setdefault(layout, cls(module, layout))

    def __init__(self, module: nn.Module, layout: MLPLayout) -> None:
        self.module = weakref.ref(module)
        self.layout = layout
        self.edits: dict[int, Callable[[Tensor], Tensor | None]] = {}
        self.hooks: list[Any] = []
        self.seen: dict[str, Tensor] = {}

    def add(self, edit: Callable[[Tensor], Tensor | None]) -> Handle:
        if not self.edits:
            self._start()
        key = max(self.edits, default=-1) + 1
        self.edits[key] = edit
        return Handle([_Removal(functools.partial(self._remove, key))])

    def _remove(self, key: int) -> None:
        self.edits.pop(key, None)
        if not self.edits:
            for hook in self.hooks:
                hook.remove()
            self.hooks.clear()
            self.seen.clear()

    def _start(self) -> None:
        module, layout = self.module(), self.layout
        down = module.get_submodule(layout.down)
        last = down.register_forward_pre_hook(self._before_down, with_kwargs=True, prepend=True)
        self.hooks.append(last)
        for name in dict.fromkeys(filter(None, (layout.fused, layout.gate, layout.up))):
            linear = module.get_submodule(name)
            keep = linear.register_forward_hook(functools.partial(self._after_linear, name))

            def order(*_: Any, linear: nn.Module = linear, keep: Any = keep) -> None:
                linear._forward_hooks.move_to_end(keep.id)
                down._forward_pre_hooks.move_to_end(last.id, last=False)

            self.hooks += [keep, linear.register_forward_pre_hook(order)]

    def _after_linear(self, name: str, linear: nn.Module, args: tuple, output: Tensor) -> None:
        self.seen[name] = output

    def _before_down(self, down: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        layout, module = self.layout, self.module()
        if layout.fused is not None:
            fused = self.seen.pop(layout.fused)
            pre, up = layout.part(fused, "pre"), layout.part(fused, "up")
        else:
            pre, up = self.seen.pop(layout.gate), self.seen.pop(layout.up, None)
        gate, changed = layout.gate_of(module, pre), False
        for edit in tuple(self.edits.values()):
            new = edit(gate)
            if new is not None:
                gate, changed = new, True
        return _with_first(args, kwargs, layout.post_of(module, gate, up)) if changed else None


class _Removal:
    def __init__(self, remove: Callable[[], None]) -> None:
        self.remove = remove


def _first(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a projection, however its caller names it."""
    return args[0] if args else next(iter(kwargs.values()))


def _with_first(args: tuple, kwargs: Mapping[str, Any], new: Tensor) -> tuple[tuple, dict[str, Any]]:
    if args:
        return (new, *args[1:]), dict(kwargs)
    name = next(iter(kwargs))
    return args, {**kwargs, name: new}


def _drop(_: Any) -> None:
    """Nothing: a hook's return value would replace the model's."""
