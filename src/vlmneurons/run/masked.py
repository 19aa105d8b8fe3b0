"""The answers to a batch of questions under many masks: what a study spends its time on.

Where questions meet different masks (`read_some`), answers are put together in *turns*: the first turn holds the answer
of every question under the first mask that it meets, the second those under the second, and so on. A turn is read like
one batch, so that no reader needs to know, and there are as many as one question meets masks, not as many as there are.
"""

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmneurons.errors import AblationError
from vlmneurons.files.stopping import UndividedStack
from vlmneurons.model.architectures.inside import is_watched
from vlmneurons.model.vlm import VLM
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.run.ablation import Ablation
from vlmneurons.run.readers import AnswerReader, Generate, LogitReader, Reading, reads_logits
from vlmneurons.run.replay import CannotReplay, replayed
from vlmneurons.run.replayable import structure_for


def read_masked(
    model: VLM, reader: AnswerReader, questions: QuestionSet, encoded: object, ablations: Sequence[Ablation]
) -> Iterator[Reading]:
    """What the model answers to one batch under each ablation, in order, one reading at a time.

    Where the reader needs one forward's logits (`LogitReader`) and the model's decoder can be called again, all masks
    share one forward (see `vlmneurons.run.replay`); where not, and for ablations outside the language tower, it is one
    run for each. The chosen options are the same either way. Scores may differ by rounding, as between two batch sizes:
    in float32 by about 1e-5 nats.

    An ablation of no neurons gives the reading of the untouched model, and costs next to nothing beside others.

    Args:
        model: the model, in inference mode.
        reader: how answers are read.
        questions: the batch.
        encoded: what ``reader.encode`` made of it.
        ablations: what to switch off; none of them may be entered.
    """
    shared = [one for one in ablations if all(site.tower == "language" for site in one.edits)]
    readings = iter(())
    if reads_logits(reader) and len(shared) > 1:
        readings = _read_shared(model, reader, questions, encoded, shared)
    for ablation in ablations:
        reading = next(readings, None) if ablation in shared else None
        if reading is None:
            with ablation:
                reading = reader.read(model, questions, encoded)
        yield reading


def _read_shared(
    model: VLM, reader: LogitReader, questions: QuestionSet, encoded: object, ablations: Sequence[Ablation]
) -> Iterator[Reading]:
    """The readings of one shared forward; none, or no more, where it turns out that this cannot be."""
    if any(map(is_watched, model.hf.modules())):
        return  # whose it is wants to see one run for each mask, and none that finds out about the model
    try:
        structure = structure_for(model, questions)
        for logits in replayed(model, structure, reader.wants(encoded), ablations):
            yield reader.score(model, questions, encoded, logits)
    except CannotReplay:
        return


# -- questions that meet different masks -------------------------------------------------------------------------------


def read_some(
    model: VLM,
    reader: AnswerReader,
    questions: QuestionSet,
    encoded: object,
    ablations: Sequence[Ablation],
    rows: Sequence[Sequence[int]],
) -> Iterator[Reading]:
    """What the model answers to some questions of one batch under each ablation, in the order of the ablations.

    Where all masks can share one forward, each is computed for its own questions alone. Where not, a run has the
    questions of the batch under a mask of each one's own, as often as a question meets masks; and where that cannot be
    either, as for neurons of a vision tower or of routed experts, there is a run for each mask and its questions.

    Args:
        model: the model, in inference mode.
        reader: how answers are read.
        questions: the batch.
        encoded: what ``reader.encode`` made of it.
        ablations: what to switch off; none of them may be entered.
        rows: for each ablation the places of the questions that meet it.
    """
    alone = [one.by_row or any(site.tower != "language" for site in one.edits) for one in ablations]
    pairs = [(one, own) for one, own, apart in zip(ablations, rows, alone, strict=True) if not apart]
    shared: Iterator[Reading] | None = None
    if pairs and not any(map(is_watched, model.hf.modules())):  # whose it is wants to see one run for each mask
        turns = _Turns(questions, pairs)
        for way in (_tiles, _by_row):
            with contextlib.suppress(CannotReplay):
                shared = turns.readings(list(way(model, reader, questions, encoded, turns)))
                break
    known: dict[tuple[int, ...], Any] = {}
    for ablation, own, apart in zip(ablations, rows, alone, strict=True):
        if shared is not None and not apart:
            yield next(shared)
            continue
        some = questions.with_items([questions[row] for row in own])
        if tuple(own) not in known:
            known[tuple(own)] = reader.encode(model, some)
        with ablation:
            yield reader.read(model, some, known[tuple(own)])


