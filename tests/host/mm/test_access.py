"""Loads and stores that have to wait: for a lock, for a link, for a page that is taken away again; and faults without an access.

Oracle: mm/memory.c (handle_mm_fault and what retries it); the bytes.
"""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import BusError, HmmnetError, InjectedError, KernelError, SegmentationFault
from hmmnet.host.mm import access, fault, faulting, pte
from hmmnet.host.mm.mm import Mm
from hmmnet.host.mm.space import Space
from hmmnet.host.mm.vma import Vma
from hmmnet.pages import Words

from .files import BASE, PAGE, symbols, written
from .machine import Machine, page_bytes, span

FIRST = BASE // PAGE


class Tollgate:
    """What is in the way to a device's coherent memory: counts what crosses, and lets who crossed wait for `due` afterwards."""

    def __init__(self, machine: Machine) -> None:
        self.crossed: list[tuple[int, bool]] = []
        self.paid = 0
        self._memory = machine.memory
        self._memory.in_place[64].crossed = self.cross

    def cross(self, nbytes: int, stored: bool) -> None:
        self.crossed.append((nbytes, stored))
        self._memory.owed = self.due

    async def due(self) -> None:
        await trio.lowlevel.checkpoint()
        self.paid += 1


async def test_who_reaches_coherent_memory_in_place_waits_for_its_link() -> None:
    """Small and long loads and stores: each byte crosses once, and each access waits once, for the last of it."""
    machine = Machine(kind="coherent")
    space = await written(machine)
    await machine.to_device(space, 64, span(FIRST, 4))
    gate = Tollgate(machine)
    assert await space.load(BASE + 7, 3) == b"\1\1\1"
    assert (gate.crossed, gate.paid) == ([(3, False)], 1)
    assert await space.load(BASE, 4 * PAGE) == b"".join(page_bytes(i + 1) for i in range(4))
    assert (sum(nbytes for nbytes, _ in gate.crossed), gate.paid) == (3 + 4 * PAGE, 2)
    await space.store(BASE + 8, b"new")
    await space.store(BASE + PAGE, bytes(2 * PAGE))
    assert (sum(nbytes for nbytes, stored in gate.crossed if stored), gate.paid) == (3 + 2 * PAGE, 4)
    assert await space.load(BASE, 12) == b"\1" * 8 + b"new\1"
    machine.check()


