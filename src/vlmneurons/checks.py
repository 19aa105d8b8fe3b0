"""Checks of arguments, which raise the library's own error at once, before some other code fails on them deep below.

A function ``as_…`` gives the argument in the form that its name says; a function ``check_…`` gives nothing. A whole
number may be one of NumPy or PyTorch, as numbers that come out of tables are. A boolean is no number, although Python
takes True for 1, and neither is NaN, for which every comparison is false.
"""

import difflib
import math
import numbers
import operator
import os
from collections.abc import Iterable, KeysView, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeGuard

from vlmneurons.errors import VLMNeuronsError

JSON = dict[str, Any]
"""Plain values by name, as JSON holds them: settings, provenance, what a file says of itself."""
JSONMapping = Mapping[str, Any]
"""The same, for what is only read."""
Wire = list[Any]
"""Plain values in a list, as they go from one process to another."""
Keywords = dict[str, Any]
"""Arguments by name, which are handed on to another function."""


def as_whole(name: str, value: Any, error: type[VLMNeuronsError], *, least: int | None = None) -> int:
    """A whole number as an int.

    Args:
        name: of the argument, for the error.
        value: the argument.
        error: the kind of error to raise.
        least: the lowest number that is allowed.

    Raises:
        VLMNeuronsError: of the given kind: the value is no whole number, or less than the least.
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


def as_number(name: str, value: Any, error: type[VLMNeuronsError]) -> float:
    """A finite number as a float.

    Args:
        name: of the argument, for the error.
        value: the argument.
        error: the kind of error to raise.

    Raises:
        VLMNeuronsError: of the given kind: the value is no number, NaN or infinite.
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


def as_fraction(name: str, value: Any, error: type[VLMNeuronsError]) -> float:
    """A number between 0 and 1, without the ends, as a float; see `as_number`.

    Raises:
        VLMNeuronsError: of the given kind: the value is no such number.
    """
    if _is_number(value) and not 0 < value < 1:  # also NaN
        raise error(f"{name} {value} is outside (0, 1)")
    return as_number(name, value, error)


def as_flag(name: str, value: object, error: type[VLMNeuronsError]) -> bool:
    """True or False as a bool, also NumPy's. Anything else is refused: a text such as ``"no"`` would count as true.

    Raises:
        VLMNeuronsError: of the given kind: the value is something else.
    """
    if not _is_boolean(value) or getattr(value, "shape", ()) != ():
        raise error(f"{name} is True or False; got {_shown(value)}")
    return bool(value)


def check_choice(name: str, value: object, allowed: Iterable[str], error: type[VLMNeuronsError]) -> None:
    """Refuse a value that is not among the allowed names.

    Raises:
        VLMNeuronsError: of the given kind: it is not; the message says which names there are.
    """
    if value not in (names := tuple(allowed)):
        raise error(f"{name}={value!r} does not exist; choose from {', '.join(names)}")


def as_path(name: str, value: Any, error: type[VLMNeuronsError]) -> Path:
    """A path as a `pathlib.Path`.

    Raises:
        VLMNeuronsError: of the given kind: the value is no path.
    """
    check_kind(name, value, (str, os.PathLike), error, "a path")
    return Path(value)


def check_ordered(name: str, value: object, error: type[VLMNeuronsError], allowed: str) -> None:
    """Refuse what cannot be iterated over, and sets: the order of a set differs from run to run.

    Args:
        name: of the argument, for the error.
        value: the argument.
        error: the kind of error to raise.
        allowed: what the error says is allowed.

    Raises:
        VLMNeuronsError: of the given kind: the value is a set, or cannot be iterated over.
    """
    check_kind(name, value, Iterable, error, allowed)
    if isinstance(value, Set) and not isinstance(value, KeysView):  # a dictionary's keys are in order
        raise error(f"{name} is {allowed}; got a {type(value).__name__}, which has no order: sorted(…) gives it one")


def as_names(name: str, value: object, error: type[VLMNeuronsError]) -> tuple[str, ...]:
    """Several texts in order, as a tuple. A single text is refused, as it would be taken for its letters.

    Args:
        name: of the argument, for the error.
        value: the argument.
        error: the kind of error to raise.

    Raises:
        VLMNeuronsError: of the given kind: the value is a text or a set, or holds something other than texts.
    """
    if isinstance(value, str):
        raise error(f"{name} must be a list of names; got the single text {value!r}")
    if not isinstance(value, Iterable):
        raise error(f"{name} must be a list of names; got {_shown(value)}")
    check_ordered(name, value, error, "a list of names")
    texts = tuple(value)
    for text in texts:
        if not isinstance(text, str):
            raise error(f"{name} must be a list of names; one is {_shown(text)}")
    return tuple(map(str, texts))  # texts of NumPy become Python's


def check_kind(
    name: str, value: object, kind: type | tuple[type, ...], error: type[VLMNeuronsError], allowed: str = ""
) -> None:
    """Refuse a value of another class.

    Args:
        name: of the argument, for the error.
        value: the argument.
        kind: the class, or several.
        error: the kind of error to raise.
        allowed: what the error says is allowed; by default the names of the classes.

    Raises:
        VLMNeuronsError: of the given kind: the value is of another class.
    """
    if isinstance(value, kind):
        return
    class_names = [cls.__name__ for cls in (kind if isinstance(kind, tuple) else (kind,))]
    allowed = allowed or " or ".join(f"{'an' if text[0] in 'AEIOaeio' else 'a'} {text}" for text in class_names)
    raise error(f"{name} is {allowed}; got {_shown(value)}")


def abridged(names: Sequence[object], most: int = 5) -> str:
    """The first few names, for a message, and how many more there are: ``a, b and 3 more``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def quoted(names: Sequence[str]) -> str:
    """At most three names in quotation marks, for a message: ``'a', 'b', 'c', …``."""
    return ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")


def nearest_name(name: str, names: Iterable[object]) -> str | None:
    """The name that is most like a misspelt one, whatever the case of letters; None where none is like it."""
    by_lower = {str(candidate).casefold(): str(candidate) for candidate in names}
    matches = difflib.get_close_matches(name.casefold(), by_lower, n=1)
    return by_lower[matches[0]] if matches else None


def as_plain(value: Any) -> Any:
    """A number of NumPy or PyTorch as a number of Python, which JSON can hold; anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value


def is_missing(value: object) -> bool:
    """Whether a value stands for "no value": None, NaN, and pandas' NA and NaT."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, numbers.Real) and bool(value != value)  # also a whole number too large for isnan


def is_share(value: object) -> bool:
    """Whether a value is a number in (0, 1], the whole included."""
    return _is_number(value) and 0 < value <= 1


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not _is_boolean(value)


def _is_boolean(value: object) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def _shown(value: object) -> str:
    """A value in a few words, for a message: texts and numbers as they are, of anything else its class."""
    if value is None or isinstance(value, str | int | float):
        text = repr(value)
    else:
        text = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:59]}…"
