"""The io threads of a transport: which of them makes way.

Oracle: what Linux says of each thread's name and niceness.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from hmmnet.wire import iothreads
from hmmnet.wire.iothreads import BULK_NICE, NICE_MAX
from hmmnet.wire.zmq_transport import ZmqTransport

TASKS = Path("/proc/self/task")


def started(tmp_path: Path, io_threads: int) -> dict[str, int]:
    """The io threads of a fresh transport with two sockets: name -> how nice. Each names itself, when it first runs."""
    before = set(TASKS.iterdir())
    with ZmqTransport(io_threads) as transport:
        transport.listen(f"ipc://{tmp_path}/control")
        transport.bind_channel(f"ipc://{tmp_path}/bulk")
        found: dict[str, int] = {}
        for _ in range(2_000):
            names = {(task / "comm").read_text().strip(): int(task.name) for task in set(TASKS.iterdir()) - before}
            found = {name[-1]: os.getpriority(os.PRIO_PROCESS, thread) for name, thread in names.items() if "IO/" in name}
            if len(found) == io_threads:
                break
            time.sleep(0.001)
        return found


def test_the_bulk_thread_alone_is_nicer(tmp_path: Path) -> None:
    """Control goes at its process's own pace."""
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert started(tmp_path, 2) == {"0": own, "1": min(NICE_MAX, own + BULK_NICE)}


def test_a_single_io_thread_stays_as_it_is(tmp_path: Path) -> None:
    """It has control to serve."""
    assert started(tmp_path, 1) == {"0": os.getpriority(os.PRIO_PROCESS, 0)}


def test_where_the_system_does_not_tell_of_threads_all_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No /proc: bulk is as urgent as control, and the transport works."""
    monkeypatch.setattr(iothreads, "TASKS", tmp_path / "nothing")
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert started(tmp_path, 2) == {"0": own, "1": own}
