"""The invariants of tables and frames after every step, at the cost of what the step has changed.

`invariants.check` looks at everything, which after each step of a program is a hundred times too much. A `Ledger` remembers what every
page table, every struct page and every VMA said when it last looked. What differs now is what has changed, whoever changed it and however:
nobody marks anything for it, and a bug that corrupts a table cannot forget to. Then the rules of `invariants.py` are asked of that, and of
what it reaches:

- an *entry* that changed: its rules, and those of the frames that it maps now or mapped before;
- a *frame* whose struct page changed, or that is mapped more or less often: its rules; if the entries that lead to it did not change
  with it, or it is shared, those of all entries (a fork, an exit);
- *VMAs* that changed: the rules of all entries of their process.

How often each frame must be mapped is kept as a count for each frame, which changed entries add to and take from. When something is wrong,
everything is looked at, so that what is said is what `check` says; and everything is forgotten, so that it is said again next time.

Copies of all that take as much memory as page tables and struct pages do; none are made before the first look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from hmmnet.changes import NO_CHANGES, Changes, Seen
from hmmnet.pages import HUGE_PAGES, HUGE_SHIFT, PAGES_MAX, Words

from . import invariants, pte
from .frames import PhysicalMemory
from .mm import Mm
from .zones import STATE, HostZone, Index, Zone

MIGRATION_S_MAX = 60.0
"""Emulated seconds that a migration entry may stay (I5): longer than a device may be silent, and its lease and patience after that."""
NOT_YET_S = -1.0
"""Since when, of a page that has been found behind a migration entry in this very look."""
NOTED = np.uint64(pte.YOUNG | pte.DIRTY | pte.SOFT_DIRTY)
_STEPS = np.arange(HUGE_PAGES, dtype=np.uint64)
_LOUD = np.array([name in {"mapcount", "flags", "mapping"} for name in STATE])
"""Which rows of a zone's state the rules of entries look at."""
_NOWHERE = np.zeros(0, np.intp)

Counts = npt.NDArray[np.int32]


class _Table:
    """The page table of one process, as it was seen."""

    def __init__(self, mm: Mm) -> None:
        self.mm = mm
        self.areas = invariants.areas(mm)
        self.rss = 0
        self.blocks = 0
        """Blocks that are mapped as one."""
        self.small = NO_CHANGES
        self.huge = NO_CHANGES
        """What the last look found to be another, page by page and (by number) block by block."""
        self._vmas: list[tuple[object, ...]] = []
        self._ptes = Seen(mm.table.ptes)
        self._pmds = Seen(mm.table.pmds)

    def look(self) -> Changes:
        """The pages whose entries changed, blocks page by page."""
        self.small, self.huge = self._ptes.changes(), self._pmds.changes()
        if not len(self.huge.pages):
            return self.small
        pages = ((self.huge.pages << np.uint64(HUGE_SHIFT))[:, np.newaxis] + _STEPS).reshape(-1)
        whole = Changes(pages, self._pages_of(self.huge.before), self._pages_of(self.huge.now))
        return Changes(*(np.concatenate(both) for both in zip(self.small, whole, strict=True)))

    def _pages_of(self, blocks: Words) -> Words:
        """The entries that those of `blocks` stand for; none for an empty one."""
        entries = self.mm.table.expanded(blocks).reshape(-1, HUGE_PAGES)
        entries[blocks == 0] = 0
        return entries.reshape(-1)

    def all(self) -> Words:
        """Every entry that was there at the last look, blocks page by page."""
        return np.concatenate((self._ptes.all(), self.mm.table.expanded(self._pmds.all())))

    def vmas_changed(self) -> bool:
        """Whether the VMAs are others than at the last look; then they are checked."""
        mm = self.mm
        vmas: list[tuple[object, ...]] = [
            (vma.start, vma.end, vma.flags, vma.pgoff, vma.anon, vma.chain, vma.file, vma.userfault) for vma in mm.vmas.each()
        ]
        if vmas == self._vmas:
            return False
        self._vmas = vmas
        invariants.check_vmas(mm)
        self.areas = invariants.areas(mm)
        return True

    def check_blocks(self, memory: PhysicalMemory, *, folded: bool) -> None:
        """The rules of huge pages, where one came or went, or may have: `folded` says that of folios."""
        self.blocks += int(np.count_nonzero(self.huge.now)) - int(np.count_nonzero(self.huge.before))
        count = self.mm.table.pmd_count
        if folded or len(self.huge.pages) or count != self.blocks or (count and len(self.small.pages)):
            invariants.check_blocks(memory, self.mm)
            return
        if any(zone.folded_count for zone in memory.zones.values()):
            invariants.check_unfolded(memory, self.mm, self.small.now)


