"""Runs that survive kill -9 at any moment, are safe to start twice, and never mix two studies."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import vlmneurons as vn
from helpers import often, some_questions
from vlmneurons.errors import FileFormatError, MismatchError, QuestionError
from vlmneurons.files.atomic import write_parquet
from vlmneurons.files.folders import RunFolder, git_state
from vlmneurons.files.locks import locked
from vlmneurons.model.identity import digest_of_weights
from vlmneurons.questions.identity import content_of
from vlmneurons.study.result import KnockoutResult


def masks_of(model, seed: int = 0) -> dict:
    """A selection of three groups, and an intervention on a single set."""
    space = model.space()
    generator = np.random.default_rng(seed)
    sets = {group: vn.NeuronSet(space, generator.choice(len(space), 60, replace=False)) for group in "ABC"}
    return {"CAS": vn.Selection(sets, selector="test"), "x 2": vn.Intervention(sets["A"], factor=2.0)}


def run(model, folder, **how):
    settings = {"batch_size": 2, "progress": False, **how}
    questions = settings.pop("questions", some_questions(12, groups="ABC"))
    return vn.knockout(model, questions, settings.pop("masks", masks_of(model)), folder=folder, **settings)


def same(one: KnockoutResult, other: KnockoutResult) -> None:
    assert (one.ids, one.groups, one.masks) == (other.ids, other.groups, other.masks)
    for name in ("chosen", "margins", "answers"):
        assert np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True)
    assert dict(one.provenance) == json.loads(json.dumps(dict(other.provenance)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_run_killed_at_ten_random_moments_ends_with_the_same_answers(model, tmp_path):
    plain = run(model, None, batch_size=1)
    generator = random.Random(0)
    folder = tmp_path / "run"

    def finished() -> int:
        return 12 if (folder / "knockout.json").exists() else len(list((folder / "parts").glob("batch-*.parquet")))

    done = [0]
    for number in range(often(10, 30)):
        child = os.fork()
        if child == 0:
            try:
                run(model, folder, batch_size=1)
            finally:
                os._exit(0)
        until = time.monotonic() + 20
        # Every other kill comes some time after a batch was finished, so that the run gets on however busy the machine.
        while number % 2 and finished() == done[-1] and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        done.append(finished())
    assert done == sorted(done)  # nothing that was finished is lost
    assert done[-1] > 0
    same(run(model, folder, batch_size=1), plain)
    assert not (folder / "parts").exists()
    assert not list(folder.rglob(".new-*"))
    run(model, tmp_path / "undisturbed", batch_size=1)
    for name in ("table.csv", "summary.csv"):
        assert (folder / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    pd.testing.assert_frame_equal(
        pd.read_parquet(folder / "answers.parquet"), pd.read_parquet(tmp_path / "undisturbed" / "answers.parquet")
    )


def test_a_run_killed_once_its_result_was_written_is_cleared_by_the_next(model, tmp_path, monkeypatch):
    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "clear", killed)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path)
    assert (tmp_path / "knockout.json").exists()
    assert list((tmp_path / "parts").glob("*.parquet"))
    with locked(tmp_path):  # another process is about to do it
        finished = run(model, tmp_path)
    assert (tmp_path / "parts").exists()
    same(run(model, tmp_path), finished)
    assert not (tmp_path / "parts").exists()


def test_a_run_that_is_resumed_asks_only_what_is_left(model, tmp_path):
    run(model, None)  # the first run of a model looks at how it is built
    forwards = []
    handle = model.hf.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        plain = run(model, tmp_path)
        each = len(forwards) / 6
        forwards.clear()
        same(run(model, tmp_path), plain)
        assert not forwards  # a finished run is read from its files
        resumed = tmp_path / "resumed"
        with pytest.raises(KeyboardInterrupt) as caught:
            _interrupted(model, resumed, after=2)
        assert len(caught.value.partial.ids) == 4
        forwards.clear()
        same(run(model, resumed), plain)
        assert len(forwards) == 4 * each
    finally:
        handle.remove()


def _interrupted(model, folder, after):
    from vlmneurons.study import knockout as _run

    original = _run.RunFolder.write
    written = []

    def write(self, name, table):
        if len(written) == after:
            raise KeyboardInterrupt
        original(self, name, table)
        written.append(name)

    _run.RunFolder.write = write
    try:
        run(model, folder)
    finally:
        _run.RunFolder.write = original


def test_another_study_in_the_same_folder_is_refused_with_what_differs(model, load, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _interrupted(model, tmp_path, after=3)
    questions = some_questions(12, groups="ABC")
    others = [
        ({"batch_size": 3}, "its batch_size is 2, not 3"),
        ({"answer": "text"}, r"its answer is 'Letters\(\) of vlmneurons .*', not .TextLikelihood"),
        ({"masks": masks_of(model, 1)}, r"its masks\.CAS is '"),
        ({"mode": "scale", "factor": 2.0}, r"its masks\.CAS is '"),
        ({"questions": questions[:11]}, "it has besides question 'q11'"),
        (
            {"questions": questions.asked(shuffle=5)},
            r"questions \('q0', .*, …\) had another text, options, answer, group or picture there",
        ),
        (
            {"questions": questions.asked(prompt=lambda item, options: "Other?")},
            "its prompt is '.*, not 'test",
        ),
        ({"on_error": "skip"}, "its on_error is 'raise', not 'skip'"),
    ]
    for how, message in others:
        with pytest.raises(MismatchError, match=f"holds another run: .*{message}"):
            run(model, tmp_path, **how)
    other = load("llava_next_qwen2")
    with pytest.raises(MismatchError, match=r"holds another run: .*its configuration is '"):
        run(other, tmp_path, masks=masks_of(other))


def test_other_weights_under_the_same_name_are_another_model(model):
    import torch

    before = digest_of_weights(model.hf)
    weight = model.hf.get_output_embeddings().weight
    with torch.no_grad():
        kept = weight[-1, -1].clone()
        weight[-1, -1] += 1
        changed = digest_of_weights(model.hf)
        weight[-1, -1] = kept
    assert changed != before == digest_of_weights(model.hf)


def test_a_second_process_in_the_folder_is_refused(model, tmp_path):
    code = (
        "import sys, time; sys.path[:0] = [p for p in sys.argv[2:]]\n"
        "from pathlib import Path; from vlmneurons.files.folders import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    folder = tmp_path / "run"
    folder.mkdir()
    source = str(Path(vn.__file__).parents[1])
    child = subprocess.Popen([sys.executable, "-c", code, str(folder), source], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(MismatchError, match="is in use by another process; wait for it, or give another folder"):
            run(model, folder)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    same(run(model, folder), run(model, None))  # the lock ended with its process


def test_damaged_batches_and_manifests_are_named(model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _interrupted(model, tmp_path, after=3)
    part = tmp_path / "parts" / "batch-000001.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:50])
    with pytest.raises(FileFormatError, match=r"batch-000001\.parquet is damaged .* delete it, and its batch is run"):
        run(model, tmp_path)
    part.write_bytes((tmp_path / "parts" / "batch-000002.parquet").read_bytes())
    with pytest.raises(FileFormatError, match=r"batch-000001\.parquet does not hold its batch: delete it"):
        run(model, tmp_path)
    part.unlink()
    same(run(model, tmp_path), run(model, None))
    manifest = tmp_path / "manifest.json"
    for text in ("", "[]", "{" * 10_000):
        manifest.write_text(text)
        with pytest.raises(FileFormatError, match=r"manifest\.json is damaged"):
            run(model, tmp_path)


def test_questions_that_are_skipped_stay_skipped_when_a_run_is_resumed(model, tmp_path):
    bad = vn.Question("missing.png", "Bad?", ("x", "y"), 0, "A", id="bad")
    questions = vn.QuestionSet([*some_questions(9, groups="ABC"), bad])
    with pytest.raises(QuestionError, match="question 'bad'"):
        run(model, tmp_path / "raise", questions=questions)
    result = run(model, tmp_path / "skip", questions=questions, on_error="skip")
    assert result.provenance["skipped"] == ["bad"]
    again = run(model, tmp_path / "skip", questions=questions, on_error="skip")
    same(again, result)
    assert len(result.ids) == 9


def test_a_manifest_says_what_was_run_and_sessions_when_and_from_which_code(model, tmp_path):
    run(model, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["setting"]["model"] == "Qwen2_5_VLForConditionalGeneration"
    assert manifest["setting"]["weights"] == digest_of_weights(model.hf)
    assert set(manifest["versions"]) >= {"vlmneurons", "torch", "transformers", "nnsight", "python"}
    assert manifest["content"] == content_of(some_questions(12, groups="ABC"))
    assert set(manifest["masks"]) == {"CAS", "x 2"}
    (session,) = [json.loads(line) for line in (tmp_path / "sessions.jsonl").read_text().splitlines()]
    assert {"started", "host", "process", "git"} <= set(session)
    assert session["process"] == os.getpid()


def test_the_state_of_the_code_is_its_commit_and_whether_it_is_changed(tmp_path):
    assert git_state(tmp_path) is None
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "file").write_text("a")
    subprocess.run(["git", "add", "file"], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "-qm", "first"], cwd=tmp_path, check=True)
    state = git_state(tmp_path)
    assert len(state["commit"]) == 40
    assert state["changed"] is False
    (tmp_path / "file").write_text("b")
    assert git_state(tmp_path)["changed"] is True


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    table = pd.DataFrame({"a": [1, 2]})
    write_parquet(tmp_path / "t.parquet", table)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_parquet(tmp_path / "t.parquet", pd.DataFrame({"a": [9]}))
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), table)
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


def test_what_a_killed_write_left_is_cleared_away(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / ".new-abc").write_text("half")
    folder = RunFolder(tmp_path, {"kind": "test"})
    with folder.opened():
        assert not (tmp_path / "parts" / ".new-abc").exists()
    with locked(tmp_path):
        pass
