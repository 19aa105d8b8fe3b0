"""One question: a picture, sound or video, a text, answer options, and the group that it stands for."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from vlmneurons.checks import JSON, JSONMapping, as_names, check_kind, is_missing
from vlmneurons.errors import QuestionError
from vlmneurons.questions import streams
from vlmneurons.questions.media import PictureSource, is_function, open_picture, picture_key
from vlmneurons.questions.streams import SoundSource, VideoSource

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""The letters that options are shown with."""

_DEEPEST, _LONGEST = 50, 10**1000
"""Nesting of metadata, and its largest whole number: far from where files of JSON, or Python, give up."""


@dataclass(frozen=True, eq=False)
class Question:
    """One question about a picture: with options to choose from, or open.

    Attributes:
        image: the picture; several in a list or tuple; None for a question without a picture. Pictures are opened when
            they are needed, not before.
        question: the question's text.
        options: 2 to 26 answer options, kept as a tuple; none for an open question, which has ``answers`` instead.
        answer: index of the right option, from 0; left out of an open question, where it reads 0.
        group: what the question stands for, such as a country.
        id: unique within a set. Derived from the content if left out.
        metadata: further plain values by name, for filtering and grouping. Missing ones (NaN, pandas' NA) become None,
            numbers and arrays of NumPy and PyTorch Python's own, sets sorted lists: what a file can hold.
        image_id: questions with equal ``image_id`` share a picture and are never split apart. Derived from the
            picture's content or path if left out.
        audio: a sound, or several in a list: ``{"array": …, "sampling_rate": …}``, a file, its bytes, or a function.
            WAV files are read as they are; others need ``pip install 'vlmneurons[audio]'``.
        video: a video, or several in a list: an array ``[frame, height, width, 3]`` of uint8, a list of its frames as
            pictures, a file, its bytes, or a function. Of a file two frames a second are seen, at most 64. Moving
            pictures (GIF, WebP) are read as they are; others need ``pip install 'vlmneurons[video]'``.
        answers: texts that an open question accepts, kept as a tuple; one for each person asked, repeated where they
            agree, where a scorer counts them (`vlmneurons.vqa_accuracy`).

    Raises:
        QuestionError: neither options nor answers; the answer is not the index of an option; a field has the wrong
            form; metadata hold what no file can; or the options bear letters of their own that contradict their places.

    Examples:
        >>> Question(None, "What is the capital?", ("Cairo", "Paris"), 0, "Egypt", id="q1").options[0]
        'Cairo'
        >>> Question(None, "What is the capital?", answers=["Cairo", "Kairo"], group="Egypt").right
        'Cairo'
    """

    image: PictureSource | Sequence[PictureSource] | None
    question: str
    options: Sequence[str] = ()
    answer: int = -1
    group: str = ""
    id: str = ""
    metadata: JSONMapping = field(default_factory=dict)
    image_id: str | None = None
    audio: SoundSource | Sequence[SoundSource] | None = None
    video: VideoSource | Sequence[VideoSource] | None = None
    answers: Sequence[str] = ()

    def __post_init__(self) -> None:
        where = self._where
        if not isinstance(self.options, Iterable) or isinstance(self.options, str | bytes | Mapping | set | frozenset):
            raise QuestionError(f"{where}: options are a sequence of strings; got {self.options!r}")
        object.__setattr__(self, "options", tuple(self.options))
        if not all(isinstance(option, str) for option in self.options):
            raise QuestionError(f"{where}: options are a sequence of strings; got {self.options!r}")
        if not isinstance(self.question, str):
            raise QuestionError(f"{where}: the question is a string; got {type(self.question).__name__}")
        object.__setattr__(self, "answers", self._answers())
        if not 2 <= len(self.options) <= len(LETTERS) and not self.is_open:
            raise QuestionError(
                f"{where}: a question has 2 to {len(LETTERS)} options; got {len(self.options)}"
                + ("" if self.options else ". An open one has none, and answers=[…] that it accepts")
            )
        if isinstance(self.answer, bool) or not isinstance(self.answer, int | np.integer):
            raise QuestionError(f"{where}: answer is the index of the right option; got {self.answer!r}")
        if self.is_open and self.answer in (-1, 0):
            object.__setattr__(self, "answer", 0)
        elif self.is_open:
            raise QuestionError(f"{where}: an open question has no option {self.answer}: leave answer out")
        elif not 0 <= self.answer < len(self.options):
            raise QuestionError(
                f"{where}: answer {self.answer} is outside the options (0–{len(self.options) - 1})"
                f"{why_outside([int(self.answer)], len(self.options))}"
            )
        object.__setattr__(self, "answer", int(self.answer))
        right = normalize(self.right)
        if sum(normalize(option) == right for option in self.options) > 1:
            raise QuestionError(
                f"{where}: the right answer {self.options[self.answer]!r} stands among the options twice"
            )
        labels = _labels(self.options)
        if sorted(labels) == list(LETTERS[: len(labels)]) and labels != sorted(labels):
            raise QuestionError(
                f"{where}: its options bear letters of their own in another order ({', '.join(labels)}) than A–"
                f"{LETTERS[len(labels) - 1]}, with which they are shown: take the letters off their texts, or "
                "put the options into their order"
            )
        if not isinstance(self.group, str) or not self.group:
            raise QuestionError(f"{where}: the group is a non-empty string; got {self.group!r}")
        check_kind(f"{where}: metadata", self.metadata, Mapping, QuestionError, "a dictionary of values by name")
        object.__setattr__(self, "metadata", _plain_metadata(self.metadata, where))
        self._check_pictures()
        self._check_streams()
        for name, value in (("id", self.id), ("image_id", self.image_id)):
            number = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not isinstance(value, str) and not number and (name, value) != ("image_id", None):
                raise QuestionError(
                    f"{where}: {name} is a text or a whole number; got {value!r}. Leave it out, and it is derived from "
                    "the content"
                )
        if not isinstance(self.id, str):
            object.__setattr__(self, "id", str(self.id))
        for name, text in (("question", self.question), ("group", self.group), ("id", self.id)):
            _check_text(f"{where}: the {name}", text)
        for text in (*self.options, *self.answers):
            _check_text(f"{where}: an {'option' if text in self.options else 'answer'}", text)
        if not self.id:
            object.__setattr__(self, "id", self._derived_id())

    def _answers(self) -> tuple[str, ...]:
        try:
            answers = as_names("answers", () if is_missing(self.answers) else self.answers, QuestionError)
        except QuestionError as error:
            raise QuestionError(f"{self._where}: {error}") from error
        if not all(answer.strip() for answer in answers):
            raise QuestionError(f"{self._where}: one of its answers is empty; got {list(answers)!r}")
        return answers

    def _check_pictures(self) -> None:
        where = self._where
        if isinstance(self.image, list):
            object.__setattr__(self, "image", tuple(self.image))
        for source in self.pictures:
            if not isinstance(source, Image.Image | str | Path | bytes | Mapping) and not callable(source):
                raise QuestionError(
                    f"{where}: a picture is a PIL image, a path, bytes or a function; got {type(source).__name__}"
                    + (": PIL.Image.fromarray makes one of an array" if hasattr(source, "__array__") else "")
                )
            if isinstance(source, str) and not source:
                raise QuestionError(f"{where}: a picture's path is empty; give image=None for a question without one")

    def _check_streams(self) -> None:
        for name, check in (("audio", streams.check_sound), ("video", streams.check_video)):
            value = getattr(self, name)
            is_list = isinstance(value, list | tuple)
            # A list of pictures is one video; any other list holds several sounds or videos.
            several = is_list and not (name == "video" and value and all(map(streams.is_frame, value)))
            sources = tuple(value) if several else () if value is None else (value,)
            for source in sources:
                if fault := check(source):
                    raise QuestionError(f"{self._where}: {name}: {fault}")
            object.__setattr__(self, name, None if not sources else sources if several else value)

    @property
    def _where(self) -> str:
        """How errors name the question."""
        return f"question {self.id!r}" if self.id else f"question {str(self.question)[:60]!r}"

    def _derived_id(self) -> str:
        if any(map(is_function, self.sources)):  # a function is not called before its picture is needed
            pictures = [key(source) for key, source in self._keyed if not is_function(source)]
        else:
            pictures = list(self.source_keys)
        more = [self.answers] if self.answers else []
        return derived_id(self.question, self.options, self.answer, self.group, pictures, self.image_id, *more)

    @property
    def pictures(self) -> tuple[PictureSource, ...]:
        """Where the question's pictures come from, in order."""
        return cast(tuple[PictureSource, ...], _as_tuple(self.image))

    @property
    def sounds(self) -> tuple[SoundSource, ...]:
        """Where the question's sounds come from, in order."""
        return cast(tuple[SoundSource, ...], _as_tuple(self.audio))

    @property
    def videos(self) -> tuple[VideoSource, ...]:
        """Where the question's videos come from, in order; arrays are ``[frame, height, width, 3]``."""
        of_frames = isinstance(self.video, tuple) and all(map(streams.is_frame, self.video))
        return cast(tuple[VideoSource, ...], (self.video,) if of_frames else _as_tuple(self.video))

    @property
    def sources(self) -> tuple[PictureSource | SoundSource | VideoSource, ...]:
        """Where all pictures, sounds and videos come from, in this order.

        Arrays are ``[sample]`` of sounds and ``[frame, height, width, channel]`` of videos.
        """
        return (*self.pictures, *self.sounds, *self.videos)

    @property
    def n_images(self) -> int:
        """How many pictures the question shows."""
        return len(self.pictures)

    @property
    def n_media(self) -> tuple[int, int, int]:
        """How many pictures, sounds and videos the question shows."""
        return len(self.pictures), len(self.sounds), len(self.videos)

    @property
    def n_frames(self) -> tuple[int, ...]:
        """How many frames each video has, where that is known without opening it; else 0."""
        return tuple(len(video) if isinstance(video, list | tuple | np.ndarray) else 0 for video in self.videos)

    @property
    def is_open(self) -> bool:
        """Whether the question has no options, but answers that it accepts."""
        return not self.options and bool(self.answers)

    @property
    def right(self) -> str:
        """The text of the right option; of an open question the first answer that it accepts."""
        return self.answers[0] if self.is_open else self.options[self.answer]

    def load_images(self) -> tuple[Image.Image, ...]:
        """The pictures, opened: RGB, upright (EXIF rotation applied), transparency on white, first frame of several.

        Raises:
            QuestionError: a picture cannot be opened; the message names the question.
        """
        return self._opened(self.pictures, open_picture, "picture")

    def load_audio(self, sampling_rate: int) -> tuple[Float32[np.ndarray, " sample"], ...]:
        """The sounds: one channel each, at a rate.

        Args:
            sampling_rate: values a second.

        Raises:
            QuestionError: a sound cannot be opened; the message names the question.
        """
        return self._opened(self.sounds, lambda source: streams.open_sound(source, sampling_rate), "sound")

    def load_videos(self) -> tuple[UInt8[np.ndarray, "frame height width 3"], ...]:
        """The videos' frames: all of arrays and lists, of files two a second, at most 64.

        Raises:
            QuestionError: a video cannot be opened; the message names the question.
        """
        return self._opened(self.videos, streams.open_video, "video")

    def _opened(self, sources: Sequence[object], open_source: Callable[[Any], object], kind: str) -> tuple[Any, ...]:
        opened = []
        for source in sources:
            try:
                opened.append(open_source(source))
            except Exception as error:
                name = str(source) if isinstance(source, str | Path) else type(source).__name__
                raise QuestionError(
                    f"question {self.id!r}: the {kind} {name!r} cannot be opened ({type(error).__name__}: {error})"
                ) from error
        return tuple(opened)

    @property
    def image_key(self) -> str:
        """What identifies the question's pictures: ``image_id``, or a digest of their paths or contents."""
        if self.image_id is not None:
            return str(self.image_id)
        if not self.sources:
            return f"no image: {self.id}"
        return "+".join(self.source_keys)

    @cached_property
    def source_keys(self) -> tuple[str, ...]:
        """What identifies each picture, sound and video, by path or content.

        The digests are computed once and kept. An encoded file, such as a dataset's, is not decoded for them.

        Raises:
            QuestionError: a picture cannot be opened; the message names the question.
        """
        try:
            return tuple(key(source) for key, source in self._keyed)
        except Exception as error:
            raise QuestionError(
                f"{self._where}: a picture cannot be opened ({type(error).__name__}: {error})"
            ) from error

    @property
    def _keyed(self) -> list[tuple[Callable[[Any], str], Any]]:
        """Each source with the function that gives its key."""
        kinds = ((picture_key, self.pictures), (streams.sound_key, self.sounds), (streams.video_key, self.videos))
        return [(key, source) for key, sources in kinds for source in sources]

    @cached_property
    def keeps_order(self) -> bool:
        """Whether the options speak of each other's letters or places, so that no other order may be shown.

        They do where they bear letters of their own (``"A. Oslo"``, ``"(B) Paris"``), name other options' letters
        (``"Both A and B"``), or point to the options above (``"None of the above"``, in fifteen languages).
        """
        refers = any(_refers_to_others(text, len(self.options)) for text in self.options)
        return refers or (bool(self.options) and _bears_letters(self.options))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Question):
            return NotImplemented
        return self._compared == other._compared and all(map(_are_equal, self.sources, other.sources))

    def __hash__(self) -> int:
        return hash((self.id, self.question, self.options, self.answer, self.group))

    @property
    def _compared(self) -> tuple[object, ...]:
        """What equal questions have in common beside their sources."""
        texts = (self.question, self.options, self.answer, self.group, self.id, self.answers)
        return (*texts, self.metadata, self.n_media)


