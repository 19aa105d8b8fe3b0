"""What an engine is: whatever runs one batch of questions, with the model as it is and under interventions, and counts.

`vlmneurons.run.local` runs the model here, by hooks; `vlmneurons.run.remote` runs it where nnsight can reach it.
Neither knows what becomes of answers and counts, and neither recording nor study knows which engine it is given. A new
engine is a subclass of `Engine`, and a line in `engine_of`.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from vlmneurons.checks import JSON
from vlmneurons.errors import MismatchError, QuestionError
from vlmneurons.model.encoder import Batch
from vlmneurons.model.tokens import TokenRule
from vlmneurons.model.vlm import VLM
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.run.ablation import Ablation
from vlmneurons.run.readers import AnswerReader, Reading
from vlmneurons.statistics.items import ItemStatistic

Counts = Mapping[str, Tensor | None]
"""Of one site, for the rows of a batch; see `vlmneurons.statistics.counting`."""


@runtime_checkable
class Counting(Protocol):
    """What counts while a batch is asked: by hooks where the model runs here, else by counts that it is given."""

    space: NeuronSpace
    tokens: TokenRule | Mapping[str, TokenRule]
    statistics: Mapping[str, ItemStatistic]
    magnitudes: bool
    maxima: bool

    def attached(self) -> contextlib.AbstractContextManager[object]:
        """Within, whatever the model runs here is counted, by hooks."""
        ...

    def watch(self, batch: Batch, rows: list[int]) -> contextlib.AbstractContextManager[object]:
        """Around the run that shows a batch's questions to the model; ``rows`` stand for them."""
        ...

    def take(self, counts: Mapping[int, Counts], n_pictures: Mapping[int, int], /) -> None:
        """Counts of the watched run that were made elsewhere, by the number of the site in the space.

        ``n_pictures`` says, of sites of a vision tower, how many rows of pictures they saw.
        """
        ...


@dataclass(frozen=True)
class Run:
    """One way of asking a batch: under an ablation or with the model as it is, all its questions or some.

    Attributes:
        ablation: what is switched off; None for the model as it is.
        rows: places of the questions that meet it, in order; None for the whole batch.
    """

    ablation: Ablation | None = None
    rows: tuple[int, ...] | None = None


class Engine(ABC):
    """Runs batches of questions with one model, and reads their answers in one way.

    Args:
        model: the model.
        reader: how answers are read.

    Attributes:
        name: what the setting calls it; numbers of different engines are not mixed.
        ragged: whether questions that meet different masks may share a batch, at no greater cost than in separate ones.
        differentiates: whether what it runs gives gradients.
    """

    name: str
    ragged: bool = False
    differentiates: bool = False

    def __init__(self, model: VLM, reader: AnswerReader) -> None:
        self.model, self.reader = model, reader

    def encode(self, questions: QuestionSet) -> object:
        """What a batch is run on: made once, and run as often as needed."""
        return self.reader.encode(self.model, questions)

    def check(self, ablations: Sequence[Ablation], counting: Counting | None) -> None:  # noqa: B027 (most can do all)
        """Refuse what the engine cannot do, before anything is run.

        Args:
            ablations: what will be switched off.
            counting: what will count, if anything.

        Raises:
            MismatchError: sites that the engine cannot reach.
            AblationError: interventions that it cannot make.
        """

    def check_alone(self, batch: QuestionSet) -> None:  # noqa: B027 (an engine of its own keeps rows apart)
        """Refuse a batch whose questions the model answers otherwise when each is asked alone.

        Args:
            batch: questions that are about to share a batch.

        Raises:
            MismatchError: the model's own code does not keep them apart.
        """

    def attached(self, counting: Counting) -> contextlib.AbstractContextManager[object]:
        """Within, batches can be counted."""
        return contextlib.nullcontext()

    @abstractmethod
    def count(self, questions: QuestionSet, encoded: object, counting: Counting) -> Reading:
        """The answers to a batch with the model as it is; ``counting`` counts meanwhile."""

    @abstractmethod
    def answers(self, questions: QuestionSet, encoded: object, runs: Sequence[Run]) -> Iterator[Reading]:
        """The answers to a batch in each run, in order, one reading at a time."""

    @property
    def own_setting(self) -> Mapping[str, str]:
        """Entries of the `Setting` that the engine knows, and that cannot be read from the model that is here."""
        return {}

    @property
    def provenance(self) -> JSON:
        """What a result keeps of where and how the model ran, beside the setting."""
        return {}


def need_gradients(engine: Engine, work: str) -> None:
    """Refuse an engine that gives no gradients.

    Args:
        engine: the engine.
        work: what needs them, as a noun.

    Raises:
        QuestionError: it gives none.
    """
    if not engine.differentiates:
        raise QuestionError(f"{work} needs gradients, which do not come back from {engine.name}; run the model here")


def need_plain_counts(engine: Engine, counting: Counting) -> None:
    """Refuse counting that only works here, for an engine that counts where the model runs.

    Raises:
        MismatchError: token rules by name, or statistics of the user's own.
    """
    if isinstance(counting.tokens, Mapping) or counting.statistics:
        raise MismatchError(f"{engine.name}: token rules by name and statistics of your own are counted here only")
