"""The ways home: CPU faults on device memory, explicit migration to system memory, and eviction by frame.

All end in the same few lines (`_bring`): host frames are allocated, the device drops its entries and streams, identities change over. They
differ in what they start from. A CPU fault has the pages that a program touched (migrate_to_ram of struct dev_pagemap_ops, in test_hmm
dmirror_devmem_fault); an explicit migration has a range; an eviction has frames of the device and no address at all
(migrate_device_range), and takes the page away from every process that maps it, without any mmap lock.

Two CPUs that touch one page at once both come here; the second finds a migration entry where the first is at work, collects nothing and
returns, and its access looks at the page again.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial

import numpy as np
import trio

from hmmnet.errors import BusError, KernelError, OutOfMemory, PeerError, PeerLost
from hmmnet.observe.counters import CPU_FAULT, Profile
from hmmnet.observe.events import HOST, Events
from hmmnet.pages import (
    DEVICE_ZONE_MIN,
    HUGE_PAGES,
    PAGE_SHIFT,
    PAGE_SIZE,
    ZONE_SHIFT,
    Words,
    any_of,
    bits_in_all,
    page_by_page,
    word_of,
    words_by_page,
)

from .announce import clear
from .devmem import PageMap
from .interfaces import AddressSpace, DeviceLink, Event, Migration, Select
from .landing import HostFrames, Landing, no_room
from .migrate import MIGRATE, SHIFT, VALID, Outcome, collect, first_large, joined, listed, set_targets, words_of
from .mm import pte
from .mm.collect import collect_frames, move
from .mm.compound import whole_blocks
from .mm.finalize import finalize
from .mm.frames import PhysicalMemory
from .mm.relief import KERNEL
from .mm.rmap import Mapped, mappings
from .mm.zones import HWPOISON

HOME_PAGES_MAX = 1 << 16
"""Pages of one explicit migration home (256 MiB): bounds the host frames allocated before anything has landed."""

EVICT_ROUNDS_MAX = 14
"""Rounds of an eviction in which nothing moves before a page counts as held."""
EVICT_NAP_S = 1e-4
"""Before the second of those, on trio's clock, and twice as long before each that follows, 0.8 s together: who is busy with a page has as
much time, whether it waits for a copy over a slow link or for a reference that a program holds for a moment."""

COPIES_MAX = 4
"""Copies home for one CPU fault: what a link or a copy engine does wrong once it seldom does again; the CPU waits meanwhile."""

_NONE = np.zeros(0, np.uint64)

Refuse = Callable[[], bool]
"""Whether the allocation of a large page that is wanted now is to fail."""


def _first_huge(part: Migration) -> float:
    """The first page of `part` that is a huge one's."""
    row = first_large(part)
    return math.inf if row is None else int(part.pages[row])


def _always() -> bool:
    """There are no large pages."""
    return True


TOUCHED = "cpu fault"
"""The cause of a migration that a CPU waits for."""


