"""Private anonymous memory that a device reads and writes where it is."""

from __future__ import annotations

import errno

import numpy as np
import trio

from hmmnet.errors import KernelError
from hmmnet.pages import PAGE_SIZE
from hmmnet.program import Handle

from .case import BUFFER_PAGES, ROUNDS, TWOMEG, CheckFailed, Ground, Numbers, device_read, device_write, refused, selftest, to_device

NUMBERS_PER_PAGE = PAGE_SIZE // 4


@selftest
async def open_close(ground: Ground) -> None:
    """The units exist, open and close."""
    for unit in (0, 1):
        await (await ground.open(unit)).close()


@selftest
async def anon_read(ground: Ground) -> None:
    """Written pages, one never touched and one of zeros, in one round of faulting."""
    handle = await ground.open()
    address = await ground.map()
    numbers = np.arange(BUFFER_PAGES * NUMBERS_PER_PAGE, dtype=np.uint32)
    numbers[: 2 * NUMBERS_PER_PAGE] = 0
    await ground.process.write(address + 2 * PAGE_SIZE, numbers[2 * NUMBERS_PER_PAGE :])
    await ground.process.mprotect(address, BUFFER_PAGES * PAGE_SIZE, "r")
    await ground.process.load(address + PAGE_SIZE)
    await device_read(handle, address, numbers, faults=1)


@selftest
async def anon_read_prot(ground: Ground) -> None:
    """Memory without access rights is not the device's to read; what is in it stays."""
    handle = await ground.open()
    address = await ground.map()
    numbers = await ground.fill(address)
    await ground.process.mprotect(address, BUFFER_PAGES * PAGE_SIZE, "none")
    await refused(errno.EFAULT, handle.ioctl("read", address, BUFFER_PAGES), "a read of PROT_NONE memory")
    await ground.process.mprotect(address, BUFFER_PAGES * PAGE_SIZE, "r")
    await ground.check(address, numbers)


@selftest
async def anon_write(ground: Ground) -> None:
    """The CPU sees what the device stored."""
    handle = await ground.open()
    address = await ground.map()
    numbers = np.arange(BUFFER_PAGES * NUMBERS_PER_PAGE, dtype=np.uint32)
    await device_write(handle, address, numbers, faults=1)
    await ground.check(address, numbers)


@selftest
async def anon_write_prot(ground: Ground) -> None:
    """A read-only mapping is read (the zero page) and not written; with the right to write, the zero page gives way."""
    handle = await ground.open()
    address = await ground.map(protection="r")
    nothing = np.zeros(BUFFER_PAGES * NUMBERS_PER_PAGE, np.uint32)
    numbers = np.arange(BUFFER_PAGES * NUMBERS_PER_PAGE, dtype=np.uint32)
    await device_read(handle, address, nothing[:NUMBERS_PER_PAGE], faults=1)
    await refused(errno.EPERM, handle.ioctl("write", address, BUFFER_PAGES, numbers.tobytes()), "a write to read-only memory")
    await ground.check(address, nothing)
    await ground.process.mprotect(address, BUFFER_PAGES * PAGE_SIZE, "rw")
    await device_write(handle, address, numbers, faults=1)
    await ground.check(address, numbers)


@selftest
async def anon_write_child(ground: Ground) -> None:
    """A child that writes by a device of its own leaves its parent's memory alone: small and huge pages, in memory and on the device."""
    handle = await ground.open()
    for huge in (False, True):
        for migrated in (False, True):
            length = 2 * TWOMEG
            address = await ground.map_huge(length) if huge else await ground.map(length // PAGE_SIZE)
            numbers = await ground.fill(address, length // PAGE_SIZE)
            if migrated:
                await to_device(handle, address, numbers)
            child = await ground.process.fork()
            await ground.check(address, numbers, child)
            own = await ground.open(process=child)
            await device_write(own, address, ~numbers)
            await ground.check(address, ~numbers, child)
            await child.exit()
            await ground.check(address, numbers)
            await ground.process.munmap(address, length)


@selftest
async def anon_write_child_shared(ground: Ground) -> None:
    """In shared memory the parent sees what its child's device wrote."""
    address = await ground.map(shared=True)
    numbers = await ground.fill(address)
    child = await ground.process.fork()
    await ground.check(address, numbers, child)
    await device_write(await ground.open(process=child), address, ~numbers, faults=1)
    await child.exit()
    await ground.check(address, ~numbers)


@selftest
async def anon_write_huge(ground: Ground) -> None:
    """Transparent huge pages, written by the device."""
    handle = await ground.open()
    address = await ground.map_huge(TWOMEG)
    numbers = np.arange(TWOMEG // 4, dtype=np.uint32)
    await device_write(handle, address, numbers, faults=1)
    await ground.check(address, numbers)


@selftest
async def anon_write_hugetlbfs(ground: Ground) -> None:
    """Pages of the huge page pool, written by the device; v25 mirrors none of them (special entries), and nothing is written."""
    handle = await ground.open()
    address = await ground.map(TWOMEG // PAGE_SIZE, hugetlb=True)
    numbers = np.arange(TWOMEG // 4, dtype=np.uint32)
    if ground.v25:
        await refused(errno.EFAULT, handle.ioctl("write", address, TWOMEG // PAGE_SIZE, numbers.tobytes()), "a write to hugetlb memory")
        await ground.check(address, np.zeros_like(numbers))
        return
    await device_write(handle, address, numbers, faults=1)
    await ground.check(address, numbers)


@selftest
async def anon_read_multiple(ground: Ground) -> None:
    """Fresh buffers one after the other."""
    handle = await ground.open()
    for step in range(ROUNDS):
        address = await ground.map()
        numbers = np.arange(BUFFER_PAGES * NUMBERS_PER_PAGE, dtype=np.uint32) + np.uint32(step)
        await ground.process.write(address, numbers)
        await device_read(handle, address, numbers, faults=1)
        await ground.process.munmap(address, BUFFER_PAGES * PAGE_SIZE)


@selftest
async def anon_teardown(ground: Ground) -> None:
    """Half is unmapped while the device reads: it reads what was there, or is refused."""
    handle = await ground.open()
    for step in range(ROUNDS):
        address = await ground.map()
        numbers = np.arange(BUFFER_PAGES * NUMBERS_PER_PAGE, dtype=np.uint32) + np.uint32(step)
        await ground.process.write(address, numbers)

        async def tear(where: int = address, wait_s: float = step / ROUNDS * 0.002) -> None:
            await trio.sleep(wait_s)
            half = BUFFER_PAGES * PAGE_SIZE // 2
            await ground.process.munmap(where + half, half)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tear)
            await _read_or_refusal(handle, address, numbers)
        await ground.check(address, numbers[: len(numbers) // 2])


async def _read_or_refusal(handle: Handle, address: int, numbers: Numbers) -> None:
    try:
        await device_read(handle, address, numbers)
    except KernelError as error:
        if error.code != errno.EFAULT:
            raise CheckFailed(f"a read of memory that is being unmapped failed with {error.name}") from error
