"""DMA of a device to memory that is not its own: through the emulated IOMMU, by frame number, as a stream over its links.

The device names pages and the physical addresses that it computed from its mirror. If its context's domain says the same, the data go
straight between the host's arenas and the bulk channel; the pages cannot change hands meanwhile, because whoever invalidates them waits for
DMA under way (`Domain.busy`). They stay mapped, so what a program sees of a write are chunks that were checked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from hmmnet.errors import IommuFault, PeerError, ProtocolError
from hmmnet.fabric.arbiter import Flow
from hmmnet.fabric.dma import ArenaSource, LiveSink, Sink
from hmmnet.pages import PAGE_SHIFT, PAGES_MAX, Words, bits_in_any, from_wire, largest
from hmmnet.wire.messages import DmaGrant, DmaRead, DmaWrite
from hmmnet.wire.session import Session

from .device import Context, Life
from .dma_map import DeviceDma
from .interconnect import Interconnect
from .iommu import Access

DMA_BYTES_MAX = 1 << 30
"""Data of one request; a device cuts longer ones."""

log = logging.getLogger("hmmnet.host")


class Dma:
    """Serves the DMA requests of one life of a device; streams towards us run in `nursery`."""

    def __init__(self, life: Life, interconnect: Interconnect, nursery: trio.Nursery, maps: DeviceDma) -> None:
        self.refused = 0
        """Accesses that the IOMMU refused."""
        self.last_refusal = ""
        self.on_refused: Callable[[str, str], None] | None = None
        """Called with (device, why) for each of them."""
        self.maps = maps
        """How it reaches what."""
        self._life = life
        self._interconnect = interconnect
        self._nursery = nursery
        self._streams: set[int] = set()

    def attach(self, session: Session) -> None:
        """Answer `session`."""
        session.on(DmaRead, self.read)
        session.on(DmaWrite, self.write)

    async def read(self, message: DmaRead) -> None:
        """Stream to the device. Raises IommuFault, ProtocolError, KernelError(EAGAIN, ESRCH), PeerLost."""
        context = self._life.context(message.context)
        pages, addresses = self._checked(context, message, write=False)
        access = context.domain.begin(pages, write=False)
        try:
            source = ArenaSource(self._interconnect.memories, addresses, message.size)
            await self._life.link.send(message.stream, source, int(addresses[0]) >> PAGE_SHIFT)
            self.maps.count(int(addresses[0]) >> PAGE_SHIFT, source.nbytes)
        finally:
            self._streams.discard(message.stream)
            self._end(context, access)

    async def write(self, message: DmaWrite) -> DmaGrant:
        """Be ready for a stream from the device. Raises IommuFault, ProtocolError, KernelError(EAGAIN, ESRCH), PeerLost."""
        context = self._life.context(message.context)
        pages, addresses = self._checked(context, message, write=True)
        access = context.domain.begin(pages, write=True)
        sink = LiveSink(self._interconnect.memories, addresses, message.size)
        flow: Flow = await self._nursery.start(self._land, context, access, message.stream, sink, int(addresses[0]) >> PAGE_SHIFT)
        return DmaGrant(flow.start_s, flow.bytes_per_s, flow.latency_s)

    async def _land(
        self,
        context: Context,
        access: Access,
        stream: int,
        sink: Sink,
        frame: int,
        *,
        task_status: trio.TaskStatus[Flow] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Take the stream; it has started, for the reply, once it is expected."""
        started = False
        try:
            with trio.CancelScope() as scope:
                access.give_up = scope.cancel
                async with self._life.link.coming(stream, sink, frame) as flow:
                    task_status.started(flow)
                    started = True
            if scope.cancelled_caught:
                log.warning("a DMA write of %s never came, and nobody said why: stream %d is given up", self._life.name, stream)
            else:
                self.maps.count(frame, sink.nbytes)
        except PeerError as error:
            if not started:
                raise
            log.warning("a DMA write of %s ended early: %s", self._life.name, error)
        finally:
            self._streams.discard(stream)
            self._end(context, access)

    def _end(self, context: Context, access: Access) -> None:
        context.domain.end(access)
        self._life.link.dma_ended.unpark_all()

    def _checked(self, context: Context, message: DmaRead | DmaWrite, *, write: bool) -> tuple[Words, Words]:
        if len(message.pages) % 8 or len(message.pages) != len(message.addresses) or not message.pages:
            raise ProtocolError(f"DMA with {len(message.pages)} bytes of pages and {len(message.addresses)} of addresses")
        pages, addresses, size = from_wire(message.pages), from_wire(message.addresses), message.size
        if size & (size - 1) or bits_in_any(addresses) & size - 1:
            raise ProtocolError(f"DMA of elements of {size} bytes: the size is a power of two, and addresses are multiples of it")
        if largest(pages) >= PAGES_MAX or len(pages) * size > DMA_BYTES_MAX:
            raise ProtocolError(f"DMA of {len(pages)} elements of {size} bytes: beyond the address space, or over {DMA_BYTES_MAX} bytes")
        if message.stream & 1 == 0 or message.stream in self._streams:
            raise ProtocolError(f"DMA on stream {message.stream}: a device's streams have odd numbers, each used once")
        try:
            context.domain.check(pages, addresses, write)
        except IommuFault as fault:
            self.refused += 1
            self.last_refusal = str(fault)
            if self.on_refused is not None:
                self.on_refused(self._life.name, self.last_refusal)
            raise
        self._streams.add(message.stream)
        return pages, addresses
