"""Several models side by side: their effects in one table, where their neurons lie, and which groups they agree on.

Every number of a single model is one of its result's own tables; here they are put beside each other, and p-values are
corrected over the models. Models may have been asked different questions: what differs is said (`Comparison.notes`).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from vlmneurons.checks import as_path, check_kind
from vlmneurons.errors import MismatchError
from vlmneurons.study.effects import NO_GROUP, check_value
from vlmneurons.study.masks import split_setting
from vlmneurons.study.result import KnockoutResult
from vlmneurons.trust.pvalues import holm

_EFFECTS = ("self_effect", "cross_effect", "cross_caused", "gap")

_ENDS = [f"{effect}{end}" for effect in _EFFECTS for end in ("", "_low", "_high")]
"""Columns of the effects and their intervals."""

_NOTED = {
    "answer": "Answers are read by",
    "prompt": "The prompt is",
    "others": "Masks of other groups that each question met:",
}
"""The entries of a study's provenance that a reader has to know where they differ, and how a note of them begins."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` gives: the tables of several models, and a page of them.

    Attributes:
        results: the study of each model, by name.
        value: what effects are measured on: ``"correct"``, ``"margin"`` or ``"score"``.
        confidence: level of the intervals.
        permutations: number of sign flips, and of shuffles.
        seed: of both.
    """

    results: Mapping[str, KnockoutResult]
    value: str
    confidence: float = 0.95
    permutations: int = 2000
    seed: int = 0

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, in their order."""
        return tuple(self.results)

    @property
    def selectors(self) -> tuple[str, ...]:
        """Names under which any model has masks, in the order of the models; the settings of sweeps are left out."""
        return tuple(dict.fromkeys(name for result in self.results.values() for name in _without_sweeps(result)))

    @property
    def notes(self) -> tuple[str, ...]:
        """What differs between the models' studies apart from the model, a sentence each."""
        notes = []
        questions = {
            model: {*zip(result.ids, result.groups, result.answers.tolist(), strict=True)}
            for model, result in self.results.items()
        }
        for (first, asked), (second, also_asked) in itertools.combinations(questions.items(), 2):
            if asked != also_asked:
                notes.append(
                    f"{first} was asked {len(asked):,} questions and {second} {len(also_asked):,}; "
                    f"{len(asked & also_asked):,} are the same."
                )
        for name, begin in _NOTED.items():
            values = {model: str(result.provenance.get(name, "all")) for model, result in self.results.items()}
            if len(set(values.values())) > 1:
                notes.append(f"{begin} {'; '.join(f'{value} ({model})' for model, value in values.items())}.")
        for model, result in self.results.items():
            if lacking := [name for name in self.selectors if name not in result.selectors]:
                notes.append(f"{model} has no masks of {', '.join(lacking)}.")
        return tuple(notes)

    def table(self) -> pd.DataFrame:
        """The paper's table: a row for each selector and model, over all of the model's groups.

        Columns: ``selector``, ``model``, ``groups``, ``n``, ``pictures``, ``clean``, ``self_effect``, ``cross_effect``,
        ``cross_caused`` and ``gap``, each with ``_low`` and ``_high``, ``few`` (see `KnockoutResult.summary`), and
        ``p``, ``cross_p`` and ``gap_p``, each with ``_holm``: corrected over the models.
        """
        summaries = self._summaries
        of_all = summaries["group"] == NO_GROUP
        rows = summaries.loc[of_all].drop(columns="group")
        groups = summaries.loc[~of_all].groupby(["selector", "model"], sort=False)["group"].agg(groups="size")
        tests = ("p", "cross_p", "gap_p")
        table = _corrected(rows.merge(groups.reset_index(), "left"), ["selector"], tests)
        first = ["selector", "model", "groups", "n", "pictures", "clean"]
        return table.loc[:, [*first, *_ENDS, "few", *(f"{name}{end}" for name in tests for end in ("", "_holm"))]]

    def groups(self) -> pd.DataFrame:
        """Each group's effects in each model: which groups agree.

        Columns: ``selector``, ``group``, ``model``, ``n``, ``pictures``, ``clean``, ``self_effect``, ``cross_effect``,
        ``cross_caused`` and ``gap``, each with ``_low`` and ``_high``, ``few``, ``p`` of the self effect, ``p_holm``
        (corrected over the models that have the group), ``models`` (how many have it) and ``harmed`` (how many of them
        have a self effect below zero with ``p_holm`` below .05).
        """
        summaries = self._summaries
        family = ["selector", "group"]
        rows = _corrected(summaries.loc[summaries["group"] != NO_GROUP], family, ("p",))
        rows["models"] = rows.groupby(family)["model"].transform("size")
        rows["harmed"] = (rows["self_effect"] < 0) & (rows["p_holm"] < 0.05)
        rows["harmed"] = rows.groupby(family)["harmed"].transform("sum")
        first = ["selector", "group", "model", "n", "pictures", "clean"]
        return self._sorted(rows.loc[:, [*first, *_ENDS, "few", "p", "p_holm", "models", "harmed"]], "group")

    def agreement(self) -> pd.DataFrame:
        """How alike two models' effects are over the groups that both have, for each selector and pair of models.

        Columns: ``selector``, ``first``, ``second``, ``groups`` (that both have), ``spearman`` (rank correlation of
        their self effects) and ``p``, ``cells`` (rank correlation of the effects of masks on other groups' questions)
        and ``cells_p``. The p are two-sided, of shuffles of one model's groups, masks and questions alike (Mantel's
        test); with few groups there are few shuffles, and none can be small. NaN below 3 groups.
        """
        rows = []
        for name in self.selectors:
            matrices = {
                model: result.matrix(name, value=self.value)
                for model, result in self.results.items()
                if name in result.selectors
            }
            for (first, a), (second, b) in itertools.combinations(matrices.items(), 2):
                shared = sorted(set(a.index) & set(a.columns) & set(b.index) & set(b.columns))
                effects, other_effects = (table.loc[shared, shared].to_numpy(dtype=float) for table in (a, b))
                is_self = np.eye(len(shared), dtype=bool)
                of_self = self._rank_correlation(effects, other_effects, is_self)
                of_cells = self._rank_correlation(effects, other_effects, ~is_self)
                rows.append((name, first, second, len(shared), *of_self, *of_cells))
        names = ["selector", "first", "second", "groups", "spearman", "p", "cells", "cells_p"]
        return pd.DataFrame(rows, columns=names)

    def profiles(self) -> pd.DataFrame:
        """Where each model's neurons lie over its relative depth, so that models of other depths can be compared.

        Columns: ``selector``, ``model``, ``tower``, ``layer``, ``depth`` (the layer's middle, from 0 to 1 over the
        layers of its tower), ``share`` (of a mask's neurons, mean over masks) and ``density`` (share times the number
        of layers: 1 is as many as in a uniform choice among layers of one width).
        """
        rows = []
        for name, (model, result) in itertools.product(self.selectors, self.results.items()):
            layers = [str(layer).rpartition(" ")[::2] for layer in result.provenance.get("layers", ())]
            masks = [
                mask for mask in result.masks if mask.selector == name and mask.size and len(mask.layers) == len(layers)
            ]
            if not masks or not layers:
                continue
            shares = np.mean([np.array(mask.layers) / mask.size for mask in masks], axis=0)
            tower_layers: dict[str, list[tuple[str, float]]] = {}
            for (tower, layer), share in zip(layers, shares.tolist(), strict=True):
                tower_layers.setdefault(tower, []).append((layer, share))
            for tower, parts in tower_layers.items():
                for n, (layer, share) in enumerate(parts):
                    depth = (n + 0.5) / len(parts)
                    rows.append((name, model, tower, int(layer), depth, share, share * len(layers)))
        return pd.DataFrame(rows, columns=["selector", "model", "tower", "layer", "depth", "share", "density"])

    def report(self, folder: str | Path, *, main: str | None = None, title: str = "Models compared") -> Path:
        """A page with the tables and figures, and their files, into a folder.

        Args:
            folder: where the page, pictures and tables go.
            main: the selector that per-group figures are of; by default ``"CAS"``, or else the first.
            title: stands above the page.

        Returns:
            The path of the page.

        Raises:
            MismatchError: no such selector.
        """
        from vlmneurons.look.comparison import write_comparison

        return write_comparison(self, folder, main=main, title=title)

    @cached_property
    def _summaries(self) -> pd.DataFrame:
        """Every model's summary, selector by selector; its tests take time, so it is made once."""
        tables = []
        for model, result in self.results.items():
            summary = result.select(*_without_sweeps(result)).summary(
                value=self.value, confidence=self.confidence, permutations=self.permutations, seed=self.seed
            )
            tables.append(summary.assign(model=model))
        return self._sorted(pd.concat(tables, ignore_index=True))

    def _sorted(self, table: pd.DataFrame, *by: str) -> pd.DataFrame:
        """Rows in the order of the selectors and then by columns."""
        order = {name: n for n, name in enumerate(self.selectors)}
        table = table.assign(_order=table["selector"].map(order)).sort_values(["_order", *by], kind="stable")
        return table.drop(columns="_order").reset_index(drop=True)

    def _rank_correlation(self, first: np.ndarray, second: np.ndarray, cells: np.ndarray) -> tuple[float, float]:
        """Rank correlation of some cells of two matrices over the same groups, and its p by shuffles of the groups."""
        size = len(first)
        if size < 3:
            return math.nan, math.nan

        def correlation(order: Sequence[int]) -> float:
            a, b = first[cells], second[np.ix_(order, order)][cells]
            both = ~np.isnan(a) & ~np.isnan(b)
            a, b = scipy_stats.rankdata(a[both]), scipy_stats.rankdata(b[both])
            return float(np.corrcoef(a, b)[0, 1]) if a.size > 2 and np.ptp(a) and np.ptp(b) else math.nan

        measured = correlation(range(size))
        if math.isnan(measured) or not self.permutations:
            return measured, math.nan
        every_order = math.factorial(size) <= self.permutations  # the order that is measured is then among them
        generator = np.random.default_rng(self.seed)
        draws = (generator.permutation(size).tolist() for _ in range(self.permutations))
        shuffled = [correlation(order) for order in (itertools.permutations(range(size)) if every_order else draws)]
        # A shuffle without a correlation (NaN) counts as one that is as high, so that p is never too small.
        as_high = int(np.sum(~(np.abs(shuffled) < abs(measured) - 1e-12)))
        return measured, as_high / len(shuffled) if every_order else (1 + as_high) / (1 + len(shuffled))


