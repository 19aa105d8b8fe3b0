"""Configurations of small models of many classes, called as transformers calls them.

The ids of special tokens are the same in all: `processors` puts each family's own tokens there.
"""

from vlmneurons.checks import Keywords

_TEXT = {
    "vocab_size": 640,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_EYE = {  # CLIP, SigLIP and their like; no size is one of a decoder's, where the class leaves it free
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_QWEN_EYE = {
    "depth": 2,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
IMAGE, VIDEO, START, END = 10, 11, 12, 13
"""Ids of special tokens: a picture's and a video's placeholder, and what stands around a picture."""
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_GLM_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
}
_COHERE = {**_TEXT, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_GLM_TEXT = {**_TEXT, "rope_parameters": {**_ROPE, "partial_rotary_factor": 1.0}}
_PLAIN_EYE = {**_EYE, "vision_use_head": False}

CONFIGS: dict[str, Keywords] = {
    "llava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_EYE, "model_type": "clip_vision_model"},
        "image_token_index": IMAGE,
    },
    "vipllava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_EYE, "num_hidden_layers": 12, "model_type": "clip_vision_model"},
        "image_token_index": IMAGE,
    },
    "llava_onevision": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_PLAIN_EYE, "model_type": "siglip_vision_model"},
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16]],
    },
    "qwen2_vl": {
        "text_config": {**_TEXT, "rope_parameters": _ROPE},
        "vision_config": {
            **{"depth": 2, "embed_dim": 40, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
            **{"spatial_merge_size": 2, "temporal_patch_size": 2},
        },
        **_QWEN_TOKENS,
    },
    "qwen3_vl": {
        "text_config": {**_TEXT, "rope_parameters": _ROPE},
        "vision_config": {**_QWEN_EYE, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **_QWEN_TOKENS,
    },
    "qwen3_vl_moe": {
        "text_config": {
            **_TEXT,
            **{"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1},
            **{"mlp_only_layers": [], "rope_parameters": _ROPE},
        },
        "vision_config": {**_QWEN_EYE, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **_QWEN_TOKENS,
    },
    "qwen3_5": {
        "text_config": {
            **_TEXT,
            **{"num_hidden_layers": 4, "rope_parameters": {**_ROPE, "partial_rotary_factor": 1.0}},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
            **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        },
        "vision_config": {**_QWEN_EYE, "num_position_embeddings": 16},
        **_QWEN_TOKENS,
    },
    "gemma3": {
        "text_config": {**_TEXT, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": _PLAIN_EYE,
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        "boi_token_index": START,
        "eoi_token_index": END,
    },
    "gemma4": {
        "text_config": {
            **_TEXT,
            **{"num_hidden_layers": 3, "global_head_dim": 8, "sliding_window": 16, "num_kv_shared_layers": 0},
            **{"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
            **{"vocab_size_per_layer_input": 640, "hidden_size_per_layer_input": 8},
        },
        "vision_config": {
            **{"hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2},
            "position_embedding_size": 64,
        },
        "audio_config": None,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "audio_token_id": 14,
        "boi_token_id": START,
        "eoi_token_id": END,
    },
    "paligemma": {
        "text_config": {**_TEXT, "model_type": "gemma", "num_key_value_heads": 1, "vocab_size": 1792},
        "vision_config": {**_PLAIN_EYE, "projection_dim": 32},
        "image_token_index": IMAGE,
        "projection_dim": 32,
    },
    "idefics2": {
        "text_config": {**_TEXT, "model_type": "mistral"},
        "vision_config": _EYE,
        "perceiver_config": {
            **{"resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 8},
            **{"num_key_value_heads": 1, "hidden_size": 32},
        },
        "image_token_id": IMAGE,
    },
    "idefics3": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": _EYE,
        "image_token_id": IMAGE,
        "scale_factor": 2,
    },
    "smolvlm": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": _EYE,
        "image_token_id": IMAGE,
        "scale_factor": 2,
    },
    "internvl": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_EYE, "image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": IMAGE,
        "downsample_ratio": 0.5,
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral"},
        "vision_config": {**_EYE, "image_size": 32, "head_dim": 20, "model_type": "pixtral"},
        "image_token_index": IMAGE,
        "spatial_merge_size": 2,
    },
    "llama4": {
        "text_config": {
            **_TEXT,
            **{"intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1},
            **{"interleave_moe_layer_step": 2, "attn_temperature_tuning": False},
        },
        "vision_config": {
            **_EYE,
            **{"intermediate_size": 160, "num_channels": 3, "pixel_shuffle_ratio": 0.5},
            **{"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
        },
        "image_token_index": IMAGE,
    },
    "glm4v": {"text_config": _GLM_TEXT, "vision_config": {**_QWEN_EYE, "image_size": 16}, **_GLM_TOKENS},
    "glm4v_moe": {
        "text_config": {
            **_GLM_TEXT,
            **{"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 3},
            **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        },
        "vision_config": {**_QWEN_EYE, "image_size": 16},
        **_GLM_TOKENS,
    },
    "aya_vision": {
        "text_config": {**_COHERE, "model_type": "cohere2"},
        "vision_config": _PLAIN_EYE,
        "image_token_index": IMAGE,
        "downsample_factor": 2,
        "adapter_layer_norm_eps": 1e-6,
    },
    "cohere2_vision": {
        "text_config": {**_COHERE, "model_type": "cohere2"},
        "vision_config": _PLAIN_EYE,
        "image_token_id": IMAGE,
        "downsample_factor": 2,
        "alignment_intermediate_size": 64,
    },
    "got_ocr2": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {
            **{"hidden_size": 40, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"image_size": 64, "patch_size": 4, "mlp_dim": 48, "window_size": 4, "global_attn_indexes": [1]},
        },
        "image_token_index": IMAGE,
    },
    "mllama": {
        "text_config": {
            **_TEXT,
            **{"num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "vision_config": {
            **{"hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 2},
            **{"attention_heads": 2, "image_size": 16, "patch_size": 4, "max_num_tiles": 2, "hidden_act": "gelu"},
            **{"supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]], "intermediate_layers_indices": [0]},
            "vision_output_dim": 80,
        },
        "image_token_index": IMAGE,
    },
    "molmo2": {
        "text_config": _TEXT,
        "vision_config": {
            **_EYE,
            **{"head_dim": 16, "num_key_value_heads": 2, "image_size": [16, 16], "num_position_embeddings": 16},
        },
        "adapter_config": {
            **{"vision_feature_layer": [1, 0], "hidden_size": 40, "num_attention_heads": 2, "num_key_value_heads": 2},
            **{"head_dim": 16, "intermediate_size": 56, "text_hidden_size": 32},
        },
        "image_patch_id": IMAGE,
        "image_start_token_id": START,
        "image_end_token_id": END,
        "low_res_image_start_token_id": 14,
        "frame_start_token_id": 15,
        "frame_end_token_id": 16,
    },
    "florence2": {
        "text_config": {
            **{"model_type": "bart", "vocab_size": 1024, "d_model": 32, "max_position_embeddings": 256},
            **{"encoder_layers": 2, "encoder_ffn_dim": 80, "encoder_attention_heads": 4},
            **{"decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4},
            **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
        },
        "vision_config": {
            **{"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1]},
            **{"patch_prenorm": [False, True], "embed_dim": [12, 24], "num_heads": [2, 2], "num_groups": [2, 2]},
            **{"window_size": 2, "projection_dim": 32, "max_temporal_embeddings": 4, "max_position_embeddings": 8},
        },
        "image_token_id": IMAGE,
    },
}
