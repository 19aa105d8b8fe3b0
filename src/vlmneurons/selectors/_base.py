"""`Selector`, what all rules share: they give scores ``[group, neuron]``, and it makes one set of neurons per group."""

import copy
import inspect
import itertools
import math
import numbers
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, SupportsIndex, TypeGuard, get_args, get_origin

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from typing_extensions import TypedDict, TypeVar

from vlmneurons.checks import JSON, as_flag, as_plain, as_whole, is_share
from vlmneurons.errors import MismatchError, SelectionError
from vlmneurons.neurons.selection import Selection
from vlmneurons.neurons.sets import NeuronSet, check_same_space
from vlmneurons.neurons.sites import NeuronSpace
from vlmneurons.selectors._evidence import Readable, table_read
from vlmneurons.statistics.counts import ActivationStatistics
from vlmneurons.statistics.evidence import Evidence

if TYPE_CHECKING:
    from vlmneurons.selectors._scores import Gate

FRACTION = 0.005
"""Share of neurons that a selector gives to each group unless told otherwise (arXiv 2608.08772, 2608.17102)."""

Table = TypeVar("Table", bound=Evidence, default=Any)
"""The kind of table that a rule reads. For a type checker, `Selector` by itself is a rule that reads any."""


class Shared(TypedDict, total=False):
    """The settings of every selector beside ``fraction``; see `Selector`, which explains them."""

    count: SupportsIndex | None
    layers: Iterable[SupportsIndex] | SupportsIndex | None
    exclude: NeuronSet | Selection | None
    per_layer: bool


SHARED = ("fraction", "count", "layers", "exclude", "per_layer")
"""The settings of every selector."""


