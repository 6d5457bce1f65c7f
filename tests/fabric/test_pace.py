"""A pace gives chunks absolute moments: errors do not add up, delays are made up for within bounds, and rates may change."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmmnet.fabric.pace import UNPACED, Pace


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 0.02), min_size=1, max_size=50))
def test_small_delays_do_not_add_up(delays: list[float]) -> None:
    """However late each chunk really leaves, within the bound, the last is there when arithmetic says."""
    pace = Pace(5.0, 100.0, 0.25)
    moment_s = 5.0
    for delay_s in delays:
        grant = pace.grant(10, moment_s + delay_s, 0.02)
        assert grant.start_s == pytest.approx(moment_s)
        moment_s = grant.finish_s
    assert grant.arrive_s == pytest.approx(5.0 + 0.1 * len(delays) + 0.25)


def test_a_long_delay_is_lost() -> None:
    """Beyond the bound, the stream goes on from there."""
    pace = Pace(0.0, 100.0, 0.0)
    assert pace.grant(100, 10.0, 0.5) == (9.5, 10.5, 10.5)
    assert pace.grant(100, 10.0, 0.5) == (10.5, 11.5, 11.5)


def test_rate_changes_for_what_follows() -> None:
    """As the host's credits tell."""
    pace = Pace(0.0, 100.0, 0.0)
    pace.grant(100, 0.0, 0.0)
    pace.bytes_per_s = 50.0
    assert pace.grant(100, 0.0, 0.0).finish_s == 3.0


def test_unpaced_is_now() -> None:
    """No wait, no latency."""
    assert UNPACED.grant(1 << 20, 7.0, 0.0) == (7.0, 7.0, 7.0)
