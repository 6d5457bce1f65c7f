"""MADV_PAGEOUT: what goes, what stays, what an entry remembers, and how it comes back.

Oracle: mm/madvise.c (madvise_cold_or_pageout_pte_range), mm/memory.c (do_swap_page); h55 shows device memory.
"""

from __future__ import annotations

import numpy as np
import pytest

from hmmnet.errors import BusError, KernelError
from hmmnet.host.hub import Hub
from hmmnet.host.interfaces import Select
from hmmnet.host.mm import pte
from hmmnet.host.mm.space import Space
from tests.host.fakes import FakeLink

from .files import BASE, PAGE, filled, mapped, symbols, used, written
from .machine import Machine, page_bytes, span

FIRST = BASE // PAGE


async def test_pages_go_out_and_come_back() -> None:
    """Entries are special, memory is free, mirrors were told; a load has the bytes back, and the page may be stored to at once."""
    machine = Machine()
    space = await written(machine)
    link = FakeLink("gpu0", 64)
    assert isinstance(space.hub, Hub)
    space.hub.insert(0, 1 << 30, link, 1)
    await space.madvise(BASE, 3 * PAGE, "PAGEOUT")
    assert symbols(space, BASE, 4) == "SSSP"
    assert (used(machine), space.mm.rss, machine.memory.swap.used) == (1, 1, 3)
    assert [(start, end) for _, start, end, *_ in link.told] == [(FIRST, FIRST + 3)]
    async with space.mmap_lock.read():
        assert space.walk(FIRST, FIRST + 1, None, 0, 0, 64).words.tolist() == [0]
        assert space.collect(span(FIRST, 3), Select.SYSTEM, 64).cpages == 0
    machine.check()
    assert await space.load(BASE, PAGE) == page_bytes(1)
    assert space.mm.table.get(FIRST) & (pte.WRITE | pte.ANON_EXCLUSIVE) == pte.WRITE | pte.ANON_EXCLUSIVE
    await space.store(BASE + PAGE, b"new")
    assert await space.load(BASE + PAGE, 4) == b"new\x02"
    frames = await space.get_pages(FIRST + 2, 1)
    assert machine.bytes_of(int(frames[0])) == page_bytes(3)
    space.put_pages(frames)
    assert machine.memory.swap.used == 0
    machine.check()


async def test_what_others_have_stays() -> None:
    """The zero page, shared pages, held ones, those on a device, those of a file, locked mappings (EINVAL)."""
    machine = Machine()
    space = await written(machine)
    held = await space.get_pages(FIRST, 1)
    await machine.to_device(space, 64, span(FIRST + 1, 1))
    await space.madvise(BASE, 4 * PAGE, "PAGEOUT")
    assert symbols(space, BASE, 4) == "PSSS"
    assert machine.memory.swap.used == 2
    space.put_pages(held)
    assert await space.load(BASE, 4 * PAGE) == b"".join(page_bytes(i + 1) for i in range(4))
    child = await machine.fork(space)
    await space.madvise(BASE, 4 * PAGE, "PAGEOUT")
    assert symbols(space, BASE, 4) == "PPPP"
    await machine.exit(child)
    await space.mmap(PAGE, "rw", 2 * BASE)
    await space.load(2 * BASE, 1)
    await space.madvise(2 * BASE, PAGE, "PAGEOUT")
    assert symbols(space, 2 * BASE, 1) == "P"
    await mapped(space, await filled(machine, 1), 1, 3 * BASE)
    await space.load(3 * BASE, 1)
    await space.madvise(3 * BASE, PAGE, "PAGEOUT")
    assert await space.load(3 * BASE, 1) == b"\x01"
    await space.mlock(BASE, PAGE)
    with pytest.raises(KernelError, match="EINVAL"):
        await space.madvise(BASE, PAGE, "PAGEOUT")
    machine.check()


async def test_fork_shares_a_slot() -> None:
    """Both have the bytes, each gets a page of its own back; the slot goes with the second."""
    machine = Machine()
    parent = await written(machine, 2)
    await parent.madvise(BASE, 2 * PAGE, "PAGEOUT")
    child = await machine.fork(parent)
    assert machine.memory.swap.used == 2
    await child.store(BASE, b"mine")
    assert await parent.load(BASE, 4) == page_bytes(1)[:4]
    assert await child.load(BASE, 5) == b"mine\x01"
    assert machine.memory.swap.used == 1
    await machine.exit(child)
    assert await parent.load(BASE + PAGE, PAGE) == page_bytes(2)
    assert machine.memory.swap.used == 0
    machine.check()


