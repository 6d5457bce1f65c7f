"""A device's fault waits for a program that fills a page in, and keeps nobody else from anything meanwhile.

    program ── process ── host ══ dmirror-4      (simulated)
       └── userfaultfd over half of the memory

Oracle: the bytes that were stored, and that everything else ends while nobody fills in.
"""

from __future__ import annotations

import errno

import numpy as np
import pytest
import trio

import hmmnet
from hmmnet.errors import KernelError
from hmmnet.pages import PAGE_SIZE
from hmmnet.sim import SimulatedMachine

DEVICE = "dmirror0"
PATIENCE_S = 5.0
"""Virtual seconds in which everything that waits for no program has long ended."""


def test_a_device_that_waits_for_a_program_keeps_nobody_from_its_unit() -> None:
    """The unit is opened a second time, and read, written and migrated to where the first waits; then the page comes, and its read ends."""

    async def main(machine: SimulatedMachine) -> bytes:
        process = await machine.create_process()
        address = await process.mmap(4 * PAGE_SIZE)
        faults = await process.userfaultfd(address + 2 * PAGE_SIZE, 2 * PAGE_SIZE)
        waiting, got = await process.open(DEVICE), []

        async def wait() -> None:
            got.append((await waiting.ioctl("read_unlocked", address, 4)).data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            missing = await faults.read()
            assert missing == address + 2 * PAGE_SIZE
            with trio.fail_after(PATIENCE_S):
                other = await process.open(DEVICE)
                await other.ioctl("write", address, 2, bytes([7]) * 2 * PAGE_SIZE)
                await other.ioctl("migrate_to_dev", address, 2)
                with pytest.raises(KernelError) as refused:
                    await other.ioctl("read", address, 4)
                await other.close()
            assert refused.value.code == errno.EFAULT
            assert not got
            for page in (2, 3):
                await faults.copy(address + page * PAGE_SIZE, bytes([page]) * PAGE_SIZE)
        assert machine.audit() == []
        return bytes(got[0][::PAGE_SIZE])

    assert hmmnet.simulate(main, "dmirror-4").value == bytes([7, 7, 2, 3])


def test_a_program_that_ends_its_userfaultfd_ends_the_wait() -> None:
    """The pages are what they are elsewhere: zero."""

    async def main(machine: SimulatedMachine) -> bytes:
        process = await machine.create_process()
        address = await process.mmap(2 * PAGE_SIZE)
        faults = await process.userfaultfd(address, 2 * PAGE_SIZE)
        handle, got = await process.open(DEVICE), []

        async def wait() -> None:
            got.append((await handle.ioctl("read_unlocked", address, 2)).data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await faults.read()
            await faults.close()
        return got[0]

    assert np.frombuffer(hmmnet.simulate(main, "dmirror-4").value, np.uint8).sum() == 0
