"""What a module's ``forward`` computes, read as a data flow: which of its linear layers make up an MLP.

A flow is a list of steps, each made of earlier ones (`follow` gives it). It is read backwards. A reader starts at the
input of a linear layer, which may be ``post``, and goes over steps that treat each number on its own, until it meets
the outputs of other linear layers. If there are one or two of them, they may be ``pre`` and ``up``, and the steps
between are kept as an `Expression`. No number is computed.

Two questions are asked of each pair of linear layers. `Flow.layout` says that they are an MLP only if every step
between them is understood. `Flow.refutes` says that they are none only if every step is understood, too. A pair of
which neither can be said is a doubt, and the search refuses the model.
"""

import collections
import contextlib
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from vlmneurons.checks import Keywords
from vlmneurons.model.architectures.layout import SPLITS, Expression, MLPLayout, Step, Value
from vlmneurons.model.architectures.modules import Modules
from vlmneurons.model.architectures.operations import (
    AFFINE,
    BENDING,
    CLAMPS,
    ELEMENTWISE,
    MATMULS,
    PASSIVE,
    PRODUCTS,
    SQUASHING,
    TURNS,
    is_call,
    is_clamp_at_zero,
    is_view,
    lacks_operand,
    mixes_tokens,
    name_of,
)
from vlmneurons.model.architectures.symbols import follow, is_shape

_SQUASHING_MODULES = (nn.Sigmoid, nn.Softmax, nn.Tanh)


class _NotElementwise(Exception):
    """An expression that cannot be repeated from the values of a site alone."""


@dataclass(frozen=True)
class _Source:
    """Output of a linear layer, or a part of it: ``"first"``, ``"second"``, ``"even"`` or ``"odd"``."""

    name: str
    width: int
    part: str | None = None


