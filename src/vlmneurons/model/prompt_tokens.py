"""Rendered prompts as token ids, and which tokens of a row are the question's own text.

A processor expands one image placeholder to hundreds of tokens, and the chat template puts text of its own around the
question's. Which tokens the user wrote is found by comparing the rendered prompt with the encoded row.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlmneurons.errors import QuestionError
from vlmneurons.model.abilities import default_of


class PromptTokenizer:
    """The tokenizer of a processor, as the processor itself calls it.

    Args:
        processor: the processor, or a tokenizer.
    """

    def __init__(self, processor: object) -> None:
        self.processor = processor
        self.tokenizer = cast(PreTrainedTokenizerBase, getattr(processor, "tokenizer", processor))

    def adds_special(self, prompt: str) -> bool:
        """Whether the tokenizer is to put its special tokens around a prompt.

        Args:
            prompt: a rendered prompt.
        """
        # As in transformers' own apply_chat_template(tokenize=True): a template that writes the beginning-of-text
        # token itself must not be given a second one.
        if default_of(self.processor, "text_kwargs", "add_special_tokens") is False:
            return False  # the processor puts them where they belong itself, as Florence-2's does
        beginning = getattr(self.tokenizer, "bos_token", None)
        return not (beginning and prompt.startswith(beginning))

    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """The ids of each prompt, its image placeholders unexpanded.

        Args:
            prompts: rendered prompts; one call of the tokenizer for all costs far less than one each.
        """
        special = set(map(self.adds_special, prompts))
        if len(special) != 1:
            return [self.ids([prompt])[0] for prompt in prompts]
        return list(map(list, self.tokenizer(list(prompts), add_special_tokens=special.pop())["input_ids"]))

    def own_positions(
        self, ids: Sequence[int], frame: tuple[str, str], prompt: str, added: str, name: str
    ) -> tuple[Int64[Tensor, " token"], int]:
        """Positions (among a row's real tokens) of the user's own text, and how many tokens a continuation added.

        Args:
            ids: the row's real tokens, placeholders expanded.
            frame: what stands before and after the text in the prompt.
            prompt: the rendered prompt.
            added: what continues it.
            name: of the question, for the error.

        Raises:
            QuestionError: the row is not the prompt with its placeholders expanded.
        """
        before, after = frame
        text = prompt[len(before) : len(prompt) - len(after)]
        # What processors do besides: a space after a picture that a word follows directly (Idefics2), and the end of a
        # line (PaliGemma) or of the text (Florence-2) after the prompt, which no continuation can then follow.
        ends = [] if added else ["\n", getattr(self.tokenizer, "eos_token", None) or ""]
        for inserted, end in (("", ""), (" ", ""), *(("", end) for end in ends)):
            start = len(before + inserted)
            aligned = self._aligned(ids, before + inserted + text + after + end, added, start, start + len(text))
            if aligned is not None:
                return aligned
        processor = type(self.processor).__name__
        if added:
            raise QuestionError(
                f"question {name!r}: {processor} puts text of its own after the prompt, so no "
                "text of an option continues it; read answers by letters or generation"
            )
        raise QuestionError(
            f"question {name!r}: the processor rewrote the question's own text, so its tokens cannot be "
            "told from the template's; count with a token rule of your own (tokens=function)"
        )

    def _aligned(
        self, ids: Sequence[int], prompt: str, added: str, start: int, end: int
    ) -> tuple[Int64[Tensor, " token"], int] | None:
        """What `own_positions` gives, if this prompt was encoded to these ids; its own text is at ``[start, end)``.

        The unexpanded prompt is tokenized with character offsets and compared with the row from both ends: all that
        may differ is what the placeholders grew to.
        """
        try:
            plain = self.tokenizer(
                prompt + added, add_special_tokens=self.adds_special(prompt), return_offsets_mapping=True
            )
        except NotImplementedError as error:
            raise QuestionError(
                f"{type(self.tokenizer).__name__} gives no character offsets, so template tokens cannot be told from "
                "the question's: use a fast tokenizer"
            ) from error
        plain_ids, offsets = list(plain["input_ids"]), plain["offset_mapping"]
        n_plain = len(plain_ids)
        n_prompt = len(self.ids([prompt])[0]) if added else n_plain
        # The ends are compared first: what a placeholder grows to stands before the question's text in most templates.
        # All that lies in the shared end or beginning is where it was; a token of the text between them was rewritten.
        tail = _n_shared(reversed(plain_ids), reversed(ids))
        head = _n_shared(plain_ids, ids) if tail < n_plain else 0
        if tail < n_plain - n_prompt:
            return None
        positions = []
        for position, (left, right) in enumerate(offsets[:n_prompt]):
            if right <= start or left >= end or right <= left:
                continue
            if position >= n_plain - tail:
                positions.append(len(ids) - n_plain + position)
            elif position < head:
                positions.append(position)
            else:
                return None
        return torch.tensor(positions, dtype=torch.int64), n_plain - n_prompt


def _n_shared(first: Iterable[int], second: Iterable[int]) -> int:
    """How many leading elements two iterables share."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
