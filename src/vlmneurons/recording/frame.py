"""What one forward shows a model: which tokens count, and which question each picture or sound that it sees is of.

The language tower sees the batch as it is, ``[row, token]``. A tower that sees or hears has rows of its own (patches,
tiles, pictures, sounds), those of all questions one after the other, and may be run several times in a forward.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int64
from torch import Tensor

from vlmneurons.errors import MismatchError
from vlmneurons.model.sound_rows import Heard
from vlmneurons.neurons.sites import Site
from vlmneurons.run.engine import Counts

OF_QUERIES = ("qformer", "connector", "high_res_vision_model")
"""Towers that take a picture a row, as it is or by queries: none of their values is of padding in a picture."""

Assigned = tuple[Int64[Tensor, " part"], Tensor]
"""Of rows of a tower: the row of the batch that each belongs to, and ``[part, patch]`` which of its patches count."""


def is_filled(inputs: Mapping[str, object]) -> bool:
    """Whether the words that a Q-Former sees are filled up to the longest question's."""
    mask = inputs.get("qformer_attention_mask")
    return isinstance(mask, Tensor) and not bool(mask.all())


@dataclass
class SiteState:
    """What was counted at one site during one forward; a site may be visited several times.

    Attributes:
        site: the site.
        width: its number of neurons.
        counts: tables ``[row, …]`` by name; see `vlmneurons.statistics.counting`.
        passed: how many rows of a tower that sees or hears have passed, in the pictures' or sounds' own rows.
    """

    site: Site
    width: int
    counts: dict[str, Tensor | None] = field(default_factory=dict)
    passed: int = 0

    @property
    def hears(self) -> bool:
        """Whether the site's rows are sounds."""
        return self.site.tower in ("audio", "audio_projector")

    @property
    def of_media(self) -> bool:
        """Whether the site's rows are pictures, videos or sounds, and not the tokens of a text."""
        return self.hears or self.site.tower in ("vision", "projector", *OF_QUERIES)

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
        self.counts, self.passed = {}, 0


