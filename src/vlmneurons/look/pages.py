"""Pages of one file that load nothing: the templates of ``static/``, with the one style sheet inside them."""

import base64
from functools import cache
from pathlib import Path

import jinja2

STATIC = Path(__file__).parent / "static"


@cache
def _templates() -> jinja2.Environment:
    how = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    return jinja2.Environment(loader=jinja2.FileSystemLoader(STATIC), autoescape=True, **how)


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
