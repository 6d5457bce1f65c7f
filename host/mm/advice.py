"""madvise(2): advice that drops, makes or marks memory (mm/madvise.c).

The kernel goes through the range VMA by VMA: holes are remembered and answered with ENOMEM at the end, everything mapped having been
advised; a VMA that cannot take the advice ends the call there. Advice about pages takes the mmap lock for reading, advice about VMAs for
writing.

COLLAPSE stands in `collapsing.py`. COLD only ages pages; PAGEOUT swaps out what is the process's alone (`swap.py`), pages of files, too.
Both leave device memory alone (h55).
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from hmmnet.errors import KernelError
from hmmnet.host.interfaces import Event
from hmmnet.pages import HUGE_PAGES, PAGE_SHIFT, Words, announced_runs

from . import fault, guard, huge, pte, swap
from .collapsing import COLLAPSE, Collapsing
from .filemap import file_offsets
from .huge import HUGE_MASK
from .syscalls import aligned, whole_pages
from .truncate import punch, told_everywhere
from .vma import (
    VM_DONTCOPY,
    VM_HUGEPAGE,
    VM_HUGETLB,
    VM_LOCKED,
    VM_MERGEABLE,
    VM_NOHUGEPAGE,
    VM_PFNMAP,
    VM_RAND_READ,
    VM_SEQ_READ,
    VM_SHARED,
    VM_SPECIAL,
    VM_WIPEONFORK,
    Vma,
)


@dataclass(frozen=True, slots=True)
class FlagAdvice:
    """Advice that only sets and clears VM_* bits; `private` wants anonymous private memory."""

    set: int = 0
    clear: int = 0
    private: bool = False


FLAG_ADVICE = {
    "NORMAL": FlagAdvice(clear=VM_RAND_READ | VM_SEQ_READ),
    "RANDOM": FlagAdvice(VM_RAND_READ, VM_SEQ_READ),
    "SEQUENTIAL": FlagAdvice(VM_SEQ_READ, VM_RAND_READ),
    "DONTFORK": FlagAdvice(VM_DONTCOPY),
    "DOFORK": FlagAdvice(clear=VM_DONTCOPY),
    "WIPEONFORK": FlagAdvice(VM_WIPEONFORK, private=True),
    "KEEPONFORK": FlagAdvice(clear=VM_WIPEONFORK),
    "HUGEPAGE": FlagAdvice(VM_HUGEPAGE, VM_NOHUGEPAGE),
    "NOHUGEPAGE": FlagAdvice(VM_NOHUGEPAGE, VM_HUGEPAGE),
    "MERGEABLE": FlagAdvice(VM_MERGEABLE),
    "UNMERGEABLE": FlagAdvice(clear=VM_MERGEABLE),
}
PAGE_ADVICE = frozenset({"DONTNEED", "DONTNEED_LOCKED", "FREE", "WILLNEED", "COLD", "PAGEOUT"})
GUARD_ADVICE = frozenset({"GUARD_INSTALL", "GUARD_REMOVE"})
REMOVE = "REMOVE"
POPULATE_ADVICE = {"POPULATE_READ": False, "POPULATE_WRITE": True}


ADVICE = (*FLAG_ADVICE, *sorted(PAGE_ADVICE), *sorted(GUARD_ADVICE), REMOVE, COLLAPSE, *POPULATE_ADVICE)


class Advice(Collapsing):
    """madvise(2)."""

    async def madvise(self, address: int, length: int, advice: str) -> None:
        """`advice` is the name without MADV_. Raises KernelError: EINVAL (unaligned, unknown, not for this memory), ENOMEM, EFAULT."""
        if advice not in ADVICE:
            raise KernelError(errno.EINVAL, "madvise", f"unknown advice {advice!r}; there are {', '.join(ADVICE)}")
        start = aligned("madvise", address)
        end = start + whole_pages("madvise", length)
        if advice in POPULATE_ADVICE:
            await self.populate(start, end, write=POPULATE_ADVICE[advice])
            return
        hole = self.mm.vmas.covered_until(start, end)
        if advice in FLAG_ADVICE:
            async with self.mmap_lock.write():
                await self._advise_flags(start, end, advice, FLAG_ADVICE[advice])
        elif advice == COLLAPSE:
            await self.collapse(start, end)
        elif advice == REMOVE:
            await self._remove(start, end)
        elif advice in GUARD_ADVICE:
            async with self.mmap_lock.read():
                await self._guard(start, end, removed=advice == "GUARD_REMOVE")
        else:
            async with self.mmap_lock.read():
                await self._advise_pages(start, end, advice)
            if self.memory.emptied:
                self.memory.bury_emptied()
        if hole < end:
            raise KernelError(errno.ENOMEM, "madvise", f"page 0x{hole:x} of process {self.number} is not mapped")

    async def _advise_flags(self, start: int, end: int, advice: str, change: FlagAdvice) -> None:
        def apply(piece: Vma) -> Vma:
            piece.flags = piece.flags & ~change.clear | change.set
            return piece

        for vma in self.mm.vmas.overlapping(start, end):
            if change.private and (not vma.is_anonymous or vma.flags & VM_SHARED):
                raise self.refused(vma, advice)
            await self.split_edges(max(start, vma.start), min(end, vma.end))
            self.mm.vmas.update(max(start, vma.start), min(end, vma.end), apply)

    async def _remove(self, start: int, end: int) -> None:
        """madvise_remove: a hole in the file behind each shared mapping, for everybody. The mmap lock is not held meanwhile, as there."""
        page = start
        while page < end:
            async with self.mmap_lock.read():
                vma = next(iter(self.mm.vmas.overlapping(page, end)), None)
                if vma is None:
                    return
                if vma.flags & VM_LOCKED or vma.file is None:
                    raise self.refused(vma, REMOVE)
                if vma.flags & VM_SPECIAL:
                    raise KernelError(errno.ENODEV, "madvise", f"{REMOVE} is for files; page 0x{page:x} maps a device")
                if not vma.flags & VM_SHARED:
                    raise KernelError(errno.EACCES, "madvise", f"{REMOVE} is for shared mappings; page 0x{page:x} is in a private one")
                low, high, file = max(page, vma.start), min(end, vma.end), vma.file
                offset = low - vma.start + vma.pgoff
                if vma.flags & VM_HUGETLB:  # hugetlbfs_punch_hole: whole huge pages
                    inside = -(-low // HUGE_PAGES) * HUGE_PAGES, huge.block_of(high)
                    offset, low = offset + inside[0] - low, inside[0]
                    page, high = high, max(low, inside[1])
                else:
                    page = high
            if low < high:
                await punch(file, offset << PAGE_SHIFT, high - low << PAGE_SHIFT)

    async def _advise_pages(self, start: int, end: int, advice: str) -> None:
        for vma in self.mm.vmas.overlapping(start, end):
            low, high = self._advisable(vma, max(start, vma.start), min(end, vma.end), advice)
            if low < high and advice != "WILLNEED":
                await self._advise(vma, low, high, advice)

    def _advisable(self, vma: Vma, low: int, high: int, advice: str) -> tuple[int, int]:
        """What is advised about [low, high) of `vma`. Raises KernelError(EINVAL) where `advice` is not for such memory."""
        forbidden = VM_PFNMAP | (VM_LOCKED if advice not in {"DONTNEED_LOCKED", "WILLNEED"} else 0)
        if advice in {"COLD", "PAGEOUT", "FREE"}:
            forbidden |= VM_HUGETLB
        if advice != "WILLNEED" and (vma.flags & forbidden or (advice == "FREE" and not self._is_private(vma))):
            raise self.refused(vma, advice)
        if advice in {"DONTNEED", "DONTNEED_LOCKED"} and vma.flags & VM_HUGETLB:
            if low & HUGE_MASK:  # madvise_dontneed_free_valid_vma: what is dropped is rounded down to whole pages
                raise self.refused(vma, advice)
            high = huge.block_of(high)
        return low, high

    async def _advise(self, vma: Vma, low: int, high: int, advice: str) -> None:
        if advice in {"DONTNEED", "DONTNEED_LOCKED"}:
            await self.split_edges(low, high)
            async with self.hub.invalidate(Event.CLEAR, low, high):
                self._zap(low, high, guards=False)
            return
        low, high = await self._without_parts(low, high)
        if low == high:
            return
        if advice == "FREE":
            async with self.hub.invalidate(Event.CLEAR, low, high):
                fault.age(self.mm, low, high, pte.YOUNG | pte.DIRTY)
                pages = self.mm.table.occupied(low, high)
                fault.zap(self.mm, pages[self.mm.table.gather(pages) & pte.KIND == pte.SWAP])
        elif advice == "COLD":
            fault.age(self.mm, low, high, pte.YOUNG)
        else:
            await self._page_out(vma, low, high)

    async def _guard(self, start: int, end: int, *, removed: bool) -> None:
        """madvise_guard_install, madvise_guard_remove: what is mapped goes, and the guards come; or they go."""
        for vma in self.mm.vmas.overlapping(start, end):
            low, high = max(start, vma.start), min(end, vma.end)
            if not guard.may_have(vma, removed=removed):
                raise self.refused(vma, "GUARD_REMOVE" if removed else "GUARD_INSTALL")
            if removed:
                guard.remove(self.mm, low, high)
                continue
            await self.split_edges(low, high)
            async with self.hub.invalidate(Event.CLEAR, low, high):
                self._zap(low, high, guards=True)
                guard.install(self.mm, vma, low, high)

    async def _without_parts(self, low: int, high: int) -> tuple[int, int]:
        """Split the folios of which [low, high) holds a part, so that what is advised is about pages: the range that is left.

        madvise_free_huge_pmd and madvise_cold_or_pageout_pte_range do so where nobody else maps the folio, and nobody holds it. A huge page
        at the edge that cannot be split, or is the huge zero page, stays as it is, and takes no part.
        """
        for found in huge.in_part(self.mm, low, high):
            async with AsyncExitStack() as stack:
                if found.file is not None:
                    file, first = found.file
                    await told_everywhere(stack, file, first, first + HUGE_PAGES)
                for _, pages in found.where():
                    await stack.enter_async_context(self._told(pages))
                found.split()
        if low & HUGE_MASK and self.mm.table.get(low) & pte.HUGE:
            low = min(high, huge.block_of(low) + HUGE_PAGES)
        if high & HUGE_MASK and low < high and self.mm.table.get(high) & pte.HUGE:
            high = max(low, huge.block_of(high))
        return low, high

    async def _page_out(self, vma: Vma, low: int, high: int) -> None:
        """madvise_pageout: reclaim what is in [low, high) of `vma` and nobody else's."""
        fault.age(self.mm, low, high, pte.YOUNG)
        present = self.mm.table.occupied(low, high)
        if len(pages := swap.reclaimable(self.mm, present)):
            await self.split_blocks(huge.huge_blocks(self.mm, pages))
            async with self._told(pages):
                still = swap.reclaimable(self.mm, pages)
                if len(still):
                    swap.page_out(self.mm, still)
        file = None if vma.flags & VM_SPECIAL else vma.file  # what a driver inserted is on no LRU list
        if file is not None and len(pages := swap.reclaimable(self.mm, present, of_file=True)):
            await self.split_blocks(block for block in huge.huge_blocks(self.mm, pages) if block < low or block + HUGE_PAGES > high)
            async with self._told(pages):
                still = swap.reclaimable(self.mm, pages, of_file=True)
                fault.zap(self.mm, still)
                file.page_out(file_offsets(vma, still))

    @asynccontextmanager
    async def _told(self, pages: Words) -> AsyncIterator[None]:
        """CLEAR is announced for `pages` while the block runs."""
        async with AsyncExitStack() as stack:
            for start, end in announced_runs(pages):
                await stack.enter_async_context(self.hub.invalidate(Event.CLEAR, start, end))
            yield

    @staticmethod
    def _is_private(vma: Vma) -> bool:
        return vma.is_anonymous and not vma.flags & VM_SHARED