def _as_tuple(value: object) -> tuple[object, ...]:
    """A field's sources: none, one, or several, which ``__post_init__`` put into a tuple."""
    return () if value is None else value if isinstance(value, tuple) else (value,)


def _are_equal(a: Any, b: Any) -> bool:
    """Whether two sources are the same, as far as can be told without opening them."""
    if a is b:
        return True
    if isinstance(a, str | bytes | Path | Image.Image):
        return type(a) is type(b) and a == b
    if isinstance(a, list | tuple | Mapping) and type(a) is type(b) and len(a) == len(b):
        pairs = [(a[name], b.get(name)) for name in a] if isinstance(a, Mapping) else zip(a, b, strict=True)
        return all(_are_equal(left, right) for left, right in pairs)
    if hasattr(a, "__array__") and hasattr(b, "__array__"):
        return np.array_equal(np.asarray(a), np.asarray(b))
    return not callable(a) and bool(a == b)


def why_outside(labels: Sequence[int], n_options: int) -> str:
    """What labels outside the options usually mean, as a further sentence; empty where nothing is likely."""
    if set(labels) == {-1}:
        return ". A label of -1 usually means that the dataset keeps its answers secret: use a labelled copy"
    if set(labels) == {n_options}:
        return ". The labels may count from 1; here they count from 0: subtract 1, or give the options' letters"
    return ""


