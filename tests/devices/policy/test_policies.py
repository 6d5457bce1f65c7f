"""What policies plan."""

from __future__ import annotations

import numpy as np
import pytest

from hmmnet.devices.policy import POLICIES
from hmmnet.devices.policy.demand import Demand


def plan(name: str, pages: list[int]) -> list[tuple[int, int]]:
    return POLICIES[name].ranges(np.array(pages, dtype=np.uint64), np.zeros(len(pages), dtype=np.bool_))


@pytest.mark.parametrize(
    ("pages", "ranges"),
    [
        ([], []),
        ([0], [(0, 16)]),
        ([17], [(16, 32)]),
        ([15, 16], [(0, 32)]),
        ([5, 40], [(0, 16), (32, 48)]),
        (list(range(256)), [(0, 256)]),
        ([(1 << 35) - 1], [((1 << 35) - 16, 1 << 35)]),
    ],
)
def test_demand_grows_to_64_kib(pages: list[int], ranges: list[tuple[int, int]]) -> None:
    """A fault moves its aligned group of sixteen pages; neighbouring groups are one range."""
    assert plan("demand", pages) == ranges


def test_remote_moves_nothing() -> None:
    """Remote placement never migrates."""
    assert plan("remote", [1, 2, 3]) == []


def test_group_size_is_a_parameter() -> None:
    """Growth can be switched off."""
    assert Demand(group_pages=1).ranges(np.array([3, 4, 9], dtype=np.uint64), np.zeros(3, dtype=np.bool_)) == [(3, 5), (9, 10)]
