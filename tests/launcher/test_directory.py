"""Runtime directories: one machine a name, stale ones found and removed, sockets within the length that a socket can have."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from copy import copy
from pathlib import Path

import pytest

from hmmnet.errors import HmmnetError
from hmmnet.launcher.directory import (
    Directory,
    MachineExists,
    MachineRecord,
    base_directory,
    check_name,
    directories,
    new_record,
    process_started,
    remove_stale,
)
from hmmnet.machine import machine_directory


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hn-") as folder:
        monkeypatch.setenv("HMMNET_DIR", folder)
        yield Path(folder)


def record(directory: Directory, sockets: str = "") -> MachineRecord:
    made = new_record(directory.name, "two-gpus", "up")
    made.sockets = sockets
    return made


def test_create_makes_what_a_machine_needs(base: Path) -> None:
    """A secret that only the user can read, a folder for logs, and the lock."""
    directory = Directory.create("default")
    assert (base / "default" / "secret").stat().st_mode & 0o777 == 0o600
    assert len(directory.secret()) == 32
    assert directory.logs.is_dir()
    assert directory.alive()
    assert [found.name for found in directories()] == ["default"]
    directory.remove()
    assert list(base.iterdir()) == []


def test_a_second_machine_of_the_name_is_told_how_to_go_on() -> None:
    """The text names the machine, its process, and the three ways on."""
    directory = Directory.create("default")
    directory.write(record(directory))
    with pytest.raises(MachineExists) as caught:
        Directory.create("default")
    text = str(caught.value)
    assert f"process {os.getpid()}" in text
    for way in ("--on default", "hmmnet down default", "--name OTHER"):
        assert way in text
    directory.remove()
    Directory.create("default").remove()


def test_what_a_killed_launcher_left_is_stale_and_can_be_taken_over(base: Path) -> None:
    """The kernel drops the lock of a dead process; its files do not stop the next machine."""
    program = "import os; from hmmnet.launcher.directory import Directory; Directory.create('dead'); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", program], check=False)
    stale = Directory.named("dead")
    assert stale.path.is_dir()
    assert not stale.alive()
    (stale.logs / "host.jsonl").write_text("old\n")
    directory = Directory.create("dead")
    assert list(directory.logs.iterdir()) == []
    directory.remove()


def test_clean_removes_the_stale_and_leaves_the_living(base: Path) -> None:
    """Also folders without a record, and short socket folders that a record names."""
    living = Directory.create("living")
    dead = Directory.create("dead")
    sockets = Path(tempfile.mkdtemp(prefix="hmmnet-dead-", dir="/tmp"))
    (sockets / "control").touch()
    dead.write(record(dead, sockets=str(sockets)))
    dead.release()
    assert remove_stale() == ["dead"]
    assert not sockets.exists()
    assert living.alive()
    assert [found.name for found in directories()] == ["living"]
    living.remove()


def test_only_socket_folders_of_ours_are_removed(base: Path, tmp_path: Path) -> None:
    """A record is a file that anything may have written: it cannot name a folder elsewhere for removal."""
    dead = Directory.create("dead")
    dead.write(record(dead, sockets=str(tmp_path)))
    dead.release()
    remove_stale()
    assert tmp_path.is_dir()


def test_sockets_move_to_a_short_folder_when_the_path_is_long(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket's path has 107 bytes at most."""
    directory = Directory.create("default")
    assert directory.sockets() == directory.path
    directory.remove()
    monkeypatch.setenv("HMMNET_DIR", str(base / ("x" * 80)))
    directory = Directory.create("default")
    sockets = directory.sockets()
    assert sockets.parent == Path("/tmp")
    assert sockets.name.startswith("hmmnet-default-")
    directory.write(record(directory, sockets=str(sockets)))
    directory.remove()
    assert not sockets.exists()


def test_a_broken_record_is_no_record() -> None:
    """A reader survives what is written there."""
    directory = Directory.create("default")
    for content in (b"", b"{", b'{"name": 3}', b"\xff"):
        (directory.path / "machine.json").write_bytes(content)
        assert directory.read() is None
    directory.remove()


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["write_secret", "Directory._replace"])
def test_a_machine_on_a_full_disk_does_not_begin(place: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence with place, cause and mend; no folder stays that would look like a machine."""
    monkeypatch.setattr(f"hmmnet.launcher.directory.{place}", no_room)
    with pytest.raises(HmmnetError, match=r"default: cannot be written: No space left on device; .* HMMNET_DIR"):
        Directory.create("default", new_record("default", "two-gpus", "up"))
    assert list(base.iterdir()) == []


def test_a_disk_that_fills_up_later_hides_no_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The record was there from the beginning, and is written over where it lies; what has no room there either is said once."""
    directory = Directory.create("default", new_record("default", "two-gpus", "up"))
    monkeypatch.setattr(Directory, "_replace", no_room)
    for state in ("running", "up"):
        written = record(directory)
        written.state = state
        directory.write(written)
        assert directory.read() == written
    monkeypatch.setattr(Directory, "_write_over", no_room)
    directory.write(record(directory))
    directory.write(record(directory))
    assert directory.read() == written
    assert capsys.readouterr().err.count("No space left on device") == 1
    directory.remove()


async def test_a_disk_that_is_full_at_the_second_signature_stops_no_machine(
    base: Path, monkeypatch: pytest.MonkeyPatch, full_at_the_second_signature: list[int]
) -> None:
    """A program's machine, which signs again when it knows where its sockets are: the folder stays signed as it was at first."""
    far = base / ("x" * 100)
    monkeypatch.setenv("HMMNET_DIR", str(far))
    made = new_record("default", "two-gpus", "program")
    first = copy(made)
    async with machine_directory(made) as directory:
        before, after = full_at_the_second_signature
        assert before < after
        assert directory.signature() == first
        assert directory.read() == made
        sockets = Path(made.sockets)
        assert sockets.is_dir()
    assert list(far.iterdir()) == []
    assert not sockets.exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a" * 33, "a b", "ü"])
def test_names_that_are_no_file_names_are_refused(name: str) -> None:
    """The text says what a name may be."""
    with pytest.raises(HmmnetError, match="letters, digits"):
        check_name(name)


def test_a_base_that_is_a_file_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the way out."""
    file = base / "file"
    file.touch()
    monkeypatch.setenv("HMMNET_DIR", str(file))
    with pytest.raises(HmmnetError, match="HMMNET_DIR"):
        base_directory()


def test_process_start_times_tell_processes_apart() -> None:
    """Ours is stable; no process has none."""
    assert process_started(os.getpid()) == process_started(os.getpid()) > 0
    assert process_started(0) == 0
