"""What planted models see or hear: media of each group made up by rule, and a model that tells the groups apart.

A medium's model has a random tower and a projector that is fitted, by least squares, so that each group's media become
its one-hot code in the decoder. The decoder is left at zero: `vlmneurons.testing.planted` writes it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from vlmneurons.checks import Keywords
from vlmneurons.errors import VLMNeuronsError
from vlmneurons.testing.tiny import tiny_tokenizer

NOISE, JUNK = 32, 4
"""Dimensions of the residual stream by which tokens differ, and those that nothing reads."""
_SIDE, _RATE = 16, 16_000

Blank = tuple[PreTrainedModel, ProcessorMixin]


class Medium(NamedTuple):
    """What a group is told by.

    Attributes:
        field: the argument of `vlmneurons.Question` that takes it.
        question: what is asked about it.
        most: how many groups can be told apart.
        make: one of a group: the group's number and a source of chance.
        blank: a model and its processor, the decoder all zero.
        write_projector: makes each group's media its code.
    """

    field: str
    question: str
    most: int
    make: Callable[[int, np.random.Generator], Any]
    blank: Callable[[tuple[str, ...], int, int], Blank]
    write_projector: Callable[[PreTrainedModel, ProcessorMixin, tuple[str, ...], torch.Generator], None]


# -- what is seen and heard --------------------------------------------------------------------------------------------


def _picture(number: int, rng: np.random.Generator) -> Image.Image:
    """A square of the group's colour (a corner of the colour cube), with some noise; from the ninth on, of two."""
    corner, second = (np.array([k >> bit & 1 for bit in range(3)]) * 200 + 28 for k in (number, number + number // 8))
    stripes = (np.arange(_SIDE) // 4 % 2)[:, None]  # a patch of the vision tower has one of each
    noise = 8 if number < 8 else 4
    pixels = corner * (1 - stripes) + second * stripes + rng.integers(-noise, noise + 1, size=(_SIDE, _SIDE, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _sound(number: int, rng: np.random.Generator) -> Keywords:
    """A second of the group's pitch, half an octave above the group before, out of tune and with some noise."""
    pitch = 220 * 2 ** ((number + 0.05 * rng.uniform(-1, 1)) / 2)
    phase = 2 * np.pi * (pitch * np.arange(_RATE) / _RATE + rng.uniform())
    values = rng.uniform(0.3, 0.6) * np.sin(phase) + 1e-4 * rng.standard_normal(_RATE)
    return {"array": values.astype(np.float32), "sampling_rate": _RATE}


def _video(number: int, rng: np.random.Generator) -> np.ndarray:
    """Four frames of one colour, whose red, green and blue each rise or fall: their middle ones tell little alone."""
    rises = np.array([(number >> bit & 1) * 2 - 1 for bit in range(3)])
    colours = rng.integers(96, 160, size=3) + np.array([-3, -1, 1, 3])[:, None] * rises * 24
    pixels = colours[:, None, None] + rng.integers(-1, 2, size=(4, _SIDE, _SIDE, 3))
    return pixels.clip(0, 255).astype(np.uint8)


# -- models ------------------------------------------------------------------------------------------------------------


def _hidden(groups: tuple[str, ...]) -> int:
    hidden = 2 * len(groups) + 1 + NOISE + JUNK
    return hidden + -hidden % 8


def _text(groups: tuple[str, ...], tokenizer: PreTrainedTokenizerFast, layers: int, width: int) -> Keywords:
    """Settings of a decoder with one head, which is as wide as the residual stream."""
    tokenizer.add_tokens([AddedToken(f" {group}", normalized=False) for group in groups])
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": _hidden(groups),
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def _template(kind: str, shown: str) -> str:
    return (
        "{{ bos_token }}{% for message in messages %}{% for part in message['content'] if part['type'] == '" + kind
        + "' %}" + shown + "{% endfor %}{% for part in message['content'] if part['type'] == 'text' %}"
        "{{ part['text'] }}{% endfor %}{% endfor %}{% if add_generation_prompt %} Answer:{% endif %}"
    )  # fmt: skip


def _tokenizer(special: list[str], names: dict[str, str]) -> PreTrainedTokenizerFast:
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return tiny_tokenizer([*roles.values(), *special], **roles, extra_special_tokens=names)


def _finished(make: Callable[[], PreTrainedModel], tower: str) -> PreTrainedModel:
    """A model whose tower is wide enough that groups are told apart, and whose decoder is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().float().eval()
        for parameter in model.get_submodule(tower).parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    for parameter in model.model.language_model.parameters():
        parameter.data.zero_()
    return model


def _sees_pictures(groups: tuple[str, ...], layers: int, width: int) -> Blank:
    """A LLaVA-NeXT."""
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextProcessor, MistralConfig
    from transformers import LlavaNextForConditionalGeneration as Model
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tokenizer = _tokenizer(["<image>"], {"image_token": "<image>"})
    text = MistralConfig(
        head_dim=_hidden(groups), sliding_window=None, **_text(groups, tokenizer, layers, width)
    )  # fmt: skip
    wide = 1 if len(groups) <= 8 else 2
    vision = CLIPVisionConfig(
        hidden_size=32 * wide,
        intermediate_size=64 * wide,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=_SIDE,
        patch_size=8,
        projection_dim=16,
    )
    pinpoints = [[_SIDE, _SIDE]]
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=cast(int, tokenizer.convert_tokens_to_ids("<image>")),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": _SIDE},
            crop_size={"height": _SIDE, "width": _SIDE},
            image_grid_pinpoints=pinpoints,
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("image", "<image>"),
    )
    return _finished(lambda: Model(config), "model.vision_tower"), processor


def _hears_sounds(groups: tuple[str, ...], layers: int, width: int) -> Blank:
    """A Qwen2-Audio."""
    from transformers import Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2AudioProcessor, WhisperFeatureExtractor
    from transformers import Qwen2AudioForConditionalGeneration as Model

    names = {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
    tokenizer = _tokenizer(list(names.values()), names)
    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=384,
        d_model=256,
        max_source_positions=100,
    )
    config = Qwen2AudioConfig(
        audio_config=audio.to_dict(),
        text_config={"model_type": "qwen2", **_text(groups, tokenizer, layers, width)},
        audio_token_index=cast(int, tokenizer.convert_tokens_to_ids("<|AUDIO|>")),
    )
    processor = Qwen2AudioProcessor(
        feature_extractor=WhisperFeatureExtractor(
            feature_size=16, sampling_rate=_RATE, hop_length=160, chunk_length=2, n_fft=400
        ),
        tokenizer=tokenizer,
        chat_template=_template("audio", "".join(names[f"audio_{part}token"] for part in ("bos_", "", "eos_"))),
    )
    return _finished(lambda: Model(config), "model.audio_tower"), processor


def _sees_videos(groups: tuple[str, ...], layers: int, width: int) -> Blank:
    """A Qwen2.5-VL, which sees two frames at a time."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
    from transformers import Qwen2_5_VLForConditionalGeneration as Model

    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _tokenizer(special, {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"})
    text = _text(groups, tokenizer, layers, width)
    third = text["hidden_size"] // 6  # positions turn pairs of dimensions; the rest are those of time
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [text["hidden_size"] // 2 - 2 * third, third, third],
    }
    ids = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), special))
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={
            "depth": 2,
            "hidden_size": 96,
            "intermediate_size": 144,
            "num_heads": 2,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=False,
        **cast(Keywords, {name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()}),
    )
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    pixels = {"shortest_edge": _SIDE**2, "longest_edge": 4 * _SIDE**2}
    videos = Qwen2VLVideoProcessor(size=pixels, **sizes)
    vars(videos)["cap_pixels_per_frame"] = False  # by frame, a video of so few pixels would be enlarged
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels, **sizes),
        tokenizer=tokenizer,
        video_processor=videos,
        chat_template=_template("video", "<|vision_start|><|video_pad|><|vision_end|>"),
    )
    return _finished(lambda: Model(config), "model.visual"), processor


# -- projectors --------------------------------------------------------------------------------------------------------


def _draw(linear: nn.Linear, generator: torch.Generator) -> None:
    linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * 0.3)
    linear.bias.zero_()


def _fit(
    last: nn.Linear, run: Callable[[], object], groups: tuple[str, ...], media: str, places: int | None = None
) -> None:
    """Writes the last projection so that each group's inputs become the group's code.

    `run` shows it the inputs, group after group, as many of each.
    """
    states: list[Tensor] = []
    handle = last.register_forward_pre_hook(
        lambda _, args: states.append(args[0][..., :places, :].flatten(0, -2).double())
    )
    run()
    handle.remove()
    hidden = torch.cat([*states, torch.ones(len(states[0]), 1, dtype=torch.float64)], 1)
    code = torch.eye(len(groups), dtype=torch.float64).repeat_interleave(len(hidden) // len(groups), 0)
    solution = torch.linalg.solve(hidden.T @ hidden + 1e-6 * torch.eye(hidden.shape[1]).double(), hidden.T @ code)
    worst = (hidden @ solution - code).abs().max()
    if worst > 0.1:  # after attention a token holds nine times its share: the gates open at 4/3
        raise VLMNeuronsError(
            f"the {media}' groups could not be told apart (worst error {worst:.2f}); change the seed"
        )  # fmt: skip
    last.weight.zero_()
    last.bias.zero_()
    last.weight[: len(groups)] = solution[:-1].T.float()
    last.bias[: len(groups)] = solution[-1].float()
    last.bias[2 * len(groups)] = 1.0


def _made(make: Callable[[int, np.random.Generator], Any], groups: tuple[str, ...], each: int = 40) -> list[Any]:
    rng = np.random.default_rng(12345)
    return [make(number, rng) for number in range(len(groups)) for _ in range(each)]


def _project_pictures(
    model: PreTrainedModel, processor: ProcessorMixin, groups: tuple[str, ...], generator: torch.Generator
) -> None:
    projector = model.model.multi_modal_projector
    _draw(projector.linear_1, generator)
    pixels = processor.image_processor(_made(_picture, groups), return_tensors="pt")["pixel_values"].flatten(0, 1)
    features = model.model.vision_tower(pixels).last_hidden_state[:, 1:]
    _fit(projector.linear_2, lambda: projector(features), groups, "pictures")


def _project_sounds(
    model: PreTrainedModel, processor: ProcessorMixin, groups: tuple[str, ...], generator: torch.Generator
) -> None:
    arrays = [sound["array"] for sound in _made(_sound, groups, 100)]
    made = processor(text=["<|AUDIO|>"] * len(arrays), audio=arrays, sampling_rate=_RATE, return_tensors="pt")
    n_heard = int((made["input_ids"][0] == model.config.audio_token_id).sum())  # the tower sees silence after it, too
    _fit(model.model.multi_modal_projector.linear, lambda: model.model(**made), groups, "sounds", n_heard)


def _project_videos(
    model: PreTrainedModel, processor: ProcessorMixin, groups: tuple[str, ...], generator: torch.Generator
) -> None:
    first, _, last = model.model.visual.merger.mlp
    _draw(first, generator)
    made = processor.video_processor(
        [torch.from_numpy(video).permute(0, 3, 1, 2) for video in _made(_video, groups, 120)],
        do_sample_frames=False,
        return_tensors="pt",
    )
    run = lambda: model.model.visual(made["pixel_values_videos"], grid_thw=made["video_grid_thw"])  # noqa: E731
    _fit(last, run, groups, "videos")


MEDIA = {
    "picture": Medium("image", "Which country is this picture from?", 27, _picture, _sees_pictures, _project_pictures),
    "sound": Medium("audio", "Which of these do you hear?", 8, _sound, _hears_sounds, _project_sounds),
    "video": Medium("video", "Which of these do you see?", 8, _video, _sees_videos, _project_videos),
}
"""What planted models may see or hear, by name."""
