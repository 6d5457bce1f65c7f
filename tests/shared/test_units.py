"""Quantities are read as people write them, and written as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmmnet.units import parse_rate, parse_size, parse_time, show_rate, show_size, show_time


@pytest.mark.parametrize(("text", "value"), [("16 GiB", 16 << 30), ("1.5MB", 1_500_000), ("4 kib", 4096), ("7 B", 7), ("2TiB", 2 << 40)])
def test_sizes(text: str, value: int) -> None:
    """Powers of 1024 have the i."""
    assert parse_size(text) == value


@pytest.mark.parametrize(("text", "value"), [("31.5 GB/s", 31.5e9), ("100MiB/s", 100 << 20)])
def test_rates(text: str, value: float) -> None:
    """A size per second."""
    assert parse_rate(text) == value


@pytest.mark.parametrize(("text", "value"), [("500 ns", 5e-7), ("1.5us", 1.5e-6), ("2 ms", 0.002), ("1 s", 1.0)])
def test_times(text: str, value: float) -> None:
    """Exact where binary fractions would not be."""
    assert parse_time(text) == value


@pytest.mark.parametrize("text", ["", "16", "GiB", "16 GiX", "-1 GiB", "1e3 MB", "16 GiB/s"])
def test_what_is_no_size(text: str) -> None:
    """The error shows what is wanted."""
    with pytest.raises(ValueError, match="GiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["32 GB", "32 GB/h", "fast", "32/s"])
def test_what_is_no_rate(text: str) -> None:
    """The error shows what is wanted."""
    with pytest.raises(ValueError, match=r"GB|rate"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["5", "5 min", "soon"])
def test_what_is_no_time(text: str) -> None:
    """The error shows what is wanted."""
    with pytest.raises(ValueError, match=r"us|time"):
        parse_time(text)


def test_shown() -> None:
    """Three digits or so, and the unit that fits."""
    assert show_size(0) == "0 B"
    assert show_size(1536) == "1.50 KiB"
    assert show_size(64 << 30) == "64 GiB"
    assert show_rate(31.5e9) == "31.5 GB/s"
    assert show_time(5e-7) == "500 ns"
    assert show_time(0.0123) == "12.3 ms"
    assert show_time(0) == "0 ns"


@given(st.integers(0, 1 << 60))
def test_a_shown_size_reads_back(size_bytes: int) -> None:
    """What is printed can be typed, within the digits that are shown."""
    assert parse_size(show_size(size_bytes)) == pytest.approx(size_bytes, rel=0.01)
    assert parse_rate(show_rate(size_bytes)) == pytest.approx(size_bytes, rel=0.01)


@given(st.floats(1e-10, 1e6))
def test_a_shown_time_reads_back(seconds: float) -> None:
    """No exponents, whatever the size: 999.96 ms is 1000 ms, a day is so many seconds."""
    assert parse_time(show_time(seconds)) == pytest.approx(seconds, rel=0.01)


@pytest.mark.parametrize("text", ["32 Gb", "1 Mib", "5 Kb"])
def test_bits_are_not_taken_for_bytes(text: str) -> None:
    """The slip is a factor of eight, so it is refused and named."""
    with pytest.raises(ValueError, match="bits"):
        parse_size(text)
