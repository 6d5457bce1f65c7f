"""Files in memory: holes, fault-around, shared and private mappings, truncation, punching, and who is told.

Oracle: mm/filemap.c, mm/shmem.c, mm/truncate.c; the recordings show the rest (h38 to h41, and the profile *shared*).
"""

from __future__ import annotations

import errno

import numpy as np
import pytest
import trio
import trio.testing

from hmmnet.errors import BusError, KernelError
from hmmnet.host.files import MemFd
from hmmnet.host.hub import Hub
from hmmnet.host.mm import pte
from hmmnet.host.mm.gup import BATCH_PAGES
from tests.host.fakes import FakeLink

from .files import BASE, PAGE, filled, mapped, memfd, symbols, used
from .machine import Machine, page_bytes, span


async def test_reading_a_hole_leaves_it_a_hole() -> None:
    """pread of what was never written is zero and costs nothing; at the end of the file it is short."""
    machine = Machine()
    file = memfd(machine, 4)
    await file.write(PAGE + 7, b"abc")
    assert used(machine) == 1
    assert await file.read(PAGE, 12) == bytes(7) + b"abc" + bytes(2)
    assert await file.read(3 * PAGE, 5 * PAGE) == bytes(PAGE)
    assert await file.read(9 * PAGE, 1) == b""
    assert used(machine) == 1
    await file.write(6 * PAGE, b"x")
    assert file.size == 6 * PAGE + 1


async def test_wrong_calls_have_their_errno() -> None:
    """Sizes and offsets that make no sense; a closed file; an offset inside a page."""
    machine = Machine()
    file = memfd(machine, 1)
    space = machine.process()
    with pytest.raises(KernelError) as held:
        memfd(machine, -1)
    assert held.value.code == errno.EINVAL
    with pytest.raises(KernelError) as held:
        await file.truncate(1 << 60)
    assert held.value.code == errno.EFBIG
    for call in (file.read(-1, 1), file.write(-1, b"x"), file.punch(0, 0), file.punch(-1, 5), file.truncate(-1)):
        with pytest.raises(KernelError) as held:
            await call
        assert held.value.code == errno.EINVAL
    with pytest.raises(KernelError) as held:
        await space.mmap(PAGE, file=file.file("mmap"), offset=12)
    assert held.value.code == errno.EINVAL
    await file.close()
    await file.close()
    with pytest.raises(KernelError) as held:
        await file.read(0, 1)
    assert held.value.code == errno.EBADF


async def test_all_who_share_a_file_see_one_page() -> None:
    """Two processes, one of them by another offset, and pread: the same bytes, one frame."""
    machine = Machine()
    file = await filled(machine, 4)
    one, two = machine.process(), machine.process()
    await mapped(one, file, 4)
    await mapped(two, file, 2, first=2)
    await one.store(BASE + 2 * PAGE + 5, b"shared")
    assert await two.load(BASE + 5, 6) == b"shared"
    await two.store(BASE + PAGE, b"!")
    assert await file.read(3 * PAGE, 2) == b"!\x04"
    assert used(machine) == 4
    machine.check()
    await machine.exit(one)
    await machine.exit(two)
    assert used(machine) == 4


async def test_a_private_store_is_a_copy() -> None:
    """The file keeps its bytes; the copy is anonymous and the process's own; what was not stored to follows the file."""
    machine = Machine()
    file = await filled(machine, 3)
    space = machine.process()
    await mapped(space, file, 3, shared=False)
    await space.store(BASE, b"mine")  # never mapped: do_cow_fault
    assert await space.load(BASE + PAGE, 1) == b"\x02"
    await space.store(BASE + PAGE, b"too")  # mapped read-only: do_wp_page
    await file.write(2 * PAGE, b"new")
    assert await space.load(BASE, 6) == b"mine\x01\x01"
    assert await space.load(BASE + PAGE, 4) == b"too\x02"
    assert await space.load(BASE + 2 * PAGE, 4) == b"new\x03"
    assert await file.read(0, 2 * PAGE) == page_bytes(1) + page_bytes(2)
    assert symbols(space, BASE, 3) == "PPp"
    machine.check()


