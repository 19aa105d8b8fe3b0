"""Counting and switching off in a model that runs elsewhere: nnsight's remote execution, as on NDIF.

Hooks do not travel. What does is the source of a trace, with the values that it names: so a batch of questions is sent
as one job that reads and edits the model at the same named sites, counts there, and sends back integers and a few
log-probabilities instead of activations. The far side needs nnsight and torch, and nothing of this library.

`remote="local"` sends nothing: nnsight packs the job, unpacks it with all local code hidden, and runs it here. Counts,
totals and choices then equal those of the library's own hooks, to the last integer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from torch import Tensor

from vlmneurons.errors import AblationError, MismatchError, QuestionError
from vlmneurons.model.encoder import Batch
from vlmneurons.model.vlm import VLM, offloaded_to
from vlmneurons.neurons.sites import Site
from vlmneurons.questions.sets import QuestionSet
from vlmneurons.run.ablation import Ablation
from vlmneurons.run.readers import AnswerReader, LogitReader, Reading, Wanted, Watch, forward_inputs, places_of

Remote = bool | str
"""False: here. True: the host that nnsight is set up for. A URL: that one. ``"local"``: nnsight's simulation of one."""

_RUNS = 64
"""Masks of one job: their questions, pictures included, are sent once for all of them."""


@dataclass(frozen=True, eq=False)
class SiteCounts:
    """What was counted at one site, for the rows of a batch that stand for its questions.

    Attributes:
        fired: ``[row, neuron]`` tokens at which a neuron fires.
        tokens: ``[row]`` tokens that were counted.
        seen: rows of the tower's leading dimension, where it is a vision tower.
        bad: ``[row]`` whether a counted token has values that are not finite.
        total: ``[row, neuron]`` sums of the values, if they are wanted.
        maximum: ``[row, neuron]`` their maxima, if they are wanted.
    """

    fired: Tensor
    tokens: Tensor
    seen: int
    bad: Tensor
    total: Tensor | None = None
    maximum: Tensor | None = None


def refuse_unknown(model: VLM, remote: Remote) -> None:
    """Refuse a ``remote`` that is none, and a run here of a model that has no weights.

    Raises:
        MismatchError: one of the two.
    """
    if not (isinstance(remote, bool) or remote == "local" or str(remote).startswith(("http://", "https://"))):
        raise MismatchError(
            f"remote={remote!r} is no place to run; choose from False, True, 'local', or the URL of a host"
        )
    without = offloaded_to(model.hf) is None and any(one.device.type == "meta" for one in model.hf.parameters())
    if remote in (False, "local") and without:
        raise MismatchError(
            f"{model.name} was made without its weights and cannot run here: pass remote=True, or load it whole"
        )


def reader_at(model: VLM, reader: AnswerReader, remote: Remote, recorder: Any = None) -> AnswerReader:
    """The reader itself for a run here; else one that reads as it does where the model runs, and feeds the recorder.

    Raises:
        MismatchError: no such place, or a site that a trace cannot stop at.
        QuestionError: a reader that runs the model in a way of its own, such as by generating.
    """
    refuse_unknown(model, remote)
    if remote is False:
        return reader
    if recorder is not None:
        recorder._elsewhere = True  # its hooks would not travel, and in a simulation would count twice
    return RemoteReader(model, reader, remote, recorder)


def reader_provenance(reader: AnswerReader) -> dict[str, Any]:
    """Where the model ran, and in which precision: nothing for a reader that reads here."""
    if not isinstance(reader, RemoteReader):
        return {}
    dtype = reader.dtype or (None if reader.remote == "local" else "as the host holds it")
    return {"remote": reader.remote, **({} if dtype is None else {"dtype": dtype})}


