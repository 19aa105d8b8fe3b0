"""Recording the counts of every question on its own, on disk: `record_items`."""

import contextlib
import functools
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmneurons.checks import as_path
from vlmneurons.errors import ActivationError, MismatchError, QuestionError
from vlmneurons.files.digests import digest_of_code
from vlmneurons.model.encoder import TokenRule
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
            With an argument ``site`` it is told which. `GroupedItems.values` gives it by its name (``"statistic"`` of a
            single one), and `AveragePrecision(on=…)` selects by it.
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
    whole = as_path("folder", folder, MismatchError)
    engine = engine_of(model, questions, remote)
    named = _named(statistic)
    if isinstance(tokens, Mapping):
        raise QuestionError("token rules by name are groups of vn.record; record the questions of each rule by itself")
    counter = Counter(model, space, tokens=tokens, magnitudes=magnitudes, maxima=maxima, statistics=named)
    setting = setting_of_run(model, tokens=tokens, questions=questions, engine=engine)
    about = run_provenance(model, setting, tokens=tokens, questions=questions, engine=engine)
    processes = options.processes
    tables = [
        "positive",
        *["reached"] * _uneven(counter),
        *["total"] * counter.magnitudes,
        *["maximum"] * counter.maxima,
        *named,
    ]
    identified = {name: digest_of_code(function) for name, function in named.items()}

    lengths = functools.partial(model.encoder.length, questions) if by_length else None
    dealt = options.dealt(lambda: [item.id for item in share_of(questions, options.batch_size, processes, lengths)])

    def created(where: Path, asked: QuestionSet) -> ItemStatistics:
        items = [Item.of(item) for item in asked]
        return ItemStatistics.create(where, counter.space, items, about, tables, content_of(asked), dealt, identified)

    if processes.count == 1 or options.part is not None:
        statistics = created(whole, questions)
        asked = questions
        if statistics.part is not None:  # batches are cut from the order in which the questions stood when it began
            asked = in_order_of([item.id for item in statistics.items], asked)
        job = _ItemsJob(engine, counter, statistics, asked)
        ask(job, asked, options)
        return job.statistics
    # Each process records into a folder of its own beside the whole; the first puts them together.
    there = created(whole, questions) if processes.first else None
    done = processes.gather(there is not None and there.complete)[0]
    own = share_of(questions, batch_size, processes, lengths)
    own_folder = whole.with_name(f"{whole.name}-{processes.rank + 1}-of-{processes.count}")
    if not done and len(own):
        # Batches were dealt when they were sorted by length; sorted once more, they would be others.
        alone = Options(batch_size, False, prefetch, on_error, progress and processes.first, remote)
        ask(_ItemsJob(engine, counter, created(own_folder, own), own), own, alone)
    parts = [Path(one) for one in processes.gather(str(own_folder) if len(own) else None) if one is not None]
    if there is not None and not done:
        there.take_over([ItemStatistics.load(one) for one in parts])
    processes.wait()
    return ItemStatistics.load(whole)


def share_of(
    questions: QuestionSet,
    batch_size: int,
    processes: Processes,
    lengths: Callable[[Question], int] | None = None,
) -> QuestionSet:
    """The questions of the batches that fall to this process: asked in batches of this size, they are those batches."""
    own = [item for _, batch in processes.mine(list(batches(questions, batch_size, lengths))) for item in batch]
    return questions.with_items(own)


def _named(statistic: Any) -> dict[str, ItemStatistic]:
    """The user's statistics by name, which their files are called by.

    Raises:
        MismatchError: one is no function, or its name is none that a file can have, or taken.
    """
    if statistic is None:
        return {}
    named = dict(statistic) if isinstance(statistic, Mapping) else {"statistic": statistic}
    for name, function in named.items():
        if not callable(function):
            raise MismatchError(
                f"statistic {name!r} is a function (values, counted) -> [row, neuron]; got {function!r}"
            )
        if not isinstance(name, str) or not name.isidentifier() or name in _TAKEN:
            taken = ", ".join(_TAKEN)
            raise MismatchError(f"statistic {name!r}: a name is of letters, digits and _, and none of {taken}")
    # Files are called by them, and some disks keep no case of letters.
    files = {name: name for name in _TAKEN}
    for name in named:
        if (file := unicodedata.normalize("NFKC", name).casefold()) in files:
            raise MismatchError(
                f"statistic {name!r} and {files[file]!r} would be one file where letters' case is not told apart: give "
                "it another name"
            )
        files[file] = name
    return named


_TAKEN = ("items", "positive", "reached", "total", "maximum", "mean", "probability")


def _uneven(counter: Counter) -> bool:
    """Whether sites see other tokens than the question has, so that each one's number has to be kept."""
    return len({site.tower for site in counter.space}) > 1 or any(
        counter.model.mlp_of(site).expert is not None or site.tower != "language" for site in counter.space
    )


class _ItemsJob(CountingJob):
    """Writes each question's counts into its row."""

    def __init__(self, engine: Engine, counter: Counter, statistics: ItemStatistics, questions: QuestionSet) -> None:
        super().__init__(engine, counter)
        self.statistics = statistics
        self._place = {item.id: row for row, item in enumerate(statistics.items)}
        self.limit = type(self.limit)(statistics.provenance.get("halved", ()))
        self._done = np.zeros(len(statistics), dtype=bool)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """See `Job.running`."""
        with self.statistics.locked(), super().running():
            self._done = self.statistics.done.numpy()
            yield

    def run(self, questions: QuestionSet, encoded: object, told: Callable[[int], object]) -> Reading:
        """See `Job.run`.

        Raises:
            ActivationError: a statistic of another shape, or NaN; the message names the question.
        """
        try:
            return super().run(questions, encoded, told)
        except BadStatistic as error:
            raise ActivationError(f"question {self.question_in(questions, error.row).id!r}: {error}") from error

    def known(self, number: int, batch: QuestionSet) -> bool:
        """See `Job.known`."""
        return bool(self._done[[self._place[item.id] for item in batch]].all())

    def take(self, number: int, questions: QuestionSet, made: Reading) -> int:
        """See `Job.take`.

        Raises:
            MismatchError: the model computes its sites several times for a token.
        """
        tables, counted = self.counter.by_row()
        if "reached" not in self.statistics.tables and (tables["reached"] != counted[:, None]).any():
            raise MismatchError(
                f"{type(self.engine.model.hf).__name__} computes its sites several times for a token in one "
                "forward, which the files of record_items do not hold; vn.record does, in its `routed`"
            )
        chosen = [-1 if choice is None else choice for choice in made.chosen]
        rows = [self._place[item.id] for item in questions]
        self.statistics.write(rows, chosen, counted, made.margins(questions), tables)
        return len(questions)

    def forget(self) -> None:
        """See `Job.forget`."""
        super().forget()
        self.statistics.note(self.limit.halved, self.skipped)
