"""Vector kernels against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from hmmnet.devices.access import JobError
from hmmnet.devices.kernels.vector import reduction, vector_add
from tests.devices.plain_memory import PlainMemory


@pytest.mark.parametrize("dtype", ["<f8", "<f4", "<i4", "<u8", "<i2"])
@pytest.mark.parametrize("n", [0, 1, 1000, 300_000])
def test_vector_add(dtype: str, n: int) -> None:
    """out = a + b in every element, whatever the type, in pieces or at once."""
    plain = PlainMemory()
    random = np.random.default_rng(n)
    a, b = (random.integers(0, 100, n).astype(dtype) for _ in range(2))
    at, bt, out = plain.place(a), plain.place(b), plain.place(np.zeros(n, dtype))
    assert plain.drive(vector_add(at, bt, out, n, dtype)) == {}
    assert (plain.array(out, n, dtype) == a + b).all()


@pytest.mark.parametrize(("dtype", "expected"), [("<i8", -3), ("<f8", -3.0), ("<i2", -3), ("<f4", -3.0)])
def test_reduction(dtype: str, expected: float) -> None:
    """The sum, as a plain number."""
    plain = PlainMemory()
    values = np.array([1, 2, -6] + [0] * 200_000, dtype=dtype)
    assert plain.drive(reduction(plain.place(values), len(values), dtype)) == {"sum": expected}


def test_reduction_wraps_as_hardware_does() -> None:
    """Signed and unsigned sums are modulo 2**64."""
    plain = PlainMemory()
    signed = np.array([(1 << 63) - 1, 1], dtype="<i8")
    unsigned = np.array([(1 << 64) - 1, 2], dtype="<u8")
    assert plain.drive(reduction(plain.place(signed), 2)) == {"sum": -(1 << 63)}
    assert plain.drive(reduction(plain.place(unsigned), 2, "<u8")) == {"sum": 1}


@pytest.mark.parametrize("arguments", [{"n": -1}, {"n": 1.5}, {"n": True}, {"dtype": "<q9"}, {"dtype": "S4"}, {"dtype": 7}])
def test_bad_arguments_are_named(arguments: dict[str, object]) -> None:
    """A count that is none, or a type that is no number, ends the job with the argument's name."""
    steps = reduction(**{"a": 0, "n": 1, **arguments})  # type: ignore[arg-type]
    with pytest.raises(JobError, match=f"argument {next(iter(arguments))}"):
        next(steps)
