"""Renders the shipped pictures from the packages that they come from; only maintainers run it.

    mkdir source && cd source
    for name in noto noto-v1 fluent-emoji fluent-emoji-flat fxemoji twemoji emojione streamline-emojis \
                flag circle-flags flagpack cif; do npm pack @iconify-json/$name; done
    npm pack world-atlas
    for file in *.tgz; do mkdir ${file%.tgz}; tar xzf $file -C ${file%.tgz}; done
    apt-get download gcompris-qt-data && dpkg-deb -x gcompris-qt-data_*.deb gcompris-qt-data
    pip download --no-deps scikit-learn && unzip scikit_learn-*.whl 'sklearn/datasets/images/*' -d scikit-learn
    cd .. && pip install resvg_py && python -m tools.demo.pictures --source source

It writes ``sprites.zip`` (a WebP per picture) beside this file, and into the package's own folder ``pictures.csv`` (one
row per picture: what, from where, by whom, under which licence) and ``NOTICE.md`` (the credits and notices that the
licences ask for; the text of the Apache licence lies beside it). A picture without a known, permitted licence
is an error, never a row with a blank.
"""

import argparse
import csv
import io
import json
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from PIL import Image, ImageDraw

from tools.demo import DATA
from tools.demo.catalogue import COUNTRY_CODES, CULTURES, HELD_OUT_STYLES, ITEMS, TRAINING_STYLES, Item
from tools.demo.compose import SPRITES

FOLDER = DATA / "pictures"
SIZE = 96
"""Longest side of a shipped picture, in pixels: half as much again as the model sees, so that it can be augmented."""

EMOJI_STYLES = (
    "noto",
    "noto-v1",
    "fluent-emoji",
    "fluent-emoji-flat",
    "fxemoji",
    "twemoji",
    "emojione",
    "streamline-emojis",
)
FLAG_STYLES = ("flag", "circle-flags", "flagpack", "cif")

LICENCES = {
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "MIT": "https://opensource.org/license/mit",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-2.0": "https://creativecommons.org/licenses/by/2.0/",
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "Public Domain": "https://creativecommons.org/public-domain/pdm/",
}
"""The licences that a shipped picture may have; all of them allow redistribution of changed copies."""

# The README of gcompris spells one file name otherwise than the file.
README_SPELLINGS = {"audaPalatina.webp": "aulaPalatina.webp"}

# A coloured drawing may carry the same name in two sets and show something else.
SKIP = {
    ("streamline-emojis", "bird-turkey"),
    ("streamline-emojis", "turkey"),  # the flag of Türkiye
    ("emojione", "snake"),  # a detail of a skin, unlike every other snake
}


MIT_TEXT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


@dataclass(frozen=True)
class Picture:
    """One row of ``pictures.csv``.

    Attributes:
        id: unique name, also of the file in ``sprites.zip``.
        item: name of the item shown.
        culture: its group.
        category: kind of thing.
        style: the drawing style, or which kind of photograph.
        split: ``"training"`` or ``"held-out"``.
        source: the package that it was taken from.
        version: version of that package.
        original: its name within the package.
        author: whom to credit.
        licence: SPDX name, or ``"Public Domain"``.
        licence_url: where the licence stands.
        source_url: where the work stands.
        changes: what was done to it, as the CC BY licences ask to say.
    """

    id: str
    item: str
    culture: str
    category: str
    style: str
    split: str
    source: str
    version: str
    original: str
    author: str
    licence: str
    licence_url: str
    source_url: str
    changes: str


