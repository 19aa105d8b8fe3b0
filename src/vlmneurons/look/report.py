"""A study's report: one page that needs nothing else, and every figure and table of it as a file.

The page holds its figures inside (SVG) and loads nothing, so it can be mailed or put beside a paper. Figures are
written as PNG (300 dpi), SVG and PDF, tables as CSV and LaTeX (booktabs, as wide as a column).
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vlmneurons._version import __version__
from vlmneurons.checks import JSONMapping, Keywords, path_of
from vlmneurons.errors import MismatchError
from vlmneurons.files.atomic import write_text
from vlmneurons.look.examples import changed_answers
from vlmneurons.look.figures import natural, ordered
from vlmneurons.look.numbers import printed, printed_p, printed_setting
from vlmneurons.look.pages import page_from
from vlmneurons.look.parts import UNITS, Part, file_name, write_parts
from vlmneurons.look.plots.effects import plot_accuracy, plot_curve, plot_effects, plot_flips, plot_random
from vlmneurons.look.plots.matrices import plot_matrix, plot_overlap
from vlmneurons.look.plots.neurons import plot_depth, plot_null
from vlmneurons.neurons.selection import Selection
from vlmneurons.questions.question import Question
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.study.masks import split_setting
from vlmneurons.study.result import NOT_ASKED, KnockoutResult

_CONDITION = re.compile(r" \((all|wrong|correct)\)$")
"""Ends the name of a selection from questions of another condition; see `vlmneurons.study.controls.condition_masks`."""

_PAGE = 6.75
"""Inches across a page: of figures of several panels, which wrap."""

_AXES = {"r": "share of neurons", "alpha": "strength", "items": "identification questions"}


def write_report(
    result: KnockoutResult,
    folder: str | Path,
    *,
    main: str | None = None,
    others: Mapping[str, KnockoutResult] | None = None,
    tables: Mapping[str, pd.DataFrame] | None = None,
    selections: Mapping[str, Selection] | None = None,
    questions: QuestionSet | Sequence[Question] | None = None,
    images: bool = True,
    settings: Mapping[str, str] | None = None,
    confidence: float = 0.95,
    permutations: int = 2000,
    seed: int = 0,
    title: str = "Knockout study",
) -> Path:
    """Write the report of a study.

    Args:
        result: the study.
        folder: gets ``index.html``, ``figures/`` and ``tables/``.
        main: the selector that per-group figures and tables are of; by default ``"CAS"``, or else the first.
        others: the same questions asked in other ways, by name, such as ``"blind"``; their clean answers are compared.
        tables: further tables to include, each explained by its ``attrs["caption"]``; that of `null_distribution` is
            drawn too.
        selections: the neurons of each selector of the result, by its name there: how far the groups' neurons are the
            same, and which tokens and questions they were chosen by.
        questions: those of the result, for examples of answers that changed.
        images: show thumbnails with them; False for pictures that may not be shared.
        settings: further lines of the head by name, such as ``"Split"`` and ``"Seeds"``.
        confidence: level of all intervals.
        permutations: number of sign flips; see `KnockoutResult.effects`.
        seed: of the sign flips.
        title: stands above the page.

    Returns:
        the path of the page.

    Raises:
        MismatchError: there is nothing to report: no questions, or no masks; no such main selector; or questions that
            are not those of the result.
    """
    folder = path_of("folder", folder, MismatchError)
    how: Keywords = {
        "confidence": confidence,
        "permutations": permutations,
        "seed": seed,
    }
    summary = result.summary(**how) if result.ids else pd.DataFrame()
    if not len(summary):
        raise MismatchError("there is nothing to report: the result has no questions, or no masks")
    plain: list[str] = [name for name in dict.fromkeys(summary["selector"]) if split_setting(name)[1] is None]
    if not plain:
        raise MismatchError("there is nothing to report but sweeps; include the selection itself")
    of_groups = [name for name in plain if _has_groups(result, name)]
    main = main or next(name for name in ("CAS", *of_groups, *plain) if name in plain)
    if main not in plain:
        raise MismatchError(f"main={main!r} has no masks here; there are {', '.join(plain)}")
    chosen = {name: one for name, one in (selections or {}).items() if name in plain}
    parts = [
        *_effects(result, summary, plain, main, how),
        *_matrices(result, plain, main, how),
        *_overlaps(result, chosen, main),
        *_flips_and_depth(result, plain),
        *(_examples(result, main, questions, images, seed) if questions is not None else []),
        *(_random(result, of_groups, main) if main in of_groups else []),
        *_sweeps(result, how),
        *_conditions(result, plain, how),
        *_accuracies(result, others or {}),
        *(part for name, table in (tables or {}).items() for part in _further(name, table)),
    ]
    every = {"every-mask": result.table(), "summary": summary}
    if main in of_groups and _repeated(result, of_groups):
        every["every-random"] = _against_random(result, main, _repeated(result, of_groups))
    if len(result.group_names) > 2:
        pairs = [result.pairs(name, **how).assign(selector=name) for name in plain]
        every["every-pair"] = pd.concat(pairs).loc[:, ["selector", *pairs[0].columns[:-1]]]
    shown = write_parts(parts, every, folder)
    page = folder / "index.html"
    facts = _facts(result, main, chosen, settings or {}, how)
    finding = _finding(result, summary, main)
    lead = "Accuracy under each mask less clean accuracy, in points"
    lead = lead if result.scores is None else "The mean score under each mask less the clean one"
    lead = f"{lead}; intervals at {100 * confidence:g} %."
    more = {name: _EVERY[name] for name in every}
    write_text(page, page_of(title, lead, facts, shown, more, result.provenance, finding))
    return page


_EVERY = {
    "every-mask": "each mask on each group of questions; its columns are explained at KnockoutResult.table",
    "summary": "each selector and setting, by group and over all, with intervals and tests: KnockoutResult.summary",
    "every-random": "the main selector against its random controls, group by group: KnockoutResult.against_random",
    "every-pair": "each mask's effect on each group, with its interval and test: KnockoutResult.pairs",
}
"""The tables that programs read, and what they hold."""


# -- what is in it -----------------------------------------------------------------------------------------------------


def _effects(
    result: KnockoutResult, summary: pd.DataFrame, plain: Sequence[str], main: str, how: Keywords
) -> list[Part]:
    overall = _overall(summary, plain)
    own, value, unit = _own(summary, main), result.measure, UNITS[result.measure][0]
    shown = [name for name in ("self_effect", "cross_effect", "control_effect") if name in summary]
    shown = [name for name in shown if overall[name].notna().any()] or shown
    level = f"{100 * how['confidence']:g} % intervals by picture; few: too few pictures or changed answers for one"
    return [
        Part(
            "effects",
            "Self against cross effect",
            f"Mean over groups, with {level}. A selective set of neurons has a self effect far below its cross effect, "
            "and a cross effect near zero; random masks are averaged over their repeats.",
            plot_effects(overall, effects=shown, value=value),
        ),
        Part(
            "effects-overall",
            "Effects over all groups",
            f"In {unit}. {_COLUMNS}",
            _effect_table(overall, "selector", value),
        ),
        *_second_value(result, plain, how),
        Part(
            "effects-by-group",
            f"Effects of {main} by group",
            f"{level[0].upper()}{level[1:]}.",
            plot_effects(own, "group", effects=shown, value=value),
        ),
        Part(
            f"effects-{file_name(main)}",
            f"Effects of {main} by group",
            f"In {unit}. {_COLUMNS}",
            _effect_table(own, "group", value),
            main,
        ),
        *_second_value(result, [main], how, by_group=True),
        Part(
            f"tests-{file_name(main)}",
            f"Tests of {main} by group",
            "Sign flips of pictures with all their questions, of the self effect (p), the cross effect and the gap; "
            "corrected over the groups by Holm's method and by Benjamini and Hochberg's (BH). Settings: how many of "
            f"{main} this study tried, which nothing here is corrected for.",
            _test_table(own, "group", list(_TESTS)),
            main,
        ),
    ]


_COLUMNS = (
    "n: questions; clean: without any mask, in %, as are flips: answers that the group's own mask changes. Self: of "
    "a group's mask on its own questions; cross: of the other groups' masks on them; cross caused: of its mask on "
    "theirs; gap: self less cross; general: on the control questions. Few: too few pictures or changed answers for an "
    "interval."
)


def _second_value(result: KnockoutResult, plain: Sequence[str], how: Keywords, by_group: bool = False) -> list[Part]:
    """The effects on another value: the margin or, of graded answers, whether they are right."""
    if result.measure == "score":
        name, what = "correct", "right answers"
        caption = "A graded answer is right where its score reaches the reader's threshold. In points of accuracy."
    elif np.isnan(result.margins).all():
        return []
    else:
        name, what = "margin", "the margin"
        caption = "Change of the log-probability margin (right option less the best other one), in nats; it moves "
        caption += "before an answer flips."
    summary = result.summary(value=name, **how)
    if by_group:
        (main,) = plain
        table = _effect_table(_own(summary, main), "group", name)
        return [Part(f"{name}-{file_name(main)}", f"Effects of {main} by group, on {what}", caption, table, main)]
    table = _effect_table(_overall(summary, plain), "selector", name)
    return [Part(f"effects-{name}", f"Effects over all groups, on {what}", caption, table)]


def _wrapped(draw: Callable[[float | None], Figure]) -> Figure:
    """A figure as wide as a page, or as it needs to be where names or groups have no room there."""
    try:
        return draw(_PAGE)
    except MismatchError:
        return draw(None)


def _matrices(result: KnockoutResult, plain: Sequence[str], main: str, how: Keywords) -> list[Part]:
    unit, scale, digits = UNITS[result.measure]
    matrices = {name: scale * result.matrix(name) for name in plain}
    limit = float(np.nanmax(np.abs(np.hstack([one.to_numpy(dtype=float).ravel() for one in matrices.values()])))) or 1.0
    told = f"Change, in {unit}; rows are masks, columns the questions' groups."
    colours = "Orange is harm, grey was not asked."
    several = len(plain) > 1
    parts = [
        Part(
            f"matrix-{file_name(name)}",
            f"Whose neurons, whose questions: {name}",
            told,
            plot_matrix(result, name, limit=limit),
            name,
            under="matrices" if several and name != main else "",
            numbers=_matrix_table(matrices[name], limit),
            colours=colours,
        )
        for name in plain
    ]
    if several:
        told += f" {colours} One scale of colours; of random masks the mean over their repeats."
        figure = _wrapped(lambda width: plot_matrix(result, plain, limit=limit, width=width))
        parts.insert(0, Part("matrices", "Whose neurons, whose questions", told, figure))
    if len(result.group_names) > 2 and _has_groups(result, main):
        pairs = result.pairs(main, **how)
        cross = pairs.loc[pairs["mask"] != pairs["group"]].sort_values("excess", kind="stable").head(15)
        table = cross[["mask", "group", "n"]].assign(
            pictures=cross["units"],
            effect=_intervals(cross, "delta", scale, digits),
            excess=[printed(scale * value, digits) for value in cross["excess"]],
            **{title: [printed_p(p) for p in cross[name]] for name, title in list(_TESTS.items())[:3]},
        )
        caption = (
            f"In {unit}: the fifteen effects on another group's questions that are most below what the mask and the "
            "group show on average (excess): groups that depend on each other's neurons. p: sign flips of pictures; "
            "Holm and BH: corrected over all pairs. Few: too few pictures or changed answers for an interval."
        )
        parts.append(Part("pairs", f"Whose mask harms whom: {main}", caption, table))
    return parts


def _matrix_table(matrix: pd.DataFrame, limit: float) -> pd.DataFrame:
    """A matrix with as many decimals as its figure has, groups in the order of the figure."""
    groups = sorted(matrix.index, key=natural)
    columns = sorted(matrix.columns, key=lambda name: (name not in matrix.index, natural(name)))
    digits = max(0, 1 - math.floor(math.log10(limit)))
    return pd.DataFrame(
        {
            "neurons of": groups,
            **{str(name): [printed(value, digits) for value in matrix.loc[groups, name]] for name in columns},
        }
    )


def _overlaps(result: KnockoutResult, selections: Mapping[str, Selection], main: str) -> list[Part]:
    """How far the groups' neurons are the same, and whether groups that share neurons harm each other."""
    groups = sorted(selections.get(main, next(iter(selections.values()), {})))
    given = {name: selections[name] for name in result.selectors if sorted(selections.get(name, ())) == groups != []}
    if len(groups) < 2:
        return []
    overlaps = {name: one.overlap().loc[groups] for name, one in given.items()}
    related = set(groups) == set(result.group_names) and len(groups) > 2
    told = "Jaccard index in %, mean over pairs of groups; what random sets of these sizes would have; and the highest."
    if related:
        told += " With effects: rank correlation (Spearman), over pairs, of the overlap with the mean effect that the "
        told += "two masks have on each other's groups; below 0, groups that share neurons harm each other."
    rows, pairs = [], np.triu_indices(len(groups), 1)
    for name, table in overlaps.items():
        shared, chance = (table[kind][groups].to_numpy()[pairs] for kind in ("jaccard", "chance"))
        most = int(np.argmax(shared))
        row = {"selector": name, "overlap": printed(100 * shared.mean()), "chance": printed(100 * chance.mean())}
        row["highest"] = printed(100 * shared[most])
        row["most alike"] = f"{groups[pairs[0][most]]}, {groups[pairs[1][most]]}" if shared[most] else "–"
        if related:
            matrix = result.matrix(name).reindex(index=groups, columns=groups).to_numpy(dtype=float)
            each = pd.DataFrame({"shared": shared, "effect": ((matrix + matrix.T) / 2)[pairs]}).dropna()
            alone = (each.nunique() < 2).any()
            row["with effects"] = "–" if alone else printed(each.corr(method="spearman").iloc[0, 1], 2)
        rows.append(row)
    parts = [Part("overlap", "Overlap and relatedness", told, pd.DataFrame(rows))]
    if all(row["most alike"] == "–" for row in rows):  # nothing to draw
        return parts
    order = ordered(groups, "clustered", np.hstack([one["jaccard"][groups] for one in overlaps.values()]))
    figure = _wrapped(lambda width: plot_overlap(given, order=order, width=width))
    drawn = "Neurons in both sets, of those in either (Jaccard index, %); groups of alike overlaps stand beside each "
    drawn += "other. Rules that give a neuron to one group only, as CAS and LAPE do, have none."
    parts.insert(0, Part("overlap", "How far the groups' neurons are the same", drawn, figure))
    if related:
        figure = _wrapped(lambda width: plot_matrix(result, [*given], order=order, width=width))
        drawn = "The effects, groups in the order of the overlaps: where groups that share neurons harm each other, "
        drawn += "blocks stand along the diagonal."
        parts.insert(1, Part("related", "Effects, in the order of the overlaps", drawn, figure))
    return parts