@dataclass
class Frame:
    """What one forward shows, as far as counting needs to know.

    Attributes:
        mask: ``[row, token]`` which tokens count.
        rows: the rows that stand for questions.
        media_rows: for each row of the batch, how many rows of the vision tower its pictures have; then the same for
            videos. None where that is unknown.
        patches: which patches of the vision tower's rows are no padding; None where all are.
        sounds: which row of the batch each row of the audio tower belongs to; None where that is unknown.
        filled: whether the words that a Q-Former sees beside pictures are filled up to the longest question's.
        prepared: whether the library prepared the batch, so that every row of pictures must be somebody's.
    """

    mask: Tensor
    rows: list[int]
    media_rows: tuple[tuple[int, ...], ...] | None = None
    patches: Tensor | None = None
    sounds: Heard | None = None
    filled: bool = False
    prepared: bool = True

    def n_media_rows(self, *, hears: bool) -> int | None:
        """How many rows the questions' pictures and videos, or their sounds, have; None where that is unknown."""
        if hears:
            return None if self.sounds is None else len(self.sounds.owner)
        return None if self.media_rows is None else sum(map(sum, self.media_rows))

    def rows_left(self, state: SiteState) -> int | None:
        """How many rows a tower is still shown of what it is at: all sounds, all pictures, or all videos."""
        n_rows = self.n_media_rows(hears=state.hears)
        if n_rows is None:
            return None
        ends = [n_rows] if state.hears else itertools.accumulate(map(sum, self.media_rows or ()))
        return next((end - state.passed for end in ends if end > state.passed), 0)

    def assign(self, state: SiteState, parts: Tensor) -> Assigned:
        """Tell which row of the batch each of a tower's next rows belongs to; they have passed from then on.

        Args:
            state: of the site, which knows how many rows have passed before.
            parts: ``[part, patch, neuron]``, the site's values.

        Raises:
            MismatchError: it cannot be told.
        """
        owner, real = self._assign_sounds(state, parts) if state.hears else self._assign_pictures(state, parts)
        if real.shape != parts.shape[:2]:
            patches, pictures, padding = (
                ("frames", "sounds", "what fills up a sound") if state.hears else ("patches", "pictures", "its padding")
            )
            raise MismatchError(
                f"{state.site} has {parts.shape[1]} {patches} in a row where the {pictures} have {real.shape[1]}: "
                f"{padding} cannot be told from its {patches}"
            )
        return owner, real

    def _assign_pictures(self, state: SiteState, parts: Tensor) -> Assigned:
        n_rows, start = len(parts), state.passed
        real = torch.ones(parts.shape[:2], dtype=torch.bool)
        if self.media_rows is None:
            if self.prepared:
                raise MismatchError(
                    f"{state.site}: the rows of this vision tower cannot be told apart by question; ask one question "
                    "at a time (batch_size=1)"
                )
            owner = torch.zeros(n_rows, dtype=torch.int64)  # all rows are of one group: any row of the batch will do
        else:
            totals = [sum(shares) for shares in self.media_rows]
            ends = list(itertools.accumulate(totals))
            shares = torch.tensor([share for shares in self.media_rows for share in shares])
            rows = torch.arange(len(self.mask)).repeat(len(self.media_rows))
            # A vision tower has the pictures' own rows. A projector may take several of them for one: then each
            # question has so many fewer. It is called once for all pictures and once for all videos, so the call that
            # begins at ``start`` has the rows of all of these, and their number says how many are taken together.
            of_call = next((size for size, end in zip(totals, ends) if size and end - size == start), 0)
            together = 1 if state.site.tower == "vision" else max(1, of_call // max(1, n_rows))
            if bool((shares % together).any()):
                raise MismatchError(f"{state.site} has {n_rows} rows where the pictures have {ends[-1]}")
            owner = torch.repeat_interleave(rows, shares // together)[start // together :][:n_rows]
            if len(owner) != n_rows:
                raise MismatchError(f"{state.site} has {start + n_rows} rows where the pictures have {ends[-1]}")
            state.passed += n_rows * (together - 1)
        if state.site.tower in OF_QUERIES:
            if self.filled:
                raise MismatchError(
                    f"{state.site} sees words beside pictures, some of which fill up shorter questions: ask one "
                    "question at a time (batch_size=1)"
                )
        elif self.patches is not None:
            # Rows of several patches taken together are none of these: no row fits, as `assign` says.
            real = self.patches[start : start + n_rows] if state.passed == start else self.patches[:0]
        state.passed += n_rows
        return owner, real

    def _assign_sounds(self, state: SiteState, parts: Tensor) -> Assigned:
        if self.sounds is None:
            raise MismatchError(
                f"{state.site}: what this audio tower hears cannot be told apart by question, nor from the silence "
                "that fills it up: the form of its inputs is not known. Traces read it, and ablations switch it off"
            )
        owner, real = self.sounds
        state.passed += len(parts)
        if tuple(real.shape) == tuple(parts.shape[:2]):
            return owner, real
        # A projector may take several frames for one.
        together, rest = divmod(real.numel(), max(1, parts.shape[0] * parts.shape[1]))
        if state.site.tower != "audio_projector" or rest or together < 1 or real.shape[1] % together:
            return owner, real  # which does not fit, as `assign` says
        frames = real.unflatten(1, (-1, together))
        if bool((frames.any(-1) != frames.all(-1)).any()):
            raise MismatchError(f"{state.site} takes frames of a sound together with what fills it up")
        state.passed = len(owner)
        owner_of_frame = owner[:, None].expand(-1, frames.shape[1])
        return owner_of_frame.reshape(parts.shape[:2])[:, 0], frames.all(-1).reshape(parts.shape[:2])

    def check_all_passed(self, states: Sequence[SiteState]) -> None:
        """Refuse a forward in which a tower saw or heard other rows than the pictures, videos or sounds have.

        Raises:
            MismatchError: it did, so its rows are not the questions'.
        """
        n_pictures = self.n_media_rows(hears=False)
        if n_pictures is None and self.patches is not None:
            n_pictures = len(self.patches)
        for state in states:
            n_rows, media = (self.n_media_rows(hears=True), "sounds") if state.hears else (n_pictures, "pictures")
            if state.of_media and state.counts and n_rows is not None and state.passed != n_rows:
                raise MismatchError(
                    f"{state.site} had {state.passed} rows where the {media} have {n_rows}: its rows cannot be told "
                    "apart by question"
                )
