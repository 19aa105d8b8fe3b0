"""Small random models of real classes, with real processors where one can be built without a download.

`tiny_model` gives a model in evaluation mode, in float32, the same one on every call and every machine. The weights
are drawn wide enough that every neuron matters to the logits, and so that nothing is zero that a trained model does
not have at zero: a default model's pad embedding is, and hides a missing attention mask.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

_BUILDERS: dict[str, Callable[[], tuple[PreTrainedModel, ProcessorMixin | None]]] = {}

_WORDS = (
    "the of is in this which what on image picture question answer options option letter with from given choices "
    "directly single word food dish place name user assistant you are helpful country city people"
)
_LETTERS = "ABCDEFGH"

LLAVA_MISTRAL_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    " [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'][0]['text'] }}</s> "
    "{% else %}<<SYS>>\n{{ message['content'][0]['text'] }}\n<</SYS>>\n\n{% endif %}"
    "{% endfor %}"
)
PANGEA_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_names(*, processor: bool = True) -> tuple[str, ...]:
    """The names that `tiny_model` knows.

    Args:
        processor: only the models that come with a processor, which are the three of the paper; or, if False, all.
    """
    return tuple(_BUILDERS) if processor else (*_BUILDERS, *_CONFIGS)


def tiny_model(name: str) -> tuple[PreTrainedModel, ProcessorMixin | None]:
    """A small random model and its processor, new on every call and equal each time.

    Args:
        name: one of ``tiny_names(processor=False)``. The three models of the paper are ``"llava_next_mistral"``,
            ``"llava_next_qwen2"`` (as Pangea) and ``"qwen2_5_vl"``; the others are called as transformers calls them.

    Returns:
        The model, in evaluation mode and float32, and a processor with a chat template; None where a processor cannot
        be built without downloaded files (`tiny_inputs` serves every model).

    Raises:
        ValueError: no such name.
    """
    if name not in tiny_names(processor=False):
        raise ValueError(f"there is no tiny model {name!r}; there are {', '.join(tiny_names(processor=False))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = _BUILDERS[name]() if name in _BUILDERS else (_from_config(name), None)
    _draw_weights(model.float().eval())
    return model, processor


def tiny_inputs(name: str) -> dict[str, torch.Tensor]:
    """Inputs of one question with one image, as keyword arguments of the model that `tiny_model` gives.

    Args:
        name: one of `tiny_names`.

    Raises:
        ValueError: no such name.
    """
    model, processor = tiny_model(name)
    if processor is None:
        return _configured_inputs(name, model)
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "Which dish is this?\nA. Tea\nB. Rice"}],
        }
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return dict(processor(text=[text], images=[tiny_image()], return_tensors="pt"))


def tiny_image(seed: int = 0, height: int = 24, width: int = 32) -> Image.Image:
    """An image of random colours.

    Args:
        seed: of the colours.
        height: in pixels.
        width: in pixels.
    """
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def tiny_tokenizer(special: list[str], **roles: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text is encoded, and an option letter, with or without a space, is one token.

    Args:
        special: the special tokens, numbered from 0. A ``bos_token`` among them is put before every text.
        roles: ``pad_token``, ``bos_token``, ``extra_special_tokens`` … as `PreTrainedTokenizerFast` takes them.
    """
    letters = [f" {letter}" for letter in _LETTERS]
    words = [word for plain in _WORDS.split() for word in (f" {plain}", plain.capitalize())]
    space = "Ġ"
    vocabulary = {token: index for index, token in enumerate(special)}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    for word in [*letters, *words]:  # letters first: their merges then rank before those of every longer word
        left, *rest = word.replace(" ", space)
        for character in rest:
            if left + character not in vocabulary:
                vocabulary[left + character] = len(vocabulary)
                merges.append((left, character))
            left += character
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    if roles.get("bos_token") in vocabulary:
        bos = roles["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def _builder(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def register(build: Callable[[], Any]) -> Callable[[], Any]:
        _BUILDERS[name] = build
        return build

    return register


@torch.no_grad()
def _draw_weights(model: nn.Module) -> None:
    """Draws every weight anew, at a scale that keeps activations near 1 and leaves nothing at exactly 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        else:  # biases, norms, gates: near what they were, for some norms count from 0 and some from 1
            parameter.add_(noise * 0.1)


def _text_config(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> dict[str, Any]:
    """Settings shared by the small decoders: 4 layers of 64 neurons, grouped-query attention, an untied head."""
    return {
        "vocab_size": 8 * -(-len(tokenizer) // 8),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **changes,
    }


def _finish(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Sets what `generate` needs, as the released models' generation_config.json does."""
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model


def _llava_next(tokenizer: PreTrainedTokenizerFast, text_config: Any, template: str) -> tuple[Any, Any]:
    from transformers import (
        CLIPVisionConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    grid = [[16, 32], [32, 16], [32, 32]]
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
        tie_word_embeddings=False,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=grid
        ),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    return _finish(LlavaNextForConditionalGeneration(config), tokenizer), processor


@_builder("llava_next_mistral")
def _llava_next_mistral() -> tuple[Any, Any]:
    """As llava-hf/llava-v1.6-mistral-7b-hf."""
    from transformers import MistralConfig

    tokenizer = tiny_tokenizer(
        ["<unk>", "<s>", "</s>", "<pad>", "<image>"],
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    return _llava_next(tokenizer, MistralConfig(**_text_config(tokenizer, sliding_window=None)), LLAVA_MISTRAL_TEMPLATE)


@_builder("llava_next_qwen2")
def _llava_next_qwen2() -> tuple[Any, Any]:
    """As neulab/Pangea-7B-hf."""
    from transformers import Qwen2Config

    tokenizer = tiny_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    return _llava_next(tokenizer, Qwen2Config(**_text_config(tokenizer)), PANGEA_TEMPLATE)


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    vision = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    return tiny_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *vision],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


@_builder("qwen2_5_vl")
def _qwen2_5_vl() -> tuple[Any, Any]:
    """As Qwen/Qwen2.5-VL-7B-Instruct."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = _qwen_tokenizer()
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=_text_config(tokenizer, rope_parameters=rope),
        vision_config=vision,
        tie_word_embeddings=False,
        **_qwen_ids(tokenizer),
    )
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 64, "longest_edge": 1024}, **sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=QWEN_TEMPLATE,
    )
    return _finish(Qwen2_5_VLForConditionalGeneration(config), tokenizer), processor


# --- models of which only a configuration is written here: their inputs are built without a processor ---

_TEXT = {
    "vocab_size": 256,
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
_EYE = {  # CLIP, SigLIP and their like
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_QWEN_EYE = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_IMAGE, _START, _END = 10, 12, 13
_QWEN_TOKENS = {
    "image_token_id": _IMAGE,
    "video_token_id": 11,
    "vision_start_token_id": _START,
    "vision_end_token_id": _END,
}
_GLM_TOKENS = {
    "image_token_id": _IMAGE,
    "video_token_id": 11,
    "image_start_token_id": _START,
    "image_end_token_id": _END,
}
_GLM_TEXT = {**_TEXT, "rope_parameters": {**_ROPE, "partial_rotary_factor": 1.0}}
_PLAIN_EYE = {**_EYE, "vision_use_head": False}

_CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_EYE, "model_type": "clip_vision_model"},
        "image_token_index": _IMAGE,
    },
    "vipllava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_EYE, "num_hidden_layers": 12, "model_type": "clip_vision_model"},
        "image_token_index": _IMAGE,
    },
    "llava_onevision": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_PLAIN_EYE, "model_type": "siglip_vision_model"},
        "image_token_index": _IMAGE,
        "video_token_index": 11,
        "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16]],
    },
    "qwen2_vl": {
        "text_config": {**_TEXT, "rope_parameters": _ROPE},
        "vision_config": {
            **{"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
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
        "text_config": {**_TEXT, "sliding_window": 32},
        "vision_config": _PLAIN_EYE,
        "mm_tokens_per_image": 4,
        "image_token_index": _IMAGE,
        "boi_token_index": _START,
        "eoi_token_index": _END,
    },
    "gemma4": {
        "text_config": {
            **_TEXT,
            **{"num_hidden_layers": 3, "global_head_dim": 8, "sliding_window": 16, "num_kv_shared_layers": 0},
            **{"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
            **{"vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 8},
        },
        "vision_config": {
            **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2},
            "position_embedding_size": 64,
        },
        "audio_config": None,
        "image_token_id": _IMAGE,
        "video_token_id": 11,
        "audio_token_id": 14,
        "boi_token_id": _START,
        "eoi_token_id": _END,
    },
    "paligemma": {
        "text_config": {**_TEXT, "model_type": "gemma", "num_key_value_heads": 1},
        "vision_config": {**_PLAIN_EYE, "projection_dim": 32},
        "image_token_index": _IMAGE,
        "projection_dim": 32,
    },
    "idefics2": {
        "text_config": {**_TEXT, "model_type": "mistral"},
        "vision_config": _EYE,
        "perceiver_config": {
            **{"resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 8},
            **{"num_key_value_heads": 1, "hidden_size": 32},
        },
        "image_token_id": _IMAGE,
    },
    "idefics3": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": _EYE,
        "image_token_id": _IMAGE,
        "scale_factor": 2,
    },
    "smolvlm": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": _EYE,
        "image_token_id": _IMAGE,
        "scale_factor": 2,
    },
    "internvl": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_EYE, "image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": _IMAGE,
        "downsample_ratio": 0.5,
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral"},
        "vision_config": {**_EYE, "head_dim": 16, "model_type": "pixtral"},
        "image_token_index": _IMAGE,
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
            **{"intermediate_size": 128, "num_channels": 3, "pixel_shuffle_ratio": 0.5},
            **{"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
        },
        "image_token_index": _IMAGE,
    },
    "glm4v": {"text_config": _GLM_TEXT, "vision_config": {**_QWEN_EYE, "image_size": 16}, **_GLM_TOKENS},
    "glm4v_moe": {
        "text_config": {
            **_GLM_TEXT,
            **{"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
            **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        },
        "vision_config": {**_QWEN_EYE, "image_size": 16},
        **_GLM_TOKENS,
    },
    "aya_vision": {
        "text_config": {**_TEXT, "model_type": "cohere2", "sliding_window": 16},
        "vision_config": _PLAIN_EYE,
        "image_token_index": _IMAGE,
        "downsample_factor": 2,
        "adapter_layer_norm_eps": 1e-6,
    },
    "cohere2_vision": {
        "text_config": {**_TEXT, "model_type": "cohere2", "sliding_window": 16},
        "vision_config": _PLAIN_EYE,
        "image_token_id": _IMAGE,
        "downsample_factor": 2,
        "alignment_intermediate_size": 64,
    },
    "got_ocr2": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {
            **{"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"image_size": 64, "patch_size": 4, "mlp_dim": 48, "window_size": 4, "global_attn_indexes": [1]},
        },
        "image_token_index": _IMAGE,
    },
    "mllama": {
        "text_config": {
            **_TEXT,
            **{"num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "vision_config": {
            **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 2},
            **{"attention_heads": 2, "image_size": 16, "patch_size": 4, "max_num_tiles": 2, "hidden_act": "gelu"},
            **{"supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]], "intermediate_layers_indices": [0]},
            "vision_output_dim": 64,
        },
        "image_token_index": _IMAGE,
    },
    "molmo2": {
        "text_config": _TEXT,
        "vision_config": {
            **_EYE,
            **{"head_dim": 16, "num_key_value_heads": 2, "image_size": [16, 16], "num_position_embeddings": 16},
        },
        "adapter_config": {
            **{"vision_feature_layer": [1, 0], "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2},
            **{"head_dim": 16, "intermediate_size": 48, "text_hidden_size": 32},
        },
        "image_patch_id": _IMAGE,
        "image_start_token_id": _START,
        "image_end_token_id": _END,
        "low_res_image_start_token_id": 14,
        "frame_start_token_id": 15,
        "frame_end_token_id": 16,
    },
    "florence2": {
        "text_config": {
            **{"model_type": "bart", "vocab_size": 1024, "d_model": 32, "max_position_embeddings": 256},
            **{"encoder_layers": 2, "encoder_ffn_dim": 64, "encoder_attention_heads": 4},
            **{"decoder_layers": 2, "decoder_ffn_dim": 64, "decoder_attention_heads": 4},
            **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
        },
        "vision_config": {
            **{"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1]},
            **{"patch_prenorm": [False, True], "embed_dim": [16, 32], "num_heads": [2, 2], "num_groups": [2, 2]},
            **{"window_size": 2, "projection_dim": 32, "max_temporal_embeddings": 4, "max_position_embeddings": 8},
        },
        "image_token_id": _IMAGE,
    },
}


def _from_config(name: str) -> PreTrainedModel:
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **copy.deepcopy(_CONFIGS[name])))
    if name == "llama4":
        model.language_model.register_forward_hook(_with_image_outputs)
    return model


def _with_image_outputs(_: nn.Module, args: Any, output: Any) -> None:
    """Gives Llama 4's text output what its caller reads there: without it transformers 5.24.0 runs no Llama 4 at all.

    `Llama4ForConditionalGeneration.forward` reads ``image_outputs`` of what its text model gives, which never has it.
    """
    if not hasattr(output, "image_outputs"):
        output.image_outputs = None


def _pixels(name: str) -> dict[str, torch.Tensor]:
    """One image of random numbers, in the form in which a model's processor would give it."""

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(2))

    if name.startswith(("qwen", "glm")):
        return {"pixel_values": noise(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    if name == "llava_onevision":
        return {"pixel_values": noise(1, 3, 3, 16, 16), "image_sizes": torch.tensor([[16, 32]])}
    if name.startswith(("idefics", "smolvlm")):
        return {"pixel_values": noise(1, 1, 3, 16, 16)}
    if name == "mistral3":
        return {"pixel_values": noise(1, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])}
    if name == "gemma4":
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1)
        return {"pixel_values": noise(1, 16, 48), "image_position_ids": places[None]}
    if name == "molmo2":
        return {
            "pixel_values": noise(1, 16, 48),
            "image_token_pooling": torch.arange(16).reshape(4, 4),
            "image_grids": torch.tensor([[2, 2, 0, 0]]),
        }
    if name == "mllama":
        return {
            "pixel_values": noise(1, 1, 2, 3, 16, 16),
            "aspect_ratio_ids": torch.tensor([[1]]),
            "aspect_ratio_mask": torch.tensor([[[1, 0]]]),
        }
    side = {"got_ocr2": 64, "florence2": 32}.get(name, 16)
    return {"pixel_values": noise(1, 3, side, side)}


@torch.no_grad()
def _configured_inputs(name: str, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A question with one image: as many image tokens as the model makes features of it."""
    inputs = _pixels(name)
    features: Any = None
    if name != "mllama":  # its text attends to the image across, and has one token for it
        found = model.get_image_features(**inputs)
        pooled = getattr(found, "pooler_output", None)
        features = found.last_hidden_state if pooled is None else pooled
    if features is None:
        count = 1
    else:
        count = sum(
            part.shape[:-1].numel() for part in (features if isinstance(features, list | tuple) else [features])
        )
    ids = torch.tensor([[1, _START, *[_IMAGE] * count, _END, *range(20, 30)]])
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name.startswith(("qwen", "glm", "gemma4")):
        inputs["mm_token_type_ids"] = (ids == _IMAGE).long()
    if name in ("paligemma", "gemma3"):
        inputs["token_type_ids"] = (ids == _IMAGE).long()
    if name == "mllama":
        inputs["cross_attention_mask"] = torch.ones(1, ids.shape[1], 1, 2, dtype=torch.long)
    if name == "florence2":
        inputs["decoder_input_ids"] = torch.tensor([[2, 20, 21]])
    return inputs
