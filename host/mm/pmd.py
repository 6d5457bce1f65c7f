"""Huge pages that migrate as one: the steps of `collect.py` with one row for each huge page (`Migration.large`).

What the kernel does behind MIGRATE_VMA_SELECT_COMPOUND (migrate_vma_collect_huge_pmd, migrate_vma_insert_huge_pmd_page): one PMD becomes
one migration entry, one source word with COMPOUND stands for the block, one target of the same size takes it over. Here that is a column
of PMDs and of head frames, so a pass over arrays costs a word for each *huge page*.

This is for the plain case: a block that is mapped as one, by this process alone, to a folded folio (`zones.py`); the huge zero page; a
block that was never touched. `takeable` tells which; everything else goes page by page as in `collect.py`, and moves whole where it can as
`compound.py` says.

A row is *torn* off when it cannot be one any more: there is no huge page for it at its target, or somebody split the block while it was
on its way (munmap of a part: split_huge_pmd of a migration entry). `tear` gives its 512 pages as an ordinary migration, which goes through
the steps that are left on its own.
"""

from __future__ import annotations

import numpy as np

from hmmnet.host.interfaces import Migration, Select
from hmmnet.pages import (
    DEVICE_ZONE_MIN,
    HUGE_PAGES,
    HUGE_SHIFT,
    MIGRATE_PFN_COMPOUND,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_SHIFT,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    ZONE_SHIFT,
    Words,
    word_of,
)

from . import collect as by_page
from . import pte
from .compound import split_under_way
from .finalize import finalize as finalize_small
from .frames import PhysicalMemory, frames_from, positions
from .memcg import CHARGE_MASK
from .mm import Mm
from .vma import VM_UFFD_MISSING, VM_WRITE
from .zones import ANON, COMPOUND, LOCKED

BOTH = word_of(MIGRATE_PFN_VALID | MIGRATE_PFN_MIGRATE)
MIGRATE = word_of(MIGRATE_PFN_MIGRATE)
VALID = word_of(MIGRATE_PFN_VALID)
NOT_MIGRATE = word_of(~MIGRATE_PFN_MIGRATE & (1 << 64) - 1)
_FRAME = word_of(MIGRATE_PFN_SHIFT)
_SHIFT = word_of(HUGE_SHIFT)
_COMPOUND = word_of(MIGRATE_PFN_COMPOUND)
_NONE = np.zeros(0, np.uint64)

Flags = np.ndarray[tuple[int], np.dtype[np.bool_]]


def takeable(mm: Mm, start: int, end: int, select: Select, owner: int) -> Words:
    """The blocks of [start, end), which lies in one VMA, that a migration takes as rows of their own; ascending block numbers."""
    if -(-start >> HUGE_SHIFT) >= end >> HUGE_SHIFT:
        return _NONE  # none lies there whole
    blocks = mm.table.blocks(start, end)
    if len(blocks):
        entries = mm.table.pmds.gather(blocks)
        blocks = blocks[_free_to_go(mm, entries, select, owner) | _is_zero(entries, select)]
    vma = mm.vmas.find(start)
    if not select.has(Select.SYSTEM) or vma is None or not vma.is_anonymous or vma.flags & VM_UFFD_MISSING:
        return blocks
    bare = mm.table.untouched(start, end)
    if mm.small_blocks and len(bare):
        small = np.array(sorted(mm.small_blocks), np.uint64) >> _SHIFT
        bare = bare[~np.isin(bare, small)]
    return np.union1d(blocks, bare) if len(bare) and len(blocks) else bare if len(bare) else blocks


def _is_zero(entries: Words, select: Select) -> Flags:
    """Which `entries` are the huge zero page, if that is to be replaced."""
    if not select.has(Select.SYSTEM):
        return np.zeros(len(entries), np.bool_)
    found: Flags = entries & word_of(pte.KIND | pte.SPECIAL) == pte.PRESENT | pte.SPECIAL
    return found


