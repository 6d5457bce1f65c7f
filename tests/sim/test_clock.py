"""The clock that jumps, and what it leaves alone."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise
from random import Random
from threading import Timer
from types import SimpleNamespace

import pytest
import trio
import trio.testing
from trio._core import _run as trio_run

from hmmnet.errors import HmmnetError
from hmmnet.sim import clock as clock_module
from hmmnet.sim import run_virtual
from hmmnet.sim.clock import IDLE_S, PRUNE_MIN, JumpClock, VirtualClock
from hmmnet.sim.rounds import FILES
from hmmnet.sim.run import SimulationStuck
from hmmnet.sim.schedule import HOOKS, ORDERED, Shuffler, seeded
from hmmnet.sleeping import Bell, sleep, sleep_until


def test_time_is_at_the_next_deadline_when_nobody_can_run() -> None:
    """Sleeps end exactly when they should, in their order, and take no real time."""

    async def main() -> list[tuple[str, float]]:
        seen: list[tuple[str, float]] = []

        async def sleep(name: str, seconds: float) -> None:
            await trio.sleep(seconds)
            seen.append((name, trio.current_time()))

        async with trio.open_nursery() as nursery:
            for name, seconds in (("long", 1e6), ("short", 0.1), ("tiny", 1e-9)):
                nursery.start_soon(sleep, name, seconds)
        return seen

    assert run_virtual(main, limit_s=1e7) == [("tiny", 1e-9), ("short", 0.1), ("long", 1e6)]


def test_sleeps_of_both_kinds_end_at_the_same_moments() -> None:
    """What the clock wakes by itself, and what trio does: in one order, also after others were cancelled."""

    async def main() -> list[tuple[str, float]]:
        seen: list[tuple[str, float]] = []

        async def asleep(name: str, nap: Callable[[float], Awaitable[None]], seconds: float) -> None:
            await nap(seconds)
            seen.append((name, trio.current_time()))

        async with trio.open_nursery() as nursery:
            for seconds in (0.3, 0.1, 0.2):
                nursery.start_soon(asleep, "ours", sleep, seconds)
                nursery.start_soon(asleep, "trio", trio.sleep, seconds + 0.05)
            nursery.start_soon(asleep, "until", sleep_until, 0.12)
            with trio.move_on_after(0.05) as scope:
                await sleep(math.inf)
            assert scope.cancelled_caught
            with trio.move_on_at(0.11):
                await sleep_until(0.115)
        return seen

    assert run_virtual(main) == [
        ("ours", 0.1),
        ("until", 0.12),
        ("trio", pytest.approx(0.15)),
        ("ours", 0.2),
        ("trio", 0.25),
        ("ours", 0.3),
        ("trio", pytest.approx(0.35)),
    ]


def test_a_sleep_that_is_over_lets_others_run_and_no_time_pass() -> None:
    """As trio's; less than nothing is refused."""

    async def main() -> tuple[float, list[int]]:
        turns: list[int] = []

        async def other() -> None:
            turns.append(1)

        async with trio.open_nursery() as nursery:
            await sleep(1.0)
            nursery.start_soon(other)
            await sleep(0.0)
            await sleep_until(0.5)
            ran = list(turns)
            with pytest.raises(ValueError, match="non-negative"):
                await sleep(-1.0)
        return trio.current_time(), ran

    assert run_virtual(main) == (1.0, [1])


def test_in_real_time_it_is_trios_sleep() -> None:
    """To the clock of a run in real time nothing is asked that trio does not."""

    async def main() -> float:
        began_s = trio.current_time()
        await sleep(0.01)
        await sleep_until(began_s + 0.02)
        return trio.current_time() - began_s

    assert trio.run(main) >= 0.02


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 100])
def test_the_order_is_what_python_would_draw(count: int) -> None:
    """A faster shuffle, and not another one: kept seeds stay what they are."""
    for seed in range(20):
        ours, pythons = list(range(count)), list(range(count))
        Shuffler(seed).shuffle(ours)
        Random(seed).shuffle(pythons)
        assert ours == pythons


def test_who_was_woken_by_others_is_forgotten() -> None:
    """Though time has not come to when the clock would have woken him."""

    async def main() -> int:
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, JumpClock)
        bell, longest = Bell(), 0

        async def ring() -> None:
            while True:
                await trio.lowlevel.checkpoint()
                bell.ring()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ring)
            for _ in range(3 * PRUNE_MIN):
                await bell.heard_by(trio.current_time() + 5.0)
                longest = max(longest, len(clock._sleepers))
            nursery.cancel_scope.cancel()
        return longest

    assert run_virtual(main) <= PRUNE_MIN + 1


async def shielded_sleep() -> None:
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()


