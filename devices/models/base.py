"""What every device model has: memory, mirrors, copy engines, jobs, and an answer to each of the host's messages.

The rules that a model may rely on, and must keep if it overrides a handler:

- Handlers of `Invalidate` and `CopyOut` begin with a synchronous part that runs at the moment of arrival, in order: entries are gone
  before any later message is looked at. Only then do they wait for DMA, in a task of their own.
- Nothing in a message is trusted: frames, pages, contexts and kernels are checked, and a wrong one is refused by name. The device goes on.
- A context that is not there holds no translation, so telling it to drop some is answered with success: it may just have been closed.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, fields
from errno import EBADF, EEXIST, EINTR, EINVAL, EMFILE, ENOENT, EOPNOTSUPP
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import trio

from hmmnet.devices import injection
from hmmnet.devices.bus import SELECT_SYSTEM, Bus
from hmmnet.devices.context import Context, MirroredProcess
from hmmnet.devices.copyengine import CopyEngines
from hmmnet.devices.engine import Engine, JobOutcome
from hmmnet.devices.faultbuffer import BATCH_PAGES
from hmmnet.devices.kernels import kernel_names, load_kernel
from hmmnet.devices.listed import pages_listed
from hmmnet.devices.memory import Memory
from hmmnet.devices.mirror import Mirror
from hmmnet.devices.policy import policy_names
from hmmnet.devices.servicing import FaultService, ServiceCounts
from hmmnet.devices.shared import shared_arena
from hmmnet.devices.spec import Spec
from hmmnet.devices.traffic import Traffic
from hmmnet.errors import KernelError, PeerError, ProtocolError
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.dma import BulkReceiver, BulkSender
from hmmnet.faults.effects import DeviceEffect
from hmmnet.faults.injector import Injector, Points
from hmmnet.pages import LARGE, PAGES_MAX, Words, ascending, from_wire, page_by_page, to_wire, word_of
from hmmnet.plugins import absent
from hmmnet.sleeping import Completion, sleep
from hmmnet.units import show_size
from hmmnet.wire.messages import (
    ARGUMENT_BYTES_MAX,
    PAGES_PER_MESSAGE_MAX,
    TEXT_MAX,
    CloseContext,
    Copied,
    CopyIn,
    CopyOut,
    EndJob,
    Finished,
    FreeFrames,
    Inject,
    Inspect,
    Invalidate,
    Ioctl,
    IoctlDone,
    Launch,
    MirrorShown,
    OpenContext,
    Rate,
    Report,
    ShowMirror,
    ShowStreams,
    StreamsShown,
)
from hmmnet.wire.session import LATER, Later, Session

log = logging.getLogger("hmmnet.devices")

_map_in = msgspec.msgpack.Decoder(dict[str, Any]).decode
"""Made once, which takes longer than to use it."""

CONTEXTS_MAX = 4096
"""Open contexts of one device."""
JOBS_MAX = 1024
"""Jobs that one context runs at once."""
WORD_BYTES = 8
"""A page list of one page."""
LARGE_BYTE = LARGE >> 56
"""The last byte of a little-endian word is at least this when it is large (`pages.LARGE`)."""
IDLE_S = 1.0
"""Real seconds after which message buffers in reserve go back to the operating system; freed frames go after `IDLE_ROUNDS` times that."""


@dataclass
class Wiring:
    """What connects a model to its host. Tasks of the model run in `nursery`."""

    session: Session
    sender: BulkSender
    receiver: BulkReceiver
    clock: EmulatedClock
    nursery: trio.Nursery
    points: Points = field(default_factory=Points)
    injector: Injector | None = None
    """What happens at `points`, where that is decided by this process's host (None: by whoever runs it all)."""
    trim: Callable[[], None] = lambda: None
    """Gives memory that this process holds in reserve back to the operating system; called when the device has become idle."""


@dataclass(eq=False)
class Opened:
    """An open context and what runs on it."""

    context: Context
    service: FaultService
    engine: Engine
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    jobs: dict[int, trio.CancelScope] = field(default_factory=dict)
    closed: Completion = field(default_factory=Completion)


