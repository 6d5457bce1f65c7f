"""What ends a session, and what does not: silence, goodbyes, a peer that says what cannot be read, or does not keep up.

Time is trio's mock clock and jumps, so leases cost nothing.
"""

from __future__ import annotations

import random

import pytest
import trio
from trio.testing import MockClock

from hmmnet.errors import PeerGone, PeerLost, ProtocolError, RemoteError
from hmmnet.wire.codec import Kind, encode
from hmmnet.wire.exchange import BACKLOG_MAX, LEASE_S, WINDOW
from hmmnet.wire.messages import CloseContext, Done, FreeFrames, Inspect, MigrateDone, Report, Subscribe
from hmmnet.wire.session import PROTOCOL_ERRORS_MAX, Session

from .lines import World, joined


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
