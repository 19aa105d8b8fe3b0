"""Counting how often neurons fire in any run of a model: `Recorder`.

A neuron *fires* at a token if its value is above zero (for SiLU and GELU the gate is above zero exactly where its input
is). For each row of a batch the recorder counts the tokens at which each neuron fires, among those that the token rule
counts. All counts are integers.
"""

import contextlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlmneurons._version import __version__
from vlmneurons.checks import flag, names, of_kind
from vlmneurons.errors import ActivationError, MismatchError, QuestionError, VLMNeuronsError
from vlmneurons.model.architectures.hooks import Handle, read
from vlmneurons.model.encoder import TOKEN_RULES, Batch, TokenRule, free_tokens
from vlmneurons.model.vision_rows import UnknownPadding, real_patches
from vlmneurons.model.vlm import VLM, check_model
from vlmneurons.neurons.sites import NeuronSpace, Site
from vlmneurons.run.remote import SiteCounts
from vlmneurons.statistics.counts import ActivationStatistics

_CPU_BLOCK = 2**20


_BLOCK = 2**26


def _block(values: Tensor) -> int:
    """How many values are compared at once, as float32.

    As many as a CPU's cache holds, or few beside what a GPU holds; never more than take the memory of the values.
    """
    most = _CPU_BLOCK if values.device.type == "cpu" else _BLOCK
    return min(most, values.numel() * values.element_size() // 4)


class _FiringCounter:
    """Counts values above zero by matrix products, with one buffer for all sites.

    ``values > 0`` is written as 0.0 and 1.0 into memory that is used again and again, and multiplied by the weights of
    the tokens (1 if counted) while it is still in the cache: that masks and sums in one pass, several times faster than
    making a new table of booleans and summing it. float32 holds the sums exactly, as no row has 2^24 tokens; so does
    TF32, whose inputs 0 and 1 are exact and whose sums are float32.
    """

    def __init__(self) -> None:
        self._buffers: dict[torch.device, Tensor] = {}

    def by_row(
        self, values: Float[Tensor, "row token neuron"], weights: Float[Tensor, "row token"]
    ) -> Int64[Tensor, "row neuron"]:
        """For each row how many counted tokens a neuron fires at."""
        rows = _block(values) // max(1, values.shape[1] * values.shape[2])
        if rows == 0:
            return torch.cat([self.by_owner(part, weights[row, None]) for row, part in enumerate(values)])
        fired = [
            torch.bmm(weights[start : start + rows, None], self._fires(values[start : start + rows])).squeeze(1)
            for start in range(0, len(values), rows)
        ]
        return torch.cat(fired).to(torch.int64)

    def by_owner(
        self, values: Float[Tensor, "token neuron"], weights: Float[Tensor, "row token"]
    ) -> Int64[Tensor, "row neuron"]:
        """The same for values that lie in one row, where ``weights[row, token]`` is 1 if the token is the row's."""
        step = max(1, _block(values) // values.shape[-1])
        fired = values.new_zeros((len(weights), values.shape[-1]), dtype=torch.float32)
        for start in range(0, len(values), step):
            fired.addmm_(weights[:, start : start + step], self._fires(values[start : start + step]))
        return fired.to(torch.int64)

    # What is written again must not be made in inference mode, or no run outside of it could use it.
    @torch.inference_mode(False)
    def _fires(self, values: Tensor) -> Tensor:
        """1.0 where a value is above zero, else 0.0; overwritten by the next call."""
        buffer = self._buffers.get(values.device)
        if buffer is None or buffer.numel() < values.numel():
            buffer = self._buffers[values.device] = torch.empty(values.numel(), device=values.device)
        with torch.no_grad():
            return torch.gt(values, 0, out=buffer[: values.numel()].view(values.shape))

    def clear(self) -> None:
        """Give the memory back."""
        self._buffers.clear()


class _SiteCount:
    """Counts of one site during one forward: ``[row, neuron]``, and how many tokens were counted."""

    def __init__(self, site: Site, width: int) -> None:
        self.site, self.width = site, width
        self.clear()

    def clear(self) -> None:
        self.fired: Tensor | None = None
        self.tokens: Tensor | None = None
        self.total: Tensor | None = None
        self.maximum: Tensor | None = None
        self.seen = 0

    def add(self, fired: Tensor, tokens: Tensor, total: Tensor | None, maximum: Tensor | None = None) -> None:
        self.fired = fired if self.fired is None else self.fired + fired
        self.tokens = tokens if self.tokens is None else self.tokens + tokens
        if total is not None:
            self.total = total if self.total is None else self.total + total
        if maximum is not None:
            self.maximum = maximum if self.maximum is None else torch.maximum(self.maximum, maximum)


class Recorder:
    """Counts how often neurons fire, in whatever runs the model makes while it is entered.

    Works in plain calls (``model.hf(**inputs)``), in traces and in ``generate`` (whose every step is counted). Rows
    belong to the group that `group` names, or to ``"all"``. A run that does not end, because it raised or was
    stopped, is not counted at all.

    Args:
        model: the model.
        space: the neurons to count; by default the gates of the language tower.
        tokens: which tokens count; see `TokenTable.counted`. In runs of your own the chat template is not known, so
            ``"content"`` and ``"text"`` count its words. Neurons of a vision tower count over all patches.
        magnitudes: also sum the neurons' values, in float64, for mean activations.

    Example:
        ``with Recorder(model) as recorder, recorder.group("Egypt"): model.hf(**inputs)``, then ``recorder.statistics``.
    """

    def __init__(
        self,
        model: VLM,
        space: NeuronSpace | None = None,
        *,
        tokens: TokenRule = "content",
        magnitudes: bool = False,
    ) -> None:
        check_model(model)
        of_kind(
            "space", space, (NeuronSpace, type(None)), MismatchError, "a NeuronSpace, such as model.space('vision')"
        )
        self.model = model
        self.space = model.space() if space is None else space
        for site, width in zip(self.space.sites, self.space.widths, strict=True):
            if model.mlp_of(site).width != width:
                raise MismatchError(
                    f"{site} has {model.mlp_of(site).width} neurons in this model; the space has {width}"
                )
        # The decoder of an encoder-decoder model sees tokens of its own, every other tower the question.
        self._second = model.is_encoder_decoder and any(site.tower == "language" for site in self.space)
        if self._second and any(site.tower != "language" for site in self.space):
            raise MismatchError(
                f"{type(model.hf).__name__} is an encoder-decoder model: its decoder sees other tokens than its other "
                "towers. Record model.space('language') in a Recorder of its own"
            )
        if isinstance(tokens, str) and tokens not in TOKEN_RULES:
            raise QuestionError(f"tokens={tokens!r} is not a token rule; choose from {', '.join(TOKEN_RULES)}")
        self._in_vision = [site.tower in ("vision", "projector") for site in self.space.sites]
        if tokens in ("text", "last") and any(self._in_vision):
            raise QuestionError(f"tokens={tokens!r} counts words; a vision tower has none. Record it with 'image'")
        self.tokens = tokens
        self.magnitudes = flag("magnitudes", magnitudes, MismatchError)
        self._maxima = False
        self._elsewhere = False
        self._counter = _FiringCounter()
        self._weights: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._sites = [_SiteCount(site, width) for site, width in zip(self.space.sites, self.space.widths, strict=True)]
        # NaN and infinity pass from layer to layer, so a look at the last site is a look at all of them.
        decoder = [n for n, site in enumerate(self.space.sites) if site.tower == "language"]
        self._sentinel = max(decoder or range(len(self._sites)), key=lambda n: self.space.sites[n].layer)
        self._handles: list[Any] = []
        self._labels: Sequence[str] | str = "all"
        self._groups: list[str] = []
        self._positive: list[Tensor] = []
        self._total: list[Tensor] = []
        self._tokens = torch.zeros((0,), dtype=torch.int64)
        self._reached = torch.zeros((0, len(self._sites)), dtype=torch.int64)
        self._items = torch.zeros((0,), dtype=torch.int64)
        self._mask: Tensor | None = None
        self._vision: tuple[int, ...] | None = None
        self._patches: Tensor | None = None
        self._prepared: Batch | None = None
        self._rows: list[int] = []
        self._strict = True
        self._steps = 0
        self._continues = False
        self._whole = True

    # -- being entered -------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Recorder":
        if self._handles:
            raise VLMNeuronsError("this recorder is already counting; make another one to nest them")
        if self._elsewhere:
            return self
        hf = self.model.hf
        try:
            for number, site in enumerate(self.space.sites):
                mlp = self.model.mlp_of(site)
                self._handles.append(read(hf, mlp, site.kind, self._callback(number)))
            self._handles.append(Handle([hf.register_forward_pre_hook(self._begin, with_kwargs=True)]))
            self._handles.append(Handle([hf.register_forward_hook(self._end)]))
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._detach()

    def _detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._clear()
        self._counter.clear()

    @contextlib.contextmanager
    def group(self, label: str | Sequence[str]) -> Iterator[None]:
        """Within, rows of the batch belong to this group; a list gives each row its own.

        Args:
            label: the group of all rows, or a list with the group of each row.
        """
        before, self._labels = self._labels, label if isinstance(label, str) else names("label", label, MismatchError)
        try:
            yield
        finally:
            self._labels = before

    @property
    def statistics(self) -> ActivationStatistics:
        """What was counted so far; groups in the order in which they came.

        Raises:
            MismatchError: nothing was counted yet.
        """
        if not self._groups:
            raise MismatchError("nothing was recorded yet: run the model inside `with recorder:`")
        return self._statistics({"tokens": rule_name(self.tokens), **provenance_of_run(self.model)})

    # -- one forward ---------------------------------------------------------------------------------------------------

    def _clear(self) -> None:
        for count in self._sites:
            count.clear()
        self._mask = None
        self._weights.clear()

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model's forward begins: which of its tokens count?"""
        self._steps += 1
        if self._prepared is not None and self._steps > 1:
            self._mask = None  # later steps of a generation: only the prompt is counted
            return
        self._clear()
        if self._prepared is not None:
            self._mask = self._prepared.tokens.counted(self.tokens)
            self._vision, self._patches = self._prepared.vision, self._prepared.patches
            return
        arguments = dict(kwargs)
        if args:
            arguments.setdefault("input_ids", args[0])
        if self._second:
            arguments = self._decoder_arguments(arguments)
        ids = arguments.get("input_ids")
        table = None if ids is None else free_tokens(self.model, arguments, ids.shape[1])
        if table is None:
            why = " (in `generate` an encoder runs outside of the model's forward: call model.hf(**inputs))"
            raise QuestionError(
                "a Recorder tells tokens apart by input_ids; this run gives none"
                + (why if self.model.is_encoder_decoder else "")
            )
        self._mask = table.counted(self.tokens)
        self._vision, self._patches = None, self._patches_of(arguments)
        # A later step of `generate` brings a new token of an item that was counted before.
        attention = arguments.get("attention_mask")
        self._continues = attention is not None and attention.ndim == 2 and attention.shape[1] > ids.shape[1]
        if self._second:  # its attention mask is not always given, but a later step has a cache that holds tokens
            caches = (kwargs.get(name) for name in ("past_key_values", "cache"))
            self._continues = any(cache is not None and cache.get_seq_length() > 0 for cache in caches)

    def _patches_of(self, arguments: Mapping[str, Any]) -> Tensor | None:
        """Which patches of the vision tower's rows are no padding, in a run of the user's own; None where none is."""
        if not any(self._in_vision):
            return None
        try:
            return real_patches(arguments, self.model.hf.config)
        except UnknownPadding as what:
            raise MismatchError(
                f"some of what the vision tower of {type(self.model.hf).__name__} sees is padding ({what}), and it "
                "cannot be told what: padding would be counted"
            ) from None

    def _decoder_arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that say which tokens an encoder-decoder model's decoder sees: they are not the question's."""
        if arguments.get("decoder_input_ids") is None:
            raise MismatchError(
                f"the decoder of {type(self.model.hf).__name__} sees decoder_input_ids, not the question, and this run "
                "gives none: call model.hf(**inputs, decoder_input_ids=…), or record model.space('encoder')"
            )
        return {
            "input_ids": arguments["decoder_input_ids"],
            "attention_mask": arguments.get("decoder_attention_mask"),
        }

    def _end(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """The model's forward is over: in a run of the user's own, everything is counted."""
        if self._prepared is None and self._mask is not None:
            labels = self._labels
            n_rows = len(self._mask)
            groups = [labels] * n_rows if isinstance(labels, str) else list(labels)
            if len(groups) != n_rows:
                raise MismatchError(f"{len(groups)} group labels were given for a batch of {n_rows} rows")
            self._commit(groups)
            self._clear()

    def _callback(self, number: int) -> Any:
        vision = self._in_vision[number]

        def count(values: Tensor, tokens: Tensor | None = None) -> None:
            if self._mask is None:
                return
            with torch.no_grad():
                if vision:
                    self._count_vision(number, values)
                elif tokens is not None:
                    self._count_routed(number, values, tokens)
                else:
                    self._count_tokens(number, values)

        return count

    def _check(self, number: int, values: Tensor, counted: Tensor) -> None:
        """Raise where a counted token's values are not finite; in a quick run only the last site is looked at."""
        if not self._strict and number != self._sentinel:
            return
        # One sum tells that all is well, or calls for a closer look: it may overflow, or be of a token not counted.
        if torch.isfinite(values.sum(dtype=torch.float32)):
            return
        bad = ~torch.isfinite(values).all(-1) & counted.to(values.device)
        if bad.any():
            row = int(bad.reshape(len(bad), -1).any(-1).nonzero()[0]) if bad.ndim > 1 else 0
            raise _NotFinite(self.space.sites[number], row, self._strict)

    def _count_tokens(self, number: int, values: Float[Tensor, "*any neuron"]) -> None:
        mask = self._mask
        assert mask is not None
        state = self._sites[number]
        if state.site.tower not in ("language", "encoder"):
            raise MismatchError(
                f"{state.site}: what the tower {state.site.tower!r} sees is neither the text's tokens nor, for all "
                "that is known, pictures; name a vision tower 'vision' with register_architecture"
            )
        if tuple(values.shape[:-1]) not in (tuple(mask.shape), (mask.numel(),)):
            raise MismatchError(
                f"{state.site} has values at {tuple(values.shape[:-1])} tokens, the input has {tuple(mask.shape)}: "
                "this model's decoder does not see its input tokens one to one, so they cannot be told apart"
            )
        values = values.reshape(*mask.shape, values.shape[-1])
        if values.device not in self._weights:  # the same for all sites of a device
            here = mask.to(values.device)
            self._weights[values.device] = here.to(torch.float32), here.sum(1)
        weights, tokens = self._weights[values.device]
        self._check(number, values, mask)
        fired = self._counter.by_row(values, weights)
        total = None
        if self.magnitudes:
            total = torch.where(mask.to(values.device)[..., None], values, 0).sum(1, dtype=torch.float64)
        maximum = None
        if self._maxima:
            maximum = torch.where(mask.to(values.device)[..., None], values, -torch.inf).amax(1).float()
        state.add(fired, tokens, total, maximum)

    def _count_routed(
        self, number: int, values: Float[Tensor, "token neuron"], tokens: Int64[Tensor, " token"]
    ) -> None:
        """An expert sees only the tokens that were routed to it; ``tokens`` are their places in the flattened batch."""
        mask = self._mask
        assert mask is not None
        mask = mask.to(values.device)
        n_rows, length = mask.shape
        counted = mask.reshape(-1)[tokens]
        self._check(number, values, counted)
        row = torch.div(tokens, length, rounding_mode="floor")[counted]
        values = values[counted]
        fired = torch.zeros((n_rows, values.shape[-1]), dtype=torch.int64, device=values.device)
        fired.index_add_(0, row, (values > 0).to(torch.int64))
        total = None
        if self.magnitudes:
            total = torch.zeros(fired.shape, dtype=torch.float64, device=values.device)
            total.index_add_(0, row, values.to(torch.float64))
        maximum = _maxima_of(values, row, n_rows) if self._maxima else None
        self._sites[number].add(fired, torch.bincount(row, minlength=n_rows), total, maximum)

    def _count_vision(self, number: int, values: Float[Tensor, "*any neuron"]) -> None:
        """Vision towers run on patches, tiles or pictures; the leading dimension is cut into the questions' shares."""
        assert self._mask is not None
        state = self._sites[number]
        n_rows = len(self._mask)
        per_row = values.reshape(values.shape[0], -1, values.shape[-1])
        if values.ndim == 3 and values.shape[0] == 1 and self._vision is not None and sum(self._vision) != 1:
            per_row = values.reshape(values.shape[1], 1, values.shape[-1])  # one long row of patches
        owner = self._owner_of_rows(state, len(per_row)).to(values.device)
        counted = torch.ones(per_row.shape[:2], dtype=torch.bool, device=values.device)
        if self._patches is not None:
            counted = self._patches[state.seen : state.seen + len(per_row)].to(values.device)
            if counted.shape != per_row.shape[:2]:
                raise MismatchError(
                    f"{state.site} has {per_row.shape[1]} patches in a row where the pictures have "
                    f"{self._patches.shape[1]}: its padding cannot be told from its patches"
                )
        self._check(number, per_row, counted)
        state.seen += len(per_row)
        rows = torch.arange(n_rows, device=values.device)[:, None]
        weights = ((rows == owner)[..., None] & counted).flatten(1).to(torch.float32)
        sums = self._counter.by_owner(per_row.flatten(0, 1), weights)
        total = maximum = None
        if self.magnitudes:
            by_row = torch.where(counted[..., None], per_row, 0).sum(1, dtype=torch.float64)
            total = torch.zeros(sums.shape, dtype=torch.float64, device=values.device).index_add_(0, owner, by_row)
        if self._maxima:
            maximum = _maxima_of(torch.where(counted[..., None], per_row, -torch.inf).amax(1), owner, n_rows)
        state.add(sums, weights.sum(1).to(torch.int64), total, maximum)

    def _owner_of_rows(self, state: _SiteCount, n: int) -> Int64[Tensor, " row"]:
        """Which row of the batch each of the next rows of a vision tower belongs to."""
        assert self._mask is not None
        if self._vision is None:
            if self._prepared is not None or not isinstance(self._labels, str):
                raise MismatchError(
                    f"{state.site}: the rows of this vision tower cannot be told apart by question; record one "
                    "question at a time, in a Recorder of your own"
                )
            return torch.zeros(n, dtype=torch.int64)  # one group: any row will do
        shares = torch.tensor(self._vision)
        # A projector may take several patches for one: then each question has so many rows fewer, all in one call.
        together = 1 if state.site.tower == "vision" or state.seen else max(1, int(shares.sum()) // max(1, n))
        if bool((shares % together).any()):
            raise MismatchError(f"{state.site} has {n} rows where the pictures have {int(shares.sum())}")
        owners = torch.repeat_interleave(torch.arange(len(self._mask)), shares // together)
        owner = owners[state.seen : state.seen + n]
        state.seen += n * (together - 1)  # in patches, as the pictures are counted
        if len(owner) != n:
            raise MismatchError(f"{state.site} has {state.seen + n} rows where the pictures have {len(owners)}")
        return owner

    def _take(self, counts: Mapping[int, SiteCounts]) -> None:
        """Take over what was counted elsewhere, of the rows that are watched, as if it had been counted here."""
        assert self._prepared is not None
        self._vision = self._prepared.vision
        n_rows, rows = len(self._prepared.tokens.ids), torch.tensor(self._rows)
        for number, one in counts.items():
            if one.bad.any():
                raise _NotFinite(self.space.sites[number], self._rows[int(one.bad.nonzero()[0])], True)
            state = self._sites[number]
            state.seen = one.seen if self._in_vision[number] else 0

            def of_batch(part: Tensor | None, rest: float = 0) -> Tensor | None:
                return (
                    None if part is None else part.new_full((n_rows, *part.shape[1:]), rest).index_copy_(0, rows, part)
                )

            state.add(*map(of_batch, (one.fired, one.tokens, one.total)), of_batch(one.maximum, -torch.inf))

    # -- adding up -----------------------------------------------------------------------------------------------------

    # What adds up must not be made in inference mode, or no run outside of it could be added.
    @torch.inference_mode(False)
    def _group_index(self, group: str) -> int:
        if group not in self._groups:
            self._groups.append(group)
            for number, count in enumerate(self._sites):
                device = count.fired.device if count.fired is not None else torch.device("cpu")
                row = torch.zeros((1, count.width), dtype=torch.int64, device=device)
                empty = len(self._positive) <= number
                if empty:
                    self._positive.append(row)
                else:
                    self._positive[number] = torch.cat([self._positive[number], row.to(self._positive[number].device)])
                if self.magnitudes:
                    zeros = row.to(torch.float64)
                    if empty:
                        self._total.append(zeros)
                    else:
                        self._total[number] = torch.cat([self._total[number], zeros.to(self._total[number].device)])
            self._tokens = torch.cat([self._tokens, torch.zeros(1, dtype=torch.int64)])
            self._items = torch.cat([self._items, torch.zeros(1, dtype=torch.int64)])
            self._reached = torch.cat([self._reached, torch.zeros((1, len(self._sites)), dtype=torch.int64)])
        return self._groups.index(group)

    @torch.inference_mode(False)
    def _commit(self, groups: Sequence[str | None]) -> None:
        """Add each pending row to its group; None leaves a row out.

        In a prepared batch ``groups`` are those of the watched rows; else of all rows.
        """
        rows = self._rows if self._prepared is not None else list(range(len(groups)))
        kept = [(row, self._group_index(group)) for row, group in zip(rows, groups, strict=True) if group is not None]
        if not kept:
            return
        row, group = (torch.tensor(part) for part in zip(*kept, strict=True))
        for count, in_vision in zip(self._sites, self._in_vision, strict=True):
            n_rows = sum(self._vision) if self._vision is not None else None
            if n_rows is None and self._patches is not None:
                n_rows = len(self._patches)
            if in_vision and count.fired is not None and n_rows is not None and count.seen != n_rows:
                raise MismatchError(
                    f"{count.site} had {count.seen} rows where the pictures have {n_rows}: its rows cannot be told "
                    "apart by question"
                )
        self._whole = False
        # All sites of a device share the counted tokens, and only those of experts have their own.
        on_host: dict[int, Tensor] = {}
        for number, count in enumerate(self._sites):
            if count.fired is None or count.tokens is None:
                continue  # an expert that no token was routed to, or text-only input to a vision tower
            device = count.fired.device
            if self._positive[number].device != device:
                self._positive[number] = self._positive[number].to(device)
            self._positive[number].index_add_(0, group.to(device), count.fired[row.to(device)])
            if count.total is not None:
                self._total[number] = self._total[number].to(device)
                self._total[number].index_add_(0, group.to(device), count.total[row.to(device)])
            if id(count.tokens) not in on_host:
                on_host[id(count.tokens)] = count.tokens.cpu()[row]
            self._reached[:, number].index_add_(0, group, on_host[id(count.tokens)])
        if self._prepared is not None or not self._continues:
            self._items.index_add_(0, group, torch.ones_like(group))
        if all(self._in_vision):
            self._tokens = self._reached.amax(1)
        else:
            assert self._mask is not None
            self._tokens.index_add_(0, group, self._mask.sum(1).cpu()[row])
        self._whole = True

    def _statistics(self, provenance: Mapping[str, Any], groups: Sequence[str] | None = None) -> ActivationStatistics:
        for group in groups or ():
            self._group_index(group)
        order = [self._groups.index(group) for group in (groups or self._groups)]
        positive = torch.cat([part.cpu() for part in self._positive], 1)[order]
        total = torch.cat([part.cpu() for part in self._total], 1)[order] if self.magnitudes else None
        everywhere = bool((self._reached == self._tokens[:, None]).all())
        return ActivationStatistics(
            space=self.space,
            groups=tuple(groups or self._groups),
            positive=positive,
            tokens=self._tokens[order],
            items=self._items[order],
            routed=None if everywhere else self._reached[order],
            total=total,
            provenance=dict(provenance),
        )

    def _by_row(self) -> tuple[dict[str, Any], Any]:
        """Tables of the watched rows of a prepared batch, ``[row, …]``, and each row's number of counted tokens."""
        assert self._mask is not None
        rows = torch.tensor(self._rows)
        positive, total, reached, maximum = [], [], [], []
        for count in self._sites:
            shape = (len(rows), count.width)
            positive.append(torch.zeros(shape, dtype=torch.int64) if count.fired is None else count.fired.cpu()[rows])
            total.append(torch.zeros(shape, dtype=torch.float64) if count.total is None else count.total.cpu()[rows])
            none = torch.full(shape, -torch.inf)
            maximum.append(none if count.maximum is None else count.maximum.cpu()[rows])
            reached.append(
                torch.zeros(len(rows), dtype=torch.int64) if count.tokens is None else count.tokens.cpu()[rows]
            )
        at_sites = torch.stack(reached, 1)
        counted = at_sites.amax(1) if all(self._in_vision) else self._mask.sum(1).cpu()[rows]
        tables = {"positive": torch.cat(positive, 1), "total": torch.cat(total, 1), "reached": at_sites}
        tables["maximum"] = torch.cat(maximum, 1)
        return {name: table.numpy() for name, table in tables.items()}, counted.numpy()

    # -- one batch of questions ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _watch(self, batch: Batch, rows: list[int]) -> Iterator[None]:
        """Count the first forward of a prepared batch; its rows wait for `_commit`."""
        if self.model.is_encoder_decoder:
            raise MismatchError(
                f"{type(self.model.hf).__name__} is an encoder-decoder model: no single forward shows its decoder the "
                "question and gives the answer. Count in runs of your own: with vn.Recorder(model, "
                "model.space('encoder')) as recorder, recorder.group(…): model.hf(**model.prepare(questions))"
            )
        self._prepared, self._rows, self._steps, self._mask = batch, rows, 0, None
        yield
        self._mask = batch.tokens.counted(self.tokens)  # a generation's later steps have cleared it

    def _forget(self) -> None:
        self._prepared, self._rows = None, []
        self._clear()


def _maxima_of(values: Float[Tensor, "part neuron"], owner: Int64[Tensor, " part"], n_rows: int) -> Tensor:
    """The highest value of each neuron among the parts of each row; ``-inf`` for a row without any."""
    highest = torch.full((n_rows, values.shape[-1]), -torch.inf, dtype=torch.float32, device=values.device)
    for row in owner.unique().tolist():  # a batch has few rows, and index_reduce_ warns that it may change
        highest[row] = values[owner == row].amax(0)
    return highest


class _NotFinite(ActivationError):
    def __init__(self, site: Site, row: int, first: bool) -> None:
        super().__init__(f"NaN or infinite activations at {site}, row {row} of the batch")
        self.site, self.row, self.first = site, row, first


def provenance_of_run(model: VLM) -> dict[str, Any]:
    import nnsight
    import transformers

    return {
        "model": model.name,
        "revision": model.revision,
        "dtype": str(model.hf.dtype),
        "versions": {
            "vlmneurons": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "nnsight": nnsight.__version__,
            "python": platform.python_version(),
        },
    }


def rule_name(rule: Any) -> str:
    return rule if isinstance(rule, str) else f"{getattr(rule, '__module__', '')}.{getattr(rule, '__qualname__', rule)}"
