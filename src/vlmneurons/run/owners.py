"""Who has a model: one thread, and in it one task of asyncio, at a time."""

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Iterator

from torch import nn

from vlmneurons.errors import AblationError, MismatchError, VLMNeuronsError


class Owners:
    """Who is ablating, recording or asking a model: which thread, and in it which task (None outside of a loop).

    Two threads, or two tasks, with one model would silently share each other's ablations, and count each other's runs.
    A task does run under what was entered outside of its event loop: that is around all of them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: weakref.WeakKeyDictionary[nn.Module, tuple[int, str, list[tuple[object, str]]]]
        self._held = weakref.WeakKeyDictionary()

    def take(self, module: nn.Module, doing: str) -> None:
        """Have a model from now on, until as many calls of `give`.

        Args:
            module: the model.
            doing: what is being done to it: ``"ablated"``, ``"recorded"`` or ``"asked"``.

        Raises:
            AblationError: it is being ablated elsewhere.
            MismatchError: it is being recorded or asked elsewhere.
        """
        with self._lock:
            self._refuse_others(
                module, "; its ablations would act on the runs of this one too", "; each would count the other's"
            )
            name = threading.current_thread().name
            held = self._held.setdefault(module, (threading.get_ident(), name, []))
            held[2].append((_current_task(), doing))

    def give(self, module: nn.Module) -> None:
        """Have it no longer."""
        with self._lock:
            tasks, mine = self._held[module][2], _current_task()
            place = max((n for n, (task, _) in enumerate(tasks) if task is mine), default=len(tasks) - 1)
            del tasks[place]
            if not tasks:
                del self._held[module]

    @contextlib.contextmanager
    def held(self, module: nn.Module, doing: str) -> Iterator[None]:
        """Within, no other thread or task has it; see `take`."""
        self.take(module, doing)
        try:
            yield
        finally:
            self.give(module)

    def check(self, module: nn.Module) -> None:
        """Refuse a run of a model that somebody else has.

        Raises:
            AblationError: it is being ablated elsewhere.
            MismatchError: it is being recorded or asked elsewhere.
        """
        ran = ", and ran in another one: that run would have been"
        self._refuse_others(module, f"{ran} ablated too", f"{ran} counted")

    def _refuse_others(self, module: nn.Module, of_ablated: str, of_counted: str) -> None:
        held = self._held.get(module)
        if held is None:
            return
        thread, name, tasks = held
        mine = _current_task()
        if thread != threading.get_ident():
            where = f"thread {name!r}"
        elif any(task is not None and task is not mine for task, _ in tasks):
            where = "another task of asyncio"
        else:
            return
        doing = tasks[-1][1]
        ablated = doing == "ablated"
        kind: type[VLMNeuronsError] = AblationError if ablated else MismatchError
        raise kind(
            f"this model is being {doing} in {where}{of_ablated if ablated else of_counted}. Wait for "
            f"{'the ablation' if ablated else 'that'} to end, or give each a model of its own"
        )


def _current_task() -> object:
    """The task of asyncio that this is running in; None outside of a loop."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


OWNERS = Owners()
