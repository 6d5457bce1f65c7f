"""Faulting in on request: MAP_POPULATE, mlock, MADV_POPULATE, what mremap populates; by which rights, and who waits for a userfaultfd.

Oracle: mm/gup.c (check_vma_flags, populate_vma_page_range, __mm_populate), mm/mlock.c, mm/mremap.c.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import KernelError
from hmmnet.host.mm.space import Space
from hmmnet.host.mm.userfault import UserFault
from hmmnet.host.mm.vma import VM_HUGETLB, VM_LOCKED, VM_MIXEDMAP, VM_PFNMAP
from hmmnet.pages import HUGE_PAGES

from .files import BASE, PAGE, symbols, used
from .machine import Machine, page_bytes

FIRST = BASE // PAGE
BLOCK = HUGE_PAGES * PAGE


async def fill_in(faults: UserFault, pages: int) -> None:
    """The owner of a userfaultfd, for `pages` pages."""
    for _ in range(pages):
        address = await faults.read()
        await faults.copy(address, page_bytes((address - BASE) // PAGE + 1))


@pytest.mark.parametrize(
    "populate",
    [
        lambda space: space.mlock(BASE, 3 * PAGE),
        lambda space: space.madvise(BASE, 3 * PAGE, "POPULATE_READ"),
        lambda space: space.madvise(BASE, 3 * PAGE, "POPULATE_WRITE"),
        lambda space: space.populate(FIRST, FIRST + 3),
    ],
    ids=["mlock", "POPULATE_READ", "POPULATE_WRITE", "MAP_POPULATE"],
)
async def test_missing_pages_are_waited_for_without_the_lock(populate: Callable[[Space], Awaitable[None]]) -> None:
    """FAULT_FLAG_ALLOW_RETRY: the lock is dropped, the owner fills page by page in, then the call goes on where it was."""
    machine = Machine()
    space = machine.process()
    await space.mmap(3 * PAGE, "rw", BASE)
    faults = await space.userfaultfd(BASE, 2 * PAGE)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(populate, space)
            await wait_all_tasks_blocked()
            await space.mmap(PAGE, "rw", 2 * BASE)
            await fill_in(faults, 2)
    assert await space.load(BASE, 2 * PAGE) == page_bytes(1) + page_bytes(2)
    assert symbols(space, BASE, 3) == "PPP"
    machine.check()


async def test_a_locked_mapping_that_grows_waits_too() -> None:
    """The extension is registered as what it extends is; mremap populates it when it has let go of the lock."""
    machine = Machine()
    space = machine.process()
    await space.mmap(PAGE, "rw", BASE)
    await space.store(BASE, page_bytes(1))
    await space.mlock(BASE, PAGE)
    faults = await space.userfaultfd(BASE, PAGE)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(space.mremap, BASE, PAGE, 3 * PAGE)
            await wait_all_tasks_blocked()
            await fill_in(faults, 2)
    assert await space.load(BASE, 3 * PAGE) == b"".join(page_bytes(i + 1) for i in range(3))
    assert len(space.mm.vmas) == 1
    machine.check()


async def test_mremap_succeeds_though_its_pages_cannot_be_had() -> None:
    """mm_populate has no result: PROT_NONE, and a host without memory."""
    machine = Machine(host_pages=8)
    space = machine.process()
    await space.mmap(2 * PAGE, "none", BASE)
    with pytest.raises(KernelError, match="ENOMEM"):
        await space.mlock(BASE, 2 * PAGE)
    assert await space.mremap(BASE, 2 * PAGE, 4 * PAGE) == BASE
    await space.mprotect(BASE, 4 * PAGE, "rw")
    assert await space.mremap(BASE, 4 * PAGE, 64 * PAGE) == BASE
    assert used(machine) <= 8
    assert space.mm.vmas.all()[0].end - FIRST == 64
    await space.munmap(BASE, 64 * PAGE)
    machine.check()


async def test_mlock_without_memory_is_eagain() -> None:
    """__mlock_posix_error_return; without access it is ENOMEM."""
    space = Machine(host_pages=8).process()
    await space.mmap(64 * PAGE, "rw", BASE)
    with pytest.raises(KernelError, match="EAGAIN"):
        await space.mlock(BASE, 64 * PAGE)


async def test_what_may_only_be_written_is_had_for_writing() -> None:
    """PROT_WRITE alone: populate and mlock write (FOLL_FORCE would read), a pin for writing is had, one for reading is not."""
    machine = Machine()
    space = machine.process()
    await space.mmap(4 * PAGE, "w", BASE)
    await space.populate(FIRST, FIRST + 1)
    assert symbols(space, BASE, 4) == "P---"
    await space.mlock(BASE, 2 * PAGE)
    await space.madvise(BASE + 2 * PAGE, PAGE, "POPULATE_WRITE")
    assert symbols(space, BASE, 4) == "PPP-"
    with pytest.raises(KernelError, match="EINVAL"):
        await space.madvise(BASE, PAGE, "POPULATE_READ")
    frames = await space.get_pages(FIRST, 4, write=True, pin=True)
    assert len(frames) == 4
    space.put_pages(frames, pin=True)
    with pytest.raises(KernelError, match="EFAULT"):
        await space.get_pages(FIRST, 1)
    assert await space.make_exclusive(FIRST, FIRST + 4, 64) == 4
    shared = await space.mmap(PAGE, "w", 2 * BASE, shared=True)
    await space.mlock(shared, PAGE)
    assert symbols(space, shared, 1) == "p"
    machine.check()


async def test_pages_of_a_driver_are_populated_as_others() -> None:
    """VM_MIXEDMAP holds real pages; a VM_PFNMAP holds none that could be had."""
    space = Machine().process()
    await space.mmap_inserted(2 * PAGE, "rw", BASE, shared=True)
    await space.madvise(BASE, 2 * PAGE, "POPULATE_READ")
    assert len(await space.get_pages(FIRST, 2)) == 2
    await space.mmap(PAGE, "rw", 2 * BASE, VM_PFNMAP)
    with pytest.raises(KernelError, match="EINVAL"):
        await space.madvise(2 * BASE, PAGE, "POPULATE_READ")
    with pytest.raises(KernelError, match="EFAULT"):
        await space.get_pages(2 * FIRST, 1)


async def test_what_cannot_go_away_is_not_marked_locked() -> None:
    """mlock_fixup: huge pages of the pool and drivers' pages are populated, and can be dropped afterwards."""
    machine = Machine(host_pages=4 * HUGE_PAGES)
    space = machine.process()
    await space.mmap(BLOCK, "rw", BASE, VM_HUGETLB)
    await space.mmap_inserted(PAGE, "rw", 2 * BASE, shared=True)
    await space.mlock(BASE, BLOCK)
    await space.mlock(2 * BASE, PAGE)
    assert not any(vma.flags & VM_LOCKED for vma in space.mm.vmas.all())
    await space.madvise(BASE, BLOCK, "DONTNEED")
    await space.madvise(2 * BASE, PAGE, "DONTNEED")
    assert symbols(space, BASE, 1) == symbols(space, 2 * BASE, 1) == "-"


