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

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hmmnet.errors import KernelError, ProtocolError
from hmmnet.pages import (
    FEW,
    HUGE_PAGES,
    HUGE_SHIFT,
    LARGE,
    MIGRATE_PFN_COMPOUND,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_SHIFT,
    MIGRATE_PFN_VALID,
    Words,
    all_of,
    any_of,
    bits_in_all,
    bits_in_any,
    distinct,
    has_large,
    has_zero,
    is_one_run,
    largest,
    page_by_page,
    pages_in,
    word_of,
    words_by_page,
)

from .announce import announced, split_large
from .interfaces import NO_OWNER, AddressSpace, DeviceLink, Event, Migration, Select
from .iommu import Domain
from .mm.collect import inserts
from .mm.compound import whole_blocks
from .mm.zones import LOCKED, Zone

BOTH = MIGRATE_PFN_VALID | MIGRATE_PFN_MIGRATE
MIGRATE = word_of(MIGRATE_PFN_MIGRATE)
VALID = word_of(MIGRATE_PFN_VALID)
SHIFT = word_of(MIGRATE_PFN_SHIFT)
_BLOCK = word_of(HUGE_SHIFT)
_NONE = np.zeros(0, dtype=np.uint64)

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Outcome:
    """What a migration did: final source words for the whole range, and the errno of the VMA at which it ended early (0: it did not).

    A word with COMPOUND stands for a huge page.
    """

    words: Words
    errno: int = 0
    tried: int = 0
    """With an errno, the pages before that VMA: whatever of them could move has."""

    @property
    def moved(self) -> int:
        """Pages that moved."""
        return pages_in(moving(self.words, self.words), MIGRATE_PFN_COMPOUND)

    def moved_pages(self, start: int) -> Words:
        """Those pages, of a range that begins at page `start`."""
        return (words_by_page(self.words) & MIGRATE).nonzero()[0].astype(np.uint64) + np.uint64(start)


def moving(values: Words, words: Words) -> Words:
    """Those of `values` whose source word has MIGRATE: mostly all, or none."""
    if bits_in_all(words) & MIGRATE_PFN_MIGRATE:
        return values
    return values[words & MIGRATE != 0] if bits_in_any(words) & MIGRATE_PFN_MIGRATE else values[:0]


