"""What a script acts on: processes that fork and end, each with named regions and open devices, and the pages that the recorder holds."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field

from hmmnet.errors import KernelError
from hmmnet.pages import PAGE_SIZE
from hmmnet.program import Handle, MemoryFile, PageReferences, Process

REGIONS_BASE = 0x100_0000_0000
REGION_STRIDE = 0x800_0000
"""Regions lie 128 MiB apart, so they never merge and always have a hole behind them."""


@dataclass
class Region:
    """A named address range; it keeps base and size whatever is unmapped later."""

    base: int
    pages: int


@dataclass
class Scene:
    """What one process of a script has: regions and open devices by name."""

    process: Process
    regions: dict[str, Region] = field(default_factory=dict)
    handles: dict[str, Handle] = field(default_factory=dict)
    files: dict[str, MemoryFile] = field(default_factory=dict)
    regions_made: int = 0

    def child(self, process: Process) -> Scene:
        """The same for `process`, which this one has forked."""
        regions = {name: Region(region.base, region.pages) for name, region in self.regions.items()}
        handles = {name: process.handles[handle.number] for name, handle in self.handles.items()}
        return Scene(process, regions, handles, dict(self.files), self.regions_made)


class Stage:
    """What a script acts on: the innermost process of its forks. `device_of` finds a device by unit (KernelError ENOENT)."""

    def __init__(self, process: Process, device_of: Callable[[int], str]) -> None:
        self.device_of = device_of
        self.scenes = [Scene(process)]
        self.pinned: PageReferences | None = None
        """The recorder's one pin set."""
        self.referenced: list[PageReferences] = []
        """What lies in the recorder's pipe."""

    @property
    def scene(self) -> Scene:
        """The process that acts now."""
        return self.scenes[-1]

    @property
    def process(self) -> Process:
        """The process that acts now."""
        return self.scene.process

    @property
    def regions(self) -> dict[str, Region]:
        """Its regions."""
        return self.scene.regions

    @property
    def handles(self) -> dict[str, Handle]:
        """Its open devices. One whose name was given to another stays open until the process ends."""
        return self.scene.handles

    @property
    def files(self) -> dict[str, MemoryFile]:
        """Its files."""
        return self.scene.files

    async def end(self) -> None:
        """The script is over: what it holds is let go, its processes end, the innermost first."""
        for held in (self.pinned, *self.referenced):
            if held is not None:
                await held.put()
        while self.scenes:
            await self.scenes.pop().process.exit()

    def new_region(self, name: str, pages: int) -> Region:
        """Take the next place; it is taken whether or not the call that follows succeeds."""
        region = Region(REGIONS_BASE + self.scene.regions_made * REGION_STRIDE, pages)
        self.scene.regions_made += 1
        self.regions[name] = region
        return region

    def address(self, region: str, page: int) -> int:
        """The byte address of a page of a region; it may lie outside on purpose."""
        return self.regions[region].base + page * PAGE_SIZE

    def handle(self, name: str) -> Handle:
        """The open device called `name`. Raises KernelError(EBADF) when it is closed."""
        handle = self.handles.get(name)
        if handle is None:
            raise KernelError(errno.EBADF, "ioctl", f"device {name} is not open")
        return handle
