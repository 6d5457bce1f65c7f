"""The hub: who is told what, who waits for whom (semantics A6)."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import KernelError
from hmmnet.host.held import HeldPages
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


# --- devices that hold nothing there -----------------------------------------------------------------------------------------------


async def test_a_device_that_holds_nothing_there_is_told_nothing() -> None:
    """Nothing goes to it until it is given a translation, and nothing once it has let go; its neighbour is told each time."""
    hub, spared, told = Hub(), FakeLink("gpu0", 64), FakeLink("gpu1", 65)
    subscription = hub.insert(0, 100, spared, 1, held=HeldPages())
    hub.insert(0, 100, told, 1)
    subscription.hold(30, 40)
    for start, end, expected in ((10, 30, 0), (39, 50, 1), (39, 50, 1), (0, 100, 2), (0, 100, 2)):
        async with hub.invalidate(Event.UNMAP, start, end):
            assert len(spared.told) == expected
    assert len(told.told) == 5
    assert hub.messages == 7


async def test_who_is_not_told_reads_again_all_the_same() -> None:
    """What it has read before is stale, and it waits for the end: what it reads must be good now."""
    hub, link = Hub(), FakeLink("gpu0", 64)
    subscription = hub.insert(0, 100, link, 1, held=HeldPages())
    early = await hub.read_begin(subscription)
    begun = trio.Event()

    async def reader() -> None:
        await hub.read_begin(subscription)
        begun.set()

    async with trio.open_nursery() as nursery:
        async with hub.invalidate(Event.CLEAR, 5, 6):
            assert hub.read_retry(subscription, early)
            nursery.start_soon(reader)
            await wait_all_tasks_blocked()
            assert not begun.is_set()
    assert link.told == []


async def test_a_page_is_held_until_the_device_has_let_go() -> None:
    """Who changes it meanwhile waits for the device, too."""
    hub, link = Hub(), FakeLink("gpu0", 64)
    hub.insert(0, 100, link, 1, held=HeldPages()).hold(5, 7)
    gate, over = link.hold(), list[int]()

    async def clear(page: int) -> None:
        async with hub.invalidate(Event.CLEAR, page, page + 1):
            over.append(page)

    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(clear, 5)
            await wait_all_tasks_blocked()
        assert (len(link.told), over) == (2, [])
        gate.set()
    await clear(5)
    assert len(link.told) == 2
    await clear(6)
    assert len(link.told) == 3


async def test_a_device_that_was_cancelled_holds_its_pages_still() -> None:
    """Nobody knows whether it has let go: it is told again."""
    hub, link = Hub(), FakeLink("gpu0", 64)
    hub.insert(0, 100, link, 1, held=HeldPages()).hold(5, 6)
    link.hold()
    for count in (1, 2):
        with trio.move_on_after(0.01):
            async with hub.invalidate(Event.CLEAR, 5, 6):
                raise AssertionError("nobody answered")
        assert len(link.told) == count


async def test_a_driver_that_drops_more_is_told_of_what_lies_before() -> None:
    """test_hmm's callback takes the page behind an event along."""
    hub, link = Hub(), FakeLink("gpu0", 64)
    hub.insert(0, 100, link, 1, held=HeldPages(), overshoot=1).hold(10, 11)
    for end, expected in ((9, 0), (10, 1)):
        async with hub.invalidate(Event.CLEAR, 0, end):
            assert len(link.told) == expected


async def test_its_own_migration_takes_nothing_from_a_device() -> None:
    """It is told before its pages are collected, and maps them afterwards: they are held."""
    hub, link = Hub(), FakeLink("gpu0", 64)
    hub.insert(0, 100, link, 1, own=False, held=HeldPages()).hold(5, 6)
    for count in (1, 2):
        async with hub.invalidate(Event.MIGRATE, 5, 6, owner=64):
            assert len(link.told) == count


async def test_a_page_comes_home_without_waiting_for_who_does_not_hold_it() -> None:
    """The others' readers read again."""
    hub, mine, other = Hub(), FakeLink("gpu0", 64), FakeLink("gpu1", 65)
    hub.insert(0, 100, mine, 1)
    subscription = hub.insert(0, 100, other, 2, held=HeldPages())
    sequence = await hub.read_begin(subscription)
    assert hub.pass_through(5, 64)
    assert hub.read_retry(subscription, sequence)
    assert not hub.core.must_wait(subscription)
    subscription.hold(5, 6)
    assert not hub.pass_through(5, 64)
    assert hub.pass_through(6, 64)
    assert other.told == []
