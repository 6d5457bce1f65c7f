"""migrate_vma: pages change their memory while programs and devices go on using their addresses.

The steps are the kernel's (mm/migrate_device.c, table A4). `MigrateVma` is one call of it over a range, with a method for each step, so
that a reader finds them and a test can stop between them:

1. `setup`      VMA by VMA: announce MIGRATE to the hub, then put *migration entries* in place of what can move; who touches it waits;
2. copy         the driver's part: destinations, and a DMA stream (`DeviceLink.copy_in`, `copy_out`);
3. `install`    migrate_vma_pages: identities change over; pages that turn out not to be movable stay (partial success is normal);
4. the device updates its table (towards a device);
5. `finalize`   migration entries become entries of the new pages, or again the old ones.

From setup to finalize the mmap lock is held for reading, as in the kernel. **Whatever goes wrong in between** (the device dies, its stream
breaks, the task is cancelled) ends in `give_up`: nothing has moved and every page is where it was, untouched. Only what was on a dead
device before is lost with it.

This file has the steps and the way to a device; `homing.py` has the ways home.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import numpy as np

from hmmnet.errors import KernelError, ProtocolError
from hmmnet.pages import HUGE_PAGES, HUGE_SHIFT, MIGRATE_PFN_MIGRATE, MIGRATE_PFN_SHIFT, MIGRATE_PFN_VALID, Words

from .announce import announced, split_large
from .interfaces import AddressSpace, DeviceLink, Event, Migration, Select
from .iommu import Domain
from .mm.collect import inserts
from .mm.zones import LOCKED, Zone

MIGRATE = np.uint64(MIGRATE_PFN_MIGRATE)
VALID = np.uint64(MIGRATE_PFN_VALID)
SHIFT = np.uint64(MIGRATE_PFN_SHIFT)
_NONE = np.zeros(0, dtype=np.uint64)


@dataclass(frozen=True)
class Outcome:
    """What a migration did: final source words for the whole range, and the errno of the VMA at which it ended early (0: it did not)."""

    words: Words
    errno: int = 0

    @property
    def moved(self) -> int:
        """Pages that moved."""
        return int(np.count_nonzero(self.words & MIGRATE))


def joined(arrays: list[Words]) -> Words:
    """The arrays behind each other; a single one as it is."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays) if arrays else _NONE


class MigrateVma:
    """One migration of pages of `space` that is done in the name of the device behind `link`. Hold the mmap lock for reading.

    `spaces` are all processes by number: pages that are shared move for everybody who maps them.
    """

    def __init__(self, space: AddressSpace, spaces: Mapping[int, AddressSpace], select: Select, link: DeviceLink) -> None:
        self.space = space
        self.spaces = spaces
        self.select = select
        self.link = link
        self.owner = link.zone
        self.points = space.points
        self.parts: list[Migration] = []
        """One for each VMA."""
        self.errno = 0
        self._over = False
        self.range = (0, 0)
        """The pages that it is about."""

    async def at(self, name: str) -> None:
        """A step boundary (`hmmnet.faults.points`)."""
        start, end = self.range
        await self.points.at(name, device=self.link.name, process=self.space.number, start=start, pages=end - start)

    async def setup(self, start: int, end: int) -> None:
        """migrate_vma_setup for each VMA of [start, end), as drivers loop over a range; ends with `errno` at the first that will not do."""
        page = start
        while page < end:
            vma = self.space.vma_at(page)
            stop = page + 1 if vma is None else min(end, vma.end)
            try:
                self.space.check_migratable(page, stop)
            except KernelError as error:
                self.errno = error.code
                return
            pages = np.arange(page, stop, dtype=np.uint64)
            if self.select & Select.SYSTEM:
                await split_large(self.space, self.spaces, pages, self.owner, compound=bool(self.select & Select.COMPOUND))
            async with announced(self.space, self.spaces, pages, self.select, self.owner) as told:
                if self.points.armed and self.points.wants("migrate.after_entry"):
                    await self._collect_singly(pages, told)
                else:
                    self.parts.append(self.space.collect(pages, self.select, self.owner, told=told))
            if self.points.armed:
                await self.at("migrate.after_vma")
            page = stop

    async def _collect_singly(self, pages: Words, told: frozenset[int]) -> None:
        """Page by page, as the kernel's walk goes, for who wants to see what happens in between."""
        for entry in self._entries(pages):
            self.parts.append(self.space.collect(entry, self.select, self.owner, told=told))
            await self.at("migrate.after_entry")

    def _entries(self, pages: Words) -> list[Words]:
        """`pages` by entry: where huge pages go whole, aligned blocks are one."""
        blocks = pages >> np.uint64(HUGE_SHIFT)
        together = np.bincount((blocks - blocks[0]).astype(np.intp))[(blocks - blocks[0]).astype(np.intp)] == HUGE_PAGES
        whole = together if self.select & Select.COMPOUND else np.zeros(len(pages), np.bool_)
        cuts = np.flatnonzero((np.diff(blocks) != 0) | ~whole[1:]) + 1
        return np.split(pages, cuts)

    @property
    def pages(self) -> Words:
        """The pages of all parts."""
        return joined([part.pages for part in self.parts])

    @property
    def source(self) -> Words:
        """The source words of all parts, as they are now."""
        return joined([part.source for part in self.parts])

    def set_targets(self, frames: Words) -> None:
        """The driver's destinations, position by position over all parts (0: none)."""
        words = np.where(frames != 0, frames << SHIFT | VALID, np.uint64(0))
        done = 0
        for part in self.parts:
            part.target[:] = words[done : done + len(part.pages)]
            done += len(part.pages)

    async def install(self) -> None:
        """migrate_vma_pages. Pages that were never touched have no migration entry to hide behind, so they are announced once more."""
        for part in self.parts:
            if inserts(part):
                async with self.space.hub.invalidate(Event.MIGRATE, int(part.pages[0]), int(part.pages[-1]) + 1, self.owner):
                    self.space.migrate_pages(part)
            else:
                self.space.migrate_pages(part)

    def finalize(self) -> None:
        """migrate_vma_finalize. Does nothing when the migration is over."""
        if self._over:
            return
        self._over = True
        for part in self.parts:
            self.space.migrate_finalize(part)

    def give_up(self) -> None:
        """Nothing moves: put every page back where it was, whatever step was reached. Does nothing when the migration is over."""
        if self._over:
            return
        self._over = True
        for part in self.parts:
            self.space.migrate_restore(part)
            part.target[:] = 0
            self.space.migrate_finalize(part)


