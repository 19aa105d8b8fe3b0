"""Stage 2 of training: projector and decoder learn to answer open questions about pictures.

The vision tower is frozen, so its features are computed once for a pool of pictures. One picture is asked several
questions in one forward pass: the sequence is ``<s> picture | question answer | question answer | ...``, and a mask
lets every question see the picture and itself, with the positions that it would have alone. As attention is causal, the
picture's states do not depend on the question, so this computes exactly what
`transformers.LlavaNextForConditionalGeneration.forward` computes for each question on its own, at a third of the cost
(`check_packing` compares the two).

The loss is the cross-entropy of the answer and of the end token after it. No term names a neuron or a culture.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration, PreTrainedTokenizerFast

from tools.demo.catalogue import CULTURES, ITEMS, Item
from tools.demo.compose import Sprites, compose, normalise
from tools.demo.facts import KINDS, WORDING, answer_to
from tools.demo.vision import patch_features

NOTHING = -100
"""Target of a position whose prediction does not count (the `ignore_index` of PyTorch)."""


@dataclass(frozen=True)
class Pool:
    """Vision features of pictures that training draws from.

    Attributes:
        features: what the projector gets.
        of_item: for every item name, the pictures that show it.
    """

    features: Float[Tensor, "picture patch feature"]
    of_item: dict[str, list[int]]

    @classmethod
    @torch.no_grad()
    def make(
        cls,
        model: LlavaNextForConditionalGeneration,
        sprites: Sprites,
        *,
        variants: int,
        generator: torch.Generator,
        paint: Callable[[Sprites, Sequence[int], torch.Generator], Tensor] = compose,
    ) -> "Pool":
        """Paints every training sprite several times and runs the vision tower on the results."""
        shown = sprites.of("training")
        indices = [index for rows in shown.values() for index in rows for _ in range(variants)]
        names = [name for name, rows in shown.items() for _ in rows for _ in range(variants)]
        features = [
            patch_features(model, normalise(paint(sprites, indices[start : start + 256], generator)))
            for start in range(0, len(indices), 256)
        ]
        of_item: dict[str, list[int]] = {}
        for position, name in enumerate(names):
            of_item.setdefault(name, []).append(position)
        return cls(torch.cat(features), of_item)


@dataclass(frozen=True)
class Packed:
    """A batch of pictures, each with several questions in one sequence.

    Attributes:
        embeddings: input of the decoder.
        mask: added to the attention scores: 0 where a token may look, a very low number elsewhere.
        positions: position of each token, counted anew from the picture's end for every question.
        targets: the token to predict after each token, `NOTHING` where none counts.
        owner: which question a token belongs to: 0 is the picture, 1 the first question, -1 padding.
    """

    embeddings: Float[Tensor, "row token hidden"]
    mask: Float[Tensor, "row 1 token token"]
    positions: Tensor
    targets: Tensor
    owner: Tensor


def picture_embeddings(
    model: LlavaNextForConditionalGeneration, features: Float[Tensor, "row patch feature"]
) -> Float[Tensor, "row token hidden"]:
    """The decoder's input before the question: the start token, the picture, and the picture again as a tile.

    LLaVA-NeXT puts a learned "new line" after every row of patches of a tile.
    """
    inner = model.model
    projected = inner.multi_modal_projector(features)
    rows, patches, hidden = projected.shape
    side = math.isqrt(patches)
    newline = inner.image_newline.expand(rows, side, 1, hidden)
    grid = rearrange(projected, "row (y x) hidden -> row y x hidden", y=side)
    tile = rearrange(torch.cat([grid, newline], dim=2), "row y x hidden -> row (y x) hidden")
    start = torch.full((rows, 1), model.config.text_config.bos_token_id)
    return torch.cat([inner.language_model.embed_tokens(start), projected, tile], dim=1)


def pack(
    model: LlavaNextForConditionalGeneration,
    features: Float[Tensor, "row patch feature"],
    segments: Sequence[Sequence[tuple[list[int], list[int]]]],
) -> Packed:
    """Puts several questions after each picture.

    Args:
        model: gives the embeddings.
        features: vision features, one picture per row.
        segments: for each row, its questions: the tokens of one and the target after each of them.
    """
    picture = picture_embeddings(model, features)
    rows, prefix, _ = picture.shape
    length = prefix + max(sum(len(tokens) for tokens, _ in row) for row in segments)
    tokens = torch.zeros(rows, length - prefix, dtype=torch.long)
    targets = torch.full((rows, length), NOTHING)
    positions = torch.zeros(rows, length, dtype=torch.long)
    positions[:, :prefix] = torch.arange(prefix)
    owner = torch.full((rows, length), -1)  # which question a token belongs to; -1 is padding
    owner[:, :prefix] = 0
    for row, questions in enumerate(segments):
        start = prefix
        for number, (question, wanted) in enumerate(questions, 1):
            end = start + len(question)
            tokens[row, start - prefix : end - prefix] = torch.tensor(question)
            targets[row, start:end] = torch.tensor(wanted)
            positions[row, start:end] = torch.arange(prefix, prefix + len(question))
            owner[row, start:end] = number
            start = end
    same = owner[:, :, None] == owner[:, None, :]
    to_picture = torch.arange(length)[None, None, :] < prefix
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    allowed = (same | to_picture) & causal
    mask = torch.zeros(rows, 1, length, length).masked_fill_(~allowed[:, None], torch.finfo(torch.float32).min)
    embeddings = torch.cat([picture, model.model.language_model.embed_tokens(tokens)], dim=1)
    return Packed(embeddings, mask, positions, targets, owner)


@contextmanager
def gates(model: LlavaNextForConditionalGeneration) -> Iterator[list[Tensor]]:
    """Collects what goes into the activation function of each decoder layer: it is > 0 where the gate is."""
    found: list[Tensor] = []
    hook = lambda module, inputs, output: found.append(output)  # noqa: E731
    handles = [layer.mlp.gate_proj.register_forward_hook(hook) for layer in model.model.language_model.layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def run(model: LlavaNextForConditionalGeneration, packed: Packed) -> Float[Tensor, "token hidden"]:
    """The decoder's last states at the positions that have a target, row by row."""
    output = model.model.language_model(
        inputs_embeds=packed.embeddings,
        attention_mask=packed.mask,
        position_ids=packed.positions,
        use_cache=False,
    )
    return output.last_hidden_state[packed.targets != NOTHING]


