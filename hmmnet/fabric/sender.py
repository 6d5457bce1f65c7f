"""The sending end of a bulk channel: any number of streams at once, each paced, windowed and repeated until it is credited.

The rules are in `stream` and `pace`; here are the waits. A stream's task waits for its chunk's moment, for room in the channel, or for a
credit; `BulkSender.run` takes the credits of all streams. A credit ends the pin of what it covers.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio
import xxhash

from hmmnet.errors import PeerError, ProtocolError
from hmmnet.wire.transport import Channel

from .chunk import Abort, Credit, pack_abort, pack_chunk, unpack_back
from .clock import EmulatedClock
from .ends import Source
from .pace import CATCH_UP_S, UNPACED, Pace, Pacer
from .stream import SendState

REPEAT_S = 0.25
"""Real seconds without a credit after which the oldest chunk is repeated."""

log = logging.getLogger("hmmnet.fabric")


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
        self.step: Callable[[], Awaitable[None]] | None = None
        """Awaited before each chunk; an error it raises ends the stream."""
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
            if message.bytes_per_s > 0 and isinstance(out.pacer, Pace):  # the arbiter is at the other end
                out.pacer.bytes_per_s = message.bytes_per_s
        out.wake()

    async def send(self, stream: int, source: Source, pacer: Pacer = UNPACED) -> StreamReport:
        """Send all of `source`; returns when it has landed, verified, and its emulated time is over.

        Raises PeerError when the receiver aborts the stream, is gone, or answers nothing. When cancelled, the receiver is told.
        """
        assert stream not in self._streams, f"stream {stream} is under way"
        if self._closed is not None:
            raise PeerError(f"stream {stream}: {self._closed}")
        if source.nbytes == 0:
            return StreamReport(0, 0, 0.0)
        out = self._streams[stream] = _Outgoing(SendState(stream, source.nbytes), pacer)
        arrive_s = began_s = self._clock.now()
        try:
            while not out.state.done:
                out.check()
                sequence = out.state.next()
                if sequence is None:
                    await self._await_credit(out)
                else:
                    arrive_s = max(arrive_s, await self._send_chunk(out, source, sequence))
        except BaseException:
            self.abandon(stream)
            raise
        finally:
            del self._streams[stream]
        await self._clock.sleep_until(arrive_s)
        return StreamReport(source.nbytes, out.state.resent, max(arrive_s, self._clock.now()) - began_s)

    async def _send_chunk(self, out: _Outgoing, source: Source, sequence: int) -> float:
        """Returns when the chunk will be there, emulated."""
        state, clock = out.state, self._clock
        offset = sequence * state.stride
        length = min(state.stride, state.total - offset)
        grant = out.pacer.grant(length, clock.now(), CATCH_UP_S * clock.rate)
        if self.step is not None:
            await self.step()
        await clock.sleep_until(grant.start_s)
        data = source.chunk(offset, length)
        checksum = xxhash.xxh3_64_intdigest(data) if self._checksums else None
        header = pack_chunk(state.chunk(sequence, checksum, grant.arrive_s))
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

    def abandon(self, stream: int) -> None:
        """Tell the receiver that nothing more comes of `stream`."""
        try:
            self._channel.send_nowait(pack_abort(Abort(stream, "the sender gave it up")))
        except (trio.WouldBlock, trio.ClosedResourceError):
            log.info("stream %d ended without telling the receiver: the channel is closed or full", stream)
