"""How fast the emulated clock may run here: what this computer moves, against what the machine's links would move.

`--rate auto` measures one short stream between two channels over the transport that the machine will use, and slows the clock until
the links of all devices together, busy at once, ask for no more than a safe part of that. Devices run beside each other on few cores, so
what counts is the sum over devices, each with the narrowest link on its way to memory, in its faster direction.
"""

from __future__ import annotations

import logging
import math

import numpy as np
import trio

from hmmnet.topology.model import Topology
from hmmnet.topology.routes import Routes
from hmmnet.wire.transport import ANSWER_BYTES_MAX, Channel, Transport

from .clock import EmulatedClock
from .dma import BulkReceiver, BulkSender, BytesSink, BytesSource, Ring, Rings, new_rings

log = logging.getLogger("hmmnet.fabric")

PROBE_BYTES = 32 << 20
"""Long enough to pass the start-up of a connection, short enough (about 20 ms) to do at every start."""
SAFE_PART = 0.15
"""Of what was measured with nothing else running. Migrations also do bookkeeping, jobs compute, and each transfer has a few messages of
its own, which must stay short beside it for transfers of a few hundred KiB to come in time."""
FLOWS_AT_ONCE_MAX = 4
"""Devices that are taken to be busy at once: with more, a few cores are shared, and a run says where it did not keep up."""


async def measure_bytes_per_s(transport: Transport, endpoint: str, clock: EmulatedClock, *, ring: bool = False) -> float:
    """Move `PROBE_BYTES` through a channel bound at `endpoint`, or a `ring` beside it, with checksums, twice; the better figure."""
    key = transport.fresh_identity("measure")
    near = transport.bind_channel(endpoint, ANSWER_BYTES_MAX, key)
    far = transport.connect_channel(near.endpoint, key=key)
    rings = new_rings("measure") if ring else None
    seen = None if rings is None else Rings.opened(rings.place)
    try:
        return await _measure_between(near, far, clock, rings.to_device if rings else None, seen.to_device if seen else None)
    finally:
        for shared in (rings, seen):
            if shared is not None:
                shared.close()
        with trio.CancelScope(shield=True):
            await near.aclose()
            await far.aclose()


async def _measure_between(near: Channel, far: Channel, clock: EmulatedClock, ring: Ring | None, seen: Ring | None) -> float:
    sender, receiver = BulkSender(near, clock, ring=ring), BulkReceiver(far, clock, ring=seen)
    data, landing = np.ones(PROBE_BYTES, dtype=np.uint8), np.zeros(PROBE_BYTES, dtype=np.uint8)
    best = 0.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.run)
        nursery.start_soon(receiver.run)
        for stream in (2, 4):
            arrival = receiver.expect(stream, BytesSink(landing))
            began_s = clock.now()
            await sender.send(stream, BytesSource(data))
            await arrival.wait()
            best = max(best, PROBE_BYTES / ((clock.now() - began_s) / clock.rate))
        nursery.cancel_scope.cancel()
    return best


async def automatic_rate(topology: Topology, transport: Transport, endpoint: str, *, ring: bool = False) -> float:
    """What ``--rate auto`` means on this computer, over the kind of channel that `endpoint` names, with a `ring` or without."""
    measured = await measure_bytes_per_s(transport, endpoint, EmulatedClock(), ring=ring)
    rate = choose_rate(topology, measured)
    log.info("the clock runs at rate %g", rate, extra={"fields": {"measured_bytes_per_s": round(measured)}})
    return rate


def demanded_bytes_per_s(topology: Topology) -> float:
    """What the links to memory of the busiest devices carry together, in the model's seconds."""
    routes = Routes(topology)
    demands = []
    for device in topology.devices:
        memory = device.node or topology.nodes[0].name
        ways = (routes.route(memory, device.name), routes.route(device.name, memory))
        demands.append(max(min((hop.capacity_bytes_per_s for hop in way), default=math.inf) for way in ways))
    return sum(sorted((demand for demand in demands if math.isfinite(demand)), reverse=True)[:FLOWS_AT_ONCE_MAX])


def choose_rate(topology: Topology, measured_bytes_per_s: float) -> float:
    """The rate of the emulated clock at which the links hold here: at most 1, rounded to two digits so that runs are comparable."""
    demanded = demanded_bytes_per_s(topology)
    if demanded <= 0:
        return 1.0
    rate = min(1.0, measured_bytes_per_s * SAFE_PART / demanded)
    return float(f"{rate:.2g}")
