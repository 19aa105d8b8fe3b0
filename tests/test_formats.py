"""Files that 0.1.0 wrote open, with the numbers they were made of, and are written the same way.

``tests/formats/0.1.0`` holds one of each kind. They are never made anew: a change after which they do not open, or
after which the same content gives other bytes, is a new version of the format, whose number goes up and whose files
get a folder of their own here. ``python tests/test_formats.py FOLDER`` writes such a folder.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open

import vlmneurons as vn
from vlmneurons.errors import FileFormatError
from vlmneurons.statistics.items import Item
from vlmneurons.study.masks import Mask

FILES = Path(__file__).parent / "formats" / "0.1.0"
ABOUT = {"model": "a model", "revision": "0", "tokens": "content", "versions": {"vlmneurons": "0.1.0"}}
SPACE = vn.NeuronSpace.from_widths("language", "gate", [3, 4])
GROUPS = ("Japan", "Perú", "日本")
POSITIVE = torch.arange(21).reshape(3, 7)
TOTAL = POSITIVE.double() / 4 - 1
SETS = {"Japan": [0, 6], "Perú": [], "日本": [1, 2, 5]}
MARGINS = np.array([[0.5, -1.25, 2.0], [0.25, np.nan, -0.75]])


def objects(folder: Path) -> dict[str, object]:
    """One of each kind that is kept in a file, made of the numbers above; the folder is for a recording."""
    statistics = vn.ActivationStatistics(
        SPACE, GROUPS, POSITIVE, torch.tensor([20, 21, 22]), torch.tensor([3, 4, 5]), total=TOTAL, provenance=ABOUT
    )
    attributions = vn.AttributionStatistics(
        SPACE, GROUPS, TOTAL, torch.ones(3, 7, dtype=torch.int64), torch.tensor([3, 4, 5]), ABOUT
    )
    selection = vn.Selection(
        {group: vn.NeuronSet(SPACE, torch.tensor(numbers, dtype=torch.int64)) for group, numbers in SETS.items()},
        selector="CAS(0.3)",
        budget=3,
        provenance=ABOUT,
    )
    items = vn.ItemStatistics.create(
        folder / "items",
        SPACE,
        [Item(f"q{n}", GROUPS[n], n, {"topic": f"ünïcode {n}"}, (f"picture {n // 2}",)) for n in range(3)],
        ABOUT,
        ("positive", "total"),
    )
    items.write([0, 2], [0, 1], [9, 21], [0.5, -2.0], {"positive": POSITIVE[[0, 2]], "total": TOTAL[[0, 2]]})
    result = vn.KnockoutResult(
        ("q0", "q1", "q2"),
        GROUPS,
        np.array([0, 1, 2]),
        (Mask("CAS", 0, "Japan", 2, layers=(1, 1)),),
        np.array([[0, 3, 2], [0, -2, 1]]),
        MARGINS,
        ABOUT,
        pictures=("a", "b", "b"),
        asked=np.array([[True, True, True], [True, False, True]]),
    )
    return {
        "statistics.safetensors": statistics,
        "attributions.safetensors": attributions,
        "selection.safetensors": selection,
        "neurons.safetensors": selection["日本"],
        "items": items,
        "knockout": result,
    }


def write(folder: Path) -> None:
    """Write one of each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, thing in objects(folder).items():
        if name != "items":
            thing.save(folder / name)


def test_tables_of_groups_open_with_their_numbers():
    statistics = vn.ActivationStatistics.load(FILES / "statistics.safetensors")
    assert (statistics.space, statistics.groups, statistics.provenance) == (SPACE, GROUPS, ABOUT)
    assert torch.equal(statistics.positive, POSITIVE)
    assert torch.equal(statistics.total, TOTAL)
    assert statistics.tokens.tolist() == [20, 21, 22]
    assert statistics.items.tolist() == [3, 4, 5]
    attributions = vn.AttributionStatistics.load(FILES / "attributions.safetensors")
    assert torch.equal(attributions.mean, TOTAL / torch.tensor([[3.0], [4.0], [5.0]], dtype=torch.float64))
    assert torch.equal(attributions.strong, torch.ones(3, 7, dtype=torch.int64))


def test_sets_of_neurons_open_with_their_numbers():
    selection = vn.Selection.load(FILES / "selection.safetensors")
    assert {group: neurons.indices.tolist() for group, neurons in selection.items()} == SETS
    assert (selection.selector, selection.budget, selection.space) == ("CAS(0.3)", 3, SPACE)
    assert vn.NeuronSet.load(FILES / "neurons.safetensors").to_pairs() == [(0, 1), (0, 2), (1, 2)]


