"""Wait for a message without a turn of trio's loop, where the loop would do nothing but wait.

A wait in trio is a change of its epoll set, a pass through its loop and a turn of its scheduler: some 10 us at each end of a round trip of
80. When no other task can run, all of that is there to sleep in the kernel until something happens. So sleep here instead, on two
descriptors: the socket's, and trio's own epoll set, which is readable when anything that trio waits for has happened. Nothing is held up:

- another socket, a signal, a word from another thread: the set is readable at once, and the wait goes on in the loop;
- a task that could run: then there is no short wait. An `Instrument` counts them. One is excused: the reading task that the waiting task
  stands in for, which would only look whether somebody does (`reading.py`);
- a deadline: it comes up to `WAIT_S` late, as no wait begins when one is over. trio rounds its own waits up to whole milliseconds;
- what else trio does when it passes through its loop: it does so after `SHORT_MAX` short waits and spared yields at the latest.

It is no spinning: asking the socket again and again instead made the round trip two to five times as long, because the io threads of both
ends need the processors. Who waited in vain does not try again until a message has come within `WAIT_S` and before anything else. Beside
bulk data only those who wait for bulk data wait shortly: credits would end each of the others', and requests would take half as long again.
That bulk data move is seen by the sockets that they pass, for `BULK_S`; where streams tell when they begin and end (`BulkStream`), it is
over with the last of them.

The same knowledge spares a yield that nobody needs (`Loop.undisturbed`): with frames of 1 MiB, waits and yields together are a third of
what a process spends on each.

trio has no public names for its epoll set and for its next deadline. Where they cannot be found (another trio, another system, a guest of
another loop), all waits are the loop's.
"""

from __future__ import annotations

import select
import weakref
from collections.abc import Callable
from time import perf_counter
from typing import Any

from trio import lowlevel
from trio.abc import Instrument

try:
    from trio._core._run import GLOBAL_RUN_CONTEXT
except ImportError:  # another trio: see above
    _RUNNING: Any = None
else:
    _RUNNING = GLOBAL_RUN_CONTEXT

WAIT_S = 0.001
"""The longest short wait; the smallest that epoll knows. The far end of a round trip answers in a tenth of it."""
TURNS_MAX = 2
"""Passes through the loop during a wait with nothing else to do: one for the reading task to look (`reading.py`), one to sleep."""
SHORT_MAX = 256
"""Short waits and spared yields in a row, between two passes through the loop: a long wait more or less among so many costs nothing."""
BULK_S = 0.01
"""So long after bulk data moved there are no short waits."""
_UNKNOWN = 1 << 40

_LOOP: lowlevel.RunVar[Loop | None] = lowlevel.RunVar("hmmnet.wire.shortwait")
_LATEST: list[Callable[[], Loop | None]] = [lambda: None]
"""Which was asked for last, as long as it is there: each message asks for its run's, several times."""


class Loop(Instrument):
    """What has to be known of one trio run: its epoll set, its deadlines, and how many tasks could run."""

    def __init__(self, run: object, descriptor: int, next_deadline: Callable[[], float], sleep_time: Callable[[float], float]) -> None:
        self.run = run
        """What trio knows it by."""
        self.descriptor = descriptor
        self._next_deadline = next_deadline
        self._sleep_time = sleep_time
        self.runnable = _UNKNOWN
        """Beside the task that runs; unknown until the loop has been idle for the first time."""
        self.excused = 0
        """Of those, how many need not run while the task that runs waits shortly (`reading.py`)."""
        self.turns = 0
        """Passes through the loop so far."""
        self.bulk_s = -BULK_S
        """When somebody last sent or received bulk data or credits, or waited for them."""
        self._streams: int | None = None
        """Streams of bulk data that are under way; None until one has told."""
        self._short = 0
        """Short waits and spared yields since the last of them."""
        self._events = select.poll()
        self._events.register(descriptor, select.POLLIN)

    def task_scheduled(self, task: lowlevel.Task) -> None:  # noqa: ARG002 - Instrument's
        """One more can run."""
        self.runnable += 1

    def before_task_step(self, task: lowlevel.Task) -> None:  # noqa: ARG002 - Instrument's
        """One of them runs."""
        self.runnable -= 1

    def before_io_wait(self, timeout: float) -> None:
        """trio looks for events, which wake tasks, and then at deadlines. When it might sleep, nobody can run before."""
        self.turns += 1
        self._short = 0
        if timeout > 0:
            self.runnable = 0

    @property
    def bulk_expected(self) -> bool:
        """Whether a socket for bulk data may have any, for all that is known."""
        return self._streams != 0

    def stream_began(self) -> None:
        """One of bulk data."""
        self._streams = (self._streams or 0) + 1

    def stream_ended(self) -> None:
        """One that had begun."""
        assert self._streams, "no stream is under way"
        self._streams -= 1
        if not self._streams:
            self.bulk_s = -BULK_S

    def due(self) -> bool:
        """Whether the loop has something to do that no descriptor tells of: somebody's time has come, or it was not passed for long."""
        self._short += 1
        return self._short > SHORT_MAX or self._sleep_time(self._next_deadline()) <= 0

    def undisturbed(self) -> bool:
        """Whether nobody could use a turn now: no task can run, no deadline is over, and nothing that trio waits for has happened."""
        return self.runnable <= self.excused and not self.due() and not self._events.poll(0)


