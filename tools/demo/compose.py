"""Puts a cut-out picture on a background, turned, moved and recoloured: the 64 x 64 pictures that the model sees.

The same function makes the training pictures and the shipped question pictures. They differ in the sprite (whole
drawing styles are held out) and in the random numbers.
"""

import csv
import io
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from tools.demo import DATA

SPRITES = Path(__file__).parent / "sprites.zip"
"""The cut-out pictures, a WebP each, named by the rows of ``pictures.csv``."""
SPRITE = 96
IMAGE = 64
"""Side of a picture in pixels."""


class Sprites:
    """The cut-out pictures, decoded, with their table.

    Attributes:
        rows: the rows of ``pictures.csv``.
        colour: premultiplied red, green, blue and alpha, from 0 to 1; centred in a transparent square.
    """

    rows: list[dict[str, str]]
    colour: Float[Tensor, "picture 4 96 96"]

    def __init__(self) -> None:
        with (DATA / "pictures" / "pictures.csv").open(encoding="utf-8", newline="") as file:
            self.rows = list(csv.DictReader(file))
        pixels = np.zeros((len(self.rows), SPRITE, SPRITE, 4), np.uint8)
        with zipfile.ZipFile(SPRITES) as archive:
            for index, row in enumerate(self.rows):
                picture = np.asarray(Image.open(io.BytesIO(archive.read(row["id"] + ".webp"))).convert("RGBA"))
                height, width = picture.shape[:2]
                top, left = (SPRITE - height) // 2, (SPRITE - width) // 2
                pixels[index, top : top + height, left : left + width] = picture
        colour = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        # Premultiplied, so that resampling does not drag the colour of transparent pixels into the edge.
        self.colour = torch.cat([colour[:, :3] * colour[:, 3:], colour[:, 3:]], dim=1)

    def of(self, split: str) -> dict[str, list[int]]:
        """For every item name, the row numbers of its pictures of one split."""
        found: dict[str, list[int]] = {}
        for index, row in enumerate(self.rows):
            if row["split"] == split:
                found.setdefault(row["item"], []).append(index)
        return found


