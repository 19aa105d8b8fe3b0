"""Effects with their intervals, and the answers behind them: by group, by setting, by selector, against random sets."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlmneurons.checks import Keywords, check_choice
from vlmneurons.errors import MismatchError
from vlmneurons.look.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, natural, ordered
from vlmneurons.look.plots.canvas import STYLES, VALUES, Canvas, check_rows, draw_points, plain_names, with_ends

if TYPE_CHECKING:
    from vlmneurons.study.result import KnockoutResult


_EFFECTS = {
    "self_effect": ("Self effect (own questions)", ORANGE, "o"),
    "cross_effect": ("Cross effect (other masks)", BLUE, "s"),
    "gap": ("Gap", GREEN, "D"),
    "control_effect": ("General ability", PURPLE, "^"),
}


def plot_effects(
    summary: pd.DataFrame,
    label: str = "selector",
    *,
    effects: Sequence[str] = ("self_effect", "cross_effect"),
    title: str = "",
    value: str = "correct",
    order: str | Sequence[str] | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Effects with their intervals, a line for each row of a summary: self against cross effect.

    Args:
        summary: rows of `KnockoutResult.summary`, such as those of all groups together, or of one selector.
        label: the column that names the rows: ``"selector"`` or ``"group"``.
        effects: columns to draw: ``"self_effect"``, ``"cross_effect"``, ``"gap"``, ``"control_effect"``.
        title: stands above.
        value: what the summary is of: ``"correct"`` (drawn in points), ``"margin"`` or ``"score"``.
        order: of the rows: all their names in the order wanted, or ``"clustered"``: alike effects beside each other. By
            default that of the summary.
        width: of the figure in inches; see `plot_matrix`.
        ax: axes of a figure of your own to draw into.

    Returns:
        The figure, which is a new one or that of ``ax``.

    Raises:
        MismatchError: an effect that the summary does not have, another order than of its rows, or a width that is too
            narrow.
    """
    drawable = [name for name in _EFFECTS if name in summary]
    for effect in effects:
        if effect not in drawable:
            raise MismatchError(f"effect {effect!r} is not in the summary; it has {', '.join(drawable)}")
    names = [str(name) for name in summary[label]]
    if order is not None:
        wanted = ordered(names, order, summary[list(effects)].to_numpy(dtype=float))
        summary = summary.iloc[[names.index(name) for name in wanted]]
        names = wanted
    canvas = Canvas(width, ax, [_EFFECTS[effect][0] for effect in effects], len(names))
    axis = canvas.axis
    axis.axvline(0, color="black", linewidth=0.8)
    places = np.arange(len(names))
    unit, scale, _ = VALUES[value]
    for n, effect in enumerate(effects):
        name, colour, marker = _EFFECTS[effect]
        offset = 0.22 * (n - (len(effects) - 1) / 2)
        draw_points(axis, with_ends(summary, effect, scale), places + offset, colour, marker, name)
    canvas.rows(names)
    if title:
        axis.set_title(plain_names([title])[0], fontsize=canvas.size if width else 10)
    return canvas.done("x", unit)


