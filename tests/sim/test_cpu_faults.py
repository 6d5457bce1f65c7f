"""What a CPU pays for pages that it touches on a device: a fault for each, or one for a huge page, however many come in one transfer.

                node0 ──10 GB/s, 5 us── gpu0

Oracle: the figures of the link; a loop of loads, page by page, which is what the CPU does.
"""

from __future__ import annotations

import pytest

import hmmnet
from hmmnet.observe.counters import CPU_FAULT
from hmmnet.sim import SimulatedMachine
from hmmnet.topology.load import parse

PAGE = 4096
MIB = 1 << 20
LATENCY_S, BYTES_PER_S = 5e-6, 10e9
MACHINE = parse("""
[[memory]]
name = "node0"
size = "64 MiB"
[[device]]
name = "gpu0"
memory = "16 MiB"
[[link]]
a = "node0"
b = "gpu0"
bandwidth = "10 GB/s"
latency = "5 us"
""")


def read(pages: int, *, at_once: bool, huge: bool = False) -> tuple[int, float]:
    """Read so many pages that gpu0 has: CPU faults that are counted, and the time that it takes."""

    async def main(machine: SimulatedMachine) -> tuple[int, float]:
        process = await machine.create_process()
        address = (await process.mmap(4 * MIB) + 2 * MIB - 1) // (2 * MIB) * (2 * MIB)
        await process.madvise(address, 2 * MIB, "HUGEPAGE" if huge else "NOHUGEPAGE")
        await process.write(address, bytes([7]) * 2 * MIB)
        assert await process.migrate(address, 2 * MIB, "gpu0") == 2 * MIB
        began_s = machine.emulated_s()
        for first in range(0, pages, pages if at_once else 1):
            count = pages if at_once else 1
            assert await process.read(address + first * PAGE, count * PAGE) == bytes([7]) * count * PAGE
        took_s = machine.emulated_s() - began_s
        (counted,) = [row for row in (await machine.report())["profile"] if row["kind"] == CPU_FAULT]
        await process.exit()
        return counted["count"], took_s

    return hmmnet.simulate(main, MACHINE).value


@pytest.mark.parametrize("pages", [1, 3, 4, 40, 512])
def test_a_range_costs_what_its_pages_cost_one_by_one(pages: int) -> None:
    """As many faults, and as long, to a hundredth."""
    together, alone = read(pages, at_once=True), read(pages, at_once=False)
    assert together[0] == alone[0] == pages
    assert alone[1] == pytest.approx(pages * (LATENCY_S + PAGE / BYTES_PER_S), rel=0.01)
    assert together[1] == pytest.approx(alone[1], rel=0.01)


def test_a_huge_page_is_one_fault() -> None:
    """2 MiB that are mapped as one come home as one: one fault, one latency."""
    faults, took_s = read(512, at_once=True, huge=True)
    assert faults == 1
    assert took_s == pytest.approx(LATENCY_S + 2 * MIB / BYTES_PER_S, rel=0.01)
