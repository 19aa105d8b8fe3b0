"""What recording holds in memory: beside the model's own forward, and as the questions grow in number.

Run: ``python benchmarks/memory.py``. Each number of questions runs in a process of its own. *Peak* is the resident size
(on CUDA: what torch has allocated) at its highest above that before the run; *Python* is the peak that tracemalloc
sees, which counts every array and object but torch's tensors. *Forward* is the peak of the same batches being asked
without recording. Both are left out above 1,000 questions.
"""

import argparse
import multiprocessing
import resource
import threading
import tracemalloc
from typing import Any

import measure
import torch

import vlmneurons as vn
from vlmneurons.answers import Letters
from vlmneurons.batching import batches


def resident() -> int:
    """Resident size of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class Peak:
    """The highest resident size within a block, above that at its beginning."""

    def __enter__(self) -> "Peak":
        self.before, self.highest, self._done = resident(), 0, threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.highest = max(self.highest, resident() - self.before)

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._watcher.join()


def run(n: int, layers: int, width: int, what: str, results: "multiprocessing.Queue[Any]") -> None:
    """Put the peaks of one run in the queue."""
    torch.set_num_threads(1)
    hf, processor = measure.llava(layers, width, 64)
    model = vn.VLM(hf, processor)
    few = measure.questions(8, words=2, height=24, width=32)
    items = [
        vn.Question(few[k % 8].image, few[k % 8].question, few[k % 8].options, 0, "AB"[k % 2], id=str(k))
        for k in range(n)
    ]
    questions = vn.QuestionSet(items)
    reader = Letters()

    def ask(questions: vn.QuestionSet) -> None:
        with torch.inference_mode():
            for batch in batches(questions, 8):
                reader.read(model, batch, reader.encode(model, batch))

    vn.record(model, few, condition="all", progress=False)  # what is imported and set up once
    if what == "python":
        tracemalloc.start()
    with Peak() as peak:
        if what == "forward":
            ask(questions)
        else:
            vn.record(model, questions, condition="all", progress=False)
    python = tracemalloc.get_traced_memory()[1] if what == "python" else 0
    tokens = model.prepare(few)["input_ids"].numel()
    results.put((peak.highest, python, 2 * 8 * layers * width, tokens * width * 4))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=4096)
    options = parser.parse_args()
    print(measure.about(torch.device("cpu")))
    print(f"{options.layers} layers x {options.width:,} neurons, batches of 8, 2 groups; MiB")
    print(f"{'items':>7} {'forward':>9} {'record':>9} {'Python':>9} {'accumulators':>13} {'one layer':>10}")
    context = multiprocessing.get_context("spawn")
    for n in options.items:
        found = []
        for what in ("resident", *["forward", "python"] * (n <= 1000)):
            results = context.Queue()
            process = context.Process(target=run, args=(n, options.layers, options.width, what, results))
            process.start()
            found.append(results.get())
            process.join()
        peak, _, accumulators, layer = found[0]
        peak, accumulators, layer = (size / 2**20 for size in (peak, accumulators, layer))
        plain, python = (f"{size / 2**20:.1f}" for size in (found[1][0], found[2][1])) if len(found) > 1 else "––"
        print(f"{n:>7,} {plain:>9} {peak:>9.1f} {python:>9} {accumulators:>13.1f} {layer:>10.1f}", flush=True)


if __name__ == "__main__":
    main()
