"""Rounds of the scheduler, in virtual time, for which nobody asks the operating system.

In each round trio looks whether a file is ready, which deadlines are over and whom it has to tell, and sorts and shuffles who may run. A
simulated machine waits for no file (only a thread's word, or a signal, comes by one), its time passes in jumps, and in most rounds one task
may run. So here rounds, and the jumps of the clock between them, follow each other without that, up to `ROUNDS_MAX` of them, in one round
of trio's own loop, which has just heard what its files say. All that was a fifteenth of what a machine's life cost.

Who runs when, drawn from the same seed, and what each task hears is as in trio (``_core/_run.py``, `unrolled_run`): a run has the same
trace either way, which a test compares. The steps of tasks were made after the versions in `KNOWN`; beside another trio, and with a clock
that does not jump, all rounds are trio's own.
"""

from __future__ import annotations

from functools import cache
from operator import attrgetter
from typing import Any

import trio
from outcome import Error, Outcome, Value
from trio._core import _run as trio_run
from trio._core import _traps

from hmmnet.sleeping import WORD, WakingClock

KNOWN = ("0.35.0",)
"""Of trio: those that take the steps of tasks as it is done here. Before another is added: compare its `unrolled_run` with `_rounds`."""
ROUNDS_MAX = 64
"""Rounds in a row without a look at files: some milliseconds. The word of a thread, or of a signal, is seen in the next round."""
FILES = "TheIOManager"
"""What trio calls the class that waits for files."""

BREAKERS = "GLOBAL_PARKING_LOT_BREAKER"
"""What trio calls the tasks with whose end a parking lot breaks."""

_counter = attrgetter("_counter")
_BREAKERS: Any = getattr(trio_run, BREAKERS, {})


class Rounds:
    """In front of trio's class that waits for files (`theirs`)."""

    theirs: Any

    def process_events(self, events: Any) -> None:
        """Wake who waits for those files, and take the rounds that follow."""
        if events:
            self.theirs.process_events(self, events)
        runner = trio_run.GLOBAL_RUN_CONTEXT.runner
        if isinstance(runner.clock, WakingClock):
            _rounds(runner, runner.clock)


def files() -> Any:
    """What is to stand where trio's class does that waits for files; trio's itself, where its rounds are not known."""
    theirs: Any = getattr(trio_run, FILES)
    if trio.__version__ not in KNOWN or issubclass(theirs, Rounds):  # a simulation is under way beside or around this one
        return theirs
    return _before(theirs)


@cache
def _before(theirs: Any) -> Any:
    return type("Files", (Rounds, theirs), {"theirs": theirs})


def _rounds(runner: Any, clock: WakingClock) -> None:
    """In each round who can run now does, in an order that is drawn; when nobody can, time passes.

    Until a word from outside has come (`words`), which trio hears by a file.
    """
    context, runq, deadlines, instruments = trio_run.GLOBAL_RUN_CONTEXT, runner.runq, runner.deadlines, runner.instruments
    words, rounds = runner.entry_queue, 0
    while rounds < ROUNDS_MAX:
        if words.queue or words.idempotent_queue or not (runq or _pass_time(runner, clock)):
            break
        rounds += 1
        if deadlines._heap and deadlines._heap[0][0] <= clock.now():
            deadlines.expire(clock.now())
        batch = list(runq)
        runq.clear()
        if len(batch) > 1:
            batch.sort(key=_counter)
            trio_run._r.shuffle(batch)
        for task in reversed(batch):
            context.task = task
            if "before_task_step" in instruments:
                instruments.call("before_task_step", task)
            go_on, word = task._next_send_fn, task._next_send
            task._next_send_fn = task._next_send = None
            asked = None
            ended: Outcome[Any] | None = None
            try:
                asked = task.context.run(go_on, word)
            except StopIteration as stop:
                ended = Value(stop.value)
            except BaseException as error:  # noqa: BLE001 - it is the task's, and goes to its nursery
                ended = Error(error.with_traceback(_without_ours(error)))
            if type(asked) is _traps.WaitTaskRescheduled:
                task._schedule_points += 1
                task._cancel_points += 1
                task._abort_func = asked.abort_func
                if task._cancel_status.effectively_cancelled or runner.ki_pending:
                    _interrupted(runner, task)
            else:
                _does_not_wait(runner, task, asked, ended)
            if "after_task_step" in instruments:
                instruments.call("after_task_step", task)
            del context.task
    clock.looked(rounds)


def _pass_time(runner: Any, clock: WakingClock) -> bool:
    """Nobody can run, so it is as late as the next of them waits for. False where that is not ours to say; a guest's host has to hear."""
    return not runner.is_guest and clock.jump(runner.deadlines.next_deadline())


def _interrupted(runner: Any, task: Any) -> None:
    """A task waits that was cancelled, or is to hear of a Ctrl-C."""
    if runner.ki_pending and task is runner.main_task:
        task._attempt_delivery_of_pending_ki()
    if task._cancel_status.effectively_cancelled:
        task._attempt_delivery_of_any_pending_cancel()


def _without_ours(error: BaseException) -> Any:
    """Where it was raised, less the frames of whoever ran the task."""
    trace = error.__traceback__
    for _ in range(1 + trio_run.CONTEXT_RUN_TB_FRAMES):
        trace = trace if trace is None else trace.tb_next
    return trace


def _does_not_wait(runner: Any, task: Any, asked: Any, ended: Outcome[Any] | None) -> None:
    """A task has ended, lets others run, leaves the run for another, or has awaited what is not trio's."""
    if ended is not None:
        _exited(runner, task, ended)
        return
    task._schedule_points += 1
    if asked is _traps.CancelShieldedCheckpoint:
        runner.reschedule(task, WORD)
        return
    if type(asked) is _traps.PermanentlyDetachCoroutineObject:
        runner.task_exited(task, asked.final_outcome)
        return
    why = f"trio.run received unrecognized yield message {asked!r}. Are you trying to use a library written for some other framework?"
    runner.reschedule(task, TypeError(why))
    task._next_send_fn = task.coro.throw


def _exited(runner: Any, task: Any, outcome: Outcome[Any]) -> None:
    """trio's `Runner.task_exited`, which is asked where a task leaves something behind, is the run's own, or is watched."""
    status, nursery = task._cancel_status, task._parent_nursery
    leaves = task._child_nurseries or task in _BREAKERS or status is None or status.abandoned_by_misnesting
    if leaves or nursery is None or task is runner.main_task or "task_exited" in runner.instruments:
        runner.task_exited(task, outcome)
        return
    status._tasks.remove(task)
    task._cancel_status = None
    runner.tasks.remove(task)
    nursery._child_finished(task, outcome)
