"""What is asked: questions, sets of questions, and prompts.

A `Question` is a picture, a question, answer options, and the *group* (a culture, a language, a topic) it stands for.
A `QuestionSet` is a sequence of them together with how they are asked: the prompt, the way the answer is read, and the
order of the options. How a model is run on them is the business of `vlmneurons.run` and `vlmneurons.recording`.
"""

import csv
import hashlib
import io
import json
import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image, ImageOps

from vlmneurons.checks import is_missing, of_kind, share, whole
from vlmneurons.errors import GroupError, QuestionError
from vlmneurons.questions.labels import names_places

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")

ImageSource = Image.Image | str | Path | bytes | Callable[[], Any]
"""A picture: in memory, a file, an encoded file's bytes, or a function that yields one of these when it is needed."""

Prompt = Callable[["Question", Sequence[str]], str]
"""The text of the user's turn, from a question and its options in the order in which they are shown."""


@dataclass(frozen=True, eq=False)
class Question:
    """One multiple-choice question about a picture.

    Attributes:
        image: the picture; several in a list or tuple; None for a question without a picture. Pictures are opened when
            they are needed, not before.
        question: the question's text.
        options: 2 to 26 answer options, kept as a tuple.
        answer: index of the right option, from 0.
        group: what the question stands for, such as a country.
        id: unique within a set. Derived from the content if left out.
        metadata: further plain values by name, for filtering and grouping.
        image_id: questions with equal ``image_id`` share a picture and are never split apart. Derived from the
            picture's content or path if left out.

    Raises:
        QuestionError: the answer is not the index of an option, or a field has the wrong form.

    Examples:
        >>> Question(None, "What is the capital?", ("Cairo", "Paris"), 0, "Egypt", id="q1").options[0]
        'Cairo'
    """

    image: ImageSource | Sequence[ImageSource] | None
    question: str
    options: Sequence[str]
    answer: int
    group: str
    id: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    image_id: str | None = None

    def __post_init__(self) -> None:
        where = self._where
        if not isinstance(self.options, Iterable) or isinstance(self.options, str | bytes | Mapping | set | frozenset):
            raise QuestionError(f"{where}: options are a sequence of strings; got {self.options!r}")
        object.__setattr__(self, "options", tuple(self.options))
        if not all(isinstance(option, str) for option in self.options):
            raise QuestionError(f"{where}: options are a sequence of strings; got {self.options!r}")
        if not isinstance(self.question, str):
            raise QuestionError(f"{where}: the question is a string; got {type(self.question).__name__}")
        if not 2 <= len(self.options) <= len(LETTERS):
            raise QuestionError(f"{where}: a question has 2 to {len(LETTERS)} options; got {len(self.options)}")
        if isinstance(self.answer, bool) or not isinstance(self.answer, int | np.integer):
            raise QuestionError(f"{where}: answer is the index of the right option; got {self.answer!r}")
        if not 0 <= self.answer < len(self.options):
            raise QuestionError(
                f"{where}: answer {self.answer} is outside the options (0–{len(self.options) - 1}). A label of -1 "
                "usually means that the dataset keeps its answers secret: use a labelled copy"
            )
        object.__setattr__(self, "answer", int(self.answer))
        right = normalize(self.options[self.answer])
        if sum(normalize(option) == right for option in self.options) > 1:
            raise QuestionError(
                f"{where}: the right answer {self.options[self.answer]!r} stands among the options twice"
            )
        if not isinstance(self.group, str) or not self.group:
            raise QuestionError(f"{where}: the group is a non-empty string; got {self.group!r}")
        of_kind(f"{where}: metadata", self.metadata, Mapping, QuestionError, "a dictionary of values by name")
        object.__setattr__(self, "metadata", dict(self.metadata))
        if isinstance(self.image, list):
            object.__setattr__(self, "image", tuple(self.image))
        for source in self._sources:
            if not isinstance(source, Image.Image | str | Path | bytes | Mapping) and not callable(source):
                raise QuestionError(
                    f"{where}: an image is a PIL image, a path, bytes or a function; got {type(source).__name__}"
                    + (": PIL.Image.fromarray makes an image of an array" if hasattr(source, "__array__") else "")
                )
            if isinstance(source, str) and not source:
                raise QuestionError(f"{where}: an image's path is empty; give image=None for a question without one")
        for name, value in (("id", self.id), ("image_id", self.image_id)):
            number = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not isinstance(value, str) and not number and (name, value) != ("image_id", None):
                raise QuestionError(
                    f"{where}: {name} is a text or a whole number; got {value!r}. Leave it out, and it is derived from "
                    "the content"
                )
        if not isinstance(self.id, str):
            object.__setattr__(self, "id", str(self.id))
        if not self.id:
            object.__setattr__(self, "id", self._derived_id())

    @property
    def _where(self) -> str:
        """How errors name the question."""
        return f"question {self.id!r}" if self.id else f"question {str(self.question)[:60]!r}"

    def _derived_id(self) -> str:
        if any(map(is_function, self._sources)):  # which are not called before their pictures are needed
            pictures = [_picture_key(image) for image in self._sources if not is_function(image)]
        else:
            pictures = list(self._picture_keys)
        return _derived_id(self.question, self.options, self.answer, self.group, pictures, self.image_id)

    @property
    def _sources(self) -> tuple[ImageSource, ...]:
        if self.image is None:
            return ()
        return self.image if isinstance(self.image, tuple) else (self.image,)

    @property
    def n_images(self) -> int:
        """How many pictures the question shows."""
        return len(self._sources)

    @property
    def right(self) -> str:
        """The text of the right option."""
        return self.options[self.answer]

    def load_images(self) -> tuple[Image.Image, ...]:
        """The pictures, opened: RGB, upright (EXIF rotation applied), transparency on white, first frame of several.

        Raises:
            QuestionError: a picture cannot be opened; the message names the question.
        """
        opened = []
        for source in self._sources:
            try:
                opened.append(_open_image(source))
            except Exception as error:
                name = str(source) if isinstance(source, str | Path) else type(source).__name__
                raise QuestionError(
                    f"question {self.id!r}: the image {name!r} cannot be opened ({type(error).__name__}: {error})"
                ) from error
        return tuple(opened)

    @property
    def image_key(self) -> str:
        """What identifies the question's pictures: ``image_id``, or a digest of their paths or contents."""
        if self.image_id is not None:
            return str(self.image_id)
        if not self._sources:
            return f"no image: {self.id}"
        return "+".join(self._picture_keys)

    @cached_property
    def _picture_keys(self) -> tuple[str, ...]:
        """What identifies each picture, by its path or content; found out once, for every batch, split and cluster.

        Only the digests are kept, and an encoded file, such as a dataset's, is not decoded for them.
        """
        try:
            return tuple(_picture_key(source) for source in self._sources)
        except Exception as error:
            raise QuestionError(
                f"{self._where}: an image cannot be opened ({type(error).__name__}: {error})"
            ) from error

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Question):
            return NotImplemented
        return self._plain == other._plain and all(
            a is b
            or (not isinstance(a, Image.Image) and not callable(a) and a == b)
            or (isinstance(a, Image.Image) and isinstance(b, Image.Image) and a == b)
            for a, b in zip(self._sources, other._sources, strict=True)
        )

    def __hash__(self) -> int:
        return hash((self.id, self.question, self.options, self.answer, self.group))

    @property
    def _plain(self) -> tuple[Any, ...]:
        return (self.question, self.options, self.answer, self.group, self.id, self.metadata, self.n_images)


