"""Files of other programs that hold sets of neurons: those of the LAPE authors."""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmneurons.checks import as_names, as_path
from vlmneurons.errors import FileFormatError, MismatchError, SiteError
from vlmneurons.files import tables as _files
from vlmneurons.neurons.sets import NeuronSet, check_one_site_per_layer, check_space, layer_position
from vlmneurons.neurons.sites import NeuronSpace

_ADVICE = "the LAPE format has one list per layer"


def to_lape(sets: Mapping[str, NeuronSet], path: "str | os.PathLike[str] | None" = None) -> list[list[Tensor]]:
    """The LAPE authors' nested lists, ``result[group][layer]``; see `Selection.to_lape`."""
    nested = []
    for neurons in sets.values():
        check_one_site_per_layer(neurons.space, _ADVICE)
        by_layer = neurons.by_layer()
        layers = range(max(neurons.space.layers) + 1)
        nested.append([by_layer.get(layer, torch.empty(0, dtype=torch.int64)) for layer in layers])
    if path is not None:
        torch.save(nested, as_path("path", path, FileFormatError))
    return nested


def from_lape(nested: object, space: NeuronSpace, groups: Sequence[str]) -> tuple[dict[str, NeuronSet], str]:
    """The sets of each group, and where they come from; see `Selection.from_lape`."""
    check_space(space)
    check_one_site_per_layer(space, _ADVICE)
    source = "LAPE selection"
    if isinstance(nested, (str, os.PathLike)):
        source = os.fspath(nested)
        nested = _loaded(source)
    groups = as_names("groups", (groups,) if isinstance(groups, str) else groups, MismatchError)
    if not isinstance(nested, (list, tuple)) or len(nested) != len(groups):
        got = f"{len(nested)} lists" if isinstance(nested, (list, tuple)) else f"a {type(nested).__name__}"
        fewer = isinstance(nested, (list, tuple)) and 0 < len(nested) < len(groups)
        raise FileFormatError(
            f"{source}: expected one list for each of {len(groups)} groups; got {got}" + (_SHORT if fewer else "")
        )
    if len(set(groups)) != len(groups):
        raise FileFormatError(f"{source}: a group is named twice in {', '.join(map(str, groups))}")
    return {group: _set_of(source, group, layers, space) for group, layers in zip(groups, nested, strict=True)}, source


_SHORT = (
    ". The authors' code leaves out a last group for which no neuron was found, so five of their seven released files "
    "(BLOOM, LLaMA-2-70B, Mistral, OPT, Phi-2) hold six lists where their README names seven languages: name the last "
    "group no more, if it is such a file"
)


def _loaded(source: str) -> Any:
    """What a file of PyTorch holds, read without running code that it may carry."""
    _files.check_regular(source)
    _files.check_uncompressed(source)
    try:
        # torch warns about pickles of other programs; they are refused below, or were read as plain lists.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(source, weights_only=True, map_location="cpu")
    except OSError:
        raise
    except Exception as error:  # PyTorch's own reader fails in many ways on bytes that it did not write
        raise FileFormatError(f"{source}: not a file of neuron lists: {error}") from error


def _set_of(source: str, group: str, layers: object, space: NeuronSpace) -> NeuronSet:
    """The neurons of one group, from a list for each layer."""
    depth = max(space.layers) + 1
    if not isinstance(layers, (list, tuple)) or len(layers) != depth:
        got = f"{len(layers)} layers" if isinstance(layers, (list, tuple)) else f"a {type(layers).__name__}"
        raise FileFormatError(f"{source}: group {group!r} needs {depth} layers as the space has; got {got}")
    try:
        for layer, numbers in enumerate(layers):
            # A tensor of one stored number can claim a billion: look at the length before the numbers.
            most = space.widths[layer_position(space, layer)] if len(numbers) else 0
            if len(numbers) > most:
                raise SiteError(f"layer {layer} has {most} neurons, not the {len(numbers)} that are listed")
        return NeuronSet.from_indices(space, {n: numbers for n, numbers in enumerate(layers) if len(numbers)})
    except (SiteError, TypeError, RuntimeError) as error:
        raise FileFormatError(f"{source}: group {group!r}: {error}") from error
