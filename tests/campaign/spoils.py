"""What may be wrong with a machine's books, done on purpose: one function for each thing, at a place that is drawn.

Each spoils one word, past every method that would mend or mark it, and returns how to undo that; None where there is nothing of its kind.
Its name begins with the invariant that is broken.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, cast

import numpy as np

from hmmnet.host.mm import pte
from hmmnet.host.mm.memcg import CHARGE_MASK, MemoryCgroup
from hmmnet.host.mm.mm import Mm
from hmmnet.host.mm.vma import VM_WRITE
from hmmnet.host.mm.zones import ANON, LOCKED, HostZone, Zone
from hmmnet.host.service import Host
from hmmnet.pages import PAGES_MAX
from hmmnet.sim import SimulatedMachine

Undo = Callable[[], None]
Spoil = Callable[[SimulatedMachine, Random], Undo | None]
SPOILS: dict[str, Spoil] = {}


def spoil(function: Spoil) -> Spoil:
    """Register it under its name."""
    SPOILS[function.__name__] = function
    return function


def host_of(machine: SimulatedMachine) -> Host:
    """The host itself."""
    return cast(Host, machine.host)


def set_cell(cells: Any, at: Any, value: Any) -> Undo:
    """Write a word; how to have the old one back."""
    before = cells[at]
    cells[at] = value
    return lambda: cells.__setitem__(at, before)


def set_field(owner: Any, name: str, value: Any) -> Undo:
    """Set an attribute; how to have the old one back."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def some_entry(machine: SimulatedMachine, random: Random, fits: Callable[[int], bool]) -> tuple[Mm, int, int] | None:
    """A process, a page and its entry, where that `fits`."""
    mms = [space.mm for space in host_of(machine).spaces.values()]
    found = [
        (mm, page, entry)
        for mm in mms
        for page in mm.table.ptes.occupied(0, PAGES_MAX).tolist()
        if fits(entry := mm.table.ptes.get(page)) and not entry & pte.SPECIAL
    ]
    return random.choice(found) if found else None


def set_entry(mm: Mm, page: int, entry: int) -> Undo:
    """Write an entry as everybody does; how to have the old one back."""
    before = mm.table.ptes.get(page)
    mm.table.ptes.set(page, entry)
    return lambda: mm.table.ptes.set(page, before)


def kind_of(entry: int) -> int:
    """Of an entry."""
    return entry & pte.KIND


def is_mapping(entry: int) -> bool:
    """Whether it maps a page of memory, or of a device."""
    return kind_of(entry) in {pte.PRESENT, pte.DEVICE}


def zone_and_place(machine: SimulatedMachine, frame: int) -> tuple[Zone, int]:
    """Where the struct page of a frame is."""
    zone = host_of(machine).memory.zone(frame)
    return zone, frame - zone.base


def some_mapped(machine: SimulatedMachine, random: Random) -> tuple[Zone, int] | None:
    """The struct page of a frame that is mapped."""
    found = some_entry(machine, random, is_mapping)
    return None if found is None else zone_and_place(machine, found[2] >> pte.FRAME_SHIFT)


def some_idle(machine: SimulatedMachine, random: Random, *, device: bool = False) -> tuple[Zone, int] | None:
    """The struct page of a frame that was used once and is free now."""
    zones = [zone for zone in host_of(machine).memory.zones.values() if not (device and isinstance(zone, HostZone))]
    found = [(zone, at) for zone in zones for at in np.flatnonzero(~zone.referenced(zone.used.stop)).tolist() if not zone.folded_count]
    return random.choice(found) if found else None


# --- I1 -----------------------------------------------------------------------------------------------------------------------------


@spoil
def i1_domain_leads_elsewhere(machine: SimulatedMachine, random: Random) -> Undo | None:
    """An IOMMU translation of another frame."""
    lives = [device.life for device in host_of(machine).devices.values() if device.life is not None]
    tables = [context.domain.table for life in lives for context in life.contexts.values()]
    found = [(table, page) for table in tables for page in table.occupied(0, PAGES_MAX).tolist()]
    if not found:
        return None
    table, page = random.choice(found)
    before = table.get(page)
    table.set(page, before ^ 1 << 5)
    return lambda: table.set(page, before)


@spoil
def i1_mirror_leads_elsewhere(machine: SimulatedMachine, random: Random) -> Undo | None:
    """A device's entry of another frame."""
    devices = [node.device for node in machine._nodes.values() if node.device is not None]
    tables = [mirror.table.ptes for device in devices for _, mirror in device.open_mirrors]
    found = [(table, page) for table in tables for page in table.occupied(0, PAGES_MAX).tolist()]
    if not found:
        return None
    table, page = random.choice(found)
    before = table.get(page)
    table.set(page, before ^ 1 << 9)
    return lambda: table.set(page, before)


# --- I2 and the entries ---------------------------------------------------------------------------------------------------------------


