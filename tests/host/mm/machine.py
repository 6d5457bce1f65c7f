"""A host with devices that are plain arenas: enough to migrate real bytes through an address space, without links or sessions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hmmnet.arena import Arena
from hmmnet.host.hub import Hub
from hmmnet.host.interfaces import Event, Migration, Select
from hmmnet.host.migrate import collect, listed, set_targets, words_of
from hmmnet.host.mm import rmap
from hmmnet.host.mm.collect import collect_frames, inserts, move
from hmmnet.host.mm.finalize import finalize
from hmmnet.host.mm.frames import PhysicalMemory
from hmmnet.host.mm.invariants import check
from hmmnet.host.mm.space import Space
from hmmnet.host.mm.zones import Zone
from hmmnet.pages import (
    HUGE_PAGES,
    HUGE_SHIFT,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_SHIFT,
    MIGRATE_PFN_VALID,
    PAGE_SHIFT,
    PAGE_SIZE,
    ZONE_SHIFT,
    Words,
    page_by_page,
    words_by_page,
    zone_of,
)
from hmmnet.runs import RunAllocator

SHIFT = np.uint64(MIGRATE_PFN_SHIFT)
MIGRATE = np.uint64(MIGRATE_PFN_MIGRATE)
VALID = np.uint64(MIGRATE_PFN_VALID)
HOME = Select.DEVICE_PRIVATE | Select.DEVICE_COHERENT


def words(*values: int) -> Words:
    """A list of pages or frames."""
    return np.array(values, dtype=np.uint64)


def span(start: int, count: int) -> Words:
    """Consecutive pages."""
    return np.arange(start, start + count, dtype=np.uint64)


class Device:
    """A device's memory: bytes, and free frames."""

    def __init__(self, machine: Machine, zone: int, kind: str, count: int) -> None:
        self.arena = Arena(zone << ZONE_SHIFT, count)
        self.zone = machine.memory.add_device(zone, kind, f"gpu{zone - 64}", count, self.arena if kind == "coherent" else None)
        self.zone.offered = count  # the tests take frames without a grant
        self.zone.on_free = self.free
        self.allocator = RunAllocator(self.zone.base, count)
        self.freed: list[int] = []

    def free(self, frames: Words) -> None:
        """folio_free."""
        self.freed += frames.tolist()
        self.allocator.free(frames)


