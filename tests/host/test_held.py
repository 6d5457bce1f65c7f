"""Which pages a device may hold, as its subscription remembers them on the host: against a plain set, and at the borders of blocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmmnet.host.held import HeldPages
from hmmnet.pages import HUGE_PAGES, PAGES_MAX

FIRST = 5 * HUGE_PAGES - 40
PAGES = 3 * HUGE_PAGES

Range = tuple[int, int]


@st.composite
def ranges(draw: st.DrawFn) -> Range:
    """A range of pages that is not empty, within four blocks."""
    start = draw(st.integers(0, PAGES - 1))
    length = draw(st.sampled_from((1, 2, 40, 41, HUGE_PAGES, 2 * HUGE_PAGES)) | st.integers(1, PAGES))
    return FIRST + start, FIRST + min(start + length, PAGES)


@given(st.lists(st.tuples(st.booleans(), ranges()), max_size=12), st.lists(ranges(), min_size=1, max_size=8))
def test_it_agrees_with_a_set(steps: list[tuple[bool, Range]], asked: list[Range]) -> None:
    """Pages added and discarded in any order: a range overlaps if one of its pages is in."""
    held, plain = HeldPages(), set[int]()
    for adds, (start, end) in steps:
        if adds:
            held.add(start, end)
            plain.update(range(start, end))
        else:
            held.discard(start, end)
            plain.difference_update(range(start, end))
    for start, end in asked:
        assert held.overlaps(start, end) == (not plain.isdisjoint(range(start, end)))


def test_all_of_an_address_space_is_looked_through_as_far_as_anything_is_held() -> None:
    """An address space that ends is one range; what is held of it are few blocks."""
    held = HeldPages()
    assert not held.overlaps(0, PAGES_MAX)
    held.add(PAGES_MAX // 2, PAGES_MAX // 2 + 1)
    assert held.overlaps(0, PAGES_MAX)
    assert not held.overlaps(0, PAGES_MAX // 2)
    held.discard(0, PAGES_MAX)
    assert not held.overlaps(0, PAGES_MAX)


def test_a_device_that_asks_for_more_than_is_remembered_is_told_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a peer makes the host remember has a bound."""
    monkeypatch.setattr("hmmnet.host.held.BLOCKS_MAX", 3)
    held = HeldPages()
    held.add(0, 3 * HUGE_PAGES)
    assert not held.overlaps(3 * HUGE_PAGES, PAGES_MAX)
    held.add(5 * HUGE_PAGES, 5 * HUGE_PAGES + 1)
    held.discard(0, PAGES_MAX)
    held.add(0, 1)
    assert held.overlaps(7 * HUGE_PAGES, 7 * HUGE_PAGES + 1)
