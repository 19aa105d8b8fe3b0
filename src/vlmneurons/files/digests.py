"""Digests of bytes, values and code: what tells one thing from another, the same on every machine.

Digests of content are xxh3 with 128 bits, which is as fast as memory. They find what differs by accident, and are no
defence against somebody who wants to deceive. Files that are sent have a SHA-256 as well (`vlmneurons.files.tables`).
"""

import ast
import functools
import hashlib
import importlib.metadata
import inspect
import json
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import xxhash

from vlmneurons._version import __version__
from vlmneurons.checks import JSON

_MOST_THINGS = 2_000
"""How many of the things that a function refers to are looked at; of any further one only its type counts."""

_LARGEST = 2**26
"""Bytes of weights up to which those of a network that a function holds, such as a probe, count."""


def digest_of_bytes(*parts: bytes | memoryview) -> str:
    """A digest of some bytes, 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def digest_of(value: object) -> str:
    """A digest of plain values, whatever the order of keys."""
    return digest_of_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode())


def digest_of_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, for files that are sent."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def digest_of_code(thing: object, *, state: bool = True) -> str:
    """What tells a user's function, class or object from another: its name, and a digest of its code and all it uses.

    Code is compared as a syntax tree, so that comments and line breaks do not matter. Where there is no source, as in
    an interactive interpreter, it is compared as bytecode of this minor version of Python. What it refers to counts as
    well: defaults, what it closes over, globals, and the attributes of an object. Of things of the library, and of
    installed packages, only name and version count.

    Args:
        thing: the function, class or object.
        state: whether lists and dictionaries that it holds count; those of a hook may be where it keeps what it sees.
    """
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    plain = _Describing(state).of(thing)
    return plain if isinstance(plain, str) else f"{name} {digest_of(plain)[:16]}"


class _Describing:
    """Describes a thing by plain values; what is met again within it is described once."""

    def __init__(self, state: bool) -> None:
        self._with_state = state
        self._seen: dict[int, object] = {}  # the things stay alive, so that no id is given twice

    def of(self, thing: object) -> object:
        if thing is None or isinstance(thing, str | int | float | bool | complex):
            return thing if not isinstance(thing, complex) else repr(thing)
        if id(thing) in self._seen:
            return f"again {type(thing).__qualname__} {list(self._seen).index(id(thing))}"
        if len(self._seen) > _MOST_THINGS:
            return f"a {type(thing).__qualname__}"
        self._seen[id(thing)] = thing
        if isinstance(thing, bytes | bytearray | memoryview):
            return digest_of_bytes(bytes(thing))
        if not self._with_state and isinstance(thing, list | dict | set):
            return f"a {type(thing).__qualname__}"
        if isinstance(thing, Mapping):
            return {"mapping": [[self.of(key), self.of(value)] for key, value in thing.items()]}
        if isinstance(thing, AbstractSet):
            return {"set": sorted(digest_of(self.of(part)) for part in thing)}
        if isinstance(thing, list | tuple):
            return [self.of(part) for part in thing]
        return self._of_object(thing)

    def _of_object(self, thing: Any) -> object:
        if isinstance(thing, types.ModuleType):
            return _of_package(thing.__name__) or f"module {thing.__name__}"
        if isinstance(thing, functools.partial):
            return {"partial": [self.of(thing.func), self.of(thing.args), self.of(thing.keywords)]}
        if isinstance(thing, types.MethodType):
            return {"method": thing.__func__.__qualname__, "of": self.of(thing.__self__)}
        if isinstance(thing, types.BuiltinFunctionType) and thing.__module__ is None:  # such as a pattern's ``search``
            return {"method": thing.__qualname__, "of": self.of(thing.__self__)}
        if isinstance(thing, types.FunctionType | types.BuiltinFunctionType | type):
            package = _of_package(thing.__module__)
            if package is not None:
                return f"{thing.__module__}.{thing.__qualname__} of {package}"
            return self._of_function(thing) if isinstance(thing, types.FunctionType) else self._of_class(thing)
        if type(thing).__module__.partition(".")[0] == "pandas" and hasattr(
            thing, "to_csv"
        ):  # which its text shows in part
            return {"table": [type(thing).__qualname__, digest_of_bytes(thing.to_csv().encode())]}
        array = getattr(thing, "__array__", None)
        if array is not None and hasattr(thing, "dtype") and hasattr(thing, "shape"):
            values = _as_numpy(thing)
            # The bytes of an array of objects are but their places in memory.
            content = self.of(values.tolist()) if values.dtype.hasobject else digest_of_bytes(values.tobytes())
            return {"array": [str(thing.dtype), list(thing.shape), content]}
        kind = self.of(type(thing))
        if type(thing).__module__.startswith("vlmneurons.model"):
            return {"model": kind}  # whose weights are an identity of their own
        if hasattr(type(thing), "named_parameters"):
            weights = thing.state_dict()  # of a probe of the user's; the model itself is too large to be one
            is_small = sum(getattr(weight, "nbytes", 0) for weight in weights.values()) <= _LARGEST
            return {"model": kind, **({"weights": self.of(dict(weights))} if is_small and weights else {})}
        if _of_package(type(thing).__module__) is not None and not type(thing).__module__.startswith("vlmneurons"):
            text = repr(thing)  # patterns, paths, dates say what they are; the rest says its class
            return {"instance": kind, "text": "" if re.search(r" at 0x[0-9a-f]+", text) else text}
        state = {name: self.of(value) for name, value in sorted(_state(thing).items())}
        return {"instance": kind, "state": state}

    def _of_function(self, function: types.FunctionType) -> object:
        code = function.__code__
        names = {name for part in _codes(code) for name in part.co_names}
        return {
            "code": _source(function) or _bytecode(code),
            "defaults": [self.of(function.__defaults__), self.of(function.__kwdefaults__)],
            "closure": {
                name: self.of(_content(cell)) for name, cell in zip(code.co_freevars, function.__closure__ or ())
            },
            "globals": self._named(function.__globals__, names),
        }

    def _named(self, namespace: Mapping[str, object], names: set[str]) -> JSON:
        """What the names in code stand for; of a module of the user's, only the members that the same code names."""
        described: JSON = {}
        for name in sorted(names & set(namespace)):
            value = namespace[name]
            is_module = isinstance(value, types.ModuleType) and not _of_package(value.__name__)
            is_new = id(value) not in self._seen
            described[name] = self.of(value)
            if is_module and is_new:
                described[name] = [described[name], self._named(vars(value), names)]
        return described

    def _of_class(self, kind: Any) -> object:
        members = {name: value for name, value in vars(kind).items() if not name.startswith("__") or callable(value)}
        parts = {}
        for name, value in sorted(members.items()):
            value = inspect.unwrap(value) if isinstance(value, types.FunctionType) else value
            value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if name not in ("__weakref__", "__dict__", "_abc_impl"):
                parts[name] = self.of(value)
        return {"class": kind.__qualname__, "bases": [self.of(base) for base in kind.__bases__], "parts": parts}