class _Frames:
    """The struct pages of one zone, as they were seen; how often each frame is mapped, and behind how many migration entries it is."""

    def __init__(self, zone: Zone) -> None:
        self.zone = zone
        self.used = 0
        self.expected: Counts = np.zeros(0, np.int32)
        self.behind: Counts = np.zeros(0, np.int32)
        self.charges: Counter[int] = Counter()
        self.touched: list[Index] = []
        """Frames that are mapped otherwise than at the last look."""
        self.folded = False
        """Whether folios were folded or unfolded since the last look."""
        self._used_count = self._folded_count = 0
        self._state = np.zeros((len(STATE), 0), np.uint32)
        self._index = np.zeros(0, np.uint64)
        self._raw = self._raw_index = self._raw_folded = b""

    def grow(self) -> None:
        """Frames may have come into use."""
        used = self.zone.used.stop
        if used > self.used:
            self.expected, self.behind = (
                np.concatenate((old, np.zeros(used - self.used, np.int32))) for old in (self.expected, self.behind)
            )
            self.used = used

    def tally(self, counts: Counts, where: Index, step: int) -> None:
        """The frames at `where` are mapped, or behind migration entries, once more (`step` 1) or less (-1)."""
        last = where.stop if isinstance(where, slice) else int(where.max()) + 1
        assert last <= self.used, f"{self.zone.owner}: a frame is mapped that was never allocated"
        if isinstance(where, slice):
            counts[where] += step
        else:
            np.add.at(counts, where, step)
        self.touched.append(where)

    def look(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """The frames whose struct pages changed: all, and those of which the rules of entries must be asked again."""
        zone, used = self.zone, self.used
        raw, index = zone.state[:, :used].tobytes(), zone.index[:used].tobytes()
        folded = zone.folded[: (used >> HUGE_SHIFT) + 1].tobytes()
        self.folded = folded != self._raw_folded
        if raw == self._raw and index == self._raw_index and not self.folded:
            return _NOWHERE, _NOWHERE
        state, numbers = np.frombuffer(raw, np.uint32).reshape(len(STATE), used), np.frombuffer(index, np.uint64)
        if self.folded or zone.folded_count:
            changed = loud = np.arange(used)  # the state of a head is that of all its frames
        else:
            other, moved = self._differs(state, numbers)
            changed, loud = (other.any(axis=0) | moved).nonzero()[0], (other[_LOUD].any(axis=0) | moved).nonzero()[0]
        self._state, self._index = state, numbers
        self._raw, self._raw_index, self._raw_folded = raw, index, folded
        return changed, loud

    def _differs(self, state: npt.NDArray[np.uint32], numbers: Words) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Where the struct pages, and where their indices, are others than they were."""
        before = self._state.shape[1]
        other, moved = state != 0, numbers != 0
        other[:, :before], moved[:before] = state[:, :before] != self._state, numbers[:before] != self._index
        return other, moved

    def check(self, changed: npt.NDArray[np.intp]) -> None:
        """The rules of frames, of those that changed or are mapped otherwise."""
        zone, where = self.zone, self.touched
        if where or len(changed):
            parts = [np.arange(part.start, part.stop) if isinstance(part, slice) else part for part in where]
            at = np.concatenate((changed, *parts))
            invariants.check_frames(zone, at, self.expected[at], quiet=False)
            self.touched = []
        if len(changed):
            if zone.folded_count or self.folded:
                invariants.check_folded(zone, quiet=False)
            self.charges = invariants.charges(zone)
        used = zone.allocator.used_count if isinstance(zone, HostZone) else 0
        if len(changed) or used != self._used_count:
            invariants.check_free(zone)
            self._used_count = used
        if zone.folded_count != self._folded_count:
            invariants.check_folded(zone, quiet=False)
            self._folded_count = zone.folded_count


class Ledger:
    """What was seen of `memory` and of the processes in it. Of each machine there can be one: see `hmmnet.changes.Seen`."""

    def __init__(self, memory: PhysicalMemory) -> None:
        self._memory = memory
        self._tables: dict[Mm, _Table] = {}
        self._zones: dict[int, _Frames] = {}
        self._moving: dict[tuple[Mm, int], float] = {}
        """Since when a page is behind a migration entry."""

    def look(self, mms: Sequence[Mm], now_s: float) -> dict[int, Words]:
        """Raise AssertionError if a rule is broken by what has changed since the last look, as `check` does of all; while things move.

        `mms` are all address spaces that live, `now_s` is the machine's time. Returns, by process, pages whose entries lead elsewhere now,
        or give other rights.
        """
        try:
            found = self._look(mms)
        except AssertionError:
            self.forget()
            invariants.check(self._memory, mms, quiet=False)
            raise
        self._watch(now_s)
        return found

    def forget(self) -> None:
        """Look at everything next time."""
        self._tables.clear()
        self._zones.clear()

    def _look(self, mms: Sequence[Mm]) -> dict[int, Words]:
        for number in [number for number, seen in self._zones.items() if self._memory.zones.get(number) is not seen.zone]:
            del self._zones[number]
        for zone in self._memory.zones.values():
            self._frames(zone).grow()
        self._drop_ended(mms)
        changes = {mm: self._table(mm).look() for mm in mms}
        for mm, changed in changes.items():
            self._count(mm, changed)
        self._check(changes)
        return {mm.number: changed.pages[_elsewhere(changed)] for mm, changed in changes.items() if len(changed.pages)}

    def _table(self, mm: Mm) -> _Table:
        seen = self._tables.get(mm)
        if seen is None:
            seen = self._tables[mm] = _Table(mm)
        return seen

    def _frames(self, zone: Zone) -> _Frames:
        seen = self._zones.get(zone.number)
        if seen is None or seen.zone is not zone:
            seen = self._zones[zone.number] = _Frames(zone)
        return seen

    # --- how often frames are mapped ------------------------------------------------------------------------------------------------

    def _drop_ended(self, mms: Sequence[Mm]) -> None:
        """Processes that are gone map nothing any more."""
        for mm in [mm for mm in self._tables if mm not in mms]:
            self._tally(mm, self._tables.pop(mm).all(), -1)
            self._moving = {key: since for key, since in self._moving.items() if key[0] is not mm}

    def _count(self, mm: Mm, changed: Changes) -> None:
        """Entries changed."""
        if len(changed.pages) == 0:
            return
        before, now = changed.before[changed.before != 0], changed.now[changed.now != 0]
        self._tables[mm].rss += self._tally(mm, now, 1) - self._tally(mm, before, -1)
        for page in changed.pages[changed.before & invariants.KIND == pte.MIGRATION].tolist():
            self._moving.pop((mm, page), None)
        for page in changed.pages[changed.now & invariants.KIND == pte.MIGRATION].tolist():
            self._moving[mm, page] = NOT_YET_S

    def _tally(self, mm: Mm, entries: Words, step: int) -> int:
        """`entries`, none of them empty, came (`step` 1) or went (-1); how many of them count in rss."""
        if len(entries) == 0:
            return 0
        moving = entries & invariants.KIND == pte.MIGRATION
        for rows, behind in ((invariants.mapped(entries), False), (moving, True)):
            for zone, _, where in self._memory.where(invariants.known(self._memory, mm, pte.frames_of(entries[rows]))):
                seen = self._zones[zone.number]
                seen.tally(seen.behind if behind else seen.expected, where, step)
        return int(np.count_nonzero(invariants.counted(entries)))

    # --- the rules ------------------------------------------------------------------------------------------------------------------

    def _check(self, changes: Mapping[Mm, Changes]) -> None:
        """Ask the rules of what has changed, and of what that reaches."""
        memory = self._memory
        frames = {number: seen.look() for number, seen in self._zones.items()}
        folded = any(seen.folded for seen in self._zones.values())
        everywhere = self._reaches_others(changes, {number: loud for number, (_, loud) in frames.items() if len(loud)})
        for mm, changed in changes.items():
            seen = self._tables[mm]
            if seen.vmas_changed() or everywhere:
                pages = mm.table.occupied(0, PAGES_MAX)
                invariants.check_entries(memory, mm, seen.areas, pages, mm.table.gather(pages))
            elif len(changed.pages):
                there = changed.now != 0
                invariants.check_entries(memory, mm, seen.areas, changed.pages[there], changed.now[there])
            seen.check_blocks(memory, folded=folded)
            invariants.check_rss(mm, seen.rss)
        for number, (changed_frames, _) in frames.items():
            self._zones[number].check(changed_frames)
        invariants.check_charges(memory, sum((seen.charges for seen in self._zones.values()), Counter()))

    def _reaches_others(self, changes: Mapping[Mm, Changes], loud: Mapping[int, npt.NDArray[np.intp]]) -> bool:
        """Whether an entry that did not change may lead to a frame whose struct page did (`loud`, by zone)."""
        if not loud:
            return False
        entries = np.concatenate([changed.now for changed in changes.values()]) if changes else NO_CHANGES.now
        fresh = Counter(pte.frames_of(entries[entries != 0]).tolist())
        for number, where in loud.items():
            seen = self._zones[number]
            held = seen.expected[where] + seen.behind[where]
            base = seen.zone.base
            if any(fresh[base + at] < times for at, times in zip(where[held > 0].tolist(), held[held > 0].tolist(), strict=True)):
                return True
        return False

    def _watch(self, now_s: float) -> None:
        """Migration entries do not stay (I5)."""
        for (mm, page), since_s in self._moving.items():
            if since_s == NOT_YET_S:
                self._moving[mm, page] = now_s
            assert since_s == NOT_YET_S or now_s - since_s <= MIGRATION_S_MAX, (
                f"process {mm.number}: page 0x{page:x} has been behind a migration entry for {now_s - since_s:g} s (I5)"
            )


def _elsewhere(changed: Changes) -> npt.NDArray[np.bool_]:
    """Which changes are of more than what the processor notes by itself."""
    which: npt.NDArray[np.bool_] = (changed.before ^ changed.now) & ~NOTED != 0
    return which
