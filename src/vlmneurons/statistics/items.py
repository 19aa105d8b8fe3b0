"""Counts of every question on its own, on disk: record once, and ask about any grouping later.

`ActivationStatistics` are sums over the questions of a group. `ItemStatistics` keep the terms of those sums, about
1 MB a question for a 7B model, so that another grouping (language, category, right against wrong, shuffled labels) or a
bootstrap resample is a matter of adding rows up, not of running the model again.

A folder holds ``manifest.json`` (written once, whole), ``items.bin`` (one small record a question) and a file for each
table, one row a question: ``positive.bin`` (the counts) and, if asked for, ``total.bin`` and ``maximum.bin``. A row is
written before the record that says it is there, so a recording that is killed at any moment can be resumed with nothing
lost but the batch it was at and nothing counted twice.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from numpy.typing import ArrayLike
from torch import Tensor

from vlmneurons.checks import JSON, JSONMapping, as_names, as_path, as_whole, check_choice, check_ordered, is_missing
from vlmneurons.errors import FileFormatError, GroupError, MismatchError, QuestionError, SelectionError
from vlmneurons.files import tables as _files
from vlmneurons.files.atomic import write_json
from vlmneurons.files.digests import digest_of
from vlmneurons.files.folders import VERSION, RunFolder
from vlmneurons.files.locks import locked
from vlmneurons.files.parts import parts_of
from vlmneurons.neurons.sets import check_same_space
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.questions.question import Question, hash_of
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.evidence import refuse_uncounted
from vlmneurons.statistics.tables import merged_provenance

_KIND = "vlmneurons items"
_RECORD = np.dtype([("done", "u1"), ("chosen", "<i4"), ("tokens", "<i8"), ("margin", "<f8"), ("checksum", "<u4")])
_FILES = {"positive": np.dtype("<u2"), "reached": np.dtype("<u4"), "total": np.dtype("<f4"), "maximum": np.dtype("<f4")}
_MOST = np.iinfo(np.uint16).max

VALUES = ("mean", "probability", "maximum")
"""What can be said of a neuron for one question; see `GroupedItems.values`."""

Tables = Mapping[str, ArrayLike]

ItemStatistic = Callable[..., Tensor]
"""What values of questions become: ``f(values [row, token, neuron], counted [row, token]) -> [row, neuron]``."""

Grouping = str | Callable[[JSONMapping], str | None] | Sequence[str | None]
"""Labels of questions: a column, a function of a question's columns, or one label each; None leaves a question out."""


@dataclass(frozen=True)
class Item:
    """What is kept of a question beside its counts.

    Attributes:
        id: of the question.
        group: of the question.
        answer: index of the right option.
        metadata: what else its table says.
        pictures: what identifies each of its pictures: questions that have one in common are not independent. Empty for
            a question without pictures; None in recordings of earlier releases, which did not keep them.
    """

    id: str
    group: str
    answer: int
    metadata: JSONMapping
    pictures: tuple[str, ...] | None = None

    @classmethod
    def of(cls, question: Question) -> "Item":
        """What is kept of a question.

        Args:
            question: the question; its pictures are opened, where they lie behind a function.

        """
        try:
            named = question.image_id is not None
            pictures: tuple[str, ...] = (question.image_key,) if named else question.source_keys
        except QuestionError:  # it is raised, or left out, when its turn comes
            pictures = (f"unreadable: {question.id}",)
        return cls(question.id, question.group, question.answer, question.metadata, pictures)

    def to_json(self) -> JSON:
        """What a recording's manifest says of the question."""
        known = {} if self.pictures is None else {"pictures": list(self.pictures)}
        return {
            "id": self.id,
            "group": self.group,
            "answer": self.answer,
            **known,
            "metadata": _plain(dict(self.metadata)),
        }

    @classmethod
    def from_json(cls, data: JSONMapping) -> "Item":
        """The inverse of `to_json`."""
        pictures = data.get("pictures")
        if pictures is not None and not isinstance(pictures, list):
            raise TypeError(f"pictures {pictures!r}")
        pictures = None if pictures is None else tuple(map(str, pictures))
        return cls(str(data["id"]), str(data["group"]), int(data["answer"]), dict(data["metadata"]), pictures)