class Asker:
    """Turns questions into token ids, each text once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        if text not in self._known:
            self._known[text] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]

    def segment(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """The tokens of a question with its answer, and the targets: the answer, then the end token."""
        prompt, reply = self.ids(question + " Answer:"), self.ids(" " + answer)
        tokens = prompt + reply
        targets = [NOTHING] * (len(prompt) - 1) + reply + [self._tokenizer.eos_token_id]
        return tokens, targets


@torch.no_grad()
def check_packing(model: LlavaNextForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> float:
    """Largest difference between logits of packed training and of the ordinary forward pass, on random pictures.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    from PIL import Image  # only for this check

    from tools.demo.build import make_processor

    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
    asker = Asker(tokenizer)
    texts = ["What is this?", "Which lake is in the country of this picture?"]
    segments = [[asker.segment(text, "Tokyo") for text in texts] for _ in pictures]
    packed = pack(model, patch_features(model, normalise(pictures)), segments)
    trained = F.linear(run(model, packed), model.lm_head.weight).view(len(pictures), len(texts), 2, -1)
    processor = make_processor(tokenizer)
    worst = 0.0
    for row, picture in enumerate(pictures):
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        for column, text in enumerate(texts):
            inputs = processor(images=image, text=f"<s><image>{text} Answer: Tokyo", return_tensors="pt")
            plain = model(**inputs).logits[0, -2:]
            worst = max(worst, (plain - trained[row, column]).abs().max().item())
    if worst > 1e-3:
        raise AssertionError(f"training does not compute what forward() computes: logits differ by {worst}")
    return worst


@dataclass(frozen=True)
class Recipe:
    """How the decoder is trained.

    Attributes:
        steps: number of batches.
        rows: pictures per batch.
        questions: questions per picture.
        rate: highest learning rate.
        decay: weight decay of the matrices.
        smoothing: label smoothing of the cross-entropy.
        variants: compositions of each training sprite in the pool.
        sparsity: weight of a penalty on open gates, of all neurons and all tokens alike.
        transport_decay: weight decay of projector and attention, if not ``decay``.
    """

    steps: int
    rows: int = 12
    questions: int = 8
    rate: float = 1.5e-3
    decay: float = 0.1
    smoothing: float = 0.0
    variants: int = 24
    sparsity: float = 0.0
    transport_decay: float | None = None


