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
from typing import Any, cast

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from vlmneurons.checks import Keywords, as_path, check_kind
from vlmneurons.errors import MismatchError
from vlmneurons.study.masks import split_setting
from vlmneurons.study.result import VALUES, KnockoutResult
from vlmneurons.trust.pvalues import holm

_EFFECTS = ("self_effect", "cross_effect", "cross_caused", "gap")

_HOW = {
    "answer": "answers are read by",
    "prompt": "the prompt is",
    "others": "masks of other groups that each question met:",
}
"""What of a study's provenance a reader has to know where it differs, and how it is told."""


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
        names = [name for one in self.results.values() for name in one.selectors if split_setting(name)[1] is None]
        return tuple(dict.fromkeys(names))

    @property
    def notes(self) -> tuple[str, ...]:
        """What differs between the models beside the model, a sentence each; nothing where nothing does."""
        notes = []
        for one, other in itertools.combinations(self.models, 2):
            asked, also = (
                {*zip(part.ids, part.groups, part.answers.tolist(), strict=True)}
                for part in (self.results[one], self.results[other])
            )
            if asked != also:
                same = len(asked & also)
                notes.append(
                    f"{one} was asked {len(asked):,} questions and {other} {len(also):,}; {same:,} are the same."
                )
        for name, told in _HOW.items():
            values = {model: str(one.provenance.get(name, "all")) for model, one in self.results.items()}
            if len(set(values.values())) > 1:
                notes.append(f"{told[0].upper()}{told[1:]} {'; '.join(f'{v} ({one})' for one, v in values.items())}.")
        lacking = {
            model: [name for name in self.selectors if name not in one.selectors] for model, one in self.results.items()
        }
        notes += [f"{model} has no masks of {', '.join(names)}." for model, names in lacking.items() if names]
        return tuple(notes)

    def table(self) -> pd.DataFrame:
        """The paper's table: a row for each selector and model, over all of the model's groups.

        Columns: ``selector``, ``model``, ``groups``, ``n``, ``pictures``, ``clean``, ``self_effect``, ``cross_effect``,
        ``cross_caused`` and ``gap``, each with ``_low`` and ``_high``, ``few`` (see `KnockoutResult.summary`), and
        ``p``, ``cross_p`` and ``gap_p``, each with ``_holm``: corrected over the models.
        """
        whole = self._summaries["group"] == "all"
        rows, groups = self._summaries.loc[whole], self._summaries.loc[~whole]
        counts = (
            cast(pd.Series, groups.groupby(["selector", "model"], sort=False).size()).rename("groups").reset_index()
        )
        return _corrected(
            rows.drop(columns="group").merge(counts, "left"), ["selector"], ("p", "cross_p", "gap_p")
        ).loc[
            :,
            ["selector", "model", "groups", "n", "pictures", "clean", *_ends(), "few"]
            + [f"{name}{end}" for name in ("p", "cross_p", "gap_p") for end in ("", "_holm")],
        ]

    def groups(self) -> pd.DataFrame:
        """Each group's effects in each model: which groups agree.

        Columns: ``selector``, ``group``, ``model``, ``n``, ``pictures``, ``clean``, ``self_effect``, ``cross_effect``,
        ``cross_caused`` and ``gap``, each with ``_low`` and ``_high``, ``few``, ``p`` of the self effect, ``p_holm``
        (corrected over the models that have the group), ``models`` (how many have it) and ``harmed`` (how many of them
        have a self effect below zero with ``p_holm`` below .05).
        """
        summaries = self._summaries
        rows = _corrected(summaries.loc[summaries["group"] != "all"], ["selector", "group"], ("p",))
        rows["models"] = rows.groupby(["selector", "group"])["model"].transform("size")
        rows["found"] = (rows["self_effect"] < 0) & (rows["p_holm"] < 0.05)
        rows["harmed"] = rows.groupby(["selector", "group"])["found"].transform("sum")
        first = ["selector", "group", "model", "n", "pictures", "clean"]
        return self._sorted(rows.loc[:, [*first, *_ends(), "few", "p", "p_holm", "models", "harmed"]], "group")

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
                model: one.matrix(name, value=self.value)
                for model, one in self.results.items()
                if name in one.selectors
            }
            for first, second in itertools.combinations(matrices, 2):
                a, b = matrices[first], matrices[second]
                shared = sorted(set(a.index) & set(a.columns) & set(b.index) & set(b.columns))
                one, other = (table.loc[shared, shared].to_numpy(dtype=float) for table in (a, b))
                row: dict[str, object] = {"selector": name, "first": first, "second": second, "groups": len(shared)}
                own = np.eye(len(shared), dtype=bool)
                row["spearman"], row["p"] = self._alike(one, other, own)
                row["cells"], row["cells_p"] = self._alike(one, other, ~own)
                rows.append(row)
        names = ["selector", "first", "second", "groups", "spearman", "p", "cells", "cells_p"]
        return pd.DataFrame(rows, columns=names)

    def profiles(self) -> pd.DataFrame:
        """Where each model's neurons lie over its relative depth, so that models of other depths can be compared.

        Columns: ``selector``, ``model``, ``tower``, ``layer``, ``depth`` (the layer's middle, from 0 to 1 over the
        layers of its tower), ``share`` (of a mask's neurons, mean over masks) and ``density`` (share times the number
        of layers: 1 is as many as in a uniform choice among layers of one width).
        """
        rows = []
        for name, (model, one) in itertools.product(self.selectors, self.results.items()):
            layers = [str(layer).rpartition(" ") for layer in one.provenance.get("layers", ())]
            masks = [
                mask for mask in one.masks if mask.selector == name and mask.size and len(mask.layers) == len(layers)
            ]
            if not masks or not layers:
                continue
            shares = np.mean([np.array(mask.layers) / mask.size for mask in masks], axis=0)
            number = {tower: sum(other == tower for other, _, _ in layers) for tower, _, _ in layers}
            seen = dict.fromkeys(number, 0)
            for (tower, _, layer), share in zip(layers, shares, strict=True):
                depth = (seen[tower] + 0.5) / number[tower]
                seen[tower] += 1
                where = {"selector": name, "model": model, "tower": tower, "layer": int(layer), "depth": depth}
                rows.append({**where, "share": float(share), "density": float(share) * len(layers)})
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
        """Every model's summary, selector by selector; what takes time is its tests, so it is made once."""
        how: Keywords = {"confidence": self.confidence, "permutations": self.permutations, "seed": self.seed}
        parts = []
        for model, one in self.results.items():
            plain = one.select(*(name for name in one.selectors if split_setting(name)[1] is None))
            parts.append(plain.summary(value=self.value, **how).assign(model=model))
        return self._sorted(pd.concat(parts, ignore_index=True))

    def _sorted(self, table: pd.DataFrame, *by: str) -> pd.DataFrame:
        """Rows in the order of the selectors and then by columns."""
        order = {name: n for n, name in enumerate(self.selectors)}
        table = table.assign(_order=table["selector"].map(order)).sort_values(["_order", *by], kind="stable")
        return table.drop(columns="_order").reset_index(drop=True)

    def _alike(self, one: np.ndarray, other: np.ndarray, cells: np.ndarray) -> tuple[float, float]:
        """Rank correlation of some cells of two matrices over the same groups, and its p."""
        size = len(one)
        if size < 3:
            return math.nan, math.nan

        def correlation(order: Sequence[int]) -> float:
            a, b = one[cells], other[np.ix_(order, order)][cells]
            known = ~np.isnan(a) & ~np.isnan(b)
            a, b = scipy_stats.rankdata(a[known]), scipy_stats.rankdata(b[known])
            return float(np.corrcoef(a, b)[0, 1]) if a.size > 2 and np.ptp(a) and np.ptp(b) else math.nan

        found = correlation(range(size))
        if math.isnan(found) or not self.permutations:
            return found, math.nan
        if math.factorial(size) <= self.permutations:
            shuffled = [correlation(order) for order in itertools.permutations(range(size))]
            return found, float(np.mean(~(np.abs(shuffled) < abs(found) - 1e-12)))  # what has no rank tells nothing
        generator = np.random.default_rng(self.seed)
        shuffled = [correlation(generator.permutation(size).tolist()) for _ in range(self.permutations)]
        return found, float((1 + np.sum(~(np.abs(shuffled) < abs(found) - 1e-12))) / (1 + len(shuffled)))


