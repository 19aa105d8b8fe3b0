"""Counting and switching off in a model that runs elsewhere: nnsight's remote execution, as on NDIF.

Hooks do not travel, but the source of a trace does, with the values that it names. So a batch of questions is sent as
one job, which reads and edits the model at the same named sites, counts there, and sends back integers and a few
log-probabilities instead of activations. The far side needs nnsight and torch, and nothing of this library.

With `remote="local"` nothing is sent: nnsight packs the job, unpacks it with all local code hidden, and runs it here.
Counts, totals and choices then equal those of the library's own hooks, to the last integer.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import nnsight
import torch
from torch import Tensor

from vlmneurons.checks import JSON, Wire
from vlmneurons.errors import AblationError, MismatchError, QuestionError
from vlmneurons.model.encoder import Batch
from vlmneurons.model.tokens import TokenRule
from vlmneurons.model.vlm import VLM, offloaded_to
from vlmneurons.neurons.sites import Site
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.run import editing
from vlmneurons.run.ablation import Ablation
from vlmneurons.run.editing import edit_columns
from vlmneurons.run.engine import Counting, Counts, Engine, Run, need_plain_counts
from vlmneurons.run.readers import (
    AnswerReader,
    Reading,
    Wanted,
    forward_inputs,
    names_its_tokens,
    places_of,
    reading_of_shares,
    reads_logits,
)
from vlmneurons.statistics import counting as counting_functions
from vlmneurons.statistics.counting import count_patches, count_tokens

Remote = bool | str
"""False: here. True: the host that nnsight is set up for. A URL: that host. ``"local"``: a host that nnsight simulates.
"""

_RUNS = 64
"""How many masks a job has: its questions, pictures included, are sent once for all of them."""


def refuse_unknown(model: VLM, remote: Remote) -> None:
    """Refuse a ``remote`` that is no place to run, and a run here of a model that has no weights.

    Raises:
        MismatchError: the place is unknown, or the weights are missing.
    """
    if not (isinstance(remote, bool) or remote == "local" or str(remote).startswith(("http://", "https://"))):
        raise MismatchError(
            f"remote={remote!r} is no place to run; choose from False, True, 'local', or the URL of a host"
        )
    bare = offloaded_to(model.hf) is None and any(weight.device.type == "meta" for weight in model.hf.parameters())
    if remote in (False, "local") and bare:
        raise MismatchError(
            f"{model.name} was made without its weights and cannot run here: pass remote=True, or load it whole"
        )


class RemoteEngine(Engine):
    """Asks a model that runs elsewhere: each batch is one job, which reads, edits and counts there.

    Args:
        model: the model.
        reader: a reader that needs one forward's logits.
        remote: where; see `Remote`.

    Raises:
        QuestionError: a reader that runs the model in a way of its own, such as by generating.
    """

    def __init__(self, model: VLM, reader: AnswerReader, remote: Remote) -> None:
        if not reads_logits(reader):
            raise QuestionError(
                f"remote={remote!r}: a remote run is one forward, and {reader!r} needs more; read answers by "
                "answer='letters' or answer='text', or run the model here"
            )
        super().__init__(model, reader)
        self.logit_reader, self.remote = reader, remote
        self.name = "transformers through nnsight" if remote == "local" else f"nnsight at {remote}"
        self._sites: list[tuple[int, Site, Any, str, slice | None]] = []
        """Sites to count, in the order in which the model computes them: place in the space, site, where a trace stops.
        """
        self.dtype: str | None = None
        """The precision in which the model ran, once it has."""

    @property
    def provenance(self) -> JSON:
        """Where the model ran, and in which precision."""
        dtype = self.dtype or (None if self.remote == "local" else "as the host holds it")
        return {"remote": self.remote, **({} if dtype is None else {"dtype": dtype})}

    def check(self, ablations: Sequence[Ablation], counting: Counting | None) -> None:
        """See `Engine.check`.

        Raises:
            MismatchError: a site that a trace cannot stop at.
            AblationError: neurons that differ from row to row.
        """
        for ablation in ablations:
            edits_of(self.model, ablation, self.remote)
        if counting is not None:
            need_plain_counts(self, counting)
            sites = counting.space.sites
            placed = [(number, site, *stop(self.model, site, self.remote)) for number, site in enumerate(sites)]
            self._sites = sorted(placed, key=lambda site_and_stop: _computed(self.model, site_and_stop[1]))

    def count(self, questions: QuestionSet, encoded: object, counting: Counting) -> Reading:
        """See `Engine.count`."""
        wanted = self.logit_reader.wants(encoded)
        with counting.watch(wanted.batch, wanted.questions):
            ((answers, counts, n_rows_seen),) = self._run(questions, encoded, wanted, [[]], counting)
            counting.take(counts, n_rows_seen)
        return self._reading(questions, encoded, answers)

    def answers(self, questions: QuestionSet, encoded: object, runs: Sequence[Run]) -> Iterator[Reading]:
        """See `Engine.answers`; a batch's questions and pictures are sent once for many runs."""
        wanted = self.logit_reader.wants(encoded)
        for start in range(0, len(runs), _RUNS):
            of_job = runs[start : start + _RUNS]
            edits = [[] if run.ablation is None else edits_of(self.model, run.ablation, self.remote) for run in of_job]
            for run, (answers, _, _) in zip(of_job, self._run(questions, encoded, wanted, edits, None), strict=True):
                reading = self._reading(questions, encoded, answers)
                yield reading if run.rows is None else reading.of_rows(run.rows)

    def _run(
        self, questions: QuestionSet, encoded: object, wanted: Wanted, runs: Wire, counting: Counting | None
    ) -> list[tuple[list[Tensor], dict[int, Counts], dict[int, int]]]:
        """Run one job: the batch under each of the lists of edits.

        Returns:
            For each run its answers, the counts of each site, and how many rows each site saw.
        """
        model, batch = self.model, wanted.batch
        inputs, positions = forward_inputs(model, batch, wanted.positions)
        places = [
            [[places_of(model, batch, positions, n)[position] for position in row] for row in wanted.positions]
            for n in (len(positions), batch["input_ids"].shape[1])
        ]
        tokens = self._tokens(questions, encoded)
        pictures = batch.vision is None or sum(batch.vision) > 0
        runs = [[edit for edit in edits if pictures or edit[0].tower != "vision"] for edits in runs]
        sites: Wire = []
        mask = owner = None
        if counting is not None:
            sites = [site for site in self._sites if pictures or site[1].tower != "vision"]
            mask = batch.tokens.counted(cast("TokenRule", counting.tokens))
            if any(site.tower == "vision" for _, site, *_ in sites):
                owner = _owners(batch, sites)
        outcomes = _job(
            model.nnsight,
            inputs,
            [[edit[1:] for edit in edits] for edits in runs],
            [(number, site.tower == "vision", *where) for number, site, *where in sites],
            {
                "mask": mask,
                "owner": owner,
                "patches": batch.patches,
                "total": counting is not None and counting.magnitudes,
                "maximum": counting is not None and counting.maxima,
            },
            {"positions": len(positions), "places": places, "tokens": None if tokens is None else torch.tensor(tokens)},
            self.remote,
        )
        results = []
        for edits, (answers, n_positions, visits, counts, dtype) in zip(runs, outcomes, strict=True):
            self.dtype = dtype
            self._refuse_visits([edit[0] for edit in edits] + [site for _, site, *_ in sites], visits)
            if answers is None:
                places_of(model, batch, positions, n_positions)  # raises
                raise AssertionError("unreachable")
            on_host = {number: _on_host(counting, batch, number, *tables) for number, tables in counts.items()}
            n_rows_seen = {number: shape[0] for number, (shape, _) in counts.items()}
            results.append(([row.cpu() for row in answers], on_host, n_rows_seen))
        return results

    def _tokens(self, questions: QuestionSet, encoded: object) -> list[int] | None:
        return self.logit_reader.tokens(self.model, questions, encoded) if names_its_tokens(self.logit_reader) else None

    def _reading(self, questions: QuestionSet, encoded: object, rows: list[Tensor]) -> Reading:
        """The answers from what came back: log-probabilities of a few tokens, or logits."""
        model, tokens = self.model, self._tokens(questions, encoded)
        if tokens is None:
            return self.logit_reader.score(model, questions, encoded, rows)
        return reading_of_shares(self.logit_reader, model, questions, encoded, tokens, rows)

    def _refuse_visits(self, sites: Sequence[Site], visits: Sequence[int]) -> None:
        for site, n in zip(sites, visits, strict=True):
            if n != 1:
                raise MismatchError(
                    f"remote={self.remote!r}: {type(self.model.hf).__name__} computes {site} {n} times in one forward, "
                    "and a trace stops at the first only; run the model here"
                )


