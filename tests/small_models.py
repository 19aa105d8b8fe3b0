"""Small models of every class that is run, by name: the library's own, and those that only its tests need.

`SMALL` maps a name to a function that builds it. Names say where a model comes from: ``qwen2_5_vl`` is one of
`vlmneurons.testing.tiny_model`; ``text/llama`` a model of text alone; ``small/aria`` is built by `small_configs`, its
widths all different (hidden, intermediate, expert, shared expert, heads), so that none can be mistaken for another; and
``every/gemma4`` has the towers besides that its default configuration leaves away.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from vlmneurons.testing import tiny_inputs, tiny_model, tiny_names, tiny_template
from vlmneurons.testing.tiny import tiny_tokenizer
from vlmneurons.testing.tiny.parts import draw_weights


class Small(NamedTuple):
    """A small model, and how it is asked.

    Attributes:
        type: transformers' type of the model.
        model: in evaluation mode and float32, wrapped by nothing.
        inputs: one question with all that its towers see or hear.
        processor: of its family's class; None where `tokenizer` takes its place and inputs are made by hand.
        template: see `vlmneurons.VLM`.
        sees: whether its processor takes pictures.
        rows: whether rows of words can share a batch.
        padded_alone: whether what the vision tower sees of one picture is padded, even alone.
        made_up: why its processor is not of its own class; empty where it is, or where there is none.
        unasked: why it is asked no questions; empty where it is.
    """

    type: str
    model: nn.Module
    inputs: dict[str, Any]
    processor: Any = None
    template: Any = None
    sees: bool = False
    rows: bool = True
    padded_alone: bool = False
    made_up: str = ""
    unasked: str = ""

    @property
    def tokenizer(self) -> Any:
        """What a `vlmneurons.VLM` is made with where there is no processor."""
        return tiny_tokenizer(["<pad>", "<s>", "</s>"], pad_token="<pad>", eos_token="</s>", padding_side="left")


def _tiny(name: str) -> Small:
    model, processor = tiny_model(name)
    return Small(
        model.config.model_type,
        model,
        tiny_inputs(name),
        processor,
        tiny_template(name) if name != "paligemma" else None,
        sees=True,
        padded_alone=name == "mllama",
    )


def _text(name: str) -> Small:
    from test_text_models import MODELS

    settings, widths = MODELS[name]
    settings = {**settings, "vocab_size": 640}  # as many as the tokenizer's
    if "max_position_embeddings" in settings:
        settings["max_position_embeddings"] = 512  # for questions of some length
    auto = transformers.AutoModelForSeq2SeqLM if "encoder" in widths else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(transformers.AutoConfig.for_model(name, **settings)).float().eval()
    draw_weights(model)
    ids = torch.arange(3, 16)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "encoder" in widths:
        model.generation_config.decoder_start_token_id = 2
        inputs["decoder_input_ids"] = torch.tensor([[2, 20, 21]])
    return Small(name, model, inputs, template="plain")


UNASKED = {
    "diffusion_gemma": "gives its answer's words all at once, in the place of noise",
    "pi0": "gives movements, and no words",
    "pix2struct": "its question is drawn into the picture: no tokens of it are seen",
    "pp_formulanet": "takes a picture alone, and no question",
    "vision-encoder-decoder": "takes a picture alone, and no question",
}
"""The classes that are asked no questions, and why."""
MADE_UP = {
    "evolla": "its processor takes proteins, and no pictures",
    "idefics": "its processor writes words of its own into the question's",
    "fuyu": "its processor counts the tokens of another tokenizer",
    "instructblipvideo": "its processor takes videos as pictures",
    "udop": "its processor needs pytesseract",
}
"""The classes whose processor is made up, and why."""
TEXT = ("gemma4_unified", "mistral4")
"""The classes whose default configurations see nothing."""
BLIND = (*TEXT, "evolla")


def _mapped(name: str, every_tower: bool = False) -> Small:
    from small_configs import small_inputs, small_model
    from small_processors import MadeUp, small_processor

    model = small_model(name, every_tower=every_tower)
    inputs = small_inputs(name, model)
    if name in UNASKED:
        # A model that does not generate is no model of text; PI0 gives actions.
        processor = tiny_model("paligemma")[1] if name == "pi0" else None
        return Small(name, model, inputs, processor, "plain", rows=False, unasked=UNASKED[name])
    sees = name not in BLIND
    processor = MadeUp(inputs, sees=sees) if name in MADE_UP else None if name in TEXT else small_processor(name, model)
    how = {"template": "plain"} if name in TEXT else {}
    return Small(name, model, inputs, processor, **how, sees=sees, made_up=MADE_UP.get(name, ""))


def _texts() -> list[str]:
    from test_text_models import MODELS

    return list(MODELS)


def _further() -> list[str]:
    """The types of the mapping that no other small model has."""
    from vlmneurons.testing.architectures import mapped_types

    same = {"llava_next", "pp_chart2table", "shieldgemma2"}  # the classes of llava_next_mistral, got_ocr2 and gemma3
    return [name for name in mapped_types() if name not in {*tiny_names(processor=False), *same}]


SMALL: dict[str, Callable[[], Small]] = {
    **{name: partial(_tiny, name) for name in tiny_names(processor=False)},
    **{f"text/{name}": partial(_text, name) for name in _texts()},
    **{f"small/{name}": partial(_mapped, name) for name in _further()},
    **{f"every/{name}": partial(_mapped, name, every_tower=True) for name in ("gemma4", "nemotron_h_omni")},
}
