"""Frames handed out in runs.

Page data crosses a link fastest when both ends are one run: one slice out, one slice in. So the allocator's aim is not to be small but to
answer *n* frames with few runs: first a free run that fits, then frames never used before, and only then pieces. Free runs are two sorted
lists (start, end) with merging, looked up by bisection; a free of many scattered frames is merged by sorting, not one by one.

Frames never handed out before are known to be zero (`zeroed`), which spares clearing them.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

import numpy as np

from hmmnet.pages import Words, ascending, run_bounds, word_of

FIT_SEARCH_MAX = 64
"""Free runs looked at for one that fits whole; beyond, fragments are taken as they come."""
MERGE_ONE_BY_ONE_MAX = 32
"""Runs in one free() up to which each is merged by bisection; beyond, everything is sorted at once."""


class Allocation(NamedTuple):
    """Frames handed out: `frames` in order, of which the last `zeroed` are known to hold zeros."""

    frames: Words
    zeroed: int


class RunAllocator:
    """Hands out frames ``[base, base + count)``."""

    def __init__(self, base: int, count: int) -> None:
        self._base = base
        self._end = base + count
        self.fresh = base
        """The first frame that was never handed out: beyond it nothing was ever written."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.free_count = count

    def allocate(self, count: int) -> Allocation | None:
        """`count` frames in as few runs as can be had, or None when fewer are free."""
        if count > self.free_count:
            return None
        self.free_count -= count
        for i in range(min(len(self._starts), FIT_SEARCH_MAX)):
            start = self._starts[i]
            if self._ends[i] - start >= count:
                self._take(i, count)
                return Allocation(np.arange(start, start + count, dtype=np.uint64), 0)
        if self._end - self.fresh >= count:
            return Allocation(self._bump(count), count)
        return self._gather(count)

    def allocate_aligned(self, count: int) -> Allocation | None:
        """One run of `count` frames that begins at a multiple of `count`, or None when there is none."""
        got = self.allocate_aligned_run(count)
        if got is None:
            return None
        start, zeroed = got
        return Allocation(np.arange(start, start + count, dtype=np.uint64), count if zeroed else 0)

    def allocate_aligned_run(self, count: int) -> tuple[int, bool] | None:
        """`allocate_aligned` without arrays: the first frame, and whether all are known to hold zeros."""
        for i in range(len(self._starts)):
            start = -(-self._starts[i] // count) * count
            if self._ends[i] - start >= count:
                self.free_count -= count
                self._cut(i, start, start + count)
                return start, False
        start = -(-self.fresh // count) * count
        if self._end - start < count:
            return None
        if start > self.fresh:
            self._insert(self.fresh, start)
        self.fresh = start + count
        self.free_count -= count
        return start, True

    def allocate_aligned_runs(self, size: int, count: int) -> tuple[Words, int]:
        """`allocate_aligned_run` up to `count` times: the first frames of the runs, and how many of the last of them are known to be zero.

        Neighbouring runs are cut out of a free one together.
        """
        found: list[Words] = []
        i = 0
        while count and i < len(self._starts):
            start = -(-self._starts[i] // size) * size
            fit = min(count, max(0, self._ends[i] - start) // size)
            if fit:
                before = len(self._starts)
                self._cut(i, start, start + fit * size)
                found.append(np.arange(start, start + fit * size, size, dtype=np.uint64))
                count -= fit
                i += len(self._starts) - before
            i += 1
        start = -(-self.fresh // size) * size
        fresh = min(count, max(0, self._end - start) // size)
        if fresh:
            if start > self.fresh:
                self._insert(self.fresh, start)
            self.fresh = start + fresh * size
            found.append(np.arange(start, self.fresh, size, dtype=np.uint64))
        firsts = np.concatenate(found) if found else np.zeros(0, np.uint64)
        self.free_count -= size * len(firsts)
        return firsts, fresh

    def _cut(self, i: int, start: int, end: int) -> None:
        """Take [start, end) out of the free run `i`, which may leave two."""
        left, right = self._starts[i], self._ends[i]
        pieces = [(low, high) for low, high in ((left, start), (end, right)) if low < high]
        self._starts[i : i + 1] = [low for low, _ in pieces]
        self._ends[i : i + 1] = [high for _, high in pieces]

    def allocate_one(self) -> int | None:
        """One frame, whatever it held; None when none is free."""
        if not self.free_count:
            return None
        self.free_count -= 1
        if self._starts:
            frame = self._starts[0]
            self._take(0, 1)
            return frame
        self.fresh += 1
        return self.fresh - 1

    def _bump(self, count: int) -> Words:
        first = self.fresh
        self.fresh += count
        return np.arange(first, first + count, dtype=np.uint64)

    def _take(self, i: int, count: int) -> None:
        if self._ends[i] - self._starts[i] == count:
            del self._starts[i], self._ends[i]
        else:
            self._starts[i] += count

    def _gather(self, count: int) -> Allocation:
        pieces: list[Words] = []
        while count and self._starts:
            start, end = self._starts[-1], self._ends[-1]
            if end - start > count:
                self._ends[-1] = start = end - count
            else:
                self._starts.pop()
                self._ends.pop()
            pieces.append(np.arange(start, end, dtype=np.uint64))
            count -= end - start
        if count:
            pieces.append(self._bump(count))
        return Allocation(np.concatenate(pieces), count)

    def free(self, frames: Words) -> None:
        """Take `frames` back, in any order. Frames that are not out are a bug of the caller (AssertionError)."""
        if len(frames) == 0:
            return
        frames = ascending(frames)
        assert int(frames[0]) >= self._base and int(frames[-1]) < self.fresh, "free of frames that were never handed out"
        bounds = run_bounds(frames)
        if len(bounds) - 1 <= MERGE_ONE_BY_ONE_MAX:
            for i in range(len(bounds) - 1):
                self._insert(int(frames[bounds[i]]), int(frames[bounds[i + 1] - 1]) + 1)
        else:
            self._merge(frames[bounds[:-1]], frames[bounds[1:] - 1] + word_of(1))
        self.free_count += len(frames)

    def free_run(self, start: int, end: int) -> None:
        """Take frames [start, end) back: `free` without arrays. A run that is not out is a bug of the caller (AssertionError)."""
        assert self._base <= start, "free of frames below the memory"
        assert start < end <= self.fresh, "free of frames that were never handed out"
        self._insert(start, end)
        self.free_count += end - start

    def _insert(self, start: int, end: int) -> None:
        i = bisect_right(self._starts, start)
        assert (i == 0 or self._ends[i - 1] <= start) and (i == len(self._starts) or end <= self._starts[i]), "double free of a frame"
        joins_left = i > 0 and self._ends[i - 1] == start
        joins_right = i < len(self._starts) and self._starts[i] == end
        if joins_left and joins_right:
            self._ends[i - 1] = self._ends[i]
            del self._starts[i], self._ends[i]
        elif joins_left:
            self._ends[i - 1] = end
        elif joins_right:
            self._starts[i] = start
        else:
            self._starts.insert(i, start)
            self._ends.insert(i, end)

    def _merge(self, starts: Words, ends: Words) -> None:
        starts = np.concatenate((np.array(self._starts, dtype=np.uint64), starts))
        ends = np.concatenate((np.array(self._ends, dtype=np.uint64), ends))
        order = np.argsort(starts)
        starts, ends = starts[order], ends[order]
        assert bool((starts[1:] >= ends[:-1]).all()), "double free of a frame"
        apart = starts[1:] != ends[:-1]
        self._starts = starts[np.concatenate(([True], apart))].tolist()
        self._ends = ends[np.concatenate((apart, [True]))].tolist()

    @property
    def used_count(self) -> int:
        """Frames that are out."""
        return self._end - self._base - self.free_count

    @property
    def fresh_count(self) -> int:
        """Frames at the end that were never handed out."""
        return self._end - self.fresh

    @property
    def touched_count(self) -> int:
        """Frames at the front that were handed out at least once; beyond it nothing was ever written."""
        return self.fresh - self._base

    @property
    def free_runs(self) -> int:
        """Runs that the free frames lie in, those never used counted as one."""
        return len(self._starts) + (self.fresh < self._end)
