"""hmm_range_fault's look at a page table (mm/hmm.c): table A3 of the semantics, over arrays.

For every page: what the device may know about it now (a frame word), and whether it wants a fault first. Rights are the VMA's, so a range
is walked VMA by VMA; inside one the table is a function of the entry's kind, of WRITE, and for device memory of its owner.

The common case, a range that is present and writable throughout, is recognised block by block: there the answer is a shift and a
mask. Blocks are small enough to stay in the processor's cache, which halves the time of the rest.
"""

from __future__ import annotations

import errno

import numpy as np
import numpy.typing as npt

from hmmnet.host.interfaces import Walk
from hmmnet.pages import (
    HMM_PFN_DMA_MAPPED,
    HMM_PFN_ERROR,
    HMM_PFN_ORDER_SHIFT,
    HMM_PFN_P2PDMA,
    HMM_PFN_P2PDMA_BUS,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    HUGE_SHIFT,
    Words,
    all_of,
    any_of,
    bits_in_any,
    word_of,
)

from . import pte
from .mm import Mm
from .vma import VM_PFNMAP, VM_READ, VM_WRITE, Vma

HMM_PFN_INOUT = HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA | HMM_PFN_P2PDMA_BUS
"""Bits of the input that survive."""
BLOCK_PAGES = 1 << 14
HUGE_ORDER = word_of(HUGE_SHIFT << HMM_PFN_ORDER_SHIFT)
"""HMM_PFN_ORDER of a page that is mapped with 511 others as one."""

Flags = npt.NDArray[np.bool_]


class _Stop(Exception):
    """The walk ends at `page` with `code`."""

    def __init__(self, page: int, code: int) -> None:
        self.page = page
        self.code = code


