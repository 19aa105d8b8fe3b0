"""The nnsight model of a `VLM`: nnsight's own, refusing early what nnsight would pass over without a word."""

import ast
import contextlib
import dis
import functools
import inspect
import itertools
import sys
import types
import weakref
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, no_type_check

from nnsight import TransformersModel
from nnsight.intervention.editing import EditingTracer
from nnsight.intervention.tracer import InterleavingTracer, Invoker, ScanningTracer
from nnsight.tracing.tracer import Tracer, skip_context, skippable

from vlmneurons.checks import Keywords
from vlmneurons.errors import SiteError
from vlmneurons.model.architectures.hooks import ComputedGate

if TYPE_CHECKING:
    from vlmneurons.model.vlm import VLM

Position = tuple[int, int, int, int]
"""Where an expression stands in its file: first and last line, first and last column."""

_OPENS = ("trace", "generate", "pipe", "scan", "session", "edit", "invoke")
"""Methods that open a block which nnsight reads and runs itself."""


def _position(frame: FrameType) -> Position | None:
    """Where in its file a frame is making a call; None where Python keeps no columns (before 3.11)."""
    positions = getattr(frame.f_code, "co_positions", None)
    if positions is None:
        return None
    line, end_line, column, end_column = next(itertools.islice(positions(), frame.f_lasti // 2, None))
    return None if None in (line, end_line, column, end_column) else (line, end_line, column, end_column)


@functools.lru_cache(maxsize=512)
def _withs(source: str) -> tuple[tuple[ast.expr, ...], ...]:
    """For each ``with`` of a file the expressions that it enters."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:  # a notebook's magic, which is no Python
        return ()
    blocks = [node for node in nodes if isinstance(node, ast.With | ast.AsyncWith)]
    return tuple(tuple(item.context_expr for item in block.items) for block in blocks)


def _entered(filename: str, position: Position | None) -> tuple[ast.expr, ...] | None:
    """What follows an expression in the ``with`` that enters it; None if no ``with`` does."""
    for expressions in _withs(Tracer.source(filename)) if position is not None else ():
        for number, entered in enumerate(expressions):
            if (entered.lineno, entered.end_lineno, entered.col_offset, entered.end_col_offset) == position:
                return expressions[number + 1 :]
    return None


def _is_entered(frame: FrameType) -> bool:
    """Whether the call that a frame is making is what a ``with`` enters, and not a call within its block."""
    position = _position(frame)
    if position is not None:
        return _entered(frame.f_code.co_filename, position) is not None
    # In Python 3.10 what enters a value follows the call that makes it; a jump behind a long block takes several codes.
    following = (dis.opname[code] for code in frame.f_code.co_code[frame.f_lasti + 2 :: 2])
    enters = next(name for name in following if name not in ("EXTENDED_ARG", "CACHE"))
    return enters in ("SETUP_WITH", "BEFORE_WITH", "BEFORE_ASYNC_WITH")


def _calls(expression: ast.expr, methods: Sequence[str]) -> bool:
    return (
        isinstance(expression, ast.Call)
        and isinstance(expression.func, ast.Attribute)
        and expression.func.attr in methods
    )


class _Last(Tracer):
    """A tracer that must be the last of what its ``with`` enters: nnsight skips what follows, without a word."""

    position: Position | None = None

    @no_type_check  # a checker of types would stand between this and the user's frame, which is looked for by depth
    def __enter__(self) -> Any:  # as nnsight's own
        self.capture()
        self._refuse_followers()
        if skippable(self.node):
            skip_context(self)
        return self

    def _refuse_followers(self) -> None:
        assert self.info is not None
        assert self.node is not None
        frame, node = self.info.frame, self.node
        if len(node.items) == 1:
            return
        following = _entered(frame.f_code.co_filename, self.position)
        if following is None:  # the tracer was made elsewhere, or there are no columns: judge by the last expression
            last = node.items[-1].context_expr
            name = getattr(last.func if isinstance(last, ast.Call) else last, "id", "")
            value = {**frame.f_globals, **frame.f_locals}.get(name)
            is_trace = _calls(last, _OPENS) or value is self or getattr(value, "__name__", None) in _OPENS
            following = () if is_trace else (last,)
        if following:
            skipped = ", ".join(map(ast.unparse, following))
            raise SiteError(
                f"{skipped} stands after the trace in one `with`, where nnsight would skip it: it would do nothing. "
                f"Put it first: with {skipped}, model.trace(…):"
            )

    def __getstate__(self) -> Keywords:
        return {name: value for name, value in super().__getstate__().items() if name != "position"}

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        # What reads a request elsewhere has nnsight, and nothing of this library.
        original = next(base for base in type(self).__mro__ if base.__module__.startswith("nnsight"))
        return object.__new__, (original,), self.__getstate__()


class _Tracing(_Last, InterleavingTracer):
    @no_type_check  # see `_Last.__enter__`
    def invoke(self, *args: object, **kwargs: object) -> Invoker:
        return _at(_position(sys._getframe(1)), _Invoking(self, *args, **kwargs))


class _Invoking(_Last, Invoker):
    pass


class _Scanning(_Tracing, ScanningTracer):
    pass


class _Session(_Last):
    pass


class _Editing(_Last, EditingTracer):
    @no_type_check  # see `_Last.__enter__`
    def __enter__(self) -> Any:
        self.capture()
        self._refuse_followers()
        if skippable(self.node):
            skip_context(self)
        vlm = self.envoy._vlm()
        return self if self.inplace else (self, self.envoy if vlm is None else vlm.with_nnsight(self.envoy))


def _at(position: Position | None, tracer: object) -> Any:
    if isinstance(tracer, _Last):
        tracer.position = position
    return tracer


class TracedModel(TransformersModel):
    """nnsight's model, whose blocks must be the last of what their ``with`` enters.

    ``generate`` is traced only where a ``with`` enters it: nnsight looks at the line alone, and on a line that has both
    a ``with`` and a plain call it would trace the call and run nothing. In every run a trace can write to a ``gate``
    that no module computes. A model that is sent elsewhere is sent as nnsight's own class.
    """

    _computed: Sequence[ComputedGate] = ()

    def __init__(self, hf_model: object, vlm: "VLM", computed: Sequence[ComputedGate], **kwargs: object) -> None:
        super().__init__(hf_model, **kwargs)
        self._vlm = weakref.ref(vlm)
        self._computed = tuple(computed)

    @no_type_check  # see `_Last.__enter__`
    def trace(self, *args: object, tracer_cls: object = None, **kwargs: object) -> Any:
        """nnsight's ``trace``."""
        position = _position(sys._getframe(1))
        return _at(position, super().trace(*args, tracer_cls=tracer_cls or _Tracing, **kwargs))

    @no_type_check  # see `_Last.__enter__`
    def scan(self, *args: object, fn: object = None, backend: object = None, **kwargs: object) -> ScanningTracer:
        """nnsight's ``scan``."""
        tracer = _Scanning(self, "__call__" if fn is None else fn, *args, backend=backend, **kwargs)
        return _at(_position(sys._getframe(1)), tracer)

    @no_type_check  # see `_Last.__enter__`
    def session(self, *args: object, tracer_cls: object = None, **kwargs: object) -> Any:
        """nnsight's ``session``."""
        position = _position(sys._getframe(1))
        return _at(position, super().session(*args, tracer_cls=tracer_cls or _Session, **kwargs))

    @no_type_check  # see `_Last.__enter__`
    def edit(self, *, inplace: bool = False, backend: object = None) -> EditingTracer:
        """nnsight's ``edit``; what it binds as the edited model has named sites as well."""
        return _at(_position(sys._getframe(1)), _Editing(self, inplace=inplace, backend=backend))

    @no_type_check  # see `_Last.__enter__`
    def generate(self, *inputs: object, **kwargs: object) -> Any:
        """nnsight's ``generate``."""
        return self._run_or_trace("generate", sys._getframe(1), inputs, kwargs)

    @no_type_check  # see `_Last.__enter__`
    def pipe(self, *inputs: object, **kwargs: object) -> Any:
        """nnsight's ``pipe``."""
        return self._run_or_trace("pipe", sys._getframe(1), inputs, kwargs)

    def _run_or_trace(self, name: str, frame: FrameType, inputs: Sequence[object], kwargs: Keywords) -> Any:
        method = types.MethodType(inspect.unwrap(getattr(TransformersModel, name)), self)
        if self.interleaver.interleaving:
            return method(*inputs, **kwargs)
        if _is_entered(frame):
            return _at(_position(frame), super().trace(*inputs, fn=method, tracer_cls=_Tracing, **kwargs))
        return self.interleave(method, *inputs, **kwargs)

    def interleave(self, fn: object, *args: object, **kwargs: object) -> Any:
        """nnsight's ``interleave``."""
        with contextlib.ExitStack() as stack:
            for gate in self._computed:
                stack.enter_context(gate.see(_nothing))
            return super().interleave(fn, *args, **kwargs)

    # -- sent elsewhere ------------------------------------------------------------------------------------------------

    def _remoteable_class(self) -> type:
        return TransformersModel

    def __getstate__(self) -> Keywords:
        return {name: value for name, value in super().__getstate__().items() if name not in ("_vlm", "_computed")}

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return object.__new__, (TransformersModel,), self.__getstate__()


def _nothing(_: object) -> None:
    """Looks at a gate, so that it can be written to."""
