"""The examples are scripts that run as they are."""

import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
from PIL import Image

from tools.page_outputs import alike, alike_pictures

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str, cwd: Path) -> str:
    """What an example prints, run in a process of its own as a user would."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], cwd=cwd, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_quickstart_writes_a_table_and_two_pictures_for_each_model(tmp_path):
    printed = run("quickstart.py", "--out", "out", cwd=tmp_path)
    assert "Tables and pictures are in out" in printed
    for name in ("natural", "organism"):
        table = pd.read_csv(tmp_path / "out" / f"{name}.csv").set_index(["selector", "group"])
        cas, random = table.loc[("CAS", "all")], table.loc[("random", "all")]
        assert cas["self_margin"] < -0.5 < random["self_margin"]
        assert abs(cas["cross_effect"]) < 0.02
        kept = EXAMPLES.parent / "docs" / "images" / f"{name}-effects.png"  # README and front page name the command
        assert alike_pictures(kept, tmp_path / "out" / f"{name}-effects.png")
        for picture in ("effects", "layers"):
            with Image.open(tmp_path / "out" / f"{name}-{picture}.png") as image:
                assert min(image.size) > 400
    organism = pd.read_csv(tmp_path / "out" / "organism.csv").set_index(["selector", "group"])
    assert organism.loc[("CAS", "all"), "self_effect"] < -0.6


def test_a_neuron_is_traced(tmp_path):
    printed = run("trace_a_neuron.py", cwd=tmp_path)
    assert "language.layers." in printed
    assert printed.count("log-probability of") == 4
    clean, off = (
        float(part.split()[0])
        for part in next(
            line for line in printed.splitlines() if line.startswith(f"log-probability of {right_of(printed)!r}")
        )
        .split(": ")[1]
        .split(", and ")
    )
    assert off < clean


def right_of(printed: str) -> str:
    """The right option that a script names."""
    return printed.split("right: ")[1].splitlines()[0]


def test_a_selector_of_ones_own_finds_planted_neurons(tmp_path):
    printed = run("custom_selector.py", "--questions", "8", cwd=tmp_path)
    assert "WorstRival meets the contract of a selector" in printed
    found = {
        line.split("(")[0]: int(line.split(": ")[1].split()[0]) for line in printed.splitlines() if "planted" in line
    }
    assert found["CAS"] > 40
    assert found["WorstRival"] > 40
    assert found["RandomNeurons"] < 10


def test_an_architecture_of_ones_own_is_registered_and_passes_the_contract(tmp_path):
    printed = run("custom_architecture.py", cwd=tmp_path)
    assert "register_architecture(" in printed  # the error shows the call to fill in
    assert "language: 4 layers x 64 = 256 neurons" in printed


def test_generation_is_steered(tmp_path):
    printed = run("steer_generation.py", "--questions", "4", cwd=tmp_path)
    right = {line.split(":")[0]: line.split("Egypt ")[1].split()[0] for line in printed.splitlines() if "alpha" in line}
    assert int(right["alpha -1.0"]) < int(right["alpha +0.0"])
    assert len({line.split("Japan ")[1].split()[0] for line in printed.splitlines() if "alpha" in line}) <= 2


def test_vision_neurons_are_selected_and_ablated(tmp_path):
    printed = run("vision_neurons.py", "--questions", "4", cwd=tmp_path)
    assert "CAS" in printed
    assert "random" in printed


def test_wordings_are_compared(tmp_path):
    printed = run("language_against_culture.py", "--questions", "3", cwd=tmp_path)
    values = {line.strip().split("  ")[0]: float(line.split()[-2]) for line in printed.splitlines() if "(0." in line}
    assert values["English"] == 1.0
    assert 0 <= values["local, words only"] < 1


def test_a_neurons_page_is_written(tmp_path):
    printed = run("inspect_neuron.py", "--out", "out", "--questions", "3", cwd=tmp_path)
    assert "The page is out/neuron.html" in printed
    assert (tmp_path / "out" / "neuron.html").stat().st_size > 20_000
    with Image.open(tmp_path / "out" / "neuron.png") as image:
        assert min(image.size) > 400


def table_of(printed: str) -> dict[tuple[str, str], list[float]]:
    """The printed effects: clean, self and cross, by selector and group."""
    rows = re.findall(r"^ *(CAS|random) +(\w+) +\d+ +([+-]\S+) +([+-]\S+) +([+-]\S+)$", printed, re.MULTILINE)
    return {(selector, group): [float(value) for value in values] for selector, group, *values in rows}


def test_a_study_of_sounds_runs_from_files_to_effects(tmp_path):
    printed = run("sounds.py", "--out", "out", cwd=tmp_path)
    assert len(list((tmp_path / "out").glob("*.wav"))) == 48
    assert len(pd.read_csv(tmp_path / "out" / "questions.csv")) == 48
    assert printed.count("CAS found 15 of 15 planted neurons") == 3  # by content, by the sound's tokens, by the words'
    effects = table_of(printed)
    for group in ("Cello", "Violin", "Flute", "all"):
        assert effects["CAS", group] == [1, -1, 0]
        assert effects["random", group] == [1, 0, 0]


def test_a_study_of_videos_runs_from_frames_to_effects(tmp_path):
    printed = run("videos.py", cwd=tmp_path)
    assert "a video: (4, 16, 16, 3) uint8" in printed
    assert "CAS found 15 of 15 planted" in printed
    effects = table_of(printed)
    for group in ("Dusk", "Ember", "Leaf", "all"):
        assert effects["CAS", group] == [1, -1, 0]
        assert effects["random", group] == [1, 0, 0]
    assert float(printed.split("right of stills: ")[1].split()[0]) < 0.5  # one frame says little


CHECKED = """
import builtins, dis, runpy, sys, types

