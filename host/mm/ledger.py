"""The invariants of tables and frames after every step, at the cost of what the step has changed.

`invariants.check` looks at everything, which after each step of a program is a hundred times too much. A `Ledger` remembers what every
page table, every struct page and every VMA said when it last looked. What differs now is what has changed, whoever changed it and however:
nobody marks anything for it, and a bug that corrupts a table cannot forget to. Then the rules of `invariants.py` are asked of that, and of
what it reaches:

- an *entry* that changed: its rules, and those of the frames that it maps now or mapped before;
- a *frame* whose struct page changed, or that is mapped more or less often: its rules; if the entries that lead to it did not change
  with it, or it is shared, those of all entries (a fork, an exit);
- *VMAs* that changed: the rules of all entries that lie there, or lay there.

How often each frame must be mapped is kept as a count for each frame, which changed entries add to and take from. Most steps change a few
entries and frames: those are looked at one by one, which is faster than arrays are. When something is wrong, everything is looked at, so
that what is said is what `check` says; and everything is forgotten, so that it is said again next time.

Copies of all that take as much memory as page tables and struct pages do; none are made before the first look.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from hmmnet.changes import NO_CHANGES, Changes, Seen
from hmmnet.pages import HUGE_PAGES, HUGE_SHIFT, PAGES_MAX, ZONE_SHIFT, Words

from . import invariants, pte
from .frames import PhysicalMemory
from .memcg import CHARGE_SHIFT
from .mm import Mm
from .zones import STATE, HostZone, Index, Zone

MIGRATION_S_MAX = 60.0
"""Emulated seconds that a migration entry may stay (I5): longer than a device may be silent, and its lease and patience after that."""
NOT_YET_S = -1.0
"""Since when, of a page that has been found behind a migration entry in this very look."""
NOTED = np.uint64(pte.YOUNG | pte.DIRTY | pte.SOFT_DIRTY)
FEW = 24
"""Entries or frames up to which each is looked at by itself."""
ZONE_BITS = np.uint64(ZONE_SHIFT)
_STEPS = np.arange(HUGE_PAGES, dtype=np.uint64)
_LOUD = frozenset(row for row, name in enumerate(STATE) if name in {"mapcount", "flags", "mapping"})
"""Which rows of a zone's state the rules of entries look at."""
_NOWHERE: Sequence[int] = ()
_NO_PAGES = 0, 0
_STATE_OF = attrgetter("start", "end", "flags", "pgoff", "anon", "chain", "file", "userfault")
"""Of a VMA, all that the rules look at."""

Counts = npt.NDArray[np.int32]


class _Table:
    """The page table of one process, as it was seen."""

    def __init__(self, mm: Mm) -> None:
        self.mm = mm
        self._areas: invariants.Areas | None = None
        self.rss = 0
        self.blocks = 0
        """Blocks that are mapped as one."""
        self.small = self.huge = self.changed = NO_CHANGES
        """What the last look found to be another: pages that are mapped by themselves, blocks by number, and all, page by page."""
        self.between = _NO_PAGES
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
        pages = ((self.huge.pages << np.uint64(HUGE_SHIFT))[:, np.newaxis] + _STEPS).reshape(-1)
        whole = Changes(pages, self._pages_of(self.huge.before), self._pages_of(self.huge.now))
        self.changed = Changes(*(np.concatenate(both) for both in zip(self.small, whole, strict=True)))

    def over(self) -> None:
        """What the last look noted has been checked, and is forgotten."""
        self.small = self.huge = self.changed = NO_CHANGES
        self.between = _NO_PAGES

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


class _Frames:
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


