"""Whether a model answers a question that shares a batch as it does alone: tried out once, on its first batch.

Some models' own code lets rows of a batch reach each other: one counts the positions of a question's picture on from
those of the questions before it, another lets pictures attend to each other's patches, or padding to words. Their
numbers would depend on what shares the batch. Types of models that were seen to keep rows apart are not tried again.

This guards what the library asks (`vlmneurons.record`, `knockout` and all others with a ``batch_size``). A `Recorder`
sees the user's own runs, whose inputs it cannot take apart and run anew: there the user has to compare.
"""

import warnings
import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from vlmneurons.errors import MismatchError
from vlmneurons.model.encoder import Batch
from vlmneurons.model.vlm import VLM
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.run.greedy import greedily
from vlmneurons.run.memory import is_out_of_memory, release
from vlmneurons.run.readers import logits_at

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
_N_TRIED: "weakref.WeakKeyDictionary[nn.Module, dict[Hashable, int]]" = weakref.WeakKeyDictionary()
"""How often each model was tried in vain with each kind of batch; `_MOST_TRIALS` where it need not be tried again."""
_MOST_TRIALS = 3
_MOST_ROWS = 6
_ROUNDING, _COARSE = 1e-2, 1.0
"""By how many nats the likeliest words may differ: in float32; in half precision, where a router's choice may flip."""


@torch.no_grad()
def check_alone(model: VLM, batch: QuestionSet, padding_side: str) -> None:
    """Refuse batches of a model that answers a question differently beside others than alone.

    The first questions of the batch, its last, and the one with the most padding are asked alone as well, without
    anything switched off. In half precision answers may differ a little by rounding alone, so only a large difference
    counts, and it is warned of. Where a batch does not fit into memory, half of it is tried. A batch that cannot be run
    at all is left to the run itself, which says why, and the next one is tried in its place; after three of them a
    warning says that the model could not be tried.

    Args:
        model: the model.
        batch: questions that are about to share a forward.
        padding_side: the side on which they will be padded: ``"left"`` to generate.

    Raises:
        MismatchError: the log-probabilities of the likeliest words differ.
    """
    kind = (tuple(map(bool, batch[0].n_media)), padding_side)
    n_tried = _N_TRIED.setdefault(model.hf, {})
    keeps_apart = getattr(model.hf.config, "model_type", "") in _KEEP_APART
    if len(batch) < 2 or keeps_apart or n_tried.get(kind, 0) >= _MOST_TRIALS:
        return
    distance, row, failure, halve = 0.0, 0, "", False
    try:
        distance, row = _farthest(model, batch, padding_side)
    except Exception as error:  # of whatever kind: it comes again in the run itself
        failure, halve = f"{type(error).__name__}: {error}", is_out_of_memory(error) and len(batch) > 2
    if halve:  # the error is gone by now, and what its traceback held
        release()
        return check_alone(model, batch[: len(batch) // 2], padding_side)
    name = type(model.hf).__name__
    if failure:
        n_tried[kind] = n_tried.get(kind, 0) + 1
        if n_tried[kind] == _MOST_TRIALS:
            question = f"whether {name} answers a question in a batch as it does alone"
            warnings.warn(f"{question} could not be tried ({failure}): compare with batch_size=1", stacklevel=3)
        return
    dtypes = {weight.dtype for weight in model.hf.parameters() if weight.is_floating_point()}
    exact = dtypes <= {torch.float32, torch.float64}
    if distance > (_ROUNDING if exact else _COARSE):
        message = (
            f"{name} answers question {batch[row].id!r} otherwise in a batch than alone: the likeliest words' "
            f"log-probabilities differ by up to {distance:.2g}. Its own code does not keep the rows of a batch apart, "
            "or from their padding"
        )
        if exact:
            raise MismatchError(f"{message}: ask one question at a time (batch_size=1)")
        but = ", unless a router's choices flip in half precision: compare with batch_size=1"
        warnings.warn(message + but, stacklevel=3)
    n_tried[kind] = _MOST_TRIALS


def _farthest(model: VLM, batch: QuestionSet, side: str) -> tuple[float, int]:
    """By how many nats likely words differ at most between the batch and its rows alone, and in which row."""
    together = model.encoder(batch, padding_side=side)
    rows = {*range(min(_MOST_ROWS, len(batch))), len(batch) - 1, int(together.tokens.attention.sum(1).argmin())}
    beside_others = _next_words(model, together, side)
    alone = {row: _next_words(model, model.encoder(batch[row : row + 1], padding_side=side), side)[0] for row in rows}
    return max((_difference(beside_others[row], alone[row]), row) for row in rows)


def _next_words(model: VLM, batch: Batch, side: str) -> list[Tensor]:
    """The logits ``[word]`` of what follows each row, computed in the way in which its answer will be read."""
    if side == "right" and not model.is_encoder_decoder:
        return [logits[0] for logits in logits_at(model, batch, [[place] for place in batch.tokens.last.tolist()])]
    with greedily(model.hf, 1) as config:  # generation counts positions from where each row begins
        generated: Any = model.hf.generate(
            **batch, generation_config=config, return_dict_in_generate=True, output_logits=True
        )
    return list(generated.logits[0].float().cpu())


def _difference(logits: Tensor, expected: Tensor) -> float:
    """By how many nats the log-probabilities of the twenty likeliest words differ; infinitely, if only one is a number.

    Words that are forbidden in both, and what is not a number in both, do not differ.
    """
    top = expected.topk(min(20, len(expected))).indices
    nats, expected_nats = logits.log_softmax(-1)[top], expected.log_softmax(-1)[top]
    same = (nats == expected_nats) | (nats.isnan() & expected_nats.isnan())
    return float((nats - expected_nats).abs().nan_to_num(torch.inf, torch.inf).masked_fill(same, 0.0).max())
