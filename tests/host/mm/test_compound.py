"""Huge pages that migrate whole: one aligned run to another stays a huge page, everything else arrives small.

Oracle: mm/migrate_device.c with MIGRATE_VMA_SELECT_COMPOUND, and the kernel's self-tests migrate_anon_huge_*.
"""

from __future__ import annotations

import numpy as np
import pytest

from hmmnet.host.interfaces import Migration, Select
from hmmnet.host.mm import pte
from hmmnet.host.mm.space import Space
from hmmnet.host.mm.zones import COMPOUND
from hmmnet.pages import HUGE_PAGES, MIGRATE_PFN_MIGRATE, MIGRATE_PFN_SHIFT, MIGRATE_PFN_VALID, Words

from .files import BASE, PAGE, used
from .machine import Machine, page_bytes, span

FIRST = BASE // PAGE
BLOCK = HUGE_PAGES * PAGE
ZONE = 64
WHOLE = Select.SYSTEM | Select.COMPOUND


def machine_of(kind: str = "private") -> Machine:
    return Machine(device_pages=4 * HUGE_PAGES, kind=kind)


async def huge_space(machine: Machine, blocks: int = 1, *, written: bool = True) -> Space:
    space = machine.process()
    await space.mmap(blocks * BLOCK, "rw", BASE)
    await space.madvise(BASE, blocks * BLOCK, "HUGEPAGE")
    for block in range(blocks if written else 0):
        for page in (0, 1, HUGE_PAGES - 1):
            await space.store(BASE + block * BLOCK + page * PAGE, page_bytes(block + page + 1 & 0xFF))
    return space


async def migrate(machine: Machine, space: Space, pages: Words, frames: Words, select: Select = WHOLE, owner: int = ZONE) -> Migration:
    """migrate_vma of `pages` to `frames` (0: none), with the bytes."""
    async with space.mmap_lock.read():
        for found in space.large(pages, compound=bool(select & Select.COMPOUND)) if select & Select.SYSTEM else []:
            found.split()
        migration = space.collect(pages, select, owner)
        migration.target[:] = np.where(frames != 0, frames << np.uint64(MIGRATE_PFN_SHIFT) | np.uint64(MIGRATE_PFN_VALID), np.uint64(0))
        machine.copy(migration)
        space.migrate_pages(migration)
        space.migrate_finalize(migration)
    if owner == ZONE and select & Select.SYSTEM:
        give_back(machine, migration)
    return migration


def give_back(machine: Machine, migration: Migration) -> None:
    """Frames of the device that no page moved into are free again."""
    stayed = migration.target[(migration.source & np.uint64(MIGRATE_PFN_MIGRATE) == 0) & (migration.target != 0)]
    machine.devices[ZONE].allocator.free(stayed >> np.uint64(MIGRATE_PFN_SHIFT))


def marks(space: Space, first: int = FIRST, count: int = HUGE_PAGES) -> set[tuple[int, bool]]:
    """Kinds of entries, and whether they are of a huge page."""
    return {(int(entry) & pte.KIND, bool(int(entry) & pte.HUGE)) for entry in space.mm.table.read(first, first + count)}


def device_run(machine: Machine, count: int = HUGE_PAGES) -> Words:
    """An aligned run of the device's frames."""
    got = machine.devices[ZONE].allocator.allocate_aligned(count)
    assert got is not None
    return got.frames


@pytest.mark.parametrize("kind", ["private", "coherent"])
async def test_a_huge_page_goes_and_comes_home_as_one(kind: str) -> None:
    """Its entries stay one block, in both places; the bytes are right."""
    machine = machine_of(kind)
    space = await huge_space(machine)
    before = await space.load(BASE, BLOCK)
    moved = await migrate(machine, space, span(FIRST, HUGE_PAGES), device_run(machine))
    assert moved.cpages == HUGE_PAGES
    there = pte.DEVICE if kind == "private" else pte.PRESENT
    assert marks(space) == {(there, True)}
    assert used(machine) == 0
    machine.check()
    home = machine.memory.allocate_huge()
    assert home is not None
    select = Select.DEVICE_PRIVATE if kind == "private" else Select.DEVICE_COHERENT
    await migrate(machine, space, span(FIRST, HUGE_PAGES), home, select)
    assert marks(space) == {(pte.PRESENT, True)}
    assert await space.load(BASE, BLOCK) == before
    assert machine.devices[ZONE].allocator.used_count == 0
    machine.check()


