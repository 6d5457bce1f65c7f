"""hmm_range_fault with its loop: what it answers, when it starts over, when it gives up (semantics A3, A6)."""

from __future__ import annotations

import errno
import math

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import BusError, KernelError
from hmmnet.host.interfaces import Event
from hmmnet.host.mirror import Request, range_fault
from hmmnet.host.mm import pte
from hmmnet.host.mm.space import Space
from hmmnet.host.mm.vma import VM_PFNMAP
from hmmnet.pages import (
    HMM_PFN_ERROR,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    PAGE_SHIFT,
    PAGE_SIZE,
    PAGES_MAX,
    Words,
)

from .fakes import ZONE, Bench, FakeLink

OTHER_ZONE = 70
READ = HMM_PFN_REQ_FAULT
WRITE = HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE
RIGHTS = HMM_PFN_VALID | HMM_PFN_WRITE | HMM_PFN_ERROR


async def ask(
    bench: Bench, space: Space, address: int, pages: int, flags: int, owner: int = OTHER_ZONE, timeout_s: float = math.inf
) -> Words:
    """The answer of a range fault through a subscription of its own."""
    hub = bench.hub(space)
    subscription = hub.insert(0, PAGES_MAX, FakeLink("asker", owner), 1)
    try:
        sequence, words = await range_fault(space, hub, subscription, Request(address >> PAGE_SHIFT, pages, owner, flags), timeout_s)
        assert not hub.read_retry(subscription, sequence)
    finally:
        await hub.remove(subscription)
    return words


def rights(words: Words) -> list[int]:
    return [word & RIGHTS for word in words.tolist()]


async def test_without_a_request_nothing_is_faulted() -> None:
    """A snapshot: empty is 0, a hole is ERROR, a written page VALID and WRITE."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(2 * PAGE_SIZE)
    await space.store(address, b"x")
    words = await ask(bench, space, address, 3, 0)
    assert rights(words) == [HMM_PFN_VALID | HMM_PFN_WRITE, 0, HMM_PFN_ERROR]
    assert space.pagemap(address + PAGE_SIZE, 1) == b"-"


async def test_a_request_faults_pages_in() -> None:
    """A read maps the zero page, a write a page of its own."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(4 * PAGE_SIZE)
    assert rights(await ask(bench, space, address, 2, READ)) == [HMM_PFN_VALID] * 2
    assert rights(await ask(bench, space, address, 4, WRITE)) == [HMM_PFN_VALID | HMM_PFN_WRITE] * 4


@pytest.mark.parametrize(("protection", "flags", "code"), [("r", WRITE, errno.EPERM), ("none", READ, errno.EFAULT)])
async def test_missing_rights(protection: str, flags: int, code: int) -> None:
    """A write to read-only memory is EPERM, anything on PROT_NONE EFAULT."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(PAGE_SIZE, protection)
    with pytest.raises(KernelError) as caught:
        await ask(bench, space, address, 1, flags)
    assert caught.value.code == code


REASONS = {
    "hole": (READ, errno.EFAULT, "is not mapped"),
    "PROT_NONE": (WRITE, errno.EFAULT, "is mapped with PROT_NONE"),
    "write-only": (READ, errno.EFAULT, "is mapped without the right to read"),
    "read-only": (WRITE, errno.EPERM, "is mapped without the right to write"),
    "driver's": (READ, errno.EFAULT, r"is a driver's, without a struct page \(VM_PFNMAP\)"),
    "guard": (READ, errno.EFAULT, "is a guard page"),
    "poison": (READ, errno.EFAULT, "is poisoned"),
}


async def spoil(space: Space, page: int, how: str) -> None:
    """Make `page` of a mapping what `how` says."""
    address = page << PAGE_SHIFT
    if how == "hole":
        await space.munmap(address, PAGE_SIZE)
    elif how in {"PROT_NONE", "write-only", "read-only"}:
        await space.mprotect(address, PAGE_SIZE, {"PROT_NONE": "none", "write-only": "w", "read-only": "r"}[how])
    elif how == "driver's":
        await space.munmap(address, PAGE_SIZE)
        await space.mmap(PAGE_SIZE, "rw", address, flags=VM_PFNMAP)
    else:
        space.mm.table.set(page, pte.entry(pte.MARKER, {"guard": pte.MARKER_GUARD, "poison": pte.MARKER_POISON}[how]))


@pytest.mark.parametrize("how", REASONS)
async def test_the_error_says_why_and_what_was_asked_for(how: str) -> None:
    """Each kind of page that cannot be had in its own words, with the range; a reference is refused in the same ones."""
    flags, code, why = REASONS[how]
    bench = Bench()
    space = bench.space()
    first = await space.mmap(3 * PAGE_SIZE) >> PAGE_SHIFT
    await spoil(space, first + 1, how)
    page = f"page 0x{first + 1:x} of process {space.number}"
    with pytest.raises(KernelError, match=rf"{page} {why} \(asked for: pages 0x{first:x} to 0x{first + 2:x}\)") as caught:
        await ask(bench, space, first << PAGE_SHIFT, 3, flags)
    assert caught.value.code == code
    if how not in {"guard", "poison"}:  # found by the fault, not by the mapping
        with pytest.raises(KernelError, match=rf"{page} {why} \(asked for: pages 0x{first + 1:x} to") as caught:
            await space.get_pages(first + 1, 2, write=flags == WRITE)
        assert caught.value.code == errno.EFAULT


async def test_pages_before_a_hole_are_faulted_in_before_the_error() -> None:
    """The walk goes by address: the error comes last, what was faulted in stays."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(PAGE_SIZE)
    with pytest.raises(KernelError) as caught:
        await ask(bench, space, address, 2, WRITE)
    assert caught.value.code == errno.EFAULT
    assert space.pagemap(address, 1)[0] & 0x7F == ord("P")


