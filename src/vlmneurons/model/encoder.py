"""From questions to model inputs: the one place that knows how a question becomes tensors.

A question's text becomes a prompt (`prompts`); the processor makes tokens of it, and pixels or spectra of what it
shows. Then it is worked out, once, what each token is (`tokens`, `prompt_tokens`), because that decides what is
counted; and which rows of the towers that see and hear are whose (`tower_rows`). What would be asked otherwise than the
user meant is refused on the way (`abilities` holds what can be known before).
"""

import hashlib
import itertools
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from vlmneurons.checks import Keywords, check_choice
from vlmneurons.errors import QuestionError
from vlmneurons.model.abilities import counts_positions, default_of, refusals, sampling_rate, wants_token_types
from vlmneurons.model.prompt_tokens import PromptTokenizer
from vlmneurons.model.prompts import Prompts
from vlmneurons.model.sound_rows import Heard, hears_alone
from vlmneurons.model.tokens import TokenTable, media_masks, special_mask
from vlmneurons.model.tower_rows import TowerRows, tower_rows
from vlmneurons.model.vision_rows import OF_PICTURES, Inputs
from vlmneurons.questions.media import picture_size
from vlmneurons.questions.question import Question
from vlmneurons.questions.sets import QuestionSet, bare_prompt
from vlmneurons.questions.streams import FRAMES_PER_SECOND

if TYPE_CHECKING:
    from vlmneurons.model.vlm import VLM

TOKENIZING = threading.RLock()
"""Held while a batch is encoded or generated texts are decoded: fast tokenizers refuse two threads at once."""

_N_TOKENS = "_get_num_multimodal_tokens"
"""By which transformers' processors tell how many tokens and tiles a size of pictures takes; promised nowhere."""

_PLACEHOLDERS = ("image_token", "video_token", "audio_token", "boi_token", "image_pad_token")
"""Attributes of processors and tokenizers that name a placeholder, or what stands around it."""


class Batch(BatchFeature):
    """Model inputs that know what they are: ``model.hf(**batch)`` runs them.

    Attributes:
        tokens: what each token is.
        vision: for each row of the batch the number of leading-dimension rows of the vision tower that belong to its
            pictures (patches, tiles, or pictures); None where that cannot be told.
        patches: which patches of each of the vision tower's rows are real; None where none is padding.
        pictures: for each row a digest of its pictures' pixels, in order, and of its sounds and videos: rows with equal
            digests show the same; None where that is not known.
        row_counts: the numbers of `vision`, and after them those of crops or videos, whose rows come after those of all
            pictures (`vision` is None where there are any); None where they cannot be told.
        heard: which rows of the audio tower belong to which row of the batch; None where that cannot be told.
        is_whole: whether all that the vision tower sees belongs to one question, however many rows it is.
    """

    tokens: TokenTable
    vision: tuple[int, ...] | None
    patches: Bool[Tensor, "row patch"] | None
    pictures: tuple[bytes, ...] | None
    row_counts: tuple[tuple[int, ...], ...] | None
    heard: Heard | None
    is_whole: bool

    def __init__(
        self, data: Any, tokens: TokenTable, pictures: tuple[bytes, ...] | None = None, rows: TowerRows | None = None
    ) -> None:
        super().__init__(data)
        self.tokens, self.pictures = tokens, pictures
        self.vision, self.patches, self.row_counts, self.heard, self.is_whole = rows or TowerRows()


class _Media(NamedTuple):
    """What a question shows, opened."""

    pictures: list[Image.Image]
    sounds: list[Any]
    videos: list[Any]


class _Row(NamedTuple):
    """A row of a batch before it is encoded.

    Attributes:
        question: the question.
        prompt: its rendered prompt, placeholders unexpanded.
        added: text that follows the prompt.
        media: what the question shows.
    """

    question: Question
    prompt: str
    added: str
    media: _Media


