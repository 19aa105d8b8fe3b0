"""Time and memory of a bootstrap: 200 resamples over 2,000 questions x 50,000 neurons that lie on disk, 25 groups.

Run: ``python benchmarks/bootstrap.py``. The counts are written to a folder of their own (200 MB) first; time and peak
memory are those of `vlmneurons.stability` alone, in a process of its own.
"""

import argparse
import multiprocessing
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import vlmneurons
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.selectors import CAS
from vlmneurons.statistics.items import Item, ItemStatistics
from vlmneurons.trust.resampling import resampled_selections
from vlmneurons.trust.stability import stability


def write(folder: Path, questions: int, neurons: int, groups: int) -> None:
    """Counts of made-up questions, 300 tokens each: most neurons alike in all groups, 1 % particular to one."""
    rng = np.random.default_rng(0)
    space = NeuronSpace.from_widths("language", "gate", [neurons // 10] * 10)
    items = [Item(str(n), f"group {n % groups:02}", 0, {}, ()) for n in range(questions)]
    made = ItemStatistics.create(folder, space, items, {"model": "made"}, ["positive"])
    rate = rng.beta(0.5, 2.0, neurons)
    own = np.where(rng.random(neurons) < 0.01, rng.integers(0, groups, neurons), -1)
    for start in range(0, questions, 50):
        rows = range(start, min(start + 50, questions))
        rates = np.stack([np.clip(rate + 0.2 * (own == row % groups), 0, 1) for row in rows])
        counts = rng.binomial(300, rates)
        made.write(rows, [0] * len(rows), [300] * len(rows), [0.0] * len(rows), {"positive": counts})


def measure(folder: str, resamples: int, results: "multiprocessing.Queue[object]") -> None:
    """Put the seconds of drawing and selecting, those of all of `stability`, and both peaks in the queue."""
    torch.set_num_threads(1)  # several threads wait for each other on a busy machine
    items = ItemStatistics.load(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    chosen = sum(1 for _ in resampled_selections(items, CAS(0.005), resamples=resamples))
    middle = time.perf_counter()
    cpu = time.process_time()
    table = stability(items, CAS(0.005), resamples=resamples)
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    overall = table.set_index("group").loc["all"].to_dict()
    results.put((chosen, middle - start, end - middle, time.process_time() - cpu, before, peak, overall))


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--neurons", type=int, default=50_000)
    parser.add_argument("--groups", type=int, default=25)
    parser.add_argument("--resamples", type=int, default=200)
    options = parser.parse_args()
    print(
        f"{platform.machine()}, {multiprocessing.cpu_count()} cores; Python {platform.python_version()}, "
        f"torch {torch.__version__} (1 thread), numpy {np.__version__}, vlmneurons {vlmneurons.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), options.questions, options.neurons, options.groups)
        start = time.perf_counter()
        ItemStatistics.load(folder).group_by()
        grouped = time.perf_counter() - start
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        process = context.Process(target=measure, args=(folder, options.resamples, results))
        process.start()
        chosen, drawing, whole, cpu, before, peak, overall = results.get()
        process.join()
    print(f"{options.questions:,} questions x {options.neurons:,} neurons, {options.groups} groups, CAS(0.005)")
    print(f"group_by, once                      {grouped:6.1f} s")
    print(f"{chosen} selections from resamples     {drawing:6.1f} s")
    print(f"stability, with rank correlations   {whole:6.1f} s ({cpu:.1f} s of CPU)")
    print(
        f"peak memory                         {peak / 2**10:6.0f} MiB, of which {before / 2**10:.0f} before the start"
    )
    print(f"mean overlap {overall['jaccard']:.3f}, chance {overall['chance']:.4f}, Spearman {overall['spearman']:.3f}")


if __name__ == "__main__":
    main()
