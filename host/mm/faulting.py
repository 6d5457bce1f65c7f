"""CPU faults: what stands in the way of an access to a page, and how it goes away (handle_mm_fault). The lowest layer of `Space`.

`Faulting` makes pages ready as far as that goes at once (`fault.py`), and waits for what is in the way of the rest: a device that has the
page, a migration, mirrors that must be told of a copy. Loads and stores (`access.py`) fault for themselves; `fault_in` is the same for
whoever faults on a program's behalf: hmm_range_fault, populate, pins.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import trio

from hmmnet.errors import BusError, HmmnetError, InjectedError, KernelError, OutOfMemory, SegmentationFault, SignalError
from hmmnet.faults.injector import Points
from hmmnet.host.interfaces import NO_OWNER, Event
from hmmnet.pages import FEW, HUGE_PAGES, PAGE_SHIFT, ZONE_SHIFT, Words, all_of, any_of, word_of
from hmmnet.sleeping import sleep

from . import fault, huge, pte
from .fault import Cause
from .filemap import end_in
from .frames import PhysicalMemory
from .locks import Gate, RwLock
from .mm import Mm
from .userfault import MissingPage
from .vma import VM_ACCESS, VM_HUGETLB, VM_WRITE, Vma

HOME_PAGES_MAX = 4096
"""Pages that one CPU access brings home from a device in one go (16 MiB: enough to fill a stream's window, little enough to wait for)."""
SPINS_MAX = 64
PATIENCE_S = 1e-6
"""Rounds without a pause, and the pause in each after those: who has the page may need time, which only sleep lets pass in simulation."""
ROUNDS_MAX = 10_000
"""Rounds in which a fault may find its page taken away again before it counts as a bug (the kernel would go on for ever)."""

T = TypeVar("T")

Home = Callable[[Any, "Words | int"], Awaitable[None]]
"""migrate_to_ram(space, pages): bring these pages, all of one zone, or this one page, home. Called with the mmap lock held for reading.

Raises BusError when the data are lost. A page that is still on the device afterwards is tried again."""


class Notifier(Protocol):
    """What an address space needs of the hub."""

    def invalidate(self, event: Event, start: int, end: int, owner: int = NO_OWNER) -> AbstractAsyncContextManager[object]:
        """Entered before [start, end) changes, left afterwards."""
        ...

    def pass_through(self, page: int, owner: int) -> bool:
        """See `interfaces.Notifier.pass_through`."""
        ...

    def try_invalidate(self, start: int, end: int) -> bool:
        """Begin an invalidation that waits for nobody, to be ended by `range_end`; False, and nothing begun, where someone must be told."""
        ...

    def range_end(self) -> None:
        """The end of an invalidation that `try_invalidate` has begun."""
        ...


class _ReadKillable:
    """See `Faulting.read_killable`."""

    __slots__ = ("_space",)

    def __init__(self, space: Faulting) -> None:
        self._space = space

    async def __aenter__(self) -> None:
        space = self._space
        if space.killed or not space.mmap_lock.try_read():
            await space.lock_killable()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._space.mmap_lock.release_read()


class Faulting:
    """Process `number`'s page table, its locks, and the faults on its pages; `home` is migrate_to_ram."""

    def __init__(self, number: int, memory: PhysicalMemory, hub: Notifier, home: Home, family: int = 0) -> None:
        self.number = number
        self.memory = memory
        self.hub = hub
        self.home = home
        self.mm = Mm(number, memory, family)
        self.mmap_lock = RwLock()
        self.cpu_faults = 0
        """CPU faults that brought a page home, so far."""
        self._gate = Gate()
        self.mm.migration_ended = self._gate.open
        self.killed = False
        """A fatal signal is pending: nobody waits for the mmap lock on this process's behalf any more."""
        self._killable: set[trio.CancelScope] = set()

    def kill(self) -> None:
        """A fatal signal: who waits in `read_killable` gets EINTR."""
        self.killed = True
        for scope in self._killable:
            scope.cancel()

    def read_killable(self) -> _ReadKillable:
        """mmap_read_lock_killable: the mmap lock for reading. Raises KernelError(EINTR) when the process is killed before it is had."""
        return _ReadKillable(self)

    async def lock_killable(self) -> None:
        """Take the mmap lock for reading, if that has to be waited for, or is not to be had any more. Raises KernelError(EINTR)."""
        with trio.CancelScope() as scope:
            self._killable.add(scope)
            try:
                if self.killed:
                    scope.cancel()
                    await trio.lowlevel.checkpoint()
                await self.mmap_lock.wait(writer=False)
            finally:
                self._killable.discard(scope)
        if scope.cancelled_caught:
            raise KernelError(errno.EINTR, "mmap_read_lock_killable", f"process {self.number} was killed meanwhile")

    async def relieved(self, error: KernelError) -> bool:
        """A call of this process ended with `error`: whether it can be taken anew; see `Relief.had`. Hold no lock."""
        return await self.memory.relief.had(error, self.number)

    async def relieving(self, call: Callable[[], Awaitable[T]]) -> T:
        """What `call` answers, which is taken anew as often as it is `relieved`. Hold no lock."""
        return await self.memory.relief.anew(call, self.number)

    @property
    def points(self) -> Points:
        """See `interfaces.AddressSpace`."""
        return self.memory.points

    # --- a fault ------------------------------------------------------------------------------------------------------------------

    def _touch(self, start: int, end: int, *, write: bool, keep: tuple[int, int] | None) -> tuple[int, fault.Touched]:
        """Make [start, end) ready as far as that goes now: the first page that is not, and why.

        `keep`: pages overwritten whole. They may hold what was in their frames before: store to what is ready before you wait for anything.
        Raises SegmentationFault and KernelError(ENOMEM) when the very first page is refused.
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
            try:
                if stop - page == 1 and fault.touch_one(self.mm, vma, page, write):
                    page = stop
                    continue
                if stop - page <= FEW and fault.settled_few(self.mm, page, stop, write):
                    page = stop
                    continue
                pages = np.arange(page, stop, dtype=np.uint64)
                kept = None if keep is None else slice(max(0, keep[0] - page), max(0, keep[1] - page))
                touched = fault.touch(self.mm, vma, pages, write, kept)
            except KernelError as error:
                if page > start:
                    return page, fault.Touched(0, error=error)
                raise
            page += touched.done
            if page < stop:
                return page, touched
        return page, fault.Touched(0)

    async def _resolve(self, page: int, touched: fault.Touched, rounds: int) -> None:
        """See to what stands in the way of an access to `page`. The mmap lock is held for reading."""
        if self.mm.unstable:
            raise BusError(page << PAGE_SHIFT, f"page 0x{page:x} of process {self.number}, which is being killed, was reaped")
        if rounds > ROUNDS_MAX:
            raise HmmnetError(f"page 0x{page:x} of process {self.number} was taken away {ROUNDS_MAX} times before it could be accessed")
        end = page + touched.blocked
        if touched.cause is Cause.MIGRATION:
            await self.wait_migration(page)
        elif touched.cause is Cause.DEVICE:
            await self._bring_home(page, min(touched.blocked, HOME_PAGES_MAX))
        elif touched.cause is Cause.COW:
            await self._break_cow(page, end)
        elif touched.cause is Cause.EXCLUSIVE:
            async with self.hub.invalidate(Event.CLEAR, page, end):
                fault.restore_exclusive(self.mm, np.arange(page, end, dtype=np.uint64))
        elif touched.cause is Cause.MARKER:  # handle_pte_marker
            raise self.signal_for(page << PAGE_SHIFT, self.mm.refusal(page, write=False))
        elif touched.cause is Cause.MISSING:
            vma = self.mm.vmas.find(page)
            assert vma is not None, "a missing page lies in a VMA"
            if vma.userfault is not None and not vma.userfault.sigbus:
                raise MissingPage(self.number, page, vma.userfault)
            raise BusError(page << PAGE_SHIFT, f"page 0x{page:x} of process {self.number} is missing, and a userfaultfd wants SIGBUS")
        elif touched.cause is Cause.BEYOND:
            raise BusError(page << PAGE_SHIFT, self._behind(page))
        if rounds > SPINS_MAX:
            await sleep(PATIENCE_S)

    async def _break_cow(self, page: int, end: int) -> None:
        """wp_page_copy, or reuse, for [page, end) of one VMA."""
        vma = self.mm.vmas.find(page)
        assert vma is not None, "a page to be copied lies in a VMA"
        for block in huge.huge_blocks(self.mm, np.arange(page, end, dtype=np.uint64)):
            async with self.hub.invalidate(Event.CLEAR, block, block + HUGE_PAGES):
                huge.break_cow(self.mm, vma, block)
        async with self.hub.invalidate(Event.CLEAR, page, end):
            fault.break_cow(self.mm, vma, np.arange(page, end, dtype=np.uint64))

    async def _bring_home(self, page: int, count: int) -> None:
        """A CPU access found device-private pages: migrate_to_ram for up to `count` of them, all of one zone; a huge page comes whole."""
        if self.mm.table.get(page) & pte.HUGE:
            page, count = huge.block_of(page), HUGE_PAGES
        entries = self.mm.table.read(page, page + count)
        alike = entries & pte.HUGE == int(entries[0]) & pte.HUGE
        if not all_of(alike):
            count = int(np.argmin(alike))
            entries = entries[:count]
        zones = pte.zones_of(entries)
        same = zones == zones[0]
        if not all_of(same):
            count = int(np.argmin(same))
        self._check_there(page, int(zones[0]))
        if await self.memory.breaking.wait(pte.frames_of(entries[:1])):
            return
        self.cpu_faults += 1 if entries[0] & pte.HUGE else count
        try:
            await self.home(self, np.arange(page, page + count, dtype=np.uint64))
        except OutOfMemory:
            if self.memory.is_used_up or entries[0] & pte.HUGE:
                raise
            await self.home(self, page)  # memory is short for all of them, which a CPU would have brought home one by one

    def _check_there(self, page: int, number: int) -> None:
        if self.memory.zones[number].lost:
            raise BusError(page << PAGE_SHIFT, self._lost(page, number))

    def _lost(self, page: int, number: int) -> str:
        zone = self.memory.zones[number]
        return f'page 0x{page:x} of process {self.number} had its only copy on device "{zone.owner}", which was lost: {zone.lost}'

    def _behind(self, page: int) -> str:
        return f"page 0x{page:x} of process {self.number} lies behind the end of the file mapped there"

    def why_not(self, page: int, *, write: bool, start: int, end: int) -> str:
        """Why `page` of [start, end), which was asked for (for a `write`), cannot be had: the words of a CPU fault there."""
        entry, vma = self.mm.table.get(page), self.mm.vmas.find(page)
        number = entry >> pte.FRAME_SHIFT + ZONE_SHIFT
        if entry & pte.KIND == pte.DEVICE and self.memory.zones[number].lost:
            why = self._lost(page, number)
        elif entry == 0 and vma is not None and vma.file is not None and vma.may_read and page >= end_in(vma):
            why = self._behind(page)
        else:
            why = self.mm.refusal(page, write=write)
        return f"{why} (asked for: pages 0x{start:x} to 0x{end - 1:x})"

    def signal_for(self, address: int, why: str = "") -> SignalError:
        """What an access to `address` that cannot be served ends with, and `why`: SIGBUS where the data is gone, else SIGSEGV.

        A page that died with its device is named with it, whatever a device that was at it knows: it asked before that.
        """
        page = address >> PAGE_SHIFT
        entry = self.mm.table.get(page)
        if entry & pte.KIND == pte.DEVICE:
            number = entry >> pte.FRAME_SHIFT + ZONE_SHIFT
            if not self.memory.zones[number].lost:
                return SegmentationFault(address, why)
            lost = self._lost(page, number)
            return BusError(address, why if lost in why else f"{why}; {lost}")
        vma = self.mm.vmas.find(page)
        beyond = vma is not None and vma.file is not None and vma.may_read and page >= end_in(vma)
        marked = entry & pte.KIND == pte.MARKER and entry >> pte.FRAME_SHIFT != pte.MARKER_GUARD
        return BusError(address, why) if marked or (entry == 0 and beyond) else SegmentationFault(address, why)

    # --- huge pages ---------------------------------------------------------------------------------------------------------------

    async def split_blocks(self, blocks: Iterable[int]) -> None:
        """Map those of the aligned `blocks` page by page that are mapped as one (split_huge_pmd)."""
        for block in blocks:
            if self.mm.table.get(block) & pte.HUGE:
                async with self.hub.invalidate(Event.CLEAR, block, block + HUGE_PAGES):
                    huge.split_entries(self.mm, block)

    async def split_edges(self, *edges: int) -> None:
        """Something begins or ends at the pages `edges`: no huge page may straddle them (vma_adjust_trans_huge).

        Raises KernelError(EINVAL) inside a page of a hugetlb mapping, which cannot be split (hugetlb_vm_op_split).
        """
        for page in edges:
            vma = self.mm.vmas.find(page) if page & huge.HUGE_MASK else None
            if vma is not None and vma.flags & VM_HUGETLB:
                raise KernelError(errno.EINVAL, "split", f"page 0x{page:x} of process {self.number} is inside a page of 2 MiB (hugetlb)")
        await self.split_blocks(huge.block_of(page) for page in edges if page & huge.HUGE_MASK)

    # --- on behalf of others ------------------------------------------------------------------------------------------------------

    async def wait_migration(self, page: int) -> None:
        """migration_entry_wait: return when `page` is under migration no more. Hold the mmap lock for reading, be in no invalidation."""
        while self.mm.table.get(page) & pte.KIND == pte.MIGRATION:
            await self._gate.wait()

    async def fault_in(self, pages: Words, write: npt.NDArray[np.bool_], node: int | None = None) -> None:
        """handle_mm_fault for each of `pages` (ascending). Needs the mmap lock for reading. New frames come from `node`, if that is given.

        Raises KernelError: EFAULT (no mapping, data lost), EPERM (no right to write), ENOMEM, for the first page that cannot be had.
        """
        assert self.mmap_lock.held, "fault_in without the mmap lock"
        edges = (write[1:] != write[:-1]).nonzero()[0] + 1
        for part, wanted in zip(np.split(pages, edges), np.split(write, edges), strict=True):
            if len(part):
                await self._fault_pages(part, write=bool(wanted[0]), node=node)

    async def _fault_pages(self, pages: Words, *, write: bool, node: int | None = None, rights: int = VM_ACCESS) -> None:
        """`fault_in` of pages that all want the same; with no `rights` in mappings without any, too (do_swap_page asks for none)."""
        _, error = await self._fault_until(pages, write=write, node=node, rights=rights)
        if error is not None:
            raise error

    async def _fault_until(
        self, pages: Words, *, write: bool, node: int | None = None, rights: int = VM_ACCESS
    ) -> tuple[int, KernelError | None]:
        """How many of `pages` could be faulted in, and why not more. Raises OutOfMemory: that one is taken anew."""
        done, rounds, batch = 0, 0, len(pages)
        try:
            while done < len(pages):
                page = int(pages[done])
                vma = self._faultable(page, write=write, rights=rights)
                stop = min(int(np.searchsorted(pages, vma.end)), done + batch)
                try:
                    touched = fault.touch(self.mm, vma, pages[done:stop], write, node=node)
                except KernelError as error:
                    if stop - done == 1 or isinstance(error, InjectedError) or error.code != errno.ENOMEM:
                        raise
                    batch = (stop - done) // 2  # memory, or a group's, is short: as far as it goes, as the kernel does, page by page
                    continue
                rounds = 0 if touched.done else rounds + 1
                done += touched.done
                if done < stop:
                    run = pages[done : done + touched.blocked]
                    gaps = run[1:] != run[:-1] + word_of(1)
                    together = int(np.argmax(gaps)) + 1 if any_of(gaps) else len(run)
                    await self._resolve(int(run[0]), fault.Touched(0, touched.cause, together), rounds)
        except SignalError as error:
            refused = KernelError(errno.EFAULT, "handle_mm_fault", error.why)
            refused.__cause__ = error
            return done, refused
        except OutOfMemory:
            raise
        except KernelError as error:
            return done, error
        return done, None

    def _faultable(self, page: int, *, write: bool, rights: int) -> Vma:
        vma = self.mm.vmas.find(page)
        if self.mm.unstable:
            raise KernelError(
                errno.EFAULT, "handle_mm_fault", f"page 0x{page:x} of process {self.number}, which is being killed, was reaped"
            )
        if vma is None or (rights and not vma.flags & rights):
            raise KernelError(errno.EFAULT, "handle_mm_fault", self.mm.refusal(page, write=write))
        if write and not vma.flags & VM_WRITE:
            raise KernelError(errno.EPERM, "handle_mm_fault", self.mm.refusal(page, write=write))
        return vma
