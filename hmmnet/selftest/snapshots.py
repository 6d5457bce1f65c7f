"""What a device is told about pages without touching them."""

from __future__ import annotations

import errno

import numpy as np

from hmmnet.pages import PAGE_SIZE

from .case import (
    COHERENT_REMOTE,
    ERROR,
    NONE,
    PMD,
    PRIVATE_REMOTE,
    READ,
    TWOMEG,
    WRITE,
    ZERO,
    Ground,
    equal,
    refused,
    selftest,
    snapshot,
    to_device,
)


@selftest
async def snapshot_(ground: Ground) -> None:
    """No access, a hole, the zero page, read-only, written, on this unit, on the other (private: hidden today, reported by v25)."""
    first, second = await ground.open(0), await ground.open(1)
    process = ground.process
    address = await ground.map(7, "none")
    page = [address + i * PAGE_SIZE for i in range(7)]
    await process.munmap(page[1], PAGE_SIZE)
    await process.mprotect(page[2], PAGE_SIZE, "r")
    await process.load(page[2])
    await process.mprotect(page[3], 4 * PAGE_SIZE, "rw")
    numbers = np.full(4 * PAGE_SIZE // 4, 3, np.uint32)
    await process.write(page[3], numbers)
    await process.mprotect(page[3], PAGE_SIZE, "r")
    await to_device(first, page[5], numbers[: PAGE_SIZE // 4])
    await to_device(second, page[6], numbers[: PAGE_SIZE // 4])
    private = PRIVATE_REMOTE | WRITE if ground.v25 else NONE
    remote = COHERENT_REMOTE | WRITE if ground.coherent else private
    await snapshot(first, address, [ERROR, ERROR, ZERO | READ, READ, WRITE, ground.local | WRITE, remote])


@selftest
async def compound(ground: Ground) -> None:
    """Pages of the huge page pool are mapped as one, with the mapping's right; v25 does not look into them."""
    handle = await ground.open()
    pages = TWOMEG // PAGE_SIZE
    address = await ground.map(pages, hugetlb=True)
    await ground.fill(address, pages)
    if ground.v25:
        await refused(errno.EINVAL, handle.ioctl("snapshot", address, pages), "a snapshot of hugetlb memory")
        return
    await snapshot(handle, address, [WRITE | PMD] * pages)
    await ground.process.mprotect(address, TWOMEG, "r")
    await snapshot(handle, address, [READ | PMD] * pages)


@selftest
async def hmm_gup_test(ground: Ground) -> None:
    """Whoever takes references of private pages brings them home; coherent ones come home for a long-term pin only."""
    handle = await ground.open()
    address = await ground.map(4)
    numbers = await ground.fill(address, 4)
    await to_device(handle, address, numbers)
    for i, how in enumerate(({}, {}, {"pin": True}, {"pin": True, "longterm": True})):
        held = await ground.process.get_user_pages(address + i * PAGE_SIZE, 1, write=True, **how)
        equal("pages held", held.count, 1)
        await held.put()
    stays = ground.local | WRITE if ground.coherent else WRITE
    await snapshot(handle, address, [stays, stays, stays, WRITE])
    await ground.check(address, numbers)


@selftest
async def hmm_cow_in_device(ground: Ground) -> None:
    """The parent stores to pages that it shares with a child on the device: it gets copies in memory."""
    handle = await ground.open()
    address = await ground.map(4)
    numbers = await ground.fill(address, 4)
    await to_device(handle, address, numbers)
    child = await ground.process.fork()
    await ground.process.write(address, numbers + np.uint32(1))
    await ground.check(address, numbers, child)
    await child.exit()
    await snapshot(handle, address, [WRITE] * 4)
    await ground.check(address, numbers + np.uint32(1))