def _flips_and_depth(result: KnockoutResult, plain: Sequence[str]) -> list[Part]:
    parts = []
    if any(_has_groups(result, name) for name in plain):
        parts.append(
            Part(
                "flips",
                "Answers that changed",
                "Share of questions whose answer changes under the mask of their own group and, on average, under the "
                "others'. Equal shares of right → wrong and wrong → right are noise, not harm.",
                plot_flips(result, plain),
            )
        )
    parts.append(
        Part(
            "flips-matrix",
            "Whose mask changes whose answers",
            "Share of a group's questions (columns) whose answer changes under a mask (rows), in %, whether it turns "
            "right or wrong: what accuracy does not show where both cancel out.",
            _wrapped(lambda width: plot_matrix(result, plain, value="flips", width=width)),
        )
    )
    single = [name for name in plain if name not in _repeated(result, plain)]
    if result.provenance.get("layers") and single:
        parts.append(
            Part(
                "layers",
                "Where the neurons lie",
                "Share of a mask's neurons in each layer, mean over groups; the band is the range of groups.",
                plot_depth(result, [name for name in single if not _CONDITION.search(name)][:6] or single[:6]),
            )
        )
    return parts


def _random(result: KnockoutResult, plain: Sequence[str], main: str) -> list[Part]:
    controls = _repeated(result, plain)
    if not controls:
        return []
    table = _against_random(result, main, controls)
    table = table.loc[table["group"] == "all"].drop(columns="group").reset_index(drop=True)
    table["effect"] = table["effect"].str.replace("_", " ")
    points = ["value", "control_mean", "control_sd", "control_low", "control_high"]
    return [
        Part(
            "random",
            f"{main} among its random controls",
            "Self effects; every repeat of a random mask is a point. Layer-matched masks have as many neurons in each "
            "layer as the selection.",
            plot_random(result, main, controls),
        ),
        Part(
            "random",
            f"{main} against random masks",
            f"In {UNITS[result.measure][0]}, means over groups: of {main} (value), and mean, standard deviation, "
            "lowest and highest of the repeats. p is the share of repeats, ours included, whose effect is at most "
            "ours; with R repeats it cannot be below 1 / (R + 1).",
            _points_table(table, points, *UNITS[result.measure][1:]),
        ),
    ]


