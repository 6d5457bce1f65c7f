"""Safety under faults: what is interrupted leaves its source intact, what is lost says so, and nobody waits longer than he must."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Literal

import pytest
import trio

import hmmnet
from hmmnet.errors import BusError, KernelError, PeerError, SegmentationFault
from hmmnet.faults import POINTS, Controls, PointFault, Where, fault
from hmmnet.faults.kinds import Fault
from hmmnet.program import Process
from hmmnet.sim import SimulatedMachine

from .everything import MACHINE, PAGE

PAGES = 32
DATA = bytes(range(256)) * (PAGES * PAGE // 256)
OUTWARD = [name for name in POINTS if name.startswith("migrate.") and POINTS[name].waits]
INSIDE = ["device.before_migrate", "device.copy_in", "device.migrated", "device.before_done"]
HOMEWARD = [name for name in POINTS if name.startswith(("home.", "device.copy_out", "device.mid_copy")) and POINTS[name].waits]


@pytest.mark.parametrize("action", ["crash", "hang"])
@pytest.mark.parametrize("name", [*OUTWARD, *INSIDE])
def test_a_migration_interrupted_at_any_step(name: str, action: str) -> None:
    """The device dies or hangs on the way out: every page is at its source, untouched, or was on the device already and says SIGBUS."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(PAGES * PAGE)
        await process.write(address, DATA)
        machine.add_fault(PointFault(name, action, "gpu0", controls=Controls(nth=1)))  # type: ignore[arg-type]
        try:
            await process.migrate(address, PAGES * PAGE, "gpu0")
        except (PeerError, KernelError):
            assert machine.injector.fired, name
        await trio.sleep(0.1)  # the last steps of a migration run behind its answer
        assert machine.injector.fired, "never reached"
        began_s, lost = trio.current_time(), 0
        for page in range(PAGES):
            try:
                assert await process.read(address + page * PAGE, PAGE) == DATA[page * PAGE : (page + 1) * PAGE]
            except BusError as gone:
                if 'only copy on device "gpu0"' not in str(gone):
                    raise
                lost += 1
        assert trio.current_time() - began_s < 15
        if name not in ("migrate.after", "migrate.before_finalize", "device.before_done"):
            assert lost == 0, "its only copy was at the host"
        machine.heal()
        await process.exit()

    hmmnet.simulate(main, MACHINE, limit_s=300.0)


@pytest.mark.parametrize("action", ["delay", "pause"])
def test_what_a_device_wrote_before_the_host_finalized_is_not_undone(action: Literal["delay", "pause"]) -> None:
    """The device says that it uses the page, stores there, says that, too, and dies; its host is slow to finalize. The store is lost, not
    undone: nobody sees the word that was there before."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.malloc(PAGE)
        await process.store(address, 1)
        machine.add_fault(PointFault("migrate.before_finalize", action, "gpu0", delay_s=0.05, controls=Controls(nth=1)))
        await process.launch("poke", "gpu0", "demand", a=address, words=(2).to_bytes(8, "little"))
        assert machine.injector.fired, "never reached"
        await machine.kill_device("gpu0")
        with pytest.raises(BusError, match='only copy on device "gpu0"'):
            await process.load(address)
        machine.heal()
        await process.exit()

    hmmnet.simulate(main, MACHINE, limit_s=300.0)


def test_a_device_is_not_lost_for_a_host_that_is_slow_to_finalize() -> None:
    """It has said that its table is up to date; for how long it may be silent before that is another matter."""

    async def main(machine: SimulatedMachine) -> int:
        process = await machine.create_process()
        address = await process.malloc(PAGE)
        await process.store(address, 1)
        machine.add_fault(PointFault("migrate.before_finalize", "delay", "gpu0", delay_s=4.0, controls=Controls(nth=1)))
        await process.launch("poke", "gpu0", "demand", a=address, words=(2).to_bytes(8, "little"))
        await trio.sleep(6.0)
        assert machine.injector.fired, "never reached"
        assert await process.load(address) == 2
        lives: int = (await machine.report())["devices"]["gpu0"]["lives"]
        await process.exit()
        return lives

    assert hmmnet.simulate(main, MACHINE, limit_s=300.0).value == 1


@pytest.mark.parametrize("pages", [1, 3, PAGES])
@pytest.mark.parametrize("name", HOMEWARD)
def test_a_way_home_interrupted_at_any_step(name: str, pages: int) -> None:
    """The device dies on the way home: a page is right, or SIGBUS that names page and device; never anything else."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(PAGES * PAGE)
        await process.write(address, DATA)
        await process.migrate(address, PAGES * PAGE, "gpu0")
        machine.add_fault(PointFault(name, "crash", "gpu0", controls=Controls(nth=1)))
        for page in range(0, PAGES, pages):
            part = slice(page * PAGE, min(page + pages, PAGES) * PAGE)
            try:
                assert await process.read(address + part.start, part.stop - part.start) == DATA[part]
            except BusError as gone:
                if 'only copy on device "gpu0"' not in str(gone):
                    raise
        await process.exit()

    hmmnet.simulate(main, MACHINE, limit_s=300.0)


