"""IPv4 packets with TCP in them (RFC 791, RFC 9293), as far as it takes to reset a connection from outside: who talks, and a RST."""

from __future__ import annotations

import struct
from dataclasses import dataclass

TCP = 6
FIN, SYN, RST, ACK = 1, 2, 4, 16
_IP = struct.Struct("!BBHHHBBH4s4s")
_TCP = struct.Struct("!HHIIBBHHH")
_TTL = 64
_WORDS_OF_TCP = 5 << 4


@dataclass(frozen=True)
class Segment:
    """A TCP segment: who, and where in the connection. `after` is the sequence number behind it."""

    source: bytes
    target: bytes
    source_port: int
    target_port: int
    sequence: int
    acknowledged: int
    flags: int
    after: int


def parse(packet: bytes) -> Segment | None:
    """The TCP segment in an IPv4 packet; None for anything else, and for fragments behind the first."""
    if len(packet) < _IP.size or packet[0] >> 4 != 4:
        return None
    _, _, length, _, fragment, _, protocol, _, source, target = _IP.unpack_from(packet)
    header = (packet[0] & 15) * 4
    if protocol != TCP or fragment & 0x1FFF or len(packet) < header + _TCP.size:
        return None
    source_port, target_port, sequence, acknowledged, words, flags, _, _, _ = _TCP.unpack_from(packet, header)
    payload = length - header - (words >> 4) * 4
    after = (sequence + max(payload, 0) + bool(flags & (SYN | FIN))) & 0xFFFFFFFF
    return Segment(source, target, source_port, target_port, sequence, acknowledged, flags, after)


def resets(segment: Segment) -> tuple[bytes, bytes]:
    """Two packets that end the segment's connection: the first for the side that sent it, the second for the side that it was sent to."""
    back = _reset(segment.target, segment.source, segment.target_port, segment.source_port, segment.acknowledged, segment.after)
    on = _reset(segment.source, segment.target, segment.source_port, segment.target_port, segment.sequence, segment.acknowledged)
    return back, on


def _reset(source: bytes, target: bytes, source_port: int, target_port: int, sequence: int, acknowledged: int) -> bytes:
    bare = _TCP.pack(source_port, target_port, sequence, acknowledged, _WORDS_OF_TCP, RST | ACK, 0, 0, 0)
    pseudo = source + target + struct.pack("!BBH", 0, TCP, len(bare))
    tcp = bare[:16] + struct.pack("!H", checksum(pseudo + bare)) + bare[18:]
    head = _IP.pack(0x45, 0, _IP.size + len(tcp), 0, 0, _TTL, TCP, 0, source, target)
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + tcp


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
