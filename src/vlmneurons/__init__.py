"""Find the MLP neurons of vision-language models that carry a group of inputs, and prove it by switching them off.

The flow is *record → select → ablate → measure*; each step is a small object that can be used alone:

    questions ──record──▶ ActivationStatistics ──Selector──▶ Selection {group: NeuronSet} ──Ablation/knockout──▶ effects

Names are loaded when they are first used, so that importing the package costs next to nothing. The one list of them is
``__init__.pyi``, in the order of the flow, which type checkers read too.
"""

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lazy_loader

from vlmneurons._version import __version__

_load, _names, _ = lazy_loader.attach_stub(__name__, __file__)


def _in_order() -> list[str]:
    """The names of the list as it orders them, which lazy_loader sorts."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    lines = (line for line in stub.body if isinstance(line, ast.ImportFrom) and line.module)
    return [name.name for line in lines for name in line.names]


__all__ = [*_in_order(), "__version__"]

if not TYPE_CHECKING:  # a type checker would take a typing mistake for a name that is found here

    def __getattr__(name: str) -> Any:
        # No folder may bear the name of a public function: importing `vlmneurons.record` would put it in its place.
        if name not in _names():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return _load(name)


def __dir__() -> list[str]:
    return sorted({*_names(), "__version__"})
