"""Sources and sinks: one run of memory is used in place, scattered elements are gathered and scattered."""

from __future__ import annotations

import numpy as np
import pytest

from hmmnet.arena import Arena
from hmmnet.fabric.ends import ArenaSink, ArenaSource, BytesSink, BytesSource, LiveSink, MultiArena
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, ZONE_SHIFT, Words


def arena(zone: int = 0, pages: int = 64) -> Arena:
    """A memory whose bytes differ everywhere."""
    made = Arena(zone << ZONE_SHIFT, pages)
    made.bytes[:] = np.random.default_rng(zone).integers(0, 256, len(made.bytes), dtype=np.uint8)
    return made


def addresses(memory: Arena, *pages: int) -> Words:
    """Physical addresses of pages by index."""
    return np.array([memory.base + page << PAGE_SHIFT for page in pages], dtype=np.uint64)


def test_one_run_is_sent_from_where_it_is() -> None:
    """No copy: the chunk is the memory."""
    memory = arena()
    chunk = ArenaSource(memory, addresses(memory, 3, 4, 5, 6), PAGE_SIZE).chunk(PAGE_SIZE, 2 * PAGE_SIZE)
    assert np.shares_memory(chunk, memory.pages[4:6])
    assert len(chunk) == 2 * PAGE_SIZE


def test_scattered_elements_are_gathered() -> None:
    """In their order."""
    memory = arena()
    source = ArenaSource(memory, addresses(memory, 9, 2, 30, 7), PAGE_SIZE)
    assert source.nbytes == 4 * PAGE_SIZE
    assert bytes(source.chunk(PAGE_SIZE, 2 * PAGE_SIZE)) == memory.pages[2].tobytes() + memory.pages[30].tobytes()


def test_one_run_is_landed_in() -> None:
    """And pieces of a scattered sink that are a run, too."""
    memory = arena()
    sink = ArenaSink(memory, addresses(memory, 9, 2, 3, 7), PAGE_SIZE)
    place = sink.landing(PAGE_SIZE, 2 * PAGE_SIZE)
    assert place is not None
    place[:] = bytes(2 * PAGE_SIZE)
    assert not memory.pages[2:4].any()
    assert memory.pages[1].any()
    assert sink.landing(0, 2 * PAGE_SIZE) is None


def test_scattered_elements_are_put() -> None:
    """Each to its place, and nowhere else."""
    memory, before = arena(), arena().pages
    data = np.arange(2 * PAGE_SIZE, dtype=np.uint64).astype(np.uint8)
    ArenaSink(memory, addresses(memory, 1, 9, 2), PAGE_SIZE).put(PAGE_SIZE, data)
    assert np.array_equal(memory.pages[9], data[:PAGE_SIZE])
    assert np.array_equal(memory.pages[2], data[PAGE_SIZE:])
    assert np.array_equal(np.delete(memory.pages, (2, 9), axis=0), np.delete(before, (2, 9), axis=0))


def test_nothing_lands_in_live_memory() -> None:
    """One run or not: what is not checked has no place there. What is goes to its elements as elsewhere."""
    memory, data = arena(), np.full(2 * PAGE_SIZE, 7, dtype=np.uint8)
    for run in (True, False):
        sink = LiveSink(memory, addresses(memory, 4, 5) if run else addresses(memory, 9, 1), PAGE_SIZE)
        assert sink.landing(0, 2 * PAGE_SIZE) is None
        sink.put(0, data)
    assert np.flatnonzero((memory.pages == 7).all(axis=1)).tolist() == [1, 4, 5, 9]


def test_memories_of_a_host_are_one() -> None:
    """A run in one zone is used in place, elements of two zones are put together."""
    low, high = arena(0), arena(1)
    memories = MultiArena({0: low, 1: high})
    inside = addresses(high, 4, 5)
    window = memories.window(inside, PAGE_SIZE)
    assert window is not None
    assert np.shares_memory(window, high.bytes)
    mixed = np.concatenate((addresses(high, 6), addresses(low, 6), addresses(high, 1)))
    assert memories.window(mixed, PAGE_SIZE) is None
    assert bytes(memories.gather(mixed, PAGE_SIZE)) == b"".join(part.tobytes() for part in (high.pages[6], low.pages[6], high.pages[1]))
    memories.scatter(mixed, PAGE_SIZE, np.full(3 * PAGE_SIZE, 7, dtype=np.uint8))
    assert (high.pages[[6, 1]] == 7).all()
    assert (low.pages[6] == 7).all()
    assert not (low.pages[1] == 7).all()


def test_elements_must_tile_a_chunk() -> None:
    """Another size is our own mistake."""
    memory = arena()
    with pytest.raises(AssertionError, match="do not tile"):
        ArenaSource(memory, addresses(memory, 0), 24)


def test_buffers() -> None:
    """Bytes are sent in place and filled in place; what cannot be written is no sink."""
    data = bytearray(range(100))
    assert bytes(BytesSource(data).chunk(10, 5)) == bytes(range(10, 15))
    sink = BytesSink(data)
    place = sink.landing(0, 4)
    assert place is not None
    place[:] = b"abcd"
    sink.put(4, np.full(2, 0x7A, dtype=np.uint8))
    assert data[:6] == b"abcdzz"
    with pytest.raises(AssertionError, match="writable"):
        BytesSink(b"fixed")
    assert BytesSource(np.zeros(4, dtype=np.uint64)).nbytes == 32
