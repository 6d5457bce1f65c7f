"""Huge pages that processes share: of the pool (MAP_HUGETLB|MAP_SHARED), and shmem that was collapsed (MADV_COLLAPSE).

Oracle: mm/hugetlb.c, mm/khugepaged.c (collapse_file, madvise_collapse_errno), mm/memory.c (do_set_pmd), mm/huge_memory.c (what a split does
to pages of files); the bytes.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import BusError, KernelError
from hmmnet.host.hub import Hub
from hmmnet.host.interfaces import Event
from hmmnet.host.mm import huge, pte
from hmmnet.host.mm.space import Space
from hmmnet.host.mm.truncate import truncate
from hmmnet.host.mm.zones import COMPOUND
from hmmnet.pages import HMM_PFN_ORDER_SHIFT, HUGE_PAGES
from tests.host.fakes import FakeLink

from .files import BASE, PAGE, filled, mapped, memfd, symbols, used
from .machine import Machine, page_bytes, span

BLOCK = HUGE_PAGES * PAGE
FIRST = BASE // PAGE


def is_huge(space: Space, block: int = 0) -> bool:
    """Whether a block is mapped by one entry."""
    return space.mm.table.pmd(FIRST + block * HUGE_PAGES) & pte.KIND == pte.PRESENT


async def pool(machine: Machine, blocks: int = 2, protection: str = "rw") -> Space:
    space = machine.process()
    await space.mmap_hugetlb(blocks * BLOCK, protection, BASE, shared=True)
    return space


async def test_a_family_shares_pages_of_the_pool() -> None:
    """One huge page, mapped as one by parent and child, in either order; a store of either is seen by both, and nothing is copied."""
    machine = Machine()
    parent = await pool(machine)
    child = await machine.fork(parent)
    await child.store(BASE + 5, b"from the child")
    assert is_huge(child)
    assert not is_huge(parent)
    assert await parent.load(BASE, 19) == b"\0" * 5 + b"from the child"
    await parent.store(BASE + BLOCK - 1, b"p")
    assert await child.load(BASE + BLOCK - 1, 1) == b"p"
    assert used(machine) == HUGE_PAGES
    assert symbols(parent, BASE, 2) == "pp"
    async with parent.mmap_lock.read():
        words = parent.walk(FIRST, FIRST + 2, None, 0, 0, -1).words
        assert (words >> np.uint64(HMM_PFN_ORDER_SHIFT) & np.uint64(31)).tolist() == [9, 9]
        with pytest.raises(KernelError, match="EINVAL"):
            parent.check_migratable(FIRST, FIRST + 1)
    machine.check()
    await parent.munmap(BASE, 2 * BLOCK)
    assert used(machine) == HUGE_PAGES
    assert await child.load(BASE + 5, 4) == b"from"
    await machine.exit(child)
    assert used(machine) == 0


async def test_a_page_of_the_pool_goes_whole_or_not_at_all() -> None:
    """EINVAL for parts; DONTNEED drops the mapping and keeps the page; REMOVE punches whole pages only; then it is zero."""
    machine = Machine()
    space = await pool(machine)
    await space.store(BASE, b"x")
    await space.store(BASE + BLOCK, b"y")
    for part in (
        space.munmap(BASE + PAGE, PAGE),
        space.mprotect(BASE, PAGE, "r"),
        space.madvise(BASE + PAGE, BLOCK, "DONTNEED"),
        space.madvise(BASE, BLOCK, "PAGEOUT"),
        space.madvise(BASE, BLOCK, "FREE"),
        space.madvise(BASE, BLOCK, "COLLAPSE"),
    ):
        with pytest.raises(KernelError, match="EINVAL"):
            await part
    with pytest.raises(KernelError, match="EOPNOTSUPP"):
        await space.make_exclusive(FIRST, FIRST + 1, 64)
    await space.madvise(BASE, BLOCK, "DONTNEED")
    assert [is_huge(space, 0), is_huge(space, 1)] == [False, True]
    assert await space.load(BASE, 1) == b"x"
    await space.madvise(BASE + PAGE, 2 * BLOCK - 2 * PAGE, "REMOVE")
    assert await space.load(BASE + BLOCK, 1) == b"y"
    await space.madvise(BASE + PAGE, 2 * BLOCK - PAGE, "REMOVE")
    assert used(machine) == HUGE_PAGES
    assert await space.load(BASE, 1) + await space.load(BASE + BLOCK, 1) == b"x\0"
    machine.check()


async def test_the_pool_can_be_used_up() -> None:
    """More than there is: ENOMEM at mmap; what is not in one piece: at the fault, and what there is goes on."""
    machine = Machine(host_pages=3 * HUGE_PAGES)
    space = machine.process()
    with pytest.raises(KernelError, match="ENOMEM"):
        await space.mmap_hugetlb(3 * BLOCK, "rw", BASE, shared=True)
    await space.mmap_hugetlb(2 * BLOCK, "rw", BASE, shared=True)
    await space.store(BASE, b"1")
    other = machine.process()
    await other.mmap(BLOCK, "rw", 2 * BASE)
    await other.store(2 * BASE, bytes(BLOCK))
    with pytest.raises(KernelError, match=r"ENOMEM.*no 2 MiB in one piece"):
        await space.store(BASE + BLOCK, b"2")
    assert await space.load(BASE, 1) == b"1"
    machine.check()


async def test_rights_come_back_to_pages_of_the_pool() -> None:
    """Read-only and back, and soft-dirty cleared: shared pages are written in place, and are no process's own."""
    machine = Machine()
    space = await pool(machine, 1)
    await space.store(BASE, b"1")
    await space.mprotect(BASE, BLOCK, "r")
    assert not space.mm.table.pmd(FIRST) & pte.WRITE
    await space.mprotect(BASE, BLOCK, "rw")
    await space.store(BASE, b"2")
    await space.clear_soft_dirty()
    await space.store(BASE + 1, b"3")
    assert await space.load(BASE, 2) == b"23"
    assert not space.mm.table.pmd(FIRST) & pte.ANON_EXCLUSIVE
    assert used(machine) == HUGE_PAGES
    (shown,) = space.smaps()
    assert (shown.rss, shown.anonymous, shown.anon_huge_pages) == (BLOCK, 0, 0)
    moved = await space.mremap(BASE, BLOCK, BLOCK, 4 * BASE)
    assert await space.load(moved, 2) == b"23"
    machine.check()


