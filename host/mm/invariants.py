"""What must hold between any two steps, as one function for tests (I2, I3 and I5 of the semantics, and the books of `frames.py`).

It looks at every frame that was ever used: a machine at work stands still for some 20 ms for each GiB.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from hmmnet.pages import HUGE_PAGES, HUGE_SHIFT, PAGES_MAX, Words

from . import pte
from .frames import PhysicalMemory
from .memcg import CHARGE_SHIFT
from .mm import Mm
from .vma import VM_WRITE, Vma
from .zones import ANON, COMPOUND, LOCKED, STATE, HostZone, Zone


def check(memory: PhysicalMemory, mms: Iterable[Mm], *, quiet: bool = True) -> None:
    """Raise AssertionError, saying what and where, if the books do not agree.

    `mms` are all address spaces that live. `quiet`: no migration is under way, so there may be no migration entry and no locked frame (I5).
    """
    mappings: list[Words] = []
    migrating: list[Words] = []
    for mm in mms:
        _check_vmas(mm)
        _check_blocks(memory, mm)
        mapped, moving = _check_entries(memory, mm)
        mappings.append(mapped)
        migrating.append(moving)
    frames, counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *mappings]), return_counts=True)
    moving = np.unique(np.concatenate([np.zeros(0, np.uint64), *migrating]))
    assert not quiet or len(moving) == 0, f"frame 0x{int(moving[0]):x} is still behind a migration entry"
    for zone in memory.zones.values():
        _check_folded(zone, quiet=quiet)
        inside = (frames >= zone.base) & (frames < zone.base + zone.count)
        _check_zone(zone, frames[inside], counts[inside].astype(np.int64), quiet=quiet)
    if quiet:
        charged = np.concatenate([_all(zone, "flags") >> np.uint32(CHARGE_SHIFT) for zone in memory.zones.values()])
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


def _check_blocks(memory: PhysicalMemory, mm: Mm) -> None:
    """A block that is mapped as one has no entries beside that, and leads to an aligned run; folded folios are mapped so only."""
    blocks = mm.table.pmds.occupied(0, PAGES_MAX >> HUGE_SHIFT)
    assert len(blocks) == mm.table.pmd_count, f"process {mm.number}: {len(blocks)} blocks are mapped as one, not {mm.table.pmd_count}"
    entries = mm.table.pmds.gather(blocks)
    assert (entries & pte.HUGE != 0).all(), f"process {mm.number}: an entry of a block that does not say so"
    aligned = pte.frames_of(entries) % np.uint64(HUGE_PAGES) == 0
    assert aligned.all(), f"process {mm.number}: a block is mapped as one to frames that are no huge page"
    for block in blocks.tolist():
        beside = mm.table.ptes.read(block << HUGE_SHIFT, block + 1 << HUGE_SHIFT)
        assert not beside.any(), f"process {mm.number}: the block at page 0x{block << HUGE_SHIFT:x} is mapped as one, and page by page"
    small = mm.table.ptes.gather(mm.table.ptes.occupied(0, PAGES_MAX))
    kinds = small & pte.KIND
    frames = pte.frames_of(small[(kinds != pte.MARKER) & (kinds != pte.SWAP) & (small & pte.SPECIAL == 0)])
    heads = frames >> np.uint64(HUGE_SHIFT) << np.uint64(HUGE_SHIFT)
    assert not memory.folded(np.unique(heads)).any(), f"process {mm.number}: one page of a folded folio is mapped"


def _check_folded(zone: Zone, *, quiet: bool) -> None:
    """Folded folios are large ones, in use (or granted, while a migration runs), and say nothing but at their heads."""
    blocks = np.flatnonzero(zone.folded)
    assert len(blocks) == zone.folded_count, f"{zone.owner}: {len(blocks)} folios are folded, counted are {zone.folded_count}"
    for block in blocks.tolist():
        head, rest = block << HUGE_SHIFT, slice((block << HUGE_SHIFT) + 1, (block + 1) << HUGE_SHIFT)
        said = [name for name in STATE if getattr(zone, name)[rest].any()]
        assert not said, f"{zone.owner}: frames of the folded folio {head} have {', '.join(said)} of their own"
        assert not quiet or zone.refcount[head] > 0, f"{zone.owner}: folio {head} is folded, and free"
        large = zone.refcount[head] == 0 or not zone.mapcount[head] or zone.flags[head] & COMPOUND
        assert large, f"{zone.owner}: folio {head} is folded, mapped and not large"


def _all(zone: Zone, name: str) -> npt.NDArray[Any]:
    """What `name` says of each frame that was ever used."""
    return zone.values(name, zone.used)


def _check_entries(memory: PhysicalMemory, mm: Mm) -> tuple[Words, Words]:
    """Entries lie in VMAs and agree with their rights and with the frames' owners; (mapped frames, frames behind migration entries)."""
    pages = mm.table.occupied(0, PAGES_MAX)
    entries = mm.table.gather(pages)
    kinds = pte.kinds_of(entries)
    frames = pte.frames_of(entries)
    counted = (kinds != pte.MARKER) & (kinds != pte.SWAP) & (entries & pte.SPECIAL == 0)
    assert int(np.count_nonzero(counted)) == mm.rss, f"process {mm.number}: rss is {mm.rss}, mapped are {np.count_nonzero(counted)}"
    moving = kinds == pte.MIGRATION
    mapped = counted & ((kinds == pte.PRESENT) | (kinds == pte.DEVICE) | (kinds == pte.EXCLUSIVE) | (kinds == pte.HINT))
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
    used = zone.used.stop
    unused = frames[frames >= np.uint64(zone.base + used)]
    assert len(unused) == 0, f"{zone.owner}: frame {unused[0] - np.uint64(zone.base)} is mapped, and was never allocated"
    expected = np.zeros(used, np.int32)
    expected[(frames - np.uint64(zone.base)).astype(np.intp)] = counts
    mapcount, refcount, mapping, flags = (_all(zone, name) for name in ("mapcount", "refcount", "mapping", "flags"))
    wrong = np.flatnonzero(mapcount != expected)
    assert len(wrong) == 0, f"{zone.owner}: frame {wrong[0]} says it is mapped {mapcount[wrong[0]]} times, but is {expected[wrong[0]]}"
    idle = zone.idle_references
    below = np.flatnonzero(zone.page_counts(zone.used) < idle)
    assert len(below) == 0, f"{zone.owner}: frame {below[0]} has fewer references than the {idle} of an idle one (I8)"
    below = np.flatnonzero(refcount < mapcount)
    assert len(below) == 0, f"{zone.owner}: frame {below[0]} has fewer references than mappings"
    free = refcount == 0
    assert not mapping[free].any(), f"{zone.owner}: a free frame still belongs to somebody"
    if quiet:
        assert not (flags & LOCKED).any(), f"{zone.owner}: frame {np.argmax(flags & LOCKED)} is still locked"
        assert not flags[free].any(), f"{zone.owner}: a free frame still has flags"
    if isinstance(zone, HostZone):
        held = int(np.count_nonzero(~free))
        assert held == zone.allocator.used_count, f"{zone.owner}: {held} frames have references, {zone.allocator.used_count} are allocated"
