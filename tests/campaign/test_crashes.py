"""A handler of a message that crashes, at the host or in a device, is a violation, whoever else is to blame for what is refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from hmmnet import machine
from hmmnet.campaign import children, real
from hmmnet.campaign.crew import Crew, Outcome
from hmmnet.campaign.excuses import Excuses
from hmmnet.campaign.operations import launched
from hmmnet.campaign.program import Harm, Step
from hmmnet.campaign.real import run_rounds
from hmmnet.campaign.scenarios import SCENARIOS
from hmmnet.campaign.steps import do
from hmmnet.campaign.trial import run_program
from hmmnet.devices.models.base import Device
from hmmnet.errors import KernelError, PeerLost, is_crash
from hmmnet.host.requests import Requests
from hmmnet.launcher.zygote import ZygoteClient
from hmmnet.program import Process
from hmmnet.wire.crashes import listening, tell

FORK = Step(0, "fork", count=8, device=1, choice="sigkill", serial=1)
SPARES_DEV1 = 2
"""A seed whose first round does harm to another device than `FORK` uses: one that is killed meanwhile may not come to crash."""
HARMED = msgspec.structs.replace(SCENARIOS["tour"], harms=(Harm(5, "death", 0, 0.001),))


async def crash(*_: object) -> Any:
    """A handler with a bug."""
    raise KeyError(64)


def excuse_all(patch: pytest.MonkeyPatch) -> None:
    """Whatever is refused to an operation is excused."""
    patch.setattr(Excuses, "cover", lambda *_: True)


@pytest.mark.parametrize(("where", "what"), [(Requests, "range_fault"), (Device, "copy_out")])
def test_a_handler_that_crashes_is_a_violation(where: type, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the host and in a device, though all that is refused be excused: by message, type, text and place."""
    assert run_program(HARMED).violations == []
    excuse_all(monkeypatch)
    monkeypatch.setattr(where, what, crash)
    crashed = [one.what for one in run_program(HARMED).violations if one.checker == "crash"]
    assert crashed
    message = what.title().replace("_", "")
    for text in crashed:
        assert f" s: {message} of " in text
        assert "KeyError: 64 (test_crashes.py:" in text


async def test_a_crash_of_a_real_host_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its handlers run in this process; what their devices are told is excused here, too."""
    excuse_all(monkeypatch)
    monkeypatch.setattr(Requests, "range_fault", crash)
    with trio.fail_after(100):
        summary = await run_rounds(3, 1)
    assert any(one["checker"] == "crash" and "RangeFault of " in one["what"] for one in summary.violations)


def children_crash(patch: pytest.MonkeyPatch) -> None:
    """What a child does with a device while it is killed ends with a bug in the device, and it is killed only then."""
    killed = children.ENDS["sigkill"]
    crashed = trio.Event()

    async def slowly(child: Process) -> None:
        await crashed.wait()
        await killed(child)

    async def broken(process: Process, device: str, kernel: str, **arguments: Any) -> Any:
        try:
            return await launched(process, device, kernel, **arguments | {"more": 1})
        finally:
            crashed.set()

    patch.setitem(children.ENDS, "sigkill", slowly)
    patch.setattr(children, "launched", broken)


def test_a_crash_is_seen_though_who_is_told_is_being_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated device: the child bears any error, and the bug is a violation all the same."""
    program = msgspec.structs.replace(SCENARIOS["tour"], steps=(FORK,))
    assert run_program(program).violations == []
    children_crash(monkeypatch)
    (found,) = run_program(program).violations
    assert found.checker == "crash"
    assert "a kernel on dev1: TypeError" in found.what


async def test_a_crash_in_a_real_device_is_seen_in_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in processes of their own, where only the device's log knows."""

    async def once(crew: Crew, actor: int, _: trio.Event) -> None:
        if actor == 0:
            await do(crew, FORK)

    monkeypatch.setattr(real, "_act", once)
    with trio.fail_after(100):
        assert (await run_rounds(SPARES_DEV1, 1)).violations == []
    children_crash(monkeypatch)
    with trio.fail_after(100):
        summary = await run_rounds(SPARES_DEV1, 1)
    assert [one["checker"] for one in summary.violations] == ["crash"]
    assert re.match(r"dev1: a kernel crashed: .+ \| TypeError: got an", summary.violations[0]["what"])


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("logged", ["dev1: a task crashed: KeyError: 64"]),
        (
            "raised",
            [
                r"dev1: the device crashed: .*crashing_zygote.py.* \| raise KeyError\(64\) \| KeyError: 64",
                r"dev1 \(process \d+\) ended with exit code 70; .*KeyError: 64",
            ],
        ),
        ("killed", [r"dev1 \(process \d+\) killed by SIGSEGV; its log ends: .*something is wrong"]),
    ],
)
async def test_a_crash_of_a_real_device_in_its_last_moments_is_seen(how: str, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """After the goodbye, when nobody listens: its log is read, and how it ended, when it has."""
    command = (sys.executable, str(Path(__file__).with_name("crashing_zygote.py")), how, "dev1")
    monkeypatch.setattr(machine, "ZygoteClient", lambda: ZygoteClient(command))

    async def rest(_crew: Crew, _actor: int, enough: trio.Event) -> None:
        await enough.wait()

    monkeypatch.setattr(real, "_act", rest)
    monkeypatch.setattr(real, "_nemesis", crash_nothing)
    with trio.fail_after(100):
        summary = await run_rounds(3, 1)
    assert {one["checker"] for one in summary.violations} == {"crash"}
    assert len(summary.violations) == len(told)
    for one, what in zip(summary.violations, told, strict=True):
        assert re.fullmatch(what, one["what"], re.DOTALL)


async def crash_nothing(*_: object) -> None:
    """No round of harm."""
    await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    ("error", "crashed"),
    [
        (KeyError(64), True),
        (ExceptionGroup("two", [PeerLost("gone"), KeyError(64)]), True),
        (ExceptionGroup("one", [PeerLost("gone")]), False),
        (PeerLost("gone"), False),
        (KernelError(12, "mmap", "no memory"), False),
    ],
    ids=repr,
)
def test_errors_of_the_machine_are_no_crashes(error: Exception, *, crashed: bool) -> None:
    """Alone and in groups; who listens hears of all others, and of none when he has ceased to."""
    heard: list[tuple[str, Exception]] = []
    with listening(lambda whose, told: heard.append((whose, told))):
        tell("Inspect of gpu0", error)
    tell("Inspect of gpu0", error)
    assert is_crash(error) is crashed
    assert heard == ([("Inspect of gpu0", error)] if crashed else [])


async def test_an_outcome_sees_crashes_of_tasks_that_begin_meanwhile() -> None:
    """Not those of others."""
    outcome, other = Outcome(), Outcome()

    async def work() -> None:
        tell("Inspect of gpu0", KeyError(64))

    async with trio.open_nursery() as nursery:
        with outcome.seeing_crashes():
            nursery.start_soon(work)
        with other.seeing_crashes():
            pass
    assert [one.what.partition(" s: ")[2] for one in outcome.violations] == ["Inspect of gpu0: KeyError: 64"]
    assert other.violations == []
