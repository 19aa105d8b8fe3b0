"""The command line: its numbers, and kill -9, SIGTERM and ctrl-C, after which a run goes on to the same end."""

import json
import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import vlmneurons as vn
from helpers import PAPER_MODELS, save_questions
from recompute_study import compare
from vlmneurons.cli import exit_status, main
from vlmneurons.errors import QuestionError
from vlmneurons.files.stopping import _ASKED, Stopped, stop_if_asked, stopped_by_signals
from vlmneurons.study.masks import split_setting

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

SETTINGS = {"fraction": 0.5, "repeats": 2, "permutations": 0, "minimum": 1, "batch-size": 2}
FLAGS = ["--selectors", "CAS", "--quiet", "--fractions", "--alphas", "--sizes", "--conditions"]


@pytest.fixture(scope="module")
def arguments(tiny_folder, tmp_path_factory):
    """The command, but for its folder: a small model, and a folder with a table and pictures."""
    folder = tmp_path_factory.mktemp("data")
    save_questions(folder, 40)
    settings = [part for name, value in SETTINGS.items() for part in (f"--{name}", str(value))]
    return ["study", "--model", str(tiny_folder("qwen2_5_vl")), "--data", str(folder), *settings, *FLAGS, "--out"]


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory):
    """A run that nobody stopped."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main([*arguments, str(folder)]) == 0
    return folder


def tables(folder: Path) -> dict[str, bytes]:
    """Every CSV of a run, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.csv"))}


def started(arguments: list[str], folder: Path) -> int:
    """The command in a process of its own, whose messages go to a file beside the folder. A fork: nothing is loaded."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            log = os.open(folder.with_suffix(".err"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 2)
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            signal.signal(signal.SIGINT, signal.default_int_handler)
            status = main([*arguments, str(folder)])
            sys.stderr.flush()
        finally:
            os._exit(status)
    return child


def ended(child: int) -> int:
    """Waits for a process, and gives its exit status; less than 0 for a signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_every_number_of_a_run_follows_from_its_kept_answers(undisturbed):
    compared = compare(undisturbed)
    assert compared["answers"] == 20 * (1 + 2 + 4 + 4 + 2)
    assert all(compared.values())


def test_the_whole_study_of_a_model_that_runs_elsewhere_gives_the_same_answers(arguments, undisturbed, tmp_path):
    assert main([*arguments, str(tmp_path / "run"), "--remote", "local"]) == 0
    here, there = undisturbed / "items", tmp_path / "run" / "items"
    assert (there / "positive.bin").read_bytes() == (here / "positive.bin").read_bytes()
    for name in ("knockout", "blind", "options-only"):
        ours, theirs = vn.KnockoutResult.load(undisturbed / name), vn.KnockoutResult.load(tmp_path / "run" / name)
        assert ours.masks == theirs.masks
        assert np.array_equal(ours.chosen, theirs.chosen)
        assert theirs.provenance["remote"] == "local"


def test_the_command_killed_at_ten_random_moments_ends_with_the_same_tables(arguments, undisturbed, tmp_path):
    folder, generator = tmp_path / "run", random.Random(1)
    seen = set()
    for number in range(10):
        child = started(arguments, folder)
        before, until = _progress(folder), time.monotonic() + 20
        while number % 2 and _progress(folder) == before and time.monotonic() < until:
            time.sleep(0.005)  # every other kill comes after something was finished, however busy the machine
        time.sleep(generator.uniform(0, 0.8))
        os.kill(child, signal.SIGKILL)
        ended(child)
        seen.add(_progress(folder))
    assert len(seen) > 3  # killed at different places
    assert main([*arguments, str(folder)]) == 0
    assert tables(folder) == tables(undisturbed)
    assert not list(folder.rglob(".new-*"))


def _progress(folder: Path) -> tuple[bool, int, int]:
    recorded = folder / "items" / "items.bin"
    bytes_there = sum(byte != 0 for byte in recorded.read_bytes()) if recorded.exists() else 0
    finished = len(list(folder.glob("*/knockout.json")))
    return (folder / "protocol.json").exists(), bytes_there, finished * 100 + len(list(folder.rglob("batch-*.parquet")))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("stage", ["items", "knockout"])
def test_a_run_that_is_told_to_end_says_so_and_can_be_gone_on_with(
    arguments, undisturbed, tmp_path, number, status, stage
):
    folder = tmp_path / "run"
    child = started(arguments, folder)
    until = time.monotonic() + 60

    def reached() -> bool:
        if stage == "knockout":
            return bool(list(folder.glob("knockout/parts/batch-*.parquet")))
        return (folder / "items" / "manifest.json").exists()

    while not reached() and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(child, number)
    assert ended(child) == status
    said = folder.with_suffix(".err").read_text()
    assert f"stopped by {number.name}: what is finished is kept; the same command goes on from there" in said
    assert "Traceback" not in said
    assert not (folder / "report" / "index.html").exists()
    assert not list(folder.rglob(".new-*"))
    if (stage, number) == ("knockout", signal.SIGTERM):
        assert main([*arguments, str(folder)]) == 0
        assert tables(folder) == tables(undisturbed)


def test_a_signal_that_python_swallowed_is_raised_at_the_next_batch():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped) as caught, stopped_by_signals():
        _ask_in_vain()
    assert caught.value.signal == signal.SIGTERM
    assert not _ASKED
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    stop_if_asked()


def _ask_in_vain():
    _ASKED.append(signal.SIGTERM)  # as the handler leaves it where what it raises comes to nothing
    stop_if_asked()


def test_errors_of_the_library_are_one_line_and_a_status(capsys):
    def fail():
        raise QuestionError("no such question")

    assert exit_status(fail) == 1
    assert capsys.readouterr().err == "error: no such question\n"
    assert exit_status(lambda: None) == 0
    assert exit_status(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_the_papers_script_runs_on_each_of_its_models_with_only_the_model_changed(
    name, tiny_folder, arguments, tmp_path, monkeypatch, capsys
):
    data, out = arguments[arguments.index("--data") + 1], tmp_path / "run"
    given = ["--model", str(tiny_folder(name)), "--data", data, "--min-items", "8", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["reproduce_paper.py", *given])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / "reproduce_paper.py"), run_name="__main__")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for selector in ("LAP", "LAPE", "MAD", "CAS"):
        assert f" {selector} " in printed
    assert f"report: {out / 'report' / 'index.html'}" in printed
    result = vn.KnockoutResult.load(out / "knockout")
    assert (
        json.loads((out / "knockout" / "manifest.json").read_text())["model"]["class"]
        == {
            "llava_next_mistral": "LlavaNextForConditionalGeneration",
            "llava_next_qwen2": "LlavaNextForConditionalGeneration",
            "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
        }[name]
    )
    assert {split_setting(selector)[0] for selector in result.selectors} >= {
        *("LAP", "LAPE", "MAD", "CAS", "random", "layer-matched CAS", "CAS (all)"),
    }
    assert [mask.repeat for mask in result.masks if (mask.selector, mask.group) == ("random", "A")] == [0, 1, 2, 3, 4]
    assert len(result.curve("CAS", "r")) == 3 * 3  # two of five shares are less than one neuron of so small a model
    assert all(compare(out).values())
