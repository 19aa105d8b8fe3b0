"""Small models of the classes of transformers' image-text-to-text mapping that the library's own small models lack.

Their default configurations are made small by rule: what a setting is called says how large it becomes, and the sizes
of a tower all differ (hidden, intermediate, expert, shared expert, heads), so that none can be mistaken for another.
`SETTINGS` holds what a class needs besides. Pictures are given as processors give them: of the forms that there are,
the first one that the model takes, with as many placeholders as it makes vectors of them.
"""

import copy
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

from vlmneurons.testing import architectures
from vlmneurons.testing.tiny.parts import draw_weights

IMAGE = 10
"""The placeholder of a picture; other special tokens follow."""

TEXT = {
    "hidden_size": 48, "d_model": 48, "n_embd": 48, "intermediate_size": 88, "ffn_dim": 88, "d_ff": 88,
    "decoder_ffn_dim": 88, "encoder_ffn_dim": 72, "intermediate_size_mlp": 104, "num_attention_heads": 4,
    "num_heads": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4, "attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "d_kv": 12, "global_head_dim": 12, "qk_head_dim": 12,
    "vocab_size": 640, "max_position_embeddings": 512, "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 36, "shared_experts_intermediate_size": 36, "share_expert_dim": 36,
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "top_k_experts": 2, "moe_topk": 2, "moe_k": 2, "n_shared_experts": 2,
    "moe_num_shared_experts": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 20, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 10,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "word_embed_proj_dim": 48, "index_topk": 8, "index_head_dim": 8,
    "index_n_heads": 24, "indexer_head_dim": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1,
    "indexer_budget": 8, "sliding_window": 16, "seq_length": 512, "vocab_size_per_layer_input": 640,
    "hidden_size_per_layer_input": 8, "hc_lowrank": 6, "ple_embed_dim": 16, "ngram_vocab_size_base": 64,
    "max_2d_position_embeddings": 64, "layers": 2, "embed_dim": 48, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2, "swa_head_dim": 12, "d_rel": 8, "rel_extent": 16,
    "sliding_window_size": 16, "loop_layer_index_start": 1, "loop_layer_index_end": 2, "loop_num_passes": 2,
    "loop_gate_rank": 6, "unpadded_vocab_size": 640, "n_layers_per_attn_res_block": 2, "linear_head_dim": 16,
    "linear_num_heads": 4, "dense_intermediate_size": 88, "shared_intermediate_size": 36, "rotary_dim": 8,
    "moe_hidden_size": 24, "num_sliding_attention_heads": 4, "index_kpool": 2, "index_block_size": 4,
    "index_topk_blocks": 2, "laurel_rank": 6, "conv_dim": 48, "resampler_dim_head": 8, "resampler_heads": 4,
    "resampler_num_latents": 4, "resampler_depth": 2, "aligner_num_add_layers": 1,
    "projector_hidden_size": 72, "merged_hidden_size": 64, "out_hidden_size": 48, "spatial_hidden": 8,
    "moe_shared_expert_intermediate_size": 36, "ssm_state_size": 8, "mamba_num_heads": 4,
    "mamba_head_dim": 12, "n_groups": 2, "chunk_size": 8, "block_multiple_of": 8, "canvas_length": 8,
    "mlp_dim": 64, "projection_dim": 48, "vision_hidden_size": 32,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "embed_dim": 32, "d_model": 32, "intermediate_size": 56, "mlp_dim": 56, "d_ff": 56,
    "encoder_ffn_dim": 56, "num_attention_heads": 4, "num_heads": 4, "attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "d_kv": 8, "depth": 2,
    "encoder_layers": 2, "patch_size": 4, "image_size": 16, "num_position_embeddings": 16,
    "out_hidden_size": 48, "output_dim": 48, "projection_dim": 48, "vocab_size": 640,
    "max_position_embeddings": 64, "position_embedding_size": 64, "n_window": 8, "max_source_positions": 100,
    "num_mel_bins": 16, "output_channels": 16, "window_size": 16, "num_pos_feats": 8, "llm_hidden_size": 48,
    "decoder_hidden_size": 48, "num_patches": 16, "pooling_kernel_size": 2, "text_hidden_size": 48,
    "n_layers": 2, "projection_hidden_dim": 72, "projection_intermediate_size": 72,
    "moe_intermediate_size": 28, "num_local_experts": 4, "num_experts_per_tok": 2, "adapter_in_dim": 32,
    "adapter_out_dim": 48, "adapter_input_size": 32, "downsample_hidden_size": 8, "base_channels": 32,
    "posemb_grid_size": 8, "pos_emb_height": 8, "pos_emb_width": 8, "max_img_size": 32, "max_image_size": 32,
    "post_conv_in_channels": 16, "post_conv_mid_channels": 24, "post_conv_out_channels": 48,
    "resampler_depth": 2, "codebook_size": 64, "num_embeddings": 64, "n_mel_bins": 16, "mel_vocab_size": 32,
    "conv_output_size": 16, "conf_num_hidden_layers": 2, "conf_num_attention_heads": 4, "conf_attention_chunk_size": 4,
    "conf_attention_context_left": 5, "input_feat_size": 16, "seq_len": 64, "num_registers": 1,
    "num_cls_tokens": 1,
}  # fmt: skip
HEARS = {
    **TOWER, "hidden_size": 44, "d_model": 44, "head_dim": 11, "intermediate_size": 68, "encoder_ffn_dim": 68,
    "adapter_input_size": 44, "adapter_in_dim": 44,
}  # fmt: skip
QUERIES = {
    "hidden_size": 40, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
    "encoder_hidden_size": 32, "vocab_size": 640, "max_position_embeddings": 512,
}  # fmt: skip
LISTS = ("layer_types", "mlp_layer_types", "decoder_layer_types", "ffn_layer_types")
"""What kind each layer is of: every kind is kept once, and there are at least two layers."""
COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "decoder_layers", "n_layer")
SPECIAL = {"pad": 0, "bos": 1, "eos": 2, "sep": 2, "decoder_start": 1, "forced_eos": 2}

