"""Zygote and client against each other, with children that are no devices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from hmmnet.devices.zygote import CRASHED
from hmmnet.errors import HmmnetError
from hmmnet.launcher import zygote as launcher
from hmmnet.launcher.zygote import Exited, Started, Told, ZygoteClient
from hmmnet.lifeline import wait_ended

BOUND_S = 30
"""A hang, and no slow computer. Shorter than what has to be ended would live by itself."""
FAKE = (sys.executable, str(Path(__file__).with_name("fake_zygote.py")))
NOTHING_THERE = (sys.executable, "-c", "raise SystemExit(3)")


class Heard:
    """What the zygote told, and a way to wait for the next word about a device."""

    def __init__(self) -> None:
        self.all: list[Told] = []
        self._changed = trio.Event()

    def tell(self, told: Told) -> None:
        self.all.append(told)
        self._changed.set()
        self._changed = trio.Event()

    async def first(self, kind: type[Told], name: str) -> Told:
        with trio.fail_after(BOUND_S):
            while True:
                for told in self.all:
                    if isinstance(told, kind) and told.name == name:
                        return told
                await self._changed.wait()


@asynccontextmanager
async def zygote(heard: Heard) -> AsyncIterator[ZygoteClient]:
    client = ZygoteClient(FAKE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run, heard.tell)
        await client.wait_ready()
        try:
            yield client
        finally:
            await client.end(0.2)
    assert client.process.returncode is not None


async def gone(pid: int) -> None:
    """Return when a process that is not our child has ended."""
    with trio.fail_after(BOUND_S):
        await wait_ended(pid)


async def test_a_child_is_forked_and_its_end_reported() -> None:
    """Start answers with the pid; exit codes come back as they are."""
    heard = Heard()
    async with zygote(heard) as client:
        await client.start("gpu0", {"exit": 7})
        started = await heard.first(Started, "gpu0")
        exited = await heard.first(Exited, "gpu0")
        assert isinstance(exited, Exited)
        assert (exited.pid, exited.status, exited.how) == (started.pid, 7, "ended with exit code 7")


async def test_a_child_that_raises_exits_as_crashed_and_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    """The traceback stands on stderr, the zygote lives on."""
    heard = Heard()
    async with zygote(heard) as client:
        await client.start("gpu0", {"raise": "no memory on the board"})
        exited = await heard.first(Exited, "gpu0")
        assert isinstance(exited, Exited)
        assert exited.status == CRASHED
        await client.start("gpu1", {"exit": 0})
        await heard.first(Exited, "gpu1")
    assert "no memory on the board" in capfd.readouterr().err


async def test_top_tells_a_machines_processes_apart() -> None:
    """By the name of the process, which for each would else be the interpreter's."""
    heard = Heard()
    async with zygote(heard) as client:
        await client.start("gpu0", {"sleep_s": 60})
        started = await heard.first(Started, "gpu0")
        names = [Path(f"/proc/{pid}/comm") for pid in (client.process.pid, started.pid)]
        with trio.fail_after(BOUND_S):
            while [name.read_text() for name in names] != ["hmmnet zygote\n", "hmmnet gpu0\n"]:
                await trio.sleep(0.01)


async def test_kill_is_reported_as_the_signal() -> None:
    """A device killed with SIGKILL says so."""
    heard = Heard()
    async with zygote(heard) as client:
        await client.start("gpu0", {"sleep_s": 60})
        await heard.first(Started, "gpu0")
        await client.kill("gpu0")
        exited = await heard.first(Exited, "gpu0")
        assert isinstance(exited, Exited)
        assert exited.how == "killed by SIGKILL"


