"""The processes of a machine, and how there come to be more (kernel/fork.c): create, fork, and what is forgotten when one has ended."""

from __future__ import annotations

from functools import partial

from .contexts import Contexts
from .homing import Homing
from .hub import Hub
from .mm.frames import PhysicalMemory
from .mm.space import Space
from .personality import Personality
from .process import Process

PID_FIRST = 1000
"""Pids below could be mistaken for something of the computer's own."""


class ProcessTable:
    """Processes, their address spaces and their notifier hubs, by pid. `serve` before the first."""

    def __init__(self, memory: PhysicalMemory, personality: Personality) -> None:
        self.spaces: dict[int, Space] = {}
        self.hubs: dict[int, Hub] = {}
        self.processes: dict[int, Process] = {}
        self.late_callbacks: list[str] = []
        """Mirrors that were told something after they had unsubscribed (I7): what `Hub.too_late` says."""
        self._memory = memory
        self._personality = personality
        self._homing: Homing | None = None
        self._contexts: Contexts | None = None
        self._pid_next = PID_FIRST

    def serve(self, homing: Homing, contexts: Contexts) -> None:
        """What brings their pages home, and what they open devices by: both know this table."""
        self._homing, self._contexts = homing, contexts

    def create(self, node: str, cgroup: str) -> Process:
        """A new, empty process, with memory from `node`, in `cgroup`, where those are named. Raises HmmnetError."""
        assert self._homing is not None, "served before the first process"
        number = self._memory.node_named(node) if node else 0
        group = self._memory.cgroups.named(cgroup) if cgroup else None
        pid = self._next_pid()
        hub = self._hub(pid)
        space = Space(pid, self._memory, hub, self._homing.migrate_to_ram)
        space.mm.node, space.mm.cgroup = number, group
        return self._entered(space, hub)

    async def fork(self, parent: Process) -> Process:
        """A child of `parent`, with nothing but its memory. Somebody may be killed for that. Raises KernelError(ENOMEM)."""
        if self._memory.points.armed:
            await self._memory.points.at("process.fork", process=parent.pid)
        pid = self._next_pid()

        async def copied() -> Process:
            hub = self._hub(pid)
            return self._entered(await parent.space.fork(pid, hub), hub)

        return await parent.space.relieving(copied)

    def _next_pid(self) -> int:
        self._pid_next += 1
        return self._pid_next - 1

    def _hub(self, pid: int) -> Hub:
        return Hub(pid, self._memory.points, self._personality.order(self._memory), self.late_callbacks)

    def _entered(self, space: Space, hub: Hub) -> Process:
        assert self._homing is not None, "served before the first process"
        assert self._contexts is not None, "served before the first process"
        self.spaces[space.number], self.hubs[space.number] = space, hub
        hub.watch = partial(self._homing.events.invalidated, space.number)
        made = self.processes[space.number] = Process(
            space.number, space, self._contexts, self._homing, self.fork, self._ended, self._personality.check_advice
        )
        return made

    def _ended(self, pid: int) -> None:
        for table in (self.processes, self.spaces, self.hubs):
            table.pop(pid, None)
