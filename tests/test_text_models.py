"""Text-only language models meet the contract as those with pictures do: 25 classes, small, each of its own sizes.

All sizes of a configuration differ (hidden, intermediate, experts, shared experts, heads), so none can be mistaken.
"""

from typing import Any

import pytest
import torch
import transformers

from vlmneurons.model.architectures.find import find_towers
from vlmneurons.testing.architectures import check_architecture

_SIZES = {"vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_TEXT = {**_SIZES, "hidden_size": 32, "intermediate_size": 56, "max_position_embeddings": 64}
_SIX = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 12, "sliding_window": 8}
_MLA = {"q_lora_rank": 20, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 10}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_T5 = {"vocab_size": 99, "d_model": 32, "d_ff": 56, "d_kv": 6, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 3}
_BART = {
    **{"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 56},
    **{"decoder_ffn_dim": 72, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
}

MODELS: dict[str, tuple[dict[str, Any], dict[str, set[int]]]] = {
    "gpt2": ({"vocab_size": 99, "n_embd": 32, "n_inner": 56, "n_layer": 2, "n_head": 4}, {"language": {56}}),
    "llama": (_TEXT, {"language": {56}}),
    "qwen2": (_TEXT, {"language": {56}}),
    "qwen3": ({**_TEXT, "head_dim": 12}, {"language": {56}}),
    "mistral": (_TEXT, {"language": {56}}),
    "mixtral": ({**_TEXT, "num_local_experts": 3, "num_experts_per_tok": 2}, {"language": {56}}),
    "qwen3_moe": ({**_TEXT, **_EXPERTS, "num_experts": 3, "mlp_only_layers": [0]}, {"language": {24, 56}}),
    "qwen2_moe": (
        {**_TEXT, **_EXPERTS, "num_experts": 3, "shared_expert_intermediate_size": 40},
        {"language": {24, 40}},
    ),
    "gemma": ({**_TEXT, "head_dim": 12}, {"language": {56}}),
    "gemma2": ({**_TEXT, **_SIX}, {"language": {56}}),
    "gemma3_text": ({**_TEXT, **_SIX}, {"language": {56}}),
    "opt": (
        {**_SIZES, "hidden_size": 32, "ffn_dim": 56, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        {"language": {56}},
    ),
    "falcon": ({**_SIZES, "hidden_size": 32, "ffn_hidden_size": 56}, {"language": {56}}),
    "bloom": ({"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4}, {"language": {128}}),
    "deepseek_v3": (
        {
            **{**_TEXT, **_MLA, **_EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1},
            **{"topk_group": 1, "n_shared_experts": 2, "first_k_dense_replace": 1},
        },
        {"language": {24, 48, 56}},
    ),
    "jamba": (
        {
            **{**_TEXT, "num_hidden_layers": 4, "num_experts": 3, "num_experts_per_tok": 2, "expert_layer_period": 2},
            **{"expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
            **{"mamba_d_state": 6, "mamba_dt_rank": 5},
        },
        {"language": {56}},
    ),
    "phi3": ({**_TEXT, "pad_token_id": 0}, {"language": {56}}),
    "phi": (_TEXT, {"language": {56}}),
    "gpt_neox": ({**_TEXT, "rotary_pct": 0.25}, {"language": {56}}),
    "gptj": (
        {"vocab_size": 99, "n_embd": 32, "n_inner": 56, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
        {"language": {56}},
    ),
    "stablelm": (_TEXT, {"language": {56}}),
    "olmo2": (_TEXT, {"language": {56}}),
    "cohere": (_TEXT, {"language": {56}}),
    "gpt_oss": ({**_TEXT, **_SIX, "num_local_experts": 3, "num_experts_per_tok": 2}, {"language": {56}}),
    "granitemoe": ({**_TEXT, "num_local_experts": 3, "num_experts_per_tok": 2}, {"language": {56}}),
    "t5": (_T5, {"language": {56}, "encoder": {56}}),
    "bart": (_BART, {"language": {72}, "encoder": {56}}),
    "switch_transformers": ({**_T5, "num_experts": 3}, {"language": {56}, "encoder": {56}}),
}
LAYERS = {"t5": {"language": 3, "encoder": 2}, "bart": {"language": 3, "encoder": 2}, "jamba": {"language": 4}}
LAYERS["switch_transformers"] = LAYERS["t5"]


def test_there_are_twenty_five_classes() -> None:
    assert len(MODELS) >= 25


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_a_text_model_meets_the_contract(name: str) -> None:
    settings, widths = MODELS[name]
    config = transformers.AutoConfig.for_model(name, **settings)
    torch.manual_seed(0)
    auto = transformers.AutoModelForSeq2SeqLM if "encoder" in widths else transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    towers = find_towers(model)
    assert {tower: set(found.widths) for tower, found in towers.items()} == widths
    assert {tower: len(found) for tower, found in towers.items()} == LAYERS.get(name, {"language": 2})
    ids = {"input_ids": torch.arange(3, 16)[None]}
    report = check_architecture(
        model, inputs=ids | ({"decoder_input_ids": torch.tensor([[2, 20, 21]])} if "encoder" in widths else {})
    )
    assert all(tower.moved > 0 for tower in report.towers)
