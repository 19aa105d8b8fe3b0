"""Counts of every question on its own, on disk: record once, and ask about any grouping later.

`ActivationStatistics` are sums over the questions of a group. `ItemStatistics` keep the terms of those sums, about
1 MB a question for a 7B model, so that another grouping (language, category, right against wrong, shuffled labels) or a
bootstrap resample is a matter of adding rows up, not of running the model again.

A folder holds ``manifest.json`` (written once, whole), ``items.bin`` (one small record a question) and
``positive.bin`` (the counts, one row a question). A row is written before the record that says it is there, so a
recording that is killed at any moment can be resumed with nothing lost but the batch it was at and nothing counted
twice.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from vlmneurons.errors import FileFormatError, MismatchError, SelectionError
from vlmneurons.sites import NeuronSpace
from vlmneurons.statistics import ActivationStatistics

_KIND, _VERSION = "vlmneurons items", 1
_RECORD = np.dtype(
    [
        ("done", "u1"),
        ("chosen", "<i4"),
        ("tokens", "<i8"),
        ("margin", "<f8"),
        ("checksum", "<u4"),
    ]
)
_FILES = {"positive": np.dtype("<u2"), "reached": np.dtype("<u4"), "total": np.dtype("<f4"), "maximum": np.dtype("<f4")}
_MOST = np.iinfo(np.uint16).max

Grouping = str | Callable[[Mapping[str, Any]], str | None] | Sequence[str | None]
"""Labels of questions: a column, a function of a question's columns, or one label each; None leaves a question out."""


@dataclass(frozen=True)
class Item:
    """What is kept of a question beside its counts."""

    id: str
    group: str
    answer: int
    metadata: Mapping[str, Any]


