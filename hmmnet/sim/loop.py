"""The scheduler of a run in virtual time: trio's own, less what such a run has no use for.

Before each batch of tasks trio looks for events of the world outside, and it asks five times for each task whether an instrument wants to
know of it. A simulation has neither: nobody but another thread or a signal can tell it anything, and those may wait for a few batches
(`LOOK_EVERY`). The tasks, their order and what is drawn for it are the same, so a run is the same by either loop.

This is `trio._core._run.unrolled_run` and `Runner.reschedule` of the versions in `KNOWN`, to be read beside them. With another trio, as a
guest, or with instruments, trio's own loop runs; an instrument that comes later hears only of tasks that begin and end.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import trio
from outcome import Error, Outcome, Value
from trio._core import _run as trio_run
from trio._core._traps import CancelShieldedCheckpoint, PermanentlyDetachCoroutineObject, WaitTaskRescheduled
from trio.lowlevel import enable_ki_protection

from hmmnet.sleeping import WORD

KNOWN = frozenset({"0.35.0"})
"""Versions of trio whose loop this one was made from."""
LOOK_EVERY = 16
"""Batches after which the world outside is looked at, though tasks can run."""

LOOP = "unrolled_run"
"""Whose place is taken."""

_CONTEXT: Any = trio_run.GLOBAL_RUN_CONTEXT


class ShortRunner(trio_run.Runner):
    """trio's, as short."""

    __slots__ = ()

    def reschedule(self, task: Any, next_send: Any = trio_run._NO_SEND) -> None:
        """See `Runner.reschedule`."""
        assert task._next_send_fn is None
        task._next_send_fn = task.coro.send
        task._next_send = WORD if next_send is trio_run._NO_SEND else next_send
        task._abort_func = task.custom_sleep_data = None
        self.runq.append(task)


@contextmanager
def short_loops(clock: trio.abc.Clock) -> Iterator[None]:
    """The trio run with that `clock`, which begins inside the block, is scheduled by the short loop, if this trio is known."""
    own = getattr(trio_run, LOOP)

    def chosen(runner: Any, *arguments: Any, **settings: Any) -> Generator[float, Any, None]:
        """Instruments are few: a list of all, and one for each moment that somebody wants to know of."""
        if runner.clock is clock and not runner.is_guest and len(runner.instruments) == 1:
            return short_loop(runner, *arguments)
        given: Generator[float, Any, None] = own(runner, *arguments, **settings)
        return given

    setattr(trio_run, LOOP, chosen if trio.__version__ in KNOWN else own)
    try:
        yield
    finally:
        setattr(trio_run, LOOP, own)


@enable_ki_protection
def short_loop(runner: Any, async_fn: Any, arguments: Any) -> Generator[float, Any, None]:
    """Run `async_fn` and all its tasks; yields how long to wait for events, and is sent those."""
    runner.__class__ = ShortRunner
    try:
        runner.entry_queue.wakeup.wakeup_on_signals()
        runner.clock.start_clock()
        runner.init_task = runner.spawn_impl(runner.init, (async_fn, arguments), None, "<init>", system_task=True)
        yield from _batches(runner)
    except (GeneratorExit, trio.TrioInternalError):
        raise
    except BaseException as error:
        raise trio.TrioInternalError("internal error in the loop of a simulation") from error
    finally:
        runner.close()
        _CONTEXT.__dict__.clear()
        if runner.ki_pending:
            interrupt = KeyboardInterrupt()
            if isinstance(runner.main_task_outcome, Error):
                interrupt.__context__ = runner.main_task_outcome.error
            runner.main_task_outcome = Error(interrupt)


@enable_ki_protection
def _batches(runner: Any) -> Generator[float, Any, None]:
    """All that can run now, again and again, until no task is left."""
    queue, clock, deadlines = runner.runq, runner.clock, runner.deadlines
    shuffle = trio_run._r.shuffle
    unlooked, said = 0, None
    while runner.tasks:
        timeout = 0.0 if queue else clock.deadline_to_sleep_time(deadlines.next_deadline())
        unlooked += 1
        cushion, expired = None, False
        if timeout > 0 or runner.waiting_for_idle or unlooked == LOOK_EVERY:
            unlooked, said = 0, None
            cushion = yield from _look(runner, timeout)
        now_s = clock.current_time()
        if not unlooked or (deadlines._heap and deadlines._heap[0][0] <= now_s):
            expired = deadlines.expire(now_s)  # which clears up, too: now and then is enough for that
        if cushion is not None and not expired and not queue:
            _wake_idle(runner, cushion)
        batch = list(queue)
        queue.clear()
        if len(batch) > 1:
            batch.sort(key=_counter)
            shuffle(batch)
        while batch:
            task = batch.pop()
            _CONTEXT.task = task
            send, sent = task._next_send_fn, task._next_send
            task._next_send_fn = task._next_send = None
            ended: Outcome[object] | None = None
            try:
                said = task.context.run(send, sent)
            except StopIteration as end:
                ended = Value(end.value)
            except BaseException as error:  # noqa: BLE001 - it is the task's outcome
                ended = Error(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
            if ended is None and type(said) is WaitTaskRescheduled:
                task._schedule_points += 1
                task._cancel_points += 1
                task._abort_func = said.abort_func
                if task._cancel_status.effectively_cancelled or runner.ki_pending:
                    _cancel(runner, task)
            else:
                _go_on(runner, task, ended, said)
            del _CONTEXT.task, task, send, sent, ended
            said = None


def _counter(task: Any) -> int:
    number: int = task._counter
    return number


def _look(runner: Any, timeout: float) -> Generator[float, Any, float | None]:
    """Wait for events, for so long, and take them. If there were none: for how long nobody could run, where somebody waits for that."""
    cushion = runner.waiting_for_idle.keys()[0][0] if runner.waiting_for_idle else math.inf
    idle = cushion < timeout
    events = yield min(max(0, cushion if idle else timeout), trio_run._MAX_TIMEOUT)
    runner.io_manager.process_events(events)
    return cushion if idle and not events else None


def _wake_idle(runner: Any, cushion: float) -> None:
    """Nobody could run for so long: those who wait for that go on."""
    while runner.waiting_for_idle:
        key, task = runner.waiting_for_idle.peekitem(0)
        if key[0] != cushion:
            return
        del runner.waiting_for_idle[key]
        runner.reschedule(task)


def _cancel(runner: Any, task: Any) -> None:
    """A task has begun to wait, and perhaps must not."""
    if runner.ki_pending and task is runner.main_task:
        task._attempt_delivery_of_pending_ki()
    task._attempt_delivery_of_any_pending_cancel()


def _go_on(runner: Any, task: Any, ended: Outcome[object] | None, said: Any) -> None:
    """A task has done something else than to wait."""
    if ended is not None:
        runner.task_exited(task, ended)
        return
    task._schedule_points += 1
    if said is CancelShieldedCheckpoint:
        runner.reschedule(task)
    elif type(said) is PermanentlyDetachCoroutineObject:
        runner.task_exited(task, said.final_outcome)
    else:
        runner.reschedule(task, TypeError(f"trio.run received {said!r}: is that from another framework, such as asyncio?"))
        task._next_send_fn = task.coro.throw
