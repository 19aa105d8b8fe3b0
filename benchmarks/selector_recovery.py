"""Which selector finds neurons that are known to be a group's, and which is misled: by what, and how much?

Run: ``python benchmarks/selector_recovery.py``. Counts of made-up questions, in which each group has 15 neurons of its
own among 3,000, are varied in one respect at a time: strength of the signal, questions a group, imbalance, likeness of
groups, decoys. Then a real model whose group neurons were written into its weights
(`vlmneurons.testing.plant_neurons`), on which gradients can be taken as well. With ``--write`` the tables go into
docs/selectors.md, and the picture beside it.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from vlmneurons.neurons.sets import NeuronSet
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
    IntegratedGradients,
    MostActive,
    Overlap,
    RandomNeurons,
    Selector,
)
from vlmneurons.statistics.items import GroupedItems, Item, ItemStatistics

DOCS = Path(__file__).parent.parent / "docs"
GROUPS, OWN, WIDTH, LAYERS, TOKENS = 8, 15, 1000, 3, 60
DECOYS = ("always", "shared", "rare")
PER_KIND = 60


@dataclass(frozen=True)
class Setting:
    """How the made-up questions are drawn."""

    strength: float = 0.15
    """By how much a group's own neurons fire more often for it: a difference of probabilities."""
    questions: int = 20
    """Questions of each group (of the largest, where groups are imbalanced)."""
    imbalance: float = 1.0
    """Questions of the largest group over those of the smallest."""
    likeness: float = 0.0
    """Share of a group's signal that its neurons also show for the next group."""
    decoys: tuple[str, ...] = ("always", "shared")
    """``always``: fire nearly always, for all; ``shared``: a signal for two groups; ``rare``: fire for one group alone,
    on 1 % of its tokens."""


SWEEPS: dict[str, tuple[str, list[tuple[str, Setting]]]] = {
    "strength": (
        "Signal\n(difference of probabilities)",
        [(f"{value:g}", Setting(strength=value)) for value in (0.05, 0.1, 0.15, 0.2, 0.4)],
    ),
    "questions": ("Questions a group", [(f"{value}", Setting(questions=value)) for value in (3, 5, 10, 20, 50)]),
    "imbalance": (
        "Largest over\nsmallest group",
        [(f"{value:g}", Setting(questions=40, imbalance=value)) for value in (1, 4, 16)],
    ),
    "likeness": (
        "Share of the signal\nin another group",
        [(f"{value:g}", Setting(likeness=value)) for value in (0.0, 0.5, 0.8)],
    ),
    "decoys": (
        "Decoys",
        [(name or "none", Setting(decoys=kinds)) for name, kinds in
         (("", ()), ("always", ("always",)), ("shared", ("shared",)), ("rare", ("rare",)), ("all", DECOYS))],
    ),
}  # fmt: skip

RULES: dict[str, Selector] = {
    "CAS": CAS(count=OWN),
    "MAD": MAD(count=OWN),
    "MAD signed": MAD(count=OWN, signed=True),
    "LAPE": LAPE(count=OWN),
    "LAPE tang": LAPE(variant="tang", top_rate=GROUPS * OWN / (WIDTH * LAYERS)),
    "LAP": LAP(count=OWN),
    "CNA signed": CNA(count=OWN, anywhere=True, signed=True),
    "AveragePrecision": AveragePrecision(count=OWN),
    "CRFusion": CRFusion(count=OWN),
    "Overlap": Overlap(count=OWN),
    "CAS where LAP > 0.05": CAS(count=OWN).where(LAP() > 0.05),
    "LAPE where LAP > 0.05": LAPE(count=OWN).where(LAP() > 0.05),
    "z(CAS) + z(MAD signed)": (CAS().zscore() + MAD(signed=True).zscore()).take(count=OWN),
    "MostActive": MostActive(count=OWN),
    "RandomNeurons": RandomNeurons(count=OWN),
}
DRAWN = ("CAS", "MAD", "MAD signed", "LAPE", "LAP", "AveragePrecision", "CRFusion", "RandomNeurons")


