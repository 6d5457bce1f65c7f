"""migrate_vma on page tables: every row of table A4, and giving up at every step; of few pages without arrays see `test_few`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hmmnet.host.interfaces import Select
from hmmnet.host.mm import collect as steps
from hmmnet.host.mm import pte
from hmmnet.host.mm.collect import collect, inserts, move, restore
from hmmnet.host.mm.fault import make, protect, zap
from hmmnet.host.mm.finalize import finalize
from hmmnet.host.mm.invariants import check
from hmmnet.host.mm.vma import VM_READ, VM_UFFD_MISSING, Vma
from hmmnet.host.mm.zones import COMPOUND, LOCKED
from hmmnet.pages import (
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_SHIFT,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    ZONE_SHIFT,
    Words,
)

from .machine import span, words
from .moving import FRAMES, GPU, MOVES, OTHER, RW, World, always_with_arrays


def test_written_pages_go_and_come_back() -> None:
    """Entries, counts and free lists at every step."""
    world = World()
    world.touch(100, 101, 102, 103)
    migration = world.collect()
    assert (migration.source & np.uint64(15)).tolist() == [MOVES | MIGRATE_PFN_WRITE] * 4
    assert world.kinds()[:4] == [pte.MIGRATION] * 4
    check(world.memory, [world.mm], quiet=False)
    world.finish(migration)
    assert world.kinds()[:4] == [pte.DEVICE] * 4
    assert world.memory.nodes[0].allocator.used_count == 0
    assert world.mm.rss == 4
    back = world.collect(select=Select.DEVICE_PRIVATE)
    frames = world.memory.allocate(4)
    assert frames is not None
    world.finish(back, int(frames[0]))
    assert world.kinds()[:4] == [pte.PRESENT] * 4
    assert world.freed == [FRAMES, FRAMES + 1, FRAMES + 2, FRAMES + 3]
    assert (world.mm.table.read(100, 104) & np.uint64(pte.WRITE)).all()


def test_bits_travel_with_the_page() -> None:
    """young, dirty, soft-dirty, write and anon-exclusive are carried through the migration entry."""
    world = World()
    world.touch(100)
    before = world.mm.table.get(100) & pte.CARRIED
    world.finish(world.collect(count=1))
    assert world.mm.table.get(100) & pte.CARRIED == before == pte.CARRIED & ~(pte.UFFD_WP | pte.HUGE)


def test_empty_and_zero_pages() -> None:
    """MIGRATE without VALID; the target is inserted by `move`, writable as the VMA is (h09)."""
    world = World()
    world.touch(101, write=False)
    world.touch(102)
    migration = world.collect()
    assert (migration.source & np.uint64(3)).tolist() == [MIGRATE_PFN_MIGRATE, MIGRATE_PFN_MIGRATE, MOVES, MIGRATE_PFN_MIGRATE]
    assert world.kinds()[:4] == [pte.NONE, pte.PRESENT, pte.MIGRATION, pte.NONE]
    assert inserts(migration)
    world.finish(migration)
    assert world.kinds()[:4] == [pte.DEVICE] * 4
    assert (world.mm.table.read(100, 104) & np.uint64(pte.WRITE)).all()
    assert (migration.source & np.uint64(MIGRATE_PFN_WRITE)).all()
    assert world.mm.rss == 4


def test_empty_pages_of_a_read_only_vma_arrive_read_only() -> None:
    """h10: a read-only VMA migrates, LR."""
    world = World(VM_READ)
    world.finish(world.collect())
    assert world.kinds()[:4] == [pte.DEVICE] * 4
    assert not (world.mm.table.read(100, 104) & np.uint64(pte.WRITE)).any()


def test_zero_page_wants_select_system_but_empty_does_not() -> None:
    """A4: an empty entry is a hole to fill whatever is selected."""
    world = World()
    world.touch(101, write=False)
    migration = world.collect(select=Select.DEVICE_PRIVATE)
    assert migration.source.tolist() == [MIGRATE_PFN_MIGRATE, 0, MIGRATE_PFN_MIGRATE, MIGRATE_PFN_MIGRATE]


def test_selection_by_kind_and_owner() -> None:
    """System pages only with SYSTEM, device pages only with their flag and owner; the rest is skipped."""
    world = World()
    world.touch(100, 101, 102)
    world.finish(world.collect(count=1))
    world.finish(world.collect(101, 1, owner=OTHER), OTHER << ZONE_SHIFT)
    found = world.collect(count=3, select=Select.DEVICE_PRIVATE, owner=OTHER).source
    assert found.astype(bool).tolist() == [False, True, False]


def test_coherent_pages_are_present_and_have_their_own_flag() -> None:
    """A page on a coherent device is an ordinary entry; SYSTEM does not take it, COHERENT with its owner does."""
    world = World(kind="coherent")
    world.touch(100)
    world.finish(world.collect(count=1))
    assert world.kinds()[0] == pte.PRESENT
    assert not world.collect(count=1).source.any()
    assert not world.collect(count=1, select=Select.DEVICE_COHERENT, owner=OTHER).source.any()
    migration = world.collect(count=1, select=Select.DEVICE_COHERENT)
    assert migration.cpages == 1


@pytest.mark.parametrize("held", ["reference", "pin", "lock"])
@pytest.mark.parametrize("count", [1, 3])
def test_pages_that_somebody_holds_stay(held: str, count: int) -> None:
    """An extra reference (h34), a pin (h31), another migration's lock: source 0, entry untouched."""
    world = World()
    world.touch(100, 101, 102)
    zone = world.memory.nodes[0]
    frame = pte.frames_of(world.mm.table.read(100, 101))[0]
    if held == "reference":
        zone.refcount[frame] += 1
    elif held == "pin":
        zone.pincount[frame] += 1
    else:
        zone.flags[frame] |= LOCKED
    before = world.mm.table.get(100)
    migration = world.collect(count=count)
    assert int(migration.source[0]) == 0
    assert world.mm.table.get(100) == before
    assert migration.cpages == count - 1