def is_function(source: Any) -> bool:
    return callable(source) and not isinstance(source, Image.Image)


def _resolved(source: Any) -> Any:
    """A picture, its path or its bytes: functions are called."""
    while is_function(source):
        source = source()
    if isinstance(source, Mapping):  # how `datasets` hands out an image that it was told not to decode
        source = source["bytes"] if source.get("bytes") is not None else source["path"]
    if not isinstance(source, Image.Image | bytes | str | Path):
        raise TypeError(f"an image is a PIL image, a path, bytes or a function; got {type(source).__name__}")
    return source


def _derived_id(*parts: Any) -> str:
    """An id for a question that has none, from all that it is."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _picture_key(source: Any) -> str:
    """A digest of a picture's path, or of its content where it has none."""
    source = _resolved(source)
    if isinstance(source, str | Path):
        content = str(Path(source)).encode()
    elif isinstance(source, bytes):
        content = source
    else:
        content = f"{source.mode} {source.size}".encode() + source.tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


@cache
def _formats() -> tuple[str, ...]:
    """Formats that pictures are opened in: all but PostScript, which Pillow hands to another program to be run."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def picture_size(source: Any) -> tuple[int, int]:
    """Height and width of a picture, from its first bytes where it is a file."""
    source = _resolved(source)
    if isinstance(source, Image.Image):
        return source.height, source.width
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as image:
        return image.height, image.width


def _open_image(source: Any) -> Image.Image:
    source = _resolved(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if isinstance(source, Image.Image):
            source.load()
            image = source
        else:
            if not isinstance(source, bytes) and Path(source).exists() and not Path(source).is_file():
                raise OSError(f"{source} is no ordinary file")  # a pipe would be waited for without end
            # Closed at once: Pillow would keep the file of an animation open for its later frames.
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as image:
                image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.getextrema()[1] > 255):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))  # Pillow would cut at 255
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image)
    return image.convert("RGB") if image.mode != "RGB" else image


def multiple_choice_prompt(question: Question, options: Sequence[str]) -> str:
    """The question, lettered options, and the request to answer with a letter: the usual prompt for CVQA."""
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    request = "Answer with the option's letter from the given choices directly."
    return f"Question: {question.question}\n\nOptions: {lines}\n\n{request}"


def open_prompt(question: Question, options: Sequence[str]) -> str:
    """The question alone; the options are not shown. For answers read as the likelihood of each option's text."""
    return question.question