class Machine:
    """One host memory, devices from zone 64 on, processes from 1 on."""

    def __init__(
        self, host_pages: int = 4096, devices: int = 2, device_pages: int = 1024, kind: str = "private", kinds: tuple[str, ...] = ()
    ) -> None:
        self.memory = PhysicalMemory()
        self.memory.add_node("node0", host_pages)
        kinds = kinds or (kind,) * devices
        self.devices = {64 + i: Device(self, 64 + i, one, device_pages) for i, one in enumerate(kinds)}
        self.spaces: dict[int, Space] = {}
        self.gone: set[int] = set()
        self.homed: list[int] = []
        self.on_copy_out: Callable[[Space, Words], None] | None = None
        """Called with the pages that are about to leave a device: where a driver drops its own entries for them."""

    def process(self) -> Space:
        """A new process."""
        space = Space(len(self.spaces) + 1, self.memory, Hub(), self.home)
        self.spaces[space.number] = space
        return space

    async def fork(self, parent: Space) -> Space:
        """A child of `parent`."""
        space = await parent.fork(len(self.spaces) + 1, Hub())
        self.spaces[space.number] = space
        return space

    async def exit(self, space: Space) -> None:
        """The end of a process; its number is not used again."""
        await space.exit()
        self.gone.add(space.number)

    def check(self, *, quiet: bool = True) -> None:
        """The invariants, and that each device's allocator agrees with the books."""
        check(self.memory, [space.mm for space in self.spaces.values() if space.number not in self.gone], quiet=quiet)
        for device in self.devices.values():
            if quiet and not device.zone.lost:
                assert np.count_nonzero(device.zone.referenced()) == device.allocator.used_count

    def bytes_of(self, frame: int) -> bytes:
        """What a frame holds, wherever it is."""
        zone = zone_of(frame)
        arena = self.devices[zone].arena if zone in self.devices else self.memory.nodes[zone].arena
        return bytes(arena.pages[frame - arena.base])

    # --- the driver's side of migrate_vma -----------------------------------------------------------------------------------------

    async def home(self, space: Space, pages: Words | int) -> None:
        """migrate_to_ram; the mmap lock is held."""
        pages = np.atleast_1d(np.asarray(pages, np.uint64))
        self.homed += pages.tolist()
        zone = space.zone_at(int(pages[0]))
        await self._collect_and_bring(space, pages, zone)

    async def _collect_and_bring(self, space: Space, pages: Words, zone: int) -> int:
        parts: list[Migration] = []
        await collect(parts, space, self.spaces, int(pages[0]), int(pages[-1]) + 1, HOME, zone)
        moved = 0
        while parts:
            migration = parts.pop(0)
            going = np.flatnonzero(migration.source & (MIGRATE | VALID) == (MIGRATE | VALID))
            if migration.large:
                frames = np.array([self.memory.allocate_folio() or 0 for _ in going], np.uint64)
                if not frames.all():
                    parts.append(space.tear(migration, frames == 0))
                    migration.torn = []
            else:
                got = self.memory.allocate(len(going), keep=slice(0, len(going)))
                assert got is not None
                frames = got
            if self.on_copy_out is not None:
                self.on_copy_out(space, page_by_page(listed(migration, migration.pages[going][frames != 0])))
            chosen = np.zeros(len(migration.pages), np.uint64)
            chosen[going] = frames
            set_targets(migration, chosen)
            self.copy(migration)
            space.migrate_pages(migration)
            moved += migration.cpages
            space.migrate_finalize(migration)
        return moved

    def copy(self, migration: Migration) -> None:
        """alloc_and_copy for targets that are set: pages with data are copied, others are zeroed."""
        going = (migration.source & MIGRATE != 0) & (migration.target != 0)
        full = going & (migration.source & VALID != 0)
        source, target = migration.source >> SHIFT, migration.target >> SHIFT
        self._copy(page_by_page(listed(migration, source[full])), page_by_page(listed(migration, target[full])))
        for frame in page_by_page(listed(migration, target[going & ~full])).tolist():
            self.devices[zone_of(frame)].arena.pages[frame - self.devices[zone_of(frame)].arena.base] = 0

    def _copy(self, source: Words, target: Words) -> None:
        for old, new in zip(source.tolist(), target.tolist(), strict=True):
            zone = zone_of(new)
            arena = self.devices[zone].arena if zone in self.devices else self.memory.nodes[zone].arena
            arena.pages[new - arena.base] = np.frombuffer(self.bytes_of(old), np.uint8)

    async def to_device(self, space: Space, zone: int, pages: Words, *, compound: bool = False) -> Words:
        """migrate_vma towards a device, one VMA; the final source words. `compound`: huge pages go whole."""
        select = Select.SYSTEM | Select.COMPOUND if compound else Select.SYSTEM
        first, end = int(pages[0]), int(pages[-1]) + 1
        async with space.mmap_lock.read():
            space.check_migratable(first, end)
            heads = self._heads_for(space.takeable(first, end, select, zone) if compound else words(), self.devices[zone])
            parts: list[Migration] = []
            await collect(parts, space, self.spaces, first, end, select, zone, words(*heads))
            for part in parts:
                frames = np.zeros(len(part.pages), np.uint64)
                going = np.flatnonzero(part.source & MIGRATE)
                if part.large:
                    frames[:] = [heads[page >> HUGE_SHIFT] for page in part.pages.tolist()]
                else:
                    frames[going] = self._granted(self.devices[zone], part.pages[going], compound=compound)
                set_targets(part, frames)
                self.copy(part)
                if inserts(part):
                    async with space.hub.invalidate(Event.MIGRATE, first, end, zone):
                        space.migrate_pages(part)
                else:
                    space.migrate_pages(part)
                for one in (part, *part.torn):
                    stayed = one.target[(one.source & MIGRATE == 0) & (one.target != 0)] >> SHIFT
                    if one.large:
                        self.devices[zone].zone.set_unused(blocks_in(self.devices[zone].zone, stayed))
                    self.devices[zone].allocator.free(page_by_page(listed(one, stayed)))
                space.migrate_finalize(part)
            return words_by_page(words_of(parts, len(pages)))

    def _heads_for(self, blocks: Words, device: Device) -> dict[int, int]:
        """A huge page of the device for each of `blocks`, as far as there are any."""
        heads: dict[int, int] = {}
        for block in blocks.tolist():
            run = device.allocator.allocate_aligned_run(HUGE_PAGES)
            if run is None:
                break
            heads[block] = run[0]
        device.zone.set_folded(blocks_in(device.zone, words(*heads.values())))
        return heads

    def _granted(self, device: Device, pages: Words, *, compound: bool) -> Words:
        """Frames for `pages`: with `compound` an aligned run for each whole aligned block."""
        frames = np.zeros(len(pages), np.uint64)
        blocks, counts = np.unique(pages >> np.uint64(HUGE_SHIFT), return_counts=True)
        for block in blocks[counts == HUGE_PAGES].tolist() if compound else []:
            run = device.allocator.allocate_aligned(HUGE_PAGES)
            if run is not None:
                frames[pages >> np.uint64(HUGE_SHIFT) == block] = run.frames
        rest = np.flatnonzero(frames == 0)
        got = device.allocator.allocate(len(rest))
        assert got is not None
        frames[rest] = got.frames
        return frames

    async def to_system(self, space: Space, zone: int, pages: Words) -> int:
        """migrate_vma home; how many moved."""
        async with space.mmap_lock.read():
            space.check_migratable(int(pages[0]), int(pages[-1]) + 1)
            return await self._collect_and_bring(space, pages, zone)

    async def evict(self, zone: int) -> int:
        """migrate_device_range of everything that is in use on a device; how many frames went home."""
        device = self.devices[zone]
        frames = np.flatnonzero(device.zone.referenced()).astype(np.uint64) + np.uint64(device.zone.base)
        if len(frames) == 0:
            return 0
        told: dict[int, list[Words]] = {}
        for mm, places in rmap.places(self.memory, frames):
            told.setdefault(mm.number, []).append(places)
            for page in places.tolist():
                async with self.spaces[mm.number].hub.invalidate(Event.CLEAR, page, page + 1):
                    pass
        migration = collect_frames(self.memory, frames, told)
        going = np.flatnonzero(migration.source & MIGRATE)
        targets = self.memory.allocate(len(going), keep=slice(0, len(going)))
        assert targets is not None
        self._copy(frames[going], targets)
        migration.target[going] = targets << SHIFT | VALID
        move(self.memory, None, migration)
        finalize(self.memory, None, migration)
        return len(going)


def blocks_in(zone: Zone, heads: Words) -> npt.NDArray[np.intp]:
    """The blocks of `zone` that begin with the frames `heads`."""
    return (heads - np.uint64(zone.base)).astype(np.intp) >> HUGE_SHIFT


def page_bytes(value: int) -> bytes:
    """A page of one byte value."""
    return bytes([value & 255]) * PAGE_SIZE


def address_of(page: int) -> int:
    """The byte address of a page."""
    return page << PAGE_SHIFT
