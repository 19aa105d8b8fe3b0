"""Where vLLM keeps a decoder's MLPs: in every model that it holds under the same names."""

import re
from typing import Any

from torch import nn


def decoder_mlps(model: nn.Module) -> dict[int, list[str]]:
    """By layer the paths of the MLPs of a model's text decoder, as vLLM has them: gate and up in one projection.

    Args:
        model: the model that vLLM made.
    """
    with_language_model: Any = model
    decoder = with_language_model.get_language_model() if hasattr(model, "get_language_model") else model
    in_decoder = {id(module) for module in decoder.modules()}
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", path)
        merged = all(hasattr(module, name) for name in ("gate_up_proj", "act_fn", "down_proj"))
        if layer and merged and id(module) in in_decoder:
            paths.setdefault(int(layer[1]), []).append(path)
    return paths
