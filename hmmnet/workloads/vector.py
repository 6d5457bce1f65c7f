"""Arrays: the programs with nothing but bandwidth in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hmmnet.program import Machine

from .registry import Report
from .shares import chosen_devices, cut, group_elements, mistakes_between, report_of, reserve, run_shares, store_array

ELEMENTS = 1 << 20
ITEM_BYTES = 8


async def vector_add(
    machine: Machine, n: int = ELEMENTS, devices: Sequence[str] | str | None = None, placement: str = "demand", seed: int = 1
) -> Report:
    """``out = a + b`` over `n` doubles, checked against numpy element by element."""
    names = await chosen_devices(machine, devices)
    random = np.random.default_rng(seed)
    a, b = random.random(n), random.random(n)
    process = await machine.create_process()
    a_at, b_at, out_at = await store_array(process, a), await store_array(process, b), await reserve(process, a.nbytes)
    shares = {
        name: {"a": a_at + ITEM_BYTES * first, "b": b_at + ITEM_BYTES * first, "out": out_at + ITEM_BYTES * first, "n": end - first}
        for name, (first, end) in zip(names, cut(n, len(names), group_elements(ITEM_BYTES)), strict=False)
    }
    jobs = await run_shares(process, "vector_add", placement, shares)
    got = await process.read_array(out_at, "<f8", n)
    await process.exit()
    return report_of("vector_add", jobs, mistakes_between(got, a + b), elements=n)


async def reduction(
    machine: Machine, n: int = ELEMENTS, devices: Sequence[str] | str | None = None, placement: str = "demand", seed: int = 1
) -> Report:
    """The sum of `n` integers; the devices' partial sums are added up on the CPU and compared with Python's exact sum."""
    names = await chosen_devices(machine, devices)
    values = np.random.default_rng(seed).integers(-(1 << 40), 1 << 40, n, dtype=np.int64)
    process = await machine.create_process()
    at = await store_array(process, values)
    shares = {
        name: {"a": at + ITEM_BYTES * first, "n": end - first}
        for name, (first, end) in zip(names, cut(n, len(names), group_elements(ITEM_BYTES)), strict=False)
    }
    jobs = await run_shares(process, "reduction", placement, shares)
    await process.exit()
    got, expected = sum(int(job.results["sum"]) for job in jobs.values()), sum(values.tolist())
    mistakes = [] if got == expected else [f"the sum is {got} instead of {expected}"]
    return report_of("reduction", jobs, mistakes, elements=n, sum=got)
