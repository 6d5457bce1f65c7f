"""Page arithmetic, and page lists as they cross the wire."""

from __future__ import annotations

import itertools
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmmnet.pages import (
    EXACT_RUNS_MAX,
    FEW,
    FIRST_LOOK,
    FLAGS_COPIED,
    LARGE,
    PAGE_SIZE,
    ZONE_SHIFT,
    all_of,
    among,
    announced_runs,
    any_of,
    ascending,
    bits_in_all,
    bits_in_any,
    distinct,
    from_wire,
    is_ascending,
    is_one_run,
    page_range,
    run_bounds,
    runs_of,
    to_wire,
    unlike,
    word_of,
    zone_of,
)

FRAMES = st.lists(st.integers(0, 40), max_size=30)


@given(FRAMES)
def test_runs_cover_the_list(frames: list[int]) -> None:
    """Between two bounds numbers go up by one; at a bound they do not."""
    words = np.array(frames, dtype=np.uint64)
    bounds = run_bounds(words).tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(frames)
    for first, end in itertools.pairwise(bounds):
        assert frames[first:end] == list(range(frames[first], frames[first] + end - first))
    for bound in bounds[1:-1]:
        assert frames[bound] != frames[bound - 1] + 1


@given(FRAMES)
def test_one_run_means_two_bounds(frames: list[int]) -> None:
    """The quick question and the full answer agree."""
    words = np.array(frames, dtype=np.uint64)
    assert is_one_run(words) == (len(run_bounds(words)) == 2)


@pytest.mark.parametrize("frames", [[LARGE + 5, LARGE + 6], [LARGE, 1], [1, LARGE, 3]])
def test_one_run_with_large_ones(frames: list[int]) -> None:
    """The mark of large ones is the highest bit, and numbers are compared as they are."""
    words = np.array(frames, dtype=np.uint64)
    assert is_one_run(words) == (len(run_bounds(words)) == 2)


@pytest.mark.parametrize("single", [0, FIRST_LOOK, 2 * FIRST_LOOK])
@pytest.mark.parametrize("runs", [1, EXACT_RUNS_MAX - 1, EXACT_RUNS_MAX, EXACT_RUNS_MAX + 1, 3 * FIRST_LOOK])
@pytest.mark.parametrize("ascend", [False, True])
def test_pages_are_announced_run_by_run_up_to_a_limit(single: int, runs: int, ascend: bool) -> None:
    """Beyond it one announcement spans them, wherever among the pages the many runs lie."""
    pages = np.concatenate((np.arange(single), single + 2 * np.arange(runs))).astype(np.uint64)
    exact = runs_of(pages)
    expected = exact if len(exact) <= EXACT_RUNS_MAX else [(int(pages[0]), int(pages[-1]) + 1)]
    assert announced_runs(pages, ascend=ascend) == expected
    assert announced_runs(pages[::-1].copy()) == expected


@given(FRAMES)
def test_unlike_bits_are_those_that_differ(frames: list[int]) -> None:
    """Of no words, and of one, there are none."""
    assert unlike(np.array(frames, np.uint64)) == int(np.bitwise_or.reduce([frame ^ frames[0] for frame in frames] or [0]))


@given(FRAMES)
def test_distinct_is_what_numpy_calls_unique(frames: list[int]) -> None:
    """Whatever the order: ascending, each once."""
    assert distinct(np.array(frames, dtype=np.uint64)).tolist() == sorted(set(frames))


@given(st.lists(st.integers(0, 12) | st.integers(2**64 - 3, 2**64 - 1)), st.lists(st.integers(0, 12) | st.integers(2**64 - 3, 2**64 - 1)))
def test_among_is_what_numpy_calls_isin(values: list[int], others: list[int]) -> None:
    """With a few others, and with many."""
    words, few = np.array(values, dtype=np.uint64), np.array(others, dtype=np.uint64)
    assert among(words, few).tolist() == [value in others for value in values] == np.isin(words, few).tolist()


@given(st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_lists_survive_the_wire(values: list[int]) -> None:
    """Eight bytes a word, little endian."""
    words = np.array(values, dtype=np.uint64)
    raw = to_wire(words)
    assert len(raw) == 8 * len(values)
    assert from_wire(raw).tolist() == values


def test_a_cut_list_is_refused() -> None:
    """A length that is no multiple of eight is no page list."""
    with pytest.raises(ValueError, match="multiple"):
        from_wire(b"1234567")


def test_ranges_and_zones() -> None:
    """A range touches its first and last byte's pages; a frame tells its zone."""
    assert page_range(PAGE_SIZE - 1, 2) == (0, 2)
    assert page_range(PAGE_SIZE, PAGE_SIZE) == (1, 2)
    assert zone_of((7 << ZONE_SHIFT) + 5) == 7


@pytest.mark.parametrize("count", [0, 1, 2, FEW, FEW + 1, 3 * FEW])
def test_the_few_are_looked_at_as_the_many_are(count: int) -> None:
    """Bits, order and runs are those that numpy finds, on either side of the number up to which Python looks by itself."""
    random = Random(count)
    for _ in range(50):
        numbers = [random.choice((3, 5, 6, 7, 1 << 30)) for _ in range(count)]
        if random.random() < 0.3:
            numbers = list(range(7, 7 + count))
        values = np.array(numbers, np.int64)
        assert bits_in_any(values) == int(np.bitwise_or.reduce(values))
        assert bits_in_all(values) == (int(np.bitwise_and.reduce(values)) if count else 0)
        assert unlike(values) == bits_in_any(values) ^ bits_in_all(values)
        assert is_ascending(values) == bool((values[1:] > values[:-1]).all())
        words = values.astype(np.uint64)
        assert ascending(words).tolist() == sorted(numbers)
        assert run_bounds(words).tolist() == [0, *(np.flatnonzero(np.diff(values) != 1) + 1).tolist(), *([count] if count else [])]


@pytest.mark.parametrize("count", [0, 1, 5, FLAGS_COPIED, FLAGS_COPIED + 1])
def test_any_and_all_of_flags(count: int) -> None:
    """As numpy answers, for none, one, all but one and all of them."""
    for set_at in ([], [0], range(1, count), range(count)):
        flags = np.zeros(count, np.bool_)
        flags[[at for at in set_at if at < count]] = True
        assert any_of(flags) == flags.any()
        assert all_of(flags) == flags.all()


def test_a_word_beside_arrays_is_uint64_and_stays_what_it_is() -> None:
    """Everybody who asks for the same number is given the same word, so nobody may write to it."""
    word = word_of(LARGE)
    assert (np.arange(2, dtype=np.uint64) | word).tolist() == [LARGE, LARGE + 1]
    assert (np.arange(2, dtype=np.uint64) | word).dtype == np.uint64
    with pytest.raises(ValueError, match="read-only"):
        word[...] = 0
    assert int(word_of(LARGE)) == LARGE
