"""What a study of 25 groups and 4 selectors costs, and how exact it is, when each question meets k other masks.

    python benchmarks/study.py [--pictures 12] [--questions 1] [--rounds 2] [--batch 16] [--layers 8] [--width 1024]

A model is planted with neurons of 25 groups; CAS, MAD, LAP and random neurons are selected from a recording of it, and
their 100 masks switched off one by one on questions about other pictures. What is timed is the whole of
`vlmneurons.knockout` in a folder of its own: pictures and prompts are encoded, the vision tower and the clean run are
computed, answers are kept batch by batch, and tables, intervals and tests are written in the end (a small study runs
before, which imports what is imported once, and tries out how the model can be called). Its answers are then
compared with those of the full crossing: self effects must rest on the same ones.

The last tables hold standard errors by picture of self effect, cross effect and gap over k: of CAS on the demo, whose
full crossing is asked once and thinned by plans of each k, and of simulated studies of 25 groups (as in coverage.py).
"""

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import coverage
import measure
import numpy as np
import torch

import vlmneurons as vn
from vlmneurons.study.design import crossing
from vlmneurons.study.effects import estimates, question_effects
from vlmneurons.testing import PlantedModel, plant_neurons

GROUPS = tuple(f"Land{number}" for number in range(25))
OVER = (1, 2, 3, 5, None)
SHARE = 0.2
"""Of the full crossing's CPU time, what k = 2 may take."""


def split(questions: vn.QuestionSet, pictures: int, per_picture: int) -> tuple[vn.QuestionSet, vn.QuestionSet]:
    """Questions to identify neurons on, and some about each of a group's other pictures, with options of their own."""
    first, asked = [], []
    for group in questions.groups:
        own = [one for one in questions if one.group == group]
        first += own[:-pictures]
        for item in own[-pictures:]:
            generator = np.random.default_rng(len(asked))
            for number in range(per_picture):
                wrong = generator.choice([name for name in GROUPS if name != group], 3, replace=False).tolist()
                place = int(generator.integers(4))
                options = (*wrong[:place], group, *wrong[place:])
                asked.append(replace(item, id=f"{item.id} {number}", options=options, answer=place))
    return vn.QuestionSet(first, answer=questions.answer), vn.QuestionSet(asked, answer=questions.answer)


def planted_model(**how: int) -> PlantedModel:
    """A model that knows 25 groups, of the first seed whose pictures it can tell apart."""
    for seed in range(20):
        with contextlib.suppress(vn.VLMNeuronsError):
            return plant_neurons(groups=GROUPS, per_kind=24, seed=seed, **how)
    raise SystemExit("no seed gives a model that tells 25 groups apart")


class Study:
    """Four selectors' masks of 25 groups on a planted model, in a new folder each time."""

    def __init__(self, layers: int, width: int, pictures: int, per_picture: int, batch: int, device: torch.device):
        planted = planted_model(layers=layers, width=width, n_questions=8 + pictures)
        self.model, self.batch = planted.model, batch
        self.model.hf.to(device)
        identify, self.asked = split(planted.questions, pictures, per_picture)
        stats = vn.record(self.model, identify, condition="all", batch_size=16, progress=False)
        rules = {"CAS": vn.CAS, "MAD": vn.MAD, "LAP": vn.LAP, "random": vn.RandomNeurons}
        self.masks = {name: rule(count=8).select(stats) for name, rule in rules.items()}
        self.results: dict[int | None, vn.KnockoutResult] = {}
        few = [next(item for item in self.asked if item.group == group) for group in GROUPS]
        self._run(vn.QuestionSet(few, answer=self.asked.answer), None)

    def _run(self, asked: vn.QuestionSet, others: int | None) -> vn.KnockoutResult:
        with tempfile.TemporaryDirectory() as folder:
            where = Path(folder) / "run"
            how = {"others": others, "batch_size": self.batch, "folder": where, "progress": False}
            return vn.knockout(self.model, asked, self.masks, **how)

    def run(self, others: int | None) -> None:
        """The whole command."""
        self.results[others] = self._run(self.asked, others)

    def compared(self) -> tuple[int, int, float]:
        """Answers clean and under a question's own mask, how many differ, and by how many nats at most."""
        full, part = self.results[None], self.results[2]
        own = np.array([[mask.group == group for group in full.groups] for mask in full.masks])
        own = np.concatenate([np.ones((1, len(full.ids)), dtype=bool), own])
        assert full.ids == part.ids
        assert part.asked is not None
        assert part.asked[own].all()
        differ = (full.chosen != part.chosen)[own]
        return int(own.sum()), int(differ.sum()), float(np.abs(full.margins - part.margins)[own].max())


# -- standard errors over k --------------------------------------------------------------------------------------------


def errors(change: np.ndarray, masks: list[str], groups: list[str], cluster: np.ndarray) -> np.ndarray:
    """``[effect, one group or all]`` standard errors of self effect, cross effect and gap; of one, the median."""
    of = np.array(groups)
    members = [np.flatnonzero(of == name) for name in sorted(set(groups))]
    error = np.sqrt(estimates(question_effects(change, masks, groups), members, cluster).variance)
    return np.stack([np.median(error[:, :-1], axis=1), error[:, -1]], axis=1)


