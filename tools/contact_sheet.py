"""Every figure at the widths of a paper, with many groups and names in several scripts: looked at, and measured.

    python tools/contact_sheet.py out/figures

writes each figure as a PDF, a sheet of them all for each script (PNG), and what is wrong with any: a label that is
cut off, that lies on another, that has no font, or that is smaller than 6 pt in the PDF; and fonts of Type 3.
"""

import argparse
import re
import shutil
import subprocess
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image, ImageDraw

import vlmneurons as vn
from vlmneurons.study.masks import Mask
from vlmneurons.study.result import KnockoutResult

WIDTHS = (3.3, 6.75)

NAMES = {
    "Latin": "Argentina, Brazil, Bulgaria, Chile, China, Colombia, Côte d’Ivoire, Ecuador, Egypt, Ethiopia, France, "
    "India, Indonesia, Ireland, Japan, Kenya, Malaysia, Mexico, Mongolia, Nigeria, Norway, Pakistan, Papua New Guinea, "
    "Romania, Saint Vincent and the Grenadines",
    "Arabic": "مصر, السعودية, المغرب, الجزائر, تونس, ليبيا, السودان, العراق, سوريا, لبنان, الأردن, فلسطين, اليمن, "
    "عمان, الإمارات العربية المتحدة, قطر, البحرين, الكويت, موريتانيا, الصومال, جيبوتي, جزر القمر, إيران, "
    "باكستان, أفغانستان",
    "Devanagari": "भारत, नेपाल, महाराष्ट्र, राजस्थान, बिहार, उत्तर प्रदेश, मध्य प्रदेश, गुजरात, हरियाणा, उत्तराखंड, झारखंड, "
    "छत्तीसगढ़, हिमाचल प्रदेश, दिल्ली, गोवा, सिक्किम, काठमांडू, पंजाब, कश्मीर, असम, त्रिपुरा, केरल, कर्नाटक, तेलंगाना, ओडिशा",
    "CJK": "日本, 中国, 대한민국, 台灣, 香港, 北海道, 東京, 大阪, 京都, 沖縄, 四川省, 廣東省, 云南省, 福建省, 山东省, "
    "新疆维吾尔自治区, 서울특별시, 부산광역시, 제주특별자치도, 경상북도, ひろしま, カナガワ, 新潟, 長崎, 名古屋",
}
"""25 names of groups in each script."""


def a_result(groups: list[str], layers: int = 28) -> KnockoutResult:
    """Made-up answers of as many groups: own masks harm, others hardly."""
    generator = np.random.default_rng(0)
    each = 20
    of = tuple(group for group in groups for _ in range(each))
    masks, rows = [], [generator.random(len(of)) < 0.8]
    for selector, repeats, harm in (("CAS", 1, 0.45), ("MAD", 1, 0.25), ("random", 3, 0.02)):
        for repeat in range(repeats):
            for group in groups:
                lie = generator.multinomial(24, generator.dirichlet(np.ones(layers)))
                masks.append(Mask(selector, repeat, group, 24, "zero", tuple(map(int, lie))))
                lost = generator.random(len(of)) < np.where(np.array(of) == group, harm, 0.02)
                rows.append((rows[0] & ~lost) | (~rows[0] & (generator.random(len(of)) < 0.03)))
    chosen = np.where(np.array(rows), 0, generator.integers(1, 4, (len(rows), len(of))))
    about = {"layers": [f"language {n}" for n in range(layers)]}
    ids = tuple(f"q{n}" for n in range(len(of)))
    return KnockoutResult(ids, of, np.zeros(len(of), dtype=int), tuple(masks), chosen, chosen.astype(float), about)


def a_summary(names: list[str], column: str) -> pd.DataFrame:
    """Made-up effects with intervals."""
    generator = np.random.default_rng(1)
    table = pd.DataFrame({column: names})
    for effect, mean in (("self_effect", -0.4), ("cross_effect", -0.02), ("gap", -0.38), ("control_effect", 0.0)):
        value = mean + 0.1 * generator.standard_normal(len(names))
        table[effect], table[f"{effect}_low"], table[f"{effect}_high"] = value, value - 0.08, value + 0.08
    return table


def a_curve(groups: list[str]) -> pd.DataFrame:
    """Made-up effects along shares of neurons."""
    parts = []
    for setting in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05):
        part = a_summary(["all", *groups], "group").assign(r=setting)
        part[[name for name in part if "effect" in name]] *= setting**0.3
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def a_null(groups: list[str]) -> pd.DataFrame:
    """Made-up strengths against shuffled labels; nothing is selected for the last group."""
    generator = np.random.default_rng(3)
    null = 0.1 + 0.02 * generator.random(len(groups))
    strength = np.where(np.arange(len(groups)) == len(groups) - 1, -np.inf, null + 0.2 * generator.random(len(groups)))
    p = np.where(strength > null + 0.05, 0.01, 0.4)
    return pd.DataFrame(
        {"group": groups, "strength": strength, "null_mean": null, "null_high": null + 0.03, "p_holm": p}
    )


