"""The migration of one page, without arrays: what a CPU fault on a device page runs.

The same steps as `collect.py`, with the same results (a test compares the two on the same states), for the case that decides how fast a
fault comes home: one page, mapped by one process. Numpy pays half a microsecond for each operation, whatever the length; with one page
that is all there is to pay. Every function answers False, having done nothing, when the case is not this one.

`take`, `bring` and `put_back` are the CPU fault's own form of the steps: collect, then either pages and finalize in one, or neither.
"""

from __future__ import annotations

from hmmnet.host.interfaces import NO_OWNER, Migration, Select
from hmmnet.pages import (
    DEVICE_ZONE_MIN,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_SHIFT,
    MIGRATE_PFN_VALID,
    ZONE_SHIFT,
)

from . import pte
from .frames import PhysicalMemory
from .memcg import CHARGE_MASK
from .mm import Mm
from .zones import ANON, COMPOUND, LOCKED, HostZone

BOTH = MIGRATE_PFN_VALID | MIGRATE_PFN_MIGRATE


def collect(mm: Mm, migration: Migration, select: Select) -> bool:
    """Fill `migration`, of one page, if its entry is a page that this process alone maps."""
    if mm.memory.points.armed:
        return False  # the general form is where faults are injected
    page = int(migration.pages[0])
    entry = mm.table.get(page)
    kind = entry & pte.KIND
    if kind not in (pte.PRESENT, pte.DEVICE) or entry & (pte.SPECIAL | pte.HUGE):
        return False
    frame = entry >> pte.FRAME_SHIFT
    number = frame >> ZONE_SHIFT
    if kind == pte.DEVICE:
        wanted = select & Select.DEVICE_PRIVATE and _owned(mm.memory, number, migration.owner, select)
    elif number < DEVICE_ZONE_MIN:
        wanted = select & Select.SYSTEM
    else:
        wanted = select & Select.DEVICE_COHERENT and _owned(mm.memory, number, migration.owner, select)
    if not wanted:
        return True
    zone = mm.memory.zones[number]
    at = frame - zone.base
    flags = int(zone.flags[at])
    if flags & LOCKED and frame != migration.fault_frame:
        return True
    if zone.mapcount[at] != 1 or flags & (ANON | (COMPOUND if isinstance(zone, HostZone) else 0)) != ANON:
        return False
    allowed = (1 if isinstance(zone, HostZone) else 1 + zone.extra_references) + (frame == migration.fault_frame)
    if zone.refcount[at] > allowed or zone.pincount[at]:
        return True
    mm.table.set(page, entry & ~(pte.BITS & ~pte.CARRIED) | pte.MIGRATION)
    migration.saved[0] = entry
    migration.source[0] = frame << MIGRATE_PFN_SHIFT | BOTH | entry & pte.WRITE
    zone.flags[at] = flags | LOCKED
    zone.mapcount[at] = 0
    return True


def _owned(memory: PhysicalMemory, number: int, owner: int, select: Select) -> bool:
    """Whether pages of device zone `number` are taken in the name of zone `owner`."""
    if select & Select.PEERS:
        return number in memory.peers_of(owner)
    return number == owner != NO_OWNER or bool(select & Select.ANY_OWNER)


def move(memory: PhysicalMemory, migration: Migration) -> bool:
    """migrate_vma_pages for one collected page that has a target."""
    source, target = int(migration.source[0]), int(migration.target[0])
    if source & BOTH != BOTH or not target & MIGRATE_PFN_VALID:
        return False
    old, new = source >> MIGRATE_PFN_SHIFT, target >> MIGRATE_PFN_SHIFT
    zone, destination = memory.zones[old >> ZONE_SHIFT], memory.zones[new >> ZONE_SHIFT]
    at, there = old - zone.base, new - destination.base
    if zone.refcount[at] > 1 or not zone.flags[at] & ANON:
        return False
    if destination.folded_count:  # a frame of a large one that was offered for the block
        destination.unfold(slice(there, there + 1))
    destination.refcount[there] = 1
    destination.flags[there] = int(zone.flags[at]) & ~COMPOUND
    destination.mapping[there] = zone.mapping[at]
    destination.index[there] = zone.index[at]
    return True


