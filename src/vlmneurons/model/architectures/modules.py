"""What single modules do: project linearly, bend each number on its own, normalise, or hand on what they get.

The name of a class is not asked. A module that declares its sizes (``in_features``) is believed to be a linear layer.
One that stands around another is followed. One with weights of at most one axis is copied, and the copy is run on
made-up numbers.
"""

import copy
import functools
import inspect
import types
from typing import Any

import torch
from torch import Tensor, fx, nn

from vlmneurons.model.architectures.operations import ACTIVATIONS, keeps_straight
from vlmneurons.model.architectures.symbols import follow

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm)


def declared_size(module: nn.Module) -> tuple[int, int] | None:
    """Input and output size of a linear layer as it declares it: torch's, GPT-2's, quantised and adapted ones."""
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures"), ("nx", "nf")):
        sizes = [_setting(module, name) for name in names]
        if all(isinstance(size, int) for size in sizes):
            return sizes[0], sizes[1]
    adapted = module._modules.get("base_layer")  # what peft calls the layer that an adapter stands around
    return None if adapted is None else declared_size(adapted)


def _setting(module: nn.Module, name: str) -> Any:
    """An attribute of a module, or None: most modules lack most of these, and torch is slow to say so."""
    if name in vars(module):
        return vars(module)[name]
    return getattr(module, name, None) if hasattr(type(module), name) else None


@functools.cache
def names_used(kind: type) -> frozenset[str]:
    """Every name that the code of a class mentions outside of ``__init__``: what its forward may depend on."""
    names: set[str] = set()
    codes = [
        inspect.unwrap(value).__code__
        for base in kind.__mro__
        if base.__module__ != "torch.nn.modules.module"
        for name, value in vars(base).items()
        if name != "__init__" and hasattr(inspect.unwrap(value) if callable(value) else value, "__code__")
    ]
    while codes:
        code = codes.pop()
        names |= {*code.co_names, *(text for text in code.co_consts if isinstance(text, str))}
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
    return frozenset(names)


def _comparable(value: object, numbers: bool) -> object:
    """Equal for settings that mean the same to a forward; an object of another kind equals itself alone."""
    if type(value) is int and not numbers:
        return int
    if isinstance(value, int | float | str | bool | type(None)):
        return value
    if isinstance(value, tuple | list):
        return tuple(_comparable(inner, numbers) for inner in value)
    if isinstance(value, functools.partial):
        inner = (value.func, *value.args, *(part for pair in sorted(value.keywords.items()) for part in pair))
        return tuple(_comparable(part, numbers) for part in inner)
    return id(getattr(value, "__func__", value))


