"""One memory, frame by frame: what Linux keeps in struct page, as arrays; for memory that the CPU reaches the bytes and the free lists.

A zone is a NUMA node of the host, or the memory of one device, of which the host holds only this bookkeeping (the device has the bytes
and allocates its frames). Arrays are reserved whole and committed where they are touched, so a device of 80 GiB costs what is in use.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hmmnet.arena import MAP_NORESERVE, Arena
from hmmnet.pages import (
    HUGE_PAGES,
    ZERO_FRAME,
    ZONE_SHIFT,
    Words,
    ascending,
    is_one_run,
)
from hmmnet.runs import RunAllocator

if TYPE_CHECKING:
    pass

LOCKED = 1
"""The page lock: a migration owns the frame."""
ANON = 2
"""`mapping` is an anon_vma, not a file."""

COMPOUND = 4
"""One of the 512 pages of a large folio (`huge.py`)."""

DEVICE_EXTRA_REFERENCES = 1
"""A frame of a device may have this many references beyond its mappings and still be collected (migrate_vma_check_page).

It does not move then: migrate_vma_pages counts once more, and allows none (c04)."""
FREE_COMMITTED_PAGES_MAX = 1 << 18
"""Free frames of a host zone that keep their memory (1 GiB): reuse without page faults of our own. Beyond, it is given back."""

Index = slice | npt.NDArray[np.intp]


def lazy_array(count: int, dtype: type[np.generic]) -> npt.NDArray[Any]:
    """`count` zeros that the operating system commits where they are written."""
    size = max(1, count) * np.dtype(dtype).itemsize
    reserved = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        reserved.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(reserved, dtype=dtype)[:count]


class Zone:
    """One memory and its struct pages. `kind` is ``system``, ``private`` or ``coherent``; `owner` is the name of the node or device."""

    def __init__(self, number: int, kind: str, owner: str, count: int) -> None:
        self.number = number
        self.kind = kind
        self.owner = owner
        self.base = number << ZONE_SHIFT
        self.count = count
        self.refcount: npt.NDArray[np.int32] = lazy_array(count, np.int32)
        self.mapcount: npt.NDArray[np.int32] = lazy_array(count, np.int32)
        self.pincount: npt.NDArray[np.int32] = lazy_array(count, np.int32)
        self.flags: npt.NDArray[np.uint32] = lazy_array(count, np.uint32)
        self.mapping: npt.NDArray[np.uint32] = lazy_array(count, np.uint32)
        self.index: npt.NDArray[np.uint64] = lazy_array(count, np.uint64)
        self.on_free: Callable[[Words], None] | None = None
        """folio_free: called with the frames of a device zone whose last reference is gone."""
        self.lost = ""
        """Why the memory is gone; empty while it is there."""
        self.offered = 0
        """Frames of a device below this index have been offered to a migration at some time; beyond, all are idle."""

    def at(self, frames: Words) -> Index:
        """Where `frames`, all of this zone, stand in the arrays: a slice when they are one run."""
        if is_one_run(frames):
            first = int(frames[0]) - self.base
            return slice(first, first + len(frames))
        return (frames - np.uint64(self.base)).astype(np.intp)

    def holds(self, frames: Words) -> bool:
        """Whether every one of `frames` is a frame of this zone (true for none)."""
        return len(frames) == 0 or (int(frames.min()) >= self.base and int(frames.max()) < self.base + self.count)

    def idle(self, frames: Words) -> bool:
        """Whether all `frames` lie here, differ, and have no reference: what a driver may offer as a destination."""
        if not self.holds(frames):
            return False
        return not self.refcount[self.at(frames)].any() and (is_one_run(frames) or len(np.unique(frames)) == len(frames))


class CpuZone(Zone):
    """A zone whose bytes the CPU reaches: a memory node of the host, or the coherent memory of a device, in `arena`.

    `crossed`, if there is one, is told of every access: how many bytes, and whether they were stored.
    """

    def __init__(self, number: int, kind: str, owner: str, arena: Arena) -> None:
        super().__init__(number, kind, owner, arena.count)
        self.arena = arena
        self.window = arena.bytes.data
        self.crossed: Callable[[int, bool], None] | None = None


class HostZone(CpuZone):
    """A memory node of the host: an allocator too. Frame 0 of zone 0 is the shared zero page."""

    def __init__(self, number: int, owner: str, count: int) -> None:
        super().__init__(number, "system", owner, Arena(number << ZONE_SHIFT, count))
        skip = 1 if self.base == ZERO_FRAME else 0
        self.allocator = RunAllocator(self.base + skip, count - skip)
        self._free_committed = 0

    def allocate(self, count: int, keep: slice | None = None) -> Words | None:
        """`count` frames with one reference, zeroed but for positions `keep` (the caller overwrites those); None when there are fewer."""
        got = self.allocator.allocate(count)
        if got is None:
            return None
        dirty = count - got.zeroed
        if dirty:
            self._free_committed = max(0, self._free_committed - dirty)
            head, tail = (dirty, dirty) if keep is None else (min(keep.start, dirty), min(keep.stop, dirty))
            if head:
                self.arena.zero(got.frames[:head])
            if tail < dirty:
                self.arena.zero(got.frames[tail:dirty])
        if count == 1:
            self.refcount[int(got.frames[0]) - self.base] = 1
        else:
            self.refcount[self.at(got.frames)] = 1
        return got.frames

    def allocate_huge(self) -> Words | None:
        """An aligned run of 512 zeroed frames with one reference each; None when there is none."""
        got = self.allocator.allocate_aligned(HUGE_PAGES)
        if got is None:
            return None
        if not got.zeroed:
            self._free_committed = max(0, self._free_committed - HUGE_PAGES)
            self.arena.zero(got.frames)
        self.refcount[self.at(got.frames)] = 1
        return got.frames

    def allocate_bare(self) -> int | None:
        """One frame with one reference, whatever it holds: the caller overwrites it."""
        frame = self.allocator.allocate_one()
        if frame is not None:
            self.refcount[frame - self.base] = 1
        return frame

    def zero_one(self, at: int) -> None:
        """Clear the frame at index `at`, which held something before."""
        self.arena.pages[at] = 0
        self._free_committed = max(0, self._free_committed - 1)

    def release_one(self, frame: int) -> None:
        """A frame without references goes back to the allocator."""
        self.allocator.free_run(frame, frame + 1)
        self._free_committed += 1

    def release(self, frames: Words) -> None:
        """Frames without references go back to the allocator."""
        frames = ascending(frames)
        self.allocator.free(frames)
        self._free_committed += len(frames)
        if self._free_committed > FREE_COMMITTED_PAGES_MAX:
            self.arena.discard(frames)
            self._free_committed -= len(frames)
