"""Channels and listeners inside one trio run: for simulation, and for tests that want no sockets.

Messages are copied when they are sent, so a sender that breaks its pin shows no more here than over a socket. Who comes first, the
one that binds or the one that connects, does not matter. A pipe holds `PIPE_MESSAGES_MAX` messages; a sender then waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import NoReturn, Protocol, Self

import trio
from trio.lowlevel import Abort, Task, checkpoint, checkpoint_if_cancelled

from hmmnet.errors import HmmnetError
from hmmnet.sleeping import RUN, WORD, Suspension, suspended

from .transport import CHANNEL_BYTES_MAX, FRAME_BYTES_MAX, Buffer

PIPE_MESSAGES_MAX = 16_384
"""As the queue of a control socket: more than a session or a stream ever has unacknowledged."""
TELEMETRY_MESSAGES_MAX = 1_000
IMMEDIATE_MAX = 16
"""Messages in a row that a task takes or gives without a yield, as in the bridge."""

Parts = tuple[bytes, ...]


class Detour(Protocol):
    """Another way for messages."""

    @property
    def free(self) -> bool:
        """Whether what would go there may as well go straight on."""
        ...

    def __call__(self, parts: Parts, deliver: Callable[[Parts], object], /) -> None:
        """Here is a message, and what to call with it when, if, and as often as it arrives."""
        ...


Watch = Callable[[float, str, Parts], None]
"""Told the time, the way and the parts of every message that a pipe takes."""


class Waiters:
    """Who waits, in their order: trio's ParkingLot with less around it."""

    __slots__ = ("alone", "tasks")

    def __init__(self) -> None:
        self.tasks: deque[Task] = deque()
        """Look here first: most often nobody waits."""
        self.alone = Suspension(self._first_leaves)
        """The wait of who waits alone, nearly always the same task again and again."""

    def park(self) -> Awaitable[None]:
        """To be awaited at once: the current task waits for `unpark`."""
        task, tasks = RUN.task, self.tasks
        if not tasks:
            tasks.append(task)
            return self.alone
        tasks.append(task)

        def leave(_: object) -> Abort:
            tasks.remove(task)
            return Abort.SUCCEEDED

        return suspended(leave)

    def _first_leaves(self, _: object) -> Abort:
        """Who came when nobody waited is the first as long as it waits."""
        self.tasks.popleft()
        return Abort.SUCCEEDED

    def unpark(self) -> None:
        """The first goes on, if there is one."""
        if self.tasks:
            RUN.runner.reschedule(self.tasks.popleft(), WORD)

    def unpark_all(self) -> None:
        """All go on."""
        while self.tasks:
            RUN.runner.reschedule(self.tasks.popleft(), WORD)


class Turns:
    """Lets others run now and then, between messages that a task takes or gives without having to wait."""

    __slots__ = ("immediate",)

    def __init__(self) -> None:
        self.immediate = 0
        """Messages since the task had to wait, when others ran."""

    def over(self) -> bool:
        """One more without waiting: whether that makes `IMMEDIATE_MAX`, and a checkpoint is due for all, not only for who is cancelled."""
        self.immediate += 1
        if self.immediate < IMMEDIATE_MAX:
            return False
        self.immediate = 0
        return True


