"""The hub: every change of a page table is announced here before it happens, and waits here until devices have let go.

One hub for each address space, around the arithmetic of `notifier.py`. An invalidation goes in two passes, as
mmu_interval_notifier's invalidate_start and invalidate_finish do: *all* devices are told first, then all are waited for, so a
machine with eight devices pays for the slowest and not for the sum. A device that does not answer is fenced by its link; the hub
never gives up by itself.

Whoever changes a page table writes::

    async with hub.invalidate(Event.UNMAP, start, end):
        ...  # devices are quiet in [start, end); change the table; nothing here may wait for a device

With nobody subscribed that costs two attribute updates and no suspension.

That mirrors let go *before* the change is today's order (`AtStart`). The hub is given its order, as the machine's personality has it;
v25's, which tells mirrors at the end, stands in `v25/order.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Protocol

from hmmnet.faults.injector import Points
from hmmnet.pages import PAGES_MAX
from hmmnet.sleeping import Completion

from .held import HeldPages
from .interfaces import NO_OWNER, Acknowledgement, DeviceLink, Event
from .notifier import MmuNotifier, Subscription

LATE_MAX = 16
"""Callbacks that came too late of which is told: one is enough to know that a driver cannot rely on anything."""
WIDE_PAGES = 8
"""By how much an event is too wide, on either side, when that fault is injected."""


class Invalidation:
    """One invalidate_range_start / invalidate_range_end pair, as an async context manager. Cancelling it while it waits is safe."""

    __slots__ = ("_hub", "end", "event", "owner", "start")

    def __init__(self, hub: Hub, event: Event, start: int, end: int, owner: int) -> None:
        self._hub = hub
        self.event = event
        self.start = start
        self.end = end
        self.owner = owner

    async def __aenter__(self) -> None:
        core = self._hub.core
        found = core.start(self.start, self.end)
        if found:
            try:
                await self._let_go(found)
            except BaseException:
                self._hub.range_end()
                raise

    async def _let_go(self, found: list[Subscription]) -> None:
        """Tell all devices, then wait for all."""
        points = self._hub.points
        if not points.passes("hub.before_callbacks"):
            await self._at("hub.before_callbacks")
        told = self._tell(found, self._hub.core.sequence)
        try:
            if not points.passes("hub.after_callbacks"):
                await self._at("hub.after_callbacks")
            for subscription, acknowledgement in told:
                await acknowledgement.finish()
                if subscription.link.zone != self.owner:  # else it maps what comes afterwards
                    subscription.let_go(self.start, self.end)
            if not points.passes("hub.after_acks"):
                await self._at("hub.after_acks")
        finally:
            for subscription, _ in told:
                subscription.running -= 1

    async def _at(self, name: str) -> None:
        """A step boundary (`hmmnet.faults.points`)."""
        hub = self._hub
        await hub.points.at(name, process=hub.process, start=self.start, pages=self.end - self.start, event=self.event.value)

    def _fails(self, name: str, device: str) -> bool:
        """A choice that concerns `device`."""
        hub, pages = self._hub, self.end - self.start
        return hub.points.fails(name, device=device, process=hub.process, start=self.start, pages=pages, event=self.event.value)

    def _tell(self, found: list[Subscription], sequence: int) -> list[tuple[Subscription, Acknowledgement]]:
        """The first pass: set each subscription's sequence and start the device's work."""
        started: list[tuple[Subscription, Acknowledgement]] = []
        points = self._hub.points
        filters = self.event is Event.MIGRATE
        for subscription in found:
            link = subscription.link
            its_own = filters and subscription.own and link.zone == self.owner
            if its_own and not (points.armed and self._fails("hub.wrong_owner", link.name)):
                continue
            start, end = self.start, self.end
            subscription.sequence = sequence
            if subscription.gone:
                self._hub.too_late(subscription, f"was told of pages [0x{start:x}, 0x{end:x}) after its removal had returned")
            if not subscription.concerns(start, end):
                continue
            if points.armed and self._fails("hub.wide", link.name):
                start, end = max(0, start - WIDE_PAGES), min(PAGES_MAX, end + WIDE_PAGES)
            acknowledgement = link.invalidate_start(subscription.context, subscription.number, start, end, self.event, self.owner, sequence)
            if acknowledgement is not None:
                subscription.running += 1
                started.append((subscription, acknowledgement))
        self._hub.messages += len(started)
        if started and self._hub.watch is not None:
            self._hub.watch(self.start, self.end, str(self.event), len(started))
        return started

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if not self._hub.points.passes("hub.before_range_end"):
                await self._at("hub.before_range_end")
        finally:
            self._hub.range_end()


def _never(_page: int, _owner: int) -> bool:
    """A page that comes home is announced like every other change."""
    return False


class Order(Protocol):
    """When the mirrors of one address space hear of a change, and how: the hub's part of a personality."""

    spares: bool
    """Whether a device is told nothing of pages that it does not hold, and nobody else has to hear of those either."""

    def invalidation(self, hub: Hub, event: Event, start: int, end: int, owner: int) -> AbstractAsyncContextManager[object]:
        """Entered before [start, end) changes, left afterwards."""
        ...

    def tells_others(self) -> bool:
        """Whether somebody who is no subscription has to hear of every change."""
        ...