class IconSet:
    """An unpacked ``@iconify-json`` package: named SVG drawings of one author under one licence."""

    def __init__(self, source: Path, prefix: str) -> None:
        folder = _package(source, f"@iconify-json/{prefix}")
        self.prefix = prefix
        self.version: str = json.loads((folder / "package.json").read_text(encoding="utf-8"))["version"]
        self.info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        self._data = json.loads((folder / "icons.json").read_text(encoding="utf-8"))

    def resolve(self, names: tuple[str, ...]) -> str | None:
        """The first of the names that the set draws, with aliases followed; None if it draws none of them."""
        for name in names:
            if (self.prefix, name) in SKIP:
                continue
            while name not in self._data["icons"] and name in self._data.get("aliases", {}):
                name = self._data["aliases"][name]["parent"]
            if name in self._data["icons"]:
                return name
        return None

    def render(self, name: str) -> Image.Image:
        """The drawing, cut to its visible part and scaled to `SIZE`."""
        import resvg_py  # only maintainers need it

        icon = self._data["icons"][name]
        width, height = (icon.get(side, self._data.get(side, 16)) for side in ("width", "height"))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
        )
        zoom = 4 * SIZE / max(width, height)
        rendered = resvg_py.svg_to_bytes(svg_string=svg, width=round(width * zoom), height=round(height * zoom))
        return _fit(Image.open(io.BytesIO(bytes(rendered))).convert("RGBA"))

    def row(self, item: Item, style: str, name: str) -> Picture:
        """The table's row for one of its drawings."""
        licence = self.info["license"]["spdx"]
        return _row(
            item,
            style,
            source=f"npm:@iconify-json/{self.prefix}",
            version=self.version,
            original=name,
            author=self.info["author"]["name"],
            licence=licence,
            source_url=self.info["author"]["url"],
            changes="rendered to pixels, cropped, scaled",
        )


def _package(source: Path, name: str) -> Path:
    """The folder of an unpacked npm package."""
    for path in sorted(source.glob("*/package/package.json")):
        if json.loads(path.read_text(encoding="utf-8"))["name"] == name:
            return path.parent
    raise FileNotFoundError(f"no unpacked npm package {name} in {source}; see the head of {__file__}")


def _row(item: Item, style: str, *, licence: str, **rest: str) -> Picture:
    if licence not in LICENCES:
        raise ValueError(f"{item.name}, {rest}: licence {licence!r} is none of {', '.join(LICENCES)}")
    name = re.sub(r"[^a-z0-9]+", "-", f"{item.culture} {item.name} {style}".lower()).strip("-")
    return Picture(
        id=name,
        item=item.name,
        culture=item.culture,
        category=item.category,
        style=style,
        split=_split(style),
        licence=licence,
        licence_url=LICENCES[licence],
        **rest,
    )


def _split(style: str) -> str:
    if style in TRAINING_STYLES:
        return "training"
    if style in HELD_OUT_STYLES:
        return "held-out"
    raise ValueError(f"style {style!r} is in neither split of the catalogue")


def _fit(image: Image.Image) -> Image.Image:
    """The visible part of an RGBA picture, scaled so that its longest side is `SIZE`."""
    box = image.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0).getbbox()
    image = image.crop(box)
    zoom = SIZE / max(image.size)
    return image.resize(
        (max(1, round(image.width * zoom)), max(1, round(image.height * zoom))), Image.Resampling.LANCZOS
    )


def resource_files(path: Path) -> dict[str, bytes]:
    """The files in a Qt resource collection (``.rcc``), by their path in it.

    The format: a header with the offsets of three tables; a tree whose nodes are 14 bytes (version 1) or 22 bytes;
    names as UTF-16; data with a length before it, compressed by zlib where the node's first flag is set.
    """
    raw = path.read_bytes()
    magic, version, tree, data, names = struct.unpack_from(">4s4I", raw)
    if magic != b"qres":
        raise ValueError(f"{path} is not a Qt resource file")
    node_size = 14 if version == 1 else 22
    found: dict[str, bytes] = {}

    def walk(node: int, parent: str) -> None:
        start = tree + node * node_size
        name_offset, flags = struct.unpack_from(">IH", raw, start)
        name = ""
        if node:
            length = struct.unpack_from(">H", raw, names + name_offset)[0]
            name_start = names + name_offset + 6  # after the length and a hash
            name = raw[name_start : name_start + 2 * length].decode("utf-16-be")
        if flags & 2:
            count, first = struct.unpack_from(">II", raw, start + 6)
            for child in range(first, first + count):
                walk(child, f"{parent}/{name}" if name else parent)
            return
        offset = data + struct.unpack_from(">I", raw, start + 10)[0]
        blob = raw[offset + 4 : offset + 4 + struct.unpack_from(">I", raw, offset)[0]]
        found[f"{parent}/{name}"] = zlib.decompress(blob[4:]) if flags & 1 else blob

    walk(0, "")
    return found