class Homing:
    """Brings pages of devices home. `links` are the living devices by zone; `context_of` finds a process's context on one (0: none)."""

    def __init__(
        self,
        memory: PhysicalMemory,
        links: Mapping[int, DeviceLink],
        spaces: Mapping[int, AddressSpace],
        context_of: Callable[[int, int], int],
        profile: Profile,
        now: Callable[[], float],
    ) -> None:
        self.events = Events(now)
        """Who wants to hear what moves; `hmmnet.observe.events`."""
        self.memory = self._memory = memory
        self._links = links
        self.spaces = spaces
        self._context_of = context_of
        self._profile = profile
        self._now = now

    async def migrate_to_ram(self, space: AddressSpace, pages: Words | int) -> None:
        """A CPU touched device-private `pages` (consecutive, in one VMA and one zone), or wants coherent ones for good (FOLL_LONGTERM).
        One page may come as a number.

        What comes in one transfer here is a fault for each page in the kernel, and a migrate_vma of that page (test_hmm, nouveau), or one
        for a huge page: so many are counted, and the CPU waits for the ways of as many answers.

        Hold the mmap lock for reading. Returns when it makes sense to look again. Raises BusError when the data are lost, and when the
        device has them and several copies in a row failed; KernelError(ENOMEM).
        """
        began_s = self._now()
        first, count = (pages, 1) if isinstance(pages, int) else (int(pages[0]), len(pages))
        zone = space.zone_at(first)
        link = self._links.get(zone)
        if link is None:
            there = self._memory.zones.get(zone)
            if there is not None and there.on_touch is not None:
                await there.on_touch(space, np.arange(first, first + count, dtype=np.uint64))
                return
            raise self._lost(space, first, zone, "the device is gone")
        if self._memory.points.armed:
            await _at("home.fault", space, link, first, count)
        whole = count == HUGE_PAGES and bool(space.entries(np.array([first], np.uint64))[0] & word_of(pte.HUGE))
        try:
            one = count == 1 and link.kind == "private"
            moved = await (self._home_one(space, link, first) if one else self._bring_pages(space, link, first, first + count))
        except PeerError as error:
            moved = await self._touched_again(space, link, first, count, error)
        faults = 1 if whole else moved
        if faults > 1:
            await link.answers_apart(space.node, faults - 1)
        if moved:
            self._profile.record(CPU_FAULT, moved * PAGE_SIZE, self._now() - began_s, link.name, faults)

    async def _touched_again(self, space: AddressSpace, link: DeviceLink, first: int, count: int, error: PeerError) -> int:
        """A copy of `count` pages that a CPU touched has failed, and left them on the device: again. How many moved. Raises BusError."""
        for _ in range(COPIES_MAX - 1):
            if isinstance(error, PeerLost) or self._links.get(link.zone) is not link:
                break
            await trio.lowlevel.checkpoint()
            try:
                if count == 1 and link.kind == "private":
                    return await self._home_one(space, link, first)
                return await self._bring_pages(space, link, first, first + count)
            except PeerError as failed:
                error = failed
        if isinstance(error, PeerLost) or self._links.get(link.zone) is not link:
            raise self._lost(space, first, link.zone, str(error)) from error
        why = f'page 0x{first:x} of process {space.number} is intact on device "{link.name}" and could not be copied home'
        raise BusError(first << PAGE_SHIFT, f"{why} in {COPIES_MAX} tries: {error}") from error

    def _lost(self, space: AddressSpace, page: int, zone: int, cause: str) -> BusError:
        self._memory.there()
        owner = self._memory.zones[zone].owner if zone in self._memory.zones else f"zone {zone}"
        why = f'page 0x{page:x} of process {space.number} has its only copy on device "{owner}" and cannot come home: {cause}'
        return BusError(page << PAGE_SHIFT, why)

    async def _bring_pages(self, space: AddressSpace, link: DeviceLink, first: int, end: int) -> int:
        """Bring pages [first, end), of one VMA, home because a CPU touched them; returns how many moved."""
        parts: list[Migration] = []
        await self._collect(parts, space, link, first, end)
        refuse = partial(link.no_large, self._context_of(space.number, link.zone))
        return await self._bring(space, link, parts, TOUCHED, refuse)

    async def _collect(self, parts: list[Migration], space: AddressSpace, link: DeviceLink, start: int, end: int) -> None:
        """The device's pages of [start, end), of one VMA, are behind migration entries, as `parts` say; none when this is interrupted."""
        try:
            await collect(parts, space, self.spaces, start, end, memory_of(link), link.zone)
        except BaseException:  # after they were, when the announcement ends
            for part in parts:
                give_up(self._memory, space, part)
            raise

    async def _bring(self, space: AddressSpace, link: DeviceLink, parts: list[Migration], cause: str, refuse: Refuse) -> int:
        """Copy and change over what `parts` collected; returns how many pages moved. Whatever fails, nothing of them stays half way.

        Whose first huge page comes first is `refuse`d a large page first.
        """
        moved, waiting = 0, sorted(parts, key=_first_huge) if len(parts) > 1 else list(parts)
        try:
            while waiting:
                part = waiting.pop(0)
                if part.large:
                    moved += await self._bring_large(space, link, part, cause, refuse)
                else:
                    moved += await self._bring_small(space, link, part, cause, refuse)
        except BaseException:
            for part in waiting:
                give_up(self._memory, space, part)
            raise
        return moved

    async def _bring_large(self, space: AddressSpace, link: DeviceLink, part: Migration, cause: str, refuse: Refuse) -> int:
        """`_bring` for huge pages as one; those for which the host has none go page by page, behind the others."""
        heads = np.zeros(len(part.pages), np.uint64)
        torn: list[Migration] = []
        points, first, count = space.points, int(part.pages[0]), part.count
        try:
            if points.armed:
                await _at("home.collected", space, link, first, count)
                await _at("home.before_copy", space, link, first, count)
            refused = int(refuse())  # one at most is, and it is asked for first
            if refused < len(heads):
                self._allocate_folios(heads[refused:], space.node)
            if not heads.all():
                space.tear(part, heads == 0, small=True)
                torn, part.torn = part.torn, []
            rows = heads.nonzero()[0]
            if len(rows):
                pages, frames = listed(part, part.pages[rows]), listed(part, part.source[rows] >> SHIFT)
                await link.copy_out(self._context_of(space.number, link.zone), pages, frames, Landing(listed(part, heads[rows])))
            if points.armed:
                await _at("home.before_pages", space, link, first, count)
        except BaseException:
            for one in (part, *torn):
                give_up(self._memory, space, one)
            self._memory.put_folios(heads[heads != 0])
            raise
        set_targets(part, heads)
        try:
            moved = await self._change_over(space, link, part, cause)
        except BaseException:
            for one in torn:
                give_up(self._memory, space, one)
            raise
        part.torn += torn
        return moved + await self._bring(space, link, torn, cause, _always)

    def _allocate_folios(self, heads: Words, node: int) -> None:
        """Fill `heads` with those of folios, as far as the host has any. Raises KernelError(ENOMEM) where a fault is injected."""
        points = self._memory.points
        if points.armed and points.fails("host.alloc.home", pages=len(heads) * HUGE_PAGES):
            raise KernelError(errno.ENOMEM, "migrate_to_ram", f"huge pages want to come home; {points.why('host.alloc.home')}")
        got = self._memory.allocate_folios(len(heads), node)
        heads[: len(got)] = got

    async def _change_over(self, space: AddressSpace, link: DeviceLink, part: Migration, cause: str) -> int:
        """migrate_vma_pages and finalize; how many pages moved."""
        points, first, count = space.points, int(part.pages[0]), part.count
        space.migrate_pages(part)
        moved = part.cpages
        try:
            if points.armed:
                await _at("home.before_finalize", space, link, first, count)
        finally:
            space.migrate_finalize(part)
        if self.events.heard:
            for one in (part, *part.torn):
                pages = page_by_page(listed(one, one.pages[one.source & MIGRATE != 0]))
                self.events.moved(space.number, pages, link.name, HOST, cause)
        if points.armed:
            await _at("home.after", space, link, first, count)
        return moved

    async def _bring_small(self, space: AddressSpace, link: DeviceLink, migration: Migration, cause: str, refuse: Refuse) -> int:
        """`_bring` page by page."""
        source = migration.source
        both = int(MIGRATE | VALID)
        whole = bits_in_all(source) & both == both
        going = slice(None) if whole else source & both == both  # a never-touched page is collected too, and has nothing to bring
        pages = migration.pages[going]
        if len(pages) == 0:
            space.migrate_pages(migration)  # without a destination nothing moves
            space.migrate_finalize(migration)
            return 0
        frames = source[going] >> SHIFT
        points, first, count = space.points, int(pages[0]), len(pages)
        wanted, room = pages, self._room(len(pages))
        destination = None
        try:
            huge = whole_blocks(migration.saved[going], pages)
            refused = [at for at in huge if refuse()]
            for at in refused:  # also where its pages come to lie together by chance
                space.split_going(migration, at if isinstance(going, slice) else int(np.flatnonzero(going)[at]))
                huge.remove(at)
            if room < len(wanted):
                going = (np.arange(len(source)) if isinstance(going, slice) else np.flatnonzero(going))[:room]
                pages, frames, huge = wanted[:room], frames[:room], [at for at in huge if at + HUGE_PAGES <= room]
            destination = HostFrames(self._memory, len(pages), space.node, huge, (first, space.number))
            if points.armed:
                await _at("home.collected", space, link, first, count)
                await _at("home.before_copy", space, link, first, count)
            await link.copy_out(self._context_of(space.number, link.zone), pages, frames, destination)
            if points.armed:
                await _at("home.before_pages", space, link, first, count)
            words = destination.frames() << SHIFT
        except BaseException:
            give_up(self._memory, space, migration)
            if destination is not None:
                destination.release()
            raise
        words |= VALID
        migration.target[going] = words
        moved = await self._change_over(space, link, migration, cause)
        if room < len(wanted):
            raise no_room(len(wanted) - room, "", int(wanted[room]), space.number)
        return moved

    def _room(self, pages: int) -> int:
        """For how many of `pages` there is memory; at least for one, whose want will say that there is none.

        The kernel's drivers allocate page by page (alloc_page_vma), whatever they have collected: what there is room for comes home, and
        somebody is killed for one page more, not for all of them.
        """
        return pages if not self._memory.lacks(pages) else max(1, self._memory.free_pages)

    async def _home_one(self, space: AddressSpace, link: DeviceLink, page: int) -> int:
        """One page, with as little as possible: this is what a CPU fault waits for. `_bring`, for the general case, does the same."""
        zone, target = link.zone, 0
        if space.hub.pass_through(page, zone):
            frame = space.take_one(page, zone)
        else:
            frame = await _take_one(space, page, zone)
        if frame is None:
            return await self._bring_pages(space, link, page, page + 1)

        points = self._memory.points

        def allocate() -> int:
            nonlocal target
            lacks = points.armed and points.fails("host.alloc.home", pages=1)
            target = 0 if lacks else self._memory.allocate_bare(space.node) or 0
            if not target:
                raise no_room(1, points.why("host.alloc.home") if lacks else "", page, space.number)
            return target

        try:
            if points.armed:
                await _at("home.one.taken", space, link, page, 1)
            await link.fetch(self._context_of(space.number, zone), page, frame, allocate)
            if points.armed:
                await _at("home.one.copied", space, link, page, 1)
        except BaseException:
            space.put_back_one(page, frame)
            if target:
                self._memory.put_one(target)
            raise
        if not space.bring_one(page, frame, target):
            return 0
        if self.events.heard:
            self.events.moved(space.number, np.array((page,), dtype=np.uint64), link.name, HOST, TOUCHED)
        return 1

    async def migrate_to_system(
        self, space: AddressSpace, link: DeviceLink, start: int, end: int, cause: str = "user", context: int = 0
    ) -> Outcome:
        """Move the device's pages of [start, end) home, VMA by VMA; others stay. Raises PeerLost, KernelError(ENOMEM).

        `cause` is told; `context` is who asks for it (0: the process).

        Somebody may be killed for memory; what has come home by then has moved. Hold no lock.
        """
        words: list[Words] = []
        page, begun = start, _NONE

        async def rest() -> Outcome:
            """From `page` on, of which what `begun` says has moved."""
            nonlocal page, begun
            async with space.mmap_lock.read():
                if space.points.armed:
                    await _at("home.explicit", space, link, page, end - page)
                while page < end:
                    vma = space.vma_at(page)
                    stop = page + 1 if vma is None else min(end, vma.end, (page + HOME_PAGES_MAX) // HUGE_PAGES * HUGE_PAGES)
                    try:
                        space.check_migratable(page, stop)
                    except KernelError as error:
                        return Outcome(joined([*words, _together(begun, np.zeros(end - page, np.uint64))]), error.code)
                    parts: list[Migration] = []
                    try:
                        await self.home_range(space, link, page, stop, cause, parts, context)
                    except OutOfMemory:
                        begun = words_by_page(_together(begun, words_of(parts, stop - page)))
                        raise
                    words.append(_together(begun[: stop - page], words_of(parts, stop - page)))
                    page, begun = stop, begun[stop - page :]
            return Outcome(joined(words))

        return await self._memory.relief.anew(rest, space.number)

    async def home_range(
        self, space: AddressSpace, link: DeviceLink, start: int, end: int, cause: str, parts: list[Migration], context: int = 0
    ) -> int:
        """Move the device's pages of [start, end), which lies in one VMA, home; how many moved. What was collected is added to `parts`.

        Hold the mmap lock for reading. Raises PeerLost, KernelError(ENOMEM).
        """
        await self._collect(parts, space, link, start, end)
        refuse = partial(link.no_large, context or self._context_of(space.number, link.zone))
        return await self._bring(space, link, parts, cause, refuse)

    def places_of(self, outcome: Outcome, start: int) -> Iterator[tuple[str, Words]]:
        """Where the pages were that a migration to a device moved, of a range from page `start` on: (device or HOST, pages)."""
        pages = outcome.moved_pages(start)
        words = words_by_page(outcome.words)
        zones = words[words & MIGRATE != 0] >> SHIFT >> word_of(ZONE_SHIFT)
        zones[zones < word_of(DEVICE_ZONE_MIN)] = 0
        for zone in np.unique(zones).tolist():
            there = self._memory.zones.get(zone)
            yield HOST if there is None or zone == 0 else there.owner, pages[zones == np.uint64(zone)]

    async def evict(self, link: DeviceLink, frames: Words, cause: str = "release") -> int:
        """migrate_device_range: bring `frames` of the device home, whoever maps them; returns how many went.

        Idle frames and frames that are busy stay, and those that there is no room for; the driver asks again for those. Nothing goes once
        the memory has been removed. Raises PeerLost, KernelError(ENOMEM).
        """
        points = self._memory.points
        if points.armed:
            await points.at("home.evict", device=link.name, pages=len(frames))
        mapped_at = list(mappings(self._memory, frames)) if self.is_there(link) else []
        migration = await self._taken(link, frames, mapped_at)
        going = migration.source & MIGRATE != 0
        if not any_of(going):
            return 0
        going[np.flatnonzero(going)[self._room(int(np.count_nonzero(going))) :]] = False
        destination = HostFrames(self._memory, int(np.count_nonzero(going)), link.node)
        try:
            if points.armed:
                await points.at("evict.collected", device=link.name, pages=len(frames))
            await link.copy_out(0, np.zeros(0, dtype=np.uint64), frames[going], destination)
            if points.armed:
                await points.at("evict.before_pages", device=link.name, pages=len(frames))
            migration.target[going] = destination.frames() << SHIFT | VALID
        except BaseException:
            give_up(self._memory, None, migration)
            destination.release()
            raise
        move(self._memory, None, migration)
        moved = migration.cpages
        try:
            if points.armed:
                await points.at("evict.before_finalize", device=link.name, pages=len(frames))
        finally:
            finalize(self._memory, None, migration)
        if self.events.heard:
            left = migration.source & MIGRATE != 0
            for mapped in mapped_at:
                self.events.moved(mapped.mm.number, np.sort(mapped.pages[left[mapped.rows]]), link.name, HOST, cause)
        return moved

    def broken(self, link: DeviceLink, frames: Words) -> int:
        """How many of the device's `frames` have broken memory: they stay where they are for ever. Raises PeerLost, as `is_there`."""
        return int(np.count_nonzero(self._memory.field(frames, "flags") & HWPOISON)) if self.is_there(link) else 0

    def is_there(self, link: DeviceLink) -> bool:
        """Whether the device's memory is, which may have been removed. Raises PeerLost when the device is lost, whose zone may be gone."""
        if self._links.get(link.zone) is not link:
            raise PeerLost(f'device "{link.name}" was lost while its memory was being evicted')
        return link.zone in self._memory.zones

    async def _taken(self, link: DeviceLink, frames: Words, mapped_at: Sequence[Mapped]) -> Migration:
        """What of `frames`, mapped at `mapped_at`, can go, behind migration entries; who was told may have removed the memory."""
        told: dict[int, list[Words]] = {}
        migration = None
        try:
            async with AsyncExitStack() as stack:
                for mapped in mapped_at:
                    await clear(stack, self.spaces, mapped.mm, mapped.pages, told=told)
                migration = collect_frames(self._memory, frames if self.is_there(link) else _NONE, told)
        except BaseException:  # also at the end of an announcement
            if migration is not None:
                give_up(self._memory, None, migration)
            raise
        return migration

    async def unplug(self, page_map: PageMap) -> None:
        """Hot removal of a device's memory, in use or not: pages go home by frame until nothing is left, then the map goes.

        Frames that are busy are tried again, those that are on their way for as long as they are. What stays for `EVICT_ROUNDS_MAX` rounds
        is held by somebody: where the kernel would wait in memunmap_pages for ever, HmmnetError names who holds how much. Raises PeerLost,
        KernelError(ENOMEM).
        """
        fruitless = 0
        link = self._links[page_map.zone.number]
        while fruitless < EVICT_ROUNDS_MAX and len(frames := page_map.used_frames()):
            moved = await self._memory.relief.anew(partial(self.evict, link, frames[:HOME_PAGES_MAX], "unplug"), KERNEL)
            fruitless = 0 if moved else fruitless + 1
            if fruitless == EVICT_ROUNDS_MAX and page_map.in_transit:
                fruitless -= 1
            await trio.sleep(EVICT_NAP_S * (1 << fruitless - 1) if 0 < fruitless < EVICT_ROUNDS_MAX else 0)
            if self._links.get(page_map.zone.number) is not link:  # what was still there has died with it
                raise PeerLost(f'device "{link.name}" was lost while its memory was being removed')
        page_map.remove()


def _together(before: Words, words: Words) -> Words:
    """What a range became in two tries, of which the first moved what `before` says, page by page (nothing: there was only one).

    Either may be about more pages: a mapping may have become longer or shorter meanwhile.
    """
    if len(before) == 0:
        return words
    words = words_by_page(words)
    count = min(len(words), len(before))
    both = np.where(before[:count] & MIGRATE != 0, before[:count], words[:count])
    return np.concatenate((both, before[count:], words[count:]))


async def _take_one(space: AddressSpace, page: int, zone: int) -> int | None:
    """`AddressSpace.take_one` while it is announced; nothing is taken when that is interrupted, at its end, too."""
    frame = None
    try:
        async with space.hub.invalidate(Event.MIGRATE, page, page + 1, zone):
            frame = space.take_one(page, zone)
    except BaseException:
        if frame is not None:
            space.put_back_one(page, frame)
        raise
    return frame


async def _at(name: str, space: AddressSpace, link: DeviceLink, start: int, pages: int) -> None:
    """A step boundary (`hmmnet.faults.points`)."""
    await space.points.at(name, device=link.name, process=space.number, start=start, pages=pages)


def memory_of(link: DeviceLink) -> Select:
    """What migrate_vma has to select to take pages of this device."""
    return Select.DEVICE_COHERENT if link.kind == "coherent" else Select.DEVICE_PRIVATE


def give_up(memory: PhysicalMemory, space: AddressSpace | None, migration: Migration) -> None:
    """Nothing has moved: without targets every page goes back to its old entry."""
    if space is None:
        move(memory, None, migration)
        finalize(memory, None, migration)
    else:
        space.migrate_pages(migration)
        space.migrate_finalize(migration)
