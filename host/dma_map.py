"""DMA mappings of pages that hmm_range_fault reported (mm/hmm.c: hmm_dma_map_alloc, hmm_dma_map_pfn, hmm_dma_unmap_pfn; table A8).

A device that reaches pages by DMA needs an address for each, and which kind depends on where the page lies (drivers/pci/p2pdma.c):

- ordinary memory: the IOMMU maps it, at an I/O virtual address that was reserved when the map was made (`Route.MEMORY`);
- memory of another device to which every way leads through a host bridge: mapped by the IOMMU as MMIO, and marked P2PDMA;
- memory of another device below the same switches: its bus address, to which nothing is mapped, marked P2PDMA_BUS.

That is more than a mark: the three ways cross different links, so they differ in bandwidth and latency (`DmaRoutes`, per topology).

Every range that a device faults goes through here before its addresses are handed out (`DeviceDma`, in `requests.py`): what it gets are
words with these marks, and where no link leads there is no address. Our IOMMU checks and does not translate (it passes addresses through,
as iommu=pt does): a DMA address is the physical one, the peer's bus address too, as both number the same frames.

A page that is mapped says so in its word (DMA_MAPPED), and hmm_range_fault keeps these bits of the words it is given. So who faults a range
again, for the right to write, say, maps nothing twice.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from hmmnet.errors import KernelError
from hmmnet.pages import (
    HMM_PFN_DMA_MAPPED,
    HMM_PFN_FRAME_MASK,
    HMM_PFN_P2PDMA,
    HMM_PFN_P2PDMA_BUS,
    HMM_PFN_VALID,
    PAGE_SHIFT,
    PAGE_SIZE,
    ZONE_SHIFT,
    Words,
    distinct,
    largest,
    smallest,
    word_of,
)
from hmmnet.runs import RunAllocator
from hmmnet.topology import MemoryNode, Topology
from hmmnet.topology.routes import Routes

ENTRIES_MAX = 1 << 28
"""Entries of one map: 1 TiB in pages, whose list of words takes 2 GiB."""
IOVA_PAGES = 1 << 36
"""Pages of I/O virtual addresses of one device: 48 bits."""
BUS_ADDRESS_BIT = 1 << 62
"""Set in bus addresses, so that they are never taken for I/O virtual ones."""
MAPPING_ERROR = (1 << 64) - 1
"""DMA_MAPPING_ERROR."""

FLAGS = HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA | HMM_PFN_P2PDMA_BUS
_TO_MAPPED = word_of(3)
"""VALID is so many bits above DMA_MAPPED."""
_VALID_DMA = word_of(HMM_PFN_VALID | HMM_PFN_DMA_MAPPED)


class Route(Enum):
    """How a device reaches a page by DMA, and what its word says then."""

    MEMORY = HMM_PFN_DMA_MAPPED
    HOST_BRIDGE = HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA
    BUS_ADDRESS = HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA_BUS


@dataclass(frozen=True)
class DmaRoute:
    """A way, and what it gives: the bottleneck of its links from the page to the device, and the sum of their latencies."""

    route: Route
    bandwidth_bytes_per_s: float
    latency_s: float


class DmaRoutes:
    """The ways between the memories of one topology (pci_p2pdma_map_type)."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._routes = Routes(topology)
        self._found: dict[tuple[str, str], DmaRoute | None] = {}

    def between(self, device: str, owner: str) -> DmaRoute | None:
        """How `device` reaches the memory of `owner`, a memory node or another device; None when no link leads there.

        Raises KeyError for names that the topology does not have.
        """
        key = (device, owner)
        if key not in self._found:
            self._found[key] = self._find(device, owner)
        return self._found[key]

    def _find(self, device: str, owner: str) -> DmaRoute | None:
        hops = self._routes.find(owner, device)
        if hops is None:
            return None
        passed = [self._topology.vertex(end) for hop in hops for end in (hop.link.a, hop.link.b) if end not in (device, owner)]
        if isinstance(self._topology.vertex(owner), MemoryNode):
            route = Route.MEMORY
        elif any(isinstance(vertex, MemoryNode) for vertex in passed):
            route = Route.HOST_BRIDGE
        else:
            route = Route.BUS_ADDRESS
        return DmaRoute(route, self._routes.bandwidth_bytes_per_s(owner, device), self._routes.latency_s(owner, device))


