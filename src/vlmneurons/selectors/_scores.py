"""Arithmetic on scores: selectors that rank by a sum, a product, ranks … of other selectors' scores.

A neuron that some part leaves out (``-inf``) is left out of the whole. A neuron that a part scores but does not find
eligible, such as one without a margin for `CAS`, stays in a sum if another part of the sum finds it eligible.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import stats as scipy_stats
from torch import Tensor

from vlmneurons.errors import MismatchError, SelectionError
from vlmneurons.neurons.selection import Selection, outer_places
from vlmneurons.neurons.sets import NeuronSet, check_same_space
from vlmneurons.selectors._base import Selector, setting_text
from vlmneurons.selectors._combine import CombinedSelector
from vlmneurons.selectors._evidence import Bundle, Readable
from vlmneurons.statistics.evidence import Evidence


class DerivedSelector(Selector[Bundle]):
    """A selector whose scores are made of those of its parts.

    The budget, layers, exclusions and ``per_layer`` are those of the parts that were given some, which must agree.
    `Selector.take` sets others.
    """

    def __init__(self, *parts: Selector) -> None:
        """The parts.

        Args:
            parts: selectors with scores.

        Raises:
            SelectionError: a part has no scores, or parts were given different budgets, layers or exclusions.
        """
        for part in parts:
            if isinstance(part, CombinedSelector):
                raise SelectionError(f"{part!r} combines sets and has no scores to calculate with: use its parts")
        self.parts = parts
        self.contrastive = any(part.contrastive for part in parts)
        budgets = dict.fromkeys((p.fraction, p.count) for p in parts if p._explicit_settings("fraction", "count"))
        if len(budgets) > 1:
            different = ", ".join(str(fraction) if count is None else f"count={count}" for fraction, count in budgets)
            raise SelectionError(
                f"the parts have different budgets ({different}): give one, or none and use .take(fraction)"
            )
        if budgets:
            self.fraction, self.count = next(iter(budgets))
        for name in ("layers", "exclude", "per_layer"):
            values = [getattr(part, name) for part in parts if name in vars(part)]
            if any(value != values[0] for value in values):
                raise SelectionError(f"the parts have different {name}: give it to one of them, or use .take({name}=…)")
            if values:
                setattr(self, name, values[0])

    def read(self, *evidence: Readable) -> Bundle:
        """All evidence together, from which each part takes the table that it reads.

        Args:
            evidence: see `Selector.select`.
        """
        return Bundle.of(evidence)

    def check_statistics(self, stats: Evidence) -> None:
        """Make sure that every part can score its table.

        Args:
            stats: one table, or several as a bundle.

        Raises:
            SelectionError: a part cannot.
        """
        bundle = self.read(stats)
        for part in self.parts:
            part.check_statistics(part.read(bundle))

    def score(self, stats: Evidence, *more: Evidence) -> Float[Tensor, "group neuron"]:
        """The scores that are made of the parts' scores.

        Args:
            stats: the table that the parts read, or several tables as a bundle.
            more: further tables, if parts read different ones.
        """
        return self._evaluate(self.read(stats, *more))[0]

    def eligible(self, stats: Evidence, scores: Float[Tensor, "group neuron"]) -> Bool[Tensor, "group neuron"] | None:
        """The neurons that the parts find eligible.

        Args:
            stats: the table that the parts read, or several as a bundle.
            scores: what `score` gave.
        """
        return self._evaluate(self.read(stats))[1]

    def _evaluate(self, stats: Evidence) -> tuple[Tensor, Tensor | None]:
        bundle = self.read(stats)
        self.check_statistics(bundle)
        return self._derive([part._evaluate(part.read(bundle)) for part in self.parts], bundle)

    @abstractmethod
    def _derive(self, parts: list[tuple[Tensor, Tensor | None]], bundle: Bundle) -> tuple[Tensor, Tensor | None]:
        """The scores and eligible neurons of the whole, made of those of the parts, whose tables may be written to."""

    def __repr__(self) -> str:
        budget = ", ".join(f"{name}={setting_text(value)}" for name, value in self._budget_settings().items())
        text = self._expression()
        return f"({text}).take({budget})" if _precedence(text) else f"{text}.take({budget})"


def _left_out(changed: Tensor, scores: Tensor) -> Tensor:
    """The changed scores, with ``-inf`` where the scores had it."""
    return changed.masked_fill_(torch.isneginf(scores), -math.inf) if scores.min() == -math.inf else changed


def _precedence(expression: str) -> int:
    """How loosely an expression binds: 2 for a sum, 1 for a product or a minus sign, 0 if a dot can follow it."""
    signs = {expression[place : place + 3] for place in outer_places(expression)}
    return 2 if " + " in signs else int(expression.startswith("-") or bool(signs & {" * ", " / "}))


def _wrapped(part: Selector, most: int) -> str:
    text = part._expression()
    return f"({text})" if _precedence(text) > most else text


class SummedSelector(DerivedSelector):
    """The sum of two selectors' scores; ``left + right`` makes one.

    Scores of different rules have different units: give them one with `Selector.zscore` or `Selector.rank` first.

    Examples:
        >>> from vlmneurons.selectors import CAS, MAD
        >>> CAS().zscore() * 0.7 + MAD().zscore() * 0.3
        (CAS().zscore() * 0.7 + MAD().zscore() * 0.3).take(fraction=0.005)
    """

    def _derive(self, parts: list[tuple[Tensor, Tensor | None]], bundle: Bundle) -> tuple[Tensor, Tensor | None]:
        (left, left_eligible), (right, right_eligible) = parts
        total = _left_out(_left_out(left.add(right), left), right)
        if left_eligible is None or right_eligible is None:
            return total, None
        return total, left_eligible | right_eligible

    def _expression(self) -> str:
        return " + ".join(_wrapped(part, 2) for part in self.parts)


class MappedSelector(DerivedSelector):
    """One selector's scores, changed: scaled, turned round, z-scored, ranked; made by the operators of `Selector`."""

    def __init__(self, part: Selector, operation: str, number: float | None = None) -> None:
        """The change.

        Args:
            part: the selector.
            operation: ``"*"``, ``"/"``, ``"-"``, ``"abs"``, ``"zscore"`` or ``"rank"``.
            number: the factor or divisor.

        Raises:
            SelectionError: a factor that is not finite, or a division by 0.
        """
        super().__init__(part)
        factor = 1.0 if number is None else float(number)
        if not math.isfinite(factor) or (operation == "/" and factor == 0):
            raise SelectionError(f"scores cannot be {'multiplied' if operation == '*' else 'divided'} by {number}")
        self.operation, self.number = operation, factor

    def _derive(self, parts: list[tuple[Tensor, Tensor | None]], bundle: Bundle) -> tuple[Tensor, Tensor | None]:
        ((scores, eligible),) = parts
        changed = _OPERATIONS[self.operation](scores, self.number)
        return _left_out(changed, scores), eligible

    def _expression(self) -> str:
        (part,) = self.parts
        if self.operation in ("*", "/"):
            return f"{_wrapped(part, 1)} {self.operation} {self.number:g}"
        if self.operation == "abs":
            return f"abs({part._expression()})"
        return f"-{_wrapped(part, 0)}" if self.operation == "-" else f"{_wrapped(part, 0)}.{self.operation}()"


