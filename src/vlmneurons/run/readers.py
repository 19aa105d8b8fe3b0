"""How the model's answer is read: the letters' logits, what is generated, or the likelihood of options or of a text.

Each way is a small object with one method, `read`; a set of questions names the reader that it wants. A reader runs the
model, and tells whoever counts activations meanwhile which rows of the run stand for the questions (``watch``).
"""

import contextlib
import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeGuard, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import TypeVar

from vlmneurons.checks import JSON, Keywords, as_number, as_whole, check_kind
from vlmneurons.errors import ActivationError, QuestionError
from vlmneurons.files.stopping import hooked
from vlmneurons.model.architectures.inside import Hook
from vlmneurons.model.encoder import TOKENIZING, Batch
from vlmneurons.model.prompts import THOUGHT
from vlmneurons.questions.question import LETTERS, Question
from vlmneurons.questions.sets import QuestionSet, bare_prompt
from vlmneurons.run.greedy import greedily, greedy_config, settings_of
from vlmneurons.run.parsing import parse_answer
from vlmneurons.run.pictures import each_once
from vlmneurons.run.scoring import Scorer, check_scorer, name_of, range_of, score_of

if TYPE_CHECKING:
    from vlmneurons.model.vlm import VLM

Watch = Callable[[Batch, list[int]], contextlib.AbstractContextManager[object]]
"""Entered around a run, and given its inputs and the rows that stand for the questions (one row each, in order)."""

Encoded = TypeVar("Encoded", default=Any)
"""What a reader's `AnswerReader.encode` makes of a batch, and what it then runs the model on."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What the model answered to some questions.

    Attributes:
        chosen: for each question the index of the chosen option, in the question's own order; None where a generated
            text names no option.
        scores: log-probability of each option, in the question's own order, padded with NaN where questions have
            fewer options; None for generated answers.
        texts: the generated texts; None for other ways of reading.
        graded: the score of each answer, where answers are graded: by a scorer, or the mean log-likelihood of running
            text in nats. Then ``chosen`` is 0, as is the answer of an open question, where the score reaches the
            reader's threshold, and 1 where it does not.
    """

    chosen: tuple[int | None, ...]
    scores: Float[Tensor, "question option"] | None = None
    texts: tuple[str, ...] | None = None
    graded: Float[Tensor, " question"] | None = None

    def margins(self, questions: Sequence[Question]) -> Float[Tensor, " question"]:
        """Log-probability of the right option less that of the best other one, in nats; NaN for generated answers.

        It is infinite where one of the two has probability 0, and NaN where both have.

        Args:
            questions: the questions that were answered.
        """
        if self.scores is None:
            return torch.full((len(questions),), float("nan"), dtype=torch.float64)
        scores = self.scores.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        right = torch.tensor([[item.answer] for item in questions])
        best_wrong = scores.scatter(1, right, -torch.inf).amax(1)
        return scores.gather(1, right).squeeze(1) - best_wrong

    def of_rows(self, rows: Sequence[int]) -> "Reading":
        """The answers to some of the questions.

        Args:
            rows: their places.
        """
        texts = None if self.texts is None else tuple(self.texts[row] for row in rows)
        scores = None if self.scores is None else self.scores[list(rows)]
        graded = None if self.graded is None else self.graded[list(rows)]
        return Reading(tuple(self.chosen[row] for row in rows), scores, texts, graded)


