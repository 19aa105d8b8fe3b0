"""What every figure has in common: how it shows and saves itself, its fonts, its colours, and the order of names."""

import hashlib
import io
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager, rc_context, rcParams
from matplotlib.artist import Artist
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.text import Text

from vlmneurons.checks import as_names, as_number
from vlmneurons.errors import MismatchError
from vlmneurons.files.atomic import replacing

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#767676"

_HARM, _GAIN = [ORANGE, "#5E2900"], [BLUE, "#00324E"]

COLOURS: dict[str, LinearSegmentedColormap | str] = {
    "effect": LinearSegmentedColormap.from_list("effect", [*_HARM[::-1], "#FFFFFF", *_GAIN], N=257),
    "harm": LinearSegmentedColormap.from_list("harm", ["#FFFFFF", *_HARM]),
    "gain": LinearSegmentedColormap.from_list("gain", ["#FFFFFF", *_GAIN]),
    "neutral": "cividis",
}
"""Colour maps by what a value means: harm is orange and gain blue, wherever they are drawn; others are neither."""

NOT_DRAWN = "#CFCFCF"
"""Behind cells without a value; an effect of 0 is white."""


class PrintFigure(Figure):
    """A figure that shows itself as the last line of a notebook's cell, and keeps its letters as letters in a PDF."""

    boxes: str = ""
    """Letters that no font has, which a warning has named."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()

    def savefig(self, fname: Any, **options: Any) -> None:
        """Write the figure, with TrueType fonts in PDF and PostScript: journals refuse Type 3.

        Args:
            fname: the file; see `matplotlib.figure.Figure.savefig`.
            options: further arguments of matplotlib's.
        """
        with rc_context({"pdf.fonttype": 42, "ps.fonttype": 42}), warnings.catch_warnings():
            if self.boxes:  # said once, when the figure was made, with what to install
                which = "|".join(str(ord(letter)) for letter in self.boxes)
                more = "Matplotlib currently does not support"  # with every glyph of India's scripts before 3.11
                warnings.filterwarnings("ignore", rf"Glyph ({which}) |{more}", UserWarning)
            super().savefig(fname, **options)


# -- names -------------------------------------------------------------------------------------------------------------


def natural(name: object) -> tuple[tuple[int, int, str], ...]:
    """A key that sorts names as people do: G2 before G10.

    Args:
        name: of a group.
    """
    parts = re.findall(r"\d+|\D+", str(name))
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts)


def ordered(groups: Sequence[str], order: str | Sequence[str] | None, profiles: np.ndarray) -> list[str]:
    """Groups in the order in which they are drawn.

    Args:
        groups: their names.
        order: all of them in another order, ``"clustered"``, or None: naturally.
        profiles: ``[group, value]`` what groups are alike in, in any unit; average linkage of Euclidean distances puts
            alike groups beside each other.

    Raises:
        MismatchError: the order leaves out a group, or has one that is not there.
    """
    if order is None:
        return sorted(groups, key=natural)
    if isinstance(order, str):
        if order != "clustered":
            raise MismatchError(f"order {order!r} is not one: give all groups in their order, or 'clustered'")
        if len(groups) < 3:
            return sorted(groups, key=natural)
        from scipy.cluster.hierarchy import leaves_list, linkage

        tree = linkage(np.nan_to_num(profiles), method="average", optimal_ordering=True)
        return [groups[int(place)] for place in leaves_list(tree)]
    wanted = as_names("order", order, MismatchError)
    if sorted(wanted) != sorted(groups):
        wrong = [f"lacks {name}" for name in groups if name not in wanted]
        wrong += [f"has {name}, which is no group here" for name in wanted if name not in groups] or ["has one twice"]
        raise MismatchError(f"order has each group once; it {', '.join(wrong)}")
    return list(wanted)


def ems(text: str) -> float:
    """About how wide a text is, in units of its font size.

    Args:
        text: one line.
    """
    return sum(map(_em, text))


def _em(letter: str) -> float:
    kind = unicodedata.category(letter)
    if kind in ("Mn", "Me", "Cf") or unicodedata.combining(letter):
        return 0.0
    if kind == "Mc":  # a vowel sign beside its letter
        return 0.4
    return 1.0 if letter in "…MW@%" or unicodedata.east_asian_width(letter) in "WF" else 0.84 if letter == "−" else 0.62


def shortened(texts: Sequence[str], most: int) -> list[str]:
    """Texts of at most so many letters, or as many more as it takes to tell them apart.

    Args:
        texts: what is to be cut.
        most: number of letters.
    """
    for letters in range(max(most, 2), max(map(len, texts)) + 1):
        cut = [text if len(text) <= letters else _start(text, letters - 1).rstrip() + "…" for text in texts]
        if len(set(cut)) == len(set(texts)):
            return cut
    return list(texts)


def _start(text: str, letters: int) -> str:
    """The first letters of a text, with all the signs that stand on the last."""
    while letters < len(text) and unicodedata.category(text[letters])[0] == "M":
        letters += 1
    return text[:letters]


def tall(texts: Iterable[str]) -> bool:
    """Whether letters have signs above and below them, so that a line takes half as much again as its size.

    Args:
        texts: of one script or several.
    """
    return any(unicodedata.category(letter)[0] == "M" for text in texts for letter in text)


def as_width(width: float | None) -> float | None:
    """The width of a figure, checked.

    Args:
        width: in inches, or None: as large as it needs to be.

    Raises:
        MismatchError: no number, or too small for text of 6 pt.
    """
    if width is not None and as_number("width", width, MismatchError) < 2:
        raise MismatchError(f"width {width} is too narrow: it is in inches, at least 2; a column has about 3.3")
    return width


# -- fonts -------------------------------------------------------------------------------------------------------------

_NO_TEXT = ("Last Resort", "STIX", "DejaVu Math", "cm")
"""Beginnings of the names of fonts that are not for text: they draw boxes, or formulas."""


@cache
def _codes_of(path: str) -> frozenset[int]:
    try:
        return frozenset(font_manager.get_font(path).get_charmap())
    except (OSError, RuntimeError):  # a file of another kind, or one that has gone since matplotlib listed it
        return frozenset()


def with_fonts(artist: Artist) -> None:
    """Give every text of an artist fonts that have its letters; warn where none that is installed has them.

    Args:
        artist: a figure or axes whose texts are all there.
    """
    texts = [text for text in artist.findobj(Text) if isinstance(text, Text)]
    needed = {letter for text in texts for letter in text.get_text() if unicodedata.category(letter)[0] not in "CZ"}
    joined = {letter for letter in needed if _is_joined(letter)}
    if joined and tuple(map(int, matplotlib.__version__.split(".")[:2])) < (3, 11):
        warnings.warn(
            f"matplotlib {matplotlib.__version__} draws letters such as {sorted(joined)[0]} one by one, unjoined and "
            "from the left: names in this figure cannot be read. matplotlib 3.11 is the first that joins them",
            stacklevel=3,
        )
    families = [family for family in rcParams["font.family"] if isinstance(family, str)]
    for family in families:
        needed -= {chr(code) for code in _codes_of(font_manager.findfont(font_manager.FontProperties(family=[family])))}
    if not needed:
        return
    further, lacking = _fonts_for(needed)
    for text in texts if further else []:
        text.set_fontfamily([*families, *further])
    if lacking:
        letters = "".join(sorted(lacking))
        if isinstance(artist, PrintFigure):
            artist.boxes = letters
        shown = letters if len(letters) <= 20 else f"{letters[:20]}…"
        warnings.warn(
            f"no installed font has the letters {shown}, which names in this figure need: they are drawn as boxes. "
            f"Install {' and '.join(_suggested(lacking))} (fonts.google.com/noto), remove matplotlib's list of fonts "
            "(in matplotlib.get_cachedir()) and start Python again",
            stacklevel=3,
        )


def _is_joined(letter: str) -> bool:
    """Whether a letter's form depends on its neighbours: Arabic and its like, and scripts of India."""
    return unicodedata.bidirectional(letter) in ("R", "AL") or unicodedata.category(letter) == "Mc"


