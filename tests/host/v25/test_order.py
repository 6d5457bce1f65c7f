"""The order of an invalidation under v25: the start counts and does nothing else; the end wipes, and then tells every mirror."""

from __future__ import annotations

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import KernelError
from hmmnet.host import v25
from hmmnet.host.interfaces import Event
from hmmnet.host.v25.order import hub_of
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE
from tests.host.fakes import ZONE, FakeLink

from .dummy import Dummy, Ground, Listener

READ_WRITE = v25.HMM_PFN_VALID | v25.HMM_PFN_READ | v25.HMM_PFN_WRITE


async def test_the_start_counts_and_the_end_wipes_and_tells() -> None:
    """Between them nothing is told and nothing wiped; at the end the entries that overlap are, before the callback, and others are not."""
    ground = Ground()
    await ground.register()
    address = await ground.space.mmap(8 * PAGE_SIZE)
    await ground.space.store(address, bytes(8 * PAGE_SIZE))
    hub, order = hub_of(ground.space.hub, "test")
    page = address >> PAGE_SHIFT
    async with ground.space.mmap_lock.read():
        vma, tracked, pfns = ground.snapshot(address, 8)
    before, wiped, valid = order.hmm.sequence, [], [tracked.valid]

    async def look() -> None:
        wiped.append((pfns == 0).tolist())

    ground.dummy.during = look
    async with hub.invalidate(Event.CLEAR, page + 2, page + 4):
        assert order.hmm.sequence == before + 1
        valid.append(tracked.valid)
        assert [word & 0x7F for word in pfns.tolist()] == [READ_WRITE] * 8
        assert ground.dummy.log == []
    assert wiped == [[False, False, True, True, False, False, False, False]]
    assert ground.dummy.log == [("dummy", page + 2, page + 4)]
    assert [*valid, tracked.valid] == [True, True, False]
    assert not v25.hmm_vma_range_done(vma, tracked)


async def test_what_is_read_while_it_changes_does_not_hold() -> None:
    """A snapshot taken before the start, or between start and end, is refused between them, though its range is not marked yet."""
    ground = Ground()
    await ground.register()
    address = await ground.space.mmap(4 * PAGE_SIZE)
    hub, _ = hub_of(ground.space.hub, "test")
    page = address >> PAGE_SHIFT
    async with ground.space.mmap_lock.read():
        early = ground.snapshot(address, 4)
        async with hub.invalidate(Event.CLEAR, page, page + 1):
            late = ground.snapshot(address, 4)
            assert early[1].valid
            assert not v25.hmm_vma_range_done(*early[:2])
            assert not v25.hmm_vma_range_done(*late[:2])
            kept = ground.snapshot(address + PAGE_SIZE, 3)
            through = ground.snapshot(address, 4)
            assert v25.hmm_vma_range_done(*kept[:2])
        assert not v25.hmm_vma_range_done(*through[:2])
        again = ground.snapshot(address, 4)
        assert v25.hmm_vma_range_done(*again[:2])


async def test_a_snapshot_holds_through_a_change_elsewhere() -> None:
    """range_done: false after an invalidation that overlaps, true after one that does not."""
    ground = Ground()
    await ground.register()
    here, there = await ground.space.mmap(4 * PAGE_SIZE), await ground.space.mmap(4 * PAGE_SIZE)
    for address in (here, there):
        await ground.space.store(address, bytes(4 * PAGE_SIZE))
    for unmapped, holds in ((there, True), (here + 3 * PAGE_SIZE, False)):
        async with ground.space.mmap_lock.read():
            vma, tracked, pfns = ground.snapshot(here, 4)
        await ground.space.munmap(unmapped, PAGE_SIZE)
        assert v25.hmm_vma_range_done(vma, tracked) is holds
        assert [bool(word) for word in pfns.tolist()] == [True, True, True, holds]


async def test_every_mirror_is_told_one_after_the_other() -> None:
    """All mirrors of the mm, in the order of registration, whatever they have looked at; the second begins when the first is done."""
    ground = Ground()
    log: list[tuple[str, int, int]] = []
    gate = trio.Event()
    slow, quick = Listener("slow", log, gate.wait), Listener("quick", log)
    await ground.register(slow, quick)
    address = await ground.space.mmap(PAGE_SIZE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ground.space.munmap, address, PAGE_SIZE)
        await wait_all_tasks_blocked()
        assert log == []
        gate.set()
    page = address >> PAGE_SHIFT
    assert log == [("slow", page, page + 1), ("quick", page, page + 1)]


async def test_the_oom_reaper_leaves_an_address_space_with_mirrors_alone() -> None:
    """Their callbacks may sleep, and it must not: the frames stay until the process exits."""
    ground = Ground()
    address = await ground.space.mmap(4 * PAGE_SIZE)
    await ground.space.store(address, bytes(4 * PAGE_SIZE))
    await ground.register()
    await ground.space.reap()
    assert ground.bench.host_pages_used() == 4
    other = ground.bench.space(2)
    await other.store(await other.mmap(PAGE_SIZE), b"x")
    await other.reap()
    assert ground.bench.host_pages_used() == 4


