"""How much each neuron moves the model's answers, by gradients: the part of gradient selectors that needs the model.

Every neuron is given a factor, 1, that multiplies its value. The derivative of the answer's margin by that factor *is*
activation times gradient, summed over tokens; and no activation has to be kept for it. At other factors between 0 and 1
the same derivative is what integrated gradients add up.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from vlmneurons.checks import of_kind, real, whole
from vlmneurons.errors import ActivationError, MismatchError, QuestionError
from vlmneurons.model.architectures.hooks import write
from vlmneurons.model.encoder import TOKEN_RULES, Batch, TokenRule
from vlmneurons.model.vlm import VLM, check_model, refuse_edits
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.questions.sets import Question, QuestionSet
from vlmneurons.recording.record import CONDITIONS
from vlmneurons.recording.recorder import provenance_of_run, rule_name
from vlmneurons.run.readers import AnswerReader, Reading, reader_of
from vlmneurons.statistics.counts import AttributionStatistics

METHODS = ("gradient", "integrated")
"""Activation times gradient; or gradients integrated while a layer's neurons grow from zero (knowledge neurons)."""


def attribute(
    model: VLM,
    questions: QuestionSet | Sequence[Question],
    space: NeuronSpace | None = None,
    *,
    method: str = "gradient",
    steps: int = 20,
    condition: str = "correct",
    tokens: TokenRule | None = None,
    answer: str | AnswerReader | None = None,
    threshold: float = 0.2,
    progress: bool = True,
) -> AttributionStatistics:
    """How much each neuron moves the answers of each group's questions, in nats.

    What is differentiated is the margin: log-probability of the right option less that of the best other one (for
    letters, the difference of the logits). Questions are run one at a time, each with a forward and a backward; no
    gradient of a weight is computed or kept, and the model is as it was afterwards.

    Args:
        model: the model.
        questions: what to ask, and how. Answers must be read by likelihood: by letters or by text.
        space: the neurons; by default the gates of the language tower. Gate, up and post give the same numbers, because
            a factor on one is a factor on the product.
        method: ``"gradient"``: activation times gradient, one backward a question. ``"integrated"``: integrated
            gradients of one layer's neurons at a time, growing from zero: ``layers * steps`` backwards a question; the
            attributions of a layer add up to what the layer's neurons contribute to the margin (up to the steps).
        steps: number of steps of the integral (midpoint rule).
        condition: which questions enter: ``"correct"``, ``"wrong"`` or ``"all"``.
        tokens: at which tokens neurons of the language tower are looked at; None for all, as ablation acts on all.
        answer: how answers are read; by default as the set says.
        threshold: share of a question's highest attribution above which a neuron matters much to it (``strong``).
        progress: show a progress bar.

    Returns:
        Sums over each group's questions, groups sorted. A group none of whose questions met the condition has zeros.

    Raises:
        QuestionError: answers are read by generation, or a question cannot be asked. Its ``partial``, like that of any
            error or interrupt on the way, holds the attributions of the questions before.
        MismatchError: the space is not this model's, or is of ``pre``, whose factor is none on the product.
        ActivationError: a gradient is NaN or infinite; the message names the site and the question.

    Source: activation times gradient, Shrikumar et al. 2017 (arXiv 1704.02685); integrated gradients of MLP neurons,
    Dai et al. 2022 (arXiv 2104.08696), from which `IntegratedGradients` says where this deviates.
    """
    for name, given, allowed in (("method", method, METHODS), ("condition", condition, CONDITIONS)):
        if given not in allowed:
            raise QuestionError(f"{name}={given!r} does not exist; choose from {', '.join(allowed)}")
    check_model(model)
    refuse_edits(model)
    of_kind("space", space, (NeuronSpace, type(None)), MismatchError, "a NeuronSpace, such as model.space('language')")
    if (steps := whole("steps", steps, QuestionError)) < 1:
        raise QuestionError(f"steps={steps} is less than 1")
    if not 0 < (threshold := real("threshold", threshold, QuestionError)) < 1:
        raise QuestionError(f"threshold={threshold} is not between 0 and 1")
    if isinstance(tokens, str) and tokens not in TOKEN_RULES:
        raise QuestionError(f"tokens={tokens!r} is not a token rule; choose from {', '.join(TOKEN_RULES)}")
    questions = questions if isinstance(questions, QuestionSet) else QuestionSet(questions)
    if not len(questions):
        raise QuestionError("there are no questions to attribute")
    if answer is not None:
        questions = questions.asked(answer=answer)
    reader = reader_of(questions.answer)
    factors = _Factors(model, model.space() if space is None else space, tokens)
    groups = questions.groups
    total = torch.zeros((len(groups), len(factors.space)), dtype=torch.float64)
    strong = torch.zeros(total.shape, dtype=torch.int64)
    items = torch.zeros(len(groups), dtype=torch.int64)
    provenance = {
        **provenance_of_run(model),
        "method": method,
        **({"steps": steps} if method == "integrated" else {}),
        "tokens": "all" if tokens is None else rule_name(tokens),
        "condition": condition,
        "answer": repr(reader),
        "prompt": rule_name(questions.prompt),
        "shuffle": questions.shuffle,
        "threshold": threshold,
    }

    def statistics() -> AttributionStatistics:
        return AttributionStatistics(factors.space, groups, total.clone(), strong.clone(), items.clone(), provenance)

    with factors, tqdm(total=len(questions), unit="item", disable=not progress) as bar:
        for number in range(len(questions)):
            try:
                own = _attributed(model, reader, questions[number : number + 1], factors, method, steps, condition)
            except BaseException as error:
                error.partial = statistics()  # type: ignore[attr-defined]
                raise
            bar.update()
            if own is None:
                continue
            row = groups.index(questions[number].group)
            total[row] += own
            strong[row] += (own > threshold * own.max().clamp(min=0)).to(torch.int64)
            items[row] += 1
    return statistics()


