"""A study's report: one page that needs nothing else, and every figure and table of it as a file.

The page holds its figures inside (SVG) and loads nothing, so it can be mailed or put beside a paper. Figures are
written as PNG (300 dpi), SVG and PDF, tables as CSV and LaTeX (booktabs, as wide as a column). What is said of each
stands in ``static/captions.ini``.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vlmneurons._version import __version__
from vlmneurons.checks import JSONMapping, Keywords, as_path
from vlmneurons.errors import MismatchError
from vlmneurons.files.atomic import write_text
from vlmneurons.look.examples import changed_answers
from vlmneurons.look.figures import natural, ordered
from vlmneurons.look.numbers import MISSING, printed, printed_p, printed_setting
from vlmneurons.look.pages import page_from
from vlmneurons.look.parts import UNITS, Part, explained, file_name, write_parts
from vlmneurons.look.plots.effects import plot_accuracy, plot_curve, plot_effects, plot_flips, plot_random
from vlmneurons.look.plots.matrices import plot_matrix, plot_overlap
from vlmneurons.look.plots.neurons import plot_depth, plot_null
from vlmneurons.neurons.selection import Selection
from vlmneurons.questions.question import Question
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.study.masks import split_setting
from vlmneurons.study.result import CONDITIONS, NOT_ASKED, KnockoutResult

_CONDITION = re.compile(r" \((all|wrong|correct)\)$")
"""Ends the name of a selection from questions of another condition; see `vlmneurons.study.controls.condition_masks`."""

_PAGE = 6.75
"""Inches across a page: of figures of several panels, which wrap."""

_AXES = {"r": "share of neurons", "alpha": "strength", "items": "identification questions"}

_EVERY = {
    "every-mask": "each mask on each group of questions; its columns are explained at KnockoutResult.table",
    "summary": "each selector and setting, by group and over all, with intervals and tests: KnockoutResult.summary",
    "every-random": "the main selector against its random controls, group by group: KnockoutResult.against_random",
    "every-pair": "each mask's effect on each group, with its interval and test: KnockoutResult.pairs",
}
"""The tables that programs read, and what they hold."""


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
    folder = as_path("folder", folder, MismatchError)
    inference: Keywords = {"confidence": confidence, "permutations": permutations, "seed": seed}
    summary = result.summary(**inference) if result.ids else pd.DataFrame()
    if not len(summary):
        raise MismatchError("there is nothing to report: the result has no questions, or no masks")
    plain: list[str] = [name for name in dict.fromkeys(summary["selector"]) if split_setting(name)[1] is None]
    if not plain:
        raise MismatchError("there is nothing to report but sweeps; include the selection itself")
    of_groups = [name for name in plain if _has_groups(result, name)]
    main = main or next(name for name in ("CAS", *of_groups, *plain) if name in plain)
    if main not in plain:
        raise MismatchError(f"main={main!r} has no masks here; there are {', '.join(plain)}")
    chosen = {name: selection for name, selection in (selections or {}).items() if name in plain}
    controls = _repeated(result, of_groups) if main in of_groups else []
    against = _against_random(result, main, controls) if controls else pd.DataFrame()
    parts = [
        *_effects(result, summary, plain, main, inference),
        *_matrices(result, plain, main, inference),
        *_overlaps(result, chosen, main),
        *_flips_and_depth(result, plain),
        *(_examples(result, main, questions, images, seed) if questions is not None else []),
        *(_random(result, main, against) if controls else []),
        *_sweeps(result, inference),
        _conditions(result, plain, inference),
        *_accuracies(result, others or {}),
        *(part for name, table in (tables or {}).items() for part in _further(name, table)),
    ]
    every = {"every-mask": result.table(), "summary": summary}
    if controls:
        every["every-random"] = against
    if len(result.group_names) > 2:
        pairs = [result.pairs(name, **inference).assign(selector=name) for name in plain]
        every["every-pair"] = pd.concat(pairs).loc[:, ["selector", *pairs[0].columns[:-1]]]
    sections = write_parts(parts, every, folder)
    graded = result.scores is not None
    lead = "The mean score under each mask less the clean one"
    lead = lead if graded else "Accuracy under each mask less clean accuracy, in points"
    facts = _facts(result, main, chosen, settings or {}, inference)
    page = page_of(
        title,
        f"{lead}; intervals at {100 * confidence:g} %.",
        facts,
        sections,
        {name: _EVERY[name] for name in every},
        result.provenance,
        _finding(result, summary, main),
    )
    write_text(folder / "index.html", page)
    return folder / "index.html"


# -- what is in it -----------------------------------------------------------------------------------------------------


def _effects(
    result: KnockoutResult, summary: pd.DataFrame, plain: Sequence[str], main: str, inference: Keywords
) -> list[Part]:
    """The effects of all selectors over all groups, and of the main one group by group."""
    overall, by_group, value = _overall(summary, plain), _by_group(summary, main), result.measure
    unit = UNITS[value][0]
    effects = [name for name in ("self_effect", "cross_effect", "control_effect") if name in summary]
    effects = [name for name in effects if overall[name].notna().any()] or effects
    level = (
        f"{100 * inference['confidence']:g} % intervals by picture; few: too few pictures or changed answers for one"
    )
    figures = [
        plot_effects(overall, effects=effects, value=value),
        plot_effects(by_group, "group", effects=effects, value=value),
    ]
    tests = pd.DataFrame({"group": by_group["group"].to_numpy()})
    tests = tests.assign(**{title: by_group[name].map(printed_p).to_numpy() for name, title in _TESTS.items()})
    tests["settings"] = by_group["settings"].to_numpy()
    of_main = _effect_table(by_group, "group", value)
    return [
        explained("effects", figures[0], level=level),
        explained("effects-overall", _effect_table(overall, "selector", value), unit=unit),
        *_second_value(result, plain, inference),
        explained("effects-by-group", figures[1], main=main, level=level[0].upper() + level[1:]),
        explained("effects-of", of_main, name=f"effects-{file_name(main)}", of=main, unit=unit),
        *_second_value(result, plain, inference, main),
        explained("tests", tests, of=main),
    ]


def _second_value(result: KnockoutResult, plain: Sequence[str], inference: Keywords, main: str = "") -> list[Part]:
    """The effects on another value: the margin or, of graded answers, whether they are right."""
    value = "correct" if result.measure == "score" else "margin"
    if value == "margin" and np.isnan(result.margins).all():
        return []
    whose = f"Effects of {main} by group" if main else "Effects over all groups"
    try:
        summary = result.summary(value=value, **inference)
        rows, first = (_by_group(summary, main), "group") if main else (_overall(summary, plain), "selector")
        table = _effect_table(rows, first, value)
    except MismatchError as error:  # infinite margins: why there are no effects is said in their place
        table = pd.DataFrame({"there are none": [str(error)]})
    name = f"{value}-{file_name(main)}" if main else f"effects-{value}"
    return [explained(f"on-{value}", table, name=name, of=main, whose=whose)]


def _as_wide_as_a_page(draw: Callable[[float | None], Figure]) -> Figure:
    """A figure as wide as a page, or as it needs to be where names or groups have no room there."""
    try:
        return draw(_PAGE)
    except MismatchError:
        return draw(None)


def _matrices(result: KnockoutResult, plain: Sequence[str], main: str, inference: Keywords) -> list[Part]:
    """The matrix of every selector: all in one figure, and each alone; and the pairs of groups that stand out."""
    unit, scale, digits = UNITS[result.measure]
    matrices = {name: scale * result.matrix(name) for name in plain}
    values = np.hstack([matrix.to_numpy(dtype=float).ravel() for matrix in matrices.values()])
    limit = float(np.nanmax(np.abs(values))) or 1.0
    several = len(plain) > 1
    parts = [
        explained(
            "matrix",
            plot_matrix(result, name, limit=limit),
            of=name,
            under="matrices" if several and name != main else "",
            numbers=_matrix_table(matrices[name], limit),
            unit=unit,
        )
        for name in plain
    ]
    if several:
        figure = _as_wide_as_a_page(lambda width: plot_matrix(result, plain, limit=limit, width=width))
        parts.insert(0, explained("matrices", figure, unit=unit))
    if len(result.group_names) > 2 and _has_groups(result, main):
        pairs = result.pairs(main, **inference)
        cross = pairs.loc[pairs["mask"] != pairs["group"]].sort_values("excess", kind="stable").head(15)
        table = cross[["mask", "group", "n"]].assign(
            pictures=cross["units"],
            effect=_intervals(cross, "delta", scale, digits),
            excess=[printed(scale * value, digits) for value in cross["excess"]],
            **{_TESTS[name]: cross[name].map(printed_p) for name in ("p", "p_holm", "p_bh")},
        )
        parts.append(explained("pairs", table, main=main, unit=unit))
    return parts


def _matrix_table(matrix: pd.DataFrame, limit: float) -> pd.DataFrame:
    """A matrix with as many decimals as its figure has, groups in the order of the figure."""
    groups = sorted(matrix.index, key=natural)
    columns = sorted(matrix.columns, key=lambda name: (name not in matrix.index, natural(name)))
    digits = max(0, 1 - math.floor(math.log10(limit)))
    texts = {str(name): [printed(value, digits) for value in matrix.loc[groups, name]] for name in columns}
    return pd.DataFrame({"neurons of": groups, **texts})


def _overlaps(result: KnockoutResult, selections: Mapping[str, Selection], main: str) -> list[Part]:
    """How far the groups' neurons are the same, and whether groups that share neurons harm each other."""
    groups = sorted(selections.get(main, next(iter(selections.values()), {})))
    alike = {name: selections[name] for name in result.selectors if sorted(selections.get(name, ())) == groups != []}
    if len(groups) < 2:
        return []
    overlaps = {name: selection.overlap().loc[groups] for name, selection in alike.items()}
    related = set(groups) == set(result.group_names) and len(groups) > 2
    rows, pairs = [], np.triu_indices(len(groups), 1)
    for name, table in overlaps.items():
        shared, chance = (table[kind][groups].to_numpy()[pairs] for kind in ("jaccard", "chance"))
        most = int(np.argmax(shared))
        row = {"selector": name, "overlap": printed(100 * shared.mean()), "chance": printed(100 * chance.mean())}
        row["highest"] = printed(100 * shared[most])
        row["most alike"] = f"{groups[pairs[0][most]]}, {groups[pairs[1][most]]}" if shared[most] else MISSING
        if related:
            matrix = result.matrix(name).reindex(index=groups, columns=groups).to_numpy(dtype=float)
            effects = pd.DataFrame({"shared": shared, "effect": ((matrix + matrix.T) / 2)[pairs]}).dropna()
            constant = (effects.nunique() < 2).any()
            row["with effects"] = MISSING if constant else printed(effects.corr(method="spearman").iloc[0, 1], 2)
        rows.append(row)
    table = explained("overlap-table", pd.DataFrame(rows), name="overlap", also="related" if related else "")
    if all(row["most alike"] == MISSING for row in rows):  # nothing to draw
        return [table]
    order = ordered(groups, "clustered", np.hstack([overlap["jaccard"][groups] for overlap in overlaps.values()]))
    figure = _as_wide_as_a_page(lambda width: plot_overlap(alike, order=order, width=width))
    parts = [explained("overlap", figure)]
    if related:
        figure = _as_wide_as_a_page(lambda width: plot_matrix(result, [*alike], order=order, width=width))
        parts.append(explained("related", figure))
    return [*parts, table]


