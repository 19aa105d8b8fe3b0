"""What a module's ``forward`` computes, read as a data flow: which of its linear layers make up an MLP.

``forward`` is followed with symbols in place of tensors (`torch.fx`). No weight is read and nothing is computed, so it
costs the same for a model on the meta device, a quantised, a sharded or an adapted one.
"""

import contextlib
import copy
import functools
import inspect
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from vlmneurons.model.architectures.layout import SPLITS, Expression, MLPLayout, Step, Value


def features(module: nn.Module) -> tuple[int, int] | None:
    """Input and output size of a module that acts as a linear layer on the last axis; None for any other.

    Quantised and adapted layers are told by what they declare, or by the one linear layer that they wrap.
    """
    if isinstance(module, nn.Embedding | nn.Bilinear | nn.ModuleList | nn.ModuleDict):
        return None
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures"), ("nx", "nf")):
        sizes = [_setting(module, name) for name in names]
        if all(isinstance(size, int) for size in sizes):
            return sizes[0], sizes[1]
    base = module._modules.get("base_layer")
    if base is not None:
        return features(base)
    children = [child for child in module.children() if not is_passive(child)]
    if not children:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and "linear" in type(module).__name__.lower():
            return weight.shape[1], weight.shape[0]
    return features(children[0]) if len(children) == 1 else None


def _setting(module: nn.Module, name: str) -> Any:
    """An attribute, looked for where it may be: most modules lack most names, and torch is slow to say so."""
    if name in vars(module):
        return vars(module)[name]
    return getattr(module, name, None) if hasattr(type(module), name) else None


def is_passive(module: nn.Module) -> bool:
    """Whether the module hands its input on unchanged when the model is evaluated."""
    return isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd) or type(module).__name__.endswith(
        ("DropPath", "StochasticDepth")
    )


def _is_odd(module: nn.Module) -> bool:
    """Whether an elementwise module without weights treats positive and negative numbers alike."""
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return False
    probe = torch.linspace(0.1, 3, 8, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        return torch.equal(type(module).forward(module, probe.clone()), -type(module).forward(module, -probe))


def is_elementwise(module: nn.Module) -> bool:
    """Whether a module without children acts on each number alone: tried out, where it has no weights to look at."""
    if any(True for _ in module.children()):
        return False
    tensors = [*module.parameters(), *module.buffers()]
    if tensors:
        return type(module).__module__ == "transformers.activations" or isinstance(module, nn.PReLU)
    probe = torch.linspace(-3, 3, 24, dtype=torch.float32, device="cpu").reshape(2, 3, 4)
    other = probe.clone()
    other[1, 2, 3] += 0.5
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            before, after = type(module).forward(module, probe.clone()), type(module).forward(module, other)
        if not isinstance(before, Tensor) or before.shape != probe.shape:
            return False
        return bool((before == after).flatten()[:-1].all())
    except Exception:  # a forward of another kind
        return False


# ---------------------------------------------------------------------------------------------------------------------


class _Symbol(fx.Proxy):
    """Stands in for a tensor. Its length is not known, which `*` takes from a TypeError and from nothing else."""

    def __getattr__(self, name: str) -> Any:
        return _Property(self, name)

    def __len__(self) -> int:
        raise TypeError("a symbol has no length")

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class _Property(fx.proxy.Attribute):
    def __len__(self) -> int:
        raise TypeError("a symbol has no length")


_TAKE_NUMBERS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (
        torch,
        (
            *("arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn"),
            *("randperm", "scalar_tensor", "tensor", "zeros"),
            *("chunk", "roll", "split", "tril", "triu"),
        ),
    ),
    (F, ("pad", "scaled_dot_product_attention")),
    (Tensor, ("chunk", "expand", "repeat", "reshape", "roll", "split", "to", "tril", "triu", "view")),
)
"""What takes a length, a dtype or a device, and may be called with no symbol in the place of a tensor.

torch tells `torch.fx` of a call for the sake of its tensors. Whether also for that of a number differs by its version
and by the function: 2.6 refuses ``torch.arange(x.shape[1])``, 2.14 still ``torch.zeros(x.shape[0], 1)``.
"""
_IN_PARTS = ("chunk", "split", torch.chunk, torch.split)  # torch's own, whatever its names are while a flow is followed
_TRACING = threading.RLock()
"""Held while names of torch are exchanged, here and by `torch.fx`: two at once would not put back what was there."""