@pytest.mark.parametrize("shape", ["bit", "burst", "swap"])
def test_damaged_chunks_are_caught_and_resent(shape: str) -> None:
    """Both ways, streams and single pages: half of all copies are damaged, and every byte is right."""

    async def main(machine: SimulatedMachine) -> int:
        process = await machine.create_process()
        address = await process.mmap(PAGES * PAGE)
        await process.write(address, DATA)
        machine.add_fault(fault("copy.corrupt", "gpu*", probability=0.4, shape=shape))
        for _ in range(4):
            assert await process.migrate(address, PAGES * PAGE, "gpu0") == PAGES * PAGE
            assert await process.read(address, PAGE) == DATA[:PAGE]
            assert await process.read(address, PAGES * PAGE) == DATA
        damaged = machine.network.fired["corrupt"] + len(machine.injector.fired)
        await process.exit()
        return damaged

    assert hmmnet.simulate(main, MACHINE, limit_s=300.0).value > 3


def test_a_crashed_host_s_devices_stop_within_the_lease() -> None:
    """Nothing comes from the host any more: mirrors are empty when the lease is over, and the devices end."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.malloc(PAGE)
        await process.store(address, 1)
        await process.launch("reduction", "gpu0", "demand", a=address, n=1, dtype="<u8")
        (opened,) = machine.device("gpu0").contexts.values()
        assert opened.context.mirror.mapped_count() > 0
        machine.add_fault(fault("host.crash"))
        await trio.sleep(4)
        assert opened.context.mirror.mapped_count() == 0
        assert machine.running == ()

    hmmnet.simulate(main, MACHINE, limit_s=300.0)


def test_a_restarted_device_is_empty_and_new() -> None:
    """What was only there is lost for good; the new incarnation has nothing of the old and works."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(PAGES * PAGE)
        await process.write(address, DATA)
        await process.migrate(address, PAGE, "gpu0")
        machine.add_fault(fault("bounce", "gpu0", down="50 ms"))
        await trio.sleep(1)
        assert machine.running == MACHINE.device_names
        figures = (await machine.report())["devices"]["gpu0"]
        assert (figures["lives"], figures["pages_used"], figures["contexts"]) == (2, 0, 0)
        with pytest.raises(BusError, match='only copy on device "gpu0"'):
            await process.load(address)
        assert await process.migrate(address + PAGE, PAGE, "gpu0") == PAGE
        assert await process.read(address + PAGE, PAGE) == DATA[PAGE : 2 * PAGE]
        await process.exit()

    hmmnet.simulate(main, MACHINE, limit_s=300.0)


