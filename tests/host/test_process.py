"""Single values of a process's memory: `load` makes them without numpy, and they are what numpy says."""

from __future__ import annotations

import numpy as np
import pytest

from hmmnet.errors import KernelError
from hmmnet.host.process import CODES, scalar


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("name", [*CODES, "f2", "b1"])
def test_a_value_is_what_numpy_makes_of_its_bytes(name: str, order: str) -> None:
    """Every type of one number, in both byte orders, at its ends and between."""
    kind = np.dtype(order + name)
    draw = np.random.default_rng(7)
    patterns = [bytes(kind.itemsize), b"\x80" + bytes(kind.itemsize - 1), bytes(kind.itemsize - 1) + b"\x80"]
    if kind.kind != "b":
        patterns += [b"\xff" * kind.itemsize, *(draw.bytes(kind.itemsize) for _ in range(50))]
    size, value_of = scalar(kind.str)
    assert size == kind.itemsize
    for raw in patterns:
        wanted = np.frombuffer(raw, dtype=kind)[0].item()
        got = value_of(raw)
        assert type(got) is type(wanted)
        assert got == wanted or (got != got and wanted != wanted)


def test_what_is_no_type_is_refused() -> None:
    """EINVAL, each time."""
    for _ in range(2):
        with pytest.raises(KernelError, match="EINVAL: there is no type"):
            scalar("<u3")
