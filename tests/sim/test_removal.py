"""Machines from which something is taken in order: a device with pages in its memory, a process when memory is used up.

    program ── processes ── host ══ gpu0, gpu1      (simulated)

Oracle: the bytes that processes stored; the errno of whoever comes too late; the books at the end.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import trio

import hmmnet
from hmmnet.errors import HmmnetError, KernelError, PeerError
from hmmnet.faults import PointFault, fault
from hmmnet.host.requests import Requests
from hmmnet.pages import PAGE_SIZE
from hmmnet.sim import SimulatedMachine
from hmmnet.wire.messages import Migrate

from .everything import MACHINE
from .test_dma_ways import MACHINE as COHERENT

PAGES = 64


def test_a_device_is_unplugged_with_pages_in_its_memory() -> None:
    """All bytes are at the host; opening it again is ENODEV that says why; the other device goes on, and the books agree."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(2 * PAGES * PAGE_SIZE)
        data = np.arange(2 * PAGES * PAGE_SIZE // 8, dtype=np.uint64)
        await process.write(address, data)
        assert await process.migrate(address, PAGES * PAGE_SIZE, "gpu0") == PAGES * PAGE_SIZE
        assert await process.migrate(address + PAGES * PAGE_SIZE, PAGES * PAGE_SIZE, "gpu1") == PAGES * PAGE_SIZE
        child = await process.fork()
        await machine.unplug("gpu0")
        assert set((await process.residency(address, 2 * PAGES)).owners) == {machine.topology.nodes[0].name, "gpu1"}
        figures = (await machine.report())["devices"]
        assert [figures[name]["state"] for name in ("gpu0", "gpu1")] == ["lost", "ready"]
        with pytest.raises(KernelError, match=r'ENODEV.*"gpu0" is not there: it was lost: it was unplugged'):
            await process.migrate(address, PAGE_SIZE, "gpu0")
        with pytest.raises(KernelError, match="ENODEV"):
            await machine.unplug("gpu0")
        with pytest.raises(KernelError, match="ENOENT"):
            await machine.unplug("gpu7")
        assert await process.migrate(address, PAGES * PAGE_SIZE, "gpu1") == PAGES * PAGE_SIZE
        for one in (process, child):
            assert (np.frombuffer(await one.read(address, data.nbytes), np.uint64) == data).all()
        await trio.sleep(5)
        assert machine.audit() == []

    hmmnet.simulate(main, MACHINE)


def test_an_unplug_waits_for_a_migration_that_was_heard_and_has_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both in one round of the scheduler, in either order: all pages go to the device, and then home."""
    heard = trio.Event()
    migrate = Requests.migrate

    def hear(requests: Requests, message: Migrate) -> object:
        answer = migrate(requests, message)
        heard.set()
        return answer

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(4 * PAGE_SIZE)
        await process.write(address, bytes([7]) * 4 * PAGE_SIZE)

        async def unplug() -> None:
            await heard.wait()
            await machine.unplug("gpu0")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(unplug)
            assert await process.migrate(address, 4 * PAGE_SIZE, "gpu0") == 4 * PAGE_SIZE
        assert await process.read(address, 4 * PAGE_SIZE) == bytes([7]) * 4 * PAGE_SIZE
        assert machine.audit() == []

    monkeypatch.setattr(Requests, "migrate", hear)
    for seed in range(8):
        heard = trio.Event()
        hmmnet.simulate(main, MACHINE, seed=seed)


def test_a_device_that_never_heard_that_it_was_let_in_is_unplugged_all_the_same() -> None:
    """Its welcome is lost, and so is the host's goodbye: it says hello once more, is refused, and ends."""

    async def main(machine: SimulatedMachine) -> None:
        await machine.kill_device("gpu0")
        cut = machine.add_fault(fault("partition", "gpu0<-host"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_start_in_vain, machine, "gpu0")
            while (await machine.report())["devices"]["gpu0"]["state"] == "lost":
                await trio.sleep(0.01)
            await machine.unplug("gpu0")
            machine.remove_fault(cut)
            await machine.device_ended("gpu0", 2)
        await machine.start_device("gpu0")
        process = await machine.create_process()
        address = await process.mmap(PAGE_SIZE)
        assert await process.migrate(address, PAGE_SIZE, "gpu0") == PAGE_SIZE

    hmmnet.simulate(main, MACHINE)


async def _start_in_vain(machine: SimulatedMachine, device: str) -> None:
    with pytest.raises(HmmnetError, match=f"{device} was here in this life, and is not any more .*; start it anew"):
        await machine.start_device(device)


def test_a_device_whose_page_is_held_stays() -> None:
    """Coherent memory that somebody has a reference of: who holds it is named, the device is as before, and can be unplugged later."""

    async def main(machine: SimulatedMachine) -> None:
        device = "far"
        process = await machine.create_process()
        address = await process.mmap(4 * PAGE_SIZE)
        await process.write(address, bytes([9]) * 4 * PAGE_SIZE)
        await process.migrate(address, 4 * PAGE_SIZE, device)
        held = await process.get_user_pages(address + PAGE_SIZE, 1)
        with pytest.raises(HmmnetError, match=rf'memory of device "{device}" .* cannot be removed: process {process.pid} maps 1 pages'):
            await machine.unplug(device)
        assert await process.migrate(address, PAGE_SIZE, device) == PAGE_SIZE
        await held.put()
        await machine.unplug(device)
        assert (await process.residency(address, 4)).owners == (machine.topology.nodes[0].name,)
        assert await process.read(address, 4 * PAGE_SIZE) == bytes([9]) * 4 * PAGE_SIZE
        await trio.sleep(5)
        assert machine.audit() == []

    hmmnet.simulate(main, COHERENT)


def test_jobs_and_migrations_that_run_meanwhile_end_in_order() -> None:
    """Migrations and a job in the middle of it: each ends, with its result or with the device's goodbye; no byte is lost."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(8 * PAGES * PAGE_SIZE)
        data = np.arange(8 * PAGES * PAGE_SIZE // 8, dtype=np.uint64)
        await process.write(address, data)
        ended: list[str] = []

        async def migrate(i: int) -> None:
            try:
                await process.migrate(address + i * PAGES * PAGE_SIZE, PAGES * PAGE_SIZE, "gpu0")
                ended.append("moved")
            except (KernelError, PeerError) as error:
                ended.append(type(error).__name__)

        async with trio.open_nursery() as nursery:
            for i in range(8):
                nursery.start_soon(migrate, i)
                await trio.sleep(1e-5)
            await machine.unplug("gpu0")
        assert len(ended) == 8
        assert "moved" in ended
        assert (await process.residency(address, 8 * PAGES)).owners == (machine.topology.nodes[0].name,)
        assert (np.frombuffer(await process.read(address, data.nbytes), np.uint64) == data).all()
        await trio.sleep(5)
        assert machine.audit() == []

    hmmnet.simulate(main, MACHINE)


def test_the_oom_killer_takes_whom_it_must() -> None:
    """The largest; then whom its owner has offered; then, in a group, whoever is there; who is spared is spared."""

    async def main(machine: SimulatedMachine) -> None:
        await machine.create_cgroup("job", 100 * PAGE_SIZE)
        large, offered, spared = [await machine.create_process() for _ in range(3)]
        inside = await machine.create_process(cgroup="job")
        for process, pages in ((large, 900), (offered, 10), (spared, 2000), (inside, 5)):
            await process.write(await process.mmap(pages * PAGE_SIZE), bytes(pages * PAGE_SIZE))
        await spared.set_oom_score_adj(-1000)
        with pytest.raises(KernelError, match="EINVAL"):
            await spared.set_oom_score_adj(1001)
        assert await spared.oom_score() == 0 < await offered.oom_score() <= await large.oom_score()
        assert await machine.oom_kill() == large.pid
        with pytest.raises(KernelError, match="ESRCH"):
            await large.read(0, 1)
        await offered.set_oom_score_adj(500)
        assert await machine.oom_kill() == offered.pid
        assert await machine.oom_kill("job") == inside.pid
        with pytest.raises(KernelError, match=r"ESRCH.*none of 0 processes may be killed"):
            await machine.oom_kill("job")
        with pytest.raises(KernelError, match="none of 1 processes may be killed"):
            await machine.oom_kill()
        with pytest.raises(HmmnetError, match='no memory cgroup is called "jobs"'):
            await machine.oom_kill("jobs")
        assert (await machine.report())["cgroups"]["job"]["current_bytes"] == 0
        assert machine.audit() == []

    hmmnet.simulate(main, MACHINE)


@pytest.mark.parametrize("dies", [False, True], ids=["to its end", "to the death of the device"])
def test_a_migration_under_way_is_waited_for(*, dies: bool) -> None:
    """It was asked for before: its pages land, and go home at once. Nobody opens the device meanwhile; if it dies, unplugging says so."""

    async def main(machine: SimulatedMachine) -> None:
        process, late = await machine.create_process(), await machine.create_process()
        address = await process.mmap(PAGES * PAGE_SIZE)
        data = np.arange(PAGES * PAGE_SIZE // 8, dtype=np.uint64)
        await process.write(address, data)
        machine.injector.add(PointFault("migrate.before_pages", "delay", delay_s=0.5))
        moved: list[int] = []
        ended: list[str] = []

        async def migrate() -> None:
            with contextlib.suppress(PeerError):
                moved.append(await process.migrate(address, PAGES * PAGE_SIZE, "gpu0"))

        async def unplug() -> None:
            try:
                await machine.unplug("gpu0")
                ended.append("unplugged")
            except PeerError as error:
                ended.append(str(error))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(migrate)
            await trio.sleep(0.1)
            nursery.start_soon(unplug)
            await trio.sleep(0.1)
            with pytest.raises(KernelError, match='"gpu0" is being unplugged'):
                await late.open("gpu0")
            assert ended == []
            if dies:
                machine.add_fault(fault("crash", "gpu0"))
        if dies:
            assert moved == []
            assert "was killed" in ended[0]
        else:
            assert (moved, ended) == ([PAGES * PAGE_SIZE], ["unplugged"])
        assert (await process.residency(address, PAGES)).owners == (machine.topology.nodes[0].name,)
        assert (np.frombuffer(await process.read(address, data.nbytes), np.uint64) == data).all()
        await trio.sleep(5)
        assert machine.audit() == []

    hmmnet.simulate(main, MACHINE)
