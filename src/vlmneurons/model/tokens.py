"""Which token of a batch is what: a picture, the question's words, the template, padding; and which rule counts it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from vlmneurons.checks import Keywords
from vlmneurons.errors import MismatchError, QuestionError
from vlmneurons.model.vision_rows import Inputs
from vlmneurons.questions.question import Question

if TYPE_CHECKING:
    from vlmneurons.model.vlm import VLM

TOKEN_RULES = ("content", "image", "audio", "video", "text", "last")
"""Names of the built-in token rules; see `TokenTable.counted`."""


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
            QuestionError: there is no such rule, or a function's result has another shape or type.
        """
        if callable(rule):
            mask = rule(self)
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != self.ids.shape:
                got = f"{tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
                raise QuestionError(f"a token rule returns a bool tensor of shape {tuple(self.ids.shape)}; got {got}")
            return mask & self.attention
        if rule in ("image", "audio", "video"):
            mask = {"image": self.image, "audio": self.audio, "video": self.video}[rule]
            return torch.zeros_like(self.attention) if mask is None else mask & self.attention
        if rule == "last":
            return torch.arange(self.ids.shape[1], device=self.ids.device) == self.last[:, None]
        media = self.media & self.attention
        text = self.attention & ~self.special & ~media
        if self.template is not None:
            text = text & ~self.template
        if rule == "text":
            return text
        if rule == "content":
            return text | media
        raise QuestionError(f"tokens={rule!r} is not a token rule; choose from {', '.join(TOKEN_RULES)}, or a function")


TokenRule = str | Callable[[TokenTable], Bool[Tensor, "row token"]]


def check_token_rule(rule: object) -> None:
    """Refuse a name that no token rule has, before anything is encoded.

    Raises:
        QuestionError: no rule is called so.
    """
    if isinstance(rule, str) and rule not in TOKEN_RULES:
        raise QuestionError(f"tokens={rule!r} is not a token rule; choose from {', '.join(TOKEN_RULES)}")


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
    if ids.shape[1] != length or attention.shape != ids.shape:
        raise MismatchError(f"the decoder sees {length} tokens, but input_ids has {ids.shape[1]}")
    types = arguments.get("mm_token_type_ids")
    data = {"input_ids": ids, **({"mm_token_type_ids": types[:, -length:]} if types is not None else {})}
    present = attention.bool()
    positions = torch.arange(length, device=ids.device)
    last = torch.where(present, positions, -1).amax(1)
    return TokenTable(ids, present, image_mask(model, data), special_mask(model, ids), None, last)


# -- masks of a batch --------------------------------------------------------------------------------------------------


def special_mask(model: "VLM", ids: Int64[Tensor, "row token"]) -> Bool[Tensor, "row token"]:
    """Which tokens are special to the tokenizer.

    Args:
        model: the model.
        ids: token ids.
    """
    added = getattr(model.tokenizer, "added_tokens_decoder", {})
    special = {*model.tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    return torch.isin(ids, torch.tensor(sorted(special), dtype=ids.dtype, device=ids.device))


def _placeholder_id(model: "VLM", kind: str) -> int | None:
    """The token that stands for images, sounds or videos, as the configuration or else the processor says."""
    sources: tuple[Any, ...] = (model.hf.config, model.processor)
    names = (f"{kind}_token_id", f"{kind}_token_index")
    values = (getattr(source, name, None) for source in sources for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def image_mask(model: "VLM", data: Inputs) -> Bool[Tensor, "row token"]:
    """Which tokens are placeholders of pictures.

    Args:
        model: the model.
        data: its inputs.
    """
    ids, number = data["input_ids"], _placeholder_id(model, "image")
    if "mm_token_type_ids" in data:
        # A video may have the same placeholder; what stands around and between an image's counts as its own here.
        image = data["mm_token_type_ids"] == 1
        placeholder = image & (ids == number)
        return placeholder if placeholder.any() else image
    return torch.zeros_like(ids, dtype=torch.bool) if number is None else ids == number


def media_masks(
    model: "VLM", data: Inputs, questions: Sequence[Question]
) -> tuple[Bool[Tensor, "row token"], Bool[Tensor, "row token"] | None, Bool[Tensor, "row token"] | None]:
    """Which tokens are placeholders of pictures, of sounds, and of videos; None where no question has any.

    Args:
        model: the model.
        data: its inputs.
        questions: the question of each row; all of them have sounds or none has, and so with videos.

    Raises:
        QuestionError: a question shows something, and its prompt has no placeholder for it; or a model that takes
            frames as pictures is shown both.
    """
    image, masks = image_mask(model, data), []
    for place, kind in ((1, "audio"), (2, "video")):
        if not questions[0].n_media[place]:
            masks.append(None)
            continue
        number = _placeholder_id(model, kind)
        mask = None if number is None else data["input_ids"] == number
        if kind == "video" and (mask is None or not mask.any()) and image.any():
            if any(question.n_images for question in questions):
                raise QuestionError(
                    f"{type(model.hf).__name__} takes a video's frames as pictures, which cannot be told from "
                    f"the pictures of question {questions[0].id!r}: ask with one of the two"
                )
            mask, image = image, torch.zeros_like(image)
        if mask is None or not mask.any(1).all():
            raise QuestionError(f"question {questions[0].id!r}: its prompt has no placeholder for its {kind}")
        masks.append(mask)
    has_image = image.any(1).tolist()
    blind = [question.id for question, sees in zip(questions, has_image, strict=True) if question.n_images and not sees]
    # A model without a token for pictures sees them all the same; one with such a token sees none without it.
    if blind and (any(has_image) or _placeholder_id(model, "image") is not None):
        raise QuestionError(f"question {blind[0]!r}: its prompt has no placeholder for its pictures: see the template")
    return image, masks[0], masks[1]