@dataclass(frozen=True)
class Photograph:
    """A photograph with its provenance."""

    image: Image.Image
    source: str
    version: str
    author: str
    licence: str
    source_url: str


def photographs(source: Path) -> dict[str, Photograph]:
    """The photographs of ``gcompris-qt-data`` that are in the public domain or CC0, and one of scikit-learn.

    Authors and licences are read from the README that lies beside the photographs.
    """
    found: dict[str, Photograph] = {}
    for activity in ("explore_monuments", "explore_world_music", "explore_world_animals", "categorization"):
        (path,) = source.glob(f"**/{activity}.rcc")
        files = resource_files(path)
        for readme in (name for name in files if name.endswith("README")):
            for block in files[readme].decode("utf-8").split("\n\n"):
                entry = dict(re.findall(r"^(Copyright|License|Source): *(.+)$", block, re.MULTILINE))
                if entry.get("License") not in ("Public Domain", "CC0-1.0") or "Source" not in entry:
                    continue
                for file in re.findall(r"^\s*(\S+\.webp)\s*$", block.partition("Files:")[2], re.MULTILINE):
                    file = README_SPELLINGS.get(Path(file).name, file)
                    match = [name for name in files if name.endswith("/" + file)]
                    if len(match) == 1:
                        found[f"{activity}/{Path(file).name}"] = Photograph(
                            Image.open(io.BytesIO(files[match[0]])).convert("RGB"),
                            "debian:gcompris-qt-data",
                            "3.1-2",
                            entry["Copyright"].strip(),
                            entry["License"],
                            entry["Source"].strip(),
                        )
    (path,) = source.glob("**/sklearn/datasets/images/china.jpg")
    found["scikit-learn/china.jpg"] = Photograph(
        Image.open(path).convert("RGB"),
        "pypi:scikit-learn",
        "1.9.1",
        "danielbuechele",
        "CC-BY-2.0",
        "https://www.flickr.com/photos/danielbuechele/6061409035/",
    )
    return found


def _square(image: Image.Image, zoom: float, shift_x: float, shift_y: float) -> Image.Image:
    """A square section: ``zoom`` of the shorter side, moved by fractions of the room that is left."""
    side = round(min(image.size) * zoom)
    left = round((image.width - side) * (0.5 + 0.5 * shift_x))
    top = round((image.height - side) * (0.5 + 0.5 * shift_y))
    return image.crop((left, top, left + side, top + side))


def outlines(source: Path, resolution: str) -> dict[str, list[list[tuple[float, float]]]]:
    """The outlines of all countries of Natural Earth: for each, its rings of longitude and latitude (degrees)."""
    topology = json.loads(
        (_package(source, "world-atlas") / f"countries-{resolution}.json").read_text(encoding="utf-8")
    )
    (scale_x, scale_y), (move_x, move_y) = topology["transform"]["scale"], topology["transform"]["translate"]
    arcs = []
    for deltas in topology["arcs"]:  # TopoJSON: each point is the step from the one before it
        x = y = 0
        arc = []
        for step_x, step_y in deltas:
            x, y = x + step_x, y + step_y
            arc.append((x * scale_x + move_x, y * scale_y + move_y))
        arcs.append(arc)

    def ring(indices: list[int]) -> list[tuple[float, float]]:
        points: list[tuple[float, float]] = []
        for index in indices:  # ~i is arc i walked backwards; neighbouring arcs share a point
            arc = arcs[index] if index >= 0 else arcs[~index][::-1]
            points += arc[1:] if points else arc
        return points

    countries = {}
    for shape in topology["objects"]["countries"]["geometries"]:
        polygons = shape["arcs"] if shape["type"] == "MultiPolygon" else [shape["arcs"]]
        countries[shape["properties"]["name"]] = [ring(polygon[0]) for polygon in polygons]
    return countries


