"""Bugs that show as a use of what is no more: translations that were to be dropped, frames that went to somebody else."""

from __future__ import annotations

from functools import partial

import numpy as np
import trio

from hmmnet.errors import HmmnetError, KernelError
from hmmnet.pages import HUGE_PAGES, PAGE_SIZE
from hmmnet.program import Process
from hmmnet.sim import SimulatedMachine

from .found import WORDS, Found, filled, must_hold, must_sum, together

PAGES = 512
"""2 MiB: a device's DMA of that much takes some 66 us here, and more than one request."""
MOMENTS = 12
"""Moments in the course of a job at which the CPU takes memory away."""
STEP_S = 8e-6
RACES = 8
RACE_PAGES = 8


async def owner_not_compared(machine: SimulatedMachine) -> None:
    """One device reads memory where it is; another one migrates it; the first reads again."""
    reader, mover = machine.device_names
    process = await machine.create_process()
    address, numbers = await filled(process, PAGES)
    await must_sum(process, reader, address, numbers)
    await process.migrate(address, PAGES * PAGE_SIZE, mover)
    await must_sum(process, reader, address, numbers)
    await process.exit()


async def pages_known_by_number(machine: SimulatedMachine) -> None:
    """Pages are registered with a network card, a GPU migrates them, and a message arrives."""
    card, gpu = machine.device_names
    process = await machine.create_process()
    address, _ = await filled(process, 4)
    handle = await process.open(card)
    await handle.ioctl("register", address, 4)
    for message in (1, 2):
        try:
            await handle.ioctl("receive", address, 4)
        except HmmnetError as error:
            raise Found(f"message {message} did not arrive: {error}") from error
        await must_hold(process, address, np.full(4 * WORDS, message, np.uint64))
        await process.migrate(address, 4 * PAGE_SIZE, gpu)
    await process.exit()


async def stale_after_restart(machine: SimulatedMachine) -> None:
    """A device that reads memory where it is dies and comes back, and the memory is elsewhere by then."""
    device, other = machine.device_names
    process = await machine.create_process()
    address, numbers = await filled(process, PAGES)
    await must_sum(process, device, address, numbers)
    await machine.kill_device(device)
    await process.migrate(address, PAGES * PAGE_SIZE, other)
    await machine.start_device(device)
    await must_sum(process, device, address, numbers)
    await process.exit()


async def ack_before_dma_ends(machine: SimulatedMachine) -> None:
    """A device scans memory over the link while the CPU unmaps it, at many moments of its course."""
    for moment in range(MOMENTS):
        await _taken_away(machine, moment * STEP_S)


async def read_retry_skipped(machine: SimulatedMachine) -> None:
    """A job faults on memory whose protection changes at the same moment; once more, on what it has by then."""
    process = await machine.create_process()
    for _ in range(RACES):
        address, numbers = await filled(process, RACE_PAGES)
        await together(
            [
                partial(must_sum, process, machine.device_names[0], address, numbers),
                partial(process.mprotect, address, RACE_PAGES * PAGE_SIZE, "r"),
                partial(process.migrate, address, RACE_PAGES * PAGE_SIZE, machine.device_names[1]),
            ]
        )
        await must_sum(process, machine.device_names[0], address, numbers)
        await process.munmap(address, RACE_PAGES * PAGE_SIZE)
    await process.exit()


async def _taken_away(machine: SimulatedMachine, after_s: float) -> None:
    process = await machine.create_process()
    address, _ = await filled(process, PAGES)
    handle = await process.open(machine.device_names[0])

    async def scan() -> None:
        try:
            await handle.ioctl("scan", address, PAGES)
        except KernelError as error:
            if "refused" in str(error):
                raise  # else the memory went away under its hands, which it did

    async def unmap() -> None:
        await trio.sleep(after_s)
        await process.munmap(address, PAGES * PAGE_SIZE)

    await together([scan, unmap])
    await process.exit()


async def huge_page_freed_whole(machine: SimulatedMachine) -> None:
    """One page in the middle of 2 MiB on a device is unmapped, and something else moves there."""
    device = machine.device_names[0]
    process = await machine.create_process()
    address, numbers = await filled(process, HUGE_PAGES, aligned=HUGE_PAGES)
    await process.migrate(address, HUGE_PAGES * PAGE_SIZE, device)
    await process.munmap(address + 256 * PAGE_SIZE, PAGE_SIZE)
    await _fill_up(process, device)
    await must_hold(process, address, numbers[: 256 * WORDS])
    await must_hold(process, address + 257 * PAGE_SIZE, numbers[257 * WORDS :])
    await process.exit()


async def _fill_up(process: Process, device: str) -> None:
    """Other memory takes every free frame of the device."""
    try:
        address, _ = await filled(process, 2 * HUGE_PAGES)
        await process.migrate(address, 2 * HUGE_PAGES * PAGE_SIZE, device)
    except HmmnetError as error:
        raise Found(f"{device} takes no more memory: {error}") from error