class RemoteReader(AnswerReader):
    """Reads answers as another reader does, of a model that runs elsewhere.

    Args:
        model: the model.
        reader: a reader that needs one forward's logits.
        remote: where; see `Remote`.
        recorder: takes what is counted in runs that are watched.

    Raises:
        QuestionError: a reader that runs the model in a way of its own, such as by generating.
        MismatchError: a site that a trace cannot stop at.
    """

    def __init__(self, model: VLM, reader: AnswerReader, remote: Remote, recorder: Any = None) -> None:
        if not isinstance(reader, LogitReader) or type(reader).read is not LogitReader.read:
            raise QuestionError(
                f"remote={remote!r}: a remote run is one forward, and {reader!r} needs more; read answers by "
                "answer='letters' or answer='text', or run the model here"
            )
        self.inner, self.remote = reader, remote
        self.padding_side = reader.padding_side  # type: ignore[misc]
        self.shows_options = reader.shows_options  # type: ignore[misc]
        self._recorder = recorder
        self._sites: list[tuple[int, Site, Any, str, slice | None]] = []
        """Sites to count in the order in which the model computes them: place in the space, and where a trace stops."""
        self.dtype: str | None = None
        """The precision in which the model ran, once it has."""
        if recorder is not None:
            placed = [(number, site, *stop(model, site, remote)) for number, site in enumerate(recorder.space.sites)]
            self._sites = sorted(placed, key=lambda one: _computed(model, one[1]))

    def encode(self, model: VLM, questions: QuestionSet) -> Any:
        """See `AnswerReader.encode`."""
        return self.inner.encode(model, questions)

    def read(self, model: VLM, questions: QuestionSet, encoded: Any, watch: Watch | None = None) -> Reading:
        """See `AnswerReader.read`; in a watched run the recorder's sites are counted."""
        if watch is None:
            return next(self.read_masked(model, questions, encoded, []))
        wanted = self.inner.wants(encoded)
        with watch(wanted.batch, wanted.questions):
            ((answers, counts),) = self._run(model, questions, encoded, wanted, [[]], self._recorder)
            self._recorder._take(counts)
        return self._reading(model, questions, encoded, answers)

    def read_masked(
        self, model: VLM, questions: QuestionSet, encoded: Any, ablations: Sequence[Ablation]
    ) -> Iterator[Reading]:
        """What the model answers to one batch as it is, and then under each ablation, in order.

        Raises:
            AblationError: neurons that differ from row to row.
            MismatchError: a site that a trace cannot stop at.
        """
        wanted = self.inner.wants(encoded)
        runs = [[], *(edits_of(model, one, self.remote) for one in ablations)]
        for start in range(0, len(runs), _RUNS):
            for answers, _ in self._run(model, questions, encoded, wanted, runs[start : start + _RUNS], None):
                yield self._reading(model, questions, encoded, answers)

    def _run(
        self, model: VLM, questions: QuestionSet, encoded: Any, wanted: Wanted, runs: list[Any], recorder: Any
    ) -> list[tuple[list[Tensor], dict[int, SiteCounts]]]:
        """One job: the batch under each of some lists of edits, and in each run the counts of a recorder's sites."""
        batch = wanted.batch
        inputs, positions = forward_inputs(model, batch, wanted.positions)
        places = [
            [list(places_of(model, batch, positions, n)[p] for p in row) for row in wanted.positions]
            for n in (len(positions), batch["input_ids"].shape[1])
        ]
        tokens = self._tokens(model, questions, encoded)
        pictures = batch.vision is None or sum(batch.vision) > 0
        runs = [[edit for edit in edits if pictures or edit[0].tower != "vision"] for edits in runs]
        sites, owner, mask = [], None, None
        if recorder is not None:
            sites = [site for site in self._sites if pictures or site[1].tower != "vision"]
            mask = batch.tokens.counted(recorder.tokens)
            if any(site.tower == "vision" for _, site, *_ in sites):
                owner = _owners(batch, sites)
        found = _job(
            model.nnsight,
            inputs,
            [[edit[1:] for edit in edits] for edits in runs],
            [(number, site.tower == "vision", *where) for number, site, *where in sites],
            {
                "mask": mask,
                "owner": owner,
                "patches": batch.patches,
                "rows": torch.tensor(wanted.questions),
                "total": recorder is not None and recorder.magnitudes,
                "maximum": recorder is not None and recorder._maxima,
            },
            {"given": len(positions), "places": places, "tokens": None if tokens is None else torch.tensor(tokens)},
            self.remote,
        )
        results = []
        for edits, (answers, given, visits, counts, dtype) in zip(runs, found, strict=True):
            self.dtype = dtype
            self._refuse_visits(model, [edit[0] for edit in edits] + [site for _, site, *_ in sites], visits)
            if answers is None:
                places_of(model, batch, positions, given)  # raises
                raise AssertionError("unreachable")
            counted = {number: _site_counts(recorder, batch, number, one) for number, one in counts.items()}
            results.append(([row.cpu() for row in answers], counted))
        return results

    def _tokens(self, model: VLM, questions: QuestionSet, encoded: Any) -> list[int] | None:
        return self.inner.tokens(model, questions, encoded) if _names_its_tokens(self.inner) else None

    def _reading(self, model: VLM, questions: QuestionSet, encoded: Any, rows: list[Tensor]) -> Reading:
        """The answers from what came back: log-probabilities of a few tokens, or logits."""
        tokens = self._tokens(model, questions, encoded)
        if tokens is None:
            return self.inner.score(model, questions, encoded, rows)
        size = max(len(model.tokenizer), max(tokens) + 1)
        shares = [row.new_full((len(row), size), torch.nan).index_copy_(1, torch.tensor(tokens), row) for row in rows]
        return self.inner.score_shares(model, questions, encoded, shares)

    def _refuse_visits(self, model: VLM, sites: Sequence[Site], visits: Sequence[int]) -> None:
        for site, n in zip(sites, visits, strict=True):
            if n != 1:
                raise MismatchError(
                    f"remote={self.remote!r}: {type(model.hf).__name__} computes {site} {n} times in one forward, and "
                    "a trace stops at the first only; run the model here"
                )

    def __repr__(self) -> str:
        return repr(self.inner)  # what is read is the same, wherever it is


