"""migrate_vma, the address space's part (mm/migrate_device.c): table A4 over arrays.

Four steps, each atomic; between them the driver copies, and time passes:

- `collect`: choose the pages, lock them, replace their entries by migration entries, refuse those that somebody else holds on to. From
  here on whoever touches such a page waits.
- `move`: each page's identity (family, index, flags) goes to its target. Never-touched pages get their target here, unless the CPU was
  first.
- `restore` (only when the migration is given up): `move` never happened.
- `finalize`: migration entries become the target, or again the source; frames that nobody needs any more go back.

Nothing is destroyed before `finalize`: until then the source frame keeps its identity and its data, so a migration that is interrupted at
any step leaves the source as it was.

Between collect and finalize a page has one reference, the migration's, and no mapping: its mappings are entries that remember it. If one is
unmapped meanwhile, `finalize` finds its entry gone; if all are, the frame is free.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from hmmnet.host.interfaces import NOBODY, Migration, Select, Told
from hmmnet.pages import (
    DEVICE_ZONE_MIN,
    FEW,
    HUGE_PAGES,
    HUGE_SHIFT,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_SHIFT,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    ZONE_SHIFT,
    Words,
    all_of,
    among,
    any_of,
    bits_in_all,
    word_of,
)

from . import few, pte
from .compound import fit_targets, join_inserted, split_zeros, tear_collected, tear_mapped
from .frames import PhysicalMemory
from .located import Located, every_row, rows_in
from .mm import Mm
from .rmap import Mapped, Rows, chosen, mappings, places
from .vma import VM_UFFD_MISSING, VM_WRITE
from .zones import ANON, COMPOUND, LOCKED, HostZone

BOTH = MIGRATE_PFN_VALID | MIGRATE_PFN_MIGRATE
BLOCK_PAGES = 1 << 14
"""Pages that one pass over arrays takes at a time: eight arrays of them fit in the processor's cache."""
DEVICES = Select.DEVICE_PRIVATE | Select.DEVICE_COHERENT
NOT_MIGRATE = word_of(~MIGRATE_PFN_MIGRATE & (1 << 64) - 1)

Flags = npt.NDArray[np.bool_]


def frames_in(words: Words) -> Words:
    """The frames of MIGRATE_PFN words."""
    return words >> word_of(MIGRATE_PFN_SHIFT)


def _words(frames: Words, bits: int) -> Words:
    """MIGRATE_PFN words."""
    return frames << word_of(MIGRATE_PFN_SHIFT) | word_of(bits)


def collect(mm: Mm, pages: Words, select: Select, owner: int, fault_frame: int | None = None, told: Told = NOBODY) -> Migration:
    """migrate_vma_collect and migrate_vma_unmap for `pages` (ascending, in VMAs that may take part).

    Mirrors have been told: those of this process of `pages`, and further ones of what `told` says; a page that is mapped elsewhere, too,
    stays where it is.
    """
    count = len(pages)
    source, target, saved = np.zeros(count, np.uint64), np.zeros(count, np.uint64), np.zeros(count, np.uint64)
    migration = Migration(pages, source, target, saved, owner, fault_frame, bool(select.has(Select.COMPOUND)))
    if len(pages) <= FEW and few.collect(mm, migration, select):
        return migration
    offset = 0
    for part in blocks(migration):
        _collect(mm, part, select, told)
        if part is not migration:
            migration.others += [one.at(slice(None), one.rows + offset) for one in part.others]
            offset += len(part.pages)
    return migration


def sharers(mm: Mm, pages: Words, select: Select, owner: int) -> list[tuple[Mm, Words]]:
    """Where the frames that several processes map, of those that `collect` would take, may be mapped (`rmap.places`)."""
    if len(pages) <= FEW and few.unshared(mm, pages, select, owner):
        return []
    found = []
    for low in range(0, len(pages), BLOCK_PAGES):
        entries = mm.table.gather(pages[low : low + BLOCK_PAGES], ascend=True)
        frames = pte.frames_of(chosen(entries, _rows(mm.memory, entries, pte.sample(entries), select, owner)))
        shared = rows_in(mm.memory.located(frames).seen("mapcount") > 1)
        if len(shared):
            found.append(chosen(frames, shared))
    return list(places(mm.memory, found[0] if len(found) == 1 else np.concatenate(found))) if found else []


def _rows(memory: PhysicalMemory, entries: Words, some: Words, select: Select, owner: int) -> Rows:
    """Where the entries, of which `some` are the sample, are that are `wanted`."""
    which = wanted(memory, some, select, owner)
    if len(which) == len(entries):
        return rows_in(which)
    return every_row(len(entries) if which[0] else 0)


