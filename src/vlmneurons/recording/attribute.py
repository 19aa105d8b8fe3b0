"""How much each neuron moves the model's answers, by gradients: the part of gradient selectors that needs the model.

Every neuron is given a factor, 1, that multiplies its value. The derivative of the answer's margin by that factor *is*
activation times gradient, summed over tokens; and no activation has to be kept for it. At other factors between 0 and 1
the same derivative is what integrated gradients add up.
"""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlmneurons.checks import Keywords, as_number, as_whole, check_choice, check_kind
from vlmneurons.errors import ActivationError, MismatchError, QuestionError
from vlmneurons.files.stopping import hooked
from vlmneurons.model.architectures.hooks import write
from vlmneurons.model.encoder import Batch
from vlmneurons.model.tokens import TokenRule, check_token_rule
from vlmneurons.model.vlm import VLM, check_model
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.progress import Progress
from vlmneurons.questions.question import Question
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.recording.experts import all_tokens
from vlmneurons.recording.record import meets
from vlmneurons.run.ask import Job, Options, ask, engine_of, to_ask
from vlmneurons.run.engine import Engine, need_gradients
from vlmneurons.run.identity import rule_name, run_provenance, setting_of_run
from vlmneurons.run.readers import AnswerReader, Reading
from vlmneurons.run.remote import Remote
from vlmneurons.statistics.attributions import AttributionStatistics
from vlmneurons.statistics.items import CONDITIONS

REDUCE = ("sum", "max")
"""Over tokens: their sum, or the highest of theirs."""

METHODS = ("gradient", "integrated")
"""Activation times gradient; or gradients integrated while a layer's neurons grow from zero (knowledge neurons)."""


def attribute(
    model: VLM,
    questions: QuestionSet | Sequence[Question],
    space: NeuronSpace | None = None,
    *,
    method: str = "gradient",
    reduce: str = "sum",
    steps: int = 20,
    condition: str = "correct",
    tokens: TokenRule | None = None,
    answer: str | AnswerReader | None = None,
    threshold: float = 0.2,
    on_error: str = "raise",
    progress: Progress = True,
    remote: Remote = False,
    distributed: bool = False,
) -> AttributionStatistics:
    """How much each neuron moves the answers of each group's questions, in nats.

    What is differentiated is the margin: log-probability of the right option less that of the best other one (for
    letters, the difference of the logits). Questions are run one at a time, each with a forward and a backward; no
    gradient of a weight is computed or kept, and the model is as it was afterwards.

    Args:
        model: the model.
        questions: what to ask, and how. Answers must be read by likelihood: by letters or by text.
        space: the neurons; by default the gates of the language tower. Gate, up and post give the same numbers, because
            a factor on one is a factor on the product; at ``pre`` it is one on what goes into the activation function.
        method: ``"gradient"``: activation times gradient, one backward a question. ``"integrated"``: integrated
            gradients of one layer's neurons at a time, growing from zero: ``layers * steps`` backwards a question; the
            attributions of a layer add up to what the layer's neurons contribute to the margin (up to the steps).
        reduce: over tokens, ``"sum"``, or ``"max"``, the highest of theirs (padding left out), for which the gradients
            of all tokens are kept: of ``"gradient"`` only.
        steps: number of steps of the integral (midpoint rule).
        condition: which questions enter: ``"correct"``, ``"wrong"`` or ``"all"``.
        tokens: at which tokens neurons of the language tower are looked at; None for all, as ablation acts on all.
        answer: how answers are read; by default as the set says.
        threshold: share of a question's highest attribution above which a neuron matters much to it (``strong``).
        on_error: ``"raise"``, or ``"skip"`` questions that cannot be asked (their ids are kept in the provenance).
        progress: show a progress bar.
        remote: only False: gradients do not come back from a model that runs elsewhere.
        distributed: share the questions with the other processes of a ``torchrun``; each gets the whole.

    Returns:
        Sums over each group's questions, groups sorted. A group none of whose questions met the condition has zeros.

    Raises:
        QuestionError: answers are read by generation, or a question cannot be asked. Its ``partial``, like that of any
            error or interrupt on the way, holds the attributions of the questions before.
        MismatchError: the space is not this model's, or is of ``pre`` and integrated, where it is no neuron that grows.
        ActivationError: a gradient is NaN or infinite; the message names the site and the question.

    Source: activation times gradient, Shrikumar et al. 2017 (arXiv 1704.02685); integrated gradients of MLP neurons,
    Dai et al. 2022 (arXiv 2104.08696), from which `IntegratedGradients` says where this deviates. The maximum over
    tokens, at ``pre``, less that of a control data set (`AttributionStatistics` can be subtracted), is the rule of
    CULNIG (ICLR 2026), which also multiplies by the probability of the right answer.
    """
    check_choice("method", method, METHODS, QuestionError)
    check_choice("condition", condition, CONDITIONS, QuestionError)
    check_choice("reduce", reduce, REDUCE, QuestionError)
    check_model(model)
    check_kind(
        "space", space, (NeuronSpace, type(None)), MismatchError, "a NeuronSpace, such as model.space('language')"
    )
    if reduce == "max" and method != "gradient":
        raise QuestionError("reduce='max' is of method='gradient': an integral is of sums over tokens")
    if (steps := as_whole("steps", steps, QuestionError)) < 1:
        raise QuestionError(f"steps={steps} is less than 1")
    if not 0 < (threshold := as_number("threshold", threshold, QuestionError)) < 1:
        raise QuestionError(f"threshold={threshold} is not between 0 and 1")
    check_token_rule(tokens)
    options = Options(1, on_error=on_error, progress=progress, remote=remote, distributed=distributed)
    questions = to_ask(questions, answer, "to attribute")
    engine = engine_of(model, questions, remote)
    need_gradients(engine, "attribution")
    factors = _Factors(model, model.space() if space is None else space, tokens, reduce == "max")
    if method == "integrated" and any(site.kind == "pre" for site in factors.space):
        raise MismatchError("integrated gradients grow a neuron from zero: use 'gate' or 'post', not 'pre'")
    rules = {
        "method": method,
        **({"steps": steps} if method == "integrated" else {}),
        **({"reduce": reduce} if reduce != "sum" else {}),
        "tokens": "all" if tokens is None else rule_name(tokens),
        "condition": condition,
        "threshold": threshold,
    }
    with torch.inference_mode(False):  # what adds up must not be made in it, whatever mode the caller is in
        job = _AttributionJob(engine, questions, factors, rules)
        ask(job, questions, options)
    return functools.reduce(operator.add, options.processes.gather(job.statistics()))


