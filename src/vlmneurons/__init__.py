"""Find the MLP neurons of vision-language models that carry a group of inputs, and prove it by switching them off.

The flow is *record → select → ablate → measure*; each step is a small object that can be used alone:

    questions ──record──▶ ActivationStatistics ──Selector──▶ Selection {group: NeuronSet} ──Ablation/knockout──▶ effects

Names are loaded when they are first used, so that importing the package costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vlmneurons._version import __version__

if TYPE_CHECKING:
    from vlmneurons.ablation import Ablation
    from vlmneurons.answers import AnswerReader, Generate, Letters, TextLikelihood, parse_answer
    from vlmneurons.architectures import Architecture, register_architecture
    from vlmneurons.browser import inspect_neuron
    from vlmneurons.demo import demo_truth, load_demo
    from vlmneurons.errors import VLMNeuronsError
    from vlmneurons.items import ItemStatistics
    from vlmneurons.model import VLM
    from vlmneurons.neurons import NeuronSet, Selection
    from vlmneurons.plots import plot_layers, plot_matrix
    from vlmneurons.questions import Question, QuestionSet
    from vlmneurons.recording import Recorder, record, record_items
    from vlmneurons.selectors import (
        CAS,
        LAP,
        LAPE,
        MAD,
        ConAct,
        LayerMatchedRandom,
        MostActive,
        RandomNeurons,
        Selector,
    )
    from vlmneurons.sharing import from_hub, push_to_hub
    from vlmneurons.sites import NeuronSpace, Site
    from vlmneurons.statistics import ActivationStatistics
    from vlmneurons.study import KnockoutResult, knockout
    from vlmneurons.trust import (
        agreement,
        layer_profile,
        null_distribution,
        overlap_by_layer,
        sample_sizes,
        selection_strength,
        stability,
    )

_PLACES = {
    "ablation": ("Ablation",),
    "answers": ("AnswerReader", "Generate", "Letters", "TextLikelihood", "parse_answer"),
    "architectures": ("Architecture", "register_architecture"),
    "browser": ("inspect_neuron",),
    "demo": ("demo_truth", "load_demo"),
    "errors": ("VLMNeuronsError",),
    "items": ("ItemStatistics",),
    "model": ("VLM",),
    "neurons": ("NeuronSet", "Selection"),
    "plots": ("plot_layers", "plot_matrix"),
    "questions": ("Question", "QuestionSet"),
    "recording": ("Recorder", "record", "record_items"),
    "selectors": (
        "CAS",
        "LAP",
        "LAPE",
        "MAD",
        "ConAct",
        "LayerMatchedRandom",
        "MostActive",
        "RandomNeurons",
        "Selector",
    ),
    "sharing": ("from_hub", "push_to_hub"),
    "sites": ("NeuronSpace", "Site"),
    "statistics": ("ActivationStatistics",),
    "study": ("KnockoutResult", "knockout"),
    "trust": (
        "agreement",
        "layer_profile",
        "null_distribution",
        "overlap_by_layer",
        "sample_sizes",
        "selection_strength",
        "stability",
    ),
}
_MODULES = ("errors", "testing")
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}

__all__ = [  # noqa: RUF022 (in the order of the flow)
    "VLM",
    "Site",
    "NeuronSpace",
    "NeuronSet",
    "Selection",
    "Question",
    "QuestionSet",
    "load_demo",
    "demo_truth",
    "record",
    "Recorder",
    "ActivationStatistics",
    "record_items",
    "ItemStatistics",
    "Selector",
    "CAS",
    "ConAct",
    "LAP",
    "LAPE",
    "MAD",
    "MostActive",
    "RandomNeurons",
    "LayerMatchedRandom",
    "Ablation",
    "knockout",
    "KnockoutResult",
    "stability",
    "null_distribution",
    "selection_strength",
    "sample_sizes",
    "agreement",
    "layer_profile",
    "overlap_by_layer",
    "AnswerReader",
    "Letters",
    "Generate",
    "TextLikelihood",
    "parse_answer",
    "plot_matrix",
    "plot_layers",
    "inspect_neuron",
    "push_to_hub",
    "from_hub",
    "Architecture",
    "register_architecture",
    "VLMNeuronsError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # No module may bear the name of a public function: importing `vlmneurons.record` would put the module in its place.
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"vlmneurons.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"vlmneurons.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
