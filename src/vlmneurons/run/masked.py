"""The answers to a batch of questions under many masks: what a study spends its time on.

Where questions meet different masks (`read_ragged`), answers are put together in *turns*: the first turn holds each
question's answer under the first mask that it meets, the second turn those under the second mask, and so on. A turn is
read like any batch, so no reader needs to know of it; and there are only as many turns as one question meets masks.
"""

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vlmneurons.errors import AblationError
from vlmneurons.files.stopping import hooked
from vlmneurons.model.architectures.inside import is_watched
from vlmneurons.model.vlm import VLM
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.run.ablation import Ablation
from vlmneurons.run.readers import AnswerReader, Generate, LogitReader, Reading, Wanted, reads_logits
from vlmneurons.run.replay import replayed
from vlmneurons.run.replayable import structure_for
from vlmneurons.run.structure import CannotReplay


def read_masked(
    model: VLM, reader: AnswerReader, questions: QuestionSet, encoded: object, ablations: Sequence[Ablation]
) -> Iterator[Reading]:
    """What the model answers to one batch under each ablation, in order, one reading at a time.

    All masks share one forward (see `vlmneurons.run.replay`) where the reader needs the logits of one forward
    (`LogitReader`) and the model's decoder can be called again. Otherwise, and for ablations outside the language
    tower, there is one run for each mask. The chosen options are the same either way. Scores may differ by rounding, as
    they do between two batch sizes: in float32 by about 1e-5 nats.

    An ablation of no neurons gives the reading of the untouched model, and costs next to nothing beside others.

    Args:
        model: the model, in inference mode.
        reader: how answers are read.
        questions: the batch.
        encoded: what ``reader.encode`` made of it.
        ablations: what to switch off; none of them may be entered.
    """
    shared = [ablation for ablation in ablations if _in_decoder(ablation)]
    readings = iter(())
    if reads_logits(reader) and len(shared) > 1:
        readings = _read_shared(model, reader, questions, encoded, shared)
    for ablation in ablations:
        reading = next(readings, None) if ablation in shared else None
        if reading is None:
            with ablation:
                reading = reader.read(model, questions, encoded)
        yield reading


def _in_decoder(ablation: Ablation) -> bool:
    return all(site.tower == "language" for site in ablation.edits)


def _read_shared(
    model: VLM, reader: LogitReader, questions: QuestionSet, encoded: object, ablations: Sequence[Ablation]
) -> Iterator[Reading]:
    """The readings of one shared forward; none, or no more, where it turns out that the masks cannot share it."""
    if any(map(is_watched, model.hf.modules())):
        return  # the user's hooks are to see one run for each mask, and none that only tries out the model
    try:
        structure = structure_for(model, questions)
        for logits in replayed(model, structure, reader.wants(encoded), ablations):
            yield reader.score(model, questions, encoded, logits)
    except CannotReplay:
        return


# -- questions that meet different masks -------------------------------------------------------------------------------


def read_ragged(
    model: VLM,
    reader: AnswerReader,
    questions: QuestionSet,
    encoded: object,
    ablations: Sequence[Ablation],
    asked: Sequence[Sequence[int]],
) -> Iterator[Reading]:
    """What the model answers to some questions of one batch under each ablation, in the order of the ablations.

    Where all masks can share one forward, each is computed for its own questions alone. Where they cannot, the whole
    batch is run, each question under a mask of its own, as often as a question meets masks. Where that is impossible
    too, as for neurons of a vision tower or of routed experts, there is a run for each mask with its questions.

    Args:
        model: the model, in inference mode.
        reader: how answers are read.
        questions: the batch.
        encoded: what ``reader.encode`` made of it.
        ablations: what to switch off; none of them may be entered.
        asked: for each ablation the questions that meet it, by their places in the batch.
    """
    alone = [ablation.by_row or not _in_decoder(ablation) for ablation in ablations]
    sharing = [pair for pair, needs_run in zip(zip(ablations, asked, strict=True), alone, strict=True) if not needs_run]
    readings: Iterator[Reading] | None = None
    if sharing and not any(map(is_watched, model.hf.modules())):  # the user's hooks are to see one run for each mask
        turns = _Turns(questions, sharing)
        for read_turns in (_turns_of_one_forward, _turns_by_row):
            with contextlib.suppress(CannotReplay):
                readings = turns.readings(list(read_turns(model, reader, questions, encoded, turns)))
                break
    encoded_parts: dict[tuple[int, ...], Any] = {}
    for ablation, places, needs_run in zip(ablations, asked, alone, strict=True):
        if readings is not None and not needs_run:
            yield next(readings)
            continue
        part = questions.with_items([questions[place] for place in places])
        if tuple(places) not in encoded_parts:
            encoded_parts[tuple(places)] = reader.encode(model, part)
        with ablation:
            yield reader.read(model, part, encoded_parts[tuple(places)])


class _Turns:
    """Which ablation each question meets in each turn."""

    def __init__(self, questions: QuestionSet, pairs: Sequence[tuple[Ablation, Sequence[int]]]) -> None:
        self.ablations = [ablation for ablation, _ in pairs]
        self.questions = [places for _, places in pairs]
        """For each ablation the questions that meet it, by their places in the batch."""
        self.turns_of: list[list[int]] = []
        """For each ablation the turns in which these questions meet it."""
        self.met: list[dict[int, int]] = []
        """For each turn the ablation of each question, by its number; in late turns some questions may have none."""
        n_met = [0] * len(questions)
        for number, places in enumerate(self.questions):
            self.turns_of.append([n_met[place] for place in places])
            for place in places:
                if n_met[place] == len(self.met):
                    self.met.append({})
                self.met[n_met[place]][place] = number
                n_met[place] += 1

    def readings(self, turns: Sequence[Reading]) -> Iterator[Reading]:
        """The readings of the ablations, from those of the turns."""
        for places, turns_of_places in zip(self.questions, self.turns_of, strict=True):
            parts = [turns[turn].of_rows([place]) for place, turn in zip(places, turns_of_places, strict=True)]
            scores, graded, texts = (
                [value for part in parts if (value := getattr(part, name)) is not None]
                for name in ("scores", "graded", "texts")
            )
            yield Reading(
                tuple(part.chosen[0] for part in parts),
                torch.cat(scores) if len(scores) == len(parts) else None,
                tuple(text for (text,) in texts) if len(texts) == len(parts) else None,
                torch.cat(graded) if len(graded) == len(parts) else None,
            )