async def test_a_long_access_waits_for_what_it_crossed_before_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches of two pages, the second pair of which is at the host: the link was paid for the first pair before that."""
    monkeypatch.setattr(access, "BATCH_PAGES", 2)
    machine = Machine(kind="coherent")
    space = await written(machine)
    await machine.to_device(space, 64, span(FIRST, 2))
    gate = Tollgate(machine)
    await space.store(BASE, bytes(4 * PAGE))
    assert (gate.crossed, gate.paid) == ([(2 * PAGE, True)], 1)
    assert await space.load(BASE, 4 * PAGE) == bytes(4 * PAGE)
    assert gate.paid == 2


async def test_a_scattered_copy_crosses_page_by_page() -> None:
    """More runs of frames than are copied one by one: the bytes are right, and all of them crossed."""
    machine = Machine(kind="coherent")
    pages = 2 * 70
    space = await written(machine, pages)
    for page in range(0, pages, 2):
        await machine.to_device(space, 64, span(FIRST + page, 1))
    gate = Tollgate(machine)
    want = b"".join(page_bytes(i + 1) for i in range(pages))
    assert await space.load(BASE + 5, pages * PAGE - 9) == want[5:-4]
    assert sum(nbytes for nbytes, _ in gate.crossed) == pages // 2 * PAGE - 5
    await space.store(BASE + PAGE - 3, b"z" * (pages * PAGE - 2 * PAGE))
    assert await space.load(BASE, pages * PAGE) == want[: PAGE - 3] + b"z" * (pages * PAGE - 2 * PAGE) + want[-(PAGE + 3) :]
    machine.check()


async def test_a_load_behind_a_writer_of_the_lock_finds_what_is_there_then() -> None:
    """Two loads of a device page wait for a munmap elsewhere: one brings the page home, the other finds it there; one fault."""
    machine = Machine()
    space = await written(machine)
    await machine.to_device(space, 64, span(FIRST, 4))
    got: list[bytes] = []

    async def load(page: int) -> None:
        got.append(await space.load(BASE + page * PAGE, 1))

    async with trio.open_nursery() as nursery:
        async with space.mmap_lock.write():
            nursery.start_soon(load, 1)
            nursery.start_soon(load, 1)
            await wait_all_tasks_blocked()
            assert got == []
            assert machine.homed == []
    assert got == [b"\2", b"\2"]
    assert machine.homed == [FIRST + 1]
    machine.check()


async def reused(machine: Machine) -> Space:
    """A process whose next pages come in frames that hold what somebody had there before."""
    space = machine.process()
    await space.mmap(8 * PAGE, "rw", 2 * BASE)
    await space.store(2 * BASE, 8 * page_bytes(0xEE))
    await space.munmap(2 * BASE, 8 * PAGE)
    await space.mmap(4 * PAGE, "rw", BASE)
    return space


async def test_a_store_that_has_to_wait_shows_nobody_what_was_in_its_frames() -> None:
    """It overwrites pages 0 and 1 whole, which are not cleared for that, and waits behind a writer of the lock for page 2, on a device."""
    machine = Machine()
    space = await reused(machine)
    await space.store(BASE + 2 * PAGE, 2 * page_bytes(3))
    await machine.to_device(space, 64, span(FIRST + 2, 1))

    async def change() -> None:
        async with space.mmap_lock.write():
            await trio.lowlevel.checkpoint()

    async def store() -> None:
        await space.store(BASE, 3 * page_bytes(9))

    async with trio.open_nursery() as nursery:
        async with space.mmap_lock.read():
            nursery.start_soon(change)
            await wait_all_tasks_blocked()
            nursery.start_soon(store)
            await wait_all_tasks_blocked()
            assert set(await space.load(BASE, 2 * PAGE)) <= {0, 9}
    assert await space.load(BASE, 4 * PAGE) == 3 * page_bytes(9) + page_bytes(3)
    machine.check()


async def test_a_store_that_fails_leaves_what_it_stored_before_and_nothing_else() -> None:
    """Page 2 has died with its device: SIGBUS; page 3 is behind it. What it does not reach is as it was."""
    machine = Machine()
    space = await reused(machine)
    await space.store(BASE + 2 * PAGE, page_bytes(3))
    await machine.to_device(space, 64, span(FIRST + 2, 1))
    machine.memory.zone_lost(64, "it was killed")
    with pytest.raises(BusError, match="killed"):
        await space.store(BASE, 4 * page_bytes(9))
    assert await space.load(BASE, 2 * PAGE) == 2 * page_bytes(9)
    assert await space.load(BASE + 3 * PAGE, PAGE) == bytes(PAGE)


@pytest.mark.parametrize("injected", [False, True])
async def test_a_store_that_finds_no_memory_in_a_second_mapping_has_stored_to_the_first(
    monkeypatch: pytest.MonkeyPatch, injected: bool
) -> None:
    """Pages 0 and 1 lie in one mapping, 2 and 3 in another, for which there is no frame: ENOMEM, or what a fault plan says."""
    machine = Machine()
    space = await reused(machine)
    await space.madvise(BASE + 2 * PAGE, 2 * PAGE, "NOHUGEPAGE")
    assert len(space.mm.vmas.overlapping(FIRST, FIRST + 4)) == 2
    touch, kind = fault.touch, InjectedError if injected else KernelError

    def no_room(mm: Mm, vma: Vma, pages: Words, *rest: Any) -> fault.Touched:
        if int(pages[0]) >= FIRST + 2:
            raise kind(errno.ENOMEM, "page fault", "there is none")
        return touch(mm, vma, pages, *rest)

    monkeypatch.setattr(fault, "touch", no_room)
    monkeypatch.setattr(fault, "touch_one", lambda *_: False)
    with pytest.raises(kind):
        await space.store(BASE, 4 * page_bytes(9))
    monkeypatch.undo()
    assert await space.load(BASE, 4 * PAGE) == 2 * page_bytes(9) + bytes(2 * PAGE)
    machine.check()


async def test_touch_faults_a_page_in_as_an_access_would() -> None:
    """Empty, on a device, read-only, in a hole, missing for a userfaultfd: what `fetch_add` does before it looks again."""
    machine = Machine()
    space = await written(machine)
    await machine.to_device(space, 64, span(FIRST, 1))
    await space.touch(BASE + 9, write=True)
    assert machine.homed == [FIRST]
    assert space.mm.table.get(FIRST) & (pte.KIND | pte.WRITE) == pte.WRITABLE
    await space.mmap(2 * PAGE, "rw", 2 * BASE)
    await space.touch(2 * BASE, write=False)
    assert space.mm.table.get(2 * FIRST) & pte.SPECIAL
    await space.mprotect(BASE + PAGE, PAGE, "r")
    with pytest.raises(SegmentationFault, match="without the right to write"):
        await space.touch(BASE + PAGE, write=True)
    with pytest.raises(SegmentationFault, match="not mapped"):
        await space.touch(3 * BASE, write=False)
    faults = await space.userfaultfd(2 * BASE + PAGE, PAGE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: space.touch(2 * BASE + PAGE, write=True))
        assert await faults.read() == 2 * BASE + PAGE
        await faults.copy(2 * BASE + PAGE, page_bytes(9))
    assert await space.load(2 * BASE + PAGE, 2) == b"\t\t"
    machine.check()


async def test_a_page_that_never_stays_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that brings nothing home: the access ends, where the kernel would go round for ever, and the page is where it was."""
    monkeypatch.setattr(faulting, "ROUNDS_MAX", 3)
    monkeypatch.setattr(faulting, "SPINS_MAX", 1)
    machine = Machine()
    space = await written(machine)
    await machine.to_device(space, 64, span(FIRST, 2))
    asked: list[int] = []

    async def home(_: Space, pages: Words | int) -> None:
        asked.extend(np.atleast_1d(np.asarray(pages, np.uint64)).tolist())
        await trio.lowlevel.checkpoint()

    space.home = home
    with pytest.raises(HmmnetError, match="was taken away 3 times before it could be accessed"):
        await space.load(BASE, 2 * PAGE)
    assert len(asked) == 2 * 3
    assert symbols(space, BASE, 4) == "SSPP"
    machine.check()


