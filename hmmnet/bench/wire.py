"""Figures of the wire: the bridge beside blocking pyzmq and beside zmq.asyncio, and control messages beside a full bulk stream.

Each end runs in a process of its own (`bench.wire_peers`), over ipc. All processes of a comparison live at the same time and take turns,
round by round, so that a machine that slows down slows all of them down; figures are medians over rounds, ratios the medians of the
rounds' ratios.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

from hmmnet.launcher.scratch import scratch

from .far import Far
from .measurement import Goal, measured, median_ratio

ROUNDS = 9
ROUND_TRIPS = 1_000
"""Round trips in one round: some 0.15 s, long against a time slice."""
FRAMES = 192
"""Frames of 1 MiB in one round: some 0.05 s."""
STREAM_ROUNDS = 41
"""A stream keeps two processors busy, with five threads at least: a round depends on where they happen to run. Two pairs of processes of
the *same* kind gave ratios of 0.43 to 2.03 in single rounds; as medians of 9 rounds 0.62 to 1.07, of 31 rounds 0.95 to 1.00."""
FRAME_BYTES = 1 << 20
WARM_UP = 100
US = 1e6

BRIDGE_RTT = Goal(0.75, at_least=True)
BRIDGE_STREAM = Goal(0.95, at_least=True)
AHEAD = Goal(1.0, at_least=True)
SESSION_RTT = Goal(1.5, at_least=False)
UNDER_BULK = Goal(3.0, at_least=False)


class Pair:
    """Two processes, one kind of wire between them."""

    def __init__(self, kind: str, directory: str) -> None:
        self._far, self._near = (Far("hmmnet.bench.wire_peers", kind, side, directory) for side in ("far", "near"))

    def ask(self, command: str, count: int) -> float:
        """What the near process measured, in seconds."""
        self._near.tell(f"{command} {count}")
        return float(self._near.answer())

    def close(self) -> None:
        """End both."""
        self._near.close()
        self._far.close()


@contextmanager
def pairs(*kinds: str) -> Iterator[dict[str, Pair]]:
    """One pair of processes for each kind, warmed up."""
    with ExitStack() as stack:
        started = {}
        for kind in kinds:
            pair = Pair(kind, stack.enter_context(scratch()))
            stack.callback(pair.close)
            pair.ask("rtt", WARM_UP)
            started[kind] = pair
        yield started


def round_trips(rounds: int = ROUNDS, count: int = ROUND_TRIPS) -> list[dict[str, Any]]:
    """``bridge.rtt``, ``bridge.vs_asyncio_rtt`` and ``session.rtt`` (a request and its answer, over the bare bridge's round trip)."""
    taken: dict[str, list[float]] = {"raw": [], "bridge": [], "asyncio": [], "session": []}
    with pairs(*taken) as started:
        for _ in range(rounds):
            for kind, pair in started.items():
                taken[kind].append(pair.ask("rtt", count) * US)
    raw, ours, theirs, session = (median(taken[kind]) for kind in ("raw", "bridge", "asyncio", "session"))
    return [
        measured("bridge.rtt", ours, "us", BRIDGE_RTT, raw, median_ratio(taken["raw"], taken["bridge"])).as_dict(),
        measured("bridge.vs_asyncio_rtt", ours, "us", AHEAD, theirs, median_ratio(taken["asyncio"], taken["bridge"])).as_dict(),
        measured("session.rtt", session, "us", SESSION_RTT, ours, median_ratio(taken["session"], taken["bridge"])).as_dict(),
    ]


def streams(rounds: int = STREAM_ROUNDS, frames: int = FRAMES) -> list[dict[str, Any]]:
    """``bridge.stream_1m`` and ``bridge.vs_asyncio_stream``, in GB/s. Every second round goes the other way round."""
    taken: dict[str, list[float]] = {"raw": [], "bridge": [], "asyncio": []}
    with pairs(*taken) as started:
        for pair in started.values():
            pair.ask("stream", frames)
        order = list(started.items())
        for _ in range(rounds):
            order.reverse()
            for kind, pair in order:
                taken[kind].append(frames * FRAME_BYTES / pair.ask("stream", frames) / 1e9)
    raw, ours, theirs = (median(taken[kind]) for kind in ("raw", "bridge", "asyncio"))
    return [
        measured("bridge.stream_1m", ours, "GB/s", BRIDGE_STREAM, raw, median_ratio(taken["bridge"], taken["raw"])).as_dict(),
        measured("bridge.vs_asyncio_stream", ours, "GB/s", AHEAD, theirs, median_ratio(taken["bridge"], taken["asyncio"])).as_dict(),
    ]


def control_under_bulk(rounds: int = ROUNDS, count: int = ROUND_TRIPS // 4) -> list[dict[str, Any]]:
    """``control.under_bulk``: a request and its answer beside a full bulk stream of the same two processes, over the same when idle.

    Medians of single round trips; ``control.under_bulk.mean`` has the means, in which the few count that wait for a time slice.
    """
    taken: dict[str, list[float]] = {}
    with pairs("session") as started:
        pair = started["session"]
        for _ in range(rounds):
            for kind in ("p50", "rtt"):
                taken.setdefault(f"idle {kind}", []).append(pair.ask(kind, count) * US)
            pair.ask("bulk", 1)
            for kind in ("p50", "rtt"):
                taken.setdefault(f"busy {kind}", []).append(pair.ask(kind, count) * US)
            pair.ask("bulk", 0)
            pair.ask("rtt", 10)  # let the stream drain
    return [
        _under_bulk("control.under_bulk", taken["busy p50"], taken["idle p50"], UNDER_BULK),
        _under_bulk("control.under_bulk.mean", taken["busy rtt"], taken["idle rtt"], None),
    ]


def _under_bulk(name: str, busy: list[float], idle: list[float], goal: Goal | None) -> dict[str, Any]:
    return measured(name, median(busy), "us", goal, median(idle), median_ratio(busy, idle)).as_dict()


BENCHMARKS = {
    "bridge.rtt": round_trips,
    "bridge.vs_asyncio_rtt": round_trips,
    "session.rtt": round_trips,
    "bridge.stream_1m": streams,
    "bridge.vs_asyncio_stream": streams,
    "control.under_bulk": control_under_bulk,
    "control.under_bulk.mean": control_under_bulk,
}
"""Which function measures what; one function may give several figures."""
