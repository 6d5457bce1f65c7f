"""The processes that `bench.wire` measures: each runs one kind of wire, at one end, as the only thing in its process.

``python -m hmmnet.bench.wire_peers KIND SIDE DIRECTORY``; `KIND` is ``raw`` (blocking pyzmq), ``asyncio`` (zmq.asyncio), ``bridge`` (ours)
or ``session`` (ours, with its requests and bulk channels). The *near* side reads commands from its standard input, one a line, and
answers each with one number on its standard output; the *far* side serves. Both end when their standard input does.

Commands: ``rtt N`` (seconds for one round trip of 100 bytes, mean of N), ``stream N`` (seconds for N frames of 1 MiB, received into one
buffer and confirmed), and for sessions ``p50 N`` (as ``rtt``, the median of N) and ``bulk 0|1`` (start or stop a stream beside the control
traffic).
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from statistics import fmean, median
from typing import Any

import trio
import zmq
import zmq.asyncio

from hmmnet.bench.far import quietly
from hmmnet.wire.bridge import Bridge
from hmmnet.wire.client import connect
from hmmnet.wire.messages import PROTOCOL_VERSION, Hello, Inspect, Report, Welcome
from hmmnet.wire.server import Server
from hmmnet.wire.session import Session
from hmmnet.wire.transport import Channel
from hmmnet.wire.zmq_transport import ZmqTransport

FRAME_BYTES = 1 << 20
SMALL = bytes(100)
WINDOW_FRAMES = 8
"""Frames queued at each end: the high-water mark of all three kinds."""
IO_THREADS = 2
SECRET = b"bench"


def _socket(context: Any, far: bool, directory: str) -> Any:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, WINDOW_FRAMES)
    socket.setsockopt(zmq.RCVHWM, WINDOW_FRAMES)
    socket.setsockopt(zmq.LINGER, 0)
    endpoint = f"ipc://{directory}/socket"
    if far:
        socket.bind(endpoint)
    else:
        socket.connect(endpoint)
    return socket


def _commands() -> Any:
    """Commands from the measuring process; ends with it."""
    for line in sys.stdin:
        command, count = line.split()
        yield command, int(count)


def _answer(seconds: float) -> None:
    sys.stdout.write(f"{seconds!r}\n")
    sys.stdout.flush()


# --- raw: blocking pyzmq ----------------------------------------------------------------------------------------------------------------


def raw_far(directory: str) -> None:
    """Echo single parts; swallow frames that are announced, then confirm."""
    socket = _socket(zmq.Context(IO_THREADS), True, directory)
    landing = memoryview(bytearray(FRAME_BYTES))
    while True:
        message = socket.recv()
        if len(message) == 8:
            for _ in range(int.from_bytes(message, "little")):
                socket.recv_into(landing)
        socket.send(message)


def raw_near(directory: str) -> None:
    """Measure as told."""
    socket = _socket(zmq.Context(IO_THREADS), False, directory)
    payload = bytearray(FRAME_BYTES)
    for command, count in _commands():
        begun_s = time.perf_counter()
        if command == "rtt":
            for _ in range(count):
                socket.send(SMALL)
                socket.recv()
            _answer((time.perf_counter() - begun_s) / count)
        else:
            socket.send(count.to_bytes(8, "little"))
            for _ in range(count):
                socket.send(payload, copy=False)
            socket.recv()
            _answer(time.perf_counter() - begun_s)


# --- asyncio ----------------------------------------------------------------------------------------------------------------------------


async def asyncio_far(directory: str) -> None:
    """As `raw_far`."""
    socket = _socket(zmq.asyncio.Context(IO_THREADS), True, directory)
    landing = memoryview(bytearray(FRAME_BYTES))
    while True:
        message = await socket.recv()
        if len(message) == 8:
            for _ in range(int.from_bytes(message, "little")):
                frame = await socket.recv(copy=False)
                landing[:] = frame.buffer  # it has no recv_into
        await socket.send(message)


async def asyncio_near(directory: str) -> None:
    """As `raw_near`."""
    socket = _socket(zmq.asyncio.Context(IO_THREADS), False, directory)
    payload = bytearray(FRAME_BYTES)
    for command, count in _commands():
        begun_s = time.perf_counter()
        if command == "rtt":
            for _ in range(count):
                await socket.send(SMALL)
                await socket.recv()
            _answer((time.perf_counter() - begun_s) / count)
        else:
            await socket.send(count.to_bytes(8, "little"))
            for _ in range(count):
                await socket.send(payload, copy=False)
            await socket.recv()
            _answer(time.perf_counter() - begun_s)


# --- bridge -----------------------------------------------------------------------------------------------------------------------------


async def bridge_far(directory: str) -> None:
    """As `raw_far`. The landing is `take_into`, so frames come as the second of two parts, the first of which is empty."""
    bridge = Bridge(_socket(zmq.Context(IO_THREADS), True, directory))
    landing = memoryview(bytearray(FRAME_BYTES))
    while True:
        message = await bridge.recv_first()
        if len(message) == 8:
            for _ in range(int.from_bytes(message, "little")):
                await bridge.recv_first()
                bridge.take_into(landing)
        await bridge.send((message,))


async def bridge_near(directory: str) -> None:
    """As `raw_near`."""
    bridge = Bridge(_socket(zmq.Context(IO_THREADS), False, directory))
    payload = bytearray(FRAME_BYTES)
    for command, count in _commands():
        begun_s = time.perf_counter()
        if command == "rtt":
            for _ in range(count):
                await bridge.send((SMALL,))
                await bridge.recv_first()
            _answer((time.perf_counter() - begun_s) / count)
        else:
            await bridge.send((count.to_bytes(8, "little"),))
            for _ in range(count):
                await bridge.send((b"", payload), copy=False)
            await bridge.recv_first()
            _answer(time.perf_counter() - begun_s)


# --- session, with bulk beside it ---------------------------------------------------------------------------------------------------------


async def session_far(directory: str) -> None:
    """A host: answers `Inspect`, and swallows what comes on the bulk channel, with a credit for each frame."""
    with ZmqTransport() as transport:
        welcome = Welcome(PROTOCOL_VERSION, 1, 0, [], "", "", b"", "", 0.0, 0.0, 1.0, 2.0, b"")

        def joined(session: Session, _: Hello) -> None:
            session.on(Inspect, lambda _: Report(SMALL))

        server = Server(transport.listen(f"ipc://{directory}/control"), SECRET, lambda _: welcome, joined, lease_s=60.0)
        bulk = transport.bind_channel(f"ipc://{directory}/bulk", key=SECRET)
        landing = memoryview(bytearray(FRAME_BYTES))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            while True:
                _, payload = await bulk.receive()
                if payload is not None:
                    payload.into(landing)
                    await bulk.send(b"credit")


async def session_near(directory: str) -> None:
    """A device: asks, alone or beside a stream with `WINDOW_FRAMES` frames under way."""
    hello = Hello(PROTOCOL_VERSION, "client", "bench", 1, os.getpid(), SECRET)
    with ZmqTransport() as transport:
        bulk = transport.connect_channel(f"ipc://{directory}/bulk", key=SECRET)
        async with connect(transport, f"ipc://{directory}/control", hello, lease_s=60.0) as (session, _), trio.open_nursery() as nursery:
            scope = trio.CancelScope()
            for command, count in _commands():
                if command == "bulk":
                    scope.cancel()
                    if count:
                        scope = trio.CancelScope()
                        nursery.start_soon(_pump, bulk, scope)
                    _answer(0.0)
                    continue
                _answer((median if command == "p50" else fmean)([await _round_trip(session) for _ in range(count)]))
            nursery.cancel_scope.cancel()


async def _round_trip(session: Session) -> float:
    """Seconds for a request and its answer."""
    begun_s = time.perf_counter()
    await session.request(Inspect())
    return time.perf_counter() - begun_s


async def _pump(bulk: Channel, scope: trio.CancelScope) -> None:
    """Stream until cancelled; then take the credits that are under way."""
    payload = bytearray(FRAME_BYTES)
    under_way = 0
    with scope:
        while True:
            while under_way < WINDOW_FRAMES:
                await bulk.send(b"chunk", payload)
                under_way += 1
            await bulk.receive()
            under_way -= 1
    with trio.CancelScope(shield=True):
        for _ in range(under_way):
            await bulk.receive()


def _end_with_parent() -> None:
    """The far side has nothing to read; its standard input ends when the measuring process does."""
    sys.stdin.read()
    os._exit(0)


def main(kind: str, side: str, directory: str) -> None:
    """Run one end."""
    if side == "far":
        threading.Thread(target=_end_with_parent, daemon=True).start()
    blocking: dict[str, Callable[[str], None]] = {"raw_far": raw_far, "raw_near": raw_near}
    under_asyncio: dict[str, Callable[[str], Awaitable[None]]] = {"asyncio_far": asyncio_far, "asyncio_near": asyncio_near}
    under_trio: dict[str, Callable[[str], Awaitable[None]]] = {
        "bridge_far": bridge_far,
        "bridge_near": bridge_near,
        "session_far": session_far,
        "session_near": session_near,
    }
    role = f"{kind}_{side}"
    if role in blocking:
        blocking[role](directory)
    elif role in under_asyncio:
        asyncio.run(under_asyncio[role](directory))  # type: ignore[arg-type]
    else:
        trio.run(under_trio[role], directory)
    os._exit(0)  # contexts of the references need no ceremony


if __name__ == "__main__":
    quietly(lambda: main(*sys.argv[1:]))
