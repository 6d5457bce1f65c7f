"""Files that commands write: whether they can be is found out before the work, not after it."""

from __future__ import annotations

from pathlib import Path

from hmmnet.errors import HmmnetError, WrongUse
from hmmnet.topology.files import exists


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
    """Write `text` to `path`; where that fails no empty file is left. Raises HmmnetError."""
    there = exists(path)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        if not there:
            path.unlink(missing_ok=True)
        raise HmmnetError(_unwritten(path, error)) from error


def _unwritten(path: Path, error: OSError) -> str:
    return f"{path}: cannot be written: {error.strerror or error}; name another file"