async def test_dropping_swapped_pages_frees_their_slots() -> None:
    """munmap, DONTNEED and FREE; FREE makes them zero at once, unlike present ones. mremap takes them along."""
    machine = Machine()
    space = await written(machine)
    await space.madvise(BASE, 4 * PAGE, "PAGEOUT")
    await space.madvise(BASE, PAGE, "FREE")
    await space.madvise(BASE + PAGE, PAGE, "DONTNEED")
    await space.mremap(BASE + 2 * PAGE, PAGE, PAGE, 2 * BASE)
    await space.munmap(BASE + 3 * PAGE, PAGE)
    assert machine.memory.swap.used == 1
    assert await space.load(BASE, 2 * PAGE) == bytes(2 * PAGE)
    assert await space.load(2 * BASE, PAGE) == page_bytes(3)
    await space.madvise(2 * BASE, PAGE, "PAGEOUT")
    await machine.exit(space)
    assert (used(machine), machine.memory.swap.used) == (0, 0)


async def test_a_huge_page_goes_out_page_by_page() -> None:
    """All of it, or a part, which splits it: what is all zeros is the zero page then, and stays. COLLAPSE brings it back whole."""
    machine = Machine()
    space = machine.process()
    await space.mmap(512 * PAGE, "rw", BASE)
    await space.madvise(BASE, 512 * PAGE, "HUGEPAGE")
    await space.store(BASE + 7 * PAGE, page_bytes(7))
    await space.madvise(BASE + 4 * PAGE, 8 * PAGE, "PAGEOUT")
    assert symbols(space, BASE, 13) == "PPPPPPPSPPPPP"
    assert (space.mm.rss, machine.memory.swap.used) == (0, 1)
    machine.check()
    await space.madvise(BASE, 512 * PAGE, "COLLAPSE")
    assert bool((space.mm.table.read(FIRST, FIRST + 512) & np.uint64(pte.HUGE) != 0).all())
    assert await space.load(BASE + 7 * PAGE, PAGE) == page_bytes(7)
    await space.madvise(BASE, 512 * PAGE, "PAGEOUT")
    assert machine.memory.swap.used == 512
    assert await space.load(BASE + 6 * PAGE, 2 * PAGE) == bytes(PAGE) + page_bytes(7)
    machine.check()


