"""Makes, writes and reads the shipped question set: pictures as files, questions as lines of JSON, in one archive.

The questions are made once and shipped, not drawn when they are loaded: everybody asks the same. They show only
held-out sprites, each in a few fixed compositions; ``image_id`` is the sprite, so that a split by image keeps all
questions about one drawing on one side.
"""

import io
import json
import random
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from PIL import Image

from tools.demo.catalogue import CULTURES, ITEMS
from tools.demo.compose import Sprites, compose
from tools.demo.facts import KINDS, WORDING, answer_to, options_for
from vlmneurons.demo import read_archive

PER_KIND = 6
"""Questions of each kind about each culture."""
VARIANTS = 2
"""Compositions of each held-out sprite."""
STRENGTH = 0.2
"""Of the changes of geometry and colour: the styles are new to the model, so the pictures are shown nearly as drawn."""


@dataclass(frozen=True)
class Record:
    """One question as it is stored.

    Attributes:
        id: unique.
        image: name of the picture in the archive.
        image_id: the sprite that the picture shows.
        question: the text.
        options: four answers.
        answer: index of the right one.
        group: the culture.
        metadata: ``kind`` of question, ``item`` shown, its ``category`` and drawing ``style``; ``pair``, which is
            ``"new"`` if training never asked this kind about this item; ``needs_image`` and ``needs_question``:
            whether several options are possible without it.
    """

    id: str
    image: str
    image_id: str
    question: str
    options: list[str]
    answer: int
    group: str
    metadata: dict[str, str | bool] = field(default_factory=dict)


def make_records(sprites: Sprites, held_out: frozenset[tuple[str, str]], seed: int) -> list[Record]:
    """The questions: for every culture `PER_KIND` of each kind, spread evenly over its held-out sprites."""
    generator = random.Random(seed)
    items = {item.name: item for item in ITEMS}
    records = []
    for culture in CULTURES:
        own = [row for row in sprites.rows if row["culture"] == culture and row["split"] == "held-out"]
        asked = dict.fromkeys((row["id"] for row in own), 0)
        for kind in KINDS:
            # The least asked sprites first, in random order among equals.
            chosen = sorted(own, key=lambda row: (asked[row["id"]], generator.random()))[:PER_KIND]
            for row in chosen:
                item = items[row["item"]]
                options, answer, needs_question = options_for(item, kind, generator)
                variant = asked[row["id"]] % VARIANTS
                asked[row["id"]] += 1
                pair = "new" if (item.name, kind) in held_out else "trained"
                records.append(
                    Record(
                        id=f"{row['id']}-{kind}",
                        image=f"{row['id']}-{variant}.webp",
                        image_id=row["id"],
                        question=generator.choice(WORDING[kind]),
                        options=options,
                        answer=answer,
                        group=culture,
                        metadata={
                            "kind": kind,
                            "item": item.name,
                            "category": item.category,
                            "style": row["style"],
                            "pair": pair,
                            "needs_image": True,
                            "needs_question": needs_question,
                        },
                    )
                )
                assert options[answer] == answer_to(item, kind)
    return records


def write(path: Path, records: list[Record], sprites: Sprites, seed: int) -> None:
    """Writes questions and their pictures into one zip archive; the same arguments give the same bytes."""
    names = sorted({record.image for record in records})
    row_of = {row["id"]: index for index, row in enumerate(sprites.rows)}
    indices = [row_of[name.rpartition("-")[0]] for name in names]
    pictures = compose(sprites, indices, torch.Generator().manual_seed(seed), strength=STRENGTH)
    stamp = (2026, 1, 1, 0, 0, 0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        lines = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
        info = zipfile.ZipInfo("questions.jsonl", stamp)
        info.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(info, lines)
        for name, picture in zip(names, pictures, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "WEBP", quality=90, method=6)
            archive.writestr(zipfile.ZipInfo(name, stamp), buffer.getvalue())


def read(path: Path) -> tuple[list[Record], dict[str, Image.Image]]:
    """The questions, and their pictures by name."""
    rows, pictures = read_archive(path)
    return [Record(**row) for row in rows], pictures
