"""What a selector gives: a `NeuronSet` for each group."""

import functools
import operator
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from vlmneurons.checks import JSON
from vlmneurons.errors import FileFormatError, GroupError, MismatchError, SelectionError
from vlmneurons.files import tables as _files
from vlmneurons.neurons.formats import from_lape, to_lape
from vlmneurons.neurons.sets import (
    Immutable,
    NeuronSet,
    check_same_space,
    expected_jaccard,
    read_file,
    set_of_file,
)
from vlmneurons.neurons.sites import NeuronSpace

if TYPE_CHECKING:
    import pandas


class Selection(Immutable, _files.Shareable, Mapping[str, NeuronSet]):
    """What a selector chose: a `NeuronSet` for each group, over one space. Immutable, in the order of the groups.

    Selections combine group by group with ``& | - ^``.

    Attributes:
        selector: says exactly how the sets were chosen, such as ``"CAS(fraction=0.005)"``.
        budget: number of neurons that each group was to get, or None if the rule has no such number. A set is never
            larger than the budget; it is smaller where fewer neurons were eligible.

    Examples:
        >>> space = NeuronSpace.from_widths("language", "gate", [8, 8])
        >>> Selection({"EGY": NeuronSet(space, [3, 9]), "SGP": NeuronSet(space, [4])}, selector="by hand", budget=2)
        Selection by hand: 2 groups, NeuronSpace(language.gate: 2 layers x 8 = 16 neurons)
          EGY  2 neurons
          SGP  1 neuron (of 2 asked for: no more were eligible)
    """

    __slots__ = ("_budget", "_provenance", "_selector", "_sets")

    def __init__(
        self,
        sets: Mapping[str, NeuronSet],
        *,
        selector: str = "",
        budget: SupportsIndex | None = None,
        provenance: Mapping[str, object] | None = None,
    ) -> None:
        """A selection from its sets.

        Args:
            sets: the neurons of each group.
            selector: what made it, such as ``"CAS(fraction=0.005)"``.
            budget: the largest number of neurons a set may have; None if nothing limits it.
            provenance: where it comes from: plain values that JSON can hold.

        Raises:
            SelectionError: no group, a group twice or whose name is no text, or a set larger than the budget.
            MismatchError: the sets are not all of one space.
        """
        try:
            pairs = list(sets.items() if isinstance(sets, Mapping) else sets)
            sets = dict(pairs)
            if len(sets) < len(pairs):
                raise ValueError("a group stands in it twice")
            budget = None if budget is None else operator.index(budget)
        except (TypeError, ValueError) as error:
            raise SelectionError(f"a selection is a NeuronSet for each group, and a whole budget: {error}") from error
        if budget is not None and budget < 0:
            raise SelectionError(f"a budget is a number of neurons; got {budget}")
        if not sets:
            raise SelectionError("a selection needs at least one group; none was given")
        first = next(iter(sets.values()))
        for group, neurons in sets.items():
            if not isinstance(group, str) or not group:
                raise SelectionError(f"a group's name is a text that is not empty; got {group!r}")
            if not isinstance(neurons, NeuronSet):
                raise SelectionError(f"group {group!r} must have a NeuronSet; got {type(neurons).__name__}")
            check_same_space(first.space, neurons.space)
            if budget is not None and len(neurons) > budget:
                raise SelectionError(f"group {group!r} has {len(neurons)} neurons, more than the budget of {budget}")
        object.__setattr__(self, "_sets", sets)
        object.__setattr__(self, "_selector", str(selector))
        object.__setattr__(self, "_budget", budget)
        object.__setattr__(self, "_provenance", _files.plain(dict(provenance or {}), "provenance"))

    def __reduce__(self) -> tuple[object, ...]:
        options = {"selector": self._selector, "budget": self._budget, "provenance": self._provenance}
        return functools.partial(Selection, **options), (self._sets,)

    @property
    def selector(self) -> str:
        """How the sets were chosen."""
        return self._selector

    @property
    def budget(self) -> int | None:
        """Number of neurons that each group was to get, if the rule has such a number."""
        return self._budget

    @property
    def provenance(self) -> JSON:
        """Where the selection comes from, as plain values; a copy."""
        return _files.plain(self._provenance, "provenance")

    @property
    def space(self) -> NeuronSpace:
        """The space that numbers the neurons of all groups."""
        return next(iter(self._sets.values())).space

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups, in order."""
        return tuple(self._sets)

    def __getitem__(self, group: str) -> NeuronSet:
        try:
            return self._sets[group]
        except (KeyError, TypeError):
            raise GroupError(f"group {group!r} is not in this selection; it has {', '.join(self._sets)}") from None

    def __contains__(self, group: object) -> bool:
        return isinstance(group, str) and group in self._sets

    def __iter__(self) -> Iterator[str]:
        return iter(self._sets)

    def __len__(self) -> int:
        return len(self._sets)

    def _combine(
        self, other: "Selection", symbol: str, combine: Callable[[NeuronSet, NeuronSet], NeuronSet]
    ) -> "Selection":
        if not isinstance(other, Selection):
            return NotImplemented
        if set(self._sets) != set(other._sets):
            alone = [group for group in (*self, *other) if (group in self) != (group in other)]
            raise MismatchError(
                f"selections of different groups cannot be combined: {', '.join(alone)} "
                f"{'is' if len(alone) == 1 else 'are'} only in one of them"
            )
        sets = {group: combine(neurons, other[group]) for group, neurons in self._sets.items()}
        provenance = {"combined": [self._provenance, other._provenance]}
        if self._provenance == other._provenance:
            provenance = self._provenance
        selector = f"{in_parentheses(self._selector)} {symbol} {in_parentheses(other._selector)}"
        return Selection(sets, selector=selector, provenance=provenance)

    def __and__(self, other: "Selection") -> "Selection":
        return self._combine(other, "&", operator.and_)

    def __or__(self, other: "Selection") -> "Selection":
        return self._combine(other, "|", operator.or_)

    def __sub__(self, other: "Selection") -> "Selection":
        return self._combine(other, "-", operator.sub)

    def __xor__(self, other: "Selection") -> "Selection":
        return self._combine(other, "^", operator.xor)

    def at(self, kind: str) -> "Selection":
        """The same neurons, read at another point of their MLPs.

        Args:
            kind: ``"pre"``, ``"gate"``, ``"up"`` or ``"post"``.
        """
        return self._with({group: neurons.at(kind) for group, neurons in self._sets.items()})

    def on(self, space: NeuronSpace) -> "Selection":
        """The neurons of the same layers and numbers in another model, for every group; see `NeuronSet.on`.

        The provenance says under ``carried_from`` which numbering they were chosen in.

        Args:
            space: the space of a model of the same layers and widths.

        Raises:
            MismatchError: the space is of other towers, layers, widths or kinds of site.
        """
        sets = {group: neurons.on(space) for group, neurons in self._sets.items()}
        return self._with(sets, carried_from=self.space.fingerprint)

    def _with(self, sets: Mapping[str, NeuronSet], **provenance: str) -> "Selection":
        provenance = {**self._provenance, **provenance}
        return Selection(sets, selector=self._selector, budget=self._budget, provenance=provenance)

    def table(self) -> "pandas.DataFrame":
        """Number of neurons per group (rows) and layer (columns), zeros included.

        Columns are layer numbers, or (tower, layer) if the space has several towers.
        """
        import pandas as pd

        towers = self.space.towers
        rows = []
        for neurons in self._sets.values():
            counts = {(tower, layer): n for tower in towers for layer, n in neurons.per_layer(tower).items()}
            rows.append(counts if len(towers) > 1 else {layer: n for (_, layer), n in counts.items()})
        table = pd.DataFrame(rows, index=pd.Index(self.groups, name="group"))
        if len(towers) > 1:
            table.columns = pd.MultiIndex.from_tuples(list(table.columns), names=["tower", "layer"])
        else:
            table.columns.name = "layer"
        return table

    def overlap(self) -> "pandas.DataFrame":
        """How much the groups' sets overlap: ``["jaccard"]`` and ``["chance"]`` are tables of group x group.

        ``chance`` is the mean Jaccard index of random sets of the same sizes (see `expected_jaccard`).
        """
        import pandas as pd

        level = functools.cache(lambda first, second: expected_jaccard(first, second, len(self.space)))
        sizes = list(map(len, self._sets.values()))
        chance = [[level(min(first, second), max(first, second)) for second in sizes] for first in sizes]
        index = pd.Index(self.groups, name="group")
        tables = [
            pd.DataFrame(values, index=index, columns=list(self.groups)) for values in (jaccards(self, self), chance)
        ]
        return pd.concat(tables, axis=1, keys=["jaccard", "chance"], names=["measure", "other"])

    def to_lape(self, path: "str | os.PathLike[str] | None" = None) -> list[list[Tensor]]:
        """The format of the LAPE authors' released files: ``result[group][layer]`` is a LongTensor of neuron numbers.

        Args:
            path: where to write it with ``torch.save``, if given. The format has no room for the groups' names, the
                space or the selector: use `save` to keep them.

        Raises:
            SiteError: a layer of the space has several sites (towers, experts), which the format cannot tell apart.
        """
        return to_lape(self._sets, path)

    @classmethod
    def from_lape(cls, nested: object, space: NeuronSpace, groups: Sequence[str]) -> "Selection":
        """A selection in the format of the LAPE authors' released files.

        Args:
            nested: the nested list, or the path of a file that holds one. A file is read with
                ``torch.load(..., weights_only=True)``, which does not run code that a file may carry.
            space: the space that the layers and neurons belong to; the format does not say.
            groups: the groups' names, in the order of the list; the format does not say.

        Raises:
            FileFormatError: not of that form, or not of this space or number of groups.
            SiteError: a layer of the space has several sites (towers, experts).
        """
        sets, source = from_lape(nested, space, groups)
        return cls(sets, selector=f"from_lape({source})")

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Write the selection, with its space, selector and provenance, to a safetensors file.

        Args:
            path: the file, such as ``"neurons.safetensors"``.

        Raises:
            OSError: the file cannot be written; what was there before stays.
        """
        tensors = {
            "indices": torch.cat([neurons._indices for neurons in self._sets.values()]),
            "sizes": torch.tensor([len(neurons) for neurons in self._sets.values()], dtype=torch.int64),
        }
        data = {
            "space": self.space.to_json(),
            "groups": list(self._sets),
            "selector": self._selector,
            "budget": self._budget,
            "provenance": self._provenance,
        }
        _files.write(path, "Selection", tensors, data)

    @classmethod
    def load(cls, path: "str | os.PathLike[str]") -> "Selection":
        """The selection that `save` wrote.

        Args:
            path: the file.

        Raises:
            FileFormatError: the file is damaged, of another kind, or from a newer version.
        """
        tensors, data, space = read_file(path, "Selection", ["indices", "sizes"])
        groups, budget = data.get("groups"), data.get("budget")
        sizes, indices = tensors["sizes"], tensors["indices"]
        if (
            not isinstance(groups, list)
            or not all(isinstance(group, str) for group in groups)
            or len(set(groups)) != len(groups)
            or not isinstance(data.get("selector"), str)
            or not isinstance(data.get("provenance"), dict)
            or not (budget is None or (isinstance(budget, int) and not isinstance(budget, bool)))
        ):
            raise FileFormatError(f"{path}: the groups, selector, budget or provenance are not what a Selection has")
        if sizes.ndim != 1 or sizes.shape[0] != len(groups) or (sizes < 0).any() or int(sizes.sum()) != indices.numel():
            raise FileFormatError(f"{path}: the sizes of the sets do not agree with the indices")
        parts = indices.flatten().split(sizes.tolist())
        sets = {group: set_of_file(path, space, part) for group, part in zip(groups, parts, strict=True)}
        try:
            return cls(sets, selector=data["selector"], budget=budget, provenance=data["provenance"])
        except (SelectionError, MismatchError) as error:
            raise FileFormatError(f"{path}: {error}") from error

    def __repr__(self) -> str:
        title = f"Selection {self._selector}: " if self._selector else "Selection: "
        groups = f"{len(self)} group" + ("s" if len(self) != 1 else "")
        width = max(map(len, self._sets))
        lines = [f"{title}{groups}, {self.space!r}"]
        for group, neurons in self._sets.items():
            line = f"  {group:<{width}}  {len(neurons):,} neuron" + ("s" if len(neurons) != 1 else "")
            if self._budget is not None and len(neurons) < self._budget:
                line += f" (of {self._budget:,} asked for: no more were eligible)"
            lines.append(line)
        return "\n".join(lines)


