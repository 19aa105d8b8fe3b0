"""Following a module's ``forward`` with symbols in place of tensors: nothing is computed, and no weight is read.

`torch.fx` does the work. This file adds what the code of models does and `torch.fx` alone stops at: tensors made as
long as the input, properties of dtypes, stars before a symbol, comparisons, and tensors and modules made on the way.
"""

import contextlib
import functools
import inspect
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.fx.proxy import Attribute, TraceError

UNNAMED = "_a_tensor_made_on_the_way"
"""What the graph calls a tensor that the module does not hold; `torch.fx` would hang it onto the user's module."""


class _Symbol(fx.Proxy):
    """Stands in for a tensor. Its length is not known; ``*`` understands only a TypeError as saying so."""

    def __getattr__(self, name: str) -> "_Property":
        return _Property(self, name)

    def __len__(self) -> int:
        raise TypeError("a symbol has no length")

    def __setitem__(self, index: object, value: object) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class _Property(Attribute):
    def __len__(self) -> int:
        raise TypeError("a symbol has no length")


_TAKE_NUMBERS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (
        torch,
        (
            *("arange", "eye", "full", "linspace", "ones", "scalar_tensor", "tensor", "zeros"),
            *("chunk", "roll", "split", "triu", "finfo"),
        ),
    ),
    (F, ("pad", "scaled_dot_product_attention")),
    (Tensor, ("expand", "repeat", "reshape", "to", "view")),
)
"""Functions and methods that take a length, a dtype or a device, and may get a symbol for it and none for a tensor.

torch tells `torch.fx` of a call that has a symbol among its tensors. Whether it also does for a symbol among the
numbers differs by its version and by the function: 2.6 refuses ``torch.arange(x.shape[1])``, and 2.14 still refuses
``torch.ones(x.shape[1], 1)`` and every ``torch.finfo(x.dtype)``.
"""
_IN_PARTS = ("chunk", "split", torch.chunk, torch.split)  # torch's own, whatever its names are while a flow is followed
_TRACING = threading.RLock()
"""Held while names of torch are exchanged, here and by `torch.fx`: two at once would not put back what was there."""


@contextlib.contextmanager
def _numbers_may_be_symbols() -> Iterator[None]:
    """Within it, the calls of `_TAKE_NUMBERS` are steps of the flow whichever of their arguments is a symbol."""
    with _TRACING, contextlib.ExitStack() as patches:
        for owner, names in _TAKE_NUMBERS:
            for name in names:
                call = _followed(getattr(owner, name), name if owner is Tensor else None)
                patches.enter_context(mock.patch.object(owner, name, call))
        yield


def _followed(call: Callable, method: str | None) -> Callable:
    """A function, or method of tensors, that becomes a step of the flow if one of its arguments is a symbol."""

    @functools.wraps(call, updated=())
    def followed(*args: Any, **kwargs: Any) -> Any:
        symbols: list[fx.Proxy] = []
        map_aggregate((args, kwargs), lambda value: symbols.append(value) if isinstance(value, fx.Proxy) else None)
        if not symbols:
            return call(*args, **kwargs)
        kind, target = ("call_function", call) if method is None else ("call_method", method)
        return symbols[0].tracer.create_proxy(kind, target, args, kwargs)

    return followed


_MOST_WAYS = 12
"""How many ways through one forward are followed at most; each comparison of symbols doubles them."""


@contextlib.contextmanager
def _as_they_were(modules: Iterable[nn.Module]) -> Iterator[None]:
    """After it the modules have what they had: some keep a value of their forward, as Switch's router does a dtype."""
    before: list[tuple[Any, Any]] = [(vars(module), vars(module).copy()) for module in modules]
    attributes = [item for _, content in before for item in content.items() if type(item[1]) in (dict, list, set)]
    # None of PyTorch's own that are empty.
    before += [(value, value.copy()) for name, value in attributes if value or name[0] != "_"]
    try:
        yield
    finally:
        for container, content in before:
            now, then = (values.items() if isinstance(values, dict) else values for values in (container, content))
            if [*map(_ids, now)] != [*map(_ids, then)]:
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)


