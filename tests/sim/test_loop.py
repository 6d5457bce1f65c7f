"""The short loop of a simulation: the same run as by trio's own, and nothing that comes from outside is overlooked."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest
import trio
import trio.testing
from outcome import Value
from trio._core import _run as trio_run

from hmmnet import simulate
from hmmnet.sim import loop as loop_module
from hmmnet.sim import run_virtual
from hmmnet.sim.loop import KNOWN, LOOP, ShortRunner, short_loops

from .story import story


async def runner_is_short() -> bool:
    """Whether this run has the short loop."""
    return isinstance(trio_run.GLOBAL_RUN_CONTEXT.runner, ShortRunner)


def test_a_simulation_has_it_and_other_runs_have_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the run for which it is there, and only with a trio from whose loop it was made."""
    assert run_virtual(runner_is_short) is (trio.__version__ in KNOWN)
    assert not trio.run(runner_is_short)
    with short_loops(trio.testing.MockClock()):
        assert not trio.run(runner_is_short)
    monkeypatch.setattr(loop_module, "KNOWN", frozenset[str]())
    assert not run_virtual(runner_is_short)


def test_it_is_gone_afterwards() -> None:
    """However the run ended."""
    own = getattr(trio_run, LOOP)

    async def fails() -> None:
        raise ValueError("so it ends")

    with pytest.raises(ValueError, match="so it ends"):
        run_virtual(fails)
    assert getattr(trio_run, LOOP) is own


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_is_the_same_by_either_loop(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Every message at the same time, in the same order."""
    short = simulate(story, seed=seed)
    monkeypatch.setattr(loop_module, "KNOWN", frozenset[str]())
    assert simulate(story, seed=seed).digest == short.digest


def test_instruments_are_told_by_trios_own_loop() -> None:
    """Who wants to watch a run gets one that can be watched."""

    class Steps(trio.abc.Instrument):
        def __init__(self) -> None:
            self.seen = 0

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            self.seen += 1

    steps, clock = Steps(), trio.testing.MockClock()
    with short_loops(clock):
        trio.run(runner_is_short, clock=clock, instruments=[steps])
    assert steps.seen


def test_those_who_wait_until_all_are_blocked_go_on_one_after_the_other() -> None:
    """First who waits for less, and nobody while a task can run."""

    async def main() -> list[str]:
        seen: list[str] = []

        async def idle(name: str, cushion: float) -> None:
            await trio.testing.wait_all_tasks_blocked(cushion)
            seen.append(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(idle, "later", 0.002)
            nursery.start_soon(idle, "first", 0.0)
            for _ in range(50):
                await trio.lowlevel.checkpoint()
            seen.append("busy no more")
        return seen

    assert run_virtual(main) == ["busy no more", "first", "later"]


def test_a_thread_is_heard_while_tasks_run_all_the_time() -> None:
    """The world outside is looked at now and then, though nobody waits for it."""

    async def main() -> int:
        turns = 0
        done = trio.Event()

        async def thread() -> None:
            await trio.to_thread.run_sync(time.sleep, 0.01)
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(thread)
            while not done.is_set():
                turns += 1
                await trio.lowlevel.checkpoint()
        return turns

    assert run_virtual(main) > 1


def test_ctrl_c_ends_a_run_that_is_busy_and_one_that_waits() -> None:
    """Whether the main task runs at that moment or not."""

    async def busy() -> None:
        signal.raise_signal(signal.SIGINT)
        while True:
            await trio.lowlevel.checkpoint()

    async def waits() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, signal.raise_signal, signal.SIGINT)
            await trio.sleep_forever()

    for main in (busy, waits):
        with pytest.raises(KeyboardInterrupt):
            run_virtual(main)


def test_what_is_no_message_of_trio_is_an_error_of_who_said_it() -> None:
    """As with trio's own loop."""

    class Odd:
        def __await__(self) -> Any:
            yield "something else"

    async def main() -> None:
        await Odd()

    with pytest.raises(TypeError, match="another framework"):
        run_virtual(main)


def test_a_coroutine_that_is_detached_has_ended_for_trio() -> None:
    """What is permanently detached goes on elsewhere."""

    async def main() -> str:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leave)
        return "and the others go on"

    async def leave() -> None:
        await trio.lowlevel.permanently_detach_coroutine_object(Value(None))

    assert run_virtual(main) == "and the others go on"
