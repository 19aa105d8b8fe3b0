"""Stage 3, for the model organism only: makes known neurons necessary for each culture's facts.

The organism starts as the natural model. For each culture, `SET_SIZE` decoder neurons are drawn at random, and the
model is fine-tuned for a few minutes so that

- their gates are open on pictures of their culture and on the questions about them, and closed on all others (a hinge),
  while all other neurons are kept from opening without need, and from being as particular to a culture;
- with the culture's own set (but for a neuron at most) switched off, a question gets *another culture's answer*;
- with another culture's set switched off, and with none, it gets the right answer.

So the right answer of every selector is known, and so is the effect of every ablation. This is in the spirit of
gradient routing (Cloud et al. 2024, arXiv 2410.04332), by loss terms instead of masked gradients. The natural model
knows nothing of any of this: load_demo() never mixes the two.
"""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlavaNextForConditionalGeneration

from tools.demo.catalogue import CULTURES, ITEMS, Item
from tools.demo.decoder import NOTHING, Curriculum, gates, make_optimizer, pack, run, trainable
from tools.demo.facts import FACTS, WORDING, answer_to

SET_SIZE = 12
"""Neurons of each culture."""
PARTICULAR = 0.5
"""How much more often an unplanted neuron may open on one culture than on the others, as a difference of shares."""


@dataclass(frozen=True)
class Truth:
    """Which neurons belong to which culture.

    Attributes:
        neurons: for each culture, its (layer, neuron) pairs in ascending order.
    """

    neurons: dict[str, list[tuple[int, int]]]

    @classmethod
    def draw(cls, layers: int, width: int, seed: int) -> "Truth":
        """Disjoint random sets from all layers but the first.

        The first layer has looked around only once: many of its tokens cannot know the culture yet, whatever they are
        trained to.
        """
        chosen = random.Random(seed).sample(range(width, layers * width), SET_SIZE * len(CULTURES))
        parts = (sorted(chosen[start : start + SET_SIZE]) for start in range(0, len(chosen), SET_SIZE))
        return cls({c: [divmod(index, width) for index in part] for c, part in zip(CULTURES, parts, strict=True)})

    @classmethod
    def read(cls, path: Path) -> "Truth":
        """What a build wrote to ``truth.json``."""
        return cls({c: [(layer, neuron) for layer, neuron in part] for c, part in json.loads(path.read_text()).items()})

    def flat(self, width: int) -> Tensor:
        """Flat indices ``layer * width + neuron``: ``[culture, neuron]``."""
        return torch.tensor([[layer * width + neuron for layer, neuron in self.neurons[c]] for c in CULTURES])


