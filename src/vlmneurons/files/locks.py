"""One process at a time in a folder that is written to."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from vlmneurons.errors import MismatchError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Refuse a second process in one folder; the lock ends with the process, however it ends.

    Where a file system has no locks (some of clusters), a marker file stands for one; where that cannot be made either,
    a warning says so, and batches are still whole and equal, whoever writes them.

    Raises:
        MismatchError: another process holds it.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    taken: FileLock | SoftFileLock | None = None
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
        taken = lock
        break
    try:
        yield
    finally:
        if taken is not None:
            taken.release()
