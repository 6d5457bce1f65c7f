"""A ZeroMQ socket that trio tasks can wait on.

libzmq offers one file descriptor for a socket. It is *edge-triggered*: it becomes readable when something may have changed, in either
direction, and any call on the socket may swallow that edge. Six rules follow, each with a failing case behind it:

1. Try first. Wait on the descriptor only when libzmq has nothing for us *and* `EVENTS` was read since: reading it drains the socket's
   mailbox, and only a drained mailbox signals again. (`EVENTS` alone answers as well, at a quarter of the price of a raised `zmq.Again`:
   who had to wait the last time asks first. `zmq_poll` of the one socket reads them, too, in half of the time that getsockopt takes.)
2. One waiter on the descriptor: trio allows one reader for each. Others park. Whoever leaves the descriptor hands it on.
3. Every call on the socket can eat the edge that somebody waits for. So nobody else holds the socket; every call goes through `Bridge`,
   which reads `EVENTS` afterwards when there are waiters and wakes the one whose turn it is. The waiter on the descriptor itself
   is woken with trio's `notify_closing`, which costs nothing until it is needed (a cancel scope for each wait would).
4. Cancel safety: a cancelled call has had no effect. Checkpoints stand before the operation, none after it.
5. A task that never has to wait still yields: every `IMMEDIATE_MAX` small messages, every message of `BULK_BYTES` or more, whenever
   anybody could use it.
6. A router tries, and never waits for room first: its POLLOUT says whether *any* peer has some, and while it knows none (the connection
   has broken, or was never made) there is no POLLOUT at all, and no `EHOSTUNREACH` either, which only a try raises.

Measured on two cores: what a round trip costs more than raw blocking pyzmq is trio's own wait (a bare `wait_readable` around pyzmq is no
faster), so a wait that is expected to be short is kept out of trio's loop where nobody misses it (`shortwait.py`): a fifth to a third of
the round trip, which is ahead of `zmq.asyncio` by half. Frames of 1 MiB have 0.75 to 1.0 of raw's speed, as `zmq.asyncio`'s have.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Any

import trio
import zmq
from trio.lowlevel import ParkingLot, checkpoint, checkpoint_if_cancelled, notify_closing, wait_readable

from .shortwait import ShortWait
from .transport import Buffer

IMMEDIATE_MAX = 16
"""Messages in a row without a yield: enough to hide the yield's price, few enough that other tasks do not notice."""
BULK_BYTES = 64 * 1024
"""From here on a payload is worth a yield of its own, and worth sending without a copy (pyzmq copies smaller ones anyway)."""

_POLLIN = int(zmq.POLLIN)
_POLLOUT = int(zmq.POLLOUT)
_NOBLOCK = int(zmq.NOBLOCK)
_SEND_FIRST = int(zmq.NOBLOCK | zmq.SNDMORE)
_RCVMORE = zmq.RCVMORE


