"""What recording holds in memory: beside the model's own forward, and as the questions grow in number.

Run: ``python benchmarks/memory.py``; Linux only. The peak is the kernel's own (``VmHWM``, set back before each run),
above the resident size before. glibc is told to give memory back as soon as it is free: left to itself it keeps what
was freed, of every thread, and the same run's peak differs by tens of MiB from one process to the next. *Forward* asks
the same batches without a recorder; *record* is ``vn.record`` as it is by default (for a model on the CPU each batch is
encoded in its turn), *ahead* with ``prefetch=2``, and *items* ``vn.record_items``. *Beyond* is the recording's peak
above the forward's; *kept* what is still there when the recording has ended; *Python* the peak of what tracemalloc sees
while recording: every object and array, but no tensor of torch.
"""

import argparse
import ctypes
import gc
import multiprocessing
import os
import re
import statistics
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch

import vlmneurons as vn
from vlmneurons.run.batching import batches
from vlmneurons.run.readers import Letters

GIVING_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment in which glibc maps every tensor of its own, and unmaps it when it is freed."""
HIDDEN = 32


def status(name: str) -> int:
    """A size in bytes that the kernel tells of this process."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def settle() -> None:
    """Give back all that is free."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_of(run: Callable[[], Any]) -> tuple[int, int]:
    """The resident size at its highest during a run, and after it; above that before."""
    settle()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run()
    peak = status("VmHWM")
    settle()
    return peak - before, status("VmRSS") - before


def questions(n: int) -> vn.QuestionSet:
    """Questions about eight pictures."""
    few = measure.questions(8, words=2, height=24, width=32)
    return vn.QuestionSet(
        vn.Question(few[k % 8].image, few[k % 8].question, few[k % 8].options, 0, "AB"[k % 2], id=str(k))
        for k in range(n)
    )


def work(n: int, layers: int, width: int, rounds: int, what: list[str], results: "multiprocessing.Queue[Any]") -> None:
    """Put ``{what: [(peak, kept), …]}`` of one number of questions into the queue."""
    torch.set_num_threads(1)
    hf, processor = measure.llava(layers, width, HIDDEN)
    model = vn.VLM(hf, processor)
    reader = Letters()

    def forward(asked: vn.QuestionSet) -> None:
        with torch.inference_mode():
            for batch in batches(asked, 8):
                reader.read(model, batch, reader.encode(model, batch))

    def record(asked: vn.QuestionSet) -> None:
        vn.record(model, asked, condition="all", progress=False)

    def ahead(asked: vn.QuestionSet) -> None:
        vn.record(model, asked, condition="all", progress=False, prefetch=2)

    def items(asked: vn.QuestionSet) -> None:
        with tempfile.TemporaryDirectory() as folder:
            vn.record_items(model, asked, folder, progress=False)

    runs = {"forward": forward, "record": record, "ahead": ahead, "items": items}
    few, asked = questions(32), questions(n)
    for name in what:  # what is imported and set up once
        runs[name](few)
    found = {name: [peak_of(lambda run=runs[name]: run(asked)) for _ in range(rounds)] for name in what}
    if n <= 1000:
        tracemalloc.start()
        record(asked)
        found["Python"] = [(tracemalloc.get_traced_memory()[1], 0)]
    results.put((found, model.prepare(few[:8])["input_ids"].numel()))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind; one above 1,000 questions")
    parser.add_argument("--what", nargs="+", default=["forward", "record", "ahead", "items"])
    options = parser.parse_args()
    os.environ.update(GIVING_BACK)
    print(measure.about(torch.device("cpu")))
    print(f"{options.layers} layers x {options.width:,} neurons, batches of 8, 2 groups; MiB, median and range")
    print(f"{'questions':>9} {'what':<8} {'peak':>7} {'range':>15} {'beyond':>7} {'kept':>6} {'Python':>7}")
    context = multiprocessing.get_context("spawn")
    tokens = 0
    for n in options.items:
        results = context.Queue()
        rounds = options.rounds if n <= 1000 else 1
        process = context.Process(target=work, args=(n, options.layers, options.width, rounds, options.what, results))
        process.start()
        found, tokens = results.get()
        process.join()
        plain = None
        for name in options.what:
            peaks, kept = ([size / 2**20 for size in column] for column in zip(*found[name], strict=True))
            middle = statistics.median(peaks)
            plain = middle if name == "forward" else plain
            beyond = f"{middle - plain:.1f}" if plain is not None and name != "forward" else "–"
            python = f"{found['Python'][0][0] / 2**20:.1f}" if name == "record" and "Python" in found else "–"
            print(
                f"{n:>9,} {name:<8} {middle:>7.1f} {f'{min(peaks):.1f}–{max(peaks):.1f}':>15} {beyond:>7} "
                f"{statistics.median(kept):>6.1f} {python:>7}",
                flush=True,
            )
    one_layer, accumulators = tokens * options.width * 4, 2 * 8 * options.layers * options.width
    print(f"one layer's activations {one_layer / 2**20:.1f} MiB, accumulators {accumulators / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
