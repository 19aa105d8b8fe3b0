"""Which rows of a vision tower belong to which question, and which of their patches are padding.

A vision tower does not run on questions but on *rows*: pictures, tiles of pictures, or patches. No input says in one
form for all models how many rows each question has and which of them are padding; each family's processor leaves its
own traces in the model's inputs, and here they are read. What is not certain is None, and then nothing is counted:
padding that is counted, or a patch that is counted for another question, would spoil statistics without a sign.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

Inputs = Mapping[str, Any]
"""What a processor makes of texts and pictures: tensors by name, some in lists."""
Rows = tuple[tuple[int, ...], Bool[Tensor, "row patch"] | None]
"""How many rows each question has, in order; and which patches of each row are real, None where all are."""

_MASKED_PATCH = {
    "idefics2": lambda covered, whole: covered == whole,
    "idefics3": lambda covered, whole: covered > 0,
    "smolvlm": lambda covered, whole: covered > 0,
    "aria": lambda covered, whole: covered > 0,
}
"""Whether a patch is real, from how many of its pixels a mask of pixels covers: as each family's model decides it."""

_DROPS_TILES = ("granite_docling",)
"""The families whose mask is of tiles, ``[question, tile]``: those that are padding never reach the vision tower."""

OF_PICTURES = re.compile("pixel|image|patch|tile|vision|visual|spatial|aspect|crop")
_OF_TEXT = ("image_embeds_position_mask",)
"""Names of masks in a model's inputs: of pictures, save these, which are of the text's tokens."""


class UnknownPadding(Exception):
    """Raised where a vision tower sees padding, and it is not known where."""


