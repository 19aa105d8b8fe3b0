"""Being told to stop: signals of a batch system or the keyboard, which leave files whole and models as they were."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator


class Stopped(KeyboardInterrupt):
    """The process was told to end: by ctrl-C, or by a batch system that will kill it soon.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


class Undivided:
    """Within, ctrl-C waits: what is put on a model or taken off is so whole, and nothing of it stays for later runs."""

    def __init__(self) -> None:
        self._before: Callable[..., object] | None = None
        self._asked: tuple[object, ...] = ()

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # no other is interrupted
            before = signal.getsignal(signal.SIGINT)
            if callable(before):
                self._before = before
                signal.signal(signal.SIGINT, self._wait)

    def _wait(self, *asked: object) -> None:
        self._asked = asked

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            if self._asked:
                self._before(*self._asked)


@contextlib.contextmanager
def hooked(hooks: Iterable[contextlib.AbstractContextManager[object]]) -> Iterator[None]:
    """Within, hooks are on a model; outside, none of them is, even if ctrl-C comes while they go on or come off.

    Args:
        hooks: a generator that puts on one hook after the other, and gives what takes each off when it is left: torch's
            handles, an `Ablation`, or any other context manager. The last one is taken off first.
    """
    stack = contextlib.ExitStack()
    try:
        with Undivided():
            for hook in hooks:
                stack.enter_context(hook)
        yield
    finally:
        with Undivided():
            stack.close()


_ASKED: list[int] = []


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Within, SIGTERM and SIGINT raise `Stopped`, so that files are left whole; a second signal ends the process.

    SLURM sends SIGTERM before it kills a job that is out of time or preempted. Outside the main thread, where Python
    has no signals, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        _ASKED.append(number)
        raise Stopped(number)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _ASKED.clear()


def stop_if_asked() -> None:
    """Raise `Stopped` again where Python has swallowed it, as it does in a destructor: to be called between batches."""
    if _ASKED:
        raise Stopped(_ASKED[0])
