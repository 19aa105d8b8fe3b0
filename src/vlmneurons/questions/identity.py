"""What identifies questions: a digest of all that is asked, and of the pictures' content, wherever their files lie."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vlmneurons.files.digests import digest_of, digest_of_bytes
from vlmneurons.questions.media import picture_key, unpacked
from vlmneurons.questions.question import Question
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.questions.streams import sound_key, video_key


def content_of(questions: QuestionSet) -> dict[str, str]:
    """For each question, by id, a digest of its prompt and options as shown, answer and group, and of its pictures.

    The same content has the same digest wherever its files lie, and in whatever order the questions stand. Every
    picture is read once. Where a picture cannot be read, ``?`` stands for the pictures' digest and agrees with any: a
    run that such a picture stopped can go on once the file is mended.
    """
    content = {}
    for question in questions:
        order = questions.order(question)
        text = questions.prompt(question, [question.options[index] for index in order])
        kinds = ((picture_key, question.pictures), (sound_key, question.sounds), (video_key, question.videos))
        media = [_media_digest(source, key) for key, sources in kinds for source in sources]
        parts = [text, question.options, order, question.answer, question.group, list(question.n_media)]
        asked = digest_of(parts + ([question.answers] if question.answers else []))[:16]
        content[question.id] = f"{asked} {'?' if None in media else digest_of(media)[:16]}"
    return content


def in_order_of(ids: Iterable[str], questions: QuestionSet) -> QuestionSet:
    """The questions in another order, such as that of a run that goes on, whose batches are cut from it.

    Args:
        ids: the order; ids of no question are left out.
        questions: the questions; those whose ids are not named come last, in their order here.
    """
    by_id: dict[str, Question] = {question.id: question for question in questions}
    named = [by_id.pop(name) for name in ids if name in by_id]
    return questions.with_items([*named, *by_id.values()])


def _media_digest(source: Any, key: Callable[[Any], str]) -> str | None:
    """A digest of a file's bytes, or of the content of a source that is no file; None where it cannot be read."""
    try:
        source = unpacked(source)
        if isinstance(source, str | Path):
            if Path(source).exists() and not Path(source).is_file():
                raise OSError("it is no ordinary file")  # a pipe would be waited for without end
            return digest_of_bytes(Path(source).read_bytes())
        return key(source)
    except Exception:  # the error is raised when the question is asked
        return None