class AnswerReader(ABC, Generic[Encoded]):
    """A way of reading answers. A subclass that defines `read` is another one."""

    shows_options: bool = True
    """Whether the options have to stand in the prompt."""

    padding_side: str = "right"
    """On the right, padding leaves every token at the position that it has alone; generation needs it on the left."""

    grades: bool = False
    """Whether answers get a score (`Reading.graded`) instead of an option, as open questions need."""

    def check(self, questions: QuestionSet) -> None:
        """Refuse questions that this reader cannot read, before any is asked.

        Args:
            questions: all of them.

        Raises:
            QuestionError: one is open where options are read, or has options where answers are graded.
        """
        wrong = next((item for item in questions if item.is_open != self.grades), None)
        if wrong is not None:
            raise QuestionError(
                f"question {wrong.id!r} is open, and {self!r} reads which option is chosen: give "
                "answer=vn.Generate(scorer=vn.exact_match), or another scorer"
                if wrong.is_open
                else f"question {wrong.id!r} has options, and {self!r} grades the answers of open questions: give it "
                "answers=[…] in place of options, or read the option"
            )

    def encode(self, model: "VLM", questions: QuestionSet) -> Encoded:
        """What `read` runs the model on. It is made once for a batch, and run as often as is wanted.

        Args:
            model: the model.
            questions: one batch of questions.
        """
        return cast(Encoded, model.encoder(questions, padding_side=self.padding_side))

    @abstractmethod
    def read(self, model: "VLM", questions: QuestionSet, encoded: Encoded, watch: "Watch | None" = None) -> Reading:
        """Run the model on one batch of questions.

        Args:
            model: the model, in inference mode.
            questions: the batch; they share whether they have pictures.
            encoded: what `encode` made of them.
            watch: to be entered around the run that shows the questions to the model.

        Returns:
            What was answered to each question.
        """

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_"))
        return f"{type(self).__name__}({fields})"


class LogitReader(AnswerReader[Encoded]):
    """A reader that needs one forward, and from it the logits at a few positions of each row.

    Subclass it and define `wants` and `score`. Many masks can then share the work that does not depend on them; a
    reader that runs the model in a way of its own is run once for each mask.
    """

    def encode(self, model: "VLM", questions: QuestionSet) -> Encoded:
        """See `AnswerReader.encode`.

        Raises:
            QuestionError: the model would think before it answers; see `vlmneurons.model.prompts.Prompts`.
        """
        refuse_thoughts(model, questions)
        return super().encode(model, questions)

    @abstractmethod
    def wants(self, encoded: Encoded) -> "Wanted":
        """The forward that is needed, and the positions whose logits are read.

        Args:
            encoded: what `encode` gave.
        """

    @abstractmethod
    def score(
        self, model: "VLM", questions: QuestionSet, encoded: Encoded, logits: list[Float[Tensor, "position vocabulary"]]
    ) -> Reading:
        """The answers, from the logits that were wanted.

        Args:
            model: the model.
            questions: the batch.
            encoded: what `encode` made of it.
            logits: for each row of the forward those at its wanted positions, in float32 on the CPU.
        """

    def tokens(self, model: "VLM", questions: QuestionSet, encoded: Encoded) -> list[int] | None:
        """Ids of the tokens whose log-probabilities are all that `score` looks at; None if it looks at more.

        A reader that names them defines `score_shares` too. Then a remote run sends back these few numbers in place of
        the logits of a whole vocabulary.

        Args:
            model: the model.
            questions: the questions.
            encoded: what `AnswerReader.encode` made of them.
        """
        return None

    def score_shares(
        self, model: "VLM", questions: QuestionSet, encoded: Encoded, shares: list[Float[Tensor, "position vocabulary"]]
    ) -> Reading:
        """The answers, from log-probabilities; those of tokens that `tokens` does not name may be missing (NaN).

        Args:
            model: the model.
            questions: the questions.
            encoded: what `AnswerReader.encode` made of them.
            shares: for each row the log-probabilities (nats) at its wanted positions.
        """
        raise NotImplementedError(f"{type(self).__name__} names its tokens, and so has to define score_shares")

    def read(self, model: "VLM", questions: QuestionSet, encoded: Encoded, watch: Watch | None = None) -> Reading:
        """See `AnswerReader.read`."""
        wanted = self.wants(encoded)
        with (watch or _no_watch)(wanted.batch, wanted.questions):
            logits = logits_at(model, wanted.batch, wanted.positions)
        return self.score(model, questions, encoded, logits)


@dataclass(frozen=True)
class Wanted:
    """One forward, and the positions at which its logits are read.

    Attributes:
        batch: its inputs.
        positions: for each row the positions whose logits are wanted, at least one.
        questions: the row that stands for each question.
        owners: the question that each row belongs to. Left at None where there are more rows than questions, it is not
            known, and the rows of some of the questions cannot be run alone.
    """

    batch: Batch
    positions: Sequence[Sequence[int]]
    questions: list[int]
    owners: Sequence[int] | None = None

    def rows_of(self, questions: Sequence[int]) -> list[int] | None:
        """The rows of some questions, in order; None where this is not known.

        Args:
            questions: their places.
        """
        owners = self.owners
        if owners is None and self.questions != list(range(len(self.positions))):
            return None
        # Without owners, row n is known to be question n: the rows that stand for questions are all rows, in order.
        wanted = set(questions)
        return [row for row, owner in enumerate(self.questions if owners is None else owners) if owner in wanted]


