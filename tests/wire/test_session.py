"""Sessions over a wire of the test's making: two of them, joined by a link that can lose, double and hold back frames.

Time is trio's mock clock and jumps, so leases and repeats cost nothing.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from hmmnet.errors import BusError, HmmnetError, KernelError, PeerGone, PeerLost, ProtocolError, RemoteError, SegmentationFault
from hmmnet.wire.codec import Kind, encode
from hmmnet.wire.exchange import BACKLOG_MAX, LEASE_S, RETRY_S, WINDOW
from hmmnet.wire.messages import CloseContext, Done, Failed, FreeFrames, Inspect, MigrateDone, OpenContext, Report, Subscribe
from hmmnet.wire.reading import Reader
from hmmnet.wire.session import PROTOCOL_ERRORS_MAX, Session, failure


class Line:
    """One direction between two sessions. `fate` tells how many copies of a frame arrive."""

    def __init__(self) -> None:
        self.fate: Callable[[bytes], int] = lambda _: 1
        self.full = False
        self.sent: list[bytes] = []
        self._give, self._take = trio.open_memory_channel[bytes](100_000)

    def transmit(self, frame: bytes) -> None:
        if self.full:
            raise trio.WouldBlock
        self.sent.append(frame)
        for _ in range(self.fate(frame)):
            self._give.send_nowait(frame)

    async def carry(self, session: Session) -> None:
        async for frame in self._take:
            more = session.deliver(frame)
            if more is not None:
                await more


class World:
    """A device's session and the host's, and the two lines between them."""

    def __init__(self, patience_s: float) -> None:
        self.out, self.home = Line(), Line()
        self.host = Session(self.out.transmit, peer_name="gpu0", role="device", incarnation=1, patience_s=patience_s)
        self.device = Session(self.home.transmit, peer_name="host", role="host", incarnation=1, patience_s=patience_s)


@asynccontextmanager
async def joined(patience_s: float = 0.0) -> AsyncIterator[World]:
    world = World(patience_s)
    async with trio.open_nursery() as nursery:
        world.host.start(nursery)
        world.device.start(nursery)
        nursery.start_soon(world.out.carry, world.device)
        nursery.start_soon(world.home.carry, world.host)
        yield world
        nursery.cancel_scope.cancel()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with joined() as world:
        yield world


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
    assert str(failure("host", Failed(0, "Call", "HmmnetError: no fault has number 3"))) == "no fault has number 3"
    assert str(failure("host", Failed(0, "Call", "KeyError: 3"))) == "host: Call: KeyError: 3"


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


async def test_heartbeats_keep_an_idle_session(world: World, autojump_clock: MockClock) -> None:
    """An hour without a word from above."""
    await trio.sleep(3600)
    assert world.host.lost is None
    assert world.device.lost is None


async def test_silence_is_loss(world: World, autojump_clock: MockClock) -> None:
    """After the lease both sides know; whoever waits, asks or subscribed hears it, once, with the cause."""
    causes: list[PeerLost] = []
    world.host.on_lost(causes.append)
    world.out.fate = world.home.fate = lambda _: 0
    begun_s = trio.current_time()
    with pytest.raises(PeerLost, match="gpu0 was silent for"):
        await world.host.request(Inspect())
    assert LEASE_S < trio.current_time() - begun_s < LEASE_S + 1
    with pytest.raises(PeerLost, match="gpu0 was silent"):
        await world.host.request(Inspect())
    world.host.note(FreeFrames(b""))
    assert [str(cause) for cause in causes] == [str(world.host.lost)]
    late: list[PeerLost] = []
    world.host.on_lost(late.append)
    assert late == causes
    await trio.sleep(1)
    assert world.device.lost is not None


async def test_patience_outlasts_the_lease(autojump_clock: MockClock) -> None:
    """The silence is told once, at the lease's end; what was asked meanwhile is answered when the peer comes back; then it begins anew."""
    async with joined(patience_s=10 * LEASE_S) as world:
        world.device.on(Inspect, lambda _: Report(b"late"))
        told: list[float] = []
        world.host.on_silent(lambda: told.append(trio.current_time()))
        begun_s = trio.current_time()
        for _ in range(2):
            world.out.fate = world.home.fate = lambda _: 0
            pending = world.host.begin(Inspect())
            await trio.sleep(5 * LEASE_S)
            world.out.fate = world.home.fate = lambda _: 1
            assert await pending.wait() == Report(b"late")
        assert len(told) == 2
        assert LEASE_S < told[0] - begun_s < LEASE_S + 1
        world.out.fate = world.home.fate = lambda _: 0
        with pytest.raises(PeerLost, match="gpu0 was silent for 22"):
            await world.host.request(Inspect())


