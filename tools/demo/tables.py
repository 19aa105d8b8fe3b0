"""Measures a trained demo model and prints what it found: the tables of ``docs/demo.md``.

Selectors are the library's; asking, counting and switching off are `tools.demo.evaluate`. Effects are differences
from the untouched model on the same questions: accuracy in points (percent), and the margin, the log-probability of the
right option minus that of the likeliest wrong one, in nats. *Self* is what a culture's mask costs its own questions;
*cross* what it costs the questions of the seven others; both are means over the eight masks. An interval is the 2.5th
to 97.5th percentile over 1000 paired resamples of the pictured things within each culture, all questions about one
together, since they are not independent of each other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import LlavaNextForConditionalGeneration

from tools.demo.ask import Record
from tools.demo.catalogue import CULTURES
from tools.demo.decoder import Asker
from tools.demo.evaluate import Exam, correct, count, margins, read
from tools.demo.organism import SET_SIZE, Truth
from vlmneurons.neurons.selection import Selection
from vlmneurons.selectors import CAS, LAP, LAPE, MAD, LayerMatchedRandom, Selector
from vlmneurons.statistics.counts import ActivationStatistics

FRACTIONS = (0.005, 0.01, 0.02, 0.05)
RANDOM_SEEDS = 20
CROSS_SEEDS = 3
RESAMPLES = 1000
SELECTORS: dict[str, type[Selector]] = {"LAP": LAP, "LAPE": LAPE, "MAD": MAD, "CAS": CAS}

Report = Callable[[str], None]


@dataclass(frozen=True)
class Halves:
    """The question set in two parts that share no picture."""

    identify: list[Record]
    evaluate: list[Record]


def split(records: Sequence[Record], seed: int = 0) -> Halves:
    """The split that ``questions.split(0.5, seed)`` makes: the library's own."""
    from vlmneurons.questions.question import Question
    from vlmneurons.questions.sets import QuestionSet

    questions = [
        Question(None, record.question, record.options, record.answer, record.group, record.id, {}, record.image_id)
        for record in records
    ]
    first, second = QuestionSet(questions, prompt="open", answer="text").split(0.5, seed=seed)
    by_id = {record.id: record for record in records}
    return Halves([by_id[question.id] for question in first], [by_id[question.id] for question in second])


def _percent(values: torch.Tensor) -> str:
    return f"{100 * values.float().mean().item():.1f}"


def accuracy_tables(
    model: LlavaNextForConditionalGeneration,
    asker: Asker,
    records: Sequence[Record],
    pictures: Mapping[str, Image.Image],
    report: Report,
) -> float:
    """Prints accuracy by culture, by style and for held-out pairs, and the controls; returns the accuracy."""
    exam = Exam.make(model, asker, records, pictures)
    right = correct(exam, read(model, exam))
    report("| culture | questions | accuracy % |\n|---|---|---|")
    for index, culture in enumerate(CULTURES):
        own = exam.groups == index
        report(f"| {culture} | {int(own.sum())} | {_percent(right[own])} |")
    report(f"| all | {len(right)} | {_percent(right)} |\n")

    report("| questions | number | accuracy % |\n|---|---|---|")
    for key in ("style", "pair", "category"):
        values = [str(record.metadata[key]) for record in records]
        for value in dict.fromkeys(values):
            own = torch.tensor([other == value for other in values])
            report(f"| {key}: {value} | {int(own.sum())} | {_percent(right[own])} |")
    report("")

    grey = {name: Image.new("RGB", picture.size, (128, 128, 128)) for name, picture in pictures.items()}
    names = sorted(pictures)
    moved = dict(zip(names, [pictures[name] for name in np.random.default_rng(0).permutation(names)], strict=True))
    turned = [_rotated(record) for record in records]
    controls = {
        "as they are": right,
        "grey picture": _asked(model, asker, records, grey),
        "another question's picture": _asked(model, asker, records, moved),
        "no question": _asked(model, asker, records, pictures, question=""),
        "options in another order": _asked(model, asker, turned, pictures),
    }
    report("| control | accuracy % |\n|---|---|")
    for name, answers in controls.items():
        report(f"| {name} | {_percent(answers)} |")
    report("")
    return right.float().mean().item()


def _asked(
    model: LlavaNextForConditionalGeneration,
    asker: Asker,
    records: Sequence[Record],
    pictures: Mapping[str, Image.Image],
    question: str | None = None,
) -> torch.Tensor:
    exam = Exam.make(model, asker, records, pictures, question=question)
    return correct(exam, read(model, exam))


def _rotated(record: Record) -> Record:
    """The same question with its options moved on by one."""
    fields = {**vars(record), "options": record.options[-1:] + record.options[:-1]}
    return Record(**{**fields, "answer": (record.answer + 1) % len(record.options)})


