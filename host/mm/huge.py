"""Huge pages: 2 MiB mapped as one, transparent (mm/huge_memory.c) or from a pool (mm/hugetlb.c).

Two properties make a huge page. Its frames are one aligned run that is allocated and freed together, marked `COMPOUND` (a large folio); its
entries are marked `HUGE` while the block is mapped as one (a PMD). What changes only a part has to *split* first:

- `split_entries` (__split_huge_pmd): the block is mapped page by page from then on, in this process. The frames stay one folio.
- `split_folio`: the frames are ordinary pages from then on, for everybody who maps them. Pages that hold only zeros become the
  shared zero page (h36). A folio that somebody holds on to cannot be split.

Mirrors are told CLEAR of the whole block before either.

**What it costs.** A huge page is one entry (`hmmnet.pagetable`: a PMD, the words of its pages being zero) and one state (`zones.py`: that
of the head frame, a *folded* folio). So mapping, unmapping, protecting, forking and migrating it is work for one page, here and in
`compound.py`. Both tables show huge pages frame by frame to whoever asks so, and *unfold* one to 512 equal entries and states when
somebody writes to a part, which changes nothing but the cost: all other code is as if there were small pages only, and the marks `HUGE` and
`COMPOUND` mean what they always did. One rule ties the two: what maps a frame of a folded folio maps the folio whole, by a PMD; a
PMD that is unfolded unfolds its folio. Measured before: 512 words for each huge page made its migration as dear as 512 small ones
(some 120 us each way), because each pass over an array is paid by the word, and a mask by block by the square.

A transparent huge page is made by the first access to an aligned block that lies in a VM_HUGEPAGE mapping whole and has no page table yet
(`Mm.small_blocks` are the blocks that have one): a store takes 512 frames, a load maps the huge zero page. A hugetlb mapping has nothing
else; it does not migrate and cannot be split. Huge pages of files, which processes share, are in `filehuge.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hmmnet.errors import KernelError
from hmmnet.pages import FEW, HUGE_PAGES, HUGE_SHIFT, PAGE_SIZE, ZERO_FRAME, Words, all_of, any_of, distinct, word_of

from . import filehuge, pte
from .filemap import File, ranges_of
from .frames import PhysicalMemory
from .mm import Mm
from .rmap import mappings, places
from .vma import VM_HUGEPAGE, VM_HUGETLB, VM_LOCKED, VM_NOHUGEPAGE, VM_SHARED, Vma
from .zones import ANON, COMPOUND

EAGAIN = 11
ENOMEM = 12
EINVAL = 22
HUGE_MASK = HUGE_PAGES - 1
HUGE_ZERO_ENTRY = pte.ZERO_ENTRY | pte.HUGE
"""The huge zero page, what a load maps; its frame is the zero page's, whose number is 0."""
_BLOCK = word_of(HUGE_MASK)


class Large(NamedTuple):
    """Something larger than a page, and how to split it once mirrors have been told CLEAR wherever it is mapped (by then: ask again)."""

    where: Callable[[], list[tuple[Mm, Words]]]
    """(process, pages); empty: tell wherever `file`'s pages are mapped."""
    split: Callable[[], object]
    file: tuple[File, int] | None = None
    """A file, and the first of its pages there."""


def block_of(page: int) -> int:
    """The first page of the aligned block that holds `page`."""
    return page & ~HUGE_MASK


def blocks_of(pages: Words) -> list[int]:
    """The first pages of the aligned blocks that hold some of `pages`, ascending."""
    found: list[int] = distinct(pages & ~_BLOCK).tolist()
    return found


def may_be_huge(vma: Vma) -> bool:
    """Whether faults in `vma` try for huge pages (thp_vma_allowable_order, where huge pages are given to those who ask: madvise)."""
    return vma.is_anonymous and bool(vma.flags & VM_HUGETLB or vma.flags & (VM_HUGEPAGE | VM_NOHUGEPAGE) == VM_HUGEPAGE)


