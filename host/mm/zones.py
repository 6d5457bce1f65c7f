"""One memory, frame by frame: what Linux keeps in struct page, as arrays; for memory that the CPU reaches the bytes and the free lists.

A zone is a NUMA node of the host, or the memory of one device, of which the host holds only this bookkeeping (the device has the bytes
and allocates its frames). Arrays are reserved whole and committed where they are touched, so a device of 80 GiB costs what is in use.

**Folded folios.** What Linux keeps of a large folio stands in the struct page of its head. Here, too: while `folded` says so of an aligned
block of 512 frames, its state is that of its first frame, for all of them (index counting up), and the arrays hold zeros for the others.
Everybody who maps such a folio maps it whole. Who wants to treat its frames one by one comes by way of `at` (or `PhysicalMemory.groups`),
which writes the state of each frame out first, and `field` reads it as if it had been; so only who works on whole folios needs to know, and
has one count to change instead of 512 (the methods of `PhysicalMemory` named `_folios`).
"""

from __future__ import annotations

import mmap
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hmmnet.arena import MAP_NORESERVE, Arena
from hmmnet.pages import (
    FEW,
    HUGE_PAGES,
    HUGE_SHIFT,
    ZERO_FRAME,
    ZONE_SHIFT,
    Words,
    ascending,
    bits_in_any,
    distinct,
    is_one_run,
    largest,
    runs_of,
    smallest,
    word_of,
)
from hmmnet.runs import RunAllocator

from . import pte

if TYPE_CHECKING:
    from .gather import Gather

LOCKED = 1
"""The page lock: a migration owns the frame."""
ANON = 2
"""`mapping` is an anon_vma, not a file."""

COMPOUND = 4
"""One of the 512 pages of a large folio (`huge.py`)."""
HWPOISON = 8
"""Its memory is broken (PG_hwpoison): one reference stays for ever, so that nobody gets it again."""

DEVICE_EXTRA_REFERENCES = 1
"""A frame of a device may have this many references beyond its mappings and still be collected (migrate_vma_check_page).

It does not move then: migrate_vma_pages counts once more, and allows none (c04)."""
FREE_COMMITTED_PAGES_MAX = 1 << 18
"""Free frames of a host zone that keep their memory (1 GiB): reuse without page faults of our own. Beyond, it is given back."""

Index = slice | npt.NDArray[np.intp]

STATE = ("refcount", "mapcount", "pincount", "flags", "mapping")
"""The arrays of a zone that are alike for all frames of a folded folio."""
_STEPS = np.arange(HUGE_PAGES, dtype=np.uint64)
_NONE = np.zeros(0, np.intp)


def lazy_array(count: int, dtype: type[np.generic]) -> npt.NDArray[Any]:
    """`count` zeros that the operating system commits where they are written."""
    size = max(1, count) * np.dtype(dtype).itemsize
    reserved = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        reserved.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(reserved, dtype=dtype)[:count]


class Cells:
    """The struct pages of a zone for who looks at one frame: plain numbers, in a third of the time that an array takes for one."""

    __slots__ = (*STATE, "index")

    def __init__(self, zone: Zone) -> None:
        self.refcount = memoryview(zone.refcount.data)
        self.mapcount = memoryview(zone.mapcount.data)
        self.pincount = memoryview(zone.pincount.data)
        self.flags = memoryview(zone.flags.data)
        self.mapping = memoryview(zone.mapping.data)
        self.index = memoryview(zone.index.data)


