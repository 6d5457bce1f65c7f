"""DMA maps: three kinds of route with what each gives, sticky marks, what cannot be served (semantics A8).

                node0 ── sw0 ── a        a and b: below one switch, bus address
                  │       └──── b        a and c: through the host bridge
                  └── c                  c and node0: ordinary memory

Oracle: mm/hmm.c, drivers/pci/p2pdma.c.
"""

from __future__ import annotations

import errno

import numpy as np
import pytest

from hmmnet.errors import KernelError
from hmmnet.host.dma_map import BUS_ADDRESS_BIT, ENTRIES_MAX, MAPPING_ERROR, DeviceDma, DmaDevice, DmaMap, DmaRoutes, Route
from hmmnet.pages import (
    HMM_PFN_DMA_MAPPED,
    HMM_PFN_FRAME_MASK,
    HMM_PFN_P2PDMA,
    HMM_PFN_P2PDMA_BUS,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    PAGE_SHIFT,
    PAGE_SIZE,
    ZONE_SHIFT,
)
from hmmnet.runs import RunAllocator
from hmmnet.topology import DeviceSpec, LinkSpec, MemoryNode, Switch, Topology

VALID = np.uint64(HMM_PFN_VALID)
ROUTES = {0: Route.MEMORY, 64: Route.HOST_BRIDGE, 65: Route.BUS_ADDRESS}
MEMORY, BRIDGED, BUS, FAR = 5, (64 << ZONE_SHIFT) + 7, (65 << ZONE_SHIFT) + 9, (66 << ZONE_SHIFT) + 1


def link(a: str, b: str, bandwidth: float, latency: float) -> LinkSpec:
    return LinkSpec(f"{a}-{b}", a, b, "pcie", bandwidth, latency)


MACHINE = Topology(
    "p2p",
    "",
    (MemoryNode("node0", 1 << 30),),
    tuple(DeviceSpec(name, "gpu", 1 << 20) for name in "abcd"),
    (Switch("sw0"),),
    (link("node0", "sw0", 16e9, 500e-9), link("sw0", "a", 32e9, 100e-9), link("sw0", "b", 32e9, 100e-9), link("node0", "c", 8e9, 300e-9)),
)


def dma_map(entries: int = 4, iova: RunAllocator | None = None) -> DmaMap:
    made = DmaMap(DmaDevice("a", iova), entries, ROUTES.get)
    made.words[:4] = np.array([MEMORY, BRIDGED, BUS, FAR], np.uint64) | VALID
    return made


def test_the_way_depends_on_what_lies_between() -> None:
    """Kind, bottleneck and latency of each; no way at all to a device that no link reaches."""
    routes = DmaRoutes(MACHINE)
    memory, bus, bridge = routes.between("a", "node0"), routes.between("a", "b"), routes.between("a", "c")
    assert memory is not None
    assert bus is not None
    assert bridge is not None
    assert (memory.route, memory.bandwidth_bytes_per_s) == (Route.MEMORY, 16e9)
    assert (bus.route, bus.bandwidth_bytes_per_s) == (Route.BUS_ADDRESS, 32e9)
    assert (bridge.route, bridge.bandwidth_bytes_per_s) == (Route.HOST_BRIDGE, 8e9)
    assert bus.latency_s < memory.latency_s < bridge.latency_s
    assert routes.between("a", "d") is None
    assert routes.between("a", "b") is bus


def test_each_kind_of_page_gets_its_address_and_its_marks() -> None:
    """I/O virtual addresses for what the IOMMU maps, a bus address for the peer below the switch, an error for what is out of reach."""
    iova = RunAllocator(1 << 20, 100)
    made = dma_map(iova=iova)
    addresses = made.map(0, 4).tolist()
    assert addresses == [1 << 20 << PAGE_SHIFT, (1 << 20) + 1 << PAGE_SHIFT, BUS << PAGE_SHIFT | BUS_ADDRESS_BIT, MAPPING_ERROR]
    marks = [word & ~HMM_PFN_FRAME_MASK for word in made.words.tolist()]
    assert marks == [
        HMM_PFN_VALID | HMM_PFN_DMA_MAPPED,
        HMM_PFN_VALID | HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA,
        HMM_PFN_VALID | HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA_BUS,
        HMM_PFN_VALID,
    ]
    assert made.bytes_by_route() == dict.fromkeys(Route, PAGE_SIZE)
    assert made.unmap(0, 4).tolist() == [True, True, True, False]
    assert made.unmap(0, 4).tolist() == [False] * 4
    assert (made.words == np.array([MEMORY, BRIDGED, BUS, FAR], np.uint64) | VALID).all()
    made.free()
    assert iova.used_count == 0


def test_what_is_mapped_stays_mapped() -> None:
    """A second fault adds the right to write; the mark is kept, so the address is the same, whatever the route would be by now."""
    made = dma_map()
    before = made.map(0, 3).tolist()
    assert before[0] == MEMORY << PAGE_SHIFT, "without an IOMMU it is the physical address"
    made.words[:3] |= np.uint64(HMM_PFN_WRITE)
    made._route_of = lambda zone: None  # nothing could be mapped anew
    assert made.map(0, 2).tolist() == before[:2]
    assert made.map(2, 1).tolist() == [MAPPING_ERROR], "a bus address is not mapped, so it is looked up each time"
    assert not made.words[2] & np.uint64(HMM_PFN_DMA_MAPPED)


