"""Page maps: what is in use, who holds it, what happens when the device goes away (semantics A9)."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import trio
import trio.testing

from hmmnet.errors import HmmnetError, KernelError
from hmmnet.host.devmem import Holder
from hmmnet.host.poison import _break
from hmmnet.pages import PAGE_SIZE, PAGES_MAX

from .fakes import FIRST_FRAME, ZONE, Bench, FakeLink


async def test_last_reference_calls_folio_free() -> None:
    """munmap of device pages tells the driver their frames."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(3 * PAGE_SIZE)
    await bench.to_device(space, address, 3)
    assert bench.page_map.used_frames().tolist() == [FIRST_FRAME, FIRST_FRAME + 1, FIRST_FRAME + 2]
    await space.munmap(address + PAGE_SIZE, PAGE_SIZE)
    assert bench.link.freed == [FIRST_FRAME + 1]
    await space.exit()
    assert sorted(bench.link.freed) == [FIRST_FRAME, FIRST_FRAME + 1, FIRST_FRAME + 2]
    assert bench.page_map.used_pages == 0


async def test_removal_names_who_leaks_instead_of_hanging() -> None:
    """Mappings by process, and references without a mapping."""
    bench = Bench()
    for number in (1, 2):
        space = bench.space(number)
        await bench.to_device(space, await space.mmap(number * PAGE_SIZE), number)
    bench.page_map.zone.refcount[500] = 1
    bench.page_map.zone.offered = 501
    assert list(bench.page_map.holders()) == [Holder(1, 1), Holder(2, 2), Holder(0, 1)]
    with pytest.raises(HmmnetError, match="process 1 maps 1 pages; process 2 maps 2 pages; 1 pages are held without a mapping"):
        bench.page_map.remove()


async def test_an_unused_map_can_be_removed() -> None:
    """And its zone is gone."""
    bench = Bench()
    bench.page_map.remove()
    assert ZONE not in bench.memory.zones


async def test_a_lost_map_without_pages_goes_away() -> None:
    """Nothing was lost, so nothing has to be remembered."""
    bench = Bench()
    bench.lose("gone")
    bench.page_map.bury()
    assert ZONE not in bench.memory.zones


async def test_a_lost_map_with_pages_stays_until_they_are_unmapped() -> None:
    """Its pages answer SIGBUS; the driver is told of no more frees."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(PAGE_SIZE)
    await bench.to_device(space, address, 1)
    bench.lose("gone")
    bench.page_map.bury()
    assert ZONE in bench.memory.zones
    await space.munmap(address, PAGE_SIZE)
    assert bench.link.freed == []
    assert bench.page_map.used_pages == 0


@pytest.mark.parametrize("how", ["withdraw", "break"])
async def test_a_process_may_end_while_others_are_told(how: str) -> None:
    """Two processes have pages in what is withdrawn, or breaks; the second ends while a mirror of the first lets go."""
    bench = Bench()
    addresses = []
    for number in (1, 2):
        space = bench.space(number)
        addresses.append(await space.mmap(PAGE_SIZE))
        await bench.to_device(space, addresses[-1], 1)
    mirror = FakeLink("gpu1", ZONE + 1)
    bench.hub(bench.spaces[1]).insert(0, PAGES_MAX, mirror, 1)
    answer = mirror.hold()
    frames = bench.page_map.used_frames()

    async def tell() -> None:
        if how == "withdraw":
            await bench.page_map.withdraw(bench.spaces)
        else:
            await _break(bench.memory, bench.spaces, frames)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell)
        await trio.testing.wait_all_tasks_blocked()
        await bench.spaces.pop(2).exit()
        answer.set()
    assert len(mirror.told) == 1


def test_broken_frames_are_the_drivers_or_nobodys() -> None:
    """memory_failure of dev_pagemap_ops: ENXIO without one, and for somebody else's frames; a driver that has one hears of them."""
    bench = Bench()
    frames = bench.grant(2).frames
    with pytest.raises(KernelError, match="does not handle") as caught:
        bench.page_map.memory_failure(frames)
    assert caught.value.code == errno.ENXIO
    heard: list[int] = []
    bench.page_map.on_memory_failure = lambda broken: heard.extend(broken.tolist())
    bench.page_map.memory_failure(frames)
    assert heard == frames.tolist()
    with pytest.raises(KernelError, match="are not of device"):
        bench.page_map.memory_failure(frames + np.uint64(1 << 40))
