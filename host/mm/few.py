"""The migration of a few pages, without arrays: what most migrations are, and what a CPU fault on a device page runs.

The same steps as `collect.py`, with the same results (a test compares the two on the same states), for the cases that decide how fast a
fault comes home: up to `hmmnet.pages.FEW` pages, each mapped by one process, or by none yet. Numpy pays one to three microseconds for each
operation, whatever the length; with a few pages that is all there is to pay. Every function answers False, having done nothing, when one of
the pages is not such a case.

`take`, `bring` and `put_back` are the CPU fault's own form of the steps, for one page: collect, then either pages and finalize in one, or
neither.

What the two forms have in common is here (`owners`); what each has to say in its own words is held together by that test.
"""

from __future__ import annotations

from collections.abc import Sequence

from hmmnet.host.interfaces import NO_OWNER, Migration, Select
from hmmnet.pages import (
    DEVICE_ZONE_MIN,
    HUGE_PAGES,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_SHIFT,
    MIGRATE_PFN_VALID,
    ZONE_SHIFT,
    Words,
)

from . import pte
from .frames import PhysicalMemory
from .memcg import CHARGE_MASK
from .mm import Mm
from .vma import VM_UFFD_MISSING, VM_WRITE
from .zones import ANON, COMPOUND, LOCKED, HostZone, entry_kind

BOTH = MIGRATE_PFN_VALID | MIGRATE_PFN_MIGRATE
_FLAGS = 0xFFFFFFFF
"""All bits that flags have."""

EVERY_DEVICE = range(DEVICE_ZONE_MIN, 1 << 64 - pte.FRAME_SHIFT - ZONE_SHIFT)
"""The zones that are a device's."""

STAYS, EMPTY, GOES = range(3)
"""What becomes of a page: nothing; it was never touched, so that its target is inserted; its frame moves."""


def collect(mm: Mm, migration: Migration, select: Select) -> bool:
    """Fill `migration`, of a few pages, where each is one that this process alone maps, or nobody."""
    points = mm.memory.points
    if points.armed and (points.wants("migrate.trylock") or points.wants("migrate.count")):
        return False  # the general form is where faults are injected
    pages = migration.pages.tolist()
    entries = mm.table.numbers(pages)
    fates = []
    for page, entry in zip(pages, entries, strict=True):
        fate = _fate(mm, page, entry, select, migration.owner, migration.fault_frame)
        if fate is None:
            return False
        fates.append(fate)
    for row, fate in enumerate(fates):
        if fate == GOES:
            entry = entries[row]
            _install(mm, pages[row], entry)
            migration.saved[row] = entry
            migration.source[row] = entry >> pte.FRAME_SHIFT << MIGRATE_PFN_SHIFT | BOTH | entry & pte.WRITE
        elif fate == EMPTY:
            migration.source[row] = MIGRATE_PFN_MIGRATE
    return True


def _install(mm: Mm, page: int, entry: int) -> None:
    """A migration entry takes the place of `entry`, and holds the lock of its frame."""
    mm.table.set(page, entry & ~(pte.BITS & ~pte.CARRIED) | pte.MIGRATION)
    frame = entry >> pte.FRAME_SHIFT
    zone = mm.memory.zones[frame >> ZONE_SHIFT]
    cells, at = zone.cells, frame - zone.base
    cells.flags[at] |= LOCKED
    cells.mapcount[at] = 0


def _fate(mm: Mm, page: int, entry: int, select: Select, owner: int, fault_frame: int | None) -> int | None:
    """What becomes of one page; None when it is not a simple case."""
    if entry & pte.HUGE:
        return None
    if entry == 0 or (entry & (pte.KIND | pte.SPECIAL) == pte.PRESENT | pte.SPECIAL and select.has(Select.SYSTEM)):
        vma = mm.vmas.find(page)
        return EMPTY if vma is not None and vma.is_anonymous else STAYS
    return _movable(mm, entry, fault_frame) if _wanted(mm.memory, entry, select, owner) else STAYS


def _movable(mm: Mm, entry: int, fault_frame: int | None) -> int | None:
    """`_fate` of a page that is wanted: whether its frame goes depends on who else has it."""
    frame = entry >> pte.FRAME_SHIFT
    zone = mm.memory.zones[frame >> ZONE_SHIFT]
    cells, at, host = zone.cells, frame - zone.base, isinstance(zone, HostZone)
    flags = cells.flags[at]
    if flags & COMPOUND and host:
        return None
    if flags & LOCKED and frame != fault_frame:
        return STAYS
    if cells.mapcount[at] != 1 or not flags & ANON:
        return None
    allowed = (1 if host else 1 + zone.extra_references) + (frame == fault_frame)
    return STAYS if cells.refcount[at] > allowed or cells.pincount[at] else GOES