def _against_random(result: KnockoutResult, main: str, controls: Sequence[str]) -> pd.DataFrame:
    table = pd.concat([result.against_random(main, name).assign(control=name) for name in controls], ignore_index=True)
    table.insert(0, "control", table.pop("control"))
    return table


def _has_groups(result: KnockoutResult, name: str) -> bool:
    """Whether a selector has masks of the questions' groups, and so self effects."""
    return any(mask.selector == name and mask.group in result.group_names for mask in result.masks)


def _repeated(result: KnockoutResult, names: Sequence[str]) -> list[str]:
    """Those that were given as several selections: the random controls."""
    return [name for name in names if any(mask.repeat for mask in result.masks if mask.selector == name)]


def _sweeps(result: KnockoutResult, how: Keywords) -> list[Part]:
    found: dict[tuple[str, str], int] = {}
    for name in result.selectors:
        base, setting = split_setting(name)
        if setting is not None:
            found[base, setting[0]] = found.get((base, setting[0]), 0) + 1
    parts = []
    for (base, axis), number in found.items():
        curve = result.curve(base, axis, **how)
        what = _AXES.get(axis, axis)
        if number > 1:
            parts.append(
                Part(
                    f"curve-{file_name(base)}-{file_name(axis)}",
                    f"{base} by {what}",
                    f"Mean over groups with intervals; thin lines are the groups. Exploratory: {number} settings were "
                    "tried, and no p is corrected for that.",
                    plot_curve(curve, axis, value=result.measure),
                    f"{base} [{axis}]",
                )
            )
        table = _effect_table(curve.loc[curve["group"] == "all"], axis, result.measure)
        parts.append(
            Part(
                f"curve-{file_name(base)}-{file_name(axis)}",
                f"{base} by {what}",
                f"Over all groups, in {UNITS[result.measure][0]}. Exploratory: {number} settings were tried.",
                table.rename(columns={axis: what}),
                f"{base} [{axis}]",
                table,
            )
        )
    return parts


