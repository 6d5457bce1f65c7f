"""The host's view of the links: what a device takes for done is counted before anybody is told of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import trio
import trio.testing

from hmmnet.arena import Arena
from hmmnet.fabric.arbiter import Flow, LinkChange
from hmmnet.fabric.clock import SLEEP_MIN_S, EmulatedClock
from hmmnet.host.interconnect import CROSSING_LOOK, LOOKS_AT_ENDING, Interconnect
from hmmnet.host.mm.frames import PhysicalMemory
from hmmnet.pages import PAGE_SIZE, ZONE_SHIFT
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
    return reaching(monotonic)[0]


def reaching(monotonic: Callable[[], float]) -> tuple[Interconnect, PhysicalMemory, int]:
    """Its links, the memories beside them, and a frame of gpu0's that the CPU reaches."""
    memory = PhysicalMemory()
    memory.add_node("node0", 256)
    interconnect = Interconnect(MACHINE, EmulatedClock(RATE, monotonic), memory)
    zone = memory.add_device(64, "coherent", "gpu0", 16, Arena(64 << ZONE_SHIFT, 16))
    interconnect.attach(zone, "node0")
    return interconnect, memory, int(zone.base)


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


async def test_what_a_cpu_reaches_is_counted_as_it_came_to_pass(autojump_clock: trio.testing.MockClock) -> None:
    """A page of a device's memory was to take 3.5 s, and took 1. While it lasts it is not counted, as a stream is not."""
    interconnect, memory, frame = reaching(trio.current_time)
    interconnect.arbiter.change(1, LinkChange(frozenset({("node0-gpu0", False)}), factor=1e-6), interconnect.now())
    memory.read_small(frame, 0, PAGE_SIZE)
    assert memory.owed is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(memory.owed)
        await trio.sleep(1.0)
        await interconnect.settle()
        assert moved(interconnect) == 0
        interconnect.arbiter.change(1, None, interconnect.now())
    assert trio.current_time() == pytest.approx(1.0, abs=2e-3)
    await interconnect.settle()
    (report,) = (link for link in interconnect.arbiter.report() if link.bytes_moved)
    assert (report.source, report.bytes_moved, report.transfers, report.kept_up) == ("gpu0", PAGE_SIZE, 1, True)
    assert report.asked_bytes_per_s == report.reached_bytes_per_s == pytest.approx(PAGE_SIZE / RATE, rel=1e-4)


async def test_what_a_cpu_has_reached_is_not_kept_for_long(autojump_clock: trio.testing.MockClock) -> None:
    """Accesses that are over are counted without anybody asking."""
    interconnect, memory, frame = reaching(trio.current_time)
    for _ in range(10 * CROSSING_LOOK):
        memory.read_small(frame, 0, 8)
        await trio.sleep(1e-3)
    assert moved(interconnect) >= 9 * CROSSING_LOOK * 8
    await interconnect.settle()
    assert moved(interconnect) == 10 * CROSSING_LOOK * 8
