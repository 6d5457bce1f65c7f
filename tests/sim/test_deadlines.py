"""Scopes that enter their deadlines without a generator: they end when trio's do."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import pytest
import trio
import trio.testing

from hmmnet.sim import deadlines, rounds, run_virtual
from hmmnet.sim.clock import JumpClock
from hmmnet.sim.deadlines import REGISTERING, registering
from hmmnet.sim.schedule import seeded


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


def test_trios_own_stands_where_it_stood(whose: str) -> None:
    """After a run, and beside a trio that is not known."""
    theirs = getattr(trio.CancelScope, REGISTERING)
    with seeded(1):
        assert (getattr(trio.CancelScope, REGISTERING) is theirs) is not (whose == "ours" and trio.__version__ in rounds.KNOWN)
    assert getattr(trio.CancelScope, REGISTERING) is theirs


def test_a_trio_without_that_name_has_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left alone."""
    monkeypatch.setattr(deadlines, "REGISTERING", "of another trio")
    assert registering() is None
