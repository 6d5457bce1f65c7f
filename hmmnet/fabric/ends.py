"""Where a stream's bytes come from and where they go.

A source hands out a chunk as a buffer: a slice of memory where the elements are one run (nothing is copied until ZeroMQ does), else a
gathered copy. A sink offers a place to land where the elements are one run and nobody sees them; else the chunk is checked elsewhere, and
then written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hmmnet.arena import Arena
from hmmnet.pages import PAGE_SHIFT, ZONE_SHIFT, Words, all_of, word_of

ELEMENT_SIZES = frozenset(1 << shift for shift in range(PAGE_SHIFT + 1))
"""Powers of two up to a page: they tile chunks, so no element is cut in two."""

Bytes = npt.NDArray[np.uint8]
_ZONE_SHIFT = word_of(ZONE_SHIFT + PAGE_SHIFT)


class Memory(Protocol):
    """Bytes by physical address; `Arena` is one, and `MultiArena` is several as one."""

    def window(self, addresses: Words, size: int) -> Bytes | None:
        """The elements as one writable view, if they are one run."""
        ...

    def gather(self, addresses: Words, size: int, out: Bytes | None = None) -> Bytes:
        """The bytes of the elements, in order; written to `out` if that is given."""
        ...

    def scatter(self, addresses: Words, size: int, data: Bytes) -> None:
        """Write the elements, in order."""
        ...


class Source(Protocol):
    """What a stream sends."""

    nbytes: int

    def chunk(self, offset: int, length: int) -> Any:
        """A buffer with the bytes ``[offset, offset + length)``; it must not change until the chunk is credited."""
        ...

    def fill(self, offset: int, out: Bytes) -> None:
        """Copy the bytes from `offset` on to `out`, all of it."""
        ...


class Sink(Protocol):
    """What a stream fills. `landing` and `put` are called with the bounds of whole chunks."""

    nbytes: int

    def landing(self, offset: int, length: int) -> memoryview | None:
        """A writable view of the bytes ``[offset, offset + length)``: it may hold garbage until the chunk is found intact.

        None when they are not one run, or when somebody would see that.
        """
        ...

    def put(self, offset: int, data: Bytes) -> None:
        """Write bytes from `offset` on."""
        ...


class MultiArena:
    """The memories of a host as one: each element goes to the arena of its zone."""

    def __init__(self, arenas: Mapping[int, Arena]) -> None:
        self._arenas = arenas

    def _one(self, addresses: Words) -> Arena | None:
        first, last = int(addresses[0]) >> ZONE_SHIFT + PAGE_SHIFT, int(addresses[-1]) >> ZONE_SHIFT + PAGE_SHIFT
        if first != last or (len(addresses) > 2 and not all_of(addresses >> _ZONE_SHIFT == word_of(first))):
            return None
        return self._arenas[first]

    def window(self, addresses: Words, size: int) -> Bytes | None:
        """The elements as one writable view, if they are one run."""
        arena = self._one(addresses)
        return None if arena is None else arena.window(addresses, size)

    def gather(self, addresses: Words, size: int, out: Bytes | None = None) -> Bytes:
        """The bytes of the elements, in order; written to `out` if that is given."""
        arena = self._one(addresses)
        if arena is not None:
            return arena.gather(addresses, size, out)
        if out is None:
            out = np.empty(len(addresses) * size, dtype=np.uint8)
        rows = out.reshape(-1, size)
        for zone, here in self._split(addresses):
            rows[here] = self._arenas[zone].gather(addresses[here], size).reshape(-1, size)
        return out

    def scatter(self, addresses: Words, size: int, data: Bytes) -> None:
        """Write the elements, in order."""
        arena = self._one(addresses)
        if arena is not None:
            arena.scatter(addresses, size, data)
            return
        rows = data.reshape(-1, size)
        for zone, here in self._split(addresses):
            self._arenas[zone].scatter(addresses[here], size, rows[here].reshape(-1))

    def _split(self, addresses: Words) -> list[tuple[int, npt.NDArray[np.bool_]]]:
        zones = addresses >> _ZONE_SHIFT
        return [(int(zone), zones == zone) for zone in np.unique(zones)]


class _Elements:
    """Elements of `size` bytes at physical `addresses` (multiples of `size`, which is a power of two up to a page)."""

    def __init__(self, memory: Memory, addresses: Words, size: int) -> None:
        assert size in ELEMENT_SIZES, f"elements of {size} bytes do not tile a chunk"
        self._memory = memory
        self._addresses = addresses
        self._size = size
        self.nbytes = len(addresses) * size
        self._window = memory.window(addresses, size)
        """All elements as one view, when they are one run: then no chunk needs to look at addresses."""

    def _slice(self, offset: int, length: int) -> Words:
        return self._addresses[offset // self._size : (offset + length) // self._size]


class ArenaSource(_Elements):
    """Send elements of memory."""

    def chunk(self, offset: int, length: int) -> Bytes:
        """See `Source`."""
        if self._window is not None:
            return self._window[offset : offset + length]
        return self._memory.gather(self._slice(offset, length), self._size)

    def fill(self, offset: int, out: Bytes) -> None:
        """See `Source`."""
        if self._window is not None:
            out[:] = self._window[offset : offset + len(out)]
        else:
            self._memory.gather(self._slice(offset, len(out)), self._size, out)


class ArenaSink(_Elements):
    """Fill elements of memory that nobody uses yet, such as frames that a migration goes to."""

    def landing(self, offset: int, length: int) -> memoryview | None:
        """See `Sink`."""
        if self._window is not None:
            return self._window[offset : offset + length].data
        window = self._memory.window(self._slice(offset, length), self._size)
        return None if window is None else window.data

    def put(self, offset: int, data: Bytes) -> None:
        """See `Sink`."""
        self._memory.scatter(self._slice(offset, len(data)), self._size, data)


class LiveSink(ArenaSink):
    """Fill elements of memory that is in use meanwhile: what it holds of a chunk, it holds only once the chunk is found intact."""

    def landing(self, offset: int, length: int) -> memoryview | None:  # noqa: ARG002 - a chunk never lands here itself
        """See `Sink`."""
        return None


class BytesSource:
    """Send a buffer."""

    def __init__(self, data: Any) -> None:
        self._view = memoryview(data).cast("B")
        self.nbytes = self._view.nbytes

    def chunk(self, offset: int, length: int) -> memoryview:
        """See `Source`."""
        return self._view[offset : offset + length]

    def fill(self, offset: int, out: Bytes) -> None:
        """See `Source`."""
        out.data[:] = self._view[offset : offset + len(out)]


class BytesSink:
    """Fill a writable buffer."""

    def __init__(self, data: Any) -> None:
        self._view = memoryview(data).cast("B")
        assert not self._view.readonly, "a sink must be writable"
        self.nbytes = self._view.nbytes

    def landing(self, offset: int, length: int) -> memoryview | None:
        """See `Sink`."""
        return self._view[offset : offset + length]

    def put(self, offset: int, data: Bytes) -> None:
        """See `Sink`."""
        self._view[offset : offset + len(data)] = data.data