def joined(arrays: list[Words]) -> Words:
    """The arrays behind each other; a single one as it is."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays) if arrays else _NONE


async def collect(
    parts: list[Migration],
    space: AddressSpace,
    spaces: Mapping[int, AddressSpace],
    start: int,
    end: int,
    select: Select,
    owner: int,
    blocks: Words | None = None,
    between: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """migrate_vma_collect for [start, end), which lies in one VMA: everybody is told, and what can go is behind migration entries.

    It is appended to `parts`. Huge pages go as one, in a part of their own (`Migration.large`): with Select.SYSTEM those at `blocks` (if
    none are given, none), else all. With `between`, entry by entry, as the kernel's walk goes, for who wants to look in between.
    """
    large = space.takeable(start, end, select, owner)
    if select.has(Select.SYSTEM):
        large = _common(large, blocks) if blocks is not None and len(large) else _NONE
    if len(large) << HUGE_SHIFT == end - start:
        pages = _NONE
    else:
        pages = np.arange(start, end, dtype=np.uint64)
        if len(large):
            pages = pages[~np.isin(pages >> _BLOCK, large)]
    if select.has(Select.SYSTEM) and len(pages):
        compound, parts_stay = bool(select.has(Select.COMPOUND)), bool(select.has(Select.PARTS_STAY))
        await split_large(space, spaces, pages, owner, compound=compound, parts_stay=parts_stay)
    async with announced(space, spaces, start, end, pages, select, owner) as told:
        for some in [large] if between is None or len(large) == 0 else np.split(large, len(large)):
            if len(some):
                part, left = space.collect_large(some, select, owner)
                if len(part.pages):
                    parts.append(part)
                if len(left):
                    pages = np.sort(np.concatenate((pages, page_by_page(left << _BLOCK | word_of(LARGE)))))
                if between is not None:
                    await between()
        for run in ([pages] if len(pages) else []) if between is None else entries(pages, compound=bool(select.has(Select.COMPOUND))):
            parts.append(space.collect(run, select, owner, told=told))
            if between is not None:
                await between()


def _common(large: Words, blocks: Words) -> Words:
    """Those of `large` that are among `blocks`: mostly all of them."""
    return large if np.array_equal(large, blocks) else large[np.isin(large, blocks)]


def listed(part: Migration, values: Words) -> Words:
    """Pages or frames of `part` as a list that others read: large ones say so."""
    return values | word_of(LARGE) if part.large else values


def first_large(part: Migration) -> int | None:
    """The row at which the first huge page of `part` begins that is about to move whole; None: there is none."""
    if part.large:
        wanted = part.source & MIGRATE != 0
        return int(np.argmax(wanted)) if any_of(wanted) else None
    if len(part.pages) < HUGE_PAGES:
        return None
    blocks = whole_blocks(part.saved, part.pages)
    return next((row for row in blocks if bits_in_all(part.source[row : row + HUGE_PAGES]) & MIGRATE_PFN_MIGRATE), None)


def pieces(parts: list[Migration]) -> list[tuple[Words, Words]]:
    """(pages, source words as they are now) of `parts`, and of what was torn off; pages of huge pages are marked."""
    found = []
    for part in parts:
        kept = slice(None) if not part.torn else part.source != 0
        found.append((listed(part, part.pages)[kept], part.source[kept]))
        found += [(one.pages, one.source) for one in part.torn]
    return found


def words_of(parts: list[Migration], count: int) -> Words:
    """The source words of a range of `count` pages in their order, huge ones as one word; zero where `parts` end before it does."""
    found = pieces(parts)
    words = joined([words for _, words in found])
    if len(found) > 1:
        pages = np.concatenate([pages for pages, _ in found]) & word_of(LARGE - 1)
        words = words[np.argsort(pages, kind="stable")]
    return np.concatenate((words, np.zeros(count - pages_in(words, MIGRATE_PFN_COMPOUND), np.uint64)))  # a copy: theirs change


def entries(pages: Words, *, compound: bool) -> list[Words]:
    """`pages` by entry: with `compound`, where huge pages go whole, aligned blocks are one."""
    if not compound or len(pages) < HUGE_PAGES:
        return [pages[i : i + 1] for i in range(len(pages))]
    blocks = pages >> _BLOCK
    together = np.bincount((blocks - blocks[0]).astype(np.intp))[(blocks - blocks[0]).astype(np.intp)] == HUGE_PAGES
    cuts = ((np.diff(blocks) != 0) | ~together[1:]).nonzero()[0] + 1
    return np.split(pages, cuts)


class MigrateVma:
    """One migration of pages of `space` that is done in the name of the device behind `link` (None: of a driver in the host).

    `spaces` are all processes by number: pages that are shared move for everybody who maps them. Hold the mmap lock for reading.
    """

    def __init__(self, space: AddressSpace, spaces: Mapping[int, AddressSpace], select: Select, link: DeviceLink | None) -> None:
        self.space = space
        self.spaces = spaces
        self.select = select
        self.link = link
        self.device = "" if link is None else link.name
        self.owner = NO_OWNER if link is None else link.zone
        self.points = space.points
        self.parts: list[Migration] = []
        """One for each VMA, and one more for its huge pages."""
        self.errno = 0
        self.tried = 0
        """With an errno, how many pages of the range lie before what it is about."""
        self._over = False
        self.range = (0, 0)
        """The pages that it is about."""

    async def at(self, name: str) -> None:
        """A step boundary (`hmmnet.faults.points`)."""
        start, end = self.range
        await self.points.at(name, device=self.device, process=self.space.number, start=start, pages=end - start)

    async def setup(self, start: int, end: int, blocks: Words | None = None) -> None:
        """migrate_vma_setup for each VMA of [start, end), as drivers loop over a range; ends with `errno` at the first that will not do.

        `blocks`: see `collect`.
        """
        page = start
        while page < end:
            vma = self.space.vma_at(page)
            stop = page + 1 if vma is None else min(end, vma.end)
            try:
                self.space.check_migratable(page, stop)
            except KernelError as error:
                self.errno, self.tried = error.code, page - start
                return
            between = self._after_entry if self.points.armed and self.points.wants("migrate.after_entry") else None
            await collect(self.parts, self.space, self.spaces, page, stop, self.select, self.owner, blocks, between)
            if self.points.armed:
                await self.at("migrate.after_vma")
            page = stop

    async def _after_entry(self) -> None:
        await self.at("migrate.after_entry")

    def refuse_large(self, refuse: Callable[[], bool]) -> None:
        """The driver allocates: where it has no large page for the first huge page there is, that one goes page by page.

        It has COMPOUND for the driver whether it is one row here or, shared or torn before, 512 of them.
        """
        found = [(int(part.pages[row]), row, part) for part in self.parts if (row := first_large(part)) is not None]
        if not found or not refuse():
            return
        _, row, part = min(found, key=lambda one: one[0])
        if not part.large:
            self.space.split_going(part, row)
            return
        rows = np.zeros(len(part.pages), np.bool_)
        rows[row] = True
        self.parts.append(self.space.tear(part, rows, small=True))
        part.torn.pop()
        part.pages, part.source, part.target, part.saved = (values[~rows] for values in (part.pages, part.source, part.target, part.saved))
        self.parts = [part for part in self.parts if len(part.pages)]

    @property
    def pages(self) -> Words:
        """The pages of all parts, large ones marked."""
        return joined([listed(part, part.pages) for part in self.parts])

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
            for one in (part, *part.torn):
                one.target[:] = 0
            self.space.migrate_finalize(part)


@dataclass
class Grant:
    """Frames of device zone `zone` that its driver offers for a range, position by position (0: none for that page).

    While a migration holds them they carry the page lock, so that no second one is offered them.
    """

    zone: Zone
    frames: Words
    """Large ones (`pages.LARGE`) are for 512 pages."""

    def __post_init__(self) -> None:
        if len(self.frames) and not has_zero(self.frames) and not has_large(self.frames):  # as it mostly is
            self._offered, self._heads, self._locked = self.frames, _NONE, _NONE
            self._positions = np.zeros(0, np.int64)
            self.pages = len(self.frames)
            return
        if bits_in_all(self.frames) >= LARGE:
            self._offered, self._heads = _NONE, self.frames & word_of(LARGE - 1)
            self._locked = self._heads
            self._positions = np.arange(0, len(self._heads) << HUGE_SHIFT, HUGE_PAGES)
            self.pages = len(self._heads) << HUGE_SHIFT
            return
        large = self.frames >= word_of(LARGE)
        self._offered = self.frames[(self.frames != 0) & ~large]
        self._heads = self._locked = self.frames[large] & word_of(LARGE - 1)
        counts = np.where(large, HUGE_PAGES, 1)
        self._positions = (np.cumsum(counts) - counts)[large] if len(self._heads) else np.zeros(0, np.int64)
        self.pages = pages_in(self.frames)
        """How many pages they are for."""

    def blocks(self, start: int) -> Words:
        """The blocks for which there is a large one, when the range begins at page `start`."""
        return (self._positions + start >> HUGE_SHIFT).astype(np.uint64)

    def for_part(self, part: Migration, start: int) -> Words:
        """The frame for each page of `part` (the head, for each huge page) of a range that begins at page `start`; 0: none."""
        if part.large:
            return self._heads[np.searchsorted(self.blocks(start), part.pages >> _BLOCK)]
        frames = page_by_page(self.frames)
        if is_one_run(part.pages):
            first = int(part.pages[0]) - start
            return frames[first : first + len(part.pages)]
        return frames[(part.pages - np.uint64(start)).astype(np.intp)]

    def take(self, start: int = 0) -> None:
        """Check and lock. Raises ProtocolError for frames that are not idle frames of the zone, each named once."""
        if not self.zone.idle(self._offered) or not self._heads_idle():
            raise ProtocolError(f"{self.zone.owner} offers frames that are in use, named twice, or not its own")
        if len(self._heads) and (((self._positions + start) % HUGE_PAGES).any() or (self._heads % word_of(HUGE_PAGES)).any()):
            raise ProtocolError(f"{self.zone.owner} offers a huge page that is not aligned")
        if len(self._offered) <= FEW and not self.zone.folded_count:
            self._lock_few(self._offered.tolist())
        elif len(self._offered):
            where = self.zone.at(self._offered)
            if bits_in_any(self.zone.flags[where]):
                raise ProtocolError(f"{self.zone.owner} offers frames that it has offered to another migration")
            self.zone.flags[where] = LOCKED
            self.zone.offered = max(self.zone.offered, largest(self._offered) - self.zone.base + 1)
        if len(self._heads):
            at = (self._heads - word_of(self.zone.base)).astype(np.intp)
            self.zone.flags[at] = LOCKED
            self.zone.set_folded(at >> HUGE_SHIFT)
            self.zone.offered = max(self.zone.offered, int(at.max()) + HUGE_PAGES)

    def _lock_few(self, frames: Sequence[int]) -> None:
        """Lock a few frames one by one, where none is folded. Raises ProtocolError, having locked none, where one is."""
        zone = self.zone
        flags, base = zone.cells.flags, zone.base
        for frame in frames:
            if flags[frame - base]:
                raise ProtocolError(f"{zone.owner} offers frames that it has offered to another migration")
        for frame in frames:
            flags[frame - base] = LOCKED
            if frame - base >= zone.offered:
                zone.offered = frame - base + 1

    def _heads_idle(self) -> bool:
        """Whether the large ones are whole blocks of the zone that nobody has or was offered, and that no small one lies in."""
        if len(self._heads) == 0:
            return True
        last = self._heads + word_of(HUGE_PAGES - 1)
        blocks = (self._heads - word_of(self.zone.base)).astype(np.intp) >> HUGE_SHIFT
        if not self.zone.holds(self._heads) or not self.zone.holds(last) or len(distinct(blocks)) != len(blocks):
            return False
        if len(self._offered) and np.isin(self._offered >> _BLOCK, self._heads >> _BLOCK).any():
            return False
        return self.zone.unused(blocks)

    def release(self) -> None:
        """Unlock what is not used. Once the driver knows of it, it may offer those frames to another migration."""
        offered = self._offered
        if len(self._locked):
            at = (self._locked - word_of(self.zone.base)).astype(np.intp)
            folded = self.zone.folded[at >> HUGE_SHIFT]
            idle = folded & (self.zone.refcount[at] == 0)
            self.zone.flags[at[idle]] = 0
            self.zone.set_unused(at[idle] >> HUGE_SHIFT)
            if not all_of(folded):
                offered = np.concatenate((offered, page_by_page(self._locked[~folded] | word_of(LARGE))))
            self._locked = self._locked[folded & ~idle]
        if len(offered):
            self._offered = self._unlocked(offered)

    def _unlocked(self, frames: Words) -> Words:
        """Unlock those of `frames` that are idle; the others."""
        if len(frames) <= FEW and not self.zone.folded_count:
            return self._unlocked_few(frames)
        where = self.zone.at(frames)
        refcount = self.zone.refcount[where]
        if not has_zero(refcount):  # as it mostly is
            return frames
        idle = refcount == 0
        self.zone.flags[where] = np.where(idle, np.uint32(0), self.zone.flags[where])
        busy: Words = frames[~idle]
        return busy

    def _unlocked_few(self, frames: Words) -> Words:
        """`_unlocked`, one by one, where none is folded."""
        cells, base = self.zone.cells, self.zone.base
        busy = []
        for frame in frames.tolist():
            if cells.refcount[frame - base]:
                busy.append(frame)
            else:
                cells.flags[frame - base] = 0
        return frames if len(busy) == len(frames) else np.array(busy, np.uint64)


Announce = Callable[[Outcome, Callable[[], None]], Awaitable[None]]
"""Tell the driver what moved, and return when its table is up to date. Raises PeerLost when it is gone.

