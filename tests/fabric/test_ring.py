"""Streams through shared memory deliver every byte once, whatever happens to headers and slots, and go without a ring where there is none.

sender --- headers ---> receiver
   \\--> slots of the ring --/

Both ends are in this process, with a mapping each.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from hmmnet.arena import Arena
from hmmnet.errors import HmmnetError, PeerError, ProtocolError
from hmmnet.fabric import receiver as receiver_module
from hmmnet.fabric.chunk import CHUNK_BYTES, Chunk, pack_chunk, split_forward, unpack_forward
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.dma import ArenaSink, ArenaSource, BulkReceiver, BulkSender, BytesSink, BytesSource, LiveSink, RingPlace, Rings
from hmmnet.fabric.ring import SLOTS, Ring
from hmmnet.fabric.sender import IDLE_S, REPEAT_S
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE
from hmmnet.wire.memory_transport import MemoryTransport
from hmmnet.wire.transport import Channel
from tests.fabric.faulty import faulty_pair

MIB = 1 << 20
Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


@pytest.fixture
def rings() -> Iterator[tuple[Rings, Rings]]:
    """The host's view of a pair of rings, and the device's."""
    host = Rings.made("test")
    device = Rings.opened(host.place)
    yield host, device
    host.close()
    device.close()


class Counting:
    """A channel that counts what passes as payloads, and shows every header to `before`."""

    def __init__(self, channel: Channel, before: Callable[[Chunk], None] = lambda _: None) -> None:
        self.endpoint = channel.endpoint
        self.refused = 0
        self.payloads = 0
        self.messages = 0
        self._channel = channel
        self._before = before

    async def send(self, header: Any, payload: Any = None) -> None:
        for one in split_forward(header):
            message = unpack_forward(one)
            assert isinstance(message, Chunk)
            self._before(message)
        self.payloads += payload is not None
        self.messages += 1
        await self._channel.send(header, payload)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)


def channels(before: Callable[[Chunk], None] = lambda _: None) -> tuple[Counting, Channel]:
    """Both ends of a sound channel."""
    transport = MemoryTransport()
    near = transport.bind_channel("mem://bulk")
    return Counting(near, before), transport.connect_channel("mem://bulk")


@asynccontextmanager
async def ends(near: Any, far: Channel, sending: Ring | None, receiving: Ring | None) -> AsyncIterator[tuple[BulkSender, BulkReceiver]]:
    """A running sender and receiver."""
    sender, receiver = BulkSender(near, EmulatedClock(), ring=sending), BulkReceiver(far, EmulatedClock(), ring=receiving)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.run)
        nursery.start_soon(receiver.run)
        yield sender, receiver
        nursery.cancel_scope.cancel()


def pattern(nbytes: int, seed: int = 1) -> Bytes:
    """Bytes that differ everywhere."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


@pytest.mark.parametrize("nbytes", [1, PAGE_SIZE, MIB, MIB + 1, (3 * SLOTS + 1) * MIB + 5])
@pytest.mark.parametrize("to_device", [True, False])
async def test_every_byte_arrives(rings: tuple[Rings, Rings], nbytes: int, to_device: bool) -> None:
    """In both directions, however often the slots are used again; nothing but headers is sent."""
    host, device = rings
    sending, receiving = (host.to_device, device.to_device) if to_device else (device.to_host, host.to_host)
    near, far = channels()
    data, landing = pattern(nbytes), np.zeros(nbytes, dtype=np.uint8)
    async with ends(near, far, sending, receiving) as (sender, receiver):
        assert sender.carries == "ring"
        arrival = receiver.expect(2, BytesSink(landing))
        report = await sender.send(2, BytesSource(data))
        await arrival.wait()
    assert (report.resent, near.payloads) == (0, 0)
    assert sending.slots.idle
    assert np.array_equal(data, landing)


