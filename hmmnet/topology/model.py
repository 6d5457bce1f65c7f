"""What a machine is made of, as frozen data.

A topology is an undirected graph. Its vertices are host memory nodes (a NUMA node: memory, and the CPU socket with its root ports),
devices and switches; its edges are links, each with a bandwidth per direction and a latency. Traffic may pass through memory nodes (a
root complex forwards) and switches, never through a device: a GPU does not forward another GPU's packets.

These are plain dataclasses, so ``msgspec`` packs them as they are: a device receives its `DeviceSpec` in the welcome message. What `load`
returns has been checked; what is built by hand can be checked with `load.check_topology`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from hmmnet.errors import WrongUse
from hmmnet.pages import ADDRESS_BITS, DEVICE_ZONE_MIN, PAGE_SIZE

MEMORY_BYTES_MAX = 1 << (ADDRESS_BITS - 1)
"""A memory is one mapping of the process that holds it, which has 47 bits of addresses and needs some for the rest."""
MEMORY_NODES_MAX = DEVICE_ZONE_MIN
"""Zone numbers below `DEVICE_ZONE_MIN` are host memory nodes, in the topology's order."""
DEVICES_MAX = 1024
"""Each device is a process with a dozen sockets; zones for four lives of each remain."""

DeviceKind = Literal["private", "coherent"]
Personality = Literal["today", "v25"]
PERSONALITIES: tuple[Personality, ...] = ("today", "v25")


@dataclass(frozen=True)
class MemoryNode:
    """A host memory, as a NUMA node."""

    name: str
    memory_bytes: int

    @property
    def pages(self) -> int:
        """Its size in pages."""
        return self.memory_bytes // PAGE_SIZE


@dataclass(frozen=True)
class Switch:
    """Something that only forwards: a PCIe switch or root port, the switch chips of an NVLink baseboard."""

    name: str
    kind: str = "pcie"


@dataclass(frozen=True)
class DeviceSpec:
    """A device: a GPU, or anything that mirrors an address space and has memory of its own.

    `kind` is ``private`` (the CPU cannot reach its memory: MEMORY_DEVICE_PRIVATE) or ``coherent`` (MEMORY_DEVICE_COHERENT). `node` is the
    nearest memory node. `page_sizes` are those its page table can map, ascending; without 2 MiB huge pages come to it page by page. A job
    on a device that is not `fault_capable` fails at the first page that was not migrated there before, one on a device without `atomics`
    at its first atomic update. `unit` is the device number that a dmirror device has in the kernel (``/dev/hmm_dmirror0``).
    """

    name: str
    model: str
    memory_bytes: int
    kind: DeviceKind = "private"
    node: str = ""
    page_sizes: tuple[int, ...] = (4 << 10, 64 << 10, 2 << 20)
    fault_capable: bool = True
    atomics: bool = True
    unit: int | None = None

    @property
    def pages(self) -> int:
        """Its memory's size in pages."""
        return self.memory_bytes // PAGE_SIZE


@dataclass(frozen=True)
class LinkSpec:
    """`count` parallel physical links between `a` and `b`, used as one.

    `bandwidth_bytes_per_s` is that of one physical link from a to b (*forward*); `bandwidth_back_bytes_per_s` from b to a, None when equal.
    The whole link carries `capacity_bytes_per_s`.
    """

    name: str
    a: str
    b: str
    kind: str
    bandwidth_bytes_per_s: float
    latency_s: float
    bandwidth_back_bytes_per_s: float | None = None
    count: int = 1

    def capacity_bytes_per_s(self, forward: bool) -> float:
        """What all `count` physical links carry together in one direction."""
        one = self.bandwidth_bytes_per_s
        if not forward and self.bandwidth_back_bytes_per_s is not None:
            one = self.bandwidth_back_bytes_per_s
        return one * self.count

    def other(self, end: str) -> str:
        """The vertex at the other end than `end`."""
        return self.b if end == self.a else self.a


@dataclass(frozen=True)
class Topology:
    """A machine: everything in the order of its file."""

    name: str
    description: str
    nodes: tuple[MemoryNode, ...]
    devices: tuple[DeviceSpec, ...]
    switches: tuple[Switch, ...]
    links: tuple[LinkSpec, ...]
    personality: Personality = "today"
    """Whose rules its host keeps: the present kernel's, or those of HMM v25."""

    @cached_property
    def _by_name(self) -> dict[str, MemoryNode | DeviceSpec | Switch]:
        return {vertex.name: vertex for vertex in self.vertices()}

    def vertices(self) -> Iterator[MemoryNode | DeviceSpec | Switch]:
        """Memory nodes, then devices, then switches."""
        yield from self.nodes
        yield from self.devices
        yield from self.switches

    def vertex(self, name: str) -> MemoryNode | DeviceSpec | Switch:
        """What is called `name`. Raises KeyError."""
        return self._by_name[name]

    def device(self, name: str) -> DeviceSpec:
        """The device called `name`. Raises KeyError."""
        found = self._by_name[name]
        if not isinstance(found, DeviceSpec):
            raise KeyError(name)
        return found

    def node(self, name: str) -> MemoryNode:
        """The memory node called `name`. Raises KeyError."""
        found = self._by_name[name]
        if not isinstance(found, MemoryNode):
            raise KeyError(name)
        return found

    @cached_property
    def device_names(self) -> tuple[str, ...]:
        """The devices' names, in order."""
        return tuple(device.name for device in self.devices)

    def links_of(self, name: str) -> tuple[LinkSpec, ...]:
        """The links that end at `name`, in order."""
        return tuple(link for link in self.links if name in (link.a, link.b))


def with_personality(topology: Topology, personality: str | None) -> Topology:
    """`topology` with a host that keeps the rules of `personality` (None: its own). Raises WrongUse for one that there is not."""
    if personality is None:
        return topology
    for known in PERSONALITIES:
        if known == personality:
            return replace(topology, personality=known)
    raise WrongUse(f'there is no personality "{personality}"; there are {", ".join(PERSONALITIES)}')
