"""Memory cgroups: who is charged for a page, where the charge goes, and what a limit refuses.

Oracle: mm/memcontrol.c; the memcg row of the probes (written pages are charged once, migration changes nothing, never-touched pages that
migrate are charged, unmapping gives all back).
"""

from __future__ import annotations

import errno

import numpy as np
import pytest

from hmmnet.errors import HmmnetError, KernelError
from hmmnet.host.interfaces import Select
from hmmnet.host.mm.memcg import GROUPS_MAX, MemoryCgroup, MemoryCgroups
from hmmnet.host.mm.space import Space
from hmmnet.pages import HUGE_PAGES, MIGRATE_PFN_SHIFT, MIGRATE_PFN_VALID

from .files import BASE, PAGE, filled, mapped, symbols
from .machine import Machine, page_bytes, span

FIRST = BASE // PAGE


def grouped(machine: Machine, limit_pages: int | None = None, name: str = "job") -> tuple[Space, MemoryCgroup]:
    space = machine.process()
    group = space.mm.cgroup = machine.memory.cgroups.create(name, None if limit_pages is None else limit_pages * PAGE)
    return space, group


@pytest.mark.parametrize("kind", ["private", "coherent"])
@pytest.mark.parametrize("count", [1, 64])
async def test_a_charge_follows_its_page(kind: str, count: int) -> None:
    """Written, migrated, brought home one by one and all at once, evicted, unmapped: one charge a page, until it is free."""
    machine = Machine(kind=kind)
    space, group = grouped(machine)
    await space.mmap(count * PAGE, "rw", BASE)
    for page in range(count):
        await space.store(BASE + page * PAGE, page_bytes(page))
    assert group.usage_pages == count
    for way_home in ("one by one", "at once", "evicted"):
        moved = await machine.to_device(space, 64, span(FIRST, count))
        assert len(moved) == count
        assert group.usage_pages == count
        machine.check()
        if way_home == "one by one" and kind == "private":
            for page in range(count):
                assert await space.load(BASE + page * PAGE, PAGE) == page_bytes(page)
        elif way_home == "evicted":
            assert await machine.evict(64) == count
        else:
            assert await machine.to_system(space, 64, span(FIRST, count)) == count
        assert group.usage_pages == count
        machine.check()
    await machine.to_device(space, 64, span(FIRST, count))
    await space.munmap(BASE, count * PAGE)
    assert (group.usage_pages, group.peak_pages) == (0, count)
    machine.check()


@pytest.mark.parametrize("count", [1, 64])
async def test_a_migration_out_of_nothing_is_charged_and_may_be_refused(count: int) -> None:
    """Never-touched pages: as many go as there is room for."""
    machine = Machine()
    space, group = grouped(machine, 40)
    await space.mmap(count * PAGE, "rw", BASE)
    await machine.to_device(space, 64, span(FIRST, count))
    assert group.usage_pages == min(count, 40)
    assert group.refused == (count > 40)
    assert len(space.mm.table.occupied(FIRST, FIRST + count)) == min(count, 40)
    machine.check()
    await machine.exit(space)
    assert group.usage_pages == 0
    machine.check()


async def test_a_migration_that_is_given_up_charges_nothing() -> None:
    """The device died after the pages had been made there."""
    machine = Machine()
    space, group = grouped(machine)
    await space.mmap(8 * PAGE, "rw", BASE)
    async with space.mmap_lock.read():
        migration = space.collect(span(FIRST, 8), Select.SYSTEM, 64)
        got = machine.devices[64].allocator.allocate(8)
        assert got is not None
        migration.target[:] = got.frames << np.uint64(MIGRATE_PFN_SHIFT) | np.uint64(MIGRATE_PFN_VALID)
        space.migrate_pages(migration)
        assert group.usage_pages == 8
        space.migrate_restore(migration)
        machine.devices[64].allocator.free(got.frames)
        migration.target[:] = 0
        space.migrate_finalize(migration)
    assert group.usage_pages == 0
    machine.check()