# --- shmem ------------------------------------------------------------------------------------------------------------------------


async def shmem(machine: Machine, blocks: int = 1, *, pages: int | None = None) -> tuple[Space, Space]:
    """Two processes that share memory of which `pages` (default: all) are written, page i with the byte i + 1."""
    file = await filled(machine, blocks * HUGE_PAGES if pages is None else pages)
    await file.truncate(blocks * BLOCK)
    one, two = machine.process(), machine.process()
    for space in (one, two):
        await mapped(space, file, blocks * HUGE_PAGES)
    return one, two


def expected(pages: int = HUGE_PAGES, written: int = HUGE_PAGES) -> bytes:
    return b"".join(page_bytes(i + 1) if i < written else bytes(PAGE) for i in range(pages))


async def test_shared_memory_becomes_a_huge_page_for_everybody() -> None:
    """Mirrors of both are told, both tables are empty, and whoever comes maps it as one; holes are zeros, swap is read back."""
    machine = Machine()
    one, two = await shmem(machine, pages=100)
    await one.load(BASE, 8 * PAGE)
    await two.load(BASE, 50 * PAGE)
    await one.madvise(BASE + 60 * PAGE, 10 * PAGE, "PAGEOUT")
    links = {}
    for space in (one, two):
        assert isinstance(space.hub, Hub)
        links[space.number] = FakeLink("gpu0", 64)
        space.hub.insert(0, 1 << 30, links[space.number], 1)
    await one.madvise(BASE, BLOCK, "COLLAPSE")
    for link in links.values():
        assert [told[1:4] for told in link.told] == [(FIRST, FIRST + HUGE_PAGES, Event.CLEAR)]
    assert (one.mm.rss, two.mm.rss, machine.memory.swap.used) == (0, 0, 0)
    assert used(machine) == HUGE_PAGES
    assert await two.load(BASE, BLOCK) == expected(written=100)
    await one.store(BASE + 3 * PAGE, b"new")
    assert is_huge(one)
    assert is_huge(two)
    assert await two.load(BASE + 3 * PAGE, 4) == b"new\4"
    await one.madvise(BASE, BLOCK, "COLLAPSE")
    assert is_huge(one), "it is one already"
    machine.check()


