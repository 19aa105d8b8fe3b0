"""Two processes of a torchrun give what one process gives, to the last integer; and the command line around them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vlmneurons as vn
from helpers import save_questions, some_questions
from vlmneurons.errors import VLMNeuronsError
from vlmneurons.run.processes import Processes, current_processes
from vlmneurons.statistics.items import ItemStatistics
from vlmneurons.study.protocol import share_of
from vlmneurons.study.result import KnockoutResult

SOURCE = Path(vn.__file__).parents[1]
TINY = {
    "fraction": "0.05",
    "fractions": "0.1",
    "alphas": "0.5",
    "sizes": "1",
    "repeats": "1",
    "permutations": "0",
    "minimum": "1",
    "batch-size": "4",
    "seed": "0",
}


def command(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    """Run ``python -m vlmneurons``, alone or under torchrun."""
    started = [sys.executable, "-m", "vlmneurons"]
    if processes > 1:
        started = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        started += ["-m", "vlmneurons"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*started, *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a table and pictures, two groups."""
    folder = tmp_path_factory.mktemp("data")
    save_questions(folder, 32)
    return folder


def study(model, data, out, processes=1):
    settings = [part for name, value in TINY.items() for part in (f"--{name}", value)]
    done = command(
        *[
            "study",
            "--model",
            str(model),
            "--data",
            str(data),
            "--out",
            str(out),
            "--quiet",
            "--selectors",
            "MAD",
            "CAS",
        ],
        *["--conditions", "all", *settings],
        processes=processes,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_two_processes_give_the_same_study_as_one(tiny_folder, data, tmp_path):
    model = tiny_folder("llava_next_qwen2")
    one, two = tmp_path / "one", tmp_path / "two"
    output = study(model, data, one).stdout
    assert "self_effect" in output
    assert str(one / "report" / "index.html") in output
    study(model, data, two, processes=2)
    first, second = ItemStatistics.load(one / "items", verify=True), ItemStatistics.load(two / "items", verify=True)
    for name in ("items.bin", "positive.bin"):
        assert (one / "items" / name).read_bytes() == (two / "items" / name).read_bytes()
    assert first.group_by() == second.group_by()
    for name in ("knockout", "blind", "options-only"):
        a, b = KnockoutResult.load(one / name), KnockoutResult.load(two / name)
        assert (a.ids, a.masks) == (b.ids, b.masks)
        assert np.array_equal(a.chosen, b.chosen)
        assert np.array_equal(a.margins, b.margins)
        for table in ("table.csv", "summary.csv"):
            assert (one / name / table).read_bytes() == (two / name / table).read_bytes()
    for table in sorted((one / "report" / "tables").glob("*.csv")):
        assert table.read_bytes() == (two / "report" / "tables" / table.name).read_bytes()
    page = (one / "report" / "index.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    for name in ("accuracy", "effects", "flips", "layers", "matrix-cas", "curve-cas-r", "curve-cas-alpha"):
        names = [f"{name}.png", f"{name}.svg"]
        assert name.startswith("curve") or all((one / "report" / "figures" / file).stat().st_size for file in names)


def test_whole_batches_are_dealt_out_and_stay_the_same():
    questions = some_questions(23)
    for count in (1, 2, 3, 7):
        shares = [share_of(questions, 4, Processes(rank, count)) for rank in range(count)]
        assert sorted(q.id for share in shares for q in share) == sorted(q.id for q in questions)
        for share in shares:
            own = [q.id for q in share]
            batches = [[q.id for q in questions[start : start + 4]] for start in range(0, 23, 4)]
            assert [own[start : start + 4] for start in range(0, len(own), 4)] == [b for b in batches if b[0] in own]


LITTLE_MEMORY = """
import json, sys
from pathlib import Path
import torch
import vlmneurons as vn
from vlmneurons.run.processes import current_processes
from vlmneurons.study.protocol import record_shared

model, data, out = vn.VLM.from_pretrained(sys.argv[1]), vn.QuestionSet.from_folder(sys.argv[2]), Path(sys.argv[3])
processes = current_processes()
forward, most = model.hf.forward, [3, 2][processes.rank]

def failing(*args, **kwargs):
    if len(kwargs["input_ids"]) > most:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return forward(*args, **kwargs)

items = record_shared(model, data, out / "items", processes, batch_size=4, progress=False)
model.hf.forward = failing
halved = record_shared(model, data, out / "halved", processes, batch_size=4, progress=False)
assert halved.group_by(condition="all") == items.group_by(condition="all")
masks = {"x": vn.NeuronSet(model.space(), [1, 70])}
result = vn.knockout(model, data, masks, batch_size=4, progress=False, folder=out / "study", distributed=True)
Path(f"{out}/rank-{processes.rank}.json").write_text(json.dumps(result.provenance["halved"]))
"""


def test_what_each_process_learns_about_memory_is_in_the_whole_result(tiny_folder, data, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LITTLE_MEMORY)
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    model = str(tiny_folder("llava_next_qwen2"))
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*started, model, str(data), str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    each = [{"from": 4, "to": 2, "first": first} for first in ("q0", "q4")]  # the first batch of either process
    for rank in (0, 1):
        assert json.loads((tmp_path / f"rank-{rank}.json").read_text()) == each
    assert KnockoutResult.load(tmp_path / "study").provenance["halved"] == each
    recorded = ItemStatistics.load(tmp_path / "halved", verify=True)
    assert recorded.provenance["halved"] == each
    manifest = json.loads((tmp_path / "halved" / "manifest.json").read_text())
    assert "halved" not in manifest["provenance"]  # or the same call could not go on with it
    for name in ("items.bin", "positive.bin"):
        assert (tmp_path / "items" / name).stat().st_size == (tmp_path / "halved" / name).stat().st_size


def test_a_process_leaves_the_others_in_order_when_it_ends(tmp_path):
    # Left as it is at Python's end, the group's threads could abort a process that had done its work (SIGABRT), and
    # torchrun would then kill the one that still wrote the report. What is registered first is called last.
    script = tmp_path / "end.py"
    script.write_text(
        "import atexit, os, pathlib, torch.distributed as dist\n"
        "said = pathlib.Path(os.environ['RANK'])\n"
        "atexit.register(lambda: said.write_text(f'{said.read_text()} {dist.is_initialized()}'))\n"
        "from vlmneurons.run.processes import current_processes\n"
        "processes = current_processes()\n"
        "assert processes.gather(processes.rank) == [0, 1]\n"
        "said.write_text(str(dist.is_initialized()))\n"
    )
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(started, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["True False"] * 2


def test_one_process_needs_no_messages(monkeypatch):
    alone = current_processes()
    assert alone == Processes(0, 1)
    assert alone.first
    assert alone.gather("x") == ["x"]
    alone.wait()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(VLMNeuronsError, match="WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT is not set"):
        current_processes()
