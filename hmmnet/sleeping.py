"""Sleep, as cheap as the clock of the run makes it.

A sleep of trio's is a cancel scope that comes to its deadline: it is entered and left, registered, cancelled, and an exception goes through
the task that sleeps. In real time nobody notices. In virtual time sleeps are what most rounds of the scheduler are for, and a clock that
decides when time passes can just wake who sleeps (`WakingClock`): for a quarter of the price, at the same moments, in the same order.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from types import coroutine
from typing import Any, NoReturn

import trio
from outcome import Outcome, capture
from trio.lowlevel import Abort, Task, TrioToken, current_clock, current_task, current_trio_token, reschedule, wait_task_rescheduled

try:
    from trio._core._run import GLOBAL_RUN_CONTEXT
    from trio._core._traps import WaitTaskRescheduled
except ImportError:  # another trio: see `suspended` and `PublicRun`
    GLOBAL_RUN_CONTEXT = WaitTaskRescheduled = None  # type: ignore[assignment,misc]


class PublicRun:
    """The trio run of this thread, by trio's public names: its `task` that runs now, and its `runner`."""

    @property
    def task(self) -> Task:
        """See `current_task`."""
        return current_task()

    @property
    def runner(self) -> PublicRun:
        """Who knows the clock, and to whom `reschedule` goes."""
        return self

    @property
    def clock(self) -> trio.abc.Clock:
        """See `current_clock`."""
        return current_clock()

    reschedule = staticmethod(reschedule)


RUN: Any = PublicRun() if WaitTaskRescheduled is None else GLOBAL_RUN_CONTEXT
"""The same by trio's private name, where it has that: its public ones are functions, and a wait asks for three."""


class _Word(Outcome[None]):
    """What a task hears that is woken: nothing. Unlike an `outcome.Value` it can be said again."""

    __slots__ = ()

    def unwrap(self) -> None:
        """See `Outcome.unwrap`."""

    def send(self, gen: Generator[Any, None, object]) -> Any:
        """See `Outcome.send`."""
        return gen.send(None)

    async def asend(self, agen: AsyncGenerator[Any, None]) -> Any:
        """See `Outcome.asend`."""
        return await agen.asend(None)


WORD = _Word()
"""One for all: `reschedule` makes one for each task, if it is given none."""


@coroutine
def suspended(abort: Callable[[Any], Abort]) -> Generator[Any, Any, None]:
    """trio's `wait_task_rescheduled` with that abort function, for a wait of which nothing comes.

    trio's passes what it asks of the scheduler through two coroutines. Where its private name for that is not to be had, this is trio's.
    """
    if WaitTaskRescheduled is None:
        yield from wait_task_rescheduled(abort).__await__()  # noqa: ASYNC105 - this is how it is awaited
        return
    word = yield WaitTaskRescheduled(abort)
    if word is not WORD:
        try:
            word.unwrap()
        finally:
            del word  # an exception of a cancellation, whose traceback holds this: a circle, for garbage collection


class Suspension:
    """`suspended`, to be awaited as often as one likes."""

    __slots__ = ("_abort", "_asked")

    def __init__(self, abort: Callable[[Any], Abort]) -> None:
        self._abort = abort
        self._asked: Any = None if WaitTaskRescheduled is None else WaitTaskRescheduled(abort)

    def __await__(self) -> Generator[Any, Any, None]:
        if self._asked is None:
            yield from wait_task_rescheduled(self._abort).__await__()  # noqa: ASYNC105 - as there
            return
        word = yield self._asked
        if word is not WORD:
            try:
                word.unwrap()
            finally:
                del word  # as there


def shortest_now() -> Callable[[], float]:
    """What gives `trio.current_time` in this run by the shortest way: for who asks with each message."""
    clock = current_clock()
    now: Callable[[], float] | None = getattr(clock, "now", None)
    return clock.current_time if now is None else now


class WakingClock(trio.abc.Clock):
    """A clock that wakes tasks by itself, and whose time passes when nobody can run."""

    now: Callable[[], float]
    """As `current_time`, for who asks with each message: not counted, and no call of Python's."""

    @abstractmethod
    def jump(self, deadline_s: float) -> bool:
        """Nobody can run before `deadline_s`, unless who sleeps wakes earlier: it is that time now. False where no time comes by itself."""

    @abstractmethod
    def looked(self, times: int) -> None:
        """So many rounds of the scheduler have passed without a look at the clock."""

    @abstractmethod
    def wake_at(self, deadline_s: float, who: list[Task]) -> None:
        """Reschedule the tasks in `who` at `deadline_s`, which is not over. Whoever is taken out until then is not."""