def zscored(scores: np.ndarray) -> np.ndarray:
    """Scores of one group less their mean over neurons, over their standard deviation; ``-inf`` stays."""
    scored = None if scores.min() > -math.inf else scores > -math.inf
    values = (scores if scored is None else scores[scored]).astype(np.float64)
    if len(values):
        size = max(values.max(), -values.min())
        values -= values.mean()
        spread = math.sqrt(values @ values / len(values))
        # Rounding leaves a spread of 1e-17 where all values are equal.
        values *= 1 / spread if spread > 1e-12 * size else 0.0
    if scored is None:
        return values
    result = np.full(scores.shape, -math.inf)
    result[scored] = values
    return result


def _rank(scores: Tensor, _: float) -> Tensor:
    result = torch.zeros(scores.shape, dtype=torch.float64)
    for row, values in zip(result.numpy(), scores.numpy(), strict=True):
        scored = values > -math.inf
        count = int(scored.sum())
        row[scored] = (scipy_stats.rankdata(values[scored]) - 1) / (count - 1) if count > 1 else 0.0
    return result


_OPERATIONS: Mapping[str, Callable[[Tensor, float], Tensor]] = MappingProxyType(
    {
        "*": lambda scores, number: scores * number,
        "/": lambda scores, number: scores / number,
        "-": lambda scores, _: -scores,
        "abs": lambda scores, _: scores.abs(),
        "zscore": lambda scores, _: torch.from_numpy(np.stack([zscored(row) for row in scores.numpy()])),
        "rank": _rank,
    }
)


class Gate(ABC):
    """A condition on neurons, for `Selector.where`; joined with others by ``&``, ``|`` and ``~``."""

    @abstractmethod
    def passes(self, bundle: Bundle) -> Bool[Tensor, "group neuron"]:
        """For each group which neurons pass."""

    @property
    def contrastive(self) -> bool:
        """Whether the condition compares groups."""
        return False

    def check(self, bundle: Bundle) -> None:  # noqa: B027 (a gate without a selector has nothing to check)
        """Make sure that the condition can be evaluated."""

    def __and__(self, other: "Gate") -> "Gate":
        return _JoinedGate("&", self, other) if isinstance(other, Gate) else NotImplemented

    def __or__(self, other: "Gate") -> "Gate":
        return _JoinedGate("|", self, other) if isinstance(other, Gate) else NotImplemented

    def __invert__(self) -> "Gate":
        return _JoinedGate("~", self)

    def __bool__(self) -> bool:
        # `0.1 < LAP() < 0.9` asks for the truth of its first half and would silently drop it.
        raise SelectionError(f"{self!r} is a condition on neurons, not true or false; join conditions with &, | and ~")


