"""The campaign uses the whole public API: every call of a process, and of what it holds, is made by some kind of step.

A machine in virtual time; one actor does each kind of step, with each choice, once. What is called on the host's own objects is counted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from hmmnet.campaign import scenarios
from hmmnet.campaign.draw import ALWAYS, LEAVING, SOMETIMES, draw
from hmmnet.campaign.operations import OPERATIONS
from hmmnet.campaign.program import Layout, Program, Step
from hmmnet.campaign.trial import run_program
from hmmnet.campaign.words import CHOICES, STEP_KINDS
from hmmnet.host.files import MemFd
from hmmnet.host.handles import Handle, HeldPages
from hmmnet.host.mm.userfault import UserFault
from hmmnet.host.process import Process
from hmmnet.host.service import Host
from hmmnet.program import Handle as AnyHandle
from hmmnet.program import Machine, MemoryFile, PageReferences, UserFaults
from hmmnet.program import Process as AnyProcess

NOT_CALLED = {
    "Machine.emulated_s": "the clock, which steps of virtual time read from trio",
    "Process.malloc": "mmap with a heap above it, which is never freed: memory of steps is mapped, and goes",
    "Process.load": "`read` of one value",
    "Process.read_array": "`read`, as an array",
    "Process.store": "`write` of one value",
}
"""What no step calls, and why."""
FILES = ((MemFd, MemoryFile), (UserFault, UserFaults))
BASE = draw(0, "none")
MACHINE = scenarios.MACHINE.replace("16 MiB", "32 MiB")


def everything() -> Program:
    """Each kind of step with each of its choices, on each of the two devices, on a region of each kind."""
    kinds = [(kind, choice, device) for kind in STEP_KINDS for choice in CHOICES.get(kind, ("",)) for device in (0, 1)]
    steps = tuple(
        Step(0, kind, region=number // 2 % 6, page=number % 4, word=5, count=4, device=device, choice=choice, serial=number + 1)
        for number, (kind, choice, device) in enumerate(kinds)
    )
    regions = (Layout("anon", 4), Layout("shared", 3), Layout("file", 3), Layout("huge", 7))
    return msgspec.structs.replace(BASE, machine=MACHINE, actors=1, regions=regions, steps=steps, faults=(), planned=(), limit_pages=0)


def calls(protocol: type) -> set[str]:
    """The public methods of a protocol."""
    return {name for name, member in vars(protocol).items() if inspect.isfunction(member) and not name.startswith("_")}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What has been called, as ``Process.mmap``."""
    found: set[str] = set()

    def watch(owner: Any, protocol: type) -> None:
        for name in calls(protocol):
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, counted(getattr(owner, name), f"{protocol.__name__}.{name}"))

    def counted(method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            found.add(name)
            return method(*arguments, **keywords)

        return call

    for owner, protocol in ((Process, AnyProcess), (Handle, AnyHandle), (HeldPages, PageReferences), (Host, Machine), *FILES):
        watch(owner, protocol)
    return found


def test_every_call_of_the_api_is_made(called: set[str]) -> None:
    """By some step, with the right results; or has its reason."""
    outcome = run_program(everything()).outcome
    assert outcome.violations == []
    protocols = (AnyProcess, AnyHandle, PageReferences, MemoryFile, UserFaults, Machine)
    wanted = {f"{protocol.__name__}.{name}" for protocol in protocols for name in calls(protocol)}
    assert wanted - called == {name for name in NOT_CALLED if name in wanted - called}
    assert set(NOT_CALLED) <= wanted
    assert outcome.operations == len(everything().steps)


def test_every_kind_of_step_is_drawn() -> None:
    """Each kind has its weight; those that cost a device its life are drawn where deaths are."""
    assert set(STEP_KINDS) == set(OPERATIONS) == set(ALWAYS) | set(SOMETIMES) | set(LEAVING)
    leaving = {mix: {step.kind for seed in range(60) for step in draw(seed, mix).steps} & set(LEAVING) for mix in ("all", "deaths", "none")}
    assert leaving == {"all": set(LEAVING), "deaths": set(LEAVING), "none": set()}
