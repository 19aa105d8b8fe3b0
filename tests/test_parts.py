"""A run in parts, joined, is the undivided run to the byte; parts that are not all of one run are refused."""

import functools
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import vlmneurons as vn
from helpers import save_questions, some_questions
from recompute_study import Study, check_difference, check_effects, check_summary, check_table
from vlmneurons.cli import main
from vlmneurons.errors import FileFormatError, MismatchError, QuestionError
from vlmneurons.files.folders import RunFolder
from vlmneurons.recording.items import share_of
from vlmneurons.run.batching import batches
from vlmneurons.run.processes import Processes

ITEMS = ("manifest.json", "items.bin", "positive.bin", "total.bin")
KNOCKOUT = ("manifest.json", "answers.parquet", "table.csv", "summary.csv", "knockout.json")

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def model(load):
    return load("llava_next_qwen2")


def files(folder, names):
    return {name: (folder / name).read_bytes() for name in names}


def recorded(model, folder, part=None, questions=None, **how):
    how = {"batch_size": 3, "magnitudes": True, "progress": False, **how}
    return vn.record_items(model, questions or some_questions(23), folder, part=part, **how)


def switched_off(model, folder, part=None, questions=None, **how):
    space = model.space()

    def selected(first):
        return vn.Selection({name: vn.NeuronSet(space, [first + n, first + n + 7]) for n, name in enumerate("ABCD")})

    masks = {"x": selected(0), "y": vn.NeuronSet(space, [3])}
    if how.pop("several", False):
        masks |= {"z": selected(20), "random": [selected(40), selected(60)]}
        controls = some_questions(5, groups="E")
        how["controls"] = controls.with_items([replace(item, id=f"control {item.id}") for item in controls])
    how = {"batch_size": 3, "progress": False, **how}
    return vn.knockout(model, questions or some_questions(23, groups="ABCD"), masks, folder=folder, part=part, **how)


def in_parts(ask, model, folder, count=4, **how):
    """The folders of all parts, the last one first."""
    folders = [folder / f"part-{number}" for number in range(count, 0, -1)]
    for number, where in zip(range(count, 0, -1), folders, strict=True):
        ask(model, where, (number, count), **how)
    return folders


def with_one_that_does_not_open(tmp_path, questions):
    bad = vn.Question(tmp_path / "nowhere.png", "What?", ("Tea", "Rice", "Bread"), 0, "A", id="bad")
    return vn.QuestionSet([*questions[:9], bad, *questions[9:]])


def test_a_recording_in_parts_that_skips_a_question_is_finished_and_joined(model, tmp_path):
    questions = with_one_that_does_not_open(tmp_path, some_questions(12))
    how = {"questions": questions, "on_error": "skip"}
    whole = recorded(model, tmp_path / "whole", **how)
    parts = in_parts(recorded, model, tmp_path, count=2, **how)
    joined = vn.ItemStatistics.join(parts, tmp_path / "joined")
    assert files(tmp_path / "joined", ITEMS) == files(tmp_path / "whole", ITEMS)
    for one in (whole, joined, vn.ItemStatistics.load(tmp_path / "joined")):
        assert (int(one.done.sum()), one.provenance["skipped"], one.complete) == (12, ["bad"], False)
    held = next(one for one in parts if vn.ItemStatistics.load(one).provenance.get("skipped"))
    (held / "skipped.json").unlink()
    with pytest.raises(MismatchError, match=r"is not finished: 1 of its \d+ questions are not there \('bad'\)"):
        vn.ItemStatistics.join(parts, tmp_path / "again")


@pytest.mark.parametrize("by_length", [False, True])
def test_the_batches_of_processes_are_those_of_one(model, by_length):
    questions = some_questions(50)
    lengths = functools.partial(model.encoder.length, questions) if by_length else None
    whole = [[item.id for item in batch] for batch in batches(questions, 3, lengths)]
    for rank in range(3):
        own = share_of(questions, 3, Processes(rank, 3), lengths)
        assert [[item.id for item in batch] for batch in batches(own, 3)] == whole[rank::3]


