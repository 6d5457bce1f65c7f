"""What actors share: what counters may have counted, and what a crash excuses."""

from __future__ import annotations

from typing import Any, cast

import pytest
import trio

from hmmnet.campaign import operations
from hmmnet.campaign.crew import AtomicProcess, Crew, Outcome
from hmmnet.campaign.nemesis import Nemesis
from hmmnet.campaign.operations import device_add
from hmmnet.campaign.program import Step
from hmmnet.campaign.scenarios import SCENARIOS
from hmmnet.errors import PeerLost, SegmentationFault
from hmmnet.sim import SimulatedMachine, simulate

PINNED = "page does not come here: it is pinned"


def job_that_fails(patch: pytest.MonkeyPatch, why: str) -> None:
    """Every job takes two seconds and ends in a SIGSEGV."""

    async def launched(*_: object, **arguments: Any) -> Any:
        await trio.sleep(2)
        raise SegmentationFault(arguments["a"], why)

    patch.setattr(operations, "launched", launched)


async def crew_of(machine: SimulatedMachine) -> Crew:
    """A crew with counters, and nothing else to do."""
    crew = Crew(machine, cast(AtomicProcess, await machine.create_process()), SCENARIOS["tour"], Outcome(), None)
    await crew.lay_out()
    return crew


async def add_on_a_device(crew: Crew) -> None:
    """Whatever it is refused for."""
    await crew.attempt("1:device_add", lambda: device_add(crew, Step(0, "device_add", serial=1), "1:device_add"))


async def add_and_fail(crew: Crew) -> None:
    """Another addition that ends after a second, and nobody knows how."""

    async def lost(_: int) -> int:
        await trio.sleep(1)
        raise PeerLost("gone")

    with pytest.raises(PeerLost):
        await crew.add("2:add", 0, lost)


@pytest.mark.parametrize(("why", "most"), [(PINNED, 0), ("read", 1)])
def test_an_addition_that_never_began_counts_nothing(why: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its page is pinned elsewhere; any other end leaves open whether it was done."""
    job_that_fails(monkeypatch, why)

    async def main(machine: SimulatedMachine) -> list[bool]:
        crew = await crew_of(machine)
        await add_on_a_device(crew)
        return [crew.adds[0].is_over(value) == "" for value in (most + 1, most)]

    assert simulate(main).value == [False, True]


def test_an_addition_that_never_began_is_not_the_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another addition has done meanwhile is as open as before."""
    job_that_fails(monkeypatch, PINNED)

    async def main(machine: SimulatedMachine) -> list[bool]:
        crew = await crew_of(machine)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(add_on_a_device, crew)
            nursery.start_soon(add_and_fail, crew)
        return [crew.adds[0].is_over(value) == "" for value in (2, 1)]

    assert simulate(main).value == [False, True]


def test_a_late_crash_of_a_device_that_is_gone_is_no_harm() -> None:
    """Nothing has happened, so that nothing is excused by it."""

    async def main(machine: SimulatedMachine) -> int:
        crew = await crew_of(machine)
        Nemesis(crew)
        machine.add_fault("crash", on="gpu1", after="1 ms")
        machine.add_fault("crash", on="gpu1", after="2 ms")
        await trio.sleep(0.01)
        return crew.harms

    assert simulate(main).value == 1
