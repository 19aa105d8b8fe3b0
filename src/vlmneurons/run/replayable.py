"""Whether, and how, a model's decoder can be called again: found by watching it, and proven before it is used.

Nothing is guessed from a model's name. The model runs on two and on three questions, which shows which axis of every
argument is the rows'; then the logits that `replayed` gives under four masks are compared with those of plain runs. The
same is done with packed rows. A decoder that changes the hidden states between its layers (Qwen3-VL's adds picture
features there) is called again as a whole; a decoder that fails this as well is left alone.
"""

import contextlib
import functools
import itertools
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
from vlmneurons.run.readers import Wanted, forward_inputs, logits_at
from vlmneurons.run.replay import replayed
from vlmneurons.run.structure import Branch, Call, CannotReplay, Narrowing, Structure, TokenAxes, hidden_of

_STRUCTURES: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[bool, ...], Structure | str]]"
_STRUCTURES = weakref.WeakKeyDictionary()
"""For each model, and kinds of media that questions may have, its structure, or why it has none."""


def structure_for(model: VLM, questions: QuestionSet) -> Structure:
    """The structure of a model, found and proven once for questions with pictures, and once for those without.

    Raises:
        CannotReplay: it has none.
    """
    structures = _STRUCTURES.setdefault(model.hf, {})
    kind = tuple(map(bool, questions[0].n_media))
    if kind not in structures:
        try:
            structures[kind] = _find_on_first_question(model, questions)
        except CannotReplay as why:
            structures[kind] = str(why)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            structures[kind] = "there is not enough memory to try it out on three questions at once"
    structure = structures[kind]
    if isinstance(structure, str):
        raise CannotReplay(structure)
    return structure


def _find_on_first_question(model: VLM, questions: QuestionSet) -> Structure:
    """The structure, tried out on the first question alone."""
    # Texts of two lengths, so that there is padding, and a mask. The last batch has another length, and rows that part.
    added = [["", " and so on"], ["", " and so on", " and so on"], ["", " and so on", " or else it is not"]]
    try:
        two, three, parting = (
            model.encoder.rows(questions, [questions[0]] * len(texts), texts, padding_side="right") for texts in added
        )
    except QuestionError as error:
        raise CannotReplay(f"a question cannot be encoded twice: {error}") from error
    return find_structure(model, two, three, parting)


def find_structure(model: VLM, two: Batch, three: Batch, parting: Batch | None = None) -> Structure:
    """How a model's decoder can be called again, found on batches of two and of three rows, and proven on the first.

    Args:
        model: the model, in inference mode.
        two: rows of which not all have the same length.
        three: a third row like one of the two.
        parting: three rows of another length that begin alike and part: whether rows can be packed is tried out on it.

    Raises:
        CannotReplay: it cannot.
    """
    if getattr(model.hf.config, "is_encoder_decoder", False):
        raise CannotReplay("an encoder-decoder's encoder runs apart from its decoder")
    paths = model.towers["language"].layer_paths
    reasons = []
    for find in (_structure_of_layers, _structure_of_whole):
        try:
            structure = find(model, paths, two, three)
            _prove(model, structure, _wanted_of_two(two))
            if parting is not None:
                structure.tokens = _token_axes(model, structure, three, parting)
                if not _packs(model, structure, parting):
                    structure.tokens = None
            return structure
        except CannotReplay as why:
            reasons.append(str(why))
        except Exception as error:  # whatever another model's code may raise: then it is run the plain way
            if isinstance(error, AblationError) or is_out_of_memory(error):
                raise
            reasons.append(f"{type(error).__name__}: {error}")
    raise CannotReplay("; ".join(reasons))


# -- how the chain is called -------------------------------------------------------------------------------------------

Seen = list[tuple[dict[Path, object], Tensor]]
"""For each module of a chain the leaves of its arguments in a plain forward, and the hidden states that it gave."""


def _structure_of_whole(model: VLM, layer_paths: Sequence[str], two: Batch, three: Batch) -> Structure:
    """The structure whose chain is the one module that holds all layers."""
    holders = [path.split(".")[:-2] for path in layer_paths]
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*holders, strict=False))
    path = ".".join(names[0] for names in shared)
    if not path:
        raise CannotReplay("the layers are in no module of their own")
    chain = [model.hf.get_submodule(path)]
    return Structure(chain, _row_axes(_observed(model, chain, two), _observed(model, chain, three)), None)