def plot_curve(
    curve: pd.DataFrame,
    axis_name: str,
    *,
    groups: bool = True,
    value: str = "correct",
    width: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Self and cross effect along a sweep: all groups together with intervals, and each group's self effect thinly.

    Args:
        curve: what `KnockoutResult.curve` gave.
        axis_name: the column of the setting: ``"r"``, ``"alpha"``, ``"items"``.
        groups: draw the groups.
        value: what the curve is of; see `plot_effects`.
        width: of the figure in inches; see `plot_matrix`.
        ax: axes of a figure of your own to draw into.

    Returns:
        The figure, which is a new one or that of ``ax``.

    Raises:
        MismatchError: a width that is too narrow.
    """
    unit, factor, _ = VALUES[value]
    titles = {
        "r": "Share of neurons switched off (%)",
        "alpha": "Strength α (neurons scaled by 1 + α; −1 is off)",
        "items": "Identification questions a group",
    }
    scale = 100 if axis_name == "r" else 1
    single = curve[curve["group"] != "all"] if groups else curve[:0]
    thin = ["Self effect of each group"] if len(single) else []
    shown = ("self_effect", "cross_effect")
    canvas = Canvas(width, ax, [*thin, *(_EFFECTS[effect][0] for effect in shown)], usual=(5.2, 3.6))
    axis = canvas.axis
    axis.axhline(0, color="black", linewidth=0.8)
    for n, (_, rows) in enumerate(single.groupby("group")):
        style = {"color": ORANGE, "alpha": 0.25, "linewidth": 0.8, "label": thin[0] if n == 0 else None}
        axis.plot(scale * rows[axis_name], factor * rows["self_effect"], **style)
    whole = curve.loc[curve["group"] == "all"]
    at = scale * whole[axis_name].to_numpy(dtype=float)
    for effect in shown:
        name, colour, marker = _EFFECTS[effect]
        drawn = with_ends(whole, effect, factor)
        axis.plot(at, drawn[0], color=colour, linewidth=1.2)
        draw_points(axis, drawn, at, colour, marker, name, upright=True)
    canvas.settings(at, axis_name in ("r", "items"))
    return canvas.done("both", titles.get(axis_name, axis_name), unit)


def plot_flips(
    result: "KnockoutResult",
    selectors: Sequence[str] | None = None,
    *,
    width: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Which answers change, and how: under the group's own mask, and under the others'.

    Args:
        result: what `knockout` gave.
        selectors: which, in this order; by default all that have masks of groups.
        width: of the figure in inches; see `plot_matrix`.
        ax: axes of a figure of your own to draw into.

    Returns:
        The figure, which is a new one or that of ``ax``.

    Raises:
        MismatchError: no such selector, or a width that is too narrow.
    """
    table = result.table()
    table = table[table["group"].isin(result.group_names) & table["mask"].isin(result.group_names)]
    for name in selectors or ():
        result.rows_of(name)
    names = [name for name in selectors or result.selectors if (table["selector"] == name).any()]
    kinds = {
        "right_to_wrong": ("right → wrong", ORANGE, ""),
        "wrong_to_right": ("wrong → right", BLUE, "////"),
        "wrong_to_wrong": ("wrong → other wrong", "#BBBBBB", "...."),
    }
    canvas = Canvas(width, ax, [label for label, _, _ in kinds.values()], 2 * len(names), (6.4, 0.25))
    axis = canvas.axis
    labels, places = [], []
    for n, (name, shown) in enumerate(zip(names, canvas.names(names), strict=True)):
        of_selector = table[table["selector"] == name]
        of_own_mask = of_selector["mask"] == of_selector["group"]
        for k, (mask, rows) in enumerate(
            ((f"{shown}, own mask", of_selector[of_own_mask]), ("other masks", of_selector[~of_own_mask]))
        ):
            place, left = n + 0.36 * k - 0.18, 0.0
            labels.append(mask)
            places.append(place)
            for kind, (label, colour, hatch) in kinds.items():
                share = 100 * float(rows[kind].mean()) if len(rows) else 0.0
                style = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.4}
                axis.barh(place, share, left=left, height=0.32, label=label if n == k == 0 else None, **style)
                left += share
    axis.set_yticks(places, labels, fontsize=canvas.size if width else 8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlim(left=0)
    return canvas.done("x", "Answers that changed (%)")


def plot_random(
    result: "KnockoutResult",
    selector: str,
    controls: Sequence[str],
    *,
    order: str | Sequence[str] | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """A selector's self effects among those of its random controls, group by group, every repeat a point.

    Args:
        result: what `knockout` gave.
        selector: the selector.
        controls: names of random masks given as lists.
        order: of the groups: all of them in the order wanted, or ``"clustered"``: alike effects beside each other. By
            default sorted, G2 before G10.
        width: of the figure in inches; see `plot_matrix`.
        ax: axes of a figure of your own to draw into.

    Returns:
        The figure, which is a new one or that of ``ax``.

    Raises:
        MismatchError: no such selector or control, another order than of these groups, or a width that is too narrow.
    """
    for name in (selector, *controls):
        result.rows_of(name)
    table = result.table()
    table = table.loc[table["mask"] == table["group"]]
    unit, scale, _ = VALUES[result.measure]
    column = "delta" if result.measure == "correct" else "score"
    effects = table.loc[table["selector"] == selector]
    effect = effects.groupby("group")[column].mean()
    groups = ordered(result.group_names, order, effect.reindex(list(result.group_names)).to_numpy()[:, None])
    canvas = Canvas(width, ax, [*controls, selector], len(groups))
    axis = canvas.axis
    axis.axvline(0, color="black", linewidth=0.8)
    styles = [(BLUE, "x"), (GREEN, "+"), (PURPLE, "1"), (GREY, "|")]
    for n, name in enumerate(controls):
        colour, marker = styles[n % len(styles)]
        rows = table.loc[table["selector"] == name]
        # Repeats stand below each other, each control in a band of its own: many are equal, and would hide each other.
        repeats = sorted(set(rows["repeat"]))
        places = (n + (np.arange(len(repeats)) + 0.5) / len(repeats)) / len(controls) - 0.5
        shift = dict(zip(repeats, 0.76 * places, strict=True))
        at = rows["group"].map(groups.index) + rows["repeat"].map(shift)
        style = {"color": colour, "marker": marker, "s": 18, "linewidths": 1.0}
        axis.scatter(scale * rows[column], at, label=canvas.names([name])[0], **style)
    at = effects["group"].map(groups.index)
    axis.scatter(
        scale * effects[column], at, label=canvas.names([selector])[0], color=ORANGE, marker="o", s=26, zorder=3
    )
    canvas.rows(groups)
    return canvas.done("x", f"Self effect: {unit[0].lower()}{unit[1:]}")


def plot_accuracy(
    accuracies: Mapping[str, Mapping[str, float]],
    *,
    chance: float | None = None,
    order: str | Sequence[str] | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Accuracies of several ways of asking, group by group: with the picture, blind, by the options alone.

    Args:
        accuracies: for each way of asking the accuracy of each group.
        chance: accuracy of a guess, drawn as a line.
        order: of the groups: all of them in the order wanted, or ``"clustered"``: alike accuracies beside each other.
            By default sorted, G2 before G10.
        width: of the figure in inches; see `plot_matrix`.
        ax: axes of a figure of your own to draw into.

    Returns:
        The figure, which is a new one or that of ``ax``.

    Raises:
        MismatchError: another order than of these groups, or a width that is too narrow.
    """
    names = sorted({group for by_group in accuracies.values() for group in by_group}, key=natural)
    profiles = np.array([[by_group.get(group, np.nan) for by_group in accuracies.values()] for group in names])
    groups = ordered(names, order, profiles)
    canvas = Canvas(width, ax, [*accuracies, *(["chance"] if chance is not None else [])], len(groups))
    axis = canvas.axis
    for n, (name, values) in enumerate(accuracies.items()):
        colour, marker = STYLES[n % len(STYLES)]
        asked = [group for group in groups if group in values]
        style = {"color": colour, "marker": marker, "s": 24, "label": canvas.names([name])[0]}
        axis.scatter([100 * values[group] for group in asked], [groups.index(group) for group in asked], **style)
    if chance is not None:
        axis.axvline(100 * chance, color=GREY, linewidth=1, linestyle="--", label="chance")
    canvas.rows(groups)
    axis.set_xlim(-2, 102)
    return canvas.done("both", "Accuracy (%)")


def plot_selectors(
    summary: pd.DataFrame,
    *,
    value: str = "correct",
    width: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Self against cross effect, one mark a selector: below the diagonal a mask harms its own group more.

    Both axes have one scale. Intervals are those of the summary; an effect without one has none.

    Args:
        summary: what `KnockoutResult.summary` gave: its rows of all groups together are drawn. Selectors without a self
            effect, whose masks are of no group, are left out.
        value: what the summary is of: ``"correct"`` (drawn in points), ``"margin"`` (nats) or ``"score"``.
        width: of the figure in inches; see `plot_matrix`.
        ax: axes of a figure of your own to draw into.

    Returns:
        The figure, which is a new one or that of ``ax``.

    Raises:
        MismatchError: a table of another kind, no selector with both effects, no such value, or a width that is too
            narrow.

    Example:
        ``vn.plot_selectors(result.summary(), width=3.3)``
    """
    check_choice("value", value, ("correct", "margin", "score"), MismatchError)
    columns = [f"{effect}{end}" for effect in ("cross_effect", "self_effect") for end in ("", "_low", "_high")]
    check_rows(summary, ["selector", "group", *columns], ["selector", "group"], "KnockoutResult.summary")
    rows = summary.loc[summary["group"] == "all"].dropna(subset=["self_effect", "cross_effect"])
    if not len(rows):
        raise MismatchError("no selector has a self and a cross effect over all groups: there is nothing to draw")
    unit, scale, _ = VALUES[value]
    names = [str(name) for name in rows["selector"]]
    equal = "Self = cross"
    canvas = Canvas(width, ax, [*names, equal], usual=(5.2, 4.2))
    axis, styles = canvas.axis, len(STYLES)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.axvline(0, color="black", linewidth=0.6)
    drawn = scale * rows[columns].to_numpy(dtype=float)
    for n, (label, (x, x_low, x_high, y, y_low, y_high)) in enumerate(zip(canvas.names(names), drawn, strict=True)):
        x_reach, y_reach = [[max(x - x_low, 0)], [max(x_high - x, 0)]], [[max(y - y_low, 0)], [max(y_high - y, 0)]]
        # Where there are more selectors than colours, each colour has another mark from then on.
        colour, marker = STYLES[n % styles][0], STYLES[(n + n // styles) % styles][1]
        style: Keywords = {"color": colour, "fmt": marker, "mfc": "none", "markersize": 6, "linewidth": 1, "capsize": 2}
        axis.errorbar([x], [y], xerr=x_reach, yerr=y_reach, label=label, **style)
    ends = np.array([min(0.0, float(np.nanmin(drawn))), max(0.0, float(np.nanmax(drawn)))])
    limits = ends + (np.ptp(ends) or 1.0) * np.array([-0.06, 0.06])
    axis.set(xlim=limits, ylim=limits)
    axis.axline((0, 0), slope=1, color=GREY, linewidth=1, linestyle="--", label=equal)
    return canvas.done("both", f"Cross effect: {unit[0].lower()}{unit[1:]}", "Self effect")
