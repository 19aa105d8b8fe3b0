"""The arithmetic of a study: effects of masks, their intervals, and tests, on arrays of changes.

Nothing here knows models or files. A *change* is what a mask does to one question: 1 where a wrong answer turns right,
-1 where a right one turns wrong, and otherwise 0 (or it is a difference of margins, in nats); it is NaN where the
question was not asked under the mask. Repeats of a control are averaged beforehand. Questions that belong together,
such as those about one picture, are a *cluster*. The questions of one group in one cluster are a *unit*, and everything
random draws units. The formulas are in docs/methods.md, "Effects".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from vlmneurons.checks import as_fraction, as_number, as_whole
from vlmneurons.errors import MismatchError
from vlmneurons.trust.pvalues import flip_pvalues

VALUES = ("correct", "margin", "score")
"""What an effect is measured on: whether the answer is right (shares of 1), its margin (nats), or its score."""

LEAST_UNITS, LEAST_CHANGED = 12, 20
"""Units, and questions whose answers changed where effects are of answers, below which there is no interval."""

Members = Sequence[np.ndarray]
"""For each group the places of its questions."""

NO_GROUP = "all"
"""Stands for the group of a mask that is of no group, and in tables for all groups together."""


# -- what masks do to each question ------------------------------------------------------------------------------------


def question_effects(change: np.ndarray, masks: Sequence[str], groups: Sequence[str]) -> np.ndarray:
    """Self effect, cross effect and gap, question by question.

    Args:
        change: ``[mask, question]`` changes of one selector; NaN where a question was not asked under a mask.
        masks: the group of each mask; ``"all"`` for a set that is of no group, which counts among the others only where
            there are no masks of groups.
        groups: the group of each question.

    Returns:
        In the unit of the changes, ``[3, question]``. The first row is the change under the mask of the question's own
        group, the second the mean change under the other masks that the question met, the third the first less the
        second; NaN where there is none.
    """
    of_own_group = np.array(masks)[:, None] == np.array(groups)[None]
    named = np.array([mask != NO_GROUP for mask in masks])
    of_others = ~of_own_group & (named if named.any() else ~named)[:, None]
    self_effect, cross_effect = mean_of_known(change, of_own_group), mean_of_known(change, of_others)
    return np.stack([self_effect, cross_effect, self_effect - cross_effect])


def mean_of_known(values: np.ndarray, counted: np.ndarray | bool = True) -> np.ndarray:
    """Means over the first axis of what is counted and not NaN, in the unit of the values; NaN of nothing.

    Args:
        values: ``[row, ...]`` numbers; the result is ``[...]``.
        counted: which of them enter, in the same shape.
    """
    entering = ~np.isnan(values) & counted
    with np.errstate(invalid="ignore"):
        return np.where(entering, values, 0.0).sum(0) / entering.sum(0)


# -- means over groups, with their spread ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Estimates:
    """Means over the questions of each group, and over all groups, with what intervals and tests are made of.

    ``place`` numbers the groups, in order; the last place is all groups together: the mean of the groups' means, of
    those that have any question. ``unit`` numbers the units of a place; those of all groups together are pictures.

    Attributes:
        value: ``[row, place]`` means.
        n: ``[row, place]`` questions that enter.
        units: ``[row, place]`` units that these questions are in.
        changed: ``[row, place]`` questions among them whose value is not 0: whose answers changed.
        variance: ``[row, place]`` of the mean, linearised by unit; NaN where a group has one unit only.
        freedom: ``[row, place]`` degrees of freedom of the variance.
        totals: for each place ``[row, unit]``, what each unit adds to the mean.
        spread: ``[row, picture]`` what each picture adds to the deviation of the mean over all groups.
        in_group: ``[group, row, picture]`` whether a picture has questions of a group that enter.
    """

    value: np.ndarray
    n: np.ndarray
    units: np.ndarray
    changed: np.ndarray
    variance: np.ndarray
    freedom: np.ndarray
    totals: tuple[np.ndarray, ...]
    spread: np.ndarray
    in_group: np.ndarray

    def pooled(self) -> "Estimates":
        """The mean over rows of the means over all groups, as one row with that place alone.

        For example the mean of what masks do to the groups that they are not of: each row leaves out another group.
        Rows without questions are left out.
        """
        rows = np.flatnonzero(self.n[:, -1] > 0)
        if not len(rows):
            unknown, zero = np.full((1, 1), np.nan), np.zeros((1, 1), dtype=np.int64)
            return Estimates(unknown, zero, zero, zero, unknown, unknown, self.totals[-1:], self.spread, self.in_group)
        spread = self.spread[rows].mean(0, keepdims=True)
        in_group = self.in_group[:, rows].max(1, keepdims=True)  # in any of the rows
        freedom = _satterthwaite(spread, in_group, self.units[rows, :-1].max(0)[None])
        variance = np.where(np.isnan(self.variance[rows, -1]).any(), np.nan, (spread**2).sum(1))
        return Estimates(
            self.value[rows, -1].mean(keepdims=True)[None],
            self.n[rows, -1].sum(keepdims=True)[None],
            in_group.any(0).sum(1)[None],
            self.changed[rows, -1].sum(keepdims=True)[None],
            variance[None],
            freedom[None],
            (self.totals[-1][rows].mean(0, keepdims=True),),
            spread,
            in_group,
        )

    def bounds(self, confidence: float, value: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``[row, place]`` lower and upper bounds of t intervals, and whether there is too little for them (then NaN).

        There is where fewer than `LEAST_UNITS` units enter, or where too few questions have changed.

        Args:
            confidence: level, in (0, 1).
            value: what the changes are of. Of answers (``"correct"``) at least `LEAST_CHANGED` must have changed; of
                scores as many, or all of them; of margins none has to.
        """
        # Where all units have the same value, their variance is rounding, and no spread.
        few = (self.units < LEAST_UNITS) | ~(self.variance > (1e-9 * self.value) ** 2)
        if value != "margin":
            few |= (self.changed < LEAST_CHANGED) & ((value == "correct") | (self.changed < self.n))
        freedom = np.where(few, 1.0, self.freedom)
        reach = scipy_stats.t.ppf(0.5 + confidence / 2, freedom) * np.sqrt(np.where(few, np.nan, self.variance))
        return self.value - reach, self.value + reach, few & (self.n > 0)

    def pvalues(
        self, permutations: int, seed: Sequence[int], least: int = 1, places: Sequence[int] | None = None
    ) -> np.ndarray:
        """``[row, place]`` p-values of sign flips of units; see `vlmneurons.trust.pvalues.flip_pvalues`.

        Args:
            permutations: number of flips; all there are, where these are fewer.
            seed: seeds of the flips.
            least: units that a test must have; NaN for fewer.
            places: which are tested; by default all.
        """
        p = np.full(self.value.shape, np.nan)
        for place in range(len(self.totals)) if places is None else places:
            tested = np.flatnonzero((self.n[:, place] > 0) & (self.units[:, place] >= least))
            if permutations and len(tested):
                generator = np.random.default_rng([*seed, place])
                p[tested, place] = flip_pvalues(self.totals[place][tested], permutations, generator)
        return p


