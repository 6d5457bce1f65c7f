"""A program that fails and tries again at once is found, though neither the scheduler nor the clock has a turn."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import ModuleType

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
    "launch": lambda process: process.launch("nothing", "gpu0"),
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


@pytest.mark.parametrize("name", ["trio_app", "outcomes_study", "hmmnet_study", "contextlib_more"])
def test_a_program_may_be_called_as_it_likes(name: str) -> None:
    """Also as something of which its machine is made, and more."""
    module = ModuleType(name)
    lines = [
        "async def spinning(machine):",
        "    process = await machine.create_process()",
        "    while True:",
        "        try:",
        "            await process.store(4096, 1)",
        "        except Exception:",
        "            pass",
    ]
    exec(compile("\n".join(lines), f"/x/{name}.py", "exec"), module.__dict__)
    with pytest.raises(SimulationStuck, match=rf"^store fails and is tried again without an end, at /x/{name}\.py:5: "):
        hmmnet.simulate(module.spinning)


def test_where_the_machine_fails_those_are_told_that_wait_for_it() -> None:
    """A task of its own has no program behind it, and of several nobody can say which it is."""

    async def spinning(process: Process) -> None:
        while True:
            with pytest.raises(HmmnetError):
                await process.launch("nothing", "gpu0")

    async def program(machine: SimulatedMachine) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(spinning, await machine.create_process())

    with pytest.raises(SimulationStuck) as stuck:
        hmmnet.simulate(program)
    said = str(stuck.value)
    assert said.startswith(
        "something fails and is tried again without an end, at a place that is not known: a task of the machine's own fails"
    )
    assert said.count(f"launch at {__file__}:") >= 2
    assert "the last of them KernelError: launch: ENOENT" in said


@pytest.mark.parametrize("call", ["store", "launch"])
@pytest.mark.parametrize("error", [None, RuntimeError("what the program makes of it")])
def test_who_takes_that_for_one_more_failure_hides_nothing(call: str, error: Exception | None) -> None:
    """It is told at each further failure, so whoever counts them comes to an end; and what the program ends with does not matter."""
    swallowed = 0

    async def program(machine: SimulatedMachine) -> None:
        nonlocal swallowed
        process = await machine.create_process()
        while swallowed < 3:
            try:
                await CALLS[call](process)
            except HmmnetError:
                pass
            except BaseException:  # noqa: BLE001 - as programs do
                swallowed += 1
        if error is not None:
            raise error

    with pytest.raises(SimulationStuck, match=f"^{call} fails and is tried again") as stuck:
        hmmnet.simulate(program)
    assert swallowed == 3
    assert isinstance(stuck.value.__cause__, livelock.Livelock)
    if error is not None and call == "store":  # where a task of the machine's own has met it, that is what all ends with
        assert stuck.value.__notes__ == [f"and then the program ended with {error!r}"]


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
