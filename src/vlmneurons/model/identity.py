"""What identifies a model: its weights, all of them, its configuration and its processor's settings."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor, nn

from vlmneurons.checks import JSON
from vlmneurons.files.digests import digest_of, digest_of_code
from vlmneurons.model.down import is_plain

if TYPE_CHECKING:
    from vlmneurons.model.vlm import VLM

_CHUNK = 2**24
"""Bytes that are brought to the host at once from a device."""

_NOT_SETTINGS = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "_commit_hash")
"""Entries of a configuration that say where it comes from, or what another entry of the setting says."""


def digest_of_weights(hf_model: nn.Module) -> str:
    """``"bytes "`` and a digest of every byte of the model's weights and buffers, by name, shape and dtype.

    Nothing is remembered between calls, because no counter of PyTorch's notices what is written through ``.data`` or
    NumPy. The digest is the same on every device; weights on a GPU are brought over in pieces, and offloaded ones are
    read from where they are kept. Hashing 15 GiB takes half a second, besides the time of the way to the host. Weights
    that are not here (of a model that runs on another host) enter by name and shape alone: see `weights_of`.
    """
    digest = xxhash.xxh3_128()
    first_names: dict[tuple[object, ...], str] = {}
    with torch.inference_mode(False), torch.no_grad():  # tensors of torchao cannot be looked at in inference mode
        for name, tensor in sorted(_tensors(hf_model).items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            if is_plain(tensor) and tensor.device.type != "meta" and tensor.numel() > 0:
                place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
                if first_names.setdefault(place, name) != name:
                    digest.update(f"is {first_names[place]}".encode())  # a tied weight: its bytes are in already
                    continue
            for block in _blocks(tensor):
                digest.update(block)
    return f"bytes {digest.hexdigest()}"


def weights_of(model: "VLM") -> str:
    """What identifies a model's weights: a digest of all bytes or, of weights that are not here, where they come from.

    The two kinds are never equal: a repository's name says less than a digest.
    """
    if any(tensor.device.type == "meta" for tensor in _tensors(model.hf).values()):
        return f"repository {model.name} at revision {model.revision or 'unknown'}"
    return digest_of_weights(model.hf)


def _tensors(hf_model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a model computes with, by name; offloaded ones from where they are kept."""
    states = {path: state for path, module in hf_model.named_modules() if (state := _packed_state(module)) is not None}
    if states:  # bitsandbytes would unpack these weights for a state_dict, and not as they were
        tensors: dict[str, Tensor] = dict(hf_model.named_parameters(remove_duplicate=False))
        for path, state in states.items():
            for place, part in ((path, state), (f"{path}.state2", getattr(state, "state2", None))):
                values = vars(part) if part is not None else {}
                tensors.update(
                    {f"{place}.{name}": value for name, value in values.items() if isinstance(value, Tensor)}
                )
    else:
        saved = hf_model.state_dict(keep_vars=True)
        tensors = {name: value for name, value in saved.items() if isinstance(value, Tensor)}
    tensors.update({name: tensor for name, tensor in hf_model.named_buffers() if name not in tensors})
    for path, module in hf_model.named_modules():
        kept = getattr(getattr(module, "_hf_hook", None), "weights_map", None)  # accelerate's, of this module
        if kept is None:
            continue
        for attribute in [*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))]:
            name = f"{path}.{attribute}" if path else attribute
            if name in tensors and tensors[name].device.type == "meta":
                with contextlib.suppress(KeyError):
                    tensors[name] = kept[attribute]
    return tensors


def _packed_state(module: nn.Module) -> object | None:
    """What stands beside 4-bit weights that bitsandbytes has packed for this CPU; None for other modules."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return state if getattr(state, "packing_format_for_cpu", False) else None


def _blocks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in order, some at a time."""
    if tensor.device.type == "meta":
        return
    tensor = tensor.detach()
    tensor = getattr(tensor, "to_local", tensor.detach)()  # of a distributed tensor this process's share
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if not is_plain(tensor) and flatten is not None:
        names, _ = flatten()  # a quantised tensor is made of plain ones
        for name in names:
            yield from _blocks(getattr(tensor, name))
        return
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    if flat.device.type == "cuda":
        yield from _from_gpu(flat)
        return
    step = max(1, flat.numel()) if flat.device.type == "cpu" else _CHUNK
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].cpu().numpy().data


