"""What the host knows of one device: its place in the machine, the life it is in, and the contexts that processes opened on it.

A device of the topology has many *lives*: it connects, dies, and may come back as a new incarnation with empty memory. Every life has a
frame zone of its own, so that a frame of a dead life is never mistaken for one of the present.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import trio

from hmmnet.errors import KernelError
from hmmnet.pages import PAGES_MAX
from hmmnet.sleeping import Completion
from hmmnet.topology import DeviceSpec

from .devmem import PageMap
from .hub import Hub
from .interfaces import AddressSpace
from .iommu import Domain
from .link import SessionLink
from .notifier import Subscription


@dataclass(eq=False)
class Context:
    """A process's open device: what the device mirrors, and what it may reach. `users` are the handles that share it."""

    number: int
    life: Life
    space: AddressSpace
    hub: Hub
    domain: Domain
    subscriptions: dict[int, Subscription] = field(default_factory=dict)
    users: int = 0
    shared: bool = True
    """Whether the process's jobs and migrations use it, too; an open file of a dmirror has one of its own."""

    def hold(self, start: int, end: int) -> None:
        """The device may get translations of pages of [start, end): see `Subscription.hold`."""
        for subscription in self.subscriptions.values():
            subscription.hold(start, end)

    async def unsubscribe_all(self) -> None:
        """Void its translations, and return when DMA by them is over and no invalidation reaches the device for this context any more.

        In that order: until DMA is over who changes a page has to wait for it, and of what changes after a removal the device is not told.
        """
        while True:
            gone, self.subscriptions = self.subscriptions, {}  # nothing is granted for those any more
            self.domain.revoke(0, PAGES_MAX)
            if self.domain.busy(0, PAGES_MAX):
                await self.life.link.quiet(self.domain, 0, PAGES_MAX)
            if not gone:
                return
            for subscription in gone.values():
                await self.hub.remove(subscription)


@dataclass(eq=False)
class Life:
    """One incarnation of a device, from its hello until its loss has been dealt with."""

    spec: DeviceSpec
    incarnation: int
    pid: int
    link: SessionLink
    page_map: PageMap
    contexts: dict[int, Context] = field(default_factory=dict)
    jobs: int = 0
    """Jobs launched so far; their numbers."""
    serving: bool = False
    """It has answered a request: welcomed is not enough, because a device may find that it cannot be what it was told to be."""

    migrating: int = 0
    """Migrations to its memory that are under way."""
    migrated: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    """Who waits for their end parks here."""
    leaving: bool = False
    """It is being unplugged: nobody opens it any more, and nothing new comes to its memory."""

    @property
    def name(self) -> str:
        """The device's name."""
        return self.spec.name

    @property
    def zone(self) -> int:
        """The zone of its frames."""
        return self.link.zone

    def migration_begins(self) -> None:
        """A migration to its memory was asked for, and will be carried out."""
        self.migrating += 1

    def migration_ends(self) -> None:
        """It is over, however it went."""
        self.migrating -= 1
        self.migrated.unpark_all()

    async def settled(self) -> None:
        """Return when no migration to its memory is under way. Raises PeerLost when it is gone then."""
        while self.migrating:
            await self.migrated.park()
        if self.link.session.lost is not None:
            raise self.link.lost_error()

    def context(self, number: int) -> Context:
        """An open context. Raises KernelError(ESRCH) for one that was closed, or never was."""
        found = self.contexts.get(number)
        if found is None:
            raise KernelError(errno.ESRCH, "context", f'device "{self.name}" has no open context {number}')
        return found

    def contexts_of(self, process: int) -> list[Context]:
        """The contexts of a process, the oldest first."""
        return [context for context in self.contexts.values() if context.space.number == process]

    def context_of(self, process: int) -> Context | None:
        """The first context of a process."""
        for context in self.contexts.values():
            if context.space.number == process:
                return context
        return None


class Device:
    """A device of the topology, alive or not."""

    def __init__(self, spec: DeviceSpec) -> None:
        self.spec = spec
        self.life: Life | None = None
        self.lives = 0
        self.last_loss = ""
        self._changed = Completion()

    def begin(self, life: Life) -> None:
        """The device is there."""
        self.life = life
        self.lives += 1

    def serves(self, life: Life) -> None:
        """That life has answered a request."""
        life.serving = True
        changed, self._changed = self._changed, Completion()
        changed.set()

    def end(self, life: Life, cause: str) -> None:
        """That life is over."""
        self.last_loss = cause
        if self.life is life:
            self.life = None

    async def ready(self) -> Life:
        """The present life, or the next, when it serves."""
        while self.life is None or not self.life.serving:
            await self._changed.wait()
        return self.life

    def present(self, call: str = "open") -> Life:
        """The present life. Raises KernelError(ENODEV), in the name of `call`, when the device is not there."""
        if self.life is None:
            why = f"it was lost: {self.last_loss}" if self.last_loss else "it has not started"
            raise KernelError(errno.ENODEV, call, f'device "{self.spec.name}" is not there: {why}')
        if self.life.leaving:
            raise KernelError(errno.ENODEV, call, f'device "{self.spec.name}" is being unplugged')
        return self.life
