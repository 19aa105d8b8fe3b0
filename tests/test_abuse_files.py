"""Whatever a file holds, loading it gives the object or a clear error: no code runs, nothing hangs, memory is bounded.

`docs/abuse.md` has the table of these cases.
"""

import contextlib
import errno
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import vlmneurons as vn
from abuse import damaged, largest_file, limits
from vlmneurons.errors import FileFormatError, VLMNeuronsError
from vlmneurons.files import atomic
from vlmneurons.files import tables as _files
from vlmneurons.statistics.items import Item
from vlmneurons.study.masks import Mask

pytestmark = pytest.mark.usefixtures("unchecked")  # the library's own checks are tried, not the tests' type checker

SPACE = vn.NeuronSpace.from_widths("language", "gate", [12, 12])
QUICK = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
N_DAMAGED = 150


def neurons(*indices: int) -> vn.NeuronSet:
    return vn.NeuronSet(SPACE, indices)


def selection() -> vn.Selection:
    return vn.Selection(
        {"EGY": neurons(1, 5, 20), "SGP": neurons(2)}, selector="by hand", budget=3, provenance={"model": "m"}
    )


def statistics() -> vn.ActivationStatistics:
    positive = np.arange(48).reshape(2, 24) % 7
    return vn.ActivationStatistics.from_counts(SPACE, groups=["EGY", "SGP"], positive=positive, tokens=[7, 9])


FILES = {"NeuronSet": lambda: neurons(1, 5), "Selection": selection, "ActivationStatistics": statistics}


def item_statistics(folder: Path) -> Path:
    items = [Item(f"q{n}", "AB"[n % 2], n % 4, {"category": "food"}) for n in range(4)]
    made = vn.ItemStatistics.create(
        folder, SPACE, items, {"model": "m"}, ["positive"], dict.fromkeys((i.id for i in items), "")
    )
    counts = np.arange(96).reshape(4, 24) % 5
    made.write(range(4), [0, 1, 2, 0], [6] * 4, [0.5] * 4, {"positive": counts})
    return folder


def knockout_result(folder: Path) -> Path:
    """A saved result, small and made by hand."""
    result = vn.KnockoutResult(
        ids=("a", "b", "c", "d"),
        groups=("A", "A", "B", "B"),
        answers=np.array([0, 1, 2, 3]),
        masks=(Mask("CAS", 0, "A", 3), Mask("CAS", 0, "B", 3)),
        chosen=np.array([[0, 1, 2, 3], [1, 1, 2, 3], [0, 1, 2, -1]]),
        margins=np.full((3, 4), 0.5),
        provenance={"model": "m"},
    )
    result.save(folder)
    return folder


FOLDERS = {"ItemStatistics": item_statistics, "KnockoutResult": knockout_result}


def lape(path: Path) -> vn.Selection:
    return vn.Selection.from_lape(path, SPACE, ["A"])


