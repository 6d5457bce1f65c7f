"""What a `Ledger` has seen: the page table of a process and its VMAs, and the struct pages of a zone, as they were at its last look.

Each notes what is another now (`note_changes`), keeps that until it has been checked (`over`), and asks the rules that concern nothing
else: those of VMAs, of huge pages, and of frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from hmmnet.changes import NO_CHANGES, Changes, Seen
from hmmnet.pages import HUGE_PAGES, HUGE_SHIFT, Words, word_of

from . import invariants
from .frames import PhysicalMemory
from .memcg import CHARGE_SHIFT
from .mm import Mm
from .zones import STATE, HostZone, Index, Zone

FEW = 24
"""Entries or frames up to which each is looked at by itself."""
NO_PAGES = 0, 0
"""What a look found the VMAs to be others between, when they are not."""
_STEPS = np.arange(HUGE_PAGES, dtype=np.uint64)
_LOUD = frozenset(row for row, name in enumerate(STATE) if name in {"mapcount", "flags", "mapping"})
"""Which rows of a zone's state the rules of entries look at."""
_NOWHERE: Sequence[int] = ()
_STATE_OF = attrgetter("start", "end", "flags", "pgoff", "anon", "chain", "file", "userfault")
"""Of a VMA, all that the rules look at."""

Counts = npt.NDArray[np.int32]


class SeenTable:
    """The page table of one process, as it was seen."""

    def __init__(self, mm: Mm) -> None:
        self.mm = mm
        self._areas: invariants.Areas | None = None
        self.rss = 0
        self.blocks = 0
        """Blocks that are mapped as one."""
        self.small = self.huge = self.changed = NO_CHANGES
        """What the last look found to be another: pages that are mapped by themselves, blocks by number, and all, page by page."""
        self.between = NO_PAGES
        """Between which pages the last look found the VMAs to be others."""
        self.vmas: list[tuple[Any, ...]] = []
        """What the VMAs said at the last look."""
        self.there = mm.vmas.each()
        """Those that there are now."""
        self.ptes, self.pmds = mm.table.ptes, mm.table.pmds
        self._ptes = Seen(self.ptes)
        self._pmds = Seen(self.pmds)

    def note_changes(self) -> bool:
        """Note what is another here than at the last look: VMAs, entries. Returns whether anything is, or what is counted; see `over`."""
        vmas = list(map(_STATE_OF, self.there))
        others = vmas != self.vmas
        if others:
            self._look_at_vmas(vmas)
        if self.ptes.changed or self.pmds.changed:
            self._look_at_entries()
        return others or self.changed is not NO_CHANGES or self.rss != self.mm.rss or self.blocks != self.mm.table.pmd_count

    def _look_at_entries(self) -> None:
        """The pages whose entries changed, blocks page by page."""
        self.small = self._ptes.changes()
        self.huge = self._pmds.changes() if self.pmds.changed else NO_CHANGES
        self.changed = self.small
        if not len(self.huge.pages):
            return
        pages = ((self.huge.pages << word_of(HUGE_SHIFT))[:, np.newaxis] + _STEPS).reshape(-1)
        whole = Changes(pages, self._pages_of(self.huge.before), self._pages_of(self.huge.now))
        self.changed = Changes(*(np.concatenate(both) for both in zip(self.small, whole, strict=True)))

    def over(self) -> None:
        """What the last look noted has been checked, and is forgotten."""
        self.small = self.huge = self.changed = NO_CHANGES
        self.between = NO_PAGES

    def _pages_of(self, blocks: Words) -> Words:
        """The entries that those of `blocks` stand for; none for an empty one."""
        entries = self.mm.table.expanded(blocks).reshape(-1, HUGE_PAGES)
        entries[blocks == 0] = 0
        return entries.reshape(-1)

    def all(self) -> Words:
        """Every entry that was there at the last look, blocks page by page."""
        return np.concatenate((self._ptes.all(), self.mm.table.expanded(self._pmds.all())))

    def _look_at_vmas(self, now: list[tuple[Any, ...]]) -> None:
        """The VMAs, which say this `now`, are others than at the last look. All are checked then."""
        before = self.vmas
        self.vmas, self._areas = now, None
        invariants.check_vmas(self.mm)
        first = _alike(before, now)
        behind = _alike(before[first:][::-1], now[first:][::-1])
        others = before[first : len(before) - behind] + now[first : len(now) - behind]
        self.between = min(vma[0] for vma in others), max(vma[1] for vma in others)

    @property
    def areas(self) -> invariants.Areas:
        """The VMAs at the last look."""
        if self._areas is None:
            self._areas = invariants.areas(self.mm)
        return self._areas

    def check_blocks(self, memory: PhysicalMemory, *, folded: bool, folios: bool) -> None:
        """The rules of huge pages, where one came or went, or may have: `folded` says that of folios. `folios`: there are folded ones."""
        count, huge, changed = self.mm.table.pmd_count, self.huge is not NO_CHANGES, self.changed is not NO_CHANGES
        if huge:
            self.blocks += int(np.count_nonzero(self.huge.now)) - int(np.count_nonzero(self.huge.before))
        if folded or count != self.blocks or (changed and (count or huge)):
            invariants.check_blocks(memory, self.mm)
        elif changed and folios:
            invariants.check_unfolded(memory, self.mm, self.small.now)