@dataclass(frozen=True, repr=False)
class Letters(LogitReader[Batch]):
    """The option letter with the highest probability at the first position of the answer: one forward, no generation.

    A letter's probability is that of all tokens that are just the letter (``A``, and with a leading space).
    """

    def wants(self, encoded: Batch) -> Wanted:
        """See `LogitReader.wants`."""
        return Wanted(encoded, encoded.tokens.last[:, None].tolist(), list(range(len(encoded.tokens.last))))

    def score(self, model: "VLM", questions: QuestionSet, encoded: Batch, logits: list[Tensor]) -> Reading:
        """See `LogitReader.score`.

        Raises:
            ActivationError: the logits of a question are NaN.
        """
        return self.score_shares(model, questions, encoded, [row.log_softmax(-1) for row in logits])

    def tokens(self, model: "VLM", questions: QuestionSet, encoded: Batch) -> list[int]:
        """See `LogitReader.tokens`."""
        return letter_tokens(model, max(len(item.options) for item in questions)).flatten().tolist()

    def score_shares(self, model: "VLM", questions: QuestionSet, encoded: Batch, shares: list[Tensor]) -> Reading:
        """See `LogitReader.score_shares`.

        Raises:
            ActivationError: the log-probabilities of a question are NaN.
        """
        tokens = letter_tokens(model, max(len(item.options) for item in questions))
        return _option_reading(questions, [row[0, tokens].logsumexp(-1) for row in shares])


@dataclass(frozen=True, repr=False)
class TextLikelihood(LogitReader["_Options"]):
    """The option whose text, as the continuation of the prompt, has the highest log-probability.

    The usual way to score a multiple-choice question that is asked openly. Options of one token each cost one forward
    of one row per question; longer ones cost a row for every distinct beginning.

    Attributes:
        prefix: stands between the prompt and the option's text.
        per_token: divide each log-probability by its number of tokens, so that longer texts are not at a disadvantage.
    """

    prefix: str = " "
    per_token: bool = False
    shows_options = False

    def __post_init__(self) -> None:
        check_kind("prefix", self.prefix, str, QuestionError, "a text")
        check_kind("per_token", self.per_token, bool, QuestionError, "True or False")

    def encode(self, model: "VLM", questions: QuestionSet) -> "_Options":
        """See `AnswerReader.encode`.

        Raises:
            QuestionError: an option does not continue the prompt token by token, or the model would think before it.
        """
        refuse_thoughts(model, questions)
        encoder = model.encoder
        prompts = [encoder.prompt_of(questions, item) for item in questions]
        shown = [
            [prompt, *(prompt + self.prefix + option for option in item.options)]
            for prompt, item in zip(prompts, questions, strict=True)
        ]
        all_ids = iter(encoder.all_token_ids([text for texts in shown for text in texts]))
        rows: list[tuple[int, str]] = []  # question, continuation
        first_rows: list[int] = []
        wanted: list[list[tuple[int, list[int]]]] = []  # per question and option: its row, its token ids
        for number, item in enumerate(questions):
            bare = next(all_ids)
            first_rows.append(len(rows))
            row_of_beginning: dict[tuple[int, ...], int] = {(): len(rows)}
            rows.append((number, ""))
            per_option = []
            for option in item.options:
                ids = next(all_ids)
                added = ids[len(bare) :]
                if ids[: len(bare)] != bare or not added:
                    raise QuestionError(
                        f"question {item.id!r}: the option {option!r} does not continue the prompt token by token; "
                        f"change the prefix ({self.prefix!r})"
                    )
                # Options that differ in their last token only share a row: each token is read before it is shown.
                beginning = tuple(added[:-1])
                if beginning not in row_of_beginning:
                    row_of_beginning[beginning] = len(rows)
                    rows.append((number, self.prefix + option))
                per_option.append((row_of_beginning[beginning], added))
            wanted.append(per_option)
        batch = encoder.rows(
            questions,
            [questions[number] for number, _ in rows],
            [continuation for _, continuation in rows],
            padding_side=self.padding_side,
            rendered=[prompts[number] for number, _ in rows],
        )
        # A row shows its option's last token too, but nothing reads what follows it.
        n_read = [1] * len(rows)
        for row, ids in (pair for per_option in wanted for pair in per_option):
            n_read[row] = max(n_read[row], len(ids))
        positions = [list(range(last, last + n)) for last, n in zip(batch.tokens.last.tolist(), n_read, strict=True)]
        return _Options(batch, first_rows, positions, wanted)

    def wants(self, encoded: "_Options") -> Wanted:
        """See `LogitReader.wants`."""
        counts = np.diff([*encoded.first_rows, len(encoded.positions)])
        owners = np.repeat(np.arange(len(counts)), counts).tolist()
        return Wanted(encoded.batch, encoded.positions, encoded.first_rows, owners)

    def score(self, model: "VLM", questions: QuestionSet, encoded: "_Options", logits: list[Tensor]) -> Reading:
        """See `LogitReader.score`.

        Raises:
            ActivationError: the logits of a question are NaN.
        """
        return self.score_shares(model, questions, encoded, [row.log_softmax(-1) for row in logits])

    def tokens(self, model: "VLM", questions: QuestionSet, encoded: "_Options") -> list[int]:
        """See `LogitReader.tokens`."""
        return sorted({token for per_option in encoded.wanted for _, ids in per_option for token in ids})

    def score_shares(self, model: "VLM", questions: QuestionSet, encoded: "_Options", shares: list[Tensor]) -> Reading:
        """See `LogitReader.score_shares`.

        Raises:
            ActivationError: the log-probabilities of a question are NaN.
        """
        scores = []
        for per_option in encoded.wanted:
            values = []
            for row, ids in per_option:
                steps = shares[row][: len(ids)].gather(1, torch.tensor(ids)[:, None])
                values.append(steps.mean() if self.per_token else steps.sum())
            scores.append(torch.stack(values))
        return _option_reading(questions, scores, shown=False)


