"""What identifies a model: a digest of its weights."""

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    pass


def digest_of_weights(hf_model: nn.Module) -> str:
    """A digest of a model's weights: of the names, shapes, and first and last values of every parameter.

    Tells another checkpoint of the same name apart, in well under a second for 7 billion parameters. Parameters that
    are not in memory (offloaded ones) enter by name and shape.
    """
    digest = hashlib.sha256()
    for name, weight in hf_model.named_parameters():
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        if weight.device.type != "meta" and weight.numel():
            flat = weight.detach().reshape(-1)
            ends = torch.cat([flat[:16], flat[-16:]]).to("cpu", torch.float64)
            digest.update(ends.numpy().tobytes())
    return digest.hexdigest()[:16]
