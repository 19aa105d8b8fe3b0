"""Pictures of statistics, selections and knockout results.

Every function returns a matplotlib `Figure` and draws nowhere else: no window, no global state, no style changed.
Colours are safe for colour-blind readers (Okabe & Ito's, each with a marker of its own); effects use a diverging map
centred on zero.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlmneurons.checks import of_kind, real
from vlmneurons.errors import MismatchError
from vlmneurons.neurons.selection import Selection

if TYPE_CHECKING:
    from vlmneurons.study.result import KnockoutResult

_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#767676"

_LABELS = {
    "delta": ("Change of accuracy (points)", 100.0),
    "correct": ("Change of accuracy (points)", 100.0),
    "margin": ("Change of log-probability margin (nats)", 1.0),
    "flips": ("Answers that changed (%)", 100.0),
    "right_to_wrong": ("Right answers that turned wrong (%)", 100.0),
    "wrong_to_right": ("Wrong answers that turned right (%)", 100.0),
    "ablated": ("Accuracy under the mask (%)", 100.0),
}


def plot_matrix(
    result: "KnockoutResult",
    selector: str | Sequence[str] | None = None,
    *,
    value: str = "delta",
    limit: float | None = None,
) -> Figure:
    """Heat map of effects: whose neurons were off (rows) against whose questions were asked (columns).

    Args:
        result: what `knockout` gave.
        selector: one selector, or several side by side on one scale; all of them by default.
        value: column of `KnockoutResult.table`, such as ``"delta"`` (drawn in points) or ``"margin"`` (nats).
        limit: the value, as drawn, at which colours end, so that several figures can share a scale; by default the
            largest that is drawn.

    Raises:
        MismatchError: no such selector or value, or a limit that is not above 0.
    """
    from vlmneurons.study.result import KnockoutResult

    of_kind("result", result, KnockoutResult, MismatchError, "a KnockoutResult, which knockout gives")
    if selector is None or isinstance(selector, str):
        names = list(result.selectors) if selector is None else [selector]
    else:
        of_kind("selector", selector, Iterable, MismatchError, "the name of a selector, or a list of names")
        names = list(selector)
    if not names:
        raise MismatchError("there is no selector to draw: the study has no masks, or selector is an empty list")
    if limit is not None and real("limit", limit, MismatchError) <= 0:
        raise MismatchError(f"limit {limit} is the value at which colours end, and above 0")
    title, scale = _LABELS.get(value, (value, 1.0))
    matrices = {name: result.matrix(name, value=value) * scale for name in names}
    n_columns = max(matrix.shape[1] for matrix in matrices.values())
    n_rows = max(matrix.shape[0] for matrix in matrices.values())
    cell = 0.5 if n_columns <= 12 else 0.36
    longest = max(len(str(label)) for matrix in matrices.values() for label in [*matrix.index, *matrix.columns])
    width = len(names) * (cell * n_columns + 0.35) + 0.085 * longest + 1.6
    figure = Figure(figsize=(width, cell * n_rows + 0.085 * longest + 1.3), layout="constrained")
    same_rows = len({tuple(matrix.index) for matrix in matrices.values()}) == 1
    axes = figure.subplots(1, len(names), squeeze=False, sharey=same_rows)[0]
    most = limit or max(float(np.nanmax(np.abs(matrix.to_numpy(dtype=float)))) for matrix in matrices.values()) or 1.0
    image = None
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        values = matrix.to_numpy(dtype=float)
        image = axis.imshow(values, cmap="RdBu", vmin=-most, vmax=most)
        if result.control_names and len(result.control_names) < matrix.shape[1]:
            axis.axvline(matrix.shape[1] - len(result.control_names) - 0.5, color="black", linewidth=1)
        axis.set_xticks(range(matrix.shape[1]), _plain(matrix.columns), rotation=90 if longest > 4 else 0)
        axis.set_yticks(range(matrix.shape[0]), _plain(matrix.index))
        axis.set_title(_plain([name])[0])
        axis.set_xlabel("Questions about")
        if n_columns <= 12:
            for row, column in np.ndindex(values.shape):
                if np.isnan(values[row, column]):  # not asked: no colour and no number
                    continue
                shade = abs(values[row, column]) / most
                # A cell that is coloured says by how much: whole numbers would turn small effects into 0.
                text = f"{values[row, column]:.{1 if most < 10 else 0}f}"
                axis.text(
                    column,
                    row,
                    "0" if float(text) == 0 else text.replace("-", "−"),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if shade > 0.6 else "black",
                )
    axes[0].set_ylabel("Neurons switched off: those of")
    if image is not None:
        figure.colorbar(image, ax=list(axes), label=title, shrink=0.85)
    return figure


def plot_layers(selection: Selection, *, expected: bool = True) -> Figure:
    """How many neurons each layer holds, for every group of a selection: groups by layers, as a heat map with counts.

    Args:
        selection: the neurons.
        expected: name below the picture what a uniform choice would put into a layer on average.

    Raises:
        MismatchError: the selection spans several towers; restrict it to one.
    """
    of_kind("selection", selection, Selection, MismatchError)
    towers = sorted({site.tower for site in selection.space.sites})
    if len(towers) > 1:
        raise MismatchError(f"layers are drawn for one tower; this selection spans {', '.join(towers)}")
    layers = list(selection.space.layers)
    groups = list(selection)
    layer_of = selection.space.layer_of
    counts = np.stack(
        [np.bincount(layer_of[selection[group].indices].numpy(), minlength=layers[-1] + 1)[layers] for group in groups]
    )
    cell = 0.5 if len(layers) <= 12 else 0.3
    longest = max(len(group) for group in groups)
    figure = Figure(
        figsize=(cell * len(layers) + 0.085 * longest + 2.0, 0.34 * len(groups) + 1.5), layout="constrained"
    )
    axis = figure.subplots()
    most = max(int(counts.max()), 1)
    image = axis.imshow(counts, cmap="cividis", vmin=0, vmax=most, aspect="auto")
    axis.set_xticks(range(len(layers)), layers, fontsize=9 if len(layers) <= 32 else 6)
    axis.set_yticks(range(len(groups)), _plain(groups))
    label = f"Layer of the {towers[0]} tower"
    if expected:
        mean = float(np.mean([len(selection[group]) for group in groups])) / len(layers)
        label += f"\n(a uniform choice: {mean:.3g} neurons a layer)"
    axis.set_xlabel(label)
    axis.set_ylabel("Neurons of")
    if len(layers) <= 12:
        for row, column in np.ndindex(counts.shape):
            axis.text(
                column,
                row,
                int(counts[row, column]),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if counts[row, column] < 0.55 * most else "black",
            )
    figure.colorbar(image, ax=axis, label="Neurons")
    return figure


def _plain(names: Any) -> list[str]:
    """Names as they are: a dollar sign would begin a formula."""
    return [str(name).replace("$", r"\$") for name in names]


# -- effects with intervals --------------------------------------------------------------------------------------------

_EFFECTS = {
    "self_effect": ("Self effect (own questions)", _ORANGE, "o"),
    "cross_effect": ("Cross effect (other masks)", _BLUE, "s"),
    "gap": ("Gap", _GREEN, "D"),
    "control_effect": ("General ability", _PURPLE, "^"),
}


def plot_effects(
    summary: pd.DataFrame,
    label: str = "selector",
    *,
    effects: Sequence[str] = ("self_effect", "cross_effect"),
    title: str = "",
) -> Figure:
    """Effects with their intervals, a line for each row of a summary: self against cross effect.

    Args:
        summary: rows of `KnockoutResult.summary`, such as those of all groups together, or of one selector.
        label: the column that names the rows: ``"selector"`` or ``"group"``.
        effects: columns to draw: ``"self_effect"``, ``"cross_effect"``, ``"gap"``, ``"control_effect"``.
        title: stands above.

    Raises:
        MismatchError: an effect that the summary does not have.
    """
    for effect in effects:
        if effect not in _EFFECTS or effect not in summary:
            known = [name for name in _EFFECTS if name in summary]
            raise MismatchError(f"effect {effect!r} is not in the summary; it has {', '.join(known)}")
    names = [str(name) for name in summary[label]]
    figure = Figure(figsize=(6.4, 0.3 * len(names) + 1.7), layout="constrained")
    axis = figure.subplots()
    axis.axvline(0, color="black", linewidth=0.8)
    places = np.arange(len(names))
    for n, effect in enumerate(effects):
        name, colour, marker = _EFFECTS[effect]
        value, low, high = (100 * summary[f"{effect}{end}"].to_numpy(dtype=float) for end in ("", "_low", "_high"))
        offset = 0.22 * (n - (len(effects) - 1) / 2)
        _points(axis, value, low, high, places + offset, colour, marker, name)
    axis.set_yticks(places, _plain(names))
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel("Change of accuracy (points)")
    _frame(axis, "x")
    if title:
        axis.set_title(title, fontsize=10)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _points(
    axis: Axes, value: Any, low: Any, high: Any, at: Any, colour: str, marker: str, label: str, *, upright: bool = False
) -> None:
    """Points with their intervals; an interval may lie to one side of its point."""
    reach = np.vstack([np.maximum(value - low, 0), np.maximum(high - value, 0)])
    how: dict[str, Any] = {"yerr": reach} if upright else {"xerr": reach}
    axis.errorbar(
        *((at, value) if upright else (value, at)),
        **how,
        fmt=marker,
        color=colour,
        markersize=4.5,
        linewidth=1.2,
        capsize=2,
        label=label,
    )


def _frame(axis: Axes, grid: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)


def plot_curve(curve: pd.DataFrame, axis_name: str, *, groups: bool = True) -> Figure:
    """Self and cross effect along a sweep: all groups together with intervals, and each group's self effect thinly.

    Args:
        curve: what `KnockoutResult.curve` gave.
        axis_name: the column of the setting: ``"r"``, ``"alpha"``, ``"items"``.
        groups: draw the groups.
    """
    titles = {
        "r": "Share of neurons switched off (%)",
        "alpha": "Strength α (neurons scaled by 1 + α; −1 is off)",
        "items": "Identification questions a group",
    }
    scale = 100 if axis_name == "r" else 1
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color="black", linewidth=0.8)
    if groups:
        single = curve[curve["group"] != "all"]
        for n, (_, rows) in enumerate(single.groupby("group")):
            axis.plot(
                scale * rows[axis_name],
                100 * rows["self_effect"],
                color=_ORANGE,
                alpha=0.25,
                linewidth=0.8,
                label="Self effect of each group" if n == 0 else None,
            )
    whole = curve[curve["group"] == "all"]
    at = scale * whole[axis_name].to_numpy(dtype=float)
    for effect in ("self_effect", "cross_effect"):
        name, colour, marker = _EFFECTS[effect]
        value, low, high = (100 * whole[f"{effect}{end}"].to_numpy(dtype=float) for end in ("", "_low", "_high"))
        axis.plot(at, value, color=colour, linewidth=1.2)
        _points(axis, value, low, high, at, colour, marker, name, upright=True)
    if axis_name in ("r", "items") and len(at) > 1 and at.min() > 0:
        axis.set_xscale("log")
        axis.set_xticks(at, [f"{value:g}" for value in at])
        axis.minorticks_off()
    else:
        axis.set_xticks(at, [f"{value:g}".replace("-", "−") for value in at])
    axis.set_xlabel(titles.get(axis_name, axis_name))
    axis.set_ylabel("Change of accuracy (points)")
    _frame(axis, "both")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def plot_flips(result: "KnockoutResult", selectors: Sequence[str] | None = None) -> Figure:
    """Which answers change, and how: under the group's own mask, and under the others'.

    Args:
        result: what `knockout` gave.
        selectors: which; by default all that have masks of groups.
    """
    table = result.table()
    table = table[table["group"].isin(result.group_names) & table["mask"].isin(result.group_names)]
    names = [name for name in selectors or result.selectors if (table["selector"] == name).any()]
    kinds = {
        "right_to_wrong": ("right → wrong", _ORANGE, ""),
        "wrong_to_right": ("wrong → right", _BLUE, "////"),
        "wrong_to_wrong": ("wrong → other wrong", "#BBBBBB", "...."),
    }
    figure = Figure(figsize=(6.4, 0.5 * len(names) + 1.7), layout="constrained")
    axis = figure.subplots()
    labels, places = [], []
    for n, name in enumerate(names):
        own = table[table["selector"] == name]
        for k, (which, rows) in enumerate(
            (("own", own[own["mask"] == own["group"]]), ("other", own[own["mask"] != own["group"]]))
        ):
            place, left = n + 0.36 * k - 0.18, 0.0
            labels.append(f"{name}, {which} mask" if k == 0 else f"{which} masks")
            places.append(place)
            for kind, (label, colour, hatch) in kinds.items():
                share = 100 * float(rows[kind].mean()) if len(rows) else 0.0
                axis.barh(
                    place,
                    share,
                    left=left,
                    height=0.32,
                    color=colour,
                    hatch=hatch,
                    edgecolor="white",
                    linewidth=0.4,
                    label=label if n == 0 and k == 0 else None,
                )
                left += share
    axis.set_yticks(places, _plain(labels), fontsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.set_xlabel("Answers that changed (%)")
    _frame(axis, "x")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def plot_depth(result: "KnockoutResult", selectors: Sequence[str]) -> Figure:
    """Where each selector's neurons lie: share of a mask in every layer, mean over groups, with the range of groups.

    Args:
        result: what `knockout` gave; its masks know their number of neurons in each layer.
        selectors: which.

    Raises:
        MismatchError: the masks do not know their layers.
    """
    layers = [str(name) for name in result.provenance.get("layers", [])]
    if not layers:
        raise MismatchError("these masks do not know their layers: they were not made by knockout")
    towers = sorted({name.split(" ")[0] for name in layers})
    short = [name.split(" ")[1] if len(towers) == 1 else name for name in layers]
    figure = Figure(figsize=(max(5.2, 0.17 * len(layers) + 2), 3.4), layout="constrained")
    axis = figure.subplots()
    at = np.arange(len(layers))
    styles = zip((_ORANGE, _BLUE, _GREEN, _PURPLE, "black", "#E69F00"), "osD^vP", ("-", "--", "-.", ":", "-", "--"))
    for name, (colour, marker, line) in zip(selectors, styles, strict=False):
        shares = np.array(
            [np.array(m.layers) / m.size for m in result.masks if m.selector == name and m.size and m.group != "all"]
        )
        if not len(shares):
            continue
        axis.fill_between(at, 100 * shares.min(0), 100 * shares.max(0), color=colour, alpha=0.12, linewidth=0)
        axis.plot(
            at,
            100 * shares.mean(0),
            color=colour,
            marker=marker,
            markersize=4,
            linestyle=line,
            linewidth=1.3,
            label=name,
        )
    axis.axhline(100 / len(layers), color=_GREY, linewidth=0.9, linestyle=(0, (1, 2)), label="uniform")
    axis.set_xticks(at, short, fontsize=8 if len(layers) <= 32 else 6, rotation=0 if len(towers) == 1 else 90)
    axis.set_xlabel(f"Layer of the {towers[0]} tower" if len(towers) == 1 else "Layer")
    axis.set_ylabel("Share of the mask (%)")
    axis.set_ylim(bottom=0)
    _frame(axis, "y")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def plot_random(result: "KnockoutResult", selector: str, controls: Sequence[str]) -> Figure:
    """A selector's self effects among those of its random controls, group by group, every repeat a point.

    Args:
        result: what `knockout` gave.
        selector: the selector.
        controls: names of random masks given as lists.
    """
    table = result.table()
    table = table[table["mask"] == table["group"]]
    groups = list(result.group_names)
    figure = Figure(figsize=(6.4, 0.3 * len(groups) + 1.7), layout="constrained")
    axis = figure.subplots()
    axis.axvline(0, color="black", linewidth=0.8)
    styles = [(_BLUE, "x"), (_GREEN, "+"), (_PURPLE, "1"), (_GREY, "|")]
    for n, name in enumerate(controls):
        colour, marker = styles[n % len(styles)]
        rows = table[table["selector"] == name]
        # Repeats stand below each other, each control in a band of its own: many are equal, and would hide each other.
        repeats = sorted(set(rows["repeat"]))
        places = (n + (np.arange(len(repeats)) + 0.5) / len(repeats)) / len(controls) - 0.5
        shift = dict(zip(repeats, 0.76 * places, strict=True))
        at = [groups.index(one.group) + shift[one.repeat] for one in rows.itertuples()]
        axis.scatter(
            100 * rows["delta"], at, color=colour, marker=marker, s=18, linewidths=1.0, label=_plain([name])[0]
        )
    own = table[table["selector"] == selector]
    at = [groups.index(group) for group in own["group"]]
    axis.scatter(100 * own["delta"], at, color=_ORANGE, marker="o", s=26, zorder=3, label=_plain([selector])[0])
    axis.set_yticks(range(len(groups)), _plain(groups))
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.set_xlabel("Self effect: change of accuracy (points)")
    _frame(axis, "x")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def plot_accuracy(accuracies: Mapping[str, Mapping[str, float]], *, chance: float | None = None) -> Figure:
    """Accuracies of several ways of asking, group by group: with the picture, blind, by the options alone.

    Args:
        accuracies: for each way of asking the accuracy of each group.
        chance: accuracy of a guess, drawn as a line.
    """
    groups = sorted({group for one in accuracies.values() for group in one})
    figure = Figure(figsize=(6.4, 0.3 * len(groups) + 1.7), layout="constrained")
    axis = figure.subplots()
    styles = [(_ORANGE, "o"), (_BLUE, "s"), (_GREEN, "D"), (_PURPLE, "^"), ("black", "v")]
    for n, (name, values) in enumerate(accuracies.items()):
        colour, marker = styles[n % len(styles)]
        known = [group for group in groups if group in values]
        axis.scatter(
            [100 * values[group] for group in known],
            [groups.index(group) for group in known],
            color=colour,
            marker=marker,
            s=24,
            label=_plain([name])[0],
        )
    if chance is not None:
        axis.axvline(100 * chance, color=_GREY, linewidth=1, linestyle="--", label="chance")
    axis.set_yticks(range(len(groups)), _plain(groups))
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.set_xlim(-2, 102)
    axis.set_xlabel("Accuracy (%)")
    _frame(axis, "both")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure
