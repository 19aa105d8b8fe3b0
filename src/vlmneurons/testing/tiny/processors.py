"""Processors of many families, built without a download: transformers' own classes with a tiny tokenizer.

Special tokens and chat templates have the form of the released checkpoints', at the ids that `configs` names. Sizes
are cut down so that a picture of the tests, of some 24 by 40 pixels, still makes several tiles where the family tiles.
"""

import importlib.util
from collections.abc import Callable, Mapping

import transformers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from vlmneurons.testing.tiny.configs import END, IMAGE, START, VIDEO
from vlmneurons.testing.tiny.paper import PANGEA_TEMPLATE, QWEN_TEMPLATE
from vlmneurons.testing.tiny.parts import tiny_tokenizer

_SQUARE = {"height": 16, "width": 16}


def _tokenizer(tokens: Mapping[int, str], **names: str) -> PreTrainedTokenizerFast:
    """A tokenizer with special tokens at given ids; ids 0, 1 and 2 pad, begin and end a text.

    Args:
        tokens: special tokens by id.
        names: further names for some of them, as the family's tokenizer has: ``image_token`` …
    """
    special = [tokens.get(number, f"<unused{number}>") for number in range(max(tokens) + 1)]
    begin = {"bos_token": tokens[1]} if 1 in tokens else {}
    return tiny_tokenizer(
        special,
        pad_token=tokens[0],
        eos_token=tokens[2],
        padding_side="left",
        extra_special_tokens=dict(names),
        **begin,
    )


def _parts(image: str, text: str = "{{ part['text'] }}") -> str:
    """The loop of a template over the parts of a message, in their order."""
    return (
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% elif part['type'] == 'text' %}" + text + "{% endif %}"
        "{% endfor %}"
    )


def _turns(
    before: str, image: str, after: str, answer: str, *, start: str = "", text: str = "{{ part['text'] }}"
) -> str:
    """A template of turns: every message between two texts, and what comes before the answer."""
    return (
        start + "{% for message in messages %}" + before + _parts(image, text) + after + "{% endfor %}"
        "{% if add_generation_prompt %}" + answer + "{% endif %}"
    )


_LLAMA = {0: "<pad>", 1: "<s>", 2: "</s>", IMAGE: "<image>"}
_CHATML = {0: "<|endoftext|>", 2: "<|im_end|>", 3: "<|im_start|>"}
_QWEN = {**_CHATML, IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", START: "<|vision_start|>", END: "<|vision_end|>"}
_GEMMA = {0: "<pad>", 1: "<bos>", 2: "<eos>"}
_COHERE = {
    **{0: "<PAD>", 1: "<BOS_TOKEN>", 2: "<|END_OF_TURN_TOKEN|>", 3: "<|START_OF_TURN_TOKEN|>", 4: "<|USER_TOKEN|>"},
    **{5: "<|CHATBOT_TOKEN|>", IMAGE: "<|IMG_PATCH|>", START: "<|START_OF_IMG|>", END: "<|END_OF_IMG|>"},
    14: "<|IMG_LINE_BREAK|>",
}
_COHERE_TURNS = _turns(
    "<|START_OF_TURN_TOKEN|>{{ '<|USER_TOKEN|>' if message['role'] == 'user' else '<|CHATBOT_TOKEN|>' }}",
    "%s",
    "<|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    start="{{ bos_token }}",
)
_VICUNA = _turns("{{ message['role'].upper() }}: ", "<image>\n", " ", "ASSISTANT:")
_CHATML_TURNS = ("<|im_start|>{{ message['role'] }}\n", "<|im_end|>\n", "<|im_start|>assistant\n")
_QWEN3 = _turns(_CHATML_TURNS[0], "<|vision_start|><|image_pad|><|vision_end|>", _CHATML_TURNS[1], _CHATML_TURNS[2])
_IDEFICS = _turns(
    "{{ message['role'].capitalize() }}{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}",
    "<image>",
    "<end_of_utterance>\n",
    "Assistant:",
)


def _llava() -> ProcessorMixin:
    """As llava-hf/llava-1.5-7b-hf."""
    return _of_clip(_VICUNA)


def _vipllava() -> ProcessorMixin:
    """As llava-hf/vip-llava-7b-hf."""
    return _of_clip(
        _turns("###{{ 'Human' if message['role'] == 'user' else 'Assistant' }}: ", "<image>\n", "", "###Assistant:")
    )


def _of_clip(template: str) -> ProcessorMixin:
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=_SQUARE),
        tokenizer=_tokenizer(_LLAMA, image_token="<image>"),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def _llava_onevision() -> ProcessorMixin:
    """As llava-hf/llava-onevision-qwen2-7b-ov-hf."""
    pinpoints = [[16, 16], [16, 32], [32, 16]]
    return transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=_SQUARE, image_grid_pinpoints=pinpoints),
        tokenizer=_tokenizer(
            {**_CHATML, IMAGE: "<image>", VIDEO: "<video>"}, image_token="<image>", video_token="<video>"
        ),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=_SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=PANGEA_TEMPLATE,
    )