def _collect(mm: Mm, migration: Migration, select: Select, told: Told) -> None:
    pages = migration.pages
    entries = mm.table.gather(pages, ascend=True)
    some = pte.sample(entries)
    bare = some == 0
    if select.has(Select.SYSTEM):
        huge = 0 if migration.compound else pte.HUGE
        bare |= some & (pte.KIND | pte.SPECIAL | huge) == pte.PRESENT | pte.SPECIAL
    if any_of(bare):
        migration.source[bare & _anonymous(mm, pages)] = MIGRATE_PFN_MIGRATE
    rows = _rows(mm.memory, entries, some, select, migration.owner)
    if len(rows):
        frames = mm.memory.located(pte.frames_of(chosen(entries, rows)))
        whole = chosen(entries, rows) & pte.HUGE != 0 if migration.compound else None
        free = _free_to_go(frames, migration.fault_frame, whole)
        if mm.memory.points.armed:
            free &= lucky(mm, pages[rows], "migrate.trylock", "migrate.count")
        if not all_of(free) and not select.has(Select.PARTS_STAY) and mm.memory.bits_in_any(frames.frames[~free], "flags") & COMPOUND:
            free &= ~_behind_large(migration, rows, frames, free)
        if not all_of(free):
            rows = rows[free]
        collected = tear_collected(mm, pages, entries, rows)
        if len(collected) < len(frames):
            frames = mm.memory.located(pte.frames_of(entries[collected]))
        rows = _others(mm.memory, mm, migration, collected, pages, frames, told)
        _install(mm.memory, mm, migration, rows, entries, frames if len(rows) == len(frames) else None)


def _anonymous(mm: Mm, pages: Words) -> Flags:
    """Which `pages` lie in anonymous VMAs."""
    out = np.zeros(len(pages), np.bool_)
    for vma in mm.vmas.overlapping(int(pages[0]), int(pages[-1]) + 1):
        if vma.is_anonymous:
            out[slice(*np.searchsorted(pages, (vma.start, vma.end)).tolist())] = True
    return out


def wanted(memory: PhysicalMemory, entries: Words, select: Select, owner: int) -> Flags:
    """Which entries are of a kind that `select` asks for."""
    kinds = entries & (pte.KIND | pte.SPECIAL)
    wanted = np.zeros(len(entries), np.bool_)
    system = entries < DEVICE_ZONE_MIN << ZONE_SHIFT + pte.FRAME_SHIFT
    if select.has(Select.SYSTEM):
        wanted |= (kinds == pte.PRESENT) & system
        if not select.has(Select.COMPOUND):
            wanted &= entries & pte.HUGE == 0
    if select.has(DEVICES):
        zones = few.owners(memory, select, owner)
        mine = ~system if zones is few.EVERY_DEVICE else among(pte.zones_of(entries), np.array(zones, np.uint64))
        if select.has(Select.DEVICE_PRIVATE):
            wanted |= mine & (kinds == pte.DEVICE)
        if select.has(Select.DEVICE_COHERENT):
            wanted |= mine & (kinds == pte.PRESENT) & ~system
    return wanted


def _free_to_go(frames: Located, fault_frame: int | None, whole: Flags | None) -> Flags:
    """Which `frames` are anonymous, not locked by another migration, not pinned, and held by nobody but their mappings.

    A large folio of system memory that is still one goes only `whole`: through a huge entry, where the migration takes those.

    The kernel takes pages of files, too, and lets them go where the migration has a private destination (migrate_vma_pages): they stay.
    """
    out = np.zeros(len(frames), np.bool_)
    for zone, rows, where in frames.groups():
        flags = zone.flags[where]
        extra = zone.refcount[where] - zone.mapcount[where]
        allowed = 0 if isinstance(zone, HostZone) else zone.extra_references
        unlocked = flags & (LOCKED | ANON) == ANON
        if isinstance(zone, HostZone):
            unlocked &= flags & COMPOUND == 0 if whole is None else (flags & COMPOUND == 0) | whole[rows]
        if fault_frame is not None:  # locked, and held, by the fault itself
            faulting = frames.frames[rows] == fault_frame
            unlocked |= faulting
            extra = extra - faulting
        out[rows] = unlocked & (extra <= allowed) & (zone.pincount[where] == 0)
    return out


