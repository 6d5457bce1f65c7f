"""Requests and notes of sessions over a wire of the test's making: each takes effect once, whatever the wire does.

Time is trio's mock clock and jumps, so leases and repeats cost nothing.
"""

from __future__ import annotations

import random

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from hmmnet.errors import (
    BusError,
    HmmnetError,
    KernelError,
    Mistakes,
    PlanError,
    ProtocolError,
    RemoteError,
    SegmentationFault,
    TopologyError,
    WrongUse,
)
from hmmnet.faults.effects import InVain
from hmmnet.topology.problems import Problem
from hmmnet.wire.exchange import RETRY_S, WINDOW
from hmmnet.wire.failures import failure
from hmmnet.wire.messages import Call, CloseContext, Done, Failed, FreeFrames, Inspect, MigrateDone, OpenContext, Report
from hmmnet.wire.reading import Reader

from .lines import World


async def test_a_request_is_answered(world: World, autojump_clock: MockClock) -> None:
    """By a function, by a coroutine function, inline or not; None answers Done."""

    async def slow(message: CloseContext) -> None:
        await trio.sleep(1)

    async def inline(message: OpenContext) -> Done:
        await trio.lowlevel.checkpoint()
        return Done()

    world.device.on(Inspect, lambda _: Report(b"figures"))
    world.device.on(CloseContext, slow)
    world.device.on(OpenContext, inline, inline=True)
    assert await world.host.request(Inspect()) == Report(b"figures")
    assert await world.host.request(CloseContext(1)) == Done()
    assert await world.host.ask(OpenContext(1, 2), Done) == Done()


async def test_answers_find_their_requests(world: World, autojump_clock: MockClock) -> None:
    """In whatever order they come."""

    async def answer_later(message: CloseContext) -> Report:
        await trio.sleep(10 - message.context)
        return Report(bytes([message.context]))

    world.device.on(CloseContext, answer_later)
    pending = [world.host.begin(CloseContext(i)) for i in range(10)]
    assert not any(each.answered for each in pending)
    assert [await each.wait() for each in pending] == [Report(bytes([i])) for i in range(10)]
    assert pending[0].answered


async def test_a_long_request_holds_up_nothing(world: World, autojump_clock: MockClock) -> None:
    """Far more requests than the window are served while one runs."""
    world.device.on(Inspect, lambda _: Report(b""))
    finish = trio.Event()

    async def run_long(message: CloseContext) -> None:
        await finish.wait()

    world.device.on(CloseContext, run_long)
    long = world.host.begin(CloseContext(1))
    for _ in range(2 * WINDOW):
        await world.host.request(Inspect())
    assert not long.answered
    finish.set()
    assert await long.wait() == Done()


@pytest.mark.parametrize("shared", [False, True])
async def test_an_answer_can_be_waited_for_for_a_while_or_cancelled_or_not(world: World, autojump_clock: MockClock, shared: bool) -> None:
    """Whoever reads. What was not waited for to the end is there for who asks again."""

    async def slow(message: CloseContext) -> None:
        await trio.sleep(1)

    world.device.on(CloseContext, slow)
    world.host.reader = Reader(trio.sleep_forever, None) if shared else None
    began_s = trio.current_time()
    pending = world.host.begin(CloseContext(1))
    await pending.comes_by(began_s + 0.25)
    assert [pending.answered] == [False]
    assert trio.current_time() - began_s == pytest.approx(0.25)
    with trio.move_on_after(0.25) as scope:
        await pending.wait()
    assert scope.cancelled_caught
    with trio.move_on_after(0.1):
        assert await pending.wait_shielded() == Done()
    assert trio.current_time() - began_s == pytest.approx(1.0)
    assert pending.answered
    with trio.move_on_after(0.1) as scope:
        assert await world.host.ask_shielded(CloseContext(2), Done) == Done()
    with pytest.raises(ProtocolError, match="answered CloseContext with Done, not Report"):
        await world.host.ask_shielded(CloseContext(3), Report)


def test_what_the_host_says_to_people_is_a_sentence() -> None:
    """Its own words come without the path that they took; what is a mistake of the program says where it was met."""
    for kind, becomes in (("HmmnetError", RemoteError), ("WrongUse", WrongUse)):
        said = failure("host", Failed(0, "Call", f"{kind}: no fault has number 3"))
        assert (type(said), str(said)) == (becomes, "no fault has number 3")
    assert str(failure("host", Failed(0, "Call", "KeyError: 3"))) == "host: Call: KeyError: 3"
    said = failure("host", Failed(0, "Migrate", "WrongUse: no such thing"))
    assert (type(said), str(said)) == (RemoteError, "host: Migrate: WrongUse: no such thing")


