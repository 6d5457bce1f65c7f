"""The host's view of the links: what a device takes for done is counted before anybody is told of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import trio
import trio.testing

from hmmnet.fabric.arbiter import Flow
from hmmnet.fabric.clock import SLEEP_MIN_S, EmulatedClock
from hmmnet.host.interconnect import LOOKS_AT_ENDING, Interconnect
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


def connected(monotonic: Callable[[], float] = time.monotonic) -> Interconnect:
    """Its links."""
    memory = PhysicalMemory()
    memory.add_node("node0", 256)
    return Interconnect(MACHINE, EmulatedClock(RATE, monotonic), memory)


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


@pytest.mark.parametrize(("nbytes", "looks"), [((0, NBYTES << 10), 0), ((NBYTES, 0, NBYTES << 10), LOOKS_AT_ENDING)])
async def test_accounts_wait_a_few_looks_for_what_is_late(
    nbytes: tuple[int, ...], looks: int, autojump_clock: trio.testing.MockClock
) -> None:
    """In vain, if its data never come. For what waits for its first chunk, and what is due much later, they do not."""
    interconnect = connected(trio.current_time)
    flows = [granted(interconnect, length) for length in nbytes]
    await trio.sleep(0.003)
    began_s = trio.current_time()
    await interconnect.settle()
    assert trio.current_time() - began_s == pytest.approx(looks * SLEEP_MIN_S / 2)
    assert all(flow.open for flow in flows)
