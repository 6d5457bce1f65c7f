"""The host's view of the links: whose memory is where, who may send how fast, and what that amounted to."""

from __future__ import annotations

import math

import numpy as np

from hmmnet.fabric.arbiter import Arbiter, Flow
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.dma import MultiArena
from hmmnet.fabric.link import Link
from hmmnet.observe.counters import DEVICE_TO_HOST, Profile
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, ZONE_SHIFT, Words
from hmmnet.topology import Topology

from .mm.frames import PhysicalMemory


class Interconnect:
    """The links of one machine, with the memories of the host at one end. `profile` counts what crosses them."""

    def __init__(self, topology: Topology, clock: EmulatedClock, memory: PhysicalMemory) -> None:
        self.clock = clock
        self.now = clock.now
        self.arbiter = Arbiter(topology)
        self.profile = Profile()
        self.memories = MultiArena({node.number: node.arena for node in memory.nodes})
        self._memory = memory
        self._ways: dict[tuple[str, int], tuple[tuple[Link, ...], float, float]] = {}
        self._nodes = {node.number: node.owner for node in memory.nodes}

    def land(self, frames: Words, data: bytes) -> None:
        """Write whole pages to host `frames`."""
        self.memories.scatter(frames << np.uint64(PAGE_SHIFT), PAGE_SIZE, np.frombuffer(data, dtype=np.uint8))

    def land_one(self, frame: int, data: bytes) -> None:
        """Write one whole page to a host frame."""
        self._memory.write_small(frame, 0, data)

    def time_out_s(self, device: str, frame: int, nbytes: int) -> float:
        """Emulated seconds that `nbytes` take from `device` to the memory of `frame` when nothing else is under way."""
        _, bytes_per_s, latency_s = self._way_out(device, frame)
        return nbytes / bytes_per_s + latency_s

    def _way_out(self, device: str, frame: int) -> tuple[tuple[Link, ...], float, float]:
        """The links from `device` to the memory of `frame`, their bandwidth and their latency."""
        key = (device, frame >> ZONE_SHIFT)
        way = self._ways.get(key)
        if way is None:
            links = self.arbiter.route(device, self._nodes[key[1]])
            bytes_per_s = min((link.capacity_bytes_per_s for link in links), default=math.inf)
            way = self._ways[key] = links, bytes_per_s, sum(link.latency_s for link in links)
        return way

    def count_out(self, device: str, frame: int, nbytes: int, start_s: float, due_s: float, end_s: float) -> None:
        """Count a transfer from `device` that no flow was opened for."""
        for link in self._way_out(device, frame)[0]:
            link.record(nbytes, start_s, due_s, end_s)
        self.profile.record(DEVICE_TO_HOST, nbytes, end_s - start_s, device)

    def open_in(self, device: str, frame: int) -> Flow:
        """A transfer from the memory that `frame` lies in to `device`. Close it."""
        return self.arbiter.open_flow(self._nodes[frame >> ZONE_SHIFT], device, self.now())

    def open_out(self, device: str, frame: int, nbytes: int) -> Flow:
        """A transfer of `nbytes` from `device` to the memory that `frame` lies in; the device will send at its rate. Close it."""
        flow = self.arbiter.open_flow(device, self._nodes[frame >> ZONE_SHIFT], self.now())
        flow.count(nbytes)
        return flow
