"""Rounds that are not trio's own: whatever runs in them runs as it does in trio's."""

from __future__ import annotations

import math
import types
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
from outcome import Value
from trio._core import _run as trio_run

import hmmnet
from hmmnet.pages import PAGE_SIZE
from hmmnet.sim import SimulatedMachine, rounds, run_virtual, schedule
from hmmnet.sim.schedule import seeded
from hmmnet.sim.scopes import OURS
from hmmnet.sleeping import WakingClock

PAGES = 64


@pytest.fixture(params=["ours", "trio's"])
def whose(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose rounds a run has."""
    if request.param != "ours":
        monkeypatch.setattr(rounds, "KNOWN", ())
    return str(request.param)


def test_beside_another_trio_all_rounds_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose `unrolled_run` nobody has compared with `rounds` yet: slower, and right."""
    monkeypatch.setattr(trio, "__version__", "9.9.9")
    assert rounds.files() is getattr(trio_run, rounds.FILES)


async def _life(machine: SimulatedMachine) -> int:
    """Migrations, faults, a fork, deaths: tasks begin, end, fail and are cancelled."""
    process = await machine.create_process()
    address = await process.mmap(PAGES * PAGE_SIZE)
    await process.write(address, bytes(PAGES * PAGE_SIZE))
    await process.migrate(address, PAGES * PAGE_SIZE, "gpu0")
    child = await process.fork()
    async with trio.open_nursery() as nursery:
        for at in range(0, PAGES, 8):
            nursery.start_soon(child.store, address + at * PAGE_SIZE, at)
        nursery.start_soon(process.migrate, address, PAGES * PAGE_SIZE, "gpu1")
    with trio.move_on_after(1e-5):
        await process.launch("reduction", "gpu0", a=address, n=PAGES * PAGE_SIZE // 8, dtype="<u8")
    await machine.kill_device("gpu1")
    await trio.sleep(3.0)
    total = sum([int(await child.load(address + at * PAGE_SIZE)) for at in range(0, PAGES, 8)])
    await child.exit()
    await process.exit()
    return total


def test_a_run_has_the_same_trace_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte, with many seeds: the order of tasks, the draws that it is made from, and what they hear."""
    seeds = range(12)
    ours = [hmmnet.simulate(_life, seed=seed) for seed in seeds]
    monkeypatch.setattr(rounds, "KNOWN", ())
    theirs = [hmmnet.simulate(_life, seed=seed) for seed in seeds]
    assert [(run.value, run.digest, run.virtual_s) for run in ours] == [(run.value, run.digest, run.virtual_s) for run in theirs]
    assert len({run.digest for run in ours}) > 1


class Heard(trio.abc.Instrument):
    """What an instrument is told of tasks."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        """See `Instrument`."""
        self.told.append(f"spawned {task.name}")

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        """See `Instrument`."""
        self.told.append(f"scheduled {task.name}")

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """See `Instrument`."""
        self.told.append(f"before {task.name}")

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """See `Instrument`."""
        self.told.append(f"after {task.name}")

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        """See `Instrument`."""
        self.told.append(f"exited {task.name}")


def test_an_instrument_hears_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each step of each task, in order."""

    async def main() -> list[str]:
        heard = Heard()
        trio.lowlevel.add_instrument(heard)
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(trio.sleep, number * 0.1, name=f"task {number}")
        trio.lowlevel.remove_instrument(heard)
        return heard.told

    ours = run_virtual(main, seed=3)
    monkeypatch.setattr(rounds, "KNOWN", ())
    assert ours == run_virtual(main, seed=3)
    assert {"before task 3", "after task 3", "exited task 3"} <= set(ours)


@types.coroutine
def _foreign() -> Generator[str, Any, None]:
    yield "not of trio"


async def _awaits(what: Callable[[], Awaitable[None]]) -> None:
    await what()


def test_what_is_not_trios_is_refused(whose: str) -> None:
    """Where it was awaited, as a TypeError; the run goes on."""

    async def main() -> str:
        await trio.lowlevel.checkpoint()  # from here on rounds are ours
        with pytest.raises(TypeError, match="unrecognized yield message 'not of trio'"):
            await _awaits(_foreign)
        await trio.sleep(1.0)
        return "goes on"

    assert run_virtual(main) == "goes on"


def test_a_task_can_leave_a_run_for_another_scheduler(whose: str) -> None:
    """`permanently_detach_coroutine_object` ends the task with the outcome that it says."""

    async def leave() -> None:
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.permanently_detach_coroutine_object(Value(None))

    async def main() -> str:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leave)
        return "left"

    assert run_virtual(main) == "left"


def test_an_error_shows_no_frame_of_the_scheduler(whose: str) -> None:
    """What a task raises is traced from the task on."""

    async def fail() -> None:
        await trio.lowlevel.checkpoint()
        raise ValueError("broken")

    async def main() -> str:
        with pytest.raises(ExceptionGroup) as raised:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail)
        trace = raised.value.exceptions[0].__traceback__
        assert trace is not None
        return trace.tb_frame.f_code.co_name

    assert run_virtual(main) == "fail"


