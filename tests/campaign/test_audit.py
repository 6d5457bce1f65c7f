"""What is checked after every step: what is right is not complained of, and what is spoilt is found at once, as a look at all finds it."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hmmnet.campaign import audit
from hmmnet.campaign.audit import Auditor
from hmmnet.campaign.crew import Violation
from hmmnet.campaign.draw import draw
from hmmnet.campaign.program import Step
from hmmnet.campaign.trial import run_program
from hmmnet.host.hub import Hub
from hmmnet.host.interfaces import Event
from hmmnet.host.mm import ledger
from hmmnet.host.notifier import MmuNotifier
from hmmnet.pages import PAGE_SIZE
from hmmnet.sim import SimulatedMachine, simulate
from tests.host.fakes import FakeLink

from .spoils import SPOILS, Undo, host_of, leave_a_migration_entry, share_and_own

HUGE, LIMITED = 8, 10
"""Seeds with huge pages, and with a memory cgroup."""
SEEDS = (3, HUGE, LIMITED)
SPOILS_A_STEP = 3


def after_each_step(monkeypatch: pytest.MonkeyPatch, look: Any) -> None:
    """`look(machine, step)` instead of the auditor."""
    monkeypatch.setattr(Auditor, "after", lambda self, step: look(self._crew.machine, step))


def writing(machine: SimulatedMachine) -> bool:
    """Whether somebody is changing a layout, when nothing is looked at."""
    return any(space.mmap_lock.written for space in host_of(machine).spaces.values())


def test_every_step_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one in `FULL_EVERY` with everything."""
    looks: Counter[str] = Counter()
    changes, whole = SimulatedMachine.audit_changes, SimulatedMachine.audit

    def count_changes(self: SimulatedMachine) -> list[str]:
        looks["changes"] += 1
        return changes(self)

    def count_all(self: SimulatedMachine, *, quiet: bool) -> list[str]:
        looks["all"] += 1
        return whole(self, quiet=quiet)

    monkeypatch.setattr(SimulatedMachine, "audit_changes", count_changes)
    monkeypatch.setattr(SimulatedMachine, "audit", count_all)
    program = draw(0, "none", 130)
    assert run_program(program).violations == []
    assert looks["changes"] == len(program.steps) == 130
    assert looks["all"] == sum(step.serial % audit.FULL_EVERY == 0 for step in program.steps) + 2, "twice at the end"


def test_every_look_at_changes_finds_what_a_look_at_everything_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each step of some seeds, of things spoilt at places that are drawn; and nothing, before and once they are undone."""
    found: Counter[str] = Counter()
    differ: list[tuple[str, list[str], list[str]]] = []
    random = Random(5)

    def agree(machine: SimulatedMachine, what: str) -> list[str]:
        some, everything = machine.audit_changes(), machine.audit()
        if some != everything:
            differ.append((what, some, everything))
        return everything

    def look(machine: SimulatedMachine, _: Step) -> None:
        assert agree(machine, "nothing") == []
        for name in random.sample(sorted(SPOILS), SPOILS_A_STEP):
            undo = SPOILS[name](machine, random)
            if undo is not None:
                found[name] += bool(agree(machine, name))
                undo()
                assert agree(machine, f"{name} undone") == []

    after_each_step(monkeypatch, look)
    for seed in SEEDS:
        assert run_program(draw(seed, "all", 120)).violations == []
    assert differ == []
    assert set(SPOILS) - set(found) == set(), "nothing of its kind was there"
    assert [name for name, times in found.items() if not times] == []
    assert {name[:2] for name in found} >= {"i1", "i2", "i3", "i4", "i5", "i8"}


@pytest.mark.parametrize("name", [name for name in SPOILS if name.startswith("i") and name[1].isdigit() and not name.startswith("i5")])
def test_what_is_spoilt_is_a_violation_of_that_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The campaign names the invariant, and stops nothing."""
    look = Auditor.after
    spoilt: list[Violation] = []
    undone: list[Undo] = []
    random = Random(7)

    def after(self: Auditor, step: Step) -> None:
        machine = self._crew.machine
        if not spoilt and step.serial > 20 and not writing(machine):
            look(self, step)
            assert self._crew.outcome.violations == []
            undo = SPOILS[name](machine, random)
            if undo is not None:
                undone.append(undo)
                monkeypatch.setattr(audit, "FULL_EVERY", 1 << 40)
                look(self, step)
                spoilt.extend(self._crew.outcome.violations)
                undo()
            return
        look(self, step)

    monkeypatch.setattr(Auditor, "after", after)
    for seed in (LIMITED,) if name.startswith("i4") else SEEDS:
        outcome = run_program(draw(seed, "all", 120)).outcome
        if undone:
            break
    assert undone, "nothing of its kind was there"
    assert spoilt, "it was not found"
    assert outcome.violations == spoilt, "and nothing else"
    assert {violation.checker for violation in spoilt} == {"invariants"}


def test_a_migration_entry_that_stays_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """I5: nothing but time tells that nobody will replace it."""
    monkeypatch.setattr(ledger, "MIGRATION_S_MAX", 2.0)

    async def main(machine: SimulatedMachine) -> list[list[str]]:
        process = await machine.create_process()
        address = await process.mmap(8 * PAGE_SIZE)
        await process.write(address, np.ones(8 * PAGE_SIZE, np.uint8))
        looks = [machine.audit_changes()]
        undo = leave_a_migration_entry(machine, Random(1))
        assert undo is not None
        for _ in range(2):
            looks.append(machine.audit_changes())
            await trio.sleep(2.5)
        looks.append(machine.audit_changes())
        undo()
        looks += [machine.audit_changes(), machine.audit()]
        await process.exit()
        return looks

    before, begun, stays, later, undone, all_of_it = simulate(main).value
    assert (before, begun, undone, all_of_it) == ([], [], [], [])
    assert [len(stays), len(later)] == [1, 1]
    assert "has been behind a migration entry for 2.5 s (I5)" in stays[0]