class _Turns:
    """Which ablation each question meets in each turn."""

    def __init__(self, questions: QuestionSet, asked: Sequence[tuple[Ablation, Sequence[int]]]) -> None:
        self.ablations, self.rows = [ablation for ablation, _ in asked], [rows for _, rows in asked]
        self.places: list[list[int]] = []
        """For each ablation the turns in which its questions meet it."""
        met = [0] * len(questions)
        self.met: list[dict[int, int]] = []
        """For each turn the ablation of each question; in late turns some questions may have none."""
        for number, own in enumerate(self.rows):
            self.places.append([met[row] for row in own])
            for row in own:
                if met[row] == len(self.met):
                    self.met.append({})
                self.met[met[row]][row] = number
                met[row] += 1

    def readings(self, turns: Sequence[Reading]) -> Iterator[Reading]:
        """The readings of the ablations, from those of the turns."""
        for own, places in zip(self.rows, self.places, strict=True):
            parts = [turns[turn].of_rows([row]) for row, turn in zip(own, places, strict=True)]
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


def _tiles(
    model: VLM, reader: AnswerReader, questions: QuestionSet, encoded: object, turns: _Turns
) -> Iterator[Reading]:
    """The turns' readings from one shared forward.

    Raises:
        CannotReplay: that cannot be.
    """
    if not reads_logits(reader):
        raise CannotReplay("the reader runs the model in a way of its own")
    wanted = reader.wants(encoded)
    known = [wanted.rows_of([row]) for row in range(len(questions))]
    rows = [own for own in known if own is not None]
    if len(rows) < len(known):
        raise CannotReplay("it is not known which rows are a question's")
    structure = structure_for(model, questions)
    waiting: list[dict[int, list[Tensor]]] = [{} for _ in turns.met]
    computed = [[row for place in own for row in rows[place]] for own in turns.rows]
    done = 0
    logits_of = replayed(model, structure, wanted, turns.ablations, computed)
    for own, places, logits in zip(turns.rows, turns.places, logits_of, strict=True):
        left = iter(logits)
        for place, turn in zip(own, places, strict=True):
            waiting[turn][place] = [next(left) for _ in rows[place]]
        while done < len(waiting) and len(waiting[done]) == len(turns.met[done]):
            yield reader.score(model, questions, encoded, _filled_up(waiting[done], rows, wanted.positions))
            waiting[done].clear()
            done += 1


def _filled_up(
    known: Mapping[int, Sequence[Tensor]], rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Logits of all rows of a batch; zeros for questions that meet no mask in a turn, whose answers nobody takes."""
    like = next(iter(known.values()))[0]
    found = {row: one for place, logits in known.items() for row, one in zip(rows[place], logits, strict=True)}
    return [found[n] if n in found else like.new_zeros(len(own), like.shape[-1]) for n, own in enumerate(positions)]


_BY_ROW: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()
"""Models whose MLPs were seen not to tell the rows of a batch apart."""


def _by_row(
    model: VLM, reader: AnswerReader, questions: QuestionSet, encoded: object, turns: _Turns
) -> Iterator[Reading]:
    """The turns' readings from a run each, in which every row has neurons of its own.

    Raises:
        CannotReplay: that cannot be.
    """
    owners: list[int] = list(range(len(questions)))
    if reads_logits(reader):
        wanted = reader.wants(encoded)
        of_rows = {row: place for place in owners for row in wanted.rows_of([place]) or ()}
        if len(of_rows) < len(wanted.positions):
            raise CannotReplay("it is not known which rows are a question's")
        owners = [of_rows[row] for row in range(len(wanted.positions))]
    elif type(reader).read is not Generate.read:
        raise CannotReplay("the reader runs the model in a way of its own")
    mlps = [model.mlp_of(site) for one in turns.ablations for site in one.edits]
    if any(mlp.tower != "language" or mlp.routed or mlp.expert is not None for mlp in mlps):
        raise CannotReplay("not all neurons are computed row by row")
    if any(one.mode not in ("zero", "scale") for one in turns.ablations) or not _BY_ROW.get(model.hf, True):
        raise CannotReplay("this intervention cannot be another one in each row")
    kind_of = [(one.mode, one.factor, one.at) for one in turns.ablations]
    nothing = NeuronSet.empty(turns.ablations[0].space)
    if not all(one.space.same_neurons(nothing.space) for one in turns.ablations):
        raise CannotReplay("rows cannot have neurons of different spaces")
    for met in turns.met:
        with UndividedStack() as stack:
            for mode, factor, at in sorted(set(kind_of)):
                sets = [nothing] * len(owners)
                for row, owner in enumerate(owners):
                    if owner in met and kind_of[met[owner]] == (mode, factor, at):
                        neurons = turns.ablations[met[owner]].neurons
                        assert isinstance(neurons, NeuronSet)
                        sets[row] = neurons
                if any(map(len, sets)):
                    factor = factor if mode == "scale" else None
                    stack.enter_context(Ablation(model, sets, mode, factor=factor, at=at))
            try:
                yield reader.read(model, questions, encoded)
            except AblationError as error:
                _BY_ROW[model.hf] = False
                raise CannotReplay(str(error)) from error