def _attributed(
    model: VLM,
    reader: AnswerReader,
    question: QuestionSet,
    factors: "_Factors",
    method: str,
    steps: int,
    condition: str,
) -> Float[Tensor, " neuron"] | None:
    """Attributions of one question to every neuron; None if it does not meet the condition."""
    with torch.inference_mode(False):
        encoded = reader.encode(model, question)

    def margin() -> tuple[Reading, Tensor]:
        reading = reader.read(model, question, encoded, factors.watch)
        if reading.scores is None:
            raise QuestionError(
                f"{type(reader).__name__} reads generated texts, which have no gradient; attribute with "
                "answer='letters' or answer='text'"
            )
        return reading, reading.margins(question)[0]

    everywhere = list(range(len(factors.space.sites)))
    # Answers are mostly read in inference mode; whatever mode the caller is in, gradients are wanted here.
    with torch.inference_mode(False), torch.enable_grad():
        with factors.at(1.0, everywhere if method == "gradient" else []):
            reading, value = margin()
            right = reading.chosen[0] == question[0].answer
            if condition != "all" and right != (condition == "correct"):
                return None
            if method == "gradient":
                return factors.derivatives(value, question[0].id)
        result = torch.zeros(len(factors.space), dtype=torch.float64)
        for layer in factors.layers():
            for step in range(steps):
                with factors.at((step + 0.5) / steps, layer):
                    result += factors.derivatives(margin()[1], question[0].id) / steps
        return result


class _Factors:
    """A factor on every neuron of a space, for one question at a time, and the margin's derivatives by them."""

    def __init__(self, model: VLM, space: NeuronSpace, tokens: TokenRule | None) -> None:
        self.model, self.space, self.tokens = model, space, tokens
        for site, width in zip(space.sites, space.widths, strict=True):
            if model.mlp_of(site).width != width:
                raise MismatchError(
                    f"{site} has {model.mlp_of(site).width} neurons in this model; the space has {width}"
                )
            if site.kind == "pre":
                raise MismatchError(
                    f"{site}: a factor before the activation function is none on the neuron; use 'gate' or 'post'"
                )
        self._handles: list[Any] = []
        self._active: dict[int, Tensor] = {}
        self._mask: Tensor | None = None

    def __enter__(self) -> "_Factors":
        try:
            for number, site in enumerate(self.space.sites):
                mlp = self.model.mlp_of(site.at("post"))
                self._handles.append(write(self.model.hf, mlp, "post", self._editor(number)))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._active, self._mask = {}, None

    def layers(self) -> list[list[int]]:
        """Positions of the sites of each layer of each tower."""
        found: dict[tuple[str, int], list[int]] = {}
        for number, site in enumerate(self.space.sites):
            found.setdefault((site.tower, site.layer), []).append(number)
        return list(found.values())

    @contextlib.contextmanager
    def at(self, value: float, sites: Sequence[int]) -> Iterator[None]:
        """Within, the neurons of some sites have this factor, and others none."""
        device = self.model.device
        self._active = {
            number: torch.full((self.space.widths[number],), value, dtype=self._dtype, device=device).requires_grad_()
            for number in sites
        }
        try:
            yield
        finally:
            self._active = {}

    @property
    def _dtype(self) -> torch.dtype:
        # Derivatives are sums over tokens: half precision would lose them.
        return torch.float64 if self.model.hf.dtype == torch.float64 else torch.float32

    @contextlib.contextmanager
    def watch(self, batch: Batch, rows: list[int]) -> Iterator[None]:
        """Told what the run's tokens are."""
        self._mask = None if self.tokens is None else batch.tokens.counted(self.tokens)
        yield

    def _editor(self, number: int) -> Any:
        in_language = self.space.sites[number].tower == "language"

        def scale(values: Tensor, tokens: Tensor | None = None) -> Tensor | None:
            factor = self._active.get(number)
            if factor is None:
                return None
            if factor.device != values.device:
                factor = factor.to(values.device)
            changed = (values.to(factor.dtype) * factor).to(values.dtype)
            if self._mask is None or not in_language:
                return changed
            mask = self._mask.to(values.device)
            if tokens is not None:
                here = mask.reshape(-1)[tokens]
            elif values.shape[:-1].numel() == mask.numel():
                here = mask.reshape(values.shape[:-1])
            else:
                raise MismatchError(
                    f"{self.space.sites[number]} has values at {tuple(values.shape[:-1])} tokens, the input has "
                    f"{tuple(mask.shape)}: tokens cannot be told apart here; attribute with tokens=None"
                )
            return torch.where(here[..., None], changed, values)

        return scale

    def derivatives(self, margin: Tensor, question: str) -> Float[Tensor, " neuron"]:
        """Derivatives of the margin by every active factor, over the whole space; 0 elsewhere.

        Raises:
            ActivationError: one is not finite; the message names the site and the question.
        """
        numbers = list(self._active)
        found = torch.autograd.grad(margin, [self._active[number] for number in numbers], allow_unused=True)
        result = torch.zeros(len(self.space), dtype=torch.float64)
        for number, part in zip(numbers, found, strict=True):
            if part is None:
                continue  # an expert that no token was routed to
            if not torch.isfinite(part).all():
                raise ActivationError(f"NaN or infinite gradients at {self.space.sites[number]}, question {question!r}")
            result[self.space.offsets[number] : self.space.offsets[number + 1]] = part.double().cpu()
        return result