@dataclass(frozen=True)
class _Options:
    """Rows that between them show every option's text; the first row of each question is the bare prompt."""

    batch: Batch
    first_rows: list[int]
    positions: list[list[int]]
    wanted: list[list[tuple[int, list[int]]]]
    """For each question and option the row that shows it, and the ids of its tokens."""


@dataclass(frozen=True, repr=False)
class RunningText(LogitReader[Batch]):
    """How likely a text is to the model: the mean log-likelihood of its tokens, in nats, each after those before it.

    For texts that stand for themselves (`QuestionSet.from_texts`), of models with and without a chat template, which is
    not used. ``exp(-score)`` is the text's perplexity. The first token has nothing before it, and no likelihood, unless
    the tokenizer begins texts with a token of its own. Logits of every token are kept for a batch at a time: ask long
    texts in small batches.

    Attributes:
        threshold: the score from which a text counts as right where neurons are identified on ``"correct"`` ones; None,
            the default, counts all as right.
    """

    threshold: float | None = None
    shows_options = False
    prompt = "bare"
    grades = True

    def __post_init__(self) -> None:
        if self.threshold is not None:
            object.__setattr__(self, "threshold", as_number("threshold", self.threshold, QuestionError))

    def encode(self, model: "VLM", questions: QuestionSet) -> Batch:
        """See `AnswerReader.encode`.

        Raises:
            QuestionError: a text of one token, which nothing stands before.
        """
        batch = AnswerReader.encode(self, model, questions)
        for item, places in zip(questions, self.wants(batch).positions, strict=True):
            if not places:
                raise QuestionError(
                    f"question {item.id!r}: a text of one token has no likelihood: nothing is before it"
                )
        return batch

    def wants(self, encoded: Batch) -> Wanted:
        """See `LogitReader.wants`: the positions before each token of the text."""
        table = encoded.tokens
        of_text = table.attention if table.template is None else table.attention & ~table.template
        read = of_text & (table.attention.cumsum(1) > 1)  # the first token has nothing before it
        return Wanted(encoded, [(row.nonzero().flatten() - 1).tolist() for row in read], list(range(len(read))))

    def score(self, model: "VLM", questions: QuestionSet, encoded: Batch, logits: list[Tensor]) -> Reading:
        """See `LogitReader.score`.

        Raises:
            ActivationError: the logits of a text are NaN.
        """
        means = []
        for row, (places, values) in enumerate(zip(self.wants(encoded).positions, logits, strict=True)):
            following = encoded.tokens.ids[row, [place + 1 for place in places]].cpu()
            likelihoods = values.gather(1, following[:, None]).squeeze(1) - values.logsumexp(-1)
            means.append(likelihoods.double().mean())
            if torch.isnan(means[-1]):
                raise ActivationError(f"the logits of question {questions[row].id!r} are NaN: it has no likelihood")
        return _graded_reading(torch.stack(means), self.threshold)


