"""What has changed in a table since somebody last looked: for checks that look at nothing twice.

Whoever changes a table leaves marks anyway (`SparseTable.take_touched`), block by block. Here each marked block is compared with a copy of
what it held, so a block that was written with what it had, or merely lent out to be written, has no changes. The copies cost what the table
itself does; nobody pays who does not look.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .pages import Words, word_of
from .sparse import BLOCK_PAGES, BLOCK_SHIFT, LEAF_SHIFT, SparseTable

_NOTHING = np.zeros(BLOCK_PAGES, np.uint64)
_NO_WORDS = np.zeros(0, np.uint64)


class Changes(NamedTuple):
    """Pages in no order; the entry of each `before`, and the one that it has `now` (0: none).

    A page is there twice where its leaf was given back and made anew: with what it had, and with what it has.
    """

    pages: Words
    before: Words
    now: Words


NO_CHANGES = Changes(_NO_WORDS, _NO_WORDS, _NO_WORDS)


class Seen:
    """The entries of `table` as they were at the last look, none at first. Of each table there can be one: it takes the marks."""

    def __init__(self, table: SparseTable) -> None:
        self._table = table
        table.touch()
        self._blocks: dict[int, Words] = {}
        """Block number -> its entries, where there are any."""

    def changes(self) -> Changes:
        """What is another than at the last look, and is seen now."""
        if not self._table.changed:
            return NO_CHANGES
        touched, dropped = self._table.take_touched()
        found = [self._forget(block) for block in list(self._blocks) if block >> LEAF_SHIFT - BLOCK_SHIFT in dropped] if dropped else []
        found += [changed for first, entries in touched for changed in self._compare(first, entries)]
        if len(found) == 1:
            return found[0]
        if not found:
            return NO_CHANGES
        return Changes(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def all(self) -> Words:
        """Every entry that was there at the last look, in no order."""
        blocks = [entries[entries != 0] for entries in self._blocks.values()]
        return np.concatenate(blocks) if blocks else _NO_WORDS

    def _compare(self, first: int, entries: Words) -> list[Changes]:
        """The changes of the block that begins at page `first`, which is seen now."""
        block = first >> BLOCK_SHIFT
        before = self._blocks.get(block, _NOTHING)
        at = (entries != before).nonzero()[0]
        if len(at) == 0:
            return []
        now = entries[at]
        changed = Changes(at.astype(np.uint64) + word_of(first), before[at], now)
        if before is _NOTHING:
            self._blocks[block] = entries.copy()
        else:
            before[at] = now
        return [changed]

    def _forget(self, block: int) -> Changes:
        """The leaf with that block was given back; what may be there now is found by its marks."""
        entries = self._blocks.pop(block)
        at = entries.nonzero()[0]
        return Changes(at.astype(np.uint64) + word_of(block << BLOCK_SHIFT), entries[at], np.zeros(len(at), np.uint64))