async def test_a_load_maps_what_is_cached_around_it() -> None:
    """The aligned block of 16 pages; holes only where they are touched; a VMA that begins inside a block has 16 from its start."""
    machine = Machine()
    file = await filled(machine, 40)
    await file.punch(5 * PAGE, 2 * PAGE)
    space = machine.process()
    await mapped(space, file, 40)
    await space.load(BASE + 20 * PAGE, 1)
    assert symbols(space, BASE, 40) == "-" * 16 + "p" * 16 + "-" * 8
    await space.load(BASE + 6 * PAGE, 1)
    assert symbols(space, BASE, 40) == "p" * 5 + "-" + "p" * 26 + "-" * 8
    inside = 2 * BASE + 3 * PAGE
    await mapped(space, file, 37, inside, first=3)
    await space.load(inside, 1)
    assert symbols(space, inside, 37) == "pp-" + "p" * 13 + "-" * 21
    await space.store(inside + 30 * PAGE, b"x")
    assert symbols(space, inside, 37) == "pp-" + "p" * 13 + "-" * 14 + "p" + "-" * 6
    machine.check()


@pytest.mark.parametrize("seed", range(60))
async def test_a_long_load_maps_as_single_loads_do(seed: int) -> None:
    """One access to many pages and one access each end with the same page table, whatever is a hole and wherever the VMA begins."""
    rng = np.random.default_rng(seed)
    stored = np.flatnonzero(rng.random(80) < rng.random()).tolist()
    address = BASE + int(rng.integers(0, 600)) * PAGE
    skip, first, count = int(rng.integers(0, 12)), int(rng.integers(0, 50)), int(rng.integers(1, 50))
    end = min(60, first + count)
    tables = []
    for whole in (False, True):
        machine = Machine()
        file = memfd(machine, 80)
        for page in stored:
            await file.write(page * PAGE, page_bytes(page + 1))
        space = machine.process()
        await mapped(space, file, 60, address, first=skip)
        if whole:
            await space.load(address + first * PAGE, (end - first) * PAGE)
        else:
            for page in range(first, end):
                await space.load(address + page * PAGE, 1)
        tables.append(symbols(space, address, 60))
        machine.check()
    assert tables[0] == tables[1]


