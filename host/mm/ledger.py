"""The invariants of tables and frames after every step, at the cost of what the step has changed.

`invariants.check` looks at everything, which after each step of a program is a hundred times too much. A `Ledger` remembers what every
page table, every struct page and every VMA said when it last looked (`seen.py`). What differs now is what has changed, whoever changed it
and however: nobody marks anything for it, and a bug that corrupts a table cannot forget to. Then the rules of `invariants.py` are asked of
that, and of what it reaches:

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

import numpy as np
import numpy.typing as npt

from hmmnet.changes import NO_CHANGES, Changes
from hmmnet.pages import PAGES_MAX, ZONE_SHIFT, Words, word_of

from . import invariants, pte
from .frames import PhysicalMemory
from .mm import Mm
from .seen import FEW, NO_PAGES, SeenFrames, SeenTable
from .zones import Index, Zone

MIGRATION_S_MAX = 60.0
"""Emulated seconds that a migration entry may stay (I5): longer than a device may be silent, and its lease and patience after that."""
NOT_YET_S = -1.0
"""Since when, of a page that has been found behind a migration entry in this very look."""
NOTED = word_of(pte.YOUNG | pte.DIRTY | pte.SOFT_DIRTY)
ZONE_BITS = word_of(ZONE_SHIFT)


class Ledger:
    """What was seen of `memory` and of the processes in it. Of each machine there can be one: see `hmmnet.changes.Seen`."""

    def __init__(self, memory: PhysicalMemory) -> None:
        self._memory = memory
        self._tables: dict[Mm, SeenTable] = {}
        self._zones: dict[int, SeenFrames] = {}
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
        self._zones = {zone.number: known[zone.number] if self._knows(zone) else SeenFrames(zone) for zone in zones}
        for mm in [mm for mm in self._tables if mm not in mms]:
            self._tally(self._tables[mm].all(), -1)
            self._moving = {key: since for key, since in self._moving.items() if key[0] is not mm}
        self._tables = {mm: self._tables.get(mm) or SeenTable(mm) for mm in mms}
        self._seen = zones, mms

    def _knows(self, zone: Zone) -> bool:
        """Whether it is a memory that was there at the last look."""
        seen = self._zones.get(zone.number)
        return seen is not None and seen.zone is zone

    # --- how often frames are mapped ------------------------------------------------------------------------------------------------

    def _count(self, table: SeenTable, changed: Changes) -> None:
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

    def _places(self, entries: Words) -> Iterator[tuple[SeenFrames, Index]]:
        """Where the struct pages are that `entries` lead to. Those of memory that has gone meanwhile have gone with it."""
        frames = pte.frames_of(entries)
        numbers = frames >> ZONE_BITS
        several = set(numbers.tolist())
        for number in several:
            seen = self._zones.get(number)
            if seen is not None:
                yield seen, seen.zone.index_of(frames if len(several) == 1 else frames[numbers == number])

    # --- the rules ------------------------------------------------------------------------------------------------------------------

    def _check(self, zones: Sequence[SeenFrames], tables: Sequence[SeenTable]) -> None:
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
                if table.between is not NO_PAGES:
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

    def _check_between(self, table: SeenTable, start: int, end: int) -> None:
        """The rules of all entries of pages [start, end) of a process."""
        pages = table.mm.table.occupied(start, end)
        if len(pages) == 0:
            return
        entries = table.mm.table.gather(pages, ascend=True)
        if len(pages) <= FEW and not self._folded:
            self._check_few(table, pages, entries)
        else:
            invariants.check_entries(self._memory, table.mm, table.areas, pages, entries)

    def _check_few(self, table: SeenTable, pages: Words, entries: Words) -> None:
        """The rules of a few entries, where no folio is folded; empty ones break none."""
        mm = table.mm
        for page, entry in zip(pages.tolist(), entries.tolist(), strict=True):
            assert not entry or invariants.entry_agrees(self._memory, mm, page, entry), f"process {mm.number}: an entry breaks a rule"

    def _check_changed(self, table: SeenTable) -> None:
        """The rules of the entries of a process that changed."""
        changed = table.changed
        if len(changed.pages) <= FEW and not self._folded:
            self._check_few(table, changed.pages, changed.now)
        else:
            there = changed.now.nonzero()[0]
            if len(there):
                invariants.check_entries(self._memory, table.mm, table.areas, changed.pages[there], changed.now[there])

    def _reaches_others(self, tables: Collection[SeenTable], zones: Sequence[SeenFrames]) -> bool:
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


def _led_to(tables: Collection[SeenTable]) -> dict[int, int]:
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
