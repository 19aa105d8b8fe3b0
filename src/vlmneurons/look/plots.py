"""Pictures of statistics, selections and knockout results.

Every function returns a matplotlib `Figure` and draws nowhere else: no window, no global state, no style changed. The
figure shows itself as the last line of a notebook's cell. Colours are safe for colour-blind readers (Okabe & Ito's,
each with a marker of its own): harm is orange and gain blue, and effects diverge from white at zero.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage

from vlmneurons.checks import Keywords, of_kind, real
from vlmneurons.errors import MismatchError
from vlmneurons.look.figures import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    NOT_DRAWN,
    ORANGE,
    PURPLE,
    PrintFigure,
    ems,
    natural,
    ordered,
    shortened,
    tall,
    width_of,
    with_fonts,
)
from vlmneurons.neurons.selection import Selection

if TYPE_CHECKING:
    from vlmneurons.study.result import KnockoutResult

_VALUES = {
    "delta": ("Change of accuracy (points)", 100.0, "effect"),
    "correct": ("Change of accuracy (points)", 100.0, "effect"),
    "margin": ("Change of log-probability margin (nats)", 1.0, "effect"),
    "score": ("Change of the score", 1.0, "effect"),
    "clean_score": ("Clean score", 1.0, "neutral"),
    "right_to_wrong": ("Right answers that turned wrong (%)", 100.0, "harm"),
    "wrong_to_right": ("Wrong answers that turned right (%)", 100.0, "gain"),
    "wrong_to_wrong": ("Wrong answers that became other wrong ones (%)", 100.0, "neutral"),
    "flips": ("Answers that changed (%)", 100.0, "neutral"),
    "failures": ("Answers that could not be parsed (%)", 100.0, "neutral"),
    "clean": ("Clean accuracy (%)", 100.0, "neutral"),
    "ablated": ("Accuracy under the mask (%)", 100.0, "neutral"),
    "n": ("Questions", 1.0, "neutral"),
    "neurons": ("Neurons of the mask", 1.0, "neutral"),
}
"""What a column of the table is called, its unit, and what it means; anything else is a signed effect."""


def plot_matrix(
    result: "KnockoutResult",
    selector: str | Sequence[str] | None = None,
    *,
    value: str | None = None,
    limit: float | None = None,
    order: str | Sequence[str] | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Heat map of effects: whose neurons were off (rows) against whose questions were asked (columns).

    Harm is orange and gain blue whatever the value, and what is neither has colours of its own; a cell is grey where
    nothing was asked. Numbers stand in the cells where they fit.

    Args:
        result: what `knockout` gave.
        selector: one selector, or several side by side on one scale; all of them by default.
        value: column of `KnockoutResult.table`, such as ``"delta"`` (drawn in points) or ``"margin"`` (nats); by
            default the score, where answers are graded, and else ``"delta"``.
        limit: the value, as drawn, at which colours end, so that several figures can share a scale; by default the
            largest that is drawn.
        order: of the groups: all of them in the order wanted, or ``"clustered"``: groups with alike rows and columns
            beside each other. By default sorted, G2 before G10. Control groups stay last.
        width: of the figure in inches, such as 3.3 for a column and 6.75 for a page: text has 8 pt up to 8 groups and
            at least 6 pt, panels wrap, and long names are cut. By default as large as the matrix needs.
        ax: axes of a figure of your own to draw one selector into.

    Returns:
        The figure, which is a new one or that of ``ax``.

    Raises:
        MismatchError: no such selector or value, a limit that is not above 0, another order than of these groups, a
            width that is too narrow, or several selectors for one ``ax``.
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
    _drawn_into(ax, width, len(names))
    value = value or result.measure
    title, scale, meaning = _VALUES.get(value, (value, 1.0, "effect"))
    matrices = _in_order(result, {name: result.matrix(name, value=value) * scale for name in names}, order)
    figure, axes, (size, cell, letters, below) = _panels(matrices, width, ax)
    most = limit or max(float(np.nanmax(np.abs(matrix.to_numpy(dtype=float)))) for matrix in matrices.values()) or 1.0
    least = -most if meaning == "effect" else 0.0
    digits = max(0, 1 - math.floor(math.log10(most)))
    longest = max((_shown(one, digits) for matrix in matrices.values() for one in matrix.to_numpy().flat), key=ems)
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        values = matrix.to_numpy(dtype=float)
        image = axis.imshow(values, cmap=COLOURS[meaning], vmin=least, vmax=most)
        axis.set_facecolor(NOT_DRAWN)
        if result.control_names and len(result.control_names) < matrix.shape[1]:
            axis.axvline(matrix.shape[1] - len(result.control_names) - 0.5, color="black", linewidth=1)
        _ticks(axis, matrix, size, cell, letters)
        room = int(72 * cell * matrix.shape[1] / (0.62 * size)) if width else 10**6
        axis.set_title(_plain(shortened([name], room))[0], fontsize=size if width else None)
        axis.set_xlabel("Questions about", fontsize=size)
        if _readable(longest, size, cell):
            _numbers(axis, image, min(7, size), digits)
        if (spec := axis.get_subplotspec()) is None or spec.is_first_col():
            long = "Neurons switched off: those of"
            axis.set_ylabel(long if ems(long) * size < 72 * cell * len(values) + 40 else "Masks of", fontsize=size)
    where: Keywords = (
        {"location": "bottom", "shrink": 0.9 if width and width < 5 else 0.6, "aspect": 30}
        if below
        else {"shrink": 0.85}
    )
    bar = figure.colorbar(axes[0].images[0], ax=ax or list(axes), **where)
    bar.set_label(title, fontsize=size)
    bar.ax.tick_params(labelsize=size)
    with_fonts(ax or figure)
    return figure


def _ticks(axis: Axes, matrix: pd.DataFrame, size: float, cell: float, letters: int) -> None:
    columns, rows = (shortened([str(one) for one in labels], letters) for labels in (matrix.columns, matrix.index))
    upright = max(map(ems, columns)) * size > 0.9 * 72 * cell
    axis.set_xticks(range(len(columns)), _plain(columns), rotation=90 if upright else 0, fontsize=size)
    axis.set_yticks(range(len(rows)), _plain(rows), fontsize=size)


def _drawn_into(ax: Axes | None, width: float | None, panels: int) -> None:
    width_of(width)
    if ax is not None:
        of_kind("ax", ax, Axes, MismatchError, "axes of a matplotlib figure")
        if width is not None:
            raise MismatchError("width is that of a new figure, and ax has a figure: give one of the two")
        if panels > 1:
            raise MismatchError(f"ax takes one panel, and there are {panels}: name one selector")


def _in_order(
    result: "KnockoutResult", matrices: Mapping[str, pd.DataFrame], order: str | Sequence[str] | None
) -> dict[str, pd.DataFrame]:
    """Matrices with groups in one order in rows and columns; masks of no group, and control groups, come last."""
    groups = list(result.group_names)
    each = [one.reindex(index=groups, columns=groups).to_numpy(dtype=float) for one in matrices.values()]
    columns = [*ordered(groups, order, np.hstack([np.hstack([one, one.T]) for one in each])), *result.control_names]
    return {
        name: one.loc[
            [
                *(group for group in columns if group in one.index),
                *sorted((mask for mask in one.index if mask not in columns), key=natural),
            ],
            columns,
        ]
        for name, one in matrices.items()
    }


class _Room(NamedTuple):
    """How large what is in a figure is: text in points, the side of a cell in inches, letters of a name."""

    size: float
    cell: float
    letters: int = 10**6
    bar_below: bool = False


def _panels(
    matrices: Mapping[str, pd.DataFrame], width: float | None, ax: Axes | None
) -> tuple[Figure, list[Axes], _Room]:
    """The figure, its axes, and how large what is in it is."""
    tables = list(matrices.values())
    n_columns, n_rows = (max(table.shape[side] for table in tables) for side in (1, 0))
    labels = [str(label) for table in tables for label in (*table.index, *table.columns)]
    if ax is not None:
        box = ax.get_position()
        figure = ax.figure
        while not isinstance(figure, Figure):  # a part of a figure
            figure = figure.figure
        across, down = figure.get_size_inches() * (box.width, box.height)
        return figure, [ax], _Room(_rc_size(), min(across / n_columns, down / n_rows))
    same_rows = len({tuple(table.index) for table in tables}) == 1
    letters, side_bar = 10**6, True
    if width is None:
        size, cell, across = _rc_size(), 0.5 if n_columns <= 12 else 0.36, len(tables)
        longest = 0.085 * max(map(len, labels))
        inches = (across * (cell * n_columns + 0.35) + longest + 1.6, cell * n_rows + longest + 1.3)
    else:
        size = _size(max(n_columns, n_rows))
        line = size * (1.3 if tall(labels) else 1.15)

        def reach(letters: int) -> float:
            return size * max(map(ems, shortened(labels, letters))) / 72

        def needed(across: int, letters: int, side_bar: bool) -> float:
            """Inches that are no cell's: names, and the bar of colours where it stands at the side."""
            names = reach(letters) * (1 if same_rows else across)
            return 0.35 + size / 36 + 0.95 * side_bar + names + 0.12 * (across - 1)

        def side(*way: Any) -> float:
            return min(0.5, (width - needed(*way)) / (way[0] * n_columns))

        # As many panels beside each other as have room for their labels: rather than stack them, the bar goes below and
        # names are cut.
        ways = [
            (k, letters, side_bar)
            for k in range(len(tables), 0, -1)
            for letters, side_bar in (
                [(12, False), (8, False)] if width < 5 else [(24, True), (24, False), (12, False)]
            )
            if k == len(tables) or not side_bar
        ]
        across, letters, side_bar = way = next((way for way in ways if 72 * side(*way) >= line), ways[-1])
        if 72 * side(*way) < size:
            needs = needed(*way) + size * n_columns / 72
            raise MismatchError(
                f"{n_columns} columns with names of {size:g} pt do not fit into {width:g} inches: width is at least "
                f"{math.ceil(10 * needs) / 10:g}, or the names are shorter"
            )
        longest = reach(letters)
        cell = side(*way)
        down = math.ceil(len(tables) / across)
        height = down * (cell * n_rows + longest + 5.5 * size / 72 + 0.1) + (
            0.2 if side_bar else 0.75 if width < 5 else 0.9
        )
        inches = (width, height)
    figure = PrintFigure(figsize=inches, layout="constrained")
    if width and not side_bar:  # the layout lets a bar below high panels stick out by a few points
        figure.set_layout_engine("constrained", h_pad=0.1)
    down = math.ceil(len(tables) / across)
    axes = figure.subplots(down, across, squeeze=False, sharey=same_rows).ravel().tolist()
    for axis in axes[len(tables) :]:
        axis.remove()
    return figure, axes[: len(tables)], _Room(size, cell, letters, not side_bar)