def _wanted(memory: PhysicalMemory, entry: int, select: Select, owner: int) -> bool:
    """`collect.wanted` for one entry that is not of a huge page."""
    kind = entry & (pte.KIND | pte.SPECIAL)
    number = entry >> pte.FRAME_SHIFT + ZONE_SHIFT
    if kind == pte.DEVICE:
        return bool(select.has(Select.DEVICE_PRIVATE)) and number in owners(memory, select, owner)
    if kind != pte.PRESENT:
        return False
    if number < DEVICE_ZONE_MIN:
        return bool(select.has(Select.SYSTEM))
    return bool(select.has(Select.DEVICE_COHERENT)) and number in owners(memory, select, owner)


def owners(memory: PhysicalMemory, select: Select, owner: int) -> Sequence[int]:
    """The zones whose pages `select` takes, of those that it takes pages of devices of, in the name of zone `owner`."""
    if owner == NO_OWNER and not select.has(Select.ANY_OWNER):
        return ()
    if select.has(Select.PEERS):
        return memory.peers_of(owner)
    return EVERY_DEVICE if select.has(Select.ANY_OWNER) else (owner,)


def unshared(mm: Mm, pages: Words, select: Select, owner: int) -> bool:
    """Whether, of a few `pages`, those that `collect` would take are this process's alone for certain."""
    for entry in mm.table.numbers(pages.tolist()):
        if entry & pte.HUGE:
            return False
        if entry and _wanted(mm.memory, entry, select, owner):
            frame = entry >> pte.FRAME_SHIFT
            zone = mm.memory.zones[frame >> ZONE_SHIFT]
            if zone.cells.mapcount[frame - zone.base] > 1:
                return False
    return True


def move(memory: PhysicalMemory, mm: Mm | None, migration: Migration) -> bool:
    """migrate_vma_pages for a few collected pages."""
    rows = list(zip(migration.pages.tolist(), migration.source.tolist(), migration.target.tolist(), strict=True))
    inserts = False
    for _, source, target in rows:
        if source & MIGRATE_PFN_MIGRATE and target & MIGRATE_PFN_VALID:
            if not source & MIGRATE_PFN_VALID:
                inserts = True
            elif not _moves_alone(memory, source >> MIGRATE_PFN_SHIFT, len(rows)):
                return False
    if inserts and (mm is None or mm.cgroup is not None or not _may_insert(mm, migration)):
        return False
    for row, (page, source, target) in enumerate(rows):
        if not source & MIGRATE_PFN_MIGRATE:
            continue
        new = target >> MIGRATE_PFN_SHIFT
        if not target & MIGRATE_PFN_VALID:
            moved = 0
        elif source & MIGRATE_PFN_VALID:
            moved = _take_over(memory, source, new)
        else:
            assert mm is not None, "only a process has pages that were never touched"
            moved = _insert(mm, migration, row, page, source, new)
        if moved != source:
            migration.source[row] = moved or source ^ MIGRATE_PFN_MIGRATE
    return True


def _moves_alone(memory: PhysicalMemory, frame: int, count: int) -> bool:
    """Whether `frame`, one of `count`, is an anonymous page; one of a large folio that goes alone is none any more."""
    zone = memory.zones[frame >> ZONE_SHIFT]
    flags: int = zone.cells.flags[frame - zone.base]
    return bool(flags & ANON) and (count == 1 or not flags & COMPOUND)


def _take_over(memory: PhysicalMemory, source: int, new: int) -> int:
    """folio_migrate_mapping: frame `new` becomes what that of the word `source` is; 0 when that has a reference more."""
    old = source >> MIGRATE_PFN_SHIFT
    zone = memory.zones[old >> ZONE_SHIFT]
    cells, at = zone.cells, old - zone.base
    if cells.refcount[at] > 1:
        return 0
    _become(memory, new, cells.flags[at] & ~COMPOUND, cells.mapping[at], cells.index[at])
    return source


def _become(memory: PhysicalMemory, frame: int, flags: int, mapping: int, index: int) -> None:
    """A target is that page from now on, with the migration's reference."""
    zone = memory.zones[frame >> ZONE_SHIFT]
    at = frame - zone.base
    if zone.folded_count:  # a frame of a large one that was offered for the block
        zone.unfold(slice(at, at + 1))
    cells = zone.cells
    cells.refcount[at] = 1
    cells.flags[at] = flags
    cells.mapping[at] = mapping
    cells.index[at] = index