def _flips_and_depth(result: KnockoutResult, plain: Sequence[str]) -> list[Part]:
    parts = []
    if any(_has_groups(result, name) for name in plain):
        parts.append(explained("flips", plot_flips(result, plain)))
    figure = _as_wide_as_a_page(lambda width: plot_matrix(result, plain, value="flips", width=width))
    parts.append(explained("flips-matrix", figure))
    repeated = _repeated(result, plain)
    single = [name for name in plain if name not in repeated]
    if result.provenance.get("layers") and single:
        of_all_questions = [name for name in single if not _CONDITION.search(name)]
        parts.append(explained("layers", plot_depth(result, of_all_questions[:6] or single[:6])))
    return parts


def _examples(
    result: KnockoutResult, main: str, questions: QuestionSet | Sequence[Question], images: bool, seed: int
) -> list[Part]:
    cards = changed_answers(result, main, questions, images=images, seed=seed)
    return [explained("changed", cards, also="" if images else "no_pictures", main=main, seed=seed)] if cards else []


def _random(result: KnockoutResult, main: str, against: pd.DataFrame) -> list[Part]:
    """The main selector's effects among those of its random controls."""
    unit, scale, digits = UNITS[result.measure]
    table = against.loc[against["group"] == "all"].drop(columns="group").reset_index(drop=True)
    table["effect"] = table["effect"].str.replace("_", " ")
    points = ["value", "control_mean", "control_sd", "control_low", "control_high"]
    table = _printed_table(table, points, scale, digits)
    figure = plot_random(result, main, [*dict.fromkeys(against["control"])])
    return [
        explained("random", figure, main=main),
        explained("random-table", table, name="random", main=main, unit=unit),
    ]