async def test_what_cannot_be_collapsed_has_its_errno_and_is_as_before() -> None:
    """Nothing there: EINVAL; not aligned in the file: EINVAL; behind its end: EINVAL; a held page: EAGAIN; no memory: ENOMEM."""
    machine = Machine(host_pages=3 * HUGE_PAGES)
    one, _ = await shmem(machine, pages=5)
    held = await one.get_pages(FIRST, 1)
    with pytest.raises(KernelError) as caught:
        await one.madvise(BASE, BLOCK, "COLLAPSE")
    assert caught.value.code == errno.EAGAIN
    one.put_pages(held)
    taken = [machine.memory.allocate_huge(), machine.memory.allocate_huge()]
    with pytest.raises(KernelError) as caught:
        await one.madvise(BASE, BLOCK, "COLLAPSE")
    assert caught.value.code == errno.ENOMEM
    for frames in taken:
        if frames is not None:
            machine.memory.put(frames)
    file = await filled(machine, 8)
    await file.truncate(2 * BLOCK)
    await mapped(one, file, HUGE_PAGES, 2 * BASE, first=HUGE_PAGES)
    await mapped(one, file, HUGE_PAGES, 3 * BASE, first=1)
    await mapped(one, memfd(machine, 4), HUGE_PAGES, 4 * BASE)
    for base in (2 * BASE, 3 * BASE, 4 * BASE):
        with pytest.raises(KernelError) as caught:
            await one.madvise(base, BLOCK, "COLLAPSE")
        assert caught.value.code == errno.EINVAL
    assert await one.load(BASE, BLOCK) == expected(written=5)
    assert not is_huge(one)
    machine.check()


Change = Callable[[Space], Coroutine[Any, Any, object]]


@pytest.mark.parametrize(
    ("change", "left", "again"),
    [
        (lambda space: space.munmap(BASE + 5 * PAGE, PAGE), 0, False),
        (lambda space: space.mprotect(BASE + 5 * PAGE, PAGE, "r"), 0, False),
        (lambda space: space.mlock(BASE, 4 * PAGE), 4, False),
        (lambda space: space.madvise(BASE + 5 * PAGE, PAGE, "DONTNEED"), 0, True),
        (lambda space: space.madvise(BASE, BLOCK, "DONTNEED"), 0, True),
    ],
    ids=["munmap", "mprotect", "mlock", "dontneed", "dontneed whole"],
)
async def test_a_part_that_changes_drops_the_entry_of_the_whole(change: Change, left: int, *, again: bool) -> None:
    """Unmapped whole, in that process alone; it comes back as one where the mapping still holds the block whole, else page by page."""
    machine = Machine()
    one, two = await shmem(machine)
    await one.madvise(BASE, BLOCK, "COLLAPSE")
    for space in (one, two):
        await space.load(BASE, 1)
        assert is_huge(space)
    await change(one)
    assert not is_huge(one)
    assert one.mm.rss >= left
    assert is_huge(two)
    machine.check()
    assert await one.load(BASE + 8 * PAGE, PAGE) == page_bytes(9)
    assert is_huge(one) is again
    assert await two.load(BASE, BLOCK) == expected()
    machine.check()


async def test_a_hole_in_the_file_splits_the_page_for_everybody() -> None:
    """Punched in the middle, cut at the end: the rest is ordinary pages of the file, with their bytes; what goes is free."""
    machine = Machine()
    one, two = await shmem(machine)
    await one.madvise(BASE, BLOCK, "COLLAPSE")
    await one.store(BASE, page_bytes(1))
    await two.load(BASE, 1)
    await two.madvise(BASE + 5 * PAGE, 3 * PAGE, "REMOVE")
    assert not is_huge(one)
    assert not is_huge(two)
    assert used(machine) == HUGE_PAGES - 3
    assert not (machine.memory.zones[0].flags & COMPOUND).any()
    want = bytearray(expected())
    want[5 * PAGE : 8 * PAGE] = bytes(3 * PAGE)
    assert await one.load(BASE, BLOCK) == want
    assert not is_huge(one)
    await one.madvise(BASE, BLOCK, "COLLAPSE")
    assert await two.load(BASE, BLOCK) == want
    assert is_huge(two)
    vma = two.mm.vmas.find(FIRST)
    assert vma is not None
    assert vma.file is not None
    await truncate(vma.file, 100 * PAGE)
    assert await one.load(BASE + 99 * PAGE, PAGE) == page_bytes(100)
    with pytest.raises(BusError):
        await two.load(BASE + 100 * PAGE, 1)
    assert used(machine) == 100
    machine.check()


