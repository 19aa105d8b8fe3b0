"""Runs that survive: a folder that says what is run and holds every finished batch.

A run can be killed at any moment, also with ``kill -9``: calling it again goes on at the first batch that is not there,
and ends with the same files as an undisturbed run. A batch's file appears whole or not at all (it is written beside its
place, flushed to disk, and renamed), and the manifest is compared before anything is added, so that answers of
different models, questions or rules never meet in one folder.
"""

import contextlib
import datetime
import hashlib
import json
import logging
import os
import platform
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmneurons.errors import FileFormatError, MismatchError

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

_VERSION = 1


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

    def stop(number: int, _: Any) -> None:
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


class RunFolder:
    """The folder of one run: ``manifest.json``, ``sessions.jsonl``, and ``parts/`` with the finished batches.

    What is to be remembered of a batch (that it did not fit into memory) stands beside it, as JSON: several processes
    can write into one folder, because a batch is one process's.

    Args:
        folder: where; made if it is not there.
        manifest: what is run, as plain values. A folder of another manifest is refused.

    Raises:
        MismatchError: the folder holds another run; the message says what differs.
        FileFormatError: its manifest is damaged.
    """

    def __init__(self, folder: "str | os.PathLike[str]", manifest: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.manifest = json.loads(json.dumps({"version": _VERSION, **manifest}, default=str))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._compare()

    def _compare(self) -> None:
        path = self.folder / "manifest.json"
        if not path.exists():
            return
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(theirs, dict):
                raise ValueError("not a manifest")
        except (OSError, ValueError, RecursionError) as error:
            raise FileFormatError(f"{path} is damaged: {error}") from error
        differs = list(_differences(theirs, self.manifest))
        if differs:
            raise MismatchError(
                f"{self.folder} holds another run: {'; '.join(differs[:3])}. Give another folder, or the same settings "
                "to go on with that run"
            )

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the folder for this process, write the manifest if there is none, and note the session.

        Raises:
            MismatchError: another process is running in the folder, or has begun another run in it meanwhile.
        """
        with locked(self.folder):
            self._compare()
            path = self.folder / "manifest.json"
            if not path.exists():
                write_text(path, json.dumps(self.manifest, indent=1))
            for left in [*self.folder.glob(".new-*"), *(self.folder / "parts").glob(".new-*")]:
                left.unlink()  # of a write that was killed
            with open(self.folder / "sessions.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(session()) + "\n")
            yield

    def parts(self) -> "dict[str, pd.DataFrame]":
        """The finished batches by name.

        Raises:
            FileFormatError: one of them is damaged; delete it, and it is run again.
        """
        read = {}
        for path in sorted((self.folder / "parts").glob("*.parquet")):
            try:
                read[path.stem] = read_parquet(path)
            except (OSError, ValueError) as error:
                raise FileFormatError(f"{path} is damaged ({error}): delete it, and its batch is run again") from error
        return read

    def write(self, name: str, table: "pd.DataFrame") -> None:
        """Keep a finished batch."""
        stop_if_asked()
        (self.folder / "parts").mkdir(exist_ok=True)
        write_parquet(self.folder / "parts" / f"{name}.parquet", table)

    def note(self, name: str, halved: Sequence[Mapping[str, Any]]) -> None:
        """Keep how a batch was halved for want of memory; to be called before the batch is kept."""
        (self.folder / "parts").mkdir(exist_ok=True)
        write_text(self.folder / "parts" / f"{name}.json", json.dumps(list(halved)))

    def notes(self) -> dict[str, list[dict[str, Any]]]:
        """How batches were halved for want of memory, by the name of the batch.

        Raises:
            FileFormatError: a note is damaged; delete it, and only the provenance will lack it.
        """
        read = {}
        for path in sorted((self.folder / "parts").glob("*.json")):
            try:
                halved = json.loads(path.read_text(encoding="utf-8"))
                read[path.stem] = [
                    {"from": int(one["from"]), "to": int(one["to"]), "first": str(one["first"])} for one in halved
                ]
            except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
                raise FileFormatError(f"{path} is damaged ({error}): delete it, and the run goes on") from error
        return read

    def clear(self) -> None:
        """Remove the batches' files, which the finished result has taken the place of."""
        for path in [*(self.folder / "parts").glob("*.parquet"), *(self.folder / "parts").glob("*.json")]:
            path.unlink()
        with contextlib.suppress(OSError):
            (self.folder / "parts").rmdir()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Refuse a second process in one folder; the lock ends with the process, however it ends.

    Raises:
        MismatchError: another process holds it.
    """
    import fcntl

    with open(folder / ".lock", "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MismatchError(
                f"{folder} is in use by another process; wait for it, or give another folder"
            ) from error
        except OSError as error:
            # Some cluster file systems have no locks. Batches are still whole and equal, whoever writes them.
            log.warning("%s cannot be locked (%s): make sure that no other process runs in it", folder, error)
        yield


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[str]:
    """A file beside ``path`` to write to, which then takes its place in one step."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # the rename itself, where folders can be flushed
            place = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(place)
            finally:
                os.close(place)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    with _replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def write_parquet(path: Path, table: "pd.DataFrame") -> None:
    """Write a table in one step, each of its pages with a checksum."""
    with _replacing(path) as temporary:
        table.to_parquet(temporary, index=False, compression="zstd", write_page_checksum=True)


def read_parquet(path: Path) -> "pd.DataFrame":
    """A table that `write_parquet` wrote.

    Raises:
        OSError: a page does not agree with its checksum.
    """
    import pandas as pd

    return pd.read_parquet(path, page_checksum_verification=True)


def _differences(theirs: Any, ours: Any, name: str = "") -> Iterator[str]:
    """What differs between two manifests, in words."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*theirs, *ours}):
            yield from _differences(theirs.get(key), ours.get(key), f"{name}.{key}" if name else key)
    elif theirs != ours:
        yield f"its {name} is {_short(theirs)}, not {_short(ours)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


# -- what was run, on what ---------------------------------------------------------------------------------------------


def session() -> dict[str, Any]:
    """When, where and from which state of the code a run is started."""
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "platform": platform.platform(),
        "git": git_state(),
    }


def git_state(folder: "str | os.PathLike[str] | None" = None) -> dict[str, Any] | None:
    """Commit of the repository that a folder (by default the working directory) is in, and whether it is changed.

    None outside of a repository, or without git.
    """

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def digest_of_file(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
