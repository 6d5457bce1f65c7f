"""``hmmnet up`` and what one does with it, all as real processes.

    hmmnet up (launcher) ── host (process) ── ipc ──┬── gpu0 (process, child of the zygote)
                                                    └── gpu1
    hmmnet run --on ... (client) ── ipc ── host

Whoever is killed, nothing may survive that has lost its purpose; the operating system says what lives.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import hmmnet
from hmmnet.errors import BusError, PeerLost
from hmmnet.launcher.directory import Directory
from hmmnet.lifeline import wait_ended
from hmmnet.pages import PAGE_SIZE

COMMAND = (sys.executable, "-m", "hmmnet")
BOUND_S = 100
"""A hang, and no slow computer: whatever is waited for comes within it."""


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hn-") as folder:
        monkeypatch.setenv("HMMNET_DIR", folder)
        yield Path(folder)


class Up:
    """A running ``hmmnet up``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.record: dict[str, Any] = {}

    def until(self, state: str) -> None:
        """Read records until the machine, or one of its devices, is in `state`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.record = json.loads(line)
            if state in (self.record["state"], *(device["state"] for device in self.record["devices"])):
                return
        raise AssertionError(f"the command ended before {state}: {self.record}")

    @property
    def pids(self) -> list[int]:
        """Every process of the machine but the launcher."""
        devices = [device["pid"] for device in self.record["devices"]]
        zygote = int(Path(f"/proc/{devices[0]}/stat").read_text().rpartition(")")[2].split()[1])
        return [self.record["host_pid"], zygote, *devices]


@contextmanager
def up(*arguments: str, ready: bool = True) -> Iterator[Up]:
    with subprocess.Popen(
        [*COMMAND, "up", "--rate", "1", "--json", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            running = Up(process)
            if ready:
                running.until("running")
            yield running
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGCONT)


def second(start_s: float) -> float:
    """The second within which a signal ends all, as long as it is here, where the same machine took `start_s` to start just now.

    A start is some seconds of work; an end is little work, and waits for nothing. So where a computer is busy, or slow, it is the shorter.
    """
    return max(1.0, start_s)


def gone(*pids: int) -> None:
    async def wait() -> None:
        with trio.fail_after(BOUND_S):
            for pid in pids:
                await wait_ended(pid)

    trio.run(wait)


def hmmnet_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=BOUND_S)


def test_ctrl_c_ends_it_cleanly_within_a_second(base: Path) -> None:
    """The terminal sends SIGINT to the whole process group; exit code 0, no word on stderr, no process, no file."""
    started_s = time.monotonic()
    with up() as machine:
        pids = machine.pids
        began_s = time.monotonic()
        os.killpg(machine.process.pid, signal.SIGINT)
        assert machine.process.wait(BOUND_S) == 0
        gone(*pids)
        took_s = time.monotonic() - began_s
        assert machine.process.stderr is not None
        assert machine.process.stderr.read() == ""
    assert took_s < second(began_s - started_s)
    assert list(base.iterdir()) == []


def test_a_machine_of_another_personality() -> None:
    """`--personality v25`: the host process keeps those rules, devices serve, a client is told; a wrong name is refused."""
    with up("--personality", "v25", "--name", "old"):

        async def use() -> str:
            async with hmmnet.attach("old") as machine:
                process = await machine.create_process()
                address = await process.mmap(PAGE_SIZE)
                await process.store(address, 41)
                assert await process.migrate(address, PAGE_SIZE, "gpu0") == PAGE_SIZE
                assert await process.load(address) == 41
                return str((await machine.report())["personality"])

        assert trio.run(use) == "v25"
    done = hmmnet_command("up", "--personality", "v26")
    assert done.returncode != 0
    assert "there are today, v25" in done.stderr


@pytest.mark.parametrize("who", [0, 1], ids=["host", "zygote"])
def test_what_hangs_does_not_hold_up_ctrl_c(who: int) -> None:
    """A stopped host cannot say goodbye, a stopped zygote cannot kill: both are killed."""
    with up() as machine:
        pids = machine.pids
        os.kill(pids[who], signal.SIGSTOP)
        machine.process.send_signal(signal.SIGINT)
        machine.process.wait(BOUND_S)
    gone(*pids)


def test_nothing_survives_a_killed_launcher() -> None:
    """SIGKILL: host, zygote and devices go too; what is left is reported, cleaned, and no obstacle."""
    with up() as machine:
        pids = machine.pids
        machine.process.kill()
        gone(*pids)
    shown = hmmnet_command("ps")
    assert "dead" in shown.stdout
    assert "hmmnet clean" in shown.stdout
    with up():
        pass
    with up() as machine:
        machine.process.kill()
        gone(machine.record["host_pid"])
    assert hmmnet_command("clean").stdout == "removed: default\n"


def test_a_second_up_says_so_and_how_to_go_on() -> None:
    """One line, exit code 1; another name works."""
    with up() as machine:
        second = hmmnet_command("up", "--rate", "1")
        assert (second.returncode, second.stdout) == (1, "")
        assert second.stderr.count("\n") == 1
        assert f"process {machine.process.pid}" in second.stderr
        assert "--on default" in second.stderr
        with up("--name", "other"):
            names = [entry["name"] for entry in json.loads(hmmnet_command("ps", "--json").stdout)]
            assert names == ["default", "other"]


def test_a_killed_host_takes_the_devices_along() -> None:
    """The command ends with exit code 1 and says which process it was; logs and reason stay until they are cleaned away."""
    with up() as machine:
        pids = machine.pids
        os.kill(pids[0], signal.SIGKILL)
        assert machine.process.wait(BOUND_S) == 1
        assert machine.process.stderr is not None
        assert "the host process killed by SIGKILL" in machine.process.stderr.read()
        gone(*pids)
    (entry,) = json.loads(hmmnet_command("ps", "--json").stdout)
    assert (entry["state"], entry["alive"]) == ("failed", False)
    assert "SIGKILL" in hmmnet_command("logs").stdout


def test_devices_without_launcher_and_host_end_by_themselves() -> None:
    """Their lease is over: a device that lost its host stops, whether somebody ends it or not."""
    with up() as machine:
        pids = machine.pids
        os.kill(machine.process.pid, signal.SIGSTOP)
        os.kill(pids[1], signal.SIGSTOP)
        os.kill(pids[0], signal.SIGKILL)
        deadline_s = time.monotonic() + BOUND_S
        while not all(is_dead(pid) for pid in pids[2:]):
            assert time.monotonic() < deadline_s, "the devices still run"
            time.sleep(0.05)
        os.kill(pids[1], signal.SIGCONT)
        os.kill(machine.process.pid, signal.SIGCONT)
        assert machine.process.wait(BOUND_S) == 1


def is_dead(pid: int) -> bool:
    """Whether a process has ended, perhaps without anybody having waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def test_a_killed_device_is_reported_and_shown() -> None:
    """The host knows at once, `ps` shows it, the log says it, a client's access to its pages is SIGBUS, the rest goes on."""
    with up() as machine:
        async with hmmnet.attach("default") as remote:
            process = await remote.process()
            address = await process.mmap(PAGE_SIZE)
            await process.write(address, b"x" * PAGE_SIZE)
            assert await process.migrate(address, PAGE_SIZE, "gpu0") == PAGE_SIZE
            os.kill(machine.record["devices"][0]["pid"], signal.SIGKILL)
            await trio.to_thread.run_sync(machine.until, "lost")
            with trio.fail_after(BOUND_S), pytest.raises(BusError, match="gpu0"):
                await process.read(address, 8)
            assert await process.migrate(await process.mmap(PAGE_SIZE), PAGE_SIZE, "gpu1") >= 0
        shown = await trio.to_thread.run_sync(hmmnet_command, "ps")
        assert "lost (killed by SIGKILL)" in shown.stdout
        assert "1 of 2 ready" in shown.stdout
        logged = await trio.to_thread.run_sync(hmmnet_command, "logs", "--level", "warning")
        assert "device gpu0 is gone: killed by SIGKILL" in logged.stdout


