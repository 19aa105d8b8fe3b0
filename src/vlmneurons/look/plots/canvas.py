"""What figures of one panel have in common: room for their names, points with intervals, and what values are called."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from vlmneurons.checks import Keywords, check_kind
from vlmneurons.errors import MismatchError
from vlmneurons.look.figures import BLUE, GREEN, ORANGE, PURPLE, PrintFigure, as_width, ems, shortened, with_fonts
from vlmneurons.look.numbers import with_minus

VALUES = {
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
"""What a column of the table is called, what it is multiplied by, and which colours it has; others are effects."""


def check_axes(ax: Axes | None, width: float | None, panels: int) -> None:
    """Refuse axes for several panels, or with a width, and a width that is too narrow."""
    as_width(width)
    if ax is not None:
        check_kind("ax", ax, Axes, MismatchError, "axes of a matplotlib figure")
        if width is not None:
            raise MismatchError("width is that of a new figure, and ax has a figure: give one of the two")
        if panels > 1:
            raise MismatchError(f"ax takes one panel, and there are {panels}: name one selector")


def figure_of(ax: Axes) -> Figure:
    """The figure that axes belong to, also where they belong to a subfigure."""
    figure = ax.figure
    while not isinstance(figure, Figure):
        figure = figure.figure
    return figure


def label_size() -> float:
    """The font size, in points, of labels in a figure whose width is not given: matplotlib's setting."""
    return float(FontProperties(size=rcParams["xtick.labelsize"]).get_size_in_points())


def size_for(groups: int) -> float:
    """The font size, in points, of a figure whose width is given."""
    return 8.0 if groups <= 8 else 7.0 if groups <= 16 else 6.0


def plain_names(names: Any) -> list[str]:
    """Names as matplotlib may draw them: cut at 40 letters, with dollar signs that begin no formula."""
    cut = (f"{name[:39]}…" if len(name) > 40 else name for name in map(str, names))
    return [name.replace("$", r"\$") for name in cut]


STYLES = [(ORANGE, "o"), (BLUE, "s"), (GREEN, "D"), (PURPLE, "^"), ("black", "v"), ("#E69F00", "P"), ("#56B4E9", "X")]


class Canvas:
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
        check_axes(ax, width, 1)
        self.given, self.width = ax is not None, width
        self.size = size_for(lines) if width else label_size()
        self.points = 72 * (width or usual[0])
        if ax is not None:
            self.figure, self.axis = figure_of(ax), ax
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
        if self.width:
            names = shortened([str(name) for name in names], 12 if self.width < 5 else 24)
        return plain_names(names)

    def rows(self, labels: Iterable[str], at: Any = None) -> None:
        """Label the rows, from the top."""
        shown = self.names(labels)
        number = len(shown) if at is None else math.ceil(max(at, default=0) + 0.4)
        self.axis.set_yticks(range(number) if at is None else at, shown, fontsize=self.size)
        self.axis.set_ylim(number - 0.5, -0.5)

    def settings(self, at: np.ndarray, log: bool) -> None:
        """Label settings along the axis; on a log scale where that is wanted, and all of them are above 0."""
        log = log and len(at) > 1 and float(at.min()) > 0
        if log:
            self.axis.set_xscale("log")
            self.axis.minorticks_off()
        labels = [with_minus(f"{value:g}") for value in at]
        room = 0.8 * self.points - 4 * self.size
        self.axis.set_xticks(at, spaced(np.log(at) if log else at, labels, room, self.size))

    def _label(self, across: str, up: str) -> None:
        """Name the axes, in as many lines as it takes."""
        row_names = [label.get_text() for label in self.axis.get_yticklabels()]
        room = self.points - (0 if up else self.size * max(map(ems, row_names), default=0))
        for text, put in ((across, self.axis.set_xlabel), (up, self.axis.set_ylabel)):
            put(_wrapped(text, room - 4 * self.size, self.size), fontsize=self.size)
        self.axis.tick_params(labelsize=self.size)

    def done(self, grid: str, across: str, up: str = "") -> Figure:
        """The figure, with what comes last: names of the axes, lines of the grid, the legend and fonts.

        Args:
            grid: ``"x"``, ``"y"`` or ``"both"``.
            across: name of the horizontal axis.
            up: of the vertical axis, where its rows have no names.
        """
        self._label(across, up)
        draw_frame(self.axis, grid)
        handles, labels = self.axis.get_legend_handles_labels()
        if handles and self.given:
            self.axis.legend(handles, labels, frameon=False, fontsize=self.legend["fontsize"])
        elif handles:
            self.figure.legend(handles, labels, loc="outside lower center", frameon=False, **self.legend)
        with_fonts(self.axis if self.given else self.figure)
        return self.figure


def _wrapped(text: str, points: float, size: float) -> str:
    """A text broken into lines of at most so many points."""
    return "\n".join(textwrap.wrap(text, max(12, int(points / (0.6 * size)))))


def spaced(at: Any, labels: Sequence[str], points: float, size: float) -> list[str]:
    """Labels of places along an axis; one that would run into its neighbour is left empty."""
    reach = (max(at) - min(at)) or 1.0
    shown, end = [], -math.inf
    for place, label in zip(at, labels, strict=True):
        middle, half = points * (place - min(at)) / reach, 0.5 * size * ems(label)
        fits = middle - half >= end + 0.3 * size
        shown.append(label if fits else "")
        end = middle + half if fits else end
    return shown


def draw_points(
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
    style: Keywords = {"fmt": marker, "color": colour, "markersize": 4.5, "linewidth": 1.2, "capsize": 2}
    if upright:
        axis.errorbar(at, value, yerr=reach, label=label, **style)
    else:
        axis.errorbar(value, at, xerr=reach, label=label, **style)


def with_ends(table: pd.DataFrame, effect: str, scale: float) -> list[np.ndarray]:
    """An effect of a summary with the ends of its intervals, in the unit that is drawn."""
    return [scale * table[f"{effect}{end}"].to_numpy(dtype=float) for end in ("", "_low", "_high")]


def draw_frame(axis: Axes, grid: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)


def check_rows(table: pd.DataFrame, columns: Sequence[str], keys: Sequence[str], source: str) -> None:
    """Refuse a table that cannot be drawn: one without these columns, or with several rows for the same keys."""
    name = "summary" if source.endswith("summary") else "table"
    check_kind(name, table, pd.DataFrame, MismatchError, f"the table that {source} gives")
    if lacking := [name for name in columns if name not in table]:
        raise MismatchError(f"the table has no column {', '.join(lacking)}: give the table of {source}")
    if not len(table):
        raise MismatchError(f"the table has no row to draw: give the table of {source}")
    twice = table.loc[table.duplicated([*keys]), [*keys]].astype(str)
    if len(twice):
        raise MismatchError(f"the table has several rows for {', '.join(twice.iloc[0])}: draw one selector's alone")
