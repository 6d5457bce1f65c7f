"""Scopes and nurseries that go shorter ways than trio's: they end when trio's do, as trio's do."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import partial
from typing import Any
from unittest.mock import AsyncMock

import pytest
import trio
import trio.testing

from hmmnet.sim import rounds, run_virtual
from hmmnet.sim.clock import JumpClock
from hmmnet.sim.schedule import seeded
from hmmnet.sim.scopes import OURS


@pytest.fixture(params=["ours", "trio's"])
def whose(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose scopes a run has."""
    if request.param != "ours":
        monkeypatch.setattr(rounds, "KNOWN", ())
    return str(request.param)


def test_scopes_end_at_their_deadlines(whose: str) -> None:
    """Also those that are moved, early or late, are taken away, or lie within each other; and nothing of them is left in trio's list."""

    async def main() -> tuple[list[float], int, int]:
        ends: list[float] = []

        async def ends_at(scope: trio.CancelScope, moves: dict[float, float]) -> None:
            async def move() -> None:
                for at_s, deadline_s in moves.items():
                    await trio.sleep_until(at_s)
                    scope.deadline = deadline_s

            async with trio.open_nursery() as nursery:
                nursery.start_soon(move)
                with scope:
                    await trio.sleep(50.0)
                ends.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ends_at, trio.CancelScope(deadline=3.0), {})
            nursery.start_soon(ends_at, trio.CancelScope(deadline=3.0), {1.0: 2.0})
            nursery.start_soon(ends_at, trio.CancelScope(deadline=3.0), {1.0: 5.0, 4.0: 9.0})
            nursery.start_soon(ends_at, trio.CancelScope(), {1.0: 0.5})
            nursery.start_soon(ends_at, trio.CancelScope(deadline=8.0), {1.0: float("inf")})
            with trio.move_on_after(6.0), trio.move_on_after(7.0):
                await trio.sleep(50.0)
            ends.append(trio.current_time())
        runner = trio.lowlevel.current_task()._runner
        return ends, runner.deadlines._active, len([one for one in runner.deadlines._heap if one[0] == one[2]._registered_deadline])

    assert run_virtual(main, limit_s=float("inf")) == ([1.0, 2.0, 3.0, 6.0, 9.0, 50.0], 0, 0)


def test_a_scope_can_be_cancelled_before_any_run(whose: str) -> None:
    """There is no list to be in, then."""

    async def main(scope: trio.CancelScope) -> bool:
        with scope:
            await trio.sleep(1.0)
        return scope.cancelled_caught

    with seeded(1):
        scope = trio.CancelScope(deadline=5.0)
        scope.cancel()
    assert run_virtual(main, scope)


def test_a_guest_run_hears_of_a_deadline(whose: str) -> None:
    """Its host sleeps for as long as it was told, unless it is woken."""
    todo: deque[Callable[[], object]] = deque()
    ended: list[float] = []

    async def main() -> float:
        with trio.move_on_after(2.0):
            await trio.sleep_forever()
        return trio.current_time()

    with seeded(1):
        trio.lowlevel.start_guest_run(
            main,
            run_sync_soon_threadsafe=todo.append,
            done_callback=lambda outcome: ended.append(outcome.unwrap()),
            clock=JumpClock(),
        )
        gives_up_s = time.monotonic() + 30.0
        while not ended and time.monotonic() < gives_up_s:
            if todo:
                todo.popleft()()
    assert ended == [2.0]


def test_what_a_scope_lets_through(whose: str) -> None:
    """A cancellation that it made, of one task or of many, and nothing else; which scope of several it was that made it."""

    async def fail(error: Exception) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise error

    async def inner(outer: trio.CancelScope, *, shield: bool) -> list[bool]:
        with trio.CancelScope(shield=shield) as scope:
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(trio.sleep_forever)
                outer.cancel()
                if shield:
                    await trio.sleep(1.0)
                    scope.cancel()
                await trio.sleep_forever()
        return [scope.cancelled_caught]

    async def main() -> list[object]:
        said: list[object] = []
        for shield in (False, True):
            with trio.CancelScope() as outer:
                said += await inner(outer, shield=shield)
                await trio.lowlevel.checkpoint()
                said.append("not stopped")
            said.append(outer.cancelled_caught)
        with pytest.raises(ExceptionGroup) as raised:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                nursery.start_soon(fail, ValueError("while it is cancelled"))
                await trio.sleep(1.0)
                raise KeyError("first")
        said.append(sorted(map(repr, raised.value.exceptions)))
        with trio.CancelScope() as early:
            early.cancel()
            with trio.CancelScope() as late, trio.move_on_at(trio.current_time()):
                await trio.lowlevel.checkpoint()
        return [*said, early.cancelled_caught, late.cancelled_caught]

    first = ["KeyError('first')", "ValueError('while it is cancelled')"]
    assert run_virtual(main) == [True, True, True, first, True, False]


def test_scopes_that_are_not_nested_are_told_so(whose: str) -> None:
    """As by trio: whoever leaves the outer one first hears of it, and who leaves one twice."""

    async def main() -> None:
        outer, inner = trio.CancelScope(), trio.CancelScope()
        outer.__enter__()
        inner.__enter__()
        with pytest.raises(RuntimeError, match="that's still within its child"):
            outer.__exit__(None, None, None)
        inner.__exit__(None, None, None)
        with pytest.raises(RuntimeError, match="already been exited"):
            inner.__exit__(None, None, None)
        with pytest.raises(RuntimeError, match="only be used for a single"), inner:
            pass
        with trio.CancelScope():
            await trio.lowlevel.checkpoint()

    run_virtual(main)