async def test_it_goes_to_swap_page_by_page_and_comes_back() -> None:
    """PAGEOUT of the whole by its only mapper: no frame is left; afterwards it is ordinary pages. Of a part: it is split."""
    machine = Machine()
    one, two = await shmem(machine)
    await one.madvise(BASE, BLOCK, "COLLAPSE")
    await one.load(BASE, 1)
    await two.load(BASE, 1)
    await one.madvise(BASE, BLOCK, "PAGEOUT")
    assert is_huge(one), "somebody else maps it"
    await two.munmap(BASE, BLOCK)
    await one.madvise(BASE + 5 * PAGE, 3 * PAGE, "PAGEOUT")
    assert (used(machine), machine.memory.swap.used, one.mm.rss) == (HUGE_PAGES, 0, 0), (
        "it is unmapped to be split, and nothing is left to go out"
    )
    await one.load(BASE, 1)
    assert not is_huge(one)
    await one.madvise(BASE, BLOCK, "COLLAPSE")
    await one.load(BASE, 1)
    await one.madvise(BASE, BLOCK, "PAGEOUT")
    assert (used(machine), machine.memory.swap.used, one.mm.rss) == (0, HUGE_PAGES, 0)
    assert await one.load(BASE, BLOCK) == expected()
    assert not is_huge(one)
    machine.check()


@pytest.mark.parametrize("advice", ["COLD", "PAGEOUT"])
async def test_who_maps_it_while_it_is_about_to_be_split_is_told(advice: str) -> None:
    """Advice about a part, by its only mapper; another process maps it meanwhile, and loses it: its mirrors have heard, each of its own."""
    machine = Machine()
    one, two = await shmem(machine)
    links = {}
    for space in (one, two):
        assert isinstance(space.hub, Hub)
        links[space.number] = FakeLink("gpu0", 64)
        space.hub.insert(0, 1 << 30, links[space.number], 1)
    await two.mremap(BASE, BLOCK, BLOCK, 2 * BASE)
    await one.madvise(BASE, BLOCK, "COLLAPSE")
    await one.load(BASE, 1)
    for link in links.values():
        link.told.clear()
    gate = links[one.number].hold()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.madvise, BASE + 5 * PAGE, PAGE, advice)
            await wait_all_tasks_blocked()
            await two.load(2 * BASE, 1)
            assert two.mm.table.pmd(2 * FIRST)
            gate.set()
    assert [is_huge(one), two.mm.rss] == [False, 0]
    for number, first in ((one.number, FIRST), (two.number, 2 * FIRST)):
        assert [told[1:4] for told in links[number].told] == [(first, first + HUGE_PAGES, Event.CLEAR)]
    assert await two.load(2 * BASE, BLOCK) == expected()
    machine.check()


async def test_two_that_split_it_at_once_split_it_once() -> None:
    """Both are told, and the later one finds nothing left to split."""
    machine = Machine()
    one, _ = await shmem(machine)
    await one.madvise(BASE, BLOCK, "COLLAPSE")
    await one.load(BASE, 1)
    assert isinstance(one.hub, Hub)
    one.hub.insert(0, 1 << 30, link := FakeLink("gpu0", 64), 1)
    gate = link.hold()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for page in (5, 9):
                nursery.start_soon(one.madvise, BASE + page * PAGE, PAGE, "COLD")
            await wait_all_tasks_blocked()
            gate.set()
    assert not (machine.memory.zones[0].flags & COMPOUND).any()
    assert await one.load(BASE, BLOCK) == expected()
    assert not is_huge(one)
    machine.check()


async def test_a_migration_splits_it_and_moves_nothing() -> None:
    """migrate_vma_collect_pmd splits the folio, for everybody; pages of files stay; one that is held is left as it is."""
    machine = Machine()
    one, two = await shmem(machine)
    await one.madvise(BASE, BLOCK, "COLLAPSE")
    for space in (one, two):
        await space.load(BASE, 1)
    held = await two.get_pages(FIRST + 9, 1)
    assert not (await machine.to_device(one, 64, span(FIRST, 4)) & 2).any()
    assert is_huge(one)
    two.put_pages(held)
    assert not (await machine.to_device(one, 64, span(FIRST, 4)) & 2).any()
    assert [is_huge(space) for space in (one, two)] == [False, False]
    assert not (machine.memory.zones[0].flags & COMPOUND).any()
    assert await one.load(BASE, BLOCK) == await two.load(BASE, BLOCK) == expected()
    machine.check()


