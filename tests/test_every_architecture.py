"""Every class in transformers' image-text-to-text mapping, at full size on the meta device.

The classes are looked through in two processes of their own, which run this file: here every call of the library is
checked for shapes, which takes four times as long as the calls.
"""

import json
import logging
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

# What a configuration calls the number of layers and the widths of a tower. Those of the language model are
# `num_hidden_layers`, `intermediate_size` and `moe_intermediate_size`, those of the vision tower the same (or `depth`).
# Every class that says it otherwise is listed, with what its own modeling code computes.
LANGUAGE_LAYERS: dict[str, Callable[[Any], int]] = {
    "pp_formulanet": lambda text: text.decoder_layers,
}
LANGUAGE_WIDTHS: dict[str, Callable[[Any], set[int]]] = {
    "aria": lambda text: {text.intermediate_size, text.moe_num_shared_experts * text.intermediate_size},
    "blip-2": lambda text: {text.ffn_dim},
    "deepseek_ocr2": lambda text: {
        text.intermediate_size,
        text.moe_intermediate_size,
        text.n_shared_experts * text.moe_intermediate_size,
    },
    "evolla": lambda text: {text.intermediate_size, text.aligner_ffn_mult * text.hidden_size},  # and its adapters
    "ernie4_5_vl_moe": lambda text: {
        text.intermediate_size,
        *text.moe_intermediate_size,  # experts of text, and those of images
        text.moe_num_shared_experts * text.moe_intermediate_size[0],
    },
    "florence2": lambda text: {text.decoder_ffn_dim},
    "gemma3n": lambda text: set(text.intermediate_size),
    "inkling_mm_model": lambda text: {text.moe_intermediate_size},
    "instructblip": lambda text: {text.ffn_dim},
    "instructblipvideo": lambda text: {text.ffn_dim},
    "kosmos-2": lambda text: {text.ffn_dim},
    "kosmos-2.5": lambda text: {text.ffn_dim},
    "lfm2_vl": lambda text: {
        -(-int(2 * text.intermediate_size / 3) // text.block_multiple_of) * text.block_multiple_of
    },
    "pix2struct": lambda text: {text.d_ff},
    "pp_formulanet": lambda text: {text.decoder_ffn_dim},
    "udop": lambda text: {text.d_ff},
    "unlimited_ocr": lambda text: {
        text.intermediate_size,
        text.moe_intermediate_size,
        text.n_shared_experts * text.moe_intermediate_size,
    },
}
VISION_LAYERS: dict[str, Callable[[Any], int]] = {
    "deepseek_ocr2": lambda vision: vision.sam_config.num_hidden_layers + vision.encoder_config.num_hidden_layers,
    "florence2": lambda vision: sum(vision.depths),
    "mllama": lambda vision: vision.num_hidden_layers + vision.num_global_layers,
    "perception_lm": lambda vision: vision.model_args["depth"],
    "unlimited_ocr": lambda vision: vision.sam_config.num_hidden_layers + vision.encoder_config.num_hidden_layers,
}
_SAM: Callable[[Any], set[int]] = lambda vision: {vision.mlp_dim}  # noqa: E731
_SAM_AND_ENCODER: Callable[[Any], set[int]] = lambda vision: {  # noqa: E731
    vision.sam_config.mlp_dim,
    vision.encoder_config.intermediate_size,
}
_OUT: Callable[[Any], set[int]] = lambda vision: {vision.out_hidden_size}  # noqa: E731  (as Glm4vVisionMlp has it)
_RATIO: Callable[[Any], set[int]] = lambda vision: {int(vision.mlp_ratio * vision.hidden_size)}  # noqa: E731
VISION_WIDTHS: dict[str, Callable[[Any], set[int]]] = {
    "deepseek_ocr2": _SAM_AND_ENCODER,
    "florence2": lambda vision: {int(vision.mlp_ratio * size) for size in vision.embed_dim},
    "glm46v": _OUT,
    "glm4v": _OUT,
    "glm4v_moe": _OUT,
    "glmga": _OUT,
    "got_ocr2": _SAM,
    "janus": _RATIO,
    "nemotron_h_omni": _RATIO,
    "perception_lm": lambda vision: {4 * vision.model_args["embed_dim"]},  # timm's default
    "pix2struct": lambda vision: {vision.d_ff},
    "pp_chart2table": _SAM,
    "pp_formulanet": _SAM,
    "qwen2_vl": lambda vision: {vision.mlp_ratio * vision.embed_dim},
    "unlimited_ocr": _SAM_AND_ENCODER,
}
WITHOUT_VISION: dict[str, tuple[str | None, int, str]] = {
    # where the model sees, how many linear layers are there, and why none of them is an MLP's
    "apertus1p5": ("model.vision_tokenizer", 1, "a VQGAN of convolutions; the linear layer is its code book"),
    "chameleon": ("model.vqmodel", 0, "a VQ-VAE of convolutions"),
    "emu3": ("model.vqmodel", 28, "a VQ-VAE of convolutions; the linear layers are those of attention"),
    "evolla": (None, 0, "sees proteins"),
    "fast_vlm": ("model.vision_tower", 12, "a timm network of convolutions; the linear layers are those of attention"),
    "fuyu": ("model.vision_embed_tokens", 1, "patches go into the decoder through one linear layer"),
    "gemma3n": ("model.vision_tower", 0, "a timm network of convolutions"),
    "gemma4": (None, 0, "the default configuration has no vision tower"),
    "gemma4_unified": (None, 0, "the default configuration has no image embedder, and none has blocks"),
    "inkling_mm_model": ("model.vision_tower", 24, "patches are folded together by one normed linear layer a step"),
    "mistral4": (None, 0, "the class in the mapping is text only"),
    "udop": ("patch_embed", 0, "patches go into the text encoder through a convolution"),
}
FURTHER_TOWERS = {
    "blip-2": ["qformer"],
    "deepseek_vl_hybrid": ["high_res_vision_model"],
    "diffusion_gemma": ["encoder"],
    "dots3_note": ["audio", "audio_projector"],
    "evolla": ["protein_encoder"],
    "florence2": ["encoder"],
    "gemma3n": ["audio"],
    "granite4_vision": ["spatial_projectors", "layerwise_projectors"],
    "idefics": ["gated_cross_attn_layers"],
    "idefics2": ["connector"],
    "instructblip": ["qformer"],
    "instructblipvideo": ["qformer"],
    "muse_spark": ["audio"],
    "pi0": ["dit"],
    "qwen2_5_omni_thinker": ["audio"],
    "qwen3_omni_moe_thinker": ["audio"],
    "t5gemma2": ["encoder"],
    "udop": ["encoder"],
    "video_llava": ["video_tower"],
}
PROJECTORS = {
    "aria",
    "cosmos3_edge",
    "deepseek_vl",
    "dots3_note",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "glmga",
    "granite_docling",
    "idefics2",
    "inkling2",
    "inkling2_loop",
    "internvl",
    "kimi_k25",
    "lfm2_vl",
    "lfm3_vl",
    "lighton_ocr",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "minicpm_ocr",
    "minicpmv4_6",
    "minicpmv4_7",
    "minimax_m3_vl",
    "mistral3",
    "mistral_large4",
    "muse_spark",
    "nemotron_h_omni",
    "perception_lm",
    "qianfan_ocr",
    "qwen2_5_omni_thinker",
    "video_llama_3",
    "video_llava",
    "vipllava",
}
"""The classes in whose default configuration an MLP gives the decoder's vectors of what the towers see or hear."""
OPTIONAL_TOWERS = {"gemma4": ["audio", "vision"], "gemma4_unified": [], "nemotron_h_omni": ["audio", "audio_projector"]}
"""What towers there are more, if a configuration is given the parts that it leaves away by default."""
MEASURED = ("llava_next", "qwen2_5_vl", "instructblip", "mistral_large4", "muse_spark", "dots3_note")
"""Those whose memory is measured: the paper's, the slowest, those of most modules and of most experts."""
MEASURED_EVERYWHERE = set(MEASURED) - {"mistral_large4", "dots3_note"}  # which transformers 5.20 does not have yet
WITH_LAYERS_WITHOUT_MLP = {"nemotron_h_omni": [0, 2]}  # a linear attention, an attention


def _widths(config: Any) -> set[int]:
    """Every width that a configuration of the usual kind gives to MLPs."""
    names = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "dense_intermediate_size")
    return {value for name in names if isinstance(value := getattr(config, name, None), int)}


