"""The down projection of an MLP as a tensor of its model: which one, and along which axis its neurons lie."""

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vlmneurons.errors import ArchitectureError
from vlmneurons.model.architectures.layout import MLP


@dataclass(frozen=True)
class Down:
    """The weights of a down projection.

    Attributes:
        name: of the parameter, in the model.
        axis: the one that neurons lie along, of the whole parameter.
        expert: which slice of the first axis; None for a parameter of this MLP alone.
    """

    name: str
    axis: int
    expert: int | None = None

    def columns(self, weight: Tensor, neurons: Tensor) -> Float[Tensor, "neuron hidden"]:
        """What neurons write: their columns of the parameter, in single precision."""
        part = weight if self.expert is None else weight[self.expert]
        axis = self.axis - (weight.ndim - part.ndim)
        return part.index_select(axis, neurons.to(weight.device)).movedim(axis, 0).float()


def down_of(hf_model: nn.Module, mlp: MLP) -> Down | None:
    """Where the weights of an MLP's down projection are; None where they are not one floating-point matrix.

    Args:
        hf_model: the model in which the MLP was found.
        mlp: one of its MLPs.

    Raises:
        ArchitectureError: the neurons may lie along either axis.
    """
    layout, module = mlp.layout, hf_model.get_submodule(mlp.path)
    if layout.parameters:
        down, first = module.get_parameter(layout.down), module.get_parameter(layout.first)
        if not down.is_floating_point():
            return None
        turned = getattr(module, "is_transposed", None)
        if turned is None:
            # It is [expert, in, out] or [expert, out, in], and the neurons lie along the axis that is as long as the
            # MLP is wide. Of a square one the projection beside it tells, if that is fused and so not square.
            tensor = down if down.shape[1] != down.shape[2] else first
            if tensor.shape[1] == tensor.shape[2]:
                raise ArchitectureError(
                    f"{mlp.path}.{layout.down} has the shape {tuple(down.shape)}: along which axis its neurons lie "
                    "cannot be told for certain"
                )
            turned = tensor.shape[1] == mlp.width
        return Down(f"{mlp.path}.{layout.down}", 1 if turned else 2, mlp.expert)
    projection = module.get_submodule(layout.down)
    path = ".".join(part for part in (mlp.path, layout.down) if part)
    weight: Any = getattr(projection, "weight", None)
    # A class derived from Linear may compute otherwise (adapters, quantised weights), as may a parametrised weight.
    plain = type(projection) in (nn.Linear, Conv1D) and "weight" in projection._parameters
    if not plain or not is_plain(weight) or not weight.is_floating_point() or weight.ndim != 2:
        return None
    return Down(f"{path}.weight", 0 if type(projection) is Conv1D else 1)


def is_plain(weight: object) -> TypeGuard[Tensor]:
    """Whether a weight is a tensor of torch's own: one that quantises itself (torchao's) cannot be indexed.

    Args:
        weight: whatever a module calls its weight.
    """
    return type(weight) in (Tensor, nn.Parameter)


def written(hf_model: nn.Module, mlp: MLP, neurons: Tensor) -> Float[Tensor, "neuron hidden"]:
    """What each neuron adds to the output of its MLP's down projection where it is 1: its column, in single precision.

    Weights that are no plain matrix (quantised, or with an adapter beside them) are asked: what they make of that
    neuron alone, less what they make of nothing.

    Args:
        hf_model: the model in which the MLP was found.
        mlp: one of its MLPs.
        neurons: numbers within the MLP.

    Raises:
        ArchitectureError: the weights are not here, or are experts' in another form than a floating-point tensor.
    """
    down = down_of(hf_model, mlp)
    if down is not None:
        weight = hf_model.get_parameter(down.name)
        _refuse_absent(weight, down.name)
        return down.columns(weight.detach(), neurons)
    if mlp.layout.parameters:
        raise ArchitectureError(
            f"{mlp.path}.{mlp.layout.down} is quantised in a way that cannot be read: load the model whole"
        )
    projection = hf_model.get_submodule(mlp.path).get_submodule(mlp.layout.down)
    for name, tensor in [*projection.named_parameters(), *projection.named_buffers()]:
        _refuse_absent(tensor, name)
    device = next(iter([*projection.parameters(), *projection.buffers()])).device
    alone = torch.zeros(len(neurons) + 1, mlp.width, device=device, dtype=getattr(hf_model, "dtype", torch.float32))
    alone[torch.arange(len(neurons)), neurons.to(device)] = 1
    output = projection(alone).float()
    return output[:-1] - output[-1]


def _refuse_absent(tensor: Tensor, name: str) -> None:
    if tensor.device.type == "meta":
        raise ArchitectureError(
            f"{name} is not in memory (offloaded, or a model without weights): load the model whole"
        )
