"""Frames: what is sent comes back, and nothing that anybody sends does more than raise ProtocolError."""

from __future__ import annotations

import struct
import typing

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hmmnet.errors import ProtocolError
from hmmnet.wire import messages
from hmmnet.wire.codec import (
    FRAME_BYTES_MAX,
    HEADER_BYTES,
    MAGIC,
    SEQUENCED,
    WITH_BODY,
    Kind,
    VersionError,
    decode_body,
    decode_header,
    encode,
)
from hmmnet.wire.messages import NAME_MAX, PAGES_PER_MESSAGE_MAX, PROTOCOL_VERSION, Call, FreeFrames, Hello, Inspect, Message

HEADER = struct.Struct("<2sBBIQQ")
MESSAGE_TYPES = typing.get_args(messages.Body)


def sample(kind: type[Message]) -> Message:
    """Some message of this type, with a value in every field."""
    values: list[object] = []
    for field in msgspec.structs.fields(kind):
        base = field.type
        while typing.get_origin(base) in (typing.Annotated, typing.Union):  # of a union, the first
            base = typing.get_args(base)[0]
        example_of = {int: 7, str: "name", bytes: bytes(16), float: 0.5, bool: True}
        values.append(example_of.get(base, []))
    return kind(*values)


def test_every_message_is_in_the_union() -> None:
    """A message type that is not in `Body` could be sent and never read. Those that tests make up are none of ours."""
    assert set(MESSAGE_TYPES) == {kind for kind in Message.__subclasses__() if kind.__module__ == Message.__module__}


@pytest.mark.parametrize("kind", MESSAGE_TYPES)
def test_every_message_comes_back(kind: type[Message]) -> None:
    """Encode, decode: the same kind, numbers and message."""
    message = sample(kind)
    frame = encode(Kind.REPLY, 5, 4, message, answers=3)
    assert decode_header(frame) == (Kind.REPLY, 3, 5, 4)
    assert decode_body(frame) == message


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_comes_back(kind: Kind) -> None:
    """With a body where one belongs, and a sequence where one belongs."""
    frame = encode(kind, 9 if kind in SEQUENCED else 0, 1, Inspect() if kind in WITH_BODY else None)
    assert decode_header(frame)[0] is kind


GOOD = encode(Kind.REQUEST, 1, 0, Inspect())


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (b"", "shorter than its header"),
        (GOOD[: HEADER_BYTES - 1], "shorter than its header"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "speaks something else"),
        (HEADER.pack(b"XX", PROTOCOL_VERSION, Kind.BEAT, 0, 0, 0), "speaks something else"),
        (HEADER.pack(MAGIC, PROTOCOL_VERSION, 0, 0, 0, 0), "unknown frame kind 0"),
        (HEADER.pack(MAGIC, PROTOCOL_VERSION, 200, 0, 0, 0), "unknown frame kind 200"),
        (GOOD[:HEADER_BYTES], "REQUEST frame without a body"),
        (HEADER.pack(MAGIC, PROTOCOL_VERSION, Kind.BEAT, 0, 0, 0) + b"x", "BEAT frame with a body"),
        (HEADER.pack(MAGIC, PROTOCOL_VERSION, Kind.BYE, 0, 0, 0), "BYE frame with sequence 0"),
        (HEADER.pack(MAGIC, PROTOCOL_VERSION, Kind.BEAT, 0, 1, 0), "BEAT frame with sequence 1"),
        (HEADER.pack(MAGIC, PROTOCOL_VERSION, Kind.BYE, 0, 1 << 63, 0), "sequence"),
        (bytes(HEADER.pack(MAGIC, PROTOCOL_VERSION, Kind.NOTE, 0, 1, 0)) + bytes(FRAME_BYTES_MAX), "over the limit"),
    ],
)
def test_a_header_that_is_not_exactly_right_is_refused(frame: bytes, why: str) -> None:
    """Each with its reason."""
    with pytest.raises(ProtocolError, match=why):
        decode_header(frame)


