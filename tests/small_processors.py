"""Processors of the small models' own classes, made without a download: transformers', small, with a tiny tokenizer.

What a processor's class reads of its tokenizer, or writes into prompts, is read off its source, and each such token is
put where the model's configuration has it. Sizes are cut down by rule as those of the models are; `OWN` holds what a
class needs besides.
"""

import hashlib
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from vlmneurons.testing.tiny import tiny_tokenizer

_NAMED = re.compile(r"tokenizer\.(\w+_token)\b|tokenizer, \"(\w+_token)\"")
_WRITTEN = re.compile(r"\"((?:<|\[|\]<|\|)[^\s\"{}]*(?:>|\]|\|))\"")
_SQUARE = {"height": 16, "width": 16}
_PIXELS = {"shortest_edge": 64, "longest_edge": 1024}
_SMALL: dict[str, Any] = {
    "crop_size": _SQUARE,
    "patch_size": 4,
    "merge_size": 2,
    "min_pixels": 64,
    "max_pixels": 1024,
    "image_size": 16,
    "tile_size": 16,
    "max_image_size": 16,
    "min_image_size": 16,
    "max_patches": 4,
    "min_patches": 1,
}
"""Sizes of image processors, whose attributes are so called."""
_PATCH = {"height": 4, "width": 4}
_GRID = [[16, 32], [32, 16]]
_QUERIES: dict[str, Any] = {
    "shown": "",
    "without": ("image_token",),
    "at": {"<image>": 10},
    "more": {"num_query_tokens": 4},
}
_OF_SAM = {"patch_size": 1, "downsample_ratio": 1.34}  # as many queries as their models have, of tiles of 16 pixels
_GEMMA_SOUND = lambda: transformers.Gemma3nAudioFeatureExtractor(feature_size=16)  # noqa: E731
OWN: dict[str, dict[str, Any]] = {
    "aria": {
        "set": {"images_kwargs": {"max_image_size": 490, "split_image": False}},
        "more": {"size_conversion": {490: 4}},
    },
    "blip": {"shown": ""},
    "emu3": {"image": {"spatial_factor": 8, "min_pixels": 256}},
    "git": {"shown": ""},
    "hunyuan_vl": {"shown": "<image_start_token><image_token><image_end_token>"},
    "idefics": {"shown": ""},
    "blip-2": _QUERIES,
    "instructblip": _QUERIES,
    "chameleon": {"more": {"image_seq_length": 1}},
    "cosmos3_omni": {"kind": "Qwen3VLProcessor"},
    "deepseek_ocr2": {"more": _OF_SAM},
    "deepseek_vl": {"more": {"num_image_tokens": 16}},
    "deepseek_vl_hybrid": {
        "image": {"high_res_size": {"height": 64, "width": 64}},
        "more": {"num_image_tokens": 16},
    },
    "ernie4_5_vl_moe": {"video": {"temporal_patch_size": 2, "draw_on_frames": False}},
    "fast_vlm": {
        "kind": "LlavaProcessor",
        "image_kind": "CLIPImageProcessor",
        "image": {"size": {"shortest_edge": 16}},
        "more": {"patch_size": 16, "vision_feature_select_strategy": "full"},
    },
    "gemma3n": {"sound": _GEMMA_SOUND, "more": {"image_seq_length": 1, "audio_seq_length": 4}},
    "gemma4": {
        "image": {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70},
        "video": {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70},
        "sound": lambda: transformers.Gemma4AudioFeatureExtractor(),
    },
    "glm_ocr": {"as": "glm46v"},
    "glmga": {"kind": "Glm46VProcessor", "image_kind": "GlmgaImageProcessor", "video_kind": "GlmgaVideoProcessor"},
    "granite4_vision": {
        "image": {"image_grid_pinpoints": _GRID},
        "more": {"patch_size": 4, "downsample_rate": "1/2", "vision_feature_select_strategy": "full"},
    },
    "granite_docling": {"more": {"image_seq_len": 1}},
    "inkling_mm_model": {"image": {"size": {"height": 4, "width": 4}}},
    "inkling2": {"image": {"size": {"height": 8, "width": 8}}},
    "inkling2_loop": {"image": {"size": {"height": 8, "width": 8}}},
    "janus": {"more": {"num_image_tokens": 16}},
    "kosmos-2": {"kind": "Kosmos2Processor", "shown": "", "set": {"num_image_tokens": 4}},
    "kosmos-2.5": {
        "kind": "Kosmos2_5Processor",
        "set": {"num_image_tokens": 4, "images_kwargs": {"max_patches": 16}},
        "shown": "",
        "image": {"patch_size": {"height": 16, "width": 16}, "max_patches": 16},
    },
    "lfm2_vl": {
        "image": {"encoder_patch_size": 4, "min_image_tokens": 4, "max_image_tokens": 16, "max_tiles": 4},
    },
    "lighton_ocr": {
        "image": {"patch_size": _PATCH, "size": {"longest_edge": 32}},
        "more": {"patch_size": 4, "spatial_merge_size": 2},
    },
    "mistral_large4": {
        "image": {"patch_size": _PATCH, "size": {"longest_edge": 32}},
        "more": {"patch_size": 4, "spatial_merge_size": 2},
        "at": {"[IMG]": 10},
    },
    "llava_next_video": {
        "image": {"image_grid_pinpoints": _GRID},
        "more": {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    },
    "minicpm_ocr": {"image": {"scale_resolution": 32, "max_slice_nums": 2}},
    "minicpmv4_6": {"image": {"scale_resolution": 32, "max_slice_nums": 2}},
    "minicpmv4_7": {"image": {"scale_resolution": 32, "max_slice_nums": 2}},
    "muse_glimmer": {"image": {"temporal_patch_size": 2}, "video": {"temporal_patch_size": 2}},
    "muse_spark": {"image": {"temporal_patch_size": 2}, "video": {"temporal_patch_size": 2}},
    "nemotron_h_omni": {"image": {"min_num_patches": 4, "max_num_patches": 64}},
    "ovis2": {"at": {"<IMG_ATOM>": 10}, "more": {"image_seq_length": 16}},
    "perception_lm": {"image": {"tile_size": 56, "max_num_tiles": 4}, "more": {"patch_size": 14, "pooling_ratio": 1}},
    "pix2struct": {"image": {"patch_size": {"height": 16, "width": 16}, "max_patches": 16}},
    "qianfan_ocr": {
        "image": {"min_patches": 1, "max_patches": 4},
        "more": {"image_seq_length": 4},
        "at": {"<context_image_token>": 10},
        "shown": "<image>",
    },
    "qwen2_5_omni_thinker": {"as": "qwen2_5_omni", "image_kind": "Qwen2VLImageProcessor"},
    "qwen3_omni_moe_thinker": {"as": "qwen3_omni_moe", "image_kind": "Qwen2VLImageProcessor"},
    "step3p7": {
        "at": {"<im_patch>": 10},
        "image": {"patch_size": 16},
        "image_set": {"vision_patch_size": 4, "downsampler_stride": 4},
    },
    "t5gemma2": {"more": {"image_seq_length": 4}, "at": {"<image_token>": 10}, "shown": "<boi_token>"},
    "video_llava": {
        "image_kind": "VideoLlavaImageProcessor",
        "image": {"size": {"shortest_edge": 16}},
        "more": {"patch_size": 4, "num_additional_image_tokens": 1},
    },
}


class Special:
    """The special tokens of a family, at the ids that a model's configuration has them.

    Args:
        kind: the processor's class.
        config: the model's configuration.
        texts: further tokens by the names that the tokenizer has for them.
    """

    def __init__(self, kind: type, config: Any, texts: Mapping[str, str], without: Sequence[str] = ()) -> None:
        sources = [
            inspect.getsource(sys.modules[one.__module__]) for one in kind.__mro__[:2] if one.__module__ != "builtins"
        ]
        source = sources[0]
        named = dict.fromkeys(name for pair in _NAMED.findall(source) for name in pair if name)
        roles = ("bos_token", "eos_token", "pad_token", "sep_token", "unk_token", *without)
        self.names = {name: texts.get(name, f"<{name}>") for name in (*named, *texts) if name not in roles}
        self.written = [text for text in dict.fromkeys(_WRITTEN.findall(source)) if text not in self.names.values()]
        self.config = config

    def tokenizer(self, at: Mapping[str, int]) -> Any:
        """A tokenizer with some of these tokens at given ids, the others after them."""
        places = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>", **{number: text for text, number in at.items()}}
        free = iter(number for number in range(20, 400) if number not in places)
        for text in (*self.names.values(), *self.written):
            if text not in places.values():
                places[next(free)] = text
        special = [places.get(number, f"<unused{number}>") for number in range(max(places) + 1)]
        roles = {
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "sep_token": "</s>",
        }
        return tiny_tokenizer(special, padding_side="left", extra_special_tokens=self.names, **roles)

    def ids(self, processor: Any) -> dict[str, int]:
        """Where the model's configuration has each of a processor's tokens."""
        found: dict[str, int] = {}
        for name in dir(self.config):
            kind = re.fullmatch(r"(\w+_token)_(?:id|index)", name)
            number = getattr(self.config, name, None)
            if kind is None or not isinstance(number, int) or not 10 <= number < 20:
                continue
            text = next(
                (getattr(one, kind[1], None) for one in (processor, processor.tokenizer) if hasattr(one, kind[1])), None
            )
            if text is not None:
                found[str(text)] = number
        return found


def _sized(kind: type, model: nn.Module, more: Mapping[str, Any]) -> Any:
    """A processor of pictures or videos, small."""
    vision = getattr(model.config, "vision_config", model.config)
    arguments = inspect.signature(kind.__init__).parameters
    settings = {key: value for key, value in _SMALL.items() if hasattr(kind, key) or key in arguments}
    if hasattr(kind, "temporal_patch_size"):
        settings["temporal_patch_size"] = getattr(vision, "temporal_patch_size", 1)
    default = getattr(kind, "size", None)
    if isinstance(default, Mapping):
        keys = set(default)
        settings["size"] = _PIXELS if keys == set(_PIXELS) else dict.fromkeys(keys, 16)
    return kind(**{**settings, **more})


def small_processor(name: str, model: nn.Module) -> Any:
    """A processor of a type's own class.

    Args:
        name: the type.
        model: what `small_configs.small_model` gives for it.
    """
    own = {**OWN.get(name, {})}
    as_name = own.get("as", name)
    kind = getattr(transformers, own.get("kind") or PROCESSOR_MAPPING_NAMES[as_name])
    special = Special(kind, model.config, own.get("tokens", {}), own.get("without", ()))
    arguments, parts = inspect.signature(kind.__init__).parameters, {}
    if "image_processor" in arguments:
        told = IMAGE_PROCESSOR_MAPPING_NAMES.get(as_name, {})
        image = own.get("image_kind") or told.get("torchvision") or told["pil"]
        parts["image_processor"] = _sized(getattr(transformers, image), model, own.get("image", {}))
        vars(parts["image_processor"]).update(own.get("image_set", {}))
    if "video_processor" in arguments:
        video = own.get("video_kind") or VIDEO_PROCESSOR_MAPPING_NAMES[as_name]["torchvision"]
        parts["video_processor"] = _sized(getattr(transformers, video), model, own.get("video", {}))
    if "feature_extractor" in arguments:
        parts["feature_extractor"] = (
            own["sound"]() if "sound" in own else transformers.WhisperFeatureExtractor(feature_size=16)
        )
    for more in ("qformer_tokenizer", "protein_tokenizer"):
        if more in arguments:
            parts[more] = special.tokenizer({})
    make = lambda at: kind(**parts, tokenizer=special.tokenizer(at), **own.get("more", {}))  # noqa: E731
    at = own.get("at", {})
    processor = make(special.ids(make(at)) | at)
    vars(processor).update(own.get("set", {}))
    processor.chat_template = turns(own.get("shown", getattr(processor, "image_token", "")), processor)
    return processor


TURNS = (
    "{% for message in messages %}user: {% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% elif part['type'] == 'audio' %}AUDIO"
    "{% elif part['type'] == 'video' %}VIDEO{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}answer:{% endif %}"
)


def turns(picture: str, processor: Any) -> str:
    """A chat template that shows pictures, sounds and videos by their placeholders."""
    heard, moving = (str(getattr(processor, name, None) or "") for name in ("audio_token", "video_token"))
    return TURNS.replace("IMAGE", str(picture)).replace("AUDIO", heard).replace("VIDEO", moving)


class MadeUp:
    """Makes of texts and pictures what a model's processor would, where that cannot be had.

    Of each picture it makes tensors of the shapes that the model takes one in, whose values depend on the pixels, and
    as many placeholders.

    Args:
        inputs: one question with one picture, as `small_configs.small_inputs` gives it.
        sees: whether there is a picture in it.
    """

    image_token = "<image>"

    def __init__(self, inputs: Mapping[str, Tensor], *, sees: bool = True) -> None:
        special = [
            "<pad>",
            "<s>",
            "</s>",
            *(f"<unused{n}>" for n in range(3, 10)),
            "<image>",
            *(f"<unused{n}>" for n in range(11, 30)),
        ]
        self.tokenizer = tiny_tokenizer(special, padding_side="left", pad_token="<pad>", eos_token="</s>")
        ids = inputs["input_ids"][0].tolist()
        self.before = ids[: len(ids) - 12]  # `small_configs._words` ends with as many words
        given = {
            name: value
            for name, value in inputs.items()
            if name not in ("input_ids", "attention_mask", "decoder_input_ids")
        }
        self.of_tokens = {name: value[0] for name, value in given.items() if value.shape[:2] == (1, len(ids))}
        self.of_media = {name: value for name, value in given.items() if name not in self.of_tokens}
        self.image_processor = self._picture if sees else None
        self.chat_template = TURNS.replace("IMAGE", self.image_token)

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **how: Any) -> str:
        return self.tokenizer.apply_chat_template(
            conversation, chat_template=chat_template or self.chat_template, **how
        )

    def _picture(self, picture: Any) -> dict[str, Tensor]:
        seed = int.from_bytes(hashlib.blake2b(picture.tobytes(), digest_size=6).digest(), "big")
        generator = torch.Generator().manual_seed(seed)
        drawn = lambda value: torch.randn(value.shape, generator=generator)  # noqa: E731
        return {name: drawn(v) if v.is_floating_point() else v for name, v in self.of_media.items()}

    def __call__(self, text: Sequence[str], images: Sequence[Any] = (), padding_side: str = "left", **how: Any) -> Any:
        rows, media = [], []
        for one, pictures in zip(text, images or [()] * len(text), strict=True):
            plain = self.tokenizer(one, add_special_tokens=False)["input_ids"]
            ids, tokens = [], {name: [] for name in self.of_tokens}
            for number in plain:
                shown = number == 10 and self.image_processor is not None
                ids += self.before if shown else [number]
                for name, values in self.of_tokens.items():
                    tokens[name] += list(values[: len(self.before)]) if shown else [torch.zeros_like(values[0])]
            rows.append({"input_ids": list(map(torch.tensor, ids)), **tokens})
            media += [self._picture(picture) for picture in pictures] or ([self.of_media] if not images else [])
        most = max(len(row["input_ids"]) for row in rows)
        data = {}
        for name in ("input_ids", *self.of_tokens):
            made = [torch.stack(row[name]) for row in rows]
            blank = [torch.zeros(most - len(row), *row.shape[1:], dtype=row.dtype) for row in made]
            pairs = zip(made, blank, strict=True)
            data[name] = torch.stack([torch.cat([b, r] if padding_side == "left" else [r, b]) for r, b in pairs])
        real = [torch.ones(len(row["input_ids"])).long() for row in rows]
        blank = [torch.zeros(most - len(row)).long() for row in real]
        data["attention_mask"] = torch.stack(
            [torch.cat([b, r] if padding_side == "left" else [r, b]) for r, b in zip(real, blank, strict=True)]
        )
        for name in self.of_media if media else ():
            data[name] = torch.cat([one[name] for one in media])
        return data