@pytest.mark.parametrize("dies", ["killed", "unplugged", "in between"])
def test_a_device_that_is_dead_already_starts_again_when_it_is_to_bounce(dies: str) -> None:
    """As a real one does; who starts it himself meanwhile has it once."""

    async def main(machine: SimulatedMachine) -> None:
        if dies == "unplugged":
            await machine.unplug("gpu0")
            await machine.device_ended("gpu0")
        else:
            await machine.kill_device("gpu0")
        machine.add_fault(fault("bounce", "gpu0", down="50 ms"))
        if dies == "in between":
            await machine.start_device("gpu0")
        await trio.sleep(1)
        assert machine.running == MACHINE.device_names
        assert machine.incarnation("gpu0") == 2

    hmmnet.simulate(main, MACHINE, limit_s=300.0)


def test_a_host_that_hangs_goes_on() -> None:
    """Shorter than the lease nothing is lost and everybody waits; longer, the devices end, and can be started again once it goes on."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(PAGES * PAGE)
        await process.write(address, DATA)
        await process.migrate(address, PAGE, "gpu0")
        machine.add_fault(fault("hang", "host", lasts=0.5))
        began_s = trio.current_time()
        assert await process.read(address, PAGE) == DATA[:PAGE]
        assert trio.current_time() - began_s > 0.49
        assert machine.running == MACHINE.device_names
        number = machine.add_fault(fault("hang", "host"))
        await trio.sleep(5)
        assert machine.running == ()
        machine.remove_fault(number)
        for device in MACHINE.device_names:
            await machine.start_device(device)
        assert await process.migrate(address, PAGES * PAGE, "gpu1") == PAGES * PAGE
        assert await process.read(address, PAGES * PAGE) == DATA
        await process.exit()
        assert machine.audit(quiet=True) == []

    hmmnet.simulate(main, MACHINE, limit_s=300.0)


def test_a_driver_whose_release_fails_is_closed_all_the_same() -> None:
    """What dmirror brings home as it is closed cannot leave over a link that is down: its mirror is gone, and nothing stale is left."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(4 * PAGE)
        await process.write(address, DATA[: 2 * PAGE])
        handle = await process.open("dmirror0")
        await handle.ioctl("migrate_to_dev", address, 2)
        await handle.ioctl("read", address + 2 * PAGE, 2)
        number = machine.add_fault(fault("link.down", "*dmirror0"))
        with contextlib.suppress(PeerError):
            await handle.close()
        assert machine.device("dmirror0").contexts == {}
        machine.remove_fault(number)
        await process.migrate(address + 2 * PAGE, 2 * PAGE, "gpu0")
        assert machine.audit(quiet=False) == []
        assert await process.read(address, 2 * PAGE) == DATA[: 2 * PAGE]
        await process.exit()

    hmmnet.simulate(main, MACHINE, limit_s=300.0)


