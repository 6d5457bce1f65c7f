"""The rate of the emulated clock as people give it: a number, or ``auto`` for as much as this computer can keep up with."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from hmmnet.errors import WrongUse

Rate: TypeAlias = float | Literal["auto"]
RATE_MIN, RATE_MAX = 1e-9, 1e3
"""Slower, nothing would ever end; faster, a clock tick of the operating system is seconds of the machine."""


def parse_rate(text: str) -> Rate:
    """A rate as written on a command line. Raises WrongUse."""
    if text == "auto":
        return "auto"
    try:
        return check_rate(float(text))
    except ValueError:
        raise WrongUse(f'"{text}" is no rate: write auto, or a number of emulated seconds for a real one, such as 0.1') from None


def check_rate(rate: Rate) -> Rate:
    """`rate`, if a clock can run at it. Raises WrongUse."""
    if rate == "auto":
        return rate
    try:
        finite = math.isfinite(rate)
    except TypeError:
        raise WrongUse(f"a rate of {rate!r} is none: write auto, or a number from {RATE_MIN:g} to {RATE_MAX:g}") from None
    if not (finite and RATE_MIN <= rate <= RATE_MAX):
        raise WrongUse(f"a rate of {rate:g} is out of reach: write auto, or a number from {RATE_MIN:g} to {RATE_MAX:g}")
    return rate
