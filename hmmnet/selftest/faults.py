"""Pages that a program fills in when somebody wants them."""

from __future__ import annotations

import errno

import numpy as np
import trio

from hmmnet.pages import PAGE_SIZE

from .case import BUFFER_PAGES, Ground, device_read, refused, selftest

NUMBERS_PER_PAGE = PAGE_SIZE // 4


@selftest
async def userfaultfd_read(ground: Ground) -> None:
    """A device that reads with the mmap lock dropped waits for a userfaultfd's owner; one that holds it is refused."""
    handle = await ground.open()
    address = await ground.map()
    numbers = np.repeat(np.arange(BUFFER_PAGES, dtype=np.uint32), NUMBERS_PER_PAGE)
    registration = await ground.process.userfaultfd(address, BUFFER_PAGES * PAGE_SIZE)
    await refused(errno.EFAULT, handle.ioctl("read", address, BUFFER_PAGES), "a read of missing pages that cannot wait")

    async def fill_in() -> None:
        while True:
            missing = await registration.read()
            page = (missing - address) // PAGE_SIZE
            await registration.copy(missing, numbers[page * NUMBERS_PER_PAGE : (page + 1) * NUMBERS_PER_PAGE].tobytes())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill_in)
        await device_read(handle, address, numbers, command="read_unlocked")
        nursery.cancel_scope.cancel()
    await registration.close()
    await ground.check(address, numbers)
