"""Which of transformers' classes loads a model, and how nnsight is told to wrap it."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase

from vlmneurons.checks import Keywords
from vlmneurons.errors import ArchitectureError

HUB_ARGUMENTS = ("token", "cache_dir", "local_files_only", "force_download", "subfolder", "proxies", "code_revision")
"""Arguments of ``from_pretrained`` that say where files come from: model and processor have them alike."""

_CLASSES = ("AutoModelForMultimodalLM", "AutoModelForSeq2SeqLM", "AutoModelForCausalLM")
"""After image-text-to-text. BART and T5 have a causal class besides, which is their decoder alone."""


def of_first_class(first: Any, load: Callable[[Any], nn.Module]) -> nn.Module:
    """A model of the first of transformers' automatic classes that knows its configuration.

    Args:
        first: the class to try before all others.
        load: loads the model with a class.

    Raises:
        ArchitectureError: none of them knows it.
    """
    others, unknown = [getattr(transformers, name) for name in _CLASSES if hasattr(transformers, name)], ""
    for auto in (first, *others):
        try:
            return load(auto)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            unknown = str(error).split("\n")[0][:160]  # the lines after it name every class there is
    tried = ", ".join(auto.__name__ for auto in (first, *others))
    raise ArchitectureError(
        f"{unknown} None of {tried} knows it: load it yourself, and wrap it with VLM(model, processor)"
    )


def pipeline_of(processor: object) -> Keywords:
    """How nnsight is told what prepares the model's inputs: a tokenizer by itself is a text model's.

    Args:
        processor: a processor, or a tokenizer.
    """
    if isinstance(processor, PreTrainedTokenizerBase):
        return {"tokenizer": processor, "task": "text-generation"}
    return {"processor": processor, "task": "image-text-to-text"}


@contextmanager
def without_class_names() -> Iterator[None]:
    """Within, transformers does not list the classes that a pipeline was made for: nothing here runs the pipeline."""

    def short(record: logging.LogRecord) -> bool:
        return "Supported models are" not in record.getMessage()

    logger = logging.getLogger("transformers.pipelines.base")
    logger.addFilter(short)
    try:
        yield
    finally:
        logger.removeFilter(short)


def refuse_copies(hf_model: nn.Module) -> None:
    """Refuse a model that is run as copies of itself, which hooks and edits would not reach.

    Raises:
        ArchitectureError: it is one of torch's wrappers for several devices.
    """
    if isinstance(hf_model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ArchitectureError(
            f"VLM wraps the model itself; {type(hf_model).__name__} runs copies of it, where neurons would be neither "
            "counted nor switched off. Give VLM(model.module, …); for several GPUs load with device_map='auto', or "
            "share the questions among processes"
        )
