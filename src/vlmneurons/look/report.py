"""A study's report: one page that needs nothing else, and every figure and table of it as a file.

The page holds its figures inside (SVG) and loads nothing, so it can be mailed or put beside a paper. Figures are
written as PNG (300 dpi), SVG and PDF, tables as CSV and LaTeX (booktabs), as wide as a column or a page of two.
"""

import hashlib
import io
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vlmneurons._version import __version__
from vlmneurons.checks import JSONMapping, Keywords, path_of
from vlmneurons.errors import MismatchError
from vlmneurons.files.atomic import write_text
from vlmneurons.look.figures import natural
from vlmneurons.look.pages import inside, page_from
from vlmneurons.look.plots import (
    plot_accuracy,
    plot_curve,
    plot_depth,
    plot_effects,
    plot_flips,
    plot_matrix,
    plot_random,
)
from vlmneurons.study.masks import split_setting
from vlmneurons.study.result import NOT_ASKED, KnockoutResult

_CONDITION = re.compile(r" \((all|wrong|correct)\)$")
"""Ends the name of a selection from questions of another condition; see `vlmneurons.study.controls.condition_masks`."""

_UNITS = {
    "correct": ("points of accuracy", 100.0, 1),
    "margin": ("nats", 1.0, 2),
    "score": ("the score's unit", 1.0, 3),
}
"""How a value's effects are printed: their unit, what they are multiplied by, and how many decimals they have."""

_FEW = "Few: too few pictures or changed answers for an interval."

_POINTS = ["delta", "delta_low", "delta_high", "excess"]

_AXES = {"r": "share of neurons", "alpha": "strength", "items": "identification questions"}


@dataclass(frozen=True)
class _Part:
    """One figure or table of the report."""

    name: str
    title: str
    caption: str
    content: Figure | pd.DataFrame
    of: str = ""
    """The name, given by a user, that is part of this one's."""
    numbers: tuple[str, pd.DataFrame] | None = None
    """What a figure shows, where a paper may print it as a table, with the table's caption."""

    @property
    def kind(self) -> str:
        return "table" if isinstance(self.content, pd.DataFrame) else "figure"


