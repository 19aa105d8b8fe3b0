"""How a question's text becomes the prompt: the chat template, and what is wrong with some of them.

A prompt that is not what the user meant is a silent mistake, so each template is tried once on a text that it cannot
know. This finds templates that drop the text, show it twice or rewrite it; those of text models, which want a string
and write a list of parts out as Python code; and those that open a thought where the answer would begin.
"""

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, cast

from transformers import BatchFeature, PreTrainedTokenizerBase

from vlmneurons.checks import Keywords
from vlmneurons.errors import ArchitectureError, QuestionError

Template = Callable[[str, int], str] | Literal["plain"]
"""A function ``(text, n_images) -> prompt``, or ``"plain"``: the text after its pictures' placeholders, and no more."""

THOUGHT = re.compile(r"[<\[◁](/?)(?:seed:)?(?:think|thinking|thought|reasoning|reflection)[>\]▷]", re.I)
"""Where a model's thought begins, or, with the first group, ends."""

_REPLACE = "Give VLM(…, template=function) instead"
_MARK = "QUESTIONTEXTGOESHERE"
_AS_CODE = re.compile(r"['\"]text['\"]\s*:\s*['\"]$")
_PLAIN_PROMPTS = ("PaliGemmaProcessor",)
"""Processors without a chat template whose prompts are a text after its pictures' placeholders, and nothing else."""
_SWITCHES = ("enable_thinking", "thinking")
"""Template arguments by which a model is told not to think: Qwen 3 and GLM, DeepSeek and Granite."""
_SET_BY_LIBRARY = (
    "conversation",
    "messages",
    "chat_template",
    "add_generation_prompt",
    "tokenize",
    "continue_final_message",
)


class Processor(Protocol):
    """What is asked of a processor, or of the tokenizer of a text model: transformers has no type for both."""

    def __call__(self, **inputs: Any) -> BatchFeature:
        """Model inputs of texts, and of what they show."""
        ...

    def apply_chat_template(self, conversation: list[dict[str, object]], **options: Any) -> str:
        """A conversation as the model expects it."""
        ...

    def save_pretrained(self, save_directory: "str | os.PathLike[str]") -> object:
        """Keep it beside the model."""
        ...


Media = tuple[int, int, int]
"""How many pictures, sounds and videos a question shows."""


class _Frame(NamedTuple):
    """What stands before and after a question's text; and whether the chat template takes it as a string, not parts."""

    before: str
    after: str
    as_text: bool


