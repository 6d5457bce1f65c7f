"""Protocol points: each is reached, each can be slowed, stopped, refused or deadly, and nothing is ever wrong by that."""

from __future__ import annotations

import contextlib
from typing import cast

import pytest
import trio

import hmmnet
from hmmnet.errors import HmmnetError, KernelError, PeerError, SignalError
from hmmnet.faults import POINTS, Controls, PointFault, Where
from hmmnet.faults.points import ACTIONS
from hmmnet.host.mm.invariants import check
from hmmnet.host.service import Host
from hmmnet.sim import SimulatedMachine, run_virtual, simulated

from .everything import MACHINE, MIB, PAGE, everything

RIGHT = hmmnet.simulate(everything, MACHINE).value
MOVED_AFTER_EVICTION = 13
START = {"device.hello", "session.joined", "session.hello", "device.welcome", "session.bye"}
"""Points of a machine's beginning and end: a program sees them when it starts a device anew."""
WAITING = sorted(name for name, point in POINTS.items() if point.waits and name not in START)
DECIDING = sorted(name for name, point in POINTS.items() if not point.waits and name not in START)


async def settled(machine: SimulatedMachine) -> None:
    """Leases are over, frames are back: the invariants hold and the host has its memory."""
    await trio.sleep(10)
    host = cast(Host, machine.host)
    check(host.memory, [space.mm for space in host.spaces.values()])
    assert all(figures["iommu_refused"] == 0 for figures in (await machine.report())["devices"].values())


@pytest.mark.parametrize("name", WAITING)
def test_every_boundary_can_take_its_time(name: str) -> None:
    """Each occurrence of the point takes 2 ms longer: the program sees what it always sees."""

    async def main(machine: SimulatedMachine) -> None:
        number = machine.injector.add(PointFault(name, "delay", delay_s=0.002))
        seen = await everything(machine)
        if name == "migrate.before_finalize":  # a driver that finds its frames locked gives up evicting them in the end
            seen[MOVED_AFTER_EVICTION] = RIGHT[MOVED_AFTER_EVICTION]
        assert seen == RIGHT
        assert machine.injector.count(number) > 0, "never reached"
        await settled(machine)

    hmmnet.simulate(main, MACHINE, limit_s=600.0)


@pytest.mark.parametrize("name", DECIDING)
def test_every_decision_can_fail_once(name: str) -> None:
    """The first occurrence fails: the program ends as it always does, or is told so with an errno or a signal."""

    async def main(machine: SimulatedMachine) -> None:
        number = machine.injector.add(PointFault(name, "fail", controls=Controls(nth=1)))
        with (
            contextlib.nullcontext()
            if name.startswith("migrate.") and name != "migrate.split"
            else contextlib.suppress(KernelError, SignalError)
        ):
            await everything(machine)
        assert machine.injector.count(number) == 1, "never reached"
        await leave(machine)

    hmmnet.simulate(main, MACHINE, limit_s=600.0)


@pytest.mark.parametrize("name", [name for name in WAITING if POINTS[name].errno])
def test_every_step_that_can_fail_does_so_cleanly(name: str) -> None:
    """The second occurrence fails: an error that says so, or none; nothing leaks."""

    async def main(machine: SimulatedMachine) -> None:
        machine.injector.add(PointFault(name, "fail", controls=Controls(nth=2)))
        with contextlib.suppress(KernelError, SignalError, PeerError):
            await everything(machine)
        await leave(machine)

    hmmnet.simulate(main, MACHINE, limit_s=600.0)


async def leave(machine: SimulatedMachine) -> None:
    """Faults end, processes end, and nothing is left over."""
    machine.injector.heal()
    host = cast(Host, machine.host)
    for process in list(host.processes.values()):
        await process.exit()
    await settled(machine)
    assert host.memory.nodes[0].allocator.used_count <= 1, "host frames are left over"


