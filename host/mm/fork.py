"""Copying an address space at fork (mm/memory.c copy_page_range, kernel/fork.c dup_mmap), over arrays.

Nothing is copied but entries: both processes map the same frames, read-only, and neither has a page alone any more; the first store of
either copies. Device-private pages are shared the same way (a page that is on the device stays there), and lose soft-dirty. The
exception is a page that somebody has pinned: the pin must go on seeing what its process writes, so the child gets a copy at once (h58).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hmmnet.pages import HUGE_SHIFT, Words, any_of, word_of

from . import huge, pte
from .mm import Mm
from .vma import VM_DONTCOPY, VM_LOCKED, VM_MAYBE_GUARD, VM_SHARED, VM_SPECIAL, VM_UFFD_MISSING, VM_WIPEONFORK, VM_WRITE, Vma

ENOMEM = 12
HUGE_BITS = word_of(HUGE_SHIFT)


def inherit(child: Mm, vma: Vma) -> Vma | None:
    """The child's VMA for the parent's `vma`, inserted; None when it is not inherited. `needs_copy` tells whether entries follow."""
    if vma.flags & VM_DONTCOPY:
        return None
    copied = replace(vma, flags=vma.flags & ~(VM_LOCKED | VM_UFFD_MISSING), anon=0, chain=(), userfault=None)
    if vma.anon and needs_copy(vma):
        copied.anon, copied.chain = child.memory.new_anon_vma(child.family), (vma.anon, *vma.chain)
    child.vmas.add(copied)
    return copied


def needs_copy(vma: Vma) -> bool:
    """vma_needs_copy: without anonymous pages a child can fault in by itself what is there, but for guards and what a driver inserted."""
    return bool(vma.anon or vma.flags & (VM_SPECIAL | VM_MAYBE_GUARD)) and not vma.flags & (VM_DONTCOPY | VM_WIPEONFORK)


def copy_entries(parent: Mm, child: Mm, vma: Vma) -> None:
    """copy_page_range for one VMA of the parent. There must be no migration and no exclusive entries. Raises KernelError(ENOMEM)."""
    blocks = parent.table.blocks(vma.start, vma.end)
    if len(blocks):
        huge.share(parent, child, vma, blocks)
    for first, part in parent.table.ptes.present(vma.start, vma.end):
        pages = part.nonzero()[0].astype(np.uint64)
        if len(pages):
            where = pages.astype(np.intp)
            theirs = _share(parent, child, vma, part, where, pages + np.uint64(first))
            child.table.scatter(pages + np.uint64(first), theirs)


def _share(parent: Mm, child: Mm, vma: Vma, part: Words, where: np.ndarray[tuple[int], np.dtype[np.intp]], pages: Words) -> Words:
    """Make the entries at ``part[where]`` shared; the child's entries for them. Raises KernelError(ENOMEM): then nothing has changed."""
    entries = part[where]
    kinds = pte.kinds_of(entries)
    swapped = kinds == pte.SWAP
    counted = (entries & pte.SPECIAL == 0) & (kinds != pte.MARKER) & ~swapped
    pinned = counted & pte.is_present(entries) & (entries & pte.ANON_EXCLUSIVE != 0)
    if any_of(pinned):
        pinned[pinned] = parent.memory.field(pte.frames_of(entries[pinned]), "pincount") > 0
    torn = np.isin(pages >> HUGE_BITS, pages[pinned & (entries & pte.HUGE != 0)] >> HUGE_BITS)
    if any_of(torn):  # __split_huge_pmd, for the sake of the pinned ones
        entries[torn] &= ~word_of(pte.HUGE)
        parent.small_blocks.update(huge.blocks_of(pages[torn]))
    copies = _copies(parent, child, vma, entries[pinned], pages[pinned]) if any_of(pinned) else None
    if any_of(swapped):
        parent.memory.swap.share(pte.frames_of(entries[swapped]))
    lost = (entries & (pte.KIND | pte.WRITE)) == pte.DEVICE | pte.WRITE
    shared = entries.copy() if vma.flags & VM_SHARED else entries & ~word_of(pte.WRITE | pte.ANON_EXCLUSIVE)
    shared[lost] &= ~word_of(pte.SOFT_DIRTY)
    part[where] = np.where(pinned, entries, shared)
    for zone, _, at in parent.memory.groups(pte.frames_of(entries[counted & ~pinned])):
        zone.refcount[at] += 1
        zone.mapcount[at] += 1
    child.rss += int(np.count_nonzero(counted))
    theirs = shared & ~word_of(pte.YOUNG)
    if copies is not None:
        theirs[pinned] = copies
    return theirs


def _copies(parent: Mm, child: Mm, vma: Vma, entries: Words, pages: Words) -> Words:
    """copy_present_page: pages of the child's own, with the same bytes."""
    frames = parent.memory.allocate_charged(child.cgroup, len(entries), parent.node, slice(0, len(entries)))
    if frames is None:
        raise child.out_of_memory("fork", pages)
    parent.memory.copy(pte.frames_of(entries), frames)
    heir = child.vmas.find(int(pages[0]))
    assert heir is not None, "entries are copied into an inherited VMA"
    parent.memory.map_new(frames, heir.anon, child.anon_index(heir, pages))
    return pte.entries_of(pte.PRESENT, frames, pte.DIRTY | pte.ANON_EXCLUSIVE | (pte.WRITE if vma.flags & VM_WRITE else 0))
