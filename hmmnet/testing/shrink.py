"""Make a list that fails shorter: delta debugging (Zeller and Hildebrandt, Simplifying and Isolating Failure-Inducing Input, 2002)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def shrink(items: Sequence[T], fails: Callable[[list[T]], bool]) -> list[T]:
    """The shortest list that this finds by leaving out parts of `items`, in their order, of which ``fails(list)`` still holds.

    No single item of it can be left out. `fails` must answer the same when asked the same, as a simulation from a seed does; it is asked
    about n log n times when few items matter. Raises ValueError when `items` does not fail.
    """
    left = list(items)
    if not fails(left):
        raise ValueError(f"nothing to shrink: with all {len(left)} items it does not fail")
    size = len(left)
    while True:
        size = max(1, size // 2)
        shorter = _without_some(left, size, fails)
        if size == 1 and len(shorter) == len(left):
            return left
        left = shorter


def _without_some(items: list[T], size: int, fails: Callable[[list[T]], bool]) -> list[T]:
    """`items` without those stretches of `size` that are not needed, from the end on: what comes last matters least often."""
    left, end = items, len(items)
    while end > 0:
        start = max(0, end - size)
        candidate = left[:start] + left[end:]
        if fails(candidate):
            left = candidate
        end = start
    return left
