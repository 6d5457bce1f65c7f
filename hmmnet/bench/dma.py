"""Figures of the fabric: DMA streams beside raw pyzmq and a bare AF_UNIX stream, and how exactly a pace is kept.

The far end of each kind is a process of its own; all live at the same time and take turns, round by round. All move the same bytes
between the same kinds of memory, and each counts from the first byte to the moment when the far end is known to have the last. Streams
carry checksums. All processes keep freed buffers, as every process of hmmnet does (`wire.allocator`).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from statistics import median

import trio
import zmq

from hmmnet.fabric.chunk import CHUNK_BYTES
from hmmnet.fabric.dma import BulkReceiver, BulkSender, BytesSink, BytesSource, Pace, Rings
from hmmnet.launcher.scratch import scratch
from hmmnet.wire.allocator import keep_freed_buffers
from hmmnet.wire.zmq_transport import ZmqTransport

from .dma_peers import KEY, memory, raw_give, raw_socket, raw_take, shared_clock, unix_give, unix_take
from .far import Far
from .measurement import Goal, Measurement, measured, median_ratio

STREAM_BYTES = 256 << 20
ROUNDS = 7
DMA = Goal(0.85, at_least=True)
EXACT = Goal(1.0, at_least=False, of="value")
PACED_BYTES_PER_S = {"throttle.50": 50e6, "throttle.200": 200e6, "throttle.500": 500e6}
PACED_S = 0.5
PACED_ROUNDS = 3


def dma_peer(kind: str, directory: str, nbytes: int, *ring: str) -> Far:
    """A far process; `take` and `give` are commands to it. `ring` is where it finds one: path and token."""
    return Far("hmmnet.bench.dma_peers", kind, directory, str(nbytes), *ring)


class Reference:
    """A raw stream in both directions: `to_far` and `to_near` move all bytes and return the seconds that took."""

    def __init__(self, far: Far, data: memoryview, give: Callable[[memoryview], None], take: Callable[[memoryview], None]) -> None:
        self._far = far
        self._data = data
        self._give = give
        self._take = take

    def to_far(self) -> float:
        """Near to far."""
        self._far.tell("take")
        began_s = time.perf_counter()
        self._give(self._data)
        return time.perf_counter() - began_s

    def to_near(self) -> float:
        """Far to near."""
        self._far.tell("give")
        began_s = time.perf_counter()
        self._take(self._data)
        return time.perf_counter() - began_s


@contextmanager
def raw_reference(nbytes: int = STREAM_BYTES) -> Iterator[Reference]:
    """Raw blocking pyzmq over ipc, with a process of its own at the far end: what DMA streams and whole migrations are compared with."""
    keep_freed_buffers()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=2)
    with scratch() as directory:
        wire = raw_socket(context, directory, bind=True)
        far = dma_peer("raw", directory, nbytes)
        try:
            far.answer()
            yield Reference(far, memory(nbytes), lambda data: raw_give(wire, data), lambda data: raw_take(wire, data))
        finally:
            far.close()
            context.destroy(linger=0)


@contextmanager
def unix_reference(nbytes: int = STREAM_BYTES) -> Iterator[Reference]:
    """A bare AF_UNIX stream."""
    with scratch() as directory, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{directory}/unix")
        listener.listen(1)
        far = dma_peer("unix", directory, nbytes)
        wire, _ = listener.accept()
        try:
            far.answer()
            yield Reference(far, memory(nbytes), lambda data: unix_give(wire, data), lambda data: unix_take(wire, data))
        finally:
            far.close()
            wire.close()


class Streams:
    """DMA streams in both directions, to and from a process of its own: through shared memory if `ring`, else as messages only."""

    def __init__(self, transport: ZmqTransport, directory: str, nbytes: int, *, ring: bool) -> None:
        self._rings = rings = Rings.made("bench") if ring else None
        clock = shared_clock()
        ring_out, ring_in = (None, None) if rings is None else (rings.to_device, rings.to_host)
        self._sender = BulkSender(transport.bind_channel(f"ipc://{directory}/in", key=KEY), clock, ring=ring_out)
        self._receiver = BulkReceiver(transport.bind_channel(f"ipc://{directory}/out", key=KEY), clock, ring=ring_in)
        place = () if rings is None else (rings.place.path, rings.place.token.hex())
        self._far = dma_peer("ours", directory, nbytes, *place)
        self._data = memory(nbytes)
        self._stream = 0

    async def running(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Serve until cancelled; started once the far process is ready."""
        self._far.answer()
        if self._rings is not None:
            self._rings.shut()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sender.run)
            nursery.start_soon(self._receiver.run)
            task_status.started()

    async def to_far(self) -> float:
        """Near to far; the seconds that took."""
        self._stream += 2
        self._far.tell("take")
        began_s = time.perf_counter()
        await self._sender.send(self._stream, BytesSource(self._data))
        return time.perf_counter() - began_s

    async def to_near(self) -> float:
        """Far to near."""
        self._stream += 2
        self._far.tell("give")
        began_s = time.perf_counter()
        await self._receiver.expect(self._stream, BytesSink(self._data)).wait()
        return time.perf_counter() - began_s

    def close(self) -> None:
        """End the far process."""
        self._far.close()
        if self._rings is not None:
            self._rings.close()