@dataclass(frozen=True, repr=False)
class Generate(AnswerReader[Batch]):
    """The option that a greedily generated text names by letter, number or text; anything else is a parse failure.

    Open questions have no option to name: give a scorer, and the text is graded.

    At each step the likeliest token is taken, whatever the checkpoint's generation settings say (penalties, suppressed
    or forced tokens, beams, sampling): they apply to the user's own ``generate`` and are put back after.

    Attributes:
        max_new_tokens: how many tokens are generated at most.
        scorer: how right a text is as the answer to an open question: `vlmneurons.exact_match`, `vlmneurons.anls`,
            `vlmneurons.vqa_accuracy`, or a function ``(text, question) -> float`` of your own, with scores in [0, 1] or
            between the two numbers of its attribute ``range``.
        threshold: the score from which an answer counts as right, such as where neurons are identified.

    Example:
        ``questions.asked(answer=Generate(scorer=lambda text, question: float("tea" in text)))``
    """

    max_new_tokens: int = 20
    scorer: Scorer | None = None
    threshold: float = 0.5
    padding_side = "left"

    def __post_init__(self) -> None:
        if self.scorer is not None and not callable(self.scorer):
            raise QuestionError(f"scorer is a function (text, question) -> float; got {self.scorer!r}")
        range_of(self.scorer)  # what is wrong with it is said before hours of asking
        object.__setattr__(self, "threshold", as_number("threshold", self.threshold, QuestionError))
        object.__setattr__(self, "grades", self.scorer is not None)
        object.__setattr__(self, "shows_options", self.scorer is None)
        object.__setattr__(
            self, "max_new_tokens", as_whole("max_new_tokens", self.max_new_tokens, QuestionError, least=1)
        )

    def check(self, questions: QuestionSet) -> None:
        """See `AnswerReader.check`.

        Raises:
            QuestionError: as there; or a question lacks the answers that a scorer of the library compares with.
        """
        super().check(questions)
        if self.scorer is not None:
            check_scorer(self.scorer, questions)

    def __repr__(self) -> str:
        if self.scorer is None:
            return f"Generate(max_new_tokens={self.max_new_tokens})"
        return f"Generate({self.max_new_tokens}, {name_of(self.scorer)}, threshold={self.threshold:g})"

    def settings(self, model: "VLM") -> JSON:
        """What ``generate`` is called with, by name: the bounds, and the ids with which a text begins and ends.

        Args:
            model: the model.
        """
        return settings_of(greedy_config(model.hf, self.max_new_tokens))

    def read(self, model: "VLM", questions: QuestionSet, encoded: Batch, watch: Watch | None = None) -> Reading:
        """See `AnswerReader.read`.

        Raises:
            QuestionError: the model cannot generate, or a scorer gave no score of its range.
        """
        if not model.can_generate:
            raise QuestionError(f"{type(model.hf).__name__} cannot generate; read answers by letters or text")
        rows = list(range(len(questions)))
        with greedily(model.hf, self.max_new_tokens) as config, (watch or _no_watch)(encoded, rows):
            ids = model.hf.generate(**encoded, generation_config=config)
        if not model.is_encoder_decoder:
            ids = ids[:, encoded["input_ids"].shape[1] :]
        return self.reading(model, questions, ids.tolist())

    def reading(self, model: "VLM", questions: QuestionSet, ids: Sequence[Sequence[int]]) -> Reading:
        """The answers that generated tokens give.

        Args:
            model: the model.
            questions: the batch.
            ids: for each question what was generated.

        Raises:
            ActivationError: a scorer gives NaN.
        """
        texts = _decoded(model, ids)
        bare = questions.prompt is bare_prompt
        chosen: list[int | None] = []
        scores: list[float] = []
        for item, text in zip(questions, texts, strict=True):
            order = questions.order(item)
            # Where the prompt opened a thought, what was generated begins within it.
            opened = "" if bare else model.prompts.thought(*item.n_media) or ""
            if self.scorer is not None:
                scores.append(score_of(self.scorer, opened + text, item))
                continue
            place = parse_answer(opened + text, [item.options[index] for index in order])
            chosen.append(None if place is None else order[place])
        if self.scorer is not None:
            return _graded_reading(torch.tensor(scores, dtype=torch.float64), self.threshold, texts)
        return Reading(tuple(chosen), None, texts)


