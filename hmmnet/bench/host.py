"""Figures of the host: whole migrations, a page that faults home, and what the bookkeeping of both costs.

Migrations and faults are those of a launched machine: host here, the device a process of its own, links far faster than this computer,
so that only our own work counts. They take turns with their references (a raw pyzmq stream of the same bytes, the bare bridge's round
trip). The bookkeeping is measured by the host's own probe, with a device that copies nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from statistics import median

import numpy as np
import trio

from hmmnet.errors import HmmnetError
from hmmnet.machine import launch
from hmmnet.pages import PAGE_SIZE
from hmmnet.program import Process
from hmmnet.topology import DeviceSpec, LinkSpec, MemoryNode, Topology

from .dma import Reference, raw_reference
from .measurement import Goal, Measurement, measured, median_ratio
from .wire import Pair, pairs

STREAM_BYTES = 256 << 20
ROUNDS = 7
FAULTS = 512
"""Faults in one round: some 0.2 s."""
ROUND_TRIPS = 1_000
GIB = 1 << 30
US = 1e6
MS = 1e6
"""Nanoseconds in a millisecond."""
OTHERS = ("shared", "cow", "file")
"""Kinds of memory that the probe takes beside a process's own."""

MIGRATE = Goal(0.75, at_least=True)
FAULT = Goal(2.0, at_least=False)
SNAPSHOT = Goal(10.0, at_least=False, of="value")
BOOKKEEPING = Goal(150.0, at_least=False, of="value")
THP = Goal(0.05, at_least=False)
"""A huge page is to cost a twentieth of 512 small ones, at most."""
FORK = Goal(50.0, at_least=False, of="value")
FORK_PAGES = SNAPSHOT_PAGES = 1 << 18
BOOKKEEPING_PAGES = 1 << 16
"""The sizes that the goals are set for; the probe measures smaller and larger ones too."""

FAST_BYTES_PER_S = 1e15
DEVICE = "gpu0"

Probe = Callable[[], dict[str, dict[int, float]]]
"""What the entry point ``bookkeeping`` in group ``hmmnet.bench`` is: figure -> pages -> nanoseconds a page."""


def machine_topology() -> Topology:
    """One device behind a link that never holds anything up."""
    return Topology(
        "bench",
        "one device, links of no weight",
        (MemoryNode("host", 2 * GIB),),
        (DeviceSpec(DEVICE, "gpu", GIB, node="host"),),
        (),
        (LinkSpec("link", "host", DEVICE, "pcie", FAST_BYTES_PER_S, 1e-9),),
    )


def measure_migration(rounds: int = ROUNDS, nbytes: int = STREAM_BYTES, faults: int = FAULTS) -> list[Measurement]:
    """``migrate.to_device``, ``migrate.to_host``, ``fault.cpu_home``: on a machine as it is by default, page data through shared memory.

    ``migrate.messages_*`` are the same migrations with page data as messages over ipc, as the raw reference sends them.
    """
    with raw_reference(nbytes) as raw, pairs("bridge") as started:
        return trio.run(_measure_migration, raw, started["bridge"], rounds, nbytes, faults)


