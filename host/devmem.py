"""Device memory as Linux sees it: page maps that appear and go away with their devices (mm/memremap.c, today's struct dev_pagemap).

A page map gives the frames of a device's zone their struct pages. An idle frame has the references that the personality gives it
(`Zone.idle_references`: none today, one under v25); what is counted are those beyond. The last reference to a page that is let go of
calls the driver's ``folio_free``. That call can come from anywhere (munmap, exit, the end of a migration), so it must not wait: frames are
gathered and told in one note a little later, and in any case before the device is asked for anything else.

Removing a page map waits, in the kernel, for the last reference, and hangs for ever when somebody leaks one. Here it does not hang: it says
who holds what.

The CPU reaches coherent memory (`MEMORY_DEVICE_COHERENT`) in place: host and device map the same file, as a coherent link has them share
one memory, and entries that lead there are present like any other. That wants both on one computer, which a coherent link does, too.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hmmnet.arena import Arena
from hmmnet.errors import HmmnetError, KernelError
from hmmnet.pages import LARGE, Words, word_of

from .announce import clear
from .interfaces import AddressSpace
from .mm import pte
from .mm.frames import PhysicalMemory
from .mm.rmap import mappings
from .mm.zones import LOCKED


@dataclass(frozen=True)
class Holder:
    """Who keeps frames of a device: a process by its mappings, or (process 0) references without a mapping, such as a pin."""

    process: int
    pages: int

    def __str__(self) -> str:
        return f"process {self.process} maps {self.pages} pages" if self.process else f"{self.pages} pages are held without a mapping"


class Owner(Protocol):
    """Whose memory a page map describes: a device over its link, or a driver in the host."""

    name: str
    zone: int
    kind: str

    def free_frames(self, frames: Words) -> None:
        """folio_free: tell the driver, without waiting."""

    def free_frame(self, frame: int) -> None:
        """The same, of one frame."""


class PageMap:
    """The struct pages of one life of a device. `arena` are the bytes of coherent memory."""

    def __init__(self, memory: PhysicalMemory, link: Owner, pages: int, arena: Arena | None = None) -> None:
        self.memory = memory
        self.points = memory.points
        self.link = link
        self.zone = memory.add_device(link.zone, link.kind, link.name, pages, arena)
        late = (lambda free: free) if memory.gather is None else memory.gather.late
        self.zone.on_free = late(link.free_frames)
        self.zone.on_free_one = link.free_frame if memory.gather is None else None
        self.zone.on_free_folios = late(lambda heads: link.free_frames(heads | word_of(LARGE)))
        self.on_memory_failure: Callable[[Words], None] | None = None
        """dev_pagemap_ops.memory_failure: the driver's answer to broken frames."""
        self.removed = False
        """The memory has been taken out of the machine; nothing of it can be lost any more."""

    @property
    def used_pages(self) -> int:
        """Frames with a reference, but for broken ones."""
        return int(np.count_nonzero(self.zone.referenced(self.zone.offered)))

    def used_frames(self) -> Words:
        """Frames with a reference, ascending, but for broken ones: nothing is in those, and nobody holds them."""
        return np.flatnonzero(self.zone.referenced(self.zone.offered)).astype(np.uint64) + np.uint64(self.zone.base)

    @property
    def in_transit(self) -> bool:
        """Whether a page is on its way from here or to here; it arrives, or stays, or is lost, and nobody can hold it there for good."""
        return bool((self.zone.flags[self.zone.at(self.used_frames())] & LOCKED).any())

    def holders(self) -> Iterator[Holder]:
        """Everybody who keeps a frame."""
        frames = self.used_frames()
        if len(frames) == 0:
            return
        mapped = np.zeros(len(frames), dtype=np.bool_)
        for found in mappings(self.memory, frames):
            mapped[found.rows] = True
            yield Holder(found.mm.number, len(found.pages))
        loose = int(np.count_nonzero(~mapped))
        if loose:
            yield Holder(0, loose)

    def memory_failure(self, frames: Words) -> None:
        """memory_failure_dev_pagemap: the hardware says that `frames` have broken. KernelError(ENXIO) without a driver that handles it."""
        owner = self.zone.owner
        if not self.zone.holds(frames):
            raise KernelError(errno.ENXIO, "memory_failure", f'frames {frames[:4].tolist()} and more are not of device "{owner}"')
        if self.on_memory_failure is None:
            why = f'{len(frames)} frames of device "{owner}" broke, 0x{int(frames[0]):x} the first; its driver does not handle that'
            raise KernelError(errno.ENXIO, "memory_failure", why)
        self.on_memory_failure(frames)

    def remove(self) -> None:
        """memunmap_pages. Raises HmmnetError, naming the holders, while a frame has a reference."""
        holders = [str(holder) for holder in self.holders()]
        if holders:
            raise HmmnetError(f'memory of device "{self.zone.owner}" (zone {self.zone.number}) cannot be removed: {"; ".join(holders)}')
        self.memory.remove_device(self.zone.number)
        self.removed = True

    def lose(self, cause: str) -> None:
        """The device died with its memory: an access to a page whose only copy was there is a SIGBUS that names `cause`."""
        if self.removed:
            return
        coherent = self.zone.kind == "coherent"
        self.memory.zone_lost(self.zone.number, cause)
        if coherent:
            for mapped in mappings(self.memory, self.used_frames()):
                mapped.mm.table.scatter(mapped.pages, mapped.entries & ~word_of(pte.KIND) | word_of(pte.DEVICE))

    async def withdraw(self, spaces: Mapping[int, AddressSpace]) -> None:
        """Other devices may mirror coherent memory in place: return when none reaches what was lost."""
        mapped_at = list(mappings(self.memory, self.used_frames()))  # processes may end while others are told
        async with AsyncExitStack() as stack:
            for mapped in mapped_at:
                await clear(stack, spaces, mapped.mm, mapped.pages)

    def bury(self) -> bool:
        """Nothing is under way to or from the lost device any more: without pages that were lost with it, the map goes away."""
        if self.used_pages:
            return False
        if not self.removed:
            self.memory.remove_device(self.zone.number)
        return True

    def bury_late(self, then: Callable[[], None]) -> None:
        """`bury`, and `then`, when whoever maps what was lost has let go of all of it: whoever unmaps or puts the last page sees to it."""

        def empties(_: Words) -> None:
            if bury not in self.memory.emptied:
                self.memory.emptied.append(bury)

        def bury() -> None:
            if self.bury():
                then()

        self.zone.on_free = self.zone.on_free_folios = empties
