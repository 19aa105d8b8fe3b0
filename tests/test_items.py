"""Counts of every question on disk: exact sums, any grouping, and recordings that survive being killed."""

import json
import os
import random
import signal
import time
import warnings

import numpy as np
import pytest
import torch

import vlmneurons as vn
from vlmneurons.errors import FileFormatError, MismatchError, SelectionError
from vlmneurons.items import ItemStatistics
from vlmneurons.testing import plant_neurons


@pytest.fixture(scope="module")
def planted():
    return plant_neurons()


@pytest.fixture(scope="module")
def folder(planted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("items") / "run"
    vn.record_items(planted.model, planted.questions, folder, batch_size=10, magnitudes=True, progress=False)
    return folder


@pytest.fixture
def items(folder):
    return ItemStatistics.load(folder, verify=True)


@pytest.mark.parametrize("condition", ["correct", "wrong", "all"])
def test_grouping_by_the_recorded_groups_equals_record_to_the_last_integer(planted, items, condition):
    if condition == "wrong":
        with pytest.raises(SelectionError, match="no token was counted for Brazil"):
            vn.CAS(count=1).select(items.group_by(condition=condition))
        return
    whole = vn.record(planted.model, planted.questions, batch_size=7, condition=condition, progress=False)
    grouped = items.group_by(condition=condition)
    assert grouped.groups == whole.groups
    for name in ("positive", "tokens", "items"):
        assert torch.equal(getattr(grouped, name), getattr(whole, name)), name


def test_sums_of_activations_agree_with_record_to_float32(planted, items):
    whole = vn.record(planted.model, planted.questions, batch_size=7, magnitudes=True, progress=False)
    torch.testing.assert_close(items.group_by().total, whole.total, rtol=1e-5, atol=1e-5)


def test_any_other_grouping_is_a_sum_of_rows(items):
    counts = np.fromfile(items.folder / "positive.bin", dtype="<u2").reshape(len(items), -1).astype(np.int64)
    labels = [("odd", "even", None)[n % 3] for n in range(len(items))]
    grouped = items.group_by(labels, condition="all")
    assert grouped.groups == ("even", "odd")
    assert np.array_equal(grouped.positive[0].numpy(), counts[1::3].sum(0))
    assert np.array_equal(grouped.positive[1].numpy(), counts[0::3].sum(0))
    by_function = items.group_by(lambda row: row["group"][0], condition="all")
    assert by_function.groups == tuple(sorted({item.group[0] for item in items.items}))
    assert by_function.positive.sum() == counts.sum()


def test_recording_again_finds_everything_done_and_runs_nothing(planted, folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
    again = vn.record_items(planted.model, planted.questions, folder, batch_size=10, magnitudes=True, progress=False)
    assert again.complete
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")}


def test_a_folder_of_other_questions_or_rules_is_refused_with_what_differs(planted, folder):
    with pytest.raises(MismatchError, match="it is of 96 questions, not the same 5"):
        vn.record_items(planted.model, planted.questions[:5], folder, magnitudes=True, progress=False)
    with pytest.raises(MismatchError, match="its tokens is 'content', not 'image'"):
        vn.record_items(planted.model, planted.questions, folder, tokens="image", magnitudes=True, progress=False)


def test_groupings_that_do_not_fit_are_refused(items):
    with pytest.raises(MismatchError, match="there is no column 'colour'; there are id, group, answer, correct"):
        items.group_by("colour")
    with pytest.raises(MismatchError, match="2 labels were given for 96 questions"):
        items.group_by(["a", "b"])
    with pytest.raises(MismatchError, match="condition='maybe' does not exist"):
        items.group_by(condition="maybe")
    with pytest.raises(SelectionError, match="no question has a label"):
        items.group_by(lambda row: None)


def test_damaged_folders_are_refused(planted, tmp_path):
    folder = tmp_path / "run"
    vn.record_items(planted.model, planted.questions[:4], folder, progress=False)
    data = bytearray((folder / "positive.bin").read_bytes())
    data[100] ^= 1
    (folder / "positive.bin").write_bytes(data)
    ItemStatistics.load(folder)
    with pytest.raises(FileFormatError, match="the counts of question 'Brazil-0' are damaged"):
        ItemStatistics.load(folder, verify=True)
    (folder / "positive.bin").write_bytes(data[:-1])
    with pytest.raises(FileFormatError, match=r"positive\.bin should have 8,192 bytes; it has 8,191"):
        ItemStatistics.load(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for broken in ("[]", "{", json.dumps({**manifest, "version": 99}), json.dumps({**manifest, "tables": ["../x"]})):
        (folder / "manifest.json").write_text(broken)
        with pytest.raises(FileFormatError, match="does not hold item statistics"):
            ItemStatistics.load(folder)
    with pytest.raises(FileFormatError, match="does not hold item statistics"):
        ItemStatistics.load(tmp_path / "nowhere")


def test_two_recordings_into_one_folder_at_once_are_refused(planted, tmp_path):
    first = vn.record_items(planted.model, planted.questions[:4], tmp_path / "run", progress=False)
    with first._locked(), pytest.raises(MismatchError, match="is being recorded into by another process"):
        vn.record_items(planted.model, planted.questions[:4], tmp_path / "run", progress=False)


def test_an_expert_or_vision_space_keeps_how_many_tokens_reached_each_site(planted, tmp_path):
    space = planted.model.space(("language", "vision"), "gate")
    recorded = vn.record_items(planted.model, planted.questions, tmp_path / "run", space, progress=False)
    whole = vn.record(planted.model, planted.questions, space, progress=False)
    assert torch.equal(recorded.group_by().routed, whole.routed)
    assert torch.equal(recorded.group_by().positive, whole.positive)


def _record_in_a_child(planted, folder):
    """Starts recording in a forked process and gives its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads: they are idle
        child = os.fork()
    if child:
        return child
    try:
        vn.record_items(planted.model, planted.questions, folder, batch_size=4, progress=False)
    finally:
        os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_twenty_random_moments_and_resumed_the_files_are_those_of_an_undisturbed_run(planted, tmp_path):
    started = time.perf_counter()
    vn.record_items(planted.model, planted.questions, tmp_path / "whole", batch_size=4, progress=False)
    duration = time.perf_counter() - started
    rng = random.Random(0)
    folder, kills, rounds = tmp_path / "killed-0", 0, 0
    while kills < 20:
        child = _record_in_a_child(planted, folder)
        time.sleep(rng.random() * duration / 3)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        if (folder / "manifest.json").exists() and ItemStatistics.load(folder, verify=True).complete:
            _assert_same_files(tmp_path / "whole", folder)
            rounds += 1
            folder = tmp_path / f"killed-{rounds}"
    vn.record_items(planted.model, planted.questions, folder, batch_size=4, progress=False)
    _assert_same_files(tmp_path / "whole", folder)


def _assert_same_files(one, other):
    for name in ("manifest.json", "items.bin", "positive.bin"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