def draw_outline(rings: list[list[tuple[float, float]]], colour: str) -> Image.Image:
    """The filled shape of a country's main land and the islands near it."""

    def area(ring: list[tuple[float, float]]) -> float:
        return abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(ring, ring[1:] + ring[:1]))) / 2

    main = max(rings, key=area)
    middle_x, middle_y = (sum(point[axis] for point in main) / len(main) for axis in (0, 1))
    near = [
        ring
        for ring in rings  # without overseas territories, which would shrink the main land to a dot
        if area(ring) > 0.004 * area(main)
        and abs(sum(x for x, _ in ring) / len(ring) - middle_x) < 32
        and abs(sum(y for _, y in ring) / len(ring) - middle_y) < 16
    ]
    squeeze = math.cos(math.radians(middle_y))  # a degree of longitude is shorter away from the equator
    plane = [[(x * squeeze, -y) for x, y in ring] for ring in near]
    left, top = (min(point[axis] for ring in plane for point in ring) for axis in (0, 1))
    right, bottom = (max(point[axis] for ring in plane for point in ring) for axis in (0, 1))
    zoom = 4 * SIZE / max(right - left, bottom - top)
    canvas = Image.new("RGBA", (4 * SIZE + 8, 4 * SIZE + 8))
    pen = ImageDraw.Draw(canvas)
    for ring in plane:
        pen.polygon([(4 + (x - left) * zoom, 4 + (y - top) * zoom) for x, y in ring], fill=colour)
    return _fit(canvas)


def render_all(source: Path) -> Iterator[tuple[Picture, Image.Image]]:
    """Every picture with its row, in the order of the catalogue."""
    sets = {style: IconSet(source, style) for style in EMOJI_STYLES + FLAG_STYLES}
    photos = photographs(source)
    maps = {resolution: outlines(source, resolution) for resolution in ("110m", "50m", "10m")}
    atlas_version = json.loads((_package(source, "world-atlas") / "package.json").read_text(encoding="utf-8"))[
        "version"
    ]
    for item in ITEMS:
        if item.category == "flag":
            names: dict[str, tuple[str, ...]] = dict.fromkeys(FLAG_STYLES, (COUNTRY_CODES[item.culture],))
            names["flag"] = (COUNTRY_CODES[item.culture] + "-4x3",)
            country = {"USA": "united-states"}.get(item.culture, item.culture.lower())
            names["twemoji"] = (f"flag-for-{country}", f"flag-{country}", f"flag-for-flag-{country}")
            for style, candidates in names.items():
                name = sets[style].resolve(candidates)
                if name is None:
                    raise ValueError(f"no flag of {item.culture} in {style}")
                yield (
                    sets[style].row(item, "twemoji-flag" if style == "twemoji" else style, name),
                    sets[style].render(name),
                )
        if item.category == "map":
            country = {"USA": "United States of America"}.get(item.culture, item.culture)
            for resolution, colour in (("110m", "#2a7fba"), ("50m", "#2f8f4e"), ("10m", "#a8483c")):
                row = _row(
                    item,
                    f"outline-{resolution}",
                    source="npm:world-atlas",
                    version=atlas_version,
                    original=f"countries-{resolution}.json: {country}",
                    author="Natural Earth (naturalearthdata.com)",
                    licence="Public Domain",
                    source_url="https://www.naturalearthdata.com/about/terms-of-use/",
                    changes="drawn to pixels, far territories left out",
                )
                yield row, draw_outline(maps[resolution][country], colour)
        for style in EMOJI_STYLES:
            name = sets[style].resolve(item.emoji)
            if name is not None:
                yield sets[style].row(item, style, name), sets[style].render(name)
        sections = []
        if item.photos:
            first = photos[item.photos[0]].image
            sections.append(("photo", item.photos[0], _square(first, 1.0, 0.0, 0.0)))
            sections.append(("photo-section", item.photos[0], _square(first, 0.85, 0.3, -0.2)))
            if len(item.photos) > 1:
                sections.append(("photo-second", item.photos[1], _square(photos[item.photos[1]].image, 1.0, 0.0, 0.0)))
        for style, original, image in sections:
            photo = photos[original]
            row = _row(
                item,
                style,
                source=photo.source,
                version=photo.version,
                original=original,
                author=photo.author,
                licence=photo.licence,
                source_url=photo.source_url,
                changes="cropped, scaled",
            )
            yield row, _fit(image.convert("RGBA"))


