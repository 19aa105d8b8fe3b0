"""What a neuron writes: the tokens that its column of the down projection raises and lowers.

The column is taken through what the model itself does with it: a norm that the block puts behind its MLP, the final
norm, the unembedding, and what comes after it (soft-capping, a scale). Which modules these are is watched in one
forward of a short question: the values that one module gives and the next receives show it, not the modules' names.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from vlmneurons.checks import Keywords, as_whole, check_kind
from vlmneurons.errors import ArchitectureError, MismatchError, QuestionError, SelectionError, SiteError
from vlmneurons.files.stopping import hooked
from vlmneurons.model.architectures.layout import MLP, Tower
from vlmneurons.model.down import is_plain, written
from vlmneurons.model.vlm import VLM
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.questions.question import Question
from vlmneurons.run.ablation import Ablation

if TYPE_CHECKING:
    import pandas

_AT_ONCE = 64  # neurons, whose logits are in memory together
_ROWS = 8192  # of the unembedding, in single precision together


def neuron_writes(model: VLM, neurons: NeuronSet, k: int = 10) -> "pandas.DataFrame":
    """The tokens that neurons promote and suppress: their columns of the down projection, seen through the unembedding.

    Computed is, in single precision, by how much each logit would change if the column stood in the residual stream by
    itself: ``head(norm(c)) - head(norm(0))``, where ``c`` is the neuron's column (through the block's own norm behind
    the MLP first, where there is one, as in Gemma 3 and GLM-4V), ``norm`` the final norm with its weights (RMSNorm with
    ``w`` or ``1 + w``, LayerNorm), and ``head`` the unembedding with all that the model does to logits (soft-capping, a
    scale). Biases of either cancel: they are the same for every neuron. As a norm divides by the size of what it gets,
    the logits say which tokens the column points to, not how much of it there is in a run; with a negative value at
    ``post`` (a gated MLP has such) the two directions change places, but for what soft-capping and a LayerNorm's mean
    leave alone. Later layers, which read the column too, are left out.

    Args:
        model: the model, its weights in memory. Adapters and quantised weights are read as the model computes with
            them, rounding included.
        neurons: neurons of the language tower, at any kind of site.
        k: tokens in each direction.

    Returns:
        A row for each neuron, direction and rank, in the order of ``neurons.indices``. Its columns are ``site``,
        ``neuron`` (its number within the site), ``direction`` (``"promotes"`` or ``"suppresses"``), ``rank`` from 1,
        ``token``, ``token_id`` and ``logit`` (the change). Rows of the unembedding that are no token of the tokenizer
        are left out.

    Raises:
        SiteError: a neuron is not of the language tower.
        MismatchError: the neurons are not of this model, or are several sets.
        ArchitectureError: an encoder-decoder; weights that are not in memory; a model whose path from the blocks to the
            logits is another than norms and one unembedding.
        SelectionError: ``k`` is less than 1, or more than there are tokens.

    Source: Geva et al. 2022 (arXiv 2203.14680); the logit lens.

    Example:
        ``vn.neuron_writes(model, selection["Egypt"], k=5)``
    """
    import pandas as pd

    Ablation(model, neurons)  # says what is wrong with them, and is never entered
    check_kind("neurons", neurons, NeuronSet, MismatchError, "one NeuronSet, such as selection['Egypt']")
    k = as_whole("k", k, SelectionError, least=1)
    if k > len(model.tokenizer):
        raise SelectionError(f"k {k} is more than the {len(model.tokenizer)} tokens that there are")
    wanted = {site: numbers for site, numbers in neurons.by_site().items() if len(numbers)}
    for site in wanted:
        if site.tower != "language":
            raise SiteError(f"{site}: only the language tower writes into what the unembedding reads")
    if model.is_encoder_decoder:
        raise ArchitectureError(f"{type(model.hf).__name__} is an encoder-decoder: no final norm to see through")
    rows: list[tuple[object, ...]] = []
    with torch.no_grad():
        path = _Path.of(model, {site.layer for site in wanted}) if wanted else None
        for site, numbers in wanted.items():
            for part in numbers.split(_AT_ONCE):
                assert path is not None
                mlp = model.mlp_of(site)
                logits = path.logits(mlp, written(model.hf, mlp, part))[:, : len(model.tokenizer)]
                best = {name: (sign * logits).topk(k).indices.tolist() for name, sign in _DIRECTIONS.items()}
                for row, number in enumerate(part.tolist()):
                    for name, tokens in best.items():
                        for rank, token in enumerate(tokens[row], start=1):
                            text, value = model.tokenizer.decode([token]), logits[row, token].item()
                            rows.append((str(site), number, name, rank, text, token, value))
    return pd.DataFrame(rows, columns=["site", "neuron", "direction", "rank", "token", "token_id", "logit"])


_DIRECTIONS = {"promotes": 1, "suppresses": -1}


@dataclass
class _Path:
    """What a model does with what its blocks write, as one forward shows it.

    Attributes:
        norm: the norm between the last block and the unembedding.
        head: the unembedding.
        finish: what the model makes of the unembedding's output.
        after: by the path of an MLP, the norm that its block puts behind it, if it does.
    """

    norm: nn.Module
    head: nn.Module
    finish: Callable[[Tensor], Tensor]
    after: dict[str, nn.Module] = field(default_factory=dict)

    @classmethod
    def of(cls, model: VLM, layers: set[int]) -> "_Path":
        """Follow a short question from the blocks to the logits.

        Args:
            model: the model.
            layers: those whose blocks matter.

        Raises:
            ArchitectureError: what stands between is not a norm and one unembedding.
        """
        hf, tower = model.hf, model.towers["language"]
        if any(parameter.device.type == "meta" for parameter in hf.parameters()):
            raise ArchitectureError("weights are not in memory (offloaded, or a model without them): load it whole")
        blocks = {layer: hf.get_submodule(path) for layer, path in enumerate(tower.layer_paths)}
        head, last = hf.get_output_embeddings(), blocks[len(blocks) - 1]
        if head is None:
            raise ArchitectureError(f"{type(hf).__name__} has no unembedding (get_output_embeddings gives None)")
        parent = hf.get_submodule(tower.layer_paths[-1].rpartition(".")[0].rpartition(".")[0])
        # Experts have no output of their own: what the block goes on with is that of the part that they lie in.
        parts = {mlp: hf.get_submodule(_part_of(mlp, tower)) for mlp in tower.mlps if mlp.layer in layers}
        places = (parent, *(blocks[layer] for layer in layers))
        norms = [child for place in places for child in place.children() if _is_norm(child)]
        ran = _watched(model, [last, head, *parts.values()], norms)

        def fed_by(value: Tensor, among: list[nn.Module]) -> nn.Module | None:
            fed = [module for module in among if module in ran and _same(ran[module][0], value)]
            return fed[0] if len(fed) == 1 else None

        norm = fed_by(ran[last][1], [child for child in parent.children() if _is_norm(child)])
        if norm is None or head not in ran or not _same(ran[norm][1], ran[head][0]):
            raise ArchitectureError(
                f"{type(hf).__name__}: between the last block and the unembedding stands something else than one norm, "
                "so what a neuron writes cannot be read off"
            )
        path = cls(norm, head, _finish(model, ran[head][1], ran[hf][1]))
        for mlp, part in parts.items():
            norms = [child for child in blocks[mlp.layer].children() if _is_norm(child)]
            behind = fed_by(ran[part][1], norms)
            if behind is None:
                continue
            # Where several parts have a norm each, a further one may follow on their sum.
            several = {mlp.layer for mlp in parts if parts[mlp] is not part} & {mlp.layer}
            if several or fed_by(ran[behind][1], norms) is not None:
                raise ArchitectureError(f"{tower.layer_paths[mlp.layer]} puts more than one norm behind its MLPs")
            path.after[mlp.path] = behind
        return path

    def logits(self, mlp: MLP, columns: Float[Tensor, "neuron hidden"]) -> Float[Tensor, "neuron token"]:
        """By how much each logit changes where the residual stream is a column, and not nothing."""
        both = torch.cat([columns, torch.zeros_like(columns[:1])])
        if mlp.path in self.after:
            both = _in_single(self.after[mlp.path], both)
            both = both - both[-1]  # the bias of a LayerNorm is no neuron's
        read = _in_single(self.norm, both)
        weight = getattr(self.head, "weight", None)
        if type(self.head) is nn.Linear and is_plain(weight) and weight.is_floating_point():
            made = torch.cat([read.to(part.device) @ part.float().T for part in weight.split(_ROWS)], dim=-1)
            made = made if self.head.bias is None else made + self.head.bias.float()
        else:
            made = self.head(read.to(getattr(weight, "dtype", read.dtype))).float()
        made = self.finish(made)
        return made[:-1] - made[-1]


def _part_of(mlp: MLP, tower: Tower) -> str:
    """The path of the child of its block that is an MLP, or contains it."""
    block = tower.layer_paths[mlp.layer]
    inner = mlp.path.removeprefix(block).lstrip(".").split(".")[0]
    return f"{block}.{inner}" if inner else block


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has no child, and only vectors as weights, as norms do."""
    tensors = [*module.parameters(), *module.buffers()]
    return not [*module.children()] and bool(tensors) and all(tensor.ndim == 1 for tensor in tensors)


