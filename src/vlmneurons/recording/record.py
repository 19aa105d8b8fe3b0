"""Recording counts of questions by group: `record`."""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence

from vlmneurons.checks import check_choice
from vlmneurons.errors import ActivationError, QuestionError
from vlmneurons.model.encoder import TokenRule
from vlmneurons.model.vlm import VLM
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.progress import Progress
from vlmneurons.questions.question import Question
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.recording.counter import Counter, NotFinite
from vlmneurons.recording.groups import GroupTables
from vlmneurons.run.ask import Job, Options, ask, engine_of, to_ask
from vlmneurons.run.engine import Engine
from vlmneurons.run.identity import run_provenance, setting_of_run
from vlmneurons.run.readers import AnswerReader, Reading, checked
from vlmneurons.run.remote import Remote
from vlmneurons.statistics.counts import ActivationStatistics

CONDITIONS = ("correct", "wrong", "all")
"""Which questions enter the statistics: those answered right, those answered wrong, or every one."""


def record(
    model: VLM,
    questions: QuestionSet | Sequence[Question],
    space: NeuronSpace | None = None,
    *,
    condition: str = "correct",
    tokens: TokenRule | Mapping[str, TokenRule] = "content",
    batch_size: int = 8,
    answer: str | AnswerReader | None = None,
    magnitudes: bool = False,
    by_length: bool = False,
    prefetch: int | None = None,
    on_error: str = "raise",
    progress: Progress = True,
    remote: Remote = False,
    distributed: bool = False,
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
            `vlmneurons.model.encoder.TokenTable.counted`. Several rules by name, such as ``{"picture": "image", "text":
            "text"}``, make the kinds of tokens the groups, in place of the questions' own, all counted in one pass.
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
        distributed: share the batches with the other processes of a ``torchrun``; each gets the whole, which equals
            that of one process.

    Returns:
        Counts ``[group, neuron]``, groups sorted; token rules by name in their order. A group none of whose questions
        met the condition has zeros.

    Raises:
        QuestionError: a question cannot be asked. Its ``partial``, like that of any error or interrupt on the way,
            holds the statistics of the batches before.
        ActivationError: NaN or infinite activations; the message names the site and the question.
        OutOfMemoryError: a single question does not fit into memory.

    Source: activation probabilities of correctly answered questions, Zhao et al. 2025 (arXiv 2510.24942).
    """
    check_choice("condition", condition, CONDITIONS, QuestionError)
    options = Options(batch_size, by_length, prefetch, on_error, progress, remote, distributed)
    questions = to_ask(questions, answer, "to record")
    engine = engine_of(model, questions, remote)
    counter = Counter(model, space, tokens=tokens, magnitudes=magnitudes)
    job = _GroupJob(engine, counter, questions, condition)
    ask(job, questions, options)
    parts = options.processes.gather((job.statistics(), job.skipped, job.limit.halved))
    whole = functools.reduce(operator.add, [part for part, _, _ in parts])
    skipped, halved = [one for _, some, _ in parts for one in some], [one for _, _, some in parts for one in some]
    order = {item.id: number for number, item in enumerate(questions)}
    more = {"skipped": sorted(skipped, key=order.__getitem__), **({"halved": halved} if halved else {})}
    return whole.with_provenance({**whole.provenance, **more})


class CountingJob(Job[Reading]):
    """Asks with the model as it is, and counts meanwhile.

    Args:
        engine: what runs the model.
        counter: what counts.
    """

    def __init__(self, engine: Engine, counter: Counter) -> None:
        super().__init__(engine)
        self.counter = counter
        counter.strict = False
        engine.check([], counter)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """See `Job.running`."""
        with self.engine.attached(self.counter):
            yield

    def run(self, questions: QuestionSet, encoded: object, told: Callable[[int], object]) -> Reading:
        """See `Job.run`.

        Raises:
            ActivationError: NaN or infinite activations; the message names the site and the question.
        """
        try:
            return checked(self.engine.count(questions, encoded, self.counter), self.engine.reader, questions)
        except NotFinite as found:
            raise self._located(questions, found) from None

    def forget(self) -> None:
        """See `Job.forget`."""
        self.counter.forget()

    def question_in(self, questions: QuestionSet, row: int) -> Question:
        """The question that a row of the forward stands for; the first one, of a row that stands for none."""
        rows = [] if self.counter.frame is None else self.counter.frame.rows
        return questions[rows.index(row) if row in rows else 0]

    def _located(self, questions: QuestionSet, found: NotFinite) -> ActivationError:
        """Run a spoiled batch again, looking at every site, to name the first one that is not finite."""
        counter = self.counter
        counter.strict = True
        item = questions[0]
        try:
            self.engine.count(questions, self.encode(questions), counter)
        except NotFinite as first:
            found, item = first, self.question_in(questions, first.row)
        finally:
            counter.strict = False
        return ActivationError(
            f"NaN or infinite activations at {found.site}, question {item.id!r}: no earlier site of the space has any. "
            "Half precision overflows in some models: try dtype=torch.float32 or bfloat16"
        )


class _GroupJob(CountingJob):
    """Adds the counts of questions whose answers meet a condition to those of their groups."""

    def __init__(self, engine: Engine, counter: Counter, questions: QuestionSet, condition: str) -> None:
        super().__init__(engine, counter)
        self._questions, self._condition = questions, condition
        self._tables = GroupTables(counter)
        self._setting = setting_of_run(engine.model, tokens=counter.tokens, questions=questions, engine=engine)
        self._asked = self._right = 0

    def take(self, number: int, questions: QuestionSet, made: Reading) -> int:
        """See `Job.take`."""
        right = [choice == item.answer for choice, item in zip(made.chosen, questions, strict=True)]
        self._asked, self._right = self._asked + len(right), self._right + sum(right)
        meets = [self._condition == "all" or is_right == (self._condition == "correct") for is_right in right]
        kinds = self.counter.tokens if isinstance(self.counter.tokens, Mapping) else (None,)
        groups = [kind or item.group for kind in kinds for item in questions]
        self._tables.add([group if ok else None for group, ok in zip(groups, meets * len(kinds), strict=True)])
        return len(questions)

    def statistics(self) -> ActivationStatistics:
        """Of what was taken so far."""
        about = {"tokens": self.counter.tokens, "questions": self._questions, "engine": self.engine}
        provenance = run_provenance(self.engine.model, self._setting, **about)
        more = {"condition": self._condition, "skipped": list(self.skipped), **self.limit.provenance}
        tokens = self.counter.tokens
        groups = tuple(tokens) if isinstance(tokens, Mapping) else self._questions.groups
        return self._tables.statistics({**provenance, **more}, groups)

    def partial(self) -> ActivationStatistics | None:
        """See `Job.partial`."""
        return self.statistics() if self._tables.whole else None

    def postfix(self) -> dict[str, str]:
        """See `Job.postfix`."""
        return {"correct": f"{self._right / max(self._asked, 1):.1%}"}
