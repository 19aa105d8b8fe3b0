"""Neurons before they are switched off: how sure a selection is, where its neurons lie, and when one fires."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlmneurons.checks import Keywords, check_kind
from vlmneurons.errors import MismatchError
from vlmneurons.look.figures import GREEN, GREY, PURPLE, ordered
from vlmneurons.look.plots.canvas import STYLES, Canvas, check_rows, draw_points, plain_names, spaced
from vlmneurons.trust.nulls import LEVEL

if TYPE_CHECKING:
    from vlmneurons.look.neuron_pages import NeuronView
    from vlmneurons.study.result import KnockoutResult


def plot_depth(
    result: "KnockoutResult",
    selectors: Sequence[str] | None = None,
    *,
    width: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Where each selector's neurons lie: share of a mask in every layer, mean over groups, with the range of groups.

    Args:
        result: what `knockout` gave; its masks know their number of neurons in each layer.
        selectors: which; by default all.
        width: of the figure in inches; see `plot_matrix`.
        ax: axes of a figure of your own to draw into.

    Returns:
        The figure, which is a new one or that of ``ax``.

    Raises:
        MismatchError: the masks do not know their layers, no such selector, or a width that is too narrow.
    """
    layers = [str(name) for name in result.provenance.get("layers", [])]
    if not layers:
        raise MismatchError("these masks do not know their layers: they were not made by knockout")
    shares = {}
    for name in result.selectors if selectors is None else selectors:
        masks = [result.masks[row - 1] for row in result.rows_of(name)]
        of_groups = [np.array(mask.layers) / mask.size for mask in masks if mask.size and mask.group != "all"]
        if of_groups:
            shares[name] = np.array(of_groups)
    towers = sorted({name.split(" ")[0] for name in layers})
    short = [name.split(" ")[1] if len(towers) == 1 else name for name in layers]
    canvas = Canvas(width, ax, [*shares, "uniform"], usual=(max(5.2, 0.17 * len(layers) + 2), 3.4))
    axis, at, dashes = canvas.axis, np.arange(len(layers)), ("-", "--", "-.", ":")
    for n, (name, share) in enumerate(shares.items()):
        colour, marker = STYLES[n % len(STYLES)]
        axis.fill_between(at, 100 * share.min(0), 100 * share.max(0), color=colour, alpha=0.12, linewidth=0)
        style = {"color": colour, "marker": marker, "markersize": 4 if len(layers) <= 40 else 2, "linewidth": 1.3}
        axis.plot(at, 100 * share.mean(0), linestyle=dashes[n % 4], label=canvas.names([name])[0], **style)
    axis.axhline(100 / len(layers), color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), label="uniform")
    room = canvas.points - 6 * canvas.size
    axis.set_xticks(at, spaced(at, short, room, canvas.size) if len(towers) == 1 else short)
    if len(towers) > 1:
        step = math.ceil(1.2 * canvas.size * len(layers) / room)
        axis.set_xticks(at[::step], short[::step], rotation=90)
    axis.set_ylim(bottom=0)
    return canvas.done("y", f"Layer of the {towers[0]} tower" if len(towers) == 1 else "Layer", "Share of the mask (%)")


