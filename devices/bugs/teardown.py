"""Bugs around ends: of a mapping, of a page's life, of a driver, of a device."""

from __future__ import annotations

from collections.abc import Awaitable, Coroutine
from errno import EFAULT
from types import MappingProxyType

import numpy as np
import trio

from hmmnet.devices.access import Foreign, Steps, store_range
from hmmnet.devices.context import Context
from hmmnet.devices.memory import physical
from hmmnet.devices.models.base import Opened
from hmmnet.devices.models.gpu import Gpu
from hmmnet.errors import KernelError
from hmmnet.pages import HMM_PFN_FRAME_MASK, HMM_PFN_REQ_FAULT, HMM_PFN_REQ_WRITE, HUGE_PAGES, PAGE_SHIFT, PAGE_SIZE, from_wire, to_wire
from hmmnet.pagetable import PageTable
from hmmnet.wire.messages import FreeFrames, Invalidate

from .driver import Driver

WANTED = HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE
WORD_BYTES = 8
SCAN_PAGES = 64
"""Pages of one DMA request."""
_BLOCK = np.uint64(HUGE_PAGES)


class Waits(Driver):
    """Answers an invalidation when what was begun through the old entries is over."""

    extra = MappingProxyType({"scan": "scan"})

    async def scan(self, opened: Opened, start: int, end: int) -> int:
        """See `Driver`: look all pages up, then read them where they are, in one DMA of several requests."""
        context = opened.context
        words = await context.range_fault(start, end, HMM_PFN_REQ_FAULT)
        pages, addresses = np.arange(start, end, dtype=np.uint64), physical(words & np.uint64(HMM_PFN_FRAME_MASK))
        await context.transfer(
            [
                Foreign(pages[low : low + SCAN_PAGES], addresses[low : low + SCAN_PAGES], PAGE_SIZE, None, lambda _: None)
                for low in range(0, end - start, SCAN_PAGES)
            ]
        )
        return end - start


class AckFirst(Waits):
    """Answers it when the entries are gone, and does not wait for DMA."""

    def invalidate(self, message: Invalidate) -> Awaitable[None] | None:
        """See `Device`."""
        waiting = super().invalidate(message)
        if isinstance(waiting, Coroutine):
            waiting.close()
        return None


class FreesLost(Gpu):
    """Forgets every other call of folio_free."""

    calls = 0

    def free_frames(self, message: FreeFrames) -> None:
        """See `Device`."""
        self.calls += 1
        if self.calls % 2:
            super().free_frames(message)


class FreesWhole(Gpu):
    """Was never told that a huge page can be unmapped in part: the first frame of it that is freed frees the whole."""

    def free_frames(self, message: FreeFrames) -> None:
        """See `Device`."""
        blocks = np.unique(from_wire(message.frames) // _BLOCK)
        live = self.memory.live_frames()
        super().free_frames(FreeFrames(to_wire(live[np.isin(live // _BLOCK, blocks)])))


class EvictsFirstFrame(Gpu):
    """Evicts its memory when a context is closed, from the first frame that it has in use to the last: of none there is no first."""

    async def closing(self, opened: Opened) -> None:  # noqa: ARG002 - all of the device's memory, whoever closes
        """See `Device`."""
        frames = self.memory.live_frames()
        first, last = int(frames[0]), int(frames[-1])
        await self.bus.evict(frames[(frames >= first) & (frames <= last)], "close")


_tables: trio.lowlevel.RunVar[dict[tuple[str, int], PageTable]] = trio.lowlevel.RunVar("tables")


class KeepsTable(Gpu):
    """Finds the page table of its last life in its memory after a reset, and goes on using it."""

    async def opened(self, opened: Opened) -> None:
        """See `Device`."""
        mirror = opened.context.mirror
        tables = _tables_of_the_run()
        mirror.table = tables.setdefault((self.spec.name, mirror.process), mirror.table)


def _tables_of_the_run() -> dict[tuple[str, int], PageTable]:
    """Memory that outlives a device of a simulated machine."""
    try:
        return _tables.get()
    except LookupError:
        made: dict[tuple[str, int], PageTable] = {}
        _tables.set(made)
        return made


def _fill(address: int, words: int, value: int) -> Steps:
    """A kernel: `words` words from `address` on become `value`."""
    yield store_range(address, np.full(words, value, np.uint64))
    return {}


class ByMirror(Driver):
    """A network card: pages are registered once, and later messages land in them. It asks its mirror for each message."""

    extra = MappingProxyType({"register": "register_pages", "receive": "receive_message"})
    arrived = 0
    """Messages so far: what the next one is made of."""

    async def register_pages(self, opened: Opened, start: int, end: int) -> int:
        """See `Driver`."""
        await self.register(opened.context, start, end)
        return end - start

    async def receive_message(self, opened: Opened, start: int, end: int) -> int:
        """See `Driver`."""
        self.arrived += 1
        await self.receive(opened, start, end)
        return end - start

    async def register(self, context: Context, start: int, end: int) -> None:
        """Make pages ready to be written."""
        await context.range_fault(start, end, WANTED)

    async def receive(self, opened: Opened, start: int, end: int) -> None:
        """Store the message's number to every word. Raises KernelError(EFAULT)."""
        words = (end - start) * PAGE_SIZE // WORD_BYTES
        arguments = {"address": start << PAGE_SHIFT, "words": words, "value": self.arrived}
        outcome = await opened.engine.run(_fill, arguments, "remote")
        if outcome.error:
            raise KernelError(outcome.errno or EFAULT, "receive", outcome.error)


class ByNumber(ByMirror):
    """Remembers frame numbers instead, as if a lookup were a pin: the race against the next migration is lost."""

    async def register(self, context: Context, start: int, end: int) -> None:
        """See `ByMirror`."""
        words = await context.range_fault(start, end, WANTED)
        self._frames = dict(enumerate((words & np.uint64(HMM_PFN_FRAME_MASK)).tolist(), start))

    async def receive(self, opened: Opened, start: int, end: int) -> None:
        """See `ByMirror`."""
        pages = np.arange(start, end, dtype=np.uint64)
        frames = np.array([self._frames[page] for page in range(start, end)], dtype=np.uint64)
        message = np.full((end - start) * PAGE_SIZE // WORD_BYTES, self.arrived, np.uint64)
        await self.bus.write(opened.context.number, pages, physical(frames), PAGE_SIZE, message.view(np.uint8))