def _against_random(result: KnockoutResult, main: str, controls: Sequence[str]) -> pd.DataFrame:
    tables = {name: result.against_random(main, name) for name in controls}
    return pd.concat(tables, names=["control"]).reset_index("control").reset_index(drop=True)


def _has_groups(result: KnockoutResult, name: str) -> bool:
    """Whether a selector has masks of the questions' groups, and so self effects."""
    return any(mask.selector == name and mask.group in result.group_names for mask in result.masks)


def _repeated(result: KnockoutResult, names: Sequence[str]) -> list[str]:
    """Those that were given as several selections: the random controls."""
    return [name for name in names if any(mask.repeat for mask in result.masks if mask.selector == name)]


def _sweeps(result: KnockoutResult, inference: Keywords) -> list[Part]:
    """A table of every sweep, and a figure of those with several settings."""
    settings = [(base, at[0]) for base, at in map(split_setting, result.selectors) if at is not None]
    parts = []
    for (base, axis), number in Counter(settings).items():
        curve, title = result.curve(base, axis, **inference), _AXES.get(axis, axis)
        names = {"name": f"curve-{file_name(base)}-{file_name(axis)}", "of": f"{base} [{axis}]"}
        facts: Keywords = {**names, "base": base, "axis": title, "number": number}
        if number > 1:
            parts.append(explained("curve", plot_curve(curve, axis, value=result.measure), **facts))
        table = _effect_table(curve.loc[curve["group"] == "all"], axis, result.measure)
        shown = table.rename(columns={axis: title})
        parts.append(explained("curve-table", shown, data=table, unit=UNITS[result.measure][0], **facts))
    return parts


