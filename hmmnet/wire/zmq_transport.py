"""Channels and listeners over ZeroMQ sockets, between processes.

Control is a DEALER at the peer and a ROUTER at the host; so is bulk, one pair for each direction, where the router hears and answers one
peer only; telemetry is PUB to SUB. Control has an io thread of its own, and the one for bulk makes way for it (`iothreads`), so an
invalidation never queues behind a megabyte. Every socket refuses parts above its limit (libzmq then drops the connection before it
allocates), so the largest thing that a stranger can make us hold is known.

Who may connect: an ipc path is guarded by the permissions of its file (0600); control by the machine secret in `Hello`; bulk by the
channel's key, a random identity that only the welcomed peer was told; telemetry by the proof in each sample. tcp beyond loopback needs
CURVE keys besides, which encrypt, and prove to the peer whom it talks to.

Seconds are those of the trio run, and real ones: a run that goes by a machine's clock (`EmulatedClock`) has memory channels, no sockets.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import trio
import zmq

from hmmnet.errors import HmmnetError

from .allocator import keep_freed_buffers
from .bridge import BULK_BYTES, Bridge
from .iothreads import bulk_made_nice
from .transport import AWAY_S, CHANNEL_BYTES_MAX, FRAME_BYTES_MAX, MUTE_S, PING_S, Buffer, mute_s

IO_THREADS = 2
CONTROL_THREAD = 1 << 0
BULK_THREAD = 1 << 1
"""Affinity masks: which io thread serves which kind of socket."""
SOCKETS_MAX = 4096
"""Sockets of one context: three for each device, and a topology has at most a thousand or so."""
CONTROL_QUEUE_MAX = 16_384
"""Frames that a control socket queues for one peer; more than a session ever has unacknowledged."""
TELEMETRY_QUEUE_MAX = 1_000
"""Samples that telemetry holds for a slow reader before it loses some."""
TELEMETRY_BYTES_MAX = 1 << 20
IPC_PATH_MAX = 107
"""Bytes in the path of a Unix socket (sun_path, less its final zero)."""
LINGER_MS = 200
"""How long a closed socket goes on sending what is queued: a courtesy for the last acknowledgement, not a promise."""
RECONNECT_MS = 20
RECONNECT_MS_MAX = 500
"""First and longest pause before a broken connection is tried again."""
ROUTER_RETRY_S = 0.002
"""A router tells nobody when one peer of many has room again, or comes: who waits for that looks as often as this."""
AWAY_LOOKS = 400
"""How often who sends looks for a peer that is away: after a stall of this process `AWAY_S` is over, and the peer has had no time."""
BULK_QUEUE_MAX = 64
"""Messages that a bulk channel reads ahead of us from anybody who connects; more than the windows of a few streams."""


@dataclass(frozen=True)
class CurveKeys:
    """Z85-encoded CURVE keys (40 bytes each) of the host and of one peer, as `zmq.curve_keypair` makes them.

    The host needs its own two only, a peer all but the host's secret.
    """

    host_public: bytes
    host_secret: bytes = b""
    peer_public: bytes = b""
    peer_secret: bytes = b""


class ZmqPayload:
    """The second part of a message that still waits in its socket."""

    __slots__ = ("_bridge",)

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    def into(self, view: memoryview) -> int:
        """See `Payload.into`."""
        return self._bridge.take_into(view)

    def take(self) -> bytes:
        """See `Payload.take`."""
        return self._bridge.take()


class ZmqChannel:
    """A `Channel` over one socket. A router's talks to the `peer` of that identity, and drops what others send."""

    def __init__(self, bridge: Bridge, endpoint: str, peer: bytes = b"") -> None:
        self.endpoint = endpoint
        self.refused = 0
        self._bridge = bridge
        self._payload = ZmqPayload(bridge)
        self._peer = peer
        self._to = (peer,) if peer else ()
        self._begun = False

    async def send(self, header: Buffer, payload: Buffer | None = None) -> None:
        """See `Channel.send`."""
        parts = (*self._to, header) if payload is None else (*self._to, header, payload)
        try:
            await self._bridge.send(parts, copy=len(parts[-1]) < BULK_BYTES)
        except trio.BrokenResourceError:
            await self._send_when_there(parts)

    async def _send_when_there(self, parts: Sequence[Buffer]) -> None:
        """The peer is not there yet, or is coming again."""
        began_s, looks = trio.current_time(), 0
        while looks < AWAY_LOOKS or trio.current_time() - began_s < AWAY_S:
            await trio.sleep(ROUTER_RETRY_S)
            looks += 1
            try:
                return await self._bridge.send(parts, copy=len(parts[-1]) < BULK_BYTES)
            except trio.BrokenResourceError:
                continue
        raise trio.BrokenResourceError(f"nobody has been at the other end of the bulk channel {self.endpoint} for {AWAY_S:g} s")

    def send_nowait(self, header: Buffer, payload: Buffer | None = None) -> None:
        """See `Channel.send_nowait`."""
        parts = (*self._to, header) if payload is None else (*self._to, header, payload)
        try:
            self._bridge.send_nowait(parts, copy=len(parts[-1]) < BULK_BYTES)
        except trio.BrokenResourceError:
            raise trio.WouldBlock from None

    def missing(self) -> bool:
        """See `Channel.missing`. Only a router can tell: others queue what they send until they are connected (again)."""
        if not self._peer:
            return False
        try:
            self._bridge.send_nowait((self._peer, b""))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return True
        except trio.WouldBlock:
            return False
        return False

    async def receive(self) -> tuple[bytes, ZmqPayload | None]:
        """See `Channel.receive`."""
        while True:
            if self._begun:
                self._drop_rest()
            first = await self._bridge.recv_first()
            if self._is_peer(first) if self._peer else first or self._bridge.more:
                return self._begin(first)

    def receive_nowait(self) -> tuple[bytes, ZmqPayload | None]:
        """See `Channel.receive_nowait`."""
        while True:
            if self._begun:
                self._drop_rest()
            first = self._bridge.recv_first_nowait()
            if self._is_peer(first) if self._peer else first or self._bridge.more:
                return self._begin(first)

    def _is_peer(self, sender: bytes) -> bool:
        """Whether the message just begun is the peer's; another's is dropped."""
        if sender == self._peer:
            return True
        self._bridge.take_rest()
        self.refused += 1
        return False

    def _begin(self, first: bytes) -> tuple[bytes, ZmqPayload | None]:
        header = self._bridge.take() if self._peer else first
        self._begun = more = self._bridge.more
        return header, self._payload if more else None

    def _drop_rest(self) -> None:
        self._begun = False
        if self._bridge.more and len(self._bridge.take_rest()) > 1:
            self.refused += 1

    def nudge(self) -> None:
        """See `Channel.nudge`."""
        self._bridge.nudge()

    def close(self) -> None:
        """See `Channel.close`."""
        self._bridge.close(LINGER_MS)

    async def aclose(self) -> None:
        """See `Channel.aclose`."""
        self.close()
        await trio.lowlevel.checkpoint()


