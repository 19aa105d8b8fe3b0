"""Hooks that stand where the model itself does, within nnsight's handoff of a module's values to a trace.

nnsight runs *inside* PyTorch's hooks: a trace is served a module's input after all forward pre-hooks, and its output
before any forward hook. So a pre-hook is the place to change an input, and a hook the place to read an output. To read
an input, or to change an output, one has to stand further in, next to the module's own code. Then one order holds
everywhere: first comes whatever changes a value, then a trace that reads and writes it, and last whatever only looks,
which so sees what the model goes on with.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from nnsight.intervention.source import STATE, State
from torch import nn
from torch.utils.hooks import RemovableHandle

Before = Callable[[nn.Module, tuple, dict], object]
After = Callable[[nn.Module, tuple, Any], object]

_HOOKS: dict[int, tuple[State, dict[int, tuple[Before | None, After | None]]]] = {}
"""For each of nnsight's states that has hooks (by its id) these, in the order in which they were put on."""
_NUMBERS = itertools.count()
_BODY = vars(State)["body"]


class _HookedState(State):
    """nnsight's state of a module whose own forward runs between our hooks.

    A property, not a replaced ``body``: nnsight puts another body there when a trace asks for the module's ``.source``.
    """

    __slots__ = ()

    @property
    def body(self) -> Callable:
        """The module's forward, with what stands around it."""
        body, entry = _BODY.__get__(self), _HOOKS.get(id(self))
        return body if entry is None else functools.partial(_run, tuple(entry[1].values()), body)

    @body.setter
    def body(self, value: Callable) -> None:
        _BODY.__set__(self, value)


def _run(hooks: tuple, body: Callable, module: nn.Module, *args: object, **kwargs: object) -> object:
    for before, _ in hooks:
        if before is not None:
            before(module, args, kwargs)
    output = body(module, *args, **kwargs)
    for _, after in hooks:
        new = None if after is None else after(module, args, output)
        output = output if new is None else new
    return output


class Hook:
    """A forward hook or pre-hook that stays with its model: in a copy of the model it does nothing."""

    def __init__(self, function: Callable[..., object] | None) -> None:
        self.function = function

    def __call__(self, *args: object) -> object:
        return None if self.function is None else self.function(*args)

    def __deepcopy__(self, memo: Mapping[int, object]) -> "Hook":
        return Hook(None)


@runtime_checkable
class Removable(Protocol):
    """A hook that can be taken off, as torch's handles can."""

    def remove(self) -> object: ...


class Removal:
    """What takes something off again, as torch's handles do."""

    def __init__(self, remove: Callable[[], object]) -> None:
        self.remove = remove


def first_input(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The first of a module's arguments, whether its caller gives it by place or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def change_input(module: nn.Module, hook: Before, *, first: bool = False) -> RemovableHandle:
    """Calls ``hook(module, args, kwargs)`` before a trace is served the input; what it returns replaces them.

    Args:
        module: the module.
        hook: returns new ``(args, kwargs)``, or None.
        first: before all other hooks that are on.
    """
    return module.register_forward_pre_hook(Hook(hook), with_kwargs=True, prepend=first)


def see_input(module: nn.Module, hook: Before) -> Removable:
    """Calls ``hook(module, args, kwargs)`` with what the module's own code gets, a trace's writes included."""
    return _put_inside(module, hook, None) or change_input(module, hook)


def change_output(module: nn.Module, hook: After) -> Removable:
    """Calls ``hook(module, args, output)`` before a trace is served the output; what it returns replaces it."""
    return _put_inside(module, None, hook) or see_output(module, hook)


def see_output(module: nn.Module, hook: After) -> RemovableHandle:
    """Calls ``hook(module, args, output)`` with what the model goes on with, a trace's writes included."""
    return module.register_forward_hook(Hook(hook))


def _put_inside(module: nn.Module, before: Before | None, after: After | None) -> Removal | None:
    """Next to the module's own code; None for a module that nnsight does not serve, where any place is as good."""
    state = vars(module).get(STATE)
    if state is None:
        return None
    number = next(_NUMBERS)
    hooks = _HOOKS.setdefault(id(state), (state, {}))[1]
    hooks[number] = (before, after)
    state.__class__ = _HookedState

    def remove() -> None:
        hooks.pop(number, None)
        if not hooks and _HOOKS.pop(id(state), None) is not None:
            state.__class__ = State

    return Removal(remove)


def hooks_of(module: nn.Module) -> list[Callable]:
    """All functions that are called when a module runs forward, those within nnsight's handoff included."""
    inside = _HOOKS.get(id(vars(module).get(STATE)), (None, {}))[1].values()
    return [
        *module._forward_pre_hooks.values(),
        *module._forward_hooks.values(),
        *(hook for pair in inside for hook in pair if hook is not None),
    ]


def is_watched(module: nn.Module) -> bool:
    """Whether a module has hooks of the user, or of a recorder or an ablation that is in force.

    Hooks that nnsight, transformers, accelerate and torch put on a model for good do not count, nor do hooks of the
    modules within it.
    """
    makers = {(getattr(hook, "__module__", None) or type(hook).__module__).split(".")[0] for hook in hooks_of(module)}
    return not makers <= {"nnsight", "transformers", "accelerate", "torch"}
