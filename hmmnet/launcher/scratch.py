"""Folders for the sockets of who measures: they go with the block that made them, and what a killed process left goes with ``clean``.

Each has a file that is locked (flock) as long as its maker lives, however that ends, as a machine's folder has (`directory`).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_urlsafe

PREFIX = "hmmnet-scratch-"
LOCK = "lock"
UNLOCKED_S = 60.0
"""A folder without a lock that is older was left by a process that died at that very moment; a younger one may be getting its lock."""


@contextmanager
def scratch() -> Iterator[str]:
    """A folder of one's own while the block runs. Raises OSError when none can be made."""
    folder = Path(tempfile.gettempdir(), PREFIX + token_urlsafe(6))
    locks: list[int] = []
    try:  # from before there is anything: Ctrl-C may come at any moment
        while not _take(folder, locks):
            """Somebody cleaned up at that very moment."""
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for lock in locks:
            os.close(lock)


def _take(folder: Path, locks: list[int]) -> bool:
    """Make a folder and hold its lock, which is added to `locks`; False where it was taken for a dead process's before that."""
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        locks.append(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except FileNotFoundError:
        return False
    fcntl.flock(locks[-1], fcntl.LOCK_EX)
    return os.fstat(locks[-1]).st_nlink > 0


def remove_left() -> list[str]:
    """Remove this user's folders whose makers are dead; their names."""
    removed = []
    for folder in sorted(Path(tempfile.gettempdir()).glob(f"{PREFIX}*")):
        if _is_left(folder):
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder.name)
    return removed


def _is_left(folder: Path) -> bool:
    try:
        about = folder.stat(follow_symlinks=False)
        if about.st_uid != os.getuid():
            return False
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return folder.exists() and time.time() - about.st_mtime > UNLOCKED_S
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True
