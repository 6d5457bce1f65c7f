"""The operations of the trace syntax, one registered function each.

To add one, write a function under ``@operation("USAGE")``: it gets the `Stage` it plays on and the parsed arguments, calls the process or
the handle, and returns the text after ``=>``. Kernel errors and signals need no handling: the player spells `KernelError` as ``ERR NAME``,
a `SegmentationFault` as ``SEGV``, a `BusError` as ``BUS``. Parser, counts and complaints follow from the usage.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hmmnet.errors import BusError, KernelError, SegmentationFault, SignalError
from hmmnet.pages import PAGE_SIZE
from hmmnet.program import Handle, Process

from .grammar import Usage
from .tokens import listed, page_token, page_tokens, pagemap_symbol, snapshot_symbol

REGIONS_BASE = 0x100_0000_0000
REGION_STRIDE = 0x800_0000
"""Regions lie 128 MiB apart, so they never merge and always have a hole behind them."""


@dataclass
class Region:
    """A named address range; it keeps base and size whatever is unmapped later."""

    base: int
    pages: int


@dataclass
class Stage:
    """What a script acts on: one process, its named regions and its open devices."""

    process: Process
    device_of: Callable[[int], str]
    """The device that has a unit number. Raises KernelError(ENOENT)."""
    regions: dict[str, Region] = field(default_factory=dict)
    handles: dict[str, Handle] = field(default_factory=dict)
    left_open: list[Handle] = field(default_factory=list)
    """Handles whose name was given to another: open until the process ends."""
    regions_made: int = 0

    def new_region(self, name: str, pages: int) -> Region:
        """Take the next place; it is taken whether or not the call that follows succeeds."""
        region = Region(REGIONS_BASE + self.regions_made * REGION_STRIDE, pages)
        self.regions_made += 1
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


Play = Callable[..., Awaitable[str]]


@dataclass(frozen=True)
class Entry:
    """A registered operation."""

    usage: Usage
    play: Play


OPERATIONS: dict[str, Entry] = {}


def operation(usage: str) -> Callable[[Play], Play]:
    """Register the decorated function under `usage` (see `grammar`)."""

    def register(play: Play) -> Play:
        parsed = Usage.of(usage)
        assert parsed.name not in OPERATIONS, f"operation {parsed.name} is registered twice"
        OPERATIONS[parsed.name] = Entry(parsed, play)
        return play

    return register


def usages() -> Mapping[str, Usage]:
    """The usage of every registered operation."""
    return {name: entry.usage for name, entry in OPERATIONS.items()}


def signal_word(error: SignalError) -> str:
    """The signal as a result line spells it."""
    if isinstance(error, BusError):
        return "BUS"
    assert isinstance(error, SegmentationFault)
    return "SEGV"


def pattern(value: int, pages: int) -> npt.NDArray[np.uint8]:
    """What `fill` and `dwrite` store: every byte of page *i* is ``(value + i) & 255``."""
    return np.repeat((value + np.arange(pages)).astype(np.uint8), PAGE_SIZE)


# --- address space ----------------------------------------------------------------------------------------------------------------


@operation("mmap NAME n [PROT]")
async def mmap(stage: Stage, name: str, pages: int, protection: str) -> str:
    """MAP_PRIVATE | MAP_ANONYMOUS at the region's place."""
    region = stage.new_region(name, pages)
    await stage.process.mmap(pages * PAGE_SIZE, protection, region.base)
    return "ok"


@operation("hole NAME n")
async def hole(stage: Stage, name: str, pages: int) -> str:
    """A name for addresses that nothing is mapped at."""
    stage.new_region(name, pages)
    return "ok"


@operation("munmap R p n")
async def munmap(stage: Stage, region: str, page: int, pages: int) -> str:
    """munmap(2)."""
    await stage.process.munmap(stage.address(region, page), pages * PAGE_SIZE)
    return "ok"


@operation("mprotect R p n PROT")
async def mprotect(stage: Stage, region: str, page: int, pages: int, protection: str) -> str:
    """mprotect(2)."""
    await stage.process.mprotect(stage.address(region, page), pages * PAGE_SIZE, protection)
    return "ok"


@operation("madvise R p n ADVICE")
async def madvise(stage: Stage, region: str, page: int, pages: int, advice: str) -> str:
    """madvise(2)."""
    await stage.process.madvise(stage.address(region, page), pages * PAGE_SIZE, advice)
    return "ok"


# --- CPU access -------------------------------------------------------------------------------------------------------------------


