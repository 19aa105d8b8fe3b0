"""Computing once what rows of a batch begin with alike: the prompt of options, a picture that several questions share.

In a causal decoder a token's hidden states depend on the tokens before it and on nothing else. Rows that begin with the
same tokens (and the same pictures) therefore have the same hidden states there. A `Packing` lays such rows out as a
tree: each shared token is there once, every row's own tokens follow, and a mask lets each token see just those that it
sees in its own row, at the positions that they have there. Padding, and tokens that come after the last one whose
logits are wanted, are left out; small trees are put beside each other where a large one leaves room.

Two questions about a picture of a thousand tokens then cost little more than one, under every mask: where a data set
asks two questions about each picture, the decoder's part of a study takes about half the time.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from vlmneurons.model.encoder import Batch

_LEAST_SHARED = 0.5
"""Rows are joined if they share at least this part of the shorter one: a joined row sees longer masks."""
_LEAST_SPARED = 0.1
"""Part of a batch's tokens that a packing must spare, or the batch is left as it is."""


@dataclass(frozen=True)
class Packing:
    """Where each token of a batch is computed.

    Attributes:
        row: for each token of the packs a row of the batch that it belongs to.
        place: its position in this row.
        real: whether it is a token at all; the rest fills up the shorter packs.
        pack_of: for each row of the batch its pack.
        path: for each token of the batch its position in the pack; -1 if it is left out.
    """

    row: Int64[Tensor, "pack token"]
    place: Int64[Tensor, "pack token"]
    real: Bool[Tensor, "pack token"]
    pack_of: Int64[Tensor, " row"]
    path: Int64[Tensor, "row position"]

    @classmethod
    def of(cls, batch: Batch, positions: Sequence[Sequence[int]], *, apart: bool = False) -> "Packing | None":
        """The packing of a batch of which some positions' logits are wanted; None where it would spare too little.

        Args:
            batch: the batch; rows share the tokens of a picture, sound or video only if ``batch.pictures`` says that it
                is the same.
            positions: for each row the positions that are wanted.
            apart: put no trees beside each other: rows that share nothing can then be computed one without the other.
        """
        ids, attention, media = (part.cpu() for part in (batch.tokens.ids, batch.tokens.attention, batch.tokens.media))
        pictures: Sequence[Hashable] = range(len(ids)) if batch.pictures is None else batch.pictures
        path = torch.full(ids.shape, -1, dtype=torch.int64)
        trees: list[list[tuple[int, int]]] = []  # for each tree the row and position of its tokens
        tree_of: list[int] = []
        for row, wanted in enumerate(positions):
            end = max(wanted) + 1
            if not attention[row, list(wanted)].all():
                return None
            best, shared = -1, 0
            for other in range(row):
                alike = (ids[row, :end] == ids[other, :end]) & (attention[row, :end] == attention[other, :end])
                alike &= (path[other, :end] >= 0) | ~attention[row, :end]
                if pictures[row] != pictures[other]:
                    alike &= ~media[row, :end]
                n = int(alike.long().cumprod(0).sum())
                if n > shared and n >= _LEAST_SHARED * min(end, max(positions[other]) + 1):
                    best, shared = other, n
            if best < 0:
                trees.append([])
            else:
                path[row, :shared] = path[best, :shared]
            tree_of.append(tree_of[best] if best >= 0 else len(trees) - 1)
            tree = trees[tree_of[-1]]
            own = [place for place in range(shared, end) if attention[row, place]]
            path[row, own] = torch.arange(len(tree), len(tree) + len(own))
            tree += [(row, place) for place in own]
        length = max(map(len, trees))
        packs: list[list[int]] = []
        room: list[int] = []
        for tree in sorted(range(len(trees)), key=lambda n: -len(trees[n])):
            size = len(trees[tree])
            pack = len(packs) if apart else next((n for n, left in enumerate(room) if left >= size), len(packs))
            if pack == len(packs):
                packs.append([])
                room.append(length)
            packs[pack].append(tree)
            room[pack] -= size
        if len(packs) * length > (1 - _LEAST_SPARED) * ids.numel():
            return None
        where = torch.zeros((len(packs), length, 2), dtype=torch.int64)
        real = torch.zeros((len(packs), length), dtype=torch.bool)
        pack_of = torch.zeros(len(ids), dtype=torch.int64)
        owner = torch.tensor(tree_of)
        for pack, content in enumerate(packs):
            start = 0
            where[pack] = torch.tensor(trees[content[0]][0])
            for tree in content:
                end = start + len(trees[tree])
                where[pack, start:end] = torch.tensor(trees[tree])
                real[pack, start:end] = True
                rows = owner == tree
                pack_of[rows] = pack
                path[rows] += start * (path[rows] >= 0)
                start = end
        here = batch["input_ids"].device
        return cls(*(part.to(here) for part in (where[..., 0], where[..., 1], real, pack_of, path)))

    def tokens(self, values: Tensor, row_axis: int | None, token_axis: int) -> Tensor:
        """The packs' tokens of a tensor that has all rows' tokens; the axis of the rows becomes that of the packs.

        Args:
            values: what has an axis of tokens and, right before it, one of rows, or of length 1 for all rows.
            row_axis: the axis of the rows; None if it has length 1.
            token_axis: the axis of the tokens.
        """
        if row_axis is None:
            values = values.expand(*values.shape[: token_axis - 1], len(self.pack_of), *values.shape[token_axis:])
        shape = (*values.shape[: token_axis - 1], *self.row.shape, *values.shape[token_axis + 1 :])
        flat = values.flatten(token_axis - 1, token_axis)
        index = (self.row * values.shape[token_axis] + self.place).flatten().to(values.device)
        return flat.index_select(token_axis - 1, index).view(shape)

    def agrees(self, values: Tensor, row_axis: int | None, token_axis: int) -> bool:
        """Whether a tensor's tokens that are to be shared are the same in all rows that share them."""
        if row_axis is None:
            return True
        packed = self.tokens(values, row_axis, token_axis)
        rows, places = (self.path >= 0).nonzero(as_tuple=True)
        length, (packs, at) = values.shape[token_axis], (self.pack_of[rows], self.path[rows, places])
        own = values.flatten(token_axis - 1, token_axis).index_select(token_axis - 1, rows * length + places)
        shared = packed.flatten(token_axis - 1, token_axis)
        return torch.equal(own, shared.index_select(token_axis - 1, packs * self.row.shape[1] + at))

    def mask(self, mask: Tensor | None, like: torch.dtype) -> Tensor | None:
        """The attention mask of the packs, ``[pack, head, token, token]``; None if the rows' own is not causal.

        Args:
            mask: that of the rows, ``[row, head, token, token]``, of booleans (seen) or numbers (added); None where
                each token sees all before it.
            like: dtype of the mask if there is none.
        """
        row, place = self.row[:, :, None], self.place
        theirs = self.path[row, place[:, None, :]]  # where the key's position is in the query's row
        seen = (theirs == torch.arange(place.shape[1], device=place.device)) & self.real[:, None, :]
        if mask is None:
            seen &= place[:, :, None] >= place[:, None, :]
            values = None
        else:
            rows = mask.expand(len(self.pack_of), *mask.shape[1:])
            if not self._is_causal(rows):
                return None
            values = rows[row, :, place[:, :, None], place[:, None, :]].permute(0, 3, 1, 2)
        # What fills up a pack sees its own first token, so that no softmax is over nothing.
        seen[:, :, 0] |= ~self.real
        seen = seen[:, None]
        if like == torch.bool:
            return seen if values is None else values & seen | (seen & ~self.real[:, None, :, None])
        least = torch.finfo(like).min
        if values is None:
            return torch.where(seen, torch.zeros((), dtype=like, device=seen.device), least)
        return torch.where(seen, torch.where(self.real[:, None, :, None], values, 0), least)

    def _is_causal(self, rows: Tensor) -> bool:
        """Whether no token that is packed sees a later one."""
        seen = rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2
        length = seen.shape[-1]
        later = torch.ones((length, length), dtype=torch.bool, device=seen.device).triu(1)
        kept = (self.path >= 0)[:, None, :, None]
        return not (seen & later & kept).any()

    def index(self, positions: Sequence[Sequence[int]]) -> list[list[int]]:
        """For each pack the places of the wanted positions of its rows; a pack has at least one row."""
        found: list[list[int]] = [[] for _ in range(len(self.row))]
        for row, wanted in enumerate(positions):
            found[int(self.pack_of[row])] += self.path[row, list(wanted)].tolist()
        return [sorted(set(places)) for places in found]
