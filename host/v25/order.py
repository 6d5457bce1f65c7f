"""v25's order of an invalidation, for the one hub: the start counts, the page table changes, and at the end mirrors let go.

What keeps data safe in between, when a device may still use what it was given:

- Nothing stale is handed out. Subscriptions of devices get the new (odd) sequence at the start, in the host alone, so that a range fault
  waits for the end, or starts over; ranges of drivers in the host do not hold while something that overlaps them is changing (`hmm.py`).
- What a device reaches by a translation that it was given before is still the same memory: frames that become free wait for the end of the
  change (`mm/gather.py`, the mmu_gather of the kernel), and a migration copies only after it.
- The end returns when every device has acknowledged, or is fenced. Only then does whoever changed the page table go on: munmap returns,
  pages are copied, the mmap lock is let go.

*Every* mirror of the address space is called, not only those that overlap, one after the other (v25 called them under one semaphore; two
passes came later), and no owner is spared: a driver hears of the migrations that it makes itself. What a device process is told as
`owner` is whose call this is, which a driver of v25 knew, since its callback ran inside its own call.
"""

from __future__ import annotations

import errno
from types import TracebackType

import trio

from hmmnet.errors import KernelError
from hmmnet.host.hub import Hub
from hmmnet.host.interfaces import DeviceLink, Event
from hmmnet.host.mm.gather import Gather
from hmmnet.host.mm.locks import RwLock
from hmmnet.host.notifier import Subscription
from hmmnet.pages import PAGE_SHIFT

from .hmm import HMM_UPDATE_INVALIDATE, Hmm

UNKNOWN_SUBSCRIPTION = 0
"""No subscription has this number: whoever is told by it drops the range, and no sequence changes."""


class AtEnd:
    """v25's order for one address space: its `Hmm`, and what has to be held to call mirrors."""

    spares = False

    def __init__(self, gather: Gather) -> None:
        self.hmm = Hmm()
        self.mirrors_sem = RwLock()
        """Read by whoever calls mirrors, written by whoever registers one."""
        self.calling: list[trio.lowlevel.Task] = []
        """The tasks that run a driver's callback at this moment."""
        self.gather = gather

    def invalidation(self, hub: Hub, event: Event, start: int, end: int, owner: int) -> RangeEnd:
        """See `Order.invalidation`. Every event is an INVALIDATE."""
        del event
        return RangeEnd(self, hub, start, end, owner)

    def tells_others(self) -> bool:
        """Drivers in the host, who may sleep in their callbacks: the OOM reaper of 4.14 leaves an mm with notifiers alone."""
        return bool(self.hmm.mirrors)

    async def call_mirrors(self, hub: Hub, start: int, end: int) -> None:
        """Every registered mirror's callback, in the order of registration. Raises what a callback raises, after all were called."""
        failure: BaseException | None = None
        async with self.mirrors_sem.read():
            for mirror in list(self.hmm.mirrors):
                assert mirror.ops is not None, "a mirror without ops is not registered"
                if mirror.hmm is not self.hmm:
                    hub.late.append(f"a driver's mirror of process {hub.process} was called after it had been unregistered (I7)")
                self.calling.append(trio.lowlevel.current_task())
                try:
                    wait = mirror.ops.sync_cpu_device_pagetables(mirror, HMM_UPDATE_INVALIDATE, start << PAGE_SHIFT, end << PAGE_SHIFT)
                    if wait is not None:
                        await wait
                except BaseException as error:  # noqa: BLE001 - raised again below: the other mirrors have to let go, too
                    failure = error
                finally:
                    self.calling.remove(trio.lowlevel.current_task())
        if failure is not None:
            raise failure


class RangeEnd:
    """One invalidate_range_start / invalidate_range_end pair of v25."""

    __slots__ = ("_found", "_hub", "_order", "_ticket", "end", "owner", "start")

    def __init__(self, order: AtEnd, hub: Hub, start: int, end: int, owner: int) -> None:
        self._order = order
        self._hub = hub
        self._found: list[Subscription] = []
        self._ticket = 0
        self.start = start
        self.end = end
        self.owner = owner

    async def __aenter__(self) -> None:
        core = self._hub.core
        self._found = core.start(self.start, self.end)
        for subscription in self._found:
            subscription.sequence = core.sequence
        self._order.hmm.range_start(self.start, self.end)
        self._ticket = self._order.gather.begin()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._order.hmm.invalidate(self.start, self.end)
        try:
            with trio.CancelScope(shield=True):  # the page table has changed: whoever mirrors it has to hear of that
                await self._at("hub.before_callbacks")
                await self._tell_devices()
                await self._order.call_mirrors(self._hub, self.start, self.end)
                await self._at("hub.after_acks")
                await self._at("hub.before_range_end")
        finally:
            self._order.hmm.range_end(self.start, self.end)
            self._hub.range_end()
            self._order.gather.end(self._ticket)

    async def _at(self, name: str) -> None:
        """A step boundary (`hmmnet.faults.points`)."""
        hub = self._hub
        if hub.points.armed:
            event = Event.INVALIDATE.value
            await hub.points.at(name, process=hub.process, start=self.start, pages=self.end - self.start, event=event)

    async def _tell_devices(self) -> None:
        """The callback of every device process that mirrors the address space, one after the other."""
        told = 0
        for (context, _), (link, numbers) in self._mirrors().items():
            started = [
                link.invalidate_start(context, number, self.start, self.end, Event.INVALIDATE, self.owner, self._hub.core.sequence)
                for number in numbers or [UNKNOWN_SUBSCRIPTION]
            ]
            for acknowledgement in started:
                if acknowledgement is not None:
                    told += 1
                    await acknowledgement.finish()
        self._hub.messages += told
        if told and self._hub.watch is not None:
            self._hub.watch(self.start, self.end, Event.INVALIDATE.value, told)

    def _mirrors(self) -> dict[tuple[int, int], tuple[DeviceLink, list[int]]]:
        """Contexts by (number, zone): the device, and which of its subscriptions overlap."""
        found: dict[tuple[int, int], tuple[DeviceLink, list[int]]] = {}
        for subscription in self._hub.core.index.all():
            if subscription.gone:
                self._hub.too_late(subscription, "was told of a change after its removal had returned")
            found.setdefault((subscription.context, subscription.link.zone), (subscription.link, []))
        for subscription in self._found:
            key = subscription.context, subscription.link.zone
            found.setdefault(key, (subscription.link, []))[1].append(subscription.number)
        return found


def hub_of(hub: object, call: str) -> tuple[Hub, AtEnd]:
    """A hub of v25 and its order. Raises KernelError(EOPNOTSUPP) on a machine with today's personality."""
    if isinstance(hub, Hub) and isinstance(hub.order, AtEnd):
        return hub, hub.order
    raise KernelError(errno.EOPNOTSUPP, call, 'this machine has today\'s personality; launch it with personality="v25"')