def test_a_pause_holds_who_comes_until_it_is_released() -> None:
    """Between unmap and copy: the CPU that touches the page waits with it, and gets what it stored."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.malloc(MIB)
        await process.store(address, 42)
        number = machine.injector.add(PointFault("migrate.before_copy", "pause", device="gpu0"))
        seen: list[float] = []

        async def look() -> None:
            seen.append(await process.load(address))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.migrate, address, PAGE, "gpu0")
            await trio.sleep(1)
            nursery.start_soon(look)
            await trio.sleep(1)
            assert machine.injector.count(number) == 1
            assert seen == []
            machine.injector.remove(number)
        assert seen == [42]
        await process.exit()

    hmmnet.simulate(main, MACHINE)


def test_targets_by_device_process_range_event_and_occurrence() -> None:
    """Only who is meant is hit; the record says who, where and when."""

    async def main(machine: SimulatedMachine) -> None:
        one, other = await machine.create_process(), await machine.create_process()
        here, there = await one.mmap(4 * PAGE), await other.mmap(4 * PAGE)
        for process, address in ((one, here), (other, there)):
            await process.write(address, b"x" * 4 * PAGE)
        met: list[Where] = []
        add = machine.injector.add
        add(PointFault("migrate.before_*", "call", "gpu1", call=met.append, controls=Controls(times=1)))
        add(PointFault("hub.before_callbacks", "call", event="unmap", call=met.append))
        add(PointFault("home.*", "call", process=other.pid, start=there + PAGE, end=there + 2 * PAGE, call=met.append))
        for device in ("gpu0", "gpu1"):
            for process, address in ((one, here), (other, there)):
                await process.migrate(address, 4 * PAGE, device)
                await process.load(address)
                await process.load(address + PAGE)
        await one.munmap(here, PAGE)
        assert [(where.point, where.device) for where in met if where.point.startswith("migrate.")] == [("migrate.before_collect", "gpu1")]
        assert {(where.process, where.start) for where in met if where.point.startswith("home.")} == {(other.pid, (there >> 12) + 1)}
        assert [where.event for where in met if where.point == "hub.before_callbacks"] == ["unmap"]
        assert [fired.where for fired in machine.injector.fired] == met
        await one.exit()
        await other.exit()

    hmmnet.simulate(main, MACHINE)


def test_a_fault_at_a_point_is_the_same_in_every_run() -> None:
    """By chance, from the seed: equal digests, and another digest for another seed."""

    async def main(machine: SimulatedMachine) -> list[object]:
        machine.injector.add(PointFault("*", "delay", delay_s=0.001, jitter_s=0.01, controls=Controls(0.2)))
        return await everything(machine)

    first, again, another = (hmmnet.simulate(main, MACHINE, seed=seed) for seed in (3, 3, 4))
    assert first.value == again.value == another.value == RIGHT
    assert first.digest == again.digest != another.digest


@pytest.mark.parametrize("action", ["crash", "hang"])
@pytest.mark.parametrize("name", ["migrate.mid_copy", "device.before_ack", "device.migrated", "home.one.taken", "device.job_step"])
def test_a_device_dies_or_hangs_at_a_point(name: str, action: str) -> None:
    """Nobody waits longer than the lease; what was only there is SIGBUS; the device comes back empty."""

    async def main(machine: SimulatedMachine) -> None:
        number = machine.injector.add(PointFault(name, action, controls=Controls(nth=1)))  # type: ignore[arg-type]
        began_s = trio.current_time()
        with pytest.raises((SignalError, PeerError, KernelError)):
            await everything(machine)
        assert trio.current_time() - began_s < 30
        (fired,) = machine.injector.fired
        assert fired.number == number
        device = fired.where.device
        if device in machine.running:
            await machine.kill_device(device)
        await leave(machine)
        await machine.start_device(device)
        process = await machine.create_process()
        address = await process.malloc(MIB)
        await process.write(address, b"again" * PAGE)
        assert await process.migrate(address, PAGE, device) == PAGE
        assert await process.read(address, 5) == b"again"
        await process.exit()

    hmmnet.simulate(main, MACHINE, limit_s=600.0)


def test_points_of_a_device_s_beginning() -> None:
    """Hello and welcome can fail; the next try is a new incarnation and works."""

    async def main() -> None:
        async with simulated(MACHINE) as machine:
            await machine.kill_device("gpu0")
            for name in ("session.hello", "device.welcome"):
                number = machine.injector.add(PointFault(name, "fail", "gpu0", controls=Controls(nth=1)))
                with pytest.raises(HmmnetError, match="fault was injected"):
                    await machine.start_device("gpu0")
                machine.injector.remove(number)
            slow = [machine.injector.add(PointFault(name, "delay", delay_s=0.1)) for name in ("device.hello", "session.joined")]
            await machine.start_device("gpu0")
            assert [machine.injector.count(number) for number in slow] == [1, 1]
            bye = machine.injector.add(PointFault("session.bye", "delay", delay_s=0.1))
        assert [fired.number for fired in machine.injector.fired][-1] == bye

    run_virtual(main)


def test_the_actions_of_all_points() -> None:
    """Every point has some, none has others."""
    for point in POINTS.values():
        assert set(point.actions) <= set(ACTIONS)
        assert ("fail" in point.actions) is (point.errno != 0 or not point.waits), point.name
