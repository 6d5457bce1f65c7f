"""The small messages of a DMA stream, as fixed structs: chunk headers one way, credits and aborts the other. Pure.

What a peer sends is checked here for form, and against the stream it names in `stream`. A message that is malformed, or does not match
the checksum at its end, is a ProtocolError.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import NamedTuple

from hmmnet.errors import ProtocolError

CHUNK_BYTES = 1 << 20
"""1 MiB: below, ZeroMQ's cost for a message shows; above, nothing is gained."""
STREAM_BYTES_MAX = 1 << 40
MISSING_MAX = 64
"""Chunks that one credit can ask for again; further ones are asked for by the next."""
REASON_MAX = 512

_CHUNK = struct.Struct("<4sIQQIIQI")
_CREDIT = struct.Struct("<4sIQIId")
_ABORT = struct.Struct("<4sIQ")
_START = struct.Struct("<d")
_SEAL = struct.Struct("<I")
HEADER_BYTES = _CHUNK.size + _SEAL.size
"""Of a chunk."""
ANNOUNCED_MAX = 4
"""Chunks that one message announces, each with a header of its own. A message wakes three threads in turn, which costs as much as copying a
quarter of a chunk; of more than four that is not worth their delay."""
_CHUNK_MAGIC, _CREDIT_MAGIC, _ABORT_MAGIC = b"HMc3", b"HMk1", b"HMa1"
UNCHECKED = 1
"""Flag of a chunk: it carries no checksum."""
PROBE = 2
"""Flag of a chunk: its sender has heard nothing for a while and wants to be told everything."""
IN_RING = 4
"""Flag of a chunk: its bytes are no part of the message; they lie in a slot of shared memory."""
BEGINS = 1
"""Flag of a credit: it says when the stream begins."""


class Chunk(NamedTuple):
    """Header of chunk `sequence` of `stream`: bytes ``[sequence * stride, ... + length)`` of `total`.

    A `probe` is to be answered in any case; one without data and slot is no more than a question. With a `slot` its bytes lie there in the
    ring, and it has no payload.
    """

    stream: int
    total: int
    sequence: int
    stride: int
    checksum: int | None
    probe: bool = False
    slot: int | None = None

    @property
    def offset(self) -> int:
        """Where its bytes begin."""
        return self.sequence * self.stride

    @property
    def length(self) -> int:
        """How many bytes it has."""
        return min(self.stride, self.total - self.offset)


class Credit(NamedTuple):
    """Chunks below `landed` have landed, verified; those in `missing` are wanted again. `bytes_per_s` is the pace from here on (0: as
    before). `start_s` is when the stream begins, or has begun, if that is another moment than its grant said.
    """

    stream: int
    landed: int
    missing: tuple[int, ...]
    bytes_per_s: float
    start_s: float | None = None


class Abort(NamedTuple):
    """The sender of this message has given the stream up."""

    stream: int
    reason: str


def pack_chunk(chunk: Chunk) -> bytes:
    """The header as bytes."""
    stream, total, sequence, stride, checksum, probe, slot = chunk
    flags = (UNCHECKED if checksum is None else 0) | (PROBE if probe else 0) | (0 if slot is None else IN_RING)
    return _sealed(_CHUNK.pack(_CHUNK_MAGIC, flags, stream, total, sequence, stride, checksum or 0, slot or 0))


def pack_credit(credit: Credit) -> bytes:
    """The credit as bytes."""
    missing = credit.missing[:MISSING_MAX]
    flags = 0 if credit.start_s is None else BEGINS
    head = _CREDIT.pack(_CREDIT_MAGIC, len(missing), credit.stream, credit.landed, flags, credit.bytes_per_s)
    if credit.start_s is not None:
        head += _START.pack(credit.start_s)
    return _sealed(head + struct.pack(f"<{len(missing)}I", *missing) if missing else head)


