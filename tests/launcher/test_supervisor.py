"""A machine under its launcher, with a host and devices that only play theirs: who dies, and what then."""

from __future__ import annotations

import copy
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from hmmnet.errors import HmmnetError
from hmmnet.launcher import supervisor as module
from hmmnet.launcher.directory import Directory, MachineExists, MachineRecord, process_started
from hmmnet.launcher.supervisor import Supervisor
from hmmnet.lifeline import wait_ended
from hmmnet.topology.model import DeviceSpec, LinkSpec, MemoryNode, Topology

HERE = Path(__file__).parent
BOUND_S = 30
"""A hang, and no slow computer. Shorter than what has to be ended would live by itself."""
TOPOLOGY = Topology(
    "pair",
    "two devices",
    (MemoryNode("host", 1 << 30),),
    tuple(DeviceSpec(f"gpu{i}", "gpu", 1 << 26, node="host") for i in range(2)),
    (),
    tuple(LinkSpec(f"pcie{i}", "host", f"gpu{i}", "pcie", 16e9, 1e-6) for i in range(2)),
)


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hn-") as folder:
        monkeypatch.setenv("HMMNET_DIR", folder)
        yield Path(folder)


class Seen:
    """The records that were shown, and a way to wait for one."""

    def __init__(self) -> None:
        self.records: list[MachineRecord] = []
        self._changed = trio.Event()

    def show(self, record: MachineRecord) -> None:
        self.records.append(copy.deepcopy(record))
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, holds: Callable[[MachineRecord], bool]) -> MachineRecord:
        with trio.fail_after(BOUND_S):
            while not self.records or not holds(self.records[-1]):
                await self._changed.wait()
        return self.records[-1]


def made(name: str, seen: Seen, topology: Topology = TOPOLOGY) -> Supervisor:
    supervisor = Supervisor(topology, name, 1.0, "ipc", seen.show)
    supervisor.host_command = (sys.executable, str(HERE / "fake_host.py"))
    supervisor.zygote_command = (sys.executable, str(HERE / "fake_zygote.py"))
    return supervisor


@asynccontextmanager
async def held(name: str) -> AsyncIterator[tuple[Supervisor, Seen]]:
    seen = Seen()
    async with trio.open_nursery() as nursery:
        supervisor = made(name, seen)
        await nursery.start(supervisor.run)
        yield supervisor, seen
        nursery.cancel_scope.cancel()


async def gone(*pids: int) -> None:
    with trio.fail_after(BOUND_S):
        for pid in pids:
            await wait_ended(pid)


def pids_of(record: MachineRecord) -> list[int]:
    return [record.host_pid, *(device.pid for device in record.devices)]


async def test_a_machine_starts_shows_itself_and_leaves_nothing(base: Path) -> None:
    """Record on disk while it runs; no process and no file afterwards."""
    async with held("well") as (supervisor, _):
        on_disk = Directory.named("well").read()
        assert on_disk is not None
        assert on_disk.state == "running"
        assert on_disk.rate == 0.5
        assert on_disk.client_endpoint == "ipc:///nowhere/client"
        assert [(device.name, device.state) for device in on_disk.devices] == [("gpu0", "ready"), ("gpu1", "ready")]
        pids = [*pids_of(on_disk), supervisor.crew.zygote.process.pid]
        assert all(pid > 0 for pid in pids)
        with pytest.raises(MachineExists, match="runs already"):
            await made("well", Seen()).run()
        began_s = trio.current_time()
    assert trio.current_time() - began_s < BOUND_S
    await gone(*pids)
    assert list(base.iterdir()) == []


async def test_a_disk_that_is_full_at_the_second_signature_stops_no_machine(base: Path, full_at_the_second_signature: list[int]) -> None:
    """It signs again when it knows where its sockets are; who finds the folder without a record still learns whose it is."""
    async with held("well") as (supervisor, _):
        assert len(full_at_the_second_signature) == 2
        signed = Directory.named("well").signature()
        assert signed is not None
        assert (signed.pid, signed.process_started) == (os.getpid(), process_started(os.getpid()))
        assert supervisor.record.state == "running"
    assert list(base.iterdir()) == []


async def test_a_killed_device_is_shown_logged_and_told_to_the_host() -> None:
    """The machine goes on without it."""
    async with held("well") as (supervisor, seen):
        os.kill(seen.records[-1].devices[1].pid, signal.SIGKILL)
        record = await seen.until(lambda record: record.devices[1].state == "lost")
        assert record.devices[1].how == "killed by SIGKILL"
        assert record.state == "running"
        told = supervisor.directory.logs / "told"
        with trio.fail_after(BOUND_S):
            while "SIGKILL" not in told.read_text():
                await trio.sleep(0.01)
        assert told.read_text() == '{"exited":"gpu1","how":"killed by SIGKILL"}\n'
        assert "gpu1 is gone: killed by SIGKILL" in (supervisor.directory.logs / "launcher.jsonl").read_text()


