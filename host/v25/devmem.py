"""hmm_devmem and hmm_device: device memory that a driver in the host hotplugs, as v25 had it (mm/hmm.c of Linux 4.14).

*Private* memory (`hmm_devmem_add`) has no place in the physical address space, so a range is taken from its top: here a zone, counted from
the highest down, while devices that connect take theirs from the lowest up. The bytes are the driver's own affair. *Public* memory
(`hmm_devmem_add_resource`) is there already, described by a resource, and the CPU reaches it in place; it is the ancestor of today's
coherent memory. An idle page has one reference; the put that brings it back to one calls the driver's `free`.

An `HmmDevice` is a device that is none: a parent under which a driver hangs several memories.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Any, Protocol

import numpy as np
import trio

from hmmnet.arena import Arena
from hmmnet.errors import BusError, KernelError, OutOfMemory
from hmmnet.host.devmem import Holder, PageMap
from hmmnet.host.interfaces import AddressSpace
from hmmnet.host.mm import pte
from hmmnet.host.mm.frames import PhysicalMemory
from hmmnet.host.mm.space import Space
from hmmnet.host.mm.zones import CpuZone, HostZone, Zone
from hmmnet.pages import DEVICE_ZONE_MIN, HUGE_PAGES, PAGE_SHIFT, ZONE_SHIFT, ZONES_MAX, Words, zone_of

from .migrate import MigrateVmaOps, migrate_vma
from .mirror import VmArea, find_vma

HMM_DEVICE_MAX = 256
SECTION_PAGES = 1 << (27 - PAGE_SHIFT)
"""PA_SECTION_SIZE, 128 MiB: memory is hotplugged in whole sections."""
ZONE_PAGES_MAX = 1 << ZONE_SHIFT


class Desc(IntEnum):
    """enum iores_desc, as far as it matters here."""

    NONE = 0
    DEVICE_PRIVATE_MEMORY = 6
    DEVICE_PUBLIC_MEMORY = 7


class VmFault(IntFlag):
    """What a driver's `fault` answers."""

    NONE = 0
    OOM = 1
    SIGBUS = 2


@dataclass(frozen=True)
class Resource:
    """struct resource: `pages` frames from `start` on, of a kind. `arena` are the bytes, where the CPU reaches them."""

    start: int
    pages: int
    desc: Desc
    arena: Arena | None = None


class HmmDevmemOps(Protocol):
    """struct hmm_devmem_ops."""

    def free(self, devmem: HmmDevmem, page: int) -> None:
        """The last reference to the page (a frame number) but its own is gone. May be called from anywhere; must not wait."""
        ...

    def fault(self, devmem: HmmDevmem, vma: VmArea, address: int, page: int, flags: int, pmd: int) -> Awaitable[VmFault] | VmFault:
        """A CPU touched `address`, whose page is private memory: bring it home (`migrate_vma`). `pmd` is where its page table begins."""
        ...


@dataclass(eq=False)
class HmmDevice:
    """struct hmm_device: a parent for memories. `minor` is its number, `drvdata` the driver's."""

    minor: int
    drvdata: Any = None
    released: bool = False

    @property
    def name(self) -> str:
        """What it is called."""
        return f"hmm_device{self.minor}"


