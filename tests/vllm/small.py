"""Small models in folders that vLLM takes, and questions about them.

They are wider than other tests' models: vLLM's attention for CPUs knows heads of 32, 64 and 80, and no narrower ones.
And the parts of a CLIP tower are named as released checkpoints name them (``vision_tower.vision_model…``): transformers
5 saves them under names that vLLM 0.32 does not know.
"""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import vlmneurons as vn
from vlmneurons import demo, testing
from vlmneurons.testing.tiny.parts import draw_weights

NAMES = ("demo", "llava_next_mistral", "qwen2_5_vl")
WORDS = ("food", "dish", "place", "country", "city", "people", "name", "word")
VLLM = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 64,
    "block_size": 32,  # only whole blocks of a prompt are cached
    "kv_cache_memory_bytes": 256 * 2**20,
}


def save_model(name: str, folder: Path) -> Path:
    """Write one of the small models into a folder of its own."""
    out = folder / name
    if name == "demo":
        shutil.copytree(Path(demo.__file__).parent / "natural", out)
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    else:
        _wider(name).save_pretrained(out)
        testing.tiny_model(name)[1].save_pretrained(out)
    rename_tower(out)
    return out


def _wider(name: str) -> Any:
    model, _ = testing.tiny_model(name)
    config = copy.deepcopy(model.config)
    config.text_config.hidden_size, config.text_config.intermediate_size, config.text_config.head_dim = 128, 256, 32
    config.vision_config.hidden_size = 64
    if name == "qwen2_5_vl":
        config.vision_config.out_hidden_size = 128
        config.text_config.rope_parameters["mrope_section"] = [4, 6, 6]
    torch.manual_seed(0)
    made = type(model)(config).float().eval()
    made.generation_config = model.generation_config
    draw_weights(made)
    return made


def rename_tower(folder: Path) -> None:
    """Give the parts of a CLIP tower the names of released checkpoints; see docs/guides/export.md."""
    path = folder / "model.safetensors"
    tensors = {}
    for name, value in load_file(path).items():
        head, found, tail = name.partition("vision_tower.")
        old = found and not tail.startswith("vision_model.")
        tensors[f"{head}vision_tower.vision_model.{tail}" if old else name] = value.float()
    save_file(tensors, path, metadata={"format": "pt"})


def questions_for(name: str, n: int) -> vn.QuestionSet:
    """So many questions with pictures of several shapes, of three groups or, for the demo, of its own."""
    if name == "demo":
        _, questions = vn.load_demo()
        picked = torch.randperm(len(questions), generator=torch.Generator().manual_seed(0))[:n]
        return vn.QuestionSet([questions[int(place)] for place in picked], prompt=questions.prompt)
    items = [
        vn.Question(
            testing.tiny_image(k // 2, 24 + 8 * (k % 5), 24 + 8 * (k % 7)),
            " ".join(WORDS[(k + j) % 8] for j in range(4 + k % 9)) + "?",
            ("tea", "red rice", "red bread and soup", "soup"),
            k % 4,
            "ABC"[k % 3],
            id=f"q{k}",
        )
        for k in range(n)
    ]
    return vn.QuestionSet(items)


def some_masks(model: vn.VLM, groups: Any, number: int, share: float = 0.02) -> list[vn.Selection]:
    """So many random sets of neurons, dealt out to groups: lists of selections that together hold them."""
    space, generator = model.space(), torch.Generator().manual_seed(0)
    size = int(len(space) * share)
    sets = [vn.NeuronSet(space, torch.randperm(len(space), generator=generator)[:size]) for _ in range(number)]
    names = list(groups)
    return [
        vn.Selection(dict(zip(names, sets[start : start + len(names)], strict=True)), selector="random")
        for start in range(0, number - number % len(names), len(names))
    ]
