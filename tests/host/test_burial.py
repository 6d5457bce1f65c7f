"""What is left of a device that died, and when it goes."""

from __future__ import annotations

import gc
import weakref

import pytest
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import BusError
from hmmnet.pages import DEVICE_ZONE_MIN, PAGE_SIZE

from .scripted_device import KILLED, lost, one_device, pages_of

pytestmark = pytest.mark.virtual_time


@pytest.mark.parametrize("how", ["munmap", "exit", "madvise"])
async def test_memory_of_a_dead_device_goes_with_the_last_who_maps_it(how: str) -> None:
    """Also long after the device: zone, struct pages and bytes are forgotten; until then its pages are SIGBUS that name it."""
    async with one_device() as (host, device, process):
        address = await pages_of(process, 4)
        await process.migrate(address, 4 * PAGE_SIZE, "gpu0")
        child = await process.fork()
        device.vanish()
        host.device_exited("gpu0", KILLED)
        await lost(host)
        await process.munmap(address, 3 * PAGE_SIZE)
        await wait_all_tasks_blocked()
        await child.exit()
        zone = host.memory.zones[DEVICE_ZONE_MIN]
        with pytest.raises(BusError, match="gpu0"):
            await process.read(address + 3 * PAGE_SIZE, 1)
        if how == "munmap":
            await process.munmap(address + 3 * PAGE_SIZE, PAGE_SIZE)
        elif how == "exit":
            await process.exit()
        else:
            await process.madvise(address + 3 * PAGE_SIZE, PAGE_SIZE, "DONTNEED")
        assert list(host.memory.zones) == [0]
        assert host.memory.emptied == []
        forgotten = weakref.ref(zone)
        del zone
        gc.collect()
        assert forgotten() is None
