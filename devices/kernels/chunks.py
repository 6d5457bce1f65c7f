"""Arguments of kernels, checked, and long arrays in pieces."""

from __future__ import annotations

from collections.abc import Iterator

from hmmnet.devices.access import JobError

CHUNK_BYTES = 1 << 20
"""Bytes of one array that a kernel asks for at once: a mebibyte is one DMA chunk, and other jobs get their turn in between."""


def counts(**arguments: object) -> None:
    """Raise JobError for an argument that is no whole number of zero or more."""
    for name, value in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise JobError(f"argument {name} is {value!r}; a whole number of zero or more is wanted")


def chunks(count: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """``(first, count)`` of pieces that cover `count` elements."""
    step = max(CHUNK_BYTES // itemsize, 1)
    for first in range(0, count, step):
        yield first, min(step, count - first)
