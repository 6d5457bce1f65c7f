"""The receiving end of a bulk channel: chunks land where their stream's sink says, are checked, and are credited.

A chunk lands in destination memory itself where that is one run and nobody looks: frames that a migration goes to are mapped when all has
arrived, so a damaged chunk may leave garbage there until its repeat comes. Else it is written from a staging buffer, once its checksum has
been found to fit: the memory that a device stores to stays mapped all the while (`LiveSink`), and a peer can write to the ring between the
look and the copy.

Control and bulk are different sockets, so chunks may overtake the message that announces their stream. They are parked, within
`PARKED_BYTES_MAX`; beyond, they are dropped and come again. An abort may overtake it as well, and is remembered.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import trio
import xxhash

from hmmnet.errors import PeerError, ProtocolError
from hmmnet.sleeping import Bell, Completion
from hmmnet.wire.shortwait import BulkStream
from hmmnet.wire.transport import Channel, Payload

from .chunk import CHUNK_BYTES, Abort, Chunk, Credit, pack_abort, pack_credit, split_forward, unpack_forward
from .clock import EmulatedClock
from .ends import Bytes, Sink
from .pace import CATCH_UP_S, Schedule
from .ring import Ring
from .sender import until_there
from .stream import ReceiveState

PARKED_BYTES_MAX = 64 << 20
"""Data that may wait for their stream's announcement: four windows."""
ENDED_MAX = 1024
"""Ended streams that are remembered, to answer repeats of their chunks."""

log = logging.getLogger("hmmnet.fabric")


class Arrival:
    """A stream that is expected. Its `wait` returns when all of it has landed."""

    def __init__(
        self,
        receiver: BulkReceiver,
        stream: int,
        sink: Sink,
        flow: Schedule | None,
    ) -> None:
        self.state = ReceiveState(stream, sink.nbytes)
        self.sink = sink
        self.flow = flow
        self.on_failure: Callable[[], None] | None = None
        """Called at the moment at which it is clear that not all of it lands."""
        self._told_bytes_per_s = 0.0 if flow is None else flow.bytes_per_s
        """What its sender knows of the rate, if nothing was lost."""
        self._told_start_s = 0.0 if flow is None else flow.start_s
        """And of when it begins."""
        self._moved = False
        """Whether that is not what its grant said, or was not once."""
        self._moment = Bell()
        """Rings when its flow has changed."""
        self._receiver = receiver
        self._event = Completion()
        self._error: str | None = None
        self._moving = BulkStream()
        if flow is not None:
            flow.watch(self._changed)

    @property
    def done(self) -> bool:
        """Whether it is over, well or not."""
        return self._event.is_set()

    @property
    def failed(self) -> bool:
        """Whether it is over, and not all of it has landed."""
        return self._error is not None

    async def wait(self) -> None:
        """Return when everything has landed and, with a flow, its emulated time has come.

        Without one the sender alone knows that time: who waits for it, waits for that one's word, too. Raises PeerError when the sender
        gave up or is gone, Unreachable when links go down before the model has carried all of it, for too long (see `until_there`).
        Cancelled, the stream is no longer expected (see `cancel`).
        """
        try:
            await self._event.wait()
        except trio.Cancelled:
            self.cancel()
            raise
        if self._error is not None:
            raise PeerError(f"stream {self.state.stream}: {self._error}")
        clock, flow = self._receiver.clock, self.flow
        if flow is not None:
            await until_there(flow, clock, self._moment)

    def _changed(self) -> None:
        """Its flow has changed. The sender learns the rate with the next credit, which is late for who waits long for its next chunk."""
        self._moment.ring()
        flow, told = self.flow, self._told_bytes_per_s
        assert flow is not None, "it is that flow which says so"
        faster = told < flow.bytes_per_s and CHUNK_BYTES / told > CATCH_UP_S * self._receiver.clock.rate
        if self._error is None and (faster or flow.start_s != self._told_start_s):
            self._receiver.tell_rate(self)

    def paced(self, credit: Credit) -> Credit:
        """With the present rate; without one, if there is none, or no link."""
        flow = self.flow
        if flow is None or flow.stalled or not math.isfinite(flow.bytes_per_s):
            return credit
        self._moved = self._moved or flow.start_s != self._told_start_s
        self._told_bytes_per_s, self._told_start_s = flow.bytes_per_s, flow.start_s
        return credit._replace(bytes_per_s=flow.bytes_per_s, start_s=flow.start_s if self._moved else None)

    def cancel(self) -> None:
        """Nothing may land any more, from this moment on; the sender is told."""
        if not self.done:
            self._receiver.give_up(self, "the receiver gave it up")

    def end(self, error: str | None) -> None:
        """It is over (called by the receiver)."""
        self._error = error
        self._moving.end()
        self._event.set()
        if error is not None and self.on_failure is not None:
            self.on_failure()


