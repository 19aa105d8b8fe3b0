"""Counting one forward: hooks at the sites of a space, and what each of them saw for every row of the batch."""

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlmneurons.checks import Keywords, as_flag, check_kind
from vlmneurons.errors import ActivationError, MismatchError, QuestionError
from vlmneurons.files.stopping import hooked
from vlmneurons.model.architectures.hooks import read, see_number_of_tokens
from vlmneurons.model.architectures.inside import Hook
from vlmneurons.model.encoder import Batch, TokenRule, check_token_rule
from vlmneurons.model.sound_rows import Heard
from vlmneurons.model.vlm import VLM, check_model
from vlmneurons.neurons.sites import NeuronSpace, Site
from vlmneurons.run.engine import Counts
from vlmneurons.run.owners import OWNERS
from vlmneurons.statistics.counting import count_patches, count_routed, count_tokens
from vlmneurons.statistics.items import ItemStatistic

OF_QUERIES = ("qformer", "connector", "high_res_vision_model")
"""Towers that take a picture a row, as it is or by queries; none of what they see of it fills it up."""


def is_filled(inputs: Mapping[str, object]) -> bool:
    """Whether a Q-Former's words are filled up to the longest question's."""
    mask = inputs.get("qformer_attention_mask")
    return isinstance(mask, Tensor) and not bool(mask.all())


class NotFinite(ActivationError):
    """A counted token with NaN or infinite values: at which site, and in which row of the batch."""

    def __init__(self, site: Site, row: int) -> None:
        super().__init__(f"NaN or infinite activations at {site}, row {row} of the batch")
        self.site, self.row = site, row


class BadStatistic(ActivationError):
    """A statistic of the user's with another shape than it must have, or NaN: at which site, in which row."""

    def __init__(self, what: str, name: str, site: Site, row: int) -> None:
        super().__init__(f"the statistic {name!r} {what}, at {site}")
        self.row = row


@contextlib.contextmanager
def all_tokens(model: VLM, sites: Iterable[Site], number: Callable[[], int]) -> Iterator[None]:
    """Within, experts that are shown some of a batch's tokens are refused: it is not known which.

    Args:
        model: the model.
        sites: of the language tower; those of experts are looked at.
        number: how many tokens the batch has, padding included; 0 where nothing is asked of tokens.
    """

    def checked(site: Site) -> Callable[[int], None]:
        def check(n: int) -> None:
            whole = number()
            if whole and n % whole:  # some show every expert every token, one expert after the other
                raise MismatchError(
                    f"{site}: its experts choose from {n} of the batch's {whole} tokens, and it cannot be told which; "
                    "take neurons that see all of them, or questions without pictures"
                )

        return check

    routed = [(mlp, site) for site in sites if (mlp := model.mlp_of(site)).routed or mlp.expert is not None]
    routers = {mlp.path.rpartition(".")[0]: (mlp, site) for mlp, site in routed}
    with hooked(see_number_of_tokens(model.hf, mlp, checked(site)) for mlp, site in routers.values()):
        yield


@dataclass
class Frame:
    """What one forward sees, as far as counting needs to know.

    Attributes:
        mask: ``[row, token]`` which tokens count.
        rows: the rows that stand for questions.
        seen: for each row the number of rows of the vision tower that are its pictures', and after those of all rows
            the numbers of its videos'; None where that is unknown.
        patches: which patches of these are no padding; None where all are.
        heard: what of the audio tower's rows is whose; None where that is unknown.
        filled: whether the words that a Q-Former sees beside pictures are filled up to the longest question's.
        prepared: whether the library prepared the batch, so that every row of pictures must be somebody's.
    """

    mask: Tensor
    rows: list[int]
    seen: tuple[tuple[int, ...], ...] | None = None
    patches: Tensor | None = None
    heard: Heard | None = None
    filled: bool = False
    prepared: bool = True