async def test_a_partition_shorter_than_the_lease_is_survived(world: World, autojump_clock: MockClock) -> None:
    """What was sent meanwhile arrives afterwards."""
    world.device.on(Inspect, lambda _: Report(b"late"))
    world.out.fate = world.home.fate = lambda _: 0
    pending = world.host.begin(Inspect())
    await trio.sleep(LEASE_S * 0.7)
    world.out.fate = world.home.fate = lambda _: 1
    assert await pending.wait() == Report(b"late")


async def test_goodbye(world: World, autojump_clock: MockClock) -> None:
    """Both sides are over, nobody waits, and what still waited for an answer hears it."""
    causes: list[PeerLost] = []
    world.host.on_lost(causes.append)

    async def forever(_: CloseContext) -> None:
        await trio.sleep_forever()

    world.device.on(CloseContext, forever)
    pending = world.host.begin(CloseContext(1))
    begun_s = trio.current_time()
    await world.device.bye()
    assert trio.current_time() == begun_s
    with pytest.raises(PeerGone, match="gpu0 said goodbye"):
        await pending.wait()
    assert isinstance(causes[0], PeerGone)
    assert isinstance(world.device.lost, PeerGone)
    await world.device.bye()


async def test_who_listens_no_more_hangs_up(world: World, autojump_clock: MockClock) -> None:
    """Over at once for whoever waits here; the peer hears goodbye."""
    pending = world.host.begin(CloseContext(1))
    begun_s = trio.current_time()
    world.host.hang_up()
    with pytest.raises(PeerGone, match="listen no more"):
        await pending.wait()
    assert trio.current_time() == begun_s
    await trio.sleep(0.1)
    assert isinstance(world.device.lost, PeerGone)
    world.host.hang_up()


async def test_goodbye_comes_after_what_was_said_before(world: World, autojump_clock: MockClock) -> None:
    """Notes sent before the BYE take effect, even when lines are lossy."""
    chance = random.Random(9)
    world.home.fate = lambda _: chance.choice((0, 1))
    seen: list[int] = []
    world.host.on(MigrateDone, lambda message: seen.append(message.migration))
    for i in range(5):
        world.device.note(MigrateDone(i))
    while world.host.lost is None:
        await world.device.bye()
        await trio.sleep(0.1)
        if world.device.lost is not None:
            break
    assert seen == list(range(len(seen)))


