"""What faults have the host do at the wrong moment, as its processes, its system and its devices' drivers would: one function for each.

A deed is for the processes that its fault names, or the one at whose point it happens; its range is the fault's, or the point's. Where it
is for several, one that refuses keeps it from no other. It raises HmmnetError when nothing came of it, which `in_vain` tells beforehand
wherever that can be seen.
"""

from __future__ import annotations

import errno
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from hmmnet.errors import HmmnetError, KernelError
from hmmnet.faults.effects import AT_ADDRESSES, NOT_OF_PROCESSES, HostEffect
from hmmnet.faults.points import Where
from hmmnet.pages import PAGE_SHIFT, PAGE_SIZE, PAGES_MAX

from .hub import Hub
from .interfaces import AddressSpace, Event
from .mm.frames import PhysicalMemory
from .poison import break_memory, breakable
from .process import Process

log = logging.getLogger("hmmnet.host")

RANGE_PAGES_MAX = 1 << 12
"""Pages that a fault without a range does something to: of what is concerned at a point, the first 16 MiB."""
WHOLE = frozenset({"mprotect", "mremap"})
"""Deeds that fail where a part of the addresses is not mapped."""


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


@dataclass(frozen=True)
class To:
    """What is done to one process: `length` bytes from `address` of it are concerned; 0: nobody says which."""

    host: Doer
    effect: HostEffect
    where: Where
    process: Process
    address: int
    length: int


def pages_of(effect: HostEffect) -> int:
    """Pages in a fault's range."""
    return (effect.end - effect.start + PAGE_SIZE - 1) >> PAGE_SHIFT


def in_vain(host: Doer, effect: HostEffect, where: Where) -> str:
    """Why it would change nothing there now; empty when it would."""
    return _concerned(host, effect, where)[1]


def _meant(host: Doer, effect: HostEffect, where: Where) -> list[Process]:
    """The processes that are meant: one, or, where nobody says which, all."""
    number = effect.process or where.process
    if not number:
        return list(host.processes.values())
    process = host.processes.get(number)
    return [] if process is None else [process]


def _concerned(host: Doer, effect: HostEffect, where: Where) -> tuple[list[Process], str]:
    """Of those that are meant, the processes to which there is something to do; if none, why."""
    if effect.deed in NOT_OF_PROCESSES:
        return [], ""
    number, meant = effect.process or where.process, _meant(host, effect, where)
    if not meant:
        there = ", ".join(map(str, host.processes)) or "none"
        return [], f"there is no process {number}; those that run are {there}" if number else "no process runs"
    lacks = [_lacks(host, effect, where, process) for process in meant]
    concerned = [process for process, lack in zip(meant, lacks, strict=True) if not lack]
    return concerned, "" if concerned else lacks[0]


def _lacks(host: Doer, effect: HostEffect, where: Where, process: Process) -> str:
    """What a process has not that the deed is done to; empty when it has it."""
    address, length = _range(effect, where)
    start, end = address >> PAGE_SHIFT, address + length >> PAGE_SHIFT
    deed, space = effect.deed, process.space
    if deed == "exec":
        return "" if space.vmas(0, PAGES_MAX) else f"process {process.pid} has nothing mapped"
    if deed not in AT_ADDRESSES:
        return ""
    if start == end:
        return "" if deed == "fork" else "nobody says which addresses"
    there = f"at 0x{address:x}-0x{address + length - 1:x}"
    if not space.vmas(start, end):
        return f"process {process.pid} has nothing mapped {there}"
    needed = end - 1 if deed == "munmap" else start if deed in WHOLE else end
    hole = _mapped_until(process, needed, end)
    if hole < end:
        return f"page 0x{hole:x} of process {process.pid} is not mapped"
    parts = [(max(start, vma.start), min(end, vma.end)) for vma in space.vmas(start, end)] if deed == "poison" else []
    if parts and not any(len(breakable(host.memory, space, *part)) for part in parts):
        return f"process {process.pid} has no anonymous page {there}"
    return ""


def _mapped_until(process: Process, start: int, end: int) -> int:
    """Up to which page of [start, end) all are mapped."""
    for vma in process.space.vmas(start, end):
        if vma.start > start:
            break
        start = vma.end
    return min(start, end)


def _range(effect: HostEffect, where: Where) -> tuple[int, int]:
    """(address, length) of what is concerned."""
    if effect.end > effect.start:
        start = effect.start & ~(PAGE_SIZE - 1)
        return start, pages_of(effect) * PAGE_SIZE
    return where.address, min(where.pages, RANGE_PAGES_MAX) * PAGE_SIZE


