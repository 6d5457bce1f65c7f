"""The host's view of the links: what a device takes for done is counted before anybody is told of it."""

from __future__ import annotations

import trio

from hmmnet.fabric.arbiter import Flow
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.host.interconnect import Interconnect
from hmmnet.host.mm.frames import PhysicalMemory
from hmmnet.topology.load import parse

NBYTES = 1 << 20
RATE = 1e-4
MACHINE = parse(f"""
[[memory]]
name = "node0"
size = "1 MiB"
[[device]]
name = "gpu0"
memory = "1 MiB"
[[link]]
a = "node0"
b = "gpu0"
bandwidth = "{NBYTES / (0.9e-3 * RATE):.0f} B/s"
latency = "0 s"
""")
"""A machine on which `NBYTES` cross the link in 0.9 real milliseconds at `RATE`: what a device does not sleep for."""


def connected() -> Interconnect:
    """Its links."""
    memory = PhysicalMemory()
    memory.add_node("node0", 256)
    return Interconnect(MACHINE, EmulatedClock(RATE), memory)


def granted(interconnect: Interconnect, nbytes: int = NBYTES) -> Flow:
    """A flow to gpu0 by which `nbytes` have left."""
    flow = interconnect.open_in("gpu0", 0)
    if nbytes:
        flow.grant(nbytes, interconnect.now())
    return flow


def moved(interconnect: Interconnect) -> int:
    """Bytes that have crossed the link, as reports have it."""
    return sum(link.bytes_moved for link in interconnect.arbiter.report())


async def test_a_transfer_that_a_device_takes_for_done_is_counted() -> None:
    """Its flow is closed half a millisecond later than the device went on: who asks then waits for that."""
    interconnect = connected()
    flow = granted(interconnect)

    async def close() -> None:
        await trio.sleep(0.0005)
        flow.close(interconnect.now())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(close)
        await interconnect.settle()
        assert moved(interconnect) == NBYTES


async def test_what_is_late_or_has_not_begun_is_not_waited_for() -> None:
    """A flow whose data never come, one that waits for its first chunk, and one that is due much later: accounts are settled without."""
    interconnect = connected()
    flows = [granted(interconnect, nbytes) for nbytes in (NBYTES, 0, NBYTES << 10)]
    with trio.fail_after(5):
        await trio.sleep(0.003)
        await interconnect.settle()
    assert all(flow.open for flow in flows)