SETTINGS: dict[str, dict[str, Any]] = {
    "minicpm_ocr": {"image_token_id": IMAGE},
    "minicpmv4_7": {"image_token_id": IMAGE},
    "minicpmv4_6": {"image_token_id": IMAGE},
    "pi0": {"vlm_config": {"image_token_index": IMAGE}, "dit_config": {"hidden_size": 40, "intermediate_size": 72}},
    "nemotron_h_omni": {"image_token_id": IMAGE, "audio_token_id": 11},
    "qwen3_omni_moe_thinker": {
        "vision_start_token_id": 18,
        "vision_end_token_id": 19,
        "audio_config": {"n_window": 50},
    },
    "qwen2_5_omni_thinker": {
        "vision_start_token_id": 18,
        "vision_end_token_id": 19,
        "text_config": {"rope_parameters": {"mrope_section": [2, 2, 2]}},
    },
    "step3p7": {"text_config": {"sliding_window": 16}},
    "hunyuan_vl": {"text_config": {"rope_parameters": {"mrope_section": [2, 2, 2]}}},
    "paddleocr_vl": {"text_config": {"rope_parameters": {"mrope_section": [2, 2, 2]}}},
    "glmga": {"text_config": {"rope_parameters": {"mrope_section": [2, 2, 2]}}},
    "glm_ocr": {"text_config": {"rope_parameters": {"mrope_section": [2, 2, 2]}}},
    "glm46v": {"text_config": {"rope_parameters": {"mrope_section": [2, 2, 2]}}},
    "apertus1p5": {
        "image_token_offset": 300,
        "audio_token_offset": 364,
        "audio_config": {"codebook_dim": 44, "decoder_attention_num_groups": 4},
        "vision_config": {"embed_dim": 32, "latent_channels": 32},
    },
    "aria": {  # its image processor makes pictures of 490 or 980 pixels a side, and no smaller ones
        "vision_config": {"patch_size": 70, "image_size": 490},
        "projector_patch_to_query_dict": {"49": 4},
        "max_value_projector_patch_to_query_dict": 4,
    },
    "blip-2": {"num_query_tokens": 4, "image_token_index": IMAGE},
    "deepseek_ocr2": {
        "vision_config": {"sam_config": {"downsample_channels": [24, 32]}},
        "text_config": {"num_experts_per_tok": 2},
    },
    "deepseek_vl_hybrid": {
        "high_res_vision_config": {"hidden_size": 40, "mlp_dim": 64, "image_size": 64, "global_attn_indexes": [1]}
    },
    "emu3": {"vq_config": {"hidden_size": 128}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"mrope_section": [2, 2, 2]}}},
    "fast_vlm": {"vision_config": {"architecture": "fastvit_t8", "hidden_size": 768}},
    "gemma3n": {
        "text_config": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.95, 0.0]},
        "vision_config": {"architecture": "test_efficientnet", "hidden_size": 256, "vocab_offset": 384},
        "audio_config": {"vocab_offset": 512, "vocab_size": 128},
        "vision_soft_tokens_per_image": 1,
        "audio_soft_tokens_per_image": 4,
    },
    "granite4_vision": {
        "vision_config": {"hidden_size": 128},
        "qformer_config": {"hidden_size": 128, "encoder_hidden_size": 128},
        "spatial_target_layers": [0, 1, 0, 1],
        "image_grid_pinpoints": [[16, 32], [32, 16]],
    },
    "hy_v4_vl": {"text_config": {"qk_rope_head_dim": 8, "rope_parameters": {"mrope_section": [2, 1, 1]}}},
    "inkling2_loop": {
        "text_config": {
            "num_hidden_layers": 4,
            "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
            "loop_layer_index_start": 2,
            "loop_layer_index_end": 4,
        }
    },
    "instructblip": {"num_query_tokens": 4, "image_token_index": IMAGE},
    "instructblipvideo": {"num_query_tokens": 4, "video_token_index": 11},
    "kimi_k25": {"projection_hidden_size": 32, "text_config": {"head_dim": 4}},
    "kosmos-2": {"latent_query_num": 4, "text_config": {"pad_token_id": 0, "bos_token_id": 1}},
    "kosmos-2.5": {"latent_query_num": 4, "text_config": {"pad_token_id": 0, "bos_token_id": 1}},
    "llava_next_video": {"image_grid_pinpoints": [[16, 32], [32, 16]]},
    "mistral4": {"qk_rope_head_dim": 6, "qk_nope_head_dim": 6},
    "muse_glimmer": {"out_hidden_size": 128},
    "muse_spark": {
        "out_hidden_size": 128,
        "audio_config": {"num_hidden_layers": 2, "patch_sizes": [4, 2], "hidden_sizes": [28, 40], "depths": [1, 1]},
    },
    "perception_lm": {
        "vision_config": {"model_args": {"embed_dim": 64, "depth": 2, "num_heads": 4, "img_size": [56, 56]}}
    },
    "pix2struct": {"vision_config": {"hidden_size": 48}},  # its decoder looks at it unprojected
    "qwen4_exp": {"text_config": {"indexer_head_dim": 12}},
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 4, "text_config": {"intermediate_size": 72}}},
    "udop": {"image_size": 16, "patch_size": 4},
    "unlimited_ocr": {
        "vision_config": {"sam_config": {"downsample_channels": [24, 32]}},
        "text_config": {"num_experts_per_tok": 2},
    },
    "vision-encoder-decoder": {
        "encoder": {"image_size": 16, "patch_size": 4, "hidden_size": 40, "intermediate_size": 56}
    },
}
"""What a class needs besides the rules."""
for _code in range(TOWER["num_embeddings"]):  # the words of a picture's codes, in letters for digits
    _letters = "".join("ABCDEFGHIJ"[int(digit)] for digit in str(_code))
    _words_of = SETTINGS.setdefault("chameleon", {"vocabulary_map": {"<image>": IMAGE}})["vocabulary_map"]
    _words_of[f"IMGIMG{_letters}Z"] = 300 + _code
    _words_of = SETTINGS["emu3"].setdefault("vocabulary_map", {"<image>": IMAGE, "<|extra_200|>": 20})
    _words_of[f"<|visual token {_code:06d}|>"] = 300 + _code


