"""HMM_DMIRROR_FLAG_FAIL_ALLOC: an open file's next allocation of a large page fails, once, on whichever side it is wanted.

Oracle: lib/test_hmm.c (dmirror_migrate_alloc_and_copy, dmirror_devmem_fault_alloc_and_copy): what gets no large page goes page by page.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import numpy as np
import pytest

import hmmnet
from hmmnet.errors import KernelError
from hmmnet.faults import PointFault, Where
from hmmnet.host.service import Host
from hmmnet.pages import HUGE_PAGES
from hmmnet.program import Handle, Process
from hmmnet.sim import SimulatedMachine
from hmmnet.topology.load import parse

from .scarce import MIB, PAGE, TOML

MACHINE = parse(TOML.replace("8 MiB", "32 MiB").replace("memory =", 'model = "dmirror"\nunit = 0\nmemory ='))
FAIL_ALLOC, COMPOUND = 1, 256
BASE = 1 << 32
BLOCK = 2 * MIB
LOCAL, READ, WRITE, PMD = 0x20, 0x01, 0x02, 0x04
ON_THE_WAY_HOME = ("home.collected", "home.before_copy", "home.before_pages", "home.before_finalize", "home.after")

Main = Callable[[Process, Handle], Awaitable[None]]


def run(main: Main) -> None:
    """`main` with a process that has three huge pages at BASE, of which each page begins with its number, and its handle."""

    async def prepared(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        await process.mmap(4 * BLOCK, address=BASE)
        await process.madvise(BASE, 4 * BLOCK, "HUGEPAGE")
        numbers = np.zeros(3 * BLOCK // 8, np.uint64)
        numbers[::HUGE_PAGES] = np.arange(3 * HUGE_PAGES)
        await process.write(BASE, numbers)
        handle = await process.open("gpu0")
        await handle.ioctl("flags", 0, 1, flags=COMPOUND)
        await main(process, handle)
        found = await process.read_array(BASE, "<u8", 3 * BLOCK // 8)
        assert (found == numbers).all()

    hmmnet.simulate(prepared, MACHINE)


async def kinds(handle: Handle, blocks: int = 3) -> list[int]:
    """What a snapshot says of each block, of which all pages must be alike."""
    out = []
    for block in range(blocks):
        seen = set((await handle.ioctl("snapshot", BASE + block * BLOCK, HUGE_PAGES)).data)
        assert len(seen) == 1
        out.append(seen.pop())
    return out


async def fail(handle: Handle) -> None:
    """The next one fails."""
    await handle.ioctl("flags", 0, 1, flags=COMPOUND | FAIL_ALLOC)


def test_the_first_of_several_goes_page_by_page() -> None:
    """Those behind it are whole, on the device; all come home as they are there, and nothing fails then."""

    async def main(process: Process, handle: Handle) -> None:
        await fail(handle)
        await handle.ioctl("migrate_to_dev", BASE, 3 * HUGE_PAGES)
        assert await kinds(handle) == [LOCAL | WRITE, LOCAL | WRITE | PMD, LOCAL | WRITE | PMD]
        await handle.ioctl("migrate_to_sys", BASE, 3 * HUGE_PAGES)
        assert await kinds(handle) == [WRITE, WRITE | PMD, WRITE | PMD]

    run(main)


def test_the_first_that_comes_home_comes_page_by_page() -> None:
    """So it is for a CPU fault, and for an explicit migration."""

    async def main(process: Process, handle: Handle) -> None:
        await handle.ioctl("migrate_to_dev", BASE, 3 * HUGE_PAGES)
        await fail(handle)
        await process.load(BASE)
        assert await kinds(handle) == [WRITE, LOCAL | WRITE | PMD, LOCAL | WRITE | PMD]
        await fail(handle)
        await handle.ioctl("migrate_to_sys", BASE, 3 * HUGE_PAGES)
        assert await kinds(handle) == [WRITE, WRITE, WRITE | PMD]

    run(main)


@pytest.mark.parametrize("failing", [False, True])
def test_points_on_the_way_home_say_which_pages_come(*, failing: bool) -> None:
    """Of a huge page: its first page at each point, whether a large page is refused or not; then there is nothing to allocate whole."""
    first = BASE // PAGE
    seen: list[tuple[str, int, int]] = []
    asked: list[int] = []

    async def prepared(machine: SimulatedMachine) -> None:
        def reached(where: Where) -> None:
            seen.append((where.point, where.start, where.pages))

        def wanted(where: Where) -> None:
            asked.append(where.pages)

        process = await machine.create_process()
        await process.mmap(2 * BLOCK, address=BASE)
        await process.madvise(BASE, 2 * BLOCK, "HUGEPAGE")
        await process.write(BASE, b"x" * BLOCK)
        handle = await process.open("gpu0")
        await handle.ioctl("flags", 0, 1, flags=COMPOUND)
        await handle.ioctl("migrate_to_dev", BASE, HUGE_PAGES)
        if failing:
            await fail(handle)
        for point in ON_THE_WAY_HOME:
            machine.add_fault(PointFault(point, "call", call=reached))
        machine.add_fault(PointFault("host.alloc.home", "call", call=wanted))
        await process.load(BASE)

    hmmnet.simulate(prepared, MACHINE)
    assert {point for point, *_ in seen} == set(ON_THE_WAY_HOME)
    assert {(start, pages) for _, start, pages in seen} == {(first, HUGE_PAGES)}
    assert 0 not in asked


def test_a_closed_file_leaves_nothing_behind() -> None:
    """A flag that failed nothing goes with the file that it was set for."""

    async def prepared(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        handle = await process.open("gpu0")
        await fail(handle)
        assert isinstance(machine.host, Host)
        (link,) = machine.host.links.values()
        assert len(link.fail_large) == 1
        await handle.close()
        assert not link.fail_large

    hmmnet.simulate(prepared, MACHINE)


def test_what_wants_no_large_page_does_not_use_it_up() -> None:
    """A small page there and back: the flag is for the huge page that follows."""

    async def main(process: Process, handle: Handle) -> None:
        small = await process.mmap(PAGE)
        await process.store(small, 1)
        await fail(handle)
        await handle.ioctl("migrate_to_dev", small, 1)
        await process.load(small)
        await handle.ioctl("migrate_to_dev", BASE, 2 * HUGE_PAGES)
        assert await kinds(handle, 2) == [LOCAL | WRITE, LOCAL | WRITE | PMD]

    run(main)


@pytest.mark.parametrize("apart", [0, 1, 2], ids=["all", "all but the first", "the last"])
def test_a_huge_page_that_a_child_shares_is_one_too(apart: int) -> None:
    """Out and home; of what comes first, shared or not. The child finds everything where it was, and is told of it."""

    async def main(process: Process, handle: Handle) -> None:
        child = await process.fork()
        if apart:
            await child.munmap(BASE, apart * BLOCK)
            await process.write(BASE, await process.read(BASE, apart * BLOCK))
        rights = [WRITE] * apart + [READ] * (3 - apart)
        await fail(handle)
        await handle.ioctl("migrate_to_dev", BASE, 3 * HUGE_PAGES)
        assert await kinds(handle) == [LOCAL | rights[0], LOCAL | rights[1] | PMD, LOCAL | rights[2] | PMD]
        await fail(handle)
        await handle.ioctl("migrate_to_sys", BASE + BLOCK, 2 * HUGE_PAGES)
        assert await kinds(handle) == [LOCAL | rights[0], rights[1], rights[2] | PMD]
        number = (await child.read_array(BASE + 2 * BLOCK, "<u8", 1))[0]
        assert number == 2 * HUGE_PAGES
        await child.exit()

    run(main)


def test_a_command_that_is_refused_sets_nothing() -> None:
    """No range, no flags: neither the device nor the host, which fails what is wanted, has them then."""

    async def main(process: Process, handle: Handle) -> None:
        for address, pages in ((BASE + 8, 1), (BASE, 0)):
            with pytest.raises(KernelError, match="EINVAL"):
                await handle.ioctl("flags", address, pages, flags=FAIL_ALLOC)
        await handle.ioctl("migrate_to_dev", BASE, HUGE_PAGES)
        assert await kinds(handle, 1) == [LOCAL | WRITE | PMD]

    run(main)


def test_it_is_the_open_files_own() -> None:
    """Another file of the same unit, and of the same process, has flags of its own; and one that was cleared fails nothing."""

    async def main(process: Process, handle: Handle) -> None:
        other = await process.open("gpu0")
        await fail(other)
        await handle.ioctl("migrate_to_dev", BASE, HUGE_PAGES)
        assert await kinds(handle, 1) == [LOCAL | WRITE | PMD]
        await other.ioctl("migrate_to_dev", BASE + BLOCK, HUGE_PAGES)
        assert await kinds(handle, 2) == [LOCAL | WRITE | PMD, LOCAL | WRITE]
        await fail(other)
        await other.ioctl("flags", 0, 1, flags=COMPOUND)
        await other.ioctl("migrate_to_dev", BASE + 2 * BLOCK, HUGE_PAGES)
        assert await kinds(handle) == [LOCAL | WRITE | PMD, LOCAL | WRITE, LOCAL | WRITE | PMD]

    run(main)


@pytest.mark.parametrize("touched", [False, True], ids=["never touched", "huge zero page"])
def test_nothing_becomes_small_pages_too(*, touched: bool) -> None:
    """A block without data is filled page by page; what comes after is as in a block of small pages."""

    async def main(process: Process, handle: Handle) -> None:
        if touched:
            await process.load(BASE + 3 * BLOCK)
        await fail(handle)
        await handle.ioctl("migrate_to_dev", BASE + 3 * BLOCK, HUGE_PAGES)
        assert (await kinds(handle, 4))[3] == LOCAL | WRITE
        assert await process.read(BASE + 3 * BLOCK, BLOCK) == bytes(BLOCK)
        await process.madvise(BASE + 3 * BLOCK, BLOCK, "DONTNEED")
        await process.store(BASE + 3 * BLOCK, 1)
        assert (await handle.ioctl("snapshot", BASE + 3 * BLOCK, 2)).data == bytes([WRITE, 0])

    run(main)
