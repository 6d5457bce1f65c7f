"""Processes that are there to suffer: faults that end a process, or change its memory under it, concern one of these, and no actor's.

A victim works on a few pages of its own: stores, has them moved to devices and back, forks, and reads what it has stored. Whatever
happens to it, the machine has to go on; and where its fault is one that keeps data, what it reads must be what it stored.
"""

from __future__ import annotations

import contextlib
import errno
from itertools import count

import numpy as np

from hmmnet.errors import BusError, HmmnetError, IommuFault, KernelError, PeerError, SignalError
from hmmnet.faults.kinds import Fault
from hmmnet.faults.process_events import KEEPING_ADVICE
from hmmnet.program import Process
from hmmnet.sleeping import sleep

from .crew import Crew
from .history import Words
from .operations import launched
from .words import VICTIM_ADDRESS, VICTIM_BYTES, VICTIM_PID_FIRST

KEEPS = frozenset({"process.fork", "process.mprotect", "process.mremap"})
"""Kinds that a process's data outlive."""
REST_S = 0.002
"""Virtual seconds between the first two rounds; each rest is longer, for some seeds take microseconds and others a minute."""
PATTERN = np.arange(VICTIM_BYTES // 8, dtype=np.uint64)
ROUND_SHIFT = 20


def keeps(fault: Fault) -> bool:
    """Whether a process's data outlive it, as its mapping does: that must not be made anew where it is missing for a moment."""
    if fault.kind.name == "process.madvise":
        return (fault.settings["advice"] or "DONTNEED") in KEEPING_ADVICE
    return fault.kind.name in KEEPS


class Victim:
    """One of them: `keeps` when its data outlive every fault that concerns it."""

    def __init__(self, crew: Crew, process: Process, *, keeps: bool) -> None:
        self.process = process
        self._crew = crew
        self._keeps = keeps
        self._who = f"victim {process.pid}"
        self.over = False
        """The round under way is the last."""

    async def work(self) -> None:
        """Round after round, until it is told that it is over, or its process has ended. What its faults may bring is borne."""
        await self._map()
        for number in count(1):
            try:
                await self._round(number)
            except (KernelError, SignalError, PeerError) as error:
                if isinstance(error, IommuFault):
                    self._crew.complain("service", f"{self._who}: {error}")
                if isinstance(error, KernelError) and error.code == errno.ESRCH:
                    return
                await self._mend(error)
            if self.over:
                return
            await sleep(REST_S * number * number)

    async def _map(self) -> None:
        await self.process.mmap(VICTIM_BYTES, "rw", VICTIM_ADDRESS)

    async def _round(self, number: int) -> None:
        """Store, move, look, move back, look again, fork. Raises what any of that raises."""
        process, device = self.process, self._crew.machine.device_names[number % len(self._crew.machine.device_names)]
        stored = PATTERN | np.uint64(number << ROUND_SHIFT)
        await process.write(VICTIM_ADDRESS, stored.tobytes())
        await process.migrate(VICTIM_ADDRESS, VICTIM_BYTES // 2, device)
        seen = await launched(process, device, "peek", "demand" if number % 2 else "remote", a=VICTIM_ADDRESS, n=len(stored))
        self._judge(device, np.frombuffer(seen["words"], np.uint64), stored)
        if number % 3 == 0:
            await process.migrate(VICTIM_ADDRESS, VICTIM_BYTES, "host")
        self._judge("the CPU", np.frombuffer(await process.read(VICTIM_ADDRESS, VICTIM_BYTES), np.uint64), stored)
        if number % 4 == 0:
            await (await process.fork()).exit()

    def _judge(self, who: str, seen: Words, stored: Words) -> None:
        """Every word is what was stored; or zero, where a fault takes data away."""
        wrong = seen != stored
        if not self._keeps:
            wrong &= seen != 0
        if wrong.any():
            word = int(wrong.argmax())
            where = f"word {word}, where 0x{int(stored[word]):x} was stored"
            self._crew.complain("history", f"{self._who}: {who} sees 0x{int(seen[word]):x} in {where}")

    async def _mend(self, error: HmmnetError) -> None:
        """Memory that is gone, or broken, is mapped anew."""
        if not isinstance(error, SignalError) or (self._keeps and not isinstance(error, BusError)):
            return
        with contextlib.suppress(KernelError, PeerError):
            await self.process.munmap(VICTIM_ADDRESS, VICTIM_BYTES)
            await self._map()


async def victims_of(crew: Crew, number: int, faults: list[Fault]) -> list[Victim]:
    """So many victims, in fresh processes: the first that are made after the actors' own. Raises HmmnetError when their pids are others."""
    made = []
    for index in range(number):
        process = await crew.machine.create_process()
        pid = VICTIM_PID_FIRST + index
        if process.pid != pid:
            raise HmmnetError(f"a victim of this program is process {pid}, and got pid {process.pid}")
        made.append(Victim(crew, process, keeps=all(keeps(fault) for fault in faults if fault.process == pid)))
    return made
