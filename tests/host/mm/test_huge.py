"""Huge pages: made by a fault, split by what changes a part, copied at a store, collapsed; hugetlb; and userfaultfd.

Oracle: mm/huge_memory.c, mm/hugetlb.c, mm/khugepaged.c, fs/userfaultfd.c; h36, h37 and h56 of the recordings show some of it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from hmmnet.errors import BusError, KernelError
from hmmnet.host.hub import Hub
from hmmnet.host.interfaces import Migration, Select
from hmmnet.host.migrate import collect
from hmmnet.host.mm import huge, pte
from hmmnet.host.mm.space import Space
from hmmnet.host.mm.vma import VM_HUGETLB
from hmmnet.pages import HMM_PFN_ORDER_SHIFT, HUGE_PAGES
from tests.host.fakes import FakeLink

from .files import BASE, PAGE, used
from .machine import Machine, page_bytes

BLOCK = HUGE_PAGES * PAGE
FIRST = BASE // PAGE


async def hugepage(machine: Machine, blocks: int = 2) -> Space:
    """A process with `blocks` aligned blocks that ask for huge pages."""
    space = machine.process()
    await space.mmap(blocks * BLOCK, "rw", BASE)
    await space.madvise(BASE, blocks * BLOCK, "HUGEPAGE")
    return space


def is_huge(space: Space, block: int = 0) -> bool:
    """Whether a block is mapped as one: by one run of frames (or the zero page), every entry marked."""
    entries = space.mm.table.read(FIRST + block * HUGE_PAGES, FIRST + (block + 1) * HUGE_PAGES)
    marks = entries & pte.HUGE != 0
    assert marks.all() or not marks.any()
    if marks.all() and not entries[0] & pte.SPECIAL:
        frames = pte.frames_of(entries)
        assert int(frames[0]) % HUGE_PAGES == 0
        assert (np.diff(frames.astype(np.int64)) == 1).all()
    return bool(marks.all())


async def test_a_store_makes_a_huge_page() -> None:
    """One fault, 512 pages; hmm_range_fault tells the order; a block that does not fit whole has small pages."""
    machine = Machine()
    space = machine.process()
    await space.mmap(BLOCK + 8 * PAGE, "rw", BASE)
    await space.madvise(BASE, BLOCK + 8 * PAGE, "HUGEPAGE")
    await space.store(BASE + 5, b"x")
    await space.store(BASE + BLOCK, b"y")
    assert is_huge(space)
    assert space.mm.rss == HUGE_PAGES + 1
    assert used(machine) >= HUGE_PAGES + 1
    async with space.mmap_lock.read():
        words = space.walk(FIRST, FIRST + HUGE_PAGES + 1, None, 0, 0, -1).words
    orders = (words >> np.uint64(HMM_PFN_ORDER_SHIFT) & np.uint64(31)).tolist()
    assert orders == [9] * HUGE_PAGES + [0]
    assert await space.load(BASE, 7) == b"\0\0\0\0\0x\0"
    machine.check()


async def test_a_load_maps_the_huge_zero_page_and_a_store_replaces_it() -> None:
    """No memory for a load; the first store makes the whole block a huge page."""
    machine = Machine()
    space = await hugepage(machine)
    assert await space.load(BASE + BLOCK - 1, 1) == b"\0"
    assert is_huge(space)
    assert used(machine) == 0
    await space.store(BASE + PAGE, b"x")
    assert is_huge(space)
    assert used(machine) >= HUGE_PAGES
    assert await space.load(BASE, 2 * PAGE) == bytes(PAGE) + b"x" + bytes(PAGE - 1)
    machine.check()


async def test_without_a_run_of_memory_pages_are_small() -> None:
    """The fallback of a transparent huge page; hugetlb has none."""
    machine = Machine(host_pages=2 * HUGE_PAGES - 1)  # the zero page lies in the first aligned run
    space = await hugepage(machine)
    await space.store(BASE, b"x")
    assert not is_huge(space)
    assert used(machine) == 1
    await space.mmap(BLOCK, "rw", 2 * BASE, VM_HUGETLB)
    with pytest.raises(KernelError, match="ENOMEM"):
        await space.store(2 * BASE, b"x")
    machine.check()


Change = Callable[[Space], Coroutine[Any, Any, object]]


@pytest.mark.parametrize(
    ("change", "stays"),
    [
        (lambda space: space.munmap(BASE + 3 * PAGE, PAGE), False),
        (lambda space: space.mprotect(BASE + 3 * PAGE, BLOCK, "r"), False),
        (lambda space: space.mlock(BASE, 4 * PAGE), False),
        (lambda space: space.madvise(BASE + PAGE, PAGE, "DONTNEED"), False),
        (lambda space: space.madvise(BASE, PAGE, "FREE"), False),
        (lambda space: space.madvise(BASE, PAGE, "DONTFORK"), False),
        (lambda space: space.make_exclusive(FIRST + 7, FIRST + 8, 64), False),
        (lambda space: space.mremap(BASE, BLOCK, BLOCK, 4 * BASE + PAGE), False),
        (lambda space: space.mprotect(BASE, BLOCK, "r"), True),
        (lambda space: space.mlock(BASE, BLOCK), True),
        (lambda space: space.munmap(BASE + BLOCK, PAGE), True),
        (lambda space: space.madvise(BASE, BLOCK, "COLD"), True),
    ],
)
async def test_what_changes_a_part_splits_the_block(change: Change, stays: bool) -> None:
    """Every byte that is left is as it was; mirrors of the whole block were told before it was split."""
    machine = Machine()
    space = await hugepage(machine, 1)
    await space.mmap(2 * BLOCK, "rw", BASE + BLOCK)
    for page in range(16):
        await space.store(BASE + page * PAGE, page_bytes(page + 1))
    link = FakeLink("gpu0", 64)
    assert isinstance(space.hub, Hub)
    space.hub.insert(0, 1 << 30, link, 1)
    await change(space)
    told = any(start <= FIRST and end >= FIRST + HUGE_PAGES for _, start, end, *_ in link.told)
    if space.mm.table.get(FIRST + 5):
        assert is_huge(space) == stays
        assert await space.load(BASE + 5 * PAGE, PAGE) == page_bytes(6)
    assert told or stays
    machine.check()


async def test_a_moved_block_stays_huge_where_it_is_aligned() -> None:
    """move_huge_pmd."""
    machine = Machine()
    space = await hugepage(machine, 1)
    await space.store(BASE + 9, b"x")
    await space.mremap(BASE, BLOCK, BLOCK, 2 * BASE)
    assert space.mm.table.get(2 * FIRST) & pte.HUGE
    assert await space.load(2 * BASE + 9, 1) == b"x"
    machine.check()


async def test_a_store_after_fork_copies_one_page() -> None:
    """do_huge_pmd_wp_page maps the block page by page where it stores, and copies that page; alone again, all is its own."""
    machine = Machine()
    parent = await hugepage(machine, 1)
    await parent.store(BASE, b"one")
    child = await machine.fork(parent)
    assert is_huge(child)
    before = used(machine)
    await child.store(BASE + PAGE, b"two")
    assert used(machine) == before + 1
    assert (is_huge(child), is_huge(parent)) == (False, True)
    assert await parent.load(BASE + PAGE, 3) == bytes(3)
    machine.check()
    await machine.exit(child)
    await parent.store(BASE + 7 * PAGE, b"three")
    assert is_huge(parent)
    assert bool((parent.mm.table.read(FIRST, FIRST + HUGE_PAGES) & pte.WRITE != 0).all())
    assert used(machine) == before
    machine.check()


async def test_a_huge_page_that_is_ones_own_again_is_written_in_place() -> None:
    """The child has gone: the whole block becomes writable, and the store reaches it, not the zero page of everybody."""
    machine = Machine()
    parent = await hugepage(machine)
    await parent.mmap(PAGE, "rw", BASE - PAGE)
    await parent.mmap(PAGE, "rw", BASE + 2 * BLOCK)
    await parent.store(BASE + 2 * BLOCK, b"a small page beside it")
    await parent.store(BASE + 6 * PAGE, b"x")
    await machine.exit(await machine.fork(parent))
    await parent.store(BASE + 3 * PAGE, b"z")
    assert is_huge(parent)
    assert (parent.mm.table.read(FIRST, FIRST + HUGE_PAGES) & pte.WRITE != 0).all()
    assert await parent.load(BASE - PAGE, PAGE) == bytes(PAGE)
    assert await parent.load(BASE + 3 * PAGE, 1) == b"z"
    machine.check()


async def test_a_pinned_huge_page_is_split_at_fork() -> None:
    """The child gets a copy of the pinned page, and shares the others."""
    machine = Machine()
    parent = await hugepage(machine, 1)
    await parent.store(BASE, b"one")
    frames = await parent.get_pages(FIRST, 1, pin=True, write=True)
    child = await machine.fork(parent)
    await parent.store(BASE, b"two")
    assert await child.load(BASE, 3) == b"one"
    assert (is_huge(parent), is_huge(child)) == (False, False)
    parent.put_pages(frames, pin=True)
    machine.check()


async def test_migrating_a_part_splits_the_folio_for_all() -> None:
    """Pages of zeros become the zero page, the rest are ordinary pages; not so where somebody holds one of them."""
    machine = Machine()
    space = await hugepage(machine, 2)
    await space.store(BASE, page_bytes(1))
    await space.store(BASE + BLOCK, page_bytes(2))
    (found,) = space.large(np.arange(FIRST, FIRST + 4, dtype=np.uint64))
    assert [(mm.number, len(pages)) for mm, pages in found.where()] == [(space.number, HUGE_PAGES)]
    assert found.split()
    assert not is_huge(space)
    assert space.mm.rss == HUGE_PAGES + 1
    assert await space.load(BASE, 2 * PAGE) == page_bytes(1) + bytes(PAGE)
    held = await space.get_pages(FIRST + HUGE_PAGES + 3, 1)
    (found,) = space.large(np.arange(FIRST + HUGE_PAGES, FIRST + HUGE_PAGES + 1, dtype=np.uint64))
    assert not found.split()
    assert is_huge(space, 1)
    async with space.mmap_lock.read():
        migration = space.collect(np.arange(FIRST + HUGE_PAGES, FIRST + HUGE_PAGES + 2, dtype=np.uint64), Select.SYSTEM, 64)
    assert migration.cpages == 0
    space.put_pages(held)
    machine.check()


@pytest.mark.parametrize("stay", [False, True])
async def test_a_folio_that_is_mapped_page_by_page_is_split_or_stays(*, stay: bool) -> None:
    """Today it is split, and its pages go; up to 6.18 they stay (PageTransCompound), and a page that is new there goes all the same."""
    machine = Machine()
    space = await hugepage(machine, 1)
    await space.store(BASE, page_bytes(1) * 8)
    await space.madvise(BASE + 2 * PAGE, PAGE, "DONTNEED")
    await space.store(BASE + 2 * PAGE, page_bytes(2))
    parts: list[Migration] = []
    select = Select.SYSTEM | (Select.PARTS_STAY if stay else 0)
    async with space.mmap_lock.read():
        await collect(parts, space, machine.spaces, FIRST, FIRST + 4, select, 64)
        (part,) = parts
        moving = (part.source & 2 != 0).tolist()
        space.migrate_pages(part)  # without targets nothing moves
        space.migrate_finalize(part)
    assert moving == ([False, False, True, False] if stay else [True] * 4)
    assert await space.load(BASE, 8 * PAGE) == page_bytes(1) * 2 + page_bytes(2) + page_bytes(1) * 5
    machine.check()


async def test_collapse() -> None:
    """Small pages, the zero page and holes become one huge page with the same bytes; held pages are EAGAIN, files EINVAL."""
    machine = Machine()
    space = machine.process()
    await space.mmap(BLOCK, "rw", BASE)
    await space.store(BASE + PAGE, page_bytes(3))
    await space.load(BASE + 2 * PAGE, 1)
    held = await space.get_pages(FIRST + 1, 1)
    with pytest.raises(KernelError) as refused:
        await space.madvise(BASE, BLOCK, "COLLAPSE")
    assert refused.value.code == errno.EAGAIN
    space.put_pages(held)
    await space.madvise(BASE + PAGE, BLOCK - PAGE, "COLLAPSE")  # no block lies in it whole: nothing to do
    assert not is_huge(space)
    await space.madvise(BASE, BLOCK, "COLLAPSE")
    assert is_huge(space)
    assert await space.load(BASE, 3 * PAGE) == bytes(PAGE) + page_bytes(3) + bytes(PAGE)
    await space.madvise(BASE, BLOCK, "COLLAPSE")
    machine.check()
    await space.mmap(BLOCK, "rw", 2 * BASE, shared=True)
    with pytest.raises(KernelError, match="EINVAL"):
        await space.madvise(2 * BASE, BLOCK, "COLLAPSE")
    await space.munmap(BASE, 3 * BLOCK)
    assert (used(machine), space.mm.rss) == (0, 0)


@pytest.mark.parametrize(("first", "count", "refused"), [(100, 100, True), (0, 100, False), (500, 24, False), (500, 200, False)])
async def test_collapse_counts_blocks_between_rounded_ends(*, first: int, count: int, refused: bool) -> None:
    """Inside one block and at neither edge of it: EINVAL, as the rounded ends have changed places. At an edge there is nothing to do."""
    space = Machine().process()
    await space.mmap(2 * BLOCK, "rw", BASE)
    await space.store(BASE + first * PAGE, page_bytes(1))
    code = 0
    try:
        await space.madvise(BASE + first * PAGE, count * PAGE, "COLLAPSE")
    except KernelError as error:
        code = error.code
    assert code == (errno.EINVAL if refused else 0)
    assert not is_huge(space)


@pytest.mark.parametrize("advice", ["FREE", "COLD", "PAGEOUT"])
@pytest.mark.parametrize("torn", [False, True])
async def test_advice_about_a_part_splits_the_folio(advice: str, *, torn: bool) -> None:
    """Its zeros are the zero page then; so it is when its entry is split already (`torn`), or some of it is gone."""
    machine = Machine()
    space = await hugepage(machine, 1)
    await space.store(BASE + 7 * PAGE, page_bytes(7))
    if torn:
        await space.madvise(BASE, 2 * PAGE, "DONTNEED")
        assert used(machine) > 1
    await space.madvise(BASE + 4 * PAGE, 8 * PAGE, advice)
    entries = space.mm.table.read(FIRST + 2, FIRST + HUGE_PAGES)
    zeros = np.ones(HUGE_PAGES - 2, np.bool_)
    zeros[5] = False
    assert (entries[zeros] & (pte.SPECIAL | pte.HUGE) == pte.SPECIAL).all()
    assert used(machine) == (0 if advice == "PAGEOUT" else 1)
    assert await space.load(BASE + 7 * PAGE, PAGE) == page_bytes(7)
    machine.check()


@pytest.mark.parametrize("advice", ["FREE", "COLD", "PAGEOUT"])
@pytest.mark.parametrize("why", ["a child maps it", "somebody holds a page", "it is the huge zero page"])
async def test_a_part_that_cannot_be_split_off_takes_no_part(advice: str, why: str) -> None:
    """The huge page stays as it is, at either edge of the range; what lies between is advised."""
    machine = Machine()
    space = await hugepage(machine, 3)
    for block in range(3):
        if why == "it is the huge zero page":
            await space.load(BASE + block * BLOCK, 1)
        else:
            await space.store(BASE + block * BLOCK, b"x")
    child = await space.fork(2, Hub()) if why == "a child maps it" else None
    held = await space.get_pages(FIRST + 5, 1) if why == "somebody holds a page" else None
    before = space.mm.table.read(FIRST, FIRST + HUGE_PAGES)
    await space.madvise(BASE + 4 * PAGE, 8 * PAGE, advice)
    await space.madvise(BASE + 500 * PAGE, BLOCK + 100 * PAGE, advice)
    assert (space.mm.table.read(FIRST, FIRST + HUGE_PAGES) == before).all()
    assert is_huge(space, 2) == (why != "somebody holds a page")
    if held is not None:
        space.put_pages(held)
    if child is not None:
        await machine.exit(child)
    machine.check()


async def test_hugetlb() -> None:
    """Whole pages of 2 MiB: made whole, copied whole, never split; what would split one is EINVAL."""
    machine = Machine()
    parent = machine.process()
    await parent.mmap_hugetlb(BLOCK, "rw", BASE)
    assert await parent.load(BASE, 1) == b"\0"
    await parent.store(BASE + PAGE, b"one")
    assert is_huge(parent)
    for change in (
        parent.munmap(BASE, PAGE),
        parent.mprotect(BASE + PAGE, PAGE, "r"),
        parent.madvise(BASE + PAGE, PAGE, "DONTNEED"),
        parent.mmap_hugetlb(BLOCK, "rw", BASE + PAGE),
    ):
        with pytest.raises(KernelError, match="EINVAL"):
            await change
    with pytest.raises(KernelError, match="ENOMEM"):
        await parent.mmap_hugetlb(1 << 40, "rw", None)
    child = await machine.fork(parent)
    await child.store(BASE + PAGE, b"two")
    assert is_huge(child)
    assert await parent.load(BASE + PAGE, 3) == b"one"
    assert await child.load(BASE, PAGE + 3) == bytes(PAGE) + b"two"
    assert not set(pte.frames_of(child.mm.table.read(FIRST, FIRST + 512))) & set(pte.frames_of(parent.mm.table.read(FIRST, FIRST + 512)))
    machine.check()
    await machine.exit(child)
    await machine.exit(parent)
    assert used(machine) == 0


async def test_blocks_with_a_page_table_stay_small_until_it_goes() -> None:
    """A block that was mapped page by page has a page table: no huge page after DONTNEED; a new mapping has none."""
    machine = Machine()
    space = await hugepage(machine, 1)
    await space.store(BASE, b"x")
    await space.madvise(BASE + PAGE, PAGE, "DONTNEED")
    await space.madvise(BASE, BLOCK, "DONTNEED")
    await space.store(BASE, b"y")
    assert not is_huge(space)
    await space.munmap(BASE, BLOCK)
    assert not space.mm.small_blocks
    await space.mmap(BLOCK, "rw", BASE)
    await space.madvise(BASE, BLOCK, "HUGEPAGE")
    await space.store(BASE, b"z")
    assert is_huge(space)
    assert huge.block_of(FIRST + 9) == FIRST
    machine.check()


async def test_userfaultfd_with_sigbus() -> None:
    """Missing pages are SIGBUS for the CPU and EFAULT for others, the rest are used; a moved mapping is free, a child too."""
    machine = Machine()
    space = machine.process()
    await space.mmap(8 * PAGE, "rw", BASE)
    await space.store(BASE, b"here")
    for wrong in ((BASE + 1, PAGE), (BASE, 0), (BASE, 5), (7 * BASE, PAGE)):
        with pytest.raises(KernelError, match="EINVAL"):
            await space.userfaultfd(*wrong)
    await space.userfaultfd(BASE, 4 * PAGE, sigbus=True)
    assert await space.load(BASE, 4) == b"here"
    await space.store(BASE, b"still")
    for touch in (space.load(BASE + PAGE, 1), space.store(BASE + PAGE, b"x"), space.load(BASE, 2 * PAGE)):
        with pytest.raises(BusError) as fatal:
            await touch
        assert fatal.value.address >> 12 == FIRST + 1
    async with space.mmap_lock.read():
        with pytest.raises(KernelError, match="EFAULT"):
            await space.fault_in(np.array([FIRST + 1], np.uint64), np.array([False]))
    assert await space.load(BASE + 4 * PAGE, 1) == b"\0"
    child = await machine.fork(space)
    assert await child.load(BASE + PAGE, 1) == b"\0"
    await space.mremap(BASE, 4 * PAGE, 4 * PAGE, 2 * BASE)
    assert await space.load(2 * BASE + PAGE, 1) == b"\0"
    machine.check()


def full(machine: Machine) -> None:
    """Use up the host's memory but for single pages."""
    while machine.memory.allocate_huge() is not None:
        pass
    while machine.memory.nodes[0].allocator.free_count > 8:
        assert machine.memory.allocate(1) is not None