def _conditions(result: KnockoutResult, plain: Sequence[str], inference: Keywords) -> Part:
    """The effects on all questions, and on those that the clean model answers right or wrong."""
    rows = []
    for condition in CONDITIONS:
        part = result.select(*plain).where(condition)
        if part.ids:
            summary = part.summary(**inference)
            rows.append(summary[summary["group"] == "all"].assign(questions=condition.replace("correct", "right")))
    table = pd.concat(rows)
    table["selector"] = table["selector"] + ", " + table["questions"]
    table = _effect_table(table, "selector", result.measure)
    return explained("conditions", table, unit=UNITS[result.measure][0])


def _accuracies(result: KnockoutResult, others: Mapping[str, KnockoutResult]) -> list[Part]:
    """The accuracy without a mask, of the study and of other ways of asking its questions."""
    accuracies = {"as asked": result.accuracy, **{name: blind.accuracy for name, blind in others.items()}}
    table = pd.DataFrame(accuracies).rename_axis("group").reset_index()
    table.loc[len(table)] = ["mean", *table.iloc[:, 1:].mean().tolist()]
    table = _printed_table(table, list(accuracies))
    parts = [explained("accuracy-table", table, name="accuracy", also="others" if others else "")]
    if others:
        chance = result.provenance.get("chance")
        guess = "" if chance is None else ", beside the accuracy of a guess"
        parts.insert(0, explained("accuracy", plot_accuracy(accuracies, chance=chance), guess=guess))
    return parts


_NULL = ["group", "questions", "pictures", "movable", "strength", "null_mean", "null_high", "p", "p_holm", "p_bh"]


def _further(name: str, table: pd.DataFrame) -> list[Part]:
    """A table that the user added; one of `null_distribution` is drawn as well."""
    file, title = file_name(name), name[:1].upper() + name[1:]
    if not set(_NULL) <= set(table.columns):
        caption = str(table.attrs.get("caption", "A further table, given with the study."))
        return [Part(file, title, caption, table, name)]
    rows = table[_NULL].assign(movable=[printed(100 * share) for share in table["movable"]])
    rows = _printed_table(rows, ["strength", "null_mean", "null_high"], 1.0, 3)
    return [
        explained("null", plot_null(table), name=file, of=name, title=title),
        explained("null-table", rows, name=file, of=name, title=title, data=table),
    ]


# -- tables ------------------------------------------------------------------------------------------------------------


def _by_group(summary: pd.DataFrame, main: str) -> pd.DataFrame:
    """The rows of a selector's groups, G2 before G10."""
    rows = summary.loc[(summary["selector"] == main) & (summary["group"] != "all")]
    return rows.sort_values("group", key=lambda groups: groups.map(natural), kind="stable")


