"""Swap: pages that MADV_PAGEOUT has taken out of memory (mm/vmscan.c, mm/swapfile.c, do_swap_page), over arrays.

A slot holds one page's bytes; its count says how many entries lead to it (fork makes them two). A slot is memory of this program and of no
zone: what is emulated is what it does to page tables, not the time that a disk takes.

Paged out is what belongs to this process alone: pages that others map, hold or pin stay, and so does device memory (h55). Nobody migrates a
swapped page, a snapshot shows nothing there, and whoever touches it has it back first. A page of a file leaves nothing in the page table;
its slot stands in the page cache (`filemap.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hmmnet.arena import Arena
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, Words
from hmmnet.runs import RunAllocator

from . import pte
from .vma import VM_WRITE, Vma
from .zones import ANON, COMPOUND, lazy_array

if TYPE_CHECKING:
    from .frames import PhysicalMemory
    from .mm import Mm

ENOMEM = 12
KEPT = pte.ANON_EXCLUSIVE | pte.SOFT_DIRTY | pte.UFFD_WP
"""What a swap entry remembers."""


class Swap:
    """`pages` slots. Their bytes are committed as they are used."""

    def __init__(self, pages: int) -> None:
        self._arena = Arena(0, pages)
        self._slots = RunAllocator(0, pages)
        self._count: npt.NDArray[np.int32] = lazy_array(pages, np.int32)

    @property
    def used(self) -> int:
        """Slots that hold a page."""
        return self._slots.used_count

    def save(self, memory: PhysicalMemory, frames: Words) -> Words | None:
        """Slots with what `frames` hold, counted once each; None when there are too few."""
        got = self._slots.allocate(len(frames))
        if got is None:
            return None
        data = np.empty(len(frames) * PAGE_SIZE, np.uint8)
        memory.read(frames, 0, data)
        self._arena.scatter(got.frames << np.uint64(PAGE_SHIFT), PAGE_SIZE, data)
        self._count[got.frames.astype(np.intp)] = 1
        return got.frames

    def load(self, memory: PhysicalMemory, slots: Words, frames: Words) -> None:
        """Put back into `frames` what `slots` hold."""
        memory.write(frames, 0, self._arena.gather(slots << np.uint64(PAGE_SHIFT), PAGE_SIZE))

    def share(self, slots: Words) -> None:
        """swap_duplicate: one more entry leads to each."""
        self._count[slots.astype(np.intp)] += 1

    def alone(self, slots: Words) -> npt.NDArray[np.bool_]:
        """Which of `slots` one entry leads to."""
        alone: npt.NDArray[np.bool_] = self._count[slots.astype(np.intp)] == 1
        return alone

    def free(self, slots: Words) -> None:
        """swap_free: one entry less leads to each of `slots` (distinct)."""
        at = slots.astype(np.intp)
        self._count[at] -= 1
        gone = np.sort(slots[self._count[at] == 0])
        self._slots.free(gone)
        self._arena.discard(gone)


def reclaimable(mm: Mm, pages: Words, *, of_file: bool = False) -> Words:
    """Those of `pages` that PAGEOUT takes: present host memory that nobody else maps or holds; pages `of_file`, or anonymous ones."""
    entries = mm.table.gather(pages)
    there = pte.is_present(entries) & (entries & pte.SPECIAL == 0) & (entries < pte.DEVICE_MIN)
    frames = pte.frames_of(entries[there])
    kind, references = (0, 2) if of_file else (ANON, 1)  # the page cache has a reference of its own
    alone = (mm.memory.field(frames, "flags") & ANON == kind) & (mm.memory.field(frames, "refcount") == references)
    there[there] = alone & (mm.memory.field(frames, "mapcount") == 1) & (mm.memory.field(frames, "pincount") == 0)
    taken: Words = pages[there]
    return taken


def page_out(mm: Mm, pages: Words) -> None:
    """Reclaim `pages`, which are reclaimable still and mapped one by one; mirrors were told. Without room in swap they stay."""
    entries = mm.table.gather(pages)
    frames = pte.frames_of(entries)
    slots = mm.memory.swap.save(mm.memory, frames)
    if slots is None:
        return
    for zone, _, at in mm.memory.groups(frames):
        zone.flags[at] &= ~np.uint32(COMPOUND)
    mm.table.scatter(pages, pte.entries_of(pte.SWAP, slots) | entries & np.uint64(KEPT))
    mm.rss -= len(pages)
    mm.memory.unmap(frames)


def swap_in(mm: Mm, vma: Vma, pages: Words, entries: Words, node: int) -> None:
    """do_swap_page for those `entries` of `pages` that are swapped: they are present again. Raises KernelError(ENOMEM)."""
    swapped = np.flatnonzero(entries & pte.KIND == pte.SWAP)
    pages, old = pages[swapped], entries[swapped]
    frames = mm.memory.allocate_charged(mm.cgroup, len(pages), node, slice(0, len(pages)))
    if frames is None:
        raise mm.out_of_memory("page fault", len(pages))
    slots = pte.frames_of(old)
    mm.memory.swap.load(mm.memory, slots, frames)
    own = (old & pte.ANON_EXCLUSIVE != 0) | mm.memory.swap.alone(slots)
    mm.memory.swap.free(slots)
    index = mm.anon_index(vma, pages)
    mm.memory.map_new(frames, vma.anon, index)
    bits = old & np.uint64(KEPT & ~pte.ANON_EXCLUSIVE) | np.uint64(pte.YOUNG | pte.DIRTY)
    bits[own] |= np.uint64(pte.ANON_EXCLUSIVE | (pte.WRITE if vma.flags & VM_WRITE else 0))
    mm.table.scatter(pages, pte.entries_of(pte.PRESENT, frames) | bits)
    mm.rss += len(pages)
    entries[swapped] = mm.table.gather(pages)
