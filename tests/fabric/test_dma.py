"""Streams deliver every byte once, whatever the channel does, and end at both sides when one gives up.

sender --- chunks --->  receiver
       <-- credits ---
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import numpy as np
import pytest
import trio
import trio.testing

from hmmnet.arena import Arena
from hmmnet.errors import PeerError
from hmmnet.fabric.chunk import Credit, pack_credit
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.dma import ArenaSink, ArenaSource, BulkReceiver, BulkSender, BytesSink, BytesSource, LiveSink, MultiArena, Pace, Pacer
from hmmnet.fabric.pace import Schedule
from hmmnet.fabric.sender import ABORTS_MAX, REPEAT_S
from hmmnet.fabric.stream import Holds
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, ZONE_SHIFT, Words
from hmmnet.wire.memory_transport import MemoryTransport
from hmmnet.wire.shortwait import this_loop
from hmmnet.wire.transport import Channel
from tests.fabric.faulty import faulty_pair

MIB = 1 << 20


@asynccontextmanager
async def ends(near: Channel, far: Channel) -> AsyncIterator[tuple[BulkSender, BulkReceiver]]:
    """A running sender and receiver at the ends of a channel."""
    sender, receiver = BulkSender(near, EmulatedClock()), BulkReceiver(far, EmulatedClock())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.run)
        nursery.start_soon(receiver.run)
        yield sender, receiver
        nursery.cancel_scope.cancel()


def memory_pair() -> tuple[Channel, Channel]:
    """Both ends of a sound channel."""
    transport = MemoryTransport()
    near = transport.bind_channel("mem://bulk")
    return near, transport.connect_channel("mem://bulk")


def pattern(nbytes: int, seed: int = 1) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Bytes that differ everywhere."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


@pytest.mark.parametrize("nbytes", [1, 4096, MIB, MIB + 1, 40 * MIB])
async def test_every_byte_arrives(nbytes: int, autojump_clock: trio.testing.MockClock) -> None:
    """One byte, one page, one chunk, a bit more, and several windows."""
    data, landing = pattern(nbytes), np.zeros(nbytes, dtype=np.uint8)
    async with ends(*memory_pair()) as (sender, receiver):
        arrival = receiver.expect(2, BytesSink(landing))
        report = await sender.send(2, BytesSource(data))
        await arrival.wait()
    assert report.nbytes == nbytes
    assert report.resent == 0
    assert np.array_equal(data, landing)


@pytest.mark.parametrize("seed", range(12))
async def test_a_bad_channel_changes_nothing(seed: int, autojump_clock: trio.testing.MockClock) -> None:
    """Lost, damaged, repeated and reordered messages, in both directions: every byte arrives, once. Replay: the seed is the parameter."""
    data, landing = pattern(24 * MIB, seed), np.zeros(24 * MIB, dtype=np.uint8)
    near, far = faulty_pair(seed, loss=0.15, damage=0.15, repeat=0.2, swap=0.3)
    async with ends(near, far) as (sender, receiver):
        arrival = receiver.expect(2, BytesSink(landing))
        with trio.fail_after(300):
            report = await sender.send(2, BytesSource(data))
            await arrival.wait()
    assert near.faults > 0
    assert report.resent > 0
    assert np.array_equal(data, landing)


async def test_damage_is_caught_where_it_happens(autojump_clock: trio.testing.MockClock) -> None:
    """A chunk whose checksum does not fit is asked for again; nothing else is."""
    near, far = faulty_pair(3, damage=0.5)
    data, landing = pattern(8 * MIB), np.zeros(8 * MIB, dtype=np.uint8)
    async with ends(near, far) as (sender, receiver):
        arrival = receiver.expect(2, BytesSink(landing))
        report = await sender.send(2, BytesSource(data))
        await arrival.wait()
    assert arrival.state.corrupted == near.faults > 0
    assert report.resent == near.faults
    assert np.array_equal(data, landing)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("parked", [False, True])
async def test_damage_is_not_seen_in_live_memory(step: int, parked: bool) -> None:
    """One run or scattered, awaited or parked before: nothing of a damaged chunk is ever there; an intact one is."""
    target, data = Arena(0, 512), pattern(MIB)
    places = np.arange(0, 256 * step, step, dtype=np.uint64)
    target.bytes[:] = before = pattern(len(target.bytes), 2)
    near, far = faulty_pair(1, damage=1.0)
    async with ends(near, far) as (sender, receiver), trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(PeerError, match="did not fit its checksum"):
                await sender.send(4, BytesSource(data))

        if parked:
            nursery.start_soon(send)
            await trio.testing.wait_all_tasks_blocked()
        arrival = receiver.expect(4, LiveSink(target, places << np.uint64(PAGE_SHIFT), PAGE_SIZE))
        if not parked:
            nursery.start_soon(send)
        with pytest.raises(PeerError, match="did not fit its checksum"):
            await arrival.wait()
        assert np.array_equal(target.bytes, before)
    async with ends(*memory_pair()) as (sender, receiver):
        arrival = receiver.expect(2, LiveSink(target, places << np.uint64(PAGE_SHIFT), PAGE_SIZE))
        await sender.send(2, BytesSource(data))
        await arrival.wait()
    assert np.array_equal(target.pages[places].reshape(-1), data)


async def test_chunks_may_overtake_their_announcement() -> None:
    """Bulk and control are different sockets: chunks that come first are parked."""
    data, landing = pattern(3 * MIB), np.zeros(3 * MIB, dtype=np.uint8)
    async with ends(*memory_pair()) as (sender, receiver), trio.open_nursery() as nursery:
        nursery.start_soon(sender.send, 4, BytesSource(data))
        await trio.testing.wait_all_tasks_blocked()
        await receiver.expect(4, BytesSink(landing)).wait()
    assert np.array_equal(data, landing)


async def test_repeats_of_a_parked_chunk_are_parked_once(autojump_clock: trio.testing.MockClock) -> None:
    """A sender that waits long for its stream to be expected repeats a chunk many times; the receiver holds it once."""
    data, landing = pattern(3 * MIB), np.zeros(3 * MIB, dtype=np.uint8)
    async with ends(*memory_pair()) as (sender, receiver), trio.open_nursery() as nursery:
        nursery.start_soon(sender.send, 4, BytesSource(data))
        await trio.sleep(30)
        assert receiver.dropped > 50
        assert receiver._parked_bytes == 3 * MIB
        await receiver.expect(4, BytesSink(landing)).wait()
        assert receiver._parked_bytes == 0
    assert np.array_equal(data, landing)


async def test_a_sender_does_not_wait_for_ever(autojump_clock: trio.testing.MockClock) -> None:
    """A peer that lives but expects nothing is an error after a minute."""
    async with ends(*memory_pair()) as (sender, _):
        with pytest.raises(PeerError, match="nobody answered"):
            await sender.send(4, BytesSource(pattern(MIB)))
    assert 55 < trio.current_time() < 70


async def test_an_abort_may_overtake_the_announcement() -> None:
    """A stream that its sender gave up before the receiver heard of it ends as soon as it is expected."""
    async with ends(*memory_pair()) as (sender, receiver):
        with trio.move_on_after(0.01) as scope:
            await sender.send(2, BytesSource(pattern(MIB)))
        assert scope.cancelled_caught
        await trio.testing.wait_all_tasks_blocked()
        assert receiver._parked_bytes == 0
        with pytest.raises(PeerError, match="sender gave it up"):
            await receiver.expect(2, BytesSink(np.zeros(MIB, dtype=np.uint8))).wait()


async def test_a_parked_chunk_of_another_length_ends_the_stream() -> None:
    """Found out when the stream is expected: the waiter learns it, and so does the sender."""
    async with ends(*memory_pair()) as (sender, receiver), trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(PeerError, match="were expected"):
                await sender.send(4, BytesSource(pattern(2 * MIB)))

        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(PeerError, match="were expected"):
            await receiver.expect(4, BytesSink(np.zeros(MIB, dtype=np.uint8))).wait()


async def test_a_channel_that_damages_everything_is_given_up() -> None:
    """Both ends say why, instead of sending the same chunk for ever."""
    async with ends(*faulty_pair(1, damage=1.0)) as (sender, receiver):
        arrival = receiver.expect(2, BytesSink(np.zeros(MIB, dtype=np.uint8)))
        with pytest.raises(PeerError, match="did not fit its checksum"):
            await sender.send(2, BytesSource(pattern(MIB)))
        with pytest.raises(PeerError, match="did not fit its checksum"):
            await arrival.wait()


async def test_without_checksums_damage_is_not_seen() -> None:
    """They can be turned off, and then nothing is asked for again."""
    near, far = faulty_pair(1, damage=1.0)
    data, landing = pattern(MIB), np.zeros(MIB, dtype=np.uint8)
    sender, receiver = BulkSender(near, EmulatedClock(), checksums=False), BulkReceiver(far, EmulatedClock())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.run)
        nursery.start_soon(receiver.run)
        arrival = receiver.expect(2, BytesSink(landing))
        await sender.send(2, BytesSource(data))
        await arrival.wait()
        nursery.cancel_scope.cancel()
    assert np.count_nonzero(data != landing) == 1


async def test_nothing_is_sent_of_nothing() -> None:
    """An empty stream is complete at both ends without a message."""
    near, far = faulty_pair(1)
    async with ends(near, far) as (sender, receiver):
        arrival = receiver.expect(2, BytesSink(bytearray()))
        assert (await sender.send(2, BytesSource(b""))).nbytes == 0
        await arrival.wait()
    assert near.sent == far.sent == 0


async def test_a_page_is_one_message_each_way() -> None:
    """What a small transfer costs on the wire."""
    near, far = faulty_pair(1)
    async with ends(near, far) as (sender, receiver):
        arrival = receiver.expect(2, BytesSink(bytearray(PAGE_SIZE)))
        await sender.send(2, BytesSource(pattern(PAGE_SIZE)))
        await arrival.wait()
    assert (near.sent, far.sent) == (1, 1)


async def test_source_stays_pinned_until_it_is_credited() -> None:
    """`send` returns no earlier than the credit, however long ago the last chunk left."""
    near, far = memory_pair()
    sender = BulkSender(near, EmulatedClock())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.run)
        ended = trio.Event()

        async def send() -> None:
            await sender.send(2, BytesSource(pattern(MIB)))
            ended.set()

        nursery.start_soon(send)
        await far.receive()
        await trio.testing.wait_all_tasks_blocked()
        assert not ended.is_set()
        await far.send(pack_credit(Credit(2, 1, (), 0.0)))
        await ended.wait()
        nursery.cancel_scope.cancel()


async def test_credits_carry_the_rate_to_a_far_sender() -> None:
    """The arbiter's new rate reaches a `Pace`."""
    pace, flow = Pace(0.0, 1e12, 0.0), Schedule(0.0, 1e12, 0.0)
    async with ends(*memory_pair()) as (sender, receiver):
        arrival = receiver.expect(2, BytesSink(bytearray(8 * MIB)), flow)
        flow.change_rate(2e12, 0.0)
        await sender.send(2, BytesSource(pattern(8 * MIB)), pace)
        await arrival.wait()
    assert pace.bytes_per_s == 2e12


