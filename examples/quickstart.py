"""The whole job on the embedded demo: which neurons carry a culture, and what is lost without them.

    python examples/quickstart.py [--out out/quickstart]

Needs no network and no GPU, and takes about a minute on two CPU cores. It does the same with both demo models: in the
*organism* twelve neurons of each culture were made necessary by training, so there is a right answer; the *natural* one
was trained on its task and nothing else, so its effects are modest, like those of a real model, and drawn in nats. For
each it writes a table of effects and two pictures: whose neurons harm whose questions, and in which layers the neurons
lie.
"""

import argparse
from pathlib import Path

import torch

import vlmneurons as vn

SELECTORS = {"organism": vn.CAS(count=12), "natural": vn.CAS(fraction=0.02)}


def study(name: str, folder: Path) -> None:
    """Record, select, ablate and measure, with one of the demo models."""
    model, questions = vn.load_demo(name)
    print(f"\n{model!r}\n{questions!r}")

    # Neurons are found on one half of the pictures and judged on the other.
    identify, evaluate = questions.split(0.5, seed=0)
    stats = vn.record(model, identify, condition="correct", tokens="content", batch_size=64)
    cas = SELECTORS[name].select(stats)

    # A selection means nothing without a control: random neurons, as many in every layer.
    random = [vn.LayerMatchedRandom(cas, seed=seed).select(stats) for seed in range(2)]
    result = vn.knockout(model, evaluate, {"CAS": cas, "random": random}, batch_size=64)

    summary = result.summary()
    shown = ["selector", "clean", "self_effect", "self_effect_low", "self_effect_high", "cross_effect", "self_margin"]
    print(summary[summary["group"] == "all"][shown].to_string(index=False, float_format="{:+.3f}".format))
    if name == "organism":
        truth = vn.demo_truth()
        found = sum(len(cas[group] & truth[group]) for group in truth)
        print(f"CAS found {found} of the {sum(map(len, truth.values()))} planted neurons")

    folder.mkdir(parents=True, exist_ok=True)
    summary.to_csv(folder / f"{name}.csv", index=False)
    # What is lost is planted in one model and shows in accuracy; in the other it is small, and margins show more.
    value = "delta" if name == "organism" else "margin"
    result.plot_matrix(value=value).savefig(folder / f"{name}-effects.png", dpi=150)
    vn.plot_layers(cas).savefig(folder / f"{name}-layers.png", dpi=150)


def main() -> None:
    """Command line: see the head of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/quickstart"), help="folder for tables and pictures")
    folder = parser.parse_args().out
    torch.set_num_threads(1)  # the demo's models are so small that more threads make them slower
    for name in SELECTORS:
        study(name, folder)
    print(f"\nTables and pictures are in {folder}")


if __name__ == "__main__":
    main()