@pytest.mark.parametrize("waits", [shielded_sleep, lambda: Bell().heard_at_last()], ids=["scope", "bell"])
def test_a_run_in_which_nothing_can_happen_any_more_is_given_up(
    waits: Callable[[], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shielded from the limit on virtual time, and from everything else."""
    monkeypatch.setattr(clock_module, "IDLE_S", 0.05)
    with pytest.raises(SimulationStuck, match=r"no end after 3 virtual seconds \(seed 7\): tasks wait for each other"):
        run_virtual(waits, seed=7, limit_s=3.0)


def test_a_thread_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody waits for it, so something can happen yet: nobody's shield falls."""
    fallen: list[str] = []
    monkeypatch.setattr(clock_module, "IDLE_S", 0.05)
    monkeypatch.setattr(clock_module, "drop_shields", lambda: fallen.append("shield"))

    async def main() -> str:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(time.sleep, 0.3)
        return "done"

    assert run_virtual(main, limit_s=3.0) == "done"
    assert not fallen


@pytest.mark.parametrize(
    ("waited_s", "looks", "worked_s", "asleep_for_ever"),
    [(5.0, 1, 0.0, True), (4.9, 1, 0.0, False), (5.0, 2, 0.0, False), (0.1, 2, 60.0, False)],
    ids=["nobody came", "too early to say", "a word in the last moment", "a word, then long work"],
)
def test_only_waits_in_which_nothing_comes_are_idle(
    waited_s: float, looks: int, worked_s: float, asleep_for_ever: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock as the scheduler uses it: how long to sleep, a look after that, another after each round in which somebody ran."""
    fallen: list[str] = []
    real_s = 0.0
    monkeypatch.setattr(clock_module, "time", SimpleNamespace(monotonic=lambda: real_s))
    monkeypatch.setattr(clock_module, "drop_shields", lambda: fallen.append("shield"))

    async def main() -> None:
        nonlocal real_s
        clock = JumpClock()
        assert clock.deadline_to_sleep_time(math.inf) == IDLE_S
        real_s += waited_s
        for _ in range(looks):
            clock.current_time()
            real_s += worked_s
        clock.deadline_to_sleep_time(math.inf)
        assert clock.deadlocked is asleep_for_ever

    trio.run(main)
    assert bool(fallen) is asleep_for_ever


def test_shields_that_free_nobody_fall_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who cannot be cancelled is waited for, not asked again and again."""
    fallen: list[float] = []
    monkeypatch.setattr(clock_module, "IDLE_S", 0.05)
    monkeypatch.setattr(clock_module, "drop_shields", lambda: fallen.append(time.monotonic()))

    async def main() -> str:
        token, word = trio.lowlevel.current_trio_token(), trio.Event()
        Timer(0.4, token.run_sync_soon, [word.set]).start()
        with trio.CancelScope(shield=True):
            await trio.sleep(4.0)
            await word.wait()
        return "done"

    assert run_virtual(main, limit_s=3.0) == "done"
    assert fallen
    assert all(later_s - earlier_s >= 0.05 for earlier_s, later_s in pairwise(fallen))


def test_who_waits_until_all_are_blocked_comes_first() -> None:
    """As with trio's own: time does not jump past them."""

    async def main() -> float:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, 5.0)
            await trio.testing.wait_all_tasks_blocked()
            before = trio.current_time()
            nursery.cancel_scope.cancel()
        return before

    assert run_virtual(main) == 0.0


@pytest.mark.parametrize("name", [ORDERED, "_r", HOOKS, FILES])
def test_a_trio_that_is_another_inside_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Loudly, and before anything runs: without its private names no run could be repeated."""
    monkeypatch.delattr(trio_run, name)
    with pytest.raises(HmmnetError, match="cannot be scheduled from a seed"), seeded(1):
        pytest.fail("nothing runs")


def test_nobody_waits_for_the_clock_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes in circles is found; the count begins anew whenever time passes."""
    monkeypatch.setattr(JumpClock.__init__, "__defaults__", (1000,))

    async def main() -> str:
        for _ in range(5):
            await trio.sleep(1.0)
            for _ in range(100):
                await trio.lowlevel.checkpoint()
        return "through"

    assert run_virtual(main) == "through"

    async def circle() -> None:
        while True:
            await trio.lowlevel.checkpoint()

    with pytest.raises(SimulationStuck, match="time stands still at 0 virtual seconds"):
        run_virtual(circle)


def test_ctrl_c_is_ctrl_c_whatever_ends_with_it() -> None:
    """Who interrupts a run gets KeyboardInterrupt, not a group in which it is."""

    async def failing() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise HmmnetError("interrupted")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(failing)
            await trio.sleep(1.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_virtual(main)


def test_a_sleep_at_another_rate_ends() -> None:
    """A clock that is skewed may miss its moment by less than a float can say: it is slept to the next moment there is, not for ever."""

    async def main() -> int:
        clock = VirtualClock()
        clock.set_rate(0.521784)
        for step in range(1, 2000):
            await clock.sleep_until(step * 0.137)
            assert clock.now() >= step * 0.137
        return step

    assert run_virtual(main, limit_s=1e4) == 1999


@pytest.mark.parametrize(("change", "wakes_s"), [("faster", 1.9), ("slower", 91.0), ("ahead", 1.0), ("adopted", 3.0)])
def test_who_sleeps_notices_a_new_rate_at_once(change: str, wakes_s: float) -> None:
    """Of ten emulated seconds one has passed: it wakes when the other nine have, by the clock as it is now."""

    async def main() -> tuple[float, float]:
        clock = VirtualClock()
        woken: list[float] = []

        async def slumber() -> None:
            await clock.sleep_until(10.0)
            woken.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(slumber)
            nursery.start_soon(clock.sleep, 10.0)
            await trio.sleep(1.0)
            if change == "ahead":
                clock.disturb(20.0, 1.0)
            elif change == "adopted":
                clock.adopt(0.0, 7.0, 1.0)
            else:
                clock.set_rate(10.0 if change == "faster" else 0.1)
        return woken[0], trio.current_time()

    assert run_virtual(main) == pytest.approx((wakes_s, wakes_s))


def test_a_sleep_that_is_cancelled_is_forgotten() -> None:
    """And one of no time lets others run."""

    async def main() -> float:
        clock = VirtualClock()
        with trio.move_on_after(1.0):
            await clock.sleep(5.0)
        clock.set_rate(2.0)
        assert not clock._sleepers
        await clock.sleep(0.0)
        return trio.current_time()

    assert run_virtual(main) == 1.0
