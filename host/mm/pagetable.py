"""The page table of one process: a sparse table that knows consecutive pages when it sees them.

Most page lists are one run. For those a slice does what a fancy index would do in ten times the time, so `take` and `put` look first.
"""

from __future__ import annotations

import numpy as np

from hmmnet.pages import Words, is_one_run
from hmmnet.sparse import LEAF_SHIFT, SparseTable

_MASK = (1 << LEAF_SHIFT) - 1


class PageTable(SparseTable):
    """Virtual page -> entry (`pte.py`)."""

    def take(self, pages: Words) -> Words:
        """A copy of the entries of `pages`."""
        if is_one_run(pages):
            return self.read(int(pages[0]), int(pages[-1]) + 1)
        return self.gather(pages)

    def put(self, pages: Words, values: Words | int) -> None:
        """Write one value for each page, or one for all."""
        if is_one_run(pages):
            done = 0
            for _, part in self.segments(int(pages[0]), int(pages[-1]) + 1):
                part[:] = values if isinstance(values, int) else values[done : done + len(part)]
                done += len(part)
        else:
            self.scatter(pages, values)

    def occupied(self, start: int, end: int) -> Words:
        """The pages of [start, end) whose entry is not zero, ascending."""
        found = [np.flatnonzero(part).astype(np.uint64) + np.uint64(first) for first, part in self.present(start, end)]
        return found[0] if len(found) == 1 else np.concatenate(found) if found else np.zeros(0, np.uint64)