def _rc_size() -> float:
    return float(FontProperties(size=rcParams["xtick.labelsize"]).get_size_in_points())


def _size(groups: int) -> float:
    """Points of the text of a figure whose width is given."""
    return 8.0 if groups <= 8 else 7.0 if groups <= 16 else 6.0


def _readable(longest: str, size: float, cell: float) -> bool:
    """Whether numbers fit into cells, with a gap between neighbours: digits that touch read as one number."""
    return bool((ems(longest) + 0.25) * min(7, size) <= 72 * cell)


def _numbers(axis: Axes, image: AxesImage, size: float, digits: int) -> None:
    """Numbers into the cells of a heat map, black or white, whichever is seen."""
    values = np.ma.filled(np.ma.asarray(image.get_array(), dtype=float), np.nan)
    colours = image.to_rgba(values)
    for row, column in np.ndindex(values.shape):
        light = float(colours[row, column, :3] @ (0.299, 0.587, 0.114))
        text, colour = _shown(float(values[row, column]), digits), "black" if light > 0.5 else "white"
        axis.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)


def _shown(value: float, digits: int) -> str:
    """A number of a cell; nothing where nothing was asked."""
    text = "" if np.isnan(value) else f"{value:.{digits}f}"
    return f"{0:.{digits if value else 0}f}" if text and float(text) == 0 else text.replace("-", "−")


