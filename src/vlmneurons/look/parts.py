"""What pages of results are made of: figures and tables, each with its files, its title and its caption."""

import configparser
import hashlib
import io
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from vlmneurons.checks import Keywords
from vlmneurons.files.atomic import write_text
from vlmneurons.look.latex import is_text, latex
from vlmneurons.look.numbers import in_table
from vlmneurons.look.pages import STATIC, inside

UNITS = {
    "correct": ("points of accuracy", 100.0, 1),
    "margin": ("nats", 1.0, 2),
    "score": ("the score's unit", 1.0, 3),
}
"""How a value's effects are printed: their unit, what they are multiplied by, and how many decimals they have."""


@dataclass(frozen=True)
class Part:
    """One figure or table of a page, or examples, which have no files."""

    name: str
    title: str
    caption: str
    content: Figure | pd.DataFrame | list[Keywords]
    of: str = ""
    """The name, given by a user, that is part of this one's."""
    data: pd.DataFrame | None = None
    """What the CSV holds, if it is not what is printed."""
    under: str = ""
    """The figure whose section links to this one's files: it is not shown by itself."""
    numbers: pd.DataFrame | None = None
    """What a figure shows, as a table that a paper may print in its place."""
    colours: str = ""
    """What the caption says of a figure's colours, and not of its numbers."""

    @property
    def kind(self) -> str:
        if isinstance(self.content, list):
            return "examples"
        return "table" if isinstance(self.content, pd.DataFrame) else "figure"


@cache
def _captions() -> configparser.ConfigParser:
    captions = configparser.ConfigParser(interpolation=None)
    captions.read(STATIC / "captions.ini", encoding="utf-8")
    return captions


def explained(
    texts: str,
    content: Figure | pd.DataFrame | list[Keywords],
    *,
    name: str = "",
    of: str = "",
    also: str = "",
    data: pd.DataFrame | None = None,
    under: str = "",
    numbers: pd.DataFrame | None = None,
    **facts: object,
) -> Part:
    """A part with its title and its caption, which stand in ``static/captions.ini``.

    Args:
        texts: the section there.
        content: the figure, the table or the examples.
        name: of the part's files; by default that of the section, and of what the user named.
        of: see `Part`.
        also: a further sentence of the section, which is said at the end of the caption.
        data: see `Part`.
        under: see `Part`.
        numbers: see `Part`.
        facts: what stands in braces in the texts.
    """
    section = {key: " ".join(text.split()) for key, text in _captions()[texts].items()}
    title, caption = (section[key].format(**{**section, **facts, "of": of}) for key in ("title", "caption"))
    caption += f" {section[also]}" if also else ""
    name = name or (f"{texts}-{file_name(of)}" if of else texts)
    return Part(name, title, caption, content, of, data, under, numbers, section.get("colours", ""))


def file_name(name: str) -> str:
    """A name for files: ASCII letters without accents, digits and hyphens; a digest where that loses a letter.

    Args:
        name: any.
    """
    bare = "".join(letter for letter in unicodedata.normalize("NFKD", name) if not unicodedata.combining(letter))
    words = "".join(letter if letter.isascii() and letter.isalnum() else " " for letter in bare).split()
    slug = "-".join(words).lower()[:60] or "unnamed"
    lossy = slug == "unnamed" or len(slug) == 60 or any(letter.isalnum() and not letter.isascii() for letter in bare)
    return f"{slug}-{_digest(name)}" if lossy else slug


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:8]


def _with_different_names(parts: Sequence[Part], taken: Iterable[str]) -> list[Part]:
    """Parts of different names: one that a user's name gave, and another has too, ends with a digest of that name.

    The digest is of the name alone, so a file keeps its name when others come before it. Names in ``taken`` are those
    of further tables.
    """
    taken = [*taken, *(part.name for part in parts if part.numbers is not None)]
    number = Counter([*((part.kind, part.name) for part in parts), *(("table", name) for name in taken)])
    return [
        replace(part, name=f"{part.name}-{_digest(part.of)}") if part.of and number[part.kind, part.name] > 1 else part
        for part in parts
    ]


def write_parts(parts: Sequence[Part], further: Mapping[str, pd.DataFrame], folder: Path) -> list[Keywords]:
    """Write the files of all parts of a page, and give what the page shows of them.

    Args:
        parts: of a page; one that stands under another comes after it.
        further: tables for programs, by name, which lie beside the parts'.
        folder: of the page; gets ``figures/`` and ``tables/``.
    """
    for place in ("figures", "tables"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    for name, table in further.items():
        _write_table(folder, name, table)
    sections: dict[str, Keywords] = {}
    for part in _with_different_names(parts, further):
        section = _write_part(part, folder)
        if part.under:
            sections[f"figure-{part.under}"].setdefault("alone", {})[part.of] = section["files"]
        else:
            sections[section["id"]] = section
    return list(sections.values())


def _write_part(part: Part, folder: Path) -> Keywords:
    """Write a part's files, and give what the page shows of it."""
    caption = f"{part.caption} {part.colours}" if part.colours else part.caption
    section: Keywords = {"id": f"{part.kind}-{part.name}", "title": part.title, "caption": caption}
    if isinstance(part.content, list):
        return {**section, "files": {}, "examples": part.content}
    if isinstance(part.content, pd.DataFrame):
        table = part.content
        files = _write_printed(part, table, table if part.data is None else part.data, folder)
        text = [is_text(table[name]) for name in table.columns]
        rows = [[in_table(value) for value in row] for row in table.itertuples(index=False)]
        return {**section, "files": files, "columns": list(table.columns), "text": text, "rows": rows}
    files = {kind: f"figures/{part.name}.{kind.lower()}" for kind in ("PNG", "SVG", "PDF")}
    part.content.savefig(folder / files["PNG"], dpi=300, bbox_inches="tight")
    part.content.savefig(folder / files["PDF"], bbox_inches="tight", metadata={"CreationDate": None})
    buffer = io.BytesIO()
    part.content.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    (folder / files["SVG"]).write_bytes(buffer.getvalue())
    if part.numbers is not None:
        files |= _write_printed(part, part.numbers, part.numbers, folder, turned=True)
    return {**section, "files": files, "picture": inside(buffer.getvalue(), "image/svg+xml")}


def _write_printed(
    part: Part, table: pd.DataFrame, data: pd.DataFrame, folder: Path, turned: bool = False
) -> dict[str, str]:
    """Write a table of a part as CSV and LaTeX, and give its files by kind."""
    _write_table(folder, part.name, data)
    caption = f"{part.title}. {part.caption}" if part.caption else part.title
    write_text(folder / "tables" / f"{part.name}.tex", latex(table, caption, f"tab:{part.name}", turned))
    return {"CSV": f"tables/{part.name}.csv", "LaTeX": f"tables/{part.name}.tex"}


def _write_table(folder: Path, name: str, table: pd.DataFrame) -> None:
    write_text(folder / "tables" / f"{name}.csv", table.to_csv(index=False))
