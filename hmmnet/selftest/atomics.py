"""Exclusive access: a device has pages to itself until the CPU touches them."""

from __future__ import annotations

import errno

import numpy as np

from hmmnet.pages import PAGE_SIZE

from .case import BUFFER_PAGES, Ground, exclusive, refused, selftest

LENGTH = BUFFER_PAGES * PAGE_SIZE
ONE = np.uint32(1)


@selftest
async def exclusive_(ground: Ground) -> None:
    """A store of the CPU ends it."""
    handle = await ground.open()
    address = await ground.map()
    numbers = await ground.fill(address)
    await exclusive(handle, address, numbers)
    await ground.check(address, numbers)
    await ground.process.write(address, numbers + ONE)
    await ground.check(address, numbers + ONE)
    await handle.ioctl("check_exclusive", address, BUFFER_PAGES)


@selftest
async def exclusive_mprotect(ground: Ground) -> None:
    """Without the right to write there is nothing exclusive: the device's store is EPERM."""
    handle = await ground.open()
    address = await ground.map()
    numbers = await ground.fill(address)
    await exclusive(handle, address, numbers)
    await ground.process.mprotect(address, LENGTH, "r")
    await refused(errno.EPERM, handle.ioctl("write", address, BUFFER_PAGES, bytes(LENGTH)), "a write to read-only memory")


@selftest
async def exclusive_cow(ground: Ground) -> None:
    """Parent and child store to what was exclusive at fork, each to its own copy."""
    handle = await ground.open()
    address = await ground.map()
    numbers = await ground.fill(address)
    await exclusive(handle, address, numbers)
    child = await ground.process.fork()
    for process, step in ((ground.process, ONE), (child, np.uint32(2))):
        await ground.check(address, numbers, process)
        await process.write(address, numbers + step)
    await ground.check(address, numbers + ONE)
    await ground.check(address, numbers + np.uint32(2), child)
    await child.exit()