@spoil
def i2_page_has_two_places(machine: SimulatedMachine, random: Random) -> Undo | None:
    """A page's entry leads to the frame of another page."""
    one, other = some_entry(machine, random, is_mapping), some_entry(machine, random, is_mapping)
    if one is None or other is None or one[2] >> pte.FRAME_SHIFT == other[2] >> pte.FRAME_SHIFT:
        return None
    return set_entry(one[0], one[1], one[2] & pte.BITS | other[2] >> pte.FRAME_SHIFT << pte.FRAME_SHIFT)


@spoil
def entry_vanishes(machine: SimulatedMachine, random: Random) -> Undo | None:
    """A page is not mapped any more, and its frame does not know."""
    found = some_entry(machine, random, is_mapping)
    return None if found is None else set_entry(found[0], found[1], 0)


@spoil
def entry_is_outside(machine: SimulatedMachine, random: Random) -> Undo | None:
    """An entry where no VMA is."""
    found = some_entry(machine, random, is_mapping)
    return None if found is None else set_entry(found[0], 17 + random.randrange(64), found[2])


@spoil
def entry_leads_nowhere(machine: SimulatedMachine, random: Random) -> Undo | None:
    """An entry of memory that there is not."""
    found = some_entry(machine, random, is_mapping)
    return None if found is None else set_entry(found[0], found[1], found[2] & pte.BITS | 1 << 61)


@spoil
def entry_may_write_though_its_vma_may_not(machine: SimulatedMachine, random: Random) -> Undo | None:
    """The VMA loses the right, the entries keep it."""
    found = some_entry(machine, random, lambda entry: is_mapping(entry) and bool(entry & pte.WRITE))
    vma = None if found is None else found[0].vmas.find(found[1])
    return None if vma is None else set_field(vma, "flags", vma.flags & ~VM_WRITE)


@spoil
def rss_is_another(machine: SimulatedMachine, random: Random) -> Undo | None:
    """A process counts a page too many."""
    space = random.choice(list(host_of(machine).spaces.values()))
    return set_field(space.mm, "rss", space.mm.rss + 1)


@spoil
def blocks_are_counted_wrong(machine: SimulatedMachine, random: Random) -> Undo | None:
    """A huge page too many."""
    space = random.choice(list(host_of(machine).spaces.values()))
    return set_field(space.mm.table, "pmd_count", space.mm.table.pmd_count + 1)


@spoil
def huge_page_is_not_aligned(machine: SimulatedMachine, random: Random) -> Undo | None:
    """A block that is mapped as one leads to frames that are none."""
    spaces = host_of(machine).spaces.values()
    found = [(space.mm.table.pmds, block) for space in spaces for block in space.mm.table.pmds.occupied(0, PAGES_MAX >> 9).tolist()]
    if not found:
        return None
    table, block = random.choice(found)
    before = table.get(block)
    table.set(block, before + (1 << pte.FRAME_SHIFT))
    return lambda: table.set(block, before)


@spoil
def folios_are_counted_wrong(machine: SimulatedMachine, random: Random) -> Undo | None:
    """A memory has a folded folio too many."""
    zone = random.choice(list(host_of(machine).memory.zones.values()))
    return set_field(zone, "folded_count", zone.folded_count + 1)


@spoil
def process_vanishes(machine: SimulatedMachine, random: Random) -> Undo | None:
    """A process is gone, and its frames do not know."""
    spaces = host_of(machine).spaces
    before, found = dict(spaces), [number for number, space in spaces.items() if space.mm.rss]
    if not found:
        return None
    del spaces[random.choice(found)]

    def undo() -> None:
        spaces.clear()
        spaces.update(before)

    return undo


@spoil
def vmas_overlap(machine: SimulatedMachine, random: Random) -> Undo | None:
    """A VMA ends beyond the begin of the next."""
    mms = [space.mm for space in host_of(machine).spaces.values() if len(space.mm.vmas) > 1]
    if not mms:
        return None
    vmas = random.choice(mms).vmas.all()
    at = random.randrange(len(vmas) - 1)
    return set_field(vmas[at], "end", vmas[at + 1].start + 1)


# --- frames ---------------------------------------------------------------------------------------------------------------------------


@spoil
def frame_is_somebody_elses(machine: SimulatedMachine, random: Random) -> Undo | None:
    """Its anon_vma, or file, is none of the VMA that maps it."""
    found = some_mapped(machine, random)
    return None if found is None else set_cell(found[0].mapping, found[1], 0xFFFF)


@spoil
def frame_has_another_index(machine: SimulatedMachine, random: Random) -> Undo | None:
    """It leads to another page."""
    found = some_mapped(machine, random)
    return None if found is None else set_cell(found[0].index, found[1], int(found[0].index[found[1]]) + 1)


@spoil
def frame_counts_a_mapping_too_many(machine: SimulatedMachine, random: Random) -> Undo | None:
    """`mapcount` is not what page tables say."""
    found = some_mapped(machine, random)
    return None if found is None else set_cell(found[0].mapcount, found[1], int(found[0].mapcount[found[1]]) + 1)


