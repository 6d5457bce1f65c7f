"""What can happen to nobody is refused while somebody watches; later it counts for nothing, and the log has it."""

from __future__ import annotations

import logging

import pytest
import trio

import hmmnet
from hmmnet.errors import HmmnetError
from hmmnet.faults import fault
from hmmnet.sim import SimulatedMachine


@pytest.mark.parametrize(
    ("kind", "mend"), [("process.exit", ", or a point"), ("process.munmap", ", or a point"), ("ecc.uncorrectable", "")]
)
def test_no_such_process(kind: str, mend: str) -> None:
    """Who runs is said; nothing stays in the list, and nothing has happened."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        says = f"^fault {kind}: there is no process 4242; those that run are {{}}; give after=TIME by when it runs{mend}$"
        given = {} if kind == "process.exit" else {"range": "0x10000+4096"}
        with pytest.raises(HmmnetError, match=says.format(process.pid)):
            machine.add_fault(kind, process=4242, **given)
        assert machine.list_faults() == []
        assert machine.carrier.fired() == {kind: 0}
        await process.exit()

    hmmnet.simulate(main)


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