def plot_profiles(
    profiles: pd.DataFrame, selector: str | None = None, *, width: float | None = None, ax: Axes | None = None
) -> Figure:
    """Where a selector's neurons lie in several models, over relative depth: a line for each model.

    Depth is that of a layer's middle, from 0 to 1 over the layers of its tower, so that models of other numbers of
    layers compare; 1 on the other axis is as many neurons as among layers chosen evenly.

    Args:
        profiles: what `Comparison.profiles` gives.
        selector: whose neurons; by default the first that the profiles have.
        width: of the figure in inches; see `plot_matrix`.
        ax: axes of a figure of your own to draw into.

    Returns:
        The figure, which is a new one or that of ``ax``.

    Raises:
        MismatchError: no such selector, or a width that is too narrow.
    """
    check_kind("profiles", profiles, pd.DataFrame, MismatchError, "the table that Comparison.profiles gives")
    selectors = list(dict.fromkeys(profiles["selector"]))
    shown_selector = selector if selector is not None else next(iter(selectors), None)
    if shown_selector not in selectors:
        raise MismatchError(f"no profile of {selector!r}; there are those of {', '.join(selectors) or 'no selector'}")
    part = profiles.loc[profiles["selector"] == shown_selector]
    towers, models = part["tower"].nunique(), list(dict.fromkeys(part["model"]))
    lines = {
        model if towers == 1 else f"{model}, {tower}": (models.index(model), profile)
        for model, of_model in part.groupby("model", sort=False)  # all towers of a model, and then the next model
        for tower, profile in of_model.groupby("tower", sort=False)
    }
    canvas = Canvas(width, ax, [*lines, "evenly"], usual=(6.4, 3.2))
    shown = canvas.names(lines)
    for n, (label, (place, profile)) in enumerate(zip(shown, lines.values(), strict=True)):
        colour, marker = STYLES[place % len(STYLES)]
        style: Keywords = {"color": colour, "marker": marker, "markersize": 3.5, "linewidth": 1.2, "label": label}
        canvas.axis.plot(profile["depth"], profile["density"], linestyle=("-", "--", "-.", ":")[n % 4], **style)
    canvas.axis.axhline(1, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), label="evenly")
    canvas.axis.set_xlim(0, 1)
    canvas.axis.set_ylim(bottom=0)
    return canvas.done("y", "Relative depth", f"Neurons of {plain_names([shown_selector])[0]}, times even")


