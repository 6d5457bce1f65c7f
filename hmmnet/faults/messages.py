"""Faults of messages between the host and its devices.

A session repeats what was lost and takes what came twice once; a DMA stream asks again for chunks that are missing or damaged. So none of
these may lose data or hang; too much of them for too long costs the device its session, as a dead cable does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from random import Random
from typing import Literal

from hmmnet.errors import WrongUse
from hmmnet.pages import PAGE_SHIFT

from .controls import Controls

Channel = Literal["control", "bulk", "any"]
Parts = tuple[bytes, ...]
Delivery = tuple[float, Parts]
"""Seconds from now, and what arrives then."""

HOST = "host"
_WAY = re.compile(r"\s*(?P<a>[^\s<>-]+(?:-[^\s<>-]+)*)\s*(?P<arrow><->|->|<-)\s*(?P<b>[^\s<>-]+(?:-[^\s<>-]+)*)\s*")


def is_way(text: str) -> bool:
    """Whether `text` is meant as a way (`Way.parse`), not as a name."""
    return "<" in text or ">" in text


@dataclass(frozen=True)
class Way:
    """Which messages: those between the host and devices whose names match, in one direction or both, on one kind of channel or any."""

    device: str = "*"
    to_device: bool = True
    to_host: bool = True
    channel: Channel = "any"

    @classmethod
    def parse(cls, text: str, channel: Channel = "any") -> Way:
        """``gpu0<->host``, ``host->gpu*``, ``gpu1->host``. Raises HmmnetError."""
        found = _WAY.fullmatch(text)
        ends = (found["a"], found["b"]) if found else ("", "")
        if found is None or HOST not in ends or ends[0] == ends[1]:
            raise WrongUse(f'"{text}" is no way; write DEVICE<->host, DEVICE->host or host->DEVICE, where DEVICE may have * and ?')
        device = ends[1] if ends[0] == HOST else ends[0]
        towards_b = found["arrow"] in {"->", "<->"}
        towards_a = found["arrow"] in {"<-", "<->"}
        to_device, to_host = (towards_b, towards_a) if ends[0] == HOST else (towards_a, towards_b)
        return cls(device, to_device, to_host, channel)

    @property
    def text(self) -> str:
        """What `parse` reads as this way, whatever the channel."""
        arrow = "<->" if self.to_device and self.to_host else "->" if self.to_host else "<-"
        return f"{self.device}{arrow}{HOST}"

    def matches(self, device: str, channel: Channel, *, to_device: bool) -> bool:
        """Whether messages of `device` on `channel` in this direction are meant."""
        direction = self.to_device if to_device else self.to_host
        return direction and self.channel in {"any", channel} and fnmatchcase(device, self.device)

    def __str__(self) -> str:
        return self.text + ("" if self.channel == "any" else f" ({self.channel})")


@dataclass(frozen=True)
class MessageFault:
    """One fault: `kind` is a name in `FAULTS`. `latency_s` and `jitter_s` are of ``delay`` and ``reorder`` (1 ms by itself).

    `message`, if it is not empty, is the type of the control messages that are meant, or of frames without one (``BEAT``, ``BYE`` ...).
    `shape` is of ``corrupt``: one ``bit``, a ``burst`` of bytes, or halves that ``swap`` places.
    `process` (0: any) and addresses [`start`, `end`) (empty: any) are of ``Invalidate``, the one message that tells them.
    """

    kind: str
    way: Way = field(default_factory=Way)
    controls: Controls = field(default_factory=Controls)
    latency_s: float = 0.0
    jitter_s: float = 0.0
    message: str = ""
    shape: str = "bit"
    process: int = 0
    start: int = 0
    end: int = 0

    def __post_init__(self) -> None:
        if self.kind not in FAULTS:
            raise WrongUse(f'no fault of messages is called "{self.kind}"; there are {", ".join(FAULTS)}')
        if self.latency_s < 0 or self.jitter_s < 0:
            raise WrongUse(f"latency {self.latency_s:g} s and jitter {self.jitter_s:g} s cannot be negative")
        if self.shape not in SHAPES:
            raise WrongUse(f'data are not damaged in the shape "{self.shape}"; there are {", ".join(SHAPES)}')
        if self.message and self.way.channel == "bulk":
            raise WrongUse("chunks on the bulk channel have no message types")
        if self.narrowed and self.message != TELLING:
            raise WrongUse(f"of messages only {TELLING} tells a process and addresses")
        if self.kind == "corrupt" and self.way.channel != "bulk":
            raise WrongUse(
                '"corrupt" is for the bulk channel, where chunks have checksums; control messages travel over checked transports'
            )

    def narrowed_as(self, process: int, start: int, end: int) -> MessageFault:
        """The same for those only, if its messages tell them; else itself."""
        return replace(self, process=process, start=start, end=end) if self.message == TELLING else self

    @property
    def narrowed(self) -> bool:
        """Whether it concerns only some of the messages of its type."""
        return bool(self.process or self.end > self.start)

    def touches(self, process: int, start: int, end: int) -> bool:
        """Whether pages [`start`, `end`) of `process` are meant."""
        here = self.end <= self.start or (start << PAGE_SHIFT < self.end and self.start < end << PAGE_SHIFT)
        return here and self.process in (0, process)

    def apply(self, deliveries: list[Delivery], random: Random) -> list[Delivery]:
        """What becomes of one message, or of what other faults have made of it."""
        if self.kind in {"loss", "partition", "hold"}:
            return []
        if self.kind == "duplicate":
            return deliveries + deliveries
        if self.kind in _CHANGES:
            return [(late_s, _changed(parts, self, random)) for late_s, parts in deliveries]
        extra_s = self.late_s + (random.random() * self.jitter_s if self.jitter_s else 0.0)
        return [(late_s + extra_s, parts) for late_s, parts in deliveries]

    @property
    def late_s(self) -> float:
        """How late ``delay`` and ``reorder`` have a message, before jitter."""
        return self.latency_s or (0.0 if self.jitter_s else LATE_S)


LATE_S = 0.001
"""Where nothing is said of how late."""
TELLING = "Invalidate"
"""The type of the messages that tell whose memory they concern, and which; chunks are of frames, and answers tell nothing."""
FAULTS = {
    "loss": "the message is gone",
    "delay": "it arrives later, and everything behind it too",
    "reorder": "it arrives later, and what is behind it first",
    "duplicate": "it arrives twice",
    "corrupt": "its data are damaged",
    "truncate": "its end is cut off",
    "garbage": "it is random bytes",
    "old_version": "it says that it is of another version of the protocol",
    "partition": "nothing passes until it is mended",
    "hold": "nothing passes until it is mended; then all of it arrives, in its order",
}
"""The faults of messages by name."""
SHAPES = ("bit", "burst", "swap")
BURST_BYTES_MAX = 64
VERSION_BYTE = 2
"""Where a session's frame says its version (`hmmnet.wire.codec`)."""
_CHANGES = frozenset({"corrupt", "truncate", "garbage", "old_version"})


def _changed(parts: Parts, fault: MessageFault, random: Random) -> Parts:
    """Something is done to the longest part."""
    longest = max(range(len(parts)), key=lambda i: len(parts[i]))
    raw = bytearray(parts[longest])
    if not raw:
        return parts
    if fault.kind == "truncate":
        del raw[random.randrange(len(raw)) :]
    elif fault.kind == "garbage":
        raw[:] = random.randbytes(len(raw))
    elif fault.kind == "old_version":
        raw[VERSION_BYTE : VERSION_BYTE + 1] = b"\0"
    else:
        _damage(raw, fault.shape, random)
    return (*parts[:longest], bytes(raw), *parts[longest + 1 :])


def _damage(raw: bytearray, shape: str, random: Random) -> None:
    at = random.randrange(len(raw))
    if shape == "bit":
        raw[at] ^= 1 << random.randrange(8)
    elif shape == "burst":
        end = min(len(raw), at + random.randrange(1, BURST_BYTES_MAX))
        raw[at:end] = bytes(byte ^ 0xFF for byte in raw[at:end])
    else:
        half = len(raw) // 2
        raw[: 2 * half] = raw[half : 2 * half] + raw[:half]
