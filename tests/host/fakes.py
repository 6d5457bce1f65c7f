"""Stand-ins for what the host talks to: a device link that remembers what it was told and keeps its pages in a dictionary."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np
import trio

from hmmnet.host.devmem import PageMap
from hmmnet.host.homing import Homing
from hmmnet.host.hub import Hub
from hmmnet.host.interfaces import Destination, DeviceLink, Event, Select
from hmmnet.host.iommu import Domain
from hmmnet.host.migrate import Grant, Outcome, migrate_to_device
from hmmnet.host.mm.frames import PhysicalMemory
from hmmnet.host.mm.space import Space
from hmmnet.host.personality import TODAY, Personality
from hmmnet.observe.counters import Profile
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, ZONE_SHIFT, Words, page_by_page

ZONE = 64
FIRST_FRAME = ZONE << ZONE_SHIFT
DEVICE_PAGES = 1024
HOST_PAGES = 4096

Step = Callable[[], Awaitable[None]]


async def nothing() -> None:
    """A step at which nothing goes wrong."""
    await trio.lowlevel.checkpoint()


@dataclass
class FakeAcknowledgement:
    """An acknowledgement that comes when `link.gate` opens."""

    link: FakeLink

    async def finish(self) -> None:
        await self.link.gate.wait()
        self.link.finished += 1


@dataclass
class FakeLink:
    """A device whose memory is `held`, frame by frame. `during_copy` runs in the middle of every copy and may raise."""

    name: str
    zone: int
    kind: str = "private"
    node: int = 0
    memory: PhysicalMemory | None = None
    during_copy: Step = nothing
    told: list[tuple[int, int, int, Event, int, int]] = field(default_factory=list)
    """(subscription, start, end, event, owner, sequence)"""
    finished: int = 0
    freed: list[int] = field(default_factory=list)
    held: dict[int, bytes] = field(default_factory=dict)
    dropped: list[tuple[int, list[int]]] = field(default_factory=list)
    """(context, pages) of each copy out."""
    apart: list[int] = field(default_factory=list)
    """What `answers_apart` was asked for."""
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
        assert self.memory is not None
        await self.during_copy()
        for source, target in zip(page_by_page(source_frames).tolist(), page_by_page(target_frames).tolist(), strict=True):
            self.held[target] = self.memory.read_small(source, 0, PAGE_SIZE)
        self.held |= dict.fromkeys(page_by_page(zero_frames).tolist(), bytes(PAGE_SIZE))

    async def copy_out(self, context: int, pages: Words, frames: Words, destination: Destination) -> None:
        assert self.memory is not None
        self.dropped.append((context, page_by_page(pages).tolist()))
        targets = page_by_page(destination.frames())
        await self.during_copy()
        for frame, target in zip(page_by_page(frames).tolist(), targets.tolist(), strict=True):
            self.memory.write_small(target, 0, self.held[frame])

    async def fetch(self, context: int, page: int, frame: int, allocate: Callable[[], int]) -> None:
        assert self.memory is not None
        self.dropped.append((context, [page]))
        target = allocate()
        await self.during_copy()
        self.memory.write_small(target, 0, self.held[frame])

    async def answers_apart(self, node: int, answers: int) -> None:
        self.apart.append(answers)

    def no_large(self, context: int) -> bool:
        return False

    def free_frames(self, frames: Words) -> None:
        for frame in page_by_page(frames).tolist():
            self.free_frame(frame)

    def free_frame(self, frame: int) -> None:
        self.held.pop(frame, None)
        self.freed.append(frame)


class Bench:
    """Host memory, one private device behind a `FakeLink`, and processes with their hubs; no sessions, no sockets."""

    def __init__(self, host_pages: int = HOST_PAGES, personality: Personality = TODAY) -> None:
        self.personality = personality
        self.memory = personality.memory()
        self.memory.add_node("host", host_pages)
        self.link = FakeLink("gpu0", ZONE, memory=self.memory)
        self.page_map = PageMap(self.memory, self.link, DEVICE_PAGES)
        self.links: dict[int, DeviceLink] = {ZONE: self.link}
        self.spaces: dict[int, Space] = {}
        self.profile = Profile()
        self.homing = Homing(self.memory, self.links, self.spaces, lambda process, zone: process, self.profile, lambda: 0.0)
        self.domain = Domain("gpu0", 1, ZONE)
        self.frame_next = FIRST_FRAME

    def space(self, number: int = 1) -> Space:
        self.spaces[number] = Space(number, self.memory, self.new_hub(), self.homing.migrate_to_ram)
        return self.spaces[number]

    def new_hub(self) -> Hub:
        return Hub(order=self.personality.order(self.memory))

    def hub(self, space: Space) -> Hub:
        assert isinstance(space.hub, Hub)
        return space.hub

    def grant(self, pages: int, frames: Words | None = None) -> Grant:
        if frames is None:
            frames = words(*range(self.frame_next, self.frame_next + pages))
            self.frame_next += pages
        return Grant(self.page_map.zone, frames)

    async def to_device(
        self,
        space: Space,
        address: int,
        pages: int,
        grant: Grant | None = None,
        announce: Callable[[Outcome], Awaitable[None]] | None = None,
    ) -> Outcome:
        """Migrate, and return what the driver was told."""
        told: list[Outcome] = []

        async def tell(outcome: Outcome, finalize: Callable[[], None]) -> None:
            told.append(outcome)
            if announce is not None:
                await announce(outcome)
            finalize()

        await migrate_to_device(
            space, self.spaces, self.link, [self.domain], address >> PAGE_SHIFT, Select.SYSTEM, grant or self.grant(pages), tell
        )
        return told[0]

    def lose(self, cause: str) -> None:
        """The device is gone, as the service would do it."""
        del self.links[ZONE]
        self.page_map.lose(cause)

    def host_pages_used(self) -> int:
        return sum(node.allocator.used_count for node in self.memory.nodes)


def words(*values: int) -> Words:
    return np.array(values, dtype=np.uint64)