async def test_a_long_stream_announces_chunks_together(rings: tuple[Rings, Rings]) -> None:
    """Fewer messages than chunks; a short one, whose receiver waits, announces each."""
    host, device = rings
    near, far = channels()
    async with ends(near, far, host.to_device, device.to_device) as (sender, receiver):
        for stream, mib in ((2, 3), (4, 64)):
            before, landing = near.messages, np.zeros(mib * MIB, dtype=np.uint8)
            arrival = receiver.expect(stream, BytesSink(landing))
            await sender.send(stream, BytesSource(pattern(mib * MIB)))
            await arrival.wait()
            assert near.messages - before == 3 if mib == 3 else near.messages - before < 32


class Slow(Counting):
    """A channel whose sends return when the receiver has answered already."""

    async def send(self, header: Any, payload: Any = None) -> None:
        await super().send(header, payload)
        await trio.sleep(0.001)


@pytest.mark.parametrize("mib", [3, 24])
async def test_what_is_heard_while_chunks_are_announced_is_not_slept_over(
    mib: int, rings: tuple[Rings, Rings], autojump_clock: trio.testing.MockClock
) -> None:
    """The last credits come before the sender begins to wait for them: it waits for no others, and repeats nothing."""
    host, device = rings
    near, far = channels()
    landing = np.zeros(mib * MIB, dtype=np.uint8)
    began_s = trio.current_time()
    async with ends(Slow(near), far, host.to_device, device.to_device) as (sender, receiver):
        arrival = receiver.expect(2, BytesSink(landing))
        report = await sender.send(2, BytesSource(pattern(mib * MIB)))
        await arrival.wait()
    assert report.resent == 0
    assert trio.current_time() - began_s < 0.9 * REPEAT_S
    assert np.array_equal(landing, pattern(mib * MIB))


async def test_scattered_pages(rings: tuple[Rings, Rings]) -> None:
    """Gathered into the slots, and scattered out of them."""
    host, device = rings
    source, target = Arena(0, 2048), Arena(1 << 32, 2048)
    source.bytes[:] = pattern(len(source.bytes))
    from_pages, to_pages = (np.random.default_rng(seed).permutation(2048)[:1000].astype(np.uint64) for seed in (2, 3))
    near, far = channels()
    async with ends(near, far, host.to_device, device.to_device) as (sender, receiver):
        arrival = receiver.expect(2, ArenaSink(target, (to_pages + np.uint64(target.base)) << np.uint64(PAGE_SHIFT), PAGE_SIZE))
        await sender.send(2, ArenaSource(source, from_pages << np.uint64(PAGE_SHIFT), PAGE_SIZE))
        await arrival.wait()
    assert near.payloads == 0
    assert np.array_equal(target.pages[to_pages], source.pages[from_pages])
    others = np.setdiff1d(np.arange(2048, dtype=np.uint64), to_pages)
    assert not target.pages[others].any()


@pytest.mark.parametrize("seed", range(6))
async def test_a_bad_channel_changes_nothing(seed: int, rings: tuple[Rings, Rings], autojump_clock: trio.testing.MockClock) -> None:
    """Headers and credits that are lost, repeated and reordered: every byte arrives, once. Replay: the seed is the parameter."""
    host, device = rings
    data, landing = pattern(24 * MIB, seed), np.zeros(24 * MIB, dtype=np.uint8)
    near, far = faulty_pair(seed, loss=0.15, repeat=0.2, swap=0.3)
    async with ends(near, far, host.to_device, device.to_device) as (sender, receiver):
        arrival = receiver.expect(2, BytesSink(landing))
        with trio.fail_after(300):
            report = await sender.send(2, BytesSource(data))
            await arrival.wait()
    assert near.faults > 0
    assert report.resent > 0
    assert host.to_device.slots.idle
    assert np.array_equal(data, landing)