class Flow:
    """The data flow of one module, asked for MLPs.

    Args:
        root: the module.
        graph: what its forward does.
        modules: answers about the modules inside.
        explained: tells of a module that is one step whether all its neurons are known, so that none passes through.
        fused: for a flow that begins between two projections: the first one's name, and the size of its output.

    Attributes:
        mlps: every MLP in the flow, and its number of neurons.
        mixed: the steps that give what is of several tokens.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        modules: Modules,
        explained: Callable[[nn.Module], bool],
        fused: tuple[str, int] | None = None,
    ) -> None:
        self.root, self.modules, self.explained = root, modules, explained
        self.nodes = list(graph.nodes)
        self.places = {node: place for place, node in enumerate(self.nodes)}
        self._begins = {node: _Source(*fused) for node in self.nodes if fused and node.op == "placeholder"}
        self._sources: dict[fx.Node, frozenset[_Source] | None] = {}
        self.writers = self._find_writers()
        self.projections = {node: end for node in self.nodes if (end := self._projection(node)) is not None}
        called = [node.target for node in self.nodes if node.op == "call_module" and node not in self.projections]
        self.mixed: set[fx.Node] = set()  # what is of several tokens, by steps that lead through no linear layer
        for node in self.nodes:
            mixes = mixes_tokens(node, self._is_weight) or not self.mixed.isdisjoint(node.all_input_nodes)
            if mixes and node not in self.projections:
                self.mixed.add(node)
        self.calls = collections.Counter([*called, *(name for name, _ in self.projections.values())])
        self.mlps = [mlp for name, value in self.projections.values() if (mlp := self.layout(name, value)) is not None]

    # --- what nodes are ---

    def _find_writers(self) -> dict[fx.Node, list[fx.Node]]:
        """For each value, the steps that write into it though it is used elsewhere too.

        Such a value is not what the step that made it says. Where only the result of a write is used, as in
        ``h = h.relu_()``, nothing is hidden: the result might as well be a new tensor.
        """
        writers: dict[fx.Node, list[fx.Node]] = {}
        for node in self.nodes:
            value = self._written(node)
            while isinstance(value, fx.Node):  # a write into a view is one into what it is a view of
                used = any(
                    self.places[user] > self.places[node] or is_view(user) for user in value.users if user is not node
                )
                if used or node.target is operator.setitem:
                    writers.setdefault(value, []).append(node)
                value = value.args[0] if is_view(value) and value.args else None
        return writers

    def _written(self, node: fx.Node) -> Any:
        """The value that a step writes into, if it does."""
        if node.kwargs.get("out") is not None:
            return node.kwargs["out"]
        writes = node.target is operator.setitem
        if node.op == "call_module":
            writes = getattr(self._module(node), "inplace", False) is True
        elif is_call(node) and not writes:
            writes = name_of(node).endswith("_") and not name_of(node).endswith("__")
            if callable(node.target) and getattr(node.target, "__module__", None) == F.__name__:
                with contextlib.suppress(TypeError, ValueError):  # it declares no arguments
                    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
                    writes |= bound.get("inplace") is True
        return node.args[0] if writes and node.args else None

    def _module(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(str(node.target))

    def _character(self, node: fx.Node) -> str:
        """What a step that is a module does; that of other steps is in the sets of `operations`."""
        return self.modules.character(self._module(node)) if node.op == "call_module" else "no module"

    def _held(self, node: fx.Node) -> Any:
        """The parameter or buffer that a node is; None for one that is none, or that the module does not hold."""
        try:
            return operator.attrgetter(str(node.target))(self.root) if node.op == "get_attr" else None
        except AttributeError:  # a tensor made on the way
            return None

    def _parameter(self, node: Any) -> tuple[str, nn.Parameter] | None:
        """Name and value of the parameter that a node is, seen through transpositions."""
        while isinstance(node, fx.Node) and _is_turn(node):
            node = node.args[0]
        value = self._held(node) if isinstance(node, fx.Node) else None
        return (str(node.target), value) if isinstance(value, nn.Parameter) else None

    def _is_weight(self, node: fx.Node) -> bool:
        """Whether a node is a parameter, a buffer or a constant, or a view of one."""
        while (is_view(node) or node.target in PASSIVE) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node.op == "get_attr"

    def _projection(self, node: fx.Node) -> tuple[str, Any] | None:
        """Name and input of a linear layer, or of a product with a parameter of two axes or more; None for others."""
        operands = [*node.args, *node.kwargs.values()]
        if node.op == "call_module" and operands and self.modules.size(self._module(node)) is not None:
            return str(node.target), operands[0]
        if node.target in MATMULS and len(operands) >= 2:
            parameter = self._parameter(operands[1])
            if parameter is not None and parameter[1].ndim in (2, 3):
                return parameter[0], operands[0]
        return None

    def _source(self, node: fx.Node) -> _Source | None:
        """The part of a linear layer's output that a node is, if it is one."""
        if node in self._begins:
            return self._begins[node]
        if node in self.projections:
            name, _ = self.projections[node]
            if node.op == "call_module":
                size = self.modules.size(self._module(node))
                return None if size is None else _Source(name, size[1])
            # A product with [expert, in, out]; `F.linear`, and a transposition before it, take [expert, out, in].
            operand = [*node.args, *node.kwargs.values()][1]
            turns = (node.target is F.linear) + _is_turn(operand)
            return _Source(name, operator.attrgetter(name)(self.root).shape[-2 if turns == 1 else -1])
        if node.op != "call_function" or node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
            return None
        base, index = node.args[0], node.args[1]
        return self._chunk(base, index) if isinstance(index, int) else self._slice(base, index)

    def _slice(self, base: fx.Node, index: object) -> _Source | None:
        """The half of a linear layer's output that ``[..., :half]``, ``[..., ::2]`` and their like give."""
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
        name = name_of(base)
        if not is_call(base) or name not in ("chunk", "split", "tensor_split"):
            return None
        operands: dict[str, Any] = dict(zip(("input", "sizes", "dim"), base.args))
        for key, value in base.kwargs.items():
            operands["dim" if key == "dim" else "input" if key in ("input", "tensor") else "sizes"] = value
        whole = self._source(operands["input"]) if isinstance(operands.get("input"), fx.Node) else None
        if whole is None or whole.part is not None or operands.get("dim") != -1 or index not in (0, 1, -1, -2):
            return None
        half, sizes = whole.width // 2, operands.get("sizes")
        in_two = sizes in (half, [half, half], (half, half)) if name == "split" else sizes == 2
        return _Source(whole.name, whole.width, "first" if index in (0, -2) else "second") if in_two else None

    def _is_elementwise(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return self._character(node) in ("same", "affine", "odd", "bent")
        return is_call(node) and node.target in ELEMENTWISE and not lacks_operand(node)

    def _is_passive(self, node: fx.Node) -> bool:
        """Whether a node hands its numbers on, in another dtype perhaps."""
        casts = node.op != "call_module" and node.target in PASSIVE and bool(node.all_input_nodes)
        return casts or self._is_identity(node)

    def _is_identity(self, node: fx.Node) -> bool:
        """Whether a node hands its input on unchanged in evaluation: a dropout, a dropped path."""
        return bool(node.all_input_nodes) and (self._character(node) == "same" or node.target is F.dropout)

    def _is_norm(self, node: fx.Node) -> bool:
        """Whether a node is a normalisation: what comes after one is no longer a neuron's own number."""
        return bool(node.all_input_nodes) and self._character(node) == "norm"

    # --- what nodes depend on ---

    def sources(self, node: object) -> frozenset[_Source] | None:
        """The linear outputs that a node is an elementwise function of; None if it is of anything else."""
        if not isinstance(node, fx.Node) or _is_setting(node):
            return frozenset()
        if node not in self._sources:
            self._sources[node] = None  # and so it stays if something is written into it
            source = self._source(node)
            if node in self.writers:
                pass
            elif source is not None:
                self._sources[node] = frozenset([source])
            elif node.op == "get_attr":
                value = self._held(node)
                self._sources[node] = frozenset() if isinstance(value, Tensor) and value.ndim <= 1 else None
            elif self._is_elementwise(node):
                parts = [self.sources(argument) for argument in node.all_input_nodes]
                self._sources[node] = None if None in parts else frozenset().union(*filter(None, parts))
        return self._sources[node]

    def _bend(self, node: object) -> int:
        """How far an elementwise expression of one source is from a multiple of it.

        0: it is a multiple. 1: it is clamped. 2: it is an odd function, such as tanh, which may be a soft clamp. 3: it
        is bent like an activation.
        """
        if not isinstance(node, fx.Node) or self._source(node) is not None or not self.sources(node):
            return 0
        inner = max((self._bend(argument) for argument in node.all_input_nodes), default=0)
        if node.op == "call_module":
            return max(inner, {"same": 0, "affine": 0, "odd": 2}.get(self._character(node), 3))
        if self._is_passive(node):
            return inner
        if node.target in CLAMPS:
            return 3 if is_clamp_at_zero(node) else max(inner, 1)
        if node.target in PRODUCTS | AFFINE:
            operands = (*node.args, *node.kwargs.values())  # x * x has two
            several = sum(bool(self.sources(operand)) for operand in operands) > 1
            return 3 if several and node.target in PRODUCTS else inner
        return max(inner, 2) if node.target in (torch.tanh, F.tanh, "tanh") else 3

    def _source_nodes(self, node: fx.Node) -> list[fx.Node]:
        """The nodes at which `sources` stopped."""
        if self._source(node) is not None:
            return [node]
        if _is_setting(node):
            return []
        return list(dict.fromkeys(end for argument in node.all_input_nodes for end in self._source_nodes(argument)))

    def _factors(self, node: fx.Node) -> list[fx.Node]:
        """The largest parts of a product that depend on one linear layer each, or on none."""
        sources = self.sources(node)
        if sources is not None and len(sources) == 1:
            return [node]
        if self._is_passive(node):
            return self._factors(node.all_input_nodes[0])
        if is_call(node) and node.target in PRODUCTS and not lacks_operand(node):
            return [factor for argument in node.all_input_nodes for factor in self._factors(argument)]
        return [node]

    # --- what is no MLP ---

    def _is_bent(self, node: fx.Node) -> bool:
        """Whether a step is an activation function, or part of one."""
        return node.target in BENDING or self._character(node) in ("odd", "bent")

    def ends_straight(self) -> bool:
        """Whether no activation follows the flow's last linear layers.

        If one does, the module may be the first half of an MLP, whose last projection comes after the module.
        """
        visited: set[fx.Node] = set()

        def bent(node: fx.Node) -> bool:
            if node in visited or node in self.projections or mixes_tokens(node, self._is_weight):
                return False
            visited.add(node)
            return self._is_bent(node) or any(map(bent, node.all_input_nodes))

        return not any(bent(end) for node in self.nodes if node.op == "output" for end in node.all_input_nodes)

    def refutes(self, first: str, second: str, strict: bool = False) -> bool:
        """Whether two linear layers are certainly no MLP: both are in the flow, and each step between is understood.

        It is not enough that no MLP was found: a step that is not understood may be an activation function.

        Args:
            first: name of the layer whose output would be ``pre``.
            second: name of the layer whose input would be ``post``.
            strict: whether an activation between them is enough for a doubt. Without it, a layer whose activation is
                multiplied by something given from outside (a mask, an embedding of the layer) is not taken for an MLP.
        """
        inputs = {node: value for node, (name, value) in self.projections.items() if name == second}
        if not inputs or not any(name == first for name, _ in self.projections.values()):
            return False
        if any(self.modules.bends_itself(self.root.get_submodule(name)) for name in (first, second)):
            return False  # the activation is inside of a layer, and cannot be told from it
        return all(
            not isinstance(value, fx.Node) or self._is_no_post(value, first, down, strict)
            for down, value in inputs.items()
        )

    def _is_no_post(self, value: fx.Node, first: str, down: fx.Node, strict: bool) -> bool:
        # By now we know that `layout` did not take this for an MLP. A product of several layers' outputs of which some
        # are bent may still be one, with two gates say, so it is not dismissed.
        factors = self._factors(value)
        sources = {source for factor in factors for source in self.sources(factor) or ()}
        if len(sources) > 1 and any(self._bend(factor) for factor in factors):
            return False
        return not self._may_hide(value, first, down, strict)

    def _may_hide(self, value: fx.Node, first: str, down: fx.Node, bends: bool) -> bool:
        """Whether a linear layer's output reaches a value by a step that is not understood.

        Args:
            value: the input of another linear layer.
            first: name of the linear layer.
            down: where that input is used.
            bends: whether an activation on the way is enough.
        """
        visited: set[tuple[fx.Node, fx.Node, bool]] = set()

        def reaches(node: fx.Node, reader: fx.Node, unknown: bool) -> bool:
            """Whether the output reaches a node, as its reader sees it; ``unknown`` if a step after it already is."""
            if (node, reader, unknown) in visited or _is_setting(node) or is_shape(node):
                return False
            visited.add((node, reader, unknown))
            # What was written into the node before its reader came is on the way, too, and is not understood.
            writers = [writer for writer in self.writers.get(node, ()) if self.places[writer] < self.places[reader]]
            if node in self.projections:  # through another linear layer no number comes as it was
                return self.projections[node][0] == first and (unknown or bool(writers))
            # What attention gives is no token's own number; and what only weighs it, element by element, is no neuron.
            if mixes_tokens(node, self._is_weight) or (node.target in PRODUCTS and node in self.mixed):
                return False
            if node.op == "call_module":
                module = self._module(node)
                if isinstance(module, nn.modules.conv._ConvNd) or self.explained(module):
                    return False
            understood = self._is_elementwise(node) or self._source(node) is not None or self._is_norm(node)
            understood |= lacks_operand(node) or node.op in ("placeholder", "get_attr")
            unknown |= not understood or bool(writers) or (bends and self._is_bent(node))
            if any(reaches(argument, writer, True) for writer in writers for argument in writer.all_input_nodes):
                return True
            later = reader if is_view(node) else node  # a view shows what is written later, too
            return any(reaches(argument, later, unknown) for argument in node.all_input_nodes)

        return reaches(value, down, False)

    # --- MLPs ---

    def layout(self, down: str, value: object) -> tuple[MLPLayout, int] | None:
        """The MLP whose down projection has this input, and its width; None if there is none to be told for certain."""
        with contextlib.suppress(_NotElementwise):
            return self._layout(down, value)
        return None

    def _layout(self, down: str, value: object) -> tuple[MLPLayout, int] | None:
        if not isinstance(value, fx.Node) or self.calls[down] > 1 or self._weighs(down):
            return None
        # The down projection is called once, so its input is post; and no sigmoid follows, so its output is not used
        # as weights. Casts, dropouts and normalisations before it are passed over: they end at the core of post.
        core = value
        while self._is_passive(core) or self._is_norm(core):
            core = core.all_input_nodes[0]
        normed = any(self._is_norm(node) for node in _between(value, core))
        factors = self._factors(core)
        if any(len(self.sources(factor) or ()) > 1 for factor in factors):
            return None  # a sum of two layers' outputs: none of them is pre alone
        # Each factor is now an elementwise function of one layer's output, or of none: its own sources say so. With one
        # such branch this may be an ungated MLP, whose other factors must be weights (a scale, say). With two, of
        # different outputs, it may be a gated one. Three or more are nothing that we know.
        branches = [(factor, next(iter(sources))) for factor in factors if (sources := self.sources(factor))]
        others = [factor for factor in factors if not self.sources(factor)]
        parameters = {"parameters": not self._is_module(down), "normed": normed, "down": down}
        if len(branches) == 1 and all(map(self._is_weight, others)):
            return self._ungated(value, core, *branches[0], parameters)
        if len(branches) == 2 and branches[0][1] != branches[1][1]:
            return self._gated(value, core, branches, others, parameters)
        return None

    def _ungated(
        self, value: fx.Node, core: fx.Node, gate: fx.Node, source: _Source, common: Keywords
    ) -> tuple[MLPLayout, int] | None:
        if source.part is not None or self._bend(gate) < 2 or self.calls[source.name] > 1:
            return None
        product = self._product(value, core, gate is core, {gate: "gate"})
        return MLPLayout(gate=source.name, product=product, **self._gating(gate), **common), source.width

    def _gated(
        self,
        value: fx.Node,
        core: fx.Node,
        branches: list[tuple[fx.Node, _Source]],
        others: list[fx.Node],
        common: Keywords,
    ) -> tuple[MLPLayout, int] | None:
        # The gate is the branch that is bent more: a clamped or softly clamped one beside it is up. Two that are bent
        # alike cannot be told apart.
        bends = [self._bend(factor) for factor, _ in branches]
        if max(bends) < 2 or bends[0] == bends[1]:
            return None
        (gate, pre), (factor, up) = branches if bends[0] > bends[1] else branches[::-1]
        # A layer that is called twice has two outputs, of which a hook could not tell which is which.
        if self.calls[pre.name] > 1 or self.calls[up.name] > 1:
            return None
        ups = self._source_nodes(factor)
        inputs = {gate: "gate", **dict.fromkeys(ups, "up"), **dict.fromkeys(others, "other")}
        plain = factor in ups and core.target in PRODUCTS and set(core.args) == {gate, factor}
        common = {"product": self._product(value, core, plain, inputs), **self._gating(gate), **common}
        if pre.part is None and up.part is None:
            return MLPLayout(gate=pre.name, up=up.name, **common), pre.width
        if pre.name != up.name or (pre.part, up.part) not in SPLITS:
            return None
        return MLPLayout(fused=pre.name, split=SPLITS[pre.part, up.part], **common), pre.width // 2

    def _product(self, value: fx.Node, core: fx.Node, plain: bool, inputs: Mapping[fx.Node, str]) -> Expression | None:
        """What makes post of gate and up; None if that is a ``plain`` core with nothing but dropouts behind it."""
        plain &= all(self._is_identity(node) for node in _between(value, core))
        return None if plain else self.expression(value, inputs)

    def _gating(self, gate: fx.Node) -> Keywords:
        """How gate is made of pre: all of it as an expression, and the module that does it alone, if one does."""
        pres = self._source_nodes(gate)  # several steps may take one part of an output: these are the same numbers
        alone = gate.op == "call_module" and len(gate.args) == 1 and gate.args[0] in pres and not gate.kwargs
        activation = str(gate.target) if alone and self.calls[gate.target] == 1 else None
        return {"activation": activation, "function": self.expression(gate, dict.fromkeys(pres, "pre"))}

    def _weighs(self, down: str) -> bool:
        """Whether a projection's output is squashed, as weights for something else are: it is no MLP of the block."""
        users = [user for node, (name, _) in self.projections.items() if name == down for user in node.users]
        return any(
            user.target in SQUASHING
            or (user.op == "call_module" and isinstance(self._module(user), _SQUASHING_MODULES))
            for user in users
        )

    def _is_module(self, name: str) -> bool:
        return any(node.target == name for node in self.projections if node.op == "call_module")

    def expression(self, node: fx.Node, inputs: Mapping[fx.Node, str]) -> Expression:
        """The computation of a node from others, under the names that these have as its inputs."""
        steps: list[Step] = []
        places: dict[fx.Node, Value] = {start: Value(name) for start, name in inputs.items()}

        def setting_of(owner: Any) -> Value:
            """Whose dtype or device it is: that of the projection's output where the owner itself is not at hand."""
            if owner in places:
                return places[owner]
            projected = [name for name in ("up", "pre") if name in inputs.values()]
            if not projected:
                raise _NotElementwise
            return Value(projected[0])

        def visit(argument: object) -> Any:
            if isinstance(argument, fx.Node):
                if argument not in places and argument.op == "placeholder":
                    raise _NotElementwise  # it depends on what comes into the module, its length say
                if argument not in places and self._is_identity(argument):
                    places[argument] = visit(argument.all_input_nodes[0])
                elif argument not in places and _is_setting(argument):
                    steps.append(Step("function", getattr, (setting_of(argument.args[0]), argument.args[1])))
                    places[argument] = Value(len(steps) - 1)
                elif argument not in places:
                    arguments = tuple(visit(value) for value in argument.args)
                    keywords = tuple((name, visit(value)) for name, value in argument.kwargs.items())
                    if argument.op == "get_attr" and self._held(argument) is None:
                        raise _NotElementwise
                    operation = "attribute" if argument.op == "get_attr" else argument.op.removeprefix("call_")
                    steps.append(Step(operation, argument.target, arguments, keywords))
                    places[argument] = Value(len(steps) - 1)
                return places[argument]
            return tuple(visit(value) for value in argument) if isinstance(argument, list | tuple) else argument

        visit(node)
        return Expression(tuple(steps))


def _is_turn(node: object) -> bool:
    """Whether a node is the transposition of another."""
    if not isinstance(node, fx.Node):
        return False
    return (is_call(node) and node.target in TURNS) or (node.target is getattr and node.args[1] in ("mT", "T"))


def _is_setting(node: fx.Node) -> bool:
    """Whether a node is a property such as ``x.dtype``, which carries no numbers."""
    return node.target is getattr and node.args[1] in ("dtype", "device")


def _between(last: fx.Node, first: fx.Node) -> list[fx.Node]:
    """The nodes of a chain of single steps, from its end to its beginning, which is left out."""
    chain = []
    while last is not first:
        chain.append(last)
        last = last.all_input_nodes[0]
    return chain


def flows_of(
    module: nn.Module,
    modules: Modules,
    is_step: Callable[[nn.Module], bool],
    explained: Callable[[nn.Module], bool],
    *,
    everywhere: bool = False,
) -> list[Flow]:
    """The flows of a module's ``forward``: the first way that can be followed, or every one.

    Args:
        module: any module.
        modules: answers about the modules inside.
        is_step: tells of a module inside, other than a linear layer, whether it is to be taken as one step.
        explained: tells of such a module whether all its neurons are known.
        everywhere: whether to follow every way.
    """
    graphs = follow(module, lambda child: modules.size(child) is not None or is_step(child), everywhere=everywhere)
    return [Flow(module, graph, modules, explained) for graph in graphs]


def gating_of(experts: nn.Module, projection: str, down: str, width: int, modules: Modules) -> MLPLayout | None:
    """The layout of experts whose method ``_apply_gate`` makes ``post`` of the output of a fused projection.

    Args:
        experts: module that holds all experts as 3-D parameters, the way of ``use_experts_implementation``.
        projection: name of the fused parameter.
        down: name of the other.
        width: number of neurons of one expert.
        modules: answers about the modules inside.
    """
    for graph in follow(experts, lambda module: False, method="_apply_gate"):
        flow = Flow(experts, graph, modules, lambda module: False, (projection, 2 * width))
        results = [node.args[0] for node in flow.nodes if node.op == "output"]
        mlp = flow.layout(down, results[0])
        return None if mlp is None else mlp[0]
    return None
