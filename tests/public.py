"""What is public, and what its docstrings say: for the tests that hold the documentation to the code."""

import ast
import functools
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import vlmneurons as vn
from vlmneurons import errors, testing

_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Examples?|Source|Note):(?: *(\S.*))?$")
_ENTRY = re.compile(r"^(\*{0,2}[\w., /*`]+?)(?: \([^)]*\))?: ")


API = Path(__file__).parent.parent / "docs" / "api"


def documented_paths() -> list[str]:
    """What the pages of the API have entries for, as often as they have them."""
    pages = sorted(API.glob("*.md"))
    return [path for page in pages for path in re.findall(r"^::: ([\w.]+)", page.read_text("utf-8"), re.MULTILINE)]


@functools.cache
def public_things() -> dict[str, Any]:
    """Every function and class that a user may name, by the path under which the documentation has it.

    These are the names of the package and of its module for tests, and whatever else the API's pages have entries for.
    """
    things = {f"vlmneurons.{name}": getattr(vn, name) for name in vn.__all__ if name != "__version__"}
    things |= {f"vlmneurons.testing.{name}": getattr(testing, name) for name in testing.__all__}
    for path in documented_paths():
        thing = pkgutil.resolve_name(path)
        if not isinstance(thing, ModuleType):
            things[path] = thing
        elif thing is not testing:
            things |= {
                f"{path}.{name}": value
                for name, value in vars(thing).items()
                if getattr(value, "__module__", None) == path and not name.startswith("_")
            }
    return things


def own_bases(kind: type) -> list[type]:
    """A class and those of its bases that the library defines."""
    return [base for base in kind.__mro__ if base.__module__.startswith("vlmneurons")]


@dataclass(frozen=True)
class Callee:
    """Something that is called or read, with a docstring of its own."""

    name: str
    owner: type | None
    function: Callable[..., Any]
    is_property: bool = False

    @property
    def doc(self) -> str:
        """The docstring, without indentation; empty if there is none."""
        return inspect.cleandoc(self.function.__doc__ or "")

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters, without the first one of a method."""
        names = [
            name for name, one in inspect.signature(self.function).parameters.items() if one.kind != one.VAR_POSITIONAL
        ]
        return names[1:] if self.owner is not None and names[:1] in (["self"], ["cls"]) else names

    @property
    def returns(self) -> Any:
        """The annotation of what is returned, as text."""
        found = inspect.signature(self.function).return_annotation
        return "" if found is inspect.Signature.empty else found if isinstance(found, str) else repr(found)


def members(name: str, kind: type) -> Iterator[Callee]:
    """Public methods and properties of a class, those of private bases included; its ``__init__`` too."""
    public = set(public_things().values())
    seen: set[str] = set()
    for base in own_bases(kind):
        if base is not kind and base in public:
            continue  # it has entries of its own
        for member, value in vars(base).items():
            if member in seen or (member.startswith("_") and member != "__init__"):
                continue
            if member == "__init__" and (is_dataclass(base) or not value.__doc__):
                continue
            seen.add(member)
            if isinstance(value, (classmethod, staticmethod)):
                yield Callee(f"{name}.{member}", base, value.__func__)
            elif isinstance(value, property):
                yield Callee(f"{name}.{member}", base, value.fget, is_property=True)
            elif isinstance(value, functools.cached_property):
                yield Callee(f"{name}.{member}", base, value.func, is_property=True)
            elif inspect.isfunction(value):
                yield Callee(f"{name}.{member}", base, value)


def callees() -> dict[str, Callee]:
    """Every public function, method and property, by its path."""
    found = {}
    for name, thing in public_things().items():
        if inspect.isclass(thing):
            found |= {one.name: one for one in members(name, thing)}
        else:
            found[name] = Callee(name, None, thing)
    return found


def sections(doc: str) -> dict[str, str]:
    """The sections of a Google docstring, by title; what stands before them is under ''."""
    parts: dict[str, list[str]] = {"": []}
    title = ""
    for line in doc.splitlines():
        match = _SECTION.match(line)
        if match:
            title = match.group(1)
            parts[title] = [match.group(2)] if match.group(2) else []
        else:
            parts[title].append(line)
    return {title: "\n".join(lines).strip("\n") for title, lines in parts.items()}


def entries(section: str) -> list[str]:
    """The names that a section of a docstring explains."""
    names = []
    for line in textwrap.dedent(section).splitlines():
        if line and not line.startswith(" ") and (match := _ENTRY.match(line)):
            names += [part.strip(" *`") for part in re.split(r", | and ", match.group(1))]
    return names


_KINDS = {name for name, thing in vars(errors).items() if inspect.isclass(thing)}


def raised(callee: Callee) -> set[str]:
    """The library's own kinds of error that something raises, itself or through private functions of its module."""
    found: set[str] = set()
    waiting, seen = [inspect.unwrap(callee.function)], set()
    while waiting:
        function = waiting.pop()
        if function in seen or not inspect.isfunction(function):
            continue
        seen.add(function)
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            match node:
                case ast.Raise(exc=ast.Call(func=ast.Name(id=kind))) if kind in _KINDS:
                    found.add(kind)
                case ast.Call(func=ast.Name(id=name)) if name.startswith("_"):
                    called = inspect.unwrap(function).__globals__.get(name)
                    if getattr(called, "__module__", None) == function.__module__:
                        waiting.append(inspect.unwrap(called))
                case ast.Call(func=ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name)) if callee.owner:
                    called = inspect.getattr_static(callee.owner, name, None)
                    if name.startswith("_") and not name.startswith("__"):
                        waiting.append(inspect.unwrap(getattr(called, "__func__", called)))
    return found
