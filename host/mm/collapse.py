"""What MADV_COLLAPSE does to a block at once (mm/khugepaged.c): whether it can be one huge page, and becoming it. `collapsing.py` waits.

The kernel scans a block (hpage_collapse_scan_pmd, hpage_collapse_scan_file), allocates the huge page, reads back what is away, tells
mirrors, scans anew (__collapse_huge_page_isolate), and copies. What it finds first, entry by entry, is the result; some results end the
call at that block, the others let it try the next, and what madvise fails with is in a table (madvise_collapse_errno).
"""

from __future__ import annotations

import errno
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from hmmnet.errors import KernelError, OutOfMemory
from hmmnet.pages import HUGE_PAGES, HUGE_SHIFT, Words, word_of

from . import pte
from .filehuge import offsets_of
from .filemap import File, ranges_of
from .huge import map_made
from .mm import Mm
from .swap import slots_of
from .vma import VM_UFFD_MISSING, VM_WRITE, Vma


class Scan(Enum):
    """enum scan_result, as far as there is a difference."""

    SUCCEED = auto()
    PMD_NULL = auto()
    """Nothing is mapped there, or a huge page that is not there for the CPU."""
    PTE_NON_PRESENT = auto()
    PTE_UFFD_WP = auto()
    PAGE_NULL = auto()
    """Memory of a device."""
    PAGE_COUNT = auto()
    """Somebody holds a page."""
    EXCEED_NONE_PTE = auto()
    """A userfaultfd wants to hear of pages that are missing."""
    TRUNCATED = auto()
    ALLOC_HUGE_PAGE_FAIL = auto()
    CGROUP_CHARGE_FAIL = auto()
    FAIL = auto()
    """What is away cannot be had back."""


ERRNO = {
    Scan.SUCCEED: 0,
    Scan.PAGE_COUNT: errno.EAGAIN,
    Scan.EXCEED_NONE_PTE: errno.EBUSY,
    Scan.CGROUP_CHARGE_FAIL: errno.EBUSY,
    Scan.ALLOC_HUGE_PAGE_FAIL: errno.ENOMEM,
}
"""madvise_collapse_errno; what does not stand here is EINVAL: to try again would not help."""
GOES_ON = frozenset({Scan.SUCCEED, Scan.PMD_NULL, Scan.PTE_NON_PRESENT, Scan.PTE_UFFD_WP, Scan.PAGE_NULL, Scan.PAGE_COUNT})
"""After which madvise_collapse tries the next block."""
_STOPS = (Scan.SUCCEED, Scan.PTE_NON_PRESENT, Scan.PTE_UFFD_WP, Scan.EXCEED_NONE_PTE, Scan.PAGE_NULL, Scan.PAGE_COUNT)


def is_mapped_whole(mm: Mm, block: int) -> bool:
    """SCAN_PMD_MAPPED: there is nothing to do; a huge page under migration will be there again."""
    return mm.table.get(block) & (pte.HUGE | pte.KIND) in (pte.HUGE | pte.PRESENT, pte.HUGE | pte.MIGRATION)


def scan(mm: Mm, vma: Vma, block: int, *, away: bool) -> Scan:
    """Whether the pages of `block` can become one huge page; `away`: even if some are in swap, on a device, or otherwise not there."""
    entries = mm.table.read(block, block + HUGE_PAGES)
    if not entries.any() or entries[0] & pte.HUGE:
        return Scan.PMD_NULL
    none = (entries == 0) | (entries & pte.SPECIAL != 0)
    there = pte.is_present(entries) & ~none
    stops = np.zeros(HUGE_PAGES, np.uint8)
    if not away:
        stops[~there & ~none] = _STOPS.index(Scan.PTE_NON_PRESENT)
    if vma.flags & VM_UFFD_MISSING:
        stops[none] = _STOPS.index(Scan.EXCEED_NONE_PTE)
    frames = pte.frames_of(entries[there])
    held = mm.memory.field(frames, "refcount") > mm.memory.field(frames, "mapcount") + _cached(mm, frames)
    stops[np.flatnonzero(there)[held]] = _STOPS.index(Scan.PAGE_COUNT)
    stops[there & (entries >= pte.DEVICE_MIN)] = _STOPS.index(Scan.PAGE_NULL)
    stops[(entries & pte.UFFD_WP != 0) & ~none] = _STOPS.index(Scan.PTE_UFFD_WP)
    return _STOPS[stops[int(np.argmax(stops != 0))]]


def _cached(mm: Mm, frames: Words) -> npt.NDArray[np.int32]:
    """References that the swap cache has of `frames` (folio_expected_ref_count)."""
    own = frames < pte.DEVICE_MIN >> pte.FRAME_SHIFT
    cached = np.zeros(len(frames), np.int32)
    cached[own] = slots_of(mm.memory, frames[own]) != 0
    return cached


