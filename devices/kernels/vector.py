"""Kernels over arrays."""

from __future__ import annotations

import numpy as np

from hmmnet.devices.access import JobError, Steps, load_range, store_range

from .chunks import chunks, counts


def element(dtype: str) -> np.dtype[np.generic]:
    """The element type called `dtype`. Raises JobError."""
    try:
        kind = np.dtype(dtype)
    except TypeError as error:
        raise JobError(f"argument dtype is {dtype!r}: {error}") from error
    if kind.kind not in "iufc" or kind.itemsize & (kind.itemsize - 1):
        raise JobError(f"argument dtype is {dtype!r}; a number type such as '<i8' or '<f8' is wanted")
    return kind


def vector_add(a: int, b: int, out: int, n: int, dtype: str = "<f8") -> Steps:
    """``out[i] = a[i] + b[i]`` for `n` elements. The arrays may be the same, but not overlap otherwise."""
    counts(a=a, b=b, out=out, n=n)
    kind = element(dtype)
    for first, count in chunks(n, kind.itemsize):
        offset = first * kind.itemsize
        left = yield load_range(a + offset, count, kind)
        right = yield load_range(b + offset, count, kind)
        yield store_range(out + offset, left + right)
    return {}


def reduction(a: int, n: int, dtype: str = "<i8") -> Steps:
    """The sum of `n` elements: ``{"sum": ...}``. Integers are summed modulo 2**64, as the hardware would."""
    counts(a=a, n=n)
    kind = element(dtype)
    if kind.kind == "c":
        raise JobError("reduction sums integers and real numbers")
    total: int | float = 0
    for first, count in chunks(n, kind.itemsize):
        values = yield load_range(a + first * kind.itemsize, count, kind)
        if kind.kind == "f":
            total += float(values.sum(dtype=np.float64))
        else:
            wide = np.uint64 if kind.kind == "u" else np.int64
            total = (int(total) + int(values.sum(dtype=wide))) & ((1 << 64) - 1)
    if kind.kind == "i" and total >= 1 << 63:
        total -= 1 << 64
    return {"sum": total}
