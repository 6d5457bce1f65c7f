"""How self-tests are played: what fails, is skipped, hangs or breaks the machine is told, and the next one is played all the same."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from hmmnet.errors import KernelError, PeerLost
from hmmnet.program import Process
from hmmnet.selftest import case, runner
from hmmnet.selftest.case import CheckFailed, Ground, Skipped, equal, refused, same
from hmmnet.selftest.runner import Case, Outcome, run_all
from tests.logged_calls import LoggedCalls


class Machine:
    """Processes that note what they are asked."""

    def __init__(self) -> None:
        self.processes: list[LoggedCalls] = []

    async def create_process(self) -> Process:
        self.processes.append(LoggedCalls(len(self.processes)))
        return self.processes[-1]  # type: ignore[return-value] # only what the tests of this file use

    def device_of_unit(self, unit: int) -> str:
        return f"dm{unit}"


async def good(ground: Ground) -> None:
    ground.notes.append(" ".join(ground.devices))


async def bad(_: Ground) -> None:
    equal("answer", 1, 2)


async def lacking(_: Ground) -> None:
    raise Skipped("no such memory here")


async def kernel(_: Ground) -> None:
    raise KernelError(errno.ENOMEM, "mmap", "used up")


async def nursery(_: Ground) -> None:
    async with trio.open_nursery() as inner:
        inner.start_soon(bad, _)


async def breaks(_: Ground) -> None:
    raise PeerLost("dm0 was silent")


async def hangs(_: Ground) -> None:
    await trio.sleep_forever()


async def test_every_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its cause; each process exits; after a hang and after a loss the next case is played on a new machine."""
    tests = {test.__name__: test for test in (good, bad, lacking, kernel, nursery, breaks, hangs)}
    monkeypatch.setattr(runner, "TESTS", {**tests, "last": good})
    monkeypatch.setattr(runner, "LIMIT_S", 0.05)
    machines: list[Machine] = []
    seen: list[Outcome] = []

    @asynccontextmanager
    async def world() -> AsyncIterator[Machine]:
        machines.append(Machine())
        yield machines[-1]

    outcomes = await run_all([Case(name, "coherent") for name in (*tests, "last")], seen.append, world)
    assert outcomes == seen
    assert [(o.case.name, o.result, o.why) for o in outcomes] == [
        ("good", "pass", ""),
        ("bad", "fail", "answer: 1, expected 2"),
        ("lacking", "skip", "no such memory here"),
        ("kernel", "fail", "KernelError: mmap: ENOMEM: used up"),
        ("nursery", "fail", "answer: 1, expected 2"),
        ("breaks", "fail", "the machine broke: dm0 was silent"),
        ("hangs", "fail", "it took longer than 0.05 s"),
        ("last", "pass", ""),
    ]
    assert outcomes[0].notes == ["dm2 dm3"]
    assert [len(machine.processes) for machine in machines] == [6, 1, 1]
    assert all(process.log == ["exit"] for machine in machines for process in machine.processes if process is not machines[1].processes[0])
    assert outcomes[1].as_json() == {"name": "bad", "kind": "coherent", "personality": "today", "result": "fail", "seconds": 0.0}


async def test_checks_say_what_was_wrong() -> None:
    """The first number that differs; the errno that came and the one that should have."""
    import numpy as np

    with pytest.raises(CheckFailed, match=r"the CPU found 9 at number 1, not 1 \(1 numbers differ\)"):
        same(np.array([0, 9], np.uint32), np.array([0, 1], np.uint32), "the CPU")
    with pytest.raises(CheckFailed, match="found 1 numbers, not 2"):
        same(np.array([0], np.uint32), np.array([0, 1], np.uint32), "the CPU")

    async def fails() -> None:
        raise KernelError(errno.EPERM, "write", "no")

    async def works() -> None:
        return

    await refused(errno.EPERM, fails(), "a store")
    with pytest.raises(CheckFailed, match="errno of a store: 'EPERM', expected 'EFAULT'"):
        await refused(errno.EFAULT, fails(), "a store")
    with pytest.raises(CheckFailed, match="a store succeeded, EFAULT was expected"):
        await refused(errno.EFAULT, works(), "a store")
    with pytest.raises(AssertionError, match="there twice"):
        case.selftest(case.TESTS["migrate"])


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "hmmnet", "selftest", *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_the_command() -> None:
    """Named tests, one kind or both, as lines or as JSON; wrong names have a suggestion."""
    done = command("migrate", "snapshot", "--json")
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert [(entry["name"], entry["kind"], entry["result"]) for entry in listed] == [
        (name, kind, "pass") for kind in ("private", "coherent") for name in ("migrate", "snapshot")
    ]
    assert set(listed[0]) == {"name", "kind", "personality", "result", "seconds"}
    done = command("double_map", "--kind", "coherent")
    assert done.returncode == 0
    assert "1 of 1 cases pass" in done.stdout
    assert "private" not in done.stdout
    done = command("exclusive", "anon_read", "--kind", "private", "--personality", "v25", "--json")
    assert done.returncode == 0, done.stderr
    assert [(entry["name"], entry["personality"], entry["result"]) for entry in json.loads(done.stdout)] == [
        ("anon_read", "v25", "pass"), ("exclusive", "v25", "skip"),
    ]  # fmt: skip
    assert "modern only" in done.stderr
    done = command("migrat_fault")
    assert done.returncode == 2
    assert 'did you mean "migrate_fault"' in done.stderr
    done = command("--list")
    assert sum(not line.startswith(" ") for line in done.stdout.splitlines()) == 39