@pytest.mark.parametrize("kind", [PlanError, TopologyError])
async def test_mistakes_that_a_host_finds_arrive_as_they_are(
    world: World, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, kind: type[Mistakes]
) -> None:
    """Each with its place, its cause and its mend; the host has a line about it in its log, and no crash."""
    problems = [
        Problem("my.toml", 3, "fault 1", "on", "no such device", "there is gpu0"),
        Problem("my.toml", 7, "", "falt", "no section"),
    ]

    def refuse(_: Call) -> Report:
        raise kind(problems)

    world.host.on(Call, refuse)
    with pytest.raises(kind) as caught:
        await world.device.request(Call("add_fault", b""))
    assert caught.value.problems == ["my.toml:3: fault 1: on: no such device; there is gpu0", "my.toml:7: falt: no section"]
    assert str(caught.value) == str(kind(problems))
    assert [(record.levelname, record.exc_info) for record in caplog.records] == [("WARNING", None)]


async def test_a_mistake_of_a_kind_that_only_the_host_knows_is_one_at_the_other_end(
    world: World, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Who asks for a fault on nobody has made a mistake, and no host has failed."""

    def refuse(_: Call) -> Report:
        raise InVain("there is no process 4242; those that run are 1")

    world.host.on(Call, refuse)
    with pytest.raises(WrongUse) as caught:
        await world.device.request(Call("add_fault", b""))
    assert (type(caught.value), str(caught.value)) == (WrongUse, "there is no process 4242; those that run are 1")
    assert [(record.levelname, record.exc_info) for record in caplog.records] == [("WARNING", None)]


@pytest.mark.parametrize(
    ("raised", "arrives"),
    [
        (KernelError(22, "migrate_vma_setup", "range is empty"), KernelError(22, "migrate_vma_setup", "range is empty")),
        (SegmentationFault(0x7F00, "no mapping"), SegmentationFault(0x7F00, "no mapping")),
        (BusError(0x1000, 'its only copy was on device "gpu0"'), BusError(0x1000, 'its only copy was on device "gpu0"')),
        (ZeroDivisionError("by zero"), RemoteError("gpu0: Inspect: ZeroDivisionError: by zero")),
        (HmmnetError("no such thing"), RemoteError("gpu0: Inspect: HmmnetError: no such thing")),
        (ProtocolError("no such stream"), RemoteError("gpu0: Inspect: ProtocolError: no such stream")),
    ],
)
@pytest.mark.parametrize("waits", [False, True])
async def test_a_failure_arrives_as_what_it_is(
    world: World, autojump_clock: MockClock, raised: Exception, arrives: Exception, waits: bool
) -> None:
    """Modelled errors as themselves, everything else as RemoteError with its text; the session lives on."""

    def fail(_: Inspect) -> Report:
        raise raised

    async def fail_later(_: Inspect) -> Report:
        await trio.sleep(1)
        raise raised

    if waits:
        world.device.on(Inspect, fail_later)
    else:
        world.device.on(Inspect, fail)
    for _ in range(2):
        with pytest.raises(type(arrives)) as caught:
            await world.host.request(Inspect())
        assert str(caught.value) == str(arrives)
    assert world.host.lost is None
    assert world.device.lost is None


async def test_a_failure_of_ours_is_logged_where_it_happened(
    world: World, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """With its traceback, at the side that raised."""

    def fail(_: Inspect) -> Report:
        raise ZeroDivisionError

    world.device.on(Inspect, fail)
    with pytest.raises(RemoteError):
        await world.host.request(Inspect())
    assert [record.exc_info is not None for record in caplog.records if record.levelname == "ERROR"] == [True]


async def test_an_unexpected_answer_is_the_peers_fault(world: World, autojump_clock: MockClock) -> None:
    """`ask` tells what came instead."""
    world.device.on(Inspect, lambda _: Done())
    with pytest.raises(ProtocolError, match="gpu0 answered Inspect with Done, not Report"):
        await world.host.ask(Inspect(), Report)


async def test_a_request_that_nobody_handles(world: World, autojump_clock: MockClock) -> None:
    """Answered at once, so that its sender does not wait."""
    with pytest.raises(RemoteError, match="not a message that this end handles"):
        await world.host.request(Inspect())


async def test_inline_order(world: World, autojump_clock: MockClock) -> None:
    """What was sent before an answer is seen before it: an invalidation, then the words that it would make stale."""
    seen: list[str] = []
    world.device.on(FreeFrames, lambda _: seen.append("note"))

    async def invalidate(_: CloseContext) -> None:
        seen.append("invalidate")
        await trio.lowlevel.checkpoint()
        seen.append("quiet")

    world.device.on(CloseContext, invalidate, inline=True)

    def answer(_: Inspect) -> Report:
        world.host.note(FreeFrames(b""))
        world.host.begin(CloseContext(1))
        return Report(b"")

    world.host.on(Inspect, answer)
    await world.device.request(Inspect())
    seen.append("answer")
    assert seen == ["note", "invalidate", "quiet", "answer"]


async def test_notes_take_effect_once_each_in_order(world: World, autojump_clock: MockClock) -> None:
    """Over lines that lose a third and double some: nothing lost, nothing twice."""
    chance = random.Random(7)
    for line in (world.out, world.home):
        line.fate = lambda _: chance.choice((0, 1, 1, 2))
    seen: list[int] = []
    world.device.on(MigrateDone, lambda message: seen.append(message.migration))
    for i in range(500):
        world.host.note(MigrateDone(i))
    while len(seen) < 500:
        await trio.sleep(0.1)
    assert seen == list(range(500))
    assert world.host.lost is None


async def test_requests_take_effect_once_each(world: World, autojump_clock: MockClock) -> None:
    """Over lossy lines each request is carried out once and answered once, whichever way the loss was."""
    chance = random.Random(8)
    for line in (world.out, world.home):
        line.fate = lambda _: chance.choice((0, 1, 1, 2))
    served: list[int] = []

    async def serve(message: OpenContext) -> Report:
        served.append(message.context)
        await trio.sleep(chance.random())
        return Report(bytes([message.context % 251]))

    world.device.on(OpenContext, serve)
    answers: dict[int, object] = {}

    async def ask(i: int) -> None:
        answers[i] = await world.host.request(OpenContext(i, 0))

    async with trio.open_nursery() as nursery:
        for i in range(100):
            nursery.start_soon(ask, i)
    assert sorted(served) == list(range(100))
    assert answers == {i: Report(bytes([i % 251])) for i in range(100)}


async def test_a_lost_frame_is_repeated_at_once_when_others_follow(world: World, autojump_clock: MockClock) -> None:
    """The receiver reports the gap; nobody waits for a timer."""
    losses = iter([0])
    world.out.fate = lambda _: next(losses, 1)
    world.device.on(Inspect, lambda _: Report(b""))
    begun_s = trio.current_time()
    first, second = world.host.begin(Inspect()), world.host.begin(Inspect())
    await first.wait()
    await second.wait()
    assert trio.current_time() - begun_s < RETRY_S / 2


async def test_a_full_queue_only_delays(world: World, autojump_clock: MockClock) -> None:
    """What the transport has no room for counts as lost on the way."""
    world.device.on(Inspect, lambda _: Report(b""))
    world.out.full = True
    pending = world.host.begin(Inspect())
    world.out.full = False
    await pending.wait()


async def test_a_cancelled_wait_leaves_the_session_in_order(world: World, autojump_clock: MockClock) -> None:
    """The request is carried out all the same, and its late answer disturbs nobody."""
    served = trio.Event()

    async def serve(_: CloseContext) -> None:
        await trio.sleep(1)
        served.set()

    world.device.on(CloseContext, serve)
    world.device.on(Inspect, lambda _: Report(b""))
    with trio.move_on_after(0.1) as scope:
        await world.host.request(CloseContext(1))
    assert scope.cancelled_caught
    await served.wait()
    await world.host.request(Inspect())
    assert world.host.refused == 0


async def test_one_way_traffic_is_acknowledged_before_the_window_ends(world: World, autojump_clock: MockClock) -> None:
    """Notes in one burst, twice the window: all arrive without a wait for heartbeats to make room."""
    seen = 0

    def count(_: MigrateDone) -> None:
        nonlocal seen
        seen += 1

    world.device.on(MigrateDone, count)
    begun_s = trio.current_time()
    for i in range(2 * WINDOW):
        world.host.note(MigrateDone(i))
    await wait_all_tasks_blocked()
    assert seen == 2 * WINDOW
    assert trio.current_time() - begun_s < 0.2