# -- metadata and texts that every file can hold -----------------------------------------------------------------------


def _check_text(name: str, text: str) -> None:
    """Refuse half a surrogate pair, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise QuestionError(
            f"{name} holds half a character, {text[error.start]!r}, which no file can: {text!r}"
        ) from None


def _plain_metadata(metadata: Mapping[Any, object], where: str, depth: int = 0) -> JSON:
    plain: JSON = {}
    for name, value in metadata.items():
        if not isinstance(name, str | int | np.integer):
            raise QuestionError(f"{where}: names of metadata are texts; got {name!r}")
        if str(name) in plain:
            raise QuestionError(f"{where}: two names of metadata read {str(name)!r} as text: call one otherwise")
        plain[str(name)] = _plain_value(value, f"{where}: metadata {str(name)!r}", depth + 1)
    return plain


def _plain_value(value: Any, where: str, depth: int) -> object:
    if depth > _DEEPEST:
        raise QuestionError(f"{where} is nested more than {_DEEPEST} deep: keep it outside, under the question's id")
    if hasattr(value, "tolist"):  # numbers and arrays of NumPy and PyTorch
        value = value.tolist()
    if is_missing(value) or (isinstance(value, Decimal) and value.is_nan()):
        return None
    if isinstance(value, float | Decimal) and value in (float("inf"), float("-inf")):
        raise QuestionError(f"{where} is infinite, which no file can hold: leave it out, or give it as text")
    if isinstance(value, int) and abs(value) > _LONGEST:
        raise QuestionError(f"{where} has more than 1,000 digits, which no file can hold: give it as text")
    if isinstance(value, Mapping):
        return _plain_metadata(value, where, depth)
    if isinstance(value, set | frozenset):  # whose order is another in the next run
        value = sorted(value, key=lambda part: (type(part).__name__, str(part)))
    if isinstance(value, list | tuple):
        parts = [_plain_value(part, where, depth + 1) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value


# -- options that speak of each other ----------------------------------------------------------------------------------

_LABEL = re.compile(r"\s*(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])\s*[.):：、．）]|([A-Za-z])\s+[-–—])\s*\S")
_NUMBER = re.compile(r"\s*\(?(\d{1,2})[.):]\s+\S")
_ABOVE = re.compile(
    "|".join(
        [
            r"\b(none|all|both|neither|any|either|each|some|two|one|most) of (the |these |those )?"
            r"(above|below|preceding|previous|following|other|these|those|them|options|choices|answers|first|last)\b",
            r"\b(all|none) (the )?above\b",
            r"\bthe (first|last) (two|three)\b",
            r"\bnot? (among |one of )?(the )?(above|options|choices)\b",
            r"\b(all|none) (are )?(correct|right|apply)\b",
            r"(tod[ao]s|ningun[ao]|nenhum[ao]|cualquiera) (de |d)?(l?[ao]s )?(opciones |respuestas )?anteriores",
            r"acima\b|ci-dessus|(toutes|aucune) (de )?(ces|les|des) réponses",
            r"\b(alle|keine)\w* (der |des )?(oben|obigen|genannten)|precedenti\b",
            r"以上(都|皆|全|均|所有|的|各|选|選|两|兩|三)|上述|上記|위의? ?(모든|모두|어느|보기|둘)|모두 (정답|해당)",
            r"ما سبق|вышеперечисленн|все перечисленн|उपरोक्त|उपर्युक्त|yukarıdaki|hapo juu",
            r"(semua|tidak ada|bukan) (yang |pilihan |jawaban )?di ?atas|(tất cả|không).*(ở trên|trên đây)",
        ]
    ),
    re.IGNORECASE,
)


def _labels(options: Sequence[str]) -> list[str]:
    """The letter that each option's text begins with as its label; empty where it has none, or one of no option."""
    matches = [_LABEL.match(option) for option in options]
    letters = [next(filter(None, match.groups())).upper() if match else "" for match in matches]
    return [letter if letter in LETTERS[: len(options)] else "" for letter in letters]


