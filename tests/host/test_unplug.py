"""Hot removal of device memory while processes have pages there (semantics A2, A9)."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from hmmnet.errors import HmmnetError, PeerLost
from hmmnet.host.homing import EVICT_NAP_S, EVICT_ROUNDS_MAX
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE

from .fakes import ZONE, Bench


async def test_everything_goes_home_and_the_memory_goes() -> None:
    """Two processes' pages, by frame, until nothing is left; both have their data, and the zone is gone."""
    bench = Bench()
    addresses = {}
    for number in (1, 2):
        space = bench.space(number)
        addresses[number] = await space.mmap(3 * PAGE_SIZE)
        await space.store(addresses[number], bytes([number]) * 3 * PAGE_SIZE)
        await bench.to_device(space, addresses[number], 3)
    await bench.homing.unplug(bench.page_map)
    assert ZONE not in bench.memory.zones
    for number in (1, 2):
        assert await bench.spaces[number].load(addresses[number], 3 * PAGE_SIZE) == bytes([number]) * 3 * PAGE_SIZE
    assert len(bench.link.freed) == 6


async def test_frames_in_another_order_than_their_pages_go() -> None:
    """The page that came last has the lowest address: all are announced, so all go, at the first try."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(4 * PAGE_SIZE)
    for page in (3, 1, 0, 2):
        await space.store(address + page * PAGE_SIZE, bytes([page + 1]) * PAGE_SIZE)
        await bench.to_device(space, address + page * PAGE_SIZE, 1)
    frames = bench.page_map.used_frames()
    assert await bench.homing.evict(bench.link, frames) == 4
    assert await space.load(address, 4 * PAGE_SIZE) == b"".join(bytes([page + 1]) * PAGE_SIZE for page in range(4))


async def test_who_holds_a_page_is_named() -> None:
    """A reference that nobody drops: the kernel would wait for ever; here it is an error, everything else is home, and later it goes."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(2 * PAGE_SIZE)
    await bench.to_device(space, address, 2)
    zone = bench.page_map.zone
    frame = int(bench.page_map.used_frames()[1]) - zone.base
    zone.refcount[frame] += 2
    with pytest.raises(HmmnetError, match=r'memory of device "gpu0" .* cannot be removed: process 1 maps 1 pages'):
        await bench.homing.unplug(bench.page_map)
    assert bench.page_map.used_pages == 1
    assert EVICT_ROUNDS_MAX > 1
    zone.refcount[frame] -= 2
    await bench.homing.unplug(bench.page_map)
    assert ZONE not in bench.memory.zones


async def test_who_never_lets_go_is_waited_for_as_long_as_is_said(autojump_clock: trio.testing.MockClock) -> None:
    """One nap between two rounds, the first of EVICT_NAP_S, each twice as long as the one before, and none behind the last."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(PAGE_SIZE)
    await bench.to_device(space, address, 1)
    bench.page_map.zone.refcount[int(bench.page_map.used_frames()[0]) - bench.page_map.zone.base] += 2
    began_s = trio.current_time()
    with pytest.raises(HmmnetError, match="cannot be removed"):
        await bench.homing.unplug(bench.page_map)
    assert trio.current_time() - began_s == pytest.approx(EVICT_NAP_S * (2 ** (EVICT_ROUNDS_MAX - 1) - 1))


async def test_a_device_that_dies_meanwhile_is_lost(autojump_clock: trio.testing.MockClock) -> None:
    """Its pages die with it, and its memory is gone before anybody could remove it: PeerLost, whoever dealt with the loss."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(2 * PAGE_SIZE)
    await bench.to_device(space, address, 2)
    zone = bench.page_map.zone
    frame = int(bench.page_map.used_frames()[1]) - zone.base
    zone.refcount[frame] += 2

    async def die() -> None:
        await trio.sleep(0.001)
        del bench.links[ZONE]
        bench.page_map.lose("it was killed")
        zone.refcount[frame] -= 2
        await space.munmap(address, 2 * PAGE_SIZE)
        assert bench.page_map.bury()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(die)
        with pytest.raises(PeerLost, match=r'device "gpu0" was lost while its memory was being removed'):
            await bench.homing.unplug(bench.page_map)


async def test_who_holds_a_page_for_a_while_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    """A page that is under migration, or held, for milliseconds is no reason to refuse."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(2 * PAGE_SIZE)
    await bench.to_device(space, address, 2)
    zone = bench.page_map.zone
    frame = int(bench.page_map.used_frames()[1]) - zone.base
    zone.refcount[frame] += 2

    async def hold() -> None:
        await trio.sleep(0.1)
        zone.refcount[frame] -= 2

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold)
        await bench.homing.unplug(bench.page_map)
    assert ZONE not in bench.memory.zones
    assert trio.current_time() > 0.1


async def test_who_is_on_its_way_is_waited_for_however_long_that_takes(autojump_clock: trio.testing.MockClock) -> None:
    """A fault that brings a page home over a slow link: the page is where it was, or home, when that is over, and then unplug goes on."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(PAGE_SIZE)
    await bench.to_device(space, address, 1)
    page = address >> PAGE_SHIFT

    async def bring() -> None:
        frame = space.take_one(page, ZONE)
        assert frame is not None
        await trio.sleep(100 * EVICT_NAP_S * 2**EVICT_ROUNDS_MAX)
        space.put_back_one(page, frame)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(bring)
        await trio.testing.wait_all_tasks_blocked()
        await bench.homing.unplug(bench.page_map)
    assert ZONE not in bench.memory.zones
    assert trio.current_time() > 100 * EVICT_NAP_S * 2**EVICT_ROUNDS_MAX
