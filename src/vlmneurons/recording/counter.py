"""Counting one forward: hooks at the sites of a space, and what each of them saw for every row of the batch.

A forward is counted in three steps. Before it a *frame* is set, which says what is shown: which tokens count, and whose
each picture is (`Counter.watch` sets it for a batch of questions, a `Recorder` for a run of the user's own). In it each
site's hook counts the values that it sees, by the functions of `vlmneurons.statistics.counting`, into the site's state.
After it, `Counter.by_row` gives the counts of each question, or `vlmneurons.recording.groups` adds them up by group.
"""

import collections
import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlmneurons.checks import Keywords, as_flag, check_kind
from vlmneurons.errors import ActivationError, MismatchError, QuestionError
from vlmneurons.files.stopping import hooked
from vlmneurons.model.architectures.hooks import read
from vlmneurons.model.architectures.inside import Hook
from vlmneurons.model.encoder import Batch
from vlmneurons.model.tokens import TokenRule, check_token_rule
from vlmneurons.model.vlm import VLM, check_model
from vlmneurons.neurons.sites import NeuronSpace, Site
from vlmneurons.recording.experts import all_tokens
from vlmneurons.recording.frame import Frame, SiteState, is_filled
from vlmneurons.run.engine import Counts
from vlmneurons.run.owners import OWNERS
from vlmneurons.statistics.counting import count_patches, count_routed, count_tokens
from vlmneurons.statistics.items import ItemStatistic


class NotFinite(ActivationError):
    """A counted token with NaN or infinite values: at which site, and in which row of the batch."""

    def __init__(self, site: Site, row: int) -> None:
        super().__init__(f"NaN or infinite activations at {site}, row {row} of the batch")
        self.site, self.row = site, row


class BadStatistic(ActivationError):
    """A statistic of the user's with another shape than it must have, or NaN: at which site, in which row."""

    def __init__(self, problem: str, name: str, site: Site, row: int) -> None:
        super().__init__(f"the statistic {name!r} {problem}, at {site}")
        self.row = row