class ZmqListener:
    """A `Listener` over a ROUTER socket."""

    def __init__(self, bridge: Bridge, endpoint: str) -> None:
        self.endpoint = endpoint
        self._bridge = bridge

    async def receive(self) -> tuple[bytes, bytes]:
        """See `Listener.receive`."""
        peer = await self._bridge.recv_first()
        return peer, self._bridge.take_only() or b""  # a router puts the address before what came, which is one part at least

    def receive_nowait(self) -> tuple[bytes, bytes]:
        """See `Listener.receive_nowait`."""
        peer = self._bridge.recv_first_nowait()
        return peer, self._bridge.take_only() or b""

    def nudge(self) -> None:
        """See `Listener.nudge`."""
        self._bridge.nudge()

    async def send(self, peer: bytes, frame: Buffer) -> None:
        """See `Listener.send`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            try:
                return self.send_nowait(peer, frame)
            except trio.WouldBlock:
                await trio.sleep(ROUTER_RETRY_S)

    def send_nowait(self, peer: bytes, frame: Buffer) -> None:
        """See `Listener.send_nowait`."""
        try:
            self._bridge.send_nowait((peer, frame), copy=len(frame) < BULK_BYTES)
        except trio.BrokenResourceError:
            raise trio.WouldBlock from None

    async def aclose(self) -> None:
        """See `Listener.aclose`."""
        self._bridge.close(LINGER_MS)
        await trio.lowlevel.checkpoint()


class ZmqTransport:
    """Makes ZeroMQ sockets: `io_threads` of them run beside Python; `curve` is needed for tcp beyond this machine.

    Raises HmmnetError for an endpoint that cannot be used.
    """

    def __init__(self, io_threads: int = IO_THREADS, curve: CurveKeys | None = None) -> None:
        keep_freed_buffers()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads)
        self._context.set(zmq.MAX_SOCKETS, SOCKETS_MAX)
        self._split = io_threads > 1
        self._started = False
        self._curve = curve
        self._bridges: list[Bridge] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def listen(self, endpoint: str) -> ZmqListener:
        """See `Transport.listen`."""
        socket = self._socket(zmq.ROUTER, CONTROL_THREAD, CONTROL_QUEUE_MAX, FRAME_BYTES_MAX)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a peer that reconnects is known again at once
        return ZmqListener(*self._bind(socket, endpoint))

    def connect(self, endpoint: str, identity: bytes) -> ZmqChannel:
        """See `Transport.connect`."""
        socket = self._socket(zmq.DEALER, CONTROL_THREAD, CONTROL_QUEUE_MAX, FRAME_BYTES_MAX)
        socket.setsockopt(zmq.IDENTITY, identity)
        return self._connect(socket, endpoint)

    def bind_channel(self, endpoint: str, max_bytes: int = CHANNEL_BYTES_MAX, key: bytes = b"") -> ZmqChannel:
        """See `Transport.bind_channel`."""
        socket = self._socket(zmq.ROUTER if key else zmq.DEALER, BULK_THREAD, 0, max_bytes)
        if key:
            socket.setsockopt(zmq.RCVHWM, BULK_QUEUE_MAX)
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        return ZmqChannel(*self._bind(socket, endpoint, bulk=True), key)

    def connect_channel(self, endpoint: str, max_bytes: int = CHANNEL_BYTES_MAX, key: bytes = b"") -> ZmqChannel:
        """See `Transport.connect_channel`."""
        socket = self._socket(zmq.DEALER, BULK_THREAD, 0, max_bytes)
        if key:
            socket.setsockopt(zmq.IDENTITY, key)
        return self._connect(socket, endpoint, bulk=True)

    def bind_telemetry(self, endpoint: str) -> ZmqChannel:
        """See `Transport.bind_telemetry`."""
        socket = self._socket(zmq.SUB, CONTROL_THREAD, TELEMETRY_QUEUE_MAX, TELEMETRY_BYTES_MAX)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        return ZmqChannel(*self._bind(socket, endpoint))

    def connect_telemetry(self, endpoint: str) -> ZmqChannel:
        """See `Transport.connect_telemetry`."""
        return self._connect(self._socket(zmq.PUB, CONTROL_THREAD, TELEMETRY_QUEUE_MAX, TELEMETRY_BYTES_MAX), endpoint)

    def fresh_identity(self, name: str) -> bytes:
        """See `Transport.fresh_identity`. The random part also keeps strangers from speaking in a peer's name.

        With a name of up to ten letters, libzmq keeps it inside its message structure (33 bytes).
        """
        return f"{name}:{secrets.token_urlsafe(16)}".encode()[-255:]

    def close(self) -> None:
        """See `Transport.close`."""
        for bridge in self._bridges:
            bridge.close(LINGER_MS)
        self._bridges.clear()
        self._context.destroy(LINGER_MS)  # also a socket whose making a Ctrl-C has interrupted: `term` alone would wait for it for ever

    @trio.lowlevel.enable_ki_protection  # a socket that is made, and not in pyzmq's books yet, would be waited for at the end for ever
    def _socket(self, kind: int, thread: int, queue_max: int, max_bytes: int) -> zmq.Socket[bytes]:
        with contextlib.nullcontext() if self._started or not self._split else bulk_made_nice():
            socket = self._context.socket(kind)
        self._started = True
        if self._split:
            socket.setsockopt(zmq.AFFINITY, thread)
        socket.setsockopt(zmq.SNDHWM, queue_max)
        socket.setsockopt(zmq.RCVHWM, queue_max)
        socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX)
        return socket

    def _bridge(self, socket: zmq.Socket[bytes], on_close: Callable[[], None] | None = None, *, bulk: bool = False) -> Bridge:
        bridge = Bridge(socket, on_close, bulk=bulk, routes=socket.type == zmq.ROUTER)
        self._bridges = [known for known in self._bridges if not known.closed]
        self._bridges.append(bridge)
        return bridge

    def _bind(self, socket: zmq.Socket[bytes], endpoint: str, *, bulk: bool = False) -> tuple[Bridge, str]:
        """Bind, and tell the endpoint that peers connect to."""
        with _usable(socket, "listen at", endpoint):
            check_endpoint(endpoint, self._curve is not None)
            if self._curve is not None and endpoint.startswith("tcp:"):
                socket.setsockopt(zmq.CURVE_SERVER, 1)
                socket.setsockopt(zmq.CURVE_SECRETKEY, self._curve.host_secret)
            if bulk and endpoint.startswith("tcp:"):
                _break_when_mute(socket)
            socket.bind(endpoint)
        bound: bytes = socket.getsockopt(zmq.LAST_ENDPOINT)  # type: ignore[assignment]
        on_close = _guard(Path(endpoint[6:])) if endpoint.startswith("ipc://") else None
        return self._bridge(socket, on_close, bulk=bulk), bound.rstrip(b"\0").decode()

    def _connect(self, socket: zmq.Socket[bytes], endpoint: str, *, bulk: bool = False) -> ZmqChannel:
        with _usable(socket, "connect to", endpoint):
            check_endpoint(endpoint, self._curve is not None)
            if self._curve is not None and endpoint.startswith("tcp:"):
                socket.setsockopt(zmq.CURVE_SERVERKEY, self._curve.host_public)
                socket.setsockopt(zmq.CURVE_PUBLICKEY, self._curve.peer_public)
                socket.setsockopt(zmq.CURVE_SECRETKEY, self._curve.peer_secret)
            if bulk and endpoint.startswith("tcp:"):
                _break_when_mute(socket)
            socket.connect(endpoint)
        return ZmqChannel(self._bridge(socket, bulk=bulk), endpoint)


def _break_when_mute(socket: zmq.Socket[bytes]) -> None:
    """Let a bulk socket break connections over which nothing comes any more, or that do not become ready; it connects anew.

    Both ends ask (libzmq's PING), and see by the *questions* of the other that it is there. Its answers would not do: on a slow link they
    wait behind its page data, for long; so do its questions, but then page data come.
    """
    comes_max = int(socket.getsockopt(zmq.MAXMSGSIZE))
    socket.setsockopt(zmq.HEARTBEAT_IVL, int(PING_S * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(mute_s(comes_max) * 1000))
    socket.setsockopt(zmq.HANDSHAKE_IVL, int(MUTE_S * 1000))


@contextlib.contextmanager
def _usable(socket: zmq.Socket[bytes], deed: str, endpoint: str) -> Iterator[None]:
    """Close a socket that cannot be used after all. Raises HmmnetError."""
    try:
        yield
    except zmq.ZMQError as failure:
        socket.close(0)
        raise HmmnetError(f"cannot {deed} {endpoint}: {failure}") from failure
    except HmmnetError:
        socket.close(0)
        raise


def _guard(path: Path) -> Callable[[], None]:
    """Close a socket's file to others; and what removes it afterwards (libzmq does not), unless another process has bound it anew."""
    path.chmod(0o600)
    inode = path.stat().st_ino

    def remove() -> None:
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == inode:
                path.unlink()

    return remove


def check_endpoint(endpoint: str, encrypted: bool) -> None:
    """Raises HmmnetError for an endpoint that cannot be used, or must not be without encryption."""
    if endpoint.startswith("ipc://"):
        path = os.fsencode(endpoint[6:])
        if not path or len(path) > IPC_PATH_MAX:
            raise HmmnetError(f"{endpoint}: a socket's path has 1 to {IPC_PATH_MAX} bytes, this one {len(path)}; use a shorter directory")
        return
    match = re.fullmatch(r"tcp://(\[[0-9a-fA-F:.]+\]|[^:/\[\]]+):(\d+|\*)", endpoint)
    if match is None:
        raise HmmnetError(f"{endpoint}: no endpoint of this transport; use ipc:///path or tcp://address:port")
    if not (encrypted or is_loopback(match[1].strip("[]"))):
        raise HmmnetError(f"{endpoint}: tcp beyond loopback needs CURVE keys; use 127.0.0.1, or give keys to both sides")


def is_loopback(address: str) -> bool:
    """Whether packets to `address` stay on this machine. A name other than ``localhost`` may mean anything, so it does not count."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