def pack_abort(abort: Abort) -> bytes:
    """The abort as bytes."""
    reason = abort.reason.encode()[:REASON_MAX]
    return _sealed(_ABORT.pack(_ABORT_MAGIC, len(reason), abort.stream) + reason)


def split_forward(raw: bytes) -> list[bytes]:
    """The headers in a message that travels with the data: several chunks that lie in the ring may be announced together."""
    if len(raw) <= HEADER_BYTES or raw[:4] != _CHUNK_MAGIC:
        return [raw]
    if len(raw) > ANNOUNCED_MAX * HEADER_BYTES:
        return [raw[: HEADER_BYTES + 1]]  # which is no header
    return [raw[begin : begin + HEADER_BYTES] for begin in range(0, len(raw), HEADER_BYTES)]


def unpack_forward(header: bytes) -> Chunk | Abort:
    """What travels with the data. Raises ProtocolError."""
    header = _opened(header)
    if header[:4] != _CHUNK_MAGIC:
        return _unpack_abort(header)
    if len(header) != _CHUNK.size:
        raise ProtocolError(f"chunk header of {len(header)} bytes, not {_CHUNK.size}")
    _, flags, stream, total, sequence, stride, checksum, slot = _CHUNK.unpack(header)
    if not (0 < total <= STREAM_BYTES_MAX and 0 < stride <= CHUNK_BYTES and sequence * stride < total):
        raise ProtocolError(f"chunk {sequence} of {stride} bytes is no part of a stream of {total} bytes")
    if flags & ~(UNCHECKED | PROBE | IN_RING) or (slot and not flags & IN_RING):
        raise ProtocolError(f"chunk with unknown flags {flags:#x}, or a slot in no ring")
    where = slot if flags & IN_RING else None
    return Chunk(stream, total, sequence, stride, None if flags & UNCHECKED else checksum, flags & PROBE != 0, where)


def unpack_back(header: bytes) -> Credit | Abort:
    """What travels against the data. Raises ProtocolError."""
    header = _opened(header)
    if header[:4] != _CREDIT_MAGIC:
        return _unpack_abort(header)
    if len(header) < _CREDIT.size:
        raise ProtocolError(f"credit of {len(header)} bytes, shorter than {_CREDIT.size}")
    _, count, stream, landed, flags, bytes_per_s = _CREDIT.unpack_from(header)
    head_bytes = _CREDIT.size + (_START.size if flags & BEGINS else 0)
    if flags & ~BEGINS or count > MISSING_MAX or len(header) != head_bytes + 4 * count or not bytes_per_s >= 0:
        raise ProtocolError(f"malformed credit for stream {stream}")
    start_s = None
    if flags & BEGINS:
        (start_s,) = _START.unpack_from(header, _CREDIT.size)
        if not math.isfinite(start_s):
            raise ProtocolError(f"a credit has stream {stream} begin at {start_s} s")
    return Credit(stream, landed, struct.unpack_from(f"<{count}I", header, head_bytes), bytes_per_s, start_s)


def _sealed(raw: bytes) -> bytes:
    """With a checksum behind: a damaged pace would have its sender wait for ever."""
    return raw + _SEAL.pack(zlib.crc32(raw))


def _opened(raw: bytes) -> bytes:
    body = raw[: -_SEAL.size]
    if len(raw) < _SEAL.size or _SEAL.unpack_from(raw, len(body))[0] != zlib.crc32(body):
        raise ProtocolError(f"a message of {len(raw)} bytes on a bulk channel that does not match its checksum")
    return body


def _unpack_abort(header: bytes) -> Abort:
    if header[:4] != _ABORT_MAGIC or len(header) < _ABORT.size:
        raise ProtocolError(f"a message that begins with {bytes(header[:4])!r} has no place on a bulk channel")
    _, length, stream = _ABORT.unpack_from(header)
    if length > REASON_MAX or len(header) != _ABORT.size + length:
        raise ProtocolError(f"malformed abort of stream {stream}")
    return Abort(stream, header[_ABORT.size :].decode(errors="replace"))