def made(setting: Setting, seed: int, folder: Path) -> tuple[GroupedItems, dict[str, NeuronSet]]:
    """Questions with known neurons. Probabilities vary from question to question by 0.5 on the logit scale."""
    rng = np.random.default_rng(seed)
    size = WIDTH * LAYERS
    names = [f"group {g}" for g in range(GROUPS)]
    rate = np.tile(rng.beta(0.5, 2.0, size).clip(0.002, 0.95), (GROUPS, 1))
    free = rng.permutation(size).tolist()
    truth = {}
    for g in range(GROUPS):
        own = [free.pop() for _ in range(OWN)]
        base = rng.uniform(0.02, 0.4, OWN)
        rate[:, own] = base
        rate[g, own] = base + setting.strength
        rate[(g + 1) % GROUPS, own] = base + setting.likeness * setting.strength
        truth[names[g]] = own
    for kind in setting.decoys:
        for neuron in (free.pop() for _ in range(PER_KIND)):
            first = int(rng.integers(GROUPS))
            if kind == "always":
                rate[:, neuron] = 0.97
            elif kind == "shared":
                rate[:, neuron] = rng.uniform(0.02, 0.4)
                rate[[first, (first + 3) % GROUPS], neuron] += setting.strength
            else:
                rate[:, neuron] = 0.0
                rate[first, neuron] = 0.01
    counts = np.geomspace(setting.questions / setting.imbalance, setting.questions, GROUPS).round().astype(int)
    owner = np.repeat(np.arange(GROUPS), np.maximum(2, counts))
    logit = np.log(rate.clip(1e-9, 1 - 1e-9) / (1 - rate.clip(1e-9, 1 - 1e-9)))[owner]
    positive = rng.binomial(TOKENS, 1 / (1 + np.exp(-logit - 0.5 * rng.normal(size=logit.shape))))
    # What a neuron's value is where it fires differs from neuron to neuron; where it does not, it is a little below 0.
    total = positive * rng.gamma(2.0, 0.5, size) - 0.05 * (TOKENS - positive)
    space = NeuronSpace.from_widths("language", "gate", [WIDTH] * LAYERS)
    items = [Item(str(n), names[g], 0, {}) for n, g in enumerate(owner)]
    recording = ItemStatistics.create(folder, space, items, {}, ["positive", "total"])
    tables = {"positive": positive, "total": total}
    recording.write(range(len(items)), [0] * len(items), [TOKENS] * len(items), [0.0] * len(items), tables)
    return recording.grouped(), {group: NeuronSet(space, own) for group, own in truth.items()}


def scored(rule: Selector, evidence: Any, truth: Mapping[str, NeuronSet]) -> tuple[float, float]:
    """Precision (of the groups that were given neurons) and recall, averaged over groups."""
    chosen = rule.select(evidence)
    hits = {group: len(chosen[group] & truth[group]) for group in truth}
    precision = [hits[group] / len(chosen[group]) for group in truth if len(chosen[group])]
    return float(np.mean(precision or [0.0])), float(np.mean([hits[group] / len(truth[group]) for group in truth]))


def evidence_of(name: str, pool: GroupedItems) -> Any:
    """What a rule selects from: for rules over conditions, every other question is of the other condition."""
    if name not in ("CRFusion", "Overlap"):
        return pool
    place = np.concatenate([np.arange(n) for n in np.bincount(pool.owner)])
    return Conditions({name: pool.taken(np.flatnonzero(place % 2 == n)).statistics for n, name in enumerate("ab")})


