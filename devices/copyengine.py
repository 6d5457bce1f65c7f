"""The copy engines: DMA streams into and out of this device's memory, at the host's command.

One engine for each direction, as GPUs have them, so a page coming in never waits behind a page going out. Commands name frames, and
frames are checked against what they are allowed for (see `memory`). Data move by runs of frames, a chunk at a time, without passing through
anything that knows pages.

A copy *in* may be abandoned: when a migration fails half way, the frames it was to fill go back to the allocator, and a late chunk must
not land in a frame that is somebody else's by then.
"""

from __future__ import annotations

import logging

import numpy as np
import trio
import xxhash

from hmmnet.errors import PeerError, ProtocolError
from hmmnet.fabric.dma import ArenaSink, ArenaSource, Arrival, BulkReceiver, BulkSender, Pace
from hmmnet.fabric.stream import Holds
from hmmnet.pages import PAGE_SIZE, Words, from_wire, page_by_page, pages_in
from hmmnet.wire.messages import INLINE_BYTES_MAX, Copied, CopyIn, CopyOut

from .memory import Memory, physical

COPIES_MAX = 4096
"""Copies in one direction under way at once; a host that asks for more does not wait for its own migrations."""

log = logging.getLogger("hmmnet.devices")


class CopyEngines:
    """Both engines of one device. Streams out run in `nursery`."""

    def __init__(self, memory: Memory, sender: BulkSender, receiver: BulkReceiver, nursery: trio.Nursery) -> None:
        self.bytes_in = 0
        self.bytes_out = 0
        self._memory = memory
        self._points = memory.points
        sender.step = self._step
        self._sender = sender
        self._receiver = receiver
        self._nursery = nursery
        self._landing: dict[int, tuple[Arrival, Words]] = {}
        self._leaving: set[int] = set()

    async def _step(self) -> None:
        """Before each chunk that goes out."""
        if self._points.armed:
            await self._points.at("device.mid_copy")

    def copy_in(self, message: CopyIn) -> None:
        """Expect the stream, and zero what is to be zero. Raises ProtocolError."""
        targets = self._memory.landing(message.targets, message.zeros)
        if message.stream == 0:
            if len(targets):
                raise ProtocolError("CopyIn names targets but no stream")
            return
        if len(targets) == 0:
            raise ProtocolError(f"CopyIn of stream {message.stream} names no targets")
        self._forget_landed()
        if len(self._landing) >= COPIES_MAX or message.stream in self._landing:
            raise ProtocolError(f"CopyIn of stream {message.stream}: it is under way, or {COPIES_MAX} others are")
        arrival = self._receiver.expect(message.stream, ArenaSink(self._memory.arena, physical(targets), PAGE_SIZE))
        self._landing[message.stream] = (arrival, targets)
        self.bytes_in += len(targets) * PAGE_SIZE

    def _forget_landed(self) -> None:
        for stream in [stream for stream, (arrival, _) in self._landing.items() if arrival.done]:
            del self._landing[stream]

    def abandon(self, frames: Words) -> None:
        """Granted `frames` were not used: nothing may land in them any more."""
        self._forget_landed()
        if len(frames) == 0:
            return
        for stream, (arrival, targets) in list(self._landing.items()):
            if np.isin(targets, page_by_page(frames)).any():
                arrival.cancel()
                del self._landing[stream]

    def copy_inline(self, message: CopyOut) -> tuple[Words, Copied]:
        """The bytes of a few frames, at once; returns the frames, whose mappings the caller drops, and the answer. Raises ProtocolError."""
        count = pages_in(from_wire(message.frames)) if len(message.frames) % 8 == 0 else 0
        if count == 0 or count * PAGE_SIZE > INLINE_BYTES_MAX:
            raise ProtocolError(f"CopyOut without a stream names {count} frames: one, and at most {INLINE_BYTES_MAX} bytes")
        frames = self._memory.depart(message.frames, "CopyOut.frames")
        data = self._memory.load(physical(page_by_page(frames)), PAGE_SIZE).tobytes()
        self.bytes_out += len(data)
        return frames, Copied(data, xxhash.xxh3_64_intdigest(data))

    def copy_one(self, frame: int) -> Copied:
        """`copy_inline` for one frame, without arrays. Raises ProtocolError."""
        self._memory.depart_one(frame, "CopyOut.frames")
        data = self._memory.page_bytes(frame).tobytes()
        self.bytes_out += PAGE_SIZE
        return Copied(data, xxhash.xxh3_64_intdigest(data))

    def copy_out(self, message: CopyOut) -> Words:
        """Begin to stream frames to the host; returns them, whose mappings the caller drops. Raises ProtocolError."""
        if not message.frames or message.stream == 0:
            raise ProtocolError("CopyOut names no frames, or no stream")
        if len(self._leaving) >= COPIES_MAX or message.stream in self._leaving:
            raise ProtocolError(f"CopyOut of stream {message.stream}: it is under way, or {COPIES_MAX} others are")
        frames = self._memory.depart(message.frames, "CopyOut.frames")
        self._leaving.add(message.stream)
        pace = Pace(message.start_s, message.bytes_per_s, message.latency_s)
        self._nursery.start_soon(self._stream_out, message.stream, page_by_page(frames), pace)
        return frames

    async def _stream_out(self, stream: int, frames: Words, pace: Pace) -> None:
        try:
            if self._points.armed:
                await self._points.at("device.copy_out", pages=len(frames))
            await self._sender.send(stream, ArenaSource(self._memory.arena, physical(frames), PAGE_SIZE), pace)
            self.bytes_out += len(frames) * PAGE_SIZE
        except PeerError as error:
            # The host aborted the stream, or is gone, or learns it now; the frames stay ours until it frees them.
            self._sender.abandon(stream, str(error))
            log.warning("stream %d to the host ended early: %s", stream, error)
        finally:
            self._leaving.discard(stream)

    def account(self, stream: int) -> tuple[int, Holds]:
        """How a stream out goes on, and what it waits for (`BulkSender.account`): for nothing, if the engine has not begun with it."""
        begun, holds = self._sender.account(stream)
        return begun, Holds.NOTHING if holds is Holds.GONE and stream in self._leaving else holds
