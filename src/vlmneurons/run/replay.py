"""One forward, many decoders: the logits of a batch under many masks, computing once what no mask can change.

The model's own forward runs once, on the batch as it is: picture, embeddings, and every decoder layer's inputs are
caught on the way. When its last layer is done, the layers are called again on *tiles* (a tile is a copy of the batch
under one mask, or of those of its rows that meet the mask; some tiles make a chunk), each from the first layer that its
mask touches, and the model's own forward goes on with the rows of all tiles to its norm and its logits. Nothing is
computed by other code than the model's. Four things are spared besides the picture:

* layers before the first one that a mask touches, and of this one all that comes before the down projection;
* of the last MLP, the positions whose logits nobody asked for;
* the projection to the vocabulary of these positions;
* tokens that rows begin with alike, as questions about one picture do, and padding: see `vlmneurons.run.packing`.

Whether a model's decoder can be called again like that is found and proven by `vlmneurons.run.replayable`.
"""

import contextlib
import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vlmneurons.checks import Keywords
from vlmneurons.files.stopping import hooked
from vlmneurons.model.architectures.hooks import Handle, write
from vlmneurons.model.architectures.inside import is_watched
from vlmneurons.model.architectures.layout import MLP
from vlmneurons.model.down import is_plain
from vlmneurons.model.encoder import Batch
from vlmneurons.model.vlm import VLM
from vlmneurons.neurons.sites import Site
from vlmneurons.run.ablation import Ablation, SiteEdit
from vlmneurons.run.editing import edit_columns
from vlmneurons.run.memory import is_out_of_memory, release
from vlmneurons.run.nests import Path, changed, leaves
from vlmneurons.run.owners import OWNERS
from vlmneurons.run.packing import Packing
from vlmneurons.run.pictures import each_once
from vlmneurons.run.readers import Wanted

log = logging.getLogger(__name__)

_CPU_BYTES = 2**21
"""On a CPU, chunks whose widest activations fit its cache are faster than larger ones, by up to a half."""
_CUDA_SHARE = 0.5
"""Of the free memory of a GPU, what a chunk may take."""
_MOST_TOKENS = 2**15
"""More tokens than this in one chunk gain nothing on any GPU."""
_MOST_LOGITS = 2**28
"""Numbers in the logits of one pass; more masks are taken in several passes."""


class CannotReplay(Exception):
    """Raised where a model, or a batch, must be run the plain way; the message says why."""


@dataclass
class Structure:
    """How a model's decoder can be called again.

    Attributes:
        chain: the modules to call one after the other: all layers, or the whole decoder.
        axes: for each module of the chain and each tensor among its arguments the axis of the rows; None where there
            is none.
        hidden: where among the arguments the hidden states are; None where the decoder is called as a whole.
        branches: for a layer its MLP, and the module (a name within the layer) whose input the MLP's output is added
            to, where the layer's output is just that sum.
        narrow: modules of the last layer that need to see no tokens but those whose logits are wanted.
        tokens: for each module of the chain and each tensor with an axis of tokens (an attention mask has two) where it
            is; None where rows cannot be packed.
        mask: where among the arguments the attention mask is; its dtype is ``mask_dtype``.
        ragged: whether tiles of some of a batch's rows were seen to work; else all tiles are of the whole batch.
        most_rows: how many rows have turned out to fit into memory; None as long as none did not.
    """

    chain: list[nn.Module]
    axes: list[dict[Path, int | None]]
    hidden: Path | None
    branches: dict[int, tuple[MLP, str]] = field(default_factory=dict)
    narrow: list[nn.Module] = field(default_factory=list)
    tokens: list[dict[Path, int]] | None = None
    mask: Path | None = None
    mask_dtype: torch.dtype = torch.bool
    ragged: bool = True
    most_rows: int | None = None


