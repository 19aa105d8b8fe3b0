"""Nests of tuples, lists and mappings, such as the arguments of a module: each leaf, and where it is."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Path = tuple[object, ...]
"""Where a leaf is in a nest: its indices and keys."""


def leaves(value: object, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf of a nest, and where it is."""
    if isinstance(value, Mapping):
        for key in value:
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, tuple | list):
        for key, part in enumerate(value):
            yield from leaves(part, (*path, key))
    else:
        yield path, value


def changed(value: object, change: Callable[[Path, Any], object], path: Path = ()) -> Any:
    """The same nest, with ``change(path, leaf)`` in place of every leaf."""
    if isinstance(value, Mapping):
        return {key: changed(value[key], change, (*path, key)) for key in value}
    if isinstance(value, tuple | list):
        parts = [changed(part, change, (*path, key)) for key, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return change(path, value)
