"""The kernel's test device, as far as it shows what the address space does: mirror tables, ioctls, and the letters of the recordings.

In-process and in one piece: no sessions, no links. What it answers follows dmirror.md A10 and its numbered findings.
"""

from __future__ import annotations

import errno
import math
from dataclasses import dataclass

import numpy as np

from hmmnet.errors import KernelError
from hmmnet.host.interfaces import Event
from hmmnet.host.mirror import Request, range_fault
from hmmnet.host.mm.space import Space
from hmmnet.pages import (
    DEVICE_ZONE_MIN,
    HMM_PFN_ERROR,
    HMM_PFN_FRAME_MASK,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_WRITE,
    PAGES_MAX,
    ZERO_FRAME,
    zone_of,
)

from .machine import Machine, span

WINDOW = 64


@dataclass
class Mirrored:
    """An entry of a mirror: the frame, and its tags."""

    frame: int
    write: bool = False
    atomic: bool = False


class Handle:
    """An open file on a unit: mirrors the address space of the process that opened it (implements interfaces.DeviceLink for the hub)."""

    kind = "private"

    def __init__(self, machine: Machine, unit: int, space: Space) -> None:
        self.machine = machine
        self.name = f"dmirror{unit}"
        self.zone = DEVICE_ZONE_MIN + unit
        self.space = space
        self.users = 1
        self.table: dict[int, Mirrored] = {}
        self.subscription = space.hub.insert(0, PAGES_MAX, self, unit, own=False)  # type: ignore[attr-defined]

    def invalidate_start(self, context: int, subscription: int, start: int, end: int, event: Event, owner: int, sequence: int) -> None:
        """dmirror_interval_invalidate: its own MIGRATE events are ignored, and the end is inclusive (finding 25)."""
        if event is Event.MIGRATE and owner == self.zone:
            return
        for page in [page for page in self.table if start <= page <= end]:
            del self.table[page]

    # --- through the mirror -------------------------------------------------------------------------------------------------------

    def _walk(self, start: int, count: int, *, write: bool) -> int:
        """How many pages from `start` are mirrored with the right."""
        for i in range(count):
            entry = self.table.get(start + i)
            if entry is None or (write and not entry.write):
                return i
        return count

    async def _fault(self, start: int, end: int, *, write: bool) -> None:
        flags = HMM_PFN_REQ_FAULT | (HMM_PFN_REQ_WRITE if write else 0)
        for first in range(start, end, WINDOW):
            request = Request(first, min(end, first + WINDOW) - first, self.zone, flags)
            _, words = await range_fault(self.space, self.space.hub, self.subscription, request, math.inf)  # type: ignore[arg-type]
            for i, word in enumerate(words.tolist()):
                if write and not word & HMM_PFN_WRITE:
                    raise KernelError(errno.EFAULT, "dmirror_do_fault", "an own page is read-only")
                self.table[first + i] = Mirrored(word & HMM_PFN_FRAME_MASK, bool(word & HMM_PFN_WRITE))

    async def _access(self, start: int, count: int, *, write: bool) -> int:
        """Fault until all is mirrored; how many rounds of faults."""
        done = faults = 0
        while True:
            here = self._walk(start + done, count - done, write=write)
            if write:
                for page in range(start + done, start + done + here):
                    self.write_page(page)
            done += here
            if done == count:
                return faults
            await self._fault(start + done, start + count, write=write)
            faults += 1

    def write_page(self, page: int) -> None:
        """Store the byte that is due at `page`."""
        frame = self.table[page].frame
        zone = zone_of(frame)
        arena = self.machine.devices[zone].arena if zone in self.machine.devices else self.machine.memory.nodes[zone].arena
        arena.pages[frame - arena.base] = (self._value + page - self._first) & 255

    def contents(self, start: int, count: int) -> list[bytes]:
        """The pages, through the mirror. Raises KernelError(ENOENT) where there is no entry."""
        if self._walk(start, count, write=False) < count:
            raise KernelError(errno.ENOENT, "dmirror_do_read", "a page is not mirrored")
        return [self.machine.bytes_of(self.table[start + i].frame) for i in range(count)]

    # --- ioctls -------------------------------------------------------------------------------------------------------------------

    async def read(self, start: int, count: int) -> tuple[int, list[bytes]]:
        """READ: rounds of faults, and the pages."""
        faults = await self._access(start, count, write=False)
        return faults, self.contents(start, count)

    async def write(self, start: int, count: int, value: int) -> int:
        """WRITE: page i becomes value + i throughout; rounds of faults."""
        self._value, self._first = value, start
        return await self._access(start, count, write=True)

    def _pieces(self, start: int, count: int) -> list[tuple[int, int]]:
        """Windows of a range inside VMAs; a page that cannot take part ends the list with (page, page)."""
        pieces, page = [], start
        while page < start + count:
            stop = min(start + count, page + WINDOW, max(page, self.space.vma_end(page)))
            pieces.append((page, stop))
            if stop == page:
                break
            page = stop
        return pieces

    async def migrate_to_device(self, start: int, count: int) -> list[bytes]:
        """MIGRATE_TO_DEV, and what the mirror shows then."""
        for first, stop in self._pieces(start, count):
            self.space.check_migratable(first, stop)
            source = await self.machine.to_device(self.space, self.zone, span(first, stop - first))
            entries = self.space.mm.table.read(first, stop).tolist()
            for i, word in enumerate(source.tolist()):
                if word & MIGRATE_PFN_MIGRATE:
                    self.table[first + i] = Mirrored(entries[i] >> 12, bool(word & MIGRATE_PFN_WRITE))
        return self.contents(start, count)

    async def migrate_to_system(self, start: int, count: int) -> int:
        """MIGRATE_TO_SYS: how many moved."""
        moved = 0
        for first, stop in self._pieces(start, count):
            self.space.check_migratable(first, stop)
            moved += await self.machine.to_system(self.space, self.zone, span(first, stop - first))
        return moved

    async def snapshot(self, start: int, count: int) -> list[str]:
        """SNAPSHOT, as letters."""
        async with self.space.mmap_lock.read():
            words = self.space.walk(start, start + count, None, 0, 0, self.zone).words
        return [self._letter(word) for word in words.tolist()]

    def _letter(self, word: int) -> str:
        if word & HMM_PFN_ERROR:
            return "E"
        if not word & HMM_PFN_VALID:
            return "-"
        frame = word & HMM_PFN_FRAME_MASK
        right = "W" if word & HMM_PFN_WRITE else "R"
        if frame == ZERO_FRAME:
            return "Z" + right
        return right if zone_of(frame) < DEVICE_ZONE_MIN else "L" + right

    async def exclusive(self, start: int, count: int) -> list[bytes]:
        """EXCLUSIVE, and what the mirror shows then; EBUSY where a page cannot be had, what came before stays exclusive."""
        for first in range(start, start + count, WINDOW):
            stop = min(start + count, first + WINDOW)
            try:
                got = await self.space.make_exclusive(first, stop, self.zone)
            except KernelError:
                got = 0
            if got < stop - first:
                raise KernelError(errno.EBUSY, "dmirror_exclusive", "a page cannot be had exclusively")
            for page, entry in enumerate(self.space.mm.table.read(first, stop).tolist(), first):
                self.table[page] = Mirrored(entry >> 12, atomic=True)
        return self.contents(start, count)

    def check_exclusive(self, start: int, count: int) -> None:
        """CHECK_EXCLUSIVE. Raises KernelError(EPERM) while a page is held."""
        if any(page in self.table and self.table[page].atomic for page in range(start, start + count)):
            raise KernelError(errno.EPERM, "dmirror_check_atomic", "a page is exclusive")

    def drop(self, space: Space, pages: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
        """Pages of `space` leave the device: their entries go (dmirror_devmem_fault_alloc_and_copy)."""
        if space is self.space:
            for page in pages.tolist():
                entry = self.table.get(page)
                if entry is not None and zone_of(entry.frame) == self.zone:
                    del self.table[page]