@cache
def _has_cubic_outlines(path: str) -> bool:
    """Whether a font is OpenType with PostScript's outlines."""
    with open(path, "rb") as file:
        kind = file.read(16)
        if kind[:4] == b"ttcf":  # a collection: what its first font is
            file.seek(int.from_bytes(kind[12:16], "big"))
            kind = file.read(4)
    return kind[:4] == b"OTTO"


@cache
def _truetype_copy(path: str, index: int, name: str, letters: str) -> str:
    """A copy of some letters of a font with TrueType's outlines, in matplotlib's cache; gives its family.

    matplotlib's PDFs say of every font that it is TrueType. Where it is not, MuPDF and Ghostscript draw none of its
    letters.
    """
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.cu2quPen import Cu2QuPen
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from fontTools.ttLib import TTFont

    digest = hashlib.sha256(f"{path} {index} {os.path.getmtime(path)} {letters}".encode()).hexdigest()[:12]
    family, file = f"{name} {digest}", Path(matplotlib.get_cachedir(), f"vlmneurons-{digest}.ttf")
    if not file.exists():
        with TTFont(path, fontNumber=index, lazy=True) as opened:
            font: Any = opened  # its tables have no types
            place, outlines, em, drawn = font.getBestCmap(), font.getGlyphSet(), font["head"].unitsPerEm, {}
            codes = {ord(letter): place[ord(letter)] for letter in letters}
            for glyph in (".notdef", *codes.values()):
                pen = TTGlyphPen(None)
                outlines[glyph].draw(Cu2QuPen(pen, em / 1000, reverse_direction=True))
                drawn[glyph] = pen.glyph()
            metrics, line = {glyph: font["hmtx"][glyph] for glyph in drawn}, font["hhea"]
        copy = FontBuilder(em, isTTF=True)
        copy.setupGlyphOrder([*drawn])
        copy.setupCharacterMap(codes)
        copy.setupGlyf(drawn)
        copy.setupHorizontalMetrics(metrics)
        copy.setupHorizontalHeader(ascent=line.ascent, descent=line.descent)
        copy.setupNameTable({"familyName": family, "styleName": "Regular", "psName": family.replace(" ", "")})
        copy.setupOS2()
        copy.setupPost()
        with replacing(file) as temporary:
            copy.save(temporary)
    font_manager.fontManager.addfont(file)
    return family


