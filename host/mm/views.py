"""What /proc shows of a process's memory, and what it can be told to forget: pagemap, smaps, clear_refs (fs/proc/task_mmu.c).

A page of a device is a swap entry to pagemap (not present, PM_SWAP), and yet resident to smaps, which looks through it at the page: Rss and
Anonymous do not change when a page migrates, and Swap stays what it was. A page that is really in swap counts there and nowhere else.

Soft-dirty tells which pages were written since it was last cleared. Clearing takes the right to write from present pages, so that the next
store faults and says so; what is mapped anew is dirty as a whole (VM_SOFTDIRTY) until it is cleared for the first time. A device's own
stores to its memory fault nowhere, and so do not show.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hmmnet.pages import HUGE_PAGES, PAGE_SHIFT, PAGE_SIZE, Words, word_of
from hmmnet.program import (
    PM_FILE,
    PM_GUARD_REGION,
    PM_MMAP_EXCLUSIVE,
    PM_PFRAME_MASK,
    PM_PRESENT,
    PM_SOFT_DIRTY,
    PM_SWAP,
    PM_UFFD_WP,
    Mapping,
)

from . import pte
from .vma import VM_LOCKED, VM_READ, VM_SHARED, VM_SOFTDIRTY, VM_WRITE
from .zones import ANON

if TYPE_CHECKING:
    from .mm import Mm
    from .vma import Vma

VM_EXEC_LETTERS = ((VM_READ, "r"), (VM_WRITE, "w"), (4, "x"))


def pagemap(mm: Mm, start: int, end: int) -> Words:
    """/proc/PID/pagemap for pages [start, end): one PM_* word each. A frame number is that of `hmmnet.pages`, a swap slot its number."""
    entries = mm.table.read(start, end)
    kinds = entries & pte.KIND
    out = np.zeros(len(entries), np.uint64)
    present = pte.is_present(entries)
    special = ~present & (kinds != pte.NONE) & (kinds != pte.MARKER)
    out[present] |= word_of(PM_PRESENT)
    out[special] |= word_of(PM_SWAP)
    numbered = present | special
    out[numbered] |= pte.frames_of(entries[numbered]) & word_of(PM_PFRAME_MASK)
    out[entries & pte.SOFT_DIRTY != 0] |= word_of(PM_SOFT_DIRTY)
    markers = kinds == pte.MARKER
    out[(entries & pte.UFFD_WP != 0) | (markers & (pte.frames_of(entries) == pte.MARKER_UFFD_WP))] |= word_of(PM_UFFD_WP)
    out[markers & (pte.frames_of(entries) == pte.MARKER_GUARD)] |= word_of(PM_GUARD_REGION)
    out[markers & (pte.frames_of(entries) != pte.MARKER_GUARD)] |= word_of(PM_SWAP)
    pages = np.flatnonzero(numbered & (kinds != pte.SWAP) & (entries & pte.SPECIAL == 0))
    if len(pages):
        frames = pte.frames_of(entries[pages])
        out[pages[mm.memory.field(frames, "flags") & ANON == 0]] |= word_of(PM_FILE)
        once = present[pages] & (mm.memory.field(frames, "mapcount") == 1)
        out[pages[once]] |= word_of(PM_MMAP_EXCLUSIVE)
    for vma in mm.vmas.overlapping(start, end):
        if vma.flags & VM_SOFTDIRTY:
            out[max(vma.start - start, 0) : vma.end - start] |= word_of(PM_SOFT_DIRTY)
    return out


def smaps(mm: Mm) -> list[Mapping]:
    """/proc/PID/smaps: every VMA with what of it is where, in bytes."""
    return [_mapping(mm, vma) for vma in mm.vmas.all()]


def _mapping(mm: Mm, vma: Vma) -> Mapping:
    resident = anonymous = referenced = swapped = huge = 0
    blocks = mm.table.pmds.gather(mm.table.blocks(vma.start, vma.end))
    small = mm.table.ptes.gather(mm.table.ptes.occupied(vma.start, vma.end))
    for entries, pages in ((small, 1), (blocks, HUGE_PAGES)):
        kinds = entries & pte.KIND
        swapped += int(np.count_nonzero(kinds == pte.SWAP))
        there = entries[(kinds != pte.NONE) & (kinds != pte.SWAP) & (kinds != pte.MARKER) & (entries & pte.SPECIAL == 0)]
        resident += len(there) * pages
        referenced += int(np.count_nonzero(there & (pte.KIND | pte.YOUNG) == pte.PRESENT | pte.YOUNG)) * pages
        anonymous += int(np.count_nonzero(mm.memory.field(pte.frames_of(there), "flags") & ANON)) * pages if len(there) else 0
        large = there[there & pte.HUGE != 0]
        huge += int(np.count_nonzero(mm.memory.field(pte.frames_of(large), "flags") & ANON)) * pages if len(large) else 0
    rights = "".join(letter if vma.flags & bit else "-" for bit, letter in VM_EXEC_LETTERS)
    return Mapping(
        vma.start << PAGE_SHIFT,
        vma.end << PAGE_SHIFT,
        rights + ("s" if vma.flags & VM_SHARED else "p"),
        rss=resident * PAGE_SIZE,
        anonymous=anonymous * PAGE_SIZE,
        referenced=referenced * PAGE_SIZE,
        swap=swapped * PAGE_SIZE,
        anon_huge_pages=huge * PAGE_SIZE,
        locked=resident * PAGE_SIZE if vma.flags & VM_LOCKED else 0,
    )


def clear_soft_dirty(mm: Mm, start: int, end: int) -> None:
    """clear_soft_dirty: pages of [start, end) count as not written since now. Mirrors were told (SOFT_DIRTY).

    Small pages that somebody has pinned are left: he may be writing (pte_is_pinned).
    """
    for first, part, size in mm.table.parts(start, end):
        kinds = part & pte.KIND
        present = pte.is_present(part) & (part & pte.SPECIAL == 0)
        clear = (kinds != pte.NONE) & (kinds != pte.MARKER)
        if size == 1 and mm.memory.most(frames := pte.frames_of(part[present]), "pincount"):
            pinned = np.flatnonzero(present)[mm.memory.field(frames, "pincount") > 0]
            pinned = pinned[part[pinned] & pte.HUGE == 0]  # one entry in the kernel, which asks nobody there
            for vma in mm.vmas.overlapping(first, first + len(part)):
                if vma.flags & VM_SHARED:
                    pinned = pinned[(pinned < vma.start - first) | (pinned >= vma.end - first)]
            present[pinned] = clear[pinned] = False
        part[present] &= ~word_of(pte.SOFT_DIRTY | pte.WRITE)
        part[clear] &= ~word_of(pte.SOFT_DIRTY)
