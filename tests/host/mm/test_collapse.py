"""MADV_COLLAPSE, result by result: what the scan finds first decides, some results end the call, and each has its errno.

Oracle: mm/khugepaged.c (hpage_collapse_scan_pmd, collapse_huge_page, __collapse_huge_page_swapin, madvise_collapse,
madvise_collapse_errno).
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from hmmnet.errors import BusError, KernelError, SegmentationFault
from hmmnet.host.hub import Hub, Invalidation
from hmmnet.host.mm import pte
from hmmnet.host.mm.collapse import ERRNO, GOES_ON, Scan
from hmmnet.host.mm.space import Space
from hmmnet.pages import HUGE_PAGES
from tests.host.fakes import FakeLink

from .files import BASE, PAGE, mapped, memfd, symbols, used
from .machine import Machine, page_bytes, span
from .test_huge import BLOCK, FIRST, is_huge

SECOND = BASE + BLOCK


async def small(machine: Machine, blocks: int = 1) -> Space:
    """A process with `blocks` blocks, in each of which the first 8 pages are written: page i holds the byte i + 1."""
    space = machine.process()
    await space.mmap(blocks * BLOCK, "rw", BASE)
    for block in range(blocks):
        await space.store(BASE + block * BLOCK, b"".join(page_bytes(i + 1) for i in range(8)))
    return space


async def code_of(space: Space, blocks: int = 1) -> int:
    """What madvise(MADV_COLLAPSE) fails with, 0 for nothing; and nothing is lost by it."""
    try:
        await space.madvise(BASE, blocks * BLOCK, "COLLAPSE")
    except KernelError as error:
        return error.code
    return 0


async def is_whole(space: Space) -> bool:
    """Whether the first pages hold what they held."""
    return await space.load(BASE, 8 * PAGE) == b"".join(page_bytes(i + 1) for i in range(8))


async def _nothing_away(machine: Machine, space: Space) -> None:
    """All are present."""


async def _swapped(machine: Machine, space: Space) -> None:
    await space.madvise(BASE, 3 * PAGE, "PAGEOUT")


async def _on_a_device(machine: Machine, space: Space) -> None:
    await machine.to_device(space, 64, span(FIRST, 3))


async def _exclusive(machine: Machine, space: Space) -> None:
    assert await space.make_exclusive(FIRST, FIRST + 3, 64) == 3


async def _hinted(machine: Machine, space: Space) -> None:
    assert await space.numa_hints(FIRST, FIRST + 3) == 3


@pytest.mark.parametrize("away", [_swapped, _on_a_device, _exclusive, _hinted])
async def test_what_is_away_is_had_back(away: Callable[[Machine, Space], Awaitable[None]]) -> None:
    """Every page that is not there but has data (do_swap_page): then all is one huge page, and writable."""
    machine = Machine()
    space = await small(machine)
    await away(machine, space)
    assert await code_of(space) == 0
    assert is_huge(space)
    assert await is_whole(space)
    await space.store(BASE, b"new")
    assert used(machine) == HUGE_PAGES
    machine.check()


@pytest.mark.parametrize("away", [_nothing_away, _swapped, _on_a_device])
async def test_memory_without_rights_can_be_collapsed(away: Callable[[Machine, Space], Awaitable[None]]) -> None:
    """PROT_NONE: neither the scan nor do_swap_page, called past handle_mm_fault, asks for rights. Nobody reads it before it may."""
    machine = Machine()
    space = await small(machine)
    await away(machine, space)
    await space.mprotect(BASE, BLOCK, "none")
    assert await code_of(space) == 0
    assert is_huge(space)
    with pytest.raises(SegmentationFault):
        await space.load(BASE, 1)
    await space.mprotect(BASE, BLOCK, "rw")
    assert is_huge(space)
    assert await is_whole(space)
    assert used(machine) == HUGE_PAGES
    machine.check()


@pytest.mark.parametrize("away", [_swapped, _on_a_device])
async def test_without_a_huge_page_nothing_is_had_back(away: Callable[[Machine, Space], Awaitable[None]]) -> None:
    """It is allocated first: ENOMEM, and pages are where they were."""
    machine = Machine(host_pages=HUGE_PAGES)
    space = await small(machine)
    await away(machine, space)
    assert await code_of(space) == errno.ENOMEM
    assert symbols(space, BASE, 4) == "SSSP"
    assert await is_whole(space)
    machine.check()


async def test_pages_in_the_swap_cache_are_nobody_elses() -> None:
    """The cache has a reference of a page that a family had in swap; it is expected, and the child has its page from there."""
    machine = Machine()
    space = await small(machine)
    await space.madvise(BASE, 3 * PAGE, "PAGEOUT")
    child = await machine.fork(space)
    await space.load(BASE, 3 * PAGE)
    assert machine.memory.swap.used == 3
    assert await code_of(space) == 0
    assert is_huge(space)
    for one in (space, child):
        assert await is_whole(one)
    assert machine.memory.swap.used == 0
    machine.check()


async def test_a_guard_cannot_be_had_back_and_ends_the_call() -> None:
    """SCAN_FAIL is EINVAL, and the next block is not looked at; the huge page in hand goes back."""
    machine = Machine()
    space = await small(machine, 2)
    await space.madvise(BASE + 4 * PAGE, PAGE, "GUARD_INSTALL")
    before = used(machine)
    assert await code_of(space, 2) == errno.EINVAL
    assert [is_huge(space), is_huge(space, 1)] == [False, False]
    assert used(machine) == before
    machine.check()


async def test_a_held_page_does_not_end_the_call() -> None:
    """SCAN_PAGE_COUNT is EAGAIN, and the next block is made huge all the same."""
    machine = Machine()
    space = await small(machine, 2)
    held = await space.get_pages(FIRST + 3, 1)
    assert await code_of(space, 2) == errno.EAGAIN
    assert [is_huge(space), is_huge(space, 1)] == [False, True]
    space.put_pages(held)
    assert await code_of(space, 2) == 0
    assert is_huge(space)
    machine.check()


async def test_a_missing_huge_page_ends_the_call() -> None:
    """SCAN_ALLOC_HUGE_PAGE_FAIL at the first block, where a hole behind it would be EINVAL, and would let it go on."""
    machine = Machine(host_pages=HUGE_PAGES)
    space = await small(machine, 2)
    await space.madvise(SECOND, BLOCK, "DONTNEED")
    assert await code_of(space, 2) == errno.ENOMEM


@pytest.mark.parametrize(("held", "expected"), [(2, errno.EAGAIN), (6, errno.EINVAL)])
async def test_the_first_page_in_the_way_decides(held: int, expected: int) -> None:
    """Coherent memory of a device is EINVAL (SCAN_PAGE_NULL), a held page EAGAIN: what stands before the other is told."""
    machine = Machine(kind="coherent")
    space = await small(machine)
    await machine.to_device(space, 64, span(FIRST + 4, 1))
    frames = await space.get_pages(FIRST + held, 1)
    assert await code_of(space) == expected
    space.put_pages(frames)
    assert await code_of(space) == errno.EINVAL
    assert not is_huge(space)
    machine.check()


async def test_pages_that_a_userfaultfd_waits_for_are_not_made() -> None:
    """SCAN_EXCEED_NONE_PTE: EBUSY; with all pages there it is made huge."""
    machine = Machine()
    space = await small(machine)
    await space.userfaultfd(BASE, BLOCK, sigbus=True)
    assert await code_of(space) == errno.EBUSY
    assert symbols(space, BASE, 9) == "PPPPPPPP-"
    await space.mmap(BLOCK, "rw", BASE)
    await space.store(BASE, np.ones(BLOCK, np.uint8))
    await space.userfaultfd(BASE, BLOCK, sigbus=True)
    assert await code_of(space) == 0
    assert is_huge(space)
    machine.check()


async def test_pages_that_are_write_protected_by_userfaultfd_stay_small() -> None:
    """SCAN_PTE_UFFD_WP: EINVAL."""
    machine = Machine()
    space = await small(machine)
    space.mm.table.mark_one(FIRST + 2, space.mm.table.get(FIRST + 2) | pte.UFFD_WP)
    assert await code_of(space) == errno.EINVAL
    assert not is_huge(space)


async def test_a_huge_page_on_a_device_stays_there() -> None:
    """Its entry is not present, and no table of small ones: EINVAL (SCAN_NO_PTE_TABLE)."""
    machine = Machine()
    space = machine.process()
    await space.mmap(BLOCK, "rw", BASE)
    await space.madvise(BASE, BLOCK, "HUGEPAGE")
    await space.store(BASE, page_bytes(1))
    await machine.to_device(space, 64, span(FIRST, HUGE_PAGES), compound=True)
    assert symbols(space, BASE, 2) == "SS"
    assert await code_of(space) == errno.EINVAL
    assert symbols(space, BASE, 2) == "SS"
    machine.check()


async def test_mirrors_hear_of_what_is_collapsed_only() -> None:
    """A block that cannot be, and one that is huge already, are no news."""
    machine = Machine()
    space = await small(machine, 2)
    held = await space.get_pages(FIRST + 3, 1)
    assert isinstance(space.hub, Hub)
    space.hub.insert(0, 1 << 30, link := FakeLink("gpu0", 64), 1)
    for _ in range(2):
        assert await code_of(space, 2) == errno.EAGAIN
    assert [heard[1:3] for heard in link.told] == [(FIRST + HUGE_PAGES, FIRST + 2 * HUGE_PAGES)]
    space.put_pages(held)


@pytest.mark.parametrize(("room", "expected"), [(True, errno.EBUSY), (False, errno.ENOMEM)])
async def test_a_group_at_its_limit_is_ebusy_where_there_is_memory(*, room: bool, expected: int) -> None:
    """SCAN_CGROUP_CHARGE_FAIL comes after the allocation, which may fail first."""
    machine = Machine(host_pages=4096 if room else HUGE_PAGES)
    space = machine.process()
    group = space.mm.cgroup = machine.memory.cgroups.create("job", 100 * PAGE)
    await space.mmap(BLOCK, "rw", BASE)
    await space.store(BASE, page_bytes(1))
    assert await code_of(space) == expected
    assert group.usage_pages == 1
    machine.check()


async def test_a_group_that_cannot_have_its_pages_back_is_einval() -> None:
    """Pages in swap are charged to the group that had them, which is at its limit: SCAN_FAIL, and they stay."""
    machine = Machine()
    space = machine.process()
    space.mm.cgroup = machine.memory.cgroups.create("small", 8 * PAGE)
    await space.mmap(BLOCK, "rw", BASE)
    await space.store(BASE, b"".join(page_bytes(i + 1) for i in range(8)))
    await space.madvise(BASE, 3 * PAGE, "PAGEOUT")
    space.mm.cgroup.limit_pages = 5
    space.mm.cgroup = machine.memory.cgroups.create("large", None)
    assert await code_of(space) == errno.EINVAL
    assert symbols(space, BASE, 4) == "SSSP"
    assert space.mm.cgroup.usage_pages == 0
    machine.check()


class CancelledAtTheEnd(Invalidation):
    """An announcement at whose end the task is interrupted."""

    async def __aexit__(self, *exc: object) -> None:
        await super().__aexit__(*exc)  # type: ignore[arg-type]
        raise KeyboardInterrupt


async def test_a_huge_page_stays_for_who_is_cancelled_at_the_end_of_the_announcement() -> None:
    """By then it is mapped: it is the process's, not spare."""
    machine = Machine()
    space = await small(machine)
    assert isinstance(space.hub, Hub)
    space.hub._invalidation = CancelledAtTheEnd
    with pytest.raises(KeyboardInterrupt):
        await space.madvise(BASE, BLOCK, "COLLAPSE")
    space.hub._invalidation = Invalidation
    assert is_huge(space)
    machine.check()
    assert used(machine) == HUGE_PAGES
    assert await is_whole(space)


