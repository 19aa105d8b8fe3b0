"""Small random models of real classes, with real processors where one can be built without a download.

`tiny_model` gives a model in evaluation mode, in float32, the same one on every call and every machine. The weights
are drawn wide enough that every neuron matters to the logits, and so that nothing is zero that a trained model does
not have at zero: a default model's pad embedding is, and hides a missing attention mask.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

_BUILDERS: dict[str, Callable[[], tuple[PreTrainedModel, ProcessorMixin | None]]] = {}
_INPUTS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {}

_WORDS = (
    " the of is in this which what on image picture question answer options option letter with from given choices"
    " directly single word food dish place name user assistant you are helpful country city people".split(" ")[1:]
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


def tiny_names() -> tuple[str, ...]:
    """The names that `tiny_model` knows, the three models of the paper first."""
    return tuple(_BUILDERS)


def tiny_model(name: str) -> tuple[PreTrainedModel, ProcessorMixin | None]:
    """A small random model and its processor, new on every call and equal each time.

    Args:
        name: one of `tiny_names`. The three models of the paper are ``"llava_next_mistral"``, ``"llava_next_qwen2"``
            (as Pangea) and ``"qwen2_5_vl"``.

    Returns:
        The model, in evaluation mode and float32, and a processor with a chat template; None where a processor cannot
        be built without downloaded files (`tiny_inputs` serves every model).

    Raises:
        ValueError: no such name.
    """
    if name not in _BUILDERS:
        raise ValueError(f"there is no tiny model {name!r}; there are {', '.join(_BUILDERS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = _BUILDERS[name]()
    _draw_weights(model.float().eval())
    return model, processor


def tiny_inputs(name: str) -> dict[str, torch.Tensor]:
    """Inputs of one question with one image, as keyword arguments of the model that `tiny_model` gives.

    Raises:
        ValueError: no such name.
    """
    if name in _INPUTS:
        return _INPUTS[name]()
    _, processor = tiny_model(name)
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "Which dish is this?\nA. Tea\nB. Rice"}],
        }
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return dict(processor(text=[text], images=[tiny_image()], return_tensors="pt"))


def tiny_image(seed: int = 0, height: int = 24, width: int = 32) -> Image.Image:
    """An image of random colours."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def tiny_tokenizer(special: list[str], **roles: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text is encoded, and an option letter, with or without a space, is one token.

    Args:
        special: the special tokens, numbered from 0. A ``bos_token`` among them is put before every text.
        roles: ``pad_token``, ``bos_token``, ``extra_special_tokens`` … as `PreTrainedTokenizerFast` takes them.
    """
    letters = [f" {letter}" for letter in _LETTERS]
    words = [word for plain in _WORDS for word in (f" {plain}", plain.capitalize())]
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


def _inputs(*names: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def register(build: Callable[[], Any]) -> Callable[[], Any]:
        _INPUTS.update(dict.fromkeys(names, build))
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