async def test_a_peer_that_scribbles_is_caught(rings: tuple[Rings, Rings], autojump_clock: trio.testing.MockClock) -> None:
    """Bytes of a slot that were changed behind the checksum's back are refused and sent again, from the source."""
    host, device = rings
    scribbled: list[int] = []

    def scribble(chunk: Chunk) -> None:
        if chunk.sequence % 3 == 1 and chunk.sequence not in scribbled and chunk.slot is not None:
            scribbled.append(chunk.sequence)
            device.to_device.part(chunk.slot, chunk.length)[chunk.length // 2] ^= 0xFF

    near, far = channels(scribble)
    data, landing = pattern(12 * MIB), np.zeros(12 * MIB, dtype=np.uint8)
    async with ends(near, far, host.to_device, device.to_device) as (sender, receiver):
        arrival = receiver.expect(2, BytesSink(landing))
        report = await sender.send(2, BytesSource(data))
        await arrival.wait()
    assert scribbled == [1, 4, 7, 10]
    assert arrival.state.corrupted == report.resent == 4
    assert np.array_equal(data, landing)


async def test_a_scattered_sink_is_not_touched_by_damage(rings: tuple[Rings, Rings]) -> None:
    """What does not match its checksum is not scattered."""
    host, device = rings
    target = Arena(0, 512)

    def scribble(chunk: Chunk) -> None:
        if chunk.slot is not None:
            device.to_device.part(chunk.slot, chunk.length)[:] = 0xEE

    near, far = channels(scribble)
    async with ends(near, far, host.to_device, device.to_device) as (sender, receiver):
        pages = np.arange(0, 512, 2, dtype=np.uint64)
        receiver.expect(2, ArenaSink(target, pages << np.uint64(PAGE_SHIFT), PAGE_SIZE))
        with pytest.raises(PeerError, match="did not fit its checksum"):
            await sender.send(2, BytesSource(pattern(MIB)))
        assert host.to_device.slots.idle
    assert not target.bytes.any()


@pytest.mark.parametrize("step", [1, 2])
async def test_damage_is_not_seen_in_live_memory(rings: tuple[Rings, Rings], step: int) -> None:
    """Each chunk comes damaged at first, and memory is as it was until it comes again; one run or scattered."""
    host, device = rings
    target, data = Arena(0, 2048), pattern(4 * MIB)
    places = np.arange(0, 1024 * step, step, dtype=np.uint64)
    target.bytes[:] = pattern(len(target.bytes), 2)
    old, new, seen = target.pages[places], data.reshape(-1, PAGE_SIZE), set[int]()

    def scribble(chunk: Chunk) -> None:
        now = target.pages[places]
        assert ((now == old).all(axis=1) | (now == new).all(axis=1)).all()
        if chunk.slot is not None and chunk.sequence not in seen:
            seen.add(chunk.sequence)
            host.to_host.part(chunk.slot, chunk.length)[:] = 0xEE

    near, far = channels(scribble)
    async with ends(near, far, device.to_host, host.to_host) as (sender, receiver):
        arrival = receiver.expect(2, LiveSink(target, places << np.uint64(PAGE_SHIFT), PAGE_SIZE))
        report = await sender.send(2, BytesSource(data))
        await arrival.wait()
    assert (report.resent, len(seen), near.payloads) == (4, 4, 0)
    assert np.array_equal(target.pages[places], new)


@pytest.mark.parametrize("live", [True, False])
async def test_a_peer_that_scribbles_between_look_and_copy_changes_nothing(
    rings: tuple[Rings, Rings], monkeypatch: pytest.MonkeyPatch, live: bool
) -> None:
    """What was found intact is what is written, into live memory as into scattered frames, though the slot holds something else by then."""
    host, device = rings
    memory = Arena(0, 8)
    addresses = np.array([5, 1, 3], dtype=np.uint64) << np.uint64(PAGE_SHIFT)
    fits, data = receiver_module._fits, pattern(3 * PAGE_SIZE)

    def look(seen: Any, chunk: Chunk) -> bool:
        intact = fits(seen, chunk)
        assert chunk.slot is not None
        host.to_device.part(chunk.slot, chunk.length)[:] = 0xEE
        return intact

    monkeypatch.setattr(receiver_module, "_fits", look)
    near, far = channels()
    async with ends(near, far, host.to_device, device.to_device) as (sender, receiver):
        arrival = receiver.expect(2, (LiveSink if live else ArenaSink)(memory, addresses, PAGE_SIZE))
        await sender.send(2, BytesSource(data))
        await arrival.wait()
    assert np.array_equal(memory.gather(addresses, PAGE_SIZE), data)


@pytest.mark.parametrize("slot", [SLOTS, SLOTS + 1, (1 << 32) - 1])
async def test_a_slot_outside_the_ring(rings: tuple[Rings, Rings], slot: int) -> None:
    """The message is dropped, and the stream goes on with what comes after it."""
    host, device = rings
    near, far = channels()
    data, landing = pattern(MIB), np.zeros(MIB, dtype=np.uint8)
    async with ends(near, far, host.to_device, device.to_device) as (sender, receiver):
        arrival = receiver.expect(2, BytesSink(landing))
        await near.send(pack_chunk(Chunk(2, MIB, 0, MIB, 0, slot=slot)))
        await trio.testing.wait_all_tasks_blocked()
        assert receiver.dropped == 1
        assert not landing.any()
        await sender.send(2, BytesSource(data))
        await arrival.wait()
    assert np.array_equal(data, landing)


async def test_a_slot_where_there_is_no_ring() -> None:
    """Dropped: a receiver without a ring has no slots."""
    near, far = channels()
    async with ends(near, far, None, None) as (_, receiver):
        receiver.expect(2, BytesSink(np.zeros(MIB, dtype=np.uint8)))
        await near.send(pack_chunk(Chunk(2, MIB, 0, MIB, 0, slot=1)))
        await trio.testing.wait_all_tasks_blocked()
        assert receiver.dropped == 1


def test_lengths_outside_a_slot(rings: tuple[Rings, Rings]) -> None:
    """Nobody reaches the next slot, or what lies behind the last."""
    ring = rings[0].to_device
    assert len(ring.part(SLOTS - 1, CHUNK_BYTES)) == CHUNK_BYTES
    for slot, length in ((0, CHUNK_BYTES + 1), (0, -1), (-1, 1), (SLOTS, 0)):
        with pytest.raises(ProtocolError, match="slots of"):
            ring.part(slot, length)


async def test_more_streams_than_slots(rings: tuple[Rings, Rings], autojump_clock: trio.testing.MockClock) -> None:
    """Chunks that find no slot are messages; nobody waits for a repeat."""
    host, device = rings
    near, far = channels()
    streams = range(2, 2 + 2 * 3 * SLOTS, 2)
    data = {stream: pattern(3 * MIB + stream, stream) for stream in streams}
    landing = {stream: np.zeros_like(data[stream]) for stream in streams}
    resent = []

    async def send(stream: int) -> None:
        resent.append((await sender.send(stream, BytesSource(data[stream]))).resent)

    async with ends(near, far, host.to_device, device.to_device) as (sender, receiver):
        arrivals = [receiver.expect(stream, BytesSink(landing[stream])) for stream in streams]
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(send, stream)
        for arrival in arrivals:
            await arrival.wait()
    assert near.payloads > 0
    assert sum(resent) == 0
    assert all(np.array_equal(data[stream], landing[stream]) for stream in streams)


async def test_chunks_may_overtake_their_announcement(rings: tuple[Rings, Rings]) -> None:
    """They are parked, out of the ring."""
    host, device = rings
    data, landing = pattern(3 * MIB), np.zeros(3 * MIB, dtype=np.uint8)
    near, far = channels()
    async with ends(near, far, host.to_device, device.to_device) as (sender, receiver), trio.open_nursery() as nursery:
        nursery.start_soon(sender.send, 4, BytesSource(data))
        await trio.testing.wait_all_tasks_blocked()
        await receiver.expect(4, BytesSink(landing)).wait()
    assert np.array_equal(data, landing)


async def test_an_abandoned_stream_gives_its_slots_back(rings: tuple[Rings, Rings]) -> None:
    """Whoever gives it up."""
    host, device = rings
    near, far = channels()
    async with ends(near, far, host.to_device, device.to_device) as (sender, _):
        with trio.move_on_after(0.05):
            await sender.send(2, BytesSource(pattern(4 * MIB)))
        assert host.to_device.slots.idle


async def test_a_ring_that_the_peer_does_not_see(rings: tuple[Rings, Rings]) -> None:
    """Data go as messages: the device has not opened it, or nobody checks what arrives."""
    unseen = Rings.made("unseen")
    data, landing = pattern(3 * MIB), np.zeros(3 * MIB, dtype=np.uint8)
    near, far = channels()
    async with ends(near, far, unseen.to_device, None) as (sender, receiver):
        assert sender.carries == "messages"
        arrival = receiver.expect(2, BytesSink(landing))
        await sender.send(2, BytesSource(data))
        await arrival.wait()
    unseen.close()
    assert near.payloads == 3
    assert np.array_equal(data, landing)
    assert BulkSender(near, EmulatedClock(), checksums=False, ring=rings[0].to_device).carries == "messages"


def test_another_file_is_not_taken_for_the_ring(tmp_path: Any, rings: tuple[Rings, Rings]) -> None:
    """Absent, of another size, without seals, or another machine's: each refused, with the reason."""
    host, _ = rings
    with pytest.raises(HmmnetError, match="cannot be opened"):
        Rings.opened(RingPlace(str(tmp_path / "absent"), host.place.token))
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(PAGE_SIZE + 2 * SLOTS * CHUNK_BYTES))
    short = os.memfd_create("short", os.MFD_CLOEXEC)
    for path in (str(plain), f"/proc/{os.getpid()}/fd/{short}"):
        with pytest.raises(HmmnetError):
            Rings.opened(RingPlace(path, host.place.token))
    os.close(short)
    other = Rings.made("other")
    with pytest.raises(HmmnetError, match="token"):
        Rings.opened(RingPlace(other.place.path, host.place.token))
    assert not other.attached
    other.close()