@operation("write R p off val")
async def write(stage: Stage, region: str, page: int, offset: int, value: int) -> str:
    """Store one byte."""
    await stage.process.write(stage.address(region, page) + offset, bytes([value]))
    return "ok"


@operation("read R p off")
async def read(stage: Stage, region: str, page: int, offset: int) -> str:
    """Load one byte."""
    return f"ok {(await stage.process.read(stage.address(region, page) + offset, 1))[0]:02x}"


@operation("fill R p n val")
async def fill(stage: Stage, region: str, page: int, pages: int, value: int) -> str:
    """Store whole pages one by one; a page that faults is counted and passed over."""
    data = pattern(value, pages).reshape(pages, PAGE_SIZE)
    failed = 0
    word = ""
    for i in range(pages):
        try:
            await stage.process.write(stage.address(region, page + i), data[i])
        except SignalError as error:
            failed += 1
            word = word or signal_word(error)
    return f"{word} wrote={pages - failed} failed={failed}" if failed else "ok"


@operation("sum R p [n]")
async def sum_pages(stage: Stage, region: str, page: int, pages: int) -> str:
    """Load whole pages one by one and tell what they hold."""
    tokens: list[str] = []
    for i in range(pages):
        try:
            tokens.append(page_token(await stage.process.read(stage.address(region, page + i), PAGE_SIZE)))
        except SignalError as error:
            tokens.append(signal_word(error))
    return listed(tokens)


@operation("pte R p [n]")
async def pte(stage: Stage, region: str, page: int, pages: int) -> str:
    """/proc/self/pagemap, which touches nothing."""
    return listed([pagemap_symbol(value) for value in await stage.process.pagemap(stage.address(region, page), pages)])


# --- device (test_hmm ioctls) -----------------------------------------------------------------------------------------------------


@operation("open NAME unit")
async def open_device(stage: Stage, name: str, unit: int) -> str:
    """Open /dev/hmm_dmirrorUNIT."""
    handle = await stage.process.open(stage.device_of(unit))
    if name in stage.handles:
        stage.left_open.append(stage.handles[name])
    stage.handles[name] = handle
    return "ok"


@operation("close D")
async def close_device(stage: Stage, name: str) -> str:
    """close(2): the last reference evicts the unit's memory."""
    handle = stage.handle(name)
    del stage.handles[name]
    await handle.close()
    return "ok"


@operation("dread D R p [n]")
async def device_read(stage: Stage, name: str, region: str, page: int, pages: int) -> str:
    """HMM_DMIRROR_READ."""
    done = await stage.handle(name).ioctl("read", stage.address(region, page), pages)
    return f"ok cpages={done.cpages} faults={done.faults} {listed(page_tokens(done.data))}"


@operation("dwrite D R p n val")
async def device_write(stage: Stage, name: str, region: str, page: int, pages: int, value: int) -> str:
    """HMM_DMIRROR_WRITE."""
    data = pattern(value, pages).tobytes()
    done = await stage.handle(name).ioctl("write", stage.address(region, page), pages, data)
    return f"ok cpages={done.cpages} faults={done.faults}"


@operation("todev D R p [n]")
async def migrate_to_device(stage: Stage, name: str, region: str, page: int, pages: int) -> str:
    """HMM_DMIRROR_MIGRATE_TO_DEV; the driver reads the range back through its mirror."""
    done = await stage.handle(name).ioctl("migrate_to_dev", stage.address(region, page), pages)
    return f"ok cpages={done.cpages} {listed(page_tokens(done.data))}"


@operation("tosys D R p [n]")
async def migrate_to_system(stage: Stage, name: str, region: str, page: int, pages: int) -> str:
    """HMM_DMIRROR_MIGRATE_TO_SYS."""
    done = await stage.handle(name).ioctl("migrate_to_sys", stage.address(region, page), pages)
    return f"ok cpages={done.cpages}"


@operation("snap D R p [n]")
async def snapshot(stage: Stage, name: str, region: str, page: int, pages: int) -> str:
    """HMM_DMIRROR_SNAPSHOT; never faults."""
    done = await stage.handle(name).ioctl("snapshot", stage.address(region, page), pages)
    return f"ok cpages={done.cpages} {listed([snapshot_symbol(value) for value in done.data])}"


@operation("release D")
async def release(stage: Stage, name: str) -> str:
    """HMM_DMIRROR_RELEASE: evict and unplug the unit's memory."""
    await stage.handle(name).ioctl("release", 0, 0)
    return "ok"
