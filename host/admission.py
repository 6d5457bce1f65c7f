"""Who may join the machine, and as what: the decisions about a hello, and what a welcomed peer is told.

Version and secret were checked before (`hmmnet.wire.server`). Here: a device must be one of the topology, and gets a zone of its own, a
pair of bulk channels, a pair of rings beside them where devices are on this computer and, if its memory is coherent, a file to share it
with us; a program gets nothing but the clock.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from hmmnet.arena import Arena
from hmmnet.errors import HmmnetError
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.fabric.dma import Rings, new_rings
from hmmnet.pages import DEVICE_ZONE_MIN, PAGE_SIZE, ZONE_SHIFT, ZONES_MAX
from hmmnet.topology import DeviceSpec, Topology
from hmmnet.wire.messages import PROTOCOL_VERSION, TEXT_MAX, Hello, Refused, Welcome, Zone
from hmmnet.wire.transport import ANSWER_BYTES_MAX, CHANNEL_BYTES_MAX, Channel, Transport

from .mm.frames import PhysicalMemory

PROGRAM_ROLES = frozenset({"client", "launcher"})


@dataclass(frozen=True)
class Connecting:
    """A device that is being welcomed: its place in the machine, our ends of its bulk channels, and what memory it shares with us."""

    spec: DeviceSpec
    zone: int
    bulk_in: Channel
    bulk_out: Channel
    rings: Rings | None
    shared: SharedMemory | None


class SharedMemory:
    """Coherent memory: a file without a name, which a process of the same user on this computer opens by our descriptor."""

    def __init__(self, name: str, zone: int, pages: int) -> None:
        self._descriptor = os.memfd_create(f"hmmnet-{name}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._descriptor, pages * PAGE_SIZE)
            self.arena = Arena(zone << ZONE_SHIFT, pages, self._descriptor)
        except BaseException:
            self.close()
            raise
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def close(self) -> None:
        """The device has opened it, or never will; what is mapped stays mapped."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class Admission:
    """Decides about hellos. `endpoint_of` names a fresh endpoint for a short name, `tap` may wrap a device's bulk channel."""

    def __init__(
        self,
        topology: Topology,
        transport: Transport,
        clock: EmulatedClock,
        memory: PhysicalMemory,
        endpoint_of: Callable[[str], str],
        incarnation: int,
        lease_s: float,
        telemetry: str = "",
        *,
        ring: bool = False,
        tap: Callable[[Channel, str], Channel] = lambda channel, _: channel,
        seed: int = 0,
    ) -> None:
        self._topology = topology
        self._transport = transport
        self._clock = clock
        self._memory = memory
        self._endpoint_of = endpoint_of
        self._incarnation = incarnation
        self._lease_s = lease_s
        self._telemetry = telemetry
        self._ring = ring
        self._tap = tap
        self._seed = seed
        self._welcomed: Counter[str] = Counter()
        self._zone_next = DEVICE_ZONE_MIN
        self._connecting: dict[str, Connecting] = {}

    def device(self, hello: Hello) -> Welcome | Refused:
        """Welcome a device of the topology; `connecting` then has its channels."""
        if hello.role != "device":
            return Refused("role", f"this endpoint is for devices, not for a {hello.role}")
        if hello.name not in self._topology.device_names:
            known = ", ".join(self._topology.device_names)
            return Refused("name", f'topology "{self._topology.name}" has no device "{hello.name}"; it has {known}'[:TEXT_MAX])
        points = self._memory.points
        if points.armed and points.fails("session.hello", device=hello.name):
            return Refused("busy", f"no device is welcomed: {points.why('session.hello')}")
        if self._zone_next >= ZONES_MAX or self._zone_next in self._memory.zones:
            return Refused("busy", f"devices were restarted {ZONES_MAX - DEVICE_ZONE_MIN} times; start the machine anew")
        zone = self._zone_next
        spec = self._topology.device(hello.name)
        key = self._transport.fresh_identity("bulk")
        bound: list[Channel] = []
        rings: Rings | None = None
        shared: SharedMemory | None = None
        try:
            rings = new_rings(spec.name) if self._ring else None
            shared = SharedMemory(spec.name, zone, spec.pages) if spec.kind == "coherent" else None
            for end, max_bytes in (("i", ANSWER_BYTES_MAX), ("o", CHANNEL_BYTES_MAX)):
                channel = self._transport.bind_channel(self._endpoint_of(f"b{zone}{end}"), max_bytes, key)
                bound.append(self._tap(channel, spec.name))
        except (HmmnetError, OSError) as error:
            for channel in bound:
                channel.close()
            for memory in (rings, shared):
                if memory is not None:
                    memory.close()
            return Refused("busy", str(error)[:TEXT_MAX])
        bulk_in, bulk_out = bound
        self._zone_next += 1
        self._connecting[hello.name] = Connecting(spec, zone, bulk_in, bulk_out, rings, shared)
        self._welcomed[spec.name] += 1
        config = vars(spec) | {"memory_file": shared.path if shared is not None else ""}
        config |= {"chance": f"{self._seed} {spec.name} {self._welcomed[spec.name]}"}
        if rings is not None:
            config |= {"ring_file": rings.place.path, "ring_token": rings.place.token}
        return self._welcome(zone, bulk_in.endpoint, bulk_out.endpoint, key, msgspec.msgpack.encode(config))

    def connecting(self, name: str) -> Connecting:
        """What `device` made for the device that it just welcomed."""
        return self._connecting.pop(name)

    def program(self, hello: Hello) -> Welcome | Refused:
        """Welcome a program."""
        if hello.role not in PROGRAM_ROLES:
            return Refused("role", f"this endpoint is for programs, not for a {hello.role}")
        return self._welcome(-1, "", "", b"", b"")

    def _welcome(self, zone: int, bulk_in: str, bulk_out: str, bulk_key: bytes, config: bytes) -> Welcome:
        clock = self._clock
        return Welcome(
            version=PROTOCOL_VERSION,
            host_incarnation=self._incarnation,
            zone=zone,
            zones=[Zone(found.number, found.kind, found.owner, found.count) for found in self._memory.zones.values() if not found.lost],
            bulk_in=bulk_in,
            bulk_out=bulk_out,
            bulk_key=bulk_key,
            telemetry=self._telemetry if zone >= 0 else "",
            epoch_monotonic_s=clock.epoch_monotonic_s,
            epoch_emulated_s=clock.epoch_emulated_s,
            rate=clock.rate,
            lease_s=self._lease_s,
            config=config,
        )
