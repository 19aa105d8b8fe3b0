"""What it takes to count one site's values above zero: the recorder's way, a product of a new table, and a plain sum.

Run: ``python benchmarks/counting.py``. Medians and quartiles of the CPU time, the three ways in turn.
"""

import statistics

import measure
import torch

from vlmneurons.statistics.counting import fired_by_row


def main() -> None:
    """Print a table."""
    device = measure.device_of("cpu")
    print(measure.about(device))
    print(f"{'values':<18} {'dtype':<9} {'way':<24} {'median ms':>10} {'quartiles':>13}")
    for shape in ((4, 150, 1792), (1, 300, 18_944)):
        for dtype in (torch.float32, torch.bfloat16):
            values = torch.randn(shape).to(dtype)
            weights = torch.ones(shape[:2])
            buffers: dict[torch.device, torch.Tensor] = {}
            ways = {
                "recorder": lambda v=values, w=weights, b=buffers: fired_by_row(v, w, b),
                "bmm of a new table": lambda v=values, w=weights: torch.bmm(w[:, None], (v > 0).to(torch.float32)),
                "(x > 0).sum((0, 1))": lambda v=values: (v > 0).sum((0, 1)),
            }
            times: dict[str, list[float]] = {name: [] for name in ways}
            for number in range(23):
                for name, run in ways.items():
                    taken = measure.seconds(run, device)
                    if number > 2:
                        times[name].append(1e3 * taken)
            for name, taken in times.items():
                low, middle, high = statistics.quantiles(taken, n=4)
                print(
                    f"{shape!s:<18} {str(dtype)[6:]:<9} {name:<24} {middle:>10.2f} {f'{low:.2f}–{high:.2f}':>13}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
