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

from vlmneurons.checks import Keywords, of_kind, one_of, real
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
from vlmneurons.trust.nulls import LEVEL

if TYPE_CHECKING:
    from vlmneurons.look.neuron_pages import NeuronView
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
    most = limit or _most(matrices)
    words = _Words(title, "Questions about", "Neurons switched off: those of", "Masks of")
    digits = max(0, 1 - math.floor(math.log10(most)))
    return _heat_maps(matrices, words, (meaning, most, digits), width, ax, len(result.control_names))


class _Words(NamedTuple):
    """What stands beside a heat map: at its bar, below it, and at its left, where a short form may have to do."""

    bar: str
    across: str
    up: str
    short: str


def _most(matrices: Mapping[str, pd.DataFrame]) -> float:
    """The largest that is drawn; 1 where nothing is above 0."""
    values = [np.abs(one.to_numpy(dtype=float)).ravel() for one in matrices.values()]
    return float(np.nan_to_num(np.concatenate(values)).max()) or 1.0


def _heat_maps(
    matrices: Mapping[str, pd.DataFrame],
    words: _Words,
    colours: tuple[str, float, int],
    width: float | None,
    ax: Axes | None,
    controls: int = 0,
) -> Figure:
    """Tables as heat maps beside each other, on one scale, with one bar.

    Args:
        matrices: rows by columns; NaN is a grey cell.
        words: what stands beside them.
        colours: what values mean (see `COLOURS`), the value at which colours end, and digits of the numbers in cells.
        width: of the figure in inches.
        ax: axes to draw into.
        controls: how many of the last columns a line sets apart.
    """
    figure, axes, (size, cell, letters, below) = _panels(matrices, width, ax)
    meaning, most, digits = colours
    least = -most if meaning == "effect" else 0.0
    longest = max((_shown(one, digits) for matrix in matrices.values() for one in matrix.to_numpy().flat), key=ems)
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        values = matrix.to_numpy(dtype=float)
        image = axis.imshow(values, cmap=COLOURS[meaning], vmin=least, vmax=most)
        axis.set_facecolor(NOT_DRAWN)
        if controls and controls < matrix.shape[1]:
            axis.axvline(matrix.shape[1] - controls - 0.5, color="black", linewidth=1)
        _ticks(axis, matrix, size, cell, letters)
        room = int(72 * cell * matrix.shape[1] / (0.62 * size)) if width else 10**6
        axis.set_title(_plain(shortened([name], room))[0], fontsize=size if width else None)
        axis.set_xlabel(words.across, fontsize=size)
        if fitting := _readable(longest, size, cell):
            _numbers(axis, image, fitting, digits)
        if (spec := axis.get_subplotspec()) is None or spec.is_first_col():
            fits = ems(words.up) * size < 72 * cell * len(values) + 40
            axis.set_ylabel(words.up if fits else words.short, fontsize=size)
    where: Keywords = (
        {"location": "bottom", "shrink": 0.9 if width and width < 5 else 0.6, "aspect": 30}
        if below
        else {"shrink": 0.85}
    )
    bar = figure.colorbar(axes[0].images[0], ax=ax or list(axes), **where)
    bar.set_label(words.bar, fontsize=size)
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
            return min(0.5 if n_columns > 5 else 0.6, (width - needed(*way)) / (way[0] * n_columns))

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