class Zone:
    """One memory and its struct pages. `kind` is ``system``, ``private`` or ``coherent``; `owner` is the name of the node or device."""

    def __init__(self, number: int, kind: str, owner: str, count: int) -> None:
        self.number = number
        self.kind = kind
        self.owner = owner
        self.base = number << ZONE_SHIFT
        self.count = count
        self.state: npt.NDArray[np.uint32] = lazy_array((len(STATE) + 1) * count, np.uint32).reshape(len(STATE) + 1, count)
        """The arrays named in `STATE`, one a row, and `folded` as another: for who wants to know whether anything has changed."""
        self.refcount: npt.NDArray[np.int32] = self.state[0].view(np.int32)
        self.mapcount: npt.NDArray[np.int32] = self.state[1].view(np.int32)
        self.pincount: npt.NDArray[np.int32] = self.state[2].view(np.int32)
        self.flags: npt.NDArray[np.uint32] = self.state[3]
        self.mapping: npt.NDArray[np.uint32] = self.state[4]
        self.index: npt.NDArray[np.uint64] = lazy_array(count, np.uint64)
        self.cells = Cells(self)
        self.folded: npt.NDArray[np.bool_] = self.state[len(STATE)].view(np.bool_)[: (count >> HUGE_SHIFT) + 1]
        """Which aligned blocks of 512 frames have their state at the first."""
        self.folded_count = 0
        self.on_free: Callable[[Words], None] | None = None
        """folio_free: called with the frames of a device zone whose last reference is gone."""
        self.on_free_one: Callable[[int], None] | None = None
        """The same for one frame, without an array; None: `on_free` hears of it."""
        self.on_free_folios: Callable[[Words], None] | None = None
        """The same for folded folios, called with their heads; `on_free` hears of them frame by frame where there is none."""
        self.on_touch: Callable[[Any, Words], Awaitable[None]] | None = None
        """migrate_to_ram of a driver in the host: (address space, pages that a CPU touched). None: the device is reached by its link."""
        self.idle_references = 0
        """References of an idle frame, beyond which `refcount` counts: under v25 a device's page has one (see `page_counts`)."""
        self.extra_references = DEVICE_EXTRA_REFERENCES
        """References beyond its mappings and those of an idle one with which a device's frame is collected all the same."""
        self.pgmap_owner = owner
        """dev_pagemap.owner: who may migrate the pages of this memory as their own."""
        self.lost = ""
        """Why the memory is gone; empty while it is there."""
        self.withdrawn = False
        """It is gone, and everybody who mirrored it in place has been told: nobody translates anything to it any more."""
        self.offered = 0
        """Frames of a device below this index have been offered to a migration at some time; beyond, all are idle."""

    def at(self, frames: Words) -> Index:
        """Where `frames`, all of this zone, stand in the arrays: a slice when they are one run. Each has a state of its own then."""
        where = self.index_of(frames)
        if self.folded_count:
            self.unfold(where)
        return where

    def index_of(self, frames: Words) -> Index:
        """`at` for who only wants to know where they are."""
        if is_one_run(frames):
            first = int(frames[0]) - self.base
            return slice(first, first + len(frames))
        return (frames - word_of(self.base)).view(np.intp)

    # --- folded folios ------------------------------------------------------------------------------------------------------------

    def blocks_at(self, where: Index) -> npt.NDArray[np.intp]:
        """The folded blocks, each once, that hold frames at `where`."""
        if isinstance(where, slice):
            first = where.start >> HUGE_SHIFT
            return self.folded[first : (where.stop - 1 >> HUGE_SHIFT) + 1].nonzero()[0] + first if where.stop > where.start else _NONE
        blocks = where >> HUGE_SHIFT
        return distinct(blocks[self.folded[blocks]])

    def unfold(self, where: Index) -> None:
        """The frames at `where` have a state of their own from now on."""
        for block in self.blocks_at(where).tolist():
            head, rest = block << HUGE_SHIFT, slice((block << HUGE_SHIFT) + 1, (block + 1) << HUGE_SHIFT)
            for name in STATE:
                array = getattr(self, name)
                array[rest] = array[head]
            self.index[rest] = self.index[head] + _STEPS[1:]
            self.folded[block] = False
            self.folded_count -= 1

    def unused(self, blocks: npt.NDArray[np.intp]) -> bool:
        """Whether no frame of `blocks`, which lie here whole, has a reference or a flag."""
        whole = (self.count >> HUGE_SHIFT) << HUGE_SHIFT
        if self.folded[blocks].any():
            return False
        runs = [slice(*run) for run in runs_of(ascending(blocks.astype(np.uint64)))]
        states = [array[:whole].reshape(-1, HUGE_PAGES) for array in (self.refcount, self.flags)]
        return not any(int(state[run].max()) for run in runs for state in states)  # neither falls below zero; twice as fast as `any`

    def set_folded(self, blocks: npt.NDArray[np.intp]) -> None:
        """`blocks` are folded from now on: their heads hold their state, the other frames' is all zero."""
        self.folded[blocks] = True
        self.folded_count += len(blocks)

    def set_unused(self, blocks: npt.NDArray[np.intp]) -> None:
        """Folded `blocks`, whose heads are all zero but for the index, are free frames from now on."""
        self.folded[blocks] = False
        self.folded_count -= len(blocks)

    @property
    def used(self) -> slice:
        """Where frames stand that have been used at some time; beyond, all are idle, and nothing was ever written."""
        return slice(0, self.offered)

    def values(self, name: str, where: Index) -> npt.NDArray[Any]:
        """A copy of the array `name` at `where`, as it would be if nothing were folded."""
        array: npt.NDArray[Any] = getattr(self, name)
        values = array[where].copy() if isinstance(where, slice) else array[where]
        if self.folded_count and len(self.blocks_at(where)):
            at = np.arange(where.start, where.stop) if isinstance(where, slice) else where
            inside = self.folded[at >> HUGE_SHIFT]
            at = at[inside]
            values[inside] = array[at >> HUGE_SHIFT << HUGE_SHIFT]
            if name == "index":
                values[inside] += (at & HUGE_PAGES - 1).astype(np.uint64)
        return values

    def seen(self, name: str, where: Index) -> npt.NDArray[Any]:
        """`values` for who only looks at them now: not copied where they stand together."""
        if self.folded_count:
            return self.values(name, where)
        array: npt.NDArray[Any] = getattr(self, name)
        return array[where]

    def referenced(self, count: int | None = None) -> npt.NDArray[np.bool_]:
        """Which of the first `count` frames (of all: for small memories) have a reference. Broken ones, which have one for ever, do not."""
        where = slice(0, self.count if count is None else count)
        counted: npt.NDArray[np.bool_] = (self.values("refcount", where) != 0) & (self.values("flags", where) & HWPOISON == 0)
        return counted

    def poisoned(self) -> int:
        """How many frames are broken."""
        return int(np.count_nonzero(self.values("flags", slice(0, self.count)) & HWPOISON))

    def page_counts(self, where: Index) -> npt.NDArray[np.int32]:
        """page_count of each frame at `where`, as a driver sees it."""
        counted: npt.NDArray[np.int32] = self.values("refcount", where) + np.int32(self.idle_references)
        return counted

    # --- drivers ------------------------------------------------------------------------------------------------------------------

    def holds(self, frames: Words) -> bool:
        """Whether every one of `frames` is a frame of this zone (true for none)."""
        return len(frames) == 0 or (smallest(frames) >= self.base and largest(frames) < self.base + self.count)

    def idle(self, frames: Words) -> bool:
        """Whether all `frames` lie here, differ, and have no reference: what a driver may offer as a destination."""
        if len(frames) <= FEW and not self.folded_count:
            return self._idle_few(frames.tolist())
        if not self.holds(frames):
            return False
        return not bits_in_any(self.seen("refcount", self.index_of(frames))) and (
            is_one_run(frames) or len(np.unique(frames)) == len(frames)
        )

    def _idle_few(self, frames: Sequence[int]) -> bool:
        """`idle` of a few frames, where none is folded."""
        for frame in frames:
            at = frame - self.base
            if not 0 <= at < self.count or self.cells.refcount[at]:
                return False
        return len(set(frames)) == len(frames)


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
        self.swapped: npt.NDArray[np.uint32] = lazy_array(count, np.uint32)
        """Of a frame in the swap cache, one more than its slot (folio->swap); else 0."""
        self.gather: Gather | None = None
        """Where free frames wait until no device reaches them any more, if they have to."""
        self.waiting = 0
        """Frames that wait there: free, and allocated still."""
        self._free_committed = 0

    @property
    def used(self) -> slice:
        """See `Zone.used`."""
        return slice(0, self.count - self.allocator.fresh_count)

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

    def allocate_folio(self) -> int | None:
        """The head of a folded folio of 512 zeroed frames with one reference; None when there is no aligned run."""
        got = self.allocator.allocate_aligned_run(HUGE_PAGES)
        if got is None:
            return None
        head, zeroed = got
        at = head - self.base
        if not zeroed:
            self._free_committed = max(0, self._free_committed - HUGE_PAGES)
            self.arena.pages[at : at + HUGE_PAGES] = 0
        self.refcount[at] = 1
        self.folded[at >> HUGE_SHIFT] = True
        self.folded_count += 1
        return head

    def allocate_folios(self, count: int) -> Words:
        """The heads of up to `count` folded folios with one reference each, whatever they hold: the caller overwrites them."""
        heads, fresh = self.allocator.allocate_aligned_runs(HUGE_PAGES, count)
        if len(heads):
            at = (heads - word_of(self.base)).astype(np.intp)
            self._free_committed = max(0, self._free_committed - (len(heads) - fresh) * HUGE_PAGES)
            self.refcount[at] = 1
            self.set_folded(at >> HUGE_SHIFT)
        return heads

    def allocate_bare(self) -> int | None:
        """One frame with one reference, whatever it holds: the caller overwrites it."""
        frame = self.allocator.allocate_one()
        if frame is not None:
            self.cells.refcount[frame - self.base] = 1
        return frame

    def zero_one(self, at: int) -> None:
        """Clear the frame at index `at`, which held something before."""
        self.arena.pages[at] = 0
        self._free_committed = max(0, self._free_committed - 1)

    def release_one(self, frame: int) -> None:
        """A frame without references goes back to the allocator."""
        if self.gather is not None and self.gather.holds:
            self._wait(self.gather, partial(self._release_run, frame, frame + 1), 1)
            return
        self.allocator.free_run(frame, frame + 1)
        self._free_committed += 1

    def _wait(self, gather: Gather, release: Callable[[], None], count: int) -> None:
        """`count` frames are free once that can be."""

        def over() -> None:
            self.waiting -= count
            release()

        self.waiting += count
        gather.hold(over)

    def release(self, frames: Words) -> None:
        """Frames without references go back to the allocator."""
        if self.gather is not None and self.gather.holds:
            self._wait(self.gather, partial(self._release, frames.copy()), len(frames))
        else:
            self._release(frames)

    def _release(self, frames: Words) -> None:
        frames = ascending(frames)
        self.allocator.free(frames)
        self._free_committed += len(frames)
        if self._free_committed > FREE_COMMITTED_PAGES_MAX:
            self.arena.discard(frames)
            self._free_committed -= len(frames)

    def release_run(self, start: int, end: int) -> None:
        """`release` of frames [start, end)."""
        if self.gather is not None and self.gather.holds:
            self._wait(self.gather, partial(self._release_run, start, end), end - start)
        else:
            self._release_run(start, end)

    def _release_run(self, start: int, end: int) -> None:
        if self._free_committed + end - start > FREE_COMMITTED_PAGES_MAX:
            self._release(np.arange(start, end, dtype=np.uint64))
            return
        self.allocator.free_run(start, end)
        self._free_committed += end - start


def entry_kind(zone: Zone) -> int:
    """The kind of entries that lead to `zone`."""
    return pte.DEVICE if zone.kind == "private" else pte.PRESENT
