"""A table with one uint64 for each virtual page of a 47-bit address space, that costs memory only where it was written.

Linux keeps four levels of 4 KiB tables; a walk there is a few dependent loads. Here a walk is Python, so the table has *two*
levels: a dictionary, and leaves of 2**18 entries (1 GiB of addresses) that are anonymous mappings. The operating system commits a leaf
512 entries at a time, which is exactly the coverage of a kernel PTE page: a 16 GiB mapping of which ten pages were touched costs ten
4 KiB pages and sixteen empty mappings.

A range operation is one numpy operation for each leaf it crosses, and so is one on consecutive pages of a list, which most lists are: a
slice does in a tenth of the time what a fancy index would. Host page tables, device mirrors and IOMMU domains are all this.

Each leaf remembers which of its blocks of 512 entries were ever written, so that looking for what there is costs what there is; and which
may have been written since somebody last asked (`take_touched`), so that whoever checks a table need not look at all of it each time. Both
are one mark, so that those who write pay once.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from itertools import pairwise, repeat

import numpy as np
import numpy.typing as npt

from hmmnet.pages import FEW, Words, is_one_run, word_of

MAP_NORESERVE = 0x4000
LEAF_SHIFT = 18
LEAF_PAGES = 1 << LEAF_SHIFT
LEAF_MASK = LEAF_PAGES - 1
BLOCK_SHIFT = 9
BLOCK_PAGES = 1 << BLOCK_SHIFT
BLOCKS = LEAF_PAGES >> BLOCK_SHIFT
_BLOCK_MASK = (1 << BLOCK_SHIFT) - 1
WRITTEN, TOUCHED = 1, 3
"""Marks of a block: it was written at some time; and, beside that, since `take_touched`."""
_MARK = bytes([0, *[TOUCHED] * 255])
"""Of marks: what they are once everything that was ever written may have been written again."""
_NO_PAGES = np.zeros(0, np.uint64)
_NOTHING: AbstractSet[int] = frozenset()
DENSE_PAGES = 8
"""Pages written for each block of a stretch from which on all of it is marked: cheaper than to mark block by block."""
SCANNED_MAX = 16 << BLOCK_SHIFT
"""Entries that are looked at one by one before it pays to ask which blocks were written."""


def lazy_words(count: int) -> Words:
    """`count` zero uint64 that the operating system commits on first write, 512 at a time.

    Private, because reading shared anonymous memory commits it; and no huge pages, which would commit a whole leaf at once.
    """
    reserved = mmap.mmap(-1, count * 8, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        reserved.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(reserved, dtype=np.uint64)


class SparseTable:
    """Page number -> uint64, zero where nothing was written."""

    def __init__(self) -> None:
        self._leaves: dict[int, Words] = {}
        self.cells: dict[int, memoryview] = {}
        """The same leaves, for single entries: a plain number in or out in a third of the time. For who writes, `set` is the way."""
        self._written: dict[int, bytearray] = {}
        """The mark of each block of a leaf: `WRITTEN`, `TOUCHED`, or 0."""
        self._dropped: set[int] = set()
        """Leaves that were given back since `take_touched`."""
        self.changed = False
        """Whether anything may have been written, or given back, since `take_touched`: mostly nothing was."""

    def get(self, page: int) -> int:
        """The entry of one page."""
        cells = self.cells.get(page >> LEAF_SHIFT)
        entry: int = 0 if cells is None else cells[page & LEAF_MASK]
        return entry

    def numbers(self, pages: Iterable[int]) -> list[int]:
        """The entries of a few pages, one by one."""
        cells = self.cells
        return [0 if (leaf := cells.get(page >> LEAF_SHIFT)) is None else leaf[page & LEAF_MASK] for page in pages]

    def set(self, page: int, value: int) -> None:
        """Write the entry of one page."""
        cells = self.cells.get(page >> LEAF_SHIFT)
        if cells is None:
            self._leaf(page >> LEAF_SHIFT)
            cells = self.cells[page >> LEAF_SHIFT]
        cells[page & LEAF_MASK] = value
        self._written[page >> LEAF_SHIFT][(page & LEAF_MASK) >> BLOCK_SHIFT] = TOUCHED
        self.changed = True

    def _leaf(self, key: int) -> Words:
        leaf = self._leaves.get(key)
        if leaf is None:
            leaf = self._leaves[key] = lazy_words(LEAF_PAGES)
            self.cells[key] = memoryview(leaf.data)
            self._written[key] = bytearray(BLOCKS)
        return leaf

    def _part(self, start: int, end: int) -> Words:
        """A view of ``[start, end)``, inside one leaf, that will be written."""
        key, first, last = start >> LEAF_SHIFT, start & LEAF_MASK, end - 1 & LEAF_MASK
        leaf = self._leaf(key)
        low, high = first >> BLOCK_SHIFT, (last >> BLOCK_SHIFT) + 1
        self._written[key][low:high] = b"\3" * (high - low)
        self.changed = True
        return leaf[first : last + 1]

    def segments(self, start: int, end: int) -> Iterator[tuple[int, Words]]:
        """Writable views that together cover ``[start, end)``, each with its first page; absent leaves are made."""
        while start < end:
            stop = min(end, (start | LEAF_MASK) + 1)
            yield start, self._part(start, stop)
            start = stop

    def readable(self, start: int, end: int) -> Iterator[tuple[int, Words]]:
        """Like `segments`, for who does not write: zeros where there is no leaf."""
        while start < end:
            stop = min(end, (start | LEAF_MASK) + 1)
            leaf = self._leaves.get(start >> LEAF_SHIFT)
            yield start, np.zeros(stop - start, np.uint64) if leaf is None else leaf[start & LEAF_MASK : (stop - 1 & LEAF_MASK) + 1]
            start = stop

    def present(self, start: int, end: int) -> Iterator[tuple[int, Words]]:
        """Like `segments`, in page order, but only where a leaf exists: safe for ``[0, PAGES_MAX)``. Entries that are zero must stay so."""
        for low, part in self.existing(start, end):
            self._mark_written(low >> LEAF_SHIFT, low & LEAF_MASK, low + len(part) - 1 & LEAF_MASK)
            yield low, part

    def _mark_written(self, key: int, first: int, last: int) -> None:
        """Entries from `first` to `last` of a leaf may be written, but for those that are zero."""
        marks = self._written[key]
        blocks = slice(first >> BLOCK_SHIFT, (last >> BLOCK_SHIFT) + 1)
        marks[blocks] = marks[blocks].translate(_MARK)
        self.changed = True

    def existing(self, start: int, end: int) -> Iterator[tuple[int, Words]]:
        """Like `present`, for who does not write."""
        for key in self._keys(start, end):
            low = max(start, key << LEAF_SHIFT)
            high = min(end, (key + 1) << LEAF_SHIFT)
            if low < high:
                yield low, self._leaves[key][low & LEAF_MASK : (high - 1 & LEAF_MASK) + 1]

    def _keys(self, start: int, end: int) -> list[int]:
        """The leaves of [start, end) that exist, in order."""
        first, last = start >> LEAF_SHIFT, (end - 1) >> LEAF_SHIFT
        if first == last:
            return [first] if first in self._leaves else []
        if last - first < len(self._leaves):
            return [key for key in range(first, last + 1) if key in self._leaves]
        return sorted(key for key in self._leaves if first <= key <= last)

    def view(self, start: int, end: int) -> Words | None:
        """A writable view of ``[start, end)`` when one leaf holds it, else None."""
        if start >> LEAF_SHIFT != (end - 1) >> LEAF_SHIFT:
            return None
        return self._part(start, end)

    def read(self, start: int, end: int) -> Words:
        """A copy of the entries of ``[start, end)``."""
        if start >> LEAF_SHIFT == (end - 1) >> LEAF_SHIFT:
            leaf = self._leaves.get(start >> LEAF_SHIFT)
            if leaf is not None:
                return leaf[start & LEAF_MASK : (end - 1 & LEAF_MASK) + 1].copy()
            return np.zeros(end - start, np.uint64)
        out = np.zeros(end - start, dtype=np.uint64)
        for first, part in self.existing(start, end):
            out[first - start : first - start + len(part)] = part
        return out

    def write(self, start: int, values: Words) -> None:
        """Write `values` from page `start` on."""
        end = start + len(values)
        if start >> LEAF_SHIFT == (end - 1) >> LEAF_SHIFT:
            self._part(start, end)[:] = values
            return
        done = 0
        for _, part in self.segments(start, end):
            part[:] = values[done : done + len(part)]
            done += len(part)

    def clear(self, start: int, end: int) -> None:
        """Zero ``[start, end)``; whole leaves are given back."""
        key = start >> LEAF_SHIFT
        if key == (end - 1) >> LEAF_SHIFT and end - start < LEAF_PAGES:
            if key in self._leaves and start < end:
                self._clear(key, start & LEAF_MASK, (end - 1 & LEAF_MASK) + 1)
            return
        for first, part in list(self.present(start, end)):
            if len(part) == LEAF_PAGES:
                del self._leaves[first >> LEAF_SHIFT], self.cells[first >> LEAF_SHIFT], self._written[first >> LEAF_SHIFT]
                self._dropped.add(first >> LEAF_SHIFT)
                self.changed = True
            else:
                part[:] = 0

    def _clear(self, key: int, first: int, end: int) -> None:
        """Zero entries [first, end) of a leaf: those of the blocks that were ever written, which the others need not be made for."""
        marks = self._written[key]
        low, high = first >> BLOCK_SHIFT, (end - 1 >> BLOCK_SHIFT) + 1
        if high - low == 1:
            if marks[low] and any(self.cells[key][first:end]):  # where nothing is, nobody has to look again
                marks[low] = TOUCHED
                self.changed = True
                self._leaves[key][first:end] = 0
        elif any(marks[low:high]):
            self._mark_written(key, first, end - 1)
            self._leaves[key][first:end] = 0

    def gather(self, pages: Words, *, ascend: bool = False) -> Words:
        """The entries of `pages`, in their order. `ascend`: see `is_one_run`."""
        if is_one_run(pages, ascend=ascend):
            return self.read(int(pages[0]), int(pages[-1]) + 1)
        if len(pages) <= FEW:
            return np.array(self.numbers(pages.tolist()), np.uint64)
        out = np.zeros(len(pages), dtype=np.uint64)
        offsets = (pages & word_of(LEAF_MASK)).view(np.intp)
        for key, here in _by_leaf(pages, ascend=ascend):
            leaf = self._leaves.get(key)
            if leaf is not None:
                out[here] = leaf[offsets[here]]
        return out

    def scatter(self, pages: Words, values: Words | int, *, ascend: bool = False) -> None:
        """Write `values` (one for each page, or one for all) at `pages`. `ascend`: see `is_one_run`."""
        if is_one_run(pages, ascend=ascend):
            done = 0
            for _, part in self.segments(int(pages[0]), int(pages[-1]) + 1):
                part[:] = values if isinstance(values, int) else values[done : done + len(part)]
                done += len(part)
            return
        if len(pages) <= FEW:
            for page, value in zip(pages.tolist(), repeat(values, len(pages)) if isinstance(values, int) else values.tolist(), strict=True):
                self.set(page, value)
            return
        offsets = (pages & word_of(LEAF_MASK)).view(np.intp)
        for key, here in _by_leaf(pages, ascend=ascend):
            at = offsets[here]
            self._leaf(key)[at] = values if isinstance(values, int) else values[here]
            low, high = (int(at[0]) >> BLOCK_SHIFT, (int(at[-1]) >> BLOCK_SHIFT) + 1) if ascend else (0, BLOCKS)
            if len(at) >= (high - low) * DENSE_PAGES:
                self._written[key][low:high] = b"\3" * (high - low)
            else:
                np.frombuffer(self._written[key], np.uint8)[at >> BLOCK_SHIFT] = TOUCHED
        self.changed = True

    def occupied(self, start: int, end: int) -> Words:
        """The pages of [start, end) whose entry is not zero, ascending."""
        found = [
            self._occupied(key, max(start - (key << LEAF_SHIFT), 0), min(end - (key << LEAF_SHIFT), LEAF_PAGES))
            for key in self._keys(start, end)
        ]
        return found[0] if len(found) == 1 else np.concatenate(found) if found else np.zeros(0, np.uint64)

    def _occupied(self, key: int, low: int, high: int) -> Words:
        """`occupied` for entries [low, high) of one leaf."""
        leaf, base = self._leaves[key], word_of(key << LEAF_SHIFT)
        if high - low > SCANNED_MAX:
            blocks = np.frombuffer(self._written[key], np.uint8).nonzero()[0]
            if len(blocks) <= FEW:
                return self._occupied_in(key, blocks.tolist(), low, high)
            if len(blocks) < BLOCKS // 4:
                inside = leaf.reshape(BLOCKS, -1)[blocks].reshape(-1).nonzero()[0]
                offsets = (blocks[inside >> BLOCK_SHIFT] << BLOCK_SHIFT) + (inside & _BLOCK_MASK)
                if low or high < LEAF_PAGES:
                    offsets = offsets[(offsets >= low) & (offsets < high)]
                found: Words = offsets.astype(np.uint64) + base
                return found
        scanned = leaf[low:high].nonzero()[0]
        scanned += (key << LEAF_SHIFT) + low
        return scanned.view(np.uint64)

    def _occupied_in(self, key: int, blocks: list[int], low: int, high: int) -> Words:
        """`_occupied`, of a few blocks."""
        leaf, found = self._leaves[key], []
        for block in blocks:
            first, end = block << BLOCK_SHIFT, block + 1 << BLOCK_SHIFT
            if first < low:
                first = low
            at = leaf[first : min(high, end)].nonzero()[0]
            if len(at):
                at += (key << LEAF_SHIFT) + first
                found.append(at.view(np.uint64))
        return found[0] if len(found) == 1 else np.concatenate(found) if found else _NO_PAGES

    # --- for who checks the table ---------------------------------------------------------------------------------------------------

    def take_touched(self) -> tuple[list[tuple[int, Words]], AbstractSet[int]]:
        """What may have been written since the last call: (first page, entries) of blocks, to read; and leaves that were given back.

        For one who asks: whoever asks next is told of what comes after.
        """
        blocks: list[tuple[int, Words]] = []
        if not self.changed:
            return blocks, _NOTHING
        self.changed = False
        for key, marks in self._written.items():
            at = marks.find(TOUCHED)
            while at >= 0:
                marks[at] = WRITTEN
                first = at << BLOCK_SHIFT
                blocks.append(((key << LEAF_SHIFT) + first, self._leaves[key][first : first + BLOCK_PAGES]))
                at = marks.find(TOUCHED, at + 1)
        dropped = self._dropped
        if dropped:
            self._dropped = set()
        return blocks, dropped

    def take_touched_pages(self) -> Words:
        """The pages with an entry in those blocks, in no order."""
        if not self.changed:
            return _NO_PAGES
        touched, _ = self.take_touched()
        found = []
        for first, entries in touched:
            at = entries.nonzero()[0]
            if len(at):
                found.append(at.astype(np.uint64) + word_of(first))
        return found[0] if len(found) == 1 else np.concatenate(found) if found else _NO_PAGES

    def touch(self) -> None:
        """Everything may have been written, for who asks next."""
        for key, marks in self._written.items():
            self._written[key] = marks.translate(_MARK)
        self.changed = True

    @property
    def leaf_count(self) -> int:
        """Leaves that exist, each 1 GiB of addresses."""
        return len(self._leaves)


def _by_leaf(pages: Words, *, ascend: bool) -> Iterator[tuple[int, slice | npt.NDArray[np.bool_]]]:
    """Keys of the leaves that `pages` lie in, and which pages those are: slices when the pages ascend, as they mostly do."""
    if len(pages) == 0:
        return
    if ascend and int(pages[0]) >> LEAF_SHIFT == int(pages[-1]) >> LEAF_SHIFT:
        yield int(pages[0]) >> LEAF_SHIFT, slice(0, len(pages))
        return
    keys = pages >> word_of(LEAF_SHIFT)
    changes = (keys[1:] != keys[:-1]).nonzero()[0] + 1
    if len(changes) == 0:
        yield int(keys[0]), slice(0, len(keys))
    elif bool((keys[changes] > keys[changes - 1]).all()):
        bounds = [0, *changes.tolist(), len(keys)]
        for low, high in pairwise(bounds):
            yield int(keys[low]), slice(low, high)
    else:
        for key in np.unique(keys).tolist():
            yield key, keys == np.uint64(key)
