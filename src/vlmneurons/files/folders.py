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


def differences(kept: object, expected: object, name: str = "") -> Iterator[str]:
    """The differences between a manifest that was kept and the expected one, in words.

    Args:
        kept: the manifest that is there, or one of its entries.
        expected: what it should be.
        name: of the entry; of the one called ``content`` the questions that differ are named.
    """
    if name == "content" and isinstance(kept, Mapping) and isinstance(expected, Mapping):
        yield from _differing_questions(kept, expected)
    elif isinstance(kept, Mapping) and isinstance(expected, Mapping):
        for key in sorted({*kept, *expected}, key=lambda key: (key == "content", key)):
            inner = key if name in ("", "setting") else f"{name}.{key}"  # the words of a setting need no prefix
            yield from differences(kept.get(key), expected.get(key), inner)
    elif kept != expected:
        yield f"its {name} is {_short(kept)}, not {_short(expected)}"


def _differing_questions(kept: Mapping[str, object], expected: Mapping[str, object]) -> Iterator[str]:
    if lacking := [question for question in expected if question not in kept]:
        yield f"it lacks {_some_questions(lacking)}"
    if further := [question for question in kept if question not in expected]:
        yield f"it has besides {_some_questions(further)}"
    both = {question: (kept[question], expected[question]) for question in expected if question in kept}
    if changed := [question for question, (a, b) in both.items() if _completed(a, b) != _completed(b, a)]:
        yield f"{_some_questions(changed)} had another text, options, answer, group or picture there"


def completed(content: Mapping[str, str], counterpart: Mapping[str, str]) -> dict[str, str]:
    """What is asked, by question; what this run could not read is taken from another run of the same questions."""
    return {question: _completed(digests, counterpart[question]) for question, digests in content.items()}


def _completed(digests: object, counterpart: object) -> str:
    """Digests of a question's text, pictures and so on; one that is lacking (``?``) is taken from the counterpart."""
    pairs = zip(str(digests).split(), str(counterpart).split())
    return " ".join(substitute if digest == "?" else digest for digest, substitute in pairs)


def _some_questions(names: Sequence[str]) -> str:
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
        """Where the manifest is."""
        return self.folder / "manifest.json"

    def check(self) -> None:
        """Refuse a folder of another run.

        Raises:
            MismatchError: it is; the message says what differs.
            FileFormatError: its manifest is damaged.
        """
        kept = manifest_in(self.folder)
        if kept is None:
            return
        if kept.get("version") != VERSION:
            raise MismatchError(
                f"{self.folder} was begun by an earlier release, which did not keep of which weights, pictures and "
                "settings it is: what it holds can be read, but not gone on with. Give another folder"
            )
        kept.pop("about", None)
        if differs := list(differences(kept, self.manifest)):
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
            for path in [*leftovers(self.folder), *leftovers(self.folder / "parts")]:
                path.unlink()  # of a write that was killed
            if note_session:
                with open(self.folder / "sessions.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(session()) + "\n")
            yield

    def begin(self) -> None:
        """Write the manifest if there is none, or what it could not know yet; whoever calls this holds the folder."""
        kept = manifest_in(self.folder)
        if kept is None:
            about = {"about": self.about} if self.about else {}
            write_json(self.path, sealed({**self.manifest, **about}), indent=1)
        elif "?" in " ".join(map(str, kept.get("content", {}).values())).split():
            content = completed(kept["content"], self.manifest["content"])
            write_json(self.path, sealed({**kept, "content": content}), indent=1)

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
            notes = json.loads(path.read_text(encoding="utf-8"))
            return [{"from": int(note["from"]), "to": int(note["to"]), "first": str(note["first"])} for note in notes]

        return self._read("json", halved, "the run goes on")

    def _read(self, kind: str, read: Callable[[Path], T], then: str) -> dict[str, T]:
        """What the files of one kind hold, by the names of their batches."""
        by_batch = {}
        for path in sorted((self.folder / "parts").glob(f"*.{kind}")):
            try:
                by_batch[path.stem] = read(path)
            except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
                raise FileFormatError(f"{path} is damaged ({error}): delete it, and {then}") from error
        return by_batch

    def clear(self) -> None:
        """Remove the batches' files: the finished result has taken their place."""
        for path in [*(self.folder / "parts").glob("*.parquet"), *(self.folder / "parts").glob("*.json")]:
            path.unlink()
        with contextlib.suppress(OSError):
            (self.folder / "parts").rmdir()

    def tidy(self) -> None:
        """Clear a finished run that was killed before it could; see `clear`.

        One that another process is just clearing, or that can only be read, is left as it is.
        """
        if (self.folder / "parts").exists():
            with contextlib.suppress(MismatchError, OSError), locked(self.folder):
                self.clear()


# -- when, where, and from which state of the code ---------------------------------------------------------------------


def session() -> JSON:
    """When and where a run is started, and from which state of the code."""
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "platform": platform.platform(),
        "git": git_state(),
    }


def git_state(folder: "str | os.PathLike[str] | None" = None) -> JSON | None:
    """Commit of the repository that a folder is in, and whether files differ from it; None without one, or without git.

    Nothing that the repository names is run: neither its file-system monitor, nor filters, nor hooks.

    Args:
        folder: by default the working directory.
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
        filters = git("config", "--local", "--name-only", "--get-regexp", r"^filter\.", allowed=(0, 1)).split()
        no_filters = [part for name in filters if not name.endswith(".required") for part in ("-c", f"{name}=")]
        return {"commit": commit, "changed": bool(git(*no_filters, "status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
