"""Guard regions. Oracle: mm/madvise.c (madvise_guard_install), mm/memory.c (handle_pte_marker, zap_nonpresent_ptes, copy_pte_marker)."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from hmmnet.errors import KernelError, SegmentationFault
from hmmnet.host.hub import Hub
from hmmnet.host.interfaces import Event
from hmmnet.host.mm.guard import guarded
from hmmnet.host.mm.space import Space
from hmmnet.host.personality import V25
from hmmnet.pages import HMM_PFN_REQ_FAULT, HUGE_PAGES
from tests.host.fakes import FakeLink

from .files import BASE, PAGE, filled, mapped, used
from .machine import Machine, page_bytes, span

FIRST = BASE // PAGE


def guards(space: Space, pages: int, first: int = FIRST) -> str:
    """Where guards are, as letters: ``G`` or ``-``."""
    return "".join("G" if one else "-" for one in guarded(space.mm.table.read(first, first + pages)))


async def four(machine: Machine) -> Space:
    """Four written pages, of which the two in the middle are guarded."""
    space = machine.process()
    await space.mmap(4 * PAGE, "rw", BASE)
    await space.store(BASE, b"".join(page_bytes(i + 1) for i in range(4)))
    await space.madvise(BASE + PAGE, 2 * PAGE, "GUARD_INSTALL")
    return space


async def test_nobody_touches_a_guard() -> None:
    """What was mapped is gone. A CPU gets SIGSEGV, who faults for others EFAULT, a snapshot nothing; a migration leaves it."""
    machine = Machine()
    space = await four(machine)
    assert (guards(space, 4), used(machine), space.mm.rss) == ("-GG-", 2, 2)
    for access in (space.load(BASE + PAGE, 1), space.store(BASE + 2 * PAGE, b"x"), space.load(BASE, 2 * PAGE)):
        with pytest.raises(SegmentationFault, match="guard"):
            await access
    with pytest.raises(KernelError) as refused:
        await space.madvise(BASE, 4 * PAGE, "POPULATE_WRITE")
    assert refused.value.code == errno.EFAULT
    async with space.mmap_lock.read():
        assert space.walk(FIRST, FIRST + 4, None, 0, 0, 64).words.astype(bool).tolist() == [True, False, False, True]
        assert space.walk(FIRST, FIRST + 4, None, HMM_PFN_REQ_FAULT, 0, 64).errno == errno.EFAULT
    await machine.to_device(space, 64, span(FIRST, 4))
    assert guards(space, 4) == "-GG-"
    assert await space.load(BASE + 3 * PAGE, PAGE) == page_bytes(4)
    await space.madvise(BASE, 4 * PAGE, "GUARD_REMOVE")
    assert await space.load(BASE, 4 * PAGE) == page_bytes(1) + bytes(2 * PAGE) + page_bytes(4)
    machine.check()


async def test_what_guards_outlast() -> None:
    """DONTNEED, FREE, mprotect, mremap, fork; munmap takes them, and what is mapped there next has none."""
    machine = Machine()
    space = await four(machine)
    for advice in ("DONTNEED", "FREE", "PAGEOUT", "COLD"):
        await space.madvise(BASE, 4 * PAGE, advice)
    await space.mprotect(BASE, 4 * PAGE, "r")
    await space.mprotect(BASE, 4 * PAGE, "rw")
    await space.mremap(BASE, 4 * PAGE, 4 * PAGE, 2 * BASE)
    child = await space.fork(2, Hub())
    for one in (space, child):
        assert guards(one, 4, 2 * FIRST) == "-GG-"
        with pytest.raises(SegmentationFault, match="guard"):
            await one.load(2 * BASE + PAGE, 1)
    await machine.exit(child)
    await space.munmap(2 * BASE, 4 * PAGE)
    await space.mmap(4 * PAGE, "rw", 2 * BASE)
    assert await space.load(2 * BASE, 4 * PAGE) == bytes(4 * PAGE)
    machine.check()


@pytest.mark.parametrize("shared", [False, True])
async def test_guards_in_a_file(*, shared: bool) -> None:
    """They hide its pages, in a child too, stay when it is cut, and have nothing to do with the page cache."""
    machine = Machine()
    space = machine.process()
    file = await filled(machine, 4)
    before = await file.read(0, 4 * PAGE)
    await mapped(space, file, 4, BASE, shared=shared)
    await space.load(BASE, 4 * PAGE)
    await space.madvise(BASE + 2 * PAGE, PAGE, "GUARD_INSTALL")
    child = await space.fork(2, Hub())
    for one in (space, child):
        with pytest.raises(SegmentationFault, match="guard"):
            await one.load(BASE + 2 * PAGE, 1)
    await file.truncate(PAGE)
    await file.truncate(4 * PAGE)
    assert guards(space, 4) == "--G-"
    await space.madvise(BASE + 2 * PAGE, PAGE, "GUARD_REMOVE")
    assert await space.load(BASE, 4 * PAGE) == before[:PAGE] + bytes(3 * PAGE)
    await machine.exit(child)
    machine.check()


async def test_a_child_has_guards_where_nothing_was_ever_touched() -> None:
    """anon_vma_prepare, and VM_MAYBE_GUARD: fork copies the page table, though there is no page."""
    machine = Machine()
    space = machine.process()
    await space.mmap(3 * PAGE, "rw", BASE)
    await space.madvise(BASE + PAGE, PAGE, "GUARD_INSTALL")
    child = await space.fork(2, Hub())
    assert guards(child, 3) == "-G-"
    await child.store(BASE, b"x")
    with pytest.raises(SegmentationFault, match="guard"):
        await child.store(BASE + PAGE, b"x")
    await machine.exit(child)
    machine.check()


async def test_where_there_can_be_none() -> None:
    """EINVAL for locked and hugetlb memory, though a lock keeps nobody from removing one; ENOMEM where there are holes."""
    machine = Machine()
    space = await four(machine)
    await space.mmap_hugetlb(HUGE_PAGES * PAGE, "rw", 2 * BASE)
    await space.mlock(BASE + 3 * PAGE, PAGE)
    for start, pages, code in ((BASE + 3 * PAGE, 1, errno.EINVAL), (2 * BASE, HUGE_PAGES, errno.EINVAL), (BASE - PAGE, 2, errno.ENOMEM)):
        with pytest.raises(KernelError) as refused:
            await space.madvise(start, pages * PAGE, "GUARD_INSTALL")
        assert refused.value.code == code
    assert guards(space, 4) == "GGG-"
    await space.madvise(BASE, 4 * PAGE, "GUARD_REMOVE")
    assert guards(space, 4) == "----"
    machine.check()


async def test_mirrors_hear_of_it_and_huge_pages_are_split() -> None:
    """CLEAR for what is guarded; the rest of a huge page stays."""
    machine = Machine()
    space = machine.process()
    await space.mmap(HUGE_PAGES * PAGE, "rw", BASE)
    await space.madvise(BASE, HUGE_PAGES * PAGE, "HUGEPAGE")
    await space.store(BASE + 9 * PAGE, page_bytes(9))
    link = FakeLink("gpu0", 64)
    assert isinstance(space.hub, Hub)
    space.hub.insert(0, 1 << 30, link, 1)
    await space.madvise(BASE + 5 * PAGE, 2 * PAGE, "GUARD_INSTALL")
    assert (FIRST + 5, FIRST + 7, Event.CLEAR) in [(start, end, event) for _, start, end, event, *_ in link.told]
    assert guards(space, 9) == "-----GG--"
    assert await space.load(BASE + 9 * PAGE, PAGE) == page_bytes(9)
    assert np.count_nonzero(guarded(space.mm.table.read(FIRST, FIRST + HUGE_PAGES))) == 2
    machine.check()


@pytest.mark.parametrize("before", ["untouched", "huge", "zero"])
@pytest.mark.parametrize("pages", [1, HUGE_PAGES])
async def test_a_page_table_stays_when_its_guards_go(before: str, pages: int) -> None:
    """guard_install_set_pte lies in a page table, which GUARD_REMOVE leaves: what is faulted in next is small; after munmap it is huge."""
    machine = Machine(host_pages=4 * HUGE_PAGES)
    space = machine.process()
    for table in (True, False):
        await space.mmap(HUGE_PAGES * PAGE, "rw", BASE)
        await space.madvise(BASE, HUGE_PAGES * PAGE, "HUGEPAGE")
        if table:
            if before != "untouched":
                await (space.store(BASE, b"x") if before == "huge" else space.load(BASE, 1))
                assert space.mm.table.pmd(FIRST)
            await space.madvise(BASE, pages * PAGE, "GUARD_INSTALL")
            await space.madvise(BASE, pages * PAGE, "GUARD_REMOVE")
        await space.store(BASE, b"y")
        assert bool(space.mm.table.pmd(FIRST)) is not table
        machine.check()
        await space.munmap(BASE, HUGE_PAGES * PAGE)


def test_v25_knows_no_guards() -> None:
    """They came with Linux 6.13."""
    for advice in ("GUARD_INSTALL", "GUARD_REMOVE"):
        with pytest.raises(KernelError, match="EINVAL"):
            V25.check_advice(advice)