class Walker:
    """One walk over [start, end); `inputs` are the caller's words or None for all zero."""

    def __init__(self, mm: Mm, start: int, end: int, inputs: Words | None, default_flags: int, flags_mask: int, owner: int) -> None:
        self.mm = mm
        self.start = start
        self.owner = owner
        self.words = np.zeros(end - start, np.uint64) if inputs is None else inputs.copy()
        self.read = np.zeros(end - start, np.bool_)
        self.write = np.zeros(end - start, np.bool_)
        self.default = default_flags
        self.given = inputs
        self.inputs = inputs if inputs is not None and flags_mask & (HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE) else None
        self.mask = flags_mask
        self.sticky = inputs is not None and bits_in_any(inputs) & HMM_PFN_INOUT != 0

    def run(self, end: int) -> Walk:
        """Walk until `end`."""
        page = self.start
        try:
            for vma in self.mm.vmas.overlapping(self.start, end):
                if vma.start > page:
                    self._unmapped(page, vma.start, errno.EFAULT)
                page = max(page, vma.start)
                stop = min(end, vma.end)
                if vma.flags & VM_READ and not vma.flags & VM_PFNMAP:
                    self._vma(vma, page, stop)
                else:
                    self._unmapped(page, stop, errno.EFAULT)
                page = stop
            if page < end:
                self._unmapped(page, end, errno.EFAULT)
        except _Stop as stopped:
            return Walk(self.words, self.read, self.write, stopped.code, stopped.page)
        return Walk(self.words, self.read, self.write)

    def _needs(self, low: int, high: int) -> tuple[Flags | bool, Flags | bool]:
        """Whether a fault is wanted at positions [low, high), and whether for writing."""
        if self.inputs is None:
            read = bool(self.default & HMM_PFN_REQ_FAULT)
            return read, read and bool(self.default & HMM_PFN_REQ_WRITE)
        flags = self.inputs[low:high] & self.mask | self.default
        reads = flags & HMM_PFN_REQ_FAULT != 0
        return reads, reads & (flags & HMM_PFN_REQ_WRITE != 0)

    def _fill(self, low: int, high: int, words: Words | int) -> None:
        if self.sticky:
            kept = self.words[low:high] & HMM_PFN_INOUT
            self.words[low:high] = kept | words
        else:
            self.words[low:high] = words

    def _unmapped(self, start: int, end: int, code: int) -> None:
        """No VMA here, or one that cannot be looked into: an error if anything is wanted, else ERROR words."""
        low, high = start - self.start, end - self.start
        if np.any(self._needs(low, high)[0]):
            raise _Stop(start, code)
        self._fill(low, high, HMM_PFN_ERROR)

    def _vma(self, vma: Vma, start: int, end: int) -> None:
        for first, part in self.mm.table.readable(start, end):
            for offset in range(0, len(part), BLOCK_PAGES):
                self._block(vma, first + offset, part[offset : offset + BLOCK_PAGES])

    def _block(self, vma: Vma, page: int, entries: Words) -> None:
        low = page - self.start
        high = low + len(entries)
        kinds = pte.masked(entries, pte.KIND | pte.WRITE | pte.HUGE)
        first = int(kinds[0])
        if first & pte.KIND == pte.PRESENT and all_of(kinds == first):
            self._present(vma, page, entries, first)
            return
        reads, writes = self._needs(low, high)
        kind = pte.kinds_of(kinds)
        writable = kinds & pte.WRITE != 0
        present = kind == pte.PRESENT
        private = kind == pte.DEVICE
        if any_of(private):
            private &= pte.zones_of(entries) == max(self.owner, 0)
        valid = present | private
        words = np.where(valid, pte.frames_of(entries) | word_of(HMM_PFN_VALID), word_of(0))
        words[valid & writable] |= word_of(HMM_PFN_WRITE)
        words[valid & (kinds & pte.HUGE != 0)] |= HUGE_ORDER
        want = (~valid & reads) | (present & ~writable & writes)
        stop = self._refusal(vma, entries, kind, want, want & writes)
        end = len(entries) if stop is None else stop[0]
        self._fill(low, low + end, words[:end])
        self.read[low : low + end] = want[:end]
        self.write[low : low + end] = (want & writes)[:end]
        if stop is not None:
            raise _Stop(page + stop[0], stop[1])

    def _present(self, vma: Vma, page: int, entries: Words, kind: int) -> None:
        """A block that is present throughout, with the same right."""
        low = page - self.start
        high = low + len(entries)
        flags = HMM_PFN_VALID | (HMM_PFN_WRITE if kind & pte.WRITE else 0) | (int(HUGE_ORDER) if kind & pte.HUGE else 0)
        if self.sticky:
            self._fill(low, high, pte.frames_of(entries) | word_of(flags))
        else:
            out = self.words[low:high]
            np.right_shift(entries, word_of(pte.FRAME_SHIFT), out=out)
            np.bitwise_or(out, word_of(flags), out=out)
        if not kind & pte.WRITE:
            writes = self._needs(low, high)[1]
            if np.any(writes):
                if not vma.flags & VM_WRITE:
                    first = int(np.argmax(writes)) if isinstance(writes, np.ndarray) else 0
                    self.words[low + first : high] = 0 if self.given is None else self.given[low + first : high]
                    raise _Stop(page + first, errno.EPERM)
                self.read[low:high] = writes
                self.write[low:high] = writes

    def _refusal(self, vma: Vma, entries: Words, kind: Words, want: Flags, write: Flags) -> tuple[int, int] | None:
        """The first page of a block whose fault is refused, and how: (position, errno)."""
        found: tuple[int, int] | None = None
        if not vma.flags & VM_WRITE and any_of(write):
            found = int(np.argmax(write)), errno.EPERM
        markers = (kind == pte.MARKER) & want & (pte.frames_of(entries) != pte.MARKER_UFFD_WP)
        if any_of(markers):
            first = int(np.argmax(markers))
            if found is None or first <= found[0]:
                found = first, errno.EFAULT
        return found


def walk(mm: Mm, start: int, end: int, inputs: Words | None, default_flags: int, flags_mask: int, owner: int) -> Walk:
    """Table A3 for [start, end). `owner` is the zone whose device-private pages are reported, or `NO_OWNER`."""
    return Walker(mm, start, end, inputs, default_flags, flags_mask, owner).run(end)