async def test_without_room_pages_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full swap leaves pages in memory; a full memory leaves them in swap (ENOMEM)."""
    machine = Machine(host_pages=8)
    space = await written(machine)
    await space.madvise(BASE, 2 * PAGE, "PAGEOUT")
    rest = machine.memory.allocate(machine.memory.nodes[0].allocator.free_count)
    assert rest is not None
    with pytest.raises(KernelError, match="ENOMEM"):
        await space.load(BASE, 1)
    assert symbols(space, BASE, 4) == "SSPP"
    machine.memory.put(rest)
    monkeypatch.setattr(machine.memory.swap, "save", lambda *_: None)
    await space.madvise(BASE + 2 * PAGE, 2 * PAGE, "PAGEOUT")
    assert symbols(space, BASE, 4) == "SSPP"
    assert await space.load(BASE, 4 * PAGE) == b"".join(page_bytes(i + 1) for i in range(4))
    machine.check()


async def test_pages_of_files_go_to_swap_and_come_back() -> None:
    """Shared and private mappings alike: nothing is left in the page table, memory is free, who wants a page has it back alone."""
    machine = Machine()
    space = machine.process()
    file = await filled(machine, 6)
    await mapped(space, file, 6)
    await space.load(BASE, 6 * PAGE)
    link = FakeLink("gpu0", 64)
    assert isinstance(space.hub, Hub)
    space.hub.insert(0, 1 << 30, link, 1)
    await space.madvise(BASE, 4 * PAGE, "PAGEOUT")
    assert symbols(space, BASE, 6) == "----pp"
    assert (used(machine), space.mm.rss, machine.memory.swap.used) == (2, 2, 4)
    assert [(start, end) for _, start, end, *_ in link.told] == [(FIRST, FIRST + 4)]
    assert await space.load(BASE + PAGE, 1) == b"\2"
    assert symbols(space, BASE, 6) == "-p--pp", "what is not cached is not mapped around a fault"
    assert await file.read(0, 6 * PAGE) == b"".join(page_bytes(i + 1) for i in range(6))
    assert machine.memory.swap.used == 0
    machine.check()


async def test_swapped_pages_of_files_are_written_cut_and_forgotten() -> None:
    """A store to the file, a hole in it, a truncation inside a swapped page, and the end of the file."""
    machine = Machine()
    space = machine.process()
    file = await filled(machine, 4)
    await mapped(space, file, 4)
    await space.load(BASE, 4 * PAGE)
    await space.madvise(BASE, 4 * PAGE, "PAGEOUT")
    await file.write(8, b"written")
    assert (await file.read(0, 16))[7:16] == b"\1written\1"
    await file.punch(PAGE, PAGE)
    await file.truncate(2 * PAGE + 100)
    assert machine.memory.swap.used == 0
    assert await file.read(PAGE, 2 * PAGE) == bytes(PAGE) + b"\3" * 100
    await file.write(2 * PAGE, page_bytes(9))
    await space.load(BASE, 3 * PAGE)
    await space.madvise(BASE, 3 * PAGE, "PAGEOUT")
    assert machine.memory.swap.used == 3
    await file.close()
    await space.munmap(BASE, 4 * PAGE)
    del file
    assert (used(machine), machine.memory.swap.used) == (0, 0)
    machine.check()


async def test_pages_of_files_that_others_want_stay() -> None:
    """Mapped twice, held, inserted by a driver; and where swap has no room the page stays in the cache."""
    machine = Machine(host_pages=16)
    space = machine.process()
    file = await filled(machine, 3)
    await mapped(space, file, 3)
    await mapped(space, file, 1, 2 * BASE)
    await space.load(BASE, 3 * PAGE)
    await space.load(2 * BASE, 1)
    frames = await space.get_pages(FIRST + 1, 1)
    await space.madvise(BASE, 3 * PAGE, "PAGEOUT")
    assert symbols(space, BASE, 3) == "pp-"
    space.put_pages(frames)
    driver = await space.mmap_inserted(PAGE, "rw", 3 * BASE, shared=True)
    await space.madvise(driver, PAGE, "PAGEOUT")
    assert symbols(space, driver, 1) == "p"
    taken = machine.memory.allocate(1)
    assert taken is not None
    while machine.memory.swap.save(machine.memory, taken) is not None:
        pass
    await space.madvise(BASE + PAGE, PAGE, "PAGEOUT")
    assert symbols(space, BASE + PAGE, 1) == "-"
    assert await space.load(BASE + PAGE, 1) == b"\2"
    machine.check()


async def test_a_swapped_page_of_a_file_is_not_missing() -> None:
    """userfaultfd asks the page cache: what was swapped out is there, a hole is not."""
    machine = Machine()
    space = machine.process()
    file = await filled(machine, 1)
    await file.truncate(2 * PAGE)
    await mapped(space, file, 2)
    await space.load(BASE, 1)
    await space.madvise(BASE, PAGE, "PAGEOUT")
    await space.userfaultfd(BASE, 2 * PAGE, sigbus=True)
    assert await space.load(BASE, 1) == b"\1"
    with pytest.raises(BusError):
        await space.load(BASE + PAGE, 1)


async def family(machine: Machine, pages: int = 2, children: int = 1) -> list[Space]:
    """A process whose pages are in swap, and children with entries that lead to the same slots."""
    parent = await written(machine, pages)
    await parent.madvise(BASE, pages * PAGE, "PAGEOUT")
    return [parent, *[await machine.fork(parent) for _ in range(children)]]


def frame_at(space: Space, page: int = FIRST) -> int:
    return space.mm.table.get(page) >> pte.FRAME_SHIFT


async def test_a_page_that_several_have_in_swap_is_read_once_for_all() -> None:
    """do_swap_page and the swap cache: the second to come maps the frame that the first has read; a store copies, for the storer alone."""
    machine = Machine()
    parent, one, two = await family(machine, children=2)
    assert await one.load(BASE, PAGE) == page_bytes(1)
    assert (used(machine), machine.memory.swap.used) == (1, 2)
    assert await parent.load(BASE, PAGE) == page_bytes(1)
    assert frame_at(parent) == frame_at(one)
    assert [space.pagemap(BASE, 1) for space in (parent, one, two)] == [b"P", b"P", b"S"]
    await parent.store(BASE, b"mine")
    assert (await one.load(BASE, 4), await two.load(BASE, 4), await parent.load(BASE, 5)) == (b"\1" * 4, b"\1" * 4, b"mine\1")
    assert frame_at(one) == frame_at(two) != frame_at(parent)
    assert (used(machine), machine.memory.swap.used) == (2, 1), "the last entry took the slot, and the cache's reference, along"
    machine.check()
    await machine.exit(two)
    before = frame_at(one)
    await one.store(BASE, b"own")
    assert frame_at(one) == before, "nobody else has it: it is not copied"
    await one.load(BASE, 2 * PAGE)
    await machine.exit(parent)
    assert await one.load(BASE + PAGE, PAGE) == page_bytes(2)
    machine.check()
    await machine.exit(one)
    assert (used(machine), machine.memory.swap.used) == (0, 0)


async def test_what_was_not_ones_own_is_not_when_it_comes_back() -> None:
    """The child that shared it has exited: a load has it back read-only, a store at once or later has it, alone, without a copy."""
    machine = Machine()
    space = await written(machine)
    child = await machine.fork(space)
    await machine.exit(child)
    own = pte.WRITE | pte.ANON_EXCLUSIVE
    assert space.mm.table.get(FIRST) & own == 0
    await space.madvise(BASE, 3 * PAGE, "PAGEOUT")
    assert symbols(space, BASE, 4) == "SSSP"
    await space.load(BASE, 2 * PAGE)
    assert [space.mm.table.get(FIRST + page) & own for page in range(2)] == [0, 0]
    assert machine.memory.swap.used == 1
    before = frame_at(space)
    await space.store(BASE, b"new")
    assert (frame_at(space), space.mm.table.get(FIRST) & own) == (before, own)
    await space.store(BASE + 2 * PAGE, b"new")
    assert space.mm.table.get(FIRST + 2) & own == own
    assert (used(machine), machine.memory.swap.used) == (4, 0)
    assert await space.load(BASE, 3 * PAGE) == b"new" + page_bytes(1)[3:] + page_bytes(2) + b"new" + page_bytes(3)[3:]
    machine.check()


async def test_a_page_in_the_swap_cache_does_not_migrate_until_its_slot_is_free() -> None:
    """migrate_vma_pages: folio_free_swap fails while another entry leads to the slot; afterwards the page goes, for both that map it."""
    machine = Machine()
    parent, child = await family(machine, 1)
    await child.load(BASE, 1)
    assert (await machine.to_device(child, 64, span(FIRST, 1)) & 2).tolist() == [0]
    assert symbols(child, BASE, 1) == "P"
    await parent.load(BASE, 1)
    assert (await machine.to_device(child, 64, span(FIRST, 1)) & 2).tolist() == [2]
    assert symbols(child, BASE, 1) == symbols(parent, BASE, 1) == "S"
    assert machine.memory.swap.used == 0
    assert await parent.load(BASE, PAGE) == page_bytes(1)
    machine.check()


async def test_a_page_of_the_swap_cache_goes_out_to_the_slot_that_it_has() -> None:
    """PAGEOUT by the one who maps it: no new slot, its frame is free, and both read the same bytes later."""
    machine = Machine()
    parent, child = await family(machine)
    await child.load(BASE, 2 * PAGE)
    await child.store(BASE + PAGE, b"new")
    assert (used(machine), machine.memory.swap.used) == (3, 2)
    await child.madvise(BASE, 2 * PAGE, "PAGEOUT")
    assert symbols(child, BASE, 2) == symbols(parent, BASE, 2) == "SS"
    assert (used(machine), machine.memory.swap.used) == (1, 3), "what nobody maps is left, in the cache, for the parent"
    assert await child.load(BASE, 2 * PAGE) == page_bytes(1) + b"new" + page_bytes(2)[3:]
    assert await parent.load(BASE, 2 * PAGE) == page_bytes(1) + page_bytes(2)
    assert machine.memory.swap.used == 0
    machine.check()


async def test_pages_that_are_only_in_the_swap_cache_are_given_up_for_memory() -> None:
    """Copied by whoever mapped them, wanted by somebody who has not come yet: they are read again later, and memory is not used up."""
    machine = Machine(host_pages=12)  # 11 for processes
    parent, child = await family(machine, 4)
    await child.store(BASE, b"".join(page_bytes(i + 11) for i in range(4)))
    assert used(machine) == 8
    await child.mmap(6 * PAGE, "rw", 2 * BASE)
    await child.store(2 * BASE, bytes([7]) * 6 * PAGE)
    assert used(machine) == 10
    await child.store(2 * BASE + 5 * PAGE, b"x")
    await parent.mmap(2 * PAGE, "rw", 2 * BASE)
    await parent.store(2 * BASE, b"y")
    with pytest.raises(KernelError, match="ENOMEM"):
        await parent.load(BASE, 4 * PAGE)
    await child.munmap(2 * BASE, 6 * PAGE)
    assert await parent.load(BASE, 4 * PAGE) == b"".join(page_bytes(i + 1) for i in range(4))
    assert await child.load(BASE + PAGE, 1) == bytes([12])
    assert machine.memory.swap.used == 0
    machine.check()


async def test_a_pin_of_a_page_in_the_swap_cache_has_its_own() -> None:
    """FAULT_FLAG_UNSHARE: what a pin sees is what its process writes, so it is no page that others will map."""
    machine = Machine()
    parent, child = await family(machine, 1)
    pinned = await child.get_pages(FIRST, 1, pin=True)
    await child.store(BASE, b"seen")
    assert machine.bytes_of(int(pinned[0]))[:4] == b"seen"
    assert await parent.load(BASE, 4) == b"\1" * 4
    child.put_pages(pinned, pin=True)
    machine.check()