def _overall(summary: pd.DataFrame, plain: Sequence[str]) -> pd.DataFrame:
    return summary.loc[(summary["group"] == "all") & summary["selector"].isin(plain)]


_EFFECTS = {
    "self_effect": "self effect",
    "cross_effect": "cross effect",
    "cross_caused": "cross caused",
    "gap": "gap",
    "control_effect": "general",
}
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
"""Columns of a summary, and what they are called in print."""


def _effect_table(summary: pd.DataFrame, label: str, value: str) -> pd.DataFrame:
    """The columns of a summary that a paper prints, effects in the unit of their value with their intervals."""
    _, scale, digits = UNITS[value]
    names = summary[label].to_numpy()
    if names.dtype.kind == "f":  # a setting such as 0.0005 is not 0.000
        names = np.array([printed_setting(name) for name in names])
    table = pd.DataFrame({label: names, "n": summary["n"].to_numpy()})
    if (summary["pictures"] != summary["n"]).any():
        table["pictures"] = summary["pictures"].to_numpy()
    clean = (scale, digits) if value == "score" else (100.0, 1)
    table["clean"] = [printed(clean[0] * share, clean[1]) for share in summary["clean"]]
    for name, title in _EFFECTS.items():
        if name in summary:
            table[title] = _intervals(summary, name, scale, digits)
    table["flips"] = [printed(100 * share) for share in summary["flips"]]
    if (summary["failures"] > 0).any():
        table["failures"] = [printed(100 * share) for share in summary["failures"]]
    return table


def _intervals(table: pd.DataFrame, name: str, scale: float, digits: int) -> list[str]:
    """A column of effects as they are printed, each with its interval."""
    texts = []
    for effect, low, high in (scale * table[[name, f"{name}_low", f"{name}_high"]]).to_numpy(dtype=float):
        ends = f"[{printed(low, digits)}, {printed(high, digits)}]" if np.isfinite(low) else "(few)"
        texts.append(f"{printed(effect, digits)} {ends}" if np.isfinite(effect) else MISSING)
    return texts


def _printed_table(table: pd.DataFrame, points: Sequence[str], scale: float = 100.0, digits: int = 1) -> pd.DataFrame:
    """A table with some columns in points of accuracy, or another unit, and p-values as they are printed."""
    shown = table.reset_index(drop=True).copy()
    for name in points:
        shown[name] = [printed(scale * value, digits) for value in shown[name]]
    for name in shown.columns:
        if name == "p" or str(name).startswith("p_"):
            shown[name] = [printed_p(value) for value in shown[name]]
    return shown.rename(columns=lambda name: _TESTS.get(str(name), str(name).replace("_", " ")))


# -- the page ---------------------------------------------------------------------------------------------------------


def _facts(
    result: KnockoutResult,
    main: str,
    selections: Mapping[str, Selection],
    settings: Mapping[str, str],
    inference: Keywords,
) -> Keywords:
    """The head of the page: what a reader has to know beside the finding."""
    about = result.provenance
    bare = list(dict.fromkeys(split_setting(name)[0] for name in result.selectors))
    intervention = about.get("intervention", {})
    mode = intervention.get("mode")
    mode = {"zero": "set to 0", "scale": f"scaled by {intervention.get('factor')}"}.get(mode, mode)
    shuffle = f"; options in the order of seed {about['shuffle']}" if about.get("shuffle") is not None else ""
    flips = f"{inference['permutations']:,} sign flips: {inference['seed']}{shuffle}"
    controls = f", control groups {', '.join(result.control_names)}" if result.control_names else ""
    few = about.get("others")
    met = "" if few is None else f"; each question met its group's and {few} others of each selector"
    return {
        "Model": f"{about.get('model', 'not known')}, revision {about.get('revision') or 'not known'}",
        **_chosen(result, main, selections),
        "Switched off": f"at {intervention.get('at')}: {mode}" if mode else "not known",
        "Split": "not known",
        **settings,
        "Seeds": f"{settings['Seeds']}; {flips}" if "Seeds" in settings else flips,
        "Questions": f"{len(result.ids):,} of {len(result.group_names)} groups{controls}",
        "Clean accuracy": f"{100 * float(np.mean(result.correct[0])):.1f} %",
        **({} if result.scores is None else {"Clean score": f"{float(np.mean(result.scores[0])):.3f}"}),
        "Masks": f"{len(result.masks):,}, named {', '.join(bare)}; of {_range([mask.size for mask in result.masks])} "
        f"neurons{met}",
        "Answers kept": f"{int((result.chosen > NOT_ASKED).sum()):,}",
        "Could not be parsed": f"{int((result.chosen == -1).sum()):,}",
        "Questions skipped": f"{len(about.get('skipped', [])):,}",
        "Read by": about.get("answer", "not known"),
        "Made with": f"vlmneurons {__version__}",
    }


