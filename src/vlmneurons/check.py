"""``python -m vlmneurons.check NAME``: which neurons a model has, and whether the library can read and ablate them.

NAME is a model on the Hub or in a folder, or a type of model as transformers calls it (``qwen2_5_vl``). Without
``--run`` only the configuration is read: the model is built at full size without weights, in seconds. With ``--run``
the weights are loaded, and `vlmneurons.testing.check_architecture` is run on a question with an image.
"""

import argparse
import difflib
import os
import re
import sys
import time
from collections.abc import Sequence

import torch
from torch import nn

from vlmneurons.errors import VLMNeuronsError
from vlmneurons.testing.architectures import check_architecture, describe_architecture, mapped_model, mapped_types


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report. The exit status is 0 if all is well, 1 if the contract is broken, 2 if nothing was checked."""
    parser = argparse.ArgumentParser(prog="python -m vlmneurons.check", description=__doc__.partition("\n\n")[0])
    parser.add_argument("name", help="a model on the Hub, a folder, or a model type such as qwen2_5_vl")
    parser.add_argument("--run", action="store_true", help="load the weights and check the whole contract")
    parser.add_argument("--revision", default=None, help="revision of the model on the Hub")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights with --run (default: as they are stored)")
    parser.add_argument("--device-map", default=None, help="where the weights go with --run, such as auto")
    given = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        if given.run:
            model, processor = _load(given.name, given.revision, given.dtype, given.device_map)
        else:
            model, processor = _meta(given.name, given.revision), None
    except Exception as error:  # anything from a missing file to a missing package: there is nothing to check
        like = difflib.get_close_matches(re.sub(r"\W", "_", given.name).lower(), mapped_types(), n=1, cutoff=0.8)
        hint = f"Is the model type {like[0]} meant? " if like and not os.path.isdir(given.name) else ""
        sys.stderr.write(f"{given.name} cannot be loaded. {hint}{type(error).__name__}: {error}\n")
        return 2
    built = time.perf_counter()
    try:
        report = check_architecture(model, processor) if given.run else describe_architecture(model)
    except VLMNeuronsError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    took = f"model built in {built - start:.1f} s, looked through in {time.perf_counter() - built:.1f} s"
    verdict = "The contract holds" if given.run else "Found without weights; --run checks the values"
    sys.stdout.write(f"{report}\n{verdict} ({took}).\n")
    return 0


def _meta(name: str, revision: str | None) -> nn.Module:
    """The model without weights."""
    if name in mapped_types() and not os.path.isdir(name):
        return mapped_model(name)
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(name, revision=revision)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def _load(name: str, revision: str | None, dtype: str, device_map: str | None) -> tuple[nn.Module, object]:
    """The model with its weights, and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if name in mapped_types() and not os.path.isdir(name):
        raise ValueError("a model type has no weights; give a model on the Hub or a folder, or leave out --run")
    model = AutoModelForImageTextToText.from_pretrained(name, revision=revision, dtype=dtype, device_map=device_map)
    return model.eval(), AutoProcessor.from_pretrained(name, revision=revision)


if __name__ == "__main__":
    raise SystemExit(main())
