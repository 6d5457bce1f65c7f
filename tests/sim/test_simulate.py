"""A machine in virtual time: exact links, sudden deaths, and one run for one seed."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
import trio
from trio._core import _run as trio_run

import hmmnet
from hmmnet.errors import BusError, HmmnetError, KernelError, PeerError
from hmmnet.faults import AnyFault, fault
from hmmnet.faults.injector import PointFault
from hmmnet.pages import PAGE_SIZE as PAGE
from hmmnet.play.world import TOPOLOGY, UnitWorld, play_all, prepare_all
from hmmnet.sim import SimulatedMachine, Trace, run_virtual, simulated
from hmmnet.sim.clock import IDLE_S
from hmmnet.sim.run import SimulationStuck
from hmmnet.sim.schedule import HOOKS

from .story import story

RECORDINGS = Path(__file__).parents[1] / "conformance" / "recordings"
MIB = 1 << 20
GOLDEN = "335827f62260822b13ff2a2559eeb39a6178b8a8916e1e35450011fc5d80ee90"
"""The digest of `story` with seed 5. It is another one when the protocol changes: then run ``python -m tests.sim.story 5`` and write down
what it says. It must be the same with every Python and on every computer."""


def test_links_hold_exactly() -> None:
    """1 MiB over PCIe 4 x16: the latency and the bytes over the bandwidth, to the nanosecond, there and back, however long it takes us."""

    async def main(machine: SimulatedMachine) -> list[float]:
        process = await machine.create_process()
        address = await process.malloc(MIB)
        await process.write(address, np.arange(MIB // 8, dtype="<u8"))
        times = [machine.emulated_s()]
        for place in ("gpu0", "host"):
            assert await process.migrate(address, MIB, place) == MIB
            times.append(machine.emulated_s())
        return times

    began_s, there_s, back_s = hmmnet.simulate(main).value
    link = 500e-9 + MIB / 31.5e9
    assert there_s - began_s == pytest.approx(link, abs=1e-9)
    assert back_s - there_s == pytest.approx(link, abs=1e-9)


def test_one_seed_one_run() -> None:
    """The same digest again here, and in a process that hashes strings otherwise; another order of events from another seed."""
    first, again, other = (hmmnet.simulate(story, seed=seed, keep=True) for seed in (5, 5, 6))
    assert first.lines == again.lines
    assert (first.digest, first.messages, first.virtual_s) == (again.digest, again.messages, again.virtual_s)
    assert first.digest != other.digest
    assert first.value == other.value
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-m", "tests.sim.story", "5"]
        said = subprocess.run(
            command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60, check=True
        )
        assert said.stdout.strip() == first.digest
    assert first.digest == GOLDEN


def test_thirty_seeds_are_as_many_runs_with_one_result() -> None:
    """Orders differ, results do not."""
    outcomes = [hmmnet.simulate(story, seed=seed) for seed in range(30)]
    assert len({outcome.digest for outcome in outcomes}) > 20
    assert len({str(outcome.value) for outcome in outcomes}) == 1


def test_recordings_repeat_to_the_byte() -> None:
    """Every hand-written script on four devices, two of them coherent: fork, pins, huge pages, files, swap, and all the rest."""
    from hmmnet.play.script import read_scripts

    prepared = prepare_all(read_scripts(RECORDINGS / "hand.traces") + read_scripts(RECORDINGS / "coherent.traces"))

    def played() -> tuple[int, str]:
        trace = Trace()

        async def main() -> int:
            async with simulated(TOPOLOGY, trace=trace) as machine:
                world = UnitWorld(machine)

                class Ready:
                    async def __aenter__(self) -> UnitWorld:
                        return world

                    async def __aexit__(self, *_: object) -> None:
                        return None

                return (await play_all(prepared, Ready, lambda _: None)).identical

        return run_virtual(main, seed=3), trace.digest

    first, again = played(), played()
    assert first == again
    assert first[0] == len(prepared)


def test_a_killed_device_takes_its_pages_and_comes_back_empty() -> None:
    """SIGBUS that names it; nobody waits for its lease; the new incarnation serves."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.malloc(MIB)
        await process.write(address, bytes(range(256)) * (MIB // 256))
        await process.migrate(address, MIB, "gpu1")
        began_s = machine.emulated_s()
        await machine.kill_device("gpu1")
        with pytest.raises(BusError, match=r'only copy on device "gpu1", which was lost: .*killed'):
            await process.load(address)
        with pytest.raises(KernelError, match=r"ENOENT.*does not run"):
            await machine.kill_device("gpu1")
        await machine.start_device("gpu1")
        with pytest.raises(KernelError, match="EBUSY"):
            await machine.start_device("gpu1")
        assert machine.emulated_s() - began_s < 0.001
        other = await process.malloc(MIB)
        await process.write(other, bytes(MIB))
        assert await process.migrate(other, MIB, "gpu1") == MIB
        with pytest.raises(KernelError, match='no device "gpu7"; there are gpu0, gpu1'):
            await machine.kill_device("gpu7")
        await process.exit()

    assert hmmnet.simulate(main).virtual_s < 3.0


def test_what_never_comes_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual time is bounded; the error has the seed. What a program raises comes out as it is."""

    async def waiting(machine: SimulatedMachine) -> None:
        await trio.sleep_forever()

    with pytest.raises(SimulationStuck, match=r"no end after 60 virtual seconds \(seed 9\)"):
        hmmnet.simulate(waiting, seed=9, limit_s=60.0)

    async def circling(machine: SimulatedMachine) -> None:
        await trio.sleep(1.5)
        while True:
            await trio.lowlevel.checkpoint()

    monkeypatch.setattr("hmmnet.sim.clock.JumpClock.__init__.__defaults__", (10_000,))
    with pytest.raises(SimulationStuck, match=r"time stands still at \S+ virtual seconds \(seed 9\): somebody goes in circles"):
        hmmnet.simulate(circling, seed=9)

    async def failing(machine: SimulatedMachine) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hmmnet.simulate(failing)


async def moving(machine: SimulatedMachine) -> None:
    """A program that a fault can stop."""
    process = await machine.create_process()
    await process.mmap(PAGE, address=1 << 32)
    await process.write(1 << 32, bytes(PAGE))
    await process.migrate(1 << 32, PAGE, "gpu0")


def stuck(*faults: AnyFault, main: Callable[[SimulatedMachine], Awaitable[None]] = moving, limit_s: float = 20.0) -> str:
    """What is said when it does not end."""
    with pytest.raises(SimulationStuck) as found:
        hmmnet.simulate(main, faults=faults, limit_s=limit_s)
    return str(found.value)


def test_who_is_held_by_which_fault_is_told() -> None:
    """With what lets it go on; and who waits for whom meanwhile."""
    said = stuck(fault("cpu.starve", "gpu1"), fault("point.pause", "gpu0", point="migrate.before_copy"))
    assert (
        "fault 2 (point.pause gpu0 point=migrate.before_copy) holds host at migrate.before_copy of gpu0 (process 1000, page 0x100000)"
        in said
    )
    assert "until it ends: remove_fault(2)" in said
    assert "fault 1 " not in said, "it has not happened"
    assert "program: gpu0 to answer Ioctl" in said
    assert "fault 1 (corrupt gpu0<->host channel=bulk shape=bit) is there, and has happened " in stuck(
        fault("corrupt", "gpu0"), limit_s=2.0
    )


def test_devices_and_messages_that_are_held_are_told() -> None:
    """The messages of a fault, and of a device that hangs, until it is given up; what is over tells nothing."""

    async def held(machine: SimulatedMachine) -> None:
        await machine.hang_device("gpu1")
        await trio.sleep_forever()

    said = stuck(fault("hold", "gpu0"), main=held, limit_s=1.0)
    assert re.search(r"fault 1 \(hold gpu0<->host\) holds [\d,]+ messages, until it ends: remove_fault\(1\)", said)
    assert re.search(r"gpu1 is not heard, and hears nothing: [\d,]+ messages? on the way", said)

    async def over(machine: SimulatedMachine) -> None:
        number = machine.add_fault("hold", on="gpu0")
        await trio.sleep(0.01)
        machine.remove_fault(number)
        await trio.sleep_forever()

    assert "fault" not in stuck(main=over)


def test_faults_are_told_where_time_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that act, with their targets, as where it goes on and on: whoever tries again at once meets the same again."""
    monkeypatch.setattr("hmmnet.sim.clock.JumpClock.__init__.__defaults__", (10_000,))

    async def stubborn(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.malloc(PAGE)
        while True:
            await trio.lowlevel.checkpoint()
            with contextlib.suppress(KernelError):
                await process.store(address, 1)

    said = stuck(fault("crash", "gpu1", after=5.0), fault("alloc.host"), main=stubborn)
    assert said.startswith("time stands still at ")
    assert re.search(r"\n  fault 2 \(alloc.host \*\) is there, and has happened [\d,]+ times", said)
    assert "crash" not in said, "it is to come"


def test_the_program_s_own_error_comes_out_of_a_machine_that_does_not_close() -> None:
    """Closing is held for ever at a point: what the program raised comes, and with it who holds what, and who waits for it."""

    async def main(machine: SimulatedMachine) -> None:
        machine.injector.add(PointFault("session.bye", "pause"))
        raise ValueError("my own")

    with pytest.raises(ValueError, match=r"\Amy own") as found:
        hmmnet.simulate(main, limit_s=30.0)
    assert isinstance(found.value.__cause__, SimulationStuck)
    (note,) = found.value.__notes__
    assert note.startswith("and then the machine did not close: no end after 30 virtual seconds (seed 0)")
    assert "a fault to let go of host at session.bye" in note, "who waits for whom"


@pytest.mark.parametrize(
    ("kind", "held"), [*((kind, held) for kind in ("verdict", "exit", "caused", "within") for held in ("host", "task")), ("group", "host")]
)
def test_whatever_a_program_raised_comes_out_as_it_is(kind: str, held: str) -> None:
    """Verdicts of pytest and SystemExit, no Exceptions; what came of another error keeps that. The note says what holds it."""

    def fail() -> None:
        if kind == "verdict":
            pytest.fail("my own")
        if kind == "exit":
            raise SystemExit("my own")
        if kind == "group":
            raise BaseExceptionGroup("my own", [KeyError("one"), GeneratorExit()])
        try:
            int("x")
        except ValueError as error:
            if kind == "caused":
                raise KeyError("my own") from error
            raise KeyError("my own")  # noqa: B904 - that is the case

    async def main(machine: SimulatedMachine) -> None:
        async def shielded() -> None:
            with trio.CancelScope(shield=True):
                await trio.sleep_forever()

        if held == "host":
            machine.injector.add(PointFault("session.bye", "pause"))
        else:
            machine.nursery.start_soon(shielded)
            await trio.sleep(1e-3)
        fail()

    expected = {"verdict": pytest.fail.Exception, "exit": SystemExit, "group": BaseExceptionGroup}.get(kind, KeyError)
    with pytest.raises(expected, match="my own") as found:
        hmmnet.simulate(main, limit_s=30.0)
    error = found.value
    (note,) = error.__notes__
    assert note.startswith("and then the machine did not close: no end after 30 virtual seconds (seed 0)")
    if kind == "caused":
        assert isinstance(error.__cause__, ValueError)
    elif kind == "within":
        assert error.__cause__ is None
        assert isinstance(error.__context__, ValueError)
        assert not error.__suppress_context__
    else:
        assert isinstance(error.__cause__, SimulationStuck)


def test_an_error_comes_out_of_a_machine_within_another() -> None:
    """The outer one is left because the run is over, and not by an error."""

    async def main(_outer: SimulatedMachine) -> None:
        async with simulated(name="inner") as machine:
            machine.injector.add(PointFault("session.bye", "pause"))
            raise KeyError("my own")

    with pytest.raises(KeyError, match="my own"):
        hmmnet.simulate(main, limit_s=30.0)


def test_an_error_that_was_dealt_with_is_not_why_nothing_ends() -> None:
    """The machine was left by it and has closed; what hangs afterwards is another matter."""

    async def main() -> None:
        with contextlib.suppress(ValueError):
            async with simulated():
                raise ValueError("over")
        await trio.sleep_forever()

    with pytest.raises(SimulationStuck):
        run_virtual(main, limit_s=30.0)


@pytest.mark.parametrize("kind", ["hang", "point.pause"])
def test_faults_end_when_a_program_fails(kind: str) -> None:
    """As when it ends in order: a host that hangs, or is held, holds up nobody who leaves."""

    async def main(machine: SimulatedMachine) -> None:
        machine.add_fault(fault("hang", "host") if kind == "hang" else fault("point.pause", point="session.bye"))
        raise ValueError("my own")

    with pytest.raises(ValueError, match="my own") as found:
        hmmnet.simulate(main, limit_s=30.0)
    assert not hasattr(found.value, "__notes__")


async def test_real_time_is_refused() -> None:
    """A machine whose time would not jump says so."""
    with pytest.raises(HmmnetError, match="needs virtual time"):
        async with simulated():
            pytest.fail("no machine in real time")


def test_other_runs_are_left_alone() -> None:
    """trio schedules as before afterwards; its generator goes on where it was."""
    before = trio_run._r.getstate(), trio_run._ALLOW_DETERMINISTIC_SCHEDULING, getattr(trio_run, HOOKS)

    async def nothing() -> None:
        assert trio_run._ALLOW_DETERMINISTIC_SCHEDULING

    run_virtual(nothing, seed=1)
    assert (trio_run._r.getstate(), trio_run._ALLOW_DETERMINISTIC_SCHEDULING, getattr(trio_run, HOOKS)) == before


def test_instruments_hear_of_simulated_runs(caplog: pytest.LogCaptureFixture) -> None:
    """As of any run of trio: those that are there from the beginning, those that come later, until they go, or fail."""

    class Steps(trio.abc.Instrument):
        def __init__(self, until: int) -> None:
            self.count = 0
            self._until = until

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            self.count += 1
            if self.count == self._until:
                raise ValueError(task.name)

    goes, fails = Steps(1000), Steps(2)

    async def main() -> None:
        trio.lowlevel.add_instrument(goes)
        trio.lowlevel.add_instrument(fails)
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        trio.lowlevel.remove_instrument(goes)
        for _ in range(3):
            await trio.lowlevel.checkpoint()

    run_virtual(main)
    assert (goes.count, fails.count) == (3, 2)
    assert "Instrument has been disabled" in caplog.text


def test_a_machine_that_is_cancelled_from_outside_ends() -> None:
    """Also while a program waits for a device that does not answer, shielded from being cancelled: nobody reads answers any more."""
    ended: list[str] = []

    async def main() -> None:
        with trio.move_on_after(1.0):
            async with simulated("dmirror-4") as machine:
                process = await machine.create_process()
                machine.add_fault(fault("hang", "dmirror0"))
                try:
                    await process.open("dmirror0")
                except PeerError as error:
                    ended.append(str(error))
                    raise

    began_s = time.monotonic()
    run_virtual(main, limit_s=60.0)
    assert ended
    assert time.monotonic() - began_s < IDLE_S
