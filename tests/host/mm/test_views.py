"""pagemap, smaps and clear_refs: what a program sees of its memory, on a device and elsewhere.

Oracle: fs/proc/task_mmu.c; that Rss and Anonymous do not change and Swap stays 0 when pages migrate was measured on a real kernel.
"""

from __future__ import annotations

import numpy as np
import pytest

from hmmnet.host.hub import Hub
from hmmnet.host.interfaces import Event
from hmmnet.host.mm import pte
from hmmnet.host.mm.space import Space
from hmmnet.pages import HUGE_PAGES, Words
from hmmnet.program import (
    PM_FILE,
    PM_GUARD_REGION,
    PM_MMAP_EXCLUSIVE,
    PM_PFRAME_MASK,
    PM_PRESENT,
    PM_SOFT_DIRTY,
    PM_SWAP,
    PM_UFFD_WP,
    Mapping,
)
from tests.host.fakes import FakeLink

from .files import BASE, PAGE, filled, mapped
from .machine import Machine, page_bytes, span

FIRST = BASE // PAGE
BITS = ~np.uint64(PM_PFRAME_MASK)


async def written(space: Space, pages: int = 4) -> None:
    await space.mmap(pages * PAGE, "rw", BASE)
    await space.store(BASE, b"".join(page_bytes(i + 1) for i in range(pages)))


def bits(words: Words) -> list[int]:
    found: list[int] = (words & BITS).tolist()
    return found


def view(space: Space, pages: int) -> list[int]:
    return bits(space.pagemap_words(FIRST, FIRST + pages))


async def test_words_of_every_kind_of_entry() -> None:
    """Written, zero page, never touched; on a private device and on a coherent one; exclusive; swapped; a page of a file."""
    machine = Machine(kinds=("private", "coherent"))
    space = machine.process()
    await written(space, 5)
    await space.mmap(2 * PAGE, "rw", BASE + 5 * PAGE)
    await space.load(BASE + 5 * PAGE, 1)
    file = await filled(machine, 1)
    await mapped(space, file, 1, BASE + 7 * PAGE)
    await space.load(BASE + 7 * PAGE, 1)
    await space.clear_soft_dirty()
    await machine.to_device(space, 64, span(FIRST + 1, 1))
    await machine.to_device(space, 65, span(FIRST + 2, 1))
    await space.make_exclusive(FIRST + 3, FIRST + 4, 64)
    await space.madvise(BASE + 4 * PAGE, PAGE, "PAGEOUT")
    assert view(space, 8) == [
        PM_PRESENT | PM_MMAP_EXCLUSIVE,
        PM_SWAP,
        PM_PRESENT | PM_MMAP_EXCLUSIVE,
        PM_SWAP | PM_SOFT_DIRTY,
        PM_SWAP,
        PM_PRESENT,
        0,
        PM_PRESENT | PM_MMAP_EXCLUSIVE | PM_FILE,
    ]
    first = int(space.pagemap_words(FIRST, FIRST + 1)[0]) & PM_PFRAME_MASK
    assert machine.bytes_of(first) == page_bytes(1)


async def test_markers_and_uffd_wp() -> None:
    """A guard region, a poisoned page, a write-protect marker without and with a page."""
    space = Machine().process()
    await written(space)
    await space.clear_soft_dirty()
    markers = [pte.entry(pte.MARKER, kind) for kind in (pte.MARKER_GUARD, pte.MARKER_POISON, pte.MARKER_UFFD_WP)]
    last = int(space.mm.table.get(FIRST + 3)) | pte.UFFD_WP
    space.mm.table.write(FIRST, np.array([*markers, last], np.uint64))
    assert view(space, 4) == [PM_GUARD_REGION, PM_SWAP, PM_SWAP | PM_UFFD_WP, PM_PRESENT | PM_MMAP_EXCLUSIVE | PM_UFFD_WP]


async def test_migration_changes_neither_rss_nor_anonymous_nor_swap() -> None:
    """smaps looks through the entry at the page, wherever it lives; pagemap says swap."""
    machine = Machine()
    space = machine.process()
    await written(space)
    (before,) = space.smaps()
    assert before == Mapping(BASE, BASE + 4 * PAGE, "rw-p", 4 * PAGE, 4 * PAGE, 4 * PAGE, 0, 0, 0)
    await machine.to_device(space, 64, span(FIRST, 4))
    (there,) = space.smaps()
    assert (there.rss, there.anonymous, there.swap, there.referenced) == (4 * PAGE, 4 * PAGE, 0, 0)
    assert all(word & PM_SWAP and not word & PM_PRESENT for word in view(space, 4))


async def test_smaps_counts_what_is_where() -> None:
    """Swap apart from Rss; pages of files are not anonymous; a locked mapping says so; the zero page is nothing."""
    machine = Machine(host_pages=4 * HUGE_PAGES)
    space = machine.process()
    await written(space)
    await space.madvise(BASE, PAGE, "PAGEOUT")
    await space.mmap(2 * PAGE, "r", 2 * BASE)
    await space.load(2 * BASE, 2 * PAGE)
    await mapped(space, await filled(machine, 3), 3, 3 * BASE)
    await space.mlock(3 * BASE, 3 * PAGE)
    await space.mmap(HUGE_PAGES * PAGE, "rwx", 4 * BASE)
    await space.madvise(4 * BASE, HUGE_PAGES * PAGE, "HUGEPAGE")
    await space.store(4 * BASE, b"huge")
    anonymous, zero, file, huge = space.smaps()
    assert (anonymous.rss, anonymous.anonymous, anonymous.swap) == (3 * PAGE, 3 * PAGE, PAGE)
    assert (zero.rights, zero.rss) == ("r--p", 0)
    assert (file.rights, file.rss, file.anonymous, file.locked) == ("rw-s", 3 * PAGE, 0, 3 * PAGE)
    assert (huge.rights, huge.rss, huge.anon_huge_pages, huge.referenced) == ("rwxp", *[HUGE_PAGES * PAGE] * 3)
    assert sum(one.rss for one in space.smaps()) == space.mm.rss * PAGE


