"""Operations of the reference tests, each applied to a machine and to the model of it: CPUs, processes, and devices with mirrors.

A method is an operation; its name is what a history says. It says what the model expects of the call (an errno, a signal, bytes), and where
the kernel has a choice (which page was swapped, which one came home along with a neighbour) it looks at what the machine did, and whether
that was allowed.
"""

from __future__ import annotations

from collections.abc import Awaitable

import numpy as np
import pytest

from hmmnet.errors import BusError, KernelError, SegmentationFault
from hmmnet.host.mm import pte
from hmmnet.host.mm.space import Space
from hmmnet.pages import PAGES_MAX, Words, zone_of

from .comparison import Comparison
from .machine import Machine, span
from .mirrored import DeviceMirror, Seen
from .model import BUS, FINE, PAGE, Cell, Model, Place

Range = tuple[int, int]
"""The first page, and how many."""


async def code_of(call: Awaitable[object]) -> int:
    """The errno with which a call ends; 0 if it does not fail."""
    try:
        await call
    except KernelError as error:
        return error.code
    return 0


class Player(Comparison):
    """`zones` are those of devices; of the `private` ones the CPU has no memory."""

    processes_max = 4

    def __init__(self, machine: Machine, model: Model, first: int) -> None:
        super().__init__(machine, model, first)
        self.private = model.private
        self.holds: list[tuple[Space, Words, Cell | None]] = []
        machine.on_copy_out = self._leave

    def _leave(self, space: Space, pages: Words) -> None:
        for mirror in self.mirrors.values():
            mirror.leave(space, pages)

    # --- accesses of CPUs ---------------------------------------------------------------------------------------------------------

    async def store(self, which: int, page: int, offset: int, value: int) -> None:
        """One byte."""
        space = self.space(which)
        place = space.number, page
        ends = self.model.outcome(place, write=True)
        if ends != FINE:
            with pytest.raises(BusError if ends == BUS else SegmentationFault):
                await space.store(page * PAGE + offset, bytes([value]))
            return
        await space.store(page * PAGE + offset, bytes([value]))
        self.touched(place)[offset] = value

    def touched(self, place: Place) -> bytearray:
        """A write to a page in the model. A page that it did not know may be in any memory that the CPU reaches."""
        known = place in self.model.cells
        self.home_along(place)
        data = self.model.touch(place)
        if not known and place in self.model.cells:
            zone = self.entry(place) >> pte.FRAME_SHIFT + 36
            assert zone not in self.private
            self.model.cells[place].zone = zone
        return data

    async def load(self, which: int, page: int) -> None:
        """One page."""
        space = self.space(which)
        place = space.number, page
        ends = self.model.outcome(place, write=False)
        if ends != FINE:
            with pytest.raises(BusError if ends == BUS else SegmentationFault):
                await space.load(page * PAGE, PAGE)
            return
        loaded = await space.load(page * PAGE, PAGE)
        self.home_along(place)
        assert loaded == self.model.look(place)
        assert self.entry(place) & pte.KIND != pte.DEVICE

    def home_along(self, place: Place) -> None:
        """A fault at `place` is over: the model learns of the pages that had to come home together with it. Mostly there are none."""

    # --- mappings -----------------------------------------------------------------------------------------------------------------

    async def mprotect(self, which: int, where: Range, rights: str) -> None:
        """Up to the first hole."""
        space = self.space(which)
        assert await code_of(space.mprotect(where[0] * PAGE, where[1] * PAGE, rights)) == self.model.refusal(space.number, *where)
        for page in range(where[0], sum(where)):
            place = space.number, page
            if place not in self.model.rights:
                break
            old = self.model.rights[place]
            self.model.protect(place, rights)
            self.reprotected(place, old)

    def reprotected(self, place: Place, old: str) -> None:
        """The rights to a page were `old`."""

    async def munmap(self, which: int, where: Range) -> None:
        """Whatever is there."""
        space = self.space(which)
        await space.munmap(where[0] * PAGE, where[1] * PAGE)
        for page in range(where[0], sum(where)):
            self.model.unmap((space.number, page))

    async def advised(self, space: Space, where: Range, advice: str) -> None:
        """madvise(2), with the errno that it must have."""
        assert await code_of(space.madvise(where[0] * PAGE, where[1] * PAGE, advice)) == self.model.refusal(space.number, *where)

    async def dontneed(self, which: int, where: Range) -> None:
        """All of it is gone."""
        space = self.space(which)
        await self.advised(space, where, "DONTNEED")
        for page in range(where[0], sum(where)):
            self.model.zap((space.number, page))

    # --- processes ----------------------------------------------------------------------------------------------------------------

    async def fork(self, which: int) -> None:
        """The child is mirrored by every device, as its parent is."""
        if len(self.spaces) == self.processes_max:
            return
        parent = self.space(which)
        child = await self.machine.fork(parent)
        self.spaces[child.number] = child
        self.model.fork(parent.number, child.number)
        for zone in self.machine.devices:
            self.attach_to(child, zone, 0, PAGES_MAX)

    async def exit(self, which: int) -> None:
        """Mirrors have nothing any more, and are closed."""
        if len(self.spaces) == 1:
            return
        space = self.space(which)
        await self.machine.exit(space)
        del self.spaces[space.number]
        self.model.exit(space.number)
        for key in [key for key in self.mirrors if key[0] == space.number]:
            assert not self.mirrors[key].table, "a mirror of a process that has ended"
            await self.mirrors.pop(key).close()

    # --- mirrors ------------------------------------------------------------------------------------------------------------------

    def attach_to(self, space: Space, zone: int, start: int, end: int) -> None:
        """A device mirrors pages [start, end) of a process, of which it mirrored none."""
        self.mirrors[space.number, zone] = DeviceMirror(space, zone, start, end)
        self.model.mirrors[space.number, zone] = set()

    async def attach(self, which: int, zone: int, where: Range) -> None:
        """A device mirrors other pages of a process than it did; of its old mirror nothing is left."""
        space = self.space(which)
        await self.mirrors[space.number, zone].close()
        self.attach_to(space, zone, where[0], PAGES_MAX if where[1] == 1 else sum(where))

    def _mirrored(self, which: int, zone: int, where: Range) -> tuple[DeviceMirror, int, int]:
        """A mirror, and the part of `where` that it is about."""
        mirror = self.mirrors[self.space(which).number, zone]
        return mirror, max(where[0], mirror.start), min(sum(where), mirror.end)

    async def dread(self, which: int, where: Range, zone: int) -> None:
        """A device reads through its mirror, and faults where that has nothing."""
        mirror, start, end = self._mirrored(which, zone, where)
        if start < end and await self._device_faults(mirror, start, end, write=False) == 0:
            for page in range(start, end):
                read = self.machine.bytes_of(mirror.table[page].frame)
                assert read == self.model.data((mirror.space.number, page)), (
                    f"{mirror.name} reads something else at page {page - self.first}"
                )

    async def dwrite(self, which: int, where: Range, zone: int, offset: int, value: int) -> None:
        """A device writes a byte to each page through its mirror. Its own pages are not upgraded: what is read-only stays so."""
        mirror, start, end = self._mirrored(which, zone, where)
        if start >= end or await self._device_faults(mirror, start, end, write=True) != 0:
            return
        for page in range(start, end):
            place, seen = (mirror.space.number, page), mirror.table[page]
            if seen.write or seen.atomic:
                self._write(place, seen, offset, value)
            else:
                assert zone_of(seen.frame) == zone, f"{self.named(place)} was not made writable for {mirror.name}"
                assert zone in self.private

    def _write(self, place: Place, seen: Seen, offset: int, value: int) -> None:
        """A byte of a page that a device has for writing."""
        zone = zone_of(seen.frame)
        arena = self.machine.devices[zone].arena if zone in self.machine.devices else self.machine.memory.nodes[zone].arena
        arena.pages[seen.frame - arena.base][offset] = value
        if self.model.is_shared(place):
            self.model.touch(place)[offset] = value
            return
        cell = self.model.cells.get(place)
        if cell is None:
            cell = self.model.put(place, Cell(bytearray(self.model.data(place)), zone, exclusive=seen.atomic))
        assert self.model.is_alone(place)
        cell.data[offset] = value

    async def _device_faults(self, mirror: DeviceMirror, start: int, end: int, *, write: bool) -> int:
        """A device's fault from the first page on that its mirror has not; with which errno it ended, as it must have."""
        first = mirror.unmirrored(start, end, write=write)
        if first == end:
            return 0
        expected = self._refused(mirror, first, end, write=write)
        assert await code_of(mirror.fault(first, end, write=write)) == expected
        for page in range(first, end):
            self._after_fault(mirror, first, page, write=write)
        return expected

    def _refused(self, mirror: DeviceMirror, start: int, end: int, *, write: bool) -> int:
        for page in range(start, end):
            place, entry = (mirror.space.number, page), self.entry((mirror.space.number, page))
            cell, own = self.model.cells.get(place), mirror.zone in self.private
            zone = cell.zone if cell is not None and any(cell.data) else entry >> pte.FRAME_SHIFT + 36
            has = own and zone == mirror.zone and entry & pte.KIND == pte.DEVICE
            if code := self.model.device_refusal(place, mirror.zone, write=write, has=has):
                return code
        return 0

    def _after_fault(self, mirror: DeviceMirror, first: int, page: int, *, write: bool) -> None:
        """What a device's fault has done to a page: home, from whichever device has it; taken back; filled; copied."""
        place = mirror.space.number, page
        entry, cell = self.entry(place), self.model.cells.get(place)
        if entry & pte.KIND == pte.DEVICE and page in mirror.table:
            self.model.see(place, mirror.zone)
        if entry & pte.KIND != pte.PRESENT:
            return
        if cell is not None and cell.zone in self.private:
            assert cell.zone != mirror.zone or page > first, f"{self.named(place)} came home from the device that asked for it"
            self.home_along(place)
        if write and entry & pte.WRITE:
            self.touched(place)
        elif cell is not None or not entry & pte.SPECIAL:
            self.model.look(place)
        if page in mirror.table:
            self.model.see(place, mirror.zone)

    async def snapshot(self, which: int, where: Range, zone: int) -> None:
        """hmm_range_fault that wants nothing: it changes nothing, and its words are those of table A3."""
        space = self.space(which)
        async with space.mmap_lock.read():
            walk = space.walk(where[0], sum(where), None, 0, 0, zone)
        assert walk.errno == 0
        assert not walk.read.any()
        for page, word in enumerate(walk.words.tolist(), where[0]):
            self.check_snapshot((space.number, page), zone, word)

    async def exclusive(self, which: int, where: Range, zone: int) -> None:
        """A write fault for each page, and what is anonymous is the device's alone."""
        space, mirror = self.space(which), self.mirrors[self.space(which).number, zone]
        first, got = where[0], 0
        try:
            got = await space.make_exclusive(first, sum(where), zone)
        except KernelError:
            place = space.number, first
            assert self.model.outcome(place, write=True) != FINE or self.model.is_shared(place)
        for page in range(first, sum(where)):
            place = space.number, page
            if self.model.outcome(place, write=True) != FINE:
                break
            if self.model.is_shared(place):
                self._filled(space, page, sum(where))
                break
            self.touched(place)
            self.model.cells[place].exclusive = page < first + got
            if page < first + got:
                self.model.forget(place)
        mirror.exclusive(first, first + got)
        for page in range(first, first + got):
            if page in mirror.table:
                self.model.see((space.number, page), zone)

    def _filled(self, space: Space, start: int, end: int) -> None:
        """Pages of shared memory that were faulted for writing, in one mapping."""
        for page in range(start, min(end, space.vma_end(start))):
            if self.model.outcome((space.number, page), write=True) != FINE:
                return
            self.model.touch((space.number, page))

    # --- migration ----------------------------------------------------------------------------------------------------------------

    def _migratable(self, space: Space, where: Range) -> bool:
        vma = space.vma_at(where[0])
        return vma is not None and sum(where) <= vma.end and "r" in self.model.rights[space.number, where[0]]

    def _stay(self, space: Space, where: Range, *kinds: int) -> set[int]:
        """Pages of which the model does not know that they do not migrate."""
        found = space.mm.table.read(where[0], sum(where)) & np.uint64(pte.KIND)
        return set((np.flatnonzero(np.isin(found, np.array(kinds, np.uint64))) + where[0]).tolist())

    async def todev(self, which: int, where: Range, zone: int, compound: bool = False) -> None:
        """migrate_vma to a device, which maps what has come."""
        space = self.space(which)
        if not self._migratable(space, where):
            return
        stay = self._stay(space, where, pte.SWAP, pte.HINT)
        words = await self.machine.to_device(space, zone, span(*where), compound=compound)
        for page in range(where[0], sum(where)):
            if page not in stay:
                self.model.to_device((space.number, page), zone)
        for page in self.mirrors[space.number, zone].migrated(where[0], words):
            self.model.see((space.number, page), zone)

    async def tosys(self, which: int, where: Range, zone: int) -> None:
        """migrate_vma home from a device."""
        space = self.space(which)
        if not self._migratable(space, where):
            return
        stay = self._stay(space, where, pte.HINT)
        await self.machine.to_system(space, zone, span(*where))
        for page in range(where[0], sum(where)):
            if page not in stay:
                self.model.to_system((space.number, page), zone)

    async def evict(self, zone: int) -> None:
        """migrate_device_range."""
        await self.machine.evict(zone)
        self.model.evict(zone)

    # --- references ---------------------------------------------------------------------------------------------------------------

    async def release(self) -> None:
        """Nobody has references any more."""
        for space, frames, cell in self.holds:
            space.put_pages(frames)
            if cell is not None:
                cell.held -= 1
        self.holds.clear()

    # --- the end ------------------------------------------------------------------------------------------------------------------

    async def end(self) -> None:
        """Everything exits."""
        while len(self.spaces) > 1:
            await self.exit(0)
        (last,) = self.spaces.values()
        await self.machine.exit(last)
        for mirror in self.mirrors.values():
            assert not mirror.table
            await mirror.close()
        self.machine.check()
        assert [device.allocator.used_count for device in self.machine.devices.values()] == [0] * len(self.machine.devices)