def test_nobody_can_cut_it(rings: tuple[Rings, Rings]) -> None:
    """A peer that shortens the file would kill us with SIGBUS."""
    descriptor = os.open(rings[0].place.path, os.O_RDWR)
    for size in (0, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    os.close(descriptor)


async def test_a_closed_ring_is_no_ring(rings: tuple[Rings, Rings]) -> None:
    """What is sent or comes afterwards is a message, or refused; neither reaches the memory that was."""
    host, device = rings
    near, far = channels()
    data, landing = pattern(MIB), np.zeros(MIB, dtype=np.uint8)
    host.close()
    with pytest.raises(ProtocolError, match="0 slots"):
        host.to_device.part(0, 1)
    assert not device.to_device.part(0, MIB).any()
    async with ends(near, far, host.to_device, host.to_device) as (sender, receiver):
        assert sender.carries == "messages"
        arrival = receiver.expect(2, BytesSink(landing))
        await near.send(pack_chunk(Chunk(2, MIB, 0, MIB, 0, slot=0)))
        await sender.send(2, BytesSource(data))
        await arrival.wait()
        assert receiver.dropped == 1
    assert np.array_equal(data, landing)
    host.close()


async def test_an_idle_ring_holds_no_memory(rings: tuple[Rings, Rings], autojump_clock: trio.testing.MockClock) -> None:
    """A second after the last stream its slots are given back; they work as before."""
    host, device = rings
    descriptor = os.open(host.place.path, os.O_RDONLY)
    near, far = channels()
    data = pattern(4 * MIB)
    async with ends(near, far, host.to_device, device.to_device) as (sender, receiver):
        for stream in (2, 4):
            landing = np.zeros(4 * MIB, dtype=np.uint8)
            arrival = receiver.expect(stream, BytesSink(landing))
            await sender.send(stream, BytesSource(data))
            await arrival.wait()
            assert np.array_equal(data, landing)
            assert os.fstat(descriptor).st_blocks * 512 >= MIB
            await trio.sleep(3 * IDLE_S)
            assert os.fstat(descriptor).st_blocks * 512 <= PAGE_SIZE
    host.close()
    assert os.fstat(descriptor).st_blocks == 0
    os.close(descriptor)
