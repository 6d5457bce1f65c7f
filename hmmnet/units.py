"""Sizes, rates and times, read from what people write and written as people read them.

Powers of 1024 have the "i" (KiB, MiB, GiB); powers of 1000 do not (kB, MB, GB): link speeds are given in the second, memories in the first.
Case does not matter, but for one thing: a small b after a capital letter means bits (Gb/s), which is refused, not taken for bytes.
"""

from __future__ import annotations

import re
from decimal import Decimal

_SIZES = {"b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_TIMES = {"ns": Decimal("1e-9"), "us": Decimal("1e-6"), "ms": Decimal("1e-3"), "s": Decimal(1)}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z/]+)\s*\Z")


def _split(text: str, what: str, example: str) -> tuple[Decimal, str]:
    match = _QUANTITY.match(text)
    if match is None:
        raise ValueError(f"{text!r} is no {what}: a number and a unit are wanted, such as {example!r}")
    return Decimal(match[1]), match[2]


def parse_size(text: str) -> int:
    """Bytes in a text such as ``16 GiB`` or ``1.5MB``. Raises ValueError."""
    number, unit = _split(text, "size", "16 GiB")
    if unit.lower() not in _SIZES:
        raise ValueError(f"{text!r}: unknown unit {unit!r}; use B, KiB, MiB, GiB, TiB (powers of 1024) or kB, MB, GB, TB (powers of 1000)")
    if unit[0].isupper() and unit[-1] == "b":
        raise ValueError(f"{text!r} counts bits; write bytes ({unit[:-1]}B), an eighth as many")
    return int(number * _SIZES[unit.lower()])


def parse_rate(text: str) -> float:
    """Bytes per second in a text such as ``32 GB/s``. Raises ValueError."""
    try:
        if text.strip().lower().endswith("/s"):
            return float(parse_size(text.strip()[:-2]))
    except ValueError as error:
        raise ValueError(f"{text!r} is no rate: {error}") from None
    raise ValueError(f"{text!r} is no rate: a size per second is wanted, such as '32 GB/s'")


def parse_time(text: str) -> float:
    """Seconds in a text such as ``1.5 us``. Raises ValueError."""
    number, unit = _split(text, "time", "1.5 us")
    if unit.lower() not in _TIMES:
        raise ValueError(f"{text!r}: unknown unit {unit!r}; use ns, us, ms or s")
    return float(number * _TIMES[unit.lower()])


def _scaled(value: float, step: int, units: tuple[str, ...]) -> str:
    i = 0
    while abs(value) >= step and i < len(units) - 1:
        value /= step
        i += 1
    digits = 0 if value == int(value) and abs(value) < 10_000 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f} {units[i]}"


def show_size(size_bytes: float) -> str:
    """A size as a person reads it: ``1.50 MiB``."""
    return _scaled(float(size_bytes), 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def show_rate(bytes_per_s: float) -> str:
    """A rate as a person reads it: ``32 GB/s``."""
    return _scaled(float(bytes_per_s), 1000, ("B/s", "kB/s", "MB/s", "GB/s", "TB/s"))


def show_time(seconds: float) -> str:
    """A time as a person reads it: ``1.50 ms``."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if abs(seconds) * factor >= 1:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds * 1e9)} ns"


def _three_digits(value: float) -> str:
    """Three digits that matter, without an exponent: 1.5, 12.3, 1000."""
    return f"{float(f'{value:.3g}'):.12g}"


def counted(count: int, noun: str) -> str:
    """``1 device``, ``2 devices``, ``1,024 pages``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