def overlaps(groups: list[str], level: float = 0.6) -> pd.DataFrame:
    """Made-up overlaps of sets from other questions, and those of all groups together."""
    generator = np.random.default_rng(4)
    own = level * (0.7 + 0.6 * generator.random(len(groups) + 1))
    table = pd.DataFrame({"group": [*groups, "all"], "jaccard": own, "between_groups": 0.3 * own, "chance": 0.01})
    return table.assign(jaccard_low=0.8 * own, jaccard_high=np.minimum(1, 1.1 * own))


def figures(groups: list[str], width: float | None = None) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Every figure of the library by its name, as a function that draws it."""
    result = a_result(groups)
    space = vn.NeuronSpace.from_widths("language", "gate", [200] * 80)
    generator = np.random.default_rng(2)
    chosen = {one: vn.NeuronSet(space, np.sort(generator.choice(16000, 160, replace=False))) for one in groups}
    ways = ("as asked", "blind", "options only")
    accuracy = {way: dict(zip(groups, generator.random(len(groups)), strict=True)) for way in ways}
    how = {"width": width}
    yield "matrix", lambda: vn.plot_matrix(result, "CAS", **how)
    yield "matrices", lambda: vn.plot_matrix(result, order="clustered", **how)
    yield "margin", lambda: vn.plot_matrix(result, ["CAS", "MAD"], value="margin", **how)
    yield "layers", lambda: vn.plot_layers(vn.Selection(chosen, selector="CAS"), **how)
    yield "effects", lambda: vn.plot_effects(a_summary(groups, "group"), "group", title="CAS", **how)
    yield "curve", lambda: vn.plot_curve(a_curve(groups), "r", **how)
    yield "flips", lambda: vn.plot_flips(result, **how)
    yield "depth", lambda: vn.plot_depth(result, **how)
    profiles = pd.concat(
        pd.DataFrame(
            {
                "selector": "CAS",
                "model": name,
                "tower": "language",
                "depth": (np.arange(number) + 0.5) / number,
                "density": 2 * generator.random(number),
            }
        )
        for name, number in zip(groups[:5], (28, 32, 40, 64, 80), strict=True)
    )
    yield "profiles", lambda: vn.plot_profiles(profiles, **how)
    yield "random", lambda: vn.plot_random(result, "CAS", ["random"], **how)
    yield "accuracy", lambda: vn.plot_accuracy(accuracy, chance=0.25, **how)
    alike = vn.Selection(
        {one: vn.NeuronSet(space, np.sort(generator.choice(400, 160, replace=False))) for one in groups}, selector="MAD"
    )
    yield "overlap", lambda: vn.plot_overlap(alike, **how)
    yield "overlaps", lambda: vn.plot_overlap({"MAD": alike, "LAP": alike}, value="shared", order="clustered", **how)
    yield "null", lambda: vn.plot_null(a_null(groups), **how)
    yield "stability", lambda: vn.plot_stability(overlaps(groups), **how)
    sizes = pd.concat([overlaps(groups, size / (size + 40)).assign(size=size) for size in (5, 10, 20, 40, 80, 100)])
    yield "sizes", lambda: vn.plot_stability(sizes, **how)
    of_all = a_summary(groups, "selector").assign(group="all")
    yield "selectors", lambda: vn.plot_selectors(of_all, **how)
    values = {one: generator.gamma(1 + n % 3, 1, 60) for n, one in enumerate(groups)}
    yield "values", lambda: vn.plot_values(values, **how)


# -- measuring ---------------------------------------------------------------------------------------------------------


def drawn_texts(figure: Figure) -> list[tuple[Text, Bbox]]:
    """The texts that are drawn, in points from the lower left corner; ticks out of view are not among them."""
    seen: dict[Text, None] = {}
    draw = Text.draw

    def watched(self: Text, renderer: object, *further: object, **named: object) -> None:
        if self.get_visible() and self.get_text().strip():
            seen[self] = None
        draw(self, renderer, *further, **named)

    with patch.object(Text, "draw", watched):
        figure.draw_without_rendering()
    scale = 72 / figure.dpi
    return [(text, Bbox(scale * text.get_window_extent().get_points())) for text in seen]


def faults(figure: Figure, pdf: Path) -> list[str]:
    """What is wrong with a figure's texts: cut off, on each other, or smaller than 6 pt; and fonts of Type 3."""
    texts = drawn_texts(figure)
    found = []
    across, down = 72 * figure.get_size_inches()
    for text, box in texts:
        if box.x0 < -0.5 or box.y0 < -0.5 or box.x1 > across + 0.5 or box.y1 > down + 0.5:
            found.append(f"{text.get_text()!r} is cut off: {box.extents.round(1).tolist()} in {across:g} x {down:.0f}")
    edges = np.array([box.extents for _, box in texts])
    shared = np.minimum(edges[:, None, 2:], edges[None, :, 2:]) - np.maximum(edges[:, None, :2], edges[None, :, :2])
    for one, other in np.argwhere(np.triu((shared > 0.25).all(-1), 1)):
        # A line's box has room above and below its letters: two may touch where no ink does.
        if shared[one, other].min() > 2 or (ink(figure, texts[one][0]) & ink(figure, texts[other][0])).any():
            found.append(f"{texts[one][0].get_text()!r} lies on {texts[other][0].get_text()!r} by {shared[one, other]}")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        figure.savefig(pdf)
    found += [f"warned: {one.message}" for one in told]
    small = [size for size in pdf_sizes(pdf) if size < 5.99]
    if small:
        found.append(f"text of {min(small):g} pt in the PDF")
    return found + [f"a font of {kind}" for kind in pdf_fonts(pdf) if kind not in ("CID TrueType", "TrueType", "Type0")]