def _conditions(result: KnockoutResult, plain: Sequence[str], how: Keywords) -> list[Part]:
    rows = []
    for condition in ("all", "correct", "wrong"):
        part = result.select(*plain).where(condition)
        if part.ids:
            summary = part.summary(**how)
            rows.append(summary[summary["group"] == "all"].assign(questions=condition.replace("correct", "right")))
    table = pd.concat(rows)
    table["selector"] = table["selector"] + ", " + table["questions"]
    return [
        Part(
            "conditions",
            "By what the clean model answers",
            f"In {UNITS[result.measure][0]}: effects on all questions, and on those that the clean model answers "
            "right or wrong. On right ones accuracy can only fall, on wrong ones only rise. Columns as above.",
            _effect_table(table, "selector", result.measure),
        )
    ]


def _accuracies(result: KnockoutResult, others: Mapping[str, KnockoutResult]) -> list[Part]:
    accuracies = {"as asked": result.accuracy, **{name: other.accuracy for name, other in others.items()}}
    table = pd.DataFrame(accuracies).rename_axis("group").reset_index()
    table.loc[len(table)] = ["mean", *table.iloc[:, 1:].mean().tolist()]
    chance = result.provenance.get("chance")
    parts = [
        Part(
            "accuracy",
            "Clean accuracy",
            "Without any mask, in percent."
            + (" Blind: without the picture. Options only: without picture and question." if others else ""),
            _points_table(table, list(accuracies)),
        )
    ]
    if others:
        figure = plot_accuracy(accuracies, chance=chance)
        told = "What the picture and the question contribute: without any mask, each group asked in several ways"
        told += f"{', beside the accuracy of a guess' if chance is not None else ''}."
        parts.insert(0, Part("accuracy", "Clean accuracy", told, figure))
    return parts