def estimates(values: np.ndarray, members: Members, clusters: np.ndarray | None = None) -> Estimates:
    """Means of values over the questions of each group and over all groups, linearised by unit.

    With ``y_u`` the sum of a unit's values, ``n_u`` its questions and ``r`` the mean of a group of ``U`` units and
    ``n`` questions, the variance of ``r`` is ``U / (U - 1) * sum((y_u - r n_u) ** 2) / n ** 2`` with ``U - 1`` degrees
    of freedom. Over groups, what the units of one picture contribute is summed before it is squared, and the degrees of
    freedom are Satterthwaite's, over kinds of pictures: a kind is the pictures that the same groups have questions
    about.

    Args:
        values: ``[row, question]`` numbers; NaN where there is none.
        members: questions of each group; a question is of one group at most.
        clusters: the number of each question's cluster; None for questions that stand alone.
    """
    n_rows, n_questions = values.shape
    cluster = np.arange(n_questions) if clusters is None else clusters
    # Pictures are numbered anew without those of no group, so that these draw no flips.
    pictures = np.unique(np.concatenate([cluster[:0], *(cluster[places] for places in members)]))
    picture, n_pictures = np.searchsorted(pictures, cluster), len(pictures)
    entering = ~np.isnan(values)
    filled = np.where(entering, values, 0.0)
    n, units, changed, sums, variance = (np.zeros((n_rows, len(members) + 1)) for _ in range(5))
    totals: list[np.ndarray] = []
    whole_total, whole_spread = np.zeros((n_rows, n_pictures)), np.zeros((n_rows, n_pictures))
    in_group = np.zeros((len(members), n_rows, n_pictures), dtype=bool)
    with np.errstate(divide="ignore", invalid="ignore"):
        for place, questions in enumerate(members):
            if not len(questions):
                totals.append(np.zeros((n_rows, 0)))
                continue
            # The questions of a unit stand together, so that its sums are those of a run of columns.
            ordered = questions[np.argsort(picture[questions], kind="stable")]
            numbers, starts = np.unique(picture[ordered], return_index=True)
            y, sizes = (np.add.reduceat(part[:, ordered].astype(float), starts, axis=1) for part in (filled, entering))
            n[:, place], sums[:, place] = sizes.sum(1), y.sum(1)
            units[:, place], changed[:, place] = (sizes > 0).sum(1), (filled[:, questions] != 0).sum(1)
            size = n[:, place, None]
            totals.append(np.where(size > 0, y / size, 0.0))
            spread = np.sqrt(units[:, place] / (units[:, place] - 1))[:, None] * (
                y / size - sizes * y.sum(1, keepdims=True) / size**2
            )
            variance[:, place] = (spread**2).sum(1)
            whole_total[:, numbers] += totals[-1]
            whole_spread[:, numbers] += np.where(size > 0, spread, 0.0)
            in_group[place][:, numbers] = sizes > 0
        n_groups = (n[:, :-1] > 0).sum(1)
        value = sums / n
        value[:, -1] = np.where(n[:, :-1] > 0, value[:, :-1], 0).sum(1) / n_groups
        totals.append(np.where(n_groups[:, None] > 0, whole_total / n_groups[:, None], 0.0))
        n[:, -1], changed[:, -1], units[:, -1] = n.sum(1), changed.sum(1), in_group.any(0).sum(1)
        spread = whole_spread / n_groups[:, None]
        variance[:, -1] = (spread**2).sum(1)
        freedom = units - 1
        freedom[:, -1] = _satterthwaite(spread, in_group, units[:, :-1])
    value[n == 0] = np.nan
    variance[(n == 0) | ~np.isfinite(variance)] = np.nan
    n, units, changed = (table.astype(np.int64) for table in (n, units, changed))
    return Estimates(value, n, units, changed, variance, freedom, tuple(totals), spread, in_group)


