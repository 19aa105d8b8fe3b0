"""Pictures: where they come from, what identifies them, and how they are opened: when needed, not before."""

import base64
import binascii
import hashlib
import io
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

PictureSource = Image.Image | str | Path | bytes | Callable[[], object]
"""A picture: in memory, a file, an encoded file's bytes, or a function that yields one of these when it is needed."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".ppm")
"""Ends of the names of files that hold pictures."""

_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP", b"\xff\x0a")
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+={0,2}\s*")


def is_function(source: object) -> bool:
    """Whether a source is a function that has to be called for its picture."""
    return callable(source) and not isinstance(source, Image.Image)


@dataclass(frozen=True)
class DatasetPicture:
    """One picture of a dataset, read when it is called.

    Attributes:
        dataset: a dataset in Arrow's format, or with a transform.
        row: the number of its row.
        column: the name of its column.
        place: its place in the row's list, where the column holds lists.
    """

    dataset: Any
    row: int
    column: str
    place: int | None = None

    def __call__(self) -> object:
        row = self.dataset[self.row]
        if not hasattr(row, "column"):  # a transform's
            return row[self.column] if self.place is None else row[self.column][self.place]
        cell = row.column(self.column)[0]  # Arrow's: nothing is decoded, and of a list nothing else is read
        return (cell if self.place is None else cell[self.place]).as_py()


@dataclass(frozen=True)
class Base64Picture:
    """A picture as base64 text, as tables and web pages hold it; decoded when it is called."""

    text: str

    def __call__(self) -> bytes:
        try:
            return _from_base64(self.text)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"the picture is no base64 text: {error}") from error


def _from_base64(text: str) -> bytes:
    """The bytes of a base64 text, with or without the head of a data URL and line ends, in either alphabet."""
    letters = "".join((text.partition(",")[2] if text.startswith("data:") else text).split())
    return base64.b64decode(letters.replace("-", "+").replace("_", "/"), validate=True)


def has_signature(data: bytes) -> bool:
    """Whether bytes begin as the files of pictures do."""
    brand = data[4:12]
    return data.startswith(_SIGNATURES) or data[8:12] == b"WEBP" or brand in (b"ftypavif", b"ftypheic", b"ftypmif1")


def is_base64_picture(text: str) -> bool:
    """Whether a text is a picture in base64, or a data URL of one."""
    if text.startswith("data:image/"):
        return True
    if len(text) < 64 or _BASE64.fullmatch(text) is None:
        return False
    try:
        return has_signature(_from_base64(text[:64]))
    except (binascii.Error, ValueError):
        return False


def is_url(text: str) -> bool:
    """Whether a text is the address of something elsewhere."""
    return text.startswith(("http://", "https://", "s3://", "gs://", "hf://"))


def unpacked(source: Any) -> Any:
    """A picture, sound or video, its path or its bytes: functions are called, and ``{"bytes", "path"}`` is opened.

    So `datasets` hands out a file that it is told not to decode.
    """
    while is_function(source):
        source = source()
    if isinstance(source, Mapping) and set(source) & {"bytes", "path"} and "array" not in source:
        return source["bytes"] if source.get("bytes") is not None else source["path"]
    return source


def resolved(source: object) -> Image.Image | bytes | str | Path:
    """A picture, its path or its bytes; see `unpacked`.

    Raises:
        TypeError: the source is something else.
    """
    source = unpacked(source)
    if not isinstance(source, Image.Image | bytes | str | Path):
        raise TypeError(f"a picture is a PIL image, a path, bytes or a function; got {type(source).__name__}")
    return source


def picture_key(source: object) -> str:
    """A digest of a picture's path, or of its content where it has none; an encoded file is not decoded for it."""
    return key_of(resolved(source), _content)


def key_of(source: Any, content: Callable[[Any], bytes]) -> str:
    """A digest of a path, of a file's bytes, or of the content of anything else."""
    if isinstance(source, str | Path):
        data = str(Path(source)).encode()
    else:
        data = source if isinstance(source, bytes) else content(source)
    return hashlib.sha256(data).hexdigest()[:16]


def _content(image: Image.Image) -> bytes:
    """A picture's values, and what makes equal values look different: palette, transparency, and the EXIF rotation."""
    image.load()
    palette = image.getpalette("RGBA" if image.palette and image.palette.mode == "RGBA" else "RGB")
    marks = {"palette": palette, "transparency": image.info.get("transparency"), "turn": image.getexif().get(0x0112)}
    shown_marks = "".join(f"{name} {value!r}" for name, value in marks.items() if value is not None)
    return f"{image.mode} {image.size}".encode() + image.tobytes() + shown_marks.encode()


@cache
def _formats() -> tuple[str, ...]:
    """The formats in which pictures are opened: all but PostScript, which Pillow lets another program run."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def encoded(source: bytes | str | Path) -> io.BytesIO | str:
    """Bytes or a path as decoders open them. A pipe is refused: a decoder would wait for it without end."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if Path(source).exists() and not Path(source).is_file():
        raise OSError(f"{source} is no ordinary file")
    return str(source)


def picture_size(source: object) -> tuple[int, int]:
    """Height and width of a picture, from its first bytes where it is a file."""
    source = resolved(source)
    if isinstance(source, Image.Image):
        return source.height, source.width
    with Image.open(encoded(source), formats=_formats()) as image:
        return image.height, image.width


def open_picture(source: object) -> Image.Image:
    """A picture as RGB, upright (EXIF rotation applied), transparency on white, the first frame of several."""
    source = resolved(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if isinstance(source, Image.Image):
            source.load()
            image = source
        else:
            # Closed at once: Pillow would keep the file of an animation open for its later frames.
            with Image.open(encoded(source), formats=_formats()) as image:
                image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and np.asarray(image).max(initial=0) > 255):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))  # Pillow would cut at 255
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image)
    return image.convert("RGB") if image.mode != "RGB" else image
