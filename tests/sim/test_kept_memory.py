"""A device that starts again with the memory of its former life: the bytes are there, and nobody ever sees them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import trio

import hmmnet
from hmmnet.campaign.draw import draw
from hmmnet.campaign.trial import run_program
from hmmnet.devices.memory import FREE_CLEAN, Memory
from hmmnet.program import Process
from hmmnet.sim import SimulatedMachine
from hmmnet.testing import outcomes
from hmmnet.topology.load import parse
from hmmnet.topology.model import Topology

PAGE = 4096
PAGES = 64
SECRET = b"secret"
SEEDS = range(6)
FOUND_BY = 133
"""The first seed that catches the planted bug."""
KINDS = ("private", "coherent")


def machine_of(kind: str) -> Topology:
    """One device of so many pages that a new life uses again what the former one had."""
    return parse(
        f"""
        name = "kept"
        [[memory]]
        name = "node0"
        size = "16 MiB"
        [[device]]
        name = "gpu0"
        memory = "{PAGES * PAGE >> 10} KiB"
        kind = "{kind}"
        [[link]]
        a = "node0"
        b = "gpu0"
        bandwidth = "10 GB/s"
        latency = "1 us"
        """
    )


async def filled(machine: SimulatedMachine) -> tuple[Process, int]:
    """A process whose pages fill the device, every byte of it; then the device starts again, and nothing was cleared."""
    process = await machine.create_process()
    address = await process.mmap(PAGES * PAGE)
    await process.write(address, SECRET * (PAGES * PAGE // len(SECRET)))
    await process.migrate(address, PAGES * PAGE, "gpu0")
    machine.add_fault("restart.kept", on="gpu0", down="10 ms")
    await trio.sleep(0.1)
    assert machine.incarnation("gpu0") == 2
    return process, address


def left(machine: SimulatedMachine) -> int:
    """Bytes of the former life in the device's memory."""
    return bytes(machine.device("gpu0").memory.arena.bytes).count(SECRET) * len(SECRET)


async def look(machine: SimulatedMachine) -> bytes:
    """All that a new process sees of pages that were never touched, which the device takes in: as it loads them, and as they come home."""
    process = await machine.create_process()
    fresh = await process.mmap(PAGES * PAGE // 2)
    found = await process.launch("reduction", "gpu0", a=fresh, n=PAGES * PAGE // 16, dtype="<u8")
    assert (await process.residency(fresh, 1)).owners == ("gpu0",)
    seen = await process.read(fresh, PAGES * PAGE // 2) + int(found.results["sum"]).to_bytes(16, "little")
    await process.exit()
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_never_seen(kind: str) -> None:
    """What only the device had is lost, as at a bounce; never-touched pages are zero; and the bytes are all there, twice in a row."""

    async def main(machine: SimulatedMachine) -> None:
        process, address = await filled(machine)
        for _ in range(2):
            assert left(machine) > (PAGES - 1) * PAGE
            await outcomes.lost(process, address, PAGES * PAGE, "gpu0")
            machine.add_fault("restart.kept", on="gpu0", down=0)
            await trio.sleep(0.1)
        assert not any(await look(machine))
        await outcomes.usable(machine, "gpu0")
        await process.exit()
        await outcomes.sound(machine)

    hmmnet.simulate(main, machine_of(kind))


def test_a_bounce_keeps_nothing() -> None:
    """So the bytes that the other fault leaves are its own doing; nor does a life after that keep what the one before had."""

    async def main(machine: SimulatedMachine) -> None:
        await filled(machine)
        machine.add_fault("bounce", on="gpu0", down=0)
        await trio.sleep(0.1)
        assert machine.incarnation("gpu0") == 3
        assert left(machine) == 0

    hmmnet.simulate(main, machine_of("private"))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_campaign_of_it(seed: int) -> None:
    """200 operations: every word is right."""
    assert run_program(draw(seed, "restart.kept")).violations == []


def taken_for_clear(patch: pytest.MonkeyPatch) -> None:
    """A planted bug: what nobody has used in this life is taken to be clear."""
    begin: Callable[[Memory, Memory], None] = Memory.begin_with

    def begin_with(self: Memory, former: Memory) -> None:
        begin(self, former)
        self._state[:] = np.uint8(FREE_CLEAN)

    patch.setattr(Memory, "begin_with", begin_with)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_that_is_taken_for_clear_is_found(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Then a new process sees what the former life left."""
    taken_for_clear(monkeypatch)

    async def main(machine: SimulatedMachine) -> None:
        await filled(machine)
        assert SECRET in await look(machine)

    hmmnet.simulate(main, machine_of(kind))


def test_the_campaign_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The history checker does, where a new mapping comes to what was kept: within 500 seeds, as other planted bugs."""
    taken_for_clear(monkeypatch)
    found = run_program(draw(FOUND_BY, "restart.kept")).violations
    assert found
    assert found[0].checker == "history"