def compose(
    sprites: Sprites, indices: Sequence[int], generator: torch.Generator, strength: float = 1.0
) -> UInt8[Tensor, "picture 3 64 64"]:
    """Random pictures of the given sprites.

    Args:
        sprites: the cut-out pictures.
        indices: which of them, one per picture.
        generator: source of all randomness; it is advanced.
        strength: 1 for training; less makes the changes of geometry and colour smaller.
    """
    count = len(indices)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    rows = [sprites.rows[index] for index in indices]
    photo = torch.tensor([row["style"].startswith("photo") for row in rows])
    mirrored = torch.tensor([row["category"] not in ("flag", "map") for row in rows])
    angle = uniform(-0.3, 0.3) * strength
    zoom = torch.where(photo, uniform(0.9, 1.4), uniform(0.68, 0.98))  # a photograph fills the frame
    stretch = torch.exp(uniform(-0.12, 0.12) * strength)
    flip = torch.where(mirrored & (uniform(0, 1) < 0.5), -1.0, 1.0)
    shift_x, shift_y = (uniform(-0.11, 0.11) for _ in range(2))
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    # affine_grid maps a place in the result to the place in the sprite that it shows.
    matrix = torch.stack(
        [
            torch.stack([cos * stretch * flip, -sin * flip, -shift_x / zoom], dim=1),
            torch.stack([sin, cos / stretch, -shift_y / zoom], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(matrix, [count, 4, IMAGE, IMAGE], align_corners=False)
    layer = F.grid_sample(sprites.colour[list(indices)], grid, align_corners=False)

    # A soft gradient between two light colours, so that the background tells nothing.
    corner_a, corner_b = uniform(0.4, 1, 3, 1, 1), uniform(0.4, 1, 3, 1, 1)
    direction = uniform(0, 2 * math.pi, 1, 1, 1)
    axis = torch.linspace(-1, 1, IMAGE)
    ramp = axis[None, None, :, None] * torch.sin(direction) + axis[None, None, None, :] * torch.cos(direction)
    background = corner_a + (corner_b - corner_a) * (ramp + 1.5) / 3
    picture = layer[:, :3] + background * (1 - layer[:, 3:])

    # Recolouring: drawing styles differ in their colours most of all.
    grey = picture.mean(dim=1, keepdim=True)
    saturation = torch.where(uniform(0, 1, 1, 1, 1) < 0.1 * strength, 0.0, 1 + uniform(-0.4, 0.4, 1, 1, 1) * strength)
    picture = grey + (picture - grey) * saturation
    strong = (uniform(0, 1) < 0.3 * strength) & ~torch.tensor([row["category"] == "flag" for row in rows])
    hue = torch.where(strong, uniform(-0.9, 0.9), uniform(-0.15, 0.15) * strength)
    picture = torch.einsum("bij,bjhw->bihw", _hue_rotation(hue), picture)
    tint = 1 + uniform(-0.15, 0.15, 3, 1, 1) * strength
    contrast = 1 + uniform(-0.25, 0.25, 1, 1, 1) * strength
    brightness = uniform(-0.1, 0.1, 1, 1, 1) * strength
    picture = ((picture - 0.5) * contrast + 0.5 + brightness) * tint
    noise = torch.randn(picture.shape, generator=generator) * 0.02 * strength
    picture = picture + noise
    # A grey patch over a small part: no single detail may decide.
    patch_x, patch_y, patch_side = uniform(-1, 1, 1, 1, 1), uniform(-1, 1, 1, 1, 1), uniform(0, 0.3, 1, 1, 1) * strength
    covered = ((axis[:, None] - patch_y).abs() < patch_side) & ((axis[None, :] - patch_x).abs() < patch_side)
    covered &= uniform(0, 1, 1, 1, 1) < 0.5 * strength
    picture = torch.where(covered, uniform(0, 1, 3, 1, 1), picture)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)


def restyled(sprites: Sprites, indices: Sequence[int], generator: torch.Generator) -> UInt8[Tensor, "picture 3 64 64"]:
    """What `compose` makes, as if another hand had drawn most of it; for training alone.

    What is held out are whole drawing styles, so shapes, outlines, shading and colours must not be learned too exactly:
    shapes are bent, a small random filter is mixed in (random convolutions: Xu et al. 2021, arXiv 2007.13003), the tone
    curve is changed, colours are cut to a few levels, and edges are blurred or sharpened. A third of the pictures stays
    as it is, and flags, whose colours are all they are, keep their hues.

    Args:
        sprites: the cut-out pictures.
        indices: which of them, one per picture.
        generator: source of all randomness; it is advanced.
    """
    count = len(indices)
    original = compose(sprites, indices, generator).float() / 255
    flag = torch.tensor([sprites.rows[index]["category"] == "flag" for index in indices])

    def chance(share: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator) < share

    # Bent: every place is moved by a smooth random field of up to a sixteenth of the side.
    amplitude = 0.12 * torch.rand(count, 1, 1, 1, generator=generator)
    moves = (torch.rand(count, 2, 4, 4, generator=generator) * 2 - 1) * amplitude
    moves = F.interpolate(moves, size=(IMAGE, IMAGE), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    axis = (torch.arange(IMAGE) + 0.5) / IMAGE * 2 - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    picture = F.grid_sample(original, grid + moves, padding_mode="reflection", align_corners=False)

    # Filtered: another random filter for each of about half of the pictures, with the contrast that they had.
    filtered = (chance(0.5).flatten() & ~flag).nonzero()[:, 0]
    side = (1, 3, 5)[int(torch.randint(3, (1,), generator=generator))]
    chosen = picture[filtered]
    filters = torch.randn(3 * len(filtered), 3, side, side, generator=generator)
    mixture = torch.rand(len(filtered), 1, 1, 1, generator=generator)
    if len(filtered):
        mean = chosen.mean(dim=(2, 3), keepdim=True)
        rows = (chosen - mean).reshape(1, -1, IMAGE, IMAGE)
        result = F.conv2d(rows, filters, padding=side // 2, groups=len(filtered)).view(chosen.shape)
        scale = chosen.std(dim=(1, 2, 3), keepdim=True) / (result.std(dim=(1, 2, 3), keepdim=True) + 1e-3)
        picture = picture.index_copy(0, filtered, torch.lerp(result * scale + mean, chosen, mixture))

    # Toned, cut to a few levels, blurred or sharpened.
    picture = picture.clamp(0, 1)
    exponent = torch.exp(1.4 * torch.rand(count, 1, 1, 1, generator=generator) - 0.7)
    picture = torch.where(chance(0.4), picture**exponent, picture)
    levels = torch.randint(3, 7, (count, 1, 1, 1), generator=generator)
    picture = torch.where(chance(0.2), (picture * levels).round() / levels, picture)
    blurred = F.avg_pool2d(F.pad(picture, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    focus = torch.rand(count, 1, 1, 1, generator=generator)
    picture = torch.where(focus < 0.15, blurred, torch.where(focus > 0.85, 2 * picture - blurred, picture))
    picture = torch.where(chance(1 / 3), original, picture)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)


def _hue_rotation(angle: Float[Tensor, " picture"]) -> Float[Tensor, "picture 3 3"]:
    """Matrices that turn colours around the grey axis by an angle in radians."""
    third, root = 1 / 3, math.sqrt(1 / 3)
    cos, sin = torch.cos(angle), torch.sin(angle)
    same, after, before = cos + third * (1 - cos), third * (1 - cos) - root * sin, third * (1 - cos) + root * sin
    rows = [same, after, before, before, same, after, after, before, same]
    return torch.stack(rows, dim=1).view(-1, 3, 3)


def normalise(pictures: UInt8[Tensor, "picture 3 64 64"]) -> Float[Tensor, "picture 3 64 64"]:
    """The values that the demo's image processor gives the vision tower: from -1 to 1."""
    return pictures.float().div(255).sub(0.5).div(0.5)
