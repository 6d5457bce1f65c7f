"""One run for many: what a child comes to is what a run of its own comes to, to the last line of its trace."""

from __future__ import annotations

import os
import signal
from random import Random
from typing import Any

import pytest
import trio

from hmmnet.campaign.crew import Crew
from hmmnet.campaign.forks import Forks, can_fork
from hmmnet.campaign.places import Pair, pairs
from hmmnet.campaign.program import Program
from hmmnet.campaign.scenarios import COHERENT, MACHINE, SCENARIOS
from hmmnet.campaign.sweep import Hits, alone, forked, try_all, try_pair
from hmmnet.campaign.trial import run_program
from hmmnet.errors import HmmnetError
from hmmnet.faults.controls import EVERY, Chance, Controls
from hmmnet.sim import Trace, run_virtual
from hmmnet.sim.schedule import can_part

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
BASE = SCENARIOS["order"]
NTH_MAX = 4
KINDS = [
    Pair("point", "migrate.before_copy", "delay"),
    Pair("point", "hub.after_acks", "pause"),
    Pair("point", "device.before_done", "crash"),
    Pair("point", "host.alloc.frame", "fail"),
    Pair("point", "hub.before_callbacks", "hang"),
    Pair("message", "Migrate", "loss"),
    Pair("message", "MigrateDone", "duplicate"),
    Pair("message", "CopyIn", "garbage"),
    Pair("message", "bulk to device", "delay"),
    Pair("message", "Migrated", "death"),
]
"""Of every way in which something happens: at a point, at the node that it concerns or another, to a message, at one."""


def of(occurrences: tuple[int, ...]) -> Forks[bool]:
    """Children that say yes or no."""
    return Forks(occurrences)


def one_by_one(pair: Pair, base: Program, nth_max: int) -> list[tuple[int, Hits]]:
    """Each in a run of its own."""
    found = [(nth, try_pair(pair, base, nth)) for nth in range(1, nth_max + 1)]
    return [(nth, hits) for nth, hits in found if hits.hit]


@pytest.mark.parametrize("pair", KINDS, ids=lambda pair: f"{pair.place} {pair.fault}")
def test_forked_runs_come_to_the_same(pair: Pair) -> None:
    """As often hit, and each with the same end."""
    found = forked(pair, BASE, NTH_MAX)
    assert found
    assert found == one_by_one(pair, BASE, NTH_MAX)


@pytest.mark.parametrize("pair", Random(7).sample(pairs(), 6), ids=lambda pair: f"{pair.place} {pair.fault}")
def test_forked_runs_of_any_pair_come_to_the_same(pair: Pair) -> None:
    """Drawn among all of them; those that the scenario does not reach are hit in neither way."""
    base = SCENARIOS["small"]
    assert forked(pair, base, 3) == one_by_one(pair, base, 3)


@pytest.mark.parametrize("pair", [KINDS[0], KINDS[2], KINDS[5], KINDS[9]], ids=lambda pair: f"{pair.place} {pair.fault}")
def test_a_child_is_the_run_that_it_would_have_been(pair: Pair) -> None:
    """Message by message, from the beginning to the end; the parent is the run in which nothing comes."""

    def digest(nth: int) -> str:
        return run_program(pair.program(BASE, nth), trace=Trace()).digest

    forks: Forks[str] = Forks((1, 2))
    calm = forks.run(lambda: digest(EVERY))
    assert forks.results == [(1, digest(1)), (2, digest(2))]
    assert calm == digest(1000)
    assert len({calm, *(result for _, result in forks.results)}) == 3