def write_report(
    result: KnockoutResult,
    folder: str | Path,
    *,
    main: str | None = None,
    others: Mapping[str, KnockoutResult] | None = None,
    tables: Mapping[str, pd.DataFrame] | None = None,
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
        tables: further tables to include.
        confidence: level of all intervals.
        permutations: number of sign flips; see `KnockoutResult.effects`.
        seed: of the sign flips.
        title: stands above the page.

    Returns:
        the path of the page.

    Raises:
        MismatchError: there is nothing to report: no questions, or no masks; or no such main selector.
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
    parts = [
        *_effects(result, summary, plain, main, how),
        *_matrices(result, plain, main, how),
        *_flips_and_depth(result, plain),
        *(_random(result, of_groups, main) if main in of_groups else []),
        *_sweeps(result, how),
        *_conditions(result, plain, how),
        *_accuracies(result, others or {}),
        *(_Part(_slug(name), name[:1].upper() + name[1:], "", table, name) for name, table in (tables or {}).items()),
    ]
    every = {"every-mask": result.table(), "summary": summary}
    if main in of_groups and _repeated(result, of_groups):
        every["every-random"] = _against_random(result, main, _repeated(result, of_groups))
    if len(result.group_names) > 2:
        pairs = [result.pairs(name, **how).assign(selector=name) for name in plain]
        every["every-pair"] = pd.concat(pairs).loc[:, ["selector", *pairs[0].columns[:-1]]]
    parts = _told_apart(parts, every)
    for place in ("figures", "tables"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    shown = [_written(part, folder) for part in parts]
    for name, table in every.items():
        _write_table(folder, name, table)
    page = folder / "index.html"
    finding = _finding(result, summary, main)
    write_text(page, _page_of(result, title, finding, shown, list(every), confidence))
    return page


# -- what is in it -----------------------------------------------------------------------------------------------------


def _effects(
    result: KnockoutResult, summary: pd.DataFrame, plain: Sequence[str], main: str, how: Keywords
) -> list[_Part]:
    overall = _overall(summary, plain)
    own = summary.loc[(summary["selector"] == main) & (summary["group"] != "all")]
    value, unit = result.measure, _UNITS[result.measure][0]
    own = own.iloc[sorted(range(len(own)), key=lambda row: natural(own["group"].iloc[row]))]
    shown = ["self_effect", "cross_effect", *(["control_effect"] if "control_effect" in summary else [])]
    level = f"{100 * how['confidence']:g} % intervals by picture; few: too few pictures or changed answers for one"
    return [
        _Part(
            "effects",
            "Self against cross effect",
            f"Mean over groups, with {level}. A selective set of neurons has a self effect far below its cross effect, "
            "and a cross effect near zero; random masks are averaged over their repeats.",
            plot_effects(overall, effects=shown, value=value),
        ),
        _Part(
            "effects-overall",
            "Effects over all groups",
            f"In {unit}. {_FEW}",
            _effect_table(overall, "selector", value),
        ),
        *_second_value(result, plain, how),
        _Part(
            "effects-by-group",
            f"Effects of {main} by group",
            f"{level[0].upper()}{level[1:]}.",
            plot_effects(own, "group", effects=shown, value=value),
        ),
        _Part(
            f"effects-{_slug(main)}",
            f"Effects of {main} by group",
            f"In {unit}. {_FEW}",
            _effect_table(own, "group", value),
            main,
        ),
        _Part(
            f"tests-{_slug(main)}",
            f"Tests of {main} by group",
            "Sign flips of pictures with all their questions, of the self effect (p), the cross effect and the gap; "
            "corrected over the groups by Holm's method and by Benjamini and Hochberg's (BH). Settings: how many of "
            f"{main} this study tried, which nothing here is corrected for.",
            _test_table(own, "group", list(_TESTS)),
            main,
        ),
    ]


def _second_value(result: KnockoutResult, plain: Sequence[str], how: Keywords) -> list[_Part]:
    """The effects on another value: the margin or, of graded answers, whether they are right."""
    if result.measure == "score":
        name, title = "correct", "Effects over all groups, on right answers"
        caption = "A graded answer is right where its score reaches the reader's threshold. In points of accuracy."
    elif np.isnan(result.margins).all():
        return []
    else:
        name, title = "margin", "Effects over all groups, on the margin"
        caption = "Change of the log-probability margin (right option less the best other one), in nats; it moves "
        caption += "before an answer flips."
    table = _overall(result.summary(value=name, **how), plain)
    return [_Part(f"effects-{name}", title, f"{caption} {_FEW}", _effect_table(table, "selector", name))]


def _matrices(result: KnockoutResult, plain: Sequence[str], main: str, how: Keywords) -> list[_Part]:
    unit, scale, digits = _UNITS[result.measure]
    matrices = {name: scale * result.matrix(name) for name in plain}
    limit = max(float(np.nanmax(np.abs(one.to_numpy(dtype=float)))) for one in matrices.values()) or 1.0
    title, told = "Whose neurons, whose questions", f"Change, in {unit}; rows are masks, columns the questions' groups"
    parts = [
        _Part(
            f"matrix-{_slug(name)}",
            f"{title}: {name}",
            f"{told}. Orange is harm. All matrices of this page share their colours"
            + ("; repeats are averaged." if name in _repeated(result, plain) else "."),
            plot_matrix(result, name, limit=limit),
            name,
            (f"{title}: {name}. {told}.", _matrix_table(matrices[name], limit)),
        )
        for name in plain
    ]
    if len(result.group_names) > 2:
        pairs = result.pairs(main, **how)
        cross = pairs.loc[pairs["mask"] != pairs["group"]].sort_values("excess", kind="stable").head(15)
        parts.append(
            _Part(
                "pairs",
                f"Whose mask harms whom: {main}",
                "The fifteen cross effects that are most below what the mask and the group show on average (excess): "
                "groups that depend on each other's neurons. p: sign flips of pictures, corrected over all pairs.",
                _points_table(cross.drop(columns=["few", "exploratory"]), _POINTS, scale, digits),
            )
        )
    return parts


def _matrix_table(matrix: pd.DataFrame, limit: float) -> pd.DataFrame:
    """A matrix with as many decimals as its figure has, groups in the order of the figure."""
    groups = sorted(matrix.index, key=natural)
    columns = sorted(matrix.columns, key=lambda name: (name not in matrix.index, natural(name)))
    digits = max(0, 1 - math.floor(math.log10(limit)))
    shown = {str(name): [_number(value, digits) for value in matrix.loc[groups, name]] for name in columns}
    return pd.DataFrame({"neurons of": groups, **shown})


def _flips_and_depth(result: KnockoutResult, plain: Sequence[str]) -> list[_Part]:
    parts = []
    if any(_has_groups(result, name) for name in plain):
        parts.append(
            _Part(
                "flips",
                "Answers that changed",
                "Share of questions whose answer changes under the mask of their own group and, on average, under the "
                "others'. Equal shares of right → wrong and wrong → right are noise, not harm.",
                plot_flips(result, plain),
            )
        )
    single = [name for name in plain if name not in _repeated(result, plain)]
    if result.provenance.get("layers") and single:
        parts.append(
            _Part(
                "layers",
                "Where the neurons lie",
                "Share of a mask's neurons in each layer, mean over groups; the band is the range of groups.",
                plot_depth(result, [name for name in single if not _CONDITION.search(name)][:6] or single[:6]),
            )
        )
    return parts


def _random(result: KnockoutResult, plain: Sequence[str], main: str) -> list[_Part]:
    controls = _repeated(result, plain)
    if not controls:
        return []
    table = _against_random(result, main, controls)
    table = table.loc[table["group"] == "all"].drop(columns="group").reset_index(drop=True)
    table["effect"] = table["effect"].str.replace("_", " ")
    points = ["value", "control_mean", "control_sd", "control_low", "control_high"]
    return [
        _Part(
            "random",
            f"{main} among its random controls",
            "Self effects; every repeat of a random mask is a point. Layer-matched masks have as many neurons in each "
            "layer as the selection.",
            plot_random(result, main, controls),
        ),
        _Part(
            "random",
            f"{main} against random masks",
            "Means over groups; each group's are in every-random.csv. p is the share of repeats, ours included, whose "
            "effect is at most ours; with R repeats it cannot be below 1 / (R + 1).",
            _points_table(table, points, *_UNITS[result.measure][1:]),
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


def _sweeps(result: KnockoutResult, how: Keywords) -> list[_Part]:
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
                _Part(
                    f"curve-{_slug(base)}-{_slug(axis)}",
                    f"{base} by {what}",
                    f"Mean over groups with intervals; thin lines are the groups. Exploratory: {number} settings were "
                    "tried, and no p is corrected for that.",
                    plot_curve(curve, axis, value=result.measure),
                    f"{base} [{axis}]",
                )
            )
        overall = curve.loc[curve["group"] == "all"]
        parts.append(
            _Part(
                f"curve-{_slug(base)}-{_slug(axis)}",
                f"{base} by {what}",
                f"Over all groups. Exploratory: {number} settings were tried. {_FEW}",
                _effect_table(overall, axis, result.measure),
                f"{base} [{axis}]",
            )
        )
    return parts


def _conditions(result: KnockoutResult, plain: Sequence[str], how: Keywords) -> list[_Part]:
    rows = []
    for condition in ("all", "correct", "wrong"):
        part = result.select(*plain).where(condition)
        if part.ids:
            summary = part.summary(**how)
            rows.append(summary[summary["group"] == "all"].assign(questions=condition))
    table = pd.concat(rows)
    table["selector"] = table["selector"] + ", " + table["questions"]
    return [
        _Part(
            "conditions",
            "By what the clean model answers",
            "Effects on all questions, and on those that the clean model answers right or wrong. On right ones "
            f"accuracy can only fall, on wrong ones only rise. {_FEW}",
            _effect_table(table, "selector", result.measure),
        )
    ]


def _accuracies(result: KnockoutResult, others: Mapping[str, KnockoutResult]) -> list[_Part]:
    accuracies = {"as asked": result.accuracy, **{name: other.accuracy for name, other in others.items()}}
    table = pd.DataFrame(accuracies).rename_axis("group").reset_index()
    table.loc[len(table)] = ["mean", *table.iloc[:, 1:].mean().tolist()]
    chance = result.provenance.get("chance")
    parts = [
        _Part(
            "accuracy",
            "Clean accuracy",
            "Without any mask, in percent."
            + (" Blind: without the picture. Options only: without picture and question." if others else ""),
            _points_table(table, list(accuracies)),
        )
    ]
    if others:
        figure = plot_accuracy(accuracies, chance=chance)
        parts.insert(0, _Part("accuracy", "Clean accuracy", "What the picture and the question contribute.", figure))
    return parts


# -- tables ------------------------------------------------------------------------------------------------------------


def _overall(summary: pd.DataFrame, plain: Sequence[str]) -> pd.DataFrame:
    return summary.loc[(summary["group"] == "all") & summary["selector"].isin(plain)]


def _effect_table(summary: pd.DataFrame, label: str, value: str = "correct") -> pd.DataFrame:
    """The columns of a summary that a paper prints, effects in the unit of their value with their intervals."""
    _, scale, digits = _UNITS[value]
    names = summary[label].to_numpy()
    if names.dtype.kind == "f":  # a setting such as 0.0005 is not 0.000
        names = np.array([_setting(name) for name in names])
    table = pd.DataFrame({label: names, "n": summary["n"].to_numpy()})
    if (summary["pictures"] != summary["n"]).any():
        table["pictures"] = summary["pictures"].to_numpy()
    clean = (scale, digits) if value == "score" else (100.0, 1)
    table["clean"] = [_number(clean[0] * one, clean[1]) for one in summary["clean"]]
    effects = {
        "self_effect": "self effect",
        "cross_effect": "cross effect",
        "cross_caused": "cross caused",
        "gap": "gap",
        "control_effect": "general",
    }
    for name, title in effects.items():
        if name in summary:
            bounds = zip(summary[name], summary[f"{name}_low"], summary[f"{name}_high"], strict=True)
            table[title] = [
                _number(scale * mean, digits)
                + (f" [{_number(scale * low, digits)}, {_number(scale * high, digits)}]" if low == low else " (few)")
                if np.isfinite(mean)
                else "–"
                for mean, low, high in bounds
            ]
    table["flips"] = [_number(100 * share) for share in summary["flips"]]
    if (summary["failures"] > 0).any():
        table["failures"] = [_number(100 * share) for share in summary["failures"]]
    return table


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
    columns = {_TESTS[name]: [_probability(value) for value in summary[name]] for name in tests}
    return pd.DataFrame({label: summary[label].to_numpy(), **columns, "settings": summary["settings"].to_numpy()})


def _points_table(table: pd.DataFrame, points: Sequence[str], scale: float = 100.0, digits: int = 1) -> pd.DataFrame:
    """A table with some columns in points of accuracy, or another unit, and p-values as they are printed."""
    shown = table.reset_index(drop=True).copy()
    for name in points:
        shown[name] = [_number(scale * value, digits) for value in shown[name]]
    for name in shown.columns:
        if name == "p" or str(name).startswith("p_"):
            shown[name] = [_probability(value) for value in shown[name]]
    return shown.rename(columns={name: str(name).replace("_", " ") for name in shown.columns})


def _number(value: Any, digits: int = 1) -> str:
    """An effect as it is printed: with so many digits, or as many as it takes not to be 0 where it is not."""
    if value is None or not np.isfinite(value):
        return "–"
    value = round(float(value), 9)  # means of shares that cancel each other leave 1e-17
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = np.format_float_positional(float(f"{value:.1g}"), trim="-") if value else f"{0:.{digits}f}"
    return text.replace("-", "−")


def _cell(value: object) -> str:
    """What stands in a cell; a number has three decimals, and a small one three digits that are not 0."""
    if not isinstance(value, float | np.floating):
        return str(value)
    if not np.isfinite(value):
        return "–"
    return (f"{value:.3f}" if value == 0 or abs(value) >= 0.1 else f"{value:.3g}").replace("-", "−")


def _setting(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def _probability(value: float) -> str:
    if not np.isfinite(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "−": r"$-$",
    "–": "--",
    "→": r"$\rightarrow$",
    "α": r"$\alpha$",
}


_COLUMN, _PAGE = 3.3 * 72.27, 6.75 * 72.27
"""Points of TeX: the width of a column, and of a page of two."""


def latex(table: pd.DataFrame, caption: str = "", label: str = "", turned: bool = False) -> str:
    """A table in LaTeX with booktabs, every character of the cells escaped.

    What is too wide for a column of 3.3 inches goes over both (``table*``), and what is too wide for these is scaled.

    Args:
        table: any table; numbers are aligned right.
        caption: of the table.
        label: what the text refers to it by.
        turned: write the names of the columns upwards, but for the first.
    """

    def cell(value: object) -> str:
        return "".join(_LATEX.get(letter, letter) for letter in _cell(value))

    rows = [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    head = [cell(name) for name in table.columns]
    space = 2 if turned else 3
    lengths = [
        max(len(one) for one in (*column, *(() if turned and n else (str(name),))))
        for n, (name, *column) in enumerate(zip(table.columns, *rows, strict=True))
    ]
    width = sum(4.2 * length + 2 * space for length in lengths)  # of Computer Modern, in 8 pt
    wide, scaled = width > _COLUMN, width > _PAGE
    if turned:
        head[1:] = [rf"\rotatebox{{90}}{{{name}}}" for name in head[1:]]
    align = "".join("r" if n and not _is_text(table[name]) else "l" for n, name in enumerate(table.columns))
    lines = [
        rf"% \usepackage{{booktabs{',graphicx' if turned or scaled else ''}}}",
        rf"\begin{{table{'*' * wide}}}",
        r"\centering",
        *([rf"\caption{{{cell(caption)}}}"] if caption else []),
        *([rf"\label{{{label}}}"] if label else []),
        rf"\footnotesize\setlength{{\tabcolsep}}{{{space}pt}}",
        *([r"\resizebox{\textwidth}{!}{%"] if scaled else []),
        rf"\begin{{tabular}}{{{align}}}",
        r"\toprule",
        " & ".join(head) + r" \\",
        r"\midrule",
        *(" & ".join(map(cell, row)) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}" + "}" * scaled,
        rf"\end{{table{'*' * wide}}}",
    ]
    return "\n".join(lines) + "\n"


def _is_text(column: pd.Series) -> bool:
    return not pd.api.types.is_numeric_dtype(column) and not all(str(value)[:1] in "−–<0123456789" for value in column)


# -- files -------------------------------------------------------------------------------------------------------------


def _slug(name: str) -> str:
    """A name for files: ASCII letters without accents, digits and hyphens; a digest where that loses a letter."""
    bare = "".join(letter for letter in unicodedata.normalize("NFKD", name) if not unicodedata.combining(letter))
    words = "".join(letter if letter.isascii() and letter.isalnum() else " " for letter in bare).split()
    slug = "-".join(words).lower()[:60] or "unnamed"
    lost = slug == "unnamed" or len(slug) == 60 or any(letter.isalnum() and not letter.isascii() for letter in bare)
    return f"{slug}-{_digest(name)}" if lost else slug


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:8]


def _told_apart(parts: Sequence[_Part], taken: Iterable[str]) -> list[_Part]:
    """Parts whose names are their own: one that a user's name gave, and another has too, ends with that name's digest.

    The digest is of the name alone, so a file keeps its name when others come before it.

    Args:
        parts: of the report.
        taken: names of further tables.
    """
    taken = [*taken, *(part.name for part in parts if part.numbers is not None)]
    number = Counter([*((part.kind, part.name) for part in parts), *(("table", name) for name in taken)])
    return [
        replace(part, name=f"{part.name}-{_digest(part.of)}") if part.of and number[part.kind, part.name] > 1 else part
        for part in parts
    ]


def _written(part: _Part, folder: Path) -> Keywords:
    """Write a part's files, and give what the page shows of it."""
    shown: Keywords = {"id": f"{part.kind}-{part.name}", "title": part.title, "caption": part.caption}
    if isinstance(part.content, pd.DataFrame):
        table = part.content
        files = _write_table(folder, part.name, table, f"{part.title}. {part.caption}")
        rows = [[_cell(value) for value in row] for row in table.itertuples(index=False)]
        shown |= {
            "columns": list(table.columns),
            "text": [_is_text(table[name]) for name in table.columns],
            "rows": rows,
        }
        return shown | {"files": files}
    files = {kind: f"figures/{part.name}.{kind.lower()}" for kind in ("PNG", "SVG", "PDF")}
    part.content.savefig(folder / files["PNG"], dpi=300, bbox_inches="tight")
    part.content.savefig(folder / files["PDF"], bbox_inches="tight", metadata={"CreationDate": None})
    buffer = io.BytesIO()
    part.content.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    (folder / files["SVG"]).write_bytes(buffer.getvalue())
    if part.numbers is not None:
        files |= _write_table(folder, part.name, part.numbers[1], part.numbers[0], turned=True)
    return shown | {"files": files, "picture": inside(buffer.getvalue(), "image/svg+xml")}


def _write_table(
    folder: Path, name: str, table: pd.DataFrame, caption: str = "", turned: bool = False
) -> dict[str, str]:
    """Write a table's files, and give them by kind. One without a caption is for reading on, and no table of LaTeX."""
    files = {"CSV": f"tables/{name}.csv", **({"LaTeX": f"tables/{name}.tex"} if caption and len(table) <= 500 else {})}
    write_text(folder / files["CSV"], table.to_csv(index=False))
    if "LaTeX" in files:
        write_text(folder / files["LaTeX"], latex(table, caption, f"tab:{name}", turned))
    return files


def _page_of(
    result: KnockoutResult, title: str, finding: str, shown: Sequence[Keywords], more: Sequence[str], confidence: float
) -> str:
    about = result.provenance
    sizes = [mask.size for mask in result.masks]
    facts = {
        "Model": about.get("model", "not known"),
        "Revision": about.get("revision") or "not known",
        "Questions": f"{len(result.ids):,} of {len(result.group_names)} groups"
        + (f", control groups {', '.join(result.control_names)}" if result.control_names else ""),
        "Clean accuracy": f"{100 * float(np.mean(result.correct[0])):.1f} %",
        **({} if result.scores is None else {"Clean score": f"{float(np.mean(result.scores[0])):.3f}"}),
        "Masks": f"{len(result.masks):,} of {len(result.selectors)} kinds, of {min(sizes):,} to {max(sizes):,} neurons",
        "Answers kept": f"{int((result.chosen > NOT_ASKED).sum()):,}",
        "Could not be parsed": f"{int((result.chosen == -1).sum()):,}",
        "Questions skipped": f"{len(about.get('skipped', [])):,}",
        "Read by": about.get("answer", "not known"),
        "Made with": f"vlmneurons {__version__}",
    }
    changes = "Accuracy under each mask less clean accuracy, in points"
    changes = changes if result.scores is None else "The mean score under each mask less the clean one"
    return page_of(title, f"{changes}; intervals at {100 * confidence:g} %.", facts, shown, more, about, finding)


def _finding(result: KnockoutResult, summary: pd.DataFrame, main: str) -> str:
    """The result in a sentence, with its intervals and how many questions it is of; empty where none has masks."""
    one = _overall(summary, [main]).iloc[0]
    if not np.isfinite(one["self_effect"]):
        return ""
    unit, scale, digits = _UNITS[result.measure]
    told = []
    for effect in ("self_effect", "cross_effect"):
        mean, low, high = (_number(scale * one[f"{effect}{end}"], digits) for end in ("", "_low", "_high"))
        few = "too few pictures or changed answers for an interval"
        told.append(f"{mean} {unit} " + (f"[{low}, {high}]" if np.isfinite(one[f"{effect}_low"]) else f"({few})"))
    told_so = (
        f"Switching off the neurons that {main} chose for a group moves its own questions by {told[0]}, and those of "
        f"other groups by {told[1]}: {one['n']:,} questions about {one['pictures']:,} pictures, of "
        f"{len(result.group_names)} groups."
    )
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
    more: Sequence[str],
    provenance: JSONMapping,
    finding: str = "",
) -> str:
    """A page that needs nothing else.

    Args:
        title: stands above it.
        lead: what its numbers are, in a sentence.
        facts: what it is of, by name.
        shown: what it shows, as it was written.
        more: names of further tables that lie beside it.
        provenance: where its numbers come from.
        finding: the result, in a sentence.
    """
    told = json.dumps(provenance, indent=1, default=str, ensure_ascii=False)
    how: Keywords = {"title": title, "lead": lead, "facts": facts, "parts": shown, "more": more, "finding": finding}
    return page_from("report.html", **how, provenance=told)
