"""Rounds of harm on real processes; the oracle is the history of every word, and the process table.

::

    actors in this process --- host --- (ring, or TCP over a cable that is cut and spoilt) --- devices: SIGKILL, SIGSTOP

The long run is ``hmmnet campaign --world real --rounds 500``, with ``--cables`` and without.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import trio

from hmmnet.campaign import real
from hmmnet.campaign.crew import Crew
from hmmnet.campaign.real import Summary, run_rounds
from hmmnet.host.process import Process
from hmmnet.launcher.directory import process_started
from hmmnet.machine import LaunchedMachine
from hmmnet.pages import PAGE_SIZE


async def test_killed_and_stopped_devices_lose_nothing_else() -> None:
    """Six rounds: work went on, nothing is wrong, nothing is left behind."""
    with trio.fail_after(100):
        summary = await run_rounds(3, 6)
    assert summary.violations == []
    assert (summary.seeds, summary.rounds, summary.processes_left) == (1, 6, 0)
    assert summary.operations > 6
    assert sum(summary.faults.values()) == 6


def test_spoilt_cables_lose_nothing_else() -> None:
    """Six rounds behind cables, as the command runs them: in a network namespace of its own."""
    command = [sys.executable, "-m", "hmmnet", "campaign", "--world", "real", "--rounds", "6", "--seeds", "5", "--cables", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert (told["seeds"], told["rounds"], told["violations"], told["processes_left"]) == (1, 6, [], 0)
    assert "6 of 6 rounds" in done.stderr


async def test_a_lost_store_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkers look: with stores that are acknowledged and not done, a history is impossible."""

    async def forget(self: Crew, who: str, region: Any, first: int, count: int, serial: int) -> None:
        async def put(address: int, values: Any) -> None:
            await trio.lowlevel.checkpoint()

        await self.store(who, region, first, self.values(serial, first, count), put)

    monkeypatch.setattr(Crew, "cpu_store", forget)
    with trio.fail_after(100):
        summary = await run_rounds(3, 1)
    assert {violation["checker"] for violation in summary.violations} >= {"history"}


async def test_pages_that_die_are_counted_and_every_incarnation_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device dies with the only copy of a page, and is started again: one page is lost; zygote and all lives are looked for."""
    lives: list[str] = []
    looked_for: list[int] = []

    async def rest(_crew: Crew, _actor: int, enough: trio.Event) -> None:
        await enough.wait()

    async def take_and_die(machine: LaunchedMachine, crew: Crew, random: Any, _rounds: int, _summary: Summary) -> None:
        lives.extend(machine.device_names)
        lives.append(device := machine.device_names[0])
        await crew.cpu_store("a page", crew.regions[0], 0, 8, 1)
        await crew.process.migrate(crew.regions[0].base, PAGE_SIZE, device)
        await real._kill(machine, crew, device, random)

    left = real._left

    async def remembered(processes: Any) -> list[int]:
        looked_for.extend(processes)
        assert all(processes.values())
        return await left(processes)

    monkeypatch.setattr(real, "_act", rest)
    monkeypatch.setattr(real, "_nemesis", take_and_die)
    monkeypatch.setattr(real, "_left", remembered)
    with trio.fail_after(100):
        summary = await run_rounds(3, 1)
    assert summary.violations == []
    assert summary.as_json()["lost_pages"] == 1
    assert len(set(looked_for)) == len(lives) + 1


async def test_a_frame_of_the_host_that_stays_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody keeps a page of the process that has ended: the host's books say so, devices' processes or not."""
    leave = Process.exit

    async def rest(_crew: Crew, _actor: int, enough: trio.Event) -> None:
        await enough.wait()

    async def do_nothing(*_: Any) -> None:
        await trio.lowlevel.checkpoint()

    async def hold_and_leave(process: Process) -> None:
        await process.get_user_pages(await process.mmap(PAGE_SIZE), 1, write=True)
        await leave(process)

    monkeypatch.setattr(real, "_act", rest)
    monkeypatch.setattr(real, "_nemesis", do_nothing)
    monkeypatch.setattr(Process, "exit", hold_and_leave)
    with trio.fail_after(100):
        summary = await run_rounds(3, 1)
    assert [one["what"].partition(": ")[2] for one in summary.violations if one["checker"] == "leaks"] == ["node0: 1 frames are left over"]


async def test_a_process_that_stays_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By pid and start: a process that was given the number later is another."""
    monkeypatch.setattr(real, "GONE_S", 0.1)
    with subprocess.Popen(["/bin/sleep", "60"]) as child:
        started = process_started(child.pid)
        assert await real._left({child.pid: started}) == [child.pid]
        assert await real._left({child.pid: started - 1}) == []
        child.kill()
    assert await real._left({child.pid: started}) == []


async def test_only_rounds_that_were_done_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third round breaks: two are told, and what was done in them; the crash is a violation."""
    done: list[str] = []

    async def break_in_the_third(machine: LaunchedMachine, crew: Crew, device: str, random: Any) -> str:
        if len(done) == 2:
            raise KeyError("planted")
        done.append(device)
        return "nothing"

    monkeypatch.setattr(real, "_kill", break_in_the_third)
    monkeypatch.setattr(real, "_stop", break_in_the_third)
    with trio.fail_after(100):
        summary = await run_rounds(3, 6)
    assert (summary.seeds, summary.rounds, summary.faults["nothing"], summary.processes_left) == (1, 2, 2, 0)
    assert [one["checker"] for one in summary.violations] == ["crash"]
    assert "KeyError: 'planted'" in summary.violations[0]["what"]
