"""Where pages that come home land: host frames that are allocated when they are needed, or were before (`interfaces.Destination`)."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import numpy as np

from hmmnet.errors import KernelError, OutOfMemory
from hmmnet.pages import HUGE_PAGES, Words

from .mm.frames import PhysicalMemory


def no_room(pages: int, injected: str, page: int, process: int) -> KernelError:
    """Why `pages`, the first of them `page` of a process (0: an eviction by frame), cannot come home."""
    where = f", 0x{page:x} of process {process}{' the first' if pages > 1 else ''}," if process else ""
    wants = f"a page{where} wants" if pages == 1 else f"{pages} pages{where} want"
    if injected:
        return KernelError(errno.ENOMEM, "migrate_to_ram", f"{wants} to come home; {injected}")
    return OutOfMemory(errno.ENOMEM, "migrate_to_ram", f"{wants} to come home and the host's memory is used up", 1)


class HostFrames:
    """Host frames for `count` pages on their way home, from `node` if it has room (`interfaces.Destination`).

    From each of the positions `huge` on, 512 belong to a huge page, which gets an aligned run if there is one. `first`: the first of the
    pages, and whose it is, for who asks why there is no room.
    """

    __slots__ = ("_count", "_first", "_frames", "_huge", "_memory", "_node")

    def __init__(self, memory: PhysicalMemory, count: int, node: int, huge: Sequence[int] = (), first: tuple[int, int] = (0, 0)) -> None:
        self._first = first
        self._memory = memory
        self._node = node
        self._count = count
        self._huge = huge
        self._frames: Words | None = None

    def frames(self) -> Words:
        """The frames; they need not be zero, because each is overwritten. Raises KernelError(ENOMEM)."""
        if self._frames is None:
            lacks = self._memory.points.armed and self._memory.points.fails("host.alloc.home", pages=self._count)
            self._frames = None if lacks else self._allocated()
            if self._frames is None:
                raise no_room(self._count, self._memory.points.why("host.alloc.home") if lacks else "", *self._first)
        return self._frames

    def _allocated(self) -> Words | None:
        runs = [(at, run) for at in self._huge if (run := self._memory.allocate_huge(self._node)) is not None]
        count = self._count - len(runs) * HUGE_PAGES
        single = self._memory.allocate(count, self._node, keep=slice(0, count))
        if not runs or single is None:
            for _, run in runs:
                self._memory.put(run)
            return single
        frames = np.zeros(self._count, np.uint64)
        for at, run in runs:
            frames[at : at + HUGE_PAGES] = run
        frames[frames == 0] = single
        return frames

    def release(self) -> None:
        """They are not wanted after all."""
        if self._frames is not None:
            self._memory.put(self._frames)


class Landing:
    """Frames that were allocated before (`interfaces.Destination`)."""

    __slots__ = ("_frames",)

    def __init__(self, frames: Words) -> None:
        self._frames = frames

    def frames(self) -> Words:
        """The frames."""
        return self._frames
