"""From questions to model inputs, and which token of them is what.

The one place that knows how a prompt becomes tokens. A processor expands one image placeholder to hundreds of tokens
and wraps the user's text in a chat template; which tokens are the picture, which the user's words, and which only
template, padding or special tokens decides what is counted, so it is worked out here, once, per token, and checked.
"""

import hashlib
import inspect
import itertools
import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Int64
from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from vlmneurons.checks import Keywords, check_choice
from vlmneurons.errors import MismatchError, QuestionError
from vlmneurons.model.prompts import Prompts
from vlmneurons.model.sound_rows import Heard, hears_alone, sound_rows
from vlmneurons.model.vision_rows import (
    OF_PICTURES,
    Inputs,
    Rows,
    UnknownPadding,
    local_rows,
    real_patches,
    video_rows,
    vision_rows,
)
from vlmneurons.questions.media import picture_size
from vlmneurons.questions.question import Question
from vlmneurons.questions.sets import QuestionSet, bare_prompt
from vlmneurons.questions.streams import FRAMES_PER_SECOND

if TYPE_CHECKING:
    from vlmneurons.model.vlm import VLM

TOKEN_RULES = ("content", "image", "audio", "video", "text", "last")
"""Names of the built-in token rules; see `TokenTable.counted`."""

TOKENIZING = threading.RLock()
"""Held while a batch is encoded or generated texts are decoded: fast tokenizers refuse two threads at once."""


@dataclass(frozen=True)
class TokenTable:
    """What each token of a batch is.

    Attributes:
        ids: token ids.
        attention: a real token (not padding).
        image: a placeholder that an image's features take.
        special: one of the tokenizer's special tokens (image placeholders among them).
        template: added by the chat template or by the library, not by the question; None where that is not known,
            as for inputs that were not made by `VLM.prepare`.
        last: position of each row's last prompt token, whose logits are the answer's.
        audio: a placeholder that a sound's features take; None where there is no sound.
        video: a placeholder that a video's features take; None where there is no video.
    """

    ids: Int64[Tensor, "row token"]
    attention: Bool[Tensor, "row token"]
    image: Bool[Tensor, "row token"]
    special: Bool[Tensor, "row token"]
    template: Bool[Tensor, "row token"] | None
    last: Int64[Tensor, " row"]
    audio: Bool[Tensor, "row token"] | None = None
    video: Bool[Tensor, "row token"] | None = None

    @property
    def media(self) -> Bool[Tensor, "row token"]:
        """The placeholders that any picture's, sound's or video's features take."""
        streams = [mask for mask in (self.audio, self.video) if mask is not None]
        return torch.stack([self.image, *streams]).any(0)

    def counted(self, rule: "TokenRule") -> Bool[Tensor, "row token"]:
        """Which tokens a rule counts.

        Args:
            rule: ``"content"`` (all but padding, template and special tokens; images, sounds and videos count),
                ``"image"``, ``"audio"``, ``"video"``, ``"text"`` (content without these), ``"last"`` (the last prompt
                token), or a function of this table.

        Raises:
            QuestionError: no such rule, or a function's result has another shape or type.
        """
        if callable(rule):
            mask = rule(self)
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != self.ids.shape:
                got = f"{tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
                raise QuestionError(f"a token rule returns a bool tensor of shape {tuple(self.ids.shape)}; got {got}")
            return mask & self.attention
        none = torch.zeros_like(self.attention)
        shown = {"image": self.image, "audio": self.audio, "video": self.video}
        shown = {name: none if mask is None else mask & self.attention for name, mask in shown.items()}
        media = self.media & self.attention
        text = self.attention & ~self.special & ~media
        if self.template is not None:
            text = text & ~self.template
        if rule == "content":
            return text | media
        if rule in shown:
            return shown[rule]
        if rule == "text":
            return text
        if rule == "last":
            return torch.arange(self.ids.shape[1], device=self.ids.device) == self.last[:, None]
        raise QuestionError(f"tokens={rule!r} is not a token rule; choose from {', '.join(TOKEN_RULES)}, or a function")


TokenRule = str | Callable[[TokenTable], Bool[Tensor, "row token"]]


def check_token_rule(rule: object) -> None:
    """Refuse a name that is no token rule's, before anything is encoded.

    Raises:
        QuestionError: it is none.
    """
    if isinstance(rule, str) and rule not in TOKEN_RULES:
        raise QuestionError(f"tokens={rule!r} is not a token rule; choose from {', '.join(TOKEN_RULES)}")


