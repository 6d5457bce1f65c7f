"""What excuses an operation that was refused: what its error names, on the device that it names, as often as it happened."""

from __future__ import annotations

import errno

import msgspec
import pytest

from hmmnet.campaign.draw import draw
from hmmnet.campaign.excuses import AFTERMATH_S, EVERYBODY, Excuses
from hmmnet.campaign.places import Pair, pairs
from hmmnet.campaign.program import Harm, Step
from hmmnet.campaign.scenarios import SCENARIOS
from hmmnet.campaign.sweep import try_all
from hmmnet.campaign.trial import run_program
from hmmnet.errors import BusError, KernelError
from hmmnet.host.process import Process

DEVICES = ("dev0", "dev1", "dev10")
ALLOCATED = "page fault: ENOMEM: 2 pages are wanted; a fault was injected at host.alloc.frame or memcg.charge"
COPIED = "dev1: Ioctl: RemoteError: host: Migrate: PeerError: the copy engine gave up (a fault was injected at migrate.mid_copy of dev1)"
CRASHED = "dev1: Migrate: RemoteError: host: Migrate: AssertionError: a frame breaks a rule"
CUT = 'kernel peek on device "dev1" failed: host: DmaRead: Unreachable: no link that works leads from "node0" to "dev1": links are down'
KILLED = 'open: ENODEV: device "dev1" is not there: it was lost: device "dev1" was killed'
CAUSELESS = "a bug of the host: nothing to do with any device"
LATE = tuple(Step(0, "device_load", word=5, count=8, device=1, serial=serial) for serial in range(1, 14))
BORNE = {
    "walk": Step(0, "walk", device=1, serial=14),
    "the child reads": Step(0, "fork", word=5, count=8, serial=14),
    "the child writes": Step(0, "fork", word=5, count=8, serial=14),
}


def test_a_failure_excuses_as_often_as_it_fired() -> None:
    """Either of the two points that the error names; a third refusal is one too many."""
    excuses = Excuses()
    excuses.failed("host.alloc.frame", "", 1.0)
    excuses.failed("memcg.charge", "", 1.0)
    assert [excuses.cover(ALLOCATED, 2.0, DEVICES) for _ in range(3)] == [True, True, False]


def test_a_failure_excuses_all_that_ran_when_it_was_injected() -> None:
    """Several jobs wait for one migration; one that began later is refused for nothing."""
    excuses = Excuses()
    excuses.failed("migrate.mid_copy", "dev1", 1.0)
    assert [excuses.cover(COPIED, 0.9, DEVICES) for _ in range(3)] == [True, True, True]
    assert not excuses.cover(COPIED, 1.1, DEVICES)


def test_a_failure_elsewhere_excuses_nothing() -> None:
    """Another point, another device; and an error that names no fault."""
    excuses = Excuses()
    excuses.failed("migrate.mid_copy", "dev10", 0.0)
    excuses.failed("migrate.before_copy", "dev1", 0.0)
    assert not excuses.cover(COPIED, 0.0, DEVICES)
    assert not excuses.cover("migrate_to_ram: ENOMEM: a page wants to come home and the host's memory is used up", 0.0, DEVICES)
    excuses.failed("migrate.mid_copy", "dev1", 0.0)
    assert excuses.cover(COPIED, 0.0, DEVICES)


@pytest.mark.parametrize(("links", "excused"), [("*dev1", True), ("*", True), ("*dev0", False)])
def test_links_that_are_down_excuse_who_needed_them(links: str, excused: bool) -> None:
    """By the ends of the way, while they are down; not what began after they were up again."""
    excuses = Excuses()
    assert not excuses.cover(CUT, 1.0, DEVICES)
    excuses.outage_begins(3, links, 1.0)
    assert excuses.cover(CUT, 1.5, DEVICES) is excused
    excuses.outage_ends(3, 2.0)
    excuses.outage_ends(4, 2.0)
    assert excuses.cover(CUT, 1.9, DEVICES) is excused
    assert not excuses.cover(CUT, 2.1, DEVICES)