async def _exit(to: To) -> None:
    await to.process.exit()


async def _reap(to: To) -> None:
    for vma in to.process.space.vmas(0, PAGES_MAX):
        if vma.is_anonymous:
            await to.process.space.madvise(vma.start << PAGE_SHIFT, (vma.end - vma.start) << PAGE_SHIFT, "DONTNEED")
    await to.process.exit()


async def _exec(to: To) -> None:
    for vma in to.process.space.vmas(0, PAGES_MAX):
        await to.process.munmap(vma.start << PAGE_SHIFT, (vma.end - vma.start) << PAGE_SHIFT)


async def _fork(to: To) -> None:
    child = await to.process.fork()
    try:
        with suppress(HmmnetError):  # the child has what the process had, holes too
            if to.length:
                await child.read(to.address, to.length)
    finally:
        await child.exit()


async def _mprotect(to: To) -> None:
    await to.process.mprotect(to.address, to.length, "r")
    await to.process.mprotect(to.address, to.length, "rw")


async def _mremap(to: To) -> None:
    there = await to.process.mmap(to.length)
    try:
        await to.process.mremap(to.address, to.length, to.length, there)
    except HmmnetError:
        await to.process.munmap(there, to.length)
        raise
    await to.process.mremap(there, to.length, to.length, to.address)


async def _munmap(to: To) -> None:
    await to.process.munmap(to.address + to.length - PAGE_SIZE, PAGE_SIZE)


async def _madvise(to: To) -> None:
    try:
        await to.process.madvise(to.address, to.length, str(to.effect.settings.get("advice") or "DONTNEED"))
    except KernelError as error:
        end = to.address + to.length >> PAGE_SHIFT
        if error.code != errno.ENOMEM or _mapped_until(to.process, to.address >> PAGE_SHIFT, end) == end:
            raise
        # a hole: all around it is advised, as by madvise(2)


async def _poison(to: To) -> None:
    start = to.address >> PAGE_SHIFT
    if not await break_memory(to.host.memory, to.host.spaces, to.process.space, start, start + (to.length >> PAGE_SHIFT)):
        raise HmmnetError(f"no page of process {to.process.pid} there stays where it is")


async def _corrected(host: Doer, effect: HostEffect, where: Where) -> None:
    host.corrected_errors[where.device or effect.device] += int(effect.settings.get("count", 1))


async def _touch(to: To) -> None:
    if to.length:
        await to.process.read(to.address, min(to.length, PAGE_SIZE))


async def _prefetch(to: To) -> None:
    device = str(to.effect.settings.get("to", "")) or to.where.device
    if to.length:
        await to.process.migrate(to.address, to.length, device)


async def _home(to: To) -> None:
    if to.length:
        await to.process.migrate(to.address, to.length, "host")


async def _nested(host: Doer, effect: HostEffect, where: Where) -> None:
    del effect
    hub = host.hubs.get(where.process)
    if hub is not None and where.pages:
        async with hub.invalidate(Event.SOFT_DIRTY, where.start, where.start + where.pages):
            return


TO_PROCESSES: dict[str, Callable[[To], Awaitable[None]]] = {
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
    "touch": _touch,
    "prefetch": _prefetch,
    "home": _home,
}
"""What the host can be made to do to one process, by name."""
DEEDS: dict[str, Deed] = {"corrected": _corrected, "nested": _nested}
"""What else it can."""


async def do(host: Doer, effect: HostEffect, where: Where) -> None:
    """What `effect` says. Raises HmmnetError when nothing comes of it: since it was asked for, it may have become in vain."""
    concerned, why = _concerned(host, effect, where)
    if why:
        raise HmmnetError(why)
    if effect.deed in DEEDS:
        await DEEDS[effect.deed](host, effect, where)
        return
    if effect.deed == "oom" and not (effect.process or where.process):
        await host.oom_kill()
        return
    refused: list[tuple[Process, HmmnetError]] = []
    for process in concerned:
        try:
            await TO_PROCESSES[effect.deed](To(host, effect, where, process, *_range(effect, where)))
        except HmmnetError as error:
            refused.append((process, error))
    if len(refused) == len(concerned):
        raise refused[0][1] if len(refused) == 1 else HmmnetError("; ".join(str(said) for _, said in refused))
    for process, said in refused:
        say = log.info if effect.point else log.warning
        say("a fault did not happen to process %d: it could not %s: %s", process.pid, effect.deed, said)
