"""The host's view of the links: whose memory is where, who may send how fast, and what that amounted to."""

from __future__ import annotations

import math

import numpy as np

from hmmnet.fabric.arbiter import Arbiter, Flow
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.dma import MultiArena
from hmmnet.observe.counters import DEVICE_TO_HOST, Profile
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, ZONE_SHIFT, Words
from hmmnet.topology import Topology

from .mm.frames import PhysicalMemory


class Interconnect:
    """The links of one machine, with the memories of the host at one end. `profile` counts what crosses them."""

    def __init__(self, topology: Topology, clock: EmulatedClock, memory: PhysicalMemory) -> None:
        self.clock = clock
        self.now = clock.now
        self.arbiter = Arbiter(topology, lambda: clock.rate)
        self.profile = Profile()
        self.memories = MultiArena({node.number: node.arena for node in memory.nodes})
        self._memory = memory
        self._speeds: dict[tuple[str, int], tuple[float, float]] = {}
        """Bandwidth and latency of the way from a device to a memory."""
        self._nodes = {node.number: node.owner for node in memory.nodes}

    def land(self, frames: Words, data: bytes) -> None:
        """Write whole pages to host `frames`."""
        if len(frames) == 1:
            self._memory.write_small(int(frames[0]), 0, data)
        else:
            self.memories.scatter(frames << np.uint64(PAGE_SHIFT), PAGE_SIZE, np.frombuffer(data, dtype=np.uint8))

    def time_out_s(self, device: str, frame: int, nbytes: int) -> float:
        """Emulated seconds that `nbytes` take from `device` to the memory of `frame` when nothing else is under way."""
        key = (device, frame >> ZONE_SHIFT)
        speed = self._speeds.get(key)
        if speed is None:
            route = self.arbiter.route(device, self._nodes[key[1]])
            speed = self._speeds[key] = (
                min((link.capacity_bytes_per_s for link in route), default=math.inf),
                sum(link.latency_s for link in route),
            )
        return nbytes / speed[0] + speed[1]

    def count_out(self, device: str, frame: int, nbytes: int, start_s: float, due_s: float, end_s: float) -> None:
        """Count a transfer from `device` that no flow was opened for."""
        for link in self.arbiter.route(device, self._nodes[frame >> ZONE_SHIFT]):
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
