"""A device that dies at every message in turn: nothing hangs, nothing leaks, and no byte is wrong; what is gone says so.

The sweep is complete: the kill moves on by one message until the program ends before it. The other device goes on, the dead one comes back.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
import trio

from hmmnet.errors import BusError, HmmnetError
from hmmnet.host.mm.invariants import check
from hmmnet.host.service import Host
from hmmnet.program import Process
from hmmnet.sim import SimulatedMachine, run_virtual, simulated
from hmmnet.topology.load import parse
from hmmnet.topology.model import Personality

from .countdown import Countdown

PAGE = 4096
COUNT = 1 << 12
NBYTES = COUNT * 8
MACHINE = parse("""
[[memory]]
name = "node0"
size = "8 MiB"
[[device]]
name = "gpu[0-1]"
memory = "4 MiB"
[[link]]
a = "node0"
b = "gpu[0-1]"
bandwidth = "10 GB/s"
latency = "1 us"
""")

Numbers = npt.NDArray[np.uint64]


async def program(machine: SimulatedMachine, process: Process) -> None:
    """Demand faults, explicit migration both ways, remote writes, from one device to the other, fork."""
    data, out = await process.mmap(NBYTES), await process.mmap(NBYTES)
    values = np.arange(COUNT, dtype="<u8")
    await put(process, data, values)
    await put(process, out, np.zeros(COUNT, dtype="<u8"))
    for device, placement in (("gpu1", "demand"), ("gpu0", "demand"), ("gpu1", "remote")):
        try:
            await process.launch("vector_add", device, placement, a=data, b=data, out=out, n=COUNT, dtype="<u8")
            complete = True
        except HmmnetError:
            assert "gpu1" not in machine.running
            complete = False
        got = await whole(process, out)
        gone = got == 0
        assert (gone | (got == values * 2)).all(), "a word that nobody wrote"
        if complete and "gpu1" in machine.running:
            assert gone.sum() == 1
        await put(process, out, np.zeros(COUNT, dtype="<u8"))
    await put(process, data, values)
    for place in ("gpu1", "gpu0", "gpu1"):
        try:
            await process.migrate(data, NBYTES, place)
        except HmmnetError:
            assert "gpu1" not in machine.running
    child = await process.fork()
    try:
        assert (await child.read_array(data, "<u8", COUNT) == values).all()
    except BusError:
        assert "gpu1" not in machine.running
    await child.exit()


async def put(process: Process, address: int, values: Numbers) -> None:
    """Store `values`; pages that are gone are given up first."""
    while True:
        try:
            await process.write(address, values)
        except BusError as gone:
            if "gpu1" not in str(gone):
                raise
            await process.madvise(gone.address & ~(PAGE - 1), PAGE, "DONTNEED")
        else:
            return


async def whole(process: Process, address: int) -> Numbers:
    """The array, page by page; zeros for pages that are gone."""
    got = np.zeros(COUNT, np.uint64)
    for first in range(0, COUNT, PAGE // 8):
        try:
            got[first : first + PAGE // 8] = await process.read_array(address + first * 8, "<u8", PAGE // 8)
        except BusError as gone:
            if "gpu1" not in str(gone):
                raise
    return got


async def one_life(at: int, personality: Personality) -> bool:
    """Kill gpu1 at message `at` of the program; whether it was still running then."""
    trace = Countdown(at)
    async with simulated(MACHINE, trace=trace, personality=personality) as machine, trio.open_nursery() as nursery:
        process = await machine.create_process()

        async def kill() -> None:
            await trace.now.wait()
            if "gpu1" in machine.running:
                await machine.kill_device("gpu1")

        nursery.start_soon(kill)
        await program(machine, process)
        hit = trace.now.is_set()
        nursery.cancel_scope.cancel()
        if hit:
            await machine.start_device("gpu1")
            again = await process.malloc(NBYTES)
            await process.write(again, np.arange(COUNT, dtype="<u8"))
            assert await process.migrate(again, NBYTES, "gpu1") == NBYTES
            assert (await process.read_array(again, "<u8", COUNT) == np.arange(COUNT)).all()
        await process.exit()
        await trio.sleep(10)  # leases end, frames go back
        host = cast(Host, machine.host)
        check(host.memory, [space.mm for space in host.spaces.values()])
        assert host.memory.nodes[0].allocator.used_count == 1, "host frames are left over"
        report = await machine.report()
        assert all(figures["iommu_refused"] == 0 for figures in report["devices"].values())
    return hit


@pytest.mark.parametrize(("seed", "personality"), [(0, "today"), (1, "today"), (0, "v25")])
def test_death_at_every_message(seed: int, personality: Personality) -> None:
    """From the first message to the last, with two orders of events; and where mirrors hear of a change at its end."""
    at, messages = 1, 0
    while run_virtual(one_life, at, personality, seed=seed, limit_s=600.0):
        at += 1
        messages += 1
    assert messages > 60