# -- where a trace stops -----------------------------------------------------------------------------------------------


def stop(model: VLM, site: Site, remote: Remote = True) -> tuple[Any, str, slice | None]:
    """Where a trace finds a site: nnsight's envoy of a module, its ``"input"`` or ``"output"``, and which part of it.

    Raises:
        MismatchError: the site has no module of its own, or sees only the tokens that a router sends to it.
    """
    mlp = model.mlp_of(site)
    if mlp.expert is not None or mlp.routed:
        why = "belongs to an expert, which sees only the tokens that are routed to it"
    elif site.tower not in ("language", "vision"):
        why = f"is of the tower {site.tower!r}, and only language and vision towers are known to see the question"
    else:
        place = mlp.place(site.kind)
        if not place.computed:
            return model.envoy(f"{mlp.path}.{place.module}"), place.end, place.columns
        why = "has no module of its own that a trace could stop at"
    raise MismatchError(f"remote={remote!r}: {site} {why}; run the model here")


def _computed(model: VLM, site: Site) -> tuple[bool, int]:
    """A key that sorts sites by when the model computes them: pictures first, then the decoder."""
    return site.tower != "vision", model.sites.index(site)


def edits_of(model: VLM, ablation: Ablation, remote: Remote = True) -> list[tuple[Any, ...]]:
    """An ablation as a trace makes it: in order, each site, where the trace stops for it, and what it does there.

    Raises:
        AblationError: neurons that differ from row to row.
        MismatchError: a site that a trace cannot stop at.
    """
    if ablation.by_row:
        raise AblationError(
            f"remote={remote!r}: one set of neurons for each row cannot be sent; give one set for all rows"
        )
    edits = []
    for site, edit in ablation.edits.items():
        envoy, end, part = stop(model, site.at(ablation.at), remote)
        assert part is None  # gate and post are never parts
        edits.append((site, envoy, end, edit.columns, ablation.mode, ablation.factor, edit.values))
    return sorted(edits, key=lambda edit: _computed(model, edit[0]))