class Bell:
    """Wakes one task that waits for it, for a while at most. Such a wait costs what a sleep does: nearly always the bell rings in time."""

    __slots__ = ("_who",)

    def __init__(self) -> None:
        self._who: list[Task] = []
        """Who waits; taken out by whoever wakes it: the bell, the clock or a cancellation."""

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for it."""
        return bool(self._who)

    def ring(self) -> bool:
        """Whether somebody waits, and goes on now."""
        if self._who:
            RUN.runner.reschedule(self._who.pop(), WORD)
            return True
        return False

    async def heard(self) -> None:
        """Return when it rings."""
        self._who = [RUN.task]
        await suspended(self._leave)

    async def heard_at_last(self) -> None:
        """Return when it rings, cancelled or not. As a shield, it falls when others do (`unshield`)."""
        self._who = [RUN.task]
        try:
            await suspended(self._stay)
        finally:
            _STAYING.pop(self, None)

    async def heard_by(self, deadline_s: float) -> None:
        """Return when it rings, or at that moment of trio's clock."""
        clock = RUN.runner.clock
        wake_at = getattr(clock, "wake_at", None)  # of a `WakingClock`: to ask an abstract class who is of its kind takes longer
        if wake_at is not None and deadline_s > clock.current_time():
            who = self._who = [RUN.task]
            wake_at(deadline_s, who)
            await suspended(self._leave)
        else:
            with trio.move_on_at(deadline_s):
                await self.heard()

    def _leave(self, _: object) -> Abort:
        self._who.clear()
        return Abort.SUCCEEDED

    def _stay(self, raise_cancel: Callable[[], NoReturn]) -> Abort:
        _STAYING[self] = current_trio_token(), raise_cancel
        return Abort.FAILED

    def unshield(self, raise_cancel: Callable[[], NoReturn]) -> None:
        """Who waits at last, and was cancelled, waits no longer."""
        if self._who:
            RUN.runner.reschedule(self._who.pop(), capture(raise_cancel))


class Completion:
    """struct completion: `trio.Event`, whose waits cost what a bell's do, and which is completed for all who wait or will."""

    __slots__ = ("_set", "_who")

    def __init__(self) -> None:
        self._set = False
        self._who: list[Task] = []

    def is_set(self) -> bool:
        """See `trio.Event`."""
        return self._set

    def set(self) -> None:
        """See `trio.Event`."""
        if not self._set:
            self._set = True
            for task in self._who:
                RUN.runner.reschedule(task, WORD)
            self._who.clear()

    async def wait(self) -> None:
        """See `trio.Event`."""
        if self._set:
            await trio.lowlevel.checkpoint()
            return
        task, who = RUN.task, self._who
        who.append(task)

        def leave(_: object) -> Abort:
            who.remove(task)
            return Abort.SUCCEEDED

        await suspended(leave)


_STAYING: dict[Bell, tuple[TrioToken, Callable[[], NoReturn]]] = {}
"""Who has been cancelled and waits on: in which run, and what it is to raise if it must not."""


def unshield() -> None:
    """Who is cancelled in this trio run, and waits on for a bell at last, waits no longer."""
    run = current_trio_token()
    for bell, (own, raise_cancel) in list(_STAYING.items()):
        if own is run:
            bell.unshield(raise_cancel)


def _asleep(wake_at: Callable[[float, list[Task]], None], deadline_s: float) -> Awaitable[None]:
    """To be awaited at once: a sleep until then, which is not over."""
    who = [RUN.task]
    wake_at(deadline_s, who)

    def leave(_: object) -> Abort:
        who.clear()
        return Abort.SUCCEEDED

    return suspended(leave)


async def sleep(seconds: float) -> None:
    """`trio.sleep`. Raises ValueError for less than nothing."""
    clock = RUN.runner.clock
    wake_at = getattr(clock, "wake_at", None)
    if seconds > 0 and wake_at is not None:
        await _asleep(wake_at, clock.current_time() + seconds)
    else:
        await trio.sleep(seconds)


async def sleep_until(deadline_s: float) -> None:
    """`trio.sleep_until`."""
    clock = RUN.runner.clock
    wake_at = getattr(clock, "wake_at", None)
    if wake_at is not None and deadline_s > clock.current_time():
        await _asleep(wake_at, deadline_s)
    else:
        await trio.sleep_until(deadline_s)
