"""What is known of a model's decoder that can be called again, and what both finding this out and using it need.

`vlmneurons.run.replayable` finds and proves a `Structure`; `vlmneurons.run.replay` uses it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vlmneurons.checks import Keywords
from vlmneurons.run.nests import Path


class CannotReplay(Exception):
    """Raised where a model, or a batch, must be run the plain way; the message says why."""


class Branch(NamedTuple):
    """Where the output of a layer's one MLP is added to what the layer has so far, as the layer's last step.

    Attributes:
        down: the MLP's down projection, whose output is added.
        behind: a module within the layer whose input it is added to: the norm before the MLP, as a rule.
    """

    down: nn.Module
    behind: nn.Module


@dataclass
class TokenAxes:
    """Where tokens are among the arguments of the layers, so that rows can be packed.

    Attributes:
        axes: for each module of the chain and each tensor with one axis of tokens which axis it is.
        mask: where the attention mask is, ``[row, head, token, token]``.
        mask_dtype: its dtype.
    """

    axes: list[dict[Path, int]]
    mask: Path
    mask_dtype: torch.dtype


@dataclass
class Structure:
    """How a model's decoder can be called again.

    Attributes:
        chain: the modules to call one after the other: all layers, or the whole decoder.
        axes: for each module of the chain and each tensor among its arguments the axis of the rows; None where there
            is none.
        hidden: where among the arguments the hidden states are; None where the decoder is called as a whole.
        branches: for each layer whose output is the sum of two values, one of them its MLP's, which modules make them.
        narrow: modules of the last layer that need to see no tokens but those whose logits are wanted.
        tokens: where tokens are among the arguments; None where rows cannot be packed.
        ragged: whether some of a batch's rows can be computed without the others.
        most_rows: how many rows fit into memory, where more of them once did not.
    """

    chain: list[nn.Module]
    axes: list[dict[Path, int | None]]
    hidden: Path | None
    branches: dict[int, Branch] = field(default_factory=dict)
    narrow: list[nn.Module] = field(default_factory=list)
    tokens: TokenAxes | None = None
    ragged: bool = True
    most_rows: int | None = None


@dataclass
class Call:
    """How a module of the chain was called in the model's own forward, and what it gave.

    Attributes:
        arguments: positional ones, and those with keywords.
        output: the hidden states that it gave.
        post: of a layer with a `Branch`, what its down projection was given.
        added: what the down projection gave for ``post``.
        residual: what ``added`` was added to.
    """

    arguments: tuple[tuple, Keywords]
    output: Tensor | None = None
    post: Tensor | None = None
    added: Tensor | None = None
    residual: Tensor | None = None

    @property
    def is_sum(self) -> bool:
        """Whether the layer's output is ``residual + added``, to the last bit."""
        if self.post is None or self.added is None or self.residual is None or self.output is None:
            return False
        if self.residual.shape != self.output.shape or self.added.numel() != self.output.numel():
            return False
        return torch.equal(self.residual + self.added.view_as(self.output), self.output)


class Narrowing:
    """Lets modules of the last layer compute the wanted positions only, and gives zeros for all others.

    Args:
        positions: for each row of the plain run the wanted positions, at least one.
        length: how many tokens a row has.
    """

    def __init__(self, positions: Sequence[Sequence[int]], length: int) -> None:
        self.index = filled_up(positions)
        self.length = length
        self._rows: Tensor | None = None
        """Which rows of the plain run the values' rows are copies of; None while nothing is narrowed."""

    @contextlib.contextmanager
    def of_rows(self, rows: Int64[Tensor, " row"]) -> Iterator[None]:
        """Within, the modules with `hooks` are given the wanted positions only.

        Args:
            rows: of the plain run, which the rows of the modules' values are copies of.
        """
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def hooks(self, module: nn.Module) -> Iterator[contextlib.AbstractContextManager[object]]:
        """Puts on a module what narrows its input and widens its output."""
        yield module.register_forward_pre_hook(self._narrow)
        yield module.register_forward_hook(self._widen)

    def _wanted(self, values: Tensor, rows: Tensor) -> Int64[Tensor, "row position 1"]:
        self.index = self.index.to(values.device)
        return self.index[rows.to(values.device)][..., None]

    def _narrow(self, module: nn.Module, args: tuple) -> tuple | None:
        if self._rows is None:
            return None
        values, index = args[0], self._wanted(args[0], self._rows)
        return (values.gather(1, index.expand(-1, -1, values.shape[-1])), *args[1:])

    def _widen(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self._rows is None:
            return None
        wide = output.new_zeros((len(output), self.length, output.shape[2]))
        return wide.scatter_(1, self._wanted(output, self._rows).expand_as(output), output)


def filled_up(positions: Sequence[Sequence[int]]) -> Int64[Tensor, "row position"]:
    """As many positions in each row: the last one of a shorter row is repeated."""
    depth = max(map(len, positions))
    return torch.tensor([[*row, *[row[-1]] * (depth - len(row))] for row in positions])


def hidden_of(output: object) -> Float[Tensor, "row token width"]:
    """The hidden states in what a layer, or a decoder, gives.

    Raises:
        CannotReplay: it gives something else.
    """
    first = output[0] if isinstance(output, tuple | list) else output
    hidden = first if isinstance(first, Tensor) else getattr(first, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        raise CannotReplay(f"a layer gives {type(first).__name__}, not hidden states of each token")
    return hidden