def _vision_config(config: Any) -> Any:
    """Where a model's configuration describes its vision tower."""
    for holder in (config, getattr(config, "vlm_config", None), getattr(config, "encoder", None)):
        if hasattr(holder, "vision_config"):
            return holder.vision_config
    return config.encoder


def _problems(name: str, model: nn.Module, towers: Mapping[str, Any]) -> list[str]:
    """Where what was found is not what the configuration states."""
    problems = []

    def expect(what: str, found: Any, stated: Any) -> None:
        if found != stated:
            problems.append(f"{what} {found}; the configuration states {stated}")

    text = getattr(model.config, "vlm_config", model.config).get_text_config(decoder=True)
    language = towers["language"]
    expect("layers", len(language), LANGUAGE_LAYERS.get(name, lambda text: text.num_hidden_layers)(text))
    stated = LANGUAGE_WIDTHS.get(name, _widths)(text)
    if name in LANGUAGE_WIDTHS:
        expect("widths", set(language.widths), stated)
    elif not set(language.widths) <= stated:  # a default configuration may have a width for layers that it has none of
        problems.append(f"widths {set(language.widths)}; the configuration states {stated}")
    bare = sorted(set(range(len(language))) - {mlp.layer for mlp in language.mlps})
    expect("layers without an MLP", bare, WITH_LAYERS_WITHOUT_MLP.get(name, []))
    usual = ["language"] if name in WITHOUT_VISION else ["language", "vision"]
    between = ["projector"] if name in PROJECTORS else []
    expect("towers", sorted(towers), sorted([*usual, *FURTHER_TOWERS.get(name, []), *between]))
    if name in WITHOUT_VISION:
        path, linears, _ = WITHOUT_VISION[name]
        if path is not None:
            there = sum(isinstance(module, nn.Linear) for module in model.get_submodule(path).modules())
            expect(f"linear layers in {path}", there, linears)
        return problems
    vision, config = towers["vision"], _vision_config(model.config)
    layers = VISION_LAYERS.get(name, lambda vision: getattr(vision, "num_hidden_layers", None) or vision.depth)
    expect("vision layers", len(vision), layers(config))
    expect("vision widths", set(vision.widths), VISION_WIDTHS.get(name, _widths)(config))
    return problems


