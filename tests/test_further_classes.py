"""Causal, sequence-to-sequence and speech classes besides those of the mapping, on the meta device: right, or refused.

What is right is told by the names and shapes of parameters, of which the search itself knows nothing. Each day's tests
look at every twelfth class and at a few; ``.ci/nightly`` at all of them. Classes are looked through in a process of
their own, which runs this file.
"""

import copy
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

ALL = bool(os.environ.get("VLMNEURONS_NIGHTLY"))
ALWAYS = ("gpt2", "opt", "jamba", "switch_transformers", "whisper", "blt")
DOWN = re.compile(
    r"(down_proj|dense_4h_to_h|fc_out|lin2|linear2|linear_2|wo|w2|fc2|ffn2|output_linear"
    r"|(mlp|ffn|feed_forward)\.c_proj|(?<!attention\.)output\.dense|ffn\.output|ffn_output|output_proj_mlp)$"
)
"""What the last projection of an MLP is called, in one class or another."""
NO_MLP = re.compile(
    r"attn|attention|router|adapter_layer|lconv|conv_module|altup|indexer"
    r"|message_gate|mlp\.gate\.",  # of a gate between passes (Inkling 2 Loop), and of a router (Zaya)
    re.IGNORECASE,
)
UP = re.compile(
    r"(up|gate|fc1|w1|wi|lin1|linear1|linear_1|ffn1|c_fc|dense_h_to_4h|fc_in|intermediate|input_linear|w3|v1)"
)


LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
WRITTEN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 48},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 2048}
    | {"indexer_compress_ratio": 4},
    "reformer": {"is_decoder": True},
}
"""What must be said of those whose default configuration builds no model."""


def stated(model: nn.Module) -> dict[str, int]:
    """The last projections of the MLPs in lists of blocks, and the widths of these, by the names of parameters."""
    found = {}
    names = [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        path = name.removesuffix(".weight")
        parts = path.split(".")
        last = max((place for place, part in enumerate(parts) if part.isdigit()), default=None)
        if last is None or parameter.ndim not in (2, 3) or not DOWN.search(path):
            continue
        if NO_MLP.search(".".join(parts[last:])) and "output.dense" not in path:
            continue
        block = ".".join(parts[: last + 1])
        inside = [other for other in names if other.startswith(f"{block}.") and other != name]
        if any(UP.search(other.removeprefix(block)) for other in inside):
            found[path] = parameter.shape
    return {path: shape for path, shape in found.items()}


def problems(model: nn.Module, towers: Mapping[str, Any]) -> list[str]:
    """The last projections that no tower names, or of which it has another width than any of their sides."""
    named = {f"{mlp.path}.{mlp.layout.down}": mlp.width for tower in towers.values() for mlp in tower.mlps}
    wrong = []
    for path, shape in stated(model).items():
        place = next((name for name in (path, path.rpartition(".")[0]) if name in named), None)
        if place is None:
            wrong.append(f"{path} is in no tower")
        elif named[place] not in shape[-2:]:
            wrong.append(f"{path} {tuple(shape)} is said to have {named[place]} neurons")
    return wrong


def classes() -> list[tuple[str, str]]:
    """The types of causal, sequence-to-sequence and speech models, and the class of each, in order of their names."""
    from transformers.models.auto import modeling_auto as auto

    mappings = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    )
    return sorted({(name, kind) for mapping in mappings for name, kind in mapping.items() if isinstance(kind, str)})


def look_through(names: list[str]) -> list[dict[str, Any]]:
    """What is found in each class: right, refused, wrong, or why it cannot be built."""
    import transformers

    from helpers import changes, state_of
    from vlmneurons.errors import ArchitectureError
    from vlmneurons.model.architectures.find import find_towers

    results = []
    for name in names:
        model_type, _, class_name = name.partition("/")
        result: dict[str, Any] = {"name": name, "refused": "", "unbuilt": "", "problems": []}
        results.append(result)
        try:
            config = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(WRITTEN.get(model_type, {})))
            for setting in LAYERS if model_type != "prophetnet" else ("num_encoder_layers", "num_decoder_layers"):
                if isinstance(getattr(config, setting, None), int) and not hasattr(config, "layer_types"):
                    setattr(config, setting, min(4, getattr(config, setting)))
            kind = getattr(transformers, class_name)
            if not isinstance(config, kind.config_class):  # a part's configuration inside that of the whole
                config = next((one for one in vars(config).values() if isinstance(one, kind.config_class)), config)
            with torch.device("meta"):
                model = kind(config)
        except Exception as error:
            result["unbuilt"] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
            continue
        before = state_of(model)
        try:
            result["problems"] = problems(model, find_towers(model))
        except ArchitectureError as error:
            result["refused"] = str(error).splitlines()[0]
        left = changes(before, state_of(model))
        result["problems"] += [f"looking for MLPs has changed {name}" for name in left]
    return results


def test_what_is_found_in_further_classes_is_right_or_refused(capsys: pytest.CaptureFixture) -> None:
    names = [f"{name}/{kind}" for name, kind in classes()]
    chosen = names if ALL else sorted({*names[::12], *(n for n in names if n.partition("/")[0] in ALWAYS)})
    output = subprocess.run([sys.executable, __file__, *chosen], stdout=subprocess.PIPE, text=True, check=True).stdout
    results = json.loads(output.splitlines()[-1])
    refused = [result for result in results if result["refused"]]
    unbuilt = [result for result in results if result["unbuilt"]]
    right = len(results) - len(refused) - len(unbuilt)
    with capsys.disabled():
        print(
            f"\nof {len(results)} further classes {right} found, {len(refused)} refused, {len(unbuilt)} not built",
            end="",
        )
        for result in refused + unbuilt:
            print(f"\n  {result['name']}: {result['refused'] or result['unbuilt']}", end="")
    wrong = [f"{result['name']}: {problem}" for result in results for problem in result["problems"][:3]]
    assert not wrong, "\n".join(wrong)
    assert right >= 0.7 * (len(results) - len(unbuilt))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps(look_through(sys.argv[1:])))
