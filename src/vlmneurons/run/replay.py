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

Whether a model's decoder can be called again like that is not guessed from its name: `Structure.of` runs it on two and
on three questions to see which axis of every argument is the rows', then compares the logits under four masks with
those of plain runs; so it does with packed rows. A decoder that changes the hidden states between its layers (as one
that adds picture features there, like Qwen3-VL's) is called again as a whole; one that fails this as well is left
alone.
"""

import contextlib
import functools
import inspect
import itertools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vlmneurons.checks import Keywords
from vlmneurons.errors import AblationError, QuestionError
from vlmneurons.files.stopping import Undivided, UndividedStack
from vlmneurons.model.architectures.hooks import Handle, write
from vlmneurons.model.architectures.inside import Removable, is_watched
from vlmneurons.model.architectures.layout import MLP
from vlmneurons.model.down import is_plain
from vlmneurons.model.encoder import Batch
from vlmneurons.model.vlm import VLM
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.neurons.sites import Site
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.run.ablation import Ablation, _Edit
from vlmneurons.run.editing import edit_columns
from vlmneurons.run.memory import is_out_of_memory, release
from vlmneurons.run.owners import OWNERS
from vlmneurons.run.packing import Packing
from vlmneurons.run.pictures import each_once
from vlmneurons.run.readers import Wanted, logits_at

log = logging.getLogger(__name__)

_CPU_BYTES = 2**21
"""On a CPU, chunks whose widest activations fit its cache are faster than larger ones, by up to a half."""
_CUDA_SHARE = 0.5
"""Of the free memory of a GPU, what a chunk may take."""
_MOST_TOKENS = 2**15
"""More tokens than this in one chunk gain nothing on any GPU."""
_MOST_LOGITS = 2**28
"""Numbers in the logits of one pass; more masks are taken in several passes."""
Path = tuple[object, ...]
"""Where a leaf is in a nest of tuples, lists and mappings: its indices and keys."""


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

    @classmethod
    def of(cls, model: VLM, questions: QuestionSet) -> "Structure":
        """The structure of a model, found and proven once for questions with pictures, and once for those without.

        Raises:
            CannotReplay: it has none.
        """
        known = _KNOWN.setdefault(model.hf, {})
        key = tuple(map(bool, questions[0].n_media))
        if key not in known:
            try:
                known[key] = _found(model, questions)
            except CannotReplay as why:
                known[key] = str(why)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                known[key] = "there is not enough memory to try it out on three questions at once"
        structure = known[key]
        if isinstance(structure, str):
            raise CannotReplay(structure)
        return structure


_KNOWN: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[bool, ...], Structure | str]]" = weakref.WeakKeyDictionary()


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
    if any(site.tower != "language" for one in ablations for site in one._edits):
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
class _Call:
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
        self.narrowing = _Narrowing(positions, self.length)
        self.whole, *self.rows = self._made_of([None, *self.asked])
        self.packed: dict[tuple[int, Path], tuple] = {}
        n_modules = len(structure.chain)
        whole = structure.hidden is None
        # The module at which each ablation's tile begins; an empty ablation has none.
        self.starts = [min((0 if whole else s.layer for s in one._edits), default=n_modules) for one in ablations]
        self.behind = [layer for layer in structure.branches if self._can_begin_behind(layer)]
        self.calls: list[_Call | None] = [None] * n_modules
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
            one.at == "post" and all(site.mlp == name for site in one._edits if site.layer == layer)
            for one in beginning
        )

    def run(self) -> Iterator[list[Tensor]]:
        """The logits of each tile, in the order of the ablations."""
        try:
            with self._hooked(), each_once(self.model.hf, self.wanted.batch):
                logits = self.model.hf(**_inputs(self.model, self.wanted.batch, self.depth)).logits
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
        hf, structure = self.model.hf, self.structure
        with OWNERS.held(hf, "asked"), UndividedStack() as stack:

            def hook(handle: Removable) -> None:
                stack.callback(handle.remove)

            with Undivided():
                self._hook_all(hook)
                for module in structure.narrow:
                    stack.enter_context(self.narrowing.on_module(module))
            yield

    def _hook_all(self, hook: Callable[[Removable], None]) -> None:
        hf, structure = self.model.hf, self.structure
        hook(hf.register_forward_pre_hook(lambda module, args: OWNERS.check(module)))
        for number, module in enumerate(structure.chain):
            enter = functools.partial(self._enter, number)
            hook(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            hook(module.register_forward_hook(functools.partial(self._leave, number)))
        for layer in self.behind:
            keep = functools.partial(self._keep, layer)
            hook(self._down(layer).register_forward_pre_hook(functools.partial(keep, "post")))
            hook(self._down(layer).register_forward_hook(functools.partial(keep, "added")))
            norm = structure.chain[layer].get_submodule(structure.branches[layer][1])
            hook(norm.register_forward_pre_hook(functools.partial(keep, "residual")))

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
            if before is None or dict(_leaves((args, kwargs))).get(hidden) is not before.output:
                raise CannotReplay(f"the hidden states change between layers {number - 1} and {number}")
            before.output = None
        given = (args, kwargs) if self.packing is None else self._packed(number, (args, kwargs))
        kept = given
        if hidden is not None and number not in self.starts:  # nobody begins here, so the hidden states can go
            kept = _changed(given, lambda path, leaf: None if path == hidden else leaf)
        self.calls[number] = _Call(kept)
        return None if self.packing is None else given

    def _packed(self, number: int, given: object) -> Any:
        """The arguments of a module of the chain for packed rows; hidden states that it made of such are left."""
        packing, structure = self.packing, self.structure
        assert packing is not None
        assert structure.tokens is not None
        tokens, axes = structure.tokens[number], structure.axes[number]

        def packed(path: Path, leaf: Any) -> Any:
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

        def once(path: Path, leaf: object) -> Any:  # every layer is given the same mask and positions
            known = self.packed.get((id(leaf), path))
            if known is None or known[0] is not leaf:
                known = self.packed[id(leaf), path] = (leaf, packed(path, leaf))
            return known[1]

        return _changed(given, lambda path, leaf: packed(path, leaf) if path == structure.hidden else once(path, leaf))

    def _leave(self, number: int, module: nn.Module, args: tuple, output: object) -> Any:
        call = self.calls[number]
        if self.replaying or call is None:
            return None
        call.output = _hidden(output)
        if call.output.shape[:2] != (self.n_rows, self.length):
            raise CannotReplay(f"layer {number} gives hidden states of shape {tuple(call.output.shape)}")
        if number in self.behind and not _is_sum(call):
            self.behind.remove(number)
        return _with_hidden(output, self._replay(call.output)) if number == len(self.calls) - 1 else None

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
            for site, edit in ablation._edits.items():
                edits.setdefault(site.at(ablation.at), {})[number] = ablation._in_place(site, edit)
        with UndividedStack() as stack:
            with Undivided():
                for site, by_ablation in edits.items():
                    # What a down projection is given is made for it, and nobody else looks on: no copy is needed.
                    edit_tiles = functools.partial(self._edit_tiles, by_ablation, site.kind == "post")
                    stack.enter_context(write(self.model.hf, self.model.mlp_of(site), site.kind, edit_tiles))
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
                given = None if self.structure.hidden is None else dict(_leaves(call.arguments))[self.structure.hidden]
                if given is not None:
                    given = given.index_select(0, self._rows_in(joining).to(given.device))
                    hidden = given if hidden is None else torch.cat([hidden, given])
                self._join(joining)
            if self.tiles:
                args, kwargs = self._tiled_arguments(place, call, hidden)
                self.narrowing.rows, self.narrowing.on = self.computed, place == len(self.calls) - 1
                try:
                    hidden = _hidden(module(*args, **kwargs))
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

    def _sum_behind(self, layer: int, call: _Call, joining: Sequence[int]) -> Float[Tensor, "tiled_row token width"]:
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

    def _edit_of(self, layer: int, number: int) -> tuple[Site, _Edit]:
        """What an ablation does to the one MLP of a layer."""
        (found,) = [(site, edit) for site, edit in self.ablations[number]._edits.items() if site.layer == layer]
        return found

    def _edited_values(
        self, number: int, at: tuple[Site, _Edit], old: Tensor, columns: Tensor, values: Tensor
    ) -> Tensor:
        """Some neurons of one layer as an ablation leaves them: ``old`` are these of ``values``."""
        (site, edit), ablation = at, self.ablations[number]
        if edit.columns is None:
            values = values.clone()
            ablation._in_place(site, edit)(values)
            return values.index_select(-1, columns)
        values, new = old.clone(), None if edit.values is None else edit.values.to(old.device, old.dtype)
        edit_columns(values, torch.arange(len(columns), device=old.device), ablation.mode, ablation.factor, new)
        return values

    def _tiled_arguments(self, place: int, call: _Call, hidden: Tensor | None) -> tuple[tuple, Keywords]:
        axes = self.structure.axes[place]
        tokens: Mapping[Path, int] = {}
        if self.packing is not None and self.structure.tokens is not None and self.structure.mask is not None:
            tokens = {**self.structure.tokens[place], self.structure.mask: 1}

        def tiled(path: Path, leaf: object) -> Any:
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

        return _changed(call.arguments, tiled)


def _columns_of(edit: _Edit) -> Int64[Tensor, " neuron"]:
    """The neurons that an edit changes in any row."""
    if edit.columns is not None:
        return edit.columns
    assert edit.mask is not None
    return edit.mask.any(0).nonzero().flatten()


def _inputs(model: VLM, batch: Batch, depth: int) -> Keywords:
    """Arguments of a forward that projects the first positions to the vocabulary."""
    inputs: Keywords = {**batch, "use_cache": False}
    if "logits_to_keep" in inspect.signature(type(model.hf).forward).parameters:
        inputs["logits_to_keep"] = torch.arange(depth, device=batch["input_ids"].device)
    return inputs


class _Narrowing:
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


def _is_sum(call: _Call) -> bool:
    """Whether a layer's output is what its MLP was given plus what it gave, to the last bit."""
    if call.post is None or call.added is None or call.residual is None or call.output is None:
        return False
    if call.residual.shape != call.output.shape or call.added.numel() != call.output.numel():
        return False
    return torch.equal(call.residual + call.added.view_as(call.output), call.output)


# -- nests of arguments ------------------------------------------------------------------------------------------------


def _leaves(value: object, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping):
        for key in value:
            yield from _leaves(value[key], (*path, key))
    elif isinstance(value, tuple | list):
        for key, part in enumerate(value):
            yield from _leaves(part, (*path, key))
    else:
        yield path, value


def _changed(value: object, change: Callable[[Path, Any], object], path: Path = ()) -> Any:
    """The same nest, with ``change(path, leaf)`` in place of every leaf."""
    if isinstance(value, Mapping):
        return {key: _changed(value[key], change, (*path, key)) for key in value}
    if isinstance(value, tuple | list):
        parts = [_changed(part, change, (*path, key)) for key, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return change(path, value)


def _hidden(output: object) -> Tensor:
    """The hidden states that a layer, or a decoder, gives."""
    first = output[0] if isinstance(output, tuple | list) else output
    hidden = first if isinstance(first, Tensor) else getattr(first, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        raise CannotReplay(f"a layer gives {type(first).__name__}, not hidden states of each token")
    return hidden


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, tuple | list):
        return type(output)([hidden, *output[1:]])
    output.last_hidden_state = hidden
    return output


# -- finding and proving a structure -----------------------------------------------------------------------------------


def _found(model: VLM, questions: QuestionSet) -> Structure:
    # Of two lengths, so that there is padding, and a mask; the last batch has a length of its own, and rows that part.
    added = [["", " and so on"], ["", " and so on", " and so on"], ["", " and so on", " or else it is not"]]
    try:
        two, three, parting = (
            model.encoder.rows(questions, [questions[0]] * len(texts), texts, padding_side="right") for texts in added
        )
    except QuestionError as error:
        raise CannotReplay(f"a question cannot be encoded twice: {error}") from error
    return structure_of(model, two, three, parting)


def structure_of(model: VLM, two: Batch, three: Batch, parting: Batch | None = None) -> Structure:
    """How a model's decoder can be called again, found on batches of two and of three rows, and proven on the first.

    Args:
        model: the model, in inference mode.
        two: rows of which not all have the same length.
        three: a third row like one of the two.
        parting: three rows of another length that begin alike and part: whether rows can be packed is tried out on it.

    Raises:
        CannotReplay: it cannot.
    """
    hf = model.hf
    tower = model.towers["language"]
    if getattr(hf.config, "is_encoder_decoder", False):
        raise CannotReplay("an encoder-decoder's encoder runs apart from its decoder")
    layers = [hf.get_submodule(path) for path in tower.layer_paths]
    reasons = []
    for chain in (layers, [hf.get_submodule(_decoder_path(tower.layer_paths))]):
        try:
            structure = _probed(model, chain, two, three, whole=chain is not layers)
            _prove(model, structure, _wanted_of_two(two))
            if parting is not None:
                _pack(model, structure, three, parting)
            return structure
        except AblationError:
            raise
        except Exception as error:  # whatever another model's code may raise: then it is run the plain way
            if is_out_of_memory(error):
                raise
            reasons.append(f"{type(error).__name__}: {error}" if not isinstance(error, CannotReplay) else str(error))
    raise CannotReplay("; ".join(reasons))


def _decoder_path(layer_paths: Sequence[str]) -> str:
    """Path of the module that holds all layers."""
    parts = [path.split(".")[:-2] for path in layer_paths]
    shared = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    if not shared:
        raise CannotReplay("the layers are in no module of their own")
    return ".".join(shared)


def _probed(model: VLM, chain: list[nn.Module], two: Batch, three: Batch, *, whole: bool) -> Structure:
    """What two and three rows have in common, and what not."""
    seen = [_observed(model, chain, batch) for batch in (two, three)]
    axes = [_row_axes(place, first[0], second[0]) for place, (first, second) in enumerate(zip(*seen, strict=True))]
    structure = Structure(chain, axes, None)
    if whole:
        return structure
    hidden = {
        path
        for (before, given), (after, _) in zip(seen[0], seen[0][1:])
        for path, leaf in after.items()
        if leaf is given
    } or {path for path, leaf in seen[0][0][0].items() if path in ((0, 0), (1, "hidden_states"))}
    if len(hidden) != 1:
        raise CannotReplay("a layer's hidden states are not those that the layer before gave")
    (structure.hidden,) = hidden
    if any(by_path.get(structure.hidden) != 0 for by_path in axes):
        raise CannotReplay("the hidden states' first axis is not the rows'")
    by_layer: dict[int, list[MLP]] = {}
    for mlp in model.towers["language"].mlps:
        by_layer.setdefault(mlp.layer, []).append(mlp)
    alone = {layer: mlps[0] for layer, mlps in by_layer.items() if len(mlps) == 1 and not mlps[0].routed}
    alone = {layer: mlp for layer, mlp in alone.items() if mlp.expert is None}
    structure.branches = _branches(model, chain, alone, two)
    structure.narrow = _narrow_modules(model, chain[-1], alone.get(len(chain) - 1), two)
    return structure


def _observed(model: VLM, chain: Sequence[nn.Module], batch: Batch) -> list[tuple[dict[Path, object], Tensor]]:
    """For each module of the chain what it was given in a plain forward, and the hidden states that it gave."""
    given: dict[int, dict[Path, object]] = {}
    gave: dict[int, Tensor] = {}

    def enter(place: int, module: nn.Module, args: tuple, kwargs: Keywords) -> None:
        if place in given:
            raise CannotReplay(f"layer {place} runs more than once in a forward")
        given[place] = dict(_leaves((args, kwargs)))

    def leave(place: int, module: nn.Module, args: tuple, output: object) -> None:
        gave[place] = _hidden(output)

    with UndividedStack() as stack:
        with Undivided():
            for place, module in enumerate(chain):
                hook = functools.partial(enter, place)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(functools.partial(leave, place)).remove)
        model.hf(**_inputs(model, batch, 2))
    if list(gave) != list(range(len(chain))):
        raise CannotReplay("the layers do not run one after the other, each once")
    return [(given[place], gave[place]) for place in range(len(chain))]


def _row_axes(place: int, two: dict[Path, object], three: dict[Path, object]) -> dict[Path, int | None]:
    axes: dict[Path, int | None] = {}
    if two.keys() != three.keys():
        raise CannotReplay(f"layer {place} is called differently for other numbers of rows")
    for path, leaf in two.items():
        other = three[path]
        if not isinstance(leaf, Tensor):
            if leaf is not None and (not isinstance(leaf, bool | int | float | str | torch.dtype) or leaf != other):
                raise CannotReplay(f"layer {place} is given a {type(leaf).__name__} that may depend on the rows")
            continue
        if not isinstance(other, Tensor) or leaf.ndim != other.ndim:
            raise CannotReplay(f"layer {place} is called differently for other numbers of rows")
        # The rows' axis is as 2 to 3 in the two batches; it may have the tokens of all rows, one row after the other.
        grown = [axis for axis in range(leaf.ndim) if leaf.shape[axis] != other.shape[axis]]
        if len(grown) > 1 or (grown and 3 * leaf.shape[grown[0]] != 2 * other.shape[grown[0]]):
            raise CannotReplay(f"layer {place} is given {tuple(leaf.shape)} for 2 rows, {tuple(other.shape)} for 3")
        axes[path] = grown[0] if grown else None
    return axes


def _branches(
    model: VLM, chain: Sequence[nn.Module], alone: Mapping[int, MLP], batch: Batch
) -> dict[int, tuple[MLP, str]]:
    """For each layer whose output is ``x`` plus what its MLP gives, the module within it that is given ``x``."""
    found: dict[int, tuple[MLP, str]] = {}
    with UndividedStack() as stack:  # one forward: each layer is judged, and forgotten, as soon as it is done

        def watch(layer: int, mlp: MLP) -> None:
            inputs: dict[str, Tensor] = {}
            call = _Call(((), {}))

            def before(name: str, module: nn.Module, args: tuple) -> None:
                if args and isinstance(args[0], Tensor):
                    inputs.setdefault(name, args[0])

            def after_down(module: nn.Module, args: tuple, output: Tensor) -> None:
                call.post, call.added = args[0] if args else None, output

            def after(module: nn.Module, args: tuple, output: object) -> None:
                call.output = _hidden(output)
                for name, call.residual in inputs.items():
                    if _is_sum(call):
                        found[layer] = (mlp, name)
                        break
                inputs.clear()
                call.post = call.added = call.residual = call.output = None

            for name, module in chain[layer].named_modules():
                if name:
                    stack.callback(module.register_forward_pre_hook(functools.partial(before, name)).remove)
            down = model.hf.get_submodule(mlp.path).get_submodule(mlp.layout.down)
            stack.callback(down.register_forward_hook(after_down).remove)
            stack.callback(chain[layer].register_forward_hook(after).remove)

        with Undivided():
            for layer, mlp in alone.items():
                watch(layer, mlp)
        model.hf(**batch, use_cache=False)
    return found


def _narrow_modules(model: VLM, layer: nn.Module, mlp: MLP | None, batch: Batch) -> list[nn.Module]:
    """The modules of the last layer that may see the wanted positions only, each tried out."""
    names = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    if torch.finfo(model.hf.dtype).eps > 1e-5:
        names = []  # rounding hides whether a projection of the attention needs all tokens
    if mlp is not None:
        whole = next((name for name, module in layer.named_modules() if module is model.hf.get_submodule(mlp.path)), "")
        if whole:
            names = [whole, *(name for name in names if not name.startswith(f"{whole}."))]
    wanted = _wanted_of_two(batch)
    plain = logits_at(model, batch, wanted.positions)
    allowed = 16 * torch.finfo(model.hf.dtype).eps * max(float(row.abs().max()) for row in plain)
    narrowing = _Narrowing(wanted.positions, batch["input_ids"].shape[1])
    narrowing.on = True
    found = []
    for name in names:
        # What raises does not see the tokens one by one.
        harmless = contextlib.suppress(RuntimeError, TypeError, IndexError, AttributeError, ValueError)
        with harmless, narrowing.on_module(layer.get_submodule(name)):
            if _distance(plain, logits_at(model, batch, wanted.positions)) <= allowed:
                found.append(layer.get_submodule(name))
    return found


def _wanted_of_two(batch: Batch) -> Wanted:
    """Some positions of the two questions that models are tried out on."""
    last = batch.tokens.last.tolist()
    return Wanted(batch, [[last[0]], [last[1] - 2, last[1]]], [0, 1])


def _pack(model: VLM, structure: Structure, three: Batch, parting: Batch) -> None:
    """Find out where tokens are among the layers' arguments, and try out whether rows can be packed."""
    lengths = [batch["input_ids"].shape[1] for batch in (three, parting)]
    if structure.hidden is None or lengths[0] == lengths[1]:
        return
    found: list[dict[Path, int]] = []
    seen = (_observed(model, structure.chain, batch) for batch in (three, parting))
    for (first, _), (second, _), axes in zip(*seen, structure.axes, strict=True):
        by_path: dict[Path, int] = {}
        for path, leaf in first.items():
            other = second[path]
            if not isinstance(leaf, Tensor) or not isinstance(other, Tensor) or leaf.ndim != other.ndim:
                continue
            # The batches have as many rows and differ in length alone, so an axis that differs is one of tokens.
            grown = [n for n in range(leaf.ndim) if leaf.shape[n] != other.shape[n]]
            if any([leaf.shape[n], other.shape[n]] != lengths for n in grown):
                return
            if grown == [2, 3] and leaf.ndim == 4 and structure.mask in (None, path):  # [row, head, token, token]
                structure.mask, structure.mask_dtype = path, leaf.dtype
            elif len(grown) == 1 and grown[0] and axes.get(path, None) in (None, grown[0] - 1):
                # Right behind the rows' axis; where rows share it, an axis of length 1 stands in the rows' place.
                if axes.get(path) is None and leaf.shape[grown[0] - 1] != 1:
                    return
                by_path[path] = grown[0]
            elif grown:  # tokens in a form that packing cannot cut
                return
        found.append(by_path)
    if structure.mask is None or any(structure.hidden not in by_path for by_path in found):
        return
    structure.tokens = found
    try:
        last = parting.tokens.last.tolist()
        wanted = Wanted(parting, [[last[0]], [last[1]], [last[2] - 2, last[2]]], [0, 1, 2])
        if Packing.of(wanted.batch, wanted.positions) is None:
            raise CannotReplay("there is nothing to try packing on")
        _prove(model, structure, wanted)
    except AblationError:
        raise
    except Exception as error:  # whatever another model's code may raise: then rows are not packed
        structure.tokens = None
        if is_out_of_memory(error):
            raise


def _prove(model: VLM, structure: Structure, wanted: Wanted) -> None:
    """Compare the logits of some questions under masks that begin at different layers with those of plain runs."""
    space = model.space("language", "post")
    generator = torch.Generator().manual_seed(0)
    half = torch.rand(len(space), generator=generator) < 0.5
    other = torch.rand(len(space), generator=generator) < 0.5
    layers, n = space.layer_of, len(model.towers["language"].layer_paths)
    parts = [half, other & (layers == layers.min()), half & (layers >= n // 2), other & (layers == layers.max())]
    masks = [Ablation(model, NeuronSet(space, part.nonzero().flatten())) for part in parts]
    plain = logits_at(model, wanted.batch, wanted.positions)
    expected = []
    for mask in masks:
        with mask:
            expected.append(logits_at(model, wanted.batch, wanted.positions))
    effect = max(_distance(plain, one) for one in expected)
    allowed = effect * (1e-3 if torch.finfo(model.hf.dtype).eps < 1e-5 else 0.1)
    for got, one in zip(replayed(model, structure, wanted, masks), expected, strict=True):
        if not _distance(got, one) <= allowed:
            raise CannotReplay(f"its logits differ from plain runs' by {_distance(got, one):.2g}")
    rows = [(1,), None, (0,), (0, len(plain) - 1)]
    try:
        some = list(replayed(model, structure, wanted, masks, rows))
    except Exception as error:
        if isinstance(error, AblationError) or is_out_of_memory(error):
            raise
        structure.ragged = False
        return
    for got, one, own in zip(some, expected, rows, strict=True):
        structure.ragged &= _distance(got, one if own is None else [one[row] for row in own]) <= allowed


def _distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
