"""The one loop that asks a model questions, batch by batch; what becomes of the answers is a `Job`'s business.

Batching, encoding ahead, halving where memory does not suffice, skipping what cannot be asked, progress, the share of
each process, going on with what is finished, and what an error leaves: all of it is here, and so the same wherever
questions are asked (`vlmneurons.record`, `record_items`, `knockout`, `attribute`, `screen`, `inspect_neuron`).
"""

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from vlmneurons.checks import Keywords, as_flag, as_whole, check_choice
from vlmneurons.errors import MismatchError, OutOfMemoryError, QuestionError
from vlmneurons.files.stopping import Stopped
from vlmneurons.model.vlm import VLM, check_model, refuse_unobeyed
from vlmneurons.progress import Progress, progress_bar
from vlmneurons.questions.question import Question
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.run.batching import batches, prefetched
from vlmneurons.run.engine import Engine
from vlmneurons.run.local import LocalEngine
from vlmneurons.run.memory import MemoryLimit, asked_in_parts
from vlmneurons.run.owners import OWNERS
from vlmneurons.run.processes import Part, Processes, current_processes, part_of
from vlmneurons.run.readers import AnswerReader, reader_of
from vlmneurons.run.remote import Remote, RemoteEngine, refuse_unknown

Made = TypeVar("Made")


@dataclass(frozen=True)
class Options:
    """How questions are asked, whatever for; every function that asks takes these.

    Attributes:
        batch_size: questions a forward; where they do not fit into memory, half as many from then on.
        by_length: whether questions of like length share a batch.
        prefetch: how many batches a thread encodes ahead; None for 2, and none where the model is on the CPU.
        on_error: ``"raise"``, or ``"skip"`` questions that cannot be asked.
        progress: whether to show a bar, or the step of a longer work that this is.
        remote: where the model runs.
        distributed: whether to share the batches with the other processes of a ``torchrun``.
        part: ask a part of the batches alone, ``"3/8"`` or ``(3, 8)`` every eighth from the third on; None for all.
        processes: what of the batches is asked here, by ``distributed`` and ``part``.

    Raises:
        QuestionError: a value that none of them can have.
    """

    batch_size: int = 8
    by_length: bool = False
    prefetch: int | None = None
    on_error: str = "raise"
    progress: Progress = True
    remote: Remote = False
    distributed: bool = False
    part: tuple[int, int] | str | None = None
    processes: Processes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", int(as_whole("batch_size", self.batch_size, QuestionError, least=1)))
        as_flag("by_length", self.by_length, QuestionError)
        as_flag("distributed", self.distributed, QuestionError)
        if self.prefetch is not None and as_whole("prefetch", self.prefetch, QuestionError) < 0:
            raise QuestionError(f"prefetch {self.prefetch} is less than 0; 0 encodes each batch when its turn comes")
        check_choice("on_error", self.on_error, ("raise", "skip"), QuestionError)
        alone = Processes() if self.part is None else part_of(self.part)
        if self.distributed and self.part is not None:
            raise QuestionError("part and distributed deal out the same batches: give one of the two")
        object.__setattr__(self, "processes", current_processes() if self.distributed else alone)

    def dealt(self, asks: Callable[[], Sequence[str]]) -> tuple[dict[str, str], dict[str, list[str]]]:
        """What the manifest of a part says besides the whole's, and what it keeps; nothing where all is asked.

        Args:
            asks: gives the ids of the questions that are asked here.
        """
        if not isinstance(self.processes, Part):
            return {}, {}
        batches = f"of {self.batch_size} questions{', by length' if self.by_length else ''}"
        return {"part": str(self.processes), "batches": batches}, {"asks": list(asks())}


def to_ask(
    questions: QuestionSet | Sequence[Question], answer: str | AnswerReader | None, why: str | None = None
) -> QuestionSet:
    """The questions as a set, read in the way that was asked for.

    Raises:
        QuestionError: there are none; ``why`` ends the sentence. Where it is None, the caller looks at that.
    """
    asked = questions if isinstance(questions, QuestionSet) else QuestionSet(questions)
    if why is not None and not len(asked):
        raise QuestionError(f"there are no questions {why}")
    return asked if answer is None else asked.asked(answer=answer)


def engine_of(model: VLM, questions: QuestionSet, remote: Remote = False) -> Engine:
    """What runs the model, reading the answers as the questions say.

    Raises:
        MismatchError: no such place, or a model without weights that is to run here.
        QuestionError: a reader that the engine cannot run, or that cannot read such questions.
    """
    check_model(model)
    refuse_unobeyed(model)
    reader = reader_of(questions.answer)
    if model.engine != "vllm":
        refuse_unknown(model, remote)
    elif remote is not False:
        raise MismatchError(f"remote={remote!r}: this model is held by engine='vllm', and runs there")
    reader.check(questions)
    if model.engine == "vllm":
        from vlmneurons.run.vllm.engine import VLLMEngine

        return VLLMEngine(model, reader)
    return LocalEngine(model, reader) if remote is False else RemoteEngine(model, reader, remote)


