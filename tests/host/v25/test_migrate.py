"""migrate_vma under v25: two callbacks, every device's pages, data that are lost."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import trio

from hmmnet.errors import BusError, KernelError
from hmmnet.host import v25
from hmmnet.host.mm.invariants import check
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, Words

from .dummy import Dummy, Ground, refused

pytestmark = pytest.mark.virtual_time

VALID, MIGRATE, LOCKED = v25.MIGRATE_PFN_VALID, v25.MIGRATE_PFN_MIGRATE, v25.MIGRATE_PFN_LOCKED
WRITE, DEVICE = v25.MIGRATE_PFN_WRITE, v25.MIGRATE_PFN_DEVICE


def quiet(ground: Ground) -> None:
    """The books agree (I2 to I5, I8)."""
    check(ground.bench.memory, [space.mm for space in ground.bench.spaces.values()])


def bits(words: Words) -> list[int]:
    return [word & 0x3F for word in words.tolist()]


async def test_pages_move_with_their_bytes_and_come_back_when_touched() -> None:
    """Written, read-only and never touched; the source words say what each was; a CPU's touch calls `fault`, page by page."""
    ground = Ground()
    await ground.register()
    address = await ground.space.mmap(4 * PAGE_SIZE)
    await ground.space.store(address, b"a" * PAGE_SIZE + b"b" * PAGE_SIZE)
    await ground.space.load(address + 2 * PAGE_SIZE, 1)
    src, dst = await ground.to_device(address, 4)
    assert bits(np.array(ground.dummy.sources, np.uint64)) == [VALID | MIGRATE | LOCKED | WRITE] * 2 + [MIGRATE] * 2
    assert [word & MIGRATE for word in src.tolist()] == [MIGRATE] * 4
    assert bits(dst) == [VALID | LOCKED | DEVICE] * 4
    assert sorted(ground.dummy.table) == [address + i * PAGE_SIZE for i in range(4)]
    assert ground.space.pagemap(address, 4) == b"SSSS"
    assert ground.dummy.devmem.used_pages == 4
    quiet(ground)
    assert await ground.space.load(address + PAGE_SIZE, 1) == b"b"
    assert [value & 0x7F for value in ground.space.pagemap(address, 4)] == list(b"SPSS")
    assert await ground.space.load(address, 4 * PAGE_SIZE) == b"a" * PAGE_SIZE + b"b" * PAGE_SIZE + bytes(2 * PAGE_SIZE)
    assert ground.dummy.devmem.used_pages == 0
    assert ground.dummy.counts_at_free == [1] * 4
    quiet(ground)


async def test_a_driver_hears_of_its_own_migration_before_it_copies() -> None:
    """No owner is spared: the callback runs at the end of collecting, so what the driver maps afterwards stays mapped."""
    ground = Ground()
    await ground.register()
    address = await ground.space.mmap(2 * PAGE_SIZE)
    await ground.space.store(address, bytes(2 * PAGE_SIZE))
    seen: list[list[tuple[str, int, int]]] = []

    async def look() -> None:
        seen.append(list(ground.dummy.log))

    ground.dummy.during_copy = look
    await ground.to_device(address, 2)
    page = address >> PAGE_SHIFT
    assert seen == [[("dummy", page, page + 2)]]
    assert len(ground.dummy.table) == 2


async def test_partial_success_is_normal() -> None:
    """What the driver leaves out stays; what turns out to be held is cleared in src before the driver maps it."""
    ground = Ground()
    address = await ground.space.mmap(4 * PAGE_SIZE)
    await ground.space.store(address, bytes(4 * PAGE_SIZE))
    ground.dummy.refuses = {address}
    pinned = await ground.space.get_pages((address >> 12) + 1, 1, pin=True)
    src, _ = await ground.to_device(address, 4)
    assert [bool(word & MIGRATE) for word in src.tolist()] == [False, False, True, True]
    assert sorted(ground.dummy.table) == [address + 2 * PAGE_SIZE, address + 3 * PAGE_SIZE]
    ground.space.put_pages(pinned, pin=True)
    quiet(ground)


async def test_nothing_to_collect_calls_nobody() -> None:
    """migrate_vma succeeds, and neither callback runs."""
    ground = Ground()
    address = await ground.space.mmap(PAGE_SIZE, shared=True)
    await ground.space.store(address, b"x")
    src, _ = await ground.to_device(address, 1)
    assert src.tolist() == [0]
    assert ground.dummy.sources == []


async def test_arguments_that_make_no_sense_are_einval() -> None:
    """No VMA, no ops, hugetlb, empty, outside, short arrays, no lock."""
    ground = Ground()
    address = await ground.space.mmap(2 * PAGE_SIZE)
    hugetlb = await ground.space.mmap_hugetlb(2 << 20, "rw", None)
    end = address + 2 * PAGE_SIZE
    src, dst = np.zeros(2, np.uint64), np.zeros(2, np.uint64)
    async with ground.space.mmap_lock.read():
        vma = ground.vma(address)
        for bad, low, high, some in (
            (None, address, end, src),
            (ground.vma(hugetlb), hugetlb, hugetlb + PAGE_SIZE, src),
            (vma, address, address, src),
            (vma, address, end + PAGE_SIZE, src),
            (vma, address, end, src[:1]),
        ):
            with refused(errno.EINVAL):
                await ground.kernel.migrate_vma(ground.dummy, bad, low, high, some, dst)
    with refused(errno.EINVAL, "not held"):
        await ground.kernel.migrate_vma(ground.dummy, vma, address, end, src, dst)


