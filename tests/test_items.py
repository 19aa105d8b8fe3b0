"""Counts of every question on disk: exact sums, any grouping, and recordings that survive being killed."""

import json
import os
import random
import signal
import time
import tracemalloc
import warnings

import numpy as np
import pytest
import torch

import vlmneurons as vn
from helpers import often, picture, plain_hooks, some_questions
from vlmneurons.errors import ActivationError, FileFormatError, GroupError, MismatchError, SelectionError
from vlmneurons.files import tables as _files
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.statistics.items import Item, ItemStatistics
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
    with pytest.raises(MismatchError, match=r"holds another run: it has besides 91 questions \('Brazil-10', "):
        vn.record_items(planted.model, planted.questions[:5], folder, magnitudes=True, progress=False)
    with pytest.raises(MismatchError, match="its tokens is 'content', not 'image'"):
        vn.record_items(planted.model, planted.questions, folder, tokens="image", magnitudes=True, progress=False)


def test_a_recording_keeps_which_questions_share_a_picture(model, tmp_path):
    shared, other = picture(1), picture(2)
    shown = [shared, shared.copy(), other, (other, picture(3)), None, None]
    options = ("Tea", "Rice")
    asked = [vn.Question(image, "What?", options, 0, "AB"[n % 2], id=f"q{n}") for n, image in enumerate(shown)]
    asked.append(vn.Question(picture(4), "What?", options, 0, "A", id="q6", image_id="a family"))
    vn.record_items(model, vn.QuestionSet(asked), tmp_path / "run", progress=False)
    kept = [item.pictures for item in ItemStatistics.load(tmp_path / "run").items]
    assert kept[0] == kept[1] == (asked[0].image_key,)
    assert kept[3] == (*kept[2], picture_key(picture(3)))
    assert kept[4:] == [(), (), ("a family",)]
    assert len({*kept[0], *kept[3]}) == 3


def picture_key(image):
    return vn.Question(image, "What?", ("Tea", "Rice"), 0, "A").image_key


def test_pictures_may_lie_elsewhere_but_not_be_shared_by_others_when_a_recording_is_gone_on_with(tmp_path):
    def made(*pictures):
        space = NeuronSpace.from_widths("language", "gate", [3])
        items = [Item(f"q{n}", "A", 0, {}, shown) for n, shown in enumerate(pictures)]
        return ItemStatistics.create(tmp_path / "run", space, items, {}, ["positive"])

    first = made(("here/1",), ("here/1",), ("here/2",), ())
    assert made(("there/1",), ("there/1",), ("there/2",), ()).items == first.items
    for others in (
        (("1",), ("2",), ("2",), ()),
        (("1",), ("1",), ("2",), ("3",)),
        (("1",), ("1",), ("2", "1"), ()),
    ):
        with pytest.raises(MismatchError, match=r"holds another run: .* had another text, .* or picture there"):
            made(*others)
    with pytest.raises(MismatchError, match=r"holds another run: .* had another text, .* or picture there"):
        made(*[None] * 4)


def test_a_manifest_whose_pictures_are_no_list_is_refused(planted, tmp_path):
    vn.record_items(planted.model, planted.questions[:2], tmp_path / "run", progress=False)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    rest["about"]["items"][0]["pictures"] = "p1"
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(_files.sealed(rest)))
    with pytest.raises(FileFormatError, match="does not hold item statistics: pictures 'p1'"):
        ItemStatistics.load(tmp_path / "run")


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
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    regrouped = {**rest["about"], "items": [{**item, "group": "Egypt"} for item in rest["about"]["items"]]}
    for broken in (
        "[]",
        "{",
        json.dumps(_files.sealed({**rest, "version": 99})),
        json.dumps(_files.sealed({**rest, "tables": ["../x"]})),
        json.dumps({**manifest, "about": regrouped}),
        json.dumps(rest),
    ):
        (folder / "manifest.json").write_text(broken)
        with pytest.raises(FileFormatError, match="does not hold item statistics"):
            ItemStatistics.load(folder)
    with pytest.raises(FileFormatError, match="does not hold item statistics"):
        ItemStatistics.load(tmp_path / "nowhere")