async def test_a_device_that_the_host_loses_is_shown_as_lost_though_its_process_runs() -> None:
    """`hmmnet ps` says what programs find; the process's end is told beside the cause, when it comes."""
    async with held("loses") as (supervisor, seen):
        await supervisor.host.tell({"exited": "nobody", "how": ""})
        record = await seen.until(lambda record: record.devices[0].state == "lost")
        assert [(one.state, one.how) for one in record.devices] == [("lost", "gpu0 was silent"), ("ready", "")]
        assert not supervisor.crew.has_ended("gpu0")
        os.kill(record.devices[0].pid, signal.SIGKILL)
        record = await seen.until(lambda record: "SIGKILL" in record.devices[0].how)
        assert record.devices[0].how == "gpu0 was silent; its process: killed by SIGKILL"
        assert supervisor.crew.has_ended("gpu0")


async def test_a_killed_host_ends_the_machine_and_leaves_its_logs() -> None:
    """The record says why; a machine of that name can start again."""
    with pytest.raises(ExceptionGroup) as caught:
        async with held("well") as (_, seen):
            pids = pids_of(seen.records[-1])
            os.kill(pids[0], signal.SIGKILL)
            await trio.sleep_forever()
    assert caught.group_contains(HmmnetError, match="host process killed by SIGKILL", depth=None)
    await gone(*pids)
    directory = Directory.named("well")
    record = directory.read()
    assert record is not None
    assert (record.state, record.why) == ("failed", 'the host process killed by SIGKILL; "hmmnet logs well" tells more')
    assert not directory.alive()
    assert (directory.logs / "launcher.jsonl").exists()
    async with held("well"):
        pass


async def test_a_killed_zygote_ends_the_machine() -> None:
    """With every device, as they are its children."""
    with pytest.raises(ExceptionGroup) as caught:
        async with held("well") as (supervisor, seen):
            pids = pids_of(seen.records[-1])
            supervisor.crew.zygote.process.kill()
            await trio.sleep_forever()
    assert caught.group_contains(HmmnetError, match="zygote is gone .killed by SIGKILL.*hmmnet logs well", depth=None)
    await gone(*pids)


async def test_a_machine_without_devices_is_there_at_once() -> None:
    """It waits for nobody."""
    supervisor = made("well", Seen(), Topology("plain", "no device", TOPOLOGY.nodes, (), (), ()))
    async with trio.open_nursery() as nursery:
        with trio.fail_after(BOUND_S):
            record = await nursery.start(supervisor.run)
        assert (record.state, record.devices) == ("running", [])
        nursery.cancel_scope.cancel()


async def test_a_host_that_fails_at_once_is_an_error_and_no_wait() -> None:
    """Its exit code is said."""
    with pytest.raises(ExceptionGroup) as caught:
        async with held("fails"):
            pytest.fail("it cannot run")
    assert caught.group_contains(HmmnetError, match="ended with exit code 3", depth=None)


async def test_a_host_that_never_serves_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a bounded time."""
    monkeypatch.setattr(module, "START_S", 1.0)
    with pytest.raises(ExceptionGroup) as caught:
        async with held("mute"):
            pytest.fail("it cannot run")
    assert caught.group_contains(HmmnetError, match="did not begin to serve", depth=None)


async def test_a_host_that_does_not_end_is_killed() -> None:
    """Ending is bounded, whatever the host does."""
    async with held("stuck") as (_, seen):
        host_pid = seen.records[-1].host_pid
        began_s = trio.current_time()
    assert trio.current_time() - began_s < BOUND_S
    await gone(host_pid)


async def test_a_device_that_dies_before_the_machine_is_ready_is_an_error() -> None:
    """Named, with how it ended."""
    seen = Seen()
    supervisor = made("mute", seen)
    with pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.run)
            await seen.until(lambda record: record.host_pid > 0)
            nursery.start_soon(supervisor.crew.start, "ipc:///nowhere", os.getpid())
            record = await seen.until(lambda record: record.devices[0].pid > 0)
            os.kill(record.devices[0].pid, signal.SIGKILL)
    assert caught.group_contains(HmmnetError, match="gpu0 killed by SIGKILL before", depth=None)