def compare(
    results: Mapping[str, KnockoutResult | str | Path],
    *,
    value: str | None = None,
    confidence: float = 0.95,
    permutations: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Several models' studies side by side: the table of selector by model, layer profiles, and which groups agree.

    The models may have been asked different questions, and have different groups; `Comparison.notes` says what differs.

    Args:
        results: the study of each model by name: what `knockout` gave, or the folder of a study or knockout.
        value: what effects are measured on (see `KnockoutResult.values`); by default the results' own, and
            ``"correct"`` where one's answers are graded and another's are not.
        confidence: level of the intervals.
        permutations: number of sign flips (see `KnockoutResult.effects`), and of shuffles of groups.
        seed: of both.

    Raises:
        MismatchError: fewer than two models, a name that is not a text, something that is not a result, a part of a
            run, sweeps alone, or a value that one of the results does not hold.
        FileFormatError: a folder holds no result.

    Example:
        ``compare({"LLaVA": "out/llava", "Qwen": "out/qwen"}).table()``
    """
    check_kind("results", results, Mapping, MismatchError, "a dictionary of results by the name of the model")
    if len(results) < 2:
        raise MismatchError(f"models are compared with each other: give at least two; got {len(results)}")
    if wrong := [name for name in results if not isinstance(name, str) or not name]:
        raise MismatchError(f"the name of a model is a text that is not empty; got {wrong[0]!r}")
    opened = {str(name): _opened(name, entry) for name, entry in results.items()}
    measures = {result.measure for result in opened.values()}
    value = value or (measures.pop() if len(measures) == 1 else "correct")
    check_value(value)
    for name, result in opened.items():
        if not result.ids or not result.masks:
            raise MismatchError(f"{name!r} has no questions, or no masks: there is nothing to compare")
        try:
            result.values(value)
        except MismatchError as error:
            raise MismatchError(f"{name!r}: {error}") from error
    compared = Comparison(opened, value, confidence, permutations, seed)
    if not compared.selectors:
        raise MismatchError("all masks are settings of sweeps, which are not compared: give results of selectors")
    return compared


def _opened(name: object, entry: KnockoutResult | str | Path) -> KnockoutResult:
    """A result as it is, or that of a folder of a study or a knockout."""
    if isinstance(entry, KnockoutResult):
        result = entry
    else:
        folder = as_path(f"results[{name!r}]", entry, MismatchError)
        result = KnockoutResult.load(folder / "knockout" if (folder / "knockout").is_dir() else folder)
    if "part" in result.provenance:
        raise MismatchError(f"{name!r} is part {result.provenance['part']} of a run: join it with the others first")
    return result


def _without_sweeps(result: KnockoutResult) -> list[str]:
    """The selectors of a result that are not settings of a sweep."""
    return [name for name in result.selectors if split_setting(name)[1] is None]


def _corrected(table: pd.DataFrame, family: Sequence[str], names: Sequence[str]) -> pd.DataFrame:
    """P-values corrected by Holm's method over the models of each family."""
    table = table.copy()
    for name in names:
        corrected = table.groupby(list(family), sort=False)[name].transform(lambda p: holm(p.tolist()))
        table[f"{name}_holm"] = corrected.astype(float)
    return table.reset_index(drop=True)