class AtStart:
    """Today's order: mirrors that overlap a range drop it before it changes."""

    spares = True
    invalidation = Invalidation

    def tells_others(self) -> bool:
        """See `Order`."""
        return False


class Hub:
    """The notifier hub of one address space, `process`'s. `order` is its own: v25's has state.

    `late` is where callbacks are complained of that came after their removal had returned (I7): a machine's hubs share one list.
    """

    def __init__(self, process: int = 0, points: Points | None = None, order: Order | None = None, late: list[str] | None = None) -> None:
        self.late: list[str] = [] if late is None else late
        self.order: Order = AtStart() if order is None else order
        self.core = MmuNotifier()
        self.pass_through = self.core.pass_through if self.order.spares else _never
        """A MIGRATE of one page that comes home from the device of a zone: whether nobody has to be told, or waited for.

        If so it is announced, and over: go on without suspension. If not, `invalidate`.
        """
        self._invalidation = self.order.invalidation
        self.process = process
        self.points = points or Points()
        self.messages = 0
        """Invalidations sent to devices so far."""
        self.watch: Callable[[int, int, str, int], None] | None = None
        """Called with (start, end, event, devices told) when mirrors are told to drop a range."""
        self._turned_even: Completion | None = None
        """Who waits for the sequence to turn even; mostly nobody does."""

    def invalidate(self, event: Event, start: int, end: int, owner: int = NO_OWNER) -> AbstractAsyncContextManager[object]:
        """Announce that [start, end) changes; entering returns when every device concerned has let go of it (in today's order).

        `owner`: the zone of the device on whose behalf a MIGRATE or EXCLUSIVE happens. RELEASE makes later inserts fail.
        """
        if event is Event.RELEASE:
            self.core.dying = True
        return self._invalidation(self, event, start, end, owner)

    def try_invalidate(self, start: int, end: int) -> bool:
        """invalidate_range_start_nonblock: begin, to be ended by `range_end`; False (EAGAIN) where a device would have to be waited for.

        Then nothing has begun, and no end follows.
        """
        if self.order.tells_others():
            return False
        if self.core.start(start, end):
            self.range_end()
            return False
        return True

    def range_end(self) -> None:
        """The last active invalidation over: apply what was deferred, wake readers and removers."""
        if self.core.end() and self._turned_even is not None:
            self._turned_even.set()
            self._turned_even = None

    def insert(
        self, start: int, end: int, link: DeviceLink, context: int, own: bool = True, held: HeldPages | None = None, overshoot: int = 0
    ) -> Subscription:
        """Subscribe to [start, end); see `Subscription`. Raises KernelError (EOVERFLOW, EINVAL)."""
        return self.core.insert(start, end, link, context, own, held, overshoot)

    async def remove(self, subscription: Subscription) -> None:
        """Unsubscribe; after this returns the device is told nothing more. Must not be awaited inside an invalidation."""
        pending = self.core.remove(subscription)
        while pending is not None and self.core.sequence == pending:
            await self._even()
        subscription.gone = True
        if subscription.running:
            self.too_late(subscription, "is still letting go of pages, and its removal has returned")

    async def _even(self) -> None:
        """Return when the sequence next turns even."""
        if self._turned_even is None:
            self._turned_even = Completion()
        await self._turned_even.wait()

    def too_late(self, subscription: Subscription, what: str) -> None:
        """Complain of a callback that runs though its subscription is gone."""
        if len(self.late) < LATE_MAX:
            where = f"pages [0x{subscription.start:x}, 0x{subscription.end:x})"
            who = f"subscription {subscription.number} of {subscription.link.name} to {where} of process {self.process}"
            self.late.append(f"{who} {what} (I7)")

    async def read_begin(self, subscription: Subscription) -> int:
        """mmu_interval_read_begin: the sequence that `read_retry` compares with; waits while the subscription is being invalidated."""
        while self.core.must_wait(subscription):
            await self._even()
        return subscription.sequence

    def read_retry(self, subscription: Subscription, sequence: int) -> bool:
        """Whether everything read since `read_begin` is stale."""
        return subscription.sequence != sequence
