"""Virtual time: the clock of a simulated trio run, which jumps, and that of the machine in it, whose seconds are the run's.

When no task can run, virtual time is at the next deadline. `trio.testing.MockClock` does that, too, and takes two rounds of the scheduler
and a census of all tasks for each jump; a machine's life is made of jumps. Ours is asked to `jump` whenever nobody can run, by `rounds` or,
beside an unknown trio, by the scheduler when it asks how long to sleep. Only `wait_all_tasks_blocked` comes first, as with trio's.

It also finds out when a simulation goes in circles. Tasks that ask and answer each other without an end, and without waiting for the clock,
keep it where it is: no timeout of theirs ever comes, and no limit on virtual time either. So the scheduler's rounds and looks at the clock
at one and the same moment are counted, and after a number that no honest program needs the run is cancelled. And when nobody can run and
nobody waits for the clock, shielded from the limit on virtual time, nothing will ever happen again: then the shields fall. Who never lets
the scheduler have its turn at all is found by his failures (`livelock`).
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter

import trio
from trio.lowlevel import Task

from hmmnet.fabric.clock import EmulatedClock
from hmmnet.sleeping import RUN, WORD, Bell, WakingClock, shortest_now, sleep

from .livelock import Failures
from .schedule import drop_shields, tasks_wait_for_idle, threads_at_work

LOOKS_MAX = 2_000_000
"""Rounds of the scheduler, and looks at the clock, at one moment: some ten seconds of real time, in which a thread's word has to come; on a
busy computer a thread may not run for a second. An mmap takes three rounds.
"""
FOR_EVER_S = 1e9
"""What the scheduler is told to sleep when somebody waits until all are blocked; it sleeps a day at most and asks again."""
PRUNE_MIN = 1000
_NOW: Callable[[object], float] = attrgetter("_now_s")
IDLE_S = 5.0
"""Real seconds in which a word from another thread, or a signal, may still wake somebody."""


class JumpClock(WakingClock):
    """The clock of a run; begins at 0. Cancels `scope`, once it is set, after `looks_max` looks at one moment; then `stuck` is true.

    `deadlocked` is, when only shielded tasks were left that wait for each other.
    """

    def __init__(self, looks_max: int = LOOKS_MAX) -> None:
        self.scope: trio.CancelScope | None = None
        self.now: Callable[[], float] = partial(_NOW, self)
        self.stuck = False
        self.deadlocked = False
        self.limit_s = math.inf
        """The moment at which `tellers` are asked, before anybody else acts at it; they are, too, where it goes no further."""
        self.tellers: list[Callable[[], list[str]]] = []
        """Who can say why nothing ends."""
        self.told: list[str] = []
        """What they said."""
        self.left_by: BaseException | None = None
        """What the program has left its machine with, which closes since: should that not end, this is what went wrong first."""
        self.failures = Failures()
        self._now_s = 0.0
        self._looks = 0
        self._looks_max = looks_max
        self._sleepers: list[tuple[float, int, list[Task]]] = []
        """A heap: until when who sleeps (nobody, once cancelled)."""
        self._prune_at = PRUNE_MIN
        """With which number those in whom nobody sleeps are taken out."""
        self._number = 0
        """Of the last that went to sleep."""
        self._waits_since_s: float | None = None
        """When the scheduler went to wait for others, in real seconds; None once it has looked at the clock after that."""
        self._waited_s = 0.0
        """How long it did the last time."""
        self._looks_then = 0
        """How many looks there had been when it went."""

    def start_clock(self) -> None:
        """Nothing to start."""

    def current_time(self) -> float:
        """Virtual seconds since the run began."""
        self._looks += 1
        if self._waits_since_s is not None:
            self._waited_s, self._waits_since_s = time.monotonic() - self._waits_since_s, None
        if self._looks >= self._looks_max and not self.stuck and self.scope is not None:
            self.stuck = True
            self._ask()
            self.scope.cancel()
        return self._now_s

    def looked(self, times: int) -> None:
        """See `WakingClock.looked`."""
        self._looks += times

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Nobody can run before `deadline`: time passes, or is waited for others in real time."""
        if self.jump(deadline):
            return 0.0
        return FOR_EVER_S if tasks_wait_for_idle() else self._idle()

    def jump(self, deadline_s: float) -> bool:
        """See `WakingClock.jump`. While somebody waits until all are blocked, time stands still."""
        if deadline_s <= self._now_s:
            return True
        deadline_s = min(deadline_s, self._wakes_s())
        if math.isinf(deadline_s) or tasks_wait_for_idle():
            return False
        self._now_s = deadline_s
        if deadline_s >= self.limit_s:
            self._ask()
        self._looks = 0
        while self._sleepers and self._sleepers[0][0] <= deadline_s:
            who = heapq.heappop(self._sleepers)[2]
            while who:
                RUN.runner.reschedule(who.pop(), WORD)
        return True

    def _ask(self) -> None:
        """Now, while everybody who waits still stands where it does."""
        self.limit_s = math.inf
        self.told = [line for tell in self.tellers for line in tell()]

    def _idle(self) -> float:
        """There is no deadline. How long to wait for others; who asks again after all of that, and at once, has met nobody.

        At once, because a word that comes in the last moment ends a wait that was long enough: it wakes somebody, who takes another look.
        """
        waited_s, self._waited_s = self._waited_s, 0.0
        met_nobody = waited_s >= IDLE_S and self._looks == self._looks_then + 1
        if met_nobody and not threads_at_work():
            self.deadlocked = True
            self._ask()
            drop_shields()
            return 0.0
        self._waits_since_s, self._looks_then = time.monotonic(), self._looks
        return IDLE_S

    def _wakes_s(self) -> float:
        """When the first of who sleeps wakes."""
        sleepers = self._sleepers
        while sleepers and not sleepers[0][2]:
            heapq.heappop(sleepers)
        return sleepers[0][0] if sleepers else math.inf

    def wake_at(self, deadline_s: float, who: list[Task]) -> None:
        """See `WakingClock.wake_at`."""
        self._number += 1
        heapq.heappush(self._sleepers, (deadline_s, self._number, who))
        if self._number >= self._prune_at:  # most of who may be woken later have been woken by others
            self._sleepers = [sleeper for sleeper in self._sleepers if sleeper[2]]
            heapq.heapify(self._sleepers)
            self._prune_at = self._number + len(self._sleepers) + PRUNE_MIN


