"""Huge pages of files: shared memory of the huge page pool (mm/hugetlb.c), and shmem that was collapsed (mm/khugepaged.c, collapse_file).

A file knows which aligned blocks of 512 page offsets are one large folio (`File.blocks`); in a file of the pool every block that is there
is. The page cache has their frames one by one, as it has all others (marked `COMPOUND`, and not folded: whoever pins one page holds one),
so what reads, writes, punches or swaps need not know. Only mapping does: a *shared* mapping that holds such a block whole, at an aligned
address, maps it as one (do_set_pmd), in whichever process touches it first.

Splitting is dropping: a huge entry of a file that has to go in part goes whole, and is faulted in again (__split_huge_pmd_locked, where it
is not anonymous), huge if it still can be. The folio itself is split where a part of it leaves the file, or wants to migrate.

Private mappings map pages of such a folio one by one; Linux would map them as one for reading, and drop that at the first store.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hmmnet.errors import KernelError
from hmmnet.pages import HUGE_PAGES, HUGE_SHIFT, Words, word_of

from . import pte
from .filemap import File
from .frames import PhysicalMemory
from .mm import Mm
from .vma import VM_HUGETLB, VM_SHARED, VM_WRITE, Vma

EAGAIN = 11
EINVAL = 22
ENOMEM = 12
_BLOCK = word_of(HUGE_PAGES - 1)


def offsets_of(block: int) -> Words:
    """The page offsets of a block of a file."""
    return np.arange(block << HUGE_SHIFT, block + 1 << HUGE_SHIFT, dtype=np.uint64)


def block_in(vma: Vma, page: int) -> int | None:
    """Which block of its file the aligned block at `page` of `vma` is; None where it is none, or not whole (thp_vma_suitable_order)."""
    offset = page - vma.start + vma.pgoff
    if offset % HUGE_PAGES or page < vma.start or page + HUGE_PAGES > vma.end:
        return None
    return offset >> HUGE_SHIFT


def populate(mm: Mm, vma: Vma, pages: Words, *, write: bool, node: int) -> npt.NDArray[np.bool_]:
    """Map the blocks of `pages` (empty) as one that can be; which of `pages` are there now.

    Raises KernelError(ENOMEM) when a page of the pool is wanted and there is none.
    """
    file = vma.file
    assert file is not None, "a VMA with a file"
    done = np.zeros(len(pages), np.bool_)
    if not vma.flags & VM_SHARED or not (file.blocks or vma.flags & VM_HUGETLB):
        return done
    for page in np.unique(pages & ~_BLOCK).tolist():
        block = block_in(vma, page)
        if vma.flags & VM_HUGETLB:
            assert block is not None, "mappings of the pool are aligned"
            _fill(file, block, node, f"page 0x{page:x} of process {mm.number}")
        if block in file.blocks and len(mm.table.untouched(page, page + HUGE_PAGES)):
            _map(mm, vma, page, int(file.cached(offsets_of(block))[0]), write=write)
            done |= pages & ~_BLOCK == page
    return done


def _fill(file: File, block: int, node: int, wanted: str) -> None:
    """hugetlb_no_page: a block of a file of the pool is there, which is `wanted`. Raises KernelError(ENOMEM)."""
    if block in file.blocks:
        return
    frames = file.memory.allocate_huge(node)
    if frames is None:
        raise KernelError(ENOMEM, "page fault", f"a huge page is wanted for {wanted}, shared, and the host has no 2 MiB in one piece")
    file.adopt(block, frames)


def _map(mm: Mm, vma: Vma, page: int, head: int, *, write: bool) -> None:
    """do_set_pmd."""
    bits = pte.YOUNG | pte.HUGE | (pte.WRITE if vma.flags & VM_WRITE else 0) | (pte.DIRTY | pte.SOFT_DIRTY if write else 0)
    mm.table.set_pmd(page, pte.entry(pte.PRESENT, head, bits))
    mm.rss += HUGE_PAGES
    for zone, _, at in mm.memory.groups(np.arange(head, head + HUGE_PAGES, dtype=np.uint64)):
        zone.refcount[at] += 1
        zone.mapcount[at] += 1


def is_of_file(memory: PhysicalMemory, heads: Words) -> npt.NDArray[np.bool_]:
    """Which of the folios with these heads are of a page cache, and of one that can be split."""
    numbers = memory.field(heads, "mapping").tolist()
    return np.array([number in memory.files and not memory.files[number].pool for number in numbers], np.bool_)