def _bears_letters(options: Sequence[str]) -> bool:
    """Whether at least two options are labelled with the letter of their place, or all with its number."""
    numbers = [match and match[1] for match in (_NUMBER.match(option) for option in options)]
    if numbers == [str(place + 1) for place in range(len(options))]:
        return True
    labels = _labels(options)
    return sum(map(bool, labels)) > 1 and all(label in ("", letter) for label, letter in zip(labels, LETTERS))


_JOIN = r"\s*(?:(?:,|&|\+|/|、|(?i:and|or|nor|y|et|und|oder|e|o|ou|и|или|dan|ve|und)\b|和|与|或|と|와|과|و)\s*)+"


def _refers_to_others(text: str, n_options: int) -> bool:
    """Whether an option's text is about other options."""
    letter = rf"[(\[]?[{LETTERS[:n_options]}][)\]]?"
    named = rf"\b(?i:both|either|neither|only|options?|choices?|answers?)\s+{letter}(?![\w'’-])"
    alone = rf"^\W*{letter}(?:{_JOIN}{letter})+(?:\s+(?i:only|both))?\W*$"
    return any(re.search(pattern, text) for pattern in (_ABOVE, named, alone))


# -- texts and digests -------------------------------------------------------------------------------------------------


def derived_id(*parts: object) -> str:
    """An id for a question that was given none, from its content."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def hash_of(*parts: object) -> str:
    """The same hexadecimal digits for the same parts on every machine."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()


def value_of(question: Question, key: str | Callable[[Question], object]) -> object:
    """A question's field or metadata by name, or what a function gives for it.

    Raises:
        QuestionError: the question has no such column.
    """
    if callable(key):
        return key(question)
    if key in ("id", "question", "options", "answer", "answers", "group", "right", "n_images", "image_id"):
        return getattr(question, key)
    if key in question.metadata:
        return question.metadata[key]
    raise QuestionError(
        f"question {question.id!r} has no column {key!r}; it has {', '.join(question.metadata) or 'none'}"
    )


def normalize(text: str) -> str:
    """A text for comparison: Unicode NFKC, case folded, white space as single spaces, no punctuation at the ends."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.strip("""#.,;:!?"'`*()[]{}。、""".replace("#", " ")) or folded