async def test_a_limit_is_enomem_that_names_the_group() -> None:
    """Page by page, in one store, for a file, and for what comes back from swap; what was there stays, and freed pages count again."""
    machine = Machine()
    space, group = grouped(machine, 4)
    await space.mmap(8 * PAGE, "rw", BASE)
    for page in range(4):
        await space.store(BASE + page * PAGE, b"x")
    for store in (space.store(BASE + 4 * PAGE, b"y"), space.store(BASE + 4 * PAGE, bytes(3 * PAGE))):
        with pytest.raises(KernelError, match=r'ENOMEM.*memory cgroup "job" has 4 of the 4'):
            await store
    assert await space.load(BASE + 4 * PAGE, 1) == b"\0"  # the zero page is nobody's
    file = await filled(machine, 0)
    await file.truncate(2 * PAGE)
    await space.mmap(2 * PAGE, "rw", 2 * BASE, file=file.file("mmap"), shared=True)
    with pytest.raises(KernelError, match='a file wants 1 pages and memory cgroup "job"'):
        await space.store(2 * BASE, b"z")
    await space.madvise(BASE, 2 * PAGE, "PAGEOUT")
    assert group.usage_pages == 2
    await space.store(2 * BASE, b"z")
    await space.store(2 * BASE + PAGE, b"z")
    with pytest.raises(KernelError, match='memory cgroup "job" has 4'):
        await space.load(BASE, 1)
    await space.madvise(BASE + 2 * PAGE, 2 * PAGE, "DONTNEED")
    assert await space.load(BASE, 1) == b"x"
    assert group.usage_pages == 3
    machine.check()


async def test_who_had_it_first_pays() -> None:
    """A child of another group reads for nothing and pays for its copies; a shared file's page is its first writer's; exit gives back."""
    machine = Machine()
    parent, first = grouped(machine)
    await parent.mmap(4 * PAGE, "rw", BASE)
    await parent.store(BASE, bytes(4 * PAGE))
    child = await machine.fork(parent)
    assert child.mm.cgroup is first
    second = child.mm.cgroup = machine.memory.cgroups.create("child", None)
    await child.load(BASE, 4 * PAGE)
    await child.store(BASE, b"c")
    assert (first.usage_pages, second.usage_pages) == (4, 1)
    await machine.exit(parent)
    assert (first.usage_pages, second.usage_pages) == (3, 1)  # the child still has three of them
    await machine.exit(child)
    assert (first.usage_pages, second.usage_pages) == (0, 0)
    machine.check()


async def test_a_huge_page_beyond_the_limit_is_small() -> None:
    """The limit is between: a huge page does not fit, its first page does. Where it fits it is 512 charges, also after it was torn."""
    machine = Machine(device_pages=2 * HUGE_PAGES)
    for limit, charged in ((HUGE_PAGES - 1, 1), (HUGE_PAGES, HUGE_PAGES)):
        space, group = grouped(machine, limit, f"limit {limit}")
        await space.mmap(HUGE_PAGES * PAGE, "rw", BASE)
        await space.madvise(BASE, HUGE_PAGES * PAGE, "HUGEPAGE")
        await space.store(BASE, b"h")
        assert group.usage_pages == charged
        await space.munmap(BASE, PAGE)
        assert group.usage_pages == charged - 1
        machine.check()
        await machine.exit(space)
    machine.check()


async def test_file_pages_are_given_back_with_the_file() -> None:
    """Read through a mapping, charged to who did; closed and unmapped, nobody's."""
    machine = Machine()
    space, group = grouped(machine)
    file = await filled(machine, 0)
    await file.truncate(3 * PAGE)
    await mapped(space, file, 3)
    await space.store(BASE, bytes(3 * PAGE))
    assert group.usage_pages == 3
    await file.punch(0, PAGE)
    assert group.usage_pages == 2
    await space.munmap(BASE, 3 * PAGE)
    assert group.usage_pages == 2
    await file.close()
    del file
    assert group.usage_pages == 0
    machine.check()


