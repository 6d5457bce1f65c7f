"""What faults have the host do at the wrong moment, as its processes, its system and its devices' drivers would: one function for each.

A deed is for the processes that its fault names, or the one at whose point it happens; its range is the fault's, or the point's.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from hmmnet.faults.effects import HostEffect
from hmmnet.faults.points import Where
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_MAX

from .announce import MappedAnew
from .hub import Hub
from .interfaces import AddressSpace, Event
from .mm.frames import PhysicalMemory
from .poison import break_memory
from .process import Process

log = logging.getLogger("hmmnet.host")

RANGE_PAGES_MAX = 1 << 12
"""Pages that a fault without a range does something to: of what is concerned at a point, the first 16 MiB."""


class Doer(Protocol):
    """What deeds need of a host."""

    @property
    def memory(self) -> PhysicalMemory:
        """The frames of the machine."""
        ...

    @property
    def corrected_errors(self) -> Counter[str]:
        """How many errors a device's memory has corrected, by name."""
        ...

    @property
    def processes(self) -> Mapping[int, Process]:
        """By number."""
        ...

    @property
    def spaces(self) -> Mapping[int, AddressSpace]:
        """By process number."""
        ...

    @property
    def hubs(self) -> Mapping[int, Hub]:
        """By process number."""
        ...

    async def oom_kill(self, cgroup: str = "") -> int:
        """See `Machine.oom_kill`."""
        ...


Deed = Callable[[Doer, HostEffect, Where], Awaitable[None]]


def pages_of(effect: HostEffect) -> int:
    """Pages in a fault's range."""
    return (effect.end - effect.start + PAGE_SIZE - 1) >> PAGE_SHIFT


def _concerned(host: Doer, effect: HostEffect, where: Where) -> list[Process]:
    """The processes that are meant: one, or, at no point and without a number, all."""
    number = effect.process or where.process
    if not number:
        return list(host.processes.values())
    process = host.processes.get(number)
    return [] if process is None else [process]


def _range(effect: HostEffect, where: Where) -> tuple[int, int]:
    """(address, length) of what is concerned."""
    if effect.end > effect.start:
        start = effect.start & ~(PAGE_SIZE - 1)
        return start, pages_of(effect) * PAGE_SIZE
    return where.address, min(where.pages, RANGE_PAGES_MAX) * PAGE_SIZE


async def _exit(host: Doer, effect: HostEffect, where: Where) -> None:
    for process in _concerned(host, effect, where):
        await process.exit()


async def _reap(host: Doer, effect: HostEffect, where: Where) -> None:
    if not (effect.process or where.process):
        await host.oom_kill()
        return
    for process in _concerned(host, effect, where):
        for vma in process.space.vmas(0, PAGES_MAX):
            if vma.is_anonymous:
                await process.space.madvise(vma.start << PAGE_SHIFT, (vma.end - vma.start) << PAGE_SHIFT, "DONTNEED")
        await process.exit()


async def _exec(host: Doer, effect: HostEffect, where: Where) -> None:
    for process in _concerned(host, effect, where):
        for vma in process.space.vmas(0, PAGES_MAX):
            await process.munmap(vma.start << PAGE_SHIFT, (vma.end - vma.start) << PAGE_SHIFT)


async def _fork(host: Doer, effect: HostEffect, where: Where) -> None:
    address, length = _range(effect, where)
    for process in _concerned(host, effect, where):
        child = await process.fork()
        try:
            if length:
                await child.read(address, length)
        finally:
            await child.exit()


async def _mprotect(host: Doer, effect: HostEffect, where: Where) -> None:
    address, length = _range(effect, where)
    for process in _concerned(host, effect, where) if length else ():
        await process.mprotect(address, length, "r")
        await process.mprotect(address, length, "rw")


async def _mremap(host: Doer, effect: HostEffect, where: Where) -> None:
    address, length = _range(effect, where)
    for process in _concerned(host, effect, where) if length else ():
        there = await process.mmap(length)
        await process.mremap(address, length, length, there)
        await process.mremap(there, length, length, address)


async def _munmap(host: Doer, effect: HostEffect, where: Where) -> None:
    address, length = _range(effect, where)
    for process in _concerned(host, effect, where) if length else ():
        await process.munmap(address + length - PAGE_SIZE, PAGE_SIZE)


async def _madvise(host: Doer, effect: HostEffect, where: Where) -> None:
    address, length = _range(effect, where)
    for process in _concerned(host, effect, where) if length else ():
        await process.madvise(address, length, str(effect.settings.get("advice") or "DONTNEED"))


async def _poison(host: Doer, effect: HostEffect, where: Where) -> None:
    address, length = _range(effect, where)
    for process in _concerned(host, effect, where) if length else ():
        start = address >> PAGE_SHIFT
        try:
            await break_memory(host.memory, host.spaces, process.space, start, start + (length >> PAGE_SHIFT))
        except MappedAnew as error:  # as when the kernel's memory_failure() fails: it says so, to nobody in particular
            log.warning("memory stays as it is: %s", error)


async def _corrected(host: Doer, effect: HostEffect, where: Where) -> None:
    host.corrected_errors[where.device or effect.device] += int(effect.settings.get("count", 1))


async def _touch(host: Doer, effect: HostEffect, where: Where) -> None:
    address, length = _range(effect, where)
    for process in _concerned(host, effect, where) if length else ():
        await process.read(address, min(length, PAGE_SIZE))


async def _prefetch(host: Doer, effect: HostEffect, where: Where) -> None:
    address, length = _range(effect, where)
    device = str(effect.settings.get("to", "")) or where.device
    for process in _concerned(host, effect, where) if length else ():
        await process.migrate(address, length, device)


async def _home(host: Doer, effect: HostEffect, where: Where) -> None:
    address, length = _range(effect, where)
    for process in _concerned(host, effect, where) if length else ():
        await process.migrate(address, length, "host")


async def _nested(host: Doer, effect: HostEffect, where: Where) -> None:
    del effect
    hub = host.hubs.get(where.process)
    if hub is not None and where.pages:
        async with hub.invalidate(Event.SOFT_DIRTY, where.start, where.start + where.pages):
            return


DEEDS: dict[str, Deed] = {
    "exit": _exit,
    "kill": _exit,
    "oom": _reap,
    "exec": _exec,
    "fork": _fork,
    "mprotect": _mprotect,
    "mremap": _mremap,
    "munmap": _munmap,
    "madvise": _madvise,
    "poison": _poison,
    "corrected": _corrected,
    "touch": _touch,
    "prefetch": _prefetch,
    "home": _home,
    "nested": _nested,
}
"""What the host can be made to do, by name."""
