"""The answers to a batch of questions under many masks: what a study spends its time on."""

from collections.abc import Iterator, Sequence
from typing import Any

from vlmneurons.ablation import Ablation
from vlmneurons.answers import AnswerReader, Reading
from vlmneurons.model import VLM
from vlmneurons.questions import QuestionSet


def read_masked(
    model: VLM, reader: AnswerReader, questions: QuestionSet, encoded: Any, ablations: Sequence[Ablation]
) -> Iterator[Reading]:
    """What the model answers to one batch under each ablation, in order, one reading at a time.

    Args:
        model: the model, in inference mode.
        reader: how answers are read.
        questions: the batch.
        encoded: what ``reader.encode`` made of it.
        ablations: what to switch off; none of them may be entered.
    """
    for ablation in ablations:
        with ablation:
            reading = reader.read(model, questions, encoded)
        yield reading
