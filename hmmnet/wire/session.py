"""A session: requests with answers, notes that arrive, a peer that is known to live or known to be gone.

The shell around `exchange.Exchange`. Whoever owns the transport feeds frames in with `deliver` (the server for all peers of its endpoint,
the client for its one channel), in the order of arrival. That order is kept for handlers that run *inline*: a device must see an
invalidation before an answer that was sent after it.

The hot path is `request`: encode, one send, read until the answer is there (see `reading`). Repeats, heartbeats and the lease are one
periodic task for each session, not a timer for each request.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from enum import Enum, auto
from typing import Any, TypeAlias, TypeVar

import trio

from hmmnet.errors import PeerGone, PeerLost, ProtocolError
from hmmnet.sleeping import RUN, Bell, Completion, shortest_now, sleep, suspended

from .codec import ANSWERS_MASK, Kind, decode_body, decode_header, encode
from .exchange import ACKNOWLEDGE_EVERY, AT_ONCE, BYE_S, HEARTBEAT_S, LEASE_S, RETRY_S, Action, Arrival, Exchange, State
from .failures import failed, failure
from .messages import TEXT_MAX, Done, Failed, Message
from .reading import Reader


class Later(Enum):
    """What a handler returns that answers by itself, when it can (`Session.later`)."""

    LATER = auto()


LATER = Later.LATER
Handler: TypeAlias = Callable[[Any], "Message | Awaitable[Message | None] | Later | None"]
Answer: TypeAlias = Callable[["Message | Exception | None"], None]
M = TypeVar("M", bound=Message)

PROTOCOL_ERRORS_MAX = 16
"""Broken frames from a welcomed peer after which it is given up."""

_LIVE = State.LIVE

log = logging.getLogger("hmmnet.wire")


class PendingReply(Bell):
    """A request that is on its way; `wait` gives its answer, to one task."""

    __slots__ = ("_answer", "_error", "_late", "_reader", "_refused", "answered")

    def __init__(self, reader: Reader | None = None) -> None:
        self._who = []  # all of `Bell.__init__`: one is made for each request
        self.answered = False
        """Whether `wait` would not have to wait."""
        self._answer: Message | None = None
        self._error: Exception | None = None
        self._late: Callable[[Message], None] | None = None
        self._refused: Callable[[Exception], None] | None = None
        self._reader = reader
        """Where whoever waits may read meanwhile."""

    def resolve(self, answer: Message | None, error: Exception | None = None) -> None:
        """The answer, or the error that takes its place. The first counts."""
        if not self.answered:
            self.answered = True
            self._answer = answer
            self._error = error
            if self._who:
                self.ring()
                if self._reader is not None:
                    self._reader.woke()
            elif self._late is not None and answer is not None:
                self._late(answer)
            if error is not None and self._refused is not None:
                self._refused(error)

    async def wait(self) -> Message:
        """The answer. Raises what the peer's handler raised (KernelError, SignalError; else RemoteError), PeerLost when the peer is gone.

        Cancelled, it forgets the answer; the peer carries the request out all the same.
        """
        if not self.answered:
            if self._reader is None:
                self._who = [RUN.task]
                await suspended(self._leave)  # all of `Bell.heard`, without a call
            else:
                await self._read(self._reader)
        return self.result()

    def result(self) -> Message:
        """The answer, which is there. Raises what `wait` does."""
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer

    async def wait_shielded(self) -> Message:
        """`wait` that is not cancelled. Raises what it does."""
        if not self.answered:
            if self._reader is None:
                await self.heard_at_last()
            else:
                with trio.CancelScope(shield=True):
                    await self._read(self._reader)
        return self.result() if self.answered else await self.wait()

    def comes_by(self, deadline_s: float) -> Awaitable[None]:
        """To be awaited while there is no answer: return when there is one, or at that moment of trio's clock."""
        return self.heard_by(deadline_s) if self._reader is None else self._comes_by(self._reader, deadline_s)

    async def _comes_by(self, reader: Reader, deadline_s: float) -> None:
        with trio.move_on_at(deadline_s):
            await self._read(reader)

    async def _read(self, reader: Reader) -> None:
        """Read until the answer is there, or wait while others do."""
        if reader.vacant:
            await reader.stand_in(self)
        if not self.answered:
            await reader.sleep(self.heard)

    def if_refused(self, act: Callable[[Exception], None]) -> None:
        """Call `act` as soon as there is an error instead of an answer: for who does something else before he waits. It must not raise."""
        self._refused = act
        if self._error is not None:
            act(self._error)

    def leave(self, late: Callable[[Message], None]) -> None:
        """Nobody will `wait` any more; an answer that comes all the same, or came while we were being cancelled, goes to `late`.

        It must not raise.
        """
        self._late = late
        if self._answer is not None:
            late(self._answer)


