"""What a self-test is made of: a registry, a ground to stand on, and checks that say what was wrong."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from hmmnet.errors import HmmnetError, KernelError
from hmmnet.pages import PAGE_SIZE
from hmmnet.program import Handle, IoctlResult, Process

Numbers: TypeAlias = npt.NDArray[np.uint32]

BUFFER_PAGES = 1024
"""HMM_BUFFER_SIZE: 4 MiB."""
TWOMEG = 2 << 20
ROUNDS = 10
"""NTIMES."""

READ = 0x01
WRITE = 0x02
PMD = 0x04
ZERO = 0x10
PRIVATE_LOCAL = 0x20
PRIVATE_REMOTE = 0x30
COHERENT_LOCAL = 0x40
COHERENT_REMOTE = 0x50
ERROR = 0xFF
NONE = 0x00
"""Bytes of a snapshot (HMM_DMIRROR_PROT_*)."""

FAIL_ALLOC = 1
"""HMM_DMIRROR_FLAG_FAIL_ALLOC: the next allocation of a large page fails."""
COMPOUND = 1 << 8
"""Huge pages migrate whole, as with today's kernel."""


class CheckFailed(HmmnetError):
    """A check of a self-test did not hold."""


class Skipped(HmmnetError):
    """This machine cannot run a test; the text says what it lacks."""


@dataclass
class Ground:
    """What one test stands on: a fresh process, and the two units of the kind that is tested. `notes` are shown with the result."""

    process: Process
    devices: tuple[str, str]
    kind: str
    personality: str = "today"
    notes: list[str] = field(default_factory=list)

    @property
    def coherent(self) -> bool:
        """Whether the units' memory is coherent."""
        return self.kind == "coherent"

    @property
    def v25(self) -> bool:
        """Whether the machine keeps v25's rules, which differ in places."""
        return self.personality == "v25"

    @property
    def local(self) -> int:
        """What a snapshot shows for a page on the unit itself."""
        return COHERENT_LOCAL if self.coherent else PRIVATE_LOCAL

    async def open(self, unit: int = 0, process: Process | None = None) -> Handle:
        """Open a unit, the first or the second; it behaves as today's kernel has it, where that is what is tested."""
        handle = await (process or self.process).open(self.devices[unit])
        if not self.v25:
            await handle.ioctl("flags", 0, 1, flags=COMPOUND)
        return handle

    async def map(self, pages: int = BUFFER_PAGES, protection: str = "rw", **options: Any) -> int:
        """A buffer."""
        return await self.process.mmap(pages * PAGE_SIZE, protection, **options)

    async def map_huge(self, length: int, process: Process | None = None) -> int:
        """A buffer that asks for huge pages: `length` bytes, aligned to one, unmapped memory around it."""
        of = process or self.process
        whole = await of.mmap(length + 2 * TWOMEG, "none")
        start = -(-whole // TWOMEG) * TWOMEG
        await of.munmap(whole, length + 2 * TWOMEG)
        await of.mmap(length, "rw", start)
        await of.madvise(start, length, "HUGEPAGE")
        return start

    async def fill(self, address: int, pages: int = BUFFER_PAGES, process: Process | None = None) -> Numbers:
        """Store 0, 1, 2 ... as 32-bit numbers; what was stored."""
        numbers = np.arange(pages * PAGE_SIZE // 4, dtype=np.uint32)
        await (process or self.process).write(address, numbers)
        return numbers

    async def check(self, address: int, expected: Numbers, process: Process | None = None) -> None:
        """The CPU loads `expected`. Raises CheckFailed."""
        same(await (process or self.process).read_array(address, "<u4", len(expected)), expected, "the CPU")


Test: TypeAlias = Callable[[Ground], Awaitable[None]]

TESTS: dict[str, Test] = {}
"""Every self-test by the kernel's name for it, in the kernel's order."""


def selftest(test: Test) -> Test:
    """Register the decorated function; its name is the test's (with a ``_`` behind it where something else has that name)."""
    name: str = test.__name__.rstrip("_")
    assert name not in TESTS, f"self-test {name} is there twice"
    TESTS[name] = test
    return test


# --- checks -----------------------------------------------------------------------------------------------------------------------


def same(got: Numbers, expected: Numbers, who: str) -> None:
    """`who` found what was expected. Raises CheckFailed, naming the first number that differs."""
    if len(got) != len(expected):
        raise CheckFailed(f"{who} found {len(got)} numbers, not {len(expected)}")
    wrong = np.flatnonzero(got != expected)
    if len(wrong):
        first = int(wrong[0])
        raise CheckFailed(f"{who} found {got[first]} at number {first}, not {expected[first]} ({len(wrong)} numbers differ)")


def equal(what: str, got: object, expected: object) -> None:
    """Raises CheckFailed."""
    if got != expected:
        raise CheckFailed(f"{what}: {got!r}, expected {expected!r}")


async def refused(code: int, call: Awaitable[object], what: str) -> None:
    """`call` fails with an errno. Raises CheckFailed."""
    try:
        await call
    except KernelError as error:
        equal(f"errno of {what}", error.name, errno.errorcode[code])
    else:
        raise CheckFailed(f"{what} succeeded, {errno.errorcode[code]} was expected")


# --- commands of the device ---------------------------------------------------------------------------------------------------------


async def device_read(handle: Handle, address: int, expected: Numbers, *, faults: int | None = None, command: str = "read") -> IoctlResult:
    """HMM_DMIRROR_READ: the device sees `expected`, in `faults` rounds of faulting (None: however many)."""
    pages = -(-len(expected) * 4 // PAGE_SIZE)
    done = await handle.ioctl(command, address, pages)
    equal("pages that the device read", done.cpages, pages)
    if faults is not None:
        equal("faults of the device", done.faults, faults)
    same(np.frombuffer(done.data, "<u4")[: len(expected)], expected, "the device")
    return done


async def device_write(handle: Handle, address: int, numbers: Numbers, *, faults: int | None = None) -> None:
    """HMM_DMIRROR_WRITE."""
    pages = len(numbers) * 4 // PAGE_SIZE
    done = await handle.ioctl("write", address, pages, numbers.tobytes())
    equal("pages that the device wrote", done.cpages, pages)
    if faults is not None:
        equal("faults of the device", done.faults, faults)


async def to_device(handle: Handle, address: int, expected: Numbers) -> None:
    """HMM_DMIRROR_MIGRATE_TO_DEV: all pages are readable there, and hold `expected`."""
    pages = len(expected) * 4 // PAGE_SIZE
    done = await handle.ioctl("migrate_to_dev", address, pages)
    equal("pages on the device", done.cpages, pages)
    same(np.frombuffer(done.data, "<u4"), expected, "the device")


async def exclusive(handle: Handle, address: int, expected: Numbers) -> None:
    """HMM_DMIRROR_EXCLUSIVE: all pages are had, and hold `expected`."""
    pages = len(expected) * 4 // PAGE_SIZE
    done = await handle.ioctl("exclusive", address, pages)
    equal("pages that the device has exclusively", done.cpages, pages)
    same(np.frombuffer(done.data, "<u4"), expected, "the device")


async def snapshot(handle: Handle, address: int, expected: list[int]) -> None:
    """HMM_DMIRROR_SNAPSHOT: these bytes, page by page."""
    done = await handle.ioctl("snapshot", address, len(expected))
    equal("pages of the snapshot", done.cpages, len(expected))
    equal("snapshot", done.data.hex(" "), bytes(expected).hex(" "))
