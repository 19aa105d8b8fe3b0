"""The public names of the library, in the order of the flow: the one list of them, which `vlmneurons` reads.

A new public name is one line here, in its place; its page is in ``docs/api``.
"""

from . import errors as errors
from . import testing as testing
from .model.vlm import VLM as VLM
from .neurons.sites import Site as Site
from .neurons.sites import NeuronSpace as NeuronSpace
from .neurons.sets import NeuronSet as NeuronSet
from .neurons.sets import Selection as Selection
from .questions.sets import Question as Question
from .questions.sets import QuestionSet as QuestionSet
from .questions.cvqa import load_cvqa as load_cvqa
from .demo import load_demo as load_demo
from .demo import demo_truth as demo_truth
from .recording.record import record as record
from .recording.recorder import Recorder as Recorder
from .statistics.counts import ActivationStatistics as ActivationStatistics
from .recording.record import record_items as record_items
from .statistics.items import ItemStatistics as ItemStatistics
from .statistics.items import GroupedItems as GroupedItems
from .recording.attribute import attribute as attribute
from .statistics.counts import AttributionStatistics as AttributionStatistics
from .statistics.conditions import Conditions as Conditions
from .selectors._base import Selector as Selector
from .selectors.cas import CAS as CAS
from .selectors.cas import ConAct as ConAct
from .selectors.lap import LAP as LAP
from .selectors.lape import LAPE as LAPE
from .selectors.mad import MAD as MAD
from .selectors.average_precision import AveragePrecision as AveragePrecision
from .selectors.cna import CNA as CNA
from .selectors.cna import universal_neurons as universal_neurons
from .selectors.conditions import CRFusion as CRFusion
from .selectors.conditions import Overlap as Overlap
from .selectors.conditions import Joint as Joint
from .selectors.attribution import Attribution as Attribution
from .selectors.attribution import IntegratedGradients as IntegratedGradients
from .selectors.lap import MostActive as MostActive
from .selectors.random_neurons import RandomNeurons as RandomNeurons
from .selectors.random_neurons import LayerMatchedRandom as LayerMatchedRandom
from .run.ablation import Ablation as Ablation
from .run.export import export as export
from .study.knockout import knockout as knockout
from .study.masks import Intervention as Intervention
from .study.result import KnockoutResult as KnockoutResult
from .study.screen import screen as screen
from .study.protocol import run_study as run_study
from .study.protocol import Protocol as Protocol
from .trust.stability import stability as stability
from .trust.stability import null_distribution as null_distribution
from .trust.stability import selection_strength as selection_strength
from .trust.stability import sample_sizes as sample_sizes
from .trust.stability import agreement as agreement
from .trust.stability import relatedness as relatedness
from .trust.stability import resampled_selections as resampled_selections
from .trust.stability import layer_counts as layer_counts
from .trust.stability import layer_profile as layer_profile
from .trust.stability import overlap_by_layer as overlap_by_layer
from .run.readers import AnswerReader as AnswerReader
from .run.readers import LogitReader as LogitReader
from .run.readers import Letters as Letters
from .run.readers import Generate as Generate
from .run.readers import TextLikelihood as TextLikelihood
from .run.readers import parse_answer as parse_answer
from .look.plots import plot_matrix as plot_matrix
from .look.plots import plot_layers as plot_layers
from .look.neuron_pages import inspect_neuron as inspect_neuron
from .look.writes import neuron_writes as neuron_writes
from .statistics.hub import push_to_hub as push_to_hub
from .statistics.hub import from_hub as from_hub
from .model.architectures.find import Architecture as Architecture
from .model.architectures.find import register_architecture as register_architecture
from .errors import VLMNeuronsError as VLMNeuronsError

__version__: str