def _structure_of_layers(model: VLM, layer_paths: Sequence[str], two: Batch, three: Batch) -> Structure:
    """The structure whose chain are the layers."""
    chain = [model.hf.get_submodule(path) for path in layer_paths]
    of_two = _observed(model, chain, two)
    axes = _row_axes(of_two, _observed(model, chain, three))
    # The hidden states are what a layer is given of the very tensor that the layer before gave; a single layer is given
    # them first, or by their name.
    hidden = {
        path
        for (_, output), (arguments, _) in itertools.pairwise(of_two)
        for path, leaf in arguments.items()
        if leaf is output
    } or {path for path in of_two[0][0] if path in ((0, 0), (1, "hidden_states"))}
    if len(hidden) != 1:
        raise CannotReplay("a layer's hidden states are not those that the layer before gave")
    path = hidden.pop()
    structure = Structure(chain, axes, path)
    if any(axes_of_layer.get(path) != 0 for axes_of_layer in axes):
        raise CannotReplay("the hidden states' first axis is not the rows'")
    by_layer: dict[int, list[MLP]] = {}
    for mlp in model.towers["language"].mlps:
        by_layer.setdefault(mlp.layer, []).append(mlp)
    only = {layer: mlps[0] for layer, mlps in by_layer.items() if len(mlps) == 1}
    only = {layer: mlp for layer, mlp in only.items() if not mlp.routed and mlp.expert is None}
    structure.branches = _branches(model, chain, only, two)
    structure.narrow = _narrow_modules(model, chain[-1], only.get(len(chain) - 1), two)
    return structure


def _observed(model: VLM, chain: Sequence[nn.Module], batch: Batch) -> Seen:
    """How the modules of a chain are called in a plain forward."""
    arguments: dict[int, dict[Path, object]] = {}
    outputs: dict[int, Tensor] = {}

    def enter(number: int, module: nn.Module, args: tuple, kwargs: Keywords) -> None:
        if number in arguments:
            raise CannotReplay(f"layer {number} runs more than once in a forward")
        arguments[number] = dict(leaves((args, kwargs)))

    def leave(number: int, module: nn.Module, args: tuple, output: object) -> None:
        outputs[number] = hidden_of(output)

    def hooks() -> Iterator[contextlib.AbstractContextManager[object]]:
        for number, module in enumerate(chain):
            yield module.register_forward_pre_hook(functools.partial(enter, number), with_kwargs=True)
            yield module.register_forward_hook(functools.partial(leave, number))

    inputs, _ = forward_inputs(model, batch, [[0, 1]])
    with hooked(hooks()):
        model.hf(**inputs)
    if list(outputs) != list(range(len(chain))):
        raise CannotReplay("the layers do not run one after the other, each once")
    return [(arguments[number], outputs[number]) for number in range(len(chain))]


def _row_axes(of_two: Seen, of_three: Seen) -> list[dict[Path, int | None]]:
    """For each module of a chain, and each tensor that it is given, the axis that grows with the number of rows."""
    all_axes = []
    for number, ((two, _), (three, _)) in enumerate(zip(of_two, of_three, strict=True)):
        if two.keys() != three.keys():
            raise CannotReplay(f"layer {number} is called differently for other numbers of rows")
        axes: dict[Path, int | None] = {}
        for path, leaf in two.items():
            leaf_of_three = three[path]
            if not isinstance(leaf, Tensor):
                plain = leaf is None or isinstance(leaf, bool | int | float | str | torch.dtype)
                if not plain or (leaf is not None and leaf != leaf_of_three):
                    raise CannotReplay(f"layer {number} is given a {type(leaf).__name__} that may depend on the rows")
                continue
            if not isinstance(leaf_of_three, Tensor) or leaf.ndim != leaf_of_three.ndim:
                raise CannotReplay(f"layer {number} is called differently for other numbers of rows")
            # An axis of the rows is as 2 to 3 in the two batches. It may hold the tokens of all rows, row after row.
            shape, shape_of_three = tuple(leaf.shape), tuple(leaf_of_three.shape)
            grown = _differing(leaf, leaf_of_three)
            if len(grown) > 1 or any(3 * shape[axis] != 2 * shape_of_three[axis] for axis in grown):
                raise CannotReplay(f"layer {number} is given {shape} for 2 rows, {shape_of_three} for 3")
            axes[path] = grown[0] if grown else None
        all_axes.append(axes)
    return all_axes