def _free_to_go(mm: Mm, entries: Words, select: Select, owner: int) -> Flags:
    """Which `entries` lead to folded folios of a kind that `select` asks for, mapped once, and held by nobody else."""
    ready: Flags = by_page.wanted(mm.memory, entries, select | Select.COMPOUND, owner)
    rows = np.flatnonzero(ready)
    for zone, part, where in mm.memory.where(pte.frames_of(entries[rows])):
        at = positions(where)
        good = zone.folded[at >> HUGE_SHIFT] & (zone.flags[at] & (LOCKED | ANON | COMPOUND) == ANON | COMPOUND)
        ready[rows[part]] = good & (zone.mapcount[at] == 1) & (zone.refcount[at] == 1) & (zone.pincount[at] == 0)
    return ready


def collect(mm: Mm, blocks: Words, select: Select, owner: int) -> tuple[Migration, Words]:
    """migrate_vma_collect for `blocks` that were takeable before mirrors were told; the rest, which are not any more, come back too."""
    entries = mm.table.pmds.gather(blocks)
    free = _free_to_go(mm, entries, select, owner)
    bare = _is_zero(entries, select)
    empty = entries == 0
    if empty.any():
        bare |= empty & _untouched(mm, blocks)
    taken = free | bare
    left = blocks[~taken]
    if mm.memory.points.armed:
        taken &= bare | by_page.lucky(mm, blocks << _SHIFT, "migrate.trylock", "migrate.count")
    if not taken.all():
        blocks, entries, free = blocks[taken], entries[taken], free[taken]
    rows = np.flatnonzero(free)
    heads = pte.frames_of(entries[rows])
    source = np.full(len(blocks), MIGRATE | _COMPOUND, np.uint64)
    source[rows] = heads << _FRAME | BOTH | _COMPOUND | pte.masked(entries[rows], pte.WRITE)
    mm.table.pmds.scatter(blocks[rows], by_page.waiting(entries[rows]))
    for zone, _, at in mm.memory.where(heads):
        zone.flags[at] |= np.uint32(LOCKED)
        zone.mapcount[at] = 0
    return Migration(blocks << _SHIFT, source, np.zeros(len(blocks), np.uint64), entries, owner, compound=True, large=True), left


def _untouched(mm: Mm, blocks: Words) -> Flags:
    first, last = int(blocks[0]), int(blocks[-1]) + 1
    found: Flags = np.isin(blocks, mm.table.untouched(first << HUGE_SHIFT, last << HUGE_SHIFT))
    return found


# --- tearing ----------------------------------------------------------------------------------------------------------------------


def tear(mm: Mm, migration: Migration, torn: Flags) -> Migration:
    """The pages of the rows `torn` as a migration of their own, which joins `migration.torn`; the rows are void from now on."""
    rows = np.flatnonzero(torn)
    pages, source, saved = migration.pages[rows], migration.source[rows], migration.saved[rows]
    for page, word in zip(pages.tolist(), source.tolist(), strict=True):
        if word & MIGRATE_PFN_VALID:
            mm.table.unfold(page)
            mm.memory.unfold(word >> MIGRATE_PFN_SHIFT)
    target = migration.target[rows]
    part = Migration(
        frames_from(pages),
        _page_words(source, source & VALID != 0),
        _page_words(target, target != 0),
        mm.table.expanded(saved),
        migration.owner,
        compound=True,
    )
    part.saved[part.source & VALID == 0] = np.repeat(saved, HUGE_PAGES)[part.source & VALID == 0]
    migration.source[rows] = migration.target[rows] = 0
    migration.torn.append(part)
    return part


def split_torn(mm: Mm, torn: Migration) -> None:
    """migrate_vma_split_unmapped_folio: the pages of `torn` are ordinary ones from now on, and what is empty is filled page by page."""
    torn.compound = False
    full = torn.source & VALID != 0
    for head in np.unique(torn.source[full] >> _FRAME >> _SHIFT).tolist():
        split_under_way(mm.memory, mm, torn, np.flatnonzero(torn.source >> _FRAME >> _SHIFT == head), head)
    mm.small_blocks.update(np.unique(torn.pages[~full] >> _SHIFT << _SHIFT).tolist())