_READERS: dict[str, Callable[[], AnswerReader]] = {
    "letters": Letters,
    "generate": Generate,
    "text": TextLikelihood,
    "running": RunningText,
}


def reader_of(answer: object) -> AnswerReader:
    """The reader that the ``answer`` of a set of questions names, or is."""
    if isinstance(answer, AnswerReader):
        return answer
    if isinstance(answer, str) and answer in _READERS:
        return _READERS[answer]()
    raise QuestionError(f"answer={answer!r} is not a way of reading answers; choose from {', '.join(_READERS)}")


# -- what is known of a reader, and of what it gives -------------------------------------------------------------------


def reads_logits(reader: AnswerReader) -> TypeGuard[LogitReader]:
    """Whether the logits of one forward are all that a reader needs; its class may run the model in another way."""
    return isinstance(reader, LogitReader) and type(reader).read is LogitReader.read


def names_its_tokens(reader: LogitReader) -> bool:
    """Whether a reader's `tokens` are all that its `score` looks at: a subclass may have redefined one of them only."""
    owners = {
        next(cls for cls in type(reader).__mro__ if name in vars(cls)) for name in ("score", "score_shares", "tokens")
    }
    return len(owners) == 1 and LogitReader not in owners


def reading_of_shares(
    reader: LogitReader,
    model: "VLM",
    questions: QuestionSet,
    encoded: Any,
    tokens: list[int],
    rows: Sequence[Tensor],
) -> Reading:
    """The answers, from the log-probabilities of the tokens that a reader names: ``[position, token]`` for each row.

    Args:
        reader: the reader.
        model: the model.
        questions: the questions.
        encoded: what `AnswerReader.encode` made of them.
        tokens: the tokens, in the order of the columns.
        rows: the log-probabilities (nats).
    """
    size = max(len(model.tokenizer), max(tokens) + 1)
    shares = [row.new_full((len(row), size), torch.nan).index_copy_(1, torch.tensor(tokens), row) for row in rows]
    return reader.score_shares(model, questions, encoded, shares)


def checked(reading: object, reader: "AnswerReader", questions: Sequence[Question]) -> Reading:
    """A reading, checked, as the reader may be the user's own: one answer to each question, and no NaN for a number.

    Args:
        reading: what `AnswerReader.read` gave.
        reader: the reader, for the error.
        questions: the questions that were asked.

    Raises:
        QuestionError: it is not of these questions, names an option that does not exist, lacks a score, or has NaN in
            place of one; the message names the question, if it is about one.
    """
    check_kind(f"what {reader!r} gives", reading, Reading, QuestionError)
    assert isinstance(reading, Reading)
    for name, dimensions in (("chosen", 1), ("scores", 2), ("texts", 1), ("graded", 1)):
        values = getattr(reading, name)
        shape = None if values is None else tuple(getattr(values, "shape", (len(values),)))
        if shape is not None and (len(shape) != dimensions or shape[0] != len(questions)):
            raise QuestionError(
                f"{reader!r} gave {name} of the shape {list(shape)} to {len(questions)} questions: one for each is "
                "wanted"
            )
    if reader.grades and reading.graded is None:
        raise QuestionError(f"{reader!r} grades answers, and gave no scores: Reading(…, graded=a tensor [question])")
    scores = None if reading.scores is None else torch.as_tensor(reading.scores)
    graded = None if reading.graded is None else torch.as_tensor(reading.graded).tolist()
    for row, (choice, item) in enumerate(zip(reading.chosen, questions, strict=True)):
        gave = f"question {item.id!r}: {reader!r} gave"
        n = len(item.options) or 2  # of an open question 0 is right and 1 wrong
        if choice is not None and not -1 <= as_whole(f"{gave} a choice, which", choice, QuestionError) < n:
            raise QuestionError(f"{gave} the choice {choice}, and there are 0 to {n - 1}; None names no option")
        if graded is not None and not np.isfinite(graded[row]):
            raise QuestionError(f"{gave} the score {graded[row]}, which is no number")
        if scores is None or item.is_open:
            continue
        if scores.shape[1] < n or bool(scores[row, :n].isnan().any()):
            raise QuestionError(f"{gave} the scores {scores[row].tolist()}: a number for each of {n} options is wanted")
    return reading


