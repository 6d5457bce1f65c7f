"""Interval notifiers and the sequence counts that let a mirror race with the page table: mm/mmu_notifier.c without its locks.

A mirror must never program a translation that the CPU page table has dropped meanwhile, yet it may not hold a lock across a walk that
can sleep. The way out is a *sequence*. Each mm has one, even while the page table is quiet, odd while some range is being
invalidated; each subscription keeps the value it had when something of its interval was last invalidated, whether its device had to be
told or not. A reader notes its subscription's value (`read_begin`), walks, and before it programs anything compares again (`read_retry`):
a change in between means that the walk is stale.

Why the mm's count and not one per subscription: overlapping invalidations nest. The mm stays odd until the last of them ends, and a
reader whose subscription carries that very odd value knows that *its* range is not safe yet, and waits. All others go on.

The tree of intervals must not change while it is being walked over by invalidations that sleep, so inserts and removes that come while
the mm is odd are *deferred* to the moment when it turns even. An insert then starts with the odd value, so that its first reader waits;
a remove is complete only after that moment, so that no callback can follow it.

What differs from Linux: no locks (synchronous code is atomic here), and the interval tree is, for each class of lengths, a sorted list
of starts. Subscriptions are few, and either whole address spaces or aligned slabs: a lookup is one bisection for each class in use.

This file is the arithmetic; `hub.py` waits and sends.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hmmnet.errors import KernelError
from hmmnet.pages import PAGES_MAX

from .held import HeldPages

if TYPE_CHECKING:
    from .interfaces import DeviceLink

SEQUENCE_FIRST = 2
"""As in the kernel: even, and larger than the first value a subscription can carry."""


@dataclass(eq=False, slots=True)
class Subscription:
    """One mmu_interval_notifier: pages [start, end) that a device context mirrors.

    `sequence` is what the last invalidation stored (mmu_interval_set_seq). `own` filters MIGRATE events that the
    device of `link` caused itself, as drivers do in their callback. `held` are the pages that the device may have translations of; None: it
    is told of everything, held or not. Its driver drops `overshoot` pages behind the end of an event, too.
    """

    number: int
    start: int
    end: int
    link: DeviceLink
    context: int
    own: bool = True
    held: HeldPages | None = None
    overshoot: int = 0
    sequence: int = 0
    inserted: bool = False
    removed: bool = False
    gone: bool = False
    """Its removal has returned: from now on no callback may run (I7)."""
    running: int = 0
    """Callbacks that run now: who was told, and not yet waited for."""

    @property
    def order(self) -> tuple[int, int]:
        """The place in its length class: by start, then by age."""
        return self.start, self.number

    def overlaps(self, start: int, end: int) -> bool:
        """Whether [start, end) touches this interval."""
        return self.start < end and start < self.end

    def hold(self, start: int, end: int) -> None:
        """The device is given translations of pages of [start, end), or may be: it has to be told from now on what becomes of them."""
        start, end = max(start, self.start), min(end, self.end)
        if self.held is not None and start < end:
            self.held.add(start, end)

    def let_go(self, start: int, end: int) -> None:
        """The device has acknowledged an event on [start, end)."""
        if self.held is not None:
            self.held.discard(start, end)

    def concerns(self, start: int, end: int) -> bool:
        """Whether the device has to be told of an event on [start, end)."""
        return self.held is None or self.held.overlaps(start, end + self.overshoot)


@dataclass(eq=False, slots=True)
class _LengthClass:
    """Subscriptions of up to `longest` pages, by start."""

    longest: int
    keys: list[tuple[int, int]] = field(default_factory=list)
    members: list[Subscription] = field(default_factory=list)

    def add(self, subscription: Subscription) -> None:
        insort(self.keys, subscription.order)
        self.members.insert(bisect_left(self.keys, subscription.order), subscription)

    def discard(self, subscription: Subscription) -> None:
        i = bisect_left(self.keys, subscription.order)
        del self.keys[i], self.members[i]

    def overlapping(self, start: int, end: int) -> list[Subscription]:
        low = bisect_left(self.keys, (start - self.longest, 0))
        high = bisect_left(self.keys, (end, 0))
        return [found for found in self.members[low:high] if found.end > start]


class IntervalIndex:
    """Subscriptions found by the ranges they overlap (the interval tree)."""

    def __init__(self) -> None:
        self._classes: dict[int, _LengthClass] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, subscription: Subscription) -> None:
        """Insert."""
        power = (subscription.end - subscription.start - 1).bit_length()
        if power not in self._classes:
            self._classes[power] = _LengthClass(1 << power)
        self._classes[power].add(subscription)
        self._count += 1

    def discard(self, subscription: Subscription) -> None:
        """Remove one that is in."""
        power = (subscription.end - subscription.start - 1).bit_length()
        self._classes[power].discard(subscription)
        if not self._classes[power].keys:
            del self._classes[power]
        self._count -= 1

    def all(self) -> list[Subscription]:
        """Every one, by age."""
        return sorted((found for group in self._classes.values() for found in group.members), key=lambda found: found.number)

    def overlapping(self, start: int, end: int) -> list[Subscription]:
        """Those that overlap [start, end), by age: the order in which devices are told."""
        found: list[Subscription] = []
        for group in self._classes.values():
            found += group.overlapping(start, end)
        if len(found) > 1:
            found.sort(key=lambda subscription: subscription.number)
        return found

    def around(self, page: int) -> list[Subscription]:
        """Those that overlap one page, in no order."""
        found: list[Subscription] = []
        for group in self._classes.values():
            low = bisect_left(group.keys, (page + 1 - group.longest, 0))
            for subscription in group.members[low : bisect_left(group.keys, (page + 1, 0))]:
                if subscription.end > page:
                    found.append(subscription)  # noqa: PERF401 - a comprehension is a call more, in what each CPU fault goes through
        return found


class MmuNotifier:
    """The notifier state of one mm (struct mmu_notifier_subscriptions)."""

    def __init__(self) -> None:
        self.sequence = SEQUENCE_FIRST
        self.active = 0
        """Range invalidations between start and end."""
        self.dying = False
        """The mm is being torn down: nothing can be inserted any more."""
        self.index = IntervalIndex()
        self._deferred: list[Subscription] = []
        self._numbers = 0

    @property
    def is_invalidating(self) -> bool:
        """Whether readers of some subscription have to wait now (the sequence is odd)."""
        return self.sequence & 1 == 1

    def insert(
        self,
        start: int,
        end: int,
        link: DeviceLink,
        context: int,
        own: bool = True,
        held: HeldPages | None = None,
        overshoot: int = 0,
    ) -> Subscription:
        """mmu_interval_notifier_insert. Raises KernelError: EOVERFLOW for an empty or impossible interval, EINVAL when the mm is dying."""
        call = "mmu_interval_notifier_insert"
        if not 0 <= start < end <= PAGES_MAX:
            raise KernelError(errno.EOVERFLOW, call, f"pages [0x{start:x}, 0x{end:x}) are empty or leave the address space")
        if self.dying:
            raise KernelError(errno.EINVAL, call, "the address space is being torn down")
        self._numbers += 1
        subscription = Subscription(self._numbers, start, end, link, context, own, held, overshoot)
        if not self.active:
            subscription.sequence = self.sequence - 1
            self._add(subscription)
        elif self.is_invalidating:
            subscription.sequence = self.sequence
            self._deferred.append(subscription)
        else:
            self.sequence |= 1
            subscription.sequence = self.sequence
            self._add(subscription)
        return subscription

    def remove(self, subscription: Subscription) -> int | None:
        """mmu_interval_notifier_remove; returns the sequence that must have passed before it is complete, or None when it is already."""
        if subscription.removed:
            return None
        subscription.removed = True
        if not self.is_invalidating:
            self._discard(subscription)
            return None
        if subscription.inserted:
            self._deferred.append(subscription)
        else:
            self._deferred.remove(subscription)
        return self.sequence

    def _add(self, subscription: Subscription) -> None:
        subscription.inserted = True
        self.index.add(subscription)

    def _discard(self, subscription: Subscription) -> None:
        subscription.inserted = False
        self.index.discard(subscription)

    def start(self, start: int, end: int) -> list[Subscription]:
        """invalidate_range_start: returns who overlaps [start, end); the sequence is odd from here on if anybody does."""
        self.active += 1
        if not self.index:
            return []
        found = self.index.overlapping(start, end)
        if found:
            self.sequence |= 1
        return found

    def pass_through(self, page: int, owner: int) -> bool:
        """`start` and `end` in one, for a MIGRATE of one page for the device of zone `owner` which nobody else has to be told of.

        False, and nothing done, when somebody has, or when other invalidations are active.
        """
        if self.active:
            return False
        found = self.index.around(page)
        spared = [one for one in found if not one.own or one.link.zone != owner]
        for subscription in spared:
            if subscription.concerns(page, page + 1):
                return False
        if found:
            self.sequence += 2
            for subscription in spared:
                subscription.sequence = self.sequence - 1
        return True

    def end(self) -> bool:
        """invalidate_range_end; returns whether the sequence turned even, so that waiting readers must be woken."""
        assert self.active > 0, "invalidate_range_end without start"
        self.active -= 1
        if self.active or not self.is_invalidating:
            return False
        self.sequence += 1
        deferred, self._deferred = self._deferred, []
        for subscription in deferred:
            if subscription.removed:
                self._discard(subscription)
            else:
                self._add(subscription)
        return True

    def must_wait(self, subscription: Subscription) -> bool:
        """Whether read_begin has to sleep: the subscription is being invalidated at this moment."""
        return self.is_invalidating and subscription.sequence == self.sequence

    @staticmethod
    def read_retry(subscription: Subscription, sequence: int) -> bool:
        """mmu_interval_read_retry: whether what was read since read_begin returned `sequence` is stale."""
        return subscription.sequence != sequence
