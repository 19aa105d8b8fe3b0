"""Telling an MLP by trying it out, where its ``forward`` cannot be followed.

Needed by models that compute with their values on the way to the activation: the first layers of Gemma 3n keep only the
strongest ones, by a quantile of a normal distribution.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmneurons.model.architectures.layout import MLPLayout
from vlmneurons.model.architectures.modules import Modules


class _StandIn(nn.Module):
    """Stands in for a linear layer: small, with random weights, and remembers what went through it."""

    def __init__(self, inside: int, outside: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight, self.noise = (
            torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            for shape in ((outside, inside), (outside,))
        )
        self.moved = False

    def forward(self, input: Tensor, *args: object, **kwargs: object) -> Tensor:
        self.input, self.output = input, F.linear(input, self.weight) + (self.noise if self.moved else 0)
        return self.output


class _Watch(nn.Module):
    """Stands in for an activation module, and remembers what it gave."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.outputs = inner, []

    def forward(self, *args: object, **kwargs: object) -> object:
        self.outputs.append(type(self.inner).forward(self.inner, *args, **kwargs))
        return self.outputs[-1]


def probe(module: nn.Module, modules: Modules) -> tuple[MLPLayout, int] | None:
    """The gated MLP that a module is, and its width, told by trying it out where its ``forward`` cannot be followed.

    Its three linear layers are replaced, in a copy, by small random ones, and the copy is run. The layout is certain:
    the input of one layer is the product of another's output and the activation module's, and the third feeds that
    module (not necessarily alone: what the activation module gets is ``pre``). None if that is not what is seen.

    Args:
        module: any module.
        modules: answers about the modules inside.
    """
    children = dict(module.named_children())
    sizes = {name: size for name, child in children.items() if (size := modules.size(child)) is not None}
    free = [name for name in children if name not in sizes]
    weights = [*module.parameters(recurse=False), *(p for name in free for p in children[name].parameters())]
    hidden = sorted({side for size in sizes.values() for side in size})
    down = [name for name, size in sizes.items() if list(sizes.values()).count(size) == 1]
    if len(sizes) != 3 or len(hidden) != 2 or len(down) != 1 or any(p.ndim >= 2 for p in weights):
        return None
    generator, small = torch.Generator(device="cpu").manual_seed(0), dict(zip(hidden, (6, 16), strict=True))
    stand_ins = {name: _StandIn(small[i], small[o], generator) for name, (i, o) in sizes.items()}
    watches = {name: _Watch(children[name]) for name in free}
    clone = copy.copy(module)
    clone.__dict__ = {**vars(module), "_modules": stand_ins | watches, "_forward_hooks": {}, "_forward_pre_hooks": {}}
    first = [name for name in sizes if name != down[0]]
    start = torch.randn((2, 5, small[sizes[first[0]][0]]), generator=generator, dtype=torch.float32, device="cpu")

    def run(moved: str | None) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """What activation modules and linear layers give, and post, with the output of one layer shifted."""
        for name, stand_in in stand_ins.items():
            stand_in.moved = name == moved
        for watch in watches.values():
            watch.outputs.clear()
        type(module).forward(clone, start)
        gates = {name: watch.outputs[0] for name, watch in watches.items() if len(watch.outputs) == 1}
        return gates, {name: stand_ins[name].output for name in first}, stand_ins[down[0]].input

    try:
        with torch.no_grad():
            gates, outputs, post = run(None)
            shifted = {name: run(name)[0] for name in first}
    except Exception:  # it needs more than one tensor
        return None
    products = [(g, u) for g, gate in gates.items() for u, up in outputs.items() if torch.equal(gate * up, post)]
    if len(products) != 1:
        return None
    activation, up = products[0]
    gate = next(name for name in first if name != up)
    feeds = {name: not torch.equal(shifted[name][activation], gates[activation]) for name in first}
    layout = MLPLayout(down=down[0], activation=activation, gate=gate, up=up)
    return (layout, sizes[down[0]][0]) if feeds[gate] and not feeds[up] else None