def test_a_thread_is_heard_while_others_run(whose: str) -> None:
    """A task that is always able to run does not keep the word of a thread from who waits for it."""

    async def main() -> int:
        steps = 0
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                nonlocal steps
                while True:
                    steps += 1
                    await trio.lowlevel.checkpoint()

            nursery.start_soon(run)
            await trio.to_thread.run_sync(partial(sum, range(100)))
            nursery.cancel_scope.cancel()
        return steps

    assert run_virtual(main) > 0


def test_other_clocks_have_trios_own_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a clock that jumps makes the scheduler's looks at files needless."""
    ours, count = rounds._rounds, 0

    def counted(runner: object, clock: WakingClock) -> None:
        nonlocal count
        count += 1
        ours(runner, clock)

    monkeypatch.setattr(rounds, "_rounds", counted)
    with seeded(1):
        trio.run(trio.sleep, 0.01)
        trio.run(trio.sleep, 5.0, clock=trio.testing.MockClock(autojump_threshold=0))
    assert count == 0
    run_virtual(trio.sleep, 1.0)
    assert (count > 0) is (trio.__version__ in rounds.KNOWN)


@pytest.mark.skipif(trio.__version__ not in rounds.KNOWN, reason="all rounds are trio's own")
def test_time_passes_without_a_look_at_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleeps follow each other, and the operating system is asked once in a while."""
    ours, looks, sleeps = rounds._rounds, 0, 10 * rounds.ROUNDS_MAX

    def counted(runner: object, clock: WakingClock) -> None:
        nonlocal looks
        looks += 1
        ours(runner, clock)

    async def main() -> float:
        for _ in range(sleeps):
            await trio.sleep(1.0)
        return trio.current_time()

    monkeypatch.setattr(rounds, "_rounds", counted)
    assert run_virtual(main) == sleeps
    assert 10 <= looks <= 20


def test_a_word_from_outside_is_heard_before_time_passes(whose: str) -> None:
    """As a thread or a signal says it: whoever sleeps meanwhile wakes after it was heard."""

    async def main() -> list[str]:
        heard: list[str] = []
        token = trio.lowlevel.current_trio_token()
        await trio.lowlevel.checkpoint()  # from here on rounds are ours
        token.run_sync_soon(heard.append, "once")
        token.run_sync_soon(heard.append, "often", idempotent=True)
        await trio.sleep(1.0)
        await trio.lowlevel.checkpoint()  # who is woken in the same round may come first
        return heard

    assert run_virtual(main) == ["once", "often"]


async def _hears_of_a_thread(machine: SimulatedMachine) -> int:
    """A word from a thread comes by a file."""
    await machine.create_process()
    return await trio.to_thread.run_sync(lambda: 45)


def test_a_simulation_may_begin_within_another() -> None:
    """A program that is simulated asks for a second machine, in a thread: both hear of their files."""

    async def main() -> int:
        inner = await trio.to_thread.run_sync(partial(hmmnet.simulate, _hears_of_a_thread, seed=2))
        return inner.value

    assert run_virtual(main, seed=3, limit_s=math.inf) == 45


def test_simulations_may_overlap() -> None:
    """Begun first, ended first: the other one goes on, and in the end trio is as it was."""
    places = [
        (trio_run, schedule.CHANCE),
        (trio_run, schedule.HOOKS),
        (trio_run, rounds.FILES),
        *[(place, name) for place, name, _ in OURS],
    ]
    before = [getattr(place, name) for place, name in places]
    first, second = seeded(1), seeded(2)
    first.__enter__()
    second.__enter__()
    chance = getattr(trio_run, schedule.CHANCE)
    first.__exit__(None, None, None)
    assert getattr(trio_run, schedule.CHANCE) is chance
    assert hmmnet.simulate(_hears_of_a_thread, seed=4).value == 45
    second.__exit__(None, None, None)
    assert all(getattr(place, name) is was for (place, name), was in zip(places, before, strict=True))