@pytest.mark.parametrize("by_length", [False, True])
def test_a_recording_in_four_parts_joined_equals_the_whole_to_the_byte(model, tmp_path, by_length):
    whole = recorded(model, tmp_path / "whole", by_length=by_length)
    parts = in_parts(recorded, model, tmp_path, by_length=by_length)
    joined = vn.ItemStatistics.join(parts, tmp_path / "joined")
    assert files(tmp_path / "joined", ITEMS) == files(tmp_path / "whole", ITEMS)
    assert joined.complete
    assert joined.part is None
    assert joined.group_by() == whole.group_by()
    one = vn.ItemStatistics.load(parts[0])
    assert (one.part, one.complete) == ("4/4", False)
    assert "recorded: part 4/4" in repr(one)
    vn.ItemStatistics.join(parts, tmp_path / "joined")  # once more changes nothing
    assert files(tmp_path / "joined", ITEMS) == files(tmp_path / "whole", ITEMS)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"several": True},
        {"several": True, "others": 2},
        {"others": 1, "seed": 5, "by_length": True, "answer": "generate"},
        {"on_error": "skip", "others": 2},
    ],
)
def test_a_knockout_in_four_parts_joined_equals_the_whole_to_the_byte(model, tmp_path, how):
    questions = some_questions(23, groups="ABCD")
    if "on_error" in how:
        questions = with_one_that_does_not_open(tmp_path, questions)
    whole = switched_off(model, tmp_path / "whole", questions=questions, **how)
    parts = in_parts(switched_off, model, tmp_path, questions=questions, **how)
    joined = vn.KnockoutResult.join(parts, tmp_path / "joined")
    assert files(tmp_path / "joined", KNOCKOUT) == files(tmp_path / "whole", KNOCKOUT)
    assert joined.summary().equals(whole.summary())
    assert "part 4/4: " in repr(vn.KnockoutResult.load(parts[0]))
    assert not (parts[0] / "summary.csv").exists()