@pytest.mark.parametrize("transport", ["ring", "ipc", "tcp"])
def test_a_machine_in_the_background(base: Path, transport: str) -> None:
    """``up --detach`` returns when it runs; run, logs and down use it; output captured by a pipe does not hold it."""
    started = hmmnet_command("up", "--detach", "--rate", "1", "--transport", transport)
    assert started.returncode == 0, started.stderr
    record = Directory.named("default").read()
    assert record is not None
    try:
        assert started.stderr == ""
        assert f"process {record.pid}" in started.stdout
        done = hmmnet_command("run", "vector_add", "n=5000", "--on", "default", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["correct"] is True
        checked = hmmnet_command("check")
        assert (checked.returncode, checked.stdout.split("  ")[0]) == (0, "RIGHT"), checked.stdout + checked.stderr
        assert "machine default runs" in hmmnet_command("logs").stdout
    finally:
        ended = hmmnet_command("down")
    assert (ended.returncode, ended.stdout) == (0, 'machine "default" has ended\n')
    gone(record.pid, record.host_pid, *(device.pid for device in record.devices))
    assert list(base.iterdir()) == []


def test_a_background_start_that_fails_says_why_in_one_line(base: Path) -> None:
    """The socket folder cannot be made: the host's own words are in the logs."""
    with up():
        second = hmmnet_command("up", "--detach")
        assert second.returncode == 1
        assert "runs already" in second.stderr
        assert second.stderr.count("\n") == 1


def test_a_workload_of_ones_own_on_a_running_machine(tmp_path: Path) -> None:
    """``FILE.py:FUNCTION``; the same code as on a machine of its own."""
    file = tmp_path / "mine.py"
    file.write_text("""
async def double(machine, value):
    process = await machine.create_process()
    address = await process.malloc(8)
    await process.store(address, 2 * value)
    return {"value": await process.load(address), "devices": list(machine.device_names), "correct": value < 100}
""")
    with up():
        done = hmmnet_command("run", f"{file}:double", "value=21", "--on", "default", "--json")
        shown = json.loads(done.stdout)
        assert {(link["source"], link["target"]) for link in shown.pop("links")} >= {("node0", "gpu0"), ("gpu1", "node0")}
        assert shown == {"value": 42, "devices": ["gpu0", "gpu1"], "correct": True}
    own = hmmnet_command("run", f"{file}:double", "value=210", "--rate", "1", "--json")
    assert own.returncode == 1
    assert json.loads(own.stdout)["value"] == 420


async def test_attaching_to_a_machine_that_ends() -> None:
    """The client's next call says that the host is gone, and does not hang."""
    with up() as machine:
        async with hmmnet.attach() as remote:
            process = await remote.process()
            address = await process.malloc(64)
            await process.write(address, np.arange(8, dtype="<u8"))
            assert (await process.read_array(address, "<u8", 8)).tolist() == list(range(8))
            machine.process.send_signal(signal.SIGINT)
            with trio.fail_after(BOUND_S), pytest.raises(PeerLost):
                while True:
                    await process.load(address)
                    await trio.sleep(0.01)


def test_attaching_without_trio() -> None:
    """Scripts and notebooks."""
    with up(), hmmnet.attach("default") as remote:
        process = remote.process()
        address = process.malloc(64)
        process.store(address, 7)
        assert process.load(address) == 7
        assert remote.device_names == ("gpu0", "gpu1")


def test_a_disk_that_is_full_for_logs_does_not_stop_the_machine() -> None:
    """Every process may write 0 bytes to files: it runs, and says once for each log that it cannot be written."""
    program = f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); sys.argv = {['hmmnet', 'run', 'vector_add', 'n=3000', '--rate', '1', '--json']!r}; runpy.run_module('hmmnet', run_name='__main__')"  # noqa: E501 - one program
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=BOUND_S)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["correct"] is True
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def test_a_log_folder_on_a_full_disk(base: Path) -> None:
    """/dev/full stands in for a disk without room: one sentence for each process, and the machine runs."""
    text = """
import json, os, sys
from pathlib import Path
import trio, hmmnet
from hmmnet.observe import logs

logs_of = logs.JsonLines._write
def full(self, line):
    raise OSError(28, os.strerror(28))
logs.JsonLines._write = full

async def main():
    async with hmmnet.launch("two-gpus", rate=1.0) as machine:
        await machine.kill_device("gpu0")
        process = await machine.process()
        address = await process.malloc(8)
        await process.store(address, 5)
        print(await process.load(address))

trio.run(main)
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=BOUND_S)
    assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr
    assert done.stderr.count("cannot be written") == 1
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_leaves_nothing(base: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C is exit code 130, and kill 143; no traceback, no device, no file; within a second."""
    file = tmp_path / "mine.py"
    file.write_text("""
import trio

async def wait(machine):
    print(*[device.pid for device in machine.devices], flush=True)
    await trio.sleep_forever()
""")
    started_s = time.monotonic()
    with subprocess.Popen(
        [*COMMAND, "run", f"{file}:wait", "--rate", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        began_s = time.monotonic()
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=BOUND_S)
        took_s = time.monotonic() - began_s
    assert took_s < second(began_s - started_s)
    assert process.returncode == (130 if number is signal.SIGINT else 143)
    assert "Traceback" not in err
    gone(*pids)
    assert list(base.iterdir()) == []


def test_a_device_that_cannot_start_is_an_error_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in that cannot be loaded: its own words first, then ours, which name it; the background start says where to look."""
    plugin = tmp_path / "abacus-1.0.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: abacus\nVersion: 1.0\n")
    (plugin / "entry_points.txt").write_text("[hmmnet.devices]\nabacus = no_abacus_here:Abacus\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    file = tmp_path / "odd.toml"
    file.write_text("""
name = "odd"
[[memory]]
name = "node0"
size = "1 GiB"
[[device]]
name = "gpu0"
model = "abacus"
memory = "64 MiB"
[[link]]
a = "node0"
b = "gpu0"
bandwidth = "1 GB/s"
latency = "1 us"
""")
    own = hmmnet_command("run", "vector_add", "--topology", str(file), "--rate", "1")
    assert own.returncode == 1
    assert "abacus" in own.stderr
    assert own.stderr.splitlines()[-1].startswith("hmmnet run: device gpu0 ended with exit code 70 before it was ready")
    back = hmmnet_command("up", str(file), "--detach", "--rate", "1")
    assert back.returncode == 1
    assert "device gpu0 ended with exit code 70" in back.stderr
    assert back.stderr.count("\n") == 1
    assert "abacus" in hmmnet_command("logs").stdout
