"""Who has a model: one thread, and in it one task of asyncio, at a time."""

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.utils.hooks import RemovableHandle

from vlmneurons.errors import AblationError, MismatchError, VLMNeuronsError
from vlmneurons.model.architectures.inside import Hook


@dataclass
class _Holder:
    """The thread that has a model, and what it does with it: for each use the task of asyncio, and the word for it."""

    thread: int
    name: str
    uses: list[tuple[object, str]] = field(default_factory=list)


class Owners:
    """Who is ablating, recording or asking a model: which thread, and in it which task (None outside of a loop).

    Two threads, or two tasks, with one model would silently share each other's ablations, and count each other's runs.
    What was entered outside of an event loop holds for all of its tasks, so a task may run under it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: weakref.WeakKeyDictionary[nn.Module, _Holder] = weakref.WeakKeyDictionary()

    @contextlib.contextmanager
    def held(self, hf: nn.Module, doing: str) -> Iterator[None]:
        """Within, no other thread or task may have the model.

        Args:
            hf: the model.
            doing: what is being done to it: ``"ablated"``, ``"recorded"`` or ``"asked"``.

        Raises:
            AblationError: it is being ablated elsewhere.
            MismatchError: it is being recorded or asked elsewhere.
        """
        use = (_current_task(), doing)
        with self._lock:
            self._refuse_others(
                hf, "; its ablations would act on the runs of this one too", "; each would count the other's"
            )
            holder = _Holder(threading.get_ident(), threading.current_thread().name)
            holder = self._held.setdefault(hf, holder)
            holder.uses.append(use)
        try:
            yield
        finally:
            with self._lock:
                holder.uses.remove(use)
                if not holder.uses:
                    del self._held[hf]

    def check(self, hf: nn.Module) -> None:
        """Refuse a run of the model by anybody else than who has it.

        Raises:
            AblationError: the model is being ablated elsewhere.
            MismatchError: it is being recorded or asked elsewhere.
        """
        ran = ", and ran in another one: that run would have been"
        self._refuse_others(hf, f"{ran} ablated too", f"{ran} counted")

    def guard(self, hf: nn.Module) -> RemovableHandle:
        """A hook on the model that makes this `check` whenever a run of it begins."""
        return hf.register_forward_pre_hook(Hook(lambda module, args: self.check(module)))

    def _refuse_others(self, hf: nn.Module, of_ablated: str, of_counted: str) -> None:
        holder = self._held.get(hf)
        if holder is None:
            return
        task = _current_task()
        if holder.thread != threading.get_ident():
            where = f"thread {holder.name!r}"
        elif any(user is not None and user is not task for user, _ in holder.uses):
            where = "another task of asyncio"
        else:
            return
        doing = holder.uses[-1][1]
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
