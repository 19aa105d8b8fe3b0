"""Time and memory of every selector on a 7B model's counts: 28 layers x 18,944 neurons x 25 groups.

Run: ``python benchmarks/selector_speed.py``. Each selector runs in a process of its own, so that peaks do not mix; the
extra memory is the peak resident size during `select` above the resident size just before it. `AveragePrecision` reads
single questions, here two a group (50 rows of 530,432 on disk); its time grows with their number.
"""

import argparse
import multiprocessing
import platform
import resource
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vlmneurons
from vlmneurons.neurons.selection import Selection
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.selectors import (
    CAS,
    CNA,
    LAP,
    LAPE,
    MAD,
    Attribution,
    AveragePrecision,
    Conditions,
    CRFusion,
    Joint,
    LayerMatchedRandom,
    MostActive,
    Overlap,
    RandomNeurons,
)
from vlmneurons.statistics.attributions import AttributionStatistics
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.items import Item, ItemStatistics

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
    "CAS per layer": CAS(per_layer=True),
    "CAS where LAP > 0.1": CAS().where(LAP() > 0.1),
    "0.7 z(CAS) + 0.3 z(MAD)": CAS().zscore() * 0.7 + MAD().zscore() * 0.3,
    "CNA": CNA(0.005, anywhere=True),
    "CRFusion, 2 conditions": CRFusion(),
    "Overlap, 2 conditions": Overlap(),
    "Joint, 2 conditions": Joint(),
    "Attribution": Attribution(others=True),
    "AveragePrecision": AveragePrecision(on="probability"),
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


def evidence(name: str, folder: Path) -> Any:
    """What a selector selects from, made of the counts in a folder."""
    stats = ActivationStatistics.load(folder / "counts")
    if name == "CNA":
        return replace(stats, total=stats.positive.double())
    if name.endswith("conditions"):
        return Conditions({"one": stats, "other": replace(stats, positive=stats.positive // 2)})
    if name == "Attribution":
        total, strong = stats.positive / 1e4, torch.zeros_like(stats.positive)
        return AttributionStatistics(stats.space, stats.groups, total, strong, torch.full_like(stats.tokens, 50))
    if name == "AveragePrecision":
        items = [Item(f"{group} {n}", group, 0, {}) for group in stats.groups for n in range(2)]
        made = ItemStatistics.create(folder / "items", stats.space, items, {}, ["positive"])
        counts = stats.positive.repeat_interleave(2, 0).clamp(max=60_000)
        counts[1::2] = (counts[1::2] * 0.9).long()
        made.write(range(len(items)), [0] * len(items), [60_000] * len(items), [0.0] * len(items), {"positive": counts})
        return made.grouped()
    return stats


def measure(name: str, repeats: int, folder: str, results: "multiprocessing.Queue[object]") -> None:
    """Put (seconds of each run, CPU seconds of each run, extra bytes at the peak, sizes) in the queue."""
    torch.set_num_threads(1)
    stats = evidence(name, Path(folder))
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
    seconds, cpu = [], []
    for _ in range(repeats):
        start, spent = time.perf_counter(), time.thread_time()
        selection: Selection = selector.select(stats)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.thread_time() - spent)
    done.set()
    watcher.join()
    results.put((seconds, cpu, peak - before, [len(neurons) for neurons in selection.values()]))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--groups", type=int, default=25)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=18_944)
    parser.add_argument("--only", nargs="*", choices=list(SELECTORS), help="names of selectors")
    options = parser.parse_args()
    shape = (options.groups, options.layers, options.width)
    print(
        f"{platform.machine()}, {multiprocessing.cpu_count()} cores, one thread; "
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
        f"vlmneurons {vlmneurons.__version__}"
    )
    print(f"{options.layers} x {options.width} neurons, {options.groups} groups; {options.repeats} runs each")
    print(f"{'selector':<24} {'median s':>9} {'CPU s':>7} {'max s':>7} {'extra MiB':>10} {'neurons per group':>20}")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        counts(*shape).save(Path(folder) / "counts")
        for name in options.only or SELECTORS:
            results = context.Queue()
            process = context.Process(target=measure, args=(name, options.repeats, folder, results))
            process.start()
            seconds, cpu, extra, sizes = results.get()
            process.join()
            print(
                f"{name:<24} {statistics.median(seconds):>9.2f} {statistics.median(cpu):>7.2f} {max(seconds):>7.2f} "
                f"{extra / 2**20:>10.0f} {min(sizes):>9,}–{max(sizes):,}",
                flush=True,
            )


if __name__ == "__main__":
    main()
