"""What ties a process to the one that started it: when the starter dies, however it dies, so does this one; and how it is shown.

Ties of three kinds, because each alone has a hole. The kernel's (`PR_SET_PDEATHSIG`) acts at once, also on a process that hangs, but knows
only the *thread* that started us, and is lost across a set-user-id program. The pipe on stdin (end of file means: the starter is gone)
needs a process that reads, but works whoever started it. A pidfd (`wait_ended`) needs one too, and works for any process of this computer.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal

import trio

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15

log = logging.getLogger("hmmnet.lifeline")


def die_with_parent(parent_pid: int | None = None, signal_number: int = signal.SIGKILL) -> None:
    """Ask the kernel to send this process `signal_number` when its parent (the thread that forked it) ends; to be called from the main
    thread.

    `parent_pid` is who the parent should be: if it is gone already, this process ends here. None takes whoever it is now.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)


def name_process(name: str) -> None:
    """Have `ps -o comm` and `top` show this process as ``hmmnet NAME`` (its first 15 bytes): a machine's processes are told apart by it."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_NAME, f"hmmnet {name}".encode(), 0, 0, 0)


async def stop_on_signal(scope: trio.CancelScope) -> None:
    """Cancel `scope` at SIGTERM or SIGINT, again at each further one; runs until it is cancelled."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("ending on %s", signal.Signals(number).name)
            scope.cancel()


async def wait_ended(pid: int) -> None:
    """Return when a process has ended; it need not be a child of ours."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)
