"""The reader/writer lock: fair, and nothing is lost when a waiter is cancelled; and the gate."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.host.mm.locks import Gate, RwLock


async def hold(lock: RwLock, name: str, log: list[str], release: trio.Event, write: bool) -> None:
    async with lock.write() if write else lock.read():
        log.append(f"+{name}")
        await release.wait()
        log.append(f"-{name}")


async def test_readers_share_and_writers_do_not() -> None:
    """Two readers at once; a writer waits for both."""
    lock, release = RwLock(), trio.Event()
    log: list[str] = []
    async with trio.open_nursery() as nursery:
        for name in ("r1", "r2"):
            nursery.start_soon(hold, lock, name, log, release, False)
        await wait_all_tasks_blocked()
        nursery.start_soon(hold, lock, "w", log, release, True)
        await wait_all_tasks_blocked()
        assert sorted(log) == ["+r1", "+r2"]
        assert lock.held
        assert not lock.written
        release.set()
    assert log[-2:] == ["+w", "-w"]
    assert not lock.held


async def test_a_waiting_writer_holds_later_readers_back() -> None:
    """First come, first served: a stream of readers cannot starve a writer."""
    lock = RwLock()
    log: list[str] = []
    first, second, third = trio.Event(), trio.Event(), trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold, lock, "r1", log, first, False)
        await wait_all_tasks_blocked()
        nursery.start_soon(hold, lock, "w", log, second, True)
        await wait_all_tasks_blocked()
        nursery.start_soon(hold, lock, "r2", log, third, False)
        await wait_all_tasks_blocked()
        assert log == ["+r1"]
        first.set()
        await wait_all_tasks_blocked()
        assert log == ["+r1", "-r1", "+w"]
        assert lock.written
        second.set()
        await wait_all_tasks_blocked()
        assert log[-1] == "+r2"
        third.set()


@pytest.mark.parametrize("write", [False, True])
async def test_a_cancelled_waiter_leaves_the_queue(write: bool) -> None:
    """Behind it, everybody goes on."""
    lock, release = RwLock(), trio.Event()
    log: list[str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold, lock, "first", log, release, not write)
        await wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            nursery.start_soon(trio.lowlevel.checkpoint)
            scope.cancel()
            async with lock.write() if write else lock.read():
                raise AssertionError("a cancelled waiter got the lock")
        release.set()
    assert not lock.held
    assert not lock.queue


async def test_a_lock_handed_to_a_cancelled_waiter_is_given_back() -> None:
    """Release and cancellation in the same step: the lock is not lost."""
    lock = RwLock()
    scope = trio.CancelScope()

    async def waiter() -> None:
        with scope:
            async with lock.write():
                await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        async with lock.read():
            nursery.start_soon(waiter)
            await wait_all_tasks_blocked()
        scope.cancel()
    assert not lock.held
    async with lock.write():
        assert lock.written


def test_release_without_hold_is_a_bug() -> None:
    """An unbalanced release is ours to find."""
    with pytest.raises(AssertionError):
        RwLock().release_read()
    with pytest.raises(AssertionError):
        RwLock().release_write()


async def test_gate_lets_all_go_and_closes_again() -> None:
    """Who waits now goes at the next opening; who comes later waits for the one after."""
    gate = Gate()
    seen: list[str] = []

    async def wait(name: str) -> None:
        await gate.wait()
        seen.append(name)

    gate.open()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, "a")
        nursery.start_soon(wait, "b")
        await wait_all_tasks_blocked()
        assert seen == []
        gate.open()
        await wait_all_tasks_blocked()
        assert sorted(seen) == ["a", "b"]
        nursery.start_soon(wait, "c")
        await wait_all_tasks_blocked()
        assert len(seen) == 2
        gate.open()
