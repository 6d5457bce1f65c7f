"""A channel between two ends that loses, damages, repeats and reorders what passes through it, from a seed."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import trio


class _Held:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def into(self, view: memoryview) -> int:
        fits = min(len(view), len(self._data))
        view[:fits] = self._data[:fits]
        return len(self._data)

    def take(self) -> bytes:
        return self._data


class FaultyChannel:
    """One end; `loss`, `damage`, `repeat` and `swap` are probabilities for what this end sends."""

    nudge = None

    def __init__(self, seed: int, loss: float = 0.0, damage: float = 0.0, repeat: float = 0.0, swap: float = 0.0) -> None:
        self.endpoint = f"mem://faulty-{seed}"
        self.refused = 0
        self.peer: FaultyChannel = self
        self.sent = 0
        self.faults = 0
        self._random = random.Random(seed)
        self.loss, self._damage, self._repeat, self._swap = loss, damage, repeat, swap
        self._inbox: deque[tuple[bytes, bytes | None]] = deque()
        self._lot = trio.lowlevel.ParkingLot()
        self._closed = False

    def send_nowait(self, header: Any, payload: Any = None) -> None:
        """Send, or do what the dice say."""
        if self._closed:
            raise trio.ClosedResourceError
        self.sent += 1
        data = None if payload is None else bytes(memoryview(payload).cast("B"))
        # five throws each time, so that faults do not depend on how tasks take turns
        lost, damaged, repeated, swapped, where = (self._random.random() for _ in range(5))
        if lost < self.loss:
            self.faults += 1
            return
        if data and damaged < self._damage:
            self.faults += 1
            at = int(where * len(data))
            data = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
        inbox = self.peer._inbox
        inbox.append((bytes(header), data))
        if repeated < self._repeat:
            self.faults += 1
            inbox.append((bytes(header), data))
        if len(inbox) > 1 and swapped < self._swap:
            self.faults += 1
            inbox[-1], inbox[-2] = inbox[-2], inbox[-1]
        self.peer._lot.unpark_all()

    async def send(self, header: Any, payload: Any = None) -> None:
        """As `send_nowait`; there is always room."""
        await trio.lowlevel.checkpoint()
        self.send_nowait(header, payload)

    def missing(self) -> bool:
        """Nobody can tell."""
        return False

    def receive_nowait(self) -> tuple[bytes, _Held | None]:
        """The next message."""
        if not self._inbox:
            raise trio.WouldBlock
        header, data = self._inbox.popleft()
        return header, None if data is None else _Held(data)

    async def receive(self) -> tuple[bytes, _Held | None]:
        """The next message, waiting for it."""
        await trio.lowlevel.checkpoint()
        while not self._inbox:
            if self._closed:
                raise trio.ClosedResourceError
            await self._lot.park()
        return self.receive_nowait()

    def close(self) -> None:
        """Close this end."""
        self._closed = True
        self._lot.unpark_all()

    async def aclose(self) -> None:
        """Close this end."""
        self.close()
        await trio.lowlevel.checkpoint()


def faulty_pair(seed: int, **probabilities: float) -> tuple[FaultyChannel, FaultyChannel]:
    """Both ends of a channel, equally bad in both directions."""
    near, far = FaultyChannel(seed, **probabilities), FaultyChannel(seed + 1, **probabilities)
    near.peer, far.peer = far, near
    return near, far
