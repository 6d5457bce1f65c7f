"""What a device asks of the host: range faults, migrations, and DMA to memory that is not its own.

The only file in which a model's requests become messages. Every request is *shielded* from cancellation: a job may be ended at any moment,
but the host, once asked, will do its part, and expects ours (a `Migrated` wants its `MigrateDone`, a stream wants its receiver). All of
them end in bounded time: with the answer, or with `PeerLost` when the host is gone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import trio

from hmmnet.errors import ProtocolError
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.dma import BulkReceiver, BulkSender, BytesSink, BytesSource, Pace, Pacer, Sink, Source
from hmmnet.pages import MIGRATE_PFN_COMPOUND, Words, from_wire, pages_in, to_wire
from hmmnet.wire.messages import (
    DmaGrant,
    DmaRead,
    DmaWrite,
    Done,
    Evict,
    Evicted,
    Exclusive,
    MakeExclusive,
    Message,
    Migrate,
    Migrated,
    MigrateDone,
    RangeFault,
    RangeFaulted,
    Subscribe,
    Subscribed,
)

Bytes = npt.NDArray[np.uint8]
M = TypeVar("M", bound=Message)

SELECT_SYSTEM = 1
SELECT_DEVICE_PRIVATE = 2
SELECT_DEVICE_COHERENT = 4
SELECT_COMPOUND = 8
"""enum migrate_vma_direction, as `Migrate.select` carries it."""
SELECT_PEERS = 32
"""Of the devices' pages those of others of this driver."""
SELECT_PARTS_STAY = 64
"""Pages of a large folio that is mapped page by page stay, as they did up to Linux 6.18."""


class Requests(Protocol):
    """The part of a wire session that is used here."""

    async def ask_shielded(self, message: Message, answer: type[M]) -> M:
        """The answer to a request, cancelled or not. Raises KernelError, RemoteError, PeerLost, ProtocolError."""
        ...

    def note(self, message: Message) -> None:
        """Tell without an answer."""
        ...


class Bus:
    """The device's end of its links: the control session and one bulk stream in each direction."""

    def __init__(self, session: Requests, sender: BulkSender, receiver: BulkReceiver, clock: EmulatedClock) -> None:
        self.clock = clock
        self._session = session
        self._ask = session.ask_shielded
        self._sender = sender
        self._receiver = receiver
        self._streams = 1

    def _new_stream(self) -> int:
        """Streams of the device are odd."""
        self._streams += 2
        return self._streams

    # --- mirror ---------------------------------------------------------------------------------------------------------------

    async def subscribe(self, context: int, start: int, end: int, overshoot: int) -> Subscribed:
        """mmu_interval_notifier_insert."""
        return await self._ask(Subscribe(context, start, end, held=True, overshoot=overshoot), Subscribed)

    async def range_fault(self, message: RangeFault) -> tuple[int, Words]:
        """hmm_range_fault: the subscription's sequence, and one word for each page."""
        reply = await self._ask(message, RangeFaulted)
        return reply.sequence, _words(reply.words, message.pages, "RangeFaulted")

    async def make_exclusive(self, context: int, subscription: int, start: int, pages: int, *, folios: bool) -> tuple[int, Words]:
        """make_device_exclusive_range: the subscription's sequence, and words of the pages that were had, from the first on."""
        reply = await self._ask(MakeExclusive(context, subscription, start, pages, folios), Exclusive)
        if len(reply.words) > 8 * pages:
            raise ProtocolError(f"Exclusive with {len(reply.words)} bytes for {pages} pages")
        return reply.sequence, _words(reply.words, len(reply.words) // 8, "Exclusive")

    # --- migration ------------------------------------------------------------------------------------------------------------

    async def migrate(self, message: Migrate) -> tuple[Migrated, Words]:
        """migrate_vma: the reply, and its words."""
        reply = await self._ask(message, Migrated)
        words = from_wire(reply.words)
        if pages_in(words, MIGRATE_PFN_COMPOUND) != message.pages:
            raise ProtocolError(f"the host's Migrated has words for {pages_in(words, MIGRATE_PFN_COMPOUND)} pages, not {message.pages}")
        return reply, words

    def migrate_done(self, migration: int) -> None:
        """The device table is up to date: the host may finalize."""
        self._session.note(MigrateDone(migration))

    async def evict(self, frames: Words, cause: str) -> Evicted:
        """migrate_device_range: how many of the own `frames` went home, and how many never will."""
        return await self._ask(Evict(to_wire(frames), cause), Evicted)

    # --- DMA ------------------------------------------------------------------------------------------------------------------

    async def read(self, context: int, pages: Words, addresses: Words, size: int) -> Bytes:
        """Elements of memory that is not ours, in order."""
        stream = self._new_stream()
        out = np.empty(len(addresses) * size, dtype=np.uint8)
        with trio.CancelScope(shield=True):
            arrival = self._receiver.expect(stream, BytesSink(out))
            try:
                await self._ask(DmaRead(context, stream, to_wire(pages), to_wire(addresses), size), Done)
            except BaseException:
                arrival.cancel()
                raise
            await arrival.wait()
        return out

    async def write(self, context: int, pages: Words, addresses: Words, size: int, data: Bytes) -> None:
        """Store elements to memory that is not ours; they have landed when this returns."""
        stream = self._new_stream()
        with trio.CancelScope(shield=True):
            grant = await self._ask(DmaWrite(context, stream, to_wire(pages), to_wire(addresses), size), DmaGrant)
            await self._sender.send(stream, BytesSource(data), Pace(grant.start_s, grant.bytes_per_s, grant.latency_s))

    async def send(self, stream: int, source: Source, pacer: Pacer) -> None:
        """Stream to the host; returns when everything has landed there."""
        with trio.CancelScope(shield=True):
            await self._sender.send(stream, source, pacer)

    @asynccontextmanager
    async def expected(self, stream: int, sink: Sink) -> AsyncIterator[None]:
        """Expect a stream from the host around the request that causes it; complete when the block is left without an error."""
        arrival = self._receiver.expect(stream, sink)
        try:
            yield
        except BaseException:
            arrival.cancel()
            raise
        await arrival.wait()


def _words(raw: bytes, pages: int, what: str) -> Words:
    if len(raw) != 8 * pages:
        raise ProtocolError(f"the host's {what} holds {len(raw)} bytes of words for {pages} pages")
    return from_wire(raw)