@contextlib.contextmanager
def _numbers_may_be_symbols() -> Iterator[None]:
    """Within it, the calls of `_TAKE_NUMBERS` are steps of the flow whichever of their arguments is a symbol."""
    with _TRACING:
        places = [(owner, name) for owner, names in _TAKE_NUMBERS for name in names]
        before = [(owner, name, vars(owner).get(name)) for owner, name in places]
        try:
            for owner, name in places:
                setattr(owner, name, _followed(getattr(owner, name), name if owner is Tensor else None))
            yield
        finally:
            for owner, name, own in before:
                if own is not None:
                    setattr(owner, name, own)
                elif name in vars(owner):  # what is inherited comes back by itself
                    delattr(owner, name)


def _followed(call: Callable, method: str | None) -> Callable:
    """A function, or method of tensors, that becomes a step of the flow if one of its arguments is a symbol."""

    @functools.wraps(call)
    def followed(*args: Any, **kwargs: Any) -> Any:
        symbols: list[fx.Proxy] = []
        fx.node.map_aggregate(
            (args, kwargs), lambda value: symbols.append(value) if isinstance(value, fx.Proxy) else None
        )
        if not symbols:
            return call(*args, **kwargs)
        kind, target = ("call_function", call) if method is None else ("call_method", method)
        return symbols[0].tracer.create_proxy(kind, target, args, kwargs)

    return followed


_MOST_WAYS = 12
"""How many ways through one forward are followed at most; each comparison of symbols doubles them."""


