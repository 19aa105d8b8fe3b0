"""The model that is here: answers and counts by hooks, and many masks from one forward where that is possible."""

import contextlib
from collections.abc import Iterator, Sequence

from vlmneurons.errors import MismatchError
from vlmneurons.model.encoder import Batch
from vlmneurons.model.vlm import VLM
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.run.ablation import Ablation
from vlmneurons.run.alone import check_alone
from vlmneurons.run.engine import Counting, Engine, Run
from vlmneurons.run.masked import read_masked, read_ragged
from vlmneurons.run.readers import AnswerReader, Reading


class LocalEngine(Engine):
    """Runs the model in this process."""

    name = "transformers"
    ragged = True
    differentiates = True

    def __init__(self, model: VLM, reader: AnswerReader) -> None:
        super().__init__(model, reader)
        self._untouched = Ablation(model, NeuronSet.empty(model.space()))

    def check_alone(self, batch: QuestionSet) -> None:
        """See `Engine.check_alone`."""
        check_alone(self.model, batch, self.reader.padding_side)

    def attached(self, counting: Counting) -> contextlib.AbstractContextManager[object]:
        """See `Engine.attached`."""
        return counting.attached()

    def count(self, questions: QuestionSet, encoded: object, counting: Counting) -> Reading:
        """See `Engine.count`.

        Raises:
            MismatchError: a reader that does not say which run shows the questions to the model.
        """
        entered = 0

        def watch(batch: Batch, rows: list[int]) -> contextlib.AbstractContextManager[object]:
            nonlocal entered
            entered += 1
            return counting.watch(batch, rows)

        reading = self.reader.read(self.model, questions, encoded, watch)
        if entered != 1:
            raise MismatchError(
                f"{self.reader!r} entered `watch` {entered} times; a reader enters it once, around the run that shows "
                "the questions to the model, or nothing could be counted"
            )
        return reading

    def answers(self, questions: QuestionSet, encoded: object, runs: Sequence[Run]) -> Iterator[Reading]:
        """See `Engine.answers`: all masks share one forward where the model allows it."""
        # The untouched model is one more mask, of no neurons, and shares the forward with the others.
        ablations = [self._untouched if run.ablation is None else run.ablation for run in runs]
        if all(run.rows is None for run in runs):
            return read_masked(self.model, self.reader, questions, encoded, ablations)
        rows = [range(len(questions)) if run.rows is None else run.rows for run in runs]
        return read_ragged(self.model, self.reader, questions, encoded, ablations, rows)
