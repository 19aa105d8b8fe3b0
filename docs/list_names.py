"""Fill in the front page of the API when the site is built: every name with the first line of its docstring.

MkDocs calls `on_page_markdown` (``hooks`` in ``mkdocs.yml``). What has an entry (``:::``) on a page of ``docs/api`` is
listed under that page's title, in the order of the navigation, so nothing is written twice.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

FRONT = "api/index.md"
PACKAGE = "vlmneurons"
_PLACE = re.compile(r"^\*Here the site has every public name .*\*$", re.MULTILINE)
_ENTRY = re.compile(r"^::: ([\w.]+)", re.MULTILINE)
_TITLE = re.compile(r"^# (.+)$", re.MULTILINE)

Thing = griffe.Object | griffe.Alias


def shown(package: Thing, path: str) -> Iterator[tuple[str, Thing]]:
    """The path of what an entry shows, and itself: one thing, or all that is public in a module."""
    thing = package[path.removeprefix(f"{PACKAGE}.")]
    if thing.is_module:
        public = (member for member in thing.members.values() if member.is_public and not member.is_module)
        yield from ((f"{path}.{member.name}", member) for member in public)
    else:
        yield path, thing


def table(package: Thing, page: str, text: str) -> str:
    """The names that a page of the API has entries for, each linked, under the page's title."""
    title = _TITLE.findall(text)[0]
    lines = [f"## [{title}]({page})", "", "| name | what it is |", "|---|---|"]
    for entry in _ENTRY.findall(text):
        for path, thing in shown(package, entry):
            first = (thing.docstring.value if thing.docstring else "").strip().partition("\n")[0].replace("|", "\\|")
            lines.append(f"| [`{path.removeprefix(f'{PACKAGE}.')}`]({page}#{path}) | {first} |")
    return "\n".join(lines)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """A page's text, the front page's with its tables. MkDocs calls it for each page."""
    if page.file.src_uri != FRONT:
        return markdown
    package = griffe.load(PACKAGE, search_paths=["src"], resolve_aliases=True)  # read, not imported
    names = re.findall(r"'api/(\w+\.md)'", str(config.nav))
    folder = Path(config.docs_dir, "api")
    tables = [table(package, name, (folder / name).read_text(encoding="utf-8")) for name in names if name != "index.md"]
    return _PLACE.sub(lambda _: "\n\n".join(tables), markdown)
