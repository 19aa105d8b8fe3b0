"""Writing so that a crash cannot leave half a file: all files of the library are written in this way.

A file is written beside its place under a name that begins with ``.new-``, flushed to disk, and renamed: its place
holds the whole old file or the whole new one. The same content gives the same bytes.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

Writer = Callable[[Path], object]
"""Writes one file, given its path."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place in one step when the block ends.

    Raises:
        OSError: the file cannot be written, for want of space or permission; what was there before stays.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        _put(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _put(temporary: Path, path: Path) -> None:
    """Give a finished file its name and the rights that any file of the user's has (mkstemp makes private ones)."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)
    os.replace(temporary, path)
    with contextlib.suppress(OSError):  # the rename itself, where folders can be flushed
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def leftovers(folder: Path) -> Iterator[Path]:
    """Files that a killed write has left in a folder; whoever holds the folder's lock may remove them."""
    return folder.glob(".new-*")


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: object, *, indent: int | None = None) -> None:
    """Write plain values as JSON in one step, keys in order."""
    write_text(path, json.dumps(data, allow_nan=False, sort_keys=True, indent=indent))


def parquet(table: "pd.DataFrame") -> Writer:
    """A writer of a table, each of its pages with a checksum."""
    return lambda path: table.to_parquet(path, index=False, compression="zstd", write_page_checksum=True)


def write_parquet(path: Path, table: "pd.DataFrame") -> None:
    """Write a table in one step, each of its pages with a checksum."""
    with replacing(path) as temporary:
        parquet(table)(temporary)


def read_parquet(path: Path) -> "pd.DataFrame":
    """A table that `write_parquet` wrote.

    Raises:
        OSError: a page does not agree with its checksum.
    """
    import pandas as pd

    return pd.read_parquet(path, page_checksum_verification=True)