def _turns_of_one_forward(
    model: VLM, reader: AnswerReader, questions: QuestionSet, encoded: object, turns: _Turns
) -> Iterator[Reading]:
    """The turns' readings from one shared forward.

    Raises:
        CannotReplay: the masks cannot share a forward.
    """
    if not reads_logits(reader):
        raise CannotReplay("the reader runs the model in a way of its own")
    wanted = reader.wants(encoded)
    rows = _rows_of_questions(wanted, len(questions))
    structure = structure_for(model, questions)
    rows_under = [[row for question in asked for row in rows[question]] for asked in turns.questions]
    logits_under = replayed(model, structure, wanted, turns.ablations, rows_under)
    # The logits come mask by mask; a turn is scored as soon as those of all its questions are there.
    collected: list[dict[int, Tensor]] = [{} for _ in turns.met]
    n_missing = [len(met) for met in turns.met]
    n_scored = 0
    for asked, turns_of_asked, logits in zip(turns.questions, turns.turns_of, logits_under, strict=True):
        logits_of_rows = iter(logits)
        for question, turn in zip(asked, turns_of_asked, strict=True):
            collected[turn].update({row: next(logits_of_rows) for row in rows[question]})
            n_missing[turn] -= 1
        while n_scored < len(n_missing) and n_missing[n_scored] == 0:
            yield reader.score(model, questions, encoded, _filled_up(collected[n_scored], wanted.positions))
            collected[n_scored].clear()
            n_scored += 1


def _rows_of_questions(wanted: Wanted, n_questions: int) -> list[list[int]]:
    """For each question of a batch the rows that are asked for it.

    Raises:
        CannotReplay: the reader does not say.
    """
    rows = [rows for question in range(n_questions) if (rows := wanted.rows_of([question])) is not None]
    if len(rows) < n_questions:
        raise CannotReplay("it is not known which rows are a question's")
    return rows


def _filled_up(logits: Mapping[int, Tensor], positions: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits of all rows of a batch; zeros for questions that meet no mask in a turn, whose answers nobody takes."""
    like = next(iter(logits.values()))
    return [
        logits[row] if row in logits else like.new_zeros(len(wanted), like.shape[-1])
        for row, wanted in enumerate(positions)
    ]


_MIXES_ROWS: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models whose MLPs were seen not to be given one row of values for each row of a batch."""


def _turns_by_row(
    model: VLM, reader: AnswerReader, questions: QuestionSet, encoded: object, turns: _Turns
) -> Iterator[Reading]:
    """The turns' readings from one run each, in which every row of the batch is under the ablation of its question.

    Raises:
        CannotReplay: rows cannot have ablations of their own.
    """
    question_of_row = list(range(len(questions)))
    if reads_logits(reader):
        wanted = reader.wants(encoded)
        rows = _rows_of_questions(wanted, len(questions))
        owners = {row: question for question, rows_of_question in enumerate(rows) for row in rows_of_question}
        if len(owners) < len(wanted.positions):
            raise CannotReplay("some rows are no question's, so it is not known which mask they are to be under")
        question_of_row = [owners[row] for row in range(len(owners))]
    elif type(reader).read is not Generate.read:
        raise CannotReplay("the reader runs the model in a way of its own")
    mlps = [model.mlp_of(site) for ablation in turns.ablations for site in ablation.edits]
    if any(mlp.routed or mlp.expert is not None for mlp in mlps):
        raise CannotReplay("not all neurons are computed row by row")
    if any(ablation.mode not in ("zero", "scale") for ablation in turns.ablations) or model.hf in _MIXES_ROWS:
        raise CannotReplay("this intervention cannot be another one in each row")
    space = turns.ablations[0].space
    if not all(ablation.space.same_neurons(space) for ablation in turns.ablations):
        raise CannotReplay("rows cannot have neurons of different spaces")
    for met in turns.met:
        numbers = [met.get(question) for question in question_of_row]
        of_rows = [None if number is None else turns.ablations[number] for number in numbers]
        with hooked(_ablations_by_row(model, of_rows, NeuronSet.empty(space))):
            try:
                yield reader.read(model, questions, encoded)
            except AblationError as error:
                _MIXES_ROWS.add(model.hf)
                raise CannotReplay(str(error)) from error


def _ablations_by_row(model: VLM, of_rows: Sequence[Ablation | None], nothing: NeuronSet) -> Iterator[Ablation]:
    """Ablations by row which together do to each row what its ablation does: one for each kind of intervention."""
    kinds = [None if ablation is None else (ablation.mode, ablation.factor, ablation.at) for ablation in of_rows]
    for mode, factor, at in sorted({kind for kind in kinds if kind is not None}):
        sets = [nothing] * len(of_rows)
        for row, (ablation, kind) in enumerate(zip(of_rows, kinds, strict=True)):
            if ablation is not None and kind == (mode, factor, at):
                sets[row] = cast(NeuronSet, ablation.neurons)  # by row there would be several
        yield Ablation(model, sets, mode, factor=factor if mode == "scale" else None, at=at)
