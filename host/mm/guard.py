"""Guard regions: pages that nobody may touch, without a mapping of their own (MADV_GUARD_INSTALL and MADV_GUARD_REMOVE, Linux 6.13).

A guard is a marker in the page table, in the place of what was mapped there. A CPU's access is SIGSEGV, a device's EFAULT; to a snapshot
there is nothing. Guards stay through mprotect, mremap, fork and madvise(MADV_DONTNEED), and while a file is cut; munmap takes them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hmmnet.pages import Words, word_of

from . import pte
from .huge import blocks_of
from .mm import Mm
from .vma import VM_HUGETLB, VM_LOCKED, VM_MAYBE_GUARD, VM_SPECIAL, Vma

GUARD = pte.entry(pte.MARKER, pte.MARKER_GUARD)
_WHAT_BITS = pte.KIND | ~pte.BITS & (1 << 64) - 1
_WHAT = word_of(_WHAT_BITS)


def is_guard(entry: int) -> bool:
    """Whether it is a guard's."""
    return entry & _WHAT_BITS == GUARD


def guarded(entries: Words) -> npt.NDArray[np.bool_]:
    """Which of `entries` are guards."""
    found: npt.NDArray[np.bool_] = entries & _WHAT == GUARD
    return found


def may_have(vma: Vma, *, removed: bool) -> bool:
    """is_valid_guard_vma: whether guards can be put into `vma`; from locked memory they can be `removed`."""
    return not vma.flags & (VM_SPECIAL | VM_HUGETLB | (0 if removed else VM_LOCKED))


def install(mm: Mm, vma: Vma, start: int, end: int) -> None:
    """Guards at all of [start, end), in `vma`, where nothing is mapped any more. They lie in page tables, which stay when they go."""
    vma.flags |= VM_MAYBE_GUARD
    if not vma.anon and vma.file is None:
        mm.anon_prepare(vma)
    pages = np.arange(start, end, dtype=np.uint64)
    mm.table.scatter(pages, GUARD)
    mm.small_blocks.update(blocks_of(pages))


def remove(mm: Mm, start: int, end: int) -> None:
    """What is guarded of [start, end) is empty again."""
    for _, part in mm.table.ptes.present(start, end):
        part[guarded(part)] = 0
