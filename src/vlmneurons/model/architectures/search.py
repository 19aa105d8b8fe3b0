"""Looking through one model for MLPs, for the lists of blocks that hold them, and for what may be an MLP.

Each module is looked at from the inside out. `Search.layouts` gives the MLPs that its own forward computes, and
`Search.below` these together with those of the modules inside. `Search.stacks` gives the lists of blocks. What then
remains is checked the other way round: any two linear layers of a block that fit together like the two ends of an MLP
must be in one that was found, in a module that mixes tokens, or refuted by the flow. If not, `Search.doubts` names
them, and the model is refused: no MLP is silently left out.
"""

import collections
import dataclasses
import inspect
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from vlmneurons.errors import ArchitectureError
from vlmneurons.model.architectures.flow import Flow, flows_of, gating_of
from vlmneurons.model.architectures.layout import MLP, MLPLayout
from vlmneurons.model.architectures.modules import Modules, names_used
from vlmneurons.model.architectures.probe import probe

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True)
class FoundMLP:
    """One MLP below a block: where its module is, relative to the block, and what it is."""

    inner: str
    module: nn.Module
    layout: MLPLayout
    width: int
    experts: int | None = None

    @property
    def projections(self) -> list[nn.Module]:
        """Its linear layers; none where parameters of the module are in their place."""
        layout = self.layout
        names = (layout.down, layout.gate, layout.up, layout.fused)
        held = [operator.attrgetter(name)(self.module) for name in names if name and not layout.parameters]
        return [projection for projection in held if isinstance(projection, nn.Module)]


@dataclass(frozen=True)
class Block:
    """One layer of a tower.

    Attributes:
        path: its path in the model.
        module: itself.
        mlps: the MLPs in it.
        registered: whether somebody has said what its MLPs are.
    """

    path: str
    module: nn.Module
    mlps: tuple[FoundMLP, ...]
    registered: bool = False


# All that is read from names, and only of modules whose forward cannot be followed: see `Search._mixes`.
_CALLS_OF_MIXERS = re.compile(r"softmax|attention|einsum|cumsum|conv1d|scan|delta_rule|fft", re.IGNORECASE)
_PROJECTION_OF_MIXERS = re.compile(r"(to_|w|c_)?(q|k|v|o|qkv|query|key|value|in_proj|out_proj|attn)(_|$)")