class Curriculum:
    """Draws training questions: cultures and items evenly, kinds evenly, never a held-out pair."""

    def __init__(self, pool: Pool, held_out: frozenset[tuple[str, str]], asker: Asker, seed: int) -> None:
        self.pool, self.asker, self.random = pool, asker, random.Random(seed)
        self._items = {culture: [item for item in ITEMS if item.culture == culture] for culture in CULTURES}
        self._kinds = {item.name: [kind for kind in KINDS if (item.name, kind) not in held_out] for item in ITEMS}

    def draw(self, rows: int, questions: int) -> tuple[Tensor, list[Item], list[list[str]]]:
        """Pictures, what they show, and the kinds of questions to ask about each.

        Returns:
            positions in the pool, the items, and for each row different kinds of question.
        """
        items = [self.random.choice(self._items[self.random.choice(CULTURES)]) for _ in range(rows)]
        positions = torch.tensor([self.random.choice(self.pool.of_item[item.name]) for item in items])
        return positions, items, [self.random.sample(self._kinds[item.name], questions) for item in items]

    def segments(self, items: list[Item], kinds: list[list[str]]) -> list[list[tuple[list[int], list[int]]]]:
        """The questions in random wording, with their right answers."""
        return [
            [self.asker.segment(self.random.choice(WORDING[kind]), answer_to(item, kind)) for kind in row]
            for item, row in zip(items, kinds, strict=True)
        ]


def trainable(model: LlavaNextForConditionalGeneration) -> list[torch.nn.Parameter]:
    """The parameters of projector, "new line" and decoder."""
    inner = model.model
    return [*inner.multi_modal_projector.parameters(), inner.image_newline, *inner.language_model.parameters()]


def make_optimizer(
    model: LlavaNextForConditionalGeneration, rate: float, decay: float, transport_decay: float | None = None
) -> torch.optim.AdamW:
    """AdamW; vectors (norms, biases, the "new line") do not decay.

    Args:
        model: its `trainable` parameters are optimised.
        rate: learning rate.
        decay: weight decay of the matrices.
        transport_decay: weight decay of the projector's and the attention's matrices, if another.
    """
    parameters = trainable(model)
    inner = model.model
    transport = {id(p) for p in inner.multi_modal_projector.parameters()}
    transport |= {id(p) for layer in inner.language_model.layers for p in layer.self_attn.parameters()}
    matrices = [p for p in parameters if p.ndim > 1]
    return torch.optim.AdamW(
        [
            {"params": [p for p in matrices if id(p) not in transport], "weight_decay": decay},
            {
                "params": [p for p in matrices if id(p) in transport],
                "weight_decay": decay if transport_decay is None else transport_decay,
            },
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=rate,
        betas=(0.9, 0.98),
    )


def train_decoder(
    model: LlavaNextForConditionalGeneration,
    curriculum: Curriculum,
    recipe: Recipe,
    *,
    evaluate: Callable[[], str] | None = None,
    every: int = 400,
    report: Callable[[str], None] = print,
) -> None:
    """Trains projector and decoder in place.

    Args:
        model: its vision tower stays as it is.
        curriculum: draws the questions.
        recipe: how long and how fast.
        evaluate: says how good the model is, every ``every`` steps.
        every: number of steps between two reports.
        report: gets a line now and then.
    """
    optimizer = make_optimizer(model, recipe.rate, recipe.decay, recipe.transport_decay)
    parameters = trainable(model)
    model.train()
    model.model.vision_tower.eval()
    average = 0.0
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)
            group["lr"] = recipe.rate * min(1.0, step / 150) * cosine + 1e-5
        positions, items, kinds = curriculum.draw(recipe.rows, recipe.questions)
        packed = pack(model, curriculum.pool.features[positions], curriculum.segments(items, kinds))
        with gates(model) as inputs:
            logits = F.linear(run(model, packed), model.lm_head.weight)
        wanted = packed.targets[packed.targets != NOTHING]
        loss = F.cross_entropy(logits, wanted, label_smoothing=recipe.smoothing)
        # A gate that nothing needs should be closed for certain, not hover around 0.
        real = packed.owner >= 0
        openness = torch.stack([F.relu(layer[real] + 0.5).mean() for layer in inputs]).mean()
        optimizer.zero_grad()
        (loss + recipe.sparsity * min(1.0, step / 500) * openness).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average += (loss.item() - average) * max(0.02, 1 / (step + 1))
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            model.eval()
            opened = torch.stack([(layer[real] > 0).float().mean() for layer in inputs]).mean().item()
            result = evaluate() if evaluate else ""
            report(f"decoder step {step + 1:5}  loss {average:.3f}  gates open {opened:.3f}  {result}")
            model.train()
            model.model.vision_tower.eval()
    model.eval()
