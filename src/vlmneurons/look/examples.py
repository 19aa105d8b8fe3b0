"""Examples of what masks do: questions whose answer changed, with the answers before and after."""

from collections.abc import Sequence

import numpy as np

from vlmneurons.checks import Keywords
from vlmneurons.errors import MismatchError, QuestionError
from vlmneurons.look.figures import natural
from vlmneurons.look.numbers import printed
from vlmneurons.look.pages import inside, thumbnail
from vlmneurons.questions.question import Question
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.study.result import NOT_ASKED, KnockoutResult

_MOST = 16
"""How many examples are shown; with more groups than that, one of each, up to twice as many."""


def changed_answers(
    result: KnockoutResult, selector: str, questions: QuestionSet | Sequence[Question], *, images: bool, seed: int
) -> list[Keywords]:
    """Questions whose answer changed under the mask of their own group, drawn at random, each of another picture.

    Args:
        result: the study.
        selector: whose masks.
        questions: those of the result; further ones are left out.
        images: show thumbnails, at most two of a question.
        seed: of the draw.

    Raises:
        MismatchError: questions of the result that are not among ``questions``, or have another right answer there.
    """
    by_id = {item.id: item for item in questions}
    lacking = [name for name in result.ids if name not in by_id]
    rights = zip(result.ids, result.answers.tolist(), strict=True)
    differing = [name for name, right in rights if name in by_id and by_id[name].answer != right]
    if wrong := lacking or differing:
        why = "not among those given" if lacking else "others than those given, with another right answer"
        raise MismatchError(
            f"{len(wrong)} questions of the result are {why}, such as {wrong[0]!r}: give the "
            "questions that the study evaluated on"
        )
    groups, generator = sorted(result.group_names, key=natural), np.random.default_rng(seed)
    each, of = max(1, _MOST // len(groups)), np.array(result.groups)
    examples: list[Keywords] = []
    shown_pictures: set[str] = set()
    for group in groups:
        rows = [row for row in result.rows_of(selector) if result.masks[row - 1].group in (group, "all")]
        chosen = result.chosen[rows[0]] if rows else result.chosen[0]
        changed = (chosen != result.chosen[0]) & (chosen != NOT_ASKED) & (of == group)
        most = min(len(examples) + each, 2 * _MOST)
        for n in generator.permutation(np.flatnonzero(changed)).tolist():
            item = by_id[result.ids[n]]
            picture = item.image_key if result.pictures is None else result.pictures[n]
            if len(examples) == most:
                break
            if picture not in shown_pictures and (example := _example(result, item, rows[0], n, images)):
                examples.append(example)
                shown_pictures.add(picture)
    return examples


def _example(result: KnockoutResult, item: Question, row: int, n: int, images: bool) -> Keywords:
    """What is shown of a changed answer; nothing where there is no text of it."""
    answers = [_answered(result, item, at, n) for at in (0, row)]
    if not all(answers):
        return {}
    margins = [printed(result.margins[at, n], 2) for at in (0, row)]
    pictures, lost = [], ""
    try:
        pictures = [inside(thumbnail(picture), "image/webp") for picture in (item.load_images()[:2] if images else ())]
    except QuestionError:
        lost = "(its picture cannot be opened)"
    return {
        "group": result.groups[n],
        "id": item.id,
        "question": _cut(item.question),
        "options": [(_cut(option), option == item.right) for option in item.options or (item.right,)],
        "answers": answers,
        "ways": ["right" if result.correct[at, n] else "wrong" for at in (0, row)],
        "margins": "" if "–" in margins else " → ".join(margins),
        "pictures": pictures,
        "lost": lost,
    }


def _answered(result: KnockoutResult, item: Question, row: int, n: int) -> str:
    """The text of an answer; empty where it is not known."""
    chosen = int(result.chosen[row, n])
    if 0 <= chosen < len(item.options):
        return _cut(item.options[chosen])
    text = None if result.texts is None else result.texts[row, n]
    return "" if text is None else f"“{_cut(str(text))}”"


def _cut(text: str) -> str:
    return text if len(text) <= 240 else f"{text[:239]}…"
