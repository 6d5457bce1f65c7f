"""Calls other than faults that find no host memory: which have somebody killed for it, and which do not.

Oracle: the gfp flags of each allocation in Linux 7.3-rc7. GFP_KERNEL and GFP_HIGHUSER_MOVABLE of single pages may kill, __GFP_NOFAIL does
until there is a page; what is dearer than PAGE_ALLOC_COSTLY_ORDER (a huge page) never does.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

import pytest

import hmmnet
from hmmnet.errors import KernelError
from hmmnet.host.mm import pte
from hmmnet.program import Handle, Process
from hmmnet.sim import SimulatedMachine

from .scarce import DMIRROR, MIB, PAGE, filled, host_of, is_alive, used_up

PAGES = MIB // PAGE


class Stage:
    """A process with 1 MiB, on the device where `device`; a large one that may be killed; nothing left for anybody else."""

    machine: SimulatedMachine
    process: Process
    address: int
    rest: Process
    handle: Handle | None = None
    device = False

    async def prepare(self) -> None:
        """What needs memory and comes before it is used up."""

    async def call(self) -> None:
        """What wants memory that there is not."""
        raise NotImplementedError  # each stage has its own

    async def check(self) -> None:
        """That it did what it had to."""


class Fork(Stage):
    """copy_present_page (GFP_HIGHUSER_MOVABLE): pinned pages are copied for the child."""

    async def prepare(self) -> None:
        self.held = await self.process.get_user_pages(self.address, PAGES, write=True, pin=True)

    async def call(self) -> None:
        self.child = await self.process.fork()

    async def check(self) -> None:
        await self.process.write(self.address, b"y" * MIB)
        assert await self.child.read(self.address, MIB) == b"x" * MIB
        await self.held.put()
        await self.child.exit()


class Protect(Stage):
    """mprotect_fixup copies locked pages that become writable (populate_vma_page_range), and takes no notice when it cannot."""

    async def prepare(self) -> None:
        await self.process.mlock(self.address, MIB)
        await self.process.mprotect(self.address, MIB, "r")
        self.child = await self.process.fork()

    async def call(self) -> None:
        await self.process.mprotect(self.address, MIB, "rw")

    def writable(self) -> int:
        """How many pages can be written without a fault."""
        table = host_of(self.machine).spaces[self.process.pid].mm.table
        entries = table.read(self.address // PAGE, self.address // PAGE + PAGES)
        return int(((entries & pte.WRITE) != 0).sum())

    async def check(self) -> None:
        assert self.writable() == PAGES
        await self.child.exit()


class Write(Stage):
    """shmem_get_folio with the mapping's GFP_HIGHUSER, for a hole that is written."""

    async def prepare(self) -> None:
        self.file = await self.process.memfd_create(MIB)

    async def call(self) -> None:
        await self.file.write(PAGE // 2, b"z" * (MIB - PAGE))

    async def check(self) -> None:
        assert await self.file.read(0, MIB) == b"\0" * (PAGE // 2) + b"z" * (MIB - PAGE) + b"\0" * (PAGE // 2)
        await self.file.close()


class Copy(Stage):
    """mfill_atomic_pte_copy (GFP_HIGHUSER_MOVABLE): UFFDIO_COPY."""

    async def prepare(self) -> None:
        self.missing = await self.process.mmap(MIB)
        self.faults = await self.process.userfaultfd(self.missing, MIB)

    async def call(self) -> None:
        await self.faults.copy(self.missing, b"z" * MIB)

    async def check(self) -> None:
        await self.faults.close()
        assert await self.process.read(self.missing, MIB) == b"z" * MIB


class Home(Stage):
    """dmirror_devmem_fault_alloc_and_copy (GFP_HIGHUSER_MOVABLE): an explicit migration to system memory."""

    device = True

    async def call(self) -> None:
        away = PAGES - self.at_home()
        assert await self.process.migrate(self.address, MIB, "host") == away * PAGE

    def at_home(self) -> int:
        """How many pages are; two come even where nobody is killed for the others."""
        entries = host_of(self.machine).spaces[self.process.pid].mm.table.read(self.address // PAGE, self.address // PAGE + PAGES)
        return int((entries & pte.KIND == pte.PRESENT).sum())

    async def check(self) -> None:
        assert self.at_home() == PAGES


class Release(Stage):
    """dmirror_device_evict_chunk (__GFP_NOFAIL): the driver takes its memory back."""

    device = True

    async def call(self) -> None:
        assert self.handle is not None, "it is open"
        await self.handle.ioctl("release", self.address, PAGES)

    async def check(self) -> None:
        assert host_of(self.machine).spaces[self.process.pid].mm.table.get(self.address // PAGE) & pte.KIND == pte.PRESENT


class Unplug(Stage):
    """Hot removal: eviction by frame, until nothing is left."""

    device = True

    async def call(self) -> None:
        await self.machine.unplug("gpu0")


class Insert(Stage):
    """dmirror_fops_mmap: alloc_page(GFP_KERNEL) for every page of the mapping."""

    async def prepare(self) -> None:
        self.file = await self.process.open("gpu0")

    async def call(self) -> None:
        self.mapped = await self.process.mmap(MIB, file=self.file)

    async def check(self) -> None:
        assert await self.process.read(self.mapped, MIB) == bytes(MIB)


WAYS = [Fork, Protect, Write, Copy, Home, Release, Unplug, Insert]


async def staged(machine: SimulatedMachine, kind: type[Stage]) -> Stage:
    """Everything up to the call: two frames are free, which are not enough."""
    stage = kind()
    stage.machine = machine
    stage.process, stage.address = await filled(machine, MIB)
    stage.handle = await stage.process.open("gpu0") if kind.device else None
    await stage.prepare()
    if kind.device:
        assert await stage.process.migrate(stage.address, MIB, "gpu0") == MIB
    spare, kept = await filled(machine, 2 * PAGE)
    await spare.set_oom_score_adj(-1000)
    stage.rest = await used_up(machine)
    await spare.munmap(kept, 2 * PAGE)
    return stage


@pytest.mark.parametrize("kind", WAYS)
def test_somebody_is_killed(kind: type[Stage]) -> None:
    """The call is made as if there had been memory all the time; who had it is gone."""

    async def main(machine: SimulatedMachine) -> None:
        stage = await staged(machine, kind)
        await stage.call()
        assert [await is_alive(one) for one in (stage.process, stage.rest)] == [True, False]
        await stage.check()
        assert await stage.process.read(stage.address, PAGE) in (b"x" * PAGE, b"y" * PAGE)
        await stage.process.exit()

    hmmnet.simulate(main, DMIRROR)


@pytest.mark.parametrize("kind", WAYS)
def test_nobody_may_be(kind: type[Stage]) -> None:
    """ENOMEM, but for mprotect, which takes no notice. Nothing is lost, and when there is memory the call can be made."""

    async def main(machine: SimulatedMachine) -> None:
        stage = await staged(machine, kind)
        for process in (stage.process, stage.rest):
            await process.set_oom_score_adj(-1000)
        if kind is Protect:
            await stage.call()
        else:
            with pytest.raises(KernelError) as raised:
                await stage.call()
            assert raised.value.code == errno.ENOMEM
        await stage.rest.exit()
        if kind is not Protect:
            await stage.call()
            await stage.check()
        assert await stage.process.read(stage.address, PAGE) in (b"x" * PAGE, b"y" * PAGE)
        await stage.process.exit()

    hmmnet.simulate(main, DMIRROR)


async def _huge(process: Process, address: int) -> None:
    """MADV_COLLAPSE: a huge page (GFP_TRANSHUGE, beyond PAGE_ALLOC_COSTLY_ORDER)."""
    await process.madvise(address, 2 * MIB, "COLLAPSE")


async def _pool(process: Process, address: int) -> None:
    """A page of a hugetlb pool."""
    mapped = await process.mmap(2 * MIB, hugetlb=True)
    await process.store(mapped, 1)


@pytest.mark.parametrize("call", [_huge, _pool])
def test_a_huge_page_is_not_worth_a_life(call: Callable[[Process, int], Awaitable[None]]) -> None:
    """ENOMEM, and everybody lives: allocations as large as that never kill."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        spare = await process.mmap(4 * MIB)
        address = -(-spare // (2 * MIB)) * 2 * MIB
        await process.write(address, b"x" * 2 * MIB)
        rest = await used_up(machine)
        with pytest.raises(KernelError, match="ENOMEM"):
            await call(process, address)
        assert [await is_alive(one) for one in (process, rest)] == [True, True]
        await rest.exit()
        await process.exit()

    hmmnet.simulate(main, DMIRROR)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("killable", [True, False])
def test_what_a_collapse_reads_back_is_worth_a_life(*, shared: bool, killable: bool) -> None:
    """A huge page is to be had, and no more: somebody is killed for the pages in swap (GFP_HIGHUSER_MOVABLE), and all is done.

    Where nobody may be, do_swap_page and shmem_get_folio fail: SCAN_FAIL is EINVAL, the huge page goes back, and nothing is lost.
    """

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = 1 << 32
        await process.mmap(2 * MIB, address=address, shared=shared)
        await process.write(address, b"s" * MIB)
        await process.madvise(address, MIB, "PAGEOUT")
        spare = await machine.create_process()
        await spare.mmap(2 * MIB, address=address)
        await spare.madvise(address, 2 * MIB, "HUGEPAGE")
        await spare.write(address, b"h" * 2 * MIB)
        rest = await used_up(machine)
        for one in (process, spare) if killable else (process, spare, rest):
            await one.set_oom_score_adj(-1000)
        await spare.munmap(address, 2 * MIB)
        if killable:
            await process.madvise(address, 2 * MIB, "COLLAPSE")
            await process.load(address)
            assert host_of(machine).spaces[process.pid].mm.table.pmd(address // PAGE)
        else:
            with pytest.raises(KernelError, match="EINVAL"):
                await process.madvise(address, 2 * MIB, "COLLAPSE")
            assert host_of(machine).memory.swap.used == PAGES
            assert not host_of(machine).memory.lacks(2 * PAGES)
        assert await is_alive(rest) == (not killable)
        assert await process.read(address, 2 * MIB) == b"s" * MIB + bytes(MIB)

    hmmnet.simulate(main, DMIRROR)


def test_a_hole_wants_no_memory_for_what_is_in_swap() -> None:
    """MADV_REMOVE takes whole pages, so that none is cut and read back (shmem_undo_range): with no memory left nobody dies for it."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        mapped = await process.mmap(MIB, shared=True)
        await process.write(mapped, b"f" * MIB)
        await process.madvise(mapped, MIB, "PAGEOUT")
        rest = await used_up(machine)
        await process.madvise(mapped, MIB - PAGE, "REMOVE")
        assert host_of(machine).memory.swap.used == 1
        assert await is_alive(rest)
        await rest.exit()
        assert await process.read(mapped, MIB) == bytes(MIB - PAGE) + b"f" * PAGE

    hmmnet.simulate(main, DMIRROR)


def test_more_than_all_memory_kills_nobody() -> None:
    """A mapping that the driver could never fill: ENOMEM at once."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        other, _ = await filled(machine, MIB)
        with pytest.raises(KernelError, match="more than all memory"):
            await process.mmap(64 * MIB, file=await process.open("gpu0"))
        assert await is_alive(other)

    hmmnet.simulate(main, DMIRROR)


def test_what_has_come_home_counts_though_the_rest_had_to_wait() -> None:
    """Two mappings on the device, room for one: that one moves, then somebody is killed for the other. Both are reported."""

    async def main(machine: SimulatedMachine) -> None:
        process, address = await filled(machine, 2 * MIB)
        await process.mprotect(address + MIB, MIB, "r")
        assert await process.migrate(address, 2 * MIB, "gpu0") == 2 * MIB
        spare, kept = await filled(machine, MIB)
        rest = await used_up(machine)
        await spare.munmap(kept, MIB)
        host = host_of(machine)
        link = host.homing._links[next(iter(host.homing._links))]
        done = await host.homing.migrate_to_system(host.spaces[process.pid], link, address // PAGE, address // PAGE + 2 * PAGES)
        assert done.moved == 2 * PAGES
        assert [await is_alive(one) for one in (process, spare, rest)] == [True, True, False]
        await process.exit()
        await spare.exit()

    hmmnet.simulate(main, DMIRROR)


def test_a_file_that_shrinks_is_zeroed_when_there_is_memory_for_it() -> None:
    """ftruncate cuts a page that is in swap: somebody is killed for the frame that it is read back to, and its tail is zero then."""

    async def main(machine: SimulatedMachine) -> None:
        process, _ = await filled(machine, PAGE)
        file = await process.memfd_create(PAGE)
        mapped = await process.mmap(PAGE, shared=True, file=file)
        await process.write(mapped, b"f" * PAGE)
        await process.madvise(mapped, PAGE, "PAGEOUT")
        rest = await used_up(machine)
        await file.truncate(PAGE // 2)
        assert not await is_alive(rest)
        await file.truncate(PAGE)
        assert await file.read(0, PAGE) == b"f" * (PAGE // 2) + b"\0" * (PAGE // 2)
        await process.exit()

    hmmnet.simulate(main, DMIRROR)
