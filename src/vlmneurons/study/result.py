"""The result of a study: every answer, and the tables that follow from them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlmneurons.checks import path_of, share, whole
from vlmneurons.errors import FileFormatError, MismatchError
from vlmneurons.files import tables as _files
from vlmneurons.files.atomic import read_parquet, write_parquet, write_text
from vlmneurons.files.digests import digest_of_file
from vlmneurons.study.effects import excess, mask_effects
from vlmneurons.study.masks import Mask, split_setting
from vlmneurons.trust.pvalues import benjamini_hochberg, holm, mcnemar, sign_flips
from vlmneurons.trust.resampling import bounds, mean_over, resample_weights, resampled_means

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KIND, _VERSION = "vlmneurons knockout", 3

CONDITIONS = ("all", "correct", "wrong")
"""Which questions enter a table: all, or those that the clean model answers right or wrong."""

CLUSTERS = ("picture", "question")
"""What a bootstrap draws, and a permutation flips: pictures with all their questions, or questions one by one."""


def _check_resampling(confidence: float, resamples: int, permutations: int, seed: int) -> float:
    whole("resamples", resamples, MismatchError, least=1)
    whole("permutations", permutations, MismatchError, least=0)
    whole("seed", seed, MismatchError, least=0)
    return share("confidence", confidence, MismatchError)


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
        texts: ``[1 + mask, question]`` generated texts; None for answers that are not generated.
        controls: groups that no mask is of: questions that measure general ability. They are left out of all effects
            between groups.
        pictures: name of each question's picture, equal for questions that share one; None where that is not known.
    """

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    answers: np.ndarray
    masks: tuple[Mask, ...]
    chosen: np.ndarray
    margins: np.ndarray
    provenance: Mapping[str, Any] = field(default_factory=dict)
    texts: np.ndarray | None = None
    controls: tuple[str, ...] = ()
    pictures: tuple[str, ...] | None = None

    # -- what there is -------------------------------------------------------------------------------------------------

    @property
    def group_names(self) -> tuple[str, ...]:
        """Groups of the questions, sorted; the control groups are not among them."""
        return tuple(sorted(set(self.groups) - set(self.controls)))

    @property
    def control_names(self) -> tuple[str, ...]:
        """Control groups that have questions, sorted."""
        return tuple(sorted(set(self.groups) & set(self.controls)))

    @property
    def selectors(self) -> tuple[str, ...]:
        """Names under which masks were given, in their order."""
        return tuple(dict.fromkeys(mask.selector for mask in self.masks))

    @cached_property
    def correct(self) -> np.ndarray:
        """``[1 + mask, question]`` whether the answer is right, row 0 clean."""
        return self.chosen == self.answers

    def _of(self, selector: str) -> list[int]:
        rows = [row for row, mask in enumerate(self.masks, start=1) if mask.selector == selector]
        if not rows:
            raise MismatchError(f"there is no selector {selector!r} here; there are {', '.join(self.selectors)}")
        return rows

    def _members(self, names: Sequence[str]) -> list[np.ndarray]:
        groups = np.array(self.groups)
        return [np.flatnonzero(groups == name) for name in names]

    def _clusters(self, cluster: str) -> np.ndarray | None:
        """The number of each question's cluster; None where every question stands alone."""
        if cluster not in CLUSTERS:
            raise MismatchError(f"cluster={cluster!r} does not exist; choose from {', '.join(CLUSTERS)}")
        if cluster == "question" or self.pictures is None:
            return None
        number = {name: n for n, name in enumerate(dict.fromkeys(self.pictures))}
        return np.array([number[name] for name in self.pictures], dtype=np.int64)

    @property
    def accuracy(self) -> dict[str, float]:
        """Clean accuracy of each group."""
        names = [*self.group_names, *self.control_names]
        return {n: float(self.correct[0][own].mean()) for n, own in zip(names, self._members(names), strict=True)}

    def where(self, condition: str) -> "KnockoutResult":
        """The questions that the clean model answers right (``"correct"``) or wrong (``"wrong"``), or ``"all"``.

        Args:
            condition: ``"correct"``, ``"wrong"`` or ``"all"``.

        Raises:
            MismatchError: no such condition.
        """
        if condition not in CONDITIONS:
            raise MismatchError(f"condition={condition!r} does not exist; choose from {', '.join(CONDITIONS)}")
        if condition == "all":
            return self
        return self._keeping(np.flatnonzero(self.correct[0] == (condition == "correct")))

    def _keeping(self, places: np.ndarray) -> "KnockoutResult":
        return replace(
            self,
            ids=tuple(self.ids[n] for n in places),
            groups=tuple(self.groups[n] for n in places),
            pictures=None if self.pictures is None else tuple(self.pictures[n] for n in places),
            answers=self.answers[places],
            chosen=self.chosen[:, places],
            margins=self.margins[:, places],
            texts=None if self.texts is None else self.texts[:, places],
        )

    def select(self, *selectors: str) -> "KnockoutResult":
        """The result with the masks of some selectors only, in the given order.

        Raises:
            MismatchError: there is no such selector.
        """
        rows = [row for name in selectors for row in self._of(name)]
        return replace(
            self,
            masks=tuple(self.masks[row - 1] for row in rows),
            chosen=self.chosen[[0, *rows]],
            margins=self.margins[[0, *rows]],
            texts=None if self.texts is None else self.texts[[0, *rows]],
        )

    def answer_table(self) -> pd.DataFrame:
        """Every answer, one row for each run and question: all that any statistic can be computed from.

        Columns: ``run`` (0 is the clean model), ``selector``, ``repeat``, ``mask``, ``intervention``, ``neurons``
        (empty names and 0 for the clean run), ``id``, ``group``, ``picture`` (empty where not known), ``answer`` (the
        right option), ``chosen`` (-1: could not be parsed), ``correct``, ``margin``, ``text``.
        """
        n_runs, n_questions = self.chosen.shape
        runs = np.repeat(np.arange(n_runs), n_questions)
        masks = [Mask("", 0, "", 0, ""), *self.masks]

        def of_mask(values: Sequence[str]) -> pd.Categorical:
            names = list(dict.fromkeys(values))
            return pd.Categorical.from_codes(np.array([names.index(value) for value in values])[runs], names)

        def of_question(values: Sequence[str]) -> pd.Categorical:
            names = {name: code for code, name in enumerate(dict.fromkeys(values))}
            return pd.Categorical.from_codes(np.tile([names[value] for value in values], n_runs), list(names))

        return pd.DataFrame(
            {
                "run": runs.astype(np.int32),
                "selector": of_mask([mask.selector for mask in masks]),
                "repeat": np.array([mask.repeat for mask in masks], dtype=np.int32)[runs],
                "mask": of_mask([mask.group for mask in masks]),
                "intervention": of_mask([mask.intervention for mask in masks]),
                "neurons": np.array([mask.size for mask in masks], dtype=np.int64)[runs],
                "id": of_question(self.ids),
                "group": of_question(self.groups),
                "picture": of_question(self.pictures or [""] * n_questions),
                "answer": np.tile(self.answers, n_runs).astype(np.int16),
                "chosen": self.chosen.reshape(-1).astype(np.int16),
                "correct": self.correct.reshape(-1),
                "margin": self.margins.reshape(-1),
                "text": pd.array(
                    [None] * len(runs) if self.texts is None else self.texts.reshape(-1).tolist(), dtype="string"
                ),
            }
        )

    # -- tables --------------------------------------------------------------------------------------------------------

    def table(self, *, condition: str = "all") -> pd.DataFrame:
        """One row for each mask and each group of questions.

        Columns: ``selector``, ``repeat``, ``mask`` (the group whose neurons were off), ``group`` (of the questions),
        ``neurons``, ``n`` (questions), ``clean`` and ``ablated`` (accuracy), ``delta``, ``flips`` (share of answers
        that changed), ``right_to_wrong``, ``wrong_to_right``, ``wrong_to_wrong`` (their shares), ``failures`` (share of
        ablated answers that could not be parsed), ``margin`` (mean change of the log-probability margin, nats).

        Args:
            condition: ``"all"`` questions, or those that the clean model answers ``"correct"`` or ``"wrong"``.

        Raises:
            MismatchError: no such condition.
        """
        if condition != "all":
            return self.where(condition).table()
        names = [*self.group_names, *self.control_names]
        members = self._members(names)
        clean, right = self.correct[:1], self.correct[1:]
        flipped = self.chosen[1:] != self.chosen[:1]
        values = {
            "ablated": right,
            "flips": flipped,
            "right_to_wrong": flipped & clean & ~right,
            "wrong_to_right": flipped & ~clean & right,
            "wrong_to_wrong": flipped & ~clean & ~right,
            "failures": self.chosen[1:] < 0,
            "margin": self.margins[1:] - self.margins[:1],
        }
        if not names or not self.masks:
            means = {name: np.zeros(0) for name in values}
        else:
            means = {name: mean_over(value, members).reshape(-1) for name, value in values.items()}
        before = np.tile([clean[0][own].mean() for own in members], len(self.masks))

        def of_mask(values: Sequence[Any]) -> np.ndarray:
            return np.repeat(np.array(values), len(names))

        return pd.DataFrame(
            {
                "selector": of_mask([mask.selector for mask in self.masks]),
                "repeat": of_mask([mask.repeat for mask in self.masks]),
                "mask": of_mask([mask.group for mask in self.masks]),
                "group": np.tile(np.array(names), len(self.masks)),
                "neurons": of_mask([mask.size for mask in self.masks]),
                "n": np.tile([len(own) for own in members], len(self.masks)),
                "clean": before,
                "ablated": means["ablated"],
                "delta": means["ablated"] - before,
                **{name: means[name] for name in values if name != "ablated"},
            }
        )

    def matrix(self, selector: str, *, value: str = "delta", condition: str = "all") -> pd.DataFrame:
        """Effects of one selector: rows are masks, columns groups of questions; repeats are averaged.

        Control groups are the last columns.

        Args:
            selector: which one.
            value: any numeric column of `table`.
            condition: which questions enter; see `table`.

        Raises:
            MismatchError: no such selector, column or condition.
        """
        self._of(selector)
        part = self.select(selector).where(condition)
        table = part.table()
        columns = [name for name in table.columns if name not in ("selector", "repeat", "mask", "group")]
        if value not in columns:
            raise MismatchError(f"value {value!r} is not a numeric column of the table; it has {', '.join(columns)}")
        matrix = table.groupby(["mask", "group"])[value].mean().unstack("group")
        return matrix[[*part.group_names, *part.control_names]]

    def summary(
        self,
        *,
        confidence: float = 0.95,
        resamples: int = 2000,
        permutations: int = 2000,
        seed: int = 0,
        condition: str = "all",
        cluster: str = "picture",
    ) -> pd.DataFrame:
        """Self effect, cross effects and gap of each selector, per group and over all groups (``group == "all"``).

        Columns: ``selector``, ``group``, ``n``, ``pictures``, ``clean``, ``self_effect`` (SE), ``cross_effect`` (ACE:
        other masks on this group), ``cross_caused`` (this mask on other groups), ``gap`` (SE - ACE), each followed by
        ``_low`` and ``_high``, the bounds of its paired bootstrap interval over pictures (resampled within groups, each
        with all its questions; repeats of a random control are averaged, so the interval is about questions, not
        seeds); ``self_margin`` and ``cross_margin``, the same effects on the log-probability margin (nats); ``flips``,
        ``right_to_wrong``, ``wrong_to_right`` and ``failures`` of the group's own mask; ``p``, of McNemar's exact test
        of the self effect (which takes questions for independent; NaN over all groups and where there are repeats);
        ``p_permutation``, of the self effect, and ``gap_p``, of the gap, by flipping the signs of the pictures' changes
        (see `vlmneurons.trust.pvalues.sign_flips`); and each p corrected over the selector's groups, ``_holm`` (any
        false finding) and ``_bh`` (share of false findings). With control groups also ``control_effect``, the mean over
        control groups of what this mask does to them, and its bounds.

        Args:
            confidence: level of the intervals.
            resamples: number of bootstrap resamples.
            permutations: number of sign flips.
            seed: seed of both.
            condition: which questions enter; see `table`.
            cluster: ``"picture"`` resamples and flips pictures with all their questions, which are not independent of
                each other; ``"question"`` takes every question for itself.

        Raises:
            MismatchError: no such condition, or a confidence outside (0, 1).
        """
        confidence = _check_resampling(confidence, resamples, permutations, seed)
        if condition != "all":
            return self.where(condition).summary(
                confidence=confidence, resamples=resamples, permutations=permutations, seed=seed, cluster=cluster
            )
        names = list(self.group_names)
        members = self._members(names)
        clusters = self._clusters(cluster)
        weights = resample_weights(members, resamples, np.random.default_rng(seed), clusters)
        controls = self._members(self.control_names)
        control_weights = resample_weights(controls, resamples, np.random.default_rng([seed, 2]), clusters)
        shown = np.arange(len(self.ids)) if self.pictures is None else self._clusters("picture")
        n_pictures = [len(np.unique(shown[own])) for own in members]
        flips = self.chosen != self.chosen[0]
        values = {
            "change": self.correct.astype(float) - self.correct[0],
            "margin": self.margins - self.margins[0],
            "flips": flips,
            "right_to_wrong": flips & self.correct[0] & ~self.correct,
            "wrong_to_right": flips & ~self.correct[0] & self.correct,
            "failures": self.chosen < 0,
        }
        tail = 50 * (1 - confidence)
        rows: list[dict[str, Any]] = []
        for selector in self.selectors:
            of = self._of(selector)
            masked = [name for name in names if any(self.masks[row - 1].group == name for row in of)]
            if not masked:  # a set that is of no group has no self effect
                continue
            column = [names.index(name) for name in masked]
            runs = [[row for row in of if self.masks[row - 1].group == name] for name in masked]
            # [mask, question], repeats averaged
            averaged = {key: np.stack([value[own].mean(0) for own in runs]) for key, value in values.items()}
            effects = mask_effects(mean_over(averaged["change"], members), column)
            spread = mask_effects(resampled_means(averaged["change"], members, weights), column)
            margins = mask_effects(mean_over(averaged["margin"], members), column)
            own = {
                key: mean_over(averaged[key], members)[range(len(masked)), column]
                for key in ("flips", "right_to_wrong", "wrong_to_right", "failures")
            }
            pvalues = self._pvalues(averaged["change"], runs, members, column, permutations, seed, clusters)
            control = control_spread = None
            if controls:
                control = mean_over(averaged["change"], controls).mean(-1)
                control_spread = resampled_means(averaged["change"], controls, control_weights).mean(-1)
            clean = np.array([self.correct[0][members[c]].mean() for c in column])
            for place, name in enumerate([*masked, "all"]):
                overall = name == "all"
                entry: dict[str, Any] = {
                    "selector": selector,
                    "group": name,
                    "n": sum(len(part) for part in members) if overall else len(members[column[place]]),
                    "pictures": len(np.unique(shown[np.concatenate(members)]))
                    if overall
                    else n_pictures[column[place]],
                    "clean": float(clean.mean() if overall else clean[place]),
                }
                for effect in ("self_effect", "cross_effect", "cross_caused", "gap"):
                    value, draws = effects[effect], spread[effect]
                    draws = draws.mean(-1) if overall else draws[:, place]
                    entry[effect] = float(value.mean() if overall else value[place])
                    entry[f"{effect}_low"], entry[f"{effect}_high"] = bounds(draws, tail)
                if control is not None and control_spread is not None:
                    draws = control_spread.mean(-1) if overall else control_spread[:, place]
                    entry["control_effect"] = float(control.mean() if overall else control[place])
                    entry["control_effect_low"], entry["control_effect_high"] = bounds(draws, tail)
                for effect, label in (("self_effect", "self_margin"), ("cross_effect", "cross_margin")):
                    value = margins[effect]
                    entry[label] = float(value.mean() if overall else value[place])
                for key, value in own.items():
                    entry[key] = float(value.mean() if overall else value[place])
                for key, value in pvalues.items():
                    entry[key] = float(value[place])
                rows.append(entry)
        return pd.DataFrame(rows)

    def _pvalues(
        self,
        change: np.ndarray,
        runs: list[list[int]],
        members: list[np.ndarray],
        column: list[int],
        permutations: int,
        seed: int,
        clusters: np.ndarray | None,
    ) -> dict[str, np.ndarray]:
        """P-values of each masked group and of all together, ``[mask + 1]``, and corrected over the groups."""
        own = np.full((2, change.shape[1]), np.nan)
        others = len(runs) - 1
        single = []
        for mask, (rows, place) in enumerate(zip(runs, column, strict=True)):
            here = members[place]
            own[0, here] = change[mask, here]
            received = (change[:, here].sum(0) - change[mask, here]) / others if others else np.nan
            own[1, here] = change[mask, here] - received
            single.append(
                float(mcnemar(self.correct[0][here], self.correct[rows[0]][here])) if len(rows) == 1 else np.nan
            )
        groups, overall = sign_flips(
            own, [members[place] for place in column], permutations, np.random.default_rng([seed, 1]), clusters
        )
        found = {
            "p": np.array([*single, np.nan]),
            "p_permutation": np.array([*groups[0], overall[0]]),
            "gap_p": np.array([*groups[1], overall[1]]),
        }
        result = {}
        for name, values in found.items():
            result[name] = values
            result[f"{name}_holm"] = np.array([*holm(values[:-1].tolist()), np.nan])
            result[f"{name}_bh"] = np.array([*benjamini_hochberg(values[:-1].tolist()), np.nan])
        return result

    def pairs(
        self,
        selector: str,
        *,
        confidence: float = 0.95,
        resamples: int = 2000,
        permutations: int = 2000,
        seed: int = 0,
        condition: str = "all",
        cluster: str = "picture",
    ) -> pd.DataFrame:
        """Whose mask harms whom: every mask on every group, with its interval and test.

        Columns: ``mask``, ``group``, ``n``, ``delta``, ``delta_low``, ``delta_high`` (paired bootstrap), ``excess``
        (what is left of a cross effect when the mask's and the group's averages are taken out, see
        `vlmneurons.study.effects.excess`; related groups have it below zero), ``p`` (McNemar's exact test, which takes
        questions for independent, or sign flips where there are repeats), ``p_holm`` and ``p_bh`` (over all pairs of
        the table). Control groups are left out.

        Args:
            selector: which one.
            confidence: level of the intervals.
            resamples: number of bootstrap resamples.
            permutations: number of sign flips.
            seed: seed of both.
            condition: which questions enter; see `table`.
            cluster: ``"picture"`` resamples and flips pictures with all their questions, which are not independent of
                each other; ``"question"`` takes every question for itself.

        Raises:
            MismatchError: no such selector or condition, or a selector without masks of groups.
        """
        confidence = _check_resampling(confidence, resamples, permutations, seed)
        part = self.select(selector).where(condition)
        names = list(part.group_names)
        members = part._members(names)
        masked = [name for name in names if any(mask.group == name for mask in part.masks)]
        if not masked:
            raise MismatchError(f"{selector!r} has no masks of the groups {', '.join(names)}")
        runs = [[row for row, mask in enumerate(part.masks, start=1) if mask.group == name] for name in masked]
        changes = part.correct.astype(float) - part.correct[0]
        change = np.stack([changes[own].mean(0) for own in runs])
        delta = mean_over(change, members)
        clusters = part._clusters(cluster)
        weights = resample_weights(members, resamples, np.random.default_rng(seed), clusters)
        low, high = bounds(resampled_means(change, members, weights), 50 * (1 - confidence))
        if all(len(rows) == 1 for rows in runs):
            p = np.stack(
                [[mcnemar(part.correct[0][own], part.correct[rows[0]][own]) for own in members] for rows in runs]
            )
        else:
            p, _ = sign_flips(change, members, permutations, np.random.default_rng([seed, 1]), clusters)
        table = pd.DataFrame(
            {
                "mask": np.repeat(np.array(masked), len(names)),
                "group": np.tile(np.array(names), len(masked)),
                "n": np.tile([len(own) for own in members], len(masked)),
                "delta": delta.reshape(-1),
                "delta_low": low.reshape(-1),
                "delta_high": high.reshape(-1),
                "excess": excess(delta, [names.index(name) for name in masked]).reshape(-1),
                "p": p.reshape(-1),
            }
        )
        return table.assign(p_holm=holm(table["p"].tolist()), p_bh=benjamini_hochberg(table["p"].tolist()))

    def against_random(self, selector: str, control: str) -> pd.DataFrame:
        """A selector's effects among those of a random control's repeats, per group and over all groups.

        Columns: ``group``, ``effect`` (``self_effect``, ``cross_effect`` or ``gap``), ``value``, ``control_mean``,
        ``control_sd``, ``control_low`` and ``control_high`` (smallest and largest), ``repeats``, and ``p``: the share
        of repeats, ours included, whose effect is at most ours, which is never below ``1 / (1 + repeats)``.

        Args:
            selector: name of the selector.
            control: name of the random masks, given as a list of selections.

        Raises:
            MismatchError: a name that is not there, one name for both, or groups that only one of the two has.
        """
        if selector == control:
            raise MismatchError(f"{selector!r} is compared with another name's masks; got it as its own control")
        names = list(self.group_names)
        members = self._members(names)
        change = self.correct.astype(float) - self.correct[0]

        def effects_of(rows: list[int]) -> tuple[list[str], dict[str, np.ndarray]]:
            own = sorted(rows, key=lambda row: names.index(self.masks[row - 1].group))
            groups = [self.masks[row - 1].group for row in own]
            return groups, mask_effects(mean_over(change[own], members), [names.index(group) for group in groups])

        def repeats_of(name: str) -> dict[int, list[int]]:
            found: dict[int, list[int]] = {}
            for row in self._of(name):
                if self.masks[row - 1].group in names:
                    found.setdefault(self.masks[row - 1].repeat, []).append(row)
            return found

        ours = repeats_of(selector)
        if len(ours) != 1:
            raise MismatchError(f"{selector!r} has {len(ours)} repeats of groups; a selector is compared as one")
        groups, values = effects_of(ours.popitem()[1])
        drawn = [effects_of(rows) for rows in repeats_of(control).values()]
        for other, _ in drawn:
            if other != groups:
                raise MismatchError(f"{selector!r} has masks of {', '.join(groups)}, {control!r} of {', '.join(other)}")
        if not drawn:
            raise MismatchError(f"{control!r} has no masks of groups")
        rows = []
        for place, name in enumerate([*groups, "all"]):
            for effect in ("self_effect", "cross_effect", "gap"):
                value = values[effect].mean() if name == "all" else values[effect][place]
                random = np.array([one[effect].mean() if name == "all" else one[effect][place] for _, one in drawn])
                rows.append(
                    {
                        "group": name,
                        "effect": effect,
                        "value": float(value),
                        "control_mean": random.mean(),
                        "control_sd": random.std(ddof=1) if len(random) > 1 else np.nan,
                        "control_low": random.min(),
                        "control_high": random.max(),
                        "repeats": len(random),
                        "p": (1 + (random <= value + 1e-12).sum()) / (1 + len(random)),
                    }
                )
        return pd.DataFrame(rows)

    def curve(self, selector: str, axis: str, **how: Any) -> pd.DataFrame:
        """Effects of a selector along a sweep: the `summary` of its masks named by `setting_name`, with the setting.

        Args:
            selector: the name before the setting.
            axis: what was varied, such as ``"r"``, ``"alpha"`` or ``"items"``.
            **how: of `summary`.

        Returns:
            The rows of `summary`, with the selector's bare name and the column ``axis`` first, in its order.

        Raises:
            MismatchError: there is no such sweep.

        Example:
            ``result.curve("CAS", "r")``, from masks named ``"CAS [r=0.001]"``, ``"CAS [r=0.005]"`` …
        """
        values = {}
        for name in self.selectors:
            base, setting = split_setting(name)
            if base == selector and setting is not None and setting[0] == axis:
                values[name] = setting[1]
        if not values:
            raise MismatchError(
                f"there is no sweep of {selector!r} over {axis!r} here; there are {', '.join(self.selectors)}"
            )
        table = self.select(*sorted(values, key=lambda name: values[name])).summary(**how)
        table.insert(0, axis, [values[name] for name in table["selector"]])
        return table.assign(selector=selector)

    def plot_matrix(self, selector: str | Sequence[str] | None = None, *, value: str = "delta") -> "Figure":
        """Heat maps of `matrix`, masks by groups of questions; see `vlmneurons.look.plots.plot_matrix`.

        Args:
            selector: one of `selectors`, or several side by side; all of them unless given.
            value: what is shown; see `matrix`.
        """
        from vlmneurons.look.plots import plot_matrix

        return plot_matrix(self, selector, value=value)

    def report(self, folder: str | Path, **how: Any) -> Path:
        """A page with every figure and table, and their files, into a folder; see `vlmneurons.look.report`.

        Args:
            folder: where the page, pictures and tables go.
            how: further arguments of `vlmneurons.look.report.write_report`.

        Returns:
            The path of the page.
        """
        from vlmneurons.look.report import write_report

        return write_report(self, folder, **how)

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write every answer (``answers.parquet``), what they are of (``knockout.json``) and the tables (CSV).

        Each file appears whole, ``knockout.json`` as the last: where it is, the result is complete. It has checksums of
        itself and of the answers, so that an answer that has changed since is noticed.

        Args:
            folder: where the files go; it is made if it is not there.
        """
        folder = path_of("folder", folder, MismatchError)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "knockout.json").unlink(missing_ok=True)
        write_parquet(folder / "answers.parquet", self.answer_table())
        about = {
            "kind": _KIND,
            "version": _VERSION,
            "ids": self.ids,
            "groups": self.groups,
            "controls": self.controls,
            "pictures": self.pictures,
            "masks": [asdict(mask) for mask in self.masks],
            "provenance": self.provenance,
            "answers": digest_of_file(folder / "answers.parquet"),
        }
        write_text(folder / "table.csv", self.table().to_csv(index=False))
        write_text(folder / "summary.csv", self.summary().to_csv(index=False))
        plain = json.loads(json.dumps(about, default=str))
        write_text(folder / "knockout.json", json.dumps(_files.sealed(plain), indent=1))

    @classmethod
    def load(cls, folder: str | Path) -> "KnockoutResult":
        """What `save` wrote.

        Args:
            folder: the folder that was saved to.

        Raises:
            FileFormatError: the files are damaged, of another kind, or do not fit together.
        """
        folder = path_of("folder", folder, MismatchError)
        try:
            about = json.loads((folder / "knockout.json").read_text(encoding="utf-8"))
            if about["kind"] != _KIND or about["version"] != _VERSION:
                raise ValueError(f"kind {about['kind']!r}, version {about['version']!r}")
            about = _files.unsealed(about)
            if about["answers"] != digest_of_file(folder / "answers.parquet"):
                raise ValueError("answers.parquet does not agree with its checksum in knockout.json; it was changed")
            masks = tuple(
                Mask(
                    str(m["selector"]),
                    int(m["repeat"]),
                    str(m["group"]),
                    int(m["size"]),
                    str(m["intervention"]),
                    tuple(int(n) for n in m["layers"]),
                )
                for m in about["masks"]
            )
            ids, groups = tuple(map(str, about["ids"])), tuple(map(str, about["groups"]))
            controls, provenance = tuple(map(str, about["controls"])), dict(about["provenance"])
            pictures = None if about["pictures"] is None else tuple(map(str, about["pictures"]))
            kept = read_parquet(folder / "answers.parquet")
            n_runs = int(kept["run"].max()) + 1 if len(kept) else 1 + len(masks)
            found = (n_runs, len(kept) // n_runs)
        except (OSError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
            raise FileFormatError(f"{folder} does not hold a knockout result: {error}") from error
        shape = (1 + len(masks), len(ids))
        if found != shape or len(kept) != shape[0] * shape[1]:
            raise FileFormatError(f"{folder}: answers of shape {found} where the index says {shape}")
        if pictures is not None and len(pictures) != len(ids):
            raise FileFormatError(f"{folder}: {len(ids)} questions with {len(pictures)} pictures")
        if len(groups) != len(ids):
            raise FileFormatError(f"{folder}: {len(ids)} questions with {len(groups)} groups")
        expected = {
            "run": np.repeat(np.arange(shape[0]), shape[1]),
            "id": np.tile(np.array(ids, dtype=object), shape[0]),
            "group": np.tile(np.array(groups, dtype=object), shape[0]),
        }
        for name, values in expected.items():
            if not np.array_equal(kept[name].to_numpy(dtype=values.dtype), values):
                raise FileFormatError(f"{folder}: the column {name!r} of answers.parquet is not that of knockout.json")
        texts = kept["text"].to_numpy(dtype=object, na_value=None).reshape(shape)
        return cls(
            ids,
            groups,
            kept["answer"].to_numpy(np.int64)[: shape[1]].copy(),
            masks,
            kept["chosen"].to_numpy(np.int64).reshape(shape),
            kept["margin"].to_numpy(np.float64).reshape(shape),
            provenance,
            None if all(text is None for text in texts.flat) else texts,
            controls,
            pictures,
        )

    def __repr__(self) -> str:
        if not self.ids:
            return f"KnockoutResult(no questions, {len(self.masks)} masks of {', '.join(self.selectors)})"
        return (
            f"KnockoutResult({len(self.ids)} questions of {len(set(self.groups))} groups, {len(self.masks)} masks of "
            f"{', '.join(self.selectors)}; clean accuracy {self.correct[0].mean():.1%})"
        )
