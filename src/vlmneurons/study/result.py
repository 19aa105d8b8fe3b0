"""The result of a study: every answer, and the tables that follow from them."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import DTypeLike

from vlmneurons.checks import JSONMapping, as_path, check_choice
from vlmneurons.errors import FileFormatError, MismatchError
from vlmneurons.files import tables as _files
from vlmneurons.files.atomic import read_parquet, write_parquet, write_text
from vlmneurons.files.digests import digest_of_file
from vlmneurons.study import tables
from vlmneurons.study.masks import Mask, split_setting
from vlmneurons.study.tables import Inference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vlmneurons.neurons.selection import Selection
    from vlmneurons.questions.question import Question
    from vlmneurons.questions.sets import QuestionSet

RUN = "vlmneurons knockout run"
"""The kind of the manifest of a folder in which `vlmneurons.knockout` runs."""

_KIND, _VERSION, _READABLE = "vlmneurons knockout", 4, (3, 4)

CONDITIONS = ("all", "correct", "wrong")
"""Which questions enter a table: all, or those that the clean model answers right or wrong."""

VALUES = ("correct", "margin", "score")
"""What an effect is measured on: whether the answer is right (shares of 1), its margin (nats), or its score."""

NOT_ASKED = -2
"""Stands for the chosen option where a question was not asked under a mask."""


@dataclass(frozen=True, eq=False)
class KnockoutResult:
    """Every answer to every question, clean and under every mask, and the effects computed from them.

    Attributes:
        ids: ids of the questions.
        groups: group of each question.
        answers: index of the right option of each question.
        masks: what was switched off.
        chosen: ``[1 + mask, question]`` index of the chosen option, row 0 clean; -1 where a generated text names none,
            -2 where the question was not asked under the mask.
        margins: ``[1 + mask, question]`` log-probability of the right option less that of the best other one, in nats;
            NaN for generated answers, and for what was not asked.
        provenance: model, revision, rules, versions.
        texts: ``[1 + mask, question]`` generated texts; None for answers that are not generated.
        controls: groups that no mask is of: questions that measure general ability. They are left out of all effects
            between groups.
        pictures: name of each question's picture, equal for questions that share one; None where that is not known.
        asked: ``[1 + mask, question]`` whether a question was asked under a mask (see `vlmneurons.study.design`); None
            where all were. What was not asked is missing from all tables, never zero.
        scores: ``[1 + mask, question]`` the score of each answer to an open question, or the mean log-likelihood of
            each text (nats); NaN for what was not asked, None for answers that are not graded. Of graded answers
            ``chosen`` is 0 where the score reaches the reader's threshold, as is ``answers``, and else 1.

    Raises:
        MismatchError: ``asked`` has another shape than the answers, or leaves out a clean one.
    """

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    answers: np.ndarray
    masks: tuple[Mask, ...]
    chosen: np.ndarray
    margins: np.ndarray
    provenance: JSONMapping = field(default_factory=dict)
    texts: np.ndarray | None = None
    controls: tuple[str, ...] = ()
    pictures: tuple[str, ...] | None = None
    asked: np.ndarray | None = None
    scores: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.asked is None:
            return
        asked = np.asarray(self.asked, dtype=bool)
        if asked.shape != self.chosen.shape or not asked[0].all():
            raise MismatchError(
                f"asked is whether each question met each mask, of shape {self.chosen.shape} as the answers, and every "
                f"question is asked clean; got the shape {asked.shape}"
                + (f", and {int((~asked[0]).sum())} questions without a clean answer" if asked.size else "")
            )
        # Whatever stands where nothing was asked must not be taken for an answer.
        kept = {
            "asked": None if asked.all() else asked,
            "chosen": np.where(asked, self.chosen, NOT_ASKED),
            "margins": np.where(asked, self.margins, np.nan),
            "texts": None if self.texts is None else np.where(asked, self.texts, np.array(None)),
            "scores": None if self.scores is None else np.where(asked, self.scores, np.nan),
        }
        for name, value in kept.items():
            object.__setattr__(self, name, value)

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
        """``[1 + mask, question]`` whether the answer is right, row 0 clean; False where there is none."""
        return self.chosen == self.answers

    @property
    def measure(self) -> str:
        """The value that effects are measured on unless another is asked for: the score, where answers are graded."""
        return "correct" if self.scores is None else "score"

    def values(self, value: str = "correct") -> np.ndarray:
        """``[1 + mask, question]`` what effects are differences of, row 0 clean; NaN where there is none.

        Args:
            value: ``"correct"``, 1 for a right answer and 0 for a wrong one (an accuracy is a mean of these),
                ``"margin"``, in nats, or ``"score"``.

        Raises:
            MismatchError: the result holds no such value.
        """
        if value == "correct":
            correct = self.correct.astype(float)
            return correct if self.asked is None else np.where(self.asked, correct, np.nan)
        if value == "margin":
            if self.margins.size and np.isnan(self.margins).all():
                raise MismatchError(
                    "value='margin': these answers have none, as they were not read from options' logits"
                )
            return self.margins
        if value == "score":
            if self.scores is None:
                raise MismatchError(
                    "value='score': these answers have no score; those of open questions do, read by "
                    "vn.Generate(scorer=…), and running text"
                )
            return self.scores
        raise MismatchError(f"value={value!r} is not among those that effects are measured on: {', '.join(VALUES)}")

    def rows_of(self, selector: str) -> list[int]:
        """Rows of the answers under a selector's masks.

        Args:
            selector: one of `selectors`.

        Raises:
            MismatchError: there is no such selector.
        """
        rows = [row for row, mask in enumerate(self.masks, start=1) if mask.selector == selector]
        if not rows:
            raise MismatchError(f"there is no selector {selector!r} here; there are {', '.join(self.selectors)}")
        return rows

    @property
    def accuracy(self) -> dict[str, float]:
        """Clean accuracy of each group."""
        names = [*self.group_names, *self.control_names]
        members = tables.members_of(self, names)
        return {name: float(self.correct[0][own].mean()) for name, own in zip(names, members, strict=True)}

    def where(self, condition: str) -> "KnockoutResult":
        """The questions that the clean model answers right (``"correct"``) or wrong (``"wrong"``), or ``"all"``.

        Args:
            condition: ``"correct"``, ``"wrong"`` or ``"all"``.

        Raises:
            MismatchError: no such condition.
        """
        check_choice("condition", condition, CONDITIONS, MismatchError)
        if condition == "all":
            return self
        return self.at(np.flatnonzero(self.correct[0] == (condition == "correct")))

    def at(self, places: Sequence[int] | np.ndarray) -> "KnockoutResult":
        """The result of some questions only, by their places, in the given order.

        Args:
            places: places within ``ids``.
        """
        return replace(
            self,
            ids=tuple(self.ids[n] for n in places),
            groups=tuple(self.groups[n] for n in places),
            pictures=None if self.pictures is None else tuple(self.pictures[n] for n in places),
            answers=self.answers[places],
            chosen=self.chosen[:, places],
            margins=self.margins[:, places],
            texts=None if self.texts is None else self.texts[:, places],
            scores=None if self.scores is None else self.scores[:, places],
            asked=None if self.asked is None else self.asked[:, places],
        )

    def select(self, *selectors: str) -> "KnockoutResult":
        """The result with the masks of some selectors only, in the given order.

        Raises:
            MismatchError: there is no such selector.
        """
        rows = [row for name in selectors for row in self.rows_of(name)]
        return replace(
            self,
            masks=tuple(self.masks[row - 1] for row in rows),
            chosen=self.chosen[[0, *rows]],
            margins=self.margins[[0, *rows]],
            texts=None if self.texts is None else self.texts[[0, *rows]],
            scores=None if self.scores is None else self.scores[[0, *rows]],
            asked=None if self.asked is None else self.asked[[0, *rows]],
        )

    def answer_table(self) -> pd.DataFrame:
        """Every answer, one row for each run and question that was asked: all that any statistic can be computed from.

        Columns: ``run`` (0 is the clean model), ``selector``, ``repeat``, ``mask``, ``intervention``, ``neurons``
        (empty names and 0 for the clean run), ``id``, ``group``, ``picture`` (empty where not known), ``answer`` (the
        right option), ``chosen`` (-1: could not be parsed), ``correct``, ``margin``, ``text``, and ``score`` where
        answers are graded.
        """
        return tables.answer_table(self)

    # -- tables --------------------------------------------------------------------------------------------------------

    def table(self, *, condition: str = "all") -> pd.DataFrame:
        """One row for each mask and each group of questions.

        Columns: ``selector``, ``repeat``, ``mask`` (the group whose neurons were off), ``group`` (of the questions),
        ``neurons``, ``n`` (questions that were asked; where it is 0, all that follows is NaN), ``clean`` and
        ``ablated`` (accuracy on these), ``delta``, ``flips`` (share of answers that changed), ``right_to_wrong``,
        ``wrong_to_right``, ``wrong_to_wrong`` (their shares), ``failures`` (share of ablated answers that could not be
        parsed), ``margin`` (mean change of the log-probability margin, nats); where answers are graded also
        ``clean_score`` and ``score`` (mean change of the score).

        Args:
            condition: ``"all"`` questions, or those that the clean model answers ``"correct"`` or ``"wrong"``.

        Raises:
            MismatchError: no such condition.
        """
        return tables.cell_table(self.where(condition))

    def matrix(self, selector: str, *, value: str | None = None, condition: str = "all") -> pd.DataFrame:
        """Effects of one selector: rows are masks, columns groups of questions; repeats are averaged.

        Control groups are the last columns. Cells without questions are NaN.

        Args:
            selector: which one.
            value: ``"correct"``, or any numeric column of `table`, such as ``"margin"``; by default `measure`.
            condition: which questions enter; see `table`.

        Raises:
            MismatchError: no such selector, column or condition.
        """
        part = self.select(selector).where(condition)
        table = part.table()
        value = "delta" if (value or self.measure) == "correct" else value or self.measure
        columns = [name for name in table.columns if name not in ("selector", "repeat", "mask", "group")]
        if value not in columns:
            raise MismatchError(f"value {value!r} is not a numeric column of the table; it has {', '.join(columns)}")
        matrix = table.groupby(["mask", "group"])[value].agg("mean").unstack("group")
        return matrix.loc[:, [*part.group_names, *part.control_names]]

    def effects(
        self,
        selector: str | None = None,
        *,
        value: str | None = None,
        confidence: float = 0.95,
        permutations: int = 2000,
        seed: int = 0,
        condition: str = "all",
        cluster: str = "picture",
    ) -> pd.DataFrame:
        """The effect of every mask on every group, with its interval and test; repeats of a control are averaged.

        Columns: ``selector``, ``mask``, ``group``, ``kind`` (``"self"``: the group's own mask; ``"other"``: that of
        another group, of the questions or not; ``"none"``: a set that is of no group; ``"control"``: any mask on a
        control group), ``n`` (questions asked), ``units`` (pictures that they are about), ``changed`` (questions among
        them with an effect that is not 0), ``effect``, ``low`` and ``high`` (its t interval, linearised by picture),
        ``few`` (whether there is no interval, for want of 12 units or, for ``"correct"``, of 20 changed answers),
        ``p`` (sign flips of pictures; of other effects than self effects only from 12 units on), ``p_holm`` and
        ``p_bh`` (corrected over the rows of the selector that are of the same kind: Holm bounds the chance of any false
        finding, Benjamini & Hochberg the share of false ones), ``exploratory`` (one setting of a sweep) and
        ``settings`` (how many settings of this selector the study was given, which no p is corrected for).

        Args:
            selector: one of `selectors`; all of them unless given.
            value: ``"correct"`` (effects are shares of 1), ``"margin"`` (nats) or ``"score"``; by default `measure`.
            confidence: level of the intervals.
            permutations: number of sign flips, 0 for no tests. At least 20 a test are made, so that a corrected p can
                be below 0.05 at all, and where there are fewer different ones, all of them.
            seed: of the sign flips.
            condition: which questions enter; see `table`.
            cluster: ``"picture"`` takes pictures with all their questions, which are not independent of each other, as
                units; ``"question"`` takes every question for itself.

        Raises:
            MismatchError: no such selector, value or condition, or a confidence outside (0, 1).
        """
        how = Inference(value or self.measure, confidence, permutations, seed, cluster)
        if selector is not None:
            self.rows_of(selector)
        return tables.effect_table(self.where(condition), [selector] if selector else self.selectors, how)

    def summary(
        self,
        *,
        value: str | None = None,
        confidence: float = 0.95,
        permutations: int = 2000,
        seed: int = 0,
        condition: str = "all",
        cluster: str = "picture",
    ) -> pd.DataFrame:
        """Self effect, cross effects and gap of each selector, per group and over all groups (``group == "all"``).

        The rows of a selector are the groups that it has masks of. A set that is of no group, and a selection whose
        groups are not those of the questions, have no self effect: their rows are all groups, and their cross effect is
        what they do to the group.

        Columns: ``selector``, ``group``, ``n``, ``pictures``, ``clean`` (accuracy; of ``"score"`` the mean score),
        ``self_effect`` (SE), ``cross_effect`` (ACE:
        other masks on this group, of those that each question met), ``cross_caused`` (this mask on other groups, of
        those in whose questions it was met: ``cross_groups`` of them), ``gap`` (SE - ACE, question by question), each
        followed by ``_low`` and ``_high``, the bounds of its t interval, linearised by picture (repeats of a random
        control are averaged, so the interval is about questions, not seeds), and ``few``, the names of those that have
        no interval, for want of 12 pictures or, for ``"correct"``, of 20 changed answers; ``self_margin`` and
        ``cross_margin``, the same effects on the log-probability margin (nats); ``flips``, ``right_to_wrong``,
        ``wrong_to_right`` and ``failures`` of the group's own mask, or of the masks there are; ``p``, ``cross_p`` and
        ``gap_p``, of the self effect, the cross effect and the gap, by flipping the signs of the pictures' changes (see
        `vlmneurons.trust.pvalues.flip_pvalues`); and each p corrected over the selector's groups, ``_holm`` (any false
        finding) and ``_bh`` (share of false findings); ``exploratory`` (one setting of a sweep) and ``settings`` (how
        many settings of this selector the study was given, which no p is corrected for). With control groups also
        ``control_effect``, the mean over control groups of what this mask does to them, and its bounds.

        Args:
            value: ``"correct"`` (effects are shares of 1), ``"margin"`` (nats) or ``"score"``; by default `measure`.
            confidence: level of the intervals.
            permutations: number of sign flips; see `effects`.
            seed: of the sign flips.
            condition: which questions enter; see `table`.
            cluster: ``"picture"`` takes pictures with all their questions, which are not independent of each other, as
                units; ``"question"`` takes every question for itself.

        Raises:
            MismatchError: no such value or condition, or a confidence outside (0, 1).
        """
        how = Inference(value or self.measure, confidence, permutations, seed, cluster)
        return tables.summary_table(self.where(condition), self.selectors, how)

    def pairs(
        self,
        selector: str,
        *,
        value: str | None = None,
        confidence: float = 0.95,
        permutations: int = 2000,
        seed: int = 0,
        condition: str = "all",
        cluster: str = "picture",
    ) -> pd.DataFrame:
        """Whose mask harms whom: the `effects` of every mask on every group of questions, and what is particular to it.

        Columns: ``mask``, ``group``, ``n``, ``units``, ``delta``, ``delta_low``, ``delta_high``, ``few``, ``excess``
        (what is left of a cross effect when the mask's and the group's averages are taken out, see
        `vlmneurons.study.effects.excess`; related groups have it below zero), ``p``, ``p_holm``, ``p_bh``,
        ``exploratory`` and ``settings``; see `effects`. Control groups are left out.

        Args:
            selector: which one.
            value: ``"correct"`` (effects are shares of 1), ``"margin"`` (nats) or ``"score"``; by default `measure`.
            confidence: level of the intervals.
            permutations: number of sign flips; see `effects`.
            seed: of the sign flips.
            condition: which questions enter; see `table`.
            cluster: ``"picture"`` takes pictures with all their questions, which are not independent of each other, as
                units; ``"question"`` takes every question for itself.

        Raises:
            MismatchError: no such selector, value or condition.
        """
        how = Inference(value or self.measure, confidence, permutations, seed, cluster)
        self.rows_of(selector)
        return tables.pair_table(self.where(condition), selector, how)

    def difference(
        self,
        first: str,
        second: str,
        *,
        value: str | None = None,
        confidence: float = 0.95,
        permutations: int = 2000,
        seed: int = 0,
        condition: str = "all",
        cluster: str = "picture",
    ) -> pd.DataFrame:
        """Whether one selector's effects differ from another's on the same questions, per group and over all groups.

        Columns: ``effect`` (``self_effect``, ``cross_effect`` or ``gap``), ``group``, ``n``, ``units``, ``changed``
        (questions that the two differ on), ``first`` and ``second`` (the effects of each), ``difference`` (first less
        second, question by question; below zero where the first harms more), ``low``, ``high`` and ``few`` (its
        interval, see `effects`), and ``p``, ``p_holm`` and ``p_bh``, by sign flips of pictures, corrected over groups.

        Args:
            first: name of a selector.
            second: name of another.
            value: ``"correct"`` (effects are shares of 1), ``"margin"`` (nats) or ``"score"``; by default `measure`.
            confidence: level of the intervals.
            permutations: number of sign flips; see `effects`.
            seed: of the sign flips.
            condition: which questions enter; see `table`.
            cluster: ``"picture"`` takes pictures with all their questions, which are not independent of each other, as
                units; ``"question"`` takes every question for itself.

        Raises:
            MismatchError: no such selectors, one name twice, or masks of groups that only one of the two has.

        Example:
            ``result.difference("CAS", "MAD").query("group == 'all'")``
        """
        how = Inference(value or self.measure, confidence, permutations, seed, cluster)
        return tables.difference_table(self.where(condition), first, second, how)

    def against_random(self, selector: str, control: str, *, value: str | None = None) -> pd.DataFrame:
        """A selector's effects among those of a random control's repeats, per group and over all groups.

        Columns: ``group``, ``effect`` (``self_effect``, ``cross_effect`` or ``gap``), ``value``, ``control_mean``,
        ``control_sd``, ``control_low`` and ``control_high`` (smallest and largest), ``repeats``, and ``p``: the share
        of repeats, ours included, whose effect is at most ours, which is never below ``1 / (1 + repeats)``.

        Args:
            selector: name of the selector.
            control: name of the random masks, given as a list of selections.
            value: ``"correct"`` (effects are shares of 1), ``"margin"`` (nats) or ``"score"``; by default `measure`.

        Raises:
            MismatchError: a name that is not there, one name for both, or groups that only one of the two has.
        """
        return tables.random_table(self, selector, control, value or self.measure)

    def curve(self, selector: str, axis: str, *, condition: str = "all", **how: Any) -> pd.DataFrame:
        """Effects of a selector along a sweep: the `summary` of its masks named by `setting_name`, with the setting.

        A sweep explores: its p-values are not corrected for the number of settings.

        Args:
            selector: the name before the setting.
            axis: what was varied, such as ``"r"``, ``"alpha"`` or ``"items"``.
            condition: which questions enter; see `table`.
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
        ordered = sorted(values, key=lambda name: values[name])
        table = tables.summary_table(self.where(condition), ordered, Inference(**{"value": self.measure, **how}))
        table.insert(0, axis, [values[name] for name in table["selector"]])
        return table.assign(selector=selector)

    def plot_matrix(
        self, selector: str | Sequence[str] | None = None, *, value: str | None = None, **how: Any
    ) -> "Figure":
        """Heat maps of `matrix`, masks by groups of questions; see `vlmneurons.plot_matrix`.

        Args:
            selector: one of `selectors`, or several side by side; all of them unless given.
            value: what is shown; see `matrix`.
            how: further arguments of `vlmneurons.plot_matrix`: ``order``, ``width``, ``ax``, ``limit``.
        """
        from vlmneurons.look.plots.matrices import plot_matrix

        return plot_matrix(self, selector, value=value, **how)

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

    def explore(
        self,
        folder: str | Path,
        questions: "QuestionSet | Sequence[Question]",
        selections: "Mapping[str, Selection]",
        **how: Any,
    ) -> Path:
        """A folder to click through, from effects to changed answers, neurons, pictures and words; opens from disk.

        Args:
            folder: a new one, or an explorer's.
            questions: those of this result.
            selections: the neurons of each selector, by its name here.
            how: further arguments of `vlmneurons.look.explorer.write_explorer`, such as ``model`` and ``stats``.

        Returns:
            The path of the page.
        """
        from vlmneurons.look.explorer import write_explorer

        return write_explorer(self, folder, questions, selections, **how)

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write every answer (``answers.parquet``), what they are of (``knockout.json``) and the tables (CSV).

        What was not asked has no row. Everything is written beside what is there before anything is replaced: on a full
        disk, or killed at any moment, an older result in the folder stays whole until the new one is. Where
        ``knockout.json`` is, the result is complete. It has checksums of itself and of the answers, so that an answer
        that has changed since is noticed. A part of a run (`join`) has no tables, which would be of too few questions.

        Args:
            folder: where the files go; it is made if it is not there.
        """
        folder = as_path("folder", folder, MismatchError)
        folder.mkdir(parents=True, exist_ok=True)
        _finish(folder)
        names = () if "part" in self.provenance else ("table.csv", "summary.csv")
        beside = {name: folder / f".new-{name}" for name in (*names, "knockout.json", _ANSWERS)}
        try:
            write_parquet(beside[_ANSWERS], self.answer_table())
            about = {
                "kind": _KIND,
                "version": _VERSION,
                "ids": self.ids,
                "groups": self.groups,
                "controls": self.controls,
                "pictures": self.pictures,
                "masks": [asdict(mask) for mask in self.masks],
                "provenance": self.provenance,
                "answers": digest_of_file(beside[_ANSWERS]),
            }
            for name in names:
                table = self.table() if name == "table.csv" else self.summary()
                write_text(beside[name], table.to_csv(index=False))
            plain = json.loads(json.dumps(about, default=str))
            write_text(beside["knockout.json"], json.dumps(_files.sealed(plain), indent=1))
        except BaseException:
            for path in beside.values():
                path.unlink(missing_ok=True)
            raise
        # The index decides which answers are the result's: from here on, `load` finds the new ones under either name.
        for name, path in beside.items():
            os.replace(path, folder / name)

    @classmethod
    def load(cls, folder: str | Path) -> "KnockoutResult":
        """What `save` wrote.

        Args:
            folder: the folder that was saved to.

        Raises:
            FileFormatError: the files are damaged, of another kind, or do not fit together.
        """
        folder = as_path("folder", folder, MismatchError)
        try:
            about = json.loads((folder / "knockout.json").read_text(encoding="utf-8"))
            if about["kind"] != _KIND or about["version"] not in _READABLE:
                raise ValueError(f"kind {about['kind']!r}, version {about['version']!r}")
            about = _files.unsealed(about)
            kept = _kept_answers(folder, about["answers"])
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
            runs = kept["run"].to_numpy(np.int64)
            found = (int(runs.max()) + 1 if len(runs) else 1 + len(masks), int((runs == 0).sum()))
        except (OSError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
            raise FileFormatError(f"{folder} does not hold a knockout result: {error}") from error
        shape = (1 + len(masks), len(ids))
        full = about["version"] == 3  # which knew no other
        if found[1] != shape[1] or found[0] > shape[0] or (full and (found != shape or len(kept) != np.prod(shape))):
            raise FileFormatError(f"{folder}: answers of shape {found} where the index says {shape}")
        if pictures is not None and len(pictures) != len(ids):
            raise FileFormatError(f"{folder}: {len(ids)} questions with {len(pictures)} pictures")
        if len(groups) != len(ids):
            raise FileFormatError(f"{folder}: {len(ids)} questions with {len(groups)} groups")
        number = {name: place for place, name in enumerate(ids)}
        places = np.array([number.get(name, -1) for name in kept["id"].to_numpy(object)], dtype=np.int64)
        asked = np.zeros(shape, dtype=bool)
        asked[runs, places] = True
        expected = {
            "run": np.nonzero(asked)[0],
            "id": np.array(ids, dtype=object)[np.nonzero(asked)[1]],
            "group": np.array(groups, dtype=object)[np.nonzero(asked)[1]],
        }
        for name, values in expected.items():
            if not np.array_equal(kept[name].to_numpy(dtype=values.dtype), values):
                raise FileFormatError(f"{folder}: the column {name!r} of answers.parquet is not that of knockout.json")

        def table(name: str, dtype: DTypeLike, missing: object, **how: Any) -> np.ndarray:
            values = np.full(shape, missing, dtype=dtype)
            values[asked] = kept[name].to_numpy(dtype, **how)
            return values

        texts = table("text", object, None, na_value=None)
        return cls(
            ids,
            groups,
            kept["answer"].to_numpy(np.int64)[: shape[1]].copy(),
            masks,
            table("chosen", np.int64, NOT_ASKED),
            table("margin", np.float64, np.nan),
            provenance,
            None if all(text is None for text in texts.flat) else texts,
            controls,
            pictures,
            asked,
            table("score", np.float64, np.nan) if "score" in kept else None,
        )

    @classmethod
    def join(cls, folders: Sequence[str | Path], out: str | Path) -> "KnockoutResult":
        """Put the parts of a run together, each made by ``knockout(…, part="3/8", folder=…)``.

        Or undivided runs of the same questions under different masks, such as one run a selector: their sum is saved.

        The files are those of an undivided run, byte for byte; only what sessions have noted of themselves
        (``sessions.jsonl``, and how batches were halved for want of memory) is their own. A join that was killed is
        done again by the same call.

        Args:
            folders: of all parts, in any order.
            out: where the whole goes.

        Returns:
            The whole result.

        Raises:
            MismatchError: parts of other settings, questions or masks; one that is there twice, lacks, or is not
                finished; or ``out`` holds another run.
            FileFormatError: a part is damaged.

        Example:
            ``KnockoutResult.join([f"run/knockout-{n}" for n in range(1, 9)], "run/knockout")``
        """
        from vlmneurons.study.joining import join_results

        return join_results(folders, as_path("out", out, MismatchError))

    def __add__(self, other: "KnockoutResult") -> "KnockoutResult":
        """Both results as one: the same questions under further masks, or further questions under the same masks.

        Of runs of one setting, choices are those of one run, and margins within 1e-5 nats. The clean answers to the
        same questions must be the same; the first result's are kept. Questions that share a picture do so across
        results too; questions of several pictures are known to share one only within a result.

        Raises:
            MismatchError: other settings, plans or control groups; a mask or a question that both have; questions that
                only one of them asked under its masks, which would leave gaps; clean answers that differ; or a part,
                which is put together with `join`.

        Example:
            ``sum(vn.KnockoutResult.load(f"run/{name}") for name in ("CAS", "MAD"))``
        """
        from vlmneurons.study.joining import added

        return added(self, other) if isinstance(other, KnockoutResult) else NotImplemented

    def __radd__(self, other: object) -> "KnockoutResult":
        # sum() starts from 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __repr__(self) -> str:
        if not self.ids:
            return f"KnockoutResult(no questions, {len(self.masks)} masks of {', '.join(self.selectors)})"
        part = f"part {self.provenance['part']}: " if "part" in self.provenance else ""
        return (
            f"KnockoutResult({part}{len(self.ids)} questions of {len(set(self.groups))} groups, "
            f"{len(self.masks)} masks of {', '.join(self.selectors)}; clean accuracy {self.correct[0].mean():.1%})"
        )


def chance_of(options: Sequence[int]) -> float | None:
    """The accuracy of a guess among so many options of each question; None without questions, or with open ones.

    Args:
        options: their numbers.
    """
    return float(np.mean([1 / number for number in options])) if options and all(options) else None


_ANSWERS = "answers.parquet"


def _kept_answers(folder: Path, digest: str) -> pd.DataFrame:
    """The answers that an index is of: where `save` was killed between the two, they are still beside their place.

    Raises:
        ValueError: there are only others.
    """
    for path in (folder / _ANSWERS, folder / f".new-{_ANSWERS}"):
        if path.exists() and digest_of_file(path) == digest:
            return read_parquet(path)
    if not (folder / _ANSWERS).exists():
        raise FileNotFoundError(f"{_ANSWERS} is not there")
    raise ValueError("answers.parquet does not agree with its checksum in knockout.json; it was changed")


def _finish(folder: Path) -> None:
    """Put answers in their place that a killed `save` had yet to put there, so that the next one can write beside."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        about = json.loads((folder / "knockout.json").read_text(encoding="utf-8"))
        if digest_of_file(folder / f".new-{_ANSWERS}") == about["answers"]:
            os.replace(folder / f".new-{_ANSWERS}", folder / _ANSWERS)
