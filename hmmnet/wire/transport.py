"""What the rest of hmmnet knows of a wire: channels to one peer, listeners for many, and the transport that makes them.

Two transports fill these interfaces: `ZmqTransport` between processes, `MemoryTransport` inside one (simulation, tests). Sessions and DMA
streams are written against this file and run over either.

What a transport promises: messages arrive whole, unchanged, in the order of their sending, at most once. What it does *not* promise
is that they arrive: ZeroMQ drops what is in flight when a connection breaks. Sessions and streams repeat what is not acknowledged.

Endpoints are ``ipc:///path``, ``tcp://127.0.0.1:*`` (a free port is chosen) and ``mem://name``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal, NoReturn, Protocol, TypeAlias, get_args, runtime_checkable

import numpy.typing as npt

from .messages import MESSAGE_BYTES_MAX

Buffer: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[Any]
"""What can be sent: contiguous, items of one byte."""

Kind: TypeAlias = Literal["ring", "ipc", "tcp"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What the processes of a machine can talk over: Unix sockets, with page data in shared memory beside them (`ring`) or not, or loopback."""

FRAME_BYTES_MAX = MESSAGE_BYTES_MAX + 64
"""A message and its frame's header. Longer ones end the connection before anything is allocated for them."""
AWAY_S = 5.0
"""Real seconds that a bulk channel's peer may be without a connection: more than a lease, and ten attempts of it to connect anew.

What waits for it longer ends."""
CHANNEL_BYTES_MAX = (1 << 20) + 4096
"""A bulk chunk (1 MiB) and its header: the limit of a bulk channel's part unless told otherwise."""
ANSWER_BYTES_MAX = 4096
"""The limit where chunks are sent, and credits and aborts come back."""
PING_S = 1.0
"""Real seconds between two questions of either end of a bulk connection over tcp, by which the other knows that it is there."""
MUTE_S = 5.0
"""Real seconds without any frame (a question is one) after which such a connection has broken, though both ends see it open: something
between them, a relay or a NAT, forwards nothing any more. A peer that is stopped for less than its lease is silent for less."""
SLOW_BYTES_PER_S = 1e5
"""What may come has so much longer as it takes over a link that is as slow: a chunk, which holds questions up, 10 s."""


def mute_s(max_bytes: int) -> float:
    """Real seconds without any frame after which a bulk connection over which parts of `max_bytes` come has broken."""
    return MUTE_S + max_bytes / SLOW_BYTES_PER_S


class Payload(Protocol):
    """The second part of a message, still in the transport. Take it before the next `receive`, once; else it is dropped."""

    def into(self, view: memoryview) -> int:
        """Land in `view`; returns the full length. When that is more than ``len(view)``, the rest is lost."""
        ...

    def take(self) -> bytes:
        """As a bytes object, bounded by the channel's limit."""
        ...


class Channel(Protocol):
    """An ordered pipe to one peer; both ends alike."""

    endpoint: str
    """As the peer should connect to it (for tcp with the port that was chosen)."""

    @property
    def refused(self) -> int:
        """Messages dropped because they had more than two parts, or came from somebody else than the peer."""
        ...

    async def send(self, header: Buffer, payload: Buffer | None = None) -> None:
        """Queue a message of one or two parts, waiting while the queue is full.

        A payload of 64 KiB or more is not copied: it must not change until the peer has said that it has it (a DMA pin).
        Raises `trio.BrokenResourceError` when there has been no peer for so long that nobody should wait for one.
        """
        ...

    def send_nowait(self, header: Buffer, payload: Buffer | None = None) -> None:
        """As `send`; raises `trio.WouldBlock` when the queue is full."""
        ...

    def missing(self) -> bool:
        """Whether it is certain that nobody is at the other end at this moment. It may ask by an empty message, which is not received.

        It raises nothing. Of a channel that was closed here it says what it likes: whoever receives there hears of that at once.
        """
        ...

    async def receive(self) -> tuple[bytes, Payload | None]:
        """The next message. No checkpoint stands between its receipt and the return, so its payload can be taken at once."""
        ...

    def receive_nowait(self) -> tuple[bytes, Payload | None]:
        """As `receive`; raises `trio.WouldBlock` when there is no message."""
        ...

    @property
    def nudge(self) -> Callable[[], None] | None:
        """Makes the task that waits in `receive`, or the next one that would, raise `trio.WouldBlock` instead. None: one task reads."""
        ...

    def close(self) -> None:
        """Close this end. Without promise for what is queued: say BYE first where it matters."""
        ...

    async def aclose(self) -> None:
        """As `close`, with a checkpoint."""
        ...


class Listener(Protocol):
    """One endpoint for many peers, told apart by their addresses."""

    endpoint: str
    """As peers should connect to it."""

    async def receive(self) -> tuple[bytes, bytes]:
        """The next frame: the peer's address, and the frame. A message that is not one frame comes as an empty frame."""
        ...

    def receive_nowait(self) -> tuple[bytes, bytes]:
        """As `receive`; raises `trio.WouldBlock` when there is no frame."""
        ...

    @property
    def nudge(self) -> Callable[[], None] | None:
        """Makes the task that waits in `receive`, or the next one that would, raise `trio.WouldBlock` instead. None: one task reads."""
        ...

    async def send(self, peer: bytes, frame: Buffer) -> None:
        """Queue a frame for `peer`, waiting while its queue is full or it is not connected."""
        ...

    def send_nowait(self, peer: bytes, frame: Buffer) -> None:
        """As `send`; raises `trio.WouldBlock` instead of waiting."""
        ...

    async def aclose(self) -> None:
        """Close the endpoint."""
        ...


@runtime_checkable
class HandsOn(Protocol):
    """A channel or listener which one task reads, and which calls that with what comes: for less than one `receive` after another."""

    def hand_on(self, take: Callable[..., Awaitable[None] | None]) -> Awaitable[NoReturn]:
        """Call `take` with each frame (of a listener: with the peer's address and the frame); what it returns is awaited before the next.

        A message that is not one frame comes as an empty frame. Raises `trio.ClosedResourceError` once this end is closed.
        """
        ...


class Transport(Protocol):
    """Makes channels and listeners. Use it as a context manager, or `close` it."""

    def listen(self, endpoint: str) -> Listener:
        """Control: take frames from many peers."""
        ...

    def connect(self, endpoint: str, identity: bytes) -> Channel:
        """Control: a channel to a listener, which knows us by `identity` (1 to 255 bytes, not beginning with a zero byte)."""
        ...

    def bind_channel(self, endpoint: str, max_bytes: int = CHANNEL_BYTES_MAX, key: bytes = b"") -> Channel:
        """Bulk: this end of a channel for exactly one peer: the one that has the `key` (as `fresh_identity` makes them); empty: anybody.

        Longer parts than `max_bytes` do not come. The end that sends chunks says `ANSWER_BYTES_MAX`: it sees sooner that nobody is there.
        """
        ...

    def connect_channel(self, endpoint: str, max_bytes: int = CHANNEL_BYTES_MAX, key: bytes = b"") -> Channel:
        """Bulk: the other end."""
        ...

    def bind_telemetry(self, endpoint: str) -> Channel:
        """Telemetry: takes from many, receives only."""
        ...

    def connect_telemetry(self, endpoint: str) -> Channel:
        """Telemetry: sends only, never waits, and loses what the receiver is too slow for."""
        ...

    def fresh_identity(self, name: str) -> bytes:
        """An identity for `connect`, or a channel's key, that no other has and nobody can guess."""
        ...

    def close(self) -> None:
        """Close everything that this transport made and is still open."""
        ...