def test_a_harm_excuses_what_names_its_device() -> None:
    """While it lasts and in its aftermath; a harm to all excuses all; when all is calm nothing is excused any more."""
    excuses = Excuses()
    other = excuses.harm_begins("dev10")
    assert not excuses.cover(KILLED, 0.0, DEVICES)
    own = excuses.harm_begins("dev1")
    assert excuses.cover(KILLED, 5.0, DEVICES)
    own.ended_s = other.ended_s = 5.0
    assert excuses.cover(KILLED, 5.0 + AFTERMATH_S / 2, DEVICES)
    assert not excuses.cover(KILLED, 5.0 + AFTERMATH_S, DEVICES)
    excuses.harm_begins(EVERYBODY)
    assert excuses.cover(CUT, 100.0, DEVICES)
    excuses.calm()
    assert not excuses.cover(CUT, 100.0, DEVICES)


@pytest.mark.parametrize("text", ["ENOMEM because of nothing", "a fault was injected at process.munmap"])
def test_a_refusal_without_its_cause_is_a_violation(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in which faults cost errors does not excuse one that comes from nowhere, nor one that names a fault that never fired."""

    async def refuse(*_: object, **__: object) -> None:
        raise KernelError(errno.EIO, "mlock", text)

    program = draw(6, "alloc.host")
    assert run_program(program).violations == []
    monkeypatch.setattr(Process, "mlock", refuse)  # which only steps call, and steps are judged
    refused = run_program(program).violations
    assert len(refused) == sum(step.kind == "lock" for step in program.steps) > 2
    assert {(one.checker, text in one.what) for one in refused} == {("service", True)}
    monkeypatch.setattr(Excuses, "cover", lambda *_: True)
    assert run_program(program).violations == []


@pytest.mark.parametrize("pair", [pair for pair in pairs() if pair.fault == "fail"][::3], ids=lambda pair: pair.place)
def test_errors_name_the_point_that_failed(pair: Pair) -> None:
    """Whatever is refused because a point failed says so: nothing of it is a violation."""
    assert [one.found.wrong for one in try_all(pair, list(SCENARIOS.values()), 1, first_only=True)] == [""]


def test_nothing_excuses_a_crash() -> None:
    """Whoever is harmed, and whatever the error names; what an operating system answers is no crash."""
    excuses = Excuses()
    excuses.harm_begins("dev1")
    excuses.harm_begins(EVERYBODY)
    excuses.failed("migrate.mid_copy", "dev1", 0.0)
    assert not excuses.cover(CRASHED, 0.0, DEVICES)
    assert not excuses.cover(COPIED.replace("PeerError", "KeyError"), 0.0, DEVICES)
    assert excuses.cover(CRASHED.replace("AssertionError", "ConnectionResetError"), 0.0, DEVICES)


def causeless_sigbus(patch: pytest.MonkeyPatch, what: str) -> None:
    """One access, which its operation bears to lose a page in, ends in a SIGBUS that no harm explains."""
    children: list[Process] = []
    name = {"walk": "load", "the child reads": "read", "the child writes": "write"}[what]
    fork, access = Process.fork, getattr(Process, name)

    async def forked(parent: Process) -> Process:
        children.append(await fork(parent))
        return children[-1]

    async def broken(process: Process, address: int, *more: object) -> object:
        if what == "walk" or process in children:
            raise BusError(address, CAUSELESS)
        return await access(process, address, *more)

    patch.setattr(Process, "fork", forked)
    patch.setattr(Process, name, broken)


@pytest.mark.parametrize("what", BORNE)
def test_a_sigbus_without_its_cause_is_a_violation(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in operations that bear the loss of a page, and after a device was harmed."""
    program = msgspec.structs.replace(SCENARIOS["tour"], steps=(*LATE, BORNE[what]), harms=(Harm(2, "death", 0, 0.0),))
    calm = run_program(program)
    assert calm.violations == []
    assert calm.outcome.faults["death"] == 1
    causeless_sigbus(monkeypatch, what)
    found = run_program(program).violations
    assert found[0].checker == "service"
    assert CAUSELESS in found[0].what
