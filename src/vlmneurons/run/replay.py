"""One forward, many decoders: the logits of a batch under many masks, computing once what no mask can change.

1. The *plain run*: the model's own forward runs once, on the batch as it is. Hooks keep how each decoder layer was
   called. Rows that begin alike, as questions about one picture do, may be packed on the way, so that their shared
   tokens are there once (see `vlmneurons.run.packing`); what is said of rows below then goes for packs.
2. The *replay*: as soon as the last layer is done, and before the model goes on, the layers are called again on
   *tiles*. A tile is a copy of the rows that are asked under one mask; several tiles are computed together. A mask
   changes nothing before the first layer that it touches, so its tile begins there, with what this layer was given in
   the plain run; often even within the layer, at the down projection.
3. The tiles' last hidden states at the wanted positions take the place of the last layer's output, and the model's own
   forward goes on with them, to its norm and its logits.

So vision tower and embeddings run once, and of each tile neither the layers before its mask, nor, in the last MLP and
the projection to the vocabulary, the positions that nobody asked for. Nothing is computed by other code than the
model's. Whether a model's decoder can be called again like that is found and proven by `vlmneurons.run.replayable`.
"""

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vlmneurons.checks import Keywords
from vlmneurons.files.stopping import hooked
from vlmneurons.model.architectures.hooks import write
from vlmneurons.model.architectures.inside import is_watched
from vlmneurons.model.down import is_plain
from vlmneurons.model.vlm import VLM
from vlmneurons.neurons.sites import Site
from vlmneurons.run.ablation import Ablation
from vlmneurons.run.memory import is_out_of_memory, release
from vlmneurons.run.nests import Path, changed, leaves
from vlmneurons.run.owners import OWNERS
from vlmneurons.run.packing import Packing
from vlmneurons.run.pictures import each_once
from vlmneurons.run.readers import Wanted, forward_inputs
from vlmneurons.run.structure import Call, CannotReplay, Narrowing, Structure, filled_up, hidden_of

log = logging.getLogger(__name__)

_CPU_BYTES = 2**21
"""On a CPU, tiles whose widest activations together fit its cache are faster than more of them, by up to a half."""
_CUDA_SHARE = 0.5
"""The share of a GPU's free memory that tiles may take."""
_MOST_TOKENS = 2**15
"""Computing more tokens than this together gains nothing on any GPU."""
_MOST_LOGITS = 2**28
"""Numbers in the logits of one pass; more masks are taken in several passes."""

