"""What it saves to prepare batches ahead, to batch by length, and to see a picture once: recording with and without.

Run: ``python benchmarks/batching.py``. Each round runs both ways in turn, and the plain way once more as *control*; a
ratio above 1 is a gain, and one inside the control's range is none. Encoding ahead uses another core and spares no
work, so it is timed by the clock (which says nothing unless the machine is quiet), the others by CPU time. *Differ* is
how many counts are not the same: features of fewer pictures may differ by rounding, and tip a neuron whose value is
within that of 0.

*There is* what can be gained: the part of the time that encoding takes, the part of the tokens that is padding (and
what is left of it), or the part of a forward's time that the vision tower takes.
"""

import argparse
import contextlib
import functools
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
from vlmneurons.run import pictures
from vlmneurons.run.batching import batches
from vlmneurons.run.readers import Letters


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


def line(
    name: str,
    there_is: str,
    rounds: int,
    clock: Callable[[], float],
    without: Callable[[], Any],
    with_it: Callable[[], Any],
) -> None:
    """Print how the two ways compare; their counts are compared too."""
    one, other = without(), with_it()
    differ = int((one.positive != other.positive).sum())
    generator = random.Random(0)
    gains, control, plain = [], [], []
    for _ in range(rounds):
        taken: dict[str, float] = {}
        ways = {"without": without, "again": without, "with": with_it}
        order = list(ways)
        generator.shuffle(order)
        for way in order:
            start = clock()
            ways[way]()
            taken[way] = clock() - start
        plain.append(taken["without"])
        gains.append(taken["without"] / taken["with"])
        control.append(taken["without"] / taken["again"])
    print(
        f"{name:<42} {there_is:<26} {statistics.median(plain):>7.2f} {statistics.median(gains):>6.2f} "
        f"{f'{min(gains):.2f}–{max(gains):.2f}':>11} {f'{min(control):.2f}–{max(control):.2f}':>11} "
        f"{differ:>4} of {one.positive.numel():,}",
        flush=True,
    )


def encoding_share(model: vn.VLM, asked: vn.QuestionSet) -> float:
    """Of the CPU time of asking, what opening, resizing and tokenizing take."""
    reader, encoding, asking = Letters(), 0.0, 0.0
    with torch.inference_mode():
        for batch in batches(asked, 8):
            start = time.process_time()
            encoded = reader.encode(model, batch)
            middle = time.process_time()
            reader.read(model, batch, encoded)
            encoding, asking = encoding + middle - start, asking + time.process_time() - middle
    return encoding / (encoding + asking)


def padding(model: vn.VLM, asked: vn.QuestionSet, lengths: Callable[[vn.Question], int] | None) -> float:
    """The part of the tokens that is padding."""
    masks = [
        Letters().wants(Letters().encode(model, batch)).batch["attention_mask"] for batch in batches(asked, 8, lengths)
    ]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def vision_share(model: vn.VLM, asked: vn.QuestionSet) -> float:
    """Of the CPU time of a forward, what the vision tower takes."""
    batch = model.prepare(asked[:8])
    picture = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
    with torch.inference_mode():
        pairs = measure.paired(
            lambda: model.hf(**batch, use_cache=False, logits_to_keep=1),
            {"vision": lambda: model.hf.model.get_image_features(**picture)},
            3,
            torch.device("cpu"),
            warm=1,
        )["vision"]
    return statistics.median(vision / whole for whole, vision in pairs)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--items", type=int, default=48)
    parser.add_argument("--only", nargs="+", default=["ahead", "length", "once"], choices=["ahead", "length", "once"])
    options = parser.parse_args()
    device = measure.device_of("cpu")
    hf, processor = measure.qwen(6, 224, 1184, {"hidden_size": 80, "intermediate_size": 214, "depth": 4})
    model = vn.VLM(hf, processor)

    def record(asked: vn.QuestionSet, **how: Any) -> Any:
        return vn.record(model, asked, condition="all", progress=False, **{"prefetch": 0, **how})

    def in_every_row(asked: vn.QuestionSet) -> Any:
        with every_row():
            return record(asked)

    print(measure.about(device))
    print(f"{options.items} questions, batches of 8, decoder of 6 layers x 1,184 neurons; {options.rounds} rounds")
    print(f"{'what':<42} {'there is':<26} {'plain s':>7} {'gain':>6} {'range':>11} {'control':>11} differ")
    if "ahead" in options.only:
        alike = questions(options.items, [(768, 1024)], 1)
        line(
            "2 batches ahead, JPEGs of 1024 x 768",
            f"{encoding_share(model, alike):.0%} of the time encoding",
            options.rounds,
            time.perf_counter,
            lambda: record(alike),
            lambda: record(alike, prefetch=2),
        )
    if "length" in options.only:
        differing = questions(options.items, [(48, 64), (80, 160), (64, 80), (32, 40)], 1)
        lengths = functools.partial(model.encoder.length, differing)
        line(
            "by length, pictures of 20 to 200 tokens",
            f"{padding(model, differing, None):.0%} padding, now {padding(model, differing, lengths):.0%}",
            options.rounds,
            time.process_time,
            lambda: record(differing),
            lambda: record(differing, by_length=True),
        )
    if "once" in options.only:
        shared = questions(options.items, [(96, 128)], 2)
        line(
            "each picture once, 2 questions a picture",
            f"{vision_share(model, shared):.0%} of a forward vision",
            options.rounds,
            time.process_time,
            lambda: in_every_row(shared),
            lambda: record(shared),
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
