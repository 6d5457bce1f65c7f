"""Splitting one piece of work over several devices, running the shares at once, and reporting what came of it.

Shares are cut where 64 KiB groups of pages meet, since that is what a device fetches at once: two devices never pull the same group to and
fro. Multi-GPU programs do the same by hand on real hardware.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import trio

from hmmnet.program import JobResult, Machine, Process

from .registry import Report

GROUP_BYTES = 64 << 10
"""What devices fetch when they fault on a page of it."""
MISTAKES_SHOWN = 10
"""Wrong elements that a report lists; the count is always whole."""


async def chosen_devices(machine: Machine, devices: Sequence[str] | str | None) -> tuple[str, ...]:
    """The devices to use: those named (a list, or a text with commas), else all that are not lost.

    Raises ValueError for a name that the machine does not have, and when there is no device, or every one is lost.
    """
    if devices is None:
        if not machine.device_names:
            raise ValueError("this machine has no devices; run it on one that has")
        found = (await machine.report())["devices"]
        names = tuple(name for name in machine.device_names if found[name]["state"] != "lost")
        if not names:
            mend = "`hmmnet fault bounce DEVICE` starts one again, or start the machine anew"
            raise ValueError(f"all devices of this machine are lost: {', '.join(machine.device_names)}; {mend}")
        return names
    names = tuple(devices.split(",")) if isinstance(devices, str) else tuple(devices)
    unknown = [name for name in names if name not in machine.device_names]
    if unknown or not names:
        raise ValueError(f"no device is called {', '.join(unknown) or '(empty)'}; this machine has {', '.join(machine.device_names)}")
    return names


def cut(count: int, shares: int, align: int) -> list[tuple[int, int]]:
    """``[0, count)`` in at most `shares` ranges of about equal size that begin at multiples of `align`; empty ones are left out."""
    step = -(-count // shares)
    step = -(-step // align) * align
    return [(first, min(count, first + step)) for first in range(0, count, step)] if count else []


def group_elements(itemsize: int) -> int:
    """Elements of one group, the alignment of shares."""
    return GROUP_BYTES // itemsize


def whole_groups(size_bytes: int) -> int:
    """`size_bytes` rounded up to whole groups, in bytes; at least one."""
    return max(1, -(-size_bytes // GROUP_BYTES)) * GROUP_BYTES


async def reserve(process: Process, size_bytes: int) -> int:
    """Map whole groups for `size_bytes` and return the address where they begin."""
    address = await process.mmap(whole_groups(size_bytes) + GROUP_BYTES)
    return -(-address // GROUP_BYTES) * GROUP_BYTES


async def run_shares(process: Process, kernel: str, placement: str, shares: Mapping[str, Mapping[str, Any]]) -> dict[str, JobResult]:
    """Launch `kernel` on each device of `shares` with its arguments, all at once, and wait for all."""
    results: dict[str, JobResult] = {}

    async def one(device: str, arguments: Mapping[str, Any]) -> None:
        results[device] = await process.launch(kernel, device, placement, **arguments)

    async with trio.open_nursery() as nursery:
        for device, arguments in shares.items():
            nursery.start_soon(one, device, arguments)
    return {device: results[device] for device in shares}


async def store_array(process: Process, values: npt.NDArray[Any]) -> int:
    """Map memory of its own for `values`, write them, and return the address."""
    address = await reserve(process, values.nbytes)
    if values.nbytes:
        await process.write(address, np.ascontiguousarray(values).view(np.uint8).reshape(-1))
    return address


def mistakes_between(got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> list[str]:
    """Where two arrays differ, in words; empty when they are equal."""
    if got.shape != expected.shape:
        return [f"{got.shape} elements came back, {expected.shape} were expected"]
    wrong = np.flatnonzero(got != expected)
    texts = [f"element {i}: {got[i]} instead of {expected[i]}" for i in wrong[:MISTAKES_SHOWN].tolist()]
    if len(wrong) > MISTAKES_SHOWN:
        texts.append(f"and {len(wrong) - MISTAKES_SHOWN} more")
    return texts


def report_of(workload: str, jobs: Mapping[str, JobResult], mistakes: list[str], **facts: Any) -> Report:
    """A workload's report."""
    return {
        "workload": workload,
        "correct": not mistakes,
        "mistakes": mistakes,
        **facts,
        "devices": {device: dict(job.counters) for device, job in jobs.items()},
    }
