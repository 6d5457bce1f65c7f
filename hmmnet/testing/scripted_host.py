"""A small host for tests of device models: one process, a dictionary for a page table, and the real wire.

It does what a device may expect of a host and checks what a host may expect of a device: a translation is held from the answer to a
range fault until the answer to an invalidation, DMA without one is an error (`driver_bugs`), frames are used as they were granted. It
is written from the messages' docstrings, not from the real host, so that the two check each other.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import msgspec
import numpy as np
import trio

from hmmnet.arena import Arena
from hmmnet.errors import HmmnetError, KernelError, PeerLost, SegmentationFault
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.dma import UNPACED, ArenaSink, ArenaSource, BulkReceiver, BulkSender, BytesSink, BytesSource
from hmmnet.pages import (
    HMM_PFN_ERROR,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_SHIFT,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    PAGE_SIZE,
    ZERO_FRAME,
    Words,
    from_wire,
    page_by_page,
    to_wire,
)
from hmmnet.plugins import load
from hmmnet.wire import messages as m
from hmmnet.wire.memory_transport import MemoryTransport
from hmmnet.wire.server import Server
from hmmnet.wire.session import Session
from hmmnet.wire.transport import Transport

SECRET = bytes(range(32))
ZONE = 70
PAGE = 0x20000
"""Where checks of the device contract map memory."""
SYSTEM_PAGES = 1 << 14


class Model(Protocol):
    """What is looked at of a device under test, beside what it says: a `hmmnet.devices.models.base.Device`."""

    memory: Any
    """Its frames: `hmmnet.devices.memory.Memory`."""
    contexts: dict[int, Any]
    """Its open contexts by number."""

    def drop_mirrors(self) -> None:
        """Its lease is over."""
        ...

    def fence(self) -> None:
        """The host is gone."""
        ...


@dataclass
class Entry:
    """Where a page is, and whether it may be written."""

    frame: int
    write: bool


@dataclass
class Migration:
    """Pages under way; who wants one waits."""

    pages: set[int]
    over: trio.Event = field(default_factory=trio.Event)


def u64(values: Any) -> Words:
    """A page list."""
    return np.array(list(values), dtype=np.uint64)


class ScriptedHost:
    """See the module. Context number 1 is the process's."""

    def __init__(
        self, transport: Transport, spec: dict[str, Any], place: str = "mem://", clock: Callable[[], EmulatedClock] = EmulatedClock
    ) -> None:
        self.spec = {"name": "gpu0", "model": "gpu", "memory_bytes": 16 << 20, **spec}
        self.zone = ZONE
        self.arena = Arena(0, SYSTEM_PAGES)
        self.clock = clock()
        self.table: dict[int, Entry] = {}
        self.vmas: list[tuple[int, int, str]] = []
        self.pinned: set[int] = set()
        self.broken: set[int] = set()
        self.domain: dict[int, Entry] = {}
        self.driver_bugs: list[str] = []
        self.messages: list[m.Message] = []
        self.migrations: list[Migration] = []
        self.pauses: dict[type, Callable[[], Any]] = {}
        """Awaited while the host works on a message of that type, after it has looked at its table; `Migrated`: before it is sent."""
        self.sequence = 2
        self.session: Session
        self.subscriptions: dict[int, m.Subscribe] = {}
        self.told: dict[int, int] = {}
        """The sequence that each subscription was last told."""
        self._frames = 1
        self._streams = 0
        self._numbers = 1000
        self._undone: dict[int, Migration] = {}
        self._bulk = (transport.bind_channel(place + "in"), transport.bind_channel(place + "out"))
        self.sender = BulkSender(self._bulk[0], self.clock)
        self.receiver = BulkReceiver(self._bulk[1], self.clock)
        self.joined = trio.Event()
        self.server = Server(transport.listen(place + "host"), SECRET, self._welcome, self._joined)

    def _welcome(self, hello: m.Hello) -> m.Welcome | m.Refused:
        zones = [m.Zone(0, "system", "dram", SYSTEM_PAGES), m.Zone(self.zone, "private", hello.name, 4096)]
        config = msgspec.msgpack.encode(self.spec)
        clock = self.clock
        return m.Welcome(
            version=m.PROTOCOL_VERSION,
            host_incarnation=1,
            zone=self.zone,
            zones=zones,
            bulk_in=self._bulk[0].endpoint,
            bulk_out=self._bulk[1].endpoint,
            bulk_key=b"",
            telemetry="",
            epoch_monotonic_s=clock.epoch_monotonic_s,
            epoch_emulated_s=clock.epoch_emulated_s,
            rate=clock.rate,
            lease_s=2.0,
            config=config,
        )

    def _joined(self, session: Session, _: m.Hello) -> None:
        self.session = session
        handlers: dict[type[m.Message], Any] = {
            m.Subscribe: self._subscribe,
            m.Unsubscribe: self._unsubscribe,
            m.RangeFault: self._range_fault,
            m.Migrate: self._migrate,
            m.MigrateDone: self._migrate_done,
            m.Evict: self._evict,
            m.MakeExclusive: self._make_exclusive,
            m.DmaRead: self._dma_read,
            m.DmaWrite: self._dma_write,
        }
        for kind, handler in handlers.items():
            session.on(kind, self._noting(handler))
        self.joined.set()

    def _noting(self, handler: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def note(message: m.Message) -> Any:
            self.messages.append(message)
            return handler(message)

        return note

    async def _pause(self, message: m.Message) -> None:
        pause = self.pauses.get(type(message))
        if pause is not None:
            await pause()

    # --- the process -----------------------------------------------------------------------------------------------------------

    def mmap(self, page: int, pages: int, rights: str = "rw") -> int:
        """A mapping; its address."""
        self.vmas.append((page, page + pages, rights))
        return page * PAGE_SIZE

    async def munmap(self, page: int, pages: int) -> None:
        """Unmap: devices drop the range first."""
        await self._settled(range(page, page + pages))
        cut = []
        for start, end, rights in self.vmas:
            cut += [(low, high, rights) for low, high in ((start, min(end, page)), (max(start, page + pages), end)) if low < high]
        self.vmas = cut
        async with self.invalidated(page, page + pages, "unmap"):
            gone = [self.table.pop(number) for number in range(page, page + pages) if number in self.table]
        self._free(gone)

    async def mprotect(self, page: int, pages: int, rights: str) -> None:
        """Change the rights of mapped pages: entries only lose the right to write."""
        async with self.invalidated(page, page + pages, "protection_vma"):
            cut = []
            for start, end, old in self.vmas:
                middle = (max(start, page), min(end, page + pages), rights)
                for low, high, now in ((start, min(end, page), old), middle, (max(start, page + pages), end, old)):
                    if low < high:
                        cut.append((low, high, now))
            self.vmas = cut
            for number in range(page, page + pages):
                entry = self.table.get(number)
                if entry is not None:
                    stays = entry.write if self.is_device(entry) else entry.frame != ZERO_FRAME
                    entry.write = stays and "w" in rights

    def rights(self, page: int) -> str | None:
        """How the page is mapped, None when it is not."""
        return next((rights for start, end, rights in self.vmas if start <= page < end), None)

    def is_device(self, entry: Entry) -> bool:
        """Whether the entry leads to the device's memory."""
        return entry.frame >> 36 == self.zone

    def on_device(self, page: int, pages: int = 1) -> list[bool]:
        """Which pages are in the device's memory."""
        return [number in self.table and self.is_device(self.table[number]) for number in range(page, page + pages)]

    async def cpu_read(self, address: int, length: int) -> bytes:
        """Load as the CPU does: device pages come home."""
        out = b""
        while length:
            page, offset = divmod(address, PAGE_SIZE)
            part = min(length, PAGE_SIZE - offset)
            entry = await self._cpu_entry(page, write=False)
            out += self.arena.pages[entry.frame][offset : offset + part].tobytes()
            address, length = address + part, length - part
        return out

    async def cpu_write(self, address: int, data: bytes) -> None:
        """Store as the CPU does."""
        while data:
            page, offset = divmod(address, PAGE_SIZE)
            part = min(len(data), PAGE_SIZE - offset)
            entry = await self._cpu_entry(page, write=True)
            self.arena.pages[entry.frame][offset : offset + part] = np.frombuffer(data[:part], np.uint8)
            address, data = address + part, data[part:]

    async def _cpu_entry(self, page: int, *, write: bool) -> Entry:
        while True:
            await self._settled([page])
            entry = self.table.get(page)
            if entry is None or not self.is_device(entry):
                return await self._system_entry(page, write=write)
            await self.take_home([page], 1)

    async def _system_entry(self, page: int, *, write: bool) -> Entry:
        rights = self.rights(page)
        if rights is None or "r" not in rights or (write and "w" not in rights):
            raise SegmentationFault(page * PAGE_SIZE, "no right")
        entry = self.table.get(page)
        if entry is None:
            entry = self.table[page] = Entry(self._frame() if write else ZERO_FRAME, write)
        elif write and not entry.write:
            async with self.invalidated(page, page + 1, "clear"):
                old, entry.frame, entry.write = entry.frame, self._frame(), True
                self.arena.pages[entry.frame] = self.arena.pages[old]
        return entry

    def _frame(self) -> int:
        self._frames += 1
        assert self._frames < SYSTEM_PAGES
        return self._frames

    def _free(self, entries: list[Entry]) -> None:
        device = [entry.frame for entry in entries if self.is_device(entry)]
        if device:
            self.session.note(m.FreeFrames(to_wire(u64(device))))

    # --- notifier --------------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def invalidated(self, start: int, end: int, event: str, owner: int = -1) -> AsyncIterator[None]:
        """Devices are quiet in [start, end)."""
        for message in self.announcements(start, end, event, owner):
            await self.session.ask(message, m.Done)
        for page in [page for page in self.domain if start <= page < end]:
            del self.domain[page]
        yield
        self.sequence += 1

    def announcements(self, start: int, end: int, event: str, owner: int = -1) -> list[m.Invalidate]:
        """What tells every subscription that concerns [start, end); who reads there from now on has to read again."""
        self.sequence |= 1
        made = []
        for number, subscription in self.subscriptions.items():
            if owner == self.zone or subscription.end <= start or end <= subscription.start:
                continue
            self.sequence += 2
            self.told[number] = self.sequence
            made.append(m.Invalidate(subscription.context, number, start, end, event, owner, self.sequence))
        return made

    def pass_over(self) -> None:
        """Something changed of which no device is told, because none holds anything there: the sequences move on."""
        self.sequence += 2
        self.told = dict.fromkeys(self.told, self.sequence - 1)

    def _subscribe(self, message: m.Subscribe) -> m.Subscribed:
        number = 100 + len(self.subscriptions)
        self.subscriptions[number] = message
        self.told[number] = self.sequence
        return m.Subscribed(number, self.sequence)

    def _unsubscribe(self, message: m.Unsubscribe) -> None:
        del self.subscriptions[message.subscription]

    async def _settled(self, pages: Any) -> None:
        """Wait until none of `pages` is under way."""
        wanted = set(pages)
        while (busy := next((one for one in self.migrations if one.pages & wanted), None)) is not None:
            await busy.over.wait()

    async def _range_fault(self, message: m.RangeFault) -> m.RangeFaulted:
        pages = range(message.start, message.start + message.pages)
        inputs = from_wire(message.inputs).tolist() if message.inputs else [0] * message.pages
        flags = [message.default_flags | (given & message.flags_mask) for given in inputs]
        sequence = self.told[message.subscription]
        words = []
        for page, wanted in zip(pages, flags, strict=True):
            words.append(await self._walk(page, bool(wanted & HMM_PFN_REQ_FAULT), bool(wanted & HMM_PFN_REQ_WRITE)))
        for page, word in zip(pages, words, strict=True):
            if word & HMM_PFN_VALID and (word & ((1 << 53) - 1)) >> 36 != self.zone:
                self.domain[page] = Entry(word & ((1 << 53) - 1), bool(word & HMM_PFN_WRITE))
        await self._pause(message)
        return m.RangeFaulted(sequence, to_wire(u64(words)))

    async def _make_exclusive(self, message: m.MakeExclusive) -> m.Exclusive:
        words = []
        for page in range(message.start, message.start + message.pages):
            rights = self.rights(page)
            if rights is None or "w" not in rights:
                break
            entry = await self._system_entry(page, write=True)
            self.domain[page] = Entry(entry.frame, write=True)
            words.append(entry.frame | HMM_PFN_VALID | HMM_PFN_WRITE)
        if not words:
            raise KernelError(errno.EFAULT, "make_device_exclusive", f"page 0x{message.start:x}")
        sequence = self.told[message.subscription]
        await self._pause(message)
        return m.Exclusive(sequence, to_wire(u64(words)))

    async def _walk(self, page: int, want: bool, want_write: bool) -> int:
        rights = self.rights(page)
        if rights is None or "r" not in rights:
            if want:
                raise KernelError(errno.EFAULT, "hmm_range_fault", f"page 0x{page:x}")
            return HMM_PFN_ERROR
        if want:
            await self._settled([page])
        entry = self.table.get(page)
        if want and not (entry is not None and self.is_device(entry)) and (entry is None or (want_write and not entry.write)):
            if want_write and "w" not in rights:
                raise KernelError(errno.EPERM, "hmm_range_fault", f"page 0x{page:x}")
            entry = await self._system_entry(page, write=want_write)
        if entry is None or any(page in one.pages for one in self.migrations):
            return 0
        return entry.frame | HMM_PFN_VALID | (HMM_PFN_WRITE if entry.write else 0)

    # --- migration -------------------------------------------------------------------------------------------------------------

    async def _migrate(self, message: m.Migrate) -> m.Migrated:
        if message.direction == "system":
            return await self._migrate_home(message)
        grant = page_by_page(from_wire(message.grant)).tolist()
        assert len(grant) == message.pages, "one grant for each position"
        await self._pause(message)
        words, code, tried = [0] * message.pages, 0, 0
        system: list[tuple[int, int, int]] = []
        empty: list[tuple[int, int]] = []
        for i, target in enumerate(grant):
            page = message.start + i
            rights = self.rights(page)
            if rights is None or "r" not in rights:
                code, tried = errno.EINVAL, i
                break
            entry = self.table.get(page)
            if not target or page in self.pinned or any(page in one.pages for one in self.migrations):
                continue
            if entry is None or entry.frame == ZERO_FRAME:
                empty.append((page, target))
                words[i] = MIGRATE_PFN_MIGRATE | (MIGRATE_PFN_WRITE if "w" in rights else 0)
            elif not self.is_device(entry):
                system.append((page, entry.frame, target))
                words[i] = MIGRATE_PFN_VALID | MIGRATE_PFN_MIGRATE | entry.frame << MIGRATE_PFN_SHIFT
                words[i] |= MIGRATE_PFN_WRITE if entry.write else 0
        moving = Migration({page for page, *_ in (*system, *empty)})
        if not moving.pages:
            return m.Migrated(0, to_wire(u64(words)), 0, code, tried)
        self.migrations.append(moving)
        await self._copy_in([frame for _, frame, _ in system], [target for *_, target in system], [target for _, target in empty])
        for i, target in enumerate(grant):
            page = message.start + i
            if page in moving.pages:
                self.table[page] = Entry(target, bool(words[i] & MIGRATE_PFN_WRITE))
                self.domain.pop(page, None)
        self._numbers += 1
        number = self._numbers
        self._undone[number] = moving
        answer = m.Migrated(number, to_wire(u64(words)), len(moving.pages), code, tried)
        await self._pause(answer)
        return answer

    async def _copy_in(self, sources: list[int], targets: list[int], zeros: list[int]) -> None:
        stream = self.new_stream() if sources else 0
        await self.session.ask(m.CopyIn(stream, to_wire(u64(targets)), to_wire(u64(zeros))), m.Done)
        if sources:
            await self.sender.send(stream, ArenaSource(self.arena, u64(sources) * np.uint64(PAGE_SIZE), PAGE_SIZE), UNPACED)

    def new_stream(self) -> int:
        """Streams of the host are even."""
        self._streams += 2
        return self._streams

    def _migrate_done(self, message: m.MigrateDone) -> None:
        moving = self._undone.pop(message.migration)
        self.migrations.remove(moving)
        moving.over.set()

    async def _migrate_home(self, message: m.Migrate) -> m.Migrated:
        words, code, pages = [0] * message.pages, 0, []
        for i in range(message.pages):
            page = message.start + i
            if self.rights(page) is None or "r" not in str(self.rights(page)):
                code = errno.EINVAL
                break
            if self.on_device(page)[0] and not any(page in one.pages for one in self.migrations):
                pages.append(page)
                words[i] = MIGRATE_PFN_VALID | MIGRATE_PFN_MIGRATE
        if pages:
            await self.take_home(pages, message.context)
        return m.Migrated(0, to_wire(u64(words)), len(pages), code)

    async def take_home(self, pages: list[int], context: int) -> None:
        """Bring device pages home; `context` 0 does it by frame."""
        moving = Migration(set(pages))
        self.migrations.append(moving)
        try:
            frames = [self.table[page].frame for page in pages]
            targets = [self._frame() for _ in pages]
            stream = self.new_stream()
            arrival = self.receiver.expect(stream, ArenaSink(self.arena, u64(targets) * np.uint64(PAGE_SIZE), PAGE_SIZE))
            listed = to_wire(u64(pages)) if context else b""
            await self.session.ask(m.CopyOut(stream, context, listed, to_wire(u64(frames)), 0.0, float("inf"), 0.0), m.Done)
            await arrival.wait()
            for page, target in zip(pages, targets, strict=True):
                self.table[page].frame = target
            self.session.note(m.FreeFrames(to_wire(u64(frames))))
        finally:
            self.migrations.remove(moving)
            moving.over.set()

    async def _evict(self, message: m.Evict) -> m.Evicted:
        frames = set(from_wire(message.frames).tolist())
        stay = self.pinned.union(self.broken, *(one.pages for one in self.migrations))
        pages = [page for page, entry in self.table.items() if entry.frame in frames and page not in stay]
        if pages:
            await self.take_home(pages, 0)
        return m.Evicted(len(pages), sum(page in self.broken and entry.frame in frames for page, entry in self.table.items()))

    # --- IOMMU -----------------------------------------------------------------------------------------------------------------

    def _check(self, message: m.DmaRead | m.DmaWrite, *, write: bool) -> Words:
        addresses = from_wire(message.addresses)
        for page, address in zip(from_wire(message.pages).tolist(), addresses.tolist(), strict=True):
            held = self.domain.get(page)
            if held is None or held.frame != address >> 12 or (write and not held.write):
                self.driver_bugs.append(f"{type(message).__name__} of page 0x{page:x} at 0x{address:x}, held: {held}")
                raise PeerLost(self.driver_bugs[-1])
        return addresses

    async def _dma_read(self, message: m.DmaRead) -> None:
        addresses = self._check(message, write=False)
        await self._pause(message)
        await self.sender.send(message.stream, ArenaSource(self.arena, addresses, message.size), UNPACED)

    async def _dma_write(self, message: m.DmaWrite) -> m.DmaGrant:
        addresses = self._check(message, write=True)
        await self._pause(message)
        self.receiver.expect(message.stream, ArenaSink(self.arena, addresses, message.size))
        return m.DmaGrant(0.0, float("inf"), 0.0)

    # --- what tests ask of the device ------------------------------------------------------------------------------------------

    async def open(self, context: int = 1, process: int = 10) -> None:
        """Open a context."""
        await self.session.ask(m.OpenContext(context, process), m.Done)

    async def close(self, context: int = 1) -> None:
        """Close it."""
        await self.session.ask(m.CloseContext(context), m.Done)

    async def launch(self, kernel: str, placement: str = "demand", context: int = 1, job: int = 1, **arguments: Any) -> m.Finished:
        """Run a job."""
        return await self.session.ask(m.Launch(context, job, kernel, msgspec.msgpack.encode(arguments), placement), m.Finished)

    async def peek(self, address: int, words: int, placement: str = "demand", context: int = 1) -> Words:
        """64-bit words, as a job on the device sees them, which must end well."""
        finished = await self.launch("peek", placement, context, a=address, n=words)
        return np.frombuffer(results_of(finished)["words"], np.uint64)

    async def ioctl(
        self, command: str, page: int, pages: int, data: bytes = b"", context: int = 1, flags: int = 0
    ) -> tuple[m.IoctlDone, bytes]:
        """Run a command; the reply and the data that it gave."""
        stream_in = self.new_stream() if data else 0
        gives = command in {"read", "read_unlocked", "migrate_to_dev"} and self.spec["model"] == "dmirror"
        stream_out = self.new_stream() if gives else 0
        out = bytearray(pages * PAGE_SIZE if gives else 0)
        arrival = self.receiver.expect(stream_out, BytesSink(memoryview(out))) if gives else None
        request = m.Ioctl(context, command, page * PAGE_SIZE, pages, stream_in, stream_out, flags)
        try:
            async with trio.open_nursery() as nursery:
                if data:
                    nursery.start_soon(self.sender.send, stream_in, BytesSource(memoryview(data)), UNPACED)
                pending = self.session.begin(request)
                nursery.start_soon(trio.lowlevel.checkpoint)
            reply = await pending.wait()
        except BaseException:
            if arrival is not None:
                arrival.cancel()
            raise
        if arrival is not None:
            await arrival.wait()
        assert isinstance(reply, m.IoctlDone)
        return reply, bytes(out)

    async def figures(self) -> dict[str, Any]:
        """The device's report."""
        return msgspec.msgpack.decode((await self.session.ask(m.Inspect(), m.Report)).figures, type=dict[str, Any])

    def sent(self, kind: type[m.Message]) -> list[Any]:
        """The device's messages of one type so far."""
        return [message for message in self.messages if isinstance(message, kind)]


async def until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    """Wait for something that no event announces: another process's end, a counter."""
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 - nothing announces it
            await trio.sleep(0.005)


def results_of(finished: m.Finished) -> dict[str, Any]:
    """What a kernel returned, whose job must have ended well."""
    assert not finished.error, finished.error
    return msgspec.msgpack.decode(finished.results, type=dict[str, Any])


def counters_of(finished: m.Finished) -> dict[str, Any]:
    """The counters of a job."""
    return msgspec.msgpack.decode(finished.counters, type=dict[str, Any])


@asynccontextmanager
async def host_alone(
    transport: Transport, place: str = "mem://", clock: Callable[[], EmulatedClock] = EmulatedClock, **spec: Any
) -> AsyncIterator[ScriptedHost]:
    """A host that no device has joined yet."""
    async with trio.open_nursery() as nursery:
        host = ScriptedHost(transport, spec, place, clock)
        nursery.start_soon(host.sender.run)
        nursery.start_soon(host.receiver.run)
        await nursery.start(host.server.run)
        yield host
        assert host.driver_bugs == []
        await host.server.bye()
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def machine(
    timing: Mapping[str, Any] = MappingProxyType({}), clock: Callable[[], EmulatedClock] = EmulatedClock, **spec: Any
) -> AsyncIterator[tuple[ScriptedHost, Any]]:
    """A host and one device, in this run, over memory channels; the context of process 10 is open as number 1. `timing` is `serve`'s.

    Yields the host and the device (a `Model`). `clock` makes the clocks of both.
    """
    serve = load("hmmnet.device_service", "serve")
    if serve is None:
        raise HmmnetError('devices are not installed; install hmmnet itself ("pip install ." or "pip install -e ." in its folder)')
    devices: list[Any] = []
    with MemoryTransport() as transport:
        async with trio.open_nursery() as nursery, host_alone(transport, clock=clock, **spec) as host:
            served = partial(serve, transport, "mem://host", host.spec["name"], SECRET, 1, clock(), made=devices.append, **timing)
            nursery.start_soon(served)
            with trio.fail_after(5):
                await host.joined.wait()
            await host.open()
            yield host, devices[0]
