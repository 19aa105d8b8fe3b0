"""Computing a beginning that rows of a batch share only once: the prompt of options, a picture of several questions.

In a causal decoder a token's hidden states depend on the tokens before it and on nothing else. So rows that begin with
the same tokens (and the same pictures) have the same hidden states there. A `Packing` lays such rows out as a tree:
each shared token is there once, the other tokens of every row follow, and an attention mask lets each token see exactly
those that it sees in its row, at the positions that they have there. Padding is left out, and so are tokens after the
last one whose logits are wanted. Small trees are put beside each other in one pack where a large one leaves room.

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
        forest = _Forest.of(batch, positions)
        if forest is None:
            return None
        trees, tree_of, path = forest.trees, torch.tensor(forest.tree_of), forest.path
        length = max(map(len, trees))
        packs = _packs([len(tree) for tree in trees], 0 if apart else length)
        if len(packs) * length > (1 - _LEAST_SPARED) * path.numel():
            return None
        origin = torch.zeros((len(packs), length, 2), dtype=torch.int64)
        real = torch.zeros((len(packs), length), dtype=torch.bool)
        pack_of = torch.zeros(len(path), dtype=torch.int64)
        for pack, numbers in enumerate(packs):
            tokens = [token for number in numbers for token in trees[number]]
            origin[pack] = torch.tensor(tokens + [tokens[0]] * (length - len(tokens)))
            real[pack, : len(tokens)] = True
            start = 0
            for number in numbers:
                rows = tree_of == number
                pack_of[rows] = pack
                path[rows] += start * (path[rows] >= 0)
                start += len(trees[number])
        device = batch["input_ids"].device
        return cls(*(part.to(device) for part in (origin[..., 0], origin[..., 1], real, pack_of, path)))

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
        axis, index = token_axis - 1, rows * values.shape[token_axis] + places
        packed_index = self.pack_of[rows] * self.row.shape[1] + self.path[rows, places]
        of_rows, of_packs = values.flatten(axis, token_axis), packed.flatten(axis, token_axis)
        return torch.equal(of_rows.index_select(axis, index), of_packs.index_select(axis, packed_index))

    def mask(self, mask: Tensor | None, like: torch.dtype) -> Tensor | None:
        """The attention mask of the packs, ``[pack, head, token, token]``; None if the rows' own is not causal.

        Args:
            mask: that of the rows, ``[row, head, token, token]``, of booleans (seen) or numbers (added); None where
                each token sees all before it.
            like: dtype of the mask if there is none.
        """
        row, place = self.row[:, :, None], self.place
        # A token sees another one of its pack if that is where a token of its own row is, and no later one.
        place_in_pack = self.path[row, place[:, None, :]]  # [pack, query, key]: of what has the key's place in the row
        visible = (place_in_pack == torch.arange(place.shape[1], device=place.device)) & self.real[:, None, :]
        if mask is None:
            visible &= place[:, :, None] >= place[:, None, :]
            values = None
        else:
            rows = mask.expand(len(self.pack_of), *mask.shape[1:])
            if not self._is_causal(rows):
                return None
            values = rows[row, :, place[:, :, None], place[:, None, :]].permute(0, 3, 1, 2)
        # What fills up a pack sees the pack's first token, so that no softmax is over nothing.
        visible[:, :, 0] |= ~self.real
        visible = visible[:, None]
        if like == torch.bool:
            return visible if values is None else values & visible | (visible & ~self.real[:, None, :, None])
        least = torch.finfo(like).min
        if values is None:
            return torch.where(visible, torch.zeros((), dtype=like, device=visible.device), least)
        return torch.where(visible, torch.where(self.real[:, None, :, None], values, 0), least)

    def _is_causal(self, rows: Tensor) -> bool:
        """Whether no token that is packed sees a later one."""
        visible = rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2
        later = torch.ones(visible.shape[-2:], dtype=torch.bool, device=visible.device).triu(1)
        packed = (self.path >= 0)[:, None, :, None]
        return not (visible & later & packed).any()

    def index(self, positions: Sequence[Sequence[int]]) -> list[list[int]]:
        """For each pack the places of the wanted positions of its rows; a pack has at least one row."""
        of_packs: list[set[int]] = [set() for _ in range(len(self.row))]
        for row, wanted in enumerate(positions):
            of_packs[int(self.pack_of[row])].update(self.path[row, list(wanted)].tolist())
        return [sorted(places) for places in of_packs]


@dataclass(frozen=True)
class _Forest:
    """The rows of a batch as trees: rows that begin alike are one tree, in which each shared token is there once.

    Attributes:
        trees: for each tree where its tokens are in the batch: row and position.
        tree_of: for each row its tree.
        path: for each token of the batch its place in the tree; -1 if it is left out.
    """

    trees: list[list[tuple[int, int]]]
    tree_of: list[int]
    path: Int64[Tensor, "row position"]

    @classmethod
    def of(cls, batch: Batch, positions: Sequence[Sequence[int]]) -> "_Forest | None":
        """The trees of a batch; None where padding is wanted. See `Packing.of`."""
        ids, attention, media = (part.cpu() for part in (batch.tokens.ids, batch.tokens.attention, batch.tokens.media))
        pictures: Sequence[Hashable] = range(len(ids)) if batch.pictures is None else batch.pictures
        path = torch.full(ids.shape, -1, dtype=torch.int64)
        trees: list[list[tuple[int, int]]] = []
        tree_of: list[int] = []
        for row, wanted in enumerate(positions):
            end = max(wanted) + 1  # in a causal decoder nothing before depends on what comes after
            if not attention[row, list(wanted)].all():
                return None
            # The row joins the tree of that earlier row with which it has the longest beginning in common.
            partner, n_shared = -1, 0
            for earlier in range(row):
                alike = (ids[row, :end] == ids[earlier, :end]) & (attention[row, :end] == attention[earlier, :end])
                alike &= (path[earlier, :end] >= 0) | ~attention[row, :end]  # what was left out cannot be shared
                if pictures[row] != pictures[earlier]:
                    alike &= ~media[row, :end]
                n_alike = int(alike.long().cumprod(0).sum())
                if n_alike > n_shared and n_alike >= _LEAST_SHARED * min(end, max(positions[earlier]) + 1):
                    partner, n_shared = earlier, n_alike
            if partner < 0:
                trees.append([])
            else:
                path[row, :n_shared] = path[partner, :n_shared]
            tree_of.append(len(trees) - 1 if partner < 0 else tree_of[partner])
            tree = trees[tree_of[row]]
            branch = [place for place in range(n_shared, end) if attention[row, place]]
            path[row, branch] = torch.arange(len(tree), len(tree) + len(branch))
            tree += [(row, place) for place in branch]
        return cls(trees, tree_of, path)


def _packs(sizes: Sequence[int], length: int) -> list[list[int]]:
    """The numbers of the trees in each pack: the largest come first, and each goes where there is room for it.

    Args:
        sizes: for each tree how many tokens it has.
        length: how many tokens a pack of several trees may have; 0 puts each tree in a pack of its own.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        pack = next((pack for pack, left in enumerate(room) if left >= sizes[number]), len(packs))
        if pack == len(packs):
            packs.append([])
            room.append(length)
        packs[pack].append(number)
        room[pack] -= sizes[number]
    return packs