class Encoder:
    """Questions to `Batch`es, for one model's processor.

    Args:
        model: the model whose processor and configuration are used.
    """

    def __init__(self, model: "VLM") -> None:
        self.model = model
        self.processor = model.processor
        self.prompts: Prompts = model.prompts
        self._words = PromptTokenizer(model.processor)
        self.tokenizer = self._words.tokenizer

    # -- what is asked, as text ----------------------------------------------------------------------------------------

    def prompt_of(self, asked: QuestionSet, item: Question) -> str:
        """A question's prompt, as the set says that it is asked.

        Args:
            asked: the set.
            item: one of its questions.
        """
        return self.render(_text(asked, item), *item.n_media, bare=asked.prompt is bare_prompt)

    def render(self, text: str, n_images: int, n_sounds: int = 0, n_videos: int = 0, *, bare: bool = False) -> str:
        """One user turn in the chat template, up to where the model's answer begins; the text alone where it is bare.

        Raises:
            QuestionError: the processor has no chat template, or it does not show the text as it is; or the model or
                its processor does not take what is shown.
        """
        self.refuse_media(n_images, n_sounds, n_videos)
        return self.prompts.render(text, n_images, n_sounds, n_videos, bare=bare)

    def refuse_media(self, *n_media: int) -> None:
        """Refuse pictures, sounds or videos that the model or its processor does not take.

        Args:
            *n_media: how many pictures, sounds and videos a question shows.

        Raises:
            QuestionError: some would be dropped, and the question asked without them.
        """
        for n, refusal in zip(n_media, self._refusals, strict=True):
            if n and refusal:
                raise QuestionError(refusal)

    @cached_property
    def _refusals(self) -> tuple[str, ...]:
        return refusals(self.model)

    def token_ids(self, rendered: str) -> list[int]:
        """Ids of a rendered prompt with its image placeholders unexpanded."""
        return self._words.ids([rendered])[0]

    def all_token_ids(self, rendered: Sequence[str]) -> list[list[int]]:
        """Those of several prompts, in one call of the tokenizer, which costs far less than one each."""
        return self._words.ids(rendered)

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
            bare = asked.prompt is bare_prompt
            texts = [_text(asked, item) for item in items]
            self._refuse_placeholders(items, texts)
            if rendered is None:
                pairs = zip(items, texts, strict=True)
                rendered = [self.render(text, *item.n_media, bare=bare) for item, text in pairs]
            opened = {item.id: self._opened(item) for item in items}  # once, in however many rows it stands
            rows = [
                _Row(item, prompt, continuation, opened[item.id])
                for item, prompt, continuation in zip(items, rendered, added, strict=True)
            ]
            return self._encoded(rows, bare, padding_side)

    def _encoded(self, rows: Sequence[_Row], bare: bool, padding_side: str) -> Batch:
        """The batch: inputs of the processor, what each token is, what each tower is shown."""
        _refuse_mixed(rows)
        try:
            data = self._processed(rows, padding_side)
        except Exception as error:
            if len(rows) > 1:  # say whose fault it is, if it is one question's
                for row in rows:
                    self._encoded([row], bare, padding_side)
            alone = f"question {rows[0].question.id!r}: the processor refuses it"
            culprit = alone if len(rows) == 1 else "the processor refuses these questions together"
            raise QuestionError(f"{culprit} ({type(error).__name__}: {error})") from error
        self._refuse_lost(data, rows)
        self._refuse_entangled(data, rows)
        tokens = self._tokens(data, rows, bare)
        of_towers = tower_rows(
            data,
            tokens,
            self.model.hf.config,
            n_images=[len(row.media.pictures) for row in rows],
            n_sounds=[len(row.media.sounds) for row in rows],
            n_frames=[list(map(len, row.media.videos)) for row in rows],
            alone=lambda number: self._processed([rows[number]], padding_side),
            tiles=lambda: self._n_tiles([picture for row in rows for picture in row.media.pictures]),
        )
        opened = {row.question.id: row.media for row in rows}
        digests = {name: _digest(media) for name, media in opened.items()}
        if padding_side == "left" and self._counts_positions:
            data["position_ids"] = (tokens.attention.cumsum(1) - 1).clamp(min=0)  # else padding would be counted
        batch = Batch(dict(data), tokens, tuple(digests[row.question.id] for row in rows), of_towers)
        return cast(Batch, batch.to(self.model.device))

    @cached_property
    def _counts_positions(self) -> bool:
        return counts_positions(self.model)

    def _opened(self, item: Question) -> _Media:
        """What a question shows; sounds at the rate that the processor expects."""
        sounds = list(item.load_audio(sampling_rate(self.processor))) if item.sounds else []
        return _Media(list(item.load_images()), sounds, list(item.load_videos()))

    def _processed(self, rows: Sequence[_Row], padding_side: str) -> BatchFeature:
        """What the processor makes of the rows: of their texts, placeholders unexpanded, and of what each one shows."""
        texts = [row.prompt + row.added for row in rows]
        pictures = [row.media.pictures for row in rows]
        sounds = [sound for row in rows for sound in row.media.sounds]
        videos = [video for row in rows for video in row.media.videos]
        media: Keywords = {"audio": sounds, "sampling_rate": sampling_rate(self.processor)} if sounds else {}
        if videos:  # all frames: which of a file's are seen was decided when it was opened
            metadata = [
                {"fps": FRAMES_PER_SECOND, "total_num_frames": len(video), "frames_indices": list(range(len(video)))}
                for video in videos
            ]
            media |= {"videos": videos, "do_sample_frames": False, "video_metadata": metadata}
        if any(pictures):
            # GOT-OCR: a list of lists would be pages of documents.
            flat = default_of(self.processor, "images_kwargs", "multi_page") is False
            media["images"] = [picture for of_row in pictures for picture in of_row] if flat else pictures
            if wants_token_types(self.model):
                media["return_mm_token_type_ids"] = True
        data = self.processor(
            **media,
            text=texts,
            padding=True,
            padding_side=padding_side,
            add_special_tokens=self._words.adds_special(texts[0]),
            return_tensors="pt",
        )
        if padding_side == "left" and isinstance(mask := data.get("qformer_attention_mask"), Tensor):
            # A Q-Former counts positions from the first column, padding and all: its words begin there (InstructBLIP).
            order = mask.argsort(dim=1, descending=True, stable=True)
            for name in ("qformer_input_ids", "qformer_attention_mask"):
                data[name] = data[name].gather(1, order)
        data.pop("labels", None)  # PaliGemma's are for training: with them a forward computes a loss
        dtype = self.model.hf.dtype
        for name, value in data.items():  # Llama 4's pixels are bfloat16, whatever the model is
            if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) and value.dtype != dtype:
                data[name] = value.to(dtype)
        return data if isinstance(data, BatchFeature) else BatchFeature(dict(data))  # a tokenizer's are of a third kind

    def _tokens(self, data: Inputs, rows: Sequence[_Row], bare: bool) -> TokenTable:
        """What each token is: a real one is the template's unless it is a placeholder or of the question's text."""
        attention, ids = data["attention_mask"].bool(), data["input_ids"]
        image, audio, video = media_masks(self.model, data, [row.question for row in rows])
        template = torch.ones_like(attention)
        last = torch.zeros(len(ids), dtype=torch.int64)
        for number, row in enumerate(rows):
            places = attention[number].nonzero().flatten()
            frame = self.prompts.frame(*row.question.n_media, bare=bare)
            positions, n_added = self._words.own_positions(
                ids[number, places].tolist(), frame, row.prompt, row.added, row.question.id
            )
            template[number, places[positions]] = False
            last[number] = places[len(places) - n_added - 1]
        tokens = TokenTable(ids, attention, image, special_mask(self.model, ids), template, last, audio, video)
        return replace(tokens, template=template & ~tokens.media)

    def _n_tiles(self, pictures: Sequence[Image.Image]) -> Sequence[int] | None:
        """The number of tiles of every picture; None where the processor does not tell it."""
        count = getattr(self.processor, _N_TOKENS, None)
        sizes = [(picture.height, picture.width) for picture in pictures]
        try:
            return None if count is None else getattr(count(image_sizes=sizes), "num_image_patches", None)
        except Exception:  # it is nowhere promised: then each question is encoded on its own
            return None

    # -- what is refused -----------------------------------------------------------------------------------------------

    def _refuse_placeholders(self, items: Sequence[Question], texts: Sequence[str]) -> None:
        """Refuse a question whose text holds a placeholder: the model would look for a picture where there is none."""
        sources = (self.processor, self.tokenizer)
        placeholders = [getattr(source, name, None) for source in sources for name in _PLACEHOLDERS]
        for item, text in zip(items, texts, strict=True):
            for placeholder in dict.fromkeys(map(str, filter(None, placeholders))):
                if placeholder in text:
                    raise QuestionError(f"question {item.id!r}: its text holds the image placeholder {placeholder!r}")

    def _refuse_lost(self, data: Inputs, rows: Sequence[_Row]) -> None:
        """Refuse pictures of which the processor made nothing, or that the model cannot tell apart.

        Raises:
            QuestionError: the pictures are lost, or their placeholders stand side by side.
        """
        if any(row.media.pictures for row in rows) and not any(map(OF_PICTURES.search, data)):
            raise QuestionError(
                f"{type(self.processor).__name__} made nothing of the questions' pictures: it gave {', '.join(data)}"
            )
        hf, types = self.model.hf, data.get("mm_token_type_ids")
        if types is None or "image_grid_thw" not in data or not hasattr(getattr(hf, "model", hf), "get_rope_index"):
            return
        for row, row_types in zip(rows, types, strict=True):
            n_pictures = len(row.media.pictures)
            # Qwen-VL and its kin give positions to one picture for each run of picture tokens.
            runs = itertools.groupby(row_types.tolist() if n_pictures > 1 else ())
            if n_pictures > 1 and sum(kind == 1 for kind, _ in runs) < n_pictures:
                raise QuestionError(
                    f"question {row.question.id!r}: the placeholders of its {n_pictures} pictures stand "
                    f"side by side in the prompt, and {type(hf).__name__} tells pictures apart by what stands between "
                    "them: put text there, with VLM(…, template=function), as its chat template does"
                )

    def _refuse_entangled(self, data: Inputs, rows: Sequence[_Row]) -> None:
        """Refuse rows that would be asked otherwise together than alone, as one shows more, or longer, than another.

        Raises:
            QuestionError: they would.
        """
        model = type(self.model.hf).__name__
        if "aspect_ratio_mask" in data and len({len(row.media.pictures) for row in rows}) > 1:
            # In Mllama what stands before a picture sees all of the row, the pictures that another row has more too.
            raise QuestionError(
                f"{model} lets the padding of questions with fewer pictures through to their "
                "words: encode questions with different numbers of pictures apart"
            )
        n_frames = {tuple(map(len, row.media.videos)) for row in rows}
        if len(n_frames) > 1 and "pixel_values_videos" not in data:
            # SmolVLM's processor writes the number of frames of the longest video into every prompt.
            raise QuestionError(
                f"{type(self.processor).__name__} makes other prompts of videos where it sees longer ones beside them: "
                "encode videos with different numbers of frames apart (batch_size=1)"
            )
        if hears_alone(self.model.hf.config) and len({len(sound) for row in rows for sound in row.media.sounds}) > 1:
            raise QuestionError(
                f"{model} hears in a sound what fills it up to the length of others beside it: "
                "encode sounds of different lengths apart (batch_size=1)"
            )


