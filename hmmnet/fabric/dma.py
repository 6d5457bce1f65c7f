"""DMA streams over a channel: page data as checksummed, paced, credited chunks.

A `BulkSender` and a `BulkReceiver` sit at the two ends of one channel and carry any number of streams. The streams' rules are in
`stream`, the form of their messages in `chunk`; here are the waits. Pacing is by absolute deadlines: each chunk has a moment at which it
may leave, derived from the stream's start and not from when the last one left, and a moment at which it is there; a stream is complete
when its data have landed *and* that moment has come. Moments closer than a millisecond are accounted for, not slept.

What goes wrong: a lost chunk is missed and asked for again, a damaged one is refused and asked for again, a repeated one is ignored. A
stream that either end gives up is aborted at the other (`PeerError` with the reason), and whatever still arrives for it is dropped.
Chunks that overtake the message which announces their stream are parked, within `PARKED_BYTES_MAX`; beyond, they are dropped and come
again.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import trio
import xxhash

from hmmnet.errors import PeerError, ProtocolError
from hmmnet.wire.transport import Channel, Payload

from .arbiter import CATCH_UP_S, Grant
from .chunk import CHUNK_BYTES, Abort, Chunk, Credit, pack_abort, pack_chunk, pack_credit, unpack_back, unpack_forward
from .clock import EmulatedClock
from .ends import ArenaSink, ArenaSource, BytesSink, BytesSource, MultiArena, Sink, Source
from .stream import ReceiveState, SendState

__all__ = [
    "UNPACED",
    "ArenaSink",
    "ArenaSource",
    "Arrival",
    "BulkReceiver",
    "BulkSender",
    "BytesSink",
    "BytesSource",
    "MultiArena",
    "Pace",
    "Pacer",
    "Sink",
    "Source",
    "StreamReport",
]  # fmt: skip

REPEAT_S = 0.25
"""Real seconds without a credit after which the oldest chunk is repeated."""
PARKED_BYTES_MAX = 64 << 20
"""Data that may wait for their stream's announcement: four windows."""
ENDED_MAX = 1024
"""Ended streams that are remembered, to answer repeats of their chunks."""

log = logging.getLogger("hmmnet.fabric")


class Pacer(Protocol):
    """Gives each chunk its time; `arbiter.Flow` at the host, `Pace` where the host's grant was sent along."""

    bytes_per_s: float

    def grant(self, nbytes: int, now_s: float) -> Grant:
        """When the next `nbytes` may leave and are there."""
        ...


class Pace:
    """A grant that came in a message: from `start_s` on at `bytes_per_s`, there `latency_s` later. Credits may change the rate."""

    def __init__(self, start_s: float, bytes_per_s: float, latency_s: float, catch_up_s: float = CATCH_UP_S) -> None:
        self.bytes_per_s = bytes_per_s
        self._next_s = start_s
        self._latency_s = latency_s
        self._catch_up_s = catch_up_s

    def grant(self, nbytes: int, now_s: float) -> Grant:
        """See `Pacer`."""
        start_s = max(self._next_s, now_s - self._catch_up_s)
        self._next_s = finish_s = start_s + nbytes / self.bytes_per_s
        return Grant(start_s, finish_s, finish_s + self._latency_s)


class _Unpaced:
    """As fast as it goes."""

    bytes_per_s = float("inf")

    def grant(self, nbytes: int, now_s: float) -> Grant:  # noqa: ARG002 - the interface of Pacer
        """See `Pacer`."""
        return Grant(now_s, now_s, now_s)


UNPACED = _Unpaced()


@dataclass(frozen=True)
class StreamReport:
    """How a stream went: bytes, chunks sent again, and emulated seconds from first grant to the last arrival."""

    nbytes: int
    resent: int
    emulated_s: float


class _Outgoing:
    """A stream being sent, and its task when that waits for credits."""

    def __init__(self, state: SendState, pacer: Pacer) -> None:
        self.state = state
        self.pacer = pacer
        self.aborted: str | None = None
        self.lot = trio.lowlevel.ParkingLot()
        self.heard = False

    def check(self) -> None:
        """Raises PeerError when the receiver has given the stream up."""
        if self.aborted is not None:
            raise PeerError(f"stream {self.state.stream} was given up by its receiver: {self.aborted}")

    def wake(self) -> None:
        """Something was heard from the receiver."""
        self.heard = True
        self.lot.unpark_all()


