"""The bottom half of fault handling: takes batches out of a context's fault buffer and makes their pages accessible.

One pass, as nvidia-uvm's service loop makes it: drop what is no miss any more (an earlier pass grew over it), let the policy choose what
to migrate, migrate, and map what is still missing where it is; what comes home from another device by that gets a second try. Nothing
is forced: pages that refuse to move (pinned, shared, taken by the CPU at this moment) are mapped over the link, and a page that is
pulled away again simply faults once more when it is replayed.

Two errors need finding out *which* page they mean, because a range fault fails as a whole: the range is halved until the bad page is alone.
It is then *fatal*, and ends the jobs that touched it and nothing else.

Pages that come and go faster than they can be used thrash (`thrashing`): before such a page is served there is a nap, and if naps do not
help it is not migrated for a while, but mapped where it is.

A write fault on an own page that is mapped read-only (copy-on-write after fork) is not upgraded by ``hmm_range_fault``, whatever it is
asked (table A3): the page is sent home, where the CPU side can break the sharing, and faulted again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from errno import EBUSY, EFAULT, EINVAL
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import trio

from hmmnet.errors import HmmnetError, KernelError, PeerError, PeerLost
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.pages import (
    DEVICE_ZONE_MIN,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_REQ_WRITE,
    HMM_PFN_WRITE,
    HUGE_SHIFT,
    ZERO_FRAME,
    ZONE_SHIFT,
    Words,
    among,
    any_of,
    distinct,
    runs_of,
    word_of,
)
from hmmnet.plugins import absent
from hmmnet.sleeping import Completion, sleep

from .context import MIGRATE_PAGES_MAX, Context, cut
from .faultbuffer import Batch, FaultBuffer
from .mirror import ENTRY_VALID, allows, frames_of
from .policy import Planned, make_policy
from .thrashing import Thrashing, without

LOOK_PIECES_MIN = 3
"""Scattered misses in 2 MiB from which on a snapshot is taken first."""
REPLAY_LOST_S = 0.5
"""After which accesses whose replay was lost count as faulting again."""
STAYS_S = 1e-3
"""Emulated seconds for which pages that would not move (somebody holds them, a file has them) are used where they are. An attempt takes
them out of the mirrors of all other devices: two that want the same page and try again and again keep each other from ever using it."""
RANGES_AT_ONCE = 4
"""Migrations or range faults of one pass that are under way together: hides the round trip, bounds what the host must juggle."""

_VALID = word_of(ENTRY_VALID)
_BLOCK_SHIFT = word_of(HUGE_SHIFT)
_ZERO = word_of(ZERO_FRAME)
_DEVICES = word_of(DEVICE_ZONE_MIN << ZONE_SHIFT)
"""Frames from here on are devices' own memory."""
Mask: TypeAlias = npt.NDArray[np.bool_]
RangeWork: TypeAlias = Callable[[int, int], Awaitable[None]]
_REQ_READ = HMM_PFN_REQ_FAULT
_REQ_WRITE = HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE


@dataclass
class ServiceCounts:
    """What the passes of a context amounted to."""

    groups: int = 0
    faults: int = 0
    duplicates: int = 0
    stale: int = 0
    """Faults that an earlier pass had resolved."""
    fatal: int = 0
    group_s: float = 0.0
    """Emulated seconds in all passes together."""