def _behind_large(migration: Migration, rows: Rows, frames: Located, free: Flags) -> Flags:
    """Which `rows` lie behind a page of system memory whose folio could not be split, in the same 2 MiB: they are not looked at any more.

    Nor are the empty ones there (migrate_vma_collect_skip): their source becomes 0.
    """
    large = frames.fields("flags")[0] & COMPOUND != 0
    stuck = (~free & large & (frames.frames < DEVICE_ZONE_MIN << ZONE_SHIFT)).nonzero()[0]
    blocks, first = np.unique(migration.pages[rows[stuck]] >> word_of(HUGE_SHIFT), return_index=True)
    skipped = np.zeros(len(migration.pages), np.bool_)
    for block, at in zip(blocks.tolist(), rows[stuck[first]].tolist(), strict=True):
        skipped[at : int(np.searchsorted(migration.pages, (block + 1) << HUGE_SHIFT))] = True
    migration.source[skipped] = 0
    return skipped[rows]


def lucky(mm: Mm, pages: Words, *names: str) -> Flags:
    """Which of `pages` no fault that is injected at the points `names` keeps where they are."""
    points = mm.memory.points
    out = np.ones(len(pages), np.bool_)
    for name in names:
        if points.wants(name):
            out &= [not points.fails(name, process=mm.number, start=page, pages=1) for page in pages.tolist()]
    return out


def _others(memory: PhysicalMemory, mm: Mm | None, migration: Migration, rows: Rows, pages: Words, frames: Located, told: Told) -> Rows:
    """Find the further mappings of `frames` (rows `rows` of `pages`); returns the rows of which mirrors have been `told` of all."""
    unshared = 0 if mm is None else 1
    shared = rows_in(frames.seen("mapcount") > unshared)
    if len(shared) == 0:
        return rows
    found: list[Mapped] = []
    stays = np.zeros(len(rows), np.bool_)
    known = None if mm is None else (mm, chosen(pages, chosen(rows, shared)))
    some = frames.chosen(shared) if len(frames.places) == 1 else memory.located(chosen(frames.frames, shared))
    for mapped in mappings(memory, some, known):
        which = chosen(shared, mapped.rows)
        if mapped.mm is mm:
            other = mapped.pages != pages[rows[which]]
            mapped, which = mapped.at(other), which[other]
        known_to_all = _announced(told, mapped)
        if not all_of(known_to_all):
            stays[which[~known_to_all]] = True
        found.append(mapped.at(slice(None), which))
    if any_of(stays):
        _stay_together(frames, stays)
        found = [mapped.at(~stays[mapped.rows]) for mapped in found]
    migration.others += [one.at(slice(None), chosen(rows, one.rows)) for one in found if len(one.rows)]
    return rows[~stays] if any_of(stays) else rows


def _announced(told: Told, mapped: Mapped) -> Flags:
    """Which of those mappings mirrors have been `told` of. That their process was told of others says nothing."""
    out = np.zeros(len(mapped.pages), np.bool_)
    for pages in told.get(mapped.mm.number, ()):
        out |= _among(mapped.pages, pages)
        if all_of(out):
            break
    return out


def _among(pages: Words, told: Words) -> Flags:
    """Which of `pages` are in `told` (ascending, each once): mostly all, as neighbours; else looked up, as np.isin would sort both."""
    if len(pages) == 0 or len(told) == 0:
        return np.zeros(len(pages), np.bool_)
    first = int(np.searchsorted(told, pages[0]))
    if np.array_equal(told[first : first + len(pages)], pages):
        return np.ones(len(pages), np.bool_)
    at = np.minimum(np.searchsorted(told, pages), len(told) - 1)
    found: Flags = told[at] == pages
    return found


def _stay_together(frames: Located, stays: Flags) -> None:
    """Where one page of a large folio `stays`, all of it does: its huge entry cannot wait in part."""
    large = frames.fields("flags")[0] & COMPOUND != 0
    heads = frames.frames >> word_of(HUGE_SHIFT)
    stays |= large & np.isin(heads, heads[stays & large])


def _install(
    memory: PhysicalMemory, mm: Mm | None, migration: Migration, rows: Rows, entries: Words, frames: Located | None = None
) -> None:
    """Lock the frames of `rows`, replace every mapping by a migration entry. `frames`: theirs, for who knows them."""
    taken = chosen(entries, rows)
    frames = frames or memory.located(pte.frames_of(taken))
    into = slice(None) if taken is entries else rows
    if mm is not None:
        mm.table.scatter(chosen(migration.pages, rows), waiting(taken), ascend=True)
        migration.saved[into] = taken
    bits = pte.masked(taken, MIGRATE_PFN_WRITE)  # the same bit there and here
    bits |= word_of(BOTH)
    bits |= frames.frames << word_of(MIGRATE_PFN_SHIFT)
    migration.source[into] = bits
    for mapped in migration.others:
        torn = waiting(tear_mapped(mapped.mm, mapped.pages, mapped.entries))
        mapped.mm.table.scatter(mapped.pages, torn, ascend=mapped.ascend)
    for zone, _, where in frames.groups():
        zone.flags[where] |= LOCKED
        if migration.others:
            zone.refcount[where] -= zone.mapcount[where] - 1
        zone.mapcount[where] = 0


