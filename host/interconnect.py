"""The host's view of the links: whose memory is where, who may send how fast, and what that amounted to."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import numpy as np
import trio

from hmmnet.errors import PeerError, Unreachable
from hmmnet.fabric.arbiter import Arbiter, Flow
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.dma import MultiArena
from hmmnet.fabric.sender import LOOK_S
from hmmnet.fabric.singles import Singles
from hmmnet.fabric.turns import Turn
from hmmnet.observe.counters import DEVICE_TO_HOST, Profile
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, ZONE_SHIFT, Words, word_of
from hmmnet.sleeping import sleep
from hmmnet.topology import Topology

from .mm.frames import PhysicalMemory
from .mm.zones import CpuZone, Zone

STALL_S = 5.0
"""Real seconds that a CPU stalls on links that are down: as long as on a device that does not let go. Then it is a bus error."""
CROSSING_LOOK = 64
"""Accesses to devices' memory before it is looked which of them are over and can be counted; later, twice as many as were not."""
LOOKS_AT_ENDING = 4
"""Half milliseconds that accounts wait for flows that are due: for one that is late they would wait in vain."""


class Interconnect:
    """The links of one machine, with the memories of the host at one end. `profile` counts what crosses them."""

    def __init__(self, topology: Topology, clock: EmulatedClock, memory: PhysicalMemory) -> None:
        self.clock = clock
        self.now = clock.now
        self.points = memory.points
        self.arbiter = Arbiter(topology)
        self.profile = Profile()
        self._arenas = {node.number: node.arena for node in memory.nodes}
        self.memories = MultiArena(self._arenas)
        self._memory = memory
        self._ways: dict[tuple[str, str], Singles] = {}
        self._changed = 0
        self._crossing: list[tuple[Turn, int]] = []
        """What the CPU has reached, and how many bytes, and is not counted: their turns may change while they last."""
        self._count_at = CROSSING_LOOK
        self._nodes = {node.number: node.owner for node in memory.nodes}
        """Where on the links each zone lies that the CPU, or another device, reaches."""

    def attach(self, zone: Zone, node: str) -> None:
        """The memory of a device is there. If it is coherent, the CPU, beside memory `node`, and other devices reach it over its links."""
        if isinstance(zone, CpuZone):
            self.attach_beside(zone, zone.owner)
            zone.crossed = partial(self._crossed, zone.owner, node)

    def attach_beside(self, zone: CpuZone, place: str) -> None:
        """Memory that the CPU reaches is there, at `place` on the links; a driver's in the host lies beside a memory node."""
        self._arenas[zone.number] = zone.arena
        self._nodes[zone.number] = place

    def place_of(self, zone: int) -> str | None:
        """Where on the links the memory of a zone lies; None for what neither the CPU nor another device reaches."""
        return self._nodes.get(zone)

    def detach(self, zone: Zone) -> None:
        """That memory is gone."""
        self._arenas.pop(zone.number, None)
        self._nodes.pop(zone.number, None)

    def _crossed(self, device: str, node: str, nbytes: int, stored: bool) -> None:
        """The CPU has reached `nbytes` of a device's memory: they take their turn on the links, and whoever wanted them owes the time.

        While the links are down a CPU stalls on them.
        """
        source, target = (node, device) if stored else (device, node)
        try:
            way = self._way(source, target)
        except Unreachable:
            self._memory.owed = partial(self._stall, source, target)
            return
        turn = way.turn(nbytes, self.now())
        self._crossing.append((turn, nbytes))
        if len(self._crossing) >= self._count_at:
            self._count_crossed()
            self._count_at = max(CROSSING_LOOK, 2 * len(self._crossing))
        if self.clock.real_until(turn.due_s) >= self.clock.sleep_min_s:
            self._memory.owed = partial(way.pass_by, turn, self.clock)

    def _count_crossed(self) -> None:
        """Count what the CPU has reached and may go on with by now, as it came to pass."""
        by_s = self.now() + self.clock.sleep_min_s * self.clock.rate
        for turn, nbytes in self._crossing:
            if turn.due_s <= by_s:
                _record(turn, nbytes, turn.due_s)
        self._crossing = [one for one in self._crossing if one[0].due_s > by_s]

    async def _stall(self, source: str, target: str) -> None:
        """Return when a link leads there again. Raises Unreachable when none does for `STALL_S`."""
        with trio.move_on_after(self.clock.real(STALL_S)):
            while True:
                with suppress(Unreachable):
                    self.arbiter.route(source, target)
                    return
                await sleep(self.clock.real(LOOK_S))
        self.arbiter.route(source, target)

    def land(self, frames: Words, data: bytes) -> None:
        """Write whole pages to host `frames`."""
        self.memories.scatter(frames << word_of(PAGE_SHIFT), PAGE_SIZE, np.frombuffer(data, dtype=np.uint8))

    def land_one(self, frame: int, data: bytes) -> None:
        """Write one whole page to a host frame."""
        self._memory.write_small(frame, 0, data)

    async def pass_out(self, device: str, frame: int, nbytes: int, start_s: float) -> tuple[Turn, float]:
        """`nbytes` from `device` to the memory of `frame`, ready at `start_s` and here already: return at their emulated time.

        Returns the turn that the model gave them, and when they were there. No flow is opened for them (see `Singles`).
        """
        turn, now_s = self.passes_out(device, frame, nbytes, start_s)
        return turn, now_s if now_s >= turn.due_s else await self.pass_time_out(device, frame, turn)

    def passes_out(self, device: str, frame: int, nbytes: int, start_s: float) -> tuple[Turn, float]:
        """`pass_out` for who goes on without waiting where now, which is returned, the turn is due."""
        return self._way_out(device, frame).turn(nbytes, start_s), self.now()

    async def pass_time_out(self, device: str, frame: int, turn: Turn) -> float:
        """Return when what has just got a `turn` from `device` to the memory of `frame` is due, if that is not soon, and when that is."""
        if self.clock.real_until(turn.due_s) >= self.clock.sleep_min_s:
            return await self._way_out(device, frame).pass_by(turn, self.clock)
        return turn.due_s

    async def pass_latencies_out(self, device: str, node: int, count: int) -> None:
        """Return when as much time has passed as `count` ways from `device` to host memory `node` take, one after the other."""
        with suppress(PeerError):  # its links went down behind the pages
            due_s = self.now() + self._way(device, self._nodes[node]).passes_s(count)
            if self.clock.real_until(due_s) >= self.clock.sleep_min_s:
                await self.clock.sleep_until(due_s)

    def _way_out(self, device: str, frame: int) -> Singles:
        return self._way(device, self._nodes[frame >> ZONE_SHIFT])

    def _way(self, source: str, target: str) -> Singles:
        if self._changed != self.arbiter.changed:  # a fault has changed links: ways may lead elsewhere
            self._changed = self.arbiter.changed
            self._ways.clear()
        key = (source, target)
        way = self._ways.get(key)
        if way is None:
            way = self._ways[key] = Singles(self.arbiter, source, target)
        return way

    def count_out(self, device: str, nbytes: int, turn: Turn, end_s: float) -> None:
        """Count what `pass_out` let through."""
        _record(turn, nbytes, end_s)
        self.profile.record(DEVICE_TO_HOST, nbytes, end_s - turn.begin_s, device)

    async def settle(self) -> None:
        """Return when what a CPU or a device may take for done by now is counted here, if it is.

        Who waits for a transfer goes on up to `sleep_min_s` before it is due. A device that did so may be heard of before whoever closes
        the flow here was woken, and who has its word would look at books without it.
        """
        self._count_crossed()
        early_s = self.clock.sleep_min_s
        ending = self.arbiter.due(self.now() + early_s * self.clock.rate) if early_s else []
        for _ in range(LOOKS_AT_ENDING):
            if not any(flow.open for flow in ending):
                return
            await sleep(self.clock.real(early_s / 2))

    def open_in(self, device: str, frame: int) -> Flow:
        """A transfer from the memory that `frame` lies in to `device`. Close it."""
        return self.arbiter.open_flow(self._nodes[frame >> ZONE_SHIFT], device, self.now())

    def open_across(self, source: str, target: str) -> Flow:
        """A transfer from one device to another. Close it."""
        return self.arbiter.open_flow(source, target, self.now())

    def open_out(self, device: str, frame: int) -> Flow:
        """A transfer from `device` to the memory that `frame` lies in; the device will send at its rate. Close it."""
        return self.arbiter.open_flow(device, self._nodes[frame >> ZONE_SHIFT], self.now())


def _record(turn: Turn, nbytes: int, arrived_s: float) -> None:
    for link in turn.links:
        link.record(nbytes, turn.begin_s, turn.due_s, arrived_s)
