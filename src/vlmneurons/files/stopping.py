"""Being told to stop, by a batch system or the keyboard: files stay whole, and models are left as they were."""

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
    """Within, ctrl-C waits until the end, so that what is done to a model is done as a whole.

    See `hooked` for hooks that go on and come off; this is for objects with an ``__enter__`` of their own, which leave
    by `close_whole`.
    """

    def __init__(self) -> None:
        self._handler: Callable[..., object] | None = None
        self._signal: tuple[object, ...] = ()

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # no other thread is interrupted
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._handler = handler
                signal.signal(signal.SIGINT, self._wait)

    def _wait(self, *arguments: object) -> None:
        self._signal = arguments

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            if self._signal:
                self._handler(*self._signal)


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
        close_whole(stack)


def close_whole(stack: contextlib.ExitStack) -> None:
    """Leave everything that a stack has entered, even if ctrl-C comes meanwhile.

    Raises:
        KeyboardInterrupt: ctrl-C came; all is left nevertheless.
    """
    try:
        with Undivided():
            stack.close()
    except KeyboardInterrupt:  # it may have come just before `Undivided` began
        stack.close()
        raise


_RAISED: list[int] = []
"""Signals that have raised `Stopped` within `stopped_by_signals`."""


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Within, SIGTERM and SIGINT raise `Stopped`, so that files are left whole; a second signal ends the process.

    SLURM sends SIGTERM before it kills a job that is out of time or preempted. Outside the main thread, where Python
    has no signals, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {}

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        _RAISED.append(number)
        raise Stopped(number)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            handlers[number] = signal.signal(number, stop)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _RAISED.clear()


def stop_if_asked() -> None:
    """Raise `Stopped` again where Python has swallowed it, as it does in a destructor: to be called between batches."""
    if _RAISED:
        raise Stopped(_RAISED[0])