async def test_a_long_term_pin_breaks_a_private_mapping_only() -> None:
    """gup_must_unshare: read-only, long-term, of a file's page in a private mapping becomes a copy; short or shared does not."""
    machine = Machine()
    file = await filled(machine, 1)
    space = machine.process()
    await mapped(space, file, 1, shared=False)
    await mapped(space, file, 1, 2 * BASE)
    for address, longterm, letter in ((BASE, False, "p"), (2 * BASE, True, "p"), (BASE, True, "P")):
        space.put_pages(await space.get_pages(address // PAGE, 1, pin=True, longterm=longterm), pin=True)
        assert symbols(space, address, 1) == letter
    machine.check()


async def test_pages_of_files_do_not_migrate_their_copies_do() -> None:
    """Whatever is tried: one page or several, shared or private. Entries stay as they were."""
    machine = Machine()
    file = await filled(machine, 4)
    space = machine.process()
    await mapped(space, file, 2)
    await mapped(space, file, 4, 2 * BASE, shared=False)
    await space.store(BASE, b"x")
    await space.store(2 * BASE + PAGE, b"y")
    await space.load(2 * BASE, 1)
    entries = space.mm.table.read(BASE // PAGE, BASE // PAGE + 2).tolist()
    await machine.to_device(space, 64, span(BASE // PAGE, 1))
    await machine.to_device(space, 64, span(BASE // PAGE, 2))
    assert space.mm.table.read(BASE // PAGE, BASE // PAGE + 2).tolist() == entries
    await machine.to_device(space, 64, span(2 * BASE // PAGE, 4))
    assert symbols(space, 2 * BASE, 4) == "pSpp"
    machine.check()


async def test_fork_shares_what_is_shared() -> None:
    """The child of a shared mapping faults it in by itself and sees stores both ways; of a private one it has the copies."""
    machine = Machine()
    file = await filled(machine, 2)
    parent = machine.process()
    anonymous = await parent.mmap(2 * PAGE, "rw", 3 * BASE, shared=True)
    await mapped(parent, file, 2, shared=False)
    await parent.store(anonymous, b"before")
    await parent.store(BASE, b"copy")
    await parent.load(BASE + PAGE, 1)
    child = await machine.fork(parent)
    assert symbols(child, anonymous, 2) == "--"
    assert symbols(child, BASE, 2) == "Pp"
    await child.store(anonymous + PAGE, b"after")
    await child.store(BASE, b"own!")
    assert await parent.load(anonymous + PAGE, 5) == b"after"
    assert await parent.load(BASE, 4) == b"copy"
    machine.check()
    await machine.exit(parent)
    assert await child.load(anonymous, 6) == b"before"
    await file.punch(0, 2 * PAGE)
    assert await child.load(BASE + PAGE, 1) == b"\0"
    machine.check()


async def test_a_file_without_owners_gives_its_frames_back() -> None:
    """The last of handle and mappings: closed, unmapped, exited, in any order; at that moment, whatever Python still refers to."""
    machine = Machine()
    referred = []
    for order in ("close first", "unmap first", "exit"):
        file = await filled(machine, 8)
        referred.append(file.file("test"))
        space = machine.process()
        await mapped(space, file, 8)
        await space.load(BASE, 8 * PAGE)
        if order == "close first":
            await file.close()
            assert await space.load(BASE + 7 * PAGE, 1) == b"\x08"
            await space.munmap(BASE, 8 * PAGE)
        elif order == "unmap first":
            await space.munmap(BASE, 8 * PAGE)
            assert used(machine) == 8
            await file.close()
        else:
            await file.close()
            await machine.exit(space)
            assert used(machine) == 0, order


async def test_mprotect_gives_a_shared_mapping_its_right_back() -> None:
    """Entries of a shared mapping become writable with the VMA; those of a private one wait for the store that copies."""
    machine = Machine()
    file = await filled(machine, 1)
    space = machine.process()
    await mapped(space, file, 1)
    await mapped(space, file, 1, 2 * BASE, shared=False)
    for address, writable in ((BASE, True), (2 * BASE, False)):
        await space.load(address, 1)
        await space.mprotect(address, PAGE, "r")
        assert not space.mm.table.get(address // PAGE) & pte.WRITE
        await space.mprotect(address, PAGE, "rw")
        assert bool(space.mm.table.get(address // PAGE) & pte.WRITE) is writable
        await space.store(address, b"w")
    assert await file.read(0, 1) == b"w"
    machine.check()


async def test_exclusive_access_is_for_anonymous_memory() -> None:
    """A shared page is made, and not given; a private file's page is copied, and given."""
    machine = Machine()
    file = await filled(machine, 1)
    space = machine.process()
    shared = await space.mmap(PAGE, "rw", 2 * BASE, shared=True)
    await mapped(space, file, 1, shared=False)
    with pytest.raises(KernelError, match="EOPNOTSUPP"):
        await space.make_exclusive(shared // PAGE, shared // PAGE + 1, 64)
    assert not (await space.make_exclusive_folios(shared // PAGE, shared // PAGE + 1, 64)).any()
    assert symbols(space, shared, 1) == "p"
    assert await space.make_exclusive(BASE // PAGE, BASE // PAGE + 1, 64) == 1
    assert symbols(space, BASE, 1) == "S"


async def test_no_memory_for_a_hole() -> None:
    """ENOMEM, and what was there stays."""
    machine = Machine(host_pages=8)
    file = await filled(machine, 4)
    space = machine.process()
    await mapped(space, file, 4)
    big = await space.mmap(16 * PAGE, "rw", 2 * BASE, shared=True)
    with pytest.raises(KernelError) as held:
        await space.store(big, bytes(16 * PAGE))
    assert held.value.code == errno.ENOMEM
    assert await space.load(BASE, 4 * PAGE) == b"".join(page_bytes(i + 1) for i in range(4))


async def test_pages_that_a_driver_inserts() -> None:
    """All there at once, shared with a forked child, never migrated; what is dropped is SIGBUS, and the frames go with the mapping."""
    machine = Machine()
    space = machine.process()
    await space.mmap_inserted(2 * PAGE, "rw", BASE, shared=True)
    assert symbols(space, BASE, 2) == "pp"
    await space.store(BASE, b"device")
    child = await machine.fork(space)
    assert symbols(child, BASE, 2) == "pp"
    await child.store(BASE + PAGE, b"child")
    assert await space.load(BASE + PAGE, 5) == b"child"
    machine.check()
    with pytest.raises(KernelError, match="EINVAL"):
        await machine.to_device(space, 64, span(BASE // PAGE, 1))
    with pytest.raises(KernelError, match="EOPNOTSUPP"):
        await space.make_exclusive(BASE // PAGE, BASE // PAGE + 1, 64)
    await space.madvise(BASE, PAGE, "DONTNEED")
    with pytest.raises(BusError):
        await space.load(BASE, 1)
    assert await child.load(BASE, 6) == b"device"
    private = await space.mmap_inserted(PAGE, "rw", 2 * BASE, shared=False)
    await space.store(private, b"copy")
    assert symbols(space, private, 1) == "P"
    machine.check()
    await machine.exit(space)
    await machine.exit(child)
    assert used(machine) == 0


async def test_a_store_to_a_shared_page_is_dirty() -> None:
    """A store that maps the page marks it as one to a mapped page does, soft-dirty too; a load does not."""
    machine = Machine()
    file = await filled(machine, 40)
    space = machine.process()
    await mapped(space, file, 40)
    await space.store(BASE, b"x")
    await space.load(BASE + 32 * PAGE, 1)
    marks = pte.YOUNG | pte.WRITE | pte.DIRTY | pte.SOFT_DIRTY
    assert space.mm.table.get(BASE >> 12) & marks == marks
    assert space.mm.table.get((BASE >> 12) + 32) & marks == pte.YOUNG | pte.WRITE


async def test_a_child_may_store_to_inserted_pages_that_are_shared() -> None:
    """copy_present_pte takes the right to write from private mappings only: nobody faults on this one again, a device neither."""
    machine = Machine()
    space = machine.process()
    await space.mmap_inserted(2 * PAGE, "rw", BASE, shared=True)
    child = await machine.fork(space)
    assert all(of.mm.table.get(BASE >> 12) & pte.WRITE for of in (space, child))
    await space.store(BASE, b"one")
    await child.store(BASE + PAGE, b"two")
    assert await child.load(BASE, 3) == b"one"
    assert await space.load(BASE + PAGE, 3) == b"two"
    machine.check()


async def test_lengths_beyond_all_memory_are_refused() -> None:
    """A file may be longer than what its reader can hold; a mapping longer than what can be had of it: ENOMEM, nothing used."""
    machine = Machine()
    file = MemFd(machine.memory, 1 << 46, 0)
    with pytest.raises(KernelError, match="ENOMEM"):
        await file.read(0, 1 << 46)
    space = machine.process()
    await space.mmap(1 << 45, "rw", BASE)
    for refused in (
        space.madvise(BASE, 1 << 45, "POPULATE_READ"),
        space.madvise(BASE, 1 << 45, "POPULATE_WRITE"),
        space.get_pages(BASE >> 12, 1 << 33),
    ):
        with pytest.raises(KernelError, match="ENOMEM"):
            await refused
    with pytest.raises(KernelError, match="EAGAIN"):
        await space.mlock(BASE, 1 << 45)
    assert used(machine) == 0
    assert space.mm.rss == 0


async def test_populating_takes_more_than_one_batch() -> None:
    """Reading more than the host has is possible: it is the zero page everywhere."""
    machine = Machine()
    space = machine.process()
    await space.mmap(BATCH_PAGES + 8 << 12, "rw", BASE)
    await space.madvise(BASE, BATCH_PAGES + 8 << 12, "POPULATE_READ")
    assert set(symbols(space, BASE, BATCH_PAGES + 8)) == {"P"}
    assert used(machine) == 0


async def test_a_file_mapped_twice_in_one_process() -> None:
    """Its frames are there twice: both mappings count, and both let go at exit."""
    machine = Machine()
    file = await filled(machine, 4)
    space = machine.process()
    await mapped(space, file, 4)
    await mapped(space, file, 4, 2 * BASE)
    await space.load(BASE, 4 * PAGE)
    await space.load(2 * BASE, 4 * PAGE)
    machine.check()
    await file.close()
    await machine.exit(space)
    assert used(machine) == 0


async def test_a_call_under_way_keeps_a_file() -> None:
    """Closed and unmapped while a hole waits for a mirror: the hole is made, then the frames go; a write that waits behind it as well."""
    machine = Machine()
    file = await filled(machine, 4)
    space = machine.process()
    await mapped(space, file, 4)
    await space.load(BASE, 4 * PAGE)
    link = FakeLink("gpu0", 64)
    assert isinstance(space.hub, Hub)
    space.hub.insert(BASE // PAGE, BASE // PAGE + 1, link, 1)
    gate = link.hold()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(file.punch, 0, PAGE)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(file.write, 9 * PAGE, b"late")
        await trio.testing.wait_all_tasks_blocked()
        await file.close()
        await space.munmap(BASE + PAGE, 3 * PAGE)
        assert used(machine) == 4
        gate.set()
    assert used(machine) == 4
    await machine.exit(space)
    assert used(machine) == 0


async def test_a_file_forgets_who_has_unmapped_it() -> None:
    """With the last mapping of a process, whether it is unmapped or exits; not before."""
    machine = Machine()
    file = await filled(machine, 4)
    one, two = machine.process(), machine.process()
    await mapped(one, file, 4)
    await mapped(one, file, 4, 2 * BASE)
    await mapped(two, file, 4)
    await one.munmap(BASE, 4 * PAGE)
    await one.munmap(2 * BASE, 2 * PAGE)
    assert set(file.file("test").mappers) == {one.number, two.number}
    await one.munmap(2 * BASE + 2 * PAGE, 2 * PAGE)
    assert set(file.file("test").mappers) == {two.number}
    await machine.exit(two)
    assert not file.file("test").mappers


async def test_inserted_pages_that_do_not_fit_leave_nothing() -> None:
    """ENOMEM before anything is allocated for them, however many are asked for; the range is free again."""
    machine = Machine(host_pages=64)
    space = machine.process()
    for length in (100 * PAGE, 1 << 46):
        with pytest.raises(KernelError, match="ENOMEM"):
            await space.mmap_inserted(length, "rw", BASE, shared=True)
        assert len(space.mm.vmas) == 0
    assert used(machine) == 0


async def test_a_cancelled_fork_leaves_no_child() -> None:
    """Cancelled while mirrors are told: pages, families and files know the parent alone, and its exit frees everything."""
    machine = Machine()
    file = await filled(machine, 2)
    parent = machine.process()
    await parent.mmap(2 * PAGE, "rw", BASE)
    await parent.store(BASE, bytes(2 * PAGE))
    await mapped(parent, file, 2, 2 * BASE)
    await parent.mmap(2 * PAGE, "rw", 3 * BASE)
    await parent.store(3 * BASE, bytes(2 * PAGE))
    link = FakeLink("gpu0", 64)
    assert isinstance(parent.hub, Hub)
    parent.hub.insert(3 * BASE // PAGE, 3 * BASE // PAGE + 8, link, 1)
    gate = link.hold()
    with trio.move_on_after(0.01) as scope:
        await parent.fork(2, Hub())
    assert scope.cancelled_caught
    gate.set()
    assert machine.memory.families[parent.mm.family] == [parent.mm]
    assert set(file.file("test").mappers) == {parent.number}
    machine.check()
    await machine.exit(parent)
    await file.close()
    assert used(machine) == 0