@pytest.mark.parametrize(("forgets", "why"), [(LOCKED, "not locked"), (DEVICE, "does not say where")], ids=["lock", "device"])
async def test_a_destination_that_breaks_the_rules_moves_nothing(forgets: int, why: str) -> None:
    """The driver's bug is named; every page is where it was, and writable."""
    ground = Ground()
    address = await ground.space.mmap(2 * PAGE_SIZE)
    await ground.space.store(address, b"a" * 2 * PAGE_SIZE)
    ground.dummy.flags = forgets
    with refused(errno.EINVAL, why):
        await ground.to_device(address, 2)
    assert ground.space.pagemap(address, 2)[0] & 0x7F == ord("P")
    await ground.space.store(address, b"b")
    quiet(ground)


async def test_one_destination_for_two_pages_or_one_in_use_moves_nothing() -> None:
    """Also while another migration holds it."""
    ground = Ground()
    address = await ground.space.mmap(3 * PAGE_SIZE)
    await ground.space.store(address, bytes(3 * PAGE_SIZE))
    first = ground.dummy.idle[0]
    ground.dummy.idle[1] = first
    with refused(errno.EINVAL, "destination of two"):
        await ground.to_device(address, 2)
    ground.dummy.idle = [first, first, first + 1]
    ground.dummy.held.clear()
    await ground.to_device(address, 1)
    del ground.dummy.held[first]
    with refused(errno.EINVAL, "in use"):
        await ground.to_device(address + PAGE_SIZE, 1)
    quiet(ground)


async def test_a_callback_that_fails_leaves_every_page_where_it_was() -> None:
    """Whatever it raises passes through."""
    ground = Ground()
    address = await ground.space.mmap(2 * PAGE_SIZE)
    await ground.space.store(address, b"a" * 2 * PAGE_SIZE)

    async def fails() -> None:
        raise RuntimeError("a bug of a driver")

    ground.dummy.during_copy = fails
    with pytest.raises(RuntimeError, match="a bug"):
        await ground.to_device(address, 2)
    assert await ground.space.load(address, 2 * PAGE_SIZE) == b"a" * 2 * PAGE_SIZE
    quiet(ground)


async def test_a_page_goes_from_one_device_to_another() -> None:
    """Patch 16, and no owners: migrate_vma offers the pages of every device; its first owner has its page back."""
    ground = Ground()
    second = Dummy(ground.kernel)
    address = await ground.space.mmap(2 * PAGE_SIZE)
    await ground.space.store(address, b"a" * PAGE_SIZE + b"b" * PAGE_SIZE)
    await ground.to_device(address, 1)
    frame = ground.dummy.table[address]
    held = ground.dummy.held[frame]
    read, ground.kernel.read_page = ground.kernel.read_page, lambda page: held if page == frame else read(page)  # type: ignore[method-assign]
    await ground.to_device(address, 2, dummy=second)
    assert bits(np.array(second.sources, np.uint64)) == [VALID | MIGRATE | LOCKED | WRITE | DEVICE, VALID | MIGRATE | LOCKED | WRITE]
    assert ground.dummy.freed == [frame]
    assert ground.dummy.devmem.used_pages == 0
    assert await ground.space.load(address, 2 * PAGE_SIZE) == b"a" * PAGE_SIZE + b"b" * PAGE_SIZE
    quiet(ground)


async def test_data_that_are_lost_on_the_way_home_are_sigbus_for_good() -> None:
    """dst ERROR: this touch and every later one; other pages are as they were; the device has its page back."""
    ground = Ground()
    address = await ground.space.mmap(3 * PAGE_SIZE)
    await ground.space.store(address, b"a" * 3 * PAGE_SIZE)
    await ground.to_device(address, 3)
    lost = ground.dummy.table[address + PAGE_SIZE]
    ground.dummy.loses = {address + PAGE_SIZE}
    for _ in range(2):
        with pytest.raises(BusError):
            await ground.space.load(address + PAGE_SIZE, 1)
    assert ground.dummy.freed == [lost]
    assert ground.dummy.devmem.page_count(lost) == 1
    assert await ground.space.load(address, PAGE_SIZE) == b"a" * PAGE_SIZE
    assert await ground.space.load(address + 2 * PAGE_SIZE, PAGE_SIZE) == b"a" * PAGE_SIZE
    with pytest.raises(BusError):
        await ground.space.load(address + PAGE_SIZE, 1)
    quiet(ground)


async def test_data_that_are_lost_are_lost_for_everybody_who_maps_them() -> None:
    """A child that shares the page has SIGBUS there, too."""
    ground = Ground()
    address = await ground.space.mmap(PAGE_SIZE)
    await ground.space.store(address, b"a" * PAGE_SIZE)
    await ground.to_device(address, 1)
    child = ground.bench.spaces[2] = await ground.space.fork(2, ground.bench.new_hub())
    ground.dummy.loses = {address}
    for space in (ground.space, child):
        with pytest.raises(BusError):
            await space.load(address, 1)
    assert len(ground.dummy.freed) == 1
    quiet(ground)


async def test_what_a_driver_answers_a_touch_with() -> None:
    """SIGBUS and OOM are the program's; a page that it leaves where it is is tried again."""
    ground = Ground()
    address = await ground.space.mmap(PAGE_SIZE)
    await ground.space.store(address, b"a")
    await ground.to_device(address, 1)
    ground.dummy.answer = v25.VmFault.SIGBUS
    with pytest.raises(BusError, match="cannot bring"):
        await ground.space.load(address, 1)
    ground.dummy.answer = v25.VmFault.OOM
    with pytest.raises(KernelError, match="ENOMEM"):
        await ground.space.load(address, 1)
    ground.dummy.answer = v25.VmFault.NONE
    ground.dummy.refuses = {address}
    got: list[bytes] = []

    async def load() -> None:
        got.append(await ground.space.load(address, 1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(load)
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        assert got == []
        ground.dummy.refuses = set()
    assert got == [b"a"]