def _qwen(kind: str, template: str, video: str) -> Callable[[], ProcessorMixin]:
    def build() -> ProcessorMixin:
        sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
        return getattr(transformers, kind)(
            image_processor=transformers.Qwen2VLImageProcessor(
                size={"shortest_edge": 64, "longest_edge": 1024}, **sizes
            ),
            tokenizer=_tokenizer(_QWEN, image_token="<|image_pad|>", video_token="<|video_pad|>"),
            video_processor=getattr(transformers, video)(**sizes),
            chat_template=template,
        )

    return build


def _gemma3() -> ProcessorMixin:
    """As google/gemma-3-4b-it."""
    tokens = {IMAGE: "<image_soft_token>", START: "<start_of_image>", END: "<end_of_image>"}
    turns = {14: "<start_of_turn>", 15: "<end_of_turn>"}
    return transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(size=_SQUARE),
        tokenizer=_tokenizer(
            {**_GEMMA, **tokens, **turns}, image_token=tokens[IMAGE], boi_token=tokens[START], eoi_token=tokens[END]
        ),
        image_seq_length=4,
        chat_template=_turns(
            "<start_of_turn>{{ 'user' if message['role'] == 'user' else 'model' }}\n",
            "<start_of_image>",
            "<end_of_turn>\n",
            "<start_of_turn>model\n",
            start="{{ bos_token }}",
            text="{{ part['text'] | trim }}",
        ),
    )


def _gemma4() -> ProcessorMixin:
    """As google/gemma-4-E4B-it; pictures are padded to as many patches as its image processor allows at least."""
    pictures = {IMAGE: "<|image|>", VIDEO: "<|video|>", START: "<|image>", END: "<image|>"}
    sounds = {14: "<|audio|>", 15: "<|audio>", 16: "<audio|>"}
    sizes = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    return transformers.Gemma4Processor(
        feature_extractor=transformers.Gemma4AudioFeatureExtractor(),
        image_processor=transformers.Gemma4ImageProcessor(**sizes),
        tokenizer=_tokenizer(
            {**_GEMMA, **pictures, **sounds, 17: "<|turn>", 18: "<turn|>"},
            **{"image_token": pictures[IMAGE], "boi_token": pictures[START], "eoi_token": pictures[END]},
            **{"audio_token": sounds[14], "boa_token": sounds[15], "eoa_token": sounds[16]},
        ),
        video_processor=transformers.Gemma4VideoProcessor(**sizes),
        chat_template=_turns(
            "<|turn>{{ 'user' if message['role'] == 'user' else 'model' }}\n",
            "\n\n<|image|>\n\n",
            "<turn|>\n",
            "<|turn>model\n",
            start="{{ bos_token }}",
            text="{{ part['text'] | trim }}",
        ),
    )


def _paligemma() -> ProcessorMixin:
    """As google/paligemma-3b-mix-224, which has no chat template."""
    image = transformers.SiglipImageProcessor(size=_SQUARE)
    vars(image)["image_seq_length"] = 16
    tokenizer = _tokenizer({**_GEMMA, IMAGE: "<image>"}, image_token="<image>")
    return transformers.PaliGemmaProcessor(image_processor=image, tokenizer=tokenizer)