def _page_words(words: Words, counts: Flags) -> Words:
    """The MIGRATE_PFN words of the pages of huge pages; the frame counts up where it `counts`."""
    out = np.repeat(words & ~_COMPOUND, HUGE_PAGES).reshape(-1, HUGE_PAGES)
    out[counts] += np.arange(HUGE_PAGES, dtype=np.uint64) << _FRAME
    return out.reshape(-1)


def _tear_split(mm: Mm, migration: Migration) -> None:
    """Rows whose block was split since they were collected are torn off."""
    torn = _unfolded(mm, migration.source, migration.source & VALID != 0)
    if torn.any():
        tear(mm, migration, torn)


def _unfolded(mm: Mm, words: Words, among: Flags) -> Flags:
    """Which of the MIGRATE_PFN `words` `among` those flagged lead to folios that are not folded any more."""
    out = among.copy()
    out[among] = ~mm.memory.folded(words[among] >> _FRAME)
    return out


# --- move, restore, finalize ------------------------------------------------------------------------------------------------------


def move(mm: Mm, migration: Migration) -> None:
    """migrate_vma_pages, for what is still one; `collect.move` for what is not."""
    _tear_split(mm, migration)
    memory, source, target = mm.memory, migration.source, migration.target
    source[(source & MIGRATE != 0) & (target & VALID == 0)] &= NOT_MIGRATE
    _insert(mm, migration)
    rows = np.flatnonzero(source & BOTH == BOTH)
    if len(rows):
        new = target[rows] >> _FRAME
        refcount, *state = memory.fields(source[rows] >> _FRAME, "refcount", "flags", "mapping", "index")
        held = refcount > 1
        if held.any():
            source[rows[held]] &= NOT_MIGRATE
            new, state = new[~held], [values[~held] for values in state]
        assert memory.folded(new).all(), "a huge page is folded since it was offered or allocated"
        for zone, part, where in memory.where(new):
            zone.refcount[where] = 1
            zone.flags[where], zone.mapping[where], zone.index[where] = (values[part] for values in state)
    for part_of in migration.torn:
        by_page.move(memory, mm, part_of)


def _insert(mm: Mm, migration: Migration) -> None:
    """migrate_vma_insert_huge_pmd_page: a target for blocks that were never touched, or are the huge zero page, if they still are."""
    rows = np.flatnonzero(migration.source & BOTH == MIGRATE)
    if len(rows) == 0:
        return
    pages = migration.pages[rows]
    vma = mm.vmas.find(int(pages[0]))
    assert vma is not None, "a migration holds the mmap lock"
    entries = mm.table.pmds.gather(pages >> _SHIFT)
    ready = (entries == migration.saved[rows]) & ((entries != 0) | _untouched(mm, pages >> _SHIFT))
    if mm.memory.points.armed:
        ready &= by_page.lucky(mm, pages, "migrate.insert", "memcg.charge")
    charge = 0
    if mm.cgroup is not None:
        charge = mm.cgroup.charge_bits
        for row in np.flatnonzero(ready).tolist():
            ready[row] = mm.cgroup.try_charge(HUGE_PAGES)
    migration.source[rows[~ready]] &= NOT_MIGRATE
    rows, pages = rows[ready], pages[ready]
    if len(rows) == 0:
        return
    heads = migration.target[rows] >> _FRAME
    bits = pte.MIGRATION | pte.ANON_EXCLUSIVE | pte.HUGE | (pte.WRITE | pte.DIRTY if vma.flags & VM_WRITE else 0)
    index = mm.anon_index(vma, pages)
    mm.table.set_pmds(pages >> _SHIFT, pte.entries_of(pte.NONE, heads, bits))
    migration.source[rows] |= np.uint64(bits & MIGRATE_PFN_WRITE)
    mm.rss += len(rows) * HUGE_PAGES
    assert mm.memory.folded(heads).all(), "a huge page is folded since it was offered"
    for zone, part, at in mm.memory.where(heads):
        zone.refcount[at] = 1
        zone.flags[at] = ANON | COMPOUND | LOCKED | charge
        zone.mapping[at] = vma.anon
        zone.index[at] = index[part]


