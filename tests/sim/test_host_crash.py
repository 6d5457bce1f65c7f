"""The fault ``host.crash``: what a client of a real machine sees whose host was killed, in one trio run.

Oracle: ``kill -9`` of the host of ``hmmnet up``. Every call of its client ends with PeerLost, those that were under way too; devices stop
using their mirrors when their lease is over, and end; nobody declares anything lost.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import trio

import hmmnet
from hmmnet.client import remote_machine
from hmmnet.errors import HmmnetError, PeerLost, SegmentationFault
from hmmnet.faults import PointFault, fault
from hmmnet.sim import SimulatedMachine, run_virtual, simulated
from hmmnet.sim.crash import HOSTS_CODE
from hmmnet.sim.machine import SECRET
from hmmnet.wire.exchange import HEARTBEAT_S, LEASE_S

from .everything import MACHINE, NBYTES, PAGE, everything
from .test_points import DECIDING, WAITING

CRASHED = "the host has crashed"
SILENT_S = LEASE_S + 2 * HEARTBEAT_S
"""After which a device knows that it hears nothing."""


async def at_once(call: Callable[[], Awaitable[Any]]) -> None:
    """It fails, in no time, and says why."""
    began_s = trio.current_time()
    with pytest.raises(PeerLost, match=CRASHED):
        await call()
    assert trio.current_time() == began_s


def test_every_call_fails_at_once() -> None:
    """Through the machine, processes, handles, files, references and userfaults, whatever there was of them."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        gone = await machine.create_process()
        await gone.exit()
        address = await process.malloc(4 * PAGE)
        handle = await process.open("dmirror0")
        file = await process.memfd_create(PAGE)
        held = await process.get_user_pages(address, 1)
        mapped = await process.mmap(PAGE)
        faults = await process.userfaultfd(mapped, PAGE)
        machine.add_fault("host.crash")
        for call in (
            *(machine.create_process, machine.process, machine.report, machine.check, machine.oom_kill),
            *(partial(machine.create_cgroup, "group"), partial(machine.unplug, "gpu0")),
            *(partial(process.malloc, 8), partial(process.read, address, 8), partial(process.write, address, b"x")),
            *(partial(process.load, address), partial(process.store, address, 1), partial(process.mmap, PAGE), process.fork),
            *(partial(process.migrate, address, PAGE, "gpu0"), partial(process.open, "gpu0"), process.smaps, process.oom_score),
            *(partial(process.launch, "reduction", "gpu0", a=address, n=1), process.exit, process.kill),
            *(partial(handle.ioctl, "read", address, 1), handle.close, partial(file.read, 0, 1), partial(file.truncate, 0), file.close),
            *(partial(held.read, 1), held.put, faults.read, partial(faults.copy, mapped, bytes(PAGE)), faults.close, gone.exit),
        ):
            await at_once(call)
        with pytest.raises(PeerLost, match=CRASHED):
            machine.set_rate(0.5)
        assert not machine.all_ready
        assert not machine.settled

    hmmnet.simulate(main, MACHINE, limit_s=60.0)


@pytest.mark.parametrize("name", sorted({*WAITING, *DECIDING} - {"process.exit"}))
def test_it_may_crash_at_any_step(name: str) -> None:
    """What is under way at that moment ends then and there; nothing is left of it that anybody waits for."""
    crashed_s: list[float] = []

    async def main(machine: SimulatedMachine) -> None:
        def crash(_: object) -> None:
            if not crashed_s:
                crashed_s.append(trio.current_time())
                machine.add_fault("host.crash")

        machine.injector.add(PointFault(name, "call", call=crash))
        with pytest.raises(PeerLost, match=CRASHED):
            await everything(machine)
        assert [trio.current_time()] == crashed_s

    assert hmmnet.simulate(main, MACHINE, limit_s=60.0).virtual_s <= crashed_s[0] + SILENT_S