class Pipe:
    """One direction: a bounded queue with waiters at both ends."""

    def __init__(self, limit: int, max_bytes: int, way: str = "", watch: Watch | None = None, *, addressed: bool = False) -> None:
        self.queue: deque[Parts] = deque()
        self.closed = False
        """The receiving end is gone: what is sent falls into the void, as it does with sockets."""
        self.detour: Detour | None = None
        """Where what is put goes first, when something may happen to it on the way."""
        self._dead = False
        self._limit = limit
        self.max_bytes = max_bytes
        """Of a part; longer ones are lost."""
        self._first = int(addressed)
        """The first part that may be too long: an address is ours."""
        self._takers = Waiters()
        self._givers = Waiters()
        self._turns = Turns()
        self._way = way
        self._watch = watch

    def offer(self, parts: Parts) -> bool:
        """Append; False when full. A part above the limit is lost, as a socket would drop it with its connection."""
        if self.closed:
            return True
        max_bytes = self.max_bytes
        for part in parts[self._first :]:
            if len(part) > max_bytes:
                return True
        queue = self.queue
        if len(queue) >= self._limit:
            return False
        if self._watch is not None:
            self._watch(trio.current_time(), self._way, parts)
        detour = self.detour
        if detour is None or detour.free:
            queue.append(parts)
            tasks = self._takers.tasks
            if tasks:
                RUN.runner.reschedule(tasks.popleft(), WORD)  # all of `unpark`: each message passes here
        else:
            detour(parts, self.arrive)
        return True

    def put_nowait(self, parts: Parts) -> None:
        """`offer`. Raises `trio.WouldBlock` when full."""
        if not self.offer(parts):
            raise trio.WouldBlock

    def arrive(self, parts: Parts) -> None:
        """A message is there; what comes late to a full or a closed pipe is lost."""
        queue = self.queue
        if not self.closed and len(queue) < self._limit:
            queue.append(parts)
            tasks = self._takers.tasks
            if tasks:
                RUN.runner.reschedule(tasks.popleft(), WORD)

    async def put(self, parts: Parts) -> None:
        """Append, waiting for room."""
        while not self.offer(parts):
            await self._givers.park()

    def get_nowait(self) -> Parts:
        """Take the first. Raises `trio.WouldBlock` when empty."""
        if self.closed and not self._dead:
            raise trio.ClosedResourceError("this end is closed")
        if not self.queue:
            raise trio.WouldBlock
        parts = self.queue.popleft()
        if self.queue or self._givers.tasks:
            self._pass_on()
        return parts

    def _pass_on(self) -> None:
        """There is room, and perhaps more to take."""
        if self._givers.tasks:
            self._givers.unpark()
        if self.queue and self._takers.tasks:
            self._takers.unpark()

    async def get(self) -> Parts:
        """Take the first, waiting for it."""
        queue = self.queue
        if queue and not self._dead:
            await checkpoint() if self._turns.over() else await checkpoint_if_cancelled()
        while self._dead or not queue:
            if self.closed and not self._dead:
                break
            self._turns.immediate = 0
            await self._takers.park()
        if self.closed:
            return self.get_nowait()
        parts = queue.popleft()  # as there, without a call: each message passes here
        if queue or self._givers.tasks:
            self._pass_on()
        return parts

    async def each(self, count: int, take: Callable[..., Awaitable[None] | None]) -> NoReturn:
        """Call `take` with the parts of each message, as `get` would give them; what it returns is awaited before the next.

        A message that has not `count` parts comes with an empty last one. Raises `trio.ClosedResourceError` once this end is closed.
        """
        queue, takers, turns = self.queue, self._takers, self._turns
        me, alone = RUN.task, takers.alone
        while True:
            if queue and not self._dead:
                await checkpoint() if turns.over() else await checkpoint_if_cancelled()
            while self._dead or not queue:
                if self.closed and not self._dead:
                    raise trio.ClosedResourceError("this end is closed")
                turns.immediate = 0
                if takers.tasks:
                    await takers.park()
                else:  # all of `Waiters.park`, as mostly
                    takers.tasks.append(me)
                    await alone
            parts = queue.popleft()  # as in `get`, without a call
            if queue or self._givers.tasks:
                self._pass_on()
            more = take(*parts) if len(parts) == count else take(*parts[: count - 1], b"")
            if more is not None:
                await more

    def detach(self) -> None:
        """The receiving end is dead: what is sent falls into the void, and its waiters are not told."""
        self.closed = self._dead = True
        self.queue.clear()
        self._givers.unpark_all()

    def close(self) -> None:
        """The receiving end goes: its waiters get `trio.ClosedResourceError`, senders go on into the void."""
        self.closed = True
        self.queue.clear()
        self._takers.unpark_all()
        self._givers.unpark_all()


class MemoryPayload:
    """The second part of a message that was received."""

    __slots__ = ("_part",)

    def __init__(self, part: bytes) -> None:
        self._part = part

    def into(self, view: memoryview) -> int:
        """See `Payload.into`."""
        fits = min(len(view), len(self._part))
        view[:fits] = self._part[:fits]
        return len(self._part)

    def take(self) -> bytes:
        """See `Payload.take`."""
        return self._part