def test_what_is_no_page_is_not_mapped() -> None:
    """An empty entry, and one that hmm_range_fault did not fill."""
    made = DmaMap(DmaDevice("a"), 2, ROUTES.get)
    made.words[1] = np.uint64(MEMORY)
    assert made.map(0, 2).tolist() == [MAPPING_ERROR] * 2
    assert not made.unmap(0, 2).any()


@pytest.mark.parametrize(
    ("device", "entries", "code", "words"),
    [
        (DmaDevice("a"), 0, errno.EINVAL, "0 entries"),
        (DmaDevice("a", needs_sync=True), 1, errno.EOPNOTSUPP, "bounce buffers"),
        (DmaDevice("a", addressing_limited=True), 1, errno.EOPNOTSUPP, "does not reach"),
        (DmaDevice("a"), ENTRIES_MAX + 1, errno.ENOMEM, "can be had"),
        (DmaDevice("a", RunAllocator(0, 3)), 4, errno.ENOMEM, "I/O virtual"),
    ],
)
def test_maps_that_cannot_be_made(device: DmaDevice, entries: int, code: int, words: str) -> None:
    """Each with its errno, and a text that names device and cause."""
    with pytest.raises(KernelError, match=words) as caught:
        DmaMap(device, entries, ROUTES.get)
    assert caught.value.code == code
    assert "device a" in caught.value.why


def test_a_map_in_use_is_not_freed() -> None:
    """Its I/O virtual addresses would be given to somebody else while the device still uses them."""
    made = dma_map(iova=RunAllocator(0, 4))
    made.map(0, 1)
    with pytest.raises(KernelError, match="still has 1 pages mapped"):
        made.free()
    made.unmap(0, 1)
    made.free()
    made.free()


def device_dma(*unreachable: int) -> DeviceDma:
    """The maps of device a, whose own memory is zone 67; b is zone 65, c zone 64."""
    places = {0: "node0", 64: "c", 65: "b", 66: "d"}
    return DeviceDma("a", 67, DmaRoutes(MACHINE), lambda zone: None if zone in unreachable else places.get(zone))


def test_what_a_device_is_told_of_a_range_says_how_it_is_reached() -> None:
    """Marks of each kind, none for its own pages and for what is no page; stale marks of the input count for nothing."""
    own = (67 << ZONE_SHIFT) + 3
    stale = np.uint64(HMM_PFN_P2PDMA_BUS | HMM_PFN_DMA_MAPPED)
    words = np.array([MEMORY, BRIDGED, BUS, own, 0], np.uint64) | np.array([VALID | stale, VALID, VALID, VALID, 0], np.uint64)
    got = device_dma().map(7, words, fault=True).tolist()
    assert [word & ~HMM_PFN_FRAME_MASK for word in got] == [
        HMM_PFN_VALID | HMM_PFN_DMA_MAPPED,
        HMM_PFN_VALID | HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA,
        HMM_PFN_VALID | HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA_BUS,
        HMM_PFN_VALID,
        0,
    ]
    assert [word & HMM_PFN_FRAME_MASK for word in got] == [MEMORY, BRIDGED, BUS, own, 0]
    plain = np.array([MEMORY, MEMORY + 1, 0], np.uint64) | np.array([VALID | HMM_PFN_WRITE, VALID | stale, 0], np.uint64)
    assert [word & ~HMM_PFN_FRAME_MASK for word in device_dma().map(0, plain, fault=True).tolist()] == [
        HMM_PFN_VALID | HMM_PFN_WRITE | HMM_PFN_DMA_MAPPED,
        HMM_PFN_VALID | HMM_PFN_DMA_MAPPED,
        0,
    ]


def test_nothing_is_mapped_as_nothing() -> None:
    """A range of which others had taken all pages back."""
    assert len(device_dma().map(0, np.zeros(0, np.uint64), fault=False)) == 0


def test_a_page_that_no_link_reaches_is_efault_to_who_faults_it() -> None:
    """It names page, place and device; a snapshot has it without an address; nothing is counted for it."""
    maps = device_dma()
    words = np.array([MEMORY, FAR], np.uint64) | VALID
    with pytest.raises(KernelError, match="page 0x8 lies in the memory of d, to which no link leads") as caught:
        maps.map(7, words, fault=True)
    assert caught.value.code == errno.EFAULT
    assert [word & ~HMM_PFN_FRAME_MASK for word in maps.map(7, words, fault=False).tolist()] == [
        HMM_PFN_VALID | HMM_PFN_DMA_MAPPED,
        HMM_PFN_VALID,
    ]
    for frame, nbytes in ((MEMORY, 8), (BRIDGED, 16), (BUS, 32), (FAR, 64), (MEMORY, 128)):
        maps.count(frame, nbytes)
    assert maps.as_json() == {"memory": 136, "host_bridge": 16, "bus_address": 32}
