"""A device reads memory of its host and of its peers, each by the way that lies between: hmm_dma_map on a running machine.

                node0 ── sw0 ── near (coherent)      near and reader: below one switch, bus address
                  │       └──── reader               far and reader: through the host bridge
                  └──────────── far (coherent)       node0 and reader: ordinary memory

Oracle: drivers/pci/p2pdma.c for the kind of each way; the links of the topology for its bandwidth; plain numpy for the bytes.
"""

from __future__ import annotations

import numpy as np
import pytest
import trio

import hmmnet
from hmmnet.errors import BusError
from hmmnet.faults import fault
from hmmnet.host.interconnect import STALL_S
from hmmnet.pages import (
    HMM_PFN_DMA_MAPPED,
    HMM_PFN_P2PDMA,
    HMM_PFN_P2PDMA_BUS,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_VALID,
    PAGE_SHIFT,
    PAGE_SIZE,
)
from hmmnet.sim import SimulatedMachine
from hmmnet.topology.load import parse

MACHINE = parse("""
[[memory]]
name = "node0"
size = "64 MiB"
[[switch]]
name = "sw0"
[[device]]
name = "near"
kind = "coherent"
memory = "16 MiB"
[[device]]
name = "reader"
memory = "16 MiB"
[[device]]
name = "far"
kind = "coherent"
memory = "16 MiB"
[[link]]
a = "node0"
b = "sw0"
bandwidth = "10 GB/s"
latency = "1 us"
[[link]]
a = "sw0"
b = "near"
bandwidth = "40 GB/s"
latency = "100 ns"
[[link]]
a = "sw0"
b = "reader"
bandwidth = "20 GB/s"
latency = "100 ns"
[[link]]
a = "node0"
b = "far"
bandwidth = "5 GB/s"
latency = "1 us"
""")
MARKS = HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA | HMM_PFN_P2PDMA_BUS
COUNT = 1 << 17
NBYTES = COUNT * 8
WAYS = {
    "host": ("memory", HMM_PFN_DMA_MAPPED, 10e9),
    "near": ("bus_address", HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA_BUS, 20e9),
    "far": ("host_bridge", HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA, 5e9),
}
"""Of each place: the way to it, the marks of its pages, and the bottleneck between."""


async def read_from(machine: SimulatedMachine, place: str) -> tuple[set[int], float]:
    """Put values at `place` and have the reader sum them up there; the marks of their pages, and the bandwidth that was had."""
    process = await machine.create_process()
    address = await process.mmap(NBYTES)
    values = np.arange(COUNT, dtype="<u8")
    await process.write(address, values)
    if place != "host":
        assert await process.migrate(address, NBYTES, place) == NBYTES
    before = (await machine.report())["devices"]["reader"]["dma_bytes"]
    begun_s = machine.emulated_s()
    done = await process.launch("reduction", "reader", "remote", a=address, n=COUNT, dtype="<u8")
    passed_s = machine.emulated_s() - begun_s
    assert done.results["sum"] == int(values.sum())
    assert done.counters["pages_in"] == 0
    after = (await machine.report())["devices"]["reader"]["dma_bytes"]
    way = WAYS[place][0]
    assert {name: after[name] - before.get(name, 0) for name in after} == {name: NBYTES * (name == way) for name in after}
    context = next(iter(machine.device("reader").contexts.values())).context
    words = await context.range_fault(address >> PAGE_SHIFT, (address >> PAGE_SHIFT) + 4, HMM_PFN_REQ_FAULT)
    assert all(int(word) & HMM_PFN_VALID for word in words)
    await process.exit()
    return {int(word) & MARKS for word in words}, NBYTES / passed_s


@pytest.mark.parametrize("place", list(WAYS))
def test_the_way_to_a_page_is_that_of_the_topology(place: str) -> None:
    """Marks of the words, bytes by way, and a time that is that of the way's narrowest link (within a fifth: faults cost latency)."""
    marks, bytes_per_s = hmmnet.simulate(lambda machine: read_from(machine, place), MACHINE).value
    _, expected, bottleneck = WAYS[place]
    assert marks == {expected}
    assert 0.5 * bottleneck < bytes_per_s <= bottleneck


def test_a_range_with_pages_at_all_places_has_the_marks_of_each() -> None:
    """Pages of one range at the host, at both peers and at the reader itself, which needs no map for its own."""

    async def main(machine: SimulatedMachine) -> list[int]:
        process = await machine.create_process()
        address = await process.mmap(4 * PAGE_SIZE)
        await process.write(address, bytes(4 * PAGE_SIZE))
        for i, device in enumerate(("near", "far", "reader")):
            assert await process.migrate(address + i * PAGE_SIZE, PAGE_SIZE, device) == PAGE_SIZE
        context = next(iter(machine.device("reader").contexts.values())).context
        first = address >> PAGE_SHIFT
        return [int(word) & MARKS for word in await context.range_fault(first, first + 4, HMM_PFN_REQ_FAULT)]

    got = hmmnet.simulate(main, MACHINE).value
    assert got == [WAYS["near"][1], WAYS["far"][1], 0, WAYS["host"][1]]


@pytest.mark.parametrize("back", [True, False])
def test_a_cpu_stalls_on_a_link_that_is_down(back: bool) -> None:
    """Coherent memory behind it: the load ends when the link is back, or as a bus error that says so; nothing is lost."""

    async def main(machine: SimulatedMachine) -> float:
        process = await machine.create_process()
        address = await process.mmap(PAGE_SIZE)
        await process.write(address, b"\7" * PAGE_SIZE)
        assert await process.migrate(address, PAGE_SIZE, "near") == PAGE_SIZE
        lasts = {"lasts": "1 s"} if back else {}
        machine.add_fault(fault("link.down", on="*near*", **lasts))
        await trio.sleep(1e-6)
        began_s = machine.emulated_s()
        if back:
            assert await process.read(address, 8) == b"\7" * 8
        else:
            with pytest.raises(BusError, match="intact on a device that the CPU does not reach: no link that works leads from"):
                await process.read(address, 8)
        took_s = machine.emulated_s() - began_s
        machine.carrier.heal()
        assert await process.read(address, 8) == b"\7" * 8
        await process.exit()
        return took_s

    assert hmmnet.simulate(main, MACHINE).value == pytest.approx(1.0 if back else STALL_S, abs=0.1)


def test_the_cpu_reaches_coherent_memory_at_the_rate_of_its_link() -> None:
    """A load and a store of a megabyte each, in place: each takes what the link takes, and no page moves."""

    async def main(machine: SimulatedMachine) -> list[float]:
        process = await machine.create_process()
        address = await process.mmap(NBYTES)
        values = np.arange(COUNT, dtype="<u8")
        await process.write(address, values)
        await process.migrate(address, NBYTES, "far")
        times = [machine.emulated_s()]
        assert await process.read(address, NBYTES) == values.tobytes()
        times.append(machine.emulated_s())
        await process.write(address, values[::-1].copy())
        times.append(machine.emulated_s())
        assert (await process.residency(address, NBYTES // PAGE_SIZE)).owners == ("far",)
        assert await process.load(address) == COUNT - 1
        return times

    times = hmmnet.simulate(main, MACHINE).value
    assert np.diff(times) == pytest.approx([1e-6 + NBYTES / 5e9] * 2, rel=0.02)