def write(source: Path, folder: Path, sprites: Path) -> list[Picture]:
    """Renders everything and writes their table and the licence texts into a folder, and the pictures into a file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with zipfile.ZipFile(sprites, "w", zipfile.ZIP_STORED) as archive:
        for row, image in render_all(source):
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=90, method=6)
            # A fixed date, so that the same pictures make the same file.
            archive.writestr(zipfile.ZipInfo(f"{row.id}.webp", (2026, 1, 1, 0, 0, 0)), buffer.getvalue())
            rows.append(row)
    if len({row.id for row in rows}) != len(rows):
        raise ValueError("two pictures have one id")
    with (folder / "pictures.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Picture)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    (folder / "NOTICE.md").write_text(notice(rows), encoding="utf-8")
    return rows


def notice(rows: list[Picture]) -> str:
    """Whom to credit for the pictures, and the terms that ask to be passed on."""
    works: dict[str, dict[tuple[str, str, str], int]] = {}
    for row in rows:
        found = works.setdefault(row.licence, {})
        # A package of drawings is one work; every photograph is a work of its own.
        work = f"{row.source} {row.version}" + (f", {row.original}" if row.style.startswith("photo") else "")
        key = (row.author, row.source_url, work)
        found[key] = found.get(key, 0) + 1
    lines = [
        "# Credits for the pictures of the vlmneurons demo",
        "",
        "All pictures were changed: rendered to pixels, cropped, scaled; in `questions.zip` also turned, recoloured",
        "and put on a background. `pictures.csv` has a row for every single picture. No author endorses this use.",
        "",
    ]
    for licence in sorted(works):
        lines += [f"## {licence}", "", LICENCES[licence], ""]
        lines += [
            f"- {author}: {work}, {url} ({count} pictures)" for (author, url, work), count in works[licence].items()
        ]
        lines.append("")
        if licence == "Apache-2.0":
            lines += ["The text of the licence is in `LICENSE-Apache-2.0.txt`.", ""]
        if licence == "MIT":
            lines += [f"Copyright (c) {author}" for author in sorted({author for author, _, _ in works[licence]})]
            lines += ["", MIT_TEXT]
    return "\n".join(lines).rstrip() + "\n"


def contact_sheet(folder: Path, sprites: Path, culture: str, size: int = 64) -> Image.Image:
    """All pictures of a culture, one row per item, to look at before shipping them."""
    with (folder / "pictures.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["culture"] == culture]
    items = list(dict.fromkeys(row["item"] for row in rows))
    styles = TRAINING_STYLES + HELD_OUT_STYLES
    sheet = Image.new("RGB", (110 + size * len(styles), size * len(items)), "white")
    pen = ImageDraw.Draw(sheet)
    with zipfile.ZipFile(sprites) as archive:
        for index, item in enumerate(items):
            pen.text((2, index * size + size // 2), item, fill="black")
            for row in (row for row in rows if row["item"] == item):
                picture = Image.open(io.BytesIO(archive.read(row["id"] + ".webp"))).convert("RGBA")
                picture.thumbnail((size - 2, size - 2))
                sheet.paste(picture, (110 + size * styles.index(row["style"]), index * size), picture)
    return sheet


def main() -> None:
    """Command line: see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--source", type=Path, required=True, help="folder with the unpacked packages")
    parser.add_argument("--out", type=Path, help="folder to write; by default every file goes to its place")
    parser.add_argument("--sheets", type=Path, help="also write a contact sheet per culture into this folder")
    arguments = parser.parse_args()
    folder, sprites = (arguments.out, arguments.out / "sprites.zip") if arguments.out else (FOLDER, SPRITES)
    rows = write(arguments.source, folder, sprites)
    for culture in CULTURES:
        own = [row for row in rows if row.culture == culture]
        held_out = sum(row.split == "held-out" for row in own)
        print(f"{culture:8} {len({row.item for row in own}):3} items {len(own):4} pictures {held_out:3} held out")
        if arguments.sheets:
            arguments.sheets.mkdir(parents=True, exist_ok=True)
            contact_sheet(folder, sprites, culture).save(arguments.sheets / f"{culture}.png")
    print(f"{len(rows)} pictures, {sprites.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