def _differing(first: Tensor, second: Tensor) -> list[int]:
    """The axes in which two tensors' shapes differ."""
    return [axis for axis in range(first.ndim) if first.shape[axis] != second.shape[axis]]


# -- what can be spared ------------------------------------------------------------------------------------------------


def _branches(model: VLM, chain: Sequence[nn.Module], only: Mapping[int, MLP], batch: Batch) -> dict[int, Branch]:
    """The layers whose output is ``x`` plus what their only MLP gives, with the module in them that is given ``x``."""
    branches: dict[int, Branch] = {}

    def watch(layer: int, mlp: MLP) -> Iterator[contextlib.AbstractContextManager[object]]:
        inputs: dict[nn.Module, Tensor] = {}
        call = Call(((), {}))
        down = model.hf.get_submodule(mlp.path).get_submodule(mlp.layout.down)

        def before(module: nn.Module, args: tuple) -> None:
            if args and isinstance(args[0], Tensor):
                inputs.setdefault(module, args[0])

        def after_down(module: nn.Module, args: tuple, output: Tensor) -> None:
            call.post, call.added = args[0] if args else None, output

        def after(module: nn.Module, args: tuple, output: object) -> None:
            call.output = hidden_of(output)
            for behind, call.residual in inputs.items():
                if call.is_sum:
                    branches[layer] = Branch(down, behind)
                    break
            inputs.clear()
            call.post = call.added = call.residual = call.output = None

        for module in itertools.islice(chain[layer].modules(), 1, None):
            yield module.register_forward_pre_hook(before)
        yield down.register_forward_hook(after_down)
        yield chain[layer].register_forward_hook(after)

    with hooked(hook for layer, mlp in only.items() for hook in watch(layer, mlp)):
        model.hf(**batch, use_cache=False)  # one forward: each layer is judged, and forgotten, as soon as it is done
    return branches


def _narrow_modules(model: VLM, layer: nn.Module, mlp: MLP | None, batch: Batch) -> list[nn.Module]:
    """The modules of the last layer that need to see the wanted positions only, each tried out."""
    modules = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    if torch.finfo(model.hf.dtype).eps > 1e-5:
        modules = []  # rounding hides whether a projection of the attention needs all tokens
    if mlp is not None:
        whole = model.hf.get_submodule(mlp.path)
        within = set(whole.modules())
        if whole is not layer:
            modules = [whole, *(module for module in modules if module not in within)]
    wanted = _wanted_of_two(batch)
    plain = logits_at(model, batch, wanted.positions)
    allowed = 16 * torch.finfo(model.hf.dtype).eps * max(float(row.abs().max()) for row in plain)
    n_rows, length = batch["input_ids"].shape
    narrowing = Narrowing(wanted.positions, length)
    narrow = []
    for module in modules:
        # What raises does not see the tokens one by one.
        harmless = contextlib.suppress(RuntimeError, TypeError, IndexError, AttributeError, ValueError)
        with harmless, hooked(narrowing.hooks(module)), narrowing.of_rows(torch.arange(n_rows)):
            if _distance(plain, logits_at(model, batch, wanted.positions)) <= allowed:
                narrow.append(module)
    return narrow


