"""Open devices: which process has which device open, and what opening and closing mean.

A *context* is one process's mirror on one life of a device. It is shared and counted: the first `get` opens it on the device, the last
`put` closes it. A dmirror has one for each open file besides (`get_for_file`), as test_hmm has: two of a process know nothing of each
other. A device whose process died takes its contexts along; the next `get` opens one on the device's next life.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

import trio

from hmmnet.errors import KernelError, PeerLost
from hmmnet.observe.counters import Profile
from hmmnet.wire.messages import CloseContext, Done, OpenContext

from .device import Context, Device, Life
from .hub import Hub
from .interfaces import AddressSpace
from .iommu import Domain
from .link import SessionLink


class Contexts:
    """All contexts of the machine. `hubs` are the notifier hubs by process."""

    def __init__(self, devices: Mapping[str, Device], hubs: Mapping[int, Hub], profile: Profile) -> None:
        self.profile = profile
        self._devices = devices
        self._hubs = hubs
        self._numbers = 0
        self._opening: dict[tuple[int, str], trio.Lock] = {}

    def links(self) -> list[SessionLink]:
        """The devices that are there, in the order of the topology."""
        return [device.life.link for device in self._devices.values() if device.life is not None]

    def process_of(self, number: int) -> int:
        """The process of the context with that number; 0 when there is none."""
        for device in self._devices.values():
            context = None if device.life is None else device.life.contexts.get(number)
            if context is not None:
                return context.space.number
        return 0

    def device(self, name: str, call: str = "open") -> Device:
        """A device of the topology. Raises KernelError(ENOENT), in the name of `call`."""
        device = self._devices.get(name)
        if device is None:
            raise KernelError(errno.ENOENT, call, f'no device is called "{name}"; this machine has {", ".join(self._devices)}')
        return device

    async def get(self, space: AddressSpace, name: str) -> Context:
        """The context of `space` on a device, opened if it is not, with one more user. Raises KernelError, PeerLost."""
        key = (space.number, name)
        lock = self._opening.setdefault(key, trio.Lock())
        async with lock:
            life = self.device(name).present()
            context = next((found for found in life.contexts_of(space.number) if found.shared), None)
            if context is None:
                context = await self._open(life, space)
            context.users += 1
        return context

    async def get_for_file(self, space: AddressSpace, name: str) -> Context:
        """The context of a device that `space` opens by hand: shared, unless the driver keeps one for each open file, as test_hmm does.

        Raises KernelError, PeerLost.
        """
        if self.device(name).spec.model != "dmirror":
            return await self.get(space, name)
        async with self._opening.setdefault((space.number, name), trio.Lock()):
            context = await self._open(self.device(name).present(), space, shared=False)
            context.users = 1
        return context

    async def _open(self, life: Life, space: AddressSpace, *, shared: bool = True) -> Context:
        hub = self._hubs.get(space.number)
        if hub is None:
            raise KernelError(errno.ESRCH, "open", f"process {space.number} has exited")
        self._numbers += 1
        context = Context(self._numbers, life, space, hub, Domain(life.name, self._numbers, life.zone), shared=shared)
        life.contexts[context.number] = context
        life.link.domains[context.number] = context.domain
        try:
            # once asked, the device opens it whether we wait or not; a lost device ends the wait
            await life.link.ask_shielded(OpenContext(context.number, space.number), Done)
        except BaseException:
            self._forget(context)
            raise
        return context

    async def put(self, context: Context) -> None:
        """One user less; the last closes the context on the device."""
        context.users -= 1
        if context.users == 0:
            await self._close(context)

    async def _close(self, context: Context) -> None:
        with trio.CancelScope(shield=True):  # half closed it would stay for ever; a lost device ends the wait
            await self._close_it(context, context.life)

    async def _close_it(self, context: Context, life: Life) -> None:
        async with self._opening.setdefault((context.space.number, life.name), trio.Lock()):
            if context.users or life.contexts.get(context.number) is not context:
                return  # somebody has opened it again meanwhile; and, perhaps, closed it
            try:
                if life.link.session.lost is None:
                    await life.link.ask(CloseContext(context.number), Done)
            except PeerLost:
                return  # whoever deals with the loss takes the context away
            finally:
                await context.unsubscribe_all()
                self._forget(context)
                if context.space.number not in self._hubs:
                    self.process_ended(context.space)

    def _forget(self, context: Context) -> None:
        context.life.contexts.pop(context.number, None)
        context.life.link.domains.pop(context.number, None)
        context.life.link.fail_large.discard(context.number)

    def process_ended(self, space: AddressSpace) -> None:
        """The process has ended; what a child still has open of it stays open until that closes it."""
        for device in self._devices.values():
            if device.life is None or device.life.context_of(space.number) is None:
                self._opening.pop((space.number, device.spec.name), None)
