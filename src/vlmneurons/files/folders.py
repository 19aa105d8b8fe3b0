"""A run's folder: what is run, who may go on with it, and every finished batch.

A run can be killed at any moment, also with ``kill -9``: calling it again goes on at the first batch that is not there,
and ends with the same files as an undisturbed run. The manifest is compared before anything is added, so that numbers
of different models, questions or rules never meet in one folder.
"""

import contextlib
import datetime
import json
import os
import platform
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vlmneurons.checks import JSON, JSONMapping, quoted
from vlmneurons.errors import FileFormatError, MismatchError
from vlmneurons.files.atomic import leftovers, read_parquet, write_json, write_parquet
from vlmneurons.files.locks import locked
from vlmneurons.files.stopping import stop_if_asked
from vlmneurons.files.tables import parse, sealed, unsealed

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
VERSION = 2
"""Of manifests. Those of version 1 do not say which weights, pictures and settings they are of."""


def differences(theirs: object, ours: object, name: str = "") -> Iterator[str]:
    """What differs between two manifests, in words; ``content`` names the questions that do."""
    if name == "content" and isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        yield from _differing_questions(theirs, ours)
    elif isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in sorted({*theirs, *ours}, key=lambda key: (key == "content", key)):
            inner = key if name in ("", "setting") else f"{name}.{key}"  # the words of a setting need no prefix
            yield from differences(theirs.get(key), ours.get(key), inner)
    elif theirs != ours:
        yield f"its {name} is {_short(theirs)}, not {_short(ours)}"


def _differing_questions(theirs: Mapping[str, object], ours: Mapping[str, object]) -> Iterator[str]:
    for what, one, other in (("lacks", ours, theirs), ("has besides", theirs, ours)):
        if rest := [key for key in one if key not in other]:
            yield f"it {what} {_some(rest)}"

    changed = [
        key for key in ours if key in theirs and _known(theirs[key], ours[key]) != _known(ours[key], theirs[key])
    ]
    if changed:
        yield f"{_some(changed)} had another text, options, answer, group or picture there"


def completed(content: Mapping[str, str], other: Mapping[str, str]) -> dict[str, str]:
    """What is asked, by question, where what one run could not read (``?``) is as the other has it."""
    return {key: " ".join(_known(value, other[key])) for key, value in content.items()}


def _known(content: object, other: object) -> list[str]:
    """The parts of a question's content, where what one run could not read (``?``) is as the other has it."""
    return [theirs if part == "?" else part for part, theirs in zip(str(content).split(), str(other).split())]


