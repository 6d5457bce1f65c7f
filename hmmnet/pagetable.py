"""A page table of two levels that mean something: entries of pages (PTEs), and above them entries of aligned blocks of 512 (PMDs).

`SparseTable` has one word for each page. A huge page would be 512 of them that say the same, and whatever is done to one would be done 512
times. So a block that is mapped as one has *one* entry here, in `pmds`, as in Linux; the words of its pages are zero. What works on whole
huge pages works on `pmds`; one numpy operation there is worth 512 entries.

The methods of `SparseTable` are here too, and tell the truth page by page:

- Reading (`get`, `read`, `gather`, `occupied`, `readable`) shows a block as the 512 entries that it stands for: the frame counts up.
- Writing to a page of a block first *unfolds* it: the 512 words are written out, the PMD goes (what __split_huge_pmd does to a page table).
  It is only the representation that changes. `on_unfold` is told the entry, for who keeps books by huge page too.

So code that knows nothing of blocks stays right, and pays per page; code that does asks for blocks first, and for what is left then. `fold`
is the way back. Host page tables and device mirrors are this; they differ in where an entry has its frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .pages import HUGE_PAGES, HUGE_SHIFT, Words, ascending, distinct, is_one_run, runs_of, word_of
from .sparse import LEAF_MASK, LEAF_SHIFT, SparseTable

_MASK = HUGE_PAGES - 1
_SHIFT = word_of(HUGE_SHIFT)
EXPAND_BLOCKS = 32
"""Blocks that are shown page by page at a time: 128 KiB of words stay in the processor's cache."""
PTE, PMD = 1, HUGE_PAGES
"""Pages that an entry of each level stands for."""