def away_in(mm: Mm, block: int) -> Words:
    """The pages of `block` that have to be faulted in (__collapse_huge_page_swapin): everything that is neither present nor empty."""
    pages = mm.table.occupied(block, block + HUGE_PAGES)
    return pages[~pte.is_present(mm.table.gather(pages))]


def allocate(mm: Mm) -> int | Scan:
    """alloc_charge_folio: the head of a huge page, charged to `mm`'s group, or why there is none."""
    head = mm.memory.allocate_folio(mm.node, mm.cgroup)
    if head is not None:
        return head
    if mm.cgroup is not None and mm.cgroup.shortage(HUGE_PAGES):
        spare = mm.memory.allocate_folio(mm.node)
        if spare is not None:
            mm.memory.put_folios(np.array([spare], np.uint64))
            return Scan.CGROUP_CHARGE_FAIL
    return Scan.ALLOC_HUGE_PAGE_FAIL


def collapse(mm: Mm, vma: Vma, block: int, head: int) -> Scan:
    """collapse_huge_page: the pages of `block` become the huge page `head`, unless they cannot any more. Mirrors were told."""
    found = scan(mm, vma, block, away=False)
    if found is not Scan.SUCCEED:
        return found
    entries = mm.table.read(block, block + HUGE_PAGES)
    there = pte.is_present(entries) & (entries & pte.SPECIAL == 0)
    old = pte.frames_of(entries[there])
    mm.table.clear(block, block + HUGE_PAGES)
    map_made(mm, vma, block, head, write=True)
    mm.memory.copy(old, pte.frames_of(mm.table.read(block, block + HUGE_PAGES))[there])
    mm.memory.unmap(old)
    mm.rss -= len(old)
    if not vma.flags & VM_WRITE:
        for _, part, _ in mm.table.parts(block, block + HUGE_PAGES):
            part &= ~word_of(pte.WRITE)
    mm.small_blocks.discard(block)
    return found


# --- files ------------------------------------------------------------------------------------------------------------------------


def scan_file(file: File, block: int) -> Scan:
    """Whether a block of a file can become one large folio."""
    if (block + 1 << HUGE_SHIFT) > file.pages or bool(file.holes(offsets_of(block)).all()):
        return Scan.TRUNCATED
    frames = file.cached(offsets_of(block))
    frames = frames[frames != 0]
    held = file.memory.field(frames, "refcount") > file.memory.field(frames, "mapcount") + 1
    return Scan.PAGE_COUNT if bool(held.any()) else Scan.SUCCEED


def collapse_file(file: File, block: int, mm: Mm) -> Scan:
    """collapse_file: the pages of a block, which nobody maps any more, become one large folio, charged to `mm`'s group.

    Holes become zeros, unless a userfaultfd waits for them; what is in swap is read back. Raises OutOfMemory where there is too little.
    """
    found = scan_file(file, block)
    if found is not Scan.SUCCEED:
        return found
    head = allocate(mm)
    if isinstance(head, Scan):
        return head
    frames = np.arange(head, head + HUGE_PAGES, dtype=np.uint64)
    offsets = offsets_of(block)
    there = ~file.holes(offsets)
    try:
        old = file.filled(offsets[there], mm.node, mm.cgroup)
    except KernelError as error:
        mm.memory.put_folios(frames[:1])
        if isinstance(error, OutOfMemory):
            raise with_huge(error) from error
        return Scan.FAIL
    if not there.all() and _somebody_waits(file, block):
        mm.memory.put_folios(frames[:1])
        return Scan.EXCEED_NONE_PTE
    mm.memory.unfold(head)
    file.memory.copy(old, frames[there])
    file.drop(block << HUGE_SHIFT, block + 1 << HUGE_SHIFT)
    file.adopt(block, frames)
    return found


def _somebody_waits(file: File, block: int) -> bool:
    """Whether a userfaultfd of anybody who maps that block of `file` wants to hear of missing pages: holes may not be filled then."""
    first, end = block << HUGE_SHIFT, block + 1 << HUGE_SHIFT
    maps = (vma for space in file.mappers.values() for vma, _, _ in ranges_of(space.mm, file, first, end))
    return any(vma.flags & VM_UFFD_MISSING for vma in maps)


def with_huge(error: OutOfMemory) -> OutOfMemory:
    """What to ask for when `error` came while a huge page was held, which has been let go of: both."""
    return OutOfMemory(error.code, "madvise", f"a huge page and what it is made of: {error.why}", error.pages + HUGE_PAGES)