def test_broken_memory_is_no_leak() -> None:
    """A broken frame of a device stays out of use while the device lives; it keeps neither the dead device's map nor anybody waiting."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(PAGES * PAGE)
        await process.write(address, DATA)
        for device in ("gpu0", "gpu1"):
            await process.migrate(address, 4 * PAGE, device)
            machine.add_fault(fault("ecc.uncorrectable", process=process.pid, range=f"0x{address + PAGE:x}+{PAGE}"))
            await trio.sleep(0.1)
            with pytest.raises(BusError, match="poisoned"):
                await process.read(address, 4 * PAGE)
            await process.munmap(address, 2 * PAGE)
            await process.mmap(2 * PAGE, "rw", address)
        machine.add_fault(fault("page.retire", "gpu1", pages=3))
        await process.exit()
        await trio.sleep(1)
        assert machine.left_over() == machine.audit(quiet=True) == []
        assert [machine.device(name).memory.used_pages for name in ("gpu0", "gpu1")] == [1, 1]
        assert machine.host.poisoned_pages("gpu0") == 1
        await machine.kill_device("gpu0")
        await trio.sleep(5)
        await machine.start_device("gpu0")
        await machine.unplug("gpu1")
        assert machine.host.poisoned_pages("gpu0") == 0
        owners = [zone.owner for zone in machine.host.memory.zones.values()]  # the host behind the interface
        assert sorted(owners) == ["dmirror0", "gpu0", "node0"], "that of gpu1 is gone, and that of the gpu0 that died"

    hmmnet.simulate(main, MACHINE, limit_s=300.0)


def test_what_is_left_over_is_named_wherever_it_is() -> None:
    """A process, frames of the host's own memory, of a device that is dead, slots of swap; one page is held beyond the process's end."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(PAGES * PAGE)
        await process.write(address, DATA)
        await process.migrate(address, 3 * PAGE, "gpu0")
        await process.madvise(address + 3 * PAGE, 2 * PAGE, "PAGEOUT")
        held = await process.get_user_pages(address + 5 * PAGE, 1, write=True)
        await machine.kill_device("gpu0")
        await trio.sleep(5)
        why = 'device "gpu0" was killed'
        assert machine.left_over() == [
            f"process {process.pid} is left over",
            f"node0: {PAGES - 5} frames are left over",
            f"gpu0 (zone 64, which was lost: {why}): 3 frames are left over",
            "swap: 2 slots are left over",
        ]
        await process.exit()
        assert machine.left_over() == ["node0: 1 frames are left over"]
        await held.put()
        assert machine.left_over() == []

    hmmnet.simulate(main, MACHINE, limit_s=300.0)


def test_an_atomic_access_to_what_has_just_been_lost_says_so() -> None:
    """Refused because its page lay in another device's memory, and then that died with it: SIGBUS that names the page and that device."""
    devices = tuple(replace(one, kind="coherent") if one.name == "gpu1" else one for one in MACHINE.devices)

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(PAGE)
        await process.write(address, DATA[:PAGE])
        await process.migrate(address, PAGE, "gpu1")
        with pytest.raises(SegmentationFault, match="does not come here") as refused:
            await process.launch("fetch_add", "dmirror0", a=address)
        assert "only copy" not in str(refused.value)

        async def dies(_: Where) -> None:
            await machine.kill_device("gpu1")

        machine.add_fault(PointFault("device.job_end", "call", "dmirror0", controls=Controls(nth=1), call=dies))
        with pytest.raises(BusError, match="does not come here") as lost:
            await process.launch("fetch_add", "dmirror0", a=address)
        assert f'page 0x{address // PAGE:x} of process {process.pid} had its only copy on device "gpu1"' in str(lost.value)
        await process.exit()

    hmmnet.simulate(main, replace(MACHINE, devices=devices), limit_s=300.0)


def test_broken_memory_of_a_device_is_left_there_at_once() -> None:
    """It never goes home: who closes a unit does not ask for it again and again, as for pages that are busy."""
    devices = tuple(replace(one, kind="coherent") if one.name == "dmirror0" else one for one in MACHINE.devices)

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(2 * PAGE)
        await process.write(address, DATA[: 2 * PAGE])
        handle = await process.open("dmirror0")
        assert (await handle.ioctl("migrate_to_dev", address, 2)).cpages == 2
        await process.madvise(address, PAGE, "HWPOISON")
        began_s = trio.current_time()
        await handle.close()
        assert trio.current_time() - began_s < 0.1
        assert (await process.residency(address + PAGE, 1)).owners == ("node0",)
        await process.exit()

    hmmnet.simulate(main, replace(MACHINE, devices=devices), limit_s=300.0)


HANGS = {
    "a page that a CPU wants": (1, "device.copy_out", "cpu"),
    "a few pages": (2, "device.copy_out", "home"),
    "frames to fill": (300, "device.copy_in", "there"),
    "frames to clear": (300, "device.copy_in", "untouched"),
}
"""What a device is asked for: how many pages, where it hangs, and what is done."""


