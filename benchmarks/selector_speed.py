"""Time and memory of every selector on a 7B model's counts: 28 layers x 18,944 neurons x 25 groups.

Run: ``python benchmarks/selector_speed.py``. Each selector runs in a process of its own, so that peaks do not mix; the
extra memory is the peak resident size during `select` above the resident size just before it.
"""

import argparse
import multiprocessing
import platform
import resource
import statistics
import threading
import time

import numpy as np
import torch

import vlmneurons
from vlmneurons.neurons import Selection
from vlmneurons.selectors import CAS, LAP, LAPE, MAD, LayerMatchedRandom, MostActive, RandomNeurons
from vlmneurons.sites import NeuronSpace
from vlmneurons.statistics import ActivationStatistics

SELECTORS = {
    "LAP": LAP(),
    "LAPE": LAPE(),
    "LAPE tang": LAPE(variant="tang"),
    "MAD": MAD(),
    "CAS": CAS(),
    "RandomNeurons": RandomNeurons(),
    "LayerMatchedRandom": None,
    "MostActive": MostActive(),
    "(CAS & MAD) | LAPE": (CAS(0.01) & MAD(0.01)) | LAPE(),
}


def counts(groups: int, layers: int, width: int, seed: int = 0) -> ActivationStatistics:
    """Counts as of 50 items of 600 tokens per group: most neurons alike in all groups, some particular to one."""
    generator = np.random.default_rng(seed)
    space = NeuronSpace.from_widths("language", "gate", [width] * layers)
    tokens = generator.integers(25_000, 35_000, groups)
    base = generator.beta(0.5, 2.0, len(space))
    positive = np.empty((groups, len(space)), dtype=np.int64)
    for group in range(groups):
        shifted = np.clip(base + generator.normal(0, 0.02, len(space)), 0, 1)
        positive[group] = generator.binomial(tokens[group], shifted)
    return ActivationStatistics.from_counts(space, [f"group {g}" for g in range(groups)], positive, tokens)


def resident() -> int:
    """Resident size of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measure(name: str, repeats: int, shape: tuple[int, int, int], results: "multiprocessing.Queue[object]") -> None:
    """Put (seconds of each run, extra bytes at the peak) in the queue."""
    stats = counts(*shape)
    selector = SELECTORS[name]
    if selector is None:
        selector = LayerMatchedRandom(CAS().select(stats))
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        selection: Selection = selector.select(stats)
        seconds.append(time.perf_counter() - start)
    done.set()
    watcher.join()
    results.put((seconds, peak - before, [len(neurons) for neurons in selection.values()]))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--groups", type=int, default=25)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=18_944)
    options = parser.parse_args()
    shape = (options.groups, options.layers, options.width)
    print(
        f"{platform.machine()}, {multiprocessing.cpu_count()} cores, torch threads {torch.get_num_threads()}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
        f"vlmneurons {vlmneurons.__version__}"
    )
    print(f"{options.layers} x {options.width} neurons, {options.groups} groups; {options.repeats} runs each")
    print(f"{'selector':<20} {'median s':>9} {'min s':>7} {'max s':>7} {'extra MiB':>10} {'neurons per group':>20}")
    context = multiprocessing.get_context("spawn")
    for name in SELECTORS:
        results = context.Queue()
        process = context.Process(target=measure, args=(name, options.repeats, shape, results))
        process.start()
        seconds, extra, sizes = results.get()
        process.join()
        median = statistics.median(seconds)
        print(
            f"{name:<20} {median:>9.2f} {min(seconds):>7.2f} {max(seconds):>7.2f} {extra / 2**20:>10.0f} "
            f"{min(sizes):>9,}–{max(sizes):,}"
        )


if __name__ == "__main__":
    main()