def vision_rows(
    data: Inputs,
    n_images: Sequence[int],
    config: Any,
    alone: Callable[[int], Inputs],
    tiles: Callable[[], Sequence[int] | None] = lambda: None,
) -> Rows | None:
    """How many rows of the vision tower belong to each question, in order, and which of their patches are real.

    Args:
        data: the model's inputs, as its processor gave them for a batch of questions.
        n_images: how many pictures each question has.
        config: the model's configuration.
        alone: gives the inputs of one question encoded on its own, for families that say nowhere how many tiles they
            make of a picture.
        tiles: gives the number of tiles of every picture where the processor can tell it, else None.

    Returns:
        The numbers and the patches, or None where they cannot be told for certain.
    """
    if sum(n_images) == 0:
        return (0,) * len(n_images), None
    pixels = data.get("pixel_values", data.get("pixel_values_images"))  # Video-LLaVA's processor
    if not isinstance(pixels, Tensor):
        return None
    data = {**data, "pixel_values": pixels}
    try:
        real = real_patches(data, config)
    except UnknownPadding:
        return None
    rows: Sequence[int] | None = None
    if "image_grid_thw" in data:  # one long row of patches: Qwen-VL, GLM-4V
        rows = _by_question(data["image_grid_thw"].prod(-1).tolist(), n_images)
    elif pixels.ndim == 5 and not _has_more_than_pixels(data) and [pixels.shape[1]] * len(pixels) == list(n_images):
        rows = n_images  # Idefics
    elif pixels.ndim == 5 and getattr(config, "model_type", "") == "perception_lm":  # as many tiles a picture
        rows = _by_question([pixels.shape[1]] * len(pixels), n_images)
    elif "aspect_ratio_mask" in data:  # Mllama: as many pictures as the question with the most has
        rows = [pixels.shape[1]] * len(pixels)
    elif pixels.ndim == 5 and "image_sizes" in data:
        rows = _by_question(_crops(data, n_images, config, pixels.shape[1]), n_images)
    elif _masks_tiles(data):
        rows = data["pixel_attention_mask"].sum(1).tolist()
    elif pixels.ndim == 5 and "pixel_attention_mask" in data:
        rows = _pictures(data).sum(1).tolist()
    elif pixels.ndim == 4 and _is_one_row(data, config):
        patch = config.vision_config.patch_size
        rows = _by_question((data["image_sizes"] // patch).prod(-1).tolist(), n_images)
    elif "image_num_crops" in data:  # Molmo 2
        rows = _by_question(data["image_num_crops"].tolist(), n_images)
    elif pixels.ndim == 4 or "image_position_ids" in data or "pixel_attention_mask" in data:
        rows = _by_tiles(len(pixels), n_images, alone, tiles)
    if rows is None or len(rows) != len(n_images) or (real is not None and len(real) != sum(rows)):
        return None
    return tuple(rows), real


def local_rows(data: Inputs, n_images: Sequence[int]) -> tuple[int, ...] | None:
    """How many crops of each question's pictures a vision tower sees, after all whole pictures; None if it sees none.

    Args:
        data: the model's inputs: DeepSeek-OCR 2, Unlimited-OCR and Step 3.7 have crops in a tensor of their own.
        n_images: how many pictures each question has.
    """
    counts, crops = data.get("num_local_patches"), data.get("pixel_values_local")
    rows = None if counts is None or crops is None else _by_question(list(map(int, counts)), n_images)
    return None if rows is None or crops is None or sum(rows) != len(crops) else tuple(rows)


def video_rows(
    data: Inputs, n_frames: Sequence[Sequence[int]], config: Any
) -> tuple[tuple[int, ...], Bool[Tensor, "row patch"] | None] | None:
    """How many rows of the vision tower belong to each question's videos, which it sees after all pictures.

    Args:
        data: the model's inputs.
        n_frames: for each question the number of frames of each of its videos.
        config: the model's configuration.

    Returns:
        The numbers, and which patches of each row are real where some are padding; or None where they cannot be told.
    """
    per_video, pixels, real = [n for row in n_frames for n in row], data.get("pixel_values_videos"), None
    rows: Sequence[int] | None = None
    if isinstance(grids := data.get("video_grid_thw"), Tensor):  # one long row of patches: Qwen-VL, GLM-4V
        rows = grids.prod(-1).tolist()
    elif isinstance(pixels, Tensor) and pixels.ndim == 5:  # LLaVA-OneVision: [video, frame, …], all of one length
        rows = [pixels.shape[1]] * len(pixels) if set(per_video) == {pixels.shape[1]} else None
    elif pixels is None and isinstance(pixels := data.get("pixel_values"), Tensor):  # frames are shown as pictures
        try:
            real = real_patches(data, config)
        except UnknownPadding:
            return None
        n_pictures = pixels.shape[0] if pixels.ndim == 4 else int(_pictures(data).sum()) if pixels.ndim == 5 else 0
        rows = per_video if n_pictures == sum(per_video) else None
    of_questions = _by_question(rows, list(map(len, n_frames)))
    if of_questions is None or (real is not None and len(real) != sum(of_questions)):
        return None
    return tuple(of_questions), real


def real_patches(data: Inputs, config: Any) -> Bool[Tensor, "row patch"] | None:
    """Which patches of each row of the vision tower belong to a picture and are not padding; None where all do.

    Args:
        data: the model's inputs.
        config: the model's configuration.

    Raises:
        UnknownPadding: the inputs say that something is padding in a way that is not known here.
    """
    data = {name: value for name, value in data.items() if value is not None}
    pixels, real = data.get("pixel_values"), None
    if not isinstance(pixels, Tensor):
        return None
    if "image_position_ids" in data:  # Gemma 4: pictures padded to as many patches, padding at (-1, -1)
        real = ~(data["image_position_ids"] == -1).all(-1)
    elif "aspect_ratio_mask" in data:
        real = _of_mllama(data, config)
    elif _masks_tiles(data):
        if getattr(config, "model_type", "") not in _DROPS_TILES:
            raise UnknownPadding("a mask of tiles")
    elif "pixel_attention_mask" in data and pixels.ndim == 5:
        real = _covered(data["pixel_attention_mask"].flatten(0, 1), config)[_pictures(data).flatten()]
    elif "pixel_attention_mask" in data and data["pixel_attention_mask"].shape == pixels.shape[:2]:
        real = data["pixel_attention_mask"].bool()  # NaFlex, as in LFM2-VL: tiles padded to as many patches
    elif "pixel_mask" in data and pixels.ndim == 4:
        real = _covered(data["pixel_mask"], config)
    else:
        masks = [name for name in data if "mask" in name and OF_PICTURES.search(name) and name not in _OF_TEXT]
        ids = data.get("input_ids")  # Idefics: which of its pictures each token sees
        unknown = [name for name in masks if ids is None or data[name].shape[:2] != ids.shape or data[name].ndim != 3]
        if pixels.ndim == 4 and "image_sizes" in data and not _is_one_row(data, config):
            unknown.append("image_sizes")
        if unknown:
            raise UnknownPadding(", ".join(unknown))
    return None if real is None or real.all() else real


def _has_more_than_pixels(data: Inputs) -> bool:
    """Whether a processor gives more of pictures than their pixels: then that says how many rows they are."""
    return any(
        OF_PICTURES.search(name) for name in data if not name.startswith("pixel_values") and "attention" not in name
    )


def _masks_tiles(data: Inputs) -> bool:
    """Whether a mask tells tiles ``[question, tile]`` apart, and not pixels."""
    mask, pixels = data.get("pixel_attention_mask"), data["pixel_values"]
    return mask is not None and pixels.ndim == 5 and mask.shape == pixels.shape[:2]


def _by_question(per_image: Sequence[int] | None, n_images: Sequence[int]) -> list[int] | None:
    if per_image is None or len(per_image) != sum(n_images):
        return None
    remaining = iter(per_image)
    return [int(sum(itertools.islice(remaining, n))) for n in n_images]


def _vision(config: Any, name: str) -> Any:
    """A setting of the vision tower; None where there is none."""
    return getattr(getattr(config, "vision_config", None), name, None)


def _crops(data: Inputs, n_images: Sequence[int], config: Any, most: int) -> list[int] | None:
    """LLaVA-NeXT and LLaVA-OneVision: crops are padded to the batch's largest number; the model drops the padding."""
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    if pinpoints is None:
        return None
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    whole = [False] * len(data["image_sizes"])
    if "batch_num_images" in data:  # LLaVA-OneVision makes no crops of a question's several pictures
        whole = [n > 1 for n in n_images for _ in range(n)]
        if data["batch_num_images"].tolist() != list(n_images):
            return None
    side = config.vision_config.image_size
    crops = [
        1 if is_whole else image_size_to_num_patches(size, grid_pinpoints=pinpoints, patch_size=side)
        for size, is_whole in zip(data["image_sizes"], whole, strict=True)
    ]
    return crops if max(crops) == most else None


def _is_one_row(data: Mapping[str, object], config: Any) -> bool:
    """Whether all pictures are one long row of patches, without the padding around them: Pixtral's tower."""
    return "image_sizes" in data and _vision(config, "model_type") == "pixtral"


def _pictures(data: Inputs) -> Bool[Tensor, "question picture"]:
    """Idefics2, Idefics3 and SmolVLM: which pictures are real. Those of zeros are padding, which the model drops."""
    pictures = (data["pixel_values"] != 0).flatten(2).any(-1)
    if not pictures.any():
        raise UnknownPadding("all pictures are zeros")
    return pictures


def _covered(mask: Tensor, config: Any) -> Bool[Tensor, "row patch"]:
    """Which patches are real, from masks of pixels ``[row, height, width]``."""
    rule = _MASKED_PATCH.get(getattr(config, "model_type", ""))
    size = _vision(config, "patch_size")
    if rule is None or not isinstance(size, int) or mask.ndim != 3:
        raise UnknownPadding("a mask of pixels")
    covered = mask.long().unfold(1, size, size).unfold(2, size, size).sum((-1, -2))
    return rule(covered, size * size).flatten(1)


def _of_mllama(data: Inputs, config: Any) -> Bool[Tensor, "row patch"]:
    """Mllama: each picture of each question is a row of tiles, each filled up to a multiple of eight patches.

    A tile that a picture does not have is masked; a picture that a question does not have is of no aspect ratio.
    """
    tiles, vision = data["aspect_ratio_mask"], config.vision_config
    if tiles.ndim != 3 or "aspect_ratio_ids" not in data:
        raise UnknownPadding("aspect_ratio_mask")
    tiles = tiles.bool() & (data["aspect_ratio_ids"] != 0)[..., None]
    n_patches = (vision.image_size // vision.patch_size) ** 2 + 1  # and the class token
    real = torch.zeros((*tiles.shape, -(-n_patches // 8) * 8), dtype=torch.bool, device=tiles.device)
    real[..., :n_patches] = tiles[..., None]
    return real.flatten(0, 1).flatten(1)


def _by_tiles(
    n_rows: int,
    n_images: Sequence[int],
    alone: Callable[[int], Inputs],
    tiles: Callable[[], Sequence[int] | None],
) -> list[int] | None:
    """One row a tile; how many tiles a picture makes follows from its size."""
    if len(n_images) == 1:
        return [n_rows]
    if n_rows == sum(n_images):
        return list(n_images)
    n_tiles = tiles()
    if n_tiles is not None and sum(n_tiles) == n_rows:
        return _by_question(n_tiles, n_images)
    rows = [len(alone(number)["pixel_values"]) if n else 0 for number, n in enumerate(n_images)]
    return rows if sum(rows) == n_rows else None
