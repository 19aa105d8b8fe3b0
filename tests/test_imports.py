"""Imports point one way, and importing the package costs next to nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vlmneurons as vn

PACKAGE = Path(vn.__file__).parent

# Each floor may import those above it, and no other; parts on one floor do not import each other.
FLOORS = [
    ["errors", "_version", "progress"],
    ["checks"],
    ["files"],
    ["neurons"],
    ["questions"],
    ["statistics"],
    ["selectors"],
    ["trust"],
    ["model"],
    ["run"],
    ["recording"],
    ["study"],
    ["look"],
    ["testing", "demo"],
    ["cli"],
]
FLAT = {"__init__", "__main__", "_version", "errors", "checks", "progress", "cli"}
RANK = {name: rank for rank, names in enumerate(FLOORS) for name in names}


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports when it is itself imported: not in functions, not for type checkers."""
    found: set[str] = set()

    def look(nodes) -> None:
        for node in nodes:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                found.add(node.module)
                if node.module == "vlmneurons":
                    found.update(f"vlmneurons.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                look(node.orelse)
            elif isinstance(node, ast.ClassDef | ast.If | ast.Try | ast.With):
                look(node.body)
                look(getattr(node, "orelse", []))

    look(ast.parse(path.read_text(encoding="utf-8")).body)
    return found


def part_of(module: str) -> str | None:
    """``selectors`` for ``vlmneurons.selectors.cas``."""
    names = module.split(".")
    return names[1] if names[0] == "vlmneurons" and len(names) > 1 else None


FILES = {path: path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in sorted(PACKAGE.rglob("*.py"))}


def test_few_modules_lie_flat():
    assert {path.stem for path in PACKAGE.glob("*.py")} == FLAT


@pytest.mark.parametrize("path", [path for path, part in FILES.items() if part in RANK], ids=lambda path: path.stem)
def test_every_part_imports_only_parts_above_it(path):
    own = FILES[path]
    for module in imports_of(path):
        part = part_of(module)
        if part is None or part == own:
            continue
        assert part in RANK, f"{path.name} imports {module}, which nothing should import"
        assert RANK[part] < RANK[own], f"{path.name} imports {module}: imports point the other way"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_private_name_crosses_a_folder(path):
    own = FILES[path]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (part := part_of(node.module)) not in (None, own, "_version"):
            private = [
                name for name in [*node.module.split("."), *(alias.name for alias in node.names)] if name[0] == "_"
            ]
            assert not private, f"{path.name} imports {', '.join(private)} from {part}/"


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that are there after a statement, in a fresh interpreter."""
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    heavy = {"torch", "transformers", "nnsight", "numpy", "pandas", "matplotlib", "PIL", "scipy", "datasets"}
    assert not loaded_by("import vlmneurons; dir(vlmneurons); vlmneurons.__version__") & heavy


def test_selectors_load_neither_nnsight_nor_transformers():
    loaded = loaded_by("import vlmneurons as vn; vn.CAS, vn.ActivationStatistics, vn.NeuronSet")
    assert "torch" in loaded
    assert not loaded & {"nnsight", "transformers", "datasets", "matplotlib"}


def test_questions_load_no_torch():
    assert not loaded_by("import vlmneurons as vn; vn.QuestionSet") & {"torch", "transformers", "nnsight", "datasets"}


def test_every_public_name_exists_and_a_misspelt_one_raises():
    for name in vn.__all__:
        if name not in ("load_demo", "demo_truth"):  # these are looked at by the demo's own tests
            assert getattr(vn, name) is not None
    assert set(vn.__all__) <= set(dir(vn))
    with pytest.raises(AttributeError, match="module 'vlmneurons' has no attribute 'recrod'"):
        vn.recrod  # noqa: B018
    assert callable(vn.record)
    assert callable(vn.knockout)  # a module of that name would take its place


def test_every_error_of_the_library_is_one_kind_and_what_python_would_raise():
    from vlmneurons import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert all(issubclass(kind, vn.VLMNeuronsError) for kind in kinds)
    assert issubclass(errors.SiteError, LookupError)
    assert issubclass(errors.GroupError, KeyError)
    assert str(errors.GroupError("no 'x'")) == "no 'x'"
    assert issubclass(errors.QuestionError, ValueError)
    assert issubclass(errors.ActivationError, FloatingPointError)
