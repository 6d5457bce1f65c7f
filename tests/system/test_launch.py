"""``hmmnet.launch`` with real processes.

    this process: host (page tables, hub, links) ── ipc ──┬── gpu0 (process)
                                                          └── gpu1 (process)

The oracle is numpy for what a job computes, and the operating system for which processes live.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import hmmnet
import hmmnet.machine
from hmmnet.devices.policy.demand import Demand
from hmmnet.errors import BusError, HmmnetError, KernelError, PeerLost, SegmentationFault
from hmmnet.faults import fault
from hmmnet.launcher.crew import Crew
from hmmnet.launcher.directory import MachineExists, directories
from hmmnet.lifeline import wait_ended
from hmmnet.pages import PAGE_SIZE
from hmmnet.plugins import KERNELS, POLICIES, offered
from hmmnet.program import Machine, Process
from hmmnet.topology.model import MemoryNode, Topology
from hmmnet.wire.exchange import LEASE_S

from .conftest import PATIENT_S

ELEMENTS = 1 << 14
BOUND_S = 30
"""A hang, and no slow computer. Shorter than what has to end sleeps by itself."""


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hn-") as folder:
        monkeypatch.setenv("HMMNET_DIR", folder)
        yield Path(folder)
        assert list(Path(folder).iterdir()) == []


async def add(process: Process, device: str) -> bool:
    """out = a + b on a device, compared with numpy."""
    a, b, out = [await process.malloc(8 * ELEMENTS) for _ in range(3)]
    x, y = np.arange(ELEMENTS, dtype="<f8"), np.full(ELEMENTS, 0.5)
    await process.write(a, x)
    await process.write(b, y)
    await process.launch("vector_add", device, a=a, b=b, out=out, n=ELEMENTS)
    return bool(np.array_equal(await process.read_array(out, "<f8", ELEMENTS), x + y))


async def test_the_rate_is_measured_before_any_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A zygote that imports on the same cores would take away from what is measured."""
    children = []

    async def measure(*given: object, **named: object) -> float:
        await trio.sleep(0.2)
        children.append(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
        return 0.25

    before = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    monkeypatch.setattr(hmmnet.machine, "automatic_rate", measure)
    async with hmmnet.launch("two-gpus") as machine:
        assert machine.rate == 0.25
    assert children == [before]


async def gone(*pids: int) -> None:
    with trio.fail_after(BOUND_S):
        for pid in pids:
            await wait_ended(pid)


async def test_a_launch_can_be_cancelled_while_its_host_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is shielded, so that it can say goodbye: it must be told to end all the same."""

    class Slow(hmmnet.machine.host_class()):  # type: ignore[misc]  # a class that an entry point gives
        @asynccontextmanager
        async def running(self) -> AsyncIterator[None]:
            scope.cancel()
            await trio.sleep(0.01)
            async with super().running():
                yield

    monkeypatch.setattr(hmmnet.machine, "host_class", lambda: Slow)
    with trio.CancelScope() as scope:
        async with hmmnet.launch("two-gpus", rate=1.0):
            pytest.fail("the launch was cancelled")
    assert scope.cancelled_caught


async def test_a_zygote_that_dies_before_it_has_started_a_device_ends_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its devices never were, and nobody is told that they are lost."""

    class Killed(Crew):
        async def start(self, *_: object, **__: object) -> None:
            self.zygote.process.kill()
            await trio.sleep_forever()

    monkeypatch.setattr(hmmnet.machine, "Crew", Killed)
    with pytest.raises(HmmnetError, match=r"^the device zygote is gone .killed by SIGKILL., and every device with it$"):
        async with hmmnet.launch("two-gpus"):
            pytest.fail("there is nobody to start devices")


async def test_any_topology_can_be_launched_whatever_it_is_called() -> None:
    """The machine's name, which is a folder's, is made of what the topology's has of letters and digits."""
    async with hmmnet.launch(Topology("Emil's / machine", "", (MemoryNode("ram", 1 << 20),), (), (), ())) as machine:
        assert machine.name.startswith("Emil-s-machine-")
        assert machine.device_names == ()


async def test_devices_import_nothing_of_their_own(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Jobs, faults and migrations need what the zygote has imported, and no more: an import is memory that devices would not share."""
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    async with hmmnet.launch("two-gpus", rate=1.0) as machine:
        process = await machine.process()
        address = await process.malloc(4 * PAGE_SIZE)
        for device in machine.device_names:
            assert await add(process, device)
            await process.migrate(address, 4 * PAGE_SIZE, device)
            await process.load(address)
            await process.mprotect(address, PAGE_SIZE, "r")
    _, zygote, devices = capfd.readouterr().err.partition(" hmmnet.devices.zygote\n")
    assert zygote
    assert [line for line in devices.splitlines() if line.startswith("import time:")] == []


async def test_a_program_that_stalls_keeps_its_devices() -> None:
    """Twice as long as the lease without a turn for the loop, with a job under way: what is on the devices is there afterwards."""
    async with hmmnet.launch("two-gpus", rate=1.0) as machine:
        process = await machine.process()
        address = await process.malloc(1 << 20)
        await process.write(address, np.full(1 << 20, 7, np.uint8))
        await process.migrate(address, 1 << 20, "gpu1")
        results: list[bool] = []

        async def job() -> None:
            results.append(await add(process, "gpu1"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(job)
            await trio.sleep(0.01)
            time.sleep(2 * LEASE_S)  # noqa: ASYNC251 - what a debugger or a long computation does to the loop
        assert results == [True]
        assert [device.state for device in machine.devices] == ["ready", "ready"]
        assert await process.read(address, 1 << 20) == b"\7" * (1 << 20)


@pytest.mark.parametrize("transport", ["ring", "ipc", "tcp"])
async def test_two_gpus_add_vectors(transport: str) -> None:
    """Same pointers on CPU and devices; everything gone at the end."""
    async with hmmnet.launch("two-gpus", rate=1.0, transport=transport) as machine:  # type: ignore[arg-type]
        assert isinstance(machine, Machine)
        assert machine.device_names == ("gpu0", "gpu1")
        assert [device.state for device in machine.devices] == ["ready", "ready"]
        process = await machine.process()
        assert await add(process, "gpu0")
        assert await add(process, "gpu1")
        report = await machine.report()
        assert len(report["links"]) > 0
        assert {device["bulk"] for device in report["devices"].values()} == {"ring" if transport == "ring" else "messages"}
        pids = [device.pid for device in machine.devices]
        (directory,) = directories()
        record = directory.read()
        assert record is not None
        assert (record.state, record.kind, record.pid) == ("running", "program", os.getpid())
    await gone(*pids)


async def test_auto_slows_the_clock_below_the_wall() -> None:
    """Two PCIe 4 links ask for more than one computer moves."""
    async with hmmnet.launch("two-gpus") as machine:
        assert 0 < machine.rate < 1
        assert await add(await machine.process(), "gpu1")


def test_plain_with_for_scripts_and_notebooks() -> None:
    """The README's ten lines."""
    with hmmnet.launch("two-gpus", rate=1.0) as machine:
        process = machine.process()
        a, b, out = (process.malloc(8 * ELEMENTS) for _ in range(3))
        process.write(a, np.arange(ELEMENTS, dtype="<f8"))
        process.write(b, np.ones(ELEMENTS, dtype="<f8"))
        process.launch("vector_add", "gpu0", a=a, b=b, out=out, n=ELEMENTS)
        assert process.read_array(out, "<f8", ELEMENTS).tolist() == [float(i + 1) for i in range(ELEMENTS)]
        assert machine.run(add_on_every_device) == [True, True]
        with pytest.raises(HmmnetError):
            process.launch("no_such_kernel", "gpu0")
        pids = [device.pid for device in machine.devices]
    trio.run(gone, *pids)


def test_a_script_breaks_a_machine_that_it_started_and_one_that_it_attached_to() -> None:
    """By kind and parameters, or ready made; both say what there is. Machines and processes are shown by their names."""
    with hmmnet.launch("two-gpus", rate=1.0, name="script-faults") as machine:
        assert repr(machine) == '<machine "script-faults": gpu0, gpu1>'
        assert repr(machine.process()) == "<process 1000>"
        number = machine.add_fault("alloc.host", probability=0.5)
        with hmmnet.attach("script-faults") as attached:
            assert (attached.name, repr(attached)) == (machine.name, repr(machine))
            second = attached.add_fault(fault("alloc.host", times=1))
            third = attached.add_fault("loss", on="gpu0<->host", probability=0.01)
            assert [one["number"] for one in attached.list_faults()] == [number, second, third]
            here, there = ([{**one, "fired": 0} for one in each.list_faults()] for each in (machine, attached))
            assert here == there
            attached.remove_fault(third)
        machine.remove_fault(number)
        machine.remove_fault(second)
        assert machine.list_faults() == []
        with pytest.raises(HmmnetError, match=r'did you mean "alloc.host"'):
            machine.add_fault("alloc.hots")
        with pytest.raises(HmmnetError, match=r'called "gpu7"'):
            machine.add_fault("loss", on="gpu7<->host")
        with pytest.raises(HmmnetError, match="times: a fault that is made already"):
            machine.add_fault(fault("alloc.host"), times=3)


def test_a_machine_begins_with_a_plan_and_is_healed() -> None:
    """Also where nobody awaits: the same plan as a simulation's, in any form, here and at a machine that was attached to."""
    with hmmnet.launch("two-gpus", rate=1.0, name="planned", faults={"alloc.host": {"times": 1}}) as machine:
        assert [one["fault"]["kind"] for one in machine.list_faults()] == ["alloc.host"]
        process = machine.process()
        address = process.mmap(PAGE_SIZE)
        with pytest.raises(KernelError, match="ENOMEM"):
            process.write(address, b"x")
        process.write(address, b"x")
        with hmmnet.attach("planned") as attached:
            attached.add_fault({"kind": "loss", "on": "gpu0<->host", "probability": 0.01})
            assert len(machine.list_faults()) == 2
            attached.heal()
            assert machine.list_faults() == attached.list_faults() == []
        machine.add_fault([fault("alloc.device", times=1)])
        assert [one["fault"]["kind"] for one in machine.list_faults()] == ["alloc.device"]
        machine.heal()
        assert machine.list_faults() == []


def test_async_with_is_for_trio() -> None:
    """In asyncio, as in a notebook, the error says what to write."""
    for made, said in ((hmmnet.launch("two-gpus"), "launch"), (hmmnet.attach("nobody"), "attach")):

        async def cell(inside: Any = made) -> None:
            async with inside:
                pytest.fail("entered")

        with pytest.raises(HmmnetError, match=rf'write "with hmmnet.{said}'):
            asyncio.run(cell())


async def add_on_every_device(machine: Machine) -> list[bool]:
    """A workload."""
    process = await machine.create_process()
    return [await add(process, name) for name in machine.device_names]


async def test_an_exception_in_the_block_comes_out_as_it_is() -> None:
    """No exception group of ours around it, and the devices are gone."""
    with pytest.raises(ZeroDivisionError):
        async with hmmnet.launch("two-gpus", rate=1.0) as machine:
            pids = [device.pid for device in machine.devices]
            raise ZeroDivisionError
    await gone(*pids)


async def test_a_cancelled_block_ends_the_machine() -> None:
    """As any other way out."""
    with trio.move_on_after(20) as scope:
        async with hmmnet.launch("two-gpus", rate=1.0) as machine:
            pids = [device.pid for device in machine.devices]
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    await gone(*pids)


async def test_a_name_is_used_once() -> None:
    """The second is told; machines without a name never collide."""
    async with hmmnet.launch("two-gpus", rate=1.0, name="mine"), hmmnet.launch("two-gpus", rate=1.0) as other:
        assert other.name != "mine"
        with pytest.raises(MachineExists, match="runs already"):
            async with hmmnet.launch("two-gpus", rate=1.0, name="mine"):
                pytest.fail("two machines of one name")


@pytest.mark.usefixtures("patient")
async def test_a_killed_device_is_known_at_once() -> None:
    """Its pages raise SIGBUS naming it, with no lease waited out; the other device and the process go on; the machine shows it as lost."""
    async with hmmnet.launch("two-gpus", rate=1.0) as machine:
        process = await machine.process()
        address = await process.mmap(4 * PAGE_SIZE)
        await process.write(address, b"x" * (4 * PAGE_SIZE))
        assert await process.migrate(address, 4 * PAGE_SIZE, "gpu0") == 4 * PAGE_SIZE
        began_s = trio.current_time()
        await machine.kill_device("gpu0")
        with pytest.raises(BusError, match="gpu0"):
            await process.read(address, 1)
        assert trio.current_time() - began_s < PATIENT_S / 2
        lost = machine.devices[0]
        assert (lost.state, lost.how) == ("lost", "killed by SIGKILL")
        with pytest.raises(BusError, match="gpu1"):
            await process.launch("reduction", "gpu1", a=address + 8, n=1)
        for nowhere in (0, address + (1 << 30)):
            with pytest.raises(SegmentationFault) as caught:
                await process.launch("reduction", "gpu1", a=nowhere, n=1)
            assert caught.value.address == nowhere
        assert await add(process, "gpu1")
        with pytest.raises(KernelError, match=r'ENOENT.*there is no device "gpu7"; there are gpu0, gpu1'):
            await machine.kill_device("gpu7")


@pytest.mark.usefixtures("patient")
async def test_what_only_this_process_has_registered() -> None:
    """Devices are processes of their own: the error says so, here and in a program that has attached; of other names it says nothing."""
    async with hmmnet.launch("two-gpus", rate=1.0, name="own") as machine, hmmnet.attach("own") as attached:
        for process in (await machine.process(), await attached.process()):
            with offered(POLICIES, "mine", Demand), pytest.raises(KernelError) as caught:
                await process.launch("reduction", "gpu0", "mine", a=0, n=1)
            there = 'no placement is called "mine"; there are demand, demand-2m, remote'
            mend = "it is registered in this process, and the device is another one: offer it through the entry point group"
            assert str(caught.value) == f'launch: EINVAL: {there}; {mend} "hmmnet.policies"'
            with offered(KERNELS, "mine", print), pytest.raises(KernelError, match=f'ENOENT: no kernel .*; {mend} "hmmnet.kernels"'):
                await process.launch("mine", "gpu0")
            with pytest.raises(KernelError) as caught:
                await process.launch("reduction", "gpu0", "mine", a=0, n=1)
            assert str(caught.value) == f"launch: EINVAL: {there}"


async def test_a_killed_zygote_ends_the_block() -> None:
    """All devices are gone with it: said as what it is."""
    with pytest.raises(HmmnetError, match="zygote is gone"):
        async with hmmnet.launch("two-gpus", rate=1.0) as machine:
            pids = [device.pid for device in machine.devices]
            os.kill(int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
            await trio.sleep_forever()
    await gone(*pids)


async def test_inside_trio_the_plain_form_is_refused() -> None:
    """It would block the loop."""
    with pytest.raises(HmmnetError, match="async with"), hmmnet.launch("two-gpus", rate=1.0):
        pytest.fail("entered")


PROGRAM = """
import hmmnet, sys, time
with hmmnet.launch("two-gpus", rate=1.0) as machine:
    print(*[device.pid for device in machine.devices], flush=True)
    {then}
"""


def program(then: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM.format(then=then)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def pids_of(process: subprocess.Popen[bytes]) -> list[int]:
    assert process.stdout is not None
    return [int(word) for word in process.stdout.readline().split()]


def test_nothing_survives_a_killed_program(base: Path) -> None:
    """SIGKILL leaves it no chance; what remains is a stale folder."""
    with program("time.sleep(60)") as process:
        pids = pids_of(process)
        assert len(pids) == 2
        process.kill()
        trio.run(gone, *pids)
    stale = list(directories())
    assert [directory.alive() for directory in stale] == [False]
    for directory in stale:
        directory.remove()


def test_ctrl_c_in_a_program_ends_its_machine() -> None:
    """KeyboardInterrupt in the program, no device left, within a second."""
    with program("machine.process().pid; time.sleep(60)") as process:
        pids = pids_of(process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=BOUND_S)
        assert b"KeyboardInterrupt" in err
        assert process.returncode == -signal.SIGINT
    trio.run(gone, *pids)


def test_a_program_that_never_leaves_the_block_ends_cleanly() -> None:
    """A notebook keeps the machine in a variable; when its interpreter ends, so does the machine."""
    text = "import hmmnet; m = hmmnet.launch('two-gpus', rate=1.0).__enter__(); print(*[d.pid for d in m.devices], flush=True)"
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        pids = pids_of(process)
        _, err = process.communicate(timeout=BOUND_S)
        assert (process.returncode, err) == (0, b"")
    trio.run(gone, *pids)


async def test_a_dead_device_comes_back_empty() -> None:
    """A new process, a new life: what was only there is lost, and says so; it serves again at once."""
    async with hmmnet.launch("two-gpus", rate=1.0) as machine:
        process = await machine.process()
        address = await process.malloc(PAGE_SIZE)
        await process.write(address, bytes(PAGE_SIZE))
        await process.migrate(address, PAGE_SIZE, "gpu0")
        with pytest.raises(KernelError, match=r"EBUSY.*gpu0 runs already, as process"):
            await machine.start_device("gpu0")
        await machine.kill_device("gpu0")
        assert set(machine.running) == {"gpu1"}
        with pytest.raises(KernelError, match=r"ESRCH.*gpu0 does not run"):
            machine.pause_device("gpu0")
        await machine.start_device("gpu0")
        assert set(machine.running) == {"gpu0", "gpu1"}
        assert [device.state for device in machine.devices] == ["ready", "ready"]
        with pytest.raises(BusError, match='only copy on device "gpu0"'):
            await process.load(address)
        assert await add(process, "gpu0")
        assert (await machine.report())["devices"]["gpu0"]["lives"] == 2
        await process.exit()


@pytest.mark.usefixtures("patient")
async def test_a_device_that_is_paused_for_less_than_its_lease_is_waited_for() -> None:
    """Nothing happened."""
    async with hmmnet.launch("two-gpus", rate=1.0) as machine:
        process = await machine.process()
        address = await process.malloc(PAGE_SIZE)
        await process.write(address, b"a" * PAGE_SIZE)
        await process.migrate(address, PAGE_SIZE, "gpu0")
        machine.pause_device("gpu0")
        async with trio.open_nursery() as nursery:

            async def wake() -> None:
                await trio.sleep(0.3)
                machine.resume_device("gpu0")

            nursery.start_soon(wake)
            assert await process.read(address, 1) == b"a"
        assert machine.running == ("gpu0", "gpu1")
        await process.exit()


async def test_a_device_that_is_paused_for_longer_is_lost() -> None:
    """It is fenced, lost with what it had, and a new life takes its place."""
    async with hmmnet.launch("two-gpus", rate=1.0) as machine:
        process = await machine.process()
        address = await process.malloc(PAGE_SIZE)
        await process.write(address, b"a" * PAGE_SIZE)
        await process.migrate(address, PAGE_SIZE, "gpu0")
        machine.pause_device("gpu0")
        with pytest.raises((BusError, PeerLost)), trio.fail_after(BOUND_S):
            await process.read(address, 1)
        await machine.kill_device("gpu0")
        await machine.start_device("gpu0")
        assert await add(process, "gpu0")
        await process.exit()


async def test_a_cancelled_job_ends_on_the_device() -> None:
    """A walk along a list that is a ring: when nobody waits for it any more, the device has no job, and takes the next."""
    async with hmmnet.launch("two-gpus", rate=1.0) as machine:
        process = await machine.process()
        ring = await process.malloc(128)
        await process.store(ring, ring + 64)
        await process.store(ring + 64, ring + 64)
        with trio.move_on_after(0.2) as waited:
            await process.launch("list_walk", "gpu0", heads=ring, n=1, out=ring + 8)
        assert waited.cancelled_caught
        with trio.fail_after(BOUND_S):  # two samples of telemetry
            while (await machine.report())["devices"]["gpu0"]["telemetry"].get("jobs_finished") != 1:
                await trio.sleep(0.05)
        assert await add(process, "gpu0")


async def test_memory_comes_from_the_node_that_is_asked_for() -> None:
    """A process's from the node it was made on, at home again too; what a job touches first from the node beside its device."""

    async def owners(process: Process, address: int) -> list[str]:
        residency = await process.residency(address, 4)
        return [residency.owners[i] for i in residency.pages.tolist()]

    async with hmmnet.launch("mi300a-4", rate=1.0) as machine:
        machine.set_rate(0.5)
        assert machine.rate == 0.5
        with pytest.raises(HmmnetError, match='no host memory is called "node4"; there are node0, node1, node2, node3'):
            await machine.create_process("node4")
        for node in ("node0", "node2"):
            process = await machine.create_process(node)
            address = await process.malloc(4 * PAGE_SIZE)
            await process.write(address, bytes(4 * PAGE_SIZE))
            assert await owners(process, address) == [node] * 4
            assert await process.migrate(address, 4 * PAGE_SIZE, "apu1") == 4 * PAGE_SIZE
            assert await owners(process, address) == ["apu1"] * 4
            assert await process.read(address, 1) == b"\0"
            await process.migrate(address, 4 * PAGE_SIZE, "host")
            assert await owners(process, address) == [node] * 4
        out = await process.malloc(4 * PAGE_SIZE)
        count = 4 * PAGE_SIZE // 8
        await process.launch("vector_add", "apu1", placement="remote", a=address, b=address, out=out, n=count)
        assert await owners(process, out) == ["node1"] * 4
        child = await process.fork()
        own = await child.malloc(4 * PAGE_SIZE)
        await child.write(own, bytes(4 * PAGE_SIZE))
        assert await owners(child, own) == ["node2"] * 4
