"""Where a host's wires to its devices lead through a `Network`, so that faults of messages can be had on real processes.

The host's end of each wire is the one place that sees all of a device's messages, both ways, whatever the transport; a device needs to know
nothing. While no fault is there (`Network.idle`) a message passes untouched and uncopied.

What a network delivers later, towards the host, is put in line here, and whoever waits for a message is nudged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress

import trio

from hmmnet.wire.transport import Buffer, Channel, Listener, Payload

from .messages import Parts
from .network import Network


class Taken:
    """Data that are in memory: a `Payload`."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def into(self, view: memoryview) -> int:
        """See `Payload.into`."""
        part = min(len(self._data), len(view))
        view[:part] = self._data[:part]
        return len(self._data)

    def take(self) -> bytes:
        """See `Payload.take`."""
        return self._data


def _put(send: Callable[..., None], *parts: bytes) -> None:
    """What is late arrives, if there is still something that it can arrive at: else it is lost."""
    with suppress(trio.WouldBlock, trio.ClosedResourceError):
        send(*parts)


class TappedListener:
    """The host's control endpoint; an address begins with the device's name (`Transport.fresh_identity`)."""

    def __init__(self, inner: Listener, network: Network) -> None:
        self.endpoint = inner.endpoint
        self._inner = inner
        self._network = network
        self._ready: deque[tuple[bytes, bytes]] = deque()
        self._waits = False
        """Somebody does, in the transport."""

    async def receive(self) -> tuple[bytes, bytes]:
        """See `Listener.receive`."""
        while True:
            if self._ready:
                return self._ready.popleft()
            self._waits = True
            try:
                address, frame = await self._inner.receive()
            except trio.WouldBlock:
                if not self._ready:
                    raise  # somebody else's nudge
                continue
            finally:
                self._waits = False
            if self._network.idle or self._passes(address, frame):
                return address, frame

    def receive_nowait(self) -> tuple[bytes, bytes]:
        """See `Listener.receive_nowait`."""
        while True:
            if self._ready:
                return self._ready.popleft()
            address, frame = self._inner.receive_nowait()
            if self._passes(address, frame):
                return address, frame

    def _passes(self, address: bytes, frame: bytes) -> bool:
        """Whether a frame is there at once, as it came; else the network has it."""
        if self._network.idle:
            return True

        def arrive(parts: Parts) -> None:
            self._ready.append((address, parts[0]))
            if self._waits and self._inner.nudge is not None:
                self._inner.nudge()

        self._network.sent(_device_of(address), "control", (frame,), arrive, to_device=False)
        return False

    @property
    def nudge(self) -> Callable[[], None] | None:
        """See `Listener.nudge`."""
        return self._inner.nudge

    async def send(self, peer: bytes, frame: Buffer) -> None:
        """See `Listener.send`."""
        if self._network.idle:
            await self._inner.send(peer, frame)
        else:
            await trio.lowlevel.checkpoint()
            self.send_nowait(peer, frame)

    def send_nowait(self, peer: bytes, frame: Buffer) -> None:
        """See `Listener.send_nowait`."""
        if self._network.idle:
            self._inner.send_nowait(peer, frame)
            return

        def arrive(parts: Parts) -> None:
            _put(self._inner.send_nowait, peer, *parts)

        self._network.sent(_device_of(peer), "control", (bytes(frame),), arrive, to_device=True)

    async def aclose(self) -> None:
        """See `Listener.aclose`."""
        await self._inner.aclose()


class TappedChannel:
    """The host's end of a bulk channel of `device`."""

    def __init__(self, inner: Channel, device: str, network: Network) -> None:
        self.endpoint = inner.endpoint
        self._inner = inner
        self._device = device
        self._network = network
        self._ready: deque[Parts] = deque()
        self._waits = False

    @property
    def refused(self) -> int:
        """See `Channel.refused`."""
        return self._inner.refused

    async def send(self, header: Buffer, payload: Buffer | None = None) -> None:
        """See `Channel.send`."""
        if self._network.idle:
            await self._inner.send(header, payload)
        else:
            await trio.lowlevel.checkpoint()
            self.send_nowait(header, payload)

    def send_nowait(self, header: Buffer, payload: Buffer | None = None) -> None:
        """See `Channel.send_nowait`."""
        if self._network.idle:
            self._inner.send_nowait(header, payload)
            return

        def arrive(parts: Parts) -> None:
            _put(self._inner.send_nowait, *parts)

        parts = (bytes(header),) if payload is None else (bytes(header), bytes(payload))
        self._network.sent(self._device, "bulk", parts, arrive, to_device=True)

    def missing(self) -> bool:
        """See `Channel.missing`. What faults do on the way is no sign of it."""
        return self._inner.missing()

    async def receive(self) -> tuple[bytes, Payload | None]:
        """See `Channel.receive`."""
        while True:
            if self._ready:
                return self._next()
            self._waits = True
            try:
                header, payload = await self._inner.receive()
            except trio.WouldBlock:
                continue
            finally:
                self._waits = False
            if self._passes(header, payload):
                return header, payload

    def receive_nowait(self) -> tuple[bytes, Payload | None]:
        """See `Channel.receive_nowait`."""
        while True:
            if self._ready:
                return self._next()
            header, payload = self._inner.receive_nowait()
            if self._passes(header, payload):
                return header, payload

    def _next(self) -> tuple[bytes, Payload | None]:
        header, *rest = self._ready.popleft()
        return header, Taken(rest[0]) if rest else None

    def _passes(self, header: bytes, payload: Payload | None) -> bool:
        """Whether a message is there at once, as it came; else the network has it."""
        if self._network.idle:
            return True
        parts = (header,) if payload is None else (header, payload.take())
        self._network.sent(self._device, "bulk", parts, self._arrive, to_device=False)
        return False

    def _arrive(self, parts: Parts) -> None:
        self._ready.append(parts)
        if self._waits and self._inner.nudge is not None:
            self._inner.nudge()

    @property
    def nudge(self) -> Callable[[], None] | None:
        """None: its nudges are its own."""
        return None

    def close(self) -> None:
        """See `Channel.close`."""
        self._inner.close()

    async def aclose(self) -> None:
        """See `Channel.aclose`."""
        await self._inner.aclose()


def _device_of(address: bytes) -> str:
    return address.rpartition(b":")[0].decode(errors="replace")
