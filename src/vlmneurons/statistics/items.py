"""Counts of every question on its own, on disk: record once, and ask about any grouping later.

`ActivationStatistics` are sums over the questions of a group. `ItemStatistics` keep the terms of those sums, about
1 MB a question for a 7B model, so that another grouping (language, category, right against wrong, shuffled labels) or a
bootstrap resample is a matter of adding rows up, not of running the model again.

A recording is a folder: ``manifest.json`` (written once, whole) says what was asked, and `ItemFiles` hold the counts.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from numpy.typing import ArrayLike
from torch import Tensor

from vlmneurons.checks import JSON, JSONMapping, as_path, as_whole, check_choice, check_ordered, is_missing, quoted
from vlmneurons.errors import FileFormatError, MismatchError, QuestionError, SelectionError
from vlmneurons.files.atomic import write_json
from vlmneurons.files.digests import digest_of
from vlmneurons.files.folders import VERSION, RunFolder
from vlmneurons.files.locks import locked
from vlmneurons.files.parts import parts_of
from vlmneurons.files.tables import parse, unsealed
from vlmneurons.neurons.sets import check_same_space
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.questions.question import Question
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.grouped import GroupedItems
from vlmneurons.statistics.item_files import TABLES, ItemFiles, StackedFiles, Tables
from vlmneurons.statistics.tables import merged_provenance

_KIND = "vlmneurons items"

CONDITIONS = ("correct", "wrong", "all")
"""Which questions enter statistics: those answered right, those answered wrong, or every one."""

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
            has_name = question.image_id is not None
            pictures: tuple[str, ...] = (question.image_key,) if has_name else question.source_keys
        except QuestionError:  # the question is refused, or left out, when its turn comes
            pictures = (f"unreadable: {question.id}",)
        return cls(question.id, question.group, question.answer, question.metadata, pictures)

    def to_json(self) -> JSON:
        """What a recording's manifest says of the question."""
        pictures = {} if self.pictures is None else {"pictures": list(self.pictures)}
        metadata = _plain(dict(self.metadata))
        return {"id": self.id, "group": self.group, "answer": self.answer, **pictures, "metadata": metadata}

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

    def __init__(
        self,
        files: ItemFiles,
        space: NeuronSpace,
        items: Sequence[Item],
        provenance: JSONMapping,
        digests: Mapping[str, str],
        part: str | None = None,
    ) -> None:
        self._files, self.folder = files, files.folder
        self.tables: tuple[str, ...] = tuple(files.columns)
        self.space = space
        self.items: tuple[Item, ...] = tuple(items)
        self.provenance: JSON = dict(provenance)
        self.statistics: tuple[str, ...] = tuple(digests)
        self._digests = dict(digests)  # of the code of each of the user's statistics
        self.part = part

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
            manifest = parse((folder / "manifest.json").read_text(encoding="utf-8"))
            if not isinstance(manifest, dict) or manifest.get("kind") != _KIND:
                raise ValueError("not a recording of items")
            if manifest.get("version") not in (1, VERSION):
                raise ValueError(
                    f"version {manifest.get('version')!r} is not one that this release reads (1, {VERSION})"
                )
            manifest = unsealed(manifest)
            manifest = {**manifest, **manifest.get("about", {})}
            allowed = {*TABLES, *map(str, manifest.get("statistics", {}))}
            if not set(manifest["tables"]) <= allowed or "positive" not in manifest["tables"]:
                raise ValueError(f"tables {manifest['tables']!r}")
            recording = cls._of_manifest(folder, manifest)
            for name, read in (("halved", _halving), ("skipped", str)):
                if (folder / f"{name}.json").exists():
                    entries = parse((folder / f"{name}.json").read_text(encoding="utf-8"))
                    recording.provenance[name] = [read(entry) for entry in entries]
        except (OSError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
            raise FileFormatError(f"{folder} does not hold item statistics: {error}") from error
        recording._files.check_sizes()
        if verify:
            recording.verify()
        return recording

    @classmethod
    def _of_manifest(cls, folder: Path, manifest: JSONMapping) -> "ItemStatistics":
        space = NeuronSpace.from_json(manifest["space"])
        items = [Item.from_json(item) for item in manifest["items"]]
        columns = {name: len(space.sites) if name == "reached" else len(space) for name in manifest["tables"]}
        files = ItemFiles(folder, len(items), columns)
        return cls(files, space, items, manifest["provenance"], manifest.get("statistics", {}), manifest.get("part"))

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
        # Of pictures, the content says which questions share them, and not where they lie.
        questions_with: dict[str, list[str]] = {}
        for item in items:
            for picture in item.pictures or ():
                questions_with.setdefault(picture, []).append(item.id)
        details = {}
        for item in items:
            metadata = digest_of(_plain(dict(item.metadata)))[:8]
            n_pictures = "unknown" if item.pictures is None else len(item.pictures)
            sharing = [sorted(questions_with[picture]) for picture in item.pictures or ()]
            shared = sorted(ids for ids in sharing if len(ids) > 1)
            details[item.id] = f"{metadata} {n_pictures} {digest_of(shared)[:8] if shared else '-'}"
        content = content or dict.fromkeys(details, "")
        manifest = {
            "kind": _KIND,
            "space": space.to_json(),
            "tables": list(tables),
            **({"statistics": dict(statistics)} if statistics else {}),
            "setting": provenance.get("setting"),
            "versions": provenance.get("versions"),
            "content": {question_id: f"{digest} {details[question_id]}" for question_id, digest in content.items()},
            **part[0],
        }
        about = {"items": [item.to_json() for item in items], "provenance": _plain(dict(provenance)), **part[1]}
        return cls._begun(RunFolder(folder, manifest, about))

    @classmethod
    def _begun(cls, run: RunFolder) -> "ItemStatistics":
        """The recording of a folder, made with nothing in it if it is not there."""
        if not run.path.exists():
            with locked(run.folder):
                if not run.path.exists():  # no other process was faster
                    cls._of_manifest(run.folder, {**run.manifest, **run.about})._files.make()
                    run.begin()
            run.check()
        return cls.load(run.folder)

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
        folder = as_path("out", out, MismatchError)
        parts, manifest, about = parts_of(folders, _KIND)
        recordings = [cls.load(part.folder, verify=True) for part in parts]
        for part, recording in zip(parts, recordings, strict=True):
            done = [item.id for item, is_done in zip(recording.items, recording.done.tolist(), strict=True) if is_done]
            part.refuse_unfinished([*done, *recording.provenance.get("skipped", ())])
        cls._begun(RunFolder(folder, manifest, about)).take_over(recordings)
        return cls.load(folder)

    def __add__(self, other: "ItemStatistics") -> "ItemStatistics":
        """The questions of both recordings, in their order, read from both folders: nothing is copied.

        What is added up or selected from them equals what one recording of all the questions gives. Questions that
        share a picture do so across recordings too.

        Raises:
            MismatchError: another space or setting (see `vlmneurons.statistics.identity.Setting`), other tables, a
                question that both have, or a part, which is put together with `join`.
        """
        if not isinstance(other, ItemStatistics):
            return NotImplemented
        check_same_space(self.space, other.space)
        provenance = merged_provenance(self.provenance, other.provenance)
        for recording in (self, other):
            if recording.part is not None:
                raise MismatchError(
                    f"{recording.folder} is part {recording.part} of a recording: ItemStatistics.join puts it together "
                    "with the others, and sees that none lacks"
                )
        tables = sorted(self.tables), sorted(other.tables)
        for noun, (first, second) in (("tables", tables), ("statistics", (self._digests, other._digests))):
            if first != second:
                raise MismatchError(f"recordings with different {noun} cannot be added: {first} and {second}")
        ids = {item.id for item in self.items}
        if twice := [item.id for item in other.items if item.id in ids]:
            raise MismatchError(
                f"{len(twice)} questions are in both recordings ({quoted(twice)}) and would count twice: leave them "
                "out of one"
            )
        for name in ("halved", "skipped"):
            if entries := [*self.provenance.get(name, ()), *other.provenance.get(name, ())]:
                provenance[name] = entries
        files = StackedFiles([self._files, other._files])
        return ItemStatistics(files, self.space, self.items + other.items, provenance, self._digests)

    def __radd__(self, other: object) -> "ItemStatistics":
        # sum() starts from 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def write(
        self, rows: Sequence[int], chosen: Sequence[int], tokens: ArrayLike, margins: ArrayLike, tables: Tables
    ) -> None:
        """Write finished questions.

        Args:
            rows: which questions.
            chosen: the option that each was answered with; -1 for none.
            tokens: the number of counted tokens of each.
            margins: the margin of each, in nats.
            tables: ``[row, …]`` of each of the recording's tables.

        Raises:
            MismatchError: a question has more counted tokens than the files hold.
        """
        self._files.write(rows, tables, chosen=chosen, tokens=tokens, margin=margins)

    def note(self, halved: Sequence[JSONMapping], skipped: Sequence[str] = ()) -> None:
        """Keep what was learnt on the way beside the manifest, which says what was asked for.

        Args:
            halved: how batches were halved; see `vlmneurons.run.memory.MemoryLimit`.
            skipped: ids of questions that could not be asked; those that could in the end are left out.
        """
        if ever_skipped := {*skipped, *self.provenance.get("skipped", ())}:
            rows = zip(self.items, self.done.tolist(), strict=True)
            not_asked = [item.id for item, is_done in rows if item.id in ever_skipped and not is_done]
            if not_asked != self.provenance.get("skipped"):
                self.provenance = {**self.provenance, "skipped": not_asked}
                write_json(self.folder / "skipped.json", not_asked)
        if halved and list(halved) != self.provenance.get("halved"):
            self.provenance = {**self.provenance, "halved": list(halved)}
            write_json(self.folder / "halved.json", list(halved))

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Within, no other process can record into the folder; the lock ends with the process, however it ends.

        Raises:
            MismatchError: another process is recording into it.
        """
        return locked(self.folder)

    def take_over(self, parts: Sequence["ItemStatistics"]) -> None:
        """Write the rows of recordings of some of the questions each, such as those of several processes.

        Args:
            parts: recordings over the same space with the same tables.
        """
        row_of = {item.id: row for row, item in enumerate(self.items)}
        with self.locked():
            halved, skipped = (
                [entry for part in parts for entry in part.provenance.get(name, ())] for name in ("halved", "skipped")
            )
            self.note(halved, skipped)
            for part in parts:
                records = part._files.records
                done = np.flatnonzero(records["done"])
                for start in range(0, len(done), 64):
                    rows = done[start : start + 64]
                    self.write(
                        [row_of[part.items[row].id] for row in rows],
                        records["chosen"][rows].tolist(),
                        records["tokens"][rows],
                        records["margin"][rows],
                        {name: part._files.table(name)[rows] for name in part.tables},
                    )

    def verify(self) -> None:
        """Compare every finished question's rows with their checksum.

        Raises:
            FileFormatError: a row is not what was written.
        """
        for row in self._files.damaged_rows():
            raise FileFormatError(f"{self.folder}: the counts of question {self.items[row].id!r} are damaged")

    # -- what there is -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.items)

    @property
    def done(self) -> Bool[Tensor, " item"]:
        """Which questions are recorded."""
        return torch.from_numpy(self._files.records["done"].astype(bool))

    @property
    def complete(self) -> bool:
        """Whether every question is recorded."""
        return bool(self.done.all())

    @property
    def tokens(self) -> Int64[Tensor, " item"]:
        """Number of counted tokens of each question."""
        return torch.from_numpy(self._files.records["tokens"].astype(np.int64))

    @property
    def correct(self) -> Bool[Tensor, " item"]:
        """Whether each question was answered right."""
        answers = np.array([item.answer for item in self.items])
        return torch.from_numpy(self._files.records["chosen"] == answers)

    @property
    def margins(self) -> Float64[Tensor, " item"]:
        """Log-probability of the right option less that of the best other one, in nats; NaN for generated answers."""
        return torch.from_numpy(self._files.records["margin"].astype(np.float64))

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
            labels = list(by)
            if len(labels) != len(self.items):
                raise MismatchError(f"{len(labels)} labels were given for {len(self.items)} questions")
        elif isinstance(by, str) and by not in self.columns:
            raise MismatchError(f"there is no column {by!r}; there are {', '.join(self.columns)}")
        else:
            rows = (
                {**item.metadata, "id": item.id, "group": item.group, "answer": item.answer, "correct": is_right}
                for item, is_right in zip(self.items, self.correct.tolist(), strict=True)
            )
            labels = [by(row) if callable(by) else row.get(by) for row in rows]
        # A table has NaN where it has no label.
        return [None if is_missing(label) else str(label) for label in labels]

    def kept(self, condition: str = "correct") -> Bool[Tensor, " item"]:
        """Which recorded questions meet a condition: ``"correct"``, ``"wrong"`` or ``"all"``.

        Args:
            condition: how the untouched model answered.

        Raises:
            MismatchError: no such condition.
        """
        check_choice("condition", condition, CONDITIONS, MismatchError)
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
        values = self._files.table(table)
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
    ) -> GroupedItems:
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
        number_of = {group: number for number, group in enumerate(groups)}
        kept = self.kept(condition).tolist()
        owners = {row: number_of[label] for row, label in enumerate(labels) if label is not None and kept[row]}
        rows, owner = (np.array(list(numbers), dtype=np.int64) for numbers in (owners.keys(), owners.values()))
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


def added_up(evidence: object) -> object:
    """Evidence of single questions, added up to the counts of its groups; anything else as it is."""
    grouped = evidence.grouped() if isinstance(evidence, ItemStatistics) else evidence
    return grouped.statistics if isinstance(grouped, GroupedItems) else grouped


def _halving(entry: JSONMapping) -> JSON:
    """How a batch was halved, as a file says it; see `vlmneurons.run.memory.MemoryLimit`."""
    return {name: entry[name] for name in ("from", "to", "first")}


def _plain(values: JSON) -> JSON:
    """Metadata as JSON holds it; what JSON cannot hold becomes its text."""
    return json.loads(json.dumps(values, default=str))