def apart(work):
    """Run something in a process of its own, and give its exit status; less than 0 for a signal that killed it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = work() or 0
        finally:
            os._exit(status if isinstance(status, int) else 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    ("ask", "of", "names", "kind", "how"),
    [
        (recorded, vn.ItemStatistics, ITEMS, vn.ItemStatistics, {}),
        (switched_off, RunFolder, KNOCKOUT, vn.KnockoutResult, {}),
        (switched_off, RunFolder, KNOCKOUT, vn.KnockoutResult, {"others": 2, "several": True}),
    ],
)
def test_a_part_that_is_killed_with_9_and_gone_on_with_ends_with_the_same_bytes(
    model, tmp_path, ask, of, names, kind, how
):
    ask(model, tmp_path / "whole", **how)
    parts = in_parts(ask, model, tmp_path, count=2, **how)
    again = tmp_path / "again"
    write, written = of.write, []

    def dying(self, *given):
        if written:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(write(self, *given))

    def killed():
        of.write = dying
        ask(model, again, "2/2", **how)

    assert apart(killed) == -signal.SIGKILL
    with pytest.raises(MismatchError, match=r"part 2/2 in .*again is not finished"):
        kind.join([parts[1], again], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
    others = some_questions(23, groups="ABCD" if ask is switched_off else "AB")
    ask(model, again, "2/2", questions=vn.QuestionSet(list(others)[::-1]), **how)  # the order of the first call stays
    assert files(again, names[:2]) == files(parts[0], names[:2])
    kind.join([parts[1], again], tmp_path / "joined")
    assert files(tmp_path / "joined", names) == files(tmp_path / "whole", names)


@pytest.mark.parametrize(("ask", "kind"), [(recorded, vn.ItemStatistics), (switched_off, vn.KnockoutResult)])
def test_parts_that_are_not_all_of_one_run_are_refused(model, tmp_path, ask, kind):
    two, one = in_parts(ask, model, tmp_path, count=2)
    ask(model, tmp_path / "whole")
    ask(model, tmp_path / "larger", "2/2", batch_size=4)
    ask(model, tmp_path / "third", "2/3")
    few = some_questions(22, groups="ABCD" if ask is switched_off else "AB")
    ask(model, tmp_path / "few", "2/2", questions=few)
    shutil.copytree(two, tmp_path / "copy")
    shutil.copytree(two, tmp_path / "damaged")
    for name, change in (("items.bin", b""), ("answers.parquet", b"")):
        if (tmp_path / "damaged" / name).exists():
            (tmp_path / "damaged" / name).write_bytes(change)
    refused = {
        (one,): "1 of 2 parts are lacking: 2/2. Give all of them",
        (one, two, tmp_path / "copy"): "part 2/2 is there twice: .*part-2 and .*copy",
        (one, tmp_path / "whole"): "whole is no part: it holds an undivided run",
        (one, tmp_path / "larger"): "larger is not of the run that .*part-1 is a part of: its batch",
        (one, tmp_path / "third"): r"is part 1/2, and .*third\s?(part )?2/3: not of one run",
        (one, tmp_path / "few"): "few is not of the run that .*part-1 is a part of: it lacks question",
        (one, tmp_path / "nowhere"): "nowhere holds no run: there is no manifest.json",
        (): "give the folders of all parts, as a list; got ",
    }
    for folders, message in refused.items():
        with pytest.raises(MismatchError, match=message):
            kind.join(list(folders), tmp_path / "joined")
    with pytest.raises(FileFormatError, match="damaged"):
        kind.join([one, tmp_path / "damaged"], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
    with pytest.raises(MismatchError, match=r"part-1 holds another run: .*its part is '1/2', not None"):
        kind.join([one, two], one)
    with pytest.raises(MismatchError, match="part-1 holds another run: its part is '1/2', not '2/2'"):
        ask(model, one, "2/2")
    with pytest.raises(MismatchError, match="holds another run"):
        ask(model, one)
    other = vn.KnockoutResult if kind is vn.ItemStatistics else vn.ItemStatistics
    with pytest.raises(MismatchError, match=r"holds 'vlmneurons .*', and not 'vlmneurons .*': runs of one kind"):
        other.join([one, two], tmp_path / "joined")


@pytest.mark.usefixtures("unchecked")
def test_a_part_that_cannot_be_is_refused_before_any_forward_and_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(model.hf, "forward", lambda *_, **__: 1 / 0)
    refused = {
        "3of8": "part='3of8' is no part: give its number and that of all",
        (1, 2, 3): "is no part",
        (1.0, 2): "is no part",
        "0/4": "part='0/4' is no part: of 4, there are those from 1/4 to 4/4",
        (5, 4): "is no part: of 4",
        "2/9": "part 2/9: there are 8 batches for 9 parts; give at most 8 parts, or a smaller batch_size",
    }
    for part, message in refused.items():
        for ask in (recorded, switched_off):
            with pytest.raises(QuestionError, match=message):
                ask(model, tmp_path / "run", part)
    with pytest.raises(QuestionError, match="part and distributed deal out the same batches"):
        recorded(model, tmp_path / "run", "1/2", distributed=True)
    with pytest.raises(QuestionError, match="a part needs a folder"):
        switched_off(model, None, "1/2")
    assert not (tmp_path / "run").exists()


def test_the_commands_in_parts_give_the_same_files_as_undivided(tiny_folder, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    save_questions(data, 32)
    asking = ["--model", str(tiny_folder("llava_next_qwen2")), "--data", str(data), "--batch-size", "4", "--quiet"]

    def done(command, *given):
        return apart(lambda: main([command, *map(str, given)]))

    at = tmp_path.joinpath
    for out, part in (("items", []), ("items-1", ["--part", "1/2"]), ("items-2", ["--part", "2/2"])):
        assert done("record", *asking, "--side", "identify", "--out", at(out), *part) == 0
    assert main(["select", "--items", str(at("items-1")), "--out", str(at("no.safetensors"))]) == 1
    assert "items-1 is part 1/2 of a recording: `join` it with the others first" in capsys.readouterr().err
    assert done("join", at("items-joined"), at("items-1"), at("items-2")) == 0
    assert files(at("items-joined"), ITEMS[:3]) == files(at("items"), ITEMS[:3])
    chosen = ["--fraction", "0.1", "--condition", "all"]
    for rule in ("CAS", "MAD"):
        out = at(f"{rule}.safetensors")
        assert done("select", "--items", at("items-joined"), "--out", out, "--selector", rule, *chosen) == 0
    masks = ["--selection", f"CAS={at('CAS.safetensors')}", f"MAD={at('MAD.safetensors')}", "--others", "1"]
    for out, part in (("whole", []), ("off-1", ["--part", "1/2"]), ("off-2", ["--part", "2/2"])):
        assert done("knockout", *asking, *masks, "--out", at(out), *part) == 0
    assert main(["report", "--run", str(at("off-1"))]) == 1
    assert "off-1 is part 1/2 of a run: `join` it with the others first" in capsys.readouterr().err
    assert main(["join", str(at("joined")), str(at("off-1"))]) == 1
    assert "1 of 2 parts are lacking: 2/2" in capsys.readouterr().err
    assert done("join", at("joined"), at("off-2"), at("off-1")) == 0
    assert files(at("joined"), KNOCKOUT) == files(at("whole"), KNOCKOUT)
    assert vn.KnockoutResult.load(at("joined")).selectors == ("CAS", "MAD")


def test_what_a_command_can_refuse_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vn.VLM, "from_pretrained", lambda *_, **__: 1 / 0)
    data = tmp_path / "data"
    data.mkdir()
    save_questions(data, 16)
    asking = ["--model", "some/model", "--data", str(data), "--out", str(tmp_path / "run")]
    refused = {
        ("record", "--part", "9/8"): "part='9/8' is no part",
        ("record", "--part", "identify"): "part='identify' is no part",
        ("knockout", "--selection", "CAS"): "--selection CAS: no name and file; give NAME=FILE",
        ("knockout", "--selection", "CAS=nowhere.safetensors"): "nowhere.safetensors",
        ("knockout", "--part", "x", "--selection", "CAS=a"): "part='x' is no part",
    }
    for (command, *given), message in refused.items():
        assert main([command, *asking, *given]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_parts_joined_are_recomputed_by_an_independent_program(model, tmp_path):
    questions = some_questions(64, groups="ABCD")
    how = {"questions": questions, "several": True, "others": 2, "batch_size": 8}
    joined = vn.KnockoutResult.join(in_parts(switched_off, model, tmp_path, count=3, **how), tmp_path / "joined")
    study = Study(pd.read_parquet(tmp_path / "joined" / "answers.parquet"), set(joined.controls))
    assert len(study.masked) == joined.asked[1:].sum() < len(joined.masks) * len(joined.ids)
    check_table(study, pd.read_csv(tmp_path / "joined" / "table.csv"))
    check_summary(study, pd.read_csv(tmp_path / "joined" / "summary.csv"), "correct", tests=False)
    summary = joined.summary(value="margin")
    assert np.isfinite(summary.set_index(["selector", "group"]).loc[("x", "A"), "self_effect_low"])
    check_summary(study, summary, "margin")
    check_effects(study, joined.effects(value="margin"), "margin")
    check_difference(study, joined.difference("x", "z", value="margin"), "x", "z", "margin")