def _idefics2() -> ProcessorMixin:
    """As HuggingFaceM4/idefics2-8b-chatty, which does not split pictures."""
    return transformers.Idefics2Processor(
        image_processor=transformers.Idefics2ImageProcessor(size={"shortest_edge": 8, "longest_edge": 16}),
        tokenizer=_tokenizer(
            {**_LLAMA, START: "<fake_token_around_image>", 14: "<end_of_utterance>"},
            **{"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>"},
        ),
        image_seq_len=4,
        chat_template=_IDEFICS,
    )


def _idefics3_tokenizer(begin: str) -> PreTrainedTokenizerFast:
    places = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    names = {START: "<fake_token_around_image>", END: "<global-img>", 14: "<end_of_utterance>", 15: "<video>"}
    return _tokenizer(
        {**_LLAMA, 1: begin, **names, **dict(enumerate(places, 16))},
        **{"image_token": "<image>", "fake_image_token": names[START], "global_image_token": names[END]},
        **{"end_of_utterance_token": names[14], "video_token": names[15]},
    )


def _idefics3() -> ProcessorMixin:
    """As HuggingFaceM4/Idefics3-8B-Llama3."""
    return transformers.Idefics3Processor(
        image_processor=transformers.Idefics3ImageProcessor(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
        ),
        tokenizer=_idefics3_tokenizer("<|begin_of_text|>"),
        image_seq_len=4,
        chat_template="<|begin_of_text|>" + _IDEFICS,
    )


def _smolvlm() -> ProcessorMixin:
    """As HuggingFaceTB/SmolVLM2-2.2B-Instruct.

    Its processor cannot be made without num2words, which spells the number of a video's frames; where that is not
    installed Idefics3's stands in, which makes the same inputs of pictures.
    """
    parts = {
        "image_processor": transformers.SmolVLMImageProcessor(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
        ),
        "tokenizer": _idefics3_tokenizer("<|im_start|>"),
        "image_seq_len": 4,
        "chat_template": "<|im_start|>" + _IDEFICS,
    }
    if importlib.util.find_spec("num2words") is None:
        return transformers.Idefics3Processor(**parts)
    video = transformers.SmolVLMVideoProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return transformers.SmolVLMProcessor(video_processor=video, **parts)


def _internvl() -> ProcessorMixin:
    """As OpenGVLab/InternVL3-1B-hf."""
    tokens = {IMAGE: "<IMG_CONTEXT>", VIDEO: "<video>", START: "<img>", END: "</img>"}
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size=_SQUARE, min_patches=1, max_patches=4),
        tokenizer=_tokenizer(
            {**_CHATML, **tokens},
            **{"context_image_token": tokens[IMAGE], "video_token": tokens[VIDEO]},
            **{"start_image_token": tokens[START], "end_image_token": tokens[END]},
        ),
        video_processor=transformers.InternVLVideoProcessor(size=_SQUARE),
        image_seq_length=4,
        chat_template=_turns(_CHATML_TURNS[0], "<IMG_CONTEXT>\n", _CHATML_TURNS[1], _CHATML_TURNS[2]),
    )


def _mistral3() -> ProcessorMixin:
    """As mistralai/Mistral-Small-3.1-24B-Instruct-2503."""
    tokens = {IMAGE: "[IMG]", START: "[IMG_BREAK]", END: "[IMG_END]", 14: "[INST]", 15: "[/INST]"}
    return transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(
            size={"longest_edge": 32}, patch_size={"height": 4, "width": 4}
        ),
        tokenizer=_tokenizer({**_LLAMA, **tokens}, image_token="[IMG]"),
        patch_size=4,
        spatial_merge_size=2,
        chat_template=_turns("[INST]", "[IMG]", "[/INST]", "", start="{{ bos_token }}"),
    )


