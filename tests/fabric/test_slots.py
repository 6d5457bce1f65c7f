"""Slots of a ring are taken once, and the warmest first."""

from __future__ import annotations

import pytest

from hmmnet.fabric.slots import Slots


def test_every_slot_is_taken_once() -> None:
    """Until none is free."""
    slots = Slots(4)
    assert slots.idle
    assert sorted(slot for slot in (slots.take() for _ in range(4)) if slot is not None) == [0, 1, 2, 3]
    assert slots.free == 0
    assert slots.take() is None
    assert not slots.idle


def test_the_one_that_came_back_last_is_taken_first() -> None:
    """Its memory is warm."""
    slots = Slots(4)
    taken = [slots.take() for _ in range(4)]
    assert taken == [0, 1, 2, 3]
    slots.give_back(2)
    slots.give_back(1)
    assert (slots.take(), slots.take(), slots.take()) == (1, 2, None)


@pytest.mark.parametrize("slot", [-1, 4, 0])
def test_what_was_not_taken_cannot_come_back(slot: int) -> None:
    """Our own mistake."""
    slots = Slots(4)
    with pytest.raises(AssertionError):
        slots.give_back(slot)
