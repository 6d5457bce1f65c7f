"""Calls of programs that are under way in a host which crashes: they end, at once, as those of a real machine's client do.

The host's code runs in the tasks of whoever calls it, and stands there at any of its waits: for a device, a lock, a page, the clock. Each
of those fails. What that code does on its way out, with the books of a host that is gone, concerns nobody; it may wait once more, and is
told again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import trio

from hmmnet.errors import PeerLost

from .schedule import interrupt
from .waits import all_tasks

HOSTS_CODE = "hmmnet.host."
TIMES_MAX = 1000
"""How often a call may wait on its way out: far more than any does that is on its way."""


def calls_under_way(own: Callable[[trio.lowlevel.Task], bool]) -> list[trio.lowlevel.Task]:
    """Tasks in the host's code that are not its `own`, and have none below them in it: a nursery there waits for those."""
    tasks = [task for task in all_tasks() if not own(task) and _in_host(task)]
    above = {nursery.parent_task for task in tasks if (nursery := task.parent_nursery) is not None}
    return [task for task in tasks if task not in above]


def _in_host(task: trio.lowlevel.Task) -> bool:
    return any(str(frame.f_globals.get("__name__", "")).startswith(HOSTS_CODE) for frame, _ in task.iter_await_frames())


async def end_calls(own: Callable[[trio.lowlevel.Task], bool], why: str) -> None:
    """End them all, with PeerLost."""

    def failed() -> NoReturn:
        raise PeerLost(why)

    for _ in range(TIMES_MAX):
        tasks = calls_under_way(own)
        if not tasks:
            return
        for task in tasks:
            interrupt(task, failed)
        await trio.lowlevel.cancel_shielded_checkpoint()