def this_loop() -> Loop | None:
    """That of the run that the caller is in; None where there are no short waits."""
    loop = known_loop()
    if loop is None and (loop := _found()) is not None:
        _LOOP.set(loop)
        lowlevel.add_instrument(loop)
    return loop


def known_loop() -> Loop | None:
    """`this_loop`, if somebody in this run has short waits."""
    loop = _LATEST[0]()
    if loop is None or loop.run is not getattr(_RUNNING, "runner", None):
        loop = _LOOP.get(None)
        if loop is not None:
            _LATEST[0] = weakref.ref(loop)
    return loop


def _found() -> Loop | None:
    runner: Any = getattr(_RUNNING, "runner", None)
    events = getattr(getattr(runner, "io_manager", None), "_epoll", None)
    next_deadline = getattr(getattr(runner, "deadlines", None), "next_deadline", None)
    if getattr(runner, "is_guest", True) or not isinstance(events, select.epoll) or next_deadline is None:
        return None
    return Loop(runner, events.fileno(), next_deadline, lowlevel.current_clock().deadline_to_sleep_time)


class BulkStream:
    """A stream of bulk data is under way from now on, until `end`. Where nobody waits shortly, nobody has to know."""

    __slots__ = ("_loop",)

    def __init__(self) -> None:
        self._loop = known_loop()
        if self._loop is not None:
            self._loop.stream_began()

    def end(self) -> None:
        """It is over; a second time does nothing."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.stream_ended()


class ShortWait:
    """Short waits for `descriptor`, of which one task at a time may be in."""

    def __init__(self, descriptor: int, *, bulk: bool = False) -> None:
        self._descriptor = descriptor
        self._bulk = bulk
        self._large_s = -BULK_S
        """When large data last went through here."""
        self._loop: Loop | None = None
        self._both: select.epoll | None = None
        self.worthwhile = False
        """Whether a message came within `WAIT_S` the last time, and nothing else before it."""
        self._began_s = 0.0
        self._began_turns = 0

    def wait(self) -> bool:
        """Return True when the descriptor is readable, False when to wait is the loop's business. Blocks for `WAIT_S` at most."""
        loop = this_loop()
        if loop is None or loop.runnable > loop.excused or loop.due():
            return False
        for_bulk = self._for_bulk(loop, perf_counter())
        if for_bulk is None:
            self.worthwhile = False
            return False
        both = self._both if loop is self._loop else self._watch(loop)
        if both is None:
            return False
        ready = both.poll(WAIT_S)
        found = len(ready) == 1 and ready[0][0] == self._descriptor
        self.worthwhile = found or (for_bulk and not ready)
        return found

    def undisturbed(self, *, large: bool = False) -> bool:
        """`moved`, and whether nobody could use a turn of this loop now; False where that is not known."""
        loop = known_loop()
        if loop is None:
            return False
        if self._bulk or large:
            self._mark(loop, large=large)
        return loop.undisturbed()

    def moved(self, *, large: bool = False) -> None:
        """Something is being sent or received: bulk data, if that is what this socket is for, or if it is `large`."""
        if (self._bulk or large) and (loop := known_loop()) is not None:
            self._mark(loop, large=large)

    def _mark(self, loop: Loop, *, large: bool) -> None:
        if large or loop.bulk_expected:
            loop.bulk_s = perf_counter()
            if large:
                self._large_s = loop.bulk_s

    def begin_long(self) -> None:
        """The caller begins to wait in the loop."""
        loop = this_loop()
        self._began_s, self._began_turns = perf_counter(), 0 if loop is None else loop.turns
        if loop is not None and self._bulk and loop.bulk_expected:
            loop.bulk_s = self._began_s

    def end_long(self) -> None:
        """That wait has ended, because the descriptor is readable: was it one that could have been short?"""
        loop = this_loop()
        if loop is None:
            return
        now_s = perf_counter()
        for_bulk = self._for_bulk(loop, now_s)
        alone = loop.turns - self._began_turns <= TURNS_MAX
        self.worthwhile = alone and for_bulk is not None and (for_bulk or now_s - self._began_s < WAIT_S)

    def _for_bulk(self, loop: Loop, now_s: float) -> bool | None:
        """Whether this wait is for bulk data, which says so to all others; None when it should not be short: others move some, or none is
        expected here.
        """
        if self._bulk and not loop.bulk_expected:
            return None
        if self._bulk or now_s - self._large_s < BULK_S:
            loop.bulk_s = now_s
            return True
        return False if now_s - loop.bulk_s >= BULK_S else None

    def _watch(self, loop: Loop) -> select.epoll | None:
        self.close()
        both = select.epoll()
        both.register(self._descriptor, select.EPOLLIN)
        both.register(loop.descriptor, select.EPOLLIN)
        self._loop, self._both = loop, both
        return both

    def close(self) -> None:
        """Give the set back; the descriptor is somebody else's."""
        if self._both is not None:
            self._both.close()
        self._both = self._loop = None
