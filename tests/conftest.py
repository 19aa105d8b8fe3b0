"""Shared by all tests: shape checks on, no network, and the three models of the paper saved to disk and loaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import sys

import beartype  # noqa: F401  (before nnsight, which mounts `save` on `object`: beartype's import fails after that)
import jaxtyping
import typing_extensions
from jaxtyping import _import_hook

if sys.version_info < (3, 11):  # where typing has no Unpack, beartype does not know that of typing_extensions
    typing_extensions.Unpack = type("Unpack", (), {"__class_getitem__": classmethod(lambda cls, given: object)})

# Shapes and types of every call are checked; an int passes for a float, as everywhere in Python.
_CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
if not hasattr(
    _import_hook, "_is_no_type_check"
):  # before 0.3.11, which needs Python 3.11, jaxtyping passed over this mark
    _visit = _import_hook.JaxtypingTransformer.visit_FunctionDef

    def _visit_unless_marked(transformer, node):
        marked = any(getattr(one, "id", None) == "no_type_check" for one in node.decorator_list)
        return node if marked else _visit(transformer, node)

    _import_hook.JaxtypingTransformer.visit_FunctionDef = _visit_unless_marked
    _CHECKER += " "  # another name for another way, as compiled files are kept by it
jaxtyping.install_import_hook(["vlmneurons", "tools"], _CHECKER)

from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

_FOLDERS: dict[str, Path] = {}
_MODELS: dict[tuple[str, str], Any] = {}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a tiny model's name to the folder that holds it."""

    def folder(name: str) -> Path:
        if name not in _FOLDERS:
            from vlmneurons.testing.tiny import tiny_model

            hf, processor = tiny_model(name)
            _FOLDERS[name] = tmp_path_factory.mktemp(name)
            hf.save_pretrained(_FOLDERS[name])
            processor.save_pretrained(_FOLDERS[name])
        return _FOLDERS[name]

    return folder


@pytest.fixture(scope="session")
def load(tiny_folder: Any) -> Any:
    """A function from a tiny model's name to a VLM loaded from disk; one for the whole session."""

    def loaded(name: str) -> Any:
        if (name, "vlm") not in _MODELS:
            import vlmneurons as vn

            _MODELS[name, "vlm"] = vn.VLM.from_pretrained(tiny_folder(name))
        return _MODELS[name, "vlm"]

    return loaded


@pytest.fixture(scope="session")
def load_bare(tiny_folder: Any) -> Any:
    """A function from a tiny model's name to the transformers model loaded from disk, never wrapped by anything."""

    def loaded(name: str) -> Any:
        if (name, "bare") not in _MODELS:
            from transformers import AutoModelForImageTextToText

            _MODELS[name, "bare"] = AutoModelForImageTextToText.from_pretrained(str(tiny_folder(name))).eval()
        return _MODELS[name, "bare"]

    return loaded


@pytest.fixture(params=["llava_next_mistral", "llava_next_qwen2", "qwen2_5_vl"])
def paper_model(request: pytest.FixtureRequest, load: Any) -> Any:
    """Each of the paper's three models, small, loaded from disk."""
    model = load(request.param)
    model.test_name = request.param
    return model


@pytest.fixture
def bare_model(paper_model: Any, load_bare: Any) -> Any:
    """The model of `paper_model`, never wrapped."""
    return load_bare(paper_model.test_name)


@pytest.fixture
def model(load: Any) -> Any:
    """One of the three, where any will do."""
    return load("qwen2_5_vl")


@pytest.fixture(autouse=True)
def _nothing_is_left_on_the_models() -> Any:
    """After each test the shared models have the hooks that they had before it."""

    def ours(hook: Any) -> bool:  # transformers and nnsight put hooks of their own on a model, for good
        name = getattr(getattr(hook, "func", hook), "__module__", "") or ""
        return name.startswith(("vlmneurons", "test_", "helpers"))

    if not _MODELS:  # nothing of the library is imported by a test that needs none of it
        yield
        return
    from vlmneurons.model.architectures.inside import hooks_of

    def hooks() -> dict[Any, int]:
        return {
            (key, name): sum(ours(hook) for hook in (*hooks_of(module), *module._backward_hooks.values()))
            for key, model in _MODELS.items()
            for name, module in (model.hf if key[1] == "vlm" else model).named_modules()
        }

    before = hooks()
    yield
    after = hooks()
    left = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    assert not left, f"hooks were left behind: {left}"


@pytest.fixture
def unchecked() -> Any:
    """For tests of the library's own errors about types, which the type checker of the tests would forestall."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def browser() -> Any:
    """A headless Chromium; asked for by what ``.ci/browser`` runs alone."""
    from chromium import chromium

    with chromium() as one:
        yield one