def loaded(code):
    yield from (one.argval for one in dis.get_instructions(code) if one.opname == "LOAD_GLOBAL")
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from loaded(inner)

for path in sys.argv[1:]:
    there = runpy.run_path(path, run_name="checked")
    with open(path, encoding="utf-8") as file:
        used = set(loaded(compile(file.read(), path, "exec")))
    print(path, sorted(used - set(there) - set(vars(builtins))))
"""


def test_the_page_on_selectors_shows_what_its_command_prints_and_draws(tmp_path):
    docs = EXAMPLES.parent / "docs"
    page = (docs / "selectors.md").read_text(encoding="utf-8")
    (seeds,) = re.findall(r"`python benchmarks/selector_recovery.py --seeds (\d) --write`", page)
    command = runpy.run_path(str(EXAMPLES.parent / "benchmarks" / "selector_recovery.py"))
    results = {name: list(command["sweep"](name, int(seeds))) for name in command["SWEEPS"]}
    shown = re.search(r"<!-- printed -->\n(.*)<!-- /printed -->", page, re.DOTALL)[1]
    printed = command["tables"](results, command["on_a_model"]())
    rows = zip(shown.strip().splitlines(), printed.splitlines(), strict=True)
    assert [pair for pair in rows if not alike(*pair)] == []
    command["picture"](results).savefig(tmp_path / "drawn.png", dpi=200)
    assert alike_pictures(docs / "selector_recovery.png", tmp_path / "drawn.png")


def test_every_benchmark_finds_the_names_it_uses():
    folder = EXAMPLES.parent / "benchmarks"
    paths = sorted(str(path) for path in folder.glob("*.py") if path.name != "peer_nnterp.py")  # runs beside a peer
    done = subprocess.run([sys.executable, "-c", CHECKED, *paths], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{path} []" for path in paths]


def test_the_gpu_check_runs_on_a_cpu_and_finds_nothing_wrong(tmp_path):
    script = EXAMPLES.parent / "benchmarks" / "cuda.py"
    command = [sys.executable, str(script), "--device", "cpu", "--small"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("  right: ") for line in lines) == 8
    assert lines[-1] == "0 wrong"
    titles = ["Identity", "Beside the forward", "Counting", "Recording", "Masks", "Out of memory", "vLLM beside it"]
    assert [line for line in lines if line in titles] == 2 * titles
    if find_spec("vllm") is None:
        assert sum("  not measured: engine='vllm' needs vLLM, which is not installed" in line for line in lines) == 2
