"""Who fails, and tries again at once, without an end.

A store to where nothing is mapped fails without a wait. A program that takes that for an accident and tries again has the machine for
itself: no other task runs, no time passes, and neither the scheduler nor the clock is ever asked (see `clock`, which counts rounds of the
one and looks at the other). But each failure is an error that is made. So errors are counted, at one and the same virtual moment, and after
a number that no honest program needs the one who meets the last of them is told. It costs nothing until something fails.
"""

from __future__ import annotations

import inspect
from types import FrameType
from typing import Any

from trio.lowlevel import in_trio_run

from hmmnet import errors
from hmmnet.errors import HmmnetError
from hmmnet.sleeping import RUN

FAILURES_MAX = 1_000_000
"""Errors at one moment: half a minute of real time of stores that fail, each of which makes two. Loads of every page of 2 GiB are fewer."""
MACHINE = tuple(f"hmmnet.{part}" for part in ("checks", "devices", "errors", "fabric", "host", "sim", "sleeping", "wire"))
"""Modules that a program calls."""
BETWEEN = ("contextlib",)
"""Modules that may stand between it and those."""
BELOW = ("outcome", "trio")
"""Modules that run tasks: a task of the machine's own has no program behind it."""


class Livelock(BaseException):
    """Tells it. No `Exception`: the loop that it is to end takes those for one more failure."""


class Failures:
    """How often something has failed at the present virtual moment."""

    def __init__(self) -> None:
        self._at_s = 0.0
        self._count = 0

    def add(self, error: HmmnetError, now_s: float) -> None:
        """One more. Raises Livelock, and begins to count anew, when those were too many."""
        if now_s != self._at_s:
            self._at_s, self._count = now_s, 0
        self._count += 1
        if self._count < FAILURES_MAX:
            return
        count, self._count = self._count, 0
        operation, place = _who(inspect.currentframe())
        raise Livelock(
            f"{operation} fails and is tried again without an end, at {place}: {count:,} failures at {now_s:g} virtual seconds, the last "
            f"of them {type(error).__name__}: {error}; no time passes between the tries, so nothing changes: sleep before the next one "
            "(trio.sleep), or give up after some"
        )


def livelock_in(error: BaseException | None) -> Livelock | None:
    """What `error` is, or is a group of."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(livelock_in, error.exceptions)), None)
    return error if isinstance(error, Livelock) else None


def _who(frame: FrameType | None) -> tuple[str, str]:
    """What a program has called that leads to `frame`, and where."""
    operation, place = "something", "an unknown place"
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(BELOW):
            break
        if not module.startswith(BETWEEN):
            place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            if not module.startswith(MACHINE):
                break
            operation = frame.f_code.co_name
        frame = frame.f_back
    return operation, place


def _made(error: HmmnetError) -> None:
    """An error was made, in a simulation or elsewhere."""
    if in_trio_run():
        clock: Any = RUN.runner.clock
        failures: Failures | None = getattr(clock, "failures", None)
        if failures is not None:
            failures.add(error, clock.now())


errors.on_made = _made