def _llama4() -> ProcessorMixin:
    """As meta-llama/Llama-4-Scout-17B-16E-Instruct."""
    tokens = {
        **{0: "<|finetune_right_pad|>", 1: "<|begin_of_text|>", 2: "<|eot|>", IMAGE: "<|patch|>"},
        **{START: "<|image_start|>", END: "<|image_end|>", 14: "<|tile_x_separator|>", 15: "<|tile_y_separator|>"},
        **{16: "<|image|>", 17: "<|header_start|>", 18: "<|header_end|>"},
    }
    return transformers.Llama4Processor(
        image_processor=transformers.Llama4ImageProcessor(size=_SQUARE, max_patches=4),
        tokenizer=_tokenizer(tokens),
        patch_size=4,
        pixel_shuffle_ratio=0.5,
        chat_template=_turns(
            "<|header_start|>{{ message['role'] }}<|header_end|>\n\n",
            "<|image|>",
            "<|eot|>",
            "<|header_start|>assistant<|header_end|>\n\n",
            start="{{ bos_token }}",
        ),
    )


def _glm4v() -> ProcessorMixin:
    """As zai-org/GLM-4.1V-9B-Thinking, and GLM-4.5V."""
    tokens = {
        **{0: "<|endoftext|>", 2: "<|user|>", 3: "[gMASK]", 4: "<sop>", 5: "<|assistant|>"},
        **{IMAGE: "<|image|>", VIDEO: "<|video|>", START: "<|begin_of_image|>", END: "<|end_of_image|>"},
        **{14: "<|begin_of_video|>", 15: "<|end_of_video|>"},
    }
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    return transformers.Glm4vProcessor(
        image_processor=transformers.Glm4vImageProcessor(size={"shortest_edge": 64, "longest_edge": 1024}, **sizes),
        tokenizer=_tokenizer(tokens, image_token="<|image|>", video_token="<|video|>"),
        video_processor=transformers.Glm4vVideoProcessor(size={"shortest_edge": 64, "longest_edge": 1024}, **sizes),
        chat_template=_turns(
            "<|{{ message['role'] }}|>\n",
            "<|begin_of_image|><|image|><|end_of_image|>",
            "",
            "<|assistant|>\n",
            start="[gMASK]<sop>\n",
        ),
    )


def _aya_vision() -> ProcessorMixin:
    """As CohereLabs/aya-vision-8b."""
    tiles = {15: "TILE_GLOBAL", **{15 + n: f"TILE_{n}" for n in range(1, 5)}, 20: "<image>"}
    return transformers.AyaVisionProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size=_SQUARE, min_patches=1, max_patches=4),
        tokenizer=_tokenizer({**_COHERE, **tiles}),
        patch_size=4,
        img_size=16,
        downsample_factor=2,
        chat_template=_COHERE_TURNS.replace("%s", "<image>"),
    )


def _cohere2_vision() -> ProcessorMixin:
    """As CohereLabs/command-a-vision-07-2025."""
    return transformers.Cohere2VisionProcessor(
        image_processor=transformers.Cohere2VisionImageProcessor(size=_SQUARE, max_patches=4, patch_size=2),
        tokenizer=_tokenizer(
            _COHERE,
            **{"image_token": _COHERE[IMAGE], "boi_token": _COHERE[START], "eoi_token": _COHERE[END]},
            img_line_break_token=_COHERE[14],
        ),
        chat_template=_COHERE_TURNS.replace("%s", _COHERE[IMAGE]),
    )


def _got_ocr2() -> ProcessorMixin:
    """As stepfun-ai/GOT-OCR-2.0-hf, which has no chat template; its own prompts ask for a picture's text only."""
    processor = transformers.GotOcr2Processor(
        image_processor=transformers.GotOcr2ImageProcessor(size={"height": 64, "width": 64}),
        tokenizer=_tokenizer({**_CHATML, IMAGE: "<imgpad>", START: "<img>", END: "</img>"}),
    )
    if hasattr(transformers.GotOcr2Processor, "num_image_tokens"):
        processor.num_image_tokens = 16
    else:  # up to transformers 5.20, which has it from what the tokenizer was made with
        processor.tokenizer.init_kwargs["num_image_tokens"] = 16
    return processor


