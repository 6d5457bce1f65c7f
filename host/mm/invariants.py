"""What must hold between any two steps (I2 to I5 and I8 of the semantics, and the books of `frames.py`).

`check` looks at every frame that was ever used: a machine at work stands still for some 20 ms for each GiB. Whoever looks after each step
looks only at what has changed (`ledger.py`), by the same rules: those of an entry and of a frame are each one function here, for all of
them or for some.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hmmnet.pages import HUGE_PAGES, HUGE_SHIFT, PAGES_MAX, ZONE_SHIFT, Words, distinct, word_of

from . import pte
from .frames import PhysicalMemory
from .memcg import CHARGE_SHIFT
from .mm import Mm
from .vma import VM_WRITE, Vma
from .zones import ANON, COMPOUND, LOCKED, STATE, HostZone, Index, Zone

KIND, WRITE, SPECIAL, EXCLUSIVE = (word_of(bits) for bits in (pte.KIND, pte.WRITE, pte.SPECIAL, pte.ANON_EXCLUSIVE))
OWN = WRITE | EXCLUSIVE
WORD = (1 << 64) - 1
UNCOUNTED = frozenset((pte.MARKER, pte.SWAP))
"""The kinds of entries that do not count in rss."""
MAPPING = frozenset((pte.PRESENT, pte.DEVICE, pte.EXCLUSIVE, pte.HINT))
"""The kinds of those that map their frames."""
COUNTED = ~np.isin(np.arange(8), list(UNCOUNTED))
MAPPED = np.isin(np.arange(8), list(MAPPING))
"""The same by kind of entry, for many."""


def check(memory: PhysicalMemory, mms: Iterable[Mm], *, quiet: bool = True) -> None:
    """Raise AssertionError, saying what and where, if the books do not agree.

    `mms` are all address spaces that live. `quiet`: no migration is under way, so there may be no migration entry and no locked frame (I5).
    """
    mappings: list[Words] = []
    migrating: list[Words] = []
    for mm in mms:
        check_vmas(mm)
        check_blocks(memory, mm)
        mapped, moving = _check_table(memory, mm)
        mappings.append(mapped)
        migrating.append(moving)
    frames, counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *mappings]), return_counts=True)
    moving = np.unique(np.concatenate([np.zeros(0, np.uint64), *migrating]))
    assert not quiet or len(moving) == 0, f"frame 0x{int(moving[0]):x} is still behind a migration entry (I5)"
    for zone in memory.zones.values():
        check_folded(zone, quiet=quiet)
        inside = (frames >= zone.base) & (frames < zone.base + zone.count)
        check_frames(zone, zone.used, _expected(zone, frames[inside], counts[inside]), quiet=quiet)
        check_free(zone)
    check_charges(memory, [charges(zone, zone.used) for zone in memory.zones.values()])


class Charges(NamedTuple):
    """How many frames are charged to each memory cgroup, by its number; and how many of them are locked."""

    pages: dict[int, int]
    locked: dict[int, int]


NO_CHARGES = Charges({}, {})


def charges(zone: Zone, used: slice) -> Charges:
    """Those of the frames of `zone` that are in use."""
    flags = zone.seen("flags", used)
    if not len(flags) or int(np.maximum.reduce(flags)) >> CHARGE_SHIFT == 0:
        return NO_CHARGES
    return Charges(*(_per_group(some) for some in (flags, flags[flags & LOCKED != 0])))


def _per_group(flags: npt.NDArray[np.uint32]) -> dict[int, int]:
    return {number: pages for number, pages in enumerate(np.bincount(flags >> np.uint32(CHARGE_SHIFT)).tolist()) if number and pages}


def check_charges(memory: PhysicalMemory, zones: Iterable[Charges]) -> None:
    """Groups count the pages that are charged to them (I4). A page on its way has two frames, both locked, and is charged once."""
    pages: dict[int, int] = {}
    certain: dict[int, int] = {}
    for zone in zones:
        for number, count in zone.pages.items():
            pages[number] = pages.get(number, 0) + count
            certain[number] = certain.get(number, 0) + count - zone.locked.get(number, 0)
    said = memory.cgroups.charged()
    for number in {*pages, *said}:
        right = certain.get(number, 0) <= said.get(number, 0) <= pages.get(number, 0)
        assert right, f"pages charged to memory cgroups (I4): {dict(sorted(pages.items()))}, they say {said}"


def check_vmas(mm: Mm) -> None:
    """VMAs are in order, apart, and as few as can be."""
    vmas = mm.vmas.all()
    for left, right in pairwise(vmas):
        assert left.start < left.end <= right.start < right.end, f"process {mm.number}: VMAs overlap at page 0x{right.start:x}"
        assert not left.merges_with(right), f"process {mm.number}: VMAs that are equal did not merge at page 0x{right.start:x}"


def check_blocks(memory: PhysicalMemory, mm: Mm) -> None:
    """A block that is mapped as one has no entries beside that, and leads to an aligned run; folded folios are mapped so only."""
    blocks = mm.table.pmds.occupied(0, PAGES_MAX >> HUGE_SHIFT)
    assert len(blocks) == mm.table.pmd_count, f"process {mm.number}: {len(blocks)} blocks are mapped as one, not {mm.table.pmd_count}"
    if len(blocks) == 0 and not memory.has_folded:
        return
    entries = mm.table.pmds.gather(blocks)
    assert (entries & pte.HUGE != 0).all(), f"process {mm.number}: an entry of a block that does not say so"
    aligned = pte.frames_of(entries) % word_of(HUGE_PAGES) == 0
    assert aligned.all(), f"process {mm.number}: a block is mapped as one to frames that are no huge page"
    for block in blocks.tolist():
        beside = mm.table.ptes.read(block << HUGE_SHIFT, block + 1 << HUGE_SHIFT)
        assert not beside.any(), f"process {mm.number}: the block at page 0x{block << HUGE_SHIFT:x} is mapped as one, and page by page"
    check_unfolded(memory, mm, mm.table.ptes.gather(mm.table.ptes.occupied(0, PAGES_MAX)))


def check_unfolded(memory: PhysicalMemory, mm: Mm, small: Words) -> None:
    """No one of the entries `small`, which stand for a page each, leads to a page of a folded folio."""
    frames = known(memory, mm, pte.frames_of(small[counted(small) & (small != 0)]))
    heads = frames >> word_of(HUGE_SHIFT) << word_of(HUGE_SHIFT)
    assert not memory.folded(distinct(heads)).any(), f"process {mm.number}: one page of a folded folio is mapped"


def check_folded(zone: Zone, *, quiet: bool) -> None:
    """Folded folios are large ones, in use (or granted, while a migration runs), and say nothing but at their heads."""
    blocks = zone.folded.nonzero()[0]
    assert len(blocks) == zone.folded_count, f"{zone.owner}: {len(blocks)} folios are folded, counted are {zone.folded_count}"
    for block in blocks.tolist():
        head, rest = block << HUGE_SHIFT, slice((block << HUGE_SHIFT) + 1, (block + 1) << HUGE_SHIFT)
        said = [name for name in STATE if getattr(zone, name)[rest].any()]
        assert not said, f"{zone.owner}: frames of the folded folio {head} have {', '.join(said)} of their own"
        assert not quiet or zone.refcount[head] > 0, f"{zone.owner}: folio {head} is folded, and free"
        large = zone.refcount[head] == 0 or not zone.mapcount[head] or zone.flags[head] & COMPOUND
        assert large, f"{zone.owner}: folio {head} is folded, mapped and not large"


class Areas(NamedTuple):
    """The VMAs of a process as arrays, to look up many pages at once."""

    vmas: list[Vma]
    starts: Words
    ends: Words
    steps: Words
    """What to subtract from a page to have its index."""
    writable: npt.NDArray[np.bool_]
    anon: npt.NDArray[np.uint32]
    files: npt.NDArray[np.uint32]
    """The number of the file; of anonymous memory its anon_vma once more."""


def areas(mm: Mm) -> Areas:
    """Those of `mm` now."""
    vmas = mm.vmas.all()
    rows = [(vma.start, vma.end, vma.start - vma.pgoff & WORD, vma.anon, vma_file(vma)) for vma in vmas]
    table = np.array(rows or [(0, 0, 0, 0, 0)], np.uint64)
    writable = np.array([vma.flags & VM_WRITE != 0 for vma in vmas] or [False])
    anon, files = table[:, 3].astype(np.uint32), table[:, 4].astype(np.uint32)
    return Areas(vmas, table[:, 0], table[:, 1], table[:, 2], writable, anon, files)


def counted(entries: Words) -> npt.NDArray[np.bool_]:
    """Which of `entries`, none of them empty, count in rss."""
    which: npt.NDArray[np.bool_] = COUNTED[entries & KIND] & (entries & SPECIAL == 0)
    return which


def mapped(entries: Words) -> npt.NDArray[np.bool_]:
    """Which of `entries` count as mappings of their frames."""
    which: npt.NDArray[np.bool_] = MAPPED[entries & KIND] & (entries & SPECIAL == 0)
    return which


def _check_table(memory: PhysicalMemory, mm: Mm) -> tuple[Words, Words]:
    """All entries of a process; (mapped frames, frames behind migration entries)."""
    pages = mm.table.occupied(0, PAGES_MAX)
    entries = mm.table.gather(pages)
    check_rss(mm, int(np.count_nonzero(counted(entries))))
    check_entries(memory, mm, areas(mm), pages, entries)
    return pte.frames_of(entries[mapped(entries)]), pte.frames_of(entries[entries & KIND == pte.MIGRATION])


def check_rss(mm: Mm, pages: int) -> None:
    """The process counts its `pages`."""
    assert pages == mm.rss, f"process {mm.number}: rss is {mm.rss}, mapped are {pages}"


def check_entries(memory: PhysicalMemory, mm: Mm, inside: Areas, pages: Words, entries: Words) -> None:
    """`entries` (of `pages`, none of them empty) lie in VMAs and agree with their rights, and with what their frames say."""
    at = np.maximum(inside.starts.searchsorted(pages, "right"), 1) - 1
    outside = (pages < inside.starts[at]) | (pages >= inside.ends[at])
    assert not np.count_nonzero(outside), f"process {mm.number}: page 0x{int(pages[outside].min()):x} is mapped outside every VMA"
    forbidden = (entries & WRITE != 0) & ~inside.writable[at]
    assert not np.count_nonzero(forbidden), (
        f"process {mm.number}: a writable entry in a read-only VMA at 0x{_first(inside, at, forbidden):x}"
    )
    rows = mapped(entries).nonzero()[0]
    if len(rows):
        _check_mapped(memory, mm, inside, at[rows], pages[rows], entries[rows])
    moving = (entries & KIND == pte.MIGRATION).nonzero()[0]
    if len(moving):
        flags, mapcount = memory.fields(known(memory, mm, pte.frames_of(entries[moving])), "flags", "mapcount")
        assert (flags & LOCKED != 0).all(), f"process {mm.number}: a migration entry whose frame is not locked"
        assert not mapcount.any(), f"process {mm.number}: a frame under migration counts as mapped"


def _first(inside: Areas, at: npt.NDArray[np.intp], wrong: npt.NDArray[np.bool_]) -> int:
    """Where the first VMA begins that something is wrong in."""
    return int(inside.starts[at[wrong]].min())


def known(memory: PhysicalMemory, mm: Mm, frames: Words) -> Words:
    """`frames`, all of which there is memory for."""
    for number in set((frames >> word_of(ZONE_SHIFT)).tolist()):
        assert number in memory.zones, f"process {mm.number}: an entry leads to a frame of zone {number}, which there is not"
    return frames


def _check_mapped(memory: PhysicalMemory, mm: Mm, inside: Areas, at: npt.NDArray[np.intp], pages: Words, entries: Words) -> None:
    """The frames of `entries`, which map them in the VMAs `at`, know it; and what is one process's own has one mapping (I2)."""
    frames = known(memory, mm, pte.frames_of(entries))
    index, mapping, flags, mapcount = memory.fields(frames, "index", "mapping", "flags", "mapcount")
    strange = index != pages - inside.steps[at]
    assert not np.count_nonzero(strange), (
        f"process {mm.number}: a frame's index does not lead to its page in the VMA at 0x{_first(inside, at, strange):x}"
    )
    foreign = (mapping != inside.anon[at]) & (mapping != inside.files[at])
    for row in foreign.nonzero()[0].tolist():  # of an ancestor, which there are few of
        foreign[row] = int(mapping[row]) not in inside.vmas[at[row]].chain
    assert not np.count_nonzero(foreign), (
        f"process {mm.number}: a frame of an anon_vma or a file that the VMA at 0x{_first(inside, at, foreign):x} does not have"
    )
    anonymous = flags & ANON != 0
    assert not np.count_nonzero((entries & EXCLUSIVE != 0) & ~anonymous), f"process {mm.number}: a page of a file that is one process's own"
    shared = anonymous & (entries & OWN != 0) & (mapcount != 1)
    assert not np.count_nonzero(shared), f"process {mm.number}: a page that several map is writable or exclusive (I2)"