def _token_axes(model: VLM, structure: Structure, three: Batch, parting: Batch) -> TokenAxes | None:
    """Where tokens are among the layers' arguments; None where packing could not cut them out."""
    lengths = [batch["input_ids"].shape[1] for batch in (three, parting)]
    if structure.hidden is None or lengths[0] == lengths[1]:
        return None
    all_axes: list[dict[Path, int]] = []
    masks: dict[Path, torch.dtype] = {}
    of_three, of_parting = (_observed(model, structure.chain, batch) for batch in (three, parting))
    for (first, _), (second, _), row_axes in zip(of_three, of_parting, structure.axes, strict=True):
        axes: dict[Path, int] = {}
        for path, leaf in first.items():
            leaf_of_parting = second[path]
            if not isinstance(leaf, Tensor) or not isinstance(leaf_of_parting, Tensor):
                continue
            if leaf.ndim != leaf_of_parting.ndim:
                return None
            # The batches have as many rows and differ in length alone, so an axis that differs is one of tokens.
            token_axes = _differing(leaf, leaf_of_parting)
            if any([leaf.shape[axis], leaf_of_parting.shape[axis]] != lengths for axis in token_axes):
                return None
            if token_axes == [2, 3] and leaf.ndim == 4:  # [row, head, token, token]
                masks[path] = leaf.dtype
            elif len(token_axes) == 1 and token_axes[0] and row_axes.get(path) in (None, token_axes[0] - 1):
                # Tokens lie right behind the rows; where rows share them, an axis of length 1 is in the rows' place.
                if row_axes.get(path) is None and leaf.shape[token_axes[0] - 1] != 1:
                    return None
                axes[path] = token_axes[0]
            elif token_axes:  # tokens in a form that packing cannot cut
                return None
        all_axes.append(axes)
    if len(masks) != 1 or any(structure.hidden not in axes for axes in all_axes):
        return None
    return TokenAxes(all_axes, *next(iter(masks.items())))


# -- the proof ---------------------------------------------------------------------------------------------------------


def _wanted_of_two(batch: Batch) -> Wanted:
    """Some positions of the two questions that models are tried out on."""
    last = batch.tokens.last.tolist()
    return Wanted(batch, [[last[0]], [last[1] - 2, last[1]]], [0, 1])


def _packs(model: VLM, structure: Structure, parting: Batch) -> bool:
    """Whether packed rows give the logits of plain runs."""
    last = parting.tokens.last.tolist()
    wanted = Wanted(parting, [[last[0]], [last[1]], [last[2] - 2, last[2]]], [0, 1, 2])
    if structure.tokens is None or Packing.of(wanted.batch, wanted.positions) is None:
        return False  # it is not known how, or there is nothing to try it on
    try:
        _prove(model, structure, wanted)
    except Exception as error:  # whatever another model's code may raise: then rows are not packed
        if isinstance(error, AblationError) or is_out_of_memory(error):
            raise
        return False
    return True


def _prove(model: VLM, structure: Structure, wanted: Wanted) -> None:
    """Compare the logits of some questions under masks that begin at different layers with those of plain runs.

    Raises:
        CannotReplay: they differ by more than rounding.
    """
    space = model.space("language", "post")
    generator = torch.Generator().manual_seed(0)
    half = torch.rand(len(space), generator=generator) < 0.5
    another_half = torch.rand(len(space), generator=generator) < 0.5
    layers, n_layers = space.layer_of, len(model.towers["language"].layer_paths)
    parts = [
        half,
        another_half & (layers == layers.min()),
        half & (layers >= n_layers // 2),
        another_half & (layers == layers.max()),
    ]
    masks = [Ablation(model, NeuronSet(space, part.nonzero().flatten())) for part in parts]
    plain = logits_at(model, wanted.batch, wanted.positions)
    expected = []
    for mask in masks:
        with mask:
            expected.append(logits_at(model, wanted.batch, wanted.positions))
    # Rounding is small beside what the masks change: a mask that acts in a wrong place, or not at all, is seen.
    effect = max(_distance(plain, logits) for logits in expected)
    allowed = effect * (1e-3 if torch.finfo(model.hf.dtype).eps < 1e-5 else 0.1)
    for logits, expected_logits in zip(replayed(model, structure, wanted, masks), expected, strict=True):
        distance = _distance(logits, expected_logits)
        if not distance <= allowed:  # NaN too
            raise CannotReplay(f"its logits differ from plain runs' by {distance:.2g}")
    rows = [(1,), None, (0,), (0, len(plain) - 1)]
    try:
        ragged = list(replayed(model, structure, wanted, masks, rows))
    except Exception as error:
        if isinstance(error, AblationError) or is_out_of_memory(error):
            raise
        structure.ragged = False
        return
    for logits, expected_logits, asked in zip(ragged, expected, rows, strict=True):
        expected_rows = expected_logits if asked is None else [expected_logits[row] for row in asked]
        structure.ragged &= _distance(logits, expected_rows) <= allowed


def _distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The largest difference between the logits of some rows."""
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