def refuse_thoughts(model: "VLM", questions: QuestionSet) -> None:
    """Refuse to read answers at the end of prompts, if the model would begin to think there.

    Args:
        model: the model.
        questions: the questions.

    Raises:
        QuestionError: the chat template opens a thought, or lets the model think.
    """
    for n_media in () if questions.prompt is bare_prompt else sorted({item.n_media for item in questions}):
        model.encoder.refuse_media(*n_media)
        model.prompts.refuse_thought(*n_media)


# -- one forward -------------------------------------------------------------------------------------------------------


def _no_watch(batch: Batch, rows: list[int]) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def logits_at(
    model: "VLM", batch: Batch, positions: Sequence[Sequence[int]]
) -> list[Float[Tensor, "position vocabulary"]]:
    """Run the model once and give each row's logits at some positions, in float32 on the CPU.

    Only the positions that some row needs are projected to the vocabulary, where the model allows it.

    Args:
        model: the model.
        batch: its inputs.
        positions: for each row of the batch the wanted positions.

    Raises:
        QuestionError: the model gives no logits, or none after the question, as an encoder-decoder model.
    """
    inputs, wanted = forward_inputs(model, batch, positions)
    with each_once(model.hf, batch), _one_to_one(model, batch, "logits_to_keep" in inputs):
        output = model.hf(**inputs)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise QuestionError(
            f"{type(model.hf).__name__} gives {type(output).__name__} without logits; answers are read from "
            "output.logits [row, token, vocabulary], as in transformers.modeling_outputs.CausalLMOutput"
        )
    place = places_of(model, batch, wanted, logits.shape[1])
    return [logits[row, [place[p] for p in places]].float().cpu() for row, places in enumerate(positions)]


