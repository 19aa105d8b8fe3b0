"""Which masks are worth an exact run? An estimate of every mask's effect from one forward and backward a question.

Switching off a set of neurons moves a question's margin, to first order, by

    sum over its neurons and all tokens of  - value * d margin / d value

with the values at ``post``. One backward gives that for all neurons at once, so thousands of masks cost what one does.
It is an estimate: what neurons do together, and what is not linear, is missing. Rank with it, then run `knockout`.

Source: attribution patching with zeros as the other input, Nanda 2023 ("Attribution patching"); for pruning the same
first-order term is in Molchanov et al. 2017 (arXiv 1611.06440).
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from vlmneurons.errors import MismatchError, QuestionError
from vlmneurons.files.stopping import hooked
from vlmneurons.model.architectures.hooks import write
from vlmneurons.model.vlm import VLM
from vlmneurons.neurons.sets import NeuronSet
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.progress import Progress
from vlmneurons.questions.question import Question
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.run.ask import Job, Options, ask, engine_of, to_ask
from vlmneurons.run.engine import Engine, need_gradients
from vlmneurons.run.intervention import Intervention
from vlmneurons.run.readers import AnswerReader, LogitReader
from vlmneurons.run.remote import Remote
from vlmneurons.study.masks import Masks, listed_masks


def screen(
    model: VLM,
    questions: QuestionSet | Sequence[Question],
    masks: Masks,
    *,
    batch_size: int = 8,
    answer: str | AnswerReader | None = None,
    by_length: bool = False,
    prefetch: int | None = None,
    on_error: str = "raise",
    progress: Progress = True,
    remote: Remote = False,
    distributed: bool = False,
) -> pd.DataFrame:
    """The first-order estimate of what switching off each mask does to the margin, for each group of questions.

    On the demo's 8 x 3 masks the estimate and the exact effect of `knockout` are compared in ``docs/benchmarks.md``.

    Args:
        model: the model; its weights get no gradient.
        questions: what to ask, and how; the answers must be read from logits (letters, or the options' text).
        masks: as for `knockout`: a `Selection`, a list of them, or a `NeuronSet` under each name; of the decoder.
        batch_size: questions a forward; a backward keeps all activations, so fewer fit than for `knockout`.
        answer: how answers are read; by default as the set says.
        by_length: let questions of like length share a batch; see `record`.
        prefetch: how many batches a thread prepares while the model runs; see `record`.
        on_error: ``"raise"``, or ``"skip"`` questions that cannot be asked.
        progress: show a progress bar.
        remote: only False: gradients do not come back from a model that runs elsewhere.
        distributed: share the batches with the other processes of a ``torchrun``; each gets the whole.

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
    options = Options(batch_size, by_length, prefetch, on_error, progress, remote, distributed)
    questions = to_ask(questions, answer, "to screen with")
    engine = engine_of(model, questions, remote)
    need_gradients(engine, "screening")
    if not isinstance(engine.reader, LogitReader) or engine.reader.grades:
        raise QuestionError(
            f"{engine.reader!r} gives no margin that could be derived; use answer='letters' or answer='text'"
        )
    space = model.space("language", "post")
    listed = listed_masks(masks, questions.groups, Intervention(NeuronSet.empty(space), "zero"))
    sets = []
    for mask, one in listed:
        if not one.neurons.space.same_neurons(space):
            raise MismatchError(f"a mask is of {one.neurons.space}; screening is of the decoder's neurons, {space}")
        if one.mode != "zero":
            raise MismatchError(f"mask {mask.selector!r} is to {one.name}; the estimate is of neurons set to zero")
        sets.append(cast(NeuronSet, one.neurons).indices)
    job = _ScreeningJob(engine, space, sets)
    ask(job, questions, options)
    estimates = {name: row for part in options.processes.gather(job.estimates) for name, row in part.items()}
    kept = [item for item in questions if item.id in estimates]
    if not kept:
        raise QuestionError("no question could be asked")
    table = np.stack([estimates[item.id] for item in kept])
    groups = np.array([item.group for item in kept])
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


class _ScreeningJob(Job[np.ndarray]):
    """Sums each question's first-order effects over the neurons of each mask."""

    gradients = True

    def __init__(self, engine: Engine, space: NeuronSpace, sets: Sequence[Tensor]) -> None:
        super().__init__(engine)
        self._space, self._sets = space, sets
        self.estimates: dict[str, np.ndarray] = {}

    def run(self, questions: QuestionSet, encoded: object, told: Callable[[int], object]) -> np.ndarray:
        """See `Job.run`."""
        reader = self.engine.reader
        assert isinstance(reader, LogitReader)
        effects = first_order_effects(self.engine.model, reader, questions, self._space, encoded)
        return np.stack([effects[:, indices].sum(1).numpy() for indices in self._sets], 1)

    def take(self, number: int, questions: QuestionSet, made: np.ndarray) -> int:
        """See `Job.take`."""
        self.estimates.update(zip((item.id for item in questions), made, strict=True))
        return len(questions)


def first_order_effects(
    model: VLM, reader: LogitReader, questions: QuestionSet, space: NeuronSpace, encoded: object = None
) -> Float[Tensor, "question neuron"]:
    """For each question and neuron the first-order change of the margin if the neuron were zero, in nats, float64.

    Args:
        model: the model.
        reader: how answers are read.
        questions: one batch.
        space: the neurons; their values at ``post`` are used.
        encoded: what the reader made of the batch, if it has.
    """
    encoded = reader.encode(model, questions) if encoded is None else encoded
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

    edits = ((model.mlp_of(site), functools.partial(keep, position)) for position, site in enumerate(space.sites))
    with hooked(write(model.hf, mlp, "post", edit) for mlp, edit in edits):
        yield seen
