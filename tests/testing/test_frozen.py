"""A simulated machine for tests that block: time passes in calls only, and one seed is one run."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio

from hmmnet.errors import BusError, HmmnetError, KernelError
from hmmnet.faults import Controls, MessageFault, Plan, Way
from hmmnet.sim import SimulatedMachine, Trace, simulated
from hmmnet.sim.run import SimulationStuck
from hmmnet.testing import FrozenMachine
from hmmnet.testing.case import Case
from hmmnet.testing.frozen import Frozen
from hmmnet.testing.migrations import Migrations
from hmmnet.testing.worlds import virtual_blocking
from hmmnet.topology.load import load

COUNT = 1 << 13


@contextmanager
def machine(seed: int = 0, trace: Trace | None = None) -> Iterator[FrozenMachine]:
    plan = [MessageFault("loss", controls=Controls(0.02)), MessageFault("reorder", controls=Controls(0.1), jitter_s=0.01)]
    world = Frozen(lambda: simulated("two-gpus", trace=trace, seed=seed, faults=plan), seed)
    made = FrozenMachine(world.start(), world)
    try:
        yield made
    finally:
        world.stop()


def story(seed: int, pause_s: float = 0.0) -> tuple[str, float, int]:
    """A program whose caller takes its time; the digest of the run, its virtual time, the result."""
    trace = Trace()
    with machine(seed, trace) as made:
        process = made.process()
        address = process.malloc(8 * COUNT)
        process.write(address, bytes(8 * COUNT))
        time.sleep(pause_s)

        async def both(inside: SimulatedMachine) -> None:
            awaited = await inside.create_process()
            at = await awaited.malloc(8 * COUNT)
            async with trio.open_nursery() as nursery:
                for device in inside.device_names:
                    nursery.start_soon(lambda name: awaited.launch("reduction", name, a=at, n=COUNT), device)

        made.run(both)
        time.sleep(pause_s)
        made.sleep(0.25)
        total = process.launch("reduction", "gpu1", a=address, n=COUNT).results["sum"]
        virtual_s = made.emulated_s()
    return trace.digest, virtual_s, int(total)


def test_one_seed_one_run() -> None:
    """However long the caller thinks between calls; another seed is another run with the same result."""
    first, again, other = story(5), story(5, pause_s=0.7), story(6)
    assert first == again
    assert first[0] != other[0]
    assert first[2] == other[2] == 0


def test_no_word_from_outside_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls do, one after the other. A word would come in the middle of something, and be one task more to draw from."""
    words: list[object] = []
    monkeypatch.setattr(trio.lowlevel.TrioToken, "run_sync_soon", lambda _, word, *__, **___: words.append(word))
    assert story(5) == story(5)
    assert words == []


def test_time_passes_in_calls_only() -> None:
    """Not while the caller sleeps, and exactly as asked."""
    with machine() as made:
        made.heal()
        before_s = made.emulated_s()
        time.sleep(0.2)
        assert made.emulated_s() == before_s
        made.sleep(3.5)
        assert made.emulated_s() == before_s + 3.5
        assert made.rate == 1.0


def test_devices_and_faults() -> None:
    """What only a machine of tasks can do, without await."""
    with machine() as made:
        made.heal()
        process = made.process()
        address = process.malloc(4096)
        process.store(address, 3)
        process.migrate(address, 4096, "gpu0")
        made.kill_device("gpu0")
        assert list(made.running) == ["gpu1"]
        with pytest.raises(BusError, match="only copy on device"):
            process.load(address)
        with pytest.raises(KernelError, match="ENOENT"):
            made.kill_device("gpu0")
        made.start_device("gpu0")
        assert list(made.running) == list(made.device_names)
        made.hang_device("gpu1")
        made.sleep(0.1)
        made.resume_device("gpu1")
        assert made.ask(lambda inside: inside.injector.active) == {}
        number = made.add_fault(MessageFault("partition", Way("gpu1")))
        made.sleep(1.0)
        made.remove_fault(number)
        assert made.faults_fired()["partition"] > 0
        made.add_fault("ecc.corrected", on="gpu1")
        lasting = made.add_fault("loss", on="gpu1<->host", probability=0.001)
        assert [one["number"] for one in made.list_faults()][-1:] == [lasting]
        made.remove_fault(lasting)
        assert made.faults_fired()["ecc.corrected"] == 1
        assert made.report()["devices"]["gpu0"]["lives"] == 2


def test_what_never_comes_is_found_out() -> None:
    """A call that would wait for ever ends after virtual minutes, and the machine can still be used."""

    async def waits(made: SimulatedMachine) -> None:
        await trio.sleep_forever()

    with machine() as made:
        with pytest.raises(SimulationStuck, match="waits is not over after 600 virtual seconds"):
            made.run(waits)
        process = made.process()
        address = process.malloc(8)
        process.store(address, 1)
        number = made.add_fault("point.pause", on="gpu0", point="migrate.before_copy")
        with pytest.raises(
            SimulationStuck, match=r"migrate is not over (.|\n)* holds host at migrate.before_copy of gpu0 .* remove_fault\(3\)"
        ):
            process.migrate(address, 4096, "gpu0")
        made.remove_fault(number)
        assert process.migrate(address, 4096, "gpu0") in (0, 4096)


def test_errors_are_the_callers() -> None:
    """They come out of the call; one while starting comes out of the start; behind the end there is no machine."""

    async def fails(made: SimulatedMachine) -> None:
        raise ZeroDivisionError

    with machine() as made, pytest.raises(ZeroDivisionError):
        made.run(fails)
    with pytest.raises(HmmnetError, match="has ended"):
        made.process()
    world = Frozen(lambda: simulated("no-such-machine"), 0)
    with pytest.raises(HmmnetError, match="no-such-machine"):
        world.start()


def test_interrupted_call() -> None:
    """Ctrl-C ends the call, and the machine goes on."""
    begun = threading.Event()

    async def computes(made: SimulatedMachine) -> None:
        begun.set()
        while True:
            await trio.lowlevel.checkpoint()

    def interrupt() -> None:
        begun.wait(10)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with machine() as made:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            made.run(computes)
        thread.join()
        assert made.process().malloc(8)


def test_a_case_hears_of_it() -> None:
    """The machine of a fixture tells its story, faults and all."""
    case = Case(3, load("two-gpus"), Plan([MessageFault("duplicate", controls=Controls(0.5))]), 10.0, Migrations())
    with virtual_blocking(case) as made:
        process = made.process()
        process.migrate(process.malloc(4096), 4096, "gpu0")
    texts = " ".join(case.story.shown(100))
    assert "arrives twice (duplicate)" in texts
    assert "host -> gpu0 (asked for by a program)" in texts
    assert case.migrations.pages(to="gpu0") == 1


def test_the_rate_of_a_frozen_machine() -> None:
    """Is set as that of one that awaits, or runs in real time."""
    with machine() as made:
        made.set_rate(0.5)
        assert made.rate == 0.5
        began_s = made.emulated_s()
        made.sleep(3.0)
        assert made.emulated_s() - began_s == pytest.approx(1.5)