def _chosen(result: KnockoutResult, main: str, selections: Mapping[str, Selection]) -> dict[str, str]:
    """How many neurons the main selector's masks have, of how many, where, and what they were chosen by."""
    sizes = [mask.size for mask in result.masks if mask.selector == main]
    described = repr(selections[main]) if main in selections else str(result.provenance.get("selections", {}).get(main))
    space = re.search(r"NeuronSpace\((.+?): (.*) = ([\d,]+) neurons\)", described)
    selector = re.match(r"\W*Selection (.+): \d+ groups?, NeuronSpace", described)
    rule, statistics = selector[1] if space and selector else "not known", {}
    if main in selections:
        about = selections[main].provenance
        statistics = dict(about.get("statistics") or {})
        questions = [int(number) for number in (about.get("items") or {}).values()]
        rule += f", on {_range(questions)} questions a group" if questions else ""
        rule += {"correct": ", answered right", "wrong": ", answered wrong"}.get(str(statistics.get("condition")), "")
    share = f" of {space[3]} ({printed(100 * max(sizes) / int(space[3].replace(',', '')), 2)} %)" if space else ""
    return {
        "Neurons a mask": _range(sizes) + share,
        "Site": f"{space[1]}, {space[2]}" if space else "not known",
        "Chosen by": rule,
        "Tokens counted": str(statistics.get("tokens") or "not known"),
    }


def _range(sizes: Sequence[int]) -> str:
    return f"{min(sizes):,}" + (f" to {max(sizes):,}" if len(set(sizes)) > 1 else "")


def _finding(result: KnockoutResult, summary: pd.DataFrame, main: str) -> str:
    """The result in a sentence, with its intervals and how many questions it is of."""
    row = _overall(summary, [main]).iloc[0]
    unit, scale, digits = UNITS[result.measure]
    effects = {}
    for name in ("self_effect", "cross_effect"):
        effect, low, high = (printed(scale * row[f"{name}{end}"], digits) for end in ("", "_low", "_high"))
        few = "(too few pictures or changed answers for an interval)"
        effects[name] = f"{effect} {unit} " + (f"[{low}, {high}]" if np.isfinite(row[f"{name}_low"]) else few)
    finding = f"Switching off the neurons of {main} moves questions by {effects['cross_effect']}"
    if np.isfinite(row["self_effect"]):
        finding = f"Switching off the neurons that {main} chose for a group moves its own questions by "
        finding += effects["self_effect"]
        if np.isfinite(row["cross_effect"]):
            finding += f", and those of other groups by {effects['cross_effect']}"
    groups = "1 group" if len(result.group_names) == 1 else f"{len(result.group_names)} groups"
    finding += f": {row['n']:,} questions about {row['pictures']:,} pictures, of {groups}."
    clean, chance = float(np.mean(result.correct[0])), result.provenance.get("chance")
    # Above chance by a one-sided test at 5 %: there is something to lose.
    if chance is None or clean - 1.645 * np.sqrt(clean * (1 - clean) / len(result.ids)) > chance:
        return finding
    shares = f"{100 * clean:.1f} % are right, and {100 * chance:.1f} % by chance"
    return f"{finding} Without a mask {shares}: little can be lost."


def page_of(
    title: str,
    lead: str,
    facts: Keywords,
    sections: Sequence[Keywords],
    more: Mapping[str, str],
    provenance: JSONMapping,
    finding: str = "",
) -> str:
    """A page of results as text, which loads nothing.

    Args:
        title: stands above it.
        lead: what its numbers are, in a sentence.
        facts: what it is of, by name.
        sections: what it shows, as `write_parts` gave it.
        more: further tables that lie beside it, and what they hold.
        provenance: where its numbers come from.
        finding: the result, in a sentence.
    """
    texts: Keywords = {"title": title, "lead": lead, "facts": facts, "more": more, "finding": finding}
    source = json.dumps(provenance, indent=1, default=str, ensure_ascii=False)
    return page_from("report.html", parts=sections, provenance=source, **texts)
