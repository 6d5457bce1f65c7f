"""The OOM killer's hand (mm/oom_kill.c): `mm/oom.py` chooses, here the chosen is killed, for a fault or for who asks for it.

A victim's memory is reaped first (oom_reap_task_mm), which waits for no device; what devices mirror of it goes when it exits, which it
does in a task of its own, whatever becomes of the fault that it is killed for. Nobody else is chosen before that memory is back, or REAP_S
have gone by, as in oom_reap_task (from then on the kernel's MMF_OOM_SKIP has the next one chosen).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import trio

from hmmnet.errors import HmmnetError, KernelError
from hmmnet.sleeping import sleep

from .mm import oom
from .mm.frames import PhysicalMemory
from .mm.relief import KERNEL
from .mm.space import Space
from .process import Process

REAP_S = 1.0
"""How long a victim's memory is waited for, on trio's clock: MAX_OOM_REAP_RETRIES times HZ/10."""
LOOK_S = 0.1
"""After how long it is looked whether somebody else has given some back (HZ/10)."""
EXIT_TRIES_MAX = 5
"""Tries to end a victim whose exit fails. More than chance or a fault plan denies in a row; what is left then stays, and is logged."""
EXIT_WAIT_S = 0.1
"""Between two of those."""

log = logging.getLogger("hmmnet.host")


class Spawn(Protocol):
    """How a task starts that nobody waits for."""

    def __call__(self, function: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """See `Host.spawn`."""
        ...


class OomKiller:
    """Kills of `processes`, whose address spaces are `spaces`, both by pid, for what they have of `memory`."""

    def __init__(self, memory: PhysicalMemory, spaces: Mapping[int, Space], processes: Mapping[int, Process], spawn: Spawn) -> None:
        self._memory = memory
        self._spaces = spaces
        self._processes = processes
        self._spawn = spawn
        self._lock = trio.Lock()
        """oom_lock: who is out of memory holds it, and one at a time kills."""

    async def kill_worst(self, cgroup: str = "") -> int:
        """out_of_memory: kill the process whose end frees most; see `Machine.oom_kill`. Raises HmmnetError, KernelError(ESRCH)."""
        group = self._memory.cgroups.named(cgroup) if cgroup else None
        total = self._memory.total_pages if group is None or group.limit_pages is None else max(1, group.limit_pages)
        among = [space.mm for space in self._spaces.values() if group is None or space.mm.cgroup is group]
        victim = oom.select(among, total)
        if victim is None:
            raise KernelError(errno.ESRCH, "out_of_memory", f"none of {len(among)} processes may be killed")
        await self._processes[victim.number].kill(out_of_memory=True)
        return victim.number

    async def out_of_memory(self, pid: int, pages: int = 1) -> bool:
        """out_of_memory: kill until there are `pages` for process `pid` (or `KERNEL`); False when it is itself killed, or nobody can be.

        Nobody dies for who is dead already. A victim's exit is waited for, but not for ever: its devices may be waiting for us. Who holds a
        lock, or an answer to a device that wants one, must not come here.
        """
        async with self._lock:
            while self._memory.lacks(pages):
                if self._is_dying(pid):
                    return False
                victim = oom.select([space.mm for space in self._spaces.values()], self._memory.total_pages)
                if victim is None:
                    log.error("out of memory: %s, and there is nobody who may be killed", _wants(pid, pages))
                    return False
                await self._kill(self._processes[victim.number], pid, pages)
        return not self._is_dying(pid)

    def _is_dying(self, pid: int) -> bool:
        process = self._processes.get(pid)
        return pid != KERNEL and (process is None or process.ended)

    async def _kill(self, victim: Process, pid: int, pages: int) -> None:
        """oom_kill_process, for `pages` of process `pid`: reap `victim`, and wait for its exit if that has given nothing back."""
        mm = victim.space.mm
        held = mm.rss
        self._spawn(self._end, victim)  # before the first wait: who is cancelled in it leaves nobody half killed
        with trio.move_on_after(REAP_S):
            await victim.reap()
            await self._given_back(victim, pages)
        log.warning(
            "out of memory: %s: killed process %d, which had %d pages (oom_score_adj %d); %d are free now",
            *(_wants(pid, pages), victim.pid, held, mm.oom_score_adj, sum(node.allocator.free_count for node in self._memory.nodes)),
        )

    async def _given_back(self, victim: Process, pages: int) -> None:
        """Return when there are `pages`, or `victim` has nothing left to give."""
        while self._memory.lacks(pages) and not victim.unmapped.is_set():
            with trio.move_on_after(LOOK_S):
                await victim.unmapped.wait()

    async def _end(self, victim: Process) -> None:
        """do_exit of a killed process. That it fails is nobody's error: it is logged, and tried again."""
        for _ in range(EXIT_TRIES_MAX):
            try:
                await victim.exit()
            except HmmnetError as error:
                log.warning("process %d, killed for its memory, does not end: %s", victim.pid, error)
                await sleep(EXIT_WAIT_S)
            else:
                return
        log.error("process %d, killed for its memory, did not end in %d tries; what is left of it stays", victim.pid, EXIT_TRIES_MAX)


def _wants(pid: int, pages: int) -> str:
    """Who asks for how much."""
    who = "the kernel" if pid == KERNEL else f"process {pid}"
    return f"{who} wants {'a page' if pages == 1 else f'{pages} pages'}"
