"""Cancel scopes and nurseries, in virtual time, by shorter ways than trio's.

A device's life is made of tasks and scopes that begin and end, nearly all of them in the plainest way: nested as they are written, with
nobody left inside, entered before their deadline, and cancelled by who made them. trio asks for everything else first, in many small
functions (``_core/_run.py``), which was a twentieth of what a machine's life cost. These ask whether all is plain, and leave what is not to
trio. What becomes of a scope, and of who is in it, is the same; as with `rounds`, only beside a trio that is known.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from contextvars import copy_context
from inspect import CO_COROUTINE
from types import FunctionType
from typing import Any

import trio
from outcome import Error, Outcome
from trio._core import _run as trio_run

from hmmnet.sleeping import RUN

from . import rounds

SCOPE, STATUS, NURSERY = "CancelScope", "CancelStatus", "Nursery"
"""What trio calls them."""
TheirScope: Any = getattr(trio_run, SCOPE, object)
TheirStatus: Any = getattr(trio_run, STATUS, object)
TheirNursery: Any = getattr(trio_run, NURSERY, object)


class Inheriting:
    """Before a class of trio's that is to have no heirs."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        """Nothing is said against it."""


class Status(TheirStatus):  # type: ignore[misc]
    """What the tasks in a scope are told of it."""

    __slots__ = ()

    def __init__(self: Any, scope: Any, parent: Any = None) -> None:
        self._scope = scope
        self._parent = parent
        self._children = set()  # type: ignore[var-annotated]
        self._tasks = set()  # type: ignore[var-annotated]
        self.effectively_cancelled = self.abandoned_by_misnesting = False
        if parent is not None:
            parent._children.add(self)
            if scope._cancel_called or parent.effectively_cancelled:
                self.recalculate()


class Scope(Inheriting, TheirScope):  # type: ignore[misc]
    """A cancel scope."""

    __slots__ = ()

    @trio.lowlevel.enable_ki_protection
    def __enter__(self: Any) -> Any:
        task: Any = getattr(RUN, "task", None)  # none, for who is in no run
        outer = None if task is None else task._cancel_status
        if outer is None or self._has_been_entered:
            return super().__enter__()
        self._has_been_entered = True
        timed = self._deadline != math.inf or self._relative_deadline != math.inf
        if timed:
            now_s = RUN.runner.clock.current_time()
            self._deadline = min(self._deadline, now_s + self._relative_deadline)  # one of them is given
            self._relative_deadline = math.inf
            if now_s >= self._deadline:
                self._cancel(trio_run.CancelReason(source="deadline"))
        self._cancel_status = task._cancel_status = status = Status(self, outer)
        outer._tasks.remove(task)
        status._tasks.add(task)
        if timed:
            _register(self)
        return self

    def _close(self: Any, error: BaseException | None) -> BaseException | None:
        """It is left, with `error`; what is left of that."""
        status, task = self._cancel_status, RUN.task
        outer = None if status is None or task._cancel_status is not status else status._parent
        if outer is None or status._children or len(status._tasks) > 1 or status.abandoned_by_misnesting:
            return super()._close(error)  # type: ignore[no-any-return]
        if error is not None and status.effectively_cancelled and (self._shield or not outer.effectively_cancelled):
            if not _is_cancellation(error):
                return super()._close(error)  # type: ignore[no-any-return]
            self.cancelled_caught = True
            error = None
        outer._children.remove(status)
        status._parent = self._cancel_status = None
        status._tasks.clear()
        outer._tasks.add(task)
        task._cancel_status = outer
        if self._registered_deadline != math.inf:
            _register(self)
        return error

    def _might_change_registered_deadline(self) -> AbstractContextManager[None]:
        return Registering(self)


class Nursery(Inheriting, TheirNursery):  # type: ignore[misc]
    """A nursery."""

    def start_soon(self: Any, async_fn: Any, *args: Any, name: object = None) -> None:
        """See `trio.Nursery.start_soon`: of a coroutine function of Python's, which is what it is called."""
        function = getattr(async_fn, "__func__", async_fn)
        code = function.__code__ if type(function) is FunctionType else None
        runner = RUN.runner
        if (
            self._closed
            or name is not None
            or code is None
            or not code.co_flags & CO_COROUTINE
            or runner.is_guest
            or runner.instruments["_all"]
        ):
            super().start_soon(async_fn, *args, name=name)
            return
        task = trio_run.Task._create(
            coro=async_fn(*args),
            parent_nursery=self,
            runner=runner,
            name=f"{function.__module__}.{function.__qualname__}",
            context=copy_context(),
            ki_protected=False,
        )
        runner.tasks.add(task)
        self._children.add(task)
        task._cancel_status = self._cancel_status
        self._cancel_status._tasks.add(task)
        task._next_send_fn = task.coro.send
        runner.runq.append(task)

    def _child_finished(self: Any, task: Any, outcome: Outcome[Any]) -> None:
        """A task in it has ended. Where all are cancelled already, no reason to cancel them need be written."""
        error = outcome.error if type(outcome) is Error else None  # of an abstract class: to ask whether it is an instance takes longer
        if self._closed or (error is not None and not self.cancel_scope._cancel_called):
            super()._child_finished(task, outcome)
            return
        self._children.remove(task)
        if error is not None:
            self._pending_excs.append(error)
        if not (self._children or self._nested_child_running or self._pending_starts):
            self._check_nursery_closed()


class Registering:
    """Around what changes the deadline of `scope`, or whether it counts. trio's is a generator."""

    __slots__ = ("_scope",)

    def __init__(self, scope: Any) -> None:
        self._scope = scope

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        _register(self._scope)


@trio.lowlevel.enable_ki_protection
def _register(scope: Any) -> None:
    """Its deadline stands in trio's list as long as it counts."""
    old_s = scope._registered_deadline
    over = scope._cancel_status is None or scope._cancel_called
    new_s = math.inf if over else scope._deadline
    if old_s != new_s:
        scope._registered_deadline = new_s
        runner = RUN.runner
        if old_s != math.inf:
            runner.deadlines.remove(old_s, scope)
        if new_s != math.inf:
            runner.deadlines.add(new_s, scope)
        if runner.is_guest:
            runner.force_guest_tick_asap()


def _is_cancellation(error: BaseException) -> bool:
    """Whether a cancellation, of however many tasks, is all that it is."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_cancellation, error.exceptions))
    return isinstance(error, trio.Cancelled)


OURS: tuple[tuple[Any, str, type[Any]], ...] = (
    (trio, SCOPE, Scope),
    (trio_run, SCOPE, Scope),
    (trio_run, STATUS, Status),
    (trio_run, NURSERY, Nursery),
)


def shorter() -> tuple[tuple[Any, str, type[Any]], ...]:
    """What is to stand where in place of trio's: nothing, where trio is not known."""
    return OURS if trio.__version__ in rounds.KNOWN else ()
