"""migrate_vma_finalize (mm/migrate_device.c): migration entries become entries of the target, or of the source again.

The last step of `collect.py`, for whoever maps the pages. What a page gets is found out by its frames: an entry that does not hold its
migration any more was unmapped meanwhile, and a frame that nobody maps then is free.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hmmnet.host.interfaces import Migration
from hmmnet.pages import DEVICE_ZONE_MIN, FEW, MIGRATE_PFN_MIGRATE, MIGRATE_PFN_VALID, ZONE_SHIFT, Words, bits_in_all, bits_in_any, word_of

from . import few, pte
from .collect import BOTH, blocks, frames_in
from .frames import PhysicalMemory
from .located import Located
from .memcg import CHARGE_MASK
from .mm import Mm
from .rmap import Rows
from .zones import LOCKED, entry_kind

UNALIKE = (1 << 64) - 1 ^ pte.BITS | pte.KIND
"""What a migration entry is known by: its kind and its frame; the rest it carries along."""

Counts = int | npt.NDArray[np.int32]
"""A number for each of some frames, or one for all."""


def finalize(memory: PhysicalMemory, mm: Mm | None, migration: Migration) -> None:
    """migrate_vma_finalize: replace the migration entries, let go of the locks, free what is left over."""
    if len(migration.source) <= FEW and mm is not None and not migration.others and few.finalize(memory, mm, migration):
        return
    for part in blocks(migration):
        _finalize(memory, mm, part)
    for touched in {id(one): one for one in [mm, *(mapped.mm for mapped in migration.others)]}.values():
        if touched is not None:
            touched.migration_ended()


def _finalize(memory: PhysicalMemory, mm: Mm | None, migration: Migration) -> None:
    source, target = migration.source, migration.target
    if bits_in_all(source) & BOTH == BOTH:  # as it mostly is
        came, final = memory.located(frames_in(source)), memory.located(frames_in(target))
        _settle(memory, final, _map_again(mm, migration, None, came, final))
        _release(memory, came)
        return
    going = source & MIGRATE_PFN_MIGRATE != 0
    full = source & MIGRATE_PFN_VALID != 0
    rows = (going | full).nonzero()[0]
    if len(rows):
        left, goes, full = frames_in(source[rows]), going[rows], full[rows]
        lead_to = np.where(goes, frames_in(target[rows]), left)
        final = memory.located(lead_to)
        _settle(memory, final, _map_again(mm, migration, rows, memory.located(np.where(full, left, lead_to)), final))
        _release(memory, memory.located(left[goes & full]))
    unused = frames_in(target[~going & (target != 0)])
    memory.put(unused[unused < DEVICE_ZONE_MIN << ZONE_SHIFT])


def _map_again(mm: Mm | None, migration: Migration, rows: Rows | None, held: Located, final: Located) -> Counts:
    """remove_migration_ptes for `rows` (None: all), whose entries remember frames `held` and now lead to `final`: mappings of each."""
    added = _difference(held, final)
    before = pte.entries_of(pte.MIGRATION, held.frames)
    count: Counts = 0
    if mm is not None:
        count = _replace(mm, migration.pages if rows is None else migration.pages[rows], before, added, ascend=True)
    for mapped in migration.others:
        if len(mapped.rows) == len(held):
            count = count + _replace(mapped.mm, mapped.pages, before, added, ascend=mapped.ascend)
            continue
        at = _standing(rows, mapped.rows)
        here = _replace(mapped.mm, mapped.pages, before[at], added if isinstance(added, np.uint64) else added[at], ascend=mapped.ascend)
        if isinstance(count, int):
            count = np.full(len(held), count, np.int32)
        count[at] += here
    return count


def _standing(rows: Rows | None, some: Rows) -> slice | Rows:
    """Where `some` of `rows` (None: of all) stand; both ascend, so that neighbours are a slice, found by their first and last."""
    first = int(some[0] if rows is None else np.searchsorted(rows, some[0]))
    end = first + len(some)
    if rows is None:
        return slice(first, end) if some[-1] == end - 1 else some
    return slice(first, end) if rows[end - 1] == some[-1] else np.searchsorted(rows, some)


def _difference(held: Located, final: Located) -> Words | np.uint64:
    """What has to be added to migration entries of frames `held` to make them entries of `final`; a number where it is one for all."""
    if len(final.places) == 1:
        kind = entry_kind(final.places[0][0])
        if final.is_one_run and held.is_one_run:
            return np.uint64((int(final.frames[0]) - int(held.frames[0]) << pte.FRAME_SHIFT) + kind - pte.MIGRATION & (1 << 64) - 1)
        added = final.frames - held.frames
        added <<= word_of(pte.FRAME_SHIFT)
        added += word_of(kind - pte.MIGRATION & (1 << 64) - 1)
        return added
    kinds = np.zeros(len(final), np.uint64)
    for zone, rows, _ in final.places:
        kinds[rows] = entry_kind(zone)
    return (final.frames - held.frames << word_of(pte.FRAME_SHIFT)) + kinds - word_of(pte.MIGRATION)


def _replace(mm: Mm, pages: Words, before: Words, added: Words | np.uint64, *, ascend: bool = False) -> Counts:
    """Migration entries at `pages` that are still those `before`, but for what they carry, change by what is `added`; 1 for each."""
    entries = mm.table.gather(pages, ascend=ascend)
    if not bits_in_any(entries ^ before) & UNALIKE:
        entries += added
        mm.table.scatter(pages, entries, ascend=ascend)
        return 1
    there = (entries ^ before) & word_of(UNALIKE) == 0
    mm.table.scatter(pages[there], (entries + added)[there])
    count: npt.NDArray[np.int32] = there.astype(np.int32)
    return count


def _settle(memory: PhysicalMemory, frames: Located, count: Counts) -> None:
    """`frames` end a migration with `count` mappings each, in the place of the migration's reference; the lock goes."""
    for zone, rows, where in frames.groups():
        mapped = count if isinstance(count, int) else count[rows]
        zone.mapcount[where] = mapped
        zone.flags[where] &= ~np.uint32(LOCKED)
        if not np.all(mapped == 1):
            zone.refcount[where] += mapped - 1
            if np.min(mapped) == 0:
                memory.free_unused(zone, frames.frames[rows], where)


def _release(memory: PhysicalMemory, frames: Located) -> None:
    """`frames` were moved away from: the lock and the migration's reference go; the charge has gone with the page."""
    for zone, rows, where in frames.groups():
        zone.flags[where] &= ~np.uint32(LOCKED | CHARGE_MASK)
        zone.refcount[where] -= 1
        memory.free_unused(zone, frames.frames[rows], where)
