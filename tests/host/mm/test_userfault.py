"""userfaultfd with somebody who fills pages in: who waits, who cannot, and what ends the waiting.

Oracle: fs/userfaultfd.c, mm/userfaultfd.c; the kernel's self-test userfaultfd_read.
"""

from __future__ import annotations

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.errors import KernelError

from .files import BASE, PAGE, used
from .machine import Machine, page_bytes

FIRST = BASE // PAGE


async def test_who_touches_a_missing_page_waits_for_it() -> None:
    """A load, a store and a pin of three pages; each is asked for once, and others may change mappings meanwhile."""
    machine = Machine()
    space = machine.process()
    await space.mmap(8 * PAGE, "rw", BASE)
    faults = await space.userfaultfd(BASE, 4 * PAGE)
    loaded: list[bytes] = []

    async def load() -> None:
        loaded.append(await space.load(BASE + 3, PAGE))

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            nursery.start_soon(space.store, BASE + 2 * PAGE, b"stored")
            nursery.start_soon(space.get_pages, FIRST + 3, 1)
            await wait_all_tasks_blocked()
            await space.mmap(PAGE, "rw", 2 * BASE)  # the mmap lock is free
            for _ in range(4):
                address = await faults.read()
                await faults.copy(address, page_bytes((address - BASE) // PAGE + 1))
    assert loaded == [page_bytes(1)[3:] + page_bytes(2)[:3]]
    assert await space.load(BASE + 2 * PAGE, 7) == b"stored\x03"
    assert used(machine) == 4
    machine.check()


async def test_who_cannot_wait_is_refused() -> None:
    """A range fault that holds the mmap lock: EFAULT."""
    machine = Machine()
    space = machine.process()
    await space.mmap(2 * PAGE, "rw", BASE)
    await space.userfaultfd(BASE, PAGE)
    async with space.mmap_lock.read():
        with pytest.raises(KernelError, match="EFAULT"):
            await space.fault_in(np.array([FIRST], np.uint64), np.array([True]))
        await space.fault_in(np.array([FIRST + 1], np.uint64), np.array([True]))


async def test_wrong_use_has_its_errno() -> None:
    """Registering twice, files; copies that are no pages, not registered, or there already; reading what is closed."""
    machine = Machine()
    space = machine.process()
    await space.mmap(4 * PAGE, "r", BASE)
    faults = await space.userfaultfd(BASE, 2 * PAGE)
    with pytest.raises(KernelError, match="EBUSY"):
        await space.userfaultfd(BASE + PAGE, 2 * PAGE)
    await space.mmap(PAGE, "rw", 2 * BASE, shared=True)
    with pytest.raises(KernelError, match="EINVAL"):
        await space.userfaultfd(2 * BASE, PAGE)
    for address, data, name in (
        (BASE + 1, page_bytes(1), "EINVAL"),
        (BASE, b"", "EINVAL"),
        (BASE, b"short", "EINVAL"),
        (BASE + 2 * PAGE, page_bytes(1), "ENOENT"),
        (BASE + PAGE, page_bytes(1) * 2, "ENOENT"),
    ):
        with pytest.raises(KernelError, match=name):
            await faults.copy(address, data)
    await faults.copy(BASE, page_bytes(1))
    with pytest.raises(KernelError, match="EEXIST"):
        await faults.copy(BASE, page_bytes(2))
    assert await space.load(BASE, 1) == b"\x01"
    await faults.close()
    await faults.close()
    with pytest.raises(KernelError, match="EBADF"):
        await faults.read()
    with pytest.raises(KernelError, match="ENOENT"):
        await faults.copy(BASE + PAGE, page_bytes(1))
    assert len(space.mm.vmas.overlapping(FIRST, FIRST + 4)) == 1
    machine.check()


@pytest.mark.parametrize("how", ["close", "exit"])
async def test_the_end_of_a_registration_lets_waiters_go(how: str) -> None:
    """Closed: the page is a zero page like others; with its process gone, the waiting ends, too."""
    machine = Machine()
    space = machine.process()
    await space.mmap(PAGE, "rw", BASE)
    faults = await space.userfaultfd(BASE, PAGE)
    ended: list[object] = []

    async def load() -> None:
        try:
            ended.append(await space.load(BASE, 1))
        except Exception as error:  # noqa: BLE001 - which one does the test say
            ended.append(type(error).__name__)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            await wait_all_tasks_blocked()
            if how == "close":
                await faults.close()
            else:
                await machine.exit(space)
    assert ended == [b"\0"] if how == "close" else ended == ["SegmentationFault"]


async def test_who_is_late_does_not_wait_for_a_registration_that_is_being_closed() -> None:
    """Its closer waits for the mmap lock, which the fault has; what the fault found missing is not waited for any more."""
    machine = Machine()
    space = machine.process()
    await space.mmap(PAGE, "rw", BASE)
    faults = await space.userfaultfd(BASE, PAGE)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            async with space.mmap_lock.read():
                nursery.start_soon(faults.close)
                await wait_all_tasks_blocked()
                await faults.wait(FIRST)
                assert space.mm.vmas.find(FIRST) is not None
        await space.store(BASE, b"plain")
    assert await space.load(BASE, 6) == b"plain\0"
    machine.check()
