"""The files of a recording of single questions: a row a question in every table, and a record that says it is there.

``items.bin`` has one small record a question, and each table has a file with one row a question: ``positive.bin`` (the
counts), and where they are kept ``reached.bin``, ``total.bin``, ``maximum.bin`` and the user's own statistics. A row is
written before the record that says it is there: a recording that is killed at any moment can be gone on with, with
nothing lost but the batch that it was at, and nothing counted twice.
"""

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from vlmneurons.errors import FileFormatError, MismatchError

RECORD = np.dtype([("done", "u1"), ("chosen", "<i4"), ("tokens", "<i8"), ("margin", "<f8"), ("checksum", "<u4")])
"""What is kept of a question beside its rows: the option that was chosen (-1 for none) and its margin in nats."""

TABLES = {"positive": np.dtype("<u2"), "reached": np.dtype("<u4"), "total": np.dtype("<f4"), "maximum": np.dtype("<f4")}
"""The library's own tables, and how their numbers are kept."""

Tables = Mapping[str, ArrayLike]
"""Rows of tables ``[row, …]``, by the name of the table."""

_MOST_TOKENS = np.iinfo(TABLES["positive"]).max


class ItemFiles:
    """The tables of one recording.

    Args:
        folder: where they are.
        n_items: how many questions the recording has.
        columns: how many columns each table has, by name.
    """

    def __init__(self, folder: Path, n_items: int, columns: Mapping[str, int]) -> None:
        self.folder, self.n_items, self.columns = folder, n_items, columns

    def _sizes(self) -> dict[str, int]:
        """How many bytes each file has."""
        tables = {name: self.n_items * width * _dtype(name).itemsize for name, width in self.columns.items()}
        return {"items": self.n_items * RECORD.itemsize, **tables}

    def make(self) -> None:
        """Make files of zeros, in which no question is done; they are sparse: disk is used as rows are written."""
        for name, size in self._sizes().items():
            with open(self.folder / f"{name}.bin", "wb") as file:
                file.truncate(size)

    def check_sizes(self) -> None:
        """Refuse files that are too long, too short or not there.

        Raises:
            FileFormatError: one is; the message names it.
        """
        for name, size in self._sizes().items():
            path = self.folder / f"{name}.bin"
            length = path.stat().st_size if path.is_file() else None
            if length != size:
                raise FileFormatError(
                    f"{path} should have {size:,} bytes; it has {length if length is None else f'{length:,}'}"
                )

    @property
    def records(self) -> np.ndarray:
        """The record of each question."""
        return np.fromfile(self.folder / "items.bin", dtype=RECORD)

    def table(self, name: str) -> "np.memmap | StackedTable":
        """A table, whose rows are read from disk as they are needed."""
        shape = (self.n_items, self.columns[name])
        return np.memmap(self.folder / f"{name}.bin", dtype=_dtype(name), mode="r", shape=shape)

    def write(self, rows: Sequence[int], tables: Tables, **fields: ArrayLike) -> None:
        """Write finished questions: first all of their rows, then the records that say so.

        Args:
            rows: which questions.
            tables: ``[row, …]`` of each table.
            fields: ``[row]`` of each field of a record that is not filled in here: ``chosen``, ``tokens``, ``margin``.

        Raises:
            MismatchError: a question has more counted tokens than the files hold.
        """
        places = np.asarray(rows)
        blocks = {}
        for name in self.columns:
            values = np.asarray(tables[name])
            if name == "positive" and values.size and values.max() > _MOST_TOKENS:
                raise MismatchError(
                    f"a question has more than {_MOST_TOKENS:,} counted tokens; item statistics hold no more"
                )
            blocks[name] = np.ascontiguousarray(values.astype(_dtype(name)))
            self._put(name, places, blocks[name])
        records = np.zeros(len(places), dtype=RECORD)
        records["done"] = 1
        for name, values in fields.items():
            records[name] = np.asarray(values)
        for n in range(len(places)):
            records["checksum"][n] = _checksum(records[n], [block[n] for block in blocks.values()])
        self._put("items", places, records)

    def _put(self, name: str, places: np.ndarray, rows: np.ndarray) -> None:
        """Write rows of a file at their places, and have them on disk."""
        with open(self.folder / f"{name}.bin", "r+b") as file:
            for place, row in zip(places.tolist(), rows, strict=True):
                file.seek(place * row.nbytes)
                file.write(row.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def damaged_rows(self) -> Iterator[int]:
        """Rows of finished questions that do not agree with their checksum."""
        tables = [self.table(name) for name in self.columns]
        for row, record in enumerate(self.records):
            if record["done"] and _checksum(record, [table[row] for table in tables]) != record["checksum"]:
                yield row


class StackedFiles(ItemFiles):
    """The tables of several recordings, one below the other: rows are read from their own files, and never written."""

    def __init__(self, parts: Sequence[ItemFiles]) -> None:
        folder = Path(" + ".join(str(part.folder) for part in parts))
        super().__init__(folder, sum(part.n_items for part in parts), parts[0].columns)
        self.parts = [single for part in parts for single in (part.parts if isinstance(part, StackedFiles) else [part])]

    @property
    def records(self) -> np.ndarray:
        """See `ItemFiles.records`."""
        return np.concatenate([part.records for part in self.parts])

    def table(self, name: str) -> "StackedTable":
        """See `ItemFiles.table`."""
        return StackedTable([part.table(name) for part in self.parts])

    def damaged_rows(self) -> Iterator[int]:
        """See `ItemFiles.damaged_rows`: each part's own, whose checksums are over its tables in its own order."""
        start = 0
        for part in self.parts:
            yield from (start + row for row in part.damaged_rows())
            start += part.n_items


class StackedTable:
    """The same table of several recordings, one below the other; rows are read from their own tables."""

    def __init__(self, tables: Sequence["np.memmap | StackedTable"]) -> None:
        self._tables = tables
        self._starts = np.cumsum([0, *(len(table) for table in tables)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, key: int | np.ndarray | tuple[np.ndarray, slice]) -> np.ndarray:
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        numbers = np.atleast_1d(rows)
        table_of_row = np.searchsorted(self._starts, numbers, side="right") - 1
        like = self._tables[0][np.arange(0), columns]
        values = np.empty((len(numbers), *like.shape[1:]), dtype=like.dtype)
        for n, table in enumerate(self._tables):
            rows_here = table_of_row == n
            values[rows_here] = table[numbers[rows_here] - self._starts[n], columns]
        return values if np.ndim(rows) else values[0]


def _dtype(name: str) -> np.dtype:
    """How numbers of a table are kept: statistics of the user's own as maxima are."""
    return TABLES.get(name, TABLES["maximum"])


def _checksum(record: np.void, rows: Sequence[np.ndarray]) -> int:
    """The checksum of a question's record and of its row in every table."""
    checksum = zlib.crc32(b"".join(record[name].tobytes() for name in ("chosen", "tokens", "margin")))
    for row in rows:
        checksum = zlib.crc32(np.ascontiguousarray(row).tobytes(), checksum)
    return checksum
