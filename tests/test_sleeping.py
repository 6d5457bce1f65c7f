"""Bells: waits for something that happens, or for time to pass, by clocks that wake by themselves and by trio's."""

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import TypeVar

import outcome
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from hmmnet import sleeping
from hmmnet.sim import run_virtual
from hmmnet.sleeping import WORD, Bell, Completion, PublicRun, Suspension, sleep, suspended

T = TypeVar("T")


def run_mocked(main: Callable[[], Awaitable[T]]) -> T:
    """In time that jumps, of a clock that wakes nobody by itself."""
    return trio.run(main, clock=MockClock(autojump_threshold=0))


RUNS = pytest.mark.parametrize("run", [run_virtual, run_mocked])


async def ring_after(bell: Bell, seconds: float) -> None:
    await sleep(seconds)
    bell.ring()


@pytest.fixture(params=["private", "public"], autouse=True)
def names(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By which of trio's names a run is asked for its task, its clock and its scheduler."""
    if request.param == "public":
        monkeypatch.setattr(sleeping, "RUN", PublicRun())


@RUNS
def test_a_wait_ends_with_the_bell_or_with_its_time(run: Callable[[Callable[[], Awaitable[list[float]]]], list[float]]) -> None:
    """Whichever comes first; a bell that rings for nobody, or at the very last moment, disturbs no later wait."""

    async def main() -> list[float]:
        ends: list[float] = []
        began_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            bell = Bell()
            assert not bell.ring()
            for rings_s, limit_s in ((1.0, 2.0), (3.0, 2.0), (0.5, 0.5), (1.0, 0.0), (1.5, 4.0)):
                nursery.start_soon(ring_after, bell, rings_s)
                begun_s = trio.current_time()
                await bell.heard_by(begun_s + limit_s)
                ends.append(trio.current_time() - begun_s)
                await sleep(10)
                assert not bell.ring(), "somebody still counts as waiting"
            nursery.start_soon(ring_after, bell, 1.0)
            await bell.heard()
            ends.append(trio.current_time() - began_s - sum(ends) - 50)
        return ends

    assert run(main) == pytest.approx([1.0, 2.0, 0.5, 0.0, 1.5, 1.0])


@RUNS
def test_a_wait_can_be_cancelled_or_not(run: Callable[[Callable[[], Awaitable[list[float]]]], list[float]]) -> None:
    """As its kind is; who does not wait any more is not woken."""

    async def main() -> list[float]:
        ends: list[float] = []
        bell = Bell()
        for wait in (bell.heard, bell.heard_at_last, lambda: bell.heard_by(trio.current_time() + 9)):
            begun_s = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ring_after, bell, 3.0)
                with trio.move_on_after(1):
                    await wait()
                ends.append(trio.current_time() - begun_s)
        return ends

    assert run(main) == pytest.approx([1.0, 3.0, 1.0])


@RUNS
def test_a_completion_is_for_all_who_wait_and_will(run: Callable[[Callable[[], Awaitable[list[float]]]], list[float]]) -> None:
    """Who was cancelled meanwhile is not woken; who comes later has a checkpoint."""

    async def main() -> list[float]:
        ends: list[float] = []
        done = Completion()

        async def wait(limit_s: float) -> None:
            with trio.move_on_after(limit_s):
                await done.wait()
            ends.append(trio.current_time() - began_s)

        began_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            for limit_s in (1.0, 3.0, 4.0):
                nursery.start_soon(wait, limit_s)
            await sleep(2.0)
            assert not done.is_set()
            done.set()
            done.set()
            assert done.is_set()
        with trio.testing.assert_checkpoints():
            await done.wait()
        with trio.CancelScope() as scope:
            scope.cancel()
            await done.wait()
        assert scope.cancelled_caught
        return ends

    assert run(main) == pytest.approx([1.0, 2.0, 2.0])


@pytest.mark.parametrize("known", [True, False])
async def test_a_wait_can_be_awaited_again_with_any_trio(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """Also where its private name is not to be had; what wakes it may be a value or an error, and it can be cancelled."""
    if not known:
        monkeypatch.setattr(sleeping, "WaitTaskRescheduled", None)
    me = trio.lowlevel.current_task()
    left: list[object] = []

    def leave(reason: object) -> trio.lowlevel.Abort:
        left.append(reason)
        return trio.lowlevel.Abort.SUCCEEDED

    suspension = Suspension(leave)
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(wake, me, WORD)
            await suspension
        nursery.start_soon(wake, me, outcome.Error(ValueError("so it is")))
        with pytest.raises(ValueError, match="so it is"):
            await suspension
        nursery.cancel_scope.cancel()
        await suspension
    assert nursery.cancel_scope.cancelled_caught
    assert len(left) == 1


async def wake(task: trio.lowlevel.Task, word: outcome.Outcome[None]) -> None:
    trio.lowlevel.reschedule(task, word)


async def test_a_word_can_be_said_again() -> None:
    """Its value is nothing, however often it is asked for."""

    def listen() -> Generator[str, object, None]:
        assert (yield "more") is None

    async def listen_async() -> AsyncGenerator[str, object]:
        assert (yield "more") is None
        yield "heard"

    for _ in range(2):
        WORD.unwrap()
        generator = listen()
        assert next(generator) == "more"
        with pytest.raises(StopIteration):
            WORD.send(generator)
        asynchronous = listen_async()
        assert await anext(asynchronous) == "more"
        assert await WORD.asend(asynchronous) == "heard"
        await asynchronous.aclose()


@pytest.mark.parametrize("wait", [suspended, Suspension], ids=["suspended", "Suspension"])
def test_a_cancelled_wait_leaves_no_circle(wait: Callable[[Callable[[object], trio.lowlevel.Abort]], Awaitable[None]]) -> None:
    """The exception goes with the last who holds it: garbage collection need not look for it."""
    raised: list[weakref.ref[trio.Cancelled]] = []

    async def cancelled() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                await wait(lambda _: trio.lowlevel.Abort.SUCCEEDED)
            except trio.Cancelled as error:
                raised.append(weakref.ref(error))
                raise

    gc.disable()
    try:
        run_virtual(cancelled)
        assert raised[0]() is None
    finally:
        gc.enable()
