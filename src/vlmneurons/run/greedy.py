"""Greedy generation, whatever a checkpoint's own generation settings are.

``generate`` fills every setting that a call leaves open from ``model.generation_config``: a repetition penalty,
suppressed or forbidden tokens, beams, a smaller cache. An answer so made is not the model's likeliest next token, and
nothing would say so. No call can set them all back (what is given as None counts as left open), so the configuration
itself is exchanged while the model answers.
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
    """The likeliest token at each step, until one that ends a text or so many tokens; nothing else.

    Args:
        hf_model: the transformers model, or a part of it that generates.
        max_new_tokens: how many tokens are generated at most.
    """
    own = getattr(hf_model, "generation_config", None)
    config = getattr(hf_model, "config", None)
    kept = {name: getattr(own, name, None) for name in _KEPT}
    if getattr(config, "is_encoder_decoder", False):
        # BART and Florence-2 were trained on decoders that begin with two tokens; the second is set so.
        kept["forced_bos_token_id"] = getattr(own, "forced_bos_token_id", None)
    settings: JSON = {name: value for name, value in kept.items() if value is not None}
    return GenerationConfig(do_sample=False, num_beams=1, use_cache=True, max_new_tokens=max_new_tokens, **settings)


def settings_of(config: GenerationConfig) -> JSON:
    """What a configuration sets, by name, for a record of a run."""
    told = {name: value for name, value in config.to_dict().items() if value is not None}
    return {name: told[name] for name in sorted(told) if name[0] != "_" and name != "transformers_version"}


@contextmanager
def greedily(hf_model: nn.Module, max_new_tokens: int) -> Iterator[GenerationConfig]:
    """While inside, the model and every part of it that generates have `greedy_config` for their own.

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