def replayed(
    model: VLM,
    structure: Structure,
    wanted: Wanted,
    ablations: Sequence[Ablation],
    rows: Sequence[Sequence[int] | None] | None = None,
) -> Iterator[list[Float[Tensor, "position vocabulary"]]]:
    """The wanted logits under each ablation in turn, as `logits_at` would give them within it.

    The chosen options are those of plain runs, and the logits theirs up to rounding: a matrix product of more rows may
    add its terms in another order.

    Args:
        model: the model, in inference mode.
        structure: how its decoder can be called again.
        wanted: the forward, and what of it is looked at.
        ablations: what to switch off, in the language tower; an empty one gives the untouched model's logits.
        rows: for each ablation the rows of the batch that meet it, whose logits are given; None for all of them.

    Raises:
        CannotReplay: the model did on this batch what it did not do when its structure was looked for, or hooks of
            somebody else are on it, which would see more runs than they should.
    """
    if any(site.tower != "language" for one in ablations for site in one.edits):
        raise CannotReplay("an ablation acts outside the language tower")
    if any(map(is_watched, model.hf.modules())):
        raise CannotReplay("there are hooks of somebody else, which would see other runs than one for each mask")
    vocabulary = getattr(model.hf.get_output_embeddings(), "out_features", 2**18)
    n_rows, most = len(wanted.positions), _MOST_LOGITS // (max(map(len, wanted.positions)) * vocabulary)
    waiting = list(zip(ablations, [None] * len(ablations) if rows is None else rows, strict=True))
    while waiting:
        size = _fitting((n_rows if some is None else len(some) for _, some in waiting), most)
        here, waiting = waiting[:size], waiting[size:]
        one = _Pass(model, structure, wanted, here)
        try:
            yield from one.run()
        except CannotReplay:
            if one.packing is None:
                raise
            structure.tokens = None  # this model's rows are better left as they are
            yield from _Pass(model, structure, wanted, here).run()


def _fitting(sizes: Iterable[int], most: int) -> int:
    """How many of the first sizes make no more than ``most`` together; at least one."""
    return max(1, sum(total <= most for total in itertools.accumulate(sizes)))


# -- one pass ----------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """How a module of the chain was called in the model's own forward, and what it gave."""

    arguments: tuple[tuple, Keywords]
    output: Tensor | None = None
    post: Tensor | None = None
    added: Tensor | None = None
    """What the down projection gave for ``post``."""
    residual: Tensor | None = None


@dataclass(frozen=True)
class _Rows:
    """What a tile is made of.

    Attributes:
        computed: the rows, or packs, of the plain run that are computed in it.
        wanted: for each of the batch's rows that meet its mask, where among the tile's tokens its wanted positions are.
    """

    computed: Int64[Tensor, " computed"]
    wanted: Int64[Tensor, "row position"]


