"""The address space as programs, mirrors and migrations use it together: waiting, losing, announcing."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import BusError, KernelError, SegmentationFault, SignalError
from hmmnet.host.hub import Hub
from hmmnet.host.interfaces import Event, Select
from hmmnet.host.mm import pte
from hmmnet.host.mm.access import CHECKPOINT_EVERY
from hmmnet.host.mm.frames import PhysicalMemory
from hmmnet.host.mm.space import Space
from hmmnet.host.mm.vma import VM_HUGETLB, VM_MIXEDMAP
from hmmnet.host.mm.zones import LOCKED
from hmmnet.pages import HMM_PFN_REQ_FAULT, PAGE_SIZE, PAGES_MAX
from tests.host.fakes import FakeLink

from .files import BASE, written
from .machine import Machine, page_bytes, span, words

PAGE = PAGE_SIZE


async def filled(space: Space, pages: int) -> int:
    """A region whose page i holds the byte i + 1 throughout; its address."""
    address = await space.mmap(pages * PAGE)
    await space.store(address, b"".join(page_bytes(i + 1) for i in range(pages)))
    return address


# --- system calls -----------------------------------------------------------------------------------------------------------------


async def test_mmap_errors() -> None:
    """EINVAL for nothing, for an unaligned fixed address and unknown rights; ENOMEM beyond the address space."""
    space = Machine().process()
    for length, address, code in [(0, None, errno.EINVAL), (PAGE, 17, errno.EINVAL), (1 << 60, None, errno.ENOMEM)]:
        with pytest.raises(KernelError) as held:
            await space.mmap(length, "rw", address)
        assert held.value.code == code
    with pytest.raises(KernelError, match="ENOMEM"):
        await space.mmap(2 * PAGE, "rw", (PAGES_MAX - 1) * PAGE)
    with pytest.raises(KernelError, match="ENOMEM"):
        await space.mmap(PAGES_MAX * PAGE)
    with pytest.raises(KernelError, match="EINVAL"):
        await space.mmap(PAGE, "read")


async def test_fixed_mmap_replaces_what_was_there() -> None:
    """MAP_FIXED unmaps first: the old data are gone."""
    machine = Machine()
    space = machine.process()
    address = await filled(space, 3)
    assert await space.mmap(PAGE, "rw", address + PAGE) == address + PAGE
    assert await space.load(address, 3 * PAGE) == page_bytes(1) + bytes(PAGE) + page_bytes(3)
    machine.check()


async def test_unaligned_and_empty_calls() -> None:
    """munmap, mprotect and madvise want page addresses; munmap wants a length."""
    space = Machine().process()
    calls = [space.munmap(1, PAGE), space.munmap(0, 0), space.munmap(0, 1 << 50)]
    for call in [*calls, space.mprotect(1, PAGE, "r"), space.madvise(1, PAGE, "DONTNEED")]:
        with pytest.raises(KernelError, match="EINVAL"):
            await call
    with pytest.raises(KernelError, match="EINVAL"):
        await space.madvise(0, PAGE, "SHOUT")


async def test_events_that_mirrors_hear() -> None:
    """Every change of a page table is announced with its event, VMA by VMA, before it happens."""
    machine = Machine()
    hub, link = Hub(), FakeLink("gpu0", 64)
    space = Space(1, machine.memory, hub, machine.home)
    hub.insert(0, PAGES_MAX, link, 1)
    address = await filled(space, 4)
    first = address // PAGE
    await space.mprotect(address, 2 * PAGE, "r")
    await space.mprotect(address, 2 * PAGE, "r")
    await space.madvise(address, 4 * PAGE, "DONTNEED")
    await space.load(address + 2 * PAGE, 1)
    await space.store(address + 2 * PAGE, b"x")
    await space.munmap(address, 4 * PAGE)
    await space.exit()
    assert [(start - first, end - first, event) for _, start, end, event, _, _ in link.told[:-1]] == [
        (0, 2, Event.PROTECTION_VMA),
        (0, 2, Event.CLEAR),
        (2, 4, Event.CLEAR),
        (2, 3, Event.CLEAR),
        (0, 2, Event.UNMAP),
        (2, 4, Event.UNMAP),
    ]
    assert link.told[-1][1:4] == (0, PAGES_MAX, Event.RELEASE)


async def test_the_table_changes_only_after_mirrors_have_let_go() -> None:
    """munmap waits for a slow device; until then the page is there, and later readers of the lock wait behind it."""
    machine = Machine()
    hub, link = Hub(), FakeLink("gpu0", 64)
    space = Space(1, machine.memory, hub, machine.home)
    address = await filled(space, 1)
    hub.insert(0, PAGES_MAX, link, 1)
    gate = link.hold()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(space.munmap, address, PAGE)
        await wait_all_tasks_blocked()
        assert space.mmap_lock.written
        assert space.try_load(address, 1) == b"\x01"
        assert space.try_load(address - PAGE, 1) is None
        gate.set()
    with pytest.raises(SegmentationFault):
        await space.load(address, 1)


# --- loads and stores -------------------------------------------------------------------------------------------------------------


async def test_signals_name_the_place() -> None:
    """No mapping, no right to write, PROT_NONE: address, page and process in the text."""
    space = Machine().process()
    address = await space.mmap(PAGE, "r")
    with pytest.raises(SegmentationFault, match=f"page 0x{address // PAGE:x} of process 1 .*write"):
        await space.store(address + 5, b"x")
    with pytest.raises(SegmentationFault, match="not mapped"):
        await space.load(address + PAGE, 1)
    await space.mprotect(address, PAGE, "none")
    with pytest.raises(SegmentationFault, match="PROT_NONE"):
        await space.load(address, 1)


async def test_signals_name_the_byte() -> None:
    """Inside the first page the byte where the access began, behind it the first byte of the page; of any length."""
    space = Machine().process()
    address = await space.mmap(2 * PAGE)
    await space.munmap(address + PAGE, PAGE)
    for where, length, byte in ((PAGE + 5, 1, PAGE + 5), (PAGE + 5, 3 * PAGE, PAGE + 5), (5, PAGE, PAGE), (0, 1 << 46, PAGE)):
        with pytest.raises(SegmentationFault) as held:
            await space.load(address + where, length)
        assert held.value.address == address + byte
        assert str(held.value).startswith(f"SIGSEGV at 0x{address + byte:x}: page 0x{address // PAGE + 1:x} ")
    with pytest.raises(SegmentationFault) as held:
        await space.store(address + PAGE + 9, b"xy")
    assert held.value.address == address + PAGE + 9


async def test_a_store_that_memory_is_too_small_for_stores_what_fits() -> None:
    """Page by page until there is none left."""
    machine = Machine(host_pages=101)
    space = machine.process()
    address = await space.mmap(150 * PAGE)
    with pytest.raises(KernelError, match="ENOMEM"):
        await space.store(address, b"z" * 150 * PAGE)
    assert await space.load(address, 100 * PAGE) == b"z" * 100 * PAGE
    assert space.pagemap(address, 150).count(b"-") == 50


async def test_a_store_that_fails_has_stored_what_lies_before() -> None:
    """As instructions do, one after the other."""
    space = Machine().process()
    address = await space.mmap(2 * PAGE)
    with pytest.raises(SegmentationFault):
        await space.store(address + PAGE, b"y" * 2 * PAGE)
    assert await space.load(address + PAGE, PAGE) == b"y" * PAGE


async def test_write_only_memory_can_be_read_by_the_cpu() -> None:
    """x86 knows no write-only page (h67)."""
    space = Machine().process()
    address = await space.mmap(PAGE, "w")
    await space.store(address, b"abc")
    assert await space.load(address, 3) == b"abc"


@pytest.mark.parametrize("data", [b"12345678", bytearray(b"12345678"), memoryview(b"12345678"), np.frombuffer(b"12345678", "<u4")])
async def test_what_can_be_stored(data: bytes) -> None:
    """Anything with bytes, across a page border or not."""
    space = Machine().process()
    address = await space.mmap(2 * PAGE)
    for place in (address, address + PAGE - 3):
        await space.store(place, data)
        assert await space.load(place, 8) == b"12345678"
    await space.store(address, b"")
    assert await space.load(address, 0) == b""


async def test_big_ranges_go_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a batch, unaligned, with pages on a device and zero pages in between."""
    monkeypatch.setattr("hmmnet.host.mm.access.BATCH_PAGES", 8)
    machine = Machine()
    space = machine.process()
    address = await space.mmap(40 * PAGE)
    data = os.urandom(37 * PAGE + 11)
    await space.store(address + 5, data)
    await machine.to_device(space, 64, span(address // PAGE + 3, 20))
    await machine.to_device(space, 65, span(address // PAGE + 30, 5))
    assert await space.load(address + 5, len(data)) == data
    assert len(machine.homed) == 25
    machine.check()


async def test_out_of_memory_says_so() -> None:
    """ENOMEM, with the books in order."""
    machine = Machine(host_pages=8)
    space = machine.process()
    address = await space.mmap(64 * PAGE)
    with pytest.raises(KernelError, match="ENOMEM"):
        await space.store(address, bytes(64 * PAGE))
    await space.store(address, bytes(7 * PAGE))
    with pytest.raises(KernelError, match="ENOMEM"):
        await space.store(address + 7 * PAGE, b"x")
    machine.check()


async def test_sparse_memory_costs_what_is_touched() -> None:
    """16 GiB mapped, ten pages touched: ten frames."""
    machine = Machine()
    space = machine.process()
    address = await space.mmap(16 << 30)
    for i in range(10):
        await space.store(address + i * (1 << 30) + 12345, b"x")
    assert machine.memory.nodes[0].allocator.used_count == 10
    assert space.mm.rss == 10
    assert space.mm.table.leaf_count <= 17
    await space.munmap(address, 16 << 30)
    machine.check()


async def test_a_polling_program_lets_others_run() -> None:
    """Loads that need nobody still give way now and then."""
    space = Machine().process()
    address = await space.mmap(PAGE)
    ran = trio.Event()

    async def other() -> None:
        ran.set()
        await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(2 * CHECKPOINT_EVERY):
            await space.load(address, 1)
        assert ran.is_set()


# --- migration --------------------------------------------------------------------------------------------------------------------


async def test_cpu_access_waits_for_a_migration() -> None:
    """Load, store and fault_in of a page under migration sleep until it is over, and find the page where it went."""
    machine = Machine()
    space = machine.process()
    address = await filled(space, 3)
    page = address // PAGE
    done: list[str] = []

    async def load() -> None:
        assert await space.load(address, 3 * PAGE) == page_bytes(1) + page_bytes(2) + page_bytes(3)
        done.append("load")

    async def fault() -> None:
        async with space.mmap_lock.read():
            await space.fault_in(span(page, 1), np.array([False]))
        done.append("fault")

    async with trio.open_nursery() as nursery, space.mmap_lock.read():
        migration = space.collect(span(page, 2), Select.SYSTEM, 64)
        nursery.start_soon(load)
        nursery.start_soon(fault)
        await wait_all_tasks_blocked()
        assert done == []
        assert space.pagemap(address, 3)[:2] == b"SS"
        assert space.residency(address, 3).pages.tolist() == [-2, -2, 0]
        space.migrate_restore(migration)
        space.migrate_finalize(migration)
    assert sorted(done) == ["fault", "load"]
    machine.check()


async def test_dontneed_does_not_wait_for_a_migration() -> None:
    """A store after it makes a fresh page while the old one is still on its way; both ends stay sound."""
    machine = Machine()
    space = machine.process()
    address = await filled(space, 2)
    async with space.mmap_lock.read():
        migration = space.collect(span(address // PAGE, 2), Select.SYSTEM, 64)
        got = machine.devices[64].allocator.allocate(2)
        assert got is not None
        migration.target[:] = got.frames << np.uint64(6) | np.uint64(1)
        space.migrate_pages(migration)
    await space.madvise(address, PAGE, "DONTNEED")
    await space.store(address, b"new")
    space.migrate_finalize(migration)
    assert space.pagemap(address, 2) == bytes([0x50 | 0x80, 0x53])
    assert await space.load(address, 4) == b"new\0"
    machine.check()


async def test_dead_device_takes_its_pages_with_it() -> None:
    """SIGBUS names page, device and cause; fault_in says EFAULT; other pages are fine; unmapping is quiet."""
    machine = Machine()
    space = machine.process()
    address = await filled(space, 3)
    await machine.to_device(space, 64, span(address // PAGE + 1, 1))
    machine.memory.zone_lost(64, "killed by signal 9")
    assert await space.load(address, PAGE) == page_bytes(1)
    with pytest.raises(BusError, match=f'page 0x{address // PAGE + 1:x} .* device "gpu0", which was lost: killed by signal 9') as held:
        await space.load(address, 3 * PAGE)
    assert held.value.address == address + PAGE
    async with space.mmap_lock.read():
        with pytest.raises(KernelError, match="EFAULT"):
            await space.fault_in(span(address // PAGE, 3), np.zeros(3, np.bool_))
    await space.munmap(address, 3 * PAGE)
    machine.check()


async def test_home_that_fails_is_tried_again() -> None:
    """A fault that loses the race for the page lock looks again instead of failing."""
    machine = Machine()
    lost = [0]

    async def home(space: Space, pages: object) -> None:
        lost[0] += 1
        await trio.lowlevel.checkpoint()
        if lost[0] == 3:
            await machine.home(space, pages)  # type: ignore[arg-type]

    space = Space(1, machine.memory, Hub(), home)
    machine.spaces[1] = space
    address = await filled(space, 1)
    await machine.to_device(space, 64, span(address // PAGE, 1))
    assert await space.load(address, 1) == b"\x01"
    assert lost == [3]


async def test_fault_in_takes_scattered_pages() -> None:
    """Only the pages that were asked for, each with its own kind of access, over several VMAs."""
    machine = Machine()
    space = machine.process()
    address = await space.mmap(8 * PAGE)
    await space.mprotect(address + 4 * PAGE, 4 * PAGE, "r")
    first = address // PAGE
    await space.store(address + PAGE, b"x")
    await machine.to_device(space, 64, span(first + 1, 1))
    async with space.mmap_lock.read():
        await space.fault_in(words(first, first + 1, first + 3, first + 6), np.array([True, True, False, False]))
        assert np.flatnonzero(space.mm.table.read(first, first + 8)).tolist() == [0, 1, 3, 6]
        assert machine.homed == [first + 1]
        with pytest.raises(KernelError, match="EPERM"):
            await space.fault_in(words(first + 7), np.array([True]))
        with pytest.raises(KernelError, match="EFAULT"):
            await space.fault_in(words(first + 8), np.array([False]))
        await space.fault_in(words(), np.zeros(0, np.bool_))
        assert space.walk(first, first + 4, None, HMM_PFN_REQ_FAULT, 0, 64).read.tolist() == [False, False, True, False]


@pytest.mark.parametrize(("marker", "why"), [(pte.MARKER_POISON, "is poisoned$"), (pte.MARKER_GUARD, "is a guard page$")])
async def test_a_marker_is_a_signal_and_says_which_it_is(marker: int, why: str) -> None:
    """A poisoned page is SIGBUS, a guard page SIGSEGV (handle_pte_marker), each by its name."""
    space = Machine().process()
    address = await space.mmap(PAGE)
    space.mm.table.set(address // PAGE, pte.entry(pte.MARKER, marker))
    with pytest.raises(SignalError, match=why) as raised:
        await space.load(address, 1)
    assert isinstance(raised.value, SegmentationFault if marker == pte.MARKER_GUARD else BusError)


async def test_the_fault_page_must_be_a_locked_one_of_a_device() -> None:
    """migrate_vma_setup: EINVAL for memory of the host, for coherent memory, and for a page that is not locked; the error names it."""
    machine = Machine(kinds=("private", "coherent"))
    space, first = await written(machine, 3), BASE // PAGE
    await machine.to_device(space, 64, span(first, 1))
    await machine.to_device(space, 65, span(first + 1, 1))
    frames = [space.mm.table.get(first + page) >> pte.FRAME_SHIFT for page in range(3)]
    for locked in (False, True):
        for frame in frames:
            zone = machine.memory.zone(frame)
            zone.flags[frame - zone.base] |= LOCKED if locked else 0
            if locked and frame == frames[0]:
                space.check_migratable(first, first + 1, frame)
                continue
            with pytest.raises(KernelError, match=f"EINVAL.*frame 0x{frame:x}"):
                space.check_migratable(first, first + 1, frame)


async def test_what_may_migrate() -> None:
    """EINVAL: empty, no VMA, beyond the VMA, no right to read, special mappings (dmirror.md 8)."""
    space = Machine().process()
    address = await space.mmap(2 * PAGE)
    first = address // PAGE
    space.check_migratable(first, first + 2)
    special = await space.mmap(PAGE, "rw", None, VM_MIXEDMAP) // PAGE
    huge = await space.mmap(PAGE, "rw", None, VM_HUGETLB) // PAGE
    none = await space.mmap(PAGE, "w") // PAGE
    for start, end in [(first, first), (first, first + 3), (17, 18), (special, special + 1), (huge, huge + 1), (none, none + 1)]:
        with pytest.raises(KernelError, match="EINVAL"):
            space.check_migratable(start, end)


async def test_views_without_a_device() -> None:
    """vma_at, vmas, vma_end, zone_at."""
    machine = Machine()
    space = machine.process()
    address = await filled(space, 2)
    first = address // PAGE
    assert space.vma_end(first) == first + 2
    assert space.vma_end(17) == 17
    assert space.vma_at(17) is None
    assert [vma.start for vma in space.vmas(first, first + 9)] == [first]
    await machine.to_device(space, 65, span(first, 1))
    assert [space.zone_at(first), space.zone_at(first + 1)] == [65, 0]
    await space.exit()
    machine.check()
    assert machine.memory.families == {}


def test_lock_discipline_is_asserted() -> None:
    """What needs the mmap lock says so."""
    space = Space(1, PhysicalMemory(), Hub(), Machine().home)
    with pytest.raises(AssertionError, match="mmap lock"):
        space.walk(0, 1, None, 0, 0, 64)
    with pytest.raises(AssertionError, match="mmap lock"):
        space.collect(span(0, 1), Select.SYSTEM, 64)
