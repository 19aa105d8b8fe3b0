"""Running the vision tower once for a picture that several rows of a batch show.

Questions about one picture, and the rows that show a question's options, each bring the picture's pixels. Within
`each_once` the model computes the features of every different picture, and gives them to all rows that show it.
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
"""For each model whether its features were the same; found out on its first batch that repeats a picture."""
_INTERNAL = ("last_hidden_state", "hidden_states", "attentions")
"""What a vision tower gives besides, and no decoder reads."""


@contextlib.contextmanager
def each_once(hf: nn.Module, batch: Batch) -> Iterator[None]:
    """Within, the model computes each picture's features once, if rows of the batch show the same ones.

    The features differ by no more than rounding from those that the model computes with all pictures: this is tried
    out on the first batch, and a model whose pictures depend on each other, or that has no ``get_image_features`` that
    gives a list of them, is left alone. So is one with hooks of others on its vision tower, which would see fewer rows,
    and a run that is differentiated.

    Args:
        hf: the model.
        batch: its inputs; rows show the same pictures if ``batch.pictures`` says so.
    """
    owner = _owner(hf)
    rows = batch.pictures
    repeated = rows is not None and len(set(rows)) < len(rows)
    known = owner is not None and repeated and batch.vision is not None and _WORKS.get(hf, True)
    if not known or torch.is_grad_enabled() or _vision_is_watched(hf):
        yield
        return
    assert owner is not None
    assert rows is not None
    assert batch.vision is not None
    plain = owner.get_image_features
    first = {key: row for row, key in reversed(list(enumerate(rows)))}
    kept = sorted(first.values())
    place = [kept.index(first[key]) for key in rows]
    sizes = (len(rows), sum(batch.vision))  # a picture a row, or rows of patches

    def once(*args: object, **kwargs: object) -> object:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not _WORKS.get(hf, True) or not all(len(value) in sizes for value in tensors):
            return plain(*args, **kwargs)
        fewer = (
            [_rows_of(value, batch, kept) for value in args],
            {name: _rows_of(value, batch, kept) for name, value in kwargs.items()},
        )
        if hf in _WORKS:
            output = plain(*fewer[0], **fewer[1])
            output.pooler_output = [output.pooler_output[at] for at in place]
            return output
        whole = plain(*args, **kwargs)
        try:
            _WORKS[hf] = _is_repeated(whole, plain(*fewer[0], **fewer[1]), place)
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
    """Whether features of all pictures are those of the different ones, repeated, up to rounding."""
    if not isinstance(whole, ModelOutput) or not isinstance(whole.get("pooler_output"), list | tuple):
        return False
    if {name for name, value in whole.items() if value is not None} - {"pooler_output", *_INTERNAL}:
        return False  # a decoder may read more than the features
    one, other = whole["pooler_output"], fewer["pooler_output"]
    if len(one) != len(place) or len(other) != max(place) + 1:
        return False
    pairs = [(a.float(), other[at].float()) for a, at in zip(one, place, strict=True)]
    if any(a.shape != b.shape for a, b in pairs):
        return False
    allowed = 256 * torch.finfo(one[0].dtype).eps * max(float(a.abs().max()) for a, _ in pairs)
    return all(float((a - b).abs().max()) <= allowed for a, b in pairs)