async def test_a_chunk_whose_moment_comes_while_links_are_down_waits_for_them(autojump_clock: trio.testing.MockClock) -> None:
    """What is sent then is gone."""
    del autojump_clock
    near, far = faulty_pair(1)
    clock = EmulatedClock(monotonic=trio.current_time)
    sender, receiver = BulkSender(near, clock), BulkReceiver(far, clock)
    pace = Pace(clock.now() + 1.0, 1e12, 0.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.run)
        nursery.start_soon(receiver.run)
        arrival = receiver.expect(2, BytesSink(bytearray(MIB)))
        nursery.start_soon(sender.send, 2, BytesSource(pattern(MIB)), pace)
        await trio.sleep(0.5)
        pace.stalled = True
        await trio.sleep(5)
        assert (near.sent, sender.account(2)) == (0, (1, Holds.WAY))
        pace.stalled = False
        await arrival.wait()
        nursery.cancel_scope.cancel()
    assert trio.current_time() == pytest.approx(5.5, abs=0.02)


async def _blocks() -> None:
    await trio.sleep_forever()


async def test_a_sender_knows_what_its_stream_waits_for(autojump_clock: trio.testing.MockClock) -> None:
    """The receiver, a moment of its own clock, a link, room in the channel; nothing, if it is up to itself; a stream that is not there."""
    del autojump_clock
    near, _ = memory_pair()
    clock = EmulatedClock(monotonic=trio.current_time)
    sender = BulkSender(near, clock)
    flow = Pace(0.0, 1e12, 0.0)
    async with trio.open_nursery() as nursery:

        async def held(stream: int, pacer: Pacer, after_s: float = 0.01) -> tuple[int, Holds]:
            nursery.start_soon(sender.send, stream, BytesSource(pattern(3 * MIB)), pacer)
            await trio.sleep(after_s)
            return sender.account(stream)

        assert sender.account(2) == (0, Holds.GONE)
        assert await held(2, flow) == (3, Holds.CREDIT)
        await trio.sleep(2 * REPEAT_S)
        assert sender.account(2)[0] > 3, "it is sent again"
        assert await held(4, Pace(clock.now() + 5, 1e12, 0.0)) == (1, Holds.PACE)
        sender.step = _blocks
        assert await held(6, flow) == (1, Holds.NOTHING)
        assert await held(8, Pace(clock.now() + 1, 1e12, 0.0)) == (1, Holds.PACE), "it is not due"
        await trio.sleep(1)
        assert sender.account(8) == (1, Holds.NOTHING), "it is"
        sender.step = None
        down = Pace(0.0, 1e12, 0.0)
        down.stalled = True
        assert await held(10, down) == (1, Holds.WAY)
        down.stalled = False
        await trio.sleep(0.1)
        assert sender.account(10)[1] == Holds.CREDIT
        cast(Any, near).send = lambda *_: _blocks()
        assert await held(12, flow) == (1, Holds.WAY)
        nursery.cancel_scope.cancel()
    assert sender.account(12) == (0, Holds.GONE)


