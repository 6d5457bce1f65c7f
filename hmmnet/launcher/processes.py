"""Child processes: their environment, how they ended in words, and ending them for certain.

`subprocess.Popen` is called directly and not through trio: trio would start the child from a worker thread, and a child that asked to die
with its parent dies with the *thread* that started it. Children get a session of their own, so that a Ctrl-C at the terminal
reaches the launcher only, which then ends them in order.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import site
import subprocess
from pathlib import Path

import trio

from hmmnet.lifeline import wait_ended

ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # numpy's BLAS otherwise starts a thread for each core in each of 64 devices
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}
FILES_MAX = 65_536
"""Open files wished for: a host of 64 devices holds about a thousand."""


def child_environment() -> dict[str, str]:
    """The environment of every process that is started: ours, with the settings that emulation needs, and this very hmmnet importable."""
    environment = {**os.environ, **ENVIRONMENT, "PYTHONSAFEPATH": "1"}
    home = str(Path(__file__).resolve().parent.parent.parent)
    installed = {str(Path(folder).resolve()) for folder in (*site.getsitepackages(), site.getusersitepackages())}
    if home not in installed:  # a checkout
        rest = environment.get("PYTHONPATH", "")
        environment["PYTHONPATH"] = home + (os.pathsep + rest if rest else "")
    return environment


def raise_file_limit() -> None:
    """Lift the soft limit on open files as far as this user may, up to `FILES_MAX`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_MAX if hard == resource.RLIM_INFINITY else min(FILES_MAX, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def describe_exit(status: int) -> str:
    """How a process ended, from its exit code or minus its signal."""
    if status >= 0:
        return "ended well" if status == 0 else f"ended with exit code {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"killed by {name}"


async def wait_process(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a child, or minus its signal."""
    while True:
        status = process.poll()
        if status is not None:
            return status
        await wait_ended(process.pid)


async def end_process(process: subprocess.Popen[bytes], grace_s: float) -> int:
    """Wait `grace_s` for a child to end, then kill it; its status. The caller told it before to end."""
    with trio.CancelScope(shield=True):
        with trio.move_on_after(grace_s) as grace:
            await wait_process(process)
        if grace.cancelled_caught:
            process.kill()
            await wait_process(process)
    return process.returncode


def signal_process(pid: int, started: int, number: int) -> bool:
    """Send a signal to the very process that had start time `started`; False when it is gone."""
    from .directory import process_started

    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if process_started(pid) != started:
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def wait_gone(pid: int, started: int, timeout_s: float) -> bool:
    """Block until that very process is gone; False when it still runs after `timeout_s`."""
    from .directory import process_started

    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        if process_started(pid) != started:
            return True
        return bool(select.select([descriptor], [], [], timeout_s)[0])
    finally:
        os.close(descriptor)
