"""What a model and its processor take, and what they must be told: read off their code and their settings.

A processor may drop what it does not know, and a model may not look at it: a question would be asked blind or deaf
without a sign. So what they take is looked up before a question is encoded.
"""

import inspect
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from vlmneurons.model.vision_rows import OF_PICTURES

if TYPE_CHECKING:
    from vlmneurons.model.vlm import VLM


class _Kind(NamedTuple):
    """One kind of what a question shows besides its text.

    Attributes:
        noun: its plural.
        have: what questions of it do, for an error.
        none: what a processor or model takes that does not take it, for an error.
        argument: by which a processor is called with it.
        of_processor: matches the names of a processor's parts that make inputs of it.
        of_forward: matches the names of a model's inputs that it becomes.
    """

    noun: str
    have: str
    none: str
    argument: str
    of_processor: re.Pattern[str]
    of_forward: re.Pattern[str]


_SOUND = re.compile("audio|feature|speech|sound")
_KINDS = (
    _Kind("pictures", "show pictures", "none", "images", OF_PICTURES, OF_PICTURES),
    _Kind("sounds", "have audio", "no sounds", "audio", _SOUND, _SOUND),
    # Some models take frames as pictures.
    _Kind("videos", "have video", "no videos", "videos", re.compile("video"), re.compile("video|pixel|image")),
)
"""In the order of `Question.n_media`."""


def refusals(model: "VLM") -> tuple[str, ...]:
    """Why questions with pictures, with sounds and with videos cannot be asked of a model; empty where they can.

    Args:
        model: the model, with its processor.
    """
    return tuple(_refusal(model, kind) for kind in _KINDS)


def _refusal(model: "VLM", kind: _Kind) -> str:
    processor, hf = model.processor, model.hf
    without = f"; to ask without {kind.noun}: vlmneurons.study.controls.blind(questions)"
    if not _processor_takes(processor, kind):
        return (
            f"the questions {kind.have}, and {type(processor).__name__}, the VLM's processor, takes {kind.none}: "
            f"VLM(model, AutoProcessor.from_pretrained(name)) gives it one that does{without}"
        )
    called_with = inspect.signature(processor.__call__).parameters
    if kind.noun == "sounds" and isinstance(processor, ProcessorMixin) and not any(map(_SOUND.search, called_with)):
        return (
            f"the questions have audio, and {type(processor).__name__} takes sounds in its own apply_chat_template "
            "alone, where no tokens of a question can be told: give the VLM a processor that is called with text= "
            "and audio="
        )
    arguments = inspect.signature(hf.forward).parameters
    if "input_ids" not in arguments or any(map(kind.of_forward.search, arguments)):
        return ""
    nowhere = "its forward has no argument for them"
    if kind.noun == "pictures":
        if "vision" in model.towers or getattr(hf.config, "vision_config", None) is not None:
            return ""
        nowhere += " and its configuration no vision tower"
    return f"the questions {kind.have}, and {type(hf).__name__} takes {kind.none}: {nowhere}{without}"


def _processor_takes(processor: object, kind: _Kind) -> bool:
    """Whether a processor makes something of a kind: transformers' have a part for it, others an argument."""
    if isinstance(processor, PreTrainedTokenizerBase):
        return False
    if isinstance(processor, ProcessorMixin):
        return any(callable(part) and kind.of_processor.search(name) for name, part in vars(processor).items())
    arguments = inspect.signature(type(processor).__call__).parameters
    return kind.argument in arguments or any(taken.kind is taken.VAR_KEYWORD for taken in arguments.values())


def sampling_rate(processor: object) -> int:
    """The rate at which a processor expects sounds, in values a second.

    Args:
        processor: the processor.
    """
    parts = (getattr(processor, name, None) for name in ("feature_extractor", "audio_processor"))
    rates = (getattr(part, "sampling_rate", None) or getattr(part, "sample_rate", None) for part in parts)
    return int(next((rate for rate in rates if rate), 16_000))


def default_of(processor: object, group: str, name: str) -> Any:
    """A setting that a processor uses where a call does not give it; None if it has none of its own.

    Processors keep it in an attribute, alone or among others of its group; until transformers 5.22 they kept all in a
    table of the class that declares what they take.

    Args:
        processor: the processor.
        group: the settings that it belongs to, such as ``"text_kwargs"``.
        name: its name.
    """
    table = getattr(getattr(processor, "valid_processor_kwargs", None), "_defaults", None) or {}
    for settings in (getattr(processor, group, None), table.get(group)):
        if isinstance(settings, Mapping) and name in settings:
            return settings[name]
    return getattr(processor, name, None)


def wants_token_types(model: "VLM") -> bool:
    """Whether a model wants to know which tokens are pictures', and its processor says so only when asked.

    Args:
        model: the model, with its processor.
    """
    silent = default_of(model.processor, "text_kwargs", "return_mm_token_type_ids") is False
    arguments = inspect.signature(model.hf.forward).parameters
    return silent and "mm_token_type_ids" in arguments and isinstance(model.processor, ProcessorMixin)


def counts_positions(model: "VLM") -> bool:
    """Whether a decoder looks positions up in a table, or weighs attention by them, and not by distances alone.

    Such a decoder counts them from the first column, padding or not, unless it is told.

    Args:
        model: the model.
    """
    hf = model.hf
    if model.is_encoder_decoder or "position_ids" not in inspect.signature(type(hf).forward).parameters:
        return False
    words, decoder = hf.get_input_embeddings(), hf.get_decoder() if hasattr(hf, "get_decoder") else hf
    config = hf.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or math.inf
    tables = (part for part in decoder.modules() if isinstance(part, nn.Embedding) and part is not words)
    if any(table.num_embeddings >= longest for table in tables):
        return True
    # Llama 4, Ministral 3 and Mistral 4 weigh by a setting, Mistral Large 4 by numbers that are learned.
    scaled = "llama_4_scaling_beta" in (getattr(config, "rope_parameters", None) or ())
    tuned = getattr(config, "attn_temperature_tuning", False)
    return scaled or bool(tuned) or any(map(_weighs_by_position, decoder.modules()))


_OF_ATTENTION = ("attention_mask", "position_embeddings", "inputs_embeds")


def _weighs_by_position(module: nn.Module) -> bool:
    """Whether a module has numbers of its own for positions, and is neither an attention nor a rotary embedding."""
    arguments = inspect.signature(module.forward).parameters
    has_numbers = any(True for _ in module.parameters(recurse=False))
    return has_numbers and "position_ids" in arguments and arguments.keys().isdisjoint(_OF_ATTENTION)