def _some(names: Sequence[str]) -> str:
    """Some questions by name: ``question 'a'``, or ``12 questions ('a', 'b', …)``."""
    if len(names) == 1:
        return f"question {names[0]!r}"
    return f"{len(names)} questions ({quoted(names)})"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def manifest_in(folder: Path) -> JSON | None:
    """The manifest of a folder, if there is one; nothing is made.

    Args:
        folder: where.

    Raises:
        FileFormatError: it is damaged.
    """
    path = folder / "manifest.json"
    if not path.exists():
        return None
    try:
        manifest = parse(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("not a manifest")
        return unsealed(manifest) if manifest.get("version") == VERSION else manifest
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is damaged: {error}") from error


class RunFolder:
    """The folder of one run: ``manifest.json``, ``sessions.jsonl``, and ``parts/`` with the finished batches.

    What is to be remembered of a batch (that it did not fit into memory) stands beside it, as JSON: several processes
    can write into one folder, because a batch is one process's.

    Args:
        folder: where; made if it is not there.
        manifest: what is run, as plain values: ``kind``, ``setting``, ``content`` by question, and whatever else must
            be the same. A folder of another manifest is refused.
        about: what is kept beside it and not compared.

    Raises:
        MismatchError: the folder holds another run; the message says what differs.
        FileFormatError: its manifest is damaged.
    """

    def __init__(
        self, folder: "str | os.PathLike[str]", manifest: JSONMapping, about: JSONMapping | None = None
    ) -> None:
        self.folder = Path(folder)
        self.manifest = json.loads(json.dumps({"version": VERSION, **manifest}, default=str, allow_nan=False))
        self.about = json.loads(json.dumps(about or {}, default=str, allow_nan=False))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.check()

    @property
    def path(self) -> Path:
        """Of the manifest."""
        return self.folder / "manifest.json"

    def known(self) -> JSON | None:
        """The manifest that is there, if one is.

        Raises:
            FileFormatError: it is damaged.
        """
        return manifest_in(self.folder)

    def check(self) -> None:
        """Refuse a folder of another run.

        Raises:
            MismatchError: it is; the message says what differs.
            FileFormatError: its manifest is damaged.
        """
        theirs = self.known()
        if theirs is None:
            return
        if theirs.get("version") != VERSION:
            raise MismatchError(
                f"{self.folder} was begun by an earlier release, which did not keep of which weights, pictures and "
                "settings it is: what it holds can be read, but not gone on with. Give another folder"
            )
        differs = list(differences({key: value for key, value in theirs.items() if key != "about"}, self.manifest))
        if differs:
            raise MismatchError(
                f"{self.folder} holds another run: {'; '.join(differs[:3])}. Give another folder, or the same settings "
                "to go on with that run"
            )

    @contextlib.contextmanager
    def opened(self, *, note_session: bool = True) -> Iterator[None]:
        """Hold the folder for this process, write the manifest if there is none, and note the session.

        Args:
            note_session: whether to add a line to ``sessions.jsonl``.

        Raises:
            MismatchError: another process is running in the folder, or has begun another run in it meanwhile.
        """
        with locked(self.folder):
            self.check()
            self.begin()
            for left in [*leftovers(self.folder), *leftovers(self.folder / "parts")]:
                left.unlink()  # of a write that was killed
            if note_session:
                with open(self.folder / "sessions.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(session()) + "\n")
            yield

    def begin(self) -> None:
        """Write the manifest if there is none, or what it could not know yet; whoever calls this holds the folder."""
        theirs = self.known()
        if theirs is not None and "?" in " ".join(map(str, theirs.get("content", {}).values())).split():
            content = completed(theirs["content"], self.manifest["content"])
            write_json(self.path, sealed({**theirs, "content": content}), indent=1)
        if theirs is None:
            about = {"about": self.about} if self.about else {}
            write_json(self.path, sealed({**self.manifest, **about}), indent=1)

    def parts(self) -> "dict[str, pd.DataFrame]":
        """The finished batches by name.

        Raises:
            FileFormatError: one of them is damaged; delete it, and it is run again.
        """
        return self._read("parquet", read_parquet, "its batch is run again")

    def write(self, name: str, table: "pd.DataFrame") -> None:
        """Keep a finished batch."""
        stop_if_asked()
        (self.folder / "parts").mkdir(exist_ok=True)
        write_parquet(self.folder / "parts" / f"{name}.parquet", table)

    def note(self, name: str, halved: Sequence[Mapping[str, object]]) -> None:
        """Keep how a batch was halved for want of memory; to be called before the batch is kept."""
        (self.folder / "parts").mkdir(exist_ok=True)
        write_json(self.folder / "parts" / f"{name}.json", list(halved))

    def notes(self) -> dict[str, list[JSON]]:
        """How batches were halved for want of memory, by the name of the batch.

        Raises:
            FileFormatError: a note is damaged; delete it, and only the provenance will lack it.
        """

        def halved(path: Path) -> list[JSON]:
            told = json.loads(path.read_text(encoding="utf-8"))
            return [{"from": int(one["from"]), "to": int(one["to"]), "first": str(one["first"])} for one in told]

        return self._read("json", halved, "the run goes on")

    def _read(self, kind: str, read: Callable[[Path], T], then: str) -> dict[str, T]:
        """What the files of one kind hold, by the names of their batches."""
        found = {}
        for path in sorted((self.folder / "parts").glob(f"*.{kind}")):
            try:
                found[path.stem] = read(path)
            except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
                raise FileFormatError(f"{path} is damaged ({error}): delete it, and {then}") from error
        return found

    def clear(self) -> None:
        """Remove the batches' files, which the finished result has taken the place of."""
        for path in [*(self.folder / "parts").glob("*.parquet"), *(self.folder / "parts").glob("*.json")]:
            path.unlink()
        with contextlib.suppress(OSError):
            (self.folder / "parts").rmdir()

    def tidy(self) -> None:
        """`clear` a finished run that was killed before it could; not one that another process is just clearing, nor
        one that can only be read.
        """
        if (self.folder / "parts").exists():
            with contextlib.suppress(MismatchError, OSError), locked(self.folder):
                self.clear()


# -- when, where, and from which state of the code ---------------------------------------------------------------------


def session() -> JSON:
    """When, where and from which state of the code a run is started."""
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "platform": platform.platform(),
        "git": git_state(),
    }


def git_state(folder: "str | os.PathLike[str] | None" = None) -> JSON | None:
    """Commit of the repository that a folder (by default the working directory) is in, and whether it is changed.

    Nothing that the repository names is run: neither its file-system monitor, nor filters, nor hooks. None outside of a
    repository, or without git.
    """

    def git(*arguments: str, allowed: tuple[int, ...] = (0,)) -> str:
        command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null"]
        done = subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
        if done.returncode not in allowed:
            raise OSError(done.stderr)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        # A filter of the repository's own settings would be run on files whose times have changed.
        own = git("config", "--local", "--name-only", "--get-regexp", r"^filter\.", allowed=(0, 1)).split()
        without = [part for name in own if not name.endswith(".required") for part in ("-c", f"{name}=")]
        return {"commit": commit, "changed": bool(git(*without, "status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
