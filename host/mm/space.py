"""A process's address space: system calls, CPU loads and stores, and what HMM asks of it, with their locks and notifications.

The work is done by synchronous code on `Mm` (`fault.py`, `walk.py`, `collect.py`); this file decides what has to be held and who has to be
told around it, in the order that `locks.py` lays down.

A load or store first tries to finish without suspending: mapped pages and never-touched ones need nobody else. Only what is left goes
through `_access`: take the mmap lock, and see to the page that is in the way, until there is none. A range that is accessed in one call
is brought home from a device in batches, with the result that single loads in address order would have had.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import trio

from hmmnet.errors import BusError, HmmnetError, KernelError, SegmentationFault, SignalError
from hmmnet.host.interfaces import NO_OWNER, Event, Migration, Select, Walk
from hmmnet.pages import ADDRESS_BITS, PAGE_SHIFT, PAGE_SIZE, PAGES_MAX, ZONE_SHIFT, Words
from hmmnet.program import Residency

from . import collect as migration_steps
from . import fault, pte
from .fault import Cause
from .frames import PhysicalMemory
from .locks import RwLock
from .mm import Mm
from .vma import VM_DAX, VM_HUGETLB, VM_READ, VM_SPECIAL, VM_WRITE, Vma, protection_flags
from .walk import walk

PAGE_MASK = PAGE_SIZE - 1
BATCH_PAGES = 1 << 16
"""Pages of a load or store that are made ready before they are copied: bounds the time between two looks at the table."""
HOME_PAGES_MAX = 512
"""Pages that one CPU access brings home from a device in one go."""
ROUNDS_MAX = 10_000
"""Rounds in which a fault may find its page taken away again before it counts as a bug (the kernel would go on for ever)."""
CHECKPOINT_EVERY = 64
"""Loads and stores without suspension, after which other tasks get a turn: a program that polls must not starve the machine."""

Storable = bytes | bytearray | memoryview | npt.NDArray[Any]
"""What a store takes: the bytes of it, in their order."""

Home = Callable[["Space", Words], Awaitable[None]]
"""migrate_to_ram: bring these pages (of one zone) home. Called with the mmap lock held for reading. BusError when the data are lost."""


class Notifier(Protocol):
    """What an address space needs of the hub."""

    def invalidate(self, event: Event, start: int, end: int, owner: int = NO_OWNER) -> AbstractAsyncContextManager[object]:
        """Entered before [start, end) changes, left afterwards."""
        ...


class Space:
    """Process `number`'s address space on `memory`; `home` is migrate_to_ram."""

    def __init__(self, number: int, memory: PhysicalMemory, hub: Notifier, home: Home, family: int = 0) -> None:
        self.number = number
        self.memory = memory
        self.hub = hub
        self.home = home
        self.mm = Mm(number, memory, family)
        self.mm.migration_ended = self._wake
        self.mmap_lock = RwLock()
        self.cpu_faults = 0
        """CPU faults that brought a page home, so far."""
        self._ended = trio.Event()
        self._since_checkpoint = 0

    # --- system calls -------------------------------------------------------------------------------------------------------------

    async def mmap(self, length: int, protection: str = "rw", address: int | None = None, flags: int = 0) -> int:
        """mmap(2) of anonymous private memory: MAP_FIXED at `address`, or where there is room. `flags` are further VM_* bits.

        Raises KernelError: EINVAL (empty, unaligned), ENOMEM (no room).
        """
        rights = protection_flags(protection)
        count = _whole_pages("mmap", length)
        if count == 0:
            raise KernelError(errno.EINVAL, "mmap", "length is 0")
        async with self.mmap_lock.write():
            if address is None:
                gap = self.mm.vmas.find_gap(count)
                if gap is None:
                    raise KernelError(errno.ENOMEM, "mmap", f"no gap of {count} pages in process {self.number}")
                start = gap
            else:
                start = _aligned("mmap", address)
                if start + count > PAGES_MAX:
                    raise KernelError(errno.ENOMEM, "mmap", f"0x{address:x} + {length} bytes leaves the address space")
                await self._unmap(start, start + count)
            self.mm.vmas.add(Vma(start, start + count, rights | flags, start))
        return start << PAGE_SHIFT

    async def munmap(self, address: int, length: int) -> None:
        """munmap(2). Holes in the range are fine. Raises KernelError(EINVAL): unaligned, empty, outside."""
        start, count = _aligned("munmap", address), _whole_pages("munmap", length)
        if count == 0 or start + count > PAGES_MAX:
            raise KernelError(errno.EINVAL, "munmap", f"0x{address:x} + {length} bytes is empty or leaves the address space")
        async with self.mmap_lock.write():
            await self._unmap(start, start + count)

    async def _unmap(self, start: int, end: int) -> None:
        for vma in self.mm.vmas.overlapping(start, end):
            low, high = max(start, vma.start), min(end, vma.end)
            async with self.hub.invalidate(Event.UNMAP, low, high):
                self._zap(low, high)
                self.mm.vmas.remove(low, high)

    def _zap(self, start: int, end: int) -> None:
        fault.zap(self.mm, self.mm.table.occupied(start, end))

    async def mprotect(self, address: int, length: int, protection: str) -> None:
        """mprotect(2). Raises KernelError: EINVAL (unaligned), ENOMEM at the first hole, what lies before it being changed already."""
        rights = protection_flags(protection)
        start, count = _aligned("mprotect", address), _whole_pages("mprotect", length)
        end = start + count
        async with self.mmap_lock.write():
            covered = self.mm.vmas.covered_until(start, end)
            for vma in self.mm.vmas.overlapping(start, covered):
                await self._protect(max(start, vma.start), min(covered, vma.end), vma.flags & ~7 | rights, vma.flags)
        if covered < end:
            raise KernelError(errno.ENOMEM, "mprotect", f"page 0x{covered:x} of process {self.number} is not mapped")

    async def _protect(self, start: int, end: int, flags: int, old: int) -> None:
        if flags == old:
            return

        def change(piece: Vma) -> Vma:
            piece.flags = flags
            return piece

        async with self.hub.invalidate(Event.PROTECTION_VMA, start, end):
            self.mm.vmas.update(start, end, change)
            fault.protect(self.mm, start, end, bool(flags & VM_WRITE))

    async def madvise(self, address: int, length: int, advice: str) -> None:
        """madvise(2). Raises KernelError: EINVAL (unaligned, unknown advice), ENOMEM (holes; what is mapped was advised)."""
        start, count = _aligned("madvise", address), _whole_pages("madvise", length)
        if advice != "DONTNEED":
            raise KernelError(errno.EINVAL, "madvise", f"unknown advice {advice!r}")
        end = start + count
        async with self.mmap_lock.read():
            for vma in self.mm.vmas.overlapping(start, end):
                low, high = max(start, vma.start), min(end, vma.end)
                async with self.hub.invalidate(Event.CLEAR, low, high):
                    self._zap(low, high)
            hole = self.mm.vmas.covered_until(start, end)
        if hole < end:
            raise KernelError(errno.ENOMEM, "madvise", f"page 0x{hole:x} of process {self.number} is not mapped")

    async def exit(self) -> None:
        """exit_mmap: mirrors are told once, for everything; then all is unmapped."""
        async with self.mmap_lock.write(), self.hub.invalidate(Event.RELEASE, 0, PAGES_MAX):
            self._zap(0, PAGES_MAX)
            self.mm.vmas.remove(0, PAGES_MAX)
            self.mm.close()

    # --- CPU access ---------------------------------------------------------------------------------------------------------------

    def try_load(self, address: int, length: int) -> bytes | None:
        """The bytes at `address` if that needs nobody else, else None. Raises SegmentationFault only where `load` would at once."""
        page = address >> PAGE_SHIFT
        end = address + length - 1 >> PAGE_SHIFT
        if page == end:
            entry = self.mm.table.get(page)
            vma = self.mm.vmas.find(page)
            if entry & pte.KIND == pte.PRESENT and vma is not None and vma.flags & 7:
                if not entry & pte.YOUNG:
                    self.mm.table.set(page, entry | pte.YOUNG)
                return self.memory.read_small(entry >> pte.FRAME_SHIFT, address & PAGE_MASK, length)
        if self.mmap_lock.written or length <= 0 or end - page >= BATCH_PAGES:
            return None
        try:
            ready, _ = self._touch(page, end + 1, False, None)
        except SignalError:
            return None
        if ready <= end:
            return None
        out = np.empty(length, np.uint8)
        self._copy_out(address, out)
        return out.tobytes()

    def try_store(self, address: int, data: Storable) -> bool:
        """Store `data` at `address` if that needs nobody else; False (and nothing stored) if it does."""
        if not isinstance(data, bytes):
            data = _flat(data)
        length = len(data)
        page = address >> PAGE_SHIFT
        end = address + length - 1 >> PAGE_SHIFT
        if page == end:
            entry = self.mm.table.get(page)
            vma = self.mm.vmas.find(page)
            if entry & (pte.KIND | pte.WRITE) == pte.WRITABLE and vma is not None and vma.flags & VM_WRITE:
                dirty = entry | pte.YOUNG | pte.DIRTY | pte.SOFT_DIRTY
                if dirty != entry:
                    self.mm.table.set(page, dirty)
                self.memory.write_small(entry >> pte.FRAME_SHIFT, address & PAGE_MASK, data)
                return True
        if self.mmap_lock.written or length == 0 or end - page >= BATCH_PAGES:
            return False
        try:
            ready, _ = self._touch(page, end + 1, True, _whole(address, length))
        except SignalError:
            return False
        if ready <= end:
            return False
        self._copy_in(address, np.frombuffer(data, np.uint8))
        return True

    async def load(self, address: int, length: int) -> bytes:
        """CPU load. Raises SegmentationFault, BusError, KernelError(ENOMEM)."""
        done = self.try_load(address, length)
        if done is None:
            out = np.empty(length, np.uint8)
            await self._access(address, out, write=False)
            return out.tobytes()
        self._since_checkpoint += 1
        if self._since_checkpoint >= CHECKPOINT_EVERY:
            self._since_checkpoint = 0
            await trio.lowlevel.checkpoint()
        return done

    async def store(self, address: int, data: Storable) -> None:
        """CPU store. Raises SegmentationFault, BusError, KernelError(ENOMEM); pages before the one that failed are stored then."""
        if not isinstance(data, bytes):
            data = _flat(data)
        if not self.try_store(address, data):
            await self._access(address, np.frombuffer(data, np.uint8), write=True)
            return
        self._since_checkpoint += 1
        if self._since_checkpoint >= CHECKPOINT_EVERY:
            self._since_checkpoint = 0
            await trio.lowlevel.checkpoint()

    async def _access(self, address: int, data: npt.NDArray[np.uint8], *, write: bool) -> None:
        """Load into (or store from) `data`, batch by batch: make pages ready, copy in the same step, see to what is in the way."""
        done, rounds = 0, 0
        while done < len(data):
            position = address + done
            start = position >> PAGE_SHIFT
            end = min((address + len(data) - 1 >> PAGE_SHIFT) + 1, start + BATCH_PAGES)
            async with self.mmap_lock.read():
                keep = _whole(position, len(data) - done) if write else None
                ready, touched = self._touch(start, end, write, keep)
                length = min(len(data) - done, (ready << PAGE_SHIFT) - position)
                if length > 0:
                    part = data[done : done + length]
                    if write:
                        self._copy_in(position, part)
                    else:
                        self._copy_out(position, part)
                    done += length
                    rounds = 0
                if ready < end:
                    rounds += 1
                    await self._resolve(ready, touched, rounds)
            await trio.lowlevel.checkpoint()

    def _touch(self, start: int, end: int, write: bool, keep: tuple[int, int] | None) -> tuple[int, fault.Touched]:
        """Make [start, end) ready as far as that goes now: the first page that is not, and why. `keep`: pages overwritten whole.

        Raises SegmentationFault when the very first page is refused.
        """
        page = start
        while page < end:
            try:
                vma = self.mm.check_access(page, write)
            except SegmentationFault:
                if page > start:
                    return page, fault.Touched(0)
                raise
            stop = min(end, vma.end)
            pages = np.arange(page, stop, dtype=np.uint64)
            kept = None if keep is None else slice(max(0, keep[0] - page), max(0, keep[1] - page))
            touched = fault.touch(self.mm, vma, pages, write, kept)
            page += touched.done
            if page < stop:
                return page, touched
        return page, fault.Touched(0)

    async def _resolve(self, page: int, touched: fault.Touched, rounds: int) -> None:
        """See to what stands in the way of an access to `page`. The mmap lock is held for reading."""
        if rounds > ROUNDS_MAX:
            raise HmmnetError(f"page 0x{page:x} of process {self.number} was taken away {ROUNDS_MAX} times before it could be accessed")
        if touched.cause is Cause.MIGRATION:
            await self.wait_migration(page)
        elif touched.cause is Cause.DEVICE:
            await self._bring_home(page, min(touched.blocked, HOME_PAGES_MAX))
        elif touched.cause is Cause.COW:
            count = min(touched.blocked, BATCH_PAGES)
            async with self.hub.invalidate(Event.CLEAR, page, page + count):
                vma = self.mm.vmas.find(page)
                assert vma is not None
                fault.break_cow(self.mm, vma, np.arange(page, page + count, dtype=np.uint64))
        elif touched.cause is Cause.EXCLUSIVE:
            async with self.hub.invalidate(Event.CLEAR, page, page + touched.blocked):
                fault.restore_exclusive(self.mm, np.arange(page, page + touched.blocked, dtype=np.uint64))
        elif touched.cause is Cause.MARKER:
            raise BusError(page << PAGE_SHIFT, f"page 0x{page:x} of process {self.number} is poisoned")

    async def _bring_home(self, page: int, count: int) -> None:
        """A CPU access found device-private pages: migrate_to_ram for up to `count` of them, all of one zone."""
        entries = self.mm.table.read(page, page + count)
        zones = pte.zones_of(entries)
        same = zones == zones[0]
        if not same.all():
            count = int(np.argmin(same))
        zone = self.memory.zones[int(zones[0])]
        if zone.lost:
            raise BusError(page << PAGE_SHIFT, f"page 0x{page:x} of process {self.number} was on {zone.owner}, which is gone: {zone.lost}")
        self.cpu_faults += count
        await self.home(self, np.arange(page, page + count, dtype=np.uint64))

    def _frames(self, address: int, length: int) -> Words:
        return pte.frames_of(self.mm.table.read(address >> PAGE_SHIFT, (address + length - 1 >> PAGE_SHIFT) + 1))

    def _copy_out(self, address: int, out: npt.NDArray[np.uint8]) -> None:
        self.memory.read(self._frames(address, len(out)), address & PAGE_MASK, out)

    def _copy_in(self, address: int, data: npt.NDArray[np.uint8]) -> None:
        self.memory.write(self._frames(address, len(data)), address & PAGE_MASK, data)

    # --- migration entries --------------------------------------------------------------------------------------------------------

    async def wait_migration(self, page: int) -> None:
        """migration_entry_wait: return when `page` is under migration no more. Hold the mmap lock for reading, be in no invalidation."""
        while self.mm.table.get(page) & pte.KIND == pte.MIGRATION:
            await self._ended.wait()

    def _wake(self) -> None:
        if self._ended.statistics().tasks_waiting:
            done, self._ended = self._ended, trio.Event()
            done.set()

    # --- HMM ----------------------------------------------------------------------------------------------------------------------

    def vma_at(self, page: int) -> Vma | None:
        """The VMA of `page`."""
        return self.mm.vmas.find(page)

    def vma_end(self, page: int) -> int:
        """The end of the VMA that holds `page`; `page` itself when none does."""
        vma = self.mm.vmas.find(page)
        return page if vma is None else vma.end

    def zone_at(self, page: int) -> int:
        """The zone that the entry of `page` leads to (0 for an empty one, too)."""
        return self.mm.table.get(page) >> pte.FRAME_SHIFT + ZONE_SHIFT

    def vmas(self, start: int, end: int) -> list[Vma]:
        """The VMAs that touch [start, end), in order."""
        return self.mm.vmas.overlapping(start, end)

    def walk(self, start: int, end: int, inputs: Words | None, default_flags: int, flags_mask: int, owner: int) -> Walk:
        """Table A3 for [start, end): no faulting, no waiting. Needs the mmap lock for reading."""
        assert self.mmap_lock.held, "walk without the mmap lock"
        return walk(self.mm, start, end, inputs, default_flags, flags_mask, owner)

    async def fault_in(self, pages: Words, write: npt.NDArray[np.bool_]) -> None:
        """handle_mm_fault for each of `pages` (ascending). Needs the mmap lock for reading.

        Raises KernelError: EFAULT (no mapping, data lost), EPERM (no right to write), ENOMEM, for the first page that cannot be had.
        """
        assert self.mmap_lock.held, "fault_in without the mmap lock"
        edges = np.flatnonzero(write[1:] != write[:-1]) + 1
        for part, wanted in zip(np.split(pages, edges), np.split(write, edges), strict=True):
            await self._fault_pages(part, bool(wanted[0]))

    async def _fault_pages(self, pages: Words, write: bool) -> None:
        done, rounds = 0, 0
        while done < len(pages):
            page = int(pages[done])
            vma = self._faultable(page, write)
            stop = int(np.searchsorted(pages, vma.end))
            touched = fault.touch(self.mm, vma, pages[done:stop], write)
            rounds = 0 if touched.done else rounds + 1
            done += touched.done
            if done < stop:
                run = pages[done : done + touched.blocked]
                together = int(np.argmax(run != np.arange(run[0], run[0] + len(run), dtype=np.uint64))) or len(run)
                try:
                    await self._resolve(int(run[0]), fault.Touched(0, touched.cause, together), rounds)
                except SignalError as error:
                    raise KernelError(errno.EFAULT, "handle_mm_fault", error.why) from error

    def _faultable(self, page: int, write: bool) -> Vma:
        vma = self.mm.vmas.find(page)
        if vma is None or not vma.flags & VM_READ:
            raise KernelError(errno.EFAULT, "handle_mm_fault", f"page 0x{page:x} of process {self.number} is not readable")
        if write and not vma.flags & VM_WRITE:
            raise KernelError(errno.EPERM, "handle_mm_fault", f"page 0x{page:x} of process {self.number} is read-only")
        return vma

    def check_migratable(self, start: int, end: int) -> None:
        """The argument checks of migrate_vma_setup; [start, end) must lie in one suitable VMA. Raises KernelError(EINVAL).

        That the driver also refuses a VMA without read right is test_hmm's own check, made here because every driver does it.
        """
        vma = self.mm.vmas.find(start)
        why = ""
        if end <= start:
            why = "is empty"
        elif vma is None:
            why = "is not mapped"
        elif end > vma.end:
            why = "leaves its mapping"
        elif not vma.flags & VM_READ:
            why = "is not readable"
        elif vma.flags & (VM_SPECIAL | VM_HUGETLB | VM_DAX):
            why = "is a mapping of a kind that does not migrate"
        if why:
            raise KernelError(errno.EINVAL, "migrate_vma_setup", f"pages [0x{start:x}, 0x{end:x}) of process {self.number}: {why}")

    def collect(
        self, pages: Words, select: Select, owner: int, fault_frame: int | None = None, told: frozenset[int] = frozenset()
    ) -> Migration:
        """migrate_vma_collect and migrate_vma_unmap (A4): `pages` ascend, in VMAs that `check_migratable` passed.

        The mirrors of this process have been told, and those of the processes numbered in `told` (see `sharers`).
        """
        assert self.mmap_lock.held, "collect without the mmap lock"
        return migration_steps.collect(self.mm, pages, select, owner, fault_frame, told)

    def migrate_pages(self, migration: Migration) -> None:
        """migrate_vma_pages: each page's identity goes to its target. Where `inserts(migration)`, announce a MIGRATE around this."""
        migration_steps.move(self.memory, self.mm, migration)

    def migrate_restore(self, migration: Migration) -> None:
        """The targets' device died after `migrate_pages`: nothing has moved. `migrate_finalize` must follow."""
        migration_steps.restore(self.memory, self.mm, migration)

    def migrate_abort(self, migration: Migration) -> None:
        """Give a migration up at any step before `migrate_finalize`: every page is back where it was, waiters wake."""
        migration_steps.restore(self.memory, self.mm, migration)
        migration_steps.finalize(self.memory, self.mm, migration)

    def migrate_finalize(self, migration: Migration) -> None:
        """migrate_vma_finalize: entries become the target or the untouched source, leftovers are freed, waiters wake."""
        migration_steps.finalize(self.memory, self.mm, migration)

    # --- views --------------------------------------------------------------------------------------------------------------------

    def pagemap(self, address: int, pages: int) -> bytes:
        """/proc/PID/pagemap, a byte a page: ``-`` none, ``P`` present, ``S`` special; + 0x80 when mapped exactly once."""
        start = address >> PAGE_SHIFT
        entries = self.mm.table.read(start, start + pages)
        kinds = entries & pte.KIND
        out = np.full(pages, ord("S"), np.uint8)
        out[(kinds == pte.NONE) | (kinds == pte.MARKER)] = ord("-")
        out[kinds == pte.PRESENT] = ord("P")
        once = np.flatnonzero(entries & (pte.KIND | pte.SPECIAL) == pte.PRESENT)
        if len(once):
            out[once[self.memory.field(pte.frames_of(entries[once]), "mapcount") == 1]] |= 0x80
        return out.tobytes()

    def residency(self, address: int, pages: int) -> Residency:
        """Where the pages live now: owners of zones, and for each page an index into them (-1: none, -2: in transit)."""
        start = address >> PAGE_SHIFT
        entries = self.mm.table.read(start, start + pages)
        kinds = entries & pte.KIND
        zones = pte.zones_of(entries).astype(np.intp)
        lives = ((kinds == pte.PRESENT) & (entries & pte.SPECIAL == 0)) | (kinds == pte.DEVICE) | (kinds == pte.EXCLUSIVE)
        numbers = np.unique(zones[lives]).tolist()
        out = np.full(pages, -1, np.int16)
        out[lives] = np.searchsorted(numbers, zones[lives])
        out[kinds == pte.MIGRATION] = -2
        return Residency(tuple(self.memory.zones[number].owner for number in numbers), out)


def _aligned(call: str, address: int) -> int:
    if address & PAGE_MASK or not 0 <= address < 1 << ADDRESS_BITS:
        raise KernelError(errno.EINVAL, call, f"address 0x{address:x} is not the start of a page of user memory")
    return address >> PAGE_SHIFT


def _whole_pages(call: str, length: int) -> int:
    if not 0 <= length <= 1 << ADDRESS_BITS:
        raise KernelError(errno.ENOMEM if call == "mmap" else errno.EINVAL, call, f"length {length} is larger than the address space")
    return length + PAGE_MASK >> PAGE_SHIFT


def _whole(address: int, length: int) -> tuple[int, int]:
    """The pages that [address, address + length) covers whole."""
    return address + PAGE_MASK >> PAGE_SHIFT, address + length >> PAGE_SHIFT


def _flat(data: bytearray | memoryview | npt.NDArray[Any]) -> memoryview:
    """The bytes of anything that holds some."""
    return memoryview(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data if isinstance(data, np.ndarray) else data).cast("B")
