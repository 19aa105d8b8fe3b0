"""A model that vLLM runs: many questions and masks in one queue, each request with a mask of its own.

Every answer is read at the end of a prompt: the letters after the question, and each token of an option after the
question and the tokens before it. So a request is a prompt with one generated token, and vLLM's prefix cache saves what
requests under the same mask share. What vLLM would do silently wrong is refused, or proved not to happen; see
`vlmneurons.run.vllm.server`.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmneurons.checks import JSON, Keywords
from vlmneurons.errors import AblationError, MismatchError, QuestionError
from vlmneurons.model.encoder import TOKENIZING, Batch
from vlmneurons.model.identity import configuration_of
from vlmneurons.model.vlm import VLM
from vlmneurons.questions.question import Question
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.run.ablation import Ablation, ablations_in_force
from vlmneurons.run.engine import Counting, Counts, Engine, Run, need_plain_counts
from vlmneurons.run.identity import foreign_hooks
from vlmneurons.run.readers import (
    AnswerReader,
    Generate,
    LogitReader,
    Reading,
    names_its_tokens,
    reading_of_shares,
    reads_logits,
)
from vlmneurons.run.vllm.server import MOST_TOKENS, Mask, Request, Server, payload, server_of


class VLLMEngine(Engine):
    """Asks a model that vLLM holds: `VLM.from_pretrained` with ``engine="vllm"``.

    Args:
        model: the model.
        reader: how answers are read: by letters, option texts, or generation.

    Raises:
        QuestionError: a reader that needs more than a few tokens' log-probabilities, or a generated text.
        MismatchError: vLLM is not installed, or is given an option with which it would be silently wrong; an ablation,
            a hook or a changed configuration, which do not reach vLLM; or an encoder-decoder model.
    """

    ragged = True

    def __init__(self, model: VLM, reader: AnswerReader) -> None:
        super().__init__(model, reader)
        if type(reader) is not Generate and not (reads_logits(reader) and names_its_tokens(reader)):
            raise QuestionError(
                f"engine='vllm' gives a few tokens' log-probabilities, and {reader!r} needs more; read answers by "
                "answer='letters', 'text' or 'generate', or run the model here"
            )
        if model.is_encoder_decoder:
            raise MismatchError(f"engine='vllm': {type(model.hf).__name__} is an encoder-decoder model; run it here")
        if ablations_in_force(model.hf):
            raise MismatchError(
                "this model is being ablated here, which does not reach vLLM: leave the ablation, and give knockout "
                "the neurons"
            )
        for hook in foreign_hooks(model.hf):
            raise MismatchError(f"{hook} does not reach vLLM: take it off, or run the model here")
        if configuration_of(model) != model.engine_configuration:
            raise MismatchError(
                "model.hf.config was changed after the model was made, which vLLM does not see: give vLLM the change "
                "(hf_overrides=), or save the model's folder with it"
            )
        self.server: Server = server_of(model)
        self.name = self.server.name
        self._masks: list[Mask] = []
        self._number: dict[str, int] = {}

    @property
    def own_setting(self) -> dict[str, str]:
        """See `Engine.own_setting`: the checkpoint's files identify the weights."""
        return {} if self.server.weights is None else {"weights": self.server.weights}

    @property
    def provenance(self) -> JSON:
        """Where the model ran."""
        self.server.start()
        return {"engine": self.name, "tensor_parallel_size": self.server.ranks, "device": self.server.device}

    def check(self, ablations: Sequence[Ablation], counting: Counting | None) -> None:
        """See `Engine.check`; starts vLLM.

        Raises:
            MismatchError: sites that are not the language tower's own MLPs, several token rules, statistics of the
                user's; vLLM does not start.
            AblationError: neurons that differ from row to row, or that are set at the gate.
        """
        for ablation in ablations:
            if ablation.by_row:
                raise AblationError(
                    "engine='vllm': give one set of neurons for all rows; each mask is a run of its own"
                )
            if ablation.at == "gate" and ablation.mode not in ("zero", "scale"):
                raise AblationError(f"engine='vllm': mode {ablation.mode!r} acts at 'post' only; run the model here")
            if len({site.at("post") for site in ablation.edits}) < len(ablation.edits):
                raise AblationError("engine='vllm': an MLP has one mask; give neurons of one kind of site, or run here")
        if counting is not None:
            need_plain_counts(self, counting)
        edited = [site for ablation in ablations for site in ablation.edits]
        for site in [*edited, *(() if counting is None else counting.space.sites)]:
            mlp = self.model.mlp_of(site)
            if site.tower != "language" or mlp.expert is not None or mlp.routed:
                raise MismatchError(
                    f"engine='vllm': {site} is not of a decoder's own MLPs, which are all that can be reached in vLLM; "
                    "run the model here"
                )
            if site.kind == "gate" and counting is not None and mlp.layout.product is not None:
                raise MismatchError(f"engine='vllm': how {site} becomes 'post' is not gate times up; record 'pre'")
        self.server.start()
        for ablation in ablations:
            self._mask_of(ablation)

    def encode(self, questions: QuestionSet) -> Any:
        """See `Engine.encode`.

        Raises:
            QuestionError: sound or video, or more tokens than vLLM was started for.
        """
        for item in questions:
            if item.sounds or item.videos:
                raise QuestionError(f"question {item.id!r}: engine='vllm' takes pictures; run the model here")
        encoded = super().encode(questions)
        batch = _batch_of(encoded)
        n_generated = self.reader.max_new_tokens if isinstance(self.reader, Generate) else 1
        longest = int(batch.tokens.attention.sum(1).amax()) + n_generated
        if longest > self.server.longest:
            raise QuestionError(
                f"question {questions[0].id!r} or one beside it needs {longest} tokens, and vLLM was started for "
                f"{self.server.longest}: give max_model_len={longest} or more, or use smaller pictures"
            )
        return encoded

    def count(self, questions: QuestionSet, encoded: object, counting: Counting) -> Reading:
        """See `Engine.count`."""
        asked = _Asked(self, questions, encoded)
        batch, rows = asked.batch, asked.first_rows
        assert isinstance(counting.tokens, str | Callable)  # see `check`
        counted, attention = batch.tokens.counted(counting.tokens), batch.tokens.attention
        if len(asked.bare) != len(questions):
            raise QuestionError(f"engine='vllm': {self.reader!r} reads nothing where a question ends, to count")
        requests = []
        for number, request in enumerate(asked.requests):
            if number in asked.bare:
                row = rows[asked.bare[number]]
                places = counted[row][attention[row]].nonzero().flatten().tolist()
                request = replace(request, count=(row, places))
            requests.append(request)
        self.server.prove(*asked.probe())
        self.server.load(self._masks)
        sites = [(site.layer, site.kind) for site in counting.space.sites]
        n_rows = len(batch.tokens.ids)
        with counting.watch(batch, rows):
            outputs, tables = self.server.counted(requests, n_rows, sites, counting.magnitudes, counting.maxima)
            counts: dict[int, Counts] = dict(enumerate(tables))
            counting.take(counts, {})
        return asked.reading(outputs)

    def answers(self, questions: QuestionSet, encoded: object, runs: Sequence[Run]) -> Iterator[Reading]:
        """See `Engine.answers`; all runs are one queue, a question's together, so that its picture is seen once."""
        asked = _Asked(self, questions, encoded)
        masks = [0 if run.ablation is None else self._mask_of(run.ablation) for run in runs]
        self.server.prove(*asked.probe())
        self.server.load(self._masks)
        jobs = [
            (number, place)
            for place, question in enumerate(asked.question_of)
            for number, run in enumerate(runs)
            if run.rows is None or question in run.rows
        ]
        outputs = self.server.ask([replace(asked.requests[place], mask=masks[number]) for number, place in jobs])
        of_runs: list[list[Any]] = [[None] * len(asked.requests) for _ in runs]
        for (number, place), output in zip(jobs, outputs, strict=True):
            of_runs[number][place] = output
        for run, of_run in zip(runs, of_runs, strict=True):
            yield asked.reading(of_run, run.rows)

    def _mask_of(self, ablation: Ablation) -> int:
        """The number of a mask, by which requests name it."""
        name = ablation.what.fingerprint
        if name not in self._number:
            mask = {}
            for site, edit in ablation.edits.items():
                assert edit.columns is not None
                factor = {"zero": 0.0, "scale": ablation.factor, "add": 1.0}.get(ablation.mode, 0.0)
                values = edit.values if ablation.mode != "add" or edit.values is None else ablation.factor * edit.values
                terms = None if values is None else values.float().numpy()
                mask[str(site.layer)] = payload(edit.columns.numpy(), factor, terms)
            self._masks.append(mask)
            self._number[name] = len(self._masks)
        return self._number[name]


