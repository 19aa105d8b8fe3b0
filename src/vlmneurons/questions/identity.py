"""What identifies questions: a digest of all that is asked, and of the pictures' content, wherever they lie."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vlmneurons.files.digests import digest_of, digest_of_bytes
from vlmneurons.questions.media import picture_key
from vlmneurons.questions.question import Question
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.questions.streams import resolved_stream, sound_key, video_key


def content_of(questions: QuestionSet) -> dict[str, str]:
    """For each question, by id, a digest of its prompt and options as shown, answer and group, and of its pictures.

    The same content is the same wherever its files lie, and in whatever order the questions stand. Every picture is
    read once. In the place of the digest of pictures that cannot be read stands ``?``, which any picture may take: a
    run that one stopped can be gone on with when it is mended.
    """
    content = {}
    for item in questions:
        order = questions.order(item)
        text = questions.prompt(item, [item.options[index] for index in order])
        kinds = ((picture_key, item.pictures), (sound_key, item.sounds), (video_key, item.videos))
        media = [_content_of(source, key) for key, sources in kinds for source in sources]
        more = [item.answers] if item.answers else []
        asked = digest_of([text, item.options, order, item.answer, item.group, list(item.n_media), *more])[:16]
        content[item.id] = f"{asked} {'?' if None in media else digest_of(media)[:16]}"
    return content


def in_order_of(ids: Iterable[str], questions: QuestionSet) -> QuestionSet:
    """The questions in another order: that of a run that is gone on with, whose batches are cut from it.

    Args:
        ids: the order; those that are not among the questions are left out.
        questions: the questions; those that are not named come last, in their own order.
    """
    by_id: Mapping[str, Question] = {item.id: item for item in questions}
    named = [by_id[name] for name in ids if name in by_id]
    rest = set(by_id) - {item.id for item in named}
    return questions.with_items([*named, *(item for item in questions if item.id in rest)])


def _content_of(source: Any, key: Callable[[Any], str]) -> str | None:
    """A digest of a file's bytes, or of the content of what is no file; None where it cannot be read."""
    try:
        source = resolved_stream(source)
        if isinstance(source, str | Path):
            if Path(source).exists() and not Path(source).is_file():
                raise OSError("it is no ordinary file")  # a pipe would be waited for without end
            return digest_of_bytes(Path(source).read_bytes())
        return key(source)
    except Exception:  # it is named when its turn comes
        return None
