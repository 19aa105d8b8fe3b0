"""Greedy generation, whatever a checkpoint's own generation settings are.

``generate`` takes every setting that a call leaves open from ``model.generation_config``: a repetition penalty,
suppressed or forbidden tokens, beams, a smaller cache. Tokens chosen that way are not the model's likeliest ones, and
nothing would say so. No call can undo all settings (None counts as left open), so the configuration itself is exchanged
while the model answers.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from transformers import GenerationConfig

from vlmneurons.checks import JSON

_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""Where a text begins and ends belongs to the model's vocabulary, not to a way of generating."""

_EXCHANGED: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()
_REGISTERING = threading.Lock()


def greedy_config(hf_model: nn.Module, max_new_tokens: int) -> GenerationConfig:
    """Settings that take the likeliest token at each step, until one ends the text or there are enough; nothing else.

    Args:
        hf_model: the transformers model, or a part of it that generates.
        max_new_tokens: how many tokens are generated at most.
    """
    config = getattr(hf_model, "generation_config", None)
    kept = _KEPT
    if getattr(getattr(hf_model, "config", None), "is_encoder_decoder", False):
        # BART and Florence-2 were trained on decoders that begin with two tokens; this sets the second.
        kept = (*kept, "forced_bos_token_id")
    settings = {name: getattr(config, name) for name in kept if getattr(config, name, None) is not None}
    return GenerationConfig(do_sample=False, num_beams=1, use_cache=True, max_new_tokens=max_new_tokens, **settings)


def settings_of(config: GenerationConfig) -> JSON:
    """What a configuration sets, by name, for the record of a run."""
    return {
        name: value
        for name, value in sorted(config.to_dict().items())
        if value is not None and name[0] != "_" and name != "transformers_version"
    }


@contextmanager
def greedily(hf_model: nn.Module, max_new_tokens: int) -> Iterator[GenerationConfig]:
    """Within, `greedy_config` is the configuration of the model and of every part of it that generates.

    Some models answer through a part's own ``generate`` (InstructBLIP, Kosmos-2), which looks at that part's settings.

    Args:
        hf_model: the transformers model.
        max_new_tokens: how many tokens are generated at most.
    """
    with _REGISTERING:
        lock = _EXCHANGED.setdefault(hf_model, threading.RLock())
    with lock, ExitStack() as undo:  # a second thread would otherwise put back what the first one set
        for part in hf_model.modules():
            before = part.__dict__.get("generation_config")
            if isinstance(before, GenerationConfig):
                undo.callback(setattr, part, "generation_config", before)
                vars(part)["generation_config"] = greedy_config(part, max_new_tokens)
        yield greedy_config(hf_model, max_new_tokens)
