"""Pages that go to the device and come home."""

from __future__ import annotations

import errno

import numpy as np

from hmmnet.pages import PAGE_SIZE

from .case import BUFFER_PAGES, ROUNDS, WRITE, Ground, device_read, refused, selftest, snapshot, to_device

LENGTH = BUFFER_PAGES * PAGE_SIZE


@selftest
async def migrate(ground: Ground) -> None:
    """A written buffer goes, with its bytes."""
    handle = await ground.open()
    address = await ground.map()
    await to_device(handle, address, await ground.fill(address))


@selftest
async def migrate_fault(ground: Ground) -> None:
    """The CPU takes half of it home; then all goes again."""
    handle = await ground.open()
    address = await ground.map()
    numbers = await ground.fill(address)
    await to_device(handle, address, numbers)
    await ground.check(address, numbers[: len(numbers) // 2])
    await to_device(handle, address, numbers)
    await ground.check(address, numbers)


@selftest
async def migrate_release(ground: Ground) -> None:
    """The device's memory is released: everything is home."""
    handle = await ground.open()
    address = await ground.map()
    numbers = await ground.fill(address)
    await to_device(handle, address, numbers)
    await handle.ioctl("release", 0, 1)
    await ground.check(address, numbers)


@selftest
async def migrate_mixed(ground: Ground) -> None:
    """No access and a hole are EINVAL; zero, read-only and written pages go together; a page of one unit does not go to the other.

    Under v25, which knows no owners, it does.
    """
    first, second = await ground.open(0), await ground.open(1)
    process = ground.process
    address = await ground.map(6, "none")
    page = [address + i * PAGE_SIZE for i in range(6)]
    await refused(errno.EINVAL, second.ioctl("migrate_to_dev", address, 6), "a migration of PROT_NONE memory")
    await process.munmap(page[1], PAGE_SIZE)
    await refused(errno.EINVAL, second.ioctl("migrate_to_dev", address, 3), "a migration across a hole")
    await process.mprotect(page[2], PAGE_SIZE, "r")
    await process.load(page[2])
    await process.mprotect(page[3], 3 * PAGE_SIZE, "rw")
    numbers = np.zeros(4 * PAGE_SIZE // 4, np.uint32)
    numbers[PAGE_SIZE // 4 :] = 7
    await process.write(page[3], numbers[PAGE_SIZE // 4 :])
    await process.mprotect(page[3], PAGE_SIZE, "r")
    await to_device(second, page[2], numbers)
    if ground.v25:
        await to_device(first, page[5], numbers[-PAGE_SIZE // 4 :])
        await snapshot(first, page[5], [ground.local | WRITE])
        return
    await refused(errno.ENOENT, first.ioctl("migrate_to_dev", page[5], 1), "a migration from one unit to another")


@selftest
async def migrate_multiple(ground: Ground) -> None:
    """Fresh buffers there and back, one after the other."""
    handle = await ground.open()
    for step in range(ROUNDS):
        address = await ground.map()
        numbers = np.arange(LENGTH // 4, dtype=np.uint32) + np.uint32(step)
        await ground.process.write(address, numbers)
        await to_device(handle, address, numbers)
        await ground.check(address, numbers)
        await ground.process.munmap(address, LENGTH)


@selftest
async def double_map(ground: Ground) -> None:
    """Two units mirror the same pages; one takes them, the other reads them all the same."""
    first, second = await ground.open(0), await ground.open(1)
    address = await ground.map()
    numbers = await ground.fill(address)
    await ground.process.mprotect(address, LENGTH, "r")
    await device_read(first, address, numbers, faults=1)
    await device_read(second, address, numbers, faults=1)
    await to_device(second, address, numbers)
    await device_read(first, address, numbers, faults=1)