def jaccards(first: Selection, second: Selection) -> Float64[np.ndarray, "group other"]:
    """The Jaccard index of each of one selection's sets with each of another's over the same space."""
    from scipy.sparse import csr_array

    def incidence(selection: Selection) -> csr_array:  # sparse, as sets are small and spaces not
        places = np.concatenate([neurons._indices.numpy() for neurons in selection.values()])
        ends = np.cumsum([0, *map(len, selection.values())])
        return csr_array((np.ones(len(places)), places, ends), shape=(len(selection), len(selection.space)))

    shared = (incidence(first) @ incidence(second).T).toarray()
    sizes = ([len(neurons) for neurons in selection.values()] for selection in (first, second))
    union = np.add.outer(*sizes) - shared
    return np.divide(shared, union, out=np.ones(union.shape), where=union > 0)


def in_parentheses(expression: str) -> str:
    """A selector's expression, in parentheses if it is made of several."""
    signs = (" & ", " | ", " - ", " ^ ")
    several = any(expression[place : place + 3] in signs for place in outer_places(expression))
    return f"({expression})" if several else expression


def outer_places(expression: str) -> Iterator[int]:
    """The places of a selector's expression outside all brackets; that of a closing bracket counts as outside."""
    depth = 0
    # ``LAP() > 0.1`` compares, where ``<5 neurons>`` is in brackets.
    for place, character in enumerate(re.sub(" [<>]=? ", lambda sign: "." * len(sign[0]), expression)):
        depth += character in "([{<"
        depth -= character in ")]}>"
        if depth == 0:
            yield place
