"""The hub: who is told what, who waits for whom (semantics A6)."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import KernelError
from hmmnet.host.hub import Hub
from hmmnet.host.interfaces import Event

from .fakes import FakeLink


async def test_devices_are_told_before_the_table_changes() -> None:
    """Entering returns only when the device has acknowledged."""
    hub, link = Hub(), FakeLink("gpu0", 64)
    subscription = hub.insert(0, 100, link, 7)
    gate = link.hold()
    entered = trio.Event()

    async def unmap() -> None:
        async with hub.invalidate(Event.UNMAP, 10, 20):
            entered.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(unmap)
        await wait_all_tasks_blocked()
        assert link.told == [(1, 10, 20, Event.UNMAP, -1, subscription.sequence)]
        assert subscription.sequence % 2 == 1
        assert not entered.is_set()
        gate.set()
        await entered.wait()


async def test_all_devices_start_before_any_is_waited_for() -> None:
    """Two passes: a slow first device does not delay the second's start."""
    hub, slow, quick = Hub(), FakeLink("gpu0", 64), FakeLink("gpu1", 65)
    hub.insert(0, 100, slow, 1)
    hub.insert(0, 100, quick, 1)
    gate = slow.hold()
    async with trio.open_nursery() as nursery:

        async def clear() -> None:
            async with hub.invalidate(Event.CLEAR, 0, 1):
                assert slow.finished == quick.finished == 1

        nursery.start_soon(clear)
        await wait_all_tasks_blocked()
        assert len(slow.told) == len(quick.told) == 1
        gate.set()


async def test_owner_is_not_told_of_its_own_migration() -> None:
    """MIGRATE and EXCLUSIVE are filtered by owner; other events and other devices are not."""
    hub, mine, other = Hub(), FakeLink("gpu0", 64), FakeLink("gpu1", 65)
    subscription = hub.insert(0, 100, mine, 1)
    hub.insert(0, 100, other, 1)
    before = subscription.sequence
    async with hub.invalidate(Event.MIGRATE, 0, 1, owner=64):
        assert subscription.sequence == before
    assert (len(mine.told), len(other.told)) == (0, 1)
    async with hub.invalidate(Event.CLEAR, 0, 1, owner=64):
        pass
    assert (len(mine.told), len(other.told)) == (1, 2)


async def test_without_the_filter_the_owner_is_told_too() -> None:
    """A driver that does not filter survives its own callback."""
    hub, mine = Hub(), FakeLink("gpu0", 64)
    hub.insert(0, 100, mine, 1, own=False)
    async with hub.invalidate(Event.MIGRATE, 0, 1, owner=64):
        pass
    assert len(mine.told) == 1


async def test_reader_waits_for_the_end_and_then_retries() -> None:
    """read_begin before is stale afterwards; read_begin during it sleeps until the end."""
    hub, link = Hub(), FakeLink("gpu0", 64)
    subscription = hub.insert(0, 100, link, 1)
    early = await hub.read_begin(subscription)
    got: list[int] = []

    async def reader() -> None:
        got.append(await hub.read_begin(subscription))

    async with trio.open_nursery() as nursery:
        async with hub.invalidate(Event.CLEAR, 5, 6):
            assert hub.read_retry(subscription, early)
            nursery.start_soon(reader)
            await wait_all_tasks_blocked()
            assert got == []
    assert got == [subscription.sequence]
    assert not hub.read_retry(subscription, got[0])


async def test_reader_of_another_range_does_not_wait() -> None:
    """Only the subscription that is being invalidated makes its readers wait."""
    hub, link = Hub(), FakeLink("gpu0", 64)
    hub.insert(0, 10, link, 1)
    quiet = hub.insert(10, 20, link, 1)
    async with hub.invalidate(Event.CLEAR, 5, 6):
        sequence = await hub.read_begin(quiet)
    assert not hub.read_retry(quiet, sequence)


async def test_no_callback_after_remove_returned() -> None:
    """Remove sleeps through a running invalidation; afterwards the device is told nothing."""
    hub, link = Hub(), FakeLink("gpu0", 64)
    subscription = hub.insert(0, 100, link, 1)
    gate, removed = link.hold(), trio.Event()

    async def clear() -> None:
        async with hub.invalidate(Event.CLEAR, 0, 1):
            pass

    async def remove() -> None:
        await hub.remove(subscription)
        removed.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(clear)
        await wait_all_tasks_blocked()
        nursery.start_soon(remove)
        await wait_all_tasks_blocked()
        assert not removed.is_set()
        gate.set()
    assert removed.is_set()
    await clear()
    assert len(link.told) == 1


async def test_release_refuses_later_subscriptions() -> None:
    """After RELEASE the mm is dying: EINVAL."""
    hub, link = Hub(), FakeLink("gpu0", 64)
    async with hub.invalidate(Event.RELEASE, 0, 100):
        pass
    with pytest.raises(KernelError, match="EINVAL"):
        hub.insert(0, 1, link, 1)


async def test_cancelling_a_waiting_invalidation_leaves_the_hub_whole() -> None:
    """The sequence turns even again and readers go on."""
    hub, link = Hub(), FakeLink("gpu0", 64)
    subscription = hub.insert(0, 100, link, 1)
    link.hold()
    with trio.move_on_after(0.01):
        async with hub.invalidate(Event.CLEAR, 0, 1):
            raise AssertionError("nobody answered")
    assert not hub.core.is_invalidating
    assert await hub.read_begin(subscription) == subscription.sequence


async def test_an_unwatched_change_suspends_nobody() -> None:
    """With no subscription the hub costs no checkpoint."""
    hub = Hub()
    coroutine = hub.invalidate(Event.CLEAR, 0, 1).__aenter__()
    with pytest.raises(StopIteration):
        coroutine.send(None)
    hub.range_end()


async def test_an_invalidation_that_may_not_wait_is_refused() -> None:
    """invalidate_range_start_nonblock: where a mirror overlaps it is EAGAIN, nobody is told, nothing stays begun; elsewhere it runs."""
    hub = Hub()
    link = FakeLink("gpu0", 64)
    subscription = hub.insert(0, 8, link, 1)
    assert not hub.try_invalidate(4, 12)
    assert link.told == []
    assert not hub.core.is_invalidating
    sequence = await hub.read_begin(subscription)
    assert hub.try_invalidate(8, 12)
    hub.range_end()
    assert not hub.read_retry(subscription, sequence)
    assert hub.core.active == 0