def restore(mm: Mm, migration: Migration) -> None:
    """The targets, frames of a device, are gone between `move` and `finalize`: nothing has moved. `finalize` must still follow."""
    memory = mm.memory
    _tear_inserted(mm, migration)
    for part in migration.torn:
        by_page.restore(memory, mm, part)
    going = migration.source & MIGRATE != 0
    empty = np.flatnonzero(going & (migration.source & VALID == 0) & (migration.target != 0))
    heads = migration.target[empty] >> _FRAME
    if len(empty):
        blocks = migration.pages[empty] >> _SHIFT
        there = _waiting_for(mm, blocks, heads)
        for block, before in zip(blocks[there].tolist(), migration.saved[empty][there].tolist(), strict=True):
            mm.table.take_pmds(np.array([block], np.uint64))
            if before:
                mm.table.set_pmd(block << HUGE_SHIFT, before)
        mm.rss -= int(np.count_nonzero(there)) * HUGE_PAGES
        memory.cgroups.uncharge(memory.field(heads, "flags"), HUGE_PAGES)
    for zone, _, at in memory.where(migration.target[going & (migration.target != 0)] >> _FRAME):
        zone.flags[at] = 0
        zone.mapping[at] = 0
        zone.refcount[at] = 0
    migration.source[going] &= NOT_MIGRATE


def _waiting_for(mm: Mm, blocks: Words, heads: Words) -> Flags:
    """Which `blocks` are migration entries of the folios `heads`."""
    entries = mm.table.pmds.gather(blocks)
    found: Flags = (entries & pte.KIND == pte.MIGRATION) & (pte.frames_of(entries) == heads)
    return found


def _tear_inserted(mm: Mm, migration: Migration) -> None:
    """Rows that were moved, or filled, and split since are torn off."""
    _tear_split(mm, migration)
    torn = _unfolded(mm, migration.target, (migration.source & MIGRATE != 0) & (migration.target != 0))
    if torn.any():
        tear(mm, migration, torn)


def finalize(mm: Mm, migration: Migration) -> None:
    """migrate_vma_finalize, for what is still one; `collect.finalize` for what is not."""
    _tear_inserted(mm, migration)
    memory, source, target = mm.memory, migration.source, migration.target
    full = source & VALID != 0
    goes = source & MIGRATE != 0
    rows = np.flatnonzero(full | goes)
    came = np.where(full, source, target)[rows] >> _FRAME
    final = np.where(goes, target, source)[rows] >> _FRAME
    blocks = migration.pages[rows] >> _SHIFT
    entries = mm.table.pmds.gather(blocks)
    there = (entries & pte.KIND == pte.MIGRATION) & (pte.frames_of(entries) == came)
    kinds = _settle(memory, final, there)
    new = pte.masked(entries, pte.BITS & ~pte.KIND) | pte.entries_of(pte.NONE, final) | kinds
    mm.table.pmds.scatter(blocks[there], new[there])
    if not there.all():
        memory.put_folios(final[~there])
    _release(memory, came[goes[rows] & full[rows]])
    unused = target[~goes & (target != 0)] >> _FRAME
    memory.put_folios(unused[unused < DEVICE_ZONE_MIN << ZONE_SHIFT])
    for part in migration.torn:
        finalize_small(memory, mm, part)
    mm.migration_ended()


def _settle(memory: PhysicalMemory, heads: Words, mapped: Flags) -> Words:
    """Folios end a migration, mapped once or (unmapped meanwhile) not at all; the kind of entry that leads to each."""
    kinds = np.full(len(heads), pte.PRESENT, np.uint64)
    for zone, rows, at in memory.where(heads):
        zone.mapcount[at] = mapped[rows]
        zone.flags[at] &= ~np.uint32(LOCKED)
        if zone.kind == "private":
            kinds[rows] = pte.DEVICE
    return kinds


def _release(memory: PhysicalMemory, heads: Words) -> None:
    """Folios that were moved away from: the lock and the migration's reference go; the charge has gone with the page."""
    for zone, _, at in memory.where(heads):
        zone.flags[at] &= ~np.uint32(LOCKED | CHARGE_MASK)
    memory.put_folios(heads)
