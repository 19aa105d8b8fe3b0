"""Recording the counts of every question on its own, on disk: `record_items`."""

import contextlib
import functools
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vlmneurons.checks import as_path
from vlmneurons.errors import ActivationError, MismatchError, QuestionError
from vlmneurons.files.digests import digest_of_code
from vlmneurons.model.tokens import TokenRule
from vlmneurons.model.vlm import VLM
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.progress import Progress
from vlmneurons.questions.identity import content_of, in_order_of
from vlmneurons.questions.question import Question
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.recording.counter import BadStatistic, Counter
from vlmneurons.recording.record import CountingJob
from vlmneurons.run.ask import Options, ask, engine_of, to_ask
from vlmneurons.run.batching import batches
from vlmneurons.run.engine import Engine
from vlmneurons.run.identity import run_provenance, setting_of_run
from vlmneurons.run.memory import MemoryLimit
from vlmneurons.run.processes import Processes
from vlmneurons.run.readers import AnswerReader, Reading
from vlmneurons.run.remote import Remote
from vlmneurons.statistics.items import Item, ItemStatistic, ItemStatistics


def record_items(
    model: VLM,
    questions: QuestionSet | Sequence[Question],
    folder: str | os.PathLike[str],
    space: NeuronSpace | None = None,
    *,
    tokens: TokenRule = "content",
    batch_size: int = 8,
    answer: str | AnswerReader | None = None,
    magnitudes: bool = False,
    maxima: bool = False,
    statistic: ItemStatistic | Mapping[str, ItemStatistic] | None = None,
    by_length: bool = False,
    prefetch: int | None = None,
    on_error: str = "raise",
    progress: Progress = True,
    remote: Remote = False,
    distributed: bool = False,
    part: tuple[int, int] | str | None = None,
) -> ItemStatistics:
    """Ask questions and keep each one's counts on disk, whatever its answer, for any later grouping.

    Can be stopped or killed at any moment: calling it again with the same questions and rules goes on at the batch
    that was not finished, and gives the same files as an undisturbed run, byte for byte (with the same ``batch_size``;
    another one can tip a neuron within rounding of 0).

    Args:
        model: the model.
        questions: what to ask, and how.
        folder: where the files go, about 2 bytes a neuron and question.
        space: the neurons to count; by default the gates of the language tower.
        tokens: which tokens count; see `record`.
        batch_size: questions a forward; see `record` for what happens where they do not fit into memory.
        answer: how answers are read; by default as the set says.
        magnitudes: also keep each question's sum of every neuron's values, in float32 (4 bytes a neuron and question).
        maxima: also keep the highest of every neuron's values among each question's counted tokens, in float32.
        statistic: also keep what a function of your own, or several by name, makes of each question's values, in
            float32: ``f(values [row, token, neuron], counted [row, token]) -> [row, neuron]``, called at every site.
            One with an argument ``site`` is given the site. `GroupedItems.values` gives it by its name (``"statistic"``
            of a single one), and `AveragePrecision(on=…)` selects by it.
        by_length: let questions of like length share a batch; see `record`.
        prefetch: how many batches a thread prepares while the model runs; see `record`.
        on_error: ``"raise"``, or ``"skip"`` questions that cannot be asked: they are asked again when the recording is
            gone on with.
        progress: show a progress bar.
        remote: where the model runs; True for nnsight's remote execution, see `vlmneurons.run.remote`.
        distributed: share the batches with the other processes of a ``torchrun``; each gets the whole, which equals
            that of one process. All must see the folder.
        part: ask a part of the batches alone: of ``"3/8"``, or ``(3, 8)``, every eighth, from the third on. Each part
            has a folder of its own; `ItemStatistics.join` makes the whole of them, which equals an undivided recording
            byte for byte.

    Returns:
        The recording, open for reading, with the counts of every question, whatever its answer.

    Raises:
        MismatchError: the folder holds another recording, or another process is recording into it; or the model runs
            its layers several times in a forward, or is an encoder-decoder model.
        QuestionError: a question cannot be asked. What was recorded before it stays.
        ActivationError: NaN or infinite activations, or a statistic of another shape or NaN; the message names the site
            and the question.
        OutOfMemoryError: a single question does not fit into memory.
    """
    options = Options(batch_size, by_length, prefetch, on_error, progress, remote, distributed, part)
    questions = to_ask(questions, answer, "to record")
    path = as_path("folder", folder, MismatchError)
    engine = engine_of(model, questions, remote)
    statistics = _by_name(statistic)
    if isinstance(tokens, Mapping):
        raise QuestionError("token rules by name are groups of vn.record; record the questions of each rule by itself")
    counter = Counter(model, space, tokens=tokens, magnitudes=magnitudes, maxima=maxima, statistics=statistics)
    setting = setting_of_run(model, tokens=tokens, questions=questions, engine=engine)
    provenance = run_provenance(model, setting, tokens=tokens, questions=questions, engine=engine)
    processes = options.processes
    tables = [
        "positive",
        *["reached"] * _keeps_reached(counter),
        *["total"] * counter.magnitudes,
        *["maximum"] * counter.maxima,
        *statistics,
    ]
    digests = {name: digest_of_code(function) for name, function in statistics.items()}
    lengths = functools.partial(model.encoder.length, questions) if by_length else None
    share_here = functools.partial(share_of, questions, options.batch_size, processes, lengths)
    part_entries = options.dealt(lambda: [question.id for question in share_here()])

    def created(path: Path, asked: QuestionSet) -> ItemStatistics:
        items = [Item.of(question) for question in asked]
        content = content_of(asked)
        return ItemStatistics.create(path, counter.space, items, provenance, tables, content, part_entries, digests)

    if processes.count == 1 or options.part is not None:
        recording = created(path, questions)
        if recording.part is not None:  # batches are cut from the order in which the questions stood when it began
            questions = in_order_of([item.id for item in recording.items], questions)
        ask(_ItemsJob(engine, counter, recording), questions, options)
        return recording
    # Each process records its share into a folder beside the whole; the first process puts them together.
    recording = created(path, questions) if processes.first else None
    is_complete = processes.gather(recording is not None and recording.complete)[0]
    share = share_here()
    folder_of_share = path.with_name(f"{path.name}-{processes.rank + 1}-of-{processes.count}")
    if not is_complete and len(share):
        # Batches were dealt when they were sorted by length; sorted once more, they would be others.
        alone = Options(batch_size, False, prefetch, on_error, progress and processes.first, remote)
        ask(_ItemsJob(engine, counter, created(folder_of_share, share)), share, alone)
    folders = processes.gather(str(folder_of_share) if len(share) else None)
    if recording is not None and not is_complete:
        recording.take_over([ItemStatistics.load(folder) for folder in folders if folder is not None])
    processes.wait()
    return ItemStatistics.load(path)