def _batch_of(encoded: object) -> Batch:
    """The batch that a reader encoded, by itself or in an object with more."""
    batch = encoded if isinstance(encoded, Batch) else getattr(encoded, "batch", None)
    assert isinstance(batch, Batch)
    return batch


class _Asked:
    """A batch of questions as requests, and the answers that are read from what comes back."""

    def __init__(self, engine: VLLMEngine, questions: QuestionSet, encoded: object) -> None:
        self.engine, self.questions, self.encoded = engine, questions, encoded
        self.reader, model = engine.reader, engine.model
        self.requests: list[Request] = []
        self.question_of: list[int] = []
        """For each request the place of its question."""
        self.bare: dict[int, int] = {}
        """The requests that show a question and nothing after it, with the question's place."""
        prompts = [_prompt(model, questions, item) for item in questions]
        if isinstance(self.reader, Generate):
            self.batch: Batch = _batch_of(encoded)
            self.first_rows = list(range(len(questions)))
            settings = self.reader.settings(model)
            ends = settings.get("eos_token_id", ())
            generate = (self.reader.max_new_tokens, (ends,) if isinstance(ends, int) else tuple(ends))
            for number, prompt in enumerate(prompts):
                ids = self._ids(number, int(self.batch.tokens.last[number]))
                self._add(number, Request(prompt, ids, generate=generate))
            return
        assert isinstance(self.reader, LogitReader)
        wanted = self.reader.wants(encoded)
        self.batch, self.first_rows = wanted.batch, wanted.questions
        self.tokens = sorted(set(self.reader.tokens(model, questions, encoded) or ()))
        parts = [self.tokens[n : n + MOST_TOKENS] for n in range(0, len(self.tokens), MOST_TOKENS)]
        self.places: list[list[list[int]]] = []
        """For each row and wanted position the requests that give its tokens, in order."""
        owners = range(len(wanted.positions)) if wanted.owners is None else wanted.owners
        if wanted.owners is None and self.first_rows != list(owners):
            raise QuestionError(f"engine='vllm': {self.reader!r} does not say which question its rows are of (owners)")
        # Rows of one question that begin alike ask for the same tokens at the same place: once is enough.
        requests_at: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for row, (number, positions) in enumerate(zip(owners, wanted.positions, strict=True)):
            start, ids = int(self.batch.tokens.last[row]), self.batch.tokens.ids[row]
            self.places.append([])
            for position in positions:
                added = tuple(ids[start + 1 : position + 1].tolist())
                if (number, added) not in requests_at:
                    prompt = {**prompts[number], "prompt_token_ids": [*prompts[number]["prompt_token_ids"], *added]}
                    whole = self._ids(row, position)
                    requests_at[number, added] = [
                        self._add(number, Request(prompt, whole, tokens=part), not added) for part in parts
                    ]
                self.places[-1].append(requests_at[number, added])

    def _ids(self, row: int, position: int) -> list[int]:
        tokens = self.batch.tokens
        return tokens.ids[row, : position + 1][tokens.attention[row, : position + 1]].tolist()

    def _add(self, number: int, request: Request, bare: bool = True) -> int:
        if bare and number not in self.bare.values():
            self.bare[len(self.requests)] = number
        self.requests.append(request)
        self.question_of.append(number)
        return len(self.requests) - 1

    def probe(self) -> tuple[Request, Callable[[], list[float]]]:
        """A question to prove vLLM with, and a function for sums of its pictures' magnitudes and squares, made here."""

        def pixels() -> list[float]:
            shown = self.engine.model.encoder(self.questions[:1])
            values = [value.double() for name, value in shown.items() if name.startswith("pixel_values")]
            return [
                float(sum(value.abs().sum() for value in values)),
                float(sum(value.square().sum() for value in values)),
            ]

        return self.requests[0], pixels

    def reading(self, outputs: Sequence[Any], places: Sequence[int] | None = None) -> Reading:
        """The answers to the questions, or to those at some places, from what requests gave: None where not asked."""
        model, questions = self.engine.model, self.questions
        if isinstance(self.reader, Generate):  # a request for each question
            asked = range(len(questions)) if places is None else places
            ids = [list(outputs[number].outputs[0].token_ids) for number in asked]
            return self.reader.reading(model, questions.with_items([questions[number] for number in asked]), ids)
        assert isinstance(self.reader, LogitReader)
        rows: list[Tensor] = []
        for of_row in self.places:
            parts = [[_shares(outputs[n], self.requests[n].tokens) for n in of_position] for of_position in of_row]
            rows.append(torch.tensor([list(itertools.chain(*of_position)) for of_position in parts]))
        reading = reading_of_shares(self.reader, model, questions, self.encoded, self.tokens, rows)
        return reading if places is None else reading.of_rows(places)


def _prompt(model: VLM, questions: QuestionSet, item: Question) -> Keywords:
    """A question as vLLM takes it: tokens whose placeholders it expands itself, and pictures."""
    with TOKENIZING:  # the next batch may be encoded meanwhile
        ids = model.encoder.token_ids(model.encoder.prompt_of(questions, item))
    prompt: Keywords = {"prompt_token_ids": ids}
    if item.n_images:
        prompt["multi_modal_data"] = {"image": list(item.load_images())}
    return prompt


def _shares(output: Any | None, tokens: Sequence[int]) -> list[float]:
    """Log-probabilities of some tokens at the end of a prompt; 0 where the prompt was not asked."""
    return [0.0 if output is None else output.outputs[0].logprobs[0][token].logprob for token in tokens]