ANSWERS = ("letters", "generate", "text")
"""The ways of reading an answer; see `vlmneurons.run.readers`."""

_PROMPTS: dict[str, Prompt] = {"multiple choice": multiple_choice_prompt, "open": open_prompt}


class QuestionSet(Sequence[Question]):
    """Questions, and how they are asked.

    An immutable sequence: indexing gives a `Question`, slicing and every method gives a new set. Ids are unique.

    Args:
        questions: any iterable of `Question`.
        prompt: the user's turn, as a function of the question and its options in shown order; or ``"multiple choice"``
            or ``"open"`` for one of the built-in prompts. By default the one that fits ``answer``.
        answer: how the answer is read: ``"letters"`` (the logits of the option letters, one forward), ``"generate"``
            (greedy generation, parsed) or ``"text"`` (likelihood of each option's text); or an object of
            `vlmneurons.run.readers`.
        shuffle: seed of the order in which each question's options are shown, drawn per question from (seed, id);
            None shows them as they are.

    Raises:
        QuestionError: an id stands twice, or something that is not a Question was given.
    """

    def __init__(
        self,
        questions: Iterable[Question] = (),
        *,
        prompt: Prompt | str | None = None,
        answer: Any = "letters",
        shuffle: int | None = 0,
    ) -> None:
        if isinstance(questions, str | Question | set | frozenset) or not isinstance(questions, Iterable):
            raise QuestionError(f"a QuestionSet is made of a list of Question objects; got {type(questions).__name__}")
        items = tuple(questions)
        for item in items:
            if not isinstance(item, Question):
                raise QuestionError(f"a QuestionSet holds Question objects; got {type(item).__name__}")
        twice = [name for name, count in Counter(item.id for item in items).items() if count > 1]
        if twice:
            raise QuestionError(
                f"ids must be unique; more than once there are {_listed(twice)}. Give each question an id of its own"
            )
        if isinstance(answer, str) and answer not in ANSWERS:
            raise QuestionError(f"answer={answer!r} is not a way of reading answers; choose from {', '.join(ANSWERS)}")
        if not isinstance(answer, str) and (isinstance(answer, type) or not callable(getattr(answer, "read", None))):
            raise QuestionError(
                f"answer={answer!r} is not a way of reading answers; choose from {', '.join(ANSWERS)}, or give an "
                "AnswerReader, such as Generate()"
            )
        if isinstance(prompt, str) and prompt not in _PROMPTS:
            raise QuestionError(f"prompt={prompt!r} is not a built-in prompt; choose from {', '.join(_PROMPTS)}")
        if prompt is not None and not isinstance(prompt, str) and not callable(prompt):
            raise QuestionError(
                f"prompt={prompt!r} is no prompt: give a function of a question and its options, or one of "
                f"{', '.join(_PROMPTS)}"
            )
        if isinstance(shuffle, bool):
            raise QuestionError(
                f"shuffle is the seed of the options' order, or None to show them as they are; got {shuffle}"
            )
        if shuffle is not None:
            shuffle = whole("shuffle", shuffle, QuestionError)
        self._items = items
        self._prompt = prompt
        self.answer = answer
        self.shuffle = shuffle

    @property
    def prompt(self) -> Prompt:
        """The function that writes the user's turn."""
        if self._prompt is None:
            shows = getattr(self.answer, "shows_options", self.answer != "text")
            return multiple_choice_prompt if shows else open_prompt
        return _PROMPTS[self._prompt] if isinstance(self._prompt, str) else self._prompt

    def asked(self, **how: Any) -> "QuestionSet":
        """The same questions, asked another way: any of ``prompt``, ``answer``, ``shuffle``.

        Args:
            how: arguments of `QuestionSet` other than the questions; what is not given stays as it is.
        """
        return QuestionSet(
            self._items, **{"prompt": self._prompt, "answer": self.answer, "shuffle": self.shuffle, **how}
        )

    def _with(self, items: Iterable[Question]) -> "QuestionSet":
        return QuestionSet(items, prompt=self._prompt, answer=self.answer, shuffle=self.shuffle)

    # -- a sequence ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> "QuestionSet": ...
    def __getitem__(self, index: Any) -> Any:
        return self._with(self._items[index]) if isinstance(index, slice) else self._items[index]

    def __iter__(self) -> Iterator[Question]:
        return iter(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuestionSet) and self._items == other._items

    def __hash__(self) -> int:
        return hash(self._items)

    def __add__(self, other: Iterable[Question]) -> "QuestionSet":
        if not isinstance(other, Iterable):
            return NotImplemented
        return self._with((*self._items, *other))

    def __repr__(self) -> str:
        counts = self.counts()
        shown = ", ".join(f"{group}: {n}" for group, n in list(counts.items())[:8])
        more = f", and {len(counts) - 8} more groups" if len(counts) > 8 else ""
        return f"QuestionSet({len(self)} questions; {shown}{more})" if counts else "QuestionSet(empty)"

    # -- groups --------------------------------------------------------------------------------------------------------

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that occur, sorted."""
        return tuple(sorted({item.group for item in self._items}))

    def counts(self) -> dict[str, int]:
        """Number of questions of each group, groups sorted."""
        counts = Counter(item.group for item in self._items)
        return {group: counts[group] for group in sorted(counts)}

    def by_group(self) -> dict[str, "QuestionSet"]:
        """One set per group, groups sorted."""
        return {group: self._with(item for item in self._items if item.group == group) for group in self.groups}

    def group_by(self, key: str | Callable[[Question], str]) -> "QuestionSet":
        """The same questions, grouped by a metadata column, or by a function of the question.

        Args:
            key: a column of `Question.metadata`, or a function from a question to its group.

        Raises:
            QuestionError: a question has no such column, or nothing in it, such as None.
        """
        if not isinstance(key, str) and not callable(key):
            raise QuestionError(f"questions are grouped by a column or a function of the question; got {key!r}")
        return self._with(replace(item, group=_label(item, key)) for item in self._items)

    def filter(self, keep: Callable[[Question], bool] | None = None, **where: Any) -> "QuestionSet":
        """The questions for which ``keep`` is true, and whose fields or metadata have the given values.

        A value may be a set, list or other collection of allowed values. Each group that is named must be there, as a
        misspelt one would be missing from every table without a word; with ``keep`` it need not.

        Args:
            keep: a function from a question to whether it stays.
            where: fields or metadata, by name, and the value or values that they may have.

        Raises:
            QuestionError: a question has no field or metadata of such a name.
            GroupError: ``group`` names one that no question has.

        Example:
            ``questions.filter(group={"Egypt", "Japan"}, category="food")``
        """
        if keep is not None and not callable(keep):
            raise QuestionError(f"questions are kept by a function, or by values such as group='Japan'; got {keep!r}")
        of_key = {
            key: (value,)
            if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable)
            else tuple(value)
            for key, value in where.items()
        }
        groups = self.groups
        absent = [group for group in of_key.get("group", ()) if group not in groups]
        if absent:
            raise GroupError(
                f"no question is of group {absent[0]!r}; the groups are {', '.join(groups) or 'none'}. For "
                "those of a list that are there, filter with a function: filter(lambda item: item.group in wanted)"
            )

        def wanted(item: Question) -> bool:
            for key, allowed in of_key.items():
                if _value(item, key) not in allowed:
                    return False
            return keep is None or bool(keep(item))

        return self._with(item for item in self._items if wanted(item))

    def balanced(self, size: int | None = None, *, seed: int = 0) -> "QuestionSet":
        """The same number of questions of every group, chosen by a seeded hash of their ids.

        Args:
            size: questions per group; by default the size of the smallest group.
            seed: of the hash; another one chooses other questions.

        Raises:
            QuestionError: a group has fewer; the message names the thin groups.
        """
        counts = self.counts()
        seed = whole("seed", seed, QuestionError)
        if size is not None and (size := whole("size", size, QuestionError)) < 1:
            raise QuestionError(f"{size} questions per group were asked for; the least is 1")
        size = min(counts.values(), default=0) if size is None else size
        thin = [f"{group} ({n})" for group, n in counts.items() if n < size]
        if thin:
            raise QuestionError(f"{size} questions per group were asked for; fewer are in {_listed(thin)}")
        kept = set()
        for members in self.by_group().values():
            kept.update(sorted((item.id for item in members), key=lambda name: hash_of(seed, name))[:size])
        return self._with(item for item in self._items if item.id in kept)

    def at_least(self, size: int) -> "QuestionSet":
        """The questions of the groups that have at least ``size`` of them; thinner groups are left out.

        Args:
            size: least number of questions of a group.

        Example:
            ``questions.group_by("country").at_least(100).balanced(seed=0)``

        Raises:
            QuestionError: no group has as many; the message names the largest.
        """
        size = whole("size", size, QuestionError)
        counts = self.counts()
        kept = {group for group, n in counts.items() if n >= size}
        if counts and not kept:
            largest = max(counts, key=lambda group: counts[group])
            raise QuestionError(f"no group has {size} questions; the largest is {largest} ({counts[largest]})")
        return self._with(item for item in self._items if item.group in kept)

    def split(self, fraction: float = 0.5, *, seed: int = 0) -> tuple["QuestionSet", "QuestionSet"]:
        """Two disjoint sets, such as one to identify neurons on and one to evaluate on.

        Questions that share a picture stay together, every group is divided in the same proportion as nearly as that
        allows, and the result depends on ids, pictures and seed alone: not on the order of the questions, nor on where
        picture files lie.

        Args:
            fraction: share of the questions that goes to the first set, in (0, 1).
            seed: of the division; another one divides otherwise.

        Raises:
            QuestionError: the fraction is not in (0, 1).
        """
        fraction, seed = share("fraction", fraction, QuestionError), whole("seed", seed, QuestionError)
        clusters = self._by_picture()
        wanted = {group: fraction * n for group, n in self.counts().items()}
        given = dict.fromkeys(wanted, 0)
        first: set[str] = set()
        # Large clusters go first, so that small ones can even out what they leave.
        names = {key: _name_of_cluster(key, items) for key, items in clusters.items()}
        for key in sorted(clusters, key=lambda key: (-len(clusters[key]), hash_of(seed, names[key]))):
            sizes = Counter(item.group for item in clusters[key])
            lacking = sum((wanted[group] - given[group] - n / 2) * n for group, n in sizes.items())
            # An exact tie (one question, two sides) is decided by the hash, or one side would always win it.
            if lacking > 1e-9 or (abs(lacking) <= 1e-9 and int(hash_of(seed, names[key], "side"), 16) % 2):
                first.update(item.id for item in clusters[key])
                for group, n in sizes.items():
                    given[group] += n
        return (
            self._with(item for item in self._items if item.id in first),
            self._with(item for item in self._items if item.id not in first),
        )

    def _by_picture(self) -> dict[str, list[Question]]:
        """Questions that share a picture, directly or through others that do, under a key that no order changes."""
        parent: dict[str, str] = {}

        def root(key: str) -> str:
            while parent.setdefault(key, key) != key:
                parent[key] = key = parent[parent[key]]
            return key

        keys = []
        for item in self._items:
            single = item.image_id is not None or not item.n_images
            own = [item.image_key] if single else list(item._picture_keys)
            for key in own:
                first, second = sorted((root(own[0]), root(key)))
                parent[second] = first
            keys.append(own[0])
        clusters: dict[str, list[Question]] = {}
        for item, key in zip(self._items, keys, strict=True):
            clusters.setdefault(root(key), []).append(item)
        return clusters

    def pictures(self) -> tuple[str, ...]:
        """For each question the name of its picture: the same for questions that share one.

        Questions that share a picture through others do so too, as in `split`. A question without a picture, or whose
        picture does not open, shares it with none unless its ``image_id`` says otherwise.
        """

        def opens(item: Question) -> bool:
            try:
                return bool(item.image_key)
            except QuestionError:
                return False

        found = {item.id: key for key, items in self.filter(opens)._by_picture().items() for item in items}
        return tuple(found.get(item.id, f"no image: {item.id}") for item in self._items)

    def order(self, question: Question) -> tuple[int, ...]:
        """The order in which a question's options are shown: position shown → index in ``question.options``.

        Options that have letters of their own or speak of others' ("A. Oslo", "Both A and B", "None of the above") are
        shown as they stand, whatever ``shuffle`` is.

        Args:
            question: one of the questions.
        """
        of_kind("question", question, Question, QuestionError)
        indices = range(len(question.options))
        if self.shuffle is None or names_places(question.options):
            return tuple(indices)
        return tuple(sorted(indices, key=lambda index: hash_of(self.shuffle, question.id, index)))

    # -- where they come from ------------------------------------------------------------------------------------------

    @classmethod
    def from_folder(cls, folder: str | Path, table: str | None = None, **how: Any) -> "QuestionSet":
        """Questions from a folder that holds a CSV or JSON Lines table and picture files.

        The table has the columns ``image`` (a path within the folder; empty for none), ``question``, ``options`` (a
        JSON list, or columns ``A``, ``B``, ``C``, ``D`` …), ``answer`` (an index from 0, a letter, or the right
        option's text; refused where these differ), ``group``, and optionally ``id`` and ``image_id``; every further
        column becomes metadata.

        Args:
            folder: the folder.
            table: name of the table within it; by default the only ``.csv``, ``.tsv`` or ``.jsonl`` file.
            **how: ``prompt``, ``answer``, ``shuffle`` of the set.

        Raises:
            QuestionError: no table or several, a row that is not a question (which one is said), a picture path that
                leads out of the folder, or pictures under another name than ``image``.
        """
        of_kind("folder", folder, (str, os.PathLike), QuestionError, "a path")
        of_kind("table", table, (str, type(None)), QuestionError, "the name of a file")
        folder = Path(folder)
        if table is None:
            found = sorted(path.name for path in folder.glob("*") if path.suffix in (".csv", ".tsv", ".jsonl"))
            if len(found) != 1:
                has = f"{len(found)}: {', '.join(found)}" if found else "none"
                raise QuestionError(
                    f"{folder} must hold one .csv, .tsv or .jsonl table; it has {has}. Name one: table=…"
                )
            table = found[0]
        path = folder / table
        try:
            if path.exists() and not path.is_file():
                raise OSError("it is no ordinary file")
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise QuestionError(f"the table {path} cannot be read: {error}") from error
        if path.suffix == ".jsonl":
            rows = _json_lines(text, path)
        else:
            cells = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
            try:
                rows = list(cells)
            except csv.Error as error:
                raise QuestionError(f"{path}, after line {cells.line_num}, cannot be read: {error}") from error
        if not any("image" in row for row in rows):
            _refuse_pictures_elsewhere(rows, path, folder)
        return cls([_question_of_row(row, f"{path}, row {n}", folder) for n, row in enumerate(rows, start=1)], **how)

    @classmethod
    def from_dataset(cls, dataset: Any, columns: Mapping[str, str] | None = None, **how: Any) -> "QuestionSet":
        """Questions from a `datasets.Dataset` (one split). Pictures stay on disk until they are needed.

        Args:
            dataset: rows with the columns that `from_folder` describes.
            columns: the dataset's own name of each field, where it differs: ``{"image": "photo", "group": "country"}``.
            **how: ``prompt``, ``answer``, ``shuffle`` of the set.

        Raises:
            QuestionError: a column is missing, a row is not a question, or there are pictures and no column ``image``.
        """
        if not hasattr(dataset, "column_names") or not hasattr(dataset, "remove_columns"):
            raise QuestionError(
                f"from_dataset takes a datasets.Dataset; got {type(dataset).__name__}. Dataset.from_list makes one of "
                "dictionaries, and QuestionSet.from_folder reads a table"
            )
        if isinstance(dataset.column_names, Mapping):
            splits = ", ".join(dataset.column_names)
            raise QuestionError(f"from_dataset takes one split; got a {type(dataset).__name__} of {splits}: choose one")
        column_of = {name: name for name in ("image", "question", "options", "answer", "group", "id", "image_id")}
        of_kind("columns", {} if columns is None else columns, Mapping, QuestionError, "a dictionary {field: column}")
        unknown = [name for name in columns or {} if name not in column_of]
        if unknown:
            raise QuestionError(f"columns has no field {unknown[0]!r}; a question has {', '.join(column_of)}")
        column_of.update(columns or {})
        have = list(dataset.column_names)
        for wanted in {"question", "answer", "group"} | set(columns or {}):
            if column_of[wanted] not in have:
                raise QuestionError(
                    f"the dataset has no column {column_of[wanted]!r} for {wanted!r}; it has {', '.join(have)}"
                )
        image_column = column_of["image"] if column_of["image"] in have else None
        pictures = _picture_columns(dataset)
        if image_column is None and pictures:
            raise QuestionError(
                f"the dataset has no column 'image', and its column {pictures[0]!r} holds pictures: give "
                f"columns={{'image': {pictures[0]!r}}}, or remove the column to ask without pictures"
            )
        theirs = {column: name for name, column in column_of.items() if column in have}
        questions = []
        for n, (values, image) in enumerate(_rows_of_dataset(dataset, image_column)):
            row = {theirs[column]: value for column, value in values.items() if column in theirs}
            more = {column: value for column, value in values.items() if column not in theirs}
            if "options" not in row:
                row.update((letter, more.pop(letter)) for letter in LETTERS if letter in more)
            row["image"] = image
            questions.append(_question_of_row(row, f"dataset row {n}", None, more))
        return cls(questions, **how)


def _name_of_cluster(key: str, items: Sequence[Question]) -> str:
    """What stands for some questions about a picture in a division: not the folder that its file lies in today."""
    paths = any(isinstance(source, str | Path) for item in items if item.image_id is None for source in item._sources)
    return " ".join(sorted(item.id for item in items)) if paths else key


def _picture_columns(dataset: Any) -> list[str]:
    import datasets

    return [column for column, form in dataset.features.items() if isinstance(form, datasets.Image)]


def _rows_of_dataset(dataset: Any, image_column: str | None) -> Iterator[tuple[dict[str, Any], "DatasetImage | None"]]:
    """The rows of a `datasets.Dataset` without their pictures, and each row's picture, which is not read yet."""
    import datasets

    # Pictures are no metadata, and are not decoded here: one that is broken spoils its own question only.
    plain = dataset.remove_columns(sorted({*_picture_columns(dataset), image_column} - {None}))
    if image_column is None:
        yield from ((dict(values), None) for values in plain)
        return
    encoded = dataset.select_columns([image_column])
    if isinstance(encoded.features[image_column], datasets.Image):
        encoded = encoded.cast_column(image_column, datasets.Image(decode=False))
    tables = encoded.with_format("arrow").iter(batch_size=1000)
    present = [known for table in tables for known in table.column(image_column).is_valid().to_pylist()]
    for n, values in enumerate(plain):
        yield dict(values), DatasetImage(encoded, n, image_column) if present[n] else None


@dataclass(frozen=True)
class DatasetImage:
    """One picture of a dataset, read when it is called."""

    dataset: Any
    row: int
    column: str

    def __call__(self) -> Any:
        return self.dataset[self.row][self.column]


def _json_lines(text: str, path: Path) -> list[dict[str, Any]]:
    rows = []
    for n, line in enumerate(text.split("\n"), start=1):  # a JSON string may hold other line separators
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also of a number with thousands of digits
            raise QuestionError(f"{path}, line {n} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise QuestionError(f"{path}, line {n} is not a JSON object")
        rows.append(row)
    return rows


def _refuse_pictures_elsewhere(rows: Sequence[Mapping[str, Any]], path: Path, folder: Path) -> None:
    """A column of pictures by another name would be metadata, and the questions asked without them."""
    for name, value in (cell for row in rows for cell in row.items()):
        if isinstance(value, str) and value.lower().endswith(_PICTURES) and _is_file(folder / value):
            raise QuestionError(
                f"{path} has no column 'image', and its column {name!r} names a picture ({value}): call it 'image', or "
                "leave the column out to ask without pictures"
            )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # it cannot be a path
        return False


def _question_of_row(
    row: Mapping[str, Any], where: str, folder: Path | None, more: Mapping[str, Any] | None = None
) -> Question:
    """The question of a table's row; what the row has beyond a question's fields, and ``more``, is metadata."""
    row = dict(row)
    row.pop(None, None)  # type: ignore[call-overload]  # csv puts surplus cells under None
    options = row.pop("options", None)
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except (ValueError, RecursionError) as error:
            raise QuestionError(f"{where}: options must be a JSON list; got {options!r}") from error
    if options is None:
        letters = [letter for letter in LETTERS if row.get(letter) not in (None, "")]
        if letters != list(LETTERS[: len(letters)]):
            raise QuestionError(f"{where}: options {', '.join(letters)} are there, one before is empty")
        options = [str(row[letter]) for letter in letters]
        for letter in LETTERS:
            row.pop(letter, None)
    if not isinstance(options, Sequence) or isinstance(options, str):
        raise QuestionError(f"{where}: no options; give a list in 'options', or columns A, B, C, D")
    if any(option is None for option in options):  # its text would read "None"
        raise QuestionError(f"{where}: an option is missing; got {list(options)!r}")
    missing = [name for name in ("question", "answer", "group") if row.get(name) in (None, "")]
    if missing:
        raise QuestionError(f"{where}: no value for {', '.join(missing)}; the row has {', '.join(map(str, row))}")
    image = row.pop("image", None)
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    named: list[Any] = []
    if folder is not None and image not in (None, ""):
        named = image if isinstance(image, list) else [image]
        image = tuple(_inside(folder, part, where) for part in named)
        image = image[0] if len(image) == 1 else image
    identity, image_id = row.pop("id", None), row.pop("image_id", None)
    answer, question, group = row.pop("answer"), row.pop("question"), row.pop("group")
    texts = tuple(str(option) for option in options)
    right = _answer_index(answer, options, where)
    try:
        if identity in (None, "") and named:  # the same wherever the folder lies
            identity = _derived_id(
                str(question), texts, right, str(group), [str(part) for part in named], str(image_id)
            )
        return Question(
            image or None,
            str(question),
            texts,
            right,
            str(group),
            id="" if identity in (None, "") else str(identity),
            metadata={str(key): value for key, value in {**row, **(more or {})}.items()},
            image_id=None if image_id in (None, "") else str(image_id),
        )
    except QuestionError as error:
        raise QuestionError(f"{where}: {error}") from error


def _inside(folder: Path, name: Any, where: str) -> Path:
    """A picture path of a table, which may not lead out of the table's folder."""
    try:
        inside = (folder / str(name)).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links that lead to each other
        raise QuestionError(f"{where}: {str(name)!r} is no path of an image: {error}") from error
    if not inside:
        raise QuestionError(f"{where}: the image path {str(name)!r} leads out of the folder {folder}")
    return folder / str(name)


def _answer_index(answer: Any, options: Sequence[Any], where: str) -> int:
    if isinstance(answer, bool):
        raise QuestionError(f"{where}: answer {answer!r} is neither an index, a letter nor an option's text")
    if isinstance(answer, int | np.integer):
        return int(answer)
    if isinstance(answer, float) and answer.is_integer():
        return int(answer)
    text = str(answer).strip()
    same = [index for index, option in enumerate(options) if str(option).strip() == text][:1]
    place = None
    if re.fullmatch(r"-?\d{1,9}", text):
        place = int(text)
    elif len(text) == 1 and text.upper() in LETTERS:
        place = LETTERS.index(text.upper())
    if same and place is not None and place not in same and 0 <= place < len(options):
        raise QuestionError(
            f"{where}: answer {answer!r} may mean the text of an option or its place; among options that are numbers "
            "give its letter, among letters its index"
        )
    if same or place is not None:
        return same[0] if same else place  # type: ignore[return-value]
    raise QuestionError(f"{where}: answer {answer!r} is neither an index, a letter nor one of the options")


def _value(item: Question, key: str | Callable[[Question], Any]) -> Any:
    if callable(key):
        return key(item)
    if key in ("id", "question", "options", "answer", "group", "right", "n_images", "image_id"):
        return getattr(item, key)
    if key in item.metadata:
        return item.metadata[key]
    raise QuestionError(f"question {item.id!r} has no column {key!r}; it has {', '.join(item.metadata) or 'none'}")


def _label(item: Question, key: str | Callable[[Question], Any]) -> str:
    """A question's group by a column or function; what stands for nothing is no group."""
    value = _value(item, key)
    if is_missing(value):
        where = f"in the column {key!r}" if isinstance(key, str) else "from the function that groups"
        raise QuestionError(
            f"question {item.id!r} has {value} {where}, which is no group: leave such questions out with filter()"
        )
    return str(value)


def hash_of(*parts: Any) -> str:
    """The same hexadecimal digits for the same parts on every machine."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def normalize(text: str) -> str:
    """Text for comparison: Unicode NFKC, case folded, runs of white space as one space, no punctuation at the ends."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.strip("""#.,;:!?"'`*()[]{}。、""".replace("#", " ")) or folded
