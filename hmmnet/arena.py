"""The bytes of one zone: a host memory node or a device's memory.

One mapping, anonymous, or shared between host and device where the memory is coherent (the CPU reaches it in place). It is reserved whole
and committed on first touch, so a machine with eight 80 GiB devices starts on a laptop and pays for what it uses. Reads and writes go by
*descriptor*: physical addresses (multiples of `size`) of elements that are all `size` bytes long. A page copy has `size` 4096; a device
that loads eight-byte words across its link has `size` 8. Where the elements are one run the bytes are a slice; else they are gathered or
scattered by numpy, never one by one in Python.
"""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

from hmmnet.errors import HmmnetError
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, Words, all_of, run_bounds, word_of

MAP_NORESERVE = 0x4000
SLICES_MAX = 8
"""Up to this many runs, page slices beat one fancy index (which copies page by page)."""
DISCARD_MIN_PAGES = 16
"""Freed runs at least this long are given back to the operating system."""

Bytes = npt.NDArray[np.uint8]


class Arena:
    """`count` pages of memory that answer to the frames ``[base, base + count)``; those of the open file `descriptor`, if one is given.

    Raises HmmnetError when the operating system will not reserve so much address space.
    """

    def __init__(self, base: int, count: int, descriptor: int = -1) -> None:
        self.base = base
        self.count = count
        own = descriptor < 0
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if own else mmap.MAP_SHARED
        self._discard = mmap.MADV_DONTNEED if own else mmap.MADV_REMOVE
        try:
            self._map = mmap.mmap(descriptor, count * PAGE_SIZE, flags=flags | MAP_NORESERVE)
        except (OSError, ValueError, OverflowError) as error:
            raise HmmnetError(
                f"cannot reserve {count * PAGE_SIZE >> 20} MiB of address space for frames from 0x{base:x}: {error}; "
                "make the memories of the topology smaller, or raise the address space limit (ulimit -v)"
            ) from error
        if own and hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.bytes: Bytes = np.frombuffer(self._map, dtype=np.uint8)
        self.pages = self.bytes.reshape(count, PAGE_SIZE)
        self._origin = word_of(base << PAGE_SHIFT)

    def covers(self, frames: Words) -> bool:
        """Whether every one of `frames` lies here (false for none)."""
        return len(frames) > 0 and int(frames.min()) >= self.base and int(frames.max()) < self.base + self.count

    def indices(self, frames: Words) -> npt.NDArray[np.intp]:
        """Row numbers of `frames` in `pages`."""
        return (frames - word_of(self.base)).astype(np.intp)

    def zero(self, frames: Words) -> None:
        """Fill `frames` with zeros."""
        bounds = run_bounds(frames)
        if len(bounds) - 1 <= SLICES_MAX:
            for i in range(len(bounds) - 1):
                first = int(frames[bounds[i]]) - self.base
                self.pages[first : first + int(bounds[i + 1] - bounds[i])] = 0
        else:
            self.pages[self.indices(frames)] = 0

    def window(self, addresses: Words, size: int) -> Bytes | None:
        """The elements as a writable view when they are one run, else None."""
        n = len(addresses)
        if n == 0:
            return self.bytes[:0]
        first = int(addresses[0])
        if n > 1 and (int(addresses[-1]) - first != (n - 1) * size or not all_of(addresses[1:] - addresses[:-1] == word_of(size))):
            return None
        offset = first - int(self._origin)
        return self.bytes[offset : offset + n * size]

    def gather(self, addresses: Words, size: int, out: Bytes | None = None) -> Bytes:
        """The bytes of the elements, in order: a view when they are one run and `out` is None, else a copy, in `out` if that is given."""
        one = self.window(addresses, size)
        if one is not None:
            if out is None:
                return one
            out[: len(one)] = one
            return out
        if out is None:
            out = np.empty(len(addresses) * size, dtype=np.uint8)
        rows = ((addresses - self._origin) // word_of(size)).astype(np.intp)
        table = self.bytes[: len(self.bytes) // size * size].reshape(-1, size)
        np.take(table, rows, axis=0, out=out[: len(rows) * size].reshape(-1, size), mode="clip")
        return out

    def scatter(self, addresses: Words, size: int, data: Bytes) -> None:
        """Write `data` to the elements, in order."""
        one = self.window(addresses, size)
        if one is not None:
            one[:] = data
            return
        rows = ((addresses - self._origin) // word_of(size)).astype(np.intp)
        self.bytes[: len(self.bytes) // size * size].reshape(-1, size)[rows] = data.reshape(-1, size)

    def discard(self, frames: Words) -> None:
        """Give the memory of long runs among `frames` (sorted) back to the operating system; they read as zero afterwards."""
        bounds = run_bounds(frames)
        for i in np.flatnonzero(np.diff(bounds) >= DISCARD_MIN_PAGES).tolist():
            first = int(frames[bounds[i]]) - self.base
            length = int(bounds[i + 1] - bounds[i])
            self._map.madvise(self._discard, first * PAGE_SIZE, length * PAGE_SIZE)
