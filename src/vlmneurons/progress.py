"""Progress: a bar for one loop, or one bar over the steps of a study, which says how long the whole will still take.

The cost of a unit differs a hundredfold between the steps of a study, so their bar counts time. The time of a unit is
measured once its step has run; before that, it is estimated in forwards of the model, whose speed earlier steps
measure.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


class Step:
    """One step of several, which a function takes as its ``progress``: it reports its units here.

    Args:
        name: what is being done.
        total: how many units there are, as far as that is known.
        forwards: the cost of one unit in forwards of one question, until it is measured.
        seconds: its further cost in seconds.
        unit: the name of a unit.
    """

    def __init__(self, name: str, total: float, *, forwards: float = 0.0, seconds: float = 0.0, unit: str = "") -> None:
        self.name, self.total, self.forwards, self.seconds, self.unit = name, float(total), forwards, seconds, unit
        self.n = self.measured = self.spent = 0.0
        self.began: float | None = None
        self.changed: Callable[[], None] = lambda: None

    def start(self, total: float, initial: float = 0, unit: str = "") -> "Step":
        """Begin the step: ``total`` units, of which ``initial`` were done before."""
        self.total, self.n, self.unit = float(total), float(initial), unit or self.unit
        self.measured, self.began = 0.0, time.monotonic()
        self.changed()
        return self

    def update(self, n: float = 1) -> None:
        """Count ``n`` more units as done."""
        self.n += n
        self.measured += n
        self.changed()

    def finish(self) -> None:
        """End the step, whatever was counted; also one that an earlier run had finished."""
        if self.began is not None:
            self.spent += time.monotonic() - self.began
            self.began = None
        self.n = self.total
        self.changed()

    def set_postfix(self, *_: object, **__: object) -> None:
        """Do nothing: a bar of tqdm has this method, and here is no room for more text."""

    def __enter__(self) -> "Step":
        return self

    def __exit__(self, *_: object) -> None:
        self.changed()

    def seconds_so_far(self) -> float:
        """How long it has run in this process."""
        return self.spent + (0.0 if self.began is None else time.monotonic() - self.began)


class Steps:
    """One bar over several steps, with an estimate of the time that is left for all of them.

    Args:
        steps: in their order.
        disable: show nothing.

    Example:
        ``with Steps([Step("record", 100, forwards=1), …]) as steps: record_items(…, progress=steps["record"])``
    """

    def __init__(self, steps: Sequence[Step], *, disable: bool = False) -> None:
        self.steps = list(steps)
        self._bar = tqdm(total=1.0, disable=disable, bar_format="{desc}{percentage:3.0f}%|{bar}| {unit}", unit="")
        self._began, self._shown = time.monotonic(), 0.0
        self._logs = contextlib.ExitStack()
        for step in self.steps:
            step.changed = self._refresh

    @property
    def hidden(self) -> bool:
        """Whether nothing is shown."""
        return bool(self._bar.disable)

    def __getitem__(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)

    def __enter__(self) -> "Steps":
        self._logs.enter_context(_logs_above(self.hidden))
        return self

    def __exit__(self, *_: object) -> None:
        self._refresh(now=True)
        self._bar.close()
        self._logs.close()

    def per_forward(self) -> float | None:
        """Seconds that a forward of one question takes, from the steps that have run; None before any has."""
        measured = [step for step in self.steps if step.forwards and step.measured]
        forwards = sum(step.forwards * step.measured for step in measured)
        return sum(step.seconds_so_far() for step in measured) / forwards if forwards else None

    def costs(self) -> list[float] | None:
        """Seconds that a unit of each step takes: measured where the step has run long enough, else estimated."""
        speed = self.per_forward()
        if speed is None and any(step.forwards for step in self.steps):
            return None
        return [
            step.seconds_so_far() / step.measured
            if step.measured and (step.seconds_so_far() > 2 or step.n >= step.total)
            else step.forwards * (speed or 0.0) + step.seconds
            for step in self.steps
        ]

    def left(self) -> float | None:
        """About how many seconds are left; None while nothing was measured."""
        costs = self.costs()
        if costs is None:
            return None
        return sum(cost * max(0.0, step.total - step.n) for cost, step in zip(costs, self.steps, strict=True))

    def share(self) -> float:
        """The share of the work that is done, by time."""
        costs = self.costs() or [step.forwards + step.seconds for step in self.steps]
        total = sum(cost * step.total for cost, step in zip(costs, self.steps, strict=True))
        done = sum(cost * min(step.n, step.total) for cost, step in zip(costs, self.steps, strict=True))
        return done / total if total else 1.0

    def _refresh(self, now: bool = False) -> None:
        if self.hidden or (not now and time.monotonic() - self._shown < 0.2):
            return
        self._shown = time.monotonic()
        at = next((step for step in self.steps if step.n < step.total), self.steps[-1])
        left, gone = self.left(), time.monotonic() - self._began
        ahead = "?" if left is None else tqdm.format_interval(left)
        self._bar.set_description_str(f"{at.name}: ", refresh=False)
        counted = f"{at.n:,.0f}/{at.total:,.0f} {at.unit}, " if at.unit else ""
        self._bar.unit = f"{counted}{tqdm.format_interval(gone)} gone, about {ahead} left"  # a postfix begins with ", "
        self._bar.n = self.share()
        self._bar.refresh()


Progress = bool | Step
"""Whether a function shows a bar; or, where it is one step of a longer work, that step."""


def progress_bar(progress: Progress, total: int, *, initial: int = 0, unit: str = "it", **tqdm_options: object) -> Any:
    """A tqdm bar, or the step of a study, which begins: both are context managers with ``update`` and ``set_postfix``.

    Args:
        progress: see `Progress`.
        total: how many units there are.
        initial: how many were done before.
        unit: the name of a unit.
        **tqdm_options: further arguments of tqdm.
    """
    if isinstance(progress, Step):
        return progress.start(total, initial, f"{unit}s")
    return _Bar(total=total, initial=initial, unit=unit, disable=not progress, **{"desc": f"{unit}s", **tqdm_options})


class _Bar(tqdm):
    """A bar; while it is shown, lines of the log are written above it, not into it."""

    def __enter__(self) -> "_Bar":
        self._logs = contextlib.ExitStack()
        self._logs.enter_context(_logs_above(bool(self.disable)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self._logs.close()


def _logs_above(hidden: bool) -> contextlib.AbstractContextManager[None]:
    """While this context is open, loggers write to the terminal above the bar."""
    shown = [
        logger
        for logger in (logging.getLogger(), logging.getLogger("vlmneurons"))
        if any(getattr(handler, "stream", None) in (sys.stdout, sys.stderr) for handler in logger.handlers)
    ]
    return contextlib.nullcontext() if hidden or not shown else logging_redirect_tqdm(shown, tqdm)
