"""Faults that the host carries out on real devices: signals to their processes, restarts, what devices are told, and what cannot be.

    gpu0 (scripted; its "process" is one of this test) ══ session ══ host

Oracle: what the child process says of its state (/proc), and what the device heard over its session.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from hmmnet.errors import HmmnetError
from hmmnet.faults.catalogue import fault
from hmmnet.faults.effects import HostEffect
from hmmnet.faults.process_events import ADVICE
from hmmnet.faults.stepping import EVENTS
from hmmnet.host.device import Life
from hmmnet.host.interfaces import Event
from hmmnet.host.mm import advice
from hmmnet.host.service import Host
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_MAX
from hmmnet.wire.messages import Inject, Message

from .fakes import words
from .scripted_device import ScriptedDevice, check, one_device, pages_of, running_host, scripted_device
from .test_killed import machine


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that would go on for a minute."""
    process = subprocess.Popen(["sleep", "60"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def life_of(host: Host) -> Life:
    life = host.devices["gpu0"].life
    assert life is not None
    return life


async def state(child: subprocess.Popen[bytes], wanted: str) -> None:
    """Return when the process is in that state (R, S, T, ...), as /proc has it."""
    with trio.fail_after(5):
        while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] not in wanted:
            await trio.sleep(0.01)


async def ended(child: subprocess.Popen[bytes]) -> int:
    with trio.fail_after(5):
        while (code := child.poll()) is None:
            await trio.sleep(0.01)
    return code


@pytest.mark.parametrize(("kind", "number"), [("crash", signal.SIGKILL), ("unload", signal.SIGTERM)])
async def test_a_device_process_is_ended_by_the_signal_that_the_fault_means(
    kind: str, number: signal.Signals, child: subprocess.Popen[bytes]
) -> None:
    """Once, by pattern of names; it counts, and is over."""
    async with one_device() as (host, _, _process):
        life_of(host).pid = child.pid
        host.add_fault(fault(kind, on="gpu*"))
        assert await ended(child) == -number
        assert host.faults.fired() == {kind: 1}
        assert host.list_faults() == [], "what is done is not there any more"


async def test_a_hang_lasts_until_the_fault_is_removed(child: subprocess.Popen[bytes]) -> None:
    """SIGSTOP, and SIGCONT at its end; a process that has ended meanwhile is no error."""
    async with one_device() as (host, _, _process):
        life_of(host).pid = child.pid
        number = host.add_fault(fault("hang", on="gpu0"))
        await state(child, "T")
        host.remove_fault(number)
        await state(child, "RS")
        number = host.add_fault(fault("hang", on="gpu0"))
        child.kill()
        child.wait()
        host.remove_fault(number)
        host.add_fault(fault("crash", on="gpu0"))


async def test_a_point_costs_a_device_its_process(child: subprocess.Popen[bytes]) -> None:
    """``crash`` at a step boundary, through the injector's hook; names that are no devices are nobody's."""
    async with one_device() as (host, _, _process):
        life_of(host).pid = child.pid
        assert host.injector.on_node is not None
        host.injector.on_node("hang", "nobody")
        host.injector.on_node("hang", "gpu0")
        await state(child, "T")
        host.injector.on_node("crash", "gpu0")
        assert await ended(child) == -signal.SIGKILL


async def test_who_starts_devices_again_is_asked_to(child: subprocess.Popen[bytes]) -> None:
    """``bounce`` now; ``reset`` when the device ends, until that fault is removed; without a launcher it is refused."""
    async with running_host("gpu0", "gpu1") as (host, transport):
        with pytest.raises(HmmnetError, match="does not start devices again: bounce needs hmmnet up"):
            host.add_fault(fault("bounce", on="gpu0"))
        asked: list[tuple[str, float]] = []
        host.on_restart = lambda name, down_s: asked.append((name, down_s))
        with pytest.raises(HmmnetError, match='device "gpu0" has not started yet; `hmmnet ps` tells when it is ready'):
            host.add_fault(fault("bounce", on="gpu0"))
        async with scripted_device(host, transport, "gpu0") as device:
            await host.device_ready("gpu0")
            life_of(host).pid = child.pid
            host.add_fault(fault("bounce", on="gpu0", down="50 ms"))
            assert await ended(child) == -signal.SIGKILL
            assert asked == [("gpu0", 0.05)]
            number = host.add_fault(fault("reset", on="gpu0", down="20 ms"))
            device.vanish()
        with trio.fail_after(5):
            while len(asked) < 2:
                await trio.sleep(0.01)
        assert asked[1:] == [("gpu0", 0.02)]
        host.remove_fault(number)
        async with scripted_device(host, transport, "gpu0", 2) as device:
            await host.device_ready("gpu0")
            device.vanish()
        with trio.fail_after(5):
            while host.devices["gpu0"].life is not None:
                await trio.sleep(0.01)
        assert len(asked) == 2
        host.add_fault(fault("bounce", on="gpu0", down="30 ms"))  # it is dead, and starts again all the same
        assert asked[2:] == [("gpu0", 0.03)]


@pytest.mark.virtual_time
async def test_what_cannot_be_done_is_refused_with_the_mend() -> None:
    """The host itself, a device that there is not, a deed that there is not: each says so, and no fault is there afterwards."""
    async with running_host("gpu0") as (host, _):
        for kind, on, why in (
            ("crash", "host", "end its process instead"),
            ("crash", "gpu7", 'no device is called "gpu7"; did you mean "gpu0"[?] There are gpu0'),
        ):
            with pytest.raises(HmmnetError, match=why):
                host.add_fault(fault(kind, on=on))
        with pytest.raises(HmmnetError, match='the host has no deed "juggle"'):
            host.injection.deed(HostEffect("juggle"))
        assert host.list_faults() == []


@pytest.mark.virtual_time
async def test_devices_hear_of_faults_and_tell_how_often_they_happened() -> None:
    """One that is there is told of what begins and ends, one that comes later of what there is; counts come back, garbage does not."""
    async with running_host("gpu0", "gpu1") as (host, transport), scripted_device(host, transport, "gpu0") as first:
        heard: list[Message] = []
        first.session.on(Inject, heard.append)
        await host.device_ready("gpu0")
        number = host.add_fault(fault("alloc.device", on="gpu*", probability=0.5))
        late: list[Message] = []
        async with scripted_device(host, transport, "gpu1") as second:
            second.session.on(Inject, late.append)
            await host.device_ready("gpu1")
            with trio.fail_after(5):
                while not (heard and late):
                    await trio.sleep(0.01)
            for one in (heard[0], late[0]):
                assert isinstance(one, Inject)
                assert one.number == number
                assert msgspec.msgpack.decode(one.fault)["kind"] == "alloc.device"
            second.session.note(Inject(number, msgspec.msgpack.encode({"fired": 3})))
            second.session.note(Inject(number, b"\xc1"))
            with trio.fail_after(5):
                while host.faults.fired().get("alloc.device") != 3:
                    await trio.sleep(0.01)
            host.remove_fault(number)
            with trio.fail_after(5):
                while len(heard) < 2:
                    await trio.sleep(0.01)
        assert heard[1:] == [Inject(number, b"")]


@pytest.mark.virtual_time
async def test_deeds_without_a_process_concern_all_of_them() -> None:
    """``poison`` of a range in every process that has it: each gets SIGBUS there, what nobody maps is no error."""
    async with running_host("gpu0") as (host, _):
        processes = [await host.create_process() for _ in range(2)]
        address = await pages_of(processes[0], 2)
        assert await pages_of(processes[1], 2) == address
        host.injection.deed(HostEffect("poison", start=address, end=address + PAGE_SIZE))
        with trio.fail_after(5):
            while host.memory.poisoned < 2:
                await trio.sleep(0.01)
        for process in processes:
            assert await process.read(address + PAGE_SIZE, 1) == b"\2"
            assert host.spaces[process.pid].pagemap(address, 1) == b"-"


async def test_messages_are_lost_on_the_wires_of_a_host() -> None:
    """Over ipc, to a device process: what is lost is asked for again and counted; wires to nobody are refused."""
    async with machine("ipc") as (host, _):
        with pytest.raises(HmmnetError, match='no device is called "gpu9"'):
            host.add_fault(fault("loss", on="gpu9<->host"))
        number = host.add_fault(fault("loss", on="host->gpu0", channel="control", message="OpenContext", times=1))
        process = await host.create_process()
        address = await pages_of(process)
        await process.open("gpu0")
        assert await process.migrate(address, 8 * PAGE_SIZE, "gpu0") == 8 * PAGE_SIZE
        await check(process, address)
        assert host.faults.fired() == {"loss": 1}
        host.remove_fault(number)


@pytest.mark.virtual_time
async def test_deeds_are_done_to_the_process_that_is_meant() -> None:
    """At once, by number: a fork is a child that ends; ``exec`` unmaps all; what needs a range and has none does nothing."""
    async with running_host("gpu0") as (host, _):
        one, other = [await host.create_process() for _ in range(2)]
        address = await pages_of(one)
        assert await pages_of(other) == address
        for deed in ("fork", "mprotect", "mremap", "munmap", "madvise", "touch", "nested"):
            host.injection.deed(HostEffect(deed, process=one.pid))
        with pytest.raises(HmmnetError, match=f"there is no process {other.pid + 1}; those that run are {one.pid}, {other.pid}"):
            host.add_fault(fault("process.exec", process=other.pid + 1))
        await trio.testing.wait_all_tasks_blocked()
        await check(one, address)
        assert sorted(host.processes) == [one.pid, other.pid]
        host.injection.deed(HostEffect("exec", process=other.pid))
        await trio.testing.wait_all_tasks_blocked()
        await check(one, address)
        assert not other.space.vmas(0, PAGES_MAX)


@pytest.mark.virtual_time
async def test_the_oom_killer_chooses_unless_it_is_told_whom_to_take() -> None:
    """``oom`` of a process: its memory is reaped, then it ends; of nobody: whose end gives most; nobody left is no error."""
    async with running_host("gpu0") as (host, _):
        small, large, told = [await host.create_process() for _ in range(3)]
        file = await told.memfd_create(4 * PAGE_SIZE)
        for process, pages in ((small, 1), (large, 9), (told, 4)):
            await pages_of(process, pages)
        await told.mmap(4 * PAGE_SIZE, shared=True, file=file)
        for number, left in ((told.pid, [small.pid, large.pid]), (0, [small.pid]), (0, []), (0, [])):
            host.injection.deed(HostEffect("oom", process=number))
            await trio.testing.wait_all_tasks_blocked()
            assert sorted(host.processes) == left


# --- what a host says of itself ---------------------------------------------------------------------------------------------------


async def mirrored(device: ScriptedDevice, address: int, flags: int) -> None:
    """The device's IOMMU domain may reach one page."""
    subscription = (await device.subscribe(1)).subscription
    await device.range_fault(1, subscription, address >> PAGE_SHIFT, 1, flags)


@pytest.mark.virtual_time
async def test_an_audit_names_translations_that_the_page_table_does_not_have() -> None:
    """I1: a right that is gone, a page that is gone; silent while an invalidation, or a writer of the layout, is at work."""
    async with one_device() as (host, device, process):
        address = await pages_of(process, 2)
        page = address >> PAGE_SHIFT
        await mirrored(device, address, 3 << 62)
        assert host.audit() == []
        table, entry = process.space.mm.table, process.space.mm.table.get(page)
        table.set(page, entry & ~8)
        assert [f"the IOMMU of gpu0 may write page 0x{page:x} of process {process.pid}" in wrong for wrong in host.audit(quiet=False)] == [
            True
        ]
        table.set(page, entry)
        frame = entry >> 12
        believed = host.audit_mirror("gpu0", process.pid, words(page + 9), words(frame), words(0) != 0)
        where = f"page 0x{page + 9:x} of process {process.pid} as frame 0x{frame:x}"
        assert believed == [f"the mirror of gpu0 may read {where}, the page table has nothing there (I1)"]
        assert host.audit_mirror("gpu1", process.pid, words(page), words(7), words(0) != 0) == [], "a device that is not there"
        async with process.space.hub.invalidate(Event.CLEAR, page, page + 1):
            assert host.audit_mirror("gpu0", process.pid, words(page), words(7), words(0) != 0) == []


@pytest.mark.virtual_time
async def test_an_audit_finds_books_that_do_not_agree_and_frames_that_are_left_over() -> None:
    """A count that is wrong is named; without processes everything must be free; nothing is said in the middle of a change of layout."""
    async with running_host("gpu0") as (host, _):
        process = await host.create_process()
        await pages_of(process, 2)
        process.space.mm.rss += 1
        assert host.audit() == [f"process {process.pid}: rss is 3, mapped are 2"]
        async with process.space.mmap_lock.write():
            assert host.audit() == []
        process.space.mm.rss -= 1
        held = await process.get_user_pages(await process.mmap(PAGE_SIZE), 1, write=True)
        await process.exit()
        assert host.audit() == ["host: 1 frames are left over"]
        await held.put()
        assert host.audit() == []


def test_events_of_faults_are_those_of_the_notifier() -> None:
    """A fault that is only for one event names it as the host does; another name would be a fault that never happens."""
    assert tuple(EVENTS) == tuple(map(str, Event))


def test_advice_of_faults_is_that_of_madvise() -> None:
    """What a process can be made to advise is what the host knows; another name would be a fault without effect."""
    assert sorted(ADVICE) == sorted(advice.ADVICE)
