"""The emulated IOMMU: which device context may reach which frame of host memory, or of another device's, checked at every access.

A real driver that forgets to drop a translation corrupts memory silently, weeks later. Here the host remembers what each context was
told it may use: a translation enters its *domain* when a range fault is answered, and leaves it when an invalidation over its page
has been acknowledged or when the page migrated away. A device names, with each DMA, the pages it believes it touches and the physical
addresses it computed; if its domain does not say the same, the access is refused and reported as the driver bug it is.

Frames of the device's own memory need no translation and never stand here.

The hub does not tell a device of its own migrations, so a page that it maps and migrates at once would be written behind the copy's back.
While such a page is on its way its translation is *suspended*: an access is neither a bug nor allowed, and is answered EAGAIN.

An acknowledged invalidation promises that the device is quiet. DMA that the device began before is finished first: each access is
registered for as long as it lasts, and whoever revokes waits for those that overlap (`Domain.busy`), which is the IOTLB flush
with its wait for outstanding transactions.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hmmnet.errors import IommuFault, KernelError
from hmmnet.pages import (
    FEW,
    HMM_PFN_ERROR,
    HMM_PFN_FRAME_MASK,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    HUGE_PAGES,
    LARGE,
    PAGE_SHIFT,
    PAGES_MAX,
    ZONE_SHIFT,
    Words,
    all_of,
    any_of,
    has_large,
    largest,
    page_by_page,
    smallest,
    word_of,
)
from hmmnet.sparse import SparseTable

VALID, WRITE, SUSPENDED = 1, 2, 4
"""Bits of a translation."""
FRAME_SHIFT = 3
_VALID, _WRITE, _SUSPENDED, _FRAME_SHIFT = (word_of(number) for number in (VALID, WRITE, SUSPENDED, FRAME_SHIFT))
_PAGE_SHIFT = word_of(PAGE_SHIFT)


@dataclass(eq=False, slots=True)
class Access:
    """DMA under way on pages between `first` and `last`."""

    first: int
    last: int
    write: bool
    give_up: Callable[[], object] | None = None
    """Ends it from this side; None where the other side always does."""


class Domain:
    """The translations of one context of a device whose own memory is `zone`."""

    def __init__(self, device: str, context: int, zone: int) -> None:
        self.device = device
        self.context = context
        self.zone = zone
        self.refused = 0
        """Accesses that were refused so far."""
        self.table = SparseTable()
        """Page -> entry. Change it by the methods here."""
        self._accesses: list[Access] = []

    def grant(self, start: int, words: Words) -> None:
        """Take over what `words` (HMM_PFN) from page `start` on lead to.

        A page without a usable word keeps its translation: if it has one, then of a page that is the device's exclusively.
        """
        if len(words) <= FEW:
            self._grant_few(start, words)
            return
        frames = words & word_of(HMM_PFN_FRAME_MASK)
        usable = (words & word_of(HMM_PFN_VALID | HMM_PFN_ERROR)) == word_of(HMM_PFN_VALID)
        usable &= frames >> word_of(ZONE_SHIFT) != word_of(self.zone)
        entries = frames << _FRAME_SHIFT | _VALID
        entries |= np.where(words & word_of(HMM_PFN_WRITE) != 0, _WRITE, word_of(0))
        if all_of(usable):
            self.table.write(start, entries)
        else:
            self.table.scatter((usable.nonzero()[0] + start).astype(np.uint64), entries[usable])

    def _grant_few(self, start: int, words: Words) -> None:
        """`grant`, page by page."""
        for page, word in enumerate(words.tolist(), start):
            frame = word & HMM_PFN_FRAME_MASK
            if word & (HMM_PFN_VALID | HMM_PFN_ERROR) == HMM_PFN_VALID and frame >> ZONE_SHIFT != self.zone:
                self.table.set(page, frame << FRAME_SHIFT | VALID | (WRITE if word & HMM_PFN_WRITE else 0))

    def revoke(self, start: int, end: int) -> None:
        """Forget the translations of [start, end)."""
        self.table.clear(start, end)

    def revoke_pages(self, pages: Words) -> None:
        """Forget the translations of `pages`, which may be large."""
        table = self.table
        if not table.cells:
            return
        if len(pages) > FEW or has_large(pages):
            table.scatter(self._some(pages), 0)
            return
        for page in pages.tolist():
            if table.get(page):
                table.set(page, 0)

    def _some(self, pages: Words) -> Words:
        """`pages` page by page; without large ones where there is no translation among them all, as is most common."""
        if not has_large(pages):
            return pages
        large = pages & word_of(LARGE - 1)
        if any(bool(part.any()) for _, part in self.table.existing(int(large.min()), int(large.max()) + HUGE_PAGES)):
            return page_by_page(pages)
        return pages[pages < word_of(LARGE)]

    def frame(self, page: int) -> int | None:
        """The frame that `page` translates to, or None."""
        entry = self.table.get(page)
        return entry >> 3 if entry & 1 else None

    def translations(self) -> tuple[Words, Words, npt.NDArray[np.bool_]]:
        """(pages, frames, may write) of everything that is not suspended."""
        pages = self.table.occupied(0, PAGES_MAX)
        entries = self.table.gather(pages)
        held = (entries & (_VALID | _SUSPENDED)) == _VALID
        return pages[held], entries[held] >> _FRAME_SHIFT, (entries[held] & _WRITE) != 0

    def touched(self) -> Words:
        """The pages with translations that may be others since the last call: for one who checks them."""
        return self.table.take_touched_pages()

    def held(self, pages: Words) -> tuple[Words, Words, npt.NDArray[np.bool_]]:
        """`translations`, of `pages`."""
        entries = self.table.gather(pages)
        held = ((entries & (_VALID | _SUSPENDED)) == _VALID).nonzero()[0]
        return pages[held], entries[held] >> _FRAME_SHIFT, (entries[held] & _WRITE) != 0

    def held_one(self, page: int) -> tuple[int, bool] | None:
        """(frame, may write) of one page, if it has a translation that is not suspended."""
        entry = self.table.get(page)
        return (entry >> FRAME_SHIFT, entry & WRITE != 0) if entry & (VALID | SUSPENDED) == VALID else None

    def suspend(self, pages: Words) -> None:
        """`pages` are on their way to the device itself: their translations answer EAGAIN until `resume` or `revoke_pages`."""
        if not self.table.cells:
            return
        if len(pages) <= FEW and not has_large(pages):
            for page in pages.tolist():
                if (entry := self.table.get(page)) & VALID:
                    self.table.set(page, entry | SUSPENDED)
            return
        pages = self._some(pages)
        entries = self.table.gather(pages)
        held = (entries & _VALID) != 0
        if any_of(held):
            self.table.scatter(pages[held], entries[held] | _SUSPENDED)

    def resume(self, pages: Words) -> None:
        """`pages` stayed where they were: what was suspended is good again."""
        if not self.table.cells:
            return
        if len(pages) <= FEW and not has_large(pages):
            for page in pages.tolist():
                if (entry := self.table.get(page)) & SUSPENDED:
                    self.table.set(page, entry & ~SUSPENDED)
            return
        pages = self._some(pages)
        entries = self.table.gather(pages)
        held = (entries & _SUSPENDED) != 0
        if any_of(held):
            self.table.scatter(pages[held], entries[held] & ~_SUSPENDED)

    def check(self, pages: Words, addresses: Words, write: bool) -> None:
        """Refuse an access of physical `addresses` by way of `pages` that the domain does not cover.

        Raises IommuFault; KernelError(EAGAIN) when a page is on its way to the device itself.
        """
        if len(pages) <= FEW and self._covers(pages, addresses, write):
            return
        entries = self.table.gather(pages)
        needed = _VALID | _WRITE if write else _VALID
        bad = (entries & needed) != needed
        bad |= entries >> _FRAME_SHIFT != addresses >> _PAGE_SHIFT
        if not any_of(bad):
            if (entries & _SUSPENDED).any():
                raise KernelError(errno.EAGAIN, "dma", f'device "{self.device}" is migrating one of the pages itself; look again')
            return
        self.refused += 1
        i = int(np.argmax(bad))
        raise IommuFault(self._describe(int(pages[i]), int(addresses[i]), int(entries[i]), write, int(np.count_nonzero(bad))))

    def _covers(self, pages: Words, addresses: Words, write: bool) -> bool:
        """Whether a few accesses are allowed: what `check` finds out, page by page."""
        needed = VALID | WRITE if write else VALID
        for page, address in zip(pages.tolist(), addresses.tolist(), strict=True):
            entry = self.table.get(page)
            if entry & (needed | SUSPENDED) != needed or entry >> FRAME_SHIFT != address >> PAGE_SHIFT:
                return False
        return True

    def _describe(self, page: int, address: int, entry: int, write: bool, count: int) -> str:
        if not entry & 1:
            held = "no translation for that page: it was never given one, or was told to drop it"
        elif entry >> 3 != address >> PAGE_SHIFT:
            held = f"that page translated to frame 0x{entry >> 3:x}"
        else:
            held = "a read-only translation"
        return (
            f'device "{self.device}" context {self.context}: DMA {"write" if write else "read"} of page 0x{page:x} at physical '
            f"address 0x{address:x} refused ({count} elements), because it holds {held}; the driver used a mapping it must not use"
        )

    def begin(self, pages: Words, write: bool) -> Access:
        """Register DMA on `pages`; `end` it."""
        access = Access(smallest(pages), largest(pages), write)
        self._accesses.append(access)
        return access

    def end(self, access: Access) -> None:
        """The DMA is over."""
        self._accesses.remove(access)

    def busy(self, start: int, end: int) -> bool:
        """Whether DMA that touches [start, end) is still under way."""
        return bool(self._accesses) and any(access.first < end and start <= access.last for access in self._accesses)

    def give_up(self, start: int, end: int) -> None:
        """End what DMA on [start, end) can be ended from this side."""
        for access in self._accesses:
            if access.give_up is not None and access.first < end and start <= access.last:
                access.give_up()