class ItemStatistics:
    """Counts of every question of a recording, read from its folder as they are needed.

    Made by `vlmneurons.record_items`, or opened with `load`. Adding up is exact: for the labels of the recording,
    `group_by` equals what `vlmneurons.record` gives, to the last integer.

    Attributes:
        folder: where the files are.
        space: the neurons.
        items: the questions, in order.
        provenance: model, revision, rules, versions.

    Example:
        ``ItemStatistics.load("run/items").group_by("category", condition="all")``
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], space: NeuronSpace) -> None:
        self.folder = folder
        self.space = space
        self.provenance: dict[str, Any] = dict(manifest["provenance"])
        self.tables: tuple[str, ...] = tuple(manifest["tables"])
        self.items = tuple(
            Item(str(i["id"]), str(i["group"]), int(i["answer"]), dict(i["metadata"])) for i in manifest["items"]
        )

    # -- files ---------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, verify: bool = False) -> "ItemStatistics":
        """Open a recording, finished or not.

        Args:
            folder: the folder that `vlmneurons.record_items` wrote.
            verify: read every row and compare its checksum.

        Raises:
            FileFormatError: there is no recording there, or it is damaged.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            if not isinstance(manifest, dict) or manifest.get("kind") != _KIND:
                raise ValueError("not a recording of items")
            if manifest.get("version") != _VERSION:
                raise ValueError(f"version {manifest.get('version')!r} is not one that this release reads ({_VERSION})")
            if not set(manifest["tables"]) <= set(_FILES) or "positive" not in manifest["tables"]:
                raise ValueError(f"tables {manifest['tables']!r}")
            statistics = cls(folder, manifest, NeuronSpace.from_json(manifest["space"]))
        except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise FileFormatError(f"{folder} does not hold item statistics: {error}") from error
        for name, size in statistics._sizes().items():
            path = folder / f"{name}.bin"
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                raise FileFormatError(
                    f"{path} should have {size:,} bytes; it has {found if found is None else f'{found:,}'}"
                )
        if verify:
            statistics.verify()
        return statistics

    @classmethod
    def _create(
        cls,
        folder: Path,
        space: NeuronSpace,
        items: Sequence[Item],
        provenance: Mapping[str, Any],
        tables: Sequence[str],
    ) -> "ItemStatistics":
        """A recording with nothing in it yet; or the one that is there, if it is of the same questions and rules."""
        manifest = {
            "kind": _KIND,
            "version": _VERSION,
            "space": space.to_json(),
            "tables": list(tables),
            "items": [
                {"id": i.id, "group": i.group, "answer": i.answer, "metadata": _plain(dict(i.metadata))} for i in items
            ],
            "provenance": _plain(dict(provenance)),
        }
        manifest = json.loads(json.dumps(manifest))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "manifest.json"
        if path.exists():
            there = cls.load(folder)
            theirs = json.loads(path.read_text(encoding="utf-8"))
            for key in manifest:
                if manifest[key] != theirs[key]:
                    raise MismatchError(
                        f"{folder} holds another recording: {_difference(key, theirs[key], manifest[key])}"
                    )
            return there
        statistics = cls(folder, manifest, space)
        for name, size in statistics._sizes().items():
            with open(folder / f"{name}.bin", "wb") as file:
                file.truncate(size)  # sparse: disk is used as rows are written
        temporary = folder / "manifest.json.new"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(manifest, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return statistics

    def _sizes(self) -> dict[str, int]:
        sizes = {name: len(self.items) * self._columns(name) * _FILES[name].itemsize for name in self.tables}
        return {"items": len(self.items) * _RECORD.itemsize, **sizes}

    def _columns(self, name: str) -> int:
        return len(self.space.sites) if name == "reached" else len(self.space)

    def _table(self, name: str) -> np.memmap:
        shape = (len(self.items), self._columns(name))
        return np.memmap(self.folder / f"{name}.bin", dtype=_FILES[name], mode="r", shape=shape)

    @property
    def _records(self) -> np.ndarray:
        return np.fromfile(self.folder / "items.bin", dtype=_RECORD)

    def _write(
        self, rows: Sequence[int], chosen: Sequence[int], tokens: Any, margins: Any, tables: Mapping[str, Any]
    ) -> None:
        """Write finished questions: first all of their rows, then the records that say so."""
        places = np.asarray(rows)
        blocks = {}
        for name in self.tables:
            values = np.asarray(tables[name])
            if name == "positive" and values.size and values.max() > _MOST:
                raise MismatchError(f"a question has more than {_MOST:,} counted tokens; item statistics hold no more")
            blocks[name] = np.ascontiguousarray(values.astype(_FILES[name]))
            with open(self.folder / f"{name}.bin", "r+b") as file:
                width = self._columns(name) * _FILES[name].itemsize
                for place, row in zip(places.tolist(), blocks[name], strict=True):
                    file.seek(place * width)
                    file.write(row.tobytes())
                file.flush()
                os.fsync(file.fileno())
        records = np.zeros(len(places), dtype=_RECORD)
        records["done"], records["chosen"] = 1, np.asarray(chosen)
        records["tokens"], records["margin"] = np.asarray(tokens), np.asarray(margins)
        for n in range(len(places)):
            checksum = 0
            for name in self.tables:
                checksum = zlib.crc32(blocks[name][n].tobytes(), checksum)
            records["checksum"][n] = checksum
        with open(self.folder / "items.bin", "r+b") as file:
            for place, entry in zip(places.tolist(), records, strict=True):
                file.seek(place * _RECORD.itemsize)
                file.write(entry.tobytes())
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Refuse a second recording into one folder; the lock ends with the process, however it ends."""
        import fcntl

        with open(self.folder / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise MismatchError(f"{self.folder} is being recorded into by another process") from error
            yield

    def verify(self) -> None:
        """Compare every finished question's rows with their checksum.

        Raises:
            FileFormatError: a row is not what was written.
        """
        tables = [self._table(name) for name in self.tables]
        for row, entry in enumerate(self._records):
            if entry["done"]:
                checksum = 0
                for table in tables:
                    checksum = zlib.crc32(np.ascontiguousarray(table[row]).tobytes(), checksum)
                if checksum != entry["checksum"]:
                    raise FileFormatError(f"{self.folder}: the counts of question {self.items[row].id!r} are damaged")

    # -- what there is -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.items)

    @property
    def done(self) -> Bool[Tensor, " item"]:
        """Which questions are recorded."""
        return torch.from_numpy(self._records["done"].astype(bool))

    @property
    def complete(self) -> bool:
        """Whether every question is recorded."""
        return bool(self.done.all())

    @property
    def tokens(self) -> Int64[Tensor, " item"]:
        """Number of counted tokens of each question."""
        return torch.from_numpy(self._records["tokens"].astype(np.int64))

    @property
    def correct(self) -> Bool[Tensor, " item"]:
        """Whether each question was answered right."""
        answers = np.array([item.answer for item in self.items])
        return torch.from_numpy(self._records["chosen"] == answers)

    @property
    def margins(self) -> Float64[Tensor, " item"]:
        """Log-probability of the right option less that of the best other one, in nats; NaN for generated answers."""
        return torch.from_numpy(self._records["margin"].astype(np.float64))

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names that `group_by` knows: ``id``, ``group``, ``answer``, ``correct``, and the questions' metadata."""
        names = dict.fromkeys(name for item in self.items for name in item.metadata)
        return ("id", "group", "answer", "correct", *names)

    def labels(self, by: Grouping = "group") -> list[str | None]:
        """The label of each question under a grouping.

        Raises:
            MismatchError: no such column, or a list of another length.
        """
        if not isinstance(by, str) and not callable(by):
            labels = [None if label is None else str(label) for label in by]
            if len(labels) != len(self.items):
                raise MismatchError(f"{len(labels)} labels were given for {len(self.items)} questions")
            return labels
        if isinstance(by, str) and by not in self.columns:
            raise MismatchError(f"there is no column {by!r}; there are {', '.join(self.columns)}")
        labels = []
        for item, right in zip(self.items, self.correct.tolist(), strict=True):
            row = {**item.metadata, "id": item.id, "group": item.group, "answer": item.answer, "correct": right}
            label = by(row) if callable(by) else row.get(by)
            labels.append(None if label is None else str(label))
        return labels

    def kept(self, condition: str = "correct") -> Bool[Tensor, " item"]:
        """Which recorded questions meet a condition: ``"correct"``, ``"wrong"`` or ``"all"``."""
        if condition not in ("correct", "wrong", "all"):
            raise MismatchError(f"condition={condition!r} does not exist; choose from correct, wrong, all")
        if condition == "all":
            return self.done
        return self.done & (self.correct == (condition == "correct"))

    def chunks(
        self, rows: Sequence[int], table: str = "positive", size: int = 64
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows of a table, some at a time: their places within ``rows``, and the values ``[row, neuron]``."""
        if table not in self.tables:
            raise MismatchError(f"{table!r} was not recorded; there are {', '.join(self.tables)}")
        values = self._table(table)
        for start in range(0, len(rows), size):
            yield slice(start, start + size), values[np.asarray(rows[start : start + size])]

    def group_by(self, by: Grouping = "group", *, condition: str = "correct") -> ActivationStatistics:
        """Statistics of the questions under any grouping, groups sorted; no model is run.

        Args:
            by: a column (see `columns`), a function from a question's columns to its label, or one label for each
                question. A label of None leaves a question out.
            condition: which questions enter: ``"correct"``, ``"wrong"`` or ``"all"``.

        Raises:
            MismatchError: the grouping does not fit.
            SelectionError: no question is left.
        """
        labels = self.labels(by)
        groups = sorted({label for label in labels if label is not None})
        if not groups:
            raise SelectionError("no question has a label")
        index = {group: n for n, group in enumerate(groups)}
        kept = self.kept(condition).tolist()
        rows = [row for row, label in enumerate(labels) if label is not None and kept[row]]
        owner = np.array([index[labels[row]] for row in rows], dtype=np.int64)  # type: ignore[index]
        positive = np.zeros((len(groups), len(self.space)), dtype=np.int64)
        total = np.zeros(positive.shape) if "total" in self.tables else None
        reached = np.zeros((len(groups), len(self.space.sites)), dtype=np.int64) if "reached" in self.tables else None
        for name, sums in (("positive", positive), ("total", total), ("reached", reached)):
            if sums is None:
                continue
            for place, values in self.chunks(rows, name):
                for group in np.unique(owner[place]):
                    sums[group] += values[owner[place] == group].sum(0, dtype=sums.dtype)
        tokens = np.bincount(owner, self.tokens.numpy()[rows], minlength=len(groups)).astype(np.int64)
        return ActivationStatistics(
            space=self.space,
            groups=tuple(groups),
            positive=torch.from_numpy(positive),
            tokens=torch.from_numpy(tokens),
            items=torch.from_numpy(np.bincount(owner, minlength=len(groups)).astype(np.int64)),
            routed=None if reached is None else torch.from_numpy(reached),
            total=None if total is None else torch.from_numpy(total),
            provenance={**self.provenance, "condition": condition},
        )

    def __repr__(self) -> str:
        done = int(self.done.sum())
        state = "" if done == len(self) else f", {done} of them recorded"
        return f"ItemStatistics({len(self)} questions{state}; {', '.join(self.tables)} over {self.space!r})"


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Metadata as JSON holds it; what JSON cannot hold becomes its text."""
    return json.loads(json.dumps(values, default=str))


def _difference(key: str, theirs: Any, ours: Any) -> str:
    if key == "provenance":
        for name in {*theirs, *ours}:
            if theirs.get(name) != ours.get(name):
                return f"its {name} is {theirs.get(name)!r}, not {ours.get(name)!r}"
    if key == "items":
        return f"it is of {len(theirs)} questions, not the same {len(ours)}"
    return f"its {key} differs"
