"""Selectors put together with ``&``, ``|`` and ``-``."""

import operator
from typing import Any

from torch import Tensor

from vlmneurons.errors import SelectionError
from vlmneurons.neurons.sets import Selection, in_parentheses
from vlmneurons.selectors._base import Selector, provenance_of
from vlmneurons.selectors._evidence import Bundle

_OPERATIONS = {"&": operator.and_, "|": operator.or_, "-": operator.sub}


class CombinedSelector(Selector):
    """Two selectors whose sets are combined group by group; ``left & right`` makes one.

    Each part selects by its own settings, so the sizes of the combined sets differ between groups, and the combination
    has no budget and no scores of its own.

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

    def score(self, stats: Any) -> Tensor:
        """A combination of sets has no scores.

        Raises:
            SelectionError: always.
        """
        raise SelectionError(f"{self!r} combines sets and has no scores: score its parts")

    def select(self, *evidence: Any) -> Selection:
        """The combined sets of both parts, for each group; of several tables each part takes the one that it reads."""
        left, right = self.left.select(*evidence), self.right.select(*evidence)
        combined: Any = _OPERATIONS[self.symbol](left, right)
        return Selection(dict(combined), selector=repr(self), provenance=provenance_of(self.read(*evidence)))

    def read(self, *evidence: Any) -> Any:
        """All that was given, together."""
        return Bundle.of(evidence)

    def __repr__(self) -> str:
        return f"{in_parentheses(repr(self.left))} {self.symbol} {in_parentheses(repr(self.right))}"
