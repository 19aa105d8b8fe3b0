"""Find the MLP neurons of vision-language models that carry a group of inputs, and prove it by switching them off.

The flow is *record → select → ablate → measure*; each step is a small object that can be used alone:

    questions ──record──▶ ActivationStatistics ──Selector──▶ Selection {group: NeuronSet} ──Ablation/knockout──▶ effects

Names are loaded when they are first used, so that importing the package costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vlmneurons._version import __version__

if TYPE_CHECKING:
    from vlmneurons import errors as errors
    from vlmneurons import testing as testing
    from vlmneurons.ablation import Ablation
    from vlmneurons.answers import AnswerReader, Generate, Letters, LogitReader, TextLikelihood, parse_answer
    from vlmneurons.architectures import Architecture, register_architecture
    from vlmneurons.attribution import attribute
    from vlmneurons.browser import inspect_neuron
    from vlmneurons.cvqa import load_cvqa
    from vlmneurons.demo import demo_truth, load_demo
    from vlmneurons.errors import VLMNeuronsError
    from vlmneurons.items import GroupedItems, ItemStatistics
    from vlmneurons.model import VLM
    from vlmneurons.neurons import NeuronSet, Selection
    from vlmneurons.plots import plot_layers, plot_matrix
    from vlmneurons.protocol import Protocol, run_study
    from vlmneurons.questions import Question, QuestionSet
    from vlmneurons.recording import Recorder, record, record_items
    from vlmneurons.screening import screen
    from vlmneurons.selectors import (
        CAS,
        CNA,
        LAP,
        LAPE,
        MAD,
        Attribution,
        AveragePrecision,
        ConAct,
        Conditions,
        CRFusion,
        IntegratedGradients,
        Joint,
        LayerMatchedRandom,
        MostActive,
        Overlap,
        RandomNeurons,
        Selector,
        universal_neurons,
    )
    from vlmneurons.sharing import from_hub, push_to_hub
    from vlmneurons.sites import NeuronSpace, Site
    from vlmneurons.statistics import ActivationStatistics, AttributionStatistics
    from vlmneurons.study import Intervention, KnockoutResult, knockout
    from vlmneurons.trust import (
        agreement,
        layer_counts,
        layer_profile,
        null_distribution,
        overlap_by_layer,
        relatedness,
        resampled_selections,
        sample_sizes,
        selection_strength,
        stability,
    )

_PLACES = {
    "ablation": ("Ablation",),
    "answers": ("AnswerReader", "Generate", "Letters", "LogitReader", "TextLikelihood", "parse_answer"),
    "architectures": ("Architecture", "register_architecture"),
    "attribution": ("attribute",),
    "cvqa": ("load_cvqa",),
    "browser": ("inspect_neuron",),
    "demo": ("demo_truth", "load_demo"),
    "errors": ("VLMNeuronsError",),
    "items": ("GroupedItems", "ItemStatistics"),
    "model": ("VLM",),
    "neurons": ("NeuronSet", "Selection"),
    "plots": ("plot_layers", "plot_matrix"),
    "protocol": ("Protocol", "run_study"),
    "questions": ("Question", "QuestionSet"),
    "recording": ("Recorder", "record", "record_items"),
    "screening": ("screen",),
    "selectors": (
        "CAS",
        "CNA",
        "LAP",
        "LAPE",
        "MAD",
        "Attribution",
        "AveragePrecision",
        "CRFusion",
        "ConAct",
        "Conditions",
        "IntegratedGradients",
        "Joint",
        "LayerMatchedRandom",
        "MostActive",
        "Overlap",
        "RandomNeurons",
        "Selector",
        "universal_neurons",
    ),
    "sharing": ("from_hub", "push_to_hub"),
    "sites": ("NeuronSpace", "Site"),
    "statistics": ("ActivationStatistics", "AttributionStatistics"),
    "study": ("Intervention", "KnockoutResult", "knockout"),
    "trust": (
        "agreement",
        "layer_counts",
        "layer_profile",
        "null_distribution",
        "overlap_by_layer",
        "relatedness",
        "resampled_selections",
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
    "load_cvqa",
    "load_demo",
    "demo_truth",
    "record",
    "Recorder",
    "ActivationStatistics",
    "record_items",
    "ItemStatistics",
    "GroupedItems",
    "attribute",
    "AttributionStatistics",
    "Conditions",
    "Selector",
    "CAS",
    "ConAct",
    "LAP",
    "LAPE",
    "MAD",
    "AveragePrecision",
    "CNA",
    "universal_neurons",
    "CRFusion",
    "Overlap",
    "Joint",
    "Attribution",
    "IntegratedGradients",
    "MostActive",
    "RandomNeurons",
    "LayerMatchedRandom",
    "Ablation",
    "knockout",
    "Intervention",
    "KnockoutResult",
    "screen",
    "run_study",
    "Protocol",
    "stability",
    "null_distribution",
    "selection_strength",
    "sample_sizes",
    "agreement",
    "relatedness",
    "resampled_selections",
    "layer_counts",
    "layer_profile",
    "overlap_by_layer",
    "AnswerReader",
    "LogitReader",
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


if not TYPE_CHECKING:  # a type checker would take a typing mistake for a name that is found here

    def __getattr__(name: str) -> Any:
        # No module may bear the name of a public function: importing `vlmneurons.record` would put the module in its
        # place.
        if name in _MODULE_OF:
            value = getattr(importlib.import_module(f"vlmneurons.{_MODULE_OF[name]}"), name)
            globals()[name] = value
            return value
        if name in _MODULES:
            return importlib.import_module(f"vlmneurons.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