_NULL = ["group", "questions", "pictures", "movable", "strength", "null_mean", "null_high", "p", "p_holm", "p_bh"]


def _further(name: str, table: pd.DataFrame) -> list[Part]:
    """A table that was given; one of `null_distribution` is drawn as well."""
    slug, title = file_name(name), name[:1].upper() + name[1:]
    caption = str(table.attrs.get("caption", "A further table, given with the study."))
    if not set(_NULL) <= set(table.columns):
        return [Part(slug, title, caption, table, name)]
    rows = table[_NULL].assign(movable=[printed(100 * share) for share in table["movable"]])
    rows = _points_table(rows, ["strength", "null_mean", "null_high"], 1.0, 3)
    told = (
        "Strength of each group's neurons beside that of neurons chosen in the same way after the pictures' labels are "
        "shuffled. Movable: pictures, in %, that a shuffle can give to other groups; null high: the 95th percentile of "
        "the shuffles; p: share of them, ours included, that are as strong; Holm and BH: corrected over groups."
    )
    drawn = (
        "Strength of each group's neurons, and what shuffled labels gave: their mean, and 95 % of them. Filled: Holm's "
        "p is at most 0.05."
    )
    figure = plot_null(table)
    return [Part(slug, title, drawn, figure, name), Part(slug, title, told, rows, name, table)]