class MemoryChannel:
    """A `Channel` over two pipes."""

    nudge = None
    """See `Channel.nudge`. In memory a task switch costs nothing, and in virtual time none may be saved: where answers overtake the turns
    of others, two devices that want the same pages take them from each other in lockstep, for ever."""

    def __init__(self, endpoint: str, inbound: Pipe, outbound: Pipe, address: bytes | None = None) -> None:
        self.endpoint = endpoint
        self.refused = 0
        self._inbound = inbound
        self._outbound = outbound
        self._detour: Detour | None = None
        """Where what is sent goes first."""
        self._prefix: Parts = () if address is None else (address,)
        self._turns = Turns()

    async def send(self, header: Buffer, payload: Buffer | None = None) -> None:
        """See `Channel.send`."""
        await checkpoint() if self._turns.over() else await checkpoint_if_cancelled()
        parts = self._parts(header, payload)
        if self._detour is None:
            await self._outbound.put(parts)
        elif self._detour.free:
            self._outbound.offer(parts)  # what finds no room is lost, as where something may happen on the way
        else:
            self._detour(parts, self._outbound.offer)

    def send_nowait(self, header: Buffer, payload: Buffer | None = None) -> None:
        """See `Channel.send_nowait`."""
        alone = payload is None and not self._inbound.closed
        parts = (*self._prefix, bytes(header)) if alone else self._parts(header, payload)  # each frame passes here: no call
        detour = self._detour
        if detour is not None and not detour.free:
            detour(parts, self._outbound.offer)
        elif not self._outbound.offer(parts) and detour is None:
            raise trio.WouldBlock

    def _parts(self, header: Buffer, payload: Buffer | None) -> Parts:
        if self._inbound.closed:
            raise trio.ClosedResourceError("this channel is closed")
        if payload is None:
            return (*self._prefix, bytes(header))
        return (*self._prefix, bytes(header), bytes(payload))

    def missing(self) -> bool:
        """See `Channel.missing`. Memory does not tell."""
        return False

    async def receive(self) -> tuple[bytes, MemoryPayload | None]:
        """See `Channel.receive`."""
        parts = await self._inbound.get()
        return parts[0], MemoryPayload(parts[1]) if len(parts) > 1 else None

    def hand_on(self, take: Callable[[bytes], Awaitable[None] | None]) -> Awaitable[NoReturn]:
        """See `HandsOn.hand_on`."""
        return self._inbound.each(1, take)

    def receive_nowait(self) -> tuple[bytes, MemoryPayload | None]:
        """See `Channel.receive_nowait`."""
        parts = self._inbound.get_nowait()
        return parts[0], MemoryPayload(parts[1]) if len(parts) > 1 else None

    def close(self) -> None:
        """See `Channel.close`."""
        self._inbound.close()

    async def aclose(self) -> None:
        """See `Channel.aclose`."""
        self.close()
        await checkpoint()

    def divert(self, inbound: Detour, outbound: Detour) -> None:
        """What comes here, and what is sent from here, goes another way (see `Detour`)."""
        self._inbound.detour = inbound
        self._detour = outbound

    def cut(self) -> None:
        """This end dies: nothing that it sends arrives any more, and what arrives for it is lost. Whoever reads here waits for ever."""
        self._inbound.detach()
        self._inbound = Pipe(0, 0)
        self._outbound = Pipe(0, 0)
        self._outbound.close()
        self._detour = None


class Hub:
    """The meeting point of one listening endpoint: one pipe in, one out for each peer."""

    def __init__(self, endpoint: str, watch: Watch | None) -> None:
        self.inbound = Pipe(PIPE_MESSAGES_MAX, FRAME_BYTES_MAX, f">{endpoint}", watch, addressed=True)
        self.outbound: dict[bytes, Pipe] = {}


class MemoryListener:
    """A `Listener` over the pipes of a hub."""

    nudge = None
    """As for `MemoryChannel`."""

    def __init__(self, endpoint: str, hub: Hub) -> None:
        self.endpoint = endpoint
        self._hub = hub

    async def receive(self) -> tuple[bytes, bytes]:
        """See `Listener.receive`."""
        parts = await self._hub.inbound.get()
        return parts[0], parts[1] if len(parts) == 2 else b""

    def hand_on(self, take: Callable[[bytes, bytes], Awaitable[None] | None]) -> Awaitable[NoReturn]:
        """See `HandsOn.hand_on`."""
        return self._hub.inbound.each(2, take)

    def receive_nowait(self) -> tuple[bytes, bytes]:
        """See `Listener.receive_nowait`."""
        parts = self._hub.inbound.get_nowait()
        return parts[0], parts[1] if len(parts) == 2 else b""

    async def send(self, peer: bytes, frame: Buffer) -> None:
        """See `Listener.send`."""
        await checkpoint_if_cancelled()
        pipe = self._hub.outbound.get(peer)
        if pipe is not None:
            await pipe.put((bytes(frame),))

    def send_nowait(self, peer: bytes, frame: Buffer) -> None:
        """See `Listener.send_nowait`."""
        pipe = self._hub.outbound.get(peer)
        if pipe is None or not pipe.offer((bytes(frame),)):
            raise trio.WouldBlock

    async def aclose(self) -> None:
        """See `Listener.aclose`."""
        self._hub.inbound.close()
        await checkpoint()