def plot_null(
    table: pd.DataFrame,
    *,
    order: str | Sequence[str] | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The strength of each group's neurons against what shuffled labels gave: their mean, and 95 % of them.

    A strength is drawn filled where Holm's p is at most 0.05, so that all that are filled hold together. It has the
    unit of the selector's score, or of the measure that was given. A group for which nothing is selected says so.

    Args:
        table: what `null_distribution` gave.
        order: of the groups: all of them in the order wanted, or ``"clustered"``: alike strengths beside each other. By
            default sorted, G2 before G10.
        width: of the figure in inches; see `plot_matrix`.
        ax: axes of a figure of your own to draw into.

    Returns:
        The figure, which is a new one or that of ``ax``.

    Raises:
        MismatchError: a table of another kind, another order than of its groups, or a width that is too narrow.

    Example:
        ``vn.plot_null(vn.null_distribution(items, vn.CAS(count=12)), width=6.75)``
    """
    columns = ["strength", "null_mean", "null_high"]
    check_rows(table, ["group", *columns, "p_holm"], ["group"], "null_distribution")
    rows = table.set_index(table["group"].astype(str))
    profiles = rows[columns].to_numpy(dtype=float)  # -inf where nothing is selected
    groups = ordered([*rows.index], order, np.where(np.isfinite(profiles), profiles, np.nan))
    strength, mean, high, p = rows.loc[groups, [*columns, "p_holm"]].to_numpy(dtype=float).T
    null = "Shuffled labels: mean, and up to the 95th percentile"
    kinds = {f"Strength, Holm’s p at most {LEVEL:g}": "full", "Strength, Holm’s p above it": "none"}
    canvas = Canvas(width, ax, [null, *kinds], len(groups))
    axis, at = canvas.axis, np.arange(len(groups))
    high = np.where(np.isfinite(high), high, np.nan)  # a shuffle that selects nothing has -inf
    mean = np.where(np.isfinite(mean), mean, high)
    draw_points(axis, [mean, mean, high], at, GREY, "|", null)
    for held, (label, fill) in zip((p <= LEVEL, p > LEVEL), kinds.items(), strict=True):
        drawn = held & np.isfinite(strength)
        style: Keywords = {"marker": "D", "markersize": 5, "linestyle": "", "fillstyle": fill}
        axis.plot(strength[drawn], at[drawn], color=GREEN, label=label, **style)
    for place in at[~np.isfinite(strength)].tolist():
        style = {"transform": axis.get_yaxis_transform(), "fontsize": canvas.size, "va": "center", "ha": "right"}
        style["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axis.text(0.98, place, "nothing selected", **style)
    canvas.rows(groups)
    axis.locator_params(axis="x", nbins=5 if canvas.points < 300 else 9)  # numbers of five letters
    return canvas.done("x", "Strength of the selection")


_OVERLAPS = {
    "jaccard": ("The group’s own", GREEN, "o"),
    "between": ("Two draws of this size", PURPLE, "^"),
    "between_groups": ("Other groups’", GREY, "s"),
    "chance": ("Chance", "black", "v"),
}


def plot_stability(
    table: pd.DataFrame,
    *,
    order: str | Sequence[str] | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """How far other questions give the same neurons: over the number of questions, or group by group.

    A table with a column ``size`` is drawn along it: the mean over groups, or the row ``"all"`` with its interval, and
    each group thinly. That is what `sample_sizes` gives, or tables of `stability` with ``method="pools"``, each with
    its ``size`` as a column, which have the overlap with other groups' sets too. Without that column every group has a
    row, with its interval. What a selection says about its group is what its own overlap has above the others'.

    Args:
        table: what `stability` or `sample_sizes` gave: overlaps are Jaccard indices, drawn in %.
        order: of the rows, where groups have rows: all groups, and ``"all"`` if it is there, in the order wanted, or
            ``"clustered"``: alike overlaps beside each other. By default sorted, G2 before G10, with ``"all"`` last.
        width: of the figure in inches; see `plot_matrix`.
        ax: axes of a figure of your own to draw into.

    Returns:
        The figure, which is a new one or that of ``ax``.

    Raises:
        MismatchError: a table of another kind, several rows for one group and size, another order than of its rows, or
            any along sizes, or a width that is too narrow.

    Example:
        ``vn.plot_stability(vn.sample_sizes(items, vn.CAS(count=12), [5, 10, 20]), width=3.3)``
    """
    sized = isinstance(table, pd.DataFrame) and "size" in table
    source, ends = "stability or sample_sizes", ["jaccard_low", "jaccard_high"]
    check_rows(table, ["group", "jaccard", *ends], ["group", "size"] if sized else ["group"], source)
    shown = {name: style for name, style in _OVERLAPS.items() if name in table and table[name].notna().any()}
    if sized and order is not None:
        raise MismatchError("order is that of rows, and a table with sizes is drawn along them: leave it out")
    if sized:
        return _along_sizes(table, shown, width, ax)
    rows = table.set_index(table["group"].astype(str))
    whole = ["all"] if order is None and "all" in rows.index else []
    single = [group for group in rows.index if group not in whole]
    groups = [*ordered(single, order, rows[[*shown]].to_numpy(float)), *whole]
    drawn = 100 * rows.loc[groups, [*shown, *ends]]
    canvas = Canvas(width, ax, [label for label, _, _ in shown.values()], len(groups))
    for n, (name, (label, colour, marker)) in enumerate(shown.items()):
        at = np.arange(len(groups)) + 0.18 * (n - (len(shown) - 1) / 2)
        values = [drawn[column].to_numpy(float) for column in ([name, *ends] if name == "jaccard" else [name] * 3)]
        draw_points(canvas.axis, values, at, colour, marker, label)
    canvas.rows(groups)
    canvas.axis.set_xlim(left=0)
    return canvas.done("x", "Overlap of the sets (Jaccard, %)")


def _along_sizes(
    table: pd.DataFrame, shown: Mapping[str, tuple[str, str, str]], width: float | None, ax: Axes | None
) -> Figure:
    table = table.sort_values("size")
    single, whole = table.loc[table["group"] != "all"], table.loc[table["group"] == "all"]
    interval = len(whole) > 0
    if not interval:
        whole = single.groupby("size", as_index=False)[[*shown]].mean()
    thin, shown = "Each group’s own", {**shown, "jaccard": ("Their mean", GREEN, "o")}
    legend = [*([thin] if len(single) else []), *(label for label, _, _ in shown.values())]
    canvas = Canvas(width, ax, legend, usual=(5.2, 3.6))
    for n, (_, rows) in enumerate(single.groupby("group")):
        style: Keywords = {"color": GREEN, "alpha": 0.25, "linewidth": 0.8, "label": thin if n == 0 else None}
        canvas.axis.plot(rows["size"], 100 * rows["jaccard"], **style)
    at = whole["size"].to_numpy(dtype=float)
    for name, (label, colour, marker) in shown.items():
        ends = ["jaccard_low", "jaccard_high"] if name == "jaccard" and interval else [name] * 2
        drawn = [100 * whole[column].to_numpy(dtype=float) for column in (name, *ends)]
        canvas.axis.plot(at, drawn[0], color=colour, linewidth=1.2)
        draw_points(canvas.axis, drawn, at, colour, marker, label, upright=True)
    canvas.settings(at, True)
    canvas.axis.set_ylim(bottom=0)
    return canvas.done("both", "Questions a group", "Overlap (Jaccard, %)")


def plot_values(
    values: "NeuronView | Mapping[str, Sequence[float]]",
    *,
    order: str | Sequence[str] | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """A neuron's values by group: every question a line, with the median and the middle half of them.

    Args:
        values: what `inspect_neuron` gave, or numbers by group. A question's value is the neuron's highest at a counted
            token, in the unit of the site: the activation itself.
        order: of the groups: all of them in the order wanted, or ``"clustered"``: alike quartiles beside each other. By
            default sorted, G2 before G10.
        width: of the figure in inches; see `plot_matrix`.
        ax: axes of a figure of your own to draw into.

    Returns:
        The figure, which is a new one or that of ``ax``.

    Raises:
        MismatchError: no values, some that are not finite, another order than of these groups, or a width that is too
            narrow.

    Example:
        ``vn.plot_values(vn.inspect_neuron(model, questions, neuron), width=3.3)``
    """
    from vlmneurons.look.neuron_pages import NeuronView

    kind = "what inspect_neuron gives, or a dictionary of numbers by group"
    by_group = values.values if isinstance(values, NeuronView) else values
    check_kind("values", by_group, Mapping, MismatchError, kind)
    numbers = {str(group): np.asarray(row, dtype=float).ravel() for group, row in by_group.items()}
    wrong = [group for group, row in numbers.items() if not len(row) or not np.isfinite(row).all()]
    if wrong or not numbers:
        raise MismatchError(
            f"values are finite numbers of each group, at least one; not so: {', '.join(wrong) or 'no group'}"
        )
    quartiles = np.array([np.quantile(row, (0.5, 0.25, 0.75)) for row in numbers.values()])
    groups = ordered([*numbers], order, quartiles)
    labels = ("A question", "Median, and the middle half")
    canvas = Canvas(width, ax, labels, len(groups))
    axis, at = canvas.axis, np.arange(len(groups))
    for place, group in enumerate(groups):
        style: Keywords = {"marker": "|", "color": GREY, "s": 22, "linewidths": 0.7, "alpha": 0.6}
        row = numbers[group]
        axis.scatter(row, np.full(len(row), place + 0.16), label=labels[0] if place == 0 else None, **style)
    drawn = quartiles[[[*numbers].index(group) for group in groups]].T
    draw_points(axis, [*drawn], at - 0.16, GREEN, "D", labels[1])
    canvas.rows(groups)
    whose = f" of {values.name}" if isinstance(values, NeuronView) else " in a question"
    return canvas.done("x", f"Highest value{whose}")