async def test_another_process_is_told_nothing() -> None:
    """A mirror hears of its own address space."""
    ground = Ground()
    other = ground.bench.space(2)
    await ground.register()
    address = await other.mmap(PAGE_SIZE)
    await other.munmap(address, PAGE_SIZE)
    assert ground.dummy.log == []


async def test_devices_are_told_at_the_end_with_the_one_event() -> None:
    """The owner of a migration, too, and a context whose intervals lie elsewhere; nobody before the table has changed."""
    ground = Ground()
    hub = ground.bench.hub(ground.space)
    near, far = FakeLink("gpu0", ZONE), FakeLink("gpu1", ZONE + 1)
    first, second = hub.insert(0, 100, near, 7), hub.insert(100, 200, near, 7)
    hub.insert(1000, 2000, far, 8)
    gate = near.hold()
    changed = trio.Event()

    async def change() -> None:
        async with hub.invalidate(Event.MIGRATE, 90, 110, owner=ZONE):
            assert near.told == far.told == []
            assert first.sequence == second.sequence == hub.core.sequence
            changed.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(change)
        await wait_all_tasks_blocked()
        assert changed.is_set()
        assert [told[:4] for told in near.told] == [(first.number, 90, 110, Event.INVALIDATE), (second.number, 90, 110, Event.INVALIDATE)]
        assert far.told == []
        gate.set()
    assert [told[:4] for told in far.told] == [(0, 90, 110, Event.INVALIDATE)]
    assert {told[5] for told in near.told} == {first.sequence}


async def test_a_device_that_reads_waits_for_the_end() -> None:
    """read_begin sleeps from start to the last acknowledgement, and what was read before the start is stale."""
    ground = Ground()
    hub, link = ground.bench.hub(ground.space), FakeLink("gpu0", ZONE)
    subscription = hub.insert(0, 100, link, 1)
    early = await hub.read_begin(subscription)
    gate, got = link.hold(), []

    async def change() -> None:
        async with hub.invalidate(Event.CLEAR, 5, 6):
            assert hub.read_retry(subscription, early)

    async def read() -> None:
        got.append(await hub.read_begin(subscription))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(change)
        await wait_all_tasks_blocked()
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        assert got == []
        gate.set()
    assert got == [subscription.sequence]


async def test_a_freed_frame_is_not_used_again_before_the_end() -> None:
    """A device that has not let go yet finds the frame that it was given, and in it nobody's data."""
    ground = Ground(host_pages=8)
    hub, link = ground.bench.hub(ground.space), FakeLink("gpu0", ZONE)
    address = await ground.space.mmap(4 * PAGE_SIZE)
    await ground.space.store(address, bytes(4 * PAGE_SIZE))
    hub.insert(0, 1 << 35, link, 1)
    frames = set((ground.space.entries(np.arange(address >> 12, (address >> 12) + 4, dtype=np.uint64)) >> np.uint64(12)).tolist())
    gate = link.hold()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ground.space.munmap, address, 4 * PAGE_SIZE)
        await wait_all_tasks_blocked()
        assert len(link.told) == 1
        taken = ground.bench.memory.allocate(3)
        assert taken is not None
        assert not frames & set(taken.tolist())
        assert ground.bench.memory.allocate(1) is None
        gate.set()
    again = ground.bench.memory.allocate(4)
    assert again is not None
    assert set(again.tolist()) == frames


async def test_cancelling_does_not_leave_a_mirror_behind() -> None:
    """The page table has changed: the mirrors are told all the same, and the hub is whole."""
    ground = Ground()
    hub, _ = hub_of(ground.space.hub, "test")
    await ground.register()
    ground.dummy.during = trio.lowlevel.checkpoint
    with trio.CancelScope() as scope:
        async with hub.invalidate(Event.CLEAR, 3, 4):
            scope.cancel()
    assert ground.dummy.log == [("dummy", 3, 4)]
    assert hub.core.active == 0


async def test_a_driver_that_fails_is_told_of_and_the_others_let_go() -> None:
    """Its error reaches whoever changes the page table; the change is over, and nothing waits for it."""
    ground = Ground()
    log: list[tuple[str, int, int]] = []

    async def fails() -> None:
        raise RuntimeError("a bug of a driver")

    await ground.register(Listener("bad", log, fails), Listener("good", log))
    hub, order = hub_of(ground.space.hub, "test")
    with pytest.raises(RuntimeError, match="a bug of a driver"):
        async with hub.invalidate(Event.CLEAR, 3, 4):
            pass
    assert log == [("good", 3, 4)]
    assert not hub.core.active
    assert not order.hmm.in_progress
    assert not order.gather.holds


async def test_exit_tells_once_and_for_everything() -> None:
    """The end of the address space is one invalidation; nobody can register afterwards."""
    ground = Ground()
    await ground.register()
    await ground.space.mmap(PAGE_SIZE)
    await ground.space.exit()
    assert [(start, end) for _, start, end in ground.dummy.log] == [(0, 1 << 35)]
    async with ground.space.mmap_lock.write():
        with pytest.raises(KernelError, match="torn down"):
            await v25.hmm_mirror_register(Dummy(ground.kernel).mirror, ground.space)