class Selector(ABC, Generic[Table]):
    """A rule that chooses the neurons particular to each group. A new one needs only `score`.

    All neurons of the space are ranked together, unless ``per_layer``, and every group gets the same number of them:
    the budget, ``floor(fraction * n)``, where ``n`` is the number of neurons in the given layers (of the whole space if
    ``layers`` is None; excluded neurons count in ``n`` too). Equal scores are ranked by flat index, lower first. A
    group gets fewer than the budget only if fewer neurons are eligible.

    Selectors combine in two ways. ``&``, ``|`` and ``-`` between two selectors combine the *sets* that they choose.
    Everything else is arithmetic on their *scores*, and makes a selector that ranks by the result:
    ``CAS().zscore() * 0.7 + MAD().zscore() * 0.3``; ``-LAP()`` (lowest first); ``abs(MAD(signed=True))``;
    ``CAS(0.005).where(LAP() > 0.1)`` (only among the neurons for which the condition holds).

    Attributes:
        fraction: share of the neurons that each group gets, in (0, 1]; None if ``count`` is given.
        count: number of neurons that each group gets; None if ``fraction`` is given.
        layers: layer numbers to choose from; None for all.
        exclude: neurons never to choose: one set for all groups, or a set for each group.
        per_layer: whether ``fraction`` or ``count`` is of each layer's neurons, ranked layer by layer, instead of one
            ranking over all. Layers of different towers are different layers.
        contrastive: class attribute; whether the rule compares groups and so needs at least two.
        reads: class attribute; the kind of table that `score` gets: `ActivationStatistics`, unless the rule needs
            single questions (`GroupedItems`), gradients (`AttributionStatistics`) or several conditions (`Conditions`).
            ``class Rule(Selector[GroupedItems])`` sets it.

    Examples:
        >>> class Rare(Selector):
        ...     def score(self, stats):
        ...         return -stats.probability
        >>> space = NeuronSpace.from_widths("language", "gate", [2, 2])
        >>> stats = ActivationStatistics.from_counts(space, ["EGY"], [[4, 1, 2, 3]], [4])
        >>> Rare(0.5).select(stats)
        Selection Rare(fraction=0.5): 1 group, NeuronSpace(language.gate: 2 layers x 2 = 4 neurons)
          EGY  2 neurons
        >>> Rare(0.5).select(stats)["EGY"].indices
        tensor([1, 2])
    """

    # Class attributes, so that a subclass whose __init__ does not call this one still has every setting.
    fraction: float | None = FRACTION
    count: int | None = None
    layers: Iterable[int] | None = None
    exclude: NeuronSet | Selection | None = None
    per_layer: bool = False
    contrastive: bool = False
    reads: ClassVar[type[Evidence]] = ActivationStatistics
    _always_shown: ClassVar[tuple[str, ...]] = ()
    """Settings that the repr shows also where they are the default."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        for base in vars(cls).get("__orig_bases__", ()):
            origin, kinds = get_origin(base), get_args(base)
            if isinstance(origin, type) and issubclass(origin, Selector):
                cls.reads = next((kind for kind in kinds if isinstance(kind, type)), cls.reads)

    def __init__(
        self,
        fraction: float | int | None = None,
        *,
        count: SupportsIndex | None = None,
        layers: Iterable[SupportsIndex] | SupportsIndex | None = None,
        exclude: NeuronSet | Selection | None = None,
        per_layer: bool = False,
    ) -> None:
        """Settings that all selectors share; see the class.

        Raises:
            SelectionError: fraction outside (0, 1], count below 1, both given, or exclude of another type.
        """
        # Only what is given is set, so that a subclass can set defaults of its own as class attributes.
        for name, value in _shared_settings(
            type(self).__name__, fraction, count, layers, exclude, per_layer or None
        ).items():
            setattr(self, name, value)
        self._check_settings()

    @abstractmethod
    def score(self, stats: Table) -> Float[Tensor, "group neuron"]:
        """For each group and neuron how much the neuron is the group's: higher is chosen first.

        ``-inf`` is never chosen; NaN and ``inf`` are errors. The statistics must not be written to.

        Args:
            stats: the one table that the rule reads (`reads`).
        """

    def eligible(self, stats: Table, scores: Float[Tensor, "group neuron"]) -> Bool[Tensor, "group neuron"] | None:
        """Which neurons may be chosen at all, or None if every score above ``-inf`` may.

        A rule overrides this if a finite score can still mean "not this group's". Neurons with a score of ``-inf``
        are never chosen, whatever this says.

        Args:
            stats: the one table that the rule reads (`reads`).
            scores: what `score` gave.
        """
        return None

    def select(self, *evidence: Readable) -> Selection:
        """The neurons of each group.

        Args:
            evidence: what to select from: usually `ActivationStatistics` alone. `ItemStatistics` (or `GroupedItems`)
                stand for their statistics too. Of several tables, each rule of a combination takes the one that it
                reads: ``(CAS(0.01) & Attribution(0.01)).select(statistics, attributions)``.

        Raises:
            SelectionError: a group without counted tokens, too few groups, a fraction that yields no neuron, scores
                that are NaN, infinite or of a wrong shape, or not the one table that the rule reads.
            SiteError: a layer that the space does not have.
            MismatchError: excluded neurons of another space or without one of the groups.
        """
        stats = self._checked_table(evidence)
        parts = self._ranked_parts(stats.space)
        excluded = self._excluded_masks(stats)
        scores, eligible = self._evaluate(stats)
        sets = {}
        for row, group in enumerate(stats.groups):
            allowed = scores[row] > -math.inf
            if eligible is not None:
                allowed &= eligible[row]
            if group in excluded:
                allowed &= ~excluded[group]
            chosen = [
                highest(scores[row], quota, allowed)
                if part is None
                else part[highest(scores[row, part], quota, allowed[part])]
                for part, quota in parts
            ]
            indices = chosen[0] if len(chosen) == 1 else torch.cat(chosen).sort().values
            sets[group] = NeuronSet._of(stats.space, indices)
        budget = sum(quota for _, quota in parts)
        return Selection(sets, selector=repr(self), budget=budget, provenance=provenance_of(stats))

    def read(self, *evidence: Readable) -> Table:
        """The one table, among those that `select` gets, that this rule reads.

        Args:
            evidence: see `select`.

        Raises:
            SelectionError: there is none, or there are several.
        """
        return table_read(type(self).__name__, self.reads, evidence)

    def _checked_table(self, evidence: tuple[Readable, ...]) -> Table:
        """The table to select from, once settings and table have been checked."""
        self._check_settings()
        stats = self.read(*evidence)
        self.check_statistics(stats)
        return stats

    def take(
        self,
        fraction: float | int | None = None,
        *,
        count: SupportsIndex | None = None,
        layers: Iterable[SupportsIndex] | SupportsIndex | None = None,
        exclude: NeuronSet | Selection | None = None,
        per_layer: bool | None = None,
    ) -> "Selector":
        """The same rule with another budget, layers or exclusions; what is not given stays as it is.

        Args:
            fraction: share of the neurons that each group gets, in (0, 1].
            count: number of neurons per group, instead of a fraction.
            layers: numbers of the layers to choose from.
            exclude: neurons never to choose.
            per_layer: whether the budget is of each layer's neurons, layer by layer.

        Raises:
            SelectionError: a setting that is not allowed.

        Examples:
            >>> class Rare(Selector):
            ...     def score(self, stats):
            ...         return -stats.probability
            >>> Rare(0.5).take(count=3, per_layer=True)
            Rare(count=3, per_layer=True)
        """
        return self._with_settings(_shared_settings(type(self).__name__, fraction, count, layers, exclude, per_layer))

    def _with_settings(self, settings: Mapping[str, object]) -> "Selector":
        """A copy with other settings."""
        changed = copy.copy(self)
        for name, value in settings.items():
            object.__setattr__(changed, name, value)  # also where a subclass is a frozen dataclass
        changed._check_settings()
        return changed

    def _explicit_settings(self, *names: str) -> list[str]:
        """Names of the shared settings that were set on this selector itself, and are not left at their default."""
        return [name for name in names or SHARED if vars(self).get(name) is not None]

    def check_statistics(self, stats: Table) -> None:
        """Make sure that the statistics can be selected from: counted tokens for every group, and enough groups.

        Args:
            stats: the one table that the rule reads (`reads`).

        Raises:
            SelectionError: they cannot; the message says why.
        """
        if not isinstance(stats, self.reads):
            raise SelectionError(
                f"{type(self).__name__} selects from {self.reads.__name__}; got {type(stats).__name__}"
            )
        stats.check_counted()
        if self.contrastive and len(stats.groups) < 2:
            raise SelectionError(
                f"{type(self).__name__} compares groups and needs at least two; these statistics have only "
                f"{', '.join(stats.groups)}"
            )

    def _evaluate(self, stats: Table) -> tuple[Tensor, Tensor | None]:
        """The scores, checked, and which neurons may be chosen (None: all above ``-inf``)."""
        scores = self._checked_scores(stats, self.score(stats))
        eligible = self.eligible(stats, scores)
        if eligible is not None and (eligible.dtype != torch.bool or eligible.shape != scores.shape):
            raise SelectionError(
                f"{type(self).__name__}.eligible must return a boolean table {list(scores.shape)}; got "
                f"{eligible.dtype} {list(eligible.shape)}"
            )
        return scores, eligible

    def _check_settings(self) -> None:
        name = type(self).__name__
        if self.count is not None and self.fraction is not None and self.fraction != type(self).fraction:
            raise SelectionError(f"{name}: give fraction or count, not both; got {self.fraction} and {self.count}")
        if self.count is not None:
            if isinstance(self.count, bool) or not isinstance(self.count, numbers.Integral) or self.count < 1:
                raise SelectionError(f"{name}: count is the number of neurons per group, at least 1; got {self.count}")
        elif self.fraction is not None and not is_share(self.fraction):
            raise SelectionError(f"{name}: fraction is in (0, 1]; got {self.fraction!r}")
        if self.exclude is not None and not isinstance(self.exclude, (NeuronSet, Selection)):
            raise SelectionError(f"{name}: exclude is a NeuronSet or a Selection; got {type(self.exclude).__name__}")
        check_flags(self, per_layer=self.per_layer)
        for setting in {"fraction", "count"} & vars(self).keys():  # only what was given; see DerivedSelector
            # A number of NumPy would show in the selector's repr, and so in the names of selections and files.
            object.__setattr__(self, setting, as_plain(getattr(self, setting)))

    def _ranked_parts(self, space: NeuronSpace) -> list[tuple[Int64[Tensor, " part"] | None, int]]:
        """The parts that are ranked apart: flat indices (None for the whole space), and neurons per group."""
        chosen = None if self.layers is None else space.restrict(layers=layer_numbers(self.layers))
        if not self.per_layer:
            where = "the space" if chosen is None else "the given layers"
            return [(chosen, self._quota(len(space) if chosen is None else len(chosen), where))]
        parts = []
        for name, part in layer_parts(space):
            inside = part if chosen is None else part[torch.isin(part, chosen, assume_unique=True)]
            if len(inside):
                parts.append((inside, self._quota(len(inside), name)))
        return parts

    def _quota(self, size: int, where: str) -> int:
        """Number of neurons that each group gets, out of ``size``."""
        if self.count is not None:
            count = operator.index(self.count)
            if count > size:
                raise SelectionError(f"count={count} neurons per group, but {where} has only {size}")
            return count
        fraction = float(FRACTION if self.fraction is None else self.fraction)
        budget = budget_of(fraction, size)
        if budget < 1:
            raise SelectionError(
                f"fraction={fraction:g} of the {size} neurons of {where} yields no neuron; "
                + (f"the smallest fraction that yields one is {_smallest_fraction(size)}" if size else "no layer given")
            )
        return budget

    def _excluded_masks(self, stats: Evidence) -> dict[str, Bool[Tensor, " neuron"]]:
        """For each group that has neurons to leave out, a mask of them."""
        if self.exclude is None:
            return {}
        check_same_space(self.exclude.space, stats.space)
        if isinstance(self.exclude, NeuronSet):
            return dict.fromkeys(stats.groups, self.exclude.mask())
        missing = [group for group in stats.groups if group not in self.exclude]
        if missing:
            raise MismatchError(f"exclude has no set for {', '.join(missing)}; it has {', '.join(self.exclude)}")
        return {group: self.exclude[group].mask() for group in stats.groups}

    def _checked_scores(self, stats: Evidence, scores: object) -> Float[Tensor, "group neuron"]:
        name = type(self).__name__
        shape = (len(stats.groups), len(stats.space))
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            got = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
            raise SelectionError(f"{name}.score must return a tensor of floats [group, neuron]; got {got}")
        if tuple(scores.shape) != shape:
            raise SelectionError(f"{name}.score must return [group, neuron] = {list(shape)}; got {list(scores.shape)}")
        scores = scores.detach().cpu()
        if scores.dtype not in (torch.float64, torch.float32):
            scores = scores.double()  # NumPy has no bfloat16.
        for group, row in zip(stats.groups, scores, strict=True):
            # The extremes are NaN if any value is, and cost no table.
            highest_score = row.max()
            if torch.isnan(highest_score) or highest_score == math.inf:
                neuron = int((torch.isnan(row) | (row == math.inf)).nonzero()[0])
                value = "NaN" if torch.isnan(row[neuron]) else "inf"
                raise SelectionError(
                    f"{name}.score is {value} for group {group!r}, neuron {neuron} (use -inf to leave out)"
                )
        return scores

    # -- sets ----------------------------------------------------------------------------------------------------------

    def __and__(self, other: "Selector") -> "Selector":
        return self._combined("&", other)

    def __or__(self, other: "Selector") -> "Selector":
        return self._combined("|", other)

    def __sub__(self, other: "Selector") -> "Selector":
        return self._combined("-", other)

    def _combined(self, symbol: str, other: object) -> "Selector":
        from vlmneurons.selectors._combine import CombinedSelector

        return CombinedSelector(self, symbol, other) if isinstance(other, Selector) else NotImplemented

    # -- scores --------------------------------------------------------------------------------------------------------

    def zscore(self) -> "Selector":
        """Scores less their mean over neurons, over their standard deviation, for each group; 0 where all are equal."""
        return self._scored("zscore")

    def rank(self) -> "Selector":
        """Scores as ranks over neurons, from 0 (lowest) to 1 (highest), for each group; equal ones share theirs."""
        return self._scored("rank")

    def __neg__(self) -> "Selector":
        return self._scored("-")

    def __abs__(self) -> "Selector":
        return self._scored("abs")

    def __mul__(self, factor: float) -> "Selector":
        return self._scored("*", factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "Selector":
        return self._scored("/", divisor)

    def __add__(self, other: "Selector") -> "Selector":
        from vlmneurons.selectors._scores import SummedSelector

        return SummedSelector(self, other) if isinstance(other, Selector) else NotImplemented

    def __radd__(self, other: object) -> "Selector":
        # Python's sum() starts from 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def where(self, gate: "Gate | NeuronSet | Selection") -> "Selector":
        """The same scores, for choosing only among the neurons that pass.

        Args:
            gate: a comparison of a selector's scores with a number, such as ``LAP() > 0.1`` (of the same group), or
                several joined by ``&``, ``|`` and ``~``; or the neurons themselves: one set, or a set for each group.

        Examples:
            >>> from vlmneurons.selectors import CAS, LAP, MostActive
            >>> CAS(0.005).where((LAP() > 0.1) & ~(MostActive() > 0.9))
            CAS().where((LAP() > 0.1) & ~(MostActive() > 0.9)).take(fraction=0.005)
        """
        from vlmneurons.selectors._scores import GatedSelector

        return GatedSelector(self, gate)

    def __gt__(self, number: float) -> "Gate":
        return self._compared(">", number)

    def __ge__(self, number: float) -> "Gate":
        return self._compared(">=", number)

    def __lt__(self, number: float) -> "Gate":
        return self._compared("<", number)

    def __le__(self, number: float) -> "Gate":
        return self._compared("<=", number)

    def _scored(self, operation: str, number: object = None) -> "Selector":
        from vlmneurons.selectors._scores import MappedSelector

        if operation in ("*", "/") and not _is_real(number):
            return NotImplemented
        return MappedSelector(self, operation, float(number) if _is_real(number) else None)

    def _compared(self, symbol: str, number: object) -> "Gate":
        from vlmneurons.selectors._scores import Comparison

        return Comparison(self, symbol, float(number)) if _is_real(number) else NotImplemented

    # -- text ----------------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        """The settings that say exactly what is selected: the budget, and whatever differs from its default."""
        settings = {**self._budget_settings(), **self._settings()}
        last = ("layers", "exclude", "per_layer")
        ordered = [name for name in settings if name not in last] + [name for name in last if name in settings]
        return f"{type(self).__name__}({', '.join(f'{name}={setting_text(settings[name])}' for name in ordered)})"

    def _expression(self) -> str:
        """The rule without its budget, layers and exclusions: what stands in an expression of several rules."""
        if type(self).__repr__ is not Selector.__repr__:
            return repr(self)
        shown = ", ".join(f"{name}={setting_text(value)}" for name, value in self._settings().items())
        return f"{type(self).__name__}({shown})"

    def _settings(self) -> JSON:
        """Settings of the rule itself that differ from their defaults."""
        shown: JSON = {}
        for name, parameter in self._parameters().items():
            value = getattr(self, name, getattr(self, f"_{name}", parameter.default))
            if value is inspect.Parameter.empty:
                continue
            default = parameter.default
            # By itself first: NaN is not equal to itself, and a tensor's == is not one answer.
            is_default = value is default or (type(value) is type(default) and value == default)
            if not is_default or name in self._always_shown:
                shown[name] = value
        return shown

    def _parameters(self) -> dict[str, inspect.Parameter]:
        """The rule's parameters, without the settings of every selector."""
        return {
            name: parameter
            for name, parameter in inspect.signature(type(self).__init__).parameters.items()
            if name not in {"self", *SHARED} and parameter.kind not in _VARIADIC
        }

    def _budget_settings(self) -> JSON:
        """The budget, and the other settings of every selector where they differ from their defaults."""
        settings = {"count": self.count} if self.count is not None else {"fraction": self.fraction}
        settings |= {"layers": self.layers, "exclude": self.exclude, "per_layer": self.per_layer or None}
        return {name: value for name, value in settings.items() if value is not None}


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def budget_of(fraction: float, size: int) -> int:
    """``floor(fraction * size)``; a product within rounding of a whole number, as 0.29 * 100, is that number."""
    return min(size, math.floor(fraction * size + 1e-6))


