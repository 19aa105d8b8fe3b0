"""Several processes, one result: each takes whole batches of questions, and their results are put together exactly.

Started by ``torchrun --nproc-per-node N`` (or accelerate, or SLURM with the same variables), each process has its own
model, or its own share of a model. Batches are the same as in a single process, so every count and every answer is too:
which process runs a batch changes nothing. Messages between the processes are plain objects, sent over gloo also where
the models are on GPUs.
"""

import atexit
import datetime
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from vlmneurons.checks import Wire
from vlmneurons.errors import QuestionError, VLMNeuronsError

T = TypeVar("T")

_WAIT = datetime.timedelta(days=7)  # the fastest process waits for the slowest
_GROUP: list[Any] = []


@dataclass(frozen=True)
class Processes:
    """The place of this process among those that share a run.

    Attributes:
        rank: the number of this process, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    def mine(self, batches: Sequence[T]) -> Iterator[tuple[int, T]]:
        """The batches that fall to this process, every ``count``-th, with their numbers."""
        for number in range(self.rank, len(batches), self.count):
            yield number, batches[number]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order of rank; every process must call this."""
        if self.count == 1:
            return [value]
        values: Wire = [None] * self.count
        dist.all_gather_object(values, value, group=_group())
        return values

    def wait(self) -> None:
        """Wait until all processes have come to this point."""
        self.gather(None)


@dataclass(frozen=True)
class Part(Processes):
    """One part of a run whose parts are asked separately, at any time: no part waits for another."""

    def __str__(self) -> str:
        return f"{self.rank + 1}/{self.count}"

    @property
    def first(self) -> bool:
        """See `Processes.first`: a part has a folder of its own."""
        return True

    def mine(self, batches: Sequence[T]) -> Iterator[tuple[int, T]]:
        """See `Processes.mine`.

        Raises:
            QuestionError: there are more parts than batches, which every part refuses alike.
        """
        if self.count > len(batches):
            raise QuestionError(
                f"part {self}: there are {len(batches)} batches for {self.count} parts; give at most {len(batches)} "
                "parts, or a smaller batch_size"
            )
        return super().mine(batches)

    def gather(self, value: T) -> list[T]:
        """See `Processes.gather`."""
        return [value]


def part_of(part: tuple[int, int] | str) -> Part:
    """A part from its number, counted from 1, and the number of all parts: ``(3, 8)`` or ``"3/8"``.

    Raises:
        QuestionError: there is no such part.
    """
    numbers: object = part
    if isinstance(part, str) and re.fullmatch(r"[0-9]{1,9}/[0-9]{1,9}", part):
        numbers = tuple(map(int, part.split("/")))
    if not isinstance(numbers, tuple) or [type(number) for number in numbers] != [int, int]:
        raise QuestionError(f"part={part!r} is no part: give its number and that of all, such as '3/8' or (3, 8)")
    number, count = numbers
    if not 1 <= number <= count:
        raise QuestionError(f"part={part!r} is no part: of {count}, there are those from 1/{count} to {count}/{count}")
    return Part(number - 1, count)


def current_processes() -> Processes:
    """The processes that this process was started with; outside of torchrun and the like it is alone.

    Raises:
        VLMNeuronsError: the environment names several processes, but not how to reach them.
    """
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise VLMNeuronsError(
            f"WORLD_SIZE is {count}, but {', '.join(missing)} is not set: start with torchrun --nproc-per-node {count}"
        )
    dist.init_process_group("gloo", timeout=_WAIT)
    # Python does not wait for gloo's threads when it ends, and a process whose work is done would end in an abort.
    atexit.register(_leave)
    return Processes(dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    """End the group that this module began, unless the caller has."""
    if dist.is_initialized():
        _GROUP.clear()
        dist.destroy_process_group()


def _group() -> Any:
    """A gloo group of all processes, whatever the default one is made of."""
    if dist.get_backend() == "gloo":
        return None
    if not _GROUP:
        _GROUP.append(dist.new_group(backend="gloo", timeout=_WAIT))
    return _GROUP[0]
