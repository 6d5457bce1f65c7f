"""Who fails, and tries again at once, without an end.

A store to where nothing is mapped fails without a wait. A program that takes that for an accident and tries again has the machine for
itself: no other task runs, no time passes, and neither the scheduler nor the clock is ever asked (see `clock`, which counts rounds of the
one and looks at the other). But each failure is an error that is made. So errors are counted, at one and the same virtual moment, and after
a number that no honest program needs the one who meets the last of them is told, and from then on at each further one, until it leaves its
machine. It costs nothing until something fails.

Not found: a loop that takes *every* BaseException for a failure and has no end of its own (nothing raised in it ends it), and one that
fails with errors that are not hmmnet's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from types import FrameType
from typing import Any

from trio.lowlevel import current_task, in_trio_run

from hmmnet import errors
from hmmnet.errors import HmmnetError
from hmmnet.sleeping import RUN

from .waits import all_tasks

FAILURES_MAX = 1_000_000
"""Errors at one moment: half a minute of real time of stores that fail, each of which makes two. Loads of every page of 2 GiB are fewer."""
MACHINE = tuple(f"hmmnet.{part}" for part in ("checks", "devices", "errors", "fabric", "faults", "host", "sim", "sleeping", "wire"))
"""Modules that a program calls."""
BETWEEN = ("contextlib",)
"""Modules that may stand between it and those."""
BELOW = ("hmmnet.sim.rounds", "outcome", "trio")
"""Modules that run tasks: a task of the machine's own has no program behind it."""
CALLERS_SHOWN = 4


class Livelock(BaseException):
    """Tells it. No `Exception`: the loop that it is to end takes those for one more failure."""


class Failures:
    """How often something has failed at the present virtual moment."""

    def __init__(self) -> None:
        self.first: Livelock | None = None
        """The first that was raised; also where somebody has swallowed it."""
        self._again = False
        self._at_s = 0.0
        self._count = 0

    def add(self, error: HmmnetError, now_s: float) -> None:
        """One more. Raises Livelock when those were too many, and then for each further one."""
        if self._again:
            raise Livelock(str(self.first))
        if now_s != self._at_s:
            self._at_s, self._count = now_s, 0
        self._count += 1
        if self._count < FAILURES_MAX:
            return
        self._again, self._count = True, 0
        livelock = Livelock(
            f"{_who()}: {FAILURES_MAX:,} failures at {now_s:g} virtual seconds, the last of them {type(error).__name__}: {error}; no time "
            "passes between the tries, so nothing changes: sleep before the next one (trio.sleep), or give up after some"
        )
        self.first = self.first or livelock
        raise livelock

    def begin_anew(self) -> None:
        """The program has left its machine: what fails as that closes is nobody's next try."""
        self._again, self._count = False, 0


def _who() -> str:
    """What a program calls again and again, and where: the one that runs, or else the one that waits for a task that does."""
    found = _call(_outwards(inspect.currentframe()))
    if found is not None:
        return _again(*found)
    asleep = (task for task in all_tasks() if task is not current_task())
    calls = [call for task in asleep if (call := _call([frame for frame, _ in task.iter_await_frames()][::-1])) is not None]
    if len(calls) == 1:
        return _again(*calls[0])
    shown = "; ".join(f"{operation} at {place}" for operation, place in calls[:CALLERS_SHOWN])
    waits = f"those that wait for the machine: {shown}{'; ...' * (len(calls) > CALLERS_SHOWN)}" if calls else "nobody waits for the machine"
    return _again("something", f"a place that is not known: a task of the machine's own fails ({waits})")


def _again(operation: str, place: str) -> str:
    return f"{operation} fails and is tried again without an end, at {place}"


def _outwards(frame: FrameType | None) -> Iterable[FrameType]:
    """`frame` and its callers, up to who runs the task."""
    while frame is not None and not _in(frame, BELOW):
        yield frame
        frame = frame.f_back


def _call(frames: Iterable[FrameType]) -> tuple[str, str] | None:
    """What a program has called of the machine, and where. `frames`: of a task, from the inside out; None where that is in no call."""
    operation = None
    for frame in frames:
        if _in(frame, MACHINE) and not _in(frame, BELOW):
            operation = frame.f_code.co_name
        elif not _in(frame, BETWEEN + BELOW):
            return None if operation is None else (operation, f"{frame.f_code.co_filename}:{frame.f_lineno}")
    return None


def _in(frame: FrameType, modules: tuple[str, ...]) -> bool:
    """Whether its code is of one of `modules`, or of what is in those."""
    name = str(frame.f_globals.get("__name__", ""))
    return any(name == module or name.startswith(module + ".") for module in modules)


def _made(error: HmmnetError) -> None:
    """An error was made, in a simulation or elsewhere."""
    if in_trio_run():
        clock: Any = RUN.runner.clock
        failures: Failures | None = getattr(clock, "failures", None)
        if failures is not None:
            failures.add(error, clock.now())


errors.on_made = _made
