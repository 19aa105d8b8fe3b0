"""Pages of one file that load nothing else: templates in ``static/``, with the style sheet inside them."""

import base64
import io
from functools import cache
from pathlib import Path

import jinja2
from PIL import Image

STATIC = Path(__file__).parent / "static"

_THUMB, _BYTES = 192, 2560
"""The most pixels of a thumbnail's longer side, and the most bytes of its file."""


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(STATIC),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def page_from(template: str, **shown: object) -> str:
    """A page as text; every value is escaped.

    Args:
        template: the name of a file in ``static/``.
        shown: the values that it shows, by the names it has for them.
    """
    return _templates().get_template(template).render(shown)


def inside(data: bytes, kind: str) -> str:
    """A file as a ``data:`` address, so that a page can hold it.

    Args:
        data: the file.
        kind: its media type, such as ``"image/png"``.
    """
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def thumbnail(picture: Image.Image) -> bytes:
    """A picture as WebP of at most 2.5 kB: 10,000 of them, with all else, stay below 80 MB.

    Args:
        picture: of any size and mode.
    """
    for size in (_THUMB, 128, 96, 64, 32):
        small = picture.convert("RGB")
        small.thumbnail((size, size), Image.Resampling.LANCZOS)
        for quality in (60, 35, 15):
            file = io.BytesIO()
            small.save(file, "WEBP", quality=quality, method=4)
            if file.tell() <= _BYTES:
                return file.getvalue()
    return file.getvalue()
