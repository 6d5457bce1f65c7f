"""Folders of who measures: gone with the block, or when their maker was killed and somebody cleans."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hmmnet.cli import exit_code
from hmmnet.launcher.scratch import PREFIX, UNLOCKED_S, remove_left, scratch

MAKER = "import time; from hmmnet.launcher.scratch import scratch\nwith scratch() as folder: print(folder, flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hn-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setenv("HMMNET_DIR", f"{folder}/machines")
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_a_folder_goes_with_its_block() -> None:
    """Also by an error."""
    with pytest.raises(ZeroDivisionError), scratch() as folder:
        Path(folder, "socket").touch()
        raise ZeroDivisionError
    assert not Path(folder).exists()


def test_clean_takes_what_a_killed_process_left_and_nothing_that_lives(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A benchmark's sockets, once it is dead; folders of others with such a name, and young ones, are left alone."""
    foreign = base / "hmmnet-other"
    foreign.mkdir()
    with subprocess.Popen([sys.executable, "-c", MAKER], stdout=subprocess.PIPE, text=True) as maker, scratch() as mine:
        assert maker.stdout is not None
        theirs = Path(maker.stdout.readline().strip())
        assert remove_left() == []
        maker.kill()
        maker.wait()
        assert theirs.is_dir()
        assert exit_code(["clean"]) == 0
        assert capsys.readouterr().out == f"removed: {theirs.name}\n"
        assert not theirs.exists()
        assert Path(mine).is_dir()
    assert foreign.is_dir()


def test_a_folder_without_a_lock_is_left_when_it_is_old(base: Path) -> None:
    """Its maker died before it had one; another may be about to get it."""
    young, old = base / f"{PREFIX}young", base / f"{PREFIX}old"
    for folder in (young, old):
        folder.mkdir()
    was = old.stat().st_mtime - 2 * UNLOCKED_S
    os.utime(old, (was, was))
    assert remove_left() == [old.name]
    assert young.is_dir()


def test_who_cleans_while_a_folder_gets_its_lock_takes_it_and_another_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the lock's file and the lock it looks like a dead process's."""
    lock, cleaned = fcntl.flock, list[str]()

    def late(*given: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        cleaned.extend(remove_left())
        lock(*given)

    monkeypatch.setattr(fcntl, "flock", late)
    with scratch() as folder:
        assert Path(folder).is_dir()
        assert len(cleaned) == 1
        assert remove_left() == []