class Session:
    """One peer, as seen from here. Made by `server.Server` and `client.connect`, after the hello.

    `transmit` sends one frame without waiting, or raises `trio.WouldBlock` (the frame is then repeated in time). A peer that is silent for
    longer than `lease_s` may think us gone (`on_silent`); it is lost when it has been silent for `patience_s` more.
    """

    def __init__(
        self,
        transmit: Callable[[bytes], None],
        *,
        peer_name: str,
        role: str,
        incarnation: int,
        heartbeat_s: float = HEARTBEAT_S,
        lease_s: float = LEASE_S,
        retry_s: float = RETRY_S,
        patience_s: float = 0.0,
    ) -> None:
        self.peer_name = peer_name
        self.role = role
        self.incarnation = incarnation
        self.lost: PeerLost | None = None
        """Why the session is over; None while it lives."""
        self.refused = 0
        """Broken frames from this peer."""
        self._transmit = transmit
        self._heartbeat_s = heartbeat_s
        self._patience_s = patience_s
        self.silent = False
        """Whether the peer has not been heard for longer than the lease: nothing that it granted may be used."""
        self._now = shortest_now()
        self._exchange = Exchange(self._now(), lease_s, retry_s)
        self._waiting: dict[int, PendingReply] = {}
        self._handlers: dict[type[Message], tuple[Handler, bool]] = {}
        self._asked = 0
        """The request that is being handed to its handler; 0 for a note."""
        self._nursery: trio.Nursery | None = None
        self._on_lost: list[Callable[[PeerLost], None]] = []
        self._on_silent: list[Callable[[], None]] = []
        self.on_tick: Callable[[float, bool], None] | None = None
        """Told of each `tick` while the session lives: the time, and whether it comes after a stall of our own."""
        self.on_hello: Callable[[], None] | None = None
        """The server's: send the welcome again. A client is never greeted."""
        self.reader: Reader | None = None
        """Who feeds `deliver`, if those who wait for answers may stand in for it."""
        self._spoke = False
        self._ticked_s = 0.0
        self._stalled_s = 0.0
        self._ended = Completion()

    @property
    def settled(self) -> bool:
        """Whether nothing of ours is unanswered or not acknowledged, and the peer was heard within two heartbeats."""
        exchange = self._exchange
        heard = self._now() - exchange.heard_s <= 2 * self._heartbeat_s
        return heard and not self._waiting and not exchange.unacknowledged

    # --- asking ----------------------------------------------------------------------------------------------------------------------

    def begin(self, message: Message) -> PendingReply:
        """Send a request now; its answer comes with `wait` of what is returned. Raises PeerLost."""
        if self.lost is not None:
            raise self._lost_again()
        number = (self._exchange.sequence + 1) & ANSWERS_MASK
        self._tell(Kind.REQUEST, message)
        pending = PendingReply(self.reader)  # made while the frame is on its way
        if self._exchange.state is State.OVER:  # since just now
            pending.resolve(None, self._lost_again())
        else:
            self._waiting[number] = pending
        return pending

    async def request(self, message: Message) -> Message:
        """Send a request and wait for its answer. Raises KernelError, SignalError, RemoteError, PeerLost."""
        return await self.begin(message).wait()

    async def ask(self, message: Message, answer: type[M]) -> M:
        """As `request`, for an answer of one type; another type is a ProtocolError of the peer."""
        reply = await self.begin(message).wait()
        return reply if type(reply) is answer else self._of_type(message, reply, answer)

    async def answer(self, message: Message, pending: PendingReply, answer: type[M]) -> M:
        """The answer to a `message` that was begun; see `ask`."""
        return self._of_type(message, await pending.wait(), answer)

    async def ask_shielded(self, message: Message, answer: type[M]) -> M:
        """`ask` that is not cancelled: for who has to do something with the answer."""
        reply = await self.begin(message).wait_shielded()
        return reply if type(reply) is answer else self._of_type(message, reply, answer)

    def _of_type(self, message: Message, reply: Message, answer: type[M]) -> M:
        if not isinstance(reply, answer):
            raise ProtocolError(f"{self.peer_name} answered {type(message).__name__} with {type(reply).__name__}, not {answer.__name__}")
        return reply

    def note(self, message: Message) -> None:
        """Send what needs no answer; it is repeated until it has arrived and takes effect once. Does nothing when the peer is gone."""
        if self.lost is None:
            self._tell(Kind.NOTE, message)

    def _tell(self, kind: Kind, message: Message | None = None, answers: int = 0) -> None:
        """Send a frame that must arrive."""
        exchange = self._exchange
        exchange.sequence += 1
        frame = encode(kind, exchange.sequence, exchange.received, message, answers)
        if exchange.keep(frame, self._now()):
            self._spoke = True
            try:
                self._transmit(frame)
            except (trio.WouldBlock, trio.ClosedResourceError) as error:
                self._not_sent(error)
        elif exchange.overrun:
            self.end(PeerLost(f"{self.peer_name} does not keep up: {exchange.unacknowledged} messages wait for it"))

    def _send(self, kind: Kind) -> None:
        """Send a frame that need not arrive."""
        self._exchange.unreported = 0
        self._put(encode(kind, 0, self._exchange.received))

    def _put(self, frame: bytes) -> None:
        self._spoke = True
        try:
            self._transmit(frame)
        except (trio.WouldBlock, trio.ClosedResourceError) as error:
            self._not_sent(error)

    def _not_sent(self, error: trio.WouldBlock | trio.ClosedResourceError) -> None:
        """No room or no connection just now: the frame counts as lost on the way, and is repeated in time. With a closed one it is over."""
        if isinstance(error, trio.ClosedResourceError):
            self.end(PeerLost(f"the connection to {self.peer_name} was closed here"))

    # --- answering -------------------------------------------------------------------------------------------------------------------

    def on(
        self, kind: type[M], handler: Callable[[M], Message | Awaitable[Message | None] | Later | None], *, inline: bool = False
    ) -> None:
        """Answer messages of type `kind` with `handler`.

        A plain function runs at once, in the order of arrival: cheapest. So does a coroutine function with `inline`; nothing else is read
        meanwhile (a server reads for all its peers), so it must be quick and must not wait for a peer. Other coroutine functions get a
        task of their own. A plain function that has a task going on answer returns `LATER`. None answers `Done`. KernelError and
        SignalError travel to the peer as what they are; any other exception is logged here and reported as our failure, and told to who
        listens for crashes (`crashes`) if it is one.
        """
        self._handlers[kind] = (handler, inline)

    def on_lost(self, callback: Callable[[PeerLost], None]) -> None:
        """Call `callback` once, when the session is over, whoever ended it; at once if it is.

        `bye` calls it too, with PeerGone. Handlers' tasks go on; what they ask of the peer raises PeerLost.
        """
        if self.lost is not None:
            callback(self.lost)
        else:
            self._on_lost.append(callback)

    def on_silent(self, callback: Callable[[], None]) -> None:
        """Call `callback` whenever the peer was silent for longer than the lease: it may have given what we had of it to somebody else.

        After a stall of our own it is called too: we cannot know when the peer was heard last.
        """
        self._on_silent.append(callback)

    def deliver(self, frame: bytes) -> Awaitable[None] | None:
        """Take one frame from the peer. When an awaitable is returned, it must be awaited before the next frame is delivered.

        Never raises for what a peer sent: broken frames are counted, and too many end the session. So does one note or answer that cannot
        be read; a request that cannot is answered with an error.
        """
        try:
            kind, answers, sequence, acknowledged = decode_header(frame)
            exchange = self._exchange
            arrival = exchange.arrived(sequence, acknowledged, self._now())
            if exchange.waiting_for_room:
                for ready in exchange.ready():
                    self._put(ready)
            if arrival is not Arrival.NEW and not self._anew(arrival):
                return None
            if exchange.unreported >= ACKNOWLEDGE_EVERY:
                self._send(Kind.BEAT)
            action = (exchange.state is _LIVE and AT_ONCE[kind]) or exchange.means(kind)
            if action is Action.SERVE:
                return self._serve(kind, sequence, frame)
            if action is Action.RESOLVE:
                self._resolve(answers, frame)
            elif action is not Action.NOTHING:
                self._act(action, kind)
        except ProtocolError as error:
            self._broken(error)
        return None

    def _anew(self, arrival: Arrival) -> bool:
        """Whether a frame that did not come in its turn means something all the same: a session that is over answers it again."""
        if arrival is Arrival.EARLY and self.lost is None:
            self._send(Kind.GAP)
        return arrival is Arrival.DUPLICATE and self._exchange.state is State.OVER

    def _broken(self, error: ProtocolError) -> None:
        self.refused += 1
        log.warning("broken frame from %s: %s", self.peer_name, error)
        if self.refused >= PROTOCOL_ERRORS_MAX:
            self.end(PeerLost(f"{self.peer_name} was given up after {self.refused} broken frames; the last: {error}"))

    def _act(self, action: Action, kind: Kind) -> None:
        """What is rare."""
        if action is Action.REPEAT:
            for frame in self._exchange.repeat(self._now()):
                self._put(frame)
        elif action is Action.ACKNOWLEDGE_BYE:
            self._send(Kind.BYE_ACK)
            self.end(PeerGone(f"{self.peer_name} said goodbye"))
        elif action is Action.END:
            self.end(PeerGone(f"we said goodbye to {self.peer_name}"))
        elif action is Action.WELCOME:
            if self.on_hello is None:
                raise ProtocolError(f"{self.peer_name} says hello, but it is the host")
            self.on_hello()
        elif action is Action.RESET:
            self.end(PeerLost(f"{self.peer_name} knows no session with us: it was started anew, or has given us up"))
        else:
            assert action is Action.REFUSE
            raise ProtocolError(f"{kind.name} in the middle of a session")

    def _resolve(self, answers: int, frame: bytes) -> None:
        pending = self._waiting.pop(answers, None)
        if pending is None:
            raise ProtocolError(f"{self.peer_name} answers request {answers}, which was not asked or is answered")
        try:
            body = decode_body(frame)
        except ProtocolError as error:
            pending.resolve(None, ProtocolError(f"{self.peer_name}: {error}"))
            self._not_understood(error)
            raise
        if type(body) is Failed:
            pending.resolve(None, failure(self.peer_name, body))
        else:
            pending.resolve(body)

    def _serve(self, kind: Kind, sequence: int, frame: bytes) -> Awaitable[None] | None:
        asked = sequence if kind is Kind.REQUEST else 0
        try:
            body = decode_body(frame)
        except ProtocolError as error:
            self._reply(asked, Failed(0, "decode", str(error)[:TEXT_MAX]))
            if not asked:
                self._not_understood(error)
            raise
        entry, self._asked = self._handlers.get(type(body)), asked
        if entry is None:
            self._reply(asked, Failed(0, type(body).__name__, "not a message that this end handles"))
            raise ProtocolError(f"{type(body).__name__}, which this end does not handle")
        try:
            result = entry[0](body)
        except Exception as error:  # noqa: BLE001 - becomes an answer or a log entry, see `failed`
            self._reply(asked, failed(body, error, self.peer_name))
            return None
        if result is None or isinstance(result, Message):
            if asked and self.lost is None:
                self._tell(Kind.REPLY, result or _DONE, asked & ANSWERS_MASK)  # all of `_reply`
            return None
        if result is LATER:
            return None
        if entry[1]:
            return self._finish(asked, body, result)
        assert self._nursery is not None, "a session serves only once it is started"
        self._nursery.start_soon(self._finish, asked, body, result)
        return None

    def _not_understood(self, error: ProtocolError) -> None:
        """The peer told us something, and believes that we know it now. We do not, and cannot ask: nothing we agreed on holds any more."""
        self.end(PeerLost(f"{self.peer_name} said what cannot be read, and will not say it again: {error}"))

    async def _finish(self, asked: int, body: Message, result: Awaitable[Message | None]) -> None:
        try:
            answer = await result
        except Exception as error:  # noqa: BLE001 - becomes an answer or a log entry, see `failed`
            answer = failed(body, error, self.peer_name)
        self._reply(asked, answer)

    def _reply(self, asked: int, answer: Message | None) -> None:
        if asked and self.lost is None:
            self._tell(Kind.REPLY, answer or _DONE, asked & ANSWERS_MASK)

    def later(self, message: Message) -> Answer:
        """For a plain handler of `message`, while it runs: what to call, once, with its answer, or with what it would have raised."""
        asked = self._asked

        def answer(result: Message | Exception | None) -> None:
            self._reply(asked, failed(message, result, self.peer_name) if isinstance(result, Exception) else result)

        return answer

    # --- living and ending -----------------------------------------------------------------------------------------------------------

    def start(self, nursery: trio.Nursery, *, ticked: bool = False) -> None:
        """Serve, in tasks of `nursery`, until the session is over: heartbeats, repeats, the lease, and the tasks of handlers.

        `ticked`: whoever owns the transport calls `tick` every `heartbeat_s`, for all its sessions together.

        Handlers that still run at the end are not cancelled: a migration must be undone or finished, not dropped. What they ask of the
        peer raises PeerLost, and their answers go nowhere. Cancel the nursery to cancel them.
        """
        self._nursery = nursery
        self._ticked_s = self._now()
        if not ticked:
            nursery.start_soon(self._keep_alive)

    async def _keep_alive(self) -> None:
        while self.lost is None:
            await sleep(self._heartbeat_s)
            self.tick()

    def tick(self) -> None:
        """It is time for a heartbeat: look whether the peer lives, repeat what it has not acknowledged, show that we live."""
        now_s = self._now()
        stalled = now_s - self._ticked_s > 2 * self._heartbeat_s
        self._ticked_s = now_s
        if self.lost is not None or not self._in_touch(now_s, stalled=stalled):
            return
        exchange = self._exchange
        for frame in exchange.overdue(now_s):
            self._put(frame)
        if not self._spoke or exchange.unreported:
            self._send(Kind.BEAT)
        self._spoke = False
        if self.on_tick is not None:
            self.on_tick(now_s, stalled)

    def _in_touch(self, now_s: float, *, stalled: bool) -> bool:
        """Whether the session goes on. After a stall of our own the peer's frames may lie unread, here or on their way through a computer
        that is busy: it has a whole lease again, from then on, to be heard.
        """
        if stalled:
            self._stalled_s = now_s
        if not self._exchange.silent(now_s):
            self.silent = False
            return True
        silence_s = now_s - self._exchange.heard_s
        if not self.silent:
            self.silent = True
            log.info("%s is silent for %.1f s, longer than its lease", self.peer_name, silence_s)
            for callback in self._on_silent:
                callback()
        if now_s - max(self._exchange.heard_s, self._stalled_s) <= self._exchange.lease_s + self._patience_s:
            return True
        self.end(PeerLost(f"{self.peer_name} was silent for {silence_s:.1f} s, longer than its lease"))
        return False

    def end(self, cause: PeerLost) -> None:
        """The session is over: everything that waits for the peer gets `cause`, and `on_lost` callbacks run, once."""
        if self.lost is not None:
            return
        self.lost = cause
        self._exchange.state = State.OVER
        waiting, self._waiting = self._waiting, {}
        for pending in waiting.values():
            pending.resolve(None, self._lost_again())
        if self.reader is not None:
            self.reader.interrupt()
        self._ended.set()
        callbacks, self._on_lost = self._on_lost, []
        for callback in callbacks:
            callback(cause)

    async def bye(self) -> None:
        """Say goodbye and wait for the acknowledgement, for `BYE_S` at most; then it is over. Frames must be delivered meanwhile."""
        if self._exchange.state is State.LIVE:
            self._exchange.state = State.CLOSING
            self._tell(Kind.BYE)
        with trio.move_on_after(BYE_S):
            await self._ended.wait()
        self.end(PeerLost(f"we said goodbye to {self.peer_name}, which did not answer"))

    def cut(self, cause: PeerLost) -> None:
        """Our own end is gone from one moment to the next: nobody is told, neither the peer nor `on_lost`; who waits gets `cause`."""
        self._on_lost.clear()
        self.end(cause)

    def hang_up(self) -> None:
        """`bye` of an end that will hear no answer, because nobody delivers frames any more: it is over at once."""
        if self._exchange.state is State.LIVE:
            self._tell(Kind.BYE)
        self.end(PeerGone(f"we said goodbye to {self.peer_name}, and listen no more"))

    def _lost_again(self) -> PeerLost:
        """A fresh exception with the same cause: one exception object raised in many tasks would collect all their tracebacks."""
        assert self.lost is not None
        return type(self.lost)(str(self.lost))


_DONE = Done()
