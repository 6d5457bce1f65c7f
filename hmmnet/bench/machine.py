"""Figures of whole machines: how long until every device is ready, and what a device process costs in memory.

The reference for starting is what it would take without the zygote: a fresh interpreter with a device's imports for each device, all at
once. For 64 devices it is eight times the figure of eight, because 64 at once would measure how the computer swaps. The reference for
memory is the private memory of one such interpreter.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import numpy as np
import trio

from hmmnet.launcher.zygote import ZygoteClient
from hmmnet.machine import LaunchedMachine, launch
from hmmnet.topology.load import load
from hmmnet.topology.model import DeviceSpec, LinkSpec, MemoryNode, Topology

from .far import start
from .measurement import Goal, Measurement, measured, median_ratio

STARTS = {"start.2_devices": 2, "start.8_devices": 8, "start.64_devices": 64}
START_GOALS = {2: 1.0, 8: 1.5, 64: 4.0}
"""Real seconds; the first two so that a first look at hmmnet feels immediate."""
ROUNDS = 3
FRESH_MAX = 8
"""Fresh interpreters started at once."""
USED_BYTES = 16 << 20
"""Device memory that is in use while a device's memory is measured; it is taken off."""
SETTLE_S = 2.0
"""A device gives freed message buffers back when it was idle for a second."""
PRIVATE_MB = Goal(10.0, at_least=False, of="value")


def flat(devices: int) -> Topology:
    """`devices` GPUs on one memory."""
    return Topology(
        f"flat-{devices}",
        "for measurements",
        (MemoryNode("node0", 1 << 34),),
        tuple(DeviceSpec(f"gpu{i}", "gpu", 1 << 30, node="node0") for i in range(devices)),
        (),
        tuple(LinkSpec(f"link{i}", "node0", f"gpu{i}", "pcie", 16e9, 1e-6) for i in range(devices)),
    )


def starting(devices: int) -> float:
    """Seconds from `launch` until every device is ready, measurement of the rate included."""

    async def once() -> float:
        began_s = time.perf_counter()
        async with launch(load("pcie-64") if devices == 64 else flat(devices)) as machine:
            assert len(machine.devices) == devices
            return time.perf_counter() - began_s

    return trio.run(once)


def fresh_interpreters(devices: int) -> float:
    """Seconds until `devices` interpreters, each from nothing, have the imports of a device."""
    at_once = min(devices, FRESH_MAX)
    with ExitStack() as stack:
        began_s = time.perf_counter()
        running = [stack.enter_context(start("-m", "hmmnet.devices", "--help", stdout=subprocess.DEVNULL)) for _ in range(at_once)]
        for process in running:
            stack.callback(process.kill)
        for process in running:
            process.wait()
        return (time.perf_counter() - began_s) * devices / at_once


def start_benchmark(name: str, devices: int) -> Callable[[], Sequence[Measurement]]:
    """The function that measures one size."""

    def measure() -> Sequence[Measurement]:
        ours, references = [], []
        for _ in range(ROUNDS):
            ours.append(starting(devices))
            references.append(fresh_interpreters(devices))
        goal = Goal(START_GOALS[devices], at_least=False, of="value")
        return [measured(name, median(ours), "s", goal, median(references), median_ratio(ours, references))]

    return measure


def private_bytes(pid: int) -> int:
    """Memory that only process `pid` has: what would be free if it ended."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(fields[name].split()[0]) << 10 for name in ("Private_Clean", "Private_Dirty"))


async def device_bytes(machine: LaunchedMachine) -> list[int]:
    """What each device costs beyond `USED_BYTES` of its memory that hold data."""
    process = await machine.process()
    for name in machine.device_names:
        address = await process.mmap(USED_BYTES)
        await process.write(address, np.ones(USED_BYTES, dtype=np.uint8))
        moved = await process.migrate(address, USED_BYTES, name)
        assert moved == USED_BYTES, f"{moved} of {USED_BYTES} bytes moved to {name}"
    await trio.sleep(SETTLE_S)
    return [private_bytes(device.pid) - USED_BYTES for device in machine.devices]


async def interpreter_bytes() -> int:
    """Private memory of one interpreter with a device's imports and nothing else."""
    zygote = ZygoteClient()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(zygote.run, lambda _: None)
        await zygote.wait_ready()
        found = private_bytes(zygote.process.pid)
        await zygote.end()
        nursery.cancel_scope.cancel()
    return found


def private_memory() -> Sequence[Measurement]:
    """``device.private_mb``."""

    async def measure() -> tuple[float, float]:
        async with launch(flat(8), rate=1.0) as machine:
            devices = await device_bytes(machine)
        return median(devices) / 1e6, await interpreter_bytes() / 1e6

    device_mb, interpreter_mb = trio.run(measure)
    return [measured("device.private_mb", device_mb, "MB", PRIVATE_MB, interpreter_mb, device_mb / interpreter_mb)]


BENCHMARKS = {name: start_benchmark(name, devices) for name, devices in STARTS.items()} | {"device.private_mb": private_memory}
