"""Who is killed when memory is used up (mm/oom_kill.c): the process whose end gives most of it back, as its owner has weighed it.

A process counts what it holds of memory that the kernel can get back: resident pages, wherever they live (those on devices count as the
kernel counts them, MM_ANONPAGES), pages in swap, and the page tables for both. `Mm.oom_score_adj` shifts that by thousandths of all there
is; at -1000 a process is never chosen. Whoever is being killed already is passed over: its memory is on its way.

Nothing here kills: the host does (`OomKiller`). Who finds no frame in any host memory (`OutOfMemory`) has somebody killed, and asks anew
(`relief.py`); it is ENOMEM only for who is killed himself, or where nobody may be. Who does so is what the kernel's gfp flags say:

- GFP_HIGHUSER_MOVABLE of single pages, which may kill: loads and stores, pages that they bring home, hmm_range_fault, get_user_pages and
  pins, populate (mmap, mlock, mremap, MADV_POPULATE_*), make_device_exclusive; fork's copies of pinned pages (copy_present_page), and
  mprotect's of locked ones (populate_vma_page_range; that it cannot is nobody's error); UFFDIO_COPY; explicit migrations to system memory
  (dmirror_devmem_fault_alloc_and_copy, and what other drivers do).
- the page cache's GFP_HIGHUSER: writes to files, and pages of theirs that are read back from swap (shmem_get_folio).
- GFP_KERNEL: what a driver makes and inserts when its file is mapped (dmirror_fops_mmap). More than all memory of the host is refused at
  once here; the kernel would find that out when everybody is dead.
- __GFP_NOFAIL: evictions by frame (dmirror_device_evict_chunk), where a driver closes or a device goes. The kernel would try for ever, and
  panics when nobody is left; here that is ENOMEM.
- huge pages (GFP_TRANSHUGE, hugetlb's) never kill: they are beyond PAGE_ALLOC_COSTLY_ORDER. A fault takes small ones instead, a hugetlb
  mapping and MADV_COLLAPSE are ENOMEM. What COLLAPSE reads back, from swap, a device or the page cache, once it has its huge page, is
  single pages, and may kill; that it cannot be had is EINVAL there (SCAN_FAIL). MADV_REMOVE takes whole pages, and wants no memory.

What hits the limit of a memory cgroup, or is refused by a fault plan, is told ENOMEM, so that a program can say itself whether somebody has
to die for it (`Host.oom_kill`; in the kernel, who hits the limit has no say).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hmmnet.errors import KernelError
from hmmnet.pages import HUGE_SHIFT, PAGES_MAX, word_of

from . import pte
from .mm import Mm

EINVAL = 22
OOM_SCORE_ADJ_MIN = -1000
OOM_SCORE_ADJ_MAX = 1000
LEVEL_SHIFTS = (HUGE_SHIFT, 2 * HUGE_SHIFT, 3 * HUGE_SHIFT)
"""A page table, and a table of those, and one of those again, maps so many pages (as a power of two); the root is not counted."""


def set_score_adj(mm: Mm, value: int) -> None:
    """Write to /proc/PID/oom_score_adj. Raises KernelError(EINVAL) beyond -1000 to 1000."""
    if not OOM_SCORE_ADJ_MIN <= value <= OOM_SCORE_ADJ_MAX:
        raise KernelError(EINVAL, "write", f"oom_score_adj is {value}; it goes from {OOM_SCORE_ADJ_MIN} to {OOM_SCORE_ADJ_MAX}")
    mm.oom_score_adj = value


def swap_entries(mm: Mm) -> int:
    """MM_SWAPENTS: pages of the process that are in swap."""
    ptes = mm.table.ptes
    return int(np.count_nonzero(ptes.gather(ptes.occupied(0, PAGES_MAX), ascend=True) & pte.KIND == pte.SWAP))


def table_pages(mm: Mm) -> int:
    """mm_pgtables_bytes, in pages: tables on all levels below the root, and the one that is kept for each huge page, for its splitting."""
    small = mm.table.ptes.occupied(0, PAGES_MAX)
    huge = mm.table.pmds.occupied(0, PAGES_MAX >> HUGE_SHIFT) << word_of(HUGE_SHIFT)
    split = np.array(sorted(mm.small_blocks), np.uint64)
    pages = np.concatenate((small, huge, split))
    return sum(len(np.unique(pages >> np.uint64(shift))) for shift in LEVEL_SHIFTS)


def badness(mm: Mm, total_pages: int) -> int | None:
    """oom_badness: the points of a process where there are `total_pages` in all; None for one that is not to be killed."""
    if mm.oom_score_adj == OOM_SCORE_ADJ_MIN or mm.unstable:
        return None
    return mm.rss + swap_entries(mm) + table_pages(mm) + mm.oom_score_adj * total_pages // OOM_SCORE_ADJ_MAX


def score(mm: Mm, total_pages: int) -> int:
    """/proc/PID/oom_score (proc_oom_score): badness from 0 to 2000, 0 for a process that is not to be killed."""
    points = badness(mm, total_pages)
    return 0 if points is None else max(0, (1000 + points * 1000 // total_pages) * 2 // 3)


def select(mms: Iterable[Mm], total_pages: int) -> Mm | None:
    """select_bad_process: the one with most points, the youngest of several; None when there is none that may be killed."""
    chosen, most = None, 0
    for mm in mms:
        points = badness(mm, total_pages)
        if points is not None and (chosen is None or points >= most):
            chosen, most = mm, points
    return chosen
