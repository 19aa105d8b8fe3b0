"""The command line: its numbers, and kill -9, SIGTERM and ctrl-C, after which a run goes on to the same end."""

import dataclasses
import inspect
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import vlmneurons as vn
from helpers import PAPER_MODELS, often, save_questions, some_questions
from recompute_study import compare
from vlmneurons import cli
from vlmneurons.cli import exit_status, main
from vlmneurons.errors import QuestionError, SelectionError
from vlmneurons.files.stopping import _RAISED, Stopped, stop_if_asked, stopped_by_signals
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


def test_the_explorer_of_a_study_is_written_with_its_own_questions_only(arguments, undisturbed, tmp_path, capsys):
    given = arguments[1 : arguments.index("--out")] if "--out" in arguments else arguments[1:]
    asking = [one for n, one in enumerate(given) if {"--model", "--data"} & {one, given[n - 1]}]
    capsys.readouterr()
    assert main(["explore", str(undisturbed), "--out", str(tmp_path / "new"), "--images", "none"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'index.html'}\n"
    told = (tmp_path / "new" / "data" / "study.js").read_text(encoding="utf-8")
    assert all(name in told for name in vn.KnockoutResult.load(undisturbed / "knockout").selectors)
    assert main(["explore", str(undisturbed), *asking, "--out", str(tmp_path / "new"), "--answer", "text"]) == 1
    assert "is not shown beside answers given otherwise" in capsys.readouterr().err
    assert main(["explore", str(undisturbed), *asking, "--out", str(tmp_path / "new"), "--remote", "local"]) == 1
    assert "values at every token do not come back" in capsys.readouterr().err
    assert main(["explore", str(undisturbed), "--model", "demo:organism"]) == 1  # an option given is the one that holds
    assert "its configuration is" in capsys.readouterr().err
    assert not (undisturbed / "explorer").exists()


def test_a_report_that_is_written_again_says_what_the_studys_own_does(undisturbed, tmp_path, capsys):
    def told(page):
        return re.sub(r'src="data:[^"]+"', "", page.read_text(encoding="utf-8"))

    own, new = undisturbed / "report", tmp_path / "again"
    assert main(["report", "--run", str(undisturbed), "--out", str(new)]) == 0
    assert "shows no questions" not in capsys.readouterr().err
    assert told(own / "index.html") == told(new / "index.html")
    for path in sorted((own / "tables").iterdir()):
        assert (new / "tables" / path.name).read_bytes() == path.read_bytes()
    head = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", told(new / "index.html")))
    space = vn.Selection.load(undisturbed / "selections" / "CAS.safetensors").space
    assert f" of {len(space):,} (" in head["Neurons a mask"]
    assert head["Site"].startswith("language.gate, ")
    assert head["Tokens counted"] == "content"
    assert head["Switched off"] == "at post: set to 0"
    assert head["Split"].startswith("50 % of the questions choose neurons")
    assert head["Seeds"].startswith("split, balancing and shuffled labels: 0")
    assert main(["report", "--run", str(undisturbed), "--out", str(new), "--images", "none"]) == 0
    assert "data:image/webp" not in (new / "index.html").read_text(encoding="utf-8")


def test_the_explorer_of_a_study_that_does_not_say_what_was_asked_needs_both_options(undisturbed, tmp_path, capsys):
    other = tmp_path / "study"
    shutil.copytree(undisturbed, other)
    asked = json.loads((other / "command.json").read_text(encoding="utf-8"))
    assert (asked["seed"], asked["language"], asked["general"]) == (0, "english", None)
    (other / "command.json").unlink()
    assert main(["explore", str(other), "--data", asked["data"]]) == 1
    assert capsys.readouterr().err == (
        f"error: {other} does not say what was asked, as studies of the command line do: give --model and --data\n"
    )
    how = ["--model", asked["model"], "--data", asked["data"], "--images", "none", "--quiet"]
    assert main(["explore", str(other), *how]) == 0
    assert capsys.readouterr().out == f"{other / 'explorer' / 'index.html'}\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("selections/CAS.safetensors", None, "{} has no neurons of CAS in selections/: finish the study first"),
        ("protocol.json", None, "{} is no study's folder: it has no protocol.json"),
        ("protocol.json", "{", "{}/protocol.json does not hold the settings of a study: "),
        ("protocol.json", '{"protocol": {"later": 1}}', "{}/protocol.json does not hold the settings of a study: "),
        ("command.json", "{", "{}/command.json is damaged: "),
        ("knockout/knockout.json", None, "{}/knockout does not hold a knockout result: "),
    ],
)
def test_the_explorer_of_a_study_that_lacks_a_file_is_refused_in_a_line_before_the_model_is_loaded(
    undisturbed, tmp_path, monkeypatch, capsys, file, content, message
):
    monkeypatch.setattr(cli, "open_model", lambda *_, **__: pytest.fail("the model was loaded"))
    other = tmp_path / "study"
    shutil.copytree(undisturbed, other)
    (other / file).unlink()
    if content is not None:
        (other / file).write_text(content, encoding="utf-8")
    capsys.readouterr()
    assert main(["explore", str(other)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message.format(other)}")
    assert error.count("\n") == 1


def test_counts_that_an_explorer_cannot_be_made_of_are_refused_before_the_model_is_loaded(
    undisturbed, monkeypatch, capsys
):
    def group_by(*_, **__):
        raise SelectionError("no question has a label")

    monkeypatch.setattr(cli, "open_model", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(vn.ItemStatistics, "group_by", group_by)
    capsys.readouterr()
    assert main(["explore", str(undisturbed)]) == 1
    assert capsys.readouterr().err == "error: no question has a label\n"


def test_the_command_killed_at_ten_random_moments_ends_with_the_same_tables(arguments, undisturbed, tmp_path):
    folder, generator = tmp_path / "run", random.Random(1)
    seen = set()
    for number in range(often(10, 30)):
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
    assert not _RAISED
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    stop_if_asked()


def _ask_in_vain():
    _RAISED.append(signal.SIGTERM)  # as the handler leaves it where what it raises comes to nothing
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
        json.loads((out / "knockout" / "manifest.json").read_text())["setting"]["model"]
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


# --- what is refused, and when ---


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""

    def refuse(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(vn.VLM, "from_pretrained", refuse)


@pytest.fixture
def places(tmp_path, tiny_folder, monkeypatch):
    """An empty working folder with data, a model, and a file that is neither."""
    (tmp_path / "data").mkdir()
    save_questions(tmp_path / "data", 40)
    (tmp_path / "model").symlink_to(tiny_folder("qwen2_5_vl"))
    (tmp_path / "file").write_text("nothing")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)


MODEL, DATA, OUT, VLLM = ["--model", "./model"], ["--data", "./data"], ["--out", "out"], ["--engine", "vllm"]
STUDY = ["study", *MODEL, *DATA, *OUT]
REFUSED = {
    "no data": (["study", *MODEL, *OUT], 2, "Missing option '--data'"),
    "no model": (["record", *DATA, *OUT], 2, "Missing option '--model'"),
    "an option that is misspelt": (["study", "--modle", "x"], 2, "--modle Did you mean --max-model-len, --model"),
    "a command that is misspelt": (["studdy"], 2, "No such command 'studdy'. Did you mean 'study'?"),
    "a number that is none": ([*STUDY, "--batch-size", "many"], 2, "Invalid value for '--batch-size': "),
    "a list of none": ([*STUDY, "--sizes", "5", "x"], 2, "'--sizes': invalid literal for int() with base 10: 'x'"),
    "an option without its value": ([*STUDY, "--seed"], 2, "Option '--seed' requires an argument."),
    "an argument too many": ([*STUDY, "more"], 2, "Got unexpected extra argument"),
    "a selector that is misspelt": (
        [*STUDY, "--selectors", "CAS", "LAAP"],
        2,
        "'--selectors': 'LAAP' is none of LAP, LAPE, MAD, CAS, MAD-mean; did you mean LAP?",
    ),
    "a rule of tokens in capitals": ([*STUDY, "--tokens", "Content"], 2, "did you mean content?"),
    "a way to answer": ([*STUDY, "--answer", "letter"], 2, "'letter' is none of letters, generate, text; did you mean"),
    "a condition": (["select", "--condition", "right", *OUT, "--items", "x"], 2, "none of correct, wrong, all"),
    "a share outside": ([*STUDY, "--share", "0"], 1, "error: share 0.0 is outside (0, 1)"),
    "a share of NaN": (["record", *STUDY[1:], "--share", "nan"], 1, "error: share nan is outside (0, 1)"),
    "a batch of none": (["record", *STUDY[1:], "--batch-size", "0"], 1, "error: batch_size 0 is less than 1"),
    "a fraction": ([*STUDY, "--fraction", "2"], 1, "error: fraction 2.0 is outside (0, 1]"),
    "a fraction of a sweep": ([*STUDY, "--fractions", "0.1", "-3"], 1, "error: fraction -3.0 is outside (0, 1]"),
    "a fraction of a selection": (["select", "--fraction", "2", *OUT, "--items", "x"], 1, "fraction"),
    "a main selector that is left out": (
        [*STUDY, "--selectors", "MAD"],
        1,
        "main='CAS' is not among the selectors MAD",
    ),
    "data that is not there": (
        ["study", *MODEL, *OUT, "--data", "./dta"],
        1,
        "error: --data ./dta: there is no such file or folder",
    ),
    "data that holds none": (["study", *MODEL, *OUT, "--data", "./empty"], 1, "empty"),
    "data of another kind": (["study", *MODEL, *OUT, "--data", "./file"], 1, "file"),
    "general data that is not there": ([*STUDY, "--general", "./dta"], 1, "--data ./dta: there is no such"),
    "groups of general data that is not given": ([*STUDY, "--general-by", "topic"], 1, "--general, which is not given"),
    "a language of data that has one": ([*STUDY, "--language", "local"], 1, "./data is not CVQA: it has one language"),
    "a revision of a folder": (["record", *STUDY[1:], "--data-revision", "abc"], 1, "one language and no revision"),
    "groups by no column": ([*STUDY, "--group-by", "planet"], 1, "planet"),
    "too many per group": ([*STUDY, "--per-group", "1000"], 1, "1000"),
    "groups that are too small": ([*STUDY, "--minimum", "1000"], 1, "at least 1000 questions a group identify neurons"),
    "a model that is not there": (["study", *DATA, *OUT, "--model", "./modle"], 1, "--model ./modle: there is no such"),
    "a model that is a file": (["record", *DATA, *OUT, "--model", "./file"], 1, "is no folder with a config.json"),
    "a model that is no folder of one": (["record", *DATA, *OUT, "--model", "empty"], 1, "is no folder with a config"),
    "a dtype that is misspelt": ([*STUDY, "--dtype", "flaot16"], 1, "'flaot16' does not exist; did you mean float16?"),
    "a dtype of the demo": (["study", "--model", "demo", *DATA, *OUT, "--dtype", "float16"], 1, "leave out --dtype"),
    "a device of a model elsewhere": ([*STUDY, "--remote", "--device-map", "auto"], 1, "not for --remote"),
    "an engine that is misspelt": ([*STUDY, "--engine", "vlm"], 2, "none of transformers, vllm; did you mean vllm?"),
    "ranks of no engine": ([*STUDY, "--tensor-parallel-size", "2"], 1, "--tensor-parallel-size is of --engine vllm"),
    "an engine with no ranks": ([*STUDY, *VLLM, "--tensor-parallel-size", "0"], 1, "--tensor-parallel-size 0 is less"),
    "an engine of the demo": (["record", "--model", "demo", *DATA, *OUT, *VLLM], 1, "runs here: leave out --engine"),
    "a device of an engine": ([*STUDY, *VLLM, "--device-map", "auto"], 1, "vLLM places the weights itself"),
    "an engine elsewhere": (["record", *STUDY[1:], *VLLM, "--remote"], 1, "held by one of the two; leave one out"),
    "a folder that is a file": (["study", *MODEL, *DATA, "--out", "file"], 1, "error: [Errno 17] File exists: 'file'"),
    "a run that is not there": (["report", "--run", "nowhere"], 1, "error: "),
    "a recording that is not there": (["select", "--items", "nowhere", *OUT], 1, "error: "),
    "a dtype of a model without weights": (["check", "llava_next", "--dtype", "float16"], 2, "which only --run loads"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("no_model", "places")
def test_what_can_be_refused_is_refused_in_a_line_before_the_model_is_loaded(case, capsys):
    arguments, status, said = REFUSED[case]
    assert main(arguments) == status
    told = capsys.readouterr()
    assert said in told.err
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    assert told.out == ""


def test_a_model_that_transformers_cannot_load_is_told_in_a_line(places, capsys):
    Path("empty/config.json").write_text('{"model_type": "bert"}')
    assert main(["record", *DATA, *OUT, "--model", "./empty"]) == 1
    assert capsys.readouterr().err.startswith("error: ./empty cannot be loaded. ")
    assert main(["record", *DATA, *OUT, "--model", "demo:organsim"]) == 1
    assert "there is no demo model 'organsim'; the demo models are 'natural', 'organism'" in capsys.readouterr().err


def test_choices_and_defaults_are_those_of_the_library():
    from vlmneurons import cli
    from vlmneurons.model.tokens import TOKEN_RULES
    from vlmneurons.recording.record import CONDITIONS
    from vlmneurons.study.protocol import SELECTORS

    assert tuple(SELECTORS) == cli.STUDIED
    assert (cli.TOKENS, cli.CONDITIONS) == (TOKEN_RULES, CONDITIONS)
    options = [*inspect.signature(cli.study).parameters.values(), *inspect.signature(cli._asking).parameters.values()]
    defaults = {one.name: one.default for one in options}
    for field in dataclasses.fields(vn.Protocol):
        assert defaults[field.name] in (None, field.default), field.name


@pytest.mark.usefixtures("unchecked")
def test_options_that_take_several_values_take_none_one_or_many_with_spaces_or_commas(monkeypatch, places):
    seen = []
    monkeypatch.setattr(
        vn, "run_study", lambda *given, **how: seen.append((given[3], how)) or SimpleNamespace(page=None)
    )
    monkeypatch.setattr(vn.VLM, "from_pretrained", lambda *_, **__: SimpleNamespace(name="model"))
    assert main([*STUDY, "--sizes", "1", "2", "--alphas", "-1", "-.5", "--fractions=0.1,0.2", "--conditions"]) == 0
    assert main([*STUDY, "--remote", "--selectors", "CAS"]) == 0
    assert main([*STUDY, "--remote", "http://host", "--quiet"]) == 0
    protocol = seen[0][0]
    assert (protocol.sizes, protocol.alphas, protocol.fractions) == ((1, 2), (-1.0, -0.5), (0.1, 0.2))
    assert protocol.conditions == ()
    assert protocol.selectors == vn.Protocol().selectors
    assert [how["remote"] for _, how in seen] == [False, True, "http://host"]
    assert [how["progress"] for _, how in seen] == [True, True, False]
    assert seen[1][0].selectors == ("CAS",)


def test_the_help_of_every_command_comes_without_loading_anything_heavy():
    code = (
        "import sys; from vlmneurons.cli import main;"
        "[main([*name.split(), '--help']) for name in ('', 'study', 'record', 'select', 'report', 'check')];"
        "[main([name, '--help']) for name in ('knockout', 'join')];"
        "main(['--version']); assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for option in ("--per-group", "--part", "--condition", "--run", "--fractions [FLOAT …]"):
        assert option in done.stdout
    assert done.stdout.endswith(f"vlmneurons {vn.__version__}\n")
    assert done.stderr == ""


def test_tables_are_printed_as_in_a_report_without_rounding_noise_and_with_small_p_as_such():
    table = pd.DataFrame(
        {
            "selector": ["CAS", "MAD"],
            "n": [128, 128],
            "self_effect": [-0.4375, 4.13e-20],
            "gap": [-2e-17, float("nan")],
            "gap_p": [0.00002, 0.51234],
        }
    )
    assert [line.split() for line in cli._as_text(table).splitlines()] == [
        ["selector", "n", "self_effect", "gap", "gap_p"],
        ["CAS", "128", "−0.438", "0.000", "<", "0.001"],
        ["MAD", "128", "0.000", "–", "0.512"],
    ]


def test_neurons_are_by_default_not_tried_on_the_questions_that_they_are_found_on():
    given = {"share": 0.5, "seed": 0, "answer": None}
    sides = [inspect.signature(command).parameters["side"].default for command in (cli.record, cli.knockout)]
    found_on, tried_on = ({item.id for item in cli._one_side(some_questions(12), side, given)} for side in sides)
    assert found_on
    assert tried_on
    assert not found_on & tried_on
