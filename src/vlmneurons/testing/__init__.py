"""For tests, of the library and of what others build on it: small models, known neurons, and contracts to meet."""

from vlmneurons.testing._planted import PlantedModel, plant_neurons
from vlmneurons.testing._tiny import tiny_image, tiny_inputs, tiny_model, tiny_names

__all__ = ["PlantedModel", "plant_neurons", "tiny_image", "tiny_inputs", "tiny_model", "tiny_names"]
