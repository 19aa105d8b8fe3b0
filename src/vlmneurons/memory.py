"""Running out of memory in the middle of long work: the batch is halved, and what fits is remembered.

How many questions fit into memory together is not known before: pictures differ in size, other programs come and go.
"""

import gc
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vlmneurons.errors import OutOfMemoryError
from vlmneurons.questions import QuestionSet

log = logging.getLogger(__name__)

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

    def __init__(self, halved: Sequence[Mapping[str, Any]] = ()) -> None:
        self.halved = [dict(one) for one in halved]
        self.most: int | None = self.halved[-1]["to"] if self.halved else None

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
    def provenance(self) -> dict[str, Any]:
        """``{"halved": [...]}``, or nothing where all fitted."""
        return {"halved": list(self.halved)} if self.halved else {}


def release() -> None:
    """Give back what a failed run has left: call it after the error is gone, whose traceback holds the tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _short(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if len(line) <= 150 else f"{line[:149]}…"
