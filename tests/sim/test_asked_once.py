"""What would change nothing is not asked for: each useless migration takes pages out of the mirrors of everybody else.

                node0 ──┬── gpu0     gpu0, gpu1: no way between them but through node0
                        └── gpu1

Oracle: the messages on the wires, by type, and what the jobs have read.
"""

from __future__ import annotations

from collections import Counter

from hmmnet.pages import PAGE_SIZE
from hmmnet.program import Process
from hmmnet.sim import SimulatedMachine, run_virtual, simulated
from hmmnet.sleeping import sleep
from hmmnet.topology.load import parse
from hmmnet.topology.model import Topology

BASE = 0x10_0000_0000
"""Where a group of sixteen pages begins."""
STAYS_S = 1e-3
"""For which a device leaves alone what would not move."""


def two_gpus(kind: str) -> Topology:
    """The machine above."""
    return parse(f"""
[[memory]]
name = "node0"
size = "16 MiB"
[[device]]
name = "gpu[0-1]"
memory = "1 MiB"
kind = "{kind}"
[[link]]
a = "node0"
b = "gpu[0-1]"
bandwidth = "10 GB/s"
latency = "1 us"
""")


class Sent:
    """The control messages of a machine, counted by device and type."""

    def __init__(self, machine: SimulatedMachine) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        machine.network.watch = self._one

    def _one(self, device: str, kind: str) -> None:
        self._counts[device, kind] += 1

    def lately(self, device: str, kind: str) -> int:
        """How many since somebody asked for them last."""
        return self._counts.pop((device, kind), 0)


async def on_gpu0(process: Process) -> int:
    """The first of three pages, which a fault's growth to sixteen leaves; gpu0 has it, and it holds 41."""
    address = await process.mmap(3 * PAGE_SIZE, "rw", BASE)
    await process.store(address, 41)
    assert await process.migrate(address, PAGE_SIZE, "gpu0") == PAGE_SIZE
    return address


async def first_word(process: Process, device: str, address: int) -> int:
    """As a job there reads it."""
    return int((await process.launch("reduction", device, a=address, n=1)).results["sum"])


def test_a_page_that_comes_home_is_asked_for_twice() -> None:
    """Another device's private page does not move; it is home when it has been mapped, and moves then."""

    async def main() -> None:
        async with simulated(two_gpus("private")) as machine:
            process = await machine.create_process()
            address = await on_gpu0(process)
            sent = Sent(machine)
            assert await first_word(process, "gpu1", address) == 41
            assert sent.lately("gpu1", "Migrate") == 2
            assert sent.lately("gpu1", "RangeFault") == 1, "that the page has come home meanwhile is told by the answer's sequence"
            assert (await process.residency(address, 1)).owners == ("gpu1",)

    run_virtual(main)


def test_a_page_that_a_device_keeps_is_asked_for_once() -> None:
    """Another device's coherent page is used where it is, and left alone for a while; then it is asked for once more."""

    async def main() -> None:
        async with simulated(two_gpus("coherent")) as machine:
            process = await machine.create_process()
            address = await on_gpu0(process)
            sent = Sent(machine)
            assert await first_word(process, "gpu1", address) == 41
            assert sent.lately("gpu1", "Migrate") == 1
            await process.mprotect(address, PAGE_SIZE, "r")
            assert await first_word(process, "gpu1", address) == 41
            assert (sent.lately("gpu1", "RangeFault"), sent.lately("gpu1", "Migrate")) == (2, 0)
            await process.mprotect(address, PAGE_SIZE, "rw")
            await sleep(2 * STAYS_S)
            assert await first_word(process, "gpu1", address) == 41
            assert sent.lately("gpu1", "Migrate") == 1
            assert (await process.residency(address, 1)).owners == ("gpu0",)

    run_virtual(main)


def test_who_migrates_nothing_leaves_no_page_alone() -> None:
    """A job that uses another device's page where it is says nothing about whether it could move: the next job asks for it."""

    async def main() -> None:
        async with simulated(two_gpus("coherent")) as machine:
            process = await machine.create_process()
            address = await on_gpu0(process)
            sent = Sent(machine)
            result = await process.launch("reduction", "gpu1", placement="remote", a=address, n=1)
            assert result.results["sum"] == 41
            assert sent.lately("gpu1", "Migrate") == 0
            await process.mprotect(address, PAGE_SIZE, "r")
            assert await first_word(process, "gpu1", address) == 41
            assert sent.lately("gpu1", "Migrate") == 1

    run_virtual(main)


def test_only_devices_that_have_pages_send_them_home() -> None:
    """Of a device without pages there nothing is asked, and nobody's mirror loses what it has of them."""

    async def main() -> None:
        async with simulated(two_gpus("private")) as machine:
            process = await machine.create_process()
            address = await on_gpu0(process)
            await process.store(address + PAGE_SIZE, 7)
            result = await process.launch("reduction", "gpu1", placement="remote", a=address + PAGE_SIZE, n=1)
            assert result.results["sum"] == 7
            sent = Sent(machine)
            assert await process.migrate(address + PAGE_SIZE, PAGE_SIZE, "host") == 0
            assert (sent.lately("gpu0", "Invalidate"), sent.lately("gpu1", "Invalidate")) == (0, 0)
            assert await process.migrate(address, 3 * PAGE_SIZE, "host") == PAGE_SIZE
            assert sent.lately("gpu1", "Invalidate") == 1
            assert (await process.residency(address, 2)).owners == ("node0",)

    run_virtual(main)