class Shown(NamedTuple):
    """What towers are shown of a batch; see the attributes of `Batch`."""

    vision: tuple[int, ...] | None
    patches: Bool[Tensor, "row patch"] | None
    seen: tuple[tuple[int, ...], ...] | None
    heard: Heard | None
    is_whole: bool


class Batch(BatchFeature):
    """Model inputs that know what they are: ``model.hf(**batch)`` runs them.

    Attributes:
        tokens: what each token is.
        vision: for each row of the batch the number of leading-dimension rows of the vision tower that are its
            pictures' (patches, tiles, or pictures); None where that cannot be told.
        patches: which patches of each of the vision tower's rows are real; None where none is padding.
        pictures: for each row a digest of its pictures' pixels, in order, and of its sounds and videos: rows with the
            same one show the same; None where that is not known.
        seen: the numbers of `vision`, and after them those of videos, whose rows come after all pictures' (`vision` is
            None where there are videos); None where they cannot be told.
        heard: what of the audio tower's rows is whose; None where that cannot be told.
        is_whole: whether all that the vision tower sees is one question's, however many rows it is.
    """

    tokens: TokenTable
    vision: tuple[int, ...] | None
    patches: Bool[Tensor, "row patch"] | None
    pictures: tuple[bytes, ...] | None
    seen: tuple[tuple[int, ...], ...] | None
    heard: Heard | None
    is_whole: bool

    def __init__(
        self,
        data: Any,
        tokens: TokenTable,
        vision: tuple[int, ...] | None,
        patches: Bool[Tensor, "row patch"] | None = None,
        pictures: tuple[bytes, ...] | None = None,
        shown: Shown | None = None,
    ) -> None:
        super().__init__(data)
        self.tokens, self.pictures = tokens, pictures
        shown = shown or Shown(vision, patches, None if vision is None else (vision,), None, False)
        self.vision, self.patches, self.seen, self.heard, self.is_whole = shown