def _watched(model: VLM, needed: list[nn.Module], further: list[nn.Module]) -> dict[nn.Module, tuple]:
    """Input and output of modules in a forward of a short question; of the model itself, the logits.

    The question has a picture only where it must: where the processor asks for one, or without it a module does not run
    (the layers of Mllama that look at pictures).

    Raises:
        ArchitectureError: a module that is needed does not run.
    """
    ran: dict[nn.Module, tuple] = {}

    def watch(module: nn.Module, args: tuple[object, ...], kwargs: Keywords, output: object) -> None:
        value = args[0] if args else next(iter(kwargs.values()), None)
        ran[module] = (value, output[0] if isinstance(output, tuple) else output)

    modules = dict.fromkeys([*needed, *further])
    with hooked(module.register_forward_hook(watch, with_kwargs=True) for module in modules):
        for picture in (None, Image.new("RGB", (56, 56), (127, 127, 127))):
            ran.clear()
            try:
                inputs = model.prepare(Question(picture, "Which?", ("this", "that"), 0, "none", id="none"))
            except QuestionError:
                if picture is not None:
                    raise
                continue
            ran[model.hf] = (None, model.hf(**inputs).logits)
            if all(module in ran for module in needed):
                return ran
    missing = next(module for module in needed if module not in ran)
    raise ArchitectureError(
        f"a {type(missing).__name__} on the path to the logits does not run on an ordinary question"
    )