def print_errors(title: str, most: int, found: Callable[[int | None], np.ndarray]) -> None:
    """Print ``found(k)``: ``[value, effect, one group or all]``, in points and nats."""
    print(f"\nstandard errors by picture: {title}", flush=True)
    heads = [f"{name}{of}" for of in ("", " all") for name in coverage.EFFECTS]
    print(f"{'k':>4} {'runs':>5} " + "".join(f"{head:>14}" for head in [f"{h} pts" for h in heads] + heads))
    for k in OVER:
        table = found(k)
        numbers = [table[value, effect, of] for value in (0, 1) for of in (0, 1) for effect in range(3)]
        print(f"{k or 'all':>4} {2 + (k or most):>5} " + "".join(f"{number:>14.4f}" for number in numbers), flush=True)


def on_demo(draws: int) -> None:
    """Errors of CAS at 2 % on the demo: the mean over plans from one full crossing."""
    model, questions = vn.load_demo()
    identify, asked = questions.split(0.5, seed=0)
    chosen = vn.CAS(0.02).select(vn.record(model, identify, batch_size=16, progress=False))
    full = vn.knockout(model, asked, {"CAS": chosen}, batch_size=16, progress=False)
    right = (full.chosen == full.answers).astype(float)
    names = [mask.group for mask in full.masks]
    _, cluster = np.unique(np.array(full.pictures), return_inverse=True)

    def found(k: int | None) -> np.ndarray:
        plans = [crossing(asked, full.masks, others=k, seed=seed).meets for seed in range(draws if k else 1)]
        parts = [
            [
                unit * errors(np.where(meets, values[1:] - values[0], np.nan), names, list(full.groups), cluster)
                for values, unit in ((right, 100), (full.margins, 1))
            ]
            for meets in plans
        ]
        return np.mean(parts, axis=0)

    n_pictures = len(set(full.pictures or ()))
    print_errors(f"CAS (2 %) on the demo, {len(full.ids)} questions of {n_pictures} pictures, 8 groups", 7, found)


def simulated(studies: int) -> None:
    """Errors in simulated studies of 25 groups, whose questions and masks depend on each other as in coverage.py."""

    def found(k: int | None) -> np.ndarray:
        design = coverage.Design(25, 24, "2", k)
        random = np.random.default_rng(0)

        def drawn(value: str) -> Iterator[np.ndarray]:
            for _ in range(studies):
                change, *_ = design.draw(random, value, null=False)
                yield errors(change, design.names, design.groups, design.picture)

        return np.stack([100 * np.mean(list(drawn("correct")), axis=0), np.mean(list(drawn("margin")), axis=0)])

    print_errors(f"{studies} simulated studies, 25 groups of 24 pictures of 2 questions", 24, found)


def main() -> None:
    """Print the tables; fail where k = 2 costs too much or self effects differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"pictures": 12, "questions": 1, "rounds": 2, "batch": 16, "layers": 8, "width": 1024}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--draws", type=int, default=20, help="plans, and simulated studies, that an error is a mean of"
    )
    parser.add_argument("--device")
    given = parser.parse_args()
    device = measure.device_of(given.device)
    print(measure.about(device))
    study = Study(given.layers, given.width, given.pictures, given.questions, given.batch, device)
    print(
        f"planted, {given.layers} layers of {given.width}; 25 groups, 4 selectors, {len(study.asked)} questions, "
        f"{given.questions} a picture, batches of {given.batch}: {101 * len(study.asked):,} answers in full, "
        f"{13 * len(study.asked):,} with others=2",
        flush=True,
    )
    times = measure.paired(lambda: study.run(None), {"others=2": lambda: study.run(2)}, given.rounds, device, warm=0)
    pairs = times["others=2"]
    full, part = zip(*pairs, strict=True)
    ratios = [one / whole for whole, one in pairs]
    print(f"{'':<10} {'CPU s':>9} {'range':>13}   ratio to full, range")
    print(
        f"{'full':<10} {statistics.median(full):>9.2f} {f'{min(full):.2f}–{max(full):.2f}':>13}   (control) 1, "
        f"{min(full) / max(full):.2f}–{max(full) / min(full):.2f}"
    )
    print(
        f"{'others=2':<10} {statistics.median(part):>9.2f} {f'{min(part):.2f}–{max(part):.2f}':>13}   "
        f"{statistics.median(ratios):.3f}, {min(ratios):.3f}–{max(ratios):.3f}"
    )
    n, differ, apart = study.compared()
    print(f"clean and self: of {n:,} answers {differ} differ, margins by at most {apart:.0e} nats", flush=True)
    on_demo(given.draws)
    simulated(given.draws)
    assert differ == 0, differ
    assert apart <= 1e-5, apart
    assert statistics.median(ratios) <= SHARE, ratios


if __name__ == "__main__":
    main()
