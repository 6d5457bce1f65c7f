"""Delta debugging: what is left cannot be made shorter, is in order, and still fails."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmmnet.testing import shrink


@given(st.lists(st.integers(0, 99), max_size=60), st.sets(st.integers(0, 99), max_size=4))
def test_what_matters_is_left(items: list[int], needed: set[int]) -> None:
    """Of a failure that needs certain items: one of each, no more, in their order."""

    def fails(some: list[int]) -> bool:
        return needed <= set(some)

    if not fails(items):
        with pytest.raises(ValueError, match=f"with all {len(items)} items it does not fail"):
            shrink(items, fails)
        return
    left = shrink(items, fails)
    assert sorted(left) == sorted(needed)
    assert left == [item for item in left if item in items]
    places = [items.index(item) for item in left]
    assert len(set(places)) == len(left)


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 60))
def test_no_single_item_can_be_left_out(items: list[int], least: int) -> None:
    """Also where many short lists would do."""

    def fails(some: list[int]) -> bool:
        return sum(some) >= least

    if not fails(items):
        return
    left = shrink(items, fails)
    assert fails(left)
    assert not any(fails(left[:i] + left[i + 1 :]) for i in range(len(left)))
    positions = iter(items)
    assert all(item in positions for item in left), "a part of the items, in their order"


def test_it_does_not_ask_for_ever() -> None:
    """Two of a thousand items: a few dozen questions."""
    asked = 0

    def fails(some: list[int]) -> bool:
        nonlocal asked
        asked += 1
        return {100, 700} <= set(some)

    assert shrink(range(1000), fails) == [100, 700]
    assert asked < 120
