"""Reading and writing a site of a model as it runs, by hooks of our own."""

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vlmneurons.errors import ArchitectureError
from vlmneurons.model.architectures.experts import Experts, Routing, Visitor
from vlmneurons.model.architectures.layout import MLP, MLPLayout


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


def read(hf_model: nn.Module, mlp: MLP, kind: str, callback: Callable[..., Any]) -> Handle:
    """Calls ``callback(values)`` whenever the model computes a site, with the values it computes: ``[..., neuron]``.

    The tensor is the model's own, or a view of it: a callback must not change it, and copies what it keeps.

    Args:
        hf_model: the model in which the MLP was found.
        mlp: one of its MLPs.
        kind: ``"pre"``, ``"gate"``, ``"up"`` or ``"post"``.
        callback: what it returns is ignored; what it raises stops the forward. For an MLP to which tokens are routed
            (``mlp.routed``) it is called as ``callback(values, tokens)``: values ``[row, neuron]``, and for each row
            the number of its token among all tokens that the layer sees (batch and sequence laid out in a row). It is
            not called where no token goes to the expert. `read_experts` serves all experts of a module at once.

    Code that ``torch.compile(model)`` made of a bare model before sees no hooks, and the model does not know of it:
    call the model itself meanwhile. (A `VLM` is seen by its hooks either way.)

    Raises:
        SiteError: the MLP has no such site.
        ArchitectureError: the model was compiled in place.
    """
    mlp.site(kind)
    _refuse_compiled(hf_model, mlp.path)
    layout, module = mlp.layout, hf_model.get_submodule(mlp.path)
    if layout.parameters:
        return Handle([_Removal(Experts.of(module, layout).add(Visitor(kind, mlp.expert, callback, False)))])
    handles = []
    if mlp.routed:
        routing, handles = _routing(hf_model, mlp)
        inner = callback

        def callback(values: Tensor) -> Any:
            return inner(values.flatten(0, -2), routing.tokens_of(module))

    name, where, value = _point(layout, module, kind)
    point = module.get_submodule(name)
    if where == "input":

        def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
            callback(_first(args, kwargs))

        return Handle([*handles, point.register_forward_pre_hook(before, with_kwargs=True)])

    def after(_: nn.Module, args: tuple, output: Tensor) -> None:
        callback(value(output))

    return Handle([*handles, point.register_forward_hook(after)])


