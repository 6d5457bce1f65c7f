"""Ctrl-C in the middle of a measurement."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hmmnet.launcher.scratch import LOCK


@pytest.mark.parametrize("figure", ["bridge.rtt", "dma.to_host", "throttle.500"])
def test_ends_quietly_and_leaves_nothing(figure: str, tmp_path: Path) -> None:
    """The signal reaches the whole foreground group, as a terminal sends it: no traceback of any process, no process, no file."""
    environment = {**os.environ, "HMMNET_DIR": str(tmp_path), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "hmmnet", "bench", figure]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        while all(path.name == LOCK for path in tmp_path.glob("hmmnet-*/*")):  # until there are sockets of peers
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert figure in first
    assert "Traceback" not in said, said
    assert not list(tmp_path.glob("hmmnet-*"))
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in listed
