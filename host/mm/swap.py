"""Swap: pages that MADV_PAGEOUT has taken out of memory (mm/vmscan.c, mm/swapfile.c, do_swap_page), over arrays.

A slot holds one page's bytes; its count says how many entries lead to it (fork makes them two). A slot is memory of this program and of no
zone: what is emulated is what it does to page tables, not the time that a disk takes.

Paged out is what this process alone maps: pages that others map (madvise_cold_or_pageout_pte_range), hold or pin stay, and so does device
memory (h55). Nobody migrates a swapped page, a snapshot shows nothing there, and whoever touches it has it back first. A page of a file
leaves nothing in the page table; its slot stands in the page cache (`filemap.py`).

**The swap cache.** A slot that several entries lead to is read once: the page goes into the swap cache, read-only, and whoever comes for it
next maps the same frame. So a family shares a page again after swap as it did before, and the first store of either copies. The cache holds
one reference of the frame, and both, slot and place in the cache, go when the last entry that leads to the slot has gone (in the kernel,
when somebody asks: folio_free_swap). While it is there the page does not migrate (migrate_vma_pages: a page of the swap cache whose slot is
still in use stays), and paging it out again wants no new slot.

What was a process's own is so again (pte_swp_exclusive), and writable at once. What was not comes back read-only, also when nobody else has
it any more: it came through the swap cache, whose reference a load does not take away (should_try_to_free_swap; a device of memory, such as
zram, is read past the cache, and is not what is emulated). A store finds out that nobody else has it, and copies nothing.

**Whose it is.** A slot remembers the memory cgroup that its page was charged to (the swap cgroup map), of no group too. Whoever has it read
back, that group is charged (mem_cgroup_swapin_charge_folio), and may be at its limit; the reader's own group would be only if that one had
gone offline, which no group does here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hmmnet.arena import Arena, Bytes
from hmmnet.errors import KernelError, OutOfMemory
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, Words, word_of
from hmmnet.runs import RunAllocator

from . import pte
from .memcg import CHARGE_MASK, MemoryCgroup
from .vma import VM_WRITE, Vma
from .zones import ANON, COMPOUND, HostZone, lazy_array

if TYPE_CHECKING:
    from .frames import PhysicalMemory
    from .mm import Mm

ENOMEM = 12
KEPT = pte.ANON_EXCLUSIVE | pte.SOFT_DIRTY | pte.UFFD_WP
"""What a swap entry remembers."""


class Swap:
    """`pages` slots, for pages of `memory`. Their bytes are committed as they are used."""

    def __init__(self, memory: PhysicalMemory, pages: int) -> None:
        self._memory = memory
        self._arena = Arena(0, pages)
        self._slots = RunAllocator(0, pages)
        self._count: npt.NDArray[np.int32] = lazy_array(pages, np.int32)
        self._frames: Words = lazy_array(pages, np.uint64)
        """The swap cache: the frame of each slot, 0 for most. `HostZone.swapped` leads back."""
        self._charges: npt.NDArray[np.uint32] = lazy_array(pages, np.uint32)
        """The swap cgroup map: what `flags` said of the group that the page of a slot was charged to."""

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
        self._arena.scatter(got.frames << word_of(PAGE_SHIFT), PAGE_SIZE, data)
        self._count[got.frames.astype(np.intp)] = 1
        self._charges[got.frames.astype(np.intp)] = memory.field(frames, "flags") & np.uint32(CHARGE_MASK)
        return got.frames

    def contents(self, slots: Words) -> Bytes:
        """The bytes that `slots` hold, behind each other."""
        return self._arena.gather(slots << word_of(PAGE_SHIFT), PAGE_SIZE)

    def load(self, slots: Words, node: int, call: str) -> Words:
        """New frames, from `node` if it has room, with what `slots` hold, charged to the groups that had that before.

        Raises KernelError(ENOMEM): OutOfMemory, or for a group that is at its limit.
        """
        memory, charges = self._memory, self._charges[slots.astype(np.intp)]
        charged: list[tuple[MemoryCgroup, int]] = []
        try:
            for bits in np.unique(charges).tolist():
                self._charge(memory.cgroups.charged_by(bits), int(np.count_nonzero(charges == bits)), call, charged)
            frames = self._frames_for(len(slots), node, call)
        except KernelError:
            for group, pages in charged:
                group.uncharge(pages)
            raise
        for zone, rows, at in memory.groups(frames):
            zone.flags[at] = charges[rows]
        memory.write(frames, 0, self.contents(slots))
        return frames

    def _charge(self, group: MemoryCgroup | None, pages: int, call: str, charged: list[tuple[MemoryCgroup, int]]) -> None:
        self._memory.refuse_armed("host.alloc.frame", pages, group)
        if group is not None:
            if not group.try_charge(pages):
                raise KernelError(ENOMEM, call, f"{pages} pages come back from swap and {group.shortage(pages)}")
            charged.append((group, pages))

    def _frames_for(self, pages: int, node: int, call: str) -> Words:
        frames = self._memory.allocate(pages, node, slice(0, pages))
        if frames is None:
            raise OutOfMemory(ENOMEM, call, f"{pages} pages come back from swap and the host's memory is used up", pages)
        return frames

    def share(self, slots: Words) -> None:
        """swap_duplicate: one more entry leads to each."""
        self._count[slots.astype(np.intp)] += 1

    def free(self, slots: Words) -> None:
        """swap_free: one entry less leads to each of `slots` (distinct). The last one takes the page out of the swap cache, too."""
        at = slots.astype(np.intp)
        self._count[at] -= 1
        gone = np.sort(slots[self._count[at] == 0])
        self.forget(gone)
        self._slots.free(gone)
        self._arena.discard(gone)

    # --- the swap cache -----------------------------------------------------------------------------------------------------------

    def cached(self, slots: Words) -> Words:
        """The frames in which pages of `slots` are already; 0 where they are not."""
        frames: Words = self._frames[slots.astype(np.intp)]
        return frames

    def remember(self, slots: Words, frames: Words) -> None:
        """add_to_swap_cache: `frames` hold what `slots` do, for whoever wants it next."""
        self._frames[slots.astype(np.intp)] = frames
        for zone, rows, at in self._memory.groups(frames):
            assert isinstance(zone, HostZone), "pages of the host are swapped, and no others"
            zone.swapped[at] = slots[rows] + word_of(1)
            zone.refcount[at] += 1

    def forget(self, slots: Words) -> int:
        """delete_from_swap_cache: those of `slots` that are cached are so no more; how many were."""
        frames = self.cached(slots)
        cached = frames != 0
        frames = frames[cached]
        self._frames[slots[cached].astype(np.intp)] = 0
        for zone, _, at in self._memory.groups(frames):
            assert isinstance(zone, HostZone), "pages of the host are swapped, and no others"
            zone.swapped[at] = 0
        self._memory.put(frames)
        return len(frames)

    def shrink(self) -> int:
        """Memory is short: pages of the swap cache that nobody maps or holds are free; how many were."""
        slots = np.flatnonzero(self._frames).astype(np.uint64)
        return self.forget(slots[self._memory.field(self.cached(slots), "refcount") == 1])


def reclaimable(mm: Mm, pages: Words, *, of_file: bool = False) -> Words:
    """Those of `pages` that PAGEOUT takes: present host memory that nobody else maps or holds; pages `of_file`, or anonymous ones."""
    entries = mm.table.gather(pages)
    there = pte.is_present(entries) & (entries & pte.SPECIAL == 0) & (entries < pte.DEVICE_MIN)
    frames = pte.frames_of(entries[there])
    kind, references = (0, 2) if of_file else (ANON, 1 + (slots_of(mm.memory, frames) != 0))  # a cache has a reference of its own
    alone = (mm.memory.field(frames, "flags") & ANON == kind) & (mm.memory.field(frames, "refcount") == references)
    there[there] = alone & (mm.memory.field(frames, "mapcount") == 1) & (mm.memory.field(frames, "pincount") == 0)
    taken: Words = pages[there]
    return taken


def page_out(mm: Mm, pages: Words) -> None:
    """Reclaim `pages`, which are reclaimable still and mapped one by one; mirrors were told. Without room in swap they stay."""
    swap, entries = mm.memory.swap, mm.table.gather(pages)
    frames = pte.frames_of(entries)
    known = slots_of(mm.memory, frames)
    cached = known != 0
    saved = swap.save(mm.memory, frames[~cached])
    if saved is None:
        return
    slots = known - word_of(1)
    slots[~cached] = saved
    swap.share(slots[cached])
    for zone, _, at in mm.memory.groups(frames):
        zone.flags[at] &= ~np.uint32(COMPOUND)
    mm.table.scatter(pages, pte.entries_of(pte.SWAP, slots) | entries & word_of(KEPT))
    mm.rss -= len(pages)
    mm.memory.unmap(frames)
    swap.forget(slots[cached])


def slots_of(memory: PhysicalMemory, frames: Words) -> Words:
    """For each of `frames`, of the host, one more than the slot of which it is in the swap cache; 0 for those that are not."""
    slots: Words = memory.field(frames, "swapped").astype(np.uint64)
    return slots


def swap_in(mm: Mm, vma: Vma, pages: Words, entries: Words, node: int) -> None:
    """do_swap_page for those `entries` of `pages` that are swapped: they are present again, as for a load. Raises KernelError(ENOMEM)."""
    swapped = np.flatnonzero(entries & pte.KIND == pte.SWAP)
    pages, old = pages[swapped], entries[swapped]
    slots, swap = pte.frames_of(old), mm.memory.swap
    frames = swap.cached(slots)
    fresh = frames == 0
    if fresh.any():
        frames[fresh] = swap.load(slots[fresh], node, "page fault")
    own = fresh & (old & pte.ANON_EXCLUSIVE != 0)
    index = mm.anon_index(vma, pages)
    mm.memory.map_new(frames[own], vma.anon, index[own])
    mm.memory.map_new(frames[fresh & ~own], vma.chain[-1] if vma.chain else vma.anon, index[fresh & ~own])  # the root: all of them have it
    swap.remember(slots[fresh & ~own], frames[fresh & ~own])
    for zone, _, at in mm.memory.groups(frames[~fresh]):
        zone.refcount[at] += 1
        zone.mapcount[at] += 1
    swap.free(slots)
    bits = old & word_of(KEPT & ~pte.ANON_EXCLUSIVE) | word_of(pte.YOUNG | pte.DIRTY)
    bits[own] |= np.uint64(pte.ANON_EXCLUSIVE | (pte.WRITE if vma.flags & VM_WRITE else 0))
    mm.table.scatter(pages, pte.entries_of(pte.PRESENT, frames) | bits)
    mm.rss += len(pages)
    entries[swapped] = mm.table.gather(pages)
