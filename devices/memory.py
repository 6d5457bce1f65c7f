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

A frame for a huge page is one word in every list (`pages.LARGE`), and one state: while its block of 512 is *folded*, all arrays say at its
first frame what holds for all (places counting up). Who names one of the others unfolds it. So a huge page is granted, mapped, copied and
freed with the work of one page.
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
from hmmnet.pages import (
    FEW,
    HUGE_PAGES,
    HUGE_SHIFT,
    LARGE,
    PAGE_SHIFT,
    PAGE_SIZE,
    ZONE_SHIFT,
    Words,
    all_of,
    any_of,
    ascending,
    from_wire,
    has_large,
    is_one_run,
    page_by_page,
    pages_in,
    run_bounds,
    word_of,
)
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
_PLACE_BITS = word_of(_PLACE_SHIFT)
_PLACE_PAGE_MASK = word_of(_PLACE_MASK)
_PAGE_SHIFT = word_of(PAGE_SHIFT)
_STEPS = np.arange(HUGE_PAGES, dtype=np.uint64)
_NO_FRAMES = np.zeros(0, np.uint64)
_NO_CELLS = np.zeros(0, np.intp)


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
        self._base, self._pages = np.uint64(self.base), np.uint64(pages)
        self.arena = Arena(self.base, pages) if arena is None else arena
        self.points = Points()
        """Where faults of this device are injected."""
        self._frames = RunAllocator(self.base, pages)
        self._state = _lazy_bytes(pages)
        self._folded = np.zeros((pages >> HUGE_SHIFT) + 1, np.bool_)
        """Which aligned blocks of 512 frames have their state at the first."""
        self._folded_count = 0
        self._places = lazy_words(pages)
        self._departed = lazy_words(pages)
        self._one_state, self._one_place, self._one_departed = self._state.data, self._places.data, self._departed.data
        """The same for one frame: a plain number in or out in two thirds of the time."""
        self.departures = 0
        """Copies out so far."""
        self._more: dict[int, set[int]] = {}
        self._round = 0
        self._freed_in = _lazy_bytes(pages)
        """The round in which each frame was freed last (its low byte)."""
        self._freed: deque[tuple[int, Words]] = deque()
        self.retired = 0
        """Frames that are out of use for good."""
        self.used_max = 0
        """The most frames that were out at once."""
        self._written = 0
        """Frames at the front that an earlier life may have written to."""

    def begin_with(self, former: Memory) -> None:
        """Nothing has cleared the memory since `former`, the device's life before this: its bytes are still there, in frames that are free.

        None of these is known to hold zeros. Before anything else.
        """
        assert not self._frames.used_count, "a life begins once"
        self._written = max(former._written, former._frames.touched_count)
        self.arena.pages[: self._written] = former.arena.pages[: self._written]
        self._state[: self._written] = FREE_DIRTY

    # --- frames ---------------------------------------------------------------------------------------------------------------

    @property
    def free_pages(self) -> int:
        """Frames that can be granted now."""
        return self._frames.free_count

    @property
    def used_pages(self) -> int:
        """Frames granted or live; not those that are retired."""
        return self._frames.used_count - self.retired

    def owns(self, frames: Words) -> npt.NDArray[np.bool_]:
        """Which of `frames` lie in this device's zone."""
        return frames - self._base < self._pages

    def grant(self, count: int) -> Words | None:
        """`count` frames for a migration to fill, in few runs; None when fewer are free."""
        return self._granted(self._frames.allocate(count))

    def grant_large(self) -> int | None:
        """The first of an aligned run of 512 frames for a huge page, folded; None when there is none."""
        if self.points.armed and self.points.fails("device.alloc.large", pages=HUGE_PAGES):
            return None
        found = self._frames.allocate_aligned_run(HUGE_PAGES)
        if found is None:
            return None
        at = found[0] - self.base
        self._state[at] = GRANTED_DIRTY if self._state[at : at + HUGE_PAGES].any() else GRANTED_CLEAN
        self._folded[at >> HUGE_SHIFT] = True
        self._folded_count += 1
        self.used_max = max(self.used_max, self.used_pages)
        return found[0]

    def retire(self, count: int) -> int:
        """Up to `count` free frames are never used again; how many."""
        count = min(count, self.free_pages)
        if count:
            self.retired += count
            self.grant(count)
        return count

    def _granted(self, found: Allocation | None) -> Words | None:
        if found is None:
            return None
        self._state[self.arena.indices(found.frames)] |= 2
        self.used_max = max(self.used_max, self.used_pages)
        return found.frames

    def keep(self, frames: Words) -> None:
        """Granted frames hold a page from now on."""
        self._state[self._cells(frames)] = LIVE

    def give_back(self, frames: Words) -> None:
        """Granted frames that no page moved into are free again."""
        if len(frames):
            # A clean frame stays clean only when nothing was written into it: what landed made it dirty.
            cells = self._cells(frames)
            self._state[cells] &= 1
            self._frames.free(self._release(cells))

    # --- folded blocks --------------------------------------------------------------------------------------------------------

    def _cells(self, frames: Words) -> npt.NDArray[np.intp]:
        """Where the state of `frames` stands: of a large one whose block is folded at its first frame, else of each frame at its own."""
        if not has_large(frames):
            cells = self.arena.indices(frames)
            if self._folded_count:
                self._unfold(cells)
            return cells
        large = frames >= word_of(LARGE)
        cells = self.arena.indices(frames & word_of(LARGE - 1))
        if not large.all():
            self._unfold(cells[~large])
        apart = large & ~self._folded[cells >> HUGE_SHIFT]
        if not apart.any():
            return cells
        return np.concatenate((cells[~apart], self.arena.indices(page_by_page(frames[apart]))))

    def _unfold(self, cells: npt.NDArray[np.intp]) -> None:
        """The frames of `cells` have a state of their own each."""
        blocks = cells >> HUGE_SHIFT
        for block in np.unique(blocks[self._folded[blocks]]).tolist():
            head, rest = block << HUGE_SHIFT, slice((block << HUGE_SHIFT) + 1, (block + 1) << HUGE_SHIFT)
            self._state[rest] = self._state[head]
            self._departed[rest] = self._departed[head]
            self._places[rest] = self._places[head] + _STEPS[1:] if self._places[head] else 0
            for place in self._more.get(head, ()):
                for i in range(1, HUGE_PAGES):
                    self._more.setdefault(head + i, set()).add(place + i)
            self._folded[block] = False
            self._folded_count -= 1

    def _of(self, cells: npt.NDArray[np.intp]) -> Words:
        """The frames that have their state at `cells`: large ones where those are folded."""
        frames = cells.astype(np.uint64) + np.uint64(self.base)
        if self._folded_count:
            frames[self._folded[cells >> HUGE_SHIFT]] |= word_of(LARGE)
        return frames

    def _release(self, cells: npt.NDArray[np.intp]) -> Words:
        """What is folded of `cells`, about to be free, is not any more, each frame in the state of the first; all frames, ascending."""
        frames = self._of(cells)
        if not self._folded_count:
            return ascending(frames)
        folded = cells[frames >= word_of(LARGE)]
        for head in folded.tolist():
            self._state[head + 1 : head + HUGE_PAGES] = self._state[head]
        self._folded[folded >> HUGE_SHIFT] = False
        self._folded_count -= len(folded)
        return ascending(page_by_page(frames))

    def free(self, raw: bytes, drop: Callable[[Words], None] = lambda _: None) -> Words:
        """folio_free of the host's frame list `raw`; returns the frames, ascending.

        `drop` is called with them before they are forgotten, to remove what may still lead there. Raises ProtocolError unless all are
        live, and each is named once.
        """
        run = self._live_run(raw)
        if run is not None:
            return self._free_run(run, from_wire(raw), drop)
        cells = self._listed(raw, "FreeFrames", LIVE, LIVE)
        if len(cells) > 1:
            cells = np.sort(cells)
        if len(cells) == 0:
            return _NO_FRAMES
        if len(cells) > 1 and any_of(cells[1:] == cells[:-1]):
            raise ProtocolError("FreeFrames names a frame twice")
        drop(self._of(cells))
        self._state[cells] = FREE_DIRTY
        self._places[cells] = 0
        for index in self._more.keys() & set(cells.tolist()) if self._more else ():
            del self._more[index]
        frames = self._release(cells)
        self._freed_in[self.arena.indices(frames)] = self._round & 0xFF
        self._frames.free(frames)
        self._freed.append((self._round, frames))
        return frames

    def _live_run(self, raw: bytes) -> slice | None:
        """Where the state of the frames listed in `raw` stands, if they are a run of live ones, ascending; None: they may be anything."""
        frames = from_wire(raw) if len(raw) % 8 == 0 else _NO_FRAMES
        if self._folded_count or not is_one_run(frames):
            return None
        first, count = int(frames[0]) - self.base, len(frames)
        if first < 0 or first + count > self.pages or bytes(self._one_state[first : first + count]).count(LIVE) < count:
            return None
        return slice(first, first + count)

    def _free_run(self, cells: slice, frames: Words, drop: Callable[[Words], None]) -> Words:
        """`free` of one run: what a range that goes home, page by page or whole, leaves behind. A few slices, no lists of where."""
        drop(frames)
        self._state[cells] = FREE_DIRTY
        self._places[cells] = 0
        for index in [index for index in self._more if cells.start <= index < cells.stop]:
            del self._more[index]
        self._freed_in[cells] = self._round & 0xFF
        self._frames.free_run(self.base + cells.start, self.base + cells.stop)
        self._freed.append((self._round, frames))
        return frames

    def landing(self, targets: bytes, zeros: bytes) -> Words:
        """The frames a host copy fills, after the frames of `zeros` were zeroed. Raises ProtocolError unless all were granted."""
        cells = self._listed(targets, "CopyIn.targets", GRANTED_CLEAN, GRANTED_DIRTY)
        blank = self._listed(zeros, "CopyIn.zeros", GRANTED_CLEAN, GRANTED_DIRTY)
        self._state[cells] = GRANTED_DIRTY
        dirty = blank[self._state[blank] == GRANTED_DIRTY]
        if len(dirty):
            self.arena.zero(page_by_page(self._of(dirty)))
        return page_by_page(from_wire(targets))

    def depart(self, raw: bytes, what: str) -> Words:
        """Frames that are copied out now, as listed; the caller drops what leads there. Raises ProtocolError unless all are live."""
        cells = self._listed(raw, what, LIVE, LIVE)
        self.departures += 1
        self._departed[cells] = self.departures
        return from_wire(raw)

    def depart_one(self, frame: int, what: str) -> None:
        """`depart` for one frame, without arrays."""
        index = frame - self.base
        if self._folded_count and 0 <= index < self.pages:
            self._unfold(np.array([index]))
        if not 0 <= index < self.pages or self._one_state[index] != LIVE:
            raise ProtocolError(f"{what} names frame 0x{frame:x}, which is not a live frame of zone {self.zone}")
        self.departures += 1
        self._one_departed[index] = self.departures

    def stays(self, frames: Words, since: int) -> npt.NDArray[np.bool_]:
        """Which of the own `frames` hold a page, and have not been copied out since `departures` was `since`."""
        indices = self.arena.indices(frames)
        if self._folded_count:
            indices = np.where(self._folded[indices >> HUGE_SHIFT], indices >> HUGE_SHIFT << HUGE_SHIFT, indices)
        here: npt.NDArray[np.bool_] = (self._state[indices] == LIVE) & (self._departed[indices] <= np.uint64(since))
        return here

    def _listed(self, raw: bytes, what: str, low: int, high: int) -> npt.NDArray[np.intp]:
        """Where the state of the frames listed in `raw` stands. Raises ProtocolError unless all are ours and in states `low` to `high`."""
        if len(raw) % 8:
            raise ProtocolError(f"{what} has {len(raw)} bytes; a frame list is whole 64-bit words")
        frames = from_wire(raw)
        if len(frames) == 0:
            return _NO_CELLS
        if len(frames) <= FEW and not self._folded_count:
            few = [frame - self.base for frame in frames.tolist()]
            if all(0 <= cell < self.pages and low <= self._state[cell] <= high for cell in few):
                return np.array(few, np.intp)
        if pages_in(frames) > PAGES_PER_LIST_MAX:
            raise ProtocolError(f"{what} stands for {pages_in(frames)} frames; at most {PAGES_PER_LIST_MAX} are taken")
        large = frames >= word_of(LARGE)
        firsts = frames & word_of(LARGE - 1)
        outside = ~self.owns(firsts) | ~self.owns(firsts + np.where(large, word_of(HUGE_PAGES - 1), word_of(0)))
        if outside.any():
            raise ProtocolError(f"{what} names frame 0x{int(firsts[int(np.argmax(outside))]):x}, which is not in zone {self.zone}")
        if (firsts[large] % word_of(HUGE_PAGES)).any():
            raise ProtocolError(f"{what} names a huge page that is not aligned")
        cells = self._cells(frames)
        state = self._state[cells]
        wrong = (state < low) | (state > high)
        if wrong.any():
            i = int(np.argmax(wrong))
            raise ProtocolError(
                f"{what} names frame 0x{int(cells[i]) + self.base:x}, which is in state {int(state[i])}, not {low} to {high}"
            )
        return cells

    def live_frames(self) -> Words:
        """All frames that hold a page, ascending."""
        state = self._state[: self._frames.touched_count].copy()
        for block in np.flatnonzero(self._folded).tolist() if self._folded_count else ():
            state[block << HUGE_SHIFT : (block + 1) << HUGE_SHIFT] = state[block << HUGE_SHIFT]
        return (np.flatnonzero(state >= LIVE) + self.base).astype(np.uint64)

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
            idle = (self._state[indices] == FREE_DIRTY) & (self._freed_in[indices] == freed_in & 0xFF)
            frames = frames[idle & ~self._folded[indices >> HUGE_SHIFT]]
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
        """Mirror number `slot` (from 1) maps `pages` to the own `frames`; both may be large, at the same positions."""
        indices = self._cells(frames)
        if len(indices) != len(frames):
            pages, frames = page_by_page(pages), page_by_page(frames)
            indices = self._cells(frames)
        pages = pages & word_of(LARGE - 1)
        new = np.uint64(slot) << _PLACE_BITS | pages
        old = self._places[indices]
        kept = (old != 0) & (old != new)
        if any_of(kept):
            for index, place in zip(indices[kept].tolist(), old[kept].tolist(), strict=True):
                self._more.setdefault(index, set()).add(place)
        self._places[indices] = new

    def mappings(self, frames: Words) -> list[tuple[int, Words]]:
        """(mirror number, pages) that may map one of `frames`, large ones by large ones."""
        indices = self._cells(frames)
        places = self._places[indices]
        marks = self._of(indices) & word_of(LARGE)
        mapped = places != 0
        places, marks = places[mapped], marks[mapped]
        if self._more:
            extra = sorted((place, index) for index in self._more.keys() & set(indices.tolist()) for place in self._more[index])
            places = np.concatenate((places, np.array([place for place, _ in extra], dtype=np.uint64)))
            marks = np.concatenate((marks, self._of(np.array([index for _, index in extra], dtype=np.intp)) & word_of(LARGE)))
        if len(places) == 0:
            return []
        slots, pages = places >> _PLACE_BITS, places & _PLACE_PAGE_MASK | marks
        if all_of(slots == slots[0]):
            return [(int(slots[0]), pages)]
        return [(slot, pages[slots == np.uint64(slot)]) for slot in np.unique(slots).tolist()]

    def mappings_one(self, frame: int) -> list[tuple[int, int]]:
        """`mappings` for one frame, without arrays: (mirror number, page)."""
        index = frame - self.base
        place = self._one_place[index]
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
