"""How right a generated text is, between 0 and 1: scorers of open answers.

A scorer is a function ``(text, question) -> float``. Those here compare with the answers that a question accepts
(``question.answers``, or ``question.metadata["answers"]``); one's own may look at anything. Each reads what the text
states: what follows a model's thought, and within tags of an answer where there are some (see `stated`).
"""

import functools
import math
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

from vlmneurons.checks import as_names, as_number, is_missing
from vlmneurons.errors import QuestionError, VLMNeuronsError
from vlmneurons.questions.question import Question, normalize
from vlmneurons.run.memory import is_out_of_memory
from vlmneurons.run.parsing import stated

Scorer = Callable[[str, Question], float]
"""How right a text is as an answer to a question: 0 not at all, 1 wholly."""


def score_of(scorer: Scorer, text: str, question: Question) -> float:
    """What a scorer gives, checked.

    Args:
        scorer: the scorer; its attribute ``range``, if it has one, says between which numbers its scores are.
        text: what the model wrote.
        question: the question.

    Returns:
        The score, in [0, 1] or the scorer's range.

    Raises:
        QuestionError: the scorer fails, or gives no number, NaN, or one outside of its range; the id is named.
    """
    try:
        score = scorer(text, question)
    except Exception as error:
        if isinstance(error, VLMNeuronsError) or is_out_of_memory(error):  # named; a smaller batch helps
            raise
        told = f"the scorer {name_of(scorer)} failed on the text {text!r}: {type(error).__name__}: {error}"
        raise QuestionError(f"question {question.id!r}: {told}") from error
    low, high = range_of(scorer)
    try:
        number = float(score)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(score, str | bytes) or not low <= number <= high or math.isinf(number):
        told = f"the scorer {name_of(scorer)} gave {score!r}; a score is between {low:g} and {high:g}"
        raise QuestionError(f"question {question.id!r}: {told}")
    return number


def range_of(scorer: object) -> tuple[float, float]:
    """The numbers between which a scorer's scores are: its attribute ``range``, or that of the function it binds.

    Args:
        scorer: the scorer.

    Raises:
        QuestionError: the range is not two numbers, the lower first.
    """
    while isinstance(scorer, functools.partial) and not hasattr(scorer, "range"):
        scorer = scorer.func
    given: Any = getattr(scorer, "range", (0, 1))
    try:
        low, high = map(float, given)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not low < high:
        raise QuestionError(f"the range of a scorer is its lowest and highest score; got {given!r}")
    return low, high


def name_of(scorer: Scorer) -> str:
    """What a scorer is called in errors and records; arguments that are bound to a function stand beside its name.

    Args:
        scorer: the scorer.
    """
    if isinstance(scorer, functools.partial):
        bound = [*map(repr, scorer.args), *(f"{name}={value!r}" for name, value in scorer.keywords.items())]
        return f"{name_of(scorer.func)}({', '.join(bound)})"
    return getattr(scorer, "__name__", type(scorer).__name__)


def check_scorer(scorer: Scorer, questions: Iterable[Question]) -> None:
    """Refuse questions that a scorer of the library cannot compare with, before any is asked.

    Args:
        scorer: the scorer; one of the user's own is asked only with the model's answers.
        questions: the questions.

    Raises:
        QuestionError: a question has no answers, or too few.
    """
    plain = scorer
    while isinstance(plain, functools.partial):
        plain = plain.func
    for question in questions if plain in (exact_match, vqa_accuracy, anls) else ():
        scorer("", question)


def accepted(question: Question) -> list[str]:
    """The answers that a question accepts.

    Args:
        question: the question.

    Raises:
        QuestionError: it has none, or one of them is no text.
    """
    answers = question.answers or None
    if answers is None:
        answers = question.metadata.get("answers")
    if answers is None or is_missing(answers):
        raise QuestionError(f"question {question.id!r} has no answers that a text could be compared with")
    try:
        found = list(as_names("answers", answers, QuestionError))
    except QuestionError as error:
        raise QuestionError(f"question {question.id!r}: {error}") from error
    if not found:
        raise QuestionError(f"question {question.id!r} has no answers that a text could be compared with")
    return found


