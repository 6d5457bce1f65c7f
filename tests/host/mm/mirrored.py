"""A device's mirror of a process, in the plainest words: a dictionary of what it may reach, an interval notifier, hmm_range_fault.

It is what a driver without tricks does: it ignores the migrations that it caused itself, drops exactly what it is told to, programs what a
fault gives it, and goes through its table for every access. That no callback comes once it is closed (I7) it checks itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

from hmmnet.host.hub import Hub
from hmmnet.host.interfaces import AddressSpace, Event
from hmmnet.host.mirror import Request, range_fault
from hmmnet.host.mm.space import Space
from hmmnet.pages import (
    HMM_PFN_FRAME_MASK,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_WRITE,
    Words,
    zone_of,
)


@dataclass(frozen=True)
class Seen:
    """An entry of a mirror."""

    frame: int
    write: bool = False
    atomic: bool = False
    """Had exclusively."""


class DeviceMirror:
    """The mirror of pages [start, end) of `space` by the device of `zone` (the hub's `interfaces.DeviceLink`)."""

    kind = "private"
    node = 0

    def __init__(self, space: Space, zone: int, start: int, end: int) -> None:
        self.space = space
        self.zone = zone
        self.name = f"gpu{zone - 64}"
        self.start, self.end = start, end
        self.table: dict[int, Seen] = {}
        self.hub = cast("Hub", space.hub)
        self.closed = False
        self.subscription = self.hub.insert(start, end, self, zone)  # type: ignore[arg-type]  # of a link, only what the hub asks for

    def invalidate_start(self, _context: int, _number: int, start: int, end: int, _event: Event, _owner: int, _sequence: int) -> None:
        """Let go of [start, end)."""
        assert not self.closed, f"a callback of {self.name}'s mirror of process {self.space.number} runs after its removal (I7)"
        for page in [page for page in self.table if start <= page < end]:
            del self.table[page]

    async def close(self) -> None:
        """mmu_interval_notifier_remove."""
        await self.hub.remove(self.subscription)
        self.closed = True
        self.table.clear()

    def unmirrored(self, start: int, end: int, *, write: bool) -> int:
        """The first page of [start, end) that cannot be accessed through the table; `end` when all can."""
        for page in range(start, end):
            seen = self.table.get(page)
            if seen is None or (write and not seen.write and not seen.atomic):
                return page
        return end

    async def fault(self, start: int, end: int, *, write: bool) -> None:
        """hmm_range_fault of a range, and what it gives entered in the table. Raises KernelError as that does."""
        flags = HMM_PFN_REQ_FAULT | (HMM_PFN_REQ_WRITE if write else 0)
        request = Request(start, end - start, self.zone, flags)
        _, words = await range_fault(cast("AddressSpace", self.space), self.hub, self.subscription, request, math.inf)
        for page, word in enumerate(words.tolist(), start):
            assert word & HMM_PFN_VALID, f"page 0x{page:x} was faulted, and is not there"
            self.table[page] = Seen(word & HMM_PFN_FRAME_MASK, bool(word & HMM_PFN_WRITE))

    def migrated(self, start: int, words: Words) -> list[int]:
        """Enter what has moved to the device, by the source words of a range from page `start` on; the pages."""
        moved = []
        for page, word in enumerate(words.tolist(), start):
            if word & MIGRATE_PFN_MIGRATE and self.start <= page < self.end:
                self.table[page] = Seen(self.space.mm.table.get(page) >> 12, bool(word & MIGRATE_PFN_WRITE))
                moved.append(page)
        return moved

    def exclusive(self, start: int, end: int) -> None:
        """Enter pages that the device has exclusively now."""
        for page in range(max(start, self.start), min(end, self.end)):
            self.table[page] = Seen(self.space.mm.table.get(page) >> 12, atomic=True)

    def leave(self, space: Space, pages: Words) -> None:
        """`pages` of `space` are about to be copied out of the device: a driver drops its own entries for them."""
        for page in pages.tolist() if space is self.space else ():
            seen = self.table.get(page)
            if seen is not None and zone_of(seen.frame) == self.zone:
                del self.table[page]
