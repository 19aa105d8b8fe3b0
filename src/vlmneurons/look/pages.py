"""Pages of one file that load nothing: the templates of ``static/``, with the one style sheet inside them."""

import base64
import io
from functools import cache
from pathlib import Path

import jinja2
from PIL import Image

STATIC = Path(__file__).parent / "static"

_THUMB, _BYTES = 192, 2560
"""Pixels of a thumbnail's longer side, and its bytes, at most."""


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
    """A page as text; whatever is shown is escaped.

    Args:
        template: file in ``static/``.
        shown: what it names.
    """
    return _templates().get_template(template).render(shown)


def inside(data: bytes, kind: str) -> str:
    """A file as an address that holds it, so that a page has it inside.

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