async def test_targets_that_are_no_huge_page_split_it() -> None:
    """Not aligned, not in order, or not for all: what moves is small, what stays is too."""
    for change in ("unaligned", "reversed", "one missing"):
        machine = machine_of()
        space = await huge_space(machine)
        before = await space.load(BASE, BLOCK)
        frames = device_run(machine)
        if change == "unaligned":
            frames = np.roll(frames, 1)
        elif change == "reversed":
            frames = frames[::-1].copy()
        else:
            machine.devices[ZONE].allocator.free(frames[7:8])
            frames[7] = 0
        moved = await migrate(machine, space, span(FIRST, HUGE_PAGES), frames)
        assert moved.cpages == HUGE_PAGES - (change == "one missing"), change
        assert {huge for _, huge in marks(space)} == {False}, change
        zone = machine.memory.zones[ZONE]
        assert not (zone.flags & COMPOUND).any(), change
        assert await space.load(BASE, BLOCK) == before, change
        machine.check()


async def test_a_part_is_not_taken_whole() -> None:
    """Two pages of a block: it is split before; a held page keeps the whole block where it is."""
    machine = machine_of()
    space = await huge_space(machine, 2)
    moved = await migrate(machine, space, span(FIRST + 1, 2), device_run(machine, 2))
    assert moved.cpages == 2
    assert marks(space, FIRST + 1, 2) == {(pte.DEVICE, False)}
    held = await space.get_pages(FIRST + HUGE_PAGES + 5, 1)
    moved = await migrate(machine, space, span(FIRST + HUGE_PAGES, HUGE_PAGES), device_run(machine))
    assert moved.cpages == 0
    assert marks(space, FIRST + HUGE_PAGES) == {(pte.PRESENT, True)}
    space.put_pages(held)
    machine.check()


@pytest.mark.parametrize("read", [False, True], ids=["never touched", "huge zero page"])
async def test_an_empty_block_becomes_a_huge_page_of_the_device(*, read: bool) -> None:
    """migrate_vma_insert_huge_pmd_page; with small targets it becomes 512 small ones."""
    for whole in (True, False):
        machine = machine_of()
        space = await huge_space(machine, written=False)
        if read:
            await space.load(BASE, 1)
        frames = device_run(machine)
        moved = await migrate(machine, space, span(FIRST, HUGE_PAGES), frames if whole else frames[::-1].copy())
        assert moved.cpages == HUGE_PAGES
        assert marks(space) == {(pte.DEVICE, whole)}
        assert await space.load(BASE, BLOCK) == bytes(BLOCK)
        machine.check()


async def test_the_cpu_takes_a_huge_page_home_whole() -> None:
    """One touch of one page; after a part was unmapped, one page."""
    machine = machine_of()
    space = await huge_space(machine, 2)
    for block in (0, 1):
        await migrate(machine, space, span(FIRST + block * HUGE_PAGES, HUGE_PAGES), device_run(machine))
    assert await space.load(BASE + PAGE, PAGE) == page_bytes(2)
    assert {kind for kind, _ in marks(space)} == {pte.PRESENT}
    await space.munmap(BASE + BLOCK + 4 * PAGE, PAGE)
    assert marks(space, FIRST + HUGE_PAGES, 4) == {(pte.DEVICE, False)}
    assert await space.load(BASE + BLOCK, PAGE) == page_bytes(2)
    assert marks(space, FIRST + HUGE_PAGES, 1) == {(pte.PRESENT, False)}
    assert marks(space, FIRST + HUGE_PAGES + 1, 3) == {(pte.DEVICE, False)}
    machine.check()


async def test_a_shared_huge_page_moves_for_both() -> None:
    """After fork, mapped as one here and page by page there: the frames are one run in the end, each keeps its way of mapping it."""
    machine = machine_of()
    parent = await huge_space(machine)
    child = await machine.fork(parent)
    await child.split_blocks([FIRST])
    async with parent.mmap_lock.read():
        migration = parent.collect(span(FIRST, HUGE_PAGES), WHOLE, ZONE, told={child.number: [span(FIRST, HUGE_PAGES)]})
        migration.target[:] = device_run(machine) << np.uint64(MIGRATE_PFN_SHIFT) | np.uint64(MIGRATE_PFN_VALID)
        machine.copy(migration)
        parent.migrate_pages(migration)
        parent.migrate_finalize(migration)
    assert marks(parent) == {(pte.DEVICE, True)}
    assert marks(child) == {(pte.DEVICE, False)}
    machine.check()


