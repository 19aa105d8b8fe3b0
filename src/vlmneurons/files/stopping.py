"""Being told to stop: signals of a batch system or of the keyboard, which leave files whole."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stopped(KeyboardInterrupt):
    """The process was told to end: by ctrl-C, or by a batch system that will kill it soon.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


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
