"""Counting how often neurons fire: a recorder for any run of a model, and `record`, which asks questions meanwhile.

A neuron *fires* at a token if its value is above zero (for SiLU and GELU the gate is above zero exactly where its input
is). For each row of a batch the recorder counts the tokens at which each neuron fires, among those that the token rule
counts; `record` then adds a row to its group's statistics if the answer meets the condition. All counts are integers.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from vlmneurons.checks import path_of, whole
from vlmneurons.errors import ActivationError, MismatchError, QuestionError
from vlmneurons.model.encoder import TokenRule
from vlmneurons.model.vlm import VLM
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.progress import Progress, progress_bar
from vlmneurons.questions.sets import Question, QuestionSet
from vlmneurons.recording.recorder import Recorder, _NotFinite, provenance_of_run, rule_name
from vlmneurons.run.batching import batches, prefetched
from vlmneurons.run.memory import MemoryLimit, asked_in_parts
from vlmneurons.run.readers import AnswerReader, Reading, reader_of
from vlmneurons.run.remote import Remote, reader_at, reader_provenance
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.items import Item, ItemStatistics

CONDITIONS = ("correct", "wrong", "all")
"""Which questions enter the statistics: those answered right, those answered wrong, or every one."""


def record(
    model: VLM,
    questions: QuestionSet | Sequence[Question],
    space: NeuronSpace | None = None,
    *,
    condition: str = "correct",
    tokens: TokenRule = "content",
    batch_size: int = 8,
    answer: str | AnswerReader | None = None,
    magnitudes: bool = False,
    by_length: bool = False,
    prefetch: int | None = None,
    on_error: str = "raise",
    progress: bool = True,
    remote: Remote = False,
) -> ActivationStatistics:
    """Ask questions and count, group by group, how often each neuron fires.

    One forward a question gives its answer and its counts; the counts enter the statistics if the answer meets the
    condition. Statistics of parts add up to those of the whole: ``record(a) + record(b) == record(a + b)``.

    Args:
        model: the model.
        questions: what to ask, and how.
        space: the neurons to count; by default the gates of the language tower.
        condition: ``"correct"`` (questions answered right, as the paper does), ``"wrong"`` or ``"all"``.
        tokens: which tokens count: ``"content"``, ``"image"``, ``"text"``, ``"last"``, or a function; see
            `vlmneurons.model.encoder.TokenTable.counted`.
        batch_size: questions a forward; where they do not fit into memory, half as many from then on (the provenance
            says so under ``"halved"``).
        answer: how answers are read; by default as the set says.
        magnitudes: also sum the neurons' values, for mean activations.
        by_length: let questions of like length share a batch, where pictures or texts differ so much that a good part
            of a batch would be padding. The counts do not depend on it.
        prefetch: how many batches a thread prepares (opens, resizes, tokenizes) while the model runs; by default 2, and
            none for a model on the CPU, whose cores the thread would take.
        on_error: what to do with a question that cannot be asked, such as one whose picture does not open:
            ``"raise"``, or ``"skip"`` it (its id is kept in the provenance).
        progress: show a progress bar.
        remote: where the model runs; True for nnsight's remote execution, see `vlmneurons.run.remote`.

    Returns:
        Counts ``[group, neuron]``, groups sorted. A group none of whose questions met the condition has zeros.

    Raises:
        QuestionError: a question cannot be asked. Its ``partial``, like that of any error or interrupt on the way,
            holds the statistics of the batches before.
        ActivationError: NaN or infinite activations; the message names the site and the question.
        OutOfMemoryError: a single question does not fit into memory.

    Source: activation probabilities of correctly answered questions, Zhao et al. 2025 (arXiv 2510.24942).
    """
    if condition not in CONDITIONS:
        raise QuestionError(f"condition={condition!r} does not exist; choose from {', '.join(CONDITIONS)}")
    if on_error not in ("raise", "skip"):
        raise QuestionError(f"on_error={on_error!r} does not exist; choose from raise, skip")
    check_sizes(batch_size, prefetch)
    questions = questions if isinstance(questions, QuestionSet) else QuestionSet(questions)
    if not len(questions):
        raise QuestionError("there are no questions to record")
    if answer is not None:
        questions = questions.asked(answer=answer)
    reader = reader_of(questions.answer)
    recorder = Recorder(model, space, tokens=tokens, magnitudes=magnitudes)
    recorder._strict = False
    reader = reader_at(model, reader, remote, recorder)
    skipped: list[str] = []
    n_correct = 0
    limit = MemoryLimit()
    coming = batches(questions, batch_size, _lengths(model, questions) if by_length else None)

    def provenance() -> dict[str, Any]:
        return {
            **provenance_of_run(model),
            **reader_provenance(reader),
            "tokens": rule_name(tokens),
            "condition": condition,
            "answer": repr(reader),
            "prompt": rule_name(questions.prompt),
            "shuffle": questions.shuffle,
            "skipped": list(skipped),
            **limit.provenance,
        }

    with (
        recorder,
        torch.inference_mode(),
        progress_bar(progress, len(questions), unit="item") as bar,
        prefetched(model, reader, coming, prefetch, lambda batch: batch) as encoded,
    ):
        for batch, encode in encoded:
            try:
                left_out = skipped if on_error == "skip" else None
                for part, reading in _read(model, reader, recorder, batch, encode, limit, left_out):
                    right = [choice == item.answer for choice, item in zip(reading.chosen, part, strict=True)]
                    n_correct += sum(right)
                    meets = [condition == "all" or is_right == (condition == "correct") for is_right in right]
                    recorder._commit([item.group if ok else None for item, ok in zip(part, meets, strict=True)])
            except BaseException as error:
                # Hours of forwards are not thrown away over one picture, a full memory or an interrupt.
                if recorder._whole:
                    error.partial = recorder._statistics(provenance(), questions.groups)  # type: ignore[attr-defined]
                raise
            finally:
                recorder._forget()
            bar.update(len(batch))
            bar.set_postfix(correct=f"{n_correct / max(bar.n, 1):.1%}", refresh=False)
    return recorder._statistics(provenance(), questions.groups)


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
    by_length: bool = False,
    prefetch: int | None = None,
    progress: Progress = True,
    remote: Remote = False,
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
        by_length: let questions of like length share a batch; see `record`.
        prefetch: how many batches a thread prepares while the model runs; see `record`.
        progress: show a progress bar.
        remote: where the model runs; True for nnsight's remote execution, see `vlmneurons.run.remote`.

    Returns:
        The recording, open for reading, with the counts of every question, whatever its answer.

    Raises:
        MismatchError: the folder holds another recording, or another process is recording into it; or the model runs
            its layers several times in a forward, or is an encoder-decoder model.
        QuestionError: a question cannot be asked. What was recorded before it stays.
        ActivationError: NaN or infinite activations; the message names the site and the question.
        OutOfMemoryError: a single question does not fit into memory.
    """
    check_sizes(batch_size, prefetch)
    questions = questions if isinstance(questions, QuestionSet) else QuestionSet(questions)
    if not len(questions):
        raise QuestionError("there are no questions to record")
    if answer is not None:
        questions = questions.asked(answer=answer)
    reader = reader_of(questions.answer)
    recorder = Recorder(model, space, tokens=tokens, magnitudes=magnitudes)
    recorder._strict = False
    recorder._maxima = maxima
    reader = reader_at(model, reader, remote, recorder)
    uneven = len({site.tower for site in recorder.space}) > 1 or any(
        model.mlp_of(site).expert is not None or site.tower != "language" for site in recorder.space
    )
    statistics = ItemStatistics._create(
        path_of("folder", folder, MismatchError),
        recorder.space,
        [Item.of(item) for item in questions],
        {
            **provenance_of_run(model),
            **reader_provenance(reader),
            "tokens": rule_name(tokens),
            "answer": repr(reader),
            "prompt": rule_name(questions.prompt),
            "shuffle": questions.shuffle,
        },
        ["positive", *["reached"] * uneven, *["total"] * recorder.magnitudes, *["maximum"] * maxima],
    )
    place = {item.id: row for row, item in enumerate(questions)}
    limit = MemoryLimit(statistics.provenance.get("halved", ()))
    with statistics._locked(), recorder, torch.inference_mode():
        done = statistics.done
        coming = (
            batch
            for batch in batches(questions, batch_size, _lengths(model, questions) if by_length else None)
            if not done[[place[item.id] for item in batch]].all()
        )
        with (
            progress_bar(progress, len(questions), initial=int(done.sum()), unit="item") as bar,
            prefetched(model, reader, coming, prefetch, lambda batch: batch) as encoded,
        ):
            for batch, encode in encoded:
                try:
                    for part, reading in _read(model, reader, recorder, batch, encode, limit, None):
                        rows = [place[item.id] for item in part]
                        tables, counted = recorder._by_row()
                        if not uneven and (tables["reached"] != counted[:, None]).any():
                            raise MismatchError(
                                f"{type(model.hf).__name__} computes its sites several times for a token in one "
                                "forward, which the files of record_items do not hold; vn.record does, in its `routed`"
                            )
                        chosen = [-1 if choice is None else choice for choice in reading.chosen]
                        statistics._write(rows, chosen, counted, reading.margins(part).numpy(), tables)
                        bar.update(len(part) - int(done[rows].sum()))
                finally:
                    recorder._forget()
                    statistics._note(limit.halved)
    return statistics