class Bridge:
    """Wraps `socket`, which nobody else may use from then on, not even to read an option.

    Several tasks may send and receive at once. Messages are lists of parts. Raises `trio.ClosedResourceError` once closed. `on_close` is
    called after the socket was closed. `bulk`: it is for bulk data, beside which nobody else waits shortly (`shortwait.py`). `routes`: it
    is a ROUTER, which puts the sender's address before what came.
    """

    def __init__(
        self, socket: zmq.Socket[bytes], on_close: Callable[[], None] | None = None, *, bulk: bool = False, routes: bool = False
    ) -> None:
        self._socket = socket
        self._on_close = on_close
        self._descriptor = int(socket.getsockopt(zmq.FD))
        self._short = ShortWait(self._descriptor, bulk=bulk)
        plain: Any = super(zmq.Socket, socket)  # the extension's own methods: pyzmq's Python layer over them costs as much as they do
        self._send_part: Callable[..., Any] = plain.send
        self._receive_part: Callable[..., Any] = plain.recv
        self._receive_part_into: Callable[..., int] = plain.recv_into
        self._receive_first = self._receive_address if routes else self._receive
        self._get: Callable[[int], Any] = plain.get
        self._poll: Callable[[Any, int], Any] = zmq.zmq_poll
        self._polled = [(socket, _POLLIN | _POLLOUT)]
        self._set: Callable[[int, Any], None] = plain.set
        self._receivers = ParkingLot()
        self._senders = ParkingLot()
        self._leading = 0
        """What the waiter on the descriptor waits for: POLLIN, POLLOUT, or 0 when there is none."""
        self._turn = 0
        """Counts the waiters that the descriptor has had, so that one who comes back late does not strike out his successor."""
        self._parked = 0
        self._receive_waited = False
        self._nudged = False
        self._received = 0
        self.more = False
        """Whether parts of the message begun last still wait to be taken."""
        self._sent = 0
        self._routes = routes
        self._closed = False

    # --- sending ---------------------------------------------------------------------------------------------------------------------

    def send_nowait(self, parts: Sequence[Buffer], copy: bool = True) -> None:
        """Queue a message. With ``copy=False`` a large last part stays pinned: it must not change until the peer has said that it has it.

        Raises `trio.WouldBlock` when the queue is full, `trio.BrokenResourceError` when a router does not know the peer.
        """
        try:
            self._send(parts, copy)
        except zmq.Again:
            raise trio.WouldBlock from None
        finally:
            if self._leading or self._parked:
                self._settle()

    async def send(self, parts: Sequence[Buffer], copy: bool = True) -> None:
        """As `send_nowait`, and wait while the queue is full."""
        self._sent += 1
        try:
            if self._sent >= IMMEDIATE_MAX or len(parts[-1]) >= BULK_BYTES:
                self._sent = 0
                turn = not self._short.undisturbed(large=len(parts[-1]) >= BULK_BYTES)
                if not self._routes:
                    await self._wait(_POLLOUT, turn=turn)
                elif turn:
                    await checkpoint()
                else:
                    await checkpoint_if_cancelled()
            else:
                await checkpoint_if_cancelled()
            self._send(parts, copy)
        except zmq.Again:
            await self._send_later(parts, copy)
        finally:
            if self._leading or self._parked:
                self._settle()

    async def _send_later(self, parts: Sequence[Buffer], copy: bool) -> None:
        while True:
            await self._wait(_POLLOUT)
            try:
                return self._send(parts, copy)
            except zmq.Again:
                continue

    def _send(self, parts: Sequence[Buffer], copy: bool) -> None:
        try:
            count = len(parts)
            if count == 2:
                self._send_part(parts[0], _SEND_FIRST)
            elif count > 2:
                for part in parts[:-1]:
                    self._send_part(part, _SEND_FIRST)
            self._send_part(parts[-1], _NOBLOCK, copy)
        except zmq.ZMQError as failure:
            if failure.errno == errno.EHOSTUNREACH:
                raise trio.BrokenResourceError("no such peer at this router") from failure
            raise

    # --- receiving -------------------------------------------------------------------------------------------------------------------

    def recv_nowait(self) -> list[bytes]:
        """All parts of the next message. Raises `trio.WouldBlock` when there is none."""
        return [self.recv_first_nowait(), *self.take_rest()]

    async def recv(self) -> list[bytes]:
        """All parts of the next message."""
        return [await self.recv_first(), *self.take_rest()]

    def recv_first_nowait(self) -> bytes:
        """The first part of the next message; the others wait in the socket and must be taken, at once, while `more` is true."""
        try:
            return self._receive_first()
        except zmq.Again:
            raise trio.WouldBlock from None
        finally:
            if self._leading or self._parked:
                self._settle()

    async def recv_first(self) -> bytes:
        """As `recv_first_nowait`, and wait for a message. No checkpoint follows the receipt, so the other parts can be taken."""
        self._received += 1
        try:
            if self._received >= IMMEDIATE_MAX:
                self._received = 0
                await self._wait(_POLLIN, turn=not self._short.undisturbed())
            elif self._receive_waited and not (events := self._events()) & _POLLIN:  # nothing last time: ask, cheaper than `Again`
                await self._wait_turn(_POLLIN, events)
            else:
                self._receive_waited = False
                await checkpoint_if_cancelled()
            return self._receive_first()
        except zmq.Again:
            return await self._receive_later()
        finally:
            if self._leading or self._parked:
                self._settle()

    def _receive(self) -> bytes:
        """One part, as a frame: it tells whether there are more, which takes longer to ask the socket for. Raises `zmq.Again`."""
        part = self._receive_part(_NOBLOCK, False)
        self.more = part.more
        received: bytes = part.bytes
        return received

    def _receive_address(self) -> bytes:
        """The first part of a router's message, which is never the only one: nobody has to ask. Raises `zmq.Again`."""
        address: bytes = self._receive_part(_NOBLOCK)
        self.more = True
        return address

    async def _receive_later(self) -> bytes:
        while True:
            if self._nudged:
                self._nudged = False
                raise trio.WouldBlock
            await self._wait(_POLLIN)
            try:
                return self._receive_first()
            except zmq.Again:
                continue

    def nudge(self) -> None:
        """Make one task that waits in `recv_first`, or the next one that would wait there, raise `trio.WouldBlock` instead."""
        if self._closed:
            return
        self._nudged = True
        self._receive_waited = False  # who comes next tries before it waits, and finds the nudge when there is nothing
        if self._leading == _POLLIN:
            self._leading = 0
            notify_closing(self._descriptor)
        self._receivers.unpark_all()

    def take(self) -> bytes:
        """The next waiting part of the message begun last; only while `more` is true."""
        part = self._receive()
        self._taken(len(part))
        return part

    def take_only(self) -> bytes | None:
        """The second of two parts, for a message begun just now; None when there are further ones, which are dropped."""
        part = self._receive()
        if self.more:
            self.take_rest()
            return None
        if self._leading or self._parked or len(part) >= BULK_BYTES:
            self._taken(len(part))
        return part

    def take_into(self, view: memoryview) -> int:
        """As `take`, landing in `view`. Returns the part's full length: what did not fit is lost, so compare it with ``len(view)``."""
        length = self._receive_part_into(view, flags=_NOBLOCK)
        self.more = bool(self._get(_RCVMORE))
        self._taken(length)
        return length

    def take_rest(self) -> list[bytes]:
        """All waiting parts of the message begun last; none is fine."""
        parts = []
        while self.more:
            parts.append(self.take())
        return parts

    def _taken(self, length: int) -> None:
        if length >= BULK_BYTES:
            self._received = IMMEDIATE_MAX
            self._short.moved(large=True)
        if self._leading or self._parked:
            self._settle()

    # --- waiting ---------------------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Rule 3, after any call on the socket: wake those whose direction is ready, and a waiter for the descriptor if it has none."""
        if self._closed:
            return
        events = self._events()
        if self._leading:
            self._wake(events)
        else:  # one of them takes the descriptor
            self._wake_parked(_POLLIN | _POLLOUT)

    def _wake(self, events: int) -> None:
        """`EVENTS` has been read, and with it the edge was taken from those who wait: wake the ones that it is for."""
        if events & self._leading:
            self._leading = 0
            notify_closing(self._descriptor)
        if self._parked:
            self._wake_parked(events)

    def _wake_parked(self, events: int) -> None:
        if events & _POLLIN:
            self._receivers.unpark()
        if events & _POLLOUT:
            self._senders.unpark()

    def _events(self) -> int:
        """`EVENTS`: which directions are ready."""
        ready = self._poll(self._polled, 0)
        events: int = ready[0][1] if ready else 0
        return events

    async def _wait(self, direction: int, *, turn: bool = True) -> None:
        """Return when `direction` may be ready, for the caller to try. A nudge, which the caller will find, is no wait.

        `turn`: others have theirs in any case.
        """
        events = self._events()
        if events & direction or (self._nudged and direction == _POLLIN):
            if turn:
                await checkpoint()
            else:
                await checkpoint_if_cancelled()
        else:
            await self._wait_turn(direction, events)

    async def _wait_turn(self, direction: int, events: int) -> None:
        """Wait on the descriptor, or park while another task does. `events` have just been read and have nothing for `direction`.

        They may have something for others: one who comes back from the descriptor only to wait on it again must not keep to himself what he
        read there. The caller goes on to try, and to `_settle` in any case: that is where the descriptor is handed on.
        """
        if direction == _POLLIN:
            self._receive_waited = True
        if self._short.worthwhile and not (self._leading or self._parked):
            await checkpoint_if_cancelled()
            if self._short.wait():
                return
        if self._leading or self._parked:
            self._wake(events)
        if self._leading:
            self._parked += 1
            try:
                await (self._receivers if direction == _POLLIN else self._senders).park()
            finally:
                self._parked -= 1
            return
        self._leading = direction
        self._turn = turn = self._turn + 1
        self._short.begin_long()
        try:
            await wait_readable(self._descriptor)
            self._short.end_long()
        except trio.ClosedResourceError:
            if self._closed:
                raise
            # else `_settle` has seen our direction ready and taken the lead from us; somebody else may lead by now
        finally:
            if self._turn == turn:
                self._leading = 0

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    # --- options and end -------------------------------------------------------------------------------------------------------------

    def getsockopt(self, option: int) -> Any:
        """Read an option of the socket (zmq_getsockopt)."""
        value = self._get(option)
        if self._leading or self._parked:
            self._settle()
        return value

    def setsockopt(self, option: int, value: Any) -> None:
        """Set an option of the socket (zmq_setsockopt)."""
        self._set(option, value)
        if self._leading or self._parked:
            self._settle()

    def close(self, linger_ms: int = 0) -> None:
        """Close the socket; waiting tasks get `trio.ClosedResourceError`. What is queued is sent for `linger_ms` at most, no promise."""
        if self._closed:
            return
        self._closed = True
        self._send_part = self._receive_part = self._receive_part_into = _refuse  # no check on the hot path
        self._poll = self._get = self._set = _refuse
        if self._leading:
            self._leading = 0
            notify_closing(self._descriptor)
        self._receivers.unpark_all()
        self._senders.unpark_all()
        self._short.close()
        self._socket.close(linger_ms)
        if self._on_close is not None:
            self._on_close()


def _refuse(*_: Any, **__: Any) -> Any:
    raise trio.ClosedResourceError("this bridge is closed")