def _ids(value: Any) -> Any:
    return tuple(map(id, value)) if type(value) is tuple else id(value)


class _Tracer(fx.Tracer):
    """Follows ``forward`` as the class defines it; modules that are one step, or have no children, are not entered."""

    def __init__(self, is_step: Callable[[nn.Module], bool], method: str, fill: bool, way: tuple[bool, ...]) -> None:
        super().__init__()
        self.is_step = is_step
        self.traced_func_name = method
        self.fill, self.way = fill, list(way)
        self.taken: list[bool] = []

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        self.inside = set(root.modules())
        with _numbers_may_be_symbols(), _as_they_were(self.inside):
            return super().trace(root, concrete_args)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Symbol(node, self)

    def create_arg(self, a: object) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            self.tensor_attrs.setdefault(a, UNNAMED)  # else torch.fx sets an attribute of the user's module
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(True for _ in m.children()) or self.is_step(m)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> object:
        if m in self.inside and self.is_leaf_module(m, ""):  # a module made in forward itself has no name to call it by
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
        return type(m).forward(m, *args, **kwargs)  # of the class: what others put on the instance is not ours

    def create_args_for_root(self, root_fn: Callable, is_module: bool, concrete_args: object = None) -> tuple:
        """Symbols for the arguments that must be given, and if asked for those that are None if not given."""
        positional, named = [], {}
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            needed = parameter.default is inspect.Parameter.empty or (self.fill and parameter.default is None)
            needed |= self.fill and type(parameter.default) is int  # lengths, such as query_length=0
            if not needed or parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                continue
            symbol = self.create_proxy("placeholder", parameter.name, (), {})
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY or parameter.default is not parameter.empty:
                named[parameter.name] = symbol
            else:
                positional.append(symbol)
        return lambda *args: root_fn(self.root, *positional, **named), []

    def iter(self, obj: Any) -> Any:
        try:
            return super().iter(obj)
        except TraceError:
            if obj.node.target in _IN_PARTS:
                return iter((obj[0], obj[1]))  # halves, or no MLP that we know
            if not is_shape(obj.node):
                raise
            return iter((obj,))  # `view(*shape)`: how long it is makes no difference to where numbers go

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.taken.append(self.way[len(self.taken)] if len(self.taken) < len(self.way) else False)
        return self.taken[-1]


def is_shape(node: fx.Node) -> bool:
    """Whether a node is the shape of a tensor or a part of it: a number of places, and of no place's number."""
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    return node.op == "call_method" and node.target in ("size", "dim", "numel")


def follow(
    module: nn.Module, is_step: Callable[[nn.Module], bool], *, method: str = "forward", everywhere: bool = False
) -> list[fx.Graph]:
    """What one module's ``forward`` does: the first way that can be followed, or every way that it may go.

    Args:
        module: any module.
        is_step: tells of a module inside whether it is to be taken as one step.
        method: a method to follow instead of ``forward``.
        everywhere: whether to follow every way: both sides of each comparison of symbols.
    """
    graphs: list[fx.Graph] = []
    for fill in (False, True):  # optional arguments are first left away, then given
        ways: list[tuple[bool, ...]] = [()]
        for way in ways:  # grows as comparisons are met: each is also decided the other way
            tracer = _Tracer(is_step, method, fill, way)
            with contextlib.suppress(Exception):  # whatever a forward may do with a symbol: then this way is not known
                graphs.append(tracer.trace(module))
            if graphs and not everywhere:
                return graphs
            new = [(*tracer.taken[:place], True) for place in range(len(way), len(tracer.taken))]
            ways += new[: _MOST_WAYS - len(ways)]
    return graphs
