"""What can happen to nobody is refused while somebody watches; later it counts for nothing, and the log has it."""

from __future__ import annotations

import logging
from contextlib import suppress

import pytest
import trio

import hmmnet
from hmmnet.errors import BusError, HmmnetError, KernelError
from hmmnet.faults import fault
from hmmnet.sim import SimulatedMachine


@pytest.mark.parametrize(
    ("kind", "mend"), [("process.exit", ", or at a point"), ("process.munmap", ", or at a point"), ("ecc.uncorrectable", "")]
)
def test_no_such_process(kind: str, mend: str) -> None:
    """Who runs is said; nothing stays in the list, and nothing has happened."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        says = f"^fault {kind}: there is no process 4242; those that run are {{}}; have it begin later, with after=TIME{mend}$"
        given = {} if kind == "process.exit" else {"range": "0x10000+4096"}
        with pytest.raises(HmmnetError, match=says.format(process.pid)):
            machine.add_fault(kind, process=4242, **given)
        assert machine.list_faults() == []
        assert machine.carrier.fired() == {kind: 0}
        await process.exit()

    hmmnet.simulate(main)


PAGE = 4096
HOLE = r"page 0x{hole:x} of process {pid} is not mapped; have it begin later, with after=TIME, or at a point$"
NOTHING = r"process {pid} has nothing mapped at 0x{away:x}-0x{end:x}; have it begin later, with after=TIME"


@pytest.mark.parametrize(
    ("kind", "at", "says"),
    [
        *((f"process.{deed}", "away", NOTHING) for deed in ("munmap", "mprotect", "mremap", "madvise", "fork")),
        *((f"process.{deed}", "over", HOLE) for deed in ("munmap", "mprotect", "mremap")),
        ("ecc.uncorrectable", "away", NOTHING),
        ("ecc.uncorrectable", "fresh", r"process {pid} has no anonymous page at 0x[0-9a-f]+-0x[0-9a-f]+; have it begin later"),
    ],
)
def test_nothing_is_there(kind: str, at: str, says: str, caplog: pytest.LogCaptureFixture) -> None:
    """A range that is not mapped, wholly or where it matters, or in which no page is; later it is no harm, and is not counted."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(4 * PAGE)
        await process.write(address, b"x" * 2 * PAGE)
        start = {"away": 0x10000, "over": address + 2 * PAGE, "fresh": address + 3 * PAGE}[at]
        length = {"away": 2, "over": 4, "fresh": 1}[at] * PAGE
        hole = (address >> 12) + (5 if kind == "process.munmap" else 4)
        why = says.format(pid=process.pid, hole=hole, away=start, end=start + length - 1)
        given = {"process": process.pid, "range": f"0x{start:x}+{length}"}
        with pytest.raises(HmmnetError, match=f"^fault {kind}: {why}"):
            machine.add_fault(kind, **given)
        assert machine.list_faults() == []
        machine.add_fault(kind, **given, after="1 ms")
        with caplog.at_level(logging.WARNING, "hmmnet.faults"):
            await trio.sleep(0.01)
        assert "did not happen" in caplog.text
        assert machine.carrier.fired() == {kind: 0}
        assert await process.read(address, 2 * PAGE) == b"x" * 2 * PAGE

    hmmnet.simulate(main)


def test_what_a_part_of_the_range_is_enough_for() -> None:
    """madvise skips holes, a fork has all that there is, and of anonymous pages those break that are there."""

    async def main(machine: SimulatedMachine) -> dict[str, int]:
        process = await machine.create_process()
        address = await process.mmap(4 * PAGE)
        await process.write(address, b"x" * 2 * PAGE)
        given = {"process": process.pid, "range": f"0x{address + PAGE:x}+{6 * PAGE}"}
        for kind in ("process.fork", "process.madvise"):
            machine.add_fault(kind, **given)
            await trio.sleep(0.01)
        assert await process.read(address, 2 * PAGE) == b"x" * PAGE + bytes(PAGE)
        await process.write(address + PAGE, b"y")
        machine.add_fault("ecc.uncorrectable", **given)
        await trio.sleep(0.01)
        with pytest.raises(BusError):
            await process.read(address + PAGE, 1)
        return machine.carrier.fired()

    assert hmmnet.simulate(main).value == {"process.fork": 1, "process.madvise": 1, "ecc.uncorrectable": 1}


