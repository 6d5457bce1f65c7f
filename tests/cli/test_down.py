"""``hmmnet down``: which process it ends, and what it says of what it cannot end."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from hmmnet.cli import exit_code
from hmmnet.launcher.directory import Directory, new_record, process_started


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hn-") as folder:
        monkeypatch.setenv("HMMNET_DIR", folder)
        yield Path(folder)


LAUNCHER = """
import signal, sys, time
from pathlib import Path
from hmmnet.launcher.directory import Directory, new_record, process_started
name, kind = sys.argv[1:]
directory = Directory.create(name, new_record(name, "two-gpus", kind))
signal.signal(signal.SIGTERM, lambda *_: (directory.remove(), sys.exit(0)))
print("up", flush=True)
time.sleep(60)
"""


@contextmanager
def launcher(name: str, kind: str = "up") -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds a machine's folder, and ends well when told to."""
    with subprocess.Popen([sys.executable, "-c", LAUNCHER, name, kind], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("words", [["down", "broken"], ["down", "--all"], ["down"]])
@pytest.mark.parametrize("damage", [b"", b'{"name": "broken", "pid"', b'{"pid": 1}'])
def test_a_machine_whose_record_is_damaged_can_be_ended(damage: bytes, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """By what its lock says of it; its sockets go, too."""
    with launcher("broken") as process:
        Directory.named("broken").record_file.write_bytes(damage)
        assert exit_code(words) == 0
        assert process.wait(10) == 0
    assert capsys.readouterr().out == 'machine "broken" has ended\n'
    assert not Directory.named("broken").path.exists()


def test_a_program_whose_record_is_damaged_is_not_ended(capsys: pytest.CaptureFixture[str]) -> None:
    """Its machine ends with it, as any program's."""
    with launcher("broken", "program") as process:
        Directory.named("broken").record_file.write_bytes(b"")
        assert exit_code(["down", "broken"]) == 1
        assert process.poll() is None
        assert f"belongs to the program with process id {process.pid} and ends with it (kill {process.pid})" in capsys.readouterr().err


@pytest.mark.parametrize("signed", [b"", None])
def test_of_a_machine_that_nothing_is_known_of_it_is_said_who_holds_it(signed: bytes | None, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody is killed on a guess: neither who it is, nor a process of an earlier holder's number."""
    with launcher("broken") as process:
        directory = Directory.named("broken")
        directory.record_file.write_bytes(b"")
        if signed is None:  # as of an earlier holder, whose number has another process now
            record = new_record("broken", "two-gpus", "up")
            record.process_started += 1
            signed = msgspec.json.encode(record)
        (directory.path / "lock").write_bytes(signed)
        assert exit_code(["down", "broken"]) == 1
        assert process.poll() is None
        told = capsys.readouterr().err
        assert f"{directory.record_file} is damaged" in told
        assert f'process {process.pid} holds it: see what that is with "ps {process.pid}", and end it with "kill {process.pid}"' in told
        assert exit_code(["clean"]) == 0
        assert directory.path.exists()


def test_down_names_all_that_do_not_run_and_ends_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    """In one message; wrong names, too, and machines that have failed."""
    record = new_record("fallen", "two-gpus", "up")
    record.state, record.why = "failed", "its host was killed"
    failed = Directory.create("fallen", record)
    failed.release()
    with launcher("one") as process, launcher("two"):
        assert exit_code(["down", "gone", "one", "fallen", "away", "no/name"]) == 1
        assert process.wait(10) == 0
        told = capsys.readouterr()
        assert told.out == 'machine "one" has ended\n'
        assert 'no machine "gone" or "away" runs; running: two\n' in told.err
        assert 'machine "fallen" has failed: its host was killed' in told.err
        assert "'no/name' cannot name a machine" in told.err
    failed.remove()


def test_a_record_that_names_another_process_ends_nobody_else(capsys: pytest.CaptureFixture[str]) -> None:
    """The lock's holder has signed it, and that one ends."""
    with launcher("broken") as process, subprocess.Popen(["sleep", "60"]) as other:
        directory = Directory.named("broken")
        record = directory.read()
        assert record is not None
        record.pid, record.process_started = other.pid, process_started(other.pid)
        directory.record_file.write_bytes(msgspec.json.encode(record))
        assert exit_code(["down", "broken"]) == 0
        assert process.wait(10) == 0
        assert other.poll() is None
        other.kill()
    assert capsys.readouterr().out == 'machine "broken" has ended\n'


@pytest.mark.parametrize("pid", [0, -1, 1 << 22])
def test_no_process_is_not_who_signed(pid: int, capsys: pytest.CaptureFixture[str]) -> None:
    """No process has no start time, which is none to compare."""
    with launcher("broken") as process:
        directory = Directory.named("broken")
        record = new_record("broken", "two-gpus", "up")
        record.pid, record.process_started = pid, 0
        directory.record_file.write_bytes(b"")
        (directory.path / "lock").write_bytes(msgspec.json.encode(record))
        assert exit_code(["down", "broken"]) == 1
        assert process.poll() is None
    assert "is damaged" in capsys.readouterr().err