def _owners(batch: Batch, sites: Sequence[Any]) -> Tensor:
    """The question that each row of the vision tower's leading dimension belongs to."""
    if batch.vision is None:
        raise MismatchError(
            f"{sites[0][1]}: the rows of this vision tower cannot be told apart by question; record one question at "
            "a time, in a Recorder of your own"
        )
    return torch.repeat_interleave(torch.arange(len(batch.vision)), torch.tensor(batch.vision))


def _on_host(counting: Any, batch: Batch, number: int, shape: Sequence[int], counts: Counts | None) -> Counts:
    """The counts that came back of one site, on the CPU."""
    if counts is None:
        raise MismatchError(
            f"{counting.space.sites[number]} has values at {tuple(shape)} places, the input has "
            f"{tuple(batch.tokens.ids.shape)} tokens and {batch.vision} rows of pictures: they cannot be told apart"
        )
    return {name: None if table is None else table.cpu() for name, table in counts.items()}


# What counts and edits is sent along: it is the code that runs here, and cannot differ from it.
nnsight.register(editing)
nnsight.register(counting_functions)

# -- what travels ------------------------------------------------------------------------------------------------------


def _job(
    nn: Any, inputs: Mapping[str, Any], runs: Wire, sites: Wire, counting: Any, reading: Any, remote: Remote
) -> Wire:
    """Run one job; gives for each run answers, number of positions, visits of each site, counts, and precision.

    The body of the session travels as source. It names tensors, plain values, nnsight's own envoys, torch and nnsight,
    and the library's functions of tensors, which travel as source too: the far side does not have this library.
    """
    with nn.session(remote=remote):
        outcomes = nnsight.save([])
        for edits in runs:
            with nn.trace(**inputs):
                started = dict(nn.interleaver.counts)
                with torch.no_grad():
                    stops, values = [], None
                    for envoy, end, columns, mode, factor, new in edits:
                        stops.append(f"{envoy.path}.{end}")
                        values = (envoy.input if end == "input" else envoy.output).clone()
                        new = None if new is None else new.to(values.device, values.dtype)
                        edit_columns(values, columns.to(values.device), mode, factor, new)
                        if end == "input":
                            envoy.input = values
                        else:
                            envoy.output = values
                    counts = {}
                    for number, in_vision, envoy, end, part in sites:
                        stops.append(f"{envoy.path}.{end}")
                        values = envoy.input if end == "input" else envoy.output
                        if part is not None:
                            values = values[..., part]
                        mask, owner, real = counting["mask"], counting["owner"], counting["patches"]
                        if in_vision:
                            values = (
                                values.reshape(values.shape[1], 1, -1)
                                if values.ndim == 3 and values.shape[0] == 1 and len(owner) != 1
                                else values.reshape(values.shape[0], -1, values.shape[-1])
                            )
                            if real is None:
                                real = torch.ones(values.shape[:2], dtype=torch.bool)
                            fits = len(values) == len(owner) and real.shape == values.shape[:2]
                        else:
                            fits = list(values.shape[:-1]) in (list(mask.shape), [mask.numel()])
                        tables, extras = None, (counting["total"], counting["maximum"])
                        if fits and in_vision:
                            tables = count_patches(values, real, owner, len(mask), *extras)
                        elif fits:
                            tables = count_tokens(values, mask, *extras)
                        counts[number] = (list(values.shape[:-1]), tables)
                    logits = nn.output.logits
                    # Some models give logits at the positions that are kept only, others at all: each has its places.
                    n_positions = (reading["positions"], inputs["input_ids"].shape[1])
                    places = dict(zip(n_positions, reading["places"], strict=True)).get(logits.shape[1])
                    answers = None
                    if places is not None:
                        answers = [logits[row, where].float() for row, where in enumerate(places)]
                        if reading["tokens"] is not None:
                            wanted = reading["tokens"].to(logits.device)
                            answers = [row.log_softmax(-1)[:, wanted] for row in answers]
                    visits = [nn.interleaver.counts.get(name, 0) - started.get(name, 0) for name in stops]
                    dtype = logits.dtype if values is None else values.dtype  # some models give their logits in float32
                    outcomes.append((answers, logits.shape[1], visits, counts, str(dtype)))
    return outcomes
