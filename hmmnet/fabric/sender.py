"""The sending end of a bulk channel: any number of streams at once, each paced, windowed and repeated until it is credited.

The rules are in `stream` and `pace`; here are the waits. A stream's task waits for its chunk's moment, for room in the channel, or for a
credit; `BulkSender.run` takes the credits of all streams. A credit ends the pin of what it covers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio
import xxhash

from hmmnet.errors import HmmnetError, PeerError, ProtocolError, Unreachable
from hmmnet.sleeping import Bell, Completion, sleep
from hmmnet.wire.shortwait import BulkStream
from hmmnet.wire.transport import Channel

from .chunk import ANNOUNCED_MAX, Abort, Credit, pack_abort, pack_chunk, unpack_back
from .clock import EmulatedClock
from .ends import Bytes, Source
from .pace import CATCH_UP_S, UNPACED, Pace, Pacer
from .ring import Ring
from .stream import CREDIT_EVERY, REPEATS_MAX, Holds, SendState

REPEAT_S = 0.25
"""Real seconds without a credit after which the oldest chunk is repeated."""
DOWN_S = REPEAT_S * REPEATS_MAX
"""Real seconds that a stream waits for a link that is down: as long as it repeats what nobody answers."""
ABORTS_MAX = 8
"""How often a receiver is told that nothing more comes of a stream, `REPEAT_S` apart: who has not said then that it has heard is gone."""
ABANDONED_MAX = 1024
"""Streams of which a receiver that has no connection is to be told that; beyond, the oldest are forgotten, and who waits for one asks (see
`hmmnet.host.watchdog`)."""
LOOK_S = 0.005
"""Real seconds between two looks at such a link."""
IDLE_S = 1.0
"""Real seconds without a stream after which the memory of a ring goes back to the operating system: committing it again costs as much as
filling it."""

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
        self.bell = Bell()
        self.heard = False
        self.slots: dict[int, int] = {}
        """Where its chunks lie in the ring, by sequence."""
        self.held: list[bytes] = []
        """Headers of chunks that lie in the ring and are not announced yet."""
        self.moment = Bell()
        """Rings when the moments that it was granted have changed."""
        self.paced = False
        """Whether it sleeps until its chunk may leave, or longer, where its clock has changed meanwhile."""
        self.no_way = False
        """Whether it waits for a link, or for room in the channel."""

    def check(self) -> None:
        """Raises PeerError when the receiver has given the stream up."""
        if self.aborted is not None:
            raise PeerError(f"stream {self.state.stream} was given up by its receiver: {self.aborted}")

    def wake(self) -> None:
        """Something was heard from the receiver."""
        self.heard = True
        self.bell.ring()


class BulkSender:
    """The sending end of a channel. `run` must run while streams are sent.

    Chunks lie in the `ring` while the peer sees it, too, and has room; else, and without checksums, they are parts of messages.
    """

    def __init__(self, channel: Channel, clock: EmulatedClock, *, checksums: bool = True, ring: Ring | None = None) -> None:
        self.ring = ring if checksums else None
        self._channel = channel
        self._clock = clock
        self._checksums = checksums
        self.step: Callable[[], Awaitable[None]] | None = None
        """Awaited before each chunk; an error it raises ends the stream."""
        self._streams: dict[int, _Outgoing] = {}
        self._closed: str | None = None
        self._ring_used = Completion()
        self._abandoned: dict[int, tuple[Abort, int]] = {}
        """Streams that were given up, until the receiver says that it has heard of it: what it is told, and how often it was."""
        self._nursery: trio.Nursery | None = None
        """Of `run`, while it runs."""
        self._repeating = False
        """Whether somebody tells receivers again of what was given up."""

    @property
    def carries(self) -> str:
        """What page data go through: ``ring`` or ``messages``."""
        return "ring" if self.ring is not None and self.ring.usable else "messages"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take credits until cancelled, or until the channel is closed."""
        task_status.started()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            if self.ring is not None:
                nursery.start_soon(self._discard_idle, self.ring)
            self._repeat()
            try:
                await self._take_credits()
            finally:
                self._nursery = None  # it takes nobody any more
            nursery.cancel_scope.cancel()

    async def _take_credits(self) -> None:
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
        self._abandoned.clear()
        for out in self._streams.values():
            out.aborted = reason
            out.wake()

    def account(self, stream: int) -> tuple[int, Holds]:
        """A number that grows with each chunk of a stream, and what it waits for at this moment."""
        out = self._streams.get(stream)
        if out is None:
            return 0, Holds.GONE
        if out.no_way:
            holds = Holds.WAY
        elif out.bell.awaited:
            holds = Holds.CREDIT
        else:
            holds = Holds.PACE if out.paced or self._clock.now() < out.pacer.last.start_s else Holds.NOTHING
        return out.state.begun, holds

    def refused(self, stream: int, why: object) -> None:
        """The receiver has said by another way that it does not expect the stream, which may have ended: `send` raises PeerError."""
        out = self._streams.get(stream)
        if out is not None:
            out.aborted = str(why)
            out.wake()

    def _take(self, message: Credit | Abort) -> None:
        out = self._streams.get(message.stream)
        if out is None:  # ended here: a late credit, or an abort that the receiver has heard of
            if isinstance(message, Abort):
                self._abandoned.pop(message.stream, None)
            return
        if isinstance(message, Abort):
            out.aborted = message.reason
        else:
            out.state.credit(message)
            self._free_slots(out, out.state.landed)
            if message.bytes_per_s > 0 and isinstance(out.pacer, Pace):  # the arbiter is at the other end
                out.pacer.hear(message.bytes_per_s, message.start_s, self._clock.now())
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
        pacer.watch(out.moment.ring)
        began_s = self._clock.now()
        try:
            await self._send_all(out, source)
            await self._ask_until(out, lambda: pacer.there_s)
            await until_there(pacer, self._clock, out.moment)
        finally:
            del self._streams[stream]
        return StreamReport(source.nbytes, out.state.resent, max(pacer.there_s, self._clock.now()) - began_s)

    async def _send_all(self, out: _Outgoing, source: Source) -> None:
        moving = BulkStream()
        try:
            while not out.state.done:
                out.heard = False
                out.check()
                sequence = out.state.next() if self._has_room(out) else None
                if sequence is None:
                    await self._announce(out)
                    await self._await_credit(out)
                else:
                    await self._send_chunk(out, source, sequence)
        except BaseException as error:
            self.abandon(out.state.stream, str(error) if isinstance(error, HmmnetError) else "")
            raise
        finally:
            moving.end()
            self._free_slots(out, out.state.chunks)

    async def _send_chunk(self, out: _Outgoing, source: Source, sequence: int) -> None:
        state, clock = out.state, self._clock
        if out.pacer.stalled:
            await self._await_link(out)
        offset = sequence * state.stride
        length = min(state.stride, state.total - offset)
        out.pacer.grant(length, clock.now(), CATCH_UP_S * clock.rate)
        if self.step is not None:
            await self.step()
        if clock.real_until(out.pacer.last.start_s) > clock.sleep_min_s:
            await self._announce(out)
            await self._await_moment(out)
        if self.ring is not None:
            await trio.lowlevel.checkpoint()  # a megabyte, as every one: others have their turn
        slot = self._slot(out, sequence)
        if slot is None or self.ring is None:
            payload = source.chunk(offset, length)
            checksum = xxhash.xxh3_64_intdigest(payload) if self._checksums else None
        else:
            payload, checksum = None, _fill(source, offset, self.ring.part(slot, length))
        header = pack_chunk(state.chunk(sequence, checksum, slot))
        if payload is None:
            out.held.append(header)
            if len(out.held) == ANNOUNCED_MAX or state.out < CREDIT_EVERY:  # with few out, the receiver may be waiting
                await self._announce(out)
        else:
            await self._announce(out)
            await self._send_message(out, header, payload)

    async def _await_moment(self, out: _Outgoing) -> None:
        """Return when the chunk that was granted last may leave, over a link that works. Raises what `_await_link` does."""
        while True:
            out.paced = True
            if out.state.unsure:
                await self._ask_until(out, lambda: out.pacer.last.start_s)
            await self._clock.sleep_until_then(lambda: out.pacer.last.start_s, out.moment)
            out.paced = False
            if not out.pacer.stalled:
                return
            await self._await_link(out)

    async def _announce(self, out: _Outgoing) -> None:
        """Tell the receiver of the chunks that lie in the ring."""
        if out.held:
            held, out.held = out.held, []
            await self._send_message(out, b"".join(held), None)

    async def _send_message(self, out: _Outgoing, header: bytes, payload: Any) -> None:
        out.no_way = True
        try:
            await self._channel.send(header, payload)
        except trio.ClosedResourceError:
            raise PeerError(f"stream {out.state.stream}: the bulk channel was closed") from None
        except trio.BrokenResourceError as error:
            raise PeerError(f"stream {out.state.stream}: {error}") from None
        out.no_way = False

    # --- the ring -------------------------------------------------------------------------------------------------------------

    def _has_room(self, out: _Outgoing) -> bool:
        """Whether a chunk can go now. Without a free slot a stream waits for its credits, if so many chunks are out that some will come."""
        ring = self.ring
        return ring is None or ring.slots.free > 0 or out.state.repeats or out.state.out < CREDIT_EVERY or not ring.usable

    def _slot(self, out: _Outgoing, sequence: int) -> int | None:
        """Where a chunk is to lie: where it did, if it is sent again. None: nowhere in the ring."""
        if self.ring is None or not self.ring.usable:
            return None
        slot = out.slots.get(sequence)
        if slot is None:
            slot = self.ring.slots.take()
            if slot is not None:
                out.slots[sequence] = slot
                self._ring_used.set()
        return slot

    def _free_slots(self, out: _Outgoing, landed: int) -> None:
        """Chunks below `landed` need theirs no longer."""
        if out.slots and self.ring is not None:
            for sequence in [sequence for sequence in out.slots if sequence < landed]:
                self.ring.slots.give_back(out.slots.pop(sequence))

    async def _discard_idle(self, ring: Ring) -> None:
        """When no chunk has lain in the ring for a while, give its memory back to the operating system."""
        while True:
            await self._ring_used.wait()
            self._ring_used = Completion()
            await sleep(self._clock.real(IDLE_S))
            if not self._ring_used.is_set() and ring.slots.idle:
                ring.discard()
            else:
                self._ring_used.set()

    async def _await_link(self, out: _Outgoing) -> None:
        """Return when a link leads to the receiver again. Raises Unreachable when none does for `DOWN_S`, PeerError if it gave up."""
        await self._announce(out)
        out.no_way = True
        with trio.move_on_after(self._clock.real(DOWN_S)):
            while out.pacer.stalled:
                out.check()
                await sleep(self._clock.real(LOOK_S))
            out.no_way = False
            return
        raise Unreachable(f"stream {out.state.stream}: no link that works leads to its receiver: links are down for {DOWN_S:g} s")

    # --- waiting --------------------------------------------------------------------------------------------------------------

    async def _ask_until(self, out: _Outgoing, moment: Callable[[], float]) -> None:
        """Ask the arbiter, if it is at the other end, for the pace, again and again until that moment is near.

        It may have told a new one in vain, and tells it again (`host.watchdog`) only while it expects something: this is for who may
        have sent all.
        """
        clock = self._clock
        while isinstance(out.pacer, Pace) and clock.real_until(moment()) > REPEAT_S:
            with trio.move_on_after(clock.real(REPEAT_S)):
                await clock.sleep_until_then(moment, out.moment)
                return
            try:
                self._channel.send_nowait(pack_chunk(out.state.question()))
            except (trio.WouldBlock, trio.ClosedResourceError):
                log.debug("the receiver of stream %d is not asked for its pace now: the channel is closed or full", out.state.stream)

    async def _await_credit(self, out: _Outgoing) -> None:
        if not out.heard:  # since the state was looked at
            await out.bell.heard_by(trio.current_time() + self._clock.real(REPEAT_S))
        if not out.heard:
            out.state.timeout()

    def abandon(self, stream: int, why: str = "") -> None:
        """Tell the receiver that nothing more comes of `stream`, and `why`; again and again, until it says that it has heard."""
        abort = Abort(stream, "the sender gave it up" + (f": {why}" if why else ""))
        if self._closed is None:
            self._abandoned[stream] = (abort, 1)
            if len(self._abandoned) > ABANDONED_MAX:
                del self._abandoned[next(iter(self._abandoned))]
            self._repeat()
        self._tell(abort)

    def _repeat(self) -> None:
        """Begin to tell receivers again of what was given up, if anything was, and nobody does."""
        if self._abandoned and not self._repeating and self._nursery is not None:
            self._repeating = True
            self._nursery.start_soon(self._repeat_aborts)

    async def _repeat_aborts(self) -> None:
        """Messages of this channel may be lost, and a receiver that has not heard would wait for as long as it can."""
        while self._abandoned:
            await sleep(self._clock.real(REPEAT_S))
            for stream, (abort, told) in list(self._abandoned.items()):
                if told == ABORTS_MAX:
                    del self._abandoned[stream]
                elif self._tell(abort):
                    self._abandoned[stream] = (abort, told + 1)
                else:
                    break  # the others would go the same way
        self._repeating = False

    def _tell(self, abort: Abort) -> bool:
        """Whether it is on its way: while the receiver has no connection, it waits to be told."""
        try:
            self._channel.send_nowait(pack_abort(abort))
        except (trio.WouldBlock, trio.ClosedResourceError):
            log.debug("the receiver of stream %d, which is given up, is not told now: the channel is closed or full", abort.stream)
            return False
        return True


async def until_there(pacer: Pacer, clock: EmulatedClock, changed: Bell) -> None:
    """Return when all that was granted is there. Raises Unreachable when some of it has had no link to leave by for `DOWN_S`.

    `changed` rings when the moments of `pacer` have changed.
    """
    while True:
        await clock.sleep_until_then(lambda: -math.inf if pacer.stalled and pacer.there_s == math.inf else pacer.there_s, changed)
        if not (pacer.stalled and pacer.there_s == math.inf):
            return
        up_by_s = trio.current_time() + clock.real(DOWN_S)
        while pacer.there_s == math.inf:
            if trio.current_time() >= up_by_s:
                raise Unreachable(f"no link that works leads from the sender to the receiver: links are down for {DOWN_S:g} s")
            await changed.heard_by(up_by_s)


def _fill(source: Source, offset: int, place: Bytes) -> int:
    """Copy a chunk into its slot; its checksum. (No coroutine holds the slot: it would keep a closed ring mapped while it unwinds.)"""
    source.fill(offset, place)
    return xxhash.xxh3_64_intdigest(place.data)
