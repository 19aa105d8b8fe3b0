"""Checks of what a caller gave: the library's own error at once, in place of another program's from deep below.

A whole number may be NumPy's or PyTorch's, as such numbers come out of tables; a boolean is none, although Python takes
True for 1, and neither is NaN, with which every comparison is false.
"""

import difflib
import math
import numbers
import operator
import os
from collections.abc import Iterable, KeysView, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from vlmneurons.errors import VLMNeuronsError

JSON = dict[str, Any]
"""Plain values by name, as JSON holds them: settings, provenance, what a file says of itself."""
JSONMapping = Mapping[str, Any]
"""The same, to be read alone."""
Wire = list[Any]
"""Plain values in a list, as they go from one process to another."""
Keywords = dict[str, Any]
"""Arguments by name, for whoever they are handed on to."""


def whole(name: str, value: Any, error: type[VLMNeuronsError], *, least: int | None = None) -> int:
    """A whole number as an int.

    Args:
        name: of the argument, for the error.
        value: what was given.
        error: the kind of error to raise.
        least: the lowest that is allowed.

    Raises:
        VLMNeuronsError: of the given kind: it is none, or less than the least.
    """
    try:
        if _is_boolean(value):
            raise TypeError("a boolean")
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError) as cause:
        raise error(f"{name} is a whole number; got {_shown(value)}") from cause
    if least is not None and number < least:
        raise error(f"{name} {number} is less than {least}")
    return number


def real(name: str, value: Any, error: type[VLMNeuronsError]) -> float:
    """A finite number as a float.

    Args:
        name: of the argument, for the error.
        value: what was given.
        error: the kind of error to raise.

    Raises:
        VLMNeuronsError: of the given kind: it is none, NaN or infinite.
    """
    scalar = isinstance(value, numbers.Real) or (hasattr(value, "item") and getattr(value, "shape", None) == ())
    try:
        if not scalar or _is_boolean(value):
            raise TypeError("no number")
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as cause:
        raise error(f"{name} is a number; got {_shown(value)}") from cause
    if not math.isfinite(number):
        raise error(f"{name} {number} is not finite")
    return number


def share(name: str, value: Any, error: type[VLMNeuronsError]) -> float:
    """A number between 0 and 1, which it may not be, as a float; see `real`.

    Raises:
        VLMNeuronsError: of the given kind: it is none, or outside.
    """
    if _is_number(value) and not 0 < value < 1:  # also NaN
        raise error(f"{name} {value} is outside (0, 1)")
    return real(name, value, error)


def flag(name: str, value: object, error: type[VLMNeuronsError]) -> bool:
    """True or False, NumPy's too; a text such as ``"no"`` would count as true.

    Raises:
        VLMNeuronsError: of the given kind: it is something else.
    """
    if not _is_boolean(value) or getattr(value, "shape", ()) != ():
        raise error(f"{name} is True or False; got {_shown(value)}")
    return bool(value)


def one_of(name: str, value: object, allowed: Iterable[str], error: type[VLMNeuronsError]) -> None:
    """Refuse what is none of some names.

    Raises:
        VLMNeuronsError: of the given kind: it is none; the message says what there is.
    """
    if value not in (names := tuple(allowed)):
        raise error(f"{name}={value!r} does not exist; choose from {', '.join(names)}")


def path_of(name: str, value: Any, error: type[VLMNeuronsError]) -> Path:
    """A path as a `pathlib.Path`.

    Raises:
        VLMNeuronsError: of the given kind: it is no path.
    """
    of_kind(name, value, (str, os.PathLike), error, "a path")
    return Path(value)


def in_order(name: str, value: object, error: type[VLMNeuronsError], what: str) -> None:
    """Refuse what cannot be gone through, and a set where places count: its order is another in the next run.

    Args:
        name: of the argument, for the error.
        value: what was given.
        error: the kind of error to raise.
        what: how the error calls what is allowed.

    Raises:
        VLMNeuronsError: of the given kind: it is a set, or nothing to go through.
    """
    of_kind(name, value, Iterable, error, what)
    if isinstance(value, Set) and not isinstance(value, KeysView):
        raise error(f"{name} is {what}; got a {type(value).__name__}, which has no order: sorted(…) gives it one")


def names(name: str, value: object, error: type[VLMNeuronsError]) -> tuple[str, ...]:
    """Several texts in order, where a single one would be taken for its letters.

    Args:
        name: of the argument, for the error.
        value: what was given.
        error: the kind of error to raise.

    Raises:
        VLMNeuronsError: of the given kind: it is a text or a set, or holds something else.
    """
    if isinstance(value, str):
        raise error(f"{name} must be a list of names; got the single text {value!r}")
    if not isinstance(value, Iterable):
        raise error(f"{name} must be a list of names; got {_shown(value)}")
    in_order(name, value, error, "a list of names")
    found = tuple(value)
    wrong = [one for one in found if not isinstance(one, str)]
    if wrong:
        raise error(f"{name} must be a list of names; one is {_shown(wrong[0])}")
    return tuple(map(str, found))  # of NumPy's texts too


def of_kind(
    name: str, value: object, kind: type | tuple[type, ...], error: type[VLMNeuronsError], what: str = ""
) -> None:
    """Refuse what is of another class.

    Args:
        name: of the argument, for the error.
        value: what was given.
        kind: the class, or several.
        error: the kind of error to raise.
        what: how the error calls what is allowed; by default by the class's name.

    Raises:
        VLMNeuronsError: of the given kind: it is of another class.
    """
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        allowed = what or " or ".join(
            f"{'an' if one.__name__[0] in 'AEIOaeio' else 'a'} {one.__name__}" for one in kinds
        )
        raise error(f"{name} is {allowed}; got {_shown(value)}")


def listed(names: Sequence[object], most: int = 5) -> str:
    """Names for a message: the first few, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def few(names: Sequence[str]) -> str:
    """``'a', 'b', 'c', …``: names in quotation marks, three of them."""
    return ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")


def nearest(name: str, names: Iterable[object]) -> str | None:
    """The name that another is most like, whatever the case of letters; None where none is."""
    lower = {str(one).casefold(): str(one) for one in names}
    like = difflib.get_close_matches(name.casefold(), lower, n=1)
    return lower[like[0]] if like else None


def plain(value: Any) -> Any:
    """A number of NumPy or PyTorch as Python's own, which JSON can hold; anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value


def is_missing(value: object) -> bool:
    """Whether a value stands for none: None, NaN, and what pandas has in their place."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, numbers.Real) and bool(value != value)  # also a whole number too large for isnan


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not _is_boolean(value)


def _is_boolean(value: object) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def _shown(value: object) -> str:
    """What was given, in a few words: the value of plain ones, and of others what they are."""
    plain = value is None or isinstance(value, str | int | float)
    text = repr(value) if plain else f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:59]}…"
