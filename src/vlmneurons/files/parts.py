"""The folders of a run that was asked in parts, and whether they are all of it: what may be joined.

A part's manifest is that of the whole, with ``part`` and ``batches`` (how the whole's batches were dealt out) besides;
and it keeps, under ``about``, which questions it asks.
"""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from vlmneurons.checks import JSON, JSONMapping, as_path, check_ordered, quoted
from vlmneurons.errors import FileFormatError, MismatchError
from vlmneurons.files.folders import completed, differences, manifest_in

_OWN = ("part", "batches", "about")


@dataclass(frozen=True)
class PartFolder:
    """The folder of one part.

    Attributes:
        folder: where.
        name: which part it is, such as ``"3/8"``.
        manifest: what is run, without ``about``.
        about: what is kept beside it.
    """

    folder: Path
    name: str
    manifest: JSONMapping
    about: JSONMapping

    @property
    def number(self) -> tuple[int, int]:
        """Its number, from 1, and that of all parts."""
        number, count = self.name.split("/")
        return int(number), int(count)

    def refuse_unfinished(self, done: Collection[str]) -> None:
        """Refuse a part that does not hold exactly what it asks.

        Args:
            done: ids of the questions that it holds.

        Raises:
            MismatchError: it does not.
        """
        asks = set(self.about["asks"])
        if lacking := sorted(asks - set(done)):
            raise MismatchError(
                f"part {self.name} in {self.folder} is not finished: {len(lacking)} of its {len(asks)} questions are "
                f"not there ({quoted(lacking)}). The same call goes on with it"
            )
        if foreign := sorted(set(done) - asks):
            raise MismatchError(
                f"part {self.name} in {self.folder} holds {len(foreign)} questions that are another part's "
                f"({quoted(foreign)}): its batches were cut otherwise when it was gone on with. Run it again elsewhere"
            )


def parts_of(folders: Sequence[str | os.PathLike[str]], kind: str) -> tuple[list[PartFolder], JSON, JSON]:
    """All parts of a run in their order, and the manifest that the undivided run has, with what it keeps beside it.

    Args:
        folders: of the parts, in any order.
        kind: of the run's manifest.

    Raises:
        MismatchError: what is given are not the parts of one run, each once and all of them; the message says why.
        FileFormatError: a manifest is damaged.
    """
    check_ordered("folders", folders, MismatchError, "the folders of the parts")
    folders = folders if isinstance(folders, str | os.PathLike) else list(folders)
    if isinstance(folders, str | os.PathLike) or not folders:
        raise MismatchError(f"give the folders of all parts, as a list; got {folders!r}")
    parts = sorted((_part_in(as_path("folder", one, MismatchError), kind) for one in folders), key=lambda p: p.number)
    first = parts[0]
    for before, part in pairwise(parts):
        if part.number[1] != first.number[1]:
            raise MismatchError(
                f"{first.folder} is part {first.name}, and {part.folder} part {part.name}: not of one run"
            )
        differs = list(differences(_shared(part), _shared(first)))
        if differs:
            raise MismatchError(
                f"{part.folder} is not of the run that {first.folder} is a part of: {'; '.join(differs[:3])}"
            )
        if part.number == before.number:
            raise MismatchError(f"part {part.name} is there twice: {before.folder} and {part.folder}. Give each once")
        if _order(part) != _order(first):
            raise MismatchError(
                f"{part.folder} and {first.folder} were begun with their questions in different orders, from which "
                "batches are cut: run one of them again, in the other's order and a new folder"
            )
    count = first.number[1]
    if lacking := [f"{n}/{count}" for n in range(1, count + 1) if n not in {part.number[0] for part in parts}]:
        raise MismatchError(f"{len(lacking)} of {count} parts are lacking: {', '.join(lacking)}. Give all of them")
    asked = [name for part in parts for name in part.about["asks"]]
    if sorted(asked) != sorted(_order(first)):
        twice, none = {name for name, n in Counter(asked).items() if n > 1}, set(_order(first)) - set(asked)
        raise MismatchError(
            f"the parts do not ask each question once ({quoted(sorted(twice | none))}): pictures that could not be "
            "read when one of them was begun were dealt out otherwise. Run the parts again, in new folders"
        )
    content = dict(first.manifest["content"])
    for part in parts[1:]:
        content = completed(content, part.manifest["content"])
    manifest = {name: value for name, value in first.manifest.items() if name not in _OWN} | {"content": content}
    return parts, manifest, {name: value for name, value in first.about.items() if name not in ("asks", "options")}


def kind_in(folder: str | os.PathLike[str]) -> str:
    """Of what kind the run in a folder is.

    Raises:
        MismatchError: there is none.
        FileFormatError: its manifest is damaged.
    """
    where = as_path("folder", folder, MismatchError)
    manifest = manifest_in(where)
    if manifest is None:
        raise MismatchError(f"{where} holds no run: there is no manifest.json")
    return str(manifest.get("kind"))


def _part_in(folder: Path, kind: str) -> PartFolder:
    found, manifest = kind_in(folder), manifest_in(folder) or {}
    if found != kind:
        raise MismatchError(f"{folder} holds {found!r}, and not {kind!r}: runs of one kind are joined")
    if "part" not in manifest:
        raise MismatchError(f"{folder} is no part: it holds an undivided run, which needs no joining")
    try:
        about = dict(manifest.pop("about"))
        part = PartFolder(folder, str(manifest["part"]), manifest, about)
        if not {*about["asks"]} <= {*_order(part)} or part.number < (1, 1):
            raise ValueError("it asks what it does not know")
    except (LookupError, TypeError, ValueError) as error:
        raise FileFormatError(f"{folder / 'manifest.json'} is not one of a part: {error!r}") from error
    return part


def _shared(part: PartFolder) -> JSON:
    return {name: value for name, value in part.manifest.items() if name != "part"}


def _order(part: PartFolder) -> list[str]:
    return list(part.about["ids"]) if "ids" in part.about else [item["id"] for item in part.about["items"]]