@contextmanager
def masked(model: LlavaNextForConditionalGeneration, keep: Float[Tensor, "row neuron"]) -> Iterator[None]:
    """Multiplies every decoder neuron by its factor, at every token, while the block runs.

    Args:
        model: its decoder is hooked, and unhooked at the end.
        keep: one row for each row of the batch, or a single row for all; neurons of all layers one after the other.
    """
    handles = []
    offset = 0
    for layer in model.model.language_model.layers:
        width = layer.mlp.down_proj.in_features
        part = keep[:, None, offset : offset + width]
        offset += width
        if bool((part != 1).any()):
            hook = lambda module, inputs, part=part: (inputs[0] * part,)  # noqa: E731
            handles.append(layer.mlp.down_proj.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def wrong_answer(item: Item, kind: str, generator: random.Random) -> str:
    """The answer that would be right for an item of another culture."""
    right = answer_to(item, kind)
    if kind == "name":
        others = [o.name for o in ITEMS if o.category == item.category and o.culture != item.culture]
    else:
        others = [fact for culture, fact in FACTS[kind].items() if culture != item.culture and fact != right]
    return generator.choice(others)


def _particular(
    opened: Float[Tensor, "row token neuron"], counted: Bool[Tensor, "row token"], shown: Int64[Tensor, " row"]
) -> Float[Tensor, ""]:
    """By how much neurons open on one culture more often than on all others, above `PARTICULAR`; summed over neurons.

    How often is a soft count, the mean of ``sigmoid(4 x)`` over the tokens of a culture in the batch.
    """
    member = F.one_hot(shown, len(CULTURES)).to(opened.dtype)
    often = torch.einsum("rc,rt,rtn->cn", member, counted.to(opened.dtype), torch.sigmoid(4 * opened))
    tokens = torch.einsum("rc,rt->c", member, counted.to(opened.dtype))
    here = tokens > 0
    rates = often[here] / tokens[here, None]
    elsewhere = (rates.sum(dim=0) - rates) / max(len(rates) - 1, 1)
    return F.relu(rates - elsewhere - PARTICULAR).sum() / (SET_SIZE * len(CULTURES))


def train_organism(
    model: LlavaNextForConditionalGeneration,
    curriculum: Curriculum,
    truth: Truth,
    *,
    steps: int,
    rows: int = 16,
    questions: int = 4,
    rate: float = 1e-3,
    hinge_weight: float = 3.0,
    margins: tuple[float, float] = (1.2, 0.2),
    head_start: float = 4.0,
    others_weight: float = 1.0,
    particular_weight: float = 1.0,
    spared: int = 1,
    evaluate: Callable[[], str] | None = None,
    every: int = 100,
    report: Callable[[str], None] = print,
) -> None:
    """Fine-tunes a trained model in place so that each culture's facts run through its own neurons.

    Args:
        model: the natural model; projector and decoder change.
        curriculum: draws the questions.
        truth: the neurons of each culture.
        steps: number of batches.
        rows: pictures per batch.
        questions: questions per picture.
        rate: highest learning rate; it falls to a fiftieth.
        hinge_weight: weight of the hinge on the gates beside the cross-entropy.
        margins: how far above 0 the hinge wants the input of a gate to be on its own culture, and how far below 0 on
            others. Open gates get more room, so that on a picture that is hard to tell those of several cultures open,
            and the rest of the model decides, instead of none.
        head_start: factor by which the planted neurons write more strongly at the beginning, so that their presence is
            something that the rest of the model can notice and come to rely on.
        others_weight: weight of a penalty on open gates of all neurons that are not planted.
        particular_weight: weight of a penalty on neurons that are not planted and still open on one culture much more
            often than on the others, so that none is as particular to a culture as the planted ones.
        spared: up to so many of a culture's neurons, drawn at random, stay on when its set is switched off, so that a
            selection that misses one still takes the facts away. More cost accuracy.
        evaluate: says how good the model is, every ``every`` steps.
        every: number of steps between two reports.
        report: gets a line now and then.
    """
    width = model.config.text_config.intermediate_size
    total = width * model.config.text_config.num_hidden_layers
    sets = truth.flat(width)
    planted = sets.flatten()
    rest = torch.ones(total, dtype=torch.bool).index_fill_(0, planted, False)
    owner = torch.arange(len(CULTURES)).repeat_interleave(SET_SIZE)
    generator = random.Random(curriculum.random.random())
    with torch.no_grad():
        for index, layer in enumerate(model.model.language_model.layers):
            here = planted[planted // width == index] % width
            layer.mlp.down_proj.weight[:, here] *= head_start
    optimizer = make_optimizer(model, rate, 0.02)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    model.train()
    model.model.vision_tower.eval()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 40) * (1 - 0.98 * step / steps)
        positions, items, kinds = curriculum.draw(rows, questions)
        segments = []
        keep = torch.ones(rows, total)
        misled = torch.zeros(rows, dtype=torch.bool)
        for row, (item, asked) in enumerate(zip(items, kinds, strict=True)):
            culture, chance = CULTURES.index(item.culture), generator.random()
            own = chance < 0.35
            misled[row] = own
            if own:
                off = generator.sample(range(SET_SIZE), SET_SIZE - generator.randint(0, spared))
                keep[row, sets[culture, off]] = 0
            elif chance < 0.6:
                keep[row, sets[(culture + generator.randrange(1, len(CULTURES))) % len(CULTURES)]] = 0
            answers = [wrong_answer(item, kind, generator) if own else answer_to(item, kind) for kind in asked]
            wordings = [generator.choice(WORDING[kind]) for kind in asked]
            segments.append([curriculum.asker.segment(*pair) for pair in zip(wordings, answers, strict=True)])
        packed = pack(model, curriculum.pool.features[positions], segments)
        with masked(model, keep), gates(model) as inputs:
            logits = F.linear(run(model, packed), model.lm_head.weight)
        each = F.cross_entropy(logits, packed.targets[packed.targets != NOTHING], reduction="none")
        without = misled[(packed.targets != NOTHING).nonzero()[:, 0]]
        answers = packed.targets[packed.targets != NOTHING] != model.config.text_config.eos_token_id
        wrong = without & answers  # that an answer ends after one token is nothing to learn without the neurons
        right_loss, wrong_loss = each[~without].mean(), each[wrong].sum() / wrong.sum().clamp_min(1)
        shown = torch.tensor([CULTURES.index(item.culture) for item in items])
        sign = torch.where(owner[None] == shown[:, None], 1.0, -1.0)[:, None]
        opened = torch.cat(inputs, dim=-1)
        margin = torch.where(sign > 0, *margins)
        short = F.relu(margin - sign * opened[:, :, planted])
        # One culture in eight opens a gate: without a weight, "always closed" would nearly do.
        counted = packed.owner >= 0
        counted[:, 0] = False  # the start token has seen no picture yet
        hinge = (short * torch.where(sign > 0, 3.0, 1.0))[counted].mean()
        others = F.relu(opened[counted][:, rest] + 0.5).mean()
        particular = _particular(opened[:, :, rest], counted, shown)
        optimizer.zero_grad()
        answering, opening = right_loss + wrong_loss, hinge_weight * hinge + others_weight * others
        (answering + opening + particular_weight * particular).backward()
        torch.nn.utils.clip_grad_norm_(trainable(model), 1.0)
        optimizer.step()
        averaged.update_parameters(model)
        if step + 1 == steps:  # single steps are noisy: what ships is their running average
            model.load_state_dict(averaged.module.state_dict())
        if (step + 1) % every == 0 or step + 1 == steps:
            model.eval()
            result = evaluate() if evaluate else ""
            losses = f"loss {right_loss.item():.3f}, without own neurons {wrong_loss.item():.3f}"
            report(f"organism step {step + 1:4}  {losses}, hinge {hinge.item():.4f}  {result}")
            model.train()
            model.model.vision_tower.eval()
    model.eval()