async def test_a_cancelled_wait_lets_nothing_land() -> None:
    """From that moment on; the sender learns it."""
    landing = np.zeros(MIB, dtype=np.uint8)
    async with ends(*memory_pair()) as (sender, receiver):
        arrival = receiver.expect(2, BytesSink(landing))
        with trio.move_on_after(0.01):
            await arrival.wait()
        with pytest.raises(PeerError, match="receiver gave it up"):
            await sender.send(2, BytesSource(pattern(MIB)))
    assert not landing.any()


async def test_streams_share_a_channel() -> None:
    """Several streams at once do not mix."""
    sources = {stream: pattern(3 * MIB + stream, stream) for stream in range(2, 22, 2)}
    landings = {stream: np.zeros(len(data), dtype=np.uint8) for stream, data in sources.items()}
    async with ends(*memory_pair()) as (sender, receiver), trio.open_nursery() as nursery:
        for stream, data in sources.items():
            nursery.start_soon(receiver.expect(stream, BytesSink(landings[stream])).wait)
            nursery.start_soon(sender.send, stream, BytesSource(data))
    assert all(np.array_equal(sources[stream], landings[stream]) for stream in sources)


@pytest.mark.parametrize("ending", ["landed", "given up by the sender", "given up by the receiver", "the channel is closed"])
async def test_the_run_knows_whether_a_stream_is_under_way(ending: str) -> None:
    """At both ends, from the moment at which it is expected, or begins, to its end, whatever that is."""
    loop = this_loop()
    assert loop is not None
    near, far = memory_pair()
    async with ends(near, far) as (sender, receiver):
        arrival = receiver.expect(2, BytesSink(np.zeros(MIB, dtype=np.uint8)))
        assert loop.bulk_expected
        if ending == "landed":
            await sender.send(2, BytesSource(pattern(MIB)))
            await arrival.wait()
        elif ending == "given up by the sender":
            sender.abandon(2)
            with pytest.raises(PeerError):
                await arrival.wait()
        elif ending == "given up by the receiver":
            arrival.cancel()
            with pytest.raises(PeerError):
                await sender.send(2, BytesSource(pattern(MIB)))
        else:
            receiver.fail("closed")
            sender.fail("closed")
            with pytest.raises(PeerError):
                await sender.send(4, BytesSource(pattern(MIB)))
        assert not loop.bulk_expected


