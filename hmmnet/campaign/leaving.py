"""Steps in which a device leaves the machine, in a way of its own each, and comes back empty."""

from __future__ import annotations

import contextlib
import errno

from hmmnet.errors import HmmnetError
from hmmnet.faults.catalogue import fault

from .crew import Crew
from .operations import device_of, operation
from .program import Step


@operation("bounce")
async def bounce(crew: Crew, step: Step, _: str) -> None:
    """A device is started again, empty."""
    device = device_of(crew, step)
    harm = crew.harm_begins([device], "bounce")
    try:
        if device in crew.machine.running:
            await crew.machine.kill_device(device)
        with contextlib.suppress(HmmnetError):  # it may fall again at once; whoever heals the machine starts it once more
            await crew.machine.start_device(device)
    finally:
        crew.harm_ends(harm)


@operation("unload")
async def unload(crew: Crew, step: Step, _: str) -> None:
    """A device's driver is unloaded: it says goodbye, and is started again."""
    device = device_of(crew, step)
    life = crew.machine.incarnation(device)
    harm = crew.harm_begins([device], "unload")
    try:
        if device in crew.machine.running:
            crew.machine.add_fault(fault("unload", device))
        await _comes_back(crew, device, life)
    finally:
        crew.harm_ends(harm)


@operation("unplug", errno.ENODEV)
async def unplug(crew: Crew, step: Step, _: str) -> None:
    """A device's memory is removed, its pages home first; then it is plugged in again."""
    device = device_of(crew, step)
    life = crew.machine.host.incarnation(device)  # not a later one that is about to join
    harm = crew.harm_begins([device], "unplug")
    try:
        await crew.machine.unplug(device)
        await _comes_back(crew, device, life)
    finally:
        crew.harm_ends(harm)


async def _comes_back(crew: Crew, device: str, life: int) -> None:
    """That life of it has ended, or will; it is started once it has, unless somebody did that already."""
    await crew.machine.device_ended(device, life)
    with contextlib.suppress(HmmnetError):  # as in `bounce`
        await crew.machine.start_device(device)
