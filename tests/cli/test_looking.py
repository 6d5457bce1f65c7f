"""``ps``, ``logs``, ``clean``, ``down`` over runtime directories, without a machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hmmnet.cli import exit_code
from hmmnet.cli.logs import Reader
from hmmnet.cli.ps import how_long
from hmmnet.launcher.directory import DeviceRecord, Directory, new_record


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hn-") as folder:
        monkeypatch.setenv("HMMNET_DIR", folder)
        monkeypatch.setenv("COLUMNS", "120")
        yield Path(folder)


def machine(name: str, devices: int = 2, state: str = "running", kind: str = "up") -> Directory:
    directory = Directory.create(name)
    record = new_record(name, "two-gpus", kind)
    record.state, record.rate = state, 0.25
    record.devices = [DeviceRecord(f"gpu{i}", "gpu", 1 << 34, 4000 + i, "ready") for i in range(devices)]
    directory.write(record)
    return directory


def line(time_s: float, process: str, text: str, level: str = "INFO") -> str:
    return json.dumps({"time_s": time_s, "process": process, "pid": 1, "level": level, "logger": "hmmnet", "text": text}) + "\n"


def test_ps_shows_machines_and_their_devices(capsys: pytest.CaptureFixture[str]) -> None:
    """Name, state, topology, how many devices are ready, and each with its process."""
    directory = machine("default")
    record = directory.read()
    assert record is not None
    record.devices[1].state, record.devices[1].how = "lost", "killed by SIGKILL"
    directory.write(record)
    assert exit_code(["ps"]) == 0
    out = capsys.readouterr().out
    for text in ("default", "running", "two-gpus", "1 of 2 ready", "gpu0", "4000", "16 GiB", "lost (killed by SIGKILL)"):
        assert text in out
    directory.remove()


def test_ps_says_what_was_unplugged(capsys: pytest.CaptureFixture[str]) -> None:
    """It is not lost, and there is nothing to explain."""
    directory = machine("default")
    record = directory.read()
    assert record is not None
    record.devices[1].state = "unplugged"
    directory.write(record)
    assert exit_code(["ps"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].split()[-1] == "unplugged"
    assert "lost" not in out
    directory.remove()


def test_ps_of_many_devices_names_those_that_are_not_ready(capsys: pytest.CaptureFixture[str]) -> None:
    """64 lines would hide the one that matters; asked by name, all are shown."""
    directory = machine("big", devices=64)
    record = directory.read()
    assert record is not None
    record.devices[7].state = "lost"
    directory.write(record)
    assert exit_code(["ps"]) == 0
    out = capsys.readouterr().out
    assert "63 gpu ready" in out
    assert "gpu7 " in out
    assert "gpu8 " not in out
    assert exit_code(["ps", "big"]) == 0
    assert "gpu8 " in capsys.readouterr().out
    directory.remove()


def test_ps_reports_what_is_stale_and_how_to_clean(capsys: pytest.CaptureFixture[str]) -> None:
    """Failed with its reason, dead without one; `clean` removes both."""
    failed = machine("failed", state="failed")
    record = failed.read()
    assert record is not None
    record.why = "the host process killed by SIGKILL"
    failed.write(record)
    failed.release()
    machine("dead").release()
    assert exit_code(["ps"]) == 0
    out = capsys.readouterr().out
    assert "killed by SIGKILL" in out
    assert "gone: dead, failed" in out
    assert "hmmnet clean" in out
    assert exit_code(["ps", "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert (entries["dead"]["state"], entries["failed"]["state"], entries["dead"]["alive"]) == ("dead", "failed", False)
    assert exit_code(["clean", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == ["dead", "failed"]
    assert exit_code(["ps"]) == 0
    assert "no machine runs" in capsys.readouterr().out


def test_the_way_to_the_logs_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Whether the cause that the machine left tells it, or not."""
    for name, why in (("with", 'its host was killed; "hmmnet logs with" tells more'), ("without", "the disk was full")):
        left = machine(name, state="failed")
        record = left.read()
        assert record is not None
        record.why = why
        left.write(record)
        left.release()
    assert exit_code(["ps"]) == 0
    told = capsys.readouterr().out
    assert told.count('"hmmnet logs with" tells more') == told.count('"hmmnet logs without" tells more') == 1


def test_who_wants_a_machine_that_failed_is_told_why(capsys: pytest.CaptureFixture[str]) -> None:
    """And how to have it again; not that there is none."""
    left = machine("worn", state="failed")
    record = left.read()
    assert record is not None
    record.why = 'the host process killed by SIGKILL; "hmmnet logs worn" tells more'
    left.write(record)
    left.release()
    assert exit_code(["check", "worn"]) == 1
    assert capsys.readouterr().err == f'hmmnet check: machine "worn" has failed: {record.why}; start it anew with "hmmnet up --name worn"\n'