@contextmanager
def telling(tell: Callable[[], list[str]]) -> Iterator[None]:
    """While the block runs, `tell` is asked why nothing ends, should that be asked."""
    clock = trio.lowlevel.current_clock()
    tellers = clock.tellers if isinstance(clock, JumpClock) else []
    tellers.insert(0, tell)
    try:
        yield
    finally:
        tellers.remove(tell)


class VirtualClock(EmulatedClock):
    """A machine's clock in a trio run in virtual time: one emulated second is one of the run's, and no sleep is too short to be slept.

    At another rate the seconds of the run stand for real ones. Whoever sleeps notices a new rate at once.
    """

    sleep_min_s = 0.0

    def __init__(self) -> None:
        super().__init__(1.0, shortest_now())
        self._sleepers: dict[Bell, None] = {}
        """What wakes who sleeps, in the order in which they went to sleep."""

    def set_rate(self, rate: float) -> None:
        """See `EmulatedClock.set_rate`."""
        super().set_rate(rate)
        self._changed()

    def adopt(self, epoch_monotonic_s: float, epoch_emulated_s: float, rate: float) -> None:
        """See `EmulatedClock.adopt`."""
        super().adopt(epoch_monotonic_s, epoch_emulated_s, rate)
        self._changed()

    def _changed(self) -> None:
        """Whoever sleeps looks again how long."""
        for bell in self._sleepers:
            bell.ring()

    def real(self, seconds: float) -> float:
        """See `EmulatedClock.real`: the run has another clock than the machine."""
        return seconds

    async def sleep_until(self, emulated_s: float) -> None:
        """See `EmulatedClock.sleep_until`."""
        while (look_s := self._look_at(emulated_s)) is not None:
            await self._nap(look_s, Bell())

    async def sleep_until_then(self, moment: Callable[[], float], bell: Bell) -> None:
        """See `EmulatedClock.sleep_until_then`."""
        while (look_s := self._look_at(moment())) is not None:
            await self._nap(look_s, bell)

    def _look_at(self, emulated_s: float) -> float | None:
        """See `EmulatedClock`: at that moment exactly; at another rate than the run's, as soon as a float can say that it has come."""
        left_s = self.real_until(emulated_s)
        if left_s <= 0:
            return None
        now_s = self._monotonic()
        return max(now_s + left_s, math.nextafter(now_s, math.inf))

    async def sleep(self, seconds: float) -> None:
        """Return so many emulated seconds later; at the rate of the run exactly when `hmmnet.sleeping.sleep` would."""
        emulated_s = self.now() + seconds
        if seconds <= 0:
            await sleep(seconds)
        elif self.rate == 1:
            await self._nap(self._monotonic() + seconds, Bell())
        await self.sleep_until(emulated_s)

    async def _nap(self, run_s: float, bell: Bell) -> None:
        """Return at that moment of the run, or when the clock has changed, or whoever has the bell rings it."""
        self._sleepers[bell] = None
        try:
            await bell.heard_by(run_s)
        finally:
            del self._sleepers[bell]