def exact_match(text: str, question: Question) -> float:
    """1 if the text is one of the accepted answers, else 0.

    Compared are texts in Unicode NFKC, without case, with single spaces and without punctuation at their ends, in every
    language alike: no articles or accents are left out.

    Args:
        text: what the model wrote.
        question: the question.

    Raises:
        QuestionError: the question has no answers.
    """
    return float(normalize(stated(text)) in {normalize(answer) for answer in accepted(question)})


def vqa_accuracy(text: str, question: Question) -> float:
    """The accuracy of the VQA challenge: three people of ten who gave an answer make it wholly right.

    Each person is left out in turn, and ``min(others who gave this answer / 3, 1)`` averaged over all turns, of texts
    as the challenge's own program makes them alike (`vqa_text`). Antol et al., VQA: Visual Question Answering, ICCV
    2015, and https://visualqa.org/evaluation.html. The challenge's program leaves texts unchanged where all people
    agree; here they are always made alike.

    Args:
        text: what the model wrote.
        question: the question, with an answer for each person, repeated where people agree.

    Raises:
        QuestionError: the question has fewer than four answers, so that no text could be wholly right.
    """
    answers = [vqa_text(answer) for answer in accepted(question)]
    if len(answers) < 4:
        raise QuestionError(
            f"question {question.id!r} has {len(answers)} answers; vqa_accuracy compares with ten people's, repeated "
            "where they agree (at least 4). For a list of accepted answers use exact_match or anls"
        )
    given = vqa_text(stated(text))
    same = sum(answer == given for answer in answers)
    left_out = [min((same - (answer == given)) / 3, 1.0) for answer in answers]
    return sum(left_out) / len(left_out)


def anls(text: str, question: Question, *, threshold: float = 0.5) -> float:
    """Average normalized Levenshtein similarity, of one question: the best over its answers.

    ``1 - d`` with ``d`` the number of edits over the longer text's length, and 0 where ``d`` is not below the
    threshold: small errors of reading are forgiven, another answer is not. Texts are compared without case, with single
    spaces. Biten et al., Scene Text Visual Question Answering, ICCV 2019, equation 1.

    Args:
        text: what the model wrote.
        question: the question.
        threshold: at which share of edits a text is no longer the answer.

    Raises:
        QuestionError: the question has no answers, or the threshold is outside of [0, 1].
    """
    if not 0 <= as_number("threshold", threshold, QuestionError) <= 1:
        raise QuestionError(f"threshold {threshold!r} is outside of [0, 1]")
    given = _folded(stated(text))
    best = 0.0
    for answer in map(_folded, accepted(question)):
        longer = max(len(given), len(answer))
        distance = _edits(given, answer) / longer if longer else 0.0
        best = max(best, 1 - distance if distance < threshold else 0.0)
    return best


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _edits(one: str, other: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions."""
    row = list(range(len(other) + 1))
    for number, character in enumerate(one, 1):
        new = [number]
        for (diagonal, above), against in zip(pairwise(row), other, strict=True):
            new.append(min(new[-1] + 1, above + 1, diagonal + (character != against)))
        row = new
    return row[-1]


# -- how the VQA challenge makes texts alike ---------------------------------------------------------------------------

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS.split())}}
_SHORT_FORMS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't "
    "needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll "
    "somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd "
    "there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll "
    "what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's "
    "won't would've wouldn't wouldn't've y'all you'd you'd've you'll you're you've "
)
_APOSTROPHES = {
    form[: found.start()] + form[found.end() :]: form
    for form in _SHORT_FORMS.split()
    for found in re.finditer("'", form)
}
"""Short forms that lack an apostrophe, with it."""


def vqa_text(text: str) -> str:
    """A text as the VQA challenge compares it: without case, punctuation and articles, numbers up to ten as digits.

    Punctuation beside a space, or in a text with a comma between digits, is left out; else a space takes its place.
    Full stops go that no digit follows. Short forms get the apostrophe that they lack.

    Args:
        text: a text.
    """
    text = " ".join(text.split())
    between_digits = re.search(r"\d,\d", text) is not None
    plain = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside_space or between_digits else " ")
    plain = re.sub(r"\.(?!\d)", "", plain)
    words = [_DIGITS.get(word, word) for word in plain.lower().split()]
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in ("a", "an", "the"))