class Search:
    """Looks through one model, and remembers what it has seen of each kind of module.

    Args:
        model: the model.
        layouts: of the MLPs at these paths of a block, where somebody has said what they are.
    """

    def __init__(self, model: nn.Module, layouts: Mapping[str, MLPLayout]) -> None:
        self.model, self.registered = model, layouts
        self.modules = Modules()
        self.size = self.modules.size
        self.passed_over: dict[str, list[Block]] = {}
        self._flows: dict[tuple[int, bool], list[Flow]] = {}
        self._lost: set[tuple[int, bool]] = set()  # what cannot be followed takes longest, so it is tried in one layer
        self._layouts: dict[int, tuple[tuple[MLPLayout, int], ...]] = {}
        self._experts: dict[int, FoundMLP | None] = {}
        self._mixers: dict[int, bool] = {}
        self._below: dict[nn.Module, tuple[FoundMLP, ...]] = {}
        self._doubts: dict[tuple, list[str]] = {}
        self._uses: collections.Counter[int] = collections.Counter()
        self._places: dict[tuple[int, str], str] = {}

    # --- single modules ---

    def flows(self, module: nn.Module, everywhere: bool = False) -> list[Flow]:
        """The flows of a module, in which mixers, MLPs and modules that cannot be followed are single steps."""
        key = self.modules.fingerprint(module), everywhere
        if (self.modules.fingerprint(module, numbers=False), everywhere) in self._lost:
            return []
        if key not in self._flows:
            # Which modules are steps is settled before the trace: while that runs, their parameters are symbols.
            steps = {child for child in module.modules() if child is not module and self._is_step(child)}

            def explained(child: nn.Module) -> bool:
                return self.is_mixer(child) or self.experts(child) is not None or bool(self.layouts(child))

            self._flows[key] = flows_of(module, self.modules, steps.__contains__, explained, everywhere=everywhere)
            if not self._flows[key]:
                self._lost.add((self.modules.fingerprint(module, numbers=False), everywhere))
        return self._flows[key]

    def _holds_others(self, module: nn.Module) -> bool:
        """Whether a module computes with modules inside of it, and is no list and no linear layer."""
        return any(True for _ in module.children()) and not isinstance(module, LISTS) and self.size(module) is None

    def _is_step(self, module: nn.Module) -> bool:
        """Whether a module is to be one step in the flow of those around it.

        Either all its neurons are known, so nothing inside belongs to an MLP around it; or it cannot be followed.
        """
        return self._holds_others(module) and (
            self.is_mixer(module)
            or self.experts(module) is not None
            or not self.flows(module)
            or bool(self.layouts(module))
        )

    def is_mixer(self, module: nn.Module) -> bool:
        """Whether a module sums over tokens, as attention does, and neither holds nor hides an MLP or half of one.

        The name of its class is not asked.
        """
        if not self._holds_others(module):
            return False
        key = self.modules.fingerprint(module, numbers=False)
        if key not in self._mixers:
            self._mixers[key] = False  # an answer for `_pairs`, which asks about the module itself, too
            self._mixers[key] = self._mixes(module)
        return self._mixers[key]

    def _mixes(self, module: nn.Module) -> bool:
        if self.below(module):
            return False
        pairs, flows = self._pairs(module, ()), self.flows(module)
        if flows:
            # It sums over tokens, is no first half of an MLP, and no two of its layers may be both ends of one.
            return bool(flows[0].mixed) and flows[0].ends_straight() and all(self._refuted(module, *p) for p in pairs)
        # A module that cannot be followed is believed to sum over tokens if its code calls something of the kind. But
        # it may hide an MLP if two layers lead from the module's own size and back to it, and neither of them has a
        # name that layers of attention have.
        linears = [(name, size) for name, child in module.named_modules() if (size := self.size(child)) is not None]
        hidden = collections.Counter(size[0] for _, size in linears).most_common(1)
        sizes = dict(linears)
        return any(map(_CALLS_OF_MIXERS.search, names_used(type(module)))) and not any(
            sizes[first][0] == hidden[0][0]
            and not any(_PROJECTION_OF_MIXERS.match(part) for name in (first, second) for part in name.split("."))
            for first, second in pairs
        )

    def layouts(self, module: nn.Module) -> tuple[tuple[MLPLayout, int], ...]:
        """The MLPs that a module's own forward computes, with their widths; those of modules inside apart.

        Raises:
            ArchitectureError: it computes with the same projections in two ways.
        """
        key = self.modules.fingerprint(module)
        if key not in self._layouts:
            # By the name of the down projection: what goes into it is computed in one way only.
            by_down = {layout.down: (layout, width) for flow in self.flows(module) for layout, width in flow.mlps}
            tried = None if by_down else probe(module, self.modules)
            if tried is not None:
                self._layouts[key] = (tried,)
                return self._layouts[key]
            # So far one way through the forward was followed. Comparisons and optional arguments may lead other ways.
            # They are followed too if the first has an MLP, which must then be the same in each way that has its down
            # projection, and if it leaves open whether two layers are an MLP. Else every pair is refuted already.
            pairs = [] if by_down else self._pairs(module, self._deeper(module))
            if by_down or (self.flows(module) and not all(self._refuted(module, *pair) for pair in pairs)):
                ways = self.flows(module, True)
                for layout, width in (mlp for way in ways for mlp in way.mlps):
                    by_down.setdefault(layout.down, (layout, width))
                for down, (layout, _) in by_down.items():
                    for others in (dict((mlp.down, mlp) for mlp, _ in way.mlps) for way in ways if way.calls[down]):
                        if others.get(down) != layout:
                            problem = f"{type(module).__name__} uses {down} in two ways"
                            raise self.refusal(problem, [str(layout), str(others.get(down, "no MLP"))])
            self._layouts[key] = tuple(by_down.values())
        return self._layouts[key]

    def experts(self, module: nn.Module) -> FoundMLP | None:
        """The experts that a module holds as 3-D parameters, in the way of `use_experts_implementation`."""
        key = self.modules.fingerprint(module)
        if key not in self._experts:
            self._experts[key] = self._find_experts(module)
        kind = self._experts[key]
        return None if kind is None else dataclasses.replace(kind, module=module)

    def _find_experts(self, module: nn.Module) -> FoundMLP | None:
        down = getattr(module, "down_proj", None)
        if not isinstance(down, nn.Parameter) or down.ndim != 3 or not hasattr(type(module), "_apply_gate"):
            return None
        transposed, gated = getattr(module, "is_transposed", False), getattr(module, "has_gate", True)
        name = "gate_up_proj" if gated else "up_proj"
        first = getattr(module, name, None)
        width = down.shape[1 if transposed else 2]
        if not isinstance(first, nn.Parameter) or first.shape[2 if transposed else 1] != width * (2 if gated else 1):
            return None
        if gated:
            layout = gating_of(module, name, "down_proj", width, self.modules)
        else:
            layout = MLPLayout(down="down_proj", gate=name, activation="act_fn", parameters=True)
        return None if layout is None else FoundMLP("", module, layout, width, down.shape[0])

    def below(self, module: nn.Module) -> tuple[FoundMLP, ...]:
        """The MLPs in a module, its own before those of its children; their paths are relative to it."""
        if module not in self._below:
            self._below[module] = self._find_below(module)
        return self._below[module]

    def _find_below(self, module: nn.Module) -> tuple[FoundMLP, ...]:
        if self.size(module) is not None or not self._may_hold_mlp(module):
            return ()
        experts = self.experts(module)
        if experts is not None:
            return (experts,)
        deeper = self._deeper(module)
        held = any(parameter.ndim in (2, 3) for parameter in module.parameters(recurse=False))
        if isinstance(module, nn.ModuleList | nn.ModuleDict) or not (held or self._pairs(module, deeper, not deeper)):
            return deeper
        return (*(self.measured("", module, layout, width) for layout, width in self.layouts(module)), *deeper)

    def _deeper(self, module: nn.Module) -> tuple[FoundMLP, ...]:
        """The MLPs in the children of a module."""
        return tuple(
            dataclasses.replace(mlp, inner=f"{name}.{mlp.inner}" if mlp.inner else name)
            for name, child in module.named_children()
            for mlp in self.below(child)
        )

    def _may_hold_mlp(self, module: nn.Module) -> bool:
        """Whether there are two linear layers below, or parameters in the place of such."""
        count = 0
        for child in module.modules():
            inside = sum(parameter.ndim in (2, 3) for parameter in child.parameters(recurse=False))
            count += inside if self.size(child) is None else 1
            if count >= 2:
                return True
        return False

    def measured(self, path: str, module: nn.Module, layout: MLPLayout, width: int | None = None) -> FoundMLP:
        """An MLP with its width, for which every projection that tells it is asked.

        Args:
            path: of its module, from the block.
            module: that module.
            layout: how it computes.
            width: as the flow gives it; None for a layout that was registered.

        Raises:
            ArchitectureError: the projections do not fit together, or are bare matrices, where no hook can be put.
        """
        where, first = path or "the block", layout.first
        projections = {name: operator.attrgetter(name)(module) for name in (first, layout.up, layout.down) if name}
        bare = [name for name, value in projections.items() if isinstance(value, nn.Parameter)]
        if bare and (len(bare) < len(projections) or any(value.ndim != 3 for value in projections.values())):
            problem = f"the projections of the MLP at {where} are parameters and no modules: its values cannot be read"
            raise self.refusal(problem, [", ".join(bare)])
        if layout.parameters:
            down, into = projections[layout.down], projections[first]
            if width is None:
                width = self._width_of_parameters(module, layout, into, down)
            return FoundMLP(path, module, layout, width, down.shape[0])
        sides = [(layout.down, 0, 1), (first, 1, 2 if layout.fused else 1)]
        if layout.up is not None:
            sides.append((layout.up, 1, 1))
        widths = []
        for name, side, parts in sides:
            projection = module.get_submodule(name)
            size = self.size(projection)
            if size is not None:
                widths.append((name, size[side] // parts))
            elif not [*projection.parameters(), *projection.buffers()]:
                problem = f"{name!r} of the MLP at {where} is a {type(projection).__name__}, and no projection"
                raise self.refusal(problem)
        if len({width for _, width in widths}) != 1:
            sizes = ", ".join(f"{name}: {width}" for name, width in widths) or "no size at all"
            raise self.refusal(f"the projections of the MLP at {where} do not agree on its width", [sizes])
        return FoundMLP(path, module, layout, widths[0][1])

    def _width_of_parameters(self, module: nn.Module, layout: MLPLayout, into: Tensor, down: Tensor) -> int:
        """Number of neurons of registered experts, held as ``[expert, in, out]`` or as ``[expert, out, in]``.

        The flow tells which, if it can be followed. By their shapes only fused ones can be told.
        """
        followed = {width for flow in self.flows(module) for mlp, width in flow.mlps if mlp.down == layout.down}
        parts = 2 if layout.fused else 1
        shaped = {
            neurons
            for neurons, hidden, first in (
                (down.shape[1], down.shape[2], into.shape[1:]),
                (down.shape[2], down.shape[1], into.shape[:0:-1]),
            )
            if tuple(first) == (hidden, parts * neurons)
        }
        widths = followed or shaped
        if len(widths) != 1:
            shapes = f"{tuple(into.shape)} and {tuple(down.shape)}"
            raise self.refusal(f"parameters of shapes {shapes} do not tell the number of neurons")
        return widths.pop()

    # --- what may be an MLP ---

    def _pairs(self, block: nn.Module, mlps: Sequence[FoundMLP], square: bool = False) -> list[tuple[str, str]]:
        """Linear layers that fit together like the two ends of an MLP, and are in none that was found.

        With ``square``, also those between vectors of one size, which are more often something else.
        """
        used = {mlp.module for mlp in mlps if mlp.layout.parameters}
        used |= {projection for mlp in mlps for projection in mlp.projections}
        places: list[tuple[str, tuple[int, int]]] = []

        def visit(module: nn.Module, path: str) -> None:
            if module in used or self.is_mixer(module):
                return
            size = self.size(module)
            if size is not None:
                places.append((path, size))
                return
            for name, child in module.named_children():
                visit(child, f"{path}.{name}" if path else name)

        visit(block, "")
        return [
            (first, second)
            for first, (narrow, wide) in places
            for second, (inside, outside) in places
            if first != second and narrow == outside and inside in (wide, wide // 2) and (square or narrow != wide)
        ]

    def doubts(self, block: Block) -> list[str]:
        """What a block has that may be an MLP, and is neither named as one nor known to be none."""
        if block.registered:
            return []
        key = self.modules.fingerprint(block.module), tuple((mlp.inner, mlp.layout) for mlp in block.mlps)
        if key not in self._doubts:
            self._doubts[key] = self._find_doubts(block)
        return [f"{block.path}{doubt}" for doubt in self._doubts[key]]

    def _find_doubts(self, block: Block) -> list[str]:
        doubts = [
            f": {first} and {second} fit together like an MLP's projections"
            for first, second in self._pairs(block.module, block.mlps)
            if not self._refuted(block.module, first, second, strict=not block.mlps)
        ]
        named = {mlp.module for mlp in block.mlps}
        for name, module in block.module.named_modules():
            if module in named or self.is_mixer(module):
                continue
            large = [
                f"{inner}.{key}" if inner else key
                for inner, child in [("", module), *module.named_children()]
                if child not in named and not self.is_mixer(child) and not isinstance(child, nn.modules.conv._ConvNd)
                for key, parameter in child.named_parameters(recurse=False)
                if parameter.ndim == 3 and min(parameter.shape) > 1
            ]
            if len(large) >= 2:
                where = f".{name}" if name else ""
                doubts.append(f"{where} ({type(module).__name__}) holds 3-D parameters {', '.join(large)}")
        return doubts

    def _refuted(self, block: nn.Module, first: str, second: str, strict: bool = False) -> bool:
        """Whether a flow passes through both layers of a pair, and shows that the second takes no MLP's neurons.

        A block that has no other MLP is asked strictly, see `Flow.refutes`.
        """
        parts = second.split(".")
        for cut in range(len(parts)):  # each module that holds both, from the block inwards
            module, head = block.get_submodule(".".join(parts[:cut])), ".".join(parts[:cut])
            if isinstance(module, nn.ModuleList | nn.ModuleDict) or (head and not first.startswith(f"{head}.")):
                continue
            down, up = ".".join(parts[cut:]), first[len(head) + 1 :] if head else first
            if any(flow.refutes(up, down, strict) for flow in self.flows(module)):
                return True
        return False

    # --- lists of blocks ---

    def block(self, path: str, module: nn.Module, layouts: Mapping[str, MLPLayout] | None = None) -> Block:
        """A layer with the MLPs that it is said to have; those that are found, where nothing is said.

        Args:
            path: its path.
            module: itself.
            layouts: of the MLPs at these paths in it; by default those that were given for any block.

        Raises:
            ArchitectureError: a layout names what is not there.
        """
        layouts = self.registered if layouts is None else layouts
        if not layouts:
            return Block(path, module, self.below(module))
        mlps = []
        for inner, layout in layouts.items():
            try:
                place = module.get_submodule(inner)
            except AttributeError:
                continue
            for name in filter(None, (layout.down, layout.gate, layout.up, layout.fused, layout.activation)):
                held = place.get_parameter if layout.parameters and name != layout.activation else place.get_submodule
                try:
                    held(name)
                except AttributeError:
                    has = ", ".join(child for child, _ in place.named_children())
                    problem = f"the Architecture names {name!r} in {path}.{inner}, which has {has or 'no modules'}"
                    raise self.refusal(problem) from None
            mlps.append(self.measured(inner, place, layout))
        return Block(path, module, tuple(mlps), registered=True)

    def stacks(self) -> dict[str, list[Block]]:
        """Every outermost list of blocks, by path; lists of lists, such as stages, are laid out in a row.

        What is in lists of another kind is kept in `passed_over`.
        """
        stacks: dict[str, list[Block]] = {}
        for name, child in self.model.named_children():
            stacks |= self._scan(child, name)
        return stacks

    def _scan(self, module: nn.Module, path: str) -> dict[str, list[Block]]:
        if isinstance(module, LISTS):
            blocks = self._blocks(module, path)
            if self._is_stack(blocks):
                return {path: blocks}
            if not any(block.mlps for block in blocks):
                self.passed_over[path] = [block for block in blocks if any(True for _ in block.module.children())]
        stacks: dict[str, list[Block]] = {}
        for name, child in module.named_children():
            stacks |= self._scan(child, f"{path}.{name}")
        return stacks

    def _blocks(self, module: nn.Module, path: str) -> list[Block]:
        blocks = []
        # named_children would leave out a block that is used twice
        for name, element in cast("dict[str, nn.Module]", module._modules).items():
            inner = [block for stack in self._scan(element, f"{path}.{name}").values() for block in stack]
            blocks += inner or [self.block(f"{path}.{name}", element)]
        return blocks

    def outside(self, stacks: Mapping[str, list[Block]]) -> Iterator[Block]:
        """The modules with MLPs that are in no list of blocks: each is one block, and one MLP or more.

        Args:
            stacks: the lists of blocks, by path.
        """

        def visit(module: nn.Module, path: str) -> Iterator[Block]:
            if path in stacks:
                return
            deeper = [block for name, child in module.named_children() for block in visit(child, f"{path}.{name}")]
            yield from deeper
            # Unlike a layer's MLP, a projector need not give vectors of the size that it takes: it is asked outright.
            holds = any(stack.startswith(f"{path}.") for stack in stacks) or isinstance(module, nn.ModuleList)
            if deeper or holds or self.size(module) is not None or not self._may_hold_mlp(module):
                return
            mlps = tuple(self.measured("", module, layout, width) for layout, width in self.layouts(module))
            if mlps:
                yield Block(path, module, mlps)

        for name, child in self.model.named_children():
            yield from visit(child, name)

    def gives(self, *blocks: Block) -> int | None:
        """The size of the vectors that the first MLP of some blocks gives."""
        for mlp in (mlp for block in blocks for mlp in block.mlps):
            if not mlp.layout.parameters:
                size = self.size(mlp.module.get_submodule(mlp.layout.down))
                return None if size is None else size[1]
            sides = list(mlp.module.get_parameter(mlp.layout.down).shape[1:])
            sides.remove(mlp.width)
            return sides[0]
        return None

    def _computes_besides(self, block: Block) -> bool:
        """Whether a block has weights beside its MLPs: a transformer block does, a projector does not."""
        inside: set[nn.Module] = set()
        for mlp in block.mlps:
            parts = mlp.projections if mlp.module is block.module else [mlp.module]
            if mlp.experts is not None or _is_routed(mlp, block):  # what routes to experts belongs to them
                above = mlp.inner.split(".")[: -1 if mlp.experts else -2]
                parts += [block.module.get_submodule(".".join(above))] if above else []
            inside |= {mlp.module, *(child for part in parts for child in part.modules())}
        return any(
            self.size(child) is not None or any(p.ndim >= 2 for p in child.parameters(recurse=False))
            for child in block.module.modules()
            if child not in inside
        )

    def _is_stack(self, blocks: list[Block]) -> bool:
        """Whether these are transformer blocks: some hold an MLP, and also what mixes tokens.

        In hybrid models one block does this and the next that; then they are at least of one class. The sublayers of
        one T5 block also do this and that, and are not.
        """
        with_mlp = [block for block in blocks if block.mlps]
        if any(self._computes_besides(block) for block in with_mlp):
            return True
        kinds = {type(block.module) for block in with_mlp}
        return any(type(block.module) in kinds and self._computes_besides(block) for block in blocks if not block.mlps)

    # --- blocks of a tower ---

    def settled(self, blocks: list[Block]) -> list[Block]:
        """The blocks, with activation modules that serve several MLPs left to be repeated instead of hooked.

        Raises:
            ArchitectureError: one MLP serves several layers, or one of them does not compute as its class does.
        """
        if not self._uses:
            self._uses.update(id(module) for _, module in self.model.named_modules(remove_duplicate=False))
        settled = []
        for block in blocks:
            mlps = []
            for mlp in block.mlps:
                place = f"{block.path}.{mlp.inner}" if mlp.inner else block.path
                before = self._places.setdefault((id(mlp.module), mlp.layout.down), place)
                if before != place:
                    problem = f"{before} and {place} are one module, whose neurons cannot be told apart by layer"
                    raise self.refusal(problem)
                self._refuse_strange(place, mlp, block.registered)
                name, layout = mlp.layout.activation, mlp.layout
                if name and not layout.parameters and self._uses[id(mlp.module.get_submodule(name))] > 1:
                    mlp = dataclasses.replace(mlp, layout=dataclasses.replace(layout, activation=None))
                mlps.append(mlp)
            settled.append(dataclasses.replace(block, mlps=tuple(mlps)))
        return settled

    def _refuse_strange(self, place: str, mlp: FoundMLP, registered: bool) -> None:
        """Raises where hooks on an MLP's modules would tell of something else than its class's ``forward``."""
        if _is_replaced(mlp.module) and not registered:
            problem = "was replaced on this one object, so its class does not tell what it computes"
            raise self.refusal(f"the forward of {place} {problem}")
        layout = mlp.layout
        for name in () if layout.parameters else filter(None, (layout.down, layout.gate, layout.up, layout.fused)):
            before = self._places.setdefault((id(mlp.module.get_submodule(name)), ""), place)
            if before != place:
                problem = f"{before} and {place} share {name!r}, one module, whose values cannot be told apart by layer"
                raise self.refusal(problem)

    @staticmethod
    def named(tower: str, layer: int, block: Block, names: Mapping[str, str]) -> Iterator[MLP]:
        """The MLPs of one block, under the names that their sites get.

        Args:
            tower: name of the tower.
            layer: number of the block in it.
            block: the block.
            names: what an MLP at a path of a block is called, where somebody has said so.
        """
        heads = {mlp.inner.split(".")[0] for mlp in block.mlps}
        per_path = collections.Counter(mlp.inner for mlp in block.mlps)
        for mlp in block.mlps:
            path = f"{block.path}.{mlp.inner}" if mlp.inner else block.path
            if mlp.inner in names:
                name = names[mlp.inner]
            elif len(block.mlps) == 1 and mlp.experts is None:
                name = "mlp"
            else:
                head, *tail = mlp.inner.split(".")
                name = ".".join(["mlp" if len(heads) == 1 else head, *tail]) if head else "mlp"
            if per_path[mlp.inner] > 1:
                name = f"{name}.{mlp.layout.down.replace('.', '_')}"
            if mlp.experts is None:
                yield MLP(tower, layer, name, path, mlp.layout, mlp.width, None, _is_routed(mlp, block))
            for expert in range(mlp.experts or 0):
                yield MLP(tower, layer, f"{name}.{expert}", path, mlp.layout, mlp.width, expert, True)

    # --- errors ---

    def refusal(self, problem: str, doubts: Sequence[str] = ()) -> ArchitectureError:
        """The error to raise: what is wrong, what was seen, and how a user can say what is known.

        Args:
            problem: what is wrong.
            doubts: the places in the model that it is about.
        """
        name = type(self.model).__name__
        lines = "\n".join(f"  {line}" for line in [*doubts[:6], *self._lists()[:12]]) or "  no list of blocks"
        more = f"\n  and {len(doubts) - 6} more" if len(doubts) > 6 else ""
        if any(hasattr(module, "lora_A") for module in self.model.modules()):
            more += (
                "\nAdapters lie on this model; where one hides what it is on, model.merge_and_unload() puts it inside."
            )
        return ArchitectureError(
            f"{name}: {problem}. Seen:\n{lines}{more}\n"
            "If you know how it computes, say so once, before the model is wrapped:\n"
            "  from vlmneurons.model.architectures import Architecture, MLPLayout, register_architecture\n"
            f"  register_architecture({name!r}, Architecture(\n"
            "      towers={'language': '<path of the list of blocks>', 'vision': '<path>'},\n"
            "      mlps={'<tower>': {'<path of the MLP in a block>': MLPLayout(\n"
            "          gate='<projection before the activation>', up='<the other, or None>', "
            "down='<last projection>',\n"
            "          activation='<module>',  # or function=torch.nn.functional.silu\n"
            "      )}},  # a tower that is left out here is found\n"
            "  ))"
        )

    def _lists(self) -> list[str]:
        """A line for every list of several modules: where it is, and what its first block is made of."""
        lines, listed = [], []
        for path, module in self.model.named_modules():
            nested = any(path.startswith(f"{outer}.") for outer in listed)
            if isinstance(module, LISTS) and len(module) > 1 and not nested:
                listed.append(path)
                block = next(iter(module.children()))
                parts = [
                    f"{key}: {size[0]}->{size[1]}" if size is not None else f"{key}: {type(child).__name__}"
                    for key, child in block.named_children()
                    for size in [self.size(child)]
                ]
                lines.append(f"{path}: {len(module)} x {type(block).__name__}({', '.join(parts[:10])})")
        return lines


def _is_replaced(module: nn.Module) -> bool:
    """Whether a module has a ``forward`` of its own, other than accelerate's or nnsight's around that of its class."""
    forward = vars(module).get("_old_forward") if "_hf_hook" in vars(module) else vars(module).get("forward")
    if forward is None or type(forward).__module__.partition(".")[0] == "nnsight":
        return False
    if getattr(forward, "_torchdynamo_orig_callable", None) is not None:
        return True
    inner = inspect.unwrap(forward)
    return getattr(inner, "__func__", inner) is not inspect.unwrap(type(module).forward)


def _is_routed(mlp: FoundMLP, block: Block) -> bool:
    """Whether an MLP with its own module is one of a list of experts."""
    *above, last = mlp.inner.split(".")
    holder = block.module.get_submodule(".".join(above))
    listed = (last.isdigit() and isinstance(holder, nn.ModuleList)) or isinstance(holder, nn.ModuleDict)
    return listed and any("expert" in name and "shared" not in name for name in above)
