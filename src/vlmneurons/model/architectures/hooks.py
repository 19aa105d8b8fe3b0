"""Reading and writing a site of a model as it runs, by hooks of our own."""

import functools
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlmneurons.checks import Keywords
from vlmneurons.errors import ArchitectureError, SiteError
from vlmneurons.model.architectures.experts import Experts, Routing, Visitor
from vlmneurons.model.architectures.inside import (
    Removable,
    Removal,
    change_input,
    change_output,
    first_input,
    see_input,
    see_output,
)
from vlmneurons.model.architectures.layout import MLP, MLPLayout


class Handle:
    """Hooks that belong together; `remove` takes them off, and nobody else's. Removing twice does nothing."""

    def __init__(self, handles: Sequence[Removable]) -> None:
        self._handles = list(handles)

    def remove(self) -> None:
        """Takes the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
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

    def look(*values: Tensor) -> None:
        callback(*values)

    return _visit(hf_model, mlp, kind, look, writes=False)


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
    return _visit(hf_model, mlp, kind, edit, writes=True)


def _visit(hf_model: nn.Module, mlp: MLP, kind: str, visit: Callable[..., Tensor | None], *, writes: bool) -> Handle:
    """Calls ``visit`` with the values of a site, and goes on with those that it gives; if it gives None, as before.

    Reading and writing are one but for when they come (see `inside`): whoever ``writes`` comes before a trace is served
    the values, and whoever only looks comes after it.
    """
    mlp.site(kind)
    if mlp.layout.parameters:
        return _visit_experts(hf_model, mlp.path, mlp.layout, Visitor(kind, mlp.expert, visit, writes))
    _refuse_compiled(hf_model, mlp.path)
    module, change = hf_model.get_submodule(mlp.path), visit
    routing = Routing.of(hf_model.get_submodule(_path_of_router(mlp))) if mlp.routed else None
    if routing is not None:

        def change(values: Tensor) -> Tensor | None:
            new = visit(values.flatten(0, -2), routing.tokens_of(module))
            return None if new is None else new.reshape(values.shape)

    place = mlp.place(kind)
    if place.computed:
        gate = ComputedGate.of(module, mlp.layout)
        hook: Removable = gate.change(change) if writes else gate.see(change)
    elif place.end == "input":

        def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            new = change(first_input(args, kwargs))
            return None if new is None else _with_first(args, kwargs, new)

        hook = (change_input if writes else see_input)(module.get_submodule(place.module), before)
    else:

        def after(_: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            new = change(place.part(output))
            if new is None or place.columns is None:
                return new
            whole = output.clone()
            place.part(whole).copy_(new)
            return whole

        hook = (change_output if writes else see_output)(module.get_submodule(place.module), after)
    # Last, so that the router is not watched for a site that was refused.
    return Handle([hook] if routing is None else [Removal(routing.follow(module)), hook])


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
    return _visit_experts(hf_model, path, layout, Visitor(kind, None, callback, writes=False))


def write_experts(
    hf_model: nn.Module, path: str, layout: MLPLayout, kind: str, edit: Callable[..., Tensor | None]
) -> Handle:
    """As `write`, for all experts of one module at once: ``edit(values, experts, tokens)``, as in `read_experts`."""
    return _visit_experts(hf_model, path, layout, Visitor(kind, None, edit, writes=True))


def _visit_experts(hf_model: nn.Module, path: str, layout: MLPLayout, visitor: Visitor) -> Handle:
    _refuse_compiled(hf_model, path)
    return Handle([Removal(Experts.of(hf_model.get_submodule(path), layout).add(visitor))])


def see_number_of_tokens(hf_model: nn.Module, mlp: MLP, callback: Callable[[int], object]) -> Handle:
    """Calls ``callback(n)`` before tokens are routed to an expert, with how many there are to choose from.

    A block may route some of a batch's tokens only, as Ernie's does, whose pictures have experts of their own: then the
    numbers that `read` gives are not of the batch's tokens.

    Args:
        hf_model: the model in which the MLP was found.
        mlp: one of its experts.
        callback: what it raises stops the forward.
    """
    path = mlp.path if mlp.layout.parameters else _path_of_router(mlp)

    def count(_: nn.Module, args: tuple, kwargs: dict) -> None:
        callback(first_input(args, kwargs).shape[:-1].numel())

    return Handle([see_input(hf_model.get_submodule(path), count)])


def _path_of_router(mlp: MLP) -> str:
    """The path of the block that sends tokens to an expert which is a module of its own, in a list of that block."""
    return ".".join(mlp.path.split(".")[:-2])


def _refuse_compiled(hf_model: nn.Module, path: str) -> None:
    """Refuses to put hooks in code that was compiled before: it does not look for them, and they would do nothing."""
    names = path.split(".")
    for depth in range(len(names) + 1):
        module = hf_model.get_submodule(".".join(names[:depth]))
        if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
            raise ArchitectureError(
                f"{type(module).__name__} is compiled, and its code does not see hooks that come later; use the model "
                "as it was before torch.compile"
            )


class ComputedGate:
    """A ``gate`` that no module computes: it is computed here, and ``post`` again if somebody changed it.

    There is one for each MLP, so that several edits follow each other. At every forward its hooks move to where they
    belong: last on the projections (to see what other hooks made of ``pre`` and ``up``), and first on the down
    projection (so that other hooks see the new ``post``). A trace is served the gate as soon as there is a ``pre``.
    What the trace writes comes after all edits, and before anybody who only looks at the gate.
    """

    _all: ClassVar[weakref.WeakKeyDictionary] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, module: nn.Module, layout: MLPLayout) -> "ComputedGate":
        return cls._all.setdefault(module, {}).setdefault(layout, cls(module, layout))

    def __init__(self, module: nn.Module, layout: MLPLayout) -> None:
        self.module = cast(Callable[[], nn.Module], weakref.ref(module))  # which outlives its hooks
        self.layout = layout
        self.numbers = itertools.count()
        self.edits: dict[int, Callable[[Tensor], Tensor | None]] = {}
        self.watchers: dict[int, Callable[[Tensor], object]] = {}
        self.hooks: list[Removable] = []
        self.outputs: dict[str, Tensor] = {}
        self.served: list[_Served] = []

    def change(self, edit: Callable[[Tensor], Tensor | None]) -> Handle:
        """Lets an edit act on every gate from now on."""
        if not self.layout.repeatable:
            raise ArchitectureError(f"post = {self.layout.product} cannot be repeated; write at 'post' instead")
        return self._add(self.edits, edit)

    def see(self, watcher: Callable[[Tensor], object]) -> Handle:
        """Shows every gate from now on, as it is used."""
        return self._add(self.watchers, watcher)

    def _add(self, where: dict[int, Callable], function: Callable) -> Handle:
        number = next(self.numbers)
        if not self.hooks:
            self._start()
        where[number] = function
        return Handle([Removal(functools.partial(self._remove, where, number))])

    def _remove(self, where: dict[int, Callable], number: int) -> None:
        where.pop(number, None)
        if not self.edits and not self.watchers:
            while self.hooks:
                self.hooks.pop().remove()
            self.outputs.clear()
            self.served.clear()

    def _start(self) -> None:
        module, layout = self.module(), self.layout
        down = module.get_submodule(layout.down)
        recompute = change_input(down, self._before_down, first=True)
        self.hooks.append(recompute)
        for name in dict.fromkeys(filter(None, (layout.first, layout.up))):
            projection = module.get_submodule(name)
            keep = see_output(projection, functools.partial(self._after_projection, name))

            def order(*_: object, projection: nn.Module = projection, keep: RemovableHandle = keep) -> None:
                cast(OrderedDict, projection._forward_hooks).move_to_end(keep.id)
                cast(OrderedDict, down._forward_pre_hooks).move_to_end(recompute.id, last=False)

            self.hooks += [keep, change_input(projection, order)]

    # -- in a trace ----------------------------------------------------------------------------------------------------

    def serve(self, pre: Tensor, batcher: Any = None, rows: Any = None) -> Tensor:
        """The gate of this forward for a trace to read and to edit in place; the same one if it asks again.

        Args:
            pre: what the trace is served of ``pre``.
            batcher: nnsight's batcher, where a trace has several inputs.
            rows: which rows the asking part of the trace sees; None for all of them.
        """
        for served in self.served:
            if served.rows == rows:
                return served.gate
        gate = self._edited(self.layout.gate_of(self.module(), pre))
        for served in self.served:
            if served.rows is None and served.is_changed():
                gate = batcher.narrow(served.gate, rows)
        self.served.append(_Served(gate, pre, batcher, rows))
        return gate

    def assign(self, gate: Tensor, pre: Tensor, batcher: Any = None, rows: object = None) -> None:
        """Puts a trace's gate in place of this forward's; see `serve`."""
        self.served = [served for served in self.served if served.rows != rows]
        self.served.append(_Served(gate, pre, batcher, rows, assigned=True))

    # -- one forward ---------------------------------------------------------------------------------------------------

    def _edited(self, gate: Tensor) -> Tensor:
        for edit in tuple(self.edits.values()):
            new = edit(gate)
            gate = gate if new is None else new
        return gate

    def _after_projection(self, name: str, projection: nn.Module, args: tuple, output: Tensor) -> None:
        self.outputs[name] = output

    def _before_down(self, down: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        layout, module = self.layout, self.module()
        pre, up = layout.pre_and_up(self.outputs)
        self.outputs.clear()
        computed = layout.gate_of(module, pre)
        gate = self._edited(computed)
        all_served, self.served = self.served, []
        for served in all_served:
            if served.is_changed() or served.is_differentiated(pre):
                whole = served.rows is None
                gate = served.gate if whole else served.batcher.widen(gate, served.rows, served.gate)
        for watcher in tuple(self.watchers.values()):
            watcher(gate)
        if gate is computed:
            return None
        if not layout.repeatable:
            raise SiteError(
                f"gate has no module of its own here, and post = {layout.product} cannot be computed again from what "
                "the trace made of it; write at 'post' instead"
            )
        return _with_first(args, kwargs, layout.post_of(module, gate, up))


class _Served:
    """What a trace was served of a computed gate, and whether the model is to go on with it."""

    def __init__(self, gate: Tensor, pre: Tensor, batcher: Any, rows: object, assigned: bool = False) -> None:
        self.gate, self.batcher, self.rows, self.assigned = gate, batcher, rows, assigned
        # Inference tensors do not count what is written to them.
        self.before = gate.clone() if gate.is_inference() else None
        self.version = None if gate.is_inference() else gate._version
        self.source = (pre.untyped_storage()._cdata, None if pre.is_inference() else pre._version)

    def is_changed(self) -> bool:
        if self.assigned or self.before is None:
            return self.assigned or self.gate._version != self.version
        return not torch.equal(self.gate, self.before)

    def is_differentiated(self, pre: Tensor) -> bool:
        """Whether gradients should flow through it: only if nothing was written to what it was computed from."""
        return self.gate.requires_grad and self.source == (pre.untyped_storage()._cdata, pre._version)


def _with_first(args: tuple, kwargs: Mapping[str, object], new: Tensor) -> tuple[tuple, Keywords]:
    if args:
        return (new, *args[1:]), dict(kwargs)
    name = next(iter(kwargs))
    return args, {**kwargs, name: new}