class Prompts:
    """One user turn of a model, up to where its answer begins.

    Args:
        processor: the model's processor, or its tokenizer.
        template: what replaces the chat template; None where the chat template is used.
        template_kwargs: further arguments of the chat template, such as ``{"enable_thinking": False}``.

    Raises:
        ArchitectureError: ``template`` cannot replace one, or the chat template does not look at an argument.
    """

    def __init__(
        self, processor: object, template: Template | None, template_kwargs: Mapping[str, object] | None
    ) -> None:
        takes_both = callable(template) and _call_fault(template, "", 0) == ""
        if template is not None and template != "plain" and not takes_both:
            raise ArchitectureError(f"template is a function (text, n_images) -> prompt, or 'plain'; got {template!r}")
        if template_kwargs is not None and not isinstance(template_kwargs, Mapping):
            raise ArchitectureError(f"template_kwargs are a mapping of names to values; got {template_kwargs!r}")
        self.processor: Processor = cast(Processor, processor)
        self.template: Template | None = template
        self.arguments: Keywords = dict(template_kwargs or {})
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._frames: dict[tuple[Media, bool, str], _Frame] = {}
        source = str(self.chat_template or "")
        for name in self.arguments:
            if name in _SET_BY_LIBRARY:
                raise ArchitectureError(f"template_kwargs: {name!r} is set by the library")
            if template is not None:
                raise ArchitectureError(f"template_kwargs: {name!r} is for a chat template, and template= replaces it")
            if not re.search(rf"\b{re.escape(name)}\b", source):
                raise ArchitectureError(
                    f"template_kwargs: the chat template of {type(processor).__name__} does not look at {name!r}"
                )

    @property
    def chat_template(self) -> Any:
        """The chat template: the processor's, or its tokenizer's; None if there is none."""
        return getattr(self.processor, "chat_template", None) or getattr(self._tokenizer, "chat_template", None)

    def render(self, text: str, n_images: int, n_sounds: int = 0, n_videos: int = 0, *, bare: bool = False) -> str:
        """A prompt of one question.

        Args:
            text: the question's text, with its options.
            n_images: how many pictures it shows.
            n_sounds: how many sounds it has.
            n_videos: how many videos.
            bare: whether the text stands alone after its pictures' placeholders, whatever the template is.

        Raises:
            QuestionError: there is no chat template, or it does not show the text as it is.
        """
        if callable(self.template) and not bare:
            return self._from_function(self.template, text, n_images, n_sounds, n_videos)
        plain = bare or self.template == "plain"
        if plain or (self.chat_template is None and type(self.processor).__name__ in _PLAIN_PROMPTS):
            if n_sounds or n_videos:
                raise QuestionError(
                    "a prompt of text after its pictures' placeholders has no place for sounds and videos; give "
                    "VLM(…, template=function), where function(text, n_images, n_sounds=…, n_videos=…) has one"
                )
            return self._placeholder(n_images) * n_images + text
        if self.chat_template is None:
            raise QuestionError(
                f"the processor {type(self.processor).__name__} has no chat template; give VLM(…, template=function), "
                "where function(text, n_images) returns the whole prompt with its image placeholders, or "
                "template='plain', which shows the text alone, as to a base model"
            )
        media = (n_images, n_sounds, n_videos)
        before, after, as_text = self._frame(media)
        rendered = self._turn(text, media, as_text=as_text)
        shown = rendered[len(before) : len(rendered) - len(after)]
        if not (rendered.startswith(before) and rendered.endswith(after)) or shown.strip() != text.strip():
            raise QuestionError(
                f"the chat template changes the question's text: {text[:60]!r} became {shown[:60]!r}. {_REPLACE}"
            )
        return rendered

    @staticmethod
    def _from_function(template: Callable[..., object], text: str, n_images: int, n_sounds: int, n_videos: int) -> str:
        """The prompt that a user's function makes.

        Raises:
            QuestionError: it has no argument for sounds or videos that the question has, or gives no text.
        """
        streams = {name: n for name, n in (("n_sounds", n_sounds), ("n_videos", n_videos)) if n}
        if fault := _call_fault(template, text, n_images, **streams):
            kinds = " and ".join(name[2:] for name in streams)
            raise QuestionError(
                f"the template function has no place for the questions' {kinds} ({fault}): give VLM(…, "
                f"template=function), where function(text, n_images, {'=…, '.join(streams)}=…) puts their placeholders "
                f"into the prompt; to ask without {kinds}: vlmneurons.study.controls.blind(questions)"
            )
        rendered = template(text, n_images, **streams)
        if not isinstance(rendered, str):
            raise QuestionError(f"the template function gave {type(rendered).__name__}, not a text")
        return rendered

    def frame(self, n_images: int, n_sounds: int = 0, n_videos: int = 0, *, bare: bool = False) -> tuple[str, str]:
        """What stands before and after a question's text.

        Args:
            n_images: how many pictures the question shows.
            n_sounds: how many sounds it has.
            n_videos: how many videos.
            bare: whether the text stands alone after its pictures' placeholders, whatever the template is.

        Raises:
            QuestionError: the text is not shown, shown several times, or as code.
        """
        before, after, _ = self._frame((n_images, n_sounds, n_videos), bare)
        return before, after

    def _frame(self, media: Media, bare: bool = False) -> _Frame:
        key = (media, bare, str(self.chat_template))  # a user may set another template on the processor
        if key not in self._frames:
            self._frames[key] = self._tried(media, bare)
        return self._frames[key]

    def _tried(self, media: Media, bare: bool) -> _Frame:
        """The frame, found by showing the template a text that it cannot know."""
        is_chat = self.template is None and self.chat_template is not None and not bare
        shown, as_text = self._tried_chat(media) if is_chat else (self.render(_MARK, *media, bare=bare), False)
        before, *others = shown.split(_MARK)
        if is_chat and not others:
            # Templates of text-only models join or drop a list of parts: never ask a question that is not there.
            raise QuestionError("the chat template does not show the question's text: it may expect plain strings")
        if len(others) != 1:
            raise QuestionError(
                f"the chat template shows the user's text {len(others)} times; expected once. {_REPLACE}"
            )
        if is_chat and _AS_CODE.search(before):
            raise QuestionError(
                "the chat template expects a string, so it has no place for pictures and would show the question "
                f"as Python code. {_REPLACE}"
            )
        return _Frame(before, others[0], as_text)

    def _tried_chat(self, media: Media) -> tuple[str, bool]:
        """The chat template with the mark as its text, and whether it was given as a string, not as a list of parts.

        The first way counts that shows the mark once, and not as code; else the one that shows it most often, which
        says what is wrong with the template.
        """
        text_first = isinstance(self.processor, PreTrainedTokenizerBase)
        ways = [False] if any(media) else [text_first, not text_first]
        attempts: list[tuple[str, bool]] = []
        for as_text in ways:
            try:
                rendered = self._turn(_MARK, media, as_text=as_text)
            except Exception as error:  # a template's own errors are of any kind: it adds a list to a string
                if as_text is ways[-1] and not attempts:
                    raise QuestionError(
                        f"the chat template refuses a question ({type(error).__name__}: {error}). {_REPLACE}"
                    ) from error
                continue
            if rendered.count(_MARK) == 1 and not _AS_CODE.search(rendered.split(_MARK)[0]):
                return rendered, as_text
            attempts.append((rendered, as_text))
        return max(attempts, key=lambda attempt: attempt[0].count(_MARK))

    def thought(self, n_images: int, n_sounds: int = 0, n_videos: int = 0) -> str | None:
        """The tag with which the prompt opens a thought of the model and leaves it open; None if it does not.

        Args:
            n_images: how many pictures the question shows.
            n_sounds: how many sounds it has.
            n_videos: how many videos.
        """
        tags = list(THOUGHT.finditer(self.frame(n_images, n_sounds, n_videos)[1]))
        return tags[-1][0] if tags and not tags[-1][1] else None

    def refuse_thought(self, n_images: int, n_sounds: int = 0, n_videos: int = 0) -> None:
        """Refuse to read an answer at the prompt's end where the model would think first.

        Args:
            n_images: how many pictures the question shows.
            n_sounds: how many sounds it has.
            n_videos: how many videos.

        Raises:
            QuestionError: the template opens a thought, or leaves it to the model, and the user has not said whether it
                may think.
        """
        media = (n_images, n_sounds, n_videos)
        tag, switch = self.thought(*media), self._switch(media)
        if tag is None and switch is None:
            return
        closed = f"template_kwargs={{{switch!r}: False}})" if switch else "template=function) that closes it"
        does = f"opens a thought ({tag})" if tag else f"lets the model think ({switch})"
        raise QuestionError(
            f"the chat template {does} where the answer would begin, so options would be read as the thought's first "
            f"words: give VLM(…, {closed}, or read answers by generation, answer=vn.Generate(max_new_tokens=…)"
        )

    def _switch(self, media: Media) -> str | None:
        """The argument by which the template lets the model think before it answers; None where the user has set it."""
        if self.template is not None:
            return None
        for name in _SWITCHES:
            if name not in self.arguments and re.search(rf"\b{name}\b", str(self.chat_template or "")):
                _, after, as_text = self._frame(media)
                quiet = self._turn(_MARK, media, as_text=as_text, **{name: False})
                if quiet.split(_MARK)[-1] != after:
                    return name
        return None

    def _turn(self, text: str, media: Media, *, as_text: bool, **switches: Any) -> str:
        n_images, n_sounds, n_videos = media
        kinds = ["image"] * n_images + ["video"] * n_videos + ["audio"] * n_sounds
        parts = [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]
        content: str | Sequence[Mapping[str, str]] = text if as_text else parts
        has_template = getattr(self.processor, "chat_template", None)
        # A processor does not look at its tokenizer's template.
        options = {} if has_template else {"chat_template": self.chat_template}
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=False,
            **options,
            **{**self.arguments, **switches},
        )

    def _placeholder(self, n_images: int) -> str:
        token = getattr(self.processor, "image_token", None)
        if n_images and token is None:
            raise QuestionError(
                f"template='plain': {type(self.processor).__name__} names no image placeholder; give "
                "VLM(…, template=function), where function(text, n_images) returns the whole prompt"
            )
        return str(token)


def _call_fault(function: Callable[..., object], *values: object, **options: object) -> str:
    """Why a function cannot be called with these arguments; empty where it can, or where Python does not know."""
    try:
        inspect.signature(function).bind(*values, **options)
    except TypeError as error:
        return str(error)
    except ValueError:  # a function that is not written in Python may have no signature
        return ""
    return ""