def plot_layers(
    selection: Selection,
    *,
    expected: bool = True,
    order: str | Sequence[str] | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """How many neurons each layer holds, for every group of a selection: groups by layers, as a heat map with counts.

    Args:
        selection: the neurons.
        expected: name below the picture what a uniform choice would put into a layer on average.
        order: of the groups: all of them in the order wanted, or ``"clustered"``: groups of alike layers beside each
            other. By default sorted, G2 before G10.
        width: of the figure in inches; see `plot_matrix`.
        ax: axes of a figure of your own to draw into.

    Returns:
        The figure, which is a new one or that of ``ax``.

    Raises:
        MismatchError: the selection spans several towers; restrict it to one. Another order than of its groups, or a
            width that is too narrow.
    """
    of_kind("selection", selection, Selection, MismatchError)
    towers = sorted({site.tower for site in selection.space.sites})
    if len(towers) > 1:
        raise MismatchError(f"layers are drawn for one tower; this selection spans {', '.join(towers)}")
    _drawn_into(ax, width, 1)
    layers = list(selection.space.layers)
    layer_of = selection.space.layer_of
    counted = {
        group: np.bincount(layer_of[selection[group].indices].numpy(), minlength=layers[-1] + 1)[layers]
        for group in selection
    }
    groups = ordered(list(counted), order, np.stack(list(counted.values())).astype(float))
    counts = np.stack([counted[group] for group in groups])
    labels = shortened(groups, 10**6 if not width else 12 if width < 5 else 24)
    size = _size(len(groups)) if width else _rc_size()
    if ax is not None:
        figure, axis = _panels({"": pd.DataFrame(counts)}, None, ax)[0], ax
        inside = float(figure.get_size_inches()[0]) * ax.get_position().width
    else:
        margin = size * max(map(ems, labels)) / 72 + 1.1
        natural_width = (0.5 if len(layers) <= 12 else 0.3) * len(layers) + margin + 0.6
        line = 0.34 if not width else 1.7 * size / 72
        figure = PrintFigure(figsize=(width or natural_width, line * len(groups) + 1.5), layout="constrained")
        axis, inside = figure.subplots(), (width or natural_width) - margin
    most, cell = max(int(counts.max()), 1), inside / len(layers)
    image = axis.imshow(counts, cmap=COLOURS["neutral"], vmin=0, vmax=most, aspect="auto")
    wide = ems(str(layers[-1])) * size + 2
    step = next((step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32) if 72 * cell * step >= wide), 64)
    axis.set_xticks(range(0, len(layers), step), [*map(str, layers[::step])], fontsize=size)
    axis.set_yticks(range(len(groups)), _plain(labels), fontsize=size)
    label = f"Layer of the {towers[0]} tower"
    if expected:
        mean = float(np.mean([len(selection[group]) for group in groups])) / len(layers)
        label += f"\n(a uniform choice: {mean:.3g} neurons a layer)"
    axis.set_xlabel(label, fontsize=size)
    axis.set_ylabel("Neurons of", fontsize=size)
    if _readable(str(most), size, cell):
        _numbers(axis, image, min(7, size), 0)
    bar = figure.colorbar(image, ax=axis)
    bar.set_label("Neurons", fontsize=size)
    bar.ax.tick_params(labelsize=size)
    with_fonts(ax or figure)
    return figure