def test_two_recordings_into_one_folder_at_once_are_refused(planted, tmp_path):
    first = vn.record_items(planted.model, planted.questions[:4], tmp_path / "run", progress=False)
    with first.locked(), pytest.raises(MismatchError, match="is in use by another process"):
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
    folder, killed, rounds = tmp_path / "killed-0", 0, 0
    while killed < often(20, 40):
        child = _record_in_a_child(planted, folder)
        time.sleep(rng.random() * duration / 3)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        if (folder / "manifest.json").exists() and ItemStatistics.load(folder, verify=True).complete:
            _assert_same_files(tmp_path / "whole", folder)
            rounds += 1
            folder = tmp_path / f"killed-{rounds}"
    vn.record_items(planted.model, planted.questions, folder, batch_size=4, progress=False)
    _assert_same_files(tmp_path / "whole", folder)


def _assert_same_files(one, other):
    for name in ("manifest.json", "items.bin", "positive.bin"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


# -- grouping, pools -----------------------------------------------------------------------------------------------


def test_a_balanced_pool_is_that_of_the_questions_themselves(planted, items):
    pool = items.grouped(balanced=5, minimum=5, seed=3)
    names = {items.items[row].id for row in pool.rows}
    assert names == {item.id for item in planted.questions.balanced(5, seed=3)}
    assert pool.items.tolist() == [5] * 8
    by_hand = items.group_by(lambda row: row["group"] if row["id"] in names else None)
    assert pool.statistics == by_hand == items.group_by(balanced=5, seed=3)
    uneven = items.grouped(lambda row: "few" if row["group"] == "Kenya" else "many")
    assert uneven.items.tolist() == [12, 84]
    assert (
        uneven.balanced().items.tolist()
        == items.grouped(uneven_labels(items), balanced=True).items.tolist()
        == [12, 12]
    )


def uneven_labels(items):
    return ["few" if item.group == "Kenya" else "many" for item in items.items]


def test_thin_groups_are_named_before_anything_is_selected(items):
    labels = ["thin" if n < 3 else "other" for n in range(len(items))]
    with pytest.raises(SelectionError, match=r"at least 5 questions a group that were answered right.*in thin \(3\)"):
        items.grouped(labels, minimum=5)
    with pytest.raises(SelectionError, match=r"at least 4 questions a group are needed; fewer are in thin \(3\)"):
        items.group_by(labels, balanced=4, condition="all")
    with pytest.raises(SelectionError, match="0 questions per group were asked for; the least is 1"):
        items.grouped(balanced=0)
    with pytest.raises(SelectionError, match=r"fewer are in Brazil \(0\), Egypt \(0\)"):
        items.grouped(condition="wrong", balanced=True)
    with pytest.raises(SelectionError, match="no token was counted for Brazil"):
        items.grouped(condition="wrong").check_counted()


def test_questions_taken_twice_count_twice_and_groups_can_be_picked(items):
    pool = items.grouped()
    twice = pool.taken(np.concatenate([np.arange(len(pool.rows))] * 2))
    for name in ("positive", "tokens", "items"):
        assert torch.equal(getattr(twice.statistics, name), 2 * getattr(pool.statistics, name)), name
    torch.testing.assert_close(twice.statistics.total, 2 * pool.statistics.total)  # added in another order
    some = pool.select_groups(["Kenya", "Brazil"])
    whole = pool.statistics.select_groups(["Kenya", "Brazil"])
    assert torch.equal(some.statistics.positive, whole.positive)
    assert torch.equal(some.statistics.tokens, whole.tokens)
    with pytest.raises(GroupError, match="group 'Mars' is not among these questions; they have Brazil"):
        pool.select_groups(["Mars"])
    assert repr(some).startswith("GroupedItems(24 questions: Kenya 12, Brazil 12; correct, over NeuronSpace(")


def test_values_of_a_question_are_its_own_rows_over_its_own_tokens(items):
    counts = np.fromfile(items.folder / "positive.bin", dtype="<u2").reshape(len(items), -1).astype(float)
    sums = np.fromfile(items.folder / "total.bin", dtype="<f4").reshape(len(items), -1).astype(float)
    tokens = items.tokens.numpy()[:, None]
    pool = items.grouped(condition="all")
    assert np.array_equal(pool.values("probability", slice(3, 50)), (counts / tokens)[:, 3:50])
    assert np.array_equal(pool.values("mean", slice(0, 7)), (sums / tokens)[:, :7])
    with pytest.raises(SelectionError, match=r"holds no maximum of each question: record_items\(…, maxima=True\)"):
        pool.values("maximum", slice(0, 7))
    with pytest.raises(SelectionError, match="on='median' does not exist; choose from mean, probability, maximum"):
        pool.values("median", slice(0, 7))


def test_maxima_are_the_highest_values_of_the_counted_tokens(paper_model, bare_model, tmp_path):
    questions = some_questions(3)
    space = paper_model.space(("language", "vision"), "gate")
    recorded = vn.record_items(
        paper_model, questions, tmp_path / "run", space, maxima=True, batch_size=2, progress=False
    )
    found = np.fromfile(tmp_path / "run" / "maximum.bin", dtype="<f4").reshape(3, -1)
    for row in range(3):
        batch = paper_model.prepare(questions[row : row + 1], padding_side="right")
        with plain_hooks(bare_model) as values, torch.inference_mode():
            bare_model(**batch)
        counted = batch.tokens.counted("content")[0]
        for site in space.sites:
            (here,) = values[str(site)]
            flat = here.reshape(-1, here.shape[-1])
            expected = (here[0][counted] if site.tower == "language" else flat).amax(0)
            assert np.allclose(found[row, space.slice(site)], expected.numpy(), rtol=1e-4, atol=1e-5), site
    pool = recorded.grouped(condition="all")
    assert np.array_equal(pool.values("maximum", slice(0, 9)), found[:, :9].astype(float))


# -- files that survive --------------------------------------------------------------------------------------------


def test_a_crash_between_any_two_writes_loses_nothing_and_counts_nothing_twice(planted, tmp_path, monkeypatch):
    questions = planted.questions[:6]
    vn.record_items(planted.model, questions, tmp_path / "whole", batch_size=2, progress=False)
    real, crashes = os.fsync, 0

    class Crash(BaseException):
        pass

    for place in range(1, 20):
        folder, calls = tmp_path / f"crash-{place}", []

        def fsync(handle, calls=calls, place=place):
            calls.append(1)
            if len(calls) == place:
                raise Crash
            real(handle)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            vn.record_items(planted.model, questions, folder, batch_size=2, progress=False)
        except Crash:
            crashes += 1
        monkeypatch.setattr(os, "fsync", real)
        again = vn.record_items(planted.model, questions, folder, batch_size=2, progress=False)
        again.verify()
        _assert_same_files(tmp_path / "whole", folder)
    assert crashes >= 7  # the manifest, and counts and records of three batches


def test_a_half_written_row_is_written_again(planted, tmp_path):
    questions = planted.questions[:4]
    vn.record_items(planted.model, questions, tmp_path / "whole", batch_size=2, progress=False)
    vn.record_items(planted.model, questions, tmp_path / "torn", batch_size=2, progress=False)
    records = bytearray((tmp_path / "torn" / "items.bin").read_bytes())
    size = len(records) // 4
    records[2 * size :] = bytes(2 * size)  # the records of the last batch never came
    (tmp_path / "torn" / "items.bin").write_bytes(records)
    counts = bytearray((tmp_path / "torn" / "positive.bin").read_bytes())
    counts[len(counts) // 2 + 5 :] = bytes(len(counts) - len(counts) // 2 - 5)  # and their rows came in part
    (tmp_path / "torn" / "positive.bin").write_bytes(counts)
    assert ItemStatistics.load(tmp_path / "torn").done.tolist() == [True, True, False, False]
    vn.record_items(planted.model, questions, tmp_path / "torn", batch_size=2, progress=False)
    _assert_same_files(tmp_path / "whole", tmp_path / "torn")


def test_a_damaged_record_is_noticed_too(planted, tmp_path):
    vn.record_items(planted.model, planted.questions[:2], tmp_path / "run", progress=False)
    data = bytearray((tmp_path / "run" / "items.bin").read_bytes())
    data[6] ^= 1  # the number of tokens of the first question
    (tmp_path / "run" / "items.bin").write_bytes(data)
    with pytest.raises(FileFormatError, match="the counts of question 'Brazil-0' are damaged"):
        ItemStatistics.load(tmp_path / "run", verify=True)


def test_a_sum_is_verified_recording_by_recording_each_over_its_tables_in_its_own_order(tmp_path):
    space, total, maximum = NeuronSpace.from_widths("language", "post", [3]), np.arange(6.0), np.ones(6)
    recordings = []
    for name, order in (("first", ["total", "maximum"]), ("second", ["maximum", "total"])):
        questions = [Item(f"{name} {n}", "a", 0, {}, ()) for n in range(2)]
        made = ItemStatistics.create(tmp_path / name, space, questions, {}, ["positive", *order])
        tables = {"positive": np.ones(6), "total": total, "maximum": maximum}
        made.write([0, 1], [0, 0], [4, 4], [0.5, 0.5], {key: table.reshape(2, 3) for key, table in tables.items()})
        recordings.append(ItemStatistics.load(tmp_path / name, verify=True))
    (recordings[0] + recordings[1]).verify()
    data = bytearray((tmp_path / "second" / "total.bin").read_bytes())
    data[-1] ^= 1
    (tmp_path / "second" / "total.bin").write_bytes(data)
    with pytest.raises(FileFormatError, match="the counts of question 'second 1' are damaged"):
        (recordings[0] + recordings[1]).verify()


def test_where_a_file_system_has_no_locks_a_marker_stands_for_one(planted, tmp_path, monkeypatch, caplog):
    def none(self, *_, **__):
        raise OSError("No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", none)
    made = vn.record_items(planted.model, planted.questions[:2], tmp_path / "run", progress=False)
    assert made.complete
    assert "cannot be locked (No locks available)" in caplog.text
    with (
        made.locked(),
        pytest.raises(MismatchError, match=r"in use by another process \(if it was killed, delete .*marker"),
    ):
        vn.record_items(planted.model, planted.questions[:2], tmp_path / "run", progress=False)
    monkeypatch.setattr("filelock.SoftFileLock.acquire", none)  # a folder that cannot even hold a marker
    with made.locked():
        assert vn.record_items(planted.model, planted.questions[:2], tmp_path / "run", progress=False).complete


def test_rows_are_read_as_they_are_needed_not_all_at_once(tmp_path):
    # 2,000 questions x 20,000 neurons: 80 MB on disk, of which a few MB may be in memory at a time.
    space = NeuronSpace.from_widths("language", "gate", [20_000])
    n = 2000
    items = [Item(str(i), "AB"[i % 2], 0, {}) for i in range(n)]
    content = {item.id: "" for item in items}
    made = ItemStatistics.create(tmp_path / "run", space, items, {}, ["positive"], content)
    for start in range(0, n, 200):
        rows = range(start, start + 200)
        counts = np.broadcast_to(np.array(rows)[:, None] % 7, (200, 20_000))
        made.write(rows, [0] * 200, [10] * 200, [0.0] * 200, {"positive": counts})
    tracemalloc.start()
    stats = made.group_by()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stats.positive[0, 0].item() == sum(i % 7 for i in range(0, n, 2))
    assert peak < 20 * 2**20


# -- statistics of one's own -------------------------------------------------------------------------------------------


def peak(values, counted):
    return torch.where(counted[..., None], values.abs(), 0).amax(1)


def second_moment(values, counted, site):
    scale = 1.0 if site.tower == "language" else 2.0
    return scale * (values.double() ** 2 * counted[..., None]).sum(1) / counted.sum(1, keepdim=True)


@pytest.fixture
def both_towers(load):
    model = load("llava_next_mistral")
    return model, vn.NeuronSpace.join(model.space("language", "gate"), model.space("vision", "gate"))


def test_statistics_of_ones_own_are_those_of_plain_hooks_in_both_towers(both_towers, load_bare, tmp_path):
    model, space = both_towers
    questions, hf = some_questions(5), load_bare("llava_next_mistral")
    named = {"peak": peak, "second": second_moment}
    items = vn.record_items(model, questions, tmp_path / "a", space, statistic=named, batch_size=3, progress=False)
    assert items.statistics == ("peak", "second")
    kept = {name: items.grouped(condition="all").values(name, slice(0, None)) for name in named}
    for row, item in enumerate(questions):
        inputs = model.prepare(questions[row : row + 1])
        counted = inputs.tokens.counted("content")[0]
        with plain_hooks(hf) as values, torch.inference_mode():
            hf(**inputs)
        expected = {name: [] for name in named}
        for site in space:
            (seen,) = values[str(site)]
            seen = seen[0][counted] if site.tower == "language" else seen.flatten(0, 1)
            expected["peak"].append(seen.abs().amax(0))
            expected["second"].append((1.0 if site.tower == "language" else 2.0) * (seen.double() ** 2).mean(0))
        for name, parts in expected.items():
            place = [items.items[n].id for n in items.grouped(condition="all").rows].index(item.id)
            np.testing.assert_allclose(kept[name][place], torch.cat(parts).numpy(), rtol=2e-4, atol=1e-5)
    picked = vn.AveragePrecision(count=3, on="peak").select(items.grouped(condition="all"))
    assert {len(neurons) for neurons in picked.values()} == {3}


def test_a_statistic_is_part_of_what_a_recording_is(both_towers, tmp_path):
    model, space = both_towers
    questions, how = some_questions(5), {"batch_size": 2, "progress": False}
    whole = vn.record_items(model, questions, tmp_path / "a", space, statistic=peak, **how)
    assert (tmp_path / "a" / "statistic.bin").stat().st_size == 5 * len(space) * 4
    again = vn.record_items(model, questions, tmp_path / "a", space, statistic=peak, **how)
    assert again.group_by(condition="all") == whole.group_by(condition="all")
    with pytest.raises(MismatchError, match="holds another run: its statistics"):
        vn.record_items(model, questions, tmp_path / "a", space, statistic=lambda v, c: v.amax(1), **how)
    with pytest.raises(MismatchError, match="holds another run"):
        vn.record_items(model, questions, tmp_path / "a", space, **how)
    parts = [tmp_path / f"part-{n}" for n in (1, 2)]
    for n, part in enumerate(parts, 1):
        vn.record_items(model, questions, part, space, statistic=peak, part=(n, 2), **how)
    ItemStatistics.join(parts, tmp_path / "joined")
    for name in ("manifest.json", "items.bin", "positive.bin", "statistic.bin"):
        assert (tmp_path / "joined" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_a_statistic_that_writes_into_what_it_is_given_changes_nothing_else(both_towers, tmp_path):
    model, space = both_towers

    def spoils(values, counted):
        values.zero_(), counted.zero_()
        return values[:, 0]

    plain = vn.record_items(model, some_questions(5), tmp_path / "a", space, statistic={"peak": peak}, progress=False)
    named = {"spoils": spoils, "peak": peak}
    items = vn.record_items(model, some_questions(5), tmp_path / "b", space, statistic=named, progress=False)
    for name in ("positive.bin", "peak.bin", "reached.bin"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert items.margins.tolist() == plain.margins.tolist()


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("Peak", "peak"), "'peak' and 'Peak' would be one file"),
        (("Positive",), "'Positive' and 'positive' would be one"),
    ],
)
def test_statistics_whose_files_some_disks_do_not_tell_apart_are_refused(both_towers, tmp_path, names, told):
    model, space = both_towers
    with pytest.raises(MismatchError, match=f"statistic {told}"):
        vn.record_items(model, some_questions(2), tmp_path, space, statistic=dict.fromkeys(names, peak), progress=False)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda values, counted: values.sum(1)[:, :3], r"gave \[2, 3\], not \[row, neuron\] = \[2, 64\], at language"),
        (lambda values, counted: 3.0, r"gave float, not \[row, neuron\]"),
        (lambda values, counted: values.sum(1) + 1j, "gave complex numbers, at language"),
        (lambda values, counted: values.amax(1) * torch.tensor([[1.0], [torch.nan]]), "gave NaN, at language"),
    ],
)
def test_a_statistic_of_a_wrong_shape_or_nan_is_refused_with_the_question_and_nothing_is_lost(
    load, tmp_path, function, message
):
    model = load("llava_next_mistral")
    questions, calls = some_questions(6), []

    def later(values, counted):
        calls.append(1)
        return peak(values, counted) if len(calls) <= 4 else function(values, counted)  # the first batch is whole

    with pytest.raises(ActivationError, match=rf"question 'q[23]': the statistic 'statistic' {message}"):
        vn.record_items(model, questions, tmp_path / "a", statistic=later, batch_size=2, progress=False)
    assert ItemStatistics.load(tmp_path / "a", verify=True).done.tolist() == [True, True] + [False] * 4


@pytest.mark.parametrize(
    ("statistic", "message"),
    [
        (3, r"statistic 'statistic' is a function \(values, counted\)"),
        ({"total": peak}, "statistic 'total': a name is of letters, digits and _, and none of items, positive"),
        ({"../up": peak}, "a name is of letters"),
    ],
)
def test_statistics_that_are_none_are_refused(load, tmp_path, unchecked, statistic, message):
    with pytest.raises(MismatchError, match=message):
        vn.record_items(load("llava_next_mistral"), some_questions(2), tmp_path / "a", statistic=statistic)


def test_a_statistic_may_call_the_model_s_own_modules(load, tmp_path):
    model = load("llava_next_mistral")

    def through(values, counted, site):
        down = model.hf.model.language_model.layers[site.layer].mlp.down_proj
        return values.amax(1) * down(values).norm(dim=-1).amax(1, keepdim=True)

    space, how = model.space("language", "post"), {"progress": False}
    items = vn.record_items(model, some_questions(4), tmp_path / "a", space, statistic=through, **how)
    plain = vn.record_items(model, some_questions(4), tmp_path / "b", space, **how)
    assert items.group_by(condition="all") == plain.group_by(condition="all")
