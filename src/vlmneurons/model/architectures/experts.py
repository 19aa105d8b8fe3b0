"""Reading and writing the neurons of experts, which see only the tokens that a router sends to them.

transformers keeps all experts of a layer in one module, as 3-D parameters, and has several ways to run it. Each way is
watched while it runs. Rows (one for each token and each expert that it goes to) are picked up where the model itself
makes them, so values and clean logits are the model's own, bit for bit.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast
from unittest import mock

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlmneurons.checks import Keywords
from vlmneurons.errors import ArchitectureError
from vlmneurons.model.architectures.inside import Hook, Removable, change_input, first_input, see_output
from vlmneurons.model.architectures.layout import MLPLayout

_IN_ROWS = ("grouped_mm", "batched_mm")
"""Implementations of transformers' experts that compute all rows at once, in an order that we know."""


@dataclass
class Rows:
    """Which rows the model is computing: the expert and the token of each."""

    experts: Int64[Tensor, " row"]
    tokens: Int64[Tensor, " row"]


@dataclass(frozen=True)
class Visitor:
    """Who reads or writes a site of one expert, or (``expert`` is None) of all experts in a module."""

    kind: str
    expert: int | None
    visit: Callable[..., Tensor | None]
    writes: bool


class Experts:
    """All that is read and written in one module of experts; its hooks are on as long as there is any."""

    _all: ClassVar[weakref.WeakKeyDictionary] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, module: nn.Module, layout: MLPLayout) -> "Experts":
        if module not in cls._all:
            cls._all[module] = cls(module, layout)
        return cls._all[module]

    def __init__(self, module: nn.Module, layout: MLPLayout) -> None:
        self.module = cast(Callable[[], nn.Module], weakref.ref(module))  # which outlives its hooks
        self.layout = layout
        self.visitors: dict[int, Visitor] = {}
        self.hooks: list[Removable] = []
        self.undo: list[Callable[[], None]] = []
        self.rows: Rows | None = None

    def add(self, visitor: Visitor) -> Callable[[], None]:
        """Puts a visitor on; gives what takes it off."""
        if not self.visitors:
            module = self.module()
            self.hooks = [
                module.register_forward_pre_hook(Hook(self._begin), with_kwargs=True),
                module.register_forward_hook(Hook(self._end), always_call=True),
            ]
        key = max(self.visitors, default=-1) + 1
        self.visitors[key] = visitor
        return functools.partial(self._remove, key)

    def _remove(self, key: int) -> None:
        self.visitors.pop(key, None)
        if not self.visitors:
            while self.hooks:
                self.hooks.pop().remove()
            self._end()  # torch calls no hook after a KeyboardInterrupt, so a forward may not have ended

    # --- one forward ---

    def _begin(self, module: nn.Module, args: tuple, kwargs: Mapping[str, object]) -> None:
        self._end()
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        hidden, *further = list(bound.arguments.values())[1:]
        implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
        if not hasattr(module, "is_concatenated"):  # not one of those that transformers can run in several ways
            implementation = "eager"
        if getattr(module, "_is_expert_parallel", False):
            raise ArchitectureError(
                "experts that are spread over several processes cannot be read or written one by one"
            )
        if implementation in _IN_ROWS:
            self.rows = _rows(hidden, further[0], implementation)
            if getattr(module, "has_gate", True):
                self._patch_gating(module)
            else:
                self._hook_activation(module, through=True)
        elif implementation in (None, "eager"):
            gating = getattr(type(module), "_apply_gate", None)
            if gating is not None and gating.__name__ != "_default_apply_gate":
                self._patch_gating(module)
                watch = _Watch(self, hidden, points=False)
            else:
                if self.layout.activation is not None:
                    self._hook_activation(module, through=False)
                watch = _Watch(self, hidden, points=True)
            watch.__enter__()
            self.undo.append(lambda: watch.__exit__(None, None, None))
        else:
            raise ArchitectureError(
                f"experts run by {implementation!r} compute their neurons inside one kernel, where they cannot be read "
                "or written; call set_experts_implementation('grouped_mm') on the model that holds them"
            )

    def _end(self, *_: object) -> None:
        self.rows = None
        while self.undo:
            self.undo.pop()()

    def _patch_gating(self, module: nn.Module) -> None:
        """Stands between the projections while this forward runs."""
        original = cast(Callable, module._apply_gate)

        def gating(fused: Tensor) -> Tensor:
            post = self.through(fused)
            return original(fused) if post is None else post

        patch = mock.patch.object(module, "_apply_gate", gating)
        patch.start()
        self.undo.append(patch.stop)

    def _hook_activation(self, module: nn.Module, through: bool) -> None:
        activation = module.get_submodule(cast(str, self.layout.activation))

        def after(_: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            return self.through(args[0]) if through else self.point("gate", output)

        self.undo.append(see_output(activation, after).remove)

    # --- values ---

    def through(self, first: Float[Tensor, "row both"]) -> Float[Tensor, "row neuron"] | None:
        """Everything from the output of the first projection to ``post``; None if nothing was changed."""
        layout, module = self.layout, self.module()
        wanted = {visitor.kind for visitor in self.visitors.values()}
        up = layout.part(first, "up") if layout.gated else None
        pre, changed = self._visit("pre", layout.part(first, "pre") if layout.gated else first)
        if not changed and not wanted & {"gate", "up", "post"}:
            return None
        gate, gate_changed = self._visit("gate", layout.gate_of(module, pre))
        changed |= gate_changed
        if up is not None:
            up, up_changed = self._visit("up", up)
            changed |= up_changed
        if not changed and "post" not in wanted:
            return None
        post, post_changed = self._visit("post", layout.post_of(module, gate, up))
        return post if changed or post_changed else None

    def point(self, kind: str, values: Tensor) -> Tensor | None:
        """One point of the way; values may have an axis of experts before that of tokens. None if not changed."""
        if values.ndim == 2:
            new, changed = self._visit(kind, values)
            return new if changed else None
        experts, tokens = self._known.experts, self._known.tokens
        new, changed = self._visit(kind, values[experts, tokens])
        if not changed:
            return None
        whole = values.clone()
        whole[experts, tokens] = new.to(whole.dtype)
        return whole

    def wants(self, *kinds: str) -> bool:
        return any(visitor.kind in kinds for visitor in self.visitors.values())

    @property
    def _known(self) -> Rows:
        if self.rows is None:
            raise ArchitectureError("this module of experts runs in a way that is not known; no row can be told")
        return self.rows

    def _visit(self, kind: str, values: Tensor) -> tuple[Tensor, bool]:
        rows, changed = self._known, False
        for visitor in tuple(self.visitors.values()):
            if visitor.kind != kind:
                continue
            if visitor.expert is None:
                new = visitor.visit(values, rows.experts, rows.tokens)
                where = None
            else:
                where = (rows.experts == visitor.expert).nonzero().flatten()
                if not len(where):
                    continue
                new = visitor.visit(values[where], rows.tokens[where])
            if visitor.writes and new is not None:
                new = new.to(values.dtype)
                values = new if where is None else values.index_copy(0, where, new)
                changed = True
        return values, changed


def _rows(hidden: Tensor, chosen: Int64[Tensor, "token choice"], implementation: str) -> Rows:
    """The rows in the order in which transformers computes them."""
    experts = chosen.reshape(-1)
    if implementation == "batched_mm":
        return Rows(experts, torch.arange(len(hidden), device=hidden.device).repeat_interleave(chosen.shape[-1]))
    experts, order = torch.sort(experts)
    return Rows(experts, order // chosen.shape[-1])


_INDEXED = {Tensor.__getitem__, torch.index_select, Tensor.index_select}
_RESHAPED = {Tensor.reshape, Tensor.view, torch.reshape, Tensor.squeeze, torch.squeeze, Tensor.contiguous, Tensor.to}
_TURNED = {
    Tensor.transpose,
    torch.transpose,
    Tensor.t,
    torch.t,
    *(getattr(Tensor, name).__get__ for name in ("mT", "T")),
}
_MULTIPLIED = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.bmm, Tensor.bmm, Tensor.mm}


class _Gathered(TorchFunctionMode):
    """Follows which tokens a model picks from a tensor: results of indexing it are remembered with their indices.

    Results are kept by their ids, together with themselves: an id is free for another tensor once its own is gone.
    """

    def __init__(self, source: Tensor | None = None) -> None:
        super().__init__()
        self.source = source
        self.picked: dict[int, tuple[Tensor, Tensor]] = {}

    def tokens(self, value: object) -> Tensor | None:
        """Which tokens a tensor holds, if it was picked by index."""
        _, tokens = self.picked.get(id(value), (None, None))
        return tokens

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not args or not isinstance(result, Tensor):
            return result
        if func in _INDEXED and (args[0] is self.source or self.source is None):
            parts = args[-1] if isinstance(args[-1], tuple) else (args[-1],)
            indices = [part.flatten() for part in parts if isinstance(part, Tensor)]
            if len(indices) == 1 and indices[0].dtype in (torch.bool, torch.int32, torch.int64):
                tokens = indices[0].nonzero().flatten() if indices[0].dtype == torch.bool else indices[0].long()
                self.picked[id(result)] = (result, tokens)
        elif func in _RESHAPED and id(args[0]) in self.picked:
            self.picked[id(result)] = (result, self.picked[id(args[0])][1])
        elif func in _RESHAPED and args[0] is self.source and result.ndim == 2 and result.shape[1] == args[0].shape[-1]:
            self.source = result  # all tokens in a row, from which the model goes on picking
        return result


class _Watch(_Gathered):
    """Watches experts that run one by one, or all on every token, for products with the parameters."""

    def __init__(self, experts: Experts, hidden: Tensor, points: bool) -> None:
        super().__init__(hidden)
        self.experts, self.points = experts, points
        self.slices: dict[int, tuple[Tensor, str, int | None]] = {}
        self.outputs: dict[str, Tensor] = {}

    def _weight(self, value: object) -> tuple[str, int | None] | None:
        """Which parameter a tensor is, and which expert's slice of it."""
        module, layout = self.experts.module(), self.experts.layout
        for name in filter(None, (layout.down, layout.fused, layout.gate, layout.up)):
            if value is getattr(module, name, None):
                return name, None
        kept = self.slices.get(id(value))
        return None if kept is None else kept[1:]

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        factor = self._weight(args[1]) if func in _MULTIPLIED and args[1:] else None
        if factor is not None:
            return self._product(func, args, kwargs, *factor)
        result = super().__torch_function__(func, types, args, kwargs)
        weight = self._weight(args[0]) if args and isinstance(args[0], Tensor) else None
        if weight is not None and func is Tensor.__getitem__ and weight[1] is None:
            index = int(args[1]) if not isinstance(args[1], Tensor) or args[1].numel() == 1 else None
            if index is not None:
                self.slices[id(result)] = (result, weight[0], index)
        elif weight is not None and func in _TURNED:
            self.slices[id(result)] = (result, *weight)
        return result

    def _product(self, func: Callable, args: tuple, kwargs: dict, name: str, expert: int | None) -> Tensor:
        experts, layout = self.experts, self.experts.layout
        if name == layout.down:
            if self.points and layout.activation is None and experts.wants("gate"):
                post = self._gate()
                args = args if post is None else (post, *args[1:])
            if self.points and experts.wants("post"):
                post = experts.point("post", args[0])
                args = args if post is None else (post, *args[1:])
            return func(*args, **kwargs)
        experts.rows = self._rows(args[0], expert)
        output = func(*args, **kwargs)
        if not self.points:
            return output
        kinds = ("pre", "up") if layout.fused else ("pre",) if name == layout.gate else ("up",)
        for kind in kinds:
            if not experts.wants(kind):
                continue
            part = layout.part(output, kind) if layout.fused else output
            new = experts.point(kind, part)
            if new is not None and layout.fused:
                output = output.clone()
                layout.part(output, kind).copy_(new)
            elif new is not None:
                output = new
        self.outputs[name] = output
        return output

    def _gate(self) -> Tensor | None:
        """``post`` made anew of an edited gate that no module computes; None if it was not edited."""
        layout, module = self.experts.layout, self.experts.module()
        pre, up = layout.pre_and_up(self.outputs)
        new = self.experts.point("gate", layout.gate_of(module, pre))
        return None if new is None else layout.post_of(module, new, up)

    def _rows(self, rows: Tensor, expert: int | None) -> Rows:
        if expert is None and rows.ndim == 3:  # all experts at once, each on all tokens; zeros where not routed to it
            return Rows(*(rows != 0).any(-1).nonzero(as_tuple=True))
        tokens = self.tokens(rows)
        if expert is None or tokens is None or len(tokens) != len(rows):
            raise ArchitectureError(
                f"{type(self.experts.module()).__name__} runs in a way in which it cannot be told which tokens an "
                "expert sees; try set_experts_implementation('grouped_mm') on the model that holds it"
            )
        return Rows(torch.full_like(tokens, expert), tokens)


class Routing:
    """Tells which tokens reach an expert that is a module of its own, by watching the block that routes."""

    _all: ClassVar[weakref.WeakKeyDictionary] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, block: nn.Module) -> "Routing":
        if block not in cls._all:
            cls._all[block] = cls(block)
        return cls._all[block]

    def __init__(self, block: nn.Module) -> None:
        self.block = cast(Callable[[], nn.Module], weakref.ref(block))  # which outlives its hooks
        self.users = 0
        self.hooks: list[Removable] = []
        self.watch: _Gathered | None = None
        self.tokens: dict[int, Tensor] = {}

    def follow(self, expert: nn.Module) -> Callable[[], None]:
        """Keeps `tokens_of` ready for one expert; gives what stops it."""
        if not self.users:
            block = self.block()
            self.hooks = [
                block.register_forward_pre_hook(Hook(self._begin)),
                block.register_forward_hook(Hook(self._end), always_call=True),
            ]
        self.users += 1
        hook = change_input(expert, self._enter, first=True)

        def stop() -> None:
            hook.remove()
            self.users -= 1
            if not self.users:
                while self.hooks:
                    self.hooks.pop().remove()
                self._end()

        return stop

    def tokens_of(self, expert: nn.Module) -> Int64[Tensor, " row"]:
        """Which tokens the expert is running on."""
        return self.tokens[id(expert)]

    def _begin(self, *_: object) -> None:
        self._end()
        self.watch = _Gathered()
        self.watch.__enter__()

    def _end(self, *_: object) -> None:
        if self.watch is not None:
            self.watch.__exit__(None, None, None)
        self.watch = None
        self.tokens.clear()

    def _enter(self, expert: nn.Module, args: tuple, kwargs: Keywords) -> None:
        rows = first_input(args, kwargs)
        tokens = None if self.watch is None else self.watch.tokens(rows)
        if tokens is None or len(tokens) != rows.shape[:-1].numel():
            raise ArchitectureError(
                f"it cannot be told which tokens {type(self.block()).__name__} sends to this {type(expert).__name__}"
            )
        self.tokens[id(expert)] = tokens