async def test_dontneed_of_a_part_of_a_huge_page_of_the_pool() -> None:
    """From where a huge page begins; what is dropped is rounded down, and nothing of 5 pages."""
    machine = Machine(host_pages=4 * HUGE_PAGES)
    space = machine.process()
    await space.mmap(2 * BLOCK, "rw", BASE, VM_HUGETLB)
    await space.store(BASE, b"first")
    await space.store(BASE + BLOCK, b"second")
    await space.madvise(BASE, 5 * PAGE, "DONTNEED")
    assert await space.load(BASE, 5) == b"first"
    with pytest.raises(KernelError, match="EINVAL"):
        await space.madvise(BASE + PAGE, BLOCK, "DONTNEED")
    await space.madvise(BASE, BLOCK + 5 * PAGE, "DONTNEED")
    assert await space.load(BASE, 5) == bytes(5)
    assert await space.load(BASE + BLOCK, 6) == b"second"


async def test_mremap_of_the_pool_and_of_drivers_pages() -> None:
    """Huge pages move whole and do not grow; a driver's mapping grows nowhere but elsewhere."""
    machine = Machine(host_pages=4 * HUGE_PAGES)
    space = machine.process()
    await space.mmap(2 * BLOCK, "rw", BASE, VM_HUGETLB)
    await space.store(BASE, b"huge")
    for arguments in [(BASE + PAGE, PAGE, PAGE, 4 * BASE), (BASE, PAGE, PAGE, 4 * BASE + PAGE), (BASE, BLOCK, 2 * BLOCK, 4 * BASE)]:
        with pytest.raises(KernelError, match="EINVAL"):
            await space.mremap(*arguments)
    assert await space.mremap(BASE, 5 * PAGE, 5 * PAGE, 4 * BASE) == 4 * BASE
    assert await space.load(4 * BASE, 4) == b"huge"
    inserted = await space.mmap_inserted(PAGE, "rw", 2 * BASE, shared=True)
    with pytest.raises(KernelError, match="ENOMEM"):
        await space.mremap(inserted, PAGE, 2 * PAGE, may_move=False)
    assert await space.mremap(inserted, PAGE, 2 * PAGE, 3 * BASE) == 3 * BASE
    assert symbols(space, 3 * BASE, 2) == "p-"
    machine.check()
    await space.mmap(PAGE, "rw", 2 * BASE, VM_PFNMAP)
    with pytest.raises(KernelError, match="EINVAL"):
        await space.mremap(2 * BASE, PAGE, PAGE, dontunmap=True)


async def test_dontunmap_of_a_part_unlocks_all() -> None:
    """move_vma clears VM_LOCKED of the VMA that it found, whatever part of it moved."""
    space = Machine().process()
    await space.mmap(4 * PAGE, "rw", BASE)
    await space.mlock(BASE, 4 * PAGE)
    await space.mremap(BASE + PAGE, PAGE, PAGE, 2 * BASE, dontunmap=True)
    flags = [vma.flags & VM_LOCKED for vma in space.mm.vmas.all()]
    assert flags == [0, VM_LOCKED]
    assert space.mm.vmas.find(FIRST + 3) is space.mm.vmas.find(FIRST)


async def test_collapse_wants_room_for_a_huge_page() -> None:
    """thp_vma_suitable_order, asked of the whole mapping: EINVAL where no aligned block fits; a part of one that fits is nothing to do."""
    space = Machine(host_pages=4 * HUGE_PAGES).process()
    await space.mmap(100 * PAGE, "rw", BASE)
    with pytest.raises(KernelError, match="EINVAL"):
        await space.madvise(BASE, 100 * PAGE, "COLLAPSE")
    await space.mmap(BLOCK, "rw", 2 * BASE)
    await space.madvise(2 * BASE, PAGE, "COLLAPSE")


async def test_special_mappings_keep_apart() -> None:
    """A VM_MIXEDMAP mapping does not take its extension in."""
    space = Machine().process()
    await space.mmap(PAGE, "rw", BASE, VM_MIXEDMAP)
    with pytest.raises(KernelError, match="ENOMEM"):
        await space.mremap(BASE, PAGE, 2 * PAGE, may_move=False)
