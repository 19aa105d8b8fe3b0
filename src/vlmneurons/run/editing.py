"""Editing a site's values in place, as functions of tensors that every engine calls, here or where the model runs.

A remote job sends their source along, as it does that of counting (see `vlmneurons.statistics.counting`).
"""

from typing import no_type_check


@no_type_check
def edit_columns(values, columns, mode, factor=1.0, new=None):
    """Change some neurons of ``values`` ``[..., neuron]`` where they are.

    Args:
        values: a site's values.
        columns: ``[column]`` which neurons.
        mode: ``"zero"``, ``"scale"`` (times ``factor``), ``"add"`` (plus ``factor * new``), ``"mean"`` or ``"replace"``
            (set to ``new``).
        factor: of ``"scale"`` and ``"add"``.
        new: ``[column]`` values, in the dtype and on the device of ``values``.
    """
    if mode == "zero":
        values.index_fill_(-1, columns, 0)
        return
    old = values.index_select(-1, columns)
    if mode == "scale":
        changed = old * factor
    elif mode == "add":
        changed = old + factor * new
    else:
        changed = new.expand_as(old)
    values.index_copy_(-1, columns, changed)


@no_type_check
def edit_rows(values, mask, mode, factor=1.0, new=None):
    """As `edit_columns`, with other neurons in each row: ``values`` are ``[row, ..., neuron]``.

    Args:
        values: a site's values.
        mask: ``[row, neuron]`` whether a neuron is changed in a row.
        mode: see `edit_columns`.
        factor: see `edit_columns`.
        new: ``[neuron]`` values of every neuron of the site.
    """
    mask = mask.view(len(mask), *[1] * (values.ndim - 2), mask.shape[-1])
    if mode == "zero":
        values.masked_fill_(mask, 0)
        return
    if mode == "scale":
        changed = values * factor
    elif mode == "add":
        changed = values + factor * new
    else:
        changed = new.expand_as(values)
    values.copy_(changed.where(mask, values))
