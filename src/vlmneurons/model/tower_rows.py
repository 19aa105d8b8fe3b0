"""What the towers that see and hear are shown of a batch: which of their rows is whose question's, and what is padding.

See `vision_rows` and `sound_rows` for how it is told.
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
    """What towers are shown of a batch; see the attributes of `Batch`."""

    vision: tuple[int, ...] | None = None
    patches: Bool[Tensor, "row patch"] | None = None
    seen: tuple[tuple[int, ...], ...] | None = None
    heard: Heard | None = None
    is_whole: bool = False


class Counts(NamedTuple):
    """How much each question of a batch shows.

    Attributes:
        pictures: the number of its pictures.
        sounds: the number of its sounds.
        frames: the number of frames of each of its videos.
    """

    pictures: list[int]
    sounds: list[int]
    frames: list[list[int]]


def tower_rows(
    data: Inputs,
    counts: Counts,
    tokens: TokenTable,
    config: Any,
    alone: Callable[[int], Inputs],
    tiles: Callable[[], Sequence[int] | None],
) -> TowerRows:
    """What of the rows of the towers that see and hear is each question's.

    Args:
        data: the model's inputs.
        counts: how much each question shows.
        tokens: what each token is.
        config: the model's configuration.
        alone: gives the inputs of one question encoded on its own; see `vision_rows`.
        tiles: gives the number of tiles of every picture, where it is known; see `vision_rows`.
    """
    vision, patches = vision_rows(data, counts.pictures, config, alone, tiles) or (None, None)
    seen = None if vision is None else (vision,)
    crops = local_rows(data, counts.pictures)
    if vision is not None and crops is not None:
        vision, seen = None, (vision, crops)
    elif tokens.video is not None:
        videos = video_rows(data, counts.frames, config)
        seen = None if vision is None or patches is not None or videos is None else (vision, videos[0])
        vision, patches = None, None if seen is None or videos is None else videos[1]
    is_whole = len(counts.pictures) == 1 and seen is None and tokens.video is None
    if is_whole := is_whole and isinstance(data.get("pixel_values"), Tensor):
        # Whatever the tower sees is this question's, if only its padding is known.
        try:
            patches = real_patches(data, config)
        except UnknownPadding:
            is_whole = False
    n_tokens = None if tokens.audio is None else tokens.audio.sum(1).tolist()
    return TowerRows(vision, patches, seen, sound_rows(data, counts.sounds, n_tokens, config), is_whole)