def test_a_folder_without_a_record_is_shown_too(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A launcher that was killed in its first moments."""
    Directory.create("young").release()
    assert exit_code(["ps"]) == 0
    assert "young" in capsys.readouterr().out


def test_logs_come_in_the_order_of_time(capsys: pytest.CaptureFixture[str]) -> None:
    """Of all processes, rotated files and the text that processes wrote to stderr included."""
    directory = machine("default")
    (directory.logs / "host.jsonl.old").write_text(line(1, "host", "first"))
    (directory.logs / "host.jsonl").write_text(line(3, "host", "third"))
    (directory.logs / "gpu0.jsonl").write_text(line(2, "gpu0", "second") + line(4, "gpu0", "fourth", "ERROR"))
    (directory.logs / "stderr.txt").write_text("Segmentation fault\n")
    assert exit_code(["logs"]) == 0
    out = capsys.readouterr().out
    assert [word for word in out.split() if word in {"first", "second", "third", "fourth", "Segmentation"}] == [
        "first", "second", "third", "fourth", "Segmentation",
    ]  # fmt: skip
    assert exit_code(["logs", "default", "--process", "gpu0", "--level", "error", "--json"]) == 0
    assert [json.loads(row)["text"] for row in capsys.readouterr().out.splitlines()] == ["fourth"]
    assert exit_code(["logs", "-p", "gpu1"]) == 1
    assert 'device "gpu1" of machine "default" has written nothing yet' in capsys.readouterr().err
    assert exit_code(["logs", "-p", "gpu9"]) == 2
    assert 'did you mean "gpu0"?' in capsys.readouterr().err
    directory.remove()


def test_the_last_lines_only(capsys: pytest.CaptureFixture[str]) -> None:
    """Of what passes the other choices, over all files."""
    directory = machine("default")
    (directory.logs / "host.jsonl").write_text("".join(line(2 * i, "host", f"h{i}") for i in range(4)))
    (directory.logs / "gpu0.jsonl").write_text("".join(line(2 * i + 1, "gpu0", f"g{i}") for i in range(4)))
    for options, told in (("-n 3", "g2 h3 g3"), ("--tail 2 -p host", "h2 h3"), ("-n 0", ""), ("-n 99 -p gpu0", "g0 g1 g2 g3")):
        assert exit_code(["logs", "--json", *options.split()]) == 0
        assert [json.loads(row)["text"] for row in capsys.readouterr().out.splitlines()] == told.split()
    assert exit_code(["logs", "-n", "-1"]) == 2
    directory.remove()


def test_following_gives_what_is_new_once(tmp_path: Path) -> None:
    """Half a line waits for its end; a file that is rotated away goes on where it was."""
    reader = Reader(tmp_path, None, 0)
    file = tmp_path / "host.jsonl"
    whole = line(1, "host", "one")
    file.write_text(whole[:10])
    assert list(reader.read()) == []
    file.write_text(whole)
    assert list(reader.read()) == [whole.rstrip()]
    file.rename(tmp_path / "host.jsonl.old")
    file.write_text(line(2, "host", "two"))
    assert [json.loads(row)["text"] for row in reader.read()] == ["two"]
    assert list(reader.read()) == []


def test_logs_of_a_machine_that_failed_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    """Until they are cleaned away; following it ends at once."""
    directory = machine("default", state="failed")
    (directory.logs / "launcher.jsonl").write_text(line(1, "launcher", "the host is gone"))
    directory.release()
    assert exit_code(["logs", "-f"]) == 0
    captured = capsys.readouterr()
    assert "the host is gone" in captured.out
    assert "has ended" in captured.err


def test_several_machines_must_be_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    """Unless one is called default."""
    one, two = machine("one"), machine("two")
    assert exit_code(["logs"]) == 1
    assert "say which: one, two" in capsys.readouterr().err
    default = machine("default")
    assert exit_code(["logs"]) == 0
    for directory in (one, two, default):
        directory.remove()


def test_down_ends_the_launcher_and_nobody_else(capsys: pytest.CaptureFixture[str]) -> None:
    """A process that got the number later is not ours to end; a program's machine ends with its program."""
    program = """
import signal, sys, time
from hmmnet.launcher.directory import Directory, new_record
directory = Directory.create("default")
signal.signal(signal.SIGTERM, lambda *_: (directory.remove(), sys.exit(0)))
directory.write(new_record("default", "two-gpus", "up"))
print("up", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        launcher.stdout.readline()
        assert exit_code(["down"]) == 0
        assert launcher.wait(10) == 0
    assert 'machine "default" has ended' in capsys.readouterr().out

    directory = machine("mine", kind="program")
    assert exit_code(["down", "mine"]) == 1
    assert f"process id {os.getpid()}" in capsys.readouterr().err
    record = directory.read()
    assert record is not None
    record.kind, record.process_started = "up", record.process_started + 1
    directory.write(record)
    assert exit_code(["down", "mine"]) == 0  # we live: the record's process is another one, long gone
    directory.remove()


@pytest.mark.parametrize(("seconds", "text"), [(3, "3 s"), (300, "5 min"), (8000, "2 h")])
def test_ages_are_rough(seconds: float, text: str) -> None:
    """Nobody wants to know the milliseconds."""
    assert how_long(seconds) == text