class Job(ABC, Generic[Made]):
    """What is done with each batch, and what becomes of it.

    Attributes:
        unit: of what the progress bar counts.
        gradients: whether the model is run with gradients.
    """

    unit: str = "item"
    gradients: bool = False

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.limit = MemoryLimit()
        self.skipped: list[str] = []

    def encode(self, questions: QuestionSet) -> object:
        """What a batch is run on; called in another thread where batches are encoded ahead."""
        return self.engine.encode(questions)

    def apart(self, question: Question) -> Hashable:
        """What questions have in common that may share a batch."""
        return None

    def weight(self, batch: QuestionSet) -> int:
        """How many units a batch is."""
        return len(batch)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around all batches: hooks, locks."""
        yield

    def known(self, number: int, batch: QuestionSet) -> bool:
        """Whether a batch was finished before."""
        return False

    @abstractmethod
    def run(self, questions: QuestionSet, encoded: Any, told: Callable[[int], object]) -> Made:
        """Run the model on some questions of one batch; ``told`` moves the bar, if `take` is not soon enough.

        What it has noted of questions that it did not finish, it takes back itself: they may be asked again.
        """

    @abstractmethod
    def take(self, number: int, questions: QuestionSet, made: Made) -> int:
        """Keep what was made of some questions of a batch; by how much the bar moves."""

    def finish(self, number: int, batch: QuestionSet) -> None:
        """A batch is finished, all of its questions taken or skipped."""

    def forget(self) -> None:
        """Drop what is left of a batch, finished or not."""

    def partial(self) -> object:
        """What an error or interrupt leaves: the result of what was finished; None where it is on disk."""
        return None

    def postfix(self) -> Keywords:
        """What the bar shows beside its numbers."""
        return {}


def ask(job: Job[Any], questions: QuestionSet, options: Options) -> None:
    """Ask this process's batches that are not finished, one by one.

    Args:
        job: what is done with them.
        questions: all questions, the same in every process.
        options: how.

    Raises:
        QuestionError: a question cannot be asked (with ``on_error="raise"``). Its ``partial``, like that of any error
            or interrupt on the way, is the job's.
        OutOfMemoryError: a single question does not fit into memory.
    """
    model = job.engine.model
    mine = list(options.processes.mine(list(batches_of(job, questions, options))))
    with OWNERS.held(model.hf, "asked"), job.running(), undisturbed(model.hf), torch.inference_mode(not job.gradients):
        waiting = [(number, batch) for number, batch in mine if not job.known(number, batch)]
        for _, batch in waiting:
            job.engine.check_alone(batch)
        total = sum(job.weight(batch) for _, batch in mine)
        left = sum(job.weight(batch) for _, batch in waiting)
        bar = progress_bar(
            options.progress if options.processes.first else False,
            total=total,
            initial=total - left,
            unit=job.unit,
            smoothing=0.05,  # nearly the mean rate: batches differ in cost
        )
        with bar, prefetched(model, job.engine.reader, iter(waiting), options.prefetch, job.encode) as encoded:
            for (number, batch), encode in encoded:
                _ask_batch(job, number, batch, encode, options.on_error, bar)


def batches_of(job: Job[Any], questions: QuestionSet, options: Options) -> Iterator[QuestionSet]:
    """The batches of a job: of questions that may share one, in their order."""
    lengths = functools.partial(job.engine.model.encoder.length, questions) if options.by_length else None
    together: dict[Hashable, list[Question]] = {}
    for item in questions:
        together.setdefault(job.apart(item), []).append(item)
    for items in together.values():
        yield from batches(questions.with_items(items), options.batch_size, lengths)


def _ask_batch(
    job: Job[Any], number: int, batch: QuestionSet, encode: Callable[[], object], on_error: str, bar: Any
) -> None:
    """One batch, in one part or, where memory does not suffice, in several."""
    skipped: list[str] | None = [] if on_error == "skip" else None
    try:
        run = functools.partial(job.run, told=bar.update)
        for part, made in asked_in_parts(batch, job.limit, encode, job.encode, run, skipped):
            bar.update(job.take(number, part, made))
        job.skipped.extend(skipped or ())
        job.finish(number, batch)
        if skipped:
            bar.update(job.weight(batch.filter(lambda item: item.id in skipped)))
    except Stopped:  # there is no time to lose; what is finished is in the folder
        raise
    except BaseException as error:
        # Hours of forwards are not thrown away over one picture, a full memory or an interrupt.
        if not isinstance(error, OutOfMemoryError) or not hasattr(error, "partial"):
            partial = job.partial()
            if partial is not None:
                vars(error)["partial"] = partial
        raise
    finally:
        job.forget()
    if postfix := job.postfix():
        bar.set_postfix(**postfix, refresh=False)


@contextlib.contextmanager
def undisturbed(hf: nn.Module) -> Iterator[None]:
    """Within, a model runs as it does alone, whatever is around: no dropout, the usual default dtype.

    What was set is set again afterwards, for each of the model's parts.
    """
    training = [module for module in hf.modules() if module.training]
    dtype = torch.get_default_dtype()
    try:
        for module in training:
            module.training = False
        torch.set_default_dtype(torch.float32)
        yield
    finally:
        torch.set_default_dtype(dtype)
        for module in training:
            module.training = True
