"""A device's own memory: frames of its zone, where each stands in its life, and where each is mapped.

Linux learns that a device page is free when its reference count drops to zero and the driver's ``folio_free`` is called; until then the
frame is the driver's to keep. Here the host holds the counts, so the device keeps one byte of state for each frame instead, and checks
with it everything that the host asks: a copy may land only in frames that were *granted* to a migration, only *live* frames are copied
out or freed. A peer that mixes frames up is told so; it cannot corrupt a page.

A frame that was copied out is about to be freed, or its page stays after all, and the device does not know which. What it must know is
whether words that lead to the frame were read before it was copied or after. So copies out are counted, and each frame keeps the number
of its last *departure*: words are good when they were asked for after it (`stays`). Neither a clock nor a further state of the frame would
do, as frames are freed and used again within the time that words are under way.

Freed frames are not cleared when they are freed (a GPU does not either) but when a zeroed frame is wanted, or when nobody has wanted
them for a while and `discard_idle` gives their memory back to the operating system, which is the cheapest way to zero it. Not sooner:
frames are often wanted again at once, and committing memory costs about as much as filling it.

The reverse map answers "which mirror entries lead to this frame" for evictions by frame number (``migrate_device_range``). It keeps the
latest mapping of each frame in an array and the rare further ones (the same page in several processes after fork) in a dictionary. It is
a hint: whoever uses it looks at the mirror again, so that dropping an entry costs no update here.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hmmnet.arena import DISCARD_MIN_PAGES, Arena
from hmmnet.errors import ProtocolError
from hmmnet.faults.injector import Points
from hmmnet.pages import HUGE_PAGES, PAGE_SHIFT, PAGE_SIZE, ZONE_SHIFT, Words, ascending, from_wire, page_by_page, pages_in, run_bounds
from hmmnet.runs import Allocation, RunAllocator
from hmmnet.sparse import lazy_words

FREE_CLEAN = 0
FREE_DIRTY = 1
GRANTED_CLEAN = 2
GRANTED_DIRTY = 3
LIVE = 4
"""Clean frames are known to hold zeros. FREE | 2 = GRANTED: granting sets a bit."""

PAGES_PER_LIST_MAX = 1 << 20
"""Frames that a list in a message may stand for, large ones counted as what they are (`wire.messages.PAGES_PER_MESSAGE_MAX`)."""
IDLE_ROUNDS = 8
"""Calls of `grow_older` until freed frames are idle."""
DISCARD_PAGES_MAX = 1 << 14
"""Frames given back to the operating system in one pass (64 MiB), so that a pass stays in the low milliseconds."""

_PLACE_SHIFT = 36
_PLACE_MASK = (1 << _PLACE_SHIFT) - 1
_PLACE_BITS = np.uint64(_PLACE_SHIFT)
_PLACE_PAGE_MASK = np.uint64(_PLACE_MASK)
_PAGE_SHIFT = np.uint64(PAGE_SHIFT)


def _lazy_bytes(count: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(-1, max(count, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=np.uint8)[:count]


def physical(frames: Words) -> Words:
    """Byte addresses of frames."""
    return frames << _PAGE_SHIFT


class Memory:
    """`pages` frames of zone `zone`: the bytes, who may touch them, and where they are mapped.

    `arena` are the bytes, where the host shares them.
    """

    def __init__(self, zone: int, pages: int, arena: Arena | None = None) -> None:
        self.zone = zone
        self.pages = pages
        self.base = zone << ZONE_SHIFT
        self.arena = Arena(self.base, pages) if arena is None else arena
        self.points = Points()
        """Where faults of this device are injected."""
        self._frames = RunAllocator(self.base, pages)
        self._state = _lazy_bytes(pages)
        self._places = lazy_words(pages)
        self._departed = lazy_words(pages)
        self.departures = 0
        """Copies out so far."""
        self._more: dict[int, set[int]] = {}
        self._round = 0
        self._freed_in = _lazy_bytes(pages)
        """The round in which each frame was freed last (its low byte)."""
        self._freed: deque[tuple[int, Words]] = deque()
        self.used_max = 0
        """The most frames that were out at once."""

    # --- frames ---------------------------------------------------------------------------------------------------------------

    @property
    def free_pages(self) -> int:
        """Frames that can be granted now."""
        return self._frames.free_count

    @property
    def used_pages(self) -> int:
        """Frames granted or live."""
        return self._frames.used_count

    def owns(self, frames: Words) -> npt.NDArray[np.bool_]:
        """Which of `frames` lie in this device's zone."""
        return frames - np.uint64(self.base) < np.uint64(self.pages)

    def grant(self, count: int) -> Words | None:
        """`count` frames for a migration to fill, in few runs; None when fewer are free."""
        return self._granted(self._frames.allocate(count))

    def grant_large(self) -> Words | None:
        """An aligned run of 512 frames for a huge page; None when there is none."""
        if self.points.armed and self.points.fails("device.alloc.large", pages=HUGE_PAGES):
            return None
        return self._granted(self._frames.allocate_aligned(HUGE_PAGES))

    def _granted(self, found: Allocation | None) -> Words | None:
        if found is None:
            return None
        self._state[self.arena.indices(found.frames)] |= 2
        self.used_max = max(self.used_max, self.used_pages)
        return found.frames

    def keep(self, frames: Words) -> None:
        """Granted frames hold a page from now on."""
        self._state[self.arena.indices(frames)] = LIVE

    def give_back(self, frames: Words) -> None:
        """Granted frames that no page moved into are free again."""
        if len(frames):
            # A clean frame stays clean only when nothing was written into it: what landed made it dirty.
            self._state[self.arena.indices(frames)] &= 1
            self._frames.free(frames)

    def free(self, raw: bytes, drop: Callable[[Words], None] = lambda _: None) -> Words:
        """folio_free of the host's frame list `raw`; returns the frames, ascending.

        `drop` is called with them before they are forgotten, to remove what may still lead there. Raises ProtocolError unless all are
        live, and each is named once.
        """
        frames = ascending(self._listed(raw, "FreeFrames", LIVE, LIVE))
        if len(frames):
            if len(frames) > 1 and (frames[1:] == frames[:-1]).any():
                raise ProtocolError("FreeFrames names a frame twice")
            drop(frames)
            indices = self.arena.indices(frames)
            self._state[indices] = FREE_DIRTY
            self._places[indices] = 0
            self._freed_in[indices] = self._round & 0xFF
            for index in self._more.keys() & set(indices.tolist()) if self._more else ():
                del self._more[index]
            self._frames.free(frames)
            self._freed.append((self._round, frames))
        return frames

    def landing(self, targets: bytes, zeros: bytes) -> Words:
        """The frames a host copy fills, after the frames of `zeros` were zeroed. Raises ProtocolError unless all were granted."""
        frames = self._listed(targets, "CopyIn.targets", GRANTED_CLEAN, GRANTED_DIRTY)
        blank = self._listed(zeros, "CopyIn.zeros", GRANTED_CLEAN, GRANTED_DIRTY)
        self._state[self.arena.indices(frames)] = GRANTED_DIRTY
        dirty = blank[self._state[self.arena.indices(blank)] == GRANTED_DIRTY]
        if len(dirty):
            self.arena.zero(dirty)
        return frames

    def depart(self, raw: bytes, what: str) -> Words:
        """Frames that are copied out now; the caller drops what leads there. Raises ProtocolError unless all are live."""
        frames = self._listed(raw, what, LIVE, LIVE)
        self.departures += 1
        self._departed[self.arena.indices(frames)] = self.departures
        return frames

    def depart_one(self, frame: int, what: str) -> None:
        """`depart` for one frame, without arrays."""
        index = frame - self.base
        if not 0 <= index < self.pages or self._state[index] != LIVE:
            raise ProtocolError(f"{what} names frame 0x{frame:x}, which is not a live frame of zone {self.zone}")
        self.departures += 1
        self._departed[index] = self.departures

    def stays(self, frames: Words, since: int) -> npt.NDArray[np.bool_]:
        """Which of the own `frames` hold a page, and have not been copied out since `departures` was `since`."""
        indices = self.arena.indices(frames)
        here: npt.NDArray[np.bool_] = (self._state[indices] == LIVE) & (self._departed[indices] <= np.uint64(since))
        return here

    def _listed(self, raw: bytes, what: str, low: int, high: int) -> Words:
        if len(raw) % 8:
            raise ProtocolError(f"{what} has {len(raw)} bytes; a frame list is whole 64-bit words")
        frames = from_wire(raw)
        if len(frames) == 0:
            return frames
        if pages_in(frames) > PAGES_PER_LIST_MAX:
            raise ProtocolError(f"{what} stands for {pages_in(frames)} frames; at most {PAGES_PER_LIST_MAX} are taken")
        frames = page_by_page(frames)
        outside = ~self.owns(frames)
        if outside.any():
            raise ProtocolError(f"{what} names frame 0x{int(frames[int(np.argmax(outside))]):x}, which is not in zone {self.zone}")
        state = self._state[self.arena.indices(frames)]
        wrong = (state < low) | (state > high)
        if wrong.any():
            i = int(np.argmax(wrong))
            raise ProtocolError(f"{what} names frame 0x{int(frames[i]):x}, which is in state {int(state[i])}, not {low} to {high}")
        return frames

    def live_frames(self) -> Words:
        """All frames that hold a page, ascending."""
        return (np.flatnonzero(self._state[: self._frames.touched_count] >= LIVE) + self.base).astype(np.uint64)

    def grow_older(self) -> None:
        """Some time has passed: frames that were freed `IDLE_ROUNDS` calls ago and not wanted since are idle now."""
        self._round += 1

    @property
    def has_idle(self) -> bool:
        """Whether there may be idle frames that still hold memory."""
        return bool(self._freed) and self._freed[0][0] + IDLE_ROUNDS <= self._round

    @property
    def has_freed(self) -> bool:
        """Whether frames were freed that may be idle later."""
        return bool(self._freed)

    def discard_idle(self) -> int:
        """Give memory of idle frames back to the operating system; returns how many. Again while `has_idle`. They are clean afterwards."""
        discarded = 0
        while self.has_idle and discarded < DISCARD_PAGES_MAX:
            freed_in, frames = self._freed.popleft()
            indices = self.arena.indices(frames)
            frames = frames[(self._state[indices] == FREE_DIRTY) & (self._freed_in[indices] == freed_in & 0xFF)]
            if len(frames):
                discarded += self._discard(frames)
        return discarded

    def _discard(self, frames: Words) -> int:
        self.arena.discard(frames)
        # Arena.discard leaves short runs alone; those are cleared when they are wanted.
        clean = long_runs(frames)
        self._state[self.arena.indices(clean)] = FREE_CLEAN
        return len(clean)

    # --- reverse map ----------------------------------------------------------------------------------------------------------

    def note_mapping(self, slot: int, pages: Words, frames: Words) -> None:
        """Mirror number `slot` (from 1) maps `pages` to the own `frames`."""
        indices = self.arena.indices(frames)
        new = np.uint64(slot) << _PLACE_BITS | pages
        old = self._places[indices]
        kept = (old != 0) & (old != new)
        if kept.any():
            for index, place in zip(indices[kept].tolist(), old[kept].tolist(), strict=True):
                self._more.setdefault(index, set()).add(place)
        self._places[indices] = new

    def mappings(self, frames: Words) -> list[tuple[int, Words]]:
        """(mirror number, pages) that may map one of `frames`."""
        indices = self.arena.indices(frames)
        places = self._places[indices]
        places = places[places != 0]
        if self._more:
            extra = [place for index in self._more.keys() & set(indices.tolist()) for place in self._more[index]]
            places = np.concatenate((places, np.array(sorted(extra), dtype=np.uint64)))
        if len(places) == 0:
            return []
        slots = places >> _PLACE_BITS
        if bool((slots == slots[0]).all()):
            return [(int(slots[0]), places & _PLACE_PAGE_MASK)]
        return [(slot, places[slots == np.uint64(slot)] & _PLACE_PAGE_MASK) for slot in np.unique(slots).tolist()]

    def mappings_one(self, frame: int) -> list[tuple[int, int]]:
        """`mappings` for one frame, without arrays: (mirror number, page)."""
        index = frame - self.base
        place = int(self._places[index])
        if not self._more:
            return [(place >> _PLACE_SHIFT, place & _PLACE_MASK)] if place else []
        places = {place} if place else set()
        places |= self._more.get(index, set())
        return [(place >> _PLACE_SHIFT, place & _PLACE_MASK) for place in sorted(places)]

    # --- bytes ----------------------------------------------------------------------------------------------------------------

    def load(self, addresses: Words, size: int) -> npt.NDArray[np.uint8]:
        """The bytes of elements at physical `addresses` (multiples of `size`), as a copy or a view to be used at once."""
        return self.arena.gather(addresses, size)

    def store(self, addresses: Words, size: int, data: npt.NDArray[np.uint8]) -> None:
        """Write elements at physical `addresses`."""
        self.arena.scatter(addresses, size, data)

    def page_bytes(self, frame: int) -> npt.NDArray[np.uint8]:
        """The bytes of one frame, as a writable view."""
        offset = (frame - self.base) * PAGE_SIZE
        return self.arena.bytes[offset : offset + PAGE_SIZE]


def long_runs(frames: Words) -> Words:
    """Those of the sorted `frames` that lie in runs which `Arena.discard` gives back."""
    lengths = np.diff(run_bounds(frames))
    return frames[np.repeat(lengths >= DISCARD_MIN_PAGES, lengths)]