def page_map_owners(topology: Topology) -> dict[str, str]:
    """dev_pagemap.owner of each device: the first device, in the file's order, of its model that links lead to without a host memory."""
    ways: dict[str, list[str]] = {}
    for link in topology.links:
        ways.setdefault(link.a, []).append(link.b)
        ways.setdefault(link.b, []).append(link.a)
    owners: dict[str, str] = {}
    for device in topology.devices:
        if device.name not in owners:
            for found in _reached(topology, ways, device.name):
                if found in topology.device_names and topology.device(found).model == device.model:
                    owners.setdefault(found, device.name)
    return owners


def _reached(topology: Topology, ways: Mapping[str, Sequence[str]], start: str) -> set[str]:
    """What links lead to from `start` without passing a host memory."""
    seen, left = {start}, [start]
    while left:
        for found in ways.get(left.pop(), ()):
            if found not in seen and not isinstance(topology.vertex(found), MemoryNode):
                seen.add(found)
                left.append(found)
    return seen


@dataclass(frozen=True)
class DmaDevice:
    """What of a device matters to DMA. `iova` are its I/O virtual addresses, in pages; None when no IOMMU stands before it.

    `needs_sync`: its accesses are not coherent with the CPU's caches (bounce buffers, or explicit flushes); `addressing_limited`: it
    does not reach all of memory. HMM can serve neither.
    """

    name: str
    iova: RunAllocator | None = None
    needs_sync: bool = False
    addressing_limited: bool = False


class DmaMap:
    """struct hmm_dma_map: a list of words, for hmm_range_fault to fill, with a DMA address for each that is mapped.

    `route_of` tells how the device reaches a zone (None: not at all).
    """

    def __init__(self, device: DmaDevice, entries: int, route_of: Callable[[int], Route | None]) -> None:
        """hmm_dma_map_alloc. Raises KernelError: EINVAL (no entries), EOPNOTSUPP (HMM cannot serve such a device), ENOMEM."""
        call = "hmm_dma_map_alloc"
        if entries <= 0:
            raise KernelError(errno.EINVAL, call, f"{entries} entries for device {device.name}")
        if device.needs_sync or device.addressing_limited:
            why = "needs bounce buffers or cache flushes" if device.needs_sync else "does not reach all of memory"
            raise KernelError(errno.EOPNOTSUPP, call, f"device {device.name} {why}; pages cannot be handed to it as they are")
        if entries > ENTRIES_MAX:
            raise KernelError(errno.ENOMEM, call, f"{entries} entries for device {device.name}; {ENTRIES_MAX} can be had")
        self.words: Words = np.zeros(entries, np.uint64)
        """HMM_PFN words; input and output of hmm_range_fault."""
        self.device = device
        self._route_of = route_of
        self._addresses: Words = np.zeros(entries, np.uint64)
        reserved = None if device.iova is None else device.iova.allocate(entries)
        if device.iova is not None and reserved is None:
            raise KernelError(errno.ENOMEM, call, f"device {device.name} has no {entries} pages of I/O virtual addresses left")
        self._iova: Words | None = None if reserved is None else reserved.frames

    def map(self, first: int, count: int) -> Words:
        """hmm_dma_map_pfn for `count` entries from `first` on: DMA addresses, `MAPPING_ERROR` for what is no page or cannot be reached.

        What is DMA_MAPPED already is left as it is, except that a bus address is looked up anew, as nothing is mapped for it.
        """
        part = slice(first, first + count)
        words = self.words[part]
        valid = words & word_of(HMM_PFN_VALID) != 0
        stays = valid & (words & word_of(HMM_PFN_DMA_MAPPED) != 0) & (words & word_of(HMM_PFN_P2PDMA_BUS) == 0)
        out = np.where(stays, self._addresses[part], word_of(MAPPING_ERROR))
        wanted = valid & ~stays
        words[wanted] &= ~word_of(FLAGS)
        frames = words & word_of(HMM_PFN_FRAME_MASK)
        zones = frames >> word_of(ZONE_SHIFT)
        for zone in distinct(zones[wanted]).tolist():
            route = self._route_of(zone)
            if route is None:
                continue
            here = wanted & (zones == zone)
            words[here] |= word_of(route.value)
            out[here] = self._addresses_of(route, frames[here], np.flatnonzero(here) + first)
        self._addresses[part] = out
        return out

    def _addresses_of(self, route: Route, frames: Words, entries: npt.NDArray[np.intp]) -> Words:
        if route is Route.BUS_ADDRESS:
            return frames << word_of(PAGE_SHIFT) | word_of(BUS_ADDRESS_BIT)
        at = frames if self._iova is None else self._iova[entries]
        return at << word_of(PAGE_SHIFT)

    def unmap(self, first: int, count: int) -> npt.NDArray[np.bool_]:
        """hmm_dma_unmap_pfn for `count` entries from `first` on; which of them were mapped."""
        words = self.words[first : first + count]
        mapped: npt.NDArray[np.bool_] = words & _VALID_DMA == _VALID_DMA
        words[mapped] &= ~word_of(FLAGS)
        self._addresses[first : first + count][mapped] = 0
        return mapped

    def bytes_by_route(self) -> dict[Route, int]:
        """How many bytes are mapped in each way."""
        bits = self.words & word_of(FLAGS)
        valid = self.words & word_of(HMM_PFN_VALID) != 0
        return {route: int(np.count_nonzero(valid & (bits == word_of(route.value)))) * PAGE_SIZE for route in Route}

    def free(self) -> None:
        """hmm_dma_map_free. Raises KernelError(EBUSY) while something is mapped: its addresses would go to somebody else."""
        left = int(np.count_nonzero(self.words & _VALID_DMA == _VALID_DMA))
        if left:
            raise KernelError(errno.EBUSY, "hmm_dma_map_free", f"device {self.device.name} still has {left} pages mapped")
        if self._iova is not None and self.device.iova is not None:
            self.device.iova.free(np.sort(self._iova))
            self._iova = None


