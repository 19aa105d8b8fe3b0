"""The page of several models side by side: `vlmneurons.compare(…).report(folder)`."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlmneurons._version import __version__
from vlmneurons.checks import as_path
from vlmneurons.errors import MismatchError
from vlmneurons.files.atomic import write_text
from vlmneurons.look.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, PrintFigure, natural, with_fonts
from vlmneurons.look.numbers import MISSING, printed, printed_p
from vlmneurons.look.parts import UNITS, Part, explained, write_parts
from vlmneurons.look.plots.canvas import VALUES, draw_frame, draw_points, plain_names, with_ends
from vlmneurons.look.plots.neurons import plot_profiles
from vlmneurons.look.report import _effect_table, page_of
from vlmneurons.study.compare import Comparison

_STYLES = tuple(zip((ORANGE, BLUE, GREEN, PURPLE, "black", GREY), "osD^vP", strict=True))
"""Colour and marker of each model; more models than these begin again."""

_EVERY = {
    "models": "each selector in each model, over all groups: Comparison.table",
    "every-group": "each selector in each model, group by group: Comparison.groups",
    "profiles": "where each selector's neurons lie in each model: Comparison.profiles",
}
"""The tables that programs read, and what they hold."""


def write_comparison(
    comparison: Comparison, folder: str | Path, *, main: str | None = None, title: str = "Models compared"
) -> Path:
    """See `Comparison.report`.

    Args:
        comparison: the models.
        folder: gets ``index.html``, ``figures/`` and ``tables/``.
        main: the selector that per-group figures are of.
        title: stands above the page.

    Raises:
        MismatchError: no such selector.
    """
    folder = as_path("folder", folder, MismatchError)
    main = main or next(name for name in ("CAS", *comparison.selectors) if name in comparison.selectors)
    if main not in comparison.selectors:
        raise MismatchError(f"main={main!r} has no masks here; there are {', '.join(comparison.selectors)}")
    every = {"models": comparison.table(), "every-group": comparison.groups(), "profiles": comparison.profiles()}
    sections = write_parts(_parts(comparison, main, *every.values()), every, folder)
    facts = {
        name: f"{result.provenance.get('model', 'not known')}, {len(result.ids):,} questions of "
        f"{len(result.group_names)} groups"
        for name, result in comparison.results.items()
    }
    if comparison.notes:
        facts["What differs"] = " ".join(comparison.notes)
    facts["Made with"] = f"vlmneurons {__version__}"
    lead = f"Effects in {UNITS[comparison.value][0]}; intervals at {100 * comparison.confidence:g} %."
    provenance = {name: dict(result.provenance) for name, result in comparison.results.items()}
    page = folder / "index.html"
    write_text(page, page_of(title, lead, facts, sections, _EVERY, provenance))
    return page


def _parts(
    comparison: Comparison, main: str, table: pd.DataFrame, groups: pd.DataFrame, profiles: pd.DataFrame
) -> list[Part]:
    value = comparison.value
    unit, of_main = UNITS[value][0], groups.loc[groups["selector"] == main]
    effects = _effect_table(table.assign(flips=0.0, failures=0.0), "selector", value).drop(columns="flips")
    effects.insert(1, "model", table["model"].to_numpy())
    titles = {"p": "p", "p_holm": "Holm", "cross_p": "cross p", "gap_p": "gap p", "gap_p_holm": "gap Holm"}
    tests = table[["selector", "model"]].assign(**{titles[name]: table[name].map(printed_p) for name in titles})
    agreement = comparison.agreement()
    for name in ("spearman", "cells"):
        agreement[name] = [printed(correlation, 2) for correlation in agreement[name]]
    for name in ("p", "cells_p"):
        agreement[name] = agreement[name].map(printed_p)
    agreement = agreement.rename(columns={"spearman": "self effects", "cells": "other cells", "cells_p": "cells p"})
    return [
        explained("models", _effects_figure(comparison, table), name="effects"),
        explained("models-table", effects, name="effects", unit=unit),
        explained("models-tests", tests, name="tests"),
        *(
            explained("profiles", plot_profiles(profiles, name), of=name)
            for name in list(dict.fromkeys(profiles["selector"]))[:6]
        ),
        explained("groups", _groups_figure(comparison, of_main), main=main),
        explained("groups-table", _groups_table(comparison, of_main), name="groups", main=main, unit=unit),
        explained("agreement", agreement),
    ]


def _groups_table(comparison: Comparison, of_main: pd.DataFrame) -> pd.DataFrame:
    """A row for each group: its self effect and p in each model, and in how many models it is harmed."""
    _, scale, digits = UNITS[comparison.value]
    rows: list[dict[str, object]] = []
    for group in sorted(set(of_main["group"]), key=natural):
        by_model = of_main[of_main["group"] == group].set_index("model")
        row: dict[str, object] = {"group": group, **dict.fromkeys(comparison.models, MISSING)}
        for model, effect, p in by_model[["self_effect", "p_holm"]].itertuples():
            row[model] = f"{printed(scale * effect, digits)} (p {printed_p(p)})"
        rows.append({**row, **{name: int(by_model[name].iloc[0]) for name in ("models", "harmed")}})
    return pd.DataFrame(rows)


def _effects_figure(comparison: Comparison, table: pd.DataFrame) -> Figure:
    """Self and cross effect, a band for each selector and in it a line for each model."""
    names = [name for name in comparison.selectors if name in set(table["selector"])]
    height = 0.24 * len(names) * (len(comparison.models) + 0.6) + 1.6
    figure = PrintFigure(figsize=(6.4, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, effect, title in ((left, "self_effect", "Self effect"), (right, "cross_effect", "Cross effect")):
        _draw_models(comparison, axis, table, effect, "selector", names)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(axis.get_xlabel(), fontsize=8)
    return _with_legend(figure, left)


def _groups_figure(comparison: Comparison, of_main: pd.DataFrame) -> Figure:
    """Self effects, a band for each group and in it a line for each model."""
    names = sorted(set(of_main["group"]), key=natural)
    height = (0.1 + 0.11 * len(comparison.models)) * len(names) + 1.6
    figure = PrintFigure(figsize=(6.4, height), layout="constrained")
    axis = figure.subplots()
    _draw_models(comparison, axis, of_main, "self_effect", "group", names)
    return _with_legend(figure, axis)


def _draw_models(
    comparison: Comparison, axis: Axes, table: pd.DataFrame, effect: str, label: str, names: list[str]
) -> None:
    """An effect with its interval of every model, in a band of height 1 for each of the names in a column."""
    unit, scale, _ = VALUES[comparison.value]
    axis.axvline(0, color="black", linewidth=0.8)
    for n, model in enumerate(comparison.models):
        rows, (colour, marker) = table.loc[table["model"] == model], _STYLES[n % len(_STYLES)]
        offset = 0.7 * ((n + 0.5) / len(comparison.models) - 0.5)
        at = np.array([names.index(name) for name in rows[label]]) + offset
        draw_points(axis, with_ends(rows, effect, scale), at, colour, marker, plain_names([model])[0])
    axis.set_yticks(range(len(names)), plain_names(names))
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel(unit)
    draw_frame(axis, "x")


def _with_legend(figure: Figure, axis: Axes) -> Figure:
    """A figure with the names of all models below it."""
    handles, labels = axis.get_legend_handles_labels()
    columns = 1 if max(map(len, labels), default=0) > 24 else 3
    figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=8, ncols=columns)
    with_fonts(figure)
    return figure