class MemoryTransport:
    """Makes channels of one world; both ends must come from the same transport."""

    def __init__(self, watch: Watch | None = None) -> None:
        self._watch = watch
        self._hubs: dict[str, Hub] = {}
        self._pairs: dict[tuple[str, bytes], tuple[Pipe, Pipe]] = {}
        self._telemetry: dict[str, Pipe] = {}
        self._identities = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def listen(self, endpoint: str) -> MemoryListener:
        """See `Transport.listen`. An endpoint whose listener was closed can be listened at again, with nothing left of the old one."""
        hub = self._hub(endpoint)
        if hub.inbound.closed:
            hub = self._hubs[endpoint] = Hub(endpoint, self._watch)
        return MemoryListener(endpoint, hub)

    def connect(self, endpoint: str, identity: bytes) -> MemoryChannel:
        """See `Transport.connect`."""
        hub = self._hub(endpoint)
        pipe = hub.outbound[identity] = Pipe(PIPE_MESSAGES_MAX, FRAME_BYTES_MAX, f"<{endpoint} {identity.decode()}", self._watch)
        return MemoryChannel(endpoint, pipe, hub.inbound, identity)

    def bind_channel(self, endpoint: str, max_bytes: int = CHANNEL_BYTES_MAX, key: bytes = b"") -> MemoryChannel:
        """See `Transport.bind_channel`."""
        inbound, outbound = self._pair(endpoint, key)
        inbound.max_bytes = max_bytes
        return MemoryChannel(endpoint, inbound, outbound)

    def connect_channel(self, endpoint: str, max_bytes: int = CHANNEL_BYTES_MAX, key: bytes = b"") -> MemoryChannel:
        """See `Transport.connect_channel`."""
        outbound, inbound = self._pair(endpoint, key)
        inbound.max_bytes = max_bytes
        return MemoryChannel(endpoint, inbound, outbound)

    def bind_telemetry(self, endpoint: str) -> MemoryChannel:
        """See `Transport.bind_telemetry`."""
        return MemoryChannel(endpoint, self._telemetry_pipe(endpoint), Pipe(0, 0))

    def connect_telemetry(self, endpoint: str) -> MemoryChannel:
        """See `Transport.connect_telemetry`."""
        return LossyChannel(endpoint, Pipe(0, 0), self._telemetry_pipe(endpoint))

    def fresh_identity(self, name: str) -> bytes:
        """See `Transport.fresh_identity`: counted, so that a run repeats exactly."""
        self._identities += 1
        return f"{name}:{self._identities}".encode()[-255:]

    def cut_listeners(self) -> None:
        """Whoever listens dies: what is sent to them, now and later, falls into the void. Whoever listens waits for ever."""
        for hub in self._hubs.values():
            hub.inbound.detach()

    def close(self) -> None:
        """See `Transport.close`."""
        for hub in self._hubs.values():
            hub.inbound.close()
            for pipe in hub.outbound.values():
                pipe.close()
        for pair in self._pairs.values():
            for pipe in pair:
                pipe.close()
        for pipe in self._telemetry.values():
            pipe.close()

    def _hub(self, endpoint: str) -> Hub:
        check_endpoint(endpoint)
        if endpoint not in self._hubs:
            self._hubs[endpoint] = Hub(endpoint, self._watch)
        return self._hubs[endpoint]

    def _pair(self, endpoint: str, key: bytes) -> tuple[Pipe, Pipe]:
        check_endpoint(endpoint)
        pair = self._pairs.get((endpoint, key))
        if pair is None or pair[0].closed or pair[1].closed:
            ways = (Pipe(PIPE_MESSAGES_MAX, CHANNEL_BYTES_MAX, f"{sign}{endpoint}", self._watch) for sign in "><")
            pair = self._pairs[endpoint, key] = (next(ways), next(ways))
        return pair

    def _telemetry_pipe(self, endpoint: str) -> Pipe:
        check_endpoint(endpoint)
        return self._telemetry.setdefault(endpoint, Pipe(TELEMETRY_MESSAGES_MAX, FRAME_BYTES_MAX))


class LossyChannel(MemoryChannel):
    """Telemetry's sending end: full means lost."""

    async def send(self, header: Buffer, payload: Buffer | None = None) -> None:
        """Queue, or lose."""
        await checkpoint_if_cancelled()
        self.send_nowait(header, payload)

    def send_nowait(self, header: Buffer, payload: Buffer | None = None) -> None:
        """Queue, or lose."""
        try:
            super().send_nowait(header, payload)
        except trio.WouldBlock:
            return


def check_endpoint(endpoint: str) -> None:
    """Raises HmmnetError unless `endpoint` is ``mem://name``."""
    if not endpoint.startswith("mem://") or len(endpoint) == len("mem://"):
        raise HmmnetError(f"{endpoint}: no endpoint of this transport; use mem://name")
