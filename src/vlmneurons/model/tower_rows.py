"""Which rows of the towers that see and hear belong to which question of a batch, and which of them are padding.

`vision_rows` and `sound_rows` find it out for each kind; here pictures, crops, videos and sounds come together.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtyping import Bool
from torch import Tensor

from vlmneurons.model.sound_rows import Heard, sound_rows
from vlmneurons.model.tokens import TokenTable
from vlmneurons.model.vision_rows import (
    Inputs,
    UnknownPadding,
    local_rows,
    real_patches,
    video_rows,
    vision_rows,
)


class TowerRows(NamedTuple):
    """What towers are given of a batch; see the attributes of `Batch`."""

    vision: tuple[int, ...] | None = None
    patches: Bool[Tensor, "row patch"] | None = None
    row_counts: tuple[tuple[int, ...], ...] | None = None
    heard: Heard | None = None
    is_whole: bool = False


def tower_rows(
    data: Inputs,
    tokens: TokenTable,
    config: Any,
    *,
    n_images: Sequence[int],
    n_sounds: Sequence[int],
    n_frames: Sequence[Sequence[int]],
    alone: Callable[[int], Inputs],
    tiles: Callable[[], Sequence[int] | None],
) -> TowerRows:
    """Which rows of the towers that see and hear belong to each question.

    Args:
        data: the model's inputs.
        tokens: what each token is.
        config: the model's configuration.
        n_images: how many pictures each question has.
        n_sounds: how many sounds each question has.
        n_frames: for each question the number of frames of each of its videos.
        alone: gives the inputs of one question encoded on its own; see `vision_rows`.
        tiles: gives the number of tiles of every picture, where it is known; see `vision_rows`.
    """
    vision, patches = vision_rows(data, n_images, config, alone, tiles) or (None, None)
    row_counts = None if vision is None else (vision,)
    crops = local_rows(data, n_images)
    if vision is not None and crops is not None:
        vision, row_counts = None, (vision, crops)
    elif tokens.video is not None:
        videos = video_rows(data, n_frames, config)
        if vision is None or patches is not None or videos is None:
            row_counts, patches = None, None  # one of the two cannot be told, or the pictures are padded
        else:
            row_counts, patches = (vision, videos[0]), videos[1]
        vision = None
    is_whole = len(n_images) == 1 and row_counts is None and tokens.video is None
    if is_whole := is_whole and isinstance(data.get("pixel_values"), Tensor):
        # Whatever the tower sees belongs to this question, if only its padding is known.
        try:
            patches = real_patches(data, config)
        except UnknownPadding:
            is_whole = False
    n_tokens = None if tokens.audio is None else tokens.audio.sum(1).tolist()
    return TowerRows(vision, patches, row_counts, sound_rows(data, n_sounds, n_tokens, config), is_whole)
