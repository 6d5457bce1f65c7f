"""Stream headers survive the wire, and nothing malformed gets past them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmmnet.errors import ProtocolError
from hmmnet.fabric.chunk import (
    ANNOUNCED_MAX,
    CHUNK_BYTES,
    HEADER_BYTES,
    Abort,
    Chunk,
    Credit,
    pack_abort,
    pack_chunk,
    pack_credit,
    split_forward,
    unpack_back,
    unpack_forward,
)  # fmt: skip


@settings(deadline=None)
@given(st.integers(1, 1 << 40), st.integers(1, CHUNK_BYTES), st.integers(0, (1 << 64) - 1) | st.none(), st.booleans())
def test_chunks_survive(total: int, stride: int, checksum: int | None, probe: bool) -> None:
    """The last chunk of any stream comes back as it was, with what is left as its length."""
    sequence = min((total - 1) // stride, 2**32 - 1)
    chunk = Chunk(7, total, sequence, stride, checksum, probe)
    assert unpack_forward(pack_chunk(chunk)) == chunk
    assert 0 < chunk.length <= stride
    assert chunk.offset + chunk.length <= total


def test_credits_and_aborts_survive() -> None:
    """So do the messages of the other direction, and aborts of both."""
    for credit in (Credit(9, 3, (4, 7), 2.5e9), Credit(9, 3, (4, 7), 2.5e9, -8.25), Credit(9, 3, (), 0.0, 0.0)):
        assert unpack_back(pack_credit(credit)) == credit
    abort = Abort(9, "the device is gone")
    assert unpack_back(pack_abort(abort)) == abort
    assert unpack_forward(pack_abort(abort)) == abort


@pytest.mark.parametrize("start_s", [math.nan, math.inf])
def test_a_stream_begins_at_some_moment(start_s: float) -> None:
    """Its sender would wait for ever."""
    with pytest.raises(ProtocolError, match="has stream 9 begin at"):
        unpack_back(pack_credit(Credit(9, 3, (4, 7), 2.5e9, start_s)))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_refused(header: bytes) -> None:
    """Any bytes are a message or a ProtocolError."""
    for unpack in (unpack_forward, unpack_back):
        try:
            unpack(header)
        except ProtocolError:
            continue


def test_chunks_are_announced_together() -> None:
    """A few headers in one message come apart again; more than may be are no header at all, and neither is half of one."""
    headers = [pack_chunk(Chunk(7, 10 * CHUNK_BYTES, sequence, CHUNK_BYTES, 0, slot=sequence)) for sequence in range(ANNOUNCED_MAX + 1)]
    assert {len(header) for header in headers} == {HEADER_BYTES}
    assert split_forward(headers[0]) == headers[:1]
    assert split_forward(b"".join(headers[:ANNOUNCED_MAX])) == headers[:ANNOUNCED_MAX]
    for wrong in (b"".join(headers), headers[0][:-1]):
        (only,) = split_forward(wrong)
        with pytest.raises(ProtocolError):
            unpack_forward(only)
    whole, half = split_forward(headers[0] + headers[1][:-1])
    assert whole == headers[0]
    with pytest.raises(ProtocolError):
        unpack_forward(half)
    abort = pack_abort(Abort(9, "a reason that is longer than any header of a chunk, by far, and stays in one piece"))
    assert split_forward(abort) == [abort]


@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(1, 0, 0, 1, 0),
        Chunk(1, 1 << 41, 0, 1, 0),
        Chunk(1, 10, 0, CHUNK_BYTES + 1, 0),
        Chunk(1, 10, 10, 1, 0),
    ],
)
def test_impossible_chunks_are_refused(chunk: Chunk) -> None:
    """Empty, oversized and out-of-range chunks."""
    with pytest.raises(ProtocolError):
        unpack_forward(pack_chunk(chunk))