class Modules:
    """Answers about the modules of one model, kept: most layers are alike, and each kind is looked at once."""

    def __init__(self) -> None:
        self._prints: dict[tuple[nn.Module, bool], int] = {}
        self._sizes: dict[nn.Module, tuple[int, int] | None] = {}
        self._by_print: dict[tuple[str, int], Any] = {}

    def fingerprint(self, module: nn.Module, *, numbers: bool = True) -> int:
        """Equal for modules that compute alike: their classes, settings and sizes, all the way down.

        Args:
            module: any module.
            numbers: whether settings that are whole numbers count. An attention knows the number of its layer, for its
                cache; without it those of all layers are alike.
        """
        if (module, numbers) not in self._prints:
            used = names_used(type(module))
            settings = tuple(
                (name, _comparable(value, numbers))
                for name, value in sorted(vars(module).items())
                if name in used and name != "forward" and not isinstance(value, Tensor)
            )
            shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters(recurse=False))
            children = tuple((n, self.fingerprint(child, numbers=numbers)) for n, child in module.named_children())
            computes = (type(module), settings, shapes, declared_size(module), module.training, children)
            self._prints[module, numbers] = hash(computes)
        return self._prints[module, numbers]

    def size(self, module: nn.Module) -> tuple[int, int] | None:
        """Input and output size of a module that acts as a linear layer on the last axis; None for any other.

        Either it declares so, or it stands around one that does, and is seen to hand on what goes in and comes out.
        """
        if module not in self._sizes:
            size = declared_size(module)
            if size is None:
                inner = [(name, child) for name, child in module.named_children() if not self.is_passive(child)]
                if len(inner) == 1 and not isinstance(module, nn.ModuleList | nn.ModuleDict):
                    size = self.size(inner[0][1])
                    if size is not None and not self._once("wraps", module, lambda: self._wraps(module, inner[0][0])):
                        size = None
            self._sizes[module] = size
        return self._sizes[module]

    def _once(self, question: str, module: nn.Module, answer: Any) -> Any:
        key = question, self.fingerprint(module)
        if key not in self._by_print:
            self._by_print[key] = answer()
        return self._by_print[key]

    def _wraps(self, module: nn.Module, name: str) -> bool:
        """Whether nothing is bent on the way into the one linear layer inside, nor on the way out of it.

        A module of which this cannot be seen is no linear layer: it may hide the activation of an MLP.
        """
        graphs = follow(module, lambda child: True)
        if not graphs or self.bends_itself(module.get_submodule(name)):
            return False
        calls = [node for node in graphs[0].nodes if node.op == "call_module" and node.target == name]
        results = [node.args[0] for node in graphs[0].nodes if node.op == "output"]
        if len(calls) != 1 or not isinstance(results[0], fx.Node):
            return False
        before, after = {calls[0]}, {calls[0]}
        for node in graphs[0].nodes:  # in the order of computation
            if set(node.all_input_nodes) & after:
                after.add(node)
        for node in reversed(list(graphs[0].nodes)):
            if set(node.users) & before:
                before.add(node)
        if results[0] not in after:  # what it gives does not come from the linear layer
            return False
        return all(
            keeps_straight(node, after)
            or (node.op == "call_module" and self.character(module.get_submodule(node.target)) in ("same", "affine"))
            for node in (before | after) - {calls[0]}
            if node.op not in ("placeholder", "get_attr", "output")
        )

    def bends_itself(self, module: nn.Module) -> bool:
        """Whether a module that declares itself linear applies an activation.

        What cannot be followed, as torch's own and quantised layers, is believed to be linear.
        """
        if type(module).forward is nn.Linear.forward or declared_size(module) is None:
            return False
        return self._once("bends", module, lambda: self._activates(module))

    def _activates(self, module: nn.Module) -> bool:
        graphs = follow(module, lambda child: True)
        within = any(self.bends_itself(child) for child in module.children())
        return within or any(
            node.target in ACTIVATIONS
            or (node.op == "call_module" and self.character(module.get_submodule(node.target)) in ("bent", "odd"))
            for graph in graphs
            for node in graph.nodes
        )

    # --- tried out ---

    def character(self, module: nn.Module) -> str:
        """What a module without children does to a tensor when the model is evaluated.

        Returns:
            ``"same"``: it hands the tensor on. ``"affine"``: it stretches and shifts each number. ``"odd"``: it bends
                each number, alike on both sides of a shift. ``"bent"``: it bends each number otherwise. ``"norm"``: it
                divides numbers by what depends on all of them. ``"unknown"``: anything else, or it could not be run.
        """
        if type(module).forward.__module__.startswith("torch.nn."):  # not what a subclass may do besides
            if isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd):
                return "same"
            if isinstance(module, _NORMS):
                return "norm"
        if any(True for _ in module.children()) or any(p.ndim > 1 for p in (*module.parameters(), *module.buffers())):
            return "unknown"
        return self._once("character", module, lambda: _tried(module))

    def is_passive(self, module: nn.Module) -> bool:
        """Whether a module hands its input on unchanged when the model is evaluated: a dropout, a dropped path."""
        return self.character(module) == "same"


def _tried(module: nn.Module) -> str:
    """`Modules.character` of a module, whose copy is run on random numbers with random weights."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")

    wide = [p.numel() for p in (*module.parameters(), *module.buffers()) if p.numel() > 1]
    clone = copy.copy(module)
    clone.__dict__ = {**vars(module), "training": False}
    for group in ("_parameters", "_buffers"):
        clone.__dict__[group] = {
            name: None if value is None else nn.Parameter(drawn(*value.shape) + 0.5, requires_grad=False)
            for name, value in vars(module)[group].items()
        }
    x, y = (6 * drawn(2, 3, max(wide, default=24)) - 3 for _ in range(2))
    changed = x.clone()
    changed[1, 2, -1] += 0.5
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            of_x, of_y, of_changed, of_minus_x, of_minus_y, of_twice_x = (
                type(module).forward(clone, value.clone()) for value in (x, y, changed, -x, -y, 2 * x)
            )
        if of_x.shape != x.shape:
            return "unknown"
        # An odd function (tanh, say), shifted by a constant, gives the same sum at x and -x, whatever x is.
        odd = torch.allclose(of_x + of_minus_x, of_y + of_minus_y, rtol=1e-3, atol=1e-3)
        if torch.equal(of_x, x):
            return "same"
        if not torch.equal(of_x.flatten()[:-1], of_changed.flatten()[:-1]):  # the last number alone was changed
            return "norm" if odd and torch.allclose(of_x, of_twice_x, rtol=1e-2, atol=1e-2) else "unknown"
        shift = (of_x + of_minus_x) / 2
        straight = odd and torch.allclose(of_twice_x - shift, 2 * (of_x - shift), rtol=1e-3, atol=1e-3)
        return "affine" if straight else "odd" if odd else "bent"
    except Exception:  # it asks for something else than a tensor, or for its own device
        return "unknown"