async def test_both_say_goodbye_at_once(world: World, autojump_clock: MockClock) -> None:
    """The two cross, and both are content."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.host.bye)
        nursery.start_soon(world.device.bye)
    assert isinstance(world.host.lost, PeerGone)
    assert isinstance(world.device.lost, PeerGone)


async def test_goodbye_to_nobody_ends(world: World, autojump_clock: MockClock) -> None:
    """A bounded wait, then it is over."""
    world.out.fate = lambda _: 0
    begun_s = trio.current_time()
    await world.host.bye()
    assert trio.current_time() - begun_s < LEASE_S
    assert world.host.lost is not None


async def test_handlers_finish_after_the_loss(world: World, autojump_clock: MockClock) -> None:
    """A migration is undone by its own code, not dropped: what it asks of the peer raises PeerLost."""
    outcome: list[str] = []

    async def migrate(_: Subscribe) -> None:
        try:
            await world.host.request(CloseContext(1))
        except PeerLost:
            await trio.sleep(5)
            outcome.append("restored")
            raise

    async def forever(_: CloseContext) -> None:
        await trio.sleep_forever()

    world.host.on(Subscribe, migrate)
    world.device.on(CloseContext, forever)
    world.device.begin(Subscribe(1, 0, 1))
    await trio.sleep(0.1)
    world.out.fate = world.home.fate = lambda _: 0
    await trio.sleep(LEASE_S + 10)
    assert outcome == ["restored"]


async def test_broken_frames_are_refused_and_counted(world: World, autojump_clock: MockClock) -> None:
    """Each is dropped without effect; a peer that sends too many is given up."""
    world.device.on(Inspect, lambda _: Report(b"still here"))
    broken = [b"", b"garbage", bytes(100), encode(Kind.BYE_ACK, 0, 0), encode(Kind.BEAT, 0, 12345), encode(Kind.HELLO, 0, 0, Inspect())]
    for frame in broken:
        world.device.deliver(frame)
    assert world.device.refused == len(broken)
    assert await world.host.request(Inspect()) == Report(b"still here")
    for _ in range(PROTOCOL_ERRORS_MAX - len(broken)):
        world.device.deliver(b"garbage")
    assert "given up after 16 broken frames" in str(world.device.lost)


async def test_a_request_that_cannot_be_decoded_is_answered(world: World, autojump_clock: MockClock) -> None:
    """Its sender learns why; it does not repeat it forever."""
    pending = world.host.begin(Inspect())
    good = world.out.sent.pop()
    assert good.endswith(b"Inspect")
    world.device.deliver(good.replace(b"Inspect", b"Inspekt"))
    with pytest.raises(RemoteError, match="cannot be decoded"):
        await pending.wait()


async def test_an_answer_that_cannot_be_decoded_fails_its_request(world: World, autojump_clock: MockClock) -> None:
    """The peer's fault, told to who asked. What was agreed on is unknown now, and the peer will not say it again: the session is over."""
    pending = world.host.begin(Inspect())
    world.host.deliver(encode(Kind.REPLY, 1, 1, Done(), answers=1).replace(b"Done", b"Gone"))
    with pytest.raises(ProtocolError, match="cannot be decoded"):
        await pending.wait()
    assert "said what cannot be read" in str(world.host.lost)


async def test_a_note_that_cannot_be_decoded_ends_the_session(world: World, autojump_clock: MockClock) -> None:
    """Nobody waits for an answer to it that could be an error."""
    world.host.deliver(encode(Kind.NOTE, 1, 0, Done()).replace(b"Done", b"Gone"))
    assert "said what cannot be read" in str(world.host.lost)


async def test_an_answer_to_nothing_is_refused(world: World, autojump_clock: MockClock) -> None:
    """Counted as broken."""
    world.host.deliver(encode(Kind.REPLY, 1, 0, Done(), answers=77))
    assert world.host.refused == 1


async def test_reset_ends_the_session(world: World, autojump_clock: MockClock) -> None:
    """The other end knows nothing of us: no need to wait for the lease."""
    pending = world.device.begin(Inspect())
    world.device.deliver(encode(Kind.RESET, 0, 0))
    with pytest.raises(PeerLost, match="knows no session with us"):
        await pending.wait()


async def test_a_peer_that_does_not_read_is_given_up(world: World, autojump_clock: MockClock) -> None:
    """When too much waits for it; memory has an end."""
    world.out.fate = lambda _: 0
    for _ in range(WINDOW + BACKLOG_MAX + 1):
        world.host.note(MigrateDone(1))
    assert "does not keep up" in str(world.host.lost)


async def test_a_request_that_ends_the_session_is_answered_with_that(world: World, autojump_clock: MockClock) -> None:
    """The last that the peer has not room for, or one that finds its connection closed here: not left to wait for ever."""
    world.out.fate = lambda _: 0
    pending = [world.host.begin(Inspect()) for _ in range(WINDOW + BACKLOG_MAX + 1)]
    for each in (pending[0], pending[-1]):
        with pytest.raises(PeerLost, match="does not keep up"):
            await each.wait()

    def closed(_: bytes) -> None:
        raise trio.ClosedResourceError

    session = Session(closed, peer_name="gpu1", role="device", incarnation=1)
    begun = session.begin(Inspect())
    assert begun.answered
    with pytest.raises(PeerLost, match="closed here"):
        await begun.wait()


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
