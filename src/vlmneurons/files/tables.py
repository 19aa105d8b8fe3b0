"""The files of the library: one safetensors file with JSON in its metadata, checked before anything is believed.

A file is data, never code, and it is trusted only after its kind, version, tensor names, dtypes and checksum agree.
"""

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmneurons.checks import JSON, as_path
from vlmneurons.errors import FileFormatError, VLMNeuronsError
from vlmneurons.files.atomic import replacing

VERSION = 1
"""Version of the file layout; a reader refuses files of a later one."""

_DTYPES = {"I64": torch.int64, "F64": torch.float64}


def plain(data: object, what: str) -> Any:
    """A deep copy of JSON-able data as JSON gives it back: tuples become lists, and nothing is shared with the caller.

    Raises:
        VLMNeuronsError: the data cannot be written as JSON.
    """
    try:
        return parse(json.dumps(data, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise VLMNeuronsError(f"{what} must be plain values that JSON can hold: {error}") from error


_DEEPEST = 100
"""Nesting that JSON of a file may have: far more than the library writes, far less than Python's recursion allows."""


def parse(text: str) -> Any:
    """JSON of a file, strictly: what `plain` data cannot have been written as is refused, not repaired.

    Raises:
        ValueError: no JSON; NaN, infinity or a number that overflows; a name that stands twice in one object; nesting
            deeper than 100.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number that JSON has")

    def number(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(digits[:20])

    def once(pairs: list[tuple[str, object]]) -> JSON:
        made = dict(pairs)
        if len(made) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the name {next(name for name in made if names.count(name) > 1)!r} stands twice")
        return made

    data = json.loads(text, parse_constant=refuse, parse_float=number, object_pairs_hook=once)
    level = [data]
    for _ in range(_DEEPEST):
        level = [part for thing in level for part in _parts(thing)]
        if not level:
            return data
    raise ValueError(f"it is nested more than {_DEEPEST} deep")


def sealed(data: Mapping[str, object]) -> JSON:
    """Plain data with a checksum over the rest, under ``sha256``, as a file of JSON keeps it; see `unsealed`."""
    return {**data, "sha256": _seal(data)}


def unsealed(data: object) -> JSON:
    """Plain data of a file without its checksum, which must agree.

    Raises:
        ValueError: it does not, or there is none.
    """
    if not isinstance(data, dict):
        raise ValueError("no names and values")
    rest = {name: value for name, value in data.items() if name != "sha256"}
    if data.get("sha256") != _seal(rest):
        raise ValueError("the content does not agree with its checksum; the file is damaged")
    return rest


def _seal(data: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _parts(thing: object) -> Iterable[object]:
    return thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list) else ()


def check_regular(path: "str | os.PathLike[str]") -> None:
    """Refuse what is there but is no ordinary file: a pipe would be waited for without end, a device never ends.

    Raises:
        IsADirectoryError: a folder.
        FileFormatError: a pipe, socket or device.
    """
    if as_path("path", path, FileFormatError).is_dir():
        raise IsADirectoryError(f"{os.fspath(path)} is a folder, not a file")
    if Path(path).exists() and not Path(path).is_file():
        raise FileFormatError(f"{os.fspath(path)} is a pipe, socket or device, not a file")


def check_uncompressed(path: "str | os.PathLike[str]") -> None:
    """Refuse a zip archive that would unpack to more than its own size: PyTorch stores its archives as they are.

    Raises:
        FileFormatError: the archive is packed, or says that it is.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError):
        return  # no archive that could be unpacked
    size = os.path.getsize(path)
    if unpacked > size:
        raise FileFormatError(
            f"{os.fspath(path)}: {size:,} bytes that unpack to {unpacked:,}; torch.save packs nothing"
        )


def write(path: "str | os.PathLike[str]", kind: str, tensors: Mapping[str, Tensor], data: object) -> None:
    """Write a file in one step: the path holds the whole new file or, after a crash, what was there before.

    Raises:
        OSError: the file cannot be written, for want of space or permission.
    """
    path = as_path("path", path, FileFormatError)
    text = json.dumps(data, allow_nan=False, sort_keys=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": "vlmneurons",
        "kind": kind,
        "version": str(VERSION),
        "data": text,
        "sha256": _digest(kind, str(VERSION), text, tensors),
    }
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # how it passes on what the system said
            raise OSError(f"{path} cannot be written: {error}") from error
        _order_header(temporary)


def _order_header(path: Path) -> None:
    """Sort a file's metadata, whose order safetensors draws anew in every process: same content, same bytes."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # as it is, being the same text in another order; the format fills up with spaces
            file.seek(8)
            file.write(text.ljust(size))


def read(
    path: "str | os.PathLike[str]", kind: str, required: Mapping[str, str], optional: Mapping[str, str] | None = None
) -> tuple[dict[str, Tensor], Any]:
    """Tensors and JSON data of a file that `write` wrote.

    Args:
        path: the file.
        kind: what the file must hold.
        required: names and safetensors dtypes (``"I64"``, ``"F64"``) of the tensors that must be there.
        optional: the same of those that may be there.

    Raises:
        FileFormatError: the file is damaged, of another kind, or from a newer version.
        OSError: the file cannot be read.
    """
    allowed = {**required, **(optional or {})}
    check_regular(path)
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            _check_kind(path, kind, metadata)
            names = set(file.keys())
            if not set(required) <= names <= set(allowed):
                raise FileFormatError(
                    f"{path}: a {kind} file holds the tensors {', '.join(sorted(allowed))}; "
                    f"this one holds {', '.join(sorted(names)) or 'none'}"
                )
            tensors = {}
            for name in sorted(names):
                dtype = file.get_slice(name).get_dtype()
                if dtype != allowed[name]:
                    raise FileFormatError(f"{path}: tensor {name!r} is {dtype}; a {kind} file has {allowed[name]}")
                # A copy, because the tensor may be a view of the mapped file, which another program can change.
                tensors[name] = file.get_tensor(name).clone()
        if metadata.get("sha256") != _digest(kind, metadata["version"], metadata["data"], tensors):
            raise FileFormatError(f"{path}: the content does not agree with its checksum; the file is damaged")
        return tensors, parse(metadata["data"])
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OverflowError, RecursionError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(f"{path}: not a readable {kind} file: {error}") from error


Kind = TypeVar("Kind")
"""The kind of thing that is shared."""


class Shareable:
    """What `save` writes and `load` reads can be shared on the Hugging Face Hub."""

    __slots__ = ()

    def push_to_hub(self, repo_id: str, **how: Any) -> str:
        """Put this into a repository of the Hub, with a card; see `vlmneurons.push_to_hub` for the arguments.

        Args:
            repo_id: ``"name/repository"``.
            how: further arguments of `vlmneurons.push_to_hub`.

        Returns:
            The address of the commit.
        """
        from vlmneurons.statistics.hub import push_to_hub

        return push_to_hub(cast(Any, self), repo_id, **how)

    @classmethod
    def from_hub(cls: type[Kind], repo_id: str, *, revision: str | None = None, token: str | None = None) -> Kind:
        """What was put into a repository by `push_to_hub`; see `vlmneurons.from_hub`.

        Args:
            repo_id: ``"name/repository"``.
            revision: branch, tag or commit.
            token: a token of the Hub, for private repositories.
        """
        from vlmneurons.statistics.hub import from_hub

        return cast(Kind, from_hub(repo_id, revision=revision, kind=cls.__name__, token=token))


def _check_kind(path: "str | os.PathLike[str]", kind: str, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != "vlmneurons":
        raise FileFormatError(f"{path}: a safetensors file, but not one that vlmneurons wrote; expected a {kind}")
    if metadata.get("kind") != kind:
        raise FileFormatError(f"{path}: this file holds a {metadata.get('kind')}, not a {kind}")
    version = metadata.get("version", "")
    if not (version.isascii() and version.isdigit()) or len(version) > 6 or int(version) < 1:
        raise FileFormatError(f"{path}: {version!r} is not a version; the file is damaged")
    if int(version) > VERSION:
        raise FileFormatError(
            f"{path}: written as version {version}, this library reads up to {VERSION}; update vlmneurons"
        )


def _digest(kind: str, version: str, text: str, tensors: Mapping[str, Tensor]) -> str:
    """A checksum over everything that a file says. It finds damage; it is no signature."""
    digest = hashlib.sha256(f"{kind}\0{version}\0{text}".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.numpy().reshape(-1).data.cast("B"))
    return digest.hexdigest()