def huge_blocks(mm: Mm, pages: Words) -> list[int]:
    """The blocks of `pages` that are mapped as one."""
    return blocks_of(pages[mm.table.gather(pages) & pte.HUGE != 0]) if len(pages) else []


def populate(mm: Mm, vma: Vma, pages: Words, *, write: bool, node: int) -> npt.NDArray[np.bool_]:
    """do_huge_pmd_anonymous_page for the blocks of `pages` (empty) that can be had whole; which of `pages` are there now.

    Raises KernelError(ENOMEM) when a hugetlb mapping finds no huge page, for which there is no other.
    """
    done = np.zeros(len(pages), np.bool_)
    for block in blocks_of(pages):
        inside = vma.start <= block and block + HUGE_PAGES <= vma.end
        free = bool(vma.flags & VM_HUGETLB) or block not in mm.small_blocks
        if inside and free and len(mm.table.untouched(block, block + HUGE_PAGES)) and _make(mm, vma, block, write=write, node=node):
            done |= (pages & ~_BLOCK) == block
        else:
            mm.small_blocks.add(block)
    return done


def _make(mm: Mm, vma: Vma, block: int, *, write: bool, node: int) -> bool:
    """Map `block` as one; False when there is no huge page for it."""
    if not write and not vma.flags & VM_HUGETLB:
        mm.table.set_pmd(block, HUGE_ZERO_ENTRY)
        return True
    head = mm.memory.allocate_folio(node, None if vma.flags & VM_HUGETLB else mm.cgroup)
    if head is None:
        if vma.flags & VM_HUGETLB:
            why = f"a huge page is wanted for page 0x{block:x} of process {mm.number} and the host has no 2 MiB in one piece"
            raise KernelError(ENOMEM, "page fault", why)
        return False
    map_made(mm, vma, block, head, write=write)
    return True


def map_made(mm: Mm, vma: Vma, block: int, head: int, *, write: bool) -> None:
    """Map the huge page `head`, which was just allocated, at `block`."""
    mm.anon_prepare(vma)
    mm.memory.map_new_folio(head, vma.anon, block - vma.start + vma.pgoff)
    bits = pte.FRESH_WRITE if write else pte.FRESH_WRITE & ~(pte.WRITE | pte.DIRTY | pte.SOFT_DIRTY)
    mm.table.set_pmd(block, pte.entry(pte.PRESENT, head, bits | pte.HUGE))
    mm.rss += HUGE_PAGES


def alone(mm: Mm, entries: Words) -> npt.NDArray[np.bool_]:
    """Which `entries` are of huge pages that nobody else has, no part of them: only those are made writable in place."""
    heads = pte.frames_of(entries) & ~_BLOCK
    out = np.zeros(len(entries), np.bool_)
    for head in np.unique(heads).tolist():
        frames = np.arange(head, head + HUGE_PAGES, dtype=np.uint64)
        out[heads == head] = all_of(mm.memory.field(frames, "refcount") == 1)
    return out


# --- whole --------------------------------------------------------------------------------------------------------------------


def zap(mm: Mm, blocks: Words) -> None:
    """zap_huge_pmd: drop the huge pages mapped at `blocks` (numbers, of blocks that are mapped as one)."""
    entries = mm.table.take_pmds(blocks)
    counted = entries & pte.SPECIAL == 0
    mm.rss -= int(np.count_nonzero(counted)) * HUGE_PAGES
    mapped = counted & (entries & pte.KIND != pte.MIGRATION)
    if any_of(mapped):
        mm.memory.unmap_folios(pte.frames_of(entries[mapped]))