def _look_through(names: list[str]) -> list[dict[str, Any]]:
    """Builds and searches each class; what is found, what is wrong with it, and what it costs."""
    from helpers import changes, state_of
    from vlmneurons.errors import ArchitectureError
    from vlmneurons.model.architectures.find import find_towers
    from vlmneurons.testing.architectures import mapped_model, optional_parts

    def text_of(error: Exception) -> str:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"

    results = []
    for name in names:
        result: dict[str, Any] = {"name": name, "default": True, "built": True, "reason": "", "problems": []}
        results.append(result)
        try:
            model = mapped_model(name, default=True)
        except Exception as error:
            result |= {"default": False, "reason": text_of(error)}
            try:
                model = mapped_model(name)
            except Exception as another:
                result |= {"built": False, "reason": text_of(another)}
                continue
        before, start = state_of(model), time.process_time()
        try:
            towers = find_towers(model)
        except ArchitectureError as error:
            result["problems"] = [str(error)]
            continue
        result["seconds"] = time.process_time() - start
        result["changed"] = changes(before, state_of(model))
        if name in MEASURED:
            tracemalloc.start()
            find_towers(model)
            result["mebibytes"] = tracemalloc.get_traced_memory()[1] / 2**20
            tracemalloc.stop()
        result["problems"] = _problems(name, model, towers)
        if optional_parts(name):
            more = find_towers(mapped_model(name, every_tower=True))
            result["optional"] = sorted(set(more) - set(towers))
    return results


