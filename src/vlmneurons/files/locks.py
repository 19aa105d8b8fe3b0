"""A lock on a folder: one process at a time writes into it."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from vlmneurons.errors import MismatchError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Refuse a second process in one folder; the lock ends with the process, however it ends.

    Some file systems, such as those of some clusters, have no locks: there a marker file stands for one. Where that
    cannot be made either, a warning says so; batches are still whole, and the same whoever writes them.

    Raises:
        MismatchError: another process holds it.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    held: FileLock | SoftFileLock | None = None
    for kind, name in ((FileLock, ".lock"), (SoftFileLock, ".lock-marker")):
        lock = kind(folder / name, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            advice = f" (if it was killed, delete {folder / name})" if kind is SoftFileLock else ""
            raise MismatchError(
                f"{folder} is in use by another process{advice}; wait for it, or give another folder"
            ) from error
        except (OSError, NotImplementedError) as error:
            log.warning("%s cannot be locked (%s): make sure that no other process runs in it", folder, error)
            continue
        held = lock
        break
    try:
        yield
    finally:
        if held is not None:
            held.release()