class HmmDevmem:
    """struct hmm_devmem: memory that was added. Its pages are frames [`pfn_first`, `pfn_last`]."""

    def __init__(self, ops: HmmDevmemOps, device: HmmDevice, memory: PhysicalMemory, zone: int, resource: Resource) -> None:
        self.ops = ops
        self.device = device
        self.resource = resource
        self.name = f"{device.name} memory {zone}"
        self.zone = zone
        self.kind = "coherent" if resource.desc is Desc.DEVICE_PUBLIC_MEMORY else "private"
        self.removed = False
        self._page_map = PageMap(memory, self, resource.pages, resource.arena)
        self._page_map.zone.offered = resource.pages
        self._page_map.zone.on_touch = self._touched
        self._freed = trio.Event()

    @property
    def pfn_first(self) -> int:
        """Its first frame."""
        return self.resource.start

    @property
    def pfn_last(self) -> int:
        """Its last frame."""
        return self.resource.start + self.resource.pages - 1

    def page_count(self, page: int) -> int:
        """References of a page: 1 while it is idle."""
        return int(self._page_map.zone.page_counts(slice(page - self.pfn_first, page - self.pfn_first + 1))[0])

    @property
    def used_pages(self) -> int:
        """Pages that are not idle."""
        return self._page_map.used_pages

    def holders(self) -> Iterator[Holder]:
        """Who keeps a page from being free."""
        return self._page_map.holders()

    def free_frames(self, frames: Words) -> None:
        """put_zone_device_private_or_public_page for pages whose references fell to one."""
        for frame in frames.tolist():
            self.ops.free(self, frame)
        freed, self._freed = self._freed, trio.Event()
        freed.set()

    def free_frame(self, frame: int) -> None:
        """The same for one page."""
        self.free_frames(np.array([frame], np.uint64))

    async def all_free(self) -> None:
        """Return when every page is idle."""
        while self.used_pages:
            await self._freed.wait()

    def remove(self) -> None:
        """The memory is gone; no page of it is in use."""
        self.removed = True
        self._page_map.remove()

    async def _touched(self, space: Space, pages: Words) -> None:
        """A CPU touched private `pages`: call `fault` for each that is still here. Raises BusError, KernelError(ENOMEM)."""
        for page in pages.tolist():
            entry = int(space.entries(np.array([page], np.uint64))[0])
            vma = find_vma(space, page << PAGE_SHIFT)
            if vma is None or entry & pte.KIND != pte.DEVICE or zone_of(entry >> pte.FRAME_SHIFT) != self.zone:
                continue
            address = page << PAGE_SHIFT
            answer = self.ops.fault(self, vma, address, entry >> pte.FRAME_SHIFT, 0, page // HUGE_PAGES * HUGE_PAGES << PAGE_SHIFT)
            result = answer if isinstance(answer, int) else await answer
            if result & VmFault.SIGBUS:
                raise BusError(address, f"the driver of {self.name} cannot bring page 0x{page:x} of process {space.number} home")
            if result & VmFault.OOM:
                raise KernelError(errno.ENOMEM, "devmem fault", f"the driver of {self.name} finds no memory for page 0x{page:x}")


@dataclass(eq=False)
class Kernel:
    """What a v25 kernel exports beyond the calls on one address space: memory, devices, migration.

    `attach` and `detach` connect public memory to the links, so that devices reach it, too.
    """

    memory: PhysicalMemory
    spaces: Mapping[int, AddressSpace]
    attach: Callable[[CpuZone], None] = lambda _: None
    detach: Callable[[Zone], None] = lambda _: None
    devices: dict[int, HmmDevice] = field(default_factory=dict)

    # --- devices --------------------------------------------------------------------------------------------------------------

    def hmm_device_new(self, drvdata: Any = None) -> HmmDevice:
        """A parent for memories. Raises KernelError(EBUSY) when there are 256."""
        minor = next((number for number in range(HMM_DEVICE_MAX) if number not in self.devices), None)
        if minor is None:
            raise KernelError(errno.EBUSY, "hmm_device_new", f"there are {HMM_DEVICE_MAX} hmm_devices already")
        made = self.devices[minor] = HmmDevice(minor, drvdata)
        return made

    def hmm_device_put(self, device: HmmDevice) -> None:
        """Its number is free again. Raises KernelError(EINVAL) when it was put already."""
        if self.devices.get(device.minor) is not device:
            raise KernelError(errno.EINVAL, "hmm_device_put", f"{device.name} was put already")
        device.released = True
        del self.devices[device.minor]

    # --- memory ---------------------------------------------------------------------------------------------------------------

    def hmm_devmem_add(self, ops: HmmDevmemOps, device: HmmDevice, size: int) -> HmmDevmem:
        """Hotplug `size` bytes (rounded up to sections of 128 MiB) of private memory.

        Raises KernelError: EINVAL (no size; a device that was put), ERANGE (no room in the physical address space), ENOMEM, ENXIO and EBUSY
        as `hmm_devmem_add_resource`.
        """
        call = "hmm_devmem_add"
        if size <= 0:
            raise KernelError(errno.EINVAL, call, f"{size} bytes are no memory")
        pages = -(-size // (SECTION_PAGES << PAGE_SHIFT)) * SECTION_PAGES
        zone = next((number for number in range(ZONES_MAX - 1, DEVICE_ZONE_MIN - 1, -1) if number not in self.memory.zones), None)
        if zone is None or pages > ZONE_PAGES_MAX:
            raise KernelError(errno.ERANGE, call, f"the physical address space has no room for {size} bytes")
        return self._create(ops, device, Resource(zone << ZONE_SHIFT, pages, Desc.DEVICE_PRIVATE_MEMORY), call)

    def hmm_devmem_add_resource(self, ops: HmmDevmemOps, device: HmmDevice, resource: Resource) -> HmmDevmem:
        """Hotplug memory that the CPU reaches in place.

        Raises KernelError: EINVAL (not of the device-public kind, without bytes, or not the start of a zone), ENXIO (it is the host's own
        memory), EBUSY (a device has it), ERANGE (it leaves the physical address space), ENOMEM.
        """
        call = "hmm_devmem_add_resource"
        if resource.desc is not Desc.DEVICE_PUBLIC_MEMORY or resource.arena is None:
            raise KernelError(
                errno.EINVAL, call, f"the resource is of kind {resource.desc.name}; DEVICE_PUBLIC_MEMORY, with bytes, is wanted"
            )
        if resource.start & ZONE_PAGES_MAX - 1 or resource.pages <= 0 or resource.arena.count < resource.pages:
            raise KernelError(errno.EINVAL, call, f"frame 0x{resource.start:x} + {resource.pages} pages are not the beginning of a memory")
        if zone_of(resource.start) >= ZONES_MAX or resource.pages > ZONE_PAGES_MAX:
            raise KernelError(errno.ERANGE, call, f"frame 0x{resource.start:x} + {resource.pages} pages leave the physical address space")
        made = self._create(ops, device, resource, call)
        zone = self.memory.zones[made.zone]
        assert isinstance(zone, CpuZone), "public memory has bytes"
        self.attach(zone)
        return made

    def _create(self, ops: HmmDevmemOps, device: HmmDevice, resource: Resource, call: str) -> HmmDevmem:
        """hmm_devmem_pages_create."""
        zone = zone_of(resource.start)
        if device.released:
            raise KernelError(errno.EINVAL, call, f"{device.name} was put; a device that is there is wanted")
        if zone < DEVICE_ZONE_MIN or isinstance(self.memory.zones.get(zone), HostZone):
            raise KernelError(errno.ENXIO, call, f"frame 0x{resource.start:x} is the host's own memory")
        if zone in self.memory.zones:
            raise KernelError(errno.EBUSY, call, f"frame 0x{resource.start:x} is memory of {self.memory.zones[zone].owner}")
        try:
            return HmmDevmem(ops, device, self.memory, zone, resource)
        except (OSError, MemoryError) as error:
            why = f"there is no room for the struct pages of {resource.pages} pages: {error}"
            raise KernelError(errno.ENOMEM, call, why) from error

    async def hmm_devmem_remove(self, devmem: HmmDevmem) -> None:
        """Wait until every page is free (`HmmDevmem.holders` says who keeps some), then take the memory away.

        Raises KernelError(EINVAL) when that was done before.
        """
        if devmem.removed:
            raise KernelError(errno.EINVAL, "hmm_devmem_remove", f"{devmem.name} was removed already")
        await devmem.all_free()
        self.detach(self.memory.zones[devmem.zone])
        devmem.remove()

    # --- migration ------------------------------------------------------------------------------------------------------------

    async def migrate_vma(
        self, ops: MigrateVmaOps, vma: VmArea | None, start: int, end: int, src: Words, dst: Words, private: Any = None
    ) -> None:
        """See `migrate.migrate_vma`."""
        await migrate_vma(ops, vma, start, end, src, dst, private, self.spaces)

    def alloc_page_vma(self, vma: VmArea) -> int:
        """A zeroed, locked page of system memory for a driver to bring one home to. Raises KernelError(ENOMEM)."""
        got = self.memory.allocate(1, vma.mm.node)
        if got is None:
            raise OutOfMemory(errno.ENOMEM, "alloc_page_vma", "the host's memory is used up")
        return int(got[0])

    def put_page(self, page: int) -> None:
        """A page of `alloc_page_vma` that was not needed."""
        self.memory.put_one(page)

    def read_page(self, page: int) -> bytes:
        """The bytes of a page that the CPU reaches: what a copy engine would fetch."""
        return self.memory.read_small(page, 0, 1 << PAGE_SHIFT)

    def write_page(self, page: int, data: bytes) -> None:
        """Store the bytes of a page that the CPU reaches."""
        self.memory.write_small(page, 0, data)
