"""A campaign over a dask scheduler: a scheduler and a worker, processes on loopback that live as long as a test."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hmmnet.campaign.campaign import run_campaign


@contextmanager
def dask(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """One process of dask, whose log is ``KIND.log`` in `folder`; it is gone after the block."""
    with (folder / f"{arguments[0]}.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "dask", *arguments], cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def address_in(log: Path, scheduler: subprocess.Popen[bytes]) -> str:
    """Where a scheduler says that it listens; on a busy computer it takes its time, and the test's own limit is the only one."""
    while (found := re.search(r"Scheduler at:\s+(tcp://\S+)", log.read_text())) is None:
        assert scheduler.poll() is None, log.read_text()
        time.sleep(0.05)
    return found[1]


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[str]:
    with dask(tmp_path, "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard") as process:
        yield address_in(tmp_path / "scheduler.log", process)


def test_a_campaign_over_dask(scheduler: str, tmp_path: Path) -> None:
    """It comes to what it comes to without, but for the seconds."""
    worker = ("worker", scheduler, "--nworkers", "1", "--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(tmp_path))
    with dask(tmp_path, *worker):
        over = run_campaign(range(6), operations=40, dask=scheduler).as_json()
    here = run_campaign(range(6), operations=40).as_json()
    assert over.pop("seconds") > 0
    assert here.pop("seconds") > 0
    assert over == here
    assert over["seeds"] == 6


def test_a_scheduler_without_workers_is_told_of(scheduler: str) -> None:
    """On stderr, after some seconds; the campaign waits on, and Ctrl-C ends it with what was found: nothing."""
    command = [sys.executable, "-m", "hmmnet", "campaign", "--seeds", "0:3", "--dask", scheduler]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as campaign:
        try:
            assert campaign.stderr is not None
            told = campaign.stderr.readline()
            assert campaign.poll() is None
            campaign.send_signal(signal.SIGINT)
            out, err = campaign.communicate()
        finally:
            campaign.kill()
    assert told == f"the dask scheduler at {scheduler} has no worker yet; waiting for one (Ctrl-C ends it)\n"
    assert (campaign.returncode, err) == (130, "")
    assert out.startswith("0 seeds, 0 operations")