class Device:
    """The common part of all models. Subclasses say how wide their subscriptions are and which commands they take."""

    slab_pages = PAGES_MAX
    """Pages of one subscription (a power of two, aligned)."""
    compound = False
    """Whether its driver takes huge pages as one (MIGRATE_VMA_SELECT_COMPOUND)."""
    select_in = SELECT_SYSTEM
    """See `Context.select_in`."""
    end_inclusive = False
    """See `Mirror.end_inclusive`."""

    def __init__(self, spec: Spec, zone: int, wiring: Wiring) -> None:
        self.spec = spec
        self.compound = self.compound and spec.maps_huge
        self.memory = Memory(zone, spec.pages, shared_arena(zone, spec.pages, spec.memory_file) if spec.memory_file else None)
        self.points = self.memory.points = wiring.points
        self.contexts: dict[int, Opened] = {}
        self.clock = wiring.clock
        self.copies = CopyEngines(self.memory, wiring.sender, wiring.receiver, wiring.nursery)
        self.bus = Bus(wiring.session, wiring.sender, wiring.receiver, wiring.clock)
        self.jobs_finished = 0
        self._entries = BATCH_PAGES
        self.driver_bugs = 0
        """What the driver did that a kernel would WARN about."""
        self._nursery = wiring.nursery
        self._processes: dict[int, MirroredProcess] = {}
        self._slots: dict[int, Context] = {}
        self._closing: dict[int, Opened] = {}
        """Contexts that are being closed: they take no calls, and their jobs may still be at work."""
        self.open_mirrors: list[tuple[int, Mirror]] = []
        """(process, mirror) of every open context: for who checks them after every step."""
        self._slot_last = 0
        self._closed_traffic = Traffic()
        self._freed = Completion()
        self._trim = wiring.trim
        self._session = wiring.session
        self.carrier = injection.carrier_of(self, wiring)
        """The faults that the host has told of."""
        self._attach(wiring.session)
        self._nursery.start_soon(self._discard_idle)

    def _attach(self, session: Session) -> None:
        """Answer the host's messages."""
        session.on(OpenContext, self.open_context)
        session.on(CloseContext, self.close_context)
        session.on(Invalidate, self.invalidate)
        session.on(CopyIn, self.copy_in)
        session.on(CopyOut, self.copy_out)
        session.on(FreeFrames, self.free_frames)
        session.on(Launch, self.launch)
        session.on(EndJob, self.end_job)
        session.on(Ioctl, self.ioctl)
        session.on(Inject, self.inject)
        session.on(Inspect, self.inspect)
        session.on(ShowMirror, self.show_mirror)
        session.on(ShowStreams, self.show_streams)
        session.on(Rate, self.set_rate)

    # --- contexts -------------------------------------------------------------------------------------------------------------

    async def open_context(self, message: OpenContext) -> None:
        """A process opens the device. Raises KernelError: EEXIST, EMFILE."""
        if message.context in self.contexts:
            raise KernelError(EEXIST, "open", f"context {message.context} is open")
        if len(self.contexts) >= CONTEXTS_MAX:
            raise KernelError(EMFILE, "open", f"{CONTEXTS_MAX} contexts are open on {self.spec.name}")
        process = self._processes.setdefault(message.process, MirroredProcess(message.process))
        self._slot_last += 1
        mirror = Mirror(message.context, message.process, self._slot_last, self.memory, end_inclusive=self.end_inclusive)
        context = Context(mirror, process, self.memory, self.copies, self.bus, self.slab_pages, self.spec.is_coherent)
        context.select_in = self.select_in
        process.contexts.append(context)
        service = FaultService(context, self.clock, compound=self.compound, name=self.spec.name)
        service.buffer.entries = self._entries
        opened = Opened(context, service, Engine(context, service, self.clock.now, self.spec))
        self.contexts[message.context] = opened
        self.open_mirrors.append((message.process, mirror))
        self._slots[self._slot_last] = context
        self._nursery.start_soon(self._serve_context, opened)
        await self.opened(opened)

    async def opened(self, opened: Opened) -> None:
        """For models: a context was opened."""

    async def _serve_context(self, opened: Opened) -> None:
        try:
            with opened.scope:
                await opened.service.run()
        finally:
            opened.closed.set()
            for scope in opened.jobs.values():
                scope.cancel()

    async def close_context(self, message: CloseContext) -> None:
        """The last user is gone: end the jobs, forget the mirror, whatever `closing` cannot do. Raises KernelError(EBADF), and its errors.

        As with release(2) there is no second time: the host tells a context that is gone of nothing any more.
        """
        opened = self.opened_context(message.context, "close")
        try:
            await self.closing(opened)
        finally:
            closes = self.contexts.pop(message.context, None) is not None
            if closes:
                self._closing[message.context] = opened
                self.open_mirrors.remove((opened.context.process.number, opened.context.mirror))
                opened.scope.cancel()
                await opened.closed.wait()
                opened.context.mirror.clear()
                while opened.context.is_busy(0, PAGES_MAX):
                    await opened.context.quiesce(0, PAGES_MAX)
                self._forget(opened.context)
        if not closes:
            raise KernelError(EBADF, "close", f"context {message.context} is being closed")

    async def closing(self, opened: Opened) -> None:
        """For models: a context is about to be closed."""

    def _forget(self, context: Context) -> None:
        context.mirror.clear()
        self._closing.pop(context.number, None)
        self._slots.pop(context.mirror.slot, None)
        context.process.contexts.remove(context)
        if not context.process.contexts:
            self._processes.pop(context.process.number, None)
        self._closed_traffic.add(context.traffic)

    def opened_context(self, number: int, call: str) -> Opened:
        """The open context `number`. Raises KernelError(EBADF)."""
        opened = self.contexts.get(number)
        if opened is None:
            raise KernelError(EBADF, call, f"context {number} is not open on {self.spec.name}")
        return opened

    def drop_mirrors(self) -> None:
        """The lease is over: no translation may be used any more. Jobs fault, and wait for the host."""
        for opened in self.contexts.values():
            opened.context.mirror.clear()

    def fence(self) -> None:
        """The host is gone: no translation may be used any more, and no job goes on."""
        self.drop_mirrors()
        for opened in self.contexts.values():
            opened.scope.cancel()

    def set_buffer(self, entries: int) -> None:
        """So many faults fit in the fault buffers, of contexts that are open and of those to come."""
        self._entries = entries
        for opened in self.contexts.values():
            opened.service.buffer.entries = entries

    def inject(self, message: Inject) -> None:
        """A fault begins or ends here, as far as it is this device's. Raises HmmnetError for what is none."""
        injection.obey(self.carrier, message, self._session)

    def suffer(self, effect: DeviceEffect) -> Callable[[], None]:
        """A fault of this device itself; what undoes it. Raises HmmnetError."""
        return injection.begin(self, effect)

    # --- invalidation ---------------------------------------------------------------------------------------------------------

    def invalidate(self, message: Invalidate) -> Awaitable[None] | None:
        """mmu_notifier range start (v25: end): entries go now; the answer waits for DMA. Raises ProtocolError."""
        if message.start >= message.end or message.end > PAGES_MAX:
            raise ProtocolError(f"Invalidate of pages [0x{message.start:x}, 0x{message.end:x}), which is no range")
        opened = self.contexts.get(message.context) or self._closing.get(message.context)
        if opened is None:
            return None
        context = opened.context
        announced = message.owner == self.memory.zone
        keep_own = announced and message.event == "invalidate"
        context.mirror.invalidate(
            message.subscription, message.start, message.end, message.sequence, announced=announced, keep_own=keep_own
        )
        if not self.points.passes("device.before_ack"):
            return self._acknowledge(context, message)
        return context.quiesce(message.start, message.end) if context.is_busy(message.start, message.end) else None

    async def _acknowledge(self, context: Context, message: Invalidate) -> None:
        """`invalidate`, where a fault may come between."""
        await context.quiesce(message.start, message.end)
        process, start, pages = context.process.number, message.start, message.end - message.start
        await self.points.at("device.before_ack", event=message.event, process=process, start=start, pages=pages)

    # --- memory ---------------------------------------------------------------------------------------------------------------

    def copy_in(self, message: CopyIn) -> Awaitable[None] | None:
        """A stream into granted frames. Raises ProtocolError."""
        self.copies.copy_in(message)
        self._freed.set()  # its message buffers will be idle memory, too
        return None if self.points.passes("device.copy_in") else self._copy_in_late(message)

    async def _copy_in_late(self, message: CopyIn) -> None:
        try:
            await self.points.at("device.copy_in", pages=len(message.targets) // WORD_BYTES)
        except PeerError:
            self.copies.abandon(page_by_page(from_wire(message.targets)))
            raise

    def copy_out(self, message: CopyOut) -> Copied | Awaitable[Copied] | Later | None:
        """A stream out of live frames (a few come with the answer), whose entries go with them. Raises ProtocolError."""
        one = message.stream == 0 and len(message.frames) == WORD_BYTES and message.frames[-1] < LARGE_BYTE
        answer = self._copy_one(message) if one else self._copy_out(message)
        if not isinstance(answer, Copied) or not self.points.armed:
            return answer
        return self._damaged(answer) if self.points.passes("device.copy_out") else self._answer_late(answer)

    async def _answer_late(self, answer: Copied) -> Copied:
        await self.points.at("device.copy_out")
        return self._damaged(answer)

    def _damaged(self, answer: Copied) -> Copied:
        """The answer, as it is or as a bad copy engine has made it."""
        if self.points.fails("device.bad_copy"):
            return Copied(bytes((answer.data[0] ^ 1,)) + answer.data[1:], answer.checksum)
        return answer

    def _copy_out(self, message: CopyOut) -> Copied | None:
        pages = pages_listed(message.pages, "CopyOut.pages")
        answer: Copied | None = None
        if message.stream:
            frames = self.copies.copy_out(message)
        else:
            frames, answer = self.copies.copy_inline(message)
        opened = self.contexts.get(message.context)
        if opened is not None:
            for context in opened.context.process.contexts:
                context.mirror.drop_pages(pages)
        self._drop_frames(ascending(frames))
        return answer

    def _copy_one(self, message: CopyOut) -> Copied | Later:
        """`copy_out` of one page, which a CPU waits for: as little as possible, and of that the answer first.

        Nobody uses a mirror before this returns, so it is not to be seen that the entries go while the answer is on its way.
        """
        frame = int.from_bytes(message.frames, "little")
        copied = self.copies.copy_one(frame)
        answer: Copied | Later = copied
        if not self.points.armed:
            self._session.later(message)(copied)
            answer = LATER
        for slot, page in self.memory.mappings_one(frame):
            context = self._slots.get(slot)
            if context is not None:
                context.mirror.drop_page(page, frame)
        return answer

    def free_frames(self, message: FreeFrames) -> None:
        """folio_free. Raises ProtocolError."""
        self.memory.free(message.frames, self._drop_frames)
        self._freed.set()

    def _drop_frames(self, frames: Words) -> None:
        """No mirror leads to `frames` (sorted) any more; words that are under way and do are refused because of the frames' state."""
        if len(frames) == 0:
            return
        for slot, pages in self.memory.mappings(frames):
            context = self._slots.get(slot)
            if context is not None:
                context.mirror.drop_frames(pages, frames)

    async def _discard_idle(self) -> None:
        """Give memory that is not wanted any more back to the operating system."""
        while True:
            await self._freed.wait()
            self._freed = Completion()
            await sleep(self.clock.real(IDLE_S))
            self.memory.grow_older()
            while self.memory.has_idle:
                self.memory.discard_idle()
                await trio.lowlevel.checkpoint()
            if not self._freed.is_set():
                self._trim()
            if self.memory.has_freed:
                self._freed.set()

    # --- jobs and commands ----------------------------------------------------------------------------------------------------

    def launch(self, message: Launch) -> Awaitable[Finished]:
        """Run a kernel. Raises KernelError: EBADF, ENOENT (no such kernel), EINVAL (no such placement, bad arguments), EEXIST, EMFILE,
        EOPNOTSUPP (a placement for pages that this device cannot map);
        BadPlan for a placement that is no policy.

        The job is known from the moment of arrival, so that an `EndJob` that comes right behind finds it.
        """
        opened = self.opened_context(message.context, "launch")
        kernel = load_kernel(message.kernel)
        if kernel is None:
            raise KernelError(ENOENT, "launch", f"{absent('kernel', message.kernel)}; there are {', '.join(kernel_names())}")
        policy = opened.service.policy(message.placement)
        if policy is None:
            raise KernelError(EINVAL, "launch", f"{absent('placement', message.placement)}; there are {', '.join(policy_names())}")
        if policy.page_bytes not in self.spec.page_sizes:
            wants, mapped = show_size(policy.page_bytes), ", ".join(show_size(size) for size in self.spec.page_sizes)
            why = f'placement "{message.placement}" wants pages of {wants}; page_sizes of device "{self.spec.name}" are {mapped}'
            raise KernelError(EOPNOTSUPP, "launch", why)
        if message.job in opened.jobs:
            raise KernelError(EEXIST, "launch", f"job {message.job} runs already")
        if len(opened.jobs) >= JOBS_MAX:
            raise KernelError(EMFILE, "launch", f"{JOBS_MAX} jobs run in context {message.context}")
        arguments = unpack(message.arguments)
        scope = opened.jobs[message.job] = trio.CancelScope()
        return self._launched(message.job, opened, scope, lambda: opened.engine.run(kernel, arguments, message.placement))

    async def _launched(self, job: int, opened: Opened, scope: trio.CancelScope, run: Callable[[], Awaitable[JobOutcome]]) -> Finished:
        try:
            return finished(await self._job(opened, scope, run))
        finally:
            del opened.jobs[job]
            self.jobs_finished += 1

    def end_job(self, message: EndJob) -> None:
        """Nobody waits for this job any more."""
        opened = self.contexts.get(message.context)
        if opened is not None and message.job in opened.jobs:
            opened.jobs[message.job].cancel()

    async def _job(self, opened: Opened, scope: trio.CancelScope, run: Callable[[], Awaitable[JobOutcome]]) -> JobOutcome:
        """Run a job until its end, that of its context (KernelError(EBADF)), or until `scope` is cancelled (EINTR)."""
        if opened.closed.is_set():
            scope.cancel()
        with scope:
            return await run()
        if opened.closed.is_set():
            raise KernelError(EBADF, "launch", "the context was closed while the job ran")
        raise KernelError(EINTR, "launch", "the job was ended, because nobody waited for it any more")

    async def ioctl(self, message: Ioctl) -> IoctlDone:
        """A command. Raises KernelError with the errno that the model's driver would return."""
        self.opened_context(message.context, "ioctl")
        raise KernelError(EOPNOTSUPP, "ioctl", f"a device of model {self.spec.model} has no command {message.command}")

    # --- figures --------------------------------------------------------------------------------------------------------------

    def mirrors(self) -> list[tuple[int, Words, Words, npt.NDArray[np.bool_]]]:
        """(process, pages, frames, may write) of every open context: for who checks them against page tables."""
        return [(opened.context.process.number, *opened.context.mirror.translations()) for opened in self.contexts.values()]

    @property
    def fenced(self) -> bool:
        """Whether the host is gone, or has been silent for longer than its lease: no translation may be used, so there must be none."""
        return self._session.silent or self._session.lost is not None

    def show_mirror(self, message: ShowMirror) -> MirrorShown:
        """What a context's mirror holds."""
        opened = self.contexts.get(message.context)
        if opened is None:
            return MirrorShown(b"", b"")
        pages, frames, writable = opened.context.mirror.translations(message.start, PAGES_PER_MESSAGE_MAX)
        return MirrorShown(to_wire(pages), to_wire(frames << word_of(1) | writable))

    def show_streams(self, message: ShowStreams) -> StreamsShown:
        """How the copy engine goes on with streams out. Raises ProtocolError."""
        if len(message.streams) % WORD_BYTES:
            raise ProtocolError(f"ShowStreams of {len(message.streams)} bytes, which are no list of streams")
        told = [self.copies.account(stream) for stream in from_wire(message.streams).tolist()]
        begun, holds = (np.array([each[i] for each in told], np.uint64) for i in (0, 1))
        return StreamsShown(to_wire(begun), to_wire(holds))

    def inspect(self, _: Inspect) -> Report:
        """The device's figures."""
        return Report(msgspec.msgpack.encode(self.figures()))

    def figures(self) -> dict[str, Any]:
        """State and counters, as plain data."""
        traffic = Traffic()
        traffic.add(self._closed_traffic)
        services = [opened.service.counts for opened in self.contexts.values()]
        for opened in self.contexts.values():
            traffic.add(opened.context.traffic)
        return {
            "name": self.spec.name,
            "model": self.spec.model,
            "kind": self.spec.kind,
            "zone": self.memory.zone,
            "pages": self.memory.pages,
            "pages_used": self.memory.used_pages,
            "pages_used_max": self.memory.used_max,
            **({"pages_retired": self.memory.retired} if self.memory.retired else {}),
            "contexts": len(self.contexts),
            "jobs_running": sum(len(opened.jobs) for opened in self.contexts.values()),
            "jobs_finished": self.jobs_finished,
            "copied_in_bytes": self.copies.bytes_in,
            "copied_out_bytes": self.copies.bytes_out,
            "emulated_s": self.clock.now(),
            **traffic.as_map(),
            **sum_counts(services),
            **({"driver_bugs": self.driver_bugs} if self.driver_bugs else {}),
        }

    def report_bug(self, why: str) -> None:
        """The driver has done what a real kernel WARNs about: it goes on, and this is counted and logged."""
        self.driver_bugs += 1
        log.warning("driver bug on %s, where a kernel WARNs: %s", self.spec.name, why)

    def set_rate(self, message: Rate) -> None:
        """The emulated clock goes on at another rate."""
        self.clock.adopt(message.epoch_monotonic_s, message.epoch_emulated_s, message.rate)


def sum_counts(services: list[ServiceCounts]) -> dict[str, Any]:
    """Fault counters of all open contexts together."""
    counts = dict(vars(ServiceCounts()))
    for service in services:
        for name, count in vars(service).items():
            counts[name] += count
    return {told: counts[name] for name, told in COUNTED.items()}


COUNTED = {one.name: one.name if one.name == "faults" else f"fault_{one.name}" for one in fields(ServiceCounts)}
"""How the figures call each of a service's counts."""


def unpack(raw: bytes) -> dict[str, Any]:
    """A msgpack map with text keys. Raises KernelError(EINVAL)."""
    try:
        return _map_in(raw)
    except msgspec.MsgspecError as error:
        raise KernelError(EINVAL, "launch", f"the kernel's arguments are no map: {error}") from error


def finished(outcome: JobOutcome) -> Finished:
    """The answer to a launch; results that cannot be sent are the kernel's error."""
    counters = msgspec.msgpack.encode(outcome.counters.as_map())
    error = outcome.error
    results = msgspec.msgpack.encode({})
    if not error:
        try:
            results = msgspec.msgpack.encode(dict(outcome.results))
        except (TypeError, ValueError, OverflowError) as failure:
            error = f"the kernel's results cannot be sent: {failure}"
        if len(results) > ARGUMENT_BYTES_MAX:
            error = f"the kernel's results have {len(results)} bytes; at most {ARGUMENT_BYTES_MAX} can be sent"
            results = msgspec.msgpack.encode({})
    return Finished(results, counters, error[:TEXT_MAX], outcome.fault_address, outcome.errno)
