"""Exclusive access of a device to pages of a process, for atomic operations (mm/memory.c, mm/rmap.c: make_device_exclusive; table A7).

It is a write fault on the device's behalf: empty pages are made, shared ones copied, pages of devices brought home. Then mirrors are told
(EXCLUSIVE, which the device that asked ignores) and the entry becomes a device-exclusive one: the page stays where it is, and whoever else
wants it (CPU, fork, get_user_pages, another device) takes it back first, page by page.

Two kernels, two ways with a large page. Today's make_device_exclusive maps it page by page and takes the one page asked for. Linux 6.12,
whose test_hmm was recorded, goes through the reverse map of the *folio*: asked for the head page it takes all of them, asked for
another it takes nothing (`make_exclusive_folios`; mm/rmap.c of 6.12, folio_make_device_exclusive and its caller's PageTail).
"""

from __future__ import annotations

import errno

import numpy as np
import numpy.typing as npt

from hmmnet.errors import KernelError
from hmmnet.host.interfaces import Event
from hmmnet.pages import HMM_PFN_VALID, HMM_PFN_WRITE, HUGE_PAGES, Words, all_of, word_of

from . import fault, huge, pte
from .gup import Pins
from .vma import VM_HUGETLB, VM_SHARED, VM_SPECIAL, Vma
from .zones import COMPOUND


class ExclusiveAccess(Pins):
    """What devices do to a process's pages that they want for themselves."""

    async def make_exclusive(self, start: int, end: int, owner: int) -> int:
        """make_device_exclusive for each page of [start, end), for zone `owner`; how many pages from `start` on it got.

        What changed while mirrors were told is faulted anew. Ends early where a page may not be written, or is not anonymous memory.
        Somebody may be killed for memory: hold no lock. Raises KernelError when not even the first can be had: EFAULT (not writable),
        EOPNOTSUPP (no anonymous memory, or hugetlb), ENOMEM.
        """
        return await self.relieving(lambda: self._make_exclusive(start, end, owner))

    async def _make_exclusive(self, start: int, end: int, owner: int) -> int:
        async with self.mmap_lock.read():
            page, stop = start, self._writable_until(start, end)
            while page < stop:
                vma = self._vma(page)
                pages, stop = await self._written(page, min(stop, vma.end), stop, first=page == start)
                if not _may_be_exclusive(vma) or len(pages) == 0:
                    break
                await self.split_blocks(huge.huge_blocks(self.mm, pages))  # FOLL_SPLIT_PMD
                async with self.hub.invalidate(Event.EXCLUSIVE, page, int(pages[-1]) + 1, owner):
                    page += fault.set_exclusive(self.mm, pages)
        if page == start:
            raise KernelError(
                errno.EOPNOTSUPP, "make_device_exclusive", f"page 0x{start:x} of process {self.number} is no anonymous memory"
            )
        return page - start

    async def make_exclusive_folios(self, start: int, end: int, owner: int) -> Words:
        """make_device_exclusive_range of Linux 6.12: HMM_PFN words of the pages that could be written, 0 for one that was not had.

        Somebody may be killed for memory: hold no lock. Raises KernelError: EFAULT when the first page may not be written, ENOMEM.
        """
        return await self.relieving(lambda: self._make_exclusive_folios(start, end, owner))

    async def _make_exclusive_folios(self, start: int, end: int, owner: int) -> Words:
        async with self.mmap_lock.read():
            stop = self._writable_until(start, end)
            page = start
            while page < stop:
                vma = self._vma(page)
                pages, stop = await self._written(page, min(stop, vma.end), stop, first=page == start)
                if _may_be_exclusive(vma) and len(pages):
                    await self.split_blocks(huge.huge_blocks(self.mm, pages))
                    await self._take_folios(vma, pages, owner)
                page += len(pages)
        entries = self.mm.table.read(start, stop)
        words = pte.frames_of(entries) | word_of(HMM_PFN_VALID | HMM_PFN_WRITE)
        words[(entries & pte.KIND != pte.EXCLUSIVE) | self._tails(entries)] = 0
        return words

    async def _written(self, page: int, end: int, stop: int, *, first: bool) -> tuple[Words, int]:
        """get_user_pages with FOLL_WRITE on [page, end): the pages that are had, and where to stop, which is `stop` if all are.

        Raises the KernelError that not even the `first` of the call could be had for.
        """
        pages = np.arange(page, end, dtype=np.uint64)
        done, error = await self._fault_until(pages, write=True)
        if error is not None and done == 0 and first:
            raise error
        return (pages, stop) if error is None else (pages[:done], page + done)

    async def _take_folios(self, vma: Vma, pages: Words, owner: int) -> None:
        """`make_exclusive_folios` in one VMA. What changes while mirrors are told is not had."""
        taken = self._with_folios(vma, pages)
        if len(taken) == 0:
            return
        async with self.hub.invalidate(Event.EXCLUSIVE, int(taken[0]), int(taken[-1]) + 1, owner):
            there = self.mm.table.gather(taken) & (pte.KIND | pte.WRITE | pte.HUGE) == pte.WRITABLE
            fault.set_exclusive(self.mm, taken[there])

    def _with_folios(self, vma: Vma, pages: Words) -> Words:
        """`pages` without tails of large folios, and with all pages of those whose heads are there, as far as `vma` maps them."""
        entries = self.mm.table.gather(pages)
        frames = pte.frames_of(entries)
        heads = pages[(self.memory.field(frames, "flags") & COMPOUND != 0) & (frames % word_of(HUGE_PAGES) == 0)]
        parts = [pages[~self._tails(entries)]]
        parts += [np.arange(head, min(head + HUGE_PAGES, vma.end), dtype=np.uint64) for head in heads.tolist()]
        return np.unique(np.concatenate(parts))

    def _tails(self, entries: Words) -> npt.NDArray[np.bool_]:
        """Which `entries` lead to a page of a large folio that is not its first."""
        out = np.zeros(len(entries), np.bool_)
        there = ((entries & pte.KIND == pte.PRESENT) | (entries & pte.KIND == pte.EXCLUSIVE)).nonzero()[0]
        frames = pte.frames_of(entries[there])
        out[there] = (self.memory.field(frames, "flags") & COMPOUND != 0) & (frames % word_of(HUGE_PAGES) != 0)
        return out

    def _writable_until(self, start: int, end: int) -> int:
        """The first page of [start, end) that may not be written. Raises KernelError(EFAULT) when that is `start`."""
        got, _ = self._accessible(start, end, write=True)
        if got == 0:
            raise KernelError(errno.EFAULT, "make_device_exclusive", f"page 0x{start:x} of process {self.number} cannot be written")
        return start + got

    def _vma(self, page: int) -> Vma:
        vma = self.mm.vmas.find(page)
        assert vma is not None, "an accessible page lies in a VMA"
        return vma

    def exclusive_words(self, start: int, end: int) -> Words:
        """HMM_PFN words of the pages from `start` on that a device has exclusively, up to the first that it does not (any more)."""
        entries = self.mm.table.read(start, end)
        held = entries & pte.KIND == pte.EXCLUSIVE
        count = len(entries) if all_of(held) else int(np.argmin(held))
        return pte.frames_of(entries[:count]) | word_of(HMM_PFN_VALID | HMM_PFN_WRITE)


def _may_be_exclusive(vma: Vma) -> bool:
    """Whether pages of `vma` that have been written are anonymous memory of small pages."""
    return not vma.flags & (VM_HUGETLB | VM_SPECIAL | VM_SHARED)