def sweep(name: str, seeds: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """For each value of a setting, each rule's precision and recall: ``[seed, 2]``."""
    for label, setting in SWEEPS[name][1]:
        results: dict[str, list[tuple[float, float]]] = {rule: [] for rule in RULES}
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                pool, truth = made(setting, seed, Path(folder) / "items")
                for rule, selector in RULES.items():
                    results[rule].append(scored(selector, evidence_of(rule, pool), truth))
        yield label, {rule: np.array(values) for rule, values in results.items()}


def on_a_model() -> dict[str, tuple[float, float]]:
    """Precision and recall on a model with planted neurons, every kind of decoy, four questions a group."""
    import vlmneurons as vn
    from vlmneurons.testing import plant_neurons

    decoys = ("always", "shared", "graded", "rare")
    planted = plant_neurons(per_group=5, per_kind=12, decoys=decoys, n_questions=4, layers=3, width=128, seed=1)
    model, questions, truth = planted.model, planted.questions, dict(planted.truth)
    rules = {
        name: RULES[name].take(count=5)
        for name in ("CAS", "MAD", "MAD signed", "LAPE", "LAP", "AveragePrecision", "MostActive", "RandomNeurons")
    }
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        items = vn.record_items(
            model, questions, Path(folder) / "items", magnitudes=True, batch_size=16, progress=False
        )
        results = {name: scored(rule, items, truth) for name, rule in rules.items()}
    for method, rule in (("gradient", Attribution), ("integrated", IntegratedGradients)):
        given = vn.attribute(model, questions, method=method, steps=4, progress=False)
        results[rule.__name__] = scored(rule(count=5), given, truth)
        results[f"{rule.__name__}, others"] = scored(rule(count=5, others=True), given, truth)
    return results


def cell(values: np.ndarray) -> str:
    """Recall, and precision where it differs."""
    precision, recall = values.mean(0)
    return f"{recall:.2f}" if abs(precision - recall) < 0.005 else f"{recall:.2f} ({precision:.2f})"


Results = Mapping[str, list[tuple[str, dict[str, np.ndarray]]]]
"""For each sweep and value each rule's precision and recall, ``[seed, 2]``."""


def tables(results: Results, planted: Mapping[str, tuple[float, float]]) -> str:
    """The tables as Markdown."""
    lines = []
    for name, columns in results.items():
        lines += [
            f"**{SWEEPS[name][0]}**".replace("\n", " "),
            "",
            "| selector | " + " | ".join(label for label, _ in columns) + " |",
        ]
        lines += ["|---|" + "---|" * len(columns)]
        for rule in RULES:
            lines.append(f"| {rule} | " + " | ".join(cell(values[rule]) for _, values in columns) + " |")
        lines.append("")
    lines += ["**A model with planted neurons**", "", "| selector | precision | recall |", "|---|---|---|"]
    lines += [f"| {rule} | {precision:.2f} | {recall:.2f} |" for rule, (precision, recall) in planted.items()]
    return "\n".join(lines)


def picture(results: Results) -> Figure:
    """Recall against each setting: mean over seeds, with its standard error."""
    colours = ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#999999")
    markers = "osD^vPX."
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots(1, len(results), sharey=True, width_ratios=[5, 5, 3.4, 3.4, 5])
    for axis, (name, columns) in zip(axes, results.items(), strict=True):
        places = np.arange(len(columns))
        for number, (rule, colour, marker) in enumerate(zip(DRAWN, colours, markers, strict=True)):
            values = np.stack([of_rule[rule][:, 1] for _, of_rule in columns])
            error = values.std(1, ddof=1) / np.sqrt(values.shape[1]) if values.shape[1] > 1 else None
            shift = 0.035 * (number - len(DRAWN) / 2)
            line = "none" if name == "decoys" else "-"
            axis.errorbar(
                places + shift, values.mean(1), error, color=colour, marker=marker, ms=4, lw=1.2, ls=line, label=rule
            )
        axis.set_xticks(places, [label for label, _ in columns], fontsize=8)
        axis.set_xlabel(SWEEPS[name][0], fontsize=9)
        axis.set_ylim(-0.03, 1.03)
        axis.grid(axis="y", lw=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("Recall of the groups' own neurons", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(DRAWN), fontsize=8, frameon=False)
    return figure


def main() -> None:
    """Print the tables, and write them where they are shown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="also write docs/selectors.md and its picture")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: list(sweep(name, options.seeds)) for name in SWEEPS}
    text = tables(results, on_a_model())
    print(text)
    if options.write:
        page = (DOCS / "selectors.md").read_text(encoding="utf-8")
        before, rest = page.split("<!-- printed -->\n", 1)
        after = rest.split("<!-- /printed -->", 1)[1]
        page = f"{before}<!-- printed -->\n\n{text}\n\n<!-- /printed -->{after}"
        (DOCS / "selectors.md").write_text(page, encoding="utf-8")
        picture(results).savefig(DOCS / "selector_recovery.png", dpi=200)


if __name__ == "__main__":
    main()