The second argument finalizes. It is called at the very moment at which the driver says that it is done, before anything that it
says next is looked at: who asked the driver for the migration finds no migration entries when it hears of its end.
"""


Copy = Callable[[MigrateVma, Sequence[Domain], int, Grant], Awaitable[None]]
"""alloc_and_copy: (migration, translations of the device's contexts, first page, grant); see `copy_in`."""


async def migrate_to_device(
    space: AddressSpace,
    spaces: Mapping[int, AddressSpace],
    link: DeviceLink,
    domains: Sequence[Domain],
    start: int,
    select: Select,
    grant: Grant,
    announce: Announce,
    copy: Copy | None = None,
    refuse: Callable[[], bool] | None = None,
) -> None:
    """Move pages [start, start + grant.pages) into the frames that the driver granted.

    `domains` are the translations of the driver's contexts of this process: those of pages on their way are suspended, and void once a
    page has moved.
    `copy` takes the place of `copy_in` where sources may be other than host memory. `refuse` tells whether the driver's allocation of a
    large page fails that is wanted now.
    Raises PeerLost when the device is gone; then nothing has moved.
    """
    async with space.mmap_lock.read():
        grant.take(start)
        work = MigrateVma(space, spaces, select, link)
        work.range = (start, start + grant.pages)
        points = work.points
        try:
            if points.armed:
                await work.at("migrate.before_collect")
            await work.setup(start, start + grant.pages, grant.blocks(start) if select.has(Select.COMPOUND) else None)
            if points.armed:
                await work.at("migrate.after_unmap")
            if refuse is not None:
                work.refuse_large(refuse)
            await (copy or copy_in)(work, domains, start, grant)
            if points.armed:
                await work.at("migrate.before_pages")
            await work.install()
            if points.armed:
                await work.at("migrate.after_pages")
            for pages, words in pieces(work.parts) if any(domain.table.cells for domain in domains) else ():
                moved = moving(pages, words)
                for domain in domains:
                    domain.revoke_pages(moved)
            grant.release()
            await announce(Outcome(words_of(work.parts, grant.pages), work.errno, work.tried), work.finalize)
            work.finalize()
            if points.armed:
                await work.at("migrate.after")
        except BaseException:
            work.give_up()
            raise
        finally:
            for domain in domains:
                domain.resume(work.pages)
            grant.release()


async def copy_in(
    work: MigrateVma,
    domains: Sequence[Domain],
    start: int,
    grant: Grant,
    froms: Sequence[Words] | None = None,
    arrived: Sequence[npt.NDArray[np.bool_]] | None = None,
) -> None:
    """alloc_and_copy: pages with data are streamed, never-touched ones zeroed on the device; a page without a grant stays.

    `froms` are, for each part, the frames that data are read from where those are not the pages' own; a page with none stays. `arrived`
    are the rows whose data are at their targets already.
    """
    assert work.link is not None, "a migration to a device"
    if work.points.armed:
        await work.at("migrate.allocate")
    sources: list[Words] = []
    targets: list[Words] = []
    zeros: list[Words] = []
    chosen: list[Words] = []
    for i, part in enumerate(work.parts):
        offered = grant.for_part(part, start)
        own = part.source >> SHIFT if froms is None else froms[i]
        frames, rows, empty = _streamed(part, offered, own, None if arrived is None else arrived[i])
        for domain in domains:
            domain.suspend(listed(part, part.pages[rows]))
        sources.append(listed(part, own[rows]))
        targets.append(listed(part, frames[rows]))
        zeros.append(listed(part, frames[empty]))
        chosen.append(frames)
    source, target, zero = joined(sources), joined(targets), joined(zeros)
    if work.points.armed:
        await work.at("migrate.before_copy")
    if len(source) or len(zero):
        await work.link.copy_in(source, target, zero)
    for part, frames in zip(work.parts, chosen, strict=True):
        set_targets(part, frames)


def _streamed(part: Migration, offered: Words, own: Words, arrived: Flags | None) -> tuple[Words, Flags | slice, Flags | slice]:
    """For the rows of `part`: the frame at the device (0: it stays), whether data are streamed there, and whether it is zeroed.

    Data are read from `own`, but for those that have `arrived`; a row that has data and none of its own (0) stays.
    """
    if arrived is not None and not any_of(arrived):
        arrived = None
    if arrived is None and not has_zero(offered):  # as it mostly is
        every = bits_in_all(part.source)
        if every & BOTH == BOTH and not has_zero(own):
            return offered, slice(None), slice(0)
        if every & MIGRATE_PFN_MIGRATE and not bits_in_any(part.source) & MIGRATE_PFN_VALID:  # never touched
            return offered, slice(0), slice(None)
    valid = part.source & VALID != 0
    frames = np.where((part.source & MIGRATE != 0) & ((own != 0) | ~valid), offered, word_of(0))
    goes = frames != 0
    return frames, goes & valid if arrived is None else goes & valid & ~arrived, goes & ~valid


def set_targets(part: Migration, frames: Words) -> None:
    """The driver's destinations for the rows of `part` (0: none)."""
    bits = word_of(MIGRATE_PFN_VALID | (MIGRATE_PFN_COMPOUND if part.large else 0))
    target = part.target
    np.left_shift(frames, SHIFT, out=target)
    if not has_zero(frames):
        target |= bits
    else:
        target[frames != 0] |= bits
