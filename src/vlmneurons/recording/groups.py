"""Adding counts up by group, where they were counted, until they are asked for."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vlmneurons.recording.counter import Counter
from vlmneurons.statistics.counts import ActivationStatistics


class GroupTables:
    """The integer tables of some groups, which a counter's forwards are added to.

    A forward that was added in part only, because an interrupt came, leaves them unusable: see ``whole``.

    Args:
        counter: what counts.

    Attributes:
        names: the groups so far, in the order in which they came.
        whole: whether every forward was added completely or not at all.
    """

    def __init__(self, counter: Counter) -> None:
        self.counter = counter
        self.names: list[str] = []
        self.whole = True
        space = counter.space
        self._tables = {"fired": [torch.zeros((0, width), dtype=torch.int64) for width in space.widths]}
        if counter.magnitudes:
            self._tables["total"] = [torch.zeros((0, width), dtype=torch.float64) for width in space.widths]
        self._tokens = torch.zeros((0,), dtype=torch.int64)
        self._items = torch.zeros((0,), dtype=torch.int64)
        self._reached = torch.zeros((0, len(space.sites)), dtype=torch.int64)

    # What adds up must not be made in inference mode, or no run outside of it could be added.
    @torch.inference_mode(False)
    def _make_room(self, groups: Sequence[str]) -> None:
        """Rows of zeros for groups that are new; either for all of them and in every table, or for none."""
        new = list(dict.fromkeys(group for group in groups if group not in self.names))
        if not new:
            return

        def longer(table: Tensor, device: torch.device) -> Tensor:
            rows = torch.zeros((len(new), *table.shape[1:]), dtype=table.dtype, device=device)
            return torch.cat([table.to(device), rows])

        tables: dict[str, list[Tensor]] = {}
        for name, parts in self._tables.items():
            counted = [state.counts.get(name) for state in self.counter.sites]
            tables[name] = [
                longer(part, part.device if table is None else table.device)
                for part, table in zip(parts, counted, strict=True)
            ]
        host = torch.device("cpu")
        small = [longer(table, host) for table in (self._tokens, self._items, self._reached)]
        # From here on nothing is computed, so that an interrupt finds all tables with the new rows, or none.
        self._tables, (self._tokens, self._items, self._reached) = tables, small
        self.names.extend(new)

    @torch.inference_mode(False)
    def add(self, groups: Sequence[str | None], *, count_items: bool = True) -> None:
        """Add the rows of the counter's forward to their groups; None leaves a row out.

        Args:
            groups: the group of each row that stands for a question.
            count_items: whether the rows are items that were not counted before.
        """
        counter, frame = self.counter, self.counter.frame
        assert frame is not None
        counter.check_whole()
        self._make_room([group for group in groups if group is not None])
        counted_places = [place for place, group in enumerate(groups) if group is not None]
        if not counted_places:
            return
        row = torch.tensor(frame.rows)[counted_places]
        group = torch.tensor([self.names.index(name) for name in groups if name is not None])
        self.whole = False
        # What sites share is brought to the host, or to their device, once: all sites of a device have the same counted
        # tokens, but for experts, which have their own.
        on_host: dict[int, Tensor] = {}
        on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}
        for number, state in enumerate(counter.sites):
            tokens = state.counts.get("tokens")
            if tokens is None:
                continue  # an expert that no token was routed to, or text-only input to a vision tower
            for name, parts in self._tables.items():
                counted = state.counts[name]
                assert counted is not None
                device = counted.device
                if device not in on_device:
                    on_device[device] = row.to(device), group.to(device)
                rows, groups_of_rows = on_device[device]
                parts[number] = parts[number].to(device)
                parts[number].index_add_(0, groups_of_rows, counted[rows])
            if id(tokens) not in on_host:
                on_host[id(tokens)] = tokens.cpu()[row]
            self._reached[:, number].index_add_(0, group, on_host[id(tokens)])
        if count_items:
            self._items.index_add_(0, group, torch.ones_like(group))
        if all(state.of_media for state in counter.sites):
            self._tokens = self._reached.amax(1)
        else:
            self._tokens.index_add_(0, group, frame.mask.sum(1).cpu()[row])
        self.whole = True

    def statistics(self, provenance: Mapping[str, object], groups: Sequence[str] | None = None) -> ActivationStatistics:
        """What was added, of some groups in this order; one that nothing was added to has zeros."""
        self._make_room(groups or ())
        names = list(groups or self.names)
        order = [self.names.index(group) for group in names]
        tables = {name: torch.cat([part.cpu() for part in parts], 1)[order] for name, parts in self._tables.items()}
        everywhere = bool((self._reached == self._tokens[:, None]).all())
        return ActivationStatistics(
            space=self.counter.space,
            groups=tuple(names),
            positive=tables["fired"],
            tokens=self._tokens[order],
            items=self._items[order],
            routed=None if everywhere else self._reached[order],
            total=tables.get("total"),
            provenance=dict(provenance),
        )
