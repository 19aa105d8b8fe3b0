"""Running the vision tower once for a picture that several rows of a batch show.

Each question about a picture, and each row that shows an option of a question, brings the picture's pixels. Within
`each_once` the model computes the features of each different picture once, and gives them to all rows that show it.
"""

import contextlib
import inspect
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from vlmneurons.model.architectures.inside import is_watched
from vlmneurons.model.encoder import Batch

_WORKS: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()
"""For each model whether its features were the same; this is tried out on its first batch that repeats a picture."""
_INTERNAL = ("last_hidden_state", "hidden_states", "attentions")
"""What a vision tower also gives, and no decoder reads."""


@contextlib.contextmanager
def each_once(hf: nn.Module, batch: Batch) -> Iterator[None]:
    """Within, the model computes each picture's features once, if rows of the batch show the same pictures.

    The features differ by no more than rounding from those that the model computes of all pictures together: this is
    tried out on the first batch. A model is left alone if its pictures depend on each other, if it has no
    ``get_image_features`` that gives a list of them, or if its vision tower has hooks, which would see fewer rows; and
    so is a run with gradients.

    Args:
        hf: the model.
        batch: its inputs; rows with equal entries of ``batch.pictures`` show the same pictures.
    """
    owner = _owner(hf)
    rows = batch.pictures
    if (
        owner is None
        or rows is None
        or batch.vision is None
        or len(set(rows)) == len(rows)
        or not _WORKS.get(hf, True)
        or torch.is_grad_enabled()
        or _vision_is_watched(hf)
    ):
        yield
        return
    get_features = owner.get_image_features
    first_row = {key: row for row, key in reversed(list(enumerate(rows)))}
    kept = sorted(first_row.values())
    place = [kept.index(first_row[key]) for key in rows]  # of each row's features among those of the kept rows
    sizes = (len(rows), sum(batch.vision))  # a picture a row, or rows of patches

    def once(*args: object, **kwargs: object) -> object:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not _WORKS.get(hf, True) or not all(len(value) in sizes for value in tensors):
            return get_features(*args, **kwargs)
        kept_args = [_rows_of(value, batch, kept) for value in args]
        kept_kwargs = {name: _rows_of(value, batch, kept) for name, value in kwargs.items()}
        if hf in _WORKS:
            output = get_features(*kept_args, **kept_kwargs)
            output.pooler_output = [output.pooler_output[at] for at in place]
            return output
        whole = get_features(*args, **kwargs)
        try:
            _WORKS[hf] = _is_repeated(whole, get_features(*kept_args, **kept_kwargs), place)
        except (TypeError, ValueError, LookupError, AttributeError, AssertionError):
            _WORKS[hf] = False  # its code wants all pictures
        return whole

    owner.get_image_features = once
    try:
        yield
    finally:
        del owner.get_image_features


def _owner(hf: nn.Module) -> Any:
    """The module whose ``get_image_features`` the model's forward calls."""
    inner = getattr(hf, "model", None)
    for module in (inner, hf):
        if isinstance(module, nn.Module) and inspect.ismethod(getattr(module, "get_image_features", None)):
            return module
    return None


def _vision_is_watched(hf: nn.Module) -> bool:
    """Whether hooks of the library or the user's are on anything but the text decoder."""
    get_decoder = getattr(hf, "get_decoder", None)
    decoder = set(map(id, get_decoder().modules())) if get_decoder else set()
    return any(is_watched(module) for module in hf.modules() if id(module) not in decoder and module is not hf)


def _rows_of(value: object, batch: Batch, kept: Sequence[int]) -> object:
    """An argument with the pictures of some rows: a picture, or some patches, a row."""
    if not isinstance(value, Tensor):
        return value
    assert batch.vision is not None
    if len(value) == len(batch.vision):
        return value[list(kept)]
    parts = value.split(list(batch.vision))
    return torch.cat([parts[row] for row in kept])


def _is_repeated(whole: Any, fewer: Any, place: Sequence[int]) -> bool:
    """Whether the features of all pictures are those of the different pictures, repeated, up to rounding."""
    if not isinstance(whole, ModelOutput) or not isinstance(whole.get("pooler_output"), list | tuple):
        return False
    if {name for name, value in whole.items() if value is not None} - {"pooler_output", *_INTERNAL}:
        return False  # a decoder may read more than the features
    of_all, of_different = whole["pooler_output"], fewer["pooler_output"]
    if len(of_all) != len(place) or len(of_different) != max(place) + 1:
        return False
    pairs = [(a.float(), of_different[at].float()) for a, at in zip(of_all, place, strict=True)]
    if any(a.shape != b.shape for a, b in pairs):
        return False
    allowed = 256 * torch.finfo(of_all[0].dtype).eps * max(float(a.abs().max()) for a, _ in pairs)
    return all(float((a - b).abs().max()) <= allowed for a, b in pairs)
