"""Whether a model answers a question that shares a batch as it does alone: tried out once, on its first batch.

Some models' own code lets rows of a batch reach each other: one counts the positions of a question's picture on from
the questions before it, another lets pictures attend to each other's patches, or padding to words. Their numbers would
hang on what stands beside a question. Types that were seen to keep rows apart are not tried again.
"""

import warnings
import weakref
from collections.abc import Hashable

import torch
from torch import Tensor, nn

from vlmneurons.errors import MismatchError
from vlmneurons.model.vlm import VLM
from vlmneurons.questions.sets import QuestionSet

# fmt: off
_KEEP_APART = {
    "aya_vision", "cohere2_vision", "gemma3", "gemma4", "glm4v", "glm4v_moe", "got_ocr2", "idefics2", "idefics3",
    "internvl", "llama4", "llava", "llava_next", "llava_onevision", "mistral3", "mllama", "molmo2", "paligemma",
    "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "vipllava", "bloom", "cohere",
    "deepseek_v3", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "gptj", "granitemoe",
    "jamba", "llama", "mistral", "mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "stablelm", "qwen2_audio",
}
# fmt: on
"""The types of models whose counts were compared row by row in batches padded on either side."""
_TRIED: "weakref.WeakKeyDictionary[nn.Module, set[Hashable]]" = weakref.WeakKeyDictionary()
"""What kinds of batches each model was tried with, and was right."""
_ROWS = 6
_ROUNDING, _COARSE = 1e-2, 1.0
"""By how many nats the likeliest words may differ: in float32; in half precision, where a router's choice may flip."""


@torch.no_grad()
def check_alone(model: VLM, batch: QuestionSet, padding_side: str) -> None:
    """Refuse batches of a model that answers a question otherwise beside others.

    The first questions of the batch, its last, and the one with the most padding are asked alone as well, without
    anything switched off. In half precision, where answers differ by rounding alone, a large difference is warned of. A
    batch that cannot be run is left to the run itself, which says why.

    Args:
        model: the model.
        batch: questions that are about to share a forward.
        padding_side: the side on which they will be padded.

    Raises:
        MismatchError: the likeliest words' log-probabilities are others.
    """
    kind = (tuple(map(bool, batch[0].n_media)), padding_side)
    known = getattr(model.hf.config, "model_type", "") in _KEEP_APART or model.is_encoder_decoder
    if len(batch) < 2 or known or kind in _TRIED.setdefault(model.hf, set()):
        return
    try:
        together = model.encoder(batch, padding_side=padding_side)
        logits, length = model.hf(**together).logits, together["input_ids"].shape[1]
        rows = {*range(min(_ROWS, len(batch))), len(batch) - 1, int(together.tokens.attention.sum(1).argmin())}
        # From the end: some models put what they see before the words, and give logits of it too.
        found = {row: logits[row, int(together.tokens.last[row]) - length] for row in rows}
        alone = {row: model.hf(**model.encoder(batch[row : row + 1], padding_side=padding_side)).logits for row in rows}
    except Exception:  # of whatever kind: it comes again
        return
    off, row = max((_difference(found[row], alone[row][0, -1]), row) for row in rows)
    whole = logits.dtype == torch.float32
    if off <= (_ROUNDING if whole else _COARSE):
        _TRIED[model.hf].add(kind)
        return
    what = (
        f"{type(model.hf).__name__} answers question {batch[row].id!r} otherwise in a batch than alone: the likeliest "
        f"words' log-probabilities differ by up to {off:.2g}. Its own code does not keep the rows of a batch apart, or "
        "from their padding"
    )
    if whole:
        raise MismatchError(f"{what}: ask one question at a time (batch_size=1)")
    _TRIED[model.hf].add(kind)  # of which it is told once
    warnings.warn(f"{what}, unless a router's choices flip in half precision: compare with batch_size=1", stacklevel=3)


def _difference(found: Tensor, expected: Tensor) -> float:
    """By how many nats the log-probabilities of the twenty likeliest words differ."""
    one, other = (logits.detach().float().cpu().log_softmax(-1) for logits in (found, expected))
    top = other.topk(min(20, len(other))).indices
    off = (one[top] - other[top]).abs().max()
    return float(off) if torch.isfinite(off) else 0.0