class Ledger:
    """What was seen of `memory` and of the processes in it. Of each machine there can be one: see `hmmnet.changes.Seen`."""

    def __init__(self, memory: PhysicalMemory) -> None:
        self._memory = memory
        self._tables: dict[Mm, _Table] = {}
        self._zones: dict[int, _Frames] = {}
        self._seen: tuple[list[Zone], list[Mm]] = [], []
        """What there was at the last look."""
        self._folded = False
        """Whether there are folded folios."""
        self._charged: dict[int, int] = {}
        """What groups said that is charged to them when that was last checked."""
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
        if self._moving:
            self._watch(now_s)
        return found

    def forget(self) -> None:
        """Look at everything next time. What is in transit then has its time from then on."""
        self._tables.clear()
        self._zones.clear()
        self._moving.clear()
        self._seen = [], []

    def _look(self, mms: Sequence[Mm]) -> dict[int, Words]:
        now = list(self._memory.zones.values()), list(mms)
        if have_met := now != self._seen:
            self._meet(*now)
        zones = [seen for seen in self._zones.values() if seen.note_changes()]
        tables = [table for table in self._tables.values() if table.note_changes()]
        found: dict[int, Words] = {}
        if not (zones or tables or have_met):  # as after most steps
            if self._memory.cgroups.any and self._memory.cgroups.charged() != self._charged:
                self._check_charges()
            return found
        for table in tables:
            if (changed := table.changed) is not NO_CHANGES:
                self._count(table, changed)
                pages = changed.pages[_elsewhere(changed)]
                if len(pages):
                    found[table.mm.number] = pages
        self._check(zones, tables)
        for seen in zones:
            seen.over()
        for table in tables:
            table.over()
        return found

    def _meet(self, zones: list[Zone], mms: list[Mm]) -> None:
        """There are other memories or processes than at the last look. Those that are gone map nothing any more."""
        known = self._zones
        self._zones = {zone.number: known[zone.number] if self._knows(zone) else _Frames(zone) for zone in zones}
        for mm in [mm for mm in self._tables if mm not in mms]:
            self._tally(self._tables[mm].all(), -1)
            self._moving = {key: since for key, since in self._moving.items() if key[0] is not mm}
        self._tables = {mm: self._tables.get(mm) or _Table(mm) for mm in mms}
        self._seen = zones, mms

    def _knows(self, zone: Zone) -> bool:
        """Whether it is a memory that was there at the last look."""
        seen = self._zones.get(zone.number)
        return seen is not None and seen.zone is zone

    # --- how often frames are mapped ------------------------------------------------------------------------------------------------

    def _count(self, table: _Table, changed: Changes) -> None:
        """Entries changed."""
        mm = table.mm
        table.rss += self._tally(changed.now, 1) - self._tally(changed.before, -1)
        if self._moving or np.count_nonzero(changed.now & invariants.KIND == pte.MIGRATION):
            for page in changed.pages[changed.before & invariants.KIND == pte.MIGRATION].tolist():
                self._moving.pop((mm, page), None)
            for page in changed.pages[changed.now & invariants.KIND == pte.MIGRATION].tolist():
                self._moving[mm, page] = NOT_YET_S

    def _tally(self, entries: Words, step: int) -> int:
        """`entries` came (`step` 1) or went (-1), but for the empty ones; how many of them count in rss."""
        if len(entries) <= FEW:
            return sum([self._tally_one(entry, step) for entry in entries.tolist() if entry])
        kinds = entries & invariants.KIND
        plain = entries & invariants.SPECIAL == 0
        for seen, where in self._places(entries[invariants.MAPPED[kinds] & plain]):
            seen.tally(seen.expected, where, step)
        moving = kinds == pte.MIGRATION
        if np.count_nonzero(moving):
            for seen, where in self._places(entries[moving]):
                seen.tally(seen.behind, where, step)
        return int(np.count_nonzero(invariants.COUNTED[kinds] & plain & (entries != 0)))

    def _tally_one(self, entry: int, step: int) -> bool:
        """`_tally` of one entry that is not empty."""
        kind = entry & pte.KIND
        moving, plain = kind == pte.MIGRATION, not entry & pte.SPECIAL
        if moving or (plain and kind in invariants.MAPPING):
            frame = entry >> pte.FRAME_SHIFT
            if (number := frame >> ZONE_SHIFT) in self._zones:
                seen = self._zones[number]
                at = frame - seen.zone.base
                assert at < seen.used, f"{seen.zone.owner}: a frame is mapped that was never allocated"
                (seen.behind if moving else seen.expected)[at] += step
                seen.touched.append(at)
        return plain and kind not in invariants.UNCOUNTED

    def _places(self, entries: Words) -> Iterator[tuple[_Frames, Index]]:
        """Where the struct pages are that `entries` lead to. Those of memory that has gone meanwhile have gone with it."""
        frames = pte.frames_of(entries)
        numbers = frames >> ZONE_BITS
        several = set(numbers.tolist())
        for number in several:
            seen = self._zones.get(number)
            if seen is not None:
                yield seen, seen.zone.index_of(frames if len(several) == 1 else frames[numbers == number])

    # --- the rules ------------------------------------------------------------------------------------------------------------------

    def _check(self, zones: Sequence[_Frames], tables: Sequence[_Table]) -> None:
        """Ask the rules of what has changed, in `zones` and `tables`, and of what that reaches."""
        memory = self._memory
        folded = folios = False
        for seen in self._zones.values():
            folded = folded or seen.folded
            folios = folios or seen.zone.folded_count > 0
        self._folded = folios or folded
        everywhere = bool(zones) and self._reaches_others(tables, zones)
        for table in self._tables.values() if everywhere or folded else tables:
            has_changed = table.changed is not NO_CHANGES
            if everywhere:
                self._check_between(table, 0, PAGES_MAX)
            else:
                if table.between is not _NO_PAGES:
                    self._check_between(table, *table.between)
                if has_changed:
                    self._check_changed(table)
            huge = table.blocks or table.huge is not NO_CHANGES
            if (has_changed and (folios or huge)) or folded or table.blocks != table.mm.table.pmd_count:
                table.check_blocks(memory, folded=folded, folios=folios)
            if table.rss != table.mm.rss:
                invariants.check_rss(table.mm, table.rss)
        for seen in self._zones.values():
            if seen.touched or seen in zones:
                seen.check()
        self._check_charges()

    def _check_charges(self) -> None:
        """Groups count what is charged to them."""
        charged = [seen.charges for seen in self._zones.values() if seen.charges is not invariants.NO_CHARGES]
        if charged or self._memory.cgroups.any:
            invariants.check_charges(self._memory, charged)
            self._charged = self._memory.cgroups.charged()

    def _check_between(self, table: _Table, start: int, end: int) -> None:
        """The rules of all entries of pages [start, end) of a process."""
        pages = table.mm.table.occupied(start, end)
        if len(pages) == 0:
            return
        entries = table.mm.table.gather(pages, ascend=True)
        if len(pages) <= FEW and not self._folded:
            self._check_few(table, pages, entries)
        else:
            invariants.check_entries(self._memory, table.mm, table.areas, pages, entries)

    def _check_few(self, table: _Table, pages: Words, entries: Words) -> None:
        """The rules of a few entries, where no folio is folded; empty ones break none."""
        mm = table.mm
        for page, entry in zip(pages.tolist(), entries.tolist(), strict=True):
            assert not entry or invariants.entry_agrees(self._memory, mm, page, entry), f"process {mm.number}: an entry breaks a rule"

    def _check_changed(self, table: _Table) -> None:
        """The rules of the entries of a process that changed."""
        changed = table.changed
        if len(changed.pages) <= FEW and not self._folded:
            self._check_few(table, changed.pages, changed.now)
        else:
            there = changed.now.nonzero()[0]
            if len(there):
                invariants.check_entries(self._memory, table.mm, table.areas, changed.pages[there], changed.now[there])

    def _reaches_others(self, tables: Collection[_Table], zones: Sequence[_Frames]) -> bool:
        """Whether an entry that did not change may lead to a frame of `zones` whose struct page did; `tables` have those that changed."""
        fresh: dict[int, int] | None = None
        for seen in zones:
            base = seen.zone.base
            for at in seen.loud:
                times = seen.expected[at] + seen.behind[at]
                if times:
                    if fresh is None:
                        fresh = _led_to(tables)
                    if fresh.get(base + at, 0) < times:
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


def _alike(some: Sequence[tuple[Any, ...]], others: Sequence[tuple[Any, ...]]) -> int:
    """How many of two lists are the same from the beginning."""
    count = 0
    for one, other in zip(some, others, strict=False):
        if one != other:
            break
        count += 1
    return count


def _led_to(tables: Collection[_Table]) -> dict[int, int]:
    """How many of the entries that changed lead to which frame now."""
    found: dict[int, int] = {}
    for table in tables:
        for entry in table.changed.now.tolist():
            if entry:
                frame = entry >> pte.FRAME_SHIFT
                found[frame] = found[frame] + 1 if frame in found else 1
    return found


def _elsewhere(changed: Changes) -> npt.NDArray[np.bool_]:
    """Which changes are of more than what the processor notes by itself."""
    which: npt.NDArray[np.bool_] = (changed.before ^ changed.now) & ~NOTED != 0
    return which
