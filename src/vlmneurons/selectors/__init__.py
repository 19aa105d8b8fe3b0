"""Rules that choose, for each group, the neurons that are particular to it.

A selector gives every neuron a score for every group; `Selector` turns scores into sets of one size. One file per rule.
"""

from vlmneurons.selectors._base import Selector
from vlmneurons.selectors._combine import CombinedSelector
from vlmneurons.selectors.cas import CAS, ConAct
from vlmneurons.selectors.lap import LAP, MostActive
from vlmneurons.selectors.lape import LAPE
from vlmneurons.selectors.mad import MAD
from vlmneurons.selectors.random_neurons import LayerMatchedRandom, RandomNeurons

__all__ = [
    "CAS",
    "LAP",
    "LAPE",
    "MAD",
    "CombinedSelector",
    "ConAct",
    "LayerMatchedRandom",
    "MostActive",
    "RandomNeurons",
    "Selector",
]
