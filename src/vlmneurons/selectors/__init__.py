"""Rules that choose, for each group, the neurons that are particular to it.

A selector gives every neuron a score for every group; `Selector` turns scores into sets of one size. One file per rule.
"""

from vlmneurons.selectors._base import Selector
from vlmneurons.selectors._combine import CombinedSelector
from vlmneurons.selectors._evidence import Bundle, Readable
from vlmneurons.selectors._scores import DerivedSelector, Gate
from vlmneurons.selectors.attribution import Attribution, IntegratedGradients
from vlmneurons.selectors.average_precision import AveragePrecision
from vlmneurons.selectors.cas import CAS, ConAct
from vlmneurons.selectors.cna import CNA, universal_neurons
from vlmneurons.selectors.conditions import CRFusion, Joint, Overlap
from vlmneurons.selectors.lap import LAP, MostActive
from vlmneurons.selectors.lape import LAPE
from vlmneurons.selectors.mad import MAD
from vlmneurons.selectors.random_neurons import LayerMatchedRandom, RandomNeurons
from vlmneurons.statistics.conditions import Conditions

__all__ = [
    "CAS",
    "CNA",
    "LAP",
    "LAPE",
    "MAD",
    "Attribution",
    "AveragePrecision",
    "Bundle",
    "CRFusion",
    "CombinedSelector",
    "ConAct",
    "Conditions",
    "DerivedSelector",
    "Gate",
    "IntegratedGradients",
    "Joint",
    "LayerMatchedRandom",
    "MostActive",
    "Overlap",
    "RandomNeurons",
    "Readable",
    "Selector",
    "universal_neurons",
]
