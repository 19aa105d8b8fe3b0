"""Whether, and how, a model's decoder can be called again: found by watching it, and proven before it is used.

Nothing is guessed from a model's name. It runs on two and on three questions, which shows what axis of every argument
is the rows'; then the logits of `replayed` under four masks are compared with those of plain runs; so it is with
packed rows. A decoder that changes the hidden states between its layers (as one that adds picture features there, like
Qwen3-VL's) is called again as a whole; one that fails this as well is left alone.
"""

import contextlib
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from vlmneurons.checks import Keywords
from vlmneurons.errors import AblationError, QuestionError
from vlmneurons.files.stopping import hooked
from vlmneurons.model.architectures.layout import MLP
from vlmneurons.model.encoder import Batch
from vlmneurons.model.vlm import VLM
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.run.ablation import Ablation
from vlmneurons.run.memory import is_out_of_memory
from vlmneurons.run.nests import Path, leaves
from vlmneurons.run.packing import Packing
from vlmneurons.run.readers import Wanted, logits_at
from vlmneurons.run.replay import (
    Call,
    CannotReplay,
    Narrowing,
    Structure,
    hidden_of,
    inputs_of,
    is_sum,
    replayed,
)

_KNOWN: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[bool, ...], Structure | str]]" = weakref.WeakKeyDictionary()


def structure_for(model: VLM, questions: QuestionSet) -> Structure:
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
        given[place] = dict(leaves((args, kwargs)))

    def leave(place: int, module: nn.Module, args: tuple, output: object) -> None:
        gave[place] = hidden_of(output)

    def hooks() -> Iterator[contextlib.AbstractContextManager[object]]:
        for place, module in enumerate(chain):
            yield module.register_forward_pre_hook(functools.partial(enter, place), with_kwargs=True)
            yield module.register_forward_hook(functools.partial(leave, place))

    with hooked(hooks()):
        model.hf(**inputs_of(model, batch, 2))
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

    def watch(layer: int, mlp: MLP) -> Iterator[contextlib.AbstractContextManager[object]]:
        inputs: dict[str, Tensor] = {}
        call = Call(((), {}))

        def before(name: str, module: nn.Module, args: tuple) -> None:
            if args and isinstance(args[0], Tensor):
                inputs.setdefault(name, args[0])

        def after_down(module: nn.Module, args: tuple, output: Tensor) -> None:
            call.post, call.added = args[0] if args else None, output

        def after(module: nn.Module, args: tuple, output: object) -> None:
            call.output = hidden_of(output)
            for name, call.residual in inputs.items():
                if is_sum(call):
                    found[layer] = (mlp, name)
                    break
            inputs.clear()
            call.post = call.added = call.residual = call.output = None

        for name, module in chain[layer].named_modules():
            if name:
                yield module.register_forward_pre_hook(functools.partial(before, name))
        down = model.hf.get_submodule(mlp.path).get_submodule(mlp.layout.down)
        yield down.register_forward_hook(after_down)
        yield chain[layer].register_forward_hook(after)

    with hooked(hook for layer, mlp in alone.items() for hook in watch(layer, mlp)):
        model.hf(**batch, use_cache=False)  # one forward: each layer is judged, and forgotten, as soon as it is done
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
    narrowing = Narrowing(wanted.positions, batch["input_ids"].shape[1])
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