def test_another_version_is_told_apart() -> None:
    """It is no garbage: the peer should hear which version is spoken here."""
    with pytest.raises(VersionError, match=f"version 99, we speak {PROTOCOL_VERSION}"):
        decode_header(HEADER.pack(MAGIC, 99, Kind.HELLO, 0, 0, 0))


@pytest.mark.parametrize(
    "body",
    [
        b"\xc1",
        msgspec.msgpack.encode(["NoSuchMessage", 1]),
        msgspec.msgpack.encode(["CloseContext"]),
        msgspec.msgpack.encode(["CloseContext", "seven"]),
        msgspec.msgpack.encode(["CloseContext", -1]),
        msgspec.msgpack.encode(["CloseContext", 1 << 63]),
        msgspec.msgpack.encode(["CloseContext", 1])[:-1],
        msgspec.msgpack.encode(["CloseContext", 1]) + b"\x00",
        msgspec.msgpack.encode({"type": "CloseContext", "context": 1}),
        msgspec.msgpack.encode(["FreeFrames", bytes(8 * PAGES_PER_MESSAGE_MAX + 1)]),
        msgspec.msgpack.encode(["Refused", "x" * (NAME_MAX + 1), ""]),
        msgspec.msgpack.encode(["Call", "o", bytes((1 << 20) + 1)]),
        b"\x92\xaaFreeFrames\xc6\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff\xaaFreeFrames",
        b"\x92\xa7Refused\xa2\xff\xfe",
        b"\x92\xa7Inspect" + b"\x91" * 100_000,
    ],
    ids=range(16),
)
def test_a_body_that_is_no_message_is_refused(body: bytes) -> None:
    """Unknown, truncated, mistyped, out of bounds, lengths that lie, depths that would overflow: ProtocolError, and nothing is built."""
    with pytest.raises(ProtocolError, match="cannot be decoded"):
        decode_body(GOOD[:HEADER_BYTES] + body)


def test_our_own_oversized_message_is_our_bug() -> None:
    """Callers split their page lists; a message over the limit never leaves."""
    with pytest.raises(AssertionError):
        encode(Kind.REQUEST, 1, 0, FreeFrames(bytes(FRAME_BYTES_MAX)))


def decode(frame: bytes) -> None:
    try:
        decode_header(frame)
        decode_body(frame)
    except ProtocolError:
        return


@given(st.binary(max_size=400))
@example(b"")
@settings(max_examples=300)
def test_no_bytes_crash_the_codec(frame: bytes) -> None:
    """Whatever comes: a message or ProtocolError."""
    decode(frame)


@given(st.sampled_from(MESSAGE_TYPES), st.sampled_from(Kind), st.data())
@settings(max_examples=300)
def test_no_damage_crashes_the_codec(kind: type[Message], frame_kind: Kind, data: st.DataObject) -> None:
    """A good frame with bytes changed, cut off or put in: a message or ProtocolError."""
    frame = bytearray(encode(frame_kind, 1, 0, sample(kind)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(frame) - 1)))
        frame[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    decode(bytes(frame))


@given(
    st.builds(
        Hello,
        version=st.integers(0, 2**32),
        role=st.text(min_size=1, max_size=16),
        name=st.text(min_size=1, max_size=16),
        incarnation=st.integers(0, 2**63 - 1),
        pid=st.integers(0, 2**31),
        secret=st.binary(max_size=64),
    )
    | st.builds(Call, operation=st.just("read"), arguments=st.binary(max_size=100), data=st.binary(max_size=5000)),
    st.integers(1, 2**63 - 1),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**32 - 1),
)
def test_any_good_frame_comes_back(message: Message, sequence: int, acknowledged: int, answers: int) -> None:
    """Values at the edges of their ranges included."""
    frame = encode(Kind.REQUEST, sequence, acknowledged, message, answers)
    assert decode_header(frame) == (Kind.REQUEST, answers, sequence, acknowledged)
    assert decode_body(frame) == message