def test_groups_are_named_once_and_counted() -> None:
    """Names, limits and the number of groups are checked."""
    groups = MemoryCgroups()
    groups.create("a", 3 * PAGE + 1)
    assert groups.as_json() == {"a": {"current_bytes": 0, "max_bytes": 3 * PAGE, "peak_bytes": 0, "refused": 0}}
    for name, limit, text in (("a", None, "already"), ("", None, "needs a name"), ("b" * 65, None, "needs a name"), ("b", -1, "negative")):
        with pytest.raises(HmmnetError, match=text):
            groups.create(name, limit)
    with pytest.raises(HmmnetError, match='called "b"; there are: a'):
        groups.named("b")
    for number in range(GROUPS_MAX - 1):
        groups.create(f"group {number}", None)
    with pytest.raises(HmmnetError, match=f"may have {GROUPS_MAX}"):
        groups.create("one more", None)


async def test_a_page_comes_back_from_swap_to_the_group_that_had_it() -> None:
    """Whoever reads it (mem_cgroup_swapin_charge_folio): a child in another group, or in none."""
    machine = Machine()
    space, group = grouped(machine)
    await space.mmap(8 * PAGE, "rw", BASE)
    await space.store(BASE, page_bytes(1) * 4)
    child = await machine.fork(space)
    other = child.mm.cgroup = machine.memory.cgroups.create("other", 0)
    for one in (space, child):
        await one.madvise(BASE, 8 * PAGE, "PAGEOUT")
    assert group.usage_pages == 4  # the family shares them: nobody's alone, they stay
    await machine.exit(space)
    await child.madvise(BASE, 8 * PAGE, "PAGEOUT")
    assert (group.usage_pages, machine.memory.swap.used) == (0, 4)
    assert await child.load(BASE, 2 * PAGE) == page_bytes(1) * 2
    assert (group.usage_pages, other.usage_pages) == (2, 0)
    child.mm.cgroup = None
    assert await child.load(BASE, 4 * PAGE) == page_bytes(1) * 4
    assert (group.usage_pages, other.usage_pages) == (4, 0)
    machine.check()
    await machine.exit(child)
    assert group.usage_pages == 0
    machine.check()


async def test_a_page_that_was_charged_to_nobody_is_so_again() -> None:
    """Of the root group: the reader's group pays nothing for it."""
    machine = Machine()
    space = machine.process()
    await space.mmap(2 * PAGE, "rw", BASE)
    await space.store(BASE, page_bytes(1))
    await space.madvise(BASE, PAGE, "PAGEOUT")
    group = space.mm.cgroup = machine.memory.cgroups.create("late", 0)
    assert await space.load(BASE, PAGE) == page_bytes(1)
    assert group.usage_pages == 0
    machine.check()


async def test_a_page_of_a_file_comes_back_to_the_group_that_had_it() -> None:
    """Shared memory: written by one, read back by another (shmem_swapin_folio); holes beside it are the reader's."""
    machine = Machine()
    space, group = grouped(machine)
    reader, own = grouped(machine, name="reader")
    file = await filled(machine, 0)
    await file.truncate(4 * PAGE)
    for one in (space, reader):
        await mapped(one, file, 4)
    await space.store(BASE, page_bytes(1) * 2)
    await space.madvise(BASE, 4 * PAGE, "PAGEOUT")
    assert (group.usage_pages, own.usage_pages) == (0, 0)
    await reader.store(BASE + PAGE, page_bytes(3) * 2)
    assert (group.usage_pages, own.usage_pages) == (1, 1)
    assert await reader.load(BASE, 3 * PAGE) == page_bytes(1) + page_bytes(3) * 2
    assert (group.usage_pages, own.usage_pages) == (2, 1)
    machine.check()
    await file.close()


