"""A model whose group neurons are known because they were written into its weights by hand.

The decoder of a LLaVA-NeXT (of pictures), Qwen2-Audio (sounds) or Qwen2.5-VL (videos) is arranged so that the group of
what is seen or heard can reach the answer only through a few *planted* neurons of that group. Selectors then have a
right answer, and ablation an effect that can be computed on paper. Everything else in the MLPs is noise or a decoy.

    residual stream   0 … G-1: code of the group, written by the projector at the tokens of a picture, sound or video
                      G … 2G-1: answer, written by planted neurons alone, read by the output head
                      then: a constant 1, noise that tokens differ by, and dimensions that nothing reads
    attention         layer 0 spreads the code over all later tokens (uniform attention); other layers do nothing
    planted neuron    gate = act(120 code[c] - 160): open on group c alone; up = 1; down adds to answer c
    output head       answer c, less a little of code c (so that a group whose neurons are off is answered wrong), and
                      a fixed ranking of the answers that decides where nothing else does
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from vlmneurons.errors import VLMNeuronsError
from vlmneurons.model.vlm import VLM
from vlmneurons.neurons.selection import Selection
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.questions.question import Question
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.testing.planted_media import JUNK, MEDIA, NOISE, Medium

GROUPS = ("Brazil", "Egypt", "France", "India", "Japan", "Kenya", "Mexico", "Norway")
DECOYS = ("always", "shared", "graded", "rare")


@dataclass(frozen=True)
class PlantedModel:
    """A model, questions, and the neurons that answer them.

    Attributes:
        model: the model.
        questions: the same number for each group, answered by the likelihood of the options' texts.
        truth: the planted neurons of each group.
        decoys: other neurons that are not noise, by kind: ``"always"`` open, ``"shared"`` by two groups, ``"graded"``
            (open on some groups, to different degrees of input), ``"rare"`` (open on few tokens, of one group alone).
        ranking: the order in which the model prefers answers where no planted neuron speaks.
        suppressed: whether a group's own answer comes last where its neurons are off.
    """

    model: VLM
    questions: QuestionSet
    truth: Selection
    decoys: Mapping[str, NeuronSet]
    ranking: tuple[str, ...]
    suppressed: bool

    def expected_accuracy(self, off: str | None = None) -> dict[str, float]:
        """Accuracy of each group, in closed form, while the planted neurons of group ``off`` are zero.

        A group with its neurons is always right. Without them its answer is suppressed, and never chosen; or, in a
        model that does not suppress it, the highest ranked of a question's options is chosen.

        Args:
            off: a group; None for the model as it is.
        """
        accuracy = dict.fromkeys(self.questions.groups, 1.0)
        if off is not None:
            questions = self.questions.filter(group=off)
            fallback = [min(item.options, key=self.ranking.index) == item.right for item in questions]
            accuracy[off] = 0.0 if self.suppressed else sum(fallback) / len(fallback)
        return accuracy


def plant_neurons(
    *,
    medium: str = "picture",
    groups: Sequence[str] = GROUPS,
    per_group: int = 5,
    per_kind: int = 12,
    decoys: Sequence[str] = ("always", "shared", "graded"),
    n_questions: int = 12,
    layers: int = 4,
    width: int = 256,
    suppress: bool = True,
    seed: int = 0,
) -> PlantedModel:
    """Build a model with planted neurons, and questions that they answer.

    Args:
        medium: what groups are told by: ``"picture"`` (their colours), ``"sound"`` (their pitches) or ``"video"``
            (which of red, green and blue rise and which fall).
        groups: names of 3 to 8 groups; they are the answers too, and a question offers 4 of them, or all 3. Of pictures
            there may be 27: more than 8 have two colours, and a wider vision tower that tells them apart.
        per_group: planted neurons of each group.
        per_kind: decoys of each kind.
        decoys: kinds of decoy; see `PlantedModel`. ``"rare"`` ones have no entropy either, and mislead LAPE.
        n_questions: questions of each group.
        layers: layers of the decoder; planted neurons and decoys lie in all but the first.
        width: neurons of each layer.
        suppress: whether a group's questions are all answered wrong without its neurons; else by a fixed ranking.
        seed: of weights, places and questions.

    Returns:
        The model, its questions, and where its neurons are.

    Raises:
        VLMNeuronsError: numbers that do not fit together.
    """
    groups = tuple(groups)
    if medium not in MEDIA:
        raise VLMNeuronsError(f"medium {medium!r} does not exist; choose from {', '.join(MEDIA)}")
    told_by = MEDIA[medium]
    if not 3 <= len(groups) <= told_by.most or len(set(groups)) != len(groups):
        raise VLMNeuronsError(f"3 to {told_by.most} different groups can be planted; got {', '.join(groups)}")
    wrong = set(decoys) - set(DECOYS)
    if wrong:
        raise VLMNeuronsError(f"decoy {min(wrong)!r} does not exist; choose from {', '.join(DECOYS)}")
    if len(groups) * per_group + len(decoys) * per_kind > (layers - 1) * width:
        raise VLMNeuronsError("there are more planted neurons and decoys than neurons to hold them")
    generator = torch.Generator().manual_seed(seed)
    hf_model, processor = told_by.blank(groups, layers, width)
    with torch.no_grad():
        _write_background(hf_model, groups, generator)
        told_by.write_projector(hf_model, processor, groups, generator)
        free = (torch.randperm((layers - 1) * width, generator=generator) + width).tolist()
        places = {group: [free.pop() for _ in range(per_group)] for group in groups}
        for number, group in enumerate(groups):
            for neuron in places[group]:
                _write_planted(hf_model, neuron, width, number, len(groups))
        decoy_places = {kind: [free.pop() for _ in range(per_kind)] for kind in decoys}
        for kind, neurons in decoy_places.items():
            for neuron in neurons:
                _write_decoy(hf_model, neuron, width, kind, len(groups), generator)
        ranking = [groups[place] for place in torch.randperm(len(groups), generator=generator).tolist()]
        _write_head(hf_model, processor, groups, ranking, suppress)
    model = VLM(hf_model, processor)
    space = model.space("language", "gate")
    return PlantedModel(
        model=model,
        questions=_questions(told_by, groups, n_questions, seed),
        truth=Selection({group: NeuronSet(space, places[group]) for group in sorted(groups)}, selector="planted"),
        decoys={kind: NeuronSet(space, neurons) for kind, neurons in decoy_places.items()},
        ranking=tuple(ranking),
        suppressed=suppress,
    )


def _questions(medium: Medium, groups: tuple[str, ...], n_questions: int, seed: int) -> QuestionSet:
    rng = np.random.default_rng(seed + 1)
    questions = []
    for number, group in enumerate(groups):
        for count in range(n_questions):
            others = rng.choice(
                [name for name in groups if name != group], min(3, len(groups) - 1), replace=False
            ).tolist()
            options = tuple(rng.permutation([group, *others]).tolist())
            questions.append(
                Question(
                    question=medium.question,
                    options=options,
                    answer=options.index(group),
                    group=group,
                    id=f"{group}-{count}",
                    image_id=f"{group}-{count}",
                    **{"image": None, medium.field: medium.make(number, rng)},
                )
            )
    return QuestionSet(questions, answer="text")


def _write_background(model: PreTrainedModel, groups: tuple[str, ...], generator: torch.Generator) -> None:
    """Embeddings of constant and noise; busy neurons that react to noise and write where nothing reads."""
    n, constant = len(groups), 2 * len(groups)
    noise = slice(constant + 1, constant + 1 + NOISE)
    junk = slice(noise.stop, noise.stop + JUNK)
    decoder = model.model.language_model

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    embedding = decoder.embed_tokens.weight
    embedding[:, constant] = 1.0
    embedding[:, noise] = 0.5 * normal(len(embedding), NOISE)
    if hasattr(model.model, "image_newline"):
        model.model.image_newline.zero_()
        model.model.image_newline[constant] = 1.0
    for layer in decoder.layers:
        layer.input_layernorm.weight.fill_(1.0)
        layer.post_attention_layernorm.weight.fill_(1.0)
        layer.mlp.gate_proj.weight[:, noise] = 0.4 * normal(layer.mlp.gate_proj.out_features, NOISE)
        layer.mlp.gate_proj.weight[:, constant] = 0.8 * normal(layer.mlp.gate_proj.out_features)
        layer.mlp.up_proj.weight[:, noise] = 0.2 * normal(layer.mlp.up_proj.out_features, NOISE)
        layer.mlp.down_proj.weight[junk] = 0.2 * normal(JUNK, layer.mlp.down_proj.in_features)
    decoder.norm.weight.fill_(1.0)
    # Queries and keys are zero: attention is uniform, and hands the mean code of all tokens so far to each token.
    attention = decoder.layers[0].self_attn
    attention.v_proj.weight[:n, :n] = torch.eye(n)
    attention.o_proj.weight[:n, :n] = 8.0 * torch.eye(n)


def _mlp(model: PreTrainedModel, neuron: int, width: int) -> tuple[Any, int]:
    return cast(Any, model).model.language_model.layers[neuron // width].mlp, neuron % width


def _write_planted(model: PreTrainedModel, neuron: int, width: int, number: int, n_groups: int) -> None:
    mlp, place = _mlp(model, neuron, width)
    constant = 2 * n_groups
    mlp.gate_proj.weight[place] = 0.0
    mlp.gate_proj.weight[place, number] = 120.0
    mlp.gate_proj.weight[place, constant] = -160.0
    mlp.up_proj.weight[place] = 0.0
    mlp.up_proj.weight[place, constant] = 1.0
    mlp.down_proj.weight[:, place] = 0.0
    mlp.down_proj.weight[n_groups + number, place] = 1.0


def _write_decoy(
    model: PreTrainedModel,
    neuron: int,
    width: int,
    kind: str,
    n_groups: int,
    generator: torch.Generator,
) -> None:
    """A gate that looks telling, on a neuron that writes where nothing reads."""
    mlp, place = _mlp(model, neuron, width)
    constant = 2 * n_groups
    noise = slice(constant + 1, constant + 1 + NOISE)
    weight = torch.zeros_like(mlp.gate_proj.weight[place])
    first = int(torch.randint(n_groups, (1,), generator=generator))
    if kind == "always":
        weight[constant] = 5.0
    elif kind == "shared":
        weight[[first, (first + 1) % n_groups]] = 120.0
        weight[constant] = -160.0
    elif kind == "graded":
        weight[:n_groups] = 3.0 * torch.rand(n_groups, generator=generator)
        weight[constant] = -0.5
        weight[noise] = 0.4 * torch.randn(NOISE, generator=generator)
    else:
        weight[first] = 4.0
        weight[noise] = 30.0 * torch.randn(NOISE, generator=generator)
        weight[constant] = -200.0
    mlp.gate_proj.weight[place] = weight


def _write_head(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    groups: tuple[str, ...],
    ranking: Sequence[str],
    suppress: bool,
) -> None:
    head = model.lm_head.weight
    head.zero_()
    for number, group in enumerate(groups):
        token = processor.tokenizer.convert_tokens_to_ids(f" {group}")
        head[token, len(groups) + number] = 1.0
        head[token, number] = -0.5 if suppress else 0.0
        head[token, 2 * len(groups)] = 0.2 * (len(groups) - ranking.index(group))
