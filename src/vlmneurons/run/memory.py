"""Running out of memory in the middle of long work: the batch is halved, and what fits is remembered.

How many questions fit into memory together is not known before: pictures differ in size, other programs come and go.
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
        most: questions that a batch may have; None as long as all fitted.
        halved: one entry for each time that a batch was halved, for the provenance: ``from`` and ``to`` how many
            questions, and the id of the ``first`` of them.
    """

    def __init__(self, halved: Sequence[JSONMapping] = ()) -> None:
        self.halved = [dict(one) for one in halved]
        self.most: int | None = min((one["to"] for one in self.halved), default=None)

    def parts(self, batch: QuestionSet) -> list[QuestionSet]:
        """A batch in parts that fit, as far as is known."""
        size = self.most or len(batch)
        return [batch[start : start + size] for start in range(0, len(batch), size)]

    def halves(self, waiting: Sequence[QuestionSet], error: BaseException) -> list[QuestionSet]:
        """The parts to ask instead of some, the first of which did not fit; later batches are not larger than these.

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
        return [part for one in waiting for part in self.parts(one)]

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
    """Ask a batch in one part or, where memory does not suffice, in several; where one question spoils it, one by one.

    What spoils a batch is seen when it is encoded. A `QuestionError` of reading is of the model or of a rule: it would
    meet every question, and is raised.

    Args:
        batch: the questions.
        limit: what is known of memory; it learns.
        encoded: gives what the reader made of the whole batch, perhaps in advance.
        encode: makes it of a part.
        read: runs the model on a part, with what was made of it. What it has noted of a part that it did not finish, it
            takes back itself.
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
        made: list[Made] = []
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
            made.append(read(part, ready))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            waiting = limit.halves([part, *waiting], error)
        ready = None  # what did not fit is not to be held while the next part is made
        if made:
            yield part, made[0]
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