def _satterthwaite(spread: np.ndarray, in_group: np.ndarray, units: np.ndarray) -> np.ndarray:
    """``[row]`` degrees of freedom of a variance that is a sum over pictures.

    Pictures of one kind, which have questions of the same groups, estimate one variance. A group of U units spends one
    of its degrees of freedom on its mean, 1 / U for each picture; a picture of several groups spends the mean of what
    it would spend in each.

    Args:
        spread: ``[row, picture]`` what each picture adds, before it is squared.
        in_group: ``[group, row, picture]`` whether a picture has questions of a group.
        units: ``[row, group]`` units of each group.
    """
    n_groups, n_rows, n_pictures = in_group.shape
    if not in_group.size:
        return np.full(n_rows, np.nan)
    codes = in_group.reshape(n_groups, -1)
    if n_groups <= 62:  # one whole number for each picture is sorted far faster than its column
        codes = (1 << np.arange(n_groups)) @ codes.astype(np.int64)
    kinds, kind = np.unique(codes, axis=codes.ndim - 1, return_inverse=True)
    n_kinds = kinds.shape[-1]
    place = kind.reshape(n_rows, n_pictures) + n_kinds * np.arange(n_rows)[:, None]

    def by_kind(values: np.ndarray) -> np.ndarray:
        summed = np.bincount(place.reshape(-1), values.reshape(-1), n_rows * n_kinds)
        return summed.reshape(n_rows, -1)

    spent = np.einsum("grp,rg->rp", in_group, 1 / np.maximum(units, 1)) / np.maximum(in_group.sum(0), 1)
    part, degrees = by_kind(spread**2), by_kind(np.where(in_group.any(0), 1 - spent, 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):  # no spread, no degrees
        return part.sum(1) ** 2 / np.where(part > 0, part**2 / degrees, 0.0).sum(1)


# -- pairs -------------------------------------------------------------------------------------------------------------


def excess(delta: np.ndarray, is_self: np.ndarray, n: np.ndarray | None = None) -> np.ndarray:
    """What is left of each cross effect when the averages of its mask and of its group are taken out.

    A mask that harms every group, and a group that every mask harms, say nothing about a relation between two. A model
    ``delta[m, e] = mask m + group e`` is fitted to all but the self effects, by least squares weighted with the number
    of questions; the residuals are returned, negative where a mask harms a group more than expected. They are NaN at
    the self effects, in cells without questions, and in cells that the model fits whatever their value is (the only
    cell of a mask or group).

    Args:
        delta: ``[mask, group]`` changes; the result is in the unit of these.
        is_self: ``[mask, group]`` whether the mask is the group's.
        n: ``[mask, group]`` questions of each cell; by default the same in all.
    """
    weight = np.ones(delta.shape) if n is None else np.asarray(n, dtype=float)
    rows, columns = np.nonzero(~is_self & ~np.isnan(delta) & (weight > 0))
    root = np.sqrt(weight[rows, columns])[:, None]
    design = np.zeros((len(rows), sum(delta.shape)))
    design[range(len(rows)), rows] = 1
    design[range(len(rows)), len(delta) + columns] = 1
    residuals = np.full(delta.shape, np.nan)
    if len(rows):
        solve = np.linalg.pinv(root * design)
        residual = delta[rows, columns] - design @ (solve @ (root[:, 0] * delta[rows, columns]))
        free = 1 - np.einsum("cp,pc->c", root * design, solve) > 1e-9  # of leverage 1: fitted whatever it is
        residuals[rows, columns] = np.where(free, residual, np.nan)
    return residuals


# -- planning ----------------------------------------------------------------------------------------------------------


def detectable(
    pictures: int,
    *,
    questions: int = 1,
    groups: int = 8,
    k: int | None = None,
    spread: float = 0.35,
    others: float | None = None,
    within: float = 0.0,
    between: float = 0.0,
    power: float = 0.8,
    alpha: float = 0.05,
    tests: int = 1,
    value: str = "correct",
) -> pd.DataFrame:
    """The smallest effects that a design can be expected to find, before anything is run.

    An effect is found where its two-sided p is below ``alpha / tests``. With ``s`` the standard error of an estimate
    and ``f`` its degrees of freedom, an effect of ``(t(1 - alpha / (2 tests), f) + t(power, f)) * s`` is found in a
    share ``power`` of studies (the usual approximation). With U pictures of m questions in each group, and G groups,

        s ** 2 = V * (1 + (m - 1) * within) / (U * m)                  f = U - 1        one group
        s ** 2 = that / G                                              f = G * (U - 1)  the mean over groups

    and V the variance of one question's value: ``spread ** 2`` for the self effect, ``others ** 2 * (between +
    (1 - between) / k)`` for the cross effect, the sum of both less ``2 * between * spread * others`` for the gap, and
    ``2 * (1 - between) * spread ** 2`` for the difference of two selectors' self effects.

    Answers are counted: when signs are flipped, a sum of them moves in steps of two, and a test loses half a step on
    average. So for ``value="correct"`` one answer's share is added, ``1 / (U * m)`` (``1 / (U * m * k)`` for cross
    effect and gap; over G for all groups); and as an effect e changes at least as large a share of the answers, V is at
    least ``e * (1 - e)`` for the self effect and the difference.

    Args:
        pictures: evaluation pictures of each group.
        questions: about each picture.
        groups: number of groups.
        k: masks of other groups that each question meets; None for all of them.
        spread: standard deviation, over questions, of the change under the mask of their own group: for answers the
            root of the share that changes less the effect's square (about 0.35 where an eighth changes), for margins in
            nats.
        others: the same under another group's mask; by default as large.
        within: correlation of the changes of two questions about one picture, from 0 to 1.
        between: correlation of the changes of one question under two masks, from 0 to 1.
        power: share of studies in which the effect is to be found.
        alpha: level of the test.
        tests: number of tests that p is corrected for (each is held to ``alpha / tests``).
        value: what changes: ``"correct"``, ``"margin"`` or ``"score"``.

    Returns:
        A row for each of ``self_effect``, ``cross_effect``, ``gap`` and ``difference`` (column ``effect``), with the
        smallest effect of ``one_group`` and of the mean over ``all_groups``, in the unit of ``spread`` (0.1 is ten
        points).

    Raises:
        MismatchError: a number that makes no sense, more others than there are, or no such value.

    Examples:
        >>> detectable(pictures=50, groups=25, k=2).round(3)
                 effect  one_group  all_groups
        0   self_effect      0.173       0.029
        1  cross_effect      0.110       0.020
        2           gap      0.183       0.034
        3    difference      0.220       0.040
    """
    units = as_whole("pictures", pictures, MismatchError, least=2)
    size = as_whole("questions", questions, MismatchError, least=1)
    n_groups = as_whole("groups", groups, MismatchError, least=2)
    met = n_groups - 1 if k is None else as_whole("k", k, MismatchError, least=1)
    tests = as_whole("tests", tests, MismatchError, least=1)
    if met >= n_groups:
        raise MismatchError(f"k={met} other masks are more than {n_groups} groups have; at most {n_groups - 1}")
    power, alpha = as_fraction("power", power, MismatchError), as_fraction("alpha", alpha, MismatchError)
    check_value(value)
    spread = as_number("spread", spread, MismatchError)
    others = spread if others is None else as_number("others", others, MismatchError)
    within, between = as_number("within", within, MismatchError), as_number("between", between, MismatchError)
    if min(spread, others) < 0:
        raise MismatchError(f"spread and others are standard deviations, and not below 0; got {spread} and {others}")
    if not 0 <= within <= 1 or not 0 <= between <= 1:
        raise MismatchError(f"within and between are correlations from 0 to 1; got {within} and {between}")
    cross = others**2 * (between + (1 - between) / met)
    variances = {
        "self_effect": spread**2,
        "cross_effect": cross,
        "gap": spread**2 + cross - 2 * between * spread * others,
        "difference": 2 * (1 - between) * spread**2,
    }
    rows = []
    for effect, variance in variances.items():
        of_one_mask = effect in ("self_effect", "difference")  # a question's value is of one answer under each selector
        row: dict[str, object] = {"effect": effect}
        for column, over in (("one_group", 1), ("all_groups", n_groups)):
            n = over * units * size
            reach = scipy_stats.t.ppf([1 - alpha / (2 * tests), power], over * (units - 1)).sum()
            step = 1 / n / (1 if of_one_mask else met) if value == "correct" else 0.0
            smallest = 0.0
            # The least variance depends on the effect, and the effect on the variance: their fixed point.
            for _ in range(100 if value == "correct" and of_one_mask else 1):
                least = min(smallest, 0.5) * (1 - min(smallest, 0.5))
                smallest = reach * np.sqrt(max(variance, least) * (1 + (size - 1) * within) / n) + step
            row[column] = float(smallest)
        rows.append(row)
    return pd.DataFrame(rows)


def check_value(value: str) -> None:
    """Refuse a value that effects are not measured on.

    Raises:
        MismatchError: it is not one of `VALUES`.
    """
    if value not in VALUES:
        raise MismatchError(f"value={value!r} is not among those that effects are measured on: {', '.join(VALUES)}")