def finalize(memory: PhysicalMemory, mm: Mm, migration: Migration) -> bool:
    """migrate_vma_finalize for one collected page whose migration entry is still there; frees an unused host target too."""
    source, target = int(migration.source[0]), int(migration.target[0])
    if not source & MIGRATE_PFN_VALID:
        return False
    page, came = int(migration.pages[0]), source >> MIGRATE_PFN_SHIFT
    entry = mm.table.get(page)
    if entry & pte.KIND != pte.MIGRATION or entry >> pte.FRAME_SHIFT != came:
        return False
    goes = source & MIGRATE_PFN_MIGRATE
    final = target >> MIGRATE_PFN_SHIFT if goes else came
    zone = memory.zones[final >> ZONE_SHIFT]
    at = final - zone.base
    kind = pte.DEVICE if zone.kind == "private" else pte.PRESENT
    mm.table.set(page, final << pte.FRAME_SHIFT | entry & (pte.BITS & ~pte.KIND) | kind)
    zone.mapcount[at] = 1
    zone.flags[at] &= ~LOCKED & 0xFFFFFFFF
    if goes:
        left = memory.zones[came >> ZONE_SHIFT]
        left.flags[came - left.base] &= ~(LOCKED | CHARGE_MASK) & 0xFFFFFFFF
        memory.put_one(came)
    elif target and target >> MIGRATE_PFN_SHIFT + ZONE_SHIFT < DEVICE_ZONE_MIN:
        memory.put_one(target >> MIGRATE_PFN_SHIFT)
    mm.migration_ended()
    return True


def take(mm: Mm, page: int, owner: int) -> int | None:
    """Collect the device page of zone `owner` that a CPU touched at `page`: its frame, behind a migration entry now.

    None, having done nothing, when it is not there, locked, or not this process's alone.
    """
    entry = mm.table.get(page)
    frame = entry >> pte.FRAME_SHIFT
    if entry & (pte.KIND | pte.HUGE) != pte.DEVICE or frame >> ZONE_SHIFT != owner:
        return None
    zone = mm.memory.zones[owner]
    at, cells = frame - zone.base, zone.cells
    flags: int = cells.flags[at]
    if flags & (LOCKED | ANON) != ANON or cells.mapcount[at] != 1 or cells.pincount[at]:
        return None
    if cells.refcount[at] > 1 + zone.extra_references:
        return None
    mm.table.set(page, entry & ~(pte.BITS & ~pte.CARRIED) | pte.MIGRATION)
    cells.flags[at] = flags | LOCKED
    cells.mapcount[at] = 0
    return frame


def bring(mm: Mm, page: int, frame: int, target: int) -> None:
    """`page`, taken as device frame `frame`, lives in host frame `target` from now on; the one reference that has is handed over."""
    memory = mm.memory
    zone, destination = memory.zones[frame >> ZONE_SHIFT], memory.zones[target >> ZONE_SHIFT]
    at, there = frame - zone.base, target - destination.base
    old, new = zone.cells, destination.cells
    old.flags[at] = flags = old.flags[at] & ~LOCKED
    entry = mm.table.get(page)
    if entry & pte.KIND == pte.MIGRATION and entry >> pte.FRAME_SHIFT == frame:
        new.flags[there] = flags & ~COMPOUND
        old.flags[at] = flags & ~CHARGE_MASK
        new.mapping[there] = old.mapping[at]
        new.index[there] = old.index[at]
        new.mapcount[there] = 1
        mm.table.set(page, target << pte.FRAME_SHIFT | entry & (pte.BITS & ~pte.KIND) | pte.PRESENT)
    else:  # unmapped meanwhile
        memory.put_one(target)
    memory.put_one(frame)
    mm.migration_ended()


def put_back(mm: Mm, page: int, frame: int) -> None:
    """`page`, taken as `frame`, stays on its device."""
    zone = mm.memory.zones[frame >> ZONE_SHIFT]
    at = frame - zone.base
    zone.flags[at] = int(zone.flags[at]) & ~LOCKED
    entry = mm.table.get(page)
    if entry & pte.KIND == pte.MIGRATION and entry >> pte.FRAME_SHIFT == frame:
        zone.mapcount[at] = 1
        mm.table.set(page, entry & ~pte.KIND | pte.DEVICE)
    else:  # unmapped meanwhile
        mm.memory.put_one(frame)
    mm.migration_ended()
