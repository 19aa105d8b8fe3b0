"""Small random models of real classes, with real processors.

`tiny_model` gives a model in evaluation mode, in float32, the same one on every call and every machine. The weights
are drawn wide enough that every neuron matters to the logits, and so that nothing is zero that a trained model does
not have at zero: a default model's pad embedding is, and hides a missing attention mask.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from vlmneurons.checks import Keywords
from vlmneurons.testing.tiny import paper as _paper
from vlmneurons.testing.tiny.configs import _EYE, _TEXT, CONFIGS  # noqa: F401
from vlmneurons.testing.tiny.paper import LLAVA_MISTRAL_TEMPLATE, _llava_next  # noqa: F401
from vlmneurons.testing.tiny.parts import draw_weights as _draw_weights
from vlmneurons.testing.tiny.parts import finish as _finish
from vlmneurons.testing.tiny.parts import text_config as _text_config  # noqa: F401
from vlmneurons.testing.tiny.parts import tiny_image, tiny_tokenizer
from vlmneurons.testing.tiny.processors import PROCESSORS, TEMPLATES

__all__ = ["tiny_image", "tiny_inputs", "tiny_model", "tiny_names", "tiny_template", "tiny_tokenizer"]

_PAPER: dict[str, Callable[[], tuple[PreTrainedModel, ProcessorMixin]]] = {
    "llava_next_mistral": _paper.llava_next_mistral,
    "llava_next_qwen2": _paper.llava_next_qwen2,
    "qwen2_5_vl": _paper.qwen2_5_vl,
}


def tiny_names(*, processor: bool = True) -> tuple[str, ...]:
    """The names that `tiny_model` knows.

    Args:
        processor: only the three models of the paper, which are saved and loaded like released ones, processor and
            all; or, if False, every small model.
    """
    return tuple(_PAPER) if processor else (*_PAPER, *CONFIGS)


def tiny_model(name: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A small random model and its processor, new on every call and equal each time.

    Args:
        name: one of ``tiny_names(processor=False)``. The three models of the paper are ``"llava_next_mistral"``,
            ``"llava_next_qwen2"`` (as Pangea) and ``"qwen2_5_vl"``; the others are called as transformers calls them.

    Returns:
        The model, in evaluation mode and float32, and a processor of the class that the released models have, with a
        chat template of the same form; where theirs has none, this one has none either (see `tiny_template`).

    Raises:
        ValueError: no such name.
    """
    if name not in tiny_names(processor=False):
        raise ValueError(f"there is no tiny model {name!r}; there are {', '.join(tiny_names(processor=False))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = _PAPER[name]() if name in _PAPER else _from_config(name)
    _draw_weights(model.float().eval())
    return model, processor


def tiny_template(name: str) -> Callable[[str, int], str] | None:
    """A prompt for a model whose processor has no chat template, as `vlmneurons.VLM` takes it; None where one has.

    Args:
        name: one of `tiny_names`.

    Raises:
        ValueError: no such name.
    """
    if name not in tiny_names(processor=False):
        raise ValueError(f"there is no tiny model {name!r}; there are {', '.join(tiny_names(processor=False))}")
    return TEMPLATES.get(name)


def tiny_inputs(name: str) -> dict[str, torch.Tensor]:
    """Inputs of one question with one image, as keyword arguments of the model that `tiny_model` gives.

    Args:
        name: one of `tiny_names`.

    Raises:
        ValueError: no such name.
    """
    _, processor = tiny_model(name)
    question, template = "Which dish is this?\nA. Tea\nB. Rice", tiny_template(name)
    turn: Keywords = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    if template is None:
        text = processor.apply_chat_template([turn], add_generation_prompt=True)
    else:
        text = template(question, 1)
    with warnings.catch_warnings():  # GLM-4V's processor makes arrays of tensors in a way that NumPy will not support
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        inputs = dict(processor(text=[text], images=[tiny_image()], return_tensors="pt"))
    if name == "florence2":
        inputs["decoder_input_ids"] = torch.tensor([[2, 20, 21]])
    inputs.pop("labels", None)  # PaliGemma's: with them it computes a loss
    return {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}


def _from_config(name: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    processor = PROCESSORS[name]()
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **copy.deepcopy(CONFIGS[name])))
    if name == "llama4":
        model.language_model.register_forward_hook(_with_image_outputs)
    return _finish(model, processor.tokenizer), processor


def _with_image_outputs(_: nn.Module, args: object, output: Any) -> None:
    """Gives Llama 4's text output what its caller reads there: without it transformers 5.24.0 runs no Llama 4 at all.

    `Llama4ForConditionalGeneration.forward` reads ``image_outputs`` of what its text model gives, which never has it.
    """
    if not hasattr(output, "image_outputs"):
        output.image_outputs = None