def ink(figure: Figure, text: Text) -> np.ndarray:
    """Where in a picture of the figure a text alone leaves colour."""
    renderer = RendererAgg(*(figure.get_size_inches() * figure.dpi), figure.dpi)
    text.draw(renderer)
    return np.asarray(renderer.buffer_rgba())[..., 3] > 127


def pdf_sizes(pdf: Path) -> list[float]:
    """Every size of text that a PDF's pages and forms set, in points."""
    sizes: list[float] = []
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf.read_bytes(), re.DOTALL):
        try:
            text = zlib.decompress(stream)
        except zlib.error:
            continue
        sizes += [float(size) for size in re.findall(rb"/[\w.+-]+ ([\d.]+) Tf", text)]
    return sizes


def pdf_fonts(pdf: Path) -> list[str]:
    """The kinds of a PDF's fonts, by ``pdffonts`` (poppler-utils) where that is installed.

    Type 3 is refused by journals. A font with PostScript's outlines is embedded by matplotlib as if it were TrueType
    (``CID Type 0C``): MuPDF and Ghostscript draw none of its letters.
    """
    if shutil.which("pdffonts") is None:
        return [kind.decode() for kind in re.findall(rb"/Subtype */(Type3|Type0|TrueType|Type1)\b", pdf.read_bytes())]
    lines = subprocess.run(["pdffonts", pdf], capture_output=True, text=True, check=True).stdout.splitlines()
    start, end = lines[0].index("type"), lines[0].index("encoding")
    return [line[start:end].strip() for line in lines[2:]]


def sheet(pictures: list[tuple[str, Image.Image]], columns: int) -> Image.Image:
    """Pictures in rows, with their names."""
    wide, rows = max(picture.width for _, picture in pictures) + 20, []
    for start in range(0, len(pictures), columns):
        rows.append(pictures[start : start + columns])
    heights = [max(picture.height for _, picture in row) + 34 for row in rows]
    whole = Image.new("RGB", (columns * wide, sum(heights)), "#e8e8e8")
    for row, top in zip(rows, np.cumsum([0, *heights]).tolist(), strict=False):
        for column, (name, picture) in enumerate(row):
            ImageDraw.Draw(whole).text((column * wide + 10, top + 4), name, fill="black")
            whole.paste(picture, (column * wide + 10, top + 20))
    return whole


def measured(
    drawings: Iterable[tuple[str, Callable[[], Figure]]], folder: Path, start: str
) -> tuple[dict[str, object], list[tuple[str, Image.Image]]]:
    """Figures drawn, written and measured: a row of what was found, and their pictures with names."""
    wrong, sizes, kinds, pictures = 0, [], set(), []
    for name, draw in drawings:
        label, pdf = f"{start}-{name}", folder / f"{start}-{name}.pdf"
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            figure = draw()
        found = [f"warned: {one.message}" for one in told] + faults(figure, pdf)
        for line in found[:4]:
            print(f"{label}: {line}")
        figure.savefig(folder / f"{label}.png", dpi=110)
        pictures.append((label, Image.open(folder / f"{label}.png").convert("RGB")))
        wrong, sizes, kinds = wrong + bool(found), sizes + pdf_sizes(pdf), kinds | {*pdf_fonts(pdf)}
    row = {"figures": len(pictures), "texts": len(sizes), "smallest pt": min(sizes), "fonts": ", ".join(sorted(kinds))}
    return {**row, "wrong": wrong}, pictures


def main() -> int:
    """Draw, measure and say; the exit status is 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scripts", nargs="*", default=list(NAMES), choices=list(NAMES))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for script in given.scripts:
        for width in WIDTHS:
            pictures = []
            for count in (8, 25):
                groups = NAMES[script].split(", ")[-count:]
                row, drawn = measured(figures(groups, width), given.folder, f"{script}-{width}-{count}")
                rows.append({"script": script, "inches": width, "groups": count, **row})
                pictures += drawn
            sheet(pictures, 5 if width < 5 else 3).save(given.folder / f"sheet-{script}-{width}.png")
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    print(f"{table['figures'].sum()} figures, {table['wrong'].sum()} with a fault")
    return int(table["wrong"].sum() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
