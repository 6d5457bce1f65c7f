"""Two sessions, joined by a link that can lose, double and hold back frames."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from hmmnet.wire.session import Session


class Line:
    """One direction between two sessions. `fate` tells how many copies of a frame arrive."""

    def __init__(self) -> None:
        self.fate: Callable[[bytes], int] = lambda _: 1
        self.full = False
        self.sent: list[bytes] = []
        self._give, self._take = trio.open_memory_channel[bytes](100_000)

    def transmit(self, frame: bytes) -> None:
        if self.full:
            raise trio.WouldBlock
        self.sent.append(frame)
        for _ in range(self.fate(frame)):
            self._give.send_nowait(frame)

    async def carry(self, session: Session) -> None:
        async for frame in self._take:
            more = session.deliver(frame)
            if more is not None:
                await more


class World:
    """A device's session and the host's, and the two lines between them."""

    def __init__(self, patience_s: float) -> None:
        self.out, self.home = Line(), Line()
        self.host = Session(self.out.transmit, peer_name="gpu0", role="device", incarnation=1, patience_s=patience_s)
        self.device = Session(self.home.transmit, peer_name="host", role="host", incarnation=1, patience_s=patience_s)


@asynccontextmanager
async def joined(patience_s: float = 0.0) -> AsyncIterator[World]:
    world = World(patience_s)
    async with trio.open_nursery() as nursery:
        world.host.start(nursery)
        world.device.start(nursery)
        nursery.start_soon(world.out.carry, world.device)
        nursery.start_soon(world.home.carry, world.host)
        yield world
        nursery.cancel_scope.cancel()
