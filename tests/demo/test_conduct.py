"""The demo's course: what ends it early."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
import trio.testing

from hmmnet.demo import conduct
from hmmnet.demo.answers import Answers, answers_for
from hmmnet.demo.conduct import Conductor, DemoTimeout, Started
from hmmnet.demo.data import Input

TEXT = b"to be or not to be"


async def test_a_long_text_that_plain_python_reads_holds_up_nobody_who_wants_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the demo at once; the thread that reads goes with the process."""
    begun, read = threading.Event(), threading.Event()

    def slowly(text: bytes) -> Answers:
        begun.set()
        read.wait(60)
        return answers_for(text)

    monkeypatch.setattr(conduct, "answers_for", slowly)
    with tempfile.TemporaryDirectory(prefix="hn-") as folder:
        monkeypatch.setenv("HMMNET_DIR", folder)
        with trio.fail_after(30), trio.CancelScope() as scope:

            async def leave() -> None:
                await trio.to_thread.run_sync(begun.wait)
                scope.cancel()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(leave)
                await Conductor(Input(TEXT, "a text", 1), "two-gpus", 1, lambda _: None, lambda _: None, rate=1.0).run()
        assert scope.cancelled_caught
    read.set()


@dataclass
class Idle:
    """A machine that is there at once, and on which nothing ever comes to an end."""

    rate: float
    device_names: tuple[str, ...] = ("gpu0", "gpu1")


@asynccontextmanager
async def launched(topology: str, rate: float, seed: int) -> AsyncIterator[Idle]:
    assert (topology, seed) == ("two-gpus", 1)
    yield Idle(rate)


@asynccontextmanager
async def never(*given: object, **named: object) -> AsyncIterator[Idle]:
    await trio.Event().wait()
    yield Idle(0.0)


async def test_the_text_is_read_when_the_rate_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a start measures would be what the reading leaves over."""
    course: list[str] = []

    @asynccontextmanager
    async def measuring(*given: object, **named: object) -> AsyncIterator[Idle]:
        with trio.move_on_after(0.2):
            while "read" not in course:
                await trio.sleep(0.01)
        course.append("measured")
        yield Idle(0.5)

    def read(text: bytes) -> Answers:
        course.append("read")
        return answers_for(text)

    monkeypatch.setattr("hmmnet.machine.launch", measuring)
    monkeypatch.setattr(conduct, "answers_for", read)
    with trio.move_on_after(5) as scope:
        await Conductor(Input(TEXT, "a text", 1), "two-gpus", 1, lambda _: scope.cancel(), lambda _: None, during=never).run()
    assert course == ["measured", "read"]


async def test_a_demo_that_takes_too_long_says_what_may_be_slow(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """The links at that rate: nothing may be wrong."""
    monkeypatch.setattr("hmmnet.machine.launch", launched)
    started: list[Started] = []
    conductor = Conductor(Input(TEXT, "a text", 1), "two-gpus", 1, lambda _: None, started.append, rate=1e-7, during=never)
    with pytest.raises(DemoTimeout) as caught:
        await conductor.run()
    assert [one.rate for one in started] == [1e-7]
    assert str(caught.value) == (
        "no end after 120 s: the links of two-gpus are slow, at a rate of 1e-07; give it another --rate or less text, "
        'or ask "hmmnet doctor"'
    )
    assert autojump_clock.current_time() == pytest.approx(120.0, abs=0.01)


async def test_a_machine_that_does_not_start_is_not_helped_by_less_text(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Nor by another rate."""
    monkeypatch.setattr("hmmnet.machine.launch", never)
    conductor = Conductor(Input(TEXT, "a text", 1), "two-gpus", 1, lambda _: None, lambda _: None, rate=1e-7)
    with pytest.raises(DemoTimeout) as caught:
        await conductor.run()
    assert str(caught.value) == 'no end after 120 s: the machine did not start; ask "hmmnet doctor"'
    assert autojump_clock.current_time() == pytest.approx(120.0, abs=0.01)