Asked = tuple[Ablation, Sequence[int] | None]
"""An ablation, and the rows of the batch that are asked under it; None for all of them."""


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
        rows: for each ablation the rows of the batch that are asked under it; None for all of them.

    Raises:
        CannotReplay: the model did on this batch what it did not do when its structure was found, its rows can only be
            computed together, or hooks of somebody else are on it, which would see other runs than they should.
    """
    if any(site.tower != "language" for ablation in ablations for site in ablation.edits):
        raise CannotReplay("an ablation acts outside the language tower")
    if any(len({site.at(ablation.at) for site in ablation.edits}) < len(ablation.edits) for ablation in ablations):
        raise CannotReplay("an ablation has neurons of two kinds in one MLP, which are edited one after the other")
    if any(map(is_watched, model.hf.modules())):
        raise CannotReplay("there are hooks of somebody else, which would see other runs than one for each mask")
    if rows is not None and not structure.ragged:
        raise CannotReplay("some of a batch's rows cannot be computed without the others")
    waiting: list[Asked] = list(zip(ablations, rows or [None] * len(ablations), strict=True))
    vocabulary = getattr(model.hf.get_output_embeddings(), "out_features", 2**18)
    most_rows = _MOST_LOGITS // (max(map(len, wanted.positions)) * vocabulary)
    while waiting:
        size = _fitting((len(wanted.positions if asked is None else asked) for _, asked in waiting), most_rows)
        masks, waiting = waiting[:size], waiting[size:]
        attempt = _Pass(model, structure, wanted, masks)
        try:
            yield from attempt.run()
        except CannotReplay:  # raised before any logits are given
            if attempt.packing is None:
                raise
            structure.tokens = None  # this model's rows are better left as they are
            yield from _Pass(model, structure, wanted, masks).run()


def _fitting(sizes: Iterable[int], most: int) -> int:
    """How many of the first sizes make no more than ``most`` together; at least one."""
    return max(1, sum(total <= most for total in itertools.accumulate(sizes)))


@dataclass(frozen=True, eq=False)
class _Tile:
    """The rows that are asked under one mask.

    Attributes:
        ablation: the mask.
        asked: the rows of the batch that are asked under it.
        start: the first module of the chain that depends on it; one past the last for a mask of no neurons.
        edits: for each site the function that edits its values in place.
        copied: the rows of the plain run that the tile's rows are copies of.
        wanted: for each row that is asked, where among the tile's tokens its wanted positions are.
    """

    ablation: Ablation
    asked: Sequence[int]
    start: int
    edits: Mapping[Site, Callable[..., None]]
    copied: Int64[Tensor, " copied"]
    wanted: Int64[Tensor, "row position"]


class _Pass:
    """One forward of the model that ends with the rows of all tiles."""

    def __init__(self, model: VLM, structure: Structure, wanted: Wanted, masks: Sequence[Asked]) -> None:
        self.model, self.structure, self.wanted = model, structure, wanted
        self.packing: Packing | None = None
        if structure.tokens is not None and not any(ablation.by_row for ablation, _ in masks):
            ragged = any(rows is not None for _, rows in masks)
            self.packing = Packing.of(wanted.batch, wanted.positions, apart=ragged)
        self.n_rows, self.length = wanted.batch["input_ids"].shape
        """Of the plain run; where rows are packed, how many packs, and how many tokens each has."""
        positions = wanted.positions
        self.row_of = torch.arange(self.n_rows)
        """For each row of the batch the row of the plain run that has its tokens."""
        self.places = filled_up(positions)
        """For each row of the batch where its wanted positions are in this row."""
        if self.packing is not None:
            self.n_rows, self.length = self.packing.row.shape
            positions = self.packing.index(positions)
            self.row_of = self.packing.pack_of.cpu()
            self.places = self.packing.path.cpu().gather(1, self.places)
        self.narrowing = Narrowing(positions, self.length)
        self.tiles = [self._tile(ablation, rows) for ablation, rows in masks]
        self.behind = [layer for layer in structure.branches if self._can_begin_behind(layer)]
        """Layers at whose down projection tiles begin."""
        self.calls: list[Call | None] = [None] * len(structure.chain)
        self.packed: dict[tuple[Path, int], tuple[object, Any]] = {}
        """Arguments of the plain run (by where they are, and by their id), each with what it is for packed rows."""
        self.replaying = False
        self.computing: list[_Tile] = []
        """The tiles that are being computed, in the order of their rows."""
        self.repeated: dict[tuple[int, int], Tensor] = {}
        """Arguments of the plain run (by their id, and by how many tiles there were), repeated for all tiles' rows."""

    def _tile(self, ablation: Ablation, rows: Sequence[int] | None) -> _Tile:
        asked = list(range(len(self.places))) if rows is None else list(rows)
        whole = self.structure.hidden is None
        start = min((0 if whole else site.layer for site in ablation.edits), default=len(self.structure.chain))
        edits = {site.at(ablation.at): ablation.in_place(site) for site in ablation.edits}
        copied, row_in_tile = self.row_of[asked].unique(return_inverse=True)
        wanted = row_in_tile[:, None] * self.length + self.places[asked]
        device = self.wanted.batch["input_ids"].device
        return _Tile(ablation, asked, start, edits, copied.to(device), wanted.to(device))

    def _can_begin_behind(self, layer: int) -> bool:
        """Whether the tiles that begin at a layer can begin at its down projection."""
        beginning = [tile.ablation for tile in self.tiles if tile.start == layer]
        return bool(beginning) and all(ablation.at == "post" for ablation in beginning)

    def run(self) -> Iterator[list[Tensor]]:
        """The logits of each tile, in the order of the masks.

        Raises:
            CannotReplay: before any of them is given.
        """
        depth = self.places.shape[1]
        # With the tiles' hidden states in the place of the batch's, the first positions are all that there are.
        hf, batch = self.model.hf, self.wanted.batch
        inputs, _ = forward_inputs(self.model, batch, [range(depth)])
        try:
            with OWNERS.held(hf, "asked"), hooked(self._hooks()), each_once(hf, batch):
                logits = hf(**inputs).logits
        finally:  # nothing is to hold the tensors any longer
            self.calls = [None] * len(self.calls)
            self.packed.clear()
            self.repeated.clear()
        sizes = [len(tile.asked) for tile in self.tiles]
        if logits.shape[:2] != (sum(sizes), depth):
            raise CannotReplay(f"the model gives logits of shape {tuple(logits.shape)} for {sum(sizes)} rows")
        for tile, logits_of_tile in zip(self.tiles, logits.split(sizes), strict=True):
            rows = zip(tile.asked, logits_of_tile.float().cpu(), strict=True)
            yield [logits_of_row[: len(self.wanted.positions[row])] for row, logits_of_row in rows]

    # -- hooks of the plain run ----------------------------------------------------------------------------------------

    def _hooks(self) -> Iterator[contextlib.AbstractContextManager[object]]:
        yield OWNERS.guard(self.model.hf)
        for number, module in enumerate(self.structure.chain):
            enter = functools.partial(self._enter, number)
            yield module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
            yield module.register_forward_hook(functools.partial(self._leave, number))
        for layer in self.behind:
            branch, keep = self.structure.branches[layer], functools.partial(self._keep, layer)
            yield branch.down.register_forward_pre_hook(functools.partial(keep, "post"))
            yield branch.down.register_forward_hook(functools.partial(keep, "added"))
            yield branch.behind.register_forward_pre_hook(functools.partial(keep, "residual"))
        for module in self.structure.narrow:
            yield from self.narrowing.hooks(module)

    def _enter(self, number: int, module: nn.Module, args: tuple, kwargs: Keywords) -> Any:
        """Keep how a module of the chain is called, and pack its arguments' rows."""
        if self.replaying:
            return None
        if self.calls[number] is not None:
            raise CannotReplay(f"layer {number} runs more than once in a forward")
        hidden = self.structure.hidden
        if number and hidden is not None:
            # A layer that is given the very tensor that the one before gave can be called with a tile's in its place.
            before = self.calls[number - 1]
            if before is None or dict(leaves((args, kwargs))).get(hidden) is not before.output:
                raise CannotReplay(f"the hidden states change between layers {number - 1} and {number}")
            before.output = None
        arguments = (args, kwargs) if self.packing is None else self._packed(self.packing, number, (args, kwargs))
        kept = arguments
        if hidden is not None and not any(tile.start == number for tile in self.tiles):
            # Tiles come here with hidden states of their own, so those of the plain run need not lie in memory.
            kept = changed(arguments, lambda path, leaf: None if path == hidden else leaf)
        self.calls[number] = Call(kept)
        return None if self.packing is None else arguments

    def _keep(self, layer: int, name: str, module: nn.Module, args: tuple, output: object = None) -> None:
        """Keep what the tiles that begin at a layer's down projection need."""
        call = self.calls[layer]
        if not self.replaying and call is not None and args:
            setattr(call, name, output if name == "added" else args[0])

    def _leave(self, number: int, module: nn.Module, args: tuple, output: object) -> object:
        """Check what a module of the chain gives; in the place of what the last one gives comes the replay's."""
        call = self.calls[number]
        if self.replaying or call is None:
            return None
        call.output = hidden_of(output)
        if call.output.shape[:2] != (self.n_rows, self.length):
            raise CannotReplay(f"layer {number} gives hidden states of shape {tuple(call.output.shape)}")
        if number in self.behind and not call.is_sum:
            self.behind.remove(number)  # then its tiles begin at the layer itself
        return None if number < len(self.calls) - 1 else _with_hidden(output, self._replay(call.output))

    def _packed(self, packing: Packing, number: int, arguments: object) -> Any:
        """The arguments of a module of the chain for packed rows."""
        structure, tokens = self.structure, self.structure.tokens
        assert tokens is not None
        token_axes, row_axes = tokens.axes[number], structure.axes[number]

        def pack(path: Path, leaf: Any) -> object:
            if path == tokens.mask:
                mask = packing.mask(leaf, tokens.mask_dtype)
                if mask is None:
                    raise CannotReplay("the attention mask is not causal")
                return mask
            if not isinstance(leaf, Tensor) or path not in token_axes:
                return leaf
            row_axis = None if leaf.shape[token_axes[path] - 1] == 1 else row_axes[path]
            if path != structure.hidden and not packing.agrees(leaf, row_axis, token_axes[path]):
                raise CannotReplay("tokens that should be shared are at other positions")
            return packing.tokens(leaf, row_axis, token_axes[path])

        def pack_once(path: Path, leaf: object) -> object:
            if path == structure.hidden:
                return leaf if number else pack(path, leaf)  # later layers are given what came of packed rows
            key = (path, id(leaf))  # every layer is given the same mask and positions
            if key not in self.packed:
                self.packed[key] = (leaf, pack(path, leaf))  # held on to, no other leaf gets this id
            return self.packed[key][1]

        return changed(arguments, pack_once)

    # -- the replay ----------------------------------------------------------------------------------------------------

    def _replay(self, plain: Float[Tensor, "row token width"]) -> Float[Tensor, "tiled_row position width"]:
        """The hidden states of all tiles at the wanted positions, from the last ones of the plain run."""
        plain_wanted = _at(plain, self.row_of[:, None] * self.length + self.places)
        results = {tile: plain_wanted[tile.asked] for tile in self.tiles}  # with which a mask of no neurons stays
        waiting = sorted((tile for tile in self.tiles if tile.start < len(self.calls)), key=lambda tile: tile.start)
        self.replaying = True
        try:
            with hooked(self._edits()):
                while waiting:
                    sizes = [len(tile.copied) for tile in waiting]
                    size = n_done = _fitting(sizes, self._most_rows(plain))
                    try:
                        results.update(self._compute(waiting[:size]))
                    except (RuntimeError, MemoryError) as error:
                        if size == 1 or not is_out_of_memory(error):
                            raise
                        n_done, self.structure.most_rows = 0, sum(sizes[: size // 2])
                        log.warning("out of memory with %d masks at once: going on with %d", size, size // 2)
                    self.repeated.clear()
                    waiting = waiting[n_done:]
                    if n_done == 0:  # the error is gone by now, and what its traceback held
                        release()
        finally:
            self.replaying, self.computing = False, []
        return torch.cat([results[tile] for tile in self.tiles])

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

    def _compute(self, tiles: Sequence[_Tile]) -> dict[_Tile, Float[Tensor, "row position width"]]:
        """Call the chain again for some tiles, sorted by where they begin: their last hidden states where wanted."""
        hidden: Tensor | None = None
        self.computing = []
        for place in range(tiles[0].start, len(self.calls)):
            call = self.calls[place]
            assert call is not None
            # Tiles that begin here are copies of the plain run's rows. They join before the module is called, with what
            # it was given then; or, where they first differ at its down projection, after it, with its output.
            beginning = [tile for tile in tiles if tile.start == place]
            behind = self._output_behind(place, call, beginning) if beginning and place in self.behind else None
            if beginning and behind is None:
                if self.structure.hidden is not None:
                    plain = dict(leaves(call.arguments))[self.structure.hidden]
                    hidden = _joined(hidden, self._copied(plain, _rows_of(beginning)))
                self.computing += beginning
            if self.computing:
                args, kwargs = self._arguments(place, call, hidden)
                last = place == len(self.calls) - 1
                with self.narrowing.of_rows(_rows_of(self.computing)) if last else contextlib.nullcontext():
                    hidden = hidden_of(self.structure.chain[place](*args, **kwargs))
            if behind is not None:
                hidden = _joined(hidden, behind)
                self.computing += beginning
        assert hidden is not None
        parts = hidden.split([len(tile.copied) for tile in self.computing])
        return {tile: _at(part, tile.wanted) for tile, part in zip(self.computing, parts, strict=True)}

    def _copied(self, values: Tensor, rows: Int64[Tensor, " copied"]) -> Tensor:
        """Copies of some rows of the plain run's values, in which rows and tokens may be flattened."""
        by_row = values if len(values) == self.n_rows else values.view(self.n_rows, self.length, *values.shape[1:])
        copies = by_row.index_select(0, rows.to(values.device))
        return copies if by_row is values else copies.flatten(0, 1)

    def _output_behind(self, layer: int, call: Call, tiles: list[_Tile]) -> Float[Tensor, "tiled_row token width"]:
        """A layer's output for tiles that begin at its down projection.

        All that the layer computes before is as in the plain run. In that run its output was seen to be the sum of what
        the down projection gave and of a residual, which no edit at the down projection changes.
        """
        assert call.post is not None
        assert call.residual is not None
        assert call.added is not None
        down = self.structure.branches[layer].down
        # The layer has one MLP, so each mask has one edit here; it acts at `post`, wherever its neurons were selected.
        sites = [next(site for site in tile.ablation.edits if site.layer == layer) for tile in tiles]
        columns = [tile.ablation.edits[site].columns for tile, site in zip(tiles, sites, strict=True)]
        if _change_little(columns, down, call.post.shape[-1]):
            # The down projection is linear: to what it gave, add what it makes of the difference.
            weight, parts = cast(nn.Linear, down).weight, []
            for tile, site, edited in zip(tiles, sites, columns, strict=True):
                index = edited.to(call.post.device)
                post = self._copied(call.post, tile.copied)
                before = post.index_select(-1, index)
                tile.edits[site.at("post")](post)
                difference = post.index_select(-1, index) - before
                parts.append(self._copied(call.added, tile.copied) + difference @ weight[:, index].T)
            added = torch.cat(parts)
        else:
            computing, self.computing = self.computing, tiles  # whose values the projection's hook edits
            added = down(self._copied(call.post, _rows_of(tiles)))
            self.computing = computing
        residual = self._copied(call.residual, _rows_of(tiles))
        return residual + added.view_as(residual)

    def _arguments(self, place: int, call: Call, hidden: Tensor | None) -> tuple[tuple, Keywords]:
        """What a module of the chain is called with for the tiles that are being computed."""
        axes, tokens = self.structure.axes[place], self.structure.tokens
        if self.packing is not None and tokens is not None:
            # What has tokens has packs right before them, even where the batch's own rows share one position.
            axes = {**axes, **{path: axis - 1 for path, axis in tokens.axes[place].items()}, tokens.mask: 0}
        rows, n_tiles = _rows_of(self.computing), len(self.computing)

        def repeat(path: Path, leaf: object) -> object:
            if path == self.structure.hidden:
                return hidden
            if not isinstance(leaf, Tensor):
                return leaf
            if path not in axes:
                raise CannotReplay(f"layer {place} gets a tensor at {path} that it did not get before")
            axis = axes[path]
            if axis is None or (leaf.shape[axis] == 1 and self.n_rows > 1):
                return leaf  # it is the same for all rows
            key = (id(leaf), n_tiles)  # every layer is given the same mask and positions
            if key not in self.repeated:
                if leaf.shape[axis] == self.n_rows:
                    self.repeated[key] = leaf.index_select(axis, rows.to(leaf.device))
                elif len(rows) == n_tiles * self.n_rows:  # a row has several, or none; but the tiles have all rows
                    self.repeated[key] = torch.cat([leaf] * n_tiles, axis)
                else:
                    raise CannotReplay(f"it is not known what of layer {place}'s tensor at {path} is a row's")
            return self.repeated[key]

        return changed(call.arguments, repeat)

    # -- hooks of the replay -------------------------------------------------------------------------------------------

    def _edits(self) -> Iterator[contextlib.AbstractContextManager[object]]:
        """Hooks that edit each tile's neurons by its own ablation."""
        for site in dict.fromkeys(site for tile in self.tiles for site in tile.edits):
            edit = functools.partial(self._edit_tiles, site)
            yield write(self.model.hf, self.model.mlp_of(site), site.kind, edit)

    def _edit_tiles(self, site: Site, values: Tensor, tokens: Tensor | None = None) -> Tensor | None:
        """The values of one site, edited in the rows of those tiles whose masks have neurons there."""
        edited = [number for number, tile in enumerate(self.computing) if site in tile.edits]
        if not edited:
            return None
        if tokens is not None or site.kind != "post":
            values = values.clone()  # what a down projection is given is made for it, and nobody else looks on
        sizes = [len(tile.copied) for tile in self.computing]
        if tokens is None:
            n_each = len(values) // sum(sizes)  # more than 1 in models that flatten rows and tokens
            starts = [n_each * start for start in itertools.accumulate(sizes, initial=0)]
            for number in edited:  # a slice, unlike a part of a split, may be written to where gradients are kept
                self.computing[number].edits[site](values[starts[number] : starts[number + 1]])
        else:  # an expert sees some tokens of each tile
            ends = torch.tensor(sizes, device=tokens.device).cumsum(0) * self.length
            tile_of = torch.bucketize(tokens, ends, right=True)
            for number in edited:
                places = (tile_of == number).nonzero().flatten()
                part = values[places]
                self.computing[number].edits[site](part, tokens[places] - (ends[number] - sizes[number] * self.length))
                values[places] = part
        return values


def _rows_of(tiles: Sequence[_Tile]) -> Int64[Tensor, " copied"]:
    """The rows of the plain run that some tiles are copies of, tile by tile."""
    return torch.cat([tile.copied for tile in tiles])


def _joined(hidden: Tensor | None, further: Tensor) -> Tensor:
    return further if hidden is None else torch.cat([hidden, further])


def _at(values: Float[Tensor, "copied token width"], index: Int64[Tensor, "row position"]) -> Tensor:
    """Values at some places among the tokens of all rows: ``[row, position, width]``."""
    return values.flatten(0, 1)[index.to(values.device)]


def _change_little(columns: Sequence[Tensor | None], down: nn.Module, width: int) -> TypeGuard[Sequence[Tensor]]:
    """Whether it is faster, and as exact, to give a down projection the edited neurons only.

    Args:
        columns: for each tile the neurons that its mask edits; None where each row has neurons of its own.
        down: the down projection.
        width: how many neurons it is given.
    """
    n_edited = [width if edited is None else len(edited) for edited in columns]
    if sum(n_edited) * 4 >= width * len(columns) or any(edited is None for edited in columns):
        return False
    # In half precision the sum would be rounded once more than in a plain run.
    return type(down) is nn.Linear and is_plain(down.weight) and torch.finfo(down.weight.dtype).eps < 1e-5


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """What a layer, or a decoder, gave, with other hidden states."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, tuple | list):
        return type(output)([hidden, *output[1:]])
    output.last_hidden_state = hidden
    return output
