"""The files of the library: one safetensors file with JSON in its metadata, checked before anything is believed.

A file is data, never code, and it is trusted only after its kind, version, tensor names, dtypes and checksum agree.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmneurons.errors import FileFormatError, VLMNeuronsError

VERSION = 1
"""Version of the file layout; a reader refuses files of a later one."""

_DTYPES = {"I64": torch.int64, "F64": torch.float64}


def plain(data: Any, what: str) -> Any:
    """A deep copy of JSON-able data as JSON gives it back: tuples become lists, and nothing is shared with the caller.

    Raises:
        VLMNeuronsError: the data cannot be written as JSON.
    """
    try:
        return json.loads(json.dumps(data, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise VLMNeuronsError(f"{what} must be plain values that JSON can hold: {error}") from error


def write(path: "str | os.PathLike[str]", kind: str, tensors: Mapping[str, Tensor], data: Any) -> None:
    """Write a file in one step: the path holds the whole new file or, after a crash, what was there before."""
    path = Path(path)
    text = json.dumps(data, allow_nan=False, sort_keys=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": "vlmneurons",
        "kind": kind,
        "version": str(VERSION),
        "data": text,
        "sha256": _digest(kind, str(VERSION), text, tensors),
    }
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        # mkstemp makes a private file; what the user gets should be as readable as any file that they write.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
    if Path(path).is_dir():
        raise IsADirectoryError(f"{os.fspath(path)} is a folder, not a file that holds a {kind}")
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
        return tensors, json.loads(metadata["data"])
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OverflowError, RecursionError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(f"{path}: not a readable {kind} file: {error}") from error


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
        digest.update(memoryview(tensor.numpy().reshape(-1)).cast("B"))
    return digest.hexdigest()