def test_what_was_in_transit_at_a_violation_is_not_so_for_ever() -> None:
    """Another rule is broken while a page moves, which starts all looks anew: the page, home long since, is no complaint later."""

    async def main(machine: SimulatedMachine) -> list[list[str]]:
        process = await machine.create_process()
        address = await process.mmap(8 * PAGE_SIZE)
        await process.write(address, np.ones(8 * PAGE_SIZE, np.uint8))
        looks = [machine.audit_changes()]
        undo = leave_a_migration_entry(machine, Random(1))
        assert undo is not None
        looks.append(machine.audit_changes())
        host_of(machine).spaces[process.pid].mm.rss += 1
        looks.append(machine.audit_changes())
        host_of(machine).spaces[process.pid].mm.rss -= 1
        undo()
        looks.append(machine.audit_changes())
        await trio.sleep(2 * ledger.MIGRATION_S_MAX)
        looks.append(machine.audit_changes())
        await process.exit()
        return looks

    looks = simulate(main).value
    assert ["rss is 9" in " ".join(look) for look in looks] == [False, False, True, False, False]
    assert [len(look) for look in looks] == [0, 0, 1, 0, 0]


def test_a_word_that_changes_by_itself_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """I6: what is loaded is what was stored last; the history knows."""
    spoilt: list[Undo] = []
    look = Auditor.after

    def after(self: Auditor, step: Step) -> None:
        look(self, step)
        if step.serial == 30:
            zone = host_of(self._crew.machine).memory.nodes[0]
            used = zone.referenced(zone.used.stop) & (zone.mapcount[zone.used] > 0)
            used[0] = False
            zone.arena.pages[: zone.used.stop][used] ^= 1
            spoilt.append(lambda: None)

    monkeypatch.setattr(Auditor, "after", after)
    outcome = run_program(draw(1, "none", 60)).outcome
    assert spoilt
    assert {violation.checker for violation in outcome.violations} == {"history"}


# --- I7 -------------------------------------------------------------------------------------------------------------------------------


async def mirror_and_die(machine: SimulatedMachine) -> list[list[str]]:
    """A device mirrors a process and dies, and the process goes on: what is wrong, as each of the three looks says it."""
    process = await machine.create_process()
    address = await process.mmap(8 * PAGE_SIZE)
    await process.write(address, np.ones(8 * PAGE_SIZE, np.uint8))
    device = machine.device_names[0]
    await process.launch("reduction", device, placement="remote", a=address, n=PAGE_SIZE // 8)
    await machine.kill_device(device)
    await trio.sleep(5)
    await process.munmap(address, PAGE_SIZE)
    looks = [machine.audit_changes(), machine.audit(), (await machine.check())["complaints"]]
    await process.exit()
    return looks


def test_nobody_is_told_once_it_has_unsubscribed() -> None:
    """A device that died is not told of anything after it was taken out: nothing is wrong."""
    assert simulate(mirror_and_die).value == [[], [], []]


def test_a_callback_after_its_removal_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """I7: a removed subscription stays in the tree, and is told of the next change."""
    monkeypatch.setattr(MmuNotifier, "_discard", lambda _, subscription: setattr(subscription, "inserted", False))
    looks = simulate(mirror_and_die).value
    for complaints in looks:
        assert complaints
        assert "after its removal had returned (I7)" in complaints[0]


async def test_a_removal_that_does_not_wait_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """I7: it returns while the device is still letting go."""
    hub, link = Hub(3), FakeLink("gpu0", 64)
    subscription = hub.insert(0, 100, link, 7)
    gate = link.hold()

    async def unmap() -> None:
        async with hub.invalidate(Event.UNMAP, 10, 20):
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(unmap)
        await wait_all_tasks_blocked()
        monkeypatch.setattr(hub.core, "remove", lambda _: None)
        await hub.remove(subscription)
        gate.set()
    assert hub.late == [
        "subscription 1 of gpu0 to pages [0x0, 0x64) of process 3 is still letting go of pages, and its removal has returned (I7)"
    ]


def test_a_shared_page_that_one_may_write_is_named() -> None:
    """I2: of parent and child, one takes what both have for its own."""

    async def main(machine: SimulatedMachine) -> list[list[str]]:
        process = await machine.create_process()
        address = await process.mmap(8 * PAGE_SIZE)
        await process.write(address, np.ones(8 * PAGE_SIZE, np.uint8))
        child = await process.fork()
        looks = [machine.audit_changes()]
        undo = share_and_own(machine, Random(1))
        assert undo is not None
        looks += [machine.audit_changes(), machine.audit()]
        undo()
        looks.append(machine.audit_changes())
        await child.exit()
        await process.exit()
        return looks

    before, changes, everything, undone = simulate(main).value
    assert (before, undone) == ([], [])
    assert changes == everything
    assert "a page that several map is writable or exclusive (I2)" in changes[0]


def test_programs_have_what_is_spoilt() -> None:
    """The seeds above have huge pages and a memory cgroup."""

    assert draw(LIMITED, "all", 120).limit_pages
    assert "huge" in {layout.kind for layout in draw(HUGE, "all", 120).regions}
