"""The wheel holds what is used at run time, and no more."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by the project's own backend, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_the_package_and_nothing_that_only_makes_its_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    code = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py*") if "__pycache__" not in path.parts}
    assert {name for name in names if name.endswith((".py", ".pyi"))} == code
    assert {name for name in names if name.startswith("vlmneurons/demo/") and name.endswith(".py")} == {
        "vlmneurons/demo/__init__.py"
    }
    outside = {name.partition("/")[0] for name in names}
    assert {name for name in outside if not name.endswith(".dist-info")} == {"vlmneurons"}
    assert not [name for name in names if name.endswith(("sprites.zip", "report.md"))]
    pages = {"captions.ini", "index.html", "page.html", "report.html", "neuron.html", "style.css", "explorer.js"}
    assert {f"vlmneurons/look/static/{name}" for name in pages} <= names
    assert "vlmneurons/demo/pictures/NOTICE.md" in names  # the credits travel with the pictures
    assert wheel.stat().st_size <= 10 * MEGABYTE


def test_the_demo_and_the_command_line_work_from_the_wheel_alone(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = (
        "import vlmneurons as vn; from vlmneurons.cli import main; print(vn.__file__);"
        "model, questions = vn.load_demo('organism'); vn.demo_truth(); print(len(questions)); main(['--help'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    file, number, *usage = done.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path / "installed")
    assert number == "1392"
    assert "vlmneurons" in "".join(usage)
