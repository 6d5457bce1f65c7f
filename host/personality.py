"""Whose rules a host keeps: today's kernel's, or those of HMM v25 (August 2017, merged in Linux 4.14), over one core.

A personality is data and a few functions. What it decides: in which order mirrors hear of a change (`hub.py`), how many references an idle
device page has, how a device's range fault, migration and eviction are carried out, and which calls there are.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hmmnet.errors import KernelError, WrongUse
from hmmnet.pages import Words

from .homing import Homing
from .hub import AtStart, Hub, Order
from .interfaces import AddressSpace, DeviceLink, Select
from .migrate import Copy
from .mirror import Request, range_fault
from .mm.advice import GUARD_ADVICE
from .mm.frames import PhysicalMemory
from .mm.gather import Gather
from .mm.zones import CpuZone, Zone
from .notifier import Subscription
from .peers import Across, alloc_and_copy
from .v25 import Kernel, driver
from .v25.order import AtEnd

RangeFaultCall = Callable[[Any, Hub, Subscription, Request, float], Awaitable[tuple[int, Words]]]
Evict = Callable[[Homing, DeviceLink, Words, str], Awaitable[int]]
CopyFor = Callable[[Homing, Mapping[int, DeviceLink], Callable[[int, int], int], Across], Copy]

ADVICE_AFTER_V25 = frozenset({"COLD", "PAGEOUT", "POPULATE_READ", "POPULATE_WRITE", "COLLAPSE", "DONTNEED_LOCKED", *GUARD_ADVICE})
"""What madvise(2) learnt after Linux 4.14. Some of it moves a page's bytes while its mapping changes, which mirrors that hear of a change
only at its end could not live with; the kernel of that time moved them afterwards."""


@dataclass(frozen=True)
class Personality:
    """`order` makes a hub's order from the machine's gather; `copy` what a driver does to move data to its device."""

    name: str
    order: Callable[[PhysicalMemory], Order]
    idle_references: int
    gathers: bool
    range_fault: RangeFaultCall
    evict: Evict
    select: Callable[[Select], Select]
    copy: CopyFor
    exclusive: bool
    """Whether devices can have pages exclusively."""
    lacks_advice: frozenset[str] = field(default_factory=frozenset)

    def memory(self) -> PhysicalMemory:
        """The physical memory of a host of this personality, empty."""
        return PhysicalMemory(self.idle_references, Gather() if self.gathers else None)

    def kernel(
        self,
        memory: PhysicalMemory,
        spaces: Mapping[int, AddressSpace],
        attach: Callable[[CpuZone], None] = lambda _: None,
        detach: Callable[[Zone], None] = lambda _: None,
    ) -> Kernel | None:
        """What this kernel exports to drivers in the host, beyond the calls on one address space; today's nothing."""
        return Kernel(memory, spaces, attach, detach) if self.gathers else None

    def check_exclusive(self) -> None:
        """Raises KernelError(EOPNOTSUPP) where there is no exclusive access."""
        if not self.exclusive:
            why = "exclusive access came with Linux 5.15; this machine has the personality v25"
            raise KernelError(errno.EOPNOTSUPP, "make_device_exclusive", why)

    def check_advice(self, advice: str) -> None:
        """Raises KernelError(EINVAL) for advice that this kernel does not know."""
        if advice in self.lacks_advice:
            raise KernelError(errno.EINVAL, "madvise", f"MADV_{advice} came after Linux 4.14; this machine has the personality {self.name}")


async def evict_frames(homing: Homing, link: DeviceLink, frames: Words, cause: str) -> int:
    """migrate_device_range."""
    return await homing.evict(link, frames, cause)


def at_end(memory: PhysicalMemory) -> AtEnd:
    """v25's order for one address space."""
    assert memory.gather is not None, "a v25 host gathers"
    return AtEnd(memory.gather)


TODAY = Personality(
    name="today",
    order=lambda _: AtStart(),
    idle_references=0,
    gathers=False,
    range_fault=range_fault,
    evict=evict_frames,
    select=lambda select: select,
    copy=lambda _, links, context_of, across: alloc_and_copy(links, context_of, across),
    exclusive=True,
)
V25 = Personality(
    name="v25",
    order=at_end,
    idle_references=1,
    gathers=True,
    range_fault=driver.range_fault,
    evict=driver.evict,
    select=driver.selected,
    copy=lambda homing, links, context_of, _: driver.alloc_and_copy(homing, links, context_of),
    exclusive=False,
    lacks_advice=ADVICE_AFTER_V25,
)
PERSONALITIES = {one.name: one for one in (TODAY, V25)}


def personality_named(name: str) -> Personality:
    """The personality called `name`. Raises HmmnetError."""
    found = PERSONALITIES.get(name)
    if found is None:
        raise WrongUse(f"there is no personality {name!r}; there are {', '.join(PERSONALITIES)}")
    return found