def waiting(entries: Words) -> Words:
    """The migration entries for `entries`."""
    kept = entries & ~word_of(pte.BITS & ~pte.CARRIED)
    kept |= word_of(pte.MIGRATION)
    return kept


def collect_frames(memory: PhysicalMemory, frames: Words, told: Told) -> Migration:
    """migrate_device_range: take `frames` of a device, whoever maps them. `Migration.pages` is zero throughout: there is no range.

    Frames that are idle, locked or held by others stay out (source 0); the driver comes back for them.
    """
    zeros = np.zeros(len(frames), np.uint64)
    migration = Migration(zeros, zeros.copy(), zeros.copy(), zeros.copy())
    there = memory.located(frames)
    rows = (_free_to_go(there, None, None) & (there.fields("mapcount")[0] > 0)).nonzero()[0]
    if len(rows):
        rows = _others(memory, None, migration, rows, frames, memory.located(frames[rows]), told)
    if len(rows):
        entries = np.zeros(len(frames), np.uint64)
        entries[rows] = pte.entries_of(pte.NONE, frames[rows])
        _install(memory, None, migration, rows, entries)
    return migration


def move(memory: PhysicalMemory, mm: Mm | None, migration: Migration) -> None:
    """migrate_vma_pages: targets take over what their sources were. Clears MIGRATE where there is no target, or where it cannot be."""
    if len(migration.source) <= FEW and few.move(memory, mm, migration):
        return
    fit_targets(memory, mm, migration)
    for part in blocks(migration):
        _move(memory, mm, part)


def _move(memory: PhysicalMemory, mm: Mm | None, migration: Migration) -> None:
    source, target = migration.source, migration.target
    if bits_in_all(source) & BOTH == BOTH and bits_in_all(target) & MIGRATE_PFN_VALID:  # as it mostly is
        _take_over(memory, source, None, frames_in(source), frames_in(target))
        return
    refused = (source & MIGRATE_PFN_MIGRATE != 0) & (target & MIGRATE_PFN_VALID == 0)
    if any_of(refused):
        source[refused] &= NOT_MIGRATE
    if mm is not None:
        _insert(mm, migration)
    rows = (source & BOTH == BOTH).nonzero()[0]
    if len(rows):
        _take_over(memory, source, rows, frames_in(chosen(source, rows)), frames_in(chosen(target, rows)))


def _take_over(memory: PhysicalMemory, source: Words, rows: Rows | None, old: Words, new: Words) -> None:
    """folio_migrate_mapping for `rows` of `source` (None: all): frames `new` become what `old` are, where those have no reference more."""
    before = memory.located(old)
    refcount, flags, mapping, index = (before.seen(name) for name in ("refcount", "flags", "mapping", "index"))
    if refcount.max() > 1 or not bits_in_all(flags) & ANON:
        refused = (refcount > 1) | ((flags & ANON == 0) & (new >= DEVICE_ZONE_MIN << ZONE_SHIFT))
        source[refused if rows is None else rows[refused]] &= NOT_MIGRATE
        new, flags, mapping, index = new[~refused], flags[~refused], mapping[~refused], index[~refused]
    for zone, part, where in memory.groups(new):
        zone.refcount[where] = 1
        zone.flags[where] = flags[part]
        zone.mapping[where] = mapping[part]
        zone.index[where] = index[part]


def inserts(migration: Migration) -> bool:
    """Whether `move` may fill empty entries or replace the zero page: then mirrors must be told (MIGRATE) around it."""
    source = migration.source
    return not bits_in_all(source) & MIGRATE_PFN_VALID and any_of(source & BOTH == MIGRATE_PFN_MIGRATE)