def share(parent: Mm, child: Mm, vma: Vma, blocks: Words) -> None:
    """copy_huge_pmd: the huge pages at `blocks` of `vma` are the child's, too, except those that somebody may have pinned, which are left.

    Who is left is told one by one from then on, so it has entries of its own.
    """
    entries = parent.table.pmds.gather(blocks)
    counted = entries & pte.SPECIAL == 0
    whole = ~counted
    whole[counted] = parent.memory.folded(pte.frames_of(entries[counted]))
    for block in blocks[~whole].tolist():
        parent.table.unfold(block << HUGE_SHIFT)
    blocks, entries, counted = blocks[whole], entries[whole], counted[whole]
    shared = entries
    if not vma.flags & VM_SHARED:
        shared = entries & ~word_of(pte.WRITE | pte.ANON_EXCLUSIVE)
        shared[entries & (pte.KIND | pte.WRITE) == pte.DEVICE | pte.WRITE] &= ~word_of(pte.SOFT_DIRTY)
    parent.table.pmds.scatter(blocks, shared)
    child.table.set_pmds(blocks, shared & ~word_of(pte.YOUNG))
    parent.memory.share_folios(pte.frames_of(entries[counted]))
    child.rss += int(np.count_nonzero(counted)) * HUGE_PAGES


# --- splitting --------------------------------------------------------------------------------------------------------------------


def split_entries(mm: Mm, block: int) -> None:
    """__split_huge_pmd: the pages of `block` are mapped one by one; those of a file not at all. Mirrors were told."""
    entries = mm.table.read(block, block + HUGE_PAGES)
    if entries[0] & pte.KIND == pte.PRESENT and mm.memory.files.get(int(mm.memory.field(pte.frames_of(entries[:1]), "mapping")[0])):
        mm.table.clear(block, block + HUGE_PAGES)
        mm.rss -= HUGE_PAGES
        mm.memory.unmap(pte.frames_of(entries))
        return
    for _, part in mm.table.segments(block, block + HUGE_PAGES):
        part &= ~word_of(pte.HUGE)
    mm.small_blocks.add(block)


def large(mm: Mm, pages: Words, *, compound: bool = False, parts_stay: bool = False) -> list[Large]:
    """What has to be split before `pages` can migrate: their large folios, and the huge zero page. With `compound`, not what goes whole.

    With `parts_stay`, not folios that are mapped page by page.
    """
    if len(pages) <= FEW and not _may_be_large(mm, mm.table.numbers(pages.tolist())):
        return []
    entries = mm.table.gather(pages, ascend=True)
    if parts_stay:
        whole = entries & pte.HUGE != 0
        pages, entries = pages[whole], entries[whole]
    if compound and np.count_nonzero(entries & pte.HUGE):
        blocks, counts = np.unique(pages[entries & pte.HUGE != 0] & ~_BLOCK, return_counts=True)
        apart = ~np.isin(pages & ~_BLOCK, blocks[counts == HUGE_PAGES])
        pages, entries = pages[apart], entries[apart]
    if not (any_of(entries & (pte.KIND | pte.HUGE) == pte.PRESENT | pte.HUGE) or mm.small_blocks):
        return []
    memory = mm.memory
    zeros = blocks_of(pages[entries & (pte.SPECIAL | pte.HUGE) == pte.SPECIAL | pte.HUGE])
    found = [Large(partial(_block_at, mm, block), partial(split_entries, mm, block)) for block in zeros]
    frames = pte.frames_of(entries[(entries & (pte.KIND | pte.SPECIAL) == pte.PRESENT) & (entries < pte.DEVICE_MIN)])
    heads = np.array(blocks_of(frames[memory.field(frames, "flags") & COMPOUND != 0]), np.uint64)
    of_file = filehuge.is_of_file(memory, heads)
    found += [Large(partial(_places, memory, head), partial(_split_file, *_file_of(memory, head))) for head in heads[of_file].tolist()]
    found += [Large(partial(_mapped_at, memory, head), partial(split_folio, memory, head)) for head in heads[~of_file].tolist()]
    return found


def _may_be_large(mm: Mm, entries: Sequence[int]) -> bool:
    """Whether any of a few `entries` belongs to a huge page, or leads to host memory where some are parts of large folios."""
    bits = 0
    for entry in entries:
        bits |= entry
    if bits & pte.HUGE or not mm.small_blocks:
        return bits & pte.HUGE != 0
    return any(entry & pte.KIND == pte.PRESENT and entry < pte.DEVICE_MIN for entry in entries)


