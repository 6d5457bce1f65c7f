"""NUMA hints (pte_protnone): present pages whose next access faults, to see who it is. Oracle: mm/memory.c do_numa_page, mm/hmm.c."""

from __future__ import annotations

from hmmnet.host.hub import Hub
from hmmnet.host.interfaces import Event, Select
from hmmnet.host.mm import pte
from hmmnet.host.mm.space import Space
from hmmnet.host.mm.vma import VM_MIXEDMAP
from hmmnet.pages import HMM_PFN_REQ_FAULT, HMM_PFN_REQ_WRITE, HMM_PFN_VALID, HMM_PFN_WRITE
from tests.host.fakes import FakeLink

from .files import BASE, PAGE, symbols
from .machine import Machine, page_bytes, span

FIRST = BASE // PAGE


async def hinted(machine: Machine, pages: int = 2) -> Space:
    space = machine.process()
    await space.mmap(pages * PAGE, "rw", BASE)
    await space.store(BASE, b"".join(page_bytes(i + 1) for i in range(pages)))
    assert await space.numa_hints(FIRST, FIRST + pages) == pages
    return space


async def test_a_hint_is_nothing_to_a_snapshot_and_a_fault_to_a_request() -> None:
    """Table A3: 0; with a request a fault, after which the entry is as it was."""
    machine = Machine()
    space = await hinted(machine)
    async with space.mmap_lock.read():
        assert space.walk(FIRST, FIRST + 2, None, 0, 0, 64).words.tolist() == [0, 0]
        wanted = space.walk(FIRST, FIRST + 2, None, HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE, 0, 64)
        assert wanted.read.all()
        await space.fault_in(span(FIRST, 2), wanted.write)
        words = space.walk(FIRST, FIRST + 2, None, 0, 0, 64).words
    assert (words & (HMM_PFN_VALID | HMM_PFN_WRITE) == HMM_PFN_VALID | HMM_PFN_WRITE).all()
    machine.check()


async def test_an_access_makes_the_page_present_again() -> None:
    """Loads and stores; pagemap says present all the time, fork copies the trap, mprotect takes it away."""
    machine = Machine()
    space = await hinted(machine, 3)
    machine.check()
    assert symbols(space, BASE, 3) == "PPP"
    assert await space.load(BASE, PAGE) == page_bytes(1)
    await space.store(BASE + PAGE, b"x")
    child = await machine.fork(space)
    assert [entry & pte.KIND for entry in child.mm.table.read(FIRST, FIRST + 3).tolist()] == [pte.PRESENT, pte.PRESENT, pte.HINT]
    await child.mprotect(BASE, 3 * PAGE, "r")
    assert child.mm.table.get(FIRST + 2) & pte.KIND == pte.PRESENT
    assert await child.load(BASE + 2 * PAGE, 1) == b"\3"
    machine.check()


async def test_a_hinted_page_does_not_migrate() -> None:
    """migrate_vma_collect takes no protnone entry; by its frame it goes for everybody, hinted or not."""
    machine = Machine()
    space = await hinted(machine)
    async with space.mmap_lock.read():
        assert space.collect(span(FIRST, 2), Select.SYSTEM, 64).cpages == 0
    await space.load(BASE, 1)
    await machine.to_device(space, 64, span(FIRST, 2))
    assert symbols(space, BASE, 2) == "SP"
    machine.check()


async def test_pages_of_devices_are_never_hinted() -> None:
    """Private and coherent ones, nor a driver's; mirrors are told PROTECTION_VMA."""
    machine = Machine(kinds=("private", "coherent"))
    space = machine.process()
    await space.mmap(3 * PAGE, "rw", BASE)
    await space.store(BASE, bytes(3 * PAGE))
    await machine.to_device(space, 64, span(FIRST, 1))
    await machine.to_device(space, 65, span(FIRST + 1, 1))
    await space.mmap(PAGE, "rw", 2 * BASE, VM_MIXEDMAP)
    link = FakeLink("gpu0", 64)
    assert isinstance(space.hub, Hub)
    space.hub.insert(0, 1 << 30, link, 1)
    assert await space.numa_hints(0, 1 << 30) == 1
    assert [event for _, _, _, event, *_ in link.told] == [Event.PROTECTION_VMA]
    assert [entry & pte.KIND for entry in space.mm.table.read(FIRST, FIRST + 3).tolist()] == [pte.DEVICE, pte.PRESENT, pte.HINT]
