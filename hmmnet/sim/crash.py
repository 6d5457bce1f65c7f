"""Calls of programs that are under way in a host which crashes: they end, at once, as those of a real machine's client do.

The host's code runs in the tasks of whoever calls it, and stands there at any of its waits: for a device, a lock, a page, the clock. Each
of those fails. What that code does on its way out, with the books of a host that is gone, concerns nobody; it may wait once more, and is
told again.
"""

from __future__ import annotations

from typing import Any, NoReturn

import trio

from hmmnet.errors import PeerLost
from hmmnet.machine import Host

from .schedule import interrupt
from .waits import all_tasks

HOSTS_CODE = "hmmnet.host."
TIMES_MAX = 1000
"""How often a call may wait on its way out: far more than any does that is on its way."""

TO_MEMORY = ("memory", "_memory", "mm", "space", "_space", "context", "_context", "file", "_file")
"""What leads from an object of a host to the memory that it works on."""
STEPS_MAX = 4
"""How many of those: a handle's file, its context, its address space."""


def calls_under_way(host: Host) -> list[trio.lowlevel.Task]:
    """Tasks in the code of that host that are not its own, and have none below them in it: a nursery there waits for those."""
    tasks = [task for task in all_tasks() if not host.owns(task) and _in_host(task, host.memory)]
    above = {nursery.parent_task for task in tasks if (nursery := task.parent_nursery) is not None}
    return [task for task in tasks if task not in above]


def _in_host(task: trio.lowlevel.Task, memory: Any) -> bool:
    """Whether it is in code of the host with that memory: a trio run may have several machines."""
    frames = [frame for frame, _ in task.iter_await_frames() if str(frame.f_globals.get("__name__", "")).startswith(HOSTS_CODE)]
    return any(_leads(value, memory, STEPS_MAX) for frame in frames for value in frame.f_locals.values())


def _leads(value: Any, memory: Any, steps: int) -> bool:
    if value is memory:
        return True
    if not steps or not type(value).__module__.startswith(HOSTS_CODE):
        return False
    return any(_leads(getattr(value, name, None), memory, steps - 1) for name in TO_MEMORY)


async def end_calls(host: Host, why: str) -> None:
    """End them all, with PeerLost."""

    def failed() -> NoReturn:
        raise PeerLost(why)

    for _ in range(TIMES_MAX):
        tasks = calls_under_way(host)
        if not tasks:
            return
        for task in tasks:
            interrupt(task, failed)
        await trio.lowlevel.cancel_shielded_checkpoint()
