"""CPU loads and stores.

A load or store first tries to finish without suspending: mapped pages and never-touched ones need nobody else. Only what is left goes
through `_access`: take the mmap lock, and see to the page that is in the way (`faulting.py`), until there is none. A range that is accessed
in one call is brought home from a device in batches, with the result that single loads in address order would have had.
"""

from __future__ import annotations

import errno
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from hmmnet.errors import BusError, InjectedError, KernelError, OutOfMemory, SignalError, Unreachable
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, ZONE_SHIFT, Words

from . import pte
from .faulting import Faulting, Home, Notifier
from .frames import PhysicalMemory
from .locks import give_way
from .userfault import MissingPage
from .vma import VM_ACCESS, VM_WRITE

PAGE_MASK = PAGE_SIZE - 1
BATCH_PAGES = 1 << 16
"""Pages of a load or store that are made ready before they are copied: bounds the time between two looks at the table."""
CHECKPOINT_EVERY = 64
"""Loads and stores without suspension, after which other tasks get a turn: a program that polls must not starve the machine."""
BULK_SHIFT = 16
"""64 KiB of one load or store count as one more: long ones take as long as many."""

COPIED_BYTES = 1 << 14
"""Bytes of an array up to which a copy takes less than the way to a view of them."""

Storable = bytes | bytearray | memoryview | npt.NDArray[Any]
"""What a store takes: the bytes of it, in their order."""


