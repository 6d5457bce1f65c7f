"""Bugs around rights and sequences: entries that are used although they do not hold, or not for this."""

from __future__ import annotations

from collections.abc import Awaitable
from errno import EFAULT

from hmmnet.devices.mirror import Mirror, Subscription, Watch
from hmmnet.devices.models.base import Opened
from hmmnet.devices.models.gpu import Gpu
from hmmnet.devices.servicing import FaultService
from hmmnet.errors import HmmnetError, KernelError
from hmmnet.pages import Words
from hmmnet.wire.messages import Invalidate


class _ServiceWithoutUpgrade(FaultService):
    """Does not know that its own read-only pages have to go home before they can be written."""

    async def _send_home(self, start: int, end: int) -> None:
        pass

    async def _break_cow(self, start: int, end: int, fatal: dict[int, HmmnetError]) -> None:
        for page in range(start, end):
            fatal[page] = KernelError(EFAULT, "hmm_range_fault", f"page 0x{page:x} was faulted for writing and came back read-only")


class NoUpgrade(Gpu):
    """A write fault on an own page with a read-only entry is answered with that very entry (table A3); test_hmm then says EFAULT."""

    async def opened(self, opened: Opened) -> None:
        """See `Device`."""
        opened.service.__class__ = _ServiceWithoutUpgrade


class IgnoresMigrations(Gpu):
    """Filters every MIGRATE event as its own: the callback looks at the event and forgets the owner."""

    def invalidate(self, message: Invalidate) -> Awaitable[None] | None:
        """See `Device`."""
        return None if message.event == "migrate" else super().invalidate(message)


class _CredulousMirror(Mirror):
    """Believes whatever it reads."""

    def is_current(self, subscription: Subscription, sequence: int, watch: Watch, words: Words) -> bool:  # noqa: ARG002 - that is the bug
        """See `Mirror`."""
        return True


class NeverRetries(Gpu):
    """Programs what hmm_range_fault gave it without asking whether it still holds (mmu_interval_read_retry)."""

    async def opened(self, opened: Opened) -> None:
        """See `Device`."""
        opened.context.mirror.__class__ = _CredulousMirror