async def test_private_mappings_have_its_pages_one_by_one_and_their_own_copies() -> None:
    """A copy made before the collapse stays; a store afterwards copies one page."""
    machine = Machine()
    one, _ = await shmem(machine)
    vma = one.mm.vmas.find(FIRST)
    assert vma is not None
    private = machine.process()
    await private.mmap(BLOCK, "rw", BASE, file=vma.file)
    await private.store(BASE + PAGE, b"mine")
    await private.load(BASE, 8 * PAGE)
    await one.madvise(BASE, BLOCK, "COLLAPSE")
    assert symbols(private, BASE, 3) == "-P-"
    await one.load(BASE, 1)
    assert await private.load(BASE, 2 * PAGE) == page_bytes(1) + b"mine" + page_bytes(2)[4:]
    await private.store(BASE + 4 * PAGE, b"too")
    assert not is_huge(private)
    assert await one.load(BASE, BLOCK) == expected()
    assert huge.huge_blocks(private.mm, span(FIRST, HUGE_PAGES)) == []
    machine.check()


async def test_a_collapse_is_charged_to_who_asks_for_it() -> None:
    """What the group's limit refuses is EBUSY (SCAN_CGROUP_CHARGE_FAIL), and the pages are as before, where they were."""
    machine = Machine()
    one, two = await shmem(machine, pages=10)
    one.mm.cgroup = machine.memory.cgroups.create("job", 100 * PAGE)
    with pytest.raises(KernelError, match="EBUSY"):
        await one.madvise(BASE, BLOCK, "COLLAPSE")
    assert one.mm.cgroup.usage_pages == 0
    one.mm.cgroup.limit_pages = None
    await one.madvise(BASE, BLOCK, "COLLAPSE")
    assert one.mm.cgroup.usage_pages == HUGE_PAGES
    assert await two.load(BASE, BLOCK) == expected(written=10)
    machine.check()


async def test_a_page_that_is_held_while_mirrors_are_told_stays() -> None:
    """EAGAIN: nothing was collapsed, and what was unmapped for it is faulted in again."""
    machine = Machine()
    one, two = await shmem(machine, pages=5)
    await two.load(BASE, 1)
    link = FakeLink("gpu0", 64)
    assert isinstance(two.hub, Hub)
    two.hub.insert(0, 1 << 30, link, 1)
    gate = link.hold()
    codes: list[int] = []

    async def collapse() -> None:
        with pytest.raises(KernelError) as caught:
            await one.madvise(BASE, BLOCK, "COLLAPSE")
        codes.append(caught.value.code)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collapse)
            await wait_all_tasks_blocked()
            held = await two.get_pages(FIRST + 2, 1)
            gate.set()
    assert codes == [errno.EAGAIN]
    two.put_pages(held)
    assert await one.load(BASE, BLOCK) == await two.load(BASE, BLOCK) == expected(written=5)
    machine.check()


async def test_memory_that_is_missing_for_what_is_in_swap_is_einval() -> None:
    """There is a huge page and nothing beside it, and nobody to be killed: SCAN_FAIL. It goes back, and the pages stay in swap."""
    machine = Machine(host_pages=2 * HUGE_PAGES)
    one, _ = await shmem(machine, pages=5)
    await one.load(BASE, 5 * PAGE)
    await one.madvise(BASE, 5 * PAGE, "PAGEOUT")
    whole = machine.memory.allocate_huge()
    taken = machine.memory.allocate(HUGE_PAGES - 1)
    assert whole is not None
    assert taken is not None
    machine.memory.put(whole)
    with pytest.raises(KernelError) as caught:
        await one.madvise(BASE, BLOCK, "COLLAPSE")
    assert caught.value.code == errno.EINVAL
    assert (used(machine), machine.memory.swap.used) == (HUGE_PAGES - 1, 5)
    machine.memory.put(taken)
    await one.madvise(BASE, BLOCK, "COLLAPSE")
    assert await one.load(BASE, BLOCK) == expected(written=5)
    machine.check()
