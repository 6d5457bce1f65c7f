"""What excuses an operation that was refused: what its error names, on the device that it names, as often as it happened."""

from __future__ import annotations

import errno
from typing import Any

import msgspec
import pytest

from hmmnet.campaign.draw import draw
from hmmnet.campaign.excuses import INVALIDATION_S, LOST_WITHIN_S, STALLED_S, Excuses
from hmmnet.campaign.places import Pair, pairs
from hmmnet.campaign.program import Harm, Step
from hmmnet.campaign.scenarios import SCENARIOS
from hmmnet.campaign.sweep import try_all
from hmmnet.campaign.trial import run_program
from hmmnet.errors import BusError, KernelError
from hmmnet.faults.points import Where
from hmmnet.host import link, requests
from hmmnet.host.link import SessionLink
from hmmnet.host.process import Process
from hmmnet.wire.exchange import HEARTBEAT_S, LEASE_S

DEVICES = ("dev0", "dev1", "dev10")
ALLOCATED = "page fault: ENOMEM: 2 pages are wanted; a fault was injected at memcg.charge (occurrence 7)"
COPIED = "dev1: Ioctl: RemoteError: host: Migrate: PeerError: it gave up (a fault was injected at migrate.mid_copy of dev1 (occurrence 3))"
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


def copying(device: str = "dev1", occurrence: int = 3, **more: Any) -> Where:
    """A copy to a device that is about to fail."""
    return Where("migrate.mid_copy", "host", device, occurrence=occurrence, **more)


def test_a_failure_excuses_all_that_ran_when_it_was_injected() -> None:
    """Several jobs wait for one migration; one that began later is refused for nothing."""
    excuses = Excuses()
    excuses.failed(copying(), 1.0)
    assert [excuses.cover(COPIED, 0.9, DEVICES) for _ in range(3)] == [True, True, True]
    assert not excuses.cover(COPIED, 1.1, DEVICES)


@pytest.mark.parametrize(
    "where",
    [copying("dev10"), copying(occurrence=4), Where("migrate.before_copy", "host", "dev1", occurrence=3), copying(process=1001)],
    ids=["another device", "another time", "another point", "a stranger's process"],
)
def test_a_failure_elsewhere_excuses_nothing(where: Where) -> None:
    """Nor does any, where an error names none."""
    excuses = Excuses(strangers=(1001,))
    excuses.failed(where, 0.0)
    assert not excuses.cover(COPIED, 0.0, DEVICES)
    excuses.failed(copying(process=1000), 0.0)
    assert excuses.cover(COPIED, 0.0, DEVICES)
    assert not excuses.cover("migrate_to_ram: ENOMEM: a page wants to come home and the host's memory is used up", 0.0, DEVICES)


def test_a_failure_excuses_accesses_to_its_own_pages() -> None:
    """Where it was about some; what could not be accessed is one of them, unless the error does not say what that was."""
    excuses = Excuses()
    excuses.failed(copying(process=1000, start=16, pages=2), 0.0)
    told = [excuses.cover(COPIED, 0.0, DEVICES, address) for address in (None, 0x10000, 0x11FFF, 0x12000, 0xFFFF)]
    assert told == [True, True, True, False, False]
    excuses.failed(Where("memcg.charge", "host", pages=1, occurrence=7), 0.0)
    assert excuses.cover(ALLOCATED, 0.0, DEVICES, 0x12000), "that is how many, of nobody in particular"


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
    """What ran while it lasted; when all is calm nothing is excused any more."""
    excuses = Excuses()
    other = excuses.harm_begins("dev10")
    assert not excuses.cover(KILLED, 0.0, DEVICES)
    own = excuses.harm_begins("dev1")
    assert excuses.cover(KILLED, 5.0, DEVICES)
    own.ended_s = other.ended_s = 5.0
    assert excuses.cover(KILLED, 4.9, DEVICES)
    assert not excuses.cover(KILLED, 5.1, DEVICES)
    excuses.harm_begins("dev1")
    excuses.calm()
    assert not excuses.cover(KILLED, 5.1, DEVICES)


def test_a_device_that_is_lost_excuses_until_it_is_there_again() -> None:
    """Also after what it was lost by is over; and it was lost from then on."""
    excuses = Excuses()
    harm = excuses.harm_begins("dev1")
    harm.ended_s = 1.0
    assert not excuses.was_lost("dev1")
    assert excuses.lost("dev1", 1.0 + LOST_WITHIN_S)
    assert excuses.cover(KILLED, 50.0, DEVICES)
    excuses.ready("dev1", 60.0)
    excuses.ready("dev1", 70.0)
    assert not excuses.cover(KILLED, 60.1, DEVICES)
    excuses.calm()
    assert excuses.was_lost("dev1")
    assert not excuses.was_lost("dev10")
    assert not excuses.cover(KILLED, 0.0, DEVICES)


def test_a_device_is_lost_by_a_harm_to_it_and_not_much_later() -> None:
    """By the times that the host gives a device; not by what happened to another."""
    assert (INVALIDATION_S, STALLED_S) == (link.INVALIDATION_S, link.STALLED_S)
    assert LOST_WITHIN_S >= requests.TABLE_UPDATE_S + link.STALLED_S
    assert LOST_WITHIN_S >= LEASE_S + HEARTBEAT_S
    excuses = Excuses()
    excuses.harm_begins("dev10")
    assert not excuses.lost("dev1", 1.0)
    excuses.harm_begins("dev1").ended_s = 2.0
    assert excuses.lost("dev1", 2.0)
    assert not excuses.lost("dev1", 2.1 + LOST_WITHIN_S)


def test_a_device_that_is_lost_unharmed_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though every operation may be refused: the host gives one up, which nobody has touched."""
    program = msgspec.structs.replace(SCENARIOS["tour"], steps=LATE)
    assert run_program(program).violations == []
    monkeypatch.setattr(Excuses, "cover", lambda *_: True)
    monkeypatch.setattr(SessionLink, "flush_freed", lambda self: self.condemn("for nothing"))
    assert any("dev1 was lost, and nothing had been done to it" in one.what for one in run_program(program).violations)


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
    excuses.failed(copying(), 0.0)
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
