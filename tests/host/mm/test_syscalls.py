"""mremap, mlock, madvise, fork, pins and exclusive access: errors and rules that no recording shows."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import KernelError
from hmmnet.host.hub import Hub
from hmmnet.host.interfaces import Select
from hmmnet.host.mm import pte, rmap
from hmmnet.host.mm.collect import collect_frames, move
from hmmnet.host.mm.finalize import finalize
from hmmnet.host.mm.space import Space
from hmmnet.host.mm.vma import PAGES_TOP, VM_LOCKED, VM_PFNMAP, VM_SHARED
from hmmnet.pages import PAGE_SIZE

from .machine import Machine, page_bytes, span

PAGE = PAGE_SIZE


async def filled(space: Space, pages: int, address: int | None = None) -> int:
    """A region whose page i holds the byte i + 1 throughout; its address."""
    address = await space.mmap(pages * PAGE, "rw", address)
    await space.store(address, b"".join(page_bytes(i + 1) for i in range(pages)))
    return address


def entry(space: Space, address: int) -> int:
    """The page table entry of an address."""
    return space.mm.table.get(address // PAGE)


# --- mremap -----------------------------------------------------------------------------------------------------------------------


async def test_mremap_errors() -> None:
    """Arguments that make no sense: EINVAL; no VMA, or more than one: EFAULT; no room: ENOMEM."""
    space = Machine().process()
    address = await filled(space, 4, 1 << 30)
    await space.mprotect(address + 2 * PAGE, 2 * PAGE, "r")
    special = await space.mmap(PAGE, "rw", 2 << 30, VM_PFNMAP)
    for arguments, options, code in [
        ((address + 1, PAGE, PAGE), {}, errno.EINVAL),
        ((address, PAGE, 0), {}, errno.EINVAL),
        ((address, PAGE, 2 * PAGE), {"dontunmap": True}, errno.EINVAL),
        ((address, PAGE, PAGE, 3 << 30), {"may_move": False}, errno.EINVAL),
        ((address, 2 * PAGE, 2 * PAGE, address + PAGE), {}, errno.EINVAL),
        ((address, PAGE, PAGE, (PAGES_TOP + 1) * PAGE), {}, errno.EINVAL),
        ((address, 0, PAGE), {}, errno.EINVAL),
        ((17 * PAGE, PAGE, PAGE), {}, errno.EFAULT),
        ((address, 4 * PAGE, 5 * PAGE), {}, errno.EFAULT),
        ((special, PAGE, 2 * PAGE), {}, errno.EFAULT),
        ((address, PAGE, 2 * PAGE), {"may_move": False}, errno.ENOMEM),
    ]:
        with pytest.raises(KernelError) as held:
            await space.mremap(*arguments, **options)
        assert held.value.code == code, arguments


async def test_mremap_shrinks_grows_and_moves() -> None:
    """In place as long as there is room, else to a place that the kernel chooses; contents go along."""
    machine = Machine()
    space = machine.process()
    address = await filled(space, 4, 1 << 30)
    assert await space.mremap(address, 4 * PAGE, 2 * PAGE) == address
    assert await space.mremap(address, 2 * PAGE, 6 * PAGE) == address
    assert await space.load(address, 6 * PAGE) == page_bytes(1) + page_bytes(2) + bytes(4 * PAGE)
    assert len(space.mm.vmas) == 1
    await space.mmap(PAGE, "r", address + 6 * PAGE)
    moved = await space.mremap(address, 6 * PAGE, 8 * PAGE)
    assert moved != address
    assert await space.load(moved, 3 * PAGE) == page_bytes(1) + page_bytes(2) + bytes(PAGE)
    assert space.vma_at(address // PAGE) is None
    await machine.to_device(space, 64, span(moved // PAGE, 2))
    back = await space.mremap(moved, 8 * PAGE, PAGE, address)
    assert await space.load(back, PAGE) == page_bytes(1)
    machine.check()


async def test_dontunmap_leaves_untouched_memory_behind() -> None:
    """The old range stays mapped and reads as zero; a place is chosen when none is given."""
    machine = Machine()
    space = machine.process()
    address = await filled(space, 2)
    target = await space.mremap(address, 2 * PAGE, 2 * PAGE, dontunmap=True)
    assert await space.load(address, 2 * PAGE) == bytes(2 * PAGE)
    assert await space.load(target, PAGE) == page_bytes(1)
    machine.check()


async def test_locked_memory_grows_populated() -> None:
    """VM_LOCKED holds for what is new, in place or moved."""
    space = Machine().process()
    address = await filled(space, 1, 1 << 30)
    await space.mlock(address, PAGE)
    await space.mremap(address, PAGE, 2 * PAGE)
    assert entry(space, address + PAGE) & pte.WRITE
    await space.mmap(PAGE, "r", address + 2 * PAGE)
    moved = await space.mremap(address, 2 * PAGE, 3 * PAGE)
    assert entry(space, moved + 2 * PAGE) & pte.WRITE


async def test_mremap_waits_for_an_eviction() -> None:
    """Eviction by frame takes no mmap lock, so a page may be on its way when its VMA is moved."""
    machine = Machine()
    space = machine.process()
    address = await filled(space, 1, 1 << 30)
    await machine.to_device(space, 64, span(address // PAGE, 1))
    frame = entry(space, address) >> pte.FRAME_SHIFT
    migration = collect_frames(machine.memory, np.array([frame], np.uint64), {1: [span(address // PAGE, 1)]})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(space.mremap, address, PAGE, PAGE, 2 << 30)
        await wait_all_tasks_blocked()
        assert space.vma_at(address // PAGE) is not None
        move(machine.memory, None, migration)
        finalize(machine.memory, None, migration)
    assert await space.load(2 << 30, PAGE) == page_bytes(1)
    machine.check()


# --- mlock, mprotect --------------------------------------------------------------------------------------------------------------


async def test_mlock_rules() -> None:
    """Pages are made, device pages come home; a hole or memory without access is ENOMEM; munlock ends it."""
    machine = Machine()
    space = machine.process()
    address = await filled(space, 2, 1 << 30)
    await machine.to_device(space, 64, span(address // PAGE, 2))
    await space.mlock(address + 5, PAGE)
    assert machine.homed == [address // PAGE, address // PAGE + 1]
    for advice in ("DONTNEED", "FREE", "COLD"):
        with pytest.raises(KernelError, match="EINVAL"):
            await space.madvise(address, PAGE, advice)
    await space.madvise(address, PAGE, "DONTNEED_LOCKED")
    await space.munlock(address, 2 * PAGE)
    assert not any(vma.flags & VM_LOCKED for vma in space.mm.vmas.all())
    for call in (space.mlock(address, 3 * PAGE), space.munlock(address + 2 * PAGE, PAGE)):
        with pytest.raises(KernelError, match="ENOMEM"):
            await call
    await space.mprotect(address, PAGE, "none")
    with pytest.raises(KernelError, match="mlock: ENOMEM"):
        await space.mlock(address, PAGE)


async def test_locked_read_only_memory_is_copied_when_it_becomes_writable() -> None:
    """mprotect of locked private memory populates for writing."""
    space = Machine().process()
    address = await space.mmap(PAGE, "r")
    await space.mlock(address, PAGE)
    assert entry(space, address) & pte.SPECIAL
    await space.mprotect(address, PAGE, "rw")
    assert entry(space, address) & pte.WRITE


# --- madvise ----------------------------------------------------------------------------------------------------------------------


async def test_advice_about_vmas() -> None:
    """Flags split and merge VMAs; private memory only for WIPEONFORK."""
    space = Machine().process()
    address = await space.mmap(3 * PAGE)
    for there, back in [("RANDOM", "NORMAL"), ("SEQUENTIAL", "NORMAL"), ("DONTFORK", "DOFORK"), ("WIPEONFORK", "KEEPONFORK")]:
        await space.madvise(address + PAGE, PAGE, there)
        assert len(space.mm.vmas) == 3
        await space.madvise(address + PAGE, PAGE, back)
        assert len(space.mm.vmas) == 1
    shared = await space.mmap(PAGE, "rw", 1 << 30, VM_SHARED)
    for advice in ("WIPEONFORK", "FREE"):
        with pytest.raises(KernelError, match="EINVAL"):
            await space.madvise(shared, PAGE, advice)


async def test_advice_goes_on_over_holes() -> None:
    """What is mapped is advised, then ENOMEM."""
    machine = Machine()
    space = machine.process()
    address = await filled(space, 3)
    await space.munmap(address + PAGE, PAGE)
    for advice in ("DONTNEED", "DONTFORK"):
        with pytest.raises(KernelError, match="ENOMEM"):
            await space.madvise(address, 3 * PAGE, advice)
    assert space.mm.rss == 0
    with pytest.raises(KernelError, match="ENOMEM"):
        await space.madvise(address, 3 * PAGE, "POPULATE_READ")
    assert entry(space, address)
    await space.madvise(address, 0, "DONTNEED")


async def test_populate_says_why_not() -> None:
    """EINVAL where the rights are missing, EFAULT where the data are lost."""
    machine = Machine()
    space = machine.process()
    address = await filled(space, 1)
    await machine.to_device(space, 64, span(address // PAGE, 1))
    machine.memory.zone_lost(64, "killed")
    with pytest.raises(KernelError, match="EFAULT"):
        await space.madvise(address, PAGE, "POPULATE_READ")
    await space.mprotect(address, PAGE, "r")
    with pytest.raises(KernelError, match="EINVAL"):
        await space.madvise(address, PAGE, "POPULATE_WRITE")


# --- fork -------------------------------------------------------------------------------------------------------------------------


async def test_family_shares_until_a_store() -> None:
    """One frame for all; each store makes one copy; the last owner stores in place."""
    machine = Machine()
    parent = machine.process()
    address = await filled(parent, 2)
    child = await machine.fork(parent)
    grandchild = await machine.fork(child)
    used = machine.memory.nodes[0].allocator.used_count
    machine.check()
    await child.store(address, b"child")
    await grandchild.store(address, b"grand")
    assert machine.memory.nodes[0].allocator.used_count == used + 2
    frame = entry(parent, address)
    await parent.store(address, b"first")
    assert entry(parent, address) >> pte.FRAME_SHIFT == frame >> pte.FRAME_SHIFT
    assert [await space.load(address, 6) for space in (parent, child, grandchild)] == [b"first\1", b"child\1", b"grand\1"]
    machine.check()
    for space in (parent, child, grandchild):
        await machine.exit(space)
    machine.check()
    assert machine.memory.anon_families == {}


async def test_rmap_finds_a_page_wherever_it_was_moved() -> None:
    """Parent at the old place, child at a new one; a walk visits the copied place too."""
    machine = Machine()
    parent = machine.process()
    address = await filled(parent, 3, 1 << 30)
    child = await machine.fork(parent)
    await child.mremap(address, 3 * PAGE, 3 * PAGE, 2 << 30)
    await child.store((2 << 30) + PAGE, b"own")
    frames = parent.mm.table.read(address // PAGE, address // PAGE + 3) >> np.uint64(pte.FRAME_SHIFT)
    found = {mapped.mm.number: mapped.pages.tolist() for mapped in rmap.mappings(machine.memory, frames)}
    first, moved = address // PAGE, (2 << 30) // PAGE
    assert found == {1: [first, first + 1, first + 2], 2: [moved, moved + 2]}
    visited = {mm.number: pages.tolist() for mm, pages in rmap.places(machine.memory, frames)}
    assert visited == {1: [first, first + 1, first + 2], 2: [moved, moved + 1, moved + 2]}
    assert await machine.to_device(parent, 64, span(first, 3)) is not None
    assert child.pagemap(2 << 30, 3) == bytes([0x53, 0x50 | 0x80, 0x53])
    assert await child.load(2 << 30, PAGE) == page_bytes(1)
    machine.check()


async def test_pages_of_processes_that_were_not_told_stay() -> None:
    """Migration leaves a shared page alone unless every process that maps it was told."""
    machine = Machine()
    parent = machine.process()
    address = await filled(parent, 2)
    child = await machine.fork(parent)
    await child.store(address, b"own")
    async with parent.mmap_lock.read():
        for count in (1, 2):
            migration = parent.collect(span(address // PAGE + 2 - count, count), Select.SYSTEM, 64)
            assert [bool(word) for word in migration.source.tolist()] == [True, False][2 - count :]
            parent.migrate_restore(migration)
            parent.migrate_finalize(migration)
    machine.check()


async def test_fork_without_memory() -> None:
    """A pinned page has to be copied; without a frame there is no child, and the parent is whole."""
    machine = Machine(host_pages=3)
    parent = machine.process()
    address = await filled(parent, 2)
    frames = await parent.get_pages(address // PAGE, 2, write=True, pin=True)
    with pytest.raises(KernelError, match="fork: ENOMEM"):
        await parent.fork(2, Hub())
    machine.check()
    parent.put_pages(frames, pin=True)
    await machine.exit(await machine.fork(parent))
    await parent.store(address, b"still here")
    machine.check()


# --- references and exclusive access ----------------------------------------------------------------------------------------------


async def test_references_partly_had() -> None:
    """As many as can be had from the first on; EFAULT when that is none; the zero page needs no reference."""
    machine = Machine()
    space = machine.process()
    address = await filled(space, 2)
    assert len(await space.get_pages(address // PAGE, 5)) == 2
    with pytest.raises(KernelError, match="EFAULT"):
        await space.get_pages(address // PAGE + 2, 1)
    await space.mprotect(address, 2 * PAGE, "r")
    with pytest.raises(KernelError, match="EFAULT"):
        await space.get_pages(address // PAGE, 1, write=True)
    fresh = await space.mmap(PAGE)
    assert (await space.get_pages(fresh // PAGE, 1)).tolist() == [0]
    assert (await space.get_pages(fresh // PAGE, 1, pin=True)).tolist() == [0]


async def test_a_read_only_pin_unshares() -> None:
    """After fork the pinner gets a page of the process's own; the last owner keeps its frame."""
    machine = Machine()
    parent = machine.process()
    address = await filled(parent, 1)
    child = await machine.fork(parent)
    frames = await parent.get_pages(address // PAGE, 1, pin=True)
    assert frames[0] != entry(child, address) >> pte.FRAME_SHIFT
    await parent.store(address, b"seen by the pin")
    assert machine.bytes_of(int(frames[0]))[:4] == b"seen"
    same = await child.get_pages(address // PAGE, 1, pin=True)
    assert same[0] == entry(child, address) >> pte.FRAME_SHIFT
    parent.put_pages(frames, pin=True)
    child.put_pages(same, pin=True)
    machine.check()


async def test_exclusive_access() -> None:
    """It ends at a page that cannot be had, and with a CPU load; shared memory is refused."""
    machine = Machine()
    space = machine.process()
    address = await filled(space, 2)
    assert await space.make_exclusive(address // PAGE, address // PAGE + 3, 64) == 2
    assert space.pagemap(address, 2) == b"SS"
    assert await space.load(address, PAGE) == page_bytes(1)
    assert space.pagemap(address, 2) == bytes([0x50 | 0x80, 0x53])
    machine.check()
    shared = await space.mmap(PAGE, "rw", 1 << 30, VM_SHARED)
    with pytest.raises(KernelError, match="EOPNOTSUPP"):
        await space.make_exclusive(shared // PAGE, shared // PAGE + 1, 64)
    with pytest.raises(KernelError, match="EFAULT"):
        await space.make_exclusive(17, 18, 64)