class Encoder:
    """Questions to `Batch`es, for one model's processor.

    Args:
        model: the model whose processor and configuration are used.
    """

    def __init__(self, model: "VLM") -> None:
        self.model = model
        self.processor = model.processor
        self.tokenizer = cast(PreTrainedTokenizerBase, getattr(self.processor, "tokenizer", self.processor))
        self.prompts: Prompts = model.prompts

    # -- text ----------------------------------------------------------------------------------------------------------

    def render(self, text: str, n_images: int, n_sounds: int = 0, n_videos: int = 0, *, bare: bool = False) -> str:
        """One user turn in the chat template, up to where the model's answer begins; the text alone where it is bare.

        Raises:
            QuestionError: the processor has no chat template, or it does not show the text as it is; or pictures are
                shown to a model or processor that takes none.
        """
        if n_images and self._takes_no_pictures:
            raise QuestionError(self._takes_no_pictures)
        for kind, n in (("sound", n_sounds), ("video", n_videos)):
            if n and (fault := self._takes_no_stream(kind)):
                raise QuestionError(fault)
        return self.prompts.render(text, n_images, n_sounds, n_videos, bare=bare)

    @cached_property
    def _takes_no_pictures(self) -> str:
        """Why questions with pictures cannot be asked; empty where they can. Else they would be asked blind, unsaid."""
        how = "; to ask without pictures: vlmneurons.study.controls.blind(questions)"
        if not _takes_pictures(self.processor):
            return (
                f"the questions show pictures, and {type(self.processor).__name__}, the VLM's processor, takes none: "
                f"VLM(model, AutoProcessor.from_pretrained(name)) gives it one that does{how}"
            )
        forward = inspect.signature(self.model.hf.forward).parameters
        seen = any(map(OF_PICTURES.search, forward)) or "input_ids" not in forward or "vision" in self.model.towers
        if not seen and getattr(self.model.hf.config, "vision_config", None) is None:
            return (
                f"the questions show pictures, and {type(self.model.hf).__name__} takes none: its forward has no "
                f"argument for them and its configuration no vision tower{how}"
            )
        return ""

    def _takes_no_stream(self, kind: str) -> str:
        """Why questions with sounds, or videos, cannot be asked; empty where they can."""
        name = {"sound": "audio", "video": "video"}[kind]
        pattern = re.compile("audio|feature|speech|sound" if kind == "sound" else "video")
        processor, hf = self.processor, self.model.hf
        if not any(callable(part) and pattern.search(found) for found, part in vars(processor).items()):
            return f"the questions have {name}, and {type(processor).__name__}, the VLM's processor, takes no {kind}s"
        if kind == "sound" and not any(map(pattern.search, inspect.signature(processor.__call__).parameters)):
            return (
                f"the questions have audio, and {type(processor).__name__} takes sounds in its own apply_chat_template "
                "alone, where no tokens of a question can be told: give the VLM a processor that is called with text= "
                "and audio="
            )
        arguments = inspect.signature(hf.forward).parameters
        taken = pattern if kind == "sound" else re.compile("video|pixel|image")  # some take frames as pictures
        if "input_ids" in arguments and not any(map(taken.search, arguments)):
            what = "its forward has no argument for them"
            return f"the questions have {name}, and {type(hf).__name__} takes no {kind}s: {what}"
        return ""

    def prompt_of(self, asked: QuestionSet, item: Question) -> str:
        """A question's prompt, as the set says that it is asked.

        Args:
            asked: the set.
            item: one of its questions.
        """
        text = asked.prompt(item, [item.options[index] for index in asked.order(item)])
        return self.render(text, *item.n_media, bare=asked.prompt is bare_prompt)

    def _adds_special(self, rendered: str) -> bool:
        # As in transformers' own apply_chat_template(tokenize=True): a template that writes the beginning-of-text
        # token itself must not be given a second one.
        if self._by_default("text_kwargs", "add_special_tokens") is False:
            return False  # the processor puts them where they belong itself, as Florence-2's does
        bos = getattr(self.tokenizer, "bos_token", None)
        return not (bos and rendered.startswith(bos))

    def _by_default(self, kind: str, name: str) -> Any:
        """A setting that the processor has where a call does not give it; None if it has none of its own.

        Processors keep it in an attribute, alone or among others of its kind; until transformers 5.22 they kept all in
        a table of the class that declares what they take.
        """
        table = getattr(getattr(self.processor, "valid_processor_kwargs", None), "_defaults", None) or {}
        for settings in (getattr(self.processor, kind, None), table.get(kind)):
            if isinstance(settings, Mapping) and name in settings:
                return settings[name]
        return getattr(self.processor, name, None)

    def token_ids(self, rendered: str) -> list[int]:
        """Ids of a rendered prompt with its image placeholders unexpanded."""
        return self.all_token_ids([rendered])[0]

    def all_token_ids(self, rendered: Sequence[str]) -> list[list[int]]:
        """Those of several, in one call of the tokenizer, which costs far less than one each."""
        special = set(map(self._adds_special, rendered))
        if len(special) != 1:
            return [self.token_ids(text) for text in rendered]
        return list(map(list, self.tokenizer(list(rendered), add_special_tokens=special.pop())["input_ids"]))

    # -- batches -------------------------------------------------------------------------------------------------------

    def __call__(self, questions: QuestionSet, *, padding_side: str = "left") -> Batch:
        """Encode questions, one row each, on the model's device.

        Args:
            questions: what to ask, and how.
            padding_side: ``"left"`` (as generation needs) or ``"right"``; the questions of an encoder-decoder model,
                whose answers begin in its decoder, are always padded on the right.

        Raises:
            QuestionError: a picture cannot be opened, the text holds the model's image placeholder, or text-only
                questions are mixed with others.
        """
        return self.rows(questions, list(questions), [""] * len(questions), padding_side=padding_side)

    def length(self, asked: QuestionSet, item: Question) -> int:
        """About how many tokens a question has, for putting questions of like length together.

        Pictures are not decoded: their sizes are in their first bytes, and processors of transformers tell how many
        tokens a size takes. Where that is not known, or a picture cannot be opened, it counts nothing.

        Args:
            asked: the set that says how the questions are asked.
            item: the question.
        """
        with TOKENIZING:
            n_text = len(self.token_ids(self.prompt_of(asked, item)))
        try:
            sizes = [picture_size(source) for source in item.pictures]
            n_image = sum(getattr(self.processor, _N_TOKENS)(image_sizes=sizes).num_image_tokens)
            return n_text - len(sizes) + n_image  # in the place of one placeholder each
        except Exception:  # only the order of the work depends on it; what cannot be asked is named when its turn comes
            return n_text

    def rows(
        self,
        asked: QuestionSet,
        items: Sequence[Question],
        added: Sequence[str],
        *,
        padding_side: str = "left",
        rendered: Sequence[str] | None = None,
    ) -> Batch:
        """Encode rows, each a question and text to append to its rendered prompt.

        Args:
            asked: the set that says how the questions are asked.
            items: question of each row; a question may stand in several rows.
            added: text that follows each row's prompt; its tokens are never counted.
            padding_side: ``"left"`` or ``"right"``.
            rendered: the rows' prompts, where these are known; see `prompt_of`.

        Raises:
            QuestionError: as for the encoding of questions.
        """
        if not items:
            raise QuestionError("there are no questions to encode")
        check_choice("padding_side", padding_side, ("left", "right"), QuestionError)
        if self.model.is_encoder_decoder:
            padding_side = "right"  # its encoder may count positions from the first token; its answer begins elsewhere
        with TOKENIZING:
            return self._rows(asked, items, added, padding_side, rendered)

    def _rows(
        self,
        asked: QuestionSet,
        items: Sequence[Question],
        added: Sequence[str],
        padding_side: str,
        rendered: Sequence[str] | None,
    ) -> Batch:
        bare = asked.prompt is bare_prompt
        texts = [self._text_of(asked, item) for item in items]
        if rendered is None:
            rendered = [self.render(text, *item.n_media, bare=bare) for item, text in zip(items, texts, strict=True)]
        opened = {item.id: self._opened(item) for item in items}
        shown = [opened[item.id] for item in items]
        if len({bool(row.pictures) for row in shown}) > 1:
            raise QuestionError("questions with and without a picture cannot share a batch: encode them apart")
        if len({tuple(map(bool, item.n_media)) for item in items}) > 1:
            raise QuestionError("questions with and without a sound or video cannot share a batch: encode them apart")
        texts = [text + more for text, more in zip(rendered, added, strict=True)]
        try:
            data = self._process(texts, shown, padding_side)
        except Exception as error:
            if len(items) > 1:  # say whose fault it is, if it is one question's
                for item, more in zip(items, added, strict=True):
                    self.rows(asked, [item], [more], padding_side=padding_side)
            whose = f"question {items[0].id!r}: the processor refuses it"
            together = "the processor refuses these questions together"
            told = f"{whose if len(items) == 1 else together} ({type(error).__name__}: {error})"
            raise QuestionError(told) from error
        self._refuse_lost(data, shown)
        attention, ids = data["attention_mask"].bool(), data["input_ids"]
        image, audio, video = self._media_masks(data, items, shown)
        self._refuse_together(data, shown, video is not None)
        special = torch.isin(ids, torch.tensor(sorted(self._special_ids), dtype=ids.dtype))
        template = torch.ones_like(attention)
        last = torch.zeros(len(ids), dtype=torch.int64)
        for row, (item, text, more) in enumerate(zip(items, rendered, added, strict=True)):
            places = attention[row].nonzero().flatten()
            own, n_added = self._content_tokens(ids[row, places].tolist(), text, more, item, bare)
            template[row, places[own]] = False
            last[row] = places[len(places) - n_added - 1]
        tokens = TokenTable(ids, attention, image, special, template, last, audio, video)
        tokens = replace(tokens, template=template & ~tokens.media)
        alone = lambda n: self._process([texts[n]], [shown[n]], padding_side)  # noqa: E731
        of_towers = self._shown_to_towers(data, shown, tokens, alone)
        digests = {name: _digest(row) for name, row in opened.items()}
        seen_as = tuple(digests[item.id] for item in items)
        if padding_side == "left" and self._counts_positions:
            data["position_ids"] = (attention.cumsum(1) - 1).clamp(min=0)  # else padding would be counted
        made = Batch(dict(data), tokens, None, None, seen_as, of_towers)
        return cast(Batch, made.to(self.model.device))

    def _refuse_together(self, data: Inputs, shown: Sequence["_Shown"], has_videos: bool) -> None:
        """Refuse sounds and videos of different lengths in one batch, where what is asked would depend on the longest.

        Raises:
            QuestionError: it would.
        """
        lengths = {tuple(map(len, row.videos)) for row in shown}
        if has_videos and "pixel_values_videos" not in data and len(lengths) > 1:
            # SmolVLM's processor writes the number of frames of the longest video into every prompt.
            raise QuestionError(
                f"{type(self.processor).__name__} makes other prompts of videos where it sees longer ones beside them: "
                "encode videos with different numbers of frames apart (batch_size=1)"
            )
        if hears_alone(self.model.hf.config) and len({len(sound) for row in shown for sound in row.sounds}) > 1:
            raise QuestionError(
                f"{type(self.model.hf).__name__} hears in a sound what fills it up to the length of others beside it: "
                "encode sounds of different lengths apart (batch_size=1)"
            )

    def _text_of(self, asked: QuestionSet, item: Question) -> str:
        """A question's text as the set's prompt has it, which may hold no placeholder of its own."""
        text = asked.prompt(item, [item.options[index] for index in asked.order(item)])
        if not isinstance(text, str):
            raise QuestionError(f"question {item.id!r}: the prompt function gave {type(text).__name__}, not a text")
        for placeholder in self._placeholders:
            if placeholder in text:
                raise QuestionError(f"question {item.id!r}: its text holds the image placeholder {placeholder!r}")
        return text

    def _opened(self, item: Question) -> "_Shown":
        """What a question shows; sounds at the rate that the processor expects."""
        sounds = list(item.load_audio(self._sampling_rate)) if item.sounds else []
        return _Shown(list(item.load_images()), sounds, list(item.load_videos()))

    def _refuse_lost(self, data: Inputs, shown: Sequence["_Shown"]) -> None:
        """Refuse pictures of which the processor made nothing, or that a row would not see alone."""
        if any(row.pictures for row in shown) and not any(map(OF_PICTURES.search, data)):
            raise QuestionError(
                f"{type(self.processor).__name__} made nothing of the questions' pictures: it gave {', '.join(data)}"
            )
        if "aspect_ratio_mask" in data and len({len(row.pictures) for row in shown}) > 1:
            # In Mllama what stands before a picture sees all of the row, the pictures that another row has more too.
            raise QuestionError(
                f"{type(self.model.hf).__name__} lets the padding of questions with fewer pictures through to their "
                "words: encode questions with different numbers of pictures apart"
            )

    @cached_property
    def _counts_positions(self) -> bool:
        """Whether the decoder looks positions up in a table, or weighs attention by them, and not by distances alone.

        It counts them from the first column, padding or not, unless it is told.
        """
        hf = self.model.hf
        if self.model.is_encoder_decoder or "position_ids" not in inspect.signature(type(hf).forward).parameters:
            return False
        words, decoder = hf.get_input_embeddings(), hf.get_decoder() if hasattr(hf, "get_decoder") else hf
        config = hf.config.get_text_config()
        most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or math.inf
        tables = (one for one in decoder.modules() if isinstance(one, nn.Embedding) and one is not words)
        # Llama 4, Ministral 3 and Mistral 4 weigh by a setting, Mistral Large 4 by numbers that are learned.
        set_so = "llama_4_scaling_beta" in (getattr(config, "rope_parameters", None) or ())
        weighs = set_so or getattr(config, "attn_temperature_tuning", False)
        learned = any(table.num_embeddings >= most for table in tables)
        return bool(weighs) or learned or any(map(_weighs_by_position, decoder.modules()))

    @cached_property
    def _sampling_rate(self) -> int:
        """The rate at which the processor expects sounds."""
        parts = (getattr(self.processor, name, None) for name in ("feature_extractor", "audio_processor"))
        rates = (getattr(part, "sampling_rate", None) or getattr(part, "sample_rate", None) for part in parts)
        return int(next((rate for rate in rates if rate), 16_000))

    def _media_masks(
        self, data: Inputs, items: Sequence[Question], shown: Sequence["_Shown"]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Which tokens are placeholders of pictures, of sounds, and of videos; None where there are none.

        Raises:
            QuestionError: a question shows something, and its prompt has no placeholder for it; a model that takes
                frames as pictures is shown both; or the processor writes one video's length into other prompts.
        """
        image, masks = self._image_mask(data), []
        for place, kind in ((1, "audio"), (2, "video")):
            has = [bool(item.n_media[place]) for item in items]
            number = self._placeholder_id(kind)
            mask = None if number is None else data["input_ids"] == number
            if kind == "video" and any(has) and (mask is None or not mask.any()) and image.any():
                if any(item.n_images for item in items):
                    raise QuestionError(
                        f"{type(self.model.hf).__name__} takes a video's frames as pictures, which cannot be told from "
                        f"the pictures of question {items[0].id!r}: ask with one of the two"
                    )
                mask, image = image, torch.zeros_like(image)
            if any(has) and (mask is None or not mask.any(1).all()):
                raise QuestionError(f"question {items[0].id!r}: its prompt has no placeholder for its {kind}")
            masks.append(mask if any(has) else None)
        frames = {tuple(map(len, row.videos)) for row in shown}
        if masks[1] is not None and "pixel_values_videos" not in data and len(frames) > 1:
            # SmolVLM's processor writes the number of frames of the longest video into every prompt.
            raise QuestionError(
                f"{type(self.processor).__name__} makes other prompts of videos where it sees longer ones beside them: "
                "encode videos with different numbers of frames apart (batch_size=1)"
            )
        there = image.any(1).tolist()
        blind = [item.id for item, placed in zip(items, there, strict=True) if item.n_images and not placed]
        if blind and any(there):
            raise QuestionError(
                f"question {blind[0]!r}: its prompt has no placeholder for its pictures: see the template"
            )
        return image, masks[0], masks[1]

    def _process(self, texts: Sequence[str], shown: Sequence["_Shown"], padding_side: str) -> BatchFeature:
        """What the processor makes of texts, their placeholders unexpanded, and of what each one shows."""
        pictures = [row.pictures for row in shown]
        sounds = [sound for row in shown for sound in row.sounds]
        videos = [video for row in shown for video in row.videos]
        more: Keywords = {"audio": sounds, "sampling_rate": self._sampling_rate} if sounds else {}
        if videos:  # all frames: which of a file's are seen was decided when it was opened
            about = {len(one): {"fps": FRAMES_PER_SECOND, "total_num_frames": len(one)} for one in videos}
            known = [{**about[len(one)], "frames_indices": list(range(len(one)))} for one in videos]
            more |= {"videos": videos, "do_sample_frames": False, "video_metadata": known}
        if any(pictures) and self._asks_for_types:
            more["return_mm_token_type_ids"] = True
        images: Any = pictures
        if self._by_default("images_kwargs", "multi_page") is False:
            # GOT-OCR: a list of lists would be pages of documents.
            images = [picture for row in pictures for picture in row]
        data = self.processor(
            **({"images": images} if any(pictures) else {}),
            **more,
            text=list(texts),
            padding=True,
            padding_side=padding_side,
            add_special_tokens=self._adds_special(texts[0]),
            return_tensors="pt",
        )
        if padding_side == "left" and isinstance(mask := data.get("qformer_attention_mask"), Tensor):
            # A Q-Former counts positions from the first column, padding and all: its words begin there (InstructBLIP).
            order = mask.argsort(dim=1, descending=True, stable=True)
            for name in ("qformer_input_ids", "qformer_attention_mask"):
                data[name] = data[name].gather(1, order)
        data.pop("labels", None)  # PaliGemma's are for training: with them a forward computes a loss
        wanted = self.model.hf.dtype
        for name, value in data.items():  # Llama 4's pixels are bfloat16, whatever the model is
            if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) and value.dtype != wanted:
                data[name] = value.to(wanted)
        return data if isinstance(data, BatchFeature) else BatchFeature(dict(data))  # a tokenizer's are of a third kind

    @cached_property
    def _asks_for_types(self) -> bool:
        """Whether the model wants to know which tokens are pictures', and its processor says so only when asked."""
        arguments = inspect.signature(self.model.hf.forward).parameters
        silent = self._by_default("text_kwargs", "return_mm_token_type_ids") is False
        return silent and "mm_token_type_ids" in arguments and isinstance(self.processor, ProcessorMixin)

    def _content_tokens(
        self, ids: list[int], rendered: str, more: str, item: Question, bare: bool
    ) -> tuple[Tensor, int]:
        """Positions (among a row's real tokens) of the user's own text, and how many tokens a continuation added.

        The unexpanded prompt is tokenized with character offsets and laid against the expanded tokens from both ends:
        all that differs is the image placeholder's expansion.
        """
        before, after = (self.render("", *item.n_media, bare=True), "") if bare else self.prompts.frame(*item.n_media)
        text = rendered[len(before) : len(rendered) - len(after)]
        # What processors do besides: a space after a picture that a word follows directly (Idefics2), and the end of a
        # line (PaliGemma) or of the text (Florence-2) after the prompt, which no continuation can then follow.
        ends = [] if more else ["\n", getattr(self.tokenizer, "eos_token", None) or ""]
        for inserted, end in (("", ""), (" ", ""), *(("", end) for end in ends)):
            prompt = before + inserted + text + after + end
            found = self._aligned(ids, prompt, more, len(before + inserted), len(before + inserted + text))
            if found is not None:
                return found
        if more:
            raise QuestionError(
                f"question {item.id!r}: {type(self.processor).__name__} puts text of its own after the prompt, so no "
                "text of an option continues it; read answers by letters or generation"
            )
        raise QuestionError(
            f"question {item.id!r}: the processor rewrote the question's own text, so its tokens cannot be "
            "told from the template's; count with a token rule of your own (tokens=function)"
        )

    def _aligned(self, ids: list[int], prompt: str, more: str, start: int, end: int) -> tuple[Tensor, int] | None:
        """What `_content_tokens` gives, if a prompt was tokenized to these ids; its own text is at ``[start, end)``."""
        special = self._adds_special(prompt)
        try:
            plain = self.tokenizer(prompt + more, add_special_tokens=special, return_offsets_mapping=True)
        except NotImplementedError as error:
            raise QuestionError(
                f"{type(self.tokenizer).__name__} gives no character offsets, so template tokens cannot be told from "
                "the question's: use a fast tokenizer"
            ) from error
        theirs, offsets = list(plain["input_ids"]), plain["offset_mapping"]
        n_prompt = len(self.token_ids(prompt)) if more else len(theirs)
        # The ends are compared first: what a placeholder grows to stands before the question's text in most templates.
        # All that lies in the shared end or beginning is where it was; a token of the text between them was rewritten.
        tail = _common(reversed(theirs), reversed(ids))
        head = _common(theirs, ids) if tail < len(theirs) else 0
        if tail < len(theirs) - n_prompt:
            return None
        own = []
        for position, (left, right) in enumerate(offsets):
            if right <= start or left >= end or right <= left or position >= n_prompt:
                continue
            if position >= len(theirs) - tail:
                own.append(len(ids) - len(theirs) + position)
            elif position < head:
                own.append(position)
            else:
                return None
        return torch.tensor(own, dtype=torch.int64), len(theirs) - n_prompt

    @property
    def _placeholders(self) -> tuple[str, ...]:
        found = (getattr(source, name, None) for source in (self.processor, self.tokenizer) for name in _TOKEN_NAMES)
        return tuple(dict.fromkeys(str(token) for token in found if token))

    @property
    def _special_ids(self) -> set[int]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {*self.tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}

    def _placeholder_id(self, kind: str) -> int | None:
        """The token that stands for images, sounds or videos, as the configuration or else the processor says."""
        names = (f"{kind}_token_id", f"{kind}_token_index")
        found = (getattr(one, name, None) for one in (self.model.hf.config, self.processor) for name in names)
        return next((one for one in found if isinstance(one, int)), None)

    def _image_mask(self, data: Inputs) -> Bool[Tensor, "row token"]:
        ids, number = data["input_ids"], self._placeholder_id("image")
        if "mm_token_type_ids" in data:
            # A video may have the same placeholder; what stands around and between an image's counts as its own here.
            image = data["mm_token_type_ids"] == 1
            placeholder = image & (ids == number)
            return placeholder if placeholder.any() else image
        return torch.zeros_like(ids, dtype=torch.bool) if number is None else ids == number

    def _shown_to_towers(
        self, data: Inputs, shown: Sequence["_Shown"], tokens: TokenTable, alone: Callable[[int], Inputs]
    ) -> Shown:
        """What of the rows of the towers that see and hear is each question's."""
        config, pictures = self.model.hf.config, [row.pictures for row in shown]
        vision, patches = self._vision_rows(data, pictures, alone) or (None, None)
        seen, local = None if vision is None else (vision,), local_rows(data, [len(row) for row in pictures])
        if vision is not None and local is not None:
            vision, seen = None, (vision, local)
        elif tokens.video is not None:
            videos = video_rows(data, [[len(one) for one in row.videos] for row in shown], config)
            seen = None if vision is None or patches is not None or videos is None else (vision, videos[0])
            vision, patches = None, None if seen is None or videos is None else videos[1]
        whole = len(pictures) == 1 and seen is None and tokens.video is None
        whole = whole and isinstance(data.get("pixel_values"), Tensor)
        if whole:  # whatever the tower sees is this question's, if only its padding is known
            try:
                patches = real_patches(data, config)
            except UnknownPadding:
                whole = False
        n_tokens = None if tokens.audio is None else tokens.audio.sum(1).tolist()
        sounds = sound_rows(data, [len(row.sounds) for row in shown], n_tokens, config)
        return Shown(vision, patches, seen, sounds, whole)

    def _vision_rows(
        self, data: Inputs, pictures: Sequence[Sequence[Image.Image]], alone: Callable[[int], Inputs]
    ) -> Rows | None:
        """Which rows of the vision tower belong to each question; see `vision_rows`."""

        def tiles() -> Sequence[int] | None:
            count = getattr(self.processor, _N_TOKENS, None)
            sizes = [(picture.height, picture.width) for row in pictures for picture in row]
            try:
                return None if count is None else getattr(count(image_sizes=sizes), "num_image_patches", None)
            except Exception:  # it is nowhere promised: then each question is encoded on its own
                return None

        return vision_rows(data, [len(row) for row in pictures], self.model.hf.config, alone, tiles)


_N_TOKENS = "_get_num_multimodal_tokens"
"""By which transformers' processors tell how many tokens and tiles a size of pictures takes; promised nowhere."""

_TOKEN_NAMES = ("image_token", "video_token", "audio_token", "boi_token", "image_pad_token")


_OF_ATTENTION = ("attention_mask", "position_embeddings", "inputs_embeds")


def _weighs_by_position(module: nn.Module) -> bool:
    """Whether a module has numbers of its own for positions, and is neither an attention nor a rotary embedding."""
    taken = inspect.signature(module.forward).parameters
    has_numbers = any(True for _ in module.parameters(recurse=False))
    return has_numbers and "position_ids" in taken and taken.keys().isdisjoint(_OF_ATTENTION)


def _takes_pictures(processor: Any) -> bool:
    """Whether a processor makes something of pictures, as far as can be told: one of an unknown kind is believed."""
    if isinstance(processor, PreTrainedTokenizerBase):
        return False
    if isinstance(processor, ProcessorMixin):
        return any(callable(part) and OF_PICTURES.search(name) for name, part in vars(processor).items())
    arguments = inspect.signature(processor.__call__).parameters
    return "images" in arguments or any(one.kind is one.VAR_KEYWORD for one in arguments.values())


class _Shown(NamedTuple):
    """What a question shows, opened."""

    pictures: list[Image.Image]
    sounds: list[Any]
    videos: list[Any]


def _digest(shown: _Shown) -> bytes:
    """Of the pixels that pictures show, and of what sounds and videos hold."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (*shown.sounds, *shown.videos):
        digest.update(repr((part.dtype, part.shape)).encode())
        digest.update(part.tobytes())
    for picture in shown.pictures:
        digest.update(repr((picture.mode, picture.size)).encode())
        digest.update(picture.tobytes())
    return digest.digest()


def _common(one: Iterable[int], other: Iterable[int]) -> int:
    """How many leading elements two iterables share."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def free_tokens(model: "VLM", arguments: Keywords, length: int) -> TokenTable | None:
    """The token table of a run that the library did not prepare, from the arguments of the model's forward.

    The chat template cannot be known here: ``template`` is None, so its words count as text.

    Args:
        model: the model.
        arguments: keyword arguments of the forward.
        length: number of tokens that the decoder sees in this step.
    """
    ids = arguments.get("input_ids")
    if ids is None:
        return None
    ids = ids[:, -length:]
    attention = arguments.get("attention_mask")
    attention = torch.ones_like(ids) if attention is None or attention.ndim != 2 else attention[:, -length:]
    encoder = model.encoder
    if ids.shape[1] != length or attention.shape != ids.shape:
        raise MismatchError(f"the decoder sees {length} tokens, but input_ids has {ids.shape[1]}")
    special = torch.isin(ids, torch.tensor(sorted(encoder._special_ids), dtype=ids.dtype, device=ids.device))
    types = arguments.get("mm_token_type_ids")
    data = {"input_ids": ids, **({"mm_token_type_ids": types[:, -length:]} if types is not None else {})}
    present = attention.bool()
    positions = torch.arange(length, device=ids.device)
    last = torch.where(present, positions, -1).amax(1)
    return TokenTable(ids, present, encoder._image_mask(data), special, None, last)
