"""Which questions share a forward, and encoding the next batches meanwhile.

Decoding and resizing a picture takes the CPU tens of milliseconds, in which a GPU would wait. So a thread encodes the
next batches while the model runs on this one. It is a single thread that works in order, so the results do not depend
on it. For a model on the CPU nothing is gained: both would share its cores, and batches ahead would lie in its memory.
"""

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from vlmneurons.errors import QuestionError
from vlmneurons.model.vlm import VLM
from vlmneurons.questions.media import DatasetPicture, is_function
from vlmneurons.questions.question import Question
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.run.readers import AnswerReader

_WINDOW = 16
"""Batches within which questions are sorted by length."""

_AHEAD = 2
"""Batches that are encoded ahead, where that is worth it."""


def batches(
    questions: QuestionSet, size: int, lengths: Callable[[Question], int] | None = None
) -> Iterator[QuestionSet]:
    """Batches of questions that show equally many pictures, sounds, videos and frames; those that show most come first.

    Questions of the same picture (the same path, or the same content) stand next to each other, so that the vision
    tower sees it once and the decoder computes its tokens once where that is possible; otherwise the order is kept.

    Args:
        questions: the questions.
        size: questions a batch.
        lengths: how many tokens a question has, about: then questions are sorted by it within windows of 16 batches, so
            that little is padding. Those of one picture stay together.
    """
    for n_shown in sorted({(question.n_media, question.n_frames) for question in questions}, reverse=True):
        by_picture: dict[object, list[Question]] = {}
        for question in questions:
            if (question.n_media, question.n_frames) == n_shown:
                key = _key_of_pictures(question) if size > 1 else question.id  # alone, nothing is shared
                by_picture.setdefault(key, []).append(question)
        ordered = [question for of_picture in by_picture.values() for question in of_picture]
        if lengths is not None:
            windows = (ordered[start : start + _WINDOW * size] for start in range(0, len(ordered), _WINDOW * size))
            ordered = [question for window in windows for question in _longest_first(window, lengths)]
        for start in range(0, len(ordered), size):
            yield questions.with_items(ordered[start : start + size])


def _longest_first(items: list[Question], lengths: Callable[[Question], int]) -> list[Question]:
    """Longest first, so that too little memory is noticed at once; those of one picture come with its longest."""
    by_picture: dict[object, list[tuple[int, Question]]] = {}
    for question in items:
        by_picture.setdefault(_key_of_pictures(question), []).append((lengths(question), question))
    of_pictures = [sorted(pairs, key=lambda pair: -pair[0]) for pairs in by_picture.values()]
    of_pictures.sort(key=lambda pairs: -pairs[0][0])  # both sorts keep the order of equal lengths
    return [question for pairs in of_pictures for _, question in pairs]


def _key_of_pictures(item: Question) -> object:
    """What tells a question's pictures from others; pictures behind functions of the user's own are not opened."""
    if not item.sources:
        return item.id
    if any(is_function(source) and not isinstance(source, DatasetPicture) for source in item.sources):
        return tuple(id(source) for source in item.sources)
    try:
        return item.source_keys
    except QuestionError:  # it is named when its turn comes
        return item.id


@contextlib.contextmanager
def prefetched(
    model: VLM,
    reader: AnswerReader,
    coming: Iterable[tuple[int, QuestionSet]],
    depth: int | None,
    encode: Callable[[QuestionSet], object],
) -> Iterator[Iterator[tuple[tuple[int, QuestionSet], Callable[[], object]]]]:
    """Numbered batches in order, each with a function that gives it encoded; the next batches are encoded meanwhile.

    An error of encoding is raised by the function of its batch, when its turn comes. Leaving the context waits for the
    one batch that is being encoded, and for no other.

    Args:
        model: the model.
        reader: how answers are read.
        coming: the batches.
        depth: how many batches are encoded ahead; 0 encodes each in its turn, in the caller's thread. A reader of the
            user's with an ``encode`` of its own, which might run the model, is always called so. None is 0 for a model
            on the CPU, and 2 for any other.
        encode: encodes a batch.
    """
    if depth is None:
        on_cpu = next(model.hf.parameters()).device.type == "cpu"  # offloaded or remote weights lie on meta
        depth = 0 if on_cpu else _AHEAD
    if depth == 0 or not type(reader).encode.__module__.startswith("vlmneurons."):
        yield ((numbered, functools.partial(encode, numbered[1])) for numbered in coming)
        return
    inference = torch.is_inference_mode_enabled()

    def encode_in_thread(batch: QuestionSet) -> object:
        with torch.inference_mode(inference):  # each thread has a mode of its own
            return encode(batch)

    executor = ThreadPoolExecutor(1, "vlmneurons-encode")

    def ahead() -> Iterator[tuple[tuple[int, QuestionSet], Callable[[], object]]]:
        waiting: deque[tuple[tuple[int, QuestionSet], Future[object]]] = deque()
        for numbered in coming:
            waiting.append((numbered, executor.submit(encode_in_thread, numbered[1])))
            if len(waiting) > depth:
                first, future = waiting.popleft()
                yield first, future.result
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result

    try:
        yield ahead()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
