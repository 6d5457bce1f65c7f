"""Bugs of drivers that handle ranges as a whole, as drm_gpusvm and xe do: bind all pages of a range on this device, or none.

A page on another device is passed over by migrate_vma, so it has to come home first (hmm_range_fault brings it); and between the
migration and the moment at which the page table is built and the TLB is flushed, anybody may take the pages away again.
"""

from __future__ import annotations

from errno import EBUSY
from types import MappingProxyType

import numpy as np
import trio

from hmmnet.devices.bus import Bus
from hmmnet.devices.context import Context
from hmmnet.devices.mirror import frames_of
from hmmnet.devices.models.base import Opened, Wiring
from hmmnet.devices.spec import Spec
from hmmnet.errors import KernelError
from hmmnet.pages import HMM_PFN_REQ_FAULT, HUGE_PAGES

from .driver import Driver

TRIES_MAX = 50
"""Rounds after which a driver that makes no progress is called livelocked."""
BIND_S = 200e-6
"""Emulated seconds to build a page table and flush a TLB."""

_driver_lock: trio.lowlevel.RunVar[trio.Lock] = trio.lowlevel.RunVar("driver_lock")


def driver_lock() -> trio.Lock:
    """One lock for all devices of a driver: those that are simulated in one run. As separate processes they would share nothing."""
    try:
        return _driver_lock.get()
    except LookupError:
        made = trio.Lock()
        _driver_lock.set(made)
        return made


def missing(context: Context, start: int, end: int) -> int:
    """Pages of [start, end) that the device does not have in its own memory."""
    entries = context.mirror.range(start, end)
    return int(np.count_nonzero((entries == 0) | ~context.memory.owns(frames_of(entries))))


class RangesUnlocked(Driver):
    """Binds a range all or nothing, and begins anew when somebody took a page meanwhile. Two of these undo each other's work for ever."""

    extra = MappingProxyType({"bind": "bind_range"})

    async def bind_range(self, opened: Opened, start: int, end: int) -> int:
        """See `Driver`."""
        for _ in range(TRIES_MAX):
            if await self.bind(opened.context, start, end):
                return end - start
        raise KernelError(EBUSY, "bind", f"pages [0x{start:x}, 0x{end:x}) were taken away {TRIES_MAX} times before they could be used")

    async def bind(self, context: Context, start: int, end: int) -> bool:
        """One try."""
        await context.range_fault(start, end, HMM_PFN_REQ_FAULT)
        await context.migrate_in(start, end, "fault")
        await trio.sleep(self.clock.real(BIND_S))
        return missing(context, start, end) == 0


class RangesLocked(RangesUnlocked):
    """One device of the driver at a time, from the fault to the moment at which the pages can be used."""

    async def bind(self, context: Context, start: int, end: int) -> bool:
        """One try."""
        async with driver_lock():
            return await super().bind(context, start, end)


class MovesWhole(Driver):
    """Knows ranges of 2 MiB only: one page that is missing sends the rest home, for a uniform range, and brings everything back."""

    extra = MappingProxyType({"touch": "touch"})

    async def touch(self, opened: Opened, start: int, end: int) -> int:
        """See `Driver`: the range around the page is on the device."""
        context, low = opened.context, start // HUGE_PAGES * HUGE_PAGES
        if missing(context, low, low + HUGE_PAGES):
            await context.migrate_out(low, low + HUGE_PAGES, "evict")
            await context.migrate_in(low, low + HUGE_PAGES, "fault")
        return end - start


class MovesMissing(Driver):
    """Brings the pages that were asked for."""

    extra = MappingProxyType({"touch": "touch"})

    async def touch(self, opened: Opened, start: int, end: int) -> int:
        """See `Driver`."""
        if missing(opened.context, start, end):
            await opened.context.migrate_in(start, end, "fault")
        return end - start


class _LateBus(Bus):
    """Keeps back the word that a migration is over: its pages stay locked (their migration entries stand)."""

    held: list[int]

    def migrate_done(self, migration: int) -> None:
        """See `Bus`."""
        self.held.append(migration)

    def let_go(self) -> None:
        """Say what was kept back."""
        held, self.held = self.held, []
        for migration in held:
            super().migrate_done(migration)


class FaultsWhileHolding(Driver):
    """Moves a page here, and before it lets go of its lock faults the next one, which the device at the other end has locked."""

    extra = MappingProxyType({"take-two": "take_two"})

    def __init__(self, spec: Spec, zone: int, wiring: Wiring) -> None:
        super().__init__(spec, zone, wiring)
        self._late = _LateBus(wiring.session, wiring.sender, wiring.receiver, wiring.clock)
        self._late.held = []
        self.bus = self._late

    async def take_two(self, opened: Opened, start: int, end: int) -> int:
        """See `Driver`: first and last page; from the end if this is not the first device."""
        first, last = (start, end - 1) if self.spec.name.endswith("0") else (end - 1, start)
        context = opened.context
        await context.migrate_in(first, first + 1, "fault")
        self.between()
        try:
            await trio.sleep(self.clock.real(BIND_S))
            await context.range_fault(last, last + 1, HMM_PFN_REQ_FAULT)
        finally:
            self._late.let_go()
        return 2

    def between(self) -> None:
        """Between the two pages."""


class FaultsAfterwards(FaultsWhileHolding):
    """Lets go before it waits."""

    def between(self) -> None:
        """See `FaultsWhileHolding`."""
        self._late.let_go()