def _insert(mm: Mm, migration: Migration) -> None:
    """migrate_vma_insert_page: a target for pages that were never touched, if they still are not."""
    rows = (migration.source & BOTH == MIGRATE_PFN_MIGRATE).nonzero()[0]
    if len(rows) == 0:
        return
    pages = migration.pages[rows]
    entries = mm.table.gather(pages)
    ready = (entries == 0) | (entries & (pte.KIND | pte.SPECIAL) == pte.PRESENT | pte.SPECIAL)
    bits = np.zeros(len(rows), np.uint64)
    index = pages.copy()
    anon = np.zeros(len(rows), np.uint32)
    for vma in mm.vmas.overlapping(int(pages[0]), int(pages[-1]) + 1):
        inside = slice(int(np.searchsorted(pages, vma.start)), int(np.searchsorted(pages, vma.end)))
        if not vma.is_anonymous or vma.flags & VM_UFFD_MISSING:
            ready[inside] = False
        elif inside.start < inside.stop:
            bits[inside] = pte.MIGRATION | pte.ANON_EXCLUSIVE | (pte.WRITE | pte.DIRTY if vma.flags & VM_WRITE else 0)
            index[inside] = mm.anon_index(vma, pages[inside])
            anon[inside] = vma.anon
    ready &= bits != 0
    if mm.memory.points.armed:
        ready &= lucky(mm, pages, "migrate.insert", "memcg.charge")
    charge = 0
    if mm.cgroup is not None:
        ready[ready.nonzero()[0][mm.cgroup.charge_some(int(np.count_nonzero(ready))) :]] = False
        charge = mm.cgroup.charge_bits
    if not all_of(ready):
        migration.source[rows[~ready]] &= NOT_MIGRATE
        rows, pages, bits, entries = rows[ready], pages[ready], bits[ready], entries[ready]
        index, anon = index[ready], anon[ready]
    if len(rows) == 0:
        return
    frames = frames_in(migration.target[rows])
    saved = entries & ~word_of(pte.HUGE)
    huge = join_inserted(mm, pages, entries, frames) if migration.compound else split_zeros(mm, pages, entries)
    if any_of(huge):
        bits[huge] |= word_of(pte.HUGE)
        saved[huge] = entries[huge]
    mm.table.scatter(pages, pte.entries_of(pte.NONE, frames) | bits)
    migration.source[rows] |= bits & MIGRATE_PFN_WRITE
    migration.saved[rows] = saved
    mm.rss += len(rows)
    for zone, part, where in mm.memory.groups(frames):
        zone.refcount[where] = 1
        zone.flags[where] = ANON | LOCKED | charge
        zone.mapping[where] = anon[part]
        zone.index[where] = index[part]
    for zone, _, where in mm.memory.groups(frames[huge]) if any_of(huge) else ():
        zone.flags[where] |= np.uint32(COMPOUND)


def restore(memory: PhysicalMemory, mm: Mm | None, migration: Migration) -> None:
    """The targets are gone (their device died) between `move` and `finalize`: nothing has moved. `finalize` must still follow."""
    going = migration.source & MIGRATE_PFN_MIGRATE != 0
    if not any_of(going):
        return
    empty = (going & (migration.source & MIGRATE_PFN_VALID == 0)).nonzero()[0]
    if len(empty) and mm is not None:
        pages, frames = migration.pages[empty], frames_in(migration.target[empty])
        entries = mm.table.gather(pages)
        there = (entries & pte.KIND == pte.MIGRATION) & (pte.frames_of(entries) == frames)
        mm.table.scatter(pages[there], migration.saved[empty][there])
        mm.rss -= int(np.count_nonzero(there))
        memory.cgroups.uncharge(memory.field(frames, "flags"))
    for zone, _, where in memory.groups(frames_in(migration.target[going & (migration.target != 0)])):
        zone.flags[where] = 0
        zone.mapping[where] = 0
        if not isinstance(zone, HostZone):
            zone.refcount[where] = 0
    migration.source[going] &= NOT_MIGRATE


def blocks(migration: Migration) -> list[Migration]:
    """`migration` in parts small enough for the processor's cache; they share its arrays."""
    if len(migration.source) <= BLOCK_PAGES:
        return [migration]
    first = BLOCK_PAGES - int(migration.pages[0]) % min(HUGE_PAGES, BLOCK_PAGES)  # no huge page is cut in two
    cuts = [0, *range(first, len(migration.source), BLOCK_PAGES), len(migration.source)]
    return [
        replace(
            migration,
            pages=migration.pages[low:high],
            source=migration.source[low:high],
            target=migration.target[low:high],
            saved=migration.saved[low:high],
            others=[part for mapped in migration.others for part in _within(mapped, low, high)],
        )
        for low, high in pairwise(cuts)
    ]


def _within(mapped: Mapped, low: int, high: int) -> list[Mapped]:
    """Those of `mapped` in rows [low, high), counted from there: mostly all of them, or none."""
    if mapped.rows[0] >= high or mapped.rows[-1] < low:
        return []
    first, end = np.searchsorted(mapped.rows, (low, high)).tolist()
    if first == end:
        return []
    return [mapped.at(slice(first, end), mapped.rows[first:end] - low)]
