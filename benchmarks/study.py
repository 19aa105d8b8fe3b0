"""What a study of 25 groups and 4 selectors costs, and how exact it is, when each question meets k other masks.

    python benchmarks/study.py [--pictures 12] [--questions 2] [--rounds 2] [--batch 16] [--layers 6] [--width 1024]

A model is planted with neurons of 25 groups; CAS, MAD, LAP and random neurons are selected from a recording of it, and
their 100 masks switched off one by one on other questions about other pictures. What is timed is the whole of
`vlmneurons.knockout` in a folder of its own: pictures and prompts are encoded, the vision tower and the clean run are
computed, answers are kept batch by batch, and tables, intervals and tests are written in the end. The second table
says which part of it the model took.

Then the answers are compared with those of the full crossing: self effects must rest on the same answers. The last
table holds standard errors by picture of self effect, cross effect and gap over k, of single groups (the median over
the 25) and of the mean over groups, in points and in nats; each number is the mean over draws of the plan from the full
crossing's answers.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import measure
import numpy as np
import torch

import vlmneurons as vn
from vlmneurons.study.design import crossing
from vlmneurons.study.effects import estimates, question_effects
from vlmneurons.testing import PlantedModel, plant_neurons

GROUPS = tuple(f"Land{number}" for number in range(25))
EFFECTS = ("self", "cross", "gap")
SHARE = 0.2
"""Of the full crossing's CPU time, what k = 2 may take."""


def planted_model(layers: int, width: int, pictures: int) -> PlantedModel:
    """A model that knows 25 groups, with as many questions of each as identification and evaluation need pictures."""
    return plant_neurons(groups=GROUPS, layers=layers, width=width, n_questions=8 + pictures, per_kind=24)


def evaluated(questions: vn.QuestionSet, pictures: int, per_picture: int) -> vn.QuestionSet:
    """Some questions about each of a group's last pictures; options differ, so that they are not one question."""
    asked = []
    for group in questions.groups:
        for item in [one for one in questions if one.group == group][-pictures:]:
            generator = np.random.default_rng(len(asked))
            for number in range(per_picture):
                wrong = generator.choice([name for name in GROUPS if name != group], 3, replace=False).tolist()
                place = int(generator.integers(4))
                options = (*wrong[:place], group, *wrong[place:])
                asked.append(replace(item, id=f"{item.id} {number}", options=options, answer=place))
    return vn.QuestionSet(asked, answer=questions.answer)


def masks_of(planted: PlantedModel, identify: vn.QuestionSet, size: int) -> dict[str, vn.Selection]:
    """Four selectors' masks of all groups."""
    stats = vn.record(planted.model, identify, condition="all", batch_size=16, progress=False)
    rules = {"CAS": vn.CAS, "MAD": vn.MAD, "LAP": vn.LAP}
    masks = {name: rule(count=size).select(stats) for name, rule in rules.items()}
    return {**masks, "random": vn.RandomNeurons(count=size).select(stats)}


def errors_over_k(result: vn.KnockoutResult, asked: vn.QuestionSet, k: int | None, draws: int) -> np.ndarray:
    """``[value, effect, one group or all]`` standard errors by picture of the first selector's effects."""
    names = sorted(set(result.groups))
    rows = [n for n, mask in enumerate(result.masks) if mask.selector == result.masks[0].selector]
    masks = [result.masks[row] for row in rows]
    group = np.array(result.groups)
    members = [np.flatnonzero(group == name) for name in names]
    _, cluster = np.unique(np.array(result.pictures), return_inverse=True)
    right = (result.chosen == result.answers).astype(float)
    found = []
    for seed in range(draws if k else 1):
        meets = crossing(asked, masks, others=k, seed=seed).meets
        one = []
        for values, unit in ((right, 100.0), (result.margins, 1.0)):
            change = np.where(meets, values[[row + 1 for row in rows]] - values[0], np.nan)
            effects = question_effects(change, [mask.group for mask in masks], result.groups)
            error = np.sqrt(estimates(effects, members, cluster).variance) * unit
            one.append(np.stack([np.median(error[:, :-1], axis=1), error[:, -1]], axis=1))
        found.append(one)
    return np.mean(found, axis=0)