@pytest.mark.parametrize("microseconds", [1, 3, 10, 30, 100, 300, 1000])
def test_calls_under_way_end(microseconds: int) -> None:
    """Of several tasks, which wait for devices, for each other, for a fault, and for what never comes."""
    ended: dict[str, str] = {}

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        data, other, watched = [await process.mmap(NBYTES) for _ in range(3)]
        await process.write(data, bytes(NBYTES))
        await process.migrate(data, NBYTES, "gpu0")
        faults = await process.userfaultfd(watched, NBYTES)
        machine.add_fault("point.pause", point="migrate.before_copy", on="gpu1")
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "there": partial(process.migrate, data, NBYTES, "gpu1"),
            "home": partial(process.read, data, NBYTES),
            "away": partial(process.munmap, data, NBYTES),
            "held": partial(process.migrate, other, NBYTES, "gpu1"),
            "job": partial(process.launch, "reduction", "dmirror0", a=watched, n=8),
            "never": partial(process.load, watched),
            "reader": faults.read,
        }

        async def work(name: str) -> None:
            while name not in ended:
                try:
                    await calls[name]()
                except SegmentationFault:  # somebody has unmapped it
                    await trio.sleep(1e-6)
                except HmmnetError as error:
                    ended[name] = f"{type(error).__name__}: {error}"
                else:
                    await trio.sleep(1e-6)

        async with trio.open_nursery() as nursery:
            for name in calls:
                nursery.start_soon(work, name)
            await trio.sleep(microseconds * 1e-6)
            machine.add_fault("host.crash")
            crashed_s = trio.current_time()
        assert trio.current_time() <= crashed_s + 1e-6
        assert sorted(ended) == sorted(calls)
        assert all(said.startswith(f"PeerLost: {CRASHED}") for said in ended.values()), ended

    hmmnet.simulate(main, MACHINE, limit_s=60.0)


def test_devices_stop_within_the_lease_and_nobody_declares_them_lost(caplog: pytest.LogCaptureFixture) -> None:
    """As real ones: they use what they have until they know, and end then. The host says nothing any more, to anybody."""
    told: list[tuple[str, ...]] = []

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.malloc(PAGE)
        await process.store(address, 1)
        await process.launch("reduction", "gpu0", "remote", a=address, n=1, dtype="<u8")
        (opened,) = machine.device("gpu0").contexts.values()
        machine.host.on_change = lambda *change: told.append(change)
        machine.add_fault("host.crash")
        await trio.sleep(LEASE_S / 2)
        assert opened.context.mirror.mapped_count() > 0, "the lease holds"
        assert machine.running == MACHINE.device_names
        assert machine.audit() == machine.audit_changes() == machine.left_over() == []
        await trio.sleep(SILENT_S - LEASE_S / 2)
        assert opened.context.mirror.mapped_count() == 0
        assert machine.running == ()
        with pytest.raises(PeerLost, match="no host answered"):
            await machine.start_device("gpu0")
        machine.heal()

    with caplog.at_level(logging.INFO):
        hmmnet.simulate(main, MACHINE, limit_s=60.0)
    assert told == []
    assert [record.message for record in caplog.records if record.name.startswith(HOSTS_CODE.rstrip("."))] == []


def test_a_device_that_goes_on_beyond_its_lease_is_still_complained_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """The books have died with the host; what devices use is looked at all the same."""

    async def main(machine: SimulatedMachine) -> list[str]:
        process = await machine.create_process()
        address = await process.malloc(PAGE)
        await process.store(address, 1)
        await process.launch("reduction", "gpu0", "remote", a=address, n=1, dtype="<u8")
        device = machine.device("gpu0")
        machine.add_fault("host.crash")
        monkeypatch.setattr(type(device), "fenced", True)
        assert machine.audit() == machine.audit_changes()
        return machine.audit()

    assert "lease: gpu0 has heard nothing" in hmmnet.simulate(main, MACHINE, limit_s=60.0).value[0]