def entry_agrees(memory: PhysicalMemory, mm: Mm, page: int, entry: int) -> bool:
    """Whether one entry that is not empty keeps the rules of `check_entries`, where no folio is folded: a tenth of what arrays cost."""
    vma = mm.vmas.find(page)
    if vma is None or (entry & pte.WRITE and not vma.flags & VM_WRITE):
        return False
    kind = entry & pte.KIND
    moving = kind == pte.MIGRATION
    if not moving and (entry & pte.SPECIAL or kind not in MAPPING):
        return True
    frame = entry >> pte.FRAME_SHIFT
    zone = memory.zones.get(frame >> ZONE_SHIFT)
    if zone is None:
        return False
    cells, at = zone.cells, frame - zone.base
    flags, mapcount = cells.flags[at], cells.mapcount[at]
    if moving:
        return bool(flags & LOCKED) and not mapcount
    if cells.index[at] != page - vma.start + vma.pgoff:
        return False
    mapping = cells.mapping[at]
    if mapping != vma.anon and mapping != vma_file(vma) and mapping not in vma.chain:
        return False
    return mapcount == 1 or not entry & (pte.WRITE | pte.ANON_EXCLUSIVE) if flags & ANON else not entry & pte.ANON_EXCLUSIVE


def frame_agrees(zone: Zone, at: int, expected: int) -> bool:
    """Whether one frame, `expected` to be mapped so often, keeps the rules of `check_frames`, where no folio is folded."""
    cells = zone.cells
    refcount, mapcount = cells.refcount[at], cells.mapcount[at]
    return mapcount == expected and refcount >= mapcount and refcount >= 0 and (refcount != 0 or not cells.mapping[at])