@pytest.mark.parametrize("asked", HANGS)
def test_a_device_whose_copy_engine_hangs_holds_nobody_for_long(asked: str) -> None:
    """Its heart beats, and it is lost all the same: with what only it had, and nothing else. A CPU has waited no longer than for an
    invalidation."""
    pages, point, what = HANGS[asked]
    leaves = what in ("cpu", "home")

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(pages * PAGE)
        if what != "untouched":
            await process.write(address, b"x" * pages * PAGE)
        if leaves:
            await process.migrate(address, pages * PAGE, "gpu0")
        machine.add_fault(fault("point.pause", "gpu0", point=point))
        began_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            if what != "cpu":
                nursery.start_soon(migrates, process, address, "host" if leaves else "gpu0")
                await trio.sleep(0.1)
            if leaves:
                with pytest.raises(BusError, match="its copy engine did not answer within 5 s"):
                    await process.read(address, PAGE)
            else:
                assert await process.read(address, PAGE) == (bytes(PAGE) if what == "untouched" else b"x" * PAGE)
        assert 5.0 <= trio.current_time() - began_s < 7.25
        assert machine.audit() == []
        await process.exit()

    async def migrates(process: Process, address: int, owner: str) -> None:
        with contextlib.suppress(PeerError, KernelError):
            await process.migrate(address, pages * PAGE, owner)

    hmmnet.simulate(main, MACHINE, limit_s=300.0)


SLOW = (
    fault("copy.slow", "gpu0", latency="6 s"),
    fault("link.slow", "*", factor=1e-5),
    fault("link.latency", "*", latency="20 s"),
    fault("partition", "gpu0", channel="bulk", lasts="8 s"),
    fault("copy.stall", "gpu0", lasts="8 s"),
    fault("clock.skew", "gpu0", factor=0.5),
)


@pytest.mark.parametrize("slow", SLOW, ids=[slow.kind.name for slow in SLOW])
def test_a_slow_copy_is_waited_for(slow: Fault) -> None:
    """Chunks that come, and links that need their time, are no reason to give a device up."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        data = bytes(range(1, 251)) * (600 * PAGE // 250 + 1)
        address = await process.mmap(600 * PAGE)
        await process.write(address, data[: 600 * PAGE])
        machine.add_fault(slow)
        await trio.sleep(20 if slow.kind.name == "clock.skew" else 0)  # then its clock is 10 s behind
        began_s = trio.current_time()
        await process.migrate(address, 600 * PAGE, "gpu0")
        assert (await process.residency(address, 600)).owners == ("gpu0",)
        await process.migrate(address, 600 * PAGE, "host")
        assert await process.read(address, 600 * PAGE) == data[: 600 * PAGE]
        assert trio.current_time() - began_s > 7.25
        await process.exit()

    hmmnet.simulate(main, MACHINE, limit_s=3000.0)


def test_a_copy_that_fails_before_its_first_chunk_says_why() -> None:
    """The device gives the stream up, and tells the reason with it; the pages stay where they are."""

    async def main(machine: SimulatedMachine) -> None:
        process = await machine.create_process()
        address = await process.mmap(300 * PAGE)
        await process.write(address, b"x" * 300 * PAGE)
        await process.migrate(address, 300 * PAGE, "gpu0")
        machine.add_fault(PointFault("device.copy_out", "fail", "gpu0", controls=Controls(times=4)))
        with pytest.raises(PeerError, match=r"the sender gave it up: .*device\.copy_out"):
            await process.migrate(address, 300 * PAGE, "host")
        assert (await process.residency(address, 300)).owners == ("gpu0",)
        assert await process.read(address, 300 * PAGE) == b"x" * 300 * PAGE
        await process.exit()

    hmmnet.simulate(main, MACHINE, limit_s=300.0)
