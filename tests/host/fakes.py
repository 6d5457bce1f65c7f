"""Stand-ins for what the host talks to: a device link that remembers what it was told."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from hmmnet.host.interfaces import Event
from hmmnet.pages import Words


@dataclass
class FakeAcknowledgement:
    """An acknowledgement that comes when `link.gate` opens."""

    link: FakeLink

    async def finish(self) -> None:
        await self.link.gate.wait()
        self.link.finished += 1


@dataclass
class FakeLink:
    """A device that copies nothing and answers at once, unless `hold` was called."""

    name: str
    zone: int
    kind: str = "private"
    told: list[tuple[int, int, int, Event, int, int]] = field(default_factory=list)
    """(subscription, start, end, event, owner, sequence)"""
    finished: int = 0
    freed: list[Words] = field(default_factory=list)
    gate: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def hold(self) -> trio.Event:
        """Answer no invalidation until the returned event is set."""
        self.gate = trio.Event()
        return self.gate

    def invalidate_start(
        self, context: int, subscription: int, start: int, end: int, event: Event, owner: int, sequence: int
    ) -> FakeAcknowledgement:
        self.told.append((subscription, start, end, event, owner, sequence))
        return FakeAcknowledgement(self)

    async def copy_in(self, source_frames: Words, target_frames: Words, zero_frames: Words) -> None:
        await trio.lowlevel.checkpoint()

    async def copy_out(self, context: int, pages: Words, frames: Words, target_frames: Words) -> None:
        await trio.lowlevel.checkpoint()

    def free_frames(self, frames: Words) -> None:
        self.freed.append(frames)