async def test_without_huge_pages_a_store_to_the_zero_page_makes_one_small_page() -> None:
    """The huge zero page is split; COLLAPSE is ENOMEM and leaves the small pages; hugetlb cannot be copied."""
    machine = Machine(host_pages=4 * HUGE_PAGES)
    space = await hugepage(machine, 1)
    await space.load(BASE, 1)
    await space.mmap(BLOCK, "rw", 4 * BASE, VM_HUGETLB)
    await space.store(4 * BASE, b"mine")
    child = await machine.fork(space)
    full(machine)
    await space.store(BASE + 3 * PAGE, b"small")
    assert not is_huge(space)
    assert space.mm.rss == HUGE_PAGES + 1
    with pytest.raises(KernelError, match="ENOMEM"):
        await space.madvise(BASE, BLOCK, "COLLAPSE")
    assert await space.load(BASE + 3 * PAGE, 5) == b"small"
    with pytest.raises(KernelError, match="ENOMEM"):
        await child.store(4 * BASE, b"own")
    assert await child.load(4 * BASE, 4) == b"mine"
    assert await space.load(4 * BASE, 4) == b"mine"
    machine.check()


async def test_collapse_keeps_a_read_only_mapping_read_only() -> None:
    """And refuses an empty block, and pages of a coherent device."""
    machine = Machine(kind="coherent")
    space = machine.process()
    await space.mmap(BLOCK, "rw", BASE)
    with pytest.raises(KernelError, match="EINVAL"):
        await space.madvise(BASE, BLOCK, "COLLAPSE")
    await space.store(BASE, page_bytes(4))
    await machine.to_device(space, 64, np.arange(FIRST, FIRST + 1, dtype=np.uint64))
    with pytest.raises(KernelError, match="EINVAL"):
        await space.madvise(BASE, BLOCK, "COLLAPSE")
    await machine.to_system(space, 64, np.arange(FIRST, FIRST + 1, dtype=np.uint64))
    await space.mprotect(BASE, BLOCK, "r")
    await space.madvise(BASE, BLOCK, "COLLAPSE")
    assert is_huge(space)
    assert not bool((space.mm.table.read(FIRST, FIRST + HUGE_PAGES) & np.uint64(pte.WRITE) != 0).any())
    assert await space.load(BASE, PAGE) == page_bytes(4)
    machine.check()


async def test_zeros_in_locked_memory_stay_pages_when_a_folio_is_split() -> None:
    """VM_LOCKED: what is locked is not given back."""
    machine = Machine()
    space = await hugepage(machine, 1)
    await space.mlock(BASE, BLOCK)
    (found,) = space.large(np.arange(FIRST, FIRST + 1, dtype=np.uint64))
    found.split()
    assert space.mm.rss == HUGE_PAGES
    machine.check()