@pytest.mark.parametrize("count", [1, 2])
def test_the_fault_page_may_be_locked(count: int) -> None:
    """A CPU fault has locked its page before it migrates it."""
    world = World()
    world.touch(100, 101)
    frame = world.mm.table.get(100) >> pte.FRAME_SHIFT
    world.memory.nodes[0].flags[frame] |= LOCKED
    world.memory.nodes[0].refcount[frame] += 1  # the fault's own, as in do_swap_page
    assert collect(world.mm, span(100, count), Select.SYSTEM, GPU, frame).cpages == count


@pytest.mark.parametrize("count", [1, 2])
def test_the_fault_page_may_be_held_by_nobody_else(count: int) -> None:
    """migrate_vma_check_page allows one reference more for it, and not two."""
    world = World()
    world.touch(100, 101)
    frame = world.mm.table.get(100) >> pte.FRAME_SHIFT
    world.memory.nodes[0].refcount[frame] += 2
    assert collect(world.mm, span(100, count), Select.SYSTEM, GPU, frame).cpages == count - 1


@pytest.mark.parametrize("count", [1, 2])
def test_a_device_page_may_have_one_more_reference_and_stays(count: int) -> None:
    """migrate_vma_check_page allows it, migrate_vma_pages does not (c04); two are too many for the first, too."""
    world = World()
    world.touch(100, 101)
    world.finish(world.collect(count=2))
    world.memory.zones[GPU].refcount[0] += 1
    migration = world.collect(count=count, select=Select.DEVICE_PRIVATE)
    assert migration.cpages == count
    frames = world.memory.allocate(count)
    assert frames is not None
    migration.target[:] = frames << np.uint64(MIGRATE_PFN_SHIFT) | np.uint64(MIGRATE_PFN_VALID)
    move(world.memory, world.mm, migration)
    finalize(world.memory, world.mm, migration)
    assert migration.cpages == count - 1
    assert FRAMES not in world.freed
    world.memory.zones[GPU].refcount[1] += 2
    assert world.collect(101, 1, Select.DEVICE_PRIVATE).cpages == 0


@pytest.mark.parametrize("count", [1, 3])
def test_a_page_without_a_target_stays(count: int) -> None:
    """dst 0: MIGRATE is cleared, the source is back as it was."""
    world = World()
    world.touch(100, 101, 102)
    before = world.state()
    migration = world.collect(count=count)
    move(world.memory, world.mm, migration)
    assert not (migration.source & np.uint64(MIGRATE_PFN_MIGRATE)).any()
    finalize(world.memory, world.mm, migration)
    assert world.state() == before


@pytest.mark.parametrize("count", [1, 3])
def test_a_reference_that_appears_in_between_stops_the_page(count: int) -> None:
    """folio_migrate_mapping finds an unexpected reference: MIGRATE cleared, an unused host target is freed."""
    world = World()
    world.touch(100, 101, 102)
    world.finish(world.collect(count=count))
    migration = world.collect(count=count, select=Select.DEVICE_PRIVATE)
    world.memory.zones[GPU].refcount[0] += 2
    frames = world.memory.allocate(count)
    assert frames is not None
    migration.target[:] = frames << np.uint64(MIGRATE_PFN_SHIFT) | np.uint64(MIGRATE_PFN_VALID)
    move(world.memory, world.mm, migration)
    finalize(world.memory, world.mm, migration)
    assert migration.cpages == count - 1
    assert world.kinds()[0] == pte.DEVICE
    assert world.memory.nodes[0].allocator.used_count == 2
    world.memory.zones[GPU].refcount[0] -= 2
    check(world.memory, [world.mm])


