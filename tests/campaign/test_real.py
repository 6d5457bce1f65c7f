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

from hmmnet.campaign.crew import Crew
from hmmnet.campaign.real import run_rounds


async def test_killed_and_stopped_devices_lose_nothing_else() -> None:
    """Six rounds: work went on, nothing is wrong, nothing is left behind."""
    with trio.fail_after(100):
        summary = await run_rounds(3, 6)
    assert summary.violations == []
    assert (summary.rounds, summary.processes_left) == (6, 0)
    assert summary.operations > 6
    assert sum(summary.faults.values()) == 6


def test_spoilt_cables_lose_nothing_else() -> None:
    """Six rounds behind cables, as the command runs them: in a network namespace of its own."""
    command = [sys.executable, "-m", "hmmnet", "campaign", "--world", "real", "--rounds", "6", "--seeds", "5", "--cables", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert (told["rounds"], told["violations"], told["processes_left"]) == (6, [], 0)
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