def _folio(memory: PhysicalMemory, head: int) -> Words:
    """The frames of the folio with this head; without those that its mapper has let go of, which may be anybody's by now."""
    frames = np.arange(head, head + HUGE_PAGES, dtype=np.uint64)
    of_it: Words = frames[memory.field(frames, "flags") & COMPOUND != 0]
    return of_it


def _block_at(mm: Mm, block: int) -> list[tuple[Mm, Words]]:
    """`Large.where` of what only one process maps as one."""
    return [(mm, np.arange(block, block + HUGE_PAGES, dtype=np.uint64))]


def _places(memory: PhysicalMemory, head: int) -> list[tuple[Mm, Words]]:
    """`Large.where` of a file's: wherever its pages are mapped, whether they are there or not."""
    return list(places(memory, _folio(memory, head)))


def _mapped_at(memory: PhysicalMemory, head: int) -> list[tuple[Mm, Words]]:
    """`Large.where` of anonymous memory."""
    return [(mapped.mm, mapped.pages) for mapped in mappings(memory, _folio(memory, head))]


def in_part(mm: Mm, start: int, end: int) -> list[Large]:
    """The large folios of which [start, end) holds a part, and which no other process maps (folio_likely_mapped_shared)."""
    pages = mm.table.ptes.occupied(start, end)
    edges = sorted({block_of(edge) for edge in (start, end) if edge & HUGE_MASK and mm.table.pmd(edge)})
    cut = [np.arange(max(start, block), min(end, block + HUGE_PAGES), dtype=np.uint64) for block in edges]
    pages = np.concatenate((pages, *cut))
    entries = mm.table.gather(pages)
    frames = pte.frames_of(entries[(entries & (pte.KIND | pte.SPECIAL) == pte.PRESENT) & (entries < pte.DEVICE_MIN)])
    memory = mm.memory
    if not memory.bits_in_any(frames, "flags") & COMPOUND:
        return []
    frames = frames[memory.field(frames, "flags") & COMPOUND != 0]
    heads, first, counts = np.unique(frames & ~_BLOCK, return_index=True, return_counts=True)
    found = []
    for head, frame in zip(heads[counts < HUGE_PAGES].tolist(), frames[first[counts < HUGE_PAGES]].tolist(), strict=True):
        mapped = _mapped_at(memory, head)
        if mapped and all(by is mm for by, _ in mapped):
            found.append(Large(partial(_mapped_at, memory, head), partial(split_folio, memory, head)))
        elif (
            not mapped
            and filehuge.is_of_file(memory, np.array([frame], np.uint64))[0]
            and memory.most(_folio(memory, head), "mapcount") == 1
        ):
            of = _file_of(memory, head)
            found.append(Large(list, partial(_split_file, *of), of))
    return found


def split_folio(memory: PhysicalMemory, head: int) -> bool:
    """split_folio: the pages of the folio at frame `head` are ordinary ones. False, nothing done, when somebody holds one, or it is gone.

    Mirrors of everybody who maps it were told. Pages of zeros become the zero page where they are mapped, unless they are locked there
    (remap_page with RMP_USE_SHARED_ZEROPAGE), and unless mirrors hear of this only afterwards: one may be writing there at this moment.
    """
    frames = _folio(memory, head)
    if len(frames) == 0 or any_of(memory.field(frames, "refcount") > memory.field(frames, "mapcount")):
        return False
    found = list(mappings(memory, frames))
    data = np.empty(len(frames) * PAGE_SIZE, np.uint8)
    memory.read(frames, 0, data)
    empty = np.logical_not(np.any(data.view(np.uint64).reshape(len(frames), -1), axis=1)) & (memory.gather is None)
    for zone, _, at in memory.groups(frames):
        zone.flags[at] &= ~np.uint32(COMPOUND)
    for mapped in found:
        mm, pages = mapped.mm, mapped.pages
        mm.small_blocks.update(blocks_of(pages))
        entries = mapped.entries & ~word_of(pte.HUGE)
        zeros = empty[mapped.rows] & _unlocked(mm, pages) & (entries & pte.KIND == pte.PRESENT)
        entries[zeros] = pte.entry(pte.PRESENT, ZERO_FRAME, pte.ZERO_ENTRY)
        mm.table.scatter(pages, entries)
        mm.rss -= int(np.count_nonzero(zeros))
        memory.unmap(frames[mapped.rows[zeros]])
    return True


