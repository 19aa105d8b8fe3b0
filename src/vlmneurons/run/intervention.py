"""What is done to neurons, as data: an `Ablation` applies it, an engine sends it, a manifest digests it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmneurons.checks import as_number
from vlmneurons.errors import AblationError
from vlmneurons.files.digests import digest_of, digest_of_bytes
from vlmneurons.neurons.selection import Selection
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.statistics.counts import ActivationStatistics

Values = float | Tensor | ActivationStatistics | None
"""What neurons are set or moved to; see `Ablation`."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """Neurons, and something else to do to them than the rest of a study does.

    Attributes:
        neurons: a `Selection`, or a single `NeuronSet`.
        mode: see `Ablation`.
        factor: see `Ablation`; 1.5 in mode ``"scale"`` amplifies by half.
        values: see `Ablation`.
        at: see `Ablation`.

    Example:
        ``knockout(model, questions, {"CAS": selection, "CAS x 1.5": Intervention(selection, factor=1.5)})``
    """

    neurons: Selection | NeuronSet
    mode: str = "scale"
    factor: float | None = None
    values: Values = None
    at: str | None = None

    def __post_init__(self) -> None:
        if self.factor is not None:
            as_number("factor", self.factor, AblationError)

    def __repr__(self) -> str:
        return f"Intervention({self.neurons!r}, {self.name})"

    @property
    def name(self) -> str:
        """What is done, in a word or two."""
        how = "" if self.factor is None else f" {self.factor:g}"
        return f"{self.mode}{how}" + ("" if self.at in (None, "post") else f" at {self.at}")

    @property
    def fingerprint(self) -> str:
        """A digest of the neurons and of what is done to them; equal for equal interventions."""
        sets = self.neurons.values() if isinstance(self.neurons, Selection) else [self.neurons]
        mode = "zero" if self.mode == "scale" and self.factor == 0 else self.mode
        factor = None if mode == "zero" else self.factor
        neurons = [[repr(one.space), digest_of_bytes(one.indices.numpy().tobytes())] for one in sets]
        at = self.at or ("post" if mode in ("zero", "scale") else None)
        return digest_of([mode, factor, "post" if mode in ("zero", "scale") else at, neurons, _digest(self.values)])[
            :16
        ]


def _digest(values: object) -> str | None:
    """A digest of what neurons are set to."""
    if values is None:
        return None
    if isinstance(values, ActivationStatistics):
        values = values.mean
    if isinstance(values, Tensor | np.ndarray | list | tuple | int | float):
        plain = torch.as_tensor(values).detach().cpu().double().contiguous()
        return digest_of_bytes(str(tuple(plain.shape)).encode(), plain.numpy().tobytes())
    return repr(values)