class BulkSender:
    """The sending end of a channel. `run` must run while streams are sent."""

    def __init__(self, channel: Channel, clock: EmulatedClock, *, checksums: bool = True) -> None:
        self._channel = channel
        self._clock = clock
        self._checksums = checksums
        self._streams: dict[int, _Outgoing] = {}
        self._closed: str | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take credits until cancelled, or until the channel is closed."""
        task_status.started()
        try:
            while True:
                header, _ = await self._channel.receive()
                try:
                    self._take(unpack_back(header))
                except ProtocolError as error:
                    log.warning("bulk channel %s: %s", self._channel.endpoint, error)
        except trio.ClosedResourceError:
            self.fail("the bulk channel was closed")

    def fail(self, reason: str) -> None:
        """The peer is gone: all streams end with PeerError."""
        self._closed = reason
        for out in self._streams.values():
            out.aborted = reason
            out.wake()

    def _take(self, message: Credit | Abort) -> None:
        out = self._streams.get(message.stream)
        if out is None:
            return  # ended here; a late credit
        if isinstance(message, Abort):
            out.aborted = message.reason
        else:
            out.state.credit(message)
            if message.bytes_per_s > 0:
                out.pacer.bytes_per_s = message.bytes_per_s
        out.wake()

    async def send(self, stream: int, source: Source, pacer: Pacer = UNPACED) -> StreamReport:
        """Send all of `source`; returns when it has landed, verified, and its emulated time is over.

        Raises PeerError when the receiver aborts the stream or is gone. When cancelled, the receiver is told.
        """
        assert stream not in self._streams, f"stream {stream} is under way"
        if self._closed is not None:
            raise PeerError(f"stream {stream}: {self._closed}")
        out = self._streams[stream] = _Outgoing(SendState(stream, source.nbytes), pacer)
        began_s = self._clock.now()
        arrive_s = began_s
        try:
            while not out.state.done:
                out.check()
                sequence = out.state.next()
                if sequence is None:
                    await self._await_credit(out)
                else:
                    arrive_s = max(arrive_s, await self._send_chunk(out, source, sequence))
        except BaseException:
            self._abort(stream)
            raise
        finally:
            del self._streams[stream]
        await self._clock.sleep_until(arrive_s)
        return StreamReport(source.nbytes, out.state.resent, max(arrive_s, self._clock.now()) - began_s)

    async def _send_chunk(self, out: _Outgoing, source: Source, sequence: int) -> float:
        state = out.state
        offset = sequence * state.stride
        length = min(state.stride, state.total - offset)
        grant = out.pacer.grant(length, self._clock.now())
        await self._clock.sleep_until(grant.start_s)
        data = source.chunk(offset, length)
        checksum = xxhash.xxh3_64_intdigest(data) if self._checksums else None
        header = pack_chunk(Chunk(state.stream, state.total, sequence, state.stride, checksum, grant.arrive_s))
        try:
            await self._channel.send(header, data)
        except trio.ClosedResourceError:
            raise PeerError(f"stream {state.stream}: the bulk channel was closed") from None
        return grant.arrive_s

    async def _await_credit(self, out: _Outgoing) -> None:
        out.heard = False
        with trio.move_on_after(self._clock.real(REPEAT_S)):
            await out.lot.park()
        if not out.heard:
            out.state.timeout()

    def _abort(self, stream: int) -> None:
        try:
            self._channel.send_nowait(pack_abort(Abort(stream, "the sender gave it up")))
        except (trio.WouldBlock, trio.ClosedResourceError):
            log.info("stream %d ended without telling the receiver: the channel is closed or full", stream)


class Arrival:
    """A stream that is expected. Its `wait` returns when all of it has landed."""

    def __init__(self, receiver: BulkReceiver, stream: int, sink: Sink, rate_of: Callable[[], float] | None) -> None:
        self.state = ReceiveState(stream, sink.nbytes)
        self.sink = sink
        self.rate_of = rate_of
        self._receiver = receiver
        self._event = trio.Event()
        self._error: str | None = None

    @property
    def done(self) -> bool:
        """Whether it is over, well or not."""
        return self._event.is_set()

    async def wait(self) -> None:
        """Return when everything has landed and its emulated time has come. Raises PeerError when the sender gave up or is gone.

        Cancelled, the stream is no longer expected (see `cancel`).
        """
        try:
            await self._event.wait()
        except trio.Cancelled:
            self.cancel()
            raise
        if self._error is not None:
            raise PeerError(f"stream {self.state.stream}: {self._error}")
        await self._receiver.clock.sleep_until(self.state.arrive_s)

    def cancel(self) -> None:
        """Nothing may land any more, from this moment on; the sender is told."""
        if not self.done:
            self._receiver.give_up(self, "the receiver gave it up")

    def end(self, error: str | None) -> None:
        """It is over (called by the receiver)."""
        self._error = error
        self._event.set()


class BulkReceiver:
    """The receiving end of a channel. `run` must run while streams are expected."""

    def __init__(self, channel: Channel, clock: EmulatedClock) -> None:
        self.clock = clock
        self.dropped = 0
        self._channel = channel
        self._expected: dict[int, Arrival] = {}
        self._parked: dict[int, list[tuple[Chunk, bytes]]] = {}
        self._parked_bytes = 0
        self._ended: OrderedDict[int, Credit | Abort] = OrderedDict()
        self._staging = np.empty(CHUNK_BYTES, dtype=np.uint8)
        self._closed: str | None = None

    def expect(self, stream: int, sink: Sink, rate_of: Callable[[], float] | None = None) -> Arrival:
        """A stream of exactly ``sink.nbytes`` will come. `rate_of` gives the pace to tell the sender with each credit."""
        assert stream not in self._expected, f"stream {stream} is expected already"
        arrival = Arrival(self, stream, sink, rate_of)
        if self._closed is not None or sink.nbytes == 0:
            arrival.end(self._closed)
            return arrival
        self._expected[stream] = arrival
        for chunk, data in self._parked.pop(stream, ()):
            self._parked_bytes -= len(data)
            if stream in self._expected:
                self._land(arrival, chunk, None, data)
        return arrival

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take chunks until cancelled, or until the channel is closed."""
        task_status.started()
        receive = self._channel.receive
        try:
            while True:
                header, payload = await receive()
                try:
                    self._take(header, payload)
                except ProtocolError as error:
                    self.dropped += 1
                    log.warning("bulk channel %s: %s", self._channel.endpoint, error)
        except trio.ClosedResourceError:
            self.fail("the bulk channel was closed")

    def fail(self, reason: str) -> None:
        """The peer is gone: all streams end with PeerError."""
        self._closed = reason
        for arrival in list(self._expected.values()):
            self._end(arrival, Abort(arrival.state.stream, reason), reason)

    def give_up(self, arrival: Arrival, reason: str) -> None:
        """Expect that stream no longer, and tell its sender."""
        abort = Abort(arrival.state.stream, reason)
        self._end(arrival, abort, reason)
        self._answer(abort)

    def _end(self, arrival: Arrival, last_word: Credit | Abort, error: str | None) -> None:
        stream = arrival.state.stream
        self._expected.pop(stream, None)
        self._ended[stream] = last_word
        if len(self._ended) > ENDED_MAX:
            self._ended.popitem(last=False)
        arrival.end(error)

    def _take(self, header: bytes, payload: Payload | None) -> None:
        message = unpack_forward(header)
        arrival = self._expected.get(message.stream)
        if isinstance(message, Abort):
            self._drop_parked(message.stream)
            if arrival is not None:
                self._end(arrival, message, message.reason)
            return
        if payload is None:
            raise ProtocolError(f"stream {message.stream}: a chunk without data")
        if arrival is not None:
            self._land(arrival, message, payload, None)
        elif message.stream in self._ended:
            self._answer(self._ended[message.stream])
        else:
            self._park(message, payload)

    def _land(self, arrival: Arrival, chunk: Chunk, payload: Payload | None, held: bytes | None) -> None:
        """Put a chunk where it belongs, check it, credit it."""
        state, sink = arrival.state, arrival.sink
        try:
            wanted = state.wants(chunk)
        except ProtocolError as error:
            self.give_up(arrival, str(error))
            raise
        if not wanted:
            self._answer(self._paced(arrival, state.again()))
            return
        offset, length = chunk.offset, chunk.length
        place = sink.landing(offset, length)
        view = place if place is not None else self._staging.data[:length]
        if payload is not None:
            got = payload.into(view)
        else:
            assert held is not None
            got = len(held)
            if got == length:
                view[:] = held
        intact = got == length and (chunk.checksum is None or xxhash.xxh3_64_intdigest(view) == chunk.checksum)
        if intact and place is None:
            sink.put(offset, self._staging[:length])
        credit = state.take(chunk, intact)
        if credit is not None:
            credit = self._paced(arrival, credit)
            self._answer(credit)
            if state.done:
                self._end(arrival, credit, None)

    def _paced(self, arrival: Arrival, credit: Credit) -> Credit:
        if arrival.rate_of is None:
            return credit
        rate = arrival.rate_of()
        return credit._replace(bytes_per_s=rate) if np.isfinite(rate) else credit

    def _park(self, chunk: Chunk, payload: Payload) -> None:
        """A chunk has overtaken the control message that announces its stream: keep it, if there is room."""
        if self._parked_bytes + chunk.length > PARKED_BYTES_MAX:
            self.dropped += 1
            return
        data = payload.take()
        self._parked_bytes += len(data)
        self._parked.setdefault(chunk.stream, []).append((chunk, data))

    def _drop_parked(self, stream: int) -> None:
        for _, data in self._parked.pop(stream, ()):
            self._parked_bytes -= len(data)

    def _answer(self, message: Credit | Abort) -> None:
        try:
            self._channel.send_nowait(pack_credit(message) if isinstance(message, Credit) else pack_abort(message))
        except (trio.WouldBlock, trio.ClosedResourceError):
            self.dropped += 1  # the sender repeats when it hears nothing
