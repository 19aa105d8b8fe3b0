"""The study: switch off each group's neurons in turn, and see which questions are harmed.

`knockout` asks every question once with the model as it is, and once under every mask (a set of neurons set to zero),
and keeps every single answer. All effects are computed from those answers: for mask ``m`` and questions of group ``e``

    delta[m, e] = accuracy under mask m - clean accuracy, on the questions of e (in points of 0 to 1)
    self effect       SE(c)  = delta[c, c]
    cross effect      ACE(c) = mean of delta[m, c] over m != c   (what the other masks do to c)
    cross caused             = mean of delta[c, e] over e != c   (what mask c does to the others)
    gap                      = SE - ACE

A selective set of neurons has a self effect far below zero and a cross effect near it.

Source: Zhao et al. 2025 (arXiv 2510.24942), Zhao et al. 2026 (arXiv 2601.03115, arXiv 2608.08772).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy import stats as scipy_stats
from tqdm.auto import tqdm

from vlmneurons.ablation import Ablation
from vlmneurons.answers import AnswerReader, Reading, reader_of
from vlmneurons.errors import FileFormatError, MismatchError, QuestionError
from vlmneurons.masked import read_masked
from vlmneurons.model import VLM
from vlmneurons.neurons import NeuronSet, Selection
from vlmneurons.questions import Question, QuestionSet
from vlmneurons.recording import _provenance, _rule_name, batches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Masks = Mapping[str, "Selection | NeuronSet | Sequence[Selection | NeuronSet]"]

_VERSION = 1


@dataclass(frozen=True)
class Mask:
    """One set of neurons that was switched off.

    Attributes:
        selector: name under which the mask was given.
        repeat: number of the selection among several given under one name, such as the seeds of a random control.
        group: the group that the neurons were selected for; ``"all"`` for a set that is not of a group.
        size: number of neurons.
    """

    selector: str
    repeat: int
    group: str
    size: int


@dataclass(frozen=True, eq=False)
class KnockoutResult:
    """Every answer to every question, clean and under every mask, and the effects computed from them.

    Attributes:
        ids: ids of the questions.
        groups: group of each question.
        answers: index of the right option of each question.
        masks: what was switched off.
        chosen: ``[1 + mask, question]`` index of the chosen option, row 0 clean; -1 where a generated text names none.
        margins: ``[1 + mask, question]`` log-probability of the right option less that of the best other one, in nats;
            NaN for generated answers.
        provenance: model, revision, rules, versions.
    """

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    answers: np.ndarray
    masks: tuple[Mask, ...]
    chosen: np.ndarray
    margins: np.ndarray
    provenance: Mapping[str, Any] = field(default_factory=dict)

    # -- what there is -------------------------------------------------------------------------------------------------

    @property
    def group_names(self) -> tuple[str, ...]:
        """Groups of the questions, sorted."""
        return tuple(sorted(set(self.groups)))

    @property
    def selectors(self) -> tuple[str, ...]:
        """Names under which masks were given, in their order."""
        return tuple(dict.fromkeys(mask.selector for mask in self.masks))

    @property
    def correct(self) -> np.ndarray:
        """``[1 + mask, question]`` whether the answer is right, row 0 clean."""
        return self.chosen == self.answers

    def _of(self, selector: str) -> list[int]:
        rows = [row for row, mask in enumerate(self.masks, start=1) if mask.selector == selector]
        if not rows:
            raise MismatchError(f"there is no selector {selector!r} here; there are {', '.join(self.selectors)}")
        return rows

    @property
    def accuracy(self) -> dict[str, float]:
        """Clean accuracy of each group."""
        groups = np.array(self.groups)
        return {name: float(self.correct[0][groups == name].mean()) for name in self.group_names}

    # -- tables --------------------------------------------------------------------------------------------------------

    def table(self) -> pd.DataFrame:
        """One row for each mask and each group of questions.

        Columns: ``selector``, ``repeat``, ``mask`` (the group whose neurons were off), ``group`` (of the questions),
        ``neurons``, ``n`` (questions), ``clean`` and ``ablated`` (accuracy), ``delta``, ``flips`` (share of answers
        that changed), ``right_to_wrong``, ``wrong_to_right``, ``wrong_to_wrong`` (their shares), ``failures`` (share of
        ablated answers that could not be parsed), ``margin`` (mean change of the log-probability margin, nats).
        """
        groups = np.array(self.groups)
        clean = self.correct[0]
        rows = []
        for row, mask in enumerate(self.masks, start=1):
            right, flipped = self.correct[row], self.chosen[row] != self.chosen[0]
            change = self.margins[row] - self.margins[0]
            for name in self.group_names:
                here = groups == name
                rows.append(
                    {
                        "selector": mask.selector,
                        "repeat": mask.repeat,
                        "mask": mask.group,
                        "group": name,
                        "neurons": mask.size,
                        "n": int(here.sum()),
                        "clean": clean[here].mean(),
                        "ablated": right[here].mean(),
                        "delta": right[here].mean() - clean[here].mean(),
                        "flips": flipped[here].mean(),
                        "right_to_wrong": (flipped & clean & ~right)[here].mean(),
                        "wrong_to_right": (flipped & ~clean & right)[here].mean(),
                        "wrong_to_wrong": (flipped & ~clean & ~right)[here].mean(),
                        "failures": (self.chosen[row][here] < 0).mean(),
                        "margin": change[here].mean(),
                    }
                )
        return pd.DataFrame(rows)

    def matrix(self, selector: str, *, value: str = "delta") -> pd.DataFrame:
        """Effects of one selector: rows are masks, columns groups of questions; repeats are averaged.

        Args:
            selector: which one.
            value: any numeric column of `table`.
        """
        self._of(selector)
        table = self.table()
        columns = [name for name in table.columns if name not in ("selector", "repeat", "mask", "group")]
        if value not in columns:
            raise MismatchError(f"value {value!r} is not a numeric column of the table; it has {', '.join(columns)}")
        table = table[table["selector"] == selector]
        return table.groupby(["mask", "group"])[value].mean().unstack("group")

    def summary(self, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
        """Self effect, cross effects and gap of each selector, per group and over all groups (``group == "all"``).

        Columns: ``selector``, ``group``, ``n``, ``clean``, ``self_effect`` (SE), ``cross_effect`` (ACE: other masks on
        this group), ``cross_caused`` (this mask on other groups), ``gap`` (SE - ACE), each followed by ``_low`` and
        ``_high``, the bounds of its paired bootstrap interval over questions (resampled within groups; repeats of a
        random control are averaged, so the interval is about questions, not seeds); ``self_margin`` and
        ``cross_margin``, the same effects on the log-probability margin (nats); ``flips``; ``p``, of McNemar's exact
        test of the self effect (NaN over all groups and where there are repeats), and ``p_holm``, corrected over the
        groups.

        Args:
            confidence: level of the intervals.
            resamples: number of bootstrap resamples.
            seed: seed of the resampling.
        """
        if not 0 < confidence < 1:
            raise MismatchError(f"confidence {confidence} is outside (0, 1)")
        names = list(self.group_names)
        groups = np.array(self.groups)
        generator = np.random.default_rng(seed)
        members = [np.flatnonzero(groups == name) for name in names]
        weights = [
            generator.multinomial(len(own), np.full(len(own), 1 / len(own)), resamples) / len(own) for own in members
        ]
        rows: list[dict[str, Any]] = []
        for selector in self.selectors:
            of = self._of(selector)
            masked = [name for name in names if any(self.masks[row - 1].group == name for row in of)]
            if not masked:  # a set that is of no group has no self effect
                continue
            change = self.correct.astype(float) - self.correct[0]
            margin = self.margins - self.margins[0]
            flips = (self.chosen != self.chosen[0]).astype(float)

            def averaged(values: np.ndarray, of: list[int] = of, masked: list[str] = masked) -> np.ndarray:
                """``[mask, question]``, repeats averaged."""
                return np.stack(
                    [values[[row for row in of if self.masks[row - 1].group == name]].mean(0) for name in masked]
                )

            change, margin, flips = averaged(change), averaged(margin), averaged(flips)
            delta = np.stack([change[:, own].mean(1) for own in members], 1)  # [mask, group]
            drawn = np.stack([weight @ change[:, own].T for own, weight in zip(members, weights, strict=True)], 2)
            margins = np.stack([margin[:, own].mean(1) for own in members], 1)
            flipped = np.stack([flips[:, own].mean(1) for own in members], 1)
            column = [names.index(name) for name in masked]
            effects = _effects(delta, column)
            spread = _effects(drawn, column)
            margin_effects = _effects(margins, column)
            tail = 50 * (1 - confidence)
            pvalues = []
            for place, name in enumerate(masked):
                own = members[column[place]]
                ours = [row for row in of if self.masks[row - 1].group == name]
                pvalues.append(_mcnemar(self.correct[0][own], self.correct[ours[0]][own]) if len(ours) == 1 else np.nan)
            corrected = holm(pvalues)
            for place, name in enumerate([*masked, "all"]):
                overall = name == "all"
                own = np.arange(len(groups)) if overall else members[column[place]]
                entry: dict[str, Any] = {
                    "selector": selector,
                    "group": name,
                    "n": len(own),
                    "clean": float(
                        np.mean([self.correct[0][members[c]].mean() for c in column])
                        if overall
                        else self.correct[0][own].mean()
                    ),
                }
                for effect in ("self_effect", "cross_effect", "cross_caused", "gap"):
                    value, draws = effects[effect], spread[effect]
                    value = value.mean() if overall else value[place]
                    draws = draws.mean(-1) if overall else draws[:, place]
                    entry[effect] = float(value)
                    entry[f"{effect}_low"], entry[f"{effect}_high"] = np.percentile(draws, [tail, 100 - tail])
                for effect, label in (("self_effect", "self_margin"), ("cross_effect", "cross_margin")):
                    value = margin_effects[effect]
                    entry[label] = float(value.mean() if overall else value[place])
                own_flips = flipped[range(len(masked)), column]
                entry["flips"] = float(own_flips.mean() if overall else own_flips[place])
                entry["p"] = np.nan if overall else pvalues[place]
                entry["p_holm"] = np.nan if overall else corrected[place]
                rows.append(entry)
        return pd.DataFrame(rows)

    def plot_matrix(self, selector: str | None = None, *, value: str = "delta") -> "Figure":
        """A heat map of `matrix`, masks by groups of questions; see `vlmneurons.plots.plot_matrix`."""
        from vlmneurons.plots import plot_matrix

        return plot_matrix(self, selector, value=value)

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write every answer (``answers.safetensors``, ``knockout.json``) and the tables (CSV) into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {
                "answers": torch.from_numpy(np.ascontiguousarray(self.answers)),
                "chosen": torch.from_numpy(np.ascontiguousarray(self.chosen)),
                "margins": torch.from_numpy(np.ascontiguousarray(self.margins)),
            },
            folder / "answers.safetensors",
        )
        about = {
            "kind": "vlmneurons knockout",
            "version": _VERSION,
            "ids": self.ids,
            "groups": self.groups,
            "masks": [vars(mask) for mask in self.masks],
            "provenance": self.provenance,
        }
        (folder / "knockout.json").write_text(json.dumps(about, indent=1, default=str), encoding="utf-8")
        self.table().to_csv(folder / "table.csv", index=False)
        self.summary().to_csv(folder / "summary.csv", index=False)

    @classmethod
    def load(cls, folder: str | Path) -> "KnockoutResult":
        """What `save` wrote.

        Raises:
            FileFormatError: the files are damaged, of another kind, or do not fit together.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / "knockout.json").read_text(encoding="utf-8"))
            if about["kind"] != "vlmneurons knockout" or about["version"] != _VERSION:
                raise ValueError(f"kind {about['kind']!r}, version {about['version']!r}")
            tensors = load_file(folder / "answers.safetensors")
            masks = tuple(
                Mask(str(m["selector"]), int(m["repeat"]), str(m["group"]), int(m["size"])) for m in about["masks"]
            )
            result = cls(
                tuple(map(str, about["ids"])),
                tuple(map(str, about["groups"])),
                tensors["answers"].numpy(),
                masks,
                tensors["chosen"].numpy(),
                tensors["margins"].numpy(),
                dict(about["provenance"]),
            )
        except (OSError, KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
            raise FileFormatError(f"{folder} does not hold a knockout result: {error}") from error
        shape = (1 + len(masks), len(result.ids))
        if result.chosen.shape != shape or result.margins.shape != shape:
            raise FileFormatError(f"{folder}: answers of shape {result.chosen.shape} where the index says {shape}")
        if len(result.groups) != len(result.ids) or result.answers.shape != (len(result.ids),):
            raise FileFormatError(f"{folder}: {len(result.ids)} questions with {len(result.groups)} groups")
        return result

    def __repr__(self) -> str:
        if not self.ids:
            return f"KnockoutResult(no questions, {len(self.masks)} masks of {', '.join(self.selectors)})"
        return (
            f"KnockoutResult({len(self.ids)} questions of {len(self.group_names)} groups, {len(self.masks)} masks of "
            f"{', '.join(self.selectors)}; clean accuracy {self.correct[0].mean():.1%})"
        )


def _effects(delta: np.ndarray, column: Sequence[int]) -> dict[str, np.ndarray]:
    """Effects of each mask from ``delta[..., mask, group]``; mask ``i`` is of the group in column ``column[i]``."""
    n_masks, n_groups = delta.shape[-2:]
    own = delta[..., range(n_masks), column]
    received = np.full(own.shape, np.nan)
    if n_masks > 1:
        received = (delta[..., :, column].sum(-2) - own) / (n_masks - 1)
    caused = np.full(own.shape, np.nan)
    if n_groups > 1:
        caused = (delta.sum(-1) - own) / (n_groups - 1)
    return {"self_effect": own, "cross_effect": received, "cross_caused": caused, "gap": own - received}


def _mcnemar(before: np.ndarray, after: np.ndarray) -> float:
    """Two-sided exact p of McNemar's test: are the answers that turned right as many as those that turned wrong?"""
    worse, better = int((before & ~after).sum()), int((~before & after).sum())
    return 1.0 if worse + better == 0 else float(scipy_stats.binomtest(worse, worse + better).pvalue)


def holm(pvalues: Sequence[float]) -> np.ndarray:
    """P-values corrected by Holm's step-down method, which bounds the chance of any false finding; NaN stay NaN."""
    values = np.asarray(pvalues, dtype=float)
    corrected = np.full(values.shape, np.nan)
    known = np.flatnonzero(~np.isnan(values))
    ordered = known[np.argsort(values[known], kind="stable")]
    steps = values[ordered] * np.arange(len(ordered), 0, -1)
    corrected[ordered] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


def knockout(
    model: VLM,
    questions: QuestionSet | Sequence[Question],
    masks: Masks,
    *,
    batch_size: int = 8,
    answer: str | AnswerReader | None = None,
    mode: str = "zero",
    factor: float | None = None,
    values: Any = None,
    at: str | None = None,
    on_error: str = "raise",
    progress: bool = True,
) -> KnockoutResult:
    """Ask every question with the model as it is and under every mask.

    Args:
        model: the model.
        questions: evaluation questions of at least two groups; they should share no picture with those that the
            neurons were identified on (`QuestionSet.split`).
        masks: what to switch off, by name: a `Selection` (one mask for each of its groups), a list of selections
            (repeats of one control, such as random seeds), or a single `NeuronSet`. Equal sets are run once.
        batch_size: questions a forward.
        answer: how answers are read; by default as the set says.
        mode: what is done to the neurons, with ``factor``, ``values`` and ``at``; see `Ablation`.
        factor: see `Ablation`.
        values: see `Ablation`.
        at: see `Ablation`.
        on_error: ``"raise"``, or ``"skip"`` questions that cannot be asked (their ids are kept in the provenance).
        progress: show a progress bar.

    Raises:
        QuestionError: fewer than two groups; a question cannot be asked (``error.partial``, also of any other error
            or interrupt on the way, holds the result up to it).
        MismatchError: neurons of another model; a mask's group has no questions.
    """
    questions = questions if isinstance(questions, QuestionSet) else QuestionSet(questions)
    if answer is not None:
        questions = questions.asked(answer=answer)
    if on_error not in ("raise", "skip"):
        raise QuestionError(f"on_error={on_error!r} does not exist; choose from raise, skip")
    if batch_size < 1:
        raise QuestionError(f"batch_size {batch_size} is less than 1")
    if len(questions.groups) < 2:
        raise QuestionError(
            "a knockout compares groups, and needs questions of at least two; "
            f"got {', '.join(questions.groups) or 'none'}"
        )
    if "all" in questions.groups:
        raise QuestionError("no group can be named 'all': the tables use that name for all groups together")
    reader = reader_of(questions.answer)
    listed = _listed_masks(masks, questions.groups)
    ablations: dict[NeuronSet, Ablation] = {}
    unchanged: set[NeuronSet] = set()  # an empty set leaves the clean answers as they are
    for _, neurons in listed:
        if len(neurons) == 0:
            Ablation._refuse_foreign(model, neurons.space)
            unchanged.add(neurons)
        elif neurons not in ablations:
            ablations[neurons] = Ablation(model, neurons, mode, factor=factor, values=values, at=at)
    asked: list[Question] = []
    chosen: list[np.ndarray] = []
    margins: list[np.ndarray] = []
    skipped: list[str] = []

    def result() -> KnockoutResult:
        shape = (1 + len(listed), 0)
        order = {item.id: n for n, item in enumerate(questions)}
        place = np.argsort([order[item.id] for item in asked]) if asked else np.zeros(0, dtype=int)
        kept = [asked[n] for n in place]
        return KnockoutResult(
            ids=tuple(item.id for item in kept),
            groups=tuple(item.group for item in kept),
            answers=np.array([item.answer for item in kept], dtype=np.int64),
            masks=tuple(mask for mask, _ in listed),
            chosen=np.concatenate([np.zeros(shape, dtype=np.int64), *chosen], 1)[:, place],
            margins=np.concatenate([np.zeros(shape), *margins], 1)[:, place],
            provenance={
                **_provenance(model),
                "answer": repr(reader),
                "prompt": _rule_name(questions.prompt),
                "shuffle": questions.shuffle,
                "intervention": {"mode": mode, "factor": factor, "at": at or "post", "values": values is not None},
                "selections": {name: _describe(given) for name, given in masks.items()},
                "skipped": list(skipped),
            },
        )

    n_runs = 1 + len(ablations)
    with torch.inference_mode(), tqdm(total=len(questions) * n_runs, unit="answer", disable=not progress) as bar:
        for batch in batches(questions, batch_size):
            try:
                parts = _encoded(model, reader, batch, skipped if on_error == "skip" else None)
                for part, encoded in parts:
                    clean = reader.read(model, part, encoded)
                    bar.update(len(part))
                    known: dict[NeuronSet, Reading] = dict.fromkeys(unchanged, clean)
                    masked = read_masked(model, reader, part, encoded, list(ablations.values()))
                    for neurons, reading in zip(ablations, masked, strict=True):
                        known[neurons] = reading
                        bar.update(len(part))
                    readings = [clean, *(known[neurons] for _, neurons in listed)]
                    asked.extend(part)
                    chosen.append(np.array([[-1 if c is None else c for c in one.chosen] for one in readings]))
                    margins.append(np.stack([one.margins(part).numpy() for one in readings]))
            except BaseException as error:
                if len(asked) == sum(part.shape[1] for part in margins):  # else it came between two of these
                    error.partial = result()  # type: ignore[attr-defined]
                raise
    return result()


def _encoded(
    model: VLM, reader: AnswerReader, batch: QuestionSet, skipped: list[str] | None
) -> list[tuple[QuestionSet, Any]]:
    try:
        return [(batch, reader.encode(model, batch))]
    except QuestionError:
        if skipped is None:
            raise
        if len(batch) == 1:
            skipped.append(batch[0].id)
            return []
        singles = (batch[n : n + 1] for n in range(len(batch)))
        return [pair for single in singles for pair in _encoded(model, reader, single, skipped)]


def _listed_masks(masks: Masks, groups: Sequence[str]) -> list[tuple[Mask, NeuronSet]]:
    if not isinstance(masks, Mapping) or not masks:
        raise MismatchError("masks are a mapping from names to selections, such as {'CAS': selection}; none was given")
    listed: list[tuple[Mask, NeuronSet]] = []
    for name, given in masks.items():
        several = isinstance(given, Sequence) and not isinstance(given, str)
        repeats = list(given) if several else [given]
        if not repeats:
            raise MismatchError(f"mask {name!r} is an empty list; give a Selection or a NeuronSet")
        for repeat, selection in enumerate(repeats):
            if isinstance(selection, NeuronSet):
                listed.append((Mask(name, repeat, "all", len(selection)), selection))
                continue
            if not isinstance(selection, Selection):
                raise MismatchError(f"mask {name!r} is a {type(selection).__name__}; give a Selection or a NeuronSet")
            missing = [group for group in selection if group not in groups]
            if missing:
                raise MismatchError(
                    f"selection {name!r} has neurons of {', '.join(missing[:5])}, but there are no questions of it; "
                    f"the questions are of {', '.join(groups)}"
                )
            listed += [(Mask(name, repeat, group, len(part)), part) for group, part in selection.items()]
    return listed


def _describe(given: Any) -> Any:
    if isinstance(given, Selection | NeuronSet):
        return repr(given)
    return [repr(one) for one in given]
