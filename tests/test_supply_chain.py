"""What the library loads is data: no pickle is read, no code comes with a file, and every dependency is needed."""

import ast
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def calls(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {one.arg: one.value for one in node.keywords}, node.lineno


def pins(which: str):
    """The exact versions in one of the two files of constraints."""
    text = (ROOT / ".ci" / f"constraints-{which}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {
        name: Version(version)
        for name, version in (re.fullmatch(r"([a-z0-9-]+)==(\S+)", line).groups() for line in lines)
    }


def test_no_module_imports_what_unpickles():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not UNSAFE & {name.split(".")[0] for name in names}, f"{path}:{node.lineno}"


def test_files_are_read_without_running_what_they_hold():
    loads = 0
    for path in SOURCES:
        for name, keywords, line in calls(path):
            place = f"{path.name}:{line}"
            if name == "torch.load":
                loads += 1
                assert ast.unparse(keywords["weights_only"]) == "True", place
            if name in ("np.load", "numpy.load"):
                assert "allow_pickle" not in keywords or ast.unparse(keywords["allow_pickle"]) == "False", place
            assert not name.endswith(("read_pickle", "to_pickle")), place
            assert name not in ("eval", "exec", "os.system", "os.popen"), place
            assert ast.unparse(keywords.get("shell", ast.Constant(False))) == "False", place
            assert ast.unparse(keywords.get("trust_remote_code", ast.Constant(False))) != "True", place
    assert loads == 1  # the LAPE authors' files


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_every_dependency_has_a_lower_bound_and_is_imported():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    for requirement in project["dependencies"]:
        name, bound, _ = requirement.partition(">=")
        assert bound, f"{requirement} has no lower bound"
        module = {"fonttools": "fontTools", "pillow": "PIL"}.get(name, name).replace("-", "_")
        # accelerate places a model on devices (device_map), torchvision is what the stock image processors need, and
        # pyarrow is how pandas writes parquet.
        used = f"import {module}" in text or f"from {module}" in text
        assert used or name in ("accelerate", "pyarrow", "torchvision"), f"{name} is not imported"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_the_oldest_versions_that_ci_installs_are_the_lower_bounds():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = pins("oldest")
    tested = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    tested += [*project["optional-dependencies"]["cvqa"], *project["optional-dependencies"]["docs"]]
    for requirement in map(Requirement, tested):
        if requirement.name == project["name"]:  # its own extras
            continue
        bounds = [Version(one.version) for one in requirement.specifier if one.operator == ">="]
        assert len(bounds) == 1, f"{requirement} needs one lower bound"
        assert pinned[requirement.name] == bounds[0], f"{requirement}: the oldest set has {pinned[requirement.name]}"


def test_the_newest_versions_that_ci_installs_are_of_the_same_packages_and_not_older():
    oldest, newest = pins("oldest"), pins("newest")
    named = {"torch", "torchvision", "transformers", "nnsight", "numpy", "pandas", "scipy", "pillow", "pytest"}
    assert named <= oldest.keys() & newest.keys()
    for name in oldest.keys() & newest.keys():
        assert newest[name] >= oldest[name], name
    assert newest["transformers"] > oldest["transformers"] > Version("5")