class Comparison(Gate):
    """The neurons whose scores are above, or below, a number: ``selector > number``. ``-inf`` never passes."""

    def __init__(self, selector: Selector, symbol: str, number: float) -> None:
        if isinstance(selector, CombinedSelector):
            raise SelectionError(f"{selector!r} combines sets and has no scores to compare: use its parts")
        if names := selector._explicit_settings():
            raise SelectionError(
                f"{selector!r} {symbol} {number:g} compares the scores of all neurons, whatever {', '.join(names)} it "
                "has: leave that out, and give it to the selector before .where(…)"
            )
        if math.isnan(number):
            raise SelectionError(f"scores cannot be compared with {number}")
        self.selector, self.symbol, self.number = selector, symbol, number

    @property
    def contrastive(self) -> bool:
        """Whether the selector compares groups."""
        return self.selector.contrastive

    def check(self, bundle: Bundle) -> None:
        """Make sure that the selector can score its table."""
        self.selector.check_statistics(self.selector.read(bundle))

    def passes(self, bundle: Bundle) -> Bool[Tensor, "group neuron"]:
        """For each group the neurons whose scores pass the comparison."""
        scores, _ = self.selector._evaluate(self.selector.read(bundle))
        compare = {">": torch.gt, ">=": torch.ge, "<": torch.lt, "<=": torch.le}[self.symbol]
        return compare(scores, self.number) & (scores > -math.inf)

    def __repr__(self) -> str:
        return f"({self.selector._expression()} {self.symbol} {self.number:g})"


class _Membership(Gate):
    """The neurons of a set, or of each group's set."""

    def __init__(self, neurons: NeuronSet | Selection) -> None:
        self.neurons = neurons

    def passes(self, bundle: Bundle) -> Bool[Tensor, "group neuron"]:
        check_same_space(self.neurons.space, bundle.space)
        if isinstance(self.neurons, NeuronSet):
            return self.neurons.mask().expand(len(bundle.groups), -1)
        missing = [group for group in bundle.groups if group not in self.neurons]
        if missing:
            raise MismatchError(f"where(…) has no set for {', '.join(missing)}; it has {', '.join(self.neurons)}")
        return torch.stack([self.neurons[group].mask() for group in bundle.groups])

    def __repr__(self) -> str:
        return setting_text(self.neurons)


class _JoinedGate(Gate):
    """Two gates joined by ``&`` or ``|``, or one turned round by ``~``."""

    def __init__(self, symbol: str, *gates: Gate) -> None:
        self.symbol, self.gates = symbol, gates

    @property
    def contrastive(self) -> bool:
        return any(gate.contrastive for gate in self.gates)

    def check(self, bundle: Bundle) -> None:
        for gate in self.gates:
            gate.check(bundle)

    def passes(self, bundle: Bundle) -> Bool[Tensor, "group neuron"]:
        first = self.gates[0].passes(bundle)
        if self.symbol == "~":
            return ~first
        second = self.gates[1].passes(bundle)
        return first & second if self.symbol == "&" else first | second

    def __repr__(self) -> str:
        if self.symbol == "~":
            return f"~{self.gates[0]!r}"
        return f"({self.gates[0]!r} {self.symbol} {self.gates[1]!r})"


class GatedSelector(DerivedSelector):
    """One selector's scores, for choosing only among neurons that pass a gate; made by `Selector.where`."""

    def __init__(self, part: Selector, gate: "Gate | NeuronSet | Selection") -> None:
        """The selector and the gate.

        Raises:
            SelectionError: the gate is something else.
        """
        super().__init__(part)
        if isinstance(gate, (NeuronSet, Selection)):
            gate = _Membership(gate)
        if not isinstance(gate, Gate):
            raise SelectionError(
                "where(…) takes a comparison such as LAP() > 0.1, a NeuronSet or a Selection; got "
                f"{type(gate).__name__}"
            )
        self.gate = gate
        self.contrastive = self.contrastive or gate.contrastive

    def check_statistics(self, stats: Evidence) -> None:
        """Make sure that the selector and the gate can score their tables."""
        super().check_statistics(stats)
        self.gate.check(self.read(stats))

    def _derive(self, parts: list[tuple[Tensor, Tensor | None]], bundle: Bundle) -> tuple[Tensor, Tensor | None]:
        ((scores, eligible),) = parts
        passes = self.gate.passes(bundle)
        return scores, passes if eligible is None else eligible & passes

    def _expression(self) -> str:
        (part,) = self.parts
        gate = repr(self.gate)
        inner = gate[1:-1] if gate.startswith("(") and next(outer_places(gate), None) == len(gate) - 1 else gate
        return f"{_wrapped(part, 0)}.where({inner})"
