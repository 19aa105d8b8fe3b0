"""For tests, of the library and of what others build on it: small models, known neurons, and contracts to meet."""

from vlmneurons.testing.architectures import (
    ArchitectureReport,
    TowerReport,
    check_architecture,
    describe_architecture,
)
from vlmneurons.testing.planted import PlantedModel, plant_neurons
from vlmneurons.testing.selectors import ContractError, check_selector, selector_tables
from vlmneurons.testing.tiny import tiny_image, tiny_inputs, tiny_model, tiny_names, tiny_template

__all__ = [
    "ArchitectureReport",
    "ContractError",
    "PlantedModel",
    "TowerReport",
    "check_architecture",
    "check_selector",
    "describe_architecture",
    "plant_neurons",
    "selector_tables",
    "tiny_image",
    "tiny_inputs",
    "tiny_model",
    "tiny_names",
    "tiny_template",
]
