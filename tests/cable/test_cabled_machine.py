"""Real processes, real TCP, bad cables: data arrive whole or the device is lost, and says so.

::

    host (10.77.0.1) === this process moves the packets === gpu0 (10.77.0.2), gpu1 (10.77.0.3), each in a network namespace
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hmmnet.errors import HmmnetError
from hmmnet.wire.keys import fresh_keys, read_keys, write_keys

from .cabled import KINDS, NBYTES


def test_bad_cables_cost_time_and_cut_ones_the_device() -> None:
    """Loss, delay, reordering, duplicates, a rate and a reset lose nothing; a cut in one direction is the device's loss."""
    done = subprocess.run([sys.executable, "-m", "tests.cable.cabled"], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for name in (*KINDS, "reset", "other"):
        assert told[name] == [NBYTES, True], name
    assert told["dropped"]
    assert "gpu0" in told["one way"]
    assert Path("/sys/class/net").is_dir()
    assert not list(Path("/sys/class/net").glob("hmmnet*")), "nothing of it is seen outside"


def test_keys_go_through_a_file_without_the_hosts_secret(tmp_path: Path) -> None:
    """Readable by the owner only; a file that is none says so."""
    keys, path = fresh_keys(), tmp_path / "keys.json"
    write_keys(path, keys)
    read = read_keys(path)
    assert (read.host_public, read.peer_public, read.peer_secret) == (keys.host_public, keys.peer_public, keys.peer_secret)
    assert read.host_secret == b""
    assert keys.host_secret.decode() not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("{}")
    with pytest.raises(HmmnetError, match=r"keys.json: these are no CURVE keys"):
        read_keys(path)
    with pytest.raises(HmmnetError, match="cannot read"):
        read_keys(tmp_path / "nowhere")
