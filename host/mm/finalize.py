"""migrate_vma_finalize (mm/migrate_device.c): migration entries become entries of the target, or of the source again.

The last step of `collect.py`, for whoever maps the pages. What a page gets is found out by its frames: an entry that does not hold its
migration any more was unmapped meanwhile, and a frame that nobody maps then is free.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hmmnet.host.interfaces import Migration
from hmmnet.pages import DEVICE_ZONE_MIN, MIGRATE_PFN_MIGRATE, MIGRATE_PFN_VALID, ZONE_SHIFT, Words, bits_in_all, is_one_run

from . import pte, single
from .collect import BOTH, blocks, frames_in
from .frames import PhysicalMemory
from .memcg import CHARGE_MASK
from .mm import Mm
from .rmap import Rows
from .zones import LOCKED, Zone

Counts = int | npt.NDArray[np.int32]
"""A number for each of some frames, or one for all."""


def finalize(memory: PhysicalMemory, mm: Mm | None, migration: Migration) -> None:
    """migrate_vma_finalize: replace the migration entries, let go of the locks, free what is left over."""
    if len(migration.source) == 1 and mm is not None and not migration.others and single.finalize(memory, mm, migration):
        return
    for part in blocks(migration):
        _finalize(memory, mm, part)
    for touched in {id(one): one for one in [mm, *(mapped.mm for mapped in migration.others)]}.values():
        if touched is not None:
            touched.migration_ended()


def _finalize(memory: PhysicalMemory, mm: Mm | None, migration: Migration) -> None:
    source, target = migration.source, migration.target
    if bits_in_all(source) & BOTH == BOTH:  # as it mostly is
        came, final = frames_in(source), frames_in(target)
        _settle(memory, final, _map_again(memory, mm, migration, None, came, final))
        _release(memory, came)
        return
    going = source & MIGRATE_PFN_MIGRATE != 0
    full = source & MIGRATE_PFN_VALID != 0
    rows = np.flatnonzero(going | full)
    if len(rows):
        came, goes, full = frames_in(source[rows]), going[rows], full[rows]
        final = np.where(goes, frames_in(target[rows]), came)
        _settle(memory, final, _map_again(memory, mm, migration, rows, np.where(full, came, final), final))
        _release(memory, came[goes & full])
    unused = frames_in(target[~going & (target != 0)])
    memory.put(unused[unused < DEVICE_ZONE_MIN << ZONE_SHIFT])


def _map_again(memory: PhysicalMemory, mm: Mm | None, migration: Migration, rows: Rows | None, held: Words, final: Words) -> Counts:
    """remove_migration_ptes for `rows` (None: all), whose entries remember frames `held` and now lead to `final`: mappings of each."""
    added = _difference(memory, held, final)
    count: Counts = 0
    if mm is not None:
        count = _replace(mm, migration.pages if rows is None else migration.pages[rows], held, added, ascend=True)
    for mapped in migration.others:
        if len(mapped.rows) == len(held):
            count = count + _replace(mapped.mm, mapped.pages, held, added)
        else:
            at = _standing(rows, mapped.rows)
            count = count + np.zeros(len(held), np.int32)
            count[at] += _replace(mapped.mm, mapped.pages, held[at], added if isinstance(added, np.uint64) else added[at])
    return count


def _standing(rows: Rows | None, some: Rows) -> slice | Rows:
    """Where `some` of `rows` (None: of all) stand; both ascend, so that neighbours are a slice, found by their first and last."""
    first = int(some[0] if rows is None else np.searchsorted(rows, some[0]))
    end = first + len(some)
    if rows is None:
        return slice(first, end) if some[-1] == end - 1 else some
    return slice(first, end) if rows[end - 1] == some[-1] else np.searchsorted(rows, some)


def _difference(memory: PhysicalMemory, held: Words, final: Words) -> Words | np.uint64:
    """What has to be added to migration entries of frames `held` to make them entries of `final`; a number where it is one for all."""
    found = list(memory.where(final))
    if len(found) == 1:
        kind = _kind(found[0][0])
        if isinstance(found[0][2], slice) and is_one_run(held):
            return np.uint64((int(final[0]) - int(held[0]) << pte.FRAME_SHIFT) + kind - pte.MIGRATION & (1 << 64) - 1)
        return (final - held << np.uint64(pte.FRAME_SHIFT)) + np.uint64(kind) - np.uint64(pte.MIGRATION)
    kinds = np.zeros(len(final), np.uint64)
    for zone, rows, _ in found:
        kinds[rows] = _kind(zone)
    return (final - held << np.uint64(pte.FRAME_SHIFT)) + kinds - np.uint64(pte.MIGRATION)


def _kind(zone: Zone) -> int:
    """The kind of entries that lead to `zone`."""
    return pte.DEVICE if zone.kind == "private" else pte.PRESENT


def _replace(mm: Mm, pages: Words, held: Words, added: Words | np.uint64, *, ascend: bool = False) -> Counts:
    """Migration entries at `pages` that still hold the frames `held` change by what is `added`; 1 for each that did."""
    entries = mm.table.gather(pages, ascend=ascend)
    there = entries & ~np.uint64(pte.BITS & ~pte.KIND) == pte.entries_of(pte.MIGRATION, held)
    entries += added
    if there.all():
        mm.table.scatter(pages, entries, ascend=ascend)
        return 1
    mm.table.scatter(pages[there], entries[there])
    count: npt.NDArray[np.int32] = there.astype(np.int32)
    return count


def _settle(memory: PhysicalMemory, frames: Words, count: Counts) -> None:
    """`frames` end a migration with `count` mappings each, in the place of the migration's reference; the lock goes."""
    for zone, rows, where in memory.groups(frames):
        mapped = count if isinstance(count, int) else count[rows]
        zone.mapcount[where] = mapped
        zone.flags[where] &= ~np.uint32(LOCKED)
        if not np.all(mapped == 1):
            zone.refcount[where] += mapped - 1
            memory.free_unused(zone, frames[rows], where)


def _release(memory: PhysicalMemory, frames: Words) -> None:
    """`frames` were moved away from: the lock and the migration's reference go; the charge has gone with the page."""
    for zone, rows, where in memory.groups(frames):
        zone.flags[where] &= ~np.uint32(LOCKED | CHARGE_MASK)
        zone.refcount[where] -= 1
        memory.free_unused(zone, frames[rows], where)
