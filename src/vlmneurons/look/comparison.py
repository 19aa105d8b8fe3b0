"""The page of several models side by side: `vlmneurons.compare(…).report(folder)`."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlmneurons._version import __version__
from vlmneurons.checks import Keywords, path_of
from vlmneurons.errors import MismatchError
from vlmneurons.files.atomic import write_text
from vlmneurons.look.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, PrintFigure, natural, with_fonts
from vlmneurons.look.numbers import printed, printed_p
from vlmneurons.look.parts import UNITS, Part, file_name, write_parts
from vlmneurons.look.plots.canvas import VALUES, draw_frame, draw_points, plain_names
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
    folder = path_of("folder", folder, MismatchError)
    main = main or next(name for name in ("CAS", *comparison.selectors) if name in comparison.selectors)
    if main not in comparison.selectors:
        raise MismatchError(f"main={main!r} has no masks here; there are {', '.join(comparison.selectors)}")
    every = {"models": comparison.table(), "every-group": comparison.groups(), "profiles": comparison.profiles()}
    shown = write_parts(_parts(comparison, main), every, folder)
    facts = {
        name: f"{one.provenance.get('model', 'not known')}, {len(one.ids):,} questions of {len(one.group_names)} groups"
        for name, one in comparison.results.items()
    }
    if comparison.notes:
        facts["What differs"] = " ".join(comparison.notes)
    facts["Made with"] = f"vlmneurons {__version__}"
    lead = f"Effects in {UNITS[comparison.value][0]}; intervals at {100 * comparison.confidence:g} %."
    provenance = {name: dict(one.provenance) for name, one in comparison.results.items()}
    page = folder / "index.html"
    write_text(page, page_of(title, lead, facts, shown, _EVERY, provenance))
    return page


def _parts(comparison: Comparison, main: str) -> list[Part]:
    table, groups, value = comparison.table(), comparison.groups(), comparison.value
    unit = UNITS[value][0]
    own = groups.loc[groups["selector"] == main]
    tests = {"p": "p", "p_holm": "Holm", "cross_p": "cross p", "gap_p": "gap p", "gap_p_holm": "gap Holm"}
    tested = pd.DataFrame({"selector": table["selector"], "model": table["model"]})
    tested = tested.assign(**{short: [printed_p(p) for p in table[name]] for name, short in tests.items()})
    agreement = comparison.agreement()
    for name in ("spearman", "cells"):
        agreement[name] = [printed(value, 2) for value in agreement[name]]
    for name in ("p", "cells_p"):
        agreement[name] = [printed_p(value) for value in agreement[name]]
    agreement = agreement.rename(columns={"spearman": "self effects", "cells": "other cells", "cells_p": "cells p"})
    return [
        Part(
            "effects",
            "Self against cross effect",
            "Mean over each model's groups, with intervals by picture; where there is none, there are too few pictures "
            "or changed answers.",
            _effects_figure(comparison, table),
        ),
        Part(
            "effects",
            "Effects by selector and model",
            f"In {unit}, mean over groups. Self: of a group's mask on its own questions; cross: of the other groups' "
            "masks on them; cross caused: of its mask on theirs; gap: self less cross. few: few pictures or changed "
            "answers.",
            _effects_of(table, value),
        ),
        Part(
            "tests",
            "Tests",
            "Sign flips of pictures with all their questions; Holm: corrected over the models.",
            tested,
        ),
        *_profiles(comparison),
        Part(
            "groups",
            f"Which groups agree: self effects of {main}",
            "Each group's self effect in each model, with intervals by picture.",
            _groups_figure(comparison, own),
        ),
        Part(
            "groups",
            f"Self effects of {main} by group and model",
            f"In {unit}; harmed: in how many models the effect is below zero with a p below .05, corrected over them.",
            _groups_table(comparison, own),
        ),
        Part(
            "agreement",
            "How alike two models are",
            "Rank correlation over the groups that both have, of self effects and of masks on other groups' questions; "
            "p by shuffling one model's groups. With few groups it says little.",
            agreement,
        ),
    ]


def _effects_of(table: pd.DataFrame, value: str) -> pd.DataFrame:
    shown = _effect_table(table.assign(flips=0.0, failures=0.0), "selector", value).drop(columns="flips")
    shown.insert(1, "model", table["model"].to_numpy())
    return shown


def _groups_table(comparison: Comparison, own: pd.DataFrame) -> pd.DataFrame:
    _, scale, digits = UNITS[comparison.value]
    rows: list[dict[str, object]] = []
    for group in sorted(set(own["group"]), key=natural):
        part = own[own["group"] == group].set_index("model")
        row: dict[str, object] = {"group": group}
        for model in comparison.models:
            known = model in part.index
            row[model] = "–"
            if known:
                effect, p = part.loc[model, "self_effect"], part.loc[model, "p_holm"]
                row[model] = f"{printed(scale * effect, digits)} (p {printed_p(p)})"
        rows.append({**row, "models": int(part["models"].iloc[0]), "harmed": int(part["harmed"].iloc[0])})
    return pd.DataFrame(rows)


def _effects_figure(comparison: Comparison, table: pd.DataFrame) -> Figure:
    """Self and cross effect, a band for each selector and in it a line for each model."""
    names = [name for name in comparison.selectors if name in set(table["selector"])]
    n_models = len(comparison.models)
    figure = PrintFigure(figsize=(6.4, 0.24 * len(names) * (n_models + 0.6) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    unit, scale, _ = VALUES[comparison.value]
    for axis, effect, what in ((left, "self_effect", "Self effect"), (right, "cross_effect", "Cross effect")):
        axis.axvline(0, color="black", linewidth=0.8)
        for n, model in enumerate(comparison.models):
            rows = table.loc[table["model"] == model]
            at = np.array([names.index(name) for name in rows["selector"]]) + _offset(n, n_models)
            _drawn(axis, rows, effect, scale, at, n, model)
        axis.set_title(what, fontsize=9)
        axis.set_xlabel(unit, fontsize=8)
        axis.set_yticks(range(len(names)), plain_names(names))
        axis.set_ylim(len(names) - 0.5, -0.5)
        draw_frame(axis, "x")
    return _with_legend(figure, [left])


def _groups_figure(comparison: Comparison, own: pd.DataFrame) -> Figure:
    names = sorted(set(own["group"]), key=natural)
    n_models = len(comparison.models)
    figure = PrintFigure(figsize=(6.4, (0.1 + 0.11 * n_models) * len(names) + 1.6), layout="constrained")
    axis = figure.subplots()
    axis.axvline(0, color="black", linewidth=0.8)
    unit, scale, _ = VALUES[comparison.value]
    for n, model in enumerate(comparison.models):
        rows = own.loc[own["model"] == model]
        at = np.array([names.index(name) for name in rows["group"]]) + _offset(n, n_models)
        _drawn(axis, rows, "self_effect", scale, at, n, model)
    axis.set_yticks(range(len(names)), plain_names(names))
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel(unit)
    draw_frame(axis, "x")
    return _with_legend(figure, [axis])


def _profiles(comparison: Comparison) -> list[Part]:
    """Where the neurons of each selector lie, in all models."""
    profiles = comparison.profiles()
    return [
        Part(
            f"profiles-{file_name(name)}",
            f"Where the neurons lie: {name}",
            "Share of a mask's neurons in each layer, mean over masks, times the number of layers: 1 (dotted) is as "
            "many as among layers chosen evenly. Depth is relative, so that models of other numbers of layers compare.",
            plot_profiles(profiles, name),
            name,
        )
        for name in list(dict.fromkeys(profiles["selector"]))[:6]
    ]


def _drawn(axis: Axes, rows: pd.DataFrame, effect: str, scale: float, at: np.ndarray, n: int, model: str) -> None:
    colour, marker = _STYLES[n % len(_STYLES)]
    ends = [scale * rows[f"{effect}{end}"].to_numpy(dtype=float) for end in ("", "_low", "_high")]
    draw_points(axis, ends, at, colour, marker, plain_names([model])[0])


def _offset(n: int, models: int) -> float:
    """Where a model's point lies beside the others' in a band of height 1."""
    return 0.7 * ((n + 0.5) / models - 0.5)


def _with_legend(figure: Figure, axes: Iterable[Axes]) -> Figure:
    """A figure with the names of all models that any of its panels shows, each once."""
    shown: Keywords = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    columns = 1 if max(map(len, shown), default=0) > 24 else 3
    how: Keywords = {"loc": "outside lower center", "frameon": False, "fontsize": 8}
    figure.legend(list(shown.values()), list(shown), ncols=columns, **how)
    with_fonts(figure)
    return figure