class PageTable:
    """Entries have their frame from bit `frame_shift` on. A PMD with one of the bits `constant` leads to the same frame from all pages."""

    def __init__(self, frame_shift: int, constant: int = 0, on_unfold: Callable[[int], None] | None = None) -> None:
        self.ptes = SparseTable()
        """Page -> entry, for pages that have one of their own. Write by the methods here."""
        self.pmds = SparseTable()
        """Block number (page >> HUGE_SHIFT) -> entry. Change entries in place, but make and drop them by the methods here."""
        self.pmd_count = 0
        self._frame_shift = frame_shift
        self._constant = constant
        self._steps = np.arange(HUGE_PAGES, dtype=np.uint64) << np.uint64(frame_shift)
        self._on_unfold = on_unfold

    # --- blocks ---------------------------------------------------------------------------------------------------------------

    def pmd(self, page: int) -> int:
        """The entry of the block that holds `page`, if it is mapped as one, else 0."""
        return self.pmds.get(page >> HUGE_SHIFT) if self.pmd_count else 0

    def set_pmd(self, page: int, entry: int) -> None:
        """Map the block that begins at `page`, of which no page is mapped (or which is mapped as one), by `entry`."""
        self.pmd_count += not self.pmd(page)
        self.pmds.set(page >> HUGE_SHIFT, entry)

    def set_pmds(self, blocks: Words, entries: Words) -> None:
        """`set_pmd` for block numbers `blocks` (distinct)."""
        self.pmd_count += len(blocks) - (int(np.count_nonzero(self.pmds.gather(blocks))) if self.pmd_count else 0)
        self.pmds.scatter(blocks, entries)

    def take_pmds(self, blocks: Words) -> Words:
        """The entries of `blocks`, all mapped as one, which are empty afterwards."""
        entries = self.pmds.gather(blocks)
        self.pmds.scatter(blocks, 0)
        self.pmd_count -= len(blocks)
        return entries

    def blocks(self, start: int, end: int) -> Words:
        """The blocks wholly inside pages [start, end) that are mapped as one, ascending."""
        low, high = -(-start >> HUGE_SHIFT), end >> HUGE_SHIFT
        if not self.pmd_count or low >= high:
            return np.zeros(0, np.uint64)
        return self.pmds.occupied(low, high)

    def untouched(self, start: int, end: int) -> Words:
        """The blocks wholly inside pages [start, end) of which nothing is mapped, ascending."""
        low, high = -(-start >> HUGE_SHIFT), end >> HUGE_SHIFT
        if low >= high:
            return np.zeros(0, np.uint64)
        used = np.zeros(high - low, np.bool_)
        for first, part in self.pmds.existing(low, high) if self.pmd_count else ():
            used[first - low : first - low + len(part)] = part != 0
        if used.all():
            return np.zeros(0, np.uint64)
        for first, part in self.ptes.existing(low << HUGE_SHIFT, high << HUGE_SHIFT):
            at = (first >> HUGE_SHIFT) - low
            used[at : at + len(part) // HUGE_PAGES] |= np.bitwise_or.reduce(part.reshape(-1, HUGE_PAGES), axis=1) != 0
        return np.flatnonzero(~used).astype(np.uint64) + np.uint64(low)

    def parts(self, start: int, end: int) -> Iterator[tuple[int, Words, int]]:
        """What is mapped in [start, end), level by level: (first page, writable entries, pages that an entry stands for).

        Blocks that the range cuts are unfolded first. What clears an entry of a block must use `take_pmds` instead.
        """
        if self.pmd_count:
            self._unfold_edges(start, end)
            for first, part in self.pmds.present(start >> HUGE_SHIFT, -(-end >> HUGE_SHIFT)):
                yield first << HUGE_SHIFT, part, PMD
        for first, part in self.ptes.present(start, end):
            yield first, part, PTE

    def mark(self, pages: Words, entries: Words, bits: int) -> None:
        """Set `bits` in `entries`, those of `pages`, all mapped: in the one entry where a block is mapped as one."""
        mask = word_of(bits)
        if self.pmd_count:
            blocks = _blocks_of(pages)
            pmds = self.pmds.gather(blocks)
            folded = blocks[pmds != 0]
            if len(folded):
                self.pmds.scatter(folded, pmds[pmds != 0] | mask)
                small = ~np.isin(pages >> _SHIFT, folded)
                pages, entries = pages[small], entries[small]
        if len(pages):
            self.ptes.scatter(pages, entries | mask)

    def mark_one(self, page: int, entry: int) -> None:
        """`page` has `entry` now, which differs from before by bits that are not the frame."""
        if self.pmd_count and self.pmds.get(page >> HUGE_SHIFT):
            if not entry & self._constant:
                entry -= (page & _MASK) << self._frame_shift
            self.pmds.set(page >> HUGE_SHIFT, entry)
        else:
            self.ptes.set(page, entry)

    def expanded(self, entries: Words) -> Words:
        """The 512 entries that each PMD stands for, behind each other."""
        out = np.repeat(entries, HUGE_PAGES).reshape(-1, HUGE_PAGES)
        counting = entries & word_of(self._constant) == 0
        if counting.all():
            out += self._steps
        else:
            out[counting] += self._steps
        return out.reshape(-1)

    def unfold(self, page: int) -> None:
        """The block that holds `page` is mapped by 512 entries from now on, if it was by one."""
        entry = self.pmd(page)
        if entry:
            self.pmds.set(page >> HUGE_SHIFT, 0)
            self.pmd_count -= 1
            if self._on_unfold is not None:
                self._on_unfold(entry)
            self.ptes.write(page & ~_MASK, self.expanded(np.array([entry], np.uint64)))

    def fold(self, page: int, entry: int) -> None:
        """The block that begins at `page`, whose 512 entries `entry` stands for, is mapped by that one from now on."""
        self.ptes.clear(page, page + HUGE_PAGES)
        self.set_pmd(page, entry)

    def _unfold_edges(self, start: int, end: int) -> None:
        for edge in (start, end):
            if edge & _MASK:
                self.unfold(edge)

    def _unfold(self, start: int, end: int) -> None:
        """Everything that [start, end) touches has entries of its own from now on."""
        if self.pmd_count:
            for block in self.pmds.occupied(start >> HUGE_SHIFT, -(-end >> HUGE_SHIFT)).tolist():
                self.unfold(block << HUGE_SHIFT)

    def _unfold_pages(self, pages: Words) -> None:
        if self.pmd_count and len(pages):
            blocks = _blocks_of(pages)
            for block in blocks[self.pmds.gather(blocks) != 0].tolist():
                self.unfold(block << HUGE_SHIFT)

    # --- pages ----------------------------------------------------------------------------------------------------------------

    def get(self, page: int) -> int:
        """The entry of one page."""
        cells = self.ptes.cells.get(page >> LEAF_SHIFT)  # as `SparseTable.get`, without the call: every access asks
        entry: int = 0 if cells is None else cells[page & LEAF_MASK]
        if entry or not self.pmd_count:
            return entry
        pmd = self.pmds.get(page >> HUGE_SHIFT)
        return pmd if not pmd or pmd & self._constant else pmd + ((page & _MASK) << self._frame_shift)

    def numbers(self, pages: Sequence[int]) -> list[int]:
        """The entries of a few pages, one by one."""
        return [self.get(page) for page in pages] if self.pmd_count else self.ptes.numbers(pages)

    def set(self, page: int, value: int) -> None:
        """Write the entry of one page."""
        if self.pmd_count:
            self.unfold(page)
        self.ptes.set(page, value)

    def segments(self, start: int, end: int) -> Iterator[tuple[int, Words]]:
        """Writable views that together cover ``[start, end)``, each with its first page; blocks are unfolded, absent leaves made."""
        self._unfold(start, end)
        return self.ptes.segments(start, end)

    def present(self, start: int, end: int) -> Iterator[tuple[int, Words]]:
        """Like `segments`, in page order, but only where a leaf exists: safe for ``[0, PAGES_MAX)``."""
        self._unfold(start, end)
        return self.ptes.present(start, end)

    def view(self, start: int, end: int) -> Words | None:
        """A writable view of ``[start, end)`` when one leaf holds it, else None."""
        self._unfold(start, end)
        return self.ptes.view(start, end)

    def readable(self, start: int, end: int) -> Iterator[tuple[int, Words]]:
        """`segments` for reading only: nothing is unfolded, blocks come as copies."""
        done = start
        for first, part in self._expansions(start, end):
            if done < first:
                yield from self.ptes.readable(done, first)
            yield first, part
            done = first + len(part)
        if done < end:
            yield from self.ptes.readable(done, end)

    def _expansions(self, start: int, end: int) -> Iterator[tuple[int, Words]]:
        """The entries of [start, end) that lie in blocks, as copies, in page order."""
        if not self.pmd_count:
            return
        blocks = self.pmds.occupied(start >> HUGE_SHIFT, -(-end >> HUGE_SHIFT))
        for low, high in runs_of(blocks) if len(blocks) else ():
            for block in range(low, high, EXPAND_BLOCKS):
                stop = min(high, block + EXPAND_BLOCKS)
                first, last = block << HUGE_SHIFT, stop << HUGE_SHIFT
                part = self.expanded(self.pmds.read(block, stop))
                yield max(start, first), part[max(start, first) - first : min(end, last) - first]

    def read(self, start: int, end: int) -> Words:
        """A copy of the entries of ``[start, end)``."""
        out = self.ptes.read(start, end)
        for first, part in self._expansions(start, end):
            out[first - start : first - start + len(part)] = part
        return out

    def write(self, start: int, values: Words) -> None:
        """Write `values` from page `start` on."""
        self._unfold(start, start + len(values))
        self.ptes.write(start, values)

    def clear(self, start: int, end: int) -> None:
        """Zero ``[start, end)``; whole leaves are given back."""
        if self.pmd_count:
            if self._on_unfold is None:
                self.take_pmds(self.blocks(start, end))  # nobody keeps books: whole blocks need not be unfolded to be dropped
            self._unfold(start, end)
        self.ptes.clear(start, end)

    def gather(self, pages: Words, *, ascend: bool = False) -> Words:
        """The entries of `pages`, in their order. `ascend`: see `is_one_run`."""
        out = self.ptes.gather(pages, ascend=ascend)
        if self.pmd_count and int(np.count_nonzero(out)) < len(pages):
            empty = np.flatnonzero(out == 0)
            pmds = self.pmds.gather(pages[empty] >> _SHIFT)
            found = pmds != 0
            empty, pmds = empty[found], pmds[found]
            counting = pmds & word_of(self._constant) == 0
            out[empty] = pmds + np.where(counting, (pages[empty] & word_of(_MASK)) << word_of(self._frame_shift), word_of(0))
        return out

    def scatter(self, pages: Words, values: Words | int, *, ascend: bool = False) -> None:
        """Write `values` (one for each page, or one for all) at `pages`. `ascend`: see `is_one_run`."""
        if not isinstance(values, int) and is_one_run(pages, ascend=ascend):
            self.write(int(pages[0]), values)
            return
        self._unfold_pages(pages)
        self.ptes.scatter(pages, values, ascend=ascend)

    def occupied(self, start: int, end: int) -> Words:
        """The pages of [start, end) whose entry is not zero, ascending."""
        small = self.ptes.occupied(start, end)
        if not self.pmd_count:
            return small
        blocks = self.pmds.occupied(start >> HUGE_SHIFT, -(-end >> HUGE_SHIFT))
        if len(blocks) == 0:
            return small
        pages = ((blocks << _SHIFT)[:, np.newaxis] + np.arange(HUGE_PAGES, dtype=np.uint64)).reshape(-1)
        pages = pages[(pages >= np.uint64(start)) & (pages < np.uint64(end))]
        return ascending(np.concatenate((small, pages)))

    @property
    def leaf_count(self) -> int:
        """Leaves of the lower level that exist, each 1 GiB of addresses."""
        return self.ptes.leaf_count


def _blocks_of(pages: Words) -> Words:
    """The blocks that `pages` lie in, ascending, each once: neighbours are dropped before what is left is sorted."""
    blocks = pages >> _SHIFT
    if len(blocks) == 0:
        return blocks
    return distinct(blocks[np.concatenate(([True], blocks[1:] != blocks[:-1]))])