@dataclass(frozen=True)
class Effects:
    """What the masks of one selection do.

    Attributes:
        change: ``[measure, mask, question]``; measures are accuracy (0, 1) and margin (nats).
        groups: index of each question's culture.
        pictures: for each culture, the questions about each thing pictured.
    """

    change: np.ndarray
    groups: np.ndarray
    pictures: list[list[np.ndarray]]

    def _own(self) -> np.ndarray:
        return self.groups[None] == np.arange(len(CULTURES))[:, None]

    def self_effects(self) -> np.ndarray:
        """``[measure, culture]``: mean change of a culture's own questions under its mask."""
        return _masked_mean(self.change, self._own())

    def cross_effects(self) -> np.ndarray:
        """``[measure, culture]``: mean change of all other cultures' questions under a culture's mask."""
        return _masked_mean(self.change, ~self._own())

    def intervals(self) -> tuple[np.ndarray, np.ndarray]:
        """Bootstrap intervals of the mean self and cross effect: ``[low/high, measure]`` each."""
        generator = np.random.default_rng(0)
        drawn: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for _ in range(RESAMPLES):
            picks = [(part, generator.integers(len(part), size=len(part))) for part in self.pictures]
            chosen = np.concatenate([part[pick] for part, drawn_here in picks for pick in drawn_here])
            resample = Effects(self.change[:, :, chosen], self.groups[chosen], self.pictures)
            drawn[0].append(resample.self_effects().mean(axis=1))
            drawn[1].append(resample.cross_effects().mean(axis=1))
        low_high = [np.percentile(np.array(part), [2.5, 97.5], axis=0) for part in drawn]
        return low_high[0], low_high[1]


