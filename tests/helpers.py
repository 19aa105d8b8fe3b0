"""Small things that several test files need: questions, pictures, and counts by hooks of plain PyTorch."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image

import vlmneurons as vn
from vlmneurons.testing.tiny import tiny_image

PAPER_MODELS = ("llava_next_mistral", "llava_next_qwen2", "qwen2_5_vl")


def often(usual: Any, at_night: Any) -> Any:
    """How much of something a test does: a sample, or all of it in ``.ci/nightly``."""
    return at_night if os.environ.get("VLMNEURONS_NIGHTLY") else usual


def picture(seed: int = 0, height: int = 24, width: int = 32) -> Image.Image:
    """A picture of random colours."""
    return tiny_image(seed, height, width)


def some_questions(n: int = 6, *, groups: str = "AB", **how: Any) -> vn.QuestionSet:
    """Questions of different lengths with pictures of different shapes."""
    items = [
        vn.Question(
            picture(i, 24 + 8 * (i % 3), 40 - 8 * (i % 2)),
            f"What is this {'long word ' * (i % 4)}?",
            ("Tea", "Rice", "Bread", "Soup"),
            i % 4,
            groups[i % len(groups)],
            id=f"q{i}",
        )
        for i in range(n)
    ]
    return vn.QuestionSet(items, **how)


def save_questions(folder: Path, n: int, groups: str = "AB") -> None:
    """Some questions as a folder with a table and its pictures."""
    rows = []
    for number, item in enumerate(some_questions(n, groups=groups)):
        item.load_images()[0].save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "options": json.dumps(item.options)})
        rows[-1] |= {name: getattr(item, name) for name in ("question", "answer", "group", "id")}
    pd.DataFrame(rows).to_csv(folder / "questions.csv", index=False)


def language_blocks(hf: torch.nn.Module) -> Any:
    """The decoder's blocks, by their path in transformers."""
    return hf.model.language_model.layers


def vision_blocks(hf: torch.nn.Module) -> Any:
    """The vision tower's blocks, by their path in transformers."""
    return hf.model.visual.blocks if hasattr(hf.model, "visual") else hf.model.vision_tower.encoder.layers


def down_of(mlp: torch.nn.Module) -> torch.nn.Module:
    """The down projection of an MLP of the three models."""
    return mlp.down_proj if hasattr(mlp, "down_proj") else mlp.fc2


def activation_of(mlp: torch.nn.Module) -> torch.nn.Module:
    """The activation function of an MLP of the three models."""
    return mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn


@contextmanager
def removed_after(handles: list[Any]) -> Iterator[None]:
    """Within, hooks stay; then they are removed."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def plain_hooks(hf: torch.nn.Module) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Every value of every MLP, by site name, one entry a forward; hooks of PyTorch on modules named by hand."""
    values: dict[str, list[torch.Tensor]] = {}
    handles = []

    def keep(name: str, value: torch.Tensor) -> None:
        values.setdefault(name, []).append(value.detach().clone())

    for tower, blocks in (("language", language_blocks(hf)), ("vision", vision_blocks(hf))):
        for layer, block in enumerate(blocks):
            name = f"{tower}.layers.{layer}.mlp"
            activation = activation_of(block.mlp)
            handles += [
                activation.register_forward_hook(lambda _, a, out, name=name: keep(f"{name}.pre", a[0])),
                activation.register_forward_hook(lambda _, a, out, name=name: keep(f"{name}.gate", out)),
                down_of(block.mlp).register_forward_pre_hook(lambda _, a, name=name: keep(f"{name}.post", a[0])),
            ]
            if hasattr(block.mlp, "up_proj"):
                handles.append(
                    block.mlp.up_proj.register_forward_hook(lambda _, a, out, name=name: keep(f"{name}.up", out))
                )
    with removed_after(handles):
        yield values


@contextmanager
def plain_edit(hf: torch.nn.Module, at: str, edits: dict[int, Any]) -> Iterator[None]:
    """Decoder values replaced by hooks of plain PyTorch: ``edits[layer]`` maps values to new ones."""
    handles = []
    for layer, edit in edits.items():
        mlp = language_blocks(hf)[layer].mlp
        if at == "post":
            handles.append(mlp.down_proj.register_forward_pre_hook(lambda _, a, edit=edit: (edit(a[0].clone()),)))
        else:
            handles.append(mlp.act_fn.register_forward_hook(lambda _, a, out, edit=edit: edit(out.clone())))
    with removed_after(handles):
        yield


@torch.inference_mode()
def logits_of(hf: torch.nn.Module, inputs: Any) -> torch.Tensor:
    """The logits of a plain call."""
    return hf(**inputs).logits.clone()


def state_of(model: torch.nn.Module) -> dict[tuple[str, str], Any]:
    """Every attribute of every module of a model, and of its configuration, by path and name.

    Containers are taken apart; anything else in them is its type and which object it is, and numbers and texts what
    they are, so that two states are equal only if nothing was added, taken away, exchanged or changed in place.
    """

    def seen(value: Any) -> Any:
        if isinstance(value, dict):
            return type(value), [(name, seen(one)) for name, one in value.items()]
        if isinstance(value, list | tuple | set):
            return type(value), [seen(one) for one in value]
        if isinstance(value, str | int | float | bool | type(None) | torch.dtype | torch.device):
            return type(value), value
        return type(value), id(value)

    state = {
        (path, name): seen(value) for path, module in model.named_modules() for name, value in vars(module).items()
    }
    config = getattr(model, "config", None)
    return state | {("config", name): seen(value) for name, value in vars(config).items()} if config else state


def changes(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> list[str]:
    """Which attributes of a model are others than they were."""
    names = {*before, *after}
    return sorted(".".join(name) for name in names if before.get(name, names) != after.get(name, names))