def _examples(
    result: KnockoutResult, main: str, questions: QuestionSet | Sequence[Question], images: bool, seed: int
) -> list[Part]:
    cards = changed_answers(result, main, questions, images=images, seed=seed)
    caption = (
        f"Drawn at random (seed {seed}) among the questions whose answer changes when {main}'s neurons of their group "
        f"are switched off, each of another picture. Margin: log-probability of the right option less that of the best "
        f"other one.{'' if images else ' Without pictures.'}"
    )
    return [Part("changed", "Questions whose answer changed", caption, cards)] if cards else []


# -- tables ------------------------------------------------------------------------------------------------------------


def _own(summary: pd.DataFrame, main: str) -> pd.DataFrame:
    """The rows of a selector's groups, G2 before G10."""
    own = summary.loc[(summary["selector"] == main) & (summary["group"] != "all")]
    return own.iloc[sorted(range(len(own)), key=lambda row: natural(own["group"].iloc[row]))]


def _overall(summary: pd.DataFrame, plain: Sequence[str]) -> pd.DataFrame:
    return summary.loc[(summary["group"] == "all") & summary["selector"].isin(plain)]


def _effect_table(summary: pd.DataFrame, label: str, value: str = "correct") -> pd.DataFrame:
    """The columns of a summary that a paper prints, effects in the unit of their value with their intervals."""
    _, scale, digits = UNITS[value]
    names = summary[label].to_numpy()
    if names.dtype.kind == "f":  # a setting such as 0.0005 is not 0.000
        names = np.array([printed_setting(name) for name in names])
    table = pd.DataFrame({label: names, "n": summary["n"].to_numpy()})
    if (summary["pictures"] != summary["n"]).any():
        table["pictures"] = summary["pictures"].to_numpy()
    clean = (scale, digits) if value == "score" else (100.0, 1)
    table["clean"] = [printed(clean[0] * one, clean[1]) for one in summary["clean"]]
    effects = {
        "self_effect": "self effect",
        "cross_effect": "cross effect",
        "cross_caused": "cross caused",
        "gap": "gap",
        "control_effect": "general",
    }
    for name, title in effects.items():
        if name in summary:
            table[title] = _intervals(summary, name, scale, digits)
    table["flips"] = [printed(100 * share) for share in summary["flips"]]
    if (summary["failures"] > 0).any():
        table["failures"] = [printed(100 * share) for share in summary["failures"]]
    return table


