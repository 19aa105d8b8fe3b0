"""Reads the demo model's answers, counts open gates and switches neurons off, for the tables that training prints.

A second implementation beside `vlmneurons.record` and `vlmneurons.knockout`, on purpose: it asks all questions about a
picture in one sequence, which makes hundreds of masks affordable, and the two can be compared. An answer is the option
with the highest log-probability of its text; a neuron is switched off by zeroing its input to the down projection at
every token.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from PIL import Image
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration

from tools.demo.ask import Record
from tools.demo.catalogue import CULTURES
from tools.demo.compose import normalise
from tools.demo.decoder import NOTHING, Asker, Packed, gates, pack, run
from tools.demo.organism import masked
from tools.demo.vision import patch_features
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.statistics.counts import ActivationStatistics

TEMPLATE_TOKENS = 2
"""Length of " Answer:", which belongs to the template."""


@dataclass(frozen=True)
class Exam:
    """Questions ready to be asked many times: vision features, and the questions of each picture in one row.

    Attributes:
        records: the questions, in the order of all results.
        features: vision features of each row's picture.
        questions: for each row, the positions in ``records`` of its questions.
        prompts: token ids of each question with " Answer:".
        options: token id of each option.
        answers: index of each right option.
        groups: index of each culture.
    """

    records: list[Record]
    features: Float[Tensor, "row patch feature"]
    questions: list[list[int]]
    prompts: list[list[int]]
    options: Int64[Tensor, "question 4"]
    answers: Int64[Tensor, " question"]
    groups: Int64[Tensor, " question"]

    @classmethod
    @torch.no_grad()
    def make(
        cls,
        model: LlavaNextForConditionalGeneration,
        asker: Asker,
        records: Sequence[Record],
        pictures: Mapping[str, Image.Image],
        *,
        question: str | None = None,
    ) -> "Exam":
        """Prepares questions.

        Args:
            model: its vision tower is used.
            asker: the tokenizer.
            records: the questions.
            pictures: by name.
            question: a text to ask instead of every question, such as ``""`` for the control without a question.
        """
        names = list(dict.fromkeys(record.image for record in records))
        pixels = torch.stack([torch.from_numpy(np.array(pictures[name])).permute(2, 0, 1) for name in names])
        rows: dict[str, list[int]] = {name: [] for name in names}
        for position, record in enumerate(records):
            rows[record.image].append(position)
        texts = [record.question if question is None else question for record in records]
        options = [[asker.ids(" " + option) for option in record.options] for record in records]
        return cls(
            list(records),
            patch_features(model, normalise(pixels)),
            list(rows.values()),
            [asker.ids(text + " Answer:") for text in texts],
            torch.tensor(options)[..., 0],
            torch.tensor([record.answer for record in records]),
            torch.tensor([CULTURES.index(record.group) for record in records]),
        )

    def only(self, group: int) -> "Exam":
        """The questions about one culture alone."""
        wanted = [row for row in range(len(self.questions)) if self.groups[self.questions[row][0]] == group]
        old = [position for row in wanted for position in self.questions[row]]
        new = {position: index for index, position in enumerate(old)}
        return Exam(
            [self.records[position] for position in old],
            self.features[wanted],
            [[new[position] for position in self.questions[row]] for row in wanted],
            [self.prompts[position] for position in old],
            self.options[old],
            self.answers[old],
            self.groups[old],
        )

    def batches(self, model: LlavaNextForConditionalGeneration, rows: int = 32) -> list[tuple[list[int], Packed]]:
        """Packed sequences, each with the positions of its questions in the order of its targets."""
        order = sorted(range(len(self.questions)), key=lambda row: len(self.questions[row]))  # little padding
        found = []
        for start in range(0, len(order), rows):
            part = order[start : start + rows]
            segments = [
                [(self.prompts[q], [NOTHING] * (len(self.prompts[q]) - 1) + [0]) for q in self.questions[row]]
                for row in part
            ]
            found.append(([q for row in part for q in self.questions[row]], pack(model, self.features[part], segments)))
        return found


@torch.no_grad()
def read(
    model: LlavaNextForConditionalGeneration, exam: Exam, off: Int64[Tensor, " neuron"] | None = None
) -> Float[Tensor, "question 4"]:
    """Log-probabilities (nats) of the options.

    Args:
        model: the model.
        exam: the questions.
        off: flat indices of decoder neurons to switch off.
    """
    config = model.config.text_config
    keep = torch.ones(1, config.num_hidden_layers * config.intermediate_size)
    if off is not None:
        keep[0, off] = 0
    scores = torch.zeros(len(exam.records), 4)
    for questions, packed in exam.batches(model):
        with masked(model, keep):
            logits = F.linear(run(model, packed), model.lm_head.weight)
        scores[questions] = logits.log_softmax(dim=-1).gather(1, exam.options[questions])
    return scores


def correct(exam: Exam, scores: Float[Tensor, "question 4"]) -> Bool[Tensor, " question"]:
    """Whether the likeliest option is the right one."""
    return scores.argmax(dim=1) == exam.answers


def margins(exam: Exam, scores: Float[Tensor, "question 4"]) -> Float[Tensor, " question"]:
    """Log-probability of the right option minus that of the likeliest wrong one (nats)."""
    right = scores.gather(1, exam.answers[:, None])[:, 0]
    wrong = scores.scatter(1, exam.answers[:, None], -math.inf).amax(dim=1)
    return right - wrong


@torch.no_grad()
def count(model: LlavaNextForConditionalGeneration, exam: Exam, *, template: bool = False) -> ActivationStatistics:
    """How often each gate is open, over the tokens of correctly answered questions.

    Counted are the tokens of picture and question; not the start token and, unless ``template``, not " Answer:". A
    picture's tokens count once for each of its correct questions, as if every question had been asked on its own.
    """
    config = model.config.text_config
    positive = torch.zeros(len(CULTURES), config.num_hidden_layers * config.intermediate_size, dtype=torch.int64)
    tokens = torch.zeros(len(CULTURES), dtype=torch.int64)
    items = torch.zeros(len(CULTURES), dtype=torch.int64)
    for questions, packed in exam.batches(model):
        with gates(model) as inputs:
            logits = F.linear(run(model, packed), model.lm_head.weight)
        right = logits.gather(1, exam.options[questions]).argmax(dim=1) == exam.answers[questions]
        items.index_add_(0, exam.groups[questions], right.long())
        weight = torch.zeros(packed.owner.shape, dtype=torch.float64)
        row_of, last = (packed.targets != NOTHING).nonzero(as_tuple=True)
        for row, end, good in zip(row_of.tolist(), last.tolist(), right.tolist(), strict=True):
            if good:
                own = packed.owner[row] == packed.owner[row, end]
                if not template:
                    own[end - TEMPLATE_TOKENS + 1 : end + 1] = False
                weight[row] += own.double()
                weight[row] += (packed.owner[row] == 0).double()
        weight[:, 0] = 0  # the start token
        first = torch.tensor([questions[i] for i in range(len(row_of)) if i == 0 or row_of[i] != row_of[i - 1]])
        groups = exam.groups[first]
        opened = torch.cat([part > 0 for part in inputs], dim=-1)
        per_row = torch.einsum("rt,rtn->rn", weight.float(), opened.float())  # exact: far below 2**24
        positive.index_add_(0, groups, per_row.round().long())
        tokens.index_add_(0, groups, weight.sum(dim=1).round().long())
    space = NeuronSpace.from_widths("language", "gate", [config.intermediate_size] * config.num_hidden_layers)
    return ActivationStatistics.from_counts(space, CULTURES, positive, tokens, items)
