"""From questions to model inputs, and which token of them is what.

The one place that knows how a prompt becomes tokens. A processor expands one image placeholder to hundreds of tokens
and wraps the user's text in a chat template; which tokens are the picture, which the user's words, and which only
template, padding or special tokens decides what is counted, so it is worked out here, once, per token, and checked.
"""

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int64
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from vlmneurons.errors import MismatchError, QuestionError
from vlmneurons.questions import Question, QuestionSet, picture_size

if TYPE_CHECKING:
    from vlmneurons.model import VLM

TOKEN_RULES = ("content", "image", "text", "last")
"""Names of the built-in token rules; see `TokenTable.counted`."""

TOKENIZING = threading.RLock()
"""Held while a batch is encoded or generated texts are decoded: fast tokenizers refuse two threads at once."""

_MARK = "QUESTIONTEXTGOESHERE"


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
    """

    ids: Int64[Tensor, "row token"]
    attention: Bool[Tensor, "row token"]
    image: Bool[Tensor, "row token"]
    special: Bool[Tensor, "row token"]
    template: Bool[Tensor, "row token"] | None
    last: Int64[Tensor, " row"]

    def counted(self, rule: "TokenRule") -> Bool[Tensor, "row token"]:
        """Which tokens a rule counts.

        Args:
            rule: ``"content"`` (all but padding, template and special tokens; images count), ``"image"``, ``"text"``
                (content without images), ``"last"`` (the last prompt token), or a function of this table.

        Raises:
            QuestionError: no such rule, or a function's result has another shape or type.
        """
        if callable(rule):
            mask = rule(self)
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != self.ids.shape:
                got = f"{tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
                raise QuestionError(f"a token rule returns a bool tensor of shape {tuple(self.ids.shape)}; got {got}")
            return mask & self.attention
        text = self.attention & ~self.special & ~self.image
        if self.template is not None:
            text = text & ~self.template
        if rule == "content":
            return text | (self.image & self.attention)
        if rule == "image":
            return self.image & self.attention
        if rule == "text":
            return text
        if rule == "last":
            return torch.arange(self.ids.shape[1], device=self.ids.device) == self.last[:, None]
        raise QuestionError(f"tokens={rule!r} is not a token rule; choose from {', '.join(TOKEN_RULES)}, or a function")


TokenRule = str | Callable[[TokenTable], Bool[Tensor, "row token"]]


class Batch(BatchFeature):
    """Model inputs that know what they are: ``model.hf(**batch)`` runs them.

    Attributes:
        tokens: what each token is.
        vision: for each row of the batch the number of leading-dimension rows of the vision tower that are its
            pictures' (patches, or crops); None where that cannot be told.
        pictures: for each row a digest of its pictures' pixels, in order: rows with the same one show the same; None
            where that is not known.
    """

    tokens: TokenTable
    vision: tuple[int, ...] | None
    pictures: tuple[bytes, ...] | None

    def __init__(
        self,
        data: Any,
        tokens: TokenTable,
        vision: tuple[int, ...] | None,
        pictures: tuple[bytes, ...] | None = None,
    ) -> None:
        super().__init__(data)
        self.tokens = tokens
        self.vision = vision
        self.pictures = pictures


class Encoder:
    """Questions to `Batch`es, for one model's processor.

    Args:
        model: the model whose processor and configuration are used.
    """

    def __init__(self, model: "VLM") -> None:
        self.model = model
        self.processor = model.processor
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self._frames: dict[int, tuple[str, str]] = {}

    # -- text ----------------------------------------------------------------------------------------------------------

    def render(self, text: str, n_images: int) -> str:
        """One user turn in the chat template, up to where the model's answer begins.

        Raises:
            QuestionError: the processor has no chat template.
        """
        if self.model.template is not None:
            rendered = self.model.template(text, n_images)
            if not isinstance(rendered, str):
                raise QuestionError(f"the template function gave {type(rendered).__name__}, not a text")
            return rendered
        own = getattr(self.processor, "chat_template", None)
        template = own or getattr(self.tokenizer, "chat_template", None)
        if template is None:
            raise QuestionError(
                f"the processor {type(self.processor).__name__} has no chat template; give VLM(…, template=function), "
                "where function(text, n_images) returns the whole prompt with its image placeholders"
            )
        content = [{"type": "image"}] * n_images + [{"type": "text", "text": text}]
        message = [{"role": "user", "content": content}]
        how = {} if own else {"chat_template": template}  # a processor does not look at its tokenizer's
        rendered = self.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False, **how)
        if text not in rendered and text.strip() not in rendered:
            # Templates of text-only models join or drop a list of parts: never ask a question that is not there.
            raise QuestionError("the chat template does not show the question's text: it may expect plain strings")
        return rendered

    def _frame(self, n_images: int) -> tuple[str, str]:
        """What the template puts before and after the user's text."""
        if n_images not in self._frames:
            parts = self.render(_MARK, n_images).split(_MARK)
            if len(parts) != 2:
                raise QuestionError(
                    f"the chat template shows the user's text {len(parts) - 1} times; expected once. "
                    "Give VLM(…, template=function) instead"
                )
            self._frames[n_images] = (parts[0], parts[1])
        return self._frames[n_images]

    def _adds_special(self, rendered: str) -> bool:
        # As in transformers' own apply_chat_template(tokenize=True): a template that writes the beginning-of-text
        # token itself must not be given a second one.
        bos = getattr(self.tokenizer, "bos_token", None)
        return not (bos and rendered.startswith(bos))

    def token_ids(self, rendered: str) -> list[int]:
        """Ids of a rendered prompt with its image placeholders unexpanded."""
        return list(self.tokenizer(rendered, add_special_tokens=self._adds_special(rendered))["input_ids"])

    # -- batches -------------------------------------------------------------------------------------------------------

    def __call__(self, questions: QuestionSet, *, padding_side: str = "left") -> Batch:
        """Encode questions, one row each, on the model's device.

        Args:
            questions: what to ask, and how.
            padding_side: ``"left"`` (as generation needs) or ``"right"``.

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
        shown = [item.options[index] for index in asked.order(item)]
        with TOKENIZING:
            n_text = len(self.token_ids(self.render(asked.prompt(item, shown), item.n_images)))
        try:
            sizes = [picture_size(source) for source in item._sources]
            n_image = sum(self.processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens)
            return n_text - len(sizes) + n_image  # in the place of one placeholder each
        except Exception:  # only the order of the work depends on it; what cannot be asked is named when its turn comes
            return n_text

    def rows(
        self, asked: QuestionSet, items: Sequence[Question], added: Sequence[str], *, padding_side: str = "left"
    ) -> Batch:
        """Encode rows, each a question and text to append to its rendered prompt.

        Args:
            asked: the set that says how the questions are asked.
            items: question of each row; a question may stand in several rows.
            added: text that follows each row's prompt; its tokens are never counted.
            padding_side: ``"left"`` or ``"right"``.

        Raises:
            QuestionError: as for the encoding of questions.
        """
        if not items:
            raise QuestionError("there are no questions to encode")
        with TOKENIZING:
            return self._rows(asked, items, added, padding_side)

    def _rows(self, asked: QuestionSet, items: Sequence[Question], added: Sequence[str], padding_side: str) -> Batch:
        texts = [asked.prompt(item, [item.options[index] for index in asked.order(item)]) for item in items]
        for item, text in zip(items, texts, strict=True):
            if not isinstance(text, str):
                raise QuestionError(f"question {item.id!r}: the prompt function gave {type(text).__name__}, not a text")
            for placeholder in self._placeholders:
                if placeholder in text:
                    raise QuestionError(f"question {item.id!r}: its text holds the image placeholder {placeholder!r}")
        rendered = [self.render(text, item.n_images) for item, text in zip(items, texts, strict=True)]
        opened = {item.id: list(item.load_images()) for item in items}
        pictures = [opened[item.id] for item in items]
        with_picture = [bool(part) for part in pictures]
        if any(with_picture) and not all(with_picture):
            raise QuestionError("questions with and without a picture cannot share a batch: encode them apart")
        try:
            data = self.processor(
                **({"images": pictures} if all(with_picture) else {}),
                text=[text + more for text, more in zip(rendered, added, strict=True)],
                padding=True,
                padding_side=padding_side,
                add_special_tokens=self._adds_special(rendered[0]),
                return_tensors="pt",
            )
        except Exception as error:
            if len(items) > 1:  # say whose fault it is, if it is one question's
                for item, more in zip(items, added, strict=True):
                    self.rows(asked, [item], [more], padding_side=padding_side)
            raise QuestionError(
                f"question {items[0].id!r}: the processor refuses it ({type(error).__name__}: {error})"
                if len(items) == 1
                else f"the processor refuses these questions together ({type(error).__name__}: {error})"
            ) from error
        attention = data["attention_mask"].bool()
        ids = data["input_ids"]
        image = self._image_mask(data)
        special = torch.isin(ids, torch.tensor(sorted(self._special_ids), dtype=ids.dtype))
        template = torch.ones_like(attention)
        last = torch.zeros(len(ids), dtype=torch.int64)
        for row, (item, text, more) in enumerate(zip(items, rendered, added, strict=True)):
            places = attention[row].nonzero().flatten()
            own, n_added = self._content_tokens(ids[row, places].tolist(), text, more, item)
            template[row, places[own]] = False
            last[row] = places[len(places) - n_added - 1]
        tokens = TokenTable(ids, attention, image, special, template & ~image, last)
        digests = {name: _digest(part) for name, part in opened.items()}
        vision = self._vision_rows(data, [len(part) for part in pictures])
        return Batch(dict(data), tokens, vision, tuple(digests[item.id] for item in items)).to(self.model.device)

    def _content_tokens(self, ids: list[int], rendered: str, more: str, item: Question) -> tuple[Tensor, int]:
        """Positions (among a row's real tokens) of the user's own text, and how many tokens a continuation added.

        The unexpanded prompt is tokenized with character offsets and laid against the expanded tokens from both ends:
        all that differs is the image placeholder's expansion.
        """
        before, after = self._frame(item.n_images)
        start, end = len(before), len(rendered) - len(after)
        try:
            plain = self.tokenizer(
                rendered + more, add_special_tokens=self._adds_special(rendered), return_offsets_mapping=True
            )
        except NotImplementedError as error:
            raise QuestionError(
                f"{type(self.tokenizer).__name__} gives no character offsets, so template tokens cannot be told from "
                "the question's: use a fast tokenizer"
            ) from error
        theirs, offsets = list(plain["input_ids"]), plain["offset_mapping"]
        n_prompt = len(self.token_ids(rendered)) if more else len(theirs)
        tail = _common(reversed(theirs), reversed(ids))
        head = _common(iter(theirs), iter(ids)) if tail < len(theirs) else 0
        own = []
        for position, (left, right) in enumerate(offsets):
            if right <= start or left >= end or right <= left or position >= n_prompt:
                continue
            if position >= len(theirs) - tail:
                own.append(len(ids) - len(theirs) + position)
            elif position < head:
                own.append(position)
            else:
                raise QuestionError(
                    f"question {item.id!r}: the processor rewrote the question's own text, so its tokens cannot be "
                    "told from the template's; count with a token rule of your own (tokens=function)"
                )
        return torch.tensor(own, dtype=torch.int64), len(theirs) - n_prompt

    @property
    def _placeholders(self) -> tuple[str, ...]:
        found = (getattr(source, name, None) for source in (self.processor, self.tokenizer) for name in _TOKEN_NAMES)
        return tuple(dict.fromkeys(str(token) for token in found if token))

    @property
    def _special_ids(self) -> set[int]:
        ids = set(self.tokenizer.all_special_ids)
        for number, token in getattr(self.tokenizer, "added_tokens_decoder", {}).items():
            if token.special:
                ids.add(number)
        return ids

    def _image_mask(self, data: Any) -> Bool[Tensor, "row token"]:
        ids = data["input_ids"]
        if "mm_token_type_ids" in data:
            return data["mm_token_type_ids"] == 1
        config = self.model.hf.config
        for source, name in (
            (config, "image_token_id"),
            (config, "image_token_index"),
            (self.processor, "image_token_id"),
        ):
            number = getattr(source, name, None)
            if isinstance(number, int):
                return ids == number
        return torch.zeros_like(ids, dtype=torch.bool)

    def _vision_rows(self, data: Any, n_images: Sequence[int]) -> tuple[int, ...] | None:
        """How many rows of the vision tower's leading dimension belong to each question, in order."""
        if sum(n_images) == 0:
            return (0,) * len(n_images)
        pixels = data.get("pixel_values")
        per_image: list[int] | None = None
        if "image_grid_thw" in data:
            per_image = data["image_grid_thw"].prod(-1).tolist()
        elif isinstance(pixels, Tensor) and pixels.ndim == 5 and "image_sizes" in data:
            # Crops are padded to the batch's largest number; the model drops the padding again.
            per_image = self._crops(data, pixels.shape[1])
        elif isinstance(pixels, Tensor) and pixels.ndim == 4 and pixels.shape[0] == sum(n_images):
            per_image = [1] * sum(n_images)
        if per_image is None or len(per_image) != sum(n_images):
            return None
        rows, at = [], 0
        for n in n_images:
            rows.append(sum(per_image[at : at + n]))
            at += n
        return tuple(rows)

    def _crops(self, data: Any, most: int) -> list[int] | None:
        config = self.model.hf.config
        pinpoints = getattr(config, "image_grid_pinpoints", None)
        if pinpoints is None:
            return None
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        sizes = data["image_sizes"]
        crops = [
            image_size_to_num_patches(size, grid_pinpoints=pinpoints, patch_size=config.vision_config.image_size)
            for size in sizes
        ]
        if "batch_num_images" in data:  # LLaVA-OneVision: several images are given one base crop each
            return None if any(n > 1 for n in data["batch_num_images"]) else crops
        return crops if max(crops) == most else None


_TOKEN_NAMES = ("image_token", "video_token", "boi_token", "image_pad_token")


def _digest(pictures: Sequence[Image.Image]) -> bytes:
    """Of the pixels that some pictures show."""
    digest = hashlib.blake2b(digest_size=16)
    for picture in pictures:
        digest.update(repr((picture.mode, picture.size)).encode())
        digest.update(picture.tobytes())
    return digest.digest()


def _common(one: Any, other: Any) -> int:
    """How many leading elements two iterables share."""
    n = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        n += 1
    return n


def free_tokens(model: "VLM", arguments: dict[str, Any], length: int) -> TokenTable | None:
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