async def test_soft_dirty_tells_who_was_written_since() -> None:
    """Mirrors are told SOFT_DIRTY once, for everything; a load leaves a page clean, a store does not; what is mapped anew is dirty."""
    machine = Machine()
    space = machine.process()
    await written(space)
    assert all(word & PM_SOFT_DIRTY for word in view(space, 4))
    link = FakeLink("gpu0", 64)
    assert isinstance(space.hub, Hub)
    space.hub.insert(0, 1 << 30, link, 1)
    await space.clear_soft_dirty()
    assert [(start, event) for _, start, _, event, *_ in link.told] == [(0, Event.SOFT_DIRTY)]
    await space.load(BASE, 4 * PAGE)
    await space.store(BASE + PAGE, b"again")
    assert [word & PM_SOFT_DIRTY != 0 for word in view(space, 4)] == [False, True, False, False]
    machine.check()
    await space.mmap(PAGE, "rw", BASE + 4 * PAGE)
    assert len(space.mm.vmas) == 1, "the dirty bit keeps no mappings apart"
    assert all(word & PM_SOFT_DIRTY for word in view(space, 5)), "and the merged one is dirty"


@pytest.mark.parametrize("shared", [False, True])
async def test_pinned_pages_stay_soft_dirty_and_writable(*, shared: bool) -> None:
    """pte_is_pinned: who has pinned a private page may be writing to it; a shared one is cleared all the same."""
    machine = Machine()
    space = machine.process()
    await space.mmap(3 * PAGE, "rw", BASE, shared=shared)
    await space.store(BASE, b"x" * 3 * PAGE)
    held = await space.get_pages(FIRST + 1, 1, write=True, pin=True)
    await space.clear_soft_dirty()
    entries = space.mm.table.read(FIRST, FIRST + 3)
    assert (entries & pte.WRITE != 0).tolist() == [False, not shared, False]
    assert [word & PM_SOFT_DIRTY != 0 for word in view(space, 3)] == [False, not shared, False]
    space.put_pages(held, pin=True)
    await space.clear_soft_dirty()
    assert not any(word & PM_SOFT_DIRTY for word in view(space, 3))
    machine.check()


@pytest.mark.parametrize("unfolded", [False, True])
async def test_a_huge_page_is_cleared_whole_however_it_is_kept(unfolded: bool) -> None:
    """clear_soft_dirty_pmd asks for no pins: a pinned page of a huge page is cleared, whether or not its block has entries of its own."""
    machine = Machine(host_pages=4 * HUGE_PAGES)
    space = machine.process()
    await space.mmap(HUGE_PAGES * PAGE, "rw", BASE)
    await space.madvise(BASE, HUGE_PAGES * PAGE, "HUGEPAGE")
    await space.store(BASE, b"x")
    held = await space.get_pages(FIRST + 100, 1, write=True, pin=True)
    if unfolded:
        space.mm.table.unfold(FIRST)
    await space.clear_soft_dirty()
    entries = space.mm.table.read(FIRST, FIRST + HUGE_PAGES)
    assert (entries & pte.HUGE).all()
    assert not (entries & (pte.WRITE | pte.SOFT_DIRTY)).any()
    assert not any(word & PM_SOFT_DIRTY for word in view(space, HUGE_PAGES))
    space.put_pages(held, pin=True)
    machine.check()


async def test_a_device_stores_to_its_own_page_unseen() -> None:
    """The entry keeps the right to write, and stays clean: a device's stores fault nowhere. Coming home it is still clean."""
    machine = Machine()
    space = machine.process()
    await written(space, 1)
    await machine.to_device(space, 64, span(FIRST, 1))
    await space.clear_soft_dirty()
    assert space.mm.table.get(FIRST) & (pte.KIND | pte.WRITE) == pte.DEVICE | pte.WRITE
    await space.load(BASE, 1)
    assert [word & PM_SOFT_DIRTY for word in view(space, 1)] == [0]


@pytest.mark.parametrize("huge", [False, True])
async def test_shared_and_huge_pages_are_written_again(huge: bool) -> None:
    """Clearing takes the right to write, the next store gives it back in place: no copy is made."""
    machine = Machine(host_pages=4 * HUGE_PAGES)
    space = machine.process()
    await space.mmap(HUGE_PAGES * PAGE, "rw", BASE, shared=not huge)
    if huge:
        await space.madvise(BASE, HUGE_PAGES * PAGE, "HUGEPAGE")
    await space.store(BASE, b"one")
    frame = space.mm.table.get(FIRST) >> pte.FRAME_SHIFT
    await space.clear_soft_dirty()
    assert not view(space, 1)[0] & PM_SOFT_DIRTY
    await space.store(BASE, b"two")
    assert view(space, 1)[0] & PM_SOFT_DIRTY
    assert space.mm.table.get(FIRST) >> pte.FRAME_SHIFT == frame
    machine.check()


async def test_referenced_is_cleared_and_set_again() -> None:
    """smaps counts the accessed bit, which a load sets."""
    space = Machine().process()
    await written(space)
    await space.clear_referenced()
    assert space.smaps()[0].referenced == 0
    await space.load(BASE, 1)
    assert space.smaps()[0].referenced == PAGE
