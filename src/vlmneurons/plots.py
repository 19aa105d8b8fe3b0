"""Pictures of statistics, selections and knockout results.

Every function returns a matplotlib `Figure` and draws nowhere else: no window, no global state, no style changed.
Colours are safe for colour-blind readers; effects use a diverging map centred on zero.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from vlmneurons.errors import MismatchError
from vlmneurons.neurons import Selection

if TYPE_CHECKING:
    from vlmneurons.study import KnockoutResult

_LABELS = {
    "delta": ("Change of accuracy (points)", 100.0),
    "margin": ("Change of log-probability margin (nats)", 1.0),
    "flips": ("Answers that changed (%)", 100.0),
    "right_to_wrong": ("Right answers that turned wrong (%)", 100.0),
    "wrong_to_right": ("Wrong answers that turned right (%)", 100.0),
    "ablated": ("Accuracy under the mask (%)", 100.0),
}


def plot_matrix(
    result: "KnockoutResult", selector: str | Sequence[str] | None = None, *, value: str = "delta"
) -> Figure:
    """Heat map of effects: whose neurons were off (rows) against whose questions were asked (columns).

    Args:
        result: what `knockout` gave.
        selector: one selector, or several side by side on one scale; all of them by default.
        value: column of `KnockoutResult.table`, such as ``"delta"`` (drawn in points) or ``"margin"`` (nats).
    """
    names = list(result.selectors) if selector is None else [selector] if isinstance(selector, str) else list(selector)
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
    most = max(float(np.nanmax(np.abs(matrix.to_numpy(dtype=float)))) for matrix in matrices.values()) or 1.0
    image = None
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        values = matrix.to_numpy(dtype=float)
        image = axis.imshow(values, cmap="RdBu", vmin=-most, vmax=most)
        axis.set_xticks(range(matrix.shape[1]), matrix.columns, rotation=90 if longest > 4 else 0)
        axis.set_yticks(range(matrix.shape[0]), matrix.index)
        axis.set_title(name)
        axis.set_xlabel("Questions about")
        if n_columns <= 12:
            for row, column in np.ndindex(values.shape):
                shade = abs(values[row, column]) / most
                text = f"{values[row, column]:.0f}" if scale != 1.0 else f"{values[row, column]:.1f}"
                text = text.replace("-0.0", "0.0") if text in ("-0", "-0.0") else text
                axis.text(
                    column,
                    row,
                    "0" if text == "-0" else text.replace("-", "−"),
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
    axis.set_yticks(range(len(groups)), groups)
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