@pytest.mark.parametrize(
    ("kind", "given", "times", "happens"),
    [
        ("process.madvise", {"advice": "REMOVE"}, 1, 0),
        ("process.mremap", {}, 1, 0),
        ("process.munmap", {}, 2, 1),
        ("ecc.uncorrectable", {}, 2, 1),
    ],
)
def test_a_deed_that_comes_to_nothing_is_not_counted(
    kind: str, given: dict[str, str], times: int, happens: int, caplog: pytest.LogCaptureFixture
) -> None:
    """What only shows as it is done: advice that private memory refuses, two mappings that do not move as one, what another has taken."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(2 * PAGE)
        await process.write(address, b"x" * 2 * PAGE)
        if kind == "process.mremap":
            await process.mprotect(address, PAGE, "r")
        with caplog.at_level(logging.WARNING, "hmmnet.host"):
            for _ in range(times):
                machine.add_fault(kind, process=process.pid, range=f"0x{address:x}+{2 * PAGE}", **given)
            await trio.sleep(0.01)
        assert caplog.text.count("a fault did not happen: it could not ") == times - happens
        assert machine.carrier.fired() == {kind: happens}
        assert sum(mapping.end - mapping.start for mapping in await process.smaps()) == (2 - (kind == "process.munmap")) * PAGE

    hmmnet.simulate(main)


@pytest.mark.parametrize("refuses", [0, 1, 2])
def test_a_deed_to_several_is_done_to_all_that_do_not_refuse(refuses: int, caplog: pytest.LogCaptureFixture) -> None:
    """Wherever in the row who does stands: a mapping that two share takes no WIPEONFORK. It happened, and who refused is told."""

    async def main(machine: SimulatedMachine) -> list[bytes]:
        processes = [await machine.create_process() for _ in range(3)]
        for process in processes:
            address = await process.mmap(PAGE, shared=process is processes[refuses])
            await process.write(address, b"x" * PAGE)
        with caplog.at_level(logging.WARNING, "hmmnet.host"):
            machine.add_fault("process.madvise", advice="WIPEONFORK", range=f"0x{address:x}+{PAGE}")
            await trio.sleep(0.01)
        assert machine.carrier.fired() == {"process.madvise": 1}
        pid = processes[refuses].pid
        why = f"WIPEONFORK is not for the mapping at 0x{address:x} of process {pid}"
        said = [record.getMessage() for record in caplog.records]
        assert said == [f"a fault did not happen to process {pid}: it could not madvise: madvise: EINVAL: {why}"]
        return [await (await process.fork()).read(address, 1) for process in processes]

    assert hmmnet.simulate(main).value == [b"x" if i == refuses else b"\0" for i in range(3)]


def test_a_deed_that_all_refuse_did_not_happen(caplog: pytest.LogCaptureFixture) -> None:
    """Told once, with what each of them says."""

    async def main(machine: SimulatedMachine) -> list[int]:
        processes = [await machine.create_process() for _ in range(2)]
        for process in processes:
            address = await process.mmap(PAGE, shared=True)
        machine.add_fault("process.madvise", advice="WIPEONFORK", range=f"0x{address:x}+{PAGE}")
        await trio.sleep(0.01)
        assert machine.carrier.fired() == {"process.madvise": 0}
        return [process.pid for process in processes]

    one, other = hmmnet.simulate(main).value
    (record,) = [record for record in caplog.records if record.name == "hmmnet.host" and record.levelno == logging.WARNING]
    said = record.getMessage()
    assert said.startswith("a fault did not happen: it could not madvise: ")
    assert f"of process {one}; " in said
    assert said.endswith(f"of process {other}")


def test_a_deed_at_a_point_waits_for_what_it_is_done_to() -> None:
    """Until the process is there, and the pages are; occurrences before then are none, and what it does itself is none either."""

    async def main(machine: SimulatedMachine) -> list[int]:
        one = await machine.create_process()
        machine.add_fault("process.munmap", point="process.mprotect", process=one.pid + 1, range="0x10000000+8192", times=1)
        machine.add_fault("process.mprotect", point="process.mprotect", process=one.pid)
        counts, other = [], one
        for index in range(4):
            if index == 1:
                other = await machine.create_process()
            if index == 2:
                await other.mmap(2 * PAGE, "rw", 0x10000000)
            address = await one.mmap(PAGE)
            for process, where in ((one, address), (other, 0x10000000)):
                with suppress(KernelError):
                    await process.mprotect(where, PAGE, "rw")
                await trio.sleep(0.01)
            counts.append(machine.carrier.fired()["process.munmap"])
        assert machine.carrier.fired()["process.mprotect"] == 4
        return counts

    assert hmmnet.simulate(main).value == [0, 0, 1, 1]


@pytest.mark.parametrize("kind", ["crash", "unplug", "unload", "hang", "page.retire"])
def test_a_device_that_is_gone(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """It cannot go again, now or later; but it can start again."""

    async def main(machine: SimulatedMachine) -> None:
        machine.add_fault("crash", on="gpu1")
        with pytest.raises(HmmnetError, match="gpu1: does not run"):
            machine.add_fault(kind, on="gpu1")
        before = machine.carrier.fired()[kind]
        told: list[str] = []
        machine.carrier.told.append(lambda number, fault: told.append(f"{number} {fault}"))
        machine.add_fault(fault(kind, "gpu1", after="1 s"))
        with caplog.at_level(logging.WARNING, "hmmnet.faults"):
            await trio.sleep(2)
        assert machine.carrier.fired()[kind] == before
        assert "did not happen: gpu1: does not run" in caplog.text
        assert machine.list_faults() == []
        assert told == []
        machine.add_fault("bounce", on="gpu1")
        await trio.sleep(1)
        assert "gpu1" in machine.running

    hmmnet.simulate(main)


def test_a_state_of_a_device_that_is_gone_waits_for_it() -> None:
    """A clock runs wrong in the next life, and nothing has happened before."""

    async def main(machine: SimulatedMachine) -> None:
        machine.add_fault("crash", on="gpu1")
        machine.add_fault("clock.jump", on="gpu1")
        assert machine.carrier.fired()["clock.jump"] == 0
        await machine.start_device("gpu1")
        assert machine.carrier.fired()["clock.jump"] == 1

    hmmnet.simulate(main)


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "host.crash"},
        {"kind": "hang", "on": "host"},
        {"kind": "alloc.host"},
        {"kind": "point.delay", "point": "hub.*"},
        {"kind": "link.down", "on": "*"},
    ],
)
def test_a_host_crashes_once(given: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """Nothing that would happen at it happens afterwards, a second crash neither: now it is refused, later it counts for nothing."""

    async def main(machine: SimulatedMachine) -> dict[str, int]:
        machine.add_fault("host.crash")
        with pytest.raises(HmmnetError, match=f"^fault {given['kind']}: the host has crashed".replace(".", r"\.")):
            machine.add_fault(given)
        machine.add_fault({**given, "after": "1 ms"})
        with caplog.at_level(logging.WARNING, "hmmnet.faults"):
            await trio.sleep(0.01)
        assert "did not happen: the host has crashed" in caplog.text
        assert machine.list_faults() == []
        machine.add_fault("crash", on="gpu0")  # devices go on, until their leases are over
        return machine.carrier.fired()

    assert hmmnet.simulate(main).value == {given["kind"]: 0} | {"host.crash": 1, "crash": 1}


@pytest.mark.parametrize("given", [{}, {"point": "migrate.after"}])
def test_nothing_happens_at_a_host_that_has_crashed(given: dict[str, str]) -> None:
    """Its processes are gone with it, and nobody reaches its points."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        machine.add_fault("host.crash")
        with pytest.raises(HmmnetError, match=r"^fault process\.exit: the host has crashed"):
            machine.add_fault("process.exit", process=process.pid, **given)
        assert machine.list_faults() == []
        assert machine.carrier.fired() == {"host.crash": 1, "process.exit": 0}

    hmmnet.simulate(main)