class _AttributionJob(Job["Tensor | None"]):
    """Adds each question's attributions to those of its group."""

    gradients = True

    def __init__(self, engine: Engine, questions: QuestionSet, factors: "_Factors", rules: Keywords) -> None:
        super().__init__(engine)
        self._questions, self._factors, self._rules = questions, factors, rules
        self._total = torch.zeros((len(questions.groups), len(factors.space)), dtype=torch.float64)
        self._strong = torch.zeros(self._total.shape, dtype=torch.int64)
        self._items = torch.zeros(len(questions.groups), dtype=torch.int64)
        self._setting = setting_of_run(engine.model, tokens=factors.tokens, questions=questions, engine=engine)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """See `Job.running`."""
        with self._factors.attached():
            yield

    def run(self, questions: QuestionSet, encoded: Any, move_bar: Callable[[int], object], /) -> Tensor | None:
        """Attributions of one question to every neuron; None if it does not meet the condition."""
        factors, rules = self._factors, self._rules
        everywhere = list(range(len(factors.space.sites)))
        # Answers are mostly read in inference mode; whatever mode the caller is in, gradients are wanted here.
        with torch.enable_grad():
            with factors.at(1.0, everywhere if rules["method"] == "gradient" else []):
                reading, margin = self._margin(questions, encoded)
                if not meets(rules["condition"], reading.chosen[0] == questions[0].answer):
                    return None
                if rules["method"] == "gradient":
                    return factors.derivatives(margin, questions[0].id)
            result = torch.zeros(len(factors.space), dtype=torch.float64)
            for layer in factors.space.tower_layers.values():  # the places of its sites
                for step in range(rules["steps"]):
                    with factors.at((step + 0.5) / rules["steps"], layer):
                        margin = self._margin(questions, encoded)[1]
                        result += factors.derivatives(margin, questions[0].id) / rules["steps"]
            return result

    def _margin(self, question: QuestionSet, encoded: object) -> tuple[Reading, Tensor]:
        reader = self.engine.reader
        reading = reader.read(self.engine.model, question, encoded, self._factors.watch)
        if reading.scores is None:
            raise QuestionError(
                f"{type(reader).__name__} reads generated texts, which have no gradient; attribute with "
                "answer='letters' or answer='text'"
            )
        return reading, reading.margins(question)[0]

    def take(self, number: int, questions: QuestionSet, made: Tensor | None) -> int:
        """See `Job.take`."""
        if made is not None:
            row = self._questions.groups.index(questions[0].group)
            self._total[row] += made
            self._strong[row] += (made > self._rules["threshold"] * made.max().clamp(min=0)).to(torch.int64)
            self._items[row] += 1
        return len(questions)

    def statistics(self) -> AttributionStatistics:
        """The attributions of the questions that were taken so far."""
        of_run = run_provenance(self.engine.model, self._setting, questions=self._questions, engine=self.engine)
        provenance = {**of_run, **self._rules, "skipped": list(self.skipped)}
        tables = (self._total.clone(), self._strong.clone(), self._items.clone())
        return AttributionStatistics(self._factors.space, self._questions.groups, *tables, provenance)

    def partial(self) -> AttributionStatistics:
        """See `Job.partial`."""
        return self.statistics()