def write(hf_model: nn.Module, mlp: MLP, kind: str, edit: Callable[..., Tensor | None]) -> Handle:
    """Lets ``edit(values)`` replace what the model goes on with, whenever it computes a site.

    Edits of one site act in the order in which they were put on, each on what the one before gave. An edit of ``pre``,
    ``gate`` or ``up`` is seen at every later point of the MLP.

    Args:
        hf_model: the model in which the MLP was found.
        mlp: one of its MLPs.
        kind: ``"pre"``, ``"gate"``, ``"up"`` or ``"post"``.
        edit: gets ``[..., neuron]`` and returns new values of that shape; None leaves everything as it is, bit for bit.
            The values it gets are the model's own: it must not change them in place. For an MLP to which tokens are
            routed it is called as ``edit(values, tokens)``, as in `read`.

    Raises:
        SiteError: the MLP has no such site.
        ArchitectureError: the model is compiled, or computes the site in a way that cannot be repeated.
    """
    mlp.site(kind)
    _refuse_compiled(hf_model, mlp.path)
    layout, module = mlp.layout, hf_model.get_submodule(mlp.path)
    if layout.parameters:
        return Handle([_Removal(Experts.of(module, layout).add(Visitor(kind, mlp.expert, edit, True)))])
    handles = []
    if mlp.routed:
        routing, handles = _routing(hf_model, mlp)
        inner = edit

        def edit(values: Tensor) -> Tensor | None:
            new = inner(values.flatten(0, -2), routing.tokens_of(module))
            return None if new is None else new.reshape(values.shape)

    if kind == "gate" and layout.activation is None and not _gate_is_post(layout):
        return Handle([*handles, _Recomputed.of(module, layout).add(edit)])
    name, where, _ = _point(layout, module, kind)
    point = module.get_submodule(name)
    if where == "input":

        def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            new = edit(_first(args, kwargs))
            return None if new is None else _with_first(args, kwargs, new)

        return Handle([*handles, point.register_forward_pre_hook(before, with_kwargs=True)])

    def after(_: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if layout.fused is None or kind == "gate":
            return edit(output)
        new = edit(layout.part(output, kind))
        if new is None:
            return None
        whole = output.clone()
        layout.part(whole, kind).copy_(new)
        return whole

    return Handle([*handles, point.register_forward_hook(after)])


def read_experts(hf_model: nn.Module, path: str, layout: MLPLayout, kind: str, callback: Callable[..., Any]) -> Handle:
    """As `read`, for all experts of one module at once: one call for each forward where they run together.

    Args:
        hf_model: the model.
        path: path of the module that holds the experts: `MLP.path` of each of them.
        layout: their `MLP.layout`.
        kind: ``"pre"``, ``"gate"``, ``"up"`` or ``"post"``.
        callback: called as ``callback(values, experts, tokens)``: values ``[row, neuron]``, and for each row the number
            of its expert and that of its token.
    """
    _refuse_compiled(hf_model, path)
    experts = Experts.of(hf_model.get_submodule(path), layout)
    return Handle([_Removal(experts.add(Visitor(kind, None, callback, False)))])


def write_experts(hf_model: nn.Module, path: str, layout: MLPLayout, kind: str, edit: Callable[..., Any]) -> Handle:
    """As `write`, for all experts of one module at once: ``edit(values, experts, tokens)``, as in `read_experts`."""
    _refuse_compiled(hf_model, path)
    experts = Experts.of(hf_model.get_submodule(path), layout)
    return Handle([_Removal(experts.add(Visitor(kind, None, edit, True)))])


def _refuse_compiled(hf_model: nn.Module, path: str) -> None:
    """Compiled code does not look for hooks that come after it was made: they would do nothing, without a word."""
    at, parts = hf_model, path.split(".")
    for part in [None, *parts]:
        at = at if part is None else at.get_submodule(part)
        if getattr(at, "_compiled_call_impl", None) is not None or hasattr(at, "_orig_mod"):
            raise ArchitectureError(
                f"{type(at).__name__} is compiled, and its code does not see hooks that come later; use the model as "
                "it was before torch.compile"
            )


def _routing(hf_model: nn.Module, mlp: MLP) -> tuple[Routing, list[Any]]:
    """What tells the tokens of an expert that is a module of its own in a list."""
    block = hf_model.get_submodule(".".join(mlp.path.split(".")[:-2]))
    routing = Routing.of(block)
    return routing, [_Removal(routing.follow(hf_model.get_submodule(mlp.path)))]


def _point(layout: MLPLayout, module: nn.Module, kind: str) -> tuple[str, str, Callable[[Tensor], Tensor]]:
    """Where a site is: name of a module, whether its input or its output, and how to get the values from an output."""
    if kind == "post" or (kind == "gate" and layout.activation is None and _gate_is_post(layout)):
        return layout.down, "input", lambda output: output
    if kind in ("pre", "gate") and layout.activation is not None:
        return layout.activation, "input" if kind == "pre" else "output", lambda output: output
    name = layout.fused or (layout.up if kind == "up" else layout.gate)

    def value(output: Tensor) -> Tensor:
        if layout.fused is not None:
            output = layout.part(output, "up" if kind == "up" else "pre")
        return layout.gate_of(module, output) if kind == "gate" else output

    return name, "output", value


def _gate_is_post(layout: MLPLayout) -> bool:
    return not layout.gated and layout.product is None


class _Recomputed:
    """Edits of a ``gate`` that no module of its own computes: ``post`` is computed again from the edited gate.

    One for each MLP, so that several edits follow each other. Its hooks put themselves where they belong at every
    forward: last on the projections (they must see what others made of ``pre`` and ``up``) and first on the down
    projection (others must see what it makes of ``post``).
    """

    _all: ClassVar[weakref.WeakKeyDictionary] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, module: nn.Module, layout: MLPLayout) -> "_Recomputed":
        if not layout.repeatable:
            raise ArchitectureError(f"post = {layout.product} cannot be repeated; write at 'post' instead")
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
