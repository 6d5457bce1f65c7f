"""The driver of today (flag 256): what differs from that of 6.12 in where it stops, and what it leaves behind.

Oracle: lib/test_hmm.c (dmirror_exclusive goes page by page, dmirror_fault in windows of 32 pages), and the probes of a 7.3 kernel.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

import pytest
import trio

import hmmnet
from hmmnet.errors import KernelError
from hmmnet.faults import Controls, PointFault
from hmmnet.program import Handle, Process
from hmmnet.sim import SimulatedMachine

from .scarce import PAGE
from .test_fail_alloc import COMPOUND, MACHINE

BASE = 1 << 32
PAGES = 48


def run(main: Callable[[Process, Handle], Awaitable[None]], *, today: bool) -> None:
    """`main` with a process that has 48 written pages at BASE, and its handle."""

    async def prepared(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        await process.mmap(PAGES * PAGE, address=BASE)
        await process.write(BASE, b"x" * PAGES * PAGE)
        handle = await process.open("gpu0")
        await handle.ioctl("flags", 0, 1, flags=COMPOUND if today else 0)
        await main(process, handle)

    hmmnet.simulate(prepared, MACHINE)


def test_a_page_that_is_taken_back_before_the_answer_is_asked_for_anew() -> None:
    """A CPU wants it while the host still tells mirrors that the device has it: the first answer has no word, a later one has."""

    async def prepared(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        await process.mmap(PAGE, address=BASE)
        await process.write(BASE, b"x" * PAGE)
        handle = await process.open("gpu0")
        await handle.ioctl("flags", 0, 1, flags=COMPOUND)
        machine.add_fault(PointFault("hub.before_range_end", "delay", delay_s=1.0, controls=Controls(nth=1)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(handle.ioctl, "exclusive", BASE, 1)
            await trio.sleep(0.5)
            assert await process.load(BASE) == int.from_bytes(b"x" * 8, "little")
        assert machine.audit() == []
        with pytest.raises(KernelError, match="EPERM"):
            await handle.ioctl("check_exclusive", BASE, 1)

    hmmnet.simulate(prepared, MACHINE)


async def code_of(handle: Handle, command: str, page: int, pages: int) -> int:
    """What a command fails with; 0 for nothing."""
    try:
        await handle.ioctl(command, BASE + page * PAGE, pages)
    except KernelError as error:
        return error.code
    return 0


async def _read_only(process: Process) -> None:
    await process.mprotect(BASE + 40 * PAGE, PAGE, "r")


async def _shared(process: Process) -> None:
    await process.mmap(PAGE, address=BASE + 40 * PAGE, shared=True)


async def _hole(process: Process) -> None:
    await process.munmap(BASE + 40 * PAGE, PAGE)


@pytest.mark.parametrize(("spoil", "expected"), [(_read_only, errno.EFAULT), (_shared, errno.EOPNOTSUPP), (_hole, errno.EFAULT)])
def test_a_page_that_cannot_be_exclusive_says_why(spoil: Callable[[Process], Awaitable[None]], expected: int) -> None:
    """Those before it are, and the device has them; those behind are not."""

    async def main(process: Process, handle: Handle) -> None:
        await spoil(process)
        assert await code_of(handle, "exclusive", 0, PAGES) == expected
        assert bytes(value & 0x7F for value in await process.pagemap(BASE, 41))[38:40] == b"SS"
        assert bytes(value & 0x7F for value in await process.pagemap(BASE + 41 * PAGE, 1)) == b"P"
        assert await code_of(handle, "check_exclusive", 39, 1) == errno.EPERM
        assert await code_of(handle, "exclusive", 40, 1) == expected

    run(main, today=True)


@pytest.mark.parametrize(("spoil", "checked"), [(_read_only, 0), (_shared, errno.EPERM), (_hole, 0)])
def test_in_612_it_is_ebusy_and_the_window_is_the_devices_or_not(spoil: Callable[[Process], Awaitable[None]], checked: int) -> None:
    """As h06 shows: entries before it are exclusive, and no device has them; but where all could be written (dmirror_atomic_map)."""

    async def main(process: Process, handle: Handle) -> None:
        await spoil(process)
        assert await code_of(handle, "exclusive", 0, PAGES) == errno.EBUSY
        assert await code_of(handle, "check_exclusive", 0, PAGES) == checked

    run(main, today=False)


@pytest.mark.parametrize(("today", "left"), [(True, 32), (False, 0)])
def test_a_fault_that_fails_leaves_the_windows_before_its_own_mapped(*, today: bool, left: int) -> None:
    """Of 32 pages today, of 64 in 6.12: a hole at page 40 is in the second, or in the first."""

    async def main(process: Process, handle: Handle) -> None:
        await _hole(process)
        assert await code_of(handle, "read", 0, PAGES) == errno.EFAULT
        assert (await handle.ioctl("read", BASE, 32)).faults == (0 if left else 1)

    run(main, today=today)


def test_a_migration_that_ends_early_says_where_it_was() -> None:
    """The range, by pages; what lay before has moved."""

    async def main(process: Process, handle: Handle) -> None:
        await _hole(process)
        with pytest.raises(KernelError, match=rf"EINVAL.*\[0x{BASE // PAGE:x}, 0x{BASE // PAGE + PAGES:x}\)"):
            await handle.ioctl("migrate_to_dev", BASE, PAGES)
        assert bytes(value & 0x7F for value in await process.pagemap(BASE, 40)) == b"S" * 40

    run(main, today=True)