class FaultService:
    """Serves one context's fault buffer; `run` it as a task."""

    def __init__(self, context: Context, clock: EmulatedClock, *, compound: bool = False, name: str = "") -> None:
        self.buffer = FaultBuffer()
        self.counts = ServiceCounts()
        self._context = context
        self._clock = clock
        self._now = clock.now
        self._thrashing = Thrashing(f"{name} {context.process.number} {context.number}")
        self._compound = compound
        self._wake = Completion()
        self._policies: dict[str, Planned] = {}
        self._stays = np.zeros(0, np.uint64)
        """Pages that would not move, and are left where they are until `_stays_until_s`."""
        self._stays_until_s = 0.0

    def policy(self, name: str) -> Planned | None:
        """This context's policy called `name`, None when there is none. Raises BadPlan for something that is no policy."""
        if name not in self._policies:
            made = make_policy(name)
            if made is None:
                return None
            self._policies[name] = made
        return self._policies[name]

    def interrupt(self) -> None:
        """There are faults in the buffer."""
        self._wake.set()

    async def run(self) -> None:
        """Serve for as long as the context is open."""
        while True:
            batch = self.buffer.fetch(self.buffer.entries)
            if batch is None:
                await self._wake.wait()
                self._wake = Completion()
                continue
            began_s = self._now()
            points = self._context.points
            try:
                if points.armed:
                    await self._context.at("device.fetch", int(batch.pages[0]), int(batch.pages[-1]) + 1)
                fatal = await self._service(batch)
                if points.armed:
                    fatal |= await self._faulty(batch)
                    await self._context.at("device.replay", int(batch.pages[0]), int(batch.pages[-1]) + 1)
            except HmmnetError as error:
                # The host is gone or at fault, or the process is: whoever waits for these pages must not wait for ever.
                fatal = dict.fromkeys(batch.pages.tolist(), error)
            self._count(batch, fatal, self._now() - began_s)
            if points.armed and self._fails("device.replay_lost", batch.pages):
                await sleep(REPLAY_LOST_S)
                self.buffer.again(batch)
                continue
            self.buffer.finish(batch, fatal)

    async def _faulty(self, batch: Batch) -> dict[int, HmmnetError]:
        """What faults of the fault path itself do to a batch that was serviced; pages that cannot be had by it."""
        points, first, page = self._context.points, batch.pages[:1], int(batch.pages[0])
        if self._fails("device.duplicate", first):
            await self._service(batch)
        if self._fails("device.unserviceable", first):
            return {page: KernelError(EFAULT, "fault", f"page 0x{page:x}: {points.why('device.unserviceable')}")}
        return {}

    def _fails(self, name: str, pages: Words) -> bool:
        """A choice that concerns sorted `pages`."""
        start, process = int(pages[0]), self._context.process.number
        return self._context.points.fails(name, process=process, start=start, pages=int(pages[-1]) + 1 - start)

    def _count(self, batch: Batch, fatal: dict[int, HmmnetError], seconds: float) -> None:
        self.counts.groups += 1
        self.counts.group_s += seconds
        self.counts.faults += len(batch.pages)
        self.counts.duplicates += batch.duplicates
        self.counts.fatal += len(fatal)
        batch.leader.group_count += 1
        batch.leader.group_s += seconds
        for ticket, pages in batch.parts:
            ticket.fault_count += len(pages)

    async def _service(self, batch: Batch) -> dict[int, HmmnetError]:
        policy = self.policy(batch.placement)  # made at the launch of the job, if that was one of the host's
        if policy is None:
            raise KernelError(EINVAL, "launch", absent("placement", batch.placement))
        fatal: dict[int, HmmnetError] = {}
        pages, write = self._still_missing(batch.pages, batch.write)
        self.counts.stale += len(batch.pages) - len(pages)
        verdict = self._thrashing.note_faults(pages, self._now())
        if any_of(verdict.after):
            await self._serve(pages[~verdict.after], write[~verdict.after], policy, fatal)
            pages, write = pages[verdict.after], write[verdict.after]
            await self._nap(verdict.nap_s)
            self._thrashing.napped(pages, self._now())
            pages, write = self._still_missing(pages, write)
        await self._serve(pages, write, policy, fatal)
        return fatal

    async def back_off(self) -> None:
        """Somebody has what this device wants: let them use it."""
        await self._nap(self._thrashing.draw_nap())

    async def _nap(self, seconds: float) -> None:
        await self._clock.sleep_until(self._now() + seconds)

    async def _serve(self, pages: Words, write: Mask, policy: Planned, fatal: dict[int, HmmnetError]) -> None:
        """Make `pages` accessible; what cannot be had is added to `fatal`."""
        if not len(pages):
            return
        moving = self._may_move(pages)
        await self._migrate(pages[moving], write[moving], policy, fatal)
        pages, write = self._still_missing(pages, write, fatal)
        if not len(pages):
            return
        missing, write_missing = pages, write
        pages_own = pages[write & self._read_only_own(pages)]
        if len(pages_own):
            await self._each(self._send_home, pieces(pages_own), pages_own, fatal)
        looked = await self._look(pages, write)
        if looked or len(pages_own):
            pages, write = self._still_missing(pages, write, fatal)
        for wanted, flags in ((False, _REQ_READ), (True, _REQ_WRITE)):
            some = pages[write == wanted]
            if len(some):
                await self._each(partial(self._map, flags, fatal), self._cut(pieces(some)), some, fatal)
        await self._migrate_again(missing, write_missing, policy, fatal)

    def _still_missing(self, pages: Words, write: Mask, fatal: Collection[int] = ()) -> tuple[Words, Mask]:
        """Those of `pages` that are not accessible yet, and can be for all that is known."""
        entries = self._context.mirror.translate(pages)
        missing: Mask = ~allows(entries, False)
        if any_of(write):
            missing |= write & ~allows(entries, True)
        if fatal:
            missing &= ~np.isin(pages, np.fromiter(fatal, np.uint64, len(fatal)))
        return pages[missing], write[missing]

    def _read_only_own(self, pages: Words) -> Mask:
        entries = self._context.mirror.translate(pages)
        stuck: Mask = (entries & _VALID != 0) & self._context.memory.owns(frames_of(entries)) & ~allows(entries, True)
        return stuck

    async def _migrate(self, pages: Words, write: Mask, policy: Planned, fatal: dict[int, HmmnetError]) -> None:
        """Migrate what the policy chooses; behind a mapping that does not take part, into which growth ran, just the faulted pages."""
        if len(pages) == 0:
            return

        async def one(start: int, end: int) -> None:
            try:
                moved = await self._context.migrate_in(start, end, "fault", compound=self._compound)
            except KernelError:
                return  # mapping the pages where they are says what is wrong with them, page by page
            if moved.errno:
                exact = pieces(pages[(pages >= np.uint64(moved.tried_until)) & (pages < np.uint64(end))])
                if exact != [(start, end)]:
                    for low, high in exact:
                        await one(low, high)

        ranges = without(policy.ranges(pages, write), self._thrashing.pinned(self._now()))
        await self._each(one, self._cut(ranges), pages, fatal)

    async def _look(self, pages: Words, write: Mask) -> bool:
        """Map what needs no faulting: where misses are scattered, one snapshot of a block replaces a range fault for each of them.

        Only pages that missed are entered: a neighbour that nobody touched would never be offered to the policy. Returns whether any were.
        """
        if len(pages) < LOOK_PIECES_MIN:
            return False
        looks = []
        for block in distinct(pages >> _BLOCK_SHIFT).tolist():
            inside = pages >> _BLOCK_SHIFT == np.uint64(block)
            if len(pieces(pages[inside])) >= LOOK_PIECES_MIN:
                looks.append((pages[inside], write[inside]))
        for some, some_write in looks:
            program = partial(self._enter, some, some_write)
            for low, high in self._cut([(int(some[0]), int(some[-1]) + 1)]):
                try:
                    await self._context.range_fault(low, high, 0, program=program)
                except KernelError:
                    return True  # faulting page by page says what is wrong
        return bool(looks)

    def _enter(self, pages: Words, write: Mask, start: int, words: Words) -> None:
        """Enter the snapshot's words of `pages`, where they give the right that is wanted."""
        inside = (pages >= np.uint64(start)) & (pages < np.uint64(start + len(words)))
        places = (pages[inside] - np.uint64(start)).astype(np.intp)
        chosen = np.zeros_like(words)
        suits = ~write[inside] | (words[places] & word_of(HMM_PFN_WRITE) != 0)
        chosen[places[suits]] = words[places[suits]]
        self._context.mirror.program(start, chosen)

    async def _migrate_again(self, pages: Words, write: Mask, policy: Planned, fatal: dict[int, HmmnetError]) -> None:
        """What another device held is at home now that it was mapped (migrate_vma passes over foreign pages): it can move here.

        What another device holds still would not move before, and does not now.
        """
        entries = self._context.mirror.translate(pages)
        frames = frames_of(entries)
        valid = entries & _VALID != 0
        may = valid & self._may_move(pages)
        here = may & (frames < _DEVICES) & (frames != _ZERO)
        foreign = may & (frames >= _DEVICES) & ~self._context.memory.owns(frames)
        asked = here | foreign
        if self._context.memory.free_pages and any_of(asked) and policy.ranges(pages[asked], write[asked]):
            self._leave(pages[foreign])
            if here.any():
                await self._each(self._try_migrate, self._cut(pieces(pages[here])), pages[here], fatal)

    async def _try_migrate(self, start: int, end: int) -> None:
        """Migrate pages that are mapped already; those that still do not move are left alone for a while."""
        moved = np.zeros(0, np.uint64)
        with contextlib.suppress(KernelError):  # the pages are mapped where they are
            moved = (await self._context.migrate_in(start, end, "fault", compound=self._compound)).pages
        self._leave(np.setdiff1d(np.arange(start, end, dtype=np.uint64), moved))

    def _leave(self, pages: Words) -> None:
        """Pages that would not move are left where they are for a while."""
        if len(pages):
            self._stays = np.union1d(self._stays, pages) if self._now() < self._stays_until_s else pages
            self._stays_until_s = self._now() + STAYS_S

    def _may_move(self, pages: Words) -> Mask:
        """Which of `pages` have not just refused to move, and do not thrash."""
        pinned = self._thrashing.pinned(self._now())
        may: Mask = ~among(pages, pinned) if len(pinned) else np.ones(len(pages), np.bool_)
        if len(self._stays) and self._now() < self._stays_until_s:
            may &= ~among(pages, self._stays)
        return may

    async def _send_home(self, start: int, end: int) -> None:
        try:
            await self._context.migrate_out(start, end, "fault")
        except KernelError:
            return  # as above

    async def _map(self, flags: int, fatal: dict[int, HmmnetError], start: int, end: int) -> None:
        """Range-fault [start, end); halve it to find the first page that cannot be had. What lies behind it faults again if wanted."""
        try:
            await self._context.range_fault(start, end, flags)
        except KernelError as error:
            if error.code == EBUSY:
                return  # the range changes too fast to be read: the replay will fault again
            if end - start == 1:
                fatal[start] = error
                return
            middle = (start + end) // 2
            known = len(fatal)
            await self._map(flags, fatal, start, middle)
            if len(fatal) == known:
                await self._map(flags, fatal, middle, end)
            return
        if flags == _REQ_WRITE:
            stuck = np.arange(start, end, dtype=np.uint64)
            stuck = stuck[self._read_only_own(stuck)]
            for low, high in pieces(stuck):
                await self._break_cow(low, high, fatal)

    async def _break_cow(self, start: int, end: int, fatal: dict[int, HmmnetError]) -> None:
        await self._send_home(start, end)
        for page in range(start, end):
            try:
                await self._context.range_fault(page, page + 1, _REQ_WRITE)
            except KernelError as error:
                if error.code != EBUSY:
                    fatal[page] = error

    def _cut(self, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Ranges cut at the borders of subscriptions and at the largest migration."""
        return [
            piece
            for start, end in ranges
            for first, stop in self._context.slabs(start, end)
            for piece in cut(first, stop, MIGRATE_PAGES_MAX)
        ]

    async def _each(self, work: RangeWork, ranges: list[tuple[int, int]], pages: Words, fatal: dict[int, HmmnetError]) -> None:
        """Do `work` on every range, a few at a time. Where the host fails at one, its `pages` are `fatal`: others may be another job's.

        Raises PeerLost.
        """

        async def one(start: int, end: int) -> None:
            try:
                await work(start, end)
            except PeerLost:
                raise
            except PeerError as error:
                fatal.update(dict.fromkeys(pages[(pages >= np.uint64(start)) & (pages < np.uint64(end))].tolist(), error))

        if len(ranges) <= 1:
            for start, end in ranges:
                await one(start, end)
            return
        todo = iter(ranges)
        lost: list[PeerLost] = []

        async def worker() -> None:
            try:
                for start, end in todo:
                    await one(start, end)
            except PeerLost as error:
                lost.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(min(RANGES_AT_ONCE, len(ranges))):
                nursery.start_soon(worker)
        if lost:
            raise lost[0]


def pieces(pages: Words) -> list[tuple[int, int]]:
    """Ascending `pages` as ranges."""
    return runs_of(pages)
