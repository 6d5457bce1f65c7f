"""What migration and mirroring cost per page when nothing is copied: the probe of ``hmmnet bench``.

The whole path from setup to finalize, with a device link that is a plain object and moves no byte; of small pages, and of huge ones that
migrate as one (SELECT_COMPOUND). Found through the entry point
``bookkeeping`` of group ``hmmnet.bench``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import trio

from hmmnet.observe.counters import Profile
from hmmnet.pages import HUGE_PAGES, LARGE, PAGE_SHIFT, PAGE_SIZE, ZONE_SHIFT, Words, word_of

from .devmem import PageMap
from .homing import Homing
from .hub import Hub
from .interfaces import Destination, DeviceLink, Event, Select
from .iommu import Domain
from .migrate import Grant, Outcome, migrate_to_device
from .mm.filemap import File
from .mm.frames import PhysicalMemory
from .mm.space import Space
from .mm.vma import VM_HUGEPAGE

SIZES = (1 << 12, 1 << 16, 1 << 18)
OTHERS = ("shared", "cow", "file")
"""Memory that is not one process's own anonymous pages: what a child of fork maps too; has copied half of; copies of a file's pages."""
ZONE = 64
CHILD = 2
ROUNDS_MIN, ROUNDS_MAX = 5, 31
ROUNDS_PAGES = 1 << 19
"""Pages moved in all rounds of one size, about: small sizes get more rounds."""
POPULATE_PAGES = 1 << 12
RUN_PAGES = 8
"""Neighbours that a child has copied, and not copied, in turn."""
HUGE_BYTES = HUGE_PAGES * PAGE_SIZE
NS = 1e9


class CopylessLink:
    """A device that has every page at once."""

    name = "probe"
    zone = ZONE
    kind = "private"
    node = 0

    def invalidate_start(self, context: int, subscription: int, start: int, end: int, event: Event, owner: int, sequence: int) -> None:
        """Nothing to drop."""

    async def copy_in(self, source_frames: Words, target_frames: Words, zero_frames: Words) -> None:
        """Nothing to copy."""

    async def copy_out(self, context: int, pages: Words, frames: Words, destination: Destination) -> None:  # noqa: ARG002 - DeviceLink's
        """Nothing to copy, but somewhere to copy it to."""
        destination.frames()

    async def fetch(self, context: int, page: int, frame: int, allocate: Callable[[], int]) -> None:  # noqa: ARG002 - DeviceLink's
        """Nothing to copy, but somewhere to copy it to."""
        allocate()

    async def answers_apart(self, node: int, answers: int) -> None:
        """No way takes any time."""

    def no_large(self, context: int) -> bool:  # noqa: ARG002 - DeviceLink's
        """Large pages can be had."""
        return False

    def free_frames(self, frames: Words) -> None:
        """Nothing to keep."""

    def free_frame(self, frame: int) -> None:
        """Nothing to keep."""


def measure(sizes: tuple[int, ...] = SIZES) -> dict[str, dict[int, float]]:
    """Pages -> nanoseconds a page, medians over rounds.

    ``snapshot`` and ``migrate`` (there and back, halved); ``thp`` is ``migrate`` of whole huge pages, of which ``thp_to_device`` and
    ``thp_to_host`` are the two ways. The same of other memory: ``shared`` with a child of fork, ``cow`` half of which
    the child has copied, and ``file``, written pages of a private file mapping, each with its ``snapshot``. ``fork`` is what that takes.
    """
    return trio.run(_measure, sizes)


async def _measure(sizes: tuple[int, ...]) -> dict[str, dict[int, float]]:
    memory = PhysicalMemory()
    memory.add_node("host", 5 * max(sizes) + POPULATE_PAGES + HUGE_PAGES)
    link = CopylessLink()
    page_map = PageMap(memory, link, max(sizes))
    links: dict[int, DeviceLink] = {ZONE: link}
    spaces: dict[int, Space] = {}
    homing = Homing(memory, links, spaces, lambda _process, _zone: 0, Profile(), time.monotonic)
    space = spaces[1] = Space(1, memory, Hub(), homing.migrate_to_ram)
    found: dict[str, dict[int, float]] = {name: {} for name in ("snapshot", "migrate", "thp", "thp_to_device", "thp_to_host")}
    found |= {name: {} for kind in OTHERS for name in (kind, f"snapshot_{kind}")}
    found["fork"] = {}
    for pages in sizes:
        small = await _populated(space, pages)
        found["fork"][pages] = await _fork(space) / pages * NS
        huge = await _populated(space, pages, VM_HUGEPAGE) if pages % HUGE_PAGES == 0 else None
        taken: dict[str, list[float]] = {name: [] for name in found}
        for lap in range(1 + _rounds(pages)):
            figures = {"snapshot": await _snapshot(space, small, pages)}
            figures["migrate"] = sum(await _there_and_back(space, page_map, homing, link, small, pages)) / 2
            if huge is not None:
                out, home = await _there_and_back(space, page_map, homing, link, huge, pages, compound=True)
                figures |= {"thp": (out + home) / 2, "thp_to_device": out, "thp_to_host": home}
            for name, seconds in figures.items() if lap else ():  # the first lap touches the tables for the first time
                taken[name].append(seconds)
        for name, times in taken.items():
            if times:
                found[name][pages] = median(times) / pages * NS
        if huge is not None:
            await space.munmap(huge, pages * PAGE_SIZE)
        for kind in OTHERS:
            if kind == "file":
                await space.munmap(small, pages * PAGE_SIZE)
                small = await _populated(space, pages, file=File(memory, pages * PAGE_SIZE))
            for name, seconds in (await _beside(kind, space, spaces, page_map, homing, link, small, pages)).items():
                found[name][pages] = seconds / pages * NS
        await space.munmap(small, pages * PAGE_SIZE)
    return found


async def _populated(space: Space, pages: int, flags: int = 0, file: File | None = None) -> int:
    """The address of `pages` that were written, aligned to huge pages; with VM_HUGEPAGE in `flags`, huge where they can be.

    With a `file`, copies of its pages.
    """
    spare = await space.mmap((pages + 2 * HUGE_PAGES) * PAGE_SIZE)
    address = await space.mmap(pages * PAGE_SIZE, address=-(-spare // HUGE_BYTES) * HUGE_BYTES, flags=flags, file=file)
    for first in range(0, pages, POPULATE_PAGES):
        await space.store(address + first * PAGE_SIZE, np.ones(min(POPULATE_PAGES, pages - first) * PAGE_SIZE, dtype=np.uint8))
    return address


async def _beside(
    name: str, space: Space, spaces: dict[int, Space], page_map: PageMap, homing: Homing, link: DeviceLink, address: int, pages: int
) -> dict[str, float]:
    """Seconds of a snapshot, and of there and back, halved, of other memory: `name` of `OTHERS`."""
    child = None if name == "file" else await space.fork(CHILD, Hub())
    if child is not None:
        spaces[CHILD] = child
        for page in range(0, pages if name == "cow" else 0, 2 * RUN_PAGES):
            await child.store(address + page * PAGE_SIZE, np.ones(RUN_PAGES * PAGE_SIZE, np.uint8))
    looks, ways = [], []
    for _ in range(1 + _rounds(pages)):
        looks.append(await _snapshot(space, address, pages))
        ways.append(sum(await _there_and_back(space, page_map, homing, link, address, pages)) / 2)
    if child is not None:
        del spaces[CHILD]
        await child.exit()
    return {f"snapshot_{name}": median(looks[1:]), name: median(ways[1:])}


async def _fork(space: Space) -> float:
    """Seconds to fork a process."""
    taken = []
    for _ in range(ROUNDS_MIN):
        began_s = time.perf_counter()
        child = await space.fork(CHILD, Hub())
        taken.append(time.perf_counter() - began_s)
        await child.exit()
    return median(taken)


def _rounds(pages: int) -> int:
    """Rounds of a size, beside the first."""
    return min(max(ROUNDS_PAGES // pages, ROUNDS_MIN), ROUNDS_MAX)


async def _snapshot(space: Space, address: int, pages: int) -> float:
    start = address >> PAGE_SHIFT
    async with space.mmap_lock.read():
        began_s = time.perf_counter()
        space.walk(start, start + pages, None, 0, 0, ZONE)
        return time.perf_counter() - began_s


async def _there_and_back(
    space: Space, page_map: PageMap, homing: Homing, link: DeviceLink, address: int, pages: int, *, compound: bool = False
) -> tuple[float, float]:
    """Seconds for each way."""
    start = address >> PAGE_SHIFT
    frames = np.arange(ZONE << ZONE_SHIFT, (ZONE << ZONE_SHIFT) + pages, dtype=np.uint64)
    select = Select.SYSTEM
    if compound:
        frames, select = frames[::HUGE_PAGES] | word_of(LARGE), Select.SYSTEM | Select.COMPOUND
    domain = Domain(link.name, 1, link.zone)

    async def announce(outcome: Outcome, finalize: Callable[[], None]) -> None:
        assert outcome.moved == pages, "every page of the probe can move"
        finalize()

    began_s = time.perf_counter()
    await migrate_to_device(space, homing.spaces, link, [domain], start, select, Grant(page_map.zone, frames), announce)
    there_s = time.perf_counter()
    done = await homing.migrate_to_system(space, link, start, start + pages)
    back_s = time.perf_counter()
    assert done.moved == pages, "every page of the probe comes home"
    return there_s - began_s, back_s - there_s
