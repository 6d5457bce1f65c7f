"""TCP in IPv4: who talks is read right, and a reset has the numbers and checksums that a kernel wants. Packets are built by hand."""

from __future__ import annotations

import struct

import pytest

from hmmnet.cable.packets import ACK, RST, SYN, checksum, parse, resets

A, B = bytes([10, 77, 0, 1]), bytes([10, 77, 0, 2])


def packet(payload: bytes = b"hello", flags: int = ACK, fragment: int = 0, protocol: int = 6) -> bytes:
    tcp = struct.pack("!HHIIBBHHH", 4000, 5000, 1000, 2000, 5 << 4, flags, 65535, 0, 0) + payload
    return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 7, fragment, 64, protocol, 0, A, B) + tcp


def test_a_segment_is_read() -> None:
    """And what it takes of the sequence space: its bytes, and one for a SYN."""
    segment = parse(packet())
    assert segment is not None
    assert (segment.source, segment.target, segment.source_port, segment.target_port) == (A, B, 4000, 5000)
    assert (segment.sequence, segment.acknowledged, segment.after) == (1000, 2000, 1005)
    opening = parse(packet(b"", SYN))
    assert opening is not None
    assert opening.after == 1001


@pytest.mark.parametrize("other", [b"", b"\x60" + bytes(60), packet()[:30], packet(protocol=17), packet(fragment=100)])
def test_what_is_no_segment_is_none(other: bytes) -> None:
    """Nothing, IPv6, a packet that is cut short, UDP, a fragment: nothing is read behind the end of a packet."""
    assert parse(other) is None


def test_resets_fit_both_sides() -> None:
    """The first goes back to who sent, with the number that he waits for; the second on, with the number that the other side waits for."""
    segment = parse(packet())
    assert segment is not None
    back, on = (parse(made) for made in resets(segment))
    assert back is not None
    assert on is not None
    assert (back.source, back.target, back.source_port, back.target_port, back.sequence) == (B, A, 5000, 4000, 2000)
    assert (on.source, on.target, on.source_port, on.target_port, on.sequence) == (A, B, 4000, 5000, 1000)
    assert back.flags & RST
    assert on.flags & RST


def test_checksums_are_right() -> None:
    """Over what they protect, with them in it, the sum is 0; and the example of RFC 1071, section 3."""
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xFFFF - 0xDDF2
    segment = parse(packet())
    assert segment is not None
    for made in resets(segment):
        assert checksum(made[:20]) == 0
        assert checksum(made[12:20] + struct.pack("!BBH", 0, 6, len(made) - 20) + made[20:]) == 0
