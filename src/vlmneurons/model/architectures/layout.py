"""What an MLP is made of: plain values that name modules, and know nothing of models."""

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from jaxtyping import Float
from torch import Tensor, nn

from vlmneurons.errors import ArchitectureError, SiteError
from vlmneurons.neurons.sites import KINDS, Site


@dataclass(frozen=True)
class Step:
    """One operation of an `Expression`: ``target`` applied to earlier values.

    Attributes:
        operation: ``"function"``, ``"method"``, ``"module"`` or ``"attribute"``.
        target: the function, the name of the method, or that of the module or attribute, relative to the MLP.
        arguments: each a constant, or a `Value`.
        keywords: pairs of a name and such an argument.
    """

    operation: str
    target: Callable | str
    arguments: tuple = ()
    keywords: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Value:
    """A value that an `Expression` computes with: an input (``"gate"``) or the result of an earlier step (a number)."""

    of: str | int


def _values(arguments: object) -> Iterator[Value]:
    """Every `Value` among the arguments of a step, in tuples too."""
    if isinstance(arguments, Value):
        yield arguments
    elif isinstance(arguments, tuple):
        for argument in arguments:
            yield from _values(argument)


@dataclass(frozen=True)
class Expression:
    """An elementwise computation of the MLP, kept so that it can be repeated on other values, bit for bit.

    It names modules and looks them up in the MLP it is called with. So it is equal for MLPs that compute alike.
    """

    steps: tuple[Step, ...]

    def __call__(self, module: nn.Module, **inputs: Tensor | None) -> Tensor:
        results: list[Any] = []

        def value(argument: object) -> Any:
            if isinstance(argument, Value):
                return inputs[argument.of] if isinstance(argument.of, str) else results[argument.of]
            return tuple(map(value, argument)) if isinstance(argument, tuple) else argument

        for step in self.steps:
            arguments = [value(argument) for argument in step.arguments]
            keywords = {name: value(argument) for name, argument in step.keywords}
            if not isinstance(step.target, str):
                results.append(step.target(*arguments, **keywords))
            elif step.operation == "method":
                results.append(getattr(arguments[0], step.target)(*arguments[1:], **keywords))
            elif step.operation == "attribute":
                results.append(operator.attrgetter(step.target)(module))
            else:  # forward, not a call: nobody else's hooks should see a repetition
                results.append(module.get_submodule(step.target).forward(*arguments, **keywords))
        return results[-1]

    @property
    def inputs(self) -> frozenset[str]:
        """The names of its inputs."""
        values = (value for step in self.steps for value in _values((step.arguments, step.keywords)))
        return frozenset(value.of for value in values if isinstance(value.of, str))

    def __str__(self) -> str:
        results: list[str] = []

        def text(argument: object) -> str:
            if isinstance(argument, Value):
                return argument.of if isinstance(argument.of, str) else results[argument.of]
            return f"{argument:g}" if isinstance(argument, float) else str(argument)

        for step in self.steps:
            name = step.target if isinstance(step.target, str) else getattr(step.target, "__name__", str(step.target))
            texts = [text(argument) for argument in step.arguments]
            texts += [f"{key}={text(value)}" for key, value in step.keywords if value is not None]
            if name in _SYMBOLS and len(texts) == 2:
                infix = f"{texts[0]} {_SYMBOLS[name]} {texts[1]}"
                results.append(infix if name == "mul" else f"({infix})")
            else:
                results.append(name if step.operation == "attribute" else f"{name}({', '.join(texts)})")
        return results[-1]


_SYMBOLS = {"mul": "*", "add": "+", "sub": "-", "truediv": "/"}

SPLITS: dict[tuple[str | None, str | None], str] = {
    ("first", "second"): "gate_up",
    ("second", "first"): "up_gate",
    ("even", "odd"): "interleaved",
    ("odd", "even"): "interleaved_up",
}


@dataclass(frozen=True)
class SitePlace:
    """Where the model shows the values of a site.

    Attributes:
        module: a module's name, relative to the MLP.
        end: ``"input"`` (its first) or ``"output"``.
        columns: which columns of it are the site's; None for all of them.
        computed: whether ``gate`` is a function of what is there, and has no module of its own.
    """

    module: str
    end: Literal["input", "output"]
    columns: slice | None = None
    computed: bool = False

    def part(self, values: Float[Tensor, "... column"]) -> Float[Tensor, "... neuron"]:
        """The site's columns of the activations at that place: a view.

        Args:
            values: what the model has there.
        """
        return values if self.columns is None else values[..., self.columns]