def test_the_cpu_wins_the_race_for_an_empty_page() -> None:
    """Insert re-checks: a page that was touched meanwhile keeps its contents, its target is not used."""
    world = World()
    migration = world.collect(count=2)
    world.touch(100)
    world.touch(101, write=False)
    before = world.mm.table.get(100)
    world.finish(migration)
    assert migration.cpages == 1
    assert world.mm.table.get(100) == before
    assert world.kinds()[1] == pte.DEVICE
    assert int(world.memory.zones[GPU].refcount[0]) == 0


def test_userfaultfd_missing_backs_off() -> None:
    """h56: populated pages of a uffd range go, empty ones do not."""
    world = World(RW)
    world.touch(101)
    world.mm.vmas.update(100, 108, lambda vma: replace(vma, flags=vma.flags | VM_UFFD_MISSING))
    migration = world.collect(count=2)
    world.finish(migration)
    assert world.kinds()[:2] == [pte.NONE, pte.DEVICE]


@pytest.mark.parametrize("moved", [False, True], ids=["before move", "after move"])
@pytest.mark.parametrize("pages", [1, 4])
def test_giving_up_leaves_everything_untouched(moved: bool, pages: int) -> None:
    """The device dies: entries, counts, flags and free lists are what they were, at whatever step."""
    world = World()
    world.touch(100, 102)
    world.touch(101, write=False)
    before = world.state()
    migration = world.collect(count=pages)
    migration.target[:] = span(FRAMES, pages) << np.uint64(MIGRATE_PFN_SHIFT) | np.uint64(MIGRATE_PFN_VALID)
    if moved:
        move(world.memory, world.mm, migration)
    restore(world.memory, world.mm, migration)
    finalize(world.memory, world.mm, migration)
    assert world.state() == before
    assert world.freed == []
    check(world.memory, [world.mm])


def test_unmapped_while_it_migrates() -> None:
    """MADV_DONTNEED does not wait: finalize finds the entry gone, and neither old nor new frame stays in use."""
    world = World()
    world.touch(100, 101)
    migration = world.collect(count=3)
    migration.target[:] = span(FRAMES, 3) << np.uint64(MIGRATE_PFN_SHIFT) | np.uint64(MIGRATE_PFN_VALID)
    zap(world.mm, span(100, 1))
    move(world.memory, world.mm, migration)
    zap(world.mm, span(102, 1))
    finalize(world.memory, world.mm, migration)
    check(world.memory, [world.mm])
    assert sorted(world.freed) == [FRAMES, FRAMES + 2]
    assert world.kinds()[:3] == [pte.NONE, pte.DEVICE, pte.NONE]


def test_one_unmapped_page_alone() -> None:
    """The same for a migration of one page, which takes the short way otherwise."""
    world = World()
    world.touch(100)
    migration = world.collect(count=1)
    zap(world.mm, span(100, 1))
    world.finish(migration)
    assert world.freed == [FRAMES]
    assert world.mm.rss == 0


def test_rights_lost_on_the_way_stay_lost() -> None:
    """mprotect meets the migration entry: the page arrives read-only."""
    world = World()
    world.touch(100)
    migration = world.collect(count=1)
    world.vma.flags = VM_READ
    protect(world.mm, 100, 108, writable=False)
    world.finish(migration)
    assert not world.mm.table.get(100) & pte.WRITE


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long lists go through in blocks; the result is the same."""
    results = []
    always_with_arrays(monkeypatch)
    for block in (1 << 14, 3):
        monkeypatch.setattr(steps, "BLOCK_PAGES", block)
        world = World()
        world.touch(100, 103, 104, 107)
        world.touch(105, write=False)
        migration = world.collect(count=8)
        world.finish(migration)
        results.append((world.state(), migration.source.tolist(), migration.saved.tolist()))
    assert results[0] == results[1]


def test_fresh_pages_are_one_run() -> None:
    """What a range store makes is consecutive in physical memory, so that DMA sees one run."""
    world = World()
    frames: Words = make(world.mm, world.vma, span(100, 8), pte.FRESH_WRITE)
    assert np.diff(frames).tolist() == [1] * 7


def test_what_lies_behind_a_folio_that_cannot_be_split_stays() -> None:
    """migrate_vma_collect_skip: not even never-touched pages behind it go, up to the next 2 MiB; what lies before it does."""
    world = World()
    world.mm.vmas.add(Vma(508, 516, RW, 508))
    world.touch(508, 509, 511, 512)
    stuck = words(world.mm.table.get(509) >> pte.FRAME_SHIFT)
    for zone, _, at in world.memory.groups(stuck):
        zone.flags[at] |= np.uint32(COMPOUND)
        zone.refcount[at] += 1
    migration = world.collect(508, 6)
    assert (migration.source != 0).tolist() == [True, False, False, False, True, True]
    for zone, _, at in world.memory.groups(stuck):
        zone.flags[at] &= ~np.uint32(COMPOUND)
        zone.refcount[at] -= 1
    world.finish(migration)
    assert pte.kinds_of(world.mm.table.read(508, 514)).tolist() == [pte.DEVICE, pte.PRESENT, 0, pte.PRESENT, pte.DEVICE, pte.DEVICE]