def _of_package(module: str | None) -> str | None:
    """The package and version that a module is of; None for a module of the user's own."""
    top = (module or "").partition(".")[0]
    if top == "vlmneurons":
        return f"vlmneurons {__version__}"
    if top in sys.stdlib_module_names and top != "__main__":
        return f"Python {sys.version_info.major}.{sys.version_info.minor}"
    path = getattr(sys.modules.get(top), "__file__", None) or ""
    if not re.search(r"[/\\](site|dist)-packages[/\\]", path):
        return None
    try:
        return f"{top} {importlib.metadata.version(top)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{top} {getattr(sys.modules[top], '__version__', '')}"


def _source(function: types.FunctionType) -> str | None:
    """The function's syntax tree as text; None without source, or where several lambdas share a line."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):  # ValueError: the source holds NUL
        return None
    if function.__name__ == "<lambda>":
        lambdas = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
        return ast.dump(lambdas[0]) if len(lambdas) == 1 else None
    return ast.dump(tree.body[0]) if len(tree.body) == 1 else None


def _codes(code: types.CodeType) -> Iterable[types.CodeType]:
    """A function's code and that of the functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _bytecode(code: types.CodeType) -> list[object]:
    constants = [
        # A set's order is another in each process.
        sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant)
        for part in _codes(code)
        for constant in part.co_consts
        if not isinstance(constant, types.CodeType)
    ]
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    called = [list(part.co_names) for part in _codes(code)]  # in the code itself there is but a name's number
    return [minor, *(digest_of_bytes(part.co_code) for part in _codes(code)), *constants, *called]


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # a name that has no value yet
        return None


def _state(thing: object) -> dict[str, object]:
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ()) or ()]
    state = {name: getattr(thing, name) for name in slots if isinstance(name, str) and hasattr(thing, name)}
    return {**state, **getattr(thing, "__dict__", {})}


def _as_numpy(array: Any) -> Any:
    to_host: Callable[[], Any] | None = getattr(array, "detach", None)
    host = array if to_host is None else to_host().cpu()
    if "bfloat16" in str(host.dtype):
        host = host.float()
    return host.__array__()