def look_at(thing: object) -> None:
    """Use what was loaded: a wrong table must raise one of the library's errors here at the latest."""
    repr(thing)
    with contextlib.suppress(VLMNeuronsError):
        if isinstance(thing, vn.ItemStatistics):
            thing.verify()
            thing.group_by("group", condition="all")
        elif isinstance(thing, vn.KnockoutResult):
            thing.table()


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_is_refused_or_unharmed(kind, tmp_path):
    thing, path = FILES[kind](), tmp_path / "file"
    thing.save(path)
    whole = path.read_bytes()
    refused = 0
    with limits():
        for data in damaged(whole, N_DAMAGED):
            path.write_bytes(data)
            try:
                loaded = type(thing).load(path)
            except FileFormatError:
                refused += 1
            else:
                assert loaded == thing  # such as white space of the header
    assert refused > N_DAMAGED * 0.9


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_with_a_damaged_file_is_refused_or_still_makes_sense(kind, tmp_path):
    folder = FOLDERS[kind](tmp_path / "good")
    loader = getattr(vn, kind).load
    whole = loader(folder)
    look_at(whole)
    files = sorted(path.name for path in folder.iterdir() if path.suffix != ".csv" and path.name != ".lock")
    assert len(files) >= 2
    with limits(60):
        for seed, name in enumerate(files):
            for data in damaged((folder / name).read_bytes(), N_DAMAGED // 3, seed):
                shutil.rmtree(tmp_path / "bad", ignore_errors=True)
                shutil.copytree(folder, tmp_path / "bad")
                (tmp_path / "bad" / name).write_bytes(data)
                with contextlib.suppress(FileFormatError):
                    loaded = loader(tmp_path / "bad")
                    look_at(loaded)
                    if kind == "KnockoutResult":  # such as other white space; nothing of the answers
                        assert loaded.answer_table().equals(whole.answer_table())
                        assert loaded.masks == whole.masks
            shutil.rmtree(tmp_path / "bad", ignore_errors=True)
            shutil.copytree(folder, tmp_path / "bad")
            (tmp_path / "bad" / name).unlink()
            with pytest.raises(FileFormatError):
                loader(tmp_path / "bad")


# -- code --------------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


def disguises(mark: Path, path: Path):
    """Files with code in them, in every form that some loader of the field would run."""
    yield pickle.dumps(Bomb(mark))
    yield pickle.dumps(Bomb(mark), protocol=0)
    torch.save(Bomb(mark), path)
    yield path.read_bytes()
    torch.save([[Bomb(mark)]], path, _use_new_zipfile_serialization=False)
    yield path.read_bytes()
    np.save(path.with_suffix(".npy"), np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    yield path.with_suffix(".npy").read_bytes()
    yield struct.pack("<Q", 2) + b"{}" + pickle.dumps(Bomb(mark))


@pytest.mark.parametrize("kind", [*FILES, *FOLDERS, "LAPE"])
def test_no_loader_runs_code_that_a_renamed_pickle_carries(kind, tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "file"
    tried = 0
    for data in list(disguises(mark, path)):
        if kind in FOLDERS:
            folder = FOLDERS[kind](tmp_path / f"folder{tried}")
            targets = [p for p in folder.iterdir() if p.suffix != ".csv" and p.name != ".lock"]
        else:
            targets = [path]
        for target in targets:
            if kind in FOLDERS:
                shutil.rmtree(folder)
                FOLDERS[kind](folder)
            target.write_bytes(data)
            load = lape if kind == "LAPE" else getattr(vn, kind).load
            with limits(), pytest.raises(FileFormatError):
                load(folder if kind in FOLDERS else path)
            tried += 1
    assert tried >= 6
    assert not mark.exists()


def test_pickled_objects_of_the_library_are_never_made_by_its_own_loaders(tmp_path):
    (tmp_path / "file").write_bytes(pickle.dumps(selection()))
    for kind in FILES:
        with pytest.raises(FileFormatError, match=f"not a readable {kind} file"):
            getattr(vn, kind).load(tmp_path / "file")


# -- hostile JSON ------------------------------------------------------------------------------------------------------

HOSTILE_JSON = {
    "deep lists": "[" * 100_000,
    "deep lists, closed": "[" * 500 + "]" * 500,
    "deep objects": '{"a":' * 500 + "1" + "}" * 500,
    "a number of 5,000 digits": '{"x": ' + "9" * 5000 + "}",
    "NaN": '{"x": NaN}',
    "infinity": '{"x": -Infinity}',
    "a number that overflows": '{"x": 1e999}',
    "a name twice": '{"x": 1, "x": 2}',
    "no JSON": "{'x': 1}",
    "nothing": "",
    "a list": "[]",
    "null": "null",
    "a lone surrogate": '"\\ud800"',
}


def forge(path: Path, kind: str, tensors: dict, text: str) -> None:
    """A file with a right checksum and any content, which damage cannot make but a program can."""
    metadata = {"format": "vlmneurons", "kind": kind, "version": "1", "data": text}
    save_file(tensors, path, metadata={**metadata, "sha256": _files._digest(kind, "1", text, tensors)})


def tensors_of(kind: str) -> dict:
    thing = FILES[kind]()
    if kind == "NeuronSet":
        return {"indices": thing.indices}
    if kind == "Selection":
        sizes = torch.tensor([len(part) for part in thing.values()])
        return {"indices": torch.cat([part.indices for part in thing.values()]), "sizes": sizes}
    return {"positive": thing.positive, "tokens": thing.tokens, "items": thing.items}


def about(kind: str) -> dict:
    more = {"Selection": {"selector": "x", "budget": None}, "NeuronSet": {}, "ActivationStatistics": {}}[kind]
    return {"space": SPACE.to_json(), "groups": ["EGY", "SGP"], "provenance": {}, **more}


@pytest.mark.parametrize("where", ["whole", "provenance"])
@pytest.mark.parametrize("what", HOSTILE_JSON)
@pytest.mark.parametrize("kind", FILES)
def test_hostile_json_with_a_right_checksum_is_refused(kind, what, where, tmp_path):
    text = HOSTILE_JSON[what]
    if where == "provenance":  # inside a file that is otherwise in order
        if what in ("no JSON", "nothing"):
            pytest.skip("would break the text around it, which is the case 'whole'")
        text = json.dumps({**about(kind), "provenance": "HERE"}).replace('"HERE"', text)
    forge(tmp_path / "file", kind, tensors_of(kind), text)
    harmless = kind == "NeuronSet" and where == "provenance" and what in ("a list", "null", "a lone surrogate")
    with limits():
        if harmless:  # a set has no provenance: what else a file says is not looked at
            assert vn.NeuronSet.load(tmp_path / "file") == neurons(1, 5)
            return
        with pytest.raises(FileFormatError):
            getattr(vn, kind).load(tmp_path / "file")


@pytest.mark.parametrize(
    "what", [pytest.param(what, id=what) for what in HOSTILE_JSON if what not in ("deep lists, closed",)]
)
@pytest.mark.parametrize("kind", FOLDERS)
def test_hostile_json_in_a_folder_is_refused(kind, what, tmp_path):
    folder = FOLDERS[kind](tmp_path / "folder")
    (index,) = folder.glob("*.json")
    index.write_text(HOSTILE_JSON[what], encoding="utf-8")
    with limits(), pytest.raises(FileFormatError):
        getattr(vn, kind).load(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(max_size=8), part, max_size=4),
    max_leaves=8,
)


def paths_of(data: object, path: tuple = ()):
    """Every place in nested data."""
    yield path
    for key, part in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from paths_of(part, (*path, key))


def replaced(data: object, path: tuple, value: object) -> object:
    if not path:
        return value
    copy = data.copy()
    copy[path[0]] = replaced(data[path[0]], path[1:], value)
    return copy


@pytest.mark.parametrize("kind", FILES)
def test_any_value_anywhere_in_a_files_description_is_read_or_refused(kind, tmp_path):
    places = list(paths_of(about(kind)))

    @QUICK
    @given(st.data())
    def try_one(data):
        description = replaced(about(kind), data.draw(st.sampled_from(places)), data.draw(JSON))
        forge(tmp_path / "file", kind, tensors_of(kind), json.dumps(description))
        with contextlib.suppress(FileFormatError):
            repr(getattr(vn, kind).load(tmp_path / "file"))

    with limits(60):
        try_one()


@pytest.mark.parametrize("kind", FOLDERS)
def test_any_value_anywhere_in_a_folders_index_is_read_or_refused(kind, tmp_path):
    folder = FOLDERS[kind](tmp_path / "folder")
    (index,) = folder.glob("*.json")
    good = json.loads(index.read_text(encoding="utf-8"))
    places = list(paths_of(good))

    def try_value(place, value):
        index.write_text(json.dumps(replaced(good, place, value)), encoding="utf-8")
        with contextlib.suppress(FileFormatError):
            look_at(getattr(vn, kind).load(folder))

    @QUICK
    @given(st.data())
    def try_one(data):
        try_value(data.draw(st.sampled_from(places)), data.draw(JSON))

    with limits(60):
        try_one()
        for place in places:
            for value in (float("inf"), 10**40, "x", [], {}, None):
                try_value(place, value)


# -- absurd sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("widths", [[2**61], [10**40], [-1], [0], [1.5], [True], [], [2**62, 2**62], "ab", None])
def test_spaces_of_absurd_sizes_cost_no_memory(kind, widths, tmp_path):
    sites = [f"language.layers.{n}.mlp.gate" for n in range(len(widths or ()))]
    forge(
        tmp_path / "file",
        kind,
        tensors_of(kind),
        json.dumps({**about(kind), "space": {"sites": sites, "widths": widths}}),
    )
    with limits(gibibytes=0.25):
        if widths == [2**61] and kind != "ActivationStatistics":  # absurd, but it holds the neurons that are listed
            assert "2,305,843,009,213,693,952" in repr(getattr(vn, kind).load(tmp_path / "file"))
            return
        with pytest.raises(FileFormatError):
            getattr(vn, kind).load(tmp_path / "file")


@pytest.mark.parametrize("kind", FILES)
def test_a_header_that_claims_terabytes_is_refused_at_once(kind, tmp_path):
    name = next(iter(tensors_of(kind)))
    claims = [
        {name: {"dtype": "I64", "shape": [2**40], "data_offsets": [0, 2**43]}},
        {name: {"dtype": "I64", "shape": [2**62, 2**62], "data_offsets": [0, 8]}},
        {name: {"dtype": "I64", "shape": [1], "data_offsets": [8, 0]}},
        {name: {"dtype": "I64", "shape": [-1], "data_offsets": [0, 8]}},
        {name: {"dtype": "X64", "shape": [1], "data_offsets": [0, 8]}},
        {"__metadata__": {"format": "vlmneurons" * 10**5}},
        {"__metadata__": {"format": ["x"]}},
    ]
    with limits(gibibytes=0.25):
        for claim in claims:
            header = json.dumps(claim).encode()
            (tmp_path / "file").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
            with pytest.raises(FileFormatError):
                getattr(vn, kind).load(tmp_path / "file")
        for length in (2**62, 2**64 - 1, 0, 1):
            (tmp_path / "file").write_bytes(struct.pack("<Q", length) + b"\0" * 64)
            with pytest.raises(FileFormatError):
                getattr(vn, kind).load(tmp_path / "file")


def test_lists_of_neurons_that_claim_a_billion_entries_are_refused_unread(tmp_path):
    # One stored number with a stride of 0: a file of a kilobyte whose tensor would be 8 TB.
    for claimed in (torch.zeros(1, dtype=torch.int64).expand(10**12), torch.zeros(1, dtype=torch.int64).expand(10**9)):
        torch.save([[claimed, torch.tensor([1])]], tmp_path / "file")
        assert (tmp_path / "file").stat().st_size < 5000
        with limits(gibibytes=0.25), pytest.raises(FileFormatError, match="layer 0 has 12 neurons, not the 1000000"):
            vn.Selection.from_lape(tmp_path / "file", SPACE, ["A"])


@pytest.mark.parametrize(
    "numbers",
    [torch.eye(3).to_sparse(), torch.tensor([1 + 2j]), torch.zeros(2, 2), torch.tensor(3), torch.zeros(1, 0),
     torch.tensor([0, 1]).to_sparse(), torch.tensor([2**62]), torch.tensor([-1]), torch.tensor([True]),
     torch.empty(3, device="meta"), 5, None, "abc", [[1]], [None], [10**40], [float("nan")], {"a": 1}],
    ids=repr,
)  # fmt: skip
def test_lists_of_anything_but_neurons_are_refused(numbers, tmp_path):
    for given_as in ("object", "file"):
        nested = [[numbers, []]]
        if given_as == "file":
            torch.save(nested, tmp_path / "file")
            nested = tmp_path / "file"
        with limits(), pytest.raises(FileFormatError):
            vn.Selection.from_lape(nested, SPACE, ["A"])


def test_a_packed_archive_that_grows_when_it_is_opened_is_refused(tmp_path):
    torch.save([[torch.arange(4), torch.tensor([1])]], tmp_path / "good")
    assert len(vn.Selection.from_lape(tmp_path / "good", SPACE, ["A"])["A"]) == 5
    with (
        zipfile.ZipFile(tmp_path / "good") as good,
        zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as bad,
    ):
        for entry in good.infolist():
            data = good.read(entry)
            bad.writestr(entry.filename, data if "data/" not in entry.filename else b"\0" * 50_000_000)
    with limits(gibibytes=0.04), pytest.raises(FileFormatError, match=r"bytes that unpack to [\d,]+; torch.save packs"):
        vn.Selection.from_lape(tmp_path / "bomb", SPACE, ["A"])


def test_damaged_lape_files_are_refused_or_hold_neurons_of_the_space(tmp_path):
    for zipped in (True, False):
        nested = selection().to_lape()
        torch.save(nested, tmp_path / "file", _use_new_zipfile_serialization=zipped)
        whole = (tmp_path / "file").read_bytes()
        with limits(60):
            for data in damaged(whole, N_DAMAGED):
                (tmp_path / "file").write_bytes(data)
                try:
                    loaded = vn.Selection.from_lape(tmp_path / "file", SPACE, ["EGY", "SGP"])
                except FileFormatError:
                    continue
                assert all(0 <= index < len(SPACE) for part in loaded.values() for index in part)


# -- what is no file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FILES)
def test_pipes_devices_folders_and_missing_files_are_refused_at_once(kind, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    load = getattr(vn, kind).load
    with limits(5):
        for path in (tmp_path / "pipe", "/dev/zero"):
            with pytest.raises(FileFormatError, match="is a pipe, socket or device, not a file"):
                load(path)
        with pytest.raises(IsADirectoryError):
            load(tmp_path)
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "missing")
        with pytest.raises(FileFormatError, match="is a pipe, socket or device"):
            vn.Selection.from_lape(tmp_path / "pipe", SPACE, ["A"])


# -- a full disk, a folder that cannot be written ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("size", [0, 100, 250])
def test_on_a_full_disk_the_old_file_stays_and_nothing_is_left_behind(kind, size, tmp_path):
    thing, path = FILES[kind](), tmp_path / "file"
    thing.save(path)
    before = path.read_bytes()
    with largest_file(size), pytest.raises(OSError, match="cannot be written"):
        thing.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert type(thing).load(path) == thing


@pytest.mark.parametrize("kind", FILES)
def test_a_folder_that_cannot_be_written_is_named(kind, tmp_path, monkeypatch):
    def refuse(*_, **how):
        raise PermissionError(errno.EACCES, "Permission denied", str(how.get("dir", "")))

    monkeypatch.setattr(atomic.tempfile, "mkstemp", refuse)  # root may write anywhere: the system cannot be asked
    with pytest.raises(PermissionError, match=str(tmp_path)):
        FILES[kind]().save(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_recording_that_fills_the_disk_is_resumed_with_nothing_lost(tmp_path):
    whole = item_statistics(tmp_path / "whole")
    items = [Item(f"q{n}", "AB"[n % 2], n % 4, {"category": "food"}) for n in range(4)]
    made = vn.ItemStatistics.create(
        tmp_path / "cut", SPACE, items, {"model": "m"}, ["positive"], dict.fromkeys((i.id for i in items), "")
    )
    counts = np.arange(96).reshape(4, 24) % 5
    for row, chosen in enumerate([0, 1, 2, 0]):
        with largest_file(row * 48 + 20), pytest.raises(OSError, match="File too large"):
            made.write([row], [chosen], [6], [0.5], {"positive": counts[row : row + 1]})
        assert vn.ItemStatistics.load(tmp_path / "cut", verify=True).done.tolist() == [n < row for n in range(4)]
        made.write([row], [chosen], [6], [0.5], {"positive": counts[row : row + 1]})
    for name in ("manifest.json", "items.bin", "positive.bin"):
        assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes()