async def test_receiver_gives_up() -> None:
    """The sender of a stream that is expected no longer is told why, and nothing lands any more."""
    landing = np.zeros(64 * MIB, dtype=np.uint8)
    async with ends(*memory_pair()) as (sender, receiver):
        arrival = receiver.expect(2, BytesSink(landing))
        arrival.cancel()
        with pytest.raises(PeerError, match="receiver gave it up"):
            await sender.send(2, BytesSource(pattern(64 * MIB)))
        with pytest.raises(PeerError):
            await arrival.wait()
    assert not landing.any()


async def test_sender_gives_up() -> None:
    """A cancelled send ends the stream at the receiver too."""
    async with ends(*memory_pair()) as (sender, receiver):
        arrival = receiver.expect(2, BytesSink(np.zeros(MIB, dtype=np.uint8)))
        with trio.move_on_after(0.01):
            await sender.send(2, BytesSource(pattern(MIB)), Pace(1e9, 1.0, 0.0))
        with pytest.raises(PeerError, match="sender gave it up"):
            await arrival.wait()


class Deaf:
    """One end of a channel that loses the first `losses` messages that are sent there by `send_nowait`; it counts all of them."""

    def __init__(self, channel: Channel, losses: int) -> None:
        self._channel = channel
        self._losses = losses
        self.sent = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def send_nowait(self, header: bytes, payload: Any = None) -> None:
        """Lost, or sent."""
        self.sent += 1
        if self.sent > self._losses:
            self._channel.send_nowait(header, payload)


