"""Bugs of drivers that give memory out in chunks and have to evict when there is no more."""

from __future__ import annotations

from collections import OrderedDict
from types import MappingProxyType

import trio

from hmmnet.devices.context import Context
from hmmnet.devices.models.base import Opened, Wiring
from hmmnet.devices.spec import Spec

from .driver import Driver

CHUNK_PAGES = 256
"""1 MiB."""
LOOK_S = 5e-3
"""Emulated seconds between looks whether memory was freed."""


class ChunksTogether(Driver):
    """Pulls a range in when it has room for the whole of it, evicting what was pulled longest ago. A range that is being pulled stays."""

    extra = MappingProxyType({"pull": "pull"})

    def __init__(self, spec: Spec, zone: int, wiring: Wiring) -> None:
        super().__init__(spec, zone, wiring)
        self._turn = trio.Lock()
        self._here: OrderedDict[tuple[Context, int, int], None] = OrderedDict()
        """Ranges that were pulled in, the oldest first."""

    async def pull(self, opened: Opened, start: int, end: int) -> int:
        """See `Driver`."""
        async with self._turn:
            await self._make_room(end - start)
            moved = await opened.context.migrate_in(start, end, "fault")
            self._here[opened.context, start, end] = None
        return len(moved.pages)

    async def _make_room(self, pages: int) -> None:
        while self.memory.free_pages < pages and self._here:
            (context, start, end), _ = self._here.popitem(last=False)
            await context.migrate_out(start, end, "evict")


class ChunksOneByOne(ChunksTogether):
    """Takes chunk by chunk, waiting for memory with those in hand that it has: two such ranges wait for each other's chunks."""

    async def pull(self, opened: Opened, start: int, end: int) -> int:
        """See `Driver`."""
        moved = 0
        for low in range(start, end, CHUNK_PAGES):
            while self.memory.free_pages < CHUNK_PAGES:
                await self._make_room(CHUNK_PAGES)
                await trio.sleep(self.clock.real(LOOK_S))
            moved += len((await opened.context.migrate_in(low, min(low + CHUNK_PAGES, end), "fault")).pages)
        self._here[opened.context, start, end] = None
        return moved
