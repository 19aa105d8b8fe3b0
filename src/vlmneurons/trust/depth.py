"""In which layers the neurons of a selection lie, against a uniform choice of as many."""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats as scipy_stats

from vlmneurons.checks import as_fraction, as_whole, check_kind
from vlmneurons.errors import MismatchError, SelectionError
from vlmneurons.neurons.selection import Selection
from vlmneurons.neurons.sets import NeuronSet, check_same_space

if TYPE_CHECKING:
    import pandas as pd


def layer_counts(selection: Selection, *, confidence: float = 0.95) -> "pd.DataFrame":
    """How many of each group's neurons lie in each layer, against a uniform choice of as many neurons.

    Args:
        selection: the neurons.
        confidence: level of the interval of a uniform choice.

    Returns:
        A row for each group and layer with ``group``, ``tower``, ``layer``, ``neurons``, ``expected`` under uniform
        choice, ``low`` and ``high`` (the interval that a uniform choice falls into; hypergeometric, exact for one
        layer, not for all of them at once) and ``ratio``, neurons over expected.
    """
    import pandas as pd

    check_kind("selection", selection, Selection, MismatchError)
    confidence = as_fraction("confidence", confidence, SelectionError)
    labels, sizes = tuple(selection.space.tower_layers), selection.space.count_by_layer().numpy()
    tail = (1 - confidence) / 2
    rows = []
    for group, neurons in selection.items():
        counts = selection.space.count_by_layer(neurons.indices).numpy()
        low, high = scipy_stats.hypergeom.ppf([[tail], [1 - tail]], sizes.sum(), sizes, len(neurons))
        expected = len(neurons) * sizes / sizes.sum()
        for n, (tower, layer) in enumerate(labels):
            rows.append(
                {
                    "group": group,
                    "tower": tower,
                    "layer": layer,
                    "neurons": int(counts[n]),
                    "expected": expected[n],
                    "low": int(low[n]),
                    "high": int(high[n]),
                    "ratio": counts[n] / expected[n] if len(neurons) else float("nan"),
                }
            )
    return pd.DataFrame(rows)


def layer_profile(
    selection: Selection,
    *,
    resampled: Iterable[Selection] = (),
    uniform: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> "pd.DataFrame":
    """How concentrated each group's neurons are in a few layers, against a uniform choice of as many neurons.

    Args:
        selection: the neurons.
        resampled: selections from resampled questions, for intervals of the concentration; see `resampled_selections`.
        uniform: number of uniform choices that their interval is estimated from.
        confidence: level of the intervals.
        seed: of the uniform choices.

    Returns:
        A row for each ``group`` with ``neurons``; ``gini`` (0 if spread evenly over layers, towards 1 if in one layer)
        and ``entropy`` (nats, of the shares of the layers), each with ``_uniform_low`` and ``_uniform_high``, the
        interval that a uniform choice of as many neurons falls into, and, if there are resampled selections, ``_low``
        and ``_high``; and ``top_tower`` and ``top_layer``, where most neurons are, with ``top_share`` of the neurons
        and ``top_expected``, that layer's share of all neurons. Resampled selections are less concentrated the less
        stable they are, so their interval need not contain the value.

    Raises:
        MismatchError: something else than selections, or selections of different spaces.
        SelectionError: a confidence, number of choices or seed that is none.
    """
    import pandas as pd

    check_kind("selection", selection, Selection, MismatchError)
    if isinstance(resampled, Selection):
        raise MismatchError("resampled is several selections, such as resampled_selections gives; got a single one")
    check_kind(
        "resampled", resampled, Iterable, MismatchError, "several selections, such as resampled_selections gives"
    )
    confidence = as_fraction("confidence", confidence, SelectionError)
    uniform = as_whole("uniform", uniform, SelectionError, least=1)
    labels, sizes = tuple(selection.space.tower_layers), selection.space.count_by_layer().numpy()
    generator = np.random.default_rng(as_whole("seed", seed, SelectionError, least=0))
    tails = [50 * (1 - confidence), 100 - 50 * (1 - confidence)]

    def counted(neurons: NeuronSet) -> np.ndarray:
        return selection.space.count_by_layer(neurons.indices).numpy()

    again: dict[str, list[np.ndarray]] = {group: [] for group in selection}
    for other in resampled:
        check_kind("each of resampled", other, Selection, MismatchError)
        check_same_space(selection.space, other.space)
        for group in selection:
            if len(other[group]):
                again[group].append(counted(other[group]))
    known: dict[int, np.ndarray] = {}
    rows = []
    for group, neurons in selection.items():
        counts, size = counted(neurons), len(neurons)
        row: dict[str, object] = {"group": group, "neurons": size}
        if size:
            if size not in known:
                known[size] = generator.multivariate_hypergeometric(sizes, size, uniform, method="marginals")
            for name, measure in (("gini", _gini), ("entropy", functools.partial(scipy_stats.entropy, axis=-1))):
                row[name] = float(measure(counts))
                row[f"{name}_uniform_low"], row[f"{name}_uniform_high"] = np.percentile(measure(known[size]), tails)
                if again[group]:
                    row[f"{name}_low"], row[f"{name}_high"] = np.percentile(measure(np.stack(again[group])), tails)
            top = int(counts.argmax())
            row |= {
                "top_tower": labels[top][0],
                "top_layer": labels[top][1],
                "top_share": counts[top] / size,
                "top_expected": sizes[top] / sizes.sum(),
            }
        rows.append(row)
    return pd.DataFrame(rows)


def _gini(counts: np.ndarray) -> np.ndarray | np.number:
    """Gini coefficient of non-negative counts along the last axis."""
    ordered = np.sort(counts, -1)
    n = ordered.shape[-1]
    weight = 2 * np.arange(1, n + 1) - n - 1
    return (ordered * weight).sum(-1) / (n * ordered.sum(-1))


def overlap_by_layer(first: NeuronSet, second: NeuronSet) -> "pd.DataFrame":
    """Where two sets overlap: a row for each layer with the size of either set, of both, and what chance would share.

    Columns: ``tower``, ``layer``, ``first``, ``second``, ``both``, ``expected`` (of two random sets of these sizes in
    the layer).

    Args:
        first: a set of neurons.
        second: another one of the same space.

    Raises:
        MismatchError: the sets are of different spaces.
    """
    import pandas as pd

    for name, one in (("first", first), ("second", second)):
        check_kind(name, one, NeuronSet, MismatchError, "a NeuronSet, such as selection['Japan']")
    both = first & second
    labels, sizes = tuple(first.space.tower_layers), first.space.count_by_layer().numpy()
    ours, theirs, shared = (first.space.count_by_layer(neurons.indices).numpy() for neurons in (first, second, both))
    return pd.DataFrame(
        {
            "tower": [tower for tower, _ in labels],
            "layer": [layer for _, layer in labels],
            "first": ours,
            "second": theirs,
            "both": shared,
            "expected": ours * theirs / sizes,
        }
    )