def compare(
    results: Mapping[str, KnockoutResult | str | Path],
    *,
    value: str | None = None,
    confidence: float = 0.95,
    permutations: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Several models' studies side by side: the table of selector by model, layer profiles, and which groups agree.

    The models may have been asked different questions, and have other groups; what differs is said.

    Args:
        results: the study of each model by name: what `knockout` gave, or the folder of a study or knockout.
        value: what effects are measured on (see `KnockoutResult.values`); by default the results' own, and
            ``"correct"`` where one's answers are graded and another's are not.
        confidence: level of the intervals.
        permutations: number of sign flips (see `KnockoutResult.effects`), and of shuffles of groups.
        seed: of both.

    Raises:
        MismatchError: fewer than two models, a name that is no text, something that is no result, a part of a run,
            sweeps alone, or a value that one of the results does not hold.
        FileFormatError: a folder holds no result.

    Example:
        ``compare({"LLaVA": "out/llava", "Qwen": "out/qwen"}).table()``
    """
    check_kind("results", results, Mapping, MismatchError, "a dictionary of results by the name of the model")
    if len(results) < 2:
        raise MismatchError(f"models are compared with each other: give at least two; got {len(results)}")
    if wrong := [name for name in results if not isinstance(name, str) or not name]:
        raise MismatchError(f"the name of a model is a text that is not empty; got {wrong[0]!r}")
    opened = {str(name): _opened(name, one) for name, one in results.items()}
    measures = {one.measure for one in opened.values()}
    value = value or (measures.pop() if len(measures) == 1 else "correct")
    if value not in VALUES:
        raise MismatchError(f"value={value!r} is not among those that effects are measured on: {', '.join(VALUES)}")
    for name, one in opened.items():
        if not one.ids or not one.masks:
            raise MismatchError(f"{name!r} has no questions, or no masks: there is nothing to compare")
        try:
            one.values(value)
        except MismatchError as error:
            raise MismatchError(f"{name!r}: {error}") from error
    compared = Comparison(opened, value, confidence, permutations, seed)
    if not compared.selectors:
        raise MismatchError("all masks are settings of sweeps, which are not compared: give results of selectors")
    return compared


def _opened(name: object, given: Any) -> KnockoutResult:
    if not isinstance(given, KnockoutResult):
        folder = as_path(f"results[{name!r}]", given, MismatchError)
        given = KnockoutResult.load(folder / "knockout" if (folder / "knockout").is_dir() else folder)
    if "part" in given.provenance:
        raise MismatchError(f"{name!r} is part {given.provenance['part']} of a run: join it with the others first")
    return given


def _ends() -> list[str]:
    return [f"{effect}{end}" for effect in _EFFECTS for end in ("", "_low", "_high")]


def _corrected(table: pd.DataFrame, family: Sequence[str], names: Sequence[str]) -> pd.DataFrame:
    """P-values corrected by Holm's method over the models of each family."""
    table = table.copy()
    for name in names:
        corrected = table.groupby(list(family), sort=False)[name].transform(lambda p: holm(p.tolist()))
        table[f"{name}_holm"] = corrected.astype(float)
    return table.reset_index(drop=True)
