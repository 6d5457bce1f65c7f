"""Bugs that show as waiting: work that does not end, or that ends after far too much."""

from __future__ import annotations

from functools import partial

from hmmnet.observe.counters import DEVICE_TO_HOST, HOST_TO_DEVICE
from hmmnet.pages import HUGE_PAGES, PAGE_SIZE
from hmmnet.sim import SimulatedMachine

from .found import Found, filled, must_hold, together

RANGE_PAGES = 64
PULLED_PAGES = 768
"""3 MiB of a device's 4."""
ROUNDS = 32
TRAFFIC_MAX = 40
"""Pages that may move for each page that was touched: a group of 64 KiB in both directions, and some."""


async def driver_lock_missing(machine: SimulatedMachine) -> None:
    """Two devices bind one range at the same time."""
    process = await machine.create_process()
    address, numbers = await filled(process, RANGE_PAGES)
    handles = [await process.open(device) for device in machine.device_names]
    await together([partial(handle.ioctl, "bind", address, RANGE_PAGES) for handle in handles])
    await must_hold(process, address, numbers)
    await process.exit()


async def page_held_over_a_fault(machine: SimulatedMachine) -> None:
    """Two devices take two pages each, in opposite order."""
    process = await machine.create_process()
    address, numbers = await filled(process, RANGE_PAGES)
    handles = [await process.open(device) for device in machine.device_names]
    await together([partial(handle.ioctl, "take-two", address, RANGE_PAGES) for handle in handles])
    await must_hold(process, address, numbers)
    await process.exit()


async def eviction_deadlock(machine: SimulatedMachine) -> None:
    """Two ranges of 3 MiB are pulled into 4 MiB at the same time."""
    process = await machine.create_process()
    handle = await process.open(machine.device_names[0])
    first, second = await filled(process, PULLED_PAGES), await filled(process, PULLED_PAGES)
    await together([partial(handle.ioctl, "pull", address, PULLED_PAGES) for address, _ in (first, second)])
    for address, numbers in (first, second):
        await must_hold(process, address, numbers)
    await process.exit()


async def migration_storm(machine: SimulatedMachine) -> None:
    """CPU and device take turns on two pages of one range of 2 MiB."""
    process = await machine.create_process()
    address, numbers = await filled(process, HUGE_PAGES, aligned=HUGE_PAGES)
    handle = await process.open(machine.device_names[0])
    before = await _moved_pages(machine)
    for turn in range(ROUNDS):
        await process.store(address, turn)
        await handle.ioctl("touch", address + 300 * PAGE_SIZE, 1)
        await handle.ioctl("touch", address, 1)
    numbers[0] = ROUNDS - 1
    moved = await _moved_pages(machine) - before
    if moved > TRAFFIC_MAX * 2 * ROUNDS:
        raise Found(f"{moved:,} pages crossed the link for {2 * ROUNDS} that were touched: {moved * PAGE_SIZE / 1e6:.0f} MB")
    await must_hold(process, address, numbers)
    await process.exit()


async def _moved_pages(machine: SimulatedMachine) -> int:
    rows = (await machine.report())["profile"]
    return int(sum(row["total_bytes"] for row in rows if row["kind"] in (HOST_TO_DEVICE, DEVICE_TO_HOST))) // PAGE_SIZE
