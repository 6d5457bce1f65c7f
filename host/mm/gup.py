"""get_user_pages and pins (mm/gup.c), and populate: faults that others take on the process's behalf.

Whoever holds a page by reference keeps it where it is: `collect` leaves it out. A page that a device has is brought home first. A pin, more
than a reference, promises that the process and the pinner go on seeing the same memory: a read-only pin of a page that is not the
process's own (shared after fork, or, for a long-term pin, the zero page) *unshares* it first (h80), and fork copies pinned pages
for the child (h58).
"""

from __future__ import annotations

import errno
from itertools import pairwise

import numpy as np

from hmmnet.errors import KernelError, OutOfMemory
from hmmnet.host.interfaces import Event
from hmmnet.pages import Words, all_of, run_bounds

from . import fault, huge, pte
from .access import CpuAccess
from .userfault import MissingPage
from .vma import VM_PFNMAP, VM_READ, VM_SHARED, VM_WRITE, Vma
from .zones import ANON

POPULATE_PAGES_MAX = 1 << 28
"""Pages that one call faults in: 1 TiB, whose page tables alone take 2 GiB."""
REFER_PAGES_MAX = 1 << 24
"""Pages that one call takes references of: 64 GiB, 128 MiB of struct page pointers in the kernel."""
UNPIN_ROUNDS_MAX = 8
"""Tries to bring a page home that somebody holds on its device, before a long-term pin gives up."""
BATCH_PAGES = 1 << 18
"""Pages faulted in at once: what is asked for beyond the host's memory costs no more than that."""


def may_follow(vma: Vma, *, write: bool) -> bool:
    """check_vma_flags without FOLL_FORCE: whether pages of `vma` can be had for reading, or for `write`.

    A mapping that may only be written is good enough for who writes.
    """
    return bool(vma.flags & (VM_WRITE if write else VM_READ)) and not vma.flags & VM_PFNMAP