@pytest.fixture(scope="module")
def every_class() -> dict[str, dict[str, Any]]:
    """What `_look_through` gives for every class in the mapping."""
    from vlmneurons.testing.architectures import mapped_types

    names = mapped_types()
    command = [sys.executable, __file__]
    halves = [subprocess.Popen([*command, *names[half::2]], stdout=subprocess.PIPE, text=True) for half in (0, 1)]
    outputs = [process.communicate()[0] for process in halves]
    assert [process.returncode for process in halves] == [0, 0]
    results = {result["name"]: result for output in outputs for result in json.loads(output.splitlines()[-1])}
    return {name: results[name] for name in names}


def test_sites_are_found_in_every_class_that_transformers_maps(
    every_class: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture
) -> None:
    found = [result for result in every_class.values() if result["built"] and not result["problems"]]
    default = [result for result in found if result["default"]]
    left = [result for result in every_class.values() if not result["built"]]
    with capsys.disabled():
        print(f"\nsites found in {len(found)} of {len(every_class)} classes, {len(default)} of them by default", end="")
        for result in left:
            print(f"\n  {result['name']}: cannot be built ({result['reason']})", end="")
    problems = [f"{name}: {problem}" for name, result in every_class.items() for problem in result["problems"]]
    assert not problems, "\n".join(problems)
    # What may be missing is an optional package of transformers, and nothing else.
    assert not [result for result in left if "requires the timm library" not in result["reason"]]
    assert len(default) >= 0.85 * len(every_class)
    assert len(found) + len(left) == len(every_class)


def test_a_model_that_was_looked_through_is_as_it_was_attribute_by_attribute(
    every_class: dict[str, dict[str, Any]],
) -> None:
    looked_through = {name: result["changed"] for name, result in every_class.items() if "changed" in result}
    assert len(looked_through) >= 0.85 * len(every_class)
    assert not {name: changed for name, changed in looked_through.items() if changed}


def test_every_optional_tower_is_found(every_class: dict[str, dict[str, Any]]) -> None:
    found = {name: result["optional"] for name, result in every_class.items() if "optional" in result}
    assert found == OPTIONAL_TOWERS


def test_no_class_takes_two_seconds_of_a_core_or_much_memory_to_look_through(
    every_class: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture
) -> None:
    seconds = {name: result["seconds"] for name, result in every_class.items() if "seconds" in result}
    mebibytes = {name: every_class[name]["mebibytes"] for name in MEASURED if name in every_class}
    assert set(mebibytes) >= MEASURED_EVERYWHERE
    slowest, largest = max(seconds, key=seconds.get), max(mebibytes, key=mebibytes.get)
    with capsys.disabled():
        mean = sum(seconds.values()) / len(seconds)
        most = f"{seconds[slowest]:.2f} s ({slowest}) and {mebibytes[largest]:.0f} MiB ({largest})"
        print(f"\nlooked through in {mean:.2f} s a class, at most {most}", end="")
    assert seconds[slowest] < 2
    assert mebibytes[largest] < 100


def test_no_exception_is_made_for_a_class_that_needs_none() -> None:
    from vlmneurons.testing.architectures import mapped_types

    tables = (LANGUAGE_LAYERS, LANGUAGE_WIDTHS, VISION_LAYERS, VISION_WIDTHS, FURTHER_TOWERS, WITH_LAYERS_WITHOUT_MLP)
    named = {name for table in (*tables, WITHOUT_VISION) for name in table}
    not_yet_in_5_20 = {"apertus1p5", "dots3_note"}
    assert named - not_yet_in_5_20 <= set(mapped_types())


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

    from vlmneurons.model.architectures.find import find_towers

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


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps(_look_through(sys.argv[1:])))
