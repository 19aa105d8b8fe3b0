"""The examples are scripts that run as they are."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
from PIL import Image

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
        for picture in ("effects", "layers"):
            with Image.open(tmp_path / "out" / f"{name}-{picture}.png") as image:
                assert min(image.size) > 400
    organism = pd.read_csv(tmp_path / "out" / "organism.csv").set_index(["selector", "group"])
    assert organism.loc[("CAS", "all"), "self_effect"] < -0.6