def test_what_is_wrong_in_a_child_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A violation comes back as one, as in a run of its own."""
    judged = Crew.attempt

    async def attempt(crew: Crew, who: str, *more: Any) -> bool:
        if crew.outcome.faults["delay at migrate.before_copy"]:
            crew.complain("planted", f"{who} after a fault")
        return await judged(crew, who, *more)

    monkeypatch.setattr(Crew, "attempt", attempt)
    found = forked(KINDS[0], BASE, 2)
    assert [hits.outcome for _, hits in found] == ["wrong", "wrong"]
    assert found == one_by_one(KINDS[0], BASE, 2)
    assert alone(BASE).violations == []


def test_a_child_that_fails_or_dies_is_noticed() -> None:
    """What it raises is told; one that is gone without a word is an error."""

    async def chance() -> bool:
        return Chance(Controls(nth=EVERY), Random(1)).fires()

    def fail() -> bool:
        if run_virtual(chance):
            raise HmmnetError("planted")
        return False

    def die() -> bool:
        if run_virtual(chance):
            os._exit(3)
        return False

    with pytest.raises(HmmnetError, match="planted"):
        of((1,)).run(fail)
    with pytest.raises(HmmnetError, match="occurrence 1 happens ended with status 3"):
        of((1,)).run(die)
    assert of(()).run(die) is False


@pytest.mark.parametrize("place", ["device.before_ack", "migrate.before_copy"])
def test_a_child_that_dies_is_not_blamed_on_the_machine(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a task of a host or a device, whose errors are answers to somebody: the sweep fails, and names the time."""
    base, pair, calm = SCENARIOS["order"], Pair("point", place, "delay"), alone(SCENARIOS["order"])
    ended: list[Forks[Hits]] = []
    run = Forks[Hits].run

    def noted(self: Forks[Hits], work: Any) -> Hits:
        ended.append(self)
        return run(self, lambda: judged(work()))

    def judged(hits: Hits) -> Hits:
        own.append(hits)
        return hits

    own: list[Hits] = []
    monkeypatch.setattr(Forks, "run", noted)
    monkeypatch.setattr(Forks, "_end", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(HmmnetError, match="occurrence 1 happens ended with status -9"):
        forked(pair, base, NTH_MAX)
    assert own == [Hits(hit=False, outcome="same")], "the run in which nothing happens is as ever"
    assert calm.violations == []
    assert ended[0].results == [], "no other child was forked"


def test_what_a_child_cannot_send_is_told() -> None:
    """Why, not only that it ended."""

    async def chance() -> bool:
        return Chance(Controls(nth=EVERY), Random(1)).fires()

    def unsendable() -> object:
        return (lambda: None) if run_virtual(chance) else 0

    forks: Forks[object] = Forks((1,))
    with pytest.raises(HmmnetError, match=r"occurrence 1 happens failed: <function .* cannot be sent: .*"):
        forks.run(unsendable)


def test_what_is_wrong_without_the_fault_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes last, and is shown as what it is; its `nth` repeats it."""
    assert alone(BASE).violations == []
    judged = Crew.attempt

    async def attempt(crew: Crew, who: str, *more: Any) -> bool:
        crew.complain("planted", who)
        return await judged(crew, who, *more)

    monkeypatch.setattr(Crew, "attempt", attempt)
    tried = try_all(KINDS[0], [BASE], 2, first_only=True)
    assert [one.when for one in tried] == ["nth=1", "nth=2", "without the fault"]
    assert tried[-1].found == try_pair(KINDS[0], BASE, tried[-1].nth)
    assert not tried[-1].found.hit


def test_without_anybody_who_decides_no_occurrence_happens() -> None:
    """Nor where somebody wants others."""
    assert not Chance(Controls(nth=EVERY), Random(1)).fires()
    assert not of((2,)).run(lambda: Chance(Controls(nth=EVERY), Random(1)).fires())


def test_memory_that_is_shared_is_not_forked() -> None:
    """A machine with coherent memory is run anew each time."""
    assert can_fork(MACHINE)
    assert not can_fork(COHERENT)
    assert not can_fork(SCENARIOS["coherent"].machine)


async def test_the_inside_of_trio_is_known() -> None:
    """If this fails with a new trio, `hmmnet.sim.schedule.part` has to learn its inside."""
    await trio.lowlevel.checkpoint()
    assert can_part()