class Counter:
    """Counts the sites of a space in one forward at a time.

    Args:
        model: the model.
        space: the neurons to count.
        tokens: which tokens count; or several rules by name, each of which is counted for itself: the rows of a batch
            then stand there once for each rule, one rule after the other.
        magnitudes: whether sums of the values are wanted.
        maxima: whether their maxima are.
        statistics: functions of each question's values, by name; see `vlmneurons.record_items`.

    Attributes:
        sites: what was counted at each site in the last forward.
        frame: what that forward shows; None between forwards, and in those that are not to be counted.
        strict: look for values that are not finite at every site; else at the last one, where they all arrive.
        of_decoder: whether the tokens are those of an encoder-decoder model's decoder, which are not the question's.

    Raises:
        MismatchError: the space is not of this model.
        QuestionError: no such token rule, or one that does not fit a vision tower.
    """

    def __init__(
        self,
        model: VLM,
        space: NeuronSpace | None,
        *,
        tokens: TokenRule | Mapping[str, TokenRule],
        magnitudes: bool = False,
        maxima: bool = False,
        statistics: Mapping[str, ItemStatistic] | None = None,
    ) -> None:
        check_model(model)
        check_kind(
            "space", space, (NeuronSpace, type(None)), MismatchError, "a NeuronSpace, such as model.space('vision')"
        )
        self.model = model
        self.space = model.space() if space is None else space
        model.check_space(self.space)
        self.sites = [SiteState(site, width) for site, width in zip(self.space.sites, self.space.widths, strict=True)]
        # The decoder of an encoder-decoder model sees tokens of its own, every other tower the question.
        self.of_decoder = model.is_encoder_decoder and any(site.tower == "language" for site in self.space)
        if self.of_decoder and any(site.tower != "language" for site in self.space):
            raise MismatchError(
                f"{type(model.hf).__name__} is an encoder-decoder model: its decoder sees other tokens than its other "
                "towers. Record model.space('language') in a Recorder of its own"
            )
        self.tokens: TokenRule | Mapping[str, TokenRule] = tokens
        self.rules: tuple[TokenRule, ...] = tuple(tokens.values()) if isinstance(tokens, Mapping) else (tokens,)
        self._check_rules()
        self.statistics: Mapping[str, ItemStatistic] = dict(statistics or {})
        if self.statistics and any(model.mlp_of(site).routed for site in self.space.sites):
            raise MismatchError("a statistic looks at all tokens of a question, and an expert sees some: leave it out")
        self.magnitudes = as_flag("magnitudes", magnitudes, MismatchError)
        self.maxima = as_flag("maxima", maxima, MismatchError)
        # NaN and infinity pass from layer to layer, so a look at the last site is a look at all of them.
        decoder = [state for state in self.sites if state.site.tower == "language"]
        self._last = max(decoder or self.sites, key=lambda state: state.site.layer)
        self.strict = True
        self.frame: Frame | None = None
        self._watched: Frame | None = None
        """The frame of the next forward."""
        self._scratch: collections.defaultdict[int, dict] = collections.defaultdict(dict)
        """What the sites of a forward share, for each rule."""
        self._bad: list[tuple[SiteState, Tensor]] = []
        """For each visit of a site that was looked at ``[row]`` whether it has values that are not finite."""

    def _check_rules(self) -> None:
        hears, of_media = any(state.hears for state in self.sites), any(state.of_media for state in self.sites)
        for rule in self.rules:
            check_token_rule(rule)
            if rule in ("text", "last") and of_media:
                tower, instead = ("an audio", "audio") if hears else ("a vision", "image")
                raise QuestionError(f"tokens={rule!r} counts words; {tower} tower has none. Record it with {instead!r}")
        if isinstance(self.tokens, Mapping) and (not self.tokens or of_media):
            tower = "an audio tower hears sounds" if hears else "a vision tower sees pictures"
            problem = f"{tower} alone: record it by itself" if self.tokens else "no rule was given"
            raise QuestionError(f"tokens by name are groups of the decoder's tokens, and {problem}")

    # -- hooks ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def attached(
        self, begin: Callable[..., None] | None = None, end: Callable[..., None] | None = None
    ) -> Iterator[None]:
        """Within, the sites of every forward that has a frame are counted; no other thread may run the model.

        Args:
            begin: called before each forward of the model, to set the frame; by default that of `watch`.
            end: called after it.
        """
        with OWNERS.held(self.model.hf, "recorded"), hooked(self._hooks(begin or self._begin, end)):
            try:
                yield
            finally:
                self.forget()
                self._scratch.clear()

    def _hooks(
        self, begin: Callable[..., None], end: Callable[..., None] | None
    ) -> Iterator[contextlib.AbstractContextManager[object]]:
        """What `attached` puts on the model: at each site what counts, at the model what begins and ends a forward."""
        hf = self.model.hf
        for state in self.sites:
            yield read(hf, self.model.mlp_of(state.site), state.site.kind, self._observer(state))
        words = [state.site for state in self.sites if not state.of_media]
        yield all_tokens(self.model, words, lambda: self._masks(self.frame)[0].numel() if self.frame else 0)
        yield OWNERS.guard(hf)
        yield hf.register_forward_pre_hook(Hook(begin), with_kwargs=True)
        if end is not None:
            yield hf.register_forward_hook(Hook(end))

    def _begin(self, *_: object) -> None:
        # Later steps of a generation are not counted: only the prompt is.
        self.frame, self._watched = self._watched, None

    def _observer(self, state: SiteState) -> Callable[..., None]:
        """What is called with a site's values whenever the model computes them."""

        def observe(values: Tensor, tokens: Tensor | None = None) -> None:
            frame = self.frame
            if frame is None:
                return
            # A run that another thread began before the hooks were on has not met the one that refuses it.
            OWNERS.check(self.model.hf)
            if tokens is not None and state.of_media:
                raise MismatchError(
                    f"{state.site}: what a router sends to an expert of a tower that sees or hears "
                    "cannot be told apart by question; record the tower's other neurons"
                )
            with torch.no_grad():
                if tokens is not None:
                    counts = self._counts_of_expert(state, values, tokens, frame)
                elif state.of_media:
                    counts = self._counts_of_media(state, values, frame)
                else:
                    counts = self._counts_of_tokens(state, values, frame)
            self._add(state, counts)

        return observe

    # -- one site of one forward ---------------------------------------------------------------------------------------

    def _masks(self, frame: Frame) -> tuple[Tensor, ...]:
        """``[row, token]`` which tokens of a forward each rule counts."""
        return frame.mask.chunk(len(self.rules))

    def _wanted(self, state: SiteState) -> Keywords:
        """What is to be counted at a site."""
        strict = self.strict or state is self._last
        return {"totals": self.magnitudes, "maxima": self.maxima, "strict": strict}

    def _counts_of_tokens(self, state: SiteState, values: Float[Tensor, "*any neuron"], frame: Frame) -> Counts:
        """Counts of the tokens of a text, which the site sees as they are."""
        site, masks = state.site, self._masks(frame)
        mask = masks[0]
        if site.tower not in ("language", "encoder"):
            raise MismatchError(
                f"{site}: what the tower {site.tower!r} sees is neither the text's tokens nor, for all "
                "that is known, pictures; name a vision tower 'vision' with register_architecture"
            )
        if tuple(values.shape[:-1]) not in (tuple(mask.shape), (mask.numel(),)):
            raise MismatchError(
                f"{site} has values at {tuple(values.shape[:-1])} tokens, the input has {tuple(mask.shape)}: "
                "this model's decoder does not see its input tokens one to one, so they cannot be told apart"
            )
        by_rule = [
            count_tokens(values, counted, scratch=self._scratch[rule], **self._wanted(state))
            for rule, counted in enumerate(masks)
        ]
        if self.statistics:
            counted = mask.to(values.device)
            by_rule[0] |= self._statistics_of(site, values.reshape(*counted.shape, values.shape[-1]), counted)
        return _stacked(by_rule)

    def _counts_of_expert(self, state: SiteState, values: Tensor, tokens: Tensor, frame: Frame) -> Counts:
        """Counts of the tokens that a router sends to the site."""
        wanted = self._wanted(state)
        return _stacked([count_routed(values, tokens, counted, **wanted) for counted in self._masks(frame)])

    def _counts_of_media(self, state: SiteState, values: Float[Tensor, "*any neuron"], frame: Frame) -> Counts:
        """Counts of patches, tiles, pictures or sounds, of which each question has some."""
        parts = values.reshape(values.shape[0], -1, values.shape[-1])
        if values.ndim == 3 and values.shape[0] == 1 and frame.rows_left(state) not in (None, 1):
            parts = values.reshape(values.shape[1], 1, values.shape[-1])  # one long row of patches
        owner, real = frame.assign(state, parts)
        n_rows, wanted = len(frame.mask), self._wanted(state)
        counts = count_patches(parts, real, owner, n_rows, scratch=self._scratch[0], **wanted)
        if self.statistics:
            counted = real.to(parts.device)
            for row in owner.unique().tolist():
                of_row = (owner == row).to(parts.device)
                patches, counted_of_row = parts[of_row].flatten(0, 1)[None], counted[of_row].flatten()[None]
                for name, value in self._statistics_of(state.site, patches, counted_of_row).items():
                    missing = torch.full((n_rows, value.shape[1]), torch.nan, device=value.device)
                    counts.setdefault(name, missing)[row] = value[0]
        return counts

    def _statistics_of(self, site: Site, values: Tensor, counted: Tensor) -> dict[str, Tensor]:
        """``[row, neuron]`` what the user's functions make of a site's values.

        Raises:
            BadStatistic: one gives another shape, or NaN.
        """
        results = {}
        for name, function in self.statistics.items():
            of_site = {"site": site} if "site" in inspect.signature(function).parameters else {}
            frame, self.frame = self.frame, None  # whatever part of the model it calls is not counted again
            try:
                result = function(values.clone(), counted.clone(), **of_site)  # it may write there; the model goes on
            finally:
                self.frame = frame
            shape = (values.shape[0], values.shape[2])
            if not isinstance(result, Tensor) or tuple(result.shape) != shape:
                got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
                raise BadStatistic(f"gave {got}, not [row, neuron] = {list(shape)}", name, site, 0)
            if result.is_complex():
                raise BadStatistic("gave complex numbers", name, site, 0)
            rows_with_nan = torch.isnan(result).any(1)
            if bool(rows_with_nan.any()):
                raise BadStatistic("gave NaN", name, site, int(rows_with_nan.nonzero()[0]))
            results[name] = result.to(torch.float32)
        return results

    def _add(self, state: SiteState, counts: Counts) -> None:
        bad_rows = counts.get("bad")
        if bad_rows is not None:
            self._bad.append((state, bad_rows))
        state.add({name: table for name, table in counts.items() if name != "bad"})

    # -- one batch of questions ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watch(self, batch: Batch, rows: list[int]) -> Iterator[None]:
        """Count the next forward, which shows a prepared batch; its counts stay until `forget`."""
        if self.model.is_encoder_decoder:
            raise MismatchError(
                f"{type(self.model.hf).__name__} is an encoder-decoder model: no single forward shows its decoder the "
                "question and gives the answer. Count in runs of your own: with vn.Recorder(model, "
                "model.space('encoder')) as recorder, recorder.group(…): model.hf(**model.prepare(questions))"
            )
        self.forget()
        masks = [batch.tokens.counted(rule) for rule in self.rules]
        rows_by_rule = [row + number * len(mask) for number, mask in enumerate(masks) for row in rows]
        frame = Frame(
            torch.cat(masks),
            rows_by_rule,
            batch.row_counts,
            batch.patches,
            batch.heard,
            filled=is_filled(batch),
            prepared=not batch.is_whole,
        )
        self._watched = frame
        try:
            yield
        finally:
            if self._watched is None:
                self.frame = frame  # a generation's later steps have taken it away
                self.check_finite()
        if self._watched is not None:
            raise MismatchError(
                "no forward was run within `watch`, so nothing was counted: the reader runs it elsewhere"
            )

    def take(self, counts: Mapping[int, Counts], n_pictures: Mapping[int, int], /) -> None:
        """Take over what was counted elsewhere in the watched run, as if it had been counted here."""
        self._begin()
        assert self.frame is not None
        for number, of_site in counts.items():
            state = self.sites[number]
            state.passed = n_pictures.get(number, 0) if state.of_media else 0
            self._add(state, of_site)
        self.check_finite()

    def forget(self) -> None:
        """Drop what was counted, and what the sites of one forward share."""
        for state in self.sites:
            state.clear()
        self.frame = self._watched = None
        self._bad.clear()
        for scratch in self._scratch.values():
            for name in [name for name in scratch if isinstance(name, tuple)]:
                del scratch[name]

    # -- what was counted ----------------------------------------------------------------------------------------------

    def check_finite(self) -> None:
        """Refuse a forward with values that are not finite, once it is over: asking in it, the host waits for a GPU.

        Raises:
            NotFinite: a counted token had such values; at the first site where one had.
        """
        visits, self._bad = self._bad, []
        by_device: dict[torch.device, list[Tensor]] = {}
        for _, bad_rows in visits:
            by_device.setdefault(bad_rows.device, []).append(bad_rows)
        if any(bool(torch.cat(tables).any()) for tables in by_device.values()):
            state, bad_rows = next(visit for visit in visits if bool(visit[1].any()))
            raise NotFinite(state.site, int(bad_rows.nonzero()[0]) % (len(bad_rows) // len(self.rules)))

    def check_whole(self) -> None:
        """Refuse a forward in which a tower saw or heard other rows than the pictures, videos or sounds have.

        Raises:
            MismatchError: it did, so its rows are not the questions'.
        """
        assert self.frame is not None
        self.frame.check_all_passed(self.sites)

    def by_row(self) -> tuple[dict[str, Tensor], Int64[Tensor, " row"]]:
        """Tables ``[row, …]`` of the rows that stand for questions, on the CPU, and each one's counted tokens.

        ``positive``, ``total``, ``maximum`` and the statistics are ``[row, neuron]``; ``reached`` ``[row, site]`` are
        the tokens that were counted at each site.
        """
        assert self.frame is not None
        rows = torch.tensor(self.frame.rows)
        rows_on: dict[torch.device, Tensor] = {}

        def of_questions(table: Tensor) -> Tensor:
            if table.device not in rows_on:
                rows_on[table.device] = rows.to(table.device)
            return table[rows_on[table.device]]

        # What a site has that nothing passed: an expert that no token was routed to, a tower without pictures.
        nothing = {"fired": (torch.int64, 0), "total": (torch.float64, 0), "maximum": (torch.float32, -torch.inf)}
        nothing |= dict.fromkeys(self.statistics, (torch.float32, torch.nan))
        tables: dict[str, list[Tensor]] = {name: [] for name in [*nothing, "reached"]}
        for state in self.sites:
            for name, (dtype, fill) in nothing.items():
                table, shape = state.counts.get(name), (len(rows), state.width)
                tables[name].append(torch.full(shape, fill, dtype=dtype) if table is None else of_questions(table))
            tokens = state.counts.get("tokens")
            reached = torch.zeros(len(rows), dtype=torch.int64) if tokens is None else of_questions(tokens)
            tables["reached"].append(reached[:, None])
        joined = {name: _on_host(parts) for name, parts in tables.items()}
        joined["positive"] = joined.pop("fired")
        of_media = all(state.of_media for state in self.sites)
        return joined, joined["reached"].amax(1) if of_media else self.frame.mask.sum(1).cpu()[rows]


def _on_host(parts: Sequence[Tensor]) -> Tensor:
    """Tables side by side; those in a row that lie on one device are brought over together."""
    by_device = itertools.groupby(parts, lambda part: part.device)
    return torch.cat([torch.cat(list(tables), 1).cpu() for _, tables in by_device], 1)


def _stacked(by_rule: Sequence[Counts]) -> Counts:
    """Counts of the same rows by several rules, one rule's rows after the other's."""
    if len(by_rule) == 1:
        return by_rule[0]

    def stacked(name: str) -> Tensor | None:
        tables = [table for counts in by_rule if (table := counts[name]) is not None]
        return torch.cat(tables) if tables else None

    return {name: stacked(name) for name in by_rule[0]}
