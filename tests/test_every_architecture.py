"""Every class in transformers' image-text-to-text mapping, at full size on the meta device."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from vlmneurons.architectures import find_towers
from vlmneurons.errors import ArchitectureError
from vlmneurons.testing._architectures import mapped_model, mapped_types

# Towers of which a class has none, with the reason.
WITHOUT_VISION = {
    "chameleon": "images are tokens of a VQ-VAE, made of convolutions",
    "cosmos3_omni": None,
    "emu3": "images are tokens of a VQ-VAE, made of convolutions",
    "evolla": "sees proteins",
    "fast_vlm": "a timm network of convolutions",
    "fuyu": "patches go into the decoder through one linear layer",
    "gemma3n": "a timm network of convolutions",
    "gemma4": "the default configuration has no vision tower",
    "gemma4_unified": "patches go into the decoder without a tower",
    "inkling_mm_model": "patches go through linear layers without blocks",
    "mistral4": "the class in the mapping is text only",
    "udop": "patches go into the text encoder",
}
LAYERS = (
    "num_hidden_layers",
    "layers",
    "decoder_layers",
    "num_layers",
    "n_layer",
    "depth",
    "encoder_layers",
    "num_decoder_layers",
)


def _numbers(config: Any) -> Iterator[int]:
    """Every whole number in a configuration, in lists and dictionaries too."""
    if isinstance(config, bool):
        return
    if isinstance(config, int):
        yield config
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _numbers(value)
    elif isinstance(config, dict):
        for value in config.values():
            yield from _numbers(value)


def _stated(config: Any) -> set[int]:
    """The widths that a configuration states, outright or as a multiple of another number."""
    plain = config.to_dict()
    numbers = set(_numbers(plain))
    base = [plain.get(key) for key in ("hidden_size", "embed_dim", "moe_intermediate_size", "intermediate_size")]
    base += list(_numbers(plain.get("embed_dim"))) + list(_numbers(plain.get("moe_intermediate_size")))
    ratios = [
        plain.get(key) for key in ("mlp_ratio", "n_shared_experts", "moe_num_shared_experts", "num_shared_experts")
    ]
    products = {
        int(number * ratio)
        for number in base
        if isinstance(number, int)
        for ratio in [*ratios, 4, 2]
        if isinstance(ratio, int | float)
    }
    if plain.get("block_auto_adjust_ff_dim"):  # LFM2's own rule: two thirds, rounded up
        multiple = plain["block_multiple_of"]
        products.add(
            -(-int(plain["block_ffn_dim_multiplier"] * int(2 * plain["intermediate_size"] / 3)) // multiple) * multiple
        )
    if isinstance(plain.get("model_args"), dict) and "embed_dim" in plain["model_args"]:
        products.add(4 * plain["model_args"]["embed_dim"])  # timm's default
    return numbers | products


def _layer_counts(config: Any) -> set[int]:
    plain = config.to_dict()
    counts = {plain[key] for key in LAYERS if isinstance(plain.get(key), int)}
    for key in ("depths", "layer_types", "layers_block_type"):
        if isinstance(plain.get(key), list):
            counts |= {len(plain[key]), *([sum(plain[key])] if key == "depths" else [])}
    return counts


def _built() -> Iterator[tuple[str, nn.Module | None, str, bool]]:
    for name in mapped_types():
        try:
            yield name, mapped_model(name, default=True), "", True
            continue
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"
        try:
            yield name, mapped_model(name), reason, False
        except Exception as error:
            yield name, None, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90]}", False


@pytest.mark.filterwarnings("ignore")
def test_sites_are_found_in_every_class_that_transformers_maps(capsys: pytest.CaptureFixture) -> None:
    found, default, failures, left = [], [], [], []
    for name, model, reason, by_default in _built():
        if model is None:
            left.append(f"{name}: cannot be built ({reason})")
            continue
        default += [name] * by_default
        try:
            towers = find_towers(model)
        except ArchitectureError as error:
            failures.append(f"{name}: {error}")
            continue
        text = getattr(model.config, "vlm_config", model.config).get_text_config(decoder=True)
        language = towers["language"]
        problems = []
        if len(language) not in _layer_counts(text):
            problems.append(f"{len(language)} layers; the configuration states {sorted(_layer_counts(text))}")
        unstated = set(language.widths) - _stated(text)
        if unstated:
            problems.append(f"widths {sorted(unstated)} are not in the configuration")
        if "vision" not in towers and name not in WITHOUT_VISION:
            problems.append(f"no vision tower among {sorted(towers)}")
        vision = getattr(model.config, "vision_config", None)
        if "vision" in towers and vision is not None and hasattr(vision, "to_dict"):
            unstated = set(towers["vision"].widths) - set(_numbers_of_nested(vision))
            if unstated:
                problems.append(f"vision widths {sorted(unstated)} are not in the configuration")
        if {mlp.layer for mlp in language.mlps} != set(range(len(language))) and name != "nemotron_h_omni":
            problems.append("layers without an MLP")
        failures += [f"{name}: {problem}" for problem in problems]
        found.append(name)
    with capsys.disabled():
        print(
            f"\nsites found in {len(found)} of {len(mapped_types())} classes, {len(default)} of them by default", end=""
        )
        for line in left:
            print(f"\n  {line}", end="")
    assert not failures, "\n".join(failures)
    assert len(default) >= 85
    assert len(found) == len(mapped_types()) - len(left)
    assert len(left) <= 1


def _numbers_of_nested(config: Any) -> set[int]:
    stated = _stated(config)
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            stated |= _numbers_of_nested(value)
    return stated


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_type", "text", "layers", "width", "total"),
    [
        ("llava_next", "mistral", 32, 14336, 458752),
        ("llava_next", "qwen2", 28, 18944, 530432),
        ("qwen2_5_vl", None, 28, 18944, 530432),
    ],
)
def test_the_three_models_of_the_paper_have_the_published_numbers_of_neurons(
    model_type: str, text: str | None, layers: int, width: int, total: int
) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    sizes = {
        "num_hidden_layers": layers,
        "intermediate_size": width,
        "hidden_size": 4096 if text == "mistral" else 3584,
    }
    sizes |= {
        "num_attention_heads": 32 if text == "mistral" else 28,
        "num_key_value_heads": 8 if text == "mistral" else 4,
    }
    if text is not None:
        sizes["model_type"] = text
    config = AutoConfig.for_model(model_type, text_config=sizes)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    language = find_towers(model)["language"]
    assert len(language) == len(language.mlps) == layers
    assert set(language.widths) == {width}
    assert sum(language.widths) == total


def test_looking_through_a_model_of_full_size_takes_less_than_two_seconds_and_little_memory() -> None:
    # In a process of its own: here every call is checked for shapes, which takes longer than the calls.
    code = """
import logging, time, tracemalloc, warnings
logging.disable(logging.WARNING); warnings.simplefilter("ignore")
from vlmneurons.architectures import find_towers
from vlmneurons.testing._architectures import mapped_model
for name in ("llava_next", "qwen2_5_vl", "gemma3n", "instructblip", "muse_spark", "dots3_note"):
    model = mapped_model(name)
    start = time.process_time(); find_towers(model); took = time.process_time() - start
    tracemalloc.start(); find_towers(model); peak = tracemalloc.get_traced_memory()[1] / 2**20; tracemalloc.stop()
    print(name, took, peak)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    measured = [line.split() for line in result.stdout.splitlines()]
    assert len(measured) == 6
    assert all(float(took) < 2 and float(peak) < 100 for _, took, peak in measured), result.stdout
