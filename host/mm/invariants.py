"""What must hold between any two steps, as one function for tests (I2, I3 and I5 of the semantics, and the books of `frames.py`).

It looks at everything, so it is slow; nothing but tests calls it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from hmmnet.pages import PAGES_MAX, Words

from . import pte
from .frames import PhysicalMemory
from .memcg import CHARGE_SHIFT
from .mm import Mm
from .vma import VM_WRITE, Vma
from .zones import ANON, LOCKED, HostZone, Zone


def check(memory: PhysicalMemory, mms: Iterable[Mm], *, quiet: bool = True) -> None:
    """Raise AssertionError, saying what and where, if the books do not agree.

    `mms` are all address spaces that live. `quiet`: no migration is under way, so there may be no migration entry and no locked frame (I5).
    """
    mappings: list[Words] = []
    migrating: list[Words] = []
    for mm in mms:
        _check_vmas(mm)
        mapped, moving = _check_entries(memory, mm)
        mappings.append(mapped)
        migrating.append(moving)
    frames, counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *mappings]), return_counts=True)
    moving = np.unique(np.concatenate([np.zeros(0, np.uint64), *migrating]))
    assert not quiet or len(moving) == 0, f"frame 0x{int(moving[0]):x} is still behind a migration entry"
    for zone in memory.zones.values():
        inside = (frames >= zone.base) & (frames < zone.base + zone.count)
        _check_zone(zone, frames[inside], counts[inside].astype(np.int64), quiet=quiet)
    if quiet:
        charged = np.concatenate([zone.flags >> np.uint32(CHARGE_SHIFT) for zone in memory.zones.values()])
        per_group = {number: pages for number, pages in enumerate(np.bincount(charged).tolist()) if number and pages}
        assert per_group == memory.cgroups.charged(), (
            f"pages charged to memory cgroups (I4): {per_group}, they say {memory.cgroups.charged()}"
        )


def _check_vmas(mm: Mm) -> None:
    """VMAs are in order, apart, and as few as can be."""
    vmas = mm.vmas.all()
    for left, right in pairwise(vmas):
        assert left.start < left.end <= right.start < right.end, f"process {mm.number}: VMAs overlap at page 0x{right.start:x}"
        assert not left.merges_with(right), f"process {mm.number}: VMAs that are equal did not merge at page 0x{right.start:x}"


def _check_entries(memory: PhysicalMemory, mm: Mm) -> tuple[Words, Words]:
    """Entries lie in VMAs and agree with their rights and with the frames' owners; (mapped frames, frames behind migration entries)."""
    pages = mm.table.occupied(0, PAGES_MAX)
    entries = mm.table.gather(pages)
    kinds = pte.kinds_of(entries)
    frames = pte.frames_of(entries)
    counted = (kinds != pte.MARKER) & (kinds != pte.SWAP) & (entries & pte.SPECIAL == 0)
    assert int(np.count_nonzero(counted)) == mm.rss, f"process {mm.number}: rss is {mm.rss}, mapped are {np.count_nonzero(counted)}"
    moving = kinds == pte.MIGRATION
    mapped = counted & ((kinds == pte.PRESENT) | (kinds == pte.DEVICE) | (kinds == pte.EXCLUSIVE))
    left = np.ones(len(pages), np.bool_)
    for vma in mm.vmas.all():
        part = slice(*np.searchsorted(pages, (vma.start, vma.end)).tolist())
        left[part] = False
        if not vma.flags & VM_WRITE:
            assert not (entries[part] & pte.WRITE).any(), f"process {mm.number}: a writable entry in a read-only VMA at 0x{vma.start:x}"
        known = memory.field(frames[part][mapped[part]], "index") - vma.pgoff + vma.start
        same = known == pages[part][mapped[part]]
        assert same.all(), f"process {mm.number}: a frame's index does not lead to its page in the VMA at 0x{vma.start:x}"
        owned = np.isin(memory.field(frames[part][mapped[part]], "mapping"), (vma.anon, *vma.chain, *vma_file(vma)))
        assert owned.all(), f"process {mm.number}: a frame of an anon_vma or a file that the VMA at 0x{vma.start:x} does not have"
    assert not left.any(), f"process {mm.number}: page 0x{int(pages[np.argmax(left)]):x} is mapped outside every VMA"
    anonymous = mapped.copy()
    anonymous[mapped] = memory.field(frames[mapped], "flags") & ANON != 0
    assert not (entries[mapped & ~anonymous] & pte.ANON_EXCLUSIVE).any(), f"process {mm.number}: a page of a file that is one process's own"
    shared = anonymous & (entries & (pte.WRITE | pte.ANON_EXCLUSIVE) != 0)
    alone = memory.field(frames[shared], "mapcount") == 1
    assert alone.all(), f"process {mm.number}: a page that several map is writable or exclusive (I2)"
    locked = memory.field(frames[moving], "flags") & LOCKED != 0
    assert locked.all(), f"process {mm.number}: a migration entry whose frame is not locked"
    assert not memory.field(frames[moving], "mapcount").any(), f"process {mm.number}: a frame under migration counts as mapped"
    return frames[mapped], frames[moving]


def vma_file(vma: Vma) -> tuple[int, ...]:
    """The number of the file that `vma` maps, if it does."""
    return () if vma.file is None else (vma.file.number,)


def _check_zone(zone: Zone, frames: Words, counts: npt.NDArray[np.int64], *, quiet: bool) -> None:
    """Every frame counts its mappings; what has no reference is free, and the other way round (I3)."""
    expected = np.zeros(zone.count, np.int32)
    expected[(frames - np.uint64(zone.base)).astype(np.intp)] = counts
    wrong = np.flatnonzero(zone.mapcount != expected)
    assert len(wrong) == 0, f"{zone.owner}: frame {wrong[0]} says it is mapped {zone.mapcount[wrong[0]]} times, but is {expected[wrong[0]]}"
    below = np.flatnonzero(zone.refcount < zone.mapcount)
    assert len(below) == 0, f"{zone.owner}: frame {below[0]} has fewer references than mappings"
    free = zone.refcount == 0
    assert not zone.mapping[free].any(), f"{zone.owner}: a free frame still belongs to somebody"
    if quiet:
        assert not (zone.flags & LOCKED).any(), f"{zone.owner}: frame {np.argmax(zone.flags & LOCKED)} is still locked"
        assert not zone.flags[free].any(), f"{zone.owner}: a free frame still has flags"
    if isinstance(zone, HostZone):
        used = int(np.count_nonzero(~free))
        assert used == zone.allocator.used_count, f"{zone.owner}: {used} frames have references, {zone.allocator.used_count} are allocated"