async def test_what_is_given_up_is_a_huge_page_as_before() -> None:
    """The device dies on the way: the block is where it was, as one."""
    for moved in (False, True):
        machine = machine_of()
        space = await huge_space(machine)
        before = await space.load(BASE, BLOCK)
        async with space.mmap_lock.read():
            migration = space.collect(span(FIRST, HUGE_PAGES), WHOLE, ZONE)
            migration.target[:] = device_run(machine) << np.uint64(MIGRATE_PFN_SHIFT) | np.uint64(MIGRATE_PFN_VALID)
            if moved:
                space.migrate_pages(migration)
            space.migrate_restore(migration)
            give_back(machine, migration)
            migration.target[:] = 0
            space.migrate_finalize(migration)
        assert marks(space) == {(pte.PRESENT, True)}
        assert await space.load(BASE, BLOCK) == before
        machine.check()


async def test_a_folio_mapped_page_by_page_stays_whole() -> None:
    """Its huge entry was split, but not the folio, for a page of it is held: a migration of huge pages takes none of its pages."""
    machine = machine_of()
    space = await huge_space(machine)
    await space.split_blocks([FIRST])
    held = await space.get_pages(FIRST + 5, 1)
    for pages in (span(FIRST, HUGE_PAGES), span(FIRST + 100, 4)):
        moved = await migrate(machine, space, pages, device_run(machine, len(pages)))
        assert moved.cpages == 0
    assert marks(space) == {(pte.PRESENT, False)}
    space.put_pages(held)
    machine.check()


async def test_a_further_mapping_is_torn_where_a_part_moves() -> None:
    """Parent and child share a huge page of the device: four pages of it come home for both, and both map the block page by page."""
    machine = machine_of()
    parent = await huge_space(machine)
    await migrate(machine, parent, span(FIRST, HUGE_PAGES), device_run(machine))
    child = await machine.fork(parent)
    assert marks(child) == {(pte.DEVICE, True)}
    pages = span(FIRST + 8, 4)
    home = machine.memory.allocate(4)
    assert home is not None
    async with parent.mmap_lock.read():
        migration = parent.collect(pages, Select.DEVICE_PRIVATE, ZONE, told={child.number: [pages]})
        assert marks(child) == {(pte.DEVICE, False), (pte.MIGRATION, False)}
        migration.target[:] = home << np.uint64(MIGRATE_PFN_SHIFT) | np.uint64(MIGRATE_PFN_VALID)
        machine.copy(migration)
        parent.migrate_pages(migration)
        parent.migrate_finalize(migration)
    assert marks(parent, FIRST + 8, 4) == marks(child, FIRST + 8, 4) == {(pte.PRESENT, False)}
    machine.check()


async def test_a_huge_page_that_somebody_else_maps_unseen_stays_whole() -> None:
    """A child that was not told maps one page of it alone: none of the 512 moves, and no entry is half a huge page."""
    machine = machine_of()
    parent = await huge_space(machine)
    child = await machine.fork(parent)
    await child.munmap(BASE + PAGE, BLOCK - PAGE)
    async with parent.mmap_lock.read():
        migration = parent.collect(span(FIRST, HUGE_PAGES), WHOLE, ZONE)
        assert not (migration.source & np.uint64(MIGRATE_PFN_MIGRATE)).any()
        parent.migrate_pages(migration)
        parent.migrate_finalize(migration)
    assert marks(parent) == {(pte.PRESENT, True)}
    machine.check()


async def test_a_load_maps_the_huge_zero_page_over_pages_that_are_about_to_move() -> None:
    """Between collect and move, without COMPOUND: migrate_vma_insert_page splits it, and no store takes the block for a zero page after."""
    machine = machine_of()
    space = await huge_space(machine, written=False)
    async with space.mmap_lock.read():
        migration = space.collect(span(FIRST + 8, 16), Select.SYSTEM, ZONE)
        await space.load(BASE, 1)
        assert marks(space) == {(pte.PRESENT, True)}
        migration.target[:] = device_run(machine, 16) << np.uint64(MIGRATE_PFN_SHIFT) | np.uint64(MIGRATE_PFN_VALID)
        machine.copy(migration)
        space.migrate_pages(migration)
        space.migrate_finalize(migration)
    machine.check()
    assert marks(space, FIRST + 8, 16) == {(pte.DEVICE, False)}
    assert marks(space, FIRST, 8) == {(pte.PRESENT, False)}
    await space.store(BASE, b"\1")
    machine.check()
    assert await space.load(BASE + 8 * PAGE, 16 * PAGE) == bytes(16 * PAGE)