class Pins(CpuAccess):
    """References to a process's pages."""

    async def get_pages(self, start: int, count: int, *, write: bool = False, pin: bool = False, longterm: bool = False) -> Words:
        """Take a reference (`pin`: FOLL_PIN) of each of `count` pages from page `start`; the frames, fewer where a page cannot be had.

        `write` and `longterm` are FOLL_WRITE and FOLL_LONGTERM; a page of coherent memory comes home for a long-term pin (c04). Raises
        KernelError: EFAULT when not even the first can be had, EBUSY where it cannot come home, ENOMEM. Waits for pages that a userfaultfd
        fills in; somebody may be killed for memory. Hold no lock.
        """
        while True:
            try:
                return await self.relieving(lambda: self._get_pages(start, count, write=write, pin=pin, longterm=longterm))
            except MissingPage as missing:
                await missing.registration.wait(missing.page)

    async def _get_pages(self, start: int, count: int, *, write: bool, pin: bool, longterm: bool) -> Words:
        if count > REFER_PAGES_MAX:
            raise KernelError(
                errno.ENOMEM, "get_user_pages", f"{count} pages from 0x{start:x} on are too many at once; {REFER_PAGES_MAX} can be had"
            )
        async with self.mmap_lock.read():
            got, refused = self._accessible(start, start + count, write=write)
            pages = np.arange(start, start + got, dtype=np.uint64)
            rounds = 0
            if refused and not got:
                why = self.why_not(start, write=write, start=start, end=start + count)
                raise KernelError(errno.EFAULT, "get_user_pages", why)
            while True:
                done, error = await self._fault_until(pages, write=write)
                if error is not None and done == 0:
                    raise error
                pages = pages[:done]
                if pin and not write:
                    await self._unshare(pages, longterm=longterm)
                entries = self.mm.table.gather(pages)
                if not all_of(pte.kinds_of(entries) == pte.PRESENT):
                    continue
                away = (entries >= pte.DEVICE_MIN).nonzero()[0]
                if len(away) == 0 or not longterm:
                    break
                rounds += 1
                if rounds > UNPIN_ROUNDS_MAX:
                    why = f"page 0x{int(pages[away[0]]):x} of process {self.number} is held on its device and cannot come home"
                    raise KernelError(errno.EBUSY, "get_user_pages", why)
                await self._coherent_home(pages[away])
        frames = pte.frames_of(entries)
        held = frames[entries & pte.SPECIAL == 0]
        for zone, _, at in self.memory.groups(held):
            zone.refcount[at] += 1
            if pin:
                zone.pincount[at] += 1
        return frames

    async def _coherent_home(self, pages: Words) -> None:
        """migrate_longterm_unpinnable_folios: coherent pages of devices that a long-term pin wants, run by run."""
        bounds = run_bounds(pages)
        for low, high in pairwise(bounds.tolist()):
            zones = pte.zones_of(self.mm.table.gather(pages[low:high]))
            end = low + (high - low if all_of(zones == zones[0]) else int(np.argmax(zones != zones[0])))
            await self.home(self, pages[low:end])

    def put_pages(self, frames: Words, *, pin: bool = False) -> None:
        """Drop what `get_pages` took."""
        held = frames[frames != 0]
        if pin:
            for zone, _, at in self.memory.groups(held):
                zone.pincount[at] -= 1
        self.memory.put(held)

    def _accessible(self, start: int, end: int, *, write: bool) -> tuple[int, bool]:
        """How many pages of [start, end) lie in VMAs that allow it, and whether one does not."""
        page = start
        for vma in self.mm.vmas.overlapping(start, end):
            if vma.start > page or not may_follow(vma, write=write):
                return page - start, True
            page = min(end, vma.end)
        return page - start, page < end

    async def _unshare(self, pages: Words, *, longterm: bool) -> None:
        """FAULT_FLAG_UNSHARE for a read-only pin: a page of the process's own, not writable, where it shares one."""
        entries = self.mm.table.gather(pages)
        alone = entries & pte.ANON_EXCLUSIVE != 0
        present = pte.kinds_of(entries) == pte.PRESENT
        anonymous = present & (entries & pte.SPECIAL == 0)
        anonymous[anonymous] = self.memory.field(pte.frames_of(entries[anonymous]), "flags") & ANON != 0
        for page in pages[present & ~alone & (longterm | anonymous)].tolist():
            vma = self.mm.vmas.find(page)
            assert vma is not None, "an unshared page lies in a VMA"
            if vma.flags & VM_SHARED:
                continue  # nothing to break: whoever maps the file sees the same page
            await self.split_blocks([huge.block_of(page)])
            async with self.hub.invalidate(Event.CLEAR, page, page + 1):
                fault.unshare(self.mm, vma, page)

    async def populate(self, start: int, end: int, *, write: bool | None = None) -> None:
        """faultin_page_range and __mm_populate: fault [start, end) in, for writing, reading, or (None) as each VMA allows.

        Takes the mmap lock for reading, and drops it while a userfaultfd's owner fills in a missing page, or somebody is killed for memory.
        Raises KernelError: ENOMEM at a hole, EINVAL where the VMA does not allow what is asked for, EFAULT (no access at all, or it ends in
        a signal), ENOMEM.
        """
        if end - start > POPULATE_PAGES_MAX:
            raise KernelError(
                errno.ENOMEM, "populate", f"{end - start} pages from 0x{start:x} on are too many at once; {POPULATE_PAGES_MAX} can be had"
            )
        page = start
        while page < end:
            try:
                async with self.mmap_lock.read():
                    await self.populate_locked(page, end, write=write)
            except MissingPage as missing:
                await missing.registration.wait(missing.page)
                page = missing.page
            except OutOfMemory as error:
                if not await self.relieved(error):
                    raise
            else:
                return

    async def populate_locked(self, start: int, end: int, *, write: bool | None = None) -> None:
        """`populate` by who holds the mmap lock, and keeps it: a page that would have to be waited for is EFAULT (`MissingPage`).

        Nobody is killed for memory, and OutOfMemory is raised.
        """
        page = start
        while page < end:
            vma = self.mm.vmas.find(page)
            if vma is None:
                raise KernelError(errno.ENOMEM, "populate", f"page 0x{page:x} of process {self.number} is not mapped")
            stop = min(end, vma.end)
            wants = vma.flags & (VM_WRITE | VM_SHARED) == VM_WRITE if write is None else write
            if write is not None and not may_follow(vma, write=write):
                raise KernelError(errno.EINVAL, "populate", self.why_not(page, write=write, start=start, end=end))
            for low in range(page, stop, BATCH_PAGES):
                await self._fault_pages(np.arange(low, min(stop, low + BATCH_PAGES), dtype=np.uint64), write=wants)
            page = stop
