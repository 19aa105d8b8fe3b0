"""What it saves to prepare batches ahead, to batch by length, and to see a picture once: recording with and without.

Run: ``python benchmarks/batching.py``. Times are those on the clock, as preparing ahead uses another core; each round
runs both ways in turn. A ratio above 1 is a gain; *control* is the plain way beside itself.
"""

import argparse
import contextlib
import io
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import measure
import numpy as np
import torch
from PIL import Image

import vlmneurons as vn
from vlmneurons import pictures


def jpeg(generator: np.random.Generator, height: int, width: int) -> bytes:
    """A file of a picture of smooth random colours, as large as a photograph's."""
    small = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
    return file.getvalue()


def questions(n: int, sizes: list[tuple[int, int]], per_picture: int) -> vn.QuestionSet:
    """Questions about files of several sizes."""
    generator = np.random.default_rng(0)
    files = [jpeg(generator, *sizes[k % len(sizes)]) for k in range(n // per_picture)]
    return vn.QuestionSet(
        vn.Question(
            files[k // per_picture],
            f"Which dish is this{' and which place' * (k % 3)}?",
            ("Tea", "Rice", "Bread", "Soup"),
            k % 4,
            "AB"[k % 2],
            id=f"q{k}",
        )
        for k in range(n)
    )


@contextlib.contextmanager
def every_row() -> Any:
    """Within, the vision tower sees a picture for every row that shows it."""
    kept = pictures._owner
    pictures._owner = lambda hf: None
    try:
        yield
    finally:
        pictures._owner = kept


def line(name: str, rounds: int, without: Callable[[], Any], with_it: Callable[[], Any]) -> None:
    """Print how the two ways compare; their counts are compared too."""
    one, other = without(), with_it()
    differ = int((one.positive != other.positive).sum())
    generator = random.Random(0)
    gains, control = [], []
    for _ in range(rounds):
        taken: dict[str, float] = {}
        ways = {"without": without, "again": without, "with": with_it}
        order = list(ways)
        generator.shuffle(order)
        for way in order:
            start = time.perf_counter()
            ways[way]()
            taken[way] = time.perf_counter() - start
        gains.append(taken["without"] / taken["with"])
        control.append(taken["without"] / taken["again"])
    print(
        f"{name:<52} {statistics.median(gains):>6.2f} {f'{min(gains):.2f}–{max(gains):.2f}':>11} "
        f"{f'{min(control):.2f}–{max(control):.2f}':>11} {differ:>7}",
        flush=True,
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--items", type=int, default=48)
    options = parser.parse_args()
    device = measure.device_of("cpu")
    hf, processor = measure.qwen(6, 224, 1184, {"hidden_size": 80, "intermediate_size": 214, "depth": 4})
    model = vn.VLM(hf, processor)

    def record(asked: vn.QuestionSet, **how: Any) -> Any:
        return vn.record(model, asked, condition="all", progress=False, **{"prefetch": 0, **how})

    def in_every_row(asked: vn.QuestionSet) -> Any:
        with every_row():
            return record(asked)

    alike = questions(options.items, [(768, 1024)], 1)
    differing = questions(options.items, [(48, 64), (80, 160), (64, 80), (32, 40)], 1)
    shared = questions(options.items, [(768, 1024)], 2)
    print(measure.about(device))
    print(f"{options.items} questions, batches of 8, decoder of 6 layers x 1,184 neurons; {options.rounds} rounds")
    print(f"{'what':<52} {'gain':>6} {'range':>11} {'control':>11} {'differ':>7}")
    line(
        "2 batches ahead, JPEGs of 1024 x 768",
        options.rounds,
        lambda: record(alike),
        lambda: record(alike, prefetch=2),
    )
    line(
        "by length, pictures of 20 to 200 tokens",
        options.rounds,
        lambda: record(differing),
        lambda: record(differing, by_length=True),
    )
    line(
        "each picture once, 2 questions a picture", options.rounds, lambda: in_every_row(shared), lambda: record(shared)
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