@pytest.mark.parametrize("after_s", [0.0, 3.0])
def test_the_program_s_own_error_comes_out_soon(after_s: float) -> None:
    """And leaving the machine takes no longer than its devices do to notice, or to be told to end."""
    ends_s: list[float] = []

    async def main(machine: SimulatedMachine) -> None:
        machine.add_fault("host.crash")
        await trio.sleep(after_s)
        ends_s.append(trio.current_time())
        raise ValueError("my own")

    async def timed(machine: SimulatedMachine) -> None:
        await main(machine)

    with pytest.raises(ValueError, match="my own") as found:
        hmmnet.simulate(timed, MACHINE, limit_s=after_s + SILENT_S)
    assert not hasattr(found.value, "__notes__")


def test_a_host_that_hangs_can_crash() -> None:
    """Who waited for it to go on waits no longer; that the hang ends changes nothing."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.malloc(PAGE)
        number = machine.add_fault(fault("hang", "host"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(at_once_after, 1.0, partial(process.migrate, address, PAGE, "gpu0"))
            await trio.sleep(1.0)
            machine.add_fault("host.crash")
        machine.remove_fault(number)
        await at_once(process.exit)
        await trio.sleep(SILENT_S)
        assert machine.running == ()

    async def at_once_after(seconds: float, call: Callable[[], Awaitable[Any]]) -> None:
        with pytest.raises(PeerLost, match=CRASHED):
            await call()
        assert trio.current_time() == seconds

    hmmnet.simulate(main, MACHINE, limit_s=60.0)


def test_clients_hear_nothing_any_more() -> None:
    """One that was connected loses the host when its lease is over, as a real one; one that comes finds nobody."""

    async def main(machine: SimulatedMachine) -> None:
        wires, endpoint = machine._wires, machine.host.client_endpoint
        async with remote_machine(endpoint, SECRET, "client", wires) as client:
            process = await client.create_process()
            machine.add_fault("host.crash")
            began_s = trio.current_time()
            with pytest.raises(PeerLost, match=r"host was silent for .* longer than its lease"):
                await process.malloc(8)
            assert LEASE_S <= trio.current_time() - began_s <= SILENT_S
        with pytest.raises(PeerLost, match="no host answered"):
            async with remote_machine(endpoint, SECRET, "another", wires):
                pytest.fail("nobody is there")

    hmmnet.simulate(main, MACHINE, limit_s=60.0)


def test_another_machine_of_the_run_goes_on() -> None:
    """Its host's own tasks, and calls under way in it, be they just begun or held; those of the host that crashed end."""

    async def main() -> None:
        async with simulated(MACHINE, name="a") as crashed, simulated(MACHINE, name="b") as other, trio.open_nursery() as nursery:
            for machine in (crashed, other):
                machine.add_fault("point.pause", point="migrate.before_copy", on="gpu1", lasts=1.0)
            processes = [await machine.create_process() for machine in (crashed, other)]
            gone, process = processes
            data, held = await process.mmap(NBYTES), await process.mmap(NBYTES)
            await process.write(data, bytes(NBYTES))
            watched = [await one.mmap(PAGE) for one in processes]
            faults = [await one.userfaultfd(address, PAGE) for one, address in zip(processes, watched, strict=True)]
            nursery.start_soon(at_once, faults[0].read)
            nursery.start_soon(at_once, partial(gone.launch, "reduction", "dmirror0", a=watched[0], n=8))
            heard: list[int] = []

            async def read() -> None:
                heard.append(await faults[1].read())
                await faults[1].copy(watched[1], bytes(PAGE))

            nursery.start_soon(read)
            nursery.start_soon(process.migrate, data, NBYTES, "gpu0")
            nursery.start_soon(process.migrate, held, NBYTES, "gpu1")
            await trio.lowlevel.checkpoint()
            crashed.add_fault("host.crash")
            await trio.sleep(0.01)
            assert await process.load(watched[1]) == 0
            assert heard == [watched[1]]
            await trio.sleep(2 * SILENT_S)
            assert (await other.check())["complaints"] == []
            assert other.running == MACHINE.device_names
            assert crashed.running == ()

    run_virtual(main, limit_s=60.0)
