"""Host memory is used up, and a fault wants a page: somebody is killed for it, as by Linux's OOM killer, and the fault is taken anew.

Oracle: oom_badness (who has most), mm/memory.c (only who is killed himself learns of it).
"""

from __future__ import annotations

import logging

import pytest
import trio

import hmmnet
from hmmnet.errors import KernelError
from hmmnet.faults import fault
from hmmnet.sim import SimulatedMachine
from hmmnet.topology.load import parse

PAGE = 4096
MIB = 1 << 20
MACHINE = parse("""
[[memory]]
name = "node0"
size = "8 MiB"
[[device]]
name = "gpu0"
memory = "8 MiB"
[[link]]
a = "node0"
b = "gpu0"
bandwidth = "10 GB/s"
latency = "1 us"
""")


async def filled(machine: SimulatedMachine, nbytes: int) -> tuple[hmmnet.program.Process, int]:
    """A process that has so much, and where."""
    process = await machine.create_process()
    address = await process.mmap(nbytes)
    await process.write(address, b"x" * nbytes)
    return process, address


def test_a_cpu_fault_has_the_largest_killed(caplog: pytest.LogCaptureFixture) -> None:
    """The small one goes on; the log names the victim, what it had, and what is free now."""

    async def main(machine: SimulatedMachine) -> None:
        large, _ = await filled(machine, 5 * MIB)
        small, _ = await filled(machine, 2 * MIB)
        more = await small.mmap(3 * MIB)
        await small.write(more, b"y" * 3 * MIB)
        assert await small.read(more, 3 * MIB) == b"y" * 3 * MIB
        with pytest.raises(KernelError, match="ESRCH"):
            await large.mmap(PAGE)
        said = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
        assert len(said) == 1
        assert f"process {small.pid} wants a page: killed process {large.pid}, which had 1280 pages" in said[0]
        await small.exit()

    with caplog.at_level(logging.WARNING, "hmmnet.host"):
        hmmnet.simulate(main, MACHINE)


def test_who_is_killed_himself_is_told() -> None:
    """The largest wants more: ENOMEM, and it is gone; the other has lost nothing."""

    async def main(machine: SimulatedMachine) -> None:
        small, address = await filled(machine, 2 * MIB)
        large, _ = await filled(machine, 4 * MIB)
        more = await large.mmap(4 * MIB)
        with pytest.raises(KernelError, match="ENOMEM"):
            await large.write(more, b"y" * 4 * MIB)
        await trio.sleep(1)
        with pytest.raises(KernelError, match="ESRCH"):
            await large.mmap(PAGE)
        assert await small.read(address, 2 * MIB) == b"x" * 2 * MIB
        again = await small.mmap(4 * MIB)
        await small.write(again, b"z" * 4 * MIB)
        await small.exit()

    hmmnet.simulate(main, MACHINE)


def test_whom_the_owner_protects_is_not_killed() -> None:
    """With -1000 for everybody a fault ends with ENOMEM as before, and the process goes on."""

    async def main(machine: SimulatedMachine) -> None:
        process, address = await filled(machine, 6 * MIB)
        await process.set_oom_score_adj(-1000)
        more = await process.mmap(4 * MIB)
        with pytest.raises(KernelError, match=r"ENOMEM.*used up"):
            await process.write(more, b"y" * 4 * MIB)
        assert await process.read(address, PAGE) == b"x" * PAGE
        await process.exit()

    hmmnet.simulate(main, MACHINE)


def test_a_page_that_wants_to_come_home_has_somebody_killed() -> None:
    """migrate_to_ram allocates, too: what a CPU touches on the device comes home into the memory of the victim."""

    async def main(machine: SimulatedMachine) -> None:
        process, address = await filled(machine, MIB)
        assert await process.migrate(address, MIB, "gpu0") == MIB
        large, _ = await filled(machine, 7 * MIB)
        rest = await large.mmap(2 * MIB)
        await large.set_oom_score_adj(-1000)
        await process.set_oom_score_adj(-1000)
        with pytest.raises(KernelError, match="ENOMEM"):
            await large.write(rest, b"y" * 2 * MIB)
        await large.set_oom_score_adj(0)
        assert await process.read(address, MIB) == b"x" * MIB
        assert await process.load(address) == int.from_bytes(b"x" * 8, "little")
        with pytest.raises(KernelError, match="ESRCH"):
            await large.mmap(PAGE)
        await process.exit()

    hmmnet.simulate(main, MACHINE)


def test_a_device_fault_has_somebody_killed() -> None:
    """hmm_range_fault makes pages, too: a job that writes to fresh memory goes on with the memory of the victim, whose own job ends."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        a = await process.mmap(PAGE)
        await process.write(a, b"\1\0\0\0\0\0\0\0" * 512)
        out = await process.mmap(PAGE)
        large, _ = await filled(machine, 7 * MIB)
        rest = await large.mmap(2 * MIB)
        await large.set_oom_score_adj(-1000)
        await process.set_oom_score_adj(-1000)
        with pytest.raises(KernelError, match="ENOMEM"):
            await large.write(rest, b"y" * 2 * MIB)
        await large.set_oom_score_adj(0)
        await process.launch("vector_add", "gpu0", "remote", a=a, b=a, out=out, n=512, dtype="<u8")
        assert await process.load(out) == 2
        with pytest.raises(KernelError, match="ESRCH"):
            await large.mmap(PAGE)
        await process.exit()

    hmmnet.simulate(main, MACHINE)


def test_a_memory_cgroup_and_a_fault_plan_kill_nobody() -> None:
    """Within a limit, and where a failure is injected, ENOMEM is the answer, and everybody lives."""

    async def main(machine: SimulatedMachine) -> None:
        other, _ = await filled(machine, MIB)
        await machine.create_cgroup("job", MIB)
        process = await machine.create_process(cgroup="job")
        address = await process.mmap(4 * MIB)
        with pytest.raises(KernelError, match="ENOMEM"):
            await process.write(address, b"y" * 4 * MIB)
        machine.add_fault(fault("alloc.host", nth=1))
        fresh = await other.mmap(PAGE)
        with pytest.raises(KernelError, match="ENOMEM"):
            await other.store(fresh, 1)
        await other.store(fresh, 1)
        await process.mmap(PAGE)
        await process.exit()
        await other.exit()

    hmmnet.simulate(main, MACHINE)