class DeviceDma:
    """The maps of one device of a machine: every range that it has faulted is mapped for it, and what it moves is counted by way.

    `zone` is its own memory, for which it needs no map; `place_of` tells where on the links the memory of a zone lies (None: nowhere).
    """

    def __init__(self, device: str, zone: int, routes: DmaRoutes, place_of: Callable[[int], str | None]) -> None:
        self.moved = dict.fromkeys(Route, 0)
        """Bytes that it has read and written, by way."""
        self._device = DmaDevice(device)
        self._zone = zone
        self._routes = routes
        self._place_of = place_of

    def map(self, start: int, words: Words, *, fault: bool) -> Words:
        """The words of hmm_range_fault from page `start` on, with the marks of how each page is reached; own pages have none.

        Raises KernelError(EFAULT) for a page that was to be faulted in (`fault`) and that no link reaches.
        """
        if len(words) == 0:
            return words
        frames = words & word_of(HMM_PFN_FRAME_MASK)
        first, last = smallest(frames) >> ZONE_SHIFT, largest(frames) >> ZONE_SHIFT
        if first == last != self._zone and self._route_of(first) is Route.MEMORY:  # as below, for what is most common
            return words & ~word_of(FLAGS) | (words & word_of(HMM_PFN_VALID)) >> _TO_MAPPED
        made = DmaMap(self._device, len(words), self._route_of)
        own = frames >> word_of(ZONE_SHIFT) == word_of(self._zone)
        made.words[:] = np.where(own, word_of(0), words & ~word_of(FLAGS))
        addresses = made.map(0, len(words))
        beyond = (made.words & word_of(HMM_PFN_VALID) != 0) & (addresses == word_of(MAPPING_ERROR))
        if fault and beyond.any():
            page, frame = start + int(np.argmax(beyond)), int(frames[np.argmax(beyond)])
            why = f"page 0x{page:x} lies in the memory of {self._place_of(frame >> ZONE_SHIFT)}, to which no link leads"
            raise KernelError(errno.EFAULT, "hmm_dma_map_pfn", f"device {self._device.name}: {why}")
        return np.where(own, words, made.words)

    def count(self, frame: int, nbytes: int) -> None:
        """`nbytes` have gone to or from the memory that `frame` lies in."""
        route = self._route_of(frame >> ZONE_SHIFT)
        if route is not None:
            self.moved[route] += nbytes

    def _route_of(self, zone: int) -> Route | None:
        place = self._place_of(zone)
        found = None if place is None else self._routes.between(self._device.name, place)
        return None if found is None else found.route

    def as_json(self) -> dict[str, int]:
        """Plain data: bytes by way."""
        return {route.name.lower(): nbytes for route, nbytes in self.moved.items()}
