"""The far process that `bench.dma` measures against: ``python -m hmmnet.bench.dma_peers KIND DIRECTORY BYTES [RING TOKEN]``.

`KIND` is ``raw`` (blocking pyzmq, DEALER to DEALER over ipc, 1 MiB frames, no copy out, received into memory), ``unix`` (a bare AF_UNIX
stream) or ``ours`` (DMA streams; with a file and its token, through that ring). It reads ``take`` and ``give`` commands, one a line, and
ends with its standard input: for ``take`` it receives all bytes and answers when it has them, for ``give`` it sends them.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator

import numpy as np
import trio
import zmq

from hmmnet.bench.far import quietly
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.dma import BulkReceiver, BulkSender, BytesSink, BytesSource, RingPlace, Rings
from hmmnet.wire.allocator import keep_freed_buffers
from hmmnet.wire.zmq_transport import ZmqTransport

FRAME_BYTES = 1 << 20
QUEUE_FRAMES = 16
"""At each end; more gains nothing."""
KEY = b"bench"
"""Of the bulk channels: real machines have one each."""


def raw_socket(context: zmq.Context[zmq.Socket[bytes]], directory: str, *, bind: bool) -> zmq.Socket[bytes]:
    """One end of the reference."""
    made = context.socket(zmq.DEALER)
    made.setsockopt(zmq.SNDHWM, QUEUE_FRAMES)
    made.setsockopt(zmq.RCVHWM, QUEUE_FRAMES)
    made.setsockopt(zmq.LINGER, 0)
    endpoint = f"ipc://{directory}/raw"
    made.bind(endpoint) if bind else made.connect(endpoint)
    return made


def raw_give(wire: zmq.Socket[bytes], data: memoryview) -> None:
    """Send all of `data`, and wait until the peer has it."""
    for offset in range(0, len(data), FRAME_BYTES):
        wire.send(data[offset : offset + FRAME_BYTES], copy=False)
    wire.recv()


def raw_take(wire: zmq.Socket[bytes], data: memoryview) -> None:
    """Fill `data`, and say so."""
    for offset in range(0, len(data), FRAME_BYTES):
        wire.recv_into(data[offset : offset + FRAME_BYTES])
    wire.send(b"")


def unix_give(wire: socket.socket, data: memoryview) -> None:
    """Send all of `data`, and wait until the peer has it."""
    wire.sendall(data)
    wire.recv(1)


def unix_take(wire: socket.socket, data: memoryview) -> None:
    """Fill `data`, and say so."""
    got = 0
    while got < len(data):
        got += wire.recv_into(data[got:])
    wire.send(b"!")


def memory(nbytes: int) -> memoryview:
    """`nbytes` that are committed and not zero."""
    return memoryview(np.full(nbytes, 0x5A, dtype=np.uint8))  # type: ignore[arg-type]  # numpy's arrays have the buffer protocol


def shared_clock() -> EmulatedClock:
    """A clock that agrees with that of every other process here: emulated time is CLOCK_MONOTONIC."""
    clock = EmulatedClock()
    clock.adopt(0.0, 0.0, 1.0)
    return clock


def _commands() -> Iterator[str]:
    print("ready", flush=True)
    for line in sys.stdin:
        yield line.strip()


def _raw(directory: str, data: memoryview) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=2)
    wire = raw_socket(context, directory, bind=False)
    for command in _commands():
        (raw_take if command == "take" else raw_give)(wire, data)
    context.destroy(linger=0)


def _unix(directory: str, data: memoryview) -> None:
    with socket.socket(socket.AF_UNIX) as wire:
        wire.connect(f"{directory}/unix")
        for command in _commands():
            (unix_take if command == "take" else unix_give)(wire, data)


async def _ours(directory: str, data: memoryview, rings: Rings | None) -> None:
    clock = shared_clock()
    ring_in, ring_out = (None, None) if rings is None else (rings.to_device, rings.to_host)
    with ZmqTransport() as transport:
        receiver = BulkReceiver(transport.connect_channel(f"ipc://{directory}/in", key=KEY), clock, ring=ring_in)
        sender = BulkSender(transport.connect_channel(f"ipc://{directory}/out", key=KEY), clock, ring=ring_out)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receiver.run)
            nursery.start_soon(sender.run)
            print("ready", flush=True)
            stream = 0
            async for line in trio.lowlevel.FdStream(os.dup(0)):
                for command in line.split():
                    stream += 2
                    if command == b"take":
                        await receiver.expect(stream, BytesSink(data)).wait()
                    else:
                        await sender.send(stream, BytesSource(data))
            nursery.cancel_scope.cancel()


def main() -> None:
    """Serve until standard input ends."""
    keep_freed_buffers()  # for the references too: all run under the same conditions
    kind, directory, nbytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    data = memory(nbytes)
    if kind == "ours":
        rings = Rings.opened(RingPlace(sys.argv[4], bytes.fromhex(sys.argv[5]))) if len(sys.argv) > 4 else None
        trio.run(_ours, directory, data, rings)
    elif kind == "raw":
        _raw(directory, data)
    else:
        _unix(directory, data)


if __name__ == "__main__":
    quietly(main)
