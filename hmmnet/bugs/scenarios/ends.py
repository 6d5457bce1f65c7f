"""Bugs around rights, the last reference, and closing."""

from __future__ import annotations

import trio

from hmmnet.errors import HmmnetError
from hmmnet.pages import PAGE_SIZE
from hmmnet.sim import SimulatedMachine

from .found import WORDS, Found, filled, must_hold

ROUNDS = 12
MOVED_PAGES = 256
"""1 MiB."""
SETTLE_S = 0.1
"""Virtual seconds in which a device hears of what was freed."""


async def mprotect_there_and_back(machine: SimulatedMachine) -> None:
    """A page on the device is made read-only and writable again; the device writes."""
    device = machine.device_names[0]
    process = await machine.create_process()
    address, numbers = await filled(process, 1)
    await process.migrate(address, PAGE_SIZE, device)
    await process.mprotect(address, PAGE_SIZE, "r")
    await process.mprotect(address, PAGE_SIZE, "rw")
    try:
        await process.launch("vector_add", device, a=address, b=address, out=address, n=WORDS, dtype="<u8")
    except HmmnetError as error:
        raise Found(f"a device cannot write memory that is writable: {error}") from error
    await must_hold(process, address, numbers * 2)
    await process.exit()


async def free_callback_lost(machine: SimulatedMachine) -> None:
    """Memory moves to the device and is unmapped there, again and again."""
    device = machine.device_names[0]
    process = await machine.create_process()
    for turn in range(ROUNDS):
        address, _ = await filled(process, MOVED_PAGES)
        moved = await process.migrate(address, MOVED_PAGES * PAGE_SIZE, device)
        if moved != MOVED_PAGES * PAGE_SIZE:
            raise Found(f"nothing is in use, and {device} has no room: in round {turn} {moved // PAGE_SIZE} of {MOVED_PAGES} pages moved")
        await process.munmap(address, MOVED_PAGES * PAGE_SIZE)
        await trio.sleep(SETTLE_S)
    await process.exit()


async def unregister_without_memory(machine: SimulatedMachine) -> None:
    """A device is opened and closed, and nothing ever moved there."""
    process = await machine.create_process()
    handle = await process.open(machine.device_names[0])
    try:
        await handle.close()
    except HmmnetError as error:
        raise Found(f"close failed: {error}") from error
    await process.exit()