def test_a_recording_by_question_opens_with_its_numbers(tmp_path):
    shutil.copytree(FILES / "items", tmp_path / "items")  # nothing may be written beside the committed files
    items = vn.ItemStatistics.load(tmp_path / "items", verify=True)
    assert items.done.tolist() == [True, False, True]
    assert [(one.id, one.group, one.answer) for one in items.items] == [(f"q{n}", GROUPS[n], n) for n in range(3)]
    assert items.items[1].metadata == {"topic": "ünïcode 1"}
    assert items.items[2].pictures == ("picture 1",)
    assert items.tokens[[0, 2]].tolist() == [9, 21]
    assert items.margins[[0, 2]].tolist() == [0.5, -2.0]
    statistics = items.grouped(condition="all").statistics
    assert statistics.positive.tolist() == [POSITIVE[0].tolist(), [0] * 7, POSITIVE[2].tolist()]
    assert statistics.total[[0, 2]].tolist() == TOTAL[[0, 2]].tolist()


def test_a_result_opens_with_its_numbers():
    result = vn.KnockoutResult.load(FILES / "knockout")
    assert (result.ids, result.groups, result.pictures) == (("q0", "q1", "q2"), GROUPS, ("a", "b", "b"))
    assert result.masks == (Mask("CAS", 0, "Japan", 2, layers=(1, 1)),)
    assert result.chosen.tolist() == [[0, 3, 2], [0, -2, 1]]
    np.testing.assert_array_equal(result.margins, MARGINS)
    assert result.asked.tolist() == [[True, True, True], [True, False, True]]
    assert (result.texts, result.scores) == (None, None)


@pytest.mark.parametrize("name", sorted(path.name for path in FILES.glob("*.safetensors")))
def test_another_program_reads_the_tensors(name):
    with safe_open(FILES / name, framework="np") as file:
        told, found = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert (told["format"], told["version"]) == ("vlmneurons", "1")
    assert json.loads(told["data"])["space"] == SPACE.to_json()
    wanted = {
        "statistics.safetensors": {"positive": POSITIVE, "total": TOTAL},
        "attributions.safetensors": {"total": TOTAL},
        "selection.safetensors": {"sizes": torch.tensor([2, 0, 3]), "indices": torch.tensor([0, 6, 1, 2, 5])},
        "neurons.safetensors": {"indices": torch.tensor([1, 2, 5])},
    }[name]
    for key, values in wanted.items():
        np.testing.assert_array_equal(found[key], values.numpy())


def test_another_program_reads_the_recording_and_the_answers():
    widths = SPACE.to_json()
    manifest = json.loads((FILES / "items" / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["kind"], manifest["version"], manifest["space"]) == ("vlmneurons items", 2, widths)
    record = np.dtype([("done", "u1"), ("chosen", "<i4"), ("tokens", "<i8"), ("margin", "<f8"), ("checksum", "<u4")])
    rows = np.fromfile(FILES / "items" / "items.bin", dtype=record)
    assert rows[["done", "chosen", "tokens", "margin"]].tolist() == [(1, 0, 9, 0.5), (0, 0, 0, 0.0), (1, 1, 21, -2.0)]
    counts = np.fromfile(FILES / "items" / "positive.bin", dtype="<u2").reshape(3, 7)
    assert counts[[0, 2]].tolist() == POSITIVE[[0, 2]].tolist()
    answers = pd.read_parquet(FILES / "knockout" / "answers.parquet")
    assert answers["run"].tolist() == [0, 0, 0, 1, 1]
    assert answers["id"].tolist() == ["q0", "q1", "q2", "q0", "q2"]
    assert answers["chosen"].tolist() == [0, 3, 2, 0, 1]


def test_the_same_content_gives_the_same_bytes(tmp_path):
    write(tmp_path)
    kept, made = (
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
        for folder in (FILES, tmp_path)
    )
    assert kept == made
    # Parquet names the program that wrote it, the index of a result has the digest of its Parquet, and `load` does not
    # read the tables beside it.
    others = {path for path in kept if path.parent.name == "knockout"}
    for path in sorted(kept - others):
        assert (tmp_path / path).read_bytes() == (FILES / path).read_bytes(), path
    old, new = (json.loads((folder / "knockout" / "knockout.json").read_text()) for folder in (FILES, tmp_path))
    assert {key for key in old | new if old.get(key) != new.get(key)} <= {"answers", "sha256"}


def test_a_file_of_a_later_version_is_refused_with_its_number(tmp_path):
    shutil.copytree(FILES / "knockout", tmp_path / "k")
    index = tmp_path / "k" / "knockout.json"
    index.write_text(index.read_text(encoding="utf-8").replace('"version": 4', '"version": 5'), encoding="utf-8")
    with pytest.raises(FileFormatError, match="version 5"):
        vn.KnockoutResult.load(tmp_path / "k")
    shutil.copytree(FILES / "items", tmp_path / "i")
    index = tmp_path / "i" / "manifest.json"
    index.write_text(index.read_text(encoding="utf-8").replace('"version": 2', '"version": 3'), encoding="utf-8")
    with pytest.raises(FileFormatError, match="version 3 is not one that this release reads"):
        vn.ItemStatistics.load(tmp_path / "i")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
