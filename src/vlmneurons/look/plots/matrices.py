"""Heat maps: effects of masks on groups, neurons by layer, overlaps of selections."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from vlmneurons.checks import Keywords, as_number, check_choice, check_kind
from vlmneurons.errors import MismatchError
from vlmneurons.look.figures import COLOURS, NOT_DRAWN, PrintFigure, ems, natural, ordered, shortened, tall, with_fonts
from vlmneurons.look.numbers import in_matrix
from vlmneurons.look.plots.canvas import VALUES, check_axes, figure_of, label_size, plain_names, size_for
from vlmneurons.neurons.selection import Selection

if TYPE_CHECKING:
    from vlmneurons.study.result import KnockoutResult


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

    check_kind("result", result, KnockoutResult, MismatchError, "a KnockoutResult, which knockout gives")
    if selector is None or isinstance(selector, str):
        names = list(result.selectors) if selector is None else [selector]
    else:
        check_kind("selector", selector, Iterable, MismatchError, "the name of a selector, or a list of names")
        names = list(selector)
    if not names:
        raise MismatchError("there is no selector to draw: the study has no masks, or selector is an empty list")
    if limit is not None and as_number("limit", limit, MismatchError) <= 0:
        raise MismatchError(f"limit {limit} is the value at which colours end, and above 0")
    check_axes(ax, width, len(names))
    value = value or result.measure
    title, scale, meaning = VALUES.get(value, (value, 1.0, "effect"))
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
    values = [matrix.to_numpy(dtype=float).ravel() for matrix in matrices.values()]
    return float(np.abs(np.nan_to_num(np.concatenate(values))).max()) or 1.0


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
    texts = (in_matrix(value, digits) for matrix in matrices.values() for value in matrix.to_numpy().flat)
    longest = max(texts, key=ems)
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        values = matrix.to_numpy(dtype=float)
        image = axis.imshow(values, cmap=COLOURS[meaning], vmin=least, vmax=most)
        axis.set_facecolor(NOT_DRAWN)
        if controls and controls < matrix.shape[1]:
            axis.axvline(matrix.shape[1] - controls - 0.5, color="black", linewidth=1)
        _ticks(axis, matrix, size, cell, letters)
        room = int(72 * cell * matrix.shape[1] / (0.62 * size)) if width else 10**6
        axis.set_title(plain_names(shortened([name], room))[0], fontsize=size if width else None)
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
    columns, rows = (shortened([*map(str, labels)], letters) for labels in (matrix.columns, matrix.index))
    upright = max(map(ems, columns)) * size > 0.9 * 72 * cell
    axis.set_xticks(range(len(columns)), plain_names(columns), rotation=90 if upright else 0, fontsize=size)
    axis.set_yticks(range(len(rows)), plain_names(rows), fontsize=size)


def _in_order(
    result: "KnockoutResult", matrices: Mapping[str, pd.DataFrame], order: str | Sequence[str] | None
) -> dict[str, pd.DataFrame]:
    """Matrices with groups in one order in rows and columns; masks of no group, and control groups, come last."""
    groups = list(result.group_names)
    squares = [matrix.reindex(index=groups, columns=groups).to_numpy(dtype=float) for matrix in matrices.values()]
    profiles = np.hstack([np.hstack([square, square.T]) for square in squares])
    columns = [*ordered(groups, order, profiles), *result.control_names]
    in_order = {}
    for name, matrix in matrices.items():
        others = sorted((mask for mask in matrix.index if mask not in columns), key=natural)
        in_order[name] = matrix.loc[[*(group for group in columns if group in matrix.index), *others], columns]
    return in_order


class _Room(NamedTuple):
    """The sizes of what is in a figure: text in points, the side of a cell in inches, letters of a name."""

    size: float
    cell: float
    letters: int = 10**6
    bar_below: bool = False


def _panels(
    matrices: Mapping[str, pd.DataFrame], width: float | None, ax: Axes | None
) -> tuple[Figure, list[Axes], _Room]:
    """The figure, its axes, and the sizes of what is in it."""
    tables = list(matrices.values())
    n_columns, n_rows = (max(table.shape[side] for table in tables) for side in (1, 0))
    labels = [str(label) for table in tables for label in (*table.index, *table.columns)]
    if ax is not None:
        box = ax.get_position()
        figure = figure_of(ax)
        across, down = figure.get_size_inches() * (box.width, box.height)
        return figure, [ax], _Room(label_size(), min(across / n_columns, down / n_rows))
    same_rows = len({tuple(table.index) for table in tables}) == 1
    letters, side_bar = 10**6, True
    if width is None:
        size, cell, across = label_size(), 0.5 if n_columns <= 12 else 0.36, len(tables)
        longest = 0.085 * max(map(len, labels))
        inches = (across * (cell * n_columns + 0.35) + longest + 1.6, cell * n_rows + longest + 1.3)
    else:
        size = size_for(max(n_columns, n_rows))
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
        text, colour = in_matrix(float(values[row, column]), digits), "black" if light > 0.5 else "white"
        axis.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)


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
    check_kind("selection", selection, Selection, MismatchError)
    towers = sorted({site.tower for site in selection.space.sites})
    if len(towers) > 1:
        raise MismatchError(f"layers are drawn for one tower; this selection spans {', '.join(towers)}")
    check_axes(ax, width, 1)
    layers = list(selection.space.layers)
    layer_of = selection.space.layer_of
    counted = {
        group: np.bincount(layer_of[selection[group].indices].numpy(), minlength=layers[-1] + 1)[layers]
        for group in selection
    }
    groups = ordered(list(counted), order, np.stack(list(counted.values())).astype(float))
    counts = np.stack([counted[group] for group in groups])
    labels = shortened(groups, 10**6 if not width else 12 if width < 5 else 24)
    size = size_for(len(groups)) if width else label_size()
    if ax is not None:
        figure, axis = figure_of(ax), ax
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
    axis.set_yticks(range(len(groups)), plain_names(labels), fontsize=size)
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
    by_name = {selections.selector: selections} if isinstance(selections, Selection) else selections
    check_kind("selections", by_name, Mapping, MismatchError, "a Selection, or a dictionary of selections by name")
    for name, selection in by_name.items():
        check_kind(f"selections[{name!r}]", selection, Selection, MismatchError)
        if set(selection) != set(next(iter(by_name.values()))):
            raise MismatchError(f"selections are drawn in one order, and {name!r} has other groups than the first")
    if not by_name:
        raise MismatchError("there is no selection to draw: selections is empty")
    check_choice("value", value, ("jaccard", "shared"), MismatchError)
    check_axes(ax, width, len(by_name))
    tables = {str(name): _overlaps(selection, value) for name, selection in by_name.items()}
    first = next(iter(tables.values()))
    profiles = np.hstack([table.loc[first.index, first.index] for table in tables.values()])
    groups = ordered([*first.index], order, profiles)
    itself = np.eye(len(groups), dtype=bool)
    tables = {name: table.loc[groups, groups].mask(itself) for name, table in tables.items()}
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
    shared = [[float(len(row & column)) for column in selection.values()] for row in selection.values()]
    return pd.DataFrame(shared, index=list(selection), columns=list(selection))