def _intervals(table: pd.DataFrame, name: str, scale: float, digits: int) -> list[str]:
    """A column of effects as they are printed, each with its interval."""
    bounds = zip(table[name], table[f"{name}_low"], table[f"{name}_high"], strict=True)
    return [
        printed(scale * mean, digits)
        + (f" [{printed(scale * low, digits)}, {printed(scale * high, digits)}]" if low == low else " (few)")
        if np.isfinite(mean)
        else "–"
        for mean, low, high in bounds
    ]


_TESTS = {
    "p": "p",
    "p_holm": "Holm",
    "p_bh": "BH",
    "cross_p": "cross p",
    "cross_p_holm": "cross Holm",
    "gap_p": "gap p",
    "gap_p_holm": "gap Holm",
    "gap_p_bh": "gap BH",
}


def _test_table(summary: pd.DataFrame, label: str, tests: Sequence[str]) -> pd.DataFrame:
    """P-values of a summary as they are printed."""
    columns = {_TESTS[name]: [printed_p(value) for value in summary[name]] for name in tests}
    return pd.DataFrame({label: summary[label].to_numpy(), **columns, "settings": summary["settings"].to_numpy()})


def _points_table(table: pd.DataFrame, points: Sequence[str], scale: float = 100.0, digits: int = 1) -> pd.DataFrame:
    """A table with some columns in points of accuracy, or another unit, and p-values as they are printed."""
    shown = table.reset_index(drop=True).copy()
    for name in points:
        shown[name] = [printed(scale * value, digits) for value in shown[name]]
    for name in shown.columns:
        if name == "p" or str(name).startswith("p_"):
            shown[name] = [printed_p(value) for value in shown[name]]
    return shown.rename(columns={name: _TESTS.get(str(name), str(name).replace("_", " ")) for name in shown.columns})


# -- the page ---------------------------------------------------------------------------------------------------------


def _facts(
    result: KnockoutResult, main: str, selections: Mapping[str, Selection], settings: Mapping[str, str], how: Keywords
) -> Keywords:
    """The head of the page: what a reader has to know beside the finding."""
    about, told = result.provenance, _chosen(result, main, selections)
    sizes = [mask.size for mask in result.masks]
    bare = list(dict.fromkeys(split_setting(name)[0] for name in result.selectors))
    what = about.get("intervention", {})
    mode = {"zero": "set to 0", "scale": f"scaled by {what.get('factor')}"}.get(what.get("mode"), what.get("mode"))
    shuffle = f"; options in the order of seed {about['shuffle']}" if about.get("shuffle") is not None else ""
    facts = {
        "Model": f"{about.get('model', 'not known')}, revision {about.get('revision') or 'not known'}",
        **told,
        "Switched off": f"at {what.get('at')}: {mode}" if mode else "not known",
        "Split": "not known",
        **settings,
        "Seeds": "; ".join(
            [
                *([settings["Seeds"]] if "Seeds" in settings else []),
                f"{how['permutations']:,} sign flips: {how['seed']}{shuffle}",
            ]
        ),
        "Questions": f"{len(result.ids):,} of {len(result.group_names)} groups"
        + (f", control groups {', '.join(result.control_names)}" if result.control_names else ""),
        "Clean accuracy": f"{100 * float(np.mean(result.correct[0])):.1f} %",
        **({} if result.scores is None else {"Clean score": f"{float(np.mean(result.scores[0])):.3f}"}),
        "Masks": f"{len(result.masks):,}, named {', '.join(bare)}; of {_range(sizes)} neurons",
        "Answers kept": f"{int((result.chosen > NOT_ASKED).sum()):,}",
        "Could not be parsed": f"{int((result.chosen == -1).sum()):,}",
        "Questions skipped": f"{len(about.get('skipped', [])):,}",
        "Read by": about.get("answer", "not known"),
        "Made with": f"vlmneurons {__version__}",
    }
    if about.get("others") is not None:
        facts["Masks"] += f"; each question met its group's and {about['others']} others of each selector"
    return facts


