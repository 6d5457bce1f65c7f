"""Files that commands write: whether they can be is found out before the work, and where they cannot be after it, nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from pathlib import Path

from hmmnet.errors import HmmnetError, WrongUse
from hmmnet.topology.files import exists

IN_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY)
"""What a folder answers that takes no new file, though the one in it may be written: one mounted into a container, for example."""


def writable(path: Path) -> None:
    """Find out before the work whether `path` can be written; what is there stays. Raises WrongUse."""
    there = exists(path)
    try:
        with path.open("ab"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise WrongUse(_unwritten(path, error)) from error


def write(path: Path, text: str) -> None:
    """Write `text` to `path`, all of it or nothing: until then what was there stays, unless its folder takes no new file (`IN_PLACE`).

    Raises HmmnetError.
    """
    try:
        target = path.resolve()
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")  # a pipe, a terminal
        else:
            _replace(target, text)
    except OSError as error:
        raise HmmnetError(_unwritten(path, error)) from error


def attempt(path: Path, text: str) -> HmmnetError | None:
    """As `write`, for who has more to say before that is raised which is returned."""
    try:
        write(path, text)
    except HmmnetError as error:
        return error
    return None


def _replace(target: Path, text: str) -> None:
    """Through a new file beside it. Raises OSError."""
    new = target.with_name(f".hmmnet-{secrets.token_hex(8)}")
    try:
        with new.open("x", encoding="utf-8") as file:  # nobody else's, and no link
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # some disks say only now that they are full
        if target.exists():
            shutil.copymode(target, new)
        new.replace(target)
    except OSError as error:
        if error.errno not in IN_PLACE or not target.exists():
            raise
        target.write_text(text, encoding="utf-8")
    finally:
        with contextlib.suppress(OSError):  # a folder of a read-only disk answers EROFS, also for what is not there
            new.unlink()


def _unwritten(path: Path, error: OSError) -> str:
    return f"{path}: cannot be written: {error.strerror or error}; name another file"