class _Tracer(fx.Tracer):
    """Follows ``forward`` as the class defines it; modules that are linear, or have no children, are not entered."""

    def __init__(self, opaque: Callable[[nn.Module], bool], method: str, fill: bool, way: tuple[bool, ...]) -> None:
        super().__init__()
        self.opaque = opaque
        self.traced_func_name = method
        self.fill, self.way = fill, list(way)
        self.taken: list[bool] = []

    def trace(self, root: nn.Module, concrete_args: Any = None) -> fx.Graph:
        with _numbers_may_be_symbols():
            return super().trace(root, concrete_args)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Symbol(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return features(m) is not None or not any(True for _ in m.children()) or self.opaque(m)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if self.is_leaf_module(m, ""):
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
        return type(m).forward(m, *args, **kwargs)  # of the class: what others put on the instance is not ours

    def create_args_for_root(self, root_fn: Callable, is_module: bool, concrete_args: Any = None) -> tuple:
        """Symbols for the arguments that must be given, and if asked for those that are None if not given."""
        given, named = [], {}
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            needed = parameter.default is inspect.Parameter.empty or (self.fill and parameter.default is None)
            needed |= self.fill and type(parameter.default) is int  # lengths, such as query_length=0
            if not needed or parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                continue
            symbol = self.create_proxy("placeholder", parameter.name, (), {})
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY or parameter.default is not parameter.empty:
                named[parameter.name] = symbol
            else:
                given.append(symbol)
        return lambda *args: root_fn(self.root, *given, **named), []

    def iter(self, obj: fx.Proxy) -> Any:
        try:
            return super().iter(obj)
        except fx.proxy.TraceError:
            if obj.node.target in _IN_PARTS:
                return iter((obj[0], obj[1]))  # halves, or no MLP that we know
            if not _is_shape(obj.node):
                raise
            return iter((obj,))  # `view(*shape)`: how long it is makes no difference to where numbers go

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.taken.append(self.way[len(self.taken)] if len(self.taken) < len(self.way) else False)
        return self.taken[-1]


def _is_shape(node: fx.Node) -> bool:
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return (node.target is getattr and node.args[1] == "shape") or (node.op == "call_method" and node.target == "size")


def follow(
    module: nn.Module,
    opaque: Callable[[nn.Module], bool],
    explained: Callable[[nn.Module], bool],
    method: str = "forward",
    everywhere: bool = False,
) -> "list[Flow]":
    """Data flows of one module's ``forward``: the first that can be followed, or one for each way it may go.

    Args:
        module: any module.
        opaque: tells of a module inside whether it is to be taken as one step.
        explained: tells of such a module whether it is known what it does.
        method: a method to follow instead of ``forward``.
        everywhere: whether to follow every way.
    """
    flows: list[Flow] = []
    for fill in (False, True):
        ways: list[tuple[bool, ...]] = [()]
        for way in ways:  # grows as comparisons are met: each is also decided the other way
            tracer = _Tracer(opaque, method, fill, way)
            with contextlib.suppress(Exception):  # whatever a forward may do with a symbol: then this way is not known
                flows.append(Flow(module, tracer.trace(module), explained))
            if flows and not everywhere:
                return flows
            new = [(*tracer.taken[:place], True) for place in range(len(way), len(tracer.taken))]
            ways += new[: _MOST_WAYS - len(ways)]
    return flows


# ---------------------------------------------------------------------------------------------------------------------

_PRODUCTS = {operator.mul, torch.mul, torch.multiply, operator.imul, "mul", "mul_"}
_AFFINE = {
    operator.add,
    operator.iadd,
    torch.add,
    operator.sub,
    operator.neg,
    operator.truediv,
    torch.div,
    "add",
    "div",
}
_CLAMPS = {torch.clamp, torch.clip, "clamp", "clamp_", "clip", torch.minimum, torch.maximum}
_PASSIVE = {F.dropout, "to", "type", "type_as", "float", "half", "bfloat16", "contiguous", "clone"}
_BENDING = {
    *(operator.pow, torch.pow, torch.sigmoid, torch.tanh, torch.relu, torch.square, torch.exp, torch.erf, torch.abs),
    *(F.silu, F.gelu, F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.mish, F.hardswish, F.hardtanh),
    *(F.softplus, F.sigmoid, F.tanh, F.logsigmoid, F.softsign, F.hardsigmoid),
    *("sigmoid", "tanh", "relu", "pow", "square", "exp", "erf", "abs"),
}
_SQUASHING = {torch.sigmoid, F.sigmoid, "sigmoid", torch.softmax, F.softmax, "softmax", torch.tanh, F.tanh, "tanh"}
_SQUASHING_MODULES = (nn.Sigmoid, nn.Softmax, nn.Tanh)
_ELEMENTWISE = _PRODUCTS | _AFFINE | _CLAMPS | _PASSIVE | _BENDING
_MATMULS = {torch.bmm, torch.matmul, operator.matmul, F.linear, "bmm", "matmul"}
_VIEWS = {
    *("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "chunk", "split", "tensor_split"),
    *("split_with_sizes", "unbind", "narrow", "select", "transpose", "permute", "movedim", "swapaxes", "t", "detach"),
    *("view_as", "reshape_as", "expand_as", "diagonal", "as_strided", "contiguous", "to", "float", "type"),
}
_TURNS = {"transpose", "mT", "t", "permute", torch.transpose}


class _NotElementwise(Exception):
    """An expression that cannot be repeated from the values of a site alone."""


@dataclass(frozen=True)
class _Source:
    """Output of a linear layer, or a part of it."""

    name: str
    width: int
    part: str | None = None  # "first", "second", "even", "odd"


class Flow:
    """The data flow of one module, asked for MLPs.

    Attributes:
        layouts: every MLP in the flow.
        linears: names of the linear layers that the flow passes through.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, explained: Callable[[nn.Module], bool]) -> None:
        self.root = root
        self.explained = explained
        self.nodes = list(graph.nodes)
        self.given: dict[fx.Node, _Source] = {}
        self._sources: dict[fx.Node, frozenset[_Source] | None] = {}
        self.places = {node: place for place, node in enumerate(self.nodes)}
        self.writers = self._find_writers()
        self.calls: dict[str, int] = {}
        for node in self.nodes:
            if node.op == "call_module":
                self.calls[node.target] = self.calls.get(node.target, 0) + 1
        self.linears = frozenset(name for name, _ in map(self._projection, self.nodes) if name is not None)
        self.layouts: tuple[MLPLayout, ...] = ()

    def analyse(self) -> "Flow":
        """Finds the MLPs; gives itself."""
        found = []
        for node in self.nodes:
            name, value = self._projection(node)
            if name is None:
                continue
            layout = self.layout(name, value)
            if layout is not None:
                found.append(layout)
        self.layouts = tuple(found)
        return self

    # --- what nodes are ---

    def _find_writers(self) -> dict[fx.Node, list[fx.Node]]:
        """The steps that write into a value which is used besides, by that value: it is then not what made it.

        Whoever only goes on with the result of such a step (``relu_()``) might as well have had it elsewhere.
        """
        writers: dict[fx.Node, list[fx.Node]] = {}
        for node in self.nodes:
            value = self._written(node)
            while isinstance(value, fx.Node):
                used = any(
                    self.places[user] > self.places[node] or _is_view(user) for user in value.users if user is not node
                )
                if used or node.target is operator.setitem:
                    writers.setdefault(value, []).append(node)
                value = value.args[0] if _is_view(value) and value.args else None
        return writers

    def _written(self, node: fx.Node) -> Any:
        """The value that a step writes into, if it does."""
        if node.target is operator.setitem:
            return node.args[0]
        if node.kwargs.get("out") is not None:
            return node.kwargs["out"]
        if node.op == "call_module":
            writes = getattr(self._module(node), "inplace", False) is True
        elif node.op in ("call_function", "call_method"):
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            writes = name.endswith("_") and not name.endswith("__")
            if getattr(node.target, "__module__", None) == F.__name__:
                with contextlib.suppress(TypeError, ValueError):  # it declares no arguments
                    given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
                    writes |= given.get("inplace") is True
        else:
            return None
        return node.args[0] if writes and node.args else None

    def _module(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(node.target)

    def _parameter(self, node: Any) -> tuple[str, Tensor] | None:
        """Name and value of the parameter that a node is, seen through transpositions."""
        while isinstance(node, fx.Node) and (
            (node.op in ("call_method", "call_function") and node.target in _TURNS)
            or (node.op == "call_function" and node.target is getattr and node.args[1] in ("mT", "T"))
        ):
            node = node.args[0]
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        value = operator.attrgetter(node.target)(self.root)
        return (node.target, value) if isinstance(value, nn.Parameter) else None

    def _projection(self, node: fx.Node) -> tuple[str | None, Any]:
        """Name and input of a linear layer, or of a product with a 3-D parameter; (None, None) for other nodes."""
        operands = [*node.args, *node.kwargs.values()]
        if node.op == "call_module" and features(self._module(node)) is not None and operands:
            return node.target, operands[0]
        if node.target in _MATMULS and len(operands) >= 2:
            parameter = self._parameter(operands[1])
            if parameter is not None and parameter[1].ndim == 3:
                return parameter[0], operands[0]
        return None, None

    def _source(self, node: fx.Node) -> _Source | None:
        """The part of a linear layer's output that a node is, if it is one."""
        if node in self.given:
            return self.given[node]
        name, _ = self._projection(node)
        if name is not None:
            if node.op == "call_module":
                return _Source(name, features(self._module(node))[1])
            shape = operator.attrgetter(name)(self.root).shape
            turned = any(argument.target in _TURNS for argument in node.all_input_nodes)
            return _Source(name, shape[1] if turned or node.target is F.linear else shape[2])
        if node.op != "call_function" or node.target is not operator.getitem:
            return None
        base, index = node.args
        if not isinstance(base, fx.Node):
            return None
        if isinstance(index, int):
            return self._chunk(base, index)
        whole = self._source(base)
        if whole is None or whole.part is not None or not isinstance(index, tuple) or len(index) != 2:
            return None
        if index[0] is not Ellipsis or not isinstance(index[1], slice):
            return None
        half = whole.width // 2
        parts = {
            (0, half, None): "first",
            (half, None, None): "second",
            (half, 2 * half, None): "second",
            (0, None, 2): "even",
            (1, None, 2): "odd",
        }
        part = parts.get((index[1].start or 0, index[1].stop, index[1].step))
        return None if part is None else _Source(whole.name, whole.width, part)

    def _chunk(self, base: fx.Node, index: int) -> _Source | None:
        """The half of a linear layer's output that ``chunk`` or ``split`` on the last axis gives."""
        name = base.target if isinstance(base.target, str) else getattr(base.target, "__name__", "")
        if base.op not in ("call_function", "call_method") or name not in ("chunk", "split", "tensor_split"):
            return None
        inner = base.args[0] if base.args else base.kwargs.get("input", base.kwargs.get("tensor"))
        whole = self._source(inner) if isinstance(inner, fx.Node) else None
        axis = base.args[2] if len(base.args) > 2 else base.kwargs.get("dim", 0)
        if whole is None or whole.part is not None or axis != -1 or index not in (0, 1, -1, -2):
            return None
        sizes = [base.args[1]] if len(base.args) > 1 else []
        sizes += [value for key, value in base.kwargs.items() if key not in ("dim", "input", "tensor")]
        half = whole.width // 2
        fits = sizes == [2] if name != "split" else sizes and (sizes[0] == half or list(_items(sizes[0])) == [half] * 2)
        return _Source(whole.name, whole.width, "first" if index in (0, -2) else "second") if fits else None

    def _is_elementwise(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self._module(node)
            return is_passive(module) or is_elementwise(module)
        known = node.op in ("call_function", "call_method") and node.target in _ELEMENTWISE
        return known and not self._lacks_operand(node)

    @staticmethod
    def _lacks_operand(node: fx.Node) -> bool:
        """Whether a product is with an argument that was not given: with something from outside the module."""
        return node.target in _PRODUCTS | _AFFINE and None in node.args

    def _is_passive(self, node: fx.Node) -> bool:
        return is_passive(self._module(node)) if node.op == "call_module" else node.target in _PASSIVE

    def _is_identity(self, node: fx.Node) -> bool:
        """Whether a node hands its input on unchanged in evaluation: a dropout, a dropped path."""
        return is_passive(self._module(node)) if node.op == "call_module" else node.target is F.dropout

    @staticmethod
    def _is_setting(node: fx.Node) -> bool:
        """Whether a node is a property such as ``x.dtype``, which carries no numbers."""
        return node.target is getattr and node.args[1] in ("dtype", "device")

    # --- what nodes depend on ---

    def sources(self, node: Any) -> frozenset[_Source] | None:
        """The linear outputs that a node is an elementwise function of; None if it is of anything else."""
        if not isinstance(node, fx.Node) or self._is_setting(node):
            return frozenset()
        if node not in self._sources:
            self._sources[node] = None
            found = self._source(node)
            if node in self.writers:
                pass  # parts of it come from elsewhere
            elif found is not None:
                self._sources[node] = frozenset([found])
            elif node.op == "get_attr":
                value = operator.attrgetter(node.target)(self.root)
                self._sources[node] = frozenset() if isinstance(value, Tensor) and value.ndim <= 1 else None
            elif self._is_elementwise(node):
                parts = [self.sources(argument) for argument in node.all_input_nodes]
                self._sources[node] = None if None in parts else frozenset().union(*parts)
        return self._sources[node]

    def _bend(self, node: Any) -> int:
        """How far an elementwise expression of one source is from a multiple of it.

        0: it is one. 1: it is clamped. 2: it is bent evenly to both sides, like tanh, as a soft clamp is. 3: it is bent
        like an activation.
        """
        if not isinstance(node, fx.Node) or self._source(node) is not None or not self.sources(node):
            return 0
        inner = max((self._bend(argument) for argument in node.all_input_nodes), default=0)
        if self._is_passive(node):
            return inner
        if node.op != "call_module":
            if node.target in _CLAMPS:
                bounds = [*node.args[1:], *node.kwargs.values()]
                return 3 if 0 in [bound for bound in bounds if not isinstance(bound, fx.Node)] else max(inner, 1)
            if node.target in _PRODUCTS | _AFFINE:
                several = sum(bool(self.sources(argument)) for argument in node.all_input_nodes) > 1
                return 3 if several and node.target in _PRODUCTS else inner
            return max(inner, 2) if node.target in (torch.tanh, F.tanh, "tanh") else 3
        return max(inner, 2) if _is_odd(self._module(node)) else 3

    def _source_nodes(self, node: fx.Node) -> list[fx.Node]:
        """The nodes at which `sources` stopped."""
        if self._source(node) is not None:
            return [node]
        if self._is_setting(node):
            return []
        nodes = [found for argument in node.all_input_nodes for found in self._source_nodes(argument)]
        return list(dict.fromkeys(nodes))

    def _factors(self, node: fx.Node) -> list[fx.Node]:
        """The largest parts of a product that depend on one linear layer each, or on none."""
        sources = self.sources(node)
        if sources is not None and len(sources) == 1:
            return [node]
        if self._is_passive(node):
            return self._factors(node.all_input_nodes[0])
        if node.op in ("call_function", "call_method") and node.target in _PRODUCTS and not self._lacks_operand(node):
            return [factor for argument in node.all_input_nodes for factor in self._factors(argument)]
        return [node]

    def refutes(self, first: str, second: str) -> bool:
        """Whether two linear layers are no MLP for certain: both are in the flow, and what is between them is known.

        It is not enough that no MLP was found: a step that is not understood may be an activation function.
        """
        ends = [(node, *self._projection(node)) for node in self.nodes]
        ends = [(node, value) for node, name, value in ends if name == second]
        if not ends or first not in self.linears:
            return False
        return all(not isinstance(value, fx.Node) or self._is_no_post(value, first, node) for node, value in ends)

    def _is_no_post(self, value: fx.Node, first: str, down: fx.Node) -> bool:
        alone = {source for factor in self._factors(value) for source in self.sources(factor) or ()}
        bent = any(self._bend(factor) for factor in self._factors(value))
        return not self._reaches(value, first, down, False, set()) and not (bent and len(alone) > 1)

    def _reaches(
        self, node: fx.Node, first: str, reader: fx.Node, unknown: bool, seen: set[tuple[fx.Node, fx.Node, bool]]
    ) -> bool:
        """Whether a linear layer's output reaches a node on a way that has a step which is not understood.

        What has been written into the node by the time of its reader is on the way, and not understood.
        """
        if (node, reader, unknown) in seen or self._is_setting(node):
            return False
        seen.add((node, reader, unknown))
        writers = [writer for writer in self.writers.get(node, ()) if self.places[writer] < self.places[reader]]
        if self._projection(node)[0] == first:
            return unknown or bool(writers)
        if node.op == "call_module":
            module = self._module(node)
            if features(module) is not None or isinstance(module, nn.modules.conv._ConvNd) or self.explained(module):
                return False
        known = self._is_elementwise(node) or self._source(node) is not None or _is_norm(node, self.root)
        known |= self._lacks_operand(node) or node.op in ("placeholder", "get_attr")
        unknown |= not known or bool(writers)
        if any(
            self._reaches(value, first, writer, True, seen) for writer in writers for value in writer.all_input_nodes
        ):
            return True
        later = reader if _is_view(node) else node  # a view shows what is written later, too
        return any(self._reaches(argument, first, later, unknown, seen) for argument in node.all_input_nodes)

    # --- MLPs ---

    def layout(self, down: str, value: Any) -> MLPLayout | None:
        """The MLP whose down projection is given with its input; None if there is none to be told for certain."""
        try:
            return self._layout(down, value)
        except _NotElementwise:
            return None

    def _layout(self, down: str, value: Any) -> MLPLayout | None:
        if not isinstance(value, fx.Node) or self.calls.get(down, 1) != 1 or self._weighs(down):
            return None
        core = value
        while self._is_passive(core) or _is_norm(core, self.root):
            core = core.all_input_nodes[0]
        normed = any(_is_norm(node, self.root) for node in self._between(value, core))
        factors = self._factors(core)
        sided = [(factor, self.sources(factor)) for factor in factors]
        mine = [(factor, next(iter(sources))) for factor, sources in sided if sources]
        others = [factor for factor, sources in sided if not sources]
        if any(sources is not None and len(sources) > 1 for _, sources in sided):
            return None
        if len(mine) == 1 and not others:
            return self._ungated(down, value, core, normed, *mine[0])
        if len(mine) != 2 or mine[0][1] == mine[1][1]:
            return None
        bends = [self._bend(factor) for factor, _ in mine]
        if max(bends) < 2 or bends[0] == bends[1]:
            return None
        (gate, pre), (other, up) = mine if bends[0] > bends[1] else reversed(mine)
        pre_nodes, up_nodes = self._source_nodes(gate), self._source_nodes(other)
        if len(pre_nodes) != 1 or len(up_nodes) != 1:
            return None
        named = {gate: "gate", up_nodes[0]: "up", **dict.fromkeys(others, "other")}
        plain = other is up_nodes[0] and core.target in _PRODUCTS and set(core.args) == {gate, other}
        common = {
            "down": down,
            "activation": self._activation(gate, pre_nodes[0]),
            "function": self.expression(gate, {pre_nodes[0]: "pre"}),
            "product": self._beyond(value, core, named) if plain else self.expression(value, named),
            "parameters": not self._is_module(down),
            "normed": normed,
        }
        if self.calls.get(pre.name, 1) != 1 or self.calls.get(up.name, 1) != 1:
            return None
        if pre.part is None and up.part is None:
            return MLPLayout(gate=pre.name, up=up.name, **common)
        if pre.name != up.name or (pre.part, up.part) not in SPLITS:
            return None
        return MLPLayout(fused=pre.name, split=SPLITS[pre.part, up.part], **common)

    @staticmethod
    def _between(last: fx.Node, first: fx.Node) -> list[fx.Node]:
        """The nodes of a chain of single steps, from its end to its beginning, which is left out."""
        chain = []
        while last is not first:
            chain.append(last)
            last = last.all_input_nodes[0]
        return chain

    def _ungated(
        self, down: str, value: fx.Node, gate: fx.Node, normed: bool, factor: fx.Node, source: _Source
    ) -> MLPLayout | None:
        nodes = self._source_nodes(factor)
        if source.part is not None or len(nodes) != 1 or self._bend(factor) < 2 or self.calls.get(source.name, 1) != 1:
            return None
        return MLPLayout(
            down=down,
            activation=self._activation(gate, nodes[0]),
            function=self.expression(gate, {nodes[0]: "pre"}),
            gate=source.name,
            product=self._beyond(value, gate, {gate: "gate"}),
            parameters=not self._is_module(down),
            normed=normed,
        )

    def _beyond(self, value: fx.Node, core: fx.Node, inputs: Mapping[fx.Node, str]) -> Expression | None:
        """The computation of a node, if there is more to it than another node and dropouts."""
        same = all(self._is_identity(node) for node in self._between(value, core))
        return None if same else self.expression(value, inputs)

    def _weighs(self, down: str) -> bool:
        """Whether a projection's output is squashed, as weights for something else are: it is no MLP of the block."""
        ends = [node for node in self.nodes if self._projection(node)[0] == down]
        users = [user for node in ends for user in node.users]
        return any(
            user.target in _SQUASHING
            or (user.op == "call_module" and isinstance(self._module(user), _SQUASHING_MODULES))
            for user in users
        )

    def _is_module(self, name: str) -> bool:
        return name in self.calls

    def _activation(self, gate: fx.Node, pre: fx.Node) -> str | None:
        """Name of the module that alone makes gate of pre, if it is called once."""
        alone = gate.op == "call_module" and list(gate.args) == [pre] and not gate.kwargs
        return gate.target if alone and self.calls[gate.target] == 1 else None

    def expression(self, node: fx.Node, inputs: Mapping[fx.Node, str]) -> Expression:
        """The computation of a node from the given nodes."""
        steps: list[Step] = []
        places: dict[fx.Node, Value] = {given: Value(name) for given, name in inputs.items()}

        def setting_of(owner: fx.Node) -> Value:
            """Whose dtype or device it is: that of the projection's output where the owner itself is not at hand."""
            if owner in places:
                return places[owner]
            known = [name for name in ("up", "pre") if name in inputs.values()]
            if not known:
                raise _NotElementwise
            return Value(known[0])

        def visit(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                if argument not in places and argument.op in ("placeholder", "output"):
                    raise _NotElementwise
                if argument not in places and self._is_identity(argument):
                    places[argument] = visit(argument.all_input_nodes[0])
                elif argument not in places and self._is_setting(argument):
                    steps.append(Step("function", getattr, (setting_of(argument.args[0]), argument.args[1])))
                    places[argument] = Value(len(steps) - 1)
                elif argument not in places:
                    arguments = tuple(visit(value) for value in argument.args)
                    keywords = tuple((name, visit(value)) for name, value in argument.kwargs.items())
                    how = "attribute" if argument.op == "get_attr" else argument.op.removeprefix("call_")
                    steps.append(Step(how, argument.target, arguments, keywords))
                    places[argument] = Value(len(steps) - 1)
                return places[argument]
            return tuple(visit(value) for value in argument) if isinstance(argument, list | tuple) else argument

        visit(node)
        return Expression(tuple(steps))


def _is_view(node: fx.Node) -> bool:
    """Whether what is written into a node may be seen in the one that it was made of."""
    if node.target is getattr:
        return node.args[1] in ("T", "mT", "H", "mH", "data")
    if node.target is operator.getitem:
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in _VIEWS


def _is_norm(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node is a normalisation: what comes after one is no longer a neuron's own number."""
    return node.op == "call_module" and "norm" in type(root.get_submodule(node.target)).__name__.lower()


def _items(value: Any) -> tuple | list:
    return value if isinstance(value, list | tuple) else ()


def follow_gating(experts: nn.Module, projection: str, down: str, width: int) -> MLPLayout | None:
    """The layout of experts whose method ``_apply_gate`` makes ``post`` of the output of a fused projection.

    Args:
        experts: module that holds all experts as 3-D parameters, the way of ``use_experts_implementation``.
        projection: name of the fused parameter.
        down: name of the other.
        width: number of neurons of one expert.
    """
    flows = follow(experts, lambda module: False, lambda module: False, "_apply_gate")
    if not flows:
        return None
    flow = flows[0]
    places = [node for node in flow.nodes if node.op == "placeholder"]
    results = [node for node in flow.nodes if node.op == "output"]
    if len(places) != 1 or not isinstance(results[0].args[0], fx.Node):
        return None
    flow.given[places[0]] = _Source(projection, 2 * width)
    return flow.layout(down, results[0].args[0])


class _Probe(nn.Module):
    """Stands in for a linear layer: small, with random weights, and remembers what went through it."""

    def __init__(self, inside: int, outside: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outside, inside, generator=generator), requires_grad=False)
        self.noise = torch.randn(outside, generator=generator)
        self.moved = False

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.input, self.output = input, F.linear(input, self.weight) + (self.noise if self.moved else 0)
        return self.output


class _Watch(nn.Module):
    """Stands in for an activation module, and remembers what it gave."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.outputs = inner, []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = type(self.inner).forward(self.inner, *args, **kwargs)
        self.outputs.append(output)
        return output


def probe(module: nn.Module) -> MLPLayout | None:
    """The gated MLP that a module is, told by trying it out where its ``forward`` cannot be followed.

    Its three linear layers are replaced, in a copy, by small random ones, and the copy is run. The layout is certain:
    the input of one layer is the product of another's output and the activation module's, and the third feeds that
    module (not necessarily alone: what the activation module gets is ``pre``). None if that is not what is seen.
    """
    children = dict(module.named_children())
    sizes = {name: features(child) for name, child in children.items() if features(child) is not None}
    free = {name: child for name, child in children.items() if name not in sizes}
    plain = all(not any(True for _ in child.parameters()) for child in free.values())
    hidden = {min(size) for size in sizes.values()} | {max(size) for size in sizes.values()}
    if len(sizes) != 3 or len(hidden) != 2 or not plain or any(_matrix(p) for p in module.parameters(recurse=False)):
        return None
    small = dict(zip(sorted(hidden), (6, 16), strict=True))
    down = [name for name, size in sizes.items() if list(sizes.values()).count(size) == 1]
    if len(down) != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    stand_ins: dict[str, nn.Module] = {n: _Probe(small[i], small[o], generator) for n, (i, o) in sizes.items()}
    stand_ins |= {name: _Watch(child) for name, child in free.items()}
    clone = copy.copy(module)
    clone.__dict__ = {**module.__dict__, "_modules": stand_ins, "_forward_hooks": {}, "_forward_pre_hooks": {}}
    clone.__dict__.pop("forward", None)
    first = [name for name in sizes if name != down[0]]
    start = torch.randn(2, 5, stand_ins[first[0]].weight.shape[1], generator=generator)
    try:
        with torch.no_grad():
            seen = []
            for moved in (None, *first):
                for name in first:
                    stand_ins[name].moved = name == moved
                for child in free:
                    stand_ins[child].outputs.clear()
                type(module).forward(clone, start)
                gates = {name: stand_ins[name].outputs[0] for name in free if len(stand_ins[name].outputs) == 1}
                outputs = {name: stand_ins[name].output for name in first}
                seen.append((gates, outputs, stand_ins[down[0]].input))
    except Exception:  # it needs more than one tensor
        return None
    gates, outputs, post = seen[0]
    found = [(g, u) for g, gate in gates.items() for u, up in outputs.items() if torch.equal(gate * up, post)]
    if len(found) != 1:
        return None
    activation, up = found[0]
    gate = next(name for name in first if name != up)
    changed = {name: not torch.equal(seen[first.index(name) + 1][0][activation], gates[activation]) for name in first}
    if not changed[gate] or changed[up]:
        return None
    return MLPLayout(down=down[0], activation=activation, gate=gate, up=up)


def _matrix(parameter: Tensor) -> bool:
    return parameter.ndim >= 2