def check_sizes(batch_size: int, prefetch: int | None) -> None:
    whole("batch_size", batch_size, QuestionError, least=1)
    if prefetch is not None and whole("prefetch", prefetch, QuestionError) < 0:
        raise QuestionError(f"prefetch {prefetch} is less than 0; 0 encodes each batch when its turn comes")


def _lengths(model: VLM, questions: QuestionSet) -> Callable[[Question], int]:
    """How many tokens each question has, about."""
    return functools.partial(model.encoder.length, questions)


def _read(
    model: VLM,
    reader: AnswerReader,
    recorder: Recorder,
    batch: QuestionSet,
    encode: Callable[[], Any],
    limit: MemoryLimit,
    skipped: list[str] | None,
) -> Iterator[tuple[QuestionSet, Reading]]:
    """Read a batch's answers while counting, in one part or, where memory does not suffice, in several."""

    def count(part: QuestionSet, ready: Any) -> Reading:
        recorder._forget()
        try:
            return reader.read(model, part, ready, recorder._watch)
        except _NotFinite as found:
            raise _located(model, reader, recorder, part, found) from None

    return asked_in_parts(batch, limit, encode, functools.partial(reader.encode, model), count, skipped)


def _located(model: VLM, reader: AnswerReader, recorder: Recorder, batch: QuestionSet, found: _NotFinite) -> Exception:
    """Run a spoiled batch again, looking at every site, to name the first one that is not finite."""
    recorder._strict = True
    recorder._forget()
    try:
        reader.read(model, batch, reader.encode(model, batch), recorder._watch)
    except _NotFinite as first:
        found = first
    finally:
        recorder._strict = False
    rows = recorder._rows
    item = batch[rows.index(found.row)].id if found.row in rows else batch[0].id
    return ActivationError(
        f"NaN or infinite activations at {found.site}, question {item!r}: no earlier site of the space has any. "
        "Half precision overflows in some models: try dtype=torch.float32 or bfloat16"
    )