def _names_its_tokens(reader: LogitReader) -> bool:
    """Whether what the reader says of its tokens goes for its own `score`: a subclass may have another one."""
    owners = {
        name: next(one for one in type(reader).__mro__ if name in vars(one))
        for name in ("score", "score_shares", "tokens")
    }
    return len(set(owners.values())) == 1 and owners["tokens"] is not LogitReader


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
    """Sorts sites by when the model computes them: pictures first, then the decoder."""
    return site.tower != "vision", model.sites.index(site)


def edits_of(model: VLM, ablation: Ablation, remote: Remote = True) -> list[tuple[Any, ...]]:
    """An ablation as a trace makes it: for each site in order the site, where to stop, and what to do there.

    Raises:
        AblationError: neurons that differ from row to row.
        MismatchError: a site that a trace cannot stop at.
    """
    if ablation.by_row:
        raise AblationError(
            f"remote={remote!r}: one set of neurons for each row cannot be sent; give one set for all rows"
        )
    edits = []
    for site, edit in ablation._edits.items():
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


def _site_counts(recorder: Any, batch: Batch, number: int, one: Mapping[str, Any]) -> SiteCounts:
    """What came back of one site."""
    site, shape = recorder.space.sites[number], tuple(batch.tokens.ids.shape)
    if one["fired"] is None:
        raise MismatchError(
            f"{site} has values at {tuple(one['shape'])} places, the input has {shape} tokens and "
            f"{batch.vision} rows of pictures: they cannot be told apart"
        )
    host = {name: None if one[name] is None else one[name].cpu() for name in ("bad", "total", "maximum")}
    return SiteCounts(one["fired"].cpu().long(), one["tokens"].cpu().long(), one["shape"][0], **host)


# -- what travels ------------------------------------------------------------------------------------------------------


