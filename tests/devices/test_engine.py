"""What may be a kernel, and what the engine keeps of one."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any

import pytest

from hmmnet.devices import engine
from hmmnet.devices.access import Kernel, Steps, load_range
from hmmnet.devices.engine import parameters
from hmmnet.plugins import KERNELS, offered
from hmmnet.testing.scripted_host import machine, results_of

PAGE = 0x10000


@dataclass
class Scaled:
    """The sum of doubles, times `by`: equal to others of its kind, so that it has no hash."""

    by: float

    def __call__(self, a: int, n: int) -> Steps:
        values = yield load_range(a, n, "<f8")
        return {"sum": float(values.sum()) * self.by}


class Other:
    """A kernel with other parameters."""

    def __call__(self, b: int) -> Steps:
        yield load_range(b, 1, "<f8")
        return {}


class Slotted:
    """A kernel that cannot be referred to weakly."""

    __slots__ = ()

    def __call__(self, a: int) -> Steps:
        yield load_range(a, 1, "<f8")
        return {}


async def test_any_callable_object_is_a_kernel() -> None:
    """Also one without a hash; two that are equal are two kernels."""
    with pytest.raises(TypeError, match="unhashable"):
        hash(Scaled(2.0))
    async with machine() as (host, _):
        at = host.mmap(PAGE, 1)
        sums: list[tuple[Kernel, dict[str, Any], dict[str, Any]]] = [
            (Scaled(2.0), {"a": at, "n": 8}, {"sum": 0.0}),
            (Slotted(), {"a": at}, {}),
            (Scaled(2.0), {"a": at, "n": 8}, {"sum": 0.0}),
        ]
        for kernel, arguments, results in sums:
            with offered(KERNELS, "own", kernel):
                finished = await host.launch("own", **arguments)
                assert finished.error == ""
                assert results_of(finished) == results
                wrong = await host.launch("own", b=at)
                assert wrong.error.startswith("TypeError: missing a required argument: 'a'")


def test_a_kernel_that_is_gone_is_not_kept() -> None:
    """Neither it nor what was remembered of it; while it lives, it is looked at once."""
    kernel = Scaled(3.0)
    gc.collect()  # kernels of earlier tests go, too
    before = dict(engine._known)
    assert parameters(kernel) is parameters(kernel)
    assert list(parameters(kernel).parameters) == ["a", "n"]
    seen = weakref.ref(kernel)
    del kernel
    gc.collect()
    assert seen() is None
    assert engine._known == before


def test_one_in_the_place_of_another_is_itself() -> None:
    """An object may get the number that one had which is gone; it need not at the first try."""
    for _ in range(3):
        first = Scaled(1.0)
        assert list(parameters(first).parameters) == ["a", "n"]
        del first
        second = Other()
        assert list(parameters(second).parameters) == ["b"]
        del second
