"""The page table with two levels equals a dictionary of pages, whatever is mapped as one."""

from __future__ import annotations

import random

import numpy as np
import pytest

from hmmnet.pages import HUGE_PAGES, Words
from hmmnet.pagetable import PMD, PTE, PageTable

SHIFT = 12
CONSTANT = 1 << 8
BLOCKS = 6
PAGES = BLOCKS * HUGE_PAGES


def entry(frame: int, bits: int = 1) -> int:
    return frame << SHIFT | bits


def shown(block_entry: int) -> list[int]:
    """What the pages of a block that is mapped by `block_entry` show."""
    return [block_entry if block_entry & CONSTANT else block_entry + (i << SHIFT) for i in range(HUGE_PAGES)]


def span(start: int, end: int) -> Words:
    return np.arange(start, end, dtype=np.uint64)


class Both:
    """A table and its model, changed alike. Every method is a step on pages [low, high)."""

    def __init__(self, seed: int = 0) -> None:
        self.unfolded: list[int] = []
        self.table = PageTable(SHIFT, CONSTANT, self.unfolded.append)
        self.model = np.zeros(PAGES, np.uint64)
        self.choose = random.Random(seed)

    def step(self, number: int) -> None:
        low = self.choose.randrange(PAGES - 1)
        high = self.choose.randrange(low + 1, min(PAGES, low + 1500))
        steps = (
            self.make,
            self.take,
            self.set,
            self.write,
            self.scatter,
            self.clear,
            self.mark,
            self.fold,
            self.parts,
            self.look,
            self.fill,
        )
        self.choose.choice(steps)(low, high, number)
        assert np.array_equal(self.table.read(0, PAGES), self.model)
        assert np.array_equal(self.table.occupied(0, PAGES), np.flatnonzero(self.model))
        assert self.table.pmd_count == len(self.table.blocks(0, PAGES))

    def of(self, block: int) -> Words:
        """The model's part for a block."""
        return self.model[block * HUGE_PAGES : (block + 1) * HUGE_PAGES]

    def make(self, low: int, high: int, number: int) -> None:
        block = low // HUGE_PAGES
        if not self.of(block).any():
            new = entry(HUGE_PAGES * number) if high % 4 else entry(0, CONSTANT | 1)
            self.table.set_pmd(block * HUGE_PAGES, new)
            self.of(block)[:] = shown(new)

    def take(self, low: int, high: int, number: int) -> None:
        blocks = self.table.blocks(low, high)
        for block, head in zip(blocks.tolist(), self.table.take_pmds(blocks).tolist(), strict=True):
            assert self.of(block)[0] == head
            assert low <= block * HUGE_PAGES <= high - HUGE_PAGES
            self.of(block)[:] = 0

    def set(self, low: int, high: int, number: int) -> None:
        self.table.set(low, entry(number))
        self.model[low] = entry(number)

    def write(self, low: int, high: int, number: int) -> None:
        self.model[low:high] = span(low, high) << np.uint64(SHIFT)
        self.table.write(low, self.model[low:high])

    def scatter(self, low: int, high: int, number: int) -> None:
        pages = np.array(self.choose.sample(range(low, high), self.choose.randrange(1, min(20, high - low + 1))), np.uint64)
        self.table.scatter(pages, number)
        self.model[pages.astype(np.intp)] = number

    def clear(self, low: int, high: int, number: int) -> None:
        self.table.clear(low, high)
        self.model[low:high] = 0

    def mark(self, low: int, high: int, number: int) -> None:
        """A block has one entry: it has the bit for all pages, if for any."""
        bit = np.uint64(1 << 5)
        pages = np.flatnonzero(self.model[low:high]).astype(np.uint64) + np.uint64(low)
        blocks = self.table.blocks(0, PAGES).tolist()
        self.table.mark(pages, self.table.gather(pages), int(bit))
        self.model[pages.astype(np.intp)] |= bit
        for block in blocks:
            self.of(block)[:] |= np.bitwise_or.reduce(self.of(block)) & bit

    def fold(self, low: int, high: int, number: int) -> None:
        block = low // HUGE_PAGES
        part = self.of(block).tolist()
        if part[0] and not self.table.pmd(low) and part == shown(part[0]):
            self.table.fold(block * HUGE_PAGES, part[0])

    def parts(self, low: int, high: int, number: int) -> None:
        seen = [(page, kind) for page, part, kind in self.table.parts(low, high) if part.any()]
        assert all(kind == PTE or (kind == PMD and page % HUGE_PAGES == 0) for page, kind in seen)

    def look(self, low: int, high: int, number: int) -> None:
        assert np.array_equal(np.concatenate([part for _, part in self.table.readable(low, high)]), self.model[low:high])
        assert np.array_equal(self.table.gather(span(low, high)[::-1]), self.model[low:high][::-1])
        assert self.table.get(low) == self.model[low]
        inside = range(-(-low // HUGE_PAGES), high // HUGE_PAGES)
        assert self.table.untouched(low, high).tolist() == [block for block in inside if not self.of(block).any()]

    def fill(self, low: int, high: int, number: int) -> None:
        for start, part in self.table.segments(low, high):
            part[:] = number
            self.model[start : start + len(part)] = number


@pytest.mark.parametrize("seed", range(20))
def test_it_shows_what_a_table_of_pages_would(seed: int) -> None:
    """A random history of blocks made, dropped, folded, and of every way to read and write pages."""
    both = Both(seed)
    for number in range(1, 150):
        both.step(number)


def test_unfolding_tells_whoever_keeps_books() -> None:
    """The entry of the block, once, before its pages have entries of their own."""
    both = Both()
    both.table.set_pmd(HUGE_PAGES, entry(1024))
    assert both.table.get(HUGE_PAGES + 3) == entry(1027)
    assert not both.unfolded
    both.table.set(HUGE_PAGES + 3, 0)
    both.table.unfold(HUGE_PAGES)
    assert both.unfolded == [entry(1024)]
    assert both.table.get(HUGE_PAGES + 4) == entry(1028)


def test_sixteen_gibibytes_of_blocks_are_one_leaf() -> None:
    """Entries of blocks lie 512 times as close: 8192 of them take 64 KiB."""
    table = PageTable(SHIFT)
    blocks = span(0, 8192)
    table.set_pmds(blocks, blocks << np.uint64(9 + SHIFT) | np.uint64(1))
    assert (table.leaf_count, table.pmds.leaf_count, table.pmd_count) == (0, 1, 8192)
    assert table.get(8191 * HUGE_PAGES + 5) == entry(8191 * HUGE_PAGES + 5)