class Held:
    """A chunk's data in memory: in a slot of the ring, or parked. A `Payload`.

    What is parked is our own, and can be looked at where it is; a slot the sender may write to at any time.
    """

    __slots__ = ("own", "view")

    def __init__(self, view: Bytes, *, own: bool) -> None:
        self.view = view
        self.own = own

    def into(self, view: memoryview) -> int:
        """See `Payload.into`."""
        if len(self.view) == len(view):
            view[:] = self.view.data
        return len(self.view)

    def take(self) -> bytes:
        """See `Payload.take`."""
        return self.view.tobytes()


class BulkReceiver:
    """The receiving end of a channel, and of the `ring` beside it, if there is one. `run` must run while streams are expected."""

    def __init__(self, channel: Channel, clock: EmulatedClock, *, ring: Ring | None = None) -> None:
        self.clock = clock
        self._ring = ring
        self.dropped = 0
        self._channel = channel
        self._expected: dict[int, Arrival] = {}
        self._parked: dict[int, dict[int, tuple[Chunk, bytes]]] = {}
        self._parked_bytes = 0
        self._ended: OrderedDict[int, Credit | Abort] = OrderedDict()
        """The last word on a stream that is over."""
        self._staging = np.empty(CHUNK_BYTES, dtype=np.uint8)
        self._closed: str | None = None

    def expect(self, stream: int, sink: Sink, flow: Schedule | None = None) -> Arrival:
        """A stream of exactly ``sink.nbytes`` will come.

        With a `flow` the arbiter is at this end: that says when a chunk is there, whatever its sender was told and says, and what comes
        while it is stalled is lost. The sender, whose grant has the rate of now, is told it with each credit, when it has risen much, and
        when it asks.
        """
        assert stream not in self._expected, f"stream {stream} is expected already"
        arrival = Arrival(self, stream, sink, flow)
        last_word = self._ended.get(stream)
        if self._closed is not None or sink.nbytes == 0:
            arrival.end(self._closed)
        elif isinstance(last_word, Abort):
            arrival.end(last_word.reason)
        else:
            self._expected[stream] = arrival
            self._land_parked(arrival)
        return arrival

    def _land_parked(self, arrival: Arrival) -> None:
        for chunk, data in self._unpark(arrival.state.stream):
            if arrival.done:
                return
            try:
                self._land(arrival, chunk, Held(np.frombuffer(data, dtype=np.uint8), own=True))
            except ProtocolError as error:
                self._drop(error)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take chunks until cancelled, or until the channel is closed."""
        task_status.started()
        receive = self._channel.receive
        try:
            while True:
                message, payload = await receive()
                first, *others = split_forward(message)
                self._take_or_drop(first, payload)
                for header in others:
                    await trio.lowlevel.checkpoint()  # a megabyte each
                    self._take_or_drop(header, None)
        except trio.ClosedResourceError:
            self.fail("the bulk channel was closed")

    def _take_or_drop(self, header: bytes, payload: Payload | None) -> None:
        try:
            self._take(header, payload)
        except ProtocolError as error:
            self._drop(error)

    def _drop(self, error: ProtocolError) -> None:
        self.dropped += 1
        log.warning("bulk channel %s: %s", self._channel.endpoint, error)

    def fail(self, reason: str) -> None:
        """The peer is gone: all streams end with PeerError."""
        self._closed = reason
        for arrival in list(self._expected.values()):
            self._end(arrival, Abort(arrival.state.stream, reason), reason)

    def missing(self) -> bool:
        """Whether it is certain that nobody is there at this moment who could send."""
        return self._channel.missing()

    def give_up(self, arrival: Arrival, reason: str) -> None:
        """Expect that stream no longer, and tell its sender."""
        abort = Abort(arrival.state.stream, reason)
        self._end(arrival, abort, reason)
        self._answer(abort)

    def _end(self, arrival: Arrival, last_word: Credit | Abort, error: str | None) -> None:
        self._expected.pop(arrival.state.stream, None)
        self._remember(last_word)
        arrival.end(error)

    def _remember(self, last_word: Credit | Abort) -> None:
        self._ended[last_word.stream] = last_word
        if len(self._ended) > ENDED_MAX:
            self._ended.popitem(last=False)

    def _take(self, header: bytes, payload: Payload | None) -> None:
        message = unpack_forward(header)
        arrival = self._expected.get(message.stream)
        if isinstance(message, Abort):
            self._take_abort(message, arrival)
            return
        if arrival is None and message.stream in self._ended:
            self._answer(self._ended[message.stream])
            return
        if message.slot is not None:
            payload = self._in_ring(message)
        elif payload is None and message.probe and arrival is not None:
            self.tell_rate(arrival)
            return
        if payload is None:
            if message.probe:
                return  # a question about a stream that is forgotten
            raise ProtocolError(f"stream {message.stream}: a chunk without data")
        if arrival is not None:
            self._land(arrival, message, payload)
        else:
            self._park(message, payload)

    def _in_ring(self, chunk: Chunk) -> Held:
        """A chunk's data in its slot. Raises ProtocolError."""
        if self._ring is None or chunk.slot is None:
            raise ProtocolError(f"stream {chunk.stream}: chunk {chunk.sequence} lies in slot {chunk.slot} of a ring that is not there")
        return Held(self._ring.part(chunk.slot, chunk.length), own=False)

    def _take_abort(self, abort: Abort, arrival: Arrival | None) -> None:
        if arrival is not None:
            self._end(arrival, abort, abort.reason)
        elif abort.stream not in self._ended:
            self._unpark(abort.stream)
            self._remember(abort)
        self._answer(abort)  # whoever gave it up tells again until this is heard

    def _land(self, arrival: Arrival, chunk: Chunk, payload: Payload) -> None:
        """Put a chunk where it belongs, check it, credit it."""
        state, flow = arrival.state, arrival.flow
        if flow is not None and flow.stalled:
            return  # lost with its link, and sent again when that is up
        try:
            if not state.wants(chunk):
                if chunk.probe:
                    self._answer(arrival.paced(state.again()))
                return
            if flow is not None:
                flow.grant(chunk.length, self.clock.now(), CATCH_UP_S * self.clock.rate)
            credit = state.take(chunk, self._put(arrival.sink, chunk, payload))
        except ProtocolError as error:
            self.give_up(arrival, str(error))
            raise
        if credit is not None:
            credit = arrival.paced(credit)
            self._answer(credit)
            if state.done:
                self._end(arrival, credit, None)

    def _put(self, sink: Sink, chunk: Chunk, payload: Payload) -> bool:
        """Put a chunk's data in their place; whether they are intact."""
        offset, length = chunk.offset, chunk.length
        place = sink.landing(offset, length)
        if place is not None:
            return payload.into(place) == length and _fits(place, chunk)
        if isinstance(payload, Held) and payload.own:
            data, got = payload.view, len(payload.view)
        else:  # what is checked must be what is written
            data = self._staging[:length]
            got = payload.into(data.data)
        intact = got == length and _fits(data, chunk)
        if intact:
            sink.put(offset, data)
        return intact

    def tell_rate(self, arrival: Arrival) -> None:
        """Tell a sender that may have no chunk out how fast it may send, and from when on.

        What is lost, the host's watchdog has sent again; when all has landed, its sender asks for it. While links are down there is no
        rate, and a sender that heard of one would take it for a sign that what it sends arrives.
        """
        if arrival.flow is not None and arrival.flow.stalled:
            return
        credit = arrival.paced(arrival.state.credit())
        if arrival.done:
            self._remember(credit)
        self._answer(credit)

    def _park(self, chunk: Chunk, payload: Payload) -> None:
        """A chunk has overtaken the control message that announces its stream: keep it, if it is new and there is room."""
        parked = self._parked.get(chunk.stream, {})
        if chunk.sequence in parked or self._parked_bytes + chunk.length > PARKED_BYTES_MAX:
            self.dropped += 1
            return
        data = payload.take()
        self._parked_bytes += len(data)
        self._parked.setdefault(chunk.stream, parked)[chunk.sequence] = (chunk, data)

    def _unpark(self, stream: int) -> list[tuple[Chunk, bytes]]:
        """What was parked for `stream`, which is not parked any more."""
        parked = list(self._parked.pop(stream, {}).values())
        self._parked_bytes -= sum(len(data) for _, data in parked)
        return parked

    def _answer(self, message: Credit | Abort) -> None:
        try:
            self._channel.send_nowait(pack_credit(message) if isinstance(message, Credit) else pack_abort(message))
        except (trio.WouldBlock, trio.ClosedResourceError):
            self.dropped += 1  # the sender repeats when it hears nothing


def _fits(data: Any, chunk: Chunk) -> bool:
    return chunk.checksum is None or xxhash.xxh3_64_intdigest(data) == chunk.checksum