def _plain(names: Any) -> list[str]:
    """Names as they are, long ones cut: a dollar sign would begin a formula, 300 letters leave no room for axes."""
    cut = (f"{name[:39]}…" if len(name) > 40 else name for name in map(str, names))
    return [name.replace("$", r"\$") for name in cut]


# -- what figures of points and lines have in common -------------------------------------------------------------------

_STYLES = [(ORANGE, "o"), (BLUE, "s"), (GREEN, "D"), (PURPLE, "^"), ("black", "v"), ("#E69F00", "P"), ("#56B4E9", "X")]


class _Canvas:
    """One panel with a legend: its figure, its axes, and how large its text is."""

    def __init__(
        self,
        width: float | None,
        ax: Axes | None,
        legend: Sequence[str],
        lines: int = 0,
        usual: tuple[float, float] = (6.4, 0.3),
    ) -> None:
        """Make the figure, or take that of given axes.

        Args:
            width: of a new figure in inches.
            ax: axes to draw into.
            legend: names that the legend has.
            lines: rows with a label, for figures as high as their rows.
            usual: where no width is given, inches across, and for a row, or down.
        """
        _drawn_into(ax, width, 1)
        self.given, self.width = ax is not None, width
        self.size = _size(lines) if width else _rc_size()
        self.points = 72 * (width or usual[0])
        if ax is not None:
            self.figure, self.axis = _panels({"": pd.DataFrame([[0]])}, None, ax)[0], ax
            self.points = 72 * ax.get_position().width * self.figure.get_figwidth()
        small = self.size if width else min(8.0, self.size)
        widest = small * (max(map(ems, legend), default=0) + 4)
        # A column of the legend is as wide as its widest name.
        self.legend = {"ncols": int(max(1, min(4, len(legend), self.points // widest))), "fontsize": small}
        if ax is not None:
            return
        below = math.ceil(len(legend) / self.legend["ncols"])
        if width:
            inside = 1.75 * self.size * lines if lines else 0.6 * 72 * width
            height = (inside + 5.5 * self.size + 1.7 * self.size * below) / 72 + 0.15
        else:
            height = usual[1] * lines + 1.3 + 0.2 * below if lines else usual[1]
        self.figure = PrintFigure(figsize=(width or usual[0], height), layout="constrained")
        self.axis = self.figure.subplots()

    def names(self, names: Iterable[str]) -> list[str]:
        """Names as they fit beside the axes."""
        return _plain(shortened([str(name) for name in names], 12 if self.width < 5 else 24) if self.width else names)

    def rows(self, labels: Iterable[str], at: Any = None) -> None:
        """Label the rows, from the top."""
        shown = self.names(labels)
        number = len(shown) if at is None else math.ceil(max(at, default=0) + 0.4)
        self.axis.set_yticks(range(number) if at is None else at, shown, fontsize=self.size)
        self.axis.set_ylim(number - 0.5, -0.5)

    def label(self, across: str, up: str = "") -> None:
        """Name the axes, in as many lines as it takes."""
        room = self.points - (0 if up else self.size * max((ems(one) for one in self._row_names()), default=0))
        for text, put in ((across, self.axis.set_xlabel), (up, self.axis.set_ylabel)):
            put(_wrapped(text, room - 4 * self.size, self.size), fontsize=self.size)
        self.axis.tick_params(labelsize=self.size)

    def _row_names(self) -> list[str]:
        return [one.get_text() for one in self.axis.get_yticklabels()]

    def done(self) -> Figure:
        """Put the legend, and choose fonts."""
        handles, labels = self.axis.get_legend_handles_labels()
        if handles and self.given:
            self.axis.legend(handles, labels, frameon=False, fontsize=self.legend["fontsize"])
        elif handles:
            self.figure.legend(handles, labels, loc="outside lower center", frameon=False, **self.legend)
        with_fonts(self.axis if self.given else self.figure)
        return self.figure


def _wrapped(text: str, points: float, size: float) -> str:
    """A text in lines that are no longer than so many points."""
    return "\n".join(textwrap.wrap(text, max(12, int(points / (0.6 * size)))))


def _spaced(at: Any, labels: Sequence[str], points: float, size: float) -> list[str]:
    """Labels of places along an axis, without those that would run into their neighbour."""
    reach = (max(at) - min(at)) or 1.0
    shown, end = [], -math.inf
    for place, label in zip(at, labels, strict=True):
        middle, half = points * (place - min(at)) / reach, 0.5 * size * ems(label)
        fits = middle - half >= end + 0.3 * size
        shown.append(label if fits else "")
        end = middle + half if fits else end
    return shown


# -- effects with intervals --------------------------------------------------------------------------------------------

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
    for effect in effects:
        if effect not in _EFFECTS or effect not in summary:
            known = [name for name in _EFFECTS if name in summary]
            raise MismatchError(f"effect {effect!r} is not in the summary; it has {', '.join(known)}")
    names = [str(name) for name in summary[label]]
    if order is not None:
        wanted = ordered(names, order, summary[list(effects)].to_numpy(dtype=float))
        summary = summary.iloc[[names.index(name) for name in wanted]]
        names = wanted
    canvas = _Canvas(width, ax, [_EFFECTS[effect][0] for effect in effects], len(names))
    axis = canvas.axis
    axis.axvline(0, color="black", linewidth=0.8)
    places = np.arange(len(names))
    unit, scale, _ = _VALUES[value]
    for n, effect in enumerate(effects):
        name, colour, marker = _EFFECTS[effect]
        drawn = [scale * summary[f"{effect}{end}"].to_numpy(dtype=float) for end in ("", "_low", "_high")]
        offset = 0.22 * (n - (len(effects) - 1) / 2)
        _points(axis, drawn, places + offset, colour, marker, name)
    canvas.rows(names)
    canvas.label(unit)
    _frame(axis, "x")
    if title:
        axis.set_title(_plain([title])[0], fontsize=canvas.size if width else 10)
    return canvas.done()


def _points(
    axis: Axes,
    drawn: Sequence[np.ndarray],
    at: np.ndarray,
    colour: str,
    marker: str,
    label: str,
    *,
    upright: bool = False,
) -> None:
    """Points with their intervals; an interval may lie to one side of its point."""
    value, low, high = drawn
    reach = np.vstack([np.maximum(value - low, 0), np.maximum(high - value, 0)])
    how: Keywords = {"yerr": reach} if upright else {"xerr": reach}
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
    unit, factor, _ = _VALUES[value]
    titles = {
        "r": "Share of neurons switched off (%)",
        "alpha": "Strength α (neurons scaled by 1 + α; −1 is off)",
        "items": "Identification questions a group",
    }
    scale = 100 if axis_name == "r" else 1
    single = curve[curve["group"] != "all"] if groups else curve[:0]
    thin = ["Self effect of each group"] if len(single) else []
    shown = ("self_effect", "cross_effect")
    canvas = _Canvas(width, ax, [*thin, *(_EFFECTS[effect][0] for effect in shown)], usual=(5.2, 3.6))
    axis, size = canvas.axis, canvas.size
    axis.axhline(0, color="black", linewidth=0.8)
    for n, (_, rows) in enumerate(single.groupby("group")):
        how = {"color": ORANGE, "alpha": 0.25, "linewidth": 0.8, "label": thin[0] if n == 0 else None}
        axis.plot(scale * rows[axis_name], factor * rows["self_effect"], **how)
    whole = curve.loc[curve["group"] == "all"]
    at = scale * whole[axis_name].to_numpy(dtype=float)
    for effect in shown:
        name, colour, marker = _EFFECTS[effect]
        drawn = [factor * whole[f"{effect}{end}"].to_numpy(dtype=float) for end in ("", "_low", "_high")]
        axis.plot(at, drawn[0], color=colour, linewidth=1.2)
        _points(axis, drawn, at, colour, marker, name, upright=True)
    log = axis_name in ("r", "items") and len(at) > 1 and at.min() > 0
    if log:
        axis.set_xscale("log")
        axis.minorticks_off()
    labels = [f"{value:g}".replace("-", "−") for value in at]
    axis.set_xticks(at, _spaced(np.log(at) if log else at, labels, 0.8 * canvas.points - 4 * size, size))
    canvas.label(titles.get(axis_name, axis_name), unit)
    _frame(axis, "both")
    return canvas.done()


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
    canvas = _Canvas(width, ax, [label for label, _, _ in kinds.values()], 2 * len(names), (6.4, 0.25))
    axis = canvas.axis
    labels, places = [], []
    for n, (name, shown) in enumerate(zip(names, canvas.names(names), strict=True)):
        own = table[table["selector"] == name]
        for k, (which, rows) in enumerate(
            (("own", own[own["mask"] == own["group"]]), ("other", own[own["mask"] != own["group"]]))
        ):
            place, left = n + 0.36 * k - 0.18, 0.0
            labels.append(f"{shown}, {which} mask" if k == 0 else f"{which} masks")
            places.append(place)
            for kind, (label, colour, hatch) in kinds.items():
                share = 100 * float(rows[kind].mean()) if len(rows) else 0.0
                how = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.4}
                axis.barh(place, share, left=left, height=0.32, label=label if n == k == 0 else None, **how)
                left += share
    axis.set_yticks(places, labels, fontsize=canvas.size if width else 8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlim(left=0)
    canvas.label("Answers that changed (%)")
    _frame(axis, "x")
    return canvas.done()


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
        found = [np.array(mask.layers) / mask.size for mask in masks if mask.size and mask.group != "all"]
        if found:
            shares[name] = np.array(found)
    towers = sorted({name.split(" ")[0] for name in layers})
    short = [name.split(" ")[1] if len(towers) == 1 else name for name in layers]
    canvas = _Canvas(width, ax, [*shares, "uniform"], usual=(max(5.2, 0.17 * len(layers) + 2), 3.4))
    axis, at, dashes = canvas.axis, np.arange(len(layers)), ("-", "--", "-.", ":")
    for n, (name, share) in enumerate(shares.items()):
        colour, marker = _STYLES[n % len(_STYLES)]
        axis.fill_between(at, 100 * share.min(0), 100 * share.max(0), color=colour, alpha=0.12, linewidth=0)
        how = {"color": colour, "marker": marker, "markersize": 4 if len(layers) <= 40 else 2, "linewidth": 1.3}
        axis.plot(at, 100 * share.mean(0), linestyle=dashes[n % 4], label=canvas.names([name])[0], **how)
    axis.axhline(100 / len(layers), color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), label="uniform")
    room = canvas.points - 6 * canvas.size
    axis.set_xticks(at, _spaced(at, short, room, canvas.size) if len(towers) == 1 else short)
    canvas.label(f"Layer of the {towers[0]} tower" if len(towers) == 1 else "Layer", "Share of the mask (%)")
    if len(towers) > 1:
        step = math.ceil(1.2 * canvas.size * len(layers) / room)
        axis.set_xticks(at[::step], short[::step], rotation=90)
    axis.set_ylim(bottom=0)
    _frame(axis, "y")
    return canvas.done()


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
    unit, scale, _ = _VALUES[result.measure]
    column = "delta" if result.measure == "correct" else "score"
    own = table.loc[table["selector"] == selector]
    effect = own.groupby("group")[column].mean()
    groups = ordered(result.group_names, order, effect.reindex(list(result.group_names)).to_numpy()[:, None])
    canvas = _Canvas(width, ax, [*controls, selector], len(groups))
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
        at = [groups.index(one.group) + shift[one.repeat] for one in rows.itertuples()]
        how = {"color": colour, "marker": marker, "s": 18, "linewidths": 1.0}
        axis.scatter(scale * rows[column], at, label=canvas.names([name])[0], **how)
    at = [groups.index(group) for group in own["group"]]
    how = {"color": ORANGE, "marker": "o", "s": 26, "zorder": 3}
    axis.scatter(scale * own[column], at, label=canvas.names([selector])[0], **how)
    canvas.rows(groups)
    canvas.label(f"Self effect: {unit[0].lower()}{unit[1:]}")
    _frame(axis, "x")
    return canvas.done()


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
    known = sorted({group for one in accuracies.values() for group in one}, key=natural)
    profiles = np.array([[one.get(group, np.nan) for one in accuracies.values()] for group in known])
    groups = ordered(known, order, profiles)
    canvas = _Canvas(width, ax, [*accuracies, *(["chance"] if chance is not None else [])], len(groups))
    axis = canvas.axis
    for n, (name, values) in enumerate(accuracies.items()):
        colour, marker = _STYLES[n % len(_STYLES)]
        there = [group for group in groups if group in values]
        how = {"color": colour, "marker": marker, "s": 24, "label": canvas.names([name])[0]}
        axis.scatter([100 * values[group] for group in there], [groups.index(group) for group in there], **how)
    if chance is not None:
        axis.axvline(100 * chance, color=GREY, linewidth=1, linestyle="--", label="chance")
    canvas.rows(groups)
    axis.set_xlim(-2, 102)
    canvas.label("Accuracy (%)")
    _frame(axis, "both")
    return canvas.done()