@pytest.mark.parametrize("holes", [True, False])
async def test_holes_of_shared_memory_that_somebody_waits_for_are_not_filled(*, holes: bool) -> None:
    """SCAN_EXCEED_NONE_PTE of collapse_file, whoever maps the file with a userfaultfd: EBUSY; without holes it is made huge."""
    machine = Machine()
    parent = machine.process()
    await parent.mmap(BLOCK, "rw", BASE, shared=True)
    await parent.store(BASE, np.ones(BLOCK - PAGE if holes else BLOCK, np.uint8))
    child = await machine.fork(parent)
    await child.userfaultfd(BASE + 8 * PAGE, BLOCK - 8 * PAGE, sigbus=True)
    assert await code_of(parent) == (errno.EBUSY if holes else 0)
    assert used(machine) == (HUGE_PAGES - 1 if holes else HUGE_PAGES)
    assert await parent.load(BASE, 2) == b"\1\1"
    assert is_huge(parent) is not holes
    if holes:
        with pytest.raises(BusError):
            await child.load(BASE + BLOCK - PAGE, 1)
    machine.check()


async def test_a_file_that_ends_in_the_block_is_einval_and_ends_the_call() -> None:
    """SCAN_TRUNCATED."""
    machine = Machine()
    space = machine.process()
    file = memfd(machine, HUGE_PAGES - 1)
    await mapped(space, file, HUGE_PAGES)
    await space.store(BASE, b"x")
    assert await code_of(space) == errno.EINVAL
    await file.close()


def test_each_result_has_its_errno() -> None:
    """madvise_collapse_errno, and the list of results that let the call go on, as they stand there."""
    codes = {found.name: ERRNO.get(found, errno.EINVAL) for found in Scan}
    assert codes == {
        "SUCCEED": 0,
        "PMD_NULL": errno.EINVAL,
        "PTE_NON_PRESENT": errno.EINVAL,
        "PTE_UFFD_WP": errno.EINVAL,
        "PAGE_NULL": errno.EINVAL,
        "PAGE_COUNT": errno.EAGAIN,
        "EXCEED_NONE_PTE": errno.EBUSY,
        "TRUNCATED": errno.EINVAL,
        "ALLOC_HUGE_PAGE_FAIL": errno.ENOMEM,
        "CGROUP_CHARGE_FAIL": errno.EBUSY,
        "FAIL": errno.EINVAL,
    }
    assert {found.name for found in Scan} - {found.name for found in GOES_ON} == {
        "EXCEED_NONE_PTE",
        "TRUNCATED",
        "ALLOC_HUGE_PAGE_FAIL",
        "CGROUP_CHARGE_FAIL",
        "FAIL",
    }