def highest(
    scores: Float[Tensor, " neuron"], count: int, allowed: Bool[Tensor, " neuron"] | None = None
) -> Int64[Tensor, " chosen"]:
    """Sorted indices of the ``count`` highest allowed scores; of equal scores, the ones with the lower indices.

    Fewer if fewer are allowed. Takes time linear in the number of neurons.
    """
    # NumPy rather than torch throughout: its partition is linear also for tied and sorted values, and rows of this size
    # are too short for torch's threads, which cost a scheduler's tick per operation on a busy machine.
    values = scores.numpy()
    candidates = None
    if allowed is not None:
        mask = allowed.numpy()
        if not mask.all():
            candidates = np.flatnonzero(mask)
            values = values[candidates]
    if 0 < count < len(values):
        # Most scores of contrastive rules are one value, the lowest; a partition is slow among many equal ones.
        scored = np.flatnonzero(values > values.min())
        if count <= len(scored) < len(values) // 2:
            candidates = scored if candidates is None else candidates[scored]
            values = values[scored]
    if count >= len(values):
        chosen = np.arange(len(values))
    elif count < 1:
        chosen = np.arange(0)
    else:
        # The value at which the budget is used up: all above it are in, then those that equal it in order of index.
        place = len(values) - count
        threshold = np.partition(values, place)[place]
        above = np.flatnonzero(values > threshold)
        ties = np.flatnonzero(values == threshold)[: count - len(above)]
        chosen = np.sort(np.concatenate([above, ties]))
    return torch.from_numpy((chosen if candidates is None else candidates[chosen]).astype(np.int64, copy=False))