def _from_gpu(flat: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor on a GPU in order: while a piece is read, the next is on its way into page-locked memory.

    Two buffers suffice: who asks for the next piece has read the one before it, whose buffer is filled again.
    """
    stream, starts = torch.cuda.current_stream(flat.device), range(0, flat.numel(), _CHUNK)
    buffers = [torch.empty(min(_CHUNK, flat.numel()), dtype=torch.uint8, pin_memory=True) for _ in starts[:2]]
    under_way: list[tuple[Tensor, torch.cuda.Event]] = []
    for number in range(len(starts) + 1):
        if number < len(starts):
            piece = flat[starts[number] : starts[number] + _CHUNK]
            buffer, arrived = buffers[number % 2][: piece.numel()], torch.cuda.Event()
            buffer.copy_(piece, non_blocking=True)
            arrived.record(stream)
            under_way.append((buffer, arrived))
        if number:
            buffer, arrived = under_way.pop(0)
            arrived.synchronize()
            yield buffer.numpy().data


def configuration_of(model: "VLM") -> str:
    """A digest of the model's configuration, without where it comes from."""
    return digest_of(_without_places(model.hf.config.to_dict()))[:16]


def _without_places(value: object) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_places(part) for key, part in value.items() if key not in _NOT_SETTINGS}
    return [_without_places(part) for part in value] if isinstance(value, list | tuple) else value


def adapters_of(model: "VLM") -> list[str]:
    """Names of the adapters (of peft) that are in force, and of those that are merged into the weights."""
    states = set()
    for module in model.hf.modules():
        if hasattr(module, "active_adapters") and hasattr(module, "lora_A"):
            state = "disabled" if getattr(module, "disable_adapters", False) else "active"
            states.update(f"{name} {state}" for name in getattr(module, "active_adapters", ()))
            states.update(f"{name} merged" for name in getattr(module, "merged_adapters", ()))
    return sorted(states)


def quantisation_of(model: "VLM") -> str:
    """How the weights are quantised, in words; empty where they are not."""
    config = getattr(model.hf.config, "quantization_config", None)
    if config is None:
        return ""
    data = config if isinstance(config, Mapping) else config.to_dict()
    return f"{data.get('quant_method', 'unknown')} {digest_of(_without_places(data))[:16]}"


def dtype_of(model: "VLM") -> str:
    """The precision of the weights, and of autocast where it is on."""
    kind = "cpu" if model.device.type == "meta" else model.device.type
    if torch.is_autocast_enabled(kind):
        return f"{model.hf.dtype}, autocast {torch.get_autocast_dtype(kind)}"
    return str(model.hf.dtype)


def processor_of(model: "VLM") -> JSON:
    """The settings of a model's processor, of its tokenizer and of the chat template, as plain values."""
    processor, tokenizer = model.processor, model.tokenizer
    settings: JSON = {"class": type(processor).__name__}
    for name in ("image_processor", "video_processor", "feature_extractor"):
        part = getattr(processor, name, None)
        if part is not None and hasattr(part, "to_dict"):
            settings[name] = _short(_without_places(part.to_dict()))
    attributes = {
        name: value
        for name, value in vars(processor).items()
        if isinstance(value, str | int | float | bool | None | list | dict)
        and name not in ("chat_template", *_NOT_SETTINGS)
    }
    settings["own"] = _short(attributes)
    settings["tokenizer"] = digest_of(_describe_tokenizer(tokenizer))[:16]
    template = model.template
    settings["template"] = digest_of(model.prompts.chat_template)[:16] if template is None else digest_of_code(template)
    settings["template_arguments"] = dict(model.prompts.arguments)
    return settings


def _describe_tokenizer(tokenizer: Any) -> object:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    special = {str(key): str(value) for key, value in getattr(tokenizer, "special_tokens_map", {}).items()}
    if backend is None:
        rules: object = sorted(map(str, tokenizer.get_vocab().items()))
    else:  # how it pads and cuts is set anew by every call
        description = json.loads(backend.to_str())
        rules = {name: part for name, part in description.items() if name not in ("padding", "truncation")}
    return [type(tokenizer).__name__, rules, special]


def _short(settings: Mapping[str, object]) -> JSON:
    """Settings as JSON holds them; long ones by their digest."""
    return {name: digest_of(part)[:16] if len(str(part)) > 200 else _json(part) for name, part in settings.items()}


def _json(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_json(part) for part in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