def _readable(longest: str, size: float, cell: float) -> float | None:
    """The size in which numbers fit into cells, with a gap between neighbours: digits that touch read as one number."""
    fitting = (points for points in (min(7.0, size), 6.5, 6.0) if (ems(longest) + 0.25) * points <= 72 * cell)
    return next(fitting, None)


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
    if fitting := _readable(str(most), size, cell):
        _numbers(axis, image, fitting, 0)
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

    def settings(self, at: np.ndarray, log: bool) -> None:
        """Label places along the axis, on a log scale where that is wanted and can be."""
        log = log and len(at) > 1 and float(at.min()) > 0
        if log:
            self.axis.set_xscale("log")
            self.axis.minorticks_off()
        labels = [f"{value:g}".replace("-", "−") for value in at]
        room = 0.8 * self.points - 4 * self.size
        self.axis.set_xticks(at, _spaced(np.log(at) if log else at, labels, room, self.size))

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
    axis = canvas.axis
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
    canvas.settings(at, axis_name in ("r", "items"))
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
    of_kind("profiles", profiles, pd.DataFrame, MismatchError, "the table that Comparison.profiles gives")
    there = list(dict.fromkeys(profiles["selector"]))
    if (selector or "") not in there and (selector is not None or not there):
        raise MismatchError(f"no profile of {selector!r}; there are those of {', '.join(there) or 'no selector'}")
    part = profiles.loc[profiles["selector"] == (selector or there[0])]
    towers, models = part["tower"].nunique(), list(dict.fromkeys(part["model"]))
    lines = {
        model if towers == 1 else f"{model}, {tower}": (models.index(model), own)
        for model, whole in part.groupby("model", sort=False)
        for tower, own in whole.groupby("tower", sort=False)
    }
    canvas = _Canvas(width, ax, [*lines, "evenly"], usual=(6.4, 3.2))
    shown = canvas.names(lines)
    for n, (label, (place, own)) in enumerate(zip(shown, lines.values(), strict=True)):
        colour, marker = _STYLES[place % len(_STYLES)]
        how: Keywords = {"color": colour, "marker": marker, "markersize": 3.5, "linewidth": 1.2, "label": label}
        canvas.axis.plot(own["depth"], own["density"], linestyle=("-", "--", "-.", ":")[n % 4], **how)
    canvas.axis.axhline(1, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), label="evenly")
    canvas.axis.set_xlim(0, 1)
    canvas.axis.set_ylim(bottom=0)
    canvas.label("Relative depth", f"Neurons of {_plain([selector or there[0]])[0]}, times even")
    _frame(canvas.axis, "y")
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


# -- neurons before they are switched off ------------------------------------------------------------------------------


