"""A device over its session and its two bulk channels: the `DeviceLink` of real machines.

Commands go over the control session, page data over the bulk channels, so an invalidation does not queue behind a megabyte. A copy is one
command and one stream; they are started together, and the copy is over when the stream has been verified at the far end *and* the
command was answered. A few pages on their way home are the exception: they come with the answer, because a CPU waits for them.

**When a device is lost.** Everything that waits for it must end, and what ends differs. Copies raise `PeerLost`: their caller puts the
pages back. An invalidation must not fail, because the page table is about to change: it returns once the device can no longer
use what it had. If it said BYE or its process has ended, that is at once. If it only fell silent it may be hung, or cut off, and it may
wake up: then we wait until its *lease* is over, counted from the moment at which we stopped talking to it, after which it has stopped using
its mirror by itself. That is fencing; it makes a stale access impossible even across a partition.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from types import TracebackType
from typing import Protocol, TypeVar

import numpy as np
import trio
import xxhash

from hmmnet.errors import HmmnetError, PeerError, PeerGone, PeerLost, ProtocolError
from hmmnet.fabric.arbiter import Flow
from hmmnet.fabric.dma import ArenaSink, ArenaSource, Arrival, BulkReceiver, BulkSender, Sink, Source
from hmmnet.fabric.stream import TRIES_MAX
from hmmnet.fabric.turns import Turn
from hmmnet.observe.counters import DEVICE_TO_DEVICE, DEVICE_TO_HOST, HOST_TO_DEVICE
from hmmnet.pages import (
    DEVICE_ZONE_MIN,
    HUGE_PAGES,
    PAGE_SHIFT,
    PAGE_SIZE,
    ZONE_SHIFT,
    Words,
    has_large,
    page_by_page,
    pages_in,
    to_wire,
    word_of,
)
from hmmnet.sleeping import Completion, shortest_now, sleep
from hmmnet.topology import DeviceSpec
from hmmnet.wire.messages import INLINE_BYTES_MAX, PAGES_PER_MESSAGE_MAX, Copied, CopyIn, CopyOut, Done, FreeFrames, Invalidate, Message
from hmmnet.wire.session import PendingReply, Session

from .interconnect import Interconnect
from .interfaces import Destination, Event
from .iommu import Domain
from .watchdog import ANSWER_S, HUNG_S, NEW, Watchdog

FREE_DELAY_S = 0.01
"""Real seconds that freed frames wait for more, so that a storm of frees becomes few notes."""
SINGLES_DELAY_S = 0.05
SINGLES_MAX = 64
"""Where the first was freed alone, as CPU faults do it: real seconds, unless so many have come home. A fault that has to wait for its
page anyway tells of them then, and settles accounts: as its own task, `SessionLink.run` takes twice as long for that, and stops whoever
waits."""
INVALIDATION_S = ANSWER_S
"""Real seconds that a device gets to acknowledge an invalidation, heartbeats or not: DMA that is under way may take some. A CPU waits."""
STALLED_S = 0.25
"""Real seconds to read what a peer has said in time, after a stall of this process (a debugger, a long computation) beyond a limit."""
INLINE_PAGES_MAX = INLINE_BYTES_MAX // PAGE_SIZE

_SHIFT = word_of(PAGE_SHIFT)
M = TypeVar("M", bound=Message)


class Ends(Protocol):
    """What ends with its device: a cancel scope, or whoever is only to be woken."""

    def cancel(self) -> None:
        """It is lost."""
        ...


class Acknowledgement:
    """An invalidation that the device works on."""

    __slots__ = ("_domain", "_end", "_link", "_pending", "_start")

    def __init__(self, link: SessionLink, pending: PendingReply | None, domain: Domain | None, start: int, end: int) -> None:
        self._link = link
        self._pending = pending
        self._domain = domain
        self._start = start
        self._end = end

    async def finish(self) -> None:
        """Return when the device is quiet in the range; its translations there are revoked and DMA that was under way is over.

        Whatever it answers: whoever changes a page table cannot do without, so a device that may not have let go is fenced.
        """
        try:
            if self._pending is None:
                await self._link.fenced()
            else:
                answer = await self._link.answer_in_time(self._pending)
                if not isinstance(answer, Done):
                    raise ProtocolError(f"it answered with {type(answer).__name__}, which acknowledges nothing")
        except PeerLost:
            await self._link.fenced()
        except HmmnetError as error:  # refused, another message than an acknowledgement, or what cannot be read, which ended the session
            self._link.condemn(f"it did not carry out an invalidation ({error})")
            await self._link.fenced()
        if self._domain is not None:
            self._domain.revoke(self._start, self._end)
            if self._domain.busy(self._start, self._end):
                await self._link.quiet(self._domain, self._start, self._end)


class Transfer:
    """See `SessionLink.transfer`. A class, because one is made for each copy, and a generator costs as much again as what it does."""

    __slots__ = ("_link", "_scope")

    def __init__(self, link: SessionLink) -> None:
        self._link = link
        self._scope = trio.CancelScope()

    async def __aenter__(self) -> None:
        if self._link.session.lost is not None:
            raise self._link.lost_error()
        self._scope.__enter__()
        self._link.transfers.add(self._scope)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        link, scope = self._link, self._scope
        link.transfers.discard(scope)
        if isinstance(error, PeerError) and link.session.lost is not None:
            scope.__exit__(None, None, None)
            raise link.lost_error() from None
        caught = scope.__exit__(kind, error, trace)
        if scope.cancelled_caught:
            raise link.lost_error()
        return caught


class SessionLink:
    """One life of a device, as the HMM core sees it. `lease_s` is in real seconds."""

    def __init__(
        self,
        spec: DeviceSpec,
        zone: int,
        node: int,
        session: Session,
        sender: BulkSender,
        receiver: BulkReceiver,
        interconnect: Interconnect,
        lease_s: float,
    ) -> None:
        self.name = spec.name
        self.zone = zone
        self.node = node
        self.kind: str = spec.kind
        self.session = session
        self.sender = sender
        self.receiver = receiver
        self.domains: dict[int, Domain] = {}
        """Translations by context."""
        self.fail_large: set[int] = set()
        """Contexts whose next allocation of a large page fails: see `no_large`."""
        self.dma_ended = trio.lowlevel.ParkingLot()
        """Who waits for DMA parks here; whoever ends one wakes all."""
        self._interconnect = interconnect
        self._lease_s = lease_s
        self._streams = 0
        self.transfers: set[Ends] = set()
        """Those under way, and whoever else is to end when the device is lost."""
        self._freed: list[Words] = []
        self._freed_singly: list[int] = []
        """Frames that were freed one by one since the last of those."""
        self._moved: list[tuple[int, Turn, float]] = []
        """Pages that came with answers and are not counted yet: bytes, their turn, when they were there."""
        self._something_to_tell = Completion()
        self._telling = False
        """Whether that is set."""
        self._fenced = Completion()
        self._fence_at = 0.0
        self.points = interconnect.points
        self.real = interconnect.clock.real
        """What to hand to trio's timeouts for so many real seconds."""
        self._now = shortest_now()
        self._watchdog = Watchdog(session, receiver, self.condemn, interconnect.clock)
        self._owed = self._watchdog.owed
        """For `fetch`, which enters what it waits for itself."""
        sender.step = self._step
        session.on_lost(self._on_lost)
        session.on_tick = self._watchdog.look

    # --- losing the device ----------------------------------------------------------------------------------------------------

    def _on_lost(self, cause: PeerLost) -> None:
        self._fence_at = trio.current_time() + self._interconnect.clock.real(self._lease_s)
        if isinstance(cause, PeerGone):
            self._fenced.set()
        self._watchdog.forget()
        self.receiver.fail(str(cause))  # whoever waited for the device may go on before a cancelled task can end its stream
        for scope in self.transfers:
            scope.cancel()

    def gone(self, how: str) -> None:
        """The device's process has ended: no lease has to be waited out."""
        self.session.end(PeerGone(f'device "{self.name}" {how}'))
        self._fenced.set()

    def condemn(self, why: str) -> None:
        """The device breaks its promises: treat it as lost."""
        self.session.end(PeerLost(f'device "{self.name}" was given up: {why}'))

    async def fenced(self) -> None:
        """Return when the lost device cannot use its mirror any more: it is gone, or its lease is over."""
        assert self.session.lost is not None, "only a lost device is fenced"
        with trio.move_on_at(self._fence_at):
            await self._fenced.wait()
        self._fenced.set()

    async def ask_engine(self, message: CopyIn | CopyOut) -> None:
        """Ask the copy engine for what it begins at once. Raises KernelError, RemoteError, PeerLost, ProtocolError."""
        pending = self.session.begin(message)
        with self._watchdog.asked(pending):
            await self.session.answer(message, pending, Done)

    async def answer_in_time(self, pending: PendingReply) -> Message:
        """The answer to an invalidation; who gives none counts as broken, however alive. Raises what the answer does."""
        for limit_s in (INVALIDATION_S, STALLED_S):
            if not pending.answered:
                await pending.comes_by(self._now() + self._interconnect.clock.real(limit_s))
            if pending.answered:
                return pending.result()
        self.condemn(f"it did not let go of what was invalidated within {INVALIDATION_S:g} s")
        raise self.lost_error()

    async def quiet(self, domain: Domain, start: int, end: int) -> None:
        """Return when no DMA is under way in the range. The device has said so: what it began and gave up is not waited for for ever.

        It tells on the channel that failed, perhaps, so the word may be lost.
        """
        with trio.move_on_after(self._interconnect.clock.real(INVALIDATION_S)) as limit:
            while domain.busy(start, end):
                await self.dma_ended.park()
        if limit.cancelled_caught:
            domain.give_up(start, end)
            while domain.busy(start, end):
                await self.dma_ended.park()

    def lost_error(self) -> PeerLost:
        """What a transfer raises when the device is lost."""
        return PeerLost(str(self.session.lost))

    def transfer(self) -> Transfer:
        """Around everything that waits for bulk data of this device: ends with PeerLost when the device is lost."""
        return Transfer(self)

    # --- commands -------------------------------------------------------------------------------------------------------------

    async def ask(self, message: Message, answer: type[M]) -> M:
        """A request, after what the device must know before. Raises KernelError, RemoteError, PeerLost, ProtocolError."""
        self.flush_freed()
        return await self.session.ask(message, answer)

    async def ask_shielded(self, message: Message, answer: type[M]) -> M:
        """`ask` that is not cancelled."""
        self.flush_freed()
        return await self.session.ask_shielded(message, answer)

    def invalidate_start(
        self, context: int, subscription: int, start: int, end: int, event: Event, owner: int, sequence: int
    ) -> Acknowledgement | None:
        """Tell the device to drop [start, end) of `context`; None when it is gone."""
        domain = self.domains.get(context)
        if self.session.lost is not None and self._fenced.is_set():
            if domain is not None:
                domain.revoke(start, end)
            return None
        pending: PendingReply | None = None
        if self.session.lost is None:
            pending = self.session.begin(Invalidate(context, subscription, start, end, str(event), owner, sequence))
        return Acknowledgement(self, pending, domain, start, end)

    async def _step(self) -> None:
        """Before each chunk that goes to the device. Raises PeerError: what holds it is no fault of the device, which is not lost by it."""
        if self.points.armed and not self.points.passes("migrate.mid_copy", self.name):
            with trio.move_on_after(self._interconnect.clock.real(HUNG_S)) as limit:
                await self.points.at("migrate.mid_copy", device=self.name)
            if limit.cancelled_caught:
                raise PeerError(f"the copy engine gave up: a chunk to {self.name} has not left for {HUNG_S:g} s, and waits for nothing")

    # --- copies ---------------------------------------------------------------------------------------------------------------

    def new_stream(self) -> int:
        """A stream number: even, because the host made it."""
        self._streams += 2
        return self._streams

    async def copy_in(self, source_frames: Words, target_frames: Words, zero_frames: Words) -> None:
        """DMA host frames to device frames, and zero others on the device. Raises PeerLost, PeerError."""
        self.flush_freed()
        if len(source_frames) == 0:
            await self.ask_engine(CopyIn(0, b"", to_wire(zero_frames)))
            return
        frames = page_by_page(source_frames)
        source = ArenaSource(self._interconnect.memories, frames << _SHIFT, PAGE_SIZE)
        stream = self.new_stream()
        message = CopyIn(stream, to_wire(target_frames), to_wire(zero_frames))
        await self._expected(message, partial(self.send, stream, source, int(frames[0])))

    async def _expected(self, message: CopyIn, send: Callable[[], Awaitable[object]]) -> None:
        """Ask the device to expect a stream, and `send` it at once. One that refuses, or cannot read what it is asked, never credits it.

        Raises PeerLost, PeerError, and what the answer does.
        """
        pending = self.session.begin(message)
        pending.if_refused(partial(self.sender.refused, message.stream))
        try:
            await send()
        except PeerError:
            with self._watchdog.asked(pending):
                await pending.wait()  # if it was refused, that says more, though a stream that is given up may be heard of sooner
            raise
        with self._watchdog.asked(pending):
            await self.session.answer(message, pending, Done)

    async def send(self, stream: int, source: Source, frame: int) -> None:
        """Stream to the device, from the memory that `frame` lies in. Raises PeerLost, PeerError."""
        links = self._interconnect
        flow = links.open_in(self.name, frame)
        try:
            async with self.transfer():
                report = await self.sender.send(stream, source, flow)
        finally:
            flow.close(links.now())
        kind = HOST_TO_DEVICE if frame >> ZONE_SHIFT < DEVICE_ZONE_MIN else DEVICE_TO_DEVICE  # coherent memory of a peer
        links.profile.record(kind, source.nbytes, report.emulated_s, self.name)

    async def fill(self, targets: Words, source: Source, flow: Flow) -> None:
        """Stream to device frames what does not come from host memory, by a flow that is open. Raises PeerLost, PeerError."""
        self.flush_freed()
        stream = self.new_stream()

        async def send() -> None:
            async with self.transfer():
                await self.sender.send(stream, source, flow)

        await self._expected(CopyIn(stream, to_wire(targets), b""), send)

    @contextmanager
    def from_peer(self, device: str, nbytes: int) -> Iterator[Flow]:
        """A transfer of `nbytes` from another device to this one, over the links between the two."""
        links = self._interconnect
        flow = links.open_across(device, self.name)
        try:
            yield flow
        finally:
            now_s = links.now()
            flow.close(now_s)
        links.profile.record(DEVICE_TO_DEVICE, nbytes, now_s - flow.start_s, self.name)

    async def copy_out(self, context: int, pages: Words, frames: Words, destination: Destination) -> None:
        """The device drops its entries and streams `frames` to the destination. Raises PeerLost, PeerError, KernelError(ENOMEM)."""
        if self.session.lost is not None:
            raise self.lost_error()
        if pages_in(frames) <= INLINE_PAGES_MAX:
            await self._copy_inline(CopyOut(0, context, to_wire(pages), to_wire(frames), 0.0, 0.0, 0.0), destination)
            return
        stream = self.new_stream()
        targets = page_by_page(destination.frames())
        sink = ArenaSink(self._interconnect.memories, targets << _SHIFT, PAGE_SIZE)
        async with self.coming(stream, sink, int(targets[0])) as flow:
            message = CopyOut(stream, context, to_wire(pages), to_wire(frames), flow.start_s, flow.bytes_per_s, flow.latency_s)
            await self.ask_engine(message)

    async def _copy_inline(self, message: CopyOut, destination: Destination) -> None:
        """A few pages come with the answer: half the messages of a stream. They pass between the chunks of the flows on the same links."""
        start_s = self._interconnect.now()
        pending = self.session.begin(message)
        targets = destination.frames()
        data = await self._answer(message, pending, len(targets) * PAGE_SIZE)
        self._interconnect.land(targets, data)
        await self._arrived(int(targets[0]), len(data), start_s)

    async def fetch(self, context: int, page: int, frame: int, allocate: Callable[[], int]) -> None:
        """`_copy_inline` of one page. What can wait is done while the device works, or later (`settle`): a CPU waits for this."""
        links = self._interconnect
        start_s = links.now()
        word = page.to_bytes(8, "little"), frame.to_bytes(8, "little")
        message = CopyOut(0, context, word[0], word[1], 0.0, 0.0, 0.0)
        pending = self.session.begin(message)
        target = allocate()
        if len(self._moved) >= SINGLES_MAX:
            self.flush_freed()
            self.settle()
        self._owed[pending] = NEW  # all of `Watchdog.asked`, which is a generator: a CPU waits for this
        try:
            data = self._intact(await pending.wait(), PAGE_SIZE)
        finally:
            del self._owed[pending]
        if data is None:
            data = await self._again(message, PAGE_SIZE)
        links.land_one(target, data)
        turn, now_s = links.passes_out(self.name, target, PAGE_SIZE, start_s)
        if now_s < turn.due_s:
            now_s = await links.pass_time_out(self.name, target, turn)
        self._count_later((PAGE_SIZE, turn, now_s))

    async def _answer(self, message: CopyOut, pending: PendingReply, nbytes: int) -> bytes:
        """The pages in the answer to `message`; damaged ones are asked for again. Raises PeerError."""
        with self._watchdog.asked(pending):
            data = self._intact(await pending.wait(), nbytes)
        return await self._again(message, nbytes) if data is None else data

    async def _again(self, message: CopyOut, nbytes: int) -> bytes:
        """Ask once more for pages that came damaged. Raises PeerError."""
        for _ in range(TRIES_MAX - 1):
            pending = self.session.begin(message)
            with self._watchdog.asked(pending):
                data = self._intact(await pending.wait(), nbytes)
            if data is not None:
                return data
        raise PeerError(f"{self.name} sent pages that do not match their checksum, {TRIES_MAX} times")

    async def _arrived(self, frame: int, nbytes: int, start_s: float) -> None:
        """Pages came with an answer: return at their emulated time; they are counted later."""
        self._count_later((nbytes, *await self._interconnect.pass_out(self.name, frame, nbytes, start_s)))

    def _count_later(self, moved: tuple[int, Turn, float]) -> None:
        self._moved.append(moved)
        if not self._telling:
            self._tell_soon()

    def _intact(self, answer: Message, nbytes: int) -> bytes | None:
        """The pages in an answer; None when they were damaged on the way. Raises ProtocolError for an answer that is none."""
        if not isinstance(answer, Copied) or len(answer.data) != nbytes:
            raise ProtocolError(f"{self.name} answered a CopyOut of {nbytes} bytes with {type(answer).__name__}, or with others")
        return answer.data if xxhash.xxh3_64_intdigest(answer.data) == answer.checksum else None

    @asynccontextmanager
    async def coming(self, stream: int, sink: Sink, frame: int) -> AsyncIterator[Flow]:
        """Expect DMA to the memory of `frame` around the command that causes it; it has landed when the block is left without an error.

        After an error nothing lands any more. Raises PeerLost, PeerError.
        """
        links = self._interconnect
        flow = links.open_out(self.name, frame)
        try:
            async with self.expected(stream, sink, flow):
                yield flow
        finally:
            now_s = links.now()
            flow.close(now_s)
        links.profile.record(DEVICE_TO_HOST, sink.nbytes, now_s - flow.start_s, self.name)

    @asynccontextmanager
    async def expected(self, stream: int, sink: Sink, flow: Flow | None = None, *, late: bool = False) -> AsyncIterator[Arrival]:
        """As `coming`, for data that cross no link (a command's buffer): nothing is paced or counted.

        The device begins with it at once, unless it is `late`: then when it has something to give, or never (see `answered`).
        """
        arrival = self.receiver.expect(stream, sink, flow)
        self._watchdog.watched[arrival] = None
        if late:
            self._watchdog.late.add(arrival)
        try:
            async with self.transfer():
                yield arrival
                await arrival.wait()
        finally:
            self._watchdog.watched.pop(arrival, None)
            self._watchdog.late.discard(arrival)
            arrival.cancel()

    def answered(self, arrival: Arrival) -> None:
        """The command that gives it was answered: what the device has not begun with by now never comes."""
        self._watchdog.late.discard(arrival)

    async def answers_apart(self, node: int, answers: int) -> None:
        """See `DeviceLink.answers_apart`."""
        await self._interconnect.pass_latencies_out(self.name, node, answers)

    def no_large(self, context: int) -> bool:
        """See `DeviceLink.no_large`."""
        fails = context in self.fail_large
        self.fail_large.discard(context)
        return fails

    # --- freeing --------------------------------------------------------------------------------------------------------------

    def free_frames(self, frames: Words) -> None:
        """folio_free: the device learns it soon, and before it is asked for anything else."""
        self._gather_freed()
        self._freed.append(frames)
        if not self._telling:
            self._tell_soon()

    def free_frame(self, frame: int) -> None:
        """`free_frames` of one, which is not large."""
        self._freed_singly.append(frame)
        if not self._telling:
            self._tell_soon()

    def _gather_freed(self) -> None:
        """What was freed one by one becomes a list like the others: the order in which frames were freed is kept."""
        if self._freed_singly:
            self._freed.append(np.array(self._freed_singly, np.uint64))
            self._freed_singly = []

    def _tell_soon(self) -> None:
        self._telling = True
        self._something_to_tell.set()

    def flush_freed(self) -> None:
        """Tell the device what was freed."""
        self._gather_freed()
        if self._freed:
            freed, self._freed = self._freed, []
            frames = freed[0] if len(freed) == 1 else np.concatenate(freed)
            most = PAGES_PER_MESSAGE_MAX // HUGE_PAGES if has_large(frames) else PAGES_PER_MESSAGE_MAX
            for first in range(0, len(frames), most):
                self.session.note(FreeFrames(to_wire(frames[first : first + most])))

    def settle(self) -> None:
        """Count the pages that came with answers."""
        moved, self._moved = self._moved, []
        for nbytes, turn, end_s in moved:
            self._interconnect.count_out(self.name, nbytes, turn, end_s)

    async def run(self) -> None:
        """Tell the device of freed frames, and settle accounts, from time to time, until cancelled."""
        while True:
            await self._something_to_tell.wait()
            self._something_to_tell = Completion()
            self._telling = False
            await sleep(self._interconnect.clock.real(FREE_DELAY_S if self._freed else SINGLES_DELAY_S))
            self.flush_freed()
            self.settle()
