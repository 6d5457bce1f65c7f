"""What a device may ask of the host: each message of a session checked, then carried out.

A decoded message is well formed and no more. Here its context must be one of this device's, its pages lie in an address space, its
frames be those that it may name. What is only late (a context that was closed meanwhile) is answered with an errno, what no correct driver
sends is a `ProtocolError`, which the session reports to the device and to our log.

Handlers that can answer at once are plain functions, which the session runs in the order of arrival; the rest get a task each.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import numpy as np
import trio

from hmmnet.errors import KernelError, PeerLost, ProtocolError
from hmmnet.fabric.clock import EmulatedClock
from hmmnet.pages import (
    HMM_PFN_ERROR,
    HMM_PFN_REQ_FAULT,
    HMM_PFN_VALID,
    PAGES_MAX,
    Words,
    from_wire,
    pages_in,
    to_wire,
    word_of,
)
from hmmnet.sleeping import Bell
from hmmnet.wire.messages import (
    PAGES_PER_MESSAGE_MAX,
    Evict,
    Evicted,
    Exclusive,
    MakeExclusive,
    Migrate,
    Migrated,
    MigrateDone,
    RangeFault,
    RangeFaulted,
    Subscribe,
    Subscribed,
    Unsubscribe,
)
from hmmnet.wire.session import LATER, Answer, Later, Session

from .device import Context, Life
from .dma_map import DeviceDma
from .held import HeldPages
from .homing import Homing
from .hub import Hub
from .interfaces import Select
from .link import STALLED_S
from .migrate import Announce, Copy, Grant, Outcome, migrate_to_device
from .mirror import Request
from .mm.relief import KERNEL
from .notifier import Subscription
from .personality import TODAY, Personality

SUBSCRIPTIONS_MAX = 1 << 16
"""Intervals that one context may have inserted: slabs of 512 MiB over 32 TiB."""
TABLE_UPDATE_S = 2.0
"""Real seconds that a device gets between `Migrated` and `MigrateDone`, heartbeats or not, before it counts as broken."""


class TableUpdate(Bell):
    """A migration that waits for its device; woken when it is over, or the device lost. `finalize` is to be done at `MigrateDone`."""

    __slots__ = ("_finalize", "over", "said")

    def __init__(self, finalize: Callable[[], None]) -> None:
        super().__init__()
        self._finalize = finalize
        self.said = False
        """The device has said that it uses its pages: what it writes from then on is theirs alone, whatever becomes of it."""
        self.over = False

    def end(self) -> None:
        """Finalize, once."""
        if not self.over:
            self._finalize()
            self.over = True
            self.ring()

    def cancel(self) -> None:
        """The device is lost."""
        self.ring()


class Requests:
    """Serves the control requests of one life of a device. Migrations run on in `nursery` after their reply."""

    def __init__(
        self,
        life: Life,
        homing: Homing,
        clock: EmulatedClock,
        nursery: trio.Nursery,
        dma: DeviceDma,
        personality: Personality = TODAY,
        copy: Copy | None = None,
    ) -> None:
        self._dma = dma
        self._personality = personality
        self._copy = copy
        self._life = life
        self._clock = clock
        self._homing = homing
        self._nursery = nursery
        self._points = life.page_map.points
        self._table_updates: dict[int, TableUpdate] = {}
        self._migrations = 0

    def attach(self, session: Session) -> None:
        """Answer `session`."""
        self._later = session.later
        session.on(Subscribe, self.subscribe)
        session.on(Unsubscribe, self.unsubscribe)
        session.on(RangeFault, self.range_fault)
        session.on(Migrate, self.migrate)
        session.on(MigrateDone, self.migrate_done)
        session.on(Evict, self.evict)
        session.on(MakeExclusive, self.make_exclusive)

    # --- mirror ---------------------------------------------------------------------------------------------------------------

    def subscribe(self, message: Subscribe) -> Subscribed | Awaitable[Subscribed]:
        """mmu_interval_notifier_insert. Raises KernelError: EOVERFLOW, EINVAL, ESRCH.

        What is being invalidated now the device will not be told of. It hears that it has subscribed once that is over, so that it never
        maps what a migration of its own brings in the middle of it (a driver would find its sequence odd, and try again).
        """
        context = self._life.context(message.context)
        if len(context.subscriptions) >= SUBSCRIPTIONS_MAX:
            raise ProtocolError(f"context {context.number} has {SUBSCRIPTIONS_MAX} subscriptions")
        held = HeldPages() if message.held and context.hub.order.spares else None
        made = context.hub.insert(message.start, message.end, self._life.link, context.number, message.own, held, message.overshoot)
        context.subscriptions[made.number] = made
        if context.hub.core.must_wait(made):
            return self._subscribed(context.hub, made)
        return Subscribed(made.number, made.sequence)

    @staticmethod
    async def _subscribed(hub: Hub, made: Subscription) -> Subscribed:
        await hub.read_begin(made)
        return Subscribed(made.number, made.sequence)

    async def unsubscribe(self, message: Unsubscribe) -> None:
        """mmu_interval_notifier_remove. Raises KernelError(ESRCH)."""
        context = self._life.context(message.context)
        subscription = context.subscriptions.pop(message.subscription, None)
        if subscription is None:
            raise ProtocolError(f"context {context.number} has no subscription {message.subscription}")
        start, end = subscription.start, subscription.end
        context.domain.revoke(start, end)  # first: of what changes once it is removed the device is not told
        if context.domain.busy(start, end):
            await self._life.link.quiet(context.domain, start, end)
        await context.hub.remove(subscription)

    async def range_fault(self, message: RangeFault) -> RangeFaulted:
        """hmm_range_fault; the translations in the answer are granted in the same step. Raises KernelError as table A3."""
        context, subscription = self._subscription(message.context, message.subscription)
        inputs = _words(message.inputs, "RangeFault.inputs")
        self._check_range(message.start, message.pages, "RangeFault")
        if message.start < subscription.start or message.start + message.pages > subscription.end:
            raise ProtocolError("RangeFault leaves its subscription's interval")
        if len(inputs) not in (0, message.pages):
            raise ProtocolError(f"RangeFault of {message.pages} pages with {len(inputs)} inputs")
        life, flags = self._life, (message.default_flags, message.flags_mask)
        request = Request(
            message.start, message.pages, life.zone, *flags, inputs if len(inputs) else None, life.link.node, message.unlocked
        )
        timeout_s = self._clock.real(message.timeout_ms / 1000) if message.timeout_ms > 0 else math.inf
        sequence, words = await self._personality.range_fault(context.space, context.hub, subscription, request, timeout_s)
        _check_still_there(context, subscription, "hmm_range_fault")
        words = self._dma.map(message.start, words, fault=bool(message.default_flags & HMM_PFN_REQ_FAULT or len(inputs)))
        context.domain.grant(message.start, words)
        _given(subscription, message.start, words)
        points = context.hub.points
        if points.armed:  # not before: what is granted must be good now
            process, start, pages = context.hub.process, message.start, message.pages
            await points.at("retry.after_read_retry", device=life.name, process=process, start=start, pages=pages)
        return RangeFaulted(sequence, to_wire(words))

    # --- migration ------------------------------------------------------------------------------------------------------------

    def migrate(self, message: Migrate) -> Migrated | Awaitable[Migrated] | Later:
        """migrate_vma. Raises KernelError(ESRCH, ENOMEM)."""
        context = self._life.context(message.context)
        self._life.link.flush_freed()
        self._check_range(message.start, message.pages, "Migrate")
        if message.direction == "system":
            return self._to_system(context, message)
        if message.direction != "device":
            raise ProtocolError(f"Migrate in direction {message.direction!r}")
        frames = _words(message.grant, "Migrate.grant")
        if pages_in(frames) != message.pages:
            raise ProtocolError(f"Migrate of {message.pages} pages with {pages_in(frames)} frames granted")
        if self._life.leaving:  # as if every page were busy: a driver has to live with that
            return Migrated(0, to_wire(np.zeros(message.pages, np.uint64)), 0, 0)
        self._life.migration_begins()
        self._nursery.start_soon(self._to_device, context, message, Grant(self._life.page_map.zone, frames), self._later(message))
        return LATER

    async def _to_system(self, context: Context, message: Migrate) -> Migrated:
        end = message.start + message.pages
        done = await self._homing.migrate_to_system(context.space, self._life.link, message.start, end, message.cause, context.number)
        self._life.link.flush_freed()
        return Migrated(0, to_wire(done.words), done.moved, done.errno)

    async def _to_device(self, context: Context, message: Migrate, grant: Grant, answer: Answer) -> None:
        """The whole migration, which goes on after it has been answered."""
        replied = False

        async def announce(outcome: Outcome, finalize: Callable[[], None]) -> None:
            nonlocal replied
            replied = True
            moved = outcome.moved
            self._migrations += bool(moved)
            number = self._migrations if moved else 0
            context.hold(message.start, message.start + message.pages)
            answer(Migrated(number, to_wire(outcome.words), moved, outcome.errno, outcome.tried))

            def finish() -> None:
                finalize()
                self._moved_in(context, message, outcome)

            if moved:
                update = self._table_updates[number] = TableUpdate(finish)
                try:
                    await self._table_updated(update)
                finally:
                    del self._table_updates[number]

        try:
            await self._migrate_in(context, message, grant, announce)
        except PeerLost as error:
            if not replied:
                answer(error)
        except Exception as error:
            if replied:
                raise
            answer(error)
        finally:
            self._life.migration_ends()

    async def _migrate_in(self, context: Context, message: Migrate, grant: Grant, announce: Announce) -> None:
        contexts = self._life.contexts_of(context.space.number)
        end = message.start + message.pages
        await _told(contexts, message.start, end)
        context.hold(message.start, end)
        domains = [one.domain for one in contexts]
        await migrate_to_device(
            context.space,
            self._homing.spaces,
            self._life.link,
            domains,
            message.start,
            self._personality.select(Select(message.select)),
            grant,
            announce,
            self._copy,
            partial(self._life.link.no_large, message.context),
        )

    async def _table_updated(self, update: TableUpdate) -> None:
        link = self._life.link
        link.transfers.add(update)
        try:
            for limit_s in (TABLE_UPDATE_S, STALLED_S):
                if not update.over and link.session.lost is None:
                    await update.heard_by(trio.current_time() + self._clock.real(limit_s))
            if not update.said and link.session.lost is None:
                link.condemn(f"it did not say that its table is up to date within {TABLE_UPDATE_S:g} s")
            while not update.over and link.session.lost is None:
                await update.heard()  # it did, and the host is slow
        finally:
            link.transfers.discard(update)
        if update.over:
            return
        if update.said:
            update.end()
        raise link.lost_error()

    def migrate_done(self, message: MigrateDone) -> Awaitable[None] | None:
        """The device has updated its table."""
        update = self._table_updates.get(message.migration)
        if update is None or update.over:
            return None
        update.said = True
        if not self._points.passes("migrate.before_finalize", self._life.name):
            return self._finalize_late(update)
        update.end()
        return None

    async def _finalize_late(self, update: TableUpdate) -> None:
        await self._points.at("migrate.before_finalize", device=self._life.name)
        update.end()

    def _moved_in(self, context: Context, message: Migrate, outcome: Outcome) -> None:
        events = self._homing.events
        if events.heard:
            for place, pages in self._homing.places_of(outcome, message.start):
                events.moved(context.space.number, pages, place, self._life.name, message.cause)

    async def evict(self, message: Evict) -> Evicted:
        """migrate_device_range. Raises KernelError(ENOMEM)."""
        frames = _words(message.frames, "Evict.frames")
        if len(frames) == 0:
            return Evicted(0)
        if not self._life.page_map.zone.holds(frames) or len(np.unique(frames)) != len(frames):
            raise ProtocolError("Evict names frames that are not the device's own, or one twice")
        evict = partial(self._personality.evict, self._homing, self._life.link, frames, message.cause)
        moved = await self._homing.memory.relief.anew(evict, KERNEL)  # __GFP_NOFAIL in dmirror_device_evict_chunk
        self._life.link.flush_freed()
        return Evicted(moved, self._homing.broken(self._life.link, frames) if moved < len(frames) else 0)

    # --- exclusive access -----------------------------------------------------------------------------------------------------

    async def make_exclusive(self, message: MakeExclusive) -> Exclusive:
        """make_device_exclusive_range; the translations in the answer are granted in the same step.

        An answer without words is one of pages that others took back before it could be given: ask again.
        Raises KernelError: EFAULT, ENOMEM, EOPNOTSUPP (v25 has no such thing).
        """
        self._personality.check_exclusive()
        context, subscription = self._subscription(message.context, message.subscription)
        self._check_range(message.start, message.pages, "MakeExclusive")
        end = message.start + message.pages
        if message.start < subscription.start or end > subscription.end:
            raise ProtocolError("MakeExclusive leaves its subscription's interval")
        while True:
            if message.folios:
                words = await context.space.make_exclusive_folios(message.start, end, self._life.zone)
            else:
                got = await context.space.make_exclusive(message.start, end, self._life.zone)
                words = context.space.exclusive_words(message.start, message.start + got)
            if not context.hub.core.must_wait(subscription):
                break
            await context.hub.read_begin(subscription)  # what is being invalidated now has no sequence of its own yet
        _check_still_there(context, subscription, "make_device_exclusive")
        words = self._dma.map(message.start, words, fault=False)
        context.domain.grant(message.start, words)
        _given(subscription, message.start, words)
        return Exclusive(subscription.sequence, to_wire(words))

    def _subscription(self, context: int, subscription: int) -> tuple[Context, Subscription]:
        found = self._life.context(context)
        if subscription not in found.subscriptions:
            raise ProtocolError(f"context {context} has no subscription {subscription}")
        return found, found.subscriptions[subscription]

    def _check_range(self, start: int, pages: int, call: str) -> None:
        if not 0 < pages <= PAGES_PER_MESSAGE_MAX or start + pages > PAGES_MAX:
            most = PAGES_PER_MESSAGE_MAX
            raise ProtocolError(f"{call} of pages [0x{start:x}, +{pages}): at least one, at most {most}, inside an address space")


def _check_still_there(context: Context, subscription: Subscription, call: str) -> None:
    """Before something is granted: without its subscription nothing would ever take it back. Raises KernelError(ESRCH)."""
    if subscription.number not in context.subscriptions:
        what = f"subscription {subscription.number} of context {context.number}"
        raise KernelError(errno.ESRCH, call, f"{what} was removed meanwhile")


def _given(subscription: Subscription, start: int, words: Words) -> None:
    """The device gets `words` (HMM_PFN) of pages from `start` on: it may hold those that lead somewhere, and what lies between."""
    usable = ((words & word_of(HMM_PFN_VALID | HMM_PFN_ERROR)) == word_of(HMM_PFN_VALID)).nonzero()[0]
    if len(usable):
        subscription.hold(start + int(usable[0]), start + int(usable[-1]) + 1)


async def _told(contexts: Sequence[Context], start: int, end: int) -> None:
    """Return when nothing of pages [start, end) is being invalidated: mmu_interval_read_begin, for a device's contexts.

    A device watches for invalidations while it migrates. One that it has acknowledged before, or was not told of, and that still waits for
    others, would take the pages away behind its back: madvise(MADV_DONTNEED) removes migration entries, too. So that one is waited for.
    """
    while busy := [
        (context.hub, subscription)
        for context in contexts
        for subscription in context.subscriptions.values()
        if subscription.overlaps(start, end) and context.hub.core.must_wait(subscription)
    ]:
        hub, subscription = busy[0]
        await hub.read_begin(subscription)


def _words(raw: bytes, what: str) -> Words:
    if len(raw) % 8:
        raise ProtocolError(f"{what} has {len(raw)} bytes; a list is whole 64-bit words")
    return from_wire(raw)