def _chosen(result: KnockoutResult, main: str, selections: Mapping[str, Selection]) -> dict[str, str]:
    """How many neurons the main selector's masks have, of how many, where, and what they were chosen by."""
    sizes = [mask.size for mask in result.masks if mask.selector == main]
    described = repr(selections[main]) if main in selections else str(result.provenance.get("selections", {}).get(main))
    found = re.search(r"NeuronSpace\((.+?): (.*) = ([\d,]+) neurons\)", described)
    site, of, rule, by = "not known", "", "not known", {}
    if found:
        site, of = f"{found[1]}, {found[2]}", found[3]
        named = re.match(r"\W*Selection (.+): \d+ groups?, NeuronSpace", described)
        rule = named[1] if named else rule
    if main in selections:
        about = selections[main].provenance
        by = dict(about.get("statistics") or {})
        used = [int(n) for n in (about.get("items") or {}).values()]
        rule += f", on {_range(used)} questions a group" if used else ""
        rule += {"correct": ", answered right", "wrong": ", answered wrong"}.get(str(by.get("condition")), "")
    share = f" of {of} ({printed(100 * max(sizes) / int(of.replace(',', '')), 2)} %)" if of else ""
    return {
        "Neurons a mask": _range(sizes) + share,
        "Site": site,
        "Chosen by": rule,
        "Tokens counted": str(by.get("tokens") or "not known"),
    }


def _range(sizes: Sequence[int]) -> str:
    return f"{min(sizes):,}" + (f" to {max(sizes):,}" if len(set(sizes)) > 1 else "")


def _finding(result: KnockoutResult, summary: pd.DataFrame, main: str) -> str:
    """The result in a sentence, with its intervals and how many questions it is of."""
    one = _overall(summary, [main]).iloc[0]
    unit, scale, digits = UNITS[result.measure]
    told = []
    for effect in ("self_effect", "cross_effect"):
        mean, low, high = (printed(scale * one[f"{effect}{end}"], digits) for end in ("", "_low", "_high"))
        few = "too few pictures or changed answers for an interval"
        told.append(f"{mean} {unit} " + (f"[{low}, {high}]" if np.isfinite(one[f"{effect}_low"]) else f"({few})"))
    told_so = f"Switching off the neurons of {main} moves questions by {told[1]}"
    if np.isfinite(one["self_effect"]):
        told_so = f"Switching off the neurons that {main} chose for a group moves its own questions by {told[0]}"
        told_so += f", and those of other groups by {told[1]}" if np.isfinite(one["cross_effect"]) else ""
    groups = "1 group" if len(result.group_names) == 1 else f"{len(result.group_names)} groups"
    told_so += f": {one['n']:,} questions about {one['pictures']:,} pictures, of {groups}."
    clean, chance = float(np.mean(result.correct[0])), result.provenance.get("chance")
    if chance is None or clean - 1.645 * np.sqrt(clean * (1 - clean) / len(result.ids)) > chance:
        return told_so
    shares = f"{100 * clean:.1f} % are right, and {100 * chance:.1f} % by chance"
    return f"{told_so} Without a mask {shares}: little can be lost."


def page_of(
    title: str,
    lead: str,
    facts: Keywords,
    shown: Sequence[Keywords],
    more: Mapping[str, str],
    provenance: JSONMapping,
    finding: str = "",
) -> str:
    """A page that needs nothing else.

    Args:
        title: stands above it.
        lead: what its numbers are, in a sentence.
        facts: what it is of, by name.
        shown: what it shows, as it was written.
        more: further tables that lie beside it, and what they hold.
        provenance: where its numbers come from.
        finding: the result, in a sentence.
    """
    told = json.dumps(provenance, indent=1, default=str, ensure_ascii=False)
    how: Keywords = {"title": title, "lead": lead, "facts": facts, "parts": shown, "more": more, "finding": finding}
    return page_from("report.html", **how, provenance=told)