@dataclass(frozen=True)
class MLPLayout:
    """How one MLP computes. Names are those of modules relative to the MLP module; equal for MLPs built alike.

    Attributes:
        down: the projection whose *input* is the site ``post``.
        activation: the activation module, whose input is ``pre`` and whose output is ``gate``. None if there is none
            of this MLP's own that is called once per forward: then ``gate`` is ``gate_of(module, pre)``, bit for bit.
        function: what computes ``gate`` from ``pre`` (see `gate_of`); also where `activation` is given. A plain
            function of one tensor may be given, and is kept as an `Expression`.
        gate: the projection whose output is ``pre``; None where it is fused.
        up: the projection whose output is ``up``; None for an MLP without one (there ``post == gate``), or fused.
        fused: a projection whose output holds ``pre`` and ``up`` both, as `split` says.
        split: ``"gate_up"`` or ``"up_gate"`` (two halves, in this order), ``"interleaved"`` (gate at even places),
            ``"interleaved_up"`` (up at even places); None where nothing is fused.
        product: computes ``post`` from ``gate`` and ``up`` (from ``gate`` alone in an ungated MLP); None if it is
            ``gate * up``, or ``gate``, and nothing else. A plain function of these tensors may be given, and is kept as
            an `Expression`. What is found by itself may also depend on ``other`` values of the forward, such as
            a router's weight; then `post_of` cannot repeat it.
        parameters: the projections are parameters of the MLP module, not modules of their own: one slice of the first
            axis for each expert.
        normed: a normalisation stands between ``gate * up`` and ``post``, so a neuron of ``post`` depends on all others
            of ``gate``, and zeroing it there is another intervention than zeroing it at ``gate``.
    """

    down: str
    activation: str | None = None
    function: Callable | None = None
    gate: str | None = None
    up: str | None = None
    fused: str | None = None
    split: str | None = None
    product: Callable | None = None
    parameters: bool = False
    normed: bool = False

    def __post_init__(self) -> None:
        if self.function is None and self.activation is not None:
            object.__setattr__(self, "function", Expression((Step("module", self.activation, (Value("pre"),)),)))
        for name, purpose, inputs in (
            ("function", "gate from pre, such as F.silu", ("pre",)),
            ("product", "post from gate and up", ("gate", "up") if self.gated else ("gate",)),
        ):
            compute = getattr(self, name)
            if compute is None or isinstance(compute, Expression):
                continue
            if not callable(compute):
                raise ArchitectureError(f"{name}= computes {purpose}; got {compute!r}")
            object.__setattr__(self, name, Expression((Step("function", compute, tuple(map(Value, inputs))),)))
        if (self.gate is None) == (self.fused is None):
            raise ArchitectureError("an MLPLayout names the projection before its activation: give gate=, or fused=")
        if (self.fused is None) != (self.split is None) or self.split not in (None, *SPLITS.values()):
            raise ArchitectureError(f"fused= goes with split=, one of {', '.join(SPLITS.values())}")
        for name in ("down", "activation", "gate", "up", "fused"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value) and (value is not None or name == "down"):
                raise ArchitectureError(f"{name}= is the name of a module within the MLP; got {value!r}")
        if self.function is None:
            raise ArchitectureError("an MLPLayout needs activation= (name of a module), or function= (such as F.silu)")

    @property
    def first(self) -> str:
        """The projection before the activation: ``gate``, or ``fused``."""
        return self.fused or self.gate or ""

    @property
    def gated(self) -> bool:
        """Whether there is an ``up`` branch."""
        return self.up is not None or self.fused is not None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of site that such an MLP has."""
        return KINDS if self.gated else ("pre", "gate", "post")

    def gate_of(self, module: nn.Module, pre: Float[Tensor, "... neuron"]) -> Float[Tensor, "... neuron"]:
        """``gate`` computed from ``pre`` by the model's own operations: equal to the model's bit for bit.

        Args:
            module: the MLP.
            pre: what the activation is of.

        Raises:
            ArchitectureError: ``gate`` depends on more than its neuron of ``pre``.
        """
        function = cast(Expression, self.function)  # as __post_init__ left it
        if "other" in function.inputs:
            raise ArchitectureError(f"gate = {function} depends on more than pre, and cannot be repeated")
        return function(module, pre=pre)

    def post_of(
        self, module: nn.Module, gate: Float[Tensor, "... neuron"], up: Float[Tensor, "... neuron"] | None = None
    ) -> Float[Tensor, "... neuron"]:
        """``post`` computed from ``gate`` (and ``up``, where there is one) by the model's own operations.

        Args:
            module: the MLP.
            gate: the activations.
            up: the other branch; None for an MLP without one.

        Raises:
            ArchitectureError: ``post`` depends on more than these.
        """
        if not self.repeatable:
            raise ArchitectureError(f"post = {self.product} depends on more than gate and up, and cannot be repeated")
        if self.product is not None:
            return self.product(module, gate=gate, up=up)
        return gate * cast(Tensor, up) if self.gated else gate

    @property
    def repeatable(self) -> bool:
        """Whether ``post`` is a function of ``gate`` and ``up`` alone."""
        return self.product is None or "other" not in cast(Expression, self.product).inputs

    def pre_and_up(
        self, outputs: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, "... neuron"], Float[Tensor, "... neuron"] | None]:
        """``pre`` and ``up`` (None for an MLP without one), taken from what the projections gave: activations.

        Args:
            outputs: the output of each projection that ran, by its name.
        """
        if self.fused is not None:
            return self.part(outputs[self.fused], "pre"), self.part(outputs[self.fused], "up")
        return outputs[self.first], outputs.get(self.up or "")

    def part(self, fused: Float[Tensor, "... both"], kind: str) -> Float[Tensor, "... neuron"]:
        """The view of a fused projection's output that is ``pre`` or ``up``.

        Args:
            fused: the output of the fused projection.
            kind: ``"pre"`` or ``"up"``.
        """
        return fused[..., self._columns(kind, fused.shape[-1] // 2)]

    def _columns(self, kind: str, width: int) -> slice:
        """Which columns of a fused projection's output are ``pre`` or ``up``."""
        first = (kind == "pre") == (self.split in ("gate_up", "interleaved"))
        if self.split in ("gate_up", "up_gate"):
            return slice(0, width) if first else slice(width, 2 * width)
        return slice(0 if first else 1, None, 2)

    def place(self, kind: str, width: int) -> SitePlace:
        """Where a site is: the one place that says so, for hooks, traces and remote runs.

        Args:
            kind: ``"pre"``, ``"gate"``, ``"up"`` or ``"post"``.
            width: number of neurons.
        """
        post_is_gate = not self.gated and self.product is None
        if kind == "post" or (kind == "gate" and self.activation is None and post_is_gate):
            return SitePlace(self.down, "input")
        if kind in ("pre", "gate") and self.activation is not None:
            return SitePlace(self.activation, "output" if kind == "gate" else "input")
        if self.fused is not None:
            columns = self._columns("up" if kind == "up" else "pre", width)
            return SitePlace(self.fused, "output", columns, kind == "gate")
        return SitePlace(self.up or "" if kind == "up" else self.first, "output", None, kind == "gate")


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
        expert: index within a module that holds all experts as 3-D parameters; None for an MLP with its own module.
        routed: whether it sees only the tokens that a router sends to it.
    """

    tower: str
    layer: int
    name: str
    path: str
    layout: MLPLayout
    width: int
    expert: int | None = None
    routed: bool = False

    def site(self, kind: str) -> Site:
        """The site of this MLP at a point of its computation.

        Args:
            kind: ``"pre"``, ``"gate"``, ``"up"`` or ``"post"``.

        Raises:
            SiteError: this MLP has no such point.
        """
        if kind not in self.layout.kinds:
            raise SiteError(
                f"{self.tower}.layers.{self.layer}.{self.name} has no {kind!r}; it has {', '.join(self.layout.kinds)}"
            )
        return Site(self.tower, self.layer, self.name, kind)

    def place(self, kind: str) -> SitePlace:
        """Where the values of one of its sites are.

        Args:
            kind: ``"pre"``, ``"gate"``, ``"up"`` or ``"post"``.

        Raises:
            SiteError: this MLP has no such point.
        """
        self.site(kind)
        return self.layout.place(kind, self.width)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Its sites, in the order in which they are computed."""
        kinds = sorted(self.layout.kinds, key=lambda kind: self.layout.fused is None or kind != "up")
        return tuple(Site(self.tower, self.layer, self.name, kind) for kind in kinds)


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
