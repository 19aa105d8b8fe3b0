"""Stands for a `VLM` where nnsight runs a trace and this library is not installed: names, and where nnsight finds them.

Its source is sent along, as that of the trace is, so it uses nothing but nnsight.
"""

from typing import no_type_check

from nnsight.intervention.interleaver import Mediator


@no_type_check
def _class() -> type:
    """The class of every part. It is made in a function because such a class is sent by its source, not by its name."""

    class Part:
        """A part of a model: further parts by name, sites, and all else of the module's envoy."""

        def __init__(self, envoy, parts, sites):
            self.__dict__.update({"_envoy": envoy, "_parts": parts, "_sites": sites})

        def __getattr__(self, name):
            if name.startswith("__") or "_parts" not in self.__dict__:
                raise AttributeError(name)
            if name in self._parts:
                return self._parts[name]
            if name not in self._sites:
                return getattr(self._envoy, name)
            location, columns = self._place(name)
            values = Mediator.value(location)
            if location.endswith(".input"):
                args, kwargs = values
                values = args[0] if args else next(iter(kwargs.values()))
            return values if columns is None else values[..., columns]

        def __setattr__(self, name, value):
            if name not in self._sites:
                setattr(self._envoy, name, value)
                return
            location, columns = self._place(name)
            whole = Mediator.value(location)
            if location.endswith(".input"):
                args, kwargs = whole
                first = next(iter(kwargs), None)
                value = ((value, *args[1:]), kwargs) if args else (args, {**kwargs, first: value})
            elif columns is not None:
                whole = whole.clone()
                whole[..., columns] = value
                value = whole
            Mediator.swap(location, value)

        def _place(self, name):
            location, columns = self._sites[name]
            if location is None:
                raise ValueError(columns)
            return location, columns

        def __getitem__(self, index):
            if isinstance(index, str):
                return getattr(self, index)
            parts = [part for name, part in self._parts.items() if name.isdigit()]
            return parts[index] if parts else self._envoy[index]

        def __len__(self):
            return len(self._parts)

        def __bool__(self):
            return True

        def __iter__(self):
            return iter([part for name, part in self._parts.items() if name.isdigit()])

        def __call__(self, *args, **kwargs):
            return self._envoy(*args, **kwargs)

        def get(self, path):
            part = self
            for name in str(path).split("."):
                part = getattr(part, name)
            return part

        def site(self, name):
            return self.get(name)

        def set_site(self, name, value):
            owner, kind = str(name).rsplit(".", 1)
            setattr(self.get(owner), kind, value)

    return Part


PART = _class()