def test_trios_own_stand_where_they_stood(whose: str) -> None:
    """After a run, and beside a trio that is not known."""
    theirs = [getattr(place, name) for place, name, _ in OURS]
    ours = [shorter for *_, shorter in OURS] if whose == "ours" and trio.__version__ in rounds.KNOWN else theirs
    with seeded(1):
        assert [getattr(place, name) for place, name, _ in OURS] == ours
    assert [getattr(place, name) for place, name, _ in OURS] == theirs


def test_a_scope_in_no_run_is_told_so() -> None:
    """As by trio, also while another thread's simulation is under way."""
    with seeded(1), pytest.raises(RuntimeError, match="must be called from async context"):
        trio.CancelScope().__enter__()


def test_who_is_abandoned_by_a_scope_that_is_left_too_early_is_cancelled_once(whose: str) -> None:
    """The children of a nursery within it: each scope of theirs catches that, and they go on."""
    seen: list[Any] = []

    async def child() -> None:
        with trio.CancelScope():
            await trio.sleep(5)
        seen.append("goes on")
        await trio.sleep(1)

    async def main() -> None:
        outer, manager = trio.CancelScope(), trio.open_nursery()
        outer.__enter__()
        nursery = await manager.__aenter__()
        nursery.start_soon(child)
        await trio.sleep(1)
        with pytest.raises(RuntimeError):
            outer.__exit__(None, None, None)
        try:
            await manager.__aexit__(None, None, None)
        except BaseException as error:  # noqa: BLE001 - what it is, is what is compared
            seen.append(type(error).__name__)

    try:
        run_virtual(main)
    except BaseException as error:  # noqa: BLE001 - the same
        seen.append(type(error).__name__)
    assert seen[:1] == ["goes on"]


class Works:
    """What tasks are made of in the test below."""

    async def method(self, word: str = "") -> str:
        await trio.lowlevel.checkpoint()
        return word

    async def __call__(self) -> None:
        await trio.lowlevel.checkpoint()

    def returns(self) -> Awaitable[str]:
        return self.method("returned")


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_tasks_begin_as_they_are_called_for(whose: str) -> None:
    """Methods, callables, partials, functions that return a coroutine: each with its name; what is no task is refused in trio's words."""
    refused: list[str] = []
    variable: ContextVar[str] = ContextVar("variable", default="unset")

    async def main() -> tuple[list[str], int]:
        names: list[str] = []
        heard: list[str] = []

        async def listens() -> None:
            heard.append(variable.get())
            variable.set("changed")

        works = Works()
        called_so = AsyncMock()
        async with trio.open_nursery() as nursery:
            variable.set("set")
            nursery.start_soon(called_so, 1)
            for called in (works.method, works, partial(works.method, "x"), works.returns, listens):
                nursery.start_soon(called)
            nursery.start_soon(works.method, "y", name="mine")
            names += sorted(task.name for task in nursery.child_tasks if "Works object" not in task.name and "AsyncMock" not in task.name)
            for wrong, arguments in ((works.method, (1, 2, 3)), (lambda: 7, ()), (works.method("z"), ())):
                with pytest.raises(TypeError) as caught:
                    nursery.start_soon(wrong, *arguments)  # type: ignore[arg-type]  # that is what is wrong
                refused.append(str(caught.value))
        with pytest.raises(RuntimeError, match="closed to new arrivals"):
            nursery.start_soon(works.method)
        assert (heard, variable.get()) == (["set"], "set")
        called_so.assert_awaited_once_with(1)
        return names, len(trio.lowlevel.current_task()._runner.tasks)

    names, left = run_virtual(main)
    method = f"{__name__}.Works.method"
    assert names == sorted([method, method, "mine", f"{__name__}.Works.returns", f"{listens_name()}"])
    assert left == run_virtual(counted)
    assert len(refused) == 3
    assert "positional argument" in refused[0]
    assert "appears to be synchronous" in refused[1]
    assert "got a coroutine object" in refused[2]


def listens_name() -> str:
    """What trio calls the function inside the test above."""
    return f"{__name__}.test_tasks_begin_as_they_are_called_for.<locals>.main.<locals>.listens"


async def counted() -> int:
    """The tasks of a run in which nothing has been started."""
    return len(trio.lowlevel.current_task()._runner.tasks)


def test_a_task_that_leaves_a_nursery_open_is_told_so(whose: str) -> None:
    """It ends with an error, and who is in there is cancelled; a task that holds a lot breaks it."""

    async def main() -> tuple[bool, bool]:
        lot, ended = trio.lowlevel.ParkingLot(), []

        async def waits() -> None:
            try:
                await trio.sleep_forever()
            finally:
                ended.append(True)

        async def leaves() -> None:
            nursery = await trio.open_nursery().__aenter__()
            nursery.start_soon(waits)
            await trio.lowlevel.checkpoint()

        async def breaks() -> None:
            trio.lowlevel.add_parking_lot_breaker(trio.lowlevel.current_task(), lot)

        broken = False
        with pytest.raises(BaseExceptionGroup) as caught:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(leaves)
        assert caught.group_contains(RuntimeError, match="Nursery stack corrupted")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(breaks)
        try:
            await lot.park()
        except trio.BrokenResourceError:
            broken = True
        return broken, ended == [True]

    assert run_virtual(main) == (True, True)