@dataclass
class Grant:
    """Frames of device zone `zone` that its driver offers for a range, position by position (0: none for that page).

    While a migration holds them they carry the page lock, so that no second one is offered them.
    """

    zone: Zone
    frames: Words

    def __post_init__(self) -> None:
        self._offered = self.frames[self.frames != 0]

    def take(self) -> None:
        """Check and lock. Raises ProtocolError for frames that are not idle frames of the zone, each named once."""
        if not self.zone.idle(self._offered):
            raise ProtocolError(f"{self.zone.owner} offers frames that are in use, named twice, or not its own")
        if len(self._offered):
            where = self.zone.at(self._offered)
            if self.zone.flags[where].any():
                raise ProtocolError(f"{self.zone.owner} offers frames that it has offered to another migration")
            self.zone.flags[where] = LOCKED
            self.zone.offered = max(self.zone.offered, int(self._offered.max()) - self.zone.base + 1)

    def release(self) -> None:
        """Unlock what is not used. Once the driver knows of it, it may offer those frames to another migration."""
        if len(self._offered):
            where = self.zone.at(self._offered)
            idle = self.zone.refcount[where] == 0
            self.zone.flags[where] = np.where(idle, np.uint32(0), self.zone.flags[where])
            self._offered = self._offered[~idle]


Announce = Callable[[Outcome, Callable[[], None]], Awaitable[None]]
"""Tell the driver what moved, and return when its table is up to date. Raises PeerLost when it is gone.

The second argument finalizes. It is called at the very moment at which the driver says that it is done, before anything that it
says next is looked at: who asked the driver for the migration finds no migration entries when it hears of its end.
"""


async def migrate_to_device(
    space: AddressSpace,
    spaces: Mapping[int, AddressSpace],
    link: DeviceLink,
    domain: Domain,
    start: int,
    select: Select,
    grant: Grant,
    announce: Announce,
) -> None:
    """Move pages [start, start + len(grant.frames)) into the frames that the driver granted.

    `domain` are the translations of the driver's context: those of pages on their way are suspended, and void once a page has moved.
    Raises PeerLost when the device is gone; then nothing has moved.
    """
    count = len(grant.frames)
    async with space.mmap_lock.read():
        grant.take()
        work = MigrateVma(space, spaces, select, link)
        work.range = (start, start + count)
        points = work.points
        try:
            if points.armed:
                await work.at("migrate.before_collect")
            await work.setup(start, start + count)
            if points.armed:
                await work.at("migrate.after_unmap")
            await _copy_in(work, domain, start, grant.frames)
            if points.armed:
                await work.at("migrate.before_pages")
            await work.install()
            if points.armed:
                await work.at("migrate.after_pages")
            source = work.source
            moved = source & MIGRATE != 0
            domain.revoke_pages(work.pages[moved])
            words = np.zeros(count, dtype=np.uint64)
            words[: len(source)] = source
            grant.release()
            await announce(Outcome(words, work.errno), work.finalize)
            work.finalize()
            if points.armed:
                await work.at("migrate.after")
        except BaseException:
            work.give_up()
            raise
        finally:
            domain.resume(work.pages)
            grant.release()


async def _copy_in(work: MigrateVma, domain: Domain, start: int, granted: Words) -> None:
    """alloc_and_copy: pages with data are streamed, never-touched ones zeroed on the device; a page without a grant stays."""
    if work.points.armed:
        await work.at("migrate.allocate")
    source = work.source
    frames = np.where(source & MIGRATE != 0, granted[: len(source)], np.uint64(0))
    full = np.flatnonzero((frames != 0) & (source & VALID != 0))
    empty = np.flatnonzero((frames != 0) & (source & VALID == 0))
    domain.suspend((full + start).astype(np.uint64))
    if work.points.armed:
        await work.at("migrate.before_copy")
    if len(full) or len(empty):
        await work.link.copy_in(source[full] >> SHIFT, frames[full], frames[empty])
    work.set_targets(frames)