class _Pass:
    """One forward of the model that ends with the rows of all tiles."""

    def __init__(
        self,
        model: VLM,
        structure: Structure,
        wanted: Wanted,
        asked: Sequence[tuple[Ablation, Sequence[int] | None]],
    ) -> None:
        self.model, self.structure, self.wanted = model, structure, wanted
        self.ablations = ablations = [ablation for ablation, _ in asked]
        self.asked = [some for _, some in asked]
        self.ragged = any(some is not None for some in self.asked)
        self.depth = max(map(len, wanted.positions))
        self.packing = self._packing()
        self.n_rows, self.length = wanted.batch["input_ids"].shape if self.packing is None else self.packing.row.shape
        positions = wanted.positions if self.packing is None else self.packing.index(wanted.positions)
        self.narrowing = Narrowing(positions, self.length)
        self.whole, *self.rows = self._made_of([None, *self.asked])
        self.packed: dict[tuple[int, Path], tuple] = {}
        n_modules = len(structure.chain)
        whole = structure.hidden is None
        # The module at which each ablation's tile begins; an empty ablation has none.
        self.starts = [min((0 if whole else s.layer for s in one.edits), default=n_modules) for one in ablations]
        self.behind = [layer for layer in structure.branches if self._can_begin_behind(layer)]
        self.calls: list[Call | None] = [None] * n_modules
        self.tiles: list[int] = []
        """The ablation of each tile that is being computed, in the order of the rows."""
        self.computed = self.whole.computed[:0]
        """The rows of the plain run that the tiles' are copies of."""
        self.replaying = False
        self.tiled: dict[tuple[int, int], Tensor] = {}

    def _packing(self) -> Packing | None:
        """How the rows are packed; None where they are computed as they are."""
        if self.structure.tokens is None or any(one.by_row for one in self.ablations):
            return None
        return Packing.of(self.wanted.batch, self.wanted.positions, apart=self.ragged and self.structure.ragged)

    def _made_of(self, asked: Sequence[Sequence[int] | None]) -> list[_Rows]:
        """What each tile is made of; all tiles of the same rows share it."""
        index = _filled(self.wanted.positions)
        where, packs = index, range(len(index))
        if self.packing is not None:
            where = self.packing.path.cpu().gather(1, index)
            packs = self.packing.pack_of.tolist()
        known: dict[tuple[int, ...], _Rows] = {}
        device = self.wanted.batch["input_ids"].device
        for some in asked:
            rows = tuple(range(len(index)) if some is None else some)
            if rows not in known:
                own = sorted({packs[row] for row in rows}) if self.structure.ragged else range(self.n_rows)
                place = {pack: number for number, pack in enumerate(own)}
                starts = torch.tensor([[place[packs[row]] * self.length] for row in rows])
                known[rows] = _Rows(torch.tensor(list(own), device=device), (where[list(rows)] + starts).to(device))
        return [known[tuple(range(len(index)) if some is None else some)] for some in asked]

    def _can_begin_behind(self, layer: int) -> bool:
        """Whether the tiles that begin at a layer can begin at its down projection."""
        beginning = [one for start, one in zip(self.starts, self.ablations, strict=True) if start == layer]
        name = self.structure.branches[layer][0].name
        return bool(beginning) and all(
            one.at == "post" and all(site.mlp == name for site in one.edits if site.layer == layer) for one in beginning
        )

    def run(self) -> Iterator[list[Tensor]]:
        """The logits of each tile, in the order of the ablations."""
        try:
            with self._hooked(), each_once(self.model.hf, self.wanted.batch):
                logits = self.model.hf(**inputs_of(self.model, self.wanted.batch, self.depth)).logits
        finally:
            self.calls = [None] * len(self.calls)  # and with them the tensors that they hold
            self.tiled.clear()
            self.packed.clear()
        sizes = [len(rows.wanted) for rows in (self.whole, *self.rows)]
        if logits.shape[:2] != (sum(sizes), self.depth):
            raise CannotReplay(f"the model gives logits of shape {tuple(logits.shape)} for {sum(sizes)} rows")
        for tile, some in zip(logits.split(sizes)[1:], self.asked, strict=True):
            positions = self.wanted.positions if some is None else [self.wanted.positions[row] for row in some]
            yield [row[: len(places)] for row, places in zip(tile.float().cpu(), positions, strict=True)]

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[None]:
        with OWNERS.held(self.model.hf, "asked"), hooked(self._hooks()):
            yield

    def _hooks(self) -> Iterator[contextlib.AbstractContextManager[object]]:
        hf, structure = self.model.hf, self.structure
        yield hf.register_forward_pre_hook(lambda module, args: OWNERS.check(module))
        for number, module in enumerate(structure.chain):
            enter = functools.partial(self._enter, number)
            yield module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
            yield module.register_forward_hook(functools.partial(self._leave, number))
        for layer in self.behind:
            keep = functools.partial(self._keep, layer)
            yield self._down(layer).register_forward_pre_hook(functools.partial(keep, "post"))
            yield self._down(layer).register_forward_hook(functools.partial(keep, "added"))
            norm = structure.chain[layer].get_submodule(structure.branches[layer][1])
            yield norm.register_forward_pre_hook(functools.partial(keep, "residual"))
        for module in structure.narrow:
            yield self.narrowing.on_module(module)

    def _down(self, layer: int) -> nn.Module:
        """The down projection of a layer's one MLP."""
        mlp = self.structure.branches[layer][0]
        return self.model.hf.get_submodule(mlp.path).get_submodule(mlp.layout.down)

    # -- hooks of the model's own forward ------------------------------------------------------------------------------

    def _enter(self, number: int, module: nn.Module, args: tuple, kwargs: Keywords) -> Any:
        if self.replaying:
            return None
        if self.calls[number] is not None:
            raise CannotReplay(f"layer {number} runs more than once in a forward")
        hidden = self.structure.hidden
        if number and hidden is not None:
            before = self.calls[number - 1]
            if before is None or dict(leaves((args, kwargs))).get(hidden) is not before.output:
                raise CannotReplay(f"the hidden states change between layers {number - 1} and {number}")
            before.output = None
        given = (args, kwargs) if self.packing is None else self._packed(number, (args, kwargs))
        kept = given
        if hidden is not None and number not in self.starts:  # nobody begins here, so the hidden states can go
            kept = changed(given, lambda path, leaf: None if path == hidden else leaf)
        self.calls[number] = Call(kept)
        return None if self.packing is None else given

    def _packed(self, number: int, given: object) -> Any:
        """The arguments of a module of the chain for packed rows; hidden states that it made of such are left."""
        packing, structure = self.packing, self.structure
        assert packing is not None
        assert structure.tokens is not None
        tokens, axes = structure.tokens[number], structure.axes[number]

        def packed(path: Path, leaf: Any) -> object:
            if path == structure.mask:
                made = packing.mask(leaf, structure.mask_dtype)
                if made is None:
                    raise CannotReplay("the attention mask is not causal")
                return made
            if not isinstance(leaf, Tensor) or path not in tokens or (path == structure.hidden and number):
                return leaf
            row_axis = None if leaf.shape[tokens[path] - 1] == 1 else axes[path]
            if path != structure.hidden and not packing.agrees(leaf, row_axis, tokens[path]):
                raise CannotReplay("tokens that should be shared are at other positions")
            return packing.tokens(leaf, row_axis, tokens[path])

        def once(path: Path, leaf: object) -> object:  # every layer is given the same mask and positions
            known = self.packed.get((id(leaf), path))
            if known is None or known[0] is not leaf:
                known = self.packed[id(leaf), path] = (leaf, packed(path, leaf))
            return known[1]

        return changed(given, lambda path, leaf: packed(path, leaf) if path == structure.hidden else once(path, leaf))

    def _leave(self, number: int, module: nn.Module, args: tuple, output: object) -> object:
        call = self.calls[number]
        if self.replaying or call is None:
            return None
        call.output = hidden_of(output)
        if call.output.shape[:2] != (self.n_rows, self.length):
            raise CannotReplay(f"layer {number} gives hidden states of shape {tuple(call.output.shape)}")
        if number in self.behind and not is_sum(call):
            self.behind.remove(number)
        return with_hidden(output, self._replay(call.output)) if number == len(self.calls) - 1 else None

    def _keep(self, layer: int, name: str, module: nn.Module, args: tuple, output: object = None) -> None:
        call = self.calls[layer]
        if not self.replaying and call is not None and args:
            setattr(call, name, output if name == "added" else args[0])

    # -- hooks of the replay -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _edited(self) -> Iterator[None]:
        """Within, each tile's neurons are edited by its own ablation."""
        edits: dict[Site, dict[int, Callable[..., None]]] = {}
        for number, ablation in enumerate(self.ablations):
            for site in ablation.edits:
                edits.setdefault(site.at(ablation.at), {})[number] = ablation.in_place(site)
        # What a down projection is given is made for it, and nobody else looks on: no copy is needed.
        editors = (
            (site, functools.partial(self._edit_tiles, by_ablation, site.kind == "post"))
            for site, by_ablation in edits.items()
        )
        with hooked(write(self.model.hf, self.model.mlp_of(site), site.kind, edit) for site, edit in editors):
            yield

    def _edit_tiles(
        self,
        by_ablation: Mapping[int, Callable[..., None]],
        in_place: bool,
        values: Tensor,
        tokens: Tensor | None = None,
    ) -> Tensor | None:
        here = [(tile, by_ablation[number]) for tile, number in enumerate(self.tiles) if number in by_ablation]
        if not here:
            return None
        if tokens is not None or not in_place:
            values = values.clone()
        sizes = [len(self.rows[number].computed) for number in self.tiles]
        if tokens is None:
            each = len(values) // sum(sizes)  # some models flatten rows and tokens
            starts = [each * start for start in itertools.accumulate(sizes, initial=0)]
            for tile, edit in here:  # a slice, unlike a part of a split, may be written to where gradients are kept
                edit(values[starts[tile] : starts[tile + 1]])
        else:  # an expert sees some tokens of each tile
            ends = torch.tensor(sizes, device=tokens.device).cumsum(0) * self.length
            owner = torch.bucketize(tokens, ends, right=True)
            for tile, edit in here:
                rows = (owner == tile).nonzero().flatten()
                part = values[rows]
                edit(part, tokens[rows] - (ends[tile] - sizes[tile] * self.length))
                values[rows] = part
        return values

    # -- the replay ----------------------------------------------------------------------------------------------------

    def _replay(self, plain: Float[Tensor, "row token width"]) -> Float[Tensor, "tiled_row position width"]:
        """Hidden states at the wanted positions: of the plain batch, then of each ablation's tile."""
        order = sorted(range(len(self.ablations)), key=lambda number: self.starts[number])
        order = [number for number in order if self.starts[number] < len(self.calls)]
        found = _at(plain, self.whole.wanted)
        results = [found, *(found if some is None else found[list(some)] for some in self.asked)]
        self.replaying = True
        try:
            with self._edited():
                while order:
                    sizes = [len(self.rows[number].computed) for number in order]
                    size = _fitting(sizes, self._most_rows(plain))
                    done = None
                    try:
                        done = self._chunk(order[:size])
                    except (RuntimeError, MemoryError) as error:
                        if size == 1 or not is_out_of_memory(error):
                            raise
                        self.structure.most_rows = sum(sizes[: size // 2])
                        log.warning("out of memory with %d masks at once: going on with %d", size, size // 2)
                    if done is None:
                        self.tiled.clear()
                        release()
                        continue
                    hidden, numbers = done
                    parts = hidden.split([len(self.rows[number].wanted) for number in numbers])
                    for number, part in zip(numbers, parts, strict=True):
                        results[1 + number] = part
                    self.tiled.clear()
                    order = order[size:]
        finally:
            self.replaying, self.tiles = False, []
        return torch.cat(results)

    def _most_rows(self, plain: Tensor) -> int:
        """How many rows of tiles are computed together, if one tile has no more."""
        row = self.length * max(self.model.towers["language"].widths) * plain.element_size()
        if plain.device.type == "cpu":
            size = _CPU_BYTES // row
        else:
            size = _MOST_TOKENS // self.length
            if plain.device.type == "cuda":
                free = torch.cuda.mem_get_info(plain.device)[0]
                free += torch.cuda.memory_reserved(plain.device) - torch.cuda.memory_allocated(plain.device)
                # An MLP holds pre, gate, up, their product and the edited one; attention holds less.
                size = min(size, int(free * _CUDA_SHARE) // (6 * row))
        return min(size, self.structure.most_rows or size)

    def _chunk(self, numbers: Sequence[int]) -> tuple[Float[Tensor, "tiled_row position width"], list[int]]:
        """Call the chain again for some ablations, sorted by where they begin; the order in which their tiles end."""
        hidden: Tensor | None = None
        self.tiles, self.computed = [], self.computed[:0]
        for place in range(self.starts[numbers[0]], len(self.calls)):
            module, call = self.structure.chain[place], self.calls[place]
            assert call is not None
            # Tiles that begin here are copies of the plain run's rows. They join before the module is called, with what
            # it was given; or, where it first differs at its down projection, after it, with its output made anew.
            joining = [number for number in numbers if self.starts[number] == place]
            behind = None
            if joining and place in self.behind:
                behind = self._sum_behind(place, call, joining)
            elif joining:
                given = None if self.structure.hidden is None else dict(leaves(call.arguments))[self.structure.hidden]
                if given is not None:
                    given = given.index_select(0, self._rows_in(joining).to(given.device))
                    hidden = given if hidden is None else torch.cat([hidden, given])
                self._join(joining)
            if self.tiles:
                args, kwargs = self._tiled_arguments(place, call, hidden)
                self.narrowing.rows, self.narrowing.on = self.computed, place == len(self.calls) - 1
                try:
                    hidden = hidden_of(module(*args, **kwargs))
                finally:
                    self.narrowing.rows, self.narrowing.on = None, False
            if behind is not None:
                hidden = behind if hidden is None else torch.cat([hidden, behind])
                self._join(joining)
        assert hidden is not None
        tiles = [self.rows[number] for number in self.tiles]
        starts = itertools.accumulate((len(tile.computed) * self.length for tile in tiles), initial=0)
        wanted = torch.cat([tile.wanted + start for tile, start in zip(tiles, starts, strict=False)])
        return _at(hidden, wanted), self.tiles

    def _join(self, numbers: Sequence[int]) -> None:
        self.tiles = [*self.tiles, *numbers]
        self.computed = torch.cat([self.computed, self._rows_in(numbers)])

    def _rows_in(self, numbers: Sequence[int]) -> Int64[Tensor, " row"]:
        """The rows of the plain run that some tiles are copies of, tile by tile."""
        return torch.cat([self.rows[number].computed for number in numbers])

    def _copied(self, values: Tensor, computed: Int64[Tensor, " row"]) -> Tensor:
        """Some rows of the plain run's values, in which rows and tokens may be flattened."""
        if len(values) == self.n_rows:
            return values.index_select(0, computed.to(values.device))
        rows = values.view(self.n_rows, self.length, *values.shape[1:])
        return rows.index_select(0, computed.to(values.device)).flatten(0, 1)

    def _sum_behind(self, layer: int, call: Call, joining: Sequence[int]) -> Float[Tensor, "tiled_row token width"]:
        """A layer's output for tiles that begin at it, from where they first differ: its down projection's input."""
        assert call.post is not None
        assert call.residual is not None
        assert call.added is not None
        down = self._down(layer)
        edits = [self._edit_of(layer, number) for number in joining]
        edited = [_columns_of(edit) for _, edit in edits]
        few = sum(map(len, edited)) * 4 < len(joining) * call.post.shape[-1]
        if few and type(down) is nn.Linear and is_plain(down.weight) and torch.finfo(down.weight.dtype).eps < 1e-5:
            # The down projection is linear: add what it makes of the difference. In half precision that would round
            # once more than a plain run does.
            parts = []
            for number, at, columns in zip(joining, edits, edited, strict=True):
                columns, rows = columns.to(call.post.device), self.rows[number].computed
                some = len(rows) < self.n_rows
                post, plain = (self._copied(one, rows) if some else one for one in (call.post, call.added))
                old = post.index_select(-1, columns)
                new = self._edited_values(number, at, old, columns, post)
                parts.append(plain + (new - old) @ down.weight[:, columns].T)
            added = torch.cat(parts)
        else:
            before, self.tiles = self.tiles, list(joining)
            added = down(self._copied(call.post, self._rows_in(joining)))
            self.tiles = before
        residual = self._copied(call.residual, self._rows_in(joining))
        return residual + added.view(-1, *call.residual.shape[1:])

    def _edit_of(self, layer: int, number: int) -> tuple[Site, SiteEdit]:
        """What an ablation does to the one MLP of a layer."""
        (found,) = [(site, edit) for site, edit in self.ablations[number].edits.items() if site.layer == layer]
        return found

    def _edited_values(
        self, number: int, at: tuple[Site, SiteEdit], old: Tensor, columns: Tensor, values: Tensor
    ) -> Tensor:
        """Some neurons of one layer as an ablation leaves them: ``old`` are these of ``values``."""
        (site, edit), ablation = at, self.ablations[number]
        if edit.columns is None:
            values = values.clone()
            ablation.in_place(site)(values)
            return values.index_select(-1, columns)
        values, new = old.clone(), None if edit.values is None else edit.values.to(old.device, old.dtype)
        edit_columns(values, torch.arange(len(columns), device=old.device), ablation.mode, ablation.factor, new)
        return values

    def _tiled_arguments(self, place: int, call: Call, hidden: Tensor | None) -> tuple[tuple, Keywords]:
        axes = self.structure.axes[place]
        tokens: Mapping[Path, int] = {}
        if self.packing is not None and self.structure.tokens is not None and self.structure.mask is not None:
            tokens = {**self.structure.tokens[place], self.structure.mask: 1}

        def tiled(path: Path, leaf: object) -> object:
            if path == self.structure.hidden:
                return hidden
            if not isinstance(leaf, Tensor):
                return leaf
            if path not in axes and path not in tokens:
                raise CannotReplay(f"layer {place} gets a tensor at {path} that it did not get before")
            axis = axes.get(path)
            if self.packing is not None and path in tokens:
                axis = tokens[path] - 1  # packed rows do not share positions, even where the batch's own rows do
            if axis is None or (leaf.shape[axis] == 1 and self.n_rows > 1):
                return leaf
            key = (id(leaf), len(self.tiles))  # every layer gets the same mask and positions
            if key not in self.tiled:
                if leaf.shape[axis] == self.n_rows:
                    self.tiled[key] = leaf.index_select(axis, self.computed.to(leaf.device))
                elif len(self.computed) == len(self.tiles) * self.n_rows:  # what rows have many or none of
                    self.tiled[key] = torch.cat([leaf] * len(self.tiles), axis)
                else:
                    raise CannotReplay(f"it is not known what of layer {place}'s tensor at {path} is a row's")
            return self.tiled[key]

        return changed(call.arguments, tiled)


def _columns_of(edit: SiteEdit) -> Int64[Tensor, " neuron"]:
    """The neurons that an edit changes in any row."""
    if edit.columns is not None:
        return edit.columns
    assert edit.mask is not None
    return edit.mask.any(0).nonzero().flatten()


def inputs_of(model: VLM, batch: Batch, depth: int) -> Keywords:
    """Arguments of a forward that projects the first positions to the vocabulary."""
    inputs: Keywords = {**batch, "use_cache": False}
    if "logits_to_keep" in inspect.signature(type(model.hf).forward).parameters:
        inputs["logits_to_keep"] = torch.arange(depth, device=batch["input_ids"].device)
    return inputs


class Narrowing:
    """Lets modules of the last layer compute the wanted positions only, and gives zeros for all others."""

    def __init__(self, positions: Sequence[Sequence[int]], length: int) -> None:
        self.index = _filled(positions)
        self.length = length
        self.on = False
        self.rows: Tensor | None = None
        """Which of the rows the values' are copies of; None for each in its place."""

    def on_module(self, module: nn.Module) -> Handle:
        """The hooks on a module, which act while `on` is set."""
        return Handle([module.register_forward_pre_hook(self._narrow), module.register_forward_hook(self._widen)])

    def at_wanted(self, values: Float[Tensor, "row token width"]) -> Float[Tensor, "row position width"]:
        """Each row's values at its wanted positions."""
        index = self._index_for(values)
        return values.gather(1, index[..., None].expand(*index.shape, values.shape[-1]))

    def _index_for(self, values: Tensor) -> Int64[Tensor, "row position"]:
        self.index = self.index.to(values.device)
        return self.index if self.rows is None else self.index[self.rows.to(values.device)]

    def _narrow(self, module: nn.Module, args: tuple) -> tuple | None:
        return (self.at_wanted(args[0]), *args[1:]) if self.on else None

    def _widen(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if not self.on:
            return None
        wide = output.new_zeros((len(output), self.length, output.shape[2]))
        return wide.scatter_(1, self._index_for(output)[..., None].expand_as(output), output)


def _at(values: Float[Tensor, "computed token width"], index: Int64[Tensor, "row position"]) -> Tensor:
    """Values at some places among the tokens of all rows: ``[row, position, width]``."""
    return values.flatten(0, 1)[index.to(values.device)]


def _filled(positions: Sequence[Sequence[int]]) -> Int64[Tensor, "row position"]:
    """As many positions in each row, the last of a row repeated."""
    depth = max(map(len, positions))
    return torch.tensor([[*row, *[row[-1]] * (depth - len(row))] for row in positions])


def is_sum(call: Call) -> bool:
    """Whether a layer's output is what its MLP was given plus what it gave, to the last bit."""
    if call.post is None or call.added is None or call.residual is None or call.output is None:
        return False
    if call.residual.shape != call.output.shape or call.added.numel() != call.output.numel():
        return False
    return torch.equal(call.residual + call.added.view_as(call.output), call.output)


def hidden_of(output: object) -> Tensor:
    """The hidden states that a layer, or a decoder, gives."""
    first = output[0] if isinstance(output, tuple | list) else output
    hidden = first if isinstance(first, Tensor) else getattr(first, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        raise CannotReplay(f"a layer gives {type(first).__name__}, not hidden states of each token")
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """The same output with other hidden states."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, tuple | list):
        return type(output)([hidden, *output[1:]])
    output.last_hidden_state = hidden
    return output