async def _measure_migration(raw: Reference, bridge: Pair, rounds: int, nbytes: int, faults: int) -> list[Measurement]:
    taken: dict[str, list[float]] = {}
    name = f"bench-{os.getpid()}"
    async with (
        launch(machine_topology(), rate=1.0, name=name) as machine,
        launch(machine_topology(), rate=1.0, name=f"{name}-ipc", transport="ipc") as plain,
    ):
        process, other = await machine.create_process(), await plain.create_process()
        area, other_area = [await _filled(one, nbytes) for one in (process, other)]
        touched = await process.mmap(faults * PAGE_SIZE)
        await process.write(touched, np.arange(faults * PAGE_SIZE // 8, dtype="<u8"))
        for lap in range(rounds + 1):
            figures = {
                "raw out": raw.to_far(),
                "out": await _timed_migration(process, area, nbytes, DEVICE),
                "messages out": await _timed_migration(other, other_area, nbytes, DEVICE),
                "raw in": raw.to_near(),
                "in": await _timed_migration(process, area, nbytes, "host"),
                "messages in": await _timed_migration(other, other_area, nbytes, "host"),
                "bridge": bridge.ask("rtt", ROUND_TRIPS),
                "fault": await _timed_faults(process, touched, faults),
            }
            if lap:  # the first lap touches memory for the first time
                for figure, seconds in figures.items():
                    taken.setdefault(figure, []).append(seconds)
        for one in (process, other):
            await one.exit()
    return [
        _rate("migrate.to_device", taken["raw out"], taken["out"], nbytes),
        _rate("migrate.to_host", taken["raw in"], taken["in"], nbytes),
        _rate("migrate.messages_to_device", taken["raw out"], taken["messages out"], nbytes),
        _rate("migrate.messages_to_host", taken["raw in"], taken["messages in"], nbytes),
        measured(
            "fault.cpu_home",
            median(taken["fault"]) * US,
            "us",
            FAULT,
            median(taken["bridge"]) * US,
            median_ratio(taken["fault"], taken["bridge"]),
        ),
    ]


async def _filled(process: Process, nbytes: int) -> int:
    """Memory of a process in which every word is another."""
    area = await process.mmap(nbytes)
    await process.write(area, np.arange(nbytes // 8, dtype="<u8"))
    return area


def _rate(name: str, raw: list[float], ours: list[float], nbytes: int) -> Measurement:
    return measured(name, nbytes / median(ours) / 1e9, "GB/s", MIGRATE, nbytes / median(raw) / 1e9, median_ratio(raw, ours))


async def _timed_migration(process: Process, area: int, nbytes: int, to: str) -> float:
    began_s = time.perf_counter()
    moved = await process.migrate(area, nbytes, to)
    took_s = time.perf_counter() - began_s
    if moved != nbytes:
        raise HmmnetError(f"a benchmark's migration to {to} moved {moved} of {nbytes} bytes")
    return took_s


async def _timed_faults(process: Process, area: int, faults: int) -> float:
    """Seconds for one page that a CPU load brings home."""
    await _timed_migration(process, area, faults * PAGE_SIZE, DEVICE)
    began_s = time.perf_counter()
    for page in range(faults):
        await process.load(area + page * PAGE_SIZE)
    return (time.perf_counter() - began_s) / faults


def measure_bookkeeping() -> list[Measurement]:
    """``snapshot.ns_per_page``, ``migrate.bookkeeping_ns_per_page``, and ``migrate.thp_bookkeeping_ns_per_page`` beside small pages.

    Both with ``.shared`` are of pages that a child of fork maps, too; with ``.cow`` of those of which it has copied half; with
    ``.file`` of written pages of a private file mapping: the same is asked of them. ``fork.ms`` is of a process of 2**18 pages. Figures
    of further sizes carry theirs in the name.
    """
    probes = {entry.name: entry for entry in entry_points(group="hmmnet.bench")}
    if "bookkeeping" not in probes:
        raise HmmnetError('no probe "bookkeeping" is installed; install hmmnet itself ("pip install -e ." in its folder)')
    probe: Probe = probes["bookkeeping"].load()
    found = probe()
    return [
        *_by_size("snapshot.ns_per_page", found["snapshot"], SNAPSHOT_PAGES, SNAPSHOT),
        *_by_size("migrate.bookkeeping_ns_per_page", found["migrate"], BOOKKEEPING_PAGES, BOOKKEEPING),
        *(figure for kind in OTHERS for figure in _other(kind, found)),
        *_by_size("migrate.thp_bookkeeping_ns_per_page", found["thp"], BOOKKEEPING_PAGES, THP, found["migrate"]),
        *_by_size("migrate.thp_bookkeeping_to_device", found["thp_to_device"], BOOKKEEPING_PAGES, None, found["migrate"]),
        *_by_size("migrate.thp_bookkeeping_to_host", found["thp_to_host"], BOOKKEEPING_PAGES, None, found["migrate"]),
        measured("fork.ms", found["fork"][FORK_PAGES] * FORK_PAGES / MS, "ms", goal=FORK),
    ]


def _other(kind: str, found: dict[str, dict[int, float]]) -> list[Measurement]:
    """The two figures of pages of a `kind`, beside those of a process's own."""
    return [
        *_by_size(f"snapshot.ns_per_page.{kind}", found[f"snapshot_{kind}"], SNAPSHOT_PAGES, SNAPSHOT, found["snapshot"]),
        *_by_size(f"migrate.bookkeeping_ns_per_page.{kind}", found[kind], BOOKKEEPING_PAGES, BOOKKEEPING, found["migrate"]),
    ]


def _by_size(
    name: str, figures: dict[int, float], asked: int, goal: Goal | None, reference: dict[int, float] | None = None
) -> list[Measurement]:
    """The figure for the size that the goal is for, then the others, which nothing is asked of."""
    found = []
    for pages in sorted(figures, key=lambda pages: (pages != asked, pages)):
        own = goal if pages == asked else None
        beside = None if reference is None else reference[pages]
        ratio = None if beside is None else figures[pages] / beside
        found.append(measured(name if pages == asked else f"{name}.{pages}", figures[pages], "ns", own, beside, ratio))
    return found


BENCHMARKS = {
    "migrate.to_device": measure_migration,
    "migrate.to_host": measure_migration,
    "migrate.messages_to_device": measure_migration,
    "migrate.messages_to_host": measure_migration,
    "fault.cpu_home": measure_migration,
    "snapshot.ns_per_page": measure_bookkeeping,
    "migrate.bookkeeping_ns_per_page": measure_bookkeeping,
    **{f"snapshot.ns_per_page.{kind}": measure_bookkeeping for kind in OTHERS},
    **{f"migrate.bookkeeping_ns_per_page.{kind}": measure_bookkeeping for kind in OTHERS},
    "migrate.thp_bookkeeping_ns_per_page": measure_bookkeeping,
    "fork.ms": measure_bookkeeping,
}
"""Which function measures what; one function may give several figures."""
