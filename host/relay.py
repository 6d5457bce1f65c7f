"""DMA from the memory of one device to that of another.

In the machine that is emulated the bytes cross the links between the two devices and no memory of the host: no host frame is allocated or
charged, and the arbiter paces one flow from the one to the other. What carries them is the host's process, to which both devices have a
bulk channel: it takes them a piece at a time and passes each on while the next comes, so a transfer of any size needs a few pieces of
memory here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import numpy as np
import trio

from hmmnet.errors import HmmnetError, Unreachable
from hmmnet.fabric.dma import BytesSink, BytesSource
from hmmnet.pages import HUGE_PAGES, LARGE, PAGE_SIZE, Words, pages_in, to_wire, word_of
from hmmnet.wire.messages import CopyOut

from .interfaces import DeviceLink
from .link import SessionLink

PIECE_PAGES = 16 * HUGE_PAGES
"""32 MiB: two windows of a stream, so that neither side waits for the other between pieces."""
PIECES_WAITING = 1
"""Pieces that have come and wait to be passed on."""

log = logging.getLogger("hmmnet.host")


def pieces(frames: Words) -> Iterator[slice]:
    """Cut a list of frames, which may be large, into pieces of at most `PIECE_PAGES` pages."""
    behind = np.cumsum(np.where(frames >= word_of(LARGE), HUGE_PAGES, 1))
    first = 0
    while first < len(frames):
        done = int(behind[first - 1]) if first else 0
        stop = int(np.searchsorted(behind, done + PIECE_PAGES, "right"))
        yield slice(first, stop)
        first = stop


async def copy_across(source: DeviceLink, target: DeviceLink, context: int, pages: Words, frames: Words, targets: Words) -> bool:
    """See `peers.Across`; both are living devices of this host. Raises PeerLost, PeerError of the target."""
    assert isinstance(source, SessionLink), "a device with a session"
    assert isinstance(target, SessionLink), "a device with a session"
    return await _Relay(source, target, context).run(pages, frames, targets)


class _Relay:
    """One transfer from device to device. What failed is noted, and ends both sides."""

    def __init__(self, source: SessionLink, target: SessionLink, context: int) -> None:
        self._source = source
        self._target = target
        self._context = context
        self._source_failed: HmmnetError | None = None
        """Also when no link leads from it to the target: its pages stay, and the target is there for others."""
        self._target_failed: HmmnetError | None = None

    async def run(self, pages: Words, frames: Words, targets: Words) -> bool:
        """All of it; False when the source failed. Raises PeerError when the target did."""
        if self._source.session.lost is not None:
            return False
        came, taken = trio.open_memory_channel[tuple[slice, "np.ndarray[tuple[int], np.dtype[np.uint8]]"]](PIECES_WAITING)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._fetch, pages, frames, came, nursery.cancel_scope)
            nursery.start_soon(self._pass_on, targets, taken, pages_in(frames) * PAGE_SIZE, nursery.cancel_scope)
        if self._target_failed is not None:
            raise self._target_failed
        if self._source_failed is not None:
            log.warning("pages of %s stay there: %s", self._source.name, self._source_failed)
            return False
        return True

    async def _fetch(
        self,
        pages: Words,
        frames: Words,
        came: trio.MemorySendChannel[tuple[slice, np.ndarray[tuple[int], np.dtype[np.uint8]]]],
        whole: trio.CancelScope,
    ) -> None:
        """Let the source drop its entries and stream, piece by piece. No link is asked: the flow to the target is the transfer."""
        link = self._source
        async with came:
            try:
                for piece in pieces(frames):
                    data = np.empty(pages_in(frames[piece]) * PAGE_SIZE, np.uint8)
                    stream = link.new_stream()
                    async with link.expected(stream, BytesSink(data)):
                        await link.ask_engine(
                            CopyOut(stream, self._context, to_wire(pages[piece]), to_wire(frames[piece]), 0.0, math.inf, 0.0)
                        )
                    await came.send((piece, data))
            except HmmnetError as error:  # first of all the other side is ended: a channel that closes would tell it that it has everything
                self._source_failed = error
                whole.cancel()

    async def _pass_on(
        self,
        targets: Words,
        taken: trio.MemoryReceiveChannel[tuple[slice, np.ndarray[tuple[int], np.dtype[np.uint8]]]],
        nbytes: int,
        whole: trio.CancelScope,
    ) -> None:
        """Stream to the target what has come, over the links between the two."""
        try:
            with self._target.from_peer(self._source.name, nbytes) as flow:
                async for piece, data in taken:
                    await self._target.fill(targets[piece], BytesSource(data), flow)
        except Unreachable as error:
            self._source_failed = error  # both may be well
            whole.cancel()
        except HmmnetError as error:
            self._target_failed = error
            whole.cancel()