def _fonts_for(needed: Iterable[str]) -> tuple[list[str], set[str]]:
    """Installed fonts that have the letters, as few as will do, and the letters that none has."""
    lacking = set(needed)
    entries = {
        entry.name: entry
        for entry in font_manager.fontManager.ttflist
        if entry.style == "normal"
        and entry.weight in (400, "normal", "regular", "book")
        and not entry.name.startswith(_NO_TEXT)
        and os.path.exists(entry.fname)
    }
    offered = sorted(entries, key=lambda name: (not name.startswith("Noto Sans"), "Sans" not in name, name))
    offered.sort(key=lambda name: _has_cubic_outlines(entries[name].fname))
    chosen: list[str] = []
    while lacking and offered:
        best = max(offered, key=lambda name: sum(ord(letter) in _codes_of(entries[name].fname) for letter in lacking))
        path = entries[best].fname
        has = {letter for letter in lacking if ord(letter) in _codes_of(path)}
        if not has:
            break
        if _has_cubic_outlines(path):
            letters = "".join(sorted(has))
            if any(map(_is_joined, has)):  # a copy of letters would not know how they join
                warnings.warn(
                    f"{best} has PostScript outlines: MuPDF and Ghostscript draw no letter of {letters} in a PDF; "
                    f"install {' and '.join(_suggested(has))} in TrueType",
                    stacklevel=4,
                )
            else:
                chosen.append(_truetype_copy(path, getattr(entries[best], "index", 0), best, letters))
        chosen.append(best)
        offered.remove(best)
        lacking -= has
    return chosen, lacking


def _suggested(letters: Iterable[str]) -> list[str]:
    scripts = {unicodedata.name(letter, "SYMBOLS").split()[0] for letter in letters}
    east = {"CJK", "HIRAGANA", "KATAKANA", "HANGUL"}
    return sorted({f"Noto Sans {'CJK' if script in east else script.title()}" for script in scripts})
