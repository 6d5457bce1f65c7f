"""Files and shared memory: devices use them where they are."""

from __future__ import annotations

import errno

import numpy as np

from hmmnet.pages import PAGE_SIZE

from .case import BUFFER_PAGES, READ, Ground, device_read, device_write, refused, same, selftest, snapshot, to_device

LENGTH = BUFFER_PAGES * PAGE_SIZE
NUMBERS = np.arange(LENGTH // 4, dtype=np.uint32)


@selftest
async def file_read(ground: Ground) -> None:
    """A shared read-only mapping of a file."""
    handle = await ground.open()
    file = await ground.process.memfd_create(LENGTH)
    await file.write(0, NUMBERS)
    address = await ground.map(protection="r", shared=True, file=file)
    await device_read(handle, address, NUMBERS, faults=1)


@selftest
async def file_write(ground: Ground) -> None:
    """What the device stores in a shared mapping is in the file."""
    handle = await ground.open()
    file = await ground.process.memfd_create(LENGTH)
    address = await ground.map(shared=True, file=file)
    await device_write(handle, address, NUMBERS, faults=1)
    await ground.check(address, NUMBERS)
    same(np.frombuffer(await file.read(0, LENGTH), "<u4"), NUMBERS, "who reads the file")


@selftest
async def migrate_file_private(ground: Ground) -> None:
    """Pages of a private file mapping that the program wrote are anonymous: they go."""
    handle = await ground.open()
    file = await ground.process.memfd_create(LENGTH)
    address = await ground.map(file=file)
    await to_device(handle, address, await ground.fill(address))


@selftest
async def migrate_shared(ground: Ground) -> None:
    """Shared anonymous memory does not migrate."""
    handle = await ground.open()
    address = await ground.map(shared=True)
    await refused(errno.ENOENT, handle.ioctl("migrate_to_dev", address, BUFFER_PAGES), "a migration of shared memory")


@selftest
async def mixedmap(ground: Ground) -> None:
    """Pages that a driver inserted, in a private mapping, are there to be read; v25 has no look into special mappings."""
    handle = await ground.open()
    address = await ground.map(1, file=handle)
    if ground.v25:
        await refused(errno.EINVAL, handle.ioctl("snapshot", address, 1), "a snapshot of a special mapping")
        return
    await snapshot(handle, address, [READ])