_ONE_TO_ONE: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models whose decoder was seen to run on the tokens of its input, and no others."""


@contextlib.contextmanager
def _one_to_one(model: "VLM", batch: Batch, chosen: bool) -> Iterator[None]:
    """Within, refuse a decoder that runs on more than the input's tokens, where only chosen positions give logits.

    A position would then be another token's: GIT, for one, puts a picture's vectors before the words itself.
    """
    if not chosen or model.hf in _ONE_TO_ONE or "language" not in model.towers:
        yield
        return

    def check(_: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        hidden = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if hidden is not None and hidden.ndim == 3 and hidden.shape[1] != batch["input_ids"].shape[1]:
            raise _misplaced(model, batch, hidden.shape[1])

    first = map(model.hf.get_submodule, model.towers["language"].layer_paths[:1])
    with hooked(layer.register_forward_pre_hook(Hook(check), with_kwargs=True) for layer in first):
        yield
    _ONE_TO_ONE.add(model.hf)


def forward_inputs(model: "VLM", batch: Batch, positions: Sequence[Sequence[int]]) -> tuple[Keywords, list[int]]:
    """The arguments of the forward that `logits_at` makes, and in order the positions that any row wants."""
    wanted = sorted({position for row in positions for position in row})
    if model.is_encoder_decoder:
        raise QuestionError(
            f"{type(model.hf).__name__} is an encoder-decoder model: its answer begins in the decoder, not after the "
            "question, so the question's logits do not hold it; read answers by generation (answer='generate')"
        )
    inputs = dict(batch)
    parameters = inspect.signature(type(model.hf).forward).parameters
    if "logits_to_keep" in parameters:
        inputs["logits_to_keep"] = torch.tensor(wanted, device=batch["input_ids"].device)
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    if takes_any or "use_cache" in parameters:
        inputs["use_cache"] = False
    return inputs, wanted


def places_of(model: "VLM", batch: Batch, wanted: list[int], n_positions: int) -> dict[int, int]:
    """Where the logits of each wanted position are, in a forward that gives them at ``n_positions``."""
    if n_positions == len(wanted):
        return {position: index for index, position in enumerate(wanted)}
    if n_positions == batch["input_ids"].shape[1]:
        return {position: position for position in wanted}
    raise _misplaced(model, batch, n_positions)


def _misplaced(model: "VLM", batch: Batch, n_positions: int) -> QuestionError:
    return QuestionError(
        f"{type(model.hf).__name__} gives logits at {n_positions} positions for a prompt of "
        f"{batch['input_ids'].shape[1]} tokens; read answers by generation (answer='generate')"
    )


# -- from scores and tokens to answers ---------------------------------------------------------------------------------


def _graded_reading(scores: Tensor, threshold: float | None, texts: tuple[str, ...] | None = None) -> Reading:
    """The answers to open questions, from their scores."""
    chosen = tuple(0 if threshold is None or score >= threshold else 1 for score in scores.tolist())
    return Reading(chosen, None, texts, scores)


def _option_reading(questions: QuestionSet, scores: Sequence[Tensor], *, shown: bool = True) -> Reading:
    """The answers, from scores by option in shown or the question's own order; of equal scores the first shown wins."""
    most = max(len(item.options) for item in questions)
    table = torch.full((len(questions), most), float("nan"), dtype=torch.float64)
    chosen = []
    for row, (item, values) in enumerate(zip(questions, scores, strict=True)):
        if torch.isnan(values).any():
            raise ActivationError(f"the logits of question {item.id!r} are NaN, so no option can be told the likeliest")
        order = questions.order(item)
        by_place = values[: len(order)].double() if shown else values.double()[list(order)]
        chosen.append(order[int(by_place.argmax())])
        table[row, list(order)] = by_place
    return Reading(tuple(chosen), table)


def letter_tokens(model: "VLM", n: int) -> torch.Tensor:
    """Ids of the tokens that are just a letter, ``[letter, form]``: only forms that every letter has.

    Raises:
        QuestionError: the tokenizer has no form in which each letter is one token.
    """
    forms_of = _LETTER_TOKENS.setdefault(model, {})  # listing a vocabulary takes longer than many a forward
    if n not in forms_of:
        vocabulary = model.tokenizer.get_vocab()
        forms = [[vocabulary.get(before + letter) for letter in LETTERS[:n]] for before in ("", "▁", "Ġ", " ")]
        # No tensor is kept: one made in inference mode could not be used where gradients are wanted.
        forms_of[n] = [form for form in forms if None not in form]
    if not forms_of[n]:
        raise QuestionError(
            f"the tokenizer has no single token for each of the letters {LETTERS[:n]}; "
            "use answer='text' or answer='generate'"
        )
    return torch.tensor(forms_of[n]).T


_LETTER_TOKENS: "weakref.WeakKeyDictionary[Any, dict[int, list[list[Any]]]]" = weakref.WeakKeyDictionary()


def _decoded(model: "VLM", ids: Sequence[Sequence[int]] | Tensor) -> tuple[str, ...]:
    """Generated tokens as texts without special tokens, but with the tags between a thought and the answer."""
    tokenizer = model.tokenizer
    special = set(tokenizer.all_special_ids)
    tags = {number for number in special if THOUGHT.fullmatch(str(tokenizer.convert_ids_to_tokens(number)))}
    rows = [[int(number) for number in row] for row in ids]
    with TOKENIZING:
        if not tags:
            return tuple(tokenizer.batch_decode(rows, skip_special_tokens=True))
        kept = [[number for number in row if number not in special - tags] for row in rows]
        return tuple(tokenizer.batch_decode(kept, skip_special_tokens=False))
