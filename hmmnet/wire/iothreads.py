"""The io threads of a ZeroMQ context, as the scheduler sees them: the one for bulk is nicer than the others.

Where processors are short, whoever is woken by a control message would wait behind a thread that copies a megabyte. Linux weighs
threads, not processes, so the bulk thread alone steps back (setpriority with a thread's number, see sched(7)). Where processors are not
short this changes nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BULK_NICE = 5
"""How much nicer: a third of the weight."""
NICE_MAX = 19
TASKS = Path("/proc/self/task")
NAME = "IO/1"
"""How libzmq's name for the second io thread of a context ends."""
LOOKS = 100
LOOK_S = 1e-4
"""A thread gives itself its name when it first runs: how often to look for it, and how long between."""


@contextmanager
def bulk_made_nice() -> Iterator[None]:
    """Around the making of a context's first socket, which starts its threads. Where the system does not let us, bulk stays as it is."""
    before = _threads()
    yield
    with suppress(OSError):
        for _ in range(LOOKS if before else 0):
            found = [thread for thread in _threads() - before if _name(thread).endswith(NAME)]
            if found:
                own = os.getpriority(os.PRIO_PROCESS, 0)
                os.setpriority(os.PRIO_PROCESS, found[0], min(NICE_MAX, own + BULK_NICE))
                return
            time.sleep(LOOK_S)


def _threads() -> set[int]:
    """Those of this process; none where the system does not tell."""
    try:
        return {int(task.name) for task in TASKS.iterdir()}
    except OSError:
        return set()


def _name(thread: int) -> str:
    """What a thread is called; nothing when it has ended."""
    try:
        return (TASKS / str(thread) / "comm").read_text().rstrip()
    except OSError:
        return ""