def _file_of(memory: PhysicalMemory, head: int) -> tuple[File, int]:
    """Of which file the folio at frame `head` is, and its first page there."""
    mapping, index = memory.fields(np.array([head], np.uint64), "mapping", "index")
    return memory.files[int(mapping[0])], int(index[0])


def _split_file(file: File, first: int) -> bool:
    """split_folio for the one at page `first` of a file: it is unmapped everywhere, and its pages are ordinary ones of the page cache.

    Mirrors of everybody who maps it were told. False, nothing done, when it has been split, or somebody holds on to a page.
    """
    if first >> HUGE_SHIFT not in file.blocks:
        return False
    refcount, mapcount = file.memory.fields(file.cached(filehuge.offsets_of(first >> HUGE_SHIFT)), "refcount", "mapcount")
    if any_of(refcount > mapcount + 1):
        return False
    for space in file.mappers.values():
        for _, low, high in ranges_of(space.mm, file, first, first + HUGE_PAGES):
            drop_file_pages(space.mm, low, high)
    file.split(first >> HUGE_SHIFT)
    return True


def drop_file_pages(mm: Mm, low: int, high: int) -> None:
    """try_to_unmap for pages of a file in [low, high), which lies in one VMA; copies that the process has made of them stay."""
    pages = mm.table.occupied(low, high)
    entries = mm.table.gather(pages)
    of_file = pte.is_present(entries) & (entries & pte.SPECIAL == 0)
    of_file[of_file] = mm.memory.field(pte.frames_of(entries[of_file]), "flags") & ANON == 0
    mm.table.scatter(pages[of_file], 0)
    mm.rss -= int(np.count_nonzero(of_file))
    mm.memory.unmap(pte.frames_of(entries[of_file]))


def _unlocked(mm: Mm, pages: Words) -> npt.NDArray[np.bool_]:
    """Which of `pages` lie in VMAs that are not VM_LOCKED."""
    out = np.ones(len(pages), np.bool_)
    for vma in _vmas_of(mm, pages):
        if vma.flags & VM_LOCKED:
            out &= (pages < np.uint64(vma.start)) | (pages >= np.uint64(vma.end))
    return out


def _vmas_of(mm: Mm, pages: Words) -> Iterator[Vma]:
    yield from mm.vmas.overlapping(int(pages.min()), int(pages.max()) + 1) if len(pages) else ()


# --- copying ----------------------------------------------------------------------------------------------------------------------


def break_cow(mm: Mm, vma: Vma, block: int) -> None:
    """do_huge_pmd_wp_page, hugetlb_wp: a store to a huge page that is not the process's own. Mirrors of the block were told.

    The huge zero page becomes a huge page, or is split if there is none. A page of a hugetlb mapping is copied whole; any other is mapped
    page by page, and copied so. Raises KernelError(ENOMEM) for hugetlb.
    """
    entry = mm.table.get(block)
    if not entry & pte.HUGE:
        return
    if entry & pte.SPECIAL:
        mm.table.clear(block, block + HUGE_PAGES)
        if not _make(mm, vma, block, write=True, node=mm.node):
            mm.table.write(block, np.full(HUGE_PAGES, pte.ZERO_ENTRY, np.uint64))
            mm.small_blocks.add(block)
    elif vma.flags & VM_HUGETLB:
        before = mm.table.read(block, block + HUGE_PAGES)
        old = pte.frames_of(before)
        mm.table.clear(block, block + HUGE_PAGES)
        try:
            _make(mm, vma, block, write=True, node=mm.node)
        except KernelError:
            mm.table.write(block, before)
            raise
        mm.rss -= HUGE_PAGES
        mm.memory.copy(old, pte.frames_of(mm.table.read(block, block + HUGE_PAGES)))
        mm.memory.unmap(old)
    else:
        split_entries(mm, block)