def plot_overlap(
    selections: Selection | Mapping[str, Selection],
    *,
    value: str = "jaccard",
    order: str | Sequence[str] | None = None,
    width: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Heat map of how far the groups' neurons are the same: groups by groups, of one selection or of several.

    The diagonal, a set with itself, is grey. Two sets without a neuron overlap wholly, as in `Selection.overlap`.

    Args:
        selections: a selection, or several of the same groups by name, side by side on one scale.
        value: ``"jaccard"`` (neurons shared, of those in either set, drawn in %) or ``"shared"`` (number of neurons).
        order: of the groups: all of them in the order wanted, or ``"clustered"``: groups of alike overlaps beside each
            other. By default sorted, G2 before G10.
        width: of the figure in inches; see `plot_matrix`.
        ax: axes of a figure of your own to draw one selection into.

    Returns:
        The figure, which is a new one or that of ``ax``.

    Raises:
        MismatchError: no selection, selections of different groups, no such value, another order than of these groups,
            a width that is too narrow, or several selections for one ``ax``.

    Example:
        ``vn.plot_overlap({"MAD": mad, "LAP": lap}, order="clustered", width=6.75)``
    """
    given = {selections.selector: selections} if isinstance(selections, Selection) else selections
    of_kind("selections", given, Mapping, MismatchError, "a Selection, or a dictionary of selections by name")
    for name, one in given.items():
        of_kind(f"selections[{name!r}]", one, Selection, MismatchError)
        if set(one) != set(next(iter(given.values()))):
            raise MismatchError(f"selections are drawn in one order, and {name!r} has other groups than the first")
    if not given:
        raise MismatchError("there is no selection to draw: selections is empty")
    one_of("value", value, ("jaccard", "shared"), MismatchError)
    _drawn_into(ax, width, len(given))
    tables = {str(name): _overlaps(one, value) for name, one in given.items()}
    first = next(iter(tables.values()))
    groups = ordered([*first.index], order, np.hstack([one.loc[first.index, first.index] for one in tables.values()]))
    itself = np.eye(len(groups), dtype=bool)
    tables = {name: one.loc[groups, groups].mask(itself) for name, one in tables.items()}
    most = _most(tables)
    digits = max(0, 1 - math.floor(math.log10(most))) if value == "jaccard" else 0
    title = "Overlap of the sets (Jaccard, %)" if value == "jaccard" else "Neurons shared"
    return _heat_maps(
        tables, _Words(title, "Neurons of", "Neurons of", "Neurons of"), ("neutral", most, digits), width, ax
    )


def _overlaps(selection: Selection, value: str) -> pd.DataFrame:
    """Groups by groups, in the unit that is drawn."""
    if value == "jaccard":
        return 100 * selection.overlap()["jaccard"]
    shared = [[float(len(one & other)) for other in selection.values()] for one in selection.values()]
    return pd.DataFrame(shared, index=list(selection), columns=list(selection))


def _rows_of(table: pd.DataFrame, columns: Sequence[str], keys: Sequence[str], source: str) -> None:
    """Make sure that a table is one that can be drawn: it has the columns, and one row for each of its keys."""
    name = "summary" if source.endswith("summary") else "table"
    of_kind(name, table, pd.DataFrame, MismatchError, f"the table that {source} gives")
    if lacking := [one for one in columns if one not in table]:
        raise MismatchError(f"the table has no column {', '.join(lacking)}: give the table of {source}")
    if not len(table):
        raise MismatchError(f"the table has no row to draw: give the table of {source}")
    twice = table.loc[table.duplicated([*keys]), [*keys]].astype(str)
    if len(twice):
        raise MismatchError(f"the table has several rows for {', '.join(twice.iloc[0])}: draw one selector's alone")


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
    _rows_of(table, ["group", *columns, "p_holm"], ["group"], "null_distribution")
    rows = table.set_index(table["group"].astype(str))
    known = rows[columns].to_numpy(dtype=float)  # -inf where nothing is selected
    groups = ordered([*rows.index], order, np.where(np.isfinite(known), known, np.nan))
    strength, mean, high, p = rows.loc[groups, [*columns, "p_holm"]].to_numpy(dtype=float).T
    null = "Shuffled labels: mean, and up to the 95th percentile"
    kinds = {f"Strength, Holm’s p at most {LEVEL:g}": "full", "Strength, Holm’s p above it": "none"}
    canvas = _Canvas(width, ax, [null, *kinds], len(groups))
    axis, at = canvas.axis, np.arange(len(groups))
    high = np.where(np.isfinite(high), high, np.nan)  # a shuffle that selects nothing has -inf
    mean = np.where(np.isfinite(mean), mean, high)
    _points(axis, [mean, mean, high], at, GREY, "|", null)
    for held, (label, fill) in zip((p <= LEVEL, p > LEVEL), kinds.items(), strict=True):
        seen = held & np.isfinite(strength)
        how: Keywords = {"marker": "D", "markersize": 5, "linestyle": "", "fillstyle": fill}
        axis.plot(strength[seen], at[seen], color=GREEN, label=label, **how)
    for place in at[~np.isfinite(strength)].tolist():
        how = {"transform": axis.get_yaxis_transform(), "fontsize": canvas.size, "va": "center", "ha": "right"}
        how["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axis.text(0.98, place, "nothing selected", **how)
    canvas.rows(groups)
    axis.locator_params(axis="x", nbins=5 if canvas.points < 300 else 9)  # numbers of five letters
    canvas.label("Strength of the selection")
    _frame(axis, "x")
    return canvas.done()


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
    _rows_of(table, ["group", "jaccard", *ends], ["group", "size"] if sized else ["group"], source)
    shown = {name: style for name, style in _OVERLAPS.items() if name in table and table[name].notna().any()}
    if sized and order is not None:
        raise MismatchError("order is that of rows, and a table with sizes is drawn along them: leave it out")
    if sized:
        return _along_sizes(table, shown, width, ax)
    rows = table.set_index(table["group"].astype(str))
    whole = ["all"] if order is None and "all" in rows.index else []
    groups = [*ordered([one for one in rows.index if one not in whole], order, rows[[*shown]].to_numpy(float)), *whole]
    drawn = 100 * rows.loc[groups, [*shown, *ends]]
    canvas = _Canvas(width, ax, [label for label, _, _ in shown.values()], len(groups))
    for n, (name, (label, colour, marker)) in enumerate(shown.items()):
        at = np.arange(len(groups)) + 0.18 * (n - (len(shown) - 1) / 2)
        values = [drawn[one].to_numpy(float) for one in ([name, *ends] if name == "jaccard" else [name] * 3)]
        _points(canvas.axis, values, at, colour, marker, label)
    canvas.rows(groups)
    canvas.axis.set_xlim(left=0)
    canvas.label("Overlap of the sets (Jaccard, %)")
    _frame(canvas.axis, "x")
    return canvas.done()


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
    canvas = _Canvas(width, ax, legend, usual=(5.2, 3.6))
    for n, (_, rows) in enumerate(single.groupby("group")):
        how: Keywords = {"color": GREEN, "alpha": 0.25, "linewidth": 0.8, "label": thin if n == 0 else None}
        canvas.axis.plot(rows["size"], 100 * rows["jaccard"], **how)
    at = whole["size"].to_numpy(dtype=float)
    for name, (label, colour, marker) in shown.items():
        ends = ["jaccard_low", "jaccard_high"] if name == "jaccard" and interval else [name] * 2
        drawn = [100 * whole[one].to_numpy(dtype=float) for one in (name, *ends)]
        canvas.axis.plot(at, drawn[0], color=colour, linewidth=1.2)
        _points(canvas.axis, drawn, at, colour, marker, label, upright=True)
    canvas.settings(at, True)
    canvas.axis.set_ylim(bottom=0)
    canvas.label("Questions a group", "Overlap (Jaccard, %)")
    _frame(canvas.axis, "both")
    return canvas.done()


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
    one_of("value", value, ("correct", "margin", "score"), MismatchError)
    columns = [f"{effect}{end}" for effect in ("cross_effect", "self_effect") for end in ("", "_low", "_high")]
    _rows_of(summary, ["selector", "group", *columns], ["selector", "group"], "KnockoutResult.summary")
    rows = summary.loc[summary["group"] == "all"].dropna(subset=["self_effect", "cross_effect"])
    if not len(rows):
        raise MismatchError("no selector has a self and a cross effect over all groups: there is nothing to draw")
    unit, scale, _ = _VALUES[value]
    names = [str(name) for name in rows["selector"]]
    equal = "Self = cross"
    canvas = _Canvas(width, ax, [*names, equal], usual=(5.2, 4.2))
    axis, styles = canvas.axis, len(_STYLES)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.axvline(0, color="black", linewidth=0.6)
    drawn = scale * rows[columns].to_numpy(dtype=float)
    for n, (label, (x, x_low, x_high, y, y_low, y_high)) in enumerate(zip(canvas.names(names), drawn, strict=True)):
        reach = [
            np.maximum([[middle - low], [high - middle]], 0)
            for middle, low, high in ((x, x_low, x_high), (y, y_low, y_high))
        ]
        # Where there are more selectors than colours, each colour has another mark from then on.
        how: Keywords = {"color": _STYLES[n % styles][0], "fmt": _STYLES[(n + n // styles) % styles][1], "label": label}
        axis.errorbar([x], [y], xerr=reach[0], yerr=reach[1], mfc="none", markersize=6, linewidth=1, capsize=2, **how)
    ends = np.array([min(0.0, float(np.nanmin(drawn))), max(0.0, float(np.nanmax(drawn)))])
    limits = ends + (np.ptp(ends) or 1.0) * np.array([-0.06, 0.06])
    axis.set(xlim=limits, ylim=limits)
    axis.axline((0, 0), slope=1, color=GREY, linewidth=1, linestyle="--", label=equal)
    canvas.label(f"Cross effect: {unit[0].lower()}{unit[1:]}", "Self effect")
    _frame(axis, "both")
    return canvas.done()


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
    of_kind("values", by_group, Mapping, MismatchError, kind)
    numbers = {str(group): np.asarray(one, dtype=float).ravel() for group, one in by_group.items()}
    wrong = [group for group, one in numbers.items() if not len(one) or not np.isfinite(one).all()]
    if wrong or not numbers:
        raise MismatchError(
            f"values are finite numbers of each group, at least one; not so: {', '.join(wrong) or 'no group'}"
        )
    quartiles = np.array([np.quantile(one, (0.5, 0.25, 0.75)) for one in numbers.values()])
    groups = ordered([*numbers], order, quartiles)
    labels = ("A question", "Median, and the middle half")
    canvas = _Canvas(width, ax, labels, len(groups))
    axis, at = canvas.axis, np.arange(len(groups))
    for place, group in enumerate(groups):
        how: Keywords = {"marker": "|", "color": GREY, "s": 22, "linewidths": 0.7, "alpha": 0.6}
        own = numbers[group]
        axis.scatter(own, np.full(len(own), place + 0.16), label=labels[0] if place == 0 else None, **how)
    drawn = quartiles[[[*numbers].index(group) for group in groups]].T
    _points(axis, [*drawn], at - 0.16, GREEN, "D", labels[1])
    canvas.rows(groups)
    canvas.label(f"Highest value of {values.name}" if isinstance(values, NeuronView) else "Highest value in a question")
    _frame(axis, "x")
    return canvas.done()
