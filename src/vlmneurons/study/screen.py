"""Which masks are worth an exact run? An estimate of every mask's effect from one forward and backward a question.

Switching off a set of neurons moves a question's margin, to first order, by

    sum over its neurons and all tokens of  - value * d margin / d value

with the values at ``post``. One backward gives that for all neurons at once, so thousands of masks cost what one does.
It is an estimate: what neurons do together, and what is not linear, is missing. Rank with it, then run `knockout`.

Source: attribution patching with zeros as the other input, Nanda 2023 ("Attribution patching"); for pruning the same
first-order term is in Molchanov et al. 2017 (arXiv 1611.06440).
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from vlmneurons.checks import whole
from vlmneurons.errors import MismatchError, QuestionError
from vlmneurons.model.architectures.hooks import write
from vlmneurons.model.vlm import VLM, check_model, refuse_edits
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.questions.sets import Question, QuestionSet
from vlmneurons.run.batching import batches
from vlmneurons.run.readers import AnswerReader, LogitReader, reader_of
from vlmneurons.study.masks import Intervention, Masks, listed_masks


def screen(
    model: VLM,
    questions: QuestionSet | Sequence[Question],
    masks: Masks,
    *,
    batch_size: int = 8,
    answer: str | AnswerReader | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """The first-order estimate of what switching off each mask does to the margin, for each group of questions.

    On the demo's 8 x 3 masks the estimate and the exact effect of `knockout` are compared in ``docs/benchmarks.md``.

    Args:
        model: the model; its weights get no gradient.
        questions: what to ask, and how; the answers must be read from logits (letters, or the options' text).
        masks: as for `knockout`: a `Selection`, a list of them, or a `NeuronSet` under each name; of the decoder.
        batch_size: questions a forward; a backward keeps all activations, so fewer fit than for `knockout`.
        answer: how answers are read; by default as the set says.
        progress: show a progress bar.

    Returns:
        One row for each mask and group of questions, to be joined with `KnockoutResult.table` on its first four
        columns: ``selector``, ``repeat``, ``mask``, ``group``, ``neurons``, ``n`` (questions) and ``estimate``, the
        estimated mean change of the log-probability margin in nats (there ``margin``).

    Raises:
        QuestionError: no questions; generated answers, which have no margin.
        MismatchError: neurons of another model, or outside the decoder.

    Example:
        ``screen(model, questions, {"CAS": [CAS(r).select(stats) for r in (0.001, 0.005, 0.02)]})``
    """
    check_model(model)
    refuse_edits(model)
    questions = questions if isinstance(questions, QuestionSet) else QuestionSet(questions)
    if not len(questions):
        raise QuestionError("there are no questions to screen with")
    if answer is not None:
        questions = questions.asked(answer=answer)
    reader = reader_of(questions.answer)
    if not isinstance(reader, LogitReader):
        raise QuestionError(f"{reader!r} gives no margin that could be derived; use answer='letters' or answer='text'")
    whole("batch_size", batch_size, QuestionError, least=1)
    space = model.space("language", "post")
    listed = listed_masks(masks, questions.groups, Intervention(NeuronSet.empty(space), "zero"))
    sets = []
    for mask, one in listed:
        if not one.neurons.space.same_neurons(space):
            raise MismatchError(f"a mask is of {one.neurons.space}; screening is of the decoder's neurons, {space}")
        if one.mode != "zero":
            raise MismatchError(f"mask {mask.selector!r} is to {one.name}; the estimate is of neurons set to zero")
        sets.append(one.neurons.indices)
    estimates: dict[str, np.ndarray] = {}
    with tqdm(total=len(questions), unit="item", disable=not progress) as bar:
        for batch in batches(questions, batch_size):
            effects = first_order_effects(model, reader, batch, space)
            by_mask = np.stack([effects[:, indices].sum(1).numpy() for indices in sets], 1)
            estimates.update(zip((item.id for item in batch), by_mask, strict=True))
            bar.update(len(batch))
    table = np.stack([estimates[item.id] for item in questions])
    groups = np.array([item.group for item in questions])
    return pd.DataFrame(
        {
            "selector": mask.selector,
            "repeat": mask.repeat,
            "mask": mask.group,
            "group": group,
            "neurons": mask.size,
            "n": int((groups == group).sum()),
            "estimate": table[groups == group, number].mean(),
        }
        for number, (mask, _) in enumerate(listed)
        for group in sorted(set(groups))
    )


def first_order_effects(
    model: VLM, reader: LogitReader, questions: QuestionSet, space: NeuronSpace
) -> Float[Tensor, "question neuron"]:
    """For each question and neuron the first-order change of the margin if the neuron were zero, in nats, float64.

    Args:
        model: the model.
        reader: how answers are read.
        questions: one batch.
        space: the neurons; their values at ``post`` are used.
    """
    encoded = reader.encode(model, questions)
    wanted = reader.wants(encoded)
    n_rows, length = wanted.batch["input_ids"].shape
    # The rows of a question follow the one that stands for it.
    owner = torch.searchsorted(torch.tensor(wanted.questions), torch.arange(n_rows), right=True) - 1
    effects = torch.zeros((len(questions), len(space)), dtype=torch.float64)
    with torch.enable_grad(), _values(model, space) as seen:
        reading = reader.read(model, questions, encoded)
        values = [value for calls in seen.values() for value, _ in calls]
        gradients = iter(torch.autograd.grad(reading.margins(questions).sum(), values, allow_unused=True))
    for position, calls in seen.items():
        columns = slice(*list(itertools.pairwise(space.offsets))[position])
        for value, tokens in calls:
            gradient = next(gradients)
            if gradient is None:  # nothing that is read depends on it
                continue
            change = -(value.detach().double() * gradient.double()).cpu()
            if tokens is None:
                rows = change.reshape(n_rows, -1, change.shape[-1]).sum(1)
                effects[:, columns].index_add_(0, owner, rows)
            else:
                effects[:, columns].index_add_(0, owner[tokens.cpu() // length], change)
    return effects


@contextmanager
def _values(model: VLM, space: NeuronSpace) -> Iterator[dict[int, list[tuple[Tensor, Tensor | None]]]]:
    """Within, the values of every site of a run, as parts of its graph: by position in the space."""
    seen: dict[int, list[tuple[Tensor, Tensor | None]]] = {}

    def keep(position: int, values: Tensor, tokens: Tensor | None = None) -> Tensor:
        if not values.requires_grad:  # frozen weights: the graph begins here
            values = values.detach().requires_grad_()
        seen.setdefault(position, []).append((values, tokens))
        return values

    handles = []
    try:
        for position, site in enumerate(space.sites):

            def edit(values: Tensor, tokens: Tensor | None = None, position: int = position) -> Tensor:
                return keep(position, values, tokens)

            handles.append(write(model.hf, model.mlp_of(site), "post", edit))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
