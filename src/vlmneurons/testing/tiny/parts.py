"""What every small model is made of: a picture, a tokenizer, weights, and settings that several share."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from vlmneurons.checks import Keywords

_WORDS = (
    "the of is in this which what on image picture question answer options option letter with from given choices "
    "directly single word food dish place name user assistant you are helpful country city people"
)
_LETTERS = "ABCDEFGH"


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


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Draws every weight anew, at a scale that keeps activations near 1 and leaves nothing at exactly 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        else:  # biases, norms, gates: near what they were, for some norms count from 0 and some from 1
            parameter.add_(noise * 0.1)


def text_config(tokenizer: PreTrainedTokenizerFast, **changes: object) -> Keywords:
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


def finish(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Sets what `generate` needs, as the released models' generation_config.json does."""
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model
