"""Which questions share a forward, and making the next ones ready meanwhile.

Decoding and resizing a picture takes the CPU tens of milliseconds, in which a GPU would wait; so a thread encodes the
next batches while the model runs on this one. One thread, in order: what comes out does not depend on it. A model on
the CPU waits for nothing: there the two would only share its cores, and the batches ahead would lie in its memory.
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
    """Batches of questions that show equally many pictures, sounds, videos and frames: those with most first.

    Questions of the same picture (the same path, or the same content) stand next to each other, so that the vision
    tower sees it once and the decoder computes its tokens once where that is possible; otherwise the order is kept.

    Args:
        questions: the questions.
        size: questions a batch.
        lengths: how many tokens a question has, about: then questions are sorted by it within windows of 16 batches, so
            that little is padding. Those of one picture stay together.
    """
    for shown in sorted({(item.n_media, item.n_frames) for item in questions}, reverse=True):
        by_picture: dict[object, list[Question]] = {}
        for item in questions:
            if (item.n_media, item.n_frames) == shown:
                own = _shown(item) if size > 1 else item.id  # alone, nothing is shared
                by_picture.setdefault(own, []).append(item)
        together = [item for items in by_picture.values() for item in items]
        if lengths is not None:
            windows = (together[start : start + _WINDOW * size] for start in range(0, len(together), _WINDOW * size))
            together = [item for window in windows for item in _sorted(window, lengths)]
        for start in range(0, len(together), size):
            yield questions.with_items(together[start : start + size])


def _sorted(items: list[Question], lengths: Callable[[Question], int]) -> list[Question]:
    """Longest first, so that memory that does not suffice is noticed at once; those of one picture by its longest."""
    longest: dict[object, int] = {}
    own = [(_shown(item), lengths(item)) for item in items]
    for shown, length in own:
        longest[shown] = max(length, longest.get(shown, 0))
    first = {shown: place for place, (shown, _) in reversed(list(enumerate(own)))}
    order = sorted(range(len(items)), key=lambda n: (-longest[own[n][0]], first[own[n][0]], -own[n][1], n))
    return [items[n] for n in order]


def _shown(item: Question) -> object:
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
    """Numbered batches in order, each with a function that gives what it is encoded to; the next are encoded meanwhile.

    An error of encoding is raised by the function of its batch, when its turn comes. Leaving the context waits for the
    one batch that is being encoded, and for no other.

    Args:
        model: the model.
        reader: how answers are read.
        coming: the batches.
        depth: how many batches are encoded ahead; 0 encodes each in its turn, in the caller's thread. So is what a
            reader with an ``encode`` of its own makes, which might run the model. None is 0 for a model on the CPU, and
            2 for any other.
        encode: encodes a batch.
    """
    if depth is None:
        on_cpu = next(model.hf.parameters()).device.type == "cpu"  # offloaded or remote weights lie on meta
        depth = 0 if on_cpu else _AHEAD
    if depth == 0 or not type(reader).encode.__module__.startswith("vlmneurons."):
        yield ((one, functools.partial(encode, one[1])) for one in coming)
        return
    inference = torch.is_inference_mode_enabled()

    def encode_there(batch: QuestionSet) -> object:
        with torch.inference_mode(inference):  # which is a thread's own
            return encode(batch)

    executor = ThreadPoolExecutor(1, "vlmneurons-encode")

    def ahead() -> Iterator[tuple[tuple[int, QuestionSet], Callable[[], object]]]:
        waiting: deque[tuple[tuple[int, QuestionSet], Future[object]]] = deque()
        for one in coming:
            waiting.append((one, executor.submit(encode_there, one[1])))
            if len(waiting) > depth:
                one, future = waiting.popleft()
                yield one, future.result
        while waiting:
            one, future = waiting.popleft()
            yield one, future.result

    try:
        yield ahead()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
