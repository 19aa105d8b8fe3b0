"""Selectors combined with ``&``, ``|`` and ``-``: their sets are, group by group."""

import operator
from collections.abc import Callable, Mapping

from jaxtyping import Float
from torch import Tensor

from vlmneurons.errors import SelectionError
from vlmneurons.neurons.selection import Selection, in_parentheses
from vlmneurons.selectors._base import Selector, provenance_of
from vlmneurons.selectors._evidence import Bundle, Readable
from vlmneurons.statistics.evidence import Evidence

_OPERATIONS: Mapping[str, Callable[[Selection, Selection], Selection]] = {
    "&": operator.and_,
    "|": operator.or_,
    "-": operator.sub,
}


class CombinedSelector(Selector[Bundle]):
    """Two selectors whose sets are combined group by group; ``left & right`` makes one.

    Each part selects by its own settings, so the sizes of the combined sets differ between groups, and the combination
    has no budget and no scores of its own. `take` changes the parts: ``(CAS() | MAD()).take(0.01, layers=[3])`` is
    ``CAS(0.01, layers=[3]) | MAD(0.01, layers=[3])``.

    Examples:
        >>> from vlmneurons.selectors import CAS, LAPE, MAD
        >>> (CAS(0.01) & MAD(0.01)) | LAPE(0.005)
        (CAS(fraction=0.01) & MAD(fraction=0.01)) | LAPE(fraction=0.005)
    """

    def __init__(self, left: Selector, symbol: str, right: Selector) -> None:
        """The combination of two selectors.

        Args:
            left: the first selector.
            symbol: ``"&"``, ``"|"`` or ``"-"``.
            right: the second selector.

        Raises:
            SelectionError: another symbol.
        """
        if symbol not in _OPERATIONS:
            raise SelectionError(f"selectors combine with {', '.join(_OPERATIONS)}; got {symbol!r}")
        self.left, self.symbol, self.right = left, symbol, right
        self.fraction = None

    def score(self, stats: Evidence) -> Float[Tensor, "group neuron"]:
        """A combination of sets has no scores.

        Args:
            stats: what would be scored.

        Raises:
            SelectionError: always.
        """
        raise SelectionError(f"{self!r} combines sets and has no scores: score its parts")

    def select(self, *evidence: Readable) -> Selection:
        """The combined sets of both parts, for each group; of several tables each part takes the one that it reads.

        Args:
            evidence: see `Selector.select`.
        """
        self._check_settings()
        combined = _OPERATIONS[self.symbol](self.left.select(*evidence), self.right.select(*evidence))
        return Selection(dict(combined), selector=repr(self), provenance=provenance_of(self.read(*evidence)))

    def read(self, *evidence: Readable) -> Bundle:
        """All evidence together, from which each part takes the table that it reads.

        Args:
            evidence: see `Selector.select`.
        """
        return Bundle.of(evidence)

    def _with_settings(self, settings: Mapping[str, object]) -> Selector:
        left, right = self.left._with_settings(settings), self.right._with_settings(settings)
        return CombinedSelector(left, self.symbol, right)

    def _check_settings(self) -> None:
        if names := self._explicit_settings():
            raise SelectionError(
                f"{self!r} selects by the settings of its parts, not by {', '.join(names)} of its own: set them by "
                ".take(…)"
            )

    def __repr__(self) -> str:
        return f"{in_parentheses(repr(self.left))} {self.symbol} {in_parentheses(repr(self.right))}"
