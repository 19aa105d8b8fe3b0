"""Stage 1 of training: the vision tower learns to tell the items apart.

The tower is trained alone, as a classifier of items with a linear head that is thrown away, because a decoder that
starts from random features learns to ignore the picture. What the decoder later gets is a code of *what is shown*; that
a taco points to Mexico, and what Mexico's capital is, remains for the decoder to learn.
"""

import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration

from tools.demo.catalogue import ITEMS
from tools.demo.compose import Sprites, compose, normalise, restyled


def patch_features(model: LlavaNextForConditionalGeneration, pixels: Tensor) -> Tensor:
    """What the projector gets for each picture: ``[picture, patch, feature]``, without the class token."""
    hidden = model.model.vision_tower(pixel_values=pixels).last_hidden_state
    return hidden[:, 1:]


def train_vision(
    model: LlavaNextForConditionalGeneration,
    sprites: Sprites,
    *,
    seed: int,
    steps: int,
    batch: int = 96,
    rate: float = 1e-3,
    report: Callable[[str], None] = print,
) -> float:
    """Trains the vision tower in place.

    Args:
        model: its vision tower is changed, nothing else.
        sprites: the pictures; only those of the training split are used for training.
        seed: of the order of pictures and of their augmentation.
        steps: number of batches.
        batch: pictures per batch.
        rate: highest learning rate.
        report: gets a line now and then.

    Returns:
        The share of held-out pictures whose item is recognised, among all items.
    """
    torch.manual_seed(seed)
    order, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    names = [item.name for item in ITEMS]
    labels = {name: index for index, name in enumerate(names)}
    shown = sprites.of("training")
    tower = model.model.vision_tower
    head = torch.nn.Linear(tower.config.hidden_size, len(names))
    tower.train()
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / 200) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-5
        items = [order.choice(names) for _ in range(batch)]
        pictures = restyled(sprites, [order.choice(shown[name]) for name in items], noise)
        scores = head(patch_features(model, normalise(pictures)).mean(dim=1))
        target = torch.tensor([labels[name] for name in items])
        loss = F.cross_entropy(scores, target, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            accuracy = _recognised(model, head, sprites, labels)
            report(f"vision  step {step + 1:5}  loss {loss.item():.3f}  held-out pictures recognised {accuracy:.3f}")
    tower.eval().requires_grad_(False)
    return accuracy


@torch.no_grad()
def _recognised(
    model: LlavaNextForConditionalGeneration, head: torch.nn.Linear, sprites: Sprites, labels: dict[str, int]
) -> float:
    """Share of held-out pictures whose item the classifier names, two random pictures of each."""
    model.model.vision_tower.eval()
    held_out = sprites.of("held-out")
    indices = [index for rows in held_out.values() for index in rows] * 2
    target = torch.tensor([labels[name] for name, rows in held_out.items() for _ in rows] * 2)
    pictures = normalise(compose(sprites, indices, torch.Generator().manual_seed(0), strength=0.5))
    scores = torch.cat([head(patch_features(model, part).mean(dim=1)) for part in pictures.split(256)])
    model.model.vision_tower.train()
    return (scores.argmax(dim=1) == target).float().mean().item()
