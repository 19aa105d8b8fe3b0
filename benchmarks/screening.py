"""How well the first-order estimate ranks masks: its correlation with the exact effects on the demo.

Run: ``python benchmarks/screening.py``. Masks of four selectors for the demo's eight groups; each pair of a mask and a
group of questions is one point.
"""

import argparse

import measure
import torch
from scipy.stats import pearsonr, spearmanr

import vlmneurons as vn


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--identify", type=int, default=20, help="questions of each group to select on")
    parser.add_argument("--evaluate", type=int, default=10, help="questions of each group to measure on")
    parser.add_argument("--fraction", type=float, default=0.01)
    options = parser.parse_args()
    device = measure.device_of("cpu")
    model, questions = vn.load_demo()
    first, second = questions.split(0.5, seed=0)

    def some(of: vn.QuestionSet, n: int) -> vn.QuestionSet:
        return vn.QuestionSet(
            [item for group in of.groups for item in [one for one in of if one.group == group][:n]], answer=of.answer
        )

    first, second = some(first, options.identify), some(second, options.evaluate)
    stats = vn.record(model, first, condition="all", progress=False)
    selectors = {
        "CAS": vn.CAS(options.fraction),
        "MAD": vn.MAD(options.fraction),
        "LAP": vn.LAP(options.fraction),
        "random": vn.RandomNeurons(options.fraction),
    }
    masks = {name: selector.select(stats) for name, selector in selectors.items()}
    estimate = vn.screen(model, second, masks, progress=False)
    exact = vn.knockout(model, second, masks, progress=False).table()
    both = exact.merge(estimate, on=["selector", "repeat", "mask", "group"])
    print(measure.about(device))
    print(f"demo, {options.fraction:.1%} of {len(stats.space):,} neurons, {len(second)} questions of 8 groups")
    print(f"{'masks':<8} {'points':>7} {'Pearson':>8} {'Spearman':>9} {'mean |exact|':>13} {'mean |estimate|':>16}")
    for name in [*masks, "all"]:
        part = both if name == "all" else both[both["selector"] == name]
        x, y = part["estimate"], part["margin"]
        print(
            f"{name:<8} {len(part):>7} {pearsonr(x, y).statistic:>8.3f} {spearmanr(x, y).statistic:>9.3f} "
            f"{y.abs().mean():>13.3f} {x.abs().mean():>16.3f}"
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
