"""Running out of memory in the middle of long work: the batch is halved, and what fits is remembered.

How many questions fit into memory together cannot be known before: pictures differ in size, and other programs come and
go.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from vlmneurons.checks import JSON, JSONMapping
from vlmneurons.errors import OutOfMemoryError, QuestionError
from vlmneurons.questions.sets import QuestionSet

log = logging.getLogger(__name__)

Made = TypeVar("Made")

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a device or of the machine, did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return type(error) is RuntimeError and any(sign in str(error).lower() for sign in _SIGNS)


class MemoryLimit:
    """How many questions fit into memory at once, found out when more did not.

    Args:
        halved: what an earlier session found out.

    Attributes:
        most: how many questions a batch may have; None as long as all batches fitted.
        halved: one entry for each time that a batch was halved, for the provenance: ``from`` how many questions ``to``
            how many, and the id of the ``first`` of them.
    """

    def __init__(self, halved: Sequence[JSONMapping] = ()) -> None:
        self.halved = [dict(halving) for halving in halved]
        self.most: int | None = min((halving["to"] for halving in self.halved), default=None)

    def parts(self, batch: QuestionSet) -> list[QuestionSet]:
        """A batch in parts that are small enough, as far as is known."""
        size = self.most or len(batch)
        return [batch[start : start + size] for start in range(0, len(batch), size)]

    def halves(self, waiting: Sequence[QuestionSet], error: BaseException) -> list[QuestionSet]:
        """The parts to ask instead of the waiting ones, after the first of them did not fit.

        From now on no part is larger than half of it.

        Raises:
            OutOfMemoryError: it is a single question.
        """
        batch = waiting[0]
        if len(batch) == 1:
            raise OutOfMemoryError(
                f"question {batch[0].id!r} does not fit into memory on its own ({_short(error)}): use a smaller "
                "picture (the processor's max_pixels or size), a smaller dtype, or a device with more memory"
            ) from error
        self.most = (len(batch) + 1) // 2
        self.halved.append({"from": len(batch), "to": self.most, "first": batch[0].id})
        log.warning(
            "out of memory with %d questions at once (%r and others): going on with %d; batch_size=%d would avoid this",
            len(batch),
            batch[0].id,
            self.most,
            self.most,
        )
        return [part for batch in waiting for part in self.parts(batch)]

    @property
    def provenance(self) -> JSON:
        """``{"halved": [...]}``, or nothing where all fitted."""
        return {"halved": list(self.halved)} if self.halved else {}


def asked_in_parts(
    batch: QuestionSet,
    limit: MemoryLimit,
    encoded: Callable[[], object],
    encode: Callable[[QuestionSet], object],
    read: Callable[[QuestionSet, Any], Made],
    skipped: list[str] | None = None,
) -> Iterator[tuple[QuestionSet, Made]]:
    """Ask a batch in one part, or in several where memory does not suffice; one by one where a question spoils it.

    Whether a question cannot be asked shows when it is encoded. A `QuestionError` that comes later, of running the
    model or of reading its answers, is no question's fault: every question would meet it, so it is raised.

    Args:
        batch: the questions.
        limit: how much is known to fit into memory; it is updated.
        encoded: gives the whole batch encoded, perhaps in advance.
        encode: encodes a part.
        read: runs the model on an encoded part. If it fails, it takes back itself what it has noted of the part.
        skipped: takes the ids of questions that cannot be asked; None raises instead.

    Yields:
        Each part in order, and what ``read`` gave of it.

    Raises:
        OutOfMemoryError: a single question does not fit into memory.
    """
    waiting = limit.parts(batch)
    whole = len(waiting) == 1
    while waiting:
        part = waiting.pop(0)
        results: list[Made] = []  # one or none: the result itself may be None
        try:
            try:
                ready = encoded() if whole else encode(part)
            except QuestionError:
                if skipped is None:
                    raise
                if len(part) == 1:
                    skipped.append(part[0].id)
                else:
                    waiting = [part[n : n + 1] for n in range(len(part))] + waiting
                continue
            finally:
                whole = False
            results.append(read(part, ready))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            waiting = limit.halves([part, *waiting], error)
        ready = None  # what did not fit is not to be held while the next part is made
        if results:
            yield part, results[0]
        else:
            release()


def release() -> None:
    """Give back what a failed run has left: call it after the error is gone, whose traceback holds the tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _short(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if len(line) <= 150 else f"{line[:149]}…"
