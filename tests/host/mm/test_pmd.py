"""Huge pages that migrate as one, disturbed between any two of the steps.

Oracle: mm/migrate_device.c (migrate_vma_collect_huge_pmd, migrate_vma_insert_huge_pmd_page, migrate_vma_finalize with split folios): what
is not disturbed moves, what is stays or goes on page by page, and no byte, frame or mapping is lost.
"""

from __future__ import annotations

import numpy as np
import pytest

from hmmnet.host.interfaces import Migration, Select
from hmmnet.host.migrate import set_targets
from hmmnet.host.mm import pte
from hmmnet.host.mm.space import Space
from hmmnet.pages import HUGE_PAGES, HUGE_SHIFT, MIGRATE_PFN_MIGRATE, MIGRATE_PFN_SHIFT, MIGRATE_PFN_VALID

from .files import BASE, PAGE, used
from .machine import Machine, blocks_in, words

FIRST = BASE // PAGE
BLOCK = HUGE_PAGES * PAGE
ZONE = 64
WHOLE = Select.SYSTEM | Select.COMPOUND


def machine_of() -> Machine:
    return Machine(device_pages=4 * HUGE_PAGES)


async def huge_space(machine: Machine, blocks: int = 2, *, written: bool = True) -> Space:
    space = machine.process()
    await space.mmap(blocks * BLOCK, "rw", BASE)
    await space.madvise(BASE, blocks * BLOCK, "HUGEPAGE")
    for block in range(blocks if written else 0):
        await space.store(BASE + block * BLOCK, np.arange(BLOCK // 8, dtype=np.uint64) + np.uint64(block))
    return space


def block_numbers(blocks: int = 2) -> list[int]:
    return [(FIRST >> HUGE_SHIFT) + i for i in range(blocks)]


def collected(machine: Machine, space: Space, blocks: int = 2) -> Migration:
    """`blocks` behind migration entries, with targets on the device. The mmap lock is held."""
    takeable = space.takeable(FIRST, FIRST + blocks * HUGE_PAGES, WHOLE, ZONE)
    assert takeable.tolist() == block_numbers(blocks)
    migration, left = space.collect_large(takeable, WHOLE, ZONE)
    assert len(left) == 0
    aim(machine, migration)
    return migration


def aim(machine: Machine, migration: Migration) -> None:
    """A huge page of the device for each row, granted as a driver's are."""
    device = machine.devices[ZONE]
    heads = []
    for _ in migration.pages:
        run = device.allocator.allocate_aligned_run(HUGE_PAGES)
        assert run is not None
        heads.append(run[0])
    device.zone.set_folded(blocks_in(device.zone, words(*heads)))
    set_targets(migration, words(*heads))


def give_back(machine: Machine, migration: Migration) -> None:
    """Frames of the device that nothing moved into are free again, as at the end of a grant."""
    device = machine.devices[ZONE]
    for one in (migration, *migration.torn):
        stayed = one.target[(one.source & np.uint64(MIGRATE_PFN_MIGRATE) == 0) & (one.target != 0)] >> np.uint64(MIGRATE_PFN_SHIFT)
        for frame in stayed.tolist():
            at = frame - device.zone.base
            if device.zone.folded[at >> HUGE_SHIFT]:
                device.zone.set_unused(np.array([at >> HUGE_SHIFT]))
            device.allocator.free_run(frame, frame + (HUGE_PAGES if one.large else 1))


def kinds(space: Space, blocks: int = 2) -> list[int]:
    """Of each block: the kind of the one entry that maps it, 0 where there is none."""
    return [space.mm.table.pmd(FIRST + i * HUGE_PAGES) & pte.KIND for i in range(blocks)]


def page_kind(space: Space, page: int) -> int:
    """The kind of one page's entry."""
    return space.mm.table.get(FIRST + page) & pte.KIND


async def contents(space: Space, block: int) -> list[int]:
    found: list[int] = np.unique(
        np.frombuffer(await space.load(BASE + block * BLOCK, BLOCK), np.uint64) - np.arange(BLOCK // 8, dtype=np.uint64)
    ).tolist()
    return found


async def test_a_block_with_a_page_table_of_its_own_is_filled_page_by_page() -> None:
    """Never touched as one, but split and emptied before: no huge page comes there (the PMD is not none); its neighbour gets one."""
    machine = machine_of()
    space = await huge_space(machine, written=False)
    await space.store(BASE, b"x")
    await space.split_blocks([FIRST])
    await space.madvise(BASE, BLOCK, "DONTNEED")
    async with space.mmap_lock.read():
        assert space.takeable(FIRST, FIRST + 2 * HUGE_PAGES, WHOLE, ZONE).tolist() == block_numbers()[1:]
    moved = await machine.to_device(space, ZONE, np.arange(FIRST, FIRST + 2 * HUGE_PAGES, dtype=np.uint64), compound=True)
    assert (moved & np.uint64(MIGRATE_PFN_MIGRATE) != 0).all()
    assert kinds(space) == [0, pte.DEVICE]
    assert space.mm.table.get(FIRST) & (pte.KIND | pte.HUGE) == pte.DEVICE
    machine.check()


async def test_what_is_pinned_after_it_was_takeable_is_left_to_go_page_by_page() -> None:
    """A pin while mirrors are told: the block comes back as not collected, untouched; the other moves."""
    machine = machine_of()
    space = await huge_space(machine)
    takeable = space.takeable(FIRST, FIRST + 2 * HUGE_PAGES, WHOLE, ZONE)
    held = await space.get_pages(FIRST + 3, 1, pin=True)
    async with space.mmap_lock.read():
        migration, left = space.collect_large(takeable, WHOLE, ZONE)
        assert left.tolist() == block_numbers()[:1]
        assert migration.cpages == HUGE_PAGES
        assert page_kind(space, 0) == pte.PRESENT
        aim(machine, migration)
        machine.copy(migration)
        space.migrate_pages(migration)
        space.migrate_finalize(migration)
    space.put_pages(held, pin=True)
    assert kinds(space)[1] == pte.DEVICE
    assert [await contents(space, 0), await contents(space, 1)] == [[0], [1]]
    machine.check()


async def test_a_reference_that_appears_between_copy_and_pages_keeps_the_block() -> None:
    """migrate_vma_pages counts once more: the block with the reference is back where it was, the other has moved."""
    machine = machine_of()
    space = await huge_space(machine)
    async with space.mmap_lock.read():
        migration = collected(machine, space)
        machine.copy(migration)
        head = int(migration.source[0]) >> MIGRATE_PFN_SHIFT
        machine.memory.zones[0].refcount[head] += 1
        space.migrate_pages(migration)
        assert migration.cpages == HUGE_PAGES
        machine.memory.zones[0].refcount[head] -= 1
        give_back(machine, migration)
        space.migrate_finalize(migration)
    assert kinds(space) == [pte.PRESENT, pte.DEVICE]
    assert [await contents(space, 0), await contents(space, 1)] == [[0], [1]]
    machine.check()


@pytest.mark.parametrize("step", ["collect", "pages"])
async def test_a_block_that_is_dropped_on_its_way_is_free_at_both_ends(step: str) -> None:
    """MADV_DONTNEED of the whole block, which only wants the mmap lock for reading: in the end nobody has its frames."""
    machine = machine_of()
    space = await huge_space(machine)
    async with space.mmap_lock.read():
        migration = collected(machine, space)
        machine.copy(migration)
        if step == "pages":
            space.migrate_pages(migration)
        await space.madvise(BASE, BLOCK, "DONTNEED")
        if step == "collect":
            space.migrate_pages(migration)
        space.migrate_finalize(migration)
    assert kinds(space) == [0, pte.DEVICE]
    assert used(machine) == 0
    assert machine.devices[ZONE].allocator.used_count == HUGE_PAGES
    assert await space.load(BASE, 16) == bytes(16)
    assert await contents(space, 1) == [1]
    machine.check()


@pytest.mark.parametrize("zero_page", [False, True], ids=["never touched", "huge zero page"])
async def test_a_filled_block_of_which_a_part_is_dropped_arrives_page_by_page(*, zero_page: bool) -> None:
    """After migrate_vma_pages has put it there: four pages are unmapped, their frames go back to the driver, the rest is on the device."""
    machine = machine_of()
    space = await huge_space(machine, written=False)
    if zero_page:
        await space.load(BASE, 1)
    async with space.mmap_lock.read():
        migration = collected(machine, space)
        machine.copy(migration)
        space.migrate_pages(migration)
        await space.madvise(BASE + 4 * PAGE, 4 * PAGE, "DONTNEED")
        space.migrate_finalize(migration)
    assert kinds(space) == [0, pte.DEVICE]
    assert [page_kind(space, i) for i in (3, 4, 7, 8)] == [pte.DEVICE, pte.NONE, pte.NONE, pte.DEVICE]
    assert machine.devices[ZONE].allocator.used_count == 2 * HUGE_PAGES - 4
    assert space.mm.rss == 2 * HUGE_PAGES - 4
    assert await space.load(BASE, BLOCK) == bytes(BLOCK)
    machine.check()


@pytest.mark.parametrize("zero_page", [False, True], ids=["never touched", "huge zero page"])
async def test_a_filled_block_is_what_it_was_when_its_device_dies(*, zero_page: bool) -> None:
    """Given up after migrate_vma_pages: empty again, or the huge zero page again; rss and the device's frames as before."""
    machine = machine_of()
    space = await huge_space(machine, written=False)
    if zero_page:
        await space.load(BASE, 1)
    before = space.mm.table.pmd(FIRST)
    async with space.mmap_lock.read():
        migration = collected(machine, space)
        space.migrate_pages(migration)
        assert space.mm.rss == 2 * HUGE_PAGES
        space.migrate_restore(migration)
        give_back(machine, migration)
        migration.target[:] = 0
        space.migrate_finalize(migration)
    assert space.mm.table.pmd(FIRST) == before
    assert bool(before) is zero_page
    assert space.mm.rss == 0
    assert machine.devices[ZONE].allocator.used_count == 0
    await space.store(BASE, b"again")
    machine.check()


async def test_a_block_that_is_torn_and_then_given_up_is_back_page_by_page() -> None:
    """A part is dropped after the collect, the rest changes over, the device dies: every byte is at the host, as small pages."""
    machine = machine_of()
    space = await huge_space(machine)
    async with space.mmap_lock.read():
        migration = collected(machine, space)
        machine.copy(migration)
        await space.madvise(BASE + 4 * PAGE, 4 * PAGE, "DONTNEED")
        space.migrate_pages(migration)
        assert len(migration.torn) == 1
        space.migrate_restore(migration)
        give_back(machine, migration)
        for one in (migration, *migration.torn):
            one.target[:] = 0
        space.migrate_finalize(migration)
    assert kinds(space) == [0, pte.PRESENT]
    assert [page_kind(space, i) for i in (3, 4, 7, 8)] == [pte.PRESENT, pte.NONE, pte.NONE, pte.PRESENT]
    whole = np.frombuffer(await space.load(BASE, BLOCK), np.uint64).copy()
    assert not whole[4 * PAGE // 8 : 8 * PAGE // 8].any()
    whole[4 * PAGE // 8 : 8 * PAGE // 8] = np.arange(4 * PAGE // 8, 8 * PAGE // 8)
    assert (whole == np.arange(BLOCK // 8)).all()
    assert await contents(space, 1) == [1]
    assert machine.devices[ZONE].allocator.used_count == 0
    machine.check()


async def test_a_charge_that_is_refused_leaves_all_blocks_empty() -> None:
    """A group without room: no huge page is made out of nothing, none of the frames is used, and the group says so."""
    machine = machine_of()
    space = await huge_space(machine, written=False)
    space.mm.cgroup = machine.memory.cgroups.create("job", 10 * PAGE)
    async with space.mmap_lock.read():
        migration = collected(machine, space)
        space.migrate_pages(migration)
        assert migration.cpages == 0
        give_back(machine, migration)
        space.migrate_finalize(migration)
    assert kinds(space) == [0, 0]
    assert (space.mm.rss, space.mm.cgroup.usage_pages, space.mm.cgroup.refused) == (0, 0, 2)
    assert machine.devices[ZONE].allocator.used_count == 0
    machine.check()


async def test_an_empty_block_without_a_huge_page_at_its_target_goes_on_page_by_page() -> None:
    """Torn before it was filled: its 512 pages get 512 small ones, and are zero."""
    machine = machine_of()
    space = await huge_space(machine, written=False)
    async with space.mmap_lock.read():
        takeable = space.takeable(FIRST, FIRST + HUGE_PAGES, WHOLE, ZONE)
        migration, _ = space.collect_large(takeable, WHOLE, ZONE)
        part = space.tear(migration, np.array([True]))
        assert (part.source == np.uint64(MIGRATE_PFN_MIGRATE)).all()
        got = machine.devices[ZONE].allocator.allocate(HUGE_PAGES)
        assert got is not None
        part.target[:] = got.frames[::-1] << np.uint64(MIGRATE_PFN_SHIFT) | np.uint64(MIGRATE_PFN_VALID)
        machine.copy(part)
        space.migrate_pages(migration)
        space.migrate_finalize(migration)
    assert page_kind(space, 9) == pte.DEVICE
    assert space.mm.rss == HUGE_PAGES
    assert await space.load(BASE, BLOCK) == bytes(BLOCK)
    machine.check()
