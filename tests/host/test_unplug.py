"""Hot removal of device memory while processes have pages there (semantics A2, A9)."""

from __future__ import annotations

import pytest

from hmmnet.errors import HmmnetError
from hmmnet.host.homing import EVICT_ROUNDS_MAX
from hmmnet.pages import PAGE_SIZE

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
