"""Limits for tests of hostile input: a memory that ends, a clock that rings, and damage that is the same every time."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any


@contextmanager
def limits(seconds: int = 20, gibibytes: float = 1.0) -> Iterator[None]:
    """What takes longer, or asks for that much more memory than is in use, raises instead of going on."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"it took longer than {seconds} s")

    assert threading.current_thread() is threading.main_thread()
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + int(gibibytes * 2**30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk on which no file can grow beyond some bytes: writing on raises OSError, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def damaged(whole: bytes, n: int, seed: int = 0) -> Iterator[bytes]:
    """Files that a bad disk, a broken download or an enemy could make of one: cut, flipped, doubled, overwritten."""
    rng = Random(seed)
    for _ in range(n):
        data = bytearray(whole)
        place = rng.randrange(len(data))
        match rng.randrange(6):
            case 0:
                del data[place:]
            case 1:
                data[place] ^= 1 << rng.randrange(8)
            case 2:
                data[place : place + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(64))
            case 3:
                data[place:place] = data[: rng.randrange(1, len(data))]
            case 4:
                for _ in range(rng.randrange(1, 50)):
                    data[rng.randrange(len(data))] = rng.randrange(256)
            case 5:  # another number where a number stands, such as a length or an offset
                digits = [at for at, byte in enumerate(data) if 48 <= byte <= 57]
                data[rng.choice(digits) if digits else place] = rng.choice(b"0123456789-")
        if bytes(data) != whole:
            yield bytes(data)
