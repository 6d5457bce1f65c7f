"""Frames of a session: a fixed header and at most one message. Pure, and strict: what is not exactly right is a ProtocolError.

Header, 24 bytes, little endian::

    magic "HM" | version u8 | kind u8 | answers u32 | sequence u64 | acknowledged u64

`sequence` counts the frames of one direction that must arrive (requests, replies, notes, BYE) from 1; frames that need not have 0.
`acknowledged` is the highest sequence that the sender has received, all before it included. `answers` tells a reply's request: the low 32
bits of that frame's sequence. The body is a message of `messages.Body` as msgpack; it ends where the frame ends.

Bounds are checked before anything is built: the transport refuses frames above `FRAME_BYTES_MAX`, msgspec every field above its own limit.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum

import msgspec

from hmmnet.errors import ProtocolError

from .messages import MESSAGE_BYTES_MAX, PROTOCOL_VERSION, Body, Message

MAGIC = b"HM"
_HEADER = struct.Struct("<2sBBIQQ")
HEADER_BYTES = _HEADER.size
FRAME_BYTES_MAX = HEADER_BYTES + MESSAGE_BYTES_MAX
SEQUENCE_MAX = (1 << 63) - 1
ANSWERS_MASK = (1 << 32) - 1
"""A reply names its request by 32 bits of the sequence: far more than can be outstanding."""

COPIED_BYTES_MAX = 2048
"""Up to this length it costs less to copy a frame's body out of it than to make a view of it."""


class Kind(IntEnum):
    """What a frame is to the session."""

    HELLO = 1
    """A peer introduces itself; body `Hello`."""
    WELCOME = 2
    """The answer: body `Welcome`, or `Refused` (to any frame of a stranger that makes no sense, too)."""
    REQUEST = 3
    REPLY = 4
    NOTE = 5
    BEAT = 6
    """A sign of life, and an acknowledgement when nothing else carries it."""
    GAP = 7
    """Something before what just arrived is missing: repeat from `acknowledged` on, without waiting for your timer."""
    BYE = 8
    BYE_ACK = 9
    RESET = 10
    """There is no session for the frame you sent: it is over, or this is another incarnation of the host."""


WITH_BODY = frozenset({Kind.HELLO, Kind.WELCOME, Kind.REQUEST, Kind.REPLY, Kind.NOTE})
SEQUENCED = frozenset({Kind.REQUEST, Kind.REPLY, Kind.NOTE, Kind.BYE})
_KINDS: tuple[Kind | None, ...] = tuple(Kind(code) if code in set(Kind) else None for code in range(256))
_WITH_BODY = tuple(code in WITH_BODY for code in range(256))
_SEQUENCED = tuple(code in SEQUENCED for code in range(256))

_encode = msgspec.msgpack.Encoder().encode
_decode: Callable[[bytes | memoryview], Message] = msgspec.msgpack.Decoder(Body).decode


class VersionError(ProtocolError):
    """The peer speaks another version of the protocol."""


def encode(kind: Kind, sequence: int, acknowledged: int, message: Message | None = None, answers: int = 0) -> bytes:
    """One frame. A message over the limit is our own bug (AssertionError): callers split their page lists."""
    if message is None:
        return _HEADER.pack(MAGIC, PROTOCOL_VERSION, kind, answers, sequence, acknowledged)
    frame = _HEADER.pack(MAGIC, PROTOCOL_VERSION, kind, answers, sequence, acknowledged) + _encode(message)
    assert len(frame) <= FRAME_BYTES_MAX, f"{type(message).__name__} of {len(frame)} bytes is over the limit of {FRAME_BYTES_MAX}"
    return frame


def decode_header(frame: bytes | memoryview) -> tuple[Kind, int, int, int]:
    """``(kind, answers, sequence, acknowledged)`` of a frame. Raises ProtocolError, VersionError."""
    length = len(frame)
    if length < HEADER_BYTES:
        raise ProtocolError(f"frame of {length} bytes is shorter than its header of {HEADER_BYTES}")
    magic, version, code, answers, sequence, acknowledged = _HEADER.unpack_from(frame)
    if magic != MAGIC:
        raise ProtocolError(f"frame begins with {bytes(magic)!r}, not {MAGIC!r}: the peer speaks something else")
    if version != PROTOCOL_VERSION:
        raise VersionError(f"peer speaks protocol version {version}, we speak {PROTOCOL_VERSION}: install the same hmmnet on both sides")
    if length > FRAME_BYTES_MAX:
        raise ProtocolError(f"frame of {length} bytes is over the limit of {FRAME_BYTES_MAX}")
    kind = _KINDS[code]
    if kind is None:
        raise ProtocolError(f"unknown frame kind {code}")
    if _WITH_BODY[code] != (length > HEADER_BYTES):
        raise ProtocolError(f"{kind.name} frame {'without' if _WITH_BODY[code] else 'with'} a body")
    if _SEQUENCED[code] != (sequence > 0) or sequence > SEQUENCE_MAX:
        raise ProtocolError(f"{kind.name} frame with sequence {sequence}")
    return kind, answers, sequence, acknowledged


def decode_body(frame: bytes | memoryview) -> Message:
    """The message in a frame whose header was accepted. Raises ProtocolError for unknown, truncated or out-of-bounds messages."""
    body = frame[HEADER_BYTES:] if len(frame) <= COPIED_BYTES_MAX else memoryview(frame)[HEADER_BYTES:]
    try:
        return _decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"message cannot be decoded: {error}") from None
