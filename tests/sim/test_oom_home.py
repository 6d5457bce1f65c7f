"""Host memory is used up, and pages of a device want to come home: as many as there is room for do, and somebody is killed for the next."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
import trio

import hmmnet
from hmmnet.errors import KernelError
from hmmnet.program import Handle, Process
from hmmnet.sim import SimulatedMachine
from hmmnet.topology.load import parse

from .scarce import MACHINE, MIB, PAGE, TOML, filled, host_of, is_alive, used_up

LARGE = parse(TOML.replace('memory = "8', 'model = "dmirror"\nunit = 0\nmemory = "64'))
HOMEWARD: dict[str, Callable[[SimulatedMachine, Process, Handle, int], Awaitable[object]]] = {
    "unplug": lambda machine, _, __, ___: machine.unplug("gpu0"),
    "release": lambda _, __, handle, address: handle.ioctl("release", address, 1),
    "explicit": lambda _, process, __, address: process.migrate(address, 24 * MIB, "host"),
    "command": lambda _, __, handle, address: handle.ioctl("migrate_to_sys", address, 24 * MIB // PAGE),
    "touch": lambda _, process, __, address: process.read(address, 24 * MIB),
}


async def much_on_a_device(machine: SimulatedMachine) -> tuple[Process, int, Handle]:
    """A process with three times as much on the device as the host has memory: page i begins with i."""
    process = await machine.create_process()
    address = await process.mmap(24 * MIB)
    handle = await process.open("gpu0")
    for at in range(0, 24 * MIB, MIB):
        numbers = np.zeros(MIB // 8, np.uint64)
        numbers[:: PAGE // 8] = np.arange(at // PAGE, (at + MIB) // PAGE)
        await process.write(address + at, numbers)
        assert await process.migrate(address + at, MIB, "gpu0") == MIB
    return process, address, handle


@pytest.mark.parametrize("way", HOMEWARD)
def test_more_than_there_is_memory_for_comes_home_page_by_page(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody is killed for the page after the last that there is room for, whose end leaves nothing to bring: nobody else dies for it."""

    async def main(machine: SimulatedMachine) -> None:
        small, there = await filled(machine, MIB)
        process, address, handle = await much_on_a_device(machine)
        begun = HOMEWARD[way](machine, process, handle, address)
        if way in {"unplug", "release"}:
            await begun
        else:
            with pytest.raises(KernelError, match="ENOMEM"):
                await begun
        await trio.sleep(1)
        assert await small.read(there, MIB) == b"x" * MIB
        with pytest.raises(KernelError, match="ESRCH"):
            await process.mmap(PAGE)
        (said,) = (record.getMessage() for record in caplog.records if "out of memory" in record.getMessage())
        assert f"wants a page: killed process {process.pid}" in said
        await small.exit()
        assert machine.left_over() == []

    with caplog.at_level(logging.WARNING, "hmmnet.host"):
        hmmnet.simulate(main, LARGE)


@pytest.mark.parametrize("way", ["explicit", "command", "touch"])
def test_what_there_is_room_for_has_come_home(way: str) -> None:
    """Nobody may be killed: ENOMEM, with the host's memory full of the first pages; the others are where they were, and nothing is lost."""

    async def main(machine: SimulatedMachine) -> None:
        process, address, handle = await much_on_a_device(machine)
        await process.set_oom_score_adj(-1000)
        with pytest.raises(KernelError, match="ENOMEM"):
            await HOMEWARD[way](machine, process, handle, address)
        memory = host_of(machine).memory
        room = 8 * MIB // PAGE - 1
        assert memory.is_used_up
        kinds = bytes(await process.pagemap(address, 24 * MIB // PAGE))
        assert [kinds[page] & 0x7F for page in (0, room - 1, room, 6143)] == list(b"PPSS")
        assert machine.audit(quiet=False) == []
        await process.munmap(address, MIB)
        for page in (256, room, 6143):
            assert await process.load(address + page * PAGE) == page

    hmmnet.simulate(main, LARGE)


def test_pages_come_home_one_by_one_where_there_is_no_room_for_all() -> None:
    """256 pages on the device are read in one go, and two frames are free: they are used, and then somebody is killed for the rest."""

    async def main(machine: SimulatedMachine) -> None:
        process, address = await filled(machine, MIB)
        assert await process.migrate(address, MIB, "gpu0") == MIB
        await process.set_oom_score_adj(-1000)
        spare, kept = await filled(machine, 2 * PAGE)
        large = await used_up(machine)
        await spare.munmap(kept, 2 * PAGE)
        assert await process.read(address, MIB) == b"x" * MIB
        assert [await is_alive(one) for one in (process, spare, large)] == [True, True, False]

    hmmnet.simulate(main, MACHINE)
