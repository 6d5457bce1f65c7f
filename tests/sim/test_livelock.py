"""A program that fails and tries again at once is found, though neither the scheduler nor the clock has a turn."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

import hmmnet
from hmmnet.errors import HmmnetError, KernelError, SegmentationFault
from hmmnet.program import Process
from hmmnet.sim import SimulatedMachine, livelock
from hmmnet.sim.run import SimulationStuck

FEW = 1000
"""Instead of `FAILURES_MAX`."""
UNMAPPED = 0x1000
CALLS: dict[str, Callable[[Process], Awaitable[object]]] = {
    "store": lambda process: process.store(UNMAPPED, 1),
    "read": lambda process: process.read(UNMAPPED, 1),
    "mmap": lambda process: process.mmap(-1),
    "madvise": lambda process: process.madvise(UNMAPPED + 1, 1, "dontneed"),
    "open": lambda process: process.open("gpu7"),
}


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(livelock, "FAILURES_MAX", FEW)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("turns", [False, True])
def test_who_fails_again_and_again_is_told(call: str, turns: bool) -> None:
    """The operation, its place, how often, when, the last failure and the mend; also where others have their turn."""

    async def spinning(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        await trio.sleep(1.5)
        while True:
            try:
                await CALLS[call](process)
            except HmmnetError:
                if turns:
                    await trio.lowlevel.checkpoint()

    with pytest.raises(SimulationStuck) as stuck:
        hmmnet.simulate(spinning, seed=9)
    said = str(stuck.value)
    assert said.startswith(f"{call} fails and is tried again without an end, at {__file__}:")
    assert f"{FEW:,} failures at 1.5" in said
    assert "the last of them" in said
    assert "sleep before the next one" in said
    assert said.endswith("(seed 9)")


def test_who_lets_time_pass_may_fail_for_ever() -> None:
    """So may who fails less often than that at each moment."""

    async def patient(machine: SimulatedMachine) -> int:
        process, failures = await machine.create_process(), 0
        while failures < 3 * FEW:
            for _ in range(FEW // 4):
                with pytest.raises(SegmentationFault):
                    await process.store(UNMAPPED, 1)
                failures += 1
            await trio.sleep(1e-6)
        return failures

    assert hmmnet.simulate(patient).value == 3 * FEW


def test_one_of_several_tasks_ends_all() -> None:
    """Which takes the others with it, as any error does."""

    async def spinning(process: Process) -> None:
        while True:
            try:
                await process.mprotect(UNMAPPED, 4096, "rw")
            except KernelError:
                continue

    async def program(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(spinning, process)

    with pytest.raises(SimulationStuck, match="mprotect fails and is tried again") as stuck:
        hmmnet.simulate(program)
    assert isinstance(stuck.value.__cause__, livelock.Livelock)


def test_errors_outside_a_simulation_are_not_counted() -> None:
    """There is no virtual moment."""
    for _ in range(2 * FEW):
        KernelError(22, "mmap", "x")

    async def real() -> None:
        for _ in range(2 * FEW):
            KernelError(22, "mmap", "x")

    trio.run(real)
