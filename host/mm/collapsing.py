"""madvise(MADV_COLLAPSE) (mm/khugepaged.c): huge pages for who asks, now, of memory that is mapped page by page.

What is away is had back first: pages in swap, on a device, behind a migration or exclusive entry (do_swap_page). Those are single pages
(GFP_HIGHUSER_MOVABLE), for which somebody may be killed; the huge page is not worth a life (GFP_TRANSHUGE), and is allocated before them.
Here the call lets go of it and of its lock meanwhile (`relief.py`), and goes through the range anew: what is huge by then is done.
"""

from __future__ import annotations

import errno
from contextlib import AsyncExitStack

import numpy as np

from hmmnet.errors import KernelError, OutOfMemory
from hmmnet.host.interfaces import Event
from hmmnet.pages import HUGE_PAGES, HUGE_SHIFT, PAGE_SHIFT

from . import collapse, filehuge, huge
from .collapse import ERRNO, GOES_ON, Scan
from .filemap import File, ranges_of
from .syscalls import SystemCalls
from .truncate import told_everywhere
from .vma import VM_HUGETLB, VM_NOHUGEPAGE, VM_SPECIAL, Vma

COLLAPSE = "COLLAPSE"


class Collapsing(SystemCalls):
    """madvise(MADV_COLLAPSE)."""

    async def collapse(self, start: int, end: int) -> None:
        """madvise_collapse for each mapping in [start, end): huge pages for every aligned block that lies in both whole.

        A range inside one block, that reaches neither edge of it, is EINVAL there, and one that reaches one has nothing to do: the number
        of blocks is the difference of its rounded ends, without a sign. As today a block of which nothing is mapped does not end the call
        (SCAN_NO_PTE_TABLE; in 6.12, with others mapped in the same GiB, it does). Raises KernelError as `collapse.ERRNO`.
        """

        async def locked() -> None:
            async with self.mmap_lock.write():
                for vma in self.mm.vmas.overlapping(start, end):
                    await self._collapse(vma, max(start, vma.start), min(end, vma.end))

        try:
            await self.relieving(locked)
        except OutOfMemory as error:  # do_swap_page says VM_FAULT_OOM: SCAN_FAIL
            raise KernelError(
                errno.EINVAL, "madvise", f"{COLLAPSE} of process {self.number} cannot have pages back: {error.why}"
            ) from error

    async def _collapse(self, vma: Vma, low: int, high: int) -> None:
        if vma.flags & (VM_NOHUGEPAGE | VM_HUGETLB | VM_SPECIAL):
            raise self.refused(vma, COLLAPSE)
        if huge.block_of(vma.end) - HUGE_PAGES < vma.start:  # thp_vma_suitable_order
            raise self.refused(vma, COLLAPSE)
        first, last = -(-low // HUGE_PAGES) * HUGE_PAGES, huge.block_of(high)
        code, at, why = errno.EINVAL if last < first else 0, low, "no block of 2 MiB lies in it whole"
        for block in range(first, last, HUGE_PAGES):
            found = await (self._collapse_block(vma, block) if vma.file is None else self._collapse_file(vma, vma.file, block))
            if found is not Scan.SUCCEED:
                code, at, why = ERRNO.get(found, errno.EINVAL), block, found.name.lower().replace("_", " ")
            if found not in GOES_ON:
                break
        if code:
            where = f"the block of pages at 0x{at:x} of process {self.number}, in the mapping at 0x{vma.start << PAGE_SHIFT:x},"
            raise KernelError(code, "madvise", f"{where} cannot be made a huge page: {why}")

    async def _collapse_block(self, vma: Vma, block: int) -> Scan:
        """hpage_collapse_scan_pmd, and collapse_huge_page. Raises OutOfMemory for pages that are away."""
        if collapse.is_mapped_whole(self.mm, block):
            return Scan.SUCCEED
        found = collapse.scan(self.mm, vma, block, away=True)
        if found is not Scan.SUCCEED:
            return found
        head = collapse.allocate(self.mm)
        if isinstance(head, Scan):
            return head
        spare = np.array([head], np.uint64)
        try:
            found = await self._have_back(block)
            if found is Scan.SUCCEED:
                async with self.hub.invalidate(Event.CLEAR, block, block + HUGE_PAGES):
                    found = collapse.collapse(self.mm, vma, block, head)
                    if found is Scan.SUCCEED:  # it is mapped, also for who is cancelled at the end of the announcement
                        spare = spare[:0]
        finally:
            self.memory.put_folios(spare)
        return found

    async def _have_back(self, block: int) -> Scan:
        """__collapse_huge_page_swapin, with a huge page in hand: whatever rights the mapping has. Raises OutOfMemory."""
        away = collapse.away_in(self.mm, block)
        try:
            if len(away):
                await self._fault_pages(away, write=False, rights=0)
        except OutOfMemory as error:
            raise collapse.with_huge(error) from error
        except KernelError:
            return Scan.FAIL
        return Scan.SUCCEED

    async def _collapse_file(self, vma: Vma, file: File, page: int) -> Scan:
        """hpage_collapse_scan_file: one large folio for a block of a file, which everybody maps anew."""
        block = filehuge.block_in(vma, page)
        if block is None:
            raise self.refused(vma, COLLAPSE)
        if block in file.blocks:
            return Scan.SUCCEED
        found = collapse.scan_file(file, block)
        if found is not Scan.SUCCEED:
            return found
        first = block << HUGE_SHIFT
        async with AsyncExitStack() as stack:
            await told_everywhere(stack, file, first, first + HUGE_PAGES)
            for space in file.mappers.values():
                for _, low, high in ranges_of(space.mm, file, first, first + HUGE_PAGES):
                    huge.drop_file_pages(space.mm, low, high)
            return collapse.collapse_file(file, block, self.mm)

    def refused(self, vma: Vma, advice: str) -> KernelError:
        """What advice fails with that is not for such a mapping."""
        where = f"0x{vma.start << PAGE_SHIFT:x} of process {self.number}"
        return KernelError(errno.EINVAL, "madvise", f"{advice} is not for the mapping at {where}")
