"""Huge pages come home as one, or page by page where that cannot be; and what gives up on the way leaves them on their device.

Oracle: mm/migrate_device.c, and dmirror_devmem_fault and dmirror_device_evict_chunk of lib/test_hmm.c; the bytes; the invariants.
"""

from __future__ import annotations

import errno

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import BusError, KernelError, PeerError, PeerLost
from hmmnet.faults.controls import Controls
from hmmnet.faults.injector import Injector, PointFault, Points
from hmmnet.host.landing import HostFrames
from hmmnet.host.mm import pte
from hmmnet.host.mm.space import Space
from hmmnet.observe.events import Moved
from hmmnet.pages import HUGE_PAGES, MIGRATE_PFN_COMPOUND, PAGE_SIZE, page_by_page, pages_in

from .blocks import BASE, BLOCK, EXPECTED, FIRST, HEADS, contents, go, huge_space, shape, sound
from .fakes import Bench, nothing


async def test_the_way_home_is_given_up_too() -> None:
    """The copy home fails: the page is still on the device, as one, and the host has its frames back."""
    bench = Bench()
    space = await huge_space(bench)
    await go(bench, space)

    async def die() -> None:
        raise PeerLost("it burns")

    bench.link.during_copy = die
    with pytest.raises(BusError):
        await space.load(BASE, 1)
    assert shape(space) == [pte.DEVICE, pte.DEVICE]
    assert bench.host_pages_used() == 0
    sound(bench)