@spoil
def own_page_is_of_a_file(machine: SimulatedMachine, random: Random) -> Undo | None:
    """An exclusive entry leads to a frame that is not anonymous."""
    found = some_entry(machine, random, lambda entry: is_mapping(entry) and bool(entry & pte.ANON_EXCLUSIVE))
    if found is None:
        return None
    zone, at = zone_and_place(machine, found[2] >> pte.FRAME_SHIFT)
    return set_cell(zone.flags, at, int(zone.flags[at]) & ~ANON)


@spoil
def i3_mapped_frame_is_free(machine: SimulatedMachine, random: Random) -> Undo | None:
    """Mapped, without a reference."""
    found = some_mapped(machine, random)
    return None if found is None else set_cell(found[0].refcount, found[1], 0)


@spoil
def i3_free_frame_is_held(machine: SimulatedMachine, random: Random) -> Undo | None:
    """A frame of the host has a reference, and nobody has allocated it."""
    found = some_idle(machine, random)
    return None if found is None or not isinstance(found[0], HostZone) else set_cell(found[0].refcount, found[1], 1)


@spoil
def i3_allocated_frame_leaks(machine: SimulatedMachine, random: Random) -> Undo | None:
    """The host has given out a frame, and nobody has it."""
    zone = random.choice(host_of(machine).memory.nodes)
    frame = zone.allocator.allocate_one()
    return None if frame is None else lambda: zone.allocator.free_run(frame, frame + 1)


@spoil
def i3_free_frame_belongs_to_somebody(machine: SimulatedMachine, random: Random) -> Undo | None:
    """It was not taken out of the reverse map."""
    found = some_idle(machine, random)
    return None if found is None else set_cell(found[0].mapping, found[1], 3)


@spoil
def i8_idle_frame_has_less_than_none(machine: SimulatedMachine, random: Random) -> Undo | None:
    """A reference of an idle frame of a device was dropped once more."""
    found = some_idle(machine, random, device=True)
    return None if found is None else set_cell(found[0].refcount, found[1], -1)


# --- I4 -------------------------------------------------------------------------------------------------------------------------------


def _groups(machine: SimulatedMachine) -> list[MemoryCgroup]:
    return host_of(machine).memory.cgroups._groups


@spoil
def i4_group_counts_a_page_too_many(machine: SimulatedMachine, random: Random) -> Undo | None:
    """It says that it has more than is charged."""
    groups = _groups(machine)
    return set_field(groups[0], "usage_pages", groups[0].usage_pages + 1 + random.randrange(3)) if groups else None


@spoil
def i4_frame_is_charged_to_nobody(machine: SimulatedMachine, random: Random) -> Undo | None:
    """A frame has forgotten who pays for it."""
    found = some_mapped(machine, random) if _groups(machine) else None
    if found is None or not int(found[0].flags[found[1]]) & CHARGE_MASK:
        return None
    return set_cell(found[0].flags, found[1], int(found[0].flags[found[1]]) & ~CHARGE_MASK)


# --- I5 -------------------------------------------------------------------------------------------------------------------------------


@spoil
def i5_migration_entry_of_an_unlocked_frame(machine: SimulatedMachine, random: Random) -> Undo | None:
    """An entry says that its page is on its way, and nobody has it."""
    found = some_entry(machine, random, is_mapping)
    return None if found is None else set_entry(found[0], found[1], found[2] & ~pte.KIND | pte.MIGRATION)


def leave_a_migration_entry(machine: SimulatedMachine, random: Random) -> Undo | None:
    """A page that looks in every way as if it were on its way, and stays so: only time tells (I5)."""

    def alone(entry: int) -> bool:
        frame = entry >> pte.FRAME_SHIFT
        zone = host_of(machine).memory.zone(frame)
        return is_mapping(entry) and not zone.folded_count and int(zone.mapcount[frame - zone.base]) == 1

    found = some_entry(machine, random, alone)
    if found is None:
        return None
    zone, at = zone_and_place(machine, found[2] >> pte.FRAME_SHIFT)
    undone = [
        set_entry(found[0], found[1], found[2] & ~pte.KIND | pte.MIGRATION),
        set_cell(zone.mapcount, at, 0),
        set_cell(zone.flags, at, int(zone.flags[at]) | LOCKED),
    ]

    def undo() -> None:
        for one in undone:
            one()

    return undo


def share_and_own(machine: SimulatedMachine, random: Random) -> Undo | None:
    """Of a page that two map, one may write."""
    memory = host_of(machine).memory

    def fits(entry: int) -> bool:
        frame = entry >> pte.FRAME_SHIFT
        return (
            is_mapping(entry) and int(memory.zone(frame).mapcount[frame - memory.zone(frame).base]) > 1 and not entry & pte.ANON_EXCLUSIVE
        )

    found = some_entry(machine, random, fits)
    return None if found is None else set_entry(found[0], found[1], found[2] | pte.ANON_EXCLUSIVE)