def provenance_of(stats: Evidence) -> JSON:
    """What a selection says about the statistics that it was made from."""
    provenance: JSON = {"statistics": dict(stats.provenance)}
    for name, counts in (("tokens", stats.tokens), ("items", stats.items)):
        if counts is not None:
            provenance[name] = dict(zip(stats.groups, counts.tolist(), strict=True))
    return provenance


def layer_parts(space: NeuronSpace) -> Iterator[tuple[str, Int64[Tensor, " part"]]]:
    """Each layer's name and the flat indices of its neurons, sorted; layers of two towers are two layers."""
    for (tower, layer), positions in space.tower_layers.items():
        parts = [torch.arange(space.offsets[position], space.offsets[position + 1]) for position in positions]
        yield f"layer {layer} of tower {tower!r}", torch.cat(parts)


def check_flags(selector: Selector, **flags: bool) -> None:
    """Refuse, when the selector is made, a setting that is neither True nor False."""
    for name, value in flags.items():
        as_flag(f"{type(selector).__name__}: {name}", value, SelectionError)


def _shared_settings(
    name: str, fraction: object, count: object, layers: object, exclude: object, per_layer: object
) -> JSON:
    """The shared settings that were given; a fraction takes the place of a count, and the other way round."""
    if fraction is not None and count is not None:
        raise SelectionError(f"{name}: give fraction or count, not both; got {fraction} and {count}")
    settings = {"layers": None if layers is None else layer_numbers(layers), "exclude": exclude, "per_layer": per_layer}
    settings = {setting: value for setting, value in settings.items() if value is not None}
    return settings if fraction is None and count is None else {"fraction": fraction, "count": count, **settings}


