"""What frames hold: the bytes of memory that the CPU reaches, read and written frame by frame, or run by run where there are any."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from hmmnet.arena import Bytes
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, ZONE_SHIFT, Words, is_one_run, run_bounds, word_of

from .zones import CpuZone

COPY_SLICES_MAX = 64
"""Up to this many runs a copy goes slice by slice, else page by page inside numpy."""


class Contents:
    """The bytes of all memory that the CPU reaches."""

    def __init__(self) -> None:
        self.in_place: dict[int, CpuZone] = {}
        """The zones whose bytes the CPU reaches."""

    def copy(self, source: Words, target: Words) -> None:
        """Copy whole host frames."""
        data = np.empty(len(source) * PAGE_SIZE, np.uint8)
        self.read(source, 0, data)
        self.write(target, 0, data)

    def read_small(self, frame: int, offset: int, length: int) -> bytes:
        """`length` bytes inside one frame that the CPU reaches."""
        zone = self.in_place[frame >> ZONE_SHIFT]
        if zone.crossed is not None:
            zone.crossed(length, False)
        start = (frame - zone.base << PAGE_SHIFT) + offset
        return bytes(zone.window[start : start + length])

    def write_small(self, frame: int, offset: int, data: bytes | memoryview) -> None:
        """Write `data` inside one frame that the CPU reaches."""
        zone = self.in_place[frame >> ZONE_SHIFT]
        if zone.crossed is not None:
            zone.crossed(len(data), True)
        start = (frame - zone.base << PAGE_SHIFT) + offset
        zone.window[start : start + len(data)] = data

    def read(self, frames: Words, offset: int, out: Bytes) -> None:
        """Copy bytes of `frames` that the CPU reaches, beginning `offset` bytes into the first, to `out`."""
        for zone, rows, low, high in self._pieces(frames, offset, len(out)):
            if zone.crossed is not None:
                zone.crossed(high - low, False)
            if isinstance(rows, int):
                out[low:high] = zone.arena.bytes[rows : rows + high - low]
            else:
                zone.arena.gather(rows, PAGE_SIZE, out[low:high])

    def write(self, frames: Words, offset: int, data: Bytes) -> None:
        """Copy `data` to `frames` that the CPU reaches, beginning `offset` bytes into the first."""
        for zone, rows, low, high in self._pieces(frames, offset, len(data)):
            if zone.crossed is not None:
                zone.crossed(high - low, True)
            if isinstance(rows, int):
                zone.arena.bytes[rows : rows + high - low] = data[low:high]
            else:
                zone.arena.scatter(rows, PAGE_SIZE, data[low:high])

    def _pieces(self, frames: Words, offset: int, length: int) -> Iterator[tuple[CpuZone, int | Words, int, int]]:
        """How to copy bytes [low, high): as one slice from a byte of a zone's arena, or, where runs are short, as pages by address."""
        if is_one_run(frames):  # as most are
            frame = int(frames[0])
            zone = self.in_place[frame >> ZONE_SHIFT]
            yield zone, (frame - zone.base) * PAGE_SIZE + offset, 0, min(length, len(frames) * PAGE_SIZE - offset)
            return
        bounds = run_bounds(frames)
        if len(bounds) - 1 <= COPY_SLICES_MAX:
            edges = (bounds * PAGE_SIZE - offset).tolist()
            for i, frame in enumerate(frames[bounds[:-1]].tolist()):
                zone = self.in_place[frame >> ZONE_SHIFT]
                low, high = max(0, edges[i]), min(length, edges[i + 1])
                yield zone, (frame - zone.base) * PAGE_SIZE + low - edges[i], low, high
            return
        first = 1 if offset else 0
        last = (offset + length) // PAGE_SIZE
        if first:
            yield from self._pieces(frames[:1], offset, PAGE_SIZE - offset)
        numbers = frames[first:last] >> word_of(ZONE_SHIFT)
        edges_of_zones = np.concatenate(([0], np.flatnonzero(numbers[1:] != numbers[:-1]) + 1, [last - first])).tolist()
        for low, high in itertools.pairwise(edges_of_zones):
            zone = self.in_place[int(numbers[low])]
            start = (first + low) * PAGE_SIZE - offset
            yield zone, frames[first + low : first + high] << word_of(PAGE_SHIFT), start, start + (high - low) * PAGE_SIZE
        if last < len(frames):
            done = last * PAGE_SIZE - offset
            for zone, rows, low, high in self._pieces(frames[last:], 0, length - done):
                yield zone, rows, done + low, done + high