def _masked_mean(change: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return (change * wanted).sum(axis=2) / wanted.sum(axis=1)


def _by_picture(exam: Exam) -> list[list[np.ndarray]]:
    """For each culture, the positions of the questions about each thing pictured."""
    found: list[dict[str, list[int]]] = [{} for _ in CULTURES]
    for position, (record, group) in enumerate(zip(exam.records, exam.groups.tolist(), strict=True)):
        found[group].setdefault(record.image_id, []).append(position)
    return [[np.array(positions) for positions in things.values()] for things in found]


class Bench:
    """A model with its evaluation questions: measures selections."""

    def __init__(self, model: LlavaNextForConditionalGeneration, exam: Exam) -> None:
        self.model, self.exam = model, exam
        self.clean = self._measure(exam, None)
        self.pictures = _by_picture(exam)
        self.own = [exam.only(index) for index in range(len(CULTURES))]
        self.own_clean = [self._measure(part, None) for part in self.own]

    def _measure(self, exam: Exam, off: torch.Tensor | None) -> np.ndarray:
        scores = read(self.model, exam, off)
        return torch.stack([correct(exam, scores).float(), margins(exam, scores)]).double().numpy()

    def effects(self, selection: Selection) -> Effects:
        """Every mask on every question."""
        change = [self._measure(self.exam, selection[culture].indices) - self.clean for culture in CULTURES]
        return Effects(np.stack(change, axis=1), self.exam.groups.numpy(), self.pictures)

    def self_effects(self, selection: Selection) -> np.ndarray:
        """``[measure, culture]``: every mask on its own culture's questions only."""
        pairs = zip(CULTURES, self.own, self.own_clean, strict=True)
        return np.stack(
            [(self._measure(part, selection[c].indices) - clean).mean(axis=1) for c, part, clean in pairs], axis=1
        )


def effect_tables(
    model: LlavaNextForConditionalGeneration,
    asker: Asker,
    halves: Halves,
    pictures: Mapping[str, Image.Image],
    truth: Truth | None,
    report: Report,
) -> None:
    """Prints what every selector's masks cost, beside layer-matched random masks.

    Args:
        model: the model.
        asker: its tokenizer.
        halves: neurons are found on one half and judged on the other.
        pictures: by name.
        truth: the organism's planted neurons.
        report: gets the lines.
    """
    stats = count(model, Exam.make(model, asker, halves.identify, pictures))
    bench = Bench(model, Exam.make(model, asker, halves.evaluate, pictures))
    report(
        f"Identification: {', '.join(f'{c} {n}' for c, n in zip(stats.groups, stats.items.tolist()))} correct items."
    )
    report(
        f"Evaluation: {len(halves.evaluate)} questions, {100 * bench.clean[0].mean():.1f} % right, "
        f"mean margin {bench.clean[1].mean():.2f} nats.\n"
    )
    if truth is not None:
        _truth_table(stats, truth, bench, report)
    report("| r % | neurons | selector | self, points | cross, points | self, nats | cross, nats | own worst |")
    report("|---|---|---|---|---|---|---|---|")
    for fraction in FRACTIONS:
        like = None
        for name, selector in SELECTORS.items():
            selection = selector(fraction).select(stats)
            like = selection if name == "CAS" else like
            _effect_row(100 * fraction, name, selection, bench, report)
        assert like is not None
        _random_row(100 * fraction, like, stats, bench, report)
    report("")
    report(f"| culture, CAS at r = {100 * FRACTIONS[-1]:.0f} % | " + " | ".join(CULTURES) + " |")
    report("|---" * (len(CULTURES) + 1) + "|")
    effects = bench.effects(CAS(FRACTIONS[-1]).select(stats))
    own, cross = effects.self_effects(), effects.cross_effects()
    for label, values, digits in (
        ("self, points", 100 * own[0], 1),
        ("cross, points", 100 * cross[0], 1),
        ("self, nats", own[1], 2),
        ("cross, nats", cross[1], 2),
    ):
        report(f"| {label} | " + " | ".join(f"{value:+.{digits}f}" for value in values) + " |")
    report("")


def _effect_row(percent: float, name: str, selection: Selection, bench: Bench, report: Report) -> None:
    effects = bench.effects(selection)
    own, cross = effects.self_effects(), effects.cross_effects()
    own_interval, cross_interval = effects.intervals()
    cells = []
    for measure, (unit, digits) in enumerate(((100, 1), (1, 2))):
        for values, interval in ((own, own_interval), (cross, cross_interval)):
            low, high = unit * interval[:, measure]
            cells.append(f"{unit * values[measure].mean():+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]")
    worse = " / ".join(f"{int((own[measure] < cross[measure]).sum())}" for measure in (0, 1))
    sizes = sorted({len(neurons) for neurons in selection.values()})
    size = f"{sizes[0]}–{sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
    report(f"| {percent:g} | {size} | {name} | {' | '.join(cells)} | {worse} |")


def _random_row(percent: float, like: Selection, stats: ActivationStatistics, bench: Bench, report: Report) -> None:
    own, cross = [], []
    for seed in range(RANDOM_SEEDS):
        selection = LayerMatchedRandom(like, seed=seed).select(stats)
        own.append(bench.self_effects(selection).mean(axis=1))
        if seed < CROSS_SEEDS:  # eight times as much work, and no more informative
            cross.append(bench.effects(selection).cross_effects().mean(axis=1))
    cells = []
    for measure, (unit, digits) in enumerate(((100, 1), (1, 2))):
        for drawn in (own, cross):
            values = unit * np.array(drawn)[:, measure]
            cells.append(f"{values.mean():+.{digits}f} ({values.min():+.{digits}f} … {values.max():+.{digits}f})")
    report(f"| {percent:g} | as CAS | random | {' | '.join(cells)} | |")


def recovery(selection: Selection, truth: Truth) -> tuple[float, float]:
    """Precision and recall of a selection against the planted neurons, over all cultures together (0 to 1)."""
    width = selection.space.widths[0]
    planted = {culture: set(row.tolist()) for culture, row in zip(CULTURES, truth.flat(width), strict=True)}
    hits = sum(len(planted[culture] & set(selection[culture].indices.tolist())) for culture in CULTURES)
    chosen = sum(len(selection[culture]) for culture in CULTURES)
    return hits / max(1, chosen), hits / sum(map(len, planted.values()))


def _truth_table(stats: ActivationStatistics, truth: Truth, bench: Bench, report: Report) -> None:
    """The planted sets themselves, and each selector at their size: found how many, at what cost."""
    from vlmneurons.neurons.sets import NeuronSet

    report(
        f"| {SET_SIZE} neurons each | precision | recall | self, points | cross, points | self, nats | cross, nats |"
    )
    report("|---|---|---|---|---|---|---|")
    width = stats.space.widths[0]
    planted = Selection(
        {c: NeuronSet(stats.space, row) for c, row in zip(CULTURES, truth.flat(width), strict=True)}, selector="truth"
    )
    candidates = {"truth": planted}
    candidates |= {name: selector(count=SET_SIZE).select(stats) for name, selector in SELECTORS.items()}
    for name, selection in candidates.items():
        precision, recall = recovery(selection, truth)
        effects = bench.effects(selection)
        own, cross = effects.self_effects().mean(axis=1), effects.cross_effects().mean(axis=1)
        report(
            f"| {name} | {precision:.3f} | {recall:.3f} | {100 * own[0]:+.1f} | {100 * cross[0]:+.1f} "
            f"| {own[1]:+.2f} | {cross[1]:+.2f} |"
        )
    report("")
