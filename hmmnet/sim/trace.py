"""The event trace of a simulated machine: every message that is sent, in order, with its virtual time.

A line is the time, the way, and what it is; bytes in a message are shown by their number and a checksum. The trace of a run *is* these
lines: `digest` is their SHA-256, so two runs are the same if and only if their digests are. Telemetry is no part of it (samples of
this process), and of Hello and Welcome only who and where (the rest tells about this process, too).
"""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import msgspec
import trio

from hmmnet.errors import ProtocolError
from hmmnet.faults.injector import Fired
from hmmnet.wire.codec import decode_body, decode_header
from hmmnet.wire.memory_transport import Parts
from hmmnet.wire.messages import Hello, Message, Welcome

SHORT_BYTES = 16
"""Up to this many bytes of a field are shown as they are."""


class Trace:
    """Hashes what it is told; with `keep` the lines can be read, too."""

    def __init__(self, *, keep: bool = False) -> None:
        self.lines: list[str] = []
        self.count = 0
        """Lines so far."""
        self.messages = 0
        self._hash = hashlib.sha256()
        self._keep = keep
        self._due: dict[int, trio.Event] = {}

    @property
    def digest(self) -> str:
        """SHA-256 of all lines so far."""
        return self._hash.hexdigest()

    def sent(self, now_s: float, way: str, parts: Parts) -> None:
        """A message was sent."""
        self.add(now_s, f"{way} {_described(parts)}")
        self.messages += 1
        due = self._due.pop(self.messages, None)
        if due is not None:
            due.set()

    async def reached(self, number: int) -> None:
        """Return when message `number` is sent."""
        if self.messages < number:
            await self._due.setdefault(number, trio.Event()).wait()

    def fired(self, fired: Fired) -> None:
        """A fault happened at a protocol point."""
        self.add(fired.at_s, fired.line)

    def add(self, now_s: float, what: str) -> None:
        """Something happened that is worth a line."""
        line = f"{now_s:.9f} {what}"
        self.count += 1
        self._hash.update(line.encode())
        self._hash.update(b"\n")
        if self._keep:
            self.lines.append(line)


def _described(parts: Parts) -> str:
    """A frame of a session by its message; anything else, such as a chunk of a DMA stream, by its bytes."""
    who = f"{parts[0].decode(errors='replace')} " if len(parts) > 1 and len(parts[0]) < len(parts[1]) and parts[1][:2] == b"HM" else ""
    frame = parts[1] if who else parts[0]
    try:
        kind, answers, sequence, acknowledged = decode_header(frame)
    except ProtocolError:
        return " ".join(_bytes(part) for part in parts)
    head = f"{who}{kind.name} {sequence}/{acknowledged}" + (f" re {answers}" if answers else "")
    try:
        return f"{head} {_message(decode_body(frame))}"
    except ProtocolError:
        return head


def _message(message: Message) -> str:
    name = type(message).__name__
    if isinstance(message, Hello):
        return f"{name} {message.role} {message.name} {message.incarnation}"
    if isinstance(message, Welcome):
        return f"{name} zone {message.zone}"
    fields = (f"{key}={_value(value)}" for key, value in msgspec.structs.asdict(message).items())
    return " ".join((name, *fields))


def _value(value: Any) -> str:
    return _bytes(value) if isinstance(value, bytes) else repr(value)


def _bytes(raw: bytes) -> str:
    return raw.hex() or "-" if len(raw) <= SHORT_BYTES else f"{len(raw)}B:{zlib.crc32(raw):08x}"