def _mllama() -> ProcessorMixin:
    """As meta-llama/Llama-3.2-11B-Vision-Instruct."""
    tokens = {
        **{0: "<|finetune_right_pad_id|>", 1: "<|begin_of_text|>", 2: "<|eot_id|>", IMAGE: "<|image|>"},
        **{12: "<|python_tag|>", 13: "<|start_header_id|>", 14: "<|end_header_id|>"},
    }
    return transformers.MllamaProcessor(
        image_processor=transformers.MllamaImageProcessor(size=_SQUARE, max_image_tiles=2),
        tokenizer=_tokenizer(tokens, image_token="<|image|>"),
        chat_template=_turns(
            "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n",
            "<|image|>",
            "<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            start="{{ bos_token }}",
            text="{{ part['text'] | trim }}",
        ),
    )


def _molmo2() -> ProcessorMixin:
    """As allenai/Molmo2-8B."""
    tokens = {
        **{IMAGE: "<im_patch>", START: "<im_start>", END: "<im_end>", 14: "<low_res_im_start>", 15: "<frame_start>"},
        **{16: "<frame_end>", 17: "<im_col>", 18: "<im_low>", 19: "<|image|>", 20: "<|video|>"},
    }
    sizes = {"size": _SQUARE, "patch_size": 4}
    return transformers.Molmo2Processor(
        image_processor=transformers.Molmo2ImageProcessor(max_crops=2, overlap_margins=[1, 1], **sizes),
        tokenizer=_tokenizer({**_CHATML, **tokens}, image_token="<|image|>", video_token="<|video|>"),
        video_processor=transformers.Molmo2VideoProcessor(**sizes),
        chat_template=_turns(_CHATML_TURNS[0], "<|image|>", _CHATML_TURNS[1], _CHATML_TURNS[2]),
    )


def _florence2() -> ProcessorMixin:
    """As florence-community/Florence-2-base: no chat template; the processor puts the picture before the text."""
    image = transformers.CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    vars(image)["image_seq_length"] = 17
    return transformers.Florence2Processor(
        image_processor=image,
        tokenizer=_tokenizer({0: "<pad>", 1: "<s>", 2: "</s>", IMAGE: "<image>"}, image_token="<image>"),
    )


PROCESSORS: dict[str, Callable[[], ProcessorMixin]] = {
    "llava": _llava,
    "vipllava": _vipllava,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen("Qwen2VLProcessor", QWEN_TEMPLATE, "Qwen2VLVideoProcessor"),
    "qwen3_vl": _qwen("Qwen3VLProcessor", _QWEN3, "Qwen3VLVideoProcessor"),
    "qwen3_vl_moe": _qwen("Qwen3VLProcessor", _QWEN3, "Qwen3VLVideoProcessor"),
    "qwen3_5": _qwen("Qwen3VLProcessor", _QWEN3, "Qwen3VLVideoProcessor"),
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "paligemma": _paligemma,
    "idefics2": _idefics2,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "internvl": _internvl,
    "mistral3": _mistral3,
    "llama4": _llama4,
    "glm4v": _glm4v,
    "glm4v_moe": _glm4v,
    "aya_vision": _aya_vision,
    "cohere2_vision": _cohere2_vision,
    "got_ocr2": _got_ocr2,
    "mllama": _mllama,
    "molmo2": _molmo2,
    "florence2": _florence2,
}
"""How the processor of each model of `configs` is built."""


def _got_prompt(text: str, n_images: int) -> str:
    pictures = "<img>" + "<imgpad>" * n_images + "</img>\n" if n_images else ""
    return f"<|im_start|>user\n{pictures}{text}<|im_end|><|im_start|>assistant\n"


TEMPLATES: dict[str, Callable[[str, int], str]] = {
    "paligemma": lambda text, n_images: "<image>" * n_images + text,
    "got_ocr2": _got_prompt,
    "florence2": lambda text, n_images: text,
}
"""Prompts for the models whose processors have no chat template."""