class CpuAccess(Faulting):
    """Process `number`'s memory as its CPU sees it; `home` is migrate_to_ram."""

    def __init__(self, number: int, memory: PhysicalMemory, hub: Notifier, home: Home, family: int = 0) -> None:
        super().__init__(number, memory, hub, home, family)
        self._since_checkpoint = 0

    # --- without suspension -------------------------------------------------------------------------------------------------------

    def try_load(self, address: int, length: int) -> bytes | None:
        """The bytes at `address` if that needs nobody else, else None: then `load` waits for them, or raises."""
        if length <= 0:
            return b""
        page = address >> PAGE_SHIFT
        last = address + length - 1 >> PAGE_SHIFT
        if page == last:
            entry = self.mm.table.get(page)
            kind = entry & (pte.KIND | pte.YOUNG)
            if kind != pte.PRESENT | pte.YOUNG:
                if kind & pte.KIND == pte.DEVICE or not self._try_touch_one(page, write=False):
                    return None
                entry = self.mm.table.get(page)
            else:
                vma = self.mm.vmas.find(page)
                if vma is None or not vma.flags & VM_ACCESS:
                    return None
            return self.memory.read_small(entry >> pte.FRAME_SHIFT, address & PAGE_MASK, length)
        ready, error = self._try_touch(page, last + 1, write=False, keep=None)
        if error is not None:
            raise error
        if ready <= last:
            return None
        out = np.empty(length, np.uint8)
        self._copy_out(address, out)
        return out.tobytes()

    def try_store(self, address: int, data: Storable) -> bool:
        """Store `data` at `address` if that needs nobody else; False if it does or is not allowed: the pages before are stored then."""
        data = data if isinstance(data, bytes) else _flat(data)
        return self._store_now(address, data) == len(data)

    def _store_now(self, address: int, data: bytes | memoryview) -> int:
        """Store as much of `data` as needs nobody else; how many bytes. A page that is made ready is stored to before anybody sees it."""
        length = len(data)
        if length == 0:
            return 0
        page = address >> PAGE_SHIFT
        last = address + length - 1 >> PAGE_SHIFT
        if page == last:
            entry = self._make_writable(page)
            if entry is None:
                return 0
            self.memory.write_small(entry >> pte.FRAME_SHIFT, address & PAGE_MASK, data)
            return length
        ready, error = self._try_touch(page, last + 1, write=True, keep=_whole(address, length))
        length = max(0, min(length, (ready << PAGE_SHIFT) - address))
        if length:
            self._copy_in(address, np.frombuffer(data, np.uint8)[:length])
        if error is not None:
            raise error
        return length

    def _make_writable(self, page: int) -> int | None:
        """One page for a store, when it is there or was never touched: its entry; else None.

        An entry has WRITE only where its VMA does (`invariants.py`).
        """
        entry = self.mm.table.get(page)
        if entry & pte.KIND == pte.DEVICE:
            return None
        if entry & (pte.KIND | pte.WRITE) != pte.WRITABLE:
            return self.mm.table.get(page) if self._try_touch_one(page, write=True) else None
        dirty = entry | pte.YOUNG | pte.DIRTY | pte.SOFT_DIRTY
        if dirty != entry:
            self.mm.table.mark_one(page, dirty)
        return dirty

    def _try_touch_one(self, page: int, *, write: bool) -> bool:
        """Whether one page could be made ready at once. Raises InjectedError."""
        ready, error = self._try_touch(page, page + 1, write=write, keep=None)
        if error is not None:
            raise error
        return ready > page

    def _try_touch(self, start: int, end: int, *, write: bool, keep: tuple[int, int] | None) -> tuple[int, InjectedError | None]:
        """Make [start, end) ready as far as that goes at once: the first page that is not.

        And what a fault plan wants there: `load` and `store`, which try again, would be better off than whoever asked for it wants them to.
        """
        if self.mmap_lock.written or end - start > BATCH_PAGES:
            return start, None
        try:
            ready, touched = self._touch(start, end, write=write, keep=keep)
        except InjectedError as error:
            return start, error
        except (SignalError, KernelError):
            return start, None
        return ready, touched.error if isinstance(touched.error, InjectedError) else None

    # --- with suspension ----------------------------------------------------------------------------------------------------------

    async def load(self, address: int, length: int) -> bytes:
        """CPU load. Raises SegmentationFault, BusError, KernelError(ENOMEM)."""
        done = self.try_load(address, length)
        try:
            if done is None and await self._home_one(address, length, VM_ACCESS):
                done = self.try_load(address, length)
            if done is None:
                return await self._load_all(address, length)
        except SignalError as error:
            error.narrow(address)
            raise
        if self.memory.owed is not None:
            await self._pay(address)
        self._since_checkpoint += 1 + (length >> BULK_SHIFT)
        if self._since_checkpoint >= CHECKPOINT_EVERY:
            self._since_checkpoint = 0
            await give_way()
        return done

    async def _pay(self, address: int) -> None:
        """Wait for what an access in place to a device's memory takes on the link. Raises BusError when the link does not come back."""
        owed, self.memory.owed = self.memory.owed, None
        if owed is not None:
            try:
                await owed()
            except Unreachable as error:
                raise BusError(address, f"its page is intact on a device that the CPU does not reach: {error}") from error

    async def store(self, address: int, data: Storable) -> None:
        """CPU store. Raises SegmentationFault, BusError, KernelError(ENOMEM); pages before the one that failed are stored then."""
        data = data if isinstance(data, bytes) else _flat(data)
        done = self._store_now(address, data)
        if done < len(data):
            try:
                if await self._home_one(address, len(data), VM_WRITE):
                    done = self._store_now(address, data)
                if done < len(data):
                    await self._access(address, np.frombuffer(data, np.uint8), write=True, done=done)
                    return
            except SignalError as error:
                error.narrow(address)
                raise
        if self.memory.owed is not None:
            await self._pay(address)
        self._since_checkpoint += 1 + (len(data) >> BULK_SHIFT)
        if self._since_checkpoint >= CHECKPOINT_EVERY:
            self._since_checkpoint = 0
            await give_way()

    async def _load_all(self, address: int, length: int) -> bytes:
        while True:
            out = self._room(address, length)
            await self._access(address, out, write=False)
            if len(out) == length:
                return out.tobytes()
            await self._access(address + len(out), np.empty(1, np.uint8), write=False)  # nothing was mapped here; if it is now, begin anew

    def _room(self, address: int, length: int) -> npt.NDArray[np.uint8]:
        """Where to load `length` bytes to; shorter where the mapping ends, lest a wrong length cost memory. Raises KernelError(ENOMEM)."""
        end = address + length - 1 >> PAGE_SHIFT
        page = address >> PAGE_SHIFT
        while page <= end and (vma := self.mm.vmas.find(page)) is not None:
            page = vma.end
        length = min(length, max(0, (page << PAGE_SHIFT) - address))
        try:
            return np.empty(length, np.uint8)
        except MemoryError:
            raise KernelError(errno.ENOMEM, "load", f"{length} bytes do not fit into this program at once; load them in pieces") from None

    async def _home_one(self, address: int, length: int, right: int) -> bool:
        """The shortest way for the commonest fault: an access inside one page, which is on a device. False when it is another case."""
        page = address >> PAGE_SHIFT
        entry = self.mm.table.get(page)
        if address + length - 1 >> PAGE_SHIFT != page or entry & (pte.KIND | pte.HUGE) != pte.DEVICE:
            return False
        lock = self.mmap_lock
        if not lock.try_read():
            await lock.wait(writer=False)
            entry = self.mm.table.get(page)
        try:
            vma = self.mm.vmas.find(page)
            if vma is None or not vma.flags & right:
                return False
            if entry & (pte.KIND | pte.HUGE) == pte.DEVICE:
                number = entry >> pte.FRAME_SHIFT + ZONE_SHIFT
                if self.memory.zones[number].lost:
                    self._check_there(page, number)
                self.cpu_faults += 1
                await self.home(self, page)
        except OutOfMemory:
            if self.memory.relief.killer is None or not self.memory.is_used_up:
                raise
            return False  # the general way kills somebody for it
        finally:
            lock.release_read()
        return True

    async def _access(self, address: int, data: npt.NDArray[np.uint8], *, write: bool, done: int = 0) -> None:
        """Load into (or store from) `data`, batch by batch: make pages ready, copy in the same step, see to what is in the way.

        So many bytes are `done` already.
        """
        rounds, batch = 0, BATCH_PAGES
        while done < len(data):
            position, left = address + done, len(data) - done
            start = position >> PAGE_SHIFT
            end = min((position + left - 1 >> PAGE_SHIFT) + 1, start + batch)
            missing: MissingPage | None = None
            short: KernelError | None = None
            async with self.mmap_lock.read():
                try:
                    ready, touched = self._touch(start, end, write=write, keep=_whole(position, left) if write else None)
                except KernelError as error:
                    if end - start > 1 and not isinstance(error, InjectedError):
                        batch = (end - start) // 2  # memory is short: store as far as it goes
                        continue
                    short, ready = error, end
                    length = 0
                else:
                    length = min(left, (ready << PAGE_SHIFT) - position)
                if length > 0:
                    (self._copy_in if write else self._copy_out)(position, data[done : done + length])
                    done += length
                    rounds = 0
                    short = touched.error if isinstance(touched.error, InjectedError) else None
                if ready < end and short is None:
                    rounds += 1
                    try:
                        await self._resolve(ready, touched, rounds)
                    except MissingPage as wanted:
                        missing = wanted
                    except KernelError as error:
                        short = error
            if await self._provided(missing, short):
                batch = BATCH_PAGES
            if self.memory.owed is not None:
                await self._pay(address)
            if done < len(data):
                await give_way()

    async def _provided(self, missing: MissingPage | None, short: KernelError | None) -> bool:
        """After a round that left its locks: wait for a page that a userfaultfd fills in, or for memory; whether there is more of that.

        Raises `short` without any.
        """
        if missing is not None:
            await missing.registration.wait(missing.page)
        if short is not None and not await self.relieved(short):
            raise short
        return short is not None

    async def touch(self, address: int, *, write: bool) -> None:
        """Fault one page in as an access to it would, without an access. Raises SegmentationFault, BusError, KernelError(ENOMEM)."""
        page = address >> PAGE_SHIFT
        for rounds in itertools.count(1):
            missing: MissingPage | None = None
            short: KernelError | None = None
            async with self.mmap_lock.read():
                try:
                    ready, touched = self._touch(page, page + 1, write=write, keep=None)
                    if ready > page:
                        return
                    await self._resolve(page, touched, rounds)
                except MissingPage as wanted:
                    missing = wanted
                except KernelError as error:
                    short = error
            await self._provided(missing, short)
            await give_way()

    def _copy_out(self, address: int, out: npt.NDArray[np.uint8]) -> None:
        self.memory.read(self._frames(address, len(out)), address & PAGE_MASK, out)

    def _copy_in(self, address: int, data: npt.NDArray[np.uint8]) -> None:
        self.memory.write(self._frames(address, len(data)), address & PAGE_MASK, data)

    def _frames(self, address: int, length: int) -> Words:
        return pte.frames_of(self.mm.table.read(address >> PAGE_SHIFT, (address + length - 1 >> PAGE_SHIFT) + 1))


def _whole(address: int, length: int) -> tuple[int, int]:
    """The pages that [address, address + length) covers whole."""
    return address + PAGE_MASK >> PAGE_SHIFT, address + length >> PAGE_SHIFT


def _flat(data: bytearray | memoryview | npt.NDArray[Any]) -> bytes | memoryview:
    """The bytes of anything that holds some: a copy of a little, a view of much."""
    if not isinstance(data, np.ndarray):
        return memoryview(data).cast("B")
    if data.nbytes <= COPIED_BYTES:
        return data.tobytes()
    return memoryview(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data).cast("B")
