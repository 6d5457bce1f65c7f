"""A device made for tests: it speaks the protocol over a real session, keeps its pages in an arena, and does as it is told at each message.

`on_message` is called first for everything that arrives; it may change what the device does: `vanish` in it is a `kill -9` at that moment.
While there is a `gate` that is not set, no context is opened.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import trio
import xxhash

from hmmnet.arena import Arena
from hmmnet.errors import PeerLost
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.dma import ArenaSink, ArenaSource, BulkReceiver, BulkSender, BytesSink, BytesSource, Pace
from hmmnet.host.process import Process
from hmmnet.host.service import Host
from hmmnet.pages import (
    HMM_PFN_FRAME_MASK,
    MIGRATE_PFN_MIGRATE,
    PAGE_SHIFT,
    PAGE_SIZE,
    PAGES_MAX,
    ZONE_SHIFT,
    Words,
    from_wire,
    to_wire,
)
from hmmnet.topology import DeviceSpec, LinkSpec, MemoryNode, Topology
from hmmnet.wire.client import connect
from hmmnet.wire.memory_transport import MemoryTransport
from hmmnet.wire.messages import (
    PROTOCOL_VERSION,
    CloseContext,
    Copied,
    CopyIn,
    CopyOut,
    DmaGrant,
    DmaRead,
    DmaWrite,
    Done,
    FreeFrames,
    Hello,
    Inspect,
    Invalidate,
    Ioctl,
    IoctlDone,
    Message,
    Migrate,
    Migrated,
    MigrateDone,
    OpenContext,
    RangeFault,
    RangeFaulted,
    Rate,
    Report,
    Subscribe,
    Subscribed,
    Welcome,
)
from hmmnet.wire.session import Session
from hmmnet.wire.transport import Transport

SECRET = b"s" * 32
HEARTBEAT_S, LEASE_S, RETRY_S = 0.05, 0.3, 0.1
PAGES = 256
KILLED = "was killed by signal 9"
EVERYTHING = (OpenContext, CloseContext, Invalidate, CopyIn, CopyOut, FreeFrames, Ioctl, Rate)
NO_FIGURES = Report(b"\x80")


def topology(*names: str) -> Topology:
    """Devices of a megabyte, each behind a link that holds nothing up."""
    return Topology(
        "test",
        "for tests",
        (MemoryNode("host", 64 << 20),),
        tuple(DeviceSpec(name, "gpu", PAGES * PAGE_SIZE, node="host") for name in names),
        (),
        tuple(LinkSpec(f"link-{name}", "host", name, "pcie", 1e12, 1e-9) for name in names),
    )


@asynccontextmanager
async def running_host(*names: str, seed: int = 0) -> AsyncIterator[tuple[Host, MemoryTransport]]:
    """A host in this trio run, with a short lease, that `names` may join over memory channels."""
    transport = MemoryTransport()
    clock = EmulatedClock()
    timing = {"heartbeat_s": HEARTBEAT_S, "lease_s": LEASE_S, "retry_s": RETRY_S}
    host = Host(topology(*names), transport, Path(), SECRET, clock, scheme="mem", seed=seed, **timing)  # type: ignore[arg-type]  # seconds by name
    async with host.running():
        yield host, transport


@dataclass
class ScriptedDevice:
    """One life of a device."""

    name: str
    session: Session
    welcome: Welcome
    sender: BulkSender
    receiver: BulkReceiver
    nursery: trio.Nursery
    arena: Arena
    on_message: Callable[[Message], None] = lambda _: None
    gate: trio.Event | None = None
    heard: list[Message] = field(default_factory=list)
    frame_next: int = 0
    stream_next: int = 1

    def of(self, kind: type[Message]) -> list[Message]:
        """What was heard of one kind."""
        return [message for message in self.heard if isinstance(message, kind)]

    def vanish(self) -> None:
        """Be gone without a word, as after SIGKILL."""
        self.session.end(PeerLost("the test ended this device"))
        self.nursery.cancel_scope.cancel()

    # --- answering ----------------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        self.session.on(Inspect, lambda _: NO_FIGURES)
        for kind in EVERYTHING:
            self.session.on(kind, self.answer)

    def answer(self, message: Message) -> Message | Awaitable[Message | None] | None:
        self.heard.append(message)
        self.on_message(message)
        if isinstance(message, CopyIn):
            self.copy_in(message)
        if isinstance(message, CopyOut):
            return self.copy_out(message)
        if isinstance(message, Ioctl):
            return self.ioctl(message)
        if isinstance(message, OpenContext) and self.gate is not None:
            return self.gate.wait()
        return None

    def copy_in(self, message: CopyIn) -> None:
        self.arena.zero(from_wire(message.zeros))
        if message.stream:
            targets = from_wire(message.targets) << np.uint64(PAGE_SHIFT)
            self.receiver.expect(message.stream, ArenaSink(self.arena, targets, PAGE_SIZE))

    def copy_out(self, message: CopyOut) -> Message | None:
        frames = from_wire(message.frames) << np.uint64(PAGE_SHIFT)
        if message.stream == 0:
            data = self.arena.gather(frames, PAGE_SIZE).tobytes()
            return Copied(data, xxhash.xxh3_64_intdigest(data))
        pace = Pace(message.start_s, message.bytes_per_s, message.latency_s)
        self.nursery.start_soon(self.sender.send, message.stream, ArenaSource(self.arena, frames, PAGE_SIZE), pace)
        return None

    async def ioctl(self, message: Ioctl) -> IoctlDone:
        """``echo`` sends back what came; ``migrate_to_dev`` migrates."""
        if message.command == "migrate_to_dev":
            words = await self.migrate(message.context, message.address >> PAGE_SHIFT, message.pages)
            return IoctlDone(int(np.count_nonzero(words & np.uint64(MIGRATE_PFN_MIGRATE))), 0)
        data = bytearray(message.pages * PAGE_SIZE)
        if message.stream_in:
            await self.receiver.expect(message.stream_in, BytesSink(data)).wait()
        if message.stream_out:
            await self.sender.send(message.stream_out, BytesSource(data))
        return IoctlDone(message.pages, 0, b"" if message.stream_out else bytes(data[:16]))

    # --- asking -------------------------------------------------------------------------------------------------------------------

    async def migrate(self, context: int, start: int, pages: int, *, done: bool = True) -> Words:
        """Ask for pages [start, start + pages); the final words. Without `done` the table update is never reported."""
        first = (self.welcome.zone << ZONE_SHIFT) + self.frame_next
        self.frame_next += pages
        grant = np.arange(first, first + pages, dtype=np.uint64)
        reply = await self.session.ask(Migrate(context, start, pages, "device", 1, to_wire(grant)), Migrated)
        if done and reply.migration:
            self.session.note(MigrateDone(reply.migration))
        return from_wire(reply.words)

    async def subscribe(self, context: int, start: int = 0, end: int = PAGES_MAX, *, held: bool = False) -> Subscribed:
        return await self.session.ask(Subscribe(context, start, end, held=held), Subscribed)

    async def range_fault(self, context: int, subscription: int, start: int, pages: int, flags: int) -> Words:
        reply = await self.session.ask(RangeFault(context, subscription, start, pages, flags, 0), RangeFaulted)
        return from_wire(reply.words)

    async def dma_read(self, context: int, pages: Words, words: Words) -> bytes:
        """The first eight bytes of each page, by the frames in `words`."""
        self.stream_next += 2
        out = bytearray(8 * len(pages))
        arrival = self.receiver.expect(self.stream_next, BytesSink(out))
        try:
            await self.session.ask(DmaRead(context, self.stream_next, to_wire(pages), to_wire(physical(words)), 8), Done)
            await arrival.wait()
        finally:
            arrival.cancel()
        return bytes(out)

    async def dma_write(self, context: int, pages: Words, words: Words, data: bytes) -> None:
        self.stream_next += 2
        grant = await self.session.ask(DmaWrite(context, self.stream_next, to_wire(pages), to_wire(physical(words)), 8), DmaGrant)
        await self.sender.send(self.stream_next, BytesSource(data), Pace(grant.start_s, grant.bytes_per_s, grant.latency_s))


def physical(words: Words) -> Words:
    """Addresses of the frames in HMM_PFN words."""
    return (words & np.uint64(HMM_PFN_FRAME_MASK)) << np.uint64(PAGE_SHIFT)


@asynccontextmanager
async def scripted_device(host: Host, transport: Transport, name: str, incarnation: int = 1) -> AsyncIterator[ScriptedDevice]:
    """A device that has joined `host`; says goodbye at the end unless it vanished."""
    hello = Hello(PROTOCOL_VERSION, "device", name, incarnation, 1, SECRET)
    made: list[ScriptedDevice] = []
    async with trio.open_nursery() as nursery:
        clock = EmulatedClock()

        def prepare(session: Session, welcome: Welcome) -> None:
            clock.adopt(welcome.epoch_monotonic_s, welcome.epoch_emulated_s, welcome.rate)
            receiver = BulkReceiver(transport.connect_channel(welcome.bulk_in, key=welcome.bulk_key), clock)
            sender = BulkSender(transport.connect_channel(welcome.bulk_out, key=welcome.bulk_key), clock)
            arena = Arena(welcome.zone << ZONE_SHIFT, PAGES)
            device = ScriptedDevice(name, session, welcome, sender, receiver, nursery, arena)
            nursery.start_soon(receiver.run)
            nursery.start_soon(sender.run)
            device.attach()
            made.append(device)

        async with connect(
            transport, host.control_endpoint, hello, prepare=prepare, heartbeat_s=HEARTBEAT_S, lease_s=LEASE_S, retry_s=RETRY_S
        ):
            yield made[0]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def one_device() -> AsyncIterator[tuple[Host, ScriptedDevice, Process]]:
    """A host, gpu0, and a process that has it open (context 1) and eight numbered pages."""
    async with running_host("gpu0", "gpu1") as (host, transport), scripted_device(host, transport, "gpu0") as device:
        process = await host.create_process()
        await process.open("gpu0")
        yield host, device, process


async def pages_of(process: Process, count: int = 8) -> int:
    """`count` pages of which every byte of the first is 1, of the next 2, ..."""
    address = await process.mmap(count * PAGE_SIZE)
    await process.write(address, np.repeat(np.arange(1, count + 1, dtype=np.uint8), PAGE_SIZE))
    return address


async def check(process: Process, address: int, count: int = 8) -> None:
    """Every page still says its number."""
    for i in range(count):
        assert await process.read(address + i * PAGE_SIZE, 1) == bytes([i + 1])


async def lost(host: Host, name: str = "gpu0") -> None:
    """Return when the host has given that life of the device up."""
    with trio.fail_after(10):
        while host.devices[name].life is not None:
            await trio.sleep(0.01)