async def test_without_a_huge_page_at_home_it_comes_home_small() -> None:
    """Nothing aligned is free: every page of it comes, and is mapped by itself. With too little memory nothing comes."""
    bench = Bench(host_pages=3 * HUGE_PAGES)
    space = await huge_space(bench)
    await go(bench, space)
    others = bench.space(2)
    await others.mmap(3 * BLOCK, "rw", BASE)
    for page in range(3 * HUGE_PAGES - 1):
        await others.store(BASE + page * PAGE_SIZE, b"x")
    with pytest.raises(KernelError):
        await space.load(BASE, 1)
    sound(bench)
    for page in range(0, 3 * HUGE_PAGES - 1, 2):
        await others.munmap(BASE + page * PAGE_SIZE, PAGE_SIZE)
    assert await space.load(BASE + 8, 8) == (1).to_bytes(8, "little")
    assert shape(space) == [0, pte.DEVICE]
    sound(bench)
    assert np.array_equal(np.frombuffer(await space.load(BASE, BLOCK), np.uint64), EXPECTED[: BLOCK // 8])


@pytest.mark.parametrize("where", ["refuse", "split", "frames"])
async def test_a_shared_huge_page_stays_where_its_way_home_fails(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever raises before its bytes come, also what allocates a large page or splits one: no migration entry is left."""
    bench = Bench()
    space = await huge_space(bench)
    child = bench.spaces[2] = await space.fork(2, bench.hub(space))
    assert (await go(bench, space)).moved == 2 * HUGE_PAGES

    def fail(*_: object) -> bool:
        assert space.mm.table.get(FIRST) & pte.KIND == pte.MIGRATION
        raise PeerError("gone wrong")

    with monkeypatch.context() as patch:
        if where == "frames":
            patch.setattr(HostFrames, "_allocated", fail)
        else:
            patch.setattr(bench.link, "no_large", fail if where == "refuse" else lambda context: True)
            patch.setattr(Space, "split_going", fail)
        with pytest.raises(PeerError, match="gone wrong"):
            await bench.homing.migrate_to_system(space, bench.link, FIRST, FIRST + HUGE_PAGES)
    for one in (space, child):
        assert {int(entry) & (pte.KIND | pte.HUGE) for entry in one.mm.table.read(FIRST, FIRST + HUGE_PAGES)} == {pte.DEVICE | pte.HUGE}
    sound(bench)
    assert np.array_equal(await contents(child), EXPECTED)
    assert np.array_equal(await contents(space), EXPECTED)
    sound(bench)


async def test_what_waits_behind_a_broken_copy_is_put_back() -> None:
    """A huge page and small ones come home in one go, and the first stream breaks: all are on the device as before, and come home later."""
    bench = Bench()
    space = await huge_space(bench)
    await space.split_blocks([FIRST + HUGE_PAGES])
    await go(bench, space, page_by_page(HEADS))
    await space.madvise(BASE, BLOCK, "NORMAL")
    assert bench.page_map.used_pages == 2 * HUGE_PAGES
    home = [space.mm.table.get(FIRST + i * HUGE_PAGES) & (pte.KIND | pte.HUGE) for i in range(2)]

    async def broken() -> None:
        raise PeerError("the stream broke")

    bench.link.during_copy = broken
    with pytest.raises(PeerError, match="the stream broke"):
        await bench.homing.migrate_to_system(space, bench.link, FIRST, FIRST + 2 * HUGE_PAGES)
    assert [space.mm.table.get(FIRST + i * HUGE_PAGES) & (pte.KIND | pte.HUGE) for i in range(2)] == home
    assert bench.host_pages_used() == 0
    sound(bench)
    bench.link.during_copy = nothing
    assert np.array_equal(await contents(space), EXPECTED)
    sound(bench)


async def test_a_way_home_that_is_cancelled_before_its_end_gives_up_the_rest() -> None:
    """One block has a huge page at the host and has changed over, the other waits to go page by page: that one stays on the device."""
    bench = Bench(host_pages=3 * HUGE_PAGES + HUGE_PAGES // 2)
    space = await huge_space(bench)
    await go(bench, space)
    taken = bench.memory.allocate_huge()
    assert taken is not None
    injector = Injector()
    bench.memory.points = injector.points_of("host")
    injector.add(PointFault("home.before_finalize", "pause"))
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.homing.migrate_to_system, space, bench.link, FIRST, FIRST + 2 * HUGE_PAGES)
            await wait_all_tasks_blocked()
            scope.cancel()
    assert sorted(shape(space)) == [0, pte.PRESENT]
    assert {int(entry) & pte.KIND for entry in space.mm.table.read(FIRST, FIRST + 2 * HUGE_PAGES)} == {pte.PRESENT, pte.DEVICE}
    assert bench.page_map.used_pages == HUGE_PAGES
    sound(bench)
    bench.memory.points = Points()
    bench.memory.put(taken)
    assert np.array_equal(await contents(space), EXPECTED)
    sound(bench)


async def test_no_memory_for_a_huge_page_is_enomem_where_a_fault_says_so() -> None:
    """``host.alloc.home``: the CPU that touches it is told, and the huge page is on its device, whole, for the next touch."""
    bench = Bench()
    space = await huge_space(bench)
    await go(bench, space)
    injector = Injector()
    bench.memory.points = injector.points_of("host")
    injector.add(PointFault("host.alloc.home", "fail", controls=Controls(nth=1)))
    with pytest.raises(KernelError, match="ENOMEM"):
        await space.load(BASE, 1)
    assert shape(space) == [pte.DEVICE, pte.DEVICE]
    sound(bench)
    assert np.array_equal(await contents(space), EXPECTED)


@pytest.mark.parametrize("tries", [1, 2])
@pytest.mark.parametrize("change", ["none", "mprotect", "munmap"])
async def test_what_came_home_before_memory_was_had_has_moved(change: str, tries: int) -> None:
    """The huge page comes at once, the small ones in front of it only when somebody was killed; by then the mapping ends between them."""
    bench = Bench(host_pages=3 * HUGE_PAGES)
    space = await huge_space(bench)
    await space.split_blocks([FIRST])
    await go(bench, space, np.concatenate((page_by_page(HEADS[:1]), HEADS[1:])))
    taken = [bench.memory.allocate(HUGE_PAGES), bench.memory.allocate(100)]
    asked: list[int] = []

    async def kill(_process: int, pages: int) -> bool:
        asked.append(pages)
        if len(asked) == 1 and change == "mprotect":
            await space.mprotect(BASE + BLOCK, BLOCK, "r")
        elif len(asked) == 1 and change == "munmap":
            await space.munmap(BASE + BLOCK, BLOCK)
            taken.append(bench.memory.allocate(HUGE_PAGES))
        if len(asked) == tries:
            for frames in taken:
                assert frames is not None
                bench.memory.put(frames)
        return True

    bench.memory.relief.killer = kill
    done = await bench.homing.migrate_to_system(space, bench.link, FIRST, FIRST + 2 * HUGE_PAGES)
    assert (len(asked), done.errno) == (tries, errno.EINVAL if change == "munmap" else 0)
    assert done.moved == 2 * HUGE_PAGES
    assert pages_in(done.words, MIGRATE_PFN_COMPOUND) == 2 * HUGE_PAGES
    assert done.moved_pages(FIRST).tolist() == list(range(FIRST, FIRST + 2 * HUGE_PAGES))
    assert bench.page_map.used_pages == 0
    sound(bench)


async def test_who_listens_hears_of_each_page_of_a_huge_one() -> None:
    """Homes by touch, one page and a huge one, and by eviction: process, pages, ends and cause."""
    bench = Bench()
    space = await huge_space(bench)
    await go(bench, space)
    heard: list[Moved] = []
    with bench.homing.events.told_to(lambda event: heard.append(event) if isinstance(event, Moved) else None):
        await space.load(BASE, 1)
        assert [(event.process, len(event.pages), int(event.pages[0]), event.source, event.target, event.cause) for event in heard] == [
            (1, HUGE_PAGES, FIRST, "gpu0", "host", "cpu fault")
        ]
        await space.split_blocks([FIRST + HUGE_PAGES])
        await space.load(BASE + BLOCK, 1)
        assert heard[-1].pages.tolist() == [FIRST + HUGE_PAGES]
        await bench.homing.evict(bench.link, bench.page_map.used_frames()[:3], "unplug")
        assert heard[-1].pages.tolist() == [FIRST + HUGE_PAGES + i for i in (1, 2, 3)]
        assert heard[-1].cause == "unplug"
    sound(bench)


def test_frames_for_a_huge_page_go_back_when_the_rest_is_not_there() -> None:
    """An aligned run was found, and not enough single frames beside it: ENOMEM, and nothing is taken."""
    bench = Bench(host_pages=2 * HUGE_PAGES)
    got = bench.memory.allocate(HUGE_PAGES - 100)
    assert got is not None
    before = bench.host_pages_used()
    frames = HostFrames(bench.memory, HUGE_PAGES + 200, 0, [0])
    with pytest.raises(KernelError, match="ENOMEM"):
        frames.frames()
    frames.release()
    assert bench.host_pages_used() == before
    enough = HostFrames(bench.memory, HUGE_PAGES + 50, 0, [50])
    assert np.array_equal(np.diff(enough.frames()[50 : 50 + HUGE_PAGES]), np.ones(HUGE_PAGES - 1, np.uint64))
    assert int(enough.frames()[50]) % HUGE_PAGES == 0
    enough.release()
    assert bench.host_pages_used() == before