async def test_a_group_at_its_limit_keeps_its_pages_in_swap() -> None:
    """ENOMEM names the group that had them, not the reader's; what was charged for others, and holes, is given back."""
    machine = Machine()
    space, group = grouped(machine)
    file = await filled(machine, 0)
    await file.truncate(4 * PAGE)
    await mapped(space, file, 4)
    await space.store(BASE, page_bytes(1) * 2)
    await space.madvise(BASE, 4 * PAGE, "PAGEOUT")
    group.limit_pages = 1
    reader, own = grouped(machine, name="reader")
    await mapped(reader, file, 4)
    frames = await reader.get_pages(FIRST, 4, write=True)
    assert len(frames) == 1
    reader.put_pages(frames)
    with pytest.raises(KernelError, match='memory cgroup "job"') as refused:
        await reader.get_pages(FIRST + 1, 1, write=True)
    assert refused.value.code == errno.ENOMEM
    assert (group.usage_pages, own.usage_pages) == (1, 0)  # the first page is back: each has a fault of its own
    assert group.refused
    group.limit_pages = None
    assert await reader.load(BASE, 4 * PAGE) == page_bytes(1) * 2 + bytes(2 * PAGE)
    assert (group.usage_pages, own.usage_pages) == (2, 2)
    machine.check()
    await file.close()


async def test_pages_of_several_groups_come_back_together_or_not_at_all() -> None:
    """One fault reads pages of two groups; the second is at its limit, and the first is charged nothing."""
    machine = Machine()
    file = await filled(machine, 0)
    await file.truncate(4 * PAGE)
    one, first = grouped(machine)
    two, second = grouped(machine, name="second")
    for space, at in ((one, 0), (two, 2)):
        await mapped(space, file, 4)
        await space.store(BASE + at * PAGE, page_bytes(at + 1) * 2)
        await space.madvise(BASE, 4 * PAGE, "PAGEOUT")
    second.limit_pages = 1
    offsets = np.arange(4, dtype=np.uint64)
    with pytest.raises(KernelError, match='memory cgroup "second"'):
        file.file("pread").filled(offsets, 0, None)
    assert (first.usage_pages, second.usage_pages, machine.memory.swap.used) == (0, 0, 4)
    second.limit_pages = None
    file.file("pread").filled(offsets, 0, None)
    assert (first.usage_pages, second.usage_pages, machine.memory.swap.used) == (2, 2, 0)
    machine.check()
    await file.close()


async def test_pages_that_a_driver_inserts_are_charged_to_nobody() -> None:
    """alloc_page(GFP_KERNEL) without __GFP_ACCOUNT: they count in rss, and in no group."""
    machine = Machine()
    space, group = grouped(machine, 0)
    await space.mmap_inserted(3 * PAGE, "rw", BASE, shared=True)
    assert (group.usage_pages, space.mm.rss) == (0, 3)
    machine.check()


async def test_a_fault_of_many_pages_goes_as_far_as_the_limit() -> None:
    """mlock, MADV_POPULATE_WRITE, get_user_pages: page by page up to the first that the group may not have, as in the kernel."""
    machine = Machine()
    space, group = grouped(machine, 5)
    await space.mmap(16 * PAGE, "rw", BASE)
    with pytest.raises(KernelError, match='memory cgroup "job" has 5 of the 5'):
        await space.madvise(BASE, 16 * PAGE, "POPULATE_WRITE")
    assert (symbols(space, BASE, 6), group.usage_pages) == ("PPPPP-", 5)
    await space.madvise(BASE, 2 * PAGE, "DONTNEED")
    frames = await space.get_pages(FIRST, 16, write=True)
    assert (len(frames), group.usage_pages) == (5, 5)
    space.put_pages(frames)
    with pytest.raises(KernelError) as refused:
        await space.mlock(BASE, 16 * PAGE)
    assert refused.value.code == errno.EAGAIN
    assert group.usage_pages == 5
    machine.check()