def share_of(
    questions: QuestionSet, batch_size: int, processes: Processes, lengths: Callable[[Question], int] | None = None
) -> QuestionSet:
    """The questions of the batches that fall to this process: asked in batches of this size, they are those batches."""
    shares = processes.mine(list(batches(questions, batch_size, lengths)))
    return questions.with_items([question for _, batch in shares for question in batch])


_RESERVED = ("items", "positive", "reached", "total", "maximum", "mean", "probability")
"""Names of the library's own files and values."""


def _by_name(statistic: ItemStatistic | Mapping[str, ItemStatistic] | None) -> dict[str, ItemStatistic]:
    """The user's statistics by name, which their files are called by.

    Raises:
        MismatchError: one is no function, or its name is none that a file can have, or taken.
    """
    if statistic is None:
        return {}
    statistics = dict(statistic) if isinstance(statistic, Mapping) else {"statistic": statistic}
    # Files are called by these names, and some disks keep no case of letters.
    name_of_file = {name: name for name in _RESERVED}
    for name, function in statistics.items():
        if not callable(function):
            raise MismatchError(
                f"statistic {name!r} is a function (values, counted) -> [row, neuron]; got {function!r}"
            )
        if not isinstance(name, str) or not name.isidentifier() or name in _RESERVED:
            reserved = ", ".join(_RESERVED)
            raise MismatchError(f"statistic {name!r}: a name is of letters, digits and _, and none of {reserved}")
    for name in statistics:
        file = unicodedata.normalize("NFKC", name).casefold()
        if file in name_of_file:
            raise MismatchError(
                f"statistic {name!r} and {name_of_file[file]!r} would be one file where letters' case is not told "
                "apart: give it another name"
            )
        name_of_file[file] = name
    return statistics


def _keeps_reached(counter: Counter) -> bool:
    """Whether sites see other tokens than the question has, so that each one's number has to be kept."""
    towers = {site.tower for site in counter.space}
    return towers != {"language"} or any(counter.model.mlp_of(site).expert is not None for site in counter.space)


class _ItemsJob(CountingJob):
    """Writes each question's counts into its row."""

    def __init__(self, engine: Engine, counter: Counter, recording: ItemStatistics) -> None:
        super().__init__(engine, counter)
        self.recording = recording
        self.limit = MemoryLimit(recording.provenance.get("halved", ()))
        self._row_of = {item.id: row for row, item in enumerate(recording.items)}
        self._done = np.zeros(len(recording), dtype=bool)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """See `Job.running`."""
        with self.recording.locked(), super().running():
            self._done = self.recording.done.numpy()
            yield

    def run(self, questions: QuestionSet, encoded: object, move_bar: Callable[[int], object], /) -> Reading:
        """See `Job.run`.

        Raises:
            ActivationError: a statistic of another shape, or NaN; the message names the question.
        """
        try:
            return super().run(questions, encoded, move_bar)
        except BadStatistic as error:
            raise ActivationError(f"question {self.question_in(questions, error.row).id!r}: {error}") from error

    def is_finished(self, number: int, batch: QuestionSet) -> bool:
        """See `Job.is_finished`."""
        return bool(self._done[self._rows_of(batch)].all())

    def take(self, number: int, questions: QuestionSet, made: Reading) -> int:
        """See `Job.take`.

        Raises:
            MismatchError: the model computes its sites several times for a token.
        """
        tables, counted = self.counter.by_row()
        if "reached" not in self.recording.tables and (tables["reached"] != counted[:, None]).any():
            raise MismatchError(
                f"{type(self.engine.model.hf).__name__} computes its sites several times for a token in one "
                "forward, which the files of record_items do not hold; vn.record does, in its `routed`"
            )
        chosen = [-1 if choice is None else choice for choice in made.chosen]
        self.recording.write(self._rows_of(questions), chosen, counted, made.margins(questions), tables)
        return len(questions)

    def _rows_of(self, questions: QuestionSet) -> list[int]:
        return [self._row_of[question.id] for question in questions]

    def forget(self) -> None:
        """See `Job.forget`."""
        super().forget()
        self.recording.note(self.limit.halved, self.skipped)