async def test_all_ends_have_been_told_when_the_end_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of those that are killed at the very end, however many, and though whoever hears of them had no turn before the zygote ended."""

    async def end_process(process: subprocess.Popen[bytes], grace_s: float) -> int:
        return process.wait(grace_s + 10)  # nobody has a turn meanwhile: that is the point

    monkeypatch.setattr(launcher, "end_process", end_process)
    names = [f"gpu{number}" for number in range(8)]
    heard = Heard()
    async with zygote(heard) as client:
        for name in names:
            await client.start(name, {"sleep_s": 60})
            await heard.first(Started, name)
        await client.end(0.2)
        assert sorted(told.name for told in heard.all if isinstance(told, Exited)) == names


async def test_a_zygote_that_is_gone_has_ended() -> None:
    """Its end of the socket closes first: it is waited for, however busy the computer is, so that how it ended can be said."""
    lingers = f"import os, time; os.close(0); time.sleep({2 * launcher.KILL_S}); raise SystemExit(3)"
    client = ZygoteClient((sys.executable, "-c", lingers))
    with trio.fail_after(BOUND_S):
        await client.run(Heard().tell)
    assert client.gone.is_set()
    assert client.how() == "ended with exit code 3"
    await client.end(0.1)


async def test_a_child_keeps_nothing_of_the_zygote(tmp_path: Path) -> None:
    """No control socket, no sibling's pidfd, no thread: stdin is empty, only the standard descriptors are open."""
    heard = Heard()
    async with zygote(heard) as client:
        for i in range(3):
            await client.start(f"idle{i}", {"sleep_s": 60})
        report = tmp_path / "report"
        await client.start("gpu0", {"file": str(report), "exit": 0})
        exited = await heard.first(Exited, "gpu0")
        pid, stdin, descriptors, threads = report.read_text().split()
        assert int(pid) == exited.pid
        assert stdin == os.devnull
        assert int(descriptors) <= 5  # standard ones, the report, and the listing itself
        assert threads == "1"


async def test_children_that_do_not_end_are_killed_after_the_grace() -> None:
    """`end` is over soon after the grace, whatever the children do."""
    heard = Heard()
    with trio.fail_after(BOUND_S):
        async with zygote(heard) as client:
            for i in range(8):
                await client.start(f"gpu{i}", {"sleep_s": 60})
            pids = [(await heard.first(Started, f"gpu{i}")).pid for i in range(8)]
            began_s = trio.current_time()
        assert trio.current_time() - began_s < BOUND_S
        for pid in pids:
            await gone(pid)


async def test_a_killed_zygote_takes_its_children_along() -> None:
    """SIGKILL leaves the zygote no chance; the kernel ends the children."""
    heard = Heard()
    async with zygote(heard) as client:
        await client.start("gpu0", {"sleep_s": 60})
        pid = (await heard.first(Started, "gpu0")).pid
        client.process.kill()
        await gone(pid)
        with trio.fail_after(BOUND_S):
            await client.gone.wait()
        with pytest.raises(HmmnetError, match="zygote is gone"):
            while True:
                await client.start("gpu1", {})
                await trio.sleep(0.01)


async def test_a_killed_launcher_takes_zygote_and_children_along() -> None:
    """Whoever started the zygote is killed: nothing survives."""
    program = f"""
import trio
from hmmnet.launcher.zygote import ZygoteClient

async def main():
    def tell(told):
        print(client.process.pid, told.pid, flush=True)

    client = ZygoteClient({FAKE!r})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run, tell)
        await client.wait_ready()
        await client.start("gpu0", {{"sleep_s": 60}})

trio.run(main)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        line = await trio.to_thread.run_sync(launcher.stdout.readline)
        zygote_pid, child_pid = map(int, line.split())
        os.kill(launcher.pid, signal.SIGKILL)
        await gone(zygote_pid)
        await gone(child_pid)


async def test_a_zygote_that_cannot_start_is_an_error_that_says_so() -> None:
    """Not a hang, and not a traceback from deep inside."""
    client = ZygoteClient(NOTHING_THERE)
    with pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run, Heard().tell)
            await client.wait_ready()
    assert caught.group_contains(HmmnetError, match="did not start")
    await client.end(0.2)