def layer_numbers(layers: object) -> tuple[int, ...]:
    """Numbers of layers, of one or several, sorted, each once.

    Raises:
        SelectionError: they are no whole numbers, or there is none.
    """
    if isinstance(layers, (str, bytes)):
        raise SelectionError(f"layers are numbers; got the text {layers!r}")
    try:
        several = tuple(layers) if isinstance(layers, Iterable) else (layers,)
    except TypeError:  # a tensor of one number cannot be gone through
        several = (layers,)
    distinct = {as_whole("a layer's number", layer, SelectionError) for layer in several}
    if not distinct:
        raise SelectionError("layers is empty: give at least one layer, or None for all")
    return tuple(sorted(distinct))


def _smallest_fraction(size: int) -> str:
    """The smallest fraction of few digits that yields a neuron of ``size``: within 1 % of ``1 / size``."""
    for digits in itertools.count(len(str(size)) + 1):
        fraction = math.ceil(10**digits / size) / 10**digits
        if fraction < 1.01 / size:
            return f"{fraction:.10g}"
    raise AssertionError("three digits always suffice")


def _is_real(number: object) -> TypeGuard[float]:
    return isinstance(number, numbers.Real) and not isinstance(number, bool)


def setting_text(value: object) -> str:
    """A setting as the repr of a selector shows it."""
    if isinstance(value, NeuronSet):
        return f"<{len(value)} neurons {value.fingerprint}>"
    if isinstance(value, Selection):
        return f"<{value.selector or 'selection'}>"
    if isinstance(value, Selector):
        return value._expression()
    if isinstance(value, tuple):
        return repr(list(value))
    return repr(value)