async def test_a_length_that_no_program_can_hold_is_enomem() -> None:
    """A load of more than this program's address space: ENOMEM that says what to do, and nothing was mapped for it."""
    machine = Machine()
    space = machine.process()
    start = 1 << 30
    await space.mmap((1 << 47) - (1 << 31), "rw", start)
    with pytest.raises(KernelError, match=r"ENOMEM.*load them in pieces"):
        await space.load(start, (1 << 47) - (1 << 31))
    assert space.mm.rss == 0


async def test_which_signal_a_refused_access_ends_with() -> None:
    """SIGBUS where data are gone (a lost device, poison, behind the end of a file), SIGSEGV where nothing may be had."""
    machine = Machine()
    space = await written(machine)
    await machine.to_device(space, 64, span(FIRST, 1))
    assert type(space.signal_for(BASE)) is SegmentationFault
    machine.memory.zone_lost(64, "pulled out")
    lost = space.signal_for(BASE, "it does not come")
    assert type(lost) is BusError
    assert lost.why.startswith("it does not come; ")
    assert f"page 0x{FIRST:x} of process {space.number} had its only copy on device" in lost.why
    assert space.signal_for(BASE, lost.why).why == lost.why, "said once"
    assert type(space.signal_for(BASE + PAGE)) is SegmentationFault
    assert type(space.signal_for(3 * BASE)) is SegmentationFault
    space.mm.table.set(FIRST + 2, pte.entry(pte.MARKER, pte.MARKER_POISON))
    assert type(space.signal_for(BASE + 2 * PAGE)) is BusError
