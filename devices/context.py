"""One open context: a mirror, and what a driver does for it: subscribe, fault ranges in, migrate, reach foreign memory by DMA.

The steps of table A4 on the device's side, with the two waits that keep data from being lost:

- Before pages that the device maps *where they are* (system memory, over the link) may move, their entries are hidden and DMA under way
  is waited for (`quiesce`); a store that is still on the wire would else land in a page that has left. Entries of pages that
  stayed come back (test_hmm never drops them: that is how it reports success for pages that did not move).
- An `Invalidate` is answered only when DMA on its range is over. New DMA cannot begin: the entries are gone first.

Loads and stores to the device's *own* memory need no such wait. Translation and access are one stretch of synchronous code, the process has
one thread, and messages are handled by the same thread: when a `CopyOut` drops the entries, no access is half way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from errno import EBUSY, EFAULT
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import trio

from hmmnet.errors import KernelError
from hmmnet.pages import (
    HUGE_PAGES,
    HUGE_SHIFT,
    LARGE,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_WRITE,
    PAGES_MAX,
    Words,
    bits_in_any,
    has_large,
    largest,
    page_by_page,
    pages_in,
    run_bounds,
    smallest,
    to_wire,
    word_of,
)
from hmmnet.sleeping import Completion
from hmmnet.wire.messages import Migrate, RangeFault

from .access import Foreign
from .bus import SELECT_COMPOUND, SELECT_DEVICE_COHERENT, SELECT_DEVICE_PRIVATE, SELECT_SYSTEM, Bus
from .copyengine import CopyEngines
from .listed import Moved, matched, positioned, positions
from .locks import RangeLock
from .memory import Memory
from .mirror import Mirror, Subscription, Watch, frames_of
from .traffic import Traffic

Bytes = npt.NDArray[np.uint8]
RETRIES_MAX = 1000
"""Stale answers to one range fault. The time limit ends the loop first unless answers come in no time at all (simulation)."""
RANGE_FAULT_TIMEOUT_S = 1.0
"""HMM_RANGE_DEFAULT_TIMEOUT, in real seconds."""
MIGRATE_PAGES_MAX = 1 << 16
"""Pages of one migration (256 MiB): bounds the frames granted and not yet used."""

DMA_ELEMENTS_MAX = 1 << 16
DMA_BYTES_MAX = 64 << 20
"""Elements and bytes of one DMA request: half a megabyte of addresses, 64 chunks of data."""

_MIGRATE = word_of(MIGRATE_PFN_MIGRATE)
_WRITE = word_of(MIGRATE_PFN_WRITE)
_PAGE = word_of(LARGE - 1)
_BLOCK = word_of(HUGE_SHIFT)
_NO_PAGES = np.zeros(0, dtype=np.uint64)


@dataclass(eq=False)
class MirroredProcess:
    """A process as this device sees it: its contexts here (a unit may be opened twice), and the turns they take."""

    number: int
    contexts: list[Context] = field(default_factory=list)
    turns: RangeLock = field(default_factory=RangeLock)


@dataclass(eq=False)
class _Dma:
    """DMA under way on pages [first, last]."""

    first: int
    last: int
    ended: Completion = field(default_factory=Completion)


class Context:
    """One mirror and its driver."""

    def __init__(
        self, mirror: Mirror, process: MirroredProcess, memory: Memory, copies: CopyEngines, bus: Bus, slab_pages: int, coherent: bool
    ) -> None:
        self.mirror = mirror
        self.number = mirror.context
        self.process = process
        self.memory = memory
        self.points = memory.points
        self.traffic = Traffic()
        self._copies = copies
        self._bus = bus
        self._slab_pages = slab_pages
        self._select_own = SELECT_DEVICE_COHERENT if coherent else SELECT_DEVICE_PRIVATE
        self.select_in = SELECT_SYSTEM
        """From which memories pages come here (MIGRATE_VMA_SELECT), unless who migrates says so."""
        self._slabs: dict[int, Subscription] = {}
        self._dma: list[_Dma] = []

    async def at(self, name: str, start: int = 0, end: int = 0) -> None:
        """A step boundary (`hmmnet.faults.points`)."""
        await self.points.at(name, process=self.process.number, start=start, pages=end - start)

    # --- subscriptions --------------------------------------------------------------------------------------------------------

    def slabs(self, start: int, end: int) -> list[tuple[int, int]]:
        """[start, end) cut at the borders of the intervals that are subscribed to."""
        cuts: list[tuple[int, int]] = []
        while start < end:
            stop = min(end, (start // self._slab_pages + 1) * self._slab_pages)
            cuts.append((start, stop))
            start = stop
        return cuts

    async def subscription(self, page: int) -> Subscription:
        """The subscription of the slab around `page`, inserted on first use."""
        slab = page // self._slab_pages
        start, end = slab * self._slab_pages, min((slab + 1) * self._slab_pages, PAGES_MAX)
        if slab not in self._slabs:
            async with self.process.turns.hold(start, end):
                if slab not in self._slabs:
                    self._slabs[slab] = await self._subscribe(start, end)
        return self._slabs[slab]

    async def _subscribe(self, start: int, end: int) -> Subscription:
        self.mirror.subscribing()
        try:
            reply = await self._bus.subscribe(self.number, start, end, int(self.mirror.end_inclusive))
        except BaseException:
            self.mirror.subscribe_over()
            raise
        return self.mirror.subscribed(reply.subscription, start, end, reply.sequence)

    # --- range faults ---------------------------------------------------------------------------------------------------------

    async def range_fault(
        self,
        start: int,
        end: int,
        default_flags: int,
        inputs: Words | None = None,
        program: Callable[[int, Words], None] | None = None,
        *,
        unlocked: bool = False,
    ) -> Words:
        """read_begin, hmm_range_fault, read_retry and `program` (the mirror's unless given) on [start, end), which lies in one slab.

        `inputs` are words a page whose request bits count beside `default_flags`. `unlocked`: wait for pages that a userfaultfd's owner
        fills in, however long; others may use the range meanwhile. Raises KernelError: EFAULT, EPERM, ENOMEM, and EBUSY after a second
        without progress, which a page that was filled in is.
        """
        for _ in range(RETRIES_MAX if unlocked else 1):
            try:
                return await self._fault_in_turn(start, end, default_flags, inputs, program)
            except KernelError as error:
                if not unlocked or error.code != EFAULT:
                    raise
            await self._wait_for_owner(start, end, default_flags, inputs)
        raise _too_fast(start, end)

    async def _fault_in_turn(
        self,
        start: int,
        end: int,
        default_flags: int,
        inputs: Words | None,
        program: Callable[[int, Words], None] | None,
    ) -> Words:
        """`range_fault` that waits for no program."""
        subscription = await self.subscription(start)
        request = self._request(subscription, start, end, default_flags, inputs)
        deadline_s = trio.current_time() + self._bus.clock.real(RANGE_FAULT_TIMEOUT_S)
        async with self.process.turns.hold(start, end):
            for _ in range(RETRIES_MAX):
                watch = self.mirror.watch(start, end, subscription.number)
                try:
                    sequence, words = await self._bus.range_fault(request)
                    if self.points.armed:
                        await self.at("device.before_write", start, end)
                    if self.mirror.is_current(subscription, sequence, watch, words):
                        (program or self.mirror.program)(start, words)
                        if self.points.armed:
                            await self.at("device.after_write", start, end)
                        return words
                finally:
                    self.mirror.unwatch(watch)
                if trio.current_time() > deadline_s:
                    break
        raise _too_fast(start, end)

    async def _wait_for_owner(self, start: int, end: int, default_flags: int, inputs: Words | None) -> None:
        """hmm_range_fault_unlocked for nothing but its wait: pages that a userfaultfd's owner fills in are there when this returns.

        Nobody has a turn meanwhile: the owner may be who waits for one (the kernel's fault has dropped its locks by then, too).
        """
        subscription = await self.subscription(start)
        await self._bus.range_fault(self._request(subscription, start, end, default_flags, inputs, unlocked=True))

    def _request(
        self, subscription: Subscription, start: int, end: int, default_flags: int, inputs: Words | None, *, unlocked: bool = False
    ) -> RangeFault:
        return RangeFault(
            self.number,
            subscription.number,
            start,
            end - start,
            default_flags,
            0 if inputs is None else (1 << 64) - 1,
            b"" if inputs is None else to_wire(inputs),
            int(RANGE_FAULT_TIMEOUT_S * 1000),
            unlocked,
        )

    async def make_exclusive(self, start: int, end: int, *, folios: bool = False) -> int:
        """make_device_exclusive on [start, end) in one slab; returns how many pages were had, which are mapped.

        With `folios` make_device_exclusive_range, as in Linux 6.12, whose driver mapped what it had only of a range that could be written
        whole. Raises KernelError: EFAULT or EOPNOTSUPP when not even the first can be had, ENOMEM, EBUSY when others take them back all
        the time.
        """
        subscription = await self.subscription(start)
        async with self.process.turns.hold(start, end):
            for _ in range(RETRIES_MAX):
                watch = self.mirror.watch(start, end, subscription.number)
                try:
                    sequence, words = await self._bus.make_exclusive(self.number, subscription.number, start, end - start, folios=folios)
                finally:
                    self.mirror.unwatch(watch)
                void = watch.dropped or watch.announced  # the lease was over, for example: its end has no sequence
                if subscription.sequence <= sequence and len(words) and not void:
                    had = np.flatnonzero(words).astype(np.uint64)
                    if len(words) == end - start or not folios:
                        for low, high in pairwise(run_bounds(had).tolist()):
                            self.mirror.program_exclusive(start + int(had[low]), words[had[low:high]])
                    return len(had)
        raise KernelError(EBUSY, "make_device_exclusive", f"pages [0x{start:x}, 0x{end:x}) were taken back faster than they could be had")

    # --- migration ------------------------------------------------------------------------------------------------------------

    async def migrate_in(self, start: int, end: int, cause: str, *, compound: bool = False, select: int = 0) -> Moved:
        """migrate_vma to this device's memory, of [start, end) in one slab and at most `MIGRATE_PAGES_MAX` pages; maps what moved.

        With `compound` huge pages go whole, where there are large pages for them. `select`: from which memories, if not `select_in`.

        Frames are offered before it is known which pages will move. Where they were too few for all and some come back unused, the pages
        behind are tried too.
        """
        select = (select or self.select_in) | (SELECT_COMPOUND if compound else 0)
        moved = await self._migrate_offered(start, end, cause, compound=compound, select=select)
        parts = [moved.listed]
        while moved.tried_until < end and not moved.errno and self.memory.free_pages:
            moved = await self._migrate_offered(moved.tried_until, end, cause, compound=compound, select=select)
            parts.append(moved.listed)
        return replace(moved, listed=np.concatenate(parts)) if len(parts) > 1 else moved

    async def _migrate_offered(self, start: int, end: int, cause: str, *, compound: bool, select: int) -> Moved:
        """`migrate_in` as far as there are frames to offer."""
        await self.subscription(start)
        async with self.process.turns.hold(start, end):
            wanted, offered, tried_until = self._grant(start, end, compound=compound)
            if len(wanted) == 0:
                return Moved(_NO_PAGES, tried_until)
            hidden = [(context.mirror, context.mirror.hide(start, end)) for context in self.process.contexts]
            own = next(entries.watch for mirror, entries in hidden if mirror is self.mirror)
            moved = _NO_PAGES
            try:
                for context in self.process.contexts:
                    await context.quiesce(start, end)
                if self.points.armed:
                    await self.at("device.before_migrate", start, end)
                message = Migrate(
                    self.number, start, end - start, "device", select, to_wire(positioned(start, end, wanted, offered)), cause
                )
                reply, words = await self._bus.migrate(message)
                try:
                    if self.points.armed:
                        await self.at("device.migrated", start, end)
                finally:  # whatever ends the wait: what moved is here
                    words, wanted, offered = matched(start, words, wanted, offered)
                    if bits_in_any(words) & MIGRATE_PFN_MIGRATE:
                        took = words & _MIGRATE != 0
                        moved = wanted[took]
                        self._take_in(moved, offered[took], words[took] & _WRITE != 0, own)
                        offered = offered[~took]
            finally:
                for mirror, entries in hidden:
                    mirror.restore(entries, moved)
                self._copies.abandon(offered)
                self.memory.give_back(offered)
            try:
                if self.points.armed:
                    await self.at("device.before_done", start, end)
            finally:
                if reply.migration:
                    self._bus.migrate_done(reply.migration)
        return Moved(moved, min(tried_until, start + reply.tried) if reply.errno else tried_until, reply.errno)

    def _grant(self, start: int, end: int, *, compound: bool) -> tuple[Words, Words, int]:
        """Pages and the frames to offer for them, ascending, large ones for huge pages; and the page behind the last one tried.

        No frame is offered for a page that is here already, nor when memory is full.
        """
        heads: dict[int, int] = {}
        if compound and self.memory.free_pages >= end - start:
            for block in self.mirror.vacant(start, end).tolist():
                head = self.memory.grant_large()
                if head is None:
                    break
                heads[block] = head
        if not heads:
            return self._grant_small(np.arange(start, end, dtype=np.uint64), end, compound=compound)
        large = np.array(list(heads), np.uint64) << _BLOCK | word_of(LARGE)
        large_frames = np.array(list(heads.values()), np.uint64) | word_of(LARGE)
        if len(heads) * HUGE_PAGES == end - start:
            return large, large_frames, end
        pages = np.arange(start, end, dtype=np.uint64)
        pages = pages[~np.isin(pages >> _BLOCK, (large & _PAGE) >> _BLOCK)]
        pages, frames, tried_until = self._grant_small(pages, end, compound=compound)
        pages, frames = np.concatenate((large, pages)), np.concatenate((large_frames, frames))
        order = np.argsort(pages & _PAGE, kind="stable")
        return pages[order], frames[order], tried_until

    def _grant_small(self, pages: Words, end: int, *, compound: bool) -> tuple[Words, Words, int]:
        """`_grant` for `pages`; blocks of them that can go whole get one aligned run all the same, and large frames."""
        entries = self.mirror.translate(pages)
        wanted = pages[(entries == 0) | ~self.memory.owns(frames_of(entries))] if bits_in_any(entries) else pages
        count = min(len(wanted), self.memory.free_pages)
        tried_until = end if count == len(wanted) else int(wanted[count])
        wanted = wanted[:count]
        if count == 0:
            return wanted, wanted, tried_until
        if self.points.armed and self.points.fails(
            "device.alloc.small", process=self.process.number, start=int(pages[0]), pages=len(pages)
        ):
            return _NO_PAGES, _NO_PAGES, end
        if compound and count >= HUGE_PAGES:
            blocks, counts = np.unique(wanted >> _BLOCK, return_counts=True)
            heads = [(block, head) for block in blocks[counts == HUGE_PAGES].tolist() if (head := self.memory.grant_large()) is not None]
            large = np.array([block for block, _ in heads], np.uint64)
            wanted = wanted[~np.isin(wanted >> _BLOCK, large)]
        else:
            heads, large = [], _NO_PAGES
        frames = self.memory.grant(len(wanted))
        assert frames is not None, "free_pages said that there are enough"
        if not heads:
            return wanted, frames, tried_until
        wanted = np.concatenate((wanted, large << _BLOCK | word_of(LARGE)))
        frames = np.concatenate((frames, np.array([head for _, head in heads], np.uint64) | word_of(LARGE)))
        order = np.argsort(wanted & _PAGE, kind="stable")
        return wanted[order], frames[order], tried_until

    def _take_in(self, pages: Words, frames: Words, writable: npt.NDArray[np.bool_], watch: Watch) -> None:
        """Pages moved into granted frames: they live here now, and the mirror says so unless they were invalidated meanwhile."""
        self.memory.keep(frames)
        self.traffic.migrations += 1
        self.traffic.pages_in += pages_in(pages)
        if watch.dropped and has_large(pages):
            writable = np.repeat(writable, np.where(pages >= word_of(LARGE), HUGE_PAGES, 1))
            pages, frames = page_by_page(pages), page_by_page(frames)
        if watch.dropped:
            kept = watch.brings(pages & _PAGE)
            pages, frames, writable = pages[kept], frames[kept], writable[kept]
        self.mirror.program_own(pages, frames, writable)

    async def migrate_out(self, start: int, end: int, cause: str) -> Moved:
        """migrate_vma of own pages in [start, end) home; the entries go when the host asks for the copy."""
        async with self.process.turns.hold(start, end):
            message = Migrate(self.number, start, end - start, "system", self._select_own, b"", cause)
            reply, words = await self._bus.migrate(message)
        moved = positions(start, words)[words & _MIGRATE != 0]
        self.traffic.migrations += bool(len(moved))
        self.traffic.pages_out += pages_in(moved)
        return Moved(moved, end, reply.errno)

    # --- DMA ------------------------------------------------------------------------------------------------------------------

    async def transfer(self, parts: Sequence[Foreign]) -> None:
        """Do the foreign parts of an access; call it in the same stretch of code that looked their entries up.

        All are registered before the first await, so an invalidation or migration that drops the entries later waits for them.
        """
        under_way = [_Dma(smallest(part.pages), largest(part.pages)) for part in parts]
        self._dma += under_way
        try:
            for part in parts:
                await self._transfer(part)
        finally:
            for dma in under_way:
                self._dma.remove(dma)
                dma.ended.set()

    async def _transfer(self, part: Foreign) -> None:
        """One part, in pieces that one message and one stream can hold."""
        step = min(DMA_ELEMENTS_MAX, DMA_BYTES_MAX // part.size)
        read: list[Bytes] = []
        for first in range(0, len(part.addresses), step):
            pages, addresses = part.pages[first : first + step], part.addresses[first : first + step]
            if part.data is None:
                read.append(await self._bus.read(self.number, pages, addresses, part.size))
            else:
                data = part.data[first * part.size : (first + len(addresses)) * part.size]
                await self._bus.write(self.number, pages, addresses, part.size, data)
        nbytes = len(part.addresses) * part.size
        if part.data is None:
            part.land(read[0] if len(read) == 1 else np.concatenate(read))
            self.traffic.remote_read_bytes += nbytes
        else:
            self.traffic.remote_written_bytes += nbytes

    def is_busy(self, start: int, end: int) -> bool:
        """Whether DMA that may touch [start, end) is under way."""
        return any(dma.first < end and start <= dma.last for dma in self._dma)

    async def quiesce(self, start: int, end: int) -> None:
        """Wait for DMA that began on [start, end) before now. With the entries gone first, none follows."""
        for dma in [dma for dma in self._dma if dma.first < end and start <= dma.last]:
            await dma.ended.wait()


def cut(start: int, end: int, most: int) -> list[tuple[int, int]]:
    """[start, end) in pieces of at most `most` pages (a power of two), cut where a piece of that size would be aligned: in no huge page."""
    edges = [start, *range((start // most + 1) * most, end, most), end]
    return [(low, high) for low, high in pairwise(edges) if low < high]


def _too_fast(start: int, end: int) -> KernelError:
    return KernelError(EBUSY, "hmm_range_fault", f"pages [0x{start:x}, 0x{end:x}) changed faster than they could be read")
