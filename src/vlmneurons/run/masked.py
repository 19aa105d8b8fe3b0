"""The answers to a batch of questions under many masks: what a study spends its time on."""

from collections.abc import Iterator, Sequence

from vlmneurons.model.architectures.inside import is_watched
from vlmneurons.model.vlm import VLM
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.run.ablation import Ablation
from vlmneurons.run.readers import AnswerReader, LogitReader, Reading
from vlmneurons.run.replay import CannotReplay, Structure, replayed


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
    shared = [one for one in ablations if all(site.tower == "language" for site in one._edits)]
    readings = iter(())
    if isinstance(reader, LogitReader) and type(reader).read is LogitReader.read and len(shared) > 1:
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
        structure = Structure.of(model, questions)
        for logits in replayed(model, structure, reader.wants(encoded), ablations):
            yield reader.score(model, questions, encoded, logits)
    except CannotReplay:
        return
