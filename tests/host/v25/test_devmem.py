"""hmm_devmem and hmm_device: memory that a driver hotplugs, its codes, its references, its end."""

from __future__ import annotations

import errno

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.arena import Arena
from hmmnet.host import v25
from hmmnet.host.mm import zones
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, ZONE_SHIFT, ZONES_MAX

from .dummy import Dummy, Ground, Public, public, refused

pytestmark = pytest.mark.virtual_time


def test_private_memory_comes_from_the_top_of_the_physical_addresses() -> None:
    """In whole sections of 128 MiB, each addition below the last."""
    ground = Ground()
    first, second = ground.dummy.devmem, Dummy(ground.kernel, 32769).devmem
    assert first.pfn_first >> ZONE_SHIFT == ZONES_MAX - 1
    assert second.pfn_first >> ZONE_SHIFT == ZONES_MAX - 2
    assert first.pfn_last - first.pfn_first + 1 == 32768
    assert second.pfn_last - second.pfn_first + 1 == 65536


def test_what_cannot_be_added_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """EINVAL, ERANGE, ENOMEM for private memory."""
    ground = Ground()
    device = ground.kernel.hmm_device_new()
    for size, code in ((0, errno.EINVAL), (-1, errno.EINVAL), ((1 << ZONE_SHIFT + PAGE_SHIFT) + 1, errno.ERANGE)):
        with refused(code):
            ground.kernel.hmm_devmem_add(ground.dummy, device, size)

    def used_up(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    with monkeypatch.context() as patch:
        patch.setattr(zones, "lazy_array", used_up)
        with refused(errno.ENOMEM, "struct pages"):
            ground.kernel.hmm_devmem_add(ground.dummy, device, 1)
    ground.kernel.hmm_devmem_add(ground.dummy, device, 1)
    for number in range(64, ZONES_MAX):
        ground.bench.memory.zones.setdefault(number, ground.bench.memory.nodes[0])
    with refused(errno.ERANGE, "no room"):
        ground.kernel.hmm_devmem_add(ground.dummy, device, 1)


def test_a_collision_of_private_memory_is_ebusy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody took the range between the search and the creation of its pages."""
    ground = Ground()
    device = ground.kernel.hmm_device_new()
    create = ground.kernel._create

    def late(ops: v25.HmmDevmemOps, parent: v25.HmmDevice, resource: v25.Resource, call: str) -> v25.HmmDevmem:
        create(ops, parent, resource, call)
        return create(ops, parent, resource, call)

    monkeypatch.setattr(ground.kernel, "_create", late)
    with refused(errno.EBUSY):
        ground.kernel.hmm_devmem_add(ground.dummy, device, 1)


def test_only_public_memory_has_a_resource() -> None:
    """EINVAL for another kind and for what is no memory's beginning, ENXIO for the host's own, EBUSY for a device's, ERANGE beyond all."""
    ground = Ground()
    device = ground.kernel.hmm_device_new()
    add = ground.kernel.hmm_devmem_add_resource
    arena = Arena(0, 8)
    for bad, code in (
        (public(desc=v25.Desc.DEVICE_PRIVATE_MEMORY), errno.EINVAL),
        (public(desc=v25.Desc.NONE), errno.EINVAL),
        (v25.Resource(200 << ZONE_SHIFT, 8, v25.Desc.DEVICE_PUBLIC_MEMORY), errno.EINVAL),
        (v25.Resource((200 << ZONE_SHIFT) + 1, 8, v25.Desc.DEVICE_PUBLIC_MEMORY, arena), errno.EINVAL),
        (v25.Resource(200 << ZONE_SHIFT, 9, v25.Desc.DEVICE_PUBLIC_MEMORY, arena), errno.EINVAL),
        (v25.Resource(0, 8, v25.Desc.DEVICE_PUBLIC_MEMORY, arena), errno.ENXIO),
        (v25.Resource(ground.dummy.devmem.pfn_first, 8, v25.Desc.DEVICE_PUBLIC_MEMORY, arena), errno.EBUSY),
        (v25.Resource(ZONES_MAX << ZONE_SHIFT, 8, v25.Desc.DEVICE_PUBLIC_MEMORY, arena), errno.ERANGE),
    ):
        with refused(code):
            add(ground.dummy, device, bad)
    made = add(ground.dummy, device, public())
    assert (made.pfn_first, made.pfn_last) == (200 << ZONE_SHIFT, (200 << ZONE_SHIFT) + 63)
    with refused(errno.EBUSY):
        add(ground.dummy, device, public())


def test_there_are_at_most_256_devices() -> None:
    """EBUSY for one more; a number that was put is given again; memories hang on a device that is there only."""
    ground = Ground()
    kernel = ground.kernel
    made = [kernel.hmm_device_new(number) for number in range(v25.HMM_DEVICE_MAX - 1)]
    assert sorted(device.minor for device in kernel.devices.values()) == list(range(256))
    with refused(errno.EBUSY):
        kernel.hmm_device_new()
    kernel.hmm_device_put(made[7])
    with refused(errno.EINVAL, "put already"):
        kernel.hmm_device_put(made[7])
    with refused(errno.EINVAL, "was put"):
        kernel.hmm_devmem_add(ground.dummy, made[7], 1)
    again = kernel.hmm_device_new("again")
    assert again.minor == made[7].minor
    assert again.drvdata == "again"


def test_several_memories_hang_on_one_device() -> None:
    """What an hmm_device is for: a device with many memories, or many devices of one driver."""
    ground = Ground()
    device = ground.kernel.hmm_device_new()
    memories = [ground.kernel.hmm_devmem_add(ground.dummy, device, 1) for _ in range(3)]
    assert {memory.device for memory in memories} == {device}
    assert len({memory.pfn_first for memory in memories}) == 3


async def test_an_idle_page_has_one_reference() -> None:
    """The personality's base (I8): 1 while idle, one more for each mapping, and `free` is called at the put that brings it back to 1."""
    ground = Ground()
    address = await ground.space.mmap(PAGE_SIZE)
    await ground.space.store(address, b"x")
    page = ground.dummy.idle[0]
    devmem = ground.dummy.devmem
    assert devmem.page_count(page) == 1
    await ground.to_device(address, 1)
    assert devmem.page_count(page) == 2
    child = ground.bench.spaces[2] = await ground.space.fork(2, ground.bench.new_hub())
    assert devmem.page_count(page) == 3
    await child.munmap(address, PAGE_SIZE)
    assert devmem.page_count(page) == 2
    assert ground.dummy.freed == []
    await ground.space.madvise(address, PAGE_SIZE, "DONTNEED")
    assert ground.dummy.freed == [page]
    assert ground.dummy.counts_at_free == [1]


async def test_remove_waits_for_every_page() -> None:
    """It says who holds some; when the last is free the memory is gone, and its place can be taken again."""
    ground = Ground()
    address = await ground.space.mmap(2 * PAGE_SIZE)
    await ground.space.store(address, bytes(2 * PAGE_SIZE))
    await ground.to_device(address, 2)
    devmem, removed = ground.dummy.devmem, trio.Event()

    async def remove() -> None:
        await ground.kernel.hmm_devmem_remove(devmem)
        removed.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(remove)
        await wait_all_tasks_blocked()
        assert [str(holder) for holder in devmem.holders()] == ["process 1 maps 2 pages"]
        await ground.space.load(address, 1)
        await wait_all_tasks_blocked()
        assert not removed.is_set()
        await ground.space.load(address + PAGE_SIZE, 1)
    assert removed.is_set()
    with refused(errno.EINVAL, "removed already"):
        await ground.kernel.hmm_devmem_remove(devmem)
    assert Dummy(ground.kernel).devmem.pfn_first == devmem.pfn_first


@pytest.fixture
def ground() -> Ground:
    return Ground()


async def test_the_cpu_reaches_public_memory_in_place(ground: Ground) -> None:
    """No fault: loads and stores go to the device's bytes; a snapshot shows an ordinary page; unmapping gives it back."""
    driver = Public(ground.kernel)
    await ground.register(driver)
    address = await ground.space.mmap(PAGE_SIZE)
    await ground.space.store(address, b"here")
    async with ground.space.mmap_lock.read():
        await driver.migrate(ground.vma(address), address, 1)
    frame = driver.table[address]
    assert frame >> ZONE_SHIFT == 200
    assert await ground.space.load(address, 4) == b"here"
    await ground.space.store(address, b"HERE")
    assert driver.resource.arena is not None
    assert bytes(driver.resource.arena.pages[frame - driver.devmem.pfn_first][:4]) == b"HERE"
    assert ground.space.pagemap(address, 1)[0] & 0x7F == ord("P")
    word = v25.HMM_PFN_VALID | v25.HMM_PFN_READ | v25.HMM_PFN_WRITE
    assert await ground.bits(address, 1) == [word]
    await ground.space.munmap(address, PAGE_SIZE)
    assert driver.freed == [frame]
    assert driver.counts_at_free == [1]


async def test_a_page_that_is_held_keeps_its_memory(ground: Ground) -> None:
    """A reference beyond the mappings: the page is not free when it is unmapped, and remove would wait (who: nobody's mapping)."""
    driver = Public(ground.kernel)
    address = await ground.space.mmap(PAGE_SIZE)
    await ground.space.store(address, b"x")
    async with ground.space.mmap_lock.read():
        await driver.migrate(ground.vma(address), address, 1)
    held = await ground.space.get_pages(address >> 12, 1)
    await ground.space.munmap(address, PAGE_SIZE)
    assert driver.freed == []
    assert [str(holder) for holder in driver.devmem.holders()] == ["1 pages are held without a mapping"]
    ground.space.put_pages(held)
    assert len(driver.freed) == 1