async def test_own_device_pages_are_reported_and_foreign_ones_come_home() -> None:
    """dev_private_owner decides: the owner sees the device frame, another device's request pulls the page to system memory."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(PAGE_SIZE)
    await space.store(address, b"x")
    await bench.to_device(space, address, 1)
    own = await ask(bench, space, address, 1, READ, owner=ZONE)
    assert (own[0] & 0xFFFF_FFFF_FFFF) >> 36 == ZONE
    assert rights(await ask(bench, space, address, 1, 0)) == [0]
    assert rights(await ask(bench, space, address, 1, READ)) == [HMM_PFN_VALID | HMM_PFN_WRITE]
    assert space.pagemap(address, 1)[0] & 0x7F == ord("P")


async def test_an_invalidation_while_faulting_starts_the_walk_over() -> None:
    """A page that comes home takes time; the range changes meanwhile; the answer is that of a fresh walk."""
    bench = Bench()
    space = bench.space()
    hub = bench.hub(space)
    address = await space.mmap(2 * PAGE_SIZE)
    await space.store(address, b"x")
    await bench.to_device(space, address, 1)
    arrived, go = trio.Event(), trio.Event()

    async def slow() -> None:
        arrived.set()
        await go.wait()

    bench.link.during_copy = slow
    got: list[Words] = []

    async def reader() -> None:
        got.append(await ask(bench, space, address, 2, READ))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader)
        await arrived.wait()
        async with hub.invalidate(Event.CLEAR, (address >> PAGE_SHIFT) + 1, (address >> PAGE_SHIFT) + 2):
            go.set()
            await wait_all_tasks_blocked()
            assert got == []
    assert rights(got[0]) == [HMM_PFN_VALID | HMM_PFN_WRITE, HMM_PFN_VALID]


async def test_a_range_that_keeps_changing_is_ebusy_when_the_time_is_up() -> None:
    """As a driver's deadline around hmm_range_fault."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(PAGE_SIZE)
    with pytest.raises(KernelError) as caught:
        await ask(bench, space, address, 1, READ, timeout_s=-1)
    assert caught.value.code == errno.EBUSY


async def test_lost_data_are_efault_for_a_device() -> None:
    """hmm_range_fault never returns more than EFAULT for a page that is gone."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(PAGE_SIZE)
    await bench.to_device(space, address, 1)
    bench.lose("it was killed")
    with pytest.raises(KernelError) as caught:
        await ask(bench, space, address, 1, READ)
    assert caught.value.code == errno.EFAULT
    assert "killed" in caught.value.why


async def test_the_time_begins_anew_when_a_fault_dropped_the_lock() -> None:
    """hmm_range_fault_unlocked_timeout: waiting for a userfaultfd's owner is progress, however often; without it the time is up."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(3 * PAGE_SIZE)
    faults = await space.userfaultfd(address, 3 * PAGE_SIZE)
    hub, got = bench.hub(space), []
    subscription = hub.insert(0, PAGES_MAX, FakeLink("asker", OTHER_ZONE), 1)

    async def ask_unlocked() -> None:
        request = Request(address >> PAGE_SHIFT, 3, OTHER_ZONE, READ, unlocked=True)
        got.append(await range_fault(space, hub, subscription, request, timeout_s=1.0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask_unlocked)
        for _ in range(3):
            missing = await faults.read()
            await trio.sleep(0.9)
            await faults.copy(missing, bytes(PAGE_SIZE))
    assert rights(got[0][1]) == [HMM_PFN_VALID | HMM_PFN_WRITE] * 3


async def test_a_killed_process_is_eintr_for_who_waits_for_its_lock() -> None:
    """mmap_read_lock_killable; and afterwards at once."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(PAGE_SIZE)
    errors: list[str] = []

    async def refused() -> None:
        with pytest.raises(KernelError) as caught:
            await ask(bench, space, address, 1, READ)
        errors.append(caught.value.name)

    async with trio.open_nursery() as nursery:
        async with space.mmap_lock.write():
            nursery.start_soon(refused)
            await wait_all_tasks_blocked()
            space.kill()
            await wait_all_tasks_blocked()
            assert errors == ["EINTR"]
    await refused()
    assert errors == ["EINTR", "EINTR"]
    await space.exit()


async def test_what_the_oom_killer_has_reaped_is_efault() -> None:
    """Private memory is gone and is not made anew; what a device mirrors is left for exit, because the reaper waits for nobody."""
    bench = Bench()
    space = bench.space()
    address = await space.mmap(2 * PAGE_SIZE)
    mirrored = await space.mmap(PAGE_SIZE, "rw", 1 << 30)
    shared = await space.mmap(PAGE_SIZE, shared=True)
    for at in (address, mirrored, shared):
        await space.store(at, b"data")
    link = FakeLink("mirror", ZONE)
    bench.hub(space).insert(mirrored >> PAGE_SHIFT, (mirrored >> PAGE_SHIFT) + 1, link, 1)
    await space.reap()
    assert link.told == []
    for page in (address, address + PAGE_SIZE):
        with pytest.raises(KernelError) as caught:
            await ask(bench, space, page, 1, READ)
        assert caught.value.code == errno.EFAULT
        with pytest.raises(BusError, match="reaped"):
            await space.load(page, 1)
        with pytest.raises(BusError, match="reaped"):
            await space.store(page, b"x")
    assert await space.load(mirrored, 4) == await space.load(shared, 4) == b"data"
    await space.exit()
    assert [event for _, _, _, event, *_ in link.told] == [Event.RELEASE]
    assert bench.host_pages_used() == 0