@contextmanager
def streams(nbytes: int, *, ring: bool) -> Iterator[Streams]:
    """Both ends, until the block is left; `Streams.running` must run."""
    with (
        scratch() as directory,
        ZmqTransport() as transport,
        closing(Streams(transport, directory, nbytes, ring=ring)) as made,
    ):
        yield made


def measure_dma(rounds: int = ROUNDS, nbytes: int = STREAM_BYTES) -> list[Measurement]:
    """``dma.to_device`` and ``dma.to_host`` beside raw pyzmq, as processes of one computer stream: through shared memory.

    ``dma.messages_*`` are the same streams as messages alone, as over tcp; ``dma.vs_unix_*`` the former beside a bare AF_UNIX stream.
    """
    return trio.run(_measure_dma, rounds, nbytes)


async def _measure_dma(rounds: int, nbytes: int) -> list[Measurement]:
    taken: dict[str, list[float]] = {}
    with (
        raw_reference(nbytes) as raw,
        unix_reference(nbytes) as unix,
        streams(nbytes, ring=True) as ring,
        streams(nbytes, ring=False) as plain,
    ):
        async with trio.open_nursery() as nursery:
            for ours in (ring, plain):
                await nursery.start(ours.running)
            for lap in range(rounds + 1):
                figures: dict[str, float] = {}
                for reference, name in ((raw, "raw"), (unix, "unix")):
                    figures[f"{name} out"], figures[f"{name} in"] = reference.to_far(), reference.to_near()
                for ours, name in ((ring, "ring"), (plain, "messages")):
                    figures[f"{name} out"], figures[f"{name} in"] = await ours.to_far(), await ours.to_near()
                if lap:  # the first lap touches memory for the first time
                    for name, seconds in figures.items():
                        taken.setdefault(name, []).append(seconds)
            nursery.cancel_scope.cancel()
    return [
        _stream_figure("dma.to_device", taken["ring out"], taken["raw out"], nbytes, DMA),
        _stream_figure("dma.to_host", taken["ring in"], taken["raw in"], nbytes, DMA),
        _stream_figure("dma.messages_to_device", taken["messages out"], taken["raw out"], nbytes, DMA),
        _stream_figure("dma.messages_to_host", taken["messages in"], taken["raw in"], nbytes, DMA),
        _stream_figure("dma.vs_unix_to_device", taken["ring out"], taken["unix out"], nbytes, None),
        _stream_figure("dma.vs_unix_to_host", taken["ring in"], taken["unix in"], nbytes, None),
    ]


def _stream_figure(name: str, ours: list[float], reference: list[float], nbytes: int, goal: Goal | None) -> Measurement:
    rate, their_rate = nbytes / median(ours) / 1e9, nbytes / median(reference) / 1e9
    return measured(name, rate, "GB/s", goal, their_rate, median_ratio(reference, ours))


def measure_throttle(seconds: float = PACED_S) -> list[Measurement]:
    """``throttle.*``: the error in percent of a stream to another process, paced for so long by absolute deadlines, in 1 MiB chunks.

    The median of `PACED_ROUNDS`, the paces taking turns.
    """
    errors: dict[str, list[float]] = {name: [] for name in PACED_BYTES_PER_S}
    for _ in range(PACED_ROUNDS):
        for name, rate in PACED_BYTES_PER_S.items():
            errors[name].append(trio.run(_pace_error, rate, seconds))
    return [measured(name, median(some), "% error", EXACT, PACED_BYTES_PER_S[name] / 1e6) for name, some in errors.items()]


async def _pace_error(bytes_per_s: float, seconds: float) -> float:
    nbytes = max(int(bytes_per_s * seconds) // CHUNK_BYTES, 1) * CHUNK_BYTES
    data, clock = memory(nbytes), shared_clock()
    with scratch() as directory, ZmqTransport() as transport:
        sender = BulkSender(transport.bind_channel(f"ipc://{directory}/in", key=KEY), clock)
        with closing(dma_peer("ours", directory, nbytes)) as far:
            far.answer()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sender.run)
                far.tell("take")
                began_s = time.perf_counter()
                await sender.send(2, BytesSource(data), Pace(clock.now(), bytes_per_s, 0.0))
                took_s = time.perf_counter() - began_s
                nursery.cancel_scope.cancel()
    return abs(nbytes / bytes_per_s / took_s - 1) * 100


BENCHMARKS = {
    "dma.to_device": measure_dma,
    "dma.to_host": measure_dma,
    "dma.messages_to_device": measure_dma,
    "dma.messages_to_host": measure_dma,
    "dma.vs_unix_to_device": measure_dma,
    "dma.vs_unix_to_host": measure_dma,
    **dict.fromkeys(PACED_BYTES_PER_S, measure_throttle),
}
"""Which function measures what; one function may give several figures."""