@dataclass
class SiteState:
    """What was counted at one site during one forward; a site may be visited several times."""

    site: Site
    width: int
    counts: dict[str, Tensor | None] = field(default_factory=dict)
    seen: int = 0
    """Rows of the vision or audio tower that have passed."""

    def add(self, counts: Counts) -> None:
        """Add what one visit counted."""
        for name, table in counts.items():
            before = self.counts.get(name)
            if before is None or table is None:
                self.counts[name] = table if before is None else before
            elif name == "maximum":
                self.counts[name] = torch.maximum(before, table)
            else:
                self.counts[name] = before + table

    def clear(self) -> None:
        """Forget the forward."""
        self.counts, self.seen = {}, 0


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
        frame: what that forward saw; None between forwards, and in those that are not to be counted.
        strict: look for values that are not finite at every site; else at the last one, where they all arrive.

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
        # The decoder of an encoder-decoder model sees tokens of its own, every other tower the question.
        self.second = model.is_encoder_decoder and any(site.tower == "language" for site in self.space)
        if self.second and any(site.tower != "language" for site in self.space):
            raise MismatchError(
                f"{type(model.hf).__name__} is an encoder-decoder model: its decoder sees other tokens than its other "
                "towers. Record model.space('language') in a Recorder of its own"
            )
        self.rules: tuple[TokenRule, ...] = tuple(tokens.values()) if isinstance(tokens, Mapping) else (tokens,)
        self.hears = [site.tower in ("audio", "audio_projector") for site in self.space.sites]
        self.senses = [
            hears or site.tower in ("vision", "projector", *OF_QUERIES)
            for site, hears in zip(self.space.sites, self.hears, strict=True)
        ]
        for rule in self.rules:
            check_token_rule(rule)
            if rule in ("text", "last") and any(self.senses):
                tower, instead = ("an audio", "audio") if any(self.hears) else ("a vision", "image")
                raise QuestionError(f"tokens={rule!r} counts words; {tower} tower has none. Record it with {instead!r}")
        if isinstance(tokens, Mapping) and (not tokens or any(self.senses)):
            tower = "an audio tower hears sounds" if any(self.hears) else "a vision tower sees pictures"
            what = "no rule was given" if not tokens else f"{tower} alone: record it by itself"
            raise QuestionError(f"tokens by name are groups of the decoder's tokens, and {what}")
        self.tokens: TokenRule | Mapping[str, TokenRule] = tokens
        self.statistics: Mapping[str, ItemStatistic] = dict(statistics or {})
        if self.statistics and any(self.model.mlp_of(site).routed for site in self.space.sites):
            raise MismatchError("a statistic looks at all tokens of a question, and an expert sees some: leave it out")
        self.magnitudes = as_flag("magnitudes", magnitudes, MismatchError)
        self.maxima = as_flag("maxima", maxima, MismatchError)
        self.sites = [SiteState(site, width) for site, width in zip(self.space.sites, self.space.widths, strict=True)]
        # NaN and infinity pass from layer to layer, so a look at the last site is a look at all of them.
        decoder = [n for n, site in enumerate(self.space.sites) if site.tower == "language"]
        self._sentinel = max(decoder or range(len(self.sites)), key=lambda n: self.space.sites[n].layer)
        self.strict = True
        self.frame: Frame | None = None
        self._watched: Frame | None = None
        self._scratch: dict[int, dict] = {}
        """What the sites of a forward share, for each rule."""
        self._bad: list[tuple[int, Tensor]] = []

    # -- hooks ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def attached(
        self, begin: Callable[..., None] | None = None, end: Callable[..., None] | None = None
    ) -> Iterator[None]:
        """Within, the sites of every forward that has a frame are counted.

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
        hf = self.model.hf
        for number, site in enumerate(self.space.sites):
            yield read(hf, self.model.mlp_of(site), site.kind, self._callback(number))
        words = [site for site, senses in zip(self.space.sites, self.senses, strict=True) if not senses]
        yield all_tokens(self.model, words, lambda: self._masks(self.frame)[0].numel() if self.frame else 0)
        yield hf.register_forward_pre_hook(Hook(lambda module, args: OWNERS.check(module)))
        yield hf.register_forward_pre_hook(Hook(begin), with_kwargs=True)
        if end is not None:
            yield hf.register_forward_hook(Hook(end))

    def _begin(self, *_: object) -> None:
        # Later steps of a generation are not counted: only the prompt is.
        self.frame, self._watched = self._watched, None

    def _callback(self, number: int) -> Callable[..., object]:
        count = self._count_media if self.senses[number] else self._count_tokens

        def see(values: Tensor, tokens: Tensor | None = None) -> None:
            if self.frame is None:
                return
            if tokens is not None and self.senses[number]:
                raise MismatchError(
                    f"{self.space.sites[number]}: what a router sends to an expert of a tower that sees or hears "
                    "cannot be told apart by question; record the tower's other neurons"
                )
            with torch.no_grad():
                if tokens is not None:
                    strict = self.strict or number == self._sentinel
                    how = (self.magnitudes, self.maxima, strict)
                    parts = [count_routed(values, tokens, mask, *how) for mask in self._masks(self.frame)]
                    self._add(number, _stacked(parts))
                else:
                    count(number, values, self.frame)

        return see

    def _how(self, number: int, rule: int = 0) -> Keywords:
        strict = self.strict or number == self._sentinel
        scratch = self._scratch.setdefault(rule, {})
        return {"totals": self.magnitudes, "maxima": self.maxima, "scratch": scratch, "strict": strict}

    def _masks(self, frame: Frame) -> tuple[Tensor, ...]:
        """``[row, token]`` which tokens of a forward each rule counts."""
        return frame.mask.chunk(len(self.rules))

    def _add(self, number: int, counts: Counts) -> None:
        bad = counts.get("bad")
        if bad is not None:
            self._bad.append((number, bad))
        self.sites[number].add({name: table for name, table in counts.items() if name != "bad"})

    def check_finite(self) -> None:
        """Refuse a forward with values that are not finite, once it is over: asking in it, the host waits for a GPU.

        Raises:
            NotFinite: a counted token had such values; at the first site where one had.
        """
        found, self._bad = self._bad, []
        by_device: dict[torch.device, list[Tensor]] = {}
        for _, bad in found:
            by_device.setdefault(bad.device, []).append(bad)
        if any(bool(torch.cat(all_of).any()) for all_of in by_device.values()):
            number, bad = next(one for one in found if bool(one[1].any()))
            raise NotFinite(self.space.sites[number], int(bad.nonzero()[0]) % (len(bad) // len(self.rules)))

    def _count_tokens(self, number: int, values: Float[Tensor, "*any neuron"], frame: Frame) -> None:
        site, masks = self.space.sites[number], self._masks(frame)
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
        parts = [count_tokens(values, one, **self._how(number, rule)) for rule, one in enumerate(masks)]
        if self.statistics:
            here = mask.to(values.device)
            parts[0] |= self._statistics_of(site, values.reshape(*here.shape, values.shape[-1]), here)
        self._add(number, _stacked(parts))

    def _statistics_of(self, site: Site, values: Tensor, counted: Tensor) -> dict[str, Tensor]:
        """``[row, neuron]`` what the user's functions make of a site's values.

        Raises:
            BadStatistic: one gives another shape, or NaN.
        """
        found = {}
        for name, function in self.statistics.items():
            of_site = {"site": site} if "site" in inspect.signature(function).parameters else {}
            frame, self.frame = self.frame, None  # whatever part of the model it calls is not counted again
            try:
                made = function(values.clone(), counted.clone(), **of_site)  # it may write there; the model goes on
            finally:
                self.frame = frame
            shape = (values.shape[0], values.shape[2])
            if not isinstance(made, Tensor) or tuple(made.shape) != shape:
                got = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
                raise BadStatistic(f"gave {got}, not [row, neuron] = {list(shape)}", name, site, 0)
            if made.is_complex():
                raise BadStatistic("gave complex numbers", name, site, 0)
            bad = torch.isnan(made).any(1)
            if bool(bad.any()):
                raise BadStatistic("gave NaN", name, site, int(bad.nonzero()[0]))
            found[name] = made.to(torch.float32)
        return found

    def _count_media(self, number: int, values: Float[Tensor, "*any neuron"], frame: Frame) -> None:
        """Towers that see or hear run on patches, tiles, pictures or sounds: the questions' shares, one by one."""
        state = self.sites[number]
        parts = values.reshape(values.shape[0], -1, values.shape[-1])
        hears = self.hears[number]
        if values.ndim == 3 and values.shape[0] == 1 and self._left(state, frame, hears) not in (None, 1):
            parts = values.reshape(values.shape[1], 1, values.shape[-1])  # one long row of patches
        owner, real = (self._heard if hears else self._seen)(state, parts, frame)
        if real.shape != parts.shape[:2]:
            what = ("frames", "sounds", "what fills up a sound") if hears else ("patches", "pictures", "its padding")
            raise MismatchError(
                f"{state.site} has {parts.shape[1]} {what[0]} in a row where the {what[1]} have {real.shape[1]}: "
                f"{what[2]} cannot be told from its {what[0]}"
            )
        counts = count_patches(parts, real, owner, len(frame.mask), **self._how(number))
        if self.statistics:
            here = real.to(parts.device)
            for row in owner.unique().tolist():
                mine = (owner == row).to(parts.device)
                flat = (parts[mine].flatten(0, 1)[None], here[mine].flatten()[None])
                for name, made in self._statistics_of(state.site, *flat).items():
                    empty = torch.full((len(frame.mask), made.shape[1]), torch.nan, device=made.device)
                    counts.setdefault(name, empty)[row] = made[0]
        self._add(number, counts)

    def _left(self, state: SiteState, frame: Frame, hears: bool) -> int | None:
        """How many rows a tower is still shown of what it is at: all sounds, all pictures, or all videos."""
        n = self._n_parts(frame, hears)
        ends = itertools.accumulate(map(sum, frame.seen or ())) if not hears else [n or 0]
        return None if n is None else next((end - state.seen for end in ends if end > state.seen), 0)

    @staticmethod
    def _n_parts(frame: Frame, hears: bool) -> int | None:
        """How many rows of a tower that sees, or hears, the questions have; None where that is unknown."""
        if hears:
            return None if frame.heard is None else len(frame.heard.owner)
        return None if frame.seen is None else sum(map(sum, frame.seen))

    def _seen(self, state: SiteState, parts: Tensor, frame: Frame) -> tuple[Int64[Tensor, " part"], Tensor]:
        """Which row of the batch each of the next rows of a vision tower belongs to, and which of its patches count."""
        n, start = len(parts), state.seen
        real = torch.ones(parts.shape[:2], dtype=torch.bool)
        if frame.seen is None:
            if frame.prepared:
                raise MismatchError(
                    f"{state.site}: the rows of this vision tower cannot be told apart by question; ask one question "
                    "at a time (batch_size=1)"
                )
            owner = torch.zeros(n, dtype=torch.int64)  # one group: any row will do
        else:
            ends = list(itertools.accumulate(map(sum, frame.seen)))
            shares = torch.tensor([share for of in frame.seen for share in of])
            rows = torch.arange(len(frame.mask)).repeat(len(frame.seen))
            # A projector may take several patches for one: then each question has so many rows fewer, all in one call
            # for pictures, and in one for videos.
            whole = next((size for size, end in zip(map(sum, frame.seen), ends) if size and end - size == start), 0)
            together = 1 if state.site.tower == "vision" else max(1, whole // max(1, n))
            if bool((shares % together).any()):
                raise MismatchError(f"{state.site} has {n} rows where the pictures have {ends[-1]}")
            owner = torch.repeat_interleave(rows, shares // together)[start // together :][:n]
            if len(owner) != n:
                raise MismatchError(f"{state.site} has {start + n} rows where the pictures have {ends[-1]}")
            state.seen += n * (together - 1)  # in patches, as the pictures are counted
        if state.site.tower in OF_QUERIES:
            if frame.filled:
                raise MismatchError(
                    f"{state.site} sees words beside pictures, some of which fill up shorter questions: ask one "
                    "question at a time (batch_size=1)"
                )
        elif frame.patches is not None:
            real = frame.patches[start : start + n * (state.seen == start)]  # a projector's patches are not these
        state.seen += n
        return owner, real

    def _heard(self, state: SiteState, parts: Tensor, frame: Frame) -> tuple[Int64[Tensor, " part"], Tensor]:
        """Which row of the batch each row of an audio tower belongs to, and which of its frames are of a sound."""
        if frame.heard is None:
            raise MismatchError(
                f"{state.site}: what this audio tower hears cannot be told apart by question, nor from the silence "
                "that fills it up: the form of its inputs is not known. Traces read it, and ablations switch it off"
            )
        owner, real = frame.heard
        state.seen += len(parts)
        if tuple(real.shape) == tuple(parts.shape[:2]):
            return owner, real
        # A projector may take several frames for one.
        together, rest = divmod(real.numel(), max(1, parts.shape[0] * parts.shape[1]))
        if state.site.tower != "audio_projector" or rest or together < 1 or real.shape[1] % together:
            return owner, real  # which does not fit, as the caller says
        some = real.unflatten(1, (-1, together))
        if bool((some.any(-1) != some.all(-1)).any()):
            raise MismatchError(f"{state.site} takes frames of a sound together with what fills it up")
        state.seen = len(owner)
        own = owner[:, None].expand(-1, some.shape[1])
        return own.reshape(parts.shape[:2])[:, 0], some.all(-1).reshape(parts.shape[:2])

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
        stand = [row + number * len(mask) for number, mask in enumerate(masks) for row in rows]
        prepared = not batch.is_whole
        frame = Frame(torch.cat(masks), stand, batch.seen, batch.patches, batch.heard, is_filled(batch), prepared)
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

    def take(self, counts: Mapping[int, Counts], seen: Mapping[int, int]) -> None:
        """Take over what was counted elsewhere in the watched run, as if it had been counted here."""
        self._begin()
        assert self.frame is not None
        for number, one in counts.items():
            self.sites[number].seen = seen.get(number, 0) if self.senses[number] else 0
            self._add(number, one)
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

    def check_whole(self) -> None:
        """Refuse a forward in which a tower saw or heard other rows than the pictures, videos or sounds have.

        Raises:
            MismatchError: it did, so its rows are not the questions'.
        """
        frame = self.frame
        assert frame is not None
        seen = self._n_parts(frame, hears=False)
        if seen is None and frame.patches is not None:
            seen = len(frame.patches)
        for state, senses, hears in zip(self.sites, self.senses, self.hears, strict=True):
            n_rows, what = (self._n_parts(frame, hears=True), "sounds") if hears else (seen, "pictures")
            if senses and state.counts and n_rows is not None and state.seen != n_rows:
                raise MismatchError(
                    f"{state.site} had {state.seen} rows where the {what} have {n_rows}: its rows cannot be told "
                    "apart by question"
                )

    def by_row(self) -> tuple[dict[str, Tensor], Int64[Tensor, " row"]]:
        """Tables ``[row, …]`` of the rows that stand for questions, on the CPU, and each one's counted tokens.

        ``positive``, ``total``, ``maximum`` and the statistics are ``[row, neuron]``; ``reached`` ``[row, site]`` are
        the tokens that were counted at each site.
        """
        assert self.frame is not None
        rows = torch.tensor(self.frame.rows)
        here: dict[torch.device, Tensor] = {}

        def of_questions(table: Tensor) -> Tensor:
            if table.device not in here:
                here[table.device] = rows.to(table.device)
            return table[here[table.device]]

        empty = {"fired": (torch.int64, 0), "total": (torch.float64, 0), "maximum": (torch.float32, -torch.inf)}
        empty |= dict.fromkeys(self.statistics, (torch.float32, torch.nan))
        tables: dict[str, list[Tensor]] = {name: [] for name in [*empty, "reached"]}
        for state in self.sites:
            for name, (dtype, nothing) in empty.items():
                table, shape = state.counts.get(name), (len(rows), state.width)
                tables[name].append(torch.full(shape, nothing, dtype=dtype) if table is None else of_questions(table))
            tokens = state.counts.get("tokens")
            none = torch.zeros(len(rows), dtype=torch.int64)
            tables["reached"].append((none if tokens is None else of_questions(tokens))[:, None])
        joined = {name: _on_host(parts) for name, parts in tables.items()}
        counted = joined["reached"].amax(1) if all(self.senses) else self.frame.mask.sum(1).cpu()[rows]
        joined["positive"] = joined.pop("fired")
        return joined, counted


def _on_host(parts: Sequence[Tensor]) -> Tensor:
    """Tables side by side; those in a row that lie on one device are brought over together."""
    together = [torch.cat(list(some), 1).cpu() for _, some in itertools.groupby(parts, lambda part: part.device)]
    return torch.cat(together, 1)


def _stacked(parts: Sequence[Counts]) -> Counts:
    """Counts of the same rows by several rules, one rule's rows after the other's."""
    if len(parts) == 1:
        return parts[0]

    def joined(name: str) -> Tensor | None:
        tables = [table for part in parts if (table := part[name]) is not None]
        return torch.cat(tables) if tables else None

    return {name: joined(name) for name in parts[0]}


def group_rows(names: Sequence[str], groups: Sequence[str | None]) -> tuple[list[int], list[int]]:
    """Places of the labels that are names of groups, and the number of each one's group."""
    index = {name: number for number, name in enumerate(names)}
    kept = {place: index[group] for place, group in enumerate(groups) if group is not None}
    return list(kept), list(kept.values())