def print_errors(title: str, result: vn.KnockoutResult, asked: vn.QuestionSet, draws: int) -> None:
    """Print standard errors over k."""
    most = len(set(result.groups)) - 1
    print(f"\nstandard errors of {result.masks[0].selector} on {title}, by picture; mean of {draws} plans")
    heads = [f"{name}{of}" for of in ("", " all") for name in EFFECTS]
    print(f"{'k':>4} {'runs':>5} " + "".join(f"{head:>11}" for head in [f"{h} pts" for h in heads] + heads))
    for k in (1, 2, 3, 5, None):
        if k is None or k < most:
            table = errors_over_k(result, asked, k, draws)
            numbers = [table[value, effect, of] for value in (0, 1) for of in (0, 1) for effect in range(3)]
            print(f"{k or 'all':>4} {2 + (k or most):>5} " + "".join(f"{number:>11.4f}" for number in numbers))


class Timed:
    """A study that is run again and again, in a new folder each time."""

    def __init__(self, model: vn.VLM, asked: vn.QuestionSet, masks: dict[str, vn.Selection], batch: int) -> None:
        self.model, self.asked, self.masks, self.batch = model, asked, masks, batch
        self.results: dict[int | None, vn.KnockoutResult] = {}

    def run(self, others: int | None) -> None:
        """The whole command."""
        with tempfile.TemporaryDirectory() as folder:
            self.results[others] = vn.knockout(
                self.model,
                self.asked,
                self.masks,
                others=others,
                batch_size=self.batch,
                folder=Path(folder) / "run",
                progress=False,
            )

    def in_memory(self, others: int | None) -> float:
        """CPU seconds without a folder: no tables, no tests."""
        start = time.process_time()
        vn.knockout(self.model, self.asked, self.masks, others=others, batch_size=self.batch, progress=False)
        return time.process_time() - start


def compare(full: vn.KnockoutResult, part: vn.KnockoutResult) -> tuple[int, int, float]:
    """Answers under a question's own mask and clean, how many differ, and by how many nats at most."""
    assert full.ids == part.ids
    own = np.array([[mask.group == group for group in full.groups] for mask in full.masks])
    own = np.concatenate([np.ones((1, len(full.ids)), dtype=bool), own])
    assert part.asked is not None
    assert part.asked[own].all()
    differ = (full.chosen != part.chosen)[own]
    return int(own.sum()), int(differ.sum()), float(np.abs(full.margins - part.margins)[own].max())


def main() -> None:
    """Print the tables; fail where k = 2 costs too much or self effects differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"pictures": 12, "questions": 2, "rounds": 2, "batch": 16, "layers": 6, "width": 1024}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--draws", type=int, default=20, help="plans that a standard error is the mean over")
    parser.add_argument("--device")
    options = parser.parse_args()
    device = measure.device_of(options.device)
    print(measure.about(device))
    planted = planted_model(options.layers, options.width, options.pictures)
    planted.model.hf.to(device)
    identify = vn.QuestionSet(
        [one for group in GROUPS for one in [q for q in planted.questions if q.group == group][:8]],
        answer=planted.questions.answer,
    )
    asked = evaluated(planted.questions, options.pictures, options.questions)
    study = Timed(planted.model, asked, masks_of(planted, identify, 8), options.batch)
    runs = {None: len(asked) * 101, 2: len(asked) * 13}
    print(
        f"{len(GROUPS)} groups, 4 selectors, {len(asked)} questions of {len(asked) // options.questions} pictures, "
        f"batches of {options.batch}: {runs[None]:,} answers in full, {runs[2]:,} with others=2"
    )
    with torch.inference_mode():
        times = measure.paired(
            lambda: study.run(None),
            {"full (control)": lambda: study.run(None), "others=2": lambda: study.run(2)},
            options.rounds,
            device,
            warm=0,
        )
    measure.ratios(times)
    alone = {others: study.in_memory(others) for others in (None, 2)}
    for others, seconds in alone.items():
        name = "full" if others is None else f"others={others}"
        print(f"{name}: {seconds:.1f} s of CPU without a folder, {1e3 * seconds / runs[others]:.2f} ms an answer")
    print(f"ratio without tables and tests {alone[2] / alone[None]:.3f}")
    n, differ, apart = compare(study.results[None], study.results[2])
    print(f"self effects: of {n} answers {differ} differ; margins at most {apart:.1e} nats apart")
    print_errors("the planted model", study.results[None], asked, options.draws)
    share = statistics.median(variant / base for base, variant in times["others=2"])
    assert differ == 0, differ
    assert apart <= 1e-5, apart
    assert share <= SHARE, share


if __name__ == "__main__":
    main()
