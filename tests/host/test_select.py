"""What migrate_vma_setup is asked to collect: bits that stay what they are."""

from __future__ import annotations

import pytest

from hmmnet.host.interfaces import Select


def test_what_is_left_of_a_selection_is_one() -> None:
    """Masked, joined and turned around it is a Select, which says what it holds."""
    some = Select.SYSTEM | Select.COMPOUND
    for result in (some & Select.SYSTEM, some & ~Select.COMPOUND, some ^ Select.COMPOUND, 1 & some):
        assert type(result) is Select
        assert result is Select.SYSTEM
    assert repr(some & ~Select.COMPOUND) == "<Select.SYSTEM: 1>"


@pytest.mark.parametrize("bits", list(Select))
def test_who_asks_for_a_bit_gets_a_number(bits: Select) -> None:
    """`has` says the same as `&`, and makes no Select: it is asked in each step of each migration."""
    for some in (Select(0), Select.SYSTEM | Select.PEERS, ~Select.SYSTEM, bits):
        assert type(some.has(bits)) is int
        assert some.has(bits) == (some & bits).value