@pytest.mark.parametrize("announced", [True, False], ids=["awaited", "unknown"])
@pytest.mark.parametrize(
    ("lost", "answers_lost", "told"), [(0, 0, 1), (1, 0, 2), (3, 0, 4), (1, 2, 4), (0, 99, ABORTS_MAX), (99, 0, ABORTS_MAX)]
)
async def test_an_abort_that_is_lost_is_told_again(
    lost: int, answers_lost: int, told: int, announced: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """Until the receiver says that it has heard, or has not for so long that it is gone; then nobody tells it any more."""
    near, far = memory_pair()
    sending, answering = Deaf(near, lost), Deaf(far, answers_lost)
    async with ends(cast(Channel, sending), cast(Channel, answering)) as (sender, receiver):
        arrival = receiver.expect(4, BytesSink(np.zeros(MIB, np.uint8))) if announced else None
        sender.abandon(4)
        await trio.sleep(REPEAT_S * (ABORTS_MAX + 4))
        assert sending.sent == told
        late = arrival or receiver.expect(4, BytesSink(np.zeros(MIB, np.uint8)))
        if lost < ABORTS_MAX:
            with pytest.raises(PeerError, match="the sender gave it up"):
                await late.wait()
        else:
            assert not late.done


class Away(Deaf):
    """One end of a channel whose peer is not connected while `there` is false."""

    there = False
    tried = 0

    async def send(self, header: bytes, payload: Any = None) -> None:
        """Nobody is waited for."""
        if not self.there:
            raise trio.BrokenResourceError("nobody is at the other end")
        await self._channel.send(header, payload)

    def send_nowait(self, header: bytes, payload: Any = None) -> None:
        """Sent, or not."""
        self.tried += 1
        if not self.there:
            raise trio.WouldBlock
        super().send_nowait(header, payload)


async def test_a_stream_to_a_peer_that_is_away_fails_and_is_told_when_it_comes(autojump_clock: trio.testing.MockClock) -> None:
    """However late: a receiver that never hears would wait for as long as it can, and hold what it holds."""
    near, far = memory_pair()
    sending = Away(near, 0)
    async with ends(cast(Channel, sending), far) as (sender, receiver):
        arrival = receiver.expect(2, BytesSink(np.zeros(MIB, np.uint8)))
        with pytest.raises(PeerError, match="stream 2: nobody is at the other end"):
            await sender.send(2, BytesSource(pattern(MIB)))
        await trio.sleep(10 * REPEAT_S * ABORTS_MAX)
        assert not arrival.done
        sending.there = True
        with pytest.raises(PeerError, match="the sender gave it up: stream 2: nobody is at the other end"):
            await arrival.wait()
        await trio.sleep(REPEAT_S * (ABORTS_MAX + 4))
        assert sending.sent == 1, "it says that it has heard"


async def test_a_peer_that_stays_away_is_not_told_of_more_and_more(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One try at a time finds out that it is away, and what it is to hear is bounded: the newest."""
    monkeypatch.setattr("hmmnet.fabric.sender.ABANDONED_MAX", 8)
    near, far = memory_pair()
    sending = Away(near, 0)
    async with ends(cast(Channel, sending), far) as (sender, receiver):
        for stream in range(40):
            sender.abandon(stream)
        assert sending.tried == 40, "each at once"
        await trio.sleep(10.5 * REPEAT_S)
        assert sending.tried == 40 + 10
        sending.there = True
        await trio.sleep(REPEAT_S * (ABORTS_MAX + 4))
        assert sending.sent == 8
        arrivals = [receiver.expect(stream, BytesSink(np.zeros(MIB, np.uint8))) for stream in range(40)]
        assert [arrival.state.stream for arrival in arrivals if arrival.done] == list(range(32, 40))
        for arrival in arrivals:
            arrival.cancel()


async def test_a_stream_of_another_length_is_refused() -> None:
    """A sender that means something else than the receiver does not get to write."""
    landing = np.zeros(MIB, dtype=np.uint8)
    async with ends(*memory_pair()) as (sender, receiver):
        arrival = receiver.expect(2, BytesSink(landing))
        with pytest.raises(PeerError, match="were expected"):
            await sender.send(2, BytesSource(pattern(2 * MIB)))
        with pytest.raises(PeerError):
            await arrival.wait()
    assert not landing.any()


async def test_a_closed_channel_ends_everything() -> None:
    """Both ends learn of it; nobody hangs."""
    near, far = memory_pair()
    async with ends(near, far) as (sender, receiver):
        arrival = receiver.expect(2, BytesSink(np.zeros(MIB, dtype=np.uint8)))
        await trio.testing.wait_all_tasks_blocked()
        await far.aclose()
        with pytest.raises(PeerError, match="closed"):
            await arrival.wait()
        await near.aclose()
        with pytest.raises(PeerError, match="closed"):
            await sender.send(2, BytesSource(pattern(10)))


async def test_garbage_on_a_bulk_channel_is_dropped() -> None:
    """Messages that are none leave the streams alone."""
    near, far = memory_pair()
    data, landing = pattern(MIB), np.zeros(MIB, dtype=np.uint8)
    async with ends(near, far) as (sender, receiver):
        await near.send(b"garbage")
        await near.send(b"HMc1" + bytes(3), b"data")
        await far.send(b"garbage")
        arrival = receiver.expect(2, BytesSink(landing))
        await sender.send(2, BytesSource(data))
        await arrival.wait()
        assert receiver.dropped == 2
    assert np.array_equal(data, landing)


@pytest.mark.parametrize("size", [8, 64, PAGE_SIZE])
async def test_scattered_elements(size: int) -> None:
    """Elements in any order, gathered at one end and scattered at the other, over several memories."""
    arenas = {zone: Arena(zone << ZONE_SHIFT, 600) for zone in (0, 1)}
    for arena in arenas.values():
        arena.bytes[:] = pattern(len(arena.bytes), 5 + arena.base % 7)
    target = Arena(64 << ZONE_SHIFT, 1200)
    rng = np.random.default_rng(size)
    rows = rng.permutation(600 * PAGE_SIZE // size)[:2000].astype(np.uint64)
    zones: Words = rng.integers(0, 2, len(rows)).astype(np.uint64)
    source = (zones << np.uint64(ZONE_SHIFT + PAGE_SHIFT)) + rows * np.uint64(size)
    places = np.uint64(target.base << PAGE_SHIFT) + rng.permutation(600 * PAGE_SIZE // size)[: len(rows)].astype(np.uint64) * np.uint64(
        size
    )
    memories = MultiArena(arenas)
    async with ends(*memory_pair()) as (sender, receiver):
        arrival = receiver.expect(2, ArenaSink(target, places, size))
        await sender.send(2, ArenaSource(memories, source, size))
        await arrival.wait()
    assert np.array_equal(target.gather(places, size), memories.gather(source, size))


def test_pace_is_kept_in_virtual_time() -> None:
    """16 MiB at 100 MB/s take what arithmetic says, to the microsecond, plus the latency."""

    async def main() -> float:
        near, far = memory_pair()
        clock = EmulatedClock(1.0, trio.current_time)
        sender, receiver = BulkSender(near, clock), BulkReceiver(far, clock)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.run)
            nursery.start_soon(receiver.run)
            arrival = receiver.expect(2, BytesSink(np.zeros(16 * MIB, dtype=np.uint8)))
            await sender.send(2, BytesSource(pattern(16 * MIB)), Pace(clock.now(), 100e6, 0.25))
            await arrival.wait()
            nursery.cancel_scope.cancel()
        return clock.now()

    taken_s = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert taken_s == pytest.approx(16 * MIB / 100e6 + 0.25, abs=1e-3)
