"""A pace gives chunks absolute moments: errors do not add up, delays are made up for within bounds, and rates may change."""

from __future__ import annotations

import itertools

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
    pace.change_rate(50.0, 2.0)
    assert pace.grant(100, 0.0, 0.0).finish_s == 3.0


STRETCHES = st.lists(st.tuples(st.floats(0.0, 5.0), st.sampled_from([1e-6, 0.5, 1.0, 3.0, 1e6])), max_size=12)
"""After so long, go on at so many bytes per second."""


@settings(deadline=None)
@given(st.floats(0.0, 3.0), st.lists(st.integers(1, 10), min_size=1, max_size=12), STRETCHES)
def test_a_transfer_takes_what_its_links_carry_at_the_rates_of_each_stretch(
    start_s: float, chunks: list[int], stretches: list[tuple[float, float]]
) -> None:
    """Chunks ask for their turn as soon as the one before has left. All is there when the integral of the rate is all bytes."""
    pace, now_s, left = Pace(start_s, 1.0, 0.25), 0.0, 0
    ends = itertools.accumulate(after_s for after_s, _ in stretches)
    changes = list(zip(ends, (rate for _, rate in stretches), strict=True))
    pending = list(changes)
    pace.grant(chunks[0], 0.0, 0.0)
    while left < len(chunks):
        if pending and pending[0][0] <= pace.last.start_s:
            now_s, rate = pending.pop(0)
            pace.change_rate(rate, now_s)
        else:
            left += 1
            now_s = max(now_s, pace.last.start_s)
            if left < len(chunks):
                pace.grant(chunks[left], now_s, 0.0)
    for now_s, rate in pending:
        pace.change_rate(rate, now_s)
    assert pace.there_s == pytest.approx(_carried_by(sum(chunks), start_s, changes) + 0.25)


def _carried_by(nbytes: float, start_s: float, changes: list[tuple[float, float]]) -> float:
    """When links that begin at `start_s`, at 1 byte per second, have carried so many bytes."""
    rate = 1.0
    for change_s, then in changes:
        if change_s > start_s:
            if nbytes <= (change_s - start_s) * rate:
                break
            nbytes, start_s = nbytes - (change_s - start_s) * rate, change_s
        rate = then
    return start_s + nbytes / rate


def test_who_waits_is_told_of_a_change() -> None:
    """Of another rate, also where all is there; not of the same."""
    told: list[float] = []
    pace = Pace(0.0, 100.0, 0.0)
    pace.watch(lambda: told.append(pace.last.start_s))
    pace.grant(100, 0.0, 0.0)
    pace.grant(100, 0.0, 0.0)
    pace.change_rate(100.0, 0.5)
    pace.change_rate(50.0, 0.5)
    pace.change_rate(100.0, 7.0)
    assert told == [1.5, 1.5]


def test_a_start_that_is_not_here_yet_is_no_matter_of_the_rate() -> None:
    """Nothing has been carried before, and nobody is carried to it sooner."""
    pace = Pace(10.0, 1e-8, 0.0)
    pace.change_rate(1.0, 1.0)
    assert pace.grant(5, 2.0, 0.0) == (10.0, 15.0, 15.0)
    pace.change_rate(5.0, 3.0)
    assert pace.last == (10.0, 11.0, 11.0)


def test_who_has_not_begun_hears_when_it_does() -> None:
    """Whatever the rate: later, sooner, and now, if that was before. Who has begun goes on."""
    pace, told = Pace(10.0, 1.0, 0.25), []
    pace.watch(lambda: told.append(pace.last.start_s))
    pace.grant(5, 2.0, 0.0)
    pace.hear(1.0, 20.0, 3.0)
    assert pace.last == (20.0, 25.0, 25.25)
    pace.hear(5.0, 8.0, 4.0)
    assert pace.last == (8.0, 9.0, 9.25)
    pace.hear(5.0, None, 5.0)
    pace.hear(5.0, 5.5, 6.0)
    assert pace.last == (6.0, 7.0, 7.25)
    pace.hear(5.0, 5.5, 6.5)
    pace.hear(5.0, 30.0, 6.5)
    assert pace.last == (6.0, 7.0, 7.25)
    assert told == [20.0, 20.0, 8.0, 6.0]


def test_unpaced_is_now() -> None:
    """No wait, no latency."""
    assert UNPACED.grant(1 << 20, 7.0, 0.0) == (7.0, 7.0, 7.0)