def _same(a: Any, b: Any) -> bool:
    """Whether two values are equal, whatever their shapes."""
    tensors = isinstance(a, Tensor) and isinstance(b, Tensor)
    return tensors and a.numel() == b.numel() and torch.equal(a.flatten(), b.to(a.device, a.dtype).flatten())


def _in_single(module: nn.Module, values: Tensor) -> Tensor:
    """The output of a norm, computed in single precision."""
    weights = {name: value.float() for name, value in [*module.named_parameters(), *module.named_buffers()]}
    device = next(iter(weights.values())).device
    return functional_call(module, weights, (values.to(device),))


def _finish(model: VLM, raw: Tensor, logits: Tensor) -> Callable[[Tensor], Tensor]:
    """What a model does to the unembedding's output: the step in its configuration that gives the logits seen.

    Raises:
        ArchitectureError: no known step gives them.
    """
    config = model.hf.config.get_text_config()
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    cap, times, over = (getattr(config, name, None) for name in names)
    ways: list[Callable[[Tensor], Tensor]] = [lambda x: x]
    if cap:
        ways.append(lambda x: cap * torch.tanh(x / cap))
    if times:
        ways.append(lambda x: x * times)
    if over:
        ways.append(lambda x: x / over)
    close = 8 * torch.finfo(raw.dtype).eps
    for way in ways:
        if raw.shape == logits.shape and torch.allclose(way(raw.float()), logits.float(), rtol=close, atol=close):
            return way
    raise ArchitectureError(f"{type(model.hf).__name__} changes its logits in a way that is not known")
