"""An arena is bytes by physical address: as a view where elements are one run, gathered and scattered where not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmmnet.arena import DISCARD_MIN_PAGES, Arena
from hmmnet.errors import HmmnetError
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE

BASE = 3 << 36
PAGES = 64


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([1, 8, 64, PAGE_SIZE]), st.integers(0, 2**32))
def test_scatter_and_gather_agree_with_plain_indexing(size: int, seed: int) -> None:
    """Any distinct elements, in any order, hold what was written to them and nothing else changes."""
    rng = np.random.default_rng(seed)
    arena = Arena(BASE, PAGES)
    arena.bytes[:] = rng.integers(0, 256, PAGES * PAGE_SIZE, dtype=np.uint8)
    model = arena.bytes.copy()
    rows = rng.permutation(PAGES * PAGE_SIZE // size)[: rng.integers(1, 60)].astype(np.uint64)
    if seed % 3 == 0:
        rows = np.arange(rows[0] % 4, rows[0] % 4 + len(rows), dtype=np.uint64)
    addresses = np.uint64(BASE << PAGE_SHIFT) + rows * np.uint64(size)
    data = rng.integers(0, 256, len(rows) * size, dtype=np.uint8)
    arena.scatter(addresses, size, data)
    model.reshape(-1, size)[rows.astype(np.intp)] = data.reshape(-1, size)
    assert np.array_equal(arena.bytes, model)
    assert np.array_equal(arena.gather(addresses, size), data)


def test_one_run_is_a_view() -> None:
    """Bytes of consecutive pages are not copied: this is what DMA sends from and lands in."""
    arena = Arena(BASE, PAGES)
    addresses = np.arange(BASE + 3, BASE + 9, dtype=np.uint64) << np.uint64(PAGE_SHIFT)
    view = arena.window(addresses, PAGE_SIZE)
    assert view is not None
    view[:] = 7
    assert bool((arena.pages[3:9] == 7).all())
    assert arena.window(addresses[::-1], PAGE_SIZE) is None


@pytest.mark.parametrize("step", [1, 5])
def test_zero_and_discard(step: int) -> None:
    """Pages are cleared in runs and scattered; long runs that are given back read as zero."""
    arena = Arena(BASE, PAGES)
    arena.bytes[:] = 9
    frames = np.arange(BASE, BASE + PAGES, step, dtype=np.uint64)
    arena.zero(frames)
    assert not arena.pages[::step].any()
    arena.bytes[:] = 9
    run = np.arange(BASE, BASE + DISCARD_MIN_PAGES, dtype=np.uint64)
    arena.discard(run)
    assert not arena.pages[:DISCARD_MIN_PAGES].any()
    assert bool((arena.pages[DISCARD_MIN_PAGES:] == 9).all())


def test_covers() -> None:
    """Only its own frames, and never none."""
    arena = Arena(BASE, PAGES)
    assert arena.covers(np.array([BASE, BASE + PAGES - 1], dtype=np.uint64))
    assert not arena.covers(np.array([BASE, BASE + PAGES], dtype=np.uint64))
    assert not arena.covers(np.zeros(0, dtype=np.uint64))


def test_more_than_an_address_space_is_refused() -> None:
    """The error says what to change."""
    with pytest.raises(HmmnetError, match="smaller"):
        Arena(BASE, 1 << 45)


def test_nothing_is_one_run() -> None:
    """No elements are an empty view, not an error."""
    arena, none = Arena(BASE, PAGES), np.zeros(0, dtype=np.uint64)
    assert len(arena.gather(none, PAGE_SIZE)) == 0
    arena.scatter(none, 8, np.zeros(0, dtype=np.uint8))
    arena.zero(none)
    arena.discard(none)