def _job(
    nn: Any, inputs: Mapping[str, Any], runs: list[Any], sites: list[Any], counting: Any, reading: Any, remote: Remote
) -> list[Any]:
    """Run one job and give, for each run, answers, number of positions, visits of each site, counts, and precision.

    The body of the session travels as source. It names tensors, plain values, nnsight's own envoys, torch and nnsight:
    nothing of this library, which the far side does not have.
    """
    with nn.session(remote=remote):
        found = nnsight.save([])
        for edits in runs:
            with nn.trace(**inputs):
                started = dict(nn.interleaver.counts)
                with torch.no_grad():
                    stops = []
                    for envoy, end, columns, mode, factor, new in edits:
                        stops.append(f"{envoy.path}.{end}")
                        values = (envoy.input if end == "input" else envoy.output).clone()
                        columns = columns.to(values.device)
                        if mode == "zero":
                            values.index_fill_(-1, columns, 0)
                        else:
                            old = values.index_select(-1, columns)
                            if mode == "scale":
                                changed = old * factor
                            elif mode == "add":
                                changed = old + factor * new.to(values.device, values.dtype)
                            else:
                                changed = new.to(values.device, values.dtype).expand_as(old)
                            values.index_copy_(-1, columns, changed)
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
                        one = {"shape": list(values.shape[:-1]), "fired": None, "total": None, "maximum": None}
                        counts[number] = one
                        rows = counting["rows"].to(values.device)
                        mask = counting["mask"].to(values.device)
                        if in_vision:
                            owner = counting["owner"].to(values.device)
                            values = (
                                values.reshape(values.shape[1], 1, -1)
                                if values.ndim == 3 and values.shape[0] == 1 and len(owner) != 1
                                else values.reshape(values.shape[0], -1, values.shape[-1])
                            )
                            one["shape"] = list(values.shape[:-1])
                            real = counting["patches"]
                            if real is None:
                                real = torch.ones(one["shape"], dtype=torch.bool)
                            if len(values) != len(owner) or list(real.shape) != one["shape"]:
                                continue
                            real = real.to(values.device)
                            n_rows = len(mask)
                            fired = torch.zeros((n_rows, values.shape[-1]), dtype=torch.int64, device=values.device)
                            fired.index_add_(0, owner, ((values > 0) & real[..., None]).sum(1))
                            tokens = torch.zeros(n_rows, dtype=torch.int64, device=values.device)
                            one["tokens"] = tokens.index_add(0, owner, real.sum(1))[rows]
                            bad = torch.zeros(n_rows, dtype=torch.int64, device=values.device)
                            bad.index_add_(0, owner, (~torch.isfinite(values).all(-1) & real).sum(1))
                            if counting["total"]:
                                total = torch.zeros(fired.shape, dtype=torch.float64, device=values.device)
                                kept = torch.where(real[..., None], values, 0)
                                total.index_add_(0, owner, kept.sum(1, dtype=torch.float64))
                                one["total"] = total[rows]
                            if counting["maximum"]:
                                maximum = torch.full(fired.shape, -torch.inf, device=values.device)
                                places = owner[:, None].expand(-1, values.shape[-1])
                                kept = torch.where(real[..., None], values, -torch.inf).amax(1).float()
                                one["maximum"] = maximum.scatter_reduce(0, places, kept, "amax")[rows]
                        else:
                            if one["shape"] not in (list(mask.shape), [mask.numel()]):
                                continue
                            values = values.reshape(*mask.shape, -1)
                            fired = ((values > 0) & mask[..., None]).sum(1)
                            one["tokens"] = mask.sum(1)[rows]
                            bad = (~torch.isfinite(values).all(-1) & mask).sum(1)
                            if counting["total"]:
                                kept = torch.where(mask[..., None], values, 0)
                                one["total"] = kept.sum(1, dtype=torch.float64)[rows]
                            if counting["maximum"]:
                                kept = torch.where(mask[..., None], values, -torch.inf)
                                one["maximum"] = kept.amax(1).float()[rows]
                        one["bad"] = bad[rows] > 0
                        one["fired"] = fired[rows].to(torch.int32)
                    logits = nn.output.logits
                    given = logits.shape[1]
                    sets = dict(zip((reading["given"], inputs["input_ids"].shape[1]), reading["places"], strict=True))
                    answers = None
                    if given in sets:
                        answers = [logits[row, where].float() for row, where in enumerate(sets[given])]
                        if reading["tokens"] is not None:
                            wanted = reading["tokens"].to(logits.device)
                            answers = [row.log_softmax(-1)[:, wanted] for row in answers]
                    visits = [nn.interleaver.counts.get(name, 0) - started.get(name, 0) for name in stops]
                    dtype = values.dtype if stops else logits.dtype  # some models give their logits in float32
                    found.append((answers, given, visits, counts, str(dtype)))
    return found