def _rules(path: tuple[str, ...]) -> dict[str, int]:
    """The sizes of the part of a model that a configuration's path leads to."""
    name = ".".join(path)
    if "qformer" in name or "perceiver" in name:
        return QUERIES
    if "audio" in name or "speech" in name:
        return HEARS
    seen = ("vision", "sam", "vq", "encoder_config", "visual", "high_res")
    return TOWER if any(word in name for word in seen) else TEXT


def _special(name: str) -> int | None:
    """The id of a token that begins, ends or fills up a text, by the name of its setting."""
    part, _, end = name.partition("_token_id")
    return SPECIAL.get(part) if name.endswith("_token_id") and not end else None


def shrunk(settings: dict[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """A configuration's settings, made small.

    Args:
        settings: as the default configuration has them.
        path: names of the parts that these are of.
    """
    rules, small = _rules(path), {}
    heads, layers = settings.get("num_attention_heads"), settings.get("num_hidden_layers")
    for name, value in settings.items():
        is_number = isinstance(value, int) and not isinstance(value, bool)
        numbers = isinstance(value, list) and value and all(isinstance(one, int) for one in value)
        if name == "per_layer_config" and value:
            small[name] = {}
        elif isinstance(value, dict) and (name.endswith("_config") or name in ("encoder", "decoder")):
            small[name] = shrunk(value, (*path, name))
        elif name in LISTS and isinstance(value, list):
            continue
        elif name == "num_key_value_heads" and name in rules and is_number and value == heads:
            small[name] = rules["num_attention_heads"]
        elif _special(name) is not None and (isinstance(value, list) or (is_number and value >= TEXT["vocab_size"])):
            small[name] = _special(name)
        elif name == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
            small[name] = {**value, "mrope_section": [2, 2, 2]}
        elif isinstance(value, list) and isinstance(layers, int) and len(value) == layers > 3:
            small[name] = [rules[name]] * 2 if name in rules else value[:2]
        elif name in rules and is_number and value != 0:
            small[name] = rules[name]
        elif name in rules and numbers:
            step = 8 if name == "moe_intermediate_size" else 0  # experts of words and of pictures differ
            small[name] = [rules[name] + step * place for place in range(len(value))]
        elif name in COUNTS:
            small[name] = 2 if is_number else value
        else:
            small[name] = value
    kinds_of = {name: settings[name] for name in LISTS if isinstance(settings.get(name), list) and settings[name]}
    if kinds_of and isinstance(small.get("num_hidden_layers"), int):
        kinds = list(dict.fromkeys(zip(*kinds_of.values(), strict=True)))
        kinds = kinds * 2 if len(kinds) == 1 else kinds
        small |= {name: [kind[place] for kind in kinds] for place, name in enumerate(kinds_of)}
        small["num_hidden_layers"] = len(kinds)
    return small


def _merge(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    for name, value in more.items():
        both = isinstance(value, dict) and isinstance(settings.get(name), dict) and name != "vocabulary_map"
        settings[name] = _merge(settings[name], value) if both else copy.deepcopy(value)
    return settings


def small_model(model_type: str, *, every_tower: bool = False) -> nn.Module:
    """A small model of a type, in evaluation mode and float32, every weight drawn anew.

    Args:
        model_type: as transformers' image-text-to-text mapping has it.
        every_tower: with the parts that its default configuration leaves away.
    """
    default = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(architectures._WRITTEN.get(model_type, {})))
    whole = default.to_dict()
    for name, kind in type(default).sub_configs.items() if every_tower else ():
        if whole.get(name) is None:
            open_type = architectures._OPTIONAL.get((model_type, name))
            whole[name] = (kind() if open_type is None else kind.for_model(**open_type)).to_dict()
    settings = shrunk(whole)
    ids = [name for name in whole if name.endswith(("token_id", "token_index")) and _special(name) is None]
    ids = [name for name in ids if isinstance(whole[name], int) and not isinstance(whole[name], bool)]
    for place, name in enumerate(sorted(ids, key=lambda name: (not name.startswith("image_token"), name))):
        settings[name] = IMAGE + place
    for name in ("transformers_version", "architectures", "_name_or_path", "model_type"):
        settings.pop(name, None)
    config = type(default)(**_merge(settings, SETTINGS.get(model_type, {})))
    torch.manual_seed(0)
    if type(config) in transformers.AutoModelForImageTextToText._model_mapping:
        model = transformers.AutoModelForImageTextToText.from_config(config)
    else:
        model = getattr(transformers, CLASSES[model_type])(config)
    model = model.float().eval()
    draw_weights(model)
    if getattr(config, "is_encoder_decoder", False) and getattr(model, "generation_config", None) is not None:
        model.generation_config.decoder_start_token_id = 2
    return model


# -- inputs ------------------------------------------------------------------------------------------------------------


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _words(*before: int, **more: Tensor) -> dict[str, Tensor]:
    ids = torch.tensor([[*before, *range(30, 42)]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def _forms(names: set[str]) -> Iterator[dict[str, Tensor]]:
    """The forms in which processors give one picture, of those whose arguments a model has."""
    if "image_grid_thw" in names:
        merges = {"image_merge_sizes": torch.tensor([2])} if "image_merge_sizes" in names else {}
        for shape in ((16, 96), (16, 48), (16, 3, 4, 4), (16, 8, 8, 3)):
            for grid in ([[1, 4, 4]], [[1, 2, 2]], [[4, 4]]):
                yield {"pixel_values": _random(*shape), "image_grid_thw": torch.tensor(grid), **merges}
    if "image_grid_hw" in names:
        yield {"pixel_values": _random(16, 48), "image_grid_hw": torch.tensor([[4, 4]])}
    if "image_position_ids" in names:
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
        yield {"pixel_values": _random(1, 16, 48), "image_position_ids": places}
    if "spatial_shapes" in names:
        mask = torch.ones(1, 16, dtype=torch.int64)
        yield {
            "pixel_values": _random(1, 16, 48),
            "spatial_shapes": torch.tensor([[4, 4]]),
            "pixel_attention_mask": mask,
        }
    if "target_sizes" in names:
        for shape in ((1, 3, 4, 64), (1, 3, 16, 16)):
            yield {"pixel_values": _random(*shape), "target_sizes": torch.tensor([[4, 4]])}
    for shape in ((1, 2, 4, 4, 3), (4, 2, 4, 4, 3), (1, 16, 2700)):
        yield {"pixel_values": _random(*shape)}
    for side in (16, 32, 56, 64, 256, 490):
        for shape in ((1, 3, side, side), (1, 1, 3, side, side), (1, 3, 3, side, side)):
            more: dict[str, Tensor] = {}
            if "image_sizes" in names:
                more["image_sizes"] = torch.tensor([[side, side]])
            if "tile_fine_mask" in names and len(shape) == 5:
                more["pixel_attention_mask"] = torch.ones(shape[:2], dtype=torch.bool)
            if "high_res_pixel_values" in names:
                more["high_res_pixel_values"] = _random(1, 3, 64, 64)
            yield {"pixel_values": _random(*shape), **more}


def _n_vectors(output: Any) -> int:
    """How many vectors a model makes of a picture for its decoder."""
    for name in ("pooler_output", "deepstack_features", "last_hidden_state"):
        found = getattr(output, name, None)
        if found is not None:
            return _n_vectors(found[0] if name == "deepstack_features" else found)
    if isinstance(output, list | tuple):
        return sum(_n_vectors(one) for one in output if not isinstance(one, int))
    return output.numel() // output.shape[-1]


@torch.no_grad()
def _with_picture(model: nn.Module, **more: Tensor) -> dict[str, Tensor]:
    """A question with a picture, in the first form that a model takes."""
    inner = getattr(model, "model", model)
    owners = (inner, getattr(inner, "encoder", None), model)
    owner = next(one for one in owners if hasattr(one, "get_image_features"))
    names = set(inspect.signature(model.forward).parameters)
    taken = set(inspect.signature(owner.get_image_features).parameters)
    why: list[str] = []
    for form in _forms(names):
        given = {name: value for name, value in {**form, **more}.items() if name in taken}
        try:
            n = _n_vectors(owner.get_image_features(**given))
        except Exception as error:
            why.append(f"{tuple(form['pixel_values'].shape)}: {type(error).__name__}: {str(error)[:90]}")
            continue
        for _ in range(2):
            made = _words(5, *[IMAGE] * n, **form, **more)
            shown = (made["input_ids"] == IMAGE).long()
            for name in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids"):
                made |= {name: shown} if name in names else {}
            if getattr(model.config, "is_encoder_decoder", False):
                made["decoder_input_ids"] = torch.tensor([[2, 20, 21]])
            try:
                model(**made)
                return made
            except Exception as error:
                why.insert(0, f"{tuple(form['pixel_values'].shape)} x {n}: {type(error).__name__}: {str(error)[:160]}")
                told = re.search(r"features:? (\d+)", str(error))
                n = int(told[1]) if told and int(told[1]) < 500 else n
    raise ValueError(f"no form of a picture is taken: {'; '.join(why[:6])}")


@torch.no_grad()
def _with_sound(model: nn.Module, made: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs with a sound before the words, in the first form that a model takes; as they were if it takes none."""
    inner = getattr(model, "model", model)
    owner = next((one for one in (inner, model) if hasattr(one, "get_audio_features")), None)
    config = model.config
    token = getattr(config, "audio_token_id", None) or getattr(config, "audio_token_index", None)
    if owner is None or token is None:
        return made
    names = set(inspect.signature(model.forward).parameters)
    taken = set(inspect.signature(owner.get_audio_features).parameters)
    for length in (64, 32, 200, 640):
        whole = torch.ones(1, length, dtype=torch.int64)
        for features in (_random(1, 16, length), _random(1, length, 16), _random(1, length, 128), _random(1, length)):
            form = {"input_features": features, "input_values": features, "feature_attention_mask": whole}
            form |= {"input_features_mask": whole.bool(), "input_values_mask": whole.bool()}
            form |= {"chunk_sample_lengths": torch.tensor([length * 160])}
            form = {name: value for name, value in form.items() if name in names}
            try:
                n = _n_vectors(owner.get_audio_features(**{k: v for k, v in form.items() if k in taken}))
                ids = torch.cat([torch.full((1, n), token), made["input_ids"]], 1)
                more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                for name in ("mm_token_type_ids", "token_type_ids"):
                    more |= {name: F.pad(made[name], (n, 0))} if name in made else {}
                model(**{**made, **form, **more})
            except Exception:
                continue
            return {**made, **form, **more}
    return made


def _patches() -> Tensor:
    """16 patches with their rows and columns, as Pix2Struct's processor gives them."""
    places = torch.cartesian_prod(torch.arange(1.0, 5), torch.arange(1.0, 5))
    return torch.cat([places, _random(16, 768)], -1)[None]


def small_inputs(model_type: str, model: nn.Module) -> dict[str, Tensor]:
    """One question with all that a small model sees, as keyword arguments of its forward.

    Args:
        model_type: its type.
        model: what `small_model` gives for it.
    """
    decoded = {"decoder_input_ids": torch.tensor([[2, 20, 21]])}
    picture = {"pixel_values": _random(1, 3, 16, 16)}
    asked = {"qformer_input_ids": torch.tensor([[5, 6, 7, 8]]), "qformer_attention_mask": torch.ones(1, 4).long()}
    if model_type in ("blip", "git"):  # they put pictures before the words by themselves
        return _words(**picture)
    if model_type in ("mistral4", "gemma4_unified"):
        return _words()
    if model_type == "diffusion_gemma":
        return _words(decoder_input_ids=torch.arange(20, 28)[None])
    if model_type == "evolla":
        return _words(protein_input_ids=torch.arange(5, 11)[None], protein_attention_mask=torch.ones(1, 6).long())
    if model_type == "idefics":
        return _words(pixel_values=_random(1, 1, 3, 16, 16), image_attention_mask=torch.ones(1, 12, 1).long())
    if model_type in ("kosmos-2", "kosmos-2.5"):
        made = _words(5, *[7] * model.config.latent_query_num)
        size = {"width": torch.tensor([4]), "height": torch.tensor([4])}
        shown = picture if model_type == "kosmos-2" else {"flattened_patches": _patches(), **size}
        return {**made, **shown, "image_embeds_position_mask": made["input_ids"] == 7}
    if model_type == "pi0":
        state, noise = _random(1, model.config.max_state_dim), _random(1, model.config.chunk_size, 32)
        seen = {"pixel_values": _random(1, 1, 3, 16, 16), "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}
        return _words(*[IMAGE] * 16, state=state, noise=noise, timestep=torch.tensor([0.5]), **seen)
    if model_type == "pix2struct":
        return {"flattened_patches": _patches(), "attention_mask": torch.ones(1, 16), **decoded}
    if model_type in ("pp_formulanet", "vision-encoder-decoder"):
        return {**picture, **decoded}
    if model_type == "udop":
        boxes = torch.rand(1, 12, 4, generator=torch.Generator().manual_seed(0)).sort(-1).values
        return _words(bbox=boxes, **picture, **decoded)
    if model_type == "instructblip":
        return _with_picture(model, **asked)
    if model_type == "instructblipvideo":
        n = model.config.num_query_tokens * 4
        return _words(5, *[model.config.video_token_index] * n, pixel_values=_random(1, 4, 3, 16, 16), **asked)
    return _with_sound(model, _with_picture(model))
