"""The host's view of the links: whose memory is where, who may send how fast, and what that amounted to."""

from __future__ import annotations

import numpy as np

from hmmnet.fabric.arbiter import Arbiter, Flow
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.dma import MultiArena
from hmmnet.observe.counters import Profile
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
        self._nodes = {node.number: node.owner for node in memory.nodes}

    def land(self, frames: Words, data: bytes) -> None:
        """Write whole pages to host `frames`."""
        if len(frames) == 1:
            self._memory.write_small(int(frames[0]), 0, data)
        else:
            self.memories.scatter(frames << np.uint64(PAGE_SHIFT), PAGE_SIZE, np.frombuffer(data, dtype=np.uint8))

    def open_in(self, device: str, frame: int) -> Flow:
        """A transfer from the memory that `frame` lies in to `device`. Close it."""
        return self.arbiter.open_flow(self._nodes[frame >> ZONE_SHIFT], device, self.now())

    def open_out(self, device: str, frame: int, nbytes: int) -> Flow:
        """A transfer of `nbytes` from `device` to the memory that `frame` lies in; the device will send at its rate. Close it."""
        flow = self.arbiter.open_flow(device, self._nodes[frame >> ZONE_SHIFT], self.now())
        flow.count(nbytes)
        return flow