def vma_file(vma: Vma) -> int:
    """The number of the file that `vma` maps; of anonymous memory its anon_vma."""
    return vma.anon if vma.file is None else vma.file.number


def _expected(zone: Zone, frames: Words, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """How often each frame of `zone` that was ever used is mapped, when `frames` are, so often."""
    used = zone.used.stop
    unused = frames[frames >= np.uint64(zone.base + used)]
    assert len(unused) == 0, f"{zone.owner}: frame {unused[0] - word_of(zone.base)} is mapped, and was never allocated"
    expected = np.zeros(used, np.int32)
    expected[(frames - word_of(zone.base)).astype(np.intp)] = counts
    return expected


def check_frames(zone: Zone, where: Index, expected: npt.NDArray[np.int32], *, quiet: bool) -> None:
    """The frames at `where`, `expected` to be mapped so often, count their mappings; what has no reference is free (I3, I8)."""
    refcount, mapcount, flags, mapping = [zone.seen(name, where) for name in ("refcount", "mapcount", "flags", "mapping")]
    wrong = (mapcount != expected).nonzero()[0]
    assert not len(wrong), (
        f"{zone.owner}: frame {_at(where, wrong)} says it is mapped {mapcount[wrong[0]]} times, but is {expected[wrong[0]]}"
    )
    idle, below = zone.idle_references, (refcount < 0).nonzero()[0]
    assert len(below) == 0, f"{zone.owner}: frame {_at(where, below)} has fewer references than the {idle} of an idle one (I8)"
    below = (refcount < mapcount).nonzero()[0]
    assert len(below) == 0, f"{zone.owner}: frame {_at(where, below)} has fewer references than mappings"
    free = refcount == 0
    assert not np.count_nonzero(mapping[free]), f"{zone.owner}: a free frame still belongs to somebody"
    if quiet:
        assert not (flags & LOCKED).any(), f"{zone.owner}: frame {_at(where, (flags & LOCKED).nonzero()[0])} is still locked"
        assert not flags[free].any(), f"{zone.owner}: a free frame still has flags"


def _at(where: Index, rows: npt.NDArray[np.intp]) -> int:
    """The first of the frames that `rows` of `where` are."""
    return int(rows[0]) + where.start if isinstance(where, slice) else int(where[rows[0]])


def check_free(zone: Zone) -> None:
    """What a memory of the host has given out is what has references, or waits to be free until no device reaches it (I3)."""
    if isinstance(zone, HostZone):
        held, used = int(np.count_nonzero(zone.seen("refcount", zone.used))), zone.allocator.used_count - zone.waiting
        assert held == used, f"{zone.owner}: {held} frames have references, {used} are allocated (I3)"