def _text(asked: QuestionSet, item: Question) -> str:
    """A question's text as the set's prompt has it, with its options in the set's order."""
    text = asked.prompt(item, [item.options[index] for index in asked.order(item)])
    if not isinstance(text, str):
        raise QuestionError(f"question {item.id!r}: the prompt function gave {type(text).__name__}, not a text")
    return text


def _refuse_mixed(rows: Sequence[_Row]) -> None:
    """Refuse questions of which some show what others do not: no processor takes them in one call."""
    if len({bool(row.media.pictures) for row in rows}) > 1:
        raise QuestionError("questions with and without a picture cannot share a batch: encode them apart")
    if len({tuple(map(bool, row.question.n_media)) for row in rows}) > 1:
        raise QuestionError("questions with and without a sound or video cannot share a batch: encode them apart")


def _digest(media: _Media) -> bytes:
    """A digest of the pixels that pictures show, and of what sounds and videos hold."""
    digest = hashlib.blake2b(digest_size=16)
    for stream in (*media.sounds, *media.videos):
        digest.update(repr((stream.dtype, stream.shape)).encode())
        digest.update(stream.tobytes())
    for picture in media.pictures:
        digest.update(repr((picture.mode, picture.size)).encode())
        digest.update(picture.tobytes())
    return digest.digest()
