"""What the towers of a model are called: by where their blocks are, and by the names on the way there.

Here, and only here, names decide: they say what a tower is for, never what a module does.
"""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from vlmneurons.errors import ArchitectureError
from vlmneurons.model.architectures.search import Block, Search

_VISION = re.compile(r"vision|visual|image|img|(^|_)vit($|_)|siglip|clip|davit|pixel", re.IGNORECASE)
_VISION_CLASS = re.compile(r"Vision|Visual|Image|ViT|Siglip|Clip|CLIP|Swin|Pixel|Timm")
_AUDIO = re.compile(r"audio|speech|sound|whisper", re.IGNORECASE)
_PLAIN = {
    *("layers", "layer", "blocks", "block", "h", "decoder", "encoder", "model", "transformer", "base_model", "module")
}
"""Names that tell nothing of what a part of a model is for."""


def common_path(paths: Sequence[str]) -> str:
    """The path of what holds all these."""
    if len(paths) == 1:
        return paths[0]
    split = [path.split(".") for path in paths]
    same = 0
    while all(len(parts) > same and parts[same] == split[0][same] for parts in split):
        same += 1
    return ".".join(split[0][:same])


def named_towers(search: Search) -> dict[str, tuple[str, list[Block]]]:
    """The towers of a model, by name: for each the path of its blocks, and these.

    Args:
        search: what looks through the model.

    Raises:
        ArchitectureError: several lists of blocks could each be the language model.
    """
    model, stacks = search.model, search.stacks()
    decoder = _asked(model, "get_decoder")
    # A model that embeds no tokens has no language model: all that it has sees, or hears.
    only = None if _reads_text(model, decoder) else "vision" if "pixel" in str(model.main_input_name) else "audio"
    decoder_path = None if only else next((path for path, module in model.named_modules() if module is decoder), None)
    senses = {path: only or _sense(model, path, decoder_path) for path in stacks}
    language = _language([path for path, sense in senses.items() if sense is None], decoder_path, search)
    groups: dict[tuple[str, str], list[str]] = {}  # by the kind of tower, and the part of the model that holds it
    for path in stacks:
        kind = "language" if path == language else senses[path] or _role(path, language)
        groups.setdefault((kind, _component(path)), []).append(path)
    if language is not None and any(senses.values()):
        # What lies in no list and gives vectors of the decoder's size hands on what another tower sees or hears.
        for block in search.outside(stacks):
            inside = decoder_path and block.path.startswith(f"{decoder_path}.")
            if search.gives(block) == search.gives(*stacks[language]) and not inside:
                kind = "audio_projector" if _sense(model, block.path, decoder_path) == "audio" else "projector"
                groups.setdefault((kind, kind), []).append(block.path)
                stacks[block.path] = [block]
    towers: dict[str, tuple[str, list[Block]]] = {}
    order = {"language": 0, "vision": 1, "encoder": 2, "audio": 3, "projector": 5, "audio_projector": 5}
    for kind, component in sorted(
        groups, key=lambda key: (order.get(key[0], 4), not _VISION.search(key[1]), len(key[1]))
    ):
        paths = groups[kind, component]
        name = kind if kind not in towers else component
        if name in towers:
            name = paths[0].replace(".", "_")
        towers[name] = (common_path(paths), [block for path in paths for block in stacks[path]])
    return towers


def _sense(model: nn.Module, path: str, decoder: str | None) -> str | None:
    """``"vision"`` or ``"audio"``, by the names on the way down to a module, and those of the classes."""
    module, names = model, path.split(".")
    for depth, name in enumerate(names):
        prefix, module = ".".join(names[: depth + 1]), module.get_submodule(name)
        if decoder is not None and f"{decoder}.".startswith(f"{prefix}."):
            continue  # the language model is in here as well
        for sense, in_name, in_class in (("audio", _AUDIO, _AUDIO), ("vision", _VISION, _VISION_CLASS)):
            if in_name.search(name) or (depth < len(names) - 1 and in_class.search(type(module).__name__)):
                return sense
    return None


def _reads_text(model: nn.Module, decoder: Any) -> bool:
    """Whether a model takes tokens: whatever it says its first input is, it embeds some."""
    embeddings = [_asked(module, "get_input_embeddings") for module in (model, decoder)]
    tables = (child for module in embeddings if isinstance(module, nn.Module) for child in module.modules())
    return getattr(model, "main_input_name", "input_ids") == "input_ids" or any(
        isinstance(child, nn.Embedding) for child in tables
    )


def _asked(model: nn.Module | None, method: str) -> Any:
    try:
        return getattr(model, method)()
    except Exception:  # not every model knows
        return None


def _language(texts: list[str], decoder: str | None, search: Search) -> str | None:
    """The list of blocks of the text decoder, among those that neither see nor hear."""
    embedding = _asked(search.model, "get_input_embeddings")
    table = next((path for path, module in search.model.named_modules() if module is embedding), "")
    home, chosen = table.rpartition(".")[0], texts
    for narrow in (
        lambda path: decoder is not None and (not decoder or path.startswith(f"{decoder}.")),
        lambda path: "decoder" in path.split("."),
        lambda path: path.rpartition(".")[2] in _PLAIN,
        # Where tokens are embedded, unless that is an encoder, as the byte encoder of BLT: what it is for must be said.
        lambda path: bool(home) and path.startswith(f"{home}.") and "encoder" not in home,
        lambda path: path.rpartition(".")[0] == home and "encoder" not in home,
    ):
        kept = [path for path in chosen if narrow(path)]
        chosen = kept or chosen
        if len(chosen) == 1:
            return chosen[0]
    if chosen:
        raise ArchitectureError(
            f"{type(search.model).__name__}: {', '.join(chosen)} could each be the language model; say which is, with "
            "register_architecture(..., Architecture(towers={'language': '<path>', ...}))"
        )
    return None


def _role(path: str, language: str | None) -> str:
    """Name of a tower that is neither the language model nor a sense: ``"encoder"`` beside a decoder, or its own."""
    if language is not None:
        beside = path.removeprefix(f"{common_path([language, path])}.")
        if beside.split(".")[0] == "encoder" and "decoder" in language.split("."):
            return "encoder"
        if language.rpartition(".")[0] == path.rpartition(".")[0]:
            return path.rpartition(".")[2]
    return _component(path)


def _component(path: str) -> str:
    """The part of the model that a list belongs to, by its name: ``vision_tower`` in ``model.vision_tower.layers``."""
    names = path.split(".")
    return next((name for name in names if name not in _PLAIN and not name.isdigit()), names[-1])
