"""A run in parts, joined, is the undivided run to the byte; parts that are not all of one run are refused."""

import functools
import os
import re
import shutil
import signal
import subprocess
import time
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


SBATCH = """#!/bin/bash
# Keeps what is submitted, and gives its number, as sbatch --parsable does.
number=$(ls "$STATE" | grep -c '^job-')
printf '%s\\0' "$@" > "$STATE/job-$number"
echo "$number"
"""
VLMNEURONS = """#!/bin/bash
# Asks the test to run the command, in a process of its own but without importing everything anew.
printf '%s\\0' "$PWD" "$@" > "$STATE/$$" && mv "$STATE/$$" "$STATE/$$.ask"
until [ -e "$STATE/$$.done" ]; do sleep 0.02; done
exit "$(cat "$STATE/$$.done")"
"""


class Slurm:
    """Stands for SLURM: what was submitted runs as processes, the last that may run first, one task after the other."""

    def __init__(self, folder):
        self.state, self.ran = folder / "state", []
        (folder / "bin").mkdir()
        self.state.mkdir()
        for name, text in (("sbatch", SBATCH), ("vlmneurons", VLMNEURONS)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.environment = {**os.environ, "STATE": str(self.state), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}

    def bash(self, script, folder, **task):
        process = subprocess.Popen(["bash", "-e", "-c", script], cwd=folder, env={**self.environment, **task})
        while process.poll() is None:
            for path in self.state.glob("*.ask"):
                where, *arguments = path.read_text().split("\0")[:-1]
                path.unlink()
                status = apart(lambda: os.chdir(where) or main(arguments))  # noqa: B023 (run at once)
                path.with_suffix(".new").write_text(str(status))
                path.with_suffix(".new").rename(path.with_suffix(".done"))
            time.sleep(0.01)
        assert process.returncode == 0, script

    def run(self, folder):
        """Run all jobs, each when those that it depends on are done."""
        waiting = {path.name[4:]: path.read_text().split("\0")[:-1] for path in self.state.glob("job-*")}
        while waiting:
            ready = [number for number, job in waiting.items() if not waiting.keys() & self.needs(job)]
            number = max(ready, key=int)
            job = waiting.pop(number)
            assert self.needs(job) <= {one for one, _ in self.ran}
            first, _, last = (self.option(job, "array") or "0").partition("-")
            for task in range(int(first), int(last or first) + 1):
                self.bash(job[job.index("--wrap") + 1], folder, SLURM_ARRAY_TASK_ID=str(task))
                self.ran.append((number, task))

    @staticmethod
    def option(job, name):
        return next((one.partition("=")[2] for one in job if one.startswith(f"--{name}=")), "")

    def needs(self, job):
        kind, *numbers = self.option(job, "dependency").split(":")
        assert kind in ("", "afterok")
        return set(numbers)


def test_the_study_of_the_guide_runs_as_jobs_that_wait_for_each_other(request, tiny_folder, tmp_path, capfd):
    guide = (request.config.rootpath / "docs/guides/cluster.md").read_text(encoding="utf-8")
    (script,) = [block for block in re.findall(r"```bash\n(.*?)```", guide, re.DOTALL) if "sbatch --parsable" in block]
    data, where = tmp_path / "data", tmp_path / "where"
    data.mkdir()
    where.mkdir()
    save_questions(data, 72, groups="ABC")
    for old, new in {
        "Qwen/Qwen2.5-VL-7B-Instruct": str(tiny_folder("llava_next_qwen2")),
        "cvqa.parquet": str(data),
        "--batch-size 16": "--batch-size 4 --quiet",
        "--selector CAS": "--selector CAS --fraction 0.1 --condition all",
        "--array=1-8": "--array=1-2",
        "_ID/8": "_ID/2",
        "--others 2": "--others 1",
    }.items():
        assert old in script
        script = script.replace(old, new)
    slurm = Slurm(tmp_path)
    slurm.bash(script, where)
    assert len(list(slurm.state.glob("job-*"))) == 4
    slurm.run(where)
    assert slurm.ran == [("0", 1), ("0", 2), ("1", 0), ("2", 1), ("2", 2), ("3", 0)]
    assert list((where / "run").glob("knockout/report*"))
    joined = vn.KnockoutResult.load(where / "run" / "knockout")
    asking = ["--model", str(tiny_folder("llava_next_qwen2")), "--data", str(data), "--seed", "0", "--batch-size", "4"]
    asking += ["--side", "evaluate", "--selection", f"CAS={where / 'run' / 'CAS.safetensors'}", "--others", "1"]
    assert apart(lambda: main(["knockout", *asking, "--quiet", "--out", str(tmp_path / "whole")])) == 0
    assert files(where / "run" / "knockout", KNOCKOUT) == files(tmp_path / "whole", KNOCKOUT)
    assert joined.selectors == ("CAS",)


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


# -- sums of results and recordings that are whole ---------------------------------------------------------------------


def asked_apart(model, masks, questions=None, **how):
    how = {"batch_size": 4, "progress": False, **how}
    return vn.knockout(model, questions or some_questions(24, groups="ABCD"), masks, **how)


def some_masks(model):
    space = model.space()

    def selected(first):
        return vn.Selection({name: vn.NeuronSet(space, [first + n, first + n + 7]) for n, name in enumerate("ABCD")})

    return {
        "x": selected(0),
        "y": selected(20),
        "random": [selected(40), selected(60)],
        "one": vn.NeuronSet(space, [3]),
    }


@pytest.mark.parametrize("others", [None, 2])
def test_runs_of_one_selector_each_add_up_to_the_run_of_all(model, tmp_path, others):
    masks = some_masks(model)
    whole = asked_apart(model, masks, others=others)
    folders = [tmp_path / name for name in masks]
    apart_ = [
        asked_apart(model, {name: one}, folder=folder, others=None if name == "one" else others)
        for (name, one), folder in zip(masks.items(), folders, strict=True)
    ]
    for found in (sum(apart_), vn.KnockoutResult.join(folders, tmp_path / "joined")):
        assert found.masks == whole.masks
        np.testing.assert_array_equal(found.chosen, whole.chosen)
        np.testing.assert_allclose(found.margins, whole.margins, atol=1e-5, rtol=0)
        assert (found.ids, found.groups, found.pictures) == (whole.ids, whole.groups, whole.pictures)
        assert {**found.provenance, "design": None} == {**whole.provenance, "design": None}
        assert found.summary().equals(whole.summary())
    kept = vn.KnockoutResult.load(tmp_path / "joined")
    np.testing.assert_array_equal(kept.chosen, whole.chosen)
    with pytest.raises(MismatchError, match="joined holds a result that was saved there"):
        vn.KnockoutResult.join(folders, tmp_path / "joined")


def test_runs_of_some_questions_each_add_up_to_the_run_of_all(model):
    masks, questions = some_masks(model), some_questions(24, groups="ABCD")
    whole = asked_apart(model, masks, questions)
    found = sum(asked_apart(model, masks, questions[start : start + 8]) for start in (0, 8, 16))
    assert (found.ids, found.masks, found.pictures) == (whole.ids, whole.masks, whole.pictures)
    np.testing.assert_array_equal(found.chosen, whole.chosen)
    np.testing.assert_allclose(found.margins, whole.margins, atol=1e-5, rtol=0)
    assert found.provenance["chance"] == pytest.approx(whole.provenance["chance"])
    assert found.summary().equals(whole.summary())


def test_results_that_do_not_fit_together_are_not_added(model, load, tmp_path):
    masks, questions, another = some_masks(model), some_questions(24, groups="ABCD"), load("llava_next_mistral")
    x = asked_apart(model, {"x": masks["x"]}, questions)
    some = questions[:8]
    refused = {
        "24 questions .* asked under 4 masks in both results .*would count twice": {"x": masks["x"]},
        "1 questions are in one of the results alone .*would have gaps": ({"y": masks["y"]}, 23),
        "of different settings cannot be added: of the second, its batch_size is 3, not 4": ({"y": masks["y"]}, 24, 3),
    }
    for message, given in refused.items():
        own, n, size = (*given, 4)[:3] if isinstance(given, tuple) else (given, 24, 4)
        with pytest.raises(MismatchError, match=message):
            x + asked_apart(model, own, questions[:n], batch_size=size)
    with pytest.raises(MismatchError, match=r"of different questions and of 8 masks that differ \(x A, …\): their sum"):
        x.at(range(8, 24)) + asked_apart(model, {"y": masks["y"]}, some)
    with pytest.raises(MismatchError, match="of different neurons under the name 'x'"):  # as many, in the same layers
        x.at(range(8, 24)) + asked_apart(model, {"x": masks["y"]}, some)
    with pytest.raises(MismatchError, match="its others is 2, not None"):
        x + asked_apart(model, {"y": masks["y"]}, questions, others=2)
    two = [asked_apart(model, {name: masks[name]}, questions, others=2, seed=n) for n, name in enumerate("xy")]
    with pytest.raises(MismatchError, match=r"its plan is .* another seed"):
        two[0] + two[1]
    with pytest.raises(MismatchError, match=r"of different settings .*its configuration is"):
        x + asked_apart(another, {"y": vn.NeuronSet(another.space(), [3])}, questions)
    other = replace(asked_apart(model, {"y": masks["y"]}, questions), margins=x.margins + 1e-3)
    with pytest.raises(MismatchError, match=r"the clean answers to 24 questions differ .*not of one model"):
        x + other
    for folder in in_parts(switched_off, model, tmp_path, count=2):
        with pytest.raises(MismatchError, match=r"is part ./2 of a run: KnockoutResult.join puts it together"):
            x + vn.KnockoutResult.load(folder)
    asked_apart(model, {"x": masks["x"]}, questions, folder=tmp_path / "x")
    asked_apart(model, {"y": masks["y"]}, some, folder=tmp_path / "y")
    with pytest.raises(MismatchError, match=r"y is not of the questions that .*x is of: it lacks 16 questions"):
        vn.KnockoutResult.join([tmp_path / "x", tmp_path / "y"], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
    with pytest.raises(TypeError):
        x + 1


def test_controls_that_were_given_another_way_to_be_asked_are_refused(model):
    masks = {"x": vn.NeuronSet(model.space(), [1])}
    controls = vn.QuestionSet(replace(item, group="c", id=f"c{item.id}") for item in some_questions(2))
    for name, how in (("answer", "text"), ("shuffle", None), ("prompt", "open")):
        with pytest.raises(QuestionError, match=f"one set is asked in one way: the first with {name}="):
            vn.knockout(model, some_questions(4), masks, controls=controls.asked(**{name: how}))
    result = vn.knockout(model, some_questions(4), masks, controls=controls, answer="text", progress=False)
    assert result.control_names == ("c",)
    assert result.provenance["answer"] == repr(vn.TextLikelihood())


def test_folders_of_parts_may_come_one_by_one(model, tmp_path, unchecked):
    parts = in_parts(switched_off, model, tmp_path, 2)
    joined = vn.KnockoutResult.join((one for one in parts), tmp_path / "joined")
    assert joined.ids == switched_off(model, tmp_path / "whole").ids


def test_recordings_of_some_questions_each_add_up_to_that_of_all(model, tmp_path):
    questions = some_questions(23)
    whole = recorded(model, tmp_path / "whole", questions=questions)
    parts = [questions[:9], questions[9:12], questions[12:]]
    kept = [recorded(model, tmp_path / str(n), questions=part) for n, part in enumerate(parts)]
    found = sum(kept)
    assert [item.id for item in found.items] == [item.id for item in whole.items]
    assert (len(found), found.complete, found.part) == (23, True, None)
    assert found.group_by(condition="all") == whole.group_by(condition="all")
    np.testing.assert_array_equal(found.margins, whole.margins)
    for on in ("mean", "probability"):
        mine, theirs = (one.grouped(condition="all").values(on, slice(2, 9)) for one in (found, whole))
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    same = [vn.stability(one, vn.MAD(0.2), condition="all", resamples=3) for one in (found, whole)]
    assert same[0].equals(same[1])
    found.verify()
    assert [place.start for place, _ in found.chunks(range(23), size=10)] == [0, 10, 20]
    row = int(np.flatnonzero([item.id == "q15" for item in whole.items])[0])
    np.testing.assert_array_equal(next(found.chunks([row, 0]))[1], next(whole.chunks([row, 0]))[1])


def test_recordings_that_do_not_fit_together_are_not_added(model, load, tmp_path):
    questions = some_questions(12)
    one = recorded(model, tmp_path / "one", questions=questions[:6])
    refused = {
        "6 questions are in both recordings .*would count twice": one,
        "recordings with different tables cannot be added": recorded(
            model, tmp_path / "other", questions=questions[6:], magnitudes=False
        ),
        "different 'tokens'|of different settings": recorded(
            model, tmp_path / "tokens", questions=questions[6:], tokens="text"
        ),
        "is part 1/2 of a recording: ItemStatistics.join puts it together": recorded(
            model, tmp_path / "part", "1/2", questions=questions[6:]
        ),
    }
    for message, other in refused.items():
        with pytest.raises(MismatchError, match=message):
            one + other
    with pytest.raises(MismatchError):
        one + recorded(load("llava_next_mistral"), tmp_path / "model", questions=questions[6:])
    with pytest.raises(TypeError):
        one + 1
