"""Faults in real processes: at points of host and devices, of nodes and links, by Python and from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import hmmnet
from hmmnet.errors import BusError, HmmnetError, KernelError, PeerError
from hmmnet.faults import fault
from hmmnet.machine import LaunchKind
from hmmnet.testing import outcomes

PAGE = 4096
COUNT = 1 << 12
BOUND_S = 60
"""A hang, and no slow computer."""


async def command(*words: str) -> str:
    """What a command prints; its errors, if it fails."""
    wide = {**os.environ, "COLUMNS": "160"}
    done = await trio.run_process([sys.executable, "-m", "hmmnet", *words], capture_stdout=True, capture_stderr=True, check=False, env=wide)
    return (done.stdout if done.returncode == 0 else done.stderr).decode()


async def test_points_of_both_sides_and_the_command_line() -> None:
    """A device refuses its jobs, the host an allocation; faults are listed and removed by other processes, and all is well again."""
    async with hmmnet.launch("two-gpus", rate=1.0) as machine:
        process = await machine.create_process()
        address = await process.malloc(COUNT * 8)
        await process.write(address, np.arange(COUNT, dtype="<u8"))

        async def total() -> object:
            return (await process.launch("reduction", "gpu0", "demand", a=address, n=COUNT, dtype="<u8")).results["sum"]

        usual = await total()
        assert await command("fault", "add", "point.fail", "gpu0", "point=device.job_start", "-m", machine.name) == (
            "fault 1: point.fail gpu0 point=device.job_start (to each, until `hmmnet fault rm 1`)\n"
        )
        with pytest.raises(KernelError, match="ENOMEM"):
            await total()
        number = machine.add_fault(fault("alloc.host"))
        with pytest.raises(KernelError, match="ENOMEM"):
            await process.write(await process.mmap(PAGE), b"x")
        slow = machine.add_fault("point.delay", on="gpu1", point="device.copy_in", jitter="250 us")
        assert await command("fault", "ls", "-m", machine.name) == (
            "      kind                 on               with\n"
            "   1  point.fail           gpu0             point=device.job_start (happened once)\n"
            f"   {number}  alloc.host           *                (happened once)\n"
            f"   {slow}  point.delay          gpu1             point=device.copy_in jitter=250us latency=1ms (has not happened)\n"
        )
        machine.remove_fault(slow)
        listed = await command("fault", "ls", "-m", machine.name)
        assert [line.split()[:2] for line in listed.splitlines()[1:]] == [["1", "point.fail"], [str(number), "alloc.host"]]
        assert "no fault has number 9" in await command("fault", "rm", "9", "-m", machine.name)
        assert await command("fault", "rm", "all", "-m", machine.name) == f"fault 1 has ended\nfault {number} has ended\n"
        assert await command("fault", "rm", "all", "-m", machine.name) == "no fault\n"
        assert await command("fault", "ls", "-m", machine.name) == "no fault\n"
        assert await command("fault", "ls", "--json", "-m", machine.name) == "[]\n"
        assert await total() == usual
        assert 'did you mean "point.fail"?' in await command("fault", "add", "point.fial", "-m", machine.name)
        assert "cannot be done in the real world" in await command("fault", "add", "restart.kept", "gpu0", "-m", machine.name)
        await process.exit()


@pytest.mark.usefixtures("patient")
async def test_a_device_hangs_and_dies_by_fault() -> None:
    """Shorter than the lease a hang is only slow; a device that dies in the middle of a copy leaves the source as it was."""
    async with hmmnet.launch("two-gpus", rate=1.0) as machine:
        process = await machine.create_process()
        address = await process.malloc(64 * PAGE)
        await process.write(address, b"data" * 16 * PAGE)
        await process.migrate(address, PAGE, "gpu1")
        machine.add_fault(fault("hang", "gpu1", lasts="300 ms"))
        began_s = time.monotonic()
        await process.migrate(address + PAGE, PAGE, "gpu1")  # passes protocol points of the device, at which it hangs
        assert time.monotonic() - began_s > 0.2
        assert await process.read(address, 4) == b"data"
        machine.add_fault(fault("point.crash", "gpu0", point="migrate.mid_copy"))
        with pytest.raises((PeerError, KernelError)):
            await process.migrate(address, 64 * PAGE, "gpu0")
        assert await process.read(address, 64 * PAGE) == b"data" * 16 * PAGE
        await process.migrate(address, 8 * PAGE, "gpu1")
        machine.add_fault(fault("crash", "gpu1"))
        with pytest.raises(BusError, match='only copy on device "gpu1"'):
            await process.read(address, PAGE)
        with pytest.raises(HmmnetError, match='no device is called "gpu7"'):
            machine.add_fault(fault("crash", "gpu7"))
        await process.exit()


async def back(machine: hmmnet.LaunchedMachine, device: str, pid: int) -> None:
    """Wait until another process is that device, and ready."""
    with trio.fail_after(BOUND_S):
        while True:
            figures = (await machine.report())["devices"][device]
            if figures["state"] == "ready" and figures["pid"] not in (0, pid):
                return
            await trio.sleep(0.02)


@pytest.mark.parametrize("kind", ["bounce", "reset"])
async def test_a_device_that_bounces_is_another_process(kind: str) -> None:
    """Its memory is gone, what was only there is SIGBUS, and it takes new work, under a new number; the count says once."""
    async with hmmnet.launch("two-gpus", rate=1.0) as machine:
        process = await machine.create_process()
        address = await process.malloc(64 * PAGE)
        await process.write(address, b"data" * 16 * PAGE)
        before = {device.name: device.pid for device in machine.devices}
        if kind == "bounce":
            await process.migrate(address, PAGE, "gpu0")
        machine.add_fault(fault(kind, "gpu0", down="200 ms", **({} if kind == "bounce" else {"times": 1})))
        if kind == "bounce":
            with pytest.raises(BusError):
                await process.read(address, PAGE)
        else:
            with pytest.raises((PeerError, KernelError)):
                await process.migrate(address, 64 * PAGE, "gpu0")
        await back(machine, "gpu0", before["gpu0"])
        await process.migrate(address + PAGE, PAGE, "gpu0")
        assert await process.read(address + PAGE, 4) == b"data"
        report = await machine.report()
        assert report["devices"]["gpu0"]["lives"] == 2
        assert report["devices"]["gpu1"]["pid"] == before["gpu1"]
        assert report["faults"] == {kind: 1}
        await process.exit()


async def test_what_happens_inside_a_device_is_counted() -> None:
    """The device tells the host of it."""
    async with hmmnet.launch("two-gpus", rate=1.0) as machine:
        process = await machine.create_process()
        address = await process.malloc(COUNT * 8)
        await process.write(address, np.arange(COUNT, dtype="<u8"))
        machine.add_fault(fault("point.fail", "gpu1", point="device.job_start", times=2))
        for _ in range(2):
            with pytest.raises(KernelError, match="ENOMEM"):
                await process.launch("reduction", "gpu1", "demand", a=address, n=COUNT, dtype="<u8")
        await process.launch("reduction", "gpu1", "demand", a=address, n=COUNT, dtype="<u8")
        assert (await machine.report())["faults"] == {"point.fail": 2}
        await process.exit()


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hn-") as folder:
        monkeypatch.setenv("HMMNET_DIR", folder)
        yield Path(folder)


@asynccontextmanager
async def up(*words: str) -> AsyncIterator[trio.Process]:
    """``hmmnet up`` while the block runs."""
    command = [sys.executable, "-m", "hmmnet", "up", "--rate", "1", *words]
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(partial(trio.run_process, command, check=False, stdout=subprocess.PIPE))
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)


async def test_a_plan_on_a_machine_that_is_up(place: Path) -> None:
    """A device bounces by the plan, once all are there; the record and the last line count it."""
    plan = place / "plan.toml"
    plan.write_text('[[fault]]\nkind = "bounce"\non = "gpu1"\ndown = "100 ms"\n\n[[fault]]\nkind = "alloc.host"\nnth = 1000000\n')
    counted = {"bounce": 1, "alloc.host": 0}
    printed = b""
    async with up("--name", "broken", "--faults", str(plan)) as process:
        assert process.stdout is not None
        with trio.fail_after(BOUND_S):
            while printed.count(b"gpu1 ready") < 2:
                data = await process.stdout.receive_some()
                assert data, printed.decode()
                printed += data
            record: dict[str, Any] = {}
            while record.get("faults") != counted:
                record = json.loads((place / "broken" / "machine.json").read_text())
                await trio.sleep(0.05)
            assert "no fault has number" in await command("fault", "rm", "1", "-m", "broken")
            process.send_signal(signal.SIGINT)
            async for data in process.stdout:
                printed += data
    assert b"gpu1 lost: killed by SIGKILL" in printed
    assert printed.decode().splitlines()[-1] == 'machine "broken" has ended; faults: bounce 1, alloc.host 0'


async def test_a_plan_that_is_in_vain_on_a_machine_that_is_up(place: Path) -> None:
    """The machine ends, and says which line of the plan it is; in the background, too."""
    plan = place / "plan.toml"
    plan.write_text('[[fault]]\nkind = "loss"\nprobability = 0.01\n\n[[fault]]\nkind = "process.exit"\nprocess = 4242\n')
    says = f"{plan}:5: fault 2: there is no process 4242; those that run are none; have it begin later, with after=TIME, or at a point"
    for how in ((), ("--detach",)):
        words = [sys.executable, "-m", "hmmnet", "up", "--rate", "1", "--name", "vain", "--faults", str(plan), *how]
        with trio.fail_after(BOUND_S):
            ended = await trio.run_process(words, check=False, capture_stdout=True, capture_stderr=True)
        assert ended.returncode, ended
        assert says in ended.stderr.decode()


def stopped(stat: Path) -> bool:
    """Whether a process is held by SIGSTOP."""
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.usefixtures("patient")
async def test_toxics_and_verbs_on_a_running_machine() -> None:
    """Targets are slow, held, down and gone by a word each; what real processes cannot do is refused, and nothing of that line stays."""
    async with hmmnet.launch("two-gpus", rate=1.0) as machine:

        async def said(*words: str) -> str:
            return await command("fault", *words, "-m", machine.name)

        process = await machine.create_process()
        address = await process.malloc(4 * PAGE)
        await process.write(address, b"data" * PAGE)

        async def there_and_back_s() -> float:
            began_s = time.monotonic()
            await process.migrate(address, 4 * PAGE, "gpu0")
            assert await process.read(address, 4 * PAGE) == b"data" * PAGE
            return time.monotonic() - began_s

        delayed = await said("add", "gpu0<->host", "latency=150ms", "jitter=1ms")
        assert delayed == "fault 1: link.latency gpu0<->host latency=150ms jitter=1ms (to each, until `hmmnet fault rm 1`)\n"
        assert await there_and_back_s() > 0.29
        assert await said("rm", "1") == "fault 1 has ended\n"
        assert await said("add", "gpu0<->host", "loss=5%", "duplicate=20%") == (
            "fault 2: loss gpu0<->host probability=0.05\nfault 3: duplicate gpu0<->host probability=0.2\n"
        )
        with trio.fail_after(BOUND_S):
            while min((await machine.report())["faults"].values()) == 0:
                await there_and_back_s()
        assert await said("rm", "all") == "fault 2 has ended\nfault 3 has ended\n"
        assert await said("ls") == await said("rm", "all") == "no fault\n"
        assert await said("ls", "--json") == "[]\n"
        wrong = await said("add", "alloc.device", "gpu9")
        assert 'fault alloc.device: no device is called "gpu9"; did you mean "gpu' in wrong
        assert "HmmnetError" not in wrong, "a sentence, without the path that it took"
        assert 'nothing here is called "gpu7"' in await said("hold", "gpu7")
        assert "end its process instead" in await said("crash", "host")
        stat = Path(f"/proc/{machine.devices[0].pid}/stat")
        held = await said("hold", "gpu0")
        assert held.endswith("hang gpu0 (until `hmmnet fault release gpu0`)\n")
        with trio.fail_after(BOUND_S):
            while not stopped(stat):  # it gets its signal when it is scheduled
                await trio.sleep(0.01)
        assert await said("release", "gpu0") == f"{held.partition(':')[0]} has ended\n"
        assert not stopped(stat)
        assert "nothing to release at gpu0" in await said("release", "gpu0")
        before = {device.name: device.pid for device in machine.devices}
        assert "bounce gpu1 down=10ms" in await said("bounce", "gpu1", "--down", "10ms")
        await back(machine, "gpu1", before["gpu1"])
        assert (await said("crash", "gpu1")).endswith("crash gpu1\n")
        with trio.fail_after(BOUND_S):
            while "gpu1" in machine.running:
                await trio.sleep(0.02)
        for verb in ("crash", "hold"):
            assert "gpu1 does not run: " in await said(verb, "gpu1")
        assert "it starts again at once" in await said("bounce", "gpu1")
        await back(machine, "gpu1", 0)
        await process.exit()


@pytest.mark.parametrize(
    ("kind", "transport"),
    [
        ("loss", "tcp"),
        ("delay", "ring"),
        ("reorder", "ring"),
        ("duplicate", "ring"),
        ("corrupt", "ring"),
        ("corrupt", "ipc"),
        ("invalidate.lost", "ring"),
        ("ack.lost", "ring"),
    ],
)
async def test_messages_between_processes_suffer(kind: str, transport: LaunchKind) -> None:
    """One in ten: jobs, migrations and CPU accesses come out right, whatever carries the data."""
    async with hmmnet.launch("two-gpus", rate=1.0, transport=transport) as machine:
        process = await machine.create_process()
        a, out = await process.malloc(COUNT * 8), await process.malloc(COUNT * 8)
        values = np.arange(COUNT, dtype="<f8")
        await process.write(a, values)
        number = machine.add_fault(fault(kind, probability=0.1))
        devices = cycle(("gpu0", "gpu1"))
        with trio.fail_after(BOUND_S):
            while not (await machine.report())["faults"][kind]:
                device = next(devices)
                await process.launch("vector_add", device, a=a, b=a, out=out, n=COUNT)
                assert np.array_equal(await process.read_array(out, "<f8", COUNT), 2 * values)
                await process.write(a, values)
        machine.remove_fault(number)
        await process.exit()
        assert (await machine.check())["complaints"] == []


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(("kind", "on"), [("partition", "gpu0<->host"), ("partition", "gpu0->host"), ("hold", "host->gpu0")])
async def test_a_wire_that_is_cut_for_less_than_a_lease(kind: str, on: str) -> None:
    """Nothing passes, and then all goes on as if nothing had been."""
    async with hmmnet.launch("two-gpus", rate=1.0) as machine:
        process = await machine.create_process()
        address = await process.malloc(COUNT * 8)
        values = np.arange(COUNT, dtype="<u8")
        await process.write(address, values)
        number = machine.add_fault(fault(kind, on=on))
        done: list[object] = []

        async def run() -> None:
            done.append((await process.launch("reduction", "gpu0", "demand", a=address, n=COUNT, dtype="<u8")).results["sum"])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.sleep(0.5)
            assert done == []
            machine.remove_fault(number)
        assert done == [int(values.sum())]
        assert machine.running == ("gpu0", "gpu1")
        await process.exit()


async def test_a_wire_that_is_cut_for_longer_than_a_lease() -> None:
    """As if the device had died: pages that only it had are SIGBUS that names it; the other device goes on."""
    async with hmmnet.launch("two-gpus", rate=1.0) as machine:
        process = await machine.create_process()
        lost, kept = await process.malloc(PAGE), await process.malloc(PAGE)
        for address, device in ((lost, "gpu0"), (kept, "gpu1")):
            await process.write(address, b"data")
            await process.migrate(address, PAGE, device)
        machine.add_fault(fault("partition", on="gpu0<->host"))
        with trio.fail_after(BOUND_S), pytest.raises(BusError, match='only copy on device "gpu0"'):
            await process.read(lost, 4)
        assert await process.read(kept, 4) == b"data"
        assert [(one.state, one.how.partition(" for")[0]) for one in machine.devices] == [("lost", "gpu0 was silent"), ("ready", "")]
        await process.exit()


async def test_a_fault_costs_what_it_does_in_a_simulation() -> None:
    """The plugin's example, on processes: a device that bounces is back at once, however slow the machine's clock."""
    async with hmmnet.launch("two-gpus", rate=0.002) as machine:
        process = await machine.process()
        kept, gone = await process.malloc(2 * PAGE), await process.malloc(2 * PAGE)
        await process.write(gone, b"x" * 2 * PAGE)
        await process.migrate(gone, 2 * PAGE, "gpu0")
        async with outcomes.preserved(process, kept, 2 * PAGE), outcomes.within(machine, 0.05):
            machine.add_fault("bounce", on="gpu0")
            await outcomes.lost(process, gone, 2 * PAGE, "gpu0")
            await outcomes.usable(machine, "gpu0")
        await outcomes.sound(machine)


async def test_a_device_and_a_process_are_taken_out_by_command() -> None:
    """Pages are home when the device has gone, whose process ends; who holds a page is named; the larger of two processes is killed."""
    async with hmmnet.launch("two-gpus", rate=1.0) as machine:
        small, large = [await machine.create_process() for _ in range(2)]
        values = np.arange(COUNT, dtype="<u8")
        address = await large.malloc(COUNT * 8)
        await large.write(address, values)
        assert await large.migrate(address, COUNT * 8, "gpu0") == COUNT * 8
        assert await command("fault", "unplug", "gpu0", "-m", machine.name) == "gpu0 is unplugged\n"
        again = await command("fault", "unplug", "gpu0", "-m", machine.name)
        assert "gpu0 does not run: it was unplugged; `hmmnet fault bounce gpu0` starts it again" in again
        assert (await large.read_array(address, "<u8", COUNT) == values).all()
        assert (await machine.report())["devices"]["gpu0"]["pages_used"] == 0
        with trio.fail_after(BOUND_S):
            while next(record.state for record in machine.devices if record.name == "gpu0") != "unplugged":
                await trio.sleep(0.02)
        assert "unplugged" in await command("ps", machine.name)
        assert (await command("fault", "bounce", "gpu0", "--down", "10ms", "-m", machine.name)).startswith("fault 1: bounce gpu0")
        with trio.fail_after(BOUND_S):
            while next(record.state for record in machine.devices if record.name == "gpu0") != "ready":
                await trio.sleep(0.02)
        assert await command("fault", "oom", "-m", machine.name) == f"process {large.pid} is killed\n"
        with pytest.raises(KernelError, match="ESRCH"):
            await large.read(address, 8)
        await small.set_oom_score_adj(-1000)
        assert "none of 1 processes may be killed" in await command("fault", "oom", "-m", machine.name)
