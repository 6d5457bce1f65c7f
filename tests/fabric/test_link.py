"""A link's accounts: what crossed it, how long the model says that took, and how long it took."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmmnet.fabric.link import INTERVALS_MAX, LAUNCH_S, Link, Stretch


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=40))
def test_stretch_is_the_length_of_the_union(spans: list[tuple[int, int]]) -> None:
    """Intervals in any order, overlapping or not, count each moment once."""
    stretch = Stretch()
    for start, length in spans:
        stretch.add(float(start), float(start + length))
    assert stretch.length_s == len({moment for start, length in spans for moment in range(start, start + length)})


def test_a_long_run_costs_bounded_memory() -> None:
    """Many separate transfers are summed up."""
    stretch = Stretch()
    for start in range(3 * INTERVALS_MAX):
        stretch.add(float(start), start + 0.5)
    assert len(stretch._starts) <= INTERVALS_MAX
    assert stretch.length_s == pytest.approx(1.5 * INTERVALS_MAX)


def link() -> Link:
    """100 bytes a second."""
    return Link("wire", "a", "b", 100.0, 0.5)


def test_an_idle_link_reports_nothing_and_keeps_up() -> None:
    """No division by the time that it did not work."""
    report = link().report()
    assert (report.asked_bytes_per_s, report.reached_bytes_per_s, report.bytes_moved, report.transfers) == (0.0, 0.0, 0, 0)
    assert report.kept_up


def test_concurrent_transfers_share_their_time() -> None:
    """Two of 100 bytes in the same two seconds are 100 bytes a second, not 50."""
    wire = link()
    wire.record(100, 1.0, 3.0, 3.0)
    wire.record(100, 1.0, 3.0, 3.0)
    report = wire.report()
    assert report.asked_bytes_per_s == report.reached_bytes_per_s == 100.0
    assert report.transfers == 2
    assert report.kept_up


def test_early_is_not_faster_than_the_link() -> None:
    """Data that were here before their moment wait for it."""
    wire = link()
    wire.record(100, 0.0, 1.0, 0.2)
    assert wire.report().reached_bytes_per_s == 100.0


@pytest.mark.parametrize(("late_s", "kept_up"), [(0.05, True), (0.2, False)])
def test_a_tenth_late_is_tolerated(late_s: float, kept_up: bool) -> None:
    """Ten percent, and no more."""
    wire = link()
    wire.record(100, 0.0, 1.0, 1.0 + late_s)
    assert wire.report().kept_up is kept_up


def test_short_transfers_have_the_time_of_a_launch() -> None:
    """A copy of a few bytes may be late by what a driver needs to set it going."""
    wire = Link("wire", "a", "b", 1e9, 0.0)
    for i in range(10):
        wire.record(100, i * 1e-3, i * 1e-3 + 1e-7, i * 1e-3 + 1e-7 + LAUNCH_S * 0.9)
    assert wire.report().kept_up
