"""Recording counts of questions by group: `record`."""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence

from vlmneurons.checks import check_choice
from vlmneurons.errors import ActivationError, QuestionError
from vlmneurons.model.tokens import TokenRule
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
from vlmneurons.statistics.items import CONDITIONS


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
            `vlmneurons.model.tokens.TokenTable.counted`. Several rules by name, such as ``{"picture": "image", "text":
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
    shares = options.processes.gather((job.statistics(), job.skipped, job.limit.halved))
    total = functools.reduce(operator.add, [statistics for statistics, _, _ in shares])
    skipped = [question_id for _, ids, _ in shares for question_id in ids]
    halved = [entry for _, _, entries in shares for entry in entries]
    order = {question.id: number for number, question in enumerate(questions)}
    notes = {"skipped": sorted(skipped, key=order.__getitem__), **({"halved": halved} if halved else {})}
    return total.with_provenance({**total.provenance, **notes})


def meets(condition: str, is_right: bool) -> bool:
    """Whether a question meets a condition, given whether it was answered right."""
    return condition == "all" or is_right == (condition == "correct")


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

    def run(self, questions: QuestionSet, encoded: object, move_bar: Callable[[int], object], /) -> Reading:
        """See `Job.run`.

        Raises:
            ActivationError: NaN or infinite activations; the message names the site and the question.
        """
        try:
            return checked(self.engine.count(questions, encoded, self.counter), self.engine.reader, questions)
        except NotFinite as error:
            raise self._located(questions, error) from None

    def forget(self) -> None:
        """See `Job.forget`."""
        self.counter.forget()

    def question_in(self, questions: QuestionSet, row: int) -> Question:
        """The question that a row of the forward stands for; the first one, of a row that stands for none."""
        rows = [] if self.counter.frame is None else self.counter.frame.rows
        return questions[rows.index(row) if row in rows else 0]

    def _located(self, questions: QuestionSet, error: NotFinite) -> ActivationError:
        """Run a spoiled batch again, looking at every site, to name the first one that is not finite."""
        counter = self.counter
        counter.strict = True
        question = questions[0]
        try:
            self.engine.count(questions, self.encode(questions), counter)
        except NotFinite as first:
            error, question = first, self.question_in(questions, first.row)
        finally:
            counter.strict = False
        return ActivationError(
            f"NaN or infinite activations at {error.site}, question {question.id!r}: no earlier site of the space has "
            "any. Half precision overflows in some models: try dtype=torch.float32 or bfloat16"
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
        right = [choice == question.answer for choice, question in zip(made.chosen, questions, strict=True)]
        self._asked, self._right = self._asked + len(right), self._right + sum(right)
        kept = [meets(self._condition, is_right) for is_right in right]
        # Token rules by name are the groups: the rows of the batch stand in the counter once for each of them.
        rules = self.counter.tokens if isinstance(self.counter.tokens, Mapping) else (None,)
        rows = [(rule or question.group, is_kept) for rule in rules for question, is_kept in zip(questions, kept)]
        self._tables.add([group if is_kept else None for group, is_kept in rows])
        return len(questions)

    def statistics(self) -> ActivationStatistics:
        """The statistics of the questions that were taken so far."""
        tokens = self.counter.tokens
        provenance = {
            **run_provenance(
                self.engine.model, self._setting, tokens=tokens, questions=self._questions, engine=self.engine
            ),
            "condition": self._condition,
            "skipped": list(self.skipped),
            **self.limit.provenance,
        }
        groups = tuple(tokens) if isinstance(tokens, Mapping) else self._questions.groups
        return self._tables.statistics(provenance, groups)

    def partial(self) -> ActivationStatistics | None:
        """See `Job.partial`."""
        return self.statistics() if self._tables.whole else None

    def postfix(self) -> dict[str, str]:
        """See `Job.postfix`."""
        return {"correct": f"{self._right / max(self._asked, 1):.1%}"}
