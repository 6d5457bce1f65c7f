"""Beside others: a start of pytest costs nothing, two workers do not meet, and Ctrl-C leaves nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .suites import BOUND_S, run, write

HEAVY = (
    "trio",
    "zmq",
    "numpy",
    "msgspec",
    "hmmnet.machine",
    "hmmnet.sim",
    "hmmnet.topology",
    "hmmnet.faults",
    "hmmnet.host",
    "hmmnet.devices",
)


def test_pytest_starts_no_slower(pytester: pytest.Pytester) -> None:
    """A suite that uses nothing of the plugin imports nothing that is heavy, markers and seeds and all."""
    text = f"""
    import sys

    import pytest

    @pytest.mark.seeds(2)
    def test_it(hmmnet_seed):
        assert [name for name in {HEAVY!r} if name in sys.modules] == []
    """
    write(pytester, text)
    run(pytester, "-p", "no:hypothesispytest", beside=()).assert_outcomes(passed=2)


def test_the_plugin_can_be_left_out(pytester: pytest.Pytester) -> None:
    """As any other."""
    write(pytester, "def test_it():\n    pass\n")
    result = run(pytester, "-p", "no:hmmnet", "--help")
    assert "--hmmnet-seed" not in result.stdout.str()


def test_two_workers(pytester: pytest.Pytester) -> None:
    """Real machines in two processes at once: each in a folder of its own; the report comes through whole; seeds are shared out."""
    text = """
    import os

    import pytest

    @pytest.mark.seeds(6)
    def test_real(machine, hmmnet_seed):
        assert str(os.getpid()) in machine.name
        process = machine.process()
        address = process.malloc(4096)
        assert process.migrate(address, 4096, "gpu0") == 4096
        assert hmmnet_seed != 4

    @pytest.mark.seeds(6)
    def test_simulated(simulated_machine):
        assert simulated_machine.process().malloc(8)
    """
    write(pytester, text)
    result = run(pytester, "-n", "2", "-v")
    result.assert_outcomes(passed=11, failed=1)
    assert set(re.findall(r"\[(gw\d)\]", result.stdout.str())) == {"gw0", "gw1"}
    result.stdout.fnmatch_lines(
        [
            "*hmmnet: what happened*",
            "* ms  process *: host -> gpu0 (asked for by a program)",
            "pytest test_mine.py::test_real --hmmnet-seed 4",
        ]
    )


WAITING = """
    import pathlib
    import time

    import pytest
    import trio

    def ready(pids):
        pathlib.Path("ready.new").write_text(" ".join(map(str, pids)))
        pathlib.Path("ready.new").rename("ready")

    def test_blocking(machine):
        ready([device.pid for device in machine.devices])
        time.sleep(60)

    def test_in_a_call(machine):
        ready([device.pid for device in machine.devices])
        machine.run(lambda inside: trio.sleep(60))

    @pytest.mark.trio
    async def test_awaited(machine):
        ready([device.pid for device in machine.devices])
        await trio.sleep(60)

    async def test_here(machine):
        ready([device.pid for device in machine.devices])
        await trio.sleep(60)
    """


def gone(pid: int) -> bool:
    """Whether no process of that number runs (one that nobody has waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("test", ["test_blocking", "test_in_a_call", "test_awaited", "test_here"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_an_interrupted_run_leaves_nothing(pytester: pytest.Pytester, test: str, number: signal.Signals) -> None:
    """Ctrl-C, or the death of pytest itself: every device process ends; folders go with Ctrl-C, and after a death with `hmmnet clean`."""
    write(pytester, WAITING)
    folder = pytester.path / "run"
    command = [sys.executable, "-m", "pytest", "-p", "no:asyncio", "-p", "no:anyio", f"test_mine.py::{test}"]
    environment = os.environ | {"HMMNET_DIR": str(folder)}
    with (
        (pytester.path / "log").open("wb") as log,
        subprocess.Popen(command, cwd=pytester.path, env=environment, stdout=log, stderr=log) as suite,
    ):
        deadline = time.monotonic() + BOUND_S
        while not (pytester.path / "ready").exists():
            assert suite.poll() is None, (pytester.path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        pids = [int(word) for word in (pytester.path / "ready").read_text().split()]
        assert [gone(pid) for pid in pids] == [False, False]
        suite.send_signal(number)
        code = suite.wait(BOUND_S)
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:  # pytest-trio has Ctrl-C in a group of errors, which pytest takes for a failure
        assert code == (pytest.ExitCode.TESTS_FAILED if test == "test_awaited" else pytest.ExitCode.INTERRUPTED)
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline, "a device process is left"
        time.sleep(0.05)
    if number == signal.SIGKILL:
        (record,) = folder.glob("*/machine.json")
        sockets = Path(json.loads(record.read_text())["sockets"])
        assert sockets.is_dir()
        subprocess.run([sys.executable, "-m", "hmmnet", "clean"], env=environment, cwd=pytester.path, check=True, timeout=BOUND_S)
        assert not sockets.exists()
    assert list(folder.iterdir()) == []