class SeenFrames:
    """The struct pages of one zone, as they were seen; how often each frame is mapped, and behind how many migration entries it is."""

    def __init__(self, zone: Zone) -> None:
        self.zone = zone
        self.used = 0
        self.expected: Counts = np.zeros(0, np.int32)
        self.behind: Counts = np.zeros(0, np.int32)
        self.charges = invariants.NO_CHARGES
        self.touched: list[Index | int] = []
        """Frames that are mapped otherwise than at the last look."""
        self.folded = False
        """Whether folios were folded or unfolded since the last look."""
        self.free_count = self.folded_count = 0
        """How many frames of the host were free, and how many folios folded, when that was last checked."""
        self.allocator = zone.allocator if isinstance(zone, HostZone) else None
        self.changed = self.loud = _NOWHERE
        """The frames whose struct pages the last look found to be others: all, and those that the rules of entries look at."""
        self._state = np.zeros((len(STATE) + 1, 0), np.uint32)
        self._index = np.zeros(0, np.uint64)
        self._raw = b"", b""
        """The struct pages at the last look: states, and which are folded; indices."""
        self._watch_used()

    def _watch_used(self) -> None:
        """Make the views at which who looks looks: making them takes as long as the look, and arrays ten times as long to become bytes."""
        zone, used = self.zone, self.used
        self._states, self._indices = zone.state[:, :used].data, zone.index[:used].data

    def _grow(self) -> None:
        """Frames have come into use."""
        used = self.zone.used.stop
        more = np.zeros(used - self.used, np.int32)
        self.expected, self.behind = np.concatenate((self.expected, more)), np.concatenate((self.behind, more))
        self._state = np.concatenate((self._state, np.zeros((len(STATE) + 1, used - self.used), np.uint32)), axis=1)
        self._index = np.concatenate((self._index, np.zeros(used - self.used, np.uint64)))
        self.used = used
        self._watch_used()

    def tally(self, counts: Counts, where: Index, step: int) -> None:
        """The frames at `where` are mapped, or behind migration entries, once more (`step` 1) or less (-1)."""
        last = where.stop if isinstance(where, slice) else int(where.max()) + 1
        assert last <= self.used, f"{self.zone.owner}: a frame is mapped that was never allocated"
        if isinstance(where, slice):
            counts[where] += step
        else:
            np.add.at(counts, where, step)
        self.touched.append(where)

    def note_changes(self) -> bool:
        """Note which struct pages are others than at the last look. Returns whether any are, or what is counted beside them; see `over`.

        They are compared as bytes, which takes less than anything else.
        """
        zone, allocator = self.zone, self.allocator
        if self.used != (zone.offered if allocator is None else allocator.fresh - zone.base):  # `zone.used`
            self._grow()
        raw = self._states.tobytes(), self._indices.tobytes()
        if raw != self._raw:
            self._compare(raw)
            return True
        return zone.folded_count != self.folded_count or (allocator is not None and allocator.free_count != self.free_count)

    def _compare(self, raw: tuple[bytes, bytes]) -> None:
        """The struct pages, which are `raw` now, are others than they were: `changed` then, and `loud` for the rules of entries."""
        used = self.used
        changed: set[int] = set()
        loud: set[int] = set()
        if raw[0] != self._raw[0]:
            state = np.frombuffer(raw[0], np.uint32).reshape(len(STATE) + 1, used)
            words = (state != self._state).reshape(-1).nonzero()[0].tolist()
            self._state = state
            self.folded = words != [] and words[-1] >= len(STATE) * used
            for word in words:
                row, at = divmod(word, used)
                changed.add(at)
                if row in _LOUD:
                    loud.add(at)
        if raw[1] != self._raw[1]:
            numbers = np.frombuffer(raw[1], np.uint64)
            moved = (numbers != self._index).nonzero()[0].tolist()
            self._index = numbers
            changed.update(moved)
            loud.update(moved)
        self._raw = raw
        if self.folded or self.zone.folded_count:
            self.changed = self.loud = range(used)  # the state of a head is that of all its frames
        else:
            self.changed, self.loud = sorted(changed), sorted(loud)

    def check(self) -> None:
        """The rules of frames, of those that changed or are mapped otherwise."""
        zone, changed, bare = self.zone, self.changed, not (self.zone.folded_count or self.folded)
        if bare and len(self.touched) + len(changed) <= FEW:
            charged = self._check_few()
        else:
            at = np.concatenate([_as_array(where) for where in (*self.touched, np.array(changed, np.intp))])
            invariants.check_frames(zone, at, self.expected[at], quiet=False)
            charged = True
        self.touched = []
        if changed and (charged or self.charges is not invariants.NO_CHARGES):
            self.charges = invariants.charges(zone, slice(0, self.used))
        free = 0 if self.allocator is None else self.allocator.free_count
        if changed or free != self.free_count:
            invariants.check_free(zone)
            self.free_count = free
        if (changed and not bare) or zone.folded_count != self.folded_count:
            invariants.check_folded(zone, quiet=False)
            self.folded_count = zone.folded_count

    def _check_few(self) -> bool:
        """The rules of each of a few frames; whether one that changed is charged to a group."""
        zone, flags = self.zone, self.zone.cells.flags
        places = {*self.changed}
        for where in self.touched:
            places.update((where,) if isinstance(where, int) else _as_array(where).tolist())
        for at in places:
            assert invariants.frame_agrees(zone, at, self.expected[at]), f"{zone.owner}: a frame breaks a rule"
        return any(flags[at] >> CHARGE_SHIFT for at in self.changed)

    def over(self) -> None:
        """What the last look noted has been checked, and is forgotten."""
        self.changed = self.loud = _NOWHERE
        self.folded = False


def _as_array(where: Index | int) -> npt.NDArray[np.intp]:
    """Places as what selects them, each by itself."""
    if isinstance(where, slice):
        return np.arange(where.start, where.stop)
    return np.array([where], np.intp) if isinstance(where, int) else where


def _alike(some: Sequence[tuple[Any, ...]], others: Sequence[tuple[Any, ...]]) -> int:
    """How many of two lists are the same from the beginning."""
    count = 0
    for one, other in zip(some, others, strict=False):
        if one != other:
            break
        count += 1
    return count
