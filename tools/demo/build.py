"""Makes the demo's untrained model, tokenizer and processor: the classes of LLaVA-NeXT, made small.

A `transformers.LlavaNextForConditionalGeneration` with a CLIP vision tower and a Mistral decoder, so that everything
that works on the demo works on ``llava-hf/llava-v1.6-mistral-7b-hf``. Pictures are 64 x 64, in 16 patches, seen twice
(LLaVA-NeXT shows the whole picture and then its tiles; here there is one tile).
"""

from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tools.demo.compose import IMAGE
from tools.demo.facts import WORDING, vocabulary

PATCH = 16
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} Answer:{% endif %}"
)
"""``<s><image>What is this? Answer:``. The answer follows as " sushi"."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the demo's model."""

    hidden: int = 128
    layers: int = 4
    neurons: int = 512
    heads: int = 4
    vision_hidden: int = 128
    vision_layers: int = 4
    vision_neurons: int = 512
    vision_heads: int = 4


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every answer, with the space before it, is one token.

    Answers of several words ("Mexico City") are kept together before BPE sees them, and the merges are learned from the
    demo's own wording, every word of which becomes one token. Any other text is spelled in bytes.
    """
    phrases = sorted((" " + answer for answer in vocabulary()), key=len, reverse=True)
    escaped = "|".join("".join("\\" + c if not c.isalnum() and c != " " else c for c in phrase) for phrase in phrases)
    # A phrase counts only as a whole: " yes" must not cut " yesterday" in two.
    words = rf"(?:{escaped})(?![\p{{L}}\p{{N}}])| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,  # no limit in practice: it stops when every word is one token
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    wordings = [wording for pair in WORDING.values() for wording in pair]
    tokenizer.train_from_iterator([*phrases, *wordings, " Answer:"], trainer=trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    for phrase in phrases:
        if len(fast(phrase, add_special_tokens=False).input_ids) != 1:
            raise AssertionError(f"{phrase!r} is not one token")
    return fast


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaNextProcessor:
    """The processor: pictures to -1 … 1 at 64 x 64, one tile, and the chat template."""
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": IMAGE},
        crop_size={"height": IMAGE, "width": IMAGE},
        image_grid_pinpoints=[[IMAGE, IMAGE]],
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, shape: Shape, seed: int) -> LlavaNextForConditionalGeneration:
    """The model with random weights."""
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_hidden,
        intermediate_size=shape.vision_neurons,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=IMAGE,
        patch_size=PATCH,
        projection_dim=shape.vision_hidden,
    )
    text = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.neurons,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=512,
        sliding_window=None,
        initializer_range=0.06,  # 0.02 is made for far wider models: here it costs the first thousand steps
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[IMAGE, IMAGE]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(config).eval()
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        torch.nn.init.normal_(layer.weight, std=text.initializer_range)
    # Stopping at the end token and padding must work in generate() as well.
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