def _may_insert(mm: Mm, migration: Migration) -> bool:
    """Whether no fault is injected where never-touched pages get their targets, and no huge zero page is in the way."""
    points = mm.memory.points
    if points.armed and (points.wants("migrate.insert") or points.wants("memcg.charge")):
        return False
    return not any(mm.table.get(page) & pte.HUGE for page in migration.pages.tolist())


def _insert(mm: Mm, migration: Migration, row: int, page: int, source: int, frame: int) -> int:
    """migrate_vma_insert_page: the word of a never-touched page that has its target now; 0 when somebody was first, or wants to hear."""
    vma = mm.vmas.find(page)
    if vma is None or not vma.is_anonymous or vma.flags & VM_UFFD_MISSING:
        return 0
    mm.anon_prepare(vma)
    entry = mm.table.get(page)
    if entry and entry & (pte.KIND | pte.SPECIAL) != pte.PRESENT | pte.SPECIAL:
        return 0
    if migration.compound:
        mm.small_blocks.add(page // HUGE_PAGES * HUGE_PAGES)
    bits = pte.ANON_EXCLUSIVE | (pte.WRITE | pte.DIRTY if vma.flags & VM_WRITE else 0)
    mm.table.set(page, pte.entry(pte.MIGRATION, frame, bits))
    migration.saved[row] = entry
    mm.rss += 1
    _become(mm.memory, frame, ANON | LOCKED, vma.anon, page - vma.start + vma.pgoff)
    return source | bits & pte.WRITE


def finalize(memory: PhysicalMemory, mm: Mm, migration: Migration) -> bool:
    """migrate_vma_finalize for a few pages whose migration entries are still there; frees unused host targets too."""
    rows = list(zip(migration.pages.tolist(), migration.source.tolist(), migration.target.tolist(), strict=True))
    entries = mm.table.numbers([page for page, _, _ in rows])
    for (_, source, target), entry in zip(rows, entries, strict=True):
        if source & BOTH:
            held = (source if source & MIGRATE_PFN_VALID else target) >> MIGRATE_PFN_SHIFT
            if entry & pte.KIND != pte.MIGRATION or entry >> pte.FRAME_SHIFT != held:
                return False
    left: list[int] = []
    for (page, source, target), entry in zip(rows, entries, strict=True):
        goes, came, aim = source & MIGRATE_PFN_MIGRATE, source >> MIGRATE_PFN_SHIFT, target >> MIGRATE_PFN_SHIFT
        if source & BOTH:
            _map_again(mm, page, entry, aim if goes else came)
        if goes and source & MIGRATE_PFN_VALID:
            zone = memory.zones[came >> ZONE_SHIFT]
            zone.cells.flags[came - zone.base] &= _FLAGS & ~(LOCKED | CHARGE_MASK)
            left.append(came)
        elif target and not goes and aim >> ZONE_SHIFT < DEVICE_ZONE_MIN:
            left.append(aim)
    memory.put_few(left)
    mm.migration_ended()
    return True


def _map_again(mm: Mm, page: int, entry: int, frame: int) -> None:
    """remove_migration_pte: the migration entry of `page` leads to `frame` now, whose lock goes."""
    zone = mm.memory.zones[frame >> ZONE_SHIFT]
    at = frame - zone.base
    mm.table.set(page, frame << pte.FRAME_SHIFT | entry & (pte.BITS & ~pte.KIND) | entry_kind(zone))
    zone.cells.mapcount[at] = 1
    zone.cells.flags[at] &= _FLAGS & ~LOCKED


def take(mm: Mm, page: int, owner: int) -> int | None:
    """Collect the device page of zone `owner` that a CPU touched at `page`: its frame, behind a migration entry now.

    None, having done nothing, when it is not there, locked, or not this process's alone.
    """
    entry = mm.table.get(page)
    if entry & (pte.KIND | pte.SPECIAL | pte.HUGE) != pte.DEVICE or entry >> pte.FRAME_SHIFT + ZONE_SHIFT != owner:
        return None  # what `_wanted` says of one device's private pages
    if _movable(mm, entry, None) != GOES:
        return None
    _install(mm, page, entry)
    return entry >> pte.FRAME_SHIFT


def bring(mm: Mm, page: int, frame: int, target: int) -> bool:
    """`page`, taken as device frame `frame`, lives in host frame `target` from now on; the one reference that has is handed over.

    False when somebody holds the device's frame (it is breaking): the page stays there, as `_take_over` leaves it.
    """
    memory = mm.memory
    zone, destination = memory.zones[frame >> ZONE_SHIFT], memory.zones[target >> ZONE_SHIFT]
    at, there = frame - zone.base, target - destination.base
    old, new = zone.cells, destination.cells
    if old.refcount[at] > 1:
        memory.put_one(target)
        put_back(mm, page, frame)
        return False
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
    return True


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