class _Factors:
    """A factor on every neuron of a space, for one question at a time, and the margin's derivatives by them."""

    def __init__(self, model: VLM, space: NeuronSpace, tokens: TokenRule | None, highest: bool = False) -> None:
        self.model, self.space, self.tokens, self.highest = model, space, tokens, highest
        model.check_space(space)
        self._active: dict[int, Tensor] = {}
        self._by_token: dict[int, list[tuple[Tensor, Tensor | None]]] = {}
        """Where the highest of all tokens is wanted: for each visit of a site a factor a token, and the number of each
        token that counts, -1 for others; None where all do and are different ones."""
        self._mask: Tensor | None = None

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within, the neurons have the factors that are active."""
        sites = [site.at("pre" if site.kind == "pre" else "post") for site in self.space.sites]
        edits = (
            write(self.model.hf, self.model.mlp_of(site), site.kind, self._editor(number))
            for number, site in enumerate(sites)
        )
        words = [site for site in self.space.sites if site.tower == "language"]
        with hooked(edits), all_tokens(self.model, words, lambda: 0 if self._mask is None else self._mask.numel()):
            yield

    @contextlib.contextmanager
    def at(self, value: float, sites: Sequence[int]) -> Iterator[None]:
        """Within, the neurons of some sites have this factor, and others none."""
        # Derivatives are sums over tokens: half precision would lose them.
        dtype = torch.float64 if self.model.hf.dtype == torch.float64 else torch.float32
        options = {"dtype": dtype, "device": self.model.device, "requires_grad": True}
        self._active = {number: torch.full((self.space.widths[number],), value, **options) for number in sites}
        self._by_token = {number: [] for number in sites if self.highest}
        try:
            yield
        finally:
            self._active, self._by_token = {}, {}

    @contextlib.contextmanager
    def watch(self, batch: Batch, rows: list[int]) -> Iterator[None]:
        """Around a run of the model: notes which of its tokens have factors."""
        if self.tokens is not None:
            self._mask = batch.tokens.counted(self.tokens)
        else:  # a sum is over all tokens, and needs no mask; of the highest, padding is left out
            self._mask = batch.tokens.attention if self.highest else None
        yield

    def _editor(self, number: int) -> Callable[..., Tensor | None]:
        in_language = self.space.sites[number].tower == "language"

        def scale(values: Tensor, tokens: Tensor | None = None) -> Tensor | None:
            factor = self._active.get(number)
            if factor is None:
                return None
            if factor.device != values.device:
                factor = factor.to(values.device)
            if self.highest:
                factor = factor.detach().expand(values.shape).clone().requires_grad_()
                self._by_token[number].append((factor, None))
            changed = (values.to(factor.dtype) * factor).to(values.dtype)
            if self._mask is None or not in_language:
                return changed
            mask = self._mask.to(values.device)
            if tokens is not None:
                counted = mask.reshape(-1)[tokens]
            elif values.shape[:-1].numel() == mask.numel():
                counted = mask.reshape(values.shape[:-1])
            else:
                raise MismatchError(
                    f"{self.space.sites[number]} has values at {tuple(values.shape[:-1])} tokens, the input has "
                    f"{tuple(mask.shape)}: tokens cannot be told apart here; attribute with tokens=None"
                )
            if self.highest:
                numbers = torch.arange(mask.numel(), device=mask.device) if tokens is None else tokens.flatten()
                numbers = (numbers % mask.shape[1]).reshape(counted.shape)  # a question's rows show the same prompt
                self._by_token[number][-1] = (factor, torch.where(counted, numbers, -1))
            return torch.where(counted[..., None], changed, values)

        return scale

    def derivatives(self, margin: Tensor, question: str) -> Float[Tensor, " neuron"]:
        """Derivatives of the margin by every active factor, over the whole space; 0 elsewhere.

        Raises:
            ActivationError: one is not finite; the message names the site and the question.
        """
        if self.highest:
            visits = [(number, *visit) for number, of_site in self._by_token.items() for visit in of_site]
        else:
            visits = [(number, factor, None) for number, factor in self._active.items()]
        gradients = torch.autograd.grad(margin, [factor for _, factor, _ in visits], allow_unused=True)
        by_site: dict[int, list[Tensor]] = {}
        for (number, _, tokens), gradient in zip(visits, gradients, strict=True):
            if gradient is None:
                continue  # an expert that no token was routed to
            if tokens is not None:  # what rows of one token say is added
                counted = tokens >= 0
                if not counted.any():
                    continue  # an expert that none of the tokens that count was routed to
                kept, place = torch.unique(tokens[counted], return_inverse=True)
                by_token = gradient.new_zeros((len(kept), gradient.shape[-1]))
                gradient = by_token.index_add_(0, place, gradient[counted])
            by_site.setdefault(number, []).append(gradient)
        result = torch.zeros(len(self.space), dtype=torch.float64)
        for number, of_site in by_site.items():
            value = torch.cat([of_visit.flatten(0, -2) for of_visit in of_site]).amax(0) if self.highest else of_site[0]
            if not torch.isfinite(value).all():
                raise ActivationError(f"NaN or infinite gradients at {self.space.sites[number]}, question {question!r}")
            result[self.space.offsets[number] : self.space.offsets[number + 1]] = value.double().cpu()
        return result
