"""Files of processes on a whole machine: who has them open, and that their frames go back when the last of those exits."""

from __future__ import annotations

import errno

import pytest

from hmmnet.errors import KernelError
from hmmnet.pages import PAGE_SIZE
from hmmnet.sim import SimulatedMachine, simulate


def used(machine: SimulatedMachine) -> int:
    """Frames of the host that are not free."""
    return sum(node.allocator.used_count for node in machine.host.memory.nodes)


def test_the_last_exit_closes_what_was_left_open() -> None:
    """Parent and child have it; one of them exits and it is there; both, and it is closed, its frames are free, nothing is wrong."""

    async def main(machine: SimulatedMachine) -> tuple[int, ...]:
        counts = [used(machine)]
        parent = await machine.create_process()
        file = await parent.memfd_create(4 * PAGE_SIZE)
        await file.write(0, bytes(4 * PAGE_SIZE))
        child = await parent.fork()
        await parent.exit()
        counts.append(used(machine))
        assert await file.read(PAGE_SIZE, 1) == b"\0"
        await child.exit()
        with pytest.raises(KernelError) as held:
            await file.read(0, 1)
        assert held.value.code == errno.EBADF
        assert machine.audit(quiet=True) == []
        return (*counts, used(machine))

    before, between, after = simulate(main).value
    assert between == before + 4
    assert after == before


def test_a_file_that_is_closed_is_closed_for_all() -> None:
    """Whoever forked since; exits have nothing left to close."""

    async def main(machine: SimulatedMachine) -> None:
        parent = await machine.create_process()
        file, other = await parent.memfd_create(PAGE_SIZE), await parent.memfd_create(PAGE_SIZE)
        child = await parent.fork()
        await file.close()
        await file.close()
        await child.exit()
        await other.write(0, b"x")
        await parent.exit()
        assert machine.audit(quiet=True) == []

    simulate(main)