class ItemStatistics:
    """Counts of every question of a recording, read from its folder as they are needed.

    Made by `vlmneurons.record_items`, or opened with `load`. Adding up is exact: for the labels of the recording,
    `group_by` equals what `vlmneurons.record` gives, to the last integer.

    Attributes:
        folder: where the files are.
        space: the neurons.
        items: the questions, in order.
        provenance: model, revision, rules, versions.
        statistics: names of the tables of the user's own statistics; see `vlmneurons.record_items`.
        part: which part of a recording this is, such as ``"3/8"``: it has the rows of all, and those of other parts
            are not recorded. None for a whole one.

    Example:
        ``ItemStatistics.load("run/items").group_by("category", condition="all")``
    """

    def __init__(self, folder: Path, manifest: JSONMapping, space: NeuronSpace) -> None:
        self.folder = folder
        self.space = space
        self.provenance: JSON = dict(manifest["provenance"])
        self.tables: tuple[str, ...] = tuple(manifest["tables"])
        self.statistics: tuple[str, ...] = tuple(manifest.get("statistics", ()))
        self._rules = dict(manifest.get("statistics", {}))  # with what identifies each
        self.items = tuple(map(Item.from_json, manifest["items"]))
        self.part: str | None = manifest.get("part")

    # -- files ---------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, verify: bool = False) -> "ItemStatistics":
        """Open a recording, finished or not.

        Args:
            folder: the folder that `vlmneurons.record_items` wrote.
            verify: read every row and compare its checksum.

        Returns:
            The recording; its tables are read from disk as they are needed.

        Raises:
            FileFormatError: there is no recording there, or it is damaged.
        """
        folder = as_path("folder", folder, FileFormatError)
        try:
            manifest = _files.parse((folder / "manifest.json").read_text(encoding="utf-8"))
            if not isinstance(manifest, dict) or manifest.get("kind") != _KIND:
                raise ValueError("not a recording of items")
            if manifest.get("version") not in (1, VERSION):
                raise ValueError(
                    f"version {manifest.get('version')!r} is not one that this release reads (1, {VERSION})"
                )
            manifest = _files.unsealed(manifest)
            manifest = {**manifest, **manifest.get("about", {})}
            known = {*_FILES, *map(str, manifest.get("statistics", {}))}
            if not set(manifest["tables"]) <= known or "positive" not in manifest["tables"]:
                raise ValueError(f"tables {manifest['tables']!r}")
            statistics = cls(folder, manifest, NeuronSpace.from_json(manifest["space"]))
            if (folder / "halved.json").exists():
                halved = _files.parse((folder / "halved.json").read_text(encoding="utf-8"))
                statistics.provenance["halved"] = [
                    {name: one[name] for name in ("from", "to", "first")} for one in halved
                ]
            if (folder / "skipped.json").exists():
                skipped = _files.parse((folder / "skipped.json").read_text(encoding="utf-8"))
                statistics.provenance["skipped"] = list(map(str, skipped))
        except (OSError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
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
    def create(
        cls,
        folder: Path,
        space: NeuronSpace,
        items: Sequence[Item],
        provenance: Mapping[str, object],
        tables: Sequence[str],
        content: Mapping[str, str] | None = None,
        part: tuple[Mapping[str, str], JSONMapping] = ({}, {}),
        statistics: Mapping[str, str] | None = None,
    ) -> "ItemStatistics":
        """A recording with nothing in it yet; or the one that is there, if it is of the same questions and rules.

        Args:
            folder: where.
            space: the neurons.
            items: the questions, one row each; of a recording that is there, its own order stays.
            provenance: where the counts come from, with the setting.
            tables: names of the tables.
            content: what is asked, by question; see `vlmneurons.questions.identity`. Left out where nothing was asked.
            part: what the manifest of a part says besides, compared and not compared; see `vlmneurons.files.parts`.
            statistics: of the tables those that are the user's own, with what identifies each.

        Raises:
            MismatchError: the folder holds another recording; the message says what differs.
        """
        metadata = {item.id: digest_of(_plain(dict(item.metadata)))[:8] for item in items}
        showing: dict[str, list[str]] = {}  # of pictures who shares them counts, and not where they lie
        for item in items:
            for key in item.pictures or ():
                showing.setdefault(key, []).append(item.id)
        for item in items:
            shared = sorted(sorted(showing[key]) for key in item.pictures or () if len(showing[key]) > 1)
            number = "unknown" if item.pictures is None else len(item.pictures)
            metadata[item.id] += f" {number} {digest_of(shared)[:8] if shared else '-'}"
        manifest = {
            "kind": _KIND,
            "space": space.to_json(),
            "tables": list(tables),
            **({"statistics": dict(statistics)} if statistics else {}),
            "setting": provenance.get("setting"),
            "versions": provenance.get("versions"),
            "content": {
                name: f"{digest} {metadata[name]}" for name, digest in (content or dict.fromkeys(metadata, "")).items()
            },
            **part[0],
        }
        about = {
            "items": [item.to_json() for item in items],
            "provenance": _plain(dict(provenance)),
            **part[1],
        }
        return cls._begun(RunFolder(folder, manifest, about))

    @classmethod
    def _begun(cls, run: RunFolder) -> "ItemStatistics":
        """The recording of a folder, made with nothing in it if it is not there."""
        folder = run.folder
        if run.path.exists():
            return cls.load(folder)
        with locked(folder):
            if not run.path.exists():  # no other process was faster
                told = {**run.manifest, **run.about}
                statistics = cls(folder, told, NeuronSpace.from_json(told["space"]))
                for name, size in statistics._sizes().items():
                    with open(folder / f"{name}.bin", "wb") as file:
                        file.truncate(size)  # sparse: disk is used as rows are written
                run.begin()
        run.check()
        return cls.load(folder)

    @classmethod
    def join(cls, folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> "ItemStatistics":
        """Put the parts of a recording together, each made by ``record_items(…, part="3/8")``.

        The files are those of an undivided recording, byte for byte. Every row of the parts is compared with its
        checksum first; a join that was killed is done again by the same call.

        Args:
            folders: of all parts, in any order.
            out: where the whole goes.

        Returns:
            The whole recording.

        Raises:
            MismatchError: parts of other settings or questions; one that is there twice, lacks, or is not finished; or
                ``out`` holds another recording.
            FileFormatError: a part is damaged.

        Example:
            ``ItemStatistics.join([f"run/items-{n}" for n in range(1, 9)], "run/items")``
        """
        where = as_path("out", out, MismatchError)
        parts, manifest, about = parts_of(folders, _KIND)
        recordings = [cls.load(part.folder, verify=True) for part in parts]
        for part, one in zip(parts, recordings, strict=True):
            done = [one.items[row].id for row in np.flatnonzero(one._records["done"])]
            part.refuse_unfinished([*done, *one.provenance.get("skipped", ())])
        whole = cls._begun(RunFolder(where, manifest, about))
        whole.take_over(recordings)
        return cls.load(where)

    def __add__(self, other: "ItemStatistics") -> "ItemStatistics":
        """The questions of both recordings, in their order, read from both folders: nothing is copied.

        What is added up or selected from them equals what one recording of all the questions gives. Questions that
        share a picture do so across recordings too.

        Raises:
            MismatchError: another space or setting (see `vlmneurons.statistics.identity.Setting`), other tables, a
                question that both have, or a part, which is put together with `join`.
        """
        return _Added((self, other)) if isinstance(other, ItemStatistics) else NotImplemented

    def __radd__(self, other: object) -> "ItemStatistics":
        # sum() starts from 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def _sizes(self) -> dict[str, int]:
        sizes = {name: len(self.items) * self._columns(name) * _dtype(name).itemsize for name in self.tables}
        return {"items": len(self.items) * _RECORD.itemsize, **sizes}

    def _columns(self, name: str) -> int:
        return len(self.space.sites) if name == "reached" else len(self.space)

    def _table(self, name: str) -> "np.memmap | _Stacked":
        shape = (len(self.items), self._columns(name))
        return np.memmap(self.folder / f"{name}.bin", dtype=_dtype(name), mode="r", shape=shape)

    @property
    def _records(self) -> np.ndarray:
        return np.fromfile(self.folder / "items.bin", dtype=_RECORD)

    def write(
        self, rows: Sequence[int], chosen: Sequence[int], tokens: ArrayLike, margins: ArrayLike, tables: Tables
    ) -> None:
        """Write finished questions: first all of their rows, then the records that say so.

        Args:
            rows: which questions.
            chosen: the option that each was answered with; -1 for none.
            tokens: the number of counted tokens of each.
            margins: the margin of each, in nats.
            tables: ``[row, …]`` of each of the recording's tables.

        Raises:
            MismatchError: a question has more counted tokens than the files hold.
        """
        places = np.asarray(rows)
        blocks = {}
        for name in self.tables:
            values = np.asarray(tables[name])
            if name == "positive" and values.size and values.max() > _MOST:
                raise MismatchError(f"a question has more than {_MOST:,} counted tokens; item statistics hold no more")
            blocks[name] = np.ascontiguousarray(values.astype(_dtype(name)))
            self._put(name, places, blocks[name])
        records = np.zeros(len(places), dtype=_RECORD)
        records["done"], records["chosen"] = 1, np.asarray(chosen)
        records["tokens"], records["margin"] = np.asarray(tokens), np.asarray(margins)
        for n in range(len(places)):
            records["checksum"][n] = _checksum(records[n], [blocks[name][n] for name in self.tables])
        self._put("items", places, records)

    def _put(self, name: str, places: np.ndarray, rows: np.ndarray) -> None:
        """Write rows of a file at their places, and have them on disk."""
        with open(self.folder / f"{name}.bin", "r+b") as file:
            for place, row in zip(places.tolist(), rows, strict=True):
                file.seek(place * row.nbytes)
                file.write(row.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def note(self, halved: Sequence[JSONMapping], skipped: Sequence[str] = ()) -> None:
        """Keep what was learnt on the way beside the manifest, which says what was asked for.

        Args:
            halved: how batches were halved; see `vlmneurons.run.memory.MemoryLimit`.
            skipped: ids of questions that could not be asked; those that could in the end are left out.
        """
        if known := {*skipped, *self.provenance.get("skipped", ())}:
            rows = zip(self.items, self._records["done"], strict=True)
            left = [item.id for item, done in rows if item.id in known and not done]
            if left != self.provenance.get("skipped"):
                self.provenance = {**self.provenance, "skipped": left}
                write_json(self.folder / "skipped.json", left)
        if halved and list(halved) != self.provenance.get("halved"):
            self.provenance = {**self.provenance, "halved": list(halved)}
            write_json(self.folder / "halved.json", list(halved))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Refuse a second recording into one folder; the lock ends with the process, however it ends.

        Raises:
            MismatchError: another process is recording into it.
        """
        with locked(self.folder):
            yield

    def take_over(self, parts: Sequence["ItemStatistics"]) -> None:
        """Write the rows of recordings of some of the questions each, such as those of several processes.

        Args:
            parts: recordings over the same space with the same tables.
        """
        place = {item.id: row for row, item in enumerate(self.items)}
        with self.locked():
            halved, skipped = (
                [one for part in parts for one in part.provenance.get(name, ())] for name in ("halved", "skipped")
            )
            self.note(halved, skipped)
            for part in parts:
                records = part._records
                done = np.flatnonzero(records["done"])
                for start in range(0, len(done), 64):
                    rows = done[start : start + 64]
                    self.write(
                        [place[part.items[row].id] for row in rows],
                        records["chosen"][rows].tolist(),
                        records["tokens"][rows],
                        records["margin"][rows],
                        {name: part._table(name)[rows] for name in part.tables},
                    )

    def verify(self) -> None:
        """Compare every finished question's rows with their checksum.

        Raises:
            FileFormatError: a row is not what was written.
        """
        tables = [self._table(name) for name in self.tables]
        for row, entry in enumerate(self._records):
            if entry["done"] and _checksum(entry, [table[row] for table in tables]) != entry["checksum"]:
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

        Args:
            by: a column that was recorded; a function from a question's record to its label; or a list with the label
                of each question. None as a label leaves the question out.

        Raises:
            MismatchError: no such column, or labels that are of another number or have no order.
        """
        if not isinstance(by, str) and not callable(by):
            check_ordered("by", by, MismatchError, "a column, a function, or a label for each question")
            if isinstance(by, Mapping):  # whose keys would be taken for the labels
                raise MismatchError(
                    f"by is a column, a function, or a label for each question; got a {type(by).__name__}: give "
                    "lambda row: labels[row['id']]"
                )
            labels = [_label(label) for label in by]
            if len(labels) != len(self.items):
                raise MismatchError(f"{len(labels)} labels were given for {len(self.items)} questions")
            return labels
        if isinstance(by, str) and by not in self.columns:
            raise MismatchError(f"there is no column {by!r}; there are {', '.join(self.columns)}")
        labels = []
        for item, right in zip(self.items, self.correct.tolist(), strict=True):
            row = {**item.metadata, "id": item.id, "group": item.group, "answer": item.answer, "correct": right}
            label = by(row) if callable(by) else row.get(by)
            labels.append(_label(label))
        return labels

    def kept(self, condition: str = "correct") -> Bool[Tensor, " item"]:
        """Which recorded questions meet a condition: ``"correct"``, ``"wrong"`` or ``"all"``.

        Args:
            condition: how the untouched model answered.

        Raises:
            MismatchError: no such condition.
        """
        check_choice("condition", condition, ("correct", "wrong", "all"), MismatchError)
        if condition == "all":
            return self.done
        return self.done & (self.correct == (condition == "correct"))

    def chunks(
        self, rows: Sequence[int] | np.ndarray, table: str = "positive", size: int = 64
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows of a table, some at a time: their places within ``rows``, and the values ``[row, neuron]``.

        Args:
            rows: numbers of questions, from 0, in any order.
            table: one of ``tables``, such as ``"positive"``.
            size: rows at a time.

        Raises:
            MismatchError: a table that was not recorded, a row that is not there, or a size below 1.
        """
        if table not in self.tables:
            raise MismatchError(f"{table!r} was not recorded; there are {', '.join(self.tables)}")
        size = as_whole("size", size, MismatchError, least=1)
        numbers = np.asarray(rows)
        if len(numbers) and not (numbers.dtype.kind in "iu" and numbers.min() >= 0 and numbers.max() < len(self)):
            raise MismatchError(f"rows are numbers of questions, from 0 to {len(self) - 1}; got {rows!r}")
        values = self._table(table)
        for start in range(0, len(numbers), size):
            yield slice(start, start + size), values[numbers[start : start + size]]

    def grouped(
        self,
        by: Grouping = "group",
        *,
        condition: str = "correct",
        balanced: bool | int = False,
        minimum: int = 0,
        seed: int = 0,
    ) -> "GroupedItems":
        """The questions of each group: a pool to select from, to resample, or to add up.

        Args:
            by: a column (see `columns`), a function from a question's columns to its label, or one label for each
                question. A label of None leaves a question out.
            condition: which questions enter: ``"correct"``, ``"wrong"`` or ``"all"``.
            balanced: the same number of questions of every group: True for as many as the smallest group has, or a
                number. They are chosen by a seeded hash of their ids, as `QuestionSet.balanced` does (identification
                pools of one size: Zhao et al. 2026, arXiv 2601.03115).
            minimum: least number of questions that every group must have.
            seed: of the choice of a balanced pool.

        Raises:
            MismatchError: the grouping does not fit.
            SelectionError: no question has a label, or groups are thinner than ``minimum`` or ``balanced``; the message
                names them.

        Example:
            ``items.grouped("category", balanced=50, minimum=50)``
        """
        labels = self.labels(by)
        groups = tuple(sorted({label for label in labels if label is not None}))
        if not groups:
            raise SelectionError("no question has a label")
        index = {group: n for n, group in enumerate(groups)}
        kept = self.kept(condition).tolist()
        owners = {row: index[label] for row, label in enumerate(labels) if label is not None and kept[row]}
        rows, owner = (np.array(list(one), dtype=np.int64) for one in (owners.keys(), owners.values()))
        pool = GroupedItems(self, rows, owner, groups, condition)
        pool.check_size(minimum)
        return pool.balanced(None if balanced is True else balanced, seed=seed) if balanced is not False else pool

    def group_by(
        self,
        by: Grouping = "group",
        *,
        condition: str = "correct",
        balanced: bool | int = False,
        minimum: int = 0,
        seed: int = 0,
    ) -> ActivationStatistics:
        """Statistics of the questions under any grouping, groups sorted; no model is run.

        The arguments are those of `grouped`. A group none of whose questions meets the condition has zeros.

        Args:
            by: the label of each question; see `labels`.
            condition: which questions enter: ``"correct"``, ``"wrong"`` or ``"all"``.
            balanced: cut all groups to the size of the smallest (True), or to this many questions.
            minimum: least number of questions of every group.
            seed: of the balanced sample.

        Raises:
            MismatchError: the grouping does not fit.
            SelectionError: no question has a label, or groups are too thin.
        """
        return self.grouped(by, condition=condition, balanced=balanced, minimum=minimum, seed=seed).statistics

    def __repr__(self) -> str:
        done = int(self.done.sum())
        state = "" if done == len(self) else f", {done} of them recorded"
        state = state if self.part is None else f"{state}: part {self.part}"
        return f"ItemStatistics({len(self)} questions{state}; {', '.join(self.tables)} over {self.space!r})"


class _Added(ItemStatistics):
    """Recordings of different questions as one; see `ItemStatistics.__add__`. Its folder is none, and never written."""

    def __init__(self, recordings: Sequence[ItemStatistics]) -> None:
        first, second = recordings
        check_same_space(first.space, second.space)
        provenance = merged_provenance(first.provenance, second.provenance)
        for one in recordings:
            if one.part is not None:
                raise MismatchError(
                    f"{one.folder} is part {one.part} of a recording: ItemStatistics.join puts it together with the "
                    "others, and sees that none lacks"
                )
        for what, own in (("tables", lambda one: sorted(one.tables)), ("statistics", lambda one: one._rules)):
            if own(first) != own(second):
                raise MismatchError(f"recordings with different {what} cannot be added: {own(first)} and {own(second)}")
        known = {item.id for item in first.items}
        if twice := [item.id for item in second.items if item.id in known]:
            raise MismatchError(
                f"{len(twice)} questions are in both recordings ({', '.join(map(repr, twice[:3]))}"
                f"{', …' if len(twice) > 3 else ''}) and would count twice: leave them out of one"
            )
        for name in ("halved", "skipped"):
            if told := [entry for one in recordings for entry in one.provenance.get(name, ())]:
                provenance[name] = told
        self.recordings: list[ItemStatistics] = []
        for one in recordings:
            self.recordings += one.recordings if isinstance(one, _Added) else [one]
        self.folder = Path(" + ".join(str(one.folder) for one in self.recordings))
        self.space, self.provenance, self.part = first.space, provenance, None
        self.tables, self.statistics, self._rules = first.tables, first.statistics, first._rules
        self.items = tuple(item for one in self.recordings for item in one.items)

    def _table(self, name: str) -> "_Stacked":
        tables = (one._table(name) for one in self.recordings)
        return _Stacked([table for table in tables if isinstance(table, np.memmap)])

    @property
    def _records(self) -> np.ndarray:
        return np.concatenate([one._records for one in self.recordings])


class _Stacked:
    """The same table of several recordings, one below the other; rows are read from theirs."""

    def __init__(self, tables: Sequence[np.memmap]) -> None:
        self._tables = tables
        self._starts = np.cumsum([0, *(len(table) for table in tables)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, key: int | np.ndarray | tuple[np.ndarray, slice]) -> np.ndarray:
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        numbers = np.atleast_1d(rows)
        owner = np.searchsorted(self._starts, numbers, side="right") - 1
        like = self._tables[0][:0, columns]
        found = np.empty((len(numbers), *like.shape[1:]), dtype=like.dtype)
        for n, table in enumerate(self._tables):
            own = owner == n
            found[own] = table[numbers[own] - self._starts[n], columns]
        return found if np.ndim(rows) else found[0]


@dataclass(frozen=True, eq=False)
class GroupedItems:
    """Questions of a recording, each in a group; made by `ItemStatistics.grouped`.

    What rules that look at single questions select from (`vlmneurons.AveragePrecision`), and what the functions of
    `vlmneurons.trust` resample and shuffle. Rules that need only the groups' counts select from its `statistics`.

    Attributes:
        recording: where the counts are.
        rows: rows of the recording; one may stand several times, as in a bootstrap.
        owner: for each of the rows the number of its group.
        groups: names of the groups.
        condition: which questions entered.
    """

    recording: ItemStatistics
    rows: np.ndarray
    owner: np.ndarray
    groups: tuple[str, ...]
    condition: str = "correct"

    @property
    def space(self) -> NeuronSpace:
        """The neurons."""
        return self.recording.space

    @property
    def provenance(self) -> JSON:
        """What the recording says, and the condition."""
        return {**self.recording.provenance, "condition": self.condition}

    @property
    def items(self) -> Int64[Tensor, " group"]:
        """Number of questions of each group."""
        return torch.from_numpy(np.bincount(self.owner, minlength=len(self.groups)).astype(np.int64))

    @property
    def tokens(self) -> Int64[Tensor, " group"]:
        """Number of counted tokens of each group."""
        tokens = np.zeros(len(self.groups), dtype=np.int64)
        np.add.at(tokens, self.owner, self.recording.tokens.numpy()[self.rows])
        return torch.from_numpy(tokens)

    def check_size(self, minimum: int) -> None:
        """Make sure that every group has questions enough.

        Args:
            minimum: least number of questions of every group.

        Raises:
            SelectionError: some have fewer; the message names them and says how many they have.
        """
        minimum = as_whole("minimum", minimum, SelectionError)
        thin = [f"{group} ({n})" for group, n in zip(self.groups, self.items.tolist(), strict=True) if n < minimum]
        if thin:
            answered = {"correct": "right"}.get(self.condition, self.condition)
            condition = "" if self.condition == "all" else f" that were answered {answered}"
            raise SelectionError(
                f"at least {minimum} questions a group{condition} are needed; fewer are in {', '.join(thin)}: leave "
                "them out, or record more"
            )

    def check_counted(self) -> None:
        """Make sure that every group has counted tokens.

        Raises:
            SelectionError: some have none; the message names them.
        """
        advice = "of the grouping, or record more questions"
        refuse_uncounted(self.groups, self.tokens, advice, condition=self.condition)

    def balanced(self, size: int | None = None, *, seed: int = 0) -> "GroupedItems":
        """The same number of questions of every group, chosen by a seeded hash of their ids.

        Args:
            size: questions per group; by default as many as the smallest group has.
            seed: of the choice.

        Raises:
            SelectionError: a group has fewer, or none; the message names the thin groups.
        """
        seed = as_whole("seed", seed, SelectionError)
        if size is not None and (size := as_whole("size", size, SelectionError)) < 1:
            raise SelectionError(f"{size} questions per group were asked for; the least is 1")
        self.check_size(1 if size is None else size)
        size = int(self.items.min()) if size is None else size
        items = self.recording.items
        rank = np.argsort([hash_of(seed, items[row].id) for row in self.rows], kind="stable")
        kept = np.concatenate([rank[self.owner[rank] == group][:size] for group in range(len(self.groups))])
        return self.taken(np.sort(kept))

    def taken(self, places: np.ndarray, owner: np.ndarray | None = None) -> "GroupedItems":
        """Some of the questions, by their places in `rows`, in the groups they have or in others.

        Args:
            places: places within ``rows``, repeated where a question counts twice.
            owner: row of the group of each of them; as they are, unless given.
        """
        own = self.owner[places] if owner is None else owner
        return GroupedItems(self.recording, self.rows[places], own, self.groups, self.condition)

    def select_groups(self, groups: Sequence[str]) -> "GroupedItems":
        """The questions of some groups, in the given order of groups.

        Args:
            groups: names of groups.

        Raises:
            GroupError: no such group.
            MismatchError: a group twice, or none.
        """
        groups = as_names("groups", groups, MismatchError)
        if not groups or len(set(groups)) < len(groups):
            raise MismatchError(
                f"groups are some of {', '.join(self.groups)}, each once; got {', '.join(groups) or 'none'}"
            )
        unknown = [group for group in groups if group not in self.groups]
        if unknown:
            raise GroupError(f"group {unknown[0]!r} is not among these questions; they have {', '.join(self.groups)}")
        place = np.array([groups.index(g) if g in groups else -1 for g in self.groups], dtype=np.int64)
        owner = place[self.owner]
        kept = owner >= 0
        return GroupedItems(self.recording, self.rows[kept], owner[kept], tuple(groups), self.condition)

    @cached_property
    def statistics(self) -> ActivationStatistics:
        """The questions' counts added up by group, exactly."""
        recording, n_groups = self.recording, len(self.groups)
        sums: dict[str, np.ndarray] = {}
        for name in recording.tables:
            if name == "maximum" or name in recording.statistics:
                continue
            dtype = np.float64 if name == "total" else np.int64
            sums[name] = np.zeros((n_groups, recording._columns(name)), dtype=dtype)
            for group, own in enumerate(sums[name]):
                for _, values in recording.chunks(self.rows[self.owner == group], name):
                    own += values.sum(0, dtype=dtype)
        return ActivationStatistics(
            space=self.space,
            groups=self.groups,
            positive=torch.from_numpy(sums["positive"]),
            tokens=self.tokens,
            items=self.items,
            routed=torch.from_numpy(sums["reached"]) if "reached" in sums else None,
            total=torch.from_numpy(sums["total"]) if "total" in sums else None,
            provenance=self.provenance,
        )

    def values(self, on: str, columns: slice) -> Float64[np.ndarray, "item neuron"]:
        """One value for each question and neuron of a range.

        Args:
            on: ``"mean"`` (mean activation over the question's counted tokens; 0 if none reached the neuron),
                ``"probability"`` (share of those tokens at which the neuron fired), or ``"maximum"`` (highest
                activation among them; ``-inf`` if none reached the neuron), or the name of a statistic of your own.
            columns: range of flat indices.

        Raises:
            SelectionError: no such value, or it was not recorded.
        """
        recording = self.recording
        table = {"mean": "total", "probability": "positive", "maximum": "maximum"}.get(on)
        if table is None:
            check_choice("on", on, (*VALUES, *recording.statistics), SelectionError)
        table = table or on
        if table not in recording.tables:
            how = "magnitudes" if on == "mean" else "maxima"
            raise SelectionError(f"this recording holds no {on} of each question: record_items(…, {how}=True)")
        values = recording._table(table)[self.rows, columns].astype(np.float64)
        if on == "maximum" or table == on:
            return values
        if "reached" in recording.tables:
            site = self.space.site_of[columns].numpy()
            reached = recording._table("reached")[self.rows][:, site].astype(np.float64)
        else:
            reached = recording.tokens.numpy()[self.rows].astype(np.float64)[:, None]
        return np.divide(values, reached, out=np.zeros_like(values), where=np.broadcast_to(reached > 0, values.shape))

    def __repr__(self) -> str:
        counts = ", ".join(f"{group} {n}" for group, n in zip(self.groups, self.items.tolist(), strict=True))
        return f"GroupedItems({len(self.rows)} questions: {counts}; {self.condition}, over {self.space!r})"


def added_up(evidence: object) -> object:
    """Counts of groups of what is of single questions; anything else as it is."""
    grouped = evidence.grouped() if isinstance(evidence, ItemStatistics) else evidence
    return grouped.statistics if isinstance(grouped, GroupedItems) else grouped


def _dtype(name: str) -> np.dtype:
    """How numbers of a table are kept: statistics of the user's own as maxima are."""
    return _FILES.get(name, _FILES["maximum"])


def _label(value: object) -> str | None:
    """A question's label; None, and NaN, which is what a table has for it, leave the question out."""
    return None if is_missing(value) else str(value)


def _checksum(record: np.void, rows: Sequence[np.ndarray]) -> int:
    """Of what a question's record says, and of its row in every table."""
    checksum = zlib.crc32(b"".join(record[name].tobytes() for name in ("chosen", "tokens", "margin")))
    for row in rows:
        checksum = zlib.crc32(np.ascontiguousarray(row).tobytes(), checksum)
    return checksum


def _plain(values: JSON) -> JSON:
    """Metadata as JSON holds it; what JSON cannot hold becomes its text."""
    return json.loads(json.dumps(values, default=str))
